"""Sharded training: the run of a whole model, with a slice of it in each process.

One group of processes makes many small runs: starting it costs more than a run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import train
from config import ConfigError, DistributedConfig, SystemConfig, command_line
from engine.compile import compile_model
from engine.evaluation import Evaluation
from engine.hardware.distributed import World, enter_world, no_sync_until_last
from engine.hardware.sharding import (
    full_tensor,
    is_sharded,
    shard_dim,
    shard_mesh,
    sharding_lines,
)
from engine.loss import next_token_loss
from engine.setup.build import build
from engine.setup.check_resume import check_resume
from engine.signals import StopRequest
from engine.train_state import TrainState, seed_generators
from engine.trainer import Trainer
from engine.weights_hash import tensor_hashes
from model import build_model
from tests.conftest import TEXT
from tests.engine.planned_runs import configured

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
CPU = torch.device("cpu")
STEPS = 3
COMMON = [f"max_iters={STEPS}", "log_freq=1", f"test_freq={STEPS}", "eval_iters=3", "dropout=0"]
COMMON += ["n_layer=2", "n_embd=32", "n_head=4", "block_size=32", "batch_size=2"]
COMMON += ["tokens_per_step=256", "compute_dtype=float32", "device=cpu", "compile=false"]
COMMON += ["token_dtype=uint16", "vocab_size=256", "tokenizer.name=bytes"]
GPT_WORDS, LLAMA_WORDS = ["model.name=gpt"], ["model.name=llama", "d_ff=64"]
UNEVEN = [*GPT_WORDS, "n_embd=30", "n_head=2"]
"""Four processes cannot divide its widths: their slices are padded."""
BDH_WORDS = ["mlp_internal_dim_multiplier=8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of tokens, which is read faster than documents."""
    path = tmp_path_factory.mktemp("text") / "train.bin"
    np.tile(np.frombuffer(TEXT.encode(), np.uint8), 60).astype(np.uint16).tofile(path)
    return path


@dataclass
class Made:
    """What a run has computed."""

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def evaluated(self) -> list[float]:
        found = self.evaluations[-1]
        return [*found.val_losses, found.train_loss, *sum(found.active_neurons.values(), [])]


@dataclass
class Runs:
    """Makes runs of the tiny config in this process, one of a group."""

    world: World
    text: Path
    folder: Path

    def __call__(
        self, *words: str, until: int | None = None, save: bool = False, fresh: bool = True
    ) -> Made:
        """Trains; until: the step after which the run stops. save: whether it saves then."""
        arguments = [
            *COMMON,
            f"train_data_path={self.text}",
            f"checkpoint_dir={self.folder}",
            *words,
        ]
        arguments += [] if save else ["save_model=false"]
        with ExitStack() as stack:
            trainer = build(command_line(arguments), self.world, stack)
            if fresh and is_sharded(trainer.model):
                assert_drawn_as_on_one_process(trainer)
            made = Made(trainer)
            record(made)
            trainer.stop_after = until
            train.train(trainer, StopRequest())
            trainer.save(final=True)
        return made


def record(made: Made) -> None:
    """Keeps what the reporter of a run is told."""
    reporter = made.trainer.reporter
    step, log, evaluation = reporter.step, reporter.log, reporter.evaluation

    def on_step(state: TrainState, loss: float, seconds: float, waited_s: float) -> None:
        made.losses.append(loss)
        step(state, loss, seconds, waited_s)

    def on_log(state: TrainState, rate: float, norm: float, weights: str) -> None:
        made.norms.append(norm)
        log(state, rate, norm, weights)

    def on_evaluation(state: TrainState, found: Evaluation, *rest: Any) -> None:
        made.evaluations.append(found)
        evaluation(state, found, *rest)

    for name, function in {"step": on_step, "log": on_log, "evaluation": on_evaluation}.items():
        setattr(reporter, name, function)


def assert_drawn_as_on_one_process(trainer: Trainer) -> None:
    """The weights of a new run are those that its seed gives in one process, bit for bit."""
    seed_generators(trainer.config.training.seed)
    expected = build_model(trainer.config).state_dict()
    assert tensor_hashes(trainer.model.state_dict(), trainer.world) == tensor_hashes(expected)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(full_tensor(value), expected[name]), name


def on_processes(count: int, body: Callable[[World], object], **environment: str) -> None:
    """Calls `body` in `count` forked processes that have joined, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(count):
        place = common | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(300)  # ends processes that wait for each other for ever
            try:
                os.environ.update(place)
                with enter_world(SystemConfig(device="cpu"), DistributedConfig()) as world:
                    body(world)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * count


def assert_close(one: Iterable[float], other: Iterable[float], tolerance: float) -> None:
    one = list(one)
    assert one and list(other) == pytest.approx(one, abs=tolerance)


def assert_same_run(whole: Made, fsdp: Made, tolerance: float = 1e-5) -> None:
    """whole: of a model that is not sharded, in this process alone or with DDP."""
    assert not is_sharded(whole.trainer.model) and is_sharded(fsdp.trainer.model)
    assert len(whole.losses) == STEPS
    assert_close(whole.losses, fsdp.losses, tolerance)
    assert_close(whole.norms, fsdp.norms, 10 * tolerance)
    if fsdp.trainer.world.is_main:  # only there evaluations are whole
        assert_close(whole.evaluated(), fsdp.evaluated(), tolerance)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory of this process's slices, counted from storages, each of them once."""
    slices = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    storages = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in slices}
    return sum(storages.values())


def assert_divided(made: Made, shards: int) -> None:
    """A process holds 1.15 of its share of weights, gradients and optimizer state at most."""
    trainer, model = made.trainer, made.trainer.model
    share = 1.15 * sum(parameter.nbytes for parameter in model.parameters()) / shards
    moments = [v for state in trainer.optimizer.state.values() for v in state.values() if v.dim()]
    assert all(isinstance(value, DTensor) for value in moments)
    rows, gradients = torch.zeros(2, 17, dtype=torch.long), list[Tensor]()
    for last in (False, True):
        assert gradients == [], "exchanged before the last micro-step"
        with no_sync_until_last(trainer.parallel_model, last):
            torch.autograd.backward(next_token_loss(trainer.parallel_model, rows, CPU))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert held_bytes(model.parameters()) <= share
    assert held_bytes(gradients) <= share
    assert held_bytes(moments) <= 2 * share
    model.zero_grad()


PROMPT = ["sample_prompt=the dragon", "sample_tokens=3"]
OF_FOUR = ["use_4bit=false", "recompute=layer", "tokens_per_step=512"]
# Runs of one process, to which sharded ones are compared. Those of 16 bits round the same numbers;
# what is left is the order of sums.
ALONE = {
    "llama": [*LLAMA_WORDS, "use_4bit=true", "quantize_after=0.4", "recompute=layer"],
    # BDH's default: all weights are gathered at the root, and rounded after half of the run.
    "bdh": [*BDH_WORDS, *PROMPT, "use_4bit=true", "quantize_after=0.4"],
    "float16": [*GPT_WORDS, "compute_dtype=float16"],
    "bfloat16": [*GPT_WORDS, "compute_dtype=bfloat16"],
    "muon": [*BDH_WORDS, "use_4bit=false", "optimizer.name=muon"],
}
ALONE_OF_FOUR = {
    "uneven": [*UNEVEN, *OF_FOUR],
    # Four processes cannot share two heads: BDH's weights are cut along the neurons.
    "bdh": [*BDH_WORDS, *OF_FOUR, "n_head=2"],
}


def two_processes(run: Runs, alone: dict[str, Made]) -> None:
    def sharded(name: str) -> Made:
        return run(*ALONE[name], "strategy=fsdp")

    words = [*GPT_WORDS, *PROMPT, "use_4bit=false"]
    ddp, fsdp = run(*words, "strategy=ddp"), run(*words, "strategy=fsdp")
    assert_same_run(ddp, fsdp)
    assert_divided(fsdp, 2)
    is_main = run.world.is_main
    assert not is_main or ddp.evaluations[-1].sample == fsdp.evaluations[-1].sample
    assert_same_run(alone["llama"], sharded("llama"))
    fsdp = sharded("bdh")
    assert_same_run(alone["bdh"], fsdp)
    assert_divided(fsdp, 2)
    losses = [each.evaluations[-1].val_loss_quantized or 0.0 for each in (alone["bdh"], fsdp)]
    assert not is_main or (losses[0] and losses[1] == pytest.approx(losses[0], abs=1e-4))
    assert_same_run(alone["float16"], sharded("float16"), tolerance=2e-4)
    words = [*GPT_WORDS, *FP8]  # whose scales follow from the micro-steps of a process
    assert_same_run(run(*words, "strategy=ddp"), run(*words, "strategy=fsdp"), tolerance=2e-4)
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU: the optimizer looks at a flag
        patch.setattr("engine.setup.build.reads_late", lambda parts: True)
        assert_same_run(alone["bfloat16"], sharded("bfloat16"), tolerance=2e-4)
    fsdp = sharded("muon")
    assert_same_run(alone["muon"], fsdp, tolerance=1e-4)  # its products are in bfloat16
    assert_same_muon(alone["muon"].trainer, fsdp.trainer)
    words = [*GPT_WORDS, "strategy=fsdp", "use_4bit=false", "max_iters=2", "save_model=true"]
    arguments = [*COMMON, f"train_data_path={run.text}", f"checkpoint_dir={run.folder}", *words]
    request = command_line([*arguments, "--check-resume=2"])
    assert check_resume(request, run.world, StopRequest(), train.train) == 0


FP8 = ["use_fp8=true", "fp8.recipe=delayed", "compute_dtype=bfloat16"]


def assert_same_muon(whole: Trainer, fsdp: Trainer) -> None:
    """Momenta are sharded as their parameters are, and equal."""
    compared = 0
    pairs = zip(whole.model.named_parameters(), fsdp.model.named_parameters(), strict=True)
    for (_, one), (_, other) in pairs:
        for name, value in whole.optimizer.state[one].items():
            found = fsdp.optimizer.state[other][name]
            if value.dim():
                assert isinstance(found, DTensor) and isinstance(other, DTensor)
                assert found.placements == other.placements
                assert torch.allclose(full_tensor(found), value, atol=1e-4)
                compared += 1
    assert compared > 3


def four_processes(run: Runs, alone: dict[str, Made]) -> None:
    for strategy, shards in (("fsdp", 4), ("hsdp", 2)):
        made = run(*ALONE_OF_FOUR["uneven"], f"strategy={strategy}")
        assert_same_run(alone["uneven"], made)
        assert_divided(made, shards)
    fsdp = run(*ALONE_OF_FOUR["bdh"], "strategy=fsdp")
    assert_same_run(alone["bdh"], fsdp)
    assert_divided(fsdp, 4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_sharded_runs_are_those_of_whole_models_with_a_share_of_the_memory(
    count: int, text: Path, tmp_path: Path
) -> None:
    """Losses, norms, evaluations of an odd number of batches, memory, number formats, Muon."""
    body, cases = {2: (two_processes, ALONE), 4: (four_processes, ALONE_OF_FOUR)}[count]
    run = Runs(World(0, 1, CPU), text, tmp_path)
    alone = {name: run(*words) for name, words in cases.items()}
    on_processes(count, lambda world: body(replace(run, world=world), alone), LOCAL_WORLD_SIZE="2")


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_sharded_or_not(
    text: Path, tmp_path: Path
) -> None:
    """1 -> 2 -> 4 -> 1 processes, and from ddp to fsdp and back; also as weights to begin with."""
    words = [*UNEVEN, "use_4bit=false", "max_iters=8", "batch_size=1", "test_freq=8"]
    alone = Runs(World(0, 1, CPU), text, tmp_path / "straight")
    straight = alone(*words).losses

    def continued(until: int, *more: str) -> Callable[[World], None]:
        def go_on(world: World) -> None:
            run = Runs(world, text, tmp_path / "chain")
            resume = [f"resume_from_checkpoint={tmp_path / 'chain'}"] if until > 2 else []
            made = run(*words, *more, *resume, until=until, save=True, fresh=False)
            assert_close(straight[until - len(made.losses) : until], made.losses, 1e-5)

        return go_on

    def on_two(world: World) -> None:
        for until, strategy in ((4, "fsdp"), (5, "ddp"), (6, "fsdp")):
            continued(until, f"strategy={strategy}")(world)
        begun = [
            Runs(world, text, tmp_path / strategy)(
                *words,
                f"init_from={tmp_path / 'chain'}",
                f"strategy={strategy}",
                until=1,
                fresh=False,
            )
            for strategy in ("ddp", "fsdp")
        ]
        assert_close(begun[0].losses, begun[1].losses, 1e-5)

    continued(2)(World(0, 1, CPU))
    on_processes(2, on_two)
    on_processes(4, continued(7, "strategy=fsdp"))
    continued(8)(World(0, 1, CPU))


def test_a_weight_is_cut_where_all_slices_are_equal() -> None:
    assert shard_dim((8, 6), 4) == 0
    assert shard_dim((4, 256, 8192), 8) == 2, "of BDH's encoder (H, D, N) the neurons"
    assert shard_dim((3, 16, 8), 4) == 1
    assert shard_dim((30, 6), 4) == 0, "padded: torch cuts only the first dimension unevenly"
    assert shard_dim((7,), 4) == 0


def test_nodes_of_different_sizes_are_refused_by_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would build another mesh, and wait for processes that are not in it."""
    monkeypatch.setattr(World, "all_gather", lambda self, numbers: [[2], [2], [1]])
    for rank, local_size in enumerate((2, 2, 1)):
        with pytest.raises(ConfigError, match="have from 1 to 2. Set it to fsdp"):
            shard_mesh("hsdp", World(rank, 3, CPU, local_size))


def test_the_start_says_what_is_sharded() -> None:
    def line(strategy: str, size: int, local_size: int) -> str:
        world = World(0, size, CPU, local_size)
        return " ".join(sharding_lines(strategy, nn.Linear(256, 256, bias=False), world))

    assert line("ddp", 4, 4) == line("auto", 4, 4) == ""
    assert line("fsdp", 1, 1) == "distributed.strategy=fsdp: not sharded, with one process"
    assert line("hsdp", 2, 1) == "distributed.strategy=hsdp: not sharded, with one process per node"
    assert "over 8 processes; 262 kB of weights in each" in line("fsdp", 8, 4)
    assert "over 4 processes, as fsdp does: they are on one node" in line("hsdp", 4, 4)
    assert "over 4 processes of a node, the same on 2 nodes" in line("hsdp", 8, 4)


def test_a_sharded_model_is_compiled_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    config = configured(model={"name": "llama", "vocab_size": 256})
    model = build_model(config)
    model.compile_layers()
    assert compiled == [model.get_submodule(f"layers.{layer}") for layer in range(2)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_a_sharded_model_does_not_go_on_after_a_failed_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing() -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr("engine.compile.is_sharded", lambda model: True)
    monkeypatch.setattr("engine.compile.compiler_for", lambda device: "g++")
    with pytest.raises(ConfigError, match="no such compiler.*Set system.compile: false"):
        compile_model(nn.Linear(2, 2), True, CPU, failing)
