"""The chat of a model: the template that it was fine-tuned with, in a checkpoint or in a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.conversations.templates import TEMPLATE_FILE, TEMPLATES, Chat
from pipeline.errors import UserError
from pipeline.pretrained import huggingface
from pipeline.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)


def read_chat(path: Path, tokenizer: Tokenizer) -> Chat | None:
    """The chat of the model in a resolved folder; None where it has no template.

    Args:
        tokenizer: of the same folder (resolve.read_tokenizer).

    Raises:
        UserError: a template that is none of ours, or whose tokens the tokenizer lacks.
    """
    name = _exported_name(path) if huggingface.is_exported(path) else checkpoint_reader.read_info(path).chat_template
    if name is None:
        return None
    template = TEMPLATES.get(name)
    if template is None:
        raise UserError(f"{path} has a chat template that is not known here; known are {', '.join(TEMPLATES)}")
    missing = [token for token in template.special_tokens if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f"the tokenizer in {path} lacks {', '.join(missing)} of the template {name}; mend it")
    return Chat(template, tokenizer)


def known_chat(path: Path, tokenizer: Tokenizer) -> Chat | None:
    """As read_chat; where the template is none that can be used here, a warning says so, and there is no chat."""
    try:
        return read_chat(path, tokenizer)
    except UserError as error:
        logger.warning("the model is used without a chat: %s", error)
        return None


def _exported_name(path: Path) -> str | None:
    """The name of the template in an exported folder; None where there is none, its text where it is unknown."""
    if (path / TEMPLATE_FILE).is_file():
        text = (path / TEMPLATE_FILE).read_bytes().decode("utf-8", "replace")
    elif (path / huggingface.TOKENIZER_CONFIG_FILE).is_file():
        value = huggingface.read_json(path / huggingface.TOKENIZER_CONFIG_FILE).get("chat_template")
        if value is None:
            return None
        text = str(value)  # folders of others may have a list of templates
    else:
        return None
    return next((name for name, template in TEMPLATES.items() if template.jinja == text), text)
