"""Opens any model directory or file; what it is follows from its content, never from its name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llava_jax.config import ConfigError, ModelConfig
from llava_jax.convert import layouts, ours
from llava_jax.convert.adapters import Adapter, is_adapter, open_adapter
from llava_jax.convert.download import fetch
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.json_files import of_right_kinds
from llava_jax.convert.merging import merge
from llava_jax.convert.names import PROJECTOR, TOWERS
from llava_jax.convert.reading import Reading
from llava_jax.convert.source import ModelSource
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.vocabulary import EMBEDDING


def open_model(
    path, *, vision_tower="", needs_tower=True, open_base: Callable[..., ModelSource] | None = None
) -> ModelSource:
    """Opens a whole model, a vision tower, a decoder, a LoRA adapter with its base, or a file of projector weights.

    Reads headers only. `vision_tower`: a tower's directory or repository for an original LLaVA that holds no tower and
    names none that is here; a published one that it names is fetched. A tower inside the checkpoint wins over it. Where
    it is not needed, the model may come without. `open_base(path, vision_tower=)` opens the base of an adapter; default:
    this function. Raises ConversionError.
    """
    path = fetch(path)
    if is_adapter(path):
        with of_right_kinds(path / "adapter_config.json"):
            adapter = open_adapter(path)
        return merge(
            _base_of(adapter, vision_tower, open_base or open_model), adapter, vision_tower=vision_tower
        )
    reading = read_model(path, vision_tower=vision_tower)
    if isinstance(reading, ModelSource):
        return reading
    if reading.lacks and needs_tower:
        reading = read_model(path, vision_tower=layouts.fetched_tower(path, layouts.config_fields(path)))
    return dataclasses.replace(reading, lacks="").source()


def read_model(path, *, vision_tower="") -> Reading | Adapter | ModelSource:
    """What `open_model` would open, before its tensors are checked. Raises ConversionError only for files and
    config.json files that cannot be read."""
    path = fetch(path)
    if is_adapter(path):
        with of_right_kinds(path / "adapter_config.json"):
            return open_adapter(path)
    with of_right_kinds(path / "config.json"):
        return ours.open_ours(path) if ours.is_ours(path) else layouts.read_layout(path, vision_tower)


def open_projector(path) -> ModelSource:
    """Opens only the projector of a file, a directory or a whole model; the rest need not be complete.

    Of a directory of our own the embedding comes with it if that has tokens around images.
    """
    path = fetch(path)
    if not ours.is_ours(path):
        return layouts.read_projector(path, TensorFiles(path)).source()
    model = ours.open_ours(path)
    more = {EMBEDDING} if model.config.use_im_start_end else set()
    leaves = {n: leaf for n, leaf in model.leaves.items() if n.startswith(PROJECTOR) or n in more}
    return ModelSource("projector", None, leaves)


def open_parts(model: ModelConfig, *, vision_tower="", language_model="") -> ModelSource:
    """Puts a model together from component directories, each optional.

    The result has layout "parts", the leaves of the components given, and as config `model` with their own
    configs put in. Raises ConversionError where a component is none, or where they do not fit together.
    """
    vision_tower = vision_tower and fetch(vision_tower)
    decoder = _component(language_model, ("llama",), "decoder") if language_model else None
    tower = _component(vision_tower, tuple(TOWERS.values()), "CLIP or SigLIP tower") if vision_tower else None
    found = {"text": decoder, "vision": tower}
    try:
        model = dataclasses.replace(model, **{key: part.config for key, part in found.items() if part})
    except ConfigError as error:
        raise ConversionError(f"{language_model} and {vision_tower} do not fit together: {error}") from error
    leaves, idle = {}, {}
    if tower:
        path = Path(vision_tower)
        tower = layouts.read_tower(
            path, TensorFiles(path), layouts.config_fields(path), num_layers=model.num_vision_layers_run
        ).source()
        leaves, idle = dict(tower.leaves), tower.idle
    if decoder:
        leaves |= decoder.leaves
    return ModelSource("parts", model, leaves, idle, decoder.tokenizer_path if decoder else "")


def _base_of(adapter: Adapter, vision_tower, open_base: Callable[..., ModelSource]) -> ModelSource:
    """The model that an adapter's own files name: components beside it, a directory or a repository."""
    if layouts.has_components(adapter.path):
        return layouts.read_layout(adapter.path).source()
    advice = f"merge them with convert_weights.py merge-lora BASE {adapter.path} DST."
    try:
        base = fetch(adapter.base)
    except ConversionError as error:
        raise ConversionError(
            f"{adapter.path} is a LoRA adapter without its base: {error} Or {advice}"
        ) from error
    if not adapter.base or is_adapter(base):
        raise ConversionError(f"{adapter.path} is a LoRA adapter and names no base that is a model; {advice}")
    return open_base(base, vision_tower=vision_tower)


def _component(path, accepted: tuple[str, ...], noun: str) -> ModelSource:
    source = open_model(path)
    if source.layout not in accepted:
        raise ConversionError(
            f"{path} should be a {noun} of its own, but it is a model of layout {source.layout}."
        )
    return source
