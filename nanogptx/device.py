"""Where to compute and in which number format, and the one place where randomness is seeded.

bfloat16 has float32's range and 8 bits of precision: the matrix units of recent hardware multiply it several times
faster, and weights that stay in float32 lose nothing. float16 has more precision and less range, so its gradients need
loss scaling (Micikevicius et al. 2017, arXiv:1710.03740). Which of them is fast is a property of the chip.
"""

import contextlib
import ctypes
import platform
import sys

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps"), or with "auto" the best one present.

    Raises ValueError when the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device '{name}' is not known: expected auto, cpu, cuda, cuda:0, ... or mps") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise ValueError(
            f"device '{name}' was asked for, but torch {torch.__version__} finds none here: use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{name}' was asked for, but there are {torch.cuda.device_count()}: use --device cuda:0"
        )
    return device


def choose_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """The number format for matrix products on `device`: the one called `name`, or with "auto" by this rule.

    CUDA of capability 8 and up: bfloat16. Capability 7 (T4, V100): float16; torch would emulate bfloat16 there, slowly.
    A CPU with bfloat16 instructions (AVX512-BF16, AMX): bfloat16. Everything else, Apple's MPS too: float32.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return has.get("avx512_bf16", False) or has.get("amx_bf16", False)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """A context in which matrix products run in `dtype`; weights, norms' sums and the loss stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The number format of a matrix product with x here and now: autocast's where that is on, else x's own."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on "meta", say
    return torch.get_autocast_dtype(kind) if on else x.dtype


class PackedLinear(torch.nn.Module):
    """A linear layer for a CPU, its weights in the order in which oneDNN's kernels read them; it has no gradient.

    One token takes one product with each matrix, and reading the matrix is what takes the time. torch's own layout is
    read at about half of the memory's speed: measured by tests/bench/bench_sample.py.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: torch.nn.Module) -> None:
    """Replace a model's linear layers by `PackedLinear` ones where this machine has the kernels: for inference only."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and can_pack(child.weight):
                setattr(module, name, PackedLinear(child))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a `PackedLinear` can hold this weight: float32, or bfloat16 if the CPU has its instructions, on x86."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    dtypes = (torch.float32, torch.bfloat16) if cpu_has_bfloat16() else (torch.float32,)
    return torch.backends.mkldnn.is_available() and weight.dtype in dtypes


def seed_everything(seed: int, step: int = 0, row: int = 0) -> None:
    """Seed torch for the part of a step's batch that begins at `row`.

    So dropout is a function of (seed, step, row): a resumed run repeats it, and so does one on more processes.
    """
    # subtle: the CPU's generator looks at the lowest 32 bits only
    torch.manual_seed((seed * 1_000_003 + step + row * 15_485_863) % 2**32)


def keep_memory() -> bool:
    """Let this process keep freed memory for its next allocation; True if the C library (glibc) can do that.

    A training step takes and frees the same large blocks every time. glibc gives each back to the system, which has to
    fill it with zeros before it is handed out again: measured by tests/bench/bench_gpt2_step.py.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the names of the two knobs, see `man mallopt`
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def free_memory(device: torch.device) -> int:
    """Bytes that a program may still take on `device`; more than any machine has where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**62


def peak_memory(device: torch.device) -> int:
    """The most memory this process has used so far, in bytes: on a GPU what torch allocated, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # subtle: not getrusage's figure, in which a program starts with the peak of the one that started it
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
