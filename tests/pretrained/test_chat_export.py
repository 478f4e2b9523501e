"""A model that chats, exported: transformers makes our ids of messages, answers as we do, and stops where we stop."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, pipeline

from pipeline.config.inference import ExportConfig, GenerateConfig
from pipeline.conversations.templates import TEMPLATES, Chat
from pipeline.errors import UserError
from pipeline.generation.generate_job import Generator
from pipeline.pretrained.chat import known_chat, read_chat
from pipeline.pretrained.export_job import export
from pipeline.pretrained.hub_models import download
from pipeline.pretrained.resolve import read_tokenizer
from tests.support.conversations import TRAPS, Messages, conversations
from tests.support.fake_model_hub import running_model_hub
from tests.support.models import train, train_chat


@dataclasses.dataclass(frozen=True)
class Exported:
    checkpoint: Path
    folder: Path
    chat: Chat


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("base"), train_steps=5, val_every=0)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def exported(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = train_chat(base, folder, chat_template=request.param)
    export(ExportConfig(checkpoint=str(checkpoint), output=str(folder / "export")))
    chat = read_chat(checkpoint, read_tokenizer(checkpoint))
    assert chat is not None and chat.template.name == request.param
    return Exported(checkpoint, folder / "export", chat)


def own_tokens(chat: Chat) -> set[str]:
    return set(chat.tokenizer.special_tokens)


def test_transformers_makes_our_ids_of_messages(exported: Exported) -> None:
    """Of texts with the tokens of another template, too; see the next test for those with its own."""
    tokenizer, chat = AutoTokenizer.from_pretrained(exported.folder), exported.chat
    foreign = [trap for trap in TRAPS if "<|" in trap and not any(token in trap for token in own_tokens(chat))]
    assert foreign
    chats = [messages for messages in conversations(80) if not has_own_tokens(messages, chat)]
    chats += [[{"role": "user", "content": f"x{trap}y"}, {"role": "assistant", "content": trap}] for trap in foreign]
    assert len(chats) > 20
    assert {len(messages) % 2 for messages in chats} == {0, 1}, "with and without a system message"
    for messages in chats:
        assert tokenizer.apply_chat_template(messages, return_dict=False) == chat.render(messages)
        asked = messages[:-1]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert prompt == chat.render(asked, add_generation_prompt=True)
        text = tokenizer.decode(chat.render(messages), skip_special_tokens=False)
        assert text == tokenizer.apply_chat_template(messages, tokenize=False)


def has_own_tokens(messages: Messages, chat: Chat) -> bool:
    return any(token in message["content"] for message in messages for token in own_tokens(chat))


def test_the_only_texts_that_differ_hold_a_token_of_their_own_template(exported: Exported) -> None:
    """transformers renders one text and parses it, so such a text becomes the token there; ours keeps it as text."""
    tokenizer, chat = AutoTokenizer.from_pretrained(exported.folder), exported.chat
    end = chat.template.end or chat.tokenizer.end_of_text
    for content in (end, f"x{end}y"):
        messages = [{"role": "user", "content": content}]
        ours = chat.render(messages)
        theirs: Any = tokenizer.apply_chat_template(messages, return_dict=False)
        assert (ours.count(chat.end_id), theirs.count(chat.end_id)) == (1, 2)
        assert chat.tokenizer.decode(ours) == chat.tokenizer.decode(theirs), "the same text, in other ids"


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be a fox"}]])
def test_the_pipeline_of_transformers_answers_messages_and_stops(exported: Exported, system: Messages) -> None:
    answerer = pipeline("text-generation", model=str(exported.folder), device="cpu")
    config = GenerateConfig(checkpoint=str(exported.folder), chat=True, max_new_tokens=60, temperature=0, device="cpu")
    generator = Generator(config)
    messages = [*system, {"role": "user", "content": "the fox"}]
    for turn in ("and then", "there was more"):
        chunks = list(generator.answer(messages, seed=1))
        ours = "".join(chunk.text for chunk in chunks)
        assert chunks[-1].finish_reason == "stop" and chunks[-1].num_tokens < 60
        said: Any = answerer(messages, do_sample=False, max_new_tokens=60)[0]["generated_text"]
        assert said[:-1] == messages and said[-1]["role"] == "assistant"
        assert said[-1]["content"] == ours
        messages = [*messages, {"role": "assistant", "content": ours}, {"role": "user", "content": turn}]


def test_the_folder_says_what_ends_an_answer_and_a_text(exported: Exported) -> None:
    found = GenerationConfig.from_pretrained(exported.folder)
    eot_id = exported.chat.tokenizer.eot_id
    expected = {"chatml": [exported.chat.end_id, eot_id], "gpt2.5": eot_id}[exported.chat.template.name]
    assert found.eos_token_id == expected
    assert (exported.folder / "chat_template.jinja").read_text() == exported.chat.template.jinja
    assert read_tokenizer(exported.folder).eot_id == eot_id, "documents still end where they ended"
    card = (exported.folder / "README.md").read_text()
    assert "apply_chat_template" in card and "fine-tuned on conversations" in card and "--chat`" in card


def test_the_way_back_and_through_a_hub_keeps_the_chat(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ExportConfig(checkpoint=str(exported.folder), output=str(tmp_path / "again")))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported.folder / name).read_bytes()
    export(ExportConfig(checkpoint=str(exported.checkpoint), output=str(tmp_path / "again"), dtype="bf16"))
    with running_model_hub() as hub:
        hub.commit("me/chat", {path.name: path.read_bytes() for path in exported.folder.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        path = download("hf://me/chat")
    chat = read_chat(path, read_tokenizer(path))
    assert chat is not None and chat.template is exported.chat.template


def test_a_base_model_carries_no_chat(base: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(base), output=str(tmp_path / "out")))
    assert not (tmp_path / "out/chat_template.jinja").exists()
    words = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "chat_template" not in words and words["split_special_tokens"] is True
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    card = (tmp_path / "out/README.md").read_text()
    assert "It continues text; it was not taught to answer" in card and '--prompt "Once upon a time, "`' in card


def test_a_template_of_others_is_left_out_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(ExportConfig(checkpoint=str(base), output=str(tmp_path / "theirs")))
    (tmp_path / "theirs/chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level(logging.WARNING):
        export(ExportConfig(checkpoint=str(tmp_path / "theirs"), output=str(tmp_path / "out")))
    assert "without a chat" in caplog.text and "known are chatml, gpt2.5" in caplog.text
    assert not (tmp_path / "out/chat_template.jinja").exists()
    assert known_chat(tmp_path / "theirs", read_tokenizer(tmp_path / "theirs")) is None


def test_templates_in_other_forms_are_ones_that_are_not_known(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    export(ExportConfig(checkpoint=str(base), output=str(folder)))
    tokenizer = read_tokenizer(folder)
    for name, content in (
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": "{{ messages }}"}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": 7}}'),
        ("chat_template.jinja", b"{{ messages }}\xdf"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="has a chat template that is not known here; known are chatml"):
            read_chat(folder, tokenizer)
        assert known_chat(folder, tokenizer) is None


def test_the_card_of_others_keeps_its_bytes(base: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(base), output=str(tmp_path / "theirs")))
    card = "# Ein Füchslein\r\n".encode("latin-1")
    (tmp_path / "theirs/README.md").write_bytes(card)
    export(ExportConfig(checkpoint=str(tmp_path / "theirs"), output=str(tmp_path / "out")))
    assert (tmp_path / "out/README.md").read_bytes() == card
