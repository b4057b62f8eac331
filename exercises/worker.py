"""The other side: the process in which the learner's code runs, and the wire to it.

The grader never imports an answer. It sends a call, this process makes it, and plain data comes back: numbers, strings,
lists, arrays. Nothing that can cross the wire says "passed", so there is nothing here worth tampering with.

    grader  -- fork, please (a new wire) -->  zygote (has imported numpy, holds no secret)
                                                 |  fork
    grader  <----- calls and results ----->   child: one answer of one exercise, alone, limited, then killed

Where there is no safe fork (macOS, Windows) each answer gets a Python of its own: slower, otherwise the same.
On the wire a message is a JSON header and, behind it, the bytes of its arrays: never a pickle, which could run code.
"""

import builtins
import contextlib
import ctypes
import itertools
import json
import linecache
import os
import select
import signal
import socket
import struct
import sys
import traceback
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1 << 28  # bytes in one message
DEPTH = 40  # lists in lists
torch = None  # imported when the first tensor is met


class Other:
    """What arrives in place of an object that is not plain data: the name of its class."""

    def __init__(self, kind: str):
        self.kind = kind


# ---- values as JSON and bytes


def encode(value, blobs: list, special=None, depth: int = 0):
    """A JSON tree for `value`; the bytes of arrays go to `blobs`. Types count exactly: a subclass is not plain data."""
    kind, more = type(value), lambda part: encode(part, blobs, special, depth + 1)
    if depth > DEPTH:
        return ["other", f"{kind.__name__} nested more than {DEPTH} deep"]
    if value is None or kind is bool or kind is str:
        return ["plain", value]
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", value.hex()]
    if kind is bytes:
        return ["bytes", blob(value, blobs)]
    if kind in (list, tuple):
        return [kind.__name__, [more(part) for part in value]]
    if kind in (set, frozenset):
        return [kind.__name__, sorted((more(part) for part in value), key=repr)]
    if kind is dict:
        return ["dict", [[more(key), more(part)] for key, part in value.items()]]
    if kind is np.ndarray and value.dtype.kind in "biufc":
        return ["array", value.dtype.str, list(value.shape), blob(value.tobytes(), blobs)]
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return ["scalar", value.dtype.str, blob(value.tobytes(), blobs)]
    if is_tensor(value):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), blob(raw, blobs)]
    if special and (node := special(value)):
        return node
    return ["other", str(kind.__name__)[:80]]


def blob(raw: bytes, blobs: list) -> int:
    blobs.append(raw)
    return len(blobs) - 1


def is_tensor(value) -> bool:
    global torch
    torch = torch or sys.modules.get("torch")
    kinds = (torch.Tensor, torch.nn.Parameter) if hasattr(torch, "nn") else ()
    return type(value) in kinds and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def decode(node, blobs: list, special=None):
    """The value of a JSON tree. Whatever does not fit raises an exception, for the caller to call a broken message."""
    global torch
    kind, content = node[0], node[1]
    if kind == "plain" and (content is None or type(content) in (bool, str)):
        return content
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "bytes":
        return blobs[content]
    if kind in ("list", "tuple", "set", "frozenset"):
        made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return made(decode(part, blobs, special) for part in content)
    if kind == "dict":
        return {decode(key, blobs, special): decode(part, blobs, special) for key, part in content}
    if kind in ("array", "scalar"):
        dtype = np.dtype(content)
        if dtype.kind not in "biufc":
            raise ValueError(f"an array of {dtype}")
        array = np.frombuffer(blobs[node[-1]], dtype).copy()
        return array.reshape(node[2]) if kind == "array" else array[0]
    if kind == "tensor":
        import torch

        dtype = {str(t): t for t in vars(torch).values() if isinstance(t, torch.dtype)}[f"torch.{content}"]
        raw = bytearray(blobs[node[3]])
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(node[2])
    if kind == "other":
        return Other(str(content))
    if special:
        return special(node)
    raise ValueError(f"a value of kind {kind}")


def send(wire: socket.socket, header, blobs: list = ()) -> None:
    text = json.dumps([header, [len(raw) for raw in blobs]]).encode()
    wire.sendall(struct.pack(">QQ", len(text), sum(map(len, blobs))) + text + b"".join(blobs))


def receive(wire: socket.socket, read=None):
    """(header, blobs); EOFError when the other side has gone, ValueError when it does not speak our language."""
    read = read or wire.recv

    def exactly(n):
        parts, left = [], n
        while left:
            parts.append(read(min(left, 1 << 20)))
            if not parts[-1]:
                raise EOFError
            left -= len(parts[-1])
        return b"".join(parts)

    n_text, n_blobs = struct.unpack(">QQ", exactly(16))
    if n_text > LIMIT >> 4 or n_blobs > LIMIT:
        raise ValueError(f"a message of {n_text + n_blobs:,} bytes")
    header, lengths = json.loads(exactly(n_text))
    if sum(lengths) != n_blobs or min(lengths, default=0) < 0:
        raise ValueError("a message whose parts do not add up")
    return header, [exactly(n) for n in lengths]


# ---- the child: one answer of one exercise


def manners(own: Path, component: str, folder: str):
    """An audit hook that refuses, with a sentence, what no answer needs. It stops the careless, not the determined."""
    hidden = [str(ROOT / name) + os.sep for name in ("solutions", "exercises", "tests", "lessons", ".git")]
    hidden += [str(ROOT / "nanogptx" / f"{component}.py"), str(ROOT / "nanogptx" / "__pycache__" / f"{component}.")]
    modules = ("solutions", "exercises", "tests", f"nanogptx.{component}", "multiprocessing.process")
    modules += ("_xxsubinterpreters", "_interpreters")  # they would be free of this hook
    process = {"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn", "os.system", "subprocess.Popen"}
    process |= {"os.kill", "os.killpg", "pty.spawn", "os.startfile", "_winapi.CreateProcess", "resource.prlimit"}
    network = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
    change = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
    change |= {"os.utime", "os.chown", "os.setxattr", "sqlite3.connect"}
    real, split, fspath, path_types = os.path.realpath, os.sep, os.fsdecode, (str, bytes, os.PathLike)
    isdir, exact = os.path.isdir, str.__str__  # an exact str: a subclass may lie
    root, own, folder = str(ROOT) + os.sep, str(own), real(folder) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event, args):
        if event == "import":
            if args[0] in modules or args[0].startswith(tuple(f"{name}." for name in modules)):
                raise ImportError(f"{args[0]} is not available here: write it yourself")
        elif event == "open":
            if isinstance(args[0], path_types):
                path, flags = real(exact(fspath(args[0]))), args[2] if isinstance(args[2], int) else 0
                if (path + split).startswith(tuple(hidden)) and path != own:
                    raise PermissionError(f"an answer may not read {path.removeprefix(root)}")
                if isdir(path) and not (path + split).startswith(folder):
                    raise PermissionError("an answer opens no folders")  # a way to name files that this cannot see
                if flags & writing and not path.startswith((folder, real(os.devnull))):
                    raise PermissionError("an answer writes no files")
        elif event in process:
            raise PermissionError(f"an answer starts and ends no processes ({event})")
        elif event in network:
            raise PermissionError(f"an answer uses no network ({event})")
        elif event in change:
            for path in args[:2]:
                if isinstance(path, path_types) and not real(exact(fspath(path))).startswith(folder):
                    raise PermissionError(f"an answer changes no files ({event})")

    return hook


def limit(memory: int, seconds: float) -> None:
    """At most `memory` bytes more than now, no core dumps, no endless files; a net for loops that nobody watches."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
        resource.setrlimit(resource.RLIMIT_CPU, (int(10 * seconds) + 10,) * 2)
        if sys.platform == "linux":
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + memory,) * 2)


def told(error: BaseException, path: str) -> dict:
    """An exception as plain data: its class and bases, its message, the learner's frames, the innermost last."""
    with contextlib.suppress(Exception):
        frames = [
            [frame.lineno, frame.name, frame.line or ""]
            for frame in traceback.extract_tb(error.__traceback__, limit=-200)
            if frame.filename == path
        ]
        last = traceback.extract_tb(error.__traceback__, limit=-1)
        inside = bool(last) and last[0].filename == path
        message = str(error)[:500]
        if isinstance(error, SyntaxError) and error.filename == path:
            frames, message = [[error.lineno or 0, "", (error.text or "").strip()]], str(error.msg)
        names = [kind.__name__ for kind in type(error).__mro__ if isinstance(kind.__name__, str)]
        return {"error": names, "message": message, "frames": frames[:3] + frames[3:][-10:], "inside": inside}
    return {"error": ["Exception", "BaseException"], "message": "", "frames": [], "inside": False}


class Child:
    """Loads the learner's file and makes the calls that the grader asks for, until the wire is closed."""

    def __init__(self, wire: socket.socket, request: dict):
        self.wire, self.path, self.things = wire, request["path"], []
        # Taken now: the learner's code may replace whatever a module holds.
        self.pid, self.getpid, self.exit = os.getpid(), os.getpid, os._exit
        self.flush = (sys.stdout.flush, sys.stderr.flush)
        self.types = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
        self.send, self.receive, self.encode, self.decode, self.told = send, receive, encode, decode, told
        self.copyto, self.array, self.module = np.copyto, np.ndarray, types.ModuleType(request["name"])

    def alone(self) -> None:
        """A process that the learner forked off must not answer in our name."""
        if self.getpid() != self.pid:
            self.exit(0)

    def reply(self, header: dict, blobs: list = ()) -> None:
        self.alone()
        for flush in self.flush:
            with contextlib.suppress(BaseException):
                flush()
        self.send(self.wire, header, blobs)

    def keep(self, value):
        """Functions, and objects of a class that the learner's file defines, stay here; the grader gets a number."""
        if type(value) in self.types or getattr(type(value), "__module__", None) == self.module.__name__:
            self.things.append(value)
            return ["thing", len(self.things) - 1, str(type(value).__name__)[:80]]

    def incoming(self, node):
        """A function of the grader's becomes one that asks the grader; a thing of ours is ours again."""
        if node[0] == "thing":
            return self.things[node[1]]
        assert node[0] == "function"

        def ask(*args, **kwargs):
            blobs = []
            call = [self.encode(part, blobs) for part in (list(args), kwargs)]
            self.reply({"ask": node[1], "call": call}, blobs)
            header, blobs = self.receive(self.wire)
            if "raise" in header:
                kind = getattr(builtins, header["raise"], None)
                raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(header["text"])
            for place, node_ in header["changed"]:  # the function changed an array in place: so shall it look here
                now = self.decode(node_, blobs)
                self.copyto(args[place], now) if type(args[place]) is self.array else args[place].copy_(now)
            return self.decode(header["value"], blobs)

        ask.__name__ = ask.__qualname__ = node[2]
        return ask

    def load(self, source: str) -> dict:
        linecache.cache[self.path] = (len(source), None, source.splitlines(keepends=True), self.path)
        self.module.__file__ = self.path
        sys.modules[self.module.__name__] = self.module
        try:
            exec(compile(source, self.path, "exec", dont_inherit=True), self.module.__dict__)
        except BaseException as error:
            return self.told(error, self.path)
        return {}

    def answer(self, header: dict, blobs: list) -> tuple[dict, list]:
        """One call: its value and what became of its arguments, or the exception."""
        out = []
        try:
            args, kwargs = (self.decode(node, blobs, self.incoming) for node in header["call"])
            thing, name = header["of"], header["name"]
            owner = self.module.__dict__ if thing is None else None
            if owner is not None and name not in owner:
                return {"missing": name}, []
            target = owner[name] if owner is not None else self.things[thing]
            if thing is not None and name:
                target = getattr(target, name)
            value = target if header["get"] else target(*args, **kwargs)
            special = self.keep
            node = self.encode(value, out, special)
            after = [self.encode(part, out, lambda part: ["plain", None]) for part in (args, kwargs)]
            return {"value": node, "after": after}, out
        except BaseException as error:
            return self.told(error, self.path), []

    def run(self, source: str) -> None:
        self.reply(self.load(source))
        while True:
            header, blobs = self.receive(self.wire)
            self.reply(*self.answer(header, blobs))


def child(wire: socket.socket, folder: str) -> None:
    """Become the process of one answer. Never returns."""
    try:
        send(wire, {"ready": True})
        request, _ = receive(wire)
        os.chdir(folder)
        os.environ["TMPDIR"] = folder
        sys.path.append(str(ROOT))
        answer = Child(wire, request)
        limit(request["memory"], request["seconds"])
        for module, name in ((signal, "pidfd_send_signal"), (os, "setpriority")):  # no audit event tells of these
            if hasattr(module, name):
                delattr(module, name)
        sys.addaudithook(manners(Path(request["path"]), request["component"], folder))
        answer.run(request["source"])
    except (EOFError, OSError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def quiet(log: int) -> None:
    """Nothing to read, and what is printed goes to a file that the grader shows, marked as the learner's."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)


# ---- the zygote: forks children, one at a time, and leaves nothing of them behind


def zygote(control: socket.socket) -> None:
    # Orphans become our children, also those that left their process group, so that we can end them.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    for _ in itertools.count():
        message, fds, _, _ = socket.recv_fds(control, 4096, 2)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: do not outlive the zygote
            os.setsid()
            quiet(fds[1])
            os.close(fds[1])
            child(socket.socket(fileno=fds[0]), message.decode())
        for fd in fds:
            os.close(fd)
        gone = os.pidfd_open(pid)
        select.select([gone, control], [], [])  # it has ended, or the grader wants it to, or the grader has ended
        os.close(gone)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while orphans := children.read_text().split() if children.exists() else []:
            for orphan in map(int, orphans):
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)
        if not control.recv(4):  # the grader's "stop"
            return
        control.sendall(struct.pack(">i", os.waitstatus_to_exitcode(status)))


def main() -> None:
    role, handle, *rest = sys.argv[1:]
    for name in rest.pop().split(","):
        __import__(name)
    if role == "zygote":
        zygote(socket.socket(fileno=int(handle)))
    elif sys.platform == "win32":
        child(socket.fromshare(sys.stdin.buffer.read()), rest[0])
    else:
        child(socket.socket(fileno=int(handle)), rest[0])


if __name__ == "__main__":
    main()
