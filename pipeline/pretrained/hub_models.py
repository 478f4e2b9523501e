"""Models of the Hugging Face hub: a folder fetched, a folder pushed.

The cache lies in HF_HOME; token and endpoint are those of remote/hub_client.py. Only data is fetched: configuration,
safetensors, tokenizer; no code and no pickle.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.conversations.templates import TEMPLATE_FILE
from pipeline.errors import UserError
from pipeline.remote.hub_client import endpoint, final_hub_errors, request_settings, token

_ADDRESS = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>.+?))?/?")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = [
    *("*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "gpt25.json", "tokenizer.json", "tokenizer_config.json"),
    TEMPLATE_FILE,
]


def download(address: str) -> Path:
    """The folder of ``hf://OWNER/NAME[@REVISION]`` in this machine's cache; it is fetched if it is not there.

    A slash inside a revision is written %2F.

    Raises:
        UserError: no such model or revision, no access, no network.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not of the form hf://OWNER/NAME[@REVISION]")
    from huggingface_hub import snapshot_download

    with final_hub_errors(address, kind="name"):
        return Path(snapshot_download(match["name"], allow_patterns=_WANTED, **request_settings(match["revision"])))


def push(folder: Path, name: str, *, message: str) -> str:
    """Commit the folder's files to the model ``OWNER/NAME``, which is created if needed; returns its address.

    Raises:
        UserError: no HF_TOKEN, a token that may not write there, no network.
    """
    check_name(name)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint(), token=token())
    with final_hub_errors(name, kind="name", action="write there"):
        api.create_repo(name, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, repo_type="model", commit_message=message)
    return f"hf://{name}@{commit.oid}"


def check_name(name: str) -> None:
    """Check before the export: UserError on a name or a setting with which the push would fail."""
    if not _NAME.fullmatch(name):
        raise UserError(f"push_to_hub is {name!r}; it must be OWNER/NAME")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"pushing to {name} needs a token that may write there; set HF_TOKEN")
