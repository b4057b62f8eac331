"""`pytest --nbval lessons`: every notebook in this Python, in the environment in which it was built."""

import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DECIMAL = re.compile(r"[-+]?\d+\.\d+")
SECONDS = 20  # the most that a cell may take; a busy machine gets more


def nearly(a: str, b: str) -> bool:
    """The same text, where decimal numbers may differ by one unit of their last printed place."""
    words = [[line.split() for line in DECIMAL.sub("#", text).splitlines()] for text in (a, b)]
    if words[0] != words[1]:
        return False
    for x, y in zip(DECIMAL.findall(a), DECIMAL.findall(b)):
        places = len(x.split(".")[1])
        if places != len(y.split(".")[1]) or abs(float(x) - float(y)) > 1.01 * 10.0**-places:
            return False
    return True


def aligned(test: list, reference: list, sanitize: Callable[[str], str]) -> list:
    """The outputs of a test, each text replaced by the saved one where the two, sanitised, nearly agree."""
    from nbformat import from_dict

    test = [from_dict(output) for output in test]
    for new, old in zip(test, reference):
        for here, there in ((new, old), (new.get("data", {}), old.get("data", {}))):
            for key in here.keys() & there.keys():
                if key in ("text", "evalue") or key.startswith("text/"):
                    if nearly(sanitize(here[key]), sanitize(there[key])):
                        here[key] = there[key]
    return test


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    import nbval.kernel
    from nbval.plugin import IPyNbCell

    start, compare = getattr(nbval.kernel, "start_new_kernel", None), getattr(IPyNbCell, "compare_outputs", None)
    if not start or not compare:
        raise pytest.UsageError(
            f"lessons/conftest.py knows nbval 0.11 from the inside, and this is {version('nbval')}: "
            "install the one in constraints.txt"
        )
    if start.__module__ == __name__:
        return
    kernel_env = build_module().kernel_env

    # The pins reach the kernels and not this process, which may be running other tests.
    def start_new_kernel(**arguments):
        import matplotlib.font_manager  # noqa: F401 (fills its cache at the first use ever, and says so in a lesson)

        return start(**arguments, env=kernel_env(HERE.parent))

    def compare_outputs(self, test, ref, skip_compare=None):
        return compare(self, aligned(test, ref, self.sanitize), ref, skip_compare)

    nbval.kernel.start_new_kernel, IPyNbCell.compare_outputs = start_new_kernel, compare_outputs
    option.nbval_current_env = not option.nbval_kernel_name
    option.nbval_sanitize_with = option.nbval_sanitize_with or str(HERE / "nbval_sanitize.cfg")


def build_module():
    """lessons/build.py, whatever else may be called build."""
    spec = spec_from_file_location("lessons_build", HERE / "build.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    began = time.monotonic()
    result = yield
    limit = SECONDS * (5 if "PYTEST_XDIST_WORKER" in os.environ else 1)
    if os.environ.get("LESSONS_NATIVE"):  # several threads take far longer on a machine that is busy
        return result
    if hasattr(item, "cell") and (seconds := time.monotonic() - began) > limit:
        pytest.fail(f"the cell took {seconds:.0f} s, and a cell has {SECONDS}; if the machine was busy, run it again")
    return result
