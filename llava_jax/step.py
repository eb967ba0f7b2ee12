"""One optimizer step: plain pytrees in, plain pytrees out, gradients only for what trains."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.config import Config, LossConfig, ModelConfig
from llava_jax.errors import ConfigError
from llava_jax.kernels import products_cpu
from llava_jax.kernels.attention import Placement, attention, check_platform
from llava_jax.kernels.cross_entropy import supervised_cross_entropy
from llava_jax.kernels.token_scores import score_tokens
from llava_jax.models.llava import LLaVA
from llava_jax.models.lora import DropoutKey, add_lora, dropout_keys
from llava_jax.models.quantization import Quantization, quantize
from llava_jax.models.stack import CutStack
from llava_jax.tuning import PREFIXES, layer_spans, linear_layers, lora_targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and all that a checkpoint holds of the model."""

    step: jax.Array  # int32[], optimizer steps done
    trainable: dict[str, jax.Array]  # float32 parameters by name
    opt_state: optax.OptState


def abstract_model(
    config: ModelConfig, *, quantization: Quantization | None = None, **how
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The network's structure and its parameters' shapes by name; nothing is allocated. quantization: of the decoder's
    kernels. `how` goes to LLaVA."""

    def make():
        model = LLaVA(config, rngs=nnx.Rngs(0), **how)
        return _quantize_decoder(model, quantization) if quantization else model

    graphdef, params = nnx.split(nnx.eval_shape(make))
    return graphdef, flatten_dict(nnx.to_pure_dict(params), sep=".")


def _quantize_decoder(model: LLaVA, quantization: Quantization, **how) -> LLaVA:
    names = linear_layers("language_model", model.config)
    return quantize(model, PREFIXES["language_model"], names, quantization, **how)


def abstract_tuned_model(
    config: Config, *, dropout: bool = True, gather_codes: Callable = lambda name, leaf: leaf, **how
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The network as a stage trains it: with adapters beside its kernels, these quantised where it asks for that, and
    stacks cut where only a part trains.

    -> structure, parameters' shapes by name, and the shapes of the dropout keys that `make_train_step` draws (none
    without dropout). gather_codes is applied to each leaf of a quantised kernel, by name, before it is unpacked.
    """
    lora = config.lora

    def make():
        model = LLaVA(config.model, rngs=nnx.Rngs(0), **how)
        for module, spans in layer_spans(config).items():
            part = getattr(model, PREFIXES[module])
            part.layers = CutStack(part.layers, spans)
        quantization = Quantization.of(lora)
        if quantization:
            _quantize_decoder(model, quantization, gather=gather_codes)
        targets = {PREFIXES[module]: names for module, names in lora_targets(config).items()}
        rate = lora.dropout if dropout else 0.0
        return add_lora(model, targets, rank=lora.rank, scale=lora.scale, dropout=rate)

    graphdef, params, keys = nnx.split(nnx.eval_shape(make), nnx.Param, DropoutKey)
    params, keys = (flatten_dict(nnx.to_pure_dict(some), sep=".") for some in (params, keys))
    return graphdef, params, keys


def random_parameters(config: ModelConfig, seed: int, names: set[str]) -> dict[str, jax.Array]:
    """Freshly drawn parameters of the given names, float32."""

    @jax.jit
    def draw():
        model = LLaVA(config, rngs=nnx.Rngs(seed))
        params = flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".")
        return {name: params[name] for name in sorted(names)}

    return draw()


def bind(graphdef: nnx.GraphDef, parameters: dict[str, jax.Array]) -> LLaVA:
    """The network with the given parameters. Call it inside a trace: outside it costs milliseconds."""
    return nnx.merge(graphdef, unflatten_dict(parameters, sep="."))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    *,
    constrain_gradients: Callable[[dict], dict] = lambda gradients: gradients,
    dtype: jax.typing.DTypeLike = jnp.float32,
    dropout: dict[str, jax.ShapeDtypeStruct] | None = None,
    seed: int = 0,
    placement: Placement | None = None,
) -> Callable:
    """Returns step(state, frozen, batch) -> (state, metrics).

    frozen: the other parameters by name. batch: LLaVA's arguments and labels by name, as arrays with a leading
    accumulation axis, [A, B, ...]; feature_ids may be absent.
    metrics: loss, grad_norm (before clipping), num_supervised_tokens, skipped; float32[], int32[] or bool[]. A step
    whose loss or gradients are not finite is skipped: it changes nothing but `state.step`.
    `constrain_gradients` is applied to each microbatch's gradients by name; the trainer uses it to say how they lie
    on the devices. dtype: in which the network computes; kernels are cast to it once per step.
    dropout: the shapes of the network's dropout keys, which are drawn anew from (seed, step, microbatch).
    placement: how rows and vocabulary lie on several devices.
    """

    sum_losses = _sum_losses(graphdef, loss, placement)

    def microbatch_loss(trainable, frozen, batch):
        keys = dropout_keys(dropout, batch["dropout_key"]) if dropout else {}
        total, count = sum_losses(trainable | frozen | keys, batch)
        if loss.normalize == "microbatch":
            total = total / jnp.maximum(count, 1)
        return total, (count, (count > 0).astype(jnp.int32))

    value_and_grad = jax.value_and_grad(microbatch_loss, has_aux=True)

    def grad_fn(trainable, frozen, batch):
        value, grads = value_and_grad(trainable, frozen, batch)
        grads = constrain_gradients(grads)  # devices add up their parts of a kernel's in the compute dtype
        return value, jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)

    def step(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict]:
        num_microbatches = batch["tokens"].shape[0]
        trainable = cast_kernels(state.trainable, dtype)
        if dropout:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            batch = batch | {"dropout_key": jax.random.split(key, num_microbatches)}

        def accumulate(sums, microbatch):
            return jax.tree.map(jnp.add, sums, grad_fn(trainable, frozen, microbatch)), None

        sums = grad_fn(trainable, frozen, jax.tree.map(lambda x: x[0], batch))
        if num_microbatches > 1:
            sums, _ = jax.lax.scan(accumulate, sums, jax.tree.map(lambda x: x[1:], batch))
        (total, (count, num_with_labels)), summed_grads = sums
        parts = jnp.maximum(num_with_labels if loss.normalize == "microbatch" else count, 1)
        grad_norm = optax.tree.norm(summed_grads) / parts
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

        def update(trainable, opt_state):
            grads = jax.tree.map(lambda g: g / parts, summed_grads)
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        trainable, opt_state = _apply_if(finite, update, state.trainable, state.opt_state)
        metrics = {
            "loss": total / parts,
            "grad_norm": grad_norm,
            "num_supervised_tokens": count,
            "skipped": ~finite,
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def _apply_if(condition: jax.Array, update: Callable, *state) -> tuple:
    """update(*state) where the condition holds, bool[], otherwise the state."""
    return jax.lax.platform_dependent(
        *state, cpu=partial(_called_if, condition, update), default=partial(_selected_if, condition, update)
    )


def _called_if(condition, update, *state):
    """On CPUs XLA would copy what it selects from, and compute moments again for the parameters."""
    return jax.lax.cond(condition, update, lambda *state: state, *state)


def _selected_if(condition, update, *state):
    """On GPUs a call that depends on the condition would wait for it on the host."""
    return jax.tree.map(partial(jnp.where, condition), update(*state), state)


def cast_kernels(parameters: dict[str, jax.Array], dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """The parameters by name, with kernels in the dtype in which layers use them anyway.

    Done before the loop over microbatches, where layers read and devices gather half as many bytes. The others' gradients
    are sums over tokens in their own dtype (models/linear.py).
    """
    return {
        name: leaf.astype(dtype) if name.endswith(".kernel") else leaf for name, leaf in parameters.items()
    }


def make_eval_step(graphdef: nnx.GraphDef) -> Callable:
    """Returns step(parameters, batch) -> the sums of `score_tokens`: losses, tokens that were the likeliest, tokens.

    parameters: all of the model's, by name. batch: as for a train step, placement too.
    """

    def score(parameters: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, head = _run(graphdef, parameters, batch)
        return score_tokens(hidden, head, batch["labels"])

    def step(parameters: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums = jax.lax.map(lambda microbatch: score(parameters, microbatch), batch)
        return jax.tree.map(jnp.sum, sums)

    return step


def _run(graphdef: nnx.GraphDef, parameters: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Of a microbatch [B, ...] the hidden states float[B, T, D], and the head float[D, V]."""
    model = bind(graphdef, parameters)
    hidden = model(
        batch["tokens"],
        batch["images"],
        batch["positions"],
        batch["segment_ids"],
        batch.get("feature_ids"),
    )
    return hidden, model.language_model.head()


def _sum_losses(graphdef: nnx.GraphDef, loss: LossConfig, placement: Placement | None) -> Callable:
    """Returns a function of parameters by name and a microbatch [B, ...] -> sum of losses, supervised tokens."""

    def sum_losses(parameters: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        hidden, head = _run(graphdef, parameters, batch)
        return supervised_cross_entropy(
            hidden,
            head,
            batch["labels"],
            chunk_size=loss.chunk_size,
            z_loss=loss.z_loss,
            placement=placement,
        )

    return sum_losses


def can_offload(device: jax.Device) -> bool:
    """Whether train.remat="offload" can put activations into memory of the host, and the device read them there."""
    if device.platform == "gpu":  # all can; one that is only described does not list that memory
        return True
    return "pinned_host" in {memory.kind for memory in device.addressable_memories()}


def model_settings(config: Config, constrain: Callable, placement: Placement | None = None) -> dict:
    """How the stage wants its network run, as keyword arguments of LLaVA.

    placement: of attention's arrays on several devices. Raises ConfigError where train.attention or train.remat cannot
    run. Networks with train.remat="auto" do not run: planning/remat.py replaces that before.
    """
    device = placement.mesh.devices.flat[0] if placement else jax.devices()[0]
    check_platform(config.train.attention, device.platform)
    if config.train.remat == "offload" and not can_offload(device):
        raise ConfigError(
            f"train.remat='offload' needs memory of the host that a {device.device_kind} reads; use 'full'."
        )
    return dict(
        attention=partial(
            attention,
            implementation=config.train.attention,
            placement=placement,
            longest_segment=config.data.max_length,
            single_segment=not config.data.packing,
        ),
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        unroll=config.train.scan_unroll,
        constrain=constrain,
        dot_general=products_cpu.dot_general if device.platform == "cpu" else jax.lax.dot_general,
    )
