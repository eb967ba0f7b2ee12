"""Arrays in an orbax checkpoint, written and read in parts: orbax itself handles only whole ones."""

import functools
import math
from pathlib import Path

import numpy as np

from llava_jax.convert.errors import ConversionError
from llava_jax.convert.progress import Progress
from llava_jax.convert.source import Index, Leaf, read_ahead

# Arrays are stored in tiles of at most this size, the least that can be read alone.
_TILE_BYTES = 4 * 2**20
# As orbax sets them: small metadata inside the tree's nodes, few nodes, one writer.
_OCDBT = {
    "config": {
        "max_inline_value_bytes": 1024,
        "max_decoded_node_bytes": 100_000_000,
        "manifest_kind": "single",
    },
    "assume_config": True,
}


def save(directory: Path, leaves: dict[str, Leaf], progress: Progress) -> None:
    """Saves `leaves` as the PyTree checkpoint {name: array} that plain orbax restores. Holds a few parts.

    Orbax decides names, metadata and that the checkpoint appears whole or not at all; only the bytes of the
    arrays are written here.
    """
    import orbax.checkpoint as ocp  # slow to import

    context = _context()

    class LeafHandler(ocp.type_handlers.NumpyHandler):
        """Saves a Leaf as the numpy array that it stands for; restoring needs nothing special."""

        async def serialize(self, values, infos, args=None):
            for leaf, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                _write(Path(info.parent_dir), info.name, leaf, context, progress)
            return []

    registry = ocp.type_handlers.create_type_handler_registry((Leaf, LeafHandler(deepcopy_host_arrays=False)))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(leaves))


def _write(directory: Path, name: str, leaf: Leaf, context, progress: Progress) -> None:
    import tensorstore as ts  # slow to import

    metadata = {
        "shape": leaf.shape,
        "chunks": _tile(leaf.shape, leaf.dtype.itemsize),
        "dtype": leaf.dtype.name if leaf.dtype.name == "bfloat16" else leaf.dtype.str,
        "compressor": None,  # weights hardly shrink, and it costs more time than the disk
    }
    spec = _spec(directory, name, _OCDBT) | {"metadata": metadata}
    written = ts.open(spec, context=context, create=True)
    store = _result(written, name)
    parts = leaf.parts()
    for index, values in zip(parts, read_ahead(leaf, parts), strict=True):
        _result(written, name)
        written = store[index].write(values, can_reference_source_data_indefinitely=True).commit
        written.force()  # starts now, not when it is waited for
        progress(values.nbytes)
    _result(written, name)


def _result(future, name: str):
    try:
        return future.result()
    except ValueError as error:  # what tensorstore makes of a full disk
        raise OSError(f"{name} cannot be written: {error}") from error


class StoredArrays:
    """The arrays of a checkpoint that `save` or orbax wrote."""

    def __init__(self, directory: Path):
        self._directory = directory.resolve()  # tensorstore takes no `..`
        self._store = functools.cache(self._open)  # opening one reads the tree again

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A part of an array; only the tiles that it touches are read. Raises ConversionError."""
        try:
            return self._store(name)[index].read().result()
        except (ValueError, OSError, KeyError) as error:
            raise ConversionError(
                f"{self._directory}: {name} cannot be read ({error}). If its files are damaged or "
                "missing, convert the model again."
            ) from error

    def _open(self, name: str):
        import tensorstore as ts  # slow to import

        return ts.open(_spec(self._directory, name), context=self._context, open=True).result()

    @functools.cached_property
    def _context(self):
        return _context()


def _context():
    import tensorstore as ts

    return ts.Context(
        {
            "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},  # the tree's nodes, not the arrays
            "file_io_sync": False,  # the whole directory is synchronised when it is complete
        }
    )


def _spec(directory: Path, name: str, options: dict | None = None) -> dict:
    base = {"driver": "file", "path": f"{directory}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
    return {
        "driver": "zarr",
        "kvstore": kvstore | (options or {}),
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,  # a lost tile is an error, not zeros
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def _tile(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """`shape`, halved until a tile is small: first to single layers, then its longest side."""
    tile = list(shape)
    while math.prod(tile) * itemsize > _TILE_BYTES:
        longest = 0 if len(tile) == 3 and tile[0] > 1 else tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tile
