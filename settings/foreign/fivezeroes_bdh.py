"""The YAML of fivezeroes/bdh, a trainer of BDH whose first config has our own names.

Its later ones have a scheduler, tokenizers and TensorBoard. `max_iters`, `log_freq`, `test_freq`
and `checkpoint_freq` count micro-steps there (its loop takes one batch per turn), the scheduler's
`warmup_steps` and `T_max` count optimizer steps.
"""

from __future__ import annotations

from typing import Any, Literal

from settings.foreign.draft import Draft, assignments
from settings.values import to_text

TRAINER = "fivezeroes/bdh"
# names that only its files have: one of them makes a file one of its own
MARKS = (
    *("scheduler.type", "tensorboard.enabled", "tokenizer.type", "training.runs_dir"),
    *("training.compile_model", "dataset.val_split", "dataset.val_batches"),
)
_COUNTED = ("max_iters", "log_freq", "test_freq", "checkpoint_freq")  # of section training
_SCHEDULER = (
    *("type", "warmup_steps", "warmup_type", "min_lr", "T_max"),
    *("gamma", "patience", "factor", "threshold"),
)
_Tokenizers = Literal["byte", "tiktoken", "huggingface", "sentencepiece"]
_Schedulers = Literal["none", "cosine", "linear", "exponential", "plateau"]


def recognises(draft: Draft) -> bool:
    """Returns whether a file has a name that only this trainer's files have."""
    return any(map(draft.has, MARKS))


def translate(draft: Draft) -> None:
    """Turns its tokenizer, schedule and counts into ours; plain renamings are aliases."""
    draft.ignore(
        [f"tensorboard.log_{name}" for name in ("dir", "gradients", "weights", "scheduler_state")],
        "event files go into the run's directory, without histograms",
    )
    _translate_tokenizer(draft)
    if draft.has_section("schedule"):
        draft.refuse_rest("scheduler", (), "section schedule sets the rate too. Keep one of them")
    else:
        _translate_schedule(draft)
        draft.refuse_rest("scheduler", _SCHEDULER)
    _count_optimizer_steps(draft)
    constants = {"optimizer.beta2": 0.999, "optimizer.grad_clip": 0.0}
    draft.fill(constants, "its AdamW has torch's betas, and it does not clip gradients")


def _translate_tokenizer(draft: Draft) -> None:
    """A type and a name are one name here; the vocabulary is the tokenizer's, whatever is said."""
    draft.ignore(
        [f"tokenizer.{name}_token_id" for name in ("pad", "eos", "bos")],
        "a tokenizer knows its own, and there nothing reads them",
    )
    line = "tokenizer.type"
    kind = draft.take(line, _Tokenizers)
    if kind is None:
        return
    given = draft.take("tokenizer.name", str | None)
    name = "bytes" if kind == "byte" else given or "gpt2"
    remedy = "Take tokenizer.name=gpt2, a Hugging Face name or the path of a tokenizer.json"
    if kind == "sentencepiece":
        draft.refuse(line, f"{line}=sentencepiece cannot be read. {remedy}", ["tokenizer.name"])
    elif kind == "tiktoken" and name != "gpt2":
        text = f"tokenizer.name={to_text(name)} of tiktoken cannot be read, only gpt2. {remedy}"
        draft.refuse(line, text, ["tokenizer.name"])
    else:
        draft.put("tokenizer.name", name, like=line)
        said = f"{line}={kind}" + (f" and name={to_text(given)}" if given else "")
        draft.notes.append(f"{said} is read as tokenizer.name={to_text(name)}")
    size = draft.peek("model.vocab_size")
    if draft.has("model.vocab_size") and size is not None and (kind, size) != ("byte", 256):
        draft.put("model.vocab_size", None)
        draft.notes.append(f"model.vocab_size={size} gives way to the tokenizer's, as there: null")


def _translate_schedule(draft: Draft) -> None:
    """A rate without a scheduler is constant; with one it begins and ends where that says."""
    kind = draft.take("scheduler.type", _Schedulers)
    ours: dict[str, Any] = {"schedule.decay_lr": False, "schedule.warmup_iters": 0}
    said = f"scheduler.type={kind}" if kind else "no scheduler"
    if kind not in (None, "none"):
        warmup = draft.take("scheduler.warmup_steps", int, 0)
        period = draft.take("scheduler.T_max", int | None)
        floor = draft.take("scheduler.min_lr", float, 0.0)
        ours = {"schedule.warmup_iters": warmup, "schedule.min_lr": floor}
        steps, accumulated = draft.peek("training.max_iters") or 1, _accumulation(draft)
        if kind in ("cosine", "linear"):
            ours["schedule.name"] = kind
        if kind == "cosine" and period is not None:
            ours["schedule.lr_decay_iters"] = end = warmup + period
            said += f" with warmup_steps + T_max = {end}"
            if end < steps // accumulated:
                draft.notes.append(f"after {end} steps the rate stays low; there it rises again")
        elif kind == "linear" and accumulated > 1:
            # It ends at its max_iters, which counts micro-steps, in optimizer steps.
            ours["schedule.lr_decay_iters"] = steps
    if kind in ("exponential", "plateau"):
        text = (
            f"scheduler.type={kind} is not available. Take another with schedule.name=cosine, "
            "linear or wsd, or schedule.decay_lr=false for a constant rate"
        )
        draft.refuse("scheduler.type", text, ["schedule.name", "schedule.decay_lr"])
        said = "the rest of scheduler"
    for key, value in ours.items():
        draft.put(key, value, like="scheduler.type")
    draft.notes.append(f"{said} is read as {assignments(ours)}")
    draft.ignore([f"scheduler.{name}" for name in _SCHEDULER], "no part of this schedule here")


def _count_optimizer_steps(draft: Draft) -> None:
    """Its counts of micro-steps, in optimizer steps; its defaults are ours."""
    accumulated = _accumulation(draft)
    theirs = {name: draft.peek(f"training.{name}") for name in _COUNTED}
    if accumulated == 1:
        return
    ours = {name: max(1, count // accumulated) for name, count in theirs.items() if count}
    for name, count in ours.items():
        draft.put(f"training.{name}", count)
    draft.notes.append(
        f"{assignments(theirs)} count micro-steps there, {accumulated} to an optimizer step: "
        f"{assignments(ours)}"
    )


def _accumulation(draft: Draft) -> int:
    return int(draft.peek("training.gradient_accumulation_steps") or 1)
