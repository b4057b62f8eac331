"""What all tests share: how they use two cores.

One thread a process: the tests' tensors are tiny, two test processes share the machine, and results stay the same.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup` a file's tests stay together, but for those of the graders, which take minutes."""
    for item in items:
        if item.path.name != "test_graders.py":
            item.add_marker(pytest.mark.xdist_group(item.path.name))
