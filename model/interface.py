"""The interface of a model: all that training, number formats and sampling ask of one.

A new architecture is a subclass of `LanguageModel` with an entry in `model.registry.MODELS`, a name
and options in `config.ModelConfig`. Build its linear layers from `model.matmul.Linear`, else
number formats and adapters do not find them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.matmul import Linear, MatmulBackend, OperandId, ProjectionFactory


class HiddenWeight(NamedTuple):
    """A weight matrix between embedding and head, for what treats matrices as such: Muon, FP8,
    4-bit weights, adapters."""

    weight: Tensor
    """2-D or 3-D: an `nn.Parameter`, or where adapters have replaced it, an empty tensor of its
    shape on the device "meta"."""
    n_fused: int
    """Matrices of equal size stacked along dimension 0: 3 for query, key and value in one. Muon
    updates each by itself."""


class LanguageModel(nn.Module):
    """A model that predicts the next token: token ids (B, T) -> logits (B, T, V), or the loss.

    It knows nothing of data, ranks or number formats; those wrap the finished model from outside.
    """

    max_context: int | None = None
    """The longest context the model can take, in tokens; None: any."""
    n_layer: int
    residual_dtype: torch.dtype | None = None
    """dtype of the residual stream of GPT and Llama, the same as autocast's; None: that of the
    embedding. Norms compute in float32 either way."""
    recompute: bool = False
    """Whether a layer keeps only its input for backward, and is computed again there
    (`training.recompute`). The numbers are the same, but for what a compiler fuses and rounds."""
    layers_share_weights = False
    """Whether all layers use the same weights. If not, each layer has at least one of its own."""

    # A model with `Linear` modules leaves these two alone: each module has a replaceable function.
    matmul_backend: MatmulBackend | None = None
    """What computes the products of fused layers (BDH) with the hidden weights; None without fused
    layers."""
    projections: ProjectionFactory | None = None
    """Modules that compute the same products in place of `matmul_backend`, with a backward pass of
    their own (Transformer Engine, for BDH); None: not used."""

    def use_triton(self) -> str | None:
        """Switches fused layers to Triton kernels. Returns None, or the reason if they do not take
        the model's shapes. Only for models with a `matmul_backend`, on CUDA."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Returns logits (B, T, V) of the next token at each position of tokens (B, T); with
        targets (B, T), their summed cross-entropy () in nats instead, in float32 at least.

        documents (B, T): a number per document; tokens attend within their own document only.
        Targets of `model.loss.IGNORED` add nothing. The loss is computed here and not by the
        caller so that it is compiled with the model.
        """
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every weight anew from torch's global generator."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)

    def init_weight(self, name: str, weight: Tensor) -> None:
        """Draws one weight in place, from torch's global generator.

        name: of the parameter. weight: the parameter, or a whole tensor of its shape where the
        parameter itself is a slice (engine/hardware/sharding.py). Weights are drawn in the order of
        `named_parameters`, without gradients.
        """
        raise NotImplementedError

    def shard_groups(self) -> list[list[nn.Module]]:
        """Returns, for each layer, the modules whose weights are gathered together in sharded
        training, in the dtype of products; the other weights are gathered all at once. Empty: all
        weights are."""
        return []

    def compile_layers(self, *, disable: bool = False) -> None:
        """Compiles each layer by itself, where `compile` makes one graph of the whole model."""
        self.compile(disable=disable)

    def hidden_weights(self) -> list[HiddenWeight]:
        """Returns the weight matrices between embedding and head, without either."""
        return []

    def hidden_linears(self) -> dict[str, Linear]:
        """Returns the `Linear` modules of hidden weights, by name; none in fused layers."""
        hidden = {id(weight) for weight, _ in self.hidden_weights()}
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, Linear) and id(module.weight) in hidden
        }

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        """Returns the two parameters; the same one twice where they are tied."""
        raise NotImplementedError

    def matmul_operands(self) -> dict[OperandId, bool]:
        """Returns all operands of products with hidden weights, and whether each is a gradient."""
        return {
            OperandId(f"{name}.weight.{operand}", 0): operand == "g"
            for name in self.hidden_linears()
            for operand in "xwg"  # activation, weight, gradient of the output
        }

    def init_cache(self, batch_size: int, max_length: int | None = None) -> Any:
        """Returns an empty cache for this many samples, for the model's own methods only.

        max_length: tokens that the first call allocates memory for, as `decode_at` needs it. None:
        the cache grows.
        """
        raise NotImplementedError

    def clear_cache(self, cache: Any) -> None:
        """Empties a cache without allocating it anew."""
        raise NotImplementedError

    def prefill_or_decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Appends tokens (B, T) to the cache; returns the logits after the last one, (B, V).

        Computes no gradients.
        """
        raise NotImplementedError

    def decode_at(self, tokens: Tensor, cache: Any, position: Tensor) -> Tensor:
        """Writes one token of each sample, (B, 1), to its place in the cache; returns the logits
        after it, (B, V).

        position: the number of tokens before it, () int64 on the device. Every call does the same
        work at the same addresses, so that one can be recorded as a CUDA graph. After it,
        `prefill_or_decode` needs a cleared cache.
        """
        raise NotImplementedError

    def cache_bytes(self, length: int) -> int:
        """Returns the memory of the cache of one sample of this many tokens."""
        raise NotImplementedError

    def active_fraction(
        self, tokens: Tensor, documents: Tensor | None = None
    ) -> dict[str, list[float]]:
        """Returns the fraction of neurons that are active on tokens (B, T), by kind and layer;
        empty for a model whose neurons are always active."""
        return {}

    def notes(self, on_cpu: bool) -> list[str]:
        """Returns lines for the start of a run that tell where the model computes something else
        than its options say."""
        return []

    def flops_per_token(self, block_size: int) -> int:
        """Returns the FLOPs of forward and backward per token at this context length, whatever is
        computed again: MFU is the model's work in the time that a step takes."""
        raise NotImplementedError
