"""Writes exercises/AUDIT.md: how far each grader can be trusted. python tests/graders/audit.py

Nothing is run for it: tests/test_graders.py proves what it says, and that it is up to date.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from tables import CHAPTERS, EXERCISES, Exercise  # noqa: E402

from nanogptx import files  # noqa: E402

HEAD = """# How far the graders can be trusted

For every exercise `make test` grades many answers whose worth is known: the solution, other right answers, what people get
wrong, and the solution with one small thing changed (a *mutant*: a sign, an axis, a bound, a statement left out). This
page lists them. It is written by `python tests/graders/audit.py`; `tests/test_graders.py` proves it line by line, and that
the stubs, and answers that try to cheat, get no points.
"""


def share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)"


def killed(exercises: list[Exercise]) -> tuple[int, int]:
    whole = sum(len(exercise.mutants) for exercise in exercises)
    return whole - sum(len(exercise.equivalent) for exercise in exercises), whole


def row(exercise: Exercise) -> str:
    found, whole = killed([exercise])
    return f"| {exercise.name} | {len(exercise.right)} | {len(exercise.wrong)} | {share(found, whole)} |"


def details(exercise: Exercise) -> list[str]:
    lines = [f"**{exercise.name}**", "", f"- also right: {'; '.join(exercise.right)}"]
    lines += [f"- wrong: {'; '.join(exercise.wrong)}"]
    lines += [f"- computes the same: `{mutant}` ({reason})" for mutant, reason in exercise.equivalent.items()]
    return [*lines, ""]


def audit() -> str:
    found, whole = killed(EXERCISES)
    right, wrong = (sum(len(getattr(e, kind)) for e in EXERCISES) for kind in ("right", "wrong"))
    lines = [HEAD]
    lines += [f"{len(EXERCISES)} exercises: {right} other right answers pass, {wrong} misconceptions fail by name, and"]
    lines += [f"{share(found, whole)} of the mutants fail; the others compute the same.", ""]
    for chapter in CHAPTERS:
        own = [exercise for exercise in EXERCISES if exercise.chapter == chapter]
        lines += [
            f"## {chapter[2:4]} {chapter[5:]}",
            "",
            "| exercise | right answers | misconceptions | mutants that fail |",
        ]
        lines += ["|---|---|---|---|", *map(row, own), ""]
        for exercise in own:
            lines += details(exercise)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    files.write(ROOT / "exercises" / "AUDIT.md", audit().encode("utf-8"))
