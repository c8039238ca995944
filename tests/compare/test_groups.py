"""Runs in groups: what belongs together, what counts, labels, and bands of curves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compare.groups import RunGroup, Spread, group_labels, group_runs, group_values, option_keys
from compare.plot.curves import band, place_of
from compare.reading.run import Run
from config import ConfigError
from tests.compare.run_directories import make

SEED = ("training.seed",)


def seeds(name: str, *options: str, count: int = 3, **more: Any) -> list[Run]:
    """Makes runs that differ in their seed: 1, 2, ..."""
    made = range(1, count + 1)
    return [make(f"{name}_{n}", f"seed={n}", *options, seed=n, **more) for n in made]


def named(groups: list[RunGroup]) -> list[list[str]]:
    return [[run.name for run in group.runs] for group in groups]


def test_runs_that_differ_in_their_seed_alone_are_a_group_in_the_order_of_their_first() -> None:
    runs = [*seeds("a", count=2), *seeds("b", "n_layer=2", "wandb_project=x")]
    mixed = [runs[2], runs[0], *runs[3:], runs[1]]
    groups = group_runs(mixed, SEED)
    assert named(groups) == [["b_1", "b_2", "b_3"], ["a_1", "a_2"]]
    assert group_labels(groups) == ["n_layer 2", "n_layer 6"]
    assert [group.size for group in groups] == ["3 seeds", "2 seeds"]
    assert [group_values(group) for group in groups] == ["1, 2, 3", "1, 2"]
    # Over both options all of them are one.
    (one,) = group_runs(mixed, option_keys(["seed", "n_layer"]))
    assert group_labels([one]) == ["b_1 and 4 more"]
    assert one.size == "5 runs"
    alone = group_runs(mixed, ())
    assert group_labels(alone)[:2] == ["n_layer 2, seed 1", "n_layer 6, seed 1"]
    assert {group.size for group in alone} == {"1 run"}


def test_runs_on_other_text_or_without_a_config_are_groups_of_their_own() -> None:
    data = {"data": {"fingerprint": "beef", "lines": []}}
    runs = [*seeds("a", count=1), make("b", "seed=2", environment=data), make("c"), make("d")]
    for run in runs[2:]:
        object.__setattr__(run, "config", {})
    assert named(group_runs(runs, SEED)) == [["a_1"], ["b"], ["c"], ["d"]]


def test_forks_of_trunks_that_differ_in_their_seed_are_a_group() -> None:
    def fork(name: str, trunk: str, step: int, *options: str, then: float = 1e-3) -> Run:
        first = {"step": step, "changed": {"training.learning_rate": [then, 5e-4]}}
        second = {"step": 200, "changed": {"model.dropout": [0.2, 0.1]}, "ancestors": [first]}
        word = f"fork_from_checkpoint={trunk}.pt"
        return make(name, word, "lr=5e-4", *options, environment={"parent": second})

    runs = [
        fork("a1", "x", 100, "seed=1"),
        fork("a2", "y", 100, "seed=2"),
        fork("later", "z", 150, "seed=3"),
        fork("other_trunk", "z", 100, "seed=4", then=2e-3),
        fork("other_fork", "z", 100, "seed=5", "max_iters=400"),
    ]
    assert named(group_runs(runs, SEED)) == [
        ["a1", "a2"],
        ["later"],
        ["other_trunk"],
        ["other_fork"],
    ]
    over = option_keys(["seed", "fork_from_checkpoint"])
    assert named(group_runs(runs, over))[0] == ["a1", "a2", "later", "other_trunk"]


def test_runs_whose_steps_have_other_sizes_are_no_repeats_of_each_other() -> None:
    two = {"run": {"processes": 2, "tokens_per_step": 8192}}
    for words, groups in (((), 2), (("batch_size=1", "tokens_per_step=8192"), 1)):
        name = "_".join(words)
        runs = [make(f"a{name}", *words), make(f"b{name}", "seed=2", *words, environment=two)]
        assert len(group_runs(runs, SEED)) == groups


def test_a_seed_that_was_trained_twice_counts_once() -> None:
    stopped = make("a", "seed=1", state="stopped", losses=(4.0, 3.0, 2.0, 1.0), every=50)
    runs = [stopped, make("b", "seed=2", every=50, losses=(4.0,) * 4)]
    (group,) = group_runs([*runs, make("c", "seed=1", every=50, losses=(4.0,) * 4)], SEED)
    assert [run.name for run in group.runs] == ["c", "b"]  # the finished one
    assert group.repeats == (stopped,)
    assert group.values == [(1,), (2,)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sed", "--over sed"),
        ("seed,", "--over "),
        ("compiler", "--over compiler"),
        ("training.bet", "Did you mean"),
    ],
)
def test_an_unknown_option_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        option_keys([words])


def test_words_are_options_with_commas_or_several_times() -> None:
    assert option_keys(["seed, lr", "dropout", "training.seed"]) == (
        "training.seed",
        "training.learning_rate",
        "model.dropout",
    )


def test_a_spread_is_of_a_sample_and_has_no_deviation_of_one_value() -> None:
    spread = Spread.of([1.0, 2.0, 4.0])
    assert spread is not None
    assert spread.count == 3
    assert spread.mean == pytest.approx(7 / 3)
    assert spread.deviation == pytest.approx(math.sqrt(7 / 3))
    assert spread.text() == "2.3333 \u00b1 1.5275"
    one = Spread.of([2.0])
    assert one is not None and math.isnan(one.deviation) and one.text("{:.1f}".format) == "2.0"
    assert Spread.of([]) is None


def test_a_band_has_the_steps_at_which_all_runs_have_a_number() -> None:
    runs = [
        make("a", losses=(4.0, 3.0, 2.0)),
        make("b", losses=(4.2, 3.4)),
        make("c", losses=(None, 3.2, 1.0)),
    ]
    found = band(runs, "eval/val_loss", "tokens")
    assert (found.steps, found.x) == ([200], [200 * 4096])
    assert found.mean == [pytest.approx(3.2)]
    assert found.deviation == [pytest.approx(0.2)]
    assert band(runs[:2], "eval/val_loss").steps == [100, 200]
    one = band(runs[:1], "eval/val_loss", "time")
    assert one.x == [5.0, 10.0, 15.0] and all(map(math.isnan, one.deviation))
    assert band(runs, "no such metric").steps == []


def test_a_long_band_is_thinned_and_keeps_its_peaks() -> None:
    losses = [3.0] * 400
    losses[123] = 9.0
    found = band([make("a", losses=losses, every=4)], "eval/val_loss", limit=20)
    assert len(found.steps) <= 22
    assert (found.steps[0], found.steps[-1]) == (4, 1600)
    assert found.mean[found.steps.index(496)] == 9.0


def test_flops_are_the_tokens_times_what_a_token_takes() -> None:
    run = make("a")
    assert place_of(run, run.records[0], "flops") == 25 * 4096 * 150_000_000
    assert place_of(make("b", old=True), run.records[0], "flops") is None
