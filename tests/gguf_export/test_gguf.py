"""The GGUF read back by the gguf package: every tensor, the tokenizer, metadata; and what is refused.

The names of tensors are compared with the package's own table, the order of rows with llama.cpp's rule written down
index by index. tests/gguf_export/test_llama_cpp.py runs the files in llama.cpp itself.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.transformer import Transformer
from pipeline.config.inference import ExportConfig
from pipeline.conversations.templates import TEMPLATES, Chat, chat_of, with_chat_tokens
from pipeline.errors import UserError
from pipeline.pretrained import huggingface, weights
from pipeline.pretrained.export_job import export
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import count_pretokens, train_bpe
from tests.support.conversations import TRAPS, WORDS, conversations
from tests.support.llama_models import llama_folder
from tests.support.llama_twin import llama_name

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install --constraint constraints.txt gguf")

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = [
    pytest.param({}, id="tied"),
    pytest.param({"tie_embeddings": False, "theta": 5e5, "norm_eps": 1e-6}, id="untied"),
    pytest.param({"qk_norm": True}, id="qk_norm"),
]


def tokenizer_of(pattern: Pattern = "gpt2") -> Tokenizer:
    texts = [" ".join(WORDS), *TRAPS, "assistant user system\n\n"]
    return train_bpe(count_pretokens(pa.array(texts), pattern=pattern), 300, pattern=pattern)


def exported(folder: Path, output: Path, dtype: Any = "f32") -> Any:
    """The GGUF of a folder, opened."""
    report = export(ExportConfig(checkpoint=str(folder), output=str(output), format="gguf", dtype=dtype))
    (name,) = report.files
    assert report.files[name] == (output / name).stat().st_size
    return gguf.GGUFReader(output / name)


def values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def expected_tensors(model: Transformer) -> dict[str, Tensor]:
    """By the package's names: the model's tensors, rows of llama's queries and keys where llama.cpp looks for them."""
    config = model.config
    kind = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    found = {}
    for ours, parameter in model.named_parameters():
        tensor = parameter.detach()
        if ours in ("embedding.weight", "output.weight"):
            tensor = tensor[: config.vocab_size]
        if not config.qk_norm and ours.endswith(("q_proj.weight", "k_proj.weight")):
            turned = torch.empty_like(tensor)
            width = config.head_dim
            for row in range(config.d_model):
                head, within = divmod(row, width)
                half, pair = divmod(within, width // 2)
                turned[head * width + 2 * pair + half] = tensor[row]
            tensor = turned
        name = names.get_name(llama_name(ours), try_suffixes=(".weight",))
        assert name is not None
        found[name] = tensor
    return found


@pytest.mark.parametrize("changes", NETWORKS)
def test_every_tensor_is_there_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "model", tokenizer_of(), **changes)
    reader = exported(tmp_path / "model", tmp_path / "out")
    expected = expected_tensors(model)
    assert [tensor.name for tensor in reader.tensors] == list(expected)
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.from_numpy(tensor.data.copy()), expected[tensor.name]), tensor.name


def test_bf16_is_rounded_once_and_vectors_are_not(tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "model", tokenizer_of(), tie_embeddings=False)
    expected = expected_tensors(model)
    for tensor in exported(tmp_path / "model", tmp_path / "out", "bf16").tensors:
        right = expected[tensor.name]
        if right.ndim == 1:
            assert torch.equal(torch.from_numpy(tensor.data.copy()), right)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        bits = torch.from_numpy(tensor.data.copy()).view(torch.int16)
        assert torch.equal(bits, right.bfloat16().view(torch.int16)), tensor.name


def test_q8_0_keeps_every_weight_within_half_a_step_of_its_block(tmp_path: Path) -> None:
    """32 numbers share a step of their largest over 127, which is stored in float16: half of it, and that rounding."""
    model = llama_folder(tmp_path / "model", tokenizer_of())
    expected = expected_tensors(model)
    num_blocks = 0
    for tensor in exported(tmp_path / "model", tmp_path / "out", "q8_0").tensors:
        right = expected[tensor.name].numpy()
        if right.ndim == 1:
            assert np.array_equal(tensor.data, right)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        error = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - right).reshape(-1, 32)
        largest = np.abs(right).reshape(-1, 32).max(axis=1)
        assert (error.max(axis=1) <= largest * (1 / 254 + 2**-11)).all(), tensor.name
        num_blocks += len(error)
    assert num_blocks * 32 == sum(tensor.numel() for tensor in expected.values() if tensor.ndim > 1)


@pytest.mark.parametrize("changes", NETWORKS)
def test_metadata_say_what_the_network_is(changes: dict[str, Any], tmp_path: Path) -> None:
    config = llama_folder(tmp_path / "model", tokenizer_of(), **changes).config
    found = values(exported(tmp_path / "model", tmp_path / "tiny"))
    kind = "qwen3" if config.qk_norm else "llama"
    expected = {
        "context_length": config.context_length,
        "block_count": config.num_layers,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    assert found["general.architecture"] == kind and found["general.name"] == "tiny"
    assert {name: found[f"{kind}.{name}"] for name in expected} == expected
    assert found[f"{kind}.rope.freq_base"] == pytest.approx(config.theta)
    assert found[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps)


@pytest.mark.parametrize(("pattern", "name"), [("gpt2", "gpt-2"), ("cl100k", "llama-bpe")])
def test_the_tokenizer_is_ours(pattern: Pattern, name: str, tmp_path: Path) -> None:
    """The model has seven ids more than the tokenizer: they are there, and no token."""
    tokenizer = tokenizer_of(pattern)
    num_ids = tokenizer.vocab_size + 7
    llama_folder(tmp_path / "model", tokenizer, vocab_size=num_ids)
    found = values(exported(tmp_path / "model", tmp_path / "out"))
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == name
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == num_ids
    read_back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model").convert_ids_to_tokens(
        range(tokenizer.vocab_size)
    )
    assert tokens[: tokenizer.vocab_size] == read_back
    special = tokenizer.special_tokens.values()
    for token_id, kind in enumerate(types):
        expected = gguf.TokenType.CONTROL if token_id in special else gguf.TokenType.NORMAL
        assert kind == (expected if token_id < tokenizer.vocab_size else gguf.TokenType.UNUSED)
    assert found["tokenizer.ggml.merges"] == json.loads(tokenizer.to_json())["model"]["merges"]
    eot = tokenizer.eot_id
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == eot
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.chat_template" not in found and "tokenizer.ggml.eot_token_id" not in found
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in (tmp_path / "out" / "Modelfile").read_text()


def unreachable_tokenizer() -> Tokenizer:
    """abc is a token, but b and c merge first, and nothing merges a with bc."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"bc", b"ab", b"abc", b"<|endoftext|>"]
    return Tokenizer(tokens, [(98, 99), (97, 98), (257, 99)], {"<|endoftext|>": 259}, pattern="cl100k")


def test_a_token_that_its_merges_do_not_lead_to(tmp_path: Path) -> None:
    assert unreachable_tokenizer().encode("abc") == [97, 256]
    llama_folder(tmp_path / "model", unreachable_tokenizer())
    assert values(exported(tmp_path / "model", tmp_path / "out"))["tokenizer.ggml.pre"] == "dbrx"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_model_that_chats_brings_its_template(name: str, tmp_path: Path) -> None:
    """Rendered by a plain Jinja, as llama-cpp-python does, it is the text that transformers renders by our own."""
    llama_folder(tmp_path / "model", tokenizer_of(), name)
    found = values(exported(tmp_path / "model", tmp_path / "out"))
    chat = chat_of(name, with_chat_tokens(tokenizer_of(), name))
    assert found["tokenizer.ggml.eot_token_id"] == chat.end_id
    assert found["tokenizer.ggml.eos_token_id"] == chat.tokenizer.eot_id
    for token, token_id in chat.tokenizer.special_tokens.items():
        assert found["tokenizer.ggml.tokens"][token_id] == token
        assert found["tokenizer.ggml.token_type"][token_id] == gguf.TokenType.CONTROL
    template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        found["tokenizer.chat_template"]
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model", eos_token="<|endoftext|>")
    for messages in conversations(30):
        rendered = template.render(messages=messages, eos_token="<|endoftext|>", add_generation_prompt=True)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert as_ollama_renders(tmp_path / "out" / "Modelfile", messages) == rendered_untrimmed(chat, messages)


def as_ollama_renders(modelfile: Path, messages: list[dict[str, str]]) -> str:
    """The template of a Modelfile: one loop over messages, two fields in it, nothing else of Go's language."""
    template = modelfile.read_text().split('TEMPLATE """')[1].split('"""')[0]
    before, loop = template.split("{{ range .Messages }}")
    body, after = loop.split("{{ end }}")
    parts = [body.replace("{{ .Role }}", it["role"]).replace("{{ .Content }}", it["content"]) for it in messages]
    return before + "".join(parts) + after


def rendered_untrimmed(chat: Chat, messages: list[dict[str, str]]) -> str:
    end = chat.template.end or "<|endoftext|>"
    texts = [chat.template.begin.format(role=it["role"]) + it["content"] + end + chat.template.after for it in messages]
    return "".join(texts) + chat.template.begin.format(role="assistant")


def test_the_modelfile_names_the_file_and_what_ends_a_text(tmp_path: Path) -> None:
    llama_folder(tmp_path / "model", tokenizer_of(), "chatml")
    exported(tmp_path / "model", tmp_path / "out", "q8_0")
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "FROM ./model-q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
        "PARAMETER num_ctx 48\n"
        "PARAMETER temperature 0.8\n"
        "PARAMETER top_p 0.9\n"
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_folder(tmp_path / "model", tokenizer_of())
    read, alive, most = weights.read_weights, weakref.WeakSet[Tensor](), 0

    def watched(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in read(path, config):
            copy = tensor.clone()
            del tensor
            alive.add(copy)
            most = max(most, len(alive))
            yield name, copy
            del copy

    monkeypatch.setattr(weights, "read_weights", watched)
    exported(tmp_path / "model", tmp_path / "out", "q8_0")
    assert most == 1


def test_an_export_that_fails_midway_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_folder(tmp_path / "model", tokenizer_of())
    exported(tmp_path / "model", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["Modelfile", "README.md", "gpt25.json", "model-f32.gguf"]
    write, count = gguf.GGUFWriter.write_tensor_data, 0

    def full_disk(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        exported(tmp_path / "model", tmp_path / "out", "bf16")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"], "no half folder is left"
    monkeypatch.undo()
    exported(tmp_path / "model", tmp_path / "out", "bf16")
    assert not (tmp_path / "out" / "model-f32.gguf").exists() and (tmp_path / "out" / "model-bf16.gguf").exists()


def test_files_of_others_and_exports_in_another_format_stay(tmp_path: Path) -> None:
    llama_folder(tmp_path / "model", tokenizer_of())
    export(ExportConfig(checkpoint=str(tmp_path / "model"), output=str(tmp_path / "folder")))
    with pytest.raises(UserError, match="holds an export in the format huggingface; choose another --output"):
        exported(tmp_path / "model", tmp_path / "folder")
    exported(tmp_path / "model", tmp_path / "out")
    with pytest.raises(UserError, match="holds an export in the format gguf; choose another --output"):
        export(ExportConfig(checkpoint=str(tmp_path / "model"), output=str(tmp_path / "out")))
    (tmp_path / "out" / "mine-Q4_K_M.gguf").write_text("precious")
    with pytest.raises(UserError, match=r"holds what no export wrote: mine-Q4_K_M\.gguf; move that"):
        exported(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "mine-Q4_K_M.gguf").read_text() == "precious"
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_what_llama_cpp_cannot_have_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.gguf_export import vocabulary

    def refused(tokenizer: Tokenizer, dtype: Any = "f32", **changes: Any) -> str:
        llama_folder(tmp_path / "model", tokenizer, **changes)
        with pytest.raises(UserError) as caught:
            exported(tmp_path / "model", tmp_path / "out", dtype)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    narrow = refused(tokenizer_of(), "q8_0", d_ff=200)
    assert narrow == (
        "q8_0 stores 32 numbers of a row at a time, but d_ff is 200, which is no multiple of 32; give --dtype f32 or "
        "--dtype bf16"
    )
    only_bytes = Tokenizer([*(bytes([byte]) for byte in range(256)), b"<|endoftext|>"], [], {"<|endoftext|>": 256})
    assert "has no merges, and llama.cpp reads none without" in refused(only_bytes)
    looks_alike = tokenizer_of().with_special_tokens(["[UNUSED_301]"])  # as the model's last id, which is no token
    assert looks_alike.vocab_size == 301
    assert "two tokens that a GGUF writes as '[UNUSED_301]'; give" in refused(looks_alike, vocab_size=302)
    monkeypatch.delitem(vocabulary._NAMES, "cl100k")
    assert "by the pattern cl100k, for which llama.cpp has no name" in refused(tokenizer_of("cl100k"))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="dtype is q8_0, which only a GGUF can have; add --format gguf"):
        ExportConfig(dtype="q8_0")
    with pytest.raises(UserError, match="--mlflow logs a Hugging Face folder; leave out --format gguf"):
        ExportConfig(format="gguf", mlflow=True)
    assert ExportConfig(dtype="f32").number_format == ExportConfig(dtype="float32").number_format == "float32"


def test_without_the_package_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_folder(tmp_path / "model", tokenizer_of())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no package gguf, which --format gguf needs; run `.* -m pip install --c"):
        exported(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_job_and_its_model_card(tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "model", tokenizer_of())
    command = [sys.executable, str(ROOT / "jobs/export.py"), "model", "--output", "out", "--format", "gguf"]
    done = subprocess.run(
        [*command, "--dtype", "q8_0"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert f"parameters  {model.config.num_parameters:,}, q8_0" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf\n" in card and "llama-cli -m model-q8_0.gguf" in card
    assert "transformers" not in card and "ollama create out -f Modelfile" in card
    note = huggingface.read_note(tmp_path / "out")
    assert note["format"] == "gguf" and note["dtype"] == "q8_0"
