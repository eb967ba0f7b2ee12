"""Questions and evaluation sets answered by generation, and how right the answers are."""

import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llava_jax.config import Config, EvaluateConfig
from llava_jax.data.batching import bucket_images, bucket_length
from llava_jax.data.conversation import render_prompt
from llava_jax.data.dataset import Dataset
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import load_image
from llava_jax.data.questions import Question, make_questions, readable
from llava_jax.data.records import raise_problems
from llava_jax.data.templates import Template, get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.generation import Generator
from llava_jax.metrics import Counter
from llava_jax.scores import is_match, rouge_l

KEYS = ("question_id", "image", "text", "answer", "kind")


def read_questions(path: str) -> list[dict[str, str]]:
    """Reads JSONL with the keys of KEYS, one question about one image per line. Raises DataError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); check evaluate.path (--questions of llava_jax.evaluate)."
        ) from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}:{error.colno}: broken JSON ({error.msg}); a line holds one question."
            ) from error
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
    processor = ImageProcessor.from_config(config.data, config.model)
    problems = []
    for question in questions:
        try:
            prompt = _prompt(question, question["image"], folder, template, tokenizer, processor)
            length = prompt.length + asked.max_new_tokens
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
    predictions = _answer(generator, config, questions, {picture: picture for picture in pictures})
    answered = [row | {"prediction": said} for row, said in zip(questions, predictions, strict=True)]
    results = {"eval_samples": len(questions)} | _accuracies(answered, "prediction", "eval_accuracy")
    if config.blind:
        # A shift that is no half of the number, so that no two pictures swap places.
        shift = 1 + len(pictures) // 3
        other = {picture: pictures[(i + shift) % len(pictures)] for i, picture in enumerate(pictures)}
        blind = _answer(generator, config, questions, other)
        answered = [row | {"blind_prediction": said} for row, said in zip(answered, blind, strict=True)]
        results |= _accuracies(answered, "blind_prediction", "eval_accuracy_blind")
    return results, answered


def find_questions(
    generator: Generator,
    dataset: Dataset,
    ids: Collection[int],
    config: EvaluateConfig,
    *,
    skip_unreadable: bool = False,
) -> list[Question]:
    """What samples of a dataset ask; says how many of them cannot be asked. `skip_unreadable` reads their images too."""
    questions, problems = make_questions(
        dataset,
        ids,
        generator.template,
        generator.tokenizer,
        generator.image_processor,
        max_length=generator.config.text.max_position_embeddings - config.max_new_tokens,
    )
    if skip_unreadable:
        questions, unreadable = readable(questions, generator.image_processor)
        problems += unreadable
    if problems:
        print(
            f"{len(problems):,} of {len(ids):,} samples are not asked; the first: {problems[0]}", flush=True
        )
    return questions


def predict(
    generator: Generator, questions: dict[str, list[Question]], config: EvaluateConfig
) -> tuple[dict[str, float], list[dict]]:
    """Answers the questions of sets by name ("" is one that has none) greedily -> (results, predictions).

    results: over all of them eval_exact_match, eval_rouge_l and eval_predicted, their number; of a set with a name
    also eval_NAME_exact_match and so on. predictions: `prompt`, `predict` and `label`, as LLaMA-Factory writes them,
    and what else is known.
    """
    rows = []
    for name, own in questions.items():
        answers = ask(generator, own, config, progress=Counter(f"{name} answering:".strip()))
        rows += [
            {"set": name, **compared(question, answer)} for question, answer in zip(own, answers, strict=True)
        ]
    results = _scores(rows, "eval_")
    for name in filter(None, questions):
        results |= _scores([row for row in rows if row["set"] == name], f"eval_{name}_")
    return results, rows


def ask(
    generator: Generator,
    questions: list[Question],
    config: EvaluateConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers of at most `config.max_new_tokens` tokens. Questions alike in length are asked together."""
    positions = generator.config.text.max_position_embeddings - config.max_new_tokens
    order = sorted(range(len(questions)), key=lambda number: (questions[number].length, number))
    size = min(config.batch_size, len(order))
    answers = {}
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(order), size or 1):
            own = order[begin : begin + size]
            batch = [questions[number] for number in own]
            images = list(pool.map(lambda question: question.read(generator.image_processor), batch))
            # The last batch is filled up with its first question, so that few shapes are compiled.
            filled = [*range(len(own)), *[0] * (size - len(own))]
            texts = generator.complete(
                [batch[row].tokens for row in filled],
                [images[row] for row in filled],
                layouts=[list(batch[row].layouts) for row in filled],
                max_new_tokens=config.max_new_tokens,
                length=max(bucket_length(batch[-1].length, positions), batch[-1].length),
                slots=bucket_images(max(question.num_tiles for question in batch)),
            )
            answers |= dict(zip(own, texts, strict=False))
            progress(len(answers), len(order))
    return [answers[number] for number in range(len(questions))]


def _answer(
    generator: Generator, config: EvaluateConfig, questions: list[dict], pictures: dict[str, str]
) -> list[str]:
    """Answers to each question about the picture that takes the place of its own."""
    folder = ImageFolder(config.image_folder)
    template, tokenizer = generator.template, generator.tokenizer
    prompts = [
        _prompt(question, pictures[question["image"]], folder, template, tokenizer, generator.image_processor)
        for question in questions
    ]
    return ask(generator, prompts, config)


def _prompt(
    question: dict,
    picture: str,
    folder: ImageFolder,
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
) -> Question:
    path = folder.locate(picture)
    return Question(
        question["question_id"],
        question["text"],
        question["text"],
        question["answer"].strip(),
        render_prompt(
            question["text"],
            template,
            tokenizer,
            num_images=1,
            image_markers=processor.model.use_im_start_end,
        ),
        (path,),
        (False,),
        (processor.layout(path),),
    )


def compared(question: Question, answer: str) -> dict:
    """A question, its answer and how near that is to what was expected, as plain JSON data."""
    return {
        "sample": question.name,
        "images": list(question.images),
        "prompt": question.prompt,
        "predict": answer,
        "label": question.reference,
        "exact_match": is_match(answer, question.reference),
        "rouge_l": rouge_l(answer, question.reference),
    }


def _scores(rows: list[dict], prefix: str) -> dict[str, float]:
    if not rows:
        return {f"{prefix}predicted": 0}
    means = {
        f"{prefix}{key}": float(np.mean([row[key] for row in rows])) for key in ("exact_match", "rouge_l")
    }
    return means | {f"{prefix}predicted": len(rows)}


def _accuracies(answered: list[dict], key: str, name: str) -> dict[str, float]:
    """Share of exact matches, over all questions and per kind."""
    right = np.array([is_match(row[key], row["answer"]) for row in answered])
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
        right = is_match(row["prediction"], row["answer"])
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
