"""The training loss: cross-entropy of the next token, as a sum over tokens.

Logits are by far the largest tensor of a model with a large vocabulary: 64 x 1024 tokens of GPT-2
have 3.3 billion. Beyond `CHUNK_LOGITS`, head and loss are computed for a chunk of rows at a time,
and so are the gradients, while the chunk's logits exist: nothing is kept or computed twice.

R rows, one per token; D = n_embd, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import matmul_dtype

IGNORED = -100  # a target that adds nothing to the loss

# The most logits that exist at once: 256 MiB in bfloat16. Each chunk adds a product to the head's
# gradient, (V, D) in float32, so chunks of few rows would mostly wait for memory (reasoned): these
# have 2,668 rows of GPT-2's vocabulary. Small models stay below and compute the loss in one piece.
CHUNK_LOGITS = 1 << 27


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy () in nats of logits (R, V) against targets (R,), in float32
    at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="sum")


def chunk_count(rows: int, vocabulary: int) -> int:
    """Returns into how many chunks `head_loss` cuts the rows; 1: plain autograd."""
    return max(1, -(-rows * vocabulary // CHUNK_LOGITS))


def head_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Returns `cross_entropy_sum` of the logits x W^T + bias.

    x (R, D), weight (V, D), bias (V,), targets (R,).
    """
    chunks = chunk_count(len(x), len(weight))
    if chunks == 1:
        return cross_entropy_sum(F.linear(x, weight, bias), targets)
    if torch.is_grad_enabled():
        loss: Tensor = _ChunkedHeadLoss.apply(x, weight, bias, targets, chunks)  # type: ignore[no-untyped-call]  # torch
        return loss
    weight = weight.to(matmul_dtype(x))  # once, not for each chunk
    parts = zip(x.chunk(chunks), targets.chunk(chunks), strict=True)
    sums = [cross_entropy_sum(F.linear(rows, weight, bias), wanted) for rows, wanted in parts]
    return torch.stack(sums).sum()


class _ChunkedHeadLoss(torch.autograd.Function):
    """`head_loss` in chunks of rows.

    The loss is a number, and its gradients are proportional to the number that backward receives:
    forward computes them for 1, and backward multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunks: int
    ) -> Tensor:
        dtype = matmul_dtype(x)
        exact = torch.promote_types(dtype, torch.float32)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        losses, dx = [], []
        dw = torch.zeros_like(weight, dtype=exact) if needs_w else None
        db = w.new_zeros(len(w), dtype=exact) if needs_b else None
        for rows, wanted in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            rows, kept = rows.to(dtype), (wanted != IGNORED).to(dtype)
            loss, dlogits = _loss_and_gradient(F.linear(rows, w, b), wanted)
            losses.append(loss)
            # Rows without a target are zeroed in the products' narrow operand or result, which
            # costs less than a pass over the logits.
            if needs_x:
                dx.append((dlogits @ w).mul_(kept.unsqueeze(1)))
            if dw is not None:
                _add_product(dw, dlogits.mT, rows * kept.unsqueeze(1))
            if db is not None:
                db += torch.mv(dlogits.mT, kept)
            del dlogits  # before the next chunk allocates its own
        ctx.save_for_backward(torch.cat(dx).to(x.dtype) if needs_x else None, dw, db)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # Not `loss += ...`: torch.compile of torch 2.11 has no gradient for a result that was
        # changed in place, and says nothing.
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * gradients[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of a chunk, (), and the gradient of its logits (R, V), in their dtype; rows
    without a target hold no meaningful gradient."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.log_softmax(-1, dtype=exact)
    loss = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
    p = log_p.exp_()
    targets = targets.clamp(min=0).unsqueeze(1)
    if torch.compiler.is_compiling():  # the compiler fuses a comparison, but not a scatter
        p = p - (torch.arange(p.shape[1], device=p.device) == targets).to(exact)
    else:
        p.scatter_add_(1, targets, p.new_full((), -1.0).expand_as(targets))
    return loss, p.to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, which may have a wider dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
