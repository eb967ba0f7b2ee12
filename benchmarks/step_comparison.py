"""Ours beside the plan and transformers, for training steps: which processes run, and what the table says."""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.isolated import TORCH_ENVIRONMENT, Child, collect
from benchmarks.options import numbers, positive, several
from benchmarks.timing import has_torch
from benchmarks.training_step import MODELS, Case
from llava_jax.config import ATTENTIONS
from llava_jax.gpus import memory_fraction_name
from llava_jax.planning.chips import GPUS

_TINY = {"rows": 2, "length": 96, "samples": 3, "rank": 4, "steps": 4}
ENVIRONMENT = {memory_fraction_name(): "0.95"}  # the step of 7B needs more of a card than JAX takes by itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark of steps; those with several values measure each combination."""
    default = Case()
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--size",
        choices=MODELS,
        default="7b",
        help="tiny: seconds on a CPU, with rows, length, samples, rank and steps of its own",
    )
    parser.add_argument("--rows", type=numbers, default=[default.rows], help="per step; several: 4,8")
    parser.add_argument("--length", type=positive, default=default.length, help="tokens of a row")
    parser.add_argument(
        "--samples", type=positive, help="of a row; default: 2 of instructions, 3 of captions"
    )
    moments, remats = several("float32", "bfloat16"), several("none", "minimal", "dots", "full", "offload")
    parser.add_argument("--moments", type=moments, default=["float32"], help="float32,bfloat16")
    parser.add_argument("--remat", type=remats, default=["full"], help="full,minimal,dots,none,offload")
    parser.add_argument(
        "--attention", type=several(*ATTENTIONS), default=["auto"], help="auto,mosaic_gpu,xla"
    )
    parser.add_argument("--steps", type=positive, default=default.steps, help="that are timed")
    parser.add_argument(
        "--profile", metavar="DIR", help="also tell where the time goes; the trace is put there"
    )
    sides = ("plan", "ours", "transformers")
    parser.add_argument("--only", type=several(*sides), default=sides, help=",".join(sides))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for each process")


def cases(options: argparse.Namespace, forms: list[str], **fields) -> list[Case]:
    """What the options ask for."""
    found = []
    for form, rows, moments, remat, attention in itertools.product(
        forms, options.rows, options.moments, options.remat, options.attention
    ):
        case = Case(
            form=form,
            size=options.size,
            rows=rows,
            length=options.length,
            samples=options.samples or (3 if form == "stage1" else 2),
            moments=moments,
            remat=remat,
            attention=attention,
            steps=options.steps,
            **fields,
        )
        found.append(dataclasses.replace(case, **_TINY) if options.size == "tiny" else case)
    return found


def compare(wanted: list[Case], options: argparse.Namespace) -> None:
    """Measures the cases, prints a table and, with --json, the rows."""
    print(
        f"{'':72}{'ms':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'of matmul':>10}{'peak GiB':>10}{'hours':>7}"
    )
    table = _Table()
    children = _children(wanted, options, table)
    how = dict(finish=finish, conditions=table.conditions)
    result = collect(children, table.show, as_json=options.json, **how)
    sys.exit(all("failed" in row for row in result["rows"]))


def _children(wanted: list[Case], options: argparse.Namespace, table: "_Table") -> Iterator[Child]:
    only = options.only
    compared = set()
    for case in wanted:
        table.case = case
        text = json.dumps(dataclasses.asdict(case))
        child = lambda name, *command, environment=ENVIRONMENT: Child(
            name, command, options.limit, environment
        )
        if "ours" in only:
            profile = [f"--profile={Path(options.profile).resolve()}"] if options.profile else []
            yield child("llava_jax", "benchmarks.training_step", "ours", text, *profile)
        if "plan" in only and (table.device or "ours" not in only):
            topology = _topology(table.device)
            command = "benchmarks.training_step", "plan", text, f"--topology={topology}"
            yield child("plan", *command, environment={} if topology == "here" else {"JAX_PLATFORMS": "cpu"})
        if "transformers" in only and has_torch() and case.form != "qlora" and _content(case) not in compared:
            compared.add(_content(case))
            for weights in ("float32",) if case.size == "tiny" else ("float32", "bfloat16"):
                name = f"transformers, {weights} weights"
                command = "benchmarks.transformers_llava", text, weights
                yield child(name, *command, environment=TORCH_ENVIRONMENT)


def _topology(device: str) -> str:
    """The card as `llava_jax.plan` calls it, "here" if it knows none of that name."""
    names = [name for name, chip in GPUS.items() if device.startswith(chip.kinds)]
    return f"{names[0]}:1" if names else "here"


class _Table:
    """Shows rows as they come, with what follows from the peaks that ours measured."""

    def __init__(self):
        self.case: Case | None = None
        self.conditions: dict = {}

    @property
    def device(self) -> str:
        return self.conditions.get("device", "")

    def show(self, row: dict) -> None:
        """Adds to the row its case and its shares of the peaks, and prints it."""
        row["case"] = dataclasses.asdict(self.case)
        case = self.case
        attention = f", {case.attention}" if row["implementation"].startswith("llava_jax") else ""
        line = f"{case.form} {case.rows} x {case.length}, {row['implementation']}{attention}"
        if "failed" in row:
            print(f"{line}: {row['failed']}", flush=True)
            return
        if "tflops" in row:
            row |= self._shares(row["tflops"])
            line = (
                f"{line:72}{row['milliseconds']:>9.1f}{row['tokens_per_second']:>10.0f}{row['tflops']:>9.3g}"
            )
            line += "".join(
                f"{100 * row[key]:>{width}.1f}" if row.get(key) else " " * width
                for key, width in (("mfu", 7), ("share_of_practical_peak", 10))
            )
        peak = row.get("device_memory_peak_gib", row.get("planned_gib"))
        line = f"{line:117}" + (f"{peak:>10.2f}" if peak is not None else " " * 10)
        if "epoch_hours" in row:
            line += f"{row['epoch_hours']:>7.1f}"
        print(line, flush=True)
        for kind, milliseconds in row.get("profile", {}).items():
            print(f"    {kind:24}{milliseconds:>10.2f} ms")

    def _shares(self, tflops: float) -> dict[str, float]:
        peaks = {
            "mfu": self.conditions.get("peak_tflops"),
            "share_of_practical_peak": self.conditions.get("practical_peak_tflops"),
        }
        return {key: tflops / peak for key, peak in peaks.items() if peak}


def _content(case: Case) -> tuple:
    """What transformers' step depends on."""
    return case.form, case.rows, case.length, case.samples, case.rank


def finish(rows: list[dict]) -> None:
    """Says how far plans and measured memory lie apart, and how much faster ours is."""
    for ours in rows:
        if not ours["implementation"].startswith("llava_jax") or "failed" in ours:
            continue
        measured = ours.get("device_memory_peak_gib")
        for row in rows:
            if "planned_gib" in row and row["case"] == ours["case"] and measured:
                ours["planned_of_measured"] = row["planned_gib"] / measured
                print(f"planned {row['planned_gib']:.2f} GiB, measured {measured:.2f}")
            same = _content(Case(**row["case"])) == _content(Case(**ours["case"]))
            if same and row["implementation"].startswith("transformers") and "failed" not in row:
                times = ours.setdefault("times_as_fast_as", {})
                times[row["implementation"]] = row["milliseconds"] / ours["milliseconds"]
        if ours["case"]["size"] != "tiny":  # whose times are those of everything but arithmetic
            for name, ratio in ours.get("times_as_fast_as", {}).items():
                print(f"{ours['implementation']}: {ratio:.2f} times as fast as {name}")
