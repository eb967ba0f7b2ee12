"""Random access to the records of a JSON list or of JSONL, without holding them in memory."""

import dataclasses
import functools
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from llava_jax.errors import DataError

_CHUNK = 1 << 18  # bytes scanned at a time; larger chunks leave the CPU's cache and take twice as long
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"  # JSON's white space
_NEWLINE, _QUOTE, _COMMA, _BACKSLASH, _OPEN, _CLOSE = b'\n",\\{}'
_LOWER = 0x20  # the bit that turns [ into { and ] into }
_FOREIGN = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"\x89HDF": "HDF5"}


class JsonIndex:
    """The values of a JSON list or JSONL file (the content decides which), each decoded when it is asked for.

    Opening it scans the file once for where the values are; 16 bytes per value are kept. Only what concerns
    the list as a whole is checked then; a value is checked when it is decoded. `index[i]` and opening raise
    DataError with line and column of what is broken. `setting` names, for messages, who chose the file.
    """

    def __init__(self, path: str, setting: str = "data.path"):
        self.path = path
        self._setting = setting
        self._open()
        self._start = len(_BOM) if self._read(0, len(_BOM)) == _BOM else 0
        chunks = (chunk.tobytes().lstrip(_SPACE) for _, chunk in self._chunks(self._start))
        head = next(filter(None, chunks), b"")
        for magic, kind in _FOREIGN.items():
            if head.startswith(magic):
                raise DataError(f"{path}: is a {kind} file; convert it to JSON or JSONL.")
        self._is_list = head.startswith(b"[")
        self._begins, self._ends = self._scan_list() if self._is_list else self._scan_lines()

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> object:
        begin, end = int(self._begins[index]), int(self._ends[index])
        data = self._read(begin, end)
        self._require_unchanged(self._stamp)
        try:
            return json.loads(data.decode())
        except UnicodeDecodeError as error:
            self._raise_not_utf8(begin + error.start, error)
        except json.JSONDecodeError:
            self._raise_broken_value(data.decode(), begin)
        except (ValueError, RecursionError) as error:
            self._raise_unreadable(begin + len(data) - len(data.lstrip(_SPACE)), error)

    def line(self, index: int) -> int:
        """The line, counted from 1, on which a value begins."""
        begin, end = int(self._begins[index]), int(self._ends[index])
        data = self._read(begin, end)
        return self._line_and_column(begin + len(data) - len(data.lstrip(_SPACE)))[0]

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the file."""
        digest = hashlib.sha256()
        for _, chunk in self._chunks(0):
            digest.update(chunk)
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        stamp = self._stamp
        self._open()
        self._require_unchanged(stamp)

    def _open(self) -> None:
        try:
            mode = os.stat(self.path).st_mode
            can_open = stat.S_ISREG(mode) or stat.S_ISDIR(mode)  # a pipe would wait for who writes it
            self._file = open(self.path, "rb", buffering=0) if can_open else None  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path!r}: cannot be read ({reason}); check {self._setting}.") from error
        if self._file is None:
            raise DataError(
                f"{self.path!r}: is no regular file, which can be read in any order; save it as one."
            )
        weakref.finalize(self, self._file.close)
        self._stamp = self._look()

    def _look(self) -> tuple[int, int]:
        """The file's size and when it was changed."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _require_unchanged(self, stamp: tuple[int, int]) -> None:
        if self._look() != stamp:
            raise DataError(f"{self.path}: was changed while it is in use; start the run again.")

    def _read(self, begin: int, end: int) -> bytes:
        # Unlike a memory map, this leaves no pages behind and survives a file that shrinks.
        return os.pread(self._file.fileno(), end - begin, begin)

    def _chunks(self, begin: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (offset, writable uint8[<= _CHUNK]); the array is overwritten by the next."""
        buffer = bytearray(_CHUNK)
        while count := os.preadv(self._file.fileno(), [buffer], begin):
            yield begin, np.frombuffer(buffer, np.uint8, count)
            begin += count

    def _scan_list(self) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends int64[N] of what lies between the brackets and commas of the outermost list."""
        bounds, marks = [], _Marks()
        for begin, chunk in self._chunks(self._start):
            bounds.append(marks.find(chunk) + begin)
            if marks.closed:
                break
        bounds = np.concatenate(bounds)
        last = int(bounds[-1])
        if (
            not marks.closed
            or self._read(last, last + 1) != b"]"
            or not self._is_blank(last + 1, self._stamp[0])
        ):
            self._raise_broken_list()
        begins, ends = bounds[:-1] + 1, bounds[1:]
        if self._is_blank(int(begins[-1]), int(ends[-1])):
            if len(begins) > 1:  # a comma before the closing bracket
                self._raise_broken_list()
            begins, ends = begins[:0], ends[:0]
        return begins, ends

    def _scan_lines(self) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends int64[N] of the lines that hold more than white space."""
        newlines = [np.flatnonzero(chunk == _NEWLINE) + begin for begin, chunk in self._chunks(self._start)]
        ends = np.concatenate([*newlines, [self._stamp[0]]])
        begins = np.concatenate([[self._start], ends[:-1] + 1])
        # A filled line of usual length begins with its value; only the others have to be looked at.
        firsts = self._first_bytes(begins)
        blank = np.isin(firsts, np.frombuffer(_SPACE, np.uint8)) | (begins == ends)
        for line in np.flatnonzero(blank):
            blank[line] = self._is_blank(int(begins[line]), int(ends[line]))
        return begins[~blank], ends[~blank]

    def _first_bytes(self, begins: np.ndarray) -> np.ndarray:
        """The bytes uint8[N] at ascending offsets int64[N]; 0 behind the end of the file."""
        found = np.zeros(len(begins), np.uint8)
        for begin, chunk in self._chunks(self._start):
            here = slice(*np.searchsorted(begins, (begin, begin + len(chunk))))
            found[here] = chunk[begins[here] - begin]
        return found

    def _is_blank(self, begin: int, end: int) -> bool:
        return not any(
            self._read(at, min(at + _CHUNK, end)).strip(_SPACE) for at in range(begin, end, _CHUNK)
        )

    def _raise_broken_value(self, text: str, begin: int) -> NoReturn:
        """Words the error of a value in the list as a parser of the whole file would."""
        prefix, suffix = ("[", "]") if self._is_list else ("", "")
        try:
            json.loads(prefix + text + suffix)
        except json.JSONDecodeError as error:
            offset = begin + len(text[: error.pos - len(prefix)].encode())
            self._raise_broken(error, *self._line_and_column(offset))
        self._raise_broken_list()  # nothing between two commas

    def _raise_broken_list(self) -> NoReturn:
        """Parses the whole file, slowly, for the words to say what is broken."""
        data = b"".join(chunk.tobytes() for _, chunk in self._chunks(self._start))
        try:
            text = data.decode()
            json.loads(text)
        except UnicodeDecodeError as error:
            self._raise_not_utf8(self._start + error.start, error)
        except json.JSONDecodeError as error:
            self._raise_broken(error, error.lineno, error.colno)
        except (ValueError, RecursionError) as error:
            self._raise_unreadable(self._start, error)
        raise AssertionError(f"{self.path}: was found to be broken, but it is valid JSON")

    def _line_and_column(self, offset: int) -> tuple[int, int]:
        """Both count from 1; columns count characters."""
        line, line_begin = 1, self._start
        for begin, chunk in self._chunks(self._start):
            newlines = np.flatnonzero(chunk[: max(offset - begin, 0)] == _NEWLINE)
            if len(newlines):
                line, line_begin = line + len(newlines), begin + int(newlines[-1]) + 1
        characters = 0
        for begin, chunk in self._chunks(line_begin):
            characters += np.count_nonzero(chunk[: max(offset - begin, 0)] & 0xC0 != 0x80)  # UTF-8 heads
        return line, characters + 1

    def _raise_broken(self, error: json.JSONDecodeError, line: int, column: int) -> NoReturn:
        raise DataError(
            f"{self.path}:{line}:{column}: broken JSON ({error.msg}); the file should be a list of records, "
            "or hold one record per line."
        ) from error

    def _raise_not_utf8(self, offset: int, error: Exception) -> NoReturn:
        raise DataError(f"{self.path}: is not UTF-8 text (byte {offset}); save it as UTF-8.") from error

    def _raise_unreadable(self, offset: int, error: Exception) -> NoReturn:
        line, _ = self._line_and_column(offset)
        if isinstance(error, RecursionError):
            raise DataError(f"{self.path}:{line}: JSON nested too deeply to be read.") from error
        raise DataError(f"{self.path}:{line}: JSON that cannot be read ({error}).") from error


@dataclasses.dataclass
class _Marks:
    """Finds the brackets and commas of the outermost list, chunk by chunk.

    Strings, escapes and nesting are followed exactly in valid JSON. In broken JSON the pieces found between
    the marks may be wrong, but then not all of them decode: a list is valid if and only if its pieces are.
    """

    escaped: bool = False  # the next byte follows a backslash that is not escaped itself
    inside: bool = False  # a string
    depth: int = 0  # of brackets
    closed: bool = False  # depth is 0 again; what follows is not looked at

    def find(self, chunk: np.ndarray) -> np.ndarray:
        """chunk uint8[n], which is changed -> ascending offsets int64 of outermost brackets and commas."""
        self._blank_escaped(chunk)
        lowered = chunk | _LOWER
        is_mark = (chunk == _QUOTE) | (chunk == _COMMA) | (lowered == _OPEN) | (lowered == _CLOSE)
        marks = np.flatnonzero(is_mark)
        kinds = lowered[marks]  # quotes and commas have the bit already
        is_quote = kinds == _QUOTE
        quotes = np.cumsum(is_quote, dtype=np.uint8) + np.uint8(self.inside)  # only odd or even matters
        self.inside = bool(quotes[-1] & 1) if len(quotes) else self.inside
        outside = np.flatnonzero((quotes & 1 | is_quote) == 0)
        marks, kinds = marks[outside], kinds[outside]
        opens, closes = kinds == _OPEN, kinds == _CLOSE
        depth = self.depth + np.cumsum(opens.astype(np.int8) - closes, dtype=np.int64)
        outermost = (depth == 1) & ((kinds == _COMMA) | opens) | (depth == 0)
        if (depth == 0).any():
            self.closed = True
            last = np.argmax(depth == 0)
            return marks[: last + 1][outermost[: last + 1]]
        self.depth = int(depth[-1]) if len(depth) else self.depth
        return marks[outermost]

    def _blank_escaped(self, chunk: np.ndarray) -> None:
        """Overwrites escaped bytes, so that no escaped quote counts."""
        if self.escaped:
            chunk[0] = 0
        backslashes = np.flatnonzero(chunk == _BACKSLASH)
        self.escaped = False
        if not len(backslashes):
            return
        is_first = np.diff(backslashes, prepend=-2) != 1  # of a run of backslashes
        firsts = np.flatnonzero(is_first)
        lasts = np.append(firsts[1:], len(backslashes)) - 1
        behind = (backslashes[lasts] + 1)[(lasts - firsts) % 2 == 0]  # runs of odd length escape
        if len(behind) and behind[-1] == len(chunk):
            self.escaped = True
            behind = behind[:-1]
        chunk[behind] = 0
