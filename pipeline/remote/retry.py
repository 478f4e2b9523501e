"""Retries: a request that a server refuses for a moment, or breaks off, is sent again after growing waits.

A transfer fails for good after ``tries`` failures in a row; every byte that arrives starts the count anew. Waits double
from half a second to a minute and are random, so that a thousand workers do not come back together; where the server
says how long to wait (Retry-After), that is how long. Written by hand because obstore and huggingface_hub retry whole
requests only: none of them resumes a download in the middle, resets its count when bytes arrive, or stops on request.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline.errors import UserError

T = TypeVar("T")

TRANSFER_TRIES = 10  # about three minutes without an answer
LISTING_TRIES = 5  # about seven seconds, because a user waits for the plan
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 900.0  # longest Retry-After that is obeyed; the hub counts requests per five minutes
_AGAIN = "try again later"

_logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # no error yet
    """A transfer that broke off, or was refused for now, so that it can be tried again.

    ``reason`` and ``advice`` are the two halves of the sentence that a user reads when the last try has failed.
    """

    def __init__(self, reason: str, *, advice: str = _AGAIN, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.wait_seconds = wait_seconds
        """Seconds that the server asks to wait; 0 for at once, None where it does not say."""


class Stopped(Exception):  # noqa: N818
    """The result of a transfer is no longer wanted."""


class RetryState:
    """Counts the failures in a row of one transfer, and waits between them."""

    def __init__(self, what: str, *, tries: int = TRANSFER_TRIES, stopped: threading.Event | None = None) -> None:
        self._what = what
        self._tries = tries
        self._stopped = stopped or threading.Event()
        self._failures = 0

    def progress(self) -> None:
        """Reset the count, because bytes arrived. Raises Stopped where the rest is no longer wanted."""
        self._failures = 0
        if self._stopped.is_set():
            raise Stopped

    def wait(self, interruption: Interrupted) -> None:
        """Wait before the next try.

        Raises:
            UserError: all tries have failed.
            Stopped: the result is no longer wanted.
        """
        self._failures += 1
        if self._failures >= self._tries:
            raise UserError(f"{self._what}: {interruption.reason}; {interruption.advice}") from interruption
        seconds = interruption.wait_seconds
        if seconds is None:
            longest = min(_first_wait_seconds() * 2 ** (self._failures - 1), _LONGEST_SECONDS)
            seconds = longest * random.uniform(0.5, 1)
        _logger.info("%s: %s; retrying in %.1f s", self._what, interruption.reason, seconds)
        if self._stopped.wait(min(seconds, _LONGEST_ASKED_SECONDS)):
            raise Stopped


def retry(what: str, attempt: Callable[[], T], *, tries: int = LISTING_TRIES) -> T:
    """Return the result of ``attempt``, which is called again as long as it raises Interrupted, ``tries`` times."""
    state = RetryState(what, tries=tries)
    while True:
        try:
            return attempt()
        except Interrupted as interruption:
            state.wait(interruption)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After (seconds or a date) or the hub's RateLimit header asks for; None without either."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked:
        try:
            date = email.utils.parsedate_tz(asked)
            return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
        except ValueError:
            return None
    # draft-ietf-httpapi-ratelimit-headers: "api";r=0;t=55 is no request left, 55 seconds until there are
    limited = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limited[1]) if limited else None


def _first_wait_seconds() -> float:
    """Seconds of the first wait; tests set the variable, which their worker processes inherit."""
    return float(os.environ.get("GPT25_FIRST_WAIT_SECONDS", "0.5"))
