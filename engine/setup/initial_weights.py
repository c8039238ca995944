"""What the weights that a run begins with decide: the model's shape, its context, the tokenizer.

They fill in what the user left open. What the user gave has to agree, else it is refused: weights
of 12 layers do not become 6, and GPT-2's 50,257 embeddings mean nothing to bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from config import GPT2_NAMES, Config, ConfigError, Request, setting
from data.sources.meta import open_tokenizer
from data.tokenizers.base import Tokenizer
from engine.checkpoint.foreign import is_foreign
from engine.checkpoint.resume_rules import pretrained_options
from engine.checkpoint.save_load import open_model
from engine.run_directory.find_runs import FOLDER, find_by_name
from model.pretrained import Pretrained, read

DECIDED = {"training.block_size", "low_precision.use_4bit", "tokenizer.name"}
DECIDED |= {f"model.{name}" for name in pretrained_options()}
"""Options that weights may decide."""
UNTOLD = ("n_layer", "n_head")  # what some files leave to the config


def read_weights(config: Config, request: Request) -> Pretrained:
    """The weights that `training.init_from` names; raises CheckpointError."""
    shape = {n: getattr(config.model, n) for n in UNTOLD if is_given(request, f"model.{n}")}
    folder = Path(config.training.checkpoint_dir)
    return open_weights(config.training.init_from, shape, folder)


def open_weights(init_from: str, shape: Mapping[str, int], folder: Path = FOLDER) -> Pretrained:
    """The weights that `training.init_from` names, of this trainer or of others; raises
    CheckpointError.

    shape: `n_layer` and `n_head` where the user gave them; some files do not tell one of them.
    folder: where a run is looked for by a part of its name first.
    """
    published = init_from in GPT2_NAMES
    path = Path(init_from) if published else find_by_name(Path(init_from).expanduser(), folder)
    if not path.exists() or is_foreign(path):
        return read(init_from, shape)
    model, config, tokenizer = open_model(path, "cpu")
    options = {name: getattr(config.model, name) for name in pretrained_options()}
    told = ("n_layer", "n_head", "n_embd", "vocab_size")
    line = ", ".join(f"{name} {options[name]}" for name in told)
    return Pretrained(
        options=options,
        block_size=model.max_context,
        weights=model.state_dict(),
        path=path,
        source=f"{init_from}: {config.model.name}, {line}",
        tokenizer=tokenizer,
    )


def is_given(request: Request, key: str) -> bool:
    """Whether the user asked for the value of an option: by a word of the command line, or by a
    value in a file that is not the default, since files are often copies of config.yaml."""
    section, name = key.split(".")
    if any(word.split("=")[0] in (key, name) for word in request.overrides):
        return True
    options = getattr(request.config, section)
    default = next(option.default for option in fields(options) if option.name == name)
    return key in request.given and getattr(options, name) not in (default, None)


def take_shape(
    config: Config, request: Request, weights: Pretrained, tokenizer: Tokenizer | None
) -> tuple[Config, list[str]]:
    """The config with the shape and `tokenizer` of the weights, and lines that tell what it
    replaces; raises ConfigError where the user gave another shape."""
    source, lines = config.training.init_from, list[str]()
    other = {
        key: value
        for key, value in weights.options.items()
        if value is not None and getattr(config.model, key) not in (value, None)
    }
    refused = [key for key in other if is_given(request, f"model.{key}")]
    if refused:
        listed = ", ".join(setting(config, f"model.{key}") for key in refused)
        theirs = ", ".join(f"{key} {other[key]}" for key in refused)
        raise ConfigError(f"training.init_from={source} has {theirs}, and {listed}; leave it out.")
    told = [f"model.{key}" for key in other if f"model.{key}" in request.given]
    if told:
        lines.append(f"From the weights, in place of the config's: {', '.join(told)}")
    training, low = config.training, config.low_precision
    if weights.block_size is not None and training.block_size > weights.block_size:
        if is_given(request, "training.block_size"):
            raise ConfigError(
                f"training.init_from={source} has learned {weights.block_size} positions, and "
                f"{setting(config, 'training.block_size')}; set it to {weights.block_size} or less."
            )
        training = replace(training, block_size=weights.block_size)
        lines.append(f"training.block_size: {training.block_size}, the positions of the weights")
    is_other = config.model.name != weights.options["name"]
    if is_other and low.lora_rank is None and not is_given(request, "low_precision.use_4bit"):
        low = replace(low, use_4bit=weights.options["name"] == "bdh")
    model = replace(config.model, **weights.options)
    own = config.tokenizer if tokenizer is None else replace(config.tokenizer, name=tokenizer.name)
    sections = {"model": model, "training": training, "low_precision": low, "tokenizer": own}
    return replace(config, **sections), lines  # type: ignore[arg-type]  # by their names


def as_begun(config: Config, request: Request, then: Config) -> Config:
    """The config with what weights decided when the run of `then` began with them, except what the
    user gave."""
    if config.training.init_from != then.training.init_from or then.training.init_from == "scratch":
        return config
    values, before = config.to_dict(), then.to_dict()
    for key in DECIDED:
        section, name = key.split(".")
        if not is_given(request, key):
            values[section][name] = before[section][name]
    return Config.from_dict(values)


def own_tokenizer(
    config: Config, request: Request, described: Mapping[str, Any] | None
) -> Tokenizer | None:
    """The tokenizer that the weights were trained with, for text that is not encoded yet.

    None where the config's own counts: the user asked for it, token files tell it, or the weights
    do not; `check_tokenizer` compares afterwards. Raises DataError where it cannot be had.
    """
    if described is None or described["kind"] == "ids":
        return None
    by_name = described["kind"] == "name"
    if config.tokenizer.name == "auto" and (by_name or described["kind"] == "dataset"):
        return None
    wanted = config.tokenizer.name if is_given(request, "tokenizer.name") else None
    if by_name and wanted not in (None, described["name"]):
        return None
    theirs = open_tokenizer(described)
    return theirs if theirs.name != "ids" and wanted in (None, theirs.name, "auto") else None


def check_tokenizer(request: Request, found: Tokenizer, weights: Pretrained) -> None:
    """Raises ConfigError where the text comes in tokens that the weights were not trained with,
    unless the user gave both `tokenizer.name` and `model.vocab_size`."""
    given = [is_given(request, key) for key in ("tokenizer.name", "model.vocab_size")]
    described, source = weights.tokenizer, request.config.training.init_from
    if all(given) or found.name == "ids":  # tokens without text: nothing can be compared
        return
    if described is None:
        if given[0] or request.config.tokenizer.name == "auto":  # token files tell theirs
            return
        raise ConfigError(
            f"training.init_from={source} does not tell its tokenizer, and tokenizer.name="
            f"{found.name} was not asked for; set tokenizer.name to the one it was trained with."
        )
    if described["kind"] == "name":
        name, same = described["name"], found.name == described["name"]
    else:
        theirs = open_tokenizer(described)
        name, same = theirs.name, theirs.fingerprint == found.fingerprint or theirs.name == "ids"
    if not same:
        raise ConfigError(
            f"training.init_from={source} was trained with tokenizer {name}, and the text comes "
            f"with tokenizer.name={found.name}; leave tokenizer.name out. To train its embeddings "
            f"on other tokens all the same, also give model.vocab_size="
            f"{weights.options['vocab_size']}."
        )
