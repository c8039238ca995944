"""Adapters on a frozen 4-bit model: against the formula; what is trained, kept, saved, merged."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import ConfigError, LowPrecisionConfig
from engine.checkpoint.contents import check_plain
from engine.hardware.device import compiler_for
from engine.precision.lora import LoraLinear, apply_lora, lora_description, merge_lora
from engine.precision.tensor_4bit import quantize
from model import LanguageModel
from tests.precision.conftest import build, gradients_of, loss_of, saved_and_loaded

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"n_embd": 32, "bias": True, "cls_head_bias": True},
    "llama": {"n_embd": 32, "n_kv_head": 2},
}
TEXT = torch.tensor(list(b"the dragon egg hatches when warm and its wings grow."))
TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
both = pytest.mark.parametrize("name", MODELS)


def low(**options: Any) -> LowPrecisionConfig:
    return LowPrecisionConfig(**{"lora_rank": 4, **options})


def plain(name: str) -> LanguageModel:
    return build(name, **MODELS[name])


def adapted(name: str, trained: bool = True, **options: Any) -> LanguageModel:
    """A small model with adapters, whose B is zero where not `trained`."""
    model = plain(name)
    assert apply_lora(model, low(**options))
    for linear in linears(model) if trained else []:
        nn.init.normal_(linear.adapter.lora_b, std=0.1)
    return model


def linears(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def live_bytes() -> int:
    """Storages of all tensors that Python knows, once each."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    sizes: dict[int, int] = {}
    for tensor in found:
        storage = tensor.untyped_storage()
        with contextlib.suppress(RuntimeError):  # of torch 2.11's compiler, without memory
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@both
@pytest.mark.parametrize("lowered", [False, True])
def test_the_first_step_computes_exactly_the_model_in_4_bits(name: str, lowered: bool) -> None:
    for kind, double in (("nf4", True), ("fp4", False)):
        rounded = plain(name)
        for weight, _ in rounded.hidden_weights():
            weight.data = quantize(weight, kind, double).dequantize()
        model = adapted(name, trained=False, quantization_type=kind, use_double_quant=double)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            assert torch.equal(model(TOKENS), rounded(TOKENS))


@both
def test_gradients_are_those_of_the_formula_and_only_the_adapters_get_any(name: str) -> None:
    model, written_out = adapted(name).double(), plain(name).double()
    written_out.load_state_dict(merge_lora(model))
    for linear, (weight, _) in zip(linears(model), written_out.hidden_weights(), strict=True):
        a, b = (p.detach() for p in linear.adapter.parameters())
        weight.data = linear.adapter.base().dequantize(torch.float64) + 16.0 / 4 * (b @ a)
    for each in (model, written_out):
        torch.autograd.backward(loss_of(each, TOKENS))
    trained = gradients_of(model).keys()
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad} != set()
    assert all(n.endswith(("lora_a", "lora_b")) for n in trained)
    for linear, (weight, _) in zip(linears(model), written_out.hidden_weights(), strict=True):
        assert weight.grad is not None
        a, b = linear.adapter.lora_a, linear.adapter.lora_b
        torch.testing.assert_close(a.grad, 4.0 * b.detach().T @ weight.grad)
        torch.testing.assert_close(b.grad, 4.0 * weight.grad @ a.detach().T)


def test_gradients_in_16_bits_are_near_those_in_32() -> None:
    model, found = adapted("gpt"), []
    for lowered in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            loss = loss_of(model, TOKENS)
        torch.autograd.backward(loss)
        found.append(torch.cat([gradient.flatten() for gradient in gradients_of(model).values()]))
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


@both
def test_training_lowers_the_loss_and_leaves_the_base_as_it_is(name: str) -> None:
    model = adapted(name, trained=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(model, TEXT[:48].view(2, 24))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_a_frozen_number_takes_about_half_a_byte() -> None:
    empty = live_bytes()
    model = build("gpt", n_embd=512)
    hidden = sum(weight.numel() for weight, _ in model.hidden_weights())
    rest = sum(p.numel() for p in model.parameters()) - hidden
    assert live_bytes() - empty >= 4 * (hidden + rest)
    apply_lora(model, low())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = live_bytes() - empty - 4 * (rest + trained)
    assert 0.5 <= held / hidden <= 0.53


def test_no_dequantized_matrix_waits_for_the_backward_pass() -> None:
    model, saved = adapted("gpt"), set()

    def note(tensor: Tensor) -> Tensor:
        saved.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, TOKENS)
    shapes = {linear.adapter.shape for linear in linears(model)}
    assert (4, 32) in saved  # the smaller matrices that are trained
    assert not shapes & saved and not {shape[::-1] for shape in shapes} & saved


@both
@pytest.mark.parametrize("double", [True, False])
def test_a_saved_model_loads_bit_for_bit_and_merges_into_a_plain_one(
    name: str, double: bool
) -> None:
    model = adapted(name, use_double_quant=double)
    check_plain(model.state_dict())
    linear = next(n for n, module in model.named_modules() if isinstance(module, LoraLinear))
    assert f"{linear}.adapter.codes" in model.state_dict()  # names that checkpoints have
    fresh, merged = plain(name), plain(name)
    apply_lora(fresh, low(use_double_quant=double), init=False)
    fresh.load_state_dict(saved_and_loaded(model.state_dict()))
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    merged.load_state_dict(merge_lora(model))
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert (merged(TOKENS) - adapted(name, trained=False)(TOKENS)).abs().max() > 0.1


@both
def test_generation_with_caches_gives_the_logits_of_the_whole_text(name: str) -> None:
    model = adapted(name).eval()
    cache = model.init_cache(3)
    for column in TOKENS.unbind(1):
        logits = model.prefill_or_decode(column[:, None], cache)
    torch.testing.assert_close(logits, model(TOKENS)[:, -1], atol=1e-4, rtol=1e-4)


@both
def test_counts_of_work_still_know_the_hidden_weights(name: str) -> None:
    before, after = plain(name), adapted(name)
    shapes = [[(w.shape, n) for w, n in each.hidden_weights()] for each in (before, after)]
    assert shapes[0] == shapes[1]
    heads = before.embedding_and_head()[1].numel()
    saved = 2 * (sum(weight.numel() for weight, _ in before.hidden_weights()) + heads)
    # Frozen weights have no gradients of their own.
    assert after.flops_per_token(20) == before.flops_per_token(20) - saved


def test_the_description_counts_what_is_trained_and_what_is_frozen() -> None:
    model = adapted("llama", quantization_type="fp4", use_double_quant=False)
    line = (
        "Adapters of rank 4 on 8 matrices: 4,864 trained of 30,720 frozen in fp4 (0.56 bytes each)"
    )
    assert lora_description(model) == line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_compiled_adapters_compute_the_same() -> None:
    if compiler_for(torch.device("cpu")) is None:
        pytest.skip("no compiler")
    linear, x = linears(adapted("gpt"))[0], torch.randn(7, 32)
    with torch.no_grad():
        y = torch.compile(linear.adapter.forward)(x, None)
        torch.testing.assert_close(y, linear.adapter(x, None))
    torch.compiler.reset()


def test_what_cannot_have_adapters_is_refused_before_anything_is_changed() -> None:
    for name, rank, message in (
        ("bdh", 4, r"low_precision\.lora_rank=4.*model\.name=bdh"),
        ("gpt", 33, r"lora_rank=33 is more .*c_attn\.weight, 96 x 32\. .*32"),
    ):
        model = build(name, n_embd=32)
        with pytest.raises(ConfigError, match=message):
            apply_lora(model, low(lora_rank=rank))
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", [True, False])
def test_without_bitsandbytes_the_install_command_is_given(
    without_bitsandbytes: None, init: bool
) -> None:
    with pytest.raises(ConfigError, match="pip install 'bitsandbytes"):
        apply_lora(plain("gpt"), low(), init)
