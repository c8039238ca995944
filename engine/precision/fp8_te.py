"""FP8 by NVIDIA's Transformer Engine: its modules multiply, the weights stay the model's own.

    backend = TransformerEngineBackend(config.fp8, device, model)
    with backend.training():
        with backend.autocast(), torch.autocast("cuda", dtype=torch.bfloat16):
            loss = ...
        loss.backward()

A module of Transformer Engine is held outside the model, without memory for weights, and called
with a weight of the model in place of its own (`torch.func.functional_call`). It reads its weights
by name at each call and quantizes what it finds, from float32 to 8 bits in one step; gradients flow
back to the model's parameters. So names, shapes, optimizer and checkpoints are the same with and
without FP8.

Each layer has modules of its own, even in BDH, whose layers share their weights: with delayed
scaling a module must not be called twice within one autocast, because the second call's amax would
mix with the first's; and activations differ in size from layer to layer: each has its own scale.

Source: Transformer Engine 2.20, module/{base,linear,grouped_linear}.py and quantization.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from config import FP8_MULTIPLE, ConfigError, Fp8Config
from engine.precision.fp8_backend import Fp8Backend
from model import LanguageModel

INSTALL = "pip install --no-build-isolation -r requirements-fp8.txt"
OTHERWISE = "Otherwise set fp8.backend: native (current, delayed), or low_precision.use_fp8: false."
RECIPES = {
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
AVAILABLE = {"block": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
SCALES = ("scale", "amax_history")  # what delayed scaling remembers, forward and backward


def _option(fp8: Fp8Config) -> str:
    """Returns the option that needs Transformer Engine, with its value."""
    if fp8.recipe in AVAILABLE:
        return f"fp8.recipe={fp8.recipe}"
    return "fp8.backend=transformer_engine"


def library(fp8: Fp8Config) -> tuple[ModuleType, ModuleType]:
    """Returns Transformer Engine's modules for torch and its recipes; ConfigError if missing."""
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te

        te.autocast, te.is_mxfp8_available  # noqa: B018  # missing in older versions
    except Exception as error:  # a broken installation raises more than ImportError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{_option(fp8)} needs Transformer Engine 2.20 or later, which cannot be "
            f"imported here ({reason[0]}). Install it: {INSTALL}. {OTHERWISE}"
        ) from None
    return te, recipes


def checked_library(fp8: Fp8Config, device: torch.device) -> tuple[ModuleType, ModuleType]:
    """Returns `library(fp8)`; raises ConfigError if `device` does not compute `fp8.recipe`."""
    if device.type != "cuda":
        raise ConfigError(
            f"{_option(fp8)} needs Transformer Engine, which runs on CUDA only, and the device is "
            f"{device}. {OTHERWISE}"
        )
    te, recipes = library(fp8)
    torch.cuda.set_device(device)  # Transformer Engine asks, and keeps its scales on, this one
    available, reason = getattr(te, AVAILABLE.get(fp8.recipe, "is_fp8_available"))(
        return_reason=True
    )
    if not available:
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        other = "fp8.recipe: current or " if fp8.recipe in AVAILABLE else ""
        raise ConfigError(
            f"low_precision.use_fp8 with fp8.recipe={fp8.recipe} does not run on {name}, of "
            f"compute capability {capability}: {reason} Use {other}another GPU. {OTHERWISE}"
        )
    return te, recipes


def recipe_for(fp8: Fp8Config, recipes: ModuleType) -> Any:
    """Returns the recipe that `te.autocast` takes."""
    options = {"fp8_format": getattr(recipes.Format, fp8.format.upper())}
    if fp8.recipe == "delayed":
        options["amax_history_len"] = fp8.amax_history_len
        options["amax_compute_algo"] = fp8.amax_compute_algo
    return getattr(recipes, RECIPES[fp8.recipe])(**options)


class TransformerEngineBackend(Fp8Backend):
    """Transformer Engine's modules in place of the model's products.

    matmul_count: calls of modules in FP8. Each is one product in the forward pass (with BDH's
    encoder_v one for all heads), followed by two in the backward pass.
    """

    matmul_count = 0

    def __init__(self, fp8: Fp8Config, device: torch.device, model: LanguageModel) -> None:
        """Raises ConfigError if library, device or a weight do not fit."""
        self.te, recipes = checked_library(fp8, device)
        self.fp8, self.recipe = fp8, recipe_for(fp8, recipes)
        self.multiple = 2 * FP8_MULTIPLE if fp8.recipe == "mxfp8" else FP8_MULTIPLE
        super().__init__(fp8, model, self.multiple)
        scaling = "mxfp8" if fp8.recipe == "mxfp8" else f"{fp8.recipe} scaling"
        self.summary = f"transformer_engine, {scaling}"
        self.modules: dict[str, Any] = {}  # by weight, and layer where layers share weights
        self._active = False
        for name, linear in model.hidden_linears().items():
            key, bias = f"{name}.weight", linear.bias is not None
            self._add("Linear", key, linear.in_features, linear.out_features, bias=bias)
            linear.linear_fn = partial(self._linear, key)
        if model.matmul_backend is not None:
            self._attach_projections(model)
        # Created now: in inference mode, scales would become tensors that training cannot change.
        with torch.inference_mode(False), torch.no_grad(), self._te_autocast():
            for module in self.modules.values():
                module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))

    def _attach_projections(self, model: LanguageModel) -> None:
        """Gives a model of fused layers a module per weight and layer (`TEProjections`)."""
        encoder, encoder_v, decoder = self.covered
        heads, width, neurons = model.hidden_weights()[0].weight.shape
        for layer in range(model.n_layer):
            self._add("Linear", f"{encoder}.{layer}", width, heads * neurons)
            self._add("GroupedLinear", f"{encoder_v}.{layer}", heads, width, neurons)
            self._add("Linear", f"{decoder}.{layer}", heads * neurons, width)
        model.projections = partial(TEProjections, self)

    def _add(self, kind: str, key: str, *sizes: int, bias: bool = False) -> None:
        # "meta": the module allocates no weights, because it is only called with the model's.
        options = {"bias": bias, "params_dtype": torch.float32, "device": "meta"}
        self.modules[key] = getattr(self.te, kind)(*sizes, **options)

    def _te_autocast(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object]
        context = self.te.autocast(enabled=True, recipe=self.recipe)
        return context

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        self._active = True
        try:
            with self._te_autocast():
                yield
        finally:
            self._active = False

    @contextlib.contextmanager
    def frozen_scales(self) -> Iterator[None]:
        """Restores delayed scales after the passes within: Transformer Engine records amax, and
        makes new scales, in evaluations too."""
        saved = {name: value.clone() for name, value in self._scales()}
        try:
            yield
        finally:
            for name, value in self._scales():
                value.copy_(saved[name])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # like their modules; and it counts
    def multiply(self, key: str, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        """Calls the module `key` with these parameters, weights (out, in), on inputs, x (..., in)
        first. Raises ConfigError for a number of tokens that does not fit."""
        module, rows = self.modules[key], inputs[0].numel() // inputs[0].shape[-1]
        if self._active and rows % self.multiple:
            raise ConfigError(
                f"low_precision.use_fp8: with fp8.recipe={self.fp8.recipe} matmuls take multiples "
                f"of {self.multiple} tokens, which {rows} is not; change training.batch_size or "
                "training.block_size."
            )
        result: Tensor = functional_call(module, parameters, inputs)
        self.matmul_count += bool(module.fp8)  # set by the call
        return result

    def _linear(self, key: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = self.multiply(key, parameters, x)
        return result

    def _scales(self) -> Iterator[tuple[str, Tensor]]:
        """Yields all that delayed scaling remembers, by name; other recipes remember nothing."""
        if self.fp8.recipe != "delayed":
            return
        for key, module in self.modules.items():
            for direction in ("scaling_fwd", "scaling_bwd"):
                for part in SCALES:
                    yield f"{key}.{direction}.{part}", getattr(module.fp8_meta[direction], part)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._scales()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        own = dict(self._scales())
        shapes = {name: value.shape for name, value in own.items()}
        if shapes != {name: getattr(value, "shape", None) for name, value in state.items()}:
            return not own  # without delayed scales there is nothing to restore
        for name, value in own.items():
            value.copy_(state[name])
        return True


class TEProjections:
    """The products of a model of fused layers in one forward pass: `model.matmul.Projections`.

    Weights are transposed to (out, in) once for all layers:

        encoder (H, D, N) -> (H * N, D), whose outputs are the neurons of all heads
        encoder_v (H, D, N) -> one (N, D) per head; inputs are the rows of head 0, of head 1, ...
        decoder (H * N, D) -> (D, H * N)
    """

    def __init__(
        self, backend: TransformerEngineBackend, weights: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        encoder, encoder_v, decoder = weights
        self.backend = backend
        self.heads, width, self.neurons = encoder.shape
        self.encoder = {"weight": encoder.mT.reshape(-1, width)}
        by_head = encoder_v.mT.contiguous().unbind()
        self.encoder_v = {f"weight{head}": weight for head, weight in enumerate(by_head)}
        self.decoder = {"weight": decoder.mT.contiguous()}

    def _multiply(
        self, weight: int, layer: int, parameters: dict[str, Tensor], *inputs: Tensor
    ) -> Tensor:
        key = f"{self.backend.covered[weight]}.{layer}"
        result: Tensor = self.backend.multiply(key, parameters, *inputs)
        return result

    def encode(self, x: Tensor, layer: int) -> Tensor:
        """(B, T, D) -> (B, H, T, N)."""
        u = self._multiply(0, layer, self.encoder, x)
        return u.view(*x.shape[:2], self.heads, self.neurons).transpose(1, 2)

    def encode_v(self, a: Tensor, layer: int) -> Tensor:
        """(B, H, T, D) -> (B, H, T, N)."""
        by_head = a.transpose(0, 1)
        rows = by_head.reshape(-1, a.shape[-1])
        # The splits are on the CPU: from the GPU, Transformer Engine would have to wait for them.
        splits = torch.full((self.heads,), len(rows) // self.heads)
        v = self._multiply(1, layer, self.encoder_v, rows, splits)
        return v.view(*by_head.shape[:3], self.neurons).transpose(0, 1)

    def decode(self, z: Tensor, layer: int) -> Tensor:
        """(B, H, T, N) -> (B, T, D)."""
        return self._multiply(2, layer, self.decoder, z.transpose(1, 2).flatten(2))
