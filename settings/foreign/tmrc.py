"""TMRC's YAML (KempnerInstitute/tmrc): names that mean more than an alias, and what its code does
that its files do not say."""

from __future__ import annotations

from collections.abc import Sequence

from settings.errors import Problem
from settings.foreign.edit import fill, take, written_names
from settings.merge import Layer, read_layer
from settings.schema import Schema
from settings.values import Scalar, to_text
from settings.yaml_reader import Entry, Group

# Names that only its files have, by section: names of two sections make a file TMRC's.
_MARKS = {
    "datasets": ("name", "path", "tokenizer_used"),
    "model": ("d_model", "dropout_p", "context_length", "autocast_precision", "flash", "flex"),
    "optimizer": ("lr", "betas", "precision"),
    "training": ("train_steps", "artifacts_path", "val_interval"),
}
_KERNELS = {"model.flash": "flash", "model.flex": "flex"}
_ATTENTION = "model.attention"
_PATHS = ("datasets.path", "dataset.path")
_LOG_NAME = "wandb_log.name"
# Names that mean more than the option they stand for, in whatever file they are given.
NAMES = {*_PATHS, _LOG_NAME}


def recognises(entries: Sequence[Entry]) -> bool:
    """Returns whether a file has TMRC's names and trains a GPT, the only model TMRC has."""
    names = written_names(entries)
    sections = [s for s, marks in _MARKS.items() if any(f"{s}.{name}" in names for name in marks)]
    return len(sections) >= 2 and _names_gpt(entries)


def read(schema: Schema, number: int, source: str, entries: Sequence[Entry]) -> Layer:
    """Returns the layer of a file of TMRC, with what its code does and its files do not say."""
    layer = read_layer(schema, number, source, entries)
    layer.notes.insert(0, f"{source} is read as a config of TMRC")
    fill(layer, {"model.tie_embeddings": False}, "its head has weights of its own")
    if not any(entry.key == "schedule" for entry in entries):
        constant = {"schedule.decay_lr": False, "schedule.warmup_iters": 0}
        fill(layer, constant, "its learning rate is constant")
    fill(layer, {"optimizer.grad_clip": 0.0}, "it does not clip gradients")
    fill(layer, {"training.checkpoint_freq": None}, "it saves by training.save_every alone")
    return layer


def translate_names(layer: Layer, below: Sequence[Layer]) -> None:
    """Translates in place the names of a layer that mean more than another option.

    below: the layers before it, translated.
    """
    _translate_kernel(layer, below)
    _translate_tokenizer(layer)
    _translate_run_name(layer)
    _drop_label(layer)


def _names_gpt(entries: Sequence[Entry]) -> bool:
    model = [e.value for e in entries if e.key == "model" and isinstance(e.value, Group)]
    names = [e.value for group in model for e in group.entries if e.key == "name"]
    return [name.text.lower() for name in names if isinstance(name, Scalar)] == ["gpt"]


def _translate_kernel(layer: Layer, below: Sequence[Layer]) -> None:
    """Two switches choose the kernel of attention; switches that are off mean `auto`."""
    names = [key for key in _KERNELS if key in layer.given]
    if not names:
        return
    origin = max(layer.given[key].origin for key in names)
    wanted = [_KERNELS[key] for key in names if layer.given[key].value]
    switched_off = [_KERNELS[key] for key in names if not layer.given[key].value]
    for key in names:
        del layer.given[key]
    if len(wanted) == 2:
        text = "model.flash=true and model.flex=true exclude each other; set one to false"
        layer.problems.append(Problem(origin, text))
        return
    kernel = wanted[0] if wanted else "auto"
    other = layer.given.get(_ATTENTION)
    if other is not None and other.value != kernel:
        given = f"{_ATTENTION}={other.value}"
        text = f"{' and '.join(names)}: same as {_ATTENTION}={kernel}, but {given}. Keep one"
        layer.problems.append(Problem(max(origin, other.origin), text))
        return
    before = [low.given[_ATTENTION].value for low in below if _ATTENTION in low.given]
    if not wanted and before and before[-1] not in switched_off:
        return  # `flash=false` does not undo `flex: true` of a file
    layer.put(_ATTENTION, kernel, origin)
    verb = "is" if len(names) == 1 else "are"
    layer.note(f"{' and '.join(names)} {verb} read as {_ATTENTION}={kernel}")


def _translate_tokenizer(layer: Layer) -> None:
    """The tokenizer that made the tokens is the tokenizer."""
    used, ours = "dataset.tokenizer_used", "tokenizer.name"
    if used not in layer.given:
        return
    origin, value = layer.given[used].origin, take(layer, used)
    given = layer.given.get(ours)
    name = given.value if given else "auto"
    if value is None or name == value:
        return
    if given is None or name == "auto":
        layer.put(ours, value, origin)
        layer.note(f"{used} is read as {ours}")
    else:
        text = f"{used}={to_text(value)} made the tokens, but {ours}={to_text(name)}; set one"
        layer.problems.append(Problem(max(origin, given.origin), text))


def _translate_run_name(layer: Layer) -> None:
    """A section wandb_log with a name turns the log on."""
    name, switch = layer.given.get("logging.wandb_run_name"), "logging.wandb_log"
    if name is not None and name.name == _LOG_NAME and switch not in layer.given:
        layer.put(switch, True, name.origin)
        layer.note(f"{_LOG_NAME} turns {switch} on")


def _drop_label(layer: Layer) -> None:
    """The name of a data set beside its path is a label, not a folder of token files."""
    path, name = layer.given.get("dataset.parquet_dir"), layer.given.get("dataset.name")
    if path is not None and path.name in _PATHS and name is not None and name.value:
        del layer.given["dataset.name"]
        layer.notes = [n for n in layer.notes if n != f"{name.name} is read as dataset.name"]
        layer.note(f"{name.name}={name.value} is a label beside {path.name}: ignored")
