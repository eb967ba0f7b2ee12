"""Where each parameter of a run's model comes from: directories, earlier stages, or a draw from the seed."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from llava_jax.checkpoint import saved_steps, verified_steps
from llava_jax.config import Config, InitConfig, ModelConfig, split_names
from llava_jax.config_values import from_json
from llava_jax.convert import recycled
from llava_jax.convert.download import download_command, is_repository
from llava_jax.convert.layouts import config_fields
from llava_jax.convert.opening import open_model, open_parts, open_projector
from llava_jax.convert.source import Index, Leaf, ModelSource, completed, extent, read_ahead
from llava_jax.convert.vocabulary import (
    EMBEDDING,
    embeddings_of,
    saved_embeddings,
    with_embeddings,
    with_mean_rows,
)
from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.data.tokenizer import load_tokenizer, require_room
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.models.quantization import Quantization
from llava_jax.saved_parameters import SavedParameters
from llava_jax.starting_adapters import with_adapters
from llava_jax.step import abstract_model, random_parameters
from llava_jax.tuned_weights import restored, tuned
from llava_jax.tuning import module_of

RUN_FORMAT = "llava_jax run"
_WEIGHTS = ("model", "vision_tower", "language_model", "projector")


def initial_weights(config: Config) -> ModelSource:
    """The model that a recipe's first stage starts from, as `init` says; nothing is read yet.

    Raises ConfigError when a directory's architecture is not that of `config.model`, CheckpointError when
    its tensors are not those of a model.
    """
    init, model = config.init, config.model
    _require_here(init)
    if init.model:
        source = open_any(init.model)
    else:
        source = open_parts(model, vision_tower=init.vision_tower, language_model=init.language_model)
    if not isinstance(source.config, ModelConfig):
        raise ConfigError(
            f"init.model={init.model} is a part of a model (layout {source.layout}); "
            "set init.vision_tower or init.language_model to it instead."
        )
    _check_template(source, config)
    source = _with_positions(_with_tokens(_with_tiles(source, model), config), config)
    differing = _differences(source.config, model, "model.")
    if differing:
        path = init.model or " and ".join(filter(None, (init.vision_tower, init.language_model)))
        raise ConfigError(
            f"{path} has another architecture than the config: "
            + ", ".join(f"{key}={theirs!r} (config: {ours!r})" for key, theirs, ours in differing)
            + ". Choose the recipe of that size, or add "
            + " ".join(f"--config.{key}={theirs}" for key, theirs, _ in differing)
        )
    if init.projector:
        source = _with_projector(source, config)
    source = with_adapters(source, config)
    return complete(
        dataclasses.replace(
            source,
            tokenizer_path=init.tokenizer or source.tokenizer_path,
            template=config.data.template,
            image_aspect_ratio=config.data.image_aspect_ratio,
        ),
        config.seed,
    )


def _require_here(init: InitConfig) -> None:
    """Raises one ConfigError that names all that is missing.

    Nothing is fetched from the hub: every process of a run reads these files, now and whenever it is continued.
    """
    named = [(key, getattr(init, key)) for key in _WEIGHTS]
    named += [("adapters", path) for path in split_names(init.adapters)]
    missing = [(key, path) for key, path in named if path and not Path(path).exists()]
    if missing:
        raise ConfigError(_missing(missing))


def _missing(named: list[tuple[str, str]]) -> str:
    """What to say of the settings of `init` whose paths do not exist."""
    what = " and ".join(f"init.{key}={path}" for key, path in named)
    flags = " and ".join(dict.fromkeys(f"--config.init.{key}" for key, _ in named))
    verb, lie = ("do", "they lie") if named[1:] else ("does", "it lies")
    message = f"{what} {verb} not exist; set {flags} to where {lie}."
    commands = [
        download_command(path, f"checkpoints/{Path(path).name.partition('@')[0]}")
        for _, path in named
        if is_repository(path)
    ]
    if not commands:
        return (
            f"{message} The first lines of a recipe say where on the Hugging Face hub its weights lie, and which run it "
            "starts from."
        )
    return (
        f"{message} Training fetches nothing from the Hugging Face hub, since every process reads these files whenever the "
        f"run is continued. Fetch them once, and name that directory: {'; '.join(commands)}"
    )


def _check_template(source: ModelSource, config: Config) -> None:
    """Raises ConfigError if the model, or the decoder, says that it has learnt another conversation template than the
    run's.

    Captions are no conversations, and system texts may differ.
    """
    key = "model" if config.init.model else "language_model"
    path, learnt, asked = getattr(config.init, key), source.template, config.data.template
    if source.layout not in ("ours", "run"):
        learnt = config_fields(Path(path)).get("conversation_template") if path else None
    old, new = TEMPLATES.get(learnt), get_template(asked)
    if config.init.change_template or old is None or old.caption_only or new.caption_only:
        return
    if dataclasses.replace(old, system="") != dataclasses.replace(new, system=""):
        raise ConfigError(
            f"init.{key}={path} has learnt the conversation template {learnt!r}, as its config.json says, but "
            f"data.template={asked!r}; add --config.data.template={learnt}, or --config.init.change_template=True if it "
            "is to learn another one."
        )


def find_tokenizer(init: InitConfig) -> str:
    """Where the tokenizer of a run lies; raises ConfigError if `init` names none."""
    path = init.tokenizer
    if not path and (init.model or init.language_model):
        _require_here(InitConfig(model=init.model, language_model=init.language_model))
        path = open_any(init.model or init.language_model).tokenizer_path
    if not path:
        raise ConfigError(
            "No tokenizer: set init.tokenizer to a tokenizer.model, a tokenizer.json or a directory that holds one."
        )
    return path


def _with_tiles(source: ModelSource, model: ModelConfig) -> ModelSource:
    """`source`, and if it never saw tiles, with those of `model`: a LLaVA-1.5 may go on as a LLaVA-1.6."""
    if source.config.image_grid_pinpoints or source.config.patch_merge_type != "flat":
        return source
    tiles = {key: getattr(model, key) for key in ("image_grid_pinpoints", "patch_merge_type")}
    return dataclasses.replace(source, config=dataclasses.replace(source.config, **tiles))


def _with_tokens(source: ModelSource, config: Config) -> ModelSource:
    """`source`, and where the run's tokenizer has tokens that it has not, with rows for them."""
    model, size = config.model, source.config.text.vocab_size
    path = config.init.tokenizer or source.tokenizer_path
    if EMBEDDING not in source.leaves or not path:
        return source
    # Parts are put together under the config of the run, so that theirs says nothing of their tokens.
    known = () if source.layout == "parts" else source.config.extra_tokens
    new = [token for token in model.extra_tokens if token not in known]
    if new or model.text.vocab_size > size:
        tokenizer = load_tokenizer(path, model.extra_tokens)
        require_room(tokenizer, model.text.vocab_size)
        begin, end = min(size, tokenizer.vocab_size - len(new)), tokenizer.vocab_size
        if begin < end:
            source = with_mean_rows(source, begin, max(end, model.text.vocab_size) if end > size else end)
    has = dataclasses.replace(
        source.config,
        use_im_start_end=source.config.use_im_start_end or model.use_im_start_end,
        use_im_patch_token=source.config.use_im_patch_token or model.use_im_patch_token,
    )
    return dataclasses.replace(source, config=has)


def _with_positions(source: ModelSource, config: Config) -> ModelSource:
    """`source`, and where the run asks a decoder for longer rows than it was trained on, with positions for them.

    That is where samples may be longer than its positions, and where rotary scaling is asked for and it has none.
    """
    old, new = source.config.text, config.model.text
    changes = {}
    if old.max_position_embeddings < config.data.max_length:
        changes["max_position_embeddings"] = new.max_position_embeddings
    if old.rope_scaling.rope_type == "default" and new.rope_scaling.rope_type != "default":
        changes["rope_scaling"] = new.rope_scaling
    if not changes:
        return source
    scaling = new.rope_scaling
    scale = (
        ""
        if scaling.rope_type == "default"
        else f", rotary scaling {scaling.rope_type} by {scaling.factor:g}"
    )
    now = f"{new.max_position_embeddings}{scale}"
    print(f"The decoder has {old.max_position_embeddings} positions; this run gives it {now}.", flush=True)
    text = dataclasses.replace(old, **changes)
    return dataclasses.replace(source, config=dataclasses.replace(source.config, text=text))


def complete(source: ModelSource, seed: int) -> ModelSource:
    """`source` with freshly drawn parameters where it has none, in the order of the network."""
    shapes = abstract_model(source.config)[1]
    drawn = _random_leaves(source.config, seed, shapes.keys() - source.leaves.keys())
    leaves = source.leaves | drawn
    return dataclasses.replace(source, leaves={name: leaves[name] for name in (*shapes, *leaves)})


def before_stage(weights: ModelSource, config: Config) -> ModelSource:
    """`weights` as the stage of this config starts from them: in the form that it trains (see `tuned`), and with a
    fresh projector where it asks for one."""
    if config.tune.fresh_projector:
        names = {name for name in weights.names() if _is_projector(name)}
        weights = weights.with_leaves(_random_leaves(config.model, config.seed + 1, names))
    return tuned(weights, config)


def after_stage(weights: ModelSource, config: Config, checkpoints: Path, *, verify: bool) -> ModelSource:
    """`weights` with what the stage of this config trained, from the newest of its checkpoints.

    verify: from the newest that is not damaged; for that all of its files are read.
    """
    return restored(as_trained(weights, config, checkpoints, verify=verify), config)


def as_trained(weights: ModelSource, config: Config, checkpoints: Path, *, verify: bool) -> ModelSource:
    """The same in the form in which the stage trains it, adapters not merged."""
    steps = verified_steps(checkpoints) if verify else reversed(saved_steps(checkpoints))
    step = next(iter(steps), None)
    if step is None:
        raise CheckpointError(f"{checkpoints} holds no good checkpoint; train that stage first.")
    saved = SavedParameters(checkpoints, step)
    weights = before_stage(weights, config)
    frozen = {
        name: _verified(name, weights.leaves[name], crc, saved.path) for name, crc in saved.frozen.items()
    }
    return weights.with_leaves(frozen | saved.leaves(), layout="run")


def _verified(name: str, leaf: Leaf, crc: int, path: Path) -> Leaf:
    """`leaf`, which raises CheckpointError when what it reads is not what the stage in `path` was trained with.

    Before the first part is read all of it is, for the checksum.
    """
    verified = False

    def verify(found: int) -> None:
        nonlocal verified
        if found != crc:
            raise CheckpointError(
                f"{name} has changed since {path} was trained with it frozen: the model in the run's init.* is no longer "
                "the same. Put the old one back."
            )
        verified = True

    def read(index: Index = ()):
        if not index:
            array = leaf.read()
            verify(checksum(array))
            return array
        if not verified:
            found = 0
            for part in _in_order(leaf):
                found = checksum(leaf.part(part), found)
            verify(found)
        return leaf.part(index)

    return dataclasses.replace(leaf, read=read)


def _in_order(leaf: Leaf) -> list[Index]:
    """Parts of a leaf whose bytes follow each other, as its checksum takes them."""
    return leaf.parts() if leaf.axis == 0 else [()]


def checksum(array: np.ndarray, crc: int = 0) -> int:
    """CRC-32 of the array's bytes, or of those that had the checksum `crc` and then the array's."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), crc)


def checkpoint_directory(workdir: Path, stage: str) -> Path:
    """Where a stage's checkpoints lie; the only stage of an ordinary recipe is called ''."""
    return workdir / "checkpoints" / stage


def open_any(path: str, *, vision_tower: str = "", needs_tower: bool = True) -> ModelSource:
    """A run directory, our model directory, or a Hugging Face directory; told apart by what is inside.

    The base that an adapter names may be each of them too. The other arguments are those of `open_model`.
    """
    local = Path(path).expanduser()
    if is_run(local):
        return open_run(local)
    return open_model(path, vision_tower=vision_tower, needs_tower=needs_tower, open_base=open_any)


def is_run(path: Path) -> bool:
    """Whether a training run wrote this directory."""
    try:
        return json.loads((path / "config.json").read_text()).get("format") == RUN_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def open_run(workdir: Path) -> ModelSource:
    """The model that a training run ended with, or has reached."""
    return restored(*open_trained(workdir))


def open_trained(workdir: Path) -> tuple[ModelSource, Config]:
    """The same in the form in which the run's last stage trains it, adapters not merged, and that stage's settings."""
    workdir = workdir.expanduser()
    stages = run_stages(workdir)
    *earlier, last = stages
    config = stages[last]
    weights = initial_weights(next(iter(stages.values())))
    for name in earlier:
        weights = after_stage(weights, stages[name], checkpoint_directory(workdir, name), verify=True)
    weights = as_trained(weights, config, checkpoint_directory(workdir, last), verify=True)
    how = dict(template=config.data.template, image_aspect_ratio=config.data.image_aspect_ratio)
    return dataclasses.replace(weights, **how), config


def run_stages(workdir: Path) -> dict[str, Config]:
    """The settings of a run's stages by name. Raises CheckpointError where there are none."""
    workdir = workdir.expanduser()
    try:
        saved = json.loads((workdir / "config.json").read_text())
        return {name: from_json(Config, fields) for name, fields in saved["stages"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{workdir / 'config.json'} is no run's settings ({error!r}); name the directory of a training run."
        ) from error


def load(
    weights: ModelSource,
    names: Iterable[str],
    dtype,
    sharding: Callable,
    checksums: dict[str, int] | None = None,
    *,
    quantized: Mapping[str, Quantization] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Reads parameters onto the devices one by one, as `dtype`. sharding(name, shape) -> where each lies.

    The host holds this process's shards of one parameter and one part of it as stored. `checksums` receives
    the checksum of each whole parameter as it was read, whatever its sharding; without it no bytes are read
    that only other processes need. Kernels named in `quantized` become leaves under their names; these are read whole,
    because their scales are of whole columns.
    """
    arrays = {}
    for name in names:
        leaf = weights.leaves[name]
        if name in quantized:
            arrays |= _quantized(name, leaf, quantized[name], sharding, checksums)
            continue
        shards = _Shards(leaf.shape, np.dtype(dtype), sharding(name, leaf.shape))
        if checksums is None:
            shards.fill(leaf, leaf.parts(), within=shards.bounds)
        else:
            checksums[name] = shards.fill(leaf, _in_order(leaf))
        arrays[name] = shards.place()
    recycled.forget()  # a training process may need it for something else
    return arrays


def _quantized(
    name: str, leaf: Leaf, quantization: Quantization, sharding: Callable, checksums: dict[str, int] | None
) -> dict[str, jax.Array]:
    """The leaves of one stacked kernel, read and quantised layer by layer."""
    shards = {}
    for kind, shape in quantization.leaves(leaf.shape).items():
        part = f"{name}.{kind}"
        shards[part] = _Shards(shape.shape, shape.dtype, sharding(part, shape.shape))
    crc, layer = 0, 0
    for values in read_ahead(leaf, _in_order(leaf)):
        if checksums is not None:
            crc = checksum(values, crc)
        for kernel in values:
            for kind, part in quantization.quantize(kernel).items():
                shards[f"{name}.{kind}"].put_layer(layer, part)
            layer += 1
    if checksums is not None:
        checksums[name] = crc
    return {part: some.place() for part, some in shards.items()}


class _Shards:
    """The distinct shards of an array on this process's devices, in host memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding):
        self.shape, self.sharding = shape, sharding
        self.buffers = {}  # the begin and end on every axis -> values
        for index in sharding.addressable_devices_indices_map(shape).values():
            index = completed(index, shape)
            if _ends(index) not in self.buffers:
                self.buffers[_ends(index)] = np.empty(extent(index), dtype)

    @property
    def bounds(self) -> Index:
        """The smallest part of the array that holds all shards."""
        return tuple(
            slice(min(begin for begin, _ in axis), max(end for _, end in axis))
            for axis in zip(*self.buffers, strict=True)
        )

    def fill(self, leaf: Leaf, parts: list[Index], within: Index = ()) -> int:
        """Reads the leaf's `parts`, each cut to `within`; -> the checksum of what was read."""
        crc = 0
        within = completed(within, self.shape)
        parts = [_intersection(completed(part, self.shape), within) for part in parts]
        for part, values in zip(parts, read_ahead(leaf, parts), strict=True):
            crc = checksum(values, crc)
            self.put(part, values)
        return crc

    def put(self, part: Index, values: np.ndarray) -> None:
        """Takes over what `part`, completed, selects of the array."""
        for ends, buffer in self.buffers.items():
            index = tuple(slice(*pair) for pair in ends)
            common = _intersection(index, part)
            buffer[_relative(common, index)] = values[_relative(common, part)]

    def put_layer(self, layer: int, values: np.ndarray) -> None:
        """The same of one layer."""
        self.put(completed((slice(layer, layer + 1),), self.shape), values[None])

    def place(self) -> jax.Array:
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.buffers[_ends(completed(index, self.shape))]
        )


def _ends(index: Index) -> tuple[tuple[int, int], ...]:
    return tuple((one.start, one.stop) for one in index)


def _intersection(first: Index, second: Index) -> Index:
    pairs = zip(first, second, strict=True)
    bounds = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs]
    return tuple(slice(begin, max(begin, end)) for begin, end in bounds)


def _relative(index: Index, origin: Index) -> Index:
    pairs = zip(index, origin, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


def _random_leaves(model: ModelConfig, seed: int, names: Iterable[str]) -> dict[str, Leaf]:
    """Freshly drawn parameters; all are drawn when the first is read."""
    names = set(names)
    shapes = abstract_model(model)[1]
    drawn = {}

    def read(name):
        if not drawn:
            drawn.update(random_parameters(model, seed, names))
        return np.asarray(drawn[name])

    return {
        name: Leaf(shapes[name].shape, np.dtype(np.float32), lambda name=name: read(name)) for name in names
    }


def _with_projector(weights: ModelSource, config: Config) -> ModelSource:
    """`weights` with the projector of `init.projector` and, as in the original, the embeddings of <im_start> and <im_end>
    that were trained with it."""
    path, model = config.init.projector, config.model
    source = open_run(Path(path)) if is_run(Path(path)) else open_projector(path)
    weights = weights.with_leaves(_projector(path, source, model))
    learnt = source.config is None or source.config.use_im_start_end  # of a file only its tensors tell
    if not (model.use_im_start_end and learnt and EMBEDDING in weights.leaves and weights.tokenizer_path):
        return weights
    tokenizer = load_tokenizer(config.init.tokenizer or weights.tokenizer_path, model.extra_tokens)
    ids = [tokenizer.special_id(token) for token in ("<im_start>", "<im_end>")]
    if EMBEDDING in source.leaves:
        rows = embeddings_of(source, ids)
    else:
        rows = saved_embeddings(path, ids, weights.leaves[EMBEDDING].shape)
    return with_embeddings(weights, ids, rows) if rows else weights


def _projector(path: str, source: ModelSource, model: ModelConfig) -> dict[str, Leaf]:
    leaves = {name: leaf for name, leaf in source.leaves.items() if _is_projector(name)}
    found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    expected = {name: leaf.shape for name, leaf in abstract_model(model)[1].items() if _is_projector(name)}
    if found != expected:
        raise ConfigError(
            f"The projector in init.projector={path} has shapes {found}; model.projector_type={model.projector_type!r} "
            f"between this tower and this decoder needs {expected}. {_projector_cure(found, model)}"
        )
    return leaves


def _projector_cure(found: dict[str, tuple[int, ...]], model: ModelConfig) -> str:
    kernels = [found[name] for name in sorted(found) if name.endswith(".kernel")]
    ends = (model.vision.hidden_size, model.text.hidden_size)
    if kernels and (kernels[0][0], kernels[-1][1]) == ends:
        kind = "linear" if len(kernels) == 1 else f"mlp{len(kernels)}x_gelu"
        return f"Add --config.model.projector_type={kind}."
    return "It was trained with another tower or decoder: name that projector, or leave init.projector empty for a new one."


def _is_projector(name: str) -> bool:
    return module_of(name) == "projector"


def _differences(theirs, ours, prefix: str) -> list[tuple[str, object, object]]:
    """(key, their value, our value) for each field in which two configs differ."""
    found = []
    for field in dataclasses.fields(theirs):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if dataclasses.is_dataclass(a):
            found += _differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append((prefix + field.name, a, b))
    return found
