"""`training.init_from`: the weights a run begins with, and the options they decide.

Weights decide the model's shape, its context length and the tokenizer, where the user left these
open. A value that the user gave has to agree with the weights, else it is an error: 12 layers do
not become 6, and GPT-2's 50,257 embeddings mean nothing to a byte tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from config import GPT2_NAMES, Config, ConfigError, Request, setting
from data.sources.tokens.meta import open_tokenizer
from data.tokenizers.base import Tokenizer
from engine.checkpoint.resume_rules import pretrained_options
from engine.checkpoint.trained_model import is_pretrained, open_model
from engine.run_directory.experiment import DECIDED_BY_WEIGHTS
from engine.run_directory.find_runs import FOLDER, find_by_name
from model.pretrained import Pretrained, read

DECIDED = {*DECIDED_BY_WEIGHTS, *(f"model.{name}" for name in pretrained_options())}
"""Options that weights may decide."""
NOT_IN_EVERY_FILE = ("n_layer", "n_head")  # some formats of weights hold no config


def read_weights(config: Config, request: Request) -> Pretrained:
    """Returns the weights that `training.init_from` names; raises CheckpointError."""
    shape = {
        n: getattr(config.model, n) for n in NOT_IN_EVERY_FILE if is_given(request, f"model.{n}")
    }
    folder = Path(config.training.checkpoint_dir)
    return open_weights(config.training.init_from, shape, folder)


def open_weights(init_from: str, shape: Mapping[str, int], folder: Path = FOLDER) -> Pretrained:
    """Returns the weights that `training.init_from` names, of this trainer or of others.

    shape: `n_layer` and `n_head` where the user gave them; some formats do not hold them.
    folder: run directories; `init_from` may be a part of the name of one. Raises CheckpointError.
    """
    published = init_from in GPT2_NAMES
    path = Path(init_from) if published else find_by_name(Path(init_from).expanduser(), folder)
    if not path.exists() or is_pretrained(path):
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
    """Returns whether the user asked for the value of an option: by an override, or by a value in a
    file that is not the default. Files are often copies of config.yaml, so a default in one says
    nothing."""
    section, name = key.split(".")
    if any(word.split("=")[0] in (key, name) for word in request.overrides):
        return True
    options = getattr(request.config, section)
    default = next(option.default for option in fields(options) if option.name == name)
    return key in request.given and getattr(options, name) not in (default, None)


def with_shape_of(
    config: Config, request: Request, weights: Pretrained, tokenizer: Tokenizer | None
) -> tuple[Config, list[str]]:
    """Returns the config with the shape and `tokenizer` of the weights, and lines that say which
    options changed. Raises ConfigError where the user gave another shape."""
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
        low = replace(low, use_4bit="auto")  # decided again below, for the model of the weights
    model = replace(config.model, **weights.options)
    own = config.tokenizer if tokenizer is None else replace(config.tokenizer, name=tokenizer.name)
    sections = {"model": model, "training": training, "low_precision": low, "tokenizer": own}
    return replace(config, **sections), lines  # type: ignore[arg-type]  # by their names


def keep_decided_options(config: Config, request: Request, then: Config) -> Config:
    """Returns the config of a resumed run with the options that its initial weights decided when it
    began (`then`), except those the user gave."""
    if config.training.init_from != then.training.init_from or then.training.init_from == "scratch":
        return config
    values, before = config.to_dict(), then.to_dict()
    for key in DECIDED:
        section, name = key.split(".")
        if not is_given(request, key):
            values[section][name] = before[section][name]
    return Config.from_dict(values)


def tokenizer_of_weights(
    config: Config, request: Request, described: Mapping[str, Any] | None
) -> Tokenizer | None:
    """Returns the tokenizer that the weights were trained with, for text that is not encoded yet.

    None where the config's tokenizer is used: the user asked for one, token files name theirs, or
    the weights name none. `check_tokenizer` compares afterwards. Raises DataError where the
    tokenizer cannot be opened.
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
    """Raises ConfigError where the text has another tokenizer than the weights, unless the user
    gave both `tokenizer.name` and `model.vocab_size`."""
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
