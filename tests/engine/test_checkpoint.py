"""Checkpoints: whole or refused, for every fault we can inject, and safe to open."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import CheckpointError, Config, NonFiniteError, WriteError
from engine.checkpoint.contents import check_finite, check_plain, tensor_bytes
from engine.checkpoint.find import resolve_resume
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.retention import prune_checkpoints
from engine.checkpoint.save import save_checkpoint
from engine.checkpoint.trained_model import load_model
from engine.run_directory.directory import RunDirectory
from engine.run_directory.find_checkpoint import newest_valid
from engine.run_directory.manifest import (
    Manifest,
    data_path,
    manifest_path,
    read_manifest,
    render,
    steps_in,
    verify,
)
from tests.engine.faults import die, failing, raise_error
from tests.engine.forks import in_child
from tests.engine.states import finished_run, make_config, make_state, new_run, reopen, save_steps
from tests.runs import assert_equal


def newest(folder: Path) -> int | None:
    resume, _ = newest_valid(folder)
    return resume.step if resume else None


def resolve(value: Path | str, folder: Path) -> Any:
    return resolve_resume(str(value), folder / "checkpoints", lambda _: [])


# ---- save and load


def test_a_checkpoint_comes_back_equal(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        path = save_checkpoint(run, make_state(5, val_loss=2.5), 3)
    content = load_checkpoint(path)
    assert content.pop("format") == 3
    assert_equal(content, make_state(5, val_loss=2.5), "checkpoint")
    manifest = verify(path)
    assert (manifest.step, manifest.tokens, manifest.val_loss) == (5, 40, 2.5)
    assert manifest.fingerprint == "f00d"
    assert manifest.size == path.stat().st_size


def test_a_file_of_torch_loads_in_any_torch_program(tmp_path: Path) -> None:
    path = data_path(finished_run(tmp_path, 5), 5)
    assert torch.load(path, weights_only=True)["model"]["steps"] == 5
    assert torch.load(path, weights_only=True, mmap=True)["model"]["steps"] == 5
    assert torch.serialization.get_crc32_options()  # off for our files alone


def test_losses_of_another_step_are_not_in_the_manifest(tmp_path: Path) -> None:
    state = make_state(5, val_loss=2.5)
    state["train"]["evaluated_step"] = 4
    with new_run(tmp_path) as run:
        assert verify(save_checkpoint(run, state, 3)).val_loss is None


def test_a_step_is_saved_once_unless_it_is_damaged(tmp_path: Path) -> None:
    with new_run(tmp_path, 5) as run:
        path = data_path(run.prepare(), 5)
        before = path.stat().st_ino
        assert save_checkpoint(run, make_state(5), 3) == path
        assert path.stat().st_ino == before
        path.write_bytes(b"damaged")
        save_checkpoint(run, make_state(5), 3)
        verify(path)


def test_a_step_saved_again_after_its_evaluation_is_not_lost_by_a_full_disk(tmp_path: Path) -> None:
    with new_run(tmp_path, 5) as run:
        path = data_path(run.prepare(), 5)
        for call in ("write", "fsync"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(WriteError):
                patch.setattr(os, call, lambda *_: raise_error(errno.ENOSPC)())
                save_checkpoint(run, make_state(5, val_loss=2.5), 3)
            assert verify(path).val_loss is None
        save_checkpoint(run, make_state(5, val_loss=2.5), 3)
        assert verify(path).val_loss == 2.5


def test_data_is_durable_before_its_manifest_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, move = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"fsync {name.removeprefix(f'.tmp-{os.getpid()}-')}")
        fsync(descriptor)

    def logged_move(source: Path, target: Path) -> None:
        calls.append(f"rename {target.name}")
        move(source, target)

    with new_run(tmp_path, 1) as run:
        folder = run.prepare().name
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_move)
        save_checkpoint(run, make_state(5), 3)
        monkeypatch.undo()
    assert calls == [
        "fsync metrics.jsonl",
        "fsync checkpoint_5.pt",
        "rename checkpoint_5.pt",
        f"fsync {folder}",
        "fsync checkpoint_5.json",
        "rename checkpoint_5.json",
        f"fsync {folder}",
    ]


# ---- what may be inside


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"optimizer": {"state": {0: {"step": np.float64(1)}}}},
            "optimizer.state.0.step is numpy.",
        ),
        ({"rng": [1, Path("x")]}, "checkpoint.rng.1 is pathlib."),
        ({"config": {1.5: 0}}, "checkpoint.config has a key of type float: 1.5"),
        ({"model": {"w": torch.nn.Parameter(torch.ones(1))}}, "model.w is torch.nn.parameter."),
        ({"rng": {"numpy": {1, 2}}}, "checkpoint.rng.numpy is set"),
    ],
)
def test_only_tensors_and_plain_values_are_saved(change: dict[str, Any], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check_plain(make_state(1) | change)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = make_state(7)
    state["model"]["w"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with new_run(tmp_path) as run:
        with pytest.raises(NonFiniteError, match=r"^w has 3 NaN or infinite values at step 7"):
            save_checkpoint(run, state, 3)
        assert run.path is None
    assert not (tmp_path / "checkpoints").exists()


def test_largest_finite_weights_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
        check_finite({"w": largest, "i": torch.ones(2).int(), "empty": torch.ones(0)}, 1)
    check_finite({}, 1)


def test_shared_storage_is_counted_once() -> None:
    shared = torch.ones(1000)
    assert tensor_bytes({"a": shared, "b": [shared[:10]], "c": torch.ones(10)}) == 4040


# ---- damage


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_flipped_bit_and_a_cut_are_always_noticed(tmp_path: Path, suffix: str) -> None:
    folder = finished_run(tmp_path, 10, 20)
    victim = data_path(folder, 20).with_suffix(suffix)
    whole, draw = victim.read_bytes(), random.Random(1)
    damages = [flipped(whole, draw.randrange(len(whole)), draw.randrange(8)) for _ in range(100)]
    lengths = {*draw.sample(range(len(whole)), 100), 0, len(whole) - 1}
    for damaged in [*damages, *(whole[:length] for length in lengths)]:
        victim.write_bytes(damaged)
        resume, rejects = newest_valid(folder)
        assert resume is not None
        assert resume.step == 10
        assert len(rejects) == 1
        assert rejects[0].startswith("checkpoint_20.pt")
    victim.write_bytes(whole)
    assert newest(folder) == 20


@pytest.mark.slow
def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = data_path(finished_run(tmp_path, 10), 10)
    raw = manifest_path(path).read_bytes()
    for place in range(len(raw)):
        manifest_path(path).write_bytes(flipped(raw, place, place % 8))
        with pytest.raises(CheckpointError):
            read_manifest(path)


def manifest_with(path: Path, **changes: Any) -> None:
    manifest_path(path).write_text(render(replace(read_manifest(path), **changes)))


def test_reasons_are_named(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 1, 2, 3, 4, 5, 6)
    one, two, three, four, five, six = (data_path(folder, step) for step in range(1, 7))
    one.write_bytes(flipped(one.read_bytes(), 1000, 0))
    two.write_bytes(b"short")
    manifest_path(three).unlink()
    manifest_path(four).write_text("{}")
    manifest_with(five, format=2)
    six.unlink()
    _, rejects = newest_valid(folder)
    text = "\n".join(rejects)
    assert "checkpoint_6.pt: not found; run has 1, 2, 4, 5, 6." in text
    assert "checkpoint_5.pt: format 2; this version reads 3." in text
    assert "checkpoint_4.pt: its manifest checkpoint_4.json is damaged." in text
    assert "checkpoint_3.pt was not completed (no manifest checkpoint_3.json)." in text
    assert "checkpoint_2.pt: size differs (manifest " in text
    assert "file 5 bytes)." in text
    assert "checkpoint_1.pt: sha256 mismatch (manifest " in text


def test_files_put_in_place_of_each_other_are_noticed(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20)
    shutil.copy(data_path(folder, 10), data_path(folder, 20))
    assert newest(folder) == 10
    shutil.copy(manifest_path(data_path(folder, 10)), manifest_path(data_path(folder, 20)))
    with pytest.raises(CheckpointError, match="its manifest is that of step 10"):
        verify(data_path(folder, 20))


def test_a_strange_manifest_is_damaged(tmp_path: Path) -> None:
    path = data_path(finished_run(tmp_path, 10), 10)
    for text in ("[]", "null", "{", "[" * 10_000, '{"checksum": 1}', "\ud800"):
        manifest_path(path).write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(CheckpointError, match="damaged"):
            verify(path)


# ---- faults while saving


def check_after_fault(folder: Path, last: int) -> None:
    """The newest valid one loads, and what was valid before still is."""
    resume, _ = newest_valid(folder)
    assert resume is not None
    assert resume.step in (last, last + 10)
    assert load_checkpoint(resume.path)["model"]["steps"] == resume.step
    verify(data_path(folder, last))
    if resume.step == last:
        verify(data_path(folder, last - 10))


def sweep(folder: Path, attempt: Callable[[int], bool], every: int = 1) -> None:
    """Fails the n-th call for n = 1, 1 + every, ... until the attempt has no n-th call any more."""
    for at in range(1, 300, every):
        if not attempt(at):
            assert at > 10
            return
    pytest.fail(f"the sweep in {folder} did not end")


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_error_at_any_call_of_a_save_loses_nothing(tmp_path: Path, code: int) -> None:
    with new_run(tmp_path, 10, 20) as run:
        folder, last = run.prepare(), 20

        def attempt(at: int) -> bool:
            nonlocal last
            with failing(at, raise_error(code)) as faults:
                try:
                    save_checkpoint(run, make_state(last + 10), 2)
                except WriteError as error:
                    assert error.exit_code == 5
            assert not list(folder.glob(".tmp-*"))
            check_after_fault(folder, last)
            save_checkpoint(run, make_state(last + 10), 2)
            last += 10
            assert steps_in(folder) == steps_in(folder, "pt") == [last - 10, last]
            return faults.reached

        # All calls with one error; the others differ in the message alone.
        sweep(folder, attempt, every=1 if code == errno.EIO else 4)


@pytest.mark.slow
def test_death_at_any_call_of_a_save_loses_nothing(tmp_path: Path) -> None:
    last = 20
    finished_run(tmp_path, 10, 20)
    (folder,) = (tmp_path / "checkpoints").iterdir()

    def attempt(at: int) -> bool:
        nonlocal last

        def save() -> str:
            run = reopen(folder, tmp_path)
            with failing(at, die):
                save_checkpoint(run, make_state(last + 10), 2)
            return "saved"

        status, text = in_child(save)
        assert (status, text) in ((9, ""), (0, "saved"))
        check_after_fault(folder, last)
        with reopen(folder, tmp_path) as run:
            assert not list(folder.glob(".tmp-*"))
            assert steps_in(folder) == steps_in(folder, "pt")
            save_steps(run, last + 10, keep_last=2)
        last += 10
        return status != 0

    sweep(folder, attempt)


def test_a_limited_file_size_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    with new_run(tmp_path, 10) as run:
        folder = run.prepare()
        before = sorted(os.listdir(folder))

        def save() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                save_checkpoint(run, make_state(20, numbers=30_000), 3)
            except WriteError as error:
                return f"{error.exit_code} {error}"
            return "saved"

        status, text = in_child(save)
        assert status == 0
        assert text.startswith(f"5 cannot write {folder / 'checkpoint_20.pt'}: File too large; ")
        assert text.endswith("kept checkpoint_10.pt. Raise the file size limit (ulimit -f).")
        assert sorted(os.listdir(folder)) == before
        assert newest(folder) == 10


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_run(tmp_path, 10) as run:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300_000}))
        with pytest.raises(WriteError) as caught:
            save_checkpoint(run, make_state(20, numbers=300_000), 3)
        monkeypatch.undo()
        text = str(caught.value)
        assert text.startswith(f"checkpoint needs 1.21 MB, 300 kB free on {run.path}; kept ")
        assert "kept checkpoint_10.pt. Free space there" in text


# ---- old checkpoints


def test_the_newest_the_best_and_the_resumed_one_stay(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.resumed_step = 10
        for step, loss in [(10, None), (20, 2.0), (30, 1.5), (40, 3.0), (50, 2.2), (60, 1.5)]:
            save_checkpoint(run, make_state(step, loss), 2)
        assert steps_in(run.prepare()) == steps_in(run.prepare(), "pt") == [10, 30, 50, 60]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    with new_run(tmp_path, 10, 20, 30, 40) as run:  # keep_last is null
        folder = run.prepare()
        assert steps_in(folder) == [10, 20, 30, 40]
        data_path(folder, 30).write_bytes(b"short")
        assert prune_checkpoints(folder, 2, set()) == [10]
        assert steps_in(folder) == [20, 30, 40]
        save_steps(run, 50, keep_last=1)
        assert steps_in(folder) == [30, 50]


# ---- strangers' files


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def with_manifest(path: Path) -> Path:
    facts = {"step": 1, "tokens": 1, "loss": None, "val_loss": None, "fingerprint": "", "time": ""}
    manifest = Manifest(**facts, size=path.stat().st_size, sha256="")  # type: ignore[arg-type]
    manifest_path(path).write_text(render(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest_path(path).write_text(render(replace(manifest, sha256=digest)))
    return path


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    torch.save({"format": 3, "model": Evil(marker)}, path)
    for _ in range(2):  # without a manifest, and with one
        with pytest.raises(CheckpointError) as caught:
            load_model(path)
        assert "checkpoint holds a Python object (posix.mkdir); refused." in str(caught.value)
        assert not marker.exists()
        with_manifest(path)


def write_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "pickle")


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda p: torch.save({"model": {}}, p), "has no format field: not a checkpoint of this"),
        (lambda p: torch.save(torch.ones(3), p), "has no format field"),
        (lambda p: torch.save({"format": 3}, p), "was not completed (no manifest foreign.json)"),
        (lambda p: p.write_bytes(b""), "(0 bytes) is not a checkpoint: no complete zip archive"),
        (lambda p: p.write_text("hello"), "(5 bytes) is not a checkpoint: no complete zip"),
        (write_bomb, "is not a checkpoint: it is compressed."),
        (write_tar, "is not a checkpoint: no complete zip archive"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "cannot be read as a checkpoint"),
    ],
)
def test_foreign_files_are_named(
    tmp_path: Path, write: Callable[[Path], object], text: str
) -> None:
    path = tmp_path / "foreign.pt"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        resolve(path, tmp_path)
    assert text in str(caught.value)
    assert caught.value.exit_code == 3


def test_format_inside_the_file_counts_too(tmp_path: Path) -> None:
    path = tmp_path / "new.pt"
    torch.save({"format": 1}, path)
    with pytest.raises(CheckpointError, match="format 1; this version reads 3"):
        load_checkpoint(with_manifest(path))


# ---- finding what to resume


def test_a_file_is_that_one_or_an_error_with_the_newest_valid(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20, 30)
    resume, notes = resolve(data_path(folder, 20), tmp_path)
    assert (resume.step, resume.run_dir, notes) == (20, folder, [])
    data_path(folder, 20).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"size differs .* Newest valid: checkpoint_30.pt."):
        resolve(data_path(folder, 20), tmp_path)
    with pytest.raises(CheckpointError, match=r"_90.pt: not found; run has 10, 20, 30\. Newest"):
        resolve(data_path(folder, 90), tmp_path)
    with pytest.raises(CheckpointError, match="not found; working directory"):
        resolve(tmp_path / "nowhere" / "checkpoint_1.pt", tmp_path)


def test_a_checkpoint_outside_a_run_directory_is_not_continued(tmp_path: Path) -> None:
    source = data_path(finished_run(tmp_path, 10), 10)
    for path in (source, manifest_path(source)):
        shutil.copy(path, tmp_path)
    with pytest.raises(CheckpointError, match=r"no config.yaml beside it"):
        resolve(tmp_path / source.name, tmp_path)


def test_a_run_directory_is_its_newest_valid_one(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20, 9)
    data_path(folder, 20).write_bytes(b"short")
    os.utime(data_path(folder, 9))  # the step counts, not the time
    resume, notes = resolve(folder, tmp_path)
    assert resume.step == 10
    assert len(notes) == 1
    assert notes[0].startswith("not used: checkpoint_20.pt: size differs")
    for step in (9, 10):
        manifest_path(data_path(folder, step)).unlink()
    with pytest.raises(CheckpointError, match=r"no valid checkpoint in it\.\n  checkpoint_20"):
        resolve(folder, tmp_path)


def rename_run(folder: Path, name: str, **training: Any) -> Path:
    """Gives a run another start time and config."""
    config = make_config(folder.parent.parent, **training)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "environment.json").unlink()  # it holds a copy of the other config
    return folder.rename(folder.parent / name)


def seeds_differ(saved: Config) -> list[str]:
    return [] if saved.training.seed == 1337 else ["training.seed", "x", "y", "z"]


def test_auto_takes_the_newest_run_of_the_same_config(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert resolve_resume("auto", root, seeds_differ) == (
        None,
        [f"auto: no run to resume in {root}; starting a new one"],
    )
    other = rename_run(finished_run(tmp_path, 30), "run_20250101_000000", seed=1)
    resume, notes = resolve_resume("auto", root, seeds_differ)
    assert resume is None
    assert "nearest: run_20250101_000000, which differs in training.seed, x, y, ...)" in notes[0]
    assert notes[0].endswith("starting a new one")  # its seed cannot be changed
    weight = "dataset.mixture.web.weight"
    _, notes = resolve_resume("auto", root, lambda saved: [weight])
    assert notes[0].endswith(f"; to go on with it: resume_from_checkpoint={other}")
    rename_run(finished_run(tmp_path, 20), "run_20240101_000000")
    rename_run(finished_run(tmp_path, 10), "run_20240101_000000_01")
    resume, notes = resolve_resume("auto", root, seeds_differ)
    assert resume is not None
    assert (resume.run_dir.name, resume.step, notes) == ("run_20240101_000000_01", 10, [])


def test_auto_names_and_skips_what_it_cannot_read(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    rename_run(finished_run(tmp_path, 10), "run_20240101_000000")
    (root / "run_20250101_000000").mkdir()
    broken = rename_run(finished_run(tmp_path, 20), "run_20250202_000000")
    data_path(broken, 20).write_bytes(b"short")
    resume, notes = resolve_resume("auto", root, seeds_differ)
    assert resume is not None
    assert resume.step == 10
    assert notes[0].startswith("skipped run_20250202_000000: ")
    assert "size differs" in notes[0]
    assert notes[1].startswith("skipped run_20250101_000000: ")


# ---- models


def small_model() -> tuple[Config, torch.nn.Module]:
    from model import build_model

    config = replace(Config(), model=replace(Config().model, n_layer=1, n_embd=8, n_head=2))
    return config, build_model(config)


def test_a_model_comes_back_ready_to_use(tmp_path: Path) -> None:
    config, model = small_model()
    state = make_state(5) | {"model": model.state_dict(), "config": config.to_dict()}
    with new_run(tmp_path) as run:
        path = save_checkpoint(run, state, 3)
    for place in (path, *path.parents[:2]):
        loaded, loaded_config = load_model(str(place))
        assert loaded_config == config
        assert not loaded.training
        assert_equal(dict(loaded.state_dict()), dict(model.state_dict()), "model")


def losing_run(folder: Path, always: bool) -> Path:
    """A run directory whose best checkpoint is the second of three."""
    config, model = small_model()
    training = make_config(folder, always_save_checkpoint=always).training
    with RunDirectory.start(replace(config, training=training)) as run:
        for step, loss in ((10, 3.0), (20, 1.5), (30, 2.0)):
            weights = {name: torch.full_like(w, step) for name, w in model.state_dict().items()}
            state = make_state(step, loss) | {"model": weights, "config": config.to_dict()}
            save_checkpoint(run, state, None)
        return run.prepare()


def step_of(model: torch.nn.Module) -> float:
    return next(model.parameters()).view(-1)[0].item()


def test_a_run_that_saves_its_best_means_the_best_and_others_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = losing_run(tmp_path / "best", always=False)
    for path in (run, run.parent):
        assert step_of(load_model(path)[0]) == 20
        line = f"{data_path(run, 20)} is the best of its run (held-out loss 1.5000)."
        assert capsys.readouterr().err == f"{line} The last one is checkpoint_30.pt.\n"
    assert step_of(load_model(data_path(run, 30))[0]) == 30
    assert resolve(run, tmp_path)[0].step == 30  # training goes on from the last
    whole = data_path(run, 20).read_bytes()
    data_path(run, 20).write_bytes(flipped(whole, len(whole) // 2, 0))
    assert step_of(load_model(run)[0]) == 30
    assert "not used: checkpoint_20.pt: sha256 mismatch" in capsys.readouterr().err
    assert step_of(load_model(losing_run(tmp_path / "last", always=True))[0]) == 30
    assert capsys.readouterr().err == ""


def test_a_checkpoint_of_another_version_is_told(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"checkpoint_5.pt: does not fit this version: .*"):
        load_model(folder)
