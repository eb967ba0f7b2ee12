"""The table of slices: what was compiled is kept, whichever rows were asked for."""

import json
import subprocess
import sys

import pytest

from benchmarks import plan_table, scaling

CHIPS = {"2x2": 4, "2x4": 8, "8x8": 64}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """table(*flags) -> the page afterwards, table.asked, table.dies_on. All fits 8 chips and more, 2 rows at a time."""
    page = tmp_path / "pods.md"
    page.write_text(f"before\n{plan_table.BEGIN}\n{plan_table.END}\nafter\n")
    monkeypatch.setattr(plan_table, "PAGE", page)
    monkeypatch.setattr(plan_table, "ROOT", tmp_path)
    monkeypatch.setattr(plan_table, "SLICES", {"v5e": CHIPS})
    monkeypatch.setattr(plan_table, "SIZES", ("7b",))
    monkeypatch.setattr(plan_table.importlib.metadata, "version", lambda name: f"{name}-1.0")
    asked, dies_on = [], {}

    def run(command, **_):
        flags = dict(flag[2:].split("=", 1) for flag in command[3:] if "=" in flag)
        asked.append(flags)
        chips = CHIPS[flags["topology"].partition(":")[2]]
        steps = int(flags["config.train.accumulation_steps"])
        plan = {
            "fits": chips >= 8 and steps >= 64 // chips,
            "topology": flags["topology"],
            "num_devices": chips,
            "mesh": {"tensor": 1},
            "rows_per_device": 128 // chips // steps,
            "parameters_gib": 600 / chips,
            "moments_gib": 300 / chips,
            "frozen_gib": 100 / chips,
            "at_mfu": {"1": {"step_seconds": 8 / chips}, "0.4": {"hours_per_epoch": 80 / chips}},
        } | dict.fromkeys(("gradients_gib", "activations_gib", "peak_gib", "hbm_gib"), 1.5)
        output = f"a line\n{json.dumps(plan)}\n"
        code = dies_on.get(flags["topology"], 0 if plan["fits"] else 16)
        return subprocess.CompletedProcess(command, code, output if code >= 0 else "", "")

    def table(*flags):
        monkeypatch.setattr(
            sys, "argv", ["plan_table", f"--directory={tmp_path / 'kept'}", "--write", *flags]
        )
        plan_table.main()
        return page.read_text()

    monkeypatch.setattr(plan_table.subprocess, "run", run)
    table.asked, table.dies_on = asked, dies_on
    return table


def rows_of(page: str) -> list[list[str]]:
    """Model and stage, slice, rows at a time, state."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 7B")]
    return [[line[0], line[1], line[3], line[4]] for line in lines]


def test_the_smallest_slice_that_fits_and_the_larger_ones_are_told(table):
    page = table("--stages", "lora")
    assert page.startswith("before\n") and page.endswith(f"{plan_table.END}\nafter\n")
    assert rows_of(page) == [
        ["7B, 2 by LoRA", "v5e:2x4", "2", "125.00"],
        ["7B, 2 by LoRA", "v5e:8x8", "2", "15.62"],
    ]
    assert "Compiled with jax jax-1.0 and libtpu libtpu-1.0 on 20" in page
    assert {flags["config"] for flags in table.asked} == {"configs/llava15_finetune_lora.py:7b"}
    tried = [(flags["topology"], flags["config.train.accumulation_steps"]) for flags in table.asked]
    assert tried == [
        *(("v5e:2x2", steps) for steps in ("8", "16", "32")),
        *(("v5e:2x4", steps) for steps in ("4", "8")),
        ("v5e:8x8", "1"),
    ]


def test_what_was_compiled_is_not_compiled_again_and_stays_in_the_table(table):
    table("--stages", "lora")
    first = len(table.asked)
    page = table("--stages", "2")
    assert len(table.asked) == 2 * first
    assert [row[0] for row in rows_of(page)] == ["7B, 2"] * 2 + ["7B, 2 by LoRA"] * 2
    assert rows_of(table("--stages")) == rows_of(page)
    assert rows_of(table("--stages", "lora", "2")) == rows_of(page)
    assert len(table.asked) == 2 * first


def test_a_plan_that_fails_is_tried_again_and_a_crash_of_the_compiler_is_told(table):
    table.dies_on.update({"v5e:2x4": -9, "v5e:2x2": -11})
    with pytest.raises(SystemExit, match="1 plans failed"):
        table("--stages", "2")
    table.dies_on.pop("v5e:2x4")
    page = table("--stages", "2")
    assert [row[1] for row in rows_of(page)] == ["v5e:2x4", "v5e:8x8"]
    crashes = [
        line for line in page.splitlines() if line.startswith("- `--config=configs/llava15_finetune.py:7b")
    ]
    assert len(crashes) == 3 and all("--topology=v5e:2x2" in line for line in crashes)


def test_state_that_is_not_spread_is_noticed():
    plan = {"num_devices": 8, "parameters_gib": 1.0, "moments_gib": 2.0, "frozen_gib": 0.0}
    whole = plan | {"num_devices": 64}
    plan_table.require_even_state([plan, plan])
    with pytest.raises(AssertionError):
        plan_table.require_even_state([plan, whole])


def test_what_scaling_tells_is_of_one_chip(monkeypatch, capsys):
    def plan(flags):
        flags = dict(flag[2:].split("=", 1) for flag in flags)
        assert (flags["topology"], flags["config.data.batch_size"]) == ("v5e:2x4", "16")
        return {
            "num_devices": 8,
            "parameters_gib": 0.5,
            "moments_gib": 1.0,
            "frozen_gib": 0.25,
            "peak_gib": 3.0,
            "flops_per_step": 8e12,
            "collectives": {
                "all-gather": {"gib": 2.0},
                "collective-permute": {"gib": 1.0},
                "all-reduce": {"gib": 0.5},
            },
        }

    monkeypatch.setattr(scaling, "run_plan", plan)
    monkeypatch.setattr(sys, "argv", ["scaling", "--slices", "2x4"])
    scaling.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| v5e:2x4 | 8 | 1.75 | 3.00 | 3.50 | 1.00 |"
