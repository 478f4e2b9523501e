"""Where relative paths lie.

Relative paths count from the current folder. Under ``ray job submit`` the current folder is a throw-away copy of the
project, so there they count from GPT25_HOME, a folder or a bucket, or from ~/gpt-2.5 where that is not set.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.folders import Folder, LocalFolder, is_url, open_folder


def shown(path: str) -> str:
    """A path as UTF-8 text, for records and messages: bytes that are none are written as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def submitted() -> bool:
    """Whether this process is the driver of a ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def working_folder() -> Path:
    """The local folder that relative paths count from, unless GPT25_HOME is a bucket."""
    home = os.environ.get("GPT25_HOME", "")
    if home and not is_url(home):
        return Path(home).expanduser().absolute()
    return Path.home() / "gpt-2.5" if home or submitted() else Path.cwd()


def resolve_path(path: str) -> Path:
    """An absolute path, the same in the driver and in every worker."""
    url = in_bucket(path)
    if url is not None:
        raise UserError(f"{url}: only folders that every node sees are supported here; give an absolute path")
    return working_folder() / Path(path).expanduser()


def resolve_output(path: str) -> Folder:
    """A job's output folder, in a bucket or at an absolute path, the same in the driver and in every worker."""
    return open_folder(in_bucket(path) or resolve_path(path))


def resolve_output_file(path: str) -> tuple[Folder, str]:
    """The folder of a job's output file, which is made if need be, and the file's name in it.

    Raises:
        UserError: the folder cannot be made, or no files can be written to it, or ``path`` is a folder.
    """
    parent, slash, name = path.rpartition("/")
    folder = resolve_output(parent or slash or ".")
    if name in ("", ".", "..") or (isinstance(folder, LocalFolder) and (folder.path / name).is_dir()):
        raise UserError(f"--output {path} is a folder; give the name of a file, such as {path.rstrip('/')}/result.json")
    folder.make()
    return folder, name


def in_bucket(path: str) -> str | None:
    """The URL of ``path`` where it is a URL, or is relative to a GPT25_HOME that is one; otherwise None."""
    if is_url(path):
        return path
    home = os.environ.get("GPT25_HOME", "")
    if not is_url(home) or Path(path).expanduser().is_absolute():
        return None
    return f"{home.rstrip('/')}/{path}"
