"""BDH against the public reference: parity, then training, memory, long contexts, generation.

    python -m bench.bdh [--reference DIR] [--text FILE] [--only training,memory] [--output]

DIR is a clone of pathwaycom/bdh; without it its rows are left out. The rivals take turns, once a
round each, so that a slow moment of the machine meets all of them; ratios are the median of the
rounds' ratios. No time is taken before ours is shown to compute what the reference computes.

Memory is the peak of a training step in a process of its own, less what that process held before
the model was built. Matrix product ceilings are measured in the same rounds as the steps.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.bdh_measure import (
    GB,
    Timing,
    ceiling,
    gigabytes,
    hardware,
    held,
    listed,
    memory_size,
    reset_peak,
    says,
    short_name,
    table,
    timed,
    times,
)
from bench.bdh_reference import (
    LIMIT,
    Decoder,
    Errors,
    Kind,
    Recompute,
    Rival,
    kinds,
    load,
    parity,
    rounding,
    step_bytes,
    train,
)
from config import BDHConfig
from model.bdh import BDH

DEFAULT = BDHConfig(
    n_layer=2, n_embd=256, dropout=0.1, n_head=4, mlp_internal_dim_multiplier=128, vocab_size=256
)
SMALL = replace(DEFAULT, n_embd=64, n_head=2, mlp_internal_dim_multiplier=16)
SWEEP = (512, 1024, 2048, 4096, 8192, 16384, 32768)
POSITIONS = (128, 200, 512, 4096, 20000)


@dataclass(frozen=True)
class Bench:
    """What all parts share. `scale` divides every length, for --quick."""

    device: torch.device
    reference: ModuleType | None
    options: argparse.Namespace
    scale: int
    width: BDHConfig

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def layers(self) -> int:
        return int(self.options.layers or (6 if self.cuda else 2))

    def kinds(self) -> list[Kind]:
        return kinds(self.device, self.reference)

    def weights(self, layers: int) -> BDH:
        torch.manual_seed(1)
        return BDH(replace(self.width, n_layer=layers)).to(self.device)

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.width.vocab_size, (rows, length + 1), device=self.device)
        return tokens[:, :-1], tokens[:, 1:].contiguous()

    def too_large(self, kind: Kind, shape: Shape, share: float) -> str:
        """Why a step of the reference is not tried, if it is not."""
        config = replace(self.width, n_layer=shape.layers)
        needed = step_bytes(kind, config, shape.batch, shape.length)
        if kind.ours or needed <= share * memory_size(self.device):
            return ""
        return f"{kind.title}: skipped, would take about {needed / GB:.0f} GB"


@dataclass(frozen=True)
class Shape:
    layers: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} tokens, n_layer {self.layers}"


def product_sizes(bench: Bench, tokens: int) -> list[tuple[int, ...]]:
    """Those of a tile: projection, way back, gradient of a weight; on a GPU larger ones too."""
    D, n = bench.width.n_embd, 2048 // bench.scale
    sizes: list[tuple[int, ...]] = [(tokens, D, n), (tokens, n, D), (D, tokens, n)]
    if bench.cuda:
        sizes += [(tokens, D, 4 * n), (tokens, 4 * n, D), (4 * n, 4 * n, 4 * n)]
    return sizes


def make_rivals(bench: Bench, some: Sequence[Kind], layers: int) -> dict[str, Rival]:
    torch.compiler.reset()  # shapes compiled earlier would count towards a limit
    weights = bench.weights(layers)
    return {kind.name: Rival(kind, weights, bench.reference) for kind in some}


def time_steps(
    bench: Bench, rivals: dict[str, Rival], shape: Shape, rounds: int, between: Callable[[], object]
) -> dict[str, Timing]:
    """Interleaved. Two rounds warm up, but long steps of the eager reference, which has nothing to
    prepare, start cold."""
    batch = bench.batch(shape.batch, shape.length)
    timings = {name: Timing() for name in rivals}
    long = shape.batch * shape.length >= 8192 // bench.scale and not bench.cuda
    for number in range(-2, rounds):
        for name, rival in rivals.items():
            cold = long and not (rival.kind.ours or rival.kind.compiled)
            if number >= 0:
                timed(lambda rival=rival: rival.step(*batch), bench.device, timings[name])  # type: ignore[misc]
            elif not cold:
                rival.step(*batch)
        if number >= 0:
            between()
    return timings


def step_table(bench: Bench, some: Sequence[Kind], shape: Shape, rounds: int) -> Iterator[str]:
    rivals = make_rivals(bench, some, shape.layers)
    sizes = product_sizes(bench, min(shape.batch * shape.length, 16384))
    ceilings: dict[torch.dtype, list[float]] = {kind.dtype: [] for kind in some}

    def between() -> None:
        for dtype, rates in ceilings.items():
            rates.append(ceiling(bench.device, dtype, sizes))

    timings = time_steps(bench, rivals, shape, rounds, between)
    flops = bench.weights(shape.layers).flops_per_token(shape.length)
    columns = ["minimum s", "median s", "tokens/s", "x shipped", "x bf16", "TFLOP/s", "of ceiling"]
    columns += ["GB"] if bench.cuda else []
    rows = []
    for kind in some:
        timing = timings[kind.name]
        speed = [shape.batch * shape.length / s for s in timing.seconds]
        rate = statistics.median(speed)
        share = statistics.median(
            s * flops / c for s, c in zip(speed, ceilings[kind.dtype], strict=True)
        )
        row = [kind.title, f"{min(timing.seconds):.3f}", f"{statistics.median(timing.seconds):.3f}"]
        row += [f"{rate:.0f}", timing.ratio(timings.get("reference"))]
        row += [timing.ratio(timings.get("reference-bf16")), f"{rate * flops / 1e12:.3f}"]
        rows.append([*row, f"{share:.0%}", *([f"{timing.peak / GB:.2f}"] if bench.cuda else [])])
    yield f"{shape}, {rounds} rounds; {flops / 1e6:.0f} MFLOP per token, as ours counts them."
    best = ", ".join(f"{says(d)} {max(rates) / 1e12:.2f}" for d, rates in ceilings.items())
    yield f"Ceilings, TFLOP/s: {best}; of (a x b) @ (b x c): {listed(sizes)}."
    yield from ["", *table(["forward and backward", *columns], rows), ""]


def training(bench: Bench) -> Iterator[str]:
    if bench.cuda:
        yield "Float32 is TF32, as the reference's train.py sets it."
    shape = Shape(bench.layers, 32 if bench.cuda else 2, 512 // bench.scale)
    yield from step_table(bench, bench.kinds(), shape, bench.options.rounds)
    small = memory_size(bench.device) < 64 * GB
    shape = Shape(1 if small else bench.layers, 1, 8192 // bench.scale)
    if small:
        yield f"Below, n_layer is 1: this machine has {memory_size(bench.device) / GB:.0f} GB."
    refusals = {kind.name: bench.too_large(kind, shape, 0.7) for kind in bench.kinds()}
    yield from filter(None, refusals.values())
    some = [k for k in bench.kinds() if not refusals[k.name] and (not k.ours or k.compiled)]
    yield from ["", *step_table(bench, some, shape, min(2, bench.options.rounds))]


def memory(bench: Bench) -> Iterator[str]:
    shape = Shape(6, 8, 512 // bench.scale)
    peaks: dict[str, int] = {}
    for kind in bench.kinds():
        refusal = bench.too_large(kind, shape, 0.85)
        peaks[kind.name] = 0 if refusal else peak_of(bench, kind, shape)
        if refusal:
            yield refusal
    rows = [
        [k.title, gigabytes(peaks[k.name])]
        + [times(peaks.get(name, 0), peaks[k.name]) for name in ("reference", "reference-bf16")]
        for k in bench.kinds()
    ]
    yield f"{shape}; weights and gradients included."
    yield from ["", *table(["peak of a step", "GB", "shipped / this", "bf16 / this"], rows), ""]


def context(bench: Bench) -> Iterator[str]:
    """The reference as its authors train it on a GPU, under bf16 on a CPU."""
    rival = "reference" if bench.cuda else "reference-bf16"
    names = [rival, "bf16"]
    some = sorted((k for k in bench.kinds() if k.name in names), key=lambda k: names.index(k.name))
    rows = (context_row(bench, some, length // bench.scale) for length in SWEEP)
    columns = [f"{kind.title}: {unit}" for kind in some for unit in ("ms per 1000 tokens", "GB")]
    yield f"Training step, n_layer 1, {8192 // bench.scale} tokens or one sequence."
    yield ""
    yield from table(["T", "B", *columns], rows)
    yield ""


def context_row(bench: Bench, some: Sequence[Kind], length: int) -> list[str]:
    shape = Shape(1, max(8192 // bench.scale // length, 1), length)
    fits = [
        kind
        for kind in some
        if not bench.too_large(kind, shape, 0.7)
        and (kind.ours or bench.cuda or length <= 2048 // bench.scale)
    ]
    rounds = min(bench.options.rounds, 3)
    timings = time_steps(bench, make_rivals(bench, fits, 1), shape, rounds, lambda: None)
    row = [str(shape.length), str(shape.batch)]
    for kind in some:
        if kind not in fits:
            row += ["-", "-"]
            continue
        each = statistics.median(timings[kind.name].seconds) / shape.batch / length
        row += [f"{each * 1e6:.1f}", gigabytes(peak_of(bench, kind, shape))]
    return row


def peak_of(bench: Bench, kind: Kind, shape: Shape) -> int:
    """Measured by a fresh process; 0 where that failed, after its message."""
    command = [sys.executable, "-m", "bench.bdh", "--memory-of", kind.name]
    command += ["--shape", *map(str, (shape.layers, shape.batch, shape.length))]
    command += ["--device", str(bench.device), *(["--quick"] if bench.options.quick else [])]
    if bench.options.reference and not kind.ours:
        command += ["--reference", str(bench.options.reference)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def own_peak(bench: Bench, name: str, shape: Shape) -> int:
    """Bytes a training step takes in this process, the model's weights included.

    A step of a tiny model comes first: libraries and the compiler are not the step's.
    """
    kind = next(kind for kind in bench.kinds() if kind.name == name)
    tiny = BDH(replace(SMALL, n_layer=1)).to(bench.device)
    Rival(kind, tiny, bench.reference).step(*bench.batch(1, 32))
    del tiny
    before = held(bench.device)
    weights = bench.weights(shape.layers)
    rival = Rival(kind, weights, bench.reference)
    del weights
    batch = bench.batch(shape.batch, shape.length)
    for _ in range(2 if bench.cuda else 1):  # on a GPU the first one tunes and compiles
        reset_peak(bench.device)
        rival.step(*batch)
    return held(bench.device, peak=True) - before


@dataclass(frozen=True)
class Writer:
    """A row of the table of generation."""

    title: str
    rival: Rival
    prompt: Tensor
    farthest: int

    def at(self, position: int) -> Decoder | Recompute:
        way = Decoder if self.rival.kind.ours else Recompute
        return way(self.rival, self.prompt[:position])


def generation(bench: Bench) -> Iterator[str]:
    positions = [max(p // bench.scale, 4) for p in POSITIONS]
    rows = list(writers(bench, positions[-1]))
    ways = {(row.title, p): row.at(p) for row in rows for p in positions if p <= row.farthest}
    found: dict[tuple[str, int], list[float]] = {place: [] for place in ways}
    for number in range(-1, 4):  # one round warms up
        for place, way in ways.items():
            steps = way.burst()
            found[place] += steps if number >= 0 else []
    median = {place: statistics.median(steps) for place, steps in found.items()}
    last, base = positions[-1], next((row.title for row in rows if not row.rival.kind.ours), "")
    lines = []
    for row in rows:
        each = [median.get((row.title, p), 0.0) for p in positions]
        prompt = ways[row.title, last].prefill if last <= row.farthest else 0.0
        line = [row.title, *(f"{s * 1000:.2f}" if s else "-" for s in each)]
        line += [times(each[-1], each[1]), times(median.get((base, positions[2]), 0.0), each[2])]
        lines.append([*line, f"{last / prompt:.0f}" if prompt else "-"])
    columns = [f"at {p}" for p in positions]
    columns += [f"at {last} / at {positions[1]}", f"x {base} at {positions[2]}"]
    columns += [f"prompt of {last}, tokens/s"]
    yield f"Milliseconds per token, n_layer {bench.layers}; of ours the median of 40 greedy steps,"
    yield "of the reference, which computes the whole prefix for each token, that of 4 passes."
    yield from ["", *table(["one sequence", *columns], lines), ""]


def writers(bench: Bench, longest: int) -> Iterator[Writer]:
    """The reference, then ours with random weights and with trained ones; each in both dtypes."""
    names = [False, True] if bench.reference else [True]
    reach = longest if bench.cuda else 512 // bench.scale
    for name, weights, prompt in models(bench, longest):
        active = activity(weights, prompt)
        for ours, dtype in itertools.product(names, (torch.float32, torch.bfloat16)):
            kind = Kind("", f"{'ours' if ours else 'reference'}, {says(dtype)}", dtype, False, ours)
            rival = Rival(kind, weights, bench.reference)
            rival.model.eval()
            title = f"{kind.title}, {name}{active}" if ours else kind.title
            yield Writer(title, rival, prompt, longest if ours else reach)
        names = [True]


def models(bench: Bench, longest: int) -> Iterator[tuple[str, BDH, Tensor]]:
    weights = bench.weights(bench.layers)
    yield "random weights", weights, bench.batch(1, longest)[0][0]
    if bench.options.text is None:
        return
    text = torch.frombuffer(bytearray(bench.options.text.read_bytes()), dtype=torch.uint8).long()
    steps = 3 if bench.options.quick else bench.options.steps
    weights.compile()
    loss = train(weights, text, steps, (4, 256 // bench.scale))
    prompt = text.repeat(-(-longest // len(text)))[:longest].to(bench.device)
    yield f"after {steps} steps (loss {loss:.2f})", weights, prompt


def activity(model: BDH, prompt: Tensor) -> str:
    """Of all neurons, the mean over layers: s = relu(x E), and z after the gate."""
    with torch.autocast(prompt.device.type, torch.bfloat16):
        shares = model.active_fraction(prompt[None, :512])
    s, z = (statistics.mean(shares[name]) for name in ("s", "z"))
    return f", active: s {s:.1%}, z {z:.1%}"


def check_parity(bench: Bench) -> Iterator[str]:
    """Stops the run where ours is not what the reference is."""
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    columns = ["logits", "loss", "worst gradient"]
    if bench.reference is None:
        yield "No --reference DIR: its rows are left out, and parity was not checked."
    else:
        small = (SMALL, 1, 600)  # long enough to be cut into chunks
        shapes = [small] if bench.options.quick else [(replace(DEFAULT, n_layer=1), 1, 64), small]
        found = list(parity(shapes, bench.reference, bench.device, bench.batch))
        yield from [
            "Relative error in float32 against the reference, same weights, no dropout.",
            "",
        ]
        yield from [*table(["ours", *columns], map(error_row, found)), ""]
        if max(max(row[1:]) for row in found) > LIMIT:
            raise SystemExit(f"ours differs from the reference by more than {LIMIT:g}; not timed")
    torch.compiler.reset()
    batch = bench.batch(2, 128)
    found = list(rounding(SMALL, bench.kinds(), bench.reference, bench.device, batch))
    yield f"Against ours in float64, D {SMALL.n_embd}, 2 x 128 tokens, the same weights."
    yield from ["", *table(["relative error", *columns], map(error_row, found)), ""]
    torch.backends.cuda.matmul.allow_tf32 = True  # as the reference's train.py sets it


def error_row(row: Errors) -> list[str]:
    return [row[0], *(f"{error:.1e}" for error in row[1:])]


PARTS: dict[str, tuple[str, Callable[[Bench], Iterator[str]]]] = {
    "parity": ("Parity", check_parity),
    "training": ("Training step", training),
    "memory": ("Peak memory of a training step", memory),
    "context": ("Length of the context", context),
    "generation": ("Generation", generation),
}


def report(bench: Bench, names: Sequence[str], output: Path | None) -> None:
    """Each part is printed and written when it is done."""
    whole: list[str] = []

    def say(lines: Iterator[str] | Sequence[str]) -> None:
        for line in lines:
            print(line, flush=True)
            whole.append(line)
        if output is not None:
            output.write_text("\n".join(whole).rstrip() + "\n")

    say([f"# BDH on {short_name(bench.device)}{', tiny sizes' * bench.options.quick}", ""])
    say([f"{datetime.date.today()}. {hardware(bench.device)}; torch {torch.__version__},"])
    say([f"{torch.get_num_threads()} threads. Written by `python -m bench.bdh`.", ""])
    for name in names:
        title, part = PARTS[name]
        say([f"## {title} (load {os.getloadavg()[0]:.1f} before)", ""])
        say(part(bench))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="a clone of pathwaycom/bdh")
    parser.add_argument("--text", type=Path, help="trains a model for generation on this file")
    parser.add_argument("--steps", type=int, default=200, help="of that training, 4 x 256 tokens")
    parser.add_argument("--only", default=",".join(PARTS), help="parts; parity is always checked")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the bench itself")
    parser.add_argument("--layers", type=int, help="of a timed model: 2 on a CPU, 6 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=Path(), help="bench/results/bdh-<device>.md"
    )
    parser.add_argument("--memory-of", help="prints the bytes a training step takes, nothing else")
    parser.add_argument("--shape", type=int, nargs=3, default=(6, 8, 512), help="layers, B, T")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - PARTS.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def main() -> None:
    options = arguments()
    bench = Bench(
        device=torch.device(options.device),
        reference=load(options.reference) if options.reference else None,
        options=options,
        scale=16 if options.quick else 1,
        width=SMALL if options.quick else DEFAULT,
    )
    if options.memory_of:
        print(own_peak(bench, options.memory_of, Shape(*options.shape)))
        return
    output = options.output
    if output == Path():
        output = Path(f"bench/results/bdh-{short_name(bench.device)}.md")
    only = {"parity", *options.only.split(",")}
    report(bench, [name for name in PARTS if name in only], output)


if __name__ == "__main__":
    main()
