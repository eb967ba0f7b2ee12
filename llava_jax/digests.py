"""The digests of a directory's files: written when it is complete, compared before it is used."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGESTS = "digests.json"
_THREADS = 4  # SHA-256 takes 2 GB/s on one core; the files may come faster


def write_digests(directory: Path) -> None:
    """Writes `digests.json`: {file: [bytes, SHA-256 in hexadecimal]} of all files in `directory`."""
    names = _files(directory)
    digests = dict(zip(names, _digests(directory, names), strict=True))
    (directory / DIGESTS).write_text(json.dumps(digests, indent=0))


def find_damage(
    directory: Path, *, later: Iterable[str] = (), process_index: int = 0, process_count: int = 1
) -> str | None:
    """The first file that is not as `write_digests` found it, and what is wrong with it; None if all are.

    later: names of files that may have been added or changed since. Of several processes each reads its share.
    """
    try:
        expected = {
            name: tuple(entry) for name, entry in json.loads((directory / DIGESTS).read_text()).items()
        }
        found = set(_files(directory)) - {DIGESTS, *later}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{DIGESTS} cannot be read ({error})"
    for name in later:
        expected.pop(name, None)
    differing = sorted(expected.keys() ^ found)
    if differing:
        return f"{differing[0]} {'is missing' if differing[0] in expected else 'does not belong there'}"
    names = sorted(expected)[process_index::process_count]
    try:
        wrong = [n for n, d in zip(names, _digests(directory, names), strict=True) if d != expected[n]]
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    return f"{wrong[0]} has changed" if wrong else None


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _digests(directory: Path, names: list[str]) -> list[tuple[int, str]]:
    def digest(name: str) -> tuple[int, str]:
        with (directory / name).open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), value

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(digest, names))
