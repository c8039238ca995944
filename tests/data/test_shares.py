"""After every step each source of a mixture is as close to its share as one rule can keep all."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.loading.order import rank_lanes, rank_rows, rows_before_lane
from data.loading.shares import Shares

weights = st.lists(
    st.one_of(st.floats(0, 1), st.integers(0, 9), st.floats(1e-4, 1e-2)), min_size=2, max_size=8
).filter(lambda values: sum(value > 0 for value in values) > 1)
steps = st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=60)


@given(weights, steps, st.integers(0, 59))
def test_shares_are_exact_to_less_than_a_row_and_over_windows_to_less_than_two(
    values: list[float], sizes: list[int], resume: int
) -> None:
    shares, exact = Shares(values), [Fraction(str(value)) for value in values]
    k = sum(value > 0 for value in values)
    rows, errors = [0] * len(values), [[Fraction(0)] * len(values)]
    for step, size in enumerate(sizes):
        before, rows = rows, shares.after_step(rows, size)
        assert sum(rows) == sum(before) + size
        assert all(now >= then for now, then in zip(rows, before, strict=True))
        errors.append([sum(rows) * x / sum(exact) - n for x, n in zip(exact, rows, strict=True)])
        assert max(map(abs, errors[-1])) <= 1 - Fraction(1, 2 * k - 2)
        assert shares.can_follow(rows)
        if step == resume:  # what was given is all that a resume needs
            shares = Shares(values)
    for source in zip(*errors, strict=True):
        window = max(source) - min(source)
        assert window < 1 if k == 2 else window < 2
    rarest = exact.index(min(filter(None, exact)))
    rows[rarest] += 2 * k
    assert not shares.can_follow(rows)


def test_a_rule_row_by_row_is_that_of_tijdeman() -> None:
    for values in ([7, 2, 1], [5, 3, 3, 1], [0.61, 0.2, 0.1, 0.05, 0.04]):
        shares, total = Shares(values), sum(map(Fraction, map(str, values)))
        part = [Fraction(str(value)) / total for value in values]
        d = Fraction(1, 2 * len(values) - 2)
        rows = [0] * len(values)
        for n in range(1, 500):
            may = [i for i, x in enumerate(part) if n * x - rows[i] >= d]
            due = {i: (1 - d - (n * part[i] - rows[i])) / part[i] for i in may}
            (now,) = [i for i, c in enumerate(shares.after_step(rows, 1)) if c > rows[i]]
            assert due[now] == min(due.values())
            rows[now] += 1


@given(weights, st.integers(1, 6), st.integers(1, 9), st.lists(st.integers(1, 5), min_size=8))
def test_every_row_is_of_a_lane_that_its_process_reads(
    values: list[float], world: int, rows_each: int, lanes: list[int]
) -> None:
    total, shares = world * rows_each, Shares(values)
    bounds = shares.bounds(total)
    given_rows = shares.after_steps([0] * len(values), total, 20).tolist()
    for before, after in zip(given_rows, given_rows[1:], strict=False):
        order = sorted(
            (source, row % lanes[source], row)
            for source, first in enumerate(before)
            for row in range(first, after[source])
        )
        for source, lane, _ in order:
            last = after[source]
            below = sum(row % lanes[source] < lane for row in range(last))
            assert rows_before_lane(last, np.array(lane), lanes[source]) == below
        for rank in range(world):
            rows = rank_rows(total, world, rank)
            for source, lane, _ in order[rows.start : rows.stop]:
                assert lane in rank_lanes(rows, *bounds[source], lanes[source])
