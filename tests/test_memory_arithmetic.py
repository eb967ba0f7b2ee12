"""What a step keeps, gathers and needs, by arithmetic, beside what jax keeps; and the advice that follows."""

from types import SimpleNamespace

import jax
import pytest

from llava_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.kernels import products_cpu
from llava_jax.models.lora import dropout_keys
from llava_jax.planning.activations import gathered_bytes, saved_bytes
from llava_jax.planning.advice import Advice, Situation, advise
from llava_jax.planning.compilation import needed_bytes
from llava_jax.planning.memory import Arguments, arguments
from llava_jax.planning.report import _advice
from llava_jax.program import Program
from llava_jax.sharding import make_mesh
from llava_jax.step import bind

GIB = 2**30


def situation(peak: float, **sections) -> Situation:
    """A step on eight devices of 16 GiB; sizes in GiB."""
    config = Config(**sections)
    sizes = Arguments(*(int(size * GIB) for size in (3, 6, 1, 0, 3)))
    shards = 8 // max(1, config.mesh.tensor)
    return Situation(config, 2048, 8, shards, "tpu", sizes, int(peak * GIB), 16 * GIB)


def test_advice_comes_cheapest_first_and_says_what_it_brings():
    now = situation(
        40,
        train=TrainConfig(remat="none", frozen_dtype="float32"),
        mesh=MeshConfig(data=2),
        data=DataConfig(batch_size=32),
    )
    advice = advise(now)
    assert [each.change for each in advice] == [
        "--config.train.frozen_dtype=bfloat16",
        "--config.mesh.data=1 --config.mesh.fsdp=-1",
        "--config.train.accumulation_steps=4",
        "--config.train.remat=minimal",
        "--config.train.remat=dots",
        "--config.train.remat=full",
        "32 devices instead of 8",
    ]
    assert advice[0].saves == GIB // 2
    assert advice[1].saves == (3 + 3 + 6 + 1) * GIB / 2
    # 27 GiB of activations, of which 0.75 + 0.49 stay; three quarters of the rest go, and sums of gradients come.
    assert advice[2].saves == pytest.approx((27 - 1.24) * 0.75 * GIB - 3 * GIB, rel=0.01)
    # 4 rows x 2048 tokens x 32 layers, bfloat16: all but the input of (8 + 4) x 4096 + 6 x 11008.
    assert advice[5].saves == 4 * 2048 * 32 * 2 * (11 * 4096 + 6 * 11008)


def test_a_step_of_one_row_per_device_needs_more_devices_to_be_smaller():
    changes = [each.change for each in advise(situation(20, data=DataConfig(batch_size=8)))]
    assert changes == [
        "--config.mesh.tensor=2 --config.train.accumulation_steps=2",
        "16 devices instead of 8",
    ]


def test_it_is_said_when_no_advice_suffices():
    plan = SimpleNamespace(
        config=Config(),
        target=SimpleNamespace(hbm_bytes=4 * GIB),
        compiled=SimpleNamespace(peak=10 * GIB),
        advice=[Advice("a", 5 * GIB, "b"), Advice("c", GIB, "d")],
    )
    *_, last = _advice(plan).splitlines()
    assert last.startswith("  None of these suffices alone. LoRA")
    plan.target.hbm_bytes = 5 * GIB
    assert "suffices" not in _advice(plan)


def lora(quantization: str, **train) -> dict:
    return dict(
        tune=TuneConfig(language_model="lora"),
        lora=LoraConfig(quantization=quantization),
        train=TrainConfig(**train),
        data=DataConfig(batch_size=8),
    )


def test_a_run_by_lora_is_told_what_fewer_bits_would_bring():
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    int8 = kernels + 4 * outputs
    nf4 = kernels // 2 + kernels // 64 + 4 * outputs + 4 * 7 * 32
    *_, first, second, tensor, _ = advise(situation(20, **lora("none")))
    assert first.change == "--config.lora.quantization=int8"
    assert first.saves == pytest.approx((2 * kernels - int8) / 8, abs=8)
    assert second.change == "--config.lora.quantization=nf4"
    assert second.saves == pytest.approx((2 * kernels - nf4) / 8, abs=8)
    assert tensor.change.startswith("--config.mesh.tensor=2 ")
    changes = [each.change for each in advise(situation(20, **lora("int8")))]
    assert [change for change in changes if "quantization" in change] == ["--config.lora.quantization=nf4"]
    assert not any("quantization" in each.change for each in advise(situation(20, **lora("nf4"))))
    # float32 of the frozen 1 GiB is what is not in 4 bits.
    in_float32 = advise(situation(20, **lora("nf4", frozen_dtype="float32")))[0]
    assert in_float32.change == "--config.train.frozen_dtype=bfloat16"
    assert in_float32.saves == pytest.approx((GIB - nf4 / 8) / 2, abs=8)


@pytest.mark.parametrize("remat", ["full", "dots", "minimal", "none"])
@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_what_is_kept_for_the_backward_pass_is_what_jax_keeps(mode, remat, monkeypatch):
    monkeypatch.setattr(products_cpu, "dot_general", jax.lax.dot_general)  # as other platforms have it
    L, B, T = 3, 5, 160
    text = TextConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    vision = VisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=28
    )
    config = Config(
        model=ModelConfig(vision, text),
        tune=TuneConfig(language_model=mode),
        lora=LoraConfig(rank=6) if mode == "lora" else LoraConfig(),
        train=TrainConfig(remat=remat, attention="reference"),
        data=DataConfig(batch_size=B, max_length=T),
    )
    kept = 0
    for leaf in kept_for_the_backward_pass(config, T):
        _, _, *rest = leaf.shape if leaf.shape[:2] == (L, B) else (0, 0, 0)
        scores = rest.count(T) == 2 or rest[-1] in (0, 1)  # kernels keep none, and norms one number per token
        kept += 0 if scores else leaf.size * leaf.dtype.itemsize
    # Kernels need attention's output for its own gradient, whether or not that of the matrix after it is asked for.
    unneeded = (mode, remat) in [("frozen", "minimal"), ("frozen", "none"), ("lora", "none")]
    assert saved_bytes(config, B, T) == kept + unneeded * L * B * T * 4 * 16 * 2


def kept_for_the_backward_pass(config: Config, length: int) -> list[jax.ShapeDtypeStruct]:
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]), 1)
    graphdef, _, keys = program._model

    def pull_back(trainable, frozen, batch):
        def loss(trainable):
            parameters = trainable | frozen | dropout_keys(keys, jax.random.key(0))
            hidden = bind(graphdef, parameters)(
                batch["tokens"], batch["images"], batch["positions"], batch["segment_ids"]
            )
            return hidden.astype("float32").sum()

        return jax.vjp(loss, trainable)[1]

    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for name, leaf in program.abstract_batch(length, 1).items()
    }
    return jax.tree.leaves(
        jax.eval_shape(pull_back, program.abstract_trainable(), program.abstract_frozen(), batch)
    )


def test_quantised_matrices_are_gathered_as_they_are_kept():
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    scales = 4 * (4 * 4096 + 2 * 11008 + 4096)
    assert gathered_bytes(Config(**lora("none"))) == 2 * 2 * layer
    assert gathered_bytes(Config(**lora("int8"))) == 2 * (layer + scales) + 2 * 4096 * 11008
    assert gathered_bytes(Config()) == 2 * 2 * layer + 4 * 4096 * 32000


@pytest.mark.parametrize("language_model", ["full", "frozen"])
def test_state_per_device_falls_as_one_over_the_devices(language_model):
    config = Config(tune=TuneConfig(language_model=language_model))
    sizes = [
        arguments(Program(config, make_mesh(MeshConfig(), jax.devices()[:n]), 10), 2048, 1)
        for n in (1, 2, 4, 8)
    ]
    trained, total = (
        (6_759_407_616, 7_045_928_960) if language_model == "full" else (20_979_712, 7_045_928_960)
    )
    whole = sizes[0]
    assert whole.parameters == whole.gradients == pytest.approx(4 * trained, rel=2e-3)
    assert whole.moments == pytest.approx(2 * whole.parameters, abs=64)
    assert whole.frozen + whole.parameters / 2 == pytest.approx(2 * total, rel=2e-3)
    for n, size in zip((2, 4, 8), sizes[1:], strict=True):
        assert n * size.parameters == pytest.approx(whole.parameters, rel=1e-2)
        assert n * size.moments == pytest.approx(whole.moments, rel=1e-2)
        assert n * size.frozen == pytest.approx(whole.frozen, rel=1e-2)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.60G of "
            "15.75G hbm. Exceeded hbm capacity by 11.86G.",
            int(27.60 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (29.66G) exceeds "
            "available HBM (15.75G).",
            int(29.66 * GIB) + 1000,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.0M of 16.0M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_a_refused_program_would_need_is_read_from_the_compilers_message(message, expected):
    assert needed_bytes(message, argument_bytes=1000) == expected
