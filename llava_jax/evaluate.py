"""python -m llava_jax.evaluate --model=DIR --questions=FILE | --data=FILE | --dataset=NAME --image_folder=DIR: accuracy
by generation."""

import json
from typing import TYPE_CHECKING

from absl import flags

from llava_jax.commands import run_command

if TYPE_CHECKING:
    from llava_jax.data.dataset import Dataset
    from llava_jax.generation import Generator

MODEL = flags.DEFINE_string(
    "model", None, "A run directory, a converted model directory or a Hugging Face directory."
)
QUESTIONS = flags.DEFINE_string("questions", None, "JSONL with question_id, image, text, answer, kind.")
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
PREDICTIONS = flags.DEFINE_string(
    "predictions", "", "Write the questions with their predictions here, as JSONL."
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

    from llava_jax.config import EvaluateConfig
    from llava_jax.errors import DataError
    from llava_jax.evaluation import evaluate, find_questions, predict

    config = EvaluateConfig(
        path=QUESTIONS.value or "",
        image_folder=IMAGE_FOLDER.value,
        batch_size=BATCH_SIZE.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        blind=BLIND.value,
    )
    if PREDICTIONS.value:
        open(
            PREDICTIONS.value, "w"
        ).close()  # a place that cannot be written is found before the questions are asked
    if QUESTIONS.value:
        results, answered = evaluate(_load(), config)
    else:
        dataset = _open_dataset()
        generator = _load()
        questions = find_questions(generator, dataset, range(len(dataset)), config)
        if not questions:
            raise DataError("There is nothing to ask; mend the data, or give another file.")
        results, answered = predict(generator, {"": questions}, config)
    if PREDICTIONS.value:
        with open(PREDICTIONS.value, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in answered)
    print(json.dumps(results, indent=2))


def _load() -> "Generator":
    from llava_jax.generation import load_generator

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
