"""The graders: what they must let pass and what they must stop, exercise by exercise; and the exercises themselves."""

import ast
import copy
import doctest
import re
import sys
from pathlib import Path

import pytest

from exercises import grading

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "graders"))

from audit import audit  # noqa: E402
from hostile import DEEDS, RETURNS, hostile  # noqa: E402
from tables import CHAPTERS, EXERCISES, definitions, is_exercise, module  # noqa: E402

QUICK = 4.0  # seconds: a mutant that loops need not be watched for ten
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: f"{e.chapter[2:4]}-{e.name}")
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
    yield
    grading.end_zygotes()


def said(wrong):
    return "\n".join([str(wrong), *wrong.details])


# ----------------------------------------------------------------------------------------------------------------------
# The truth table


@each_exercise
def test_the_solution_passes(exercise):
    wrong = exercise.grade(exercise.solution)
    assert wrong is None, said(wrong)


@each_exercise
def test_the_stub_is_not_implemented_yet(exercise):
    wrong = exercise.grade(exercise.path.read_text(encoding="utf-8"))
    assert (wrong.state, str(wrong)) == ("to do", "not implemented yet")


@each_exercise
def test_other_right_answers_pass(exercise):
    assert len(exercise.right) >= 2
    failed = {label: said(wrong) for label, code in exercise.right.items() if (wrong := exercise.grade(code))}
    assert failed == {}


@each_exercise
def test_misconceptions_fail_by_name(exercise):
    assert len(exercise.wrong) >= 5
    for label, (words, code) in exercise.wrong.items():
        if "only Linux" in label and sys.platform != "linux":
            continue
        wrong = exercise.grade(code, QUICK)
        assert wrong is not None, f"{label} passes"
        assert wrong.state == "wrong" and words in str(wrong), f"{label} should be told {words!r}: {said(wrong)}"


@pytest.mark.timeout(600)
@each_exercise
def test_mutants_fail(exercise):
    assert exercise.mutants
    survivors = {mutant for mutant, code in exercise.mutants.items() if exercise.grade(code, QUICK) is None}
    assert survivors == set(exercise.equivalent), "each survivor needs a reason in EQUIVALENT, or a better grader"
    assert len(survivors) <= max(1, 0.05 * len(exercise.mutants))


@each_chapter
def test_no_table_speaks_of_what_is_not_there(chapter):
    own = [exercise for exercise in EXERCISES if exercise.chapter == chapter]
    table = module(ROOT / "tests" / "graders" / f"{chapter}.py")
    names = {exercise.name for exercise in own}
    assert set(table.RIGHT) == set(table.WRONG) == names
    assert set(getattr(table, "EQUIVALENT", {})) == {mutant for exercise in own for mutant in exercise.equivalent}


def takes_what_can_be_changed(function):
    kinds = {ast.unparse(arg.annotation) for arg in function.args.args if arg.annotation}
    return any(re.search(r"\b(ndarray|list|dict|set|Tensor)\b", kind) for kind in kinds)


@pytest.mark.timeout(300)
@each_exercise
def test_hostile_answers_fail(exercise, tmp_path):
    report, grader = tmp_path / "report.json", exercise.path.with_name(f"test_{exercise.path.name}")
    places = {"report": str(report), "chapter": exercise.chapter, "grader": str(grader)}
    for label, body in (DEEDS if exercise.hunt else DEEDS | RETURNS).items():  # what a hunt returns, nobody looks at
        if "in place" in label and not takes_what_can_be_changed(exercise.function):
            continue
        wrong = exercise.grade(hostile(exercise.solution, exercise.name, body, **places), 0.5)
        assert wrong is not None and str(wrong), label
    assert not report.exists()
    assert exercise.grade(exercise.solution) is None  # nothing of it lasts


def test_the_audit_is_up_to_date():
    path = ROOT / "exercises" / "AUDIT.md"
    assert path.read_text(encoding="utf-8") == audit(), "run python tests/graders/audit.py"


# ----------------------------------------------------------------------------------------------------------------------
# The exercises


def read(folder, chapter):
    return (ROOT / folder / f"{chapter}.py").read_text(encoding="utf-8")


@each_chapter
def test_stub_and_solution_ask_the_same(chapter):
    stubs, solutions = (definitions(read(folder, chapter)) for folder in ("exercises", "solutions"))
    assert [name for name, node in solutions.items() if is_exercise(node)] == list(stubs)
    for name, stub in stubs.items():
        answer = solutions[name]
        assert ast.unparse(stub.args) == ast.unparse(answer.args) and ast.dump(stub.args) == ast.dump(answer.args)
        assert ast.unparse(stub.returns or ast.Pass()) == ast.unparse(answer.returns or ast.Pass())
        assert ast.get_docstring(stub) == ast.get_docstring(answer), name
        assert ast.unparse(stub.body[1:]) == "raise NotImplementedError", f"{name}: a stub has no other code"
    assert len(stubs) >= 6 and any(name.startswith("hunt_") for name in stubs)
    levels = [grading.label(ast.get_docstring(stub))[0] for stub in stubs.values()]
    assert levels == sorted(levels) and levels[-1] == 3


@each_exercise
def test_an_exercise_says_all_that_is_needed(exercise):
    text = ast.get_docstring(exercise.function)
    _, minutes, lesson, section = grading.label(text)
    assert 5 <= minutes <= 60
    (source,) = (ROOT / "lessons" / "src").glob(f"{lesson}_*.md")
    assert source.stem == exercise.chapter.removeprefix("ex")
    assert re.search(rf"^## {int(lesson)}\.{section} ", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert exercise.hunt or ">>>" in text, "a worked example"
    assert not exercise.hunt or re.search(r"[\w.-]+/[\w.-]+( issue| pull request|\W)+#?\d+|https://", text), (
        "its source"
    )
    mark = exercise.test.exercise
    assert mark.points >= 1 and len(mark.hints) == 3 and all(hint.endswith((".", "?", ":", ")")) for hint in mark.hints)


@each_chapter
def test_worked_examples_are_true(chapter):
    """On the solutions, which are ours."""
    answers = module(ROOT / "solutions" / f"{chapter}.py")
    assert doctest.testmod(answers).failed == 0


def normal(nodes):
    """Statements as text, with variables named by their order, so that renaming does not hide a copy."""
    order, module = {}, ast.Module([copy.deepcopy(node) for node in nodes], [])
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id not in ("np", "torch", "math"):
            node.id = order.setdefault(node.id, f"v{len(order)}")
    return ast.unparse(module)


def statements(tree):
    """Every three statements in a row, every statement of three lines or more, and every function's body."""
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            plain = [s for s in block if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            plain = [s for s in plain if not isinstance(s, ast.Import | ast.ImportFrom | ast.Raise | ast.FunctionDef)]
            yield from (normal(plain[k : k + 3]) for k in range(len(plain) - 2))
            yield from (normal([s]) for s in plain if len(ast.unparse(s).splitlines()) >= 3)
            if isinstance(node, ast.FunctionDef) and plain:
                yield normal(plain)


def cells(text):
    """The code of a lesson."""
    for code in re.findall(r"^```\{code-cell\}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield re.sub(r"\A(:.*\n)+", "", code)


def test_cells_of_a_lesson():
    text = "x\n```{code-cell}\n:tags: [timing]\n\na = 1\n```\ny\n```{code-cell}\nb = 2\n```\n"
    assert [code.strip() for code in cells(text)] == ["a = 1", "b = 2"]


@each_chapter
def test_no_answer_is_given_away(chapter):
    """No solution's body, nor three of its statements in a row, stands in a lesson, a component or a stub."""
    texts = [code for path in (ROOT / "lessons" / "src").glob("*.md") for code in cells(path.read_text("utf-8"))]
    texts += [path.read_text("utf-8") for path in (ROOT / "nanogptx").glob("*.py")]
    texts += [read("exercises", each) for each in CHAPTERS]
    public = {part for text in texts for part in statements(ast.parse(text))}
    answers = definitions(read("solutions", chapter))
    assert {name: sorted(given) for name, node in answers.items() if (given := public & set(statements(node)))} == {}


def test_the_leak_check_sees_a_leak():
    solution = "def f(x):\n    a = x + 1\n    b = a * 2\n    return b\ndef g(x):\n    return x ** 3"
    lesson = "def h(y):\n    if y:\n        c = y + 1\n        d = c * 2\n        return d\ndef k(y):\n    return y"
    assert len(set(statements(ast.parse(solution))) & set(statements(ast.parse(lesson)))) == 1
    assert set(statements(ast.parse("def k(z):\n    return z ** 3"))) <= set(statements(ast.parse(solution)))
