"""The Modelfile beside a GGUF: what `ollama create NAME -f Modelfile` reads.

Its template is written in Go's language and says the same as the chat template in the GGUF, but that it leaves white
space around a message as it is.
"""

from __future__ import annotations

from pipeline.conversations.templates import Chat

MODELFILE = "Modelfile"


def modelfile(gguf_file: str, context_length: int, chat: Chat | None, end_of_text: str) -> str:
    """Content of the Modelfile.

    Args:
        gguf_file: name of the file beside it.
        chat: of a model that chats; any other continues the prompt.
    """
    template = _template(chat, end_of_text) if chat else "{{ .Prompt }}"
    stops = [end_of_text, *([chat.template.end] if chat and chat.template.end else [])]
    lines = [
        f"FROM ./{gguf_file}",
        f'TEMPLATE """{template}"""',
        f"PARAMETER num_ctx {context_length}",
        "PARAMETER temperature 0.8",
        "PARAMETER top_p 0.9",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def _template(chat: Chat, end_of_text: str) -> str:
    form = chat.template
    message = form.begin.format(role="{{ .Role }}") + "{{ .Content }}" + (form.end or end_of_text) + form.after
    return "{{ range .Messages }}" + message + "{{ end }}" + form.begin.format(role="assistant")
