"""Runs the trainer in forked children, so that a hundred short runs pay for `import torch` once.

One JSON object a line on standard input: {"args": [...], "log": PATH, and one of these, or none:
"kill_after": seconds, "kill_at_sync": N (the N-th flush of a file), "signal_at": [step, signal number, how often]}.
Answers with the child's exit status, a line each. It computes nothing itself: a forked child can start threads safely.
"""

import json
import os
import signal
import sys
import time

from nanogptx import checkpoint, files, program, train


def child(order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if at := order.get("kill_at_sync"):
        real_sync, calls = files.sync, []

        def sync(path):
            calls.append(path)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real_sync(path)

        checkpoint.sync = files.sync = sync
    if plan := order.get("signal_at"):
        step, number, times = plan
        real_step = train.train_step

        def train_step(*args, calls=[0]):  # noqa: B006
            calls[0] += 1
            for _ in range(times if calls[0] == step else 0):
                os.kill(os.getpid(), number)
            return real_step(*args)

        train.train_step = train_step
    program.run(lambda: train.main(order["args"]))


for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            child(order)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        os._exit(1)
    if "kill_after" in order:
        time.sleep(order["kill_after"])
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
