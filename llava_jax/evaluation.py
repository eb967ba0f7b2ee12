"""Questions and evaluation sets answered by generation, and how right the answers are."""

import hashlib
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
from llava_jax.data.question_file import read_questions, require_answers, require_pictures
from llava_jax.data.questions import Question, make_questions, readable
from llava_jax.data.records import raise_problems
from llava_jax.data.templates import Template, get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.generation import Generator
from llava_jax.metrics import Counter
from llava_jax.scores import is_match, rouge_l


def check_questions(config: Config, tokenizer: Tokenizer) -> None:
    """Raises DataError when one of the questions of `config.evaluate` could not be asked or scored at the end of the
    run."""
    asked = config.evaluate
    questions = read_questions(asked.path)
    require_answers(asked.path, questions)
    require_pictures(asked.path, questions, asked.image_folder, blind=asked.blind)
    processor = ImageProcessor.from_config(config.data, config.model)
    template = get_template(config.data.template)
    for own in (questions, _about_others(questions) if asked.blind else []):
        _prompts(own, asked, template, tokenizer, processor, room=asked.max_new_tokens)


def evaluate(
    generator: Generator, questions: list[dict], config: EvaluateConfig, *, model_id: str
) -> tuple[dict[str, float], list[dict]]:
    """Asks the questions of `config.path` greedily -> (results, the answers in the form of `_answered`).

    results: eval_samples, their number; eval_scored, how many of them have an answer to compare with; of these, if there
    are any, eval_accuracy and eval_accuracy_KIND (`kind` or `category`). With `config.blind` each question that has a
    picture is asked again about another one -> `blind_prediction`, eval_accuracy_blind and eval_accuracy_blind_KIND.
    Raises DataError when one of them cannot be asked, before any is.
    """
    prompts, blind_prompts = (
        _prompts(own, config, generator.template, generator.tokenizer, generator.image_processor, room=1)
        for own in (questions, _about_others(questions) if config.blind else [])
    )
    predictions = ask(generator, prompts, config, progress=Counter("answering:"))
    answered = [
        _answered(question, said, model_id) for question, said in zip(questions, predictions, strict=True)
    ]
    results = {
        "eval_samples": len(questions),
        "eval_scored": sum("answer" in question for question in questions),
    }
    results |= _accuracies(answered, "prediction", "eval_accuracy")
    if config.blind:
        shown = [row for row in answered if "image" in row]
        blind = ask(generator, blind_prompts, config, progress=Counter("answering blind:"))
        for row, said in zip(shown, blind, strict=True):
            row["blind_prediction"] = said
        results |= _accuracies(shown, "blind_prediction", "eval_accuracy_blind")
    return results, answered


def model_name(path: str) -> str:
    """What the original calls the model in a directory (get_model_name_from_path of llava/mm_utils.py)."""
    directory = Path(path).absolute()
    if directory.name.startswith("checkpoint-"):
        return f"{directory.parent.name}_{directory.name}"
    return directory.name


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


def _about_others(questions: list[dict]) -> list[dict]:
    """The questions that have a picture, each about another one of these."""
    shown = [question for question in questions if "image" in question]
    pictures = sorted({question["image"] for question in shown})
    # A shift that is no half of the number, so that no two pictures swap places.
    shift = 1 + len(pictures) // 3
    other = {picture: pictures[(i + shift) % len(pictures)] for i, picture in enumerate(pictures)}
    return [question | {"image": other[question["image"]]} for question in shown]


def _prompts(
    questions: list[dict],
    config: EvaluateConfig,
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    room: int,
) -> list[Question]:
    """Questions with their tokens. Raises DataError naming all that cannot be asked, or leave no room for an answer of
    so many tokens."""
    folder = ImageFolder(config.image_folder)
    positions = processor.model.text.max_position_embeddings
    prompts, problems = [], []
    for question in questions:
        try:
            prompt = _prompt(question, folder, template, tokenizer, processor)
            length = prompt.length + room
            if length > positions:
                raise DataError(
                    f"question and answer may take {length} tokens, the model has {positions} positions."
                )
            prompts.append(prompt)
        except DataError as error:
            problems.append(f"question {question['question_id']!r}: {error}")
    raise_problems(config.path, problems)
    return prompts


def _prompt(
    question: dict,
    folder: ImageFolder,
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
) -> Question:
    images = (folder.locate(question["image"]),) if "image" in question else ()
    return Question(
        f"question {question['question_id']!r}",
        question["text"],
        question["text"],
        question.get("answer", "").strip(),
        render_prompt(
            question["text"],
            template,
            tokenizer,
            num_images=len(images),
            image_markers=processor.model.use_im_start_end,
        ),
        images,
        (False,) * len(images),
        tuple(processor.layout(path) for path in images),
    )


def _answered(question: dict, said: str, model_id: str) -> dict:
    """An answer under the names that the original's scorers read, then what else its question has, then `prediction`.

    answer_id, random there, is of what was asked and answered, so that the same answers are the same file.
    """
    known = [model_id, question["question_id"], question.get("image"), question["text"], said]
    row = {
        "question_id": question["question_id"],
        "prompt": question["text"],
        "text": said,
        "answer_id": hashlib.sha256(json.dumps(known).encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
    }
    return row | {key: value for key, value in question.items() if key not in row} | {"prediction": said}


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
    """Share of exact matches, over all questions that have an answer and per kind; {} where none has."""
    right, by_kind = [], {}
    for row in answered:
        if "answer" not in row:
            continue
        right.append(is_match(row[key], row["answer"]))
        kind = row.get("kind", row.get("category"))
        if kind is not None:
            by_kind.setdefault(str(kind), []).append(right[-1])
    if not right:
        return {}
    per_kind = {f"{name}_{kind}": float(np.mean(by_kind[kind])) for kind in sorted(by_kind)}
    return {name: float(np.mean(right))} | per_kind


def draw_samples(answered: list[dict], image_folder: str, path: Path, count: int = 12) -> None:
    """Draws some pictures with question, answer and truth into one image file; none where no question has a picture."""
    shown = [row for row in answered if "image" in row]
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [shown[i] for i in np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)]
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(chosen) // columns), columns, figsize=(12, 3.4 * -(-len(chosen) // columns))
    )
    for axis in np.ravel(axes):
        axis.axis("off")
    folder = ImageFolder(image_folder)
    for axis, row in zip(np.ravel(axes), chosen, strict=False):
        axis.imshow(load_image(folder.locate(row["image"])))
        right = is_match(row["text"], row["answer"])
        axis.set_title(
            "\n".join(
                _printable(line)
                for line in (row["prompt"], f"model: {row['text']}", f"truth: {row['answer']}")
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
