"""The lessons' texts, components and notebooks say the same thing, and the machine that makes them so can be trusted."""

import ast
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
import test_house as house

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("lessons_build", ROOT / "lessons/build.py")
sys.modules[spec.name] = build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

NOTEBOOKS = sorted((ROOT / "lessons").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def printed(cell):
    """All that a cell shows as text."""
    texts = [output.get("text", "") + output.get("evalue", "") for output in cell.get("outputs", ())]
    return "\n".join(texts + [str(text) for data in shown(cell) for kind, text in data.items() if "image/" not in kind])


def shown(cell):
    return [output.data for output in cell.get("outputs", ()) if "data" in output]


# ----------------------------------------------------------------------------------------------------------------------
# The committed notebooks


def test_nothing_differs_from_the_texts():
    problems = build.check()
    assert not problems, "\n\n".join(problems)


PLACES = {re.escape(str(place)) for place in (ROOT, Path.home(), tempfile.gettempdir(), sys.prefix)}
UNWANTED = {
    r" at 0x[0-9a-f]+": "prints an object's address",
    r"ipykernel_\d|<ipython-input": "prints a path of the kernel",
    rf"(?<![\w.])({'|'.join(PLACES)})/|{house.MACHINES}": "prints a path of this machine",
    r"\d\.\d{5,}": "prints more than 4 decimals",
    r"grad_fn=": "prints a tensor with its grad_fn",
}


def faults_of_outputs(cell):
    if "skip-execution" in tags(cell) and cell.outputs:
        yield "is not executed and has outputs"
    if any(output.output_type == "error" for output in cell.outputs) and "raises-exception" not in tags(cell):
        yield "raises an exception"
    if any(output.get("name") == "stderr" for output in cell.outputs):
        yield "writes to stderr"
    for pattern, fault in UNWANTED.items():
        if re.search(pattern, printed(cell)):
            yield fault
    for output in cell.outputs:
        if "<Figure size" in str(output.get("data", {}).get("text/plain")) and "image/png" not in output.data:
            yield "has lost its picture"
        if "image/png" in output.get("data", {}):
            if len(build.alt(cell).split()) < 4:
                yield "draws a figure and does not begin with '# figure: WHAT IT SHOWS'"
            elif output.metadata.get("image/png", {}).get("alt") != build.alt(cell):
                yield "has lost its figure's description"


def faults_of_prose(text):
    if re.search(r"!\[\s*\]\(", text):
        yield "an image without a description"
    if re.search(r"!\[[^]]*\]\(https?:|<img[^>]*https?:", text):
        yield "an image that needs a network"
    if re.search(r"^(```|:::)\{|\{[a-z-]+\}`", text, re.MULTILINE):
        yield "a directive or role of MyST, which Jupyter shows as it is"
    if re.search(r"\b(TODO|FIXME|XXX)\b", text):
        yield "something left to do"
    for name in re.findall(r"(?<![\w/.])(?:nanogptx|tests|lessons|exercises|solutions)/[\w/]+\.\w+", text):
        if not (ROOT / name).exists():
            yield f"{name}, which is not there"


def faults_of_headings(nb):
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    levels = [
        len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    ]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "a lesson has one title"
    if any(below > above + 1 for above, below in zip(levels, levels[1:])):
        yield "a heading skips a level"


def faults_of_imports(name, nb):
    """A lesson takes earlier chapters' components, and not the one it builds: its reader builds that."""
    earlier = house.CHAPTERS[: house.CHAPTERS.index(name[3:])] if name[3:] in house.CHAPTERS else []
    for cell in code_cells(nb)[1:]:
        if "raises-exception" in tags(cell):
            continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            yield "a cell that is not plain Python"
            continue
        for other in sorted(house.imported(tree) - {*earlier, *house.LEAVES, *house.LAB}):
            yield f"a cell that imports nanogptx.{other}, which comes no earlier"


def faults_of_notebook(name, text):
    """All that is wrong with a committed notebook, which nbval would let pass."""
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    cells = code_cells(nb)
    run = [cell for cell in cells if "skip-execution" not in tags(cell)]
    if [cell.execution_count for cell in run] != list(range(1, len(run) + 1)):
        yield "was not executed as a whole, from its first cell to its last"
    if text != build.dumps(build.normalise(copy.deepcopy(nb))):
        yield "was written by something else than the build"
    if len(text.encode()) >= 1_500_000:
        yield "is larger than 1.5 MB"
    compared = [cell for cell in run if "nbval-ignore-output" not in tags(cell)]
    if len(cells) - len(compared) > len(cells) / 10:
        yield f"compares only {len(compared)} of its {len(cells)} cells"
    for cell in cells:
        yield from (f"{cell.source.splitlines()[0]!r}: {fault}" for fault in faults_of_outputs(cell))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            yield from (f"holds {fault}: {cell.source[:40]!r}" for fault in faults_of_prose(cell.source))
    yield from faults_of_headings(nb)
    yield from (f"holds {fault}" for fault in faults_of_imports(name, nb))


@each_notebook
def test_committed_as_built(path):
    assert list(faults_of_notebook(path.stem, path.read_text(encoding="utf-8"))) == []


@pytest.mark.skipif(not NOTEBOOKS or not importlib.util.find_spec("ruff"), reason="needs notebooks and ruff")
def test_ruff_finds_nothing_in_the_cells():
    """... but that imports stand where they are first needed, class X(X) defines X again, and figures need long words."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=concise",
        "--ignore=E402,E501,F811",
    ]
    command += ["--config", str(ROOT / "pyproject.toml"), *map(str, NOTEBOOKS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def flipped(path):
    """The notebook up to the first cell that prints a number, and that number's first digit changed."""
    nb = nbformat.read(path, 4)
    for k, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or tags(cell):
            continue
        for output in cell.outputs:
            holder, key = (output, "text") if "text" in output else (output.get("data", {}), "text/plain")
            text = build.essence(holder.get(key, ""))
            if (digit := re.search(r"\d", text)) and "<Figure" not in text:
                other = str((int(digit[0]) + 5) % 10)
                holder[key] = text[: digit.start()] + other + text[digit.end() :]
                nb.cells = nb.cells[: k + 1]
                return nb
    raise AssertionError(f"{path.name} prints no number at all")


@each_notebook
def test_a_digit_in_a_saved_output_matters(path, tmp_path):
    """The cells before it pass, and its own fails because the outputs differ."""
    bring_the_machine(tmp_path)
    nb = flipped(path)
    (tmp_path / "lessons" / path.name).write_text(build.dumps(nb), encoding="utf-8")
    result = nbval(tmp_path, "lessons", PYTHONPATH=str(ROOT))
    assert f"1 failed, {len(code_cells(nb)) - 1} passed" in result.stdout, result.stdout
    assert "Cell outputs differ" in result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# A house with small lessons, for the machine itself


def bring_the_machine(root):
    """Everything that lessons are run with, but the lessons."""
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "lessons/src").mkdir(parents=True)
    (root / "nanogptx").mkdir()
    for name in "build.py", "conftest.py", "nbval_sanitize.cfg", "matplotlibrc", "guard":
        (shutil.copytree if name == "guard" else shutil.copy)(ROOT / "lessons" / name, root / "lessons" / name)


def nbval(root, *arguments, cwd=None, **env):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--nbval", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(command, cwd=cwd or root, env=env, capture_output=True, text=True)


def code(source, *names):
    label = f":tags: [{', '.join(names)}]\n\n" if names else ""
    return f"```{{code-cell}}\n{label}{source}\n```\n"


HEAD = "---\nkernelspec:\n  display_name: Python 3\n  language: python\n  name: python3\n---\n\n"
FIRST = code('# nanogptx/one.py\n"""One."""\n\nimport math')
CLASS = code('# nanogptx/one.py\nclass One:\n    """A number."""\n\n    def get(self):\n        return 1')
MORE = code("# nanogptx/one.py\nclass One(One):\n    def twice(self):\n        return math.floor(2.5)")
LAST = code("# nanogptx/one.py\ndef main():\n    print(One().twice())")
RUN = code('# nanogptx/one.py\nif __name__ == "__main__":\n    main()', "skip-execution")
ONE = [FIRST, CLASS, code("One().get()"), MORE, LAST, RUN, code("main()  # says 2")]


def write_lesson(root, name="01_one", cells=ONE, title="# 1. One\n\nText.\n"):
    (root / f"lessons/src/{name}.md").write_text("\n".join([HEAD + title, *cells]), encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    bring_the_machine(tmp_path)
    return tmp_path


@pytest.fixture
def told(root, monkeypatch):
    """What is wrong with a lesson of these cells, with no need to execute it: build and check say the same."""

    def told(*cells, **lesson):
        write_lesson(root, cells=cells, **lesson)
        monkeypatch.setattr(build, "execute", lambda *_: pytest.fail("what is wrong must not be executed"))
        found = build.build(root)
        assert build.check(root) == found
        return "\n".join(found)

    return told


COMPONENT = '''# Built by lessons/src/01_one.md: change it there, then run python lessons/build.py build 01
"""One."""

import math


class One:
    """A number."""

    def get(self):
        return 1

    def twice(self):
        return math.floor(2.5)


def main():
    print(One().twice())


if __name__ == "__main__":
    main()
'''


def test_cells_make_a_component(root):
    write_lesson(root)
    (lesson,) = build.load(root)
    assert build.joined(build.tangle(lesson)) == COMPONENT
    assert build.faults([lesson], root) == []


def test_a_class_goes_on_at_its_end_and_not_at_the_component_s(root):
    write_lesson(root, cells=[FIRST, CLASS, LAST, MORE, code("# nanogptx/one.py\nclass One(One):\n    size = 3")])
    (lesson,) = build.load(root)
    text = build.joined(build.tangle(lesson))
    assert text.index("    def twice") < text.index("\n    size = 3\n\n\ndef main")
    names = {}
    exec(text, names)
    assert names["One"]().twice() == 2 and names["One"].size == 3 and names["One"].__doc__ == "A number."


def test_one_blank_line_between_imports_and_constants(root):
    write_lesson(root, cells=[FIRST, code("# nanogptx/one.py\n# A part\n\nx = math.pi"), LAST])
    (lesson,) = build.load(root)
    assert "import math\n\n# A part\n\nx = math.pi\n\n\ndef main" in build.joined(build.tangle(lesson))
    assert build.faults([lesson], root) == []


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([FIRST, MORE], "class One(One) extends a class One that is not there"),
        ([CLASS, code("# nanogptx/one.py\nclass One(One):\n    x = 1\n\n\ny = 2")], "holds nothing else"),
        ([FIRST, code("# nanogptx/one.py\ndef f(:\n    pass")], "md:21: nanogptx/one.py does not parse"),
        (
            [LAST, code("# nanogptx/one.py\ndef main():\n    pass")],
            "md:20: nanogptx/one.py defines main a second time; the first is at lessons/src/01_one.md:14",
        ),
        (
            [CLASS, code("# nanogptx/one.py\nclass One(One):\n    def get(self):\n        return 2")],
            "defines One.get a sec",
        ),
        ([code("# nanogptx/one.py\nx = 1"), code("# nanogptx/one.py\nx: int = 2")], "defines x a second time"),
        ([FIRST, code("# nanogptx/one.py\nx  =  1")], "md:21: nanogptx/one.py is not as ruff formats it"),
        ([code("# nanogptx/two.py\nx = 1")], "md:13: '# nanogptx/two.py' is not '# nanogptx/one.py'"),
        ([code("#nanogptx/one.py\nx = 1")], "'#nanogptx/one.py' is not '# nanogptx/one.py'"),
        ([code("x = 1", "nbval-ignore-output")], "md:15: nbval-ignore-output needs a reason"),
        ([code("x = 1\n# NBVAL_IGNORE_OUTPUT")], "by tags, not by comments"),
        ([code("len('abc');")], "md:13: nbval does not know that a semicolon"),
        ([code("x = 1", "timings")], "tag timings is not known; there are experiment, hide-input,"),
    ],
)
def test_a_mistake_is_told_with_its_place(told, cells, expected):
    assert expected in told(*cells)


def test_places_of_mistakes_are_lines_of_the_text(root):
    write_lesson(root)
    (lesson,) = build.load(root)
    lines = lesson.text.splitlines()
    for cell in lesson.code():
        number = int(lesson.where(cell).split(":")[1])
        assert lines[number - 1] == cell.source.splitlines()[0]


def test_what_may_be_defined_twice(told, root, monkeypatch):
    pair = "    @property\n    def x(self):\n        return 1\n\n    @x.setter\n    def x(self, value):\n        pass"
    write_lesson(root, cells=[code(f"# nanogptx/one.py\nclass One:\n{pair}")])
    assert build.faults(build.load(root), root) == []


def test_a_lesson_has_a_title_and_a_name(told):
    assert "01_one.md: a lesson begins with its title" in told(FIRST, title="Text.\n")
    assert "1_two.md: a lesson is called NN_name.md" in told(FIRST, name="1_two")


def test_lessons_do_not_share(told, root):
    write_lesson(root, "02_one")
    assert told(*ONE) == "lessons/src/02_one.md and lessons/src/01_one.md both build nanogptx/one.py"
    (root / "lessons/src/02_one.md").rename(root / "lessons/src/01_two.md")
    assert "lessons/src/01_two.md and lessons/src/01_one.md have the same number" in told(*ONE)


def test_what_a_lesson_that_is_gone_leaves_behind(told, root):
    (root / "nanogptx/gone.py").write_text(COMPONENT.replace("01_one", "03_gone"))
    (root / "nanogptx/hand.py").write_text('"""Written by hand."""\n')
    (root / "lessons/04_old.ipynb").write_text("{}")
    first, second = told(*ONE).splitlines()
    assert first.startswith("lessons/04_old.ipynb has no text lessons/src/04_old.md")
    assert second.startswith("nanogptx/gone.py was built by lessons/src/03_gone.md, which builds it no more")


def test_an_unknown_number_is_told(root, capsys):
    write_lesson(root)
    assert build.main(["build", "07"], root) == 2
    assert capsys.readouterr().err == "error: there is no lesson 07 in lessons/src\n"


# ----------------------------------------------------------------------------------------------------------------------
# ... that are executed


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


PLOT = """# figure: a line that rises
# from one to three
import matplotlib.pyplot as plt

plt.plot([1, 2, 3])
plt.show()"""
MEASURED = 'import time\n\nprint(f"{time.perf_counter():.3f}")'
LIVELY = [
    *ONE,
    code("[0.25, 7]"),
    code(PLOT),
    code(MEASURED, "timing"),
    code('print(f"loss 2.31 in {time.perf_counter():.1f} s")'),
    code('raise ValueError("0.25 of it")', "raises-exception"),
    code('import os\n\n_ = os.system("echo from a shell")'),
    code("import sys\n\nprint(sys.warnoptions)"),
    code("# not compared: the clock\nround(time.perf_counter(), 3)", "nbval-ignore-output"),
]


def test_a_second_build_changes_nothing(root, capsys):
    write_lesson(root, cells=LIVELY)
    assert build.main(["build"], root) == 0 and build.main(["check"], root) == 0
    before = files(root)
    assert before["nanogptx/one.py"].decode() == COMPONENT
    capsys.readouterr()
    assert build.main(["build", "01"], root) == 0
    assert files(root) == before
    out = capsys.readouterr().out
    assert re.fullmatch(r"unchanged nanogptx/one.py \nunchanged lessons/01_one.ipynb \(\d+\.\d s\)\n", out)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A house with a built lesson; copied by those who change it."""
    root = tmp_path_factory.mktemp("built")
    bring_the_machine(root)
    write_lesson(root, cells=LIVELY)
    assert build.build(root) == []
    return root


@pytest.fixture
def house_of_one(built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def read(root, name="01_one"):
    return nbformat.read(root / f"lessons/{name}.ipynb", 4)


def save(root, nb, name="01_one"):
    (root / f"lessons/{name}.ipynb").write_text(build.dumps(nb), encoding="utf-8")


def cell_with(nb, text):
    return next(cell for cell in nb.cells if text in cell.source)


def test_what_a_notebook_holds(built):
    nb = read(built)
    assert nb.cells[0].source.startswith("# 1. One\n\nRun it in [Colab](https://colab.research.google.com/github/")
    (address,) = house.project()["urls"].values()
    assert nb.cells[1].source.endswith(f"%pip install -q git+{address}") and nb.cells[1].outputs == []
    assert tags(cell_with(nb, "says 2")) == [] and tags(cell_with(nb, "__main__")) == ["skip-execution", "nbval-skip"]
    assert tags(cell_with(nb, "perf_counter():.3f")) == ["timing", "nbval-ignore-output"]
    figure = cell_with(nb, "# figure:")
    described = {"alt": "a line that rises from one to three"}
    assert figure.metadata == {"mystnb": {"image": described}}
    code = "".join(cell.source for cell in nb.cells[: nb.cells.index(figure) + 1] if cell.cell_type == "code")
    digest = hashlib.sha1(code.encode()).hexdigest()[:8]
    assert figure.outputs[0].metadata == {"image/png": described | {"of": digest}}
    assert printed(cell_with(nb, "os.system")).split("\n")[0] == "from a shell"
    assert printed(cell_with(nb, "warnoptions")).split("\n")[0] == "[]"
    assert cell_with(nb, "of it").outputs[0].traceback == ["ValueError: 0.25 of it"]
    text = (built / "lessons/01_one.ipynb").read_text(encoding="utf-8")
    assert list(faults_of_notebook("01_one", text)) == ["compares only 13 of its 16 cells"]


def stripped(nb):
    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None


def say(text, name="stdout"):
    return lambda nb: cell_with(nb, "says 2").outputs.append(nbformat.v4.new_output("stream", name=name, text=text))


def retag(nb):
    cell_with(nb, "of it").metadata = {}


def lose(kind):
    return lambda nb: cell_with(nb, "# figure:").outputs[0].data.pop(kind)


def undescribed(nb):
    cell_with(nb, "# figure:").outputs[0].metadata = {}


def rewrite(old, new):
    def change(nb):
        cell = cell_with(nb, old)
        cell.source = cell.source.replace(old, new)

    return change


def another_picture(nb):
    """One of older code: the digest is not that of the cells above it."""
    (about,) = [
        o.metadata["image/png"] for cell in code_cells(nb) for o in cell.outputs if "image/png" in o.get("data", {})
    ]
    about["of"] = "01234567"


def say_unexecuted(nb):
    cell_with(nb, "__main__").outputs = [nbformat.v4.new_output("stream", text="accuracy: 99%")]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (stripped, "was not executed as a whole"),
        (lambda nb: code_cells(nb)[3].update(execution_count=9), "was not executed as a whole"),
        (lambda nb: nb.metadata.update(author="me"), "was written by something else than the build"),
        (retag, "raises an exception"),
        (say("oh", "stderr"), "writes to stderr"),
        (say("<One at 0x7f0012>"), "prints an object's address"),
        (say("ipykernel_12/3.py"), "prints a path of the kernel"),
        (say(f"{ROOT}/README.md"), "prints a path of this machine"),
        (say("0.12345"), "prints more than 4 decimals"),
        (say("tensor(1., grad_fn=<AddBackward0>)"), "prints a tensor with its grad_fn"),
        (say("x" * 1_500_000), "is larger than 1.5 MB"),
        (lose("image/png"), "has lost its picture"),
        (undescribed, "has lost its figure's description"),
        (another_picture, "was written by something else than the build"),
        (say_unexecuted, "is not executed and has outputs"),
        (rewrite("# figure: a line that rises", "# figure:"), "does not begin with '# figure: WHAT IT SHOWS'"),
        (rewrite("Text.", "![](a.png)"), "holds an image without a description"),
        (rewrite("Text.", "![a](https://a.b/c.png)"), "holds an image that needs a network"),
        (rewrite("Text.", "See {ref}`there`."), "holds a directive or role of MyST"),
        (rewrite("Text.", "```{note}\nx\n```"), "holds a directive or role of MyST"),
        (rewrite("Text.", "TODO: more"), "holds something left to do"),
        (rewrite("Text.", "See nanogptx/nothing.py."), "holds nanogptx/nothing.py, which is not there"),
        (rewrite("Text.", "# Another\n"), "a lesson has one title"),
        (rewrite("Text.", "### Deep\n"), "a heading skips a level"),
        (rewrite("import os", "%time"), "holds a cell that is not plain Python"),
        (rewrite("import os", "import nanogptx.train"), "imports nanogptx.train, which comes no earlier"),
    ],
)
def test_a_fault_of_a_notebook_is_found(built, change, fault):
    nb = read(built)
    change(nb)
    assert any(fault in found for found in faults_of_notebook("01_one", build.dumps(nb)))


def test_times_are_measured_anew_when_their_cell_changes(house_of_one):
    old = printed(cell_with(read(house_of_one), "perf_counter():.3f"))
    text = house_of_one / "lessons/src/01_one.md"
    text.write_text(text.read_text().replace(MEASURED, MEASURED + "  # again"))
    assert build.build(house_of_one) == []
    assert printed(cell_with(read(house_of_one), "perf_counter():.3f")) != old


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "nanogptx/one.py",
            "return 1",
            "return 3",
            ["nanogptx/one.py is not what", "-        return 1\n+        return 3"],
        ),
        ("nanogptx/one.py", "A number.", "The number.", ["nanogptx/one.py is not what", '+    """The number."""']),
        ("nanogptx/one.py", "\n\ndef main", "\n\nx = 1\n\n\ndef main", ["nanogptx/one.py is not what", "+x = 1"]),
        (
            "lessons/src/01_one.md",
            "return 1",
            "return 3",
            ["lessons/01_one.ipynb is not what", "nanogptx/one.py is not what"],
        ),
        ("lessons/src/01_one.md", "Text.", "Words.", ["lessons/01_one.ipynb is not what", "-Text.\n+Words."]),
        (
            "lessons/src/01_one.md",
            "[timing]",
            "[hide-input]",
            ["-code [timing, nbval-ignore-output]\n+code [hide-input]"],
        ),
        ("lessons/01_one.ipynb", "Text.", "Words.", ["lessons/01_one.ipynb is not what", "-Words.\n+Text."]),
        ("lessons/01_one.ipynb", "return 1", "return 3", ["lessons/01_one.ipynb is not what", "-        return 3"]),
    ],
)
def test_drift_is_shown(house_of_one, capsys, file, old, new, expected):
    assert build.check(house_of_one) == []
    edit(house_of_one / file, old, new)
    before = files(house_of_one)
    assert build.main(["check"], house_of_one) == 1
    out = capsys.readouterr().out.replace("--- code", "code")
    assert all(part in out for part in expected) and out.count(" is not what ") == len(
        [e for e in expected if "is not" in e] or [1]
    )
    assert files(house_of_one) == before


def test_a_file_that_is_missing_is_drift(house_of_one):
    (house_of_one / "nanogptx/one.py").unlink()
    (house_of_one / "lessons/01_one.ipynb").unlink()
    assert [problem.split(" is not")[0] for problem in build.check(house_of_one)] == [
        "lessons/01_one.ipynb",
        "nanogptx/one.py",
    ]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (code("x = 1\n1 / 0"), "lessons/src/01_one.md:13: ZeroDivisionError: division by zero"),
        (code("x = 1", "raises-exception"), "md:15: is tagged raises-exception and raises nothing"),
        (code("import os\n\nos._exit(1)"), "md:13: the kernel died"),
        (code("import time\n\ntime.sleep(30)"), "md:13: takes more than 1 seconds"),
    ],
)
def test_a_cell_that_fails_leaves_the_old_notebook(root, capsys, monkeypatch, cell, expected):
    monkeypatch.setattr(build, "TIMEOUT", 1)
    (root / "lessons/01_one.ipynb").write_text("old")
    write_lesson(root, cells=[cell])
    write_lesson(root, "02_two", cells=[code("2")])
    assert build.main(["build"], root) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{expected}; lessons/01_one.ipynb stays as it was" in error
    assert (root / "lessons/01_one.ipynb").read_text() == "old"
    assert (root / "lessons/02_two.ipynb").exists(), "the other lessons are built"


# ----------------------------------------------------------------------------------------------------------------------
# Recorded results


SCALE = code("import os\n\nSIZE = 3\n\n\ndef measure(n):\n    return n * One().twice() / SIZE", "experiment")
RECORD = code(
    'results = {"thirds": [measure(n) for n in range(3)], "threads": os.environ["OMP_NUM_THREADS"]}', "record"
)


@pytest.fixture
def recording(root):
    """A house whose lesson has an experiment, before it was run."""
    write_lesson(root, cells=[FIRST, CLASS, MORE, SCALE, RECORD, code("measure(3)")])
    (root / "nanogptx/__init__.py").touch()
    return root


def test_a_record_holds_results_command_and_code(recording, capsys):
    assert build.main(["record", "1"], recording) == 0
    made = json.loads((recording / "nanogptx/assets/one.json").read_text())
    assert made["results"] == {"thirds": [0, 0.6667, 1.333], "threads": "1"}
    assert made["command"] == "python lessons/build.py record 01"
    assert build.main(["build"], recording) == 0 and build.main(["check"], recording) == 0
    before = files(recording)
    assert build.main(["record", "01"], recording) == 0 and files(recording) == before
    cell = cell_with(read(recording), "results = ")
    assert cell.execution_count is None and not cell.outputs and {"skip-execution", "nbval-skip"} <= set(tags(cell))
    assert printed(cell_with(read(recording), "measure(3)")).strip() == "2.0"
    capsys.readouterr()
    edit(recording / "lessons/src/01_one.md", "SIZE = 3", "SIZE = 4")
    assert build.main(["check"], recording) == 1
    assert "nanogptx/assets/one.json is not from the experiment in lessons/src/01_one.md" in capsys.readouterr().out


def test_prose_and_other_cells_are_no_part_of_the_record(recording):
    assert build.main(["record", "01"], recording) == 0 and build.main(["build"], recording) == 0
    edit(recording / "lessons/src/01_one.md", "Text.", "Words.")
    edit(recording / "lessons/src/01_one.md", "measure(3)", "measure(6)")
    edit(recording / "lessons/src/01_one.md", "SIZE = 3\n", "SIZE = 3\n# a comment\n")
    assert not [problem for problem in build.check(recording) if "assets" in problem]


def test_an_experiment_that_fails_leaves_the_old_results(recording, capfd):
    (recording / "nanogptx/assets").mkdir()
    (recording / "nanogptx/assets/one.json").write_text("old")
    edit(recording / "lessons/src/01_one.md", "/ SIZE", "/ 0")
    assert build.main(["record", "01"], recording) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "lessons/src/01_one.md: the experiment fails; nanogptx/assets/one.json stays as it was" in error
    assert (recording / "nanogptx/assets/one.json").read_text() == "old"


def test_what_cannot_be_recorded_is_told(root, capsys):
    write_lesson(root)
    assert build.main(["record", "01"], root) == 2 and build.main(["record", "07"], root) == 2
    error = capsys.readouterr().err
    assert "01_one.md records nothing: no cell of it is tagged record" in error and "there is no lesson 07" in error


# ----------------------------------------------------------------------------------------------------------------------
# nbval


def test_nbval_passes_what_was_built_from_any_directory(built, tmp_path):
    """... and neither what the caller has set nor what the clock says matters."""
    result = nbval(built, str(built / "lessons"), cwd=tmp_path, MPLBACKEND="agg", PYTHONWARNINGS="error")
    assert "15 passed, 1 skipped" in result.stdout, result.stdout


def test_nbval_sees_every_other_difference(house_of_one):
    """And decimals pass that differ by one in their last place, since CPUs do."""
    nb = read(house_of_one)
    cell_with(nb, "says 2").outputs[0].text = "3\n"
    cell_with(nb, "loss 2.31").outputs[0].text = "loss 2.32 in 77.7 s\n"
    cell_with(nb, "[0.25, 7]").outputs[0].data["text/plain"] = "[0.26, 7]"
    cell_with(nb, "0.25 of it").outputs[0].evalue = "0.27 of it"
    cell_with(nb, "from a shell").outputs = []
    save(house_of_one, nb)
    result = nbval(house_of_one, "lessons", "-rA")
    failed = {int(number) for number in re.findall(r"^FAILED .*Cell (\d+) - ", result.stdout, re.MULTILINE)}
    cells = code_cells(nb)
    assert failed == {k for k, cell in enumerate(cells) if re.search(r"says 2|of it|shell", cell.source)}


@pytest.mark.parametrize(
    ("saved", "run", "same"),
    [
        ("loss 0.14", "loss 0.13", True),
        ("loss 0.15", "loss 0.13", False),
        ("-0.00  1.50", " 0.00  1.49", True),
        ("[0.5, 0.25]", "[0.5, 0.26]", True),
        ("0.5", "0.50", False),
        ("3 steps", "4 steps", False),
        ("1.0 a", "1.0 b", False),
        ("9.99", "10.00", True),
        ("1.5 2.5", "1.5", False),
        ("a 1.5\nb 2.5\n", "a 1.5 b 2.5\n", False),
    ],
)
def test_how_near_is_near(built, saved, run, same):
    spec = importlib.util.spec_from_file_location("lessons_conftest", ROOT / "lessons/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert conftest.nearly(saved, run) is same


def test_only_measured_times_are_sanitised():
    assert build.essence({"text": "in 1.23 s, in 5 ms, in 0.1 us."}) == {"text": "in TIME, in TIME, in TIME."}
    for text in "in 12 steps", "within 3 s", "in 2.5 nats", "1.23 s", "in 3 s1":
        assert build.essence([text]) == [text]


def test_a_slow_cell_and_another_nbval_are_told(root):
    write_lesson(root, cells=[code("import time"), code("time.sleep(2)"), code("1 / 0", "raises-exception")])
    assert build.build(root) == []
    edit(root / "lessons/conftest.py", "SECONDS = 20", "SECONDS = 0.2")
    result = nbval(root, "lessons")
    assert "1 failed, 3 passed" in result.stdout and re.search(r"the cell took \d s, and a cell has 0.2", result.stdout)
    edit(root / "lessons/conftest.py", '"compare_outputs", None', '"compare_gone", None')
    result = nbval(root, "lessons")
    assert result.returncode == 4
    assert result.stderr.startswith("ERROR: lessons/conftest.py knows nbval 0.11 from the inside, and this is 0.11")


CAPABILITY = """import os

import numpy
import torch

print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), os.environ["OPENBLAS_NUM_THREADS"])
print([name for name in ("X86_V3", "X86_V4") if numpy._core._multiarray_umath.__cpu_features__.get(name)])"""


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in build.PINS, reason="only x86 CPUs differ that much")
def test_the_pins_reach_the_kernels_and_only_them(root):
    """... of the build and of nbval, whose process also runs the tests; LESSONS_NATIVE takes the pins out."""
    write_lesson(root, cells=[code(CAPABILITY)])
    assert build.build(root) == []
    assert printed(cell_with(read(root), "torch")) == "DEFAULT 1 1\n[]\n"
    (root / "tests").mkdir()
    outside = (
        "import os\n\n\ndef test_outside():\n    assert not {'ATEN_CPU_CAPABILITY', 'MKL_CBWR'} & os.environ.keys()\n"
    )
    (root / "tests/test_outside.py").write_text(outside)
    env = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    result = nbval(root, "-n", "2", "--dist", "loadfile", **env)
    assert "3 passed" in result.stdout, result.stdout
    result = nbval(root, "lessons", LESSONS_NATIVE="1", ATEN_CPU_CAPABILITY="avx2", **env)
    assert "1 failed, 1 passed" in result.stdout and "AVX2 2 2" in result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# The book


def test_the_book_describes_its_figures_and_loads_nothing_from_outside(house_of_one):
    pytest.importorskip("sphinx_book_theme")
    shutil.copytree(ROOT / "lessons/book", house_of_one / "lessons/book")
    shutil.copy(ROOT / "lessons/index.md", house_of_one / "lessons")
    (house_of_one / "build/mathjax").mkdir(parents=True)
    (house_of_one / "build/mathjax/tex-svg.js").write_text("")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "lessons/book", "lessons", "build/book"]
    result = subprocess.run(command, cwd=house_of_one, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (house_of_one / "build/book/01_one.html").read_text(encoding="utf-8")
    assert '<img alt="a line that rises from one to three" src="_images/' in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\W?(https?:)?//", page)


# ----------------------------------------------------------------------------------------------------------------------
# The guard


def guarded(root, source, **env):
    """The last line that a Python prints in which the guard stands, started in the root of its repository."""
    path = os.pathsep.join([str(root / "lessons/guard"), str(root), env.pop("PYTHONPATH", "")])
    command = [sys.executable, "-c", source]
    result = subprocess.run(
        command, cwd=root, env=os.environ | env | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    return (result.stderr + result.stdout).splitlines()[-1]


NO_NETWORK = "it works without a network"
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import fastapi'])"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import socket; socket.socket().connect(('192.0.2.1', 80))",
            f"a lesson may not reach 192.0.2.1: {NO_NETWORK}",
        ),
        (
            "from socket import *; socket(AF_INET, SOCK_DGRAM).sendto(b'', ('192.0.2.1', 80))",
            f"a lesson may not reach 192.0.2.1: {NO_NETWORK}",
        ),
        ("import socket; socket.getaddrinfo('example.org', 80)", f"a lesson may not look up example.org: {NO_NETWORK}"),
        ("import socket; socket.gethostbyname('example.org')", f"a lesson may not look up example.org: {NO_NETWORK}"),
        ("import urllib.request as u; u.urlopen('http://example.org')", f"look up example.org: {NO_NETWORK}"),
        *((f"import {name}", f"a lesson may not import {name}: ") for name in "fastapi peft hypothesis xdist".split()),
        *((f"import {name}", f"a lesson may not import {name}: ") for name in "tokenizers datasets requests".split()),
        ("from google.protobuf import message", "a lesson may not import google: it is no core dependency of the book"),
        (CHILD, "a lesson may not import fastapi: "),
        ("open('pyproject.toml')", "a lesson may not read pyproject.toml: its readers have the package only"),
        ("open('lessons/build.py', 'rb')", "a lesson may not read lessons/build.py: "),
        ("import sys; sys.path.insert(0, 'lessons'); import build", "a lesson may not read lessons/build.py: "),
        ("open('notes.txt', 'w')", "a lesson may not write notes.txt: "),
        ("open('nanogptx/notes.txt', 'a')", "a lesson may not write nanogptx/notes.txt: "),
        ("import os; os.open('data', os.O_CREAT)", "a lesson may not write data: "),
    ],
)
def test_the_guard_refuses(root, source, expected):
    assert expected in guarded(root, source)


ALLOWED = """
import socket, tempfile, sysconfig
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(("localhost", server.getsockname()[1]))
assert open("nanogptx/a.txt").read() and open("lessons/matplotlibrc").read()
import nanogptx.b, numpy, regex, tqdm, pytest
open(tempfile.mkdtemp() + "/x", "w").close()
print("fine")
"""


def test_the_guard_lets_pass_what_a_lesson_needs(root):
    (root / "nanogptx/a.txt").write_text("a")
    (root / "nanogptx/b.py").write_text("b = 1")
    assert guarded(root, ALLOWED) == "fine"


def test_the_guard_does_not_hide_another_sitecustomize(root):
    (root / "other").mkdir()
    (root / "other/sitecustomize.py").write_text("import sys\nsys.other = 'was loaded'")
    source = "import sys; sys.other; open('pyproject.toml')"
    assert "may not read" in guarded(root, source, PYTHONPATH=str(root / "other"))
    assert guarded(root, "import sys; print(sys.other)", PYTHONPATH=str(root / "other")) == "was loaded"


def test_the_guard_stands_in_the_kernels(root):
    """The extras' names are those of pyproject.toml, and no module of the core is among them."""
    write_lesson(root, cells=[code("import transformers", "raises-exception")])
    assert build.build(root) == []
    assert "a lesson may not import transformers" in printed(cell_with(read(root), "transformers"))
    assert "2 passed" in nbval(root, "lessons").stdout
