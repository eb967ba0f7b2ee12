"""What a run is asked when its last stage has ended, and what it answers."""

from pathlib import Path

from jax.sharding import Mesh

from llava_jax import report
from llava_jax.answer_samples import choose_questions, usable_samples
from llava_jax.convert.source import ModelSource
from llava_jax.data.question_file import read_questions
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import ConfigError
from llava_jax.evaluation import (
    check_questions,
    draw_samples,
    evaluate,
    find_questions,
    model_name,
    predict,
)
from llava_jax.generation import open_trained_generator
from llava_jax.processes import is_first
from llava_jax.stage import Stage
from llava_jax.weights import as_trained


def check_asked(stages: list[Stage], tokenizer: Tokenizer) -> None:
    """Raises ConfigError or DataError when what `evaluate` asks could not be answered."""
    last = stages[-1].config
    if last.evaluate.path:
        check_questions(last, tokenizer)
    for key, asking in (("samples", stages), ("predict_with_generate", stages[-1:])):
        if getattr(last.evaluate, key) and not any(stage.evaluations for stage in asking):
            of_which = " of the last stage" if len(stages) > len(asking) else ""
            raise ConfigError(
                f"evaluate.{key} answers samples that are kept out of training, but there are none; set data.val_size, "
                f"data.eval_path or data.eval_dataset{of_which}."
            )
    if last.evaluate.predict_with_generate:
        choose_questions(last, stages[-1].evaluations, tokenizer, 1, "evaluate.predict_with_generate")


def answer_at_end(stage: Stage, before: ModelSource, tokenizer: Tokenizer, mesh: Mesh, workdir: Path) -> None:
    """Answers with the model that the last stage ended with, quantised if that was, and writes what came out; process 0
    does that. `before` is the model before that stage."""
    config, asked = stage.config, stage.config.evaluate
    if not (asked.path or asked.predict_with_generate):
        return
    generator = open_trained_generator(
        as_trained(
            before, config, stage.checkpoints, verify=False
        ),  # the stage has verified it, or just written it
        config,
        tokenizer,
        mesh,
        template=config.data.template,
        dtype=config.train.dtype,
        quantization=config.lora.quantization,
    )
    results = {}
    if asked.predict_with_generate:
        skip = config.data.on_bad_sample == "skip"
        questions = {
            name: find_questions(
                generator, data.dataset, usable_samples(data).tolist(), asked, skip_unreadable=skip
            )
            for name, data in stage.evaluations.items()
        }
        results, predictions = predict(generator, questions, asked)
        if is_first():
            report.write_evaluation(workdir, results, predictions, "generated_predictions.jsonl")
    if asked.path:
        evaluation, answered = evaluate(
            generator, read_questions(asked.path), asked, model_id=model_name(str(workdir))
        )
        results |= evaluation
        if is_first():
            report.write_evaluation(workdir, evaluation, answered, "predictions.jsonl")
            draw_samples(answered, asked.image_folder, workdir / "samples.png")
    print("\n".join(f"{name:<28} {value:.4g}" for name, value in results.items()), flush=True)
