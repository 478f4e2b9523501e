"""The safetensors files of a folder, opened to be read. Nothing that they or an index say is believed.

Names, types and shapes come from the headers, and are compared with what a network needs before a tensor is read or
memory is taken for it; safetensors itself refuses a header that does not fit the length of its file. One tensor is in
memory at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_NAME_BYTES = 255  # what file systems take
_AGAIN = "export or fetch the folder again"


class TensorFiles:
    """All tensors of a folder, by name."""

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        self.path = path
        self._files = files
        slices = {name: file.get_slice(name) for name, file in files.items()}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
        """Shape of every tensor, from the headers."""
        self._types = {name: part.get_dtype() for name, part in slices.items()}

    def check(self, needed: Mapping[str, tuple[int, ...]], *, others: Collection[str], advice: str) -> None:
        """Raise a UserError unless the tensors are those ``needed`` (name -> shape) and, at most, some ``others``."""
        missing, more = needed.keys() - self.shapes.keys(), self.shapes.keys() - needed.keys() - {*others}
        if missing or more:
            what = f"lacks the tensor {min(missing)}" if missing else f"has the tensor {min(more)}, which is not ours"
            raise UserError(f"{self.path} {what}; {advice}")
        self.check_shapes(needed)

    def check_shapes(self, needed: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a UserError where a tensor has another shape than in ``needed``, or a type that weights have not."""
        for name, shape in needed.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.path} has {name} of shape {self.shapes[name]}, but its config.json asks for {shape}"
                )
            if self._types[name] not in _FLOATS:
                raise UserError(
                    f"{self.path} has {name} of type {self._types[name]}, but weights are {', '.join(_FLOATS)} here; "
                    "give a folder that is not quantized"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in the type that it has in its file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFiles]:
    """The tensors in model.safetensors of the folder ``path``, or in the files that its index names.

    Raises:
        UserError: a file is missing or damaged, lies elsewhere, or a tensor is there twice.
    """
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name in _file_names(path):
            file = stack.enter_context(_open(path, name))
            if twice := found.keys() & set(file.keys()):
                raise UserError(f"{path} has the tensor {min(twice)} in two of its files; {_AGAIN}")
            found.update(dict.fromkeys(file.keys(), file))
        yield TensorFiles(path, found)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; {_AGAIN}")
    return values


def _file_names(path: Path) -> list[str]:
    if not (path / INDEX_FILE).is_file():
        return [WEIGHTS_FILE]
    places = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path / INDEX_FILE} has no weight_map, which names the file of each tensor; {_AGAIN}")
    for tensor, name in places.items():
        # A name with a folder in it could make another file of this machine a part of the model.
        is_name = isinstance(name, str) and name.isprintable() and len(name.encode()) <= _NAME_BYTES
        if not is_name or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(
                f"{path / INDEX_FILE} says that {tensor} lies in {name!r}, which is no safetensors file of its own "
                f"folder; {_AGAIN}"
            )
    return sorted(set(places.values()))


def _open(path: Path, name: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path / name, framework="pt")
    except (OSError, SafetensorError) as error:
        advice = "export or fetch them again"
        if not (path / name).exists() and any(path.glob("*.bin")):
            advice = "its .bin files are pickles, which are never loaded: convert them to safetensors"
        raise UserError(f"the weights {path / name} cannot be read ({error}); {advice}") from error
