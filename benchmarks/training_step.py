"""A training step of LLaVA-1.5 on one device: its content, which others take too, and what ours needs of time and memory.

`python -m benchmarks.training_step ours|plan CASE [...]` measures in a process of its own, for `benchmarks/step_gpu.py`
and `lora_gpu.py`; CASE is a `Case` in JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.isolated import tell
from benchmarks.time_by_kind import profiled
from benchmarks.timing import conditions, practical_peak
from llava_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.flops import Work, causal_pairs, training_flops
from llava_jax.kernels.cross_entropy import IGNORE
from llava_jax.memory_peak import memory_peak
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.planning.chips import peak_flops
from llava_jax.program import Program
from llava_jax.sharding import make_mesh
from llava_jax.step import random_parameters
from llava_jax.tuning import LORA_A, LORA_B, kernel_name

GIB = 2**30
WARM_UP = 2  # steps before those that are timed
MODELS = {
    "7b": ModelConfig(),  # CLIP ViT-L/14 at 336 px and Vicuna-7B
    "tiny": ModelConfig(
        vision=VisionConfig(32, 48, 3, 2, 28, 7),
        text=TextConfig(512, 64, 128, 2, 4, 4, 16, max_position_embeddings=256),
    ),
}
TUNES = {
    "stage1": TuneConfig(language_model="frozen"),
    "stage2": TuneConfig(),
    "lora": TuneConfig(language_model="lora"),
    "qlora": TuneConfig(language_model="lora"),
}


@dataclasses.dataclass(frozen=True)
class Epoch:
    """All samples of a stage of LLaVA-1.5, each as long as the mean of them."""

    samples: int
    tokens: float  # of a sample
    images: float
    supervised: float

    @property
    def work(self) -> Work:
        return Work(self.tokens, causal_pairs(self.tokens), self.images, self.supervised) * self.samples


CAPTIONS = Epoch(558_128, 606, 1, 30)  # LLaVA-Pretrain: an image of 576 tokens and a caption of about 30
MIX = Epoch(665_298, 862, 0.94, 143)  # llava_v1_5_mix665k, as benchmarks/packing.py draws it
EPOCHS = {"stage1": CAPTIONS, "stage2": MIX, "lora": MIX, "qlora": MIX}


@dataclasses.dataclass(frozen=True)
class Case:
    """What trains, on what, and how ours runs it. A row holds `samples` samples of equal length, an image in each."""

    form: str = "stage2"  # of TUNES
    size: str = "7b"  # of MODELS
    rows: int = 8  # per step
    length: int = 2048  # tokens of a row
    samples: int = 2  # of a row
    rank: int = 128  # of adapters
    moments: str = "float32"
    remat: str = "full"
    attention: str = "auto"
    steps: int = 10  # that are timed

    @property
    def model(self) -> ModelConfig:
        return MODELS[self.size]

    @property
    def dtype(self) -> str:
        """Of the computation and of frozen parameters."""
        return "float32" if self.size == "tiny" else "bfloat16"

    @property
    def sample_length(self) -> int:
        return self.length // self.samples

    @property
    def lora(self) -> LoraConfig:
        if "lora" not in self.form:
            return LoraConfig()
        quantization = "nf4" if self.form == "qlora" else "none"
        # Tiny steps are compared with those of others, who draw other masks.
        return LoraConfig(
            rank=self.rank, dropout=0.0 if self.size == "tiny" else 0.05, quantization=quantization
        )

    @property
    def config(self) -> Config:
        """The settings with which training would run it."""
        rate = {"stage1": 1e-3, "stage2": 2e-5}.get(self.form, 2e-4)
        return Config(
            model=self.model,
            data=DataConfig(
                batch_size=self.rows, max_length=self.length, packing=True, row_length=self.length
            ),
            tune=TUNES[self.form],
            lora=self.lora,
            optimizer=OptimizerConfig(learning_rate=rate, schedule="constant", moment_dtype=self.moments),
            train=TrainConfig(
                dtype=self.dtype,
                frozen_dtype=self.dtype,
                remat=self.remat,
                attention=self.attention,
                compiled_dir="",
            ),
            mesh=MeshConfig(1, 1, 1),
        )

    @property
    def work(self) -> Work:
        """Of a step."""
        samples = self.rows * self.samples
        supervised = int((draw_samples(self)["labels"] != IGNORE).sum())
        pairs = samples * causal_pairs(self.sample_length)
        return Work(self.rows * self.length, pairs, samples, supervised)

    def flops(self, work: Work) -> float:
        """Model FLOPs of that much work."""
        return sum(training_flops(self.model, self.config.tune, work).values())


def draw_samples(case: Case) -> dict[str, np.ndarray]:
    """The content of a step: tokens and labels int32[N, T] of its samples, images uint8[N, H, W, 3].

    A sample is a first token, an image's placeholders, and text, whose second half is supervised.
    """
    generator = np.random.default_rng(0)
    num, length, features = case.rows * case.samples, case.sample_length, case.model.num_image_tokens
    assert length > features + 2, f"{case} leaves no room for text beside {features} tokens of an image."
    # The highest token is what transformers takes for its placeholder.
    tokens = generator.integers(case.model.text.vocab_size - 1, size=(num, length), dtype=np.int32)
    tokens[:, 1 : 1 + features] = IMAGE_TOKEN
    labels = tokens.copy()
    labels[:, : (length + features) // 2] = IGNORE
    side = case.model.vision.image_size
    images = generator.integers(256, size=(num, side, side, 3), dtype=np.uint8)
    return {"tokens": tokens, "labels": labels, "images": images}


def pack(samples: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    """The samples as a step of ours takes them: rows, with an axis of accumulation in front."""
    rows, length = case.rows, case.sample_length
    padding = case.length - case.samples * length
    fill = lambda x, value: np.pad(x.reshape(rows, -1), ((0, 0), (0, padding)), constant_values=value)
    each = np.ones((rows, case.samples, length), np.int32)
    batch = {
        "tokens": fill(samples["tokens"], 0),
        "labels": fill(samples["labels"], IGNORE),
        "positions": fill(each * np.arange(length, dtype=np.int32), 0),
        "segment_ids": fill(each * np.arange(1, case.samples + 1, dtype=np.int32)[:, None], 0),
        "images": samples["images"].reshape(rows, case.samples, *samples["images"].shape[1:]),
    }
    return {name: x[None] for name, x in batch.items()}


def draw_parameters(program: Program) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Trainable and frozen parameters: as the network draws them, adapters as PEFT does, codes of quantised kernels at
    random."""
    parts = program.abstract_trainable(), program.abstract_frozen()
    is_drawn = lambda name: not name.endswith((LORA_A, LORA_B)) and kernel_name(name) == name
    names = {name for part in parts for name in part if is_drawn(name)}

    def draw():
        drawn = random_parameters(program.config.model, program.config.seed, names)
        key = jax.random.key(program.config.seed)
        return tuple(
            {
                name: drawn[name].astype(leaf.dtype) if name in names else _draw_leaf(name, leaf, key)
                for name, leaf in part.items()
            }
            for part in parts
        )

    return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, parts))()


def _draw_leaf(name: str, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Of an adapter or a quantised kernel, whose values come out about as large as those of a drawn one."""
    kind = name.rpartition(".")[2]
    if kind == LORA_A:
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -1, 1) * leaf.shape[-2] ** -0.5
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jax.random.bits(key, leaf.shape, jnp.uint8).astype(leaf.dtype)
    value = {LORA_B: 0.0, "absmax_offset": 0.03, "absmax_scale": 1e-4}[kind]
    return jnp.full(leaf.shape, value, leaf.dtype)


def require_accelerator(size: str, platform: str) -> None:
    """Ends the process, with a reason, when a model of that size would run on a CPU."""
    if size != "tiny" and platform == "cpu":
        sys.exit(f"There is no accelerator here for a model of {size}; --size=tiny runs on a CPU.")


def measure_ours(case: Case, profile_directory: Path | None) -> None:
    """Tells the device's peaks and a row, and one of where the time goes if there is a directory for the trace."""
    device = jax.devices()[0]
    require_accelerator(case.size, device.platform)
    tiny = case.size == "tiny"
    practical = practical_peak(256 if tiny else 8192, rounds=5, calls=1 if tiny else 10)
    published = peak_flops(device.device_kind)
    tell(
        conditions=conditions()
        | {"practical_peak_tflops": practical, "peak_tflops": published and published / 1e12}
    )
    program = Program(case.config, make_mesh(case.config.mesh, [device]), num_steps=1000)
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_batch(case.length, case.samples))
    batch = jax.device_put(pack(draw_samples(case), case), shardings)
    trainable, frozen = draw_parameters(program)
    state = program.new_state(trainable)
    del trainable
    drawn = memory_peak()
    began = time.monotonic()
    step = program.train_step().lower(state, frozen, batch).compile()
    row = {
        "implementation": f"llava_jax, remat {case.remat}, {case.moments} moments",
        "compile_seconds": time.monotonic() - began,
        "before_steps": drawn,  # if the peak after them is the same, it is not theirs
        "compiled_gib": step.memory_analysis().peak_memory_in_bytes / GIB,
    }
    losses = []

    def run(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state, metrics = step(state, frozen, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)

    run(WARM_UP)
    began = time.monotonic()
    run(case.steps)
    row |= rated(case, (time.monotonic() - began) / case.steps)
    tell(**row, losses=[float(loss) for loss in losses], **memory_peak())
    if profile_directory:
        spent = profiled(lambda: run(2), 2, step.as_text(), profile_directory)
        tell(implementation=f"profile, remat {case.remat}", profile=spent)


def rated(case: Case, seconds: float) -> dict[str, float]:
    """Rates of a step that takes so long; of 7B also the hours of the stage's epoch, by its model FLOPs at the same
    FLOPs per second."""
    work, epoch = case.work, EPOCHS[case.form].work
    rates = {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": work.tokens / seconds,
        "samples_per_second": work.images / seconds,  # an image in each
        "tflops": case.flops(work) / seconds / 1e12,
    }
    if case.size == "7b":
        rates["epoch_hours"] = case.flops(epoch) / case.flops(work) * seconds / 3600
    return rates


def tell_plan(case: Case, topology: str) -> None:
    """Tells what `llava_jax.plan` would say of the step's memory on such a device, which need not be here."""
    from llava_jax.planning import targets
    from llava_jax.planning.compilation import compile_step
    from llava_jax.planning.memory import arguments

    targets.prepare(topology)
    target = targets.find(topology)
    program = Program(case.config, make_mesh(case.config.mesh, target.devices[:1]), num_steps=1000)
    sizes = arguments(program, case.length, case.samples)
    planned = compile_step(program, target, case.length, case.samples, argument_bytes=sizes.total)
    tell(
        implementation=f"plan for {topology}, remat {case.remat}, {case.moments} moments",
        planned_gib=planned.peak / GIB,
        arguments_gib=sizes.total / GIB,
        gradients_gib=sizes.gradients / GIB,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ours", "plan"))
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("--topology", default="here")
    parser.add_argument("--profile", type=Path, help="where a trace goes, whose time by kind is told")
    arguments = parser.parse_args()
    if arguments.what == "ours":
        measure_ours(arguments.case, arguments.profile)
    else:
        tell_plan(arguments.case, arguments.topology)


if __name__ == "__main__":
    main()
