"""Models of the Hugging Face hub: fetch a folder, push a folder, errors in one sentence.

The token is read from HF_TOKEN only and is never shown; HF_ENDPOINT names another hub, HF_HOME the cache folder. Only
data is fetched: configuration, safetensors, tokenizer; no code and no pickle.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import UserError

_ADDRESS = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")
_FILE_ADDRESS = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("config.json", "generation_config.json", "gpt25.json", "tokenizer.json", "tokenizer_config.json")
_CHECK = "check the network and HF_ENDPOINT, then run the same command again"


def is_hub_address(text: str) -> bool:
    return text.startswith("hf://")


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
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _hub_errors(address):
        folder = snapshot_download(
            match["name"],
            revision=unquote(match["revision"] or "main"),
            allow_patterns=["*.safetensors", "model.safetensors.index.json", *_WANTED],
            endpoint=_endpoint(),
            token=_token(),
        )
    return Path(folder)


def download_file(address: str) -> Path:
    """One file of a data set, ``hf://datasets/OWNER/NAME[@REVISION]/PATH``, in this machine's cache."""
    match = _FILE_ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _hub_errors(address):
        file = hf_hub_download(
            match["name"],
            match["path"],
            repo_type="dataset",
            revision=unquote(match["revision"] or "main"),
            endpoint=_endpoint(),
            token=_token(),
        )
    return Path(file)


def push(folder: Path, name: str, *, message: str) -> str:
    """Commit the folder's files to the model ``OWNER/NAME``, which is created if needed; returns its address.

    Raises:
        UserError: no HF_TOKEN, a token that may not write there, no network.
    """
    check_name(name)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(endpoint=_endpoint(), token=_token())
    with _hub_errors(name):
        api.create_repo(name, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, repo_type="model", commit_message=message)
    return f"hf://{name}@{commit.oid}"


def check_name(name: str) -> None:
    """Check before the export: UserError on a name or a setting with which the push would fail."""
    if not _NAME.fullmatch(name):
        raise UserError(f"push_to_hub is {name!r}; it must be OWNER/NAME")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"pushing to {name} needs a token that may write there; set HF_TOKEN")


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: do not look for one that somebody logged in with


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub client raises, as one sentence about ``what``."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such name, or HF_TOKEN does not open it") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{what}: {_unreachable()}; {_CHECK}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{what}: the hub refuses it ({status}); is HF_TOKEN right, and may it do this?") from error
        raise UserError(f"{what}: the hub answered with an error ({status}); try again later") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(f"{what}: {_unreachable()}; {_CHECK}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


def _unreachable() -> str:
    return f"the hub at {_endpoint() or 'https://huggingface.co'} cannot be reached"
