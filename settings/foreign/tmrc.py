"""TMRC's YAML (KempnerInstitute/tmrc): its names are aliases, its code's habits are here."""

from __future__ import annotations

from settings.foreign.draft import Draft

TRAINER = "TMRC"
# What only its files say in sections; two sections of them make a file one of its own.
_MARKS = {
    "datasets": ("name", "path", "tokenizer_used"),
    "model": ("d_model", "dropout_p", "context_length", "autocast_precision", "flash", "flex"),
    "optimizer": ("lr", "betas", "precision"),
    "training": ("train_steps", "artifacts_path", "val_interval"),
}


def recognises(draft: Draft) -> bool:
    """Returns whether a file speaks TMRC's language; it trains nothing but a GPT."""
    found = [
        section
        for section, names in _MARKS.items()
        if any(draft.has(f"{section}.{name}") for name in names)
    ]
    return len(found) >= 2 and draft.peek("model.name") == "gpt"


def translate(draft: Draft) -> None:
    """States what TMRC's code does and its files do not say."""
    draft.fill({"model.tie_embeddings": False}, "its head has weights of its own")
    if not draft.has_section("schedule"):
        constant = {"schedule.decay_lr": False, "schedule.warmup_iters": 0}
        draft.fill(constant, "its learning rate is constant")
    draft.fill({"optimizer.grad_clip": 0.0}, "it does not clip gradients")
    draft.fill({"training.checkpoint_freq": None}, "it saves by training.save_every alone")
