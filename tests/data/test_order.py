"""The order is a pure function: permutations, a split, and rows shared out without overlap."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.loading import lanes, order

seeds = st.integers(0, 2**64 - 1)


def keys(count: int) -> order.Keys:
    return order.path_keys(f"{i}.parquet" for i in range(count))


@given(seeds, st.integers(0, 50), st.integers(0, 200), st.booleans())
def test_segments_and_documents_are_permuted(
    seed: int, epoch: int, count: int, shuffle: bool
) -> None:
    for result in (
        order.segment_order(keys(count), seed, epoch, shuffle),
        order.document_order(seed ^ 5, seed, epoch, count, shuffle),
    ):
        assert sorted(result) == list(range(count))
        assert shuffle or result.tolist() == list(range(count))


def test_seeds_and_epochs_differ_and_no_version_changes_the_order() -> None:
    names = keys(50)
    orders = {tuple(order.segment_order(names, s, e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    assert order.segment_order(keys(6), 1337, 0).tolist() == [0, 3, 5, 1, 2, 4]
    assert order.document_order(7, 1337, 1, 6).tolist() == [0, 1, 5, 4, 2, 3]


def test_each_place_is_equally_likely() -> None:
    counts = np.zeros((16, 16))
    for seed in range(800):
        counts[np.arange(16), order.segment_order(keys(16), seed, 0)] += 1
    chi_square = ((counts - 50) ** 2 / 50).sum()
    assert chi_square < 225 + 5 * np.sqrt(2 * 225)


def test_segments_of_a_key_stay_together_and_in_order() -> None:
    shared = np.repeat(keys(20), 3)
    result = order.segment_order(shared, 1, 0).reshape(20, 3)
    assert (np.diff(result, axis=1) == 1).all()
    assigned = lanes.assign_lanes(shared[result.ravel()], 4).reshape(20, 3)
    assert assigned.tolist() == [[i % 4] * 3 for i in range(20)]


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=60), st.floats(0.001, 0.99))
def test_the_split_holds_out_some_and_never_all(sizes: list[int], fraction: float) -> None:
    weights = np.array(sizes)
    test = order.choose_held_out(keys(len(sizes)), weights, fraction)
    assert 0 < test.sum() < len(sizes)
    assert weights[test].sum() <= max(0.5, fraction) * np.maximum(weights, 1).sum()


def test_the_split_is_near_the_fraction_and_keeps_keys_whole() -> None:
    shared = np.repeat(keys(400), 2)
    test = order.choose_held_out(shared, np.full(800, 1000), 0.05)
    assert test.sum() == 40
    assert (test[::2] == test[1::2]).all()
    assert not order.choose_held_out(shared, np.full(800, 1000), 0.0).any()


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=9), min_size=1, max_size=9), st.integers(0, 5)
)
def test_balanced_lanes_have_equal_tokens_and_each_token_once(
    lengths: list[list[int]], epoch: int
) -> None:
    sizes = np.array([size for lane in lengths for size in lane], dtype=np.int64)
    dealt = np.split(np.arange(len(sizes)), np.cumsum([len(lane) for lane in lengths])[:-1])
    total, count = int(sizes.sum()), len(lengths)
    targets = lanes.tokens_per_lane(total, count, epoch)
    assert sum(targets) == total
    assert max(targets) - min(targets) <= 1
    seen = np.zeros(total, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    balanced = lanes.balance_lanes(dealt, sizes, targets)
    for segments, spans, target in zip(dealt, balanced, targets, strict=True):
        assert spans.tokens == target
        own = [segment for segment in segments.tolist() if sizes[segment]]
        table = zip(spans.segment.tolist(), spans.begin, spans.end, strict=True)
        for index, (segment, first, last) in enumerate(table):
            assert 0 <= first < last <= sizes[segment] or first == last == sizes[segment] == 0
            seen[starts[segment] + first : starts[segment] + last] += 1
            if index < len(own) and sizes[own[: index + 1]].sum() <= target:
                assert segment in segments  # what fits stays where it was dealt
    assert (seen == 1).all()


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 9))
def test_no_lane_falls_behind_over_many_epochs(tokens: int, count: int, epochs: int) -> None:
    sums = np.sum([lanes.tokens_per_lane(tokens, count, e) for e in range(epochs)], axis=0)
    assert sums.max() == -(-epochs * tokens // count)
    assert sums.max() - sums.min() <= 1


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 6))
def test_lanes_divide_the_step_and_every_row_belongs_to_one_process(
    rows_per_rank: int, available: int, world: int
) -> None:
    sequences = rows_per_rank * world
    count = order.lane_count(sequences, available)
    assert sequences % count == 0
    assert 1 <= count <= min(16, available, sequences)
    rows = [order.rank_rows(sequences, world, rank) for rank in range(world)]
    assert [row for part in rows for row in part] == list(range(sequences))
    for part in rows:
        own = order.rank_lanes(part, range(1), range(sequences, sequences + 1), count)
        assert {row * count // sequences for row in part} == set(own)
