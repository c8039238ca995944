"""The public reference's layout of a BDH, and its rotation frequencies, which are weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import BDHConfig, Config, LowPrecisionConfig, ModelConfig
from engine.checkpoint.export import description, write_export
from engine.checkpoint.trained_model import open_model
from engine.precision.weights_4bit import QuantizedWeights, unique_tensors
from engine.trainer import Trainer
from model import build_model
from model.bdh import BDH, from_upstream, to_upstream
from model.bdh.tiling import Tiling, rope_frequencies
from tests.model.test_bdh_dense import PlainProjections
from tests.runs import assert_same_run, only_run, run_here

LAYERS, WIDTH, HEADS, NEURONS = 3, 8, 2, 16
SIZES = {
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "mlp_internal_dim_multiplier": HEADS * NEURONS // WIDTH,
    "vocab_size": 256,
}
SHAPE = BDHConfig(**SIZES, dropout=0.0)
USUAL = rope_frequencies(NEURONS)
PERMUTED = USUAL[torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])]
CASES = {
    "doubled": 2 * USUAL,
    "permuted": PERMUTED,
    "merged of two": rope_frequencies(NEURONS // 2).repeat(2),
}


def upstream(frequencies: Tensor) -> dict[str, Tensor]:
    """Random weights, larger than a new model's, under the reference's names."""
    draw = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.3

    return {
        "encoder": weights(HEADS, WIDTH, NEURONS),
        "encoder_v": weights(HEADS, WIDTH, NEURONS),
        "decoder": weights(HEADS * NEURONS, WIDTH),
        "embed.weight": weights(256, WIDTH),
        "lm_head": weights(WIDTH, 256),
        "attn.freqs": frequencies.float().repeat_interleave(2).view(1, 1, 1, NEURONS),
    }


def reference_logits(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The definition in float64 on whole tensors; neurons 2i and 2i + 1 are a pair."""
    w = {name: value.double() for name, value in state.items()}

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,))

    T = tokens.shape[1]
    angles = torch.arange(T).double()[:, None] * w["attn.freqs"].flatten() * 2 * math.pi
    x = norm(w["embed.weight"][tokens])[:, None]  # (B, 1, T, D)
    for _ in range(LAYERS):
        s = (x @ w["encoder"]).relu()
        across = torch.stack((-s[..., 1::2], s[..., ::2]), -1).flatten(-2)
        r = s * angles.cos() + across * angles.sin()
        a = norm((r @ r.mT).tril(-1) @ x)
        z = s * (a @ w["encoder_v"]).relu()
        y = z @ w["decoder"].view(HEADS, NEURONS, WIDTH)
        x = norm(x + norm(y.sum(1, keepdim=True)))
    return x[:, 0] @ w["lm_head"]


def tokens(length: int) -> Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))


def of_upstream(state: dict[str, Tensor]) -> BDH:
    return from_upstream(state, SHAPE).double().eval()


@pytest.mark.parametrize("case", CASES)
def test_every_path_computes_with_the_frequencies_of_the_file(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, text = upstream(CASES[case]), tokens(33)
    expected, model = reference_logits(state, text), of_upstream(state)
    found = {"whole": model(text)}
    for cut in (Tiling(8, 1, 3, True), Tiling(33, 2, 8, False), Tiling(5, 2, 1, False)):
        with monkeypatch.context() as patch:
            patch.setattr(Tiling, "of", lambda *_, cut=cut: cut)
            found[f"{cut}"] = model(text)
    model.projections = PlainProjections
    found["dense"] = model(text)
    model.projections = None
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6, msg=name)
    cache = model.init_cache(2)
    for piece in torch.split(text, [9, 1, 1, 12, 1, 9], 1):  # in parallel, and one by one
        last = model.prefill_or_decode(piece, cache)
    torch.testing.assert_close(last, expected[:, -1], rtol=1e-6, atol=1e-6)
    usual = reference_logits(upstream(USUAL), text)
    assert (expected - usual).abs().max() > 1e-2  # they matter


def test_weights_and_frequencies_survive_exports_casts_and_the_way_back(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(**SIZES, dropout=0.0))  # type: ignore[arg-type]
    state = upstream(PERMUTED)
    model = build_model(config)
    assert isinstance(model, BDH)
    model.load_state_dict(from_upstream(state, SHAPE).state_dict())
    back = to_upstream(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, back[name]) for name, value in state.items())
    weights = {
        "plain": unique_tensors(model),
        "bnb4": QuantizedWeights(model, LowPrecisionConfig()).packed_tensors(),
    }
    for name, kept in weights.items():
        write_export(tmp_path / name, kept, description(config, {"kind": "bytes"}))
        again = open_model(tmp_path / name, "cpu")[0]
        assert torch.equal(again.state_dict()["frequencies"], PERMUTED.float().double())
    text = tokens(12)
    before = model(text)
    model.to(torch.bfloat16)
    assert model.frequencies.dtype is torch.float64
    torch.testing.assert_close(model(text).float(), before, rtol=0.2, atol=0.2)


def test_the_exact_values_of_a_new_model_come_back_from_its_float32_export() -> None:
    model = BDH(SHAPE)
    again = from_upstream(to_upstream(model), SHAPE)
    assert torch.equal(again.frequencies, model.frequencies)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_the_prefixes_of_compiled_and_distributed_models_are_removed(prefix: str) -> None:
    state = upstream(PERMUTED)
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    assert torch.equal(of_upstream(wrapped)(tokens(5)), of_upstream(state)(tokens(5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.ones(1)}, "no weight of an upstream BDH: extra"),
        ({"decoder": None}, "lack decoder"),
        ({"encoder": torch.ones(4, 4, 16)}, r"encoder: expected \(2, 8, 16\), found \(4, 4, 16\)"),
        ({"lm_head": torch.full((WIDTH, 256), torch.nan)}, "lm_head: holds NaN or infinite"),
        ({"attn.freqs": torch.full((1, 1, 1, NEURONS), torch.inf)}, "freqs: holds NaN or inf"),
        ({"attn.freqs": torch.ones(1, HEADS, 1, NEURONS)}, r"freqs: expected \(1, 1, 1, 16\)"),
        (
            {"attn.freqs": torch.arange(NEURONS).view(1, 1, 1, -1) / NEURONS},
            "neurons 0 and 1 are a pair and have two frequencies",
        ),
    ],
)
def test_what_no_upstream_bdh_holds_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    state = {key: value for key, value in (upstream(USUAL) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_upstream(state, SHAPE)


@pytest.mark.slow
def test_a_checkpoint_without_frequencies_resumes_bit_for_bit_and_samples(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, "checkpoint_freq=2", "test_freq=null", "max_iters=4"]
    assert run_here([*words, f"checkpoint_dir={tmp_path / 'whole'}"]) == 0
    written = Trainer.state_dict

    def without(self: Trainer) -> dict[str, Any]:
        state = written(self)
        del state["model"]["frequencies"]
        return state

    parts = f"checkpoint_dir={tmp_path / 'parts'}"
    with monkeypatch.context() as patch:  # as earlier versions saved it
        patch.setattr(Trainer, "state_dict", without)
        assert run_here([*words, parts]) == 0
    run = only_run(tmp_path / "parts")
    model = open_model(run, "cpu")[0]
    assert torch.equal(model.state_dict()["frequencies"], rope_frequencies(32))
    assert run_here([*words, parts, f"resume_from_checkpoint={run / 'checkpoint_2.pt'}"]) == 0
    assert_same_run(only_run(tmp_path / "whole"), run, step=4)
