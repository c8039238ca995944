"""The small parts of the engine: precision, optimizer, signals, metrics, state, device."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from config import (
    BDHConfig,
    Config,
    ConfigError,
    LowPrecisionConfig,
    OptimizerConfig,
    SystemConfig,
    sequences_per_step,
)
from data.loading.packing import document_ids
from engine.checkpoint.resume_rules import adapt_to_world_size
from engine.compile import compile_model, compile_wanted
from engine.evaluation import batch_losses, bits_per_byte
from engine.hardware.distributed import World
from engine.loss import count_targets, next_token_loss
from engine.monitor import console
from engine.optim.build import build_optimizer, clip_gradients, gradient_norm, load_optimizer
from engine.planning.summary import planned_steps, resolve_vocab_size
from engine.precision.precision import Precision
from engine.signals import StopRequest
from engine.train_state import TrainState, due, restore_rng, rng_state
from model.bdh import BDH

CPU = torch.device("cpu")


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    groups = build_optimizer(model, OptimizerConfig(), weight_decay=0.1).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    assert decayed == {id(model[0].weight)}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_loading_an_optimizer_keeps_the_present_hyperparameters() -> None:
    model = nn.Linear(4, 3)
    first = build_optimizer(model, OptimizerConfig(), weight_decay=0.1)
    model(torch.ones(2, 4)).sum().backward()
    first.step()
    second = build_optimizer(model, OptimizerConfig(beta1=0.5), weight_decay=0.3)
    load_optimizer(second, first.state_dict())
    assert second.param_groups[0]["betas"] == (0.5, 0.95)
    assert second.param_groups[0]["weight_decay"] == 0.3
    assert torch.equal(second.state[model.weight]["exp_avg"], first.state[model.weight]["exp_avg"])


def test_clipping_scales_all_gradients_to_the_limit() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.grad = torch.tensor([[3.0, 0.0]])
    model[1].weight.grad = torch.tensor([[4.0]])
    norm = gradient_norm(model)
    assert norm.item() == 5.0
    clip_gradients(model, norm, limit=1.0)
    assert gradient_norm(model).item() == pytest.approx(1.0, rel=1e-5)
    assert model[0].weight.grad.tolist() == [[pytest.approx(0.6), 0.0]]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_forward_runs_in_the_compute_dtype_and_weights_stay_float32(name: str) -> None:
    precision = Precision(LowPrecisionConfig(compute_dtype=name), CPU)  # type: ignore[arg-type]
    layer = nn.Linear(4, 4)
    with precision.autocast():
        assert layer(torch.ones(1, 4)).dtype is precision.dtype
    assert layer.weight.dtype is torch.float32
    assert precision.name == name or precision.note


def test_bfloat16_falls_back_aloud_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.precision.precision.supports_fast_bfloat16", lambda device: False)
    precision = Precision(LowPrecisionConfig(compute_dtype="bfloat16"), CPU)
    assert precision.name == "float32"
    assert precision.note == "bfloat16 is not supported by cpu; float32 is used instead"


def test_float16_skips_an_overflowed_step_and_lowers_the_scale() -> None:
    precision = Precision(LowPrecisionConfig(compute_dtype="float16"), CPU)
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(), weight_decay=0.0)
    precision.backward((model(torch.ones(1, 2)) * torch.inf).sum())
    precision.unscale(optimizer)
    precision.step(optimizer, torch.clone)
    assert torch.equal(model.weight, before)
    assert precision.state_dict()["scaler"]["scale"] == 32768.0
    other = Precision(LowPrecisionConfig(compute_dtype="float16"), CPU)
    other.load_state_dict(precision.state_dict())
    assert other.state_dict() == precision.state_dict()


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        *((getattr(signal, f"SIG{name}"), 143) for name in ("TERM", "USR1", "USR2", "HUP")),
    ],
)
def test_signals_become_a_flag_and_handlers_come_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.training_started = True
        assert not stop and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop and stop.exit_code == code
    assert signal.getsignal(number) is before


def test_before_training_a_signal_ends_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    assert "nothing was saved" in capfd.readouterr().err


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            stop.training_started = True
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_random_state_of_every_generator_comes_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    np.random.standard_normal()  # leaves a cached gaussian behind
    state = rng_state(CPU)
    first = drawn()
    drawn()
    restore_rng(state, CPU)
    assert drawn() == first


def test_the_best_evaluation_is_remembered() -> None:
    state = TrainState(step=10)
    assert state.record_evaluation(2.0, 2.1)
    state.step = 20
    assert not state.record_evaluation(1.9, 2.2)
    assert (state.best_step, state.best_val_loss, state.val_loss) == (10, 2.1, 2.2)


def test_due_counts_from_step_one_and_null_is_never() -> None:
    assert [s for s in range(7) if due(s, 3)] == [3, 6]
    assert not any(due(s, None) for s in range(7))


ALONE = World(rank=0, size=1, device=CPU)


def test_every_batch_has_its_loss_and_no_random_number_is_drawn() -> None:
    model = nn.Dropout(0.5)
    rows = torch.tensor([[1.0], [2.0], [6.0]])
    before = torch.get_rng_state()
    batches = torch.split(rows, 2)
    losses = batch_losses(model, batches, lambda batch: model(batch).sum(), lambda: False, ALONE, 2)
    assert losses == [3.0, 6.0] and model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_of_batches_end_early_when_stopped() -> None:
    ones = (torch.ones(1),)
    stopped = batch_losses(nn.Identity(), ones, lambda batch: batch.sum(), lambda: True, ALONE, 1)
    assert stopped is None


def test_documents_are_scored_as_if_each_stood_alone() -> None:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=2,
        n_embd=16,
        dropout=0.0,
        n_head=2,
        mlp_internal_dim_multiplier=4,
        vocab_size=8,
    )
    model = BDH(config)
    apart = partial(document_ids, separator=0)
    texts = [torch.tensor([[*draw, 0]]) for draw in ([3, 1, 4, 1], [5, 7], [2, 6, 5, 3, 5])]
    alone = [next_token_loss(model, text, CPU, apart).item() for text in texts]
    together = torch.cat(texts, dim=1)
    assert next_token_loss(model, together, CPU, apart).item() == pytest.approx(sum(alone), 1e-5)
    assert count_targets(together, apart) == sum(text.shape[1] - 1 for text in texts)
    assert next_token_loss(model, together, CPU).item() > sum(alone)
    assert count_targets(together) == together.shape[1] - 1


def test_bits_per_byte_of_one_bit_is_one() -> None:
    assert bits_per_byte(0.6931471805599453, 1.0) == pytest.approx(1.0)


def test_iteration_line_has_the_form_of_the_contract() -> None:
    record = {
        "step": 100,
        "train/loss": 6.2341,
        "train/learning_rate": 3e-5,
        "train/grad_norm": 1.21,
        "train/iter_time_ms": 145.3,
        "train/tokens_per_sec": 113024.0,
        "train/memory_bytes": 1.9e9,
    }
    assert console.iteration_line(record, eta_s=243) == (
        "Iter    100 | Loss: 6.2341 | LR: 3.00e-05 | Grad: 1.21 | Time: 145.3ms | "
        "Tokens/sec: 113024 | Mem: 1.9GB | ETA: 4m03s"
    )


@pytest.mark.parametrize(
    ("compile", "kind", "flops", "before", "wanted"),
    [
        ("auto", "cpu", 1e12, None, False),
        ("auto", "cpu", 1e14, None, True),
        ("auto", "cuda", 1e6, None, True),
        ("auto", "mps", 1e18, None, False),
        ("auto", "cpu", 1e12, True, True),
        ("auto", "cpu", 1e14, False, False),
        (True, "cpu", 1.0, False, True),
        (False, "cuda", 1e18, True, False),
    ],
)
def test_compiling_is_for_long_runs_and_a_resumed_run_goes_on_as_it_was(
    compile: Any, kind: str, flops: float, before: bool | None, wanted: bool
) -> None:
    system, device = SystemConfig(compile=compile), torch.device(kind)
    assert compile_wanted(system, device, flops, before) == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_a_compiler_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.compile.compiler_for", lambda device: "g++")
    model = nn.Linear(2, 2)
    before = torch.get_rng_state()

    def trial() -> None:
        torch.rand(1)
        model.weight.grad = torch.ones(2, 2)
        raise RuntimeError("no such instruction\nand a long trace")

    told = compile_model(model, True, CPU, trial)
    assert told == (None, "not compiled: g++ failed (RuntimeError: no such instruction)")
    assert model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_memory_that_runs_out_in_the_compile_trial_is_not_a_compiler_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.compile.compiler_for", lambda device: "g++")

    def trial() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_model(nn.Linear(2, 2), True, CPU, trial)


# Settling the config.


def test_the_vocabulary_is_the_tokenizers_rounded_up_or_what_the_config_says() -> None:
    def settled(**options: dict[str, Any]) -> tuple[int | None, list[str]]:
        config = Config.from_dict({"tokenizer": {"name": "char"}, **options})
        config, lines = resolve_vocab_size(config, 65, "char")
        return config.model.vocab_size, lines

    assert settled() == (65, ["Vocabulary: 65 (the tokenizer's)"])
    padded = settled(tokenizer={"name": "char", "vocab_multiple": 64})
    assert padded == (128, ["Vocabulary: 128 (of which the tokenizer uses 65)"])
    stated = settled(model={"vocab_size": 100})
    assert stated == (100, ["Vocabulary: 100 (of which the tokenizer uses 65)"])
    with pytest.raises(ConfigError, match="model.vocab_size=64: 64 tokens, but the text has 65"):
        settled(model={"vocab_size": 64})


def test_a_step_keeps_its_sequences_on_another_number_of_processes() -> None:
    saved = Config.from_dict({"training": {"batch_size": 3, "gradient_accumulation_steps": 2}})
    config, lines = adapt_to_world_size(saved, saved, before=2, now=1)
    assert sequences_per_step(config, 1) == sequences_per_step(saved, 2) == 12
    assert lines == [
        "2 processes before, 1 now: a step keeps its 12 sequences, in 4 micro-steps of each process"
    ]
    assert adapt_to_world_size(saved, saved, before=2, now=2) == (saved, [])
    # and again, from a checkpoint that was saved on those processes, with the same file
    config, _ = adapt_to_world_size(saved, saved, before=1, now=2)
    for now in (2, 1):
        again, _ = adapt_to_world_size(saved, config, before=2, now=now)
        assert sequences_per_step(again, now) == 6
    changed = Config.from_dict({"training": {"batch_size": 2}})
    assert adapt_to_world_size(changed, saved, before=2, now=1) == (changed, [])  # to be refused
    with pytest.raises(ConfigError, match="tokens_per_step=6144 is not a multiple"):
        adapt_to_world_size(saved, saved, before=2, now=5)


def test_micro_batches_shrink_where_more_processes_share_a_step_of_fixed_size() -> None:
    training = {"tokens_per_step": 12 * 32, "batch_size": 6, "block_size": 32}
    saved = Config.from_dict({"training": training})
    config, lines = adapt_to_world_size(saved, saved, before=1, now=4)
    assert config.training.batch_size == 3 and sequences_per_step(config, 4) == 12
    assert config.training.eval_batch_size == 6  # the same rows are evaluated
    assert lines == ["1 processes before, 4 now: micro-batches of 3 sequences"]
    assert adapt_to_world_size(saved, saved, before=1, now=2) == (saved, [])


def test_what_steps_of_another_size_did_of_an_epoch_is_done() -> None:
    training = {"epochs": 1, "max_iters": 60, "block_size": 10, "batch_size": 2}
    config = Config.from_dict({"training": training})
    assert planned_steps(config, 1, epoch_tokens=320) == 16
    assert planned_steps(config, 1, epoch_tokens=320, done=(8, 8 * 20)) == 16
    assert planned_steps(config, 1, epoch_tokens=320, done=(5, 5 * 10)) == 5 + 14


def test_the_plan_of_an_oracle_does_not_end_with_an_epoch() -> None:
    training = {"epochs": 1, "max_iters": 60, "block_size": 10, "batch_size": 1}
    assert planned_steps(Config.from_dict({"training": training}), 1, epoch_tokens=320) == 32
    oracle = Config.from_dict({"training": {**training, "use_oracle": True}})
    assert planned_steps(oracle, 1, epoch_tokens=320) == 60
