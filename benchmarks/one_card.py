"""python -m benchmarks.one_card --out=DIR [--start=PART] [--minutes=9.5]: every GPU benchmark, in slices of minutes.

The parts run in order, each as a process of its own with a time limit of its own; kernels are checked before anything is
timed. What a part prints goes to DIR/log.txt, its rows to DIR/PART.json, also of one that was stopped. A part is not
begun when less than its limit is left of the slice: the last line says how to go on.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.isolated import ROOT

TRACE = f"--profile={Path(tempfile.gettempdir()) / 'llava_jax_trace'}"
GRACE = 15.0  # seconds from SIGTERM, upon which a benchmark prints its rows, to SIGKILL
# Name -> commands and the seconds that they may take together.
PARTS = {
    "kernels": ([["attention", "--check", "--limit=90"], ["loss", "--check", "--limit=60"]], 300),
    "attention": ([["attention", "--limit=120"]], 300),
    "loss": ([["loss", "--limit=60"]], 150),
    # Keeps what a matmul gives: 128 GiB as compiled for an H200.
    "minimal": (
        [
            [
                "step_gpu",
                "--rows=4",
                "--remat=minimal",
                "--moments=float32,bfloat16",
                "--only=ours,plan",
                TRACE,
            ]
        ],
        400,
    ),
    "step": ([["step_gpu", "--limit=120", TRACE]], 500),
    "stage1": ([["step_gpu", "--stage=1", "--limit=120"]], 240),
    "lora": ([["lora_gpu", "--limit=120"]], 360),
    "generate": ([["generate_gpu", "--limit=150"]], 320),
}
TINY = {"attention": ["--platform=cpu"]}  # what a part's command needs on a CPU


def run_part(name: str, options: argparse.Namespace, deadline: float) -> list[dict]:
    """The results of a part's commands; {"failed": ...} of one without any."""
    results = []
    for benchmark, *flags in PARTS[name][0]:
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *flags, "--json"]
        if options.size == "tiny":
            command += ["--size=tiny", *TINY.get(benchmark, [])]
        if options.attention and benchmark in ("step_gpu", "lora_gpu"):
            command.append(f"--attention={options.attention}")
        results.append({"command": " ".join(command[1:]), **_run(command, options.out, deadline)})
    return results


def _run(command: list[str], out: Path, deadline: float) -> dict:
    began = time.monotonic()
    with (out / "log.txt").open("a") as log:
        print("$", *command[1:], file=log, flush=True)
        position = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        for wait, stop in ((deadline - began, signal.SIGTERM), (GRACE, signal.SIGKILL)):
            try:
                process.wait(max(wait, 1.0))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(stop)
        returncode = process.wait()
    lines = (out / "log.txt").read_bytes()[position:].decode(errors="replace").splitlines()
    print(*(line for line in lines if not line.startswith("{")), sep="\n", flush=True)
    found = {"returncode": returncode, "seconds": round(time.monotonic() - began, 1)}
    rows = [line for line in lines if line.startswith('{"conditions"')]
    return found | (json.loads(rows[-1]) if rows else {"failed": "it printed no rows; see log.txt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_card", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a directory for results")
    parser.add_argument("--start", choices=PARTS, default=next(iter(PARTS)), help="the part to begin with")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this slice")
    parser.add_argument("--attention", help="of steps; default: what the model chooses")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: minutes on a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    names = [*PARTS]
    for name in names[names.index(options.start) :]:
        limit = PARTS[name][1]
        left = end - time.monotonic()
        if left < limit + GRACE:
            again = f"--minutes={max(options.minutes, (limit + GRACE) / 60 + 0.5):g}"
            print(f"{left:.0f} s are left, {name} may take {limit}; go on with --start={name} {again}")
            return
        print(f"\n== {name}, at most {limit} s", flush=True)
        results = run_part(name, options, time.monotonic() + limit)
        (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\nAll parts were run.")


if __name__ == "__main__":
    main()
