"""Weights of other programs and of own runs: opened by what is in them, trained on, sampled."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import export
import sample
from config import CheckpointError, ModelConfig
from data.sources.tokens.meta import open_tokenizer
from engine.checkpoint.trained_model import load_model, open_model
from engine.setup.initial_weights import open_weights
from model import pretrained
from model.gpt import GPT
from tests.conftest import write_corpus
from tests.model.test_bdh_upstream import PERMUTED, reference_logits, tokens, upstream
from tests.model.test_pretrained import (
    nanogpt_weights,
    published_weights,
    write_nanogpt,
    write_published,
)
from tests.runs import assert_equal, only_run, run_here
from tests.settings.test_seeds import here as here

pytestmark = pytest.mark.slow  # each trains, or loads weights

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 2, 16, 4, 24, 40
SHAPE = {"n_layer": 3, "n_embd": 8, "n_head": 2, "mlp_internal_dim_multiplier": 4}


class BDHConfig:
    """Pickled by the class's name, as fivezeroes/bdh does with its own."""

    def __init__(self, **values: int) -> None:
        vars(self).update(values)


def fivezeroes(state: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint in that project's layout; its optimizer does not matter here."""
    config = BDHConfig(**SHAPE, vocab_size=256)
    return {"step": 500, "model_state_dict": state, "loss": 1.5, "config": config}


def cs336() -> dict[str, Tensor]:
    """Random weights under the course's names."""
    draw = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.3

    state = {"token_embeddings.weight": weights(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        parts = {f"attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        parts |= {"ffn.w1": (INNER, WIDTH), "ffn.w2": (WIDTH, INNER), "ffn.w3": (INNER, WIDTH)}
        for name, shape in parts.items():
            state[f"layers.{layer}.{name}.weight"] = weights(*shape)
        for name in ("ln1", "ln2"):
            state[f"layers.{layer}.{name}.weight"] = 1 + weights(WIDTH)
    state["ln_final.weight"] = 1 + weights(WIDTH)
    return state | {"lm_head.weight": weights(VOCABULARY, WIDTH)}


def cs336_logits(state: dict[str, Tensor], text: Tensor) -> Tensor:
    """Their Transformer, by the handout's formulas, one head at a time, in float64."""
    w = {name.removesuffix(".weight"): value.double() for name, value in state.items()}

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    T, d = text.shape[1], WIDTH // HEADS
    angles = torch.outer(torch.arange(T), 10000.0 ** -(torch.arange(0, d, 2).double() / d))
    turn = torch.polar(torch.ones_like(angles), angles)  # neighbours are a pair

    def rope(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = w["token_embeddings"][text]
    hidden = torch.ones(T, T).triu(1).bool()
    for number in range(LAYERS):
        h = f"layers.{number}"
        y = norm(x, w[f"{h}.ln1"])
        q, k, v = (y @ w[f"{h}.attn.{name}_proj"].T for name in ("q", "k", "v"))
        heads = []
        for own in (slice(i * d, (i + 1) * d) for i in range(HEADS)):
            scores = rope(q[..., own]) @ rope(k[..., own]).mT / math.sqrt(d)
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., own])
        x = x + torch.cat(heads, -1) @ w[f"{h}.attn.output_proj"].T
        y = norm(x, w[f"{h}.ln2"])
        x = x + (F.silu(y @ w[f"{h}.ffn.w1"].T) * (y @ w[f"{h}.ffn.w3"].T)) @ w[f"{h}.ffn.w2"].T
    return norm(x, w["ln_final"]) @ w["lm_head"].T


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": value for name, value in state.items()}


def write_upstream(folder: Path) -> Path:
    folder.mkdir()
    save_file(upstream(PERMUTED), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 256}))
    return folder


@pytest.mark.parametrize("kind", ["bare", "wrapped", "compiled", "object", "folder", "safetensors"])
def test_a_bdh_of_other_programs_opens_with_its_own_numbers(kind: str, tmp_path: Path) -> None:
    state, path = upstream(PERMUTED), tmp_path / "weights.pt"
    if kind == "folder":
        path = write_upstream(tmp_path / "out")
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        contents: dict[str, Any] = {"bare": state, "wrapped": {"model": state}}
        contents["compiled"] = {"model_state_dict": prefixed(state)}
        torch.save((contents | {"object": fivezeroes(state)})[kind], path)
    if kind in ("object", "folder"):  # they tell the number of layers
        model, config, _ = open_model(path, "cpu")
        assert config.model.n_layer == 3
    else:
        assert "n_layer" in open_weights(os.fspath(path), {}).source
        assert load_model(path)[1].model.n_layer == 6  # the reference's default
        (tmp_path / "config.json").write_text('{"n_layer": 3}')
        model, config, _ = open_model(path, "cpu")
    with torch.no_grad():
        logits = model(tokens(20)).double()
    torch.testing.assert_close(logits, reference_logits(state, tokens(20)), rtol=1e-4, atol=1e-4)


def test_a_class_in_a_checkpoint_is_not_looked_up_and_one_of_a_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "checkpoint_500.pt", tmp_path / "other.pt"
    content = fivezeroes(upstream(PERMUTED))
    torch.save(content, path)
    torch.save(content | {"scaler": Path("x")}, other)
    monkeypatch.delattr("tests.settings.test_foreign.BDHConfig")
    assert open_weights(os.fspath(path), {}).options["n_layer"] == 3
    with pytest.raises(CheckpointError, match=r"Python object \(pathlib.*Save the weights"):
        pretrained.read(os.fspath(other))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_transformer_of_cs336_gives_the_logits_of_its_handout(
    wrapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, path = cs336(), tmp_path / "checkpoint_iter_500.pt"
    content = {"model": prefixed(state), "optimizer": {"state": {}}, "iteration": 500}
    torch.save(content if wrapped else state, path)
    assert sample_of(path) == 3
    assert (
        "does not tell the number of heads. Set model.n_head, or write" in capsys.readouterr().err
    )
    (tmp_path / "config.json").write_text(f'{{"num_heads": {HEADS}}}')
    model, config = load_model(path)
    text = torch.arange(22).view(2, 11) % VOCABULARY
    with torch.no_grad():
        logits = model(text).double()
    torch.testing.assert_close(logits, cs336_logits(state, text), rtol=1e-4, atol=1e-5)
    assert (config.model.name, config.model.d_ff, config.model.n_head) == ("llama", INNER, HEADS)


def sample_of(path: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py", os.fspath(path), "--max-new-tokens=5", *words])
        return sample.main()


def test_sample_export_and_evaluate_open_nanogpts_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = trained_elsewhere(here)
    path = here / "out" / "ckpt.pt"
    for given in (path, path.parent):
        found, config, spec = open_model(given, "cpu")
        assert_equal(dict(found.state_dict()), dict(model), "model")
        assert open_tokenizer(spec).fingerprint == tokenizer
        assert sample_of(given, "--prompt=dragon") == 0
    assert capsys.readouterr().out.startswith("dragon")
    assert export.main([os.fspath(path), "exported"]) == 0
    assert sample_of(here / "exported", "--prompt=dragon") == 0
    words = ["dataset.name=dragon", "device=cpu", "batch_size=4", f"init_from={path}"]
    assert run_here([*words, "eval_only=true", "eval_iters=2"]) == 0
    said = capsys.readouterr().out
    assert "training.block_size: 16, the positions of the weights" in said
    assert "Val loss: " in said


def trained_elsewhere(here: Path) -> tuple[dict[str, Tensor], str]:
    """out/ckpt.pt as nanoGPT would leave it after training on data/dragon."""
    meta = json.loads((here / "data/dragon/meta.json").read_text())
    torch.manual_seed(0)
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": meta["vocab_size"]}
    state = GPT(ModelConfig(name="gpt", **arguments, bias=False), 16).state_dict()
    content = {
        "model": state,
        "optimizer": {"state": {}},
        "model_args": arguments | {"block_size": 16, "bias": False, "dropout": 0.0},
        "iter_num": 3,
        "config": {"dataset": "dragon"},
    }
    (here / "out").mkdir()
    torch.save(content, here / "out" / "ckpt.pt")
    return state, open_tokenizer(meta["tokenizer"]).fingerprint


def test_nanogpts_checkpoint_starts_a_run_which_then_continues_in_nanogpts_way(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_elsewhere(here)
    words = ["dataset.name=dragon", "device=cpu", "block_size=16", "batch_size=4", "test_freq=null"]
    assert run_here([*words, "init_from=resume", "checkpoint_dir=out"]) == 3
    said = capsys.readouterr().err
    assert "training.init_from=out/ckpt.pt starts a new run with its weights, from step 0" in said
    assert "without its optimizer moments" in said
    start = [*words, "checkpoint_dir=next", "max_iters=3"]
    assert run_here([*start, "init_from=out/ckpt.pt"]) == 0
    run = only_run(here / "next")
    assert "n_layer: 2" in (run / "config.yaml").read_text()
    # resumed, the weights' file is not needed any more
    (here / "out" / "ckpt.pt").unlink()
    saved = [f"resume_from={run}", "max_iters=5"]
    assert run_here([os.fspath(run / "config.yaml"), *saved]) == 0
    capsys.readouterr()
    # in nanoGPT's way too, with a config that does not tell the shape
    assert run_here([*words, "init_from=resume", "checkpoint_dir=next", "max_iters=6"]) == 0
    assert "Starting training from iteration 5..." in capsys.readouterr().out
    assert "init_from: out/ckpt.pt" in (run / "config.yaml").read_text()
    assert (run / "checkpoint_6.pt").exists()


@pytest.mark.parametrize(("name", "place"), [("bdh", "."), ("llama", "checkpoint_1.pt")])
def test_a_run_of_ones_own_is_trained_on_with_other_data(
    name: str, place: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["n_layer=2", "n_head=2", "n_embd=16", f"model.name={name}"]
    shape += ["mlp_internal_dim_multiplier=4"] if name == "bdh" else []
    common = ["block_size=16", "batch_size=4", "device=cpu", "test_freq=null", "use_4bit=false"]
    words = [*shape, *common, "dataset.name=dragon", "max_iters=1", "checkpoint_dir=first"]
    assert run_here(words) == 0
    source = only_run(here / "first") / place
    write_corpus(here / "other", documents=60, seed=5)
    words = [*common, "dataset.parquet_dir=other", "learning_rate=1e-12", f"init_from={source}"]
    assert run_here([*words, "max_iters=1", "checkpoint_dir=next"]) == 0
    then, _, tokenizer = open_model(source, "cpu")
    now, config, same = open_model(here / "next", "cpu")
    assert (config.model.name, config.tokenizer.name, same) == (name, "char", tokenizer)
    after = now.state_dict()
    for key, value in then.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-9)
    assert run_here([*words, "max_iters=2", "checkpoint_dir=next", "resume_from=auto"]) == 0
    assert "1 steps done" in capsys.readouterr().out


REFUSED = [
    ("model.n_layer=5", "has n_layer 2, and model.n_layer=5; leave it out"),
    ("n_layer=6", "has n_layer 2, and model.n_layer=6"),  # the default, but asked for
    ("model.name=llama", "has name gpt, and model.name=llama"),
    ("model.vocab_size=300", "has vocab_size 256, and model.vocab_size=300"),
    ("block_size=64", "has learned 16 positions, and training.block_size=64"),
]


def test_a_shape_that_is_not_that_of_the_weights_is_refused_naming_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = bytes_gpt(tmp_path), corpus(tmp_path)
    for word, message in REFUSED:
        assert run_here([word, f"init_from={path}", "device=cpu", "--dry-run", *text]) == 2
        assert f"training.init_from={path} {message}" in capsys.readouterr().err


def bytes_gpt(folder: Path) -> Path:
    """nanoGPT's checkpoint of a model of 256 tokens, which does not tell its data."""
    weights = nanogpt_weights()
    weights["transformer.wte.weight"] = torch.randn(256, 12)
    path = write_nanogpt(folder / "ckpt.pt", weights, vocab_size=256)
    content = torch.load(path, weights_only=True)
    del content["config"]
    torch.save(content, path)
    return path


def corpus(folder: Path) -> list[str]:
    write_corpus(folder / "text", documents=60, seed=5)
    return [f"dataset.parquet_dir={folder / 'text'}", "batch_size=2", "max_iters=2"]


def test_gpt2s_weights_are_not_trained_on_bytes_unless_asked_for_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = published_weights(vocabulary=50257)
    folder = write_published(tmp_path / "gpt2", weights, vocab_size=50257)
    words = ["device=cpu", "block_size=16", "test_freq=null", "save_model=false"]
    words += [*corpus(tmp_path), f"init_from={folder}"]
    assert run_here([*words, "tokenizer.name=bytes"]) == 2
    said = capsys.readouterr().err
    assert "was trained with tokenizer gpt2, and the text comes with tokenizer.name=bytes" in said
    assert "also give model.vocab_size=50257" in said
    assert run_here([*words, "tokenizer.name=bytes", "model.vocab_size=50257"]) == 0
    asked: list[str] = []

    def no_network(config: Any) -> Any:
        asked.append(config.name)
        raise SystemExit(9)

    monkeypatch.setattr("data.sources.tokens.meta.build_tokenizer", no_network)
    with pytest.raises(SystemExit):
        run_here(words)
    assert asked == ["gpt2"]  # without a word, its own


def test_weights_that_do_not_tell_their_tokenizer_ask_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bytes_gpt(tmp_path)
    words = ["device=cpu", "test_freq=null", "save_model=false", *corpus(tmp_path)]
    words += [f"init_from={path}"]
    assert run_here(words) == 2
    assert "does not tell its tokenizer" in capsys.readouterr().err
    assert run_here([*words, "tokenizer.name=bytes"]) == 0
