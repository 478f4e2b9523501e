"""The docstrings of this machine: a made-up environment, and a few of the packages that run this test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.sources import docstrings
from pipeline.sources.plan import make_plan
from pipeline.sources.sources import find
from tests.support.texts import read, read_items

MODULE = '''\
"""A module about shapes.

    It says so at some length, as documentation does, so that it is worth a document of its own.
"""

CONSTANT = """not documentation, however long it may be, as it is bound to a name and nobody reads it as such"""

class Circle(Shape, metaclass=Meta):
    """All points of one distance."""

    def area(self, *, unit: str = "m",
             digits: int = 3) -> float:
        """The area.

            Indented more.
        """

    def hidden(self): return 1

if True:
    async def draw(shape):
        """Draw it, half a pair: \\ud800."""
        def inner():
            """Nobody sees this."""

def one_line(): "A short one."
'''
DOCUMENT = """\
pkg.shapes

A module about shapes.

It says so at some length, as documentation does, so that it is worth a document of its own.

pkg.shapes.Circle(Shape, metaclass=Meta)

All points of one distance.

pkg.shapes.Circle.area(self, *, unit: str = "m", digits: int = 3) -> float

The area.

Indented more.

pkg.shapes.draw(shape)

Draw it, half a pair: ?.

pkg.shapes.one_line

A short one."""


def test_installed_docs_on_a_made_up_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files: dict[Path, str | bytes] = {
        library / "shapes.py": MODULE,
        packages / "pkg" / "__init__.py": '"""' + "The package itself. " * 20 + '"""',
        packages / "pkg" / "shapes.py": MODULE,
        packages / "pkg" / "latin.py": b'"""' + b"caf\xe9 " * 50 + b'"""',
        packages / "pkg" / "broken.py": '"""' + "Fine. " * 50 + '"""\nprint "so 2.7"',
        packages / "pkg" / "short.py": '"""Too short to be worth it."""',
        packages / "pkg" / "code.py": MODULE + "code = code + 1\n" * 500,
        packages / "pkg" / "tests" / "test_it.py": MODULE,
        packages / "pkg" / "__pycache__" / "shapes.py": MODULE,
        packages / "pkg-1.5.dist-info" / "METADATA": "",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(docstrings, "package_roots", lambda: [library, packages])
    skipped: Counter[str] = Counter()
    documents = read("installed-docs", skipped=skipped)
    assert [document.split("\n")[0] for document in documents] == ["pkg", "pkg.shapes", "shapes"]
    assert documents[1] == DOCUMENT
    assert skipped == {"module that cannot be parsed": 2, "module with little documentation": 2}
    assert {entry.name: entry.version for entry in find("installed-docs").inputs}["pkg"] == "1.5"


def test_installed_docs_here() -> None:
    """A few of the packages that run this test; numpy's own inspect view is the reference for one docstring."""
    import inspect

    import numpy as np

    layouts = find("installed-docs").layouts("text")
    chosen = [layout for layout in layouts if layout.whole.name.startswith(("numpy/lib/", "json/"))]
    texts = read_items(make_plan(chosen, text_column="text", item_bytes=10**9))
    documents = {text.split("\n")[0]: text for text in texts}
    assert "json.decoder" in documents
    assert str(inspect.getdoc(np.unwrap)) in documents["numpy.lib._function_base_impl"].replace("\\\\", "\\")
    assert "numpy.lib._function_base_impl.unwrap(p, discont=None" in documents["numpy.lib._function_base_impl"]
