"""python -m llava_jax.evaluate --model=DIR --questions=FILE --image_folder=DIR: accuracy by generation."""

import json

from absl import flags

from llava_jax.commands import run_command

MODEL = flags.DEFINE_string(
    "model", None, "A run directory, a converted model directory or a Hugging Face directory."
)
QUESTIONS = flags.DEFINE_string("questions", None, "JSONL with question_id, image, text, answer, kind.")
IMAGE_FOLDER = flags.DEFINE_string("image_folder", None, "Where the questions' images lie.")
TEMPLATE = flags.DEFINE_string("template", "", "Conversation template; default: the model's own.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Questions answered at a time.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Longest answer.", lower_bound=1)
BLIND = flags.DEFINE_bool("blind", False, "Ask again with another question's image.")
PREDICTIONS = flags.DEFINE_string(
    "predictions", "", "Write the questions with their predictions here, as JSONL."
)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the computation.")
flags.mark_flags_as_required(["model", "questions", "image_folder"])


def main() -> None:
    """Prints the accuracies."""
    print(f"llava_jax: reading {MODEL.value}", flush=True)

    from llava_jax.config import EvaluateConfig
    from llava_jax.evaluation import evaluate
    from llava_jax.generation import load_generator

    config = EvaluateConfig(
        path=QUESTIONS.value,
        image_folder=IMAGE_FOLDER.value,
        batch_size=BATCH_SIZE.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        blind=BLIND.value,
    )
    if PREDICTIONS.value:
        open(
            PREDICTIONS.value, "w"
        ).close()  # a place that cannot be written is found before the questions are asked
    results, answered = evaluate(
        load_generator(MODEL.value, template=TEMPLATE.value, dtype=DTYPE.value), config
    )
    if PREDICTIONS.value:
        with open(PREDICTIONS.value, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in answered)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_command(main)
