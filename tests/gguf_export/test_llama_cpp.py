"""The exported GGUF in llama.cpp itself: our ids on every trap, our logits, our greedy text, our chats.

Needs an interpreter with llama-cpp-python, given by GPT25_LLAMA_CPP_PYTHON (docs/using_the_model.md says how it is
built); skipped without one. Slow for no other reason than that build.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from model.generation import generate
from model.transformer import Transformer
from pipeline.config.inference import ExportConfig
from pipeline.conversations.templates import TEMPLATES, chat_of, with_chat_tokens
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.patterns import Pattern
from pipeline.tokenizer.training import count_pretokens, train_bpe
from tests.gguf_export.test_gguf import unreachable_tokenizer
from tests.support.bpe_references import BOTH, NASTY, documents, gpt2
from tests.support.conversations import TRAPS, conversations
from tests.support.llama_models import llama_folder, save_llama
from tests.support.llama_twin import lively_model, small_config
from tests.support.models import train

ROOT = Path(__file__).resolve().parents[2]
PROCESS = ROOT / "tests" / "support" / "llama_cpp_process.py"
VARIABLE = "GPT25_LLAMA_CPP_PYTHON"
PYTHON = os.environ.get(VARIABLE)
pytest.importorskip("gguf", reason="needs the package gguf: pip install --constraint constraints.txt gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason=f"{VARIABLE} names no Python that has llama-cpp-python"),
]

NUM_TOKENS = 24
ROUNDING = 1e-5
"""Largest difference over largest value for two float32 computations of one network (tests/support/llama_twin.py)."""

BF16_ACTIVATIONS = 2e-2
Q8_ACTIVATIONS = 8e-2
"""What rounded activations may change of the largest logit. A number in bf16 is off by 0.1 % of itself, in blocks of 32
by 0.5 % of its vector's spread (standard deviations); 13 products one after another add up as a random walk to 0.4 %
and 1.8 %, and the largest of some 100,000 logits is off by four times that. A wrong scale would be off by 1."""


def ask(model: Path, folder: Path, **asked: Any) -> Any:
    """What llama.cpp says; ``logits`` as an array (N, V) where ids were given."""
    request = {"texts": [], "sequences": [], "prompts": [], "chats": [], "num_tokens": NUM_TOKENS}
    request |= {"model": str(model), "logits": str(folder / "logits.npy"), "context_length": 48} | asked
    done = subprocess.run(
        [str(PYTHON), str(PROCESS)], input=json.dumps(request), capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if request["sequences"]:
        found["logits"] = torch.from_numpy(np.load(folder / "logits.npy"))
    return found


def gguf_of(folder: Path, output: Path, dtype: Any = "f32") -> Path:
    report = export(ExportConfig(checkpoint=str(folder), output=str(output), format="gguf", dtype=dtype))
    return output / next(iter(report.files))


TOO_NEW = "\U00013460"
"""Of Unicode 16: our tables have it as a letter, llama.cpp's do not (test_ids_of_every_character)."""


def trap_texts() -> list[str]:
    """Every trap alone, every pair of them, and long mixtures; documents; text that looks like special tokens."""
    draw = random.Random(7)
    traps = [trap for trap in NASTY if trap != TOO_NEW]
    pairs = ["".join(pair) for pair in itertools.product(traps, repeat=2)]
    mixtures = ["".join(draw.choices(traps, k=40)) for _ in range(300)]
    return [*NASTY, *pairs, *mixtures, *documents(60), *TRAPS]


def own(pattern: Pattern, vocab_size: int = 2000) -> Tokenizer:
    texts = [*documents(300), *TRAPS]
    return train_bpe(count_pretokens(pa.array(texts), pattern=pattern), vocab_size, pattern=pattern)


TOKENIZERS = {
    "own gpt2": lambda: own("gpt2"),
    "own cl100k": lambda: own("cl100k"),
    "GPT-2": lambda: gpt2("gpt2"),
    "GPT-2 with cl100k": lambda: gpt2("cl100k"),
    "unreachable token": unreachable_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_ours_on_every_trap(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    llama_folder(tmp_path / "model", tokenizer)
    texts = [*trap_texts(), "abc", " abc abcabc"]
    found = ask(gguf_of(tmp_path / "model", tmp_path / "out"), tmp_path, texts=texts)
    expected = [tokenizer.encode(text) for text in texts]
    wrong = [(text, ids, right) for text, ids, right in zip(texts, found["ids"], expected, strict=True) if ids != right]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]}"
    assert found["plain_ids"] == found["ids"], "no token is put before a text"


@pytest.mark.parametrize("pattern", BOTH)
def test_ids_of_every_character(pattern: Pattern, tmp_path: Path) -> None:
    """Letters, numbers and the rest show in what follows them: 's is a token or is not, 1111 is cut after 1, 2 or 3.

    llama.cpp's tables are of an older Unicode than ours: only characters may differ that Python's do not know either.
    Of the planes without characters, and of private use, one code in 257.
    """
    tokenizer = gpt2(pattern)
    llama_folder(tmp_path / "model", tokenizer)
    file = gguf_of(tmp_path / "model", tmp_path / "out")

    def differ(texts: list[str]) -> list[int]:
        found = ask(file, tmp_path, texts=texts)["ids"]
        return [number for number, text in enumerate(texts) if found[number] != tokenizer.encode(text)]

    codes = itertools.chain(range(0xD800), range(0xE000, 0x34000), range(0x34000, 0x110000, 257))
    characters = list(map(chr, codes))
    shown = [f"{character}'s {character}1111\n" for character in characters]
    parts = ["".join(shown[start : start + 2000]) for start in range(0, len(shown), 2000)]
    near = [number for part in differ(parts) for number in range(2000 * part, min(2000 * part + 2000, len(shown)))]
    wrong = [characters[near[number]] for number in differ([shown[number] for number in near])]
    assert TOO_NEW in wrong
    assert {unicodedata.category(character) for character in wrong} == {"Cn"}
    assert len(wrong) == 4382, "the number in docs/using_the_model.md"


NETWORKS = [
    pytest.param({}, id="tied"),
    pytest.param({"tie_embeddings": False, "theta": 5e5, "norm_eps": 1e-6}, id="untied"),
    pytest.param({"qk_norm": True}, id="qk_norm"),
    pytest.param({"num_heads": 2, "num_layers": 1, "qk_norm": True, "tie_embeddings": False}, id="qk_norm, untied"),
]


def compared(model: Transformer, file: Path, folder: Path) -> tuple[Tensor, Tensor, list[list[int]], list[list[int]]]:
    """Logits of both on random sequences, and both greedy continuations of four prompts."""
    draw = torch.Generator().manual_seed(5)
    sequences = torch.randint(0, model.config.vocab_size, (4, 40), generator=draw)
    prompts = sequences[:, :8].tolist()
    found = ask(file, folder, sequences=sequences.tolist(), prompts=prompts)
    with torch.no_grad():
        logits = model(sequences).flatten(0, 1)
    return found["logits"], logits, found["greedy"], greedy(model, prompts)


def greedy(model: Transformer, prompts: Sequence[Sequence[int]], stop_id: int | None = None) -> list[list[int]]:
    return [
        generate(model, torch.tensor([ids]), max_new_tokens=NUM_TOKENS, temperature=0.0, seed=0, stop_id=stop_id)[0]
        for ids in prompts
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("changes", NETWORKS)
def test_logits_and_greedy_text_are_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "model", own("gpt2", 600), **changes)
    file = gguf_of(tmp_path / "model", tmp_path / "out")
    found, expected, their_ids, our_ids = compared(model.eval(), file, tmp_path)
    assert relative(found, expected) < ROUNDING
    assert their_ids == our_ids


@pytest.mark.parametrize("name", ["GPT-2", "GPT-2 with cl100k"])
def test_a_large_vocabulary(name: str, tmp_path: Path) -> None:
    model = llama_folder(tmp_path / "model", TOKENIZERS[name]())
    file = gguf_of(tmp_path / "model", tmp_path / "out")
    found, expected, their_ids, our_ids = compared(model.eval(), file, tmp_path)
    assert relative(found, expected) < ROUNDING
    assert their_ids == our_ids


def test_a_trained_checkpoint_from_text_to_text(tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = train(tiny_data, tmp_path / "run")
    ours = resolve.open_model(checkpoint, torch.device("cpu"))
    prompts = ["import os\n\ndef ", "class ", "    return self.", "żółw ½"]
    ids = [ours.tokenizer.encode(prompt) for prompt in prompts]
    file = gguf_of(checkpoint, tmp_path / "out")
    found = ask(file, tmp_path, texts=prompts, sequences=ids, prompts=ids, context_length=128)
    assert found["ids"] == ids
    with torch.no_grad():
        expected = torch.cat([ours.model(torch.tensor([row]))[0] for row in ids])
    assert relative(found["logits"], expected) < ROUNDING
    assert found["greedy"] == greedy(ours.model, ids)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": False}])
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", BF16_ACTIVATIONS), ("q8_0", Q8_ACTIVATIONS)])
def test_small_number_formats(dtype: Any, bound: float, changes: dict[str, Any], tmp_path: Path) -> None:
    """Against our network with the weights of the file: what is left is that llama.cpp rounds activations, too."""
    model = llama_folder(tmp_path / "model", own("gpt2", 600), **changes).eval()
    file = gguf_of(tmp_path / "model", tmp_path / "out", dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(rounded(parameter, dtype))
    found, expected, _, _ = compared(model, file, tmp_path)
    assert relative(found, expected) < bound


def rounded(matrix: Tensor, dtype: str) -> Tensor:
    """The matrix in bf16, or in blocks of 32 whole numbers to 127 times a float16."""
    if dtype == "bf16":
        return matrix.bfloat16().float()
    blocks = matrix.reshape(-1, 32)
    steps = blocks.abs().amax(dim=1, keepdim=True) / 127
    numbers = torch.where(steps > 0, blocks / steps, 0.0).round()
    return (numbers * steps.half().float()).view(matrix.shape)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_chat_is_rendered_and_answered_as_ours(name: str, tmp_path: Path) -> None:
    base = own("gpt2", 600)
    model = llama_folder(tmp_path / "model", base, name, context_length=256).eval()
    chat = chat_of(name, with_chat_tokens(base, name))
    ends = {chat.end_id, chat.tokenizer.eot_id}
    asked = [it for it in conversations(40) if not any("<|" in message["content"] for message in it)]
    asked = [it[:-1] for it in asked if it[-1]["role"] == "assistant"][:8]  # the answer is what the model is to say
    assert len(asked) == 8
    file = gguf_of(tmp_path / "model", tmp_path / "out")
    found = ask(file, tmp_path, chats=asked, context_length=256)["chats"]
    prompts = [chat.render(messages, add_generation_prompt=True) for messages in asked]
    assert [ids for ids, _ in found] == prompts
    answers = [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in greedy(model, prompts)]
    assert [answer for _, answer in found] == answers


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_answer_ends_where_ours_does(name: str, tmp_path: Path) -> None:
    """A model that is bent to say the token that ends an answer: llama.cpp takes it for the end."""
    tokenizer = with_chat_tokens(own("gpt2", 600), name)
    chat = chat_of(name, tokenizer)
    model = lively_model(small_config(vocab_size=tokenizer.vocab_size, tie_embeddings=False)).eval()
    prompt = chat.render([{"role": "user", "content": "the fox"}], add_generation_prompt=True)
    assert model.output is not None
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[chat.end_id] = last_state(model, prompt)  # its own square is its logit, all others are 0
    assert greedy(model, [prompt])[0][:1] == [chat.end_id]
    save_llama(tmp_path / "model", model, tokenizer, name)
    found = ask(gguf_of(tmp_path / "model", tmp_path / "out"), tmp_path, prompts=[prompt])
    assert found["greedy"] == [[]]


def last_state(model: Transformer, ids: list[int]) -> Tensor:
    """What the output matrix is multiplied with behind the last of the ids, (D,)."""
    states: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    model(torch.tensor([ids]))
    handle.remove()
    return states[0][0, -1]
