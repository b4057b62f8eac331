"""What graders are written with. One exercise is one test, named after the function that the learner writes:

    from exercises.grading import exercise, expect, says

    @exercise(points=1, hints=("A first push.", "A clearer one.", "Nearly the answer."))
    def test_softmax(answer):
        x = np.array([[1.0, 2.0, 3.0], [0.0, -1000.0, 1000.0]])
        want = np.array(...)
        got = answer(x, axis=1)  # calls the learner's `softmax` in another process
        expect(got, want, what="the weights", mistakes={
            "you normalised the columns, not the rows": wrong_axis(x),
            "exp overflows: subtract the maximum first": np.array([[..., np.nan]]),
        })
        says(np.allclose(got.sum(1), 1), "each row of weights sums to 1, but row 0 sums to 2.0")

answer(...)          calls the learner's function; what comes back is plain data. Changing an argument in place is a
                     mistake, told by name. A Python function among the arguments stays here and is called from there.
                     Classes work: `box = answer(3)`, `box.add(1)`, `box.get("total")`. So do functions that it returns.
answer.inplace(...)  where changing arguments is the task: (result, arguments, keyword arguments) after the call
answer.refuses(...)  the call must raise (error="ValueError"); gives the message
answer.restart()     forgets all state: a new process
expect(got, want)    type, shape, dtype, then values. `mistakes` maps a sentence about a misconception to the value that
                     it gives; the right value must differ from all of them, or the grader itself is wrong.
says(fact, sentence) unless the fact holds, fails with the sentence
hunt(answer, right, wrong)  a bug hunt: the answer is a test, which must pass all `right` functions and fail all `wrong`

A sentence is about the subject, not about the code ("row 0 attends to position 3, which is in its future"); it starts
with a small letter and needs no full stop. Tests for the graders themselves: see "For authors" in README.md.
"""

import ast
import contextlib
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exercises import worker
from exercises.worker import Other

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10.0  # for all calls of one exercise
MEMORY = 2 << 30  # bytes, beyond what Python and its libraries take
# What an answer may ask of functions that it was given, for which we pay: so many calls, numbers in one, and seconds.
CALLBACKS, ARGUMENTS, PAID = 50_000, 3_000, 10.0
PATIENCE = 120  # seconds for a Python to start and import its libraries, on a slow disk
FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")
LABEL = re.compile(r"Level ([123]) of 3, ([0-9]{1,3}) minutes, lesson ([0-9]{2}) section ([0-9]{1,2})\.$")


def clean(text: str) -> str:
    """Nothing of the learner's moves the cursor or breaks an encoding."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:4000])


class Wrong(Exception):
    """The answer is wrong: `str` says how, in words of the subject; `details` are lines of numbers below that."""

    state = "wrong"
    loaded = True  # was there an answer at all?

    def __init__(self, message: str, *details: str, trace: str = ""):
        super().__init__(clean(message).replace("\n", " "))  # one line: it must not look like a part of the card
        self.details, self.trace, self.printed = [clean(line).replace("\n", " ") for line in details], clean(trace), []


class NotYet(Wrong):
    """The stub, or something it calls, still raises NotImplementedError."""

    state = "to do"


class Raised(Wrong):
    """The answer raised an exception that the grader did not ask for."""

    def __init__(self, kinds: list[str], text: str, *details: str, trace: str = ""):
        self.kinds, self.text = kinds, text
        super().__init__(f"it raises {kinds[0]}{': ' if text else ''}{text}", *details, trace=trace)


@dataclass(frozen=True)
class Exercise:
    """What `@exercise` notes on a test."""

    points: int
    hints: tuple[str, ...]


def exercise(points: int, hints: tuple[str, str, str]) -> Callable:
    """Makes a test the grader of the function whose name follows `test_`."""

    def mark(test):
        test.exercise = Exercise(points, tuple(hints))
        return test

    return mark


# ---- the answer, called from here, run over there


class Zygote:
    """The process from which the learners' processes are forked: they start in milliseconds, with numpy imported."""

    def __init__(self, libraries: str):
        self.libraries = libraries
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-B", "-P", worker.__file__, "zygote", str(theirs.fileno()), libraries]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=environment()
        )
        theirs.close()

    def start(self, wire: socket.socket, log, folder: str) -> None:
        socket.send_fds(self.control, [folder.encode()], [wire.fileno(), log.fileno()])

    def stop(self) -> int | None:
        """End the child and all that it started; its exit status, negative for a signal, None when nobody knows."""
        try:
            self.control.settimeout(5)
            self.control.sendall(b"stop")
            return struct.unpack(">i", self.control.recv(4))[0]
        except (OSError, struct.error):  # the child has killed or stopped its zygote: the next one gets a new one
            self.process.kill()
            self.end()
            return None

    def end(self) -> None:
        """It would end with this process, too, but not before Python complains of it."""
        ZYGOTES.pop(self.libraries, None)
        self.control.close()
        self.process.wait()


class Spawner:
    """Where no fork is safe: every answer gets a Python of its own, in about a second."""

    def __init__(self, libraries: str):
        self.libraries = libraries

    def start(self, wire: socket.socket, log, folder: str) -> None:
        share = sys.platform == "win32"
        handle = "0" if share else str(wire.fileno())
        options = {"stdin": subprocess.PIPE} if share else {"stdin": subprocess.DEVNULL, "pass_fds": [wire.fileno()]}
        command = [sys.executable, "-B", "-P", worker.__file__, "alone", handle, folder, self.libraries]
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment(), **options
        )
        if share:
            self.process.stdin.write(wire.share(self.process.pid))
            self.process.stdin.close()

    def stop(self) -> int | None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill() if sys.platform == "win32" else os.killpg(self.process.pid, 9)
        status = self.process.wait()
        return None if status == -9 else status


def environment() -> dict:
    """One thread, so that a fork is safe and results repeat; nothing of pytest's."""
    return {name: value for name, value in os.environ.items() if "PYTEST" not in name} | {"OMP_NUM_THREADS": "1"}


ZYGOTES: dict[str, Zygote] = {}


def starter(libraries: str) -> Zygote | Spawner:
    if not FORK:
        return Spawner(libraries)
    if libraries not in ZYGOTES:
        ZYGOTES[libraries] = Zygote(libraries)
    return ZYGOTES[libraries]


def end_zygotes() -> None:
    for zygote in list(ZYGOTES.values()):
        zygote.end()


class Answer:
    """The learner's function `name` in `source`, as a function that can be called. See the head of this file."""

    def __init__(self, path: Path, source: str, name: str, seconds: float = SECONDS):
        self.path, self.source, self.name, self.seconds = path, source, name, seconds
        self.left, self.wire, self.call, self.printed, self.log = seconds, None, "", "", None
        self.paid, self.calls = PAID, 0  # seconds left for functions that the answer was given; calls of them so far
        self.component, self.asked, self.last = path.stem.partition("_")[2], "", None

    # -- the process

    def begin(self) -> None:
        if error := broken(self.path.name, self.source):
            raise error
        libraries = "numpy.random,numpy.testing"  # NumPy imports them late: each forked process would do it again
        if re.search(r"^[ \t]*(import|from) (torch|nanogptx)\b", self.source, re.M):
            libraries += ",torch"
        self.folder, self.log = tempfile.mkdtemp(prefix="nanogptx-"), tempfile.TemporaryFile()
        self.starter = starter(libraries)
        self.wire, theirs = socket.socketpair()
        with theirs:
            self.starter.start(theirs, self.log, self.folder)
        request = {"path": str(self.path), "name": self.path.stem, "component": self.component, "source": self.source}
        self.wire.settimeout(PATIENCE)
        worker.receive(self.wire)  # ready
        worker.send(self.wire, request | {"memory": MEMORY, "seconds": self.seconds})
        self.call = ""
        header, _ = self.receive()
        if "error" in header:
            where = f"{self.path.name}, line {header['frames'][-1][0]}" if header["frames"] else self.path.name
            raise unreadable(self.path.name, self.source, self.raised(header), where)

    def close(self) -> int | None:
        """End the process; what it printed stays in `printed`."""
        if self.wire is None:
            return None
        self.wire.close()
        self.wire, status = None, self.starter.stop()
        self.log.seek(0)
        self.printed += self.log.read(1 << 16).decode("utf-8", "replace")
        self.log.close()
        with contextlib.suppress(RecursionError):  # folders in folders in folders
            shutil.rmtree(self.folder, ignore_errors=True)
        return status

    restart = close  # the next call begins anew

    def receive(self) -> tuple:
        """The next message, or the reason why there will be none."""
        deadline = time.monotonic() + self.left

        def read(n):
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self.wire.settimeout(left)
            return self.wire.recv(n)

        try:
            header, blobs = worker.receive(self.wire, read)
            if not isinstance(header, dict):
                raise ValueError("a message of the wrong form")
        except TimeoutError:
            self.close()
            seconds = f"{self.seconds:g} seconds"
            message = (
                f"it is still running after {seconds}: is there a loop that never ends, or work that grows too fast?"
            )
            raise self.gone(message) from None
        except (EOFError, OSError):
            status = self.close()
            how = {
                0: "ends the process (os._exit?)",
                -9: "closes its line to the grader",
                -11: "ends in a memory fault",
            }
            raise self.gone(f"it {how.get(status, f'ends the process with status {status}')}") from None
        except Exception as error:  # not JSON, too long, or not what was agreed on
            self.close()
            raise self.nonsense(error) from None
        finally:
            self.left = max(deadline - time.monotonic(), 0.0)
        return header, blobs

    def gone(self, message: str) -> Wrong:
        """No process, no answer."""
        if self.call:
            return Wrong(message, *self.doing())
        return unreadable(self.path.name, self.source, Wrong(message), self.path.name)

    def nonsense(self, error: Exception) -> Wrong:
        return self.gone(f"what it returned is no message that the grader knows ({type(error).__name__}: {error})")

    def raised(self, header: dict) -> Wrong:
        kinds, frames = [str(kind) for kind in header["error"]], header["frames"]
        lines = [f"line {number}{f', in {name}' if name else ''}: {line}" for number, name, line in frames]
        trace = "\n".join([*lines, f"{kinds[0]}: {header['message']}"])
        if kinds[0] == "NotImplementedError" and header["inside"]:
            culprit = frames[-1][1]
            own = culprit in (self.name, self.asked, "__init__")
            other = "" if own else f": it calls {culprit}, which still has to be written"
            return NotYet(f"not implemented yet{other}", trace=trace)
        text = header["message"]
        if "MemoryError" in kinds:
            text = f"it asked for more than {MEMORY >> 30} GiB of memory"
        where = [f"at      {self.path.name}, {lines[-1]}"] if lines else []
        return Raised(kinds, text, *where, *self.doing(), trace=trace)

    def doing(self) -> list[str]:
        return [f"call    {self.call}"] if self.call else []

    # -- calls

    def __call__(self, *args, **kwargs):
        return self.ask(None, self.name, args, kwargs)[0]

    def inplace(self, *args, **kwargs):
        return self.ask(None, self.name, args, kwargs, inplace=True)

    def refuses(self, *args, error: str = "ValueError", because: str = "that makes no sense", **kwargs) -> str:
        """The call must raise `error`; returns its message."""
        try:
            value = self(*args, **kwargs)
        except Raised as raised:
            if error in raised.kinds:
                return raised.text
            message = f"{because}, which should raise {error}, but {raised}"
            raise Wrong(message, *raised.details, trace=raised.trace) from None
        raise Wrong(f"{because}, which should raise {error}, but it returns {describe(value)}", *self.doing())

    def ask(self, thing, name, args, kwargs, inplace=False, get=False):
        if self.wire is None:
            self.begin()
        shown = [describe(part) for part in args] + [f"{key}={describe(part)}" for key, part in kwargs.items()]
        self.call, self.asked = f"{name}({', '.join(shown)})", name
        blobs, functions = [], []

        def special(value):
            if isinstance(value, Thing):
                return ["thing", value.number]
            if isinstance(value, Other):
                raise Wrong(f"it returned an object of class {value.kind}, which no answer should", *self.doing())
            if callable(value):
                functions.append(value)
                return ["function", len(functions) - 1, "function"]
            raise TypeError(f"the grader cannot send a {type(value).__name__}")

        call = [worker.encode(part, blobs, special) for part in (list(args), kwargs)]
        message = {"of": thing, "name": name, "get": get, "call": call}
        try:
            worker.send(self.wire, message, blobs)
        except OSError:
            pass  # it has gone: the answer, which does not come, tells why
        while "ask" in (reply := self.receive())[0]:
            self.calls += 1
            if self.calls > CALLBACKS:
                self.close()
                raise Wrong(f"it calls the function that it was given more than {CALLBACKS:,} times", *self.doing())
            with contextlib.suppress(OSError):
                worker.send(self.wire, *self.callback(functions, *reply))
        header, out = reply
        try:
            if "missing" in header:
                raise Wrong(f"{self.path.name} has no function `{header['missing']}`: was it renamed or removed?")
            if "error" in header:
                raise self.raised(header)
            value = self.last = worker.decode(header["value"], out, self.thing)
            after, after_named = (worker.decode(node, out) for node in header["after"])
            assert type(after) is list and len(after) == len(args) and set(after_named) == set(kwargs)
        except Wrong:
            raise
        except Exception as error:
            self.close()
            raise self.nonsense(error) from None
        if inplace:
            return value, after, after_named
        for place, before in [*enumerate(args), *kwargs.items()]:
            now = after[place] if isinstance(place, int) else after_named[place]
            if not callable(before) and not isinstance(before, Thing) and not same(now, before, 0.0):
                parameter = self.parameter(name, place) if isinstance(place, int) else f"`{place}`"
                raise Wrong(f"it changes its argument {parameter} in place: the caller still needs it", *self.doing())
        return value, after, after_named

    def thing(self, node) -> "Thing":
        assert node[0] == "thing" and type(node[1]) is int
        return Thing(self, node[1], str(node[2]))

    def callback(self, functions: list, header: dict, blobs: list) -> tuple[dict, list]:
        """The learner's code called a function of ours."""
        out, started = [], time.monotonic()
        try:
            args, kwargs = (worker.decode(node, blobs) for node in header["call"])
            if amount(args) + amount(list(kwargs.values())) > ARGUMENTS:
                raise ValueError(f"the grader computes with at most {ARGUMENTS:,} numbers or letters in a call")
            before = [part.copy() if isinstance(part, np.ndarray) else None for part in args]
            with np.errstate(all="ignore"):  # what an answer asks for is its own affair
                value = functions[header["ask"]](*args, **kwargs)
            changed = [
                [place, worker.encode(part, out)]
                for place, (part, old) in enumerate(zip(args, before))
                if old is not None and not same(part, old, 0.0)
            ]
            return {"value": worker.encode(value, out), "changed": changed}, out
        except Exception as error:
            return {"raise": type(error).__name__, "text": str(error)[:500]}, []
        finally:
            paid = min(time.monotonic() - started, self.paid)  # our time, not theirs
            self.left, self.paid = self.left + paid, self.paid - paid

    def parameter(self, name: str, place: int) -> str:
        with contextlib.suppress(Exception):
            node = next(n for n in ast.walk(ast.parse(self.source)) if getattr(n, "name", None) == name)
            return f"`{(node.args.posonlyargs + node.args.args)[place].arg}`"
        return f"number {place + 1}"


class Thing:
    """The learner's object or function, which lives over there: its methods can be called, its attributes read."""

    def __init__(self, answer: Answer, number: int, kind: str):
        self.answer, self.number, self.kind = answer, number, kind

    def __call__(self, *args, **kwargs):
        return self.answer.ask(self.number, "", args, kwargs)[0]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.answer.ask(self.number, name, args, kwargs)[0]

    def get(self, name):
        return self.answer.ask(self.number, name, (), {}, get=True)[0]


UNREADABLE: dict[tuple[str, str], Wrong] = {}


def broken(name: str, source: str) -> Wrong | None:
    """A file that could not be loaded once is not tried again for each of its exercises."""
    if error := UNREADABLE.get((name, source)):
        again = Wrong(f"{error}, as above")
        again.loaded = False
        return again
    return None


def unreadable(name: str, source: str, error: Wrong, where: str) -> Wrong:
    told = f"{where}: {error.kinds[0]}: {error.text}" if isinstance(error, Raised) else f"{where}: {error}"
    UNREADABLE[name, source] = Wrong(f"the file cannot be loaded: {told}")
    wrong = Wrong(f"the file cannot be loaded: {told}", *error.details, trace=error.trace)
    wrong.loaded = False
    return wrong


# ---- checks


def amount(value) -> int:
    """How many numbers and letters there are in plain data."""
    if isinstance(value, np.ndarray) or worker.is_tensor(value):
        return int(np.prod(value.shape))
    if isinstance(value, list | tuple | set | frozenset):
        return sum(map(amount, value)) + 1
    if isinstance(value, dict):
        return amount([*value, *value.values()])
    return len(value) if isinstance(value, str | bytes) else 1


def array_of(value) -> np.ndarray | None:
    """Numbers, arrays and tensors as an array; None for anything else."""
    if isinstance(value, bool | int | float | complex | np.ndarray | np.generic):
        return np.asarray(value) if not isinstance(value, int) or abs(value) < 1 << 63 else None
    if worker.is_tensor(value):
        value = value.detach()
        with contextlib.suppress(TypeError):  # of a kind that NumPy lacks
            return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    return None


def close(got: np.ndarray, want: np.ndarray, tol: float) -> np.ndarray:
    """Where two arrays of one shape agree: within tol (1 + |want|), infinities and NaN only with themselves."""
    if not tol and got.dtype.kind in "biu" and want.dtype.kind in "biu":
        return np.asarray(got == want)  # float64 cannot tell large whole numbers apart
    got, want = (x.astype(np.complex128 if x.dtype.kind == "c" else np.float64) for x in (got, want))
    with np.errstate(invalid="ignore"):
        near = np.abs(got - want) <= tol * (1 + np.abs(want))
    return np.where(np.isfinite(want), near & np.isfinite(got), (got == want) | (np.isnan(got) & np.isnan(want)))


def same(got, want, tol: float | None = None) -> bool:
    """Whether two values are equal to the tolerance, dtypes aside. Never raises and never calls their own ==."""
    a, b = array_of(got), array_of(want)
    if a is not None and b is not None:
        return a.shape == b.shape and bool(close(a, b, tolerance(b) if tol is None else tol).all())
    if isinstance(want, list | tuple):
        return type(got) is type(want) and len(got) == len(want) and all(same(a, b, tol) for a, b in zip(got, want))
    if isinstance(want, dict):
        return type(got) is dict and got.keys() == want.keys() and all(same(got[key], want[key], tol) for key in want)
    return type(got) is type(want) and isinstance(want, str | bytes | int | set | frozenset | None) and got == want


def tolerance(want: np.ndarray) -> float:
    """About a hundred thousand rounding errors in float64, a hundred in float32, a few below; whole numbers exactly."""
    return {"f8": 1e-10, "c16": 1e-10, "f4": 1e-5, "c8": 1e-5, "f2": 1e-2}.get(want.dtype.str[1:], 0.0)


def describe(value) -> str:
    """A value in a few words: what it is and, when it is small, what is in it. Never raises."""
    try:
        return described(value)
    except Exception:
        return f"a {type(value).__name__}"


def described(value) -> str:
    array = array_of(value)
    if isinstance(value, Thing | Other):
        return f"an object of class {value.kind}"
    if callable(value):
        return getattr(value, "__name__", "a function")
    if array is not None and array.ndim:
        kind = "tensor" if worker.is_tensor(value) else "array"
        shown = np.array2string(array, precision=4, separator=", ")
        return f"{kind} {' '.join(shown.split())}" if array.size <= 9 else shape_of(value)
    if isinstance(value, list | tuple) and value and array_of(value[0]) is not None and len(str(value)) > 80:
        return f"a {type(value).__name__} of {len(value)}"
    text = str(array.item()) if array is not None else re.sub(r"\bnp\.\w+\(([^()]*)\)", r"\1", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def shape_of(value) -> str:
    kind = "tensor" if worker.is_tensor(value) else "array"
    return f"{str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"


def kind_of(value) -> str:
    """The kind of a value, as far as an answer must get it right: 3 and np.int64(3) are both a whole number."""
    if isinstance(value, np.ndarray) or worker.is_tensor(value):
        return "a tensor" if worker.is_tensor(value) else "an array" if value.ndim else "a number"
    for kinds, name in (((bool, np.bool_), "True or False"), ((int, np.integer), "a whole number")):
        if isinstance(value, kinds):
            return name
    if isinstance(value, float | np.floating):
        return "a number"
    return (
        "None"
        if value is None
        else f"an object of class {value.kind}"
        if isinstance(value, Thing | Other)
        else f"a {type(value).__name__}"
    )


def expect(got, want, *, what: str = "the result", tol: float | None = None, dtype: bool = True, mistakes=None):
    """`got` is `want`: type, shape, dtype, values. See the head of this file.

    tol is absolute and relative at once, |got - want| <= tol (1 + |want|); by default it follows from the dtype. With
    dtype=False any float width will do. Raises Wrong; AssertionError when a mistake gives the right value.
    """
    for sentence, value in (mistakes or {}).items():
        assert not same(value, want, tol), f"the grader cannot tell this mistake from the right answer: {sentence}"
    if mismatch := difference(got, want, what, tol, dtype):
        sentence, *details = mismatch
        named = [text for text, value in (mistakes or {}).items() if same(got, value, tol)]
        raise Wrong(named[0] if named else sentence, *details)


def difference(got, want, what: str, tol: float | None, dtype: bool) -> tuple[str, ...] | None:
    """A sentence and lines of numbers, or None when there is nothing to say."""
    kinds = kind_of(got), kind_of(want)
    if kinds[0] != kinds[1] and kinds != ("a whole number", "a number"):  # 0 will do for 0.0
        forgot = "; is there a `return`?" if got is None else ""
        return (f"{what} should be {kind_of(want)}, not {kind_of(got)}{forgot}",)
    if isinstance(want, list | tuple):
        for i, (a, b) in enumerate(zip(got, want)):
            if found := difference(a, b, f"{what}[{i}]", tol, dtype):
                return found
        if len(got) != len(want):
            return (f"{what} should have {len(want)} elements, not {len(got)}",)
        return None
    if isinstance(want, dict):
        if set(got) != set(want):
            lost, extra = ([key for key in a if key not in b] for a, b in ((want, got), (got, want)))
            return (f"{what} has the wrong keys: {f'{lost} missing' if lost else f'{extra} too many'}",)
        for key in want:
            if found := difference(got[key], want[key], f"{what}[{key!r}]", tol, dtype):
                return found
        return None
    a, b = array_of(got), array_of(want)
    if a is None or b is None:
        return None if got == want else (f"{what} should be {describe(want)}, not {describe(got)}",)
    if a.shape != b.shape:
        return (f"{what} should have shape {b.shape}, not {a.shape}",)
    near = close(a, b, tolerance(b) if tol is None else tol)
    numbers = ()
    if not near.all():
        with np.errstate(invalid="ignore"):  # inf - inf
            error = np.abs(np.where(near, 0, a.astype(np.complex128) - b.astype(np.complex128)))
        place = tuple(int(i) for i in np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape))
        at = f" at {list(place)}" if place else ""
        shown = f"{a[place]:.6g}", f"{b[place]:.6g}"
        shown = shown if shown[0] != shown[1] else (str(a[place]), str(b[place]))  # nearly right: all digits
        numbers = (
            f"got     {shape_of(got) + ', ' if b.ndim else ''}{(~near).sum()} of {near.size} values wrong",
            f"worst   {shown[0]}{at}, where {shown[1]} is right (off by {error[place]:.3g})",
        )
    if b.ndim and dtype and str(got.dtype) != str(want.dtype):
        return (f"{what} should be {want.dtype}, not {got.dtype}", *numbers)
    if b.ndim and a.dtype.kind != b.dtype.kind:
        return (f"{what} should be {want.dtype}, not {got.dtype}", *numbers)
    if near.all():
        return None
    if not b.ndim:
        return (f"{what} should be {describe(want)}, not {describe(got)}", *numbers)
    if (lost := np.isnan(a) & ~np.isnan(b)).any():
        return (f"{lost.sum()} NaN in {what}, the first at {np.argwhere(lost)[0].tolist()}", *numbers)
    return (f"wrong values in {what}", *numbers)


def says(fact, sentence: str, *details: str) -> None:
    """Fails with the sentence unless the fact, which the grader has worked out, holds."""
    if not fact:
        raise Wrong(sentence, *details)


def hunt(answer: Answer, right: dict[str, Callable], wrong: dict[str, Callable]) -> None:
    """Grade a test that the learner wrote: it passes every right implementation and fails, by `assert`, all wrong ones.

    Keys say what is special about each, for the message: "a version that loops over the heads", "the version that ...".
    Each gets a process of its own, so a test can tell them apart by what they do and by nothing else.
    """
    every, found = [*right.items(), *wrong.items()], {}
    random.SystemRandom().shuffle(every)  # so that not even the order tells
    for which, implementation in every:
        answer.restart()
        try:
            value = answer(anonymous(implementation, answer.parameter(answer.name, 0).strip("`")))
            says(value is None, f"your test returns {describe(value)}: nobody looks at it, only `assert` counts")
        except Raised as raised:
            found[which] = raised
    for which in right:
        if raised := found.get(which):
            message = f"your test fails {which}, which is correct: {raised.kinds[0]}{raised.text and ': '}{raised.text}"
            raise Wrong(message, *raised.details, trace=raised.trace)
    for which in wrong:
        if not (raised := found.get(which)):
            raise Wrong(f"your test passes {which}")
        if "AssertionError" not in raised.kinds:
            message = f"your test crashes instead of saying `assert` on {which}: {raised.kinds[0]}: {raised.text}"
            raise Wrong(message, *raised.details, trace=raised.trace)


def anonymous(function: Callable, name: str) -> Callable:
    """The function under a name that says nothing about it."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__name__ = name
    return call


# ---- a grade


def grade(test: Callable, answer: Answer) -> Wrong | None:
    """Run a grader; None when the answer is right. AssertionError is the grader's own fault and passes through."""
    try:
        test(answer)
        return None
    except AssertionError:
        raise
    except Exception as error:
        wrong = error
        if not isinstance(error, Wrong):
            # The grader stumbled, as one may over None where an array should be.
            message = f"it returned {describe(answer.last)}, which is not what was asked for"
            wrong = Wrong(message, f"grader  {type(error).__name__}: {error}", trace=traceback.format_exc())
        if answer.call and not any(line.startswith("call") for line in wrong.details):
            wrong.details += answer.doing()
        answer.close()
        wrong.printed = [clean(line[:200]) for line in answer.printed.splitlines()[-8:]]
        return wrong
    finally:
        answer.close()


def label(docstring: str) -> tuple[int, int, str, int] | None:
    """(level, minutes, lesson, section) from the last line of an exercise's docstring."""
    found = LABEL.search(docstring.strip())
    return found and (int(found[1]), int(found[2]), found[3], int(found[4]))
