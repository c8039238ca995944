"""FP8 by NVIDIA's Transformer Engine: its modules multiply, the weights stay the model's own.

    backend = TransformerEngineBackend(config.fp8, device, model)
    with backend.training():
        with backend.autocast(), torch.autocast("cuda", dtype=torch.bfloat16):
            loss = ...
        loss.backward()

The one idea: a module of Transformer Engine is held outside the model, without memory for weights,
and called with a weight of the model in place of its own (`torch.func.functional_call`). It reads
its weights by name at each call and quantizes what it finds, from float32 to 8 bits in one step;
gradients flow back to the model's parameters. So names, shapes, optimizer and checkpoints are the
same with and without FP8. The head and the embedding stay in bfloat16.

Each layer has modules of its own, even in BDH, whose layers share their weights: with delayed
scaling a module must not be called twice within one autocast, for the second call's maxima would
mix with the first's; and the layers' activations differ in size, so each gets scales of its own.

Source: Transformer Engine 2.20, module/{base,linear,grouped_linear}.py and quantization.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from config import FP8_MULTIPLE, ConfigError, Fp8Config
from model.interface import LanguageModel

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

Multiply = Callable[..., Tensor]
"""`TransformerEngineBackend.multiply`."""


def _asked(fp8: Fp8Config) -> str:
    if fp8.recipe in AVAILABLE:
        return f"fp8.recipe={fp8.recipe} needs"
    return "fp8.backend=transformer_engine needs"


def library(asked: str) -> tuple[ModuleType, ModuleType]:
    """Transformer Engine's modules for torch, and its recipes; ConfigError where it is missing."""
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te

        te.autocast, te.is_mxfp8_available  # noqa: B018  # older ones lack these
    except Exception as error:  # besides ImportError, what a broken or half-installed one raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{asked} Transformer Engine 2.20 or later, which cannot be "
            f"imported here ({reason[0]}). Install it: {INSTALL}. {OTHERWISE}"
        ) from None
    return te, recipes


def checked_library(fp8: Fp8Config, device: torch.device) -> tuple[ModuleType, ModuleType]:
    """`library`, once the device is known to compute `fp8.recipe`; ConfigError if it does not."""
    if device.type != "cuda":
        raise ConfigError(
            f"{_asked(fp8)} Transformer Engine, which runs on CUDA only, and the device is "
            f"{device}. {OTHERWISE}"
        )
    te, recipes = library(_asked(fp8))
    torch.cuda.set_device(device)  # the one that Transformer Engine asks and keeps its scales on
    able, reason = getattr(te, AVAILABLE.get(fp8.recipe, "is_fp8_available"))(return_reason=True)
    if not able:
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        other = "fp8.recipe: current or " if fp8.recipe in AVAILABLE else ""
        raise ConfigError(
            f"low_precision.use_fp8 with fp8.recipe={fp8.recipe} does not run on {name}, of "
            f"compute capability {capability}: {reason} Use {other}another GPU. {OTHERWISE}"
        )
    return te, recipes


def recipe_for(fp8: Fp8Config, recipes: ModuleType) -> Any:
    """What te.autocast takes."""
    options = {"fp8_format": getattr(recipes.Format, fp8.format.upper())}
    if fp8.recipe == "delayed":
        options["amax_history_len"] = fp8.amax_history_len
        options["amax_compute_algo"] = fp8.amax_compute_algo
    return getattr(recipes, RECIPES[fp8.recipe])(**options)


class TransformerEngineBackend:
    """A model's products with its hidden weights, by Transformer Engine's modules.

    covered: the names of the weights whose products are computed in FP8. calls: how many calls of
    modules Transformer Engine has computed in FP8; each is one product with a weight, that with
    BDH's encoder_v being one for all heads, and is followed by two products in backward.
    """

    compiles = True  # around its modules

    def __init__(self, fp8: Fp8Config, device: torch.device, model: LanguageModel) -> None:
        """Has the model multiply here; ConfigError where library, device or a weight do not fit."""
        self.te, recipes = checked_library(fp8, device)
        self.fp8, self.recipe = fp8, recipe_for(fp8, recipes)
        scaling = "mxfp8" if fp8.recipe == "mxfp8" else f"{fp8.recipe} scaling"
        self.summary = f"transformer_engine, {scaling}"
        self.multiple = 2 * FP8_MULTIPLE if fp8.recipe == "mxfp8" else FP8_MULTIPLE
        self.modules: dict[str, Any] = {}  # by weight, and layer where layers share weights
        self.covered: list[str] = []
        self.calls = 0
        self._active = self._training = False
        self._settled: dict[str, Tensor] = {}  # scales as training left them, if others were made
        self._attach(model)

    def _attach(self, model: LanguageModel) -> None:
        for name, layer in model.hidden_linears().items():
            key = f"{name}.weight"
            self._cover(key, layer.weight)
            sizes = (layer.in_features, layer.out_features)
            self.modules[key] = self._made("Linear", sizes, bias=layer.bias is not None)
            layer.linear_fn = partial(self._product, key)
        if model.matmul_backend is not None:
            self._attach_bdh(model)
        with torch.inference_mode(False), torch.no_grad(), self._te_autocast():
            # Now: made in an evaluation, scales would be tensors that cannot change in training.
            for module in self.modules.values():
                module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))

    def _attach_bdh(self, model: LanguageModel) -> None:
        weights = [weight for weight, _ in model.hidden_weights()]
        for name, weight in zip(("encoder", "encoder_v", "decoder"), weights, strict=True):
            self._cover(name, weight)
        heads, width, neurons = weights[0].shape
        sizes = (width, heads * neurons)
        for layer in range(model.n_layer):
            self.modules[f"encoder.{layer}"] = self._made("Linear", sizes)
            grouped = self._made("GroupedLinear", (heads, width, neurons))
            self.modules[f"encoder_v.{layer}"] = grouped
            self.modules[f"decoder.{layer}"] = self._made("Linear", sizes[::-1])
        model.projections = partial(BDHProjections, self.multiply)

    def _made(self, kind: str, sizes: tuple[int, ...], bias: bool = False) -> Any:
        """A module without memory of its own, which is what the device "meta" gives."""
        made = getattr(self.te, kind)
        return made(*sizes, bias=bias, params_dtype=torch.float32, device="meta")

    def _cover(self, name: str, weight: Tensor) -> None:
        """Notes a weight whose last two sides are those of its product."""
        self.covered.append(name)
        if any(size % self.multiple for size in weight.shape[-2:]):
            raise ConfigError(
                f"low_precision.use_fp8: {name} is {tuple(weight.shape)}, and with "
                f"fp8.recipe={self.fp8.recipe} products take multiples of {self.multiple} in the "
                "last two dimensions. Change the model's widths, or set "
                "low_precision.use_fp8: false."
            )

    def _te_autocast(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object]
        context = self.te.autocast(enabled=True, recipe=self.recipe)
        return context

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of every forward pass, in training and evaluation."""
        if not self._training and not self._settled:
            self._settled = {name: value.clone() for name, value in self._state()}
        self._active = True
        try:
            with self._te_autocast():
                yield
        finally:
            self._active = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the forward and backward passes of a step: only these leave a trace in scales."""
        self._settle()
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _settle(self) -> None:
        for name, value in self._state():
            if name in self._settled:
                value.copy_(self._settled[name])
        self._settled = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as their modules are; and it counts
    def multiply(self, key: str, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        """The module of that name on inputs, x (..., in) first, with parameters in the place of its
        own, weights (out, in). ConfigError for a number of tokens that does not fit."""
        module, rows = self.modules[key], inputs[0].numel() // inputs[0].shape[-1]
        if self._active and rows % self.multiple:
            raise ConfigError(
                f"low_precision.use_fp8: with fp8.recipe={self.fp8.recipe} products take multiples "
                f"of {self.multiple} tokens, which {rows} is not; change training.batch_size or "
                "training.block_size."
            )
        result: Tensor = functional_call(module, parameters, inputs)
        self.calls += bool(module.fp8)  # what it found when called
        return result

    def _product(self, key: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = self.multiply(key, parameters, x)
        return result

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that delayed scaling remembers; other recipes remember nothing."""
        if self.fp8.recipe != "delayed":
            return
        for key, module in self.modules.items():
            meta: Any = module.fp8_meta
            for direction in ("scaling_fwd", "scaling_bwd"):
                for part in SCALES:
                    yield f"{key}.{direction}.{part}", getattr(meta[direction], part)

    def end_step(self, maximum: Callable[[Tensor], Tensor]) -> None:
        """Nothing: Transformer Engine has updated scales, with the maxima of all processes."""

    def metrics(self) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Scales and the maxima behind them, copied to the CPU; empty unless scaling is delayed."""
        state = self._settled or dict(self._state())
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Whether this is what `state_dict` gave, of such a model and such a length of history, and
        was restored; else scales stay as they are. Without scales there is nothing to restore."""
        own = dict(self._state())
        shapes = {name: value.shape for name, value in own.items()}
        if shapes != {name: getattr(value, "shape", None) for name, value in state.items()}:
            return not own
        self._settled = {}
        for name, value in own.items():
            value.copy_(state[name])
        return True


class BDHProjections:
    """BDH's products with its weights in one forward pass, as modules take them.

    Weights are turned to (out, in) once for all layers:

        encoder (H, D, N) -> (H * N, D), whose outputs are all heads' neurons
        encoder_v (H, D, N) -> one (N, D) per head; inputs are the rows of head 0, of head 1, ...
        decoder (H * N, D) -> (D, H * N)
    """

    def __init__(self, multiply: Multiply, weights: tuple[Tensor, Tensor, Tensor]) -> None:
        encoder, encoder_v, decoder = weights
        self.multiply = multiply
        self.heads, width, self.neurons = encoder.shape
        self.encoder = {"weight": encoder.mT.reshape(-1, width)}
        of_heads = encoder_v.mT.contiguous().unbind()
        self.encoder_v = {f"weight{head}": weight for head, weight in enumerate(of_heads)}
        self.decoder = {"weight": decoder.mT.contiguous()}

    def encode(self, x: Tensor, layer: int) -> Tensor:
        """(B, T, D) -> (B, H, T, N)."""
        u = self.multiply(f"encoder.{layer}", self.encoder, x)
        return u.view(*x.shape[:2], self.heads, self.neurons).transpose(1, 2)

    def encode_v(self, a: Tensor, layer: int) -> Tensor:
        """(B, H, T, D) -> (B, H, T, N)."""
        by_head = a.transpose(0, 1)
        rows = by_head.reshape(-1, a.shape[-1])
        each = torch.full((self.heads,), len(rows) // self.heads)  # int64 on the CPU: no waiting
        v = self.multiply(f"encoder_v.{layer}", self.encoder_v, rows, each)
        return v.view(*by_head.shape[:3], self.neurons).transpose(0, 1)

    def decode(self, z: Tensor, layer: int) -> Tensor:
        """(B, H, T, N) -> (B, T, D)."""
        return self.multiply(f"decoder.{layer}", self.decoder, z.transpose(1, 2).flatten(2))
