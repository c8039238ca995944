"""`train.py --reproduce RUN`: repeats the first steps of a run here, and says whether they agree.

The losses of the first 50 steps stand in the run's log records, with hashes of the batches and the
weights: so a run can be repeated in a minute, by anybody who has its data, from its directory or
from a report page alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

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
from compare.reading.json_values import as_count
from compare.reading.original import Original, find_original
from config import DataError
from engine.hardware.device import cuda_versions
from engine.hardware.distributed import World, enter_world
from engine.monitor import console
from engine.replay.replay import TrainingLoop, in_one_process, open_replay
from engine.replay.session import NAMES, Fact, compare_facts, session_facts
from engine.run_directory.environment import describe_session
from engine.signals import StopRequest

STEPS = 50
MOST_STEPS = 200
"""Repeated of a run that has no record of its first 50 steps."""
CLOSE = 1e-5
"""The relative difference of losses up to which a run is said to be repeated: other hardware or
versions add in another order, data that differs or another option does more."""
_MOST_THREADS = 4
"""Threads per core up to which a run's number of threads is taken."""


def reproduce(word: str, stop: StopRequest, loop: TrainingLoop) -> int:
    """Repeats a run and prints what agrees; returns the exit code: 0 for equal losses and for
    losses within 1e-5, 1 for others.

    Writes nothing. loop: `train.train`. Raises DataError, CheckpointError and ConfigError for a run
    that cannot be read or built.
    """
    original = find_original(word)
    begin, end = steps_to_repeat(original)
    console.info(f"Repeating {original.name}, steps {begin + 1} to {end}, in memory")
    then = session_facts(original.environment, begin + 1)
    lines = _take_threads(as_count(then.get("threads")))
    with ExitStack() as stack:
        config = in_one_process(original.config, as_count(then.get("processes")) or 1)
        world = stack.enter_context(enter_world(config.system, config.distributed))
        facts = compare_facts(then, _facts_here(world))
        console.info(*map(str, facts), *lines)
        again = stack.enter_context(open_replay(config, original.checkpoint, world, stop, loop))
        data = Fact("data", original.fingerprint, again.fingerprint)
        console.info(str(data))
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
    console.info(console.RULE, verdict(found, done - begin, [data, *facts]))
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
    if not any(begin < step <= end for step in (*logged, *step_losses(original.records))):
        end = logged[0]
    if end > begin + MOST_STEPS:
        raise DataError(
            f"{original.name} logged nothing between step {begin} and step {end}: more than "
            f"{MOST_STEPS} steps would have to be repeated to compare one record."
        )
    return begin, end


# ---- then and here


def _facts_here(world: World) -> dict[str, Any]:
    here = describe_session(world.device_name) | {
        "processes": 1,
        "cuda": cuda_versions(world.device),
    }
    return session_facts({**here, "threads": torch.get_num_threads()}, 1)


def _take_threads(wanted: int | None) -> list[str]:
    """Has torch compute with the run's number of threads, which decides in which order sums are
    added on a CPU; returns a line where that is another one than here."""
    here = torch.get_num_threads()
    if wanted is None or wanted == here:
        return []
    if not 0 < wanted <= _MOST_THREADS * (os.cpu_count() or 1):
        return [f"{wanted} threads are too many for this machine: {here} are taken"]
    torch.set_num_threads(wanted)
    return [f"{wanted} threads are taken, as then; without that it were {here}"]


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
