"""CS336's flags, TMRC's YAML and that of fivezeroes/bdh: the same run under native names, each
translation said."""

from __future__ import annotations

import pytest

from config import Config
from tests.settings.conftest import ROOT, Ask, Complain, check, differences, table

# --- CS336: flags -------------------------------------------------------------------------------

IDS = (
    "--train_data_path data/TinyStoriesV2-GPT4-train.ids "
    "--val_data_path data/TinyStoriesV2-GPT4-valid.ids "
)
CS336_DEFAULTS = """
    --vocab_size 10000 --context_length 256 --d_model 512 --num_heads 8 --d_ff 2048 --num_layers 6
    --rope_theta 10000.0 --lr 6e-4 --min_lr 6e-5 --weight_decay 0.1 --beta1 0.9 --beta2 0.95
    --eps 1e-8 --batch_size 64 --max_iters 100000 --warmup_iters 2000 --grad_clip 1.0
    --checkpoint_dir checkpoints --checkpoint_interval 5000 --eval_interval 500 --log_interval 100
    --eval_iters 100 --resume_from None --device auto --seed 42 --use_wandb False
    --wandb_project transformer-lm --wandb_run_name None
"""
CS336_OTHERS = """
    --vocab_size 5000 --context_length 128 --d_model 256 --num_heads 4 --d_ff 1024 --num_layers 3
    --rope_theta 5000 --lr 3e-4 --min_lr 3e-5 --weight_decay 0.2 --beta1 0.8 --beta2 0.85
    --eps 1e-9 --batch_size 32 --max_iters 50000 --warmup_iters 1000 --grad_clip 0.5
    --checkpoint_dir x --checkpoint_interval 2500 --eval_interval 250 --log_interval 50
    --eval_iters 60 --resume_from a/b_iter_5.pt --device cuda --seed 21 --use_wandb
    --wandb_project p --wandb_run_name r
"""
CS336_VALUES = """
    model.vocab_size=5000 training.block_size=128 n_embd=256 n_head=4 model.d_ff=1024 n_layer=3
    model.rope_theta=5000.0 training.learning_rate=3e-4 schedule.min_lr=3e-5 weight_decay=0.2
    beta1=0.8 beta2=0.85 optimizer.eps=1e-9 batch_size=32 max_iters=50000 warmup_iters=1000
    optimizer.grad_clip=0.5 checkpoint_dir=x checkpoint_freq=2500 test_freq=250 log_freq=50
    eval_iters=60 resume_from_checkpoint=a/b_iter_5.pt device=cuda training.seed=21 wandb_log=true
    wandb_project=p wandb_run_name=r model.name=llama dropout=0.0 tokenizer.name=auto
    train_data_path=data/TinyStoriesV2-GPT4-train.ids
    val_data_path=data/TinyStoriesV2-GPT4-valid.ids
"""
PRODUCTION = """
    --vocab_size 10000 --context_length 1024 --d_model 1024 --num_heads 16 --d_ff 4096
    --num_layers 24 --lr 2e-4 --min_lr 2e-5 --batch_size 16 --max_iters 200000
    --checkpoint_interval 2500 --eval_interval 250 --checkpoint_dir checkpoints/large_model
    --use_wandb --wandb_project cs336-final --wandb_run_name large-model-v1
"""


def test_two_ids_files_and_the_flags_of_cs336_give_its_llama(ask: Ask) -> None:
    base = ROOT / "configs/cs336-tinystories.yaml"
    request = ask(IDS)
    assert request.files == (str(base),)
    assert request.notes[0].startswith(f"train_data_path=*.ids without a file starts from {base};")
    assert request.config == ask(str(base)).config == ask(IDS + CS336_DEFAULTS).config
    check(ask(IDS + CS336_OTHERS).config, CS336_VALUES)
    assert ask(IDS + PRODUCTION).config == ask(str(ROOT / "configs/cs336-large.yaml")).config
    check(ask(f"{IDS} --max_iters 1000").config, "max_iters=1000 warmup_iters=30")


# --- TMRC: sections -----------------------------------------------------------------------------

TMRC = """\
datasets: {name: algebraic-stack, path: "/path/to/data", tokenizer_used: t5-base}
model:
  {name: gpt, n_head: 4, d_model: 512, n_layer: 8, dropout_p: 0.0, context_length: 512,
   autocast_precision: bfloat16, flash: False, flex: True, mlp_scale_factor: 4, mlp_bias: True,
   attn_bias: False, proj_bias: True, ln_bias: True, cls_head_bias: True, activation: relu,
   mask: causal_document}
optimizer:
  {name: AdamW, lr: 0.0001, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8, precision: float32}
tokenizer: {name: t5-base, vocab_size: 32128}
training:
  {epochs: 1, train_steps: 100000, batch_size: 256, log_interval: 20, shuffle: True,
   save_model: True, save_every: 3600, artifacts_path: /path/to/artifacts, use_oracle: False}
wandb_log: {name: tmrc_log}
HydraConf: {version_base: "1.1"}
"""
# Its default file has names that its documentation leaves out.
TMRC_FILE = "defaults:\n  - _self_\n\n" + TMRC.replace("n_layer: 8", "n_layer: 6").replace(
    "epochs: 1,", "epochs: 1, val_interval: 100,"
).replace("mask: causal_document", "mask: causal_document, compile_flex: True")
TMRC_SAYS = [
    "theirs.yaml is read as a config of TMRC",
    "optimizer.precision=float32 changes nothing in this version",
    "HydraConf is ignored: there is no Hydra here",
    "defaults is ignored: there is no Hydra here; name several files on the command line",
    "model.compile_flex is ignored: attention with FlexAttention is always compiled",
    "model.flash and model.flex are read as model.attention=flex",
    "wandb_log.name turns logging.wandb_log on",
    "datasets.name=algebraic-stack is a label beside datasets.path: ignored",
    "training.val_interval is read as training.test_freq",
    "model.tie_embeddings=false: its head has weights of its own",
    "schedule.decay_lr=false, schedule.warmup_iters=0: its learning rate is constant",
    "optimizer.grad_clip=0.0: it does not clip gradients",
    "training.checkpoint_freq=null: it saves by training.save_every alone",
]


def test_the_file_of_tmrc_is_the_run_of_our_preset(ask: Ask) -> None:
    ours = ask(str(ROOT / "configs/tmrc-default.yaml")).config
    documented = ask("theirs.yaml", {"theirs.yaml": TMRC})
    paths = {"dataset.parquet_dir", "training.checkpoint_dir"}
    assert documented.files == ("theirs.yaml",)
    assert differences(documented.config, ours) == paths
    check(documented.config, "parquet_dir=/path/to/data checkpoint_dir=/path/to/artifacts")
    theirs = ask("theirs.yaml", {"theirs.yaml": TMRC_FILE})
    assert differences(theirs.config, ours) == paths | {"model.n_layer", "training.test_freq"}
    check(theirs.config, "n_layer=6 test_freq=100")
    assert set(TMRC_SAYS) <= set(theirs.notes)
    assert "datasets.name is read as dataset.name" not in theirs.notes


def test_what_a_file_of_tmrc_says_itself_stands(ask: Ask) -> None:
    text = TMRC_FILE.replace("eps: 1e-8", "eps: 1e-8, grad_clip: 2.0") + "schedule: {name: wsd}\n"
    config = ask("my.yaml tie_embeddings=true checkpoint_freq=70", {"my.yaml": text}).config
    check(config, "schedule.name=wsd decay_lr=true grad_clip=2.0")
    check(config, "tie_embeddings=true checkpoint_freq=70")


NATIVE_VALUES = "tie_embeddings=true decay_lr=true checkpoint_freq=500"
PATHS = "dataset: {train_data_path: a, val_data_path: b}"
GPT = "model: {name: gpt, "
TMRC_NAMES = [  # a file, what comes later, values
    # a few of its names do not make a file one of TMRC's
    ("model: {name: gpt, d_model: 64}", "", NATIVE_VALUES),
    ("model: {name: llama, d_model: 64}\noptimizer: {lr: 1e-3}", "", NATIVE_VALUES),
    ("datasets: {name: a}\ntokenizer: {name: gpt2}", "", NATIVE_VALUES),
    # two switches choose the kernel of attention
    (GPT + "flash: true}", "", "attention=flash"),
    (GPT + "flex: true}", "", "attention=flex"),
    (GPT + "flash: false}", "", "attention=auto"),
    (GPT + "flash: false, flex: false}", "", "attention=auto"),
    (GPT + "flash: true, flex: false}", "", "attention=flash"),
    (GPT + "flash: true, attention: flash}", "", "attention=flash"),
    (GPT + "flash: true}", "attention=math", "attention=math"),
    (GPT + "flash: true}", "flash=false --flex", "attention=flex"),
    (GPT + "flash: true}", "flash=false", "attention=auto"),
    (GPT + "flex: true}", "flash=false", "attention=flex"),
    (GPT + "attention: math}", "--flash", "attention=flash"),
    # the text is where the last word says
    ("datasets: {name: a}", "", "dataset.name=a tokenizer.name=auto"),
    ("datasets: {name: a, path: b}", "dataset=c", "dataset.name=c parquet_dir=b"),
    ("dataset: {name: a, path: b}", "", "dataset.name=null parquet_dir=b"),
    ("dataset: {name: a, parquet_dir: b}", "", "dataset.name=a parquet_dir=b"),
    ("datasets: {name: a}", "datasets.path=b", "dataset.name=null parquet_dir=b"),
    (PATHS, "parquet_dir=c", "train_data_path=null val_data_path=null parquet_dir=c"),
    ("datasets: {tokenizer_used: gpt2}", "", "tokenizer.name=gpt2 vocab_size=null"),
    ("datasets: {tokenizer_used: gpt2}\ntokenizer: {name: gpt2}", "", "tokenizer.name=gpt2"),
    ("datasets: {tokenizer_used: gpt2}\ntokenizer: {name: auto}", "", "tokenizer.name=gpt2"),
    ("datasets: {tokenizer_used: null}", "", "tokenizer.name=bytes"),
    # the log is a switch or a section
    ("wandb_log: {name: a}", "", "wandb_log=true wandb_run_name=a"),
    ("wandb_log: {name: a}", "wandb_log=False", "wandb_log=false wandb_run_name=a"),
    ("wandb_log: {name: a}\nuse_wandb: false", "", "wandb_log=false wandb_run_name=a"),
    ("wandb_log: {name: null}", "", "wandb_log=true wandb_run_name=null"),
    ("wandb_log: true", "", "wandb_log=true wandb_run_name=null"),
    ("wandb_log: false", "wandb_log.name=a", "wandb_log=true wandb_run_name=a"),
    ("wandb_run_name: a", "", "wandb_log=false wandb_run_name=a"),
    ("wandb_log:", "", "wandb_log=false wandb_run_name=null"),
]
TMRC_NOTES = [  # a file, what comes later, a note
    (GPT + "flash: true}", "", "model.flash is read as model.attention=flash"),
    ("datasets: {tokenizer_used: gpt2}", "", "dataset.tokenizer_used is read as tokenizer.name"),
    (
        *("dataset: {name: a}", "parquet_dir=b"),
        "dataset.parquet_dir takes the place of dataset.name=a",
    ),
    (PATHS, "parquet_dir=c", "dataset.parquet_dir takes the place of dataset.val_data_path=b"),
]


def test_names_of_tmrc_in_any_file_mean_our_options(ask: Ask) -> None:
    for text, line, values in TMRC_NAMES:
        request = ask(f"my.yaml {line}", {"my.yaml": text})
        check(request.config, values)
        assert not any("read as a config of" in told for told in request.notes)
    for text, line, note in TMRC_NOTES:
        assert note in ask(f"my.yaml {line}", {"my.yaml": text}).notes


# --- fivezeroes/bdh -----------------------------------------------------------------------------

NATIVE = """\
model: {n_layer: 6, n_embd: 256, n_head: 4, mlp_internal_dim_multiplier: 128, vocab_size: 256}
dataloader: {num_workers: 4, pin_memory: true, prefetch_factor: 2}
low_precision: {use_4bit: true, quantization_type: "nf4", compute_dtype: "bfloat16"}
fp8: {format: "hybrid", amax_history_len: 1024, amax_compute_algo: "max"}
"""
SHORT = """\
training:
  {block_size: 512, batch_size: 8, max_iters: 3000, learning_rate: 3.0e-4, weight_decay: 0.01,
   log_freq: 100, test_freq: 1000, checkpoint_freq: 10000, resume_from_checkpoint: null}
"""
LONG = SHORT.replace("3000,", "1000000,")
RUNS = LONG.replace("{", '{runs_dir: "runs", gradient_accumulation_steps: 1, ')
ACCUMULATED = RUNS.replace("steps: 1,", "steps: 32,")
COMPILED = ACCUMULATED.replace("{", "{compile_model: true, ")
TENSORBOARD = 'tensorboard: {enabled: true, log_dir: "r", log_gradients: true, log_weights: true}\n'
TOKENIZER = """\
tokenizer:
  {type: "tiktoken", name: "gpt2", pad_token_id: null, eos_token_id: null, bos_token_id: null}
"""
DATASET = "dataset: {parquet_dir: somewhere, max_cached_files: 5}\n"
SPLIT = DATASET.replace("}", ", val_split: 0.1, val_batches: 100}")
CONSTANT = "decay_lr=false warmup_iters=0 beta2=0.999 grad_clip=0.0"
WITH_GPT2 = "tokenizer.name=gpt2 vocab_size=null"
COUNTED = "max_iters=31250 log_freq=3 test_freq=31 checkpoint_freq=312"


def scheduler(kind: str, warmup: int = 0, period: str = "null") -> str:
    return f"""\
scheduler:
  {{type: "{kind}", warmup_steps: {warmup}, warmup_type: "linear", min_lr: 0.0, T_max: {period},
   gamma: 0.95, patience: 10, factor: 0.1, threshold: 1e-4}}
"""


BYTES_OR_NAME = f"{NATIVE}tokenizer: "
FIVEZEROES = [  # a file, values
    # the public file's shape, revision by revision
    (
        NATIVE + SHORT + DATASET,
        "decay_lr=true warmup_iters=null beta2=0.95 tensorboard=false max_iters=3000",
    ),
    (NATIVE + SHORT + DATASET + TENSORBOARD, f"tensorboard=true vocab_size=256 {CONSTANT}"),
    (NATIVE + LONG + DATASET + TENSORBOARD + TOKENIZER, f"{WITH_GPT2} {CONSTANT}"),
    (
        NATIVE + RUNS + DATASET + TENSORBOARD + TOKENIZER,
        f"checkpoint_dir=runs max_iters=1000000 log_freq=100 {CONSTANT}",
    ),
    (
        NATIVE + COMPILED + SPLIT + TENSORBOARD + TOKENIZER + scheduler("none"),
        f"compile=true test_fraction=0.1 eval_iters=100 {COUNTED} {CONSTANT}",
    ),
    # a scheduler is a schedule
    (SHORT + scheduler("none", 9), "decay_lr=false warmup_iters=0 min_lr=null"),
    (SHORT + scheduler("cosine", 9), "schedule.name=cosine warmup_iters=9 min_lr=0.0"),
    (SHORT + scheduler("cosine", 9, "2000"), "lr_decay_iters=2009 decay_lr=true"),
    (SHORT + scheduler("linear", 9), "schedule.name=linear lr_decay_iters=null"),
    # torch's LinearLR over max_iters takes one of its steps per optimizer step
    (ACCUMULATED + scheduler("linear"), "lr_decay_iters=1000000 max_iters=31250"),
    (SHORT + "scheduler: {type: cosine}", "warmup_iters=0 min_lr=0.0"),
    (SHORT + "scheduler: {type: none}", "decay_lr=false"),
    (RUNS + "schedule: {name: wsd}", "schedule.name=wsd"),
    # a type and a name are one tokenizer
    (BYTES_OR_NAME + "{type: byte, name: gpt2}", "tokenizer.name=bytes vocab_size=256"),
    (
        BYTES_OR_NAME + "{type: huggingface, name: t5-base}",
        "tokenizer.name=t5-base vocab_size=null",
    ),
    (BYTES_OR_NAME + "{type: huggingface}", WITH_GPT2),
    (BYTES_OR_NAME + "{type: tiktoken, name: null}", WITH_GPT2),
]


@pytest.mark.parametrize(("text", "values"), FIVEZEROES)
def test_a_config_of_fivezeroes_is_the_same_run_here(ask: Ask, text: str, values: str) -> None:
    check(ask("theirs.yaml", {"theirs.yaml": text}).config, values)


def test_each_translation_of_fivezeroes_is_one_line(ask: Ask) -> None:
    text = NATIVE + COMPILED + SPLIT + TENSORBOARD + TOKENIZER + scheduler("cosine", 500, "20000")
    assert set(ask("theirs.yaml", {"theirs.yaml": text}).notes) == {
        "theirs.yaml is read as a config of fivezeroes/bdh",
        "tensorboard.log_dir, tensorboard.log_gradients, tensorboard.log_weights: ignored, event "
        "files go into the run's directory, without histograms",
        "tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id: ignored, a "
        "tokenizer knows its own, and there nothing reads them",
        "tokenizer.type=tiktoken and name=gpt2 is read as tokenizer.name=gpt2",
        "model.vocab_size=256: null, the tokenizer's, as there",
        "after 20500 steps the rate stays low; there it rises again",
        "scheduler.type=cosine with warmup_steps + T_max = 20500 is read as "
        "schedule.warmup_iters=500, schedule.min_lr=0.0, schedule.name=cosine, "
        "schedule.lr_decay_iters=20500",
        "scheduler.warmup_type, scheduler.gamma, scheduler.factor, scheduler.threshold, "
        "scheduler.patience: ignored, no part of this schedule here",
        "max_iters=1000000, log_freq=100, test_freq=1000, checkpoint_freq=10000 count micro-steps "
        "there, 32 to an optimizer step: max_iters=31250, log_freq=3, test_freq=31, "
        "checkpoint_freq=312",
        "optimizer.beta2=0.999, optimizer.grad_clip=0.0: its AdamW has torch's betas, and it does "
        "not clip gradients",
        "training.runs_dir is read as training.checkpoint_dir",
        "training.compile_model is read as system.compile",
        "dataset.val_split is read as dataset.test_fraction",
        "dataset.val_batches is read as training.eval_iters",
        "tensorboard.enabled is read as logging.tensorboard",
    }


def test_plain_names_of_others_work_on_the_command_line_too(ask: Ask) -> None:
    words = "--runs_dir=a --val_split=0.2 training.compile_model=false val_interval=7"
    words += " tensorboard.enabled=true dataset.val_batches=3"
    values = "checkpoint_dir=a test_fraction=0.2 compile=false test_freq=7"
    check(ask(words).config, f"{values} tensorboard=true eval_iters=3")


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = table("""
model: {name: gpt, flash: true, flex: true}
    my.yaml:1: model.flash=true and model.flex=true exclude each other; set one to false.
model: {name: gpt, flash: true, attention: math}
    my.yaml:1: model.flash: same as model.attention=flash, but model.attention=math. Keep
model: {flash: maybe}
    my.yaml:1: model.flash: expected true or false, got 'maybe'.
model: {flsh: true}
    my.yaml:1: model.flsh: unknown option. Did you mean flash?
flsh: true
    my.yaml:1: flsh: unknown option. Did you mean model.flash?
datasets: {tokenizer_used: t5-base}; tokenizer: {name: gpt2}
    my.yaml:2: dataset.tokenizer_used=t5-base made the tokens, but tokenizer.name=gpt2; set
optimizer: {precision: bfloat16}
    my.yaml:1: optimizer.precision: not available in this version.
optimizer: {name: lion}
    my.yaml:1: optimizer.name: expected one of adamw, adamw_8bit, muon, got 'lion'.
model: {name: gpt, flash: true, mask: causal_document}
    my.yaml:1: model.attention=flash cannot keep documents apart, as model.mask=causal_document
scheduler: {type: step}
    my.yaml:1: scheduler.type: expected one of none, cosine, linear, exponential
scheduler: {type: cosine, warmup_step: 3}
    my.yaml:1: scheduler.warmup_step: unknown option. Did you
scheduler: {type: cosine, T_max: x}
    my.yaml:1: scheduler.T_max: expected a whole number, got 'x'
scheduler: {type: cosine, type: none}
    my.yaml:1: scheduler.type: given twice (first at line 1). Keep one.
scheduler: {type: none}; schedule: {name: wsd}
    my.yaml:1: scheduler.type: section schedule sets the rate too. Keep
scheduler: {type: cosine, warmup_steps: -1}
    my.yaml:1: scheduler.warmup_steps: must be >= 0, got -1
tensorboard: {enabled: true, log_dirs: a}
    my.yaml:1: tensorboard.log_dirs: unknown option.
training: {runs_dir: a, gradient_accumulation_steps: 0, max_iters: 10}
    my.yaml:1: training.gradient_accumulation_steps: must be in [1, 1000000], got 0
training: {runs_dir: a, gradient_accumulation_steps: 2, max_iters: soon}
    my.yaml:1: training.max_iters: expected a whole number, got 'soon'
""")


def test_mistakes_in_a_file_of_others_are_one_line_with_its_place(complaint: Complain) -> None:
    for text, message in MISTAKES:
        found = complaint("my.yaml", {"my.yaml": text.replace("; ", "\n")})
        assert found.startswith(message) and len(found.splitlines()) == 1


REFUSED = [  # a file, the message, a remedy that it names
    (
        scheduler("plateau"),
        "my.yaml:2: scheduler.type=plateau is not available. Take another with "
        "schedule.name=cosine, linear or wsd, or schedule.decay_lr=false for a constant rate.",
        "decay_lr=false",
    ),
    (
        *(scheduler("exponential"), "my.yaml:2: scheduler.type=exponential is not av"),
        "schedule.name=wsd",
    ),
    (
        "tokenizer:\n  type: sentencepiece\n  name: a.model\n",
        "my.yaml:2: tokenizer.type=sentencepiece cannot be read. Take tokenizer.name=gpt2, a",
        "tokenizer.name=bytes",
    ),
    (
        "tokenizer: {type: tiktoken, name: cl100k_base}",
        "my.yaml:1: tokenizer.name=cl100k_base of tiktoken cannot be read, only gpt2. Take",
        "tokenizer.name=bytes",
    ),
]


def test_what_is_not_available_is_refused_until_another_is_named(
    ask: Ask, complaint: Complain
) -> None:
    for text, message, remedy in REFUSED:
        found = complaint("my.yaml", {"my.yaml": text})
        assert found.startswith(message) and len(found.splitlines()) == 1
        assert isinstance(ask(f"my.yaml {remedy}").config, Config)
