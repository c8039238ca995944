"""`train.py --reproduce RUN`: repeats the first steps of a run here, and says whether they agree.

The losses of the first 50 steps stand in the run's log records, with hashes of the batches and the
weights: so a run can be repeated in a minute, by anybody who has its data, from its directory or
from a report page alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compare.parting import (
    BATCHES,
    RATE,
    Agreement,
    Parting,
    compare_records,
    log_records,
    step_losses,
)
from compare.reading.original import Original, find_original
from config import DataError
from engine.hardware.device import cuda_versions
from engine.monitor import console
from engine.replay.replay import TrainingLoop, open_replay
from engine.replay.session import NAMES, Fact, compare_facts, session_facts
from engine.replay.start import start_with
from engine.run_directory.environment import describe_session
from engine.signals import StopRequest
from engine.trainer import Trainer

STEPS = 50
CLOSE = 1e-5
"""The relative difference of losses up to which a run is said to be repeated: other hardware or
versions add in another order, data that differs or another option does more."""


def reproduce(word: str, stop: StopRequest, loop: TrainingLoop) -> int:
    """Repeats a run and prints what agrees; returns the exit code: 0 for equal losses and for
    losses within 1e-5, 1 for others.

    Writes nothing. loop: `train.train`. Raises DataError, CheckpointError and ConfigError for a run
    that cannot be read or built.
    """
    original = find_original(word)
    begin, end = steps_to_repeat(original)
    console.info(f"Repeating {original.name}, steps {begin + 1} to {end}, in memory")
    first = original.config, original.environment, begin + 1
    with open_replay(start_with(*first, original.checkpoint, begin), stop, loop) as again:
        facts = _facts(original, begin + 1, again.trainer)
        console.info(*map(str, facts))
        stop.training_started = True
        with again.trainer.reporter.live:
            done = again.advance_to(end)
    if stop:
        console.info("Stopped: nothing is known of the steps that are left.")
        return stop.exit_code
    # The first record after a checkpoint may begin before it: with the records before, that is so
    # in both.
    before = [record for record in original.records if record["step"] <= begin]
    records = [*before, *again.logged_after(log_records(original.records))]
    found = compare_records(original.records, records, after=begin)
    console.info(console.RULE, verdict(found, done - begin, facts))
    return 0 if is_close(found) else 1


def steps_to_repeat(original: Original) -> tuple[int, int]:
    """Returns the step after which a repetition begins, and its last step.

    These are `STEPS`, or fewer where the run has no more; or more where it logged none of them.
    Raises DataError where there is nothing to compare with.
    """
    begin = original.step
    logged = [step for step in log_records(original.records) if step > begin]
    if not logged:
        raise DataError(f"{original.name} has no log record after step {begin} to compare with.")
    end = min(begin + STEPS, logged[-1])
    told = (*logged, *step_losses(original.records))
    return begin, end if any(begin < step <= end for step in told) else logged[0]


def _facts(original: Original, step: int, trainer: Trainer) -> list[Fact]:
    """Returns what the run computed with, and what the repetition does; the data first."""
    here = describe_session(trainer.world.device_name) | {
        "processes": 1,
        "cuda": cuda_versions(trainer.world.device),
        "threads": torch.get_num_threads(),
    }
    fingerprint = str(trainer.data.identity()["data"]["fingerprint"])
    then, now = session_facts(original.environment, step), session_facts(here, 1)
    return [Fact("data", original.fingerprint, fingerprint), *compare_facts(then, now)]


# ---- the verdict


def is_close(found: Agreement) -> bool:
    """Returns whether the same rows gave the same losses, but for rounding."""
    parting = found.parting
    same_work = parting is None or not parting.values.keys() & {BATCHES, RATE}
    return same_work and found.losses > 0 and found.largest <= CLOSE


def verdict(found: Agreement, steps: int, facts: Sequence[Fact]) -> str:
    """Returns the closing line: whether a repetition agrees, else the first difference and its
    likely cause."""
    if found.parting is None:
        return (
            f"Bit for bit: {steps} steps agree in {found.losses} losses and {found.records} "
            f"records ({found.evidence})."
        )
    cause = _likely_cause(found.parting, facts)
    if is_close(found):
        apart = f"the largest relative difference of a loss is {found.largest:.1e}"
        return f"Within 1e-5: {apart}, at step {found.largest_step}. {cause}"
    return f"Different from {found.parting} (then and now). {cause}"


def _likely_cause(parting: Parting, facts: Sequence[Fact]) -> str:
    data, *others = facts
    differing = [fact for fact in others if fact.may_cause]
    if parting.batches_differ and data.differs:
        return f"Likely cause: other data (fingerprint then {data.then}, now {data.now})."
    if parting.batches_differ:
        differing = [fact for fact in differing if fact.name == NAMES["git"]]
        if not differing:
            return "Likely cause: text that was changed behind an equal fingerprint."
    if differing:
        named = "; ".join(f"{fact.name} (then {fact.then}, now {fact.now})" for fact in differing)
        return f"Likely cause: {named}."
    device = next((fact.now for fact in others if fact.name == "device"), "")
    if device.startswith("cuda"):
        return "Likely cause: a GPU does not add in the same order each time."
    if any(fact.now.endswith("-dirty") for fact in others):
        return "Likely cause: changes of the code that were not committed, then or now."
    return "The cause is unknown: whatever the run recorded of its machine and data is as then."
