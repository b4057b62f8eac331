"""Lessons: one text a chapter, from which its component and its notebook are made.

    lessons/src/NN_name.md   what authors edit (MyST Markdown, jupytext's md:myst)
    nanogptx/name.py         the cells whose first line is "# nanogptx/name.py", joined
    lessons/NN_name.ipynb    all the cells, executed, with what they print and draw
    nanogptx/assets/name.json    of a few lessons: the results of experiments that take longer than a lesson

    python lessons/build.py build [NN ...]   write the components, execute the lessons, write their notebooks
    python lessons/build.py check            show what differs from the texts and what is wrong in them; execute nothing
    python lessons/build.py record NN [...]  run the experiments of these lessons again, and write their results

The same text gives the same bytes: a second build changes nothing.
"""

import argparse
import ast
import atexit
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BUILT = "# Built by lessons/src/{0}.md: change it there, then run python lessons/build.py build {1}"
EXPORT = re.compile(r"# nanogptx/(\w+)\.py\n")
EXTENDS = re.compile(r"class (\w+)\(\1\):[^\n]*\n")  # class X(X): goes on with class X
FIGURE = re.compile(r"# figure: (.+(?:\n# .+)*)")
TAGS = {"timing", "raises-exception", "skip-execution", "nbval-ignore-output", "hide-input", "experiment", "record"}
# Tags that say how a cell is executed and compared, in the words of nbclient and nbval.
IMPLIED = {"timing": ["nbval-ignore-output"], "skip-execution": ["nbval-skip"]}
IMPLIED["record"] = ["skip-execution", "nbval-skip"]
TIMEOUT = 120  # seconds a cell

# ----------------------------------------------------------------------------------------------------------------------
# The environment of a lesson

# The same code path on every x86 CPU: one thread, no vector instructions newer than 2008's, MKL's portable ones.
PINS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
if platform.machine() in ("x86_64", "AMD64"):
    PINS |= {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    }


@functools.cache
def empty_folder() -> str:
    """A folder that lives as long as this process: nobody's IPython profile takes part in a lesson."""
    folder = tempfile.mkdtemp(prefix="lessons-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def kernel_env(root: Path = ROOT, pinned: bool = True) -> dict[str, str]:
    """The environment in which every lesson runs, here and under nbval; LESSONS_NATIVE=1 leaves the pins out, too.

    NANOGPTX_PINNED names the pins, for a lesson that measures and has to take them back.
    """
    here = Path(__file__).resolve().parent
    pins = {} if os.environ.get("LESSONS_NATIVE") or not pinned else PINS
    path = [str(here / "guard"), str(root), os.environ.get("PYTHONPATH")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "100",
        "IPYTHONDIR": empty_folder(),
        "MATPLOTLIBRC": str(here / "matplotlibrc"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "NANOGPTX_PINNED": " ".join(pins),
    }
    # Of these, the first would make ipykernel drop what subprocesses print.
    foreign = {"PYTEST_CURRENT_TEST", "PYTHONWARNINGS", "PYTHONSTARTUP", "FORCE_COLOR", "LINES"}
    return {name: value for name, value in os.environ.items() if name not in foreign} | pins | fixed


# ----------------------------------------------------------------------------------------------------------------------
# From the text to cells


@dataclass
class Lesson:
    name: str  # 02_attention
    text: str
    nb: NotebookNode

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def component(self) -> str:
        return f"nanogptx/{self.name[3:]}.py"

    @property
    def source(self) -> str:
        return f"lessons/src/{self.name}.md"

    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.nb.cells if cell.cell_type == "code"]

    def exports(self) -> list[NotebookNode]:
        return [cell for cell in self.code() if EXPORT.match(cell.source)]

    def tagged(self, tag: str) -> list[str]:
        return [cell.source for cell in self.code() if tag in cell.metadata.get("tags", [])]

    @property
    def results(self) -> str:
        return f"nanogptx/assets/{self.name[3:]}.json"

    def where(self, cell: NotebookNode, line: int = 1) -> str:
        """The place of a cell's line as editors take it: lessons/src/02_attention.md:41."""
        start = self.text.find(f"\n{cell.source}\n")
        return f"{self.source}:{self.text.count(chr(10), 0, start + 1) + line}" if start >= 0 else self.source


def load(root: Path = ROOT) -> list[Lesson]:
    import jupytext  # not needed to run the notebooks

    paths = sorted((root / "lessons/src").glob("*.md"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [Lesson(path.stem, text, jupytext.reads(text, fmt="md:myst")) for path, text in zip(paths, texts)]


def repository(root: Path) -> str:
    """Where the project lives, from the one place that says it."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


INSTALL = """# installs the book where it is missing: on Colab, or in a kernel of your own
from importlib.util import find_spec

if not find_spec("nanogptx"):
    %pip install -q git+{address}"""

LINKS = """Run it in [Colab](https://colab.research.google.com/github/{repo}/blob/main/lessons/{name}.ipynb),
[Codespaces](https://codespaces.new/{repo}) or
[Binder](https://mybinder.org/v2/gh/{repo}/main?labpath=lessons%2F{name}.ipynb)."""


def exercises(lesson: Lesson, root: Path) -> str:
    """A table of the chapter's exercises, from their docstrings: the first line says what, the last how hard."""
    rows = ["| exercise | what it asks for | level | minutes |", "|---|---|---|---|"]
    for node in ast.parse((root / "solutions" / f"ex{lesson.name}.py").read_text(encoding="utf-8")).body:
        lines = (ast.get_docstring(node) or "").splitlines() if isinstance(node, ast.FunctionDef) else []
        if lines and (label := re.match(r"Level (\d) of 3, (\d+) minutes", lines[-1])):
            rows.append(f"| `{node.name}` | {lines[0]} | {label[1]} | {label[2]} |")
    return "\n".join(rows)


def prepared(lesson: Lesson, root: Path) -> NotebookNode:
    """The notebook that is executed: the text's cells, what every lesson has at its top, and nbval's tags."""
    address = repository(root)
    repo = address.split("/", 3)[3]
    first, *rest = lesson.nb.cells
    title, _, below = first.source.partition("\n")
    links = LINKS.format(repo=repo, name=lesson.name)
    top = nbformat.v4.new_markdown_cell(f"{title}\n\n{links}\n{below}".rstrip("\n"))
    install = nbformat.v4.new_code_cell(INSTALL.format(address=address))
    install.metadata["tags"] = ["remove-cell"]  # from the pages of the book
    nb, seen = nbformat.v4.new_notebook(cells=[top, install, *rest]), {}
    for cell in nb.cells:
        if cell.cell_type == "markdown" and re.search("^@exercises$", cell.source, re.MULTILINE):
            cell.source = re.sub("^@exercises$", exercises(lesson, root), cell.source, flags=re.MULTILINE)
        digest = hashlib.sha1(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        tags = cell.metadata.get("tags", [])
        tags = list(dict.fromkeys([*tags, *(more for tag in tags for more in IMPLIED.get(tag, ()))]))
        cell.metadata = {"tags": tags} if tags else {}
        if text := alt(cell):
            cell.metadata["mystnb"] = {"image": {"alt": text}}
    return nb


def alt(cell: NotebookNode) -> str:
    """What a figure shows, in words: the comment that begins with "# figure:" at the top of its cell."""
    found = FIGURE.match(cell.source) if cell.cell_type == "code" else None
    return " ".join(found[1].replace("\n# ", " ").split()) if found else ""


# ----------------------------------------------------------------------------------------------------------------------
# From cells to the component


def tangle(lesson: Lesson) -> list[tuple[str, NotebookNode | None]]:
    """The component's lines, each with the cell it is from; none if the lesson builds none. ValueError on a mistake."""
    lines, last = [], None
    for cell in lesson.exports():
        new = [(line, cell) for line in cell.source.strip("\n").split("\n")[1:]]
        code = "\n".join(line for line, _ in new)
        try:
            body = ast.parse(code).body
        except SyntaxError as error:
            place = lesson.where(cell, (error.lineno or 0) + 1)
            raise ValueError(f"{place}: {lesson.component} does not parse ({error.msg})") from None
        if not (extends := EXTENDS.match(code)):
            # ruff wants one blank line, not two, between the imports and what is neither function nor class
            close = isinstance(last, ast.Import | ast.ImportFrom) and not re.match(r"@|(async |)def |class ", code)
            lines += [("", cell)] * (0 if not lines else 1 if close else 2) + new
            last = body[-1] if body else None
            continue
        name = extends[1]
        if len(body) > 1:
            raise ValueError(f"{lesson.where(cell, 2)}: a cell that extends class {name} holds nothing else")
        tree = ast.parse("\n".join(line for line, _ in lines))
        end = next((node.end_lineno for node in tree.body if getattr(node, "name", "") == name), None)
        if end is None:
            raise ValueError(f"{lesson.where(cell, 2)}: class {name}({name}) extends a class {name} that is not there")
        lines[end:end] = [("", cell), *new[1:]]
    return [(BUILT.format(lesson.name, lesson.number), None), *lines] if lines else []


def joined(lines: list[tuple[str, NotebookNode | None]]) -> str:
    return "".join(f"{line}\n" for line, _ in lines)


def definitions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a component defines at its top level or in a class, with its line."""
    scopes = [("", tree), *((f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    for prefix, scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if not re.search(r"overload|\.(setter|deleter)", " ".join(map(ast.unparse, node.decorator_list))):
                    yield prefix + node.name, node.lineno
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((prefix + target.id, node.lineno) for target in targets if isinstance(target, ast.Name))


def ruff_format(text: str) -> str | None:
    """The text as ruff would write it; None where ruff is not installed."""
    if not importlib.util.find_spec("ruff"):
        return None
    command = [sys.executable, "-m", "ruff", "format", "--quiet", "--config", str(ROOT / "pyproject.toml"), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True).stdout


# ----------------------------------------------------------------------------------------------------------------------
# From cells to recorded results


def experiment(lesson: Lesson) -> str:
    """The program that makes what a lesson records, "" if it records nothing.

    It imports the component; then come the cells tagged `experiment`, and those tagged `record`.
    """
    if not (last := lesson.tagged("record")):
        return ""
    first = f"from nanogptx.{lesson.name[3:]} import *"
    main = 'if __name__ == "__main__":\n' + textwrap.indent("\n".join(last), "    ")
    return "\n\n\n".join([first, *lesson.tagged("experiment"), main]) + "\n"


def digest(code: str) -> str:
    """Of the code without its lines of comment, which may say how long it takes."""
    return hashlib.sha256(re.sub(r"^ *#.*\n", "", code, flags=re.MULTILINE).encode()).hexdigest()[:16]


def rounded(value: object) -> object:
    """Numbers to four digits, which is more than another machine would find again."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def record(lesson: Lesson, root: Path) -> str:
    """The text of the results' file, from a run with fast kernels; ValueError if it fails.

    The experiment leaves them in `results`, a dictionary that JSON can hold.
    """
    code = experiment(lesson)
    env = kernel_env(root, pinned=False) | {"OMP_NUM_THREADS": "1"}  # small models: in_parallel takes the cores
    with tempfile.TemporaryDirectory() as folder:
        script, made = Path(folder) / "experiment.py", Path(folder) / "results.json"
        script.write_text(
            f"{code}    import json\n\n    json.dump(results, open({str(made)!r}, 'w'))\n", encoding="utf-8"
        )
        if subprocess.run([sys.executable, str(script)], env=env, cwd=folder).returncode:
            raise ValueError(f"{lesson.source}: the experiment fails")
        results = rounded(json.loads(made.read_text(encoding="utf-8")))
    about = {"command": f"python lessons/build.py record {lesson.number}", "code": digest(code)}
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in results.items())
    return f'{{\n{head} "results": {{\n{rows}\n }}\n}}\n'


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong, and what differs


def faults_of_component(lesson: Lesson) -> Iterator[str]:
    try:
        lines = tangle(lesson)
    except ValueError as error:
        yield str(error)
        return
    text, seen = joined(lines), {}

    def place(number: int) -> str:
        line, cell = lines[number - 1]
        own = cell.source.split("\n") if cell else []
        return lesson.where(cell, own.index(line) + 1 if line in own else 1) if cell else lesson.source

    for name, line in definitions(ast.parse(text)):
        if name in seen:
            yield f"{place(line)}: {lesson.component} defines {name} a second time; the first is at {place(seen[name])}"
        seen.setdefault(name, line)
    neat = ruff_format(text)
    if neat is not None and neat != text:
        have, want = text.split("\n"), neat.split("\n")
        first = next((n for n, pair in enumerate(zip(have, want), 1) if pair[0] != pair[1]), min(len(have), len(want)))
        yield f"{place(min(first, len(lines)))}: {lesson.component} is not as ruff formats it\n" + diff(
            have, want, lesson.component, "formatted"
        )


def faults_of_cells(lesson: Lesson) -> Iterator[str]:
    first = lesson.nb.cells[0] if lesson.nb.cells else None
    if not first or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield f"{lesson.source}: a lesson begins with its title, # ..."
    for cell in lesson.code():
        tags, head = set(cell.metadata.get("tags", [])), cell.source.split("\n")[0]
        if unknown := sorted(tags - TAGS):
            yield f"{lesson.where(cell)}: tag {', '.join(unknown)} is not known; there are {', '.join(sorted(TAGS))}"
        if re.match(r"#\s*nanogptx/", head) and head != f"# {lesson.component}":
            yield f"{lesson.where(cell)}: {head!r} is not '# {lesson.component}', the component that this lesson builds"
        if "nbval-ignore-output" in tags and not re.search(r"^# not compared: \S", cell.source, re.MULTILINE):
            yield f"{lesson.where(cell)}: nbval-ignore-output needs a reason, a line '# not compared: REASON'"
        if re.search(r"^\s*#+\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE):
            yield f"{lesson.where(cell)}: nbval is told by tags, not by comments"
        if cell.source.endswith(";"):
            yield f"{lesson.where(cell)}: nbval does not know that a semicolon hides a value: write _ = ... instead"


def faults(lessons: list[Lesson], root: Path = ROOT) -> list[str]:
    """Everything that is wrong in the texts, or left behind by texts that are gone: one sentence each."""
    found = []
    for k, lesson in enumerate(lessons):
        if not re.fullmatch(r"\d\d_[a-z]\w*", lesson.name):
            found.append(f"{lesson.source}: a lesson is called NN_name.md, two digits and the name of its component")
        for other in lessons[:k]:
            if other.name[3:] == lesson.name[3:]:
                found.append(f"{lesson.source} and {other.source} both build {lesson.component}")
            elif other.number == lesson.number:
                found.append(f"{lesson.source} and {other.source} have the same number")
        found += [*faults_of_cells(lesson), *faults_of_component(lesson)]
    names = {lesson.name for lesson in lessons}
    for path in sorted((root / "lessons").glob("*.ipynb")):
        if path.stem not in names:
            found.append(
                f"lessons/{path.name} has no text lessons/src/{path.stem}.md: write one or delete the notebook"
            )
    built = {lesson.component for lesson in lessons if lesson.exports()}
    for path in sorted((root / "nanogptx").glob("*.py")):
        head = re.match(r"# Built by (\S+):", path.read_text(encoding="utf-8"))
        if head and f"nanogptx/{path.name}" not in built:
            found.append(
                f"nanogptx/{path.name} was built by {head[1]}, which builds it no more: delete it, or its first line"
            )
    return found


def diff(old: list[str], new: list[str], old_name: str, new_name: str) -> str:
    return "\n".join(difflib.unified_diff(old, new, old_name, new_name, lineterm="", n=1))


def shown(nb: NotebookNode) -> list[str]:
    """The notebook without its outputs, as lines that a diff can show."""
    lines = []
    for cell in nb.cells:
        tags = f" [{', '.join(cell.metadata['tags'])}]" if cell.metadata.get("tags") else ""
        more = "".join(f" {name}: {value}" for name, value in sorted(cell.metadata.items()) if name != "tags")
        lines += [f"--- {cell.cell_type}{tags}{more}", *cell.source.split("\n")]
    return lines


def drift(lessons: list[Lesson], root: Path = ROOT) -> list[str]:
    """Where the components and the notebooks say something else than the texts."""
    found = []
    for lesson in lessons:
        path = root / "lessons" / f"{lesson.name}.ipynb"
        new, old = shown(prepared(lesson, root)), shown(nbformat.read(path, 4)) if path.exists() else []
        if new != old:
            difference = diff(old, new, f"lessons/{path.name}", lesson.source)
            found.append(
                f"lessons/{path.name} is not what {lesson.source} says: run build {lesson.number}\n{difference}"
            )
        path = root / lesson.component
        new, old = joined(tangle(lesson)), path.read_text(encoding="utf-8") if path.exists() else ""
        if new and new != old:
            difference = diff(new.split("\n"), old.split("\n"), lesson.source, lesson.component)
            found.append(
                f"{lesson.component} is not what {lesson.source} says: edit the text, then run build {lesson.number}\n"
                + difference
            )
        path, code = root / lesson.results, experiment(lesson)
        if code and (not path.exists() or json.loads(path.read_text(encoding="utf-8"))["code"] != digest(code)):
            found.append(f"{lesson.results} is not from the experiment in {lesson.source}: run record {lesson.number}")
    return found


def check(root: Path = ROOT) -> list[str]:
    lessons = load(root)
    return faults(lessons, root) or drift(lessons, root)


# ----------------------------------------------------------------------------------------------------------------------
# From cells to the notebook


def execute(lesson: Lesson, nb: NotebookNode, root: Path) -> None:
    """Run all cells in a fresh kernel of this Python; ValueError naming the cell that fails."""
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

    started = []
    client = NotebookClient(
        nb,
        km=AsyncKernelManager(kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=NbvalKernelspecManager()),
        timeout=TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=lambda cell, cell_index: started.append(cell),
        resources={"metadata": {"path": str(root / "lessons")}},
    )
    try:
        client.execute(cleanup_kc=True, env=kernel_env(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except CellExecutionError as error:
        raise ValueError(f"{lesson.where(started[-1])}: {error.ename}: {error.evalue}") from None
    except CellTimeoutError:
        raise ValueError(f"{lesson.where(started[-1])}: takes more than {TIMEOUT} seconds") from None
    except DeadKernelError:
        raise ValueError(f"{lesson.where(started[-1])}: the kernel died") from None
    for cell in nb.cells:
        raised = any(output.output_type == "error" for output in cell.get("outputs", ()))
        if "raises-exception" in cell.metadata.get("tags", ()) and not raised:
            raise ValueError(f"{lesson.where(cell)}: is tagged raises-exception and raises nothing")


def normalise(nb: NotebookNode) -> NotebookNode:
    """Nothing in the file may differ between two executions, or between two versions of the tools.

    nbval compares no pictures. So each tells of which code it is, all cells up to its own, and a test sees an old one.
    """
    code = hashlib.sha1()
    for cell in nb.cells:
        code.update(cell.source.encode() if cell.cell_type == "code" else b"")
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":  # of a progress bar, what the reader would see last
                output.text = re.sub(r"^.*\r(?=[^\n])", "", output.text, flags=re.MULTILINE)
            if output.output_type == "error":
                output.traceback = [f"{output.ename}: {output.evalue}"]
            if "metadata" in output:
                described = alt(cell) and "image/png" in output.data
                about = {"alt": alt(cell), "of": code.hexdigest()[:8]}
                output.metadata = {"image/png": about} if described else {}
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def dumps(nb: NotebookNode) -> str:
    return nbformat.writes(nb, version=4) + "\n"


def essence(value: object) -> object:
    """Outputs as nbval compares them: without what nbval_sanitize.cfg replaces, say measured times."""
    if isinstance(value, dict):
        return {name: essence(item) for name, item in value.items()}
    if isinstance(value, list):
        return [essence(item) for item in value]
    for pattern, replacement in sanitizers():
        value = re.sub(pattern, replacement, value) if isinstance(value, str) else value
    return value


@functools.cache
def sanitizers() -> list[tuple[str, str]]:
    rules = Path(__file__).with_name("nbval_sanitize.cfg").read_text(encoding="utf-8")
    return re.findall(r"^regex: (.*)$\n^replace: (.*)$", rules, re.MULTILINE)


def keep_saved(nb: NotebookNode, old: NotebookNode) -> None:
    """Outputs that nbval would call the same stay as they were: what was measured differs every time."""
    saved = {cell.id: cell for cell in old.cells if cell.cell_type == "code"}
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.id in saved:
            there = saved[cell.id]
            ignored = all("nbval-ignore-output" in one.metadata.get("tags", ()) for one in (cell, there))
            if ignored or essence(cell.outputs) == essence(there.outputs):
                cell.outputs = there.outputs
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = cell.execution_count


def notebook(lesson: Lesson, root: Path = ROOT) -> str:
    """The text of the executed notebook; ValueError if a cell fails."""
    nb = prepared(lesson, root)
    execute(lesson, nb, root)
    normalise(nb)
    path = root / "lessons" / f"{lesson.name}.ipynb"
    if path.exists():
        keep_saved(nb, nbformat.read(path, 4))
    return dumps(nb)


def write(path: Path, text: str, root: Path, note: str = "") -> None:
    from nanogptx import files

    changed = not path.exists() or path.read_bytes() != text.encode()
    if changed:
        files.write(path, text.encode())
    print("wrote    " if changed else "unchanged", path.relative_to(root).as_posix(), note, flush=True)


def build(root: Path = ROOT, only: list[str] = ()) -> list[str]:
    """Write all components and the notebooks of the lessons numbered in `only`, or all; the mistakes found."""
    lessons = load(root)
    if mistakes := faults(lessons, root):
        return mistakes
    for lesson in lessons:
        if text := joined(tangle(lesson)):
            write(root / lesson.component, text, root)
    for lesson in lessons:
        if not only or lesson.number in only:
            began = time.monotonic()
            try:
                text = notebook(lesson, root)
            except ValueError as error:
                mistakes.append(f"{error}; lessons/{lesson.name}.ipynb stays as it was")
                continue
            write(root / "lessons" / f"{lesson.name}.ipynb", text, root, f"({time.monotonic() - began:.1f} s)")
    return mistakes


def record_all(root: Path, only: list[str]) -> list[str]:
    """Write the results of the lessons numbered in `only`; the mistakes found."""
    mistakes = []
    for lesson in load(root):
        if lesson.number in only and experiment(lesson):
            began = time.monotonic()
            (root / lesson.results).parent.mkdir(exist_ok=True)
            try:
                write(root / lesson.component, joined(tangle(lesson)), root)
                text = record(lesson, root)
            except ValueError as error:
                mistakes.append(f"{error}; {lesson.results} stays as it was")
                continue
            write(root / lesson.results, text, root, f"({time.monotonic() - began:.1f} s)")
        elif lesson.number in only:
            mistakes.append(f"{lesson.source} records nothing: no cell of it is tagged record")
    return mistakes


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write the components, execute the lessons, write their notebooks")
    command.add_argument("only", nargs="*", metavar="NN", help="numbers of lessons, 01 02; without any, all lessons")
    commands.add_parser("check", help="show what differs from the texts; execute nothing")
    command = commands.add_parser("record", help="run the experiments of these lessons, and write their results")
    command.add_argument("only", nargs="+", metavar="NN", help="numbers of lessons")
    options = parser.parse_args(argv)
    if options.command == "check":
        problems = check(root)
        print("\n\n".join(problems) or "nothing differs")
        return int(bool(problems))
    only = [number.zfill(2) for number in options.only]
    if unknown := [number for number in only if number not in {lesson.number for lesson in load(root)}]:
        mistakes = [f"there is no lesson {number} in lessons/src" for number in unknown]
    else:
        mistakes = record_all(root, only) if options.command == "record" else build(root, only)
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return 2 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
