"""Folders of packed conversations: what is in the windows, what is left out and named, resumed and read from afar."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline.conversations.templates import chat_of
from pipeline.dataset.dataset import open_data
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import PackedStream, open_split
from pipeline.dataset.verification import verify
from pipeline.errors import DamagedInputError, UserError
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from tests.conversations.test_templates import by_hand
from tests.support.conversations import Messages, conversations, pack_here, recipe_of, write_lines
from tests.support.fixtures import contents
from tests.support.s3_server import S3

LENGTH = 65
GOOD = conversations(80, words=6)
SHORT: Messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def base(tiny_data: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_data / "tokenizer.json")


@pytest.fixture(scope="module")
def packed(base: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GOOD in two files, a parquet file and lines, three work items."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "source").mkdir()
    pq.write_table(pa.table({"id": range(40), "messages": GOOD[:40]}), folder / "source/a.parquet", row_group_size=20)
    write_lines(folder / "source/b.jsonl", GOOD[40:])
    recipe = recipe_of(folder / "source", base, output=str(folder / "data"), item_bytes=4000)
    pack_here(recipe, folder / "data")
    return folder


def windows_in(folder: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Ids and flags of every window, read from the shards' bytes."""
    found = []
    for path in sorted(folder.glob(f"{split}_0*.bin")):
        ids, flags = (
            np.fromfile(each, "<u2", offset=1024).reshape(-1, LENGTH).tolist() for each in (path, flags_of(path))
        )
        found += list(zip(ids, flags, strict=True))
    return found


def flags_of(path: Path) -> Path:
    return path.with_name(path.name.replace("_", "_flags_", 1))


def held_out(messages: Messages) -> bool:
    pairs = [[message["role"], message["content"].strip()] for message in messages]
    return xxhash.xxh3_64_intdigest(json.dumps(pairs).encode()) < 0.2 * 2**64


def test_windows_hold_what_an_independent_rendering_makes(packed: Path, base: Tokenizer) -> None:
    tokenizer, manifest = open_data(open_folder(packed / "data"))
    left_out = 0
    expected: dict[str, list[Any]] = {"train": [], "val": []}
    for messages in GOOD:
        ids, learned = by_hand(messages, "chatml", tokenizer)
        if len(ids) > LENGTH:
            left_out += 1
        else:
            expected["val" if held_out(messages) else "train"].append((ids, learned))
    assert 0 < left_out == manifest.skipped["too long"]
    for split, wanted in expected.items():
        found = [
            (ids[start:stop], [flag == 1 for flag in flags[start:stop]])
            for ids, flags in windows_in(packed / "data", split)
            for start, stop in spans(ids, flags, wanted)
        ]
        assert sorted(found) == sorted(wanted) and len(wanted) > 5
        assert manifest.documents(split) == len(wanted)
        assert manifest.learned_tokens(split) == sum(sum(learned) for _, learned in wanted)
    assert tokenizer.vocab_size == base.vocab_size + 2
    assert manifest.settings["base_tokenizer"] == base.fingerprint
    assert (packed / "data/chat_template.jinja").read_text() == chat_of("chatml", tokenizer).template.jinja


def spans(ids: list[int], flags: list[int], wanted: list[Any]) -> list[tuple[int, int]]:
    """Where conversations begin, and end: the last one where what begins like one of those wanted ends as it does."""
    starts = [place for place, flag in enumerate(flags) if flag == 2]
    ends = [*starts[1:], LENGTH]
    known = {tuple(each) for each, _ in wanted}
    last = next(end for end in range(LENGTH, starts[-1], -1) if tuple(ids[starts[-1] : end]) in known)
    filling = set(ids[last:]) | {0}
    assert len(filling) <= 2 and not any(flags[last:]), "one token fills up, and nothing of it is learned"
    return list(zip(starts, [*ends[:-1], last], strict=True))


def test_the_folder_is_one_of_shards(packed: Path) -> None:
    assert verify(packed / "data") == []
    stream = open_split(packed / "data", "train")
    assert isinstance(stream, PackedStream) and len(stream) == len(stream.flags) > 0 and len(stream) % LENGTH == 0
    assert len(stream.file_sets) == 2
    copy = packed / "damaged"
    shutil.copytree(packed / "data", copy)
    name = next(copy.glob("train_flags_*.bin"))
    name.write_bytes(name.read_bytes()[:-2] + b"\x01\x00")
    assert [sentence for sentence in verify(copy) if "is damaged" in sentence and name.name in sentence]


def test_an_interrupted_run_goes_on_with_the_same_bytes(packed: Path, base: Tokenizer, tmp_path: Path) -> None:
    recipe = recipe_of(packed / "source", base, output=str(tmp_path / "data"), item_bytes=4000)
    shutil.copytree(packed / "data", tmp_path / "data")
    for name in ("manifest.json", "items/000001.json", "train_000000.bin", "train_flags_000002.bin"):
        (tmp_path / "data" / name).unlink()
    pack_here(recipe, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(packed / "data")


def test_other_settings_are_an_error(packed: Path, base: Tokenizer) -> None:
    for changes in ({"chat_template": "gpt2.5"}, {"context_length": 32}, {"val_fraction": 0.1}):
        recipe = recipe_of(packed / "source", base, output=str(packed / "data"), **{"item_bytes": 4000, **changes})
        with pytest.raises(UserError, match="was begun with"):
            pack_here(recipe, packed / "data")


BAD = {
    "wrong role": [{"role": "robot", "content": "x"}],
    "wrong order": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
    "empty": [{"role": "user", "content": " \n"}, {"role": "assistant", "content": "y"}],
    "not messages": [{"role": "user", "text": "x"}],
    "too long": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fox " * 200}],
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_no_conversation_is_counted_and_named(kind: str, base: Tokenizer, tmp_path: Path) -> None:
    records: list[Any] = [SHORT, *BAD.values(), *BAD.values(), SHORT]
    if kind == "jsonl":
        path = write_lines(tmp_path / "chats.jsonl", records)
        path.write_text(path.read_text() + '{"messages": [\n{"other": 1}\n{"messages": null}\n{"messages": []}\n')
        place, first = "line", 2
    else:
        path = tmp_path / "chats.parquet"
        with_text = [[{"role": m["role"], "content": m.get("content")} for m in record] for record in records]
        pq.write_table(pa.table({"messages": with_text}), path)
        place, first = "row", 1
    manifest = pack_here(recipe_of(path, base, output=str(tmp_path / "data")), tmp_path / "data")
    expected = dict.fromkeys(BAD, 2)
    if kind == "jsonl":
        expected |= {"not JSON": 1, "without the key": 1, "not messages": 3, "empty": 3}
    assert manifest.skipped == expected
    for number, reason in enumerate(BAD):
        assert manifest.first_skipped[reason].startswith(f"{place} {first + number} of chats.{kind} ")
    assert manifest.documents("train") + manifest.documents("val") == 2


@pytest.mark.parametrize(
    "roles",
    ["", "s", "u", "su", "uu", "sa", "a", "ua u", "usa", "uas", "uaua u", "ssua"],
)
def test_orders_that_are_none(roles: str, base: Tokenizer, tmp_path: Path) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles.replace(" ", "")]
    source = write_lines(tmp_path / "chats.jsonl", [SHORT, messages])
    manifest = pack_here(recipe_of(source, base, output=str(tmp_path / "data")), tmp_path / "data")
    assert sum(manifest.skipped.values()) == 1


def test_nothing_that_can_be_used_is_a_sentence(base: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "chats.jsonl", [BAD["wrong role"]])
    with pytest.raises(UserError, match=r"1 wrong role.*line 1 of chats.jsonl has a message of 'robot'"):
        pack_here(recipe_of(source, base, output=str(tmp_path / "data")), tmp_path / "data")


@pytest.mark.parametrize("column", [pa.array(["text"]), pa.array([[1]]), pa.array([{"role": "user"}])])
def test_a_column_that_holds_no_messages_is_named(column: Any, base: Tokenizer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": column}), tmp_path / "chats.parquet")
    with pytest.raises(UserError, match=r"messages"):
        pack_here(recipe_of(tmp_path / "chats.parquet", base, output=str(tmp_path / "data")), tmp_path / "data")


def test_files_of_other_kinds_are_a_sentence(base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chats.txt").write_text("user: hi\n")
    with pytest.raises((UserError, DamagedInputError), match="holds no conversations that can be read"):
        pack_here(recipe_of(tmp_path / "chats.txt", base, output=str(tmp_path / "data")), tmp_path / "data")


def test_from_a_bucket_into_a_bucket(packed: Path, base: Tokenizer, s3: S3, tmp_path: Path) -> None:
    """Ranges of the parquet file's list columns and of lines are fetched; the shards have the bytes of local ones."""
    from pipeline.conversations import packed_data, stages
    from pipeline.preprocessing import ray_dataflow, resume_state, tokenization
    from pipeline.preprocessing.rows import ItemRow
    from pipeline.preprocessing.stages import download, write

    for path in (packed / "source").iterdir():
        s3.put(f"raw/{path.name}", path.read_bytes())
    recipe = recipe_of(f"{s3.url}/raw", base, output=f"{s3.url}/data", item_bytes=4000)
    output = open_folder(f"{s3.url}/data")
    source, run = resume_state.begin(output, recipe.config.source, recipe.settings)
    items = tokenization.plan_items(recipe.config, source, output)
    job = packed_data.pack_job(recipe, output, recipe.tokenizer, num_items=len(items))
    steps: ray_dataflow.Stages = [
        (download, {"cache_bytes": 10**9}),
        (stages.encode_conversations, {"job": job}),
        (write, {"job": job}),
    ]
    for item in items:
        for table in ray_dataflow.in_turn(ItemRow.of(item).to_table(), steps):
            ItemRow.from_table(table).raise_error()
    manifest = tokenization.finish(run, recipe.tokenizer, [job.key(item) for item in items], output)
    local = Manifest.load(packed / "data")
    assert [entry.sha256 for entry in manifest.shards] == [entry.sha256 for entry in local.shards]
