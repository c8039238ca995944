"""Who may import whom, folder by folder, and calls that are forbidden everywhere.

ARCHITECTURE.md draws the same picture. A broken rule names file and line.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("launch", "sample", "prepare", "export", "runs", "sweep")

# Each folder may import itself and those above it in this list; of one line, none the others.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("settings.addresses", "settings.terminal", "settings.formatting"),
    ("settings.errors",),
    ("settings.cli",),
    ("files",),
    ("settings",),
    ("config",),
    ("model", "data"),
    ("engine.hardware",),
    ("engine.monitor", "engine.optim", "engine.precision"),
    ("engine.checkpoint", "engine.run_directory"),
    ("engine.planning",),
    ("engine.setup", "compare"),
    ("engine.replay", "sweeps"),
    ("train",),  # whose loop a replay runs
    SCRIPTS,
)
# Loose files of engine/ stand on one of these floors.
LOOSE = {
    "engine.hardware": (
        "schedule",
        "signals",
        "compile",
        "kernels",
        "loss",
        "step",
        "train_state",
        "weights_hash",
    ),
    "engine.planning": ("evaluation", "graphed_step"),
    "engine.setup": ("trainer", "reporting", "saving"),
}
NO_TORCH = (
    "settings.errors",
    "settings.cli",
    "settings.terminal",
    "settings.formatting",
    "files",
    "settings",
    "config",
    "compare",
    "engine.run_directory",
    "sweeps",
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    """Every Python file of the product: the tree without tests, benchmarks and hidden folders."""
    return sorted(
        path
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "tests", "bench", "checkpoints"))
    )


MODULES = {module_name(path): path for path in sources()}


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, also inside functions; names of submodules are resolved."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((name if name in MODULES else base, node.lineno))
    return found


def floor(module: str) -> tuple[int, str]:
    """The number of the module's floor and the name of its folder."""
    for folder, names in LOOSE.items():
        if module in {f"engine.{name}" for name in names}:
            return floor(folder)[0], "engine"
    for number, folders in enumerate(FLOORS):
        for folder in folders:
            if module == folder or module.startswith(f"{folder}."):
                return number, folder
    return 0, module  # the package engine itself, which holds no code


def test_folders_import_only_what_stands_below_them() -> None:
    faults = []
    for name, path in MODULES.items():
        above, folder = floor(name)
        for target, line in imports(path):
            if target in MODULES:
                below, other = floor(target)
                if below > above or (below == above and other != folder and "engine" not in other):
                    faults.append(f"{path.relative_to(ROOT)}:{line}: {folder} imports {target}")
    assert faults == []


def test_imports_have_no_cycles() -> None:
    edges = {
        name: {target for target, _ in imports(path) if target in MODULES and target != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join((*path, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_what_answers_at_once_imports_no_torch() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: imports {target}"
        for name, path in MODULES.items()
        if floor(name)[1] in NO_TORCH
        for target, line in imports(path)
        if target.split(".")[0] in ("torch", "model", "data")
    ]
    assert faults == []


def test_engine_names_no_model() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: imports {target}"
        for name, path in MODULES.items()
        if name.startswith("engine.")
        for target, line in imports(path)
        if target.startswith(("model.bdh", "model.gpt", "model.llama", "model.transformer"))
    ]
    assert faults == []


FORBIDDEN = {
    "eval": "executes text",
    "exec": "executes text",
    "pickle.load": "executes what a file says",
    "pickle.loads": "executes what a file says",
    "yaml.load": "can build objects",
    "yaml.unsafe_load": "can build objects",
    "os.system": "a shell",
}


def test_nothing_executes_what_a_file_says() -> None:
    faults = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            if name in FORBIDDEN:
                faults.append(f"{place}: {FORBIDDEN[name]}")
            safe = words.get("weights_only")
            if name == "torch.load" and (safe is None or ast.unparse(safe) != "True"):
                faults.append(f"{place}: torch.load without weights_only=True")
            if name.startswith("subprocess.") and "shell" in words:
                faults.append(f"{place}: a shell")
    assert faults == []


def test_every_third_party_package_is_named_in_the_requirements() -> None:
    named = "".join(path.read_text() for path in ROOT.glob("requirements*.txt")).lower()
    local = {name.split(".")[0] for name in MODULES}
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for path in sources()
        for target, line in imports(path)
        if (top := target.split(".")[0]) not in sys.stdlib_module_names | local
        and top.replace("_", "-") not in named.replace("pyyaml", "yaml").replace("_", "-")
    ]
    assert faults == []
