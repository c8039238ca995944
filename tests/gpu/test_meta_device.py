"""What a GPU would see of a step, without one: models on torch's "meta" device.

A meta tensor has a shape, a dtype and a device but no numbers, so reading one raises, as a wait for
the GPU that nobody wanted. Operators that take tensors of the CPU and of the device together are
found by looking at each of them; those of a graph in what Dynamo traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.loading.packing import document_ids
from engine.loss import next_token_loss
from model import LanguageModel, attention, build_model, transformer
from model.bdh.elementwise import compiled_ops
from model.generate import RecordedDecoder
from tests.model.transformers import config

META = torch.device("meta")
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4}
BDH = {"n_embd": 32, "mlp_internal_dim_multiplier": 16, "dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "bdh": BDH,
    "gpt": {"dropout": 0.1, "attention": "flash"},
    "gpt by formula": {"attention": "math"},
    "llama": {"n_kv_head": 2},
    "llama by formula": {"attention": "math", "dropout": 0.1},
}
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])


class OnOneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Collects the operators that take or return tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.faults: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.is_cpu for t in tensors):
            self.faults.append(f"{func} {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return result


def on_meta(variant: str, block_size: int = 64) -> LanguageModel:
    """A small model, moved as a run moves it to its GPU: what stays on the CPU then stays here."""
    run = config(variant.split()[0], **{**SMALL, **VARIANTS[variant]})
    object.__setattr__(run.training, "block_size", block_size)
    return build_model(run).to(META)


def loss_of(model: nn.Module, tokens: int, documents: bool) -> Tensor:
    rows = torch.zeros(4, tokens + 1, dtype=torch.uint8, device=META)
    ids = partial(document_ids, separator=0) if documents else None
    return next_token_loss(model, rows, META, ids)


def second(run: Callable[[], object]) -> list[str]:
    """The faults of a second call: the first one may bring tables to the device."""
    run()
    mode = OnOneDevice()
    with mode:
        run()
    return mode.faults


@DOCUMENTS
@pytest.mark.parametrize("tokens", [64, 1024], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_stays_on_its_device(variant: str, tokens: int, documents: bool) -> None:
    model = on_meta(variant, tokens)
    assert second(lambda: torch.autograd.backward(loss_of(model, tokens, documents))) == []
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("variant", ["bdh", "gpt", "llama"])
def test_a_model_that_is_made_on_its_device_computes_there(variant: str) -> None:
    with META:
        model = build_model(config(variant, **SMALL))
    torch.autograd.backward(loss_of(model, 16, documents=False))
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@DOCUMENTS
@pytest.mark.parametrize("variant", ["bdh", "gpt", "llama"])
def test_an_evaluation_stays_on_its_device(variant: str, documents: bool) -> None:
    model = on_meta(variant).eval()
    with torch.inference_mode():
        assert second(lambda: loss_of(model, 64, documents)) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_stays_on_its_device(variant: str) -> None:
    model = on_meta(variant).eval()
    cache = model.init_cache(2)

    def generate() -> None:
        model.clear_cache(cache)
        for tokens in (10, 1, 1):
            model.prefill_or_decode(torch.zeros(2, tokens, dtype=torch.long, device=META), cache)

    assert second(generate) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_step_of_generation_stays_on_its_device(variant: str) -> None:
    model = on_meta(variant).eval()
    decoder = RecordedDecoder(model, 2, 16, META, lambda step, device: step)

    @torch.inference_mode()
    def generate() -> None:
        decoder.prefill(torch.zeros(2, 10, dtype=torch.long, device=META))
        for _ in range(2):
            decoder.decode(torch.zeros(2, 1, dtype=torch.long, device=META))

    assert second(generate) == []


class Collector:
    """A compiler backend that runs graphs as they are and keeps what they hold of the CPU."""

    def __init__(self) -> None:
        self.graphs = 0
        self.on_cpu: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        for node in graph.graph.nodes:
            for value in tree_leaves(node.meta.get("example_value")):
                if isinstance(value, Tensor) and value.is_cpu:
                    self.on_cpu.append(f"{node.op} {node.target}")
        return graph.forward


@pytest.fixture
def collector() -> Iterator[Collector]:
    torch.compiler.reset()
    yield Collector()
    torch.compiler.reset()


@pytest.mark.slow
@DOCUMENTS
@pytest.mark.parametrize("variant", ["gpt", "llama"])
def test_a_compiled_model_is_one_graph_without_work_for_the_cpu(
    variant: str, documents: bool, collector: Collector
) -> None:
    tokens = torch.zeros(4, 64, dtype=torch.long, device=META)
    ids = tokens if documents else None
    torch.compile(on_meta(variant), backend=collector)(tokens, ids, tokens)
    assert (collector.graphs, collector.on_cpu) == (1, [])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what Dynamo warns of here is its own
def test_attention_by_blocks_of_documents_is_part_of_the_one_graph(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    def blocks(kind: str, x: Tensor, shape: tuple[int, int], ids: Tensor, *_: Any) -> Any:
        mask = attention._block_mask(ids, shape, x.device)
        return attention.AttentionMask("flex", is_causal=False, blocks=mask)

    monkeypatch.setattr(transformer, "training_mask", blocks)  # as on CUDA
    model = build_model(config("gpt", **SMALL))
    tokens = torch.zeros(4, 16, dtype=torch.long)  # on "meta" FlexAttention cannot index
    with torch.no_grad():  # of blocks there is a backward pass on CUDA only
        torch.compile(model, backend=collector)(tokens, tokens, tokens)
    assert collector.graphs == 1


@pytest.mark.slow
@DOCUMENTS
def test_elementwise_functions_of_bdh_compile_whole_and_without_the_cpu(
    documents: bool, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    whole = partial(torch.compile, backend=collector, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_options: whole(function))
    compiled_ops.cache_clear()
    model = on_meta("bdh", 1024)
    model.compile()
    torch.autograd.backward(loss_of(model, 1024, documents))
    compiled_ops.cache_clear()
    assert collector.graphs >= 5
    assert collector.on_cpu == []
