"""What lies on a disk: links, loops, closed folders, odd names, and what jobs wrote there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DamagedInputError, UserError
from pipeline.sources.sources import find
from tests.support.trees import documents, documents_of, file_of


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of("".join(path.suffixes), list(texts)))
    return path


def ignored(source: Path | str) -> list[str]:
    return [str(entry) for entry in find(str(source)).ignored]


def mistake(source: Path | str, kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as raised:
        documents(str(source))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store/blob.jsonl", "linked file")
    write(tmp_path / "archive/deep/b.jsonl", "linked folder")
    write(tmp_path / "in/a.jsonl", "plain")
    (tmp_path / "in/c.jsonl").symlink_to("../store/blob.jsonl")
    (tmp_path / "in/more").symlink_to("../archive")
    for source in ("in", "in/**/*.jsonl"):
        assert documents(f"{tmp_path}/{source}") == ["plain", "linked file", "linked folder"]
    assert documents(f"{tmp_path}/in/*/*/*") == ["linked folder"]
    assert documents(f"{tmp_path}/in/more") == ["linked folder"]


@pytest.mark.parametrize("target", [".", "..", "other", "../in"])
def test_a_folder_is_read_once(tmp_path: Path, target: str) -> None:
    write(tmp_path / "in/a.jsonl", "a")
    write(tmp_path / "in/other/b.jsonl", "b")
    (tmp_path / "in/link").symlink_to(target)
    (tmp_path / "in/other/again").symlink_to("../link")
    assert documents(f"{tmp_path}/in") == ["a", "b"]
    assert "a link to a folder that is read already" in ignored(tmp_path / "in")[0]


def test_the_folder_itself_keeps_its_name_before_a_link_to_it(tmp_path: Path) -> None:
    write(tmp_path / "z/a.jsonl", "a")
    (tmp_path / "link").symlink_to("z")
    assert [entry.name for entry in find(str(tmp_path)).inputs] == ["z/a.jsonl"]
    assert [entry.name for entry in find(f"{tmp_path}/l*").inputs] == ["link/a.jsonl"]


@pytest.mark.parametrize("name", ["b.jsonl", "B.PARQUET", "folder"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / name).symlink_to("../nowhere/at/all")
    assert f"{tmp_path}/{name} is a link to ../nowhere/at/all, where nothing is" in mistake(tmp_path, DamagedInputError)
    damaged: list[dict[str, str]] = []
    assert documents_of(find(str(tmp_path)), damaged) == ["a"]
    assert [entry["name"] for entry in damaged] == [name]
    assert documents(f"{tmp_path}/a*") == ["a"]


def test_a_link_to_itself_and_links_that_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "x.jsonl").symlink_to("x.jsonl")
    assert "x.jsonl is a link to x.jsonl" in mistake(tmp_path)
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "notes.md").symlink_to("nowhere")
    (tmp_path / ".#a.jsonl").symlink_to("user@host.1234")  # as an editor locks a file
    assert documents(str(tmp_path)) == ["a"]
    assert len(ignored(tmp_path)) == 2


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that this user may not read, even if it is root."""
    folder = tmp_path / "in/closed"
    write(folder / "b.jsonl", "b")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


def test_a_closed_folder_is_an_error(tmp_path: Path, closed: Path) -> None:
    write(tmp_path / "in/a.jsonl", "a")
    sentence = f"{closed} may not be read by this user; change its permissions, or name a narrower source"
    assert mistake(tmp_path / "in") == mistake(f"{tmp_path}/in/**/*.jsonl") == sentence
    with pytest.raises(UserError, match="may not be read"):
        documents_of(find(f"{tmp_path}/in"), [])  # no damage of a file that could be left out
    assert documents(f"{tmp_path}/in/*.jsonl") == ["a"]


def test_what_is_no_regular_file_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
        assert documents(str(tmp_path)) == ["a"]
        assert ignored(tmp_path) == ["2 no regular file (such as pipe.jsonl)"]
    assert "pipe.jsonl is no regular file" in mistake(tmp_path / "pipe.jsonl")


def test_a_name_that_is_not_utf8_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("b")
    assert "caf\\xe9.txt is not UTF-8, so no record could name it; rename it" in mistake(tmp_path, DamagedInputError)
    assert documents(f"{tmp_path}/a*") == ["a"]


def test_folders_with_the_signs_of_patterns_in_their_names(tmp_path: Path) -> None:
    for name in ("what?now", "[2024]", "50%", "a*b"):
        write(tmp_path / name / "a.jsonl", name)
        assert documents(f"{tmp_path}/{name}") == documents(f"{tmp_path}/{name}/*.jsonl") == [name]
    assert sorted(documents(f"{tmp_path}/*")) == sorted(["what?now", "[2024]", "50%", "a*b"])


def test_two_stars_stand_alone(tmp_path: Path) -> None:
    write(tmp_path / "a/b.jsonl", "b")
    assert "** must stand alone between slashes, as in **/*.jsonl" in mistake(f"{tmp_path}/**.jsonl")
    assert documents(f"{tmp_path}/**/*.jsonl") == ["b"]


def test_hidden_files_are_read_where_they_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_b.jsonl", ".c/d.jsonl", "_year=2020/e.jsonl", "_f/_g.jsonl"):
        write(tmp_path / name, name)
    assert documents(str(tmp_path)) == ["_year=2020/e.jsonl", "a.jsonl"]
    assert ignored(tmp_path) == ["3 hidden (. or _ at the start of a name) (such as .c/)"]
    assert documents(f"{tmp_path}/_*.jsonl") == documents(f"{tmp_path}/_b.jsonl") == ["_b.jsonl"]
    assert documents(f"{tmp_path}/.c") == documents(f"{tmp_path}/.[a-z]/*") == [".c/d.jsonl"]
    assert documents(f"{tmp_path}/_f/_*") == ["_f/_g.jsonl"]
    assert "what is there is not read: 1 hidden" in mistake(tmp_path / "_f")


def test_what_jobs_wrote_is_no_source(tmp_path: Path) -> None:
    write(tmp_path / "texts/a.jsonl", "a")
    for name in ("tokens/items/run.json", "tokens/manifest.json", "run/mlflow_run.json", "run/tracking.jsonl"):
        write(tmp_path / "texts" / name, "made by a job")
    write(tmp_path / "texts/mlartifacts/1/samples.json", "made by a job")
    (tmp_path / "texts/mlflow.db").write_bytes(b"SQLite format 3")
    for source in ("texts", "texts/**/*.json*"):
        assert documents(f"{tmp_path}/{source}") == ["a"]
        assert ignored(f"{tmp_path}/{source}")[0] == "3 written by jobs of this project (such as mlartifacts/)"
    assert documents(f"{tmp_path}/texts/*.jsonl") == ["a"] and ignored(f"{tmp_path}/texts/*.jsonl") == []
    assert "what is there is not read" in mistake(f"{tmp_path}/texts/tokens")
    write(tmp_path / "texts/mlflow_run.json", "made by a job")  # an output beside the source, named by a glob
    write(tmp_path / "texts/manifest.json", "made by a job")
    assert documents(f"{tmp_path}/texts/*.json*") == ["a"]
