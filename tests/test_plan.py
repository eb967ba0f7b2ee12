"""What a plan says: memory by arithmetic and by the compiler, collectives, rows, advice, and the command itself."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llava_jax import trainer
from llava_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.data import pipeline
from llava_jax.errors import OutOfMemoryError
from llava_jax.kernels import products_cpu
from llava_jax.models.lora import dropout_keys
from llava_jax.planning import targets
from llava_jax.planning.activations import gathered_bytes, saved_bytes
from llava_jax.planning.advice import Situation, advise
from llava_jax.planning.collectives import Traffic, read_collectives
from llava_jax.planning.compilation import Compiled, needed_bytes
from llava_jax.planning.memory import Arguments, arguments
from llava_jax.planning.remat import settle
from llava_jax.planning.search import flags, plan_lightest, search
from llava_jax.planning.stage_plan import StagePlan, make_plan
from llava_jax.planning.workload import PACKED_SAMPLES_PER_ROW, Given, assume, find_workload
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.sharding import make_mesh
from llava_jax.step import bind

ROOT = Path(__file__).parent.parent
GIB = 2**30

# As TPU's compiler writes it: a gather spread over two fusions of a loop, whose length is in its condition.
TPU_HLO = """\
HloModule jit_step, is_scheduled=true

%start (param_0: bf16[1,64,256]) -> (bf16[1,64,256], bf16[1,512,256]) {
  %param_0 = bf16[1,64,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,512,256]{2,1,0} all-gather(%param_0), channel_id=83, frontend_attributes={chain_id="7"}
  ROOT %custom-call.78 = (bf16[1,64,256]{2,1,0}, bf16[1,512,256]{2,1,0}) custom-call(%all-gather.1)
}

%done (param_0.1: bf16[1,64,256]) -> bf16[1,512,256] {
  %param_0.1 = bf16[1,64,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,512,256]{2,1,0} all-gather(%param_0.1), channel_id=83, frontend_attributes={chain_id="7"}
}

%body (p: (s32[], bf16[1,64,256])) -> (s32[], bf16[1,64,256]) {
  %p = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %f1 = (bf16[1,64,256]{2,1,0}, bf16[1,512,256]{2,1,0}) fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[1,512,256]{2,1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %t = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) tuple(%p, %x)
}

%condition (q: (s32[], bf16[1,64,256])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(32)
  %q = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

%chunk (r: (s32[], s32[], f32[64,512])) -> (s32[], s32[], f32[64,512]) {
  %r = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %g = f32[64,512]{1,0:T(8,128)} get-tuple-element(%r), index=2
  %all-reduce.9 = f32[64,512]{1,0:T(8,128)} all-reduce(%g), channel_id=16, to_apply=%add
  ROOT %t.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) tuple(%r, %r, %all-reduce.9)
}

%more (s: (s32[], s32[], f32[64,512])) -> pred[] {
  %s = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} get-tuple-element(%s), index=1
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: bf16[1,64,256], b: f32[64,512]) -> f32[64,512] {
  %a = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,512]{1,0:T(8,128)} parameter(1)
  %w = (s32[]{:T(128)}, bf16[1,64,256]{2,1,0:T(8,128)(2,1)}) while(%a), condition=%condition, body=%body
  %v = (s32[]{:T(128)}, s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}) while(%b), condition=%more, body=%chunk
  ROOT %out = f32[64,512]{1,0:T(8,128)} get-tuple-element(%v), index=2
}
"""
# As TPU's compiler writes the sums of gradients that shard_map asks for: all of them on channel 1.
SUMS_HLO = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.7 (p.1: bf16[512,512]) -> bf16[128,512] {
  %p.1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.50 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%p.1), channel_id=1, to_apply=%add
  ROOT %slice.1 = bf16[128,512]{1,0:T(8,128)(2,1)} slice(%all-reduce.50), slice={[0:128], [0:512]}
}

%all-reduce-scatter.8 (p.2: bf16[512,512]) -> bf16[128,512] {
  %p.2 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.51 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%p.2), channel_id=1, to_apply=%add
  ROOT %slice.2 = bf16[128,512]{1,0:T(8,128)(2,1)} slice(%all-reduce.51), slice={[0:128], [0:512]}
}

ENTRY %main (a: bf16[512,512], b: bf16[512,512]) -> bf16[128,512] {
  %a = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %f = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.7
  %all-reduce.52 = bf16[128,512]{1,0:T(8,128)(2,1)} all-reduce(%f), channel_id=1, to_apply=%add
  %g = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.8
  ROOT %sum = bf16[128,512]{1,0:T(8,128)(2,1)} add(%all-reduce.52, %g)
}
"""
# As the GPU compiler writes it.
GPU_HLO = """\
HloModule jit_step

%layer (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %g = f32[1024]{0} get-tuple-element(%p), index=1
  %rs = ((f32[1024]{0}), f32[128]{0}) reduce-scatter-start(%g), channel_id=4, dimensions={0}, to_apply=%add
  %rsd = f32[128]{0} reduce-scatter-done(%rs)
  %ag = (f32[128]{0}, f32[1024]{0}) all-gather-start(%rsd), channel_id=5, dimensions={0}
  %agd = f32[1024]{0} all-gather-done(%ag)
  %ar = f32[1024]{0} all-reduce-start(%agd), channel_id=6, to_apply=%add
  ROOT %t = (s32[], f32[1024]{0}) tuple(%p, %agd)
}

%less (q: (s32[], f32[1024])) -> pred[] {
  %q = (s32[], f32[1024]{0}) parameter(0)
  ROOT %fused = pred[] fusion(%q), kind=kLoop, calls=%compare
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %w = (s32[], f32[1024]{0}) while(%a), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %out = f32[1024]{0} get-tuple-element(%w), index=1
}
"""


def test_tpu_collectives_are_counted_once_per_turn_of_their_loop():
    traffic, num_uncertain = read_collectives(TPU_HLO)
    assert traffic == {
        "all-gather": Traffic(32, 32 * 512 * 256 * 2),
        "all-reduce": Traffic(1, 64 * 512 * 4),
    }
    assert num_uncertain == 1  # nobody but the data knows how often the second loop turns


def test_gpu_collectives_count_what_is_whole_before_or_after():
    traffic, num_uncertain = read_collectives(GPU_HLO)
    assert traffic == {kind: Traffic(7, 7 * 4096) for kind in ("all-gather", "all-reduce", "reduce-scatter")}
    assert num_uncertain == 0


def test_sums_on_one_channel_are_counted_one_by_one():
    traffic, num_uncertain = read_collectives(SUMS_HLO)
    assert traffic == {"all-reduce": Traffic(3, (512 + 512 + 128) * 512 * 2)}
    assert num_uncertain == 0


def test_collectives_of_a_program_compiled_here_are_those_that_were_asked_for():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    axis = mesh.axis_names[1]
    rows = jax.NamedSharding(mesh, jax.P(axis))

    def sums(x):
        def add(i, total):
            first = jax.lax.psum(x * i, axis)
            return total + first + jax.lax.psum(jax.numpy.sin(first[:, :3]), axis).sum()

        return jax.lax.fori_loop(0, 5, add, jax.numpy.zeros_like(x))

    f = jax.shard_map(sums, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    hlo = jax.jit(f).lower(jax.ShapeDtypeStruct((8, 32), "float32", sharding=rows)).compile().as_text()
    assert hlo.count(" all-reduce(") == hlo.count("channel_id=1,") == 2
    assert read_collectives(hlo) == ({"all-reduce": Traffic(2 * 5, 5 * (32 + 3) * 4)}, 0)


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


@pytest.fixture
def here() -> targets.Target:
    return targets.Target("here", jax.devices(), "cpu", None, None)


def test_the_plan_of_these_devices_is_of_the_step_that_trains_here(tiny_config, here):
    config = dataclasses.replace(tiny_config, mesh=MeshConfig())
    plan = make_plan(config, here, find_workload(config, Given()))
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh, 4)
    shapes = (
        program.abstract_state(),
        program.abstract_frozen(),
        program.abstract_batch(plan.workload.length, plan.workload.num_images),
    )
    stats = program.train_step().lower(*shapes).compile().memory_analysis()
    assert plan.arguments.total == pytest.approx(stats.argument_size_in_bytes, abs=64)  # the counter of steps
    assert plan.compiled.peak == stats.peak_memory_in_bytes > plan.arguments.total
    assert plan.collectives["all-gather"].num_bytes > plan.arguments.parameters
    told = plan.to_json()
    assert told["fits"] is None and told["hbm_gib"] is None
    assert told["peak_gib"] >= told["parameters_gib"] + told["moments_gib"]
    assert told["at_mfu"]["0.5"]["step_seconds"] is None
    json.dumps(told)


def test_rows_are_those_of_the_data_where_it_is_there(tiny_config):
    workload = find_workload(tiny_config, Given())
    assert workload.source.startswith("measured: the largest of ")
    assert (workload.length, workload.num_images) == (128, 1)
    assert workload.epoch.images == 13 * 8  # 99 samples in full batches, of which some have no image
    assert workload.row.pairs == 128 * 129 / 2
    told = find_workload(tiny_config, Given(tokens=100, images=3, samples=10))
    assert (told.length, told.num_images, told.source) == (128, 4, "as told")  # as batches round them
    assert told.epoch.tokens == 1280


def test_rows_are_assumed_where_data_or_tokenizer_is_missing(tiny_config):
    absent = dataclasses.replace(tiny_config.data, path="nowhere.json")
    workload = find_workload(dataclasses.replace(tiny_config, data=absent), Given())
    assert workload.source == "assumed, for nowhere.json is not here"
    assert (workload.length, workload.num_images, workload.epoch) == (192, 1, None)
    no_tokenizer = dataclasses.replace(tiny_config, init=dataclasses.replace(tiny_config.init, tokenizer=""))
    assert "tokenizer (not named) is not here" in find_workload(no_tokenizer, Given()).source


def test_assumed_packed_rows_hold_as_many_samples_as_llavas_mix_fits_in():
    config = Config(data=DataConfig(packing=True, batch_size=16))
    workload = assume(config, Given(samples=664_000), "")
    assert (workload.length, workload.num_images) == (8192, 10)
    assert workload.epoch.tokens == pytest.approx(664_000 * 862)
    assert PACKED_SAMPLES_PER_ROW == pipeline._ROW_LENGTHS


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


def test_rows_that_cannot_be_spread_are_refused_with_what_would_do(here):
    config = Config(data=DataConfig(batch_size=4))
    with pytest.raises(
        ConfigError, match=r"4 rows cannot be spread evenly over 8 devices.*--config\.mesh\.tensor=2"
    ):
        make_plan(config, here, assume(config, Given(), ""))


def test_a_missing_cudnn_is_answered_with_what_would_do(here, monkeypatch):
    def train_step(program):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(Program, "train_step", train_step)
    config = Config(data=DataConfig(batch_size=8))
    with pytest.raises(ConfigError, match=r"--config\.train\.attention=xla.*with-cuda"):
        make_plan(config, here, assume(config, Given(), ""))


@pytest.fixture
def planning_without_compiling(monkeypatch):
    """Plans whose steps need so many GiB per row and device beside 2 for the state."""
    needs = {"none": 5, "minimal": 4, "dots": 3, "full": 2, "offload": 2}

    def make_plan(config, target, workload):
        rows = config.data.batch_size // 8 // config.train.accumulation_steps
        peak = (2 + needs[config.train.remat] * rows) * GIB
        compiled = Compiled(peak, target.hbm_bytes and peak <= target.hbm_bytes, 0, "")
        return StagePlan(config, target, make_mesh(config.mesh), workload, None, compiled, {}, 0, {})

    monkeypatch.setattr("llava_jax.planning.search.make_plan", make_plan)


@pytest.mark.parametrize("offloads", [False, True])
def test_search_takes_the_most_rows_that_fit_for_each_rematerialisation(
    here, planning_without_compiling, monkeypatch, offloads
):
    monkeypatch.setattr("llava_jax.planning.search.can_offload", lambda device: offloads)
    tried = []
    config = Config(data=DataConfig(batch_size=32, max_length=1024))  # 4 rows per device at most
    workload = assume(config, Given(tokens=256), "")
    target = dataclasses.replace(here, hbm_bytes=int(13.4 * GIB))
    found = search(config, target, workload, tried.append)
    with_offload = [("offload", 4)] if offloads else []
    assert [(plan.config.train.remat, plan.rows_per_device) for plan in found] == [
        ("none", 2),
        ("minimal", 2),
        ("dots", 2),
        ("full", 4),
        *with_offload,
    ]
    # 9.5 GiB of arguments leave no room for what "none" keeps of 4 rows, so that was not compiled.
    assert [(plan.config.train.remat, plan.rows_per_device) for plan in tried] == [
        ("none", 2),
        ("minimal", 4),
        ("minimal", 2),
        ("dots", 4),
        ("dots", 2),
        ("full", 4),
        *with_offload,
    ]
    assert flags(found[0]) == "--config.train.remat=none --config.train.accumulation_steps=2"
    assert search(config, dataclasses.replace(here, hbm_bytes=GIB), workload, tried.append) == []


@pytest.mark.parametrize(
    ("hbm_gib", "remat", "how"),
    [
        (
            22,  # of which "none" would take all
            "minimal",
            "train.remat=auto: minimal (none needs 22.00, minimal needs 18.00; 95% of 22.00 GiB may be taken)",
        ),
        (
            10,
            "full",
            "train.remat=auto: full (none needs 22.00, minimal needs 18.00, dots needs 14.00; 95% of 10.00 GiB may be "
            "taken)",
        ),
        (
            None,
            "full",
            "train.remat=auto: full, for these devices do not tell how much memory they have",
        ),
    ],
)
def test_auto_is_planned_as_the_lightest_rematerialisation_that_fits(
    here, planning_without_compiling, hbm_gib, remat, how
):
    config = Config(data=DataConfig(batch_size=32), train=TrainConfig(remat="auto"))
    target = dataclasses.replace(here, hbm_bytes=hbm_gib and hbm_gib * GIB)
    told = []
    plan = plan_lightest(config, target, assume(config, Given(), ""), told.append)
    assert (plan.config.train.remat, told) == (remat, [how])


def test_a_run_takes_the_lightest_rematerialisation_that_fits_and_keeps_to_it(
    tiny_recipe, tmp_path, monkeypatch, capsys
):
    compiled = []

    def compile_step(program, target, length, num_images, *, argument_bytes):
        compiled.append((program.config.train.remat, program.num_steps, length, num_images))
        return Compiled(
            argument_bytes + {"none": 200, "minimal": 80}[program.config.train.remat], None, 0, ""
        )

    def limit(name):
        return dataclasses.replace(targets.find(name), hbm_bytes=10**9)

    monkeypatch.setattr("llava_jax.planning.remat.compile_step", compile_step)
    monkeypatch.setattr("llava_jax.planning.remat.find", limit)
    tiny_recipe.train.remat, tiny_recipe.mesh.fsdp = "auto", -1
    monkeypatch.setattr("llava_jax.planning.remat.USABLE", 1e-9 * (bytes_of_arguments(tiny_recipe) + 100))
    tiny_recipe.train.max_steps = 1
    trainer.run(parse(tiny_recipe), tmp_path / "run")
    expected = [("none", 1, 128, 1), ("minimal", 1, 128, 1)]
    assert compiled == expected
    assert "tiny: train.remat=auto: minimal (none needs 0.00, minimal needs 0.00; " in capsys.readouterr().out
    record = json.loads((tmp_path / "run/remat.json").read_text())
    assert record[""]["remat"] == "minimal" and record[""]["hbm_gib"] == 10**9 / GIB
    assert json.loads((tmp_path / "run/config.json").read_text())["stages"][""]["train"]["remat"] == "auto"

    trainer.run(parse(tiny_recipe), tmp_path / "run")  # all is done, and nothing compiled
    assert "tiny: train.remat=auto: minimal, as before" in capsys.readouterr().out
    assert compiled == expected
    tiny_recipe.train.scan_unroll = 2  # another step, which may need more
    trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert compiled == 2 * expected


def bytes_of_arguments(recipe) -> int:
    config = parse(recipe).last
    return arguments(Program(config, make_mesh(config.mesh), 4), 128, 1).total


def test_where_devices_do_not_tell_their_memory_auto_is_full(tiny_config, tmp_path, capsys):
    config = dataclasses.replace(tiny_config, mesh=MeshConfig(), train=TrainConfig(remat="auto"))
    record = tmp_path / "remat.json"
    mesh = make_mesh(config.mesh)
    settled = settle(config, mesh, 4, (128, 1), stage="finetune", record=record, continues=False)
    assert settled == dataclasses.replace(config, train=TrainConfig(remat="full"))
    assert capsys.readouterr().out.startswith(
        "finetune: train.remat=auto: full, for these devices do not tell"
    )
    assert json.loads(record.read_text())["finetune"]["remat"] == "full"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"--topology=v5e: write v5e:AxB, in chips, .*\. Examples"),
        ("v5p:4x4", "write v5p:AxBxC"),
        ("h100:8x8", "write h100:COUNT, in chips, and NUMBERx before it for several hosts"),
        ("0xv5e:2x2", "write v5e:AxB, in chips, and NUMBERx before it for several slices"),
        ("2xv5e", "write v5e:AxB"),
        ("twoxv5e:2x2", "'twoxv5e' is not one of"),
        ("v5litepod-16", "'v5litepod-16' is not one of v4, v5e"),
    ],
)
def test_topologies_that_say_nothing_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        targets.prepare(name)


@pytest.mark.parametrize(("name", "command"), [("v5e:8x8", r"'\.\[plan\]'"), ("h200:1", "jax-cuda13-plugin")])
def test_a_missing_compiler_is_answered_with_how_to_install_it(name, command, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"not installed: pip install .*{command}"):
        targets.prepare(name)


def run(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_the_first_line_waits_for_no_jax():
    result = run(
        "-c", "import llava_jax.plan, llava_jax.planning.targets, sys; assert 'jax' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_a_stage_that_is_not_there_is_refused():
    result = run(
        "-m", "llava_jax.plan", "--config=configs/quickstart.py", "--topology=here", "--stage=finetun"
    )
    assert result.returncode == 10
    assert "the stages of this recipe are towers, pretrain, finetune." in result.stderr


SMALL = """
from llava_jax.recipe import default_config

def get_config():
    config = default_config()
    config.model.vision.update(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=112)
    config.model.text.update(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=128)
    config.data.max_length = 256
    config.data.batch_size = 4
    return config
"""


@pytest.fixture
def small(tmp_path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return f"--config={tmp_path / 'small.py'}"


def plan(*arguments: str, timeout: int = 300) -> tuple[subprocess.CompletedProcess, dict]:
    result = run("-m", "llava_jax.plan", *arguments, "--json", timeout=timeout)
    assert result.stdout, result.stderr
    lines = result.stdout.splitlines()
    return result, json.loads(lines[-1]) if lines[-1].startswith("{") else {}


@pytest.mark.skipif(
    not targets.importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)
def test_tpus_compiler_takes_the_step_with_its_kernels(small):
    result, told = plan(small, "--topology=v5e:2x2", "--samples=1000")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("llava_jax: planning recipe llava for v5e:2x2")
    assert lines[1] == "4 x TPU v5 lite, 15.75 GiB each, 197 TFLOP/s bfloat16"
    assert told["fits"] is True and told["hbm_gib"] == 15.75 and told["num_devices"] == 4
    assert 0 < told["parameters_gib"] + told["moments_gib"] < told["peak_gib"] < 15.75
    assert told["collectives"]["all-gather"]["count"] > 2
    assert told["at_mfu"]["0.5"]["hours_per_epoch"] > 0


@pytest.mark.skipif(
    not targets.importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)
def test_a_step_that_does_not_fit_ends_with_16_and_advice(small):
    result, told = plan(
        small, "--topology=v5e:1x1", "--config.data.batch_size=8192", "--config.train.remat=none"
    )
    assert result.returncode == 16, result.stderr
    assert "does not fit v5e:1x1" in result.stderr and "Traceback" not in result.stderr
    assert told["fits"] is False and told["peak_gib"] > 15.75
    assert {"--config.train.remat=full"} <= {advice["change"] for advice in told["advice"]}
    result, _ = plan(small, "--topology=v5e:3x3")
    assert result.returncode == 10
    assert "libtpu knows no such slice" in result.stderr


@pytest.mark.skipif(
    not targets.importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)
def test_slices_hold_a_copy_of_the_model_each(small):
    result, _ = plan(small, "--topology=2xv5e:2x2")
    assert result.returncode == 10
    assert result.stdout.splitlines()[1] == "8 x TPU v5 lite, 15.75 GiB each, 197 TFLOP/s bfloat16"
    assert "mesh.data=1 cannot span 2 TPU slices" in result.stderr
    assert "set mesh.data to 2, 4 or 8" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not targets.importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)
def test_between_slices_gradients_are_sent(small):
    result, told = plan(small, "--topology=2xv5e:2x2", "--config.mesh.data=2", "--config.data.batch_size=8")
    assert result.returncode == 0, result.stderr
    assert told["mesh"]["data"] == 2 and told["num_devices"] == 8
    # What trains, a quarter on each chip of a slice, in bfloat16 or float32.
    assert told["parameters_gib"] / 2 < told["collectives"]["send"]["gib"] < 3 * told["parameters_gib"]


@pytest.mark.slow
@pytest.mark.skipif(
    not targets.importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)
def test_tpus_compiler_takes_every_rematerialisation(small):
    result, told = plan(small, "--topology=v5e:2x2", "--search", "--config.data.batch_size=8", timeout=1500)
    assert result.returncode == 0, result.stderr
    tried = [line.split() for line in result.stdout.splitlines() if line.startswith("  remat ")]
    assert [words[1] for words in tried] == ["none", "minimal", "dots", "full", "offload"]
    assert {words[8] for words in tried} == {"fits"}
    assert told["remat"] == "none" and told["rows_per_device"] == 2


def test_running_out_of_memory_is_answered_with_what_takes_it_and_what_helps(
    tiny_recipe, tmp_path, monkeypatch
):
    def train_stage(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
        )

    tiny_recipe.data.batch_size, tiny_recipe.mesh.fsdp = 64, -1
    monkeypatch.setattr("llava_jax.trainer.train_stage", train_stage)
    monkeypatch.setattr("llava_jax.planning.advice._WORTH_TELLING", 1)  # everything is small here
    with pytest.raises(
        OutOfMemoryError, match=r"allocate 17179869184 bytes(.|\n)*parameters that train"
    ) as raised:
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert raised.value.exit_code == 16
    assert "--config.train.accumulation_steps=2" in str(raised.value)
    assert "rows of 128 tokens and 1 image slots" in str(raised.value)
