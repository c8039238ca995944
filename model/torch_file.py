"""Files of `torch.save`, read so that nothing in them is executed."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from config import CheckpointError

_REAL_MODULES = sys.stdlib_module_names | {"torch", "numpy", "_codecs"}


class Inert:
    """Stands for an object of a class that is not known here; none of its code is imported."""

    def __init__(self, *values: Any, **named: Any) -> None:
        pass


def load_torch_file(
    path: Path, device: str | torch.device = "cpu", mmap: bool = False, inert_objects: bool = False
) -> object:
    """Returns the tensors and plain values in a file; raises CheckpointError for other objects.

    Args:
        inert_objects: replaces objects of unknown classes by `Inert` ones instead of refusing the
            file. Those of torch and of the standard library are refused nevertheless: no config is
            one of them.
    """
    _check_archive(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        real = [name for name in names if name.split(".")[0] in _REAL_MODULES]
        refused = real if inert_objects else names
        stand_ins: list[Any] = []
        for name in names if inert_objects and not refused else []:
            module, _, own = name.rpartition(".")
            stand_ins.append(type(own, (Inert,), {"__module__": module}))
        if not refused:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # a hostile pickle can make the loader raise anything
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error}).") from error
    raise CheckpointError(
        f"{path}: checkpoint holds a Python object ({', '.join(sorted(refused))}); refused. Save "
        "the weights alone where they were made: torch.save(model.state_dict(), 'weights.pt')"
    )


def _check_archive(path: Path) -> None:
    """Raises CheckpointError unless the file is an uncompressed zip archive, as torch writes it.

    A small compressed file could unpack to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is not a checkpoint: no complete zip archive."
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is not a checkpoint: it is compressed.")
