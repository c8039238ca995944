"""The command that prepare.py proposes next: a training run that fits the size of the text."""

from __future__ import annotations

from pathlib import Path

from data.preparation.token_writer import TokenOutput

# Without a config file a run is GPT-2's, which takes days. Texts below these sizes are too small
# for it, and would be learned by heart.
_MAX_QUICKSTART_TOKENS, _MAX_TINYSTORIES_TOKENS = 50_000_000, 1_000_000_000


def train_on_parquet(folder: Path, text_bytes: int) -> str:
    """Returns a training command for a folder of parquet files (of bytes, as tokens)."""
    recipe = "configs/quickstart.yaml " if text_bytes < _MAX_QUICKSTART_TOKENS else ""
    return f"python train.py {recipe}dataset.parquet_dir={folder}"


def train_on_tokens(output: TokenOutput, tokens: int) -> str:
    """Returns a training command for token files."""
    if _MAX_QUICKSTART_TOKENS <= tokens < _MAX_TINYSTORIES_TOKENS:
        # The preset names files of its own, so both are given.
        paths = _paths(output)
        no_val = "" if "val_data_path" in paths else " val_data_path=null"
        recipe = "configs/cs336-tinystories.yaml vocab_size=null"
        return f"python train.py {recipe} {paths}{no_val}"
    recipe = "configs/quickstart.yaml " if tokens < _MAX_QUICKSTART_TOKENS else ""
    is_in_data = output.path.parent == Path("data") and len(output.targets) == 2
    if is_in_data and output.ending == ".bin":
        return f"python train.py {recipe}dataset={output.path.name}"
    return f"python train.py {recipe}{_paths(output)}"


def _paths(output: TokenOutput) -> str:
    targets = list(output.targets.values())
    if output.is_single:
        # A second single file, named as held-out text is, goes with the train file beside it.
        train = output.path.with_name(f"train{output.path.suffix}")
        if output.path.stem in ("val", "valid", "validation", "test") and train.exists():
            targets = [train, output.path]
    names = ("train_data_path", "val_data_path")
    return " ".join(f"{name}={path}" for name, path in zip(names, targets, strict=False))
