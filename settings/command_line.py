"""Sorts a command line into files, overrides and switches (--dry-run, --slurm, --help, ...).

`key=value`, `section.key=value`, `--key=value`, `--key value` and `--section.key=value` mean the
same. Dashes in a key equal underscores. A boolean flag alone means true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from settings.errors import Origin, Problem
from settings.names import HINTS, guess, resolve
from settings.sbatch import KEYS, SlurmJob, take_slurm_words
from settings.schema import Schema
from settings.values import FALSE_WORDS, TRUE_WORDS, RefusedError, Scalar, shown
from settings.yaml_reader import Entry

COMMAND_LINE = "command line"
CHECK_STEPS = 10  # of --check-resume

_ASSIGNMENT = re.compile(r"(--)?([A-Za-z][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--([A-Za-z][A-Za-z0-9_.-]*)")
_FILE_ENDINGS = (".yaml", ".yml", ".py")


@dataclass(slots=True)
class Arguments:
    """The parts of a command line, each in the order given."""

    files: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str]] = field(default_factory=list)  # key as written, text
    dry_run: bool = False
    show_config: bool = False
    check_resume: int | None = None
    reproduce: str | None = None  # a run, a checkpoint, a saved config or a report
    help: bool = False
    slurm: SlurmJob | None = None
    problems: list[str] = field(default_factory=list)

    def entries(self, layer: int) -> tuple[list[Entry], list[Problem]]:
        """Returns the overrides as entries, and what could not be understood."""
        origin = Origin(layer, source=COMMAND_LINE)
        entries = [Entry(key, _scalar(text), origin) for key, text in self.overrides]
        return entries, [Problem(origin, text) for text in self.problems]


def parse_arguments(argv: Sequence[str], schema: Schema) -> Arguments:
    """Sorts the words of a command line; what cannot be understood goes into `problems`."""
    words, job, problems = take_slurm_words(argv, schema)
    parser = _Parser(words, schema, with_slurm=job is not None)
    while parser.words:
        parser.take()
    found = parser.found
    found.slurm, found.problems = job, [*problems, *found.problems]
    if found.dry_run and found.check_resume is not None:
        found.problems.append("--dry-run and --check-resume exclude each other")
    if job is not None and (found.dry_run or found.check_resume is not None or found.show_config):
        found.problems.append(
            "--slurm excludes --dry-run, --check-resume and --show-config: run them by themselves"
        )
    switches = found.dry_run or found.check_resume is not None or found.show_config or job
    if found.reproduce is not None and (switches or found.files or found.overrides):
        found.problems.append(
            "--reproduce repeats a run as it was: give it alone, without files, overrides and "
            "other switches"
        )
    return found


class _Parser:
    """Takes words from the left; the value of a flag is the word after it."""

    def __init__(self, words: list[str], schema: Schema, with_slurm: bool) -> None:
        self.words = words
        self.found = Arguments()
        self._schema = schema
        self._of_slurm = KEYS.keys() - {"name"} if with_slurm else ()  # `name` may be an option's

    def take(self) -> None:
        """Takes one word, and the next one if it is its value."""
        word = self.words.pop(0)
        assignment, flag = _ASSIGNMENT.fullmatch(word), _FLAG.fullmatch(word)
        if word in ("--help", "-h"):
            self.found.help = True
        elif word in ("--dry-run", "--dry_run", "--dryrun"):
            self.found.dry_run = True
        elif word in ("--show-config", "--show_config"):
            self.found.show_config = True
        elif word in ("--check-resume", "--check_resume"):
            steps = self.words.pop(0) if self.words and self.words[0].isdecimal() else None
            self._check_resume(steps or str(CHECK_STEPS))
        elif word == "--reproduce":
            self._reproduce(self._pop_value() or "")
        elif assignment:
            self._assign(assignment[2].replace("-", "_"), assignment[3])
        elif flag:
            self._take_flag(flag[1].replace("-", "_"))
        elif word.lower().endswith(_FILE_ENDINGS):
            self.found.files.append(word)
        else:
            self._problem(_explain_unknown(word, self._schema))

    def _assign(self, key: str, text: str) -> None:
        if key == "config":
            self._add_file(text)
        elif key in ("dry_run", "dryrun"):
            self._dry_run(text)
        elif key == "check_resume":
            self._check_resume(text)
        elif key == "reproduce":
            self._reproduce(text)
        elif not text:
            self._problem(f"{key}=: empty value. Write {key}=null to clear an optional value")
        elif key in self._of_slurm:
            self._stray(key)
        else:
            self.found.overrides.append((key, text))

    def _dry_run(self, text: str) -> None:
        if text.lower() in TRUE_WORDS | FALSE_WORDS:
            self.found.dry_run = text.lower() in TRUE_WORDS
        else:
            self._problem("--dry-run takes no value")

    def _check_resume(self, text: str) -> None:
        if text.isdecimal() and int(text) >= 2:
            self.found.check_resume = int(text)
        else:
            self._problem(f"--check-resume={text}: a number of steps, at least 2")

    def _reproduce(self, run: str) -> None:
        if run:
            self.found.reproduce = run
        else:
            self._problem("--reproduce: name a run, a checkpoint, its config.yaml or a report page")

    def _take_flag(self, key: str) -> None:
        if key == "config":
            self._add_file(self._pop_value() or "")
            return
        if key in self._of_slurm:
            self._pop_value(optional=True)
            self._stray(f"--{key}")
            return
        try:
            keys = resolve(self._schema, key).keys
        except RefusedError as error:
            self._pop_value(optional=True)
            self._problem(f"--{error}")
            return
        option = self._schema.find(keys[0]) if keys else None
        may_stand_alone = option is None or option.kind is bool or key == "resume"
        text = self._pop_value(optional=may_stand_alone)
        if text is None and may_stand_alone:
            text = "true"
        if not text:
            self._problem(f"--{key}: a value is missing. Write --{key}=VALUE")
        else:
            self.found.overrides.append((key, text))

    def _add_file(self, name: str) -> None:
        if name:
            self.found.files.append(name)
        else:
            self._problem("--config: the name of a file is missing")

    def _pop_value(self, optional: bool = False) -> str | None:
        """Takes the next word if it can be the value of the flag before it."""
        if not self.words or self.words[0].startswith("--") or self.words[0] == "-h":
            return None
        # `--debug my.yaml` and `--debug lr=1` are a flag alone and another argument.
        if optional and ("=" in self.words[0] or self.words[0].lower().endswith(_FILE_ENDINGS)):
            return None
        return self.words.pop(0)

    def _stray(self, key: str) -> None:
        self._problem(f"{key}: unknown option. Keys of --slurm stand directly behind it")

    def _problem(self, text: str) -> None:
        self.found.problems.append(text)


def _scalar(text: str) -> Scalar:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return Scalar(text[1:-1], quoted=True, shell=True)
    return Scalar(text, shell=True)


def _explain_unknown(word: str, schema: Schema) -> str:
    """Returns a message on a word that is neither file nor override."""
    if word.startswith("-") and len(word) > 1:
        return f"{shown(word)}: unknown option. {guess(schema, word.strip('-'))}"
    hint = HINTS.get(word.partition(":")[0])
    if hint:
        return f"{shown(word)}: not key=value. {hint}"
    return f"{shown(word)}: neither a config file (*.yaml, *.yml, *.py) nor key=value"
