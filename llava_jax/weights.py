"""Where each parameter of a run's model comes from: directories, earlier stages, or a draw from the seed."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from llava_jax import config as schema
from llava_jax.checkpoint import SavedParameters, saved_steps
from llava_jax.config import Config, ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.source import ModelSource, open_model
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.optimizer import MODULES
from llava_jax.step import abstract_model, random_parameters

RUN_FORMAT = "llava_jax run"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A whole model, not yet read. It offers what a `ModelSource` offers, so it converts like one."""

    config: ModelConfig
    readers: dict[str, Callable[[], np.ndarray]]  # by parameter name, complete
    set_aside: Callable[[], dict[str, np.ndarray]]
    tokenizer_path: str
    template: str
    image_aspect_ratio: str
    layout: str = "run"

    def names(self) -> list[str]:
        return list(self.readers)

    def shape(self, name: str) -> tuple[int, ...]:
        return abstract_model(self.config)[1][name].shape

    def read(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def replace(self, readers: dict[str, Callable[[], np.ndarray]]) -> "Weights":
        return dataclasses.replace(self, readers=self.readers | readers)


def initial_weights(config: Config) -> Weights:
    """The model that a recipe's first stage starts from, as `init` says.

    Raises ConfigError when a directory's architecture or parameters are not those of `config.model`.
    """
    init, model = config.init, config.model
    _, shapes = abstract_model(model)
    readers, sources, tokenizer_path = {}, [], init.tokenizer
    for key, prefixes in _PROVIDES.items():
        path = getattr(init, key)
        if not path:
            continue
        source = open_any(path)
        names = [name for name in source.names() if name.startswith(prefixes)]
        _check_fits(f"init.{key}", path, source, {n: shapes[n].shape for n in shapes if n.startswith(prefixes)}, model)
        readers |= {name: _reader(source, name) for name in names}
        if key != "projector":
            sources.append(source)
            tokenizer_path = tokenizer_path or source.tokenizer_path
    missing = shapes.keys() - readers.keys()
    return Weights(
        config=model,
        readers=random_readers(model, config.seed, missing) | readers,
        set_aside=lambda: {name: array for source in sources for name, array in source.set_aside().items()},
        tokenizer_path=tokenizer_path,
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
    )


# What each path in `init` provides; later ones win, so a projector may replace the model's own.
_PROVIDES = {
    "model": tuple(MODULES),
    "vision_tower": ("vision_tower",),
    "language_model": ("language_model",),
    "projector": ("multi_modal_projector",),
}


def _check_fits(key: str, path: str, source, shapes: dict[str, tuple], model: ModelConfig) -> None:
    """Raises ConfigError when a source is not of the architecture that the config asks for."""
    theirs, ours = source.config, model
    if not isinstance(theirs, ModelConfig):
        ours = {VisionConfig: model.vision, TextConfig: model.text}.get(type(theirs))
    if ours is not None and key != "init.projector":
        prefix = {VisionConfig: "model.vision.", TextConfig: "model.text."}.get(type(theirs), "model.")
        differing = _differences(theirs, ours, prefix)
        if differing:
            overrides = " ".join(f"--config.{name}={value}" for name, value, _ in differing)
            raise ConfigError(
                f"{key}={path} is of another architecture than the config: "
                + ", ".join(f"{name}={value} (config: {asked})" for name, value, asked in differing)
                + f". Choose the recipe of that size, or add {overrides}"
            )
    names = set(source.names())
    wrong = [f"{n} is missing" for n in shapes if n not in names] + [
        f"{n} has shape {tuple(source.shape(n))}, not {tuple(shapes[n])}"
        for n in shapes
        if n in names and tuple(source.shape(n)) != tuple(shapes[n])
    ]
    if wrong:
        raise ConfigError(
            f"{key}={path} does not fit the config's model: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}."
        )


def _differences(theirs, ours, prefix: str) -> list[tuple[str, object, object]]:
    found = []
    for field in dataclasses.fields(theirs):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if dataclasses.is_dataclass(a):
            found += _differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append((prefix + field.name, a, b))
    return found


def after_stage(weights: Weights, config: Config, checkpoints: Path) -> Weights:
    """`weights` with what the stage of this config trained, from the newest of its checkpoints."""
    steps = saved_steps(checkpoints)
    if not steps:
        raise CheckpointError(f"{checkpoints} holds no finished checkpoint; train that stage first.")
    saved = SavedParameters(checkpoints, steps[-1])
    weights = before_stage(weights, config)
    return weights.replace({name: _reader(saved, name) for name in saved.names()})


def before_stage(weights: Weights, config: Config) -> Weights:
    """`weights` as the stage of this config starts from them: a fresh projector where it asks for one."""
    if not config.tune.fresh_projector:
        return weights
    names = {name for name in weights.names() if _is_projector(name)}
    return weights.replace(random_readers(config.model, config.seed + 1, names))


def open_any(path: str) -> ModelSource | Weights:
    """A run directory, our model directory, or a Hugging Face directory; told apart by what is inside."""
    if _is_run(Path(path)):
        return open_run(Path(path))
    return open_model(path)


def _is_run(path: Path) -> bool:
    try:
        return json.loads((path / "config.json").read_text()).get("format") == RUN_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def open_run(workdir: Path) -> Weights:
    """The model that a training run ended with."""
    saved = json.loads((workdir / "config.json").read_text())
    stages = {name: schema.from_json(Config, fields) for name, fields in saved["stages"].items()}
    weights = initial_weights(next(iter(stages.values())))
    for name, config in stages.items():
        weights = after_stage(weights, config, checkpoint_directory(workdir, name))
    last = list(stages.values())[-1].data
    return dataclasses.replace(weights, template=last.template, image_aspect_ratio=last.image_aspect_ratio)


def checkpoint_directory(workdir: Path, stage: str) -> Path:
    """Where a stage's checkpoints lie; the only stage of an ordinary recipe is called ''."""
    return workdir / "checkpoints" / stage


def load(weights: Weights, names: Iterable[str], dtype, sharding: Callable) -> dict[str, jax.Array]:
    """Reads parameters onto the devices one by one, as `dtype`. sharding(name, shape) -> where each lies."""
    arrays = {}
    for name in names:
        array = weights.read(name)
        arrays[name] = jax.device_put(array.astype(dtype), sharding(name, array.shape))
    return arrays


def random_readers(model: ModelConfig, seed: int, names: Iterable[str]) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of freshly drawn parameters; all are drawn when the first is read."""
    names = set(names)
    drawn = {}

    def read(name):
        if not drawn:
            drawn.update(random_parameters(model, seed, names))
        return np.asarray(drawn[name])

    return {name: lambda name=name: read(name) for name in names}


def _reader(source, name: str) -> Callable[[], np.ndarray]:
    return lambda: source.read(name)


def _is_projector(name: str) -> bool:
    return MODULES[name.split(".")[0]] == "projector"
