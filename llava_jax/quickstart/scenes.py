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

# Lengths as shares of the picture's long side: what a tower of 16 patches can still tell apart.
SMALLEST, LARGEST = 0.40, 0.50
OFF_CENTER = 0.08  # from a thing's centre to the lines that part the four places
GAP = 0.04  # between two things
MIN_ASPECT = 0.75  # short side / long side


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
    """Draws size, background and one or two things; one and two are equally likely."""
    long_side = rng.randint(64, 160)
    short_side = rng.randint(max(64, round(MIN_ASPECT * long_side + 0.5)), max(64, long_side))
    width, height = (long_side, short_side) if rng.random() < 0.5 else (short_side, long_side)
    background = tuple(rng.randint(240, 254) for _ in range(3))
    number = rng.randint(1, 2)
    while True:
        things = _random_things(rng, width, height, number)
        if number == 1 or _apart(*things, gap=GAP * long_side):
            things.sort(key=lambda thing: PLACES.index(thing.place))
            return Scene(width, height, background, tuple(things))


def random_mosaic(rng: random.Random) -> Scene:
    """A square picture with a thing in each of its quarters; colors and shapes may occur again."""
    side = rng.randint(64, 160)
    background = tuple(rng.randint(240, 254) for _ in range(3))
    things = []
    for color, shape, place in zip(rng.choices(tuple(COLORS), k=4), rng.choices(SHAPES, k=4), PLACES, strict=True):
        diameter = rng.uniform(SMALLEST, 0.46) * side
        x, y = (rng.uniform(diameter, side / 2 * (1 - GAP)) - diameter / 2 for _ in range(2))
        things.append(_thing(rng, side, side, color, shape, place, x, y, diameter))
    return Scene(side, side, background, tuple(things))


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


def _random_things(rng: random.Random, width: int, height: int, number: int) -> list[Thing]:
    colors, shapes, places = (rng.sample(words, number) for words in (tuple(COLORS), SHAPES, PLACES))
    return [_random_thing(rng, width, height, *words) for words in zip(colors, shapes, places, strict=True)]


def _random_thing(rng: random.Random, width: int, height: int, color: str, shape: str, place: str) -> Thing:
    long_side, short_side = max(width, height), min(width, height)
    largest = min(LARGEST * long_side, short_side - 2 * OFF_CENTER * long_side)  # fits beside the middle line
    diameter = rng.uniform(SMALLEST * long_side, largest)
    x = rng.uniform(diameter / 2, width / 2 - OFF_CENTER * long_side)
    y = rng.uniform(diameter / 2, height / 2 - OFF_CENTER * long_side)
    return _thing(rng, width, height, color, shape, place, x, y, diameter)


def _thing(rng, width, height, color, shape, place, x, y, diameter) -> Thing:
    x = width - x if place.endswith("right") else x
    y = height - y if place.startswith("bottom") else y
    rgb = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[color])
    return Thing(color, shape, place, rgb, x, y, diameter)


def _apart(a: Thing, b: Thing, *, gap: float) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.diameter + b.diameter) / 2 + gap


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
