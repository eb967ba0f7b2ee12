"""python -m benchmarks.scaling [--json]: what more devices take off each one, and what they send, by llava_jax.plan.

The step of a 1.1B model's second stage, compiled for v5e slices of 8 to 256 chips by TPU's own compiler; two rows of
2048 tokens for each chip, so that its work stays the same. Nothing is run.
"""

import argparse
import json

from benchmarks.plan_table import STATE, run_plan

SLICES = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
ROWS_PER_CHIP = 2
COLUMNS = "slice | chips | state, GiB | peak, GiB | collectives, GiB/step | model TFLOP"


def plan_slice(slice: str) -> dict:
    """What the plan says of a slice."""
    first, second = map(int, slice.split("x"))
    return run_plan(
        [
            "--config=configs/tinyllava_finetune.py",
            f"--topology=v5e:{slice}",
            f"--config.data.batch_size={ROWS_PER_CHIP * first * second}",
            "--samples=665298",
        ]
    )


def row_of(plan: dict) -> dict[str, float]:
    """Figures of one chip. Collectives count as what is whole before or after them, of whatever kind: TPU's compiler also
    gathers, and sums, in steps from neighbour to neighbour."""
    return {
        "chips": plan["num_devices"],
        "state_gib": sum(plan[key] for key in STATE),
        "peak_gib": plan["peak_gib"],
        "collectives_gib": sum(traffic["gib"] for traffic in plan["collectives"].values()),
        "tflop": plan["flops_per_step"] / plan["num_devices"] / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--slices", nargs="*", default=SLICES)
    arguments = parser.parse_args()
    rows = []
    print(f"| {COLUMNS} |\n{'|---' * (COLUMNS.count('|') + 1)}|")
    for slice in arguments.slices:
        row = row_of(plan_slice(slice))
        rows.append(row)
        figures = [f"{value:.2f}" for key, value in row.items() if key != "chips"]
        print(f"| v5e:{slice} | {row['chips']} | {' | '.join(figures)} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
