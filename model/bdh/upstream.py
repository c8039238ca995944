"""The layout of the public reference's weights, and the way from and to it.

The reference interleaves the two members of each rotated pair of neurons; `BDH` stores all first
members, then all second members, so that rotation needs no strided access. It also stores the
frequency of each neuron in turns, float32, where `BDH` has one of each pair in float64.

Source: github.com/pathwaycom/bdh.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from config import BDHConfig
from model.bdh.model import BDH
from model.bdh.tiling import rope_frequencies

UPSTREAM_FREQUENCIES = "attn.freqs"


def from_upstream(state: Mapping[str, Tensor], config: BDHConfig) -> BDH:
    """Builds a BDH from a state dict in the reference's layout.

    Raises ValueError for missing or unknown names, wrong shapes and numbers that are not finite.
    """
    model = BDH(config)
    H, _, N = model.shape
    shapes = {name: value.shape for name, value in to_upstream(model).items()}
    state = without_wrappers(state)
    missing = sorted(shapes.keys() - state.keys() - {UPSTREAM_FREQUENCIES})
    if missing:
        raise ValueError(f"upstream BDH weights lack {', '.join(missing)}; found {sorted(state)}")
    if extra := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"no weight of an upstream BDH: {', '.join(extra)}")
    for name, value in state.items():
        if value.shape != shapes[name]:
            expected, found = tuple(shapes[name]), tuple(value.shape)
            raise ValueError(f"upstream BDH weight {name}: expected {expected}, found {found}")
        if not value.isfinite().all():
            raise ValueError(f"upstream BDH weight {name}: holds NaN or infinite numbers")
    order = torch.arange(N).view(-1, 2).mT.reshape(-1)
    own = {name: _reorder(name, value, order, H) for name, value in state.items()}
    if (stored := own.pop(UPSTREAM_FREQUENCIES, None)) is not None:
        own["frequencies"] = _pair_frequencies(stored.flatten())
    model.load_state_dict(own)
    return model


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict without the prefixes that DDP and torch.compile add to every name."""
    for prefix in ("module.", "_orig_mod.", "module."):  # either can wrap the other
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _pair_frequencies(stored: Tensor) -> Tensor:
    """Returns the frequency of each pair in float64 from those of the neurons, (N,)."""
    first, second = stored.double().view(-1, 2).unbind(1)
    if not torch.equal(first, second):
        pair = int((first != second).nonzero()[0])
        raise ValueError(
            f"upstream BDH weight {UPSTREAM_FREQUENCIES}: neurons {2 * pair} and {2 * pair + 1} "
            "are a pair and have two frequencies, which is no rotation"
        )
    # The reference rounds them to float32. A model with the usual ones gets the exact values; one
    # that was grown or merged from others has frequencies of its own, which are kept.
    usual = rope_frequencies(len(stored))
    return usual if torch.allclose(first, usual, rtol=1e-6, atol=0) else first


def to_upstream(model: BDH) -> dict[str, Tensor]:
    """Returns the weights as a state dict that the reference loads with strict=True."""
    H, N = model.encoder.shape[0], model.encoder.shape[2]
    order = torch.arange(N).view(2, -1).mT.reshape(-1)
    state = {
        name: _reorder(name, value.detach(), order.to(value.device), H).clone()
        for name, value in model.state_dict().items()
        if name != "frequencies"
    }
    pairs = model.frequencies.float().repeat_interleave(2)
    return state | {UPSTREAM_FREQUENCIES: pairs.view(1, 1, 1, N)}


def _reorder(name: str, value: Tensor, order: Tensor, heads: int) -> Tensor:
    """Permutes the neurons of a weight by `order` (N,); other weights pass unchanged."""
    if name in ("encoder", "encoder_v"):
        return value[..., order]
    if name == "decoder":
        return value.view(heads, -1, value.shape[-1])[:, order].reshape(value.shape)
    return value
