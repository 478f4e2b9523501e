"""Addresses without their secrets, for everything that is shown, logged or stored.

RFC 3986 wants @ / ? in a password percent-encoded, but people paste passwords as they are. So the user part is taken
as far as it can reach, to the last @: rather too much of an address is hidden than a part of a password shown.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import unquote

_SECRET_WORDS = ("password", "passwd", "pwd", "token", "secret", "signature", "credential", "apikey", "api_key", "auth")
_SECRET_NAMES = ("sig", "key", "pass", "awsaccesskeyid", "googleaccessid")
_SECRET_PREFIXES = ("x-amz-", "x-goog-")
_HIDDEN = "***"


def redact(text: str) -> str:
    """The text with every address in it (scheme://...) without user and password and the values of secret query keys.

    Addresses end at white space.
    """
    parts, position = [], 0
    while (found := text.find(":/", position)) >= 0:  # what takes an address for a path makes one slash of two
        start = found + len("://" if text.startswith("://", found) else ":/")
        end = next((index for index in range(start, len(text)) if text[index].isspace()), len(text))
        parts += [text[position:start], _redact_query(_without_user(text[start:end]))]
        position = end
    return "".join([*parts, text[position:]])


def _without_user(rest: str) -> str:
    """What stands behind scheme://, without USER:PASSWORD@."""
    at = rest.rfind("@")
    if at < 0:
        return rest
    first = rest[: min((index for mark in "/?#" if (index := rest.find(mark)) >= 0), default=len(rest))]
    if "@" not in first and (":" not in first or _is_host_and_port(first)):
        return rest  # the @ stands in a path: a revision of the hub, a file's name
    return rest[at + 1 :]


def _is_host_and_port(text: str) -> bool:
    """Whether this is HOST:PORT and not USER:PASSWORD; a word without dots before digits counts as a user."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        return False
    return host == "localhost" or "." in host or _is_ip(host)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _redact_query(address: str) -> str:
    """The address with *** for the values of query keys that name a secret."""
    path, mark, query = address.partition("?")
    if not mark:
        return address
    return path + mark + "&".join(_redact_pair(pair) for pair in query.split("&"))


def _redact_pair(pair: str) -> str:
    name, equals, value = pair.partition("=")
    return f"{name}={_HIDDEN}" if equals and value and _is_secret(unquote(name).lower()) else pair


def _is_secret(name: str) -> bool:
    named = name in _SECRET_NAMES or name.startswith(_SECRET_PREFIXES)
    return named or any(word in name for word in _SECRET_WORDS)
