"""The mesh, the one table from parameter names to partitions, and where batches go.

No other file spells a mesh axis. `data` replicates parameters, `fsdp` shards them, their gradients and their
moments (the counterpart of ZeRO-3), `tensor` splits heads, MLP width and vocabulary. Rows of a batch are spread
over `data` and `fsdp`.
"""

import math
import re
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Stacked parameters have the layer axis first, hence the leading None.
TABLE = (
    (r"language_model\.embed_tokens\.embedding", ("tensor", "fsdp")),
    (r"language_model\.lm_head\.kernel", ("fsdp", "tensor")),
    (r".*\.layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)\.kernel", (None, "fsdp", "tensor")),
    (r".*\.layers\..*\.(o_proj|out_proj|down_proj|fc2)\.kernel", (None, "tensor", "fsdp")),
    (r".*\.layers\..*\.(q_proj|k_proj|v_proj|fc1)\.bias", (None, "tensor")),
    (r".*\.layers\..*\.(o_proj|out_proj|fc2)\.bias", (None, None)),
    # Adapters are small: gathered whole where they are used, they need no split over tensor.
    (r".*\.layers\..*\.lora_a", (None, "fsdp", None)),
    (r".*\.layers\..*\.lora_b", (None, None, "fsdp")),
    (r"multi_modal_projector\.linear_\d+\.lora_a", ("fsdp", None)),
    (r"multi_modal_projector\.linear_\d+\.lora_b", (None, "fsdp")),
    (r"multi_modal_projector\.linear_\d+\.kernel", ("fsdp", "tensor")),
    (r"multi_modal_projector\.linear_\d+\.bias", (None,)),
    (r"vision_tower\.(patch_embedding\.kernel|position_embedding)", (None, "fsdp")),
    (r"vision_tower\.class_embedding", (None,)),
    (r"language_model\.image_newline", (None,)),
    (r".*\.layers\..*norm\d?\.(scale|bias)", (None, None)),
    (r"(language_model\.norm|vision_tower\.pre_layrnorm)\.(scale|bias)", (None,)),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over the given devices (None: all). Raises ConfigError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise ConfigError(
            f"{', '.join(wrong or [f'mesh.{axis}=-1' for axis in free])}: sizes are positive; one of them may be -1."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"{named} does not fit {len(devices)} devices: the product must be {len(devices)}, with -1 filling in."
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the parameter `name`. Raises ConfigError when no row matches or a dimension does not divide."""
    axes = next((axes for pattern, axes in TABLE if re.fullmatch(pattern, name)), None)
    if axes is None:
        raise ConfigError(f"No row of llava_jax/sharding.py's TABLE matches the parameter {name}; add one.")
    assert len(axes) == len(shape), (name, axes, shape)
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ConfigError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide a dimension of {name} {shape}; "
                f"use a divisor of {size}."
            )
    return NamedSharding(mesh, PartitionSpec(*axes))


def state_shardings(mesh: Mesh, state):
    """Shardings for any pytree that holds parameters, or their moments, under the parameters' names.

    Every other leaf (counters) is replicated.
    """

    def sharding(path, leaf):
        for key in reversed(path):
            name = getattr(key, "key", None)
            if isinstance(name, str) and "." in name and leaf.ndim:
                return parameter_sharding(mesh, name, leaf.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a microbatch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [accumulation, rows, ...]."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def place_batch(mesh: Mesh, batch: dict) -> dict:
    """Puts a batch of arrays [accumulation, rows, ...] on the devices, rows spread out."""
    return jax.device_put(batch, batch_sharding(mesh))


def constrain_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A function that keeps activations [rows, ...] spread over the row axes."""
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)
