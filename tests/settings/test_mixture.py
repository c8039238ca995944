"""dataset.mixture: how a list of sources is read, changed and written, and what each source is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config import Config, DatasetConfig, SourceConfig, source_datasets
from tests.settings.conftest import Ask, Complain

MIXED = """\
dataset:
  test_fraction: 0.1
  mixture:
    - {name: web, parquet_dir: "s3://b/a web", weight: 7e-1}
    - name: my-books.2
      train_data_path: books.bin
      weight: 3
      test_fraction: 0.2
"""


def test_a_mixture_is_written_one_source_to_a_line_and_reads_back_equal(
    ask: Ask, tmp_path: Path
) -> None:
    config = ask("my.yaml", {"my.yaml": MIXED}).config
    text = config.to_yaml()
    assert '    - {name: web, weight: 0.7, parquet_dir: "s3://b/a web"}\n' in text
    (tmp_path / "saved.yaml").write_text(text)
    assert Config.from_yaml(tmp_path / "saved.yaml") == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_source_is_a_dataset_with_what_it_leaves_out_from_the_section(ask: Ask) -> None:
    config = ask("my.yaml text_column=body", {"my.yaml": MIXED}).config
    web, books = source_datasets(config.dataset).values()
    assert web == DatasetConfig(parquet_dir="s3://b/a web", text_column="body", test_fraction=0.1)
    assert books == DatasetConfig(
        train_data_path="books.bin", text_column="body", test_fraction=0.2
    )
    assert source_datasets(DatasetConfig()) == {"": DatasetConfig()}


@pytest.mark.parametrize("word", ["mixture.web.weight", "--dataset.mixture.web.weight"])
def test_an_override_changes_one_option_of_one_source(ask: Ask, word: str) -> None:
    request = ask(f"my.yaml {word}=0.5 mixture.my-books.2.weight=1", {"my.yaml": MIXED})
    web, books = request.config.dataset.mixture
    assert web == SourceConfig(name="web", weight=0.5, parquet_dir="s3://b/a web")
    assert (books.weight, books.test_fraction) == (1.0, 0.2)


WRONG = [  # the list, the message
    ("3", "1: dataset.mixture: expected a list of entries with the keys name, weight, parquet_dir"),
    ("[a]", "1: dataset.mixture: entry 1: expected key: value pairs, got 'a'."),
    ("[{}]", "1: dataset.mixture: entry 1: weight is missing (share of the tokens, relative)."),
    ("\n  - wight: 1\n", "2: dataset.mixture: entry 1: wight: unknown key. Did you mean weight?"),
    ("\n  - weight: 1\n    xyz: 2", "3: dataset.mixture: entry 1: xyz: unknown key. Keys: name, w"),
    ("\n  - name: a\n    weight: -1", "3: dataset.mixture: entry 1: weight: must be >= 0, got -1"),
    (
        "\n  - name: a\n    weight: 30%",
        "3: dataset.mixture: entry 1: weight: expected a number, got '30%'.",
    ),
    (
        "\n  - {name: a, weight: 1}\n  - name: a\n",
        "3: dataset.mixture: two entries have the name a",
    ),
    ("\n  - name: a/b\n", "2: dataset.mixture: entry 1: name: expected a word of letters, digits"),
    ("\n  - name: a\n    name: b\n", "3: dataset.mixture: entry 1: name: given twice (first at li"),
    (
        "\n  - name: a\n    token_dtype: u8",
        "3: dataset.mixture: entry 1: token_dtype: expected",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_mistake_in_a_source_is_named_with_its_line(
    complaint: Complain, text: str, message: str
) -> None:
    assert f"my.yaml:{message}" in complaint("my.yaml", {"my.yaml": f"dataset.mixture: {text}"})


def test_an_override_of_an_unknown_source_names_those_there_are(complaint: Complain) -> None:
    found = complaint("my.yaml mixture.wob.weight=1", {"my.yaml": MIXED})
    assert found == (
        "command line: mixture.wob.weight: no entries are named 'wob'. Entries: web, my-books.2."
    )
    for word in ("mixture.web=1", "dataset.mixture.web=1"):
        assert "give a key of it: mixture.web.weight=..." in complaint(
            f"my.yaml {word}", {"my.yaml": MIXED}
        )
    found = complaint("my.yaml mixture.web.wait=1", {"my.yaml": MIXED})
    assert found == "command line: mixture.web.wait: unknown key. Did you mean weight?"


def test_each_source_of_an_evaluated_run_holds_text_out(complaint: Complain) -> None:
    found = complaint("my.yaml mixture.web.test_fraction=0", {"my.yaml": MIXED})
    assert "held-out text, but of dataset.mixture web holds none out (test_fraction: 0)" in found


def test_a_text_of_a_later_layer_takes_the_place_of_a_mixture(ask: Ask) -> None:
    files = {"my.yaml": MIXED, "base.yaml": "dataset: {parquet_dir: x}\ntraining: {epochs: 2}"}
    request = ask("my.yaml parquet_dir=x", files)
    assert request.config.dataset.mixture == ()
    note = "dataset.mixture=[web, my-books.2] of my.yaml yields to dataset.parquet_dir=x: []"
    assert note in request.notes
    both = ask("base.yaml my.yaml", files).config
    assert len(both.dataset.mixture) == 2 and both.training.epochs is None
    assert both.dataset.parquet_dir == DatasetConfig().parquet_dir
