"""What the model says to the same few questions at every evaluation of a stage, side by side."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_jax.answers_page import to_page
from llava_jax.config import Config
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.questions import Question, make_questions, readable
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.evaluation import ask, compared
from llava_jax.generation import Generator, trained_network
from llava_jax.metrics import write_atomically
from llava_jax.processes import is_first


class AnswerSamples:
    """Asks `evaluate.samples` questions of each evaluation set, spread over its samples with images if it has any.

    Answers go to STEP.jsonl in `directory`, and index.html shows those of all steps beside the pictures; process 0
    writes. Raises DataError for sets of which nothing can be asked.
    """

    def __init__(self, config: Config, sets: dict[str, Pipeline], tokenizer: Tokenizer, directory: Path):
        self.config = config
        self.tokenizer = tokenizer
        self.processor = ImageProcessor.from_config(config.data, config.model)
        self.directory = directory
        self._graphdef: nnx.GraphDef | None = None  # of the network on the stage's mesh
        self.questions = choose_questions(
            config, sets, tokenizer, config.evaluate.samples, "evaluate.samples"
        )

    def answer(self, step: int, parameters: dict[str, jax.Array], mesh: Mesh) -> list[dict]:
        """Asks the stage's network with all its parameters, those after `step`; -> question and answer by row."""
        if self._graphdef is None:
            self._graphdef, _ = trained_network(self.config, mesh, self.config.train.dtype)
        generator = Generator(
            self._graphdef,
            parameters,
            self.tokenizer,
            mesh,
            template=self.config.data.template,
            image_processor=self.processor,
        )
        rows = []
        for name, questions in self.questions.items():
            answers = ask(generator, questions, self.config.evaluate)
            rows += [
                {"step": step, "set": name, "asked": question.asked, **compared(question, answer)}
                for question, answer in zip(questions, answers, strict=True)
            ]
        if is_first():
            self._write(step, rows)
        return rows

    def forget_after(self, step: int) -> None:
        """Drops what an interrupted run wrote beyond the checkpoint that it continues from."""
        for later in self._steps():
            if later > step and is_first():
                (self.directory / f"{later}.jsonl").unlink()

    def _write(self, step: int, rows: list[dict]) -> None:
        """A full disk is told; training goes on."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.directory / f"{step}.jsonl", text)
            write_atomically(self.directory / "index.html", to_page(self.config.name, self._rows()))
        except OSError as error:
            print(f"{self.directory} cannot be written now ({error.strerror}).", file=sys.stderr, flush=True)

    def _steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.directory.glob("*.jsonl") if path.stem.isdecimal())

    def _rows(self) -> list[dict]:
        """The rows of all evaluations, in order."""
        files = [self.directory / f"{step}.jsonl" for step in self._steps()]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def choose_questions(
    config: Config, sets: dict[str, Pipeline], tokenizer: Tokenizer, count: int, key: str
) -> dict[str, list[Question]]:
    """At most `count` questions of each evaluation set, spread over its samples with images if it has any.

    key: the setting that asks. Raises DataError for sets of which nothing can be asked.
    """
    return {name: _choose(config, name, data, tokenizer, count, key) for name, data in sets.items()}


def _choose(
    config: Config, name: str, data: Pipeline, tokenizer: Tokenizer, count: int, key: str
) -> list[Question]:
    processor = ImageProcessor.from_config(config.data, config.model)
    max_length = config.model.text.max_position_embeddings - config.evaluate.max_new_tokens
    chosen, problems = [], []
    for id in _in_order_of_choice(data, count):
        questions, wrong = make_questions(
            data.dataset,
            [id],
            get_template(config.data.template),
            tokenizer,
            processor,
            max_length=max_length,
        )
        questions, unreadable = readable(questions, processor)
        chosen += questions
        problems += wrong + unreadable
        if len(chosen) == count:
            break
    if not chosen:
        raise DataError(
            f"{key}={getattr(config.evaluate, key.partition('.')[2])}: nothing of the evaluation set{name and f' {name}'} "
            f"can be asked; {problems[0]}"
        )
    return chosen


def _in_order_of_choice(data: Pipeline, count: int) -> list[int]:
    """The ids of a set's samples: first `count` of those with images, evenly spread, then the others."""
    ids = usable_samples(data)
    with_images = ids[data.measured.num_images[ids] > 0]
    pool = with_images if len(with_images) else ids
    spread = pool[np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)]
    rest = [*np.setdiff1d(pool, spread), *np.setdiff1d(ids, pool)]
    return [int(id) for id in (*spread, *rest)]


def usable_samples(data: Pipeline) -> np.ndarray:
    """The ids of a set's samples that its batches hold: int64[n], ascending."""
    rows = [row for step in range(data.steps_per_epoch) for row in data.step_rows(step)]
    return np.unique(np.concatenate(rows))
