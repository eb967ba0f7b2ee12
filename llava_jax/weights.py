"""Where each parameter of a run's model comes from: directories, earlier stages, or a draw from the seed."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from llava_jax import config as schema
from llava_jax.checkpoint import SavedParameters, saved_steps
from llava_jax.config import Config, InitConfig, ModelConfig
from llava_jax.convert.opening import open_model, open_parts, open_projector
from llava_jax.convert.source import ModelSource
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

    Raises ConfigError when a directory's architecture is not that of `config.model`, CheckpointError when
    its tensors are not those of a model.
    """
    init, model = config.init, config.model
    if init.model:
        source = open_any(init.model)
    else:
        source = open_parts(model, vision_tower=init.vision_tower, language_model=init.language_model)
    _check_architecture(source, model, init)
    readers = {name: _reader(source, name) for name in source.names()}
    if init.projector:
        readers |= _projector_readers(init.projector, model)
    names = abstract_model(model)[1].keys()
    return Weights(
        config=model,
        readers=random_readers(model, config.seed, names - readers.keys()) | readers,
        set_aside=source.set_aside,
        tokenizer_path=init.tokenizer or source.tokenizer_path,
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
    )


def _check_architecture(source: ModelSource | Weights, model: ModelConfig, init: InitConfig) -> None:
    if not isinstance(source.config, ModelConfig):
        raise ConfigError(
            f"init.model={init.model} is a part of a model (layout {source.layout}); "
            "set init.vision_tower or init.language_model to it instead."
        )
    differing = _differences(source.config, model, "model.")
    if differing:
        path = init.model or " and ".join(filter(None, (init.vision_tower, init.language_model)))
        raise ConfigError(
            f"{path} has another architecture than the config: "
            + ", ".join(f"{key}={theirs!r} (config: {ours!r})" for key, theirs, ours in differing)
            + ". Choose the recipe of that size, or add "
            + " ".join(f"--config.{key}={theirs}" for key, theirs, _ in differing)
        )


def _projector_readers(path: str, model: ModelConfig) -> dict[str, Callable[[], np.ndarray]]:
    source = open_run(Path(path)) if _is_run(Path(path)) else open_projector(path)
    found = {name: tuple(source.shape(name)) for name in source.names() if _is_projector(name)}
    expected = {name: leaf.shape for name, leaf in abstract_model(model)[1].items() if _is_projector(name)}
    if found != expected:
        raise ConfigError(
            f"The projector in init.projector={path} has shapes {found}; model.projector_type={model.projector_type!r} "
            f"between this tower and this decoder needs {expected}."
        )
    return {name: _reader(source, name) for name in found}


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
