"""The exported folder, read by transformers: same ids, same logits, same text; and the way back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model.generation import generate
from model.transformer import Transformer
from pipeline.config.inference import ExportConfig
from pipeline.errors import UserError
from pipeline.pretrained import huggingface, model_card, resolve, weights
from pipeline.pretrained.export_job import export
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.llama_twin import lively_model, relative_error, small_config
from tests.support.models import train

ROOT = Path(__file__).resolve().parents[2]

# Two float32 computations of one network: roundings in another order (see tests/support/llama_twin.py). The issue
# asks for 1e-4.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "small"
    export(ExportConfig(checkpoint=str(checkpoint), output=str(output)))
    return output


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> resolve.Pretrained:
    return resolve.open_model(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def passages(length: int = 96) -> list[str]:
    """Real text: this project's documentation."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return [text[start : start + 2 * length] for start in range(0, 8 * length, 2 * length)]


def test_the_tokenizer_gives_our_ids(folder: Path, ours: resolve.Pretrained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for sample in (
        text,
        "",
        " ",
        "żółw  ½ 日本語 🙂\n\n\t x",
        "<|endoftext|> is text, not a token<|endoftext|>",
        "a\r\nb",
    ):
        assert tokenizer(sample)["input_ids"] == ours.tokenizer.encode(sample), sample
        assert tokenizer.decode(ours.tokenizer.encode(sample)) == sample
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == ours.tokenizer.eot_id
    assert len(tokenizer) == ours.tokenizer.vocab_size
    assert tokenizer.model_max_length == ours.config.context_length


@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_on_real_text_equal_ours(ours: resolve.Pretrained, theirs: Any, use_cache: bool) -> None:
    with torch.no_grad():
        for passage in passages():
            ids = torch.tensor([ours.tokenizer.encode(passage)[:96]])
            expected = ours.model(ids)
            if not use_cache:
                assert relative_error(theirs(ids).logits, expected) < TOLERANCE
                continue
            cache, logits = None, []
            for part in (ids[:, :50], *ids[:, 50:].split(1, dim=1)):
                output = theirs(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
            assert relative_error(torch.cat(logits, dim=1), expected) < TOLERANCE


def test_logits_with_left_padding_equal_ours(ours: resolve.Pretrained, theirs: Any) -> None:
    rows = [ours.tokenizer.encode(passage)[:length] for passage, length in zip(passages(), (5, 40, 96), strict=False)]
    padded = torch.zeros(3, 96, dtype=torch.int64)
    mask = torch.zeros(3, 96, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, 96 - len(row) :] = torch.tensor(row)
        mask[index, 96 - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(padded, attention_mask=mask, position_ids=positions).logits
        for index, row in enumerate(rows):
            expected = ours.model(torch.tensor([row]))[0]
            assert relative_error(logits[index, 96 - len(row) :], expected) < TOLERANCE


def test_greedy_text_is_that_of_transformers(ours: resolve.Pretrained, theirs: Any) -> None:
    ids = torch.tensor([ours.tokenizer.encode("import os\n\ndef ")])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    found = generate(ours.model, ids, max_new_tokens=60, temperature=0.0, seed=0, stop_id=ours.tokenizer.eot_id)
    assert [token for token in expected[0, ids.shape[1] :].tolist() if token != ours.tokenizer.eot_id] == found[0]


def test_bf16_halves_the_file_and_is_rounded_once(
    checkpoint: Path, folder: Path, ours: resolve.Pretrained, tmp_path: Path
) -> None:
    report = export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "half"), dtype="bf16"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    full = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert report.weight_bytes == pytest.approx(full / 2, rel=0.05)  # the header is not halved
    back = resolve.open_model(tmp_path / "half", torch.device("cpu"))
    for mine, theirs in zip(back.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float())


@pytest.mark.parametrize("tie", [True, False])
def test_several_files_hold_what_one_holds(tmp_path: Path, tie: bool) -> None:
    model = lively_model(small_config(tie_embeddings=tie))
    (tmp_path / "one").mkdir()
    one = folder_of(model, tmp_path / "one")
    (tmp_path / "many").mkdir()
    tensors = weights.read_weights(one, model.config)
    written = huggingface.write_weights(
        tmp_path / "many", tensors, model.config, dtype=torch.float32, max_file_bytes=60_000
    )
    assert len(written) > 5 and max(written.values()) < 70_000
    huggingface.write_json(tmp_path / "many" / "config.json", json.loads((one / "config.json").read_text()))
    theirs: Any = LlamaForCausalLM.from_pretrained(tmp_path / "many")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert relative_error(theirs.eval()(tokens).logits, model(tokens)) < TOLERANCE
    again = Transformer(model.config)
    weights.load_weights(tmp_path / "many", again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def folder_of(model: Transformer, path: Path) -> Path:
    """The model as transformers itself saves it: what load_weights and read_model_config have to understand."""
    from tests.support.llama_twin import llama_twin

    llama_twin(model).save_pretrained(path)
    return path


RECIPES = [
    pytest.param({"tie_embeddings": False}, "llama", id="untied"),
    pytest.param({"qk_norm": True, "zero_init_projections": True}, "qwen3", id="tied, qk_norm"),
    pytest.param({"qk_norm": True, "tie_embeddings": False, "zero_init_output": True}, "qwen3", id="untied, qk_norm"),
]


@pytest.mark.parametrize(("changes", "kind"), RECIPES)
def test_other_recipes_give_transformers_our_logits(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    """Trained, exported, read by transformers and back."""
    checkpoint = train(tiny_data, tmp_path / "run", optimizer="muon", train_steps=12, val_every=12, **changes)
    export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out")))
    ours = resolve.open_model(checkpoint, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert theirs.config.model_type == kind
    back = resolve.open_model(tmp_path / "out", torch.device("cpu"))
    assert back.config == ours.config
    with torch.no_grad():
        for passage in passages()[:3]:
            ids = torch.tensor([ours.tokenizer.encode(passage)[:96]])
            assert relative_error(theirs(ids).logits, ours.model(ids)) < TOLERANCE
            assert torch.equal(back.model(ids), ours.model(ids))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {kind}\n" in card and "| optimizer | muon |" in card
    assert ("norms of queries and keys" in card) == (kind == "qwen3")


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"qk_norm": True, "tie_embeddings": False}])
def test_what_transformers_saves_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = lively_model(small_config(**changes))
    folder_of(model, tmp_path)
    assert weights.read_model_config(tmp_path) == model.config
    again = Transformer(model.config)
    with torch.no_grad():
        again.embedding.weight.fill_(7.0)  # the padding rows must become zero
    weights.load_weights(tmp_path, again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
)
def test_networks_that_are_not_ours_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=96).to_dict()
    huggingface.write_json(tmp_path / "config.json", config | changes)
    with pytest.raises(UserError, match=words):
        weights.read_model_config(tmp_path)


def test_damaged_folders_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    config = weights.read_model_config(folder)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        weights.load_weights(tmp_path, Transformer(config))
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(UserError, match="export or fetch them again"):
        weights.load_weights(tmp_path, Transformer(config))
    (tmp_path / "model.safetensors").write_bytes(content)
    text = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 64'))
    with pytest.raises(UserError, match=r"gate_proj\.weight of shape \(96, 32\)"):
        weights.load_weights(tmp_path, Transformer(weights.read_model_config(tmp_path)))


def test_the_card_says_what_the_run_was(folder: Path, checkpoint: Path) -> None:
    card = (folder / "README.md").read_text()
    info = json.loads((checkpoint / "checkpoint.json").read_text())
    for words in (
        "library_name: transformers",
        f"| steps | {info['config']['train_steps']} |",
        f"| train loss, last | {info['last_loss']:.4f} |",
        info["tokenizer_fingerprint"],
        "40,960 tokens",
    ):
        assert words in card
    assert str(checkpoint.parents[3]) not in card, "no path of this machine gets out"
    assert str(checkpoint.parents[3]) not in (folder / "gpt25.json").read_text()


def test_an_export_replaces_an_export_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"))
    export(config)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    export(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no half folder is left"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no export of an earlier run"):
        export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["a-F32.gguf", "Modelfile", "NOTES.md", ".git/config", "model-mine.safetensors"])
def test_what_lies_in_an_export_is_never_deleted(checkpoint: Path, tmp_path: Path, name: str) -> None:
    config = ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"))
    export(config)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    mine = tmp_path / "out" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("precious")
    with pytest.raises(UserError, match=rf"holds what no export wrote: {Path(name).parts[0]}; move that to"):
        export(dataclasses.replace(config, dtype="bf16"))
    assert mine.read_text() == "precious"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no half folder is left"


def test_a_file_that_comes_while_an_export_is_written_stays(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"))
    export(config)
    write = model_card.write

    def write_late(*arguments: Any, **named: Any) -> None:
        (tmp_path / "out" / "late.gguf").write_text("precious")
        write(*arguments, **named)

    monkeypatch.setattr(model_card, "write", write_late)
    export(dataclasses.replace(config, dtype="bf16"))
    assert (tmp_path / "out" / "late.gguf").read_text() == "precious"
    assert json.loads((tmp_path / "out" / "gpt25.json").read_text())["dtype"] == "bf16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_through_a_link_fills_the_folder_behind_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for dtype in ("float32", "bf16"):
        export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "link"), dtype=dtype))
        assert json.loads((tmp_path / "disk" / "real" / "gpt25.json").read_text())["dtype"] == dtype
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_an_exported_folder_is_exported_again(folder: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(folder), output=str(tmp_path / "again")))
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_resolving_folders(folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_HOME", str(folder.parent))
    assert resolve.resolve_checkpoint(folder.name) == folder
    assert resolve.resolve_checkpoint(str(checkpoint.parents[1])) == checkpoint
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        resolve.resolve_checkpoint("nowhere")
    with pytest.raises(UserError, match="not of the form hf://OWNER/NAME"):
        resolve.resolve_checkpoint("hf://name")
    assert resolve.read_tokenizer(folder).fingerprint == Tokenizer.from_file(checkpoint / "tokenizer.json").fingerprint


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from model.config import ModelConfig
from pipeline.pretrained import huggingface, weights
source, output, config, dtype = sys.argv[1:]
config = ModelConfig(**json.loads(config))
warm = torch.randn(64, 64) @ torch.randn(64, 64)
Path(output, "warm").mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
huggingface.write_weights(
    Path(output), weights.read_weights(Path(source), config), config, dtype=getattr(torch, dtype), max_file_bytes=10**12
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_at_a_few_tensors(tmp_path: Path, dtype: str) -> None:
    """80 MB of weights, 25 MB the largest tensor: the peak is less than four of it, far below the model."""
    config = small_config(vocab_size=12_000, d_model=512, d_ff=1536, num_layers=4)
    from tests.checkpoints.test_writer import info

    source = big_checkpoint(tmp_path, config, info)
    (tmp_path / "out").mkdir()
    arguments = [str(source), str(tmp_path / "out"), json.dumps(config.to_dict()), dtype]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    largest = 12_032 * 512 * 4
    assert int(result.stdout) * 1024 < 3.5 * largest
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [12_000, 512]


def big_checkpoint(tmp_path: Path, config: Any, info: Any) -> Path:
    """Weights and moments of an untrained model, as a checkpoint."""
    import dataclasses

    from pipeline.checkpoints.writer import CheckpointWriter
    from tests.support.models import ALONE

    model = Transformer(config)
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    state |= {f"optimizer.exp_avg.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    writer = CheckpointWriter(tmp_path / "checkpoints", ALONE, keep=1, tokenizer_json="{}")
    place = writer.save(state, dataclasses.replace(info(1), model=config.to_dict()))
    writer.wait()
    return Path(str(place))
