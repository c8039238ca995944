"""launch.py: the exit code of the run leaves torchrun, and signals reach its processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import launch
from tests.engine.forks import in_child

# Rank 1 acts; rank 0 loses it, as a process of a run does. A signal goes to the launcher and comes
# back, as from a scheduler.
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, act = os.environ["RANK"], sys.argv[1]
def save(number, frame):
    time.sleep(0.3)
    Path(f"saved_{rank}").touch()
    while not (Path("saved_0").exists() and Path("saved_1").exists()):
        time.sleep(0.01)  # as `wait_for_all`: torchrun stops the others
    os._exit(143)
if act.startswith("SIG"):
    signal.signal(getattr(signal, act), save)
    Path(f"ready_{rank}").touch()
    while rank == "1" and not Path("ready_0").exists():
        time.sleep(0.01)
    if rank == "1":
        os.kill(os.getppid(), getattr(signal, act))
    time.sleep(30)
if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else sys.exit(1)
sys.exit(int(act) if rank == "1" else 1)
"""


@pytest.mark.slow
def test_the_code_of_the_process_that_failed_first_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("worker.py").write_text(WORKER)

    def run(act: str) -> int:
        words = ["launch.py", "--standalone", "--nproc_per_node=2", "worker.py", act]
        monkeypatch.setattr(sys, "argv", words)
        status, text = in_child(launch.main)
        assert status == 0, text
        return int(text)

    codes = {"3": 3, "killed": 137, "SIGUSR2": 143}
    assert {act: run(act) for act in codes} == codes
