"""What the lessons' experiments share: how long something takes.

It is measured in a process of its own. A lesson runs on one thread and without modern vector instructions, so that it
prints the same digits on every CPU; what is measured should be what the machine can do.
"""

import json
import os
import subprocess
import sys
import textwrap

RACE = """
import json, statistics, sys, timeit
setup, statements, rounds = json.load(sys.stdin)
names = {}
exec(compile(setup, "<setup>", "exec"), names)
timers = {name: timeit.Timer(statement, globals=names) for name, statement in statements.items()}
number = {}
for name, timer in timers.items():
    timer.timeit(1)
    number[name] = 1 + int(0.005 / timer.timeit(1))  # clocks tick: what takes microseconds is repeated
times = {name: [] for name in timers}
for _ in range(rounds):
    for name, timer in timers.items():
        times[name].append(timer.timeit(number[name]) / number[name])
print(json.dumps({name: statistics.median(seconds) for name, seconds in times.items()}))
"""


def race(setup: str, rounds: int = 7, **statements: str) -> dict[str, float]:
    """Seconds that each statement takes, {name: median}, on all cores and with this machine's best kernels.

    `setup` and the statements are source code; the setup runs once, then the statements in turns, so that whatever else
    the machine does slows all of them alike. Compare the results with each other: only ratios hold elsewhere.
    RuntimeError with the last line of a setup or statement that fails.
    """
    pinned = os.environ.get("NANOGPTX_PINNED", "").split()  # set by the build of the lessons
    native = {name: value for name, value in os.environ.items() if name not in pinned}
    command, task = [sys.executable, "-c", RACE], json.dumps((textwrap.dedent(setup), statements, rounds))
    result = subprocess.run(command, input=task, capture_output=True, text=True, env=native)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])
