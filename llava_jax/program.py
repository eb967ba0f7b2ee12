"""What a stage runs on its devices: the network, what trains of it, and the compiled steps."""

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llava_jax.compiler import as_precise_as, compiler_options
from llava_jax.config import Config
from llava_jax.models.quantization import Quantization, quantized_kernels
from llava_jax.optimizer import make_optimizer
from llava_jax.sharding import (
    attention_placement,
    batch_sharding,
    check_model,
    constrain_gradients,
    constrain_rows,
    gather_codes,
    look_up_embeddings,
    moment_sharding,
    parameter_sharding,
    replicated,
    state_shardings,
)
from llava_jax.step import (
    TrainState,
    abstract_tuned_model,
    make_eval_step,
    make_train_step,
    model_settings,
)
from llava_jax.tuning import is_trainable, kernel_name


@dataclasses.dataclass(frozen=True)
class Program:
    """The programs of one stage on one mesh, and the shapes, dtypes and shardings of what they take.

    Nothing is allocated here: the mesh may consist of devices that are only described. Raises ConfigError when the
    mesh cannot hold the model.
    """

    config: Config
    mesh: Mesh
    num_steps: int  # optimizer steps of the stage; schedules end there

    def __post_init__(self):
        shapes = {name: leaf.shape for name, leaf in self._model[1].items()}
        check_model(self.mesh, self.config.model, shapes)

    @cached_property
    def _model(self) -> tuple[nnx.GraphDef, dict, dict]:
        return self._network(dropout=True)

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def _network(self, *, dropout: bool) -> tuple[nnx.GraphDef, dict, dict]:
        settings = model_settings(self.config, constrain_rows(self.mesh), attention_placement(self.mesh))
        return abstract_tuned_model(
            self.config,
            dropout=dropout,
            gather_codes=gather_codes(self.mesh),
            look_up=look_up_embeddings(self.mesh),
            **settings,
        )

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.num_steps)

    def parameter_sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter lies, trainable or frozen."""
        return parameter_sharding(self.mesh, name, shape, zero=self.config.sharding.zero)

    def abstract_trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters that train, float32."""
        return {
            name: self._abstract(name, leaf.shape, jnp.float32)
            for name, leaf in self._model[1].items()
            if is_trainable(name, self.config)
        }

    def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The other parameters, in train.frozen_dtype, or as leaves of quantised kernels."""
        dtype = jnp.dtype(self.config.train.frozen_dtype)
        return {
            name: self._abstract(name, leaf.shape, dtype if kernel_name(name) == name else leaf.dtype)
            for name, leaf in self._model[1].items()
            if not is_trainable(name, self.config)
        }

    def quantized(self) -> dict[str, Quantization]:
        """How kernels are quantised, by the names of those that are."""
        return quantized_kernels(self._model[1], Quantization.of(self.config.lora))

    def abstract_state(self) -> TrainState:
        """What a train step takes and gives back, and what a checkpoint holds."""
        trainable = self.abstract_trainable()
        opt_state = jax.eval_shape(self._optimizer.init, trainable)
        opt_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            opt_state,
            self._opt_state_shardings(opt_state, offload=self.config.sharding.offload_moments),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return TrainState(step, trainable, opt_state)

    def abstract_batch(self, length: int, num_images: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of a step whose rows have `length` tokens and `num_images` image slots."""
        train, size = self.config.train, self.config.model.vision.image_size
        rows = (train.accumulation_steps, self.config.data.batch_size // train.accumulation_steps)
        keys = ["tokens", "labels", "positions", "segment_ids"]
        if self.config.data.image_aspect_ratio == "anyres":
            keys.append("feature_ids")
        sharding = batch_sharding(self.mesh)
        batch = {key: jax.ShapeDtypeStruct((*rows, length), jnp.int32, sharding=sharding) for key in keys}
        images = jax.ShapeDtypeStruct((*rows, num_images, size, size, 3), jnp.uint8, sharding=sharding)
        return batch | {"images": images}

    def new_state(self, trainable: dict[str, jax.Array]) -> TrainState:
        """The state before the first step. `trainable` may lie anywhere."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        trainable = jax.device_put(trainable, shardings.trainable)
        init = jax.jit(self._optimizer.init, out_shardings=shardings.opt_state)
        return TrainState(jax.device_put(np.int32(0), shardings.step), trainable, init(trainable))

    def train_step(self):
        """step(state, frozen, batch) -> (state, metrics), jitted; see `make_train_step`. Donates the state."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        graphdef, _, keys = self._model
        step = make_train_step(
            graphdef,
            self._optimizer_on_mesh(),
            self.config.loss,
            constrain_gradients=constrain_gradients(self.mesh, zero=self.config.sharding.zero),
            dtype=jnp.dtype(self.config.train.dtype),
            dropout=keys,
            seed=self.config.seed,
            placement=attention_placement(self.mesh),
        )
        if self.config.sharding.offload_moments:
            step = self._with_moments_on_device(step)
        return jax.jit(
            as_precise_as(self.config.train.dtype, self._platform, step),
            donate_argnums=0,
            out_shardings=(shardings, replicated(self.mesh)),
            compiler_options=compiler_options(self._platform, self.mesh.size),
        )

    def eval_step(self):
        """step(parameters, batch) -> sums over its supervised tokens, jitted; see `make_eval_step`."""
        step = make_eval_step(self._network(dropout=False)[0])
        return jax.jit(as_precise_as(self.config.train.dtype, self._platform, step))

    def _abstract(self, name: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.parameter_sharding(name, shape))

    def _opt_state_shardings(self, opt_state: optax.OptState, *, offload: bool):
        return state_shardings(self.mesh, opt_state, partial(moment_sharding, self.mesh, offload=offload))

    def _optimizer_on_mesh(self) -> optax.GradientTransformation:
        """The optimizer, updating on each device what it holds of the moments, however the gradients lie."""
        cut = constrain_gradients(self.mesh, zero=3)
        init, update = self._optimizer
        return optax.GradientTransformation(init, lambda grads, *rest: update(cut(grads), *rest))

    def _with_moments_on_device(self, step):
        def fetch_and_step(state: TrainState, frozen: dict, batch: dict):
            on_device = self._opt_state_shardings(state.opt_state, offload=False)
            opt_state = jax.device_put(state.opt_state, on_device)
            return step(dataclasses.replace(state, opt_state=opt_state), frozen, batch)

        return fetch_and_step
