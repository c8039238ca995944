"""Which checkpoint in a run directory, or in a folder of runs, is the newest good one.

Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from config import CheckpointError
from engine.run_directory.manifest import Manifest, data_path, manifest_path, steps_in, verify

_FOREIGN_NAME = re.compile(r"checkpoint(?:_iter)?_(\d+)\.pt")


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint to continue from."""

    path: Path
    manifest: Manifest
    seen_steps: tuple[int, ...]
    """Steps that had a manifest at the time; another process may add some before we lock."""

    @property
    def run_dir(self) -> Path:
        """The run directory to continue in."""
        return self.path.parent

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step


def resolve_foreign_name(path: Path) -> Path:
    """Returns the checkpoint that a trainer without run directories would have called `path`.

    `out/checkpoint_iter_500.pt` is that of step 500 of the newest run in `out` that has one. A path
    that exists, or that names nothing, comes back as it is.
    """
    named = _FOREIGN_NAME.fullmatch(path.name)
    if not named or path.exists():
        return path
    runs = sorted(path.parent.glob("run_*"), reverse=True)
    candidates = [data_path(folder, int(named[1])) for folder in (path.parent, *runs)]
    return next((own for own in candidates if manifest_path(own).exists()), path)


def newest_run(folder: Path) -> Path:
    """Returns the newest run with a checkpoint in a folder of runs; a run directory itself."""
    runs = sorted(run for run in folder.glob("run_*") if steps_in(run))
    return runs[-1] if runs and not steps_in(folder) else folder


def open_checkpoint(path: Path) -> Resume:
    """Returns the checkpoint at `path` after reading and verifying all its bytes; raises
    CheckpointError."""
    manifest = verify(path)
    return Resume(path, manifest, tuple(steps_in(path.parent)))


def newest_valid(folder: Path) -> tuple[Resume | None, list[str]]:
    """Returns the verified checkpoint of the highest step, and why newer ones were refused."""
    rejects: list[str] = []
    for step in sorted({*steps_in(folder), *steps_in(folder, "pt")}, reverse=True):
        try:
            return open_checkpoint(data_path(folder, step)), rejects
        except CheckpointError as error:
            rejects.append(str(error))
    return None, rejects
