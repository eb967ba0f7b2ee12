"""Random scenes of one or two coloured shapes, and their pictures."""

import dataclasses
import random

from PIL import Image, ImageDraw

COLORS = {
    "red": (210, 30, 40),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "orange": (235, 120, 10),
    "purple": (140, 40, 170),
    "gray": (85, 85, 85),
}
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # in reading order

SMALLEST, LARGEST = 0.38, 0.46  # side of the box around a thing, as a share of the picture's short side
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
    """A near-white picture and the things on it, in reading order; no color, shape or place occurs twice."""

    width: int
    height: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]


def random_scene(rng: random.Random) -> Scene:
    """One or two things, equally likely, on a picture of random size."""
    number = rng.randint(1, 2)
    words = (rng.sample(choices, number) for choices in (tuple(COLORS), SHAPES, PLACES))
    return _place(rng, list(zip(*words, strict=True)))


def random_mosaic(rng: random.Random) -> Scene:
    """A thing at each place; colors and shapes may occur again."""
    words = (rng.sample(choices, len(PLACES)) for choices in (tuple(COLORS), SHAPES))
    return _place(rng, list(zip(*words, PLACES, strict=True)))


def _place(rng: random.Random, words: list[tuple[str, str, str]]) -> Scene:
    long_side = rng.randint(80, 160)
    short_side = rng.randint(round(MIN_ASPECT * long_side + 0.5), long_side)
    width, height = (long_side, short_side) if rng.random() < 0.5 else (short_side, long_side)
    background = tuple(rng.randint(240, 254) for _ in range(3))
    things = []
    for color, shape, place in sorted(words, key=lambda word: PLACES.index(word[2])):
        diameter = rng.uniform(SMALLEST, LARGEST) * short_side
        x = rng.uniform(diameter / 2 + 1, width / 2 - diameter / 2 - 1)
        y = rng.uniform(diameter / 2 + 1, height / 2 - diameter / 2 - 1)
        x = width - x if place.endswith("right") else x
        y = height - y if place.startswith("bottom") else y
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


def grid(scene: Scene, cells: int) -> list[Thing | None]:
    """What each of `cells` x `cells` equal parts shows, row by row, after padding the picture to a square.

    The padding is that of `image_aspect_ratio="pad"`. A part shows the thing that covers most of it,
    or nothing where no thing covers a seventh.
    """
    side = max(scene.width, scene.height)
    left, top = (side - scene.width) // 2, (side - scene.height) // 2
    shown: list[Thing | None] = [None] * cells**2
    most = [255 / 7] * cells**2
    for thing in scene.things:
        mask = Image.new("L", (side, side))
        _draw_thing(ImageDraw.Draw(mask), dataclasses.replace(thing, x=thing.x + left, y=thing.y + top), 255)
        for cell, covered in enumerate(mask.resize((cells, cells), Image.Resampling.BOX).tobytes()):
            if covered > most[cell]:
                shown[cell], most[cell] = thing, covered
    return shown


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
