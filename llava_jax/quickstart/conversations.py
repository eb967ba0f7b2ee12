"""What is said about a scene: captions, maps, and questions that have one right answer."""

import random
from typing import NamedTuple

from llava_jax.quickstart.scenes import Scene, Thing, grid

KINDS = ("color", "shape", "where", "count")

_ASK = {"color": "What color is the {}?", "shape": "What shape is the {}?", "where": "Where is the {}?"}
_REFER = {"color": "{} object", "shape": "{}", "where": "object at the {}"}
_DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
_OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_CORNERS = {"square": "4", "triangle": "3", "ring": "0"}


class Turn(NamedTuple):
    """One question with its answer, and the kind it is counted under."""

    kind: str
    question: str
    answer: str


def caption(scene: Scene, rng) -> str:
    """All that is drawn: `a red ring at the top left and a blue square at the bottom right`."""
    return " and ".join(f"a {thing.color} {thing.shape} at the {thing.place}" for thing in rng.sample(scene.things, len(scene.things)))


def map_caption(scene: Scene, cells: int) -> str:
    """What every cell of the padded picture shows: `colors none red ... shapes none ring ...`.

    Rows from the top, one word per cell: with one token per word and one patch per cell, every word stands
    at a fixed distance from the patch that it names.
    """
    shown = grid(scene, cells)
    colors = [thing.color if thing else "none" for thing in shown]
    shapes = [thing.shape if thing else "none" for thing in shown]
    return " ".join(["colors", *colors, "shapes", *shapes])


def description(scene: Scene, rng: random.Random) -> Turn:
    """The caption as the answer to a short request."""
    return Turn("caption", rng.choice(_DESCRIBE), caption(scene, rng))


def conversation(scene: Scene, rng: random.Random) -> list[Turn]:
    """Two questions about each thing in random order, a third of the time after a question for their number.

    No turn gives away the answer of a later one, so each has to be read from the picture: of a thing's
    three properties the first question names one and asks one, the second asks the third; and the number
    is asked before several things have been mentioned.
    """
    turns = [_count(scene)] if rng.random() < 1 / 3 else []
    return turns + [_ask(*words) for words in _two_about_each(scene, rng)]


def facts(scene: Scene, rng: random.Random) -> Turn:
    """What `conversation` asks, in few words: `color ring red where ring top left`."""
    told = [_property(thing, kind) for thing in rng.sample(scene.things, len(scene.things)) for kind in rng.sample(tuple(_ASK), 3)]
    return Turn("facts", "Read the picture.", " ".join(told))


def one_of_each_kind(scene: Scene, rng: random.Random) -> list[Turn]:
    """Four questions, each to be asked alone, in the order of `KINDS`."""
    turns = []
    for asked in _ASK:
        named = rng.choice([kind for kind in _ASK if kind != asked])
        turns.append(_ask(rng.choice(scene.things), asked, named))
    return [*turns, _count(scene)]


def small_talk(rng: random.Random) -> list[Turn]:
    """Two different questions that need no picture."""
    a, b, c = rng.randint(0, 4), rng.randint(0, 5), rng.randint(0, 8)
    word = rng.choice(tuple(_OPPOSITES))
    shape = rng.choice(tuple(_CORNERS))
    pairs = [
        (f"What is {a} plus {b}?", str(a + b)),
        (f"What comes after {c}?", str(c + 1)),
        (f"What is the opposite of {word}?", _OPPOSITES[word]),
        (f"How many corners does a {shape} have?", _CORNERS[shape]),
    ]
    return [Turn("text", question, answer) for question, answer in rng.sample(pairs, 2)]


def _two_about_each(scene: Scene, rng: random.Random):
    for thing in rng.sample(scene.things, len(scene.things)):
        named, asked, last = rng.sample(tuple(_ASK), 3)
        yield thing, asked, named
        yield thing, last, rng.choice((named, asked))


def _property(thing: Thing, kind: str) -> str:
    return thing.place if kind == "where" else getattr(thing, kind)


def _ask(thing: Thing, asked: str, named: str) -> Turn:
    reference = _REFER[named].format(_property(thing, named))
    return Turn(asked, _ASK[asked].format(reference), _property(thing, asked))


def _count(scene: Scene) -> Turn:
    return Turn("count", "How many objects are there?", str(len(scene.things)))
