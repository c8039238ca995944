"""Saves behind training: what they hold, what a fault in them does, and a file that does not know
how many processes wrote it."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import train
from config import DistributedConfig, NonFiniteError, SystemConfig, WriteError
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.snapshot import SnapshotTaker
from engine.checkpoint.stream import PendingStorage, PendingTensor, write_tree
from engine.hardware.distributed import World, enter_world
from engine.hardware.memory import allocated_bytes, peak_memory_bytes
from engine.run_directory.directory import RunDirectory
from engine.run_directory.manifest import data_path, steps_in, verify
from engine.saving import CheckpointSaver
from engine.train_state import TrainState
from files.atomic import atomic_write
from tests.engine.forks import in_processes
from tests.engine.states import make_config, make_state
from tests.runs import assert_same_run, only_run, run_here, start, wait_for

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
KILLS = int(os.environ.get("KILLS", "3"))
"""How often runs are killed while they save; 50 for a release."""


# ---- the file


def test_a_streamed_file_is_that_of_torch_save(tmp_path: Path) -> None:
    tied = torch.randn(5, 7)
    layer = torch.nn.Linear(3, 2)
    tree = {
        **make_state(5),
        "model": layer.state_dict(),  # with what torch notes on it
        "tied": [tied, tied.t(), tied[1:]],
        "kinds": (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(2, 3).bfloat16()),
        "small": [torch.ones(0), torch.tensor(3)],
    }
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(tree, tmp_path / "archive")  # its name is inside
    torch.serialization.set_crc32_options(crc)
    atomic_write(tmp_path / "ours", lambda out: write_tree(tree, out))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "archive").read_bytes()


def test_pending_tensors_are_fetched_in_turn_and_tied_ones_once(tmp_path: Path) -> None:
    whole, fetched = {"a": torch.randn(4, 3), "b": torch.randn(9).bfloat16()}, []

    def pending(name: str) -> PendingTensor:
        def fetch() -> Tensor:
            fetched.append(name)
            return whole[name]

        return PendingTensor(
            whole[name].shape, PendingStorage(whole[name].dtype, whole[name].numel(), fetch)
        )

    a = pending("a")
    tree = {"a": a, "tied": PendingTensor(a.shape, a.storage), "b": pending("b")}
    atomic_write(tmp_path / "file", lambda out: write_tree(tree, out))
    found = torch.load(tmp_path / "file", weights_only=True, mmap=True)
    assert fetched == ["a", "b"]
    assert torch.equal(found["a"], whole["a"]) and torch.equal(found["b"], whole["b"])
    assert found["tied"].data_ptr() == found["a"].data_ptr()


# ---- behind training


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds fsync of files until the event is set."""
    go, fsync = threading.Event(), os.fsync

    def held(descriptor: int) -> None:
        assert go.wait(30)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", held)
        yield go


@contextmanager
def open_saver(folder: Path, **training: Any) -> Iterator[CheckpointSaver]:
    config = make_config(folder, **training)
    with RunDirectory.start(config) as run:
        run.prepare()
        saver = CheckpointSaver(config, ALONE, run)
        yield saver
        saver.close()


def test_training_goes_on_and_the_file_holds_the_step_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(5)
    with open_saver(tmp_path) as saver:
        with slow_disk(monkeypatch) as disk:
            saver.start(TrainState(step=5), lambda: state)
            state["model"]["w"].fill_(6)
            state["train"]["step"] = 6
            time.sleep(0.05)
            assert not saver.is_written and saver.saved_step == 0
            assert saver.directory.last_checkpoint is None
            disk.set()
            assert saver.finish()
        path = saver.directory.last_checkpoint
        assert path is not None and saver.saved_step == 5
        saved = load_checkpoint(path)
        assert saved["train"]["step"] == 5
        assert torch.equal(saved["model"]["w"], torch.full((600,), 5.0))


def test_copies_use_the_memory_of_the_ones_before() -> None:
    taker, places = SnapshotTaker(ALONE), set()
    for step in (1, 2, 3):
        snapshot, copied = taker.take(make_state(step))
        weights = snapshot.state["model"]["w"]
        assert copied and bool((weights == step).all())
        places.add(weights.data_ptr())
    assert len(places) == 1


def test_without_memory_for_a_copy_training_waits_and_a_line_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.checkpoint.snapshot.free_bytes", lambda _: 1000)
    with open_saver(tmp_path) as saver:
        for step in (5, 6):
            saver.start(TrainState(step=step), lambda step=step: make_state(step))  # type: ignore[misc]
            assert saver.is_written and saver.finish()
            assert verify(data_path(saver.directory.prepare(), step)).step == step
    assert capsys.readouterr().err.count("training waits while a checkpoint is written") == 1


def test_training_waits_where_the_system_refuses_the_memory_of_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pinned memory and limits of containers are known by trying alone; no run may end of it."""

    def refused(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    state = make_state(5)
    with open_saver(tmp_path) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", refused)
            snapshot, copied = saver._snapshots.take(state)
        assert not copied and snapshot.state["model"]["w"] is state["model"]["w"]
        assert saver._snapshots.take(state)[1]
    assert "training waits while a checkpoint is written" in capsys.readouterr().err


def test_weights_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    state = make_state(7)
    state["model"]["w"][3] = float("nan")
    with open_saver(tmp_path) as saver:
        saver.start(TrainState(step=7), lambda: state)
        with pytest.raises(NonFiniteError, match="w has 1 NaN or infinite values at step 7"):
            saver.finish()
        assert steps_in(saver.directory.prepare(), "pt") == []


def test_two_failures_are_told_and_the_third_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_saver(tmp_path) as saver:

        def save(step: int, final: bool = False) -> bool:
            saver.start(TrainState(step=step), lambda: make_state(step))
            return saver.finish(final)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert not save(1) and not save(2)
        assert save(3)  # the disk was emptied
        monkeypatch.setattr(os, "write", full)
        assert not save(4) and not save(5)
        with pytest.raises(WriteError, match="checkpoint needs .* kept checkpoint_3.pt"):
            save(6)
        with pytest.raises(WriteError):
            save(7, final=True)
        assert steps_in(saver.directory.prepare(), "pt") == [3]
        monkeypatch.undo()
    assert capsys.readouterr().err.count("Training goes on; the next checkpoint will try") == 4


def test_a_run_that_fails_waits_for_the_save_under_way_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_saver(tmp_path) as saver, slow_disk(monkeypatch) as disk:
        saver.start(TrainState(step=5), lambda: make_state(5))
        threading.Timer(0.05, disk.set).start()
        saver.close()
        path = saver.directory.last_checkpoint
        assert path is not None and verify(path).step == 5
    assert capsys.readouterr().out == f"Saved checkpoint to {path}\n"


@pytest.mark.slow
def test_a_second_save_waits_and_what_failed_is_told_at_the_next_step(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fsync, failed = os.fsync, []

    def slow(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("checkpoint_4.pt"):
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.04)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    runs = ["log_freq=1", "test_freq=null", "checkpoint_freq=2", "max_iters=9"]
    assert run_here([*tiny, *runs, f"checkpoint_dir={tmp_path}"]) == 0
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert failed and "Input/output error" in captured.err
    assert captured.err.count("Training goes on") == 1
    assert steps_in(only_run(tmp_path)) == [2, 6, 8, 9]
    told = [line for line in captured.out.splitlines() if line.startswith(("Iter ", "Saved"))]
    saved = [line for line in told if line.startswith("Saved")]
    assert [line.split("_")[-1] for line in saved] == ["2.pt", "6.pt", "8.pt", "9.pt"]
    # Told at a later step than the one it was due at, and no later than the next save.
    for number, steps in ((2, range(3, 5)), (6, range(7, 9))):
        before = told[: told.index(saved[0 if number == 2 else 1])]
        assert sum(line.startswith("Iter ") for line in before) in steps


@pytest.mark.slow
def test_a_resumed_run_keeps_nothing_of_its_file_mapped(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, "test_freq=null", f"checkpoint_dir={tmp_path}"]
    assert run_here([*words, "max_iters=4"]) == 0
    mapped: list[str] = []

    def look(*arguments: Any) -> None:
        mapped.append(Path("/proc/self/maps").read_text())
        loop(*arguments)

    loop = train.train
    monkeypatch.setattr(train, "train", look)
    resumed = f"resume_from_checkpoint={only_run(tmp_path)}"
    assert run_here([*words, "max_iters=6", "lr_decay_iters=4", resumed]) == 0
    assert "checkpoint_4.pt" not in mapped[0] and len(mapped) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_save(tiny: list[str], tmp_path: Path) -> None:
    fsync = os.fsync

    def stuck_disk() -> None:
        def stuck(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".pt"):
                time.sleep(60)
            fsync(descriptor)

        setattr(os, "fsync", stuck)  # noqa: B010  # in a child that ends

    words = ["log_freq=1", "test_freq=null", "checkpoint_freq=2", "max_iters=9999"]
    child = start([*tiny, *words, f"checkpoint_dir={tmp_path}"], stuck_disk)
    wait_for(child, "Iter      3")  # the next save waits for the one of step 2
    child.send_signal(signal.SIGINT)
    wait_for(child, "SIGINT: finishing the step and saving")
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate()
    assert child.returncode == 130 and "Second Ctrl-C" in output
    assert steps_in(only_run(tmp_path)) == []


@pytest.mark.slow
def test_runs_killed_while_they_save_lose_no_older_checkpoint_and_end_like_one_never_killed(
    tiny: list[str], tmp_path: Path
) -> None:
    """Set KILLS=50 in the environment for more of them."""
    words = [*tiny, "log_freq=1", "test_freq=7", "checkpoint_freq=3", "max_iters=40"]
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'whole'}"]) == 0
    whole, fsync, draw = only_run(tmp_path / "whole"), os.fsync, random.Random(1)

    def slow_disk() -> None:  # a save takes as long as some steps: most kills hit one
        def slow(descriptor: int) -> None:
            time.sleep(0.02)
            fsync(descriptor)

        setattr(os, "fsync", slow)  # noqa: B010  # in a child that ends

    kills, during, number, kept = 0, 0, 0, set[int]()
    while True:
        folder = tmp_path / f"killed_{number}"
        auto = "resume_from_checkpoint=auto"
        child = start([*words, f"checkpoint_dir={folder}", auto], slow_disk)
        if killing := kills < KILLS:
            wait_for(child, "Saved checkpoint")
            time.sleep(draw.random() * 0.25)
            child.kill()
            kills += 1
        output = child.communicate()[0]
        run = only_run(folder)
        steps = set(steps_in(run))
        assert kept <= steps, output
        for step in steps:
            verify(data_path(run, step))
        during += bool(list(run.glob(".tmp-*"))) or steps != set(steps_in(run, "pt"))
        kept = steps
        if 40 in steps:
            assert_same_run(run, whole, 40)
            number, kept = number + 1, set()
        if not killing:
            assert child.returncode == 0 and not kept, output
            break
    print(f"{kills} kills, {during} while a file was written; {number} runs, all the same")


# ---- several processes


def sharded_state(world: World, plain: dict[str, Any]) -> dict[str, Any]:
    """A plain state with tensors that are sharded evenly, unevenly, in another dimension and within
    replicas; with one process they are whole."""
    torch.manual_seed(0)

    def sharded(tensor: Tensor, dim: int, replicas: int = 1) -> Tensor:
        if world.size == 1:
            return tensor
        mesh = init_device_mesh("cpu", (replicas, world.size // replicas))
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(dim)])

    tied = sharded(torch.randn(5, 8), 0)
    model = OrderedDict(
        tied=tied,
        wide=sharded(torch.randn(3, 8).bfloat16(), 1),
        fewer_than_processes=sharded(torch.randn(1), 0),
        replicated=sharded(torch.randn(8, 3), 0, replicas=max(1, world.size // 2)),
        head=tied.detach(),
        norm=torch.ones(3),
    )
    moments = {0: {"step": torch.tensor(1.0), "exp_avg": sharded(torch.randn(5, 8), 0)}}
    optimizer = {"state": moments, "param_groups": [{"params": [0]}]}
    return plain | {"model": model, "optimizer": optimizer}


def save_sharded(folder: Path, plain: dict[str, Any]) -> str:
    """Saves the sharded state as a process of its launcher; returns the sha256 of the file."""
    with enter_world(SystemConfig(device="cpu"), DistributedConfig()) as world:
        state, config = sharded_state(world, plain), make_config(folder)
        run = RunDirectory(config, [])
        saver = CheckpointSaver(config, world, run)
        saver.start(TrainState(step=5), lambda: state)
        for tensor in state["model"].values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        world.any_rank(False)  # training goes on, on a group of its own
        assert saver.finish()
        assert run.last_checkpoint is not None  # on every process
        return verify(run.last_checkpoint).sha256


@pytest.mark.slow
def test_the_file_does_not_know_how_many_processes_wrote_it(tmp_path: Path) -> None:
    plain = make_state(5)
    digests = {save_sharded(tmp_path / "1", plain)}
    for count in (2, 3, 4):
        digests |= set(in_processes(count, partial(save_sharded, tmp_path / str(count), plain)))
    assert len(digests) == 1
    path = data_path(only_run(tmp_path / "1" / "checkpoints"), 5)
    model = load_checkpoint(path)["model"]
    assert model["head"].data_ptr() == model["tied"].data_ptr() and bool(model["wide"].any())


def peak_of_a_sharded_save(folder: Path) -> str:
    """Returns by how many MB the memory of this process grew at most, of 2, for 64 MB."""
    with enter_world(SystemConfig(device="cpu"), DistributedConfig()) as world:
        mesh = init_device_mesh("cpu", (2,))
        shards = {f"w{n}": torch.ones(1_000_000) for n in range(8)}
        model = {name: DTensor.from_local(w, mesh, [Shard(0)]) for name, w in shards.items()}
        state = make_state(5) | {"model": model}
        config = make_config(folder)
        saver = CheckpointSaver(config, world, RunDirectory(config, []))
        before = allocated_bytes(CPU)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        saver.start(TrainState(step=5), lambda: state)
        assert saver.finish()
        return str((peak_memory_bytes(CPU) - before) // 1_000_000)


def fails_on_a_full_disk(folder: Path) -> str:
    """Fails to save once, then saves; returns what two processes were told."""
    with enter_world(SystemConfig(device="cpu"), DistributedConfig()) as world:
        state, config = sharded_state(world, make_state(5)), make_config(folder)
        run = RunDirectory(config, [])
        saver = CheckpointSaver(config, world, run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
            saver.start(TrainState(step=5), lambda: state)
            told: list[object] = [saver.finish(), run.last_checkpoint]
        saver.start(TrainState(step=5), lambda: state)
        told.append(saver.finish())
        if world.is_main:
            state["model"]["tied"].to_local().fill_(float("nan"))
        saver.start(TrainState(step=6), lambda: state | {"train": state["train"] | {"step": 6}})
        try:
            saver.finish()
        except NonFiniteError as error:
            told.append(str(error)[:30])
        return str(told)


@pytest.mark.slow
def test_of_a_sharded_model_the_main_process_holds_one_tensor_whole(tmp_path: Path) -> None:
    main, other = in_processes(2, lambda: peak_of_a_sharded_save(tmp_path))
    # Its copy, 32 MB, and a tensor of 8 MB, perhaps two; 64 MB and more if it gathered all.
    assert int(main) < 32 + 2 * 8 + 10 and int(other) < 32 + 10, (main, other)


@pytest.mark.slow
def test_a_failed_save_of_a_sharded_model_ends_on_all_processes_alike(tmp_path: Path) -> None:
    told = "[False, None, True, 'tied has 24 NaN or infinite va']"
    assert in_processes(2, lambda: fails_on_a_full_disk(tmp_path)) == [told, told]
