"""Grading with pytest, and the report card. How to run it: README.md; how an answer is called: grading.py."""

import ast
from pathlib import Path

import pytest

from exercises import grading
from nanogptx import files

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--solutions", action="store_true", help="grade the answers in solutions/ instead of yours")
    group.addoption("--hints", type=int, default=1, choices=(0, 1, 2, 3), help="how many hints to show (1)")
    group.addoption("--traceback", action="store_true", help="show where in your file the exception came from")
    group.addoption("--seconds", type=float, default=grading.SECONDS, help="time for each exercise (%(default)g)")
    group.addoption("--report", metavar="FILE", help="also write the report card as JSON, as Gradescope reads it")


def pytest_configure(config):
    report = config.getoption("report")
    if report and not Path(report).absolute().parent.is_dir():
        raise pytest.UsageError(f"--report {report}: there is no folder {Path(report).absolute().parent}")
    if report and Path(report).is_dir():
        raise pytest.UsageError(f"--report {report}: that is a folder; name a file")
    if config.getoption("seconds") <= 0:
        raise pytest.UsageError("--seconds must be more than 0")
    config.option.no_header = True


def pytest_unconfigure(config):
    grading.end_zygotes()


def source_of(path):
    """The text of an answer's file, whatever it may be in truth."""
    if not path.is_file() or path.stat().st_size > 1_000_000:
        raise OSError("it is no file of at most 1 MB")
    return path.read_text(encoding="utf-8-sig")


def parsed(path):
    try:
        return ast.parse(source_of(path))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def labels(name):
    """{exercise: (level, minutes, lesson, section)} of a chapter; the stubs say it where the solutions are gone."""
    ours, theirs = (ROOT / folder / f"{name}.py" for folder in ("solutions", "exercises"))
    nodes = parsed(ours if ours.exists() else theirs).body
    nodes = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: grading.label(ast.get_docstring(node) or "") for node in nodes}


@pytest.fixture
def answer():
    """The learner's function: an `Answer`, see grading.py."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run the grader through `grade`, as the tests of the graders do."""
    if "answer" not in pyfuncitem.funcargs:
        return None
    folder = "solutions" if pyfuncitem.config.getoption("solutions") else "exercises"
    path = ROOT / folder / pyfuncitem.path.name.removeprefix("test_")
    try:
        source = source_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise grading.Wrong(f"{folder}/{path.name} cannot be read: {error}") from None
    name, seconds = pyfuncitem.name.removeprefix("test_"), pyfuncitem.config.getoption("seconds")
    if wrong := grading.grade(pyfuncitem.obj, grading.Answer(path, source, name, seconds)):
        raise wrong
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note on the report, as plain data, which xdist can carry, what the card needs."""
    report = yield
    mark = getattr(item.obj, "exercise", None)
    if mark is None or call.when == "teardown" or call.when == "setup" and report.passed:
        return report
    wrong = call.excinfo and call.excinfo.value
    if wrong and not isinstance(wrong, grading.Wrong):
        broken = f"the grader itself failed, which is not your fault: {type(wrong).__name__}: {wrong}"
        wrong = grading.Wrong(broken, *str(report.longrepr).splitlines())
    chapter, name = item.path.stem.removeprefix("test_"), item.name.removeprefix("test_")
    level, minutes, lesson, section = labels(chapter).get(name) or (0, 0, chapter[2:4], 0)
    report.exercise = {
        **{"chapter": chapter, "name": name, "line": item.reportinfo()[1], "points": mark.points},
        **{"level": level, "minutes": minutes, "where": f"lesson {lesson} section {section}"},
        **{"state": wrong.state if wrong else "done", "text": ""},
    }
    if wrong:
        text = [f"{chapter} {name}: {wrong}", *(f"    {line}" for line in wrong.details)]
        if wrong.loaded and (wrong.state == "wrong" or item.config.getoption("hints") > 1):
            for i, hint in enumerate(mark.hints[: item.config.getoption("hints")], 1):
                more = f"  (more: --hints {i + 1})" if i == item.config.getoption("hints") < len(mark.hints) else ""
                text.append(f"    hint {i}  {hint}{more}")
            text.append(f"    read    {report.exercise['where']}")
            text += [f"      | {line}" for line in wrong.printed]
            if item.config.getoption("traceback") and wrong.trace:
                text += [f"    {line}" for line in ["traceback, your lines only:", *wrong.trace.splitlines()]]
        report.longrepr = report.exercise["text"] = "\n".join(text)
    return report


def pytest_report_teststatus(report):
    card = getattr(report, "exercise", None)
    if card and card["state"] != "done":
        return card["state"], {"wrong": "x", "to do": "-"}[card["state"]], card["state"].upper()


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    reports = [report for some in terminalreporter.stats.values() for report in some if hasattr(report, "exercise")]
    cards = sorted((report.exercise for report in reports), key=lambda card: (card["chapter"], card["line"]))
    if not cards:
        return
    for card in cards:
        if card["state"] == "wrong" or config.getoption("hints") > 1:
            terminalreporter.write_line(f"\n{card['text']}")
    lines = [*table(cards), "", *advice(cards)]
    terminalreporter.write_line("\n" + "\n".join(lines))
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        terminalreporter.write_line(
            "The grading was interrupted: this is not the whole of it, and no report is written."
        )
    elif report := config.getoption("report"):
        files.write_json(Path(report), gradescope(cards, lines))


def points(cards):
    return sum(card["points"] for card in cards if card["state"] == "done")


def total(cards, key="points"):
    return sum(card[key] for card in cards)


def table(cards):
    """The report card. Among several chapters, one that is not begun takes one line."""
    chapters = {card["chapter"]: [c for c in cards if c["chapter"] == card["chapter"]] for card in cards}
    lines = []
    for chapter, own in chapters.items():
        number, _, title = chapter.removeprefix("ex").partition("_")
        begun = any(card["state"] != "to do" for card in own)
        rest = "" if begun else f"  not begun: {len(own)} to write, about {total(own, 'minutes')} minutes"
        lines.append(f"{number} {title:<24} {points(own):>4} of {total(own):>2} points{rest}")
        for card in own if begun or len(chapters) == 1 else []:
            stars = "*" * card["level"]
            got = card["points"] if card["state"] == "done" else 0
            row = f"{card['name']:<22} {stars:<3} {got} of {card['points']:>2}  {card['state']:<6}"
            lines.append(f"     {row} {card['minutes']:>3} minutes, {card['where']}")
    return lines


def advice(cards):
    """The total, and the next thing to do."""
    lines = [f"{points(cards)} of {total(cards)} points."]
    open_ = [card for card in cards if card["state"] != "done"]
    if not open_:
        return [lines[0] + " All done."]
    if all(card["state"] == "to do" for card in cards):
        lines = [f"Nothing is written yet: {total(cards)} points to earn, about {total(cards, 'minutes')} minutes."]
    # What was begun comes first.
    card = next((card for card in open_ if card["state"] == "wrong"), open_[0])
    verb = "write" if card["state"] == "to do" else "mend"
    lines.append(f"Next: open exercises/{card['chapter']}.py, {verb} `{card['name']}`")
    lines[-1] += f" ({card['minutes']} minutes, {card['where']}), then: pytest exercises -k {card['name']}"
    return lines


def gradescope(cards, lines):
    """https://gradescope-autograders.readthedocs.io/en/latest/specs"""
    tests = []
    for card in cards:
        number = card["chapter"].removeprefix("ex")[:2]
        done = card["state"] == "done"
        tests.append(
            {
                **{"name": f"{number} {card['name']}", "score": card["points"] * done, "max_score": card["points"]},
                **{"status": "passed" if done else "failed", "output": card["text"], "output_format": "text"},
            }
        )
    return {"score": points(cards), "output": "\n".join(lines), "output_format": "text", "tests": tests}
