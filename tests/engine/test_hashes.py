"""Hashes in log records: of the batches trained on, and of the weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from data.loading.batch_hash import hash_rows, hash_step
from engine import weights_hash as module
from engine.checkpoint.contents import check_content
from engine.checkpoint.load import load_checkpoint
from engine.train_state import TrainState
from engine.weights_hash import position_sum, tensor_hashes, weights_hash
from tests.engine.states import make_state
from tests.runs import metrics, only_run, run_here

ROWS = torch.arange(24 * 9, dtype=torch.int32).view(24, 9)


def test_a_batch_has_one_hash_however_it_is_cut() -> None:
    whole = hash_rows([ROWS], 0)
    for processes, micro_steps in itertools.product((1, 2, 4), (1, 2, 3)):
        shares = ROWS.chunk(processes)
        sums = [
            hash_rows(share.chunk(micro_steps), rank * len(share))
            for rank, share in enumerate(shares)
        ]
        assert hash_step(7, sums) == hash_step(7, [whole])


def test_rows_in_other_places_and_steps_have_other_hashes() -> None:
    assert hash_rows([ROWS.flip(0)], 0) != hash_rows([ROWS], 0)
    changed = ROWS.clone()
    changed[3, 5] += 1
    assert hash_rows([changed], 0) != hash_rows([ROWS], 0)
    assert hash_step(1, [5]) + hash_step(2, [6]) != hash_step(1, [6]) + hash_step(2, [5])


TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_of_a_weight_counts(dtype: torch.dtype) -> None:
    weight = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    before = weights_hash({"w": weight})
    seen = {before}
    for byte in weight.view(torch.uint8).view(-1).unbind():
        for bit in range(8):
            byte ^= 1 << bit
            seen.add(weights_hash({"w": weight}))
            byte ^= 1 << bit
    assert len(seen) == 1 + 8 * weight.nbytes
    assert weights_hash({"w": weight}) == before
    assert weights_hash({"v": weight}) != before


@pytest.mark.parametrize("shape", [(), (7,), (6, 10), (10, 1), (4, 6, 8), (2, 3, 4, 5), (0, 3)])
def test_slices_of_a_tensor_add_up_to_the_whole_in_chunks_of_any_size(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(shape)
    whole = position_sum(tensor, [0] * len(shape))
    for chunk in (1, 3, 16):
        monkeypatch.setattr(module, "_CHUNK_ON_CPU", chunk)
        assert torch.equal(position_sum(tensor, [0] * len(shape)), whole)
        for dim, length in enumerate(shape):
            parts = []
            for begin in range(0, max(length, 1), 3):
                begins = [0] * len(shape)
                begins[dim] = begin
                part = tensor.narrow(dim, begin, min(3, length - begin))
                parts.append(position_sum(part, begins))
            assert torch.equal(torch.stack(parts).sum(), whole)


def test_long_dimensions_have_the_factors_of_short_ones() -> None:
    """Factors beyond those that are kept are made when they are used."""
    length = module._TABLE + 1000
    tensor = torch.randint(0, 255, (length,), dtype=torch.uint8)
    begin = module._TABLE - 10
    rest = position_sum(tensor[:begin], [0]) + position_sum(tensor[begin:], [begin])
    assert torch.equal(rest, position_sum(tensor, [0]))


@pytest.mark.slow
def test_records_tell_the_weights_of_checkpoints_and_all_batches_also_over_a_resume(
    tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "max_iters=12", "checkpoint_freq=4", "log_freq=6", "test_freq=6", "n_layer=1"]
    assert run_here([*words, f"checkpoint_dir={tmp_path}"]) == 0
    run = only_run(tmp_path)
    records = {r["step"]: r for r in metrics(run) if "train/loss" in r}
    assert sorted(records) == [1, 6, 12]
    saved = load_checkpoint(run / "checkpoint_12.pt")
    assert records[12]["train/weights_hash"] == weights_hash(saved["model"])
    assert [len(r["train/first_losses"]) for r in records.values()] == [1, 5, 6]
    assert sum(records[12]["train/first_losses"]) / 6 == records[12]["train/loss"]
    again = f"resume_from_checkpoint={run / 'checkpoint_4.pt'}"
    assert run_here([*words, f"checkpoint_dir={tmp_path}", again, "num_workers=2"]) == 0
    assert {r["step"]: r for r in metrics(run) if "train/loss" in r} == records
    accumulated = ["batch_size=2", "gradient_accumulation_steps=2", "seed=1337"]
    other = tmp_path / "other"
    assert run_here([*words, *accumulated, f"checkpoint_dir={other}"]) == 0
    hashes = [r["train/batch_hash"] for r in metrics(only_run(other)) if "train/loss" in r]
    assert hashes == [r["train/batch_hash"] for r in records.values()]
    name, weight = next(iter(saved["model"].items()))
    intact = tensor_hashes(saved["model"])
    weight.view(torch.uint8).view(-1)[5] ^= 4
    flipped = tensor_hashes(saved["model"])
    assert [key for key in intact if intact[key] != flipped[key]] == [name]


def test_a_state_of_an_earlier_version_has_unknown_batches() -> None:
    content = {"format": 3, **make_state(8)}
    for key in ("batch_hash", "first_losses"):
        del content["train"][key]
    check_content(content)
    assert TrainState.from_saved(content["train"]).batch_hash == 0, "a record was written here"
    content["train"]["loss_steps"] = 3
    state = TrainState.from_saved(content["train"])
    state.add_batch(5)
    state.add_loss(9, 1.0)
    assert state.take_losses()["train/batch_hash"] is None
    state.add_batch(5)
    state.add_loss(10, 1.0)
    assert state.take_losses()["train/batch_hash"] == f"{5:016x}"
