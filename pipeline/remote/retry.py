"""Asking again: what a server refuses for a moment, or breaks off, is asked for again after growing waits.

A transfer is given up after ``tries`` failures in a row; every byte that arrives starts the count anew. Waits double
from half a second to a minute and are spread at random, so that a thousand workers do not come back together; where the
server says how long to wait (Retry-After), that is how long.
"""

from __future__ import annotations

import datetime
import email.utils
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline.errors import UserError

T = TypeVar("T")

TRANSFER_TRIES = 10  # some three minutes of silence
LISTING_TRIES = 5  # some seven seconds: a user waits for the plan
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 900.0  # of what a server may ask for; the hub counts requests per five minutes
_AGAIN = "try again later"

_logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # no error yet
    """A transfer that broke off, or was refused for now.

    ``reason`` and ``advice`` are the two halves of the sentence that a user reads if it happens too often.
    """

    def __init__(self, reason: str, *, advice: str = _AGAIN, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.wait_seconds = wait_seconds
        """How long the server asks to be left alone; 0 for at once."""


class Stopped(Exception):  # noqa: N818
    """The result of a transfer is no longer wanted."""


class Patience:
    """Failures in a row of one transfer, and the waits between them."""

    def __init__(self, what: str, *, tries: int = TRANSFER_TRIES, stopped: threading.Event | None = None) -> None:
        self._what = what
        self._tries = tries
        self._stopped = stopped or threading.Event()
        self._failures = 0

    def progress(self) -> None:
        """Something arrived. Raises Stopped where nobody waits for the rest."""
        self._failures = 0
        if self._stopped.is_set():
            raise Stopped

    def wait(self, interruption: Interrupted) -> None:
        """Wait before the next try.

        Raises:
            UserError: there have been enough tries.
            Stopped: nobody waits for the result any more.
        """
        self._failures += 1
        if self._failures >= self._tries:
            raise UserError(f"{self._what}: {interruption.reason}; {interruption.advice}") from interruption
        seconds = interruption.wait_seconds
        if seconds is None:
            longest = min(_first_wait_seconds() * 2 ** (self._failures - 1), _LONGEST_SECONDS)
            seconds = longest * random.uniform(0.5, 1)
        _logger.info("%s: %s; asking again in %.1f s", self._what, interruption.reason, seconds)
        if self._stopped.wait(min(seconds, _LONGEST_ASKED_SECONDS)):
            raise Stopped


def patiently(what: str, attempt: Callable[[], T], *, tries: int = LISTING_TRIES) -> T:
    """The result of ``attempt``, called again as long as it raises Interrupted."""
    patience = Patience(what, tries=tries)
    while True:
        try:
            return attempt()
        except Interrupted as interruption:
            patience.wait(interruption)


def asked_wait_seconds(headers: Mapping[str, str]) -> float | None:
    """What Retry-After (seconds or a date) or the hub's RateLimit header says; None where neither is there."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked:
        try:
            date = email.utils.parsedate_to_datetime(asked)
        except ValueError:
            return None
        if date.tzinfo is None:  # "-0000": UTC, with nothing known of the place
            date = date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    # draft-ietf-httpapi-ratelimit-headers: "api";r=0;t=55 is no request left, 55 seconds until there are
    limited = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limited[1]) if limited else None


def _first_wait_seconds() -> float:
    """Shorter in tests, also in the workers that they start."""
    return float(os.environ.get("GPT25_FIRST_WAIT_SECONDS", "0.5"))
