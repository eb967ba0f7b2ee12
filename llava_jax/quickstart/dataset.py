"""The quickstart's dataset: drawn pictures, LLaVA JSON, questions and a tokenizer, made in seconds."""

import json
import os
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

from llava_jax.config import ConfigError
from llava_jax.quickstart.conversations import (
    Turn,
    conversation,
    description,
    map_text,
    notes,
    one_of_each_kind,
    small_talk,
)
from llava_jax.quickstart.scenes import Scene, paint, random_mosaic, random_scene
from llava_jax.quickstart.tokenizer import train_tokenizer

VERSION = 2  # of what is drawn and said; part of dataset.json
VOCAB_SIZE = 512
READ = "Read the picture."


def prepare(
    root: str,
    seed: int = 0,
    num_train: int = 6000,
    num_dev: int = 250,
    num_test: int = 500,
    num_mosaics: int = 5000,
) -> None:
    """Makes the dataset in `root`, or returns at once when it is there, made with the same arguments.

    images/                JPEG (4 of 5) and PNG, sides 64 to 160 px: one or two things each; mosaics four
    towers.json            teaches random towers to see, template `plain`: a map of every mosaic, two notes of
                           every training picture, captions of a third of them
    pretrain.json          a caption of every training picture, template `plain`
    finetune.json          per training picture a conversation, for every sixth also its caption, and 5 % rows
                           without a picture
    questions_dev.jsonl    per picture a question of each kind (color, shape, where, count)
    questions_test.jsonl   the same for the test pictures
    tokenizer.model        sentencepiece, trained on the rows above
    dataset.json           the arguments

    Every picture is a function of (seed, split, index). Train, dev and test differ in these draws alone: all
    three show the same colors, shapes and places, at other sizes, positions and shades, so the test asks
    whether pictures are read, not whether unseen combinations are. Bytes repeat exactly with the same
    versions of Pillow and sentencepiece.

    Everything is written beside `root` and moved there when complete. Raises ConfigError when `root` holds
    something else, or when the numbers cannot be.
    """
    arguments = {
        "version": VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_dev": num_dev,
        "num_test": num_test,
        "num_mosaics": num_mosaics,
    }
    _check_numbers(arguments)
    target = Path(os.path.abspath(os.path.expanduser(root)))
    if _is_made(target, arguments):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        _write_dataset(made, arguments)
        try:
            made.rename(target)
        except OSError:
            if not _is_made(target, arguments):  # another process may have been faster
                raise


def _check_numbers(arguments: dict[str, int]) -> None:
    for name in ("num_train", "num_dev", "num_test", "num_mosaics"):
        if arguments[name] < 1:
            raise ConfigError(f"{name}={arguments[name]} must be at least 1.")


def _is_made(target: Path, arguments: dict[str, int]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    marker = target / "dataset.json"
    if not marker.is_file():
        raise ConfigError(f"{target} exists but is not a quickstart dataset; choose another directory.")
    found = json.loads(marker.read_text())
    if found == arguments:
        return True
    differing = [name for name in arguments if found.get(name) != arguments[name]]
    raise ConfigError(
        f"{target} holds a dataset made with other arguments ("
        + ", ".join(f"{name}={found.get(name)} instead of {arguments[name]}" for name in differing)
        + "); delete it or choose another directory."
    )


def _write_dataset(folder: Path, arguments: dict[str, int]) -> None:
    seed = arguments["seed"]
    (folder / "images").mkdir()

    train = _write_pictures(folder, seed, "train", arguments["num_train"])
    mosaics = _write_pictures(folder, seed, "mosaic", arguments["num_mosaics"], draw=random_mosaic)
    rng = random.Random(f"{seed}/captions")
    captions = [_record(f"caption_{name}", name, [description(scene, rng)]) for name, scene in train.items()]
    towers = [
        _record(f"map_{name}", name, [Turn("map", READ, map_text(scene))]) for name, scene in mosaics.items()
    ]
    towers += [
        _record(f"notes{number}_{name}", name, [Turn("notes", READ, notes(scene, rng))])
        for name, scene in train.items()
        for number in (1, 2)
    ]
    towers += captions[::3]

    rng = random.Random(f"{seed}/conversations")
    finetune = []
    for index, (name, scene) in enumerate(train.items()):
        finetune.append(_record(f"conversation_{name}", name, conversation(scene, rng)))
        if index % 6 == 0:
            finetune.append(_record(f"description_{name}", name, [description(scene, rng)]))
    num_text_only = round(len(finetune) * 0.05 / 0.95)
    finetune += [_record(f"text_{index:05d}", None, small_talk(rng)) for index in range(num_text_only)]

    _write_list(folder / "towers.json", towers)
    _write_list(folder / "pretrain.json", captions)
    _write_list(folder / "finetune.json", finetune)

    for split in ("dev", "test"):
        pictures = _write_pictures(folder, seed, split, arguments[f"num_{split}"])
        rng = random.Random(f"{seed}/{split}/questions")
        lines = [
            {
                "question_id": f"{Path(name).stem}_{turn.kind}",
                "image": name,
                "text": turn.question,
                "answer": turn.answer,
                "kind": turn.kind,
            }
            for name, scene in pictures.items()
            for turn in one_of_each_kind(scene, rng)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"questions_{split}.jsonl").write_text(text)

    said = [_answer(record) for record in towers + captions]
    tokenizer = train_tokenizer(map(_questions_and_answers, finetune), said, VOCAB_SIZE)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "dataset.json").write_text(json.dumps(arguments, indent=2) + "\n")


def _write_pictures(folder: Path, seed: int, split: str, number: int, draw=random_scene) -> dict[str, Scene]:
    """Draws and writes a split's pictures; returns their scenes by file name."""
    scenes = {}
    for index in range(number):
        rng = random.Random(f"{seed}/{split}/{index}")
        scene = draw(rng)
        if rng.random() < 0.8:
            name, options = f"{split}_{index:05d}.jpg", {"quality": rng.randint(75, 95)}
        else:
            name, options = f"{split}_{index:05d}.png", {"compress_level": 1}
        paint(scene).save(folder / "images" / name, **options)
        scenes[name] = scene
    return scenes


def _record(record_id: str, image: str | None, turns: list[Turn]) -> dict:
    """One entry of a LLaVA JSON list; the first question of a picture carries its `<image>`."""
    spoken = []
    for turn in turns:
        question = turn.question if image is None or spoken else f"<image>\n{turn.question}"
        spoken += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    record = {"id": record_id.removesuffix(".jpg").removesuffix(".png")}
    return record | ({} if image is None else {"image": image}) | {"conversations": spoken}


def _questions_and_answers(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def _answer(record: dict) -> str:
    return record["conversations"][-1]["value"]


def _write_list(path: Path, records: Iterable[dict]) -> None:
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
