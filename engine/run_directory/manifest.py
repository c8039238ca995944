"""Which checkpoints a run directory holds, and which are complete or valid. Imports no torch.

`checkpoint_500.pt` counts as a checkpoint if and only if its manifest `checkpoint_500.json` exists
and states its size and sha256. The manifest is written last and removed first. It carries a
checksum of itself and is compared byte for byte with the text that its fields give, so that one
flipped bit in either file is noticed.

A checkpoint is called *complete* if its manifest is undamaged and the size is right, which costs
nothing and is enough for lists; it is *valid* if the sha256 of all bytes is right, too (`verify`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config import CheckpointError
from files.regular import open_regular, read_regular

FORMAT = 3
CONFIG = "config.yaml"
"""Every run directory has one; it is written before the first checkpoint."""
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
"""Locked by the process that writes the directory."""
MAX_BYTES = 1 << 30
"""The most that is read of one file of a run, except checkpoints."""
_NAME = re.compile(r"checkpoint_(0|[1-9]\d*)\.(?:pt|json)")
_LARGEST_MANIFEST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What is known of a checkpoint without opening it."""

    step: int
    tokens: int
    loss: float | None
    """Loss on the evaluated training rows; None if not measured at this step."""
    val_loss: float | None
    """Held-out loss; None if not measured at this step."""
    fingerprint: str
    """Identity of the training data."""


@dataclass(frozen=True, kw_only=True)
class Manifest(CheckpointMeta):
    """What is known of a finished checkpoint, and how its bytes are recognised."""

    size: int
    sha256: str
    time: str
    format: int = FORMAT


def data_path(folder: Path, step: int) -> Path:
    """Returns the path of a step's checkpoint."""
    return folder / f"checkpoint_{step}.pt"


def manifest_path(path: Path) -> Path:
    """Returns the path of the manifest beside a checkpoint."""
    return path.with_suffix(".json")


def render(manifest: Manifest) -> str:
    """Returns the manifest as JSON text.

    Later formats keep `checksum` and `format`, so that a damaged manifest can be told from that of
    a newer version.
    """
    return _render(asdict(manifest))


def _render(fields: dict[str, Any]) -> str:
    body = json.dumps(fields, sort_keys=True)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**fields, "checksum": checksum}, sort_keys=True, indent=2) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest beside checkpoint `path`; raises CheckpointError with the reason."""
    place = manifest_path(path)
    try:
        raw = read_regular(place, _LARGEST_MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} was not completed (no manifest {place.name})."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{place.name}: cannot be read: {error.strerror}.") from error
    damaged = CheckpointError(f"{path.name}: its manifest {place.name} is damaged.")
    try:
        fields = json.loads(raw)
        del fields["checksum"]
        # Not only the checksum: also a changed blank or an exchanged order of keys is damage.
        intact = _render(fields).encode() == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged from None
    if not intact:
        raise damaged
    if fields.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name}: format {fields.get('format')}; this version reads {FORMAT}."
        )
    try:
        manifest = Manifest(**fields)
    except TypeError:
        raise damaged from None
    _check_name(path, manifest)
    return manifest


def _check_name(path: Path, manifest: Manifest) -> None:
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path.name}: its manifest is that of step {manifest.step}.")


def verify(path: Path) -> Manifest:
    """Reads the whole file, compares it with its manifest and returns that; raises CheckpointError
    with the reason."""
    if not path.is_file():
        raise CheckpointError(_not_found(path))
    manifest = read_manifest(path)
    try:
        size, sha256 = path.stat().st_size, _sha256(path) if size_matches(path, manifest) else ""
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}.") from error
    if size != manifest.size:
        raise CheckpointError(
            f"{path.name}: size differs (manifest {manifest.size}, file {size} bytes)."
        )
    if sha256 != manifest.sha256:
        raise CheckpointError(
            f"{path.name}: sha256 mismatch (manifest {manifest.sha256[:8]}..., "
            f"file {sha256[:8]}...)."
        )
    return manifest


def size_matches(path: Path, manifest: Manifest) -> bool:
    """Returns whether the file has the manifest's size: the part of `verify` that costs nothing."""
    return path.is_file() and path.stat().st_size == manifest.size


def _not_found(path: Path) -> str:
    known = ", ".join(map(str, steps_in(path.parent)))
    where = f"run has {known}" if known else f"working directory: {Path.cwd()}"
    return f"{path}: not found; {where}."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def steps_in(folder: Path, suffix: str = "json") -> list[int]:
    """Returns the steps that have a manifest (or, with suffix `pt`, data), ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob(f"checkpoint_*.{suffix}"))
    return sorted(int(match[1]) for match in found if match)


def complete_checkpoints(folder: Path) -> dict[int, Manifest]:
    """Returns step -> manifest of the checkpoints whose size is right, ascending."""
    complete = {}
    for step in steps_in(folder):
        path = data_path(folder, step)
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if size_matches(path, manifest):
            complete[step] = manifest
    return complete


def best_step(complete: Mapping[int, Manifest]) -> int | None:
    """Returns the step of lowest held-out loss; None if no checkpoint was evaluated."""
    losses = {step: manifest.val_loss for step, manifest in complete.items()}
    # NaN, which is not equal to itself, would win every comparison.
    known = {step: loss for step, loss in losses.items() if loss is not None and loss == loss}
    return min(known, key=known.__getitem__, default=None)
