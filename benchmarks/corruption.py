"""python -m benchmarks.corruption [--flips=N] [--json]: flips one bit of a checkpoint, and what a restart makes of it.

Each time a bit of some file of the newest of two checkpoints is flipped, with files drawn by their size; after that each of
its files is cut in half, and deleted. What is then restored must be the newest state or the one before, bit for bit.
`silent` counts the times it was anything else.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint import Checkpoints
from llava_jax.config import CheckpointConfig
from llava_jax.step import TrainState
from llava_jax.watchdog import Watchdog

NEWEST = 2


def make_state(step: int) -> TrainState:
    """Some arrays that do not compress, as weights do not."""
    draws = np.random.default_rng(step)
    trainable = {
        f"parameter.{i}": jnp.asarray(draws.normal(size=(64, 96)).astype(np.float32)) for i in range(3)
    }
    moments = {name: 2 * value for name, value in trainable.items()}
    return TrainState(jnp.int32(step), trainable, (jnp.int32(step), moments))


def open_checkpoints(directory: Path) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(), Watchdog(None))


def flip(path: Path, draws: random.Random) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    place = draws.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def restored_step(directory: Path) -> int | None:
    """The step of what is restored; None if those are not the bits that were saved of it."""
    with contextlib.closing(open_checkpoints(directory)) as checkpoints:
        path = checkpoints.starting_point(num_steps=10)
        expected = make_state(int(path.name))
        found = checkpoints.restore(path, jax.eval_shape(lambda: expected))
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), expected, found)
    return int(path.name) if all(jax.tree.leaves(equal)) else None


def measure(scratch: Path, num_flips: int, seed: int) -> dict[str, int]:
    """Damages copies of one directory of checkpoints, one after the other."""
    intact = scratch / "intact"
    with contextlib.closing(open_checkpoints(intact)) as checkpoints:
        for step in (1, NEWEST):
            checkpoints.save(make_state(step), {"step": step})
    draws = random.Random(seed)
    files = [path for path in sorted((intact / str(NEWEST)).rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]

    def try_out(path: Path, damage: Callable[[Path], None]) -> int | None:
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(intact, copy)
        damage(copy / path.relative_to(intact))
        with contextlib.redirect_stderr(io.StringIO()):
            return restored_step(copy)

    flipped = [
        try_out(path, lambda p: flip(p, draws)) for path in draws.choices(files, weights=sizes, k=num_flips)
    ]
    others = [try_out(path, damage) for path in files if path.stat().st_size for damage in (cut, Path.unlink)]
    return {
        "flips": len(flipped),
        "cuts_and_deletions": len(others),
        "silent": (flipped + others).count(None),
        "fell_back": sum(step == NEWEST - 1 for step in flipped + others),
        "restored_as_saved": sum(step == NEWEST for step in flipped + others),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), args.flips, args.seed)
    print("  ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.items()))
    if args.json:
        print(json.dumps(result))
    if result["silent"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
