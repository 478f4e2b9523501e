"""Files of tasks: in a folder or a zip file, on a disk, in a bucket, on a web server or on the hub.

They are small (CORE has 160 MB in all), so a file is read whole.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import redact_url

_MOST_BYTES = 1 << 30  # of one file, unpacked


class TaskFiles:
    """The files below one address; nothing is read before it is asked for."""

    def __init__(self, address: str) -> None:
        self.address = address if remote_files.is_remote(address) else in_bucket(address) or str(resolve_path(address))
        self._archive: zipfile.ZipFile | None = None

    def __str__(self) -> str:
        return redact_url(self.address)

    def read(self, name: str) -> bytes | None:
        """A whole file; None where there is none of this name.

        Raises:
            UserError: the folder or the file cannot be read.
        """
        if self.address.lower().endswith(".zip"):
            return self._unpacked(name)
        if remote_files.is_remote(self.address):
            return self._fetched(f"{self.address.rstrip('/')}/{name}")
        if not Path(self.address).is_dir():
            raise UserError(f"there is no folder {self} of tasks; give the folder or the zip file that has them")
        path = Path(self.address) / name
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _fetched(self, address: str) -> bytes | None:
        """A file of the web is asked for by name, so that one that is missing is an error of its server."""
        contents = fetch(address)
        return contents[0] if contents else None

    def _unpacked(self, name: str) -> bytes | None:
        archive = self._open_archive()
        found = [entry for entry in archive.infolist() if f"/{entry.filename}".endswith(f"/{name}")]
        if not found:
            return None
        entry = min(found, key=lambda each: len(each.filename))  # the archive may have one folder around all
        if entry.file_size > _MOST_BYTES:
            raise UserError(f"{name} in {self} has more than {_MOST_BYTES:,} bytes; it is no file of a task")
        try:
            return archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, ValueError, EOFError) as error:
            raise UserError(f"{name} in {self} cannot be unpacked ({error}); fetch the file anew") from error

    def _open_archive(self) -> zipfile.ZipFile:
        if self._archive is not None:
            return self._archive
        try:
            if remote_files.is_remote(self.address):
                content = self._fetched(self.address)
                if content is None:
                    raise UserError(f"there is no {self}; give the folder or the zip file that has the tasks")
                self._archive = zipfile.ZipFile(io.BytesIO(content))
            else:
                self._archive = zipfile.ZipFile(self.address)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{self} cannot be read as a zip file ({error}); give another --task_files") from error
        return self._archive


def fetch(address: str) -> list[bytes]:
    """The contents of all files that a remote address names, sorted by name; it may be a pattern (globs.py)."""
    _, files = remote_files.list_files(address)
    for file in files:
        if file.size_bytes > _MOST_BYTES:
            raise UserError(f"{file.where} has more than {_MOST_BYTES:,} bytes; it is no file of a task")
    return [b"".join(remote_files.stream(file)) for file in files]


def records(content: bytes, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a parquet file or of JSON lines, each with its place for messages.

    Raises:
        UserError: the file, or a line of it, is neither.
    """
    if content.startswith(b"PAR1"):
        yield from _rows(content, where)
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # Unicode's errors are ValueErrors
            raise UserError(f"{place} is no JSON ({error}); one object per line is expected") from error
        if not isinstance(values, dict):
            raise UserError(f"{place} is no JSON object; one object per line is expected")
        yield place, values


def _rows(content: bytes, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{where} cannot be read as parquet ({error}); fetch the file anew") from error
    for number, values in enumerate(rows):
        yield f"{where}, row {number}", values
