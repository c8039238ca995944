"""The first step at which the mean of a group has reached a goal."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import scipy.stats

from compare.plot.curves import band
from compare.reading.run import Run
from compare.statistics.goal import GoalProgress, parse_goal, progress_to
from config import ConfigError
from tests.compare.run_directories import make


def runs(*losses: Sequence[float | None]) -> list[Run]:
    return [make(f"run_{seed}", f"seed={seed}", losses=own) for seed, own in enumerate(losses)]


def progress(goal: str, made: Sequence[Run], level: float = 0.01) -> GoalProgress:
    found = progress_to(parse_goal(goal), made, level)
    assert isinstance(found, GoalProgress), found
    return found


def test_the_first_passing_step_and_its_p_agree_with_scipy() -> None:
    draw = random.Random(0)
    for case in range(20):
        curves = [[4 - step / 5 + draw.gauss(0, 0.1) for step in range(12)] for _ in range(4)]
        made = [make(f"{case}_{n}", losses=own, every=4) for n, own in enumerate(curves)]
        for sign, side in (("<=", "less"), (">", "greater")):
            tests = [
                scipy.stats.ttest_1samp(values, 3.0, alternative=side).pvalue
                for values in zip(*curves, strict=True)
            ]
            first = next(place for place, p in enumerate(tests) if p < 0.01)
            found = progress(f"eval/val_loss{sign}3", made)
            assert (found.passed, found.step) == (True, 4 * (first + 1))
            assert found.p == pytest.approx(tests[first], rel=1e-9)
            assert (found.spread.count, found.looked_at) == (4, 12)


def test_a_mean_on_the_wrong_side_is_told_at_its_best_step() -> None:
    found = progress("eval/val_loss<2", runs((4.0, 3.0, 3.5), (4.0, 3.2, 3.5)))
    assert (found.passed, found.step, found.enough) == (False, 200, None)
    assert found.spread.mean == pytest.approx(3.1)


def test_too_few_runs_are_told_how_many_would_do() -> None:
    made = runs((3.5, 2.9), (3.5, 2.95))
    found = progress("eval/val_loss<=3", made)
    assert (found.passed, found.step) == (False, 200)
    expected = scipy.stats.ttest_1samp([2.9, 2.95], 3.0, alternative="less").pvalue
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert found.enough is not None
    for count in (found.enough - 1, found.enough):
        t = (3.0 - found.spread.mean) / found.spread.deviation * count**0.5
        assert (scipy.stats.t.sf(t, count - 1) < 0.01) == (count == found.enough)
    assert progress("eval/val_loss<=3", made, level=0.2).passed


def test_values_without_deviation_pass_on_the_right_side_only() -> None:
    made = runs((3.0,), (3.0,))
    assert progress("eval/val_loss<=3.1", made).p == 0.0
    assert not progress("eval/val_loss<=3", made).passed
    assert not progress("eval/val_loss>=3.1", made).passed


def test_what_cannot_be_tested_is_said() -> None:
    goal = parse_goal("eval/val_loss<=3")
    never = runs((None,), (2.0,))
    assert "nothing about other seeds" in str(progress_to(goal, never[:1], 0.01))
    assert progress_to(goal, never, 0.01) == "run_0 has no eval/val_loss"


@pytest.mark.parametrize("text", ["", "eval/val_loss", "loss=1", "loss<=x", "loss<=1e999", "<1"])
def test_a_goal_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a metric, one of < <= > >=, and a number"):
        parse_goal(text)


def test_a_goal_reads_back_as_it_was_written() -> None:
    assert str(parse_goal(" eval/val_loss <= 1.30 ")) == "eval/val_loss<=1.3"


def test_what_forks_of_one_checkpoint_share_is_no_observation_of_each() -> None:
    parent = {"parent": {"run": "trunk", "path": "/trunk", "step": 200, "sha256": "ab"}}
    curves = enumerate([(4.0, 2.0, 3.3), (4.0, 2.0, 3.2), (4.0, 2.0, 3.1)], 1)
    forks = [make(f"f{n}", f"seed={n}", losses=own, environment=parent) for n, own in curves]
    found = progress("eval/val_loss<=3", forks)
    assert (found.passed, found.step, found.looked_at) == (False, 300, 1)
    assert band(forks, "eval/val_loss").steps == [300]
    young = [make(f"y{n}", f"seed={n}", losses=(4.0, 2.0), environment=parent) for n in (1, 2)]
    assert progress_to(parse_goal("eval/val_loss<=3"), young, 0.01) == (
        "there is no step at which all runs have eval/val_loss after 200, which forks of one "
        "checkpoint share"
    )


def test_a_run_that_diverged_after_the_goal_is_told() -> None:
    made = runs((2.0, 1.9), (2.0, None))
    assert progress_to(parse_goal("eval/val_loss<=3"), made, 0.01) == (
        "eval/val_loss of run_1 is no finite number at step 200"
    )
