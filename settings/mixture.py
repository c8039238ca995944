"""Several sources of text in one run, `dataset.mixture`: what each of them is, and its rules.

As in `settings.constraints`, `c` is a Config or its sections side by side.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from settings.rules import is_default, rule


def source_datasets(dataset: Any) -> dict[str, Any]:
    """Returns by name the DatasetConfig of each source, as if the run read that one only; without a
    mixture the dataset itself under "". What a source leaves out is as in section dataset."""
    if not dataset.mixture:
        return {"": dataset}
    shared = {field.name for field in fields(dataset)}
    found = {}
    for source in dataset.mixture:
        own = {key: value for key, value in vars(source).items() if key in shared}
        given = {key: value for key, value in own.items() if value is not None}
        found[source.name] = replace(dataset, **given | {"name": None, "mixture": ()})
    return found


@rule("dataset.mixture")
def _each_source_has_a_name_and_a_text(c: Any) -> str | None:
    names = [source.name for source in c.dataset.mixture]
    for source in c.dataset.mixture:
        fault = f"dataset.mixture: source {source.name} "
        if names.count(source.name) > 1:
            return f"dataset.mixture: two entries have the name {source.name}"
        if source.parquet_dir is not None and source.train_data_path is not None:
            return f"{fault}names two texts, parquet_dir and train_data_path; set one"
        if source.parquet_dir is None and source.train_data_path is None:
            return f"{fault}names no text; set parquet_dir or train_data_path"
        if source.val_data_path is not None and source.train_data_path is None:
            return f"{fault}has val_data_path, which goes with train_data_path; set both"
    return None


@rule("dataset.mixture")
def _one_source_has_a_share(c: Any) -> str | None:
    if not c.dataset.mixture or any(source.weight > 0 for source in c.dataset.mixture):
        return None
    return "dataset.mixture: all weights are 0; one must be larger"


def _no_other_text(key: str) -> None:
    @rule(key, "dataset.mixture", gives_way=(key, "dataset.mixture"))
    def complain(c: Any) -> str | None:
        if not c.dataset.mixture or is_default(c, key):
            return None
        return "{0} is a text beside those of dataset.mixture; make it a source, or set one"


for _key in ("dataset.parquet_dir", "dataset.train_data_path", "dataset.name"):
    _no_other_text(_key)


@rule("training.epochs", "dataset.mixture", gives_way=("training.epochs",))
def _sources_have_no_common_epoch(c: Any) -> str | None:
    if c.training.epochs is None or not c.dataset.mixture:
        return None
    return "{0} counts passes over one text, and dataset.mixture has several; set max_iters"
