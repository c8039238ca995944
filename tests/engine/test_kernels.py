"""Which kernels a run computes with, and what it says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config import Config, ConfigError
from engine import kernels
from engine.kernels import check_kernels, choose_kernels
from model.bdh import BDH
from tests.conftest import ROOT
from tests.engine.planned_runs import configured
from tests.model.bdh_reference import small_bdh

CUDA = torch.device("cuda", 0)
FITTING = {"n_embd": 64, "n_head": 2, "mlp_internal_dim_multiplier": 8}


@pytest.fixture(autouse=True)
def a_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def asking_for(option: str, **low_precision: Any) -> Config:
    return configured(system={"kernels": option}, low_precision=low_precision)


def chosen(option: str, **model: int) -> tuple[BDH, list[str]]:
    bdh = small_bdh(**{**FITTING, **model})
    return bdh, choose_kernels(bdh, asking_for(option), CUDA)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels(asking_for("triton"), CUDA)
    with pytest.raises(ConfigError, match="computes on cpu, and Triton needs a CUDA device"):
        check_kernels(asking_for("triton"), torch.device("cpu"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Triton is not installed. Set system.kernels"):
        check_kernels(asking_for("triton"), CUDA)
    for option in ("auto", "torch"):
        check_kernels(asking_for(option), torch.device("cpu"))


def test_triton_computes_where_it_is_asked_for_and_shapes_fit() -> None:
    model, lines = chosen("triton")
    assert model.triton and lines == ["Kernels: Triton"]
    model, lines = chosen("torch")
    assert not model.triton and lines == ["Kernels: torch (system.kernels=torch)"]
    model, lines = chosen("triton", n_embd=48)
    assert not model.triton
    assert lines == ["Kernels: torch (Triton kernels take n_embd 64, 128, 256 or 512, not 48)"]
    model, lines = chosen("triton", n_head=16)
    assert not model.triton and "multiples of 128 neurons per head, not 32" in lines[0]


def test_auto_takes_triton_only_on_gpus_with_a_measured_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, lines = chosen("auto")
    assert model.triton == ("NVIDIA H200" in kernels.MEASURED_DEVICES)
    monkeypatch.setattr(kernels, "MEASURED_DEVICES", ("NVIDIA A100",))
    model, lines = chosen("auto")
    assert not model.triton and "takes Triton's only on GPUs where they were" in lines[0]
    monkeypatch.setattr(kernels, "MEASURED_DEVICES", ("NVIDIA H200",))
    assert chosen("auto")[0].triton
    config = asking_for("auto", use_fp8=True)
    assert choose_kernels(small_bdh(**FITTING), config, CUDA) == [
        "Kernels: torch (Triton's do not compute 8-bit matmuls)"
    ]


def test_every_measured_gpu_has_its_table() -> None:
    tables = {path.stem.casefold() for path in (ROOT / "bench/results").glob("gpu-*.md")}
    for device in kernels.MEASURED_DEVICES:
        name = device.removeprefix("NVIDIA ").replace(" ", "-").casefold()
        assert f"gpu-{name}" in tables, device


def test_without_cuda_there_is_no_choice_to_tell_of() -> None:
    model = small_bdh(**FITTING)
    assert choose_kernels(model, asking_for("auto"), torch.device("cpu")) == []
    assert not model.triton
