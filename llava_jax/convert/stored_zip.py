"""Where the entries of a zip file without compression lie, so that parts of them can be read in place."""

import dataclasses
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

# PKWARE's APPNOTE.TXT, 4.3.7: a local header is 30 bytes, the lengths of name and extra field its last two.
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Bytes `begin` to `end` of the file."""

    begin: int
    end: int
    crc: int  # CRC-32


def zip_entries(path: Path) -> dict[str, Entry]:
    """The entries by name. Raises zipfile.BadZipFile, which says what is wrong.

    Refused are entries that are compressed, encrypted, of one name, or that share bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            end = archive.start_dir
            entries = {}
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset, reverse=True):
                if info.filename in entries:
                    raise zipfile.BadZipFile(f"it has two entries {info.filename!r}")
                entries[info.filename] = _entry(file, info, end)
                end = info.header_offset
            return entries
    except (NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise zipfile.BadZipFile(str(error)) from error


def _entry(file: BinaryIO, info: zipfile.ZipInfo, limit: int) -> Entry:
    """`limit`: where the next entry, or the list of all of them, begins."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"its entry {info.filename!r} is compressed, as torch.save never does")
    if info.flag_bits & 1:
        raise zipfile.BadZipFile(f"its entry {info.filename!r} is encrypted")
    file.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(name_length).decode("utf-8")
    if signature != b"PK\x03\x04" or name != info.orig_filename:
        raise zipfile.BadZipFile(f"its entry {info.filename!r} is not where its directory says")
    begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if begin + info.file_size > limit:
        raise zipfile.BadZipFile(f"its entry {info.filename!r} reaches into another one")
    return Entry(begin, begin + info.file_size, info.CRC)
