"""Trackers on request: every record arrives, and nothing that fails there ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from config import Config
from engine.monitor import console
from engine.monitor.tensorboard_tracker import TensorBoard
from engine.monitor.wandb_tracker import Wandb
from tests.runs import only_run, run_here

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config.from_dict({"logging": {"wandb_log": True, "wandb_project": "dragons"}})


class FakeRun:
    """What a run of wandb does, written down; raises at the verb `breaks`."""

    def __init__(self, breaks: str, **options: Any) -> None:
        self.breaks, self.options = breaks, options
        self.records: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.metrics: list[tuple[str, str]] = []
        self.offline = options.get("mode") == "offline"
        self.settings = SimpleNamespace(sync_dir="place/offline-run")

    def _maybe_break(self, verb: str) -> None:
        if verb == self.breaks:
            raise RuntimeError(f"{verb} broke\nmore")

    def define_metric(self, name: str, step_metric: str) -> None:
        self._maybe_break("define_metric")
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self._maybe_break("log")
        self.records.append(values)

    def finish(self, exit_code: int) -> None:
        self._maybe_break("finish")
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    """The module; `breaks` names the verb that raises."""

    def __init__(self, breaks: str = "", key: bool = True, mode: str = "online") -> None:
        super().__init__(Settings=dict, mode=mode, key=key, breaks=breaks, torn_down=False)
        self.runs: list[FakeRun] = []

    def setup(self, settings: dict[str, Any]) -> Any:
        assert settings["silent"] and settings["init_timeout"] and settings["finish_timeout"]
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return bool(self.key)

    def init(self, **options: Any) -> FakeRun:
        if self.breaks == "init" or (self.breaks == "network" and options.get("mode") is None):
            raise OSError("no such host.")
        run = FakeRun(self.breaks, **{"mode": self.mode, **options})
        self.runs.append(run)
        return run

    def teardown(self) -> None:
        self.torn_down = True


def fake(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> FakeWandb:
    module = FakeWandb(**behaviour)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def started(config: Config = CONFIG, run_id: str | None = None) -> Wandb:
    tracker = Wandb.start(config, "run_20251108_143022", run_id, Path("runs"))
    assert tracker is not None
    return tracker


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_every_record_arrives_under_its_keys_at_its_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = fake(monkeypatch)
    tracker = started()
    tracker.log({"step": 5, "train/loss": 1.5, "train/mfu": None})
    tracker.log({"step": 5, "eval/active_s": [0.1, 0.3], "eval/empty": []})
    tracker.close(exit_code=4)
    (run,) = wandb.runs
    assert run.records == [
        {"step": 5, "train/loss": 1.5},
        {"step": 5, "eval/active_s": pytest.approx(0.2)},
    ]
    assert run.metrics == [("*", "step")]
    assert run.exit_code == 4
    assert warnings(capsys) == []


def test_a_run_carries_its_name_project_and_whole_config(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = fake(monkeypatch)
    started()
    options = wandb.runs[0].options
    assert options["name"] == "run_20251108_143022"
    assert options["project"] == "dragons"
    assert options["config"] == CONFIG.to_dict()
    assert options["dir"] == Path("runs")
    named = {"wandb_log": True, "wandb_run_name": "mine"}
    started(Config.from_dict({"logging": named}))
    assert wandb.runs[1].options["name"] == "mine"


def test_a_resumed_run_keeps_its_id_and_new_runs_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = fake(monkeypatch)
    first, other = started(), started()
    again = started(run_id=first.run_id)
    assert first.run_id == again.run_id != other.run_id
    assert [run.options["id"] for run in wandb.runs] == [
        first.run_id,
        other.run_id,
        first.run_id,
    ]
    assert {run.options["resume"] for run in wandb.runs} == {"allow"}


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"key": False}, "no API key found"),
        ({"breaks": "network"}, "no such host"),
        ({"mode": "offline"}, "offline"),
    ],
)
def test_without_key_or_network_records_wait_on_the_disk(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behaviour: dict[str, Any],
    reason: str,
) -> None:
    wandb = fake(monkeypatch, **behaviour)
    tracker = started()
    tracker.log({"step": 1})
    assert wandb.runs[0].records == [{"step": 1}]
    assert wandb.torn_down == (reason == "no such host")
    assert warnings(capsys) == [
        f"wandb: {reason}; to send the records later: wandb sync place/offline-run"
    ]


def test_whatever_fails_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for verb, reason in (
        ("init", "no such host"),
        ("define_metric", "define_metric broke"),
        ("log", "log broke"),
        ("finish", "finish broke"),
    ):
        fake(monkeypatch, breaks=verb)
        tracker = Wandb.start(CONFIG, "run", None, None)
        assert (tracker is None) == (verb in ("init", "define_metric"))
        if tracker is not None:
            for step in range(3):
                tracker.log({"step": step})
            tracker.close()
            tracker.close()
        assert warnings(capsys) == [f"wandb: {reason}; training goes on without it."]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("engine.monitor.tensorboard_tracker.find_spec", lambda name: None)
    assert Wandb.start(CONFIG, "run", None, None) is None
    assert TensorBoard.start(BOARD, lambda: None, 1) is None
    assert warnings(capsys) == [
        f"{name} is not installed; training goes on without it. Install: pip install {name}"
        for name in ("wandb", "tensorboard")
    ]
    assert Wandb.start(Config(), "run", None, None) is None  # neither asked for nor imported
    assert TensorBoard.start(Config(), lambda: tmp_path, 1) is None
    assert warnings(capsys) == [] and not list(tmp_path.iterdir())


OFFLINE = """
import sys
from pathlib import Path
from config import Config
from engine.monitor.wandb_tracker import Wandb
config = Config.from_dict({"logging": {"wandb_log": True}})
tracker = Wandb.start(config, "run", "a1b2c3", Path(sys.argv[1]))
for step in range(1, 5):
    tracker.log({"step": step, "train/loss": 1 / step, "eval/active_s": [0.5, 0.25]})
tracker.close()
"""


@pytest.mark.slow
def test_the_real_package_keeps_all_records_offline_and_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for folder, variables in (
        ("runs", {}),
        ("other", {"WANDB_DIR": os.fspath(tmp_path / "other")}),
    ):
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, os.fspath(tmp_path / "runs")],
            cwd=ROOT,
            env=os.environ | {"WANDB_MODE": "offline", **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        (kept,) = (tmp_path / folder).glob("wandb/offline-run-*-a1b2c3/run-a1b2c3.wandb")
        sync = f"to send the records later: wandb sync {kept.parent}"
        assert (done.stdout, done.stderr) == ("", f"wandb: offline; {sync}\n")
        content = kept.read_bytes()
        assert content.count(b"train/loss") >= 4
        assert b"0.375" in content  # the mean of the list


# TensorBoard.

BOARD = Config.from_dict({"logging": {"tensorboard": True}})


def board(folder: Path | None, first_step: int = 1) -> TensorBoard:
    tracker = TensorBoard.start(BOARD, lambda: folder, first_step)
    assert tracker is not None
    return tracker


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(os.fspath(folder / "tensorboard"))
    return read.Reload()


def scalars(folder: Path, key: str) -> dict[int, float]:
    return {event.step: event.value for event in events(folder).Scalars(key)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_same_names_steps_and_values_and_the_config(
    tiny: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    options = ["tensorboard=true", "sample_prompt=the", "sample_tokens=4"]
    assert run_here([*tiny, f"checkpoint_dir={tmp_path}", *options]) == 0
    run = only_run(tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for record in records for key in record} - {
        "step",
        "crc",
        *console.NOT_PLOTTED,
        "train/mfu",
    }
    tags = events(run).Tags()
    assert set(tags["scalars"]) == keys - {"eval/sample"}
    assert set(tags["tensors"]) == {"config/text_summary", "eval/sample/text_summary"}
    for key in keys - {"eval/sample"}:
        told = {r["step"]: r[key] for r in records if key in r}
        means = {s: fmean(v) if isinstance(v, list) else v for s, v in told.items()}
        assert scalars(run, key) == pytest.approx(means, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_resumed_run_makes_again_is_shown_once(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options = [f"checkpoint_dir={tmp_path}", "tensorboard=true"]
    assert run_here([*tiny, *options]) == 0
    run = only_run(tmp_path)
    again = [f"resume_from_checkpoint={run / 'checkpoint_20.pt'}", "learning_rate=1e-4"]
    assert run_here([*tiny, *options, *again]) == 0
    losses = [(event.step, event.value) for event in events(run).Scalars("train/loss")]
    assert [step for step, _ in losses] == [1, 5, 10, 15, 20, 25, 30]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record["train/loss"] for record in written if "train/loss" in record][-2:]
    assert [value for _, value in losses[-2:]] == pytest.approx(last, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sample_that_a_resumed_run_writes_again_is_there_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, last in ((1, 30), (21, 40)):
        tracker = board(tmp_path, first)
        for step in range(first, last + 1):
            text = {"eval/sample": f"from {first}"} if step % 10 == 0 else {}
            tracker.log({"step": step, "train/loss": 1 / step, **text})
        tracker.close()
        time.sleep(0.01)
    samples = events(tmp_path).Tensors("eval/sample/text_summary")
    told = [(event.step, event.tensor_proto.string_val[0].decode()) for event in samples]
    assert told == [(10, "from 1"), (20, "from 1"), (30, "from 21"), (40, "from 21")]
    assert [*scalars(tmp_path, "train/loss")] == [*range(1, 41)]


def test_the_files_that_wandb_keeps_of_a_run_without_checkpoint_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fake(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place" / "offline-run").mkdir(parents=True)
    started().report_files(unless=lambda: True)
    assert capsys.readouterr().out == ""
    started().report_files(unless=lambda: False)
    named = "No checkpoint was saved; wandb keeps its files of this run in place/offline-run\n"
    assert capsys.readouterr().out == named


def test_an_aborted_run_leaves_no_event_files(tmp_path: Path) -> None:
    tracker = board(None)
    tracker.log({"step": 1, "train/loss": 2.0})
    tracker.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_that_cannot_write_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where its folder belongs")
    tracker = board(tmp_path)
    for step in range(3):
        tracker.log({"step": step, "train/loss": 1.0})
    tracker.close()
    (line,) = warnings(capsys)
    assert line.startswith("tensorboard: ") and line.endswith("; training goes on without it.")
