"""The rules of the house, read from the syntax tree: who imports whom, forbidden calls.

A rule broken anywhere in the project turns a test red and names file and line.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("settings", "model", "data", "engine", "launch", "compare")
SCRIPTS = ("train", "sample", "prepare", "export", "runs")

LOW_PRECISION = {"bitsandbytes", "transformer_engine"}
PLOTS = {"plotly", "matplotlib"}
TOKENIZERS = {"tokenizers", "tiktoken", "huggingface_hub"}
# Which modules a room may import, besides the standard library. "model.*" is any module of model.
DOORS = {
    "config": {"settings.*"},
    "settings": {"yaml", "settings.*"},
    "model": {"torch", "config", "model.*", "safetensors", "huggingface_hub"},
    "data": {"numpy", "pyarrow", "torch", "config", "data.*", *TOKENIZERS},
    "engine": {"torch", "numpy", "config", "engine.*", "model", "wandb", "safetensors"}
    | LOW_PRECISION
    | {"rich", "tensorboard", "settings.files", "settings.terminal", "settings.values"},
    "launch": {"torch", "config", "model.*", "data.*", "engine.*", "launch.*"},
    "compare": {"numpy", "yaml", "config", "settings.*", "compare.*"}
    | {"engine.files", "engine.find_runs", "engine.manifest", "engine.metrics"}
    | {"engine.run_files"}
    | PLOTS,
}
LAZY = {"torch", "triton", "numpy", "pyarrow", "model", "data", "engine", "safetensors", "wandb"}
LAZY |= TOKENIZERS | LOW_PRECISION | PLOTS | {"rich", "tensorboard"}
"""Packages that may be imported inside a function: slow, optional, or built on those."""


def sources() -> list[Path]:
    """Every Python file of the product; tests and benchmarks have no rooms."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return files + sorted(ROOT.glob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, inside a function) of every import; names of submodules are resolved."""
    inside = {
        id(node)
        for function in ast.walk(tree(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found: list[tuple[str, int, bool]] = []
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            ]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [(name, node.lineno, id(node) in inside) for name in names]
    return found


def allowed(name: str, permitted: set[str]) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or any(
        name == entry or top == entry or (entry.endswith(".*") and top == entry[:-2])
        for entry in permitted
    )


def broken(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def test_rooms_import_only_through_their_doors() -> None:
    faults = []
    for path in sources():
        room = module_name(path).split(".")[0]
        if room in DOORS:
            faults += [
                broken(path, line, f"{room} may not import {name}")
                for name, line, _ in imports(path)
                if not allowed(name, DOORS[room])
            ]
    assert faults == []


def test_only_load_model_names_the_models() -> None:
    faults = [
        broken(path, line, f"imports {name}")
        for path in sorted((ROOT / "engine").rglob("*.py"))
        for name, line, inside in imports(path)
        if name.split(".")[0] == "model" and not inside
    ]
    assert faults == []


def test_nothing_imports_the_scripts() -> None:
    faults = [
        broken(path, line, f"imports the script {name}")
        for path in sources()
        for name, line, _ in imports(path)
        if name in SCRIPTS
    ]
    assert faults == []


def graph() -> dict[str, set[str]]:
    """Project modules and what they import, lazy imports included."""
    return {
        name: {target for target, _, _ in imports(path) if target in MODULES and target != name}
        for name, path in MODULES.items()
    }


def test_imports_have_no_cycles() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join((*path, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def reach(edges: dict[str, set[str]], name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for target in edges[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def test_config_and_its_reader_import_no_slow_package() -> None:
    reached = reach(graph(), "config") | {"config"}
    assert all(name == "config" or name.startswith("settings") for name in reached)


def test_imports_inside_functions_are_of_slow_or_optional_packages() -> None:
    faults = [
        broken(path, line, f"imports {name} inside a function")
        for path in sources()
        for name, line, inside in imports(path)
        if inside and name.split(".")[0] not in LAZY
    ]
    assert faults == []


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
    ]


FORBIDDEN = {
    "eval": "executes text",
    "exec": "executes text",
    "pickle.load": "executes what a file says",
    "pickle.loads": "executes what a file says",
    "yaml.load": "can build objects",
    "yaml.unsafe_load": "can build objects",
    "os.system": "a shell",
    "quit": "leaves from a library",
}


def test_nothing_executes_what_a_file_says() -> None:
    faults = []
    for path in sources():
        for name, node in calls(path):
            if name in FORBIDDEN:
                faults.append(broken(path, node.lineno, f"{name}: {FORBIDDEN[name]}"))
            if name == "torch.load" and not any(
                word.arg == "weights_only" and ast.unparse(word.value) == "True"
                for word in node.keywords
            ):
                faults.append(broken(path, node.lineno, "torch.load without weights_only=True"))
            if name.startswith("subprocess.") and "shell" in {word.arg for word in node.keywords}:
                faults.append(broken(path, node.lineno, "a shell"))
    assert faults == []


CONSOLES = {"engine.metrics", "config", "prepare", "sample", "export", "runs"}


def test_only_console_modules_print() -> None:
    faults = [
        broken(path, node.lineno, "prints")
        for path in sources()
        for name, node in calls(path)
        if name == "print" and module_name(path) not in CONSOLES
    ]
    assert faults == []


def test_the_environment_is_read_in_one_place_per_room() -> None:
    readers = {
        module_name(path)
        for path in sources()
        if "os.environ" in ast.unparse(tree(path)) or "os.getenv" in ast.unparse(tree(path))
    }
    # The index cache follows XDG_CACHE_HOME; of several processes one tells of a mistake.
    assert readers <= {"engine.world", "data.index", "config", "settings.torchrun"}


def test_models_name_no_device_dtype_or_rank() -> None:
    words = ("cuda", "bfloat16", "float16", "autocast", "fp8", "rank", "world")
    faults = []
    for path in sorted((ROOT / "model").glob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else node.attr
                if name.lower() in words:
                    faults.append(broken(path, node.lineno, f"names {name}"))
    assert faults == []


@pytest.mark.parametrize("word", ["utils", "common", "manager", "helper", "handler"])
def test_no_file_is_a_junk_drawer(word: str) -> None:
    assert [name for name in MODULES if word in name.split(".")[-1]] == []


def test_every_module_says_what_it_is() -> None:
    silent = [module_name(path) for path in sources() if not ast.get_docstring(tree(path))]
    assert silent == []


def test_comments_hold_no_unfinished_business() -> None:
    marks = ("TODO", "FIXME", "XXX", "HACK", "NotImplementedError")
    faults = [
        broken(path, number, line.strip())
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert faults == []
