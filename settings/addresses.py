"""Addresses of text that is not on this machine: which there are, and what they may hold."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "http", "https", "hf")
HIDDEN = "(an address)"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(s3|gs|https?|hf):/", re.IGNORECASE)
_HUB_DATASET = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@[^@]+)?(/.*)?")
# An address with '@' or '?' within a text. It ends where the next one begins: a list may lack
# spaces. Punctuation behind it is the sentence's.
_IN_TEXT = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{0,9}:/(?:(?!(?:s3|gs|https?|hf):/)\S)*[@?]"
    r"(?:(?!(?:s3|gs|https?|hf):/)\S)*[^\s'\",.:;)\]}]"
)


def is_remote(path: str) -> bool:
    """Returns whether a path is an address: s3://, gs://, http://, https:// or hf://."""
    return path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def shareable(text: str) -> str:
    """Returns a text for messages and files: addresses that may hold a password are hidden."""
    return _IN_TEXT.sub(lambda found: HIDDEN if address_fault(found[0]) else found[0], text)


def address_fault(path: str) -> str:
    """Returns what is wrong with an address; '' for a good one and for paths of this machine.

    The text does not repeat the address: its faulty part may be a password.
    """
    scheme = _SCHEME.match(path)
    if scheme is None:
        return ""
    if scheme[2]:
        return f"has one slash after its scheme; did you mean {scheme[2].lower()}://...?"
    if not is_remote(path):
        return "is neither a folder nor one of s3://, gs://, https://, hf://datasets/OWNER/NAME@REV"
    rest = path[scheme.end() :]
    host = rest.split("/", 1)[0]
    if "?" in rest or "@" in host or (scheme[1] in ("s3", "gs") and ":" in host):
        part = "a query string (?...)" if "?" in rest else "a user name or password before the host"
        return (
            f"has {part}, which would be kept in the run's files; credentials belong in the "
            "environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
        )
    if not host:
        return "names no bucket or host"
    if scheme[1] == "hf" and not _HUB_DATASET.fullmatch(path):
        return "is not hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@REVISION or below it"
    return _web_fault(path) if scheme[1] in ("http", "https") else ""


def _web_fault(path: str) -> str:
    try:
        port = urlsplit(path).port
    except ValueError:
        port = 0
    if port == 0:
        return "is no address: what follows the host's ':' is no port, or a bracket is open"
    return "holds a '#', which ends a web address; write %23 for one in a name" * ("#" in path)
