"""Several processes: the same run as one, and an end for all of them when one is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    GlobalRank,
    ProcessFailure,
)
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError, DataError, DistributedConfig, SystemConfig
from engine.checkpoint.load import load_checkpoint
from engine.hardware.distributed import (
    World,
    enter_world,
    is_lost_peer,
    no_sync_until_last,
    wrap_ddp,
)
from engine.replay.replay import open_replay
from engine.replay.start import find_start
from engine.signals import StopRequest
from tests.conftest import ROOT
from tests.engine.forks import in_processes
from tests.runs import metrics, only_run, run_here, start_ranks, wait_for
from train import train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
CPU = torch.device("cpu")
COMMON = ["log_freq=1", "dropout=0", "compute_dtype=float32", "test_freq=8", "max_iters=16"]


def torchrun(processes: int, arguments: Iterable[str]) -> subprocess.Popen[str]:
    """`torchrun --standalone --nproc_per_node=N train.py ARGUMENTS` as a child."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={processes}", os.fspath(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes(count: int, arguments: Iterable[str]) -> str:
    """What `count` processes print that train together as torchrun would start them."""
    children = start_ranks(count, arguments)
    printed = [child.communicate()[0] for child in children]
    codes = [child.returncode for child in children]
    output = "".join(printed)
    assert codes == [0] * count, output
    return output


def numbers(run: Path, *names: str) -> list[list[float]]:
    return [[r[name] for r in metrics(run) if name in r] for name in names]


LOSSES = "train/loss", "train/grad_norm", "eval/train_loss", "eval/val_loss"


@pytest.mark.slow
def test_one_two_and_four_processes_make_the_same_run(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *COMMON, "tokens_per_step=512", "batch_size=2"]
    arguments += ["max_iters=8", "test_freq=4"]
    assert run_here([*arguments, f"checkpoint_dir={tmp_path / '1'}"]) == 0
    for count in (2, 4):
        processes(count, [*arguments, f"checkpoint_dir={tmp_path / str(count)}"])
    one, two, four = (only_run(tmp_path / name) for name in ("1", "2", "4"))
    for other in (two, four):
        for mine, theirs in zip(numbers(one, *LOSSES), numbers(other, *LOSSES), strict=True):
            assert len(mine) and theirs == pytest.approx(mine, abs=1e-5)
        states = [load_checkpoint(run / "checkpoint_8.pt") for run in (one, other)]
        assert states[0]["cursor"] == states[1]["cursor"]
        assert numbers(one, "train/batch_hash") == numbers(other, "train/batch_hash")


@pytest.mark.slow
def test_a_run_of_two_goes_on_with_one_and_equals_the_uninterrupted(
    tiny: list[str], tmp_path: Path
) -> None:
    arguments = [*tiny, *COMMON, "gradient_accumulation_steps=2", "checkpoint_freq=8"]
    whole = tmp_path / "whole"
    output = processes(2, [*arguments, f"checkpoint_dir={whole}"])
    assert output.count("Iter      1 ") == 1, "one process speaks"
    assert "x 2 processes" in output
    assert "4 sequences x 32 tokens x 2 accumulation x 2 processes = 512" in output
    run = only_run(whole)
    straight, hashes = numbers(run, *LOSSES), numbers(run, "train/batch_hash")
    saved = run / "checkpoint_8.pt"
    assert run_here([*arguments, f"checkpoint_dir={whole}", f"resume_from={saved}"]) == 0
    for mine, theirs in zip(straight, numbers(run, *LOSSES), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)
    assert numbers(run, "train/batch_hash") == hashes
    start = find_start(run, 4)  # of two processes, unlike those after it
    assert start.config.training.tokens_per_step and start.checkpoint is None
    with open_replay(start, StopRequest(), train) as replay:
        replay.advance_to(4)
    records = {r["step"]: r for r in metrics(run) if "train/loss" in r}
    for record in replay.logged_after(records.keys()):
        if record["step"] in records:
            own = records[record["step"]]
            assert record["train/batch_hash"] == own["train/batch_hash"]
            assert record["train/loss"] == pytest.approx(own["train/loss"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_process_ends_the_whole_run_soon(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, "log_freq=1", f"checkpoint_dir={tmp_path / 'runs'}"]
    first, second = start_ranks(2, [*arguments, "max_iters=100000"])
    try:
        wait_for(first, "Saved checkpoint")
        second.kill()
        began = time.monotonic()
        output, _ = first.communicate()
        assert time.monotonic() - began < 28  # torchrun kills what is left after 30 s
        assert first.returncode == 1
        assert "Another rank exited; shutting down." in output and "Traceback" not in output
    finally:
        first.kill()
        second.kill()
        second.communicate()
    run = only_run(tmp_path / "runs")
    newest = max(int(path.stem.split("_")[1]) for path in run.glob("checkpoint_*.json"))
    assert run_here([*arguments, f"max_iters={newest + 2}", f"resume_from={run}"]) == 0


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_two_processes_resume(
    tiny: list[str], tmp_path: Path
) -> None:
    arguments = [*tiny, "dropout=0.1", "log_freq=1", f"checkpoint_dir={tmp_path / 'runs'}"]
    child = torchrun(2, [*arguments, "max_iters=100000", "checkpoint_freq=null"])
    wait_for(child, "Iter      5")
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate()
    assert child.returncode != 0
    assert "Stopped by SIGTERM at step" in output, output
    assert "torchrun reports the stop as a failure below; the checkpoint is complete" in output
    run = only_run(tmp_path / "runs")
    (saved,) = run.glob("checkpoint_*.pt")
    assert len(load_checkpoint(saved)["rng"]) == 2
    step = int(saved.stem.split("_")[1])
    more = [f"max_iters={step + 3}", f"resume_from={run}", "test_freq=null"]
    output = processes(2, [*arguments, *more])
    assert f"Starting training from iteration {step}..." in output
    assert numbers(run, "train/loss")[0][-1] < 6


def test_torchrun_closes_with_the_cause_of_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config error, which ends a process before torch is imported, and of a data error."""
    for word, cause in {"batch_sise=8": "batch_size", f"parquet_dir={tmp_path}": "parquet"}.items():
        report = tmp_path / f"{cause}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.fspath(report))
        with contextlib.suppress(SystemExit):
            run_here([word, "device=cpu"])
        failure = ProcessFailure(0, 1, 2, os.fspath(report))
        closing = str(ChildFailedError("train.py", {GlobalRank(0): failure}))
        last = closing.partition("traceback : ")[2]
        assert cause in last and len(last.splitlines()) <= 4, closing


def test_a_rank_waits_for_rank_0_to_print_the_error_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = list[float]()
    monkeypatch.setattr("settings.torchrun.time.sleep", waited.append)
    for word in ("batch_sise=8", "resume_from_checkpoint=nowhere"):  # without torch, and with it
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with contextlib.suppress(SystemExit):
                run_here([word, "device=cpu"])
            printed = capsys.readouterr().err != ""
            assert (printed, waited) == ((True, []) if rank == "0" else (False, [1.0]))
        waited.clear()


@pytest.mark.slow
def test_epochs_end_for_all_processes_at_once(tmp_path: Path) -> None:
    (np.arange(2000) % 256).astype(np.uint16).tofile(tmp_path / "train.bin")
    words = ["model.name=gpt", "n_layer=1", "n_head=2", "n_embd=8", "block_size=32", "batch_size=2"]
    words += [f"train_data_path={tmp_path / 'train.bin'}", "vocab_size=256", "device=cpu"]
    words += ["test_freq=null", "test_fraction=0", "epochs=1", "token_dtype=uint16"]
    words += [f"checkpoint_dir={tmp_path / 'runs'}"]
    output = processes(2, [*words, "log_freq=1"])  # 61 rows, not the same for both
    assert "Finished: " in output
    assert list(only_run(tmp_path / "runs").glob("checkpoint_*.json"))


def test_what_a_launcher_sets_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    number = "{}={!r} is not a whole number {}"
    cases: list[tuple[str, str | None, str]] = [
        ("RANK", None, "RANK.* is not set.*torchrun --standalone --nproc_per_node=2"),
        ("WORLD_SIZE", "abc", "from 1 to"),
        ("WORLD_SIZE", "0", "from 1 to"),
        ("RANK", "-1", "from 0 to 1"),
        ("RANK", "2", "from 0 to 1"),
        ("LOCAL_RANK", "", "from 0 to 1"),
        ("MASTER_PORT", "http", "from 0 to 65535"),
    ]
    good = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value, message in cases:
        for key, text in (good | {"MASTER_ADDR": "localhost"}).items():
            monkeypatch.setenv(key, text)
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
            message = number.format(name, value, message)
        with pytest.raises(ConfigError, match=message):
            enter_world(SystemConfig(device="cpu"), DistributedConfig()).__enter__()
    for key, text in good.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ConfigError, match="distributed.backend=nccl needs CUDA"):
        enter_world(SystemConfig(device="cpu"), DistributedConfig(backend="nccl")).__enter__()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_exchanged_on_the_last_micro_step_only(group: None) -> None:
    calls: list[int] = []

    def counted(state: object, bucket: Any) -> Any:
        calls.append(1)
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    counted.__annotations__.clear()  # DDP wants its own or none
    model = nn.Linear(3, 2)
    shared = wrap_ddp(model, World(0, 2, CPU))
    assert isinstance(shared, DistributedDataParallel)
    shared.register_comm_hook(None, counted)
    exchanged = []
    for last in (False, False, True):
        with no_sync_until_last(shared, last):
            shared(torch.ones(1, 3)).sum().backward()
        exchanged.append(len(calls))
    assert exchanged == [0, 0, 1]
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((2, 3), 3.0))


@pytest.mark.slow
def test_what_one_process_wants_all_do_after_the_same_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process that says when it is time to save, and that it was asked to stop."""
    steps: list[int] = []

    def with_another(self: World, own: Sequence[int]) -> list[list[int]]:
        if len(own) == 1:  # the memory that a copy of the state needs
            return [list(own)]
        steps.append(len(steps) + 1)
        goes_on, targets, rows_hash, epoch, _, written = own
        other = [steps[-1] < 6, targets, rows_hash, epoch + 1, steps[-1] == 4, written]
        return [list(own), other]

    monkeypatch.setattr(World, "all_gather", with_another)
    words = ["checkpoint_freq=null", "test_freq=null", f"checkpoint_dir={tmp_path}"]
    assert run_here([*tiny, *words]) == 143  # as after SIGTERM
    run = only_run(tmp_path)
    assert sorted(int(path.stem.split("_")[1]) for path in run.glob("*.pt")) == [4, 5]
    assert load_checkpoint(run / "checkpoint_5.pt")["train"]["epoch"] == 0


def test_errors_of_every_backend_tell_that_a_peer_is_lost(group: None) -> None:
    words = [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
        "NCCL error: remote process exited or there was a network error",
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0]",
    ]
    assert all(is_lost_peer(RuntimeError(each)) for each in words)
    assert is_lost_peer(dist.DistNetworkError("failed to recv, got 0 bytes"))
    assert not is_lost_peer(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_alone_a_world_gives_back_what_it_gets() -> None:
    world = World(0, 1, CPU)
    assert world.is_main and world.all_gather([2, 3]) == [[2, 3]] and world.any_rank(True)
    assert world.broadcast([1]) == [1] and world.gather("a") == ["a"]
    model = nn.Linear(2, 2)
    assert wrap_ddp(model, world) is model


def asked_on_rank_0(fails: bool) -> str:
    """What every process gets from work of rank 0, which may fail."""

    def work() -> str:
        assert dist.get_rank() == 0
        if fails:
            raise DataError("s3://bucket/text: not found")
        return "the listing"

    with enter_world(SystemConfig(device="cpu"), DistributedConfig()) as world:
        try:
            return world.on_main(work)
        except DataError as error:
            return f"{type(error).__name__} {error} {error.on_all_ranks}"


@pytest.mark.slow
def test_all_ranks_get_what_rank_0_found_out_or_its_error() -> None:
    assert in_processes(2, partial(asked_on_rank_0, False)) == ["the listing"] * 2
    told = "DataError s3://bucket/text: not found True"
    assert in_processes(2, partial(asked_on_rank_0, True)) == [told] * 2
