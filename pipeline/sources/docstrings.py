"""Text that every machine has: the docstrings of the Python packages that are installed.

Files are parsed, never imported. A documented module makes one document: the module's name and docstring, then, in
source order, the signature and docstring of every class, function and method that has one. Modules that are mostly code
are left out: parsing costs most of the time, and a fifth of the text would double it.
"""

from __future__ import annotations

import ast
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_DOCUMENT_CHARS = 200
MIN_QUOTED_SHARE = 0.2
_LEFT_OUT_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def package_roots() -> list[Path]:
    """The folders of the standard library and of the packages of this Python."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths)]


def versions() -> dict[str, str]:
    """The version of Python and of every installed distribution, on which the documents depend."""
    found = {"python": platform.python_version()}
    for root in package_roots():
        for folder in sorted(root.glob("*.dist-info")):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            found[name] = version
    return found


def find_files() -> list[tuple[str, Path, os.stat_result]]:
    """Every .py file in the roots except tests: (name relative to its root, path, stat), sorted by name."""
    files = []
    for root in package_roots():
        for folder, folders, names in os.walk(root, followlinks=True):
            folders[:] = set(folders) - _LEFT_OUT_FOLDERS
            paths = (Path(folder, name) for name in names if name.endswith(".py"))
            files += [(path.relative_to(root).as_posix(), path, path.stat()) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file[:2])


def module_document(name: str, content: bytes) -> str | None:
    """The document of the module in file ``name`` (relative to its root), or None where it has too little text.

    Raises ValueError for what this Python cannot parse.
    """
    source = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    if _quoted_chars(source) < max(MIN_DOCUMENT_CHARS, MIN_QUOTED_SHARE * len(source)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in their strings
            tree = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} cannot be parsed: {type(error).__name__}") from error
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    text = "\n\n".join(_sections(tree, module, source.split("\n")))
    text = text.encode("utf-8", "replace").decode("utf-8")  # a docstring may spell half a surrogate pair
    return text if len(text) >= MIN_DOCUMENT_CHARS else None


def _quoted_chars(source: str) -> int:
    """Approximate number of characters in docstrings: those between triple quotes."""
    return max(sum(map(len, source.split(quotes)[1::2])) for quotes in ('"""', "'''"))


def _sections(node: Documented, name: str, lines: list[str]) -> Iterator[str]:
    """Heading and docstring of ``node`` and of every documented definition in it, in source order."""
    docstring = (ast.get_docstring(node) or "").strip()
    if docstring or isinstance(node, ast.Module):
        yield f"{name}{_signature(node, lines)}\n\n{docstring}".strip()
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in _definitions(node.body):
            yield from _sections(child, f"{name}.{child.name}", lines)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):
            yield from _definitions(statement.body + statement.orelse)


def _signature(node: Documented, lines: list[str]) -> str:
    """The source between the name and the colon, in one line."""
    if isinstance(node, ast.Module):
        return ""
    header = " ".join(" ".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).split())
    return header.partition(node.name)[2].removesuffix(":").strip()
