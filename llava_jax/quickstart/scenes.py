"""Random scenes of a few coloured shapes, and their pictures."""

import dataclasses
import math
import random
from collections.abc import Iterable

from PIL import Image, ImageDraw

COLORS = {  # all clearly darker than the background, so that a shape looks alike in each
    "red": (210, 30, 40),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "orange": (235, 120, 10),
    "purple": (140, 40, 170),
    "gray": (85, 85, 85),
}
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = ("northwest", "northeast", "southwest", "southeast")  # in reading order

SMALLEST, LARGEST = 0.38, 0.46  # box around a thing / the picture's short side; it fits into a quarter
MARGIN = 1  # px between a thing and the edges of its quarter
MIN_ASPECT = 0.8  # short side / long side


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y` is the centre of the box of side `diameter` around it, in pixels of the picture."""

    color: str
    shape: str
    place: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    diameter: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A near-white picture and the things on it, in reading order, each within its own quarter."""

    width: int
    height: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]


def random_scene(rng: random.Random) -> Scene:
    """One or two things, equally likely; no color, shape or place occurs twice."""
    number = rng.randint(1, 2)
    colors, shapes, places = (rng.sample(words, number) for words in (tuple(COLORS), SHAPES, PLACES))
    return _arrange(rng, colors, shapes, sorted(places, key=PLACES.index))


def random_mosaic(rng: random.Random) -> Scene:
    """A thing at each place, its color and shape drawn independently of the others'."""
    colors, shapes = (rng.choices(words, k=len(PLACES)) for words in (tuple(COLORS), SHAPES))
    return _arrange(rng, colors, shapes, PLACES)


def _arrange(
    rng: random.Random, colors: Iterable[str], shapes: Iterable[str], places: Iterable[str]
) -> Scene:
    """Draws everything else: the picture's size and background, each thing's size, shade and centre."""
    long_side = rng.randint(80, 160)
    short_side = rng.randint(math.ceil(MIN_ASPECT * long_side), long_side)
    width, height = rng.sample((long_side, short_side), 2)
    background = tuple(rng.randint(240, 254) for _ in range(3))
    things = []
    for color, shape, place in zip(colors, shapes, places, strict=True):
        diameter = rng.uniform(SMALLEST, LARGEST) * short_side
        border = diameter / 2 + MARGIN
        x, y = (rng.uniform(border, side / 2 - border) for side in (width, height))
        x = width - x if place.endswith("east") else x
        y = height - y if place.startswith("south") else y
        rgb = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[color])
        things.append(Thing(color, shape, place, rgb, x, y, diameter))
    return Scene(width, height, background, tuple(things))


def paint(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of its width and height."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, thing.rgb)
    return image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: int | tuple[int, int, int]) -> None:
    x, y, radius = thing.x, thing.y, thing.diameter / 2
    left, top, right, bottom = x - radius, y - radius, x + radius - 1, y + radius - 1
    if thing.shape == "ring":
        draw.ellipse((left, top, right, bottom), outline=fill, width=round(0.48 * radius))
    elif thing.shape == "square":
        inset = 0.12 * radius
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), fill)
    elif thing.shape == "triangle":
        draw.polygon(((x, top), (right, bottom), (left, bottom)), fill)
    elif thing.shape == "cross":
        draw.rectangle((left, y - 0.34 * radius, right, y + 0.34 * radius - 1), fill)
        draw.rectangle((x - 0.34 * radius, top, x + 0.34 * radius - 1, bottom), fill)
    else:
        raise AssertionError(thing.shape)
