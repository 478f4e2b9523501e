"""E-mail addresses and public IPv4 addresses are replaced by ones that belong to nobody (RFC 2606, RFC 5737)."""

from __future__ import annotations

import ipaddress
import re

EMAIL, ADDRESS = "email@example.com", "192.0.2.1"

_EMAIL = re.compile(
    r"\b[\w!#$%&'*+/=?^`{|}~-]{1,64}(?:\.[\w!#$%&'*+/=?^`{|}~-]{1,64}){0,8}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,63}\b"
)
_NUMBER = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_ADDRESS = re.compile(rf"(?<![\d.]){_NUMBER}(?:\.{_NUMBER}){{3}}(?!\.?\d)")


def masked(text: str) -> str:
    """The text with both kinds of addresses replaced; addresses of private networks stay."""
    if "@" in text:
        text = _EMAIL.sub(EMAIL, text)
    return _ADDRESS.sub(_masked_address, text)


def _masked_address(match: re.Match[str]) -> str:
    return ADDRESS if ipaddress.ip_address(match[0]).is_global else match[0]
