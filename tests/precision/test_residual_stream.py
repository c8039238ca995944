"""The residual stream of GPT and Llama in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from config import LowPrecisionConfig, schema
from engine.hardware.device import supports_fast_bfloat16
from engine.precision.precision import Precision
from model.transformer import Transformer
from tests.precision.conftest import build, gradients_of

CPU = torch.device("cpu")
NARROW = LowPrecisionConfig(use_4bit=False, residual_dtype="bfloat16")
BOTH = pytest.mark.parametrize("name", ["gpt", "llama"])


def step(
    name: str, low_precision: LowPrecisionConfig
) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    """Returns loss, gradients and the types of the stream between blocks."""
    model = build(name)
    precision = Precision(low_precision, CPU)
    precision.prepare(model, 10)
    types = set[torch.dtype]()

    def look(_: nn.Module, arguments: tuple[Tensor, object]) -> None:
        types.add(arguments[0].dtype)

    assert isinstance(model, Transformer)
    for block in model.blocks:
        block.register_forward_pre_hook(look)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    with precision.autocast():
        loss = model(tokens[:, :-1], None, tokens[:, 1:])
    precision.backward(loss)
    return loss.detach(), gradients_of(model), types


@BOTH
def test_a_narrow_stream_gives_nearly_the_same_loss_and_gradients(name: str) -> None:
    if not supports_fast_bfloat16(CPU):
        pytest.skip("this CPU has no bfloat16")
    loss, gradients, types = step(name, NARROW)
    expected, others, usual = step(name, LowPrecisionConfig(use_4bit=False))
    assert (types, usual) == ({torch.bfloat16}, {torch.float32})
    assert loss == pytest.approx(expected.item(), rel=2e-3) and loss != expected
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), others[key].flatten(), dim=0)
        assert cosine > 0.99, key


def test_without_bfloat16_the_stream_stays_in_float32_aloud(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.precision.precision.supports_fast_bfloat16", lambda device: False)
    model = build("gpt")
    assert Precision(NARROW, CPU).prepare(model, 10) == [
        "low_precision.residual_dtype=bfloat16: float32, as products are float32"
    ]
    assert model.residual_dtype is None


def test_a_resumed_run_changes_the_stream_only_where_its_checkpoint_is_named() -> None:
    assert schema().options["low_precision.residual_dtype"].on_resume == "explicit"
