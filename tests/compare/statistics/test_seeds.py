"""Tests over seeds against scipy's, and how often they are wrong and right on simulated runs."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence

import pytest
import scipy.stats

from compare.groups import group_runs, option_keys
from compare.reading.run import Run, read_run
from compare.statistics.comparison import Comparison, paired, welch
from compare.statistics.paired import compare_runs
from compare.statistics.seeds import compare_groups
from tests.compare.run_directories import make, make_run

SIMULATIONS = int(os.environ.get("SIMULATIONS", "1500"))
"""How often a test is repeated on random values; 100,000 for the full proof."""


def seeds(
    name: str, losses: Sequence[Sequence[float | None]], first: int = 1, words: str = ""
) -> list[Run]:
    """Makes a run per seed with the given held-out losses."""
    made = enumerate(losses, first)
    return [make(f"{name}_{n}", f"seed={n}", *words.split(), losses=own) for n, own in made]


def compare(a: Sequence[Run], b: Sequence[Run], metric: str = "eval/val_loss") -> Comparison:
    found = reason_or_difference(a, b, metric)
    assert isinstance(found, Comparison), found
    return found


def reason_or_difference(
    a: Sequence[Run], b: Sequence[Run], metric: str = "eval/val_loss"
) -> Comparison | str:
    (of_a,), (of_b,) = (group_runs(runs, option_keys(["seed"])) for runs in (a, b))
    return compare_groups(of_a, of_b, metric)


def sample(draw: random.Random, count: int) -> list[float]:
    scale, shift = 10 ** draw.uniform(-3, 1), draw.uniform(-2, 5)
    return [draw.gauss(shift, scale) for _ in range(count)]


# ---- agreement


def test_welch_agrees_with_scipy() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = sample(draw, draw.randint(2, 12)), sample(draw, draw.randint(2, 12))
        found, expected = welch(a, b), scipy.stats.ttest_ind(b, a, equal_var=False)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.freedom == pytest.approx(expected.df, rel=1e-9)
        interval = expected.confidence_interval(0.95)
        assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_agrees_with_scipy() -> None:
    draw = random.Random(1)
    for _ in range(200):
        a = sample(draw, draw.randint(2, 12))
        b = [value + draw.gauss(0.1, 0.2) for value in a]
        found, expected = paired(a, b), scipy.stats.ttest_rel(b, a)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        interval = expected.confidence_interval(0.95)
        assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_the_p_over_held_out_batches_agrees_with_scipy() -> None:
    a, b = make("run_a", losses=(3.0,), seed=1), make("run_b", losses=(2.999,), seed=2)
    pair = compare_runs(a, b)
    assert isinstance(pair, Comparison)
    losses = (run.records[-2]["eval/val_losses"] for run in (b, a))
    assert pair.mean.p == pytest.approx(scipy.stats.ttest_rel(*losses).pvalue, rel=1e-9)
    same = compare_runs(a, a)
    assert isinstance(same, Comparison) and same.mean.p == 1.0


def test_values_without_deviation_are_equal_or_surely_different() -> None:
    assert [test([2.0, 2.0], [2.0, 2.0]).p for test in (welch, paired)] == [1.0, 1.0]
    assert [test([2.0, 2.0], [2.5, 2.5]).p for test in (welch, paired)] == [0.0, 0.0]
    assert welch([2.0, 2.0], [2.5, 2.5]).interval == (0.5, 0.5)


# ---- simulated runs


def rejected(kind: str, count: int, shift: float) -> int:
    """In how many simulations a test finds a difference. Runs that share a seed share half of
    their variance."""
    draw, found = random.Random(f"{kind} {count} {shift}"), 0
    for _ in range(SIMULATIONS):
        shared = [draw.gauss(0, 1) if kind == "paired" else 0.0 for _ in range(count)]
        a, b = ([each + draw.gauss(0, 1) for each in shared] for _ in "ab")
        b = [value + shift for value in b]
        found += (paired if kind == "paired" else welch)(a, b).p < 0.05
    return found


@pytest.mark.parametrize(("kind", "count"), [("paired", 3), ("paired", 8), ("welch", 20)])
def test_no_difference_is_found_in_one_of_twenty_cases(kind: str, count: int) -> None:
    found = rejected(kind, count, 0.0)
    rate = scipy.stats.binomtest(found, SIMULATIONS, 0.05)
    print(f"{kind}, {count} seeds: {found / SIMULATIONS:.4f}, p of 5 % {rate.pvalue:.3f}")
    assert rate.pvalue > 1e-3


def test_welch_with_few_seeds_errs_on_the_side_of_no_difference() -> None:
    for count in (2, 3):
        found = rejected("welch", count, 0.0)
        print(f"welch, {count} seeds: {found / SIMULATIONS:.4f}")
        assert scipy.stats.binomtest(found, SIMULATIONS, 0.05, "greater").pvalue > 1e-3


@pytest.mark.parametrize(("kind", "count"), [("paired", 3), ("paired", 8), ("welch", 20)])
def test_a_known_difference_is_found_as_often_as_predicted(kind: str, count: int) -> None:
    shift = 1.0 if count == 20 else 1.5
    freedom = count - 1 if kind == "paired" else 2 * count - 2
    centre = shift / math.sqrt(2 / count)  # both deviations are 1, so that of a difference sqrt(2)
    edge = scipy.stats.t.ppf(0.975, freedom)
    power = scipy.stats.nct.sf(edge, freedom, centre) + scipy.stats.nct.cdf(-edge, freedom, centre)
    found = rejected(kind, count, shift)
    print(f"{kind}, {count} seeds: power {found / SIMULATIONS:.4f}, predicted {power:.4f}")
    assert scipy.stats.binomtest(found, SIMULATIONS, power).pvalue > 1e-3


# ---- groups of runs


def test_groups_with_the_same_seeds_are_compared_seed_by_seed() -> None:
    a = seeds("a", [(4.0, 3.0), (4.0, 3.2), (4.0, 3.5)])
    b = seeds("b", [(4.0, 2.9), (4.0, 3.1), (4.0, 3.3)], words="learning_rate=0.1")
    found = compare(a, b[::-1])  # in any order
    assert (found.test, found.step_a, found.notes) == ("paired", 200, ())
    expected = scipy.stats.ttest_rel([2.9, 3.1, 3.3], [3.0, 3.2, 3.5])
    assert found.mean.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.verdict == "no difference shown"
    assert compare(a, b, "tokens").verdict == "equal"


def test_groups_with_other_seeds_are_compared_by_welchs_test() -> None:
    a = seeds("a", [(3.0,), (3.01,), (3.02,)])
    b = seeds("b", [(2.0,), (2.01,), (2.02,)], first=3, words="learning_rate=0.1")
    found = compare(a, b)
    assert found.test == "Welch"
    assert found.verdict == "better"
    assert found.mean == welch([3.0, 3.01, 3.02], [2.0, 2.01, 2.02])
    assert "They share some values" in found.notes[0]
    assert compare(b, a).verdict == "worse"
    assert (
        "So unequal numbers"
        in compare(a[:2], seeds("c", [(3.0,)] * 5, 4, "learning_rate=1")).notes[0]
    )


def test_groups_are_compared_at_the_newest_step_that_all_have() -> None:
    a = seeds("a", [(4.0, 3.0, 2.0), (4.0, 3.1)], words="max_iters=300")
    b = seeds("b", [(4.0, 2.8, 1.9), (4.0, 2.7, 1.8)], words="max_iters=300 n_layer=2")
    found = compare(a, b)
    assert (found.step_a, found.a.mean) == (200, 3.05)
    (note,) = found.notes
    assert (
        note == "Step 200 is the newest that all have; a_1 to 300, b_1 to 300, b_2 to 300 went on."
    )


def test_notes_name_unfinished_runs_repeats_and_other_machines() -> None:
    a = seeds("a", [(3.0,), (3.1,)])
    again = make("again", "seed=2", losses=(3.1,), state="stopped", environment={"torch": "9"})
    other = read_run(make_run("other", "seed=3", losses=(3.1,), environment={"torch": "9"}))
    unfinished = make("bad", "seed=4", losses=(3.0,), state="failed")
    b = seeds("b", [(3.0,), (3.1,)], words="learning_rate=0.1")
    assert compare([*a, again, other, unfinished], b).notes == (
        "Not finished: bad (crashed).",
        "Beside training.seed, a_1, a_2, other, bad differ in torch.",
        "Not counted, since another run has the same training.seed: again.",
        "They share some values of training.seed; with the same on both sides the test is paired.",
    )


def test_the_reason_why_groups_cannot_be_compared_is_given() -> None:
    a = seeds("a", [(3.0,), (3.1,)])
    tokens = seeds("b", [(3.0,), (3.1,)], words="tokenizer.name=char")
    text = seeds("c", [(3.0,), (3.1,)], words="parquet_dir=elsewhere")
    late = [make(f"d_{n}", "learning_rate=0.1", f"seed={n}", every=64) for n in (1, 2)]
    one = seeds("e", [(3.0,)], words="learning_rate=0.1")
    assert reason_or_difference(a, one) == "e_1 is one run and shows nothing of other seeds"
    assert "tokenizers differ" in str(reason_or_difference(a, tokens))
    assert compare(a, tokens, "eval/bits_per_byte").step_a == 100
    assert "different held-out text" in str(reason_or_difference(a, text))
    assert "tokenizers differ" in str(reason_or_difference(a, tokens, "train/loss"))
    assert reason_or_difference(a, text, "train/loss") == "they were trained on different text"
    rows = [
        make(f"r_{n}", f"seed={n}", "eval_iters=4", "n_layer=2", losses=(3.0,), rows="other")
        for n in (1, 2)
    ]
    assert str(reason_or_difference(a, rows)).endswith("text: they differ in training.eval_iters")
    assert compare(a, rows, "train/loss").step_a == 100
    assert "no step at which all" in str(reason_or_difference(a, late))
    assert reason_or_difference(a, a, "no") == "a_1 has no no"
    diverged = seeds("f", [(4.0, 3.0), (4.0, None)], words="learning_rate=1")
    found = reason_or_difference(a, diverged)
    assert found == "eval/val_loss of f_2 is no finite number at step 200"
