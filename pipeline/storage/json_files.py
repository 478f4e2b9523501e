"""Small JSON files in a folder, on a disk or in a bucket."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage.folders import Folder


def read_json(folder: Folder, name: str, default: Any = None) -> Any:
    """The content of a JSON file, or ``default`` where it is absent; ValueError where it is no JSON."""
    try:
        return json.loads(folder.read(name))
    except FileNotFoundError:
        return default


def write_json(folder: Folder, name: str, values: Any, *, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all."""
    folder.write(name, [json.dumps(values, indent=indent).encode()])
