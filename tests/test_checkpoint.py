"""A checkpoint is whole or absent, whatever happens while it is written, and later damage is seen and named."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from nanogptx import checkpoint
from nanogptx.checkpoint import read_safetensors
from nanogptx.files import read_json, write, write_json
from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.tokenizer import CharTokenizer

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 11}


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 5), value), "b": torch.arange(4)},
        "optimizer": {"w/step": torch.tensor(value)},
    }


def save(run, step: int):
    return checkpoint.save(run, step, groups(float(step)), {"step": step})


def value_of(folder) -> tuple[float, int]:
    return read_safetensors(folder / "model.safetensors")["w"][2, 4].item(), read_json(folder / "state.json")["step"]


def test_what_is_saved_comes_back(tmp_path):
    folder = save(tmp_path, 7)
    assert checkpoint.latest(tmp_path) == folder and value_of(folder) == (7.0, 7)
    for group, tensors in groups(7.0).items():
        loaded = read_safetensors(folder / f"{group}.safetensors")
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[k], t) and loaded[k].dtype == t.dtype for k, t in tensors.items())


def test_newest_by_number_and_the_older_ones_go(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    assert [checkpoint.step_of(f) for f in checkpoint.steps(tmp_path)] == [999_999, 1_000_000]
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-2000000.bak").mkdir()
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 1_000_000


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_damage_is_named_and_skipped(tmp_path, file, harm):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((new / file).read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        (new / file).unlink()
    else:
        (new / file).write_bytes({"flip": bytes(content), "cut": content[:-1], "empty": b""}[harm])
    said = []
    assert checkpoint.latest(tmp_path, said.append) == old
    assert len(said) == 1 and "step-2" in said[0] and file in said[0]
    assert value_of(save(tmp_path, 2)) == (2.0, 2), "a damaged step must be replaced when it is saved again"
    assert checkpoint.latest(tmp_path, pytest.fail) == new


def test_all_damaged_is_no_checkpoint(tmp_path):
    (save(tmp_path, 1) / "state.json").unlink()
    assert checkpoint.latest(tmp_path, lambda text: None) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_manifest_cannot_point_outside(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in checkpoint.damage(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_checkpoint import checkpoint, save

run, at = Path(sys.argv[1]), int(sys.argv[2])
save(run, 1)
calls = 0
def before(call):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
os.fsync, os.rename, os.replace = before(os.fsync), before(os.rename), before(os.replace)
checkpoint.write_safetensors = before(checkpoint.write_safetensors)
checkpoint.shutil.rmtree = before(checkpoint.shutil.rmtree)
save(run, 2)
save(run, 3)
os._exit(100 + calls)
"""


def in_child(code: str, *args) -> int:
    """Run code in a forked child of a process that did nothing else yet; returns its exit status, -9 when killed."""
    pid = os.fork()
    if pid == 0:
        sys.argv = ["child", *map(str, args)]
        exec(code, {"__name__": "child"})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_moment_of_a_save(tmp_path):
    """SIGKILL before each write, flush, rename and removal in turn: step N or N - 1 is there, whole, and never a mix."""
    for at in range(1, 60):
        run = tmp_path / str(at)
        run.mkdir()
        status = in_child(KILLED, run, at)
        folder = checkpoint.latest(run, pytest.fail)
        value, step = value_of(folder)
        assert value == step == checkpoint.step_of(folder)
        if status >= 100:
            assert step == 3 and not list(run.glob(".*")) and status - 100 == at - 1
            break
        assert status == -9
        assert value_of(save(run, 4)) == (4.0, 4), "what the crash left behind must not be in the way"
        assert not list(run.glob(".*")), "nor stay"
    assert at > 20, "there are more moments than that"


def test_disk_full_keeps_the_old_checkpoint(tmp_path):
    save(tmp_path, 1)
    code = """
    import resource, sys
    from pathlib import Path
    import torch
    from nanogptx import checkpoint, program
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    big = {"model": {"w": torch.zeros(100, 1000)}}
    program.run(lambda: checkpoint.save(Path(sys.argv[1]), 2, big, {}) and None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr and "400,000 bytes" in done.stderr and "intact" in done.stderr
    assert value_of(checkpoint.latest(tmp_path, pytest.fail)) == (1.0, 1)
    assert [f.name for f in tmp_path.iterdir()] == ["step-1"], "nothing half-written stays"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_goes_on_as_if_nothing_had_happened(kind):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        if kind == "muon":
            return model, torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1)
        groups = [{"params": [model[1].weight, model[0].bias], "weight_decay": 0.5}, {"params": [model[0].weight]}]
        return model, torch.optim.AdamW(groups, lr=0.1)

    def go(model, optimizer, steps):
        for n in steps:
            optimizer.zero_grad()
            model(torch.full((2, 3), float(n))).square().sum().backward()
            optimizer.step()

    straight = make()
    go(*straight, range(6))
    first = make()
    go(*first, range(3))
    names = {p: n for n, p in first[0].named_parameters()}
    tensors = {k: t.clone() for k, t in checkpoint.optimizer_tensors(first[1], names).items()}
    weights = {k: t.clone() for k, t in first[0].state_dict().items()}
    second = make()
    second[0].load_state_dict(weights)
    checkpoint.load_optimizer(second[1], {p: n for n, p in second[0].named_parameters()}, tensors)
    go(*second, range(3, 6))
    for name, tensor in straight[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name


def make_run(run):
    run.mkdir()
    tokenizer = CharTokenizer.train("abcdefghi")
    tokenizer.save(run / tokenizer.file_name)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**TINY))
    config = {"format": "nanogptx-run", "architecture": "gpt2", "model": TINY}
    write_json(run / "config.json", config)
    checkpoint.save(run, 5, {"model": model.state_dict()}, {"step": 5})
    return model


def test_load_run(tmp_path):
    model = make_run(tmp_path / "run")
    loaded, tokenizer, step = checkpoint.load_run(tmp_path / "run")
    assert step == 5 and tokenizer.decode(tokenizer.encode("dig")) == "dig" and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


class Trap:
    def __reduce__(self):
        return os.system, ("touch MARKER",)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "step-5/model.safetensors", "step-5/manifest.json"])
@pytest.mark.parametrize("content", ["pickle", "torch", "random", "empty", "list"])
def test_foreign_files_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch, file, content):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    target = tmp_path / "run" / file
    if content == "torch":
        torch.save({"w": Trap()}, target)
    else:
        target.write_bytes(
            {"pickle": pickle.dumps(Trap()), "random": os.urandom(300), "empty": b"", "list": b"[1]"}[content]
        )
    said = []
    with pytest.raises(ValueError, match="run"):
        checkpoint.load_run(tmp_path / "run", warn=said.append)
    assert not (tmp_path / "MARKER").exists()


def test_weights_of_another_shape_are_named(tmp_path):
    make_run(tmp_path / "run")
    model = GPT2(GPT2Config(**TINY | {"n_embd": 12}))
    tensors = read_safetensors(tmp_path / "run/step-5/model.safetensors")
    with pytest.raises(
        ValueError, match=r"attention\.k\.bias is \(8,\), the model has \(12,\)|is \(.*8.*\), the model has"
    ):
        checkpoint.load_weights(model, tensors, tmp_path)
    with pytest.raises(ValueError, match="blocks.1.* is missing"):
        checkpoint.load_weights(GPT2(GPT2Config(**TINY | {"n_layer": 2})), tensors, tmp_path)
    with pytest.raises(ValueError, match="extra is not part of the model"):
        checkpoint.load_weights(GPT2(GPT2Config(**TINY)), tensors | {"extra": torch.ones(1)}, tmp_path)


def test_no_run_there(tmp_path):
    make_run(tmp_path / "tales")
    with pytest.raises(ValueError, match="no run at .*talse; in .* there are tales"):
        checkpoint.load_run(tmp_path / "talse")
    with pytest.raises(ValueError, match="not a run directory"):
        checkpoint.load_run(tmp_path)
    shutil.rmtree(tmp_path / "tales/step-5")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.load_run(tmp_path / "tales")


def test_write_keeps_the_old_content_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write(path, "old é".encode())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError):
            write(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text(encoding="utf-8") == "old é" and len(list(tmp_path.iterdir())) == 1
