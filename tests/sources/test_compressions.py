"""Compressed files against the programs that write them: members, padding, long windows, damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd as zstd_module

from pipeline.sources.compressions import unpacked
from tests.support.texts import json_lines, zstd
from tests.support.trees import documents

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".zstd": zstd,
}
CONTENT = b"".join(b"line %d\n" % number for number in range(50_000))


def unpack(content: bytes, suffix: str, chunk: int | None = None) -> bytes:
    file = unpacked(io.BytesIO(content), f"a.txt{suffix.upper()}")
    return b"".join(iter(lambda: file.read(chunk), b""))


def long_window(content: bytes, window_log: int) -> bytes:
    """A zstd stream, so without the size of its content, with a window of 2**window_log bytes."""
    options = {int(zstd_module.CompressionParameter.window_log): window_log}
    packer = zstd_module.ZstdCompressor(options=options)
    return bytes(packer.compress(content) + packer.flush())


@pytest.mark.parametrize("chunk", [None, 1, 4096])
@pytest.mark.parametrize("suffix", PACK)
def test_members_one_after_another(suffix: str, chunk: int | None) -> None:
    parts = [CONTENT[:2_000], b"", CONTENT[2_000:9_000]]
    assert unpack(b"".join(map(PACK[suffix], parts)), suffix, chunk) == b"".join(parts)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("padding", [1, 4, 512, 700_000])
def test_zeros_behind_a_member_are_padding(suffix: str, padding: int, tmp_path: Path) -> None:
    member, zeros = PACK[suffix](CONTENT), bytes(padding)
    assert unpack(member + zeros, suffix) == CONTENT
    assert unpack(member + zeros + member + zeros, suffix) == CONTENT * 2
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](json_lines(["one"])) + zeros)
    assert documents(str(tmp_path)) == ["one"]


@pytest.mark.parametrize("suffix", PACK)
def test_nothing_behind_a_member_is_passed_over(suffix: str) -> None:
    member = PACK[suffix](CONTENT)
    with pytest.raises(OSError):  # Python's own gzip, bz2 and lzma files end without a word here
        unpack(member + b"garbage, not a member", suffix)
    with pytest.raises(OSError):
        unpack(member + member[: len(member) // 2], suffix)
    with pytest.raises(OSError):
        unpack(member[:-3], suffix)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_long_windows(window_log: int) -> None:
    packed = long_window(CONTENT, window_log)
    assert unpack(packed, ".zst") == CONTENT
    assert unpack(packed + packed, ".zst") == CONTENT * 2
    with pytest.raises(OSError):
        unpack(packed[:-3], ".zst")


def test_what_the_program_zstd_writes(tmp_path: Path) -> None:
    if (program := shutil.which("zstd")) is None:
        pytest.skip("needs the program zstd")
    text = random.Random(1).randbytes(1000).hex() * 3
    content = json_lines([text, "two"])
    for number, options in enumerate([["-1"], ["--ultra", "-22", "--long=31"], ["--long=28", "--no-check"]]):
        for feed in (["-c"], ["-c", f"--stream-size={len(content)}"]):
            packed = subprocess.run([program, "-q", *feed, *options], input=content, capture_output=True, check=True)
            (tmp_path / f"{number}{len(feed)}.jsonl.zst").write_bytes(packed.stdout)
    assert documents(str(tmp_path)) == [text, "two"] * 6
