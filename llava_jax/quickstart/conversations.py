"""What is said about a scene: captions, maps, notes, and questions that have one right answer."""

import random
from typing import NamedTuple

from llava_jax.quickstart.scenes import Scene, Thing

KINDS = ("color", "shape", "where", "count")

_ASK = {"color": "What color is the {}?", "shape": "What shape is the {}?", "where": "Where is the {}?"}
_REFER = {"color": "{} object", "shape": "{}", "where": "{} object"}
_CAPTIONS = (
    "a {thing.color} {thing.shape} in the {thing.place}",
    "in the {thing.place} a {thing.color} {thing.shape}",
    "in the {thing.place} a {thing.shape} in {thing.color}",
    "a {thing.shape} in {thing.color} in the {thing.place}",
)
_DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
_OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}
_CORNERS = {"square": "4", "triangle": "3", "ring": "0"}


class Turn(NamedTuple):
    """One question with its answer, and the kind it is counted under."""

    kind: str
    question: str
    answer: str


def caption(scene: Scene, rng: random.Random) -> str:
    """All that is drawn, in random order and words: `a red ring in the northwest and a square in blue ...`."""
    return " and ".join(rng.choice(_CAPTIONS).format(thing=thing) for thing in _shuffled(rng, scene.things))


def map_text(scene: Scene) -> str:
    """Colors, then shapes, in reading order: `colors red blue ... shapes ring ring ...`.

    On a mosaic every word stands at a fixed distance from the part of the picture that it names.
    """
    colors = [thing.color for thing in scene.things]
    shapes = [thing.shape for thing in scene.things]
    return " ".join(["colors", *colors, "shapes", *shapes])


def notes(scene: Scene, rng: random.Random) -> str:
    """Each thing's properties, all in random order: `ring northwest red southeast blue square`.

    The first property of a thing says which one is meant; to go on, the others must be looked up.
    """
    kinds = tuple(_ASK)
    things = _shuffled(rng, scene.things)
    return " ".join(_property(thing, kind) for thing in things for kind in _shuffled(rng, kinds))


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
    for thing in _shuffled(rng, scene.things):
        named, asked, last = _shuffled(rng, tuple(_ASK))
        turns += [_ask(thing, asked, named), _ask(thing, last, rng.choice((named, asked)))]
    return turns


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


def _shuffled(rng: random.Random, items: tuple) -> list:
    return rng.sample(items, len(items))


def _property(thing: Thing, kind: str) -> str:
    return thing.place if kind == "where" else getattr(thing, kind)


def _ask(thing: Thing, asked: str, named: str) -> Turn:
    reference = _REFER[named].format(_property(thing, named))
    return Turn(asked, _ASK[asked].format(reference), _property(thing, asked))


def _count(scene: Scene) -> Turn:
    return Turn("count", "How many objects are there?", str(len(scene.things)))
