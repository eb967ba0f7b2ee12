"""Runs the pickle of a torch.save file of plain tensors; whatever else a pickle can do is refused.

A pickle is a program for a small stack machine. This one knows the instructions that torch.save writes and
calls nothing but the three constructors below, so no file can run code, and the work and memory that one can
cost are bounded by its length.
"""

import dataclasses
import math
import pickletools
from pickle import UnpicklingError
from typing import BinaryIO

# torch's storage classes -> the dtype of their elements (torch/storage.py, _dtype_to_storage_type_map).
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MAX_DIMENSIONS = 64  # of torch and of numpy


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of `size` elements; `key` says where in the file it lies."""

    dtype: str
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, `offset` and `strides` in elements. It lies inside its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    """A class or function that the pickle names; nothing is imported."""

    name: str


class _Mark:
    """Where the arguments of the next instruction begin on the stack."""


def run_pickle(program: BinaryIO) -> object:
    """Runs one pickle from where `program` stands to its end, and leaves it there.

    Gives None, bool, int, float, str, tuple, list, dict (for OrderedDict too), Storage and StoredTensor.
    Raises pickle.UnpicklingError, which says what is refused or broken.
    """
    try:
        return _run(program)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UnpicklingError(f"its pickle is broken: {str(error)[:200]}") from error


def _run(program: BinaryIO) -> object:
    stack, memo = [], {}
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_Mark)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[i] for i in range(-count, 0))]
            case "APPEND":
                _append(stack, [stack.pop()])
            case "APPENDS":
                _append(stack, _pop_to_mark(stack))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack, [key, value])
            case "SETITEMS":
                _set_items(stack, _pop_to_mark(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(f"{module} {name}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                _build(stack.pop(), stack[-1])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "STOP":
                return stack.pop()
            case _:
                raise UnpicklingError(f"its pickle has the instruction {opcode.name}, which no tensor needs")


def _pop_to_mark(stack: list) -> list:
    place = len(stack) - 1
    while stack[place] is not _Mark:
        place -= 1
        if place < 0:
            raise ValueError("arguments without a beginning")
    arguments = stack[place + 1 :]
    del stack[place:]
    return arguments


def _append(stack: list, values: list) -> None:
    if type(stack[-1]) is not list:
        raise TypeError("something is appended to what is no list")
    stack[-1].extend(values)


def _set_items(stack: list, items: list) -> None:
    """Keys are short of anything whose hash or comparison could take long."""
    if type(stack[-1]) is not dict or len(items) % 2:
        raise TypeError("items are set in what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise TypeError(f"a dictionary has a {type(key).__name__} as a key")
        stack[-1][key] = value


def _name(name: str) -> _Global:
    """`name`: module and attribute with a space between, as pickles spell it."""
    module, _, attribute = name.partition(" ")
    if name in _CALLS or (module == "torch" and attribute in _STORAGES):
        return _Global(name)
    raise UnpicklingError(
        f"it asks for {name.replace(' ', '.')[:100]!r}, and anything but plain tensors could run code"
    )


def _call(function: object, arguments: object) -> object:
    if type(function) is not _Global or function.name not in _CALLS or type(arguments) is not tuple:
        raise TypeError("something is called that is no constructor of a tensor")
    return _CALLS[function.name](*arguments)


def _build(state: object, target: object) -> None:
    """A state_dict carries its modules' versions as attributes, which say nothing about its tensors."""
    if type(target) is not dict or type(state) is not dict:
        raise TypeError("attributes are set on what is no dictionary")


def _storage(identity: object) -> Storage:
    kind, storage, key, _, size, *view = identity
    if kind != "storage" or type(storage) is not _Global or storage.name in _CALLS or type(key) is not str:
        raise TypeError("it refers to something outside that is no storage")
    if view not in ([], [None]):
        raise UnpicklingError("it holds storages that are parts of others, as torch wrote before 0.4")
    (size,) = _sizes((size,))
    return Storage(_STORAGES[storage.name.removeprefix("torch ")], key, size)


def _ordered_dict() -> dict:
    return {}


def _rebuild_tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> StoredTensor:
    """requires_grad and hooks mean nothing to a file, metadata (conjugate views) would change the values."""
    if type(storage) is not Storage or metadata:
        raise TypeError("a tensor has no storage or has metadata")
    (offset,), shape, strides = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= storage.size:
        raise ValueError(
            f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.size} elements"
        )
    if count > storage.size:
        raise UnpicklingError(
            f"a tensor of shape {list(shape)} repeats the {storage.size} elements of its storage; "
            "save its .contiguous()"
        )
    return StoredTensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise TypeError("a parameter is no tensor")
    return tensor


_CALLS = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}


def _sizes(values: object) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError("a size, an offset or a stride is no integer of 64 bits")
    return values
