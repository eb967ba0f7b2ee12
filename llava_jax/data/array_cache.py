"""Arrays that are kept from run to run, because working them out takes long."""

import errno
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

_DIGEST_SIZE = 32  # bytes of SHA-256, in front of the arrays


def cache_path(cache_dir: str, kind: str, *key: object) -> Path:
    """Where results of this kind for this key are kept; the key is plain JSON data and arrays."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(
            part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode()
        )
    return Path(os.path.expanduser(cache_dir)) / f"{kind}-{digest.hexdigest()[:32]}"


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote; None if it is not there, or with a message if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}); it is made anew.", flush=True)
        return None
    digest, content = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        print(f"{path} is damaged; it is made anew.", flush=True)
        return None
    with np.load(io.BytesIO(content)) as file:
        return dict(file)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes them at once, so that nobody reads half of them; where that is not possible, says so and goes on."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        if str(path).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "this user has no home directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may write the same at the same time: each has a file of its own until it is whole.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_bytes(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
            whole.replace(path)
    except OSError as error:
        print(
            f"{path.name} cannot be kept in {path.parent} ({error.strerror}); set data.cache_dir to another "
            "directory, or every start makes it again.",
            flush=True,
        )
