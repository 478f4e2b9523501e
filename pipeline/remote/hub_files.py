"""Single files of the hub's models, in the hub's cache of this machine (HF_HOME)."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.remote.hub_client import final_hub_errors, request_settings

_ADDRESS = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")


def fetch_model_file(address: str, name: str) -> Path:
    """The file ``name`` of the model ``hf://OWNER/NAME[@REVISION]``; a slash inside a revision is written %2F.

    Raises:
        UserError: no such model, revision or file, no access, or neither network nor an earlier copy.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not of the form hf://OWNER/NAME[@REVISION]")
    from huggingface_hub import hf_hub_download

    with final_hub_errors(f"{address}/{name}", kind="model"):
        return Path(hf_hub_download(match["name"], name, **request_settings(match["revision"])))
