"""What is known before a model is built: the text, where the run begins, the whole config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import Config, Request, eval_batch, micro_batch
from data import Dataset, open_dataset
from data.preparation import corpus
from data.run_data import check_data_state, embedded_is_missing
from data.sources.base import PLAN_VERSION
from data.tokenizers.base import Tokenizer
from data.tokenizers.build import tokenizer_from_dict
from engine.checkpoint.resume_rules import (
    check_resumable,
    experiment_differences,
    on_processes,
    resume_from_folder,
    with_evaluation,
)
from engine.checkpoint.save_load import Resume, check_weights, load_checkpoint, resolve_resume
from engine.hardware.distributed import World
from engine.monitor import console
from engine.planning.memory import with_batch
from engine.planning.summary import origin_lines, planned_steps, settle
from engine.run_directory.manifest import CONFIG
from engine.run_directory.run_files import check_config
from engine.schedule import learning_rate
from engine.setup.initial_weights import (
    as_begun,
    check_tokenizer,
    own_tokenizer,
    read_weights,
    take_shape,
)
from model import pretrained

EVAL_BATCH = 8  # with `training.batch_size: auto`, on every machine


@dataclass
class Beginning:
    """What is known before a model is built: the text, where the run begins, the whole config."""

    request: Request
    """As given, with the model's shape and vocabulary: what the run directory keeps."""
    config: Config
    """The same, with the micro-steps of this many processes."""
    data: Dataset
    weights: pretrained.Pretrained | None
    resume: Resume | None
    saved: dict[str, Any]
    """The checkpoint's content; empty where none is resumed."""

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one pass over the training text, as the run that goes on counts them."""
        return _epoch_tokens(self.data, self.config, self.saved)

    def take_batch(self, batch: int) -> None:
        """Puts a number in the place of `training.batch_size: auto`."""
        self.config = with_batch(self.config, batch, EVAL_BATCH)
        kept = with_batch(self.request.config, batch, EVAL_BATCH)
        self.request = replace(self.request, config=kept)


def begin(request: Request, world: World) -> Beginning:
    """Opens text, checkpoint or pretrained weights, and settles the config; says what it found."""
    console.info(*origin_lines(request))
    asked = resume_from_folder(request.config)
    resume = world.broadcast(find_resume(asked, request) if world.is_main else None)
    saved = dict[str, Any]()
    if resume is not None:
        saved = load_checkpoint(resume.path)
        then = check_weights(resume.path, saved)
    if saved and request.config.training.init_from == "resume":  # what it began with, it keeps
        origin = then.training.init_from
        asked = replace(asked, training=replace(asked.training, init_from=origin))
    weights, lines, known = None, list[str](), None
    if asked.training.init_from != "scratch" and saved:
        asked = as_begun(asked, request, then)
        if asked.tokenizer.name == then.tokenizer.name:
            known = tokenizer_from_dict(saved["tokenizer"])
    elif asked.training.init_from != "scratch":
        console.info(f"Reading the weights of {asked.training.init_from}...")
        with world.main_first():
            weights = read_weights(asked, request)
        console.info(weights.source)
        known = own_tokenizer(asked, request, weights.tokenizer)
        asked, lines = take_shape(asked, request, weights, known)
    with world.main_first():
        data = open_data(asked, known)
        ledger = data.lines()  # the first process counts tokens, the others find them in the cache
    console.info(*ledger)
    if weights is not None and known is None:
        check_tokenizer(request, data.tokenizer, weights)
    settled, more = settle(asked, data.vocab_size, data.tokenizer.name)
    lines += more
    if saved and settled.training.batch_size == "auto":
        settled = _batch_as_before(settled, then, world)
    if saved:
        settled, kept = with_evaluation(settled, then)
        lines += kept
    config = settled
    if resume is not None:
        check_own_config(request.files, resume)
        config, more = on_processes(settled, then, len(saved["rng"]), world.size)
        fits = check_fits(saved, resume, data, config, world.size)
        lines += [f"Resumed from {resume.path.name}: {resume.step} steps done", *more, *fits]
    console.info(*lines)
    return Beginning(replace(request, config=settled), config, data, weights, resume, saved)


def done_steps(saved: dict[str, Any]) -> tuple[int, int]:
    """Steps and tokens that a checkpoint has behind it, or none."""
    return (saved["train"]["step"], saved["train"]["tokens"]) if saved else (0, 0)


def _epoch_tokens(data: Dataset, config: Config, saved: dict[str, Any]) -> int:
    version = saved["cursor"]["version"] if saved else PLAN_VERSION
    return data.epoch_tokens(config.training.block_size, version)


def _batch_as_before(config: Config, saved: Config, world: World) -> Config:
    """With the evaluated rows of the checkpoint, and its micro-batch if so many processes can have
    it: other ones round differently."""
    micro_step = micro_batch(saved) * config.training.block_size * world.size
    fits = (config.training.tokens_per_step or 0) % micro_step == 0
    found = with_batch(config, micro_batch(saved), eval_batch(saved))
    return found if fits else replace(config, training=replace(found.training, batch_size="auto"))


def open_data(config: Config, known: Tokenizer | None = None) -> Dataset:
    """The indexed text, in the tokens of `known` or of the config; the embedded corpus is built
    where it is missing."""
    if embedded_is_missing(config):
        folder = Path(config.dataset.parquet_dir)
        console.info(f"{folder} is missing: building it from the Python standard library...")
        built = corpus.build(folder)
        console.info(
            f"{built.documents} files of source, {built.bytes / 1e6:.1f} MB, {built.seconds:.1f}s"
        )
    return open_dataset(config.dataset, config.tokenizer, config.model.vocab_size, known)


def find_resume(config: Config, request: Request) -> Resume | None:
    """The checkpoint that `resume_from_checkpoint` means; says which were rejected and why."""
    wanted = config.training.resume_from_checkpoint
    if wanted is None:
        return None
    folder = Path(config.training.checkpoint_dir)

    def differing(saved: Config) -> list[str]:
        return experiment_differences(saved, as_begun(config, request, saved))

    resume, notes = resolve_resume(wanted, folder, differing)
    console.info(*notes)
    return resume


def check_own_config(files: Sequence[str], resume: Resume) -> None:
    """Raises CheckpointError where one of `files` is the config.yaml of the resumed run, and not
    as the run saved it."""
    own = resume.run_dir / CONFIG
    if any(os.path.exists(file) and os.path.samefile(file, own) for file in files):
        check_config(resume.run_dir)


def check_fits(
    saved: dict[str, Any], resume: Resume, data: Dataset, config: Config, world_size: int
) -> list[str]:
    """Lines that tell what differs from the checkpoint; raises CheckpointError and DataError."""
    then = Config.from_dict(saved["config"])
    processes = len(saved["rng"]), world_size
    lines = check_resumable(then, config, str(resume.path), processes)
    data.check_unchanged(saved["data"])
    check_data_state(data, config, saved["cursor"], world_size)
    tokens = _epoch_tokens(data, config, saved)
    documents = not data.source.units(config.training.block_size).whole_rows
    earlier = documents and saved["cursor"]["version"] < PLAN_VERSION
    if earlier and config.training.epochs is not None:
        lines.append(
            "Its data plan is of an earlier version and goes on as it was: an epoch ends with the "
            "longest lane, and its length is estimated from the sizes in the files"
        )
    steps = [
        planned_steps(each, count, tokens, done_steps(saved))
        for each, count in ((then, len(saved["rng"])), (config, world_size))
    ]
    before = learning_rate(resume.step, then, steps[0])
    after = learning_rate(resume.step + 1, config, steps[1])
    return [*lines, f"Learning rate: {before:.2e} before, {after:.2e} from here"]
