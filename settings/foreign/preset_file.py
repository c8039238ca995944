"""Reads a Python preset of nanoGPT as literals, from its syntax tree; nothing is ever executed.

A preset may assign literals, and arithmetic on names assigned before. The one call in nanoGPT's own
presets puts the time into the name of a run; here the run directory has a name with the time.
"""

from __future__ import annotations

import ast
import math
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from settings.errors import Origin, Problem
from settings.schema import LARGEST_INT
from settings.values import Scalar, shown
from settings.yaml_reader import (
    Entry,
    Items,
    PythonValue,
    UnreadableError,
    Value,
    read_text,
)

MAX_PRESET_BYTES = 50_000  # Python 3.10 cannot build deeper trees than a larger file can hold
MAX_DEPTH = 50
MAX_TEXT = 1000

# nanoGPT's presets -> files of ours that do the same
PRESETS: dict[str, str] = {
    "train_gpt2.py": "gpt2-124m.yaml",
    "train_shakespeare_char.py": "shakespeare-char.yaml",
    "finetune_shakespeare.py": "finetune-shakespeare.yaml",
    "eval_gpt2.py": "eval-gpt2.yaml",
    "eval_gpt2_medium.py": "eval-gpt2-medium.yaml",
    "eval_gpt2_large.py": "eval-gpt2-large.yaml",
    "eval_gpt2_xl.py": "eval-gpt2-xl.yaml",
}

Number: TypeAlias = "int | float"

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CLOCK = ast.dump(ast.parse("str(time.time())", mode="eval").body)
_TIME = "\0time\0"  # stands for the clock's text; no file can hold it
_NAMED_AFTER_THE_TIME = "wandb_run_name"
_ALLOWED = "presets are read, not run: only NAME = a literal or arithmetic on earlier names"


class _NotLiteralError(Exception):
    """An expression that is no literal; the message says why, where there is more to say."""


def read_preset(path: str, layer: int) -> tuple[list[Entry], list[Problem], list[str]]:
    """Returns the assignments of a preset, what else is in it, and what to tell the user."""
    origin = Origin(layer, source=path)
    try:
        text = read_text(path, MAX_PRESET_BYTES)
        statements = _parse(text)
    except UnreadableError as error:
        hint = "" if os.path.exists(path) else _same_here(path)
        place = replace(origin, line=error.line, column=error.column)
        return [], [Problem(place, f"{error}{hint}")], []
    preset = _Preset(origin, text)
    for statement in statements:
        preset.add(statement)
    return preset.entries, preset.problems, preset.notes


def _same_here(path: str) -> str:
    """Name the file of ours that does what a missing preset of nanoGPT does."""
    name = PRESETS.get(os.path.basename(path))
    return f". The same in this project: configs/{name}" if name else ""


def _parse(text: str) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as '\d'
            return ast.parse(text).body
    except SyntaxError as error:
        line = (error.text or "").strip()
        message = f"not valid Python: {error.msg}{': ' + shown(line) if line else ''}"
        raise UnreadableError(message, error.lineno or 0, error.offset or 0) from None
    except ValueError as error:  # a null byte, before Python 3.11.4
        raise UnreadableError(f"not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise UnreadableError(f"nested more than {MAX_DEPTH} levels deep") from None


class _Preset:
    """The entries of a file while its statements are gone through, in order."""

    def __init__(self, origin: Origin, text: str) -> None:
        self.entries: list[Entry] = []
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._origin = origin
        self._lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._values: dict[str, Any] = {}

    def add(self, statement: ast.stmt) -> None:
        origin = replace(self._origin, line=statement.lineno)
        try:
            if not _says_nothing(statement):
                self._assign(statement, origin)
        except _NotLiteralError as error:
            written = shown(self._lines[statement.lineno - 1].strip())
            self.problems.append(Problem(origin, f"{written}: {error}"))

    def _assign(self, statement: ast.stmt, origin: Origin) -> None:
        name, expression = _assignment(statement)
        value = _evaluate(expression, self._values, 0)
        if isinstance(value, str) and _TIME in value:
            if name != _NAMED_AFTER_THE_TIME:
                raise _NotLiteralError(_ALLOWED)
            value = None  # the name of the run's folder, which holds the time
            self.notes.append(f"{origin}: {name} holds the time; the run's folder gives the name")
        self._values[name] = value
        self.entries.append(Entry(name, _as_value(value), origin))


def _says_nothing(statement: ast.stmt) -> bool:
    """Returns whether a statement is a bare text or `import time`."""
    if isinstance(statement, ast.Import):
        return [(alias.name, alias.asname) for alias in statement.names] == [("time", None)]
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    """Returns name and expression of `NAME = expression`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, expression = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, expression = statement.target, statement.value
    else:
        raise _NotLiteralError(_ALLOWED)
    if not isinstance(target, ast.Name):
        raise _NotLiteralError(_ALLOWED)
    return target.id, expression


def _evaluate(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    """Returns the value of a literal, a name or arithmetic on them; raises _NotLiteralError."""
    if depth > MAX_DEPTH:
        raise _NotLiteralError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float, str, type(None)):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _number(_evaluate(node.operand, names, depth + 1))
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = (_evaluate(side, names, depth + 1) for side in (node.left, node.right))
        if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
            return _join(left, right)
        return _calculate(node.op, left, right)
    if isinstance(node, (ast.Tuple, ast.List)) and depth == 0:
        return tuple(_scalar(_evaluate(item, names, depth + 1)) for item in node.elts)
    if isinstance(node, ast.Call) and ast.dump(node) == _CLOCK:
        return _TIME
    raise _NotLiteralError(_ALLOWED)


def _join(left: str, right: str) -> str:
    if len(left) + len(right) > MAX_TEXT:
        raise _NotLiteralError(f"a text of more than {MAX_TEXT} characters")
    return left + right


def _scalar(value: Any) -> Any:
    if isinstance(value, tuple):
        raise _NotLiteralError("a list inside a list")
    return value


def _number(value: Any) -> Number:
    if type(value) is int or type(value) is float:
        return value
    raise _NotLiteralError(f"arithmetic on {shown(value)}")


def _calculate(operation: ast.operator, left: Any, right: Any) -> Number:
    """Returns a number of bounded size; a power is bounded before it is computed."""
    left, right = _number(left), _number(right)
    try:
        # 9 ** 9 ** 9 would take all memory before a check of its result.
        if isinstance(operation, ast.Pow) and abs(float(left) ** float(right)) > LARGEST_INT:
            raise OverflowError
        result = _ARITHMETIC[type(operation)](left, right)
    except ZeroDivisionError:
        raise _NotLiteralError("division by zero") from None
    except OverflowError:
        raise _NotLiteralError("larger than 2**63 - 1") from None
    if isinstance(result, complex) or math.isnan(result):
        raise _NotLiteralError("is not a real number")
    if isinstance(result, int) and abs(result) > LARGEST_INT:
        raise _NotLiteralError("larger than 2**63 - 1")
    return _number(result)


def _as_value(value: Any) -> Value:
    """Returns a value as the files' layers hold it; 480 / 40 is the whole number it looks like."""
    if isinstance(value, tuple):
        return Items(tuple(_as_value(item) for item in value))
    if isinstance(value, str):
        return Scalar(value, quoted=True)
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    return PythonValue(value)
