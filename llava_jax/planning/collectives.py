"""What devices exchange in a compiled program, read from its HLO text."""

import dataclasses
import functools
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "send",  # between slices
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step: how many, and the bytes of what a device has whole before or after them."""

    count: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def kind(self) -> str | None:
        kind = self.opcode.removesuffix("-start")
        return kind if kind in KINDS else None

    @property
    def chain(self) -> str | None:
        """Of a collective that TPU's compiler has spread over several fusions, each of which spells it: its number."""
        found = re.search(r'\bchain_id="(\d+)"', self.rest)
        return found and found[1]

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        names = _CALLED.findall(self.rest)
        return names + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])


def read_collectives(hlo: str) -> tuple[dict[str, Traffic], int]:
    """Collectives by kind, loops multiplied in, and how many of them are in loops of unknown length, counted once.

    hlo: the text of a compiled module.
    """
    program = _Program(hlo)
    counts = {kind: [0, 0] for kind in KINDS}
    num_unknown = 0
    for instruction, operand_bytes, times, known in program.collectives():
        count = counts[instruction.kind]
        count[0] += times
        count[1] += times * _size(instruction, operand_bytes)
        num_unknown += not known
    return {kind: Traffic(*count) for kind, count in counts.items() if count[0]}, num_unknown


class _Program:
    def __init__(self, hlo: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        for line in hlo.splitlines():
            begin = _COMPUTATION.match(line)
            if begin:
                current = self._computations.setdefault(begin[2], {})
                if begin[1]:
                    self._entry = begin[2]
                continue
            found = _INSTRUCTION.match(line)
            if found:
                current[found[1]] = _Instruction(*found.groups())

    def collectives(self) -> Iterator[tuple[_Instruction, int, int, bool]]:
        """Each collective, the bytes of its operands, how often it runs, and whether that is known."""
        return self._visit(self._entry, 1, True, set())

    def _visit(self, name: str, times: int, known: bool, seen: set) -> Iterator:
        """`seen`: the chains met so far, some of which go on in loops after the one that began them.

        Channels do not tell collectives apart: all of shard_map's have number 1.
        """
        computation = self._computations.get(name, {})
        for instruction in computation.values():
            if instruction.kind:
                if instruction.chain is None or instruction.chain not in seen:
                    seen.add(instruction.chain)
                    operands = (computation[o].type for o in instruction.operands if o in computation)
                    yield instruction, sum(map(_num_bytes, operands)), times, known
            elif instruction.opcode == "while":
                trips = self._trip_count(instruction)
                for called in instruction.called:
                    yield from self._visit(called, times * (trips or 1), known and trips is not None, seen)
            elif instruction.opcode not in ("async-update", "async-done"):
                for called in instruction.called:
                    yield from self._visit(called, times, known, seen)

    def _trip_count(self, loop: _Instruction) -> int | None:
        """As the compiler noted it, or from the constants that the loop's counter is compared with and grows by."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if noted:
            return int(noted[1])
        condition = self._computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]]
        compare = list(condition.values())[-1]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter, limit = (condition.get(operand) for operand in compare.operands)
        limit = _constant(limit)
        return limit and -(-limit // self._growth(loop, counter))

    def _growth(self, loop: _Instruction, counter: _Instruction) -> int:
        """What is added to a loop's counter in each turn: 1 unless the loop was unrolled."""
        body = self._computations[re.search(r"\bbody=%?([\w.\-]+)", loop.rest)[1]]
        index = re.search(r"\bindex=(\d+)", counter.rest)
        root = list(body.values())[-1]
        grown = index and root.opcode == "tuple" and body.get(root.operands[int(index[1])])
        if not grown or grown.opcode != "add":
            return 1
        return next(filter(None, (_constant(body.get(operand)) for operand in grown.operands)), 1)


def _constant(instruction: _Instruction | None) -> int | None:
    found = instruction and instruction.opcode == "constant" and re.match(r"(\d+)\)", instruction.rest)
    return int(found[1]) if found else None


def _size(instruction: _Instruction, operand_bytes: int) -> int:
    """The larger of what goes in and what comes out; an asynchronous start gives both as its result."""
    # Of these the result holds what their ends need, too.
    if instruction.opcode in ("send", "collective-permute-start"):
        return operand_bytes
    result = _num_bytes(instruction.type)
    if instruction.opcode.endswith("-start"):
        result -= operand_bytes
    return max(result, operand_bytes)


@functools.cache
def _num_bytes(type: str) -> int:
    total = 0
    for dtype, bits, dimensions in _ARRAY.findall(type):
        size = 8 if dtype == "pred" else int(bits)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += -(-size // 8)
    return total
