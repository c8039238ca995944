"""Python presets of nanoGPT are read as literals and arithmetic, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, ConfigError
from settings.foreign.preset_file import MAX_PRESET_BYTES, read_preset
from tests.settings.conftest import Ask, Complain, check

LITERALS = [
    ("max_iters = 5 * 8", "max_iters=40"),
    ("max_iters = 480 / 40", "max_iters=12"),
    ("max_iters = 2**10 - 1 + 7 // 2 % 2", "max_iters=1024"),
    ("max_iters = 6e5", "max_iters=600000"),
    ("max_iters = 0x10", "max_iters=16"),
    ("batch_size = 4\nmax_iters = batch_size * 10", "max_iters=40 batch_size=4"),
    ("learning_rate: float = 1e-3", "learning_rate=1e-3"),
    ("learning_rate = 1", "learning_rate=1.0"),
    ("'''text'''\nseed = +3  # comment", "training.seed=3"),
    ("seed = - -3", "training.seed=3"),
    ("\ufeffseed = 3", "training.seed=3"),
    ("betas = (0.8, 1 - 0.25)", "beta1=0.8 beta2=0.75"),
    ("betas = [0.8, 0.75]", "beta1=0.8 beta2=0.75"),
    ("dataset = 'a' 'b'", "dataset.name=ab"),
    ("out_dir = 'out-' + 'x'", "checkpoint_dir=out-x"),
    ("wandb_run_name = None", "wandb_run_name=null"),
    ("compile = False; seed = 3", "compile=false training.seed=3"),
    ("dtype = 'float16'", "compute_dtype=float16"),
    ("flash = True", "attention=flash"),
    ("import time\nwandb_run_name = 'a' + str(time.time())", "wandb_run_name=null"),
    ("# -*- coding: latin-1 -*-\nout_dir = 'é'", 'checkpoint_dir="é"'),
]


def test_a_preset_holds_literals_and_arithmetic(ask: Ask) -> None:
    for text, values in LITERALS:
        check(ask("a.py", {"a.py": text}).config, values)


def test_a_run_named_after_the_time_gets_the_name_of_its_folder(ask: Ask) -> None:
    note = "a.py:2: wandb_run_name holds the time; the run's folder gives the name"
    assert note in ask("a.py", {"a.py": LITERALS[-2][0]}).notes


READ_NOT_RUN = "presets are read, not run: only NAME = a literal or arithmetic on earlier names."
NOT_LITERALS = [
    *("import os", "x()", "out_dir = f'out'", "out_dir = str(time.time())", "seed = n_layer"),
    *("out_dir = open('pwned', 'w')", "seed = int('3')", "seed += 1", "seed, n_layer = 3, 4"),
    *("seed = 3 if True else 4", "seed = 3 | 4", "out_dir = b'x'", "betas = {0.9, 0.95}"),
    "betas = ((1, 2), 3)",
]
REFUSED = [  # text, line, statement, reason
    *((text, 1, f"'{text}'", READ_NOT_RUN) for text in NOT_LITERALS),
    ("seed = 1\nif seed:\n    seed = 2", 2, "'if seed:'", READ_NOT_RUN),
    ("betas = (1, 2)\nbeta1 = (betas, 3)", 2, "'beta1 = (betas, 3)'", "a list inside a list."),
    ("seed = 'a' * 3", 1, "'seed = 'a' * 3'", "arithmetic on 'a'."),
    ("seed = True + 1", 1, "'seed = True + 1'", "arithmetic on true."),
    ("seed = 1 / 0", 1, "'seed = 1 / 0'", "division by zero."),
    ("seed = 9 ** 9 ** 9", 1, "'seed = 9 ** 9 ** 9'", "larger than 2**63 - 1."),
    ("dropout = (-1) ** 0.5", 1, "'dropout = (-1) ** 0.5'", "is not a real number."),
    ("dropout = 1e999 - 1e999", 1, "'dropout = 1e999 - 1e999'", "is not a real number."),
    ("seed = " + "-" * 60 + "1", 1, f"'seed = {'-' * 53}...'", "nested more than 50 levels deep."),
    (
        *("dataset = '" + "x" * 600 + "'\nout_dir = dataset + dataset", 2),
        *("'out_dir = dataset + dataset'", "a text of more than 1000 characters."),
    ),
]


def test_anything_else_in_a_preset_is_an_error_with_its_place(complaint: Complain) -> None:
    for text, line, statement, reason in REFUSED:
        found = complaint("a.py", {"a.py": text}).splitlines()
        assert f"a.py:{line}: {statement}: {reason}" in found
    assert not Path("pwned").exists()


MISTAKES = [
    ("n_layerz = 6", "a.py:1: n_layerz: unknown option. Did you mean model.n_layer?"),
    ("seed = 1\nseed = 2", "a.py:2: training.seed: given twice (first at line 1). Keep one."),
    (
        "compile = 'False'",
        "a.py:1: system.compile: expected true, false, auto or graphs, got the text",
    ),
    ("seed = 1.5", "a.py:1: training.seed: expected a whole number, got 1.5. The default is"),
    ("dropout = None", "a.py:1: model.dropout: expected a number, got null. The default is 0.1."),
    ("dropout = (1, 2)", "a.py:1: model.dropout: expected a number, got a list of 2."),
    ("betas = 0.9", "betas: expected a list of 2 numbers (optimizer.beta1, optimizer.beta2), "),
    ("dataset = 3", "a.py:1: dataset.name (given as dataset): expected text, got 3."),
    ("training = 'gpt'", "a.py:1: training: expected a section ('option: value' lines below it)"),
    ("seed = ", "a.py:1:8: not valid Python: invalid syntax: 'seed ='."),
    ("seed = \0", "a.py: not valid Python: source code string cannot contain null bytes."),
    ("#" * (MAX_PRESET_BYTES + 1), "a.py: refused: larger than 50 KB."),
    ("seed = " + "-" * 40_000 + "1", "nested more than 50 levels deep."),
    ("seed = " + "(" * 300 + ")" * 300, "not valid Python: too many nested paren"),
    ("seed = 1" + "+1" * 20_000, "nested more than 50 levels deep."),
    ("seed = " + "9" * 5000, "a.py:1"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=lambda value: value[:30])
def test_mistakes_in_a_preset_are_named_with_their_place(
    complaint: Complain, text: str, message: str
) -> None:
    found = complaint("a.py", {"a.py": text})
    assert message in found and len(found.splitlines()) == 1 and len(found) < 350


def test_all_problems_of_a_preset_are_told_in_order(complaint: Complain) -> None:
    text = "import os\nseed = 'x'\nn_layrs = 3\nx()"
    places = [line.split(": ")[0] for line in complaint("a.py lr=off", {"a.py": text}).splitlines()]
    assert places == [*(f"a.py:{n}" for n in range(1, 5)), "command line"]


PIECES = [*"=1()[]-+,\n: \\#\t", "seed", "'a'", "**", "wandb_run_name", "f'{1}'", "None"]
PIECES += ["import time", "str(time.time())"]


@pytest.mark.slow
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_preset_is_read_or_refused_in_words(tmp_path_factory: Any, pieces: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes("".join(pieces).encode("utf-8", "surrogatepass"))
    _, problems, _ = read_preset(str(path), 1)
    assert all(str(problem) for problem in problems)
    try:
        Config.from_yaml(path)
    except ConfigError as error:
        assert str(error)
