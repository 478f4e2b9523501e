"""Files of token ids that others made, on a disk, on the hub, in a bucket or on a web server: listed, not yet read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.listing.globs import Pattern
from pipeline.listing.local_files import list_tree, split_source
from pipeline.listing.selection import hidden_part
from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile
from pipeline.sources.sources import Input

_SUFFIX = ".bin"


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One file as it was listed."""

    input: Input
    """Name, version and size; the time of change of a local file."""
    place: Path | RemoteFile

    @property
    def where(self) -> str:
        """Name of the file in messages."""
        return self.place.where if isinstance(self.place, RemoteFile) else str(self.place)

    @property
    def identity(self) -> str:
        """The same for two names of one file."""
        return self.place.url if isinstance(self.place, RemoteFile) else str(self.place.resolve())

    @property
    def size_bytes(self) -> int:
        return self.input.size_bytes or 0

    def head(self, num_bytes: int) -> bytes:
        """The first bytes, fewer where the file ends sooner; fetched by one request where it is not local."""
        if isinstance(self.place, RemoteFile):
            return remote_files.read_ranges(self.place, [(0, min(num_bytes, self.size_bytes))])[0]
        try:
            with self.place.open("rb") as file:
                return file.read(num_bytes)
        except OSError as error:
            raise UserError(f"{self.where} cannot be read: {error.strerror}") from error


def find_token_files(source: str, flag: str) -> tuple[str | None, list[TokenFile]]:
    """The source pinned to a commit of the hub (None elsewhere), and its files in the order of their names.

    A folder, and a glob that other files match too, stand for the .bin files among them. Hidden files and links are
    taken as those of a source of text are.

    Args:
        source: an absolute path or glob, or an address that remote/files.py lists.
        flag: the flag that named the source, for messages.

    Raises:
        UserError: nothing matches, or the place cannot be reached.
    """
    if remote_files.is_remote(source):
        tree = remote_files.list_tree(source)
        pinned, found = tree.pinned, [tree.files[name] for name in _named(tree.files, tree.pattern)]
        commit = f"{pinned.partition('@')[2].partition('/')[0]} " if pinned else ""
        inputs = [Input(name=file.name, version=commit + file.version, size_bytes=file.size_bytes) for file in found]
        files = [TokenFile(input=entry, place=file) for entry, file in zip(inputs, found, strict=True)]
    elif "://" in source:
        raise UserError(
            f"{flag} {source} is none that can be read: a local path, hf://datasets/..., s3://..., gs://... or "
            "https://..."
        )
    else:
        pinned, files = None, _local_files(source)
    chosen = files if len(files) == 1 else [file for file in files if _is_shard(file.input.name)]
    if not chosen:
        raise UserError(f"no {_SUFFIX} file matches {flag} {source}; correct the pattern")
    return pinned, chosen


def _local_files(source: str) -> list[TokenFile]:
    """Files that the path names, or below the folder that it is, or that match it as a glob, sorted."""
    place = split_source(Path(source))
    if place is None:
        paths = [Path(source)] if Path(source).is_file() else []
    else:
        base, pattern = place
        tree = list_tree(base, pattern, is_read=_is_shard)
        for _, problem in tree.problems:
            raise problem
        paths = [base / name for name in _named(tree.names, pattern)]
    folder = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [_local_file(path.relative_to(folder).as_posix(), path) for path in paths]


def _named(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a pattern means, in order, without hidden ones."""
    wanted = Pattern.of(pattern)
    return sorted(name for name in names if wanted.matches(name) and hidden_part(name, wanted) is None)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(_SUFFIX)


def _local_file(name: str, path: Path) -> TokenFile:
    stat = path.stat()
    return TokenFile(input=Input(name=name, size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns), place=path)
