"""Optimizer steps on a CPU, beside transformers and torch: python -m benchmarks.step_cpu [--json] [--sizes=tiny,small].

Stage 2 of LLaVA (the tower frozen; forward, backward, AdamW) with the same weights and samples on both sides, each in a
process of its own with two threads: ours as the trainer runs it, the other the fastest of eager and sdpa attention and
torch.compile. Ours pads to one of its few lengths, the other to the batch's longest row. First losses must agree.
Rounds alternate, so that a busy machine disturbs both; ratios are medians of rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.options import positive, several
from benchmarks.step_sides import NUM_THREADS, PEERS
from benchmarks.step_workload import NUM_BATCHES, WORKLOADS, write_weights
from llava_jax.host_memory import KEPT_MEMORY, SETTING

ROUNDS = 9
TRIALS = 3  # rounds in which the other side's variants are compared
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-3}  # of first losses, relative
NAMES = {"float32": "fp32", "bfloat16": "bf16"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": str(NUM_THREADS),
    # As llava_jax.train sets it for itself; it helps both sides.
    SETTING: KEPT_MEMORY,
    "TOKENIZERS_PARALLELISM": "false",
    "XLA_FLAGS": "",  # tests ask for several devices
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
}


class Side:
    """A process that takes steps when told to."""

    def __init__(self, side: str, size: str, dtype: str, weights: Path):
        self.name = side
        self.num_steps = WORKLOADS[size].steps_per_round
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_sides", side, size, dtype, str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if side != "ours" else None,
            env=os.environ | ENVIRONMENT,
            text=True,
        )
        self.losses = self.take(NUM_BATCHES)["losses"]  # compiles, too

    def take(self, num_steps: int) -> dict:
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self) -> float:
        """Seconds per step, after steps for what a process loses while it waits: memory to the system, caches."""
        self.take(max(1, self.num_steps // 4))
        return self.take(self.num_steps)["seconds"] / self.num_steps

    def end(self) -> dict[str, float]:
        """Ends the process; -> its peak memory."""
        self.process.stdin.close()
        peaks = self._answer()
        self.process.wait()
        return peaks

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The side {self.name!r} ended with exit code {self.process.wait()}.")
        return json.loads(line)


def measure(size: str, dtype: str, weights: Path, *, peers: tuple[str, ...], rounds: int) -> dict:
    """The figures of one size and dtype."""
    peer = fastest(size, dtype, weights, peers)
    ours = Side("ours", size, dtype, weights)
    differences = [abs(a / b - 1) for a, b in zip(ours.losses, peer.losses, strict=True)]
    print(
        f"  first losses, ours: {_listed(ours.losses)}\n  first losses, {peer.name}: {_listed(peer.losses)}",
        flush=True,
    )
    assert max(differences) < TOLERANCES[dtype], f"the sides do different work: {differences}"
    seconds = [(ours.round(), peer.round()) for _ in range(rounds)]
    our_peaks, peer_peaks = ours.end(), peer.end()
    return {
        "size": size,
        "dtype": dtype,
        "peer": peer.name,
        "milliseconds": 1e3 * statistics.median(mine for mine, _ in seconds),
        "peer_milliseconds": 1e3 * statistics.median(theirs for _, theirs in seconds),
        "ratio": statistics.median(theirs / mine for mine, theirs in seconds),
        "ratios": [round(theirs / mine, 3) for mine, theirs in seconds],
        "largest_difference_of_first_losses": max(differences),
        **our_peaks,
        **{f"peer_{key}": value for key, value in peer_peaks.items()},
        "memory_ratio": peer_peaks["peak_of_steps_mb"] / our_peaks["peak_of_steps_mb"],
    }


def fastest(size: str, dtype: str, weights: Path, peers: tuple[str, ...]) -> Side:
    """The other side's fastest variant; a round's time is the least of a few."""
    best, best_seconds = None, float("inf")
    for name in peers:
        side = Side(name, size, dtype, weights)
        seconds = min(side.round() for _ in range(TRIALS))
        print(f"  {name}: {1e3 * seconds:.1f} ms per step", flush=True)
        slower = side if seconds >= best_seconds else best
        if slower is not None:
            slower.end()
        if slower is not side:
            best, best_seconds = side, seconds
    return best


def _listed(losses: list[float]) -> str:
    return " ".join(f"{loss:.5f}" for loss in losses)


def _line(row: dict) -> str:
    return (
        f"{row['size']:<6}{NAMES[row['dtype']]:<6}{row['milliseconds']:>9.1f}{row['peer_milliseconds']:>9.1f}"
        f"  {row['peer']:<9}{row['ratio']:>6.2f}{row['peak_of_steps_mb']:>9.0f}{row['peer_peak_of_steps_mb']:>9.0f}"
        f"{row['memory_ratio']:>7.2f}"
    )


def main() -> None:
    """Prints the table and, if asked, the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--sizes", type=several(*WORKLOADS), default=["tiny", "small"], help=",".join(WORKLOADS)
    )
    parser.add_argument("--dtypes", type=several(*NAMES), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument(
        "--peers", type=several(*PEERS), default=PEERS, help="variants of the other side to choose from"
    )
    arguments = parser.parse_args()
    peers = tuple(arguments.peers)
    if "compiled" in peers and not shutil.which("g++"):
        print("torch.compile needs a C++ compiler and there is none: it is left out")
        peers = tuple(name for name in peers if name != "compiled")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in arguments.sizes:
            weights = Path(scratch) / size
            write_weights(WORKLOADS[size], weights)
            for dtype in arguments.dtypes:
                print(f"{size} {dtype}", flush=True)
                rows.append(measure(size, dtype, weights, peers=peers, rounds=arguments.rounds))
    print(f"{'':12}  ours ms  peer ms  {'peer':<9} ratio  ours MB  peer MB  ratio")
    for row in rows:
        print(_line(row), flush=True)
    if arguments.json:
        print(json.dumps(summary(rows)))


def summary(rows: list[dict]) -> dict:
    """The lowest ratio of each dtype over all sizes, and all rows."""
    ratios = {}
    for row in rows:
        key = f"ratio_{NAMES[row['dtype']]}"
        ratios[key] = min(ratios.get(key, float("inf")), row["ratio"])
    return ratios | {"rows": rows}


if __name__ == "__main__":
    main()
