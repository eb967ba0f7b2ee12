"""What a plan says of a step: rows, what fits, the search for what would, refusals, and the command itself."""

import dataclasses
import json
import math
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
    MeshConfig,
    TrainConfig,
)
from llava_jax.data import pipeline
from llava_jax.errors import OutOfMemoryError
from llava_jax.planning import targets
from llava_jax.planning.compilation import Compiled
from llava_jax.planning.memory import arguments
from llava_jax.planning.remat import settle
from llava_jax.planning.search import flags, plan_lightest, search
from llava_jax.planning.stage_plan import StagePlan, make_plan
from llava_jax.planning.workload import PACKED_SAMPLES_PER_ROW, Given, assume, find_workload
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
GIB = 2**30


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
    unread = shapes[2]["segment_ids"]  # of rows with one sample
    unread = unread.dtype.itemsize * math.prod(unread.sharding.shard_shape(unread.shape))
    read = plan.arguments.total - unread
    assert read == pytest.approx(stats.argument_size_in_bytes, abs=64)  # the counter of steps
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
    record.write_text('{"finetune": {"remat": "none"}}')  # no whole record
    mesh = make_mesh(config.mesh)
    settled = settle(config, mesh, 4, (128, 1), stage="finetune", record=record, continues=True)
    assert settled == dataclasses.replace(config, train=TrainConfig(remat="full"))
    told = capsys.readouterr()
    assert told.out.startswith("finetune: train.remat=auto: full, for these devices do not tell")
    assert "remat.json cannot be read (KeyError('needed_gib')); train.remat=auto is chosen anew" in told.err
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
