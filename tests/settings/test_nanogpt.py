"""nanoGPT's names in flat files, presets and flags, and the defaults that they stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import accumulation_steps, command_line
from settings.foreign.preset_file import PRESETS
from tests.settings.conftest import ROOT, Ask, Complain, check, differences

NANOGPT, TOKEN_FILES = (
    str(ROOT / "configs" / f"{n}.yaml") for n in ("nanogpt", "cs336-tinystories")
)

# Every name of its configurator, at the default of its train.py.
NAMES = """
    out_dir='out' log_interval=1 eval_interval=2000 eval_iters=200 eval_only=False
    always_save_checkpoint=True init_from='scratch' wandb_log=False wandb_project='austen-gpt'
    wandb_run_name='gpt2-austen-12layer' dataset='austen' batch_size=12 block_size=1024
    gradient_accumulation_steps=40 n_layer=12 n_head=12 n_embd=768 dropout=0.0 bias=False
    learning_rate=6e-4 max_iters=600000 weight_decay=1e-1 beta1=0.9 beta2=0.95 grad_clip=1.0
    decay_lr=True warmup_iters=2000 lr_decay_iters=600000 min_lr=6e-5 backend='nccl' device='cuda'
    dtype='bfloat16' compile=True
"""
VALUES = """
    checkpoint_dir=out log_freq=1 test_freq=2000 eval_iters=200 eval_only=false init_from=scratch
    always_save_checkpoint=true wandb_log=false wandb_project=austen-gpt checkpoint_freq=2000
    wandb_run_name=gpt2-austen-12layer dataset.name=austen batch_size=12 block_size=1024
    tokens_per_step=491520 gradient_accumulation_steps=1 model.name=gpt n_layer=12 n_head=12
    n_embd=768 dropout=0.0 bias=false learning_rate=6e-4 max_iters=600000 weight_decay=0.1 beta1=0.9
    beta2=0.95 grad_clip=1.0 decay_lr=true schedule.name=cosine warmup_iters=2000
    lr_decay_iters=600000 min_lr=6e-5 distributed.backend=nccl device=cuda compute_dtype=bfloat16
    compile=true tokenizer.name=auto vocab_size=null optimizer.name=adamw
"""
LINES = "\n".join(NAMES.split())


def test_its_names_mean_the_same_in_a_flat_file_a_preset_and_flags_and_are_the_base(
    ask: Ask,
) -> None:
    config = ask("flat.yaml").config
    check(config, VALUES)
    assert ask("all.py").config == config
    assert ask(" ".join(f"--{word}" for word in NAMES.split())).config == config
    # The base finds the device and the backend.
    base = ask("dataset=austen").config
    assert differences(config, base) == {"system.device", "distributed.backend"}


# --- the base ---------------------------------------------------------------------------------

REFERENCE = (ROOT / "config.yaml").read_text(encoding="utf-8")
FILES = {
    "flat.yaml": LINES.replace("=", ": "),
    "all.py": LINES,
    "layers.py": "n_layer = 6",
    "layers.yaml": "n_layer: 6",
    "small.py": "batch_size = 4\nblock_size = 8\nmax_iters = 5000\n",
    "batch.py": "batch_size = 8",
    "forty.py": "gradient_accumulation_steps = 5 * 8",
    "tokens.py": "tokens_per_step = 24576",
    "seed.py": "seed = 3",
    "seed.yaml": "seed: 3",
    "cpu.yaml": "system: {device: cpu}",
    "bias.yaml": "bias: true",
    "dataset.yaml": "dataset: x",
    "three.yaml": "gradient_accumulation_steps: 3",
    "dataset-three.yaml": "dataset: x\ngradient_accumulation_steps: 3",
    "sections.yaml": "model: {name: gpt, bias: true}",
    "sections-dataset.yaml": "model: {name: gpt}\ndataset: {name: x}",
    "section-and-name.yaml": "model:\ndataset: x",
    "each-process.yaml": "training: {gradient_accumulation_steps: 4}",
}
STANDS = f"stands on nanoGPT's own defaults, {NANOGPT}"
STARTS = f"without a file starts from {NANOGPT}; to start from another file: --config FILE"
ON_NANOGPT = [  # config.yaml, command line, first note
    ("", "layers.py", f"layers.py {STANDS}"),
    ("", "--config layers.py", f"layers.py {STANDS}"),
    ("", "cpu.yaml layers.py", f"layers.py {STANDS}"),
    ("", "dataset.yaml", f"dataset.yaml {STANDS}"),
    ("", "bias.yaml", f"bias.yaml {STANDS}"),
    ("", "seed.yaml bias.yaml", f"bias.yaml {STANDS}"),
    ("dataset: x", "", f"config.yaml {STANDS}"),
    ("", "dataset=openwebtext", f"dataset=openwebtext {STARTS}"),
    (REFERENCE, "--dataset openwebtext", f"dataset=openwebtext {STARTS}"),
    ("training: {seed: 1337}", "dataset=x", f"dataset=x {STARTS}"),  # the default
]
NOT_ON_NANOGPT = [
    *("", "layers.yaml", "sections.yaml", "sections-dataset.yaml", "section-and-name.yaml"),
    *("cpu.yaml dataset.yaml", "seed.yaml dataset=openwebtext"),
    *("dataset.name=openwebtext", "dataset=null", "--train_data_path a.ids"),
    "--train_data_path a.bin --val_data_path b.bin",
    "dataset.train_data_path=a.ids dataset.val_data_path=b.ids",
]


@pytest.fixture(autouse=True)
def files(ask: Ask) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("config", "line", "note"), ON_NANOGPT)
def test_its_names_stand_on_its_defaults(ask: Ask, config: str, line: str, note: str) -> None:
    request = ask(line, {"config.yaml": config})
    assert request.files[0] == NANOGPT
    assert [told for told in request.notes if NANOGPT in told] == [note] == [request.notes[0]]
    check(request.config, "model.name=gpt n_embd=768")


def test_other_files_and_names_stand_on_our_defaults(ask: Ask) -> None:
    changed = ask("dataset=openwebtext", {"config.yaml": "training: {seed: 3}"})
    for request in (changed, *(ask(line, {"config.yaml": ""}) for line in NOT_ON_NANOGPT)):
        assert not {NANOGPT, TOKEN_FILES} & set(request.files)
        check(request.config, "n_embd=256")


def test_the_base_may_be_named_or_copied_and_is_shown_as_the_user_would_write_it(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(f"--config {NANOGPT} max_iters=50 dataset=x")
    assert request.files == (NANOGPT,)
    assert request.config == ask("max_iters=50 dataset=x").config
    copied = ask("my.yaml", {"my.yaml": Path(NANOGPT).read_text()})
    assert copied.config == ask("dataset=openwebtext").config
    monkeypatch.chdir(ROOT)
    assert command_line(["dataset=x"]).files == ("configs/nanogpt.yaml",)


def test_a_saved_config_reads_back_equal_without_a_base(ask: Ask) -> None:
    saved = ask("a.py learning_rate=1e-5", {"a.py": "dataset = 'x'\nmax_iters = 50"}).config
    again = ask("saved.yaml", {"saved.yaml": saved.to_yaml()})
    assert (again.config, again.files, again.notes) == (saved, ("saved.yaml",), ())


def test_files_are_chained_in_order_and_the_command_line_is_last(ask: Ask) -> None:
    files = {"config/one.py": "batch_size = 8\nn_layer = 6\nseed = 1", "three.yaml": "seed: 3"}
    files["config/two.py"] = "n_layer = 7\nseed = 2"
    request = ask("config/one.py config/two.py three.yaml --seed=4", files)
    assert request.files == (NANOGPT, "config/one.py", "config/two.py", "three.yaml")
    check(request.config, "batch_size=8 n_layer=7 seed=4")


def test_a_base_that_is_missing_or_broken_is_an_error(
    complaint: Complain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("settings.foreign.nanogpt.DEFAULTS", str(tmp_path / "base.yaml"))
    assert complaint("dataset=x") == "base.yaml: not found. Pass --config FILE."
    broken = complaint("dataset=x", {"base.yaml": "n_layer: x"})
    assert broken.startswith("base.yaml:1: model.n_layer: expected a")


# --- what its names mean, and what the base yields to -------------------------------------------

MEANINGS = [  # command line, values
    ("flat.yaml dtype=float16 backend=gloo", "compute_dtype=float16 distributed.backend=gloo"),
    ("flat.yaml device=mps eval_only=True", "device=mps eval_only=true"),
    ("init_from=gpt2-large", "init_from=gpt2-large model.name=gpt"),
    ("layers.py", "keep_last=3"),
    ("layers.py keep_last=null", "keep_last=null"),
    # a shorter run, another rate
    ("layers.py max_iters=50", "warmup_iters=1 lr_decay_iters=null min_lr=6e-5"),
    ("layers.py max_iters=50 warmup_iters=7", "warmup_iters=7"),
    ("layers.py max_iters=100000", "warmup_iters=2000 lr_decay_iters=null"),
    ("layers.py max_iters=700000", "warmup_iters=2000 lr_decay_iters=600000"),
    ("layers.py max_iters=900000 warmup_iters=700000", "lr_decay_iters=null warmup_iters=700000"),
    ("layers.py lr_decay_iters=1000", "warmup_iters=30 lr_decay_iters=1000"),
    ("layers.py learning_rate=3e-5", "min_lr=null learning_rate=3e-5"),
    # a constant rate is constant from the start
    ("flat.yaml decay_lr=False max_iters=50", "warmup_iters=0 decay_lr=false"),
    ("decay_lr=False warmup_iters=9", "warmup_iters=9"),
    # another text
    ("layers.py train_data_path=a.bin", "dataset.name=null train_data_path=a.bin"),
    ("layers.py parquet_dir=a", "dataset.name=null parquet_dir=a tokenizer.name=bytes"),
    # it saves when it evaluates
    ("dataset=x", "test_freq=2000 checkpoint_freq=2000"),
    ("dataset=x eval_interval=5", "test_freq=5 checkpoint_freq=5"),
    ("dataset=x test_freq=null", "test_freq=null checkpoint_freq=null"),
    ("dataset=x checkpoint_freq=70", "test_freq=2000 checkpoint_freq=70"),
    ("eval_interval=5", "test_freq=5 checkpoint_freq=500"),
    # accumulation in its names counts over all processes; in sections it is each process's
    ("forty.py batch_size=16", "tokens_per_step=655360 gradient_accumulation_steps=1"),
    ("batch.py gradient_accumulation_steps=16", "tokens_per_step=131072"),
    ("small.py", "tokens_per_step=32 warmup_iters=150"),
    ("dataset.yaml", "tokens_per_step=491520 gradient_accumulation_steps=1"),
    ("dataset.yaml three.yaml", "tokens_per_step=36864 gradient_accumulation_steps=1"),
    ("dataset-three.yaml", "tokens_per_step=36864 gradient_accumulation_steps=1"),
    ("dataset=x gradient_accumulation_steps=2 block_size=64", "tokens_per_step=1536"),
    ("dataset=x tokens_per_step=null", "tokens_per_step=491520"),
    ("layers.py tokens_per_step=24576", "tokens_per_step=24576 gradient_accumulation_steps=1"),
    ("tokens.py gradient_accumulation_steps=4", "tokens_per_step=49152"),
    *(
        (line, "tokens_per_step=null gradient_accumulation_steps=4")
        for line in ("seed.yaml gradient_accumulation_steps=4", "each-process.yaml")
    ),
    ("each-process.yaml seed.py", "tokens_per_step=null gradient_accumulation_steps=4"),
]


@pytest.mark.parametrize(("line", "values"), MEANINGS)
def test_its_names_mean_what_they_mean_there_and_the_base_yields(
    ask: Ask, line: str, values: str
) -> None:
    check(ask(line).config, values)


NOTES = [  # command line, the last notes
    (
        "dataset=x max_iters=50 learning_rate=1e-5",
        f"schedule.lr_decay_iters=600000 of {NANOGPT} yields to training.max_iters=50: null",
        f"schedule.warmup_iters=2000 of {NANOGPT} yields to training.max_iters=50: 1",
        f"schedule.min_lr=6e-5 of {NANOGPT} yields to training.learning_rate=1e-5: null",
    ),
    (
        "dataset=x lr_decay_iters=1000",
        f"schedule.warmup_iters=2000 of {NANOGPT} yields to schedule.lr_decay_iters=1000: 30",
    ),
    (
        "dataset=x tokens_per_step=12288",
        "training.tokens_per_step takes the place of gradient_accumulation_steps=40",
    ),
    (
        "forty.py batch_size=16",
        "gradient_accumulation_steps=40 is over all processes, as in nanoGPT: "
        "training.tokens_per_step = 40 * 16 * 1024 = 655360",
    ),
    (
        "flat.yaml decay_lr=False max_iters=600000",
        "schedule.decay_lr=false means no warm-up either, as in nanoGPT",
    ),
]


def test_each_value_that_means_something_else_is_told(ask: Ask) -> None:
    for line, *notes in NOTES:
        assert list(ask(line).notes[-len(notes) :]) == notes


def test_the_tokens_of_a_step_are_shared_by_the_processes(ask: Ask) -> None:
    config = ask("dataset=x").config
    assert [accumulation_steps(config, world) for world in (1, 4, 8)] == [40, 10, 5]


REFUSED = [  # text of a.py, message
    ("max_iters = 50\nwarmup_iters = 60", "a.py:2: schedule.warmup_iters=60 is above training.ma"),
    ("learning_rate = 1e-4\nmin_lr = 1e-3", "a.py:2: schedule.min_lr=1e-3 is above training.lea"),
    ("warmup_iters = 600001", "a.py:1: schedule.warmup_iters=600001 is above training.max_iters=6"),
    ("n_embd = 100", "a.py:1: model.n_embd=100 is not divisible by model.n_head=12; nearest: 96, "),
    ("gradient_accumulation_steps = 4\ntokens_per_step = 49152", "exclude each other; set one"),
    ("gradient_accumulation_steps = 2**62", "gradient_accumulation_steps: must be in [1, 1000000]"),
]


def test_what_a_file_says_itself_keeps_our_rules(complaint: Complain) -> None:
    for text, message in REFUSED:
        assert message in complaint("a.py", {"a.py": text})
    assert complaint("flat.yaml n_head=7") == (
        "command line: model.n_embd=768 is not divisible by model.n_head=7; nearest: 763, 770 "
        "[model.n_embd: flat.yaml:17]"
    )


def test_a_shape_in_its_names_without_a_file_is_said_to_make_a_bdh(ask: Ask) -> None:
    shape = "n_layer=6 n_head=6 n_embd=384"
    note = (
        "n_layer, n_head, n_embd shape a BDH (model.name=bdh, the default); a GPT: model.name=gpt"
    )
    assert ask(shape).notes == (note,)
    for line in (f"{shape} model.name=gpt", f"layers.yaml {shape}", "n_layer=2", "init_from=gpt2"):
        assert note not in ask(line).notes


# --- its presets ----------------------------------------------------------------------------------

TRAIN_GPT2 = """\
# config for training GPT-2 (124M): 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
wandb_log = True; wandb_project = 'owt'
wandb_run_name='gpt2-124M'

batch_size = 12; block_size = 1024; gradient_accumulation_steps = 5 * 8
max_iters = 600000; lr_decay_iters = 600000
eval_interval = 1000; eval_iters = 200; log_interval = 10; weight_decay = 1e-1
"""
SHAKESPEARE_CHAR = """\
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200; log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = False; wandb_project = 'shakespeare-char'; wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64; block_size = 256 # context of up to 256 previous characters
n_layer = 6; n_head = 6; n_embd = 384; dropout = 0.2
learning_rate = 1e-3; max_iters = 5000; lr_decay_iters = 5000; min_lr = 1e-4
beta2 = 0.99 # make a bit bigger because number of tokens per iter is small
warmup_iters = 100 # not super necessary potentially
# device = 'cpu'  # run on cpu only
"""
FINETUNE_SHAKESPEARE = """\
import time

out_dir = 'out-shakespeare'
eval_interval = 5; eval_iters = 40
wandb_log = False; wandb_project = 'shakespeare'; wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False
batch_size = 1; gradient_accumulation_steps = 32; max_iters = 20
learning_rate = 3e-5; decay_lr = False
"""
EVAL = "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = '{}'\n"
THEIRS = {  # nanoGPT's preset -> its text
    "train_gpt2.py": TRAIN_GPT2,
    "train_shakespeare_char.py": SHAKESPEARE_CHAR,
    "finetune_shakespeare.py": FINETUNE_SHAKESPEARE,
    **{
        f"eval_{name.replace('-', '_')}.py": EVAL.format(name)
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
}
# What differs between nanoGPT's preset and ours besides the words for it.
FREE = {"system.compile"}  # ours: where it pays
APART = {
    "train_gpt2.py": {"tokenizer.vocab_multiple", "training.checkpoint_dir"},
    "train_shakespeare_char.py": {"training.tokens_per_step"},
    "finetune_shakespeare.py": {"logging.wandb_project", "schedule.lr_decay_iters"},
}
OF_THE_WEIGHTS = {f"model.{name}" for name in ("n_layer", "n_head", "n_embd", "bias", "activation")}
NOT_OF_AN_EVALUATION = {
    *("training.tokens_per_step", "training.max_iters", "training.learning_rate"),
    *("training.log_freq", "training.test_freq", "training.checkpoint_freq"),
    *("training.keep_last", "training.checkpoint_dir"),
    *("schedule.warmup_iters", "schedule.lr_decay_iters", "schedule.min_lr"),
    *("logging.wandb_project", "logging.wandb_run_name"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_its_presets_mean_what_ours_mean(ask: Ask, name: str) -> None:
    theirs = ask(f"config/{name}", {f"config/{name}": THEIRS[name]}).config
    ours = ask(str(ROOT / "configs" / PRESETS[name])).config
    free = APART.get(name, NOT_OF_AN_EVALUATION) | FREE
    free |= OF_THE_WEIGHTS if ours.training.init_from != "scratch" else set()
    assert differences(theirs, ours) <= free


COMMANDS = [  # of its README; the preset, overrides, values
    ("train_shakespeare_char.py", "--device=cpu --compile=False", "device=cpu compile=false"),
    (
        *("finetune_shakespeare.py", "--dataset=mine --max_iters=50"),
        "dataset.name=mine max_iters=50 warmup_iters=0 min_lr=null",
    ),
    ("eval_gpt2_xl.py", "", "init_from=gpt2-xl eval_only=true"),
]


@pytest.mark.parametrize(("name", "line", "values"), COMMANDS)
def test_its_commands_work_with_its_presets_and_ours(
    ask: Ask, name: str, line: str, values: str
) -> None:
    check(ask(f"config/{name} {line}", {f"config/{name}": THEIRS[name]}).config, values)
    check(ask(f"{ROOT}/configs/{PRESETS[name]} {line}").config, values)


def test_a_missing_preset_has_its_like_here(complaint: Complain) -> None:
    for theirs, ours in PRESETS.items():
        assert complaint(f"config/{theirs}") == (
            f"config/{theirs}: not found. Pass --config FILE. The same in this project: "
            f"configs/{ours}."
        )
        assert (ROOT / "configs" / ours).is_file()
    assert complaint("no.py") == "no.py: not found. Pass --config FILE."
