"""Where the time of a step goes, by kind of work: the operations in a trace of it, told apart by its compiled program."""

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

KINDS = ("matmul", "attention", "loss", "optimizer", "norm, elementwise", "copies", "other")
# The files of ours from which an operation stems, the innermost first.
_ROOMS = (
    ("attention", ("kernels/einsum_attention", "kernels/flash_", "kernels/splash", "kernels/attention")),
    ("loss", ("kernels/cross_entropy",)),
    ("optimizer", ("llava_jax/optimizers/", "llava_jax/optimizer.py", "/optax/")),
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_MATMULS = ("cublas", "gemm", "matmul", "onednn", "convolution", "conv$")
_COPIES = {
    "copy", "copy-start", "copy-done", "transpose", "bitcast", "slice", "concatenate", "pad", "gather", "reshape",
    "dynamic-slice", "dynamic-update-slice", "broadcast", "parameter", "constant", "tuple", "get-tuple-element",
    "iota", "convert", "async-start", "async-done",
}  # fmt: skip
_LOOPS = {"while", "conditional", "call"}  # their time is that of what they run


def kinds(hlo: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program, by its name; none for loops."""
    frames = _Frames(hlo)
    computations, name = defaultdict(list), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
        elif match := _INSTRUCTION.match(line):
            computations[name].append((match[1], match[2], match[3]))
    found = {}
    for instructions in computations.values():
        for instruction, opcode, rest in instructions:
            if opcode not in _LOOPS:
                found[instruction] = _kind(opcode, rest, computations, frames)
    return found


def _kind(opcode: str, rest: str, computations: dict, frames: "_Frames") -> str:
    inside = [(opcode, rest)]
    if called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest):
        inside += [(own_opcode, own) for _, own_opcode, own in computations[called[1]]]
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    name = target[1] if target else ""
    if "fmha" in name or "mosaic_gpu" in name:
        return "attention"
    for text in (own for _, own in inside):
        if room := frames.room(text):
            return room
    opcodes = {own for own, _ in inside} - {"fusion"}
    if opcodes & {"dot", "convolution"} or any(word in name for word in _MATMULS):
        return "matmul"
    if opcodes <= _COPIES:
        return "copies"
    return "other" if opcode == "custom-call" else "norm, elementwise"


class _Frames:
    """Which of our files each stack frame of a program lies in."""

    def __init__(self, hlo: str):
        section = lambda name, row: re.findall(
            row, hlo.partition(f"\n{name}\n")[2].partition("\n\n")[0], re.M
        )
        files = dict(section("FileNames", r'^(\d+) "(.*)"$'))
        locations = dict(section("FileLocations", r"^(\d+) \{file_name_id=(\d+)"))
        rows = section("StackFrames", r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
        self.frames = {frame: (files.get(locations.get(at)), parent) for frame, at, parent in rows}

    def room(self, text: str) -> str:
        """The kind that an instruction's origin says; "" if none."""
        frame = re.search(r"stack_frame_id=(\d+)", text)
        return self._room_of(frame[1]) if frame else ""

    def _room_of(self, frame: str) -> str:
        seen = set()
        while frame in self.frames and frame not in seen:
            seen.add(frame)
            file, frame = self.frames[frame]
            for kind, parts in _ROOMS:
                if file and any(part in file for part in parts):
                    return kind
        return ""


def profiled(run: Callable[[], None], num_steps: int, hlo: str, directory: Path) -> dict[str, float]:
    """Milliseconds per step by kind, of `run` with that many steps of the program, and the "gaps" in which the device
    was idle. The trace stays in the directory."""
    shutil.rmtree(directory, ignore_errors=True)
    with jax.profiler.trace(str(directory)):
        run()
    (file,) = directory.rglob("*.xplane.pb")
    lines = device_lines(jax.profiler.ProfileData.from_file(str(file)))
    return {kind: 1e-6 * time / num_steps for kind, time in by_kind(lines, kinds(hlo)).items()}


def device_lines(data) -> list[list[tuple[str, float, float]]]:
    """Of a trace, each stream's operations as (name in the program, begin, end) in nanoseconds."""
    devices = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in devices for line in plane.lines if line.name.startswith("Stream")]
    if not devices:  # on a CPU operations run on threads of the host
        lines = [line for plane in data.planes if plane.name == "/host:CPU" for line in plane.lines]
    found = []
    for line in lines:
        events = [(dict(event.stats), event) for event in line.events]
        found.append(
            [
                (str(stats.get("hlo_op", event.name)), event.start_ns, event.start_ns + event.duration_ns)
                for stats, event in events
                if devices or "hlo_op" in stats
            ]
        )
    return [line for line in found if line]


def by_kind(lines: Iterable[list[tuple[str, float, float]]], kind_of: dict[str, str]) -> dict[str, float]:
    """Nanoseconds by kind. An operation that runs others counts for the rest of its time, and loops not at all; where
    streams run beside each other their times add up. "gaps" is when none of them ran."""
    found = dict.fromkeys((*KINDS, "gaps"), 0.0)
    busy = []
    for line in lines:
        for name, begin, end, own in _own_times(line):
            kind = kind_of.get(name) or _kind_of_kernel(name)
            if kind:
                found[kind] += own
                busy.append((begin, end))
    found["gaps"] = _idle(busy)
    return found


def _own_times(line: list[tuple[str, float, float]]) -> list[list]:
    """[name, begin, end, the time that is not of others within]."""
    found, open_ones = [], []
    for name, begin, end in sorted(line, key=lambda event: (event[1], -event[2])):
        while open_ones and open_ones[-1][2] <= begin:
            open_ones.pop()
        if open_ones:
            open_ones[-1][3] -= end - begin
        entry = [name, begin, end, end - begin]
        open_ones.append(entry)
        found.append(entry)
    return found


def _kind_of_kernel(name: str) -> str:
    """Of what the program does not name: a kernel's own name, or a loop, which has no kind."""
    lower = name.lower()
    if any(word in lower for word in ("gemm", "nvjet", "cutlass", "xmma")):
        return "matmul"
    if any(word in lower for word in ("fmha", "flash", "cudnn")):
        return "attention"
    if "memcpy" in lower or "memset" in lower:
        return "copies"
    return "" if lower.startswith(tuple(_LOOPS)) else "other"


def _idle(busy: list[tuple[float, float]]) -> float:
    idle, until = 0.0, None
    for begin, end in sorted(busy):
        if until is not None and begin > until:
            idle += begin - until
        until = end if until is None else max(until, end)
    return idle
