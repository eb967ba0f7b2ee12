"""python -m benchmarks.kill [--kills=N] [--points] [--json]: kill -9 at random times, and what a restart makes of it.

A small recipe of two stages is trained once unbroken, then again and again while it is killed at seeded random times,
or with --points at every named point of a save. Every step's loss and the final weights must have the same bits.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from configs import quickstart
from llava_jax import checkpoint, metrics, trainer
from llava_jax.quickstart.dataset import prepare
from llava_jax.recipe import Recipe, parse
from llava_jax.saved_parameters import SavedParameters

STEPS, SAVE_STEPS = 24, 3
PRUNED = ".orbax-checkpoint-tmp"


def make_recipe(scratch: Path, num_stages: int = 2) -> Recipe:
    """The quickstart's last two stages, or the first of them, on 80 pictures, about two epochs long and saved often."""
    dataset = scratch / "dataset"
    prepare(str(dataset), num_train=80, num_dev=2, num_test=2)
    config = quickstart.get_config()
    config.prepare = None
    config.init.tokenizer = f"{dataset}/tokenizer.model"
    config.evaluate.path = config.export.layout = ""
    config.stages.finetune.train.accumulation_steps = 2
    config.stage_order = ("pretrain", "finetune")[:num_stages]
    for name in set(config.stages) - set(config.stage_order):
        del config.stages[name]
    for name, stage in config.stages.items():
        stage.data.update(path=f"{dataset}/{name}.json", image_folder=f"{dataset}/images", cache_dir="")
        stage.data.update(batch_size=8)
        stage.train.update(max_steps=STEPS, log_steps=1)
        stage.checkpoint.save_steps = SAVE_STEPS
    return parse(config)


@dataclasses.dataclass
class Killer:
    """Kills its own process at the n-th time that a point is reached."""

    countdown: int

    def __call__(self) -> None:
        self.countdown -= 1
        if self.countdown <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _around(module, name: str, before: Callable = lambda *_: None, after: Callable = lambda *_: None) -> None:
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        before(*args)
        result = original(*args, **kwargs)
        after(*args)
        return result

    setattr(module, name, wrapped)


def _rename(die: Killer, is_pruned: bool) -> None:
    def after(source, destination):
        source, destination = (os.path.basename(os.fspath(path)) for path in (source, destination))
        if (source if is_pruned else destination).isdecimal() and PRUNED in source + destination:
            die()

    _around(os, "rename", after=after)


def _half_deleted(die: Killer) -> None:
    def before(path, *_):
        if PRUNED in str(path) and (Path(path) / "digests.json").exists():
            next(Path(path).rglob("manifest.ocdbt")).unlink()
            die()

    _around(shutil, "rmtree", before=before)


def _half_digests(die: Killer) -> None:
    def after(directory):
        os.truncate(directory / "digests.json", 100)
        die()

    _around(checkpoint, "write_digests", after=after)


def _half_row(die: Killer) -> None:
    def before(log, file):
        file.write(log.unwritten.encode()[:20])
        die()

    _around(metrics.MetricsLog, "_write", before=before)


def _row_replaced(die: Killer) -> None:
    _around(os, "replace", before=lambda source, _: die() if "metrics.jsonl" in str(source) else None)


POINTS = {
    "a row of the log half written": _half_row,
    "the log rewritten, not yet in place": _row_replaced,
    "a save asked for": lambda die: _around(checkpoint.Checkpoints, "save", before=lambda *_: die()),
    "a save started": lambda die: _around(checkpoint.Checkpoints, "save", after=lambda *_: die()),
    "files written, no digests": lambda die: _around(checkpoint, "write_digests", before=lambda *_: die()),
    "digests half written": _half_digests,
    "digests written, not renamed": lambda die: _around(checkpoint, "write_digests", after=lambda *_: die()),
    "checkpoint renamed": partial(_rename, is_pruned=False),
    "an old one renamed": partial(_rename, is_pruned=True),
    "an old one half deleted": _half_deleted,
    "a stage's last checkpoint saved": lambda die: _around(
        checkpoint.Checkpoints, "finish", after=lambda *_: die()
    ),
}


def start(work: Callable[[], None], log: Path) -> int:
    """Calls work() in a process of its own, whose output goes to `log`; -> its id.

    It is forked before JAX has started anything, which saves the seconds of importing it.
    """
    if process := os.fork():
        return process
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(process: int, kill_after: float | None = None) -> bool:
    """Whether the process ended by itself, with exit code 0, before it was killed."""
    deadline = time.monotonic() + kill_after if kill_after is not None else None
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if deadline and time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"a run ended with {os.waitstatus_to_exitcode(status)}; see its log")
    return True


def rows(workdir: Path) -> dict[tuple[str, int], dict]:
    """The rows of the log by stage and step."""
    return {(row["stage"], row["step"]): row for row in metrics.MetricsLog(workdir / "metrics.jsonl").rows()}


def write_weights(recipe: Recipe, workdir: Path) -> None:
    """Writes the SHA-256 of each stage's final weights to `weights.json` beside `workdir`."""
    digests = {}
    for stage in recipe.stages:
        directory = workdir / "checkpoints" / stage
        leaves = SavedParameters(directory, next(checkpoint.verified_steps(directory))).leaves()
        digest = hashlib.sha256()
        for name in sorted(leaves):
            digest.update(name.encode() + leaves[name].read().tobytes())
        digests[stage] = digest.hexdigest()
    metrics.write_json(workdir.with_name(f"{workdir.name}.weights.json"), digests)


def train(recipe: Recipe, workdir: Path, point: str = "", count: int = 1) -> None:
    """Trains or continues; dies when `point` is reached for the `count`-th time."""
    if point:
        POINTS[point](Killer(count))
    trainer.run(recipe, workdir)


def differences(recipe: Recipe, whole: Path, broken: Path) -> int:
    """How many steps have another loss, and stages other final weights, in two finished runs."""
    for workdir in (whole, broken):
        if not wait(start(partial(write_weights, recipe, workdir), workdir.with_name("weights.log"))):
            raise RuntimeError("killed from outside")
    weights = [
        json.loads(path.with_name(f"{path.name}.weights.json").read_text()) for path in (whole, broken)
    ]
    expected, found = rows(whole), rows(broken)
    if len(expected) != STEPS * len(recipe.stages):
        raise RuntimeError(f"the unbroken run logged {len(expected)} steps")
    keys = ("loss", "grad_norm", "num_supervised_tokens")
    steps = [
        step
        for step in expected.keys() | found.keys()
        if any(expected.get(step, {}).get(key) != found.get(step, {}).get(key) for key in keys)
    ]
    return len(steps) + sum(weights[0][stage] != weights[1][stage] for stage in recipe.stages)


def measure(
    scratch: Path, num_kills: int, seed: int, points: list[tuple[str, int]], num_stages: int = 2
) -> dict:
    """Kills at `num_kills` random times, then at each of `points`; every broken run goes on until it is finished."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(scratch / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    recipe = make_recipe(scratch, num_stages)
    log = scratch / "log.txt"
    whole = scratch / "whole"
    wait(start(partial(train, recipe, whole), log))  # fills the compilation cache
    shutil.rmtree(whole)
    began = time.monotonic()
    wait(start(partial(train, recipe, whole), log))
    seconds = time.monotonic() - began

    random_times = random.Random(seed)
    kills, runs, differing, max_lost = 0, 0, 0, 0
    points = list(points)
    while kills < num_kills or points:
        broken = scratch / f"broken_{runs}"
        finished = False
        while not finished:
            if kills < num_kills:
                process = start(partial(train, recipe, broken), log)
                finished = wait(process, random_times.uniform(0.0, seconds))
            elif points:
                anew = not broken.exists()
                finished = wait(start(partial(train, recipe, broken, *points[0]), log))
                if not finished or anew:  # else the run was too far to reach it
                    points.pop(0)
            else:
                finished = wait(start(partial(train, recipe, broken), log))
            kills += not finished
            max_lost = max(max_lost, _reached(broken) - _saved(broken))
        differing += differences(recipe, whole, broken)
        runs += 1
        shutil.rmtree(broken)
    return {
        "kills": kills,
        "differing_steps": differing,
        "max_lost_steps": max_lost,
        "runs": runs,
        "steps_per_run": STEPS * len(recipe.stages),
        "save_steps": SAVE_STEPS,
    }


def _reached(workdir: Path) -> int:
    return len(rows(workdir))


def _saved(workdir: Path) -> int:
    """Steps that a restart need not do again."""
    return sum(
        max(checkpoint.saved_steps(workdir / "checkpoints" / stage), default=0)
        for stage in ("pretrain", "finetune")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="then also at each named point of a save")
    parser.add_argument("--stages", type=int, default=2, choices=(1, 2))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    points = [(point, count) for point in POINTS for count in (1, 2)] if args.points else []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = measure(Path(scratch), args.kills, args.seed, points, args.stages)
        except RuntimeError:
            print((Path(scratch) / "log.txt").read_text()[-3000:], file=sys.stderr)
            raise
    print(f"{'kills':>8} {'runs':>6} {'differing steps':>16} {'most steps lost by a kill':>26}")
    print(
        f"{result['kills']:>8} {result['runs']:>6} {result['differing_steps']:>16} {result['max_lost_steps']:>26}"
    )
    if args.json:
        print(json.dumps(result))
    if result["differing_steps"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
