"""python -m benchmarks.plan_table [--write] [--directory=DIR]: the table of slices in docs/pods.md, by llava_jax.plan.

Every row is a command of its own, whose result is kept in the directory: an interrupted table goes on where it was, and
one that was asked for some rows shows all that are kept. Remove the directory when the step has changed.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/pods.md"
BEGIN, END = "<!-- python -m benchmarks.plan_table --write -->", "<!-- end of the table -->"

SLICES = {  # smallest first, with the chips of each
    "v5e": {"2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "16x16": 256},
    "v5p": {"2x2x1": 4, "2x2x2": 8, "2x2x4": 16, "2x4x4": 32, "4x4x4": 64, "4x8x8": 256},
    "v6e": {"2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "16x16": 256},
}


class Stage(NamedTuple):
    label: str  # in the table
    recipe: str
    batch_size: int  # rows per step
    flags: list[str]


STAGES = {
    # Captions with an image stay below 768 tokens.
    "1": Stage("1", "llava15_pretrain", 256, ["--tokens=768", "--samples=558128"]),
    "2": Stage("2", "llava15_finetune", 128, ["--samples=665298"]),
    "lora": Stage("2 by LoRA", "llava15_finetune_lora", 128, ["--samples=665298"]),
}
SIZES = ("7b", "13b")
LARGER = (64, 256)  # chips of the slices beside the smallest that fits
ROWS_AT_A_TIME = (4, 2, 1)  # per device; the most that fit are taken
STATE = ("parameters_gib", "moments_gib", "frozen_gib")
TOLERANCE = 0.03  # norms and biases lie whole on every device


class Failed(Exception):
    """A plan that ended neither with a verdict nor by the compiler's own death."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "benchmarks/results/plan_table")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument(
        "--stages", nargs="*", choices=STAGES, default=list(STAGES), help="none: compile nothing"
    )
    parser.add_argument("--families", nargs="*", choices=SLICES, default=list(SLICES))
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.directory)
    failures = []
    for size in arguments.sizes:
        for stage in arguments.stages:
            for family in arguments.families:
                try:
                    plan_family(size, stage, family, kept.ask)
                except Failed as failure:
                    print(failure, file=sys.stderr, flush=True)
                    failures.append(failure)
    plans = all_plans(kept)
    text = f"{table(plans)}\n\n{notes(kept)}"
    print(text)
    if arguments.write:
        write_table(PAGE, text)
    if arguments.json:
        print(json.dumps({" ".join(key): found for key, found in plans.items()}))
    if failures:
        sys.exit(f"{len(failures)} plans failed, see above; the same command tries them again.")


Ask = Callable[[list[str]], dict | None]  # flags of a plan -> what it says; None: that is not known


def all_plans(kept: "Kept") -> dict[tuple[str, str, str], list[dict]]:
    """The plans that are kept, by size, stage and family. Asserts that state is spread evenly."""
    plans = {
        (size, stage, family): plan_family(size, stage, family, kept.look_up)
        for size in SIZES
        for stage in STAGES
        for family in SLICES
    }
    for size in SIZES:
        for stage in STAGES:
            alike = [plan for key, found in plans.items() if key[:2] == (size, stage) for plan in found]
            if stage == "lora":  # what is small of an adapter, its rank, is not split: `tensor` holds copies
                alike = [plan for plan in alike if plan["mesh"]["tensor"] == 1]
            require_even_state(alike)
    return plans


def plan_family(size: str, stage: str, family: str, ask: Ask) -> list[dict]:
    """The plans of the smallest slice that fits, and of the larger ones."""
    plans = []
    for slice, chips in SLICES[family].items():
        if plans and chips not in LARGER:
            continue
        plan = plan_slice(size, stage, f"{family}:{slice}", chips, ask)
        if plan:
            plans.append(plan)
    return plans


def plan_slice(size: str, stage: str, topology: str, chips: int, ask: Ask) -> dict | None:
    """The plan with the most rows at a time that fit; None if not even one does, or if that is not known."""
    _, recipe, batch_size, flags = STAGES[stage]
    tensor = max(1, chips // batch_size)
    rows = batch_size * tensor // chips  # per device and step
    for at_a_time in ROWS_AT_A_TIME:
        if at_a_time > rows:
            continue
        plan = ask(
            [
                f"--config=configs/{recipe}.py:{size}",
                f"--topology={topology}",
                f"--config.mesh.tensor={tensor}",
                f"--config.train.accumulation_steps={rows // at_a_time}",
                *flags,
            ]
        )
        if plan is None or plan["fits"]:
            return plan
    return None


class Kept:
    """What plans have said, each in a file of the directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def entries(self) -> list[dict]:
        """All that is kept: `flags`, `plan`, and with what it was `compiled`."""
        entries = [json.loads(path.read_text()) for path in self.directory.glob("*.json")]
        return sorted(entries, key=lambda entry: entry["flags"])

    def look_up(self, flags: list[str]) -> dict | None:
        """What `python -m llava_jax.plan` has said; None if it was not asked."""
        path = self._path(flags)
        return json.loads(path.read_text())["plan"] if path.exists() else None

    def ask(self, flags: list[str]) -> dict:
        """What it says, now or when it was asked before; {"fits": False, "crashed": True} of a compiler that died.

        Raises Failed when it says nothing.
        """
        plan = self.look_up(flags)
        if plan is None:
            plan = run_plan(flags)
            path = self._path(flags)
            temporary = path.with_suffix(".tmp")
            entry = {"flags": flags, "compiled": versions(), "plan": plan}
            temporary.write_text(json.dumps(entry, indent=1) + "\n")
            os.replace(temporary, path)
        return plan

    def _path(self, flags: list[str]) -> Path:
        return self.directory / (hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16] + ".json")


def run_plan(flags: list[str]) -> dict:
    print(*flags, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "llava_jax.plan", *flags, "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode == -signal.SIGSEGV:
        return {"fits": False, "crashed": True}
    lines = result.stdout.splitlines()
    if result.returncode not in (0, 16) or not lines or not lines[-1].startswith("{"):
        raise Failed(f"The plan of {' '.join(flags)} ended with {result.returncode}:\n{result.stdout}")
    return json.loads(lines[-1])


def versions() -> dict[str, str]:
    """With what a plan is compiled, and when."""
    names = ("jax", "libtpu")
    return {name: importlib.metadata.version(name) for name in names} | {
        "date": datetime.date.today().isoformat()
    }


def require_even_state(plans: list[dict]) -> None:
    """Asserts that parameters, moments and frozen weights per device are 1 / devices of their whole."""
    wholes = [plan["num_devices"] * sum(plan[key] for key in STATE) for plan in plans]
    assert not wholes or max(wholes) <= (1 + TOLERANCE) * min(wholes), wholes


def table(plans: dict[tuple[str, str, str], list[dict]]) -> str:
    """The table in Markdown."""
    columns = "model, stage | slice | chips | rows at a time | state | gradients | rest | peak | of"
    columns += " | s/step, bound | hours/epoch, 40 %"
    lines = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    for (size, stage, _), found in plans.items():
        for plan in found:
            tensor = plan["mesh"]["tensor"]
            rows = f"{plan['rows_per_device']}" + (f" per {tensor} chips" if tensor > 1 else "")
            times = plan["at_mfu"]
            lines.append(
                f"| {size.upper()}, {STAGES[stage].label} | {plan['topology']} | {plan['num_devices']} | {rows} "
                f"| {sum(plan[key] for key in STATE):.2f} | {plan['gradients_gib']:.2f} | {plan['activations_gib']:.2f} "
                f"| {plan['peak_gib']:.2f} | {plan['hbm_gib']:.2f} | {times['1']['step_seconds']:.2f} "
                f"| {times['0.4']['hours_per_epoch']:.2f} |"
            )
    return "\n".join(lines)


def notes(kept: Kept) -> str:
    """With what the rows were compiled, and on what the compiler died."""
    entries = kept.entries()
    text = "No row was compiled."
    if entries:
        jax, libtpu, dates = (
            ", ".join(sorted({entry["compiled"][key] for entry in entries}))
            for key in ("jax", "libtpu", "date")
        )
        text = f"Compiled with jax {jax} and libtpu {libtpu} on {dates}."
    crashes = [entry["flags"] for entry in entries if "crashed" in entry["plan"]]
    if crashes:
        lines = "\n".join(f"- `{' '.join(flags)}`" for flags in crashes)
        text += f"\n\nThe compiler itself crashed on these, which therefore count as not fitting:\n\n{lines}"
    return text


def write_table(page: Path, text: str) -> None:
    """Puts the table between its marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
