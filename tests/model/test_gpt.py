"""GPT against its definition, nanoGPT's names, its switches, its caches and its own counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from model import attention as layers
from model.attention import capacity
from model.generate import Sampling, generate
from model.gpt import GPT
from tests.model.transformers import (
    BLOCK,
    VOCABULARY,
    check_parity,
    fed,
    slow_attention,
    small,
    some_documents,
    step,
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


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_all_kinds_of_attention_agree(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    tokens, documents = torch.randint(VOCABULARY, (3, BLOCK)), some_documents(3, BLOCK)
    model = small(name)
    found = []
    for kind in ("auto", "flex", "math", *(() if masked else ("flash",))):
        model.config = ModelConfig(**{**as_options(model.config), "attention": kind})
        logits = model(tokens, documents if masked else None)
        found.append((logits, *step(model, logits, tokens).values()))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


def as_options(model_config: ModelConfig) -> dict[str, Any]:
    return asdict(model_config)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_blocks_of_flex_attention_hide_what_the_boolean_mask_hides(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        layers, "_flex_attention", lambda: flex_attention
    )  # its definition, which is slow
    documents = some_documents(2, 160) if masked else None
    q, k, v = torch.randn(4, 160, 8).expand(2, 4, 160, 8), *torch.randn(2, 2, 2, 160, 8)
    blocks = layers._block_mask(documents, (2, 160), q.device)
    flex = layers.attention(q, k, v, layers.AttentionMask("flex", is_causal=False, blocks=blocks))
    bias = layers.training_mask("auto", q, (2, 160), documents, 0.0)
    torch.testing.assert_close(flex, layers.attention(q, k, v, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only")
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_flex_attention_on_a_gpu_equals_the_mask(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).cuda()
    tokens, documents = torch.randint(VOCABULARY, (3, BLOCK)), some_documents(3, BLOCK)
    tokens, documents = tokens.cuda(), documents.cuda()
    found = []
    for kind in ("flex", "math"):
        model.config = ModelConfig(**{**as_options(model.config), "attention": kind})
        logits = model(tokens, documents)
        found.append((logits, *step(model, logits, tokens).values()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("attention", ["auto", "math"])
def test_a_document_sees_nothing_of_its_neighbours(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = small(name, attention=attention)
    tokens = torch.randint(VOCABULARY, (1, 12))
    documents = torch.tensor([[0] * 5 + [7] * 7])
    other = tokens.clone()
    other[:, :5] = 3
    torch.testing.assert_close(model(tokens, documents)[:, 5:], model(other, documents)[:, 5:])
    assert not torch.allclose(model(tokens)[:, 5:], model(other)[:, 5:])


@pytest.mark.parametrize("name", ["gpt", "llama"])
@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 11), seed=st.integers(0, 1000))
def test_later_tokens_never_change_earlier_logits(name: str, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = small(name)
    tokens = torch.randint(VOCABULARY, (1, 12))
    other = torch.cat((tokens[:, :cut], torch.randint(VOCABULARY, (1, 12 - cut))), 1)
    torch.testing.assert_close(model(tokens)[:, :cut], model(other)[:, :cut])


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("name, options", [("gpt", {"bias": True}), ("llama", {"n_kv_head": 2})])
@settings(deadline=None, max_examples=15)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=9).filter(lambda p: sum(p) <= BLOCK),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_any_pieces_give_the_logits_of_the_whole(
    name: str, options: dict[str, Any], attention: str, pieces: list[int], batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = small(name, attention=attention, **options)
    tokens = torch.randint(VOCABULARY, (batch, sum(pieces)))
    torch.testing.assert_close(fed(model, tokens, pieces), model(tokens)[:, -1].detach())


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_cached_generation_equals_the_uncached(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    text = torch.randint(VOCABULARY, (1, 5))
    drawn = generate(model, text, Sampling(temperature=0.0), (None, None))
    cached = torch.stack(list(islice(drawn, BLOCK - 5)))
    for following in cached:
        expected = model(text)[:, -1].argmax(-1)
        assert following.tolist() == expected.expand(2).tolist()
        text = torch.cat((text, expected[:, None]), 1)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_generation_keeps_no_gradient_and_drops_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = small(name, dropout=0.5).train()
    tokens = torch.randint(VOCABULARY, (2, 9))
    before = torch.get_rng_state()
    trained = fed(model, tokens, [4, 1, 4])
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(trained, model.eval()(tokens)[:, -1].detach())


@pytest.mark.parametrize("lowered", [True, False], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_generation_works_in_bfloat16(name: str, lowered: bool) -> None:
    torch.manual_seed(0)
    model = small(name)
    tokens = torch.randint(VOCABULARY, (2, 9))
    expected = fed(model, tokens, [5, 1, 1, 2])
    model = model.bfloat16() if lowered else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not lowered):
        logits = fed(model, tokens, [5, 1, 1, 2]).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_caches_take_the_memory_they_say_and_grow_rarely(name: str) -> None:
    model = small(name)
    if isinstance(model, GPT):
        model = GPT(model.config, 300)
    state, rooms = model.init_cache(2), set()
    for length in range(1, 281):
        model.prefill_or_decode(torch.zeros(2, 1, dtype=torch.long), state)
        parts = [each for cache in state for each in (cache.keys, cache.values)]
        taken = sum(part.numel() * part.element_size() for part in parts if part is not None)
        assert taken == 2 * model.cache_bytes(length)
        rooms.add(taken)
    assert len(rooms) == 4  # 64, 128, 256, and 300 or 512


def test_a_cache_has_room_for_no_more_than_there_are_positions() -> None:
    assert [capacity(n, 100) for n in (1, 64, 65, 100)] == [64, 64, 100, 100]
    assert capacity(65, None) == 128


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


@pytest.mark.parametrize("switch, endings", BIASES.items(), ids=BIASES)
def test_each_switch_adds_its_own_biases_only(switch: str, endings: tuple[str, ...]) -> None:
    found = {name for name, _ in gpt(**{switch: True}).named_parameters() if "bias" in name}
    assert found and all(name.endswith(endings) for name in found)
    assert {ending for ending in endings if any(name.endswith(ending) for name in found)} == set(
        endings
    )


def test_bias_switches_all_but_the_heads_and_each_can_be_left_out() -> None:
    every = {name for name, _ in gpt(bias=True).named_parameters() if "bias" in name}
    assert len(every) == 2 * 6 + 1 and "lm_head.bias" not in every
    without = gpt(bias=True, mlp_bias=False)
    left = {name for name, _ in without.named_parameters() if "bias" in name}
    assert {name.split(".", 3)[3] for name in every - left} == set(BIASES["mlp_bias"])


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


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    layers, heads, width, count = SIZES[name]
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


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt", {"bias": True}),
        ("gpt", {"tie_embeddings": False, "mlp_scale_factor": 3}),
        ("llama", {}),
        ("llama", {"n_kv_head": 1, "d_ff": 40}),
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(name: str, options: dict[str, Any]) -> None:
    model = small(name, attention="math", **options)
    tokens = torch.randint(VOCABULARY, (2, BLOCK))
    with FlopCounterMode(display=False) as counter:
        step(model, model(tokens), tokens)
    counted = counter.get_total_flops() / tokens.numel()
    assert model.flops_per_token(BLOCK) == pytest.approx(counted, rel=0.01)


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


def test_dropped_probabilities_keep_their_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    whole = layers.attention(q, k, v, layers.training_mask("math", q, (1, 6), None, 0.0))
    sight = layers.training_mask("auto", q, (1, 6), None, 0.3)
    mean = sum(layers.attention(q, k, v, sight) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.06)


def test_causal_attention_makes_no_mask() -> None:
    x = torch.zeros(1)
    assert layers.training_mask("auto", x, (2, 1 << 20), None, 0.0).bias is None
    assert layers.decoding_mask("auto", x, 1, 1 << 20).bias is None
    assert layers.decoding_mask("auto", x, 1 << 20, 1 << 20).bias is None


def test_a_run_is_told_where_attention_is_not_as_asked() -> None:
    assert gpt().notes(True) == gpt(attention="flex").notes(False) == []
    assert gpt(dropout=0.1).notes(True) == gpt(attention="flash", dropout=0.1).notes(False) == []
    assert gpt(attention="flex").notes(True) == [
        "model.attention=flex runs on CUDA only; here masked products take its place"
    ]
    assert gpt(attention="flex", dropout=0.1).notes(False) == [
        "model.attention=flex has no dropout; with model.dropout=0.1 masked products take its "
        "place in training"
    ]
    assert "has no dropout on a CPU" in gpt(attention="flash", dropout=0.1).notes(True)[0]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_one_batch_is_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = small(name, mask="causal_document"), torch.randint(VOCABULARY, (4, 17))
    documents = some_documents(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(tokens[:, :-1], documents[:, :-1])
        targets = tokens[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2


def test_matrices_are_the_hidden_ones_and_say_how_many_are_stacked() -> None:
    model = gpt(bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: count for parameter, count in model.hidden_weights()}
    parts = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1}
    assert found == {
        f"transformer.h.{n}.{part}.weight": count for n in range(2) for part, count in parts.items()
    }


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_transformer_has_no_silent_neurons_to_tell_of(name: str) -> None:
    assert small(name).activation_sparsity(torch.zeros(1, 3, dtype=torch.long)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_compiled_steps_equal_eager_ones_in_few_graphs(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, documents = small(name), some_documents(5, BLOCK)
    tokens = torch.randint(VOCABULARY, (5, BLOCK))
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for batch in (3, 2, 5, 4):
        for numbers in (None, documents[:batch]):
            model.compile(disable=True)
            expected = model(tokens[:batch], numbers)
            gradients = step(model, expected, tokens[:batch])
            model.compile(backend="aot_eager")  # what inductor does with it is torch's to test
            logits = model(tokens[:batch], numbers)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            found = step(model, logits, tokens[:batch])
            torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
    assert counted["unique_graphs"] - before <= 4
    assert set(model.state_dict()) == set(small(name).state_dict())
