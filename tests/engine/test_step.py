"""Steps whose loss and gradient norm are read one step late, as on a GPU: the same run, and a step
that is not finite is never taken."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine.setup.build import build
from engine.step import Step
from engine.trainer import Trainer
from tests.runs import assert_equal, assert_same_run, metrics, only_run, run_here

pytestmark = pytest.mark.slow

SHORT = ["max_iters=12", "log_freq=5", "test_freq=8", "checkpoint_freq=6", "grad_clip=0.5"]
# Of the run above: 5 is logged, 8 is evaluated, 6 is saved, 12 is the last, 3 is none.
PLANTED = [3, 5, 6, 8, 12]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that `train.py` builds from now on."""
    made: list[Trainer] = []

    def keep(*arguments: Any) -> Trainer:
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(train, "build", keep)
    return made


def read_late(monkeypatch: pytest.MonkeyPatch, late: bool = True) -> None:
    """Lets runs on the CPU read one step late: torch's fused AdamW takes `found_inf` there too."""
    monkeypatch.setattr("engine.setup.build.reads_late", lambda parts: late)


def plant_nan(monkeypatch: pytest.MonkeyPatch, trainers: list[Trainer], step: int) -> None:
    """Makes the gradients of a step NaN; its loss stays as it is."""

    def scaled(loss: Tensor, world: object) -> Tensor:
        return loss * (torch.nan if trainers[-1].state.step + 1 == step else 1.0)

    monkeypatch.setattr(train, "scale_loss_for_averaging", scaled)


@pytest.mark.parametrize(
    "options", [[], ["epochs=1", "max_iters=99", "batch_size=64", "n_layer=1", "test_freq=null"]]
)
def test_values_read_late_make_the_same_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    for name in ("late", "now"):
        read_late(monkeypatch, name == "late")
        assert run_here([*tiny, *SHORT, *options, f"checkpoint_dir={tmp_path / name}"]) == 0
    runs = [only_run(tmp_path / name) for name in ("late", "now")]
    steps = [sorted(int(p.stem.split("_")[1]) for p in run.glob("*.pt")) for run in runs]
    assert steps[0] == steps[1] and len(steps[0]) > 1
    for step in steps[0]:
        assert_same_run(runs[0], runs[1], step)


def test_the_time_of_a_step_includes_the_wait_for_its_values(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device that takes 0.1 s per step, every log line says so."""
    read_late(monkeypatch)
    read = Step.read

    def read_slowly(step: Step) -> None:
        time.sleep(0.1)
        read(step)

    monkeypatch.setattr(Step, "read", read_slowly)
    words = ["max_iters=5", "log_freq=2", "test_freq=null", f"checkpoint_dir={tmp_path}"]
    assert run_here([*tiny, *words]) == 0
    lines = (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["train/iter_time_ms"] for line in lines if "iter_time" in line]
    assert len(times) == 3 and all(each >= 100 for each in times)


@pytest.mark.parametrize("step", PLANTED)
def test_a_step_that_is_not_finite_is_never_taken_and_names_its_own_batch(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trainers: list[Trainer],
    step: int,
) -> None:
    plant_nan(monkeypatch, trainers, step)
    left: list[Any] = []
    for name in ("late", "now"):
        read_late(monkeypatch, name == "late")
        assert run_here([*tiny, *SHORT, f"checkpoint_dir={tmp_path / name}"]) == 4
        error = capsys.readouterr().err.replace(f"{tmp_path / name}", "")
        assert error.startswith(f"Step {step}: loss ") and "The step was not taken" in error
        assert "row group" in error
        trainer = trainers.pop()
        weights = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
        assert all(value.isfinite().all() for value in weights.values())
        run = only_run(tmp_path / name)
        files = sorted(path.name for path in run.glob("checkpoint_*"))
        error = error.partition("last checkpoint")[0] + error.partition("The batch held")[2]
        moments = [state for state in trainer.optimizer.state_dict()["state"].values() if step > 1]
        left.append((error, weights, moments, files, metrics(run)))
    assert_equal(left[0], left[1], "what is left")


def test_the_last_step_is_looked_at_where_nothing_is_saved(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trainers: list[Trainer],
) -> None:
    read_late(monkeypatch)
    plant_nan(monkeypatch, trainers, 3)
    words = ["save_model=false", "test_freq=null", "max_iters=3"]
    assert run_here([*tiny, *words, f"checkpoint_dir={tmp_path / 'runs'}"]) == 4
    assert capsys.readouterr().err.startswith("Step 3: loss ")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read_late(monkeypatch)
    folder = f"checkpoint_dir={tmp_path / 'runs'}"
    assert run_here([*tiny, folder, "log_freq=4", "--check-resume", "6"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_an_error_of_the_data_does_not_hide_that_the_last_step_was_not_finite(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trainers: list[Trainer],
) -> None:
    read_late(monkeypatch)
    plant_nan(monkeypatch, trainers, 3)
    next_step = Trainer.next_step

    def lost(self: Trainer, stop: Any) -> Any:
        if self.state.step == 3:
            raise OSError("the disk is gone")
        return next_step(self, stop)

    monkeypatch.setattr(Trainer, "next_step", lost)
    assert run_here([*tiny, *SHORT, f"checkpoint_dir={tmp_path / 'runs'}"]) == 4
    assert capsys.readouterr().err.startswith("Step 3: loss ")
    assert not list(only_run(tmp_path / "runs").glob("*.pt"))


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Notes the step of each operator that would make a host wait for its GPU."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.trainer = trainer
        self.found: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            self.found.append((self.trainer.state.step + 1, name))
        return func(*args, **(kwargs or {}))


def test_between_two_log_lines_the_host_waits_for_nothing(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: a GPU would have to be waited for where its numbers become Python's."""
    read_late(monkeypatch)
    loop, found = train.train, list[tuple[int, str]]()

    def watched(trainer: Trainer, stop: Any) -> None:
        with Waits(trainer) as waits:
            loop(trainer, stop)
        found.extend(waits.found)

    monkeypatch.setattr(train, "train", watched)
    words = ["max_iters=9", "log_freq=9", "test_freq=null"]
    words += ["save_model=false", "dropout=0.1", "grad_clip=0.1"]
    assert run_here([*tiny, *words, f"checkpoint_dir={tmp_path / 'runs'}"]) == 0
    assert not found
