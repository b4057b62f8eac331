"""What torchrun starts in the tests: the trainer, with accidents. It takes the trainer's arguments.

The environment's PLAN is a JSON object, all of whose entries may be left out:
"accidents": one a start (the first, the first restart, ...), each [rank, what, when]; "once": a file that is made before an
accident, after which there are no more; what is "step" (SIGKILL before that
step), "sync" (SIGKILL at that flush of a file), "seconds" (SIGKILL so long after training began), "signal" (SIGTERM before
that step) or "nothing"; "guard": a folder in which only rank 0 may write.
"""

import json
import os
import signal
import sys
import threading

from nanogptx import checkpoint, files, program, train

PLAN = json.loads(os.environ.get("PLAN", "{}"))
RANK, START = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def die() -> None:
    if "once" in PLAN:
        open(PLAN["once"], "w").close()
    os.kill(os.getpid(), signal.SIGKILL)


def before(function, number: int, act):
    """The function, with `act()` before its call of that number (from 1)."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    return wrapped


def guard(folder: str) -> None:
    """Let this process die when it opens a file there for writing, or makes, renames or removes one."""
    names = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

    def watch(event, args):
        path = os.path.abspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
        writes = event in names or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if writes and path.startswith(folder):
            print(f"rank {RANK} writes: {event} {path}", file=sys.stderr, flush=True)
            os._exit(99)

    sys.addaudithook(watch)


accidents = [] if os.path.exists(PLAN.get("once", "")) else PLAN.get("accidents", [])
rank, what, when = accidents[START] if START < len(accidents) else (0, "nothing", 0)
if rank == RANK and what == "step":
    train.train_step = before(train.train_step, when, die)
if rank == RANK and what == "signal":
    train.train_step = before(train.train_step, when, lambda: os.kill(os.getpid(), signal.SIGTERM))
if rank == RANK and what == "sync":
    checkpoint.sync = files.sync = before(files.sync, when, die)
if rank == RANK and what == "seconds":
    train.Trainer.fit = before(train.Trainer.fit, 1, threading.Timer(when, die).start)
if RANK and "guard" in PLAN:
    guard(PLAN["guard"])
program.run(train.main)
