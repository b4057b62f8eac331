"""The machine that grades: the wire, the checks, the report card, and submissions that attack it."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from exercises import grading, worker

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "graders" / "demo"  # a chapter of two exercises
sys.path.append(str(ROOT / "tests" / "graders"))

from mutants import mutants  # noqa: E402

STUB = "    raise NotImplementedError\n"


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
    yield
    grading.end_zygotes()


def read(path):
    return path.read_text(encoding="utf-8")


# ---- the wire


def over_the_wire(value):
    blobs = []
    return worker.decode(json.loads(json.dumps(worker.encode(value, blobs))), blobs)


def test_plain_data_survives_the_wire():
    import torch

    values = [None, True, -(10**30), 0.1, float("inf"), "\ud800é", b"\0", [1, (2.5, {"a": [None]})], {(1, 2): {3}}]
    for value in values:
        assert over_the_wire(value) == value and type(over_the_wire(value)) is type(value)
    arrays = [np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T, np.array(3), np.array([True]), np.ones(2, ">f4")]
    tensors = [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor(3),
        torch.ones(2, requires_grad=True),
    ]
    for value in [*arrays, *tensors, np.float32(1.5)]:
        back = over_the_wire(value)
        assert back.dtype == value.dtype and back.shape == value.shape and grading.same(back, value)


def test_nothing_else_does():
    class Sub(np.ndarray):
        pass

    loop = []
    loop.append(loop)
    for value in [np.ones(2).view(Sub), object(), np.array([object()]), np.array(["a"]), print, type, Path()]:
        assert isinstance(over_the_wire(value), worker.Other)
    assert over_the_wire(loop)  # cut off where it is too deep
    for node in [["array", "O", [1], 0], ["array", "<f8", [2], 0], ["thing", 0, ""], [], ["plain", {}], ["int", 3]]:
        with pytest.raises(Exception):  # noqa: B017
            worker.decode(node, [b"12345678"])


# ---- checks


def message(got, want, **options):
    with pytest.raises(grading.Wrong) as caught:
        grading.expect(got, want, **options)
    return str(caught.value), *caught.value.details


def test_what_is_wrong_in_words():
    a = np.arange(6.0).reshape(2, 3)
    grading.expect(a + 1e-12, a)
    assert message(a[0], a, what="the output") == ("the output should have shape (2, 3), not (3,)",)
    assert message(a.astype(np.float32), a)[0] == "the result should be float64, not float32"
    grading.expect(a.astype(np.float32), a, dtype=False)
    assert message(None, a)[0] == "the result should be an array, not None; is there a `return`?"
    assert message(a.tolist(), a)[0] == "the result should be an array, not a list"
    wrong = a.copy()
    wrong[1, 2] = 5.5
    assert message(wrong, a) == (
        "wrong values in the result",
        "got     float64 array of shape (2, 3), 1 of 6 values wrong",
        "worst   5.5 at [1, 2], where 5 is right (off by 0.5)",
    )
    wrong[0, 1] = np.nan
    assert message(wrong, a)[0] == "1 NaN in the result, the first at [0, 1]"
    assert message([1, "b"], [1, "a"], what="ids")[0] == "ids[1] should be 'a', not 'b'"
    assert message([1], [1, 2], what="ids")[0] == "ids should have 2 elements, not 1"
    assert message({1: 2}, {1: 2, 3: 4})[0] == "the result has the wrong keys: [3] missing"
    assert message(True, 1)[0] == "the result should be a whole number, not True or False"
    assert message(0.3, 0.5, what="the loss")[0] == "the loss should be 0.5, not 0.3"
    grading.expect(np.int64(3), 3)
    grading.expect([np.float32(0.5)], [0.5])
    grading.expect(0, 0.0)
    assert message(0, 0.5)[0] == "the result should be 0.5, not 0" and "True or False" in message(False, 0.0)[0]
    assert message(a * 2, a, mistakes={"doubled": a * 2})[0] == "doubled"
    assert message(a.T, a, mistakes={"doubled": a * 2, "transposed": a.T})[0] == "transposed"


def test_a_mistake_that_is_right_is_the_grader_s():
    with pytest.raises(AssertionError, match="the grader cannot tell"):
        grading.expect(np.ones(2), np.ones(2), mistakes={"wrong axis": np.ones(2)})


def test_every_small_change_is_a_mutant():
    source = "def f(x, n=2):\n    '''Doc.'''\n    y = x[1:] + h(x, n)\n    return y\ndef h(x, k):\n    return x.max(axis=-1)\n"
    found = mutants(source, "f")
    wanted = {"f: x[1:] + h(x, n) -> x[1:] - h(x, n)", "f: x[1:] -> x[:]", "f: x[1:] -> x[2:]", "f: h(x, n) -> h(n, x)"}
    wanted |= {"f: drop y = x[1:] + h(x, n)", "h: x.max(axis=-1) -> x.max()", "h: x.max(axis=-1) -> x.max(axis=1)"}
    wanted |= {"h: x.max(axis=-1) -> x.min(axis=-1)", "f: x, n=2 -> x, n=3"}
    assert wanted <= set(found) and len(set(found.values())) == len(found) < 25
    assert all("Doc." in text for text in found.values()) and mutants(source, "f") == found


# ---- the call


def ask(source, name, *args, seconds=5, **kwargs):
    answer = grading.Answer(ROOT / "exercises" / "ex99_none.py", textwrap.dedent(source), name, seconds)
    try:
        return answer(*args, **kwargs)
    finally:
        answer.close()


def test_functions_objects_and_things():
    assert ask("def f(g): return g(2) + g(x=3)", "f", lambda x: 10 * x) == 50
    with pytest.raises(grading.Raised, match="KeyError"):
        ask("def f(g): return g()", "f", lambda: {}[1])
    filled = ask("import numpy as np\ndef f(g):\n    a = np.zeros(2)\n    g(a)\n    return a", "f", lambda a: a.fill(7))
    assert filled.tolist() == [7, 7]
    source = "class Box:\n    def __init__(self, n): self.n = n\n    def add(self, k): self.n += k; return self"
    answer = grading.Answer(ROOT / "exercises" / "ex99_none.py", source, "Box")
    box = answer(3)
    assert box.add(4).get("n") == 7 and box.kind == "Box"
    answer.close()


def test_refusals():
    source = "def f(x):\n    if x > 1: raise ValueError(f'{x} > 1')\n    return 1 / x"
    answer = grading.Answer(ROOT / "exercises" / "ex99_none.py", source, "f")
    assert answer.refuses(2, because="2 is too many") == "2 > 1"
    with pytest.raises(grading.Wrong, match="1 is too many, which should raise ValueError, but it returns 1.0"):
        answer.refuses(1, because="1 is too many")
    with pytest.raises(grading.Wrong, match="should raise ValueError, but it raises ZeroDivisionError"):
        answer.refuses(0)
    answer.close()


def test_a_callback_that_is_called_without_end():
    with pytest.raises(grading.Wrong, match="more than 50,000 times"):
        ask("def f(g):\n    while True: g()", "f", lambda: 0)


def test_what_was_returned_comes_back():
    answer = grading.Answer(ROOT / "exercises" / "ex99_none.py", "def f(x=0): return 1j if x else object()", "f")
    first = answer()
    with pytest.raises(grading.Wrong, match="an object of class object"):
        answer(first)
    answer.close()


def test_values_in_a_few_words():
    assert grading.describe(np.arange(6).reshape(2, 3)) == "array [[0, 1, 2], [3, 4, 5]]"
    assert grading.describe([np.float64(1.5), (np.int64(2),)]) == "[1.5, (2,)]"
    assert grading.describe(np.float64(0.1)) == "0.1" and grading.describe("a") == "'a'"
    assert grading.describe(np.ones((2, 8))) == "float64 array of shape (2, 8)"
    assert (
        message(np.array([1 + 1e-8]), np.ones(1))[2] == "worst   1.00000001 at [0], where 1.0 is right (off by 1e-08)"
    )


HUNT = """
def {name}(impl):
    {body}
"""


def test_a_hunt_cannot_tell_implementations_by_name_or_order():
    def named_right(x):
        return x

    def named_wrong(x):
        return -x

    def test(body):
        answer = grading.Answer(
            ROOT / "exercises" / "ex99_none.py", HUNT.format(name="hunt_sign", body=body), "hunt_sign"
        )
        return grading.grade(lambda a: grading.hunt(a, {"r": named_right}, {"w": named_wrong}), answer)

    assert test("assert impl(3) == 3") is None
    assert str(test("assert 'right' in impl.__name__")) == "your test fails r, which is correct: AssertionError"
    by_order = "import os; assert (os.getpid() - os.getppid()) % 2 == {}"
    assert any(test(by_order.format(k)) for _ in range(12) for k in (0, 1))


def test_what_an_answer_may_ask_of_our_functions():
    with pytest.raises(grading.Raised, match="at most 3,000 numbers"):
        ask("import numpy as np\ndef f(g): return g(np.zeros((60, 60)))", "f", lambda x: x)
    with pytest.raises(grading.Wrong, match="still running after 0.3 seconds"):
        ask(
            "import time\ndef f(g):\n    while True:\n        g()\n        time.sleep(0.03)",
            "f",
            lambda: 0,
            seconds=0.3,
        )


def test_large_whole_numbers_and_what_cannot_be_described():
    assert not grading.same(2**53, 2**53 + 1) and grading.same(2**70, 2**70)
    assert grading.describe(10**5000) == "a int"
    assert "\n" not in str(grading.Wrong("a\n\n38 of 38 points")) + grading.Wrong("a", "b\nc").details[0]


def test_arguments_changed_in_place():
    with pytest.raises(grading.Wrong, match="changes its argument `b` in place"):
        ask("def f(a, b): b[0] = 1; return a", "f", 1, np.zeros(2))
    with pytest.raises(grading.Wrong, match="changes its argument `b` in place"):
        ask("def f(a, b): b.append(1); return a", "f", 1, b=[])
    answer = grading.Answer(ROOT / "exercises" / "ex99_none.py", "def f(a): a += 1", "f")
    value, args, kwargs = answer.inplace(np.zeros(2))
    answer.close()
    assert (value, args[0].tolist(), kwargs) == (None, [1, 1], {})


def test_without_a_fork(monkeypatch):
    monkeypatch.setattr(grading, "FORK", False)
    assert ask("def f(x): return x + 1", "f", np.arange(2)).tolist() == [1, 2]
    with pytest.raises(grading.Wrong, match="still running after 0.3 seconds"):
        ask("def f(x):\n    while True: pass", "f", 1, seconds=0.3)
    with pytest.raises(grading.Wrong, match="status 3"):
        ask("import os\ndef f(x): os._exit(3)", "f", 1)


# ---- pytest exercises


def stubs(solutions):
    """The file of solutions without the answers."""
    module = ast.parse(solutions)
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            node.body[1:] = ast.parse("raise NotImplementedError").body
    return ast.unparse(module) + "\n"


@pytest.fixture
def course(tmp_path):
    """A course of one chapter, in a folder with a difficult name."""
    root = tmp_path / "mon café"
    for folder in ("exercises", "solutions"):
        (root / folder).mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "grading.py", "worker.py"):
        shutil.copy(ROOT / "exercises" / name, root / "exercises")
    (root / "exercises" / "ex02_attention.py").write_text(stubs(read(DEMO / "solutions.py")), encoding="utf-8")
    shutil.copy(DEMO / "grader.py", root / "exercises" / "test_ex02_attention.py")
    shutil.copy(DEMO / "solutions.py", root / "solutions" / "ex02_attention.py")
    shutil.copytree(ROOT / "nanogptx", root / "nanogptx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def graded(course, *options, env=None):
    """`pytest exercises`, from elsewhere: exit status, what it prints, the report."""
    report = course.parent / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(course / "exercises"), "--report", str(report), *options]
    # The plugins that happen to be installed take longer to load than there is to grade.
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name} | (env or {})
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    result = subprocess.run(command, cwd=course.parent, capture_output=True, text=True, env=env, encoding="utf-8")
    return result.returncode, result.stdout + result.stderr, json.loads(report.read_text()) if report.exists() else None


def scores(report):
    return {test["name"]: test["score"] for test in report["tests"]}


def solve(course, name, body, first=""):
    """Write an answer into the learner's file."""
    path = course / "exercises" / "ex02_attention.py"
    before, rest = read(path).split(f"def {name}(", 1)
    path.write_text(
        f"{first}{before}def {name}({rest.replace(STUB, textwrap.indent(body, '    ') + chr(10), 1)}", encoding="utf-8"
    )


def test_before_the_first_exercise(course):
    status, out, report = graded(course)
    assert status == 1 and report["score"] == 0 and len(out.splitlines()) < 16
    assert "Nothing is written yet: 3 points to earn" in out and "Traceback" not in out and "Error" not in out
    assert (
        "Next: open exercises/ex02_attention.py, write `softmax` (10 minutes, lesson 02 section 2), then: pytest" in out
    )


def test_a_failed_check(course):
    body = "print('\x1b[2J2 passed')\nreturn np.exp(x) / np.exp(x).sum()"
    solve(course, "softmax", body)
    status, out, report = graded(course, "--hints", "2")
    wanted = """
        ex02_attention softmax: the weights sum to 1 over the whole array, not along `axis`
            got     float64 array of shape (2, 3, 4), 24 of 24 values wrong
            worst   0.0507881 at [1, 1, 2], where 0.653047 is right (off by 0.602)
            call    softmax(float64 array of shape (2, 3, 4), axis=1)
            hint 1  exp makes every score positive; what must each be divided by so that they sum to 1 along the axis?
            hint 2  Adding a constant to all scores of a row changes nothing, so subtract one that keeps exp small.  (more: --hints 3)
            read    lesson 02 section 2
              | ?[2J2 passed
    """
    assert status == 1 and textwrap.dedent(wanted).strip() in out and "passed in" not in out
    assert "Next: open exercises/ex02_attention.py, mend `softmax`" in out and "1 wrong" in out and "1 to do" in out
    assert report["tests"][0]["status"] == "failed" and report["tests"][0]["output"] in out
    assert [test["max_score"] for test in report["tests"]] == [1, 2]


def test_tracebacks_only_on_request(course):
    solve(course, "softmax", "def inner(x):\n    return x / nothing\n\nreturn inner(x)")
    _, out, _ = graded(course)
    assert "it raises NameError: name 'nothing' is not defined" in out and "in softmax: return inner(x)" not in out
    _, out, _ = graded(course, "--traceback", "--hints", "0")
    assert "in softmax: return inner(x)" in out and "hint" not in out


def test_hints_before_a_first_try_only_on_request(course):
    assert "hint 1" not in graded(course)[1]
    assert "hint 2" in graded(course, "--hints", "2")[1]


def test_a_file_as_windows_saves_it(course):
    solve(course, "softmax", "e = np.exp(x - x.max(axis, keepdims=True))\nreturn e / e.sum(axis, keepdims=True)")
    path = course / "exercises" / "ex02_attention.py"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert graded(course, "-k", "softmax")[0] == 0


def test_no_time_is_a_mistake(course):
    status, out, report = graded(course, "--seconds", "0")
    assert status == 4 and "--seconds must be more than 0" in out and report is None


def test_an_interrupted_grading_reports_nothing(course):
    """Ctrl-C in the second exercise: half a report would look like a whole one."""
    solve(course, "hunt_is_causal", "while True: pass")
    report = course.parent / "report.json"
    command = [sys.executable, "-m", "pytest", str(course / "exercises"), "--report", str(report), "--seconds", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    for line in iter(lambda: process.stdout.read(1), ""):
        if line == "-":  # the first exercise is told to be to do
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    assert process.wait() == 2 and "The grading was interrupted" in out and not report.exists()


def test_solved_and_selected(course):
    solve(course, "softmax", "e = np.exp(x - x.max(axis, keepdims=True))\nreturn e / e.sum(axis, keepdims=True)")
    status, out, report = graded(course, "-k", "softmax")
    assert status == 0 and report["score"] == 1 and "1 of 1 points. All done." in out
    assert scores(graded(course)[2]) == {"02 softmax": 1, "02 hunt_is_causal": 0}
    for options in ((), ("-p", "xdist", "-n", "2")):
        status, out, report = graded(course, "--solutions", *options)
        assert status == 0 and report["score"] == 3 and "3 of 3 points. All done." in out


def test_files_that_cannot_be_loaded(course):
    path = course / "exercises" / "ex02_attention.py"
    cases = {
        b"def softmax(x, axis:": "ex02_attention.py, line 1: SyntaxError: '(' was never closed",
        b"import nothing_like_it": "ex02_attention.py, line 1: ModuleNotFoundError: No module named 'nothing_like_it'",
        b"\xff": "cannot be read: 'utf-8' codec",
        b"x = " + b"-" * 20_000 + b"1": "the file cannot be loaded",
        b"\n" * 1_000_001: "it is no file of at most 1 MB",
        None: "cannot be read",
    }
    for content, sentence in cases.items():
        path.write_bytes(content) if content is not None else path.unlink()
        status, out, report = graded(course)
        assert status == 1 and report["score"] == 0 and sentence in out and "Traceback" not in out
    path.write_text("x = 1")
    assert "ex02_attention.py has no function `softmax`" in graded(course)[1]


def test_a_report_that_cannot_be_written(course):
    status, out, _ = graded(course, "--report", str(course / "no" / "r.json"))
    assert status == 4 and "there is no folder" in out and "Traceback" not in out


# ---- attacks: a chapter each, beside an honest one

AT_IMPORT = {
    "exit": "import os\nos._exit(0)",
    "quit": "raise SystemExit(0)",
    "loop": "while True:\n    pass",
    "recursion": "def f():\n    f()\nf()",
    "memory": "x = bytearray(10**11)",
    "flood": "while True:\n    print('1 passed ' * 1000)",
    "conftest": "open(__file__.replace('ex', 'conftest'), 'w').write('')",
    "solution": "from solutions.ex02_attention import *",
    "component": "from nanogptx.attention import attention as softmax",
}
IN_AN_ANSWER = {
    "forged": """
        import sys
        def softmax(x, axis):
            child = sys._getframe(1).f_locals["self"]
            for value in (["plain", True], ["array", "<f8", [1], 0], ["thing", 7, "x"]):
                child.reply({"value": value, "after": [["list", []], ["dict", []]]}, [b"12345678"])
            child.reply({"error": [], "message": 3})""",
    "noise": """
        import os
        def softmax(x, axis):
            for handle in range(3, 99):
                try:
                    os.write(handle, b"\\0" * 99999)
                except OSError:
                    pass""",
    "orphans": """
        import ctypes, time
        def softmax(x, axis):
            for _ in range(5):
                if ctypes.CDLL(None).fork() == 0:
                    ctypes.CDLL(None).setsid()
                    ctypes.CDLL(None).fork()
                    time.sleep(600)
            return x""",
    "patricide": """
        import ctypes, os
        def softmax(x, axis):
            ctypes.CDLL(None).kill(os.getppid(), 9)
            return x""",
    "stealth": """
        import builtins, numpy as np, pytest
        np.ndarray = np.isfinite = np.abs = builtins.AssertionError = None
        pytest.main = builtins.print = builtins.isinstance = lambda *a, **k: True
        def softmax(x, axis):
            return x""",
}


@pytest.mark.skipif(not grading.FORK, reason="memory is limited and orphans are ended on Linux only")
def test_attacks(course):
    folder = course / "exercises"
    solve(course, "softmax", "e = np.exp(x - x.max(axis, keepdims=True))\nreturn e / e.sum(axis, keepdims=True)")
    honest, grader = read(folder / "ex02_attention.py"), read(folder / "test_ex02_attention.py")
    attacks = AT_IMPORT | {name: textwrap.dedent(code) for name, code in IN_AN_ANSWER.items()}
    for number, (name, code) in enumerate(attacks.items(), 10):
        (folder / f"ex{number}_{name}.py").write_text(f"{honest}\n{code}\n", encoding="utf-8")
        (folder / f"test_ex{number}_{name}.py").write_text(grader, encoding="utf-8")
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file() and ".py" == path.suffix}
    status, out, report = graded(course, "--seconds", "2", env={"GRADED_BY": "test_attacks"})
    expected = {
        f"{number} {name}": 0 for number in range(10, 10 + len(attacks)) for name in ("softmax", "hunt_is_causal")
    }
    assert scores(report) == {"02 softmax": 1, "02 hunt_is_causal": 0} | expected
    assert status == 1 and "INTERNAL" not in out and re.search(r"\b1 passed", out.splitlines()[-1])
    assert {path: path.read_bytes() for path in course.rglob("*.py")} == before
    assert running("GRADED_BY=test_attacks") == []


def running(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if mark.encode() in path.read_bytes() else []
        except OSError:
            pass
    return found
