"""Saving and loading the whole state of a run.

A checkpoint is one `torch.save` of nested dicts of tensors and plain values with a `format` field,
and a manifest written after it (engine/run_directory/manifest.py). It is loaded with
`weights_only=True`, always: opening a stranger's file runs none of its code.

    path = save_checkpoint(directory, state, keep_last=3)
    model, config = load_model("checkpoints/run_20251108_143022")
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from config import CheckpointError, Config, ConfigError, WriteError
from engine.checkpoint.contents import (
    Content,
    check_finite,
    check_plain,
    check_type,
    fitting,
    tensor_bytes,
)
from engine.checkpoint.export import is_export, open_export
from engine.checkpoint.foreign import is_foreign, open_foreign
from engine.monitor import console
from engine.precision.lora import merge_lora
from engine.precision.precision import apply_lora
from engine.precision.tensor_4bit import import_bitsandbytes
from engine.run_directory.find_runs import find_by_name
from engine.run_directory.manifest import (
    CONFIG,
    ENVIRONMENT,
    FORMAT,
    Facts,
    Manifest,
    Resume,
    best_step,
    complete_checkpoints,
    data_path,
    found,
    in_runs,
    manifest_path,
    newest_run,
    newest_valid,
    render,
    steps_in,
    verify,
)
from engine.run_directory.run_files import read_config
from engine.train_state import check_rng
from files.atomic import HashedFile, atomic_write, atomic_write_text, durable_remove
from files.write_errors import as_write_error, check_space
from model import LanguageModel, build_model

__all__ = ["Resume", "load_checkpoint", "load_model", "resolve_resume", "save_checkpoint"]

MOST_LAYERS = 10_000  # of a model whose layers share their weights: those do not tell their number


class Destination(Protocol):
    """What saving needs of a run directory (engine/run_directory/directory.py)."""

    last_checkpoint: Path | None
    resumed_step: int | None

    def prepare(self) -> Path:
        """The folder, created if need be, with the metrics so far on the disk."""


def save_checkpoint(directory: Destination, state: dict[str, Any], keep_last: int | None) -> Path:
    """Saves `state`, then removes old checkpoints; the previous ones stay good if it fails.

    `state` has `model`, `train` (TrainState as a dict), `data` (with `fingerprint`) and whatever
    else resuming needs. A step that has a whole checkpoint already is not written again. Raises
    NonFiniteError for NaN in the weights and WriteError; an old checkpoint that cannot be removed
    is only told.
    """
    check_plain(state)
    facts = _facts(state)
    check_finite(state["model"], facts.step)
    folder = directory.prepare()
    path = data_path(folder, facts.step)
    kept = directory.last_checkpoint
    if not _already_saved(path, facts):
        needed = tensor_bytes(state)
        with as_write_error(f"write {path}", folder, needed, kept.name if kept else ""):
            check_space(folder, needed)
            _write(path, {"format": FORMAT, **state}, facts)
    directory.last_checkpoint = path
    if keep_last is not None:
        resumed = directory.resumed_step
        try:
            prune_checkpoints(folder, keep_last, set() if resumed is None else {resumed})
        except WriteError as error:
            console.warning(f"{error} The next checkpoint will try again.")
    return path


def _facts(state: dict[str, Any]) -> Facts:
    train = state["train"]
    measured = train["evaluated_step"] == train["step"]
    return Facts(
        step=train["step"],
        tokens=train["tokens"],
        loss=train["train_loss"] if measured else None,
        val_loss=train["val_loss"] if measured else None,
        fingerprint=state["data"]["fingerprint"],
    )


def _already_saved(path: Path, facts: Facts) -> bool:
    """Whether the step has a whole checkpoint that knows no less: one that was saved before its
    evaluation is written again."""
    try:
        manifest = verify(path)
    except CheckpointError:
        return False
    return manifest.val_loss is not None or facts.val_loss is None


def _write(path: Path, content: dict[str, Any], facts: Facts) -> None:
    def forget_old() -> None:
        # A manifest must never name other data than its own, so that of an earlier checkpoint of
        # this step goes before the data is replaced; not sooner, since the new data may not fit.
        durable_remove(manifest_path(path))

    try:
        written = atomic_write(path, lambda out: _dump(content, out), before_rename=forget_old)
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        manifest = Manifest(**vars(facts), **vars(written), time=time)
        atomic_write_text(manifest_path(path), render(manifest))
    except BaseException:
        if not manifest_path(path).exists():
            with contextlib.suppress(OSError):
                durable_remove(path)
        raise


def _dump(content: dict[str, Any], out: HashedFile) -> None:
    """`torch.save` without its CRC32s, which no torch.load checks and which cost as much time as
    our sha256. `unzip` takes such a file for damaged; torch does not."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        # torch.save asks for no more of a file than write and flush.
        torch.save(content, out)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(before)


def prune_checkpoints(folder: Path, keep_last: int, keep: set[int]) -> list[int]:
    """Removes whole checkpoints older than the newest `keep_last`; returns the steps removed.

    The one with the lowest held-out loss and the steps in `keep` stay. Damaged checkpoints do not
    count as kept ones. The manifest goes first, durably: data without manifest is no checkpoint,
    and where a removal failed half-way before, it goes now.
    """
    complete = complete_checkpoints(folder)
    old = set(list(complete)[:-keep_last]) - {best_step(complete)} - keep
    halves = {*steps_in(folder, "pt")} - {*steps_in(folder)}
    for step in sorted(old | halves):
        path = data_path(folder, step)
        with as_write_error(f"remove old checkpoint {path}", folder):
            durable_remove(manifest_path(path))
            durable_remove(path)
    return sorted(old | halves)


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, verified to be `content.Content`; raises CheckpointError."""
    manifest = verify(path)
    content = _checked_format(path, _read(path, device))
    with fitting(path):
        check_type(content, Content)
        own = content["train"] | {"fingerprint": content["data"]["fingerprint"]}
        for name in ("step", "tokens", "fingerprint"):
            if own[name] != getattr(manifest, name):
                told = f"and its manifest says {getattr(manifest, name)}"
                raise ValueError(f"{name} is {own[name]!a}, {told}")
        if not content["rng"]:
            raise ValueError("rng is empty")
        for state in content["rng"]:
            check_rng(state)
    return content


def check_weights(path: Path, content: dict[str, Any]) -> Config:
    """The config of a checkpoint, whose weights are those of the model that it describes; raises
    CheckpointError. Nothing of the described size is allocated."""
    weights: dict[str, Tensor] = content["model"]
    with fitting(path):
        config = Config.from_dict(content["config"])
        layers = config.model.n_layer
        if layers > (MOST_LAYERS if config.model.name == "bdh" else len(weights)):
            raise ValueError(f"config.model.n_layer is {layers}, with {len(weights)} weights")
    if config.low_precision.lora_rank is not None:
        import_bitsandbytes(f"{path}: its 4-bit weights")
    with fitting(path):
        with torch.device("meta"):
            model = build_model(config)
            apply_lora(model, config.low_precision, init=False)
        for name, own in model.state_dict().items():
            kind = weights[name].dtype if name in weights else own.dtype
            if kind != own.dtype and not (kind.is_floating_point and own.is_floating_point):
                raise ValueError(f"model.{name} holds {kind}, expected {own.dtype}")
        # There is nothing to copy into. A plain dict: torch notes `assign` in a state dict's
        # metadata, and the next load from it would replace the parameters an optimizer holds.
        model.load_state_dict(dict(weights), assign=True)
    return config


def _checked_format(path: Path, content: object) -> dict[str, Any]:
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} has no format field: not a checkpoint of this trainer.")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {content['format']}; this version reads {FORMAT}.")
    return content


def _read(path: Path, device: str | torch.device, mmap: bool = False) -> object:
    _check_archive(path)
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        names = ", ".join(sorted(_refused_names(path))) or "of unknown type"
        raise CheckpointError(
            f"{path}: checkpoint holds a Python object ({names}); refused."
        ) from None
    except Exception as error:  # a hostile pickle can make the loader raise anything
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error}).") from error


def _refused_names(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above; this only words the message
        return []


def _check_archive(path: Path) -> None:
    """Refuses what is no `torch.save` file before torch reads it, compressed bombs among them."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is not a checkpoint: no complete zip archive."
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is not a checkpoint: it is compressed.")


def _find(path: Path) -> tuple[Resume, list[str]]:
    """The checkpoint meant by a file, a run directory or a folder of runs (the newest one), and
    why newer ones were not taken."""
    if path.is_dir():
        path = newest_run(path)
        best, rejects = newest_valid(path)
        if best is None:
            reasons = "".join(f"\n  {line}" for line in rejects)
            if (path / "ckpt.pt").exists():
                reasons += (
                    " It holds ckpt.pt of nanoGPT, whose batches cannot be drawn again: training."
                    f"init_from={path / 'ckpt.pt'} starts a new run with its weights, from step 0 "
                    "and without its optimizer moments."
                )
            if not rejects and (path / ENVIRONMENT).exists():
                reasons += (
                    " It ended before its first one, so there is nothing to resume. To train it "
                    f"again: python train.py --config {path / CONFIG}"
                )
            raise CheckpointError(f"{path}: no valid checkpoint in it.{reasons}")
        return best, rejects
    path = in_runs(path)
    try:
        if path.is_file() and not manifest_path(path).exists():
            _checked_format(path, _read(path, "cpu", mmap=True))
        return found(path), []
    except CheckpointError as error:
        best, _ = newest_valid(path.parent)
        if best is None:
            raise
        raise CheckpointError(f"{error} Newest valid: {best.path.name}.") from None


def resolve_resume(
    value: str, checkpoint_dir: Path, differing: Callable[[Config], list[str]]
) -> tuple[Resume | None, list[str]]:
    """The checkpoint meant by `training.resume_from_checkpoint`, and lines for the user.

    A file: that one. A run directory, or part of its name: its newest valid one. A folder of runs:
    that of the newest run. `auto`: that of the newest run whose saved config has nothing
    `differing`, or None for a fresh start. Raises CheckpointError.
    """
    if value == "auto":
        return _find_run(checkpoint_dir, differing)
    resume, rejects = _find(find_by_name(value, checkpoint_dir))
    if not (resume.run_dir / CONFIG).exists():
        raise CheckpointError(
            f"{resume.path}: no {CONFIG} beside it. Resuming continues in the run directory; "
            "give the checkpoint inside it."
        )
    return resume, [f"not used: {line}" for line in rejects]


def _find_run(
    checkpoint_dir: Path, differing: Callable[[Config], list[str]]
) -> tuple[Resume | None, list[str]]:
    notes: list[str] = []
    nearest: tuple[list[str], str] | None = None
    runs = (path for path in checkpoint_dir.glob("run_*") if path.is_dir())
    for run in sorted(runs, reverse=True):
        try:
            config, told = read_config(run)
            notes += [f"{run.name}: {CONFIG}: {told}"] if told else []
            keys = differing(config)
            if not keys:
                resume, rejects = _find(run)
                return resume, [*notes, *(f"not used: {line}" for line in rejects)]
        except (CheckpointError, ConfigError, OSError) as error:
            notes.append(f"skipped {run.name}: {error}")
            continue
        if nearest is None or len(keys) < len(nearest[0]):
            nearest = keys, run.name
    if nearest is None:
        notes.append(f"auto: no run to resume in {checkpoint_dir}; starting a new one")
    else:
        keys, name = nearest
        first = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        notes.append(
            f"auto: no run in {checkpoint_dir} has this config (nearest: {name}, which differs "
            f"in {first}); starting a new one"
        )
    return None, notes


def find_model(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint to read a model from, and lines for the user.

    A file is that one. A run directory means its last checkpoint; or its best, that of lowest
    held-out loss, where `training.always_save_checkpoint` is false, which asks for the best.
    """
    folder, lines = newest_run(path), list[str]()
    complete = complete_checkpoints(folder) if path.is_dir() else {}
    best, last = best_step(complete), max(complete, default=None)
    if best is not None and best != last and not _saves_always(folder):
        place = data_path(folder, best)
        loss = f"held-out loss {complete[best].val_loss:.4f}"
        try:
            verify(place)
            line = f"{place} is the best of its run ({loss}). The last one is checkpoint_{last}.pt."
            return place, [line]
        except CheckpointError as error:
            lines.append(f"not used: {error}")
    resume, rejects = _find(path)
    return resume.path, [*lines, *(f"not used: {line}" for line in rejects)]


def _saves_always(run: Path) -> bool:
    try:
        return Config.from_yaml(run / CONFIG).training.always_save_checkpoint
    except (ConfigError, OSError):
        return True


def load_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[LanguageModel, Config]:
    """The model of a checkpoint, in eval mode, and its config.

    `path` is a checkpoint, a run directory (see `find_model`), a folder of runs (its newest), an
    export (engine/checkpoint/export.py), whose 4-bit weights are those that its run evaluated, or
    weights of another program (model/pretrained.py). Raises CheckpointError.
    """
    return open_model(path, device)[:2]


def open_model(
    path: str | Path, device: str | torch.device
) -> tuple[LanguageModel, Config, dict[str, Any]]:
    """Returns a model in eval mode, its Config, and the description of its tokenizer as
    `data.meta.open_tokenizer` takes it. Raises CheckpointError.
    """
    if is_foreign(Path(path)):
        return open_foreign(Path(path), device)
    path = find_by_name(path)
    if is_export(path):
        return open_export(path, lambda config: build_model(config).to(device))
    chosen, lines = find_model(path)
    for line in lines:
        console.warning(line)
    content = load_checkpoint(chosen, device)
    config, weights = check_weights(chosen, content), content["model"]
    model = build_model(config)
    if apply_lora(model, config.low_precision, init=False):
        model.load_state_dict(weights)
        weights, model = merge_lora(model), build_model(config)
    model.load_state_dict(weights)
    return model.to(device).eval(), config, content["tokenizer"]
