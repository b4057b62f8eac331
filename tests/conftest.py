"""One thread a process: the tests' tensors are tiny, two test processes share the machine, and results stay the same."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
