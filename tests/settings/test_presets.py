"""The files of configs/: each is read, its commands work, and its comments state its numbers."""

from __future__ import annotations

import re
from itertools import takewhile
from math import prod
from pathlib import Path

import pytest

from config import Config, warmup_steps
from tests.settings.conftest import ROOT, Ask, check

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def head(path: Path) -> str:
    """The comment lines at the top, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_is_read_and_says_what_it_is(
    path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert len(CONFIGS) == 14
    config = ask(str(path)).config
    trial = ask(f"{path} max_iters=50").config
    assert trial.training.max_iters == 50 and warmup_steps(trial) <= 1
    text = head(path)
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100
    commands = re.findall(r"^ {3}(?:python|torchrun.*?) train\.py (.*)$", text, re.M)
    assert any(f"configs/{path.name}" in line for line in commands)
    for line in commands:
        ask(line)
    if path.stem == "quickstart":
        return
    words = " ".join(text.split())
    assert "Hardware" in words and re.search(r"[Tt]ime", words) and "utcome" in words
    products = re.findall(r"((?:[\d,]+ x )+[\d,]+) = ([\d,]+) tokens", words)
    training = config.training
    step = training.tokens_per_step or training.batch_size * training.block_size
    for factors, product in products:
        sizes = [int(n.replace(",", "")) for n in factors.split(" x ")]
        assert sizes[:2] == [training.batch_size, training.block_size]
        assert int(product.replace(",", "")) == step == prod(sizes)
    assert products or training.eval_only


EVALUATION = "eval_iters=500 batch_size=8 block_size=1024 eval_only=true"
COMMENTS = [  # preset, what its comment says, the values that it means
    ("gpt2-124m", "600,000 steps are 300B tokens", "max_iters=600000 tokens_per_step=491520"),
    (
        *("finetune-shakespeare", "20 steps are about 2.2 epochs of 301,966 tokens"),
        "max_iters=20 tokens_per_step=32768",
    ),
    ("tmrc-default", "one epoch or 100,000 steps", "epochs=1 max_iters=100000"),
    ("tmrc-default", "every 3,600 seconds", "save_every=3600.0"),
    ("wsd-trunk", "after 500, 1,000 and 2,000 steps", "max_iters=2000 schedule.name=wsd"),
    *(
        (f"eval-gpt2{size}", "500 batches of 8 x 1,024 tokens", EVALUATION)
        for size in ("", "-medium", "-large", "-xl")
    ),
]
SHAPES = [  # preset of a pretrained model, layers, heads, width, parameters
    ("eval-gpt2", 12, 12, 768, "124M"),
    ("eval-gpt2-medium", 24, 16, 1024, "350M"),
    ("eval-gpt2-large", 36, 20, 1280, "774M"),
    ("eval-gpt2-xl", 48, 25, 1600, "1558M"),
    ("finetune-shakespeare", 48, 25, 1600, "1558M"),
]


def test_numbers_in_the_comments_of_presets_are_their_values(ask: Ask) -> None:
    for name, words, values in COMMENTS:
        path = ROOT / "configs" / f"{name}.yaml"
        assert words in " ".join(head(path).split())
        check(ask(str(path)).config, values)
    for name, n_layer, n_head, n_embd, size in SHAPES:
        path = ROOT / "configs" / f"{name}.yaml"
        shape = f"n_layer={n_layer} n_head={n_head} n_embd={n_embd}"
        check(ask(str(path)).config, f"{shape} bias=true activation=gelu_tanh")
        assert f"{size} parameters" in head(path)
        weights = 12 * n_layer * n_embd**2 + (50257 + 1024) * n_embd
        assert weights == pytest.approx(int(size[:-1]) * 1e6, rel=0.02)


def test_the_preset_of_bdh_is_the_defaults(ask: Ask) -> None:
    assert ask(str(ROOT / "configs/bdh-default.yaml")).config == Config()
