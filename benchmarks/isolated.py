"""Rows of a benchmark, measured in processes of their own: what crashes, hangs or fills the memory takes no other along."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Beside torch JAX only prepares what it is given, and must not take the card.
TORCH_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclasses.dataclass(frozen=True)
class Child:
    """A process that prints its rows as JSON objects, a line each."""

    name: str
    command: tuple[str, ...]  # after `python -m`
    limit: float = 600.0  # seconds
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def collect(
    children: Iterable[Child],
    show: Callable[[dict], None],
    *,
    as_json: bool,
    finish: Callable[[list[dict]], None] = lambda rows: None,
    conditions: dict | None = None,
) -> dict:
    """Runs the children one after another and shows each row as it comes.

    -> {"conditions": what the children say of their devices and versions, "rows": [...]}, which with `as_json` is also
    printed, as a last line; that is printed of the rows there are if SIGTERM or an interrupt ends it before. `finish` sees
    all rows first, and may change them; `conditions` is filled as they come.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = {"conditions": {} if conditions is None else conditions, "rows": []}
    try:
        for child in children:
            for row in rows(child):
                if "conditions" in row:
                    result["conditions"].update(row["conditions"])
                    continue
                result["rows"].append(row)
                show(row)
    finally:
        finish(result["rows"])
        if as_json:
            print(json.dumps(result), flush=True)
        signal.signal(signal.SIGTERM, before)
    return result


def rows(child: Child) -> Iterator[dict]:
    """What the child prints; a row that says why in "failed" comes last if it does not end well, or in time."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *child.command],
            cwd=ROOT,
            env=os.environ | child.environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()
        timer = threading.Timer(child.limit, lambda: (late.set(), _kill(process)))
        timer.start()
        try:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
        if late.is_set():
            yield {"implementation": child.name, "failed": f"stopped after {child.limit:g} s"}
        elif process.returncode:
            errors.seek(0)
            yield {"implementation": child.name, "failed": _reason(errors.read(), process.returncode)}


def tell(**row) -> None:
    """Prints a row, in the child."""
    print(json.dumps(row), flush=True)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _reason(errors: str, returncode: int) -> str:
    """The error in the last lines of a traceback; all lines go to standard error."""
    print(errors[-4000:], file=sys.stderr)
    lines = [line for line in errors.splitlines() if line and not line.startswith(" ")]
    named = [line for line in lines if "Error" in line.partition(":")[0]]
    return f"exit {returncode}: {(named or lines or ['it says nothing'])[-1][:300]}"
