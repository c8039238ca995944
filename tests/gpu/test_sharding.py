"""Sharded training with NCCL: the run of DDP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.engine.test_distributed import torchrun
from tests.gpu.devices import DEVICE, ON_CUDA, gpu_tests
from tests.runs import only_run

pytestmark = [
    *gpu_tests,
    pytest.mark.slow,
    pytest.mark.skipif(ON_CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
COMMON = ["n_layer=2", "n_embd=64", "n_head=4", "block_size=32", "batch_size=4", "max_iters=6"]
COMMON += ["log_freq=1", "test_freq=6", "eval_iters=3", "tokens_per_step=512", "dropout=0"]
MODELS = {
    "gpt": ["model.name=gpt", "compile=true"],
    "llama": ["model.name=llama", "recompute=layer"],
    "bdh": ["mlp_internal_dim_multiplier=8", "optimizer.name=muon"],
}


@pytest.mark.parametrize("name", MODELS)
def test_sharded_runs_are_those_of_ddp(name: str, corpus_dir: Path, tmp_path: Path) -> None:
    found = []
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        words = [*COMMON, *MODELS[name], f"strategy={strategy}", f"device={DEVICE}"]
        words += [f"checkpoint_dir={folder}", f"parquet_dir={os.fspath(corpus_dir)}"]
        child = torchrun(2, words)
        output, _ = child.communicate()
        assert child.returncode == 0, output
        lines = (only_run(folder) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        found.append([record["train/loss"] for record in records if "train/loss" in record])
    assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], abs=2e-3)
