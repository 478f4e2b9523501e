"""The files of a folder on a disk, its sub-folders and what links in it lead to.

A link is followed like what it leads to. Folders are told apart by device and number, so a link back to a folder that
is read already, which would be a loop, ends there and is counted. Folders that no state of the pattern leads through
are not opened.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.globs import Pattern, States
from pipeline.listing.selection import HIDDEN, LEADS_NOWHERE, NO_FILE, READ_ALREADY, hidden_part, is_mark, kind_of

_MARK_FOLDER, _MARK_FILE = "items", "run.json"


@dataclass(frozen=True, kw_only=True)
class Tree:
    """What lies below a folder and may match a pattern; names are relative to the folder, with slashes."""

    names: list[str]
    """Of files that match, and of those that mark the output of a job."""
    found: dict[str, list[str]]
    """Reason -> names of what is there and can be no file of a source."""
    problems: list[tuple[str, UserError]]
    """What may be, or hold, a file that is wanted and cannot be looked at; in the order of the names."""


def split_source(path: Path) -> tuple[Path, str] | None:
    """The folder above the first wildcard and the pattern below it; None where the path leads to nothing.

    Folders that exist are taken as they are, so that those with ``[`` or ``?`` in their name are no patterns.
    """
    base = path
    while not _is_folder(base):
        if base == base.parent:
            return None
        base = base.parent
    pattern = path.relative_to(base).as_posix() if base != path else ""
    return None if pattern and not glob.has_magic(pattern) else (base, pattern)


def list_tree(base: Path, pattern: str, *, is_read: Callable[[str], object] = kind_of) -> Tree:
    """List a folder; folders themselves come before the links to them, so a folder keeps its own name.

    is_read: whether a file of this name would be read, so that it must not be missed where a link leads nowhere.
    """
    walk = _Walk(base, Pattern.of(pattern), is_read)
    walk.run()
    walk.problems.sort(key=lambda problem: problem[0])
    return Tree(names=walk.names, found=walk.found, problems=walk.problems)


@dataclass
class _Walk:
    base: Path
    pattern: Pattern
    is_read: Callable[[str], object]
    names: list[str] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=dict)
    problems: list[tuple[str, UserError]] = field(default_factory=list)
    links: list[tuple[str, States]] = field(default_factory=list)
    """Links to folders that are still to be followed."""
    seen: set[tuple[int, int, States]] = field(default_factory=set)
    """Device, number and states of the folders that were read: with other states other files in them match."""

    def run(self) -> None:
        self._folder("", self.pattern.start)
        while self.links:
            links, self.links = sorted(self.links, key=lambda link: link[0]), []
            for name, states in links:
                self._folder(name, states)

    def _folder(self, name: str, states: States) -> None:
        """Read a folder and those below it."""
        waiting = [(name, states)]
        while waiting:
            name, states = waiting.pop()
            try:
                about = (self.base / name).stat()
                if (key := (about.st_dev, about.st_ino, states)) in self.seen:
                    self._pass_over(READ_ALREADY, name)
                    continue
                self.seen.add(key)
                with os.scandir(self.base / name) as entries:
                    for entry in entries:
                        waiting += self._entry(entry, f"{name}/{entry.name}" if name else entry.name, states)
            except OSError as error:
                self._report(name, _cannot_be_read(self.base / name, error))

    def _entry(self, entry: os.DirEntry[str], name: str, states: States) -> Iterator[tuple[str, States]]:
        """Note a file or a link; yields a folder that is to be read."""
        states = self.pattern.step(states, entry.name)
        if states and not _is_utf8(name):
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            sentence = f"the name of {self.base / shown} is not UTF-8, so no record could name it; rename it"
            self._report(shown, DamagedInputError(sentence))
            return
        if entry.name == _MARK_FOLDER and Path(entry.path, _MARK_FILE).is_file():
            self.names.append(f"{name}/{_MARK_FILE}")
        is_wanted = self.pattern.is_match(states)
        if not states and not is_mark(name):
            return
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            self._bad_link(name, error, is_wanted=is_wanted)
            return
        if stat.S_ISDIR(mode):
            if entry.is_symlink():
                self.links.append((name, states))
            else:
                yield name, states
        elif stat.S_ISREG(mode):
            if is_wanted or is_mark(name):
                self.names.append(name)
        elif is_wanted:
            self._pass_over(NO_FILE, name)

    def _bad_link(self, name: str, error: OSError, *, is_wanted: bool) -> None:
        """A link that leads nowhere is an error where a file to be read, or a folder, may have been behind it."""
        path = self.base / name
        if isinstance(error, PermissionError) or not path.is_symlink():
            self._report(name, _cannot_be_read(path, error))
        elif (is_wanted and self.is_read(name)) or not path.suffix:
            sentence = f"{path} is a link to {path.readlink()}, where nothing is; fetch that again, or delete the link"
            self._report(name, DamagedInputError(sentence))
        elif is_wanted:
            self._pass_over(LEADS_NOWHERE, name)

    def _report(self, name: str, error: UserError) -> None:
        if hidden := hidden_part(name, self.pattern) if name else None:
            self._pass_over(HIDDEN, hidden)
        else:
            self.problems.append((name, error))

    def _pass_over(self, reason: str, name: str) -> None:
        self.found.setdefault(reason, []).append(name)


def _is_utf8(name: str) -> bool:
    """Python reads other bytes of a name as half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _cannot_be_read(path: Path, error: OSError) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read by this user; change its permissions, or name a narrower source")
    return DamagedInputError(f"{path} cannot be read: {error.strerror or error}")
