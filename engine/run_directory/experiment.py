"""Which runs are the same experiment: equal in all options that affect results.

Groups of runs over seeds, cells of a sweep, forks and their parents, and a run that is repeated are
all found by this one rule. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from config import schema
from engine.run_directory.find_runs import FOLDER
from engine.run_directory.fork import OPTION as FORK_FROM
from engine.run_directory.fork import means_parent

TEXT_PATHS = ("parquet_dir", "train_data_path", "val_data_path", "name")
DECIDED_AT_START: Mapping[str, Any] = {
    "model.vocab_size": None,
    "dataset.text_column": "auto",
    "training.batch_size": "auto",
    "training.eval_batch_size": None,
}
"""Options that a run decides at its start if they have this value, and then saves as decided."""
DECIDED_BY_WEIGHTS = ("training.block_size", "low_precision.use_4bit", "tokenizer.name")
"""So are these, and the shape of the model, by the weights of `training.init_from`."""


def own_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flat config without options that play no part in it: those of other models, paths
    of text that is not read, and a text column that is `auto` still, as a run that reads token
    files leaves it."""
    others = set(_of_other_models(str(config.get("model.name"))))
    if config.get("dataset.text_column") == "auto":
        others.add("dataset.text_column")
    paths = {key for key, value in config.items() if is_text_path(key) and value is not None}
    # Token files and sources of a mixture are read instead of the folder, which has a default.
    if paths - {"dataset.parquet_dir", "dataset.val_data_path"}:
        others.add("dataset.parquet_dir")
    others |= {key for key in config if is_text_path(key)} - paths
    return {key: value for key, value in config.items() if key not in others}


# A sweep asks for a thousand configs, always by the same hundred keys.
@cache
def _of_other_models(own: str) -> frozenset[str]:
    if own not in schema().options["model.name"].choices:  # of an older or newer version
        return frozenset()
    options = schema().options.items()
    return frozenset(key for key, o in options if o.models and own not in o.models)


@cache
def _is_without_effect(key: str) -> bool:
    option = schema().find(key)
    return option is not None and option.effect == "none"


@cache
def is_text_path(key: str) -> bool:
    """Returns whether an option says where text is, that of a run or of a source of a mixture."""
    return key.startswith("dataset.") and key.rpartition(".")[2] in TEXT_PATHS


def experiment_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a flat config that affect results."""
    own = own_options(config)
    return {key: value for key, value in own.items() if not _is_without_effect(key)}


def experiment_id(config: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Returns 16 hexadecimal digits that are equal for equal experiments.

    Args:
        config: flat (`training.learning_rate`), with defaults.
        without: options that may differ, such as `training.seed`.
    """
    options = experiment_options(config)
    kept = {key: value for key, value in options.items() if key not in without}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_options(asked: Mapping[str, Any], given: Collection[str] = ()) -> tuple[str, ...]:
    """Returns the options that the experiment asked for leaves to its run to decide; of a fork,
    also which checkpoint it began from.

    given: options that the user gave by themselves, which no weights change.
    """
    found = [key for key, value in DECIDED_AT_START.items() if asked.get(key, value) == value]
    if asked.get("training.init_from", "scratch") != "scratch":
        found += sorted(_decided_by_weights().difference(found, given))
    return (*found, FORK_FROM) if asked.get(FORK_FROM) is not None else tuple(found)


@cache
def _decided_by_weights() -> frozenset[str]:
    """With the shape of a model, its kind, and so the options that only some kinds have."""
    options = schema().options.items()
    shape = {k for k, o in options if o.models or (o.section == "model" and o.on_resume == "fixed")}
    return frozenset(shape.union(DECIDED_BY_WEIGHTS))


def is_run_of(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Returns whether a run that saved one config is a run of the experiment that was asked for:
    equal but for what a run decides at its start."""
    folder, without = Path(asked.get("training.checkpoint_dir", FOLDER)), open_options(asked)
    if not means_parent(asked.get(FORK_FROM), saved.get(FORK_FROM), folder):
        without = tuple(key for key in without if key != FORK_FROM)
    return experiment_id(asked, without) == experiment_id(saved, without)
