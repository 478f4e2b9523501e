"""What sent people in a circle: output below input, a signature that was renewed, a tokenizer that was lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.dataset.dataset import open_data
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.preprocessing import tokenization, tokenize_job, train_tokenizer_job
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.training import train_bpe
from tests.support.file_server import running_files
from tests.support.fixtures import contents
from tests.support.texts import json_lines

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def tokenizer(tmp_path: Path, documents: list[str]) -> str:
    train_bpe(documents, 300).save(tmp_path / "given.json")
    return str(tmp_path / "given.json")


@pytest.fixture
def config(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> TokenizeConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_bytes(json_lines([f"document {number} of many" for number in range(200)]))
    (tmp_path / "texts/README.md").write_text("# about")
    return TokenizeConfig(source="texts", output="out", tokenizer=tokenizer, val_fraction=0.1, num_workers=1)


def test_what_is_not_read_is_in_manifest_and_summary(config: TokenizeConfig, caplog: pytest.LogCaptureFixture) -> None:
    report, _, _ = tokenize_job.tokenize(config)
    expected = [{"reason": "of a format that is not read", "files": 1, "example": "README.md"}]
    assert json.loads(Path("out/manifest.json").read_bytes())["ignored"] == expected
    assert json.loads(Path("out/summary.json").read_bytes())["ignored"] == list(report.ignored) == expected
    assert "not read: 1 of a format that is not read (such as README.md)" in caplog.text
    assert Manifest.load(Path("out")).ignored == tuple(expected)
    Path("texts/README.md").unlink()
    Path("out/train_000000.bin").unlink()
    manifest = Path("out/manifest.json").read_bytes()
    tokenize_job.tokenize(config)
    assert Path("out/manifest.json").read_bytes() == manifest  # it tells of the input as it was planned


def test_output_below_the_source(config: TokenizeConfig) -> None:
    inside = dataclasses.replace(config, output="texts/tokens")
    for was_there in (False, True):
        report, _, done_before = tokenize_job.tokenize(inside)
        assert (report.documents, done_before) == (200, was_there)
    Path("texts/tokens/train_000000.bin").unlink()
    assert tokenize_job.tokenize(inside)[0].documents == 200
    other = dataclasses.replace(config, output="texts/other", source="texts")  # an earlier data set lies below, too
    assert tokenize_job.tokenize(other)[0].documents == 200
    before = contents(Path("texts"))
    with pytest.raises(UserError, match=r"--source and --output are both .*texts; choose another --output"):
        tokenize_job.tokenize(dataclasses.replace(config, output="./texts/"))
    assert contents(Path("texts")) == before
    shutil.copytree("texts", "more", ignore=shutil.ignore_patterns("tokens", "other"))
    beside = dataclasses.replace(config, source="more/*.json*", output="more")  # what is written matches the pattern
    for was_there in (False, True):
        report, _, done_before = tokenize_job.tokenize(beside)
        assert (report.documents, done_before) == (200, was_there)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("content", ["another", "garbage", None])
def test_a_finished_folder_gets_its_tokenizer_back(
    config: TokenizeConfig, content: str | None, is_trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if is_trained:
        config = dataclasses.replace(config, tokenizer=None, vocab_size=270)
    tokenize_job.tokenize(config)
    made, path = contents(Path("out")), Path("out/tokenizer.json")
    if content is None:
        path.unlink()
    elif content == "garbage":
        path.write_text("garbage")
    else:
        train_bpe(["zebra yak other " * 5], 265).save(path)
    _, (problem,) = tokenize_job.verify(config)
    assert f"{path.absolute()}" in problem or "than its tokenizer.json" in problem
    with pytest.raises(UserError, match=r"out/tokenizer\.json|than its tokenizer\.json .* run the command that made"):
        open_data(open_folder(Path("out")))
    report, _, done_before = tokenize_job.tokenize(config)
    assert not done_before and report.num_items_done == 0
    changed = {name for name, value in contents(Path("out")).items() if made.get(name) != value}
    assert changed <= {"summary.json", "tracking.jsonl", "tracking_sent.json"}
    assert tokenize_job.verify(config)[1] == [] and tokenize_job.tokenize(config)[2]


def test_a_tokenizer_folder_gets_its_tokenizer_back(config: TokenizeConfig) -> None:
    training = TrainTokenizerConfig(source="texts", output="tok", vocab_size=270, num_workers=1)
    train_tokenizer_job.train_tokenizer(training)
    made = Path("tok/tokenizer.json").read_bytes()
    for content in (b"garbage", Path(str(config.tokenizer)).read_bytes()):
        Path("tok/tokenizer.json").write_bytes(content)
        assert not train_tokenizer_job.train_tokenizer(training)[2]
        assert Path("tok/tokenizer.json").read_bytes() == made
    assert train_tokenizer_job.train_tokenizer(training)[2]


def test_a_signature_that_was_renewed(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[str]
) -> None:
    content = json_lines(documents * 40)
    with running_files({"bucket/a.jsonl": content}) as server:

        def signed(signature: str) -> TokenizeConfig:
            server.required_query = f"X-Amz-Signature={signature}&part=1"
            address = f"{server.url}/bucket/a.jsonl?{server.required_query}"
            return dataclasses.replace(config, source=address, item_bytes=200_000, output="out")

        first = signed("OLDSECRET")
        server.traffic.fail(status=403, after=1, times=10**9)  # its time is over when the file has been listed
        with pytest.raises(UserError, match="the server refuses it"):
            tokenize_job.tokenize(first)
        server.traffic.forget()
        report, _, _ = tokenize_job.tokenize(signed("NEWSECRET"))
        assert report.documents == len(documents) * 40
        assert tokenize_job.tokenize(signed("THIRDSECRET"))[2]
    wanted = (b"OLDSECRET", b"NEWSECRET", b"THIRDSECRET")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert not any(secret in path.read_bytes() for secret in wanted), path
    expected = dataclasses.replace(config, source=str(tmp_path / "local.jsonl"), item_bytes=200_000)
    (tmp_path / "local.jsonl").write_bytes(content)
    tokenization.tokenize(expected, open_folder(tmp_path / "expected"))
    shutil.rmtree(tmp_path / "expected/items")
    for path in (tmp_path / "expected").glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_begun_by_an_earlier_rule_goes_on(config: TokenizeConfig) -> None:
    """What was planned is read, also where a new folder would pass it over."""
    Path("texts/_b.jsonl").write_bytes(json_lines(["read once"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.listing.globs.is_hidden", lambda part: part.startswith("."))
        patch.setattr("pipeline.listing.selection.is_hidden", lambda part: part.startswith("."))
        tokenize_job.tokenize(config)
    made = {name: value for name, value in contents(Path("out")).items() if name.endswith(".bin")}
    assert tokenize_job.tokenize(config)[2]
    Path("out/train_000000.bin").unlink()
    tokenize_job.tokenize(config)
    assert {name: value for name, value in contents(Path("out")).items() if name.endswith(".bin")} == made
    Path("texts/c.JSONL").write_bytes(json_lines(["new"]))
    with pytest.raises(UserError, match=r"c\.JSONL is new in the source"):
        tokenize_job.tokenize(config)
