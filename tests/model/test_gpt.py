"""GPT against its definition, nanoGPT's names, its switches and its own counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from config import ModelConfig
from model.gpt import GPT
from tests.model.transformers import (
    BLOCK,
    VOCABULARY,
    check_parity,
    slow_attention,
    small,
    some_documents,
)

SIZES = {  # n_layer, n_head, n_embd of the published models, and their parameters
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
}


def gpt(**options: Any) -> GPT:
    return cast(GPT, small("gpt", **options))


def slow_logits(model: Any, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """The definition, from the weights by their names."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    H, act = model.config.n_head, ACTIVATIONS[model.config.activation]

    def linear(x: Tensor, name: str) -> Tensor:
        y: Tensor = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        return y

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y: Tensor = scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)
        return y

    rows = []
    for b, row in enumerate(tokens):
        T = len(row)
        x = weights["transformer.wte.weight"][row] + weights["transformer.wpe.weight"][:T]
        for layer in range(model.config.n_layer):
            name = f"transformer.h.{layer}"
            parts = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
            q, k, v = (part.reshape(T, H, -1) for part in parts)
            y = slow_attention(q, k, v, None if documents is None else documents[b])
            x = x + linear(y, f"{name}.attn.c_proj")
            y = act(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
            x = x + linear(y, f"{name}.mlp.c_proj")
        rows.append(linear(norm(x, "transformer.ln_f"), "lm_head"))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_logits_and_gradients_equal_the_definition(attention: str, documents: bool) -> None:
    torch.manual_seed(0)
    numbers = some_documents(2, 11) if documents else None
    check_parity(gpt(attention=attention, bias=True), slow_logits, numbers)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu", "mlp_scale_factor": 2, "cls_head_bias": True},
        {"activation": "gelu_tanh", "tie_embeddings": False, "attn_bias": True},
    ],
    ids=str,
)
def test_options_follow_the_definition(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    check_parity(gpt(**options), slow_logits, None)


def test_more_tokens_than_positions_are_refused_with_both_numbers() -> None:
    model = gpt()
    tokens = torch.zeros(1, BLOCK + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="25 tokens, but this GPT has learned 24 positions"):
        model(tokens)
    state = model.init_cache(1)
    model.prefill_or_decode(tokens[:, :BLOCK], state)
    with pytest.raises(ValueError, match="25 tokens"):
        model.prefill_or_decode(tokens[:, :1], state)


BIASES = {
    "ln_bias": ("ln_1.bias", "ln_2.bias", "ln_f.bias"),
    "attn_bias": ("attn.c_attn.bias",),
    "proj_bias": ("attn.c_proj.bias",),
    "mlp_bias": ("mlp.c_fc.bias", "mlp.c_proj.bias"),
    "cls_head_bias": ("lm_head.bias",),
}


def test_each_kind_of_bias_has_a_switch_and_bias_sets_all_but_the_heads() -> None:
    def biases(**options: Any) -> set[str]:
        return {name for name, _ in gpt(**options).named_parameters() if "bias" in name}

    for switch, endings in BIASES.items():
        found = biases(**{switch: True})
        assert {ending for ending in endings for name in found if name.endswith(ending)} == set(
            endings
        )
        assert all(name.endswith(endings) for name in found)
    every = biases(bias=True)
    assert len(every) == 2 * 6 + 1 and "lm_head.bias" not in every
    left_out = every - biases(bias=True, mlp_bias=False)
    assert {name.split(".", 3)[3] for name in left_out} == set(BIASES["mlp_bias"])


def test_names_are_those_of_nanogpt() -> None:
    layer = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [f"transformer.h.{n}.{part}" for n in range(2) for part in layer]
    expected = {
        f"{m}.{kind}" for m in [*modules, "transformer.ln_f"] for kind in ("weight", "bias")
    }
    expected |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    state = gpt(bias=True).state_dict()
    assert set(state) == expected
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    assert state["transformer.h.0.mlp.c_fc.weight"].shape == (128, 32)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = gpt(), gpt(tie_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == VOCABULARY * 32
    tied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.transformer.wte.weight


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    for layers, heads, width, count in SIZES.values():
        shape = ModelConfig(
            name="gpt", n_layer=layers, n_head=heads, n_embd=width, vocab_size=50257, bias=True
        )
        with torch.device("meta"):
            model = GPT(shape, 1024)
        assert sum(p.numel() for p in model.parameters()) == count


def test_weights_are_drawn_as_gpt_2_draws_them() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 128, "vocab_size": 256}
    shape = ModelConfig(name="gpt", bias=True, tie_embeddings=False, **sizes)  # type: ignore[arg-type]
    for name, p in GPT(shape, 64).named_parameters():
        assert p.dtype == torch.float32 and p.requires_grad
        if p.dim() == 1:
            assert torch.equal(p.detach(), torch.full_like(p, float(name.endswith("weight"))))
            continue
        std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
        assert abs(p.mean().item()) < 0.05 * std and abs(p.std().item() / std - 1) < 0.05, name


def test_equal_seeds_draw_equal_weights_whenever_they_are_drawn() -> None:
    torch.manual_seed(3)
    model = GPT(small("gpt").config, 8)
    torch.manual_seed(5)
    model.init_weights()
    first = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    second = GPT(model.config, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second.parameters(), strict=True))


def test_dropout_acts_in_training_only_on_embedding_probabilities_and_branches() -> None:
    torch.manual_seed(0)
    model, tokens = gpt(dropout=0.5), torch.randint(VOCABULARY, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    shares: list[float] = []

    def noted(x: Tensor, share: float) -> Tensor:
        shares.append(share)
        return x

    with pytest.MonkeyPatch.context() as patch:
        for module in ("attention", "transformer", "gpt"):
            patch.setattr(f"model.{module}.dropout", noted)
        model.train()(tokens)
    assert shares == [0.5] * (1 + 2 * 3)


def test_matrices_are_the_hidden_ones_and_say_how_many_are_stacked() -> None:
    model = gpt(bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: count for parameter, count in model.hidden_weights()}
    parts = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1}
    assert found == {
        f"transformer.h.{n}.{part}.weight": count for n in range(2) for part, count in parts.items()
    }
