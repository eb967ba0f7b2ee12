"""Recipes: `ConfigDict`s from `configs/` in, one validated `Config` per training stage out.

Nothing else in the project reads a `ConfigDict`.
"""

import contextlib
import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llava_jax.config import SIGLIP, Config, TextConfig, VisionConfig, one_of, require
from llava_jax.config_values import build
from llava_jax.errors import UserError
from llava_jax.tuning import check


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file asks for: stages to train in order, and what has to exist before the first."""

    name: str
    stages: dict[str, Config]  # the one stage of an ordinary recipe is called ""
    prepare: Callable[[], None] | None = None

    @property
    def first(self) -> Config:
        return next(iter(self.stages.values()))

    @property
    def last(self) -> Config:
        return next(reversed(self.stages.values()))


def default_config(*stages: str) -> ConfigDict:
    """The schema's defaults, for a recipe to change.

    With names of stages, the sections of STAGE_SECTIONS are found once per stage, under `stages.NAME`.
    """
    config = _with_aliases(to_config_dict(Config()))
    if not stages:
        return config
    sections = {name: _with_aliases(to_config_dict(Config())) for name in stages}
    for key in STAGE_SECTIONS:
        del config[key]
    for key in config:
        for section in sections.values():
            del section[key]
    config.stage_order = stages
    config.stages = ConfigDict(sections)
    return config


STAGE_SECTIONS = ("data", "tune", "lora", "optimizer", "loss", "train", "checkpoint")
_DATA_ALIASES = {"cutoff_len": "max_length"}  # LLaMA-Factory's name: ours


def _with_aliases(config: ConfigDict) -> ConfigDict:
    """`config`, where an alias and the key it stands for are one value: setting either sets both."""
    for alias, key in _DATA_ALIASES.items():
        config.data[alias] = config.data.get_ref(key)
    return config


def _without_aliases(section: dict) -> dict:
    data = section.get("data")
    if not isinstance(data, dict):
        return section
    return section | {"data": {key: value for key, value in data.items() if key not in _DATA_ALIASES}}


# Their defaults lie there, and are no run's own.
_EXPANDED_WHERE_USED = ("cache_dir", "compiled_dir")


def _at_home(fields: dict) -> dict:
    """Settings whose paths begin with `~`, for the shell expands it at the beginning of a word only."""
    return {
        key: _at_home(value)
        if isinstance(value, dict)
        else re.sub(r"(^|[=,])~(?=/|$)", lambda begin: begin[1] + os.path.expanduser("~"), value)
        if isinstance(value, str) and key not in _EXPANDED_WHERE_USED
        else value
        for key, value in fields.items()
    }


def vicuna(size: str) -> ConfigDict:
    """The `model.text` section of Vicuna v1.5: "7b" or "13b"."""
    sizes = {
        "7b": TextConfig(),
        "13b": TextConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        ),
    }
    one_of("The recipe's size", size, tuple(sizes))
    return to_config_dict(sizes[size])


def vicuna_v1_3(size: str) -> ConfigDict:
    """The `model.text` section of Vicuna v1.3, which is tuned from the first LLaMA: "7b" or "13b"."""
    text = vicuna(size)
    text.update(max_position_embeddings=2048, rms_norm_eps=1e-6)
    return text


def tinyllama() -> ConfigDict:
    """The `model.text` section of TinyLlama-1.1B."""
    return to_config_dict(
        TextConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
        )
    )


def siglip_so400m() -> ConfigDict:
    """The `model.vision` section of SigLIP's so400m at 384 px: 27 x 27 patches of 14."""
    return to_config_dict(
        VisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            image_size=384,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            model_type=SIGLIP,
        )
    )


def llama_3() -> ConfigDict:
    """The `model.text` section of Meta-Llama-3-8B."""
    return to_config_dict(
        TextConfig(
            vocab_size=128256,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_theta=500000.0,
        )
    )


def without_images(config: ConfigDict) -> None:
    """Makes the recipe one of a decoder alone: the tower and the projector, which no sample reaches, are frozen, as small
    as meshes allow, and drawn from the seed."""
    config.model.update(select_layer=0, projector_type="linear")  # none of the tower's layers is run
    config.model.vision.update(
        hidden_size=256, intermediate_size=256, num_attention_heads=16, image_size=14, patch_size=14
    )
    config.tune.projector = "frozen"
    config.export.layout = "llama"


def to_config_dict(config) -> ConfigDict:
    """A dataclass of this module as a `ConfigDict` with the same keys."""
    fields = {}
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:  # ml_collections must know the type of what a flag may put here
            value = placeholder(next(k for k in typing.get_args(kind) if k is not types.NoneType))
        fields[name] = value
    return ConfigDict(fields, convert_dict=False)


def parse(config_dict: ConfigDict) -> Recipe:
    """Validates a recipe.

    Two shapes are accepted: the keys of `Config`; or, with `stage_order` (names) and `stages` (name -> the
    sections of STAGE_SECTIONS), several stages that share all other keys. Either may have `prepare`, a
    function called before the first stage.

    Raises ConfigError on an unknown key (naming the nearest), a wrong type, or values that cannot be.
    """
    to_dict = getattr(config_dict, "to_dict", None)  # raises OSError for a file that could not be read
    require(
        to_dict is not None,
        f"The recipe's get_config() returns a {type(config_dict).__name__}; it should change what "
        "llava_jax.recipe.default_config() gives, and return that.",
    )
    fields = _at_home(to_dict())
    prepare = fields.pop("prepare", None)
    require(prepare is None or callable(prepare), f"The recipe's prepare={prepare!r} should be a function.")
    order = fields.pop("stage_order", None)
    if order is None:
        config = build(Config, _without_aliases(fields), "")
        check(config)
        return Recipe(config.name, {"": config}, prepare)
    sections = fields.pop("stages")
    require(
        len(order) > 0 and sorted(order) == sorted(sections),
        f"stage_order={tuple(order)} does not name each of stages={tuple(sections)} once.",
    )
    stages = {}
    for name in order:
        shared = {key: value for key, value in fields.items() if key not in STAGE_SECTIONS}
        require(
            shared.keys() == fields.keys(),
            f"{', '.join(sorted(fields.keys() - shared.keys()))}: set per stage here, as stages.{name}.KEY.",
        )
        with naming_stage(name):
            stages[name] = build(Config, shared | _without_aliases(sections[name]), f"stages.{name}.")
            check(stages[name])
    return Recipe(stages[order[0]].name, stages, prepare)


@contextlib.contextmanager
def naming_stage(stage: str) -> Iterator[None]:
    """Says in a user's error that leaves the block which stage it is of; "" is an only one."""
    try:
        yield
    except UserError as error:
        if not stage or f"stages.{stage}." in str(error):
            raise
        raise type(error)(f"Stage {stage}: {error}") from error
