"""Answers that cheat, crash or return strange things. None of them may pass, and none may stop the grading."""

# Answers that are hostile, careless or strange; `right(*args, **kwargs)` is the solution. None of them may pass.
RETURNS = {
    "one dimension too many, which broadcasts": "return wrap(right(*a, **k))",
    "an object equal to everything": "right(*a, **k); return Everything()",
    "a subclass of the right type": "return subclassed(right(*a, **k))",
    "NaN": "return nan(right(*a, **k))",
    "a list for an array, a tuple for a list": "return other_container(right(*a, **k))",
    "arguments changed in place": "answer = right(*a, **k); scribble([*a, *k.values()]); return answer",
}
DEEDS = {
    "None": "return None",
    "an array equal to everything": "return np.ones((2, 3)).view(Subclass)",
    "os._exit(0)": "os._exit(0)",
    "sys.exit(0)": "sys.exit(0)",
    "a loop without end": "while True: pass",
    "recursion without end": "return {name}(*a, **k)",
    "a fork, both of which answer": "os.fork(); return right(*a, **k)",
    "a program started": "subprocess.run([sys.executable, '-c', '']); return right(*a, **k)",
    "a patched numpy": "np.allclose = np.array_equal = lambda *a, **k: True; np.abs = np.zeros_like; return None",
    "patched builtins": "builtins.isinstance = lambda *a: True; builtins.all = lambda *a: True; return None",
    "a patched pytest": "import pytest; pytest.fail = lambda *a, **k: None; pytest.exit('1 passed', returncode=0)",
    "a faked summary": "print('\\n===== 1 passed in 0.01s =====', flush=True); os._exit(0)",
    "an empty AssertionError": "raise AssertionError",
    "an exception that hides itself": "raise Hidden",
    "a terabyte": "return np.ones(1 << 37)",
    "a report of its own": "open({report!r}, 'w').write('{{}}'); return right(*a, **k)",
    "an exit that others shall take": "atexit.register(os._exit, 0); threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "a signal to its parent": "os.kill(os.getppid(), 9); return right(*a, **k)",
    "the solution imported": "from solutions.{chapter} import {name} as f; return f(*a, **k)",
    "the grader read": "open({grader!r}).read(); return right(*a, **k)",
}
TOOLS = """
import atexit, builtins, os, subprocess, sys, threading, time
import numpy as np
class Everything:
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda *a: True
    __ne__ = lambda *a: False
    __getattr__ = __call__ = __getitem__ = __array__ = lambda self, *a, **k: self
    __float__ = lambda self: 1.0
    __bool__ = __contains__ = lambda *a: True
class Subclass(np.ndarray):
    __eq__ = lambda *a: True
class Hidden(BaseException):
    __str__ = __repr__ = property(lambda self: os._exit(0))
def wrap(x):
    return x[None] if hasattr(x, "shape") else [x]
def subclassed(x):
    kind = type(x)
    if kind is np.ndarray:
        return x.view(Subclass)
    if x is None or kind is bool or hasattr(x, "shape"):
        return Everything()
    return type("Sub", (kind,), {"__module__": __name__, "__eq__": lambda *a: True, "__hash__": None})(x)
def nan(x):
    return x * float("nan") if hasattr(x, "shape") else float("nan")
def other_container(x):
    return x.tolist() if hasattr(x, "shape") and getattr(x, "ndim", 0) else tuple(x) if type(x) is list else [x]
def scribble(values):
    done = False
    for value in values:
        if hasattr(value, "shape") and value.size:
            value[...] = value.reshape(-1)[0] + 1
            done = True
        elif isinstance(value, list | dict | set) and value:
            value.clear()
            done = True
    if not done:
        raise NotImplementedError
"""


def hostile(solution: str, name: str, body: str, **places: str) -> str:
    """The solution's file with another answer, which may do anything and has the solution at hand as `right`."""
    return f"{solution}\n{TOOLS}\nright = {name}\ndef {name}(*a, **k):\n    {body.format(name=name, **places)}\n"
