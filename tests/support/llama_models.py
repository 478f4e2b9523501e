"""Folders of small models in Llama's layout, untrained, with any tokenizer: what the GGUF tests export."""

from __future__ import annotations

from pathlib import Path

from model.transformer import Transformer
from pipeline.conversations.templates import TEMPLATES, with_chat_tokens
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.llama_twin import lively_model, llama_twin, small_config


def llama_folder(path: Path, tokenizer: Tokenizer, template: str | None = None, **changes: object) -> Transformer:
    """Write a model whose layers all matter; returns the model.

    Args:
        template: name of the chat template that the model has, if any.
        changes: of small_config; without vocab_size the model has as many ids as the tokenizer, and d_ff is 192.
    """
    if template is not None:
        tokenizer = with_chat_tokens(tokenizer, template)
    model = lively_model(small_config(**({"vocab_size": tokenizer.vocab_size, "d_ff": 192} | changes)))
    save_llama(path, model, tokenizer, template)
    return model


def save_llama(path: Path, model: Transformer, tokenizer: Tokenizer, template: str | None = None) -> None:
    """Write a model as transformers saves it, with a tokenizer that has the tokens of the template."""
    llama_twin(model).save_pretrained(path)
    tokenizer.save(path / "tokenizer.json")
    if template is not None:
        (path / "chat_template.jinja").write_text(TEMPLATES[template].jinja, encoding="utf-8")
