"""A sample of the model's text at each evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from config import Config, DataError
from data.tokenizers.base import Tokenizer
from engine.evaluation import evaluating
from engine.hardware.sharding import is_sharded
from engine.precision.lora import apply_lora
from engine.precision.precision import Precision
from model import LanguageModel, build_model
from model.generate import Sampling, generate

TEMPERATURE = 0.8


def sample_writer(
    model: LanguageModel, config: Config, precision: Precision, tokenizer: Tokenizer
) -> Callable[[], str] | None:
    """Returns what continues `training.sample_prompt`, or None where no prompt is given.

    It draws the same random numbers each time, from a generator of its own. Raises DataError for a
    prompt without tokens.
    """
    training = config.training
    if training.sample_prompt is None:
        return None
    try:
        ids = tokenizer.encode(training.sample_prompt).tolist()
    except DataError as error:
        raise DataError(f"training.sample_prompt: {error}") from None
    if not ids:
        raise DataError(f"training.sample_prompt: tokenizer {tokenizer.name} makes no token of it")

    def write() -> str:
        writer = model if precision.fp8 is None else without_fp8(model, config, precision)
        generator = torch.Generator(precision.device).manual_seed(training.seed)
        prompt = torch.tensor([ids], device=precision.device)
        sampling = Sampling(temperature=TEMPERATURE)
        sharded = _by_layers(precision) if is_sharded(model) else contextlib.nullcontext()
        with evaluating(writer), sharded:
            drawn = generate(writer, prompt, sampling, [generator], training.block_size)
            tokens = [int(token) for token in islice(drawn, training.sample_tokens)]
        return tokenizer.decode(ids + tokens)

    return write


@contextlib.contextmanager
def _by_layers(precision: Precision) -> Iterator[None]:
    """Encloses the sampling from a sharded model. Its layers are gathered in the dtype of products,
    which needs autocast, and compiled by themselves: each new length would compile them anew."""
    with precision.autocast(), torch.compiler.set_stance("force_eager"):
        yield


def without_fp8(model: LanguageModel, config: Config, precision: Precision) -> LanguageModel:
    """Returns a copy whose products are not in 8 bits: FP8 matmuls need sizes divisible by 16, and
    generation goes token by token."""
    # Building a model draws random weights, which must not move the generators of training.
    with torch.random.fork_rng([precision.device] if precision.device.type == "cuda" else []):
        copy = build_model(config)
    apply_lora(copy, config.low_precision, init=False)
    copy.load_state_dict(model.state_dict())
    return copy.to(precision.device)
