"""Weights of others: the same logits from the published layout and from nanoGPT's, or an error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import CheckpointError, ModelConfig
from model.gpt import GPT
from model.pretrained import find, load_into, read

save_file = pytest.importorskip("safetensors.torch").save_file

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 2, 3, 12, 19, 16
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_embd": WIDTH,
    "n_positions": POSITIONS,
    "vocab_size": VOCABULARY,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
}
TOKENS = torch.arange(2 * 11).view(2, 11) % VOCABULARY


def published_weights(inner: int = 4 * WIDTH, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Random ones, in the published layout: rows of a weight are its inputs."""
    draw = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.3

    found = {"wte.weight": weights(vocabulary, WIDTH), "wpe.weight": weights(POSITIONS, WIDTH)}
    for layer in range(LAYERS):
        parts = {
            "ln_1": (WIDTH,),
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "ln_2": (WIDTH,),
            "mlp.c_fc": (WIDTH, inner),
            "mlp.c_proj": (inner, WIDTH),
        }
        for name, shape in parts.items():
            found[f"h.{layer}.{name}.weight"] = weights(*shape)
            found[f"h.{layer}.{name}.bias"] = weights(shape[-1])
        found[f"h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
        found[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return found | {"ln_f.weight": weights(WIDTH), "ln_f.bias": weights(WIDTH)}


def slow_logits(
    w: dict[str, Tensor], tokens: Tensor, act: Callable[[Tensor], Tensor], turned: bool
) -> Tensor:
    """GPT-2 as its paper's code writes it, one head at a time, in float64.

    turned: whether the weights are stored as (outputs, inputs).
    """
    w = {name: value.double() for name, value in w.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.weight"]
        return x @ (weight.T if turned else weight) + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))

    T, d = tokens.shape[1], WIDTH // HEADS
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(LAYERS):
        h = f"h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, -1)
        outputs = []
        for head in range(HEADS):
            own = slice(head * d, (head + 1) * d)
            scores = q[..., own] @ k[..., own].mT / d**0.5
            hidden = torch.ones(T, T).triu(1).bool()
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., own])
        x = x + linear(torch.cat(outputs, -1), f"{h}.attn.c_proj")
        x = x + linear(act(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def write_published(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(published_weights() if weights is None else weights, folder / "model.safetensors")
    return folder


def nanogpt_weights(bias: bool = True) -> dict[str, Tensor]:
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        f"transformer.{name}": value.T.contiguous() if name.endswith(linears) else value
        for name, value in published_weights().items()
        if not name.endswith((".attn.bias", ".masked_bias"))
        and (bias or not name.endswith(".bias"))
    }


def write_nanogpt(path: Path, weights: dict[str, Tensor], prefix: str = "", **changes: Any) -> Path:
    """As nanoGPT saves it: the head is the embedding; compiled models have a prefix."""
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": VOCABULARY}
    arguments = {**shape, "block_size": POSITIONS, "bias": True, "dropout": 0.0, **changes}
    arguments = {key: value for key, value in arguments.items() if value is not ...}
    head = {"lm_head.weight": weights["transformer.wte.weight"]}
    content = {
        "model": {f"{prefix}{name}": value for name, value in (head | weights).items()},
        "optimizer": {"state": {}},
        "model_args": arguments,
        "iter_num": 2500,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(content, path)
    return path


def built(init_from: Path, block_size: int = POSITIONS) -> nn.Module:
    pretrained = read(os.fspath(init_from))
    model = GPT(ModelConfig(**pretrained.options, dropout=0.0), block_size)
    load_into(model, pretrained, block_size)
    return model.eval()


def assert_same_logits(model: nn.Module, expected: Tensor) -> None:
    with torch.no_grad():
        found = model(TOKENS)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_the_published_layout_gives_the_logits_of_its_own_conventions(tmp_path: Path) -> None:
    model = built(write_published(tmp_path))
    assert_same_logits(model, slow_logits(published_weights(), TOKENS, tanh_gelu, turned=False))


def test_names_may_begin_with_transformer(tmp_path: Path) -> None:
    weights = {f"transformer.{name}": value for name, value in published_weights().items()}
    weights["lm_head.weight"] = torch.zeros(VOCABULARY, WIDTH)  # tied: not looked at
    model = built(write_published(tmp_path, weights))
    assert_same_logits(model, slow_logits(published_weights(), TOKENS, tanh_gelu, turned=False))


def test_a_head_of_its_own_is_read_where_the_config_says_so(tmp_path: Path) -> None:
    weights = published_weights() | {"lm_head.weight": torch.ones(VOCABULARY, WIDTH)}
    folder = write_published(tmp_path, weights, tie_word_embeddings=False)
    assert read(os.fspath(folder)).options["tie_embeddings"] is False
    assert_same_logits(built(folder), slow_logits(weights, TOKENS, tanh_gelu, turned=False))


@pytest.mark.parametrize(
    ("name", "act"),
    [("gelu_pytorch_tanh", tanh_gelu), ("gelu", F.gelu), ("relu", F.relu)],
)
def test_activations_are_those_of_the_config(
    tmp_path: Path, name: str, act: Callable[[Tensor], Tensor]
) -> None:
    model = built(write_published(tmp_path, activation_function=name))
    assert_same_logits(model, slow_logits(published_weights(), TOKENS, act, turned=False))


def test_a_wider_mlp_becomes_its_scale_factor(tmp_path: Path) -> None:
    weights = published_weights(inner=24)
    folder = write_published(tmp_path, weights, n_inner=24, n_positions=..., n_ctx=POSITIONS)
    assert read(os.fspath(folder)).options["mlp_scale_factor"] == 2
    assert_same_logits(built(folder), slow_logits(weights, TOKENS, tanh_gelu, turned=False))


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in published_weights().items()}
    model = built(write_published(tmp_path, halves))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_logits(model, slow_logits(halves, TOKENS, tanh_gelu, turned=False))


def test_shards_are_read_together(tmp_path: Path) -> None:
    write_published(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = published_weights()
    first = {name: value for name, value in weights.items() if name.startswith("h.0")}
    rest = {name: value for name, value in weights.items() if name not in first}
    save_file(first, tmp_path / "a.safetensors")
    save_file(rest, tmp_path / "b.safetensors")
    index = {name: "a.safetensors" if name in first else "b.safetensors" for name in weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same_logits(built(tmp_path), slow_logits(weights, TOKENS, tanh_gelu, turned=False))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: no such file, and .* names it"):
        read(os.fspath(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    with pytest.raises(CheckpointError, match="must map tensors to files beside it"):
        read(os.fspath(tmp_path))


@pytest.mark.slow
def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    keys = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{key: CONFIG[key] for key in keys},
            initializer_range=0.3,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_logits(built(tmp_path), theirs(TOKENS).logits.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_gives_the_logits_of_its_own_conventions(
    tmp_path: Path, bias: bool, prefix: str
) -> None:
    weights = nanogpt_weights(bias)
    write_nanogpt(tmp_path / "ckpt.pt", weights, prefix, bias=bias)
    plain = {name.removeprefix("transformer."): value for name, value in weights.items()}
    expected = slow_logits(plain, TOKENS, F.gelu, turned=True)
    assert_same_logits(built(tmp_path / "ckpt.pt"), expected)
    assert_same_logits(built(tmp_path), expected)  # the folder that holds it


def test_a_nanogpt_checkpoint_with_a_head_of_its_own_keeps_it(tmp_path: Path) -> None:
    weights = nanogpt_weights() | {"lm_head.weight": torch.ones(VOCABULARY, WIDTH)}
    path = write_nanogpt(tmp_path / "ckpt.pt", weights)
    assert read(os.fspath(path)).options["tie_embeddings"] is False
    plain = {name.removeprefix("transformer."): value for name, value in weights.items()}
    assert_same_logits(built(path), slow_logits(plain, TOKENS, F.gelu, turned=True))


def test_the_source_tells_the_shape_and_what_nanogpt_noted(tmp_path: Path) -> None:
    published = read(os.fspath(write_published(tmp_path)))
    shape = "2 layers, 3 heads, width 12, 19 tokens, 16 positions"
    assert published.source == f"{tmp_path}: {shape}"
    assert (published.block_size, published.options["vocab_size"]) == (16, 19)
    path = write_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights())
    noted = "2,500 iterations, best held-out loss 1.4697 (weights alone: no optimizer moments)"
    assert read(os.fspath(path)).source == f"{path}: {shape}, {noted}"


def test_positions_are_cropped_to_the_block(tmp_path: Path) -> None:
    model = built(write_published(tmp_path), block_size=11)
    assert model.get_parameter("transformer.wpe.weight").shape == (11, WIDTH)
    assert_same_logits(model, slow_logits(published_weights(), TOKENS, tanh_gelu, turned=False))


def test_a_block_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"16 positions, .*block_size is 17. Set it to 16"):
        built(write_published(tmp_path), block_size=17)


def altered(name: str, value: Tensor | None) -> dict[str, Tensor]:
    weights = published_weights() | ({} if value is None else {name: value})
    return {key: tensor for key, tensor in weights.items() if value is not None or key != name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (altered("h.1.mlp.c_fc.bias", None), r"transformer\.h\.1\.mlp\.c_fc\.bias is missing\."),
        (altered("wte.weight", None), r"transformer\.wte\.weight is missing"),
        (altered("h.0.extra", torch.ones(2)), r"transformer\.h\.0\.extra is not of this model"),
        (altered("ln_f.bias", torch.ones(3)), r"ln_f\.bias is \(3,\), the model's is \(12,\)"),
        (altered("h.0.mlp.c_fc.weight", torch.ones(3, 3, 3)), r"is \(3, 3, 3\), the model's is"),
        ({}, r"; and \d+ more\."),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(
    tmp_path: Path, weights: dict[str, Tensor], message: str
) -> None:
    pretrained = read(os.fspath(write_published(tmp_path, weights)))
    model = GPT(ModelConfig(**pretrained.options), POSITIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_into(model, pretrained, POSITIONS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: llama is not gpt2"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: 1e-06 cannot be computed here"),
        ({"scale_attn_weights": False}, "only True can"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"activation_function": "silu"}, "silu is none of gelu_new"),
        ({"n_inner": 13}, "n_inner: 13 is not a multiple of n_embd: 12"),
        ({"n_layer": 0}, "n_layer: 0 is not a whole number above 0"),
        ({"vocab_size": True}, "vocab_size: True is not a whole number"),
        ({"n_embd": ...}, "no n_embd"),
        ({"n_positions": ...}, "no n_ctx"),
    ],
)
def test_a_config_that_is_no_gpt2_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(os.fspath(write_published(tmp_path, **changes)))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    write_published(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (cannot be read as|holds no) JSON"):
        read(os.fspath(tmp_path))


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder. It takes scratch, resume"):
        read(os.fspath(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="or a folder with config.json and model.safe"):
        read(os.fspath(tmp_path))
    write_published(tmp_path)
    assert read(os.fspath(tmp_path / "model.safetensors")).options["n_layer"] == LAYERS
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors in it. It has config.json, py"
    ):
        read(os.fspath(tmp_path))


def test_a_cut_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = write_published(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors .* copy it again"):
        read(os.fspath(tmp_path))


class Hostile:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (os.fspath(self.path),)


def test_a_checkpoint_with_a_python_object_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, mark = tmp_path / "ckpt.pt", tmp_path / "executed"
    torch.save({"model": {}, "model_args": Hostile(mark)}, path)
    with pytest.raises(CheckpointError, match=r"holds a Python object \((posix|nt)\.mkdir\)"):
        read(os.fspath(path))
    assert not mark.exists()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", bytes(1_000_000))
    return buffer.getvalue()


ARGUMENTS = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 9, "block_size": 8, "bias": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "no complete zip archive"),
        (saved({"model": {}})[:-40], "no complete zip archive"),
        (compressed(), "is compressed"),
        (saved([1, 2]), "holds no dictionary"),
        (
            saved({"weights": {}, "epoch": 1}),
            "with its model_args.* It has weights, epoch",
        ),
        (saved({}), "It has nothing"),
        (saved({"model": {"a": 1}, "model_args": ARGUMENTS}), "a is no tensor"),
        (saved({"model": {}, "model_args": ARGUMENTS | {"bias": 1}}), "bias: 1 is not true"),
        (saved({"model": {}, "model_args": ARGUMENTS | {"n_embd": 4.0}}), "n_embd: 4.0 is not a"),
        (saved({"model": {}, "model_args": {"bias": True}}), "no n_layer"),
    ],
)
def test_a_file_that_is_no_nanogpt_checkpoint_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(os.fspath(path))
    assert "ckpt.pt" in str(caught.value)


def hub(folder: Path, asked: list[str], error: Exception | None = None) -> Any:
    """A stand-in for huggingface_hub, which has nothing in its cache and downloads `folder`."""

    def metadata(url: str, timeout: float) -> None:
        if error is not None:
            raise error

    def download(repo: str, file: str) -> str:
        asked.append(f"{repo}/{file}")
        return os.fspath(folder / file)

    silent = SimpleNamespace(set_verbosity_error=lambda: None)
    return SimpleNamespace(
        try_to_load_from_cache=lambda repo, file: None,
        hf_hub_url=lambda repo, file: f"{repo}/{file}",
        get_hf_file_metadata=metadata,
        hf_hub_download=download,
        utils=SimpleNamespace(logging=silent, disable_progress_bars=lambda: None),
    )


def test_a_published_name_is_downloaded_with_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(write_published(tmp_path), asked))
    assert find("gpt2-medium") == tmp_path
    repo = "openai-community/gpt2-medium"
    assert asked == [f"{repo}/config.json", f"{repo}/model.safetensors"]
    assert read("gpt2-medium").source.startswith("gpt2-medium: 2 layers")


def test_without_network_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConnectionError("no route to host.\nsecond line")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(tmp_path, [], error))
    with pytest.raises(CheckpointError) as caught:
        read("gpt2")
    assert str(caught.value) == (
        "training.init_from: gpt2 is not on this machine and could not be downloaded (no route to "
        "host). With network, run: hf download openai-community/gpt2 config.json "
        "model.safetensors\nOr give a folder: training.init_from=path/to/folder with config.json "
        "and model.safetensors."
    )


HUB_CACHE = """
import os, sys
from config import CheckpointError
from model.pretrained import find
for downloaded in (False, True):
    if downloaded:
        os.rename(*sys.argv[1:])
    try:
        print(find("gpt2"))
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_cache_and_the_offline_variable_of_the_hub_are_respected(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    variables = os.environ | {"HF_HOME": os.fspath(tmp_path), "HF_HUB_OFFLINE": "1"}
    variables.pop("HF_HUB_CACHE", None)

    repo, made = tmp_path / "hub" / "models--openai-community--gpt2", tmp_path / "made"
    name = Path("snapshots", "a" * 40)
    (made / name).mkdir(parents=True)
    write_published(made / name)
    (made / "refs").mkdir()
    (made / "refs" / "main").write_text("a" * 40)
    repo.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", HUB_CACHE, made, repo],
        env=variables,
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    *before, after = done.stdout.splitlines()
    assert "could not be downloaded (Cannot reach" in "".join(before)
    assert after == str(repo / name)


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = write_published(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=f"Install it: pip install {package}$"):
        read("gpt2" if package == "huggingface_hub" else os.fspath(folder))
