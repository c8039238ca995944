"""How a process is set up for a GPU, and what must compute the same there in other pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import engine.optim.adamw_4bit
import engine.optim.muon
from engine.hardware.device import cuda_versions
from engine.optim.adamw_4bit import AdamW4bit
from engine.optim.muon import Muon
from engine.optim.quantized_moments import NOISE_SPAN, noise
from tests.conftest import ROOT
from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.runs import assert_equal, run_here

pytestmark = gpu_tests
CPU = torch.device("cpu")

PROBE = """
import json, torch
from engine.hardware.device import prepare_device
last = torch.device("cuda", torch.cuda.device_count() - 1)
prepare_device(last)
torch.ones(1, device="cuda")
settings = torch.cuda.memory._snapshot()["allocator_settings"]
print(json.dumps([settings["expandable_segments"], torch.cuda.current_device() == last.index]))
"""


@cuda_only
@pytest.mark.slow
def test_segments_can_grow_and_the_device_asked_for_is_the_current_one() -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True]


@cuda_only
def test_the_versions_of_cuda_libraries_are_known() -> None:
    found = cuda_versions(DEVICE)
    assert found["cuda"] and found["cudnn"] and "." in str(found["capability"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bdh", "gpt", "llama"])
def test_an_interrupted_run_equals_the_uninterrupted_bit_for_bit(
    name: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "bdh":
        config = Path(tiny[0])
        config.write_text(config.read_text().replace(", mlp_internal_dim_multiplier: 4", ""))
    words = [f"model.name={name}", f"device={DEVICE}", f"checkpoint_dir={tmp_path}"]
    code = run_here([*tiny, *words, "dropout=0.1", "compile=false", "--check-resume=4"])
    assert code == 0, capsys.readouterr().out


def test_the_noise_of_rounding_is_that_of_a_cpu() -> None:
    found = noise(2 * NOISE_SPAN + 128, (3, 7, NOISE_SPAN), DEVICE)
    assert torch.equal(found.cpu(), noise(2 * NOISE_SPAN + 128, (3, 7, NOISE_SPAN), CPU))


def test_the_4_bit_optimizer_makes_the_same_step_in_chunks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for spans in (1, 32):
        monkeypatch.setattr(engine.optim.adamw_4bit, "CUDA_CHUNK", spans * NOISE_SPAN)
        draw = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(1100, 1001, generator=draw).to(DEVICE))
        parameter.grad = torch.randn(1100, 1001, generator=draw).to(DEVICE)
        optimizer = AdamW4bit([{"params": [parameter]}], (0.9, 0.95), 1e-8)
        optimizer.step()
        optimizer.step()
        found.append((parameter.detach(), optimizer.state[parameter]))
    assert_equal(found[0], found[1], "chunks")


def test_muon_moves_matrices_together_as_it_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(batch: int) -> Tensor:
        monkeypatch.setattr(engine.optim.muon, "CUDA_BATCH", batch)
        draw = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.zeros(96, 64, device=DEVICE)) for _ in range(5)]
        for weight in weights:
            weight.grad = torch.randn(96, 64, generator=draw).to(DEVICE)
        Muon([{"params": weights, "matrices": 2, "lr": 1.0}], (0.9, 0.95), 1e-8).step()
        return torch.stack([weight.detach() for weight in weights])

    alone = moved(0)
    assert (moved(2**25) - alone).norm() < 0.02 * alone.norm()  # products in 16 bits
