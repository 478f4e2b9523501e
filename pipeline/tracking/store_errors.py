"""What is wrong with an MLflow store, by its client's error, and what to do about it. Imports nothing of MLflow."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from pipeline.redaction import redact

_MOST_CHARACTERS = 160  # of an error message; those of urllib3 repeat themselves
_MOST_OF_MLFLOW = 900  # of a sentence of MLflow that holds a cure
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")
_DELETED = re.compile(r"The (experiment|run) (\S+) must be in the 'active' state")
_STATUS = re.compile(r"failed with error code (\d{3})|too many (\d{3}) error responses")
_NO_SERVER = "or unset MLFLOW_TRACKING_URI to track in a file of the working folder"


@dataclass(frozen=True)
class Trouble:
    """Why a store takes nothing."""

    what: str
    """A sentence without its end, which begins with the store's address."""
    cure: str
    """What to do, the rest of the sentence."""

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}"


def first_line(error: BaseException) -> str:
    """The first line of an error message, shortened and without passwords."""
    text = redact(next(iter(str(error).splitlines()), type(error).__name__))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def sqlite_path(uri: str) -> str:
    """The file of a sqlite store; empty for any other store."""
    scheme, _, path = uri.partition(":///")
    return unquote(path.partition("?")[0]) if scheme in ("sqlite", "sqlite+pysqlite") else ""


def is_deleted(error: BaseException) -> bool:
    """Whether the store refuses an entry because the run or its experiment is deleted: both may be restored."""
    return _DELETED.search(str(error)) is not None


def trouble_of(error: BaseException, uri: str, deleted_experiment: str | None = None) -> Trouble:
    """What ``error`` of the client of the store at ``uri`` means.

    ``deleted_experiment`` is the id of the run's experiment, if it is known that this, with the run, was deleted.
    """
    place = f"MLflow at {redact(uri)}"
    if deleted_experiment is not None:
        error = ValueError(f"The experiment {deleted_experiment} must be in the 'active' state")
    for find in (_deleted, _database, _address, _answer, _connection):
        if found := find(error, uri):
            what, cure = found
            return Trouble(f"{place} {what}", cure)
    return Trouble(f"{place} fails ({first_line(error)})", f"mend that, {_NO_SERVER}")


def _deleted(error: BaseException, uri: str) -> tuple[str, str] | None:
    match = _DELETED.search(str(error))
    if match is None:
        return None
    kind, identity = match.groups()
    command = f"MLFLOW_TRACKING_URI={redact(uri)} mlflow {kind}s restore --{kind}-id {identity}"
    other = "give another --experiment" if kind == "experiment" else "start again: the run gets another one"
    return f"has deleted the {kind} {identity}", f"restore it ({command}), or {other}"


def _database(error: BaseException, uri: str) -> tuple[str, str] | None:
    text, path = str(error), sqlite_path(uri)
    elsewhere = "or name another store with --tracking_uri"
    if "database is locked" in text or "database table is locked" in text:
        return (
            "is locked by another program",
            f"close that program (fuser {path} names it), or start mlflow server and give its address to all",
        )
    if "unable to open database file" in text:
        return f"cannot be opened: {path} is a folder, or its folder is not there", f"mend the path, {elsewhere}"
    if "readonly database" in text:
        return "cannot be written", f"make {path} and its folder writable, {elsewhere}"
    if "file is not a database" in text or "file is encrypted" in text:
        return f"is no database: {path} holds something else", f"move the file away, {elsewhere}"
    if "disk is full" in text:
        return "has no room: its disk is full", f"make room, {elsewhere}"
    return None


def _address(error: BaseException, uri: str) -> tuple[str, str] | None:
    text = " ".join(str(error).split())
    if _HOST_AND_PORT.fullmatch(uri):
        return "is taken for a folder", f"write http://{redact(uri)}"
    if "filesystem tracking backend" in text:  # ./mlruns, file:...: MLflow's sentence says how to go on
        return "is a folder of files, which MLflow refuses", redact(text)[:_MOST_OF_MLFLOW]
    if isinstance(error, ModuleNotFoundError):
        return f"needs the Python package {error.name}", "install it, or give the address of a server of MLflow"
    if "unsupported URI" in text:
        return "is no store that MLflow knows", "give http://HOST:PORT or sqlite:///PATH"
    if "out-of-date database schema" in text:
        return "is of another version of MLflow", redact(text)[:_MOST_OF_MLFLOW]
    return None


def _answer(error: BaseException, _: str) -> tuple[str, str] | None:
    """What a web server says that is no answer to the request."""
    text, code = str(error), getattr(error, "error_code", None)
    match = _STATUS.search(text)
    status = match and (match[1] or match[2])
    if status == "401" or code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return (
            f"wants to know who asks ({first_line(error)})",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, on every node",
        )
    if status == "403" or code == "PERMISSION_DENIED":
        return (
            f"does not allow it ({first_line(error)})",
            "ask those who run it to allow it, or set another MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    if status == "404" or (status or "")[:1] == "3" or "not in a valid JSON format" in text:
        return (
            f"is a web server without MLflow under this path ({first_line(error)})",
            "give the address where MLflow's pages open in a browser, with its path prefix if it has one",
        )
    if status:
        return f"answers with errors ({status})", "read the server's log, and try again when it is well"
    return None


def _connection(error: BaseException, _: str) -> tuple[str, str] | None:
    """Why there is no web server; "does not answer" in every case."""
    text, causes = str(error), [*_causes(error)]
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes) or "Connection refused" in text:
        return "does not answer: nothing listens there, the connection is refused", f"start it, {_NO_SERVER}"
    if any(isinstance(cause, socket.gaierror) for cause in causes) or "Failed to resolve" in text:
        return "does not answer: no host of that name is known", f"correct the name, {_NO_SERVER}"
    if any(isinstance(cause, ssl.SSLError) for cause in causes) or "SSLError" in text:
        return (
            f"does not answer over TLS ({_reason(causes)})",
            "write http:// if it speaks no TLS, or set MLFLOW_TRACKING_SERVER_CERT_PATH to its signer's certificate",
        )
    if any(isinstance(cause, TimeoutError) for cause in causes) or "timed out" in text:
        return (
            "does not answer: it is away, or hangs",
            f"see whether its host, the way there and the server are well, {_NO_SERVER}",
        )
    if any(isinstance(cause, OSError) for cause in causes) and "API request to" in text:
        return f"does not answer: {_reason(causes)}", f"see whether its host and the way there are well, {_NO_SERVER}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reason(causes: list[BaseException]) -> str:
    return first_line(causes[-1])
