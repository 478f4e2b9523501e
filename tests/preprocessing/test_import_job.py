"""Import of token files that others made: figures by hand, no second copy, interrupted downloads, mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from pipeline.config.data import ImportShardsConfig
from pipeline.dataset.dataset import open_data
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.dataset.token_counts import FileCounts, count_file
from pipeline.dataset.verification import verify
from pipeline.errors import UserError
from pipeline.preprocessing import import_job
from pipeline.preprocessing.import_job import ShardImport
from pipeline.remote import files as remote_files
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.fake_model_hub import running_model_hub
from tests.support.file_server import ALWAYS
from tests.support.s3_server import S3


def llm_c(tokens: list[int], *, wide: bool = False) -> bytes:
    """A file as llm.c's data scripts write it: 256 int32, of which three say something, then the tokens."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = [20240801 if wide else 20240520, 7 if wide else 1, len(tokens)]
    return header.tobytes() + np.array(tokens, dtype=np.uint32 if wide else np.uint16).tobytes()


def bare(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype=np.uint16).tobytes()


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_data / "tokenizer.json")


@pytest.fixture
def splits(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Three files; the second goes on inside a document of the first, as the field cuts its shards."""
    eot = tokenizer.eot_id
    ids = np.random.default_rng(0).integers(0, 256, 9_000).tolist()
    return {
        "fineweb_train_000001.bin": [eot, *ids[:3_000], eot, *ids[3_000:4_000]],
        "fineweb_train_000002.bin": [*ids[4_000:6_000], eot, *ids[6_000:7_000]],
        "fineweb_val_000000.bin": [eot, *ids[7_000:], eot],
    }


@pytest.fixture
def source(splits: dict[str, list[int]], tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, tokens in splits.items():
        (folder / name).write_bytes(llm_c(tokens))
    return folder


@pytest.fixture
def config(source: Path, tiny_data: Path, tmp_path: Path) -> ImportShardsConfig:
    return ImportShardsConfig(
        train=str(source / "fineweb_train_*.bin"),
        val=str(source / "fineweb_val_*.bin"),
        output=str(tmp_path / "data"),
        tokenizer=str(tiny_data / "tokenizer.json"),
    )


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub({}) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        yield server


def import_into(config: ImportShardsConfig) -> Manifest:
    output = open_folder(config.output)
    output.make()
    return ShardImport(config).run(output)


def error_of(config: ImportShardsConfig) -> str:
    with pytest.raises(UserError) as caught:
        import_into(config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def check(folder: str, manifest: Manifest, splits: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    """The manifest's figures are those counted here; the folder opens as jobs/tokenize.py's do."""
    assert Manifest.load(open_folder(folder)) == manifest
    for entry, (name, tokens) in zip(manifest.shards, splits.items(), strict=True):
        text = tokenizer.decode_bytes([token for token in tokens if token != tokenizer.eot_id])
        assert (entry.tokens, entry.documents) == (len(tokens), tokens.count(tokenizer.eot_id))
        assert (entry.text_bytes, entry.source) == (len(text), name)
    found, _ = open_data(open_folder(folder))
    assert found.fingerprint == tokenizer.fingerprint
    for split in ("train", "val"):
        expected = [token for name, tokens in splits.items() if split in name for token in tokens]
        stream = open_split(open_folder(folder), split)
        assert stream.read(0, len(stream)).tolist() == expected
    assert verify(open_folder(folder)) == []


def test_files_of_llm_c_become_data_without_a_copy(
    config: ImportShardsConfig, source: Path, splits: dict[str, list[int]], tokenizer: Tokenizer
) -> None:
    manifest = import_into(config)
    check(config.output, manifest, splits, tokenizer)
    names = ["train_000000.bin", "train_000001.bin", "val_000000.bin"]
    assert [entry.name for entry in manifest.shards] == names
    for name, theirs in zip(names, splits, strict=True):
        assert (Path(config.output) / name).samefile(source / theirs)
    hashes = [hashlib.sha256((source / name).read_bytes()).hexdigest() for name in splits]
    assert [entry.sha256 for entry in manifest.shards] == hashes
    assert not list(Path(config.output).rglob(".tmp-*"))


def test_headerless_files_stay_as_they_are(
    config: ImportShardsConfig, source: Path, splits: dict[str, list[int]], tokenizer: Tokenizer
) -> None:
    for name, tokens in splits.items():
        (source / name).write_bytes(bare(tokens))
    manifest = import_into(dataclasses.replace(config, headerless=True))
    check(config.output, manifest, splits, tokenizer)
    for entry, name in zip(manifest.shards, splits, strict=True):
        assert (Path(config.output) / entry.name).samefile(source / name)
    (Path(config.output) / "train_000000.bin").unlink()
    (Path(config.output) / "train_000000.bin").write_bytes(bare([1, 2]))
    assert any("train_000000.bin has 4 bytes" in problem for problem in verify(open_folder(config.output)))
    with pytest.raises(UserError, match="holds 2 tokens of 2 bytes, but the manifest says"):
        open_split(open_folder(config.output), "train")


def test_a_disk_without_hard_links_gets_references(
    config: ImportShardsConfig, source: Path, splits: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    import_into(config)
    for path in Path(config.output).glob("*.bin"):
        assert path.is_symlink() and path.resolve().parent == source
    assert len(open_split(open_folder(config.output), "val")) == len(splits["fineweb_val_000000.bin"])


def test_ids_of_four_bytes(config: ImportShardsConfig, source: Path, tmp_path: Path) -> None:
    names = [f"<{number}>" for number in range(2**16)]
    special = {name: 256 + index for index, name in enumerate(names)} | {"<|endoftext|>": 256 + len(names)}
    tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in special]
    Tokenizer(tokens, [], special).save(tmp_path / "wide.json")
    wide = dataclasses.replace(config, tokenizer=str(tmp_path / "wide.json"))
    assert "tokens of 2 bytes, but a vocabulary of 65,793 ids has tokens of 4" in error_of(wide)
    for path in source.iterdir():
        path.write_bytes(llm_c([65_792, 7, 8, 65_791], wide=True))
    manifest = import_into(wide)
    assert [(entry.tokens, entry.documents, entry.text_bytes) for entry in manifest.shards] == [(4, 1, 2)] * 3
    assert open_split(open_folder(config.output), "val").read(0, 4).tolist() == [65_792, 7, 8, 65_791]
    assert "tokens of 4 bytes, but a vocabulary of 512" in error_of(
        dataclasses.replace(config, output=str(tmp_path / "other"))
    )


def test_another_token_between_documents(config: ImportShardsConfig, splits: dict[str, list[int]]) -> None:
    manifest = import_into(dataclasses.replace(config, eot_id=65))
    assert manifest.eot_id == 65
    for entry, tokens in zip(manifest.shards, splits.values(), strict=True):
        assert entry.documents == tokens.count(65) > 0
        assert entry.text_bytes == sum(token not in (65, 511) for token in tokens)
    assert "eot_id is 512, but the tokenizer has ids below 512" in error_of(dataclasses.replace(config, eot_id=512))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "fineweb_train_000002.bin",
            llm_c([1, 512]),
            "holds the id 512, but the tokenizer has ids below 512; name the",
        ),
        ("fineweb_train_000002.bin", llm_c([1, 2, 3])[:-2], "is damaged: its header counts 3 tokens, 1,030 bytes"),
        ("fineweb_train_000002.bin", llm_c([1, 2, 3])[:100], "is truncated: 100 bytes are less than its header"),
        ("fineweb_val_000000.bin", b"abcd" * 400, "has no header of a shard: it begins with the numbers 1684234849"),
        ("fineweb_val_000000.bin", bare([1, 2, 3]), "give --headerless if it holds bare uint16 tokens"),
        ("fineweb_val_000000.bin", b"", "is empty; fetch or write it again"),
    ],
    ids=["id beyond the vocabulary", "cut", "cut header", "wrong magic", "headerless", "empty"],
)
def test_what_is_no_whole_file_of_tokens_is_one_sentence(
    config: ImportShardsConfig, source: Path, name: str, content: bytes, words: str
) -> None:
    (source / name).write_bytes(content)
    sentence = error_of(config)
    assert words in sentence and str(source / name) in sentence
    assert not (Path(config.output) / "manifest.json").exists()


def test_headerless_files_that_are_none(config: ImportShardsConfig, source: Path) -> None:
    bare_config = dataclasses.replace(config, headerless=True)
    assert "has the header of a shard; leave --headerless out" in error_of(bare_config)
    for path in source.iterdir():
        path.write_bytes(b"odd")
    assert "has 3 bytes, an odd number" in error_of(bare_config)


def test_mistakes_in_the_patterns(config: ImportShardsConfig, source: Path) -> None:
    nothing = dataclasses.replace(config, train=str(source / "none_*.bin"))
    assert "no .bin file matches --train" in error_of(nothing)
    both = dataclasses.replace(config, train=str(source))
    assert "fineweb_val_000000.bin matches --train and --val" in error_of(both)
    assert "ftp://host/x.bin is none that can be read" in error_of(dataclasses.replace(config, val="ftp://host/x.bin"))


def test_an_import_goes_on_where_it_stopped(
    config: ImportShardsConfig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = import_into(config)
    (Path(config.output) / "manifest.json").unlink()
    (Path(config.output) / "train_000001.bin").unlink()
    read: list[str] = []

    def noted(path: Path, *arguments: Any, **settings: Any) -> FileCounts:
        read.append(path.name)
        return count_file(path, *arguments, **settings)

    monkeypatch.setattr(import_job, "count_file", noted)
    assert import_into(config) == manifest
    assert read == ["fineweb_train_000002.bin"]
    with pytest.raises(UserError, match="was begun with eot_id"):
        import_into(dataclasses.replace(config, eot_id=3))
    (source / "fineweb_val_000000.bin").write_bytes(llm_c([1, 2, 3]))
    assert "val: fineweb_val_000000.bin has changed in the source" in error_of(config)


def test_an_interrupted_download_goes_on(
    config: ImportShardsConfig,
    splits: dict[str, list[int]],
    tokenizer: Tokenizer,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_files, "_RANGE_BYTES", 1_000)
    hub.push("a" * 40, {f"data/{name}": llm_c(tokens) for name, tokens in splits.items()} | {"README.md": b"x"})
    from_hub = dataclasses.replace(
        config, train=f"hf://datasets/{NAME}/data/*train*", val=f"hf://datasets/{NAME}/data/*val*"
    )
    last = "fineweb_train_000002.bin"
    hub.traffic.fail(path=last, first_byte=4_000, status=403, times=ALWAYS)
    assert "403" in error_of(from_hub)
    hub.traffic.forget()
    hub.push("b" * 40, {"data/other_train.bin": b"moved on"})
    manifest = import_into(from_hub)
    size = len(llm_c(splits[last]))
    assert 1_024 + size - 4_000 <= hub.traffic.asked_bytes(last) <= 1_024 + size - 3_000, "only the header and the rest"
    named = {f"data/{name}": tokens for name, tokens in splits.items()}
    check(config.output, manifest, named, tokenizer)
    assert all("a" * 40 in entry["version"] for entry in manifest.inputs)
    assert not list(Path(config.output).rglob("*.part")) and not (Path(config.output) / "items/downloads").exists()


def test_a_wrong_remote_file_is_not_fetched(config: ImportShardsConfig, hub: FakeHub) -> None:
    hub.push("a" * 40, {"train.bin": b"abcd" * 100_000, "val.bin": llm_c([1, 2])})
    from_hub = dataclasses.replace(config, train=f"hf://datasets/{NAME}/train.bin", val=f"hf://datasets/{NAME}/val.bin")
    assert f"hf://datasets/{NAME}/train.bin has no header of a shard" in error_of(from_hub)
    assert hub.traffic.asked_bytes("train.bin") == 1_024


def test_from_a_bucket_into_a_bucket(
    config: ImportShardsConfig, splits: dict[str, list[int]], tokenizer: Tokenizer, s3: S3, tmp_path: Path
) -> None:
    for name, tokens in splits.items():
        s3.put(f"theirs/{name}", llm_c(tokens))
    in_bucket = dataclasses.replace(
        config, train=f"{s3.url}/theirs/*train*.bin", val=f"{s3.url}/theirs/*val*.bin", output=f"{s3.url}/data"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT25_CACHE", str(tmp_path / "cache"))
        check(in_bucket.output, import_into(in_bucket), splits, tokenizer)
    assert (tmp_path / "cache/import").is_dir() and not list((tmp_path / "cache/import").glob("*.bin"))


def test_the_tokenizer_of_a_model_on_the_hub(
    config: ImportShardsConfig, tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with running_model_hub() as hub:
        hub.commit("openai-community/gpt2", {"tokenizer.json": (tiny_data / "tokenizer.json").read_bytes()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        default = ImportShardsConfig(train=config.train, val=config.val, output=config.output)
        assert import_into(default).tokenizer_fingerprint == tokenizer.fingerprint
        assert not any("safetensors" in request for request in hub.requests)
        with pytest.raises(UserError, match=r"hf://nobody/nothing/tokenizer\.json: the hub has no such"):
            ShardImport(dataclasses.replace(config, tokenizer="hf://nobody/nothing"))
        with pytest.raises(UserError, match="is not of the form hf://OWNER/NAME"):
            ShardImport(dataclasses.replace(config, tokenizer="hf://nobody"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody answers there
    assert ShardImport(default).tokenizer.fingerprint == tokenizer.fingerprint, "the copy of this machine is enough"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        UserError, match=r"GPT-2's tokenizer is needed and cannot be fetched .* or give --tokenizer FILE"
    ):
        ShardImport(default)
