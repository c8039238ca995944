"""What is known before a model is built: the text, where the run begins, the whole config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from config import Config, Request, eval_batch, micro_batch
from data import Dataset, index_sources, open_dataset
from data.factory import SourceIndex
from data.loading.order import PLAN_VERSION
from data.preparation import stdlib_corpus
from data.run_data import check_data_continues, missing_corpus
from engine.checkpoint.resume_rules import (
    adapt_to_world_size,
    check_resumable,
    keep_evaluation_batch,
)
from engine.hardware.distributed import World
from engine.monitor import console
from engine.planning.batch_size import with_batch
from engine.planning.summary import (
    origin_lines,
    planned_steps,
    planned_tokens,
    resolve_text_column,
    resolve_vocab_size,
    source_lines,
)
from engine.schedule import learning_rate
from engine.setup.initial_weights import check_tokenizer
from engine.setup.starting_point import StartingPoint, check_own_config, find_starting_point

EVAL_BATCH = 8  # with `training.batch_size: auto`, on every machine: all evaluate the same rows


@dataclass(frozen=True)
class RunSetup:
    """The whole config of a run, its dataset, and where it begins."""

    request: Request
    """As given, with the model's shape and vocabulary: what the run directory keeps."""
    config: Config
    """The same, with the micro-steps of this many processes."""
    dataset: Dataset
    start: StartingPoint

    epoch_tokens: int
    """Tokens of one pass over the training text, as the run that goes on counts them; 0 for a
    mixture, whose sources end theirs at different steps."""
    source_tokens: dict[str, int]
    """Tokens that the run has behind it of each source of a mixture."""
    done: tuple[int, int]
    """Steps and tokens that the run has behind it: (0, 0) for a new one."""

    def planned_steps(self, world: World) -> int:
        """Optimizer steps of the whole run, those before a resume included."""
        return planned_steps(self.config, world.size, self.epoch_tokens, self.done)

    def source_lines(self, world: World) -> list[str]:
        """Returns what the run reads of each source of a mixture, as lines; [] without one."""
        config = self.config
        if not config.dataset.mixture:
            return []
        left = planned_tokens(config, world.size, self.planned_steps(world), self.done)
        sources, block_size = self.dataset.sources, config.training.block_size
        return source_lines(sources, block_size, left - self.done[1], self.source_tokens)

    def with_batch(self, batch: int) -> RunSetup:
        """Returns the setup with a number in the place of `training.batch_size: auto`."""
        kept = with_batch(self.request.config, batch, EVAL_BATCH)
        return replace(
            self,
            config=with_batch(self.config, batch, EVAL_BATCH),
            request=replace(self.request, config=kept),
        )


def prepare_run(request: Request, world: World) -> RunSetup:
    """Finds where the run begins, opens its text and resolves its config; says what it found.

    Raises ConfigError, DataError and CheckpointError: all that a user can have wrong is found here,
    before anything large is allocated.
    """
    console.info(*origin_lines(request))
    start = find_starting_point(request, world)
    # One process builds what is missing, lists files and reads footers: the others would ask a
    # server for the same, and might see files that came in between.
    indexes = world.on_main(partial(index_data, start.config, start.saved.get("data", {})))
    with world.main_first():  # the main process copies and counts; the others find both done
        options = start.config.tokenizer, start.config.model.vocab_size, start.tokenizer
        dataset = open_dataset(start.config.dataset, *options, indexes=indexes)
        data_lines = dataset.lines()
    console.info(*data_lines)
    if start.weights is not None and start.tokenizer is None:
        check_tokenizer(request, dataset.tokenizer, start.weights)
    config, column_lines = resolve_text_column(start.config, dataset)
    config, lines = resolve_vocab_size(config, dataset.vocab_size, dataset.tokenizer.name)
    console.info(*column_lines, *start.lines, *lines)
    if start.resume is None:
        request = replace(request, config=config)
    else:
        request, config = _resumed(replace(request, config=config), dataset, start, world)
    return RunSetup(
        request=request,
        config=config,
        dataset=dataset,
        start=start,
        epoch_tokens=_epoch_tokens(dataset, config, start),
        source_tokens=_source_tokens(start),
        done=done_steps(start),
    )


def _resumed(
    request: Request, dataset: Dataset, start: StartingPoint, world: World
) -> tuple[Request, Config]:
    """Returns what the run directory keeps and the config of a run that goes on, after checking
    that it can."""
    assert start.resume is not None and start.saved_config is not None
    config, saved_config = request.config, start.saved_config
    if config.training.batch_size == "auto":
        config = _batch_as_before(config, saved_config, world)
    config, lines = keep_evaluation_batch(config, saved_config)
    request = replace(request, config=config)
    check_own_config(request.files, start.resume)
    processes = len(start.saved["rng"])
    config, more = adapt_to_world_size(config, saved_config, processes, world.size)
    path = start.resume.path
    began = f"Forked from {path}" if start.is_fork else f"Resumed from {path.name}"
    lines += [f"{began}: {start.resume.step} steps done", *more]
    console.info(*lines, *check_fits(start, dataset, config, world.size))
    return request, config


def done_steps(start: StartingPoint) -> tuple[int, int]:
    """Returns the steps and tokens that a checkpoint has behind it; (0, 0) without one."""
    return (start.saved["train"]["step"], start.saved["train"]["tokens"]) if start.saved else (0, 0)


def _epoch_tokens(dataset: Dataset, config: Config, start: StartingPoint) -> int:
    # A run that an earlier version began goes on in that version's order of the data.
    if config.dataset.mixture:
        return 0
    version = start.saved["cursor"]["version"] if start.saved else PLAN_VERSION
    return dataset.epoch_tokens(config.training.block_size, version)


def _source_tokens(start: StartingPoint) -> dict[str, int]:
    sources = start.saved["cursor"].get("sources", []) if start.saved else []
    rows = sum(source["rows"] for source in sources)
    tokens = done_steps(start)[1]
    return {source["name"]: tokens * source["rows"] // max(1, rows) for source in sources}


def _batch_as_before(config: Config, saved: Config, world: World) -> Config:
    """Returns the config with the evaluated rows of the checkpoint and, where this many processes
    can have it, its micro-batch: another one rounds differently."""
    micro_step = micro_batch(saved) * config.training.block_size * world.size
    fits = (config.training.tokens_per_step or 0) % micro_step == 0
    found = with_batch(config, micro_batch(saved), eval_batch(saved))
    return found if fits else replace(config, training=replace(found.training, batch_size="auto"))


def index_data(config: Config, saved: Mapping[str, Any]) -> dict[str, SourceIndex]:
    """Returns the index of each source of parquet files. The embedded corpus is built where it is
    missing. saved: the data of the checkpoint that the run goes on from."""
    folder = missing_corpus(config)
    if folder is not None:
        console.info(f"{folder} is missing: building it from the Python standard library...")
        built = stdlib_corpus.build(folder)
        size = f"{built.documents} files of source, {built.bytes / 1e6:.1f} MB"
        console.info(f"{size}, {built.seconds:.1f}s")
    return index_sources(config.dataset, saved)


def check_fits(
    start: StartingPoint, dataset: Dataset, config: Config, world_size: int
) -> list[str]:
    """Returns what differs from the checkpoint, as lines; raises CheckpointError and DataError
    where the run cannot go on."""
    assert start.resume is not None and start.saved_config is not None
    saved, before = start.saved, start.saved_config
    path, processes = str(start.resume.path), len(saved["rng"])
    lines = check_resumable(before, config, path, processes, world_size)
    dataset.check_unchanged(saved["data"])
    check_data_continues(dataset, config, saved["cursor"], world_size)
    each = (source.dataset.segments(config.training.block_size) for source in dataset.sources)
    documents = any(not segments.whole_rows for segments in each)
    earlier = documents and saved["cursor"]["version"] < PLAN_VERSION
    if earlier and config.training.epochs is not None:
        lines.append(
            "Its data plan is of an earlier version and goes on as it was: an epoch ends with the "
            "longest lane, and its length is estimated from the sizes in the files"
        )
    tokens = _epoch_tokens(dataset, config, start)
    steps = [
        planned_steps(each, count, tokens, done_steps(start))
        for each, count in ((before, processes), (config, world_size))
    ]
    rate_before = learning_rate(start.resume.step, before, steps[0])
    rate_after = learning_rate(start.resume.step + 1, config, steps[1])
    return [*lines, f"Learning rate: {rate_before:.2e} before, {rate_after:.2e} from here"]
