"""Folders of the published GPT-2.5: the logits of an independent forward pass, every use, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.config.inference import ExportConfig
from pipeline.errors import UserError
from pipeline.pretrained import resolve, weights
from pipeline.pretrained.export_job import export
from pipeline.tokenizer.bpe import Tokenizer
from tests.conftest import shared_folder
from tests.support.llama_twin import ROUNDING, relative_error
from tests.support.published_network import CHAT_TOKENS, PublishedNetwork, chat_tokenizer, save_tensors

CPU = torch.device("cpu")
NETWORK = PublishedNetwork(vocab_size=515)
"""Its vocabulary is that of tiny_data's tokenizer and three tokens more."""


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path) -> Path:
    NETWORK.save(tmp_path / "published")
    chat_tokenizer(tiny_data / "tokenizer.json", tmp_path / "published")
    return tmp_path / "published"


def some_tokens(network: PublishedNetwork, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, network.vocab_size, (batch, network.context_length), generator=generator)


def assert_same_logits(network: PublishedNetwork, path: Path, tolerance: float = ROUNDING) -> None:
    from model.transformer import Transformer

    model = Transformer(weights.read_model_config(path))
    weights.load_weights(path, model)
    tokens = some_tokens(network)
    with torch.no_grad():
        assert relative_error(model(tokens), network.logits(tokens)) < tolerance


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model."])
@pytest.mark.parametrize("tables", [True, False])
def test_logits_are_those_of_an_independent_forward_pass(tmp_path: Path, files: int, prefix: str, tables: bool) -> None:
    network = PublishedNetwork(vocab_size=203, num_layers=3, num_heads=4, d_model=48, d_ff=112, theta=500.0)
    network.save(tmp_path, network.tensors(prefix=prefix, tables=tables), files=files)
    assert_same_logits(network, tmp_path)


@pytest.mark.parametrize("num_heads", [1, 2, 16])
def test_heads_of_every_width(tmp_path: Path, num_heads: int) -> None:
    network = PublishedNetwork(vocab_size=64, num_heads=num_heads)
    assert_same_logits(network, network.save(tmp_path))


def test_half_precision_is_read(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        tensors = NETWORK.tensors(dtype=dtype)
        rounded = PublishedNetwork(vocab_size=NETWORK.vocab_size)
        rounded.weights.update({name: tensors[f"model.{name}"].float() for name in rounded.weights})
        assert_same_logits(rounded, NETWORK.save(tmp_path / str(dtype), tensors))


def test_other_spellings_of_the_same_folder(tmp_path: Path) -> None:
    """Matrices with or without .weight, a second copy of the embedding, the embedding as output alone, few settings."""
    tensors = NETWORK.tensors()
    dotted = {name if name.endswith((".weight", "cos", "sin")) else f"{name}.weight": t for name, t in tensors.items()}
    bare = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    copied = tensors | {"model.linear.weight": tensors["model.emb.weight"].clone()}
    output = {name.replace("model.emb.", "model.linear."): tensor for name, tensor in tensors.items()}
    for number, variant in enumerate((dotted, bare, copied, output)):
        assert_same_logits(NETWORK, NETWORK.save(tmp_path / str(number), variant))
    folder = NETWORK.save(tmp_path / "few")
    few = ("model_type", "vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff", "theta")
    (folder / "config.json").write_text(json.dumps({name: NETWORK.config()[name] for name in few}))
    assert_same_logits(NETWORK, folder)


def test_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    network = PublishedNetwork(vocab_size=64)
    output = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)) * 0.1
    folder = network.save(tmp_path, network.tensors() | {"model.linear.weight": output}, tie_word_embeddings=False)
    assert not weights.read_model_config(folder).tie_embeddings
    found = dict(weights.read_weights(folder, weights.read_model_config(folder)))
    assert torch.equal(found["output.weight"], output)
    assert torch.equal(found["embedding.weight"], network.weights["emb.weight"])


def test_the_published_shape_and_vocabulary(tmp_path: Path) -> None:
    """12 x 768 would take minutes here: its vocabulary of 50,260 and its tokenizer, as transformers writes it."""
    from transformers import AutoTokenizer

    source = shared_folder("gpt2")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=list(CHAT_TOKENS))
    theirs.pad_token = theirs.eos_token
    network = PublishedNetwork(vocab_size=50_260, num_layers=1, d_model=16, d_ff=32)
    folder = network.save(tmp_path / "published")
    theirs.save_pretrained(folder)
    opened = resolve.open_model(folder, CPU)
    assert opened.config.vocab_size == opened.tokenizer.vocab_size == 50_260 and opened.tokenizer.eot_id == 50_256
    assert opened.tokenizer.special_tokens.keys() == {"<|endoftext|>", *CHAT_TOKENS}
    text = "It's 1,234 żółw\n\n  of <|user|>"
    chat = f"<|user|>\n{text[:-9]}<|endoftext|>\n<|assistant|>"
    assert opened.tokenizer.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    assert opened.tokenizer.encode(chat, {"<|endoftext|>", *CHAT_TOKENS}) == theirs(chat)["input_ids"]
    tokens = torch.tensor([theirs(chat)["input_ids"]])
    with torch.no_grad():
        assert relative_error(opened.model(tokens), network.logits(tokens)) < ROUNDING


def test_the_export_is_a_llama_with_the_same_logits(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("load with trust_remote_code=True")
    report = export(ExportConfig(checkpoint=str(folder), output=str(tmp_path / "llama")))
    assert report.parameters == sum(weight.numel() for weight in NETWORK.weights.values())
    llama: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager").eval()
    tokens = some_tokens(NETWORK)
    with torch.no_grad():
        assert relative_error(llama(tokens).logits, NETWORK.logits(tokens)) < ROUNDING
    assert (tmp_path / "llama" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert Tokenizer.from_file(tmp_path / "llama" / "tokenizer.json").vocab_size == 515
    assert "trust_remote_code" not in (tmp_path / "llama" / "README.md").read_text()
    assert not list((tmp_path / "llama").glob("*.py"))


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {each: tensor for each, tensor in tensors.items() if each != name}


EXTRA = torch.zeros(32)
TENSORS = NETWORK.tensors()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(TENSORS, "model.tblocks.1.ffn.w3"), "lacks the tensor model.tblocks.1.ffn.w3"),
        (without(TENSORS, "model.norm.weight"), "norm behind its blocks, but has none"),
        (without(TENSORS, "model.emb.weight"), "matrix outside of its blocks as embedding, but has none"),
        (TENSORS | {"model.tblocks.0.mhsa.Wq.bias": EXTRA}, "model.tblocks.0.mhsa.Wq.bias, which is not ours"),
        (TENSORS | {"model.tblocks.0.mhsa.norm_q.weight": EXTRA}, "model.tblocks.0.mhsa.norm_q.weight, which is not"),
        (TENSORS | {"model.tblocks.2.norm_att.weight": EXTRA}, "model.tblocks.2.norm_att.weight, which is not ours"),
        (TENSORS | {"model.norm2.weight": EXTRA}, "has 2: model.norm, model.norm2"),
        (TENSORS | {"model.pos.weight": torch.zeros(128, 32)}, "as embedding, but has 2: model.emb, model.pos"),
        (TENSORS | {"other.0.mhsa.Wq.weight": torch.zeros(32, 32)}, "called model.tblocks. and other.N.mhsa.Wq"),
        (TENSORS | {"model.tblocks.1.ffn.w1": torch.zeros(96, 32)}, r"ffn.w1 of shape \(96, 32\).*asks for \(64, 32\)"),
        (TENSORS | {"model.emb.weight": torch.zeros(512, 32)}, r"emb.weight of shape \(512, 32\).*\(515, 32\)"),
        (TENSORS | {"model.tblocks.1.ffn.w1": torch.zeros(64, 32, dtype=torch.int8)}, "of type I8"),
        (TENSORS | {"model.linear.weight": torch.zeros(515, 32)}, "model.linear.weight is its embedding, but"),
        (TENSORS | {"model.tblocks.0.mhsa.rope.cos": torch.zeros(64, 8)}, r"rope.cos of shape \(64, 8\)"),
        (TENSORS | {"model.tblocks.1.mhsa.rope.sin": torch.zeros(128, 8)}, "rope.sin that are not of theta 10000"),
        ({f"model.h.{number}.w": torch.zeros(515, 32) for number in range(3)}, "has no tensor N.mhsa.Wq"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    folder = NETWORK.save(tmp_path, tensors)
    with pytest.raises(UserError, match=words):
        weights.read_model_config(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads 1.*no heads that share keys and values"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"head_dim": 64}, "head_dim 64"),
        ({"theta": 500.0}, "not of theta 500"),
        ({"num_heads": 4}, "num_heads 4 and num_attention_heads 2, which contradict each other"),
        ({"num_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}, r"rope.cos of shape"),
        ({"num_layers": 10**12, "num_hidden_layers": 10**12}, "num_layers 1,000,000,000,000"),
        ({"vocab_size": 10**12}, "vocab_size 1,000,000,000,000, for which the weights"),
        ({"d_ff": 2**62, "intermediate_size": 2**62}, "d_ff 4,611,686,018,427,387,904, for which the weights"),
        ({"d_model": "32", "hidden_size": "32"}, "d_model is '32'; it must be a positive whole number"),
        ({"num_heads": 0, "num_attention_heads": 0}, "num_heads is 0; it must be a positive"),
        ({"theta": "big"}, "could not convert string to float"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"theta": [1]}, "does not describe a network of ours"),
        ({"tie_word_embeddings": "no"}, "it must be true or false"),
        ({"tie_word_embeddings": False}, "one matrix called linear or lm_head or output .* but has none"),
        ({"rope_parameters": "none"}, "rope_parameters 'none', which is no JSON object"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"context_length": None, "max_position_embeddings": None}, "has no context_length or max_position"),
        ({"model_type": "gpt2"}, "model_type 'gpt2', but this project reads llama, "),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = NETWORK.save(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        weights.read_model_config(folder)


def test_files_and_index_are_not_believed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file(TENSORS, outside)
    index = tmp_path / "published" / "model.safetensors.index.json"
    for text, words in (
        (
            json.dumps({"weight_map": dict.fromkeys(TENSORS, "../outside.safetensors")}),
            "no safetensors file of its own",
        ),
        (json.dumps({"weight_map": dict.fromkeys(TENSORS, str(outside))}), "no safetensors file of its own"),
        (json.dumps({"weight_map": dict.fromkeys(TENSORS, 5)}), "no safetensors file of its own"),
        (json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}), "no safetensors file of its own"),
        (json.dumps({"weight_map": {"a": "\ud83d.safetensors"}}), "no safetensors file of its own"),
        (json.dumps({"weight_map": []}), "has no weight_map"),
        ("{}", "has no weight_map"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({"weight_map": {"a": "b.safetensors"}}), r"b\.safetensors cannot be read"),
    ):
        NETWORK.save(tmp_path / "published")
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            weights.read_model_config(tmp_path / "published")
    index.unlink()
    (tmp_path / "published" / "model.safetensors").unlink()
    save_tensors(tmp_path / "published", TENSORS, files=2)
    save_file(TENSORS, tmp_path / "published" / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="in two of its files"):
        weights.read_model_config(tmp_path / "published")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    folder = NETWORK.save(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\.bin files are pickles, which are never loaded"):
        weights.read_model_config(folder)
