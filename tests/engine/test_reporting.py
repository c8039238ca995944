"""The command that is printed to continue a run."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.hardware.distributed import World
from engine.reporting import start_of

STARTED = ("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "HATCHERY_LAUNCH", "RANK")
LAUNCHED = {"TORCHELASTIC_ERROR_FILE": "error.json", "HATCHERY_LAUNCH": "1"}
SRUN = {"RANK": "0", "SLURM_PROCID": "0"}


def started(size: int, local_size: int) -> str:
    return start_of(World(0, size, torch.device("cpu"), local_size))


def test_processes_are_started_again_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["code/train.py"])
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    assert started(1, 1) == "python"
    assert started(8, 8) == "torchrun --standalone --nproc_per_node=8"
    assert started(16, 8) == ""  # a command on each node
    for name, text in LAUNCHED.items():
        monkeypatch.setenv(name, text)
    assert started(8, 8) == "python code/launch.py --standalone --nproc_per_node=8"
    for name, text in SRUN.items():
        monkeypatch.setenv(name, text)
    assert started(16, 8) == "srun python"
