"""Token files on a server: which there are, with the meta files that describe them."""

from __future__ import annotations

from dataclasses import replace

from config import DataError
from data.remote.listing import Listing, list_files
from data.remote.store import RemoteError, RemoteStore
from data.sources.tokens.file import ENDINGS
from data.sources.tokens.meta import meta_path

_META_NAMES = ("meta.json", "meta.pkl")
_ABSENT = (403, 404)  # a bucket that may not be listed answers 403 for a file that is not there


def list_token_files(store: RemoteStore, address: str, revision: str = "") -> Listing:
    """Lists a token file, or those of a folder, and the meta files beside them.

    Raises DataError if there are none. revision: as for `list_files`.
    """
    listing = list_files(store, address, (*ENDINGS, *_META_NAMES), revision)
    files = [file for file in listing.files if "/" not in file.path]
    if address.endswith(ENDINGS):
        for name in (meta_path(files[0].path).name, *_META_NAMES) if files else ():
            try:
                files += list_files(store, f"{listing.root}/{name}", (name,), revision).files
            except RemoteError as error:
                if error.status not in _ABSENT:
                    raise
    if not any(file.path.endswith(ENDINGS) for file in files):
        found = listing.others or "nothing"
        raise DataError(
            f"{address}: no token files ({', '.join(ENDINGS)}; found {found}). Correct the address,"
            " or make them: python prepare.py --help"
        )
    return replace(listing, files=tuple(dict.fromkeys(files)))
