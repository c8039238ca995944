"""How many rows of a step each source of a mixture gives.

The share of a source is its weight times the rows given so far: mostly no whole number. Which
source comes next is the chairman assignment problem. By the rule of Tijdeman (Discrete Mathematics
32, 1980), with k sources and d = 1 / (2k - 2), the j-th row of a source

    may be given   once its share has come to j - 1 + d rows
    is due         when its share comes to    j - d rows

and of the rows that may be given, the one that is due first goes first. So each source always is
within 1 - d rows of its share (half a row for two sources), and no rule can promise less for every
choice of weights. Over any window of a run two such errors add up: to less than two rows, and to
less than one for two sources.

A step gives all its rows at once and has no order inside. So the rule is applied to whole steps: of
all rows that may be given by its end, those that are due last wait. What a source has given so far
is all that the next step depends on. Whole numbers alone take part: every machine finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.loading.order import Integers


class Shares:
    """The rule for some weights; `given` are the rows of each source since these weights began.

    A weight is taken as the decimal number that it is written as: 0.7 is exactly seven tenths.

    Args:
        weights: 0 or more, at least one above 0; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * denominator) for weight in exact]
        assert min(whole) >= 0 < max(whole)
        self.weights = tuple(weight // math.gcd(*whole) for weight in whole)
        """The weights as whole numbers without a common divisor: equal for equal shares."""
        self._total = sum(self.weights)
        self._count = sum(weight > 0 for weight in self.weights)
        # 1 / d. A single source has no error, whatever d is.
        self._parts = max(2, 2 * self._count - 2)
        common = math.lcm(*(weight for weight in self.weights if weight))
        # Times in which rows of different sources are due become comparable as whole numbers.
        self._spacing = [common // weight if weight else 0 for weight in self.weights]

    def after_step(self, given: Sequence[int], rows: int) -> list[int]:
        """Returns what each source has given after a step of `rows` rows."""
        parts, total, until = self._parts, self._total, sum(given) + rows
        # All that may be given: the largest j with j - 1 + d <= until * weight / total.
        after = [
            (parts * weight * until + (parts - 1) * total) // (parts * total)
            for weight in self.weights
        ]
        # At most one row of each source is too much, so this costs the same for any step.
        for _ in range(sum(after) - until):
            waiting = (i for i, count in enumerate(after) if count > given[i])
            after[max(waiting, key=lambda i: (parts * after[i] - 1) * self._spacing[i])] -= 1
        return after

    def after_steps(self, given: Sequence[int], rows: int, steps: int) -> Integers:
        """Returns what each source has given before and after each step: (steps + 1, sources)."""
        if len(self.weights) == 1:
            return (given[0] + rows * np.arange(steps + 1))[:, None]
        table = [list(given)]
        for _ in range(steps):
            table.append(self.after_step(table[-1], rows))
        return np.array(table)

    def can_follow(self, given: Sequence[int]) -> bool:
        """Returns whether sources are as close to their shares as the rule keeps them."""
        until, most = sum(given), (self._parts - 1) * self._total
        return all(
            abs(self._parts * (weight * until - self._total * count)) <= most
            for weight, count in zip(self.weights, given, strict=True)
        )

    def bounds(self, rows: int) -> list[tuple[range, range]]:
        """Returns, for each source, the rows of the sources before it in a step of `rows` rows, and
        its own, as the ranges that they always are in."""
        found = []
        before, sources_before = 0, 0
        for weight in self.weights:
            found.append(
                (self._within(before, sources_before, rows), self._within(weight, 1, rows))
            )
            before, sources_before = before + weight, sources_before + (weight > 0)
        return found

    def _within(self, weight: int, sources: int, rows: int) -> range:
        """Returns how many rows of a step some sources of together this weight may give."""
        if not weight:
            return range(1)
        share = Fraction(weight * rows, self._total)
        # At both ends of the step 1 - d rows for each source; what they have too much, all others
        # together have too little.
        error = min(sources, self._count - sources) * 2 * Fraction(self._parts - 1, self._parts)
        return range(max(0, math.ceil(share - error)), min(rows, math.floor(share + error)) + 1)

    def rounded_share(self, index: int, rows: int) -> int:
        """Returns the share of a source in some rows, rounded."""
        return round(Fraction(self.weights[index] * rows, self._total))
