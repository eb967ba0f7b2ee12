"""python -m llava_jax.evaluate --model=DIR --questions=FILE | --data=FILE | --dataset=NAME --image_folder=DIR: accuracy
by generation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llava_jax.commands import run_command

if TYPE_CHECKING:
    from llava_jax.config import EvaluateConfig
    from llava_jax.data.dataset import Dataset
    from llava_jax.generation import Generator

_LETTER_ONLY = (
    "Answer with the option's letter from the given choices directly."  # llava/eval/model_vqa_science.py
)

MODEL = flags.DEFINE_string(
    "model", None, "A run directory, a converted model directory or a Hugging Face directory."
)
QUESTIONS = flags.DEFINE_string(
    "questions",
    None,
    "JSONL with question_id, text and, where there are any, image, answer, kind or category; or the original's "
    "ScienceQA list of conversations.",
)
DATA = flags.DEFINE_string(
    "data", None, "Conversations as for data.path: the last answer of each is generated and compared."
)
DATASET = flags.DEFINE_string("dataset", None, "The same as names of --dataset_dir/dataset_info.json.")
DATASET_DIR = flags.DEFINE_string("dataset_dir", "data", "Where dataset_info.json lies.")
IMAGE_FOLDER = flags.DEFINE_string("image_folder", "", "Where the images lie.")
TEMPLATE = flags.DEFINE_string("template", "", "Conversation template; default: the model's own.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Questions answered at a time.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Longest answer.", lower_bound=1)
BLIND = flags.DEFINE_bool("blind", False, "Ask --questions again with another question's image.")
SINGLE_PRED_PROMPT = flags.DEFINE_bool(
    "single_pred_prompt", False, f"End each of --questions with a line: {_LETTER_ONLY}"
)
PREDICTIONS = flags.DEFINE_string(
    "predictions",
    "",
    "Write the answers here, as JSONL: to --questions as the original does, to others as LLaMA-Factory does.",
)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the computation.")
QUANTIZATION = flags.DEFINE_enum(
    "quantization", "none", ["none", "int8", "nf4"], "Keeps the decoder's kernels in 8 or 4 bits."
)
flags.mark_flags_as_required(["model"])
flags.mark_flags_as_mutual_exclusive(["questions", "data", "dataset"], required=True)


def main() -> None:
    """Prints the accuracies."""
    print(f"llava_jax: reading {MODEL.value}", flush=True)

    from llava_jax.metrics import write_atomically

    predictions = _predictions()
    results, answered = _ask_questions() if QUESTIONS.value else _ask_dataset()
    print(json.dumps(results, indent=2), flush=True)
    if predictions:
        write_atomically(predictions, "".join(json.dumps(row) + "\n" for row in answered))


def _predictions() -> Path | None:
    """Where the answers go, after making sure that they can be written there."""
    from llava_jax.errors import ConfigError

    if not PREDICTIONS.value:
        return None
    path = Path(PREDICTIONS.value).resolve()
    if path.exists() and not path.is_file():
        raise ConfigError(f"--predictions={PREDICTIONS.value} is no file; name one.")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ConfigError(
            f"--predictions={PREDICTIONS.value} cannot be written ({error.strerror}); name a file in a directory where "
            "you may write."
        ) from error
    return path


def _ask_questions() -> tuple[dict[str, float], list[dict]]:
    from llava_jax.data.question_file import read_questions, require_pictures

    config = _config()
    questions = read_questions(config.path)
    require_pictures(config.path, questions, config.image_folder, blind=config.blind)
    if SINGLE_PRED_PROMPT.value:
        questions = [question | {"text": f"{question['text']}\n{_LETTER_ONLY}"} for question in questions]

    from llava_jax.evaluation import evaluate, model_name

    return evaluate(_load(), questions, config, model_id=model_name(MODEL.value))


def _ask_dataset() -> tuple[dict[str, float], list[dict]]:
    from llava_jax.errors import ConfigError, DataError

    for flag in (BLIND, SINGLE_PRED_PROMPT):
        if flag.value:
            raise ConfigError(f"--{flag.name} is about --questions; name a file of them, or leave it out.")

    from llava_jax.evaluation import find_questions, predict

    config, dataset = _config(), _open_dataset()
    generator = _load()
    questions = find_questions(generator, dataset, range(len(dataset)), config)
    if not questions:
        raise DataError("There is nothing to ask; mend the data, or give another file.")
    return predict(generator, {"": questions}, config)


def _config() -> "EvaluateConfig":
    from llava_jax.config import EvaluateConfig

    return EvaluateConfig(
        path=QUESTIONS.value or "",
        image_folder=IMAGE_FOLDER.value,
        batch_size=BATCH_SIZE.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        blind=BLIND.value,
    )


def _load() -> "Generator":
    from llava_jax.generation import load_generator
    from llava_jax.gpus import require_found

    require_found()
    return load_generator(
        MODEL.value, template=TEMPLATE.value, dtype=DTYPE.value, quantization=QUANTIZATION.value
    )


def _open_dataset() -> "Dataset":
    from llava_jax.config import DataConfig
    from llava_jax.data.dataset import open_datasets

    config = DataConfig(
        path=DATA.value or "",
        dataset=DATASET.value or "",
        dataset_dir=DATASET_DIR.value,
        image_folder=IMAGE_FOLDER.value,
    )
    return open_datasets(config, seed=0)[0]


if __name__ == "__main__":
    run_command(main)
