"""Measures of the code, to look at and not to obey: `make facts`, or for another checkout
`python -m bench.facts DIRECTORY`. What they are for stands in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import fmean

PARTS = ("tests", "bench")
LONG_FILE, MANY_METHODS = 450, 12


class Source:
    """One file, read once."""

    def __init__(self, path: Path, root: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.lines = self.text.splitlines()
        relative = path.relative_to(root).with_suffix("")
        self.part = relative.parts[0] if relative.parts[0] in PARTS else "product"
        self.folder = str(relative.parent)
        names = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        self.module = ".".join(names)

    def of(self, *kinds: type[ast.AST]) -> list[ast.AST]:
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    @property
    def docstring_lines(self) -> int:
        """Lines of strings that stand alone: docstrings and attribute descriptions."""
        strings = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ]
        return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in strings)

    @property
    def comment_lines(self) -> int:
        """Lines that hold a comment and nothing else."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(
            token.type == tokenize.COMMENT and self.lines[token.start[0] - 1].lstrip()[0] == "#"
            for token in tokens
        )


def longest_chain(sources: list[Source], start: str = "train") -> list[str]:
    """Returns the longest chain of imports inside the project, those in functions included."""
    modules = {source.module: source for source in sources}

    def targets(source: Source) -> set[str]:
        found = set()
        for node in source.of(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & modules.keys()) or {node.module}
        return found & modules.keys() - {source.module}

    edges = {name: targets(source) for name, source in modules.items()}

    @cache
    def chain(name: str) -> tuple[str, ...]:
        below = [chain(target) for target in sorted(edges[name])]
        return (name, *max(below, key=len, default=()))

    return list(chain(start))


def has_tuple_type(argument: ast.arg) -> bool:
    """Whether a parameter packs a fixed number of values: tuple[int, int], not tuple[int, ...]."""
    note = argument.annotation
    return (
        isinstance(note, ast.Subscript)
        and ast.unparse(note.value) == "tuple"
        and isinstance(note.slice, ast.Tuple)
        and "..." not in ast.unparse(note.slice)
    )


def product_facts(sources: list[Source]) -> dict[str, object]:
    """Returns what is measured of the product alone."""
    functions = [
        node
        for source in sources
        for node in source.of(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = {f: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    classes = [c for s in sources for c in s.of(ast.ClassDef) if isinstance(c, ast.ClassDef)]
    lines = sum(len(source.lines) for source in sources)
    filled = sum(bool(line.strip()) for source in sources for line in source.lines)
    comments = sum(source.comment_lines for source in sources)
    docstrings = sum(source.docstring_lines for source in sources)
    chain = longest_chain(sources)
    calls = [
        ast.unparse(c.func) for s in sources for c in s.of(ast.Call) if isinstance(c, ast.Call)
    ]
    parameters = [
        argument
        for function in functions
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    ]
    twice = [name for name, count in Counter(c.name for c in classes).items() if count > 1]
    methods = {
        c.name: sum(isinstance(member, ast.FunctionDef) for member in c.body) for c in classes
    }
    longest = max(sizes, key=lambda function: sizes[function])
    folders = Counter(source.folder for source in sources)
    return {
        "lines": f"{lines:,} in {len(sources)} files: {filled - comments - docstrings:,} code, "
        f"{docstrings:,} docstring, {comments:,} comment, {lines - filled:,} blank",
        "functions": f"{len(functions):,}, {1000 * len(functions) / lines:.0f} per 1,000 lines; "
        f"{fmean(sizes.values()):.1f} lines each, longest {longest.name} ({sizes[longest]})",
        "comment lines": f"{1000 * comments / filled:.0f} per 1,000 that are not blank",
        "import depth": f"{len(chain)}: {' > '.join(chain)}",
        "casts": calls.count("cast"),
        "protocols": sum(any(ast.unparse(b) == "Protocol" for b in c.bases) for c in classes),
        "tuple parameters": sum(map(has_tuple_type, parameters)),
        "class names used twice": f"{len(twice)}: {', '.join(sorted(twice))}",
        f"files over {LONG_FILE} lines": ", ".join(
            f"{s.module} {len(s.lines)}" for s in sources if len(s.lines) > LONG_FILE
        ),
        f"classes of more than {MANY_METHODS} methods": ", ".join(
            f"{name} {count}" for name, count in methods.items() if count > MANY_METHODS
        ),
        "files per folder": ", ".join(f"{name} {n}" for name, n in sorted(folders.items())),
    }


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    sources = [Source(path, root) for path in paths]
    product = [source for source in sources if source.part == "product"]
    for name, value in product_facts(product).items():
        print(f"{name:>32}  {value}")
    for part in PARTS:
        count = sum(len(source.lines) for source in sources if source.part == part)
        print(f"{f'lines of {part}':>32}  {count:,}")


if __name__ == "__main__":
    main()
