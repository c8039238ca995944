"""`python runs.py`: what it prints, how it sorts and filters, how it refuses mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runs
from tests.compare.run_directories import change_environment, make_run
from tests.conftest import ROOT

Captured = pytest.CaptureFixture[str]


def make(*names: str, options: tuple[str, ...] | None = None, **more: Any) -> list[Path]:
    """Writes runs into checkpoints, each with its own number of layers and losses."""
    made = []
    for number, name in enumerate(names):
        own: dict[str, Any] = {"losses": (4.0, 3.0 - number / 10), "seed": number}
        words = (f"n_layer={number + 2}",) if options is None else options
        made.append(make_run(name, *words, **(own | more)))
    return made


def output(capsys: Captured, *words: str) -> str:
    """Returns the standard output of a command that succeeds and prints no error."""
    assert runs.main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: Captured, *words: str, code: int = 2) -> str:
    """Returns the standard error of a command that prints nothing else."""
    try:
        assert runs.main(words) == code
    except SystemExit as left:
        assert left.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip()


def listed(capsys: Captured, *words: str) -> list[str]:
    """Returns the names of the runs that `list` shows, in order."""
    return [run["name"] for run in json.loads(output(capsys, "list", "--json", *words))]


# ---- list


def test_list_prints_a_line_per_run_and_a_dash_for_what_is_unknown(capsys: Captured) -> None:
    make("run_a", "run_b")
    heads, first, second = (line.split() for line in output(capsys, "list").splitlines())
    assert heads[:8] == ["run", "differs", "in", "state", "model", "params", "steps", "tokens"]
    assert heads[8:] == ["best", "last", "bits/B", "tok/s", "precision"]
    assert first[:5] == ["a", "n_layer", "2", "done", "bdh"]
    assert first[5:11] == ["25.3", "M", "200/200", "819", "k", "3.0000"]
    assert second[:3] == ["b", "n_layer", "3"]
    make_run("run_c", folder=Path("old"), losses=(None,), old=True, state=None)
    line = output(capsys, "list", "old").splitlines()[1].split()
    assert (line[3], line[7:10]) == ("-", ["-", "-", "-"])  # parameters; losses and bits per byte


def test_a_table_of_usual_runs_fits_100_columns(capsys: Captured) -> None:
    make("run_20251108_143022", "run_20251108_143023", losses=[9.5, 3.2] * 30, every=200)
    lines = output(capsys, "list").splitlines()
    assert max(map(len, lines)) <= 100
    assert len({line.index("bf16") for line in lines[1:]}) == 1


def test_what_cannot_be_read_is_reported_on_standard_error(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make("run_a", "run_b")
    (path / "environment.json").write_text("{")
    (path / "metrics.jsonl").unlink()
    assert runs.main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "run_a: environment.json: damaged, not a JSON object",
        "run_a: metrics.jsonl: missing",
    ]
    assert len(captured.out.splitlines()) == 3
    removed = Path("checkpoints/run_c")
    monkeypatch.setattr(runs, "find_runs", lambda paths: [path.with_name("run_b"), removed])
    assert runs.main(["list"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.startswith("checkpoints/run_c is not a run directory")


def test_list_as_json_holds_all_that_is_known_and_no_infinity(capsys: Captured) -> None:
    (path,) = make("run_a", state="failed")
    copy = json.loads((path / "environment.json").read_text())["config"]
    copy["values"]["training"]["learning_rate"] = float("inf")
    change_environment(path, config=copy)
    (run,) = json.loads(output(capsys, "list", "--json"), parse_constant=pytest.fail)
    assert (run["name"], run["state"], run["path"]) == ("run_a", "crashed", "checkpoints/run_a")
    assert run["reason"] == "NonFiniteError: the loss is NaN"
    assert (run["step"], run["planned_steps"], run["best_step"]) == (200, 200, 200)
    assert (run["best_loss"], run["last_loss"], run["problems"]) == (3.0, 3.0, [])
    assert run["config"]["training.learning_rate"] is None
    assert run["config"]["training.weight_decay"] == 0.1


def test_names_cannot_control_the_terminal(capsys: Captured) -> None:
    make("run_\x1b]0;title\x07a", "run_\udcffb", options=("n_layer=2",))
    for words in (["list"], ["diff", "checkpoints"], ["list", "no\x1b[31m"]):
        assert runs.main(words) in (0, 3)
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert "\\x1B" in printed
        assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ("best_loss best -n_layer -num_layers -name", "cba"),
        ("-best_loss model.n_layer", "abc"),
        ("eval/train_loss", "cba"),
        ("seed", "abc"),  # equal: by name
    ],
)
def test_list_sorts_by_columns_options_and_metrics(capsys: Captured, keys: str, order: str) -> None:
    make("a", "b", "c")
    for key in keys.split():
        assert "".join(listed(capsys, "--sort", key)) == order
        assert "".join(listed(capsys, f"--sort={key}")) == order


def test_runs_without_a_value_come_last(capsys: Captured) -> None:
    make("a", losses=())
    make("b", "c", losses=(3.0,))
    assert listed(capsys, "--sort", "best_loss") == listed(capsys, "--sort", "-best_loss")
    assert listed(capsys, "--sort", "-best_loss") == ["b", "c", "a"]


FILTERS = {
    "n_layer>=3": "bc",
    "n_layer<3": "a",
    " n_layer <= 3": "ab",
    "model.n_layer==3": "b",
    "num_layers=3": "b",
    "n_layer!=3": "ac",
    "lr>=1e-3": "abc",
    "training.learning_rate>1e-3": "",
    "use_4bit=true": "abc",
    "use_4bit=no": "",
    "use_4bit!=no": "abc",
    "use_4bit=1": "",
    "training.epochs=null": "abc",
    "epochs!=null": "",
    "epochs>1": "",
    "state=done": "abc",
    "state!=done": "",
    "parameters>10M": "abc",
    "params<1 B": "abc",
    "best_loss<2.85": "c",
    "eval/val_loss<2.95": "bc",
    "name=b": "b",
    "tokenizer.name=bytes": "abc",
    "precision=bf16, nf4 weights": "abc",
}


def test_list_filters_by_columns_options_and_metrics(capsys: Captured) -> None:
    make("a", "b", "c")
    for condition, order in FILTERS.items():
        assert runs.main(["list", "--json", "--filter", condition]) == 0
        found = json.loads(capsys.readouterr().out)
        assert "".join(run["name"] for run in found) == order, condition
    assert listed(capsys, "--filter", "n_layer>2", "--filter", "n_layer<4") == ["b"]
    message = refused(capsys, "list", "--filter", "n_layer>9", code=0)
    assert message == "No run meets the conditions."


def test_filters_know_runs_of_other_versions_and_runs_without_a_config(capsys: Captured) -> None:
    later, broken = make("a", "b", old=True)
    with (later / "config.yaml").open("a") as file:
        file.write("later:\n  warp: 9\n")
    (broken / "config.yaml").unlink()
    for condition, found in (("later.warp=9", "a "), ("n_layer!=7", "a "), ("n_layer=3", "")):
        assert runs.main(["list", "--filter", condition]) == 0
        assert "".join(line[:2] for line in capsys.readouterr().out.splitlines()[1:]) == found


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--filter n_layer", "--filter 'n_layer': expected KEY, one of = != < <= > >=, and"),
        ("--filter n_layer>many", "--filter 'n_layer>many': > takes a number, got 'many'."),
        ("--filter state=crash", "state: expected one of done, stopped, crashed, running, got"),
        ("--filter state=crash", "Did you mean crashed?"),
        ("--filter model.name=gtp", "model.name: expected one of bdh, gpt, llama, got 'gtp'."),
        ("--filter lerning_rate>1", "Did you mean training.learning_rate or train/learning"),
        ("--filter training.bet=1", "training.bet: unknown option. Did you mean optimizer.be"),
        ("--sort bestloss", "bestloss: no column, option or metric. Did you mean best_loss or"),
        ("--sort eval/val_los", "Did you mean eval/val_loss"),
        ("--sort -qqq", "qqq: no column, option or metric. Columns: name, state, model,"),
        ("--sort model.flash", "model.flash: is not one option of a run."),
        ("--sort betas", "Write optimizer.beta1 or optimizer.beta2."),
        ("--sort", "argument --sort: expected one argument"),
        ("--colour", "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_command_line_exits_with_2(capsys: Captured, words: str, message: str) -> None:
    make("a")
    assert message in refused(capsys, "list", *words.split())


def test_without_a_command_there_is_help_and_an_unknown_one_exits_with_2(capsys: Captured) -> None:
    assert "invalid choice: 'lst'" in refused(capsys, "lst")
    with pytest.raises(SystemExit) as left:
        runs.main([])
    assert left.value.code == 0
    help_text = capsys.readouterr().out
    assert "python runs.py diff" in help_text
    assert all(f"    {command} " in help_text for command in ("list", "diff", "plot", "report"))


@pytest.mark.parametrize(
    ("made", "word", "message"),
    [
        ("", "run_x", "run_x: no such run, checkpoint or folder; {here}/checkpoints holds no runs"),
        ("run_a run_b", "run_x", "folder; checkpoints holds run_a, run_b."),
        ("run_1 run_2", "run_", "run_: could be run_1, run_2. Write more of its name."),
        ("a b c d e f g h", "x", "checkpoints holds c, d, e, f, g, h and 2 more."),
    ],
)
def test_a_run_that_does_not_exist_exits_with_3(
    capsys: Captured, here: Path, made: str, word: str, message: str
) -> None:
    make(*made.split())
    for command in ("list", "diff", "plot", "report"):
        assert message.format(here=here) in refused(capsys, command, word, code=3)


def test_a_folder_without_runs_exits_with_3(capsys: Captured) -> None:
    Path("empty").mkdir()
    assert refused(capsys, "list", "empty", code=3) == "empty: holds no runs."
    assert refused(capsys, "report", "empty", code=3) == "empty: holds no runs."
    assert refused(capsys, "list", code=3) == "checkpoints: no such run."
    Path("checkpoints").mkdir()
    assert refused(capsys, "list", code=3) == "checkpoints: holds no runs."


def test_a_run_is_named_by_its_path_a_file_of_it_or_a_part_of_its_name(capsys: Captured) -> None:
    make("run_20251108_143022", "run_20251108_143022_01", "run_20251108_150101")
    path = "checkpoints/run_20251108_150101"
    for word in (path, f"{path}/", f"{path}/checkpoint_200.pt", "150101", "run_20251108_15"):
        assert listed(capsys, word) == ["run_20251108_150101"]
    assert listed(capsys, "run_20251108_143022") == ["run_20251108_143022"]  # the whole name


# ---- diff


def blocks(text: str) -> dict[str, list[list[str]]]:
    """Returns the tables of `diff` by the first word of their titles."""
    found: dict[str, list[list[str]]] = {}
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        found[lines[0].split()[0]] = [line.split() for line in lines[1:]]
    return found


def test_diff_prints_what_differs_and_the_results(capsys: Captured) -> None:
    make("a", options=("learning_rate=3e-4",))
    data = {"fingerprint": "beef", "lines": ["Data: 4 files"]}
    environment = {"torch": "3.0", "data": data}
    words = ("n_layer=2", "wandb_project=x")
    make("c", options=words, losses=(4.0, 2.5), state="stopped", environment=environment)
    text = output(capsys, "diff", "a", "c")
    found = blocks(text)
    assert found["Settings"][:2] == [
        ["model.n_layer", "6", "2"],
        ["training.learning_rate", "3e-4", "1e-3"],
    ]
    assert " ".join(found["Settings"][2]).endswith("other options are equal)")
    assert "(without effect on the result, they differ in logging.wandb_project)" in text
    results = {row[0]: row[1:] for row in found["Results"]}
    assert results["state"] == ["done", "stopped"]
    assert results["step"] == ["200", "200"]
    assert results["best_loss"] == ["3.0000", "2.5000"]
    assert results["reason"] == ["-", "SIGINT"]
    assert found["Machine"] == [["torch", "2.6.0", "3.0"]]
    assert found["Data"] == [["fingerprint", "f00d", "beef"]]
    assert ": Data: 3 files, 240 documents\n" in text and ": Data: 4 files\n" in text


def test_diff_of_equal_configs_has_no_table_of_settings(capsys: Captured) -> None:
    make("run_20251108_143022", "run_20251108_150101", options=())
    lines = output(capsys, "diff", "checkpoints").splitlines()
    assert lines[0] == "Runs run_20251108_...: 143022, 150101"
    assert lines[1].endswith(" other options are equal)")
    assert lines[3].split() == ["Results", "143022", "150101"]
    assert not {"Machine", "Data"} & blocks("\n".join(lines)).keys()


def test_diff_prints_which_run_is_better(capsys: Captured) -> None:
    make("a", "b")
    make("c", options=("n_layer=4",), rows="beef")
    make("d", options=("n_layer=5", "max_iters=200"), losses=(4.0, 3.1, 2.0))
    text = output(capsys, "diff", "a", "b", "c", "d")
    (line,) = [line for line in text.splitlines() if line.startswith("  n_layer 3 ")]
    words = line.split()[1:]
    assert words[1] == "-0.1000"
    assert float(words[2]) < -0.1 < float(words[4]) < 0
    assert line.endswith("better  (newest: 8 batches, step 200)")
    assert "it says nothing of other seeds" in text
    assert "  n_layer 4 is not compared: they were evaluated on different held-out text." in text
    assert "better  (newest: 8 batches, step 300 vs 200)" in text
    assert "worse   (same step: 8 batches, step 200)" in text


def test_many_runs_are_printed_in_parts_that_fit(capsys: Captured) -> None:
    make(*(f"{letter}un_20251108_143020" for letter in "abcdefgh"), options=())
    make("other", options=("n_layer=9",))
    text = output(capsys, "diff", "checkpoints")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\nmodel.n_layer") == 4


def test_diff_as_json_holds_the_same_and_long_values_whole(capsys: Captured) -> None:
    make("a", "b")
    long = "data/" + "x" * 60 + "/end"
    make("c", options=("n_layer=2", f"parquet_dir={long}"), rows="beef", environment={"torch": "3"})
    assert "xxx/end" in output(capsys, "diff", "a", "b", "c")
    found = json.loads(output(capsys, "diff", "a", "b", "c", "--json"))
    assert [run["name"] for run in found["runs"]] == ["a", "b", "c"]
    assert [row["model.n_layer"] for row in found["settings"]] == [2, 3, 2]
    assert found["settings"][2]["dataset.parquet_dir"] == long
    assert found["environment"] == [{"torch": version} for version in ("2.6.0", "2.6.0", "3")]
    assert found["data"] == [{}, {}, {}]
    better, reason = found["against_first"]
    assert (better["verdict"], better["batches"]) == ("better", 8)
    assert "different held-out text" in reason["not_compared"]


def test_diff_of_one_run_exits_with_2(capsys: Captured) -> None:
    make("a")
    for words in (["a"], ["a", "a"], ["a", "checkpoints/a"]):
        message = refused(capsys, "diff", *words)
        assert message == "diff compares two runs or more, got a."


# ---- as a process


@pytest.mark.slow
def test_the_script_writes_nothing_into_a_run_and_prints_names_as_the_terminal_can() -> None:
    (path,) = make("münchen")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, os.fspath(ROOT / "runs.py"), "list"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "m?nchen" in done.stdout
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before


@pytest.mark.slow
def test_the_script_ends_quietly_when_its_reader_leaves() -> None:
    make(*(f"run_{number:04}" for number in range(40)))
    command = f"'{sys.executable}' '{ROOT / 'runs.py'}' list --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")
