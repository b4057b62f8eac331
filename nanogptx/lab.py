"""What the lessons' experiments share: how long something takes, and how much memory.

Both are measured in a process of their own. A lesson runs on one thread and without modern vector instructions, so that
it prints the same digits on every CPU; what is measured should be what the machine can do.
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

PEAK = """
import json, sys
import torch
from nanogptx.device import peak_memory
setup, statement = json.load(sys.stdin)
names = {}
exec(compile(setup, "<setup>", "exec"), names)
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the peak begins anew
except OSError:
    pass
before = peak_memory(torch.device("cpu"))
exec(compile(statement, "<statement>", "exec"), names)
print(peak_memory(torch.device("cpu")) - before)
"""


def race(setup: str, rounds: int = 7, **statements: str) -> dict[str, float]:
    """Seconds that each statement takes, {name: median}, on all cores and with this machine's best kernels.

    `setup` and the statements are source code; the setup runs once, then the statements in turns, so that whatever else
    the machine does slows all of them alike. Compare the results with each other: only ratios hold elsewhere.
    """
    pinned = os.environ.get("NANOGPTX_PINNED", "").split()  # set by the build of the lessons
    native = {name: value for name, value in os.environ.items() if name not in pinned}
    return measured(RACE, (textwrap.dedent(setup), statements, rounds), native)


def peak(setup: str, statement: str) -> int:
    """Bytes by which a statement's first execution raises the memory of a process that has run `setup`.

    Whatever is loaded at a first use counts: let the setup do the same thing once, in small.
    """
    # subtle: glibc takes memory of this size and more from the system and gives it back at once, instead of keeping it
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return measured(PEAK, (textwrap.dedent(setup), textwrap.dedent(statement)), exact)


def measured(program: str, task: tuple, env: dict[str, str]) -> object:
    """What a program prints last when it is given a task; RuntimeError with its last line when it fails."""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=env)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])
