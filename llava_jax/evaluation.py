"""Questions answered by generation and scored by exact match, seeing and blind."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llava_jax.config import Config, EvaluateConfig
from llava_jax.data.conversation import render_prompt
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import load_image
from llava_jax.data.records import raise_problems
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.generation import Generator

KEYS = ("question_id", "image", "text", "answer", "kind")


def read_questions(path: str) -> list[dict[str, str]]:
    """Reads JSONL with the keys of KEYS, one question about one image per line. Raises DataError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check evaluate.path.") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}:{error.colno}: broken JSON ({error.msg}).") from error
        missing = [
            key for key in KEYS if not isinstance(question, dict) or not isinstance(question.get(key), str)
        ]
        if missing:
            raise DataError(f"{path}:{number}: a question needs text under {', '.join(missing)}.")
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: there is no question in this file.")
    return questions


def check_questions(config: Config, tokenizer: Tokenizer) -> None:
    """Raises DataError when one of the questions of `config.evaluate` could not be asked at the end of the run."""
    asked, positions = config.evaluate, config.model.text.max_position_embeddings
    questions, folder = read_questions(asked.path), ImageFolder(asked.image_folder)
    template = get_template(config.data.template)
    processor = ImageProcessor(config.model, aspect_ratio=config.data.image_aspect_ratio)
    problems = []
    for question in questions:
        try:
            layout = processor.layout(folder.locate(question["image"]))
            prompt = render_prompt(
                question["text"],
                template,
                tokenizer,
                num_images=1,
                image_markers=config.model.use_im_start_end,
            )
            length = len(prompt) - 1 + len(layout.feature_ids) + asked.max_new_tokens
            if length > positions:
                raise DataError(
                    f"question and answer may take {length} tokens, the model has {positions} positions."
                )
        except DataError as error:
            problems.append(f"question {question['question_id']!r}: {error}")
    raise_problems(asked.path, problems)
    if asked.blind and len({question["image"] for question in questions}) < 2:
        raise DataError(
            f"{asked.path} asks about one picture only; set evaluate.blind=False, or ask about more."
        )


def evaluate(generator: Generator, config: EvaluateConfig) -> tuple[dict[str, float], list[dict]]:
    """Asks every question of `config.path` greedily -> (results, the questions with `prediction` added).

    results: eval_accuracy, eval_accuracy_KIND and eval_samples; with `config.blind` also eval_accuracy_blind
    and eval_accuracy_blind_KIND, for which each question is asked again about another picture.
    """
    questions = read_questions(config.path)
    pictures = sorted({question["image"] for question in questions})
    folder = ImageFolder(config.image_folder)
    paths = {picture: folder.locate(picture) for picture in pictures}
    answered = [
        question | {"prediction": prediction}
        for question, prediction in zip(
            questions, _ask(generator, config, questions, [paths[q["image"]] for q in questions]), strict=True
        )
    ]
    results = {"eval_samples": len(questions)} | _accuracies(answered, "prediction", "eval_accuracy")
    if config.blind:
        # A shift that is no half of the number, so that no two pictures swap places.
        shift = 1 + len(pictures) // 3
        other = {picture: pictures[(i + shift) % len(pictures)] for i, picture in enumerate(pictures)}
        blind = _ask(generator, config, questions, [paths[other[q["image"]]] for q in questions])
        answered = [row | {"blind_prediction": answer} for row, answer in zip(answered, blind, strict=True)]
        results |= _accuracies(answered, "blind_prediction", "eval_accuracy_blind")
    return results, answered


def _ask(generator: Generator, config: EvaluateConfig, questions: list[dict], paths: list[str]) -> list[str]:
    processor = generator.image_processor
    with ThreadPoolExecutor() as pool:
        images, layouts = list(pool.map(processor.read, paths)), list(pool.map(processor.layout, paths))
    answers = []
    for begin in range(0, len(questions), config.batch_size):
        # The last batch is filled up with its first question, so that one shape is compiled.
        rows = [begin + i if begin + i < len(questions) else begin for i in range(config.batch_size)]
        texts = generator.answer(
            [questions[row]["text"] for row in rows],
            [[images[row]] for row in rows],
            layouts=[[layouts[row]] for row in rows],
            max_new_tokens=config.max_new_tokens,
        )
        answers += texts[: len(questions) - begin]
    return answers


def _accuracies(answered: list[dict], key: str, name: str) -> dict[str, float]:
    """Share of exact matches, over all questions and per kind."""
    right = np.array([row[key] == row["answer"].strip() for row in answered])
    kinds = np.array([row["kind"] for row in answered])
    per_kind = {f"{name}_{kind}": float(right[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))}
    return {name: float(right.mean())} | per_kind


def draw_samples(answered: list[dict], image_folder: str, path: Path, count: int = 12) -> None:
    """Draws some pictures with question, answer and truth into one image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [answered[i] for i in np.linspace(0, len(answered) - 1, min(count, len(answered))).astype(int)]
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(chosen) // columns), columns, figsize=(12, 3.4 * -(-len(chosen) // columns))
    )
    for axis in np.ravel(axes):
        axis.axis("off")
    folder = ImageFolder(image_folder)
    for axis, row in zip(np.ravel(axes), chosen, strict=False):
        axis.imshow(load_image(folder.locate(row["image"])))
        right = row["prediction"] == row["answer"].strip()
        axis.set_title(
            "\n".join(
                _printable(line)
                for line in (row["text"], f"model: {row['prediction']}", f"truth: {row['answer']}")
            ),
            fontsize=8,
            color="darkgreen" if right else "darkred",
            parse_math=False,
            wrap=True,
        )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _printable(text: str) -> str:
    """`text` without characters that a font cannot show; an untrained model may say anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
