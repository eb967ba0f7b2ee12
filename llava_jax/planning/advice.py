"""What to change when a step does not fit, cheapest first, with what each change would bring by arithmetic."""

import dataclasses
from collections.abc import Iterator

from llava_jax.config import Config
from llava_jax.gpus import memory_fraction, memory_fraction_name
from llava_jax.planning.activations import decoder_kernels, gathered_bytes, kernel_bytes, saved_bytes
from llava_jax.planning.memory import Arguments
from llava_jax.planning.targets import GIB
from llava_jax.tuning import NF4_BLOCK

_HIGH_FRACTION = 0.95  # of a card; the rest is for the driver, libraries and NCCL
_WORTH_TELLING = GIB // 20


@dataclasses.dataclass(frozen=True)
class Situation:
    """A step that does not fit, or barely does. Sizes are bytes per device."""

    config: Config
    length: int  # tokens per row
    num_devices: int
    num_row_shards: int
    platform: str
    arguments: Arguments
    peak: int
    hbm: int

    @property
    def fsdp(self) -> int:
        """Devices that share what sharding.zero splits."""
        mesh = self.config.mesh
        return self.num_devices // (mesh.data * mesh.tensor) if mesh.fsdp == -1 else mesh.fsdp

    @property
    def rows(self) -> int:
        """Per device, of a microbatch."""
        return self.config.data.batch_size // self.config.train.accumulation_steps // self.num_row_shards

    @property
    def activations(self) -> int:
        """All that is neither argument nor gradient."""
        return max(0, self.peak - self.arguments.total - self.arguments.gradients)

    @property
    def missing(self) -> int:
        return max(0, self.peak - self.hbm)


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change; several add up only roughly."""

    change: str  # what to add to the command, or to do
    saves: int  # bytes per device
    price: str


def advise(situation: Situation) -> list[Advice]:
    """The changes that would help, cheapest first."""
    makers = (
        _memory_fraction,
        _frozen_dtype,
        _zero,
        _shard_more,
        _accumulate,
        _recompute,
        _shorter_rows,
        _quantize,
        _tensor,
        _more_devices,
    )
    return [advice for make in makers for advice in make(situation) if advice.saves >= _WORTH_TELLING]


def _memory_fraction(situation: Situation) -> Iterator[Advice]:
    fraction = memory_fraction()
    if situation.platform == "gpu" and fraction < _HIGH_FRACTION:
        gain = int(situation.hbm / fraction * (_HIGH_FRACTION - fraction))
        yield Advice(
            f"{memory_fraction_name()}={_HIGH_FRACTION}",
            gain,
            f"nothing; JAX takes {fraction:.0%} of a card otherwise",
        )


def _frozen_dtype(situation: Situation) -> Iterator[Advice]:
    config = situation.config
    if config.train.frozen_dtype == "float32":
        quantized = config.lora.quantization != "none"
        saves = (situation.arguments.frozen - quantized * _kept_decoder(situation, config)) // 2
        yield Advice("--config.train.frozen_dtype=bfloat16", saves, "nothing if the computation is bfloat16")


def _zero(situation: Situation) -> Iterator[Advice]:
    stage, sizes = situation.config.sharding.zero, situation.arguments
    whole = {1: sizes.parameters + sizes.frozen + sizes.gradients, 2: sizes.parameters + sizes.frozen, 3: 0}[
        stage
    ]
    yield Advice(
        "--config.sharding.zero=3",
        whole - whole // situation.fsdp,
        "parameters are gathered in every layer, in both passes",
    )


def _shard_more(situation: Situation) -> Iterator[Advice]:
    mesh = situation.config.mesh
    copies = situation.num_devices // (mesh.fsdp * mesh.tensor) if mesh.data == -1 else mesh.data
    if copies > 1:
        sizes = situation.arguments
        state = sizes.parameters + sizes.gradients + sizes.moments + sizes.frozen
        yield Advice(
            "--config.mesh.data=1 --config.mesh.fsdp=-1",
            state - state // copies,
            "parameters are gathered over more devices",
        )


def _accumulate(situation: Situation) -> Iterator[Advice]:
    config, rows = situation.config, situation.rows
    splits = [parts for parts in range(2, rows + 1) if rows % parts == 0]
    if not splits:
        return
    # The sum of the gradients is kept beside those of a microbatch.
    sums = situation.arguments.gradients if config.train.accumulation_steps == 1 else 0
    by_rows = max(0, situation.activations - gathered_bytes(config))
    saves = {parts: int(by_rows * (1 - 1 / parts)) - sums for parts in splits}
    parts = next((parts for parts in splits if saves[parts] > situation.missing), splits[-1])
    steps = config.train.accumulation_steps * parts
    price = "smaller matrix products"
    if situation.num_devices > 1:
        price += f", and parameters are gathered {steps} times per step"
    yield Advice(f"--config.train.accumulation_steps={steps}", saves[parts], price)


def _recompute(situation: Situation) -> Iterator[Advice]:
    config = situation.config
    heavier = ("minimal", "dots", "full")
    policies = {"none": heavier, "minimal": heavier[1:], "dots": heavier[2:]}.get(config.train.remat, ())
    for policy in policies:
        train = dataclasses.replace(config.train, remat=policy)
        other = dataclasses.replace(config, train=train)
        saves = saved_bytes(config, situation.rows, situation.length) - saved_bytes(
            other, situation.rows, situation.length
        )
        price = {
            "minimal": "elementwise work is done twice",
            "dots": "attention too is done twice",
            "full": "a third more FLOPs than the model's",
        }[policy]
        yield Advice(f"--config.train.remat={policy}", saves, price)


def _shorter_rows(situation: Situation) -> Iterator[Advice]:
    data, train = situation.config.data, situation.config.train
    if data.packing and situation.rows == 1 and situation.length // 2 >= data.max_length:
        by_rows = max(0, situation.activations - gathered_bytes(situation.config))
        sums = situation.arguments.gradients if train.accumulation_steps == 1 else 0
        yield Advice(
            f"--config.data.row_length={situation.length // 2} --config.data.batch_size={2 * data.batch_size} "
            f"--config.train.accumulation_steps={2 * train.accumulation_steps}",
            by_rows // 2 - sums,
            "as accumulation, and a little more padding",
        )


def _quantize(situation: Situation) -> Iterator[Advice]:
    config = situation.config
    if config.tune.language_model != "lora":
        return
    prices = {"int8": "frozen weights in 8 bits", "nf4": "frozen weights in 4 bits, further from the model's"}
    for method in {"none": ("int8", "nf4"), "int8": ("nf4",)}.get(config.lora.quantization, ()):
        if method == "nf4" and any(D % NF4_BLOCK for D, _ in decoder_kernels(config.model.text).values()):
            continue
        lora = dataclasses.replace(config.lora, quantization=method, double_quantization=True)
        other = dataclasses.replace(config, lora=lora)
        saves = _kept_decoder(situation, config) - _kept_decoder(situation, other)
        yield Advice(
            f"--config.lora.quantization={method}", saves, f"{prices[method]}, unpacked in every layer"
        )


def _kept_decoder(situation: Situation, config: Config) -> int:
    """Bytes per device of the decoder's layers, where they are frozen, as this config would keep them."""
    if config.lora.quantization == "none":
        train = dataclasses.replace(config.train, dtype=config.train.frozen_dtype)
        config = dataclasses.replace(config, train=train)
    text = config.model.text
    whole = text.num_hidden_layers * sum(
        kernel_bytes(config, shape) for shape in decoder_kernels(text).values()
    )
    shards = situation.num_devices // situation.num_row_shards
    return whole // (shards * situation.fsdp if config.sharding.zero == 3 else shards)


def _tensor(situation: Situation) -> Iterator[Advice]:
    config = situation.config
    tensor = 2 * situation.num_devices // situation.num_row_shards
    text, vision = config.model.text, config.model.vision
    split = (text.num_key_value_heads, vision.num_attention_heads, text.vocab_size, text.intermediate_size)
    steps = 2 * config.train.accumulation_steps
    if situation.num_row_shards % 2 or any(size % tensor for size in split) or config.data.batch_size % steps:
        return
    inner = max(0, situation.activations - saved_bytes(config, situation.rows, situation.length))
    sums = situation.arguments.gradients if config.train.accumulation_steps == 1 else 0
    yield Advice(
        f"--config.mesh.tensor={tensor} --config.train.accumulation_steps={steps}",
        inner // 2 - sums,
        "devices exchange activations in every layer",
    )


def _more_devices(situation: Situation) -> Iterator[Advice]:
    sizes = situation.arguments
    state = sizes.parameters + sizes.gradients + sizes.moments + sizes.frozen
    by_rows = max(0, situation.activations - gathered_bytes(situation.config))

    def saves(factor: int) -> int:
        fewer_rows = 1 - 1 / factor if situation.rows % factor == 0 else 0
        return int(state * (1 - 1 / factor) + by_rows * fewer_rows)

    factors = (2, 4, 8, 16)
    factor = next((factor for factor in factors if saves(factor) > situation.missing), factors[-1])
    yield Advice(
        f"{factor * situation.num_devices} devices instead of {situation.num_devices}",
        saves(factor),
        f"{factor} times the devices",
    )
