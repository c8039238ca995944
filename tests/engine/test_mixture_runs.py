"""A run on several sources of text: what it tells of each of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config import Config, source_datasets
from data import open_dataset
from data.run_data import RunData
from data.sources.tokens.meta import write_meta
from data.tokenizers.simple import ByteTokenizer
from engine.evaluation import Evaluation, Evaluator
from engine.precision.precision import Precision
from model import LanguageModel, build_model
from tests.conftest import TINY, write_corpus
from tests.data.token_files import put
from tests.engine.planned_runs import CPU
from tests.runs import metrics, only_run, run_here


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Returns the config file of a tiny run on much text and on little."""
    write_corpus(tmp_path / "web")
    write_corpus(tmp_path / "books", documents=60, seed=1)
    config = tmp_path / "mixed.yaml"
    config.write_text(
        f"{TINY}dataset:\n  test_fraction: 0.2\n  mixture:\n"
        f"    - {{name: web, parquet_dir: {tmp_path / 'web'}, weight: 0.7}}\n"
        f"    - {{name: books, parquet_dir: {tmp_path / 'books'}, weight: 0.3}}\n"
    )
    return config


def evaluated(config: Config, model: LanguageModel) -> Evaluation:
    data = RunData(open_dataset(config.dataset, config.tokenizer), config)
    precision = Precision(config.low_precision, CPU.device)
    found = Evaluator(model, data, precision, CPU, micro_batch=4).evaluate(lambda: False)
    assert found is not None
    return found


def test_the_loss_on_a_source_is_that_of_a_run_that_reads_it_alone(mixed: Path) -> None:
    config = Config.from_yaml(mixed, ["eval_iters=5"])
    model = build_model(config)
    found = evaluated(config, model)
    few = replace(config, training=replace(config.training, eval_iters=3))
    losses = []
    for name, dataset in source_datasets(config.dataset).items():
        alone = evaluated(replace(few, dataset=dataset), model)
        assert not alone.sources
        assert found.sources[name].val_loss == pytest.approx(alone.val_loss, rel=1e-6)
        assert found.sources[name].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
        losses += alone.val_losses
    assert found.val_losses == pytest.approx(losses, rel=1e-6)
    other = Config.from_yaml(mixed, ["eval_iters=5", "mixture.web.weight=0"])
    assert evaluated(other, model).val_losses == found.val_losses


@pytest.mark.slow
def test_a_dry_run_takes_the_vocabulary_of_the_texts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = put(tmp_path / "train.bin", np.arange(900) % 256)
    write_meta(tmp_path / "meta.json", ByteTokenizer(), np.dtype(np.uint16), {"train": 900})
    config = tmp_path / "mixed.yaml"
    config.write_text(
        f"{TINY}dataset:\n  test_fraction: 0.2\n  mixture:\n"
        "    - {name: code, parquet_dir: data/python-stdlib, weight: 1}\n"
        f"    - {{name: books, train_data_path: {train}, weight: 1}}\n"
    )
    assert run_here([str(config), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "Data: data/python-stdlib is missing; the run will build it" in output


@pytest.mark.slow
def test_a_run_reports_each_source_and_its_weights_may_change_at_a_resume(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(mixed), f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here(arguments) == 0
    output, run = capsys.readouterr().out, only_run(tmp_path / "runs")
    assert "Source web: 70.0% of the tokens; in the whole run 2.69 k tokens" in output
    (last,) = [line for line in metrics(run) if "eval/val_loss" in line][-1:]
    assert f"  books: Val loss: {last['eval/val_loss/books']:.4f} | Bits/byte: " in output
    assert f" | Val loss: {last['eval/val_loss']:.4f} (mean of 2 sources) | " in output
    assert last["eval/bits_per_byte/books"] > 0
    resume = [*arguments, f"resume_from_checkpoint={run}", "max_iters=40", "test_freq=null"]
    assert run_here([*resume, "mixture.web.weight=0.3"]) == 0
    output = capsys.readouterr().out
    assert "dataset.mixture.web.weight: 0.7 -> 0.3" in output
    assert "Source web: 50.0% of the tokens from here on; in the whole run 3.3" in output
    saved = Config.from_yaml(run / "config.yaml").dataset.mixture
    assert [source.weight for source in saved] == [0.3, 0.3]
