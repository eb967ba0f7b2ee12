"""python -m benchmarks.plan_table [--write] [--directory=DIR]: the table of slices in docs/pods.md, by llava_jax.plan.

Every row is a command of its own, whose result is kept in the directory: an interrupted table goes on where it was.
Remove the directory when the step has changed.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/pods.md"
BEGIN, END = "<!-- python -m benchmarks.plan_table --write -->", "<!-- end of the table -->"

SLICES = {  # smallest first, with the chips of each
    "v5e": {"2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "16x16": 256},
    "v5p": {"2x2x1": 4, "2x2x2": 8, "2x2x4": 16, "2x4x4": 32, "4x4x4": 64, "4x8x8": 256},
    "v6e": {"2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "16x16": 256},
}
STAGES = {  # recipe, rows per step, flags; captions with an image stay below 768 tokens
    "1": ("llava15_pretrain", 256, ["--tokens=768", "--samples=558128"]),
    "2": ("llava15_finetune", 128, ["--samples=665298"]),
}
SIZES = ("7b", "13b")
LARGER = (64, 256)  # chips of the slices beside the smallest that fits
ROWS_AT_A_TIME = (4, 2, 1)  # per device; the most that fit are taken
STATE = ("parameters_gib", "moments_gib", "frozen_gib")
TOLERANCE = 0.03  # norms and biases lie whole on every device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "benchmarks/results/plan_table")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--families", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    plans = {}
    for size in arguments.sizes:
        for stage in arguments.stages:
            for family in arguments.families:
                plans[size, stage, family] = plan_family(size, stage, family, arguments.directory)
            require_even_state(
                [plan for key, found in plans.items() if key[:2] == (size, stage) for plan in found]
            )
    text = table(plans)
    crashes = [
        kept["flags"] for kept in map(read, arguments.directory.glob("*.json")) if "crashed" in kept["plan"]
    ]
    if crashes:
        lines = "\n".join(f"- `{' '.join(flags)}`" for flags in sorted(crashes))
        text += f"\n\nThe compiler itself crashed on these, which therefore count as not fitting:\n\n{lines}"
    print(text)
    if arguments.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    if arguments.json:
        print(json.dumps({" ".join(key): found for key, found in plans.items()}))


def plan_family(size: str, stage: str, family: str, directory: Path) -> list[dict]:
    """The plans of the smallest slice that fits, and of the larger ones."""
    plans = []
    for slice, chips in SLICES[family].items():
        if plans and chips not in LARGER:
            continue
        plan = plan_slice(size, stage, f"{family}:{slice}", chips, directory)
        if plan:
            plans.append(plan)
    return plans


def plan_slice(size: str, stage: str, topology: str, chips: int, directory: Path) -> dict | None:
    """The plan with the most rows at a time that fit; None if not even one does."""
    recipe, batch_size, flags = STAGES[stage]
    tensor = max(1, chips // batch_size)
    rows = batch_size * tensor // chips  # per device and step
    for at_a_time in ROWS_AT_A_TIME:
        if at_a_time > rows:
            continue
        plan = run_plan(
            [
                f"--config=configs/{recipe}.py:{size}",
                f"--topology={topology}",
                f"--config.mesh.tensor={tensor}",
                f"--config.train.accumulation_steps={rows // at_a_time}",
                *flags,
            ],
            directory,
        )
        if plan["fits"]:
            return plan
    return None


def run_plan(flags: list[str], directory: Path) -> dict:
    """What `python -m llava_jax.plan` says, now or when it was asked before; {"crashed": True} of a compiler that died."""
    path = directory / (hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16] + ".json")
    if path.exists():
        return read(path)["plan"]
    print(*flags, file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "llava_jax.plan", *flags, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode == -signal.SIGSEGV:
        plan = {"fits": False, "crashed": True}
    elif result.returncode in (0, 16):
        plan = json.loads(result.stdout.splitlines()[-1])
    else:
        sys.exit(f"The plan ended with {result.returncode}:\n{result.stdout}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"flags": flags, "plan": plan}, indent=1) + "\n")
    os.replace(temporary, path)
    return plan


def read(path: Path) -> dict:
    """What `run_plan` has kept."""
    return json.loads(path.read_text())


def require_even_state(plans: list[dict]) -> None:
    """Asserts that parameters, moments and frozen weights per device are 1 / devices of their whole."""
    wholes = [plan["num_devices"] * sum(plan[key] for key in STATE) for plan in plans]
    assert max(wholes) <= (1 + TOLERANCE) * min(wholes), wholes


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
                f"| {size.upper()}, {stage} | {plan['topology']} | {plan['num_devices']} | {rows} "
                f"| {sum(plan[key] for key in STATE):.2f} | {plan['gradients_gib']:.2f} | {plan['activations_gib']:.2f} "
                f"| {plan['peak_gib']:.2f} | {plan['hbm_gib']:.2f} | {times['1']['step_seconds']:.2f} "
                f"| {times['0.4']['hours_per_epoch']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
