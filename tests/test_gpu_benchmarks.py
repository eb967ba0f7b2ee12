"""The benchmarks for one GPU at toy sizes: that they run, agree with torch, and count what they say."""

import importlib
import io
import json
import sys
import time
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import (
    generate_gpu,
    isolated,
    lora_gpu,
    loss,
    one_card,
    step_gpu,
    time_by_kind,
    training_step,
    transformers_llava,
)
from benchmarks.isolated import Child
from benchmarks.training_step import EPOCHS, IGNORE, IMAGE_TOKEN, Case, draw_samples, pack, rated
from llava_jax.step import abstract_model, random_parameters

TINY = Case(size="tiny", rows=2, length=96, samples=3, rank=4, steps=1)


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """Several wait busily for cores that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn():
    names = set(abstract_model(TINY.model)[1])
    return jax.device_get(random_parameters(TINY.model, TINY.config.seed, names))


@pytest.fixture
def drawn_once(drawn, monkeypatch):
    """Everyone draws the same parameters; compiling that takes long."""

    def read(model, seed, names):
        assert (model, seed) == (TINY.model, TINY.config.seed)
        return {name: jnp.asarray(drawn[name]) for name in names}

    for module in (generate_gpu, training_step, transformers_llava):
        monkeypatch.setattr(module, "random_parameters", read)


@pytest.fixture
def run(drawn_once, monkeypatch, capsys):
    """run(benchmark, *arguments) -> what its JSON says. Its children run within this process, which is warm."""

    def rows_within(child: Child):
        module, *arguments = child.command
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        printed = io.StringIO()
        with redirect_stdout(printed):
            importlib.import_module(module).main()
        yield from (json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("{"))

    def run(benchmark, *arguments: str) -> dict:
        monkeypatch.setattr(isolated, "rows", rows_within)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--size=tiny", "--json", *arguments])
        with pytest.raises(SystemExit) as stop:
            benchmark.main()
        assert not stop.value.code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize("stage", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_steps_learn_what_those_of_transformers_learn(run, tmp_path, stage):
    more = [f"--profile={tmp_path / 'trace'}"] if stage == "2" else ["--only=ours,transformers"]
    ours, *between, theirs = run(step_gpu, f"--stage={stage}", *more)["rows"]
    assert theirs["implementation"] == "transformers, float32 weights"
    assert len(ours["losses"]) == 6 and ours["losses"][-1] < ours["losses"][0]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=2e-6)
    assert ours["tflops"] * ours["milliseconds"] == pytest.approx(theirs["tflops"] * theirs["milliseconds"])
    assert ours["share_of_practical_peak"] > 0 and "mfu" not in ours  # a CPU's peak is not published
    if stage == "2":
        profile, plan = between
        assert plan["planned_gib"] == pytest.approx(ours["compiled_gib"])
        found = profile["profile"]
        assert set(found) == {*time_by_kind.KINDS, "gaps"}
        for kind in ("matmul", "attention", "loss", "optimizer", "norm, elementwise"):
            assert found[kind] > 0


def test_adapters_start_from_the_loss_of_the_model_that_they_adapt(run):
    lora, theirs, qlora = run(lora_gpu, "--only=ours,transformers")["rows"]
    assert lora["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-6)
    # Others are drawn for A, of which the loss depends after the first steps.
    np.testing.assert_allclose(lora["losses"], theirs["losses"], rtol=2e-3)
    assert qlora["losses"][-1] < qlora["losses"][0]
    assert qlora["case"]["form"] == "qlora"


def test_generation_answers_as_transformers_does(run):
    rows = run(generate_gpu)["rows"]
    assert [row["implementation"] for row in rows] == ["llava_jax"] * 2 + ["transformers"] * 2
    assert [row["tokens"] for row in rows[:2]] == [row["tokens"] for row in rows[2:]]
    assert all(len(row["tokens"]) == 12 for row in rows)


def test_losses_agree_and_one_that_does_not_is_told(run, monkeypatch):
    rows = run(loss)["rows"]
    assert {row["implementation"] for row in rows} == {"ours", "jax, all logits", "torch"}
    assert all(row["distance"] < 1e-5 and not row["wrong"] for row in rows)
    assert all(row["error"] < 1e-5 for row in rows if row["implementation"] != "torch")

    slightly_wrong = lambda *x: 1.001 * loss.of_all_logits(*x)
    row = loss.check(slightly_wrong, loss.SIZES["tiny"])
    assert row["wrong"] and "differs from float64" in row["failed"]
    rows = [
        {"implementation": name, "supervised": 1.0, "loss": value, "gradients": [[1.0, 2.0], [3.0]], "tolerance": 0.01}
        for name, value in (("ours", 2.0), ("torch", 2.1))
    ]  # fmt: skip
    loss.compare(rows)
    assert [row["wrong"] for row in rows] == [False, True]


def test_flops_of_a_step_equal_a_count_by_hand():
    model = TINY.model
    assert (model.text.hidden_size, model.text.intermediate_size, model.text.vocab_size) == (64, 128, 512)
    tokens, samples, length = 2 * 96, 6, 32
    layer = 2 * tokens * (4 * 64 * 64 + 3 * 64 * 128)
    attention = 4 * 64 * samples * length * (length + 1) / 2
    supervised = samples * (length - (length + 16) // 2)
    head = 2 * supervised * 64 * 512
    tower = samples * (2 * (17 * 2 * (4 * 32 * 32 + 2 * 32 * 48) + 17 * 17 * 4 * 32) + 16 * 2 * 3 * 49 * 32)
    projector = samples * 16 * 2 * (2 * 32 * 64 + 3 * 64 * 64)
    expected = tower + projector + 3 * (2 * (layer + attention) + head)
    assert TINY.flops(TINY.work) == expected
    # The projector alone trains: the decoder's matrices have no gradients of their own.
    stage1 = Case(form="stage1", size="tiny", rows=2, length=96, samples=3)
    assert stage1.flops(stage1.work) == tower + projector + 2 * (2 * layer + head) + 3 * 2 * attention
    assert rated(TINY, seconds=2.0)["tflops"] == pytest.approx(expected / 2e12)


def test_hours_follow_from_the_flops_of_all_samples():
    case = Case()
    epoch = EPOCHS["stage2"]
    share = case.flops(case.work) / case.flops(epoch.work)
    assert rated(case, seconds=1.5)["epoch_hours"] * 3600 * share == pytest.approx(1.5)
    # A step of 16 samples with 1024 tokens each, of 665,298 with 862.
    assert 1 / share == pytest.approx(665_298 / 16 * 862 / 1024, rel=0.02)


def test_rows_hold_the_samples_isolated_and_in_order():
    case = Case(size="tiny", rows=2, length=97, samples=3)
    samples = draw_samples(case)
    batch = pack(samples, case)
    assert batch["tokens"].shape == (1, 2, 97) and batch["images"].shape == (1, 2, 3, 28, 28, 3)
    np.testing.assert_array_equal(batch["tokens"][0, 1, 64:96], samples["tokens"][5])
    np.testing.assert_array_equal(batch["images"][0, 1, 2], samples["images"][5])
    assert batch["segment_ids"][0, 0].tolist() == [1] * 32 + [2] * 32 + [3] * 32 + [0]
    assert batch["positions"][0, 0, 30:35].tolist() == [30, 31, 0, 1, 2]
    assert batch["labels"][0, 0, -1] == IGNORE and (batch["tokens"] == IMAGE_TOKEN).sum() == 6 * 16


HLO = """HloModule jit_step

FileNames
1 "/here/llava_jax/models/llama.py"
2 "/here/llava_jax/kernels/cross_entropy.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=1 line=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused_computation.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %exp.1 = f32[8]{0} exponential(%p), metadata={op_name="jit(step)/exp" stack_frame_id=2}
}

%fused_computation.2 (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%q, %q), metadata={op_name="jit(step)/add" stack_frame_id=1}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%a), condition=%c, body=%b
  %custom-call.1 = (f32[8]{0}, s8[4]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul"
  %custom-call.2 = f32[8]{0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  %copy.1 = f32[8]{0} copy(%a)
  ROOT %fusion.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_computation.2
}
"""


def test_operations_are_told_apart_by_what_they_do_and_where_they_stem_from():
    kinds = time_by_kind.kinds(HLO)
    expected = {
        "custom-call.1": "matmul",
        "custom-call.2": "attention",
        "fusion.1": "loss",
        "fusion.2": "norm, elementwise",
        "copy.1": "copies",
    }
    assert {name: kinds[name] for name in expected} == expected
    assert "while.1" not in kinds


def test_time_is_that_of_what_runs_innermost_and_gaps_are_when_nothing_does():
    line = [("while.1", 0, 100), ("fusion.1", 10, 40), ("copy.1", 40, 45), ("nvjet_tst", 200, 230)]
    other = [("custom-call.2", 220, 240), ("Memcpy D2D", 300, 301)]
    found = time_by_kind.by_kind([line, other], time_by_kind.kinds(HLO))
    spent = {kind: time for kind, time in found.items() if time}
    assert spent == {"loss": 30, "copies": 6, "matmul": 30, "attention": 20, "gaps": 155 + 60}


def write_module(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "child_of_a_test.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_child_that_dies_leaves_its_rows_and_a_reason(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "print('{\"a\": 1}', flush=True)\nraise MemoryError('no more')\n")
    rows = list(isolated.rows(Child("x", ("child_of_a_test",))))
    assert rows == [{"a": 1}, {"implementation": "x", "failed": "exit 1: MemoryError: no more"}]


def test_a_child_that_hangs_is_stopped_and_leaves_its_rows(tmp_path, monkeypatch):
    text = "import time\nprint('{\"a\": 1}', flush=True)\ntime.sleep(60)\n"
    write_module(tmp_path, monkeypatch, text)
    began = time.monotonic()
    rows = list(isolated.rows(Child("x", ("child_of_a_test",), limit=1.0)))
    assert rows == [{"a": 1}, {"implementation": "x", "failed": "stopped after 1 s"}]
    assert time.monotonic() - began < 30


BENCHMARK = """
import sys
from benchmarks.isolated import Child, collect
children = [Child("quick", ("child_of_a_test",)), Child("slow", ("child_of_a_test", "slow"))]
collect(children, lambda row: print("row", row["a"]), as_json=True)
"""
CHILD = """
import sys, time
print('{"a": 1}', flush=True)
time.sleep(600 if sys.argv[1:] else 0)
"""


def test_a_part_that_is_stopped_keeps_its_rows_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write_module(tmp_path, monkeypatch, CHILD)
    (tmp_path / "benchmark_of_a_test.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "benchmark_of_a_test"]
    monkeypatch.setattr(
        one_card, "run_part", lambda *_: [one_card._run(command, tmp_path, time.monotonic() + 2)]
    )
    monkeypatch.setattr(one_card, "PARTS", {"first": ([], 20), "second": ([], 60)})
    monkeypatch.setattr(sys, "argv", ["one_card", f"--out={tmp_path}", "--minutes=1"])
    one_card.main()
    [result] = json.loads((tmp_path / "first.json").read_text())
    assert result["rows"] == [{"a": 1}, {"a": 1}] and result["returncode"] == 128 + 15
    printed = capsys.readouterr().out
    assert "row 1" in printed and "go on with --start=second" in printed
    assert not (tmp_path / "second.json").exists()


def test_a_slice_begins_where_it_is_told_and_runs_every_part(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(one_card, "run_part", lambda name, *_: ran.append(name) or [])
    monkeypatch.setattr(sys, "argv", ["one_card", f"--out={tmp_path}", "--start=lora", "--minutes=30"])
    one_card.main()
    assert ran == ["lora", "generate"]
    assert all((tmp_path / f"{name}.json").exists() for name in ran)
