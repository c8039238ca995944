"""The order is a pure function: permutations, a split, and rows shared out without overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading import order

seeds = st.integers(0, 2**64 - 1)


def keys(count: int) -> order.Keys:
    return order.path_keys(f"{i}.parquet" for i in range(count))


@pytest.mark.parametrize("count", [0, 1, 2, 17, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_a_permutation(count: int, epoch: int, shuffle: bool) -> None:
    result = order.epoch_order(keys(count), 1337, epoch, shuffle)
    assert sorted(result) == list(range(count))


@given(seeds, st.integers(0, 50), st.integers(0, 200))
def test_documents_are_permuted(seed: int, epoch: int, count: int) -> None:
    result = order.document_order(seed ^ 5, seed, epoch, count)
    assert sorted(result) == list(range(count))


def test_seeds_and_epochs_differ_and_repeat() -> None:
    names = keys(50)
    orders = {tuple(order.epoch_order(names, s, e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    assert np.array_equal(order.epoch_order(names, 3, 4), order.epoch_order(names.copy(), 3, 4))


def test_the_order_never_changes_between_versions() -> None:
    assert order.epoch_order(keys(6), 1337, 0).tolist() == [0, 3, 5, 1, 2, 4]
    assert order.document_order(7, 1337, 1, 6).tolist() == [0, 1, 5, 4, 2, 3]


def test_each_place_is_equally_likely() -> None:
    counts = np.zeros((16, 16))
    for seed in range(800):
        counts[np.arange(16), order.epoch_order(keys(16), seed, 0)] += 1
    chi_square = ((counts - 50) ** 2 / 50).sum()
    assert chi_square < 225 + 5 * np.sqrt(2 * 225)


def test_units_of_a_block_stay_together_and_in_order() -> None:
    blocks = np.repeat(keys(20), 3)
    result = order.epoch_order(blocks, 1, 0).reshape(20, 3)
    assert (np.diff(result, axis=1) == 1).all()
    lanes = order.lane_of(blocks[result.ravel()], 4).reshape(20, 3)
    assert lanes.tolist() == [[i % 4] * 3 for i in range(20)]


@given(
    st.lists(st.integers(0, 10**7), min_size=2, max_size=60),
    st.floats(0.001, 0.99),
)
def test_the_split_holds_out_some_and_never_all(sizes: list[int], fraction: float) -> None:
    weights = np.array(sizes)
    test = order.split_units(keys(len(sizes)), weights, fraction)
    assert 0 < test.sum() < len(sizes)
    assert weights[test].sum() <= max(0.5, fraction) * np.maximum(weights, 1).sum()


def test_the_split_is_near_the_fraction_and_keeps_blocks_whole() -> None:
    blocks = np.repeat(keys(400), 2)
    test = order.split_units(blocks, np.full(800, 1000), 0.05)
    assert test.sum() == 40
    assert (test[::2] == test[1::2]).all()
    assert not order.split_units(blocks, np.full(800, 1000), 0.0).any()


@given(st.integers(1, 64), st.integers(1, 40))
def test_lanes_divide_the_step_and_have_units(sequences: int, blocks: int) -> None:
    lanes = order.lane_count(sequences, blocks)
    assert sequences % lanes == 0
    assert 1 <= lanes <= min(16, blocks, sequences)


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=9), min_size=1, max_size=9), st.integers(0, 5)
)
def test_balanced_lanes_have_equal_tokens_and_each_token_once(
    lengths: list[list[int]], epoch: int
) -> None:
    sizes = np.array([size for lane in lengths for size in lane], dtype=np.int64)
    bounds = np.cumsum([len(lane) for lane in lengths])[:-1]
    dealt = np.split(np.arange(len(sizes)), bounds)
    total, count = int(sizes.sum()), len(lengths)
    targets = order.lane_targets(total, count, epoch)
    assert sum(targets) == total and max(targets) - min(targets) <= 1
    balanced = order.balance(dealt, sizes, targets)
    seen = np.zeros(total, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    for units, pieces, target in zip(dealt, balanced, targets, strict=True):
        assert (pieces[:, 2] - pieces[:, 1]).sum() == target
        for place, (unit, first, last) in enumerate(pieces.tolist()):
            assert 0 <= first < last <= sizes[unit] or first == last == sizes[unit] == 0
            seen[starts[unit] + first : starts[unit] + last] += 1
            own = [u for u in units.tolist() if sizes[u]]
            if place < len(own) and sizes[own[: place + 1]].sum() <= target:
                assert unit in units  # what fits stays where it was dealt
    assert (seen == 1).all()


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 9))
def test_no_lane_falls_behind_over_many_epochs(tokens: int, lanes: int, epochs: int) -> None:
    sums = np.sum([order.lane_targets(tokens, lanes, e) for e in range(epochs)], axis=0)
    assert sums.max() == -(-epochs * tokens // lanes)
    assert sums.max() - sums.min() <= 1


@pytest.mark.parametrize("sequences", [8, 12, 48])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_row_belongs_to_one_process(sequences: int, world: int) -> None:
    lanes = order.lane_count(sequences, 100)
    rows = [order.rank_rows(sequences, world, rank) for rank in range(world)]
    assert [row for part in rows for row in part] == list(range(sequences))
    for part in rows:
        mine = order.rank_lanes(part, sequences, lanes)
        assert {row * lanes // sequences for row in part} == set(mine)
