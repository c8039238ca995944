"""Exports: the numbers that the run evaluated come back, from folders that are whole or absent."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import export
import sample
from config import BDHConfig, CheckpointError, Config, LowPrecisionConfig, ModelConfig, WriteError
from data.tokenizers.build import build_tokenizer
from engine.checkpoint import export as exports
from engine.checkpoint.export import description, write_export
from engine.checkpoint.trained_model import load_model, open_model
from engine.precision.weights_4bit import QuantizedWeights
from model import LanguageModel, build_model
from model.bdh import from_upstream
from settings.formatting import format_bytes
from tests.conftest import ROOT, TINY, write_corpus
from tests.runs import only_run, run_here

DTYPES = (torch.float32, torch.bfloat16)
KINDS: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
# Shapes with rows of 96 and 48 numbers: no multiples of a block of 64.
MODELS = {
    "bdh": ModelConfig(
        name="bdh", n_layer=2, n_embd=24, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=256
    ),
    "gpt": ModelConfig(name="gpt", n_layer=2, n_embd=48, n_head=2, dropout=0.0, vocab_size=256),
    "llama": ModelConfig(name="llama", n_layer=2, n_embd=20, n_head=2, d_ff=50, vocab_size=256),
}
TOKENS = torch.arange(48).view(2, 24) * 7 % 256
GRID = list(itertools.product(MODELS, KINDS, (True, False)))
READER = """
import sys, torch
from engine.checkpoint import load_model
tokens, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[2:]:
    model = load_model(folder)[0]
    with torch.no_grad():
        found[folder] = [model(tokens)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[folder] += [model(tokens).float()]
torch.save(found, sys.argv[1])
"""


def config_of(name: str, low: LowPrecisionConfig | None = None) -> Config:
    return replace(Config(), model=MODELS[name], low_precision=low or LowPrecisionConfig())


def build(config: Config) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(config).eval()


def save(out: Path, model: LanguageModel, config: Config) -> int:
    """The export in 4 bits; returns the bytes of the weights."""
    weights = QuantizedWeights(model, config.low_precision).packed_tensors()
    return write_export(out, weights, description(config, {"kind": "bytes"}))


def test_files_of_an_export_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_export(tmp_path / "out", {"w": torch.ones(2)}, {"config.yaml": ""})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"model.safetensors": 0o640, "config.yaml": 0o640}


@torch.no_grad()
def logits_of(model: LanguageModel) -> list[Tensor]:
    """In float32 and by bfloat16 autocast."""
    found = []
    for dtype in DTYPES:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            found.append(model(TOKENS).float())
    return found


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The logits of every export of the grid, as another process reads them, and those expected."""
    folder, expected = tmp_path_factory.mktemp("grid"), {}
    for name, kind, double in GRID:
        low = LowPrecisionConfig(quantization_type=kind, use_double_quant=double)
        if name == "gpt":  # tied: one matrix is both
            low = replace(low, quantize_embedding=True, quantize_head=True)
        config = config_of(name, low)
        model, out = build(config), folder / f"{name}-{kind}-{double}"
        save(out, model, config)
        with QuantizedWeights(model, low).applied():
            expected[name, kind, double] = os.fspath(out), logits_of(model)
    exchanged = folder / "tokens.pt"
    torch.save(TOKENS, exchanged)
    folders = [place for place, _ in expected.values()]
    command = [sys.executable, "-c", READER, os.fspath(exchanged), *folders]
    subprocess.run(command, cwd=ROOT, check=True)
    read = torch.load(exchanged, weights_only=True)
    return {key: (read[place], logits) for key, (place, logits) in expected.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, trained without a thought of 4 bits."""
    folder = tmp_path_factory.mktemp("export")
    corpus = write_corpus(folder / "text", documents=60)
    config = folder / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {corpus}\n")
    options = [f"checkpoint_dir={folder / 'runs'}", "max_iters=2", "test_freq=null"]
    assert run_here([os.fspath(config), *options, "use_4bit=false"]) == 0
    return only_run(folder / "runs")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An export of a BDH in 4 bits."""
    config = config_of("bdh")
    save(tmp_path / "saved", build(config), config)
    return tmp_path / "saved"


@pytest.mark.slow
def test_another_process_computes_the_logits_of_the_rounded_model(
    read_elsewhere: dict[Any, Any],
) -> None:
    for case, (read, expected) in read_elsewhere.items():
        for one, other in zip(read, expected, strict=True):
            assert torch.equal(one, other), case


def test_logits_in_4_bits_differ_from_those_of_the_masters(saved: Path) -> None:
    exact, rounded = logits_of(build(config_of("bdh"))), logits_of(load_model(saved)[0])
    assert not torch.equal(exact[0], rounded[0])


def test_the_loss_that_training_for_4_bits_reports_is_that_of_the_export(tmp_path: Path) -> None:
    config = config_of("bdh", LowPrecisionConfig(quantize_embedding=True))
    model = build(config)
    weights = QuantizedWeights(model, config.low_precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        if step < 8:
            loss = loss_of(model)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        else:
            with weights.applied():
                loss = loss_of(model)
                loss.backward()  # type: ignore[no-untyped-call]  # as above
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[8] < losses[0]
    with weights.applied():
        reported = loss_of(model).item()
    save(tmp_path / "out", model, config)
    assert loss_of(load_model(tmp_path / "out")[0]).item() == reported != loss_of(model).item()


def loss_of(model: LanguageModel) -> Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


def test_a_toy_export_takes_less_than_a_fifth_of_float32(tmp_path: Path) -> None:
    low = LowPrecisionConfig(quantize_embedding=True, quantize_head=True)
    config = config_of("bdh", low)
    shape = replace(config.model, n_embd=64, n_head=4, mlp_internal_dim_multiplier=16)
    config = replace(config, model=shape)
    model = build(config)
    count = sum(p.numel() for p in model.parameters())
    size = save(tmp_path / "out", model, config)
    assert (count, size) == (229_376, (tmp_path / "out" / "model.safetensors").stat().st_size)
    assert size <= 0.2 * 4 * count


@pytest.mark.slow
def test_a_large_matrix_takes_half_a_byte_per_parameter(tmp_path: Path) -> None:
    config = config_of("bdh")
    model = build(replace(config, model=replace(config.model, mlp_internal_dim_multiplier=4096)))
    weights = QuantizedWeights(model, config.low_precision).packed_tensors()
    for name, value in model.named_parameters():
        if value.numel() > 1_000_000:
            size = sum(t.nbytes for part, t in weights.items() if f"{part}.".startswith(f"{name}."))
            assert 0.5 < size / value.numel() <= 0.53, name


def test_the_files_say_everything_in_plain_formats(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([os.fspath(run), os.fspath(out)]) == 0
    model, config, tokenizer = open_model(run, "cpu")
    weights = load_file(out / "model.safetensors")
    names = {"config.yaml", "model.safetensors", "vocabulary.json"}
    assert {path.name for path in out.iterdir()} == names
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert Config.from_yaml(out / "config.yaml") == config
    assert json.loads((out / "vocabulary.json").read_text()) == tokenizer


@pytest.mark.parametrize("form", ["safetensors", "bnb4"])
def test_an_export_opens_as_its_checkpoint_does(run: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "deep" / "out"
    assert export.main([os.fspath(run), os.fspath(out), "--format", form]) == 0
    model, config, tokenizer = open_model(run, "cpu")
    for path in (out, out / "model.safetensors"):
        again, same_config, same_tokenizer = open_model(path, "cpu")
        assert (same_config, same_tokenizer, again.training) == (config, tokenizer, False)
        with QuantizedWeights(model, config.low_precision).applied():
            rounded = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model.state_dict() if form == "safetensors" else rounded
        assert all(torch.equal(v, expected[name]) for name, v in again.state_dict().items())


def test_weights_in_bfloat16_take_half_and_load(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([os.fspath(run), os.fspath(out), "--dtype", "bfloat16"]) == 0
    model, (again, _) = load_model(run)[0], load_model(out)
    for name, value in again.named_parameters():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float())
    assert load_file(out / "model.safetensors")["encoder"].dtype is torch.bfloat16


def test_upstream_layout_is_what_the_reference_reads(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([os.fspath(run), os.fspath(out), "--format", "upstream"]) == 0
    shape = BDHConfig(**json.loads((out / "config.json").read_text()))
    again = from_upstream(load_file(out / "model.safetensors"), shape)
    model, config = load_model(run)
    assert shape == config.to_bdh_config()
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in again.state_dict().items())
    opened = load_model(out)[0].state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in model.state_dict().items())


def test_what_was_written_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    capsys.readouterr()
    assert export.main([os.fspath(run), os.fspath(out), "--format", "bnb4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (out / "model.safetensors").stat().st_size
    count = sum(p.numel() for p in load_model(run)[0].parameters())
    assert lines == [
        "4-bit weights: 3 of 5 tensors, 3,072 of 11,264 parameters (nf4, double quantization); "
        "embedding and head left out",
        f"Wrote {out}: model.safetensors ({format_bytes(size)}, {size / count:.2f} bytes "
        "per parameter; 45.1 kB in float32), config.yaml, vocabulary.json",
        f"Next: python sample.py {out}",
    ]


def test_samples_of_an_export_are_those_of_the_rounded_model(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert export.main([os.fspath(run), os.fspath(out), "--format", "bnb4"]) == 0
    model, config, tokenizer = open_model(run, "cpu")
    words = ["--max-new-tokens", "20", "--device", "cpu", "--temperature", "2"]
    texts = []
    capsys.readouterr()
    sample.write_samples(sample.read_arguments([os.fspath(out), *words]))
    texts.append(capsys.readouterr().out)
    monkeypatch.setattr(
        "engine.checkpoint.trained_model.open_model", lambda *_: (model, config, tokenizer)
    )
    with QuantizedWeights(model, config.low_precision).applied():
        sample.write_samples(sample.read_arguments([os.fspath(run), *words]))
    texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 10


def test_what_exists_is_never_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for name in (".", "file"):
        with pytest.raises(SystemExit) as caught:
            export.main([os.fspath(run), os.fspath(tmp_path / name)])
        assert caught.value.code == 2
        assert "exists; name another folder" in capsys.readouterr().err
    config = config_of("bdh")
    with pytest.raises(WriteError, match=r"file exists\. Name another folder"):
        save(tmp_path / "file", build(config), config)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "invalid choice: 'gguf'"),
        (["--format", "bnb4", "--dtype", "bfloat16"], "--dtype is for --format safetensors"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main(["checkpoints", os.fspath(tmp_path / "out"), *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_exit_code_3(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in ((tmp_path / "none", "not found"), (saved, "is an export already")):
        assert export.main([os.fspath(path), os.fspath(tmp_path / "out")]) == 3
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_upstream_is_for_bdh_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("gpt")
    found = build(config), config, build_tokenizer(config.tokenizer).to_dict()
    monkeypatch.setattr("engine.checkpoint.trained_model.open_model", lambda *_: found)
    out = tmp_path / "out"
    assert export.main(["run", os.fspath(out), "--format", "upstream"]) == 2
    assert "model.name is gpt" in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_exit_code_5(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "out"
    assert export.main([os.fspath(run), os.fspath(place)]) == 5
    told = capsys.readouterr().err
    assert told.startswith(f"cannot write {place} (") and f"'{tmp_path / 'file'}'" in told


@pytest.mark.slow
def test_a_file_that_grows_too_large_leaves_nothing(run: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys, export\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(export.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, os.fspath(run), os.fspath(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, list(tmp_path.iterdir())) == (5, [])
    assert done.stderr.startswith("cannot write ") and done.stderr.count("\n") == 1


def test_an_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "atomic_write_text", fail)
    config = config_of("bdh")
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", build(config), config)
    assert list(tmp_path.iterdir()) == []


def test_without_bitsandbytes_the_install_command_is_said_and_nothing_written(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert export.main([os.fspath(run), os.fspath(tmp_path / "out"), "--format", "bnb4"]) == 2
    assert "pip install 'bitsandbytes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_is_said_without_torch() -> None:
    script = "import sys, export\ntry: export.main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}sys.exit('torch' in sys.modules)"], cwd=ROOT
    )
    assert done.returncode == 0


STATE = "encoder.quant_state.bitsandbytes__nf4"


def described(**values: object) -> Callable[[dict[str, Tensor]], None]:
    """Changes what the file says of the encoder's codes; None takes it out."""

    def change(weights: dict[str, Tensor]) -> None:
        state = json.loads(bytes(weights[STATE].tolist())) | values
        kept = {key: value for key, value in state.items() if value is not None}
        weights[STATE] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    return change


def put(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights.pop(name, None)
        if value is not None:
            weights[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("lm_head", None), "lm_head is missing"),
        (put("encoder", None), "encoder is missing"),
        (put("spare", torch.zeros(3)), "spare is not of this model"),
        (put("lm_head", torch.zeros(24, 255)), r"lm_head is \(24, 255\), the model's is \(24, 256"),
        (put("lm_head", torch.zeros(24, 256, dtype=torch.int8)), "lm_head holds torch.int8"),
        (put(STATE, None), r"encoder is \(2304, 1\), the model's is \(2, 24, 96\)"),
        (put(STATE, torch.tensor([123, 1, 2], dtype=torch.uint8)), "encoder: broken 4-bit weight"),
        (put(STATE, torch.zeros(9, dtype=torch.bfloat16)), "encoder: broken 4-bit weight"),
        (put(STATE, torch.tensor(list(b"[" * 99_999), dtype=torch.uint8)), "encoder: broken 4-bit"),
        (put(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "no JSON object"),
        (put("encoder.quant_state.bitsandbytes__int8", torch.zeros(9)), "encoder: broken 4-bit"),
        (described(blocksize=0), "encoder: broken 4-bit weight: described as"),
        (described(blocksize=64.0), "encoder: broken 4-bit weight"),
        (described(shape=[2, 24, 97]), "encoder: broken 4-bit weight: described as"),
        (described(dtype="load"), "encoder: broken 4-bit weight: described as"),
        (described(quant_type="fp4"), "encoder: broken 4-bit weight: described as"),
        (described(quant_type=None), "encoder: broken 4-bit weight: described as"),
        (described(nested_offset=None), "encoder: broken 4-bit weight: described as"),
        (described(nested_offset=float("nan")), "nested_offset nan"),
        (described(nested_blocksize=1), "encoder: broken 4-bit weight: described as"),
        (described(surplus=1), "encoder: broken 4-bit weight: described as"),
        (put("encoder", torch.zeros(9, 1, dtype=torch.uint8)), r"weight is \(\(9, 1\)"),
        (put("encoder.absmax", torch.zeros(3, dtype=torch.uint8)), r"weight\.absmax is \(\(3,\)"),
        (put("encoder.absmax", None), r"weight\.absmax is None"),
        (put("encoder.quant_map", torch.zeros(8)), r"weight\.quant_map is \(\(8,\)"),
        (put("encoder.nested_quant_map", torch.zeros(9)), r"weight\.nested_quant_map is \(\(9,\)"),
        (put("encoder.nested_absmax", torch.zeros(0)), r"weight\.nested_absmax is \(\(0,\)"),
        (put("encoder.surplus", torch.zeros(1)), r"weight\.surplus is"),
    ],
)
def test_damaged_weights_are_refused_by_file_and_name(
    saved: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = saved / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    change(weights)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_was_cut_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 500, -1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as saf"):
            load_model(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "model: {n_layer: no}", r"config\.yaml: does not fit this version"),
        ("config.yaml", "tokenizer: {name: char}", r"config\.yaml: does not fit this version"),
        ("vocabulary.json", "{", r"vocabulary\.json: cannot be read"),
        ("vocabulary.json", "[" * 99_999, r"vocabulary\.json: cannot be read"),
        ("vocabulary.json", "[]", r"vocabulary\.json: holds no JSON object"),
        ("config.yaml", None, r"no config\.yaml beside model\.safetensors"),
        ("vocabulary.json", None, r"no vocabulary\.json beside model\.safetensors"),
    ],
)
def test_damaged_descriptions_are_refused(
    saved: Path, name: str, content: str | None, message: str
) -> None:
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)
