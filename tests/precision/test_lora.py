"""Adapters on a frozen 4-bit model: against the formula; what is trained, kept, saved, merged."""

from __future__ import annotations

import copy
import gc
import io
import sys
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, LowPrecisionConfig
from engine.checkpoint.contents import check_plain
from engine.hardware.device import compiler_for
from engine.precision.lora import Adapter, add_lora, lora_description, merge_lora
from engine.precision.tensor_4bit import quantize
from model import build_model
from model.transformer import Transformer
from tests.model.transformers import VOCABULARY, config, small

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"bias": True, "cls_head_bias": True},
    "llama": {"n_kv_head": 2},
}
TEXT = torch.tensor(list(b"the dragon egg hatches when warm and its wings grow."))
both = pytest.mark.parametrize("name", MODELS)


def low(**options: Any) -> LowPrecisionConfig:
    return LowPrecisionConfig(**{"lora_rank": 4, **options})


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


def adapted(name: str, trained: bool = True, **options: Any) -> Transformer:
    """A small model with adapters, whose B is zero where not `trained`."""
    torch.manual_seed(0)
    model = small(name, **MODELS[name])
    add_lora(model, low(**options))
    for adapter in adapters(model) if trained else []:
        nn.init.normal_(adapter.lora_b, std=0.1)
    return model


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def plain(name: str, weights: dict[str, Tensor]) -> Transformer:
    model = cast(Transformer, build_model(config(name, **MODELS[name])))
    model.load_state_dict(weights)
    return model


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


def live_bytes() -> int:
    """Storages of all tensors that Python knows, once each."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values()
    )


@both
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("lowered", [False, True])
def test_the_first_step_computes_exactly_the_model_in_4_bits(
    name: str, kind: str, double: bool, lowered: bool
) -> None:
    torch.manual_seed(0)
    model = small(name, **MODELS[name])
    rounded = copy.deepcopy(model)
    for weight, _ in rounded.hidden_weights():
        weight.data = quantize(weight, kind, double).dequantize()
    add_lora(model, low(quantization_type=kind, use_double_quant=double))
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        assert torch.equal(model(tokens()), rounded(tokens()))


@both
def test_gradients_are_those_of_the_formula_and_only_the_adapters_get_any(name: str) -> None:
    model = adapted(name).double()
    written_out = plain(name, merge_lora(model)).double()
    matrices = []
    for adapter, (weight, _) in zip(adapters(model), written_out.hidden_weights(), strict=True):
        matrices.append([p.detach().clone().requires_grad_() for p in adapter.parameters()])
        weight.data = adapter.base().dequantize(torch.float64)
        weight.data += 16.0 / 4 * (matrices[-1][1] @ matrices[-1][0]).detach()
    torch.autograd.backward(loss_of(model, tokens()))
    torch.autograd.backward(loss_of(written_out, tokens()))
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(("lora_a", "lora_b")) for n in trained) and trained
    for adapter, (weight, _), (a, b) in zip(
        adapters(model), written_out.hidden_weights(), matrices, strict=True
    ):
        assert weight.grad is not None
        torch.testing.assert_close(adapter.lora_a.grad, 4.0 * b.T @ weight.grad)
        torch.testing.assert_close(adapter.lora_b.grad, 4.0 * weight.grad @ a.T)


def test_gradients_in_16_bits_are_near_those_in_32() -> None:
    model, gradients = adapted("gpt"), []
    for lowered in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            loss = loss_of(model, tokens())
        torch.autograd.backward(loss)
        gradients.append(
            torch.cat(
                [
                    p.grad.flatten()
                    for p in model.parameters()
                    if p.requires_grad and p.grad is not None
                ]
            )
        )
        model.zero_grad()
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@both
def test_training_lowers_the_loss_and_leaves_the_base_as_it_is(name: str) -> None:
    model = adapted(name, trained=False)
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(model, TEXT[:48].view(2, 24))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_frozen_number_takes_about_half_a_byte() -> None:
    empty = live_bytes()
    model = cast(Transformer, build_model(config("gpt", n_embd=512)))
    hidden = sum(weight.numel() for weight, _ in model.hidden_weights())
    rest = sum(p.numel() for p in model.parameters()) - hidden
    assert live_bytes() - empty >= 4 * (hidden + rest)
    add_lora(model, low())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = live_bytes() - empty - 4 * (rest + learning)
    assert 0.5 <= held / hidden <= 0.53


def test_no_dequantized_matrix_waits_for_the_backward_pass() -> None:
    model, saved = adapted("gpt"), []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, tokens())
    shapes = {adapter.shape for adapter in adapters(model)}
    assert (4, 32) in saved  # the smaller matrices that learn
    assert not shapes & {*saved} and not {s[::-1] for s in shapes} & {*saved}


@both
@pytest.mark.parametrize("double", [True, False])
def test_a_saved_model_is_loaded_bit_for_bit_into_an_unfilled_one(name: str, double: bool) -> None:
    model, file = adapted(name, use_double_quant=double), io.BytesIO()
    check_plain(model.state_dict())
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = cast(Transformer, build_model(config(name, **MODELS[name])))
    add_lora(fresh, low(use_double_quant=double), init=False)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(tokens()), model(tokens()))


@both
def test_the_merged_weights_are_those_of_a_plain_model_that_computes_the_same(name: str) -> None:
    model = adapted(name)
    merged = plain(name, merge_lora(model))
    torch.testing.assert_close(merged(tokens()), model(tokens()), atol=1e-4, rtol=1e-4)
    assert (merged(tokens()) - adapted(name, trained=False)(tokens())).abs().max() > 0.1


@both
def test_generation_with_caches_gives_the_logits_of_the_whole_text(name: str) -> None:
    model = adapted(name).eval()
    state = model.init_cache(3)
    for column in tokens().unbind(1):
        logits = model.prefill_or_decode(column[:, None], state)
    torch.testing.assert_close(logits, model(tokens())[:, -1], atol=1e-4, rtol=1e-4)


@both
def test_counts_of_work_still_know_the_matrices(name: str) -> None:
    before, after = small(name, **MODELS[name]), adapted(name)
    assert [(w.shape, n) for w, n in after.hidden_weights()] == [
        (w.shape, n) for w, n in before.hidden_weights()
    ]
    weights = sum(weight.numel() for weight, _ in before.hidden_weights())
    weights += before.embedding_and_head()[1].numel()
    saved = 2 * weights  # frozen weights have no gradients of their own
    assert after.flops_per_token(20) == before.flops_per_token(20) - saved
    assert [end.shape for end in after.embedding_and_head()] == [
        end.shape for end in before.embedding_and_head()
    ]


def test_the_line_counts_what_learns_and_what_is_frozen() -> None:
    assert lora_description(adapted("llama", quantization_type="fp4", use_double_quant=False)) == (
        "Adapters of rank 4 on 8 matrices: 4,864 trained of 30,720 frozen in fp4 (0.56 bytes each)"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_compiled_adapters_compute_the_same() -> None:
    if compiler_for(torch.device("cpu")) is None:
        pytest.skip("no compiler")
    adapter, x = adapters(adapted("gpt"))[0], torch.randn(7, 32)
    with torch.no_grad():
        y = torch.compile(adapter.forward)(x, x, None)
        torch.testing.assert_close(y, adapter(x, x, None))
    torch.compiler.reset()


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"low_precision\.lora_rank=4.*model\.name=bdh"):
        add_lora(build_model(config("bdh")), low())


def test_a_rank_beyond_a_matrix_is_refused_before_anything_is_changed() -> None:
    model = small("gpt")
    with pytest.raises(ConfigError, match=r"lora_rank=33 is more .*c_attn\.weight, 96 x 32\. .*32"):
        add_lora(model, low(lora_rank=33))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", [True, False])
def test_without_bitsandbytes_the_install_command_is_given(
    monkeypatch: pytest.MonkeyPatch, init: bool
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install 'bitsandbytes"):
        add_lora(small("gpt"), low(), init)
