"""The truth tables of the graders: which answers each exercise's grader must take, and which it must not.

A table, exNN_name.py beside this file, holds

    RIGHT       {exercise: {how it differs: code}}              at least two answers unlike the solution
    WRONG       {exercise: {misconception: (words, code)}}      at least five; the message must contain the words
                {exercise: {words: code}}                       the same, where the words name the misconception
    EQUIVALENT  {mutant: reason}                                mutants of the solution that compute the same as it
    HEAD        imports that stand before every answer

Indented code is shifted to the left margin. tests/test_graders.py holds the graders to it, audit.py shows it to readers.
"""

import ast
import functools
import importlib
import importlib.util
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from exercises import grading

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def module(path: Path):
    """A file of this folder as a module; tests are no package."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return sys.modules[path.stem]


mutants = module(HERE / "mutants.py").mutants


@dataclass(frozen=True)
class Exercise:
    """One exercise with all that the tests know of it."""

    chapter: str  # ex02_attention
    name: str  # visible

    @property
    def path(self) -> Path:
        return ROOT / "exercises" / f"{self.chapter}.py"

    @property
    def test(self):
        return getattr(importlib.import_module(f"exercises.test_{self.chapter}"), f"test_{self.name}")

    @functools.cached_property
    def solution(self) -> str:
        return (ROOT / "solutions" / f"{self.chapter}.py").read_text(encoding="utf-8")

    @property
    def hunt(self) -> bool:
        return self.name.startswith("hunt_")

    @property
    def function(self) -> ast.FunctionDef:
        return definitions(self.solution)[self.name]

    def table(self, which: str) -> dict:
        return getattr(module(HERE / f"{self.chapter}.py"), which, {}).get(self.name, {})

    def code(self, answer: str) -> str:
        return getattr(module(HERE / f"{self.chapter}.py"), "HEAD", "") + textwrap.dedent(answer)

    @property
    def right(self) -> dict[str, str]:
        return {label: self.code(answer) for label, answer in self.table("RIGHT").items()}

    @property
    def wrong(self) -> dict[str, tuple[str, str]]:
        """{misconception: (what the message says, answer)}"""
        entries = {
            label: (label, entry) if isinstance(entry, str) else entry for label, entry in self.table("WRONG").items()
        }
        return {label: (words, self.code(answer)) for label, (words, answer) in entries.items()}

    @functools.cached_property
    def mutants(self) -> dict[str, str]:
        return mutants(self.solution, self.name, self.hunt)

    @property
    def equivalent(self) -> dict[str, str]:
        """The mutants that its table excuses, with the reasons."""
        excused = getattr(module(HERE / f"{self.chapter}.py"), "EQUIVALENT", {})
        return {mutant: excused[mutant] for mutant in self.mutants if mutant in excused}

    def grade(self, source: str, seconds: float = grading.SECONDS) -> grading.Wrong | None:
        return grading.grade(self.test, grading.Answer(self.path, source, self.name, seconds))


def definitions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def is_exercise(node: ast.FunctionDef) -> bool:
    return grading.label(ast.get_docstring(node) or "") is not None


CHAPTERS = sorted(path.stem for path in (ROOT / "exercises").glob("ex[0-9]*.py"))
EXERCISES = [
    Exercise(chapter, name)
    for chapter in CHAPTERS
    for name, node in definitions((ROOT / "exercises" / f"{chapter}.py").read_text(encoding="utf-8")).items()
    if is_exercise(node)
]
