"""The mesh, the one table from parameter names to partitions, and where batches go.

No other file spells a mesh axis. Rows of a batch are spread over `data` and `fsdp`. `tensor` splits heads, MLP
width and vocabulary. `fsdp` splits what `sharding.zero` says, in DeepSpeed's words:

- 3: parameters, gradients and moments, so that all of the state shrinks as 1 / fsdp. Frozen parameters too.
- 2: gradients and moments. Parameters, frozen ones included, are whole on every device of the axis; a gradient is
  scattered as it is reduced, each device updates its part and the new parameters are gathered.
- 1: moments only; gradients are reduced whole and then cut.

All three take the same steps. `data` always replicates the state. It alone crosses the slow network between TPU
slices, which are told by the devices; GPU hosts may be crossed by any axis.

`sharding.offload_moments` keeps the moments in pinned host memory between steps.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.config import ConfigError, MeshConfig, ModelConfig
from llava_jax.kernels.attention import Placement

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Name -> the axes of each dimension, or several such, of which the first that divides is taken. Stacked parameters
# have the layer axis first, hence the leading None. Where one product follows another, the first splits its
# outputs over `tensor` and the second its inputs, so that nothing is communicated in between.
TABLE = (
    # The vocabulary over `tensor`, or, where that does not divide (32001), all of the width.
    (r"language_model\.embed_tokens\.embedding", ("tensor", "fsdp"), (None, ("fsdp", "tensor"))),
    (r"language_model\.lm_head\.kernel", ("fsdp", "tensor"), (("fsdp", "tensor"), None)),
    (r".*\.layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)\.kernel", (None, "fsdp", "tensor")),
    (r".*\.layers\..*\.(o_proj|out_proj|down_proj|fc2)\.kernel", (None, "tensor", "fsdp")),
    (r".*\.layers\..*\.(q_proj|k_proj|v_proj|fc1)\.bias", (None, "tensor")),
    (r".*\.layers\..*\.(o_proj|out_proj|fc2)\.bias", (None, None)),
    # Of quantised kernels (models/quantization.py) blocks of inputs take the place of inputs.
    (
        r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel\.nf4",
        (None, "fsdp", None, "tensor"),
        (None, None, None, ("tensor", "fsdp")),
    ),
    (r".*\.(o_proj|down_proj)\.kernel\.nf4", (None, "tensor", None, "fsdp")),
    (
        r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel\.(absmax|int8)",
        (None, "fsdp", "tensor"),
        (None, None, ("tensor", "fsdp")),
    ),
    (r".*\.(o_proj|down_proj)\.kernel\.(absmax|int8)", (None, "tensor", "fsdp")),
    (r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel\.(scale|absmax_scale)", (None, "tensor")),
    (r".*\.(o_proj|down_proj)\.kernel\.(scale|absmax_scale)", (None, "fsdp")),
    (r".*\.kernel\.absmax_offset", (None,)),
    # Adapters are small: gathered whole where they are used, they need no split over tensor.
    (r".*\.layers\..*\.lora_a", (None, "fsdp", None)),
    (r".*\.layers\..*\.lora_b", (None, None, "fsdp")),
    (r"multi_modal_projector\.linear_\d+\.lora_a", ("fsdp", None)),
    (r"multi_modal_projector\.linear_\d+\.lora_b", (None, "fsdp")),
    (r"multi_modal_projector\.linear_\d*[13579]\.kernel", ("fsdp", "tensor")),
    (r"multi_modal_projector\.linear_\d*[02468]\.kernel", ("tensor", "fsdp")),
    (r"multi_modal_projector\.linear_\d*[13579]\.bias", ("tensor",)),
    (r"multi_modal_projector\.linear_\d*[02468]\.bias", (None,)),
    (r"vision_tower\.(patch_embedding\.kernel|position_embedding)", (None, "fsdp")),
    (r"vision_tower\.(class_embedding|patch_embedding\.bias)", (None,)),
    (r"language_model\.image_newline", (None,)),
    (r".*\.layers\..*norm\d?\.(scale|bias)", (None, None)),
    (r"(language_model\.norm|vision_tower\.pre_layrnorm)\.(scale|bias)", (None,)),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over the given devices (None: all). Raises ConfigError when the sizes do not fit.

    Devices are arranged by how they are wired: within a slice, neighbours in the mesh are neighbours in the torus.
    """
    devices = jax.devices() if devices is None else devices
    arranged = arrange(mesh_sizes(config, len(devices)), devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each axis, with -1 filled in. Raises ConfigError when their product cannot be `num_devices`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise ConfigError(
            f"{', '.join(wrong or [f'mesh.{axis}=-1' for axis in free])}: sizes are positive; one of them may be -1."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed or (not free and fixed != num_devices):
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        product = f"the sizes beside -1 must multiply to {_listed(_divisors(num_devices))}"
        raise ConfigError(
            f"{named} does not fit {num_devices} devices: "
            f"{product if free else f'the sizes must multiply to {num_devices}; one of them may be -1 and fills in'}."
        )
    return sizes | {axis: num_devices // fixed for axis in free}


def arrange(sizes: dict[str, int], devices: list) -> np.ndarray:
    """The devices in an array of these sizes; slices (devices with the same slice_index) lie along `data`.

    Raises ConfigError when TPU slices would be crossed by another axis.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % num_slices == 0:
        within = (sizes["data"] // num_slices, sizes["fsdp"], sizes["tensor"])
        if num_slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        across = (num_slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        choices = [n for n in _divisors(len(devices)) if n % num_slices == 0]
        raise ConfigError(
            f"mesh.data={sizes['data']} cannot span {num_slices} TPU slices, between which only copies of the model may "
            f"lie; set mesh.data to {_listed(choices)}."
        )
    return mesh_utils.create_device_mesh(tuple(sizes.values()), devices)


def check_model(mesh: Mesh, model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError when the mesh cannot hold the model with parameters of these shapes, naming sizes that can."""
    sizes = dict(mesh.shape)
    misfit = next(_misfits(sizes, model, shapes), None)
    if misfit is None:
        return
    axis, what = misfit
    choices = [
        size
        for size in _divisors(mesh.size)
        if not any(found == axis for found, _ in _misfits(sizes | {axis: size}, model, shapes))
    ]
    raise ConfigError(
        f"mesh.{axis}={sizes[axis]} does not divide {what}. This model allows mesh.{axis} = {_listed(choices)}."
    )


def _misfits(
    sizes: dict[str, int], model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, str]]:
    """Axes that do not divide, and what."""
    for key, heads in {
        "model.text.num_attention_heads": model.text.num_attention_heads,
        "model.text.num_key_value_heads": model.text.num_key_value_heads,
        "model.vision.num_attention_heads": model.vision.num_attention_heads,
    }.items():
        if heads % sizes["tensor"]:
            yield "tensor", f"{key}={heads}"
    for name, shape in shapes.items():
        misfits = [_misfit(sizes, shape, axes) for axes in _rows(name)]
        if all(misfits):
            size, axis = misfits[0]
            yield axis, f"a dimension of {size} of {name} {shape}"


def _rows(name: str) -> tuple:
    """The table's partitions for a parameter, best first."""
    for pattern, *partitions in TABLE:
        if re.fullmatch(pattern, name):
            return tuple(partitions)
    raise ConfigError(f"No row of llava_jax/sharding.py's TABLE matches the parameter {name}; add one.")


def _misfit(sizes: dict[str, int], shape: tuple[int, ...], partition: tuple) -> tuple[int, str] | None:
    """A dimension that its axes do not divide, and one of these."""
    for size, axes in zip(shape, partition, strict=True):
        axes = _as_tuple(axes)
        if size % math.prod(sizes[axis] for axis in axes):
            return size, axes[-1]
    return None


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], *, zero: int = 3) -> NamedSharding:
    """The sharding of the parameter `name`. Raises ConfigError when no row matches or a dimension does not divide."""
    return _sharding(mesh, name, shape, over_fsdp=zero == 3)


def gradient_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], *, zero: int = 3) -> NamedSharding:
    """The sharding of the gradient of the parameter `name`."""
    return _sharding(mesh, name, shape, over_fsdp=zero >= 2)


def moment_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], *, offload: bool = False) -> NamedSharding:
    """The sharding of the moments of the parameter `name`; `offload` puts them into the host's memory.

    Moments may be shorter than the parameter along some dimensions (scales of blocks, means of rows): of those, what
    does not divide is whole on every device. A parameter's own shape always divides (`check_model`).
    """
    partitions = _rows(name)
    fitting = [partition for partition in partitions if not _misfit(mesh.shape, shape, partition)]
    partition = [
        axes if size % math.prod(mesh.shape[axis] for axis in _as_tuple(axes)) == 0 else None
        for size, axes in zip(shape, (fitting or partitions)[0], strict=True)
    ]
    sharding = NamedSharding(mesh, PartitionSpec(*partition))
    return sharding.with_memory_kind("pinned_host") if offload else sharding


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...], *, over_fsdp: bool) -> NamedSharding:
    partitions = _rows(name)
    misfits = [_misfit(mesh.shape, shape, partition) for partition in partitions]
    if all(misfits):
        size, axis = misfits[0]
        raise ConfigError(
            f"mesh.{axis}={mesh.shape[axis]} does not divide a dimension of {name} {shape}; "
            f"use {_listed(_divisors(size, mesh.size))}."
        )
    partition = partitions[misfits.index(None)]
    if not over_fsdp:
        partition = [tuple(axis for axis in _as_tuple(axes) if axis != "fsdp") or None for axes in partition]
    return NamedSharding(mesh, PartitionSpec(*partition))


def state_shardings(mesh: Mesh, state, place: Callable[[str, tuple[int, ...]], NamedSharding]):
    """Shardings for any pytree that holds leaves under parameters' names: `place(name, shape)` of these.

    Every other leaf (counters) is replicated.
    """

    def sharding(path, leaf):
        for key in reversed(path):
            name = getattr(key, "key", None)
            if isinstance(name, str) and "." in name and leaf.ndim:
                return place(name, leaf.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def constrain_gradients(mesh: Mesh, *, zero: int = 3) -> Callable[[dict], dict]:
    """A function that lays gradients by parameter name out as `gradient_sharding` says."""

    def constrain(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        shardings = {n: gradient_sharding(mesh, n, g.shape, zero=zero) for n, g in gradients.items()}
        return jax.lax.with_sharding_constraint(gradients, shardings)

    return constrain


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a microbatch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [accumulation, rows, ...]."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Which rows of a microbatch of `num_rows` this process's devices hold: int64[B], ascending.

    Processes hold the same rows where `tensor` spans them. Raises ConfigError when the rows cannot be spread over
    the mesh, or when two processes would hold some of their rows in common and others not.
    """
    shards = num_row_shards(mesh)
    if num_rows % shards:
        raise ConfigError(
            f"data.batch_size / train.accumulation_steps = {num_rows} rows cannot be spread evenly over the mesh's "
            f"{shards} row shards (mesh.data x mesh.fsdp); choose a multiple of {shards}."
        )
    processes = np.array([device.process_index for device in mesh.devices.flat]).reshape(shards, -1)
    own = processes == jax.process_index()
    holders = {tuple(np.unique(shard)) for shard in processes}
    if sum(map(len, holders)) != len(np.unique(processes)):
        raise ConfigError(
            f"mesh.tensor={processes.shape[1]} cuts across the {own.sum()} devices of a process; choose a divisor or "
            "a multiple of their number."
        )
    return np.flatnonzero(own.any(axis=1).repeat(num_rows // shards))


def place_batch(mesh: Mesh, batch: dict) -> dict:
    """Puts a batch of arrays [accumulation, rows, ...] on the devices, rows spread out.

    `batch` holds this process's rows: `own_rows` of each microbatch.
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def constrain_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A function that keeps activations [rows, ...] spread over the row axes."""
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def spread_rows(mesh: Mesh, num_rows: int) -> NamedSharding:
    """The sharding of arrays [rows, ...]: spread over the row axes where these divide the rows, else whole."""
    return NamedSharding(mesh, PartitionSpec(None if num_rows % num_row_shards(mesh) else ROWS))


@functools.cache
def constrain_answers(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A function that lays out activations [rows, T, ...] of a network that continues prompts, with its caches; it is the
    same for every call, so that networks alike are compiled once.

    Rows of many tokens are spread as `spread_rows` says. Those of a single token are whole on every device: they are few,
    and so it is they that travel. Left to itself, XLA gathers all weights for every token.
    """
    rest = PartitionSpec.UNCONSTRAINED

    def constrain(x: jax.Array) -> jax.Array:
        rows = None if x.shape[1] == 1 else spread_rows(mesh, x.shape[0]).spec[0]
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec(rows, *[rest] * (x.ndim - 1)))
        )

    return constrain


def gather_codes(mesh: Mesh) -> Callable[[str, jax.Array], jax.Array]:
    """A function of the name and one layer of a leaf of a quantised kernel -> the same, whole along `fsdp`.

    So a few bits of each weight travel. Left to itself, XLA gathers what is unpacked of them.
    """

    def gather(name: str, leaf: jax.Array) -> jax.Array:
        _, *axes = _sharding(mesh, name, (1, *leaf.shape), over_fsdp=False).spec
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return gather


def attention_placement(mesh: Mesh) -> Placement:
    """How the rows and heads of attention lie on the mesh."""
    return Placement(mesh, rows=ROWS, heads="tensor")


def look_up_embeddings(mesh: Mesh) -> Callable:
    """A function of an embedding table and tokens int32[rows, T] -> its rows, spread over the row axes.

    Each device looks up its part of the width, for its neighbours along `fsdp` too, and they exchange the parts.
    Left to itself, XLA gathers the embeddings of all rows as soon as two axes spread them.
    """

    def constrain(x: jax.Array, *axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def look_up(table: Callable[[jax.Array], jax.Array], tokens: jax.Array) -> jax.Array:
        embeddings = table(constrain(tokens, "data"))
        return constrain(constrain(embeddings, "data", None, "fsdp"), ROWS)

    return look_up


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, largest or number) + 1) if number % n == 0]


def _listed(choices: list[int]) -> str:
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
