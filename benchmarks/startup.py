"""Seconds from the start of a process to its first step: python -m benchmarks.startup [--json].

Ours is `python -m llava_jax.train` on the quickstart's last stage, its data measured before: with an empty directory of
compiled steps, and again with what that run left there. The other side is transformers and torch with the same model,
up to the end of its first step, without reading any data. `python -m benchmarks.dispatch` then counts the interpreter's
work per step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.options import positive
from benchmarks.step_cpu import ENVIRONMENT

ROUNDS = 3
IMPORTS = {"import_ours": "import llava_jax.trainer", "import_peer": "import torch, transformers"}


def seconds_of(command: list[str], marks: dict[str, str], stdin: str = "") -> dict[str, float]:
    """Runs a command; -> for each mark the seconds until a line with its text came out, and "end"."""
    begin, found = time.perf_counter(), {}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    process.stdin.write(stdin)
    process.stdin.close()
    lines = []
    for line in process.stdout:
        lines.append(line)
        for mark, text in marks.items():
            if text in line:
                found.setdefault(mark, time.perf_counter() - begin)
    if process.wait() or len(found) < len(marks):
        raise RuntimeError(f"{' '.join(command)} told no {marks.keys() - found.keys()}:\n{''.join(lines)}")
    return found | {"end": time.perf_counter() - begin}


def our_start(dataset: Path, workdir: Path, compiled: Path) -> dict[str, float]:
    """Seconds to the first line and to the end of the first step, and how long of these the step was compiled."""
    command = [
        "-m",
        "llava_jax.train",
        f"--config=benchmarks/startup_recipe.py:{dataset}",
        f"--workdir={workdir}",
        f"--config.stages.finetune.train.compiled_dir={compiled}",
    ]
    found = seconds_of(command, {"first_line": "llava_jax: recipe", "first_step": "step 1/"})
    [row, *_] = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return {**found, "compile": row["compile_seconds"]}


def one_round(dataset: Path, scratch: Path, number: int) -> dict[str, float]:
    """All seconds of a round."""
    found = {name: seconds_of(["-c", code], {})["end"] for name, code in IMPORTS.items()}
    compiled = scratch / f"compiled_{number}"
    for kind in ("cold", "warm"):
        start = our_start(dataset, scratch / f"run_{number}_{kind}", compiled)
        found |= {f"{name}_{kind}": start[name] for name in ("first_line", "compile", "first_step")}
    peer = ["-m", "benchmarks.step_sides", "sdpa", "tiny", "float32", str(scratch / "weights")]
    return found | {"first_step_peer": seconds_of(peer, {"step": '"losses"'}, stdin="1\n")["step"]}


TEXTS = {
    "import_ours": "import llava_jax.trainer",
    "import_peer": "import torch, transformers",
    "first_line_cold": "python -m llava_jax.train: first line",
    "compile_cold": "compiling the step",
    "first_step_cold": "first step done",
    "compile_warm": "compiling the step, compiled before",
    "first_step_warm": "first step done, compiled before",
    "first_step_peer": "transformers and torch: first step done",
}


def main() -> None:
    """Prints the table and, if asked, the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rounds = measure(Path(scratch), arguments.rounds)
    seconds = {name: statistics.median(one[name] for one in rounds) for name in TEXTS}
    for name, text in TEXTS.items():
        print(f"{text:<44}{seconds[name]:>7.2f} s")
    dispatch = subprocess.run(
        [sys.executable, "-m", "benchmarks.dispatch", "--json"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(dispatch.stdout.splitlines()[-1])
    print(f"Python per step with {figures['leaves']} leaves{figures['dispatch_ms']:>19.2f} ms")
    if arguments.json:
        print(json.dumps(seconds | figures))


def measure(scratch: Path, num_rounds: int) -> list[dict[str, float]]:
    """Draws data and weights, lets a first run measure the data, and returns the rounds' seconds."""
    from benchmarks.step_workload import WORKLOADS, write_weights
    from llava_jax.quickstart.dataset import prepare

    dataset = scratch / "dataset"
    prepare(str(dataset), num_train=80, num_dev=2, num_test=2)
    write_weights(WORKLOADS["tiny"], scratch / "weights")
    our_start(dataset, scratch / "run", scratch / "compiled")
    return [one_round(dataset, scratch, number) for number in range(num_rounds)]


if __name__ == "__main__":
    main()
