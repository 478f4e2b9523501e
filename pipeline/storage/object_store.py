"""Buckets, accessed through obstore: the store of a bucket, and the error messages of failed requests.

Answers like 503 and 429 and cut connections are retried for two minutes, with growing, random pauses; a wrong setting
is known after seconds, because the first call for a bucket asks it one question and is retried for a few seconds only.

Credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; GOOGLE_APPLICATION_CREDENTIALS) or
from the instance's role. AWS_REGION names the region, AWS_ENDPOINT_URL another store than Amazon's; http:// is allowed
for that one only (and for GOOGLE_BASE_URL).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, RetryConfig, S3Store

RETRY_SECONDS = 120.0  # how long a request is retried; S3 asks to slow down for about a minute at most
FIRST_RETRY_SECONDS = 8.0
_QUESTION = ".tmp-question"  # a key that does not exist

_BUCKET_URL = re.compile(r"(?P<scheme>s3|gs)://(?P<bucket>[^/]*)(?:/(?P<key>.*))?", re.DOTALL)
_BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_ENVIRONMENT_PREFIXES = ("AWS_", "GOOGLE_", "GCE_")

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role; AWS_SKIP_SIGNATURE=true "
    "reads a public bucket without",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or give the machine one; "
    "GOOGLE_SKIP_SIGNATURE=true reads a public bucket without",
}
_REACHING = {
    "s3": "check the network, AWS_ENDPOINT_URL and AWS_REGION, then run the same command again",
    "gs": "check the network, then run the same command again",
}
_REFUSED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
    "AuthenticationRequired",
}
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NO_CREDENTIALS = (
    "Missing AccessKeyId",
    "Missing SecretAccessKey",
    "/latest/api/token",
    "/latest/meta-data/",
    "token request",
    "service account file",
    "application credentials",
)


def parse_url(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key ("" where there is none) of s3://BUCKET/KEY or gs://BUCKET/KEY; else a UserError."""
    match = _BUCKET_URL.fullmatch(url)
    if match is None:
        raise UserError(f"{url} is neither a path nor a URL of the form s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if not _BUCKET_NAME.fullmatch(match["bucket"]):
        raise UserError(f"{url} names no bucket: what stands behind {match['scheme']}:// is not the name of one")
    return match["scheme"], match["bucket"], match["key"] or ""


def bucket_store(url: str) -> tuple[S3Store | GCSStore, str]:
    """The obstore store of the bucket in ``url`` (one per bucket and process) and the key.

    The first call for a bucket asks it one question, so that a wrong setting is a UserError after seconds; from then on
    its requests are retried for ``RETRY_SECONDS``.
    """
    scheme, bucket, key = parse_url(url)
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT_PREFIXES)))
    return _open_store(scheme, bucket, settings), key


@contextlib.contextmanager
def bucket_errors(url: str, *, writing: bool = False) -> Iterator[None]:
    """Pass FileNotFoundError on, and turn other errors of obstore about ``url`` into a UserError of one sentence."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        if writing or _error_code(error) == "NoSuchBucket":
            raise explain(url, error) from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except BaseError as error:
        raise explain(url, error) from error


def explain(url: str, error: Exception) -> UserError:
    """The error message of a request for ``url`` whose last retry failed."""
    from obstore.exceptions import PermissionDeniedError

    scheme, bucket, _ = parse_url(url)
    place = f"{scheme}://{bucket}"
    text = str(error).partition("\n\nDebug source")[0]
    code, status = _error_code(error), http_status(error)
    reason = " ".join(re.sub(r"<[^>]*>", " ", text).split())[:300]
    odd_key = re.search(r'invalid path: Path "(.*?)" contain', text)
    cases = (
        (
            odd_key is not None,
            f"{place} holds the key {odd_key and odd_key[1]!r}, which has two slashes or another part that is no name, "
            f"so {url} cannot be listed; rename it, or name a narrower source",
        ),
        (code == "NoSuchBucket", f"there is no bucket {place}; create it, or correct its name"),
        (_lacks_credentials(text), f"no credentials for {place} were found: {_CREDENTIALS[scheme]}"),
        (_refused(error), f"{place} refuses the credentials ({code or status}): {_CREDENTIALS[scheme]}"),
        (
            isinstance(error, PermissionDeniedError),
            f"{place} denies access to {url} ({code or status}); the credentials need the right to it",
        ),
        (
            code in _OTHER_REGION or "incorrectly configured region" in text,
            f"bucket {place} is in another region; set AWS_REGION to it",
        ),
        (_may_pass(status), f"{place} answered every request for {url} with an error ({status}); try again later"),
        (
            status is None and "HTTP error" in text,
            f"{_endpoint(scheme)} cannot be reached for {url}; {_REACHING[scheme]}",
        ),
        (True, f"the request for {url} failed: {reason}"),
    )
    return UserError(next(sentence for fits, sentence in cases if fits))


def http_status(error: Exception) -> int | None:
    """Status of the last HTTP answer that an obstore error is about; None where no answer came."""
    match = re.search(r"status code: (\d+)", str(error))
    return int(match[1]) if match else None


@functools.lru_cache(maxsize=64)
def _open_store(scheme: str, bucket: str, _settings: tuple[tuple[str, str], ...]) -> S3Store | GCSStore:
    """A store that has answered once. Other settings in the environment make another store."""
    import obstore
    from obstore.exceptions import BaseError

    hasty = _make_store(scheme, bucket, retry_seconds=FIRST_RETRY_SECONDS, max_retries=8)
    try:
        obstore.get(hasty, _QUESTION)
    except FileNotFoundError as error:
        if _error_code(error) == "NoSuchBucket":
            raise explain(f"{scheme}://{bucket}", error) from error
    except BaseError as error:
        if not _may_work(error):
            raise explain(f"{scheme}://{bucket}", error) from error
    return _make_store(scheme, bucket, retry_seconds=RETRY_SECONDS, max_retries=30)


def _make_store(scheme: str, bucket: str, *, retry_seconds: float, max_retries: int) -> S3Store | GCSStore:
    from obstore.exceptions import BaseError
    from obstore.store import GCSStore, S3Store

    pause = min(10.0, retry_seconds / 4)
    retry: RetryConfig = {
        "max_retries": max_retries,
        "retry_timeout": timedelta(seconds=retry_seconds),
        "backoff": {  # a pause is drawn between the first one and base x the last, so it grows by half on average
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=pause),
            "base": 3,
        },
    }
    client: ClientConfig = {
        "allow_http": _endpoint(scheme).startswith("http://"),
        "connect_timeout": timedelta(seconds=3),
        "read_timeout": timedelta(seconds=60),
        "timeout": timedelta(minutes=5),
    }
    try:
        return (S3Store if scheme == "s3" else GCSStore)(bucket, client_options=client, retry_config=retry)
    except BaseError as error:
        raise explain(f"{scheme}://{bucket}", error) from error


def _endpoint(scheme: str) -> str:
    if scheme == "gs":
        return os.environ.get("GOOGLE_BASE_URL") or "https://storage.googleapis.com"
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"


def _may_work(error: Exception) -> bool:
    """Whether a request that failed as the first one may succeed later, or for other keys."""
    from obstore.exceptions import PermissionDeniedError

    text = str(error)
    if _lacks_credentials(text) or _refused(error):
        return False
    status = http_status(error)
    if status is None:
        return "HTTP error" in text and not re.search(r"kind:\s+Connect\b", text)  # a cut connection
    return isinstance(error, PermissionDeniedError) or _may_pass(status)


def _may_pass(status: int | None) -> bool:
    return status is not None and (status >= 500 or status == 429)


def _refused(error: Exception) -> bool:
    from obstore.exceptions import UnauthenticatedError

    return isinstance(error, UnauthenticatedError) or _error_code(error) in _REFUSED


def _lacks_credentials(text: str) -> bool:
    return any(sign in text for sign in _NO_CREDENTIALS)


def _error_code(error: Exception) -> str | None:
    """The code in the XML that a store answers with; None where there is none."""
    match = re.search(r"<Code>(\w+)</Code>", str(error))
    return match[1] if match else None
