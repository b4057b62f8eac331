"""Measurements in a process of their own."""

import os

import pytest

from nanogptx import lab


def test_a_race_tells_the_slower_from_the_faster():
    seconds = lab.race("from time import sleep\nnap = 0.002", short="sleep(nap)", long="sleep(10 * nap)", rounds=3)
    assert list(seconds) == ["short", "long"]
    assert 0.002 <= seconds["short"] and 0.02 <= seconds["long"]


def test_what_takes_microseconds_is_repeated():
    seconds = lab.race("numbers = list(range(10_000))", find="numbers.index(0)", sum="sum(numbers)", rounds=3)
    assert 0 < seconds["find"] < seconds["sum"] / 10


def test_the_statements_take_turns_after_a_setup_that_runs_once(tmp_path):
    log = tmp_path / "log"
    write = f"open({str(log)!r}, 'a').write"
    lab.race(
        f"import time; write = {write}; write('s')",
        rounds=3,
        a="write('a'); time.sleep(.006)",
        b="write('b'); time.sleep(.006)",
    )
    assert log.read_text() == "s" + "aabb" + 3 * "ab"


def test_a_race_is_run_without_the_lessons_pins(monkeypatch):
    monkeypatch.setenv("NANOGPTX_PINNED", "PIN_ONE PIN_TWO")
    for name in "PIN_ONE", "PIN_TWO", "NO_PIN":
        monkeypatch.setenv(name, "1")
    code = "import os; pins = {name for name in os.environ if name in ('PIN_ONE', 'PIN_TWO', 'NO_PIN')}; assert pins == {'NO_PIN'}, pins"
    lab.race(f"{code}\nprint('a line of its own')", rounds=1, nothing="pass")
    assert os.environ["PIN_ONE"] == "1"


def test_what_fails_in_a_race_is_told():
    with pytest.raises(RuntimeError, match="^ZeroDivisionError: division by zero$"):
        lab.race("x = 0", rounds=1, bad="1 / x")
    with pytest.raises(RuntimeError, match="exit status 3"):
        lab.race("import os", rounds=1, bad="os._exit(3)")
