"""Arrays that are kept from run to run, because working them out takes long."""

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np


def cache_path(cache_dir: str, kind: str, *key: object) -> Path:
    """Where results of this kind for this key are kept; the key is plain JSON data and arrays."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(
            part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode()
        )
    return Path(cache_dir).expanduser() / f"{kind}-{digest.hexdigest()[:32]}.npz"


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote; None if it is not there or damaged."""
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"{path} is damaged; it is made anew.", flush=True)
        return None


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes them at once, so that nobody reads half of them; where that is not possible, says so and goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            np.savez(whole, **arrays)
            whole.replace(path)
    except OSError as error:
        print(
            f"{path.name} cannot be kept in {path.parent} ({error.strerror}); set data.cache_dir to another "
            "directory, or every start makes it again.",
            flush=True,
        )
