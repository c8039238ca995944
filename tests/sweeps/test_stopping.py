"""Which runs of a sweep are hopeless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sweeps.stopping import BestLosses, Member, hopeless, read_curve
from sweeps.sweep_file import StopRule
from tests.compare.run_directories import make_run

MEDIAN = StopRule(rule="median", after=0.25)
HALVING = StopRule(rule="halving", after=0.25)


def member(losses: Sequence[float], running: bool = True, planned: int = 100) -> Member:
    """A run with an evaluation every 10 steps."""
    steps = range(10, 10 * len(losses) + 1, 10)
    best = [min(losses[: n + 1]) for n in range(len(losses))]
    return Member(BestLosses(tuple(steps), tuple(best)), planned, running)


def test_a_run_above_the_median_at_its_step_is_stopped() -> None:
    done = {str(n): [member([5.0, 4.0, float(n), 0.1], running=False)] for n in (1, 2, 3)}
    assert hopeless(MEDIAN, done | {"bad": [member([5.0, 4.0, 2.5])]}) == {
        "bad": "median at step 30: 2.5000 above 2.0000 of 3 others"
    }
    assert hopeless(MEDIAN, done | {"good": [member([5.0, 4.0, 2.0])]}) == {}
    # What the others reached later does not count, nor what it was before its best.
    assert hopeless(MEDIAN, done | {"good": [member([5.0, 1.5, 2.5])]}) == {}


def test_none_is_stopped_early_or_without_enough_others_at_its_step() -> None:
    done = {str(n): [member([1.0] * 4, running=False)] for n in (1, 2, 3)}
    assert hopeless(MEDIAN, done | {"bad": [member([9.0] * 2)]}) == {}  # before `after`
    assert hopeless(MEDIAN, done | {"bad": [member([9.0] * 3)]}).keys() == {"bad"}
    assert hopeless(MEDIAN, done | {"bad": [member([9.0] * 5)]}) == {}  # the others are behind
    del done["3"]
    assert hopeless(MEDIAN, done | {"bad": [member([9.0] * 3)]}) == {}


def test_seeds_are_judged_by_their_mean() -> None:
    done = {str(n): [member([2.0] * 4, running=False)] for n in (1, 2, 3)}
    lucky, unlucky = member([1.0] * 4), member([2.9] * 4)
    assert hopeless(MEDIAN, done | {"seeds": [lucky, unlucky]}) == {}
    assert hopeless(MEDIAN, done | {"seeds": [unlucky, unlucky]}).keys() == {"seeds"}
    # A seed that is behind holds the judgement back to its step.
    assert hopeless(MEDIAN, done | {"seeds": [unlucky, member([9.0])]}) == {}


def test_halving_lets_the_best_half_of_a_rung_go_on() -> None:
    groups = {str(n): [member([float(n)] * 3)] for n in (1, 2, 3, 4)}
    assert hopeless(HALVING, groups) == {
        "3": "halving at step 25: 3.0000 is place 3 of 4, 2 go on",
        "4": "halving at step 25: 4.0000 is place 4 of 4, 2 go on",
    }
    assert hopeless(HALVING, {"1": groups["1"]}) == {}
    longer = {"1": [member([1.0] * 6)], "2": [member([2.0] * 6)], "3": [member([9.0] * 3, False)]}
    assert hopeless(HALVING, longer) == {"2": "halving at step 50: 2.0000 is place 2 of 2, 1 go on"}


def test_a_curve_is_the_best_so_far_and_is_read_again_when_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(losses=(4.0, 2.0, 3.0))
    curve = read_curve(run)
    assert curve == BestLosses((100, 200, 300), (4.0, 2.0, 2.0))
    assert (curve.at(99), curve.at(250), curve.at(301)) == (None, 2.0, None)
    longer = make_run("longer", losses=(4.0, 2.0, 3.0, 1.0))
    (run / "metrics.jsonl").write_bytes((longer / "metrics.jsonl").read_bytes())
    assert read_curve(run).last == 400
    assert read_curve(tmp_path / "none") == BestLosses()
