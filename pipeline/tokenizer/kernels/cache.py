"""Where compiled numba kernels are kept: one folder per user and per content of the kernel sources.

numba's own cache looks only at the file of the outer function, so that an edited helper in another file goes on running
as it was, and it looks for its files by the path of the checkout, so that the throw-away copy which ``ray job submit``
unpacks compiles again. Here the folder's name is a hash of everything that the machine code depends on: a stale hit is
impossible, and any copy of the same sources finds the same folder. Kernels are in the files of this folder and of the
other rooms' folders ``kernels``, and use nothing of other files but their arguments. Nothing is compiled or written at
import.

Processes that find a kernel missing at the same time wait for the one that compiles it.

The folder: $GPT25_KERNEL_CACHE, else $XDG_CACHE_HOME/gpt-2.5, else ~/.cache/gpt-2.5; in it ``numba-<hash>``. numba
keeps pickles there, so both are used only where they and the files are this user's and nobody else can write to them;
otherwise a folder of this user's in the temporary folder is used, under the same condition, or one of this process
alone, and a warning says so. Where none can be written, kernels are compiled in every process and a warning says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numba
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _Cache, _CacheLocator

logger = logging.getLogger(__name__)


def kernel_sources() -> list[Path]:
    """The source files of the kernels, this one included: what the stamp covers."""
    return sorted(Path(__file__).parents[2].glob("*/kernels/*.py"))


# Read at import: the files may change before the first call, but the code that runs is the imported one.
_SOURCES = hashlib.sha256(
    b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in kernel_sources())
).digest()


def cache_root() -> Path:
    """The user's cache folder for this project (see the head of the module); it need not exist."""
    named = os.environ.get("GPT25_KERNEL_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if Path(shared).is_absolute():
        return Path(shared) / "gpt-2.5"
    try:
        return Path.home() / ".cache" / "gpt-2.5"
    except RuntimeError as error:  # a user without an entry in the password file, as in some containers
        raise OSError("no home folder; set GPT25_KERNEL_CACHE to a folder for compiled kernels") from error


def is_private(folder: Path) -> bool:
    """Whether nobody but this user (and root) can put or change anything in a folder, or it does not exist yet."""
    try:
        found = [(folder, folder.lstat()), *((Path(entry), entry.stat()) for entry in os.scandir(folder))]
    except FileNotFoundError:
        return True
    me = os.geteuid()
    closed = not found[0][1].st_mode & 0o077
    return stat.S_ISDIR(found[0][1].st_mode) and all(
        status.st_uid == me and ((closed and number > 0) or not status.st_mode & 0o022)
        for number, (_, status) in enumerate(found)
    )


def private_folder(root: Path, name: str) -> Path:
    """The folder ``name`` in ``root`` if both are private, else in a folder that is."""
    if _is_own(root) and is_private(root / name):
        return root / name
    own = Path(tempfile.gettempdir()) / f"gpt-2.5-kernels-{os.geteuid()}"
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
    if not (_is_own(own) and own.is_dir() and is_private(own / name)):
        own = Path(tempfile.mkdtemp(prefix="gpt-2.5-kernels-"))
    logger.warning("others can write to %s, so its compiled kernels are not used; they are kept in %s", root, own)
    return own / name


def _is_own(root: Path) -> bool:
    """Whether a folder is this user's and only this user can give names in it, or it does not exist yet."""
    try:
        status = root.stat()
    except OSError:
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def stamp(machine: object) -> str:
    """Hash of the kernel sources, of Python, numpy and numba, and of the machine compiled for: 20 hex digits."""
    versions = (sys.version_info[:3], np.__version__, numba.__version__, machine)
    return hashlib.sha256(_SOURCES + repr(versions).encode()).hexdigest()[:20]


def kernel(function: Callable[..., Any]) -> Any:
    """Decorate a numba function that Python calls: compiled on first call, kept on disk, runs without the GIL.

    Callers give arguments of the same types every time (Python's int, writable contiguous arrays of one dtype): one
    signature per kernel, and so no two processes that write different files under one number of numba's index.
    """
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = StampedCache(function)
    return dispatcher


def helper(function: Callable[..., Any]) -> Any:
    """Decorate a numba function that only kernels call: compiled into each of them."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A helper whose machine code is put into its caller, where a call would cost more than what it does."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


class StampedCache(_Cache):
    """numba's on-disk cache of one kernel, opened in the stamped folder when the kernel is first called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._opened: FunctionCache | None = None
        self._lock: IO[str] | None = None  # held from a miss until the compiled code is kept
        self._enabled = True

    def _open(self, target_context: Any) -> FunctionCache:
        if self._opened is None:
            _Locator.folder = private_folder(cache_root(), f"numba-{stamp(target_context.codegen().magic_tuple())}")
            self._opened = _FolderCache(self._function)
        return self._opened

    @property
    def cache_path(self) -> str | None:
        """Folder of the compiled code, None before the first call."""
        return self._opened.cache_path if self._opened else None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code for a signature, or None."""
        if not self._enabled:
            return None
        try:
            cache = self._open(target_context)
            compiled = cache.load_overload(sig, target_context)
            if compiled is None:
                self._lock = _wait_for_lock(Path(cache.cache_path) / f"{self._function.__name__}.lock")
                compiled = cache.load_overload(sig, target_context)  # compiled by another process meanwhile
                if compiled is not None:
                    self._release()
                else:
                    _announce()
            return compiled
        except OSError as error:
            logger.warning("kept kernels cannot be read, they are compiled again: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store compiled code; where the folder cannot be written, a warning is logged."""
        if not self._enabled:
            return
        try:
            self._open(data.target_context).save_overload(sig, data)
        except OSError as error:
            logger.warning("compiled kernels are not kept, every process compiles them again: %s", error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def enable(self) -> None:
        """Use the cache (the default)."""
        self._enabled = True

    def disable(self) -> None:
        """Compile again and store nothing."""
        self._enabled = False

    def flush(self) -> None:
        """Delete what is on disk for this kernel."""
        if self._opened:
            self._opened.flush()


@functools.cache  # the first kernel speaks for all
def _announce() -> None:
    logger.info("compiling kernels for this machine, which happens once and takes up to half a minute")


def _wait_for_lock(path: Path) -> IO[str]:
    """Open a lock file and hold it until it is closed, or the process ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = path.open("w")
    with contextlib.suppress(OSError):  # a file system without locks: every process compiles for itself
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


class _Locator(_CacheLocator):
    """Tells numba's cache classes our folder; the folder's name carries the stamp, so the file's own is constant."""

    folder = Path()

    def __init__(self, line: int) -> None:
        self._folder = str(type(self).folder)
        self._line = line

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], _py_file: str) -> _Locator:
        return cls(py_func.__code__.co_firstlineno)

    def ensure_cache_path(self) -> None:
        Path(self._folder).mkdir(mode=0o700, parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return self._folder

    def get_source_stamp(self) -> str:
        return Path(self._folder).name

    def get_disambiguator(self) -> str:
        return str(self._line)


class _FolderImpl(CompileResultCacheImpl):
    _locator_classes: Any = (_Locator,)


class _FolderCache(FunctionCache):
    _impl_class = _FolderImpl
