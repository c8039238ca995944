"""`runs.py list|diff|plot --over` and `runs.py test`: what they print, and how they refuse."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import runs
from compare.reading.run import read_run, restart_command
from tests.compare.run_directories import make_run
from tests.compare.test_runs import Captured, output, refused


def make_seeds(
    name: str, *options: str, shift: float = 0.0, seeds: tuple[int, ...] = (1, 2, 3)
) -> None:
    """Writes a run per seed; their last losses are 3.01, 3.02, 3.03 and the shift."""
    for seed in seeds:
        losses = (4.0, 3.0 + seed / 100 + shift + (seed == 2) * shift / 10)
        make_run(f"{name}{seed}", f"seed={seed}", *options, losses=losses, seed=seed)


def lines(capsys: Captured, *words: str) -> list[list[str]]:
    return [line.split() for line in output(capsys, *words).splitlines()]


# ---- list


def test_list_over_seeds_has_a_line_per_group_with_mean_and_deviation(capsys: Captured) -> None:
    make_seeds("a")
    make_seeds("b", "n_layer=2", shift=-0.5, seeds=(1, 2))
    make_run("c", "n_layer=3", "max_iters=200", losses=(4.0,), state="stopped")
    heads, first, second, third = lines(capsys, "list", "--over", "seed")
    assert heads[:5] == ["first", "run", "differs", "in", "n"]
    assert first[:6] == ["a1", "n_layer", "6", "3", "done", "200"]
    assert first[6:12] == ["3.0200", "\u00b1", "0.0100"] * 2
    assert second[:4] == ["b1", "n_layer", "2", "2"]
    assert third[:7] == ["c", "n_layer", "3", "1", "stopped", "100", "4.0000"]
    order = lines(capsys, "list", "--over", "seed", "--sort", "-best", "--filter", "state=done")
    assert [row[0] for row in order] == ["first", "a1", "b1"]
    assert lines(capsys, "list", "--over", "seed,n_layer", "--filter", "seed<3")[1][:3] == [
        "a1",
        "4",
        "done",
    ]


def test_list_over_seeds_as_json_holds_each_group(capsys: Captured) -> None:
    make_seeds("a", seeds=(1, 2))
    make_run("again", "seed=2", losses=(4.0, 3.0), state="stopped")
    (group,) = json.loads(output(capsys, "list", "--over", "seed", "--json"))
    assert group["runs"] == ["checkpoints/a1", "checkpoints/a2"]
    assert group["not_counted"] == ["checkpoints/again"]
    assert group["over"] == {"training.seed": [1, 2]}
    assert group["best_loss"] == {
        "n": 2,
        "mean": pytest.approx(3.015),
        "sd": pytest.approx(0.00707, abs=1e-5),
    }


def test_states_and_steps_of_a_group_that_differ_are_counted(capsys: Captured) -> None:
    make_run("a", "seed=1", "max_iters=200", losses=(4.0, 3.0))
    make_run("b", "seed=2", "max_iters=200", losses=(4.0,), state="failed")
    (_, row) = output(capsys, "list", "--over", "seed").splitlines()
    assert "1 done, 1 crashed" in row and "100-200" in row


# ---- diff


def test_diff_over_seeds_compares_groups(capsys: Captured) -> None:
    make_seeds("a")
    make_seeds("b", "learning_rate=0.1", shift=-0.5)
    text = output(capsys, "diff", "checkpoints", "--over", "seed")
    assert "lr 0.001: a1, a2, a3\n" in text and "lr 0.1: b1, b2, b3\n" in text
    assert "training.learning_rate  1e-3      0.1\n" in text
    assert "training.seed" not in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["runs"] == ["3", "seeds", "3", "seeds"]
    assert rows["best_loss"][:3] == ["3.0200", "\u00b1", "0.0100"]
    (line,) = [line for line in text.splitlines() if line.startswith("  lr 0.1")]
    assert line.split()[2:5] == ["-0.5167", "-0.5884", "to"]
    assert line.endswith("better  (paired, 3 and 3 runs, step 200)")
    found = json.loads(output(capsys, "diff", "checkpoints", "--over", "seed", "--json"))
    assert [row["training.learning_rate"] for row in found["settings"]] == [0.001, 0.1]
    assert found["against_first"][0]["test"] == "paired"
    make_run("c", "n_layer=2")
    text = output(capsys, "diff", "checkpoints", "--over", "seed")
    assert "n_layer 2 is not compared: c is one run and shows nothing of other seeds." in text


def test_values_that_differ_inside_a_group_stand_side_by_side(capsys: Captured) -> None:
    make_seeds("a", seeds=(1,))
    make_run("z", "seed=2", losses=(4.0, 3.0), environment={"torch": "3.0"})
    make_run("b", "n_layer=2")
    text = output(capsys, "diff", "checkpoints", "--over", "seed")
    assert '"2.6.0" | "3.0"' in text


def test_diff_of_one_group_exits_with_2(capsys: Captured) -> None:
    make_seeds("a")
    message = refused(capsys, "diff", "checkpoints", "--over", "seed")
    assert (
        message == "diff compares two groups or more; all these runs differ in training.seed alone."
    )


# ---- plot


def test_plot_over_seeds_draws_means_and_says_what_they_are(capsys: Captured) -> None:
    make_seeds("a")
    make_seeds("b", "n_layer=2", shift=-0.5, seeds=(1,))
    words = ("plot", "checkpoints", "--over", "seed", "-o")
    assert output(capsys, *words, "seeds.svg") == "Wrote seeds.svg\n"
    picture = Path("seeds.svg").read_text()
    assert "n_layer 6 (3 seeds)  3.02 \u00b1 0.01" in picture
    assert "n_layer 2 (1 seed)  2.51" in picture
    assert "bold: mean, at steps that all runs have   band: \u00b1 1 sd" in picture
    found = json.loads(output(capsys, *words, "seeds.png", "--json"))
    assert (found["output"], found["x"]) == ("seeds.png", "step")
    first, second = found["curves"]
    assert first["runs"] == [f"checkpoints/a{seed}" for seed in (1, 2, 3)]
    assert (first["metric"], first["steps"]) == ("eval/val_loss", [100, 200])
    assert first["mean"] == [4.0, pytest.approx(3.02)]
    assert second["deviation"] == [None, None]
    single = json.loads(output(capsys, "plot", "a1", "--json", "--metric", "eval/val_loss"))
    assert single["curves"][0]["run"] == "checkpoints/a1"
    assert single["curves"][0]["y"] == [4.0, 3.01]


def test_plot_over_flops_needs_runs_that_wrote_them(capsys: Captured) -> None:
    make_run("a")
    words = ("plot", "a", "--x", "flops", "--json")
    (train, _) = json.loads(output(capsys, *words))["curves"]
    assert train["x"][0] == 25 * 4096 * 150_000_000
    make_run("b", old=True)
    message = refused(capsys, "plot", "a", "b", "--x", "flops")
    assert message == "--x flops: not known of b, of an older version."


# ---- test


def test_a_run_of_each_side_stands_for_its_seeds(capsys: Captured) -> None:
    make_seeds("a")
    make_seeds("b", "learning_rate=0.1", shift=-0.5)
    make_run("c", "n_layer=2")
    text = output(capsys, "test", "a2", "b1")
    assert text.startswith("For other seeds, on this text: B is better than A.\n")
    assert "A  lr 0.001  3     1, 2, 3  3.0200 \u00b1 0.0100\n" in text
    assert "B - A: -0.5167, 95 % interval -0.5884 to -0.4450, p = 0.0010\n" in text
    assert "t-test: paired, 3 and 3 runs, step 200.\n" in text
    assert text.endswith("A: a1, a2, a3\nB: b1, b2, b3\n")
    assert output(capsys, "test", "b1", "a1").startswith(
        "For other seeds, on this text: B is worse than A."
    )
    found = json.loads(output(capsys, "test", "a2", "b1", "--json"))
    assert found["a"]["runs"] == [f"checkpoints/a{seed}" for seed in (1, 2, 3)]
    assert (found["difference"]["speaks_for"], found["difference"]["test"]) == (
        "other seeds",
        "paired",
    )
    welch = output(capsys, "test", "a1", "b1", "--filter", "name!=b2")
    assert "t-test: Welch, 3 and 2 runs, step 200." in welch
    assert "They share some values of training.seed" in welch
    speed = output(capsys, "test", "a1", "b1", "--metric", "tokens")
    assert speed.startswith("For other seeds: A and B are equal.\n")


def test_folders_are_sides_even_if_their_configs_are_equal(capsys: Captured) -> None:
    for side, shift in (("old", 0.0), ("new", 1.0)):
        for seed in (1, 2):
            losses = (3 + seed / 100 + shift,)
            make_run(f"run_{seed}", f"seed={seed}", folder=Path(side), losses=losses)
    assert output(capsys, "test", "old", "new").startswith(
        "For other seeds, on this text: B is worse than A."
    )
    # A run inside a folder stands for those of the same folder.
    assert "2     1, 2" in output(capsys, "test", "old/run_1", "new/run_2")


def test_one_run_on_each_side_answers_for_other_text_and_says_what_to_train(
    capsys: Captured,
) -> None:
    make_run("a", "seed=1", losses=(4.0, 3.0), seed=1)
    make_run("b", "seed=1", "n_layer=2", "max_iters=300", losses=(4.0, 2.9, 1.0), seed=2)
    text = output(capsys, "test", "a", "b")
    assert text.startswith("For other text, with these two runs: B is better than A.\n")
    assert "eval/val_loss at step 200\n" in text  # which both have
    assert "B - A: -0.1000, 95 % interval" in text
    assert "t-test: 8 batches, step 200.\n" in text
    *_, why, first, second = text.splitlines()
    assert why == "It says nothing of other seeds. To ask that, train both again:"
    assert shlex.split(first)[:2] == ["python", "train.py"]
    assert first.endswith("training.seed=2") and second.endswith("training.seed=2")
    found = json.loads(output(capsys, "test", "a", "b", "--json"))["difference"]
    assert (found["speaks_for"], found["batches"]) == ("other text", 8)
    assert 0 < found["p"] < 1e-4


def test_a_run_without_a_readable_seed_gets_no_command(capsys: Captured) -> None:
    make_run("a", "seed=1", seed=1)
    make_run("b", seed=2, environment={"config": {}})
    Path("checkpoints/b/config.yaml").write_text("")
    assert runs.main(("test", "a", "b")) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("training.seed=2")
    assert second == "  (the command for b is not known: its seed cannot be read)"


def test_the_seed_of_a_fork_is_that_of_its_parent_which_is_trained_first(capsys: Captured) -> None:
    trunk = make_run("trunk", "seed=1")
    for name, rate in (("a", "1e-3"), ("b", "1e-2")):
        parent = {"run": "trunk", "path": str(trunk.resolve()), "step": 100, "changed": {}}
        words = (
            f"learning_rate={rate}",
            "seed=1",
            f"fork_from_checkpoint={trunk}/checkpoint_100.pt",
        )
        make_run(name, *words, environment={"parent": parent})
    *_, first, second, _, _ = output(capsys, "test", "a", "b").splitlines()
    again = restart_command(read_run(trunk))
    assert first == f"  {again} training.seed=2"
    fork = "training.seed=2 training.fork_from_checkpoint=RUN/checkpoint_100.pt"
    assert second == f"  {again} {fork}  # RUN: the one before"
    shutil.rmtree(trunk)
    assert "  (first a run like trunk with training.seed=2)\n" in output(capsys, "test", "a", "b")


def test_one_run_against_several_cannot_be_answered(capsys: Captured) -> None:
    make_seeds("a", seeds=(1, 5))
    make_run("b", "seed=1", "n_layer=2")
    for words in (("a1", "b"), ("b", "a1")):
        message = refused(capsys, "test", *words)
        assert (
            "b is one run, against 2 seeds: what other seeds would make of it is unknown."
            in message
        )
        assert "training.seed=5\n" in message
        assert message.endswith(
            "python runs.py diff " + " ".join(f"checkpoints/{w}" for w in words)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a1", "test takes two runs, A and B; or with --goal, runs and -p."),
        ("a1 b1 -p 0.1", "test takes two runs, A and B; or with --goal, runs and -p."),
        ("a1 a2", "A and B are one experiment: a1, a2 differ in training.seed alone."),
        ("b1 b1 --over dropout", "A and B are one experiment: b1 is both."),
        ("a1 b1 --over seeed", "--over seeed"),
        ("a1 b1 --metric loss", "n_layer 6 and n_layer 2 cannot be compared: a1 has no loss."),
        ("c b1 --metric tokens --over dropout", "only eval/val_loss can be tested, not tokens."),
        ("a1 b1 --filter state=crashed", "--filter state=crashed: leaves no run of a side."),
        ("a1 b1 --goal loss<1 --metric x", "--goal names its metric: leave out --metric."),
        (
            "a1 b1 --goal loss=1",
            "--goal 'loss=1': expected a metric, one of < <= > >=, and a number",
        ),
        ("a1 --goal loss<1 -p 2", "expected a number between 0 and 1, got '2'"),
        (
            "checkpoints b1",
            "checkpoints holds 3 experiments that differ in more than training.seed: n_layer 6",
        ),
    ],
)
def test_a_wrong_test_exits_with_2(capsys: Captured, words: str, message: str) -> None:
    make_seeds("a", seeds=(1, 2))
    make_seeds("b", "n_layer=2", seeds=(1, 2))
    make_run("c", "n_layer=3", "seed=1")
    assert message in refused(capsys, "test", *words.split())


# ---- goals


def test_the_first_step_that_reaches_a_goal_is_printed_for_each_group(capsys: Captured) -> None:
    make_seeds("a")
    make_seeds("b", "n_layer=2", shift=-0.5)
    make_run("c", "n_layer=3", losses=(4.0, 3.0))
    goal = ("--goal", "eval/val_loss<=3.0")
    text = " ".join(output(capsys, "test", "a1", "b1", "c", *goal, "-p", "0.05").split())
    assert (
        "n_layer 6 (3 seeds): eval/val_loss<=3 is not reached: the mean is 0.0200 above at its"
        in text
    )
    assert (
        "n_layer 2 (3 seeds): eval/val_loss<=3 is reached at step 200: 2.5033 \u00b1 0.0306" in text
    )
    assert "(n = 3), p = 0.0006, below 0.05; the first of 2 steps that passes" in text
    assert (
        "n_layer 3 (1 seed): eval/val_loss<=3 is not tested: one run proves nothing about" in text
    )
    near = " ".join(output(capsys, "test", "a1", "--goal", "eval/val_loss<=3.03").split())
    assert "is not shown with p < 0.01: nearest at step 200, 3.0200 \u00b1 0.0100" in near
    assert "it takes 9 runs" in near
    found: list[dict[str, Any]]
    found = json.loads(output(capsys, "test", "a1", "b1", "c", *goal, "--json"))
    assert [row.get("passed") for row in found] == [False, True, None]
    assert found[1]["spread"]["n"] == 3
    assert "one run" in found[2]["not_tested"]
