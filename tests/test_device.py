"""The dtype rule on hardware that is not here, and messages that say what to do."""

import platform
import subprocess
import sys

import pytest
import torch

from nanogptx import device


@pytest.mark.parametrize("capability, expected", [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16),
                                                  ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
                                                  ((12, 0), torch.bfloat16)])  # fmt: skip
def test_cuda_rule(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # true on a T4, which only emulates it
    assert device.choose_dtype(torch.device("cuda")) == expected
    assert device.choose_dtype(torch.device("cuda"), "float32") == torch.float32


@pytest.mark.parametrize("has, expected", [({}, torch.float32), ({"avx512_bf16": False}, torch.float32),
                                           ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)])  # fmt: skip
def test_cpu_rule(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert device.choose_dtype(torch.device("cpu")) == expected
    assert device.choose_dtype(torch.device("mps")) == torch.float32


def test_best_device_present(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert device.choose_device().type == expected
        assert device.choose_device("cpu").type == "cpu"


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda.*use --device cpu"):
        device.choose_device("cuda")
    with pytest.raises(ValueError, match="'gpu' is not known: expected auto, cpu, cuda"):
        device.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1: use --device cuda:0"):
        device.choose_device("cuda:1")


def test_autocast_runs_products_in_the_dtype():
    a = torch.randn(3, 5)
    for dtype in (torch.float32, torch.bfloat16):
        with device.autocast(torch.device("cpu"), dtype):
            assert (a @ a.T).dtype == dtype


def test_a_step_has_its_own_randomness():
    draws = []
    for place in ((0, 0), (0, 1), (1, 0), (0, 1, 2), (0, 1, 4), (0, 1)):
        device.seed_everything(*place)
        draws.append(torch.rand(1).item())
    assert draws[1] == draws[5] and len(set(draws)) == 5


def test_memory_figures():
    before = device.peak_memory(torch.device("cpu"))
    block = torch.ones(50_000_000)  # 200 MB
    assert device.peak_memory(torch.device("cpu")) >= max(before, block.nbytes)
    assert device.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these knobs")
def test_keep_memory_keeps_it():
    """Freed memory stays with the process (so in one of its own)."""
    code = """
import sys, numpy
from nanogptx import device
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
assert sys.argv[1] == "no" or device.keep_memory()
block = numpy.ones(200 * 2**20, dtype=numpy.uint8)
with_it = resident()
del block
print(with_it - resident())
"""
    freed = {
        keep: int(subprocess.run([sys.executable, "-c", code, keep], capture_output=True, text=True).stdout)
        for keep in ("no", "keep")
    }
    assert freed["no"] > 190 * 2**20 and freed["keep"] < 10 * 2**20


def test_keep_memory_without_glibc(monkeypatch):
    def none(name):
        raise OSError("no such library")

    monkeypatch.setattr(device.ctypes, "CDLL", none)
    assert not device.keep_memory()
