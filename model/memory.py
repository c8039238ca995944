"""How much memory the activations of a training step take, by formulas for each architecture.

A step is predicted before anything is allocated. The formulas are within 15 % of what torch's
allocator records (tests/engine/test_memory.py). An architecture without a formula here trains as
well: its activations are then left out of the prediction, and the start of the run says so.

Running a step on fake tensors predicts as closely without formulas, but takes 0.4 s for the
smallest BDH and 7 s for the reference run, against 0.1 ms here; every start would wait for it.

B samples, T tokens, D = n_embd, V vocabulary, H heads, N neurons per head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.attention import uses_math_on_cpu
from model.bdh.model import BDH
from model.bdh.tiling import Geometry, Tiling
from model.bdh.triton.shapes import WIDE_BUFFERS, triton_tiling
from model.gpt import GPT
from model.interface import LanguageModel
from model.llama import Llama, mlp_width
from model.loss import chunk_count
from model.transformer import Transformer


@dataclass(frozen=True)
class StepShape:
    """What the activations of a micro-step depend on besides the model."""

    batch: int
    block: int
    """Tokens of a sequence."""
    dtype: torch.dtype
    """Of the matrix products; weights are cast to it for a step."""
    on_cpu: bool
    accumulates: bool = False
    """Whether gradients are added to those of earlier micro-steps, there from the start."""
    recompute: bool = False
    """Whether layers keep only their inputs, as `training.recompute: layer` has it."""
    shards: int = 1
    """Processes among which the weights are divided; 1: each process has all."""
    gathered: torch.dtype = torch.float32
    """Of a layer's weights, where they are divided and gathered for its products."""

    @property
    def tokens(self) -> int:
        return self.batch * self.block


def activation_bytes(model: LanguageModel, step: StepShape) -> int | None:
    """Returns the peak memory of forward and backward beyond weights and gradients, of which a
    process may have a shard: what it gathers counts here. None for an architecture without a
    formula."""
    if isinstance(model, BDH):
        return _bdh_bytes(model, step)
    return _transformer_bytes(model, step) if isinstance(model, GPT | Llama) else None


def cached_bytes(model: LanguageModel, step: StepShape) -> int:
    """Returns the memory of tables kept between steps: BDH's cosines and sines of a chunk.

    The tables of other models are too small to count.
    """
    if not isinstance(model, BDH):
        return 0
    tiling = _tiling(model, step)
    return tiling.chunk * model.shape[2] * step.dtype.itemsize


# BDH


def _tiling(model: BDH, step: StepShape) -> Tiling:
    if model.triton:
        return triton_tiling((step.batch, step.block), model.shape, step.dtype)
    return Tiling.of((step.batch, step.block), model.shape, step.dtype, step.on_cpu)


def _bdh_bytes(model: BDH, step: StepShape) -> int:
    if model.projections is not None:
        forward, backward = _dense_layers_bytes(model, step)
    elif model.triton:
        forward, backward = _triton_layers_bytes(model, step)
    else:
        forward, backward = _fused_layers_bytes(model, step)
    embedded = 2 * step.tokens * model.config.n_embd * 4
    logits = _loss_bytes(step, model.config.n_embd, model.config.vocab_size)
    if step.accumulates:  # the gradients of all layers come together, at the end
        backward += sum(weight.nbytes for weight, _ in model.hidden_weights())
    found = embedded + forward + max(backward, logits)
    if step.shards == 1:
        return found
    # All weights and their gradients are whole during a step. At its end the gradients, copied for
    # the exchange, are as much again; gloo, on a CPU, sums them in one more copy.
    whole = sum(parameter.nbytes for parameter in model.parameters())
    exchange = (3 if step.on_cpu else 2) * whole
    return max(found + 2 * whole - whole // step.shards, exchange)


def _fused_layers_bytes(model: BDH, step: StepShape) -> tuple[int, int]:
    """Returns what forward keeps, and what backward needs on top at the last layer."""
    H, D, N = model.shape
    tiling, size = _tiling(model, step), step.dtype.itemsize
    sum_size = max(size, 4)  # bytes of a number; sums are in float32 at least
    groups = tiling.sequence_groups(step.batch)
    sizes = Geometry.of(torch.Size((groups[0].stop, step.block, D)), H, N, tiling)
    C, X, M, g = sizes.C, sizes.X, sizes.M, sizes.g
    n = 2 * max(pairs.stop - pairs.start for pairs in sizes.tiles)

    packed = 3 * H * D * N * size  # the weights, cut into tiles
    rows = step.batch * tiling.padded(step.block)  # of all groups; M are those of one
    kept = rows * D * sum_size
    of_layer = D * sum_size + H * (C * size + D * size + sum_size)
    recomputed = M * of_layer if step.recompute else 0
    kept += 0 if step.recompute else rows * of_layer

    # Four buffers of neurons: of one tile for v and dz; for u and du of all neurons of a head group
    # if tiles are cached, else of one tile.
    wide = (2 * N + 2 * n if tiling.cache_tiles else 4 * n) * g * M * size
    streams = M * D * (2 * sum_size + 3 * size) + g * M * D * (2 * sum_size + 2 * size)
    # Not at the same time: masks or 8-bit operands of a tile; scores, states and products. Without
    # compilation a dropout mask takes two int32 per neuron.
    hashes = 8 if model.config.dropout > 0 and not model.compiled_elementwise else 0
    operands = max(hashes, model.matmul_backend.operand_bytes) * g * M * n
    scores = 2 * g * M * C * size
    states = (3 if 1 < sizes.K <= tiling.scan else 2) * g * X * n * D * size if sizes.K > 1 else 0
    products = g * max(M, n) * D * (size + sum_size)
    backward = wide + streams + max(operands, scores + states + products) + recomputed
    if len(groups) > 1:  # the gradients of earlier groups
        backward += 3 * H * D * N * sum_size
    return packed + model.config.n_layer * kept, backward


def _triton_layers_bytes(model: BDH, step: StepShape) -> tuple[int, int]:
    """Returns what forward keeps, and what backward needs on top at the last layer."""
    (H, D, N), size, n_layer = model.shape, step.dtype.itemsize, model.n_layer
    tiling, C = _tiling(model, step), _tiling(model, step).chunk
    groups, sequence = tiling.sequence_groups(step.batch), tiling.padded(step.block)
    M, rows = step.batch * sequence, groups[0].stop * sequence  # of all sequences, of a group
    packed = 3 * H * D * N * size
    of_layer = D * 4 + H * (C * size + D * size + 4)
    recomputed = rows * of_layer if step.recompute else 0
    saved = M * (D * 4 + (0 if step.recompute else of_layer))
    layers = 0 if step.recompute else min(n_layer, tiling.kept_layers)  # that keep s and r
    kept = 2 * layers * M * H * N * size

    # If all layers keep s and r, backward has no buffers for them.
    buffers = (WIDE_BUFFERS - 2 * (layers == n_layer)) * rows * H * N * size
    states = 2 * rows // C * H * N * D * size if sequence > C else 0
    # The gradient of a and its steps; the stream, the gradients of x and y, and their casts.
    narrow = rows * H * (C * size + D * (3 * 4 + 2 * size)) + rows * D * (4 * 4 + 2 * size)
    if len(groups) > 1:  # the gradients of earlier groups
        narrow += 3 * H * D * N * 4
    return packed + n_layer * saved + kept, buffers + states + narrow + recomputed


def _dense_layers_bytes(model: BDH, step: StepShape) -> tuple[int, int]:
    """Returns an upper estimate of what forward keeps, and of what backward needs on top.

    Projections are taken to hold a float32 copy of the weights and its gradient, and for every
    layer the weights in the dtype of the products.
    """
    (H, D, N), size, sum_size = model.shape, step.dtype.itemsize, max(step.dtype.itemsize, 4)
    rows, weights = step.tokens, 3 * H * D * N
    wide, scores = rows * H * N, rows * H * step.block
    streams = rows * D * (4 * sum_size + 2 * size) + rows * H * D * (sum_size + 2 * size)
    kept = wide * (4 * size + 1) + scores * size + streams + weights * size
    working = wide * 6 * size + scores * 3 * size + 2 * streams + weights * sum_size
    return model.config.n_layer * kept + weights * sum_size, working + weights * sum_size


def _loss_bytes(step: StepShape, D: int, V: int) -> int:
    """Returns what the loss needs of the logits that exist at once, beside their weight."""
    chunks, size = chunk_count(step.tokens, V), step.dtype.itemsize
    logits = -(-step.tokens // chunks) * V
    if chunks == 1:
        return 3 * 4 * logits  # logarithms of probabilities and two gradients, in float32
    if size >= 4:
        return 2 * 4 * logits
    # Logits, their cast and logarithms; or probabilities, gradients and a product for the weight.
    return max((size + 8) * logits, (4 + size) * logits + size * V * D)


# GPT and Llama


class Stage(NamedTuple):
    """Memory of one part of a training step, in bytes."""

    saved: int  # from the forward pass until its backward pass
    gradients: int  # of its weights, from its backward pass on
    grad_cast: int  # the gradients in the dtype of the products, before they are cast to float32
    working: int  # on top, at some moment of its backward pass


class SavedPerToken(NamedTuple):
    """What a layer of one architecture saves of each token, besides what all of them save."""

    rotated: int  # numbers: queries and keys after a rotation
    hidden: int  # numbers: within the MLP
    hidden_gradients: int  # numbers: their gradients, at a time
    norm_bytes: int  # statistics of each norm


def _saved_per_token(model: Transformer) -> SavedPerToken:
    config = model.config
    if isinstance(model, Llama):  # both parts of the gate, its silu and the product
        rotated, width = config.n_embd + model.n_kv_head * model.head_size, mlp_width(config)
        return SavedPerToken(rotated, 4 * width, 2 * width, 4)
    width = config.mlp_scale_factor * config.n_embd
    hidden = width if config.activation == "relu" else 2 * width  # relu saves its result alone
    return SavedPerToken(0, hidden, width, 8)


def _transformer_bytes(model: Transformer, step: StepShape) -> int:
    saved = _saved_per_token(model)
    layer = [_attention_stage(model, step, saved), _mlp_stage(model, step, saved)]
    if step.shards > 1:
        layer = [_sharded_stage(stage, layer, step) for stage in layer]
    if step.recompute:
        # Backward begins with a stage that makes what the layer keeps, but for its input.
        made = sum(stage.saved for stage in layer) - step.tokens * _stream_bytes(model)
        layer.append(Stage(-made, 0, 0, 0))
    ends = [_embedding_stage(model, step), *_head_stages(model, step, saved)]
    stages = [ends[0], *layer * model.config.n_layer, *ends[1:]]
    if model.frozen:  # no weight has a gradient
        stages = [stage._replace(gradients=0, grad_cast=0) for stage in stages]
    if step.accumulates:  # each gradient is added at once and freed
        stages = [s._replace(gradients=0, grad_cast=max(s.gradients, s.grad_cast)) for s in stages]
    if step.shards > 1:
        root = sum(stage.gradients for stage in ends)
        hidden = 4 * sum(weight.numel() for weight, _ in model.hidden_weights())
        stages = _with_exchange(stages, root, root + hidden, step)
    return _peak_bytes(stages)


def _sharded_stage(stage: Stage, layer: list[Stage], step: StepShape) -> Stage:
    """Returns a stage of a layer whose weights are gathered for it and given back.

    Its backward pass holds the layer's weights and their gradients, the weights of the layer
    before, gathered ahead of time, and the float32 gradients of the layer after, on their way to
    the processes that keep them.
    """
    weights = sum(each.gradients for each in layer)  # of the layer, in float32
    narrow = step.gathered.itemsize < 4  # then autocast has nothing to cast
    return Stage(
        saved=stage.saved - (stage.grad_cast if narrow else 0),
        gradients=stage.gradients // step.shards,
        grad_cast=0,
        working=stage.working + weights + 3 * (weights * step.gathered.itemsize // 4),
    )


def _with_exchange(stages: list[Stage], root: int, weights: int, step: StepShape) -> list[Stage]:
    """Returns the stages of a step with sharded weights.

    The weights of embedding and head, `root` bytes, are whole during the step; so are their
    gradients until its end, where they are exchanged in a copy, which gloo, on a CPU, copies once
    more. Where micro-steps accumulate, the gradients of all `weights` are whole until then.
    """
    whole = weights if step.accumulates else root
    stages = [Stage(root, whole // step.shards - whole, 0, root if step.on_cpu else 0), *stages]
    return [*stages, Stage(0, whole, 0, 0)] if step.accumulates else stages


def _peak_bytes(stages: Sequence[Stage]) -> int:
    """Returns the most that stages, in the order of the forward pass, hold at a moment of the
    backward pass, without the gradients."""
    held, peak, gradients = sum(stage.saved for stage in stages), 0, 0
    for stage in reversed(stages):
        peak = max(peak, held + stage.working + stage.grad_cast)
        held += stage.gradients - stage.saved
        peak = max(peak, held + (stage.grad_cast if stage.grad_cast < stage.gradients else 0))
        gradients += stage.gradients
    return max(0, peak - gradients)


def _stream_bytes(model: Transformer) -> int:
    """Returns the bytes of a token in the residual stream."""
    itemsize = 4 if model.residual_dtype is None else model.residual_dtype.itemsize
    return itemsize * model.config.n_embd


def _branch_stage(model: Transformer, step: StepShape, norm_bytes: int, weights: int) -> Stage:
    """What attention and MLP have in common: the stream and its gradient, norm and dropout."""
    D, size, rows = model.config.n_embd, step.dtype.itemsize, step.tokens
    cast = size * weights if size < 4 and not model.frozen else 0
    # Frozen 4-bit weights are dequantized for each product: one matrix at a time, half of these.
    dequantized = (4 + size % 4) * weights // 2 if model.frozen else 0
    dropped = size * rows * D if model.config.dropout else 0
    stream = _stream_bytes(model)
    saved = rows * (stream + norm_bytes + size * D) + dropped + cast
    working = rows * (stream + size * D) + dropped + dequantized
    return Stage(saved, 4 * weights, size * weights, working)


def _attention_stage(model: Transformer, step: StepShape, saved: SavedPerToken) -> Stage:
    D, size, rows = model.config.n_embd, step.dtype.itemsize, step.tokens
    keys = model.n_kv_head * model.head_size
    branch = _branch_stage(model, step, saved.norm_bytes, 2 * D * (D + keys))
    heads = rows * (D + 2 * keys) * size
    kept, working = branch.saved + heads + rows * D * size, branch.working + heads
    if _keeps_scores(model, step):
        own = step.on_cpu or model.config.attention == "math"  # else torch's, in float32
        scores = rows * model.config.n_head * step.block * (size if own else 4)
        copies = 3 if model.config.dropout else 1
        return branch._replace(saved=kept + copies * scores, working=working + scores)
    statistics = 4 * rows * model.config.n_head
    return branch._replace(saved=kept + rows * saved.rotated * size + statistics, working=working)


def _keeps_scores(model: Transformer, step: StepShape) -> bool:
    """Returns whether a training step holds the T x T scores of all heads."""
    kind, dropout = model.config.attention, model.config.dropout
    if kind == "math":
        return True
    if step.on_cpu:
        return uses_math_on_cpu(kind, step.block, step.dtype.itemsize, dropout)
    # Of torch's kernels for CUDA, FlashAttention takes no mask and no float32, and the other one no
    # shared heads of keys. cuDNN's, on Hopper, may: this is then too much.
    masked = model.config.mask == "causal_document"
    if masked and not dropout and kind in ("auto", "flex"):
        return False
    return model.n_kv_head != model.config.n_head and (masked or step.dtype.itemsize == 4)


def _mlp_stage(model: Transformer, step: StepShape, saved: SavedPerToken) -> Stage:
    D, size = model.config.n_embd, step.dtype.itemsize
    layer = sum(weight.numel() for weight, _ in model.hidden_weights()) // model.config.n_layer
    weights = layer - 2 * D * (D + model.n_kv_head * model.head_size)
    branch = _branch_stage(model, step, saved.norm_bytes, weights)
    return branch._replace(
        saved=branch.saved + step.tokens * saved.hidden * size,
        working=branch.working + step.tokens * saved.hidden_gradients * size,
    )


def _head_stages(model: Transformer, step: StepShape, saved: SavedPerToken) -> list[Stage]:
    """Returns the stages of norm and logits, and of the loss, which is computed in float32."""
    D, V, size, rows = model.config.n_embd, model.vocab_size, step.dtype.itemsize, step.tokens
    cast = size * V * D if size < 4 else 0
    stream = _stream_bytes(model)
    kept = rows * (stream + saved.norm_bytes + size * D)
    if chunk_count(rows, V) > 1:
        # The gradient for 1, and in the backward pass the one that is multiplied.
        scaled = 0 if model.frozen else 4 * V * D
        chunk = _loss_bytes(step, D, V) + cast + rows * D * size
        return [Stage(kept, 4 * V * D, 4 * V * D, max(scaled + rows * (stream + size * D), chunk))]
    head = Stage(kept + cast, 4 * V * D, size * V * D, rows * (V + D) * size)
    return [head, Stage(4 * rows * V, 0, 0, _loss_bytes(step, D, V) - 4 * rows * V)]


def _embedding_stage(model: Transformer, step: StepShape) -> Stage:
    """Returns the stage of the embedding and of the mask that all layers share."""
    D, size, T = model.config.n_embd, step.dtype.itemsize, step.block
    by_sample = model.config.mask == "causal_document"
    masks = step.batch if by_sample else int(_keeps_scores(model, step))
    stream, table = _stream_bytes(model) * step.tokens, model.vocab_size * D
    kept = masks * T * T * size + (stream if model.config.dropout else 0)
    working = stream + 4 * step.tokens * D
    if model.tied:
        # The head's gradient waits for this one; where it is transposed, the sum is a third.
        working += 4 * table * (2 if size == 4 else 1)
        table = 0
    gradients = 4 * (D * (model.max_context or 0) + table)
    return Stage(kept, gradients, gradients, working)
