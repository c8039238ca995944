"""Which files an address means: one file, a folder with all below it, or a glob."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial

from data.remote.access import RemoteFile, access_to, glob_root, has_magic
from data.remote.store import RemoteStore


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an address at one moment."""

    address: str
    """As it was asked for."""
    root: str
    """The address that their paths are below; of the Hub, that of one commit."""
    revision: str
    """The commit of a dataset on the Hub; '' elsewhere."""
    files: tuple[RemoteFile, ...]
    """By path, in bytewise order."""
    others: str
    """What else is there, for messages: "3 *.txt, 1 *.json"; '' for nothing."""

    def url(self, file: RemoteFile) -> str:
        """Returns the address of a file."""
        return f"{self.root}/{file.path}"


def list_files(
    store: RemoteStore, url: str, endings: tuple[str, ...], revision: str = ""
) -> Listing:
    """Lists the files with these endings that an address means; there may be none.

    Names that start with '.' or '_', and files in such folders, are passed over. Raises DataError
    if the server does not answer or refuses.

    Args:
        revision: the commit of the Hub to take in place of what the address says.
    """
    access, address = access_to(url), url
    if url.startswith("hf://"):
        from data.remote.hub import at_commit, commit_of

        revision = revision or store.ask(url, partial(commit_of, url))
        url = at_commit(url, revision)
    found = access.find(url, endings, store.ask)
    root = _root(url, [file.path for file in found])
    inside = [
        file._replace(path=file.path[len(root) + 1 :])
        for file in found
        if file.path.startswith(f"{root}/")
    ]
    shown = [file for file in inside if not any(map(_is_hidden, file.path.split("/")))]
    chosen = [file for file in shown if file.path.endswith(endings)]
    others = Counter(os.path.splitext(file.path)[1] for file in shown if file not in chosen)
    return Listing(
        address,
        root,
        revision,
        tuple(sorted(chosen, key=lambda file: os.fsencode(file.path))),
        ", ".join(f"{count} *{ending}" for ending, count in others.most_common(5)),
    )


def _root(url: str, found: list[str]) -> str:
    """Returns the folder that files are below: of a glob, the part before its first wildcard."""
    if has_magic(url):
        return glob_root(url)
    return url.rsplit("/", 1)[0] if found == [url] else url.rstrip("/")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))
