"""Addresses of text that is not on this machine: which there are, and what they may hold."""

from __future__ import annotations

import re

SCHEMES = ("s3", "gs", "http", "https", "hf")
HIDDEN = "(an address)"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HUB_DATASET = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@[^@]+)?(/.*)?")


def is_remote(path: str) -> bool:
    """Returns whether a path is an address: s3://, gs://, http://, https:// or hf://."""
    return path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def shareable(value: object) -> object:
    """Returns an option's value for a message: a faulty address is hidden, as part of it may be a
    password."""
    return HIDDEN if isinstance(value, str) and address_fault(value) else value


def address_fault(path: str) -> str:
    """Returns what is wrong with an address; '' for a good one and for paths of this machine.

    The text does not repeat the address: its faulty part may be a password.
    """
    scheme = _ADDRESS.match(path)
    if scheme is None:
        return ""
    if not is_remote(path):
        return "is neither a folder nor one of s3://, gs://, https://, hf://datasets/OWNER/NAME@REV"
    rest = path[scheme.end() :]
    host = rest.split("/", 1)[0]
    if "?" in rest or "@" in host:
        part = "a query string (?...)" if "?" in rest else "a user name or password before the host"
        return (
            f"has {part}, which would be kept in the run's files; credentials belong in the "
            "environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
        )
    if not host:
        return "names no bucket or host"
    if scheme[1] == "hf" and not _HUB_DATASET.fullmatch(path):
        return "is not hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@REVISION or below it"
    return ""
