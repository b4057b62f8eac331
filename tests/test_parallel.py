"""Who computes what; what really runs on several processes is tested in programs/test_parallel_program.py."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogptx import checkpoint, data, parallel, train
from nanogptx.parallel import World, share_of
from nanogptx.tokenizer import CharTokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "size, parts, each", [(1, 1, 1), (1, 6, 6), (2, 6, 3), (3, 6, 2), (2, 1, 1), (4, 3, 1), (2, 3, 2)]
)
def test_processes_share_the_rows_of_a_batch(size, parts, each):
    """Each row in exactly one part of one process, all parts of one size, at least as many as asked for."""
    slices = [share_of(24, parts, World(CPU, rank, rank, size)) for rank in range(size)]
    assert all(len(mine) == each for mine in slices)
    rows = [row for mine in slices for part in mine for row in range(24)[part]]
    assert rows == list(range(24)) and each * size >= parts


@pytest.mark.parametrize("count, parts, size", [(7, 2, 1), (8, 3, 1), (8, 1, 3), (8, 4, 3)])
def test_a_batch_that_cannot_be_cut_is_refused(count, parts, size):
    with pytest.raises(ValueError, match=f"--batch-size {count} cannot be cut into .* equal parts"):
        share_of(count, parts, World(CPU, 0, 0, size))


def trainer_of(rank: int, size: int, folder, batch_size: int) -> train.Trainer:
    """What one of several processes holds; nothing is sent, as long as it only cuts batches."""
    options = train.Options(data=str(folder / "text.txt"), out=folder / "run", tokenizer="char", n_layer=1, n_embd=8, n_head=1, n_kv_head=1,
                            block_size=8, batch_size=batch_size, accumulate=2, device="cpu", dtype="float32", seed=3)  # fmt: skip
    if not (folder / "run").exists():
        return train.open_trainer(options)
    dataset = data.prepare(options.data, CharTokenizer.load(folder / "run"))
    model = train.build_model(*train.make_shape(options, 40))
    real, parallel.wrap = parallel.wrap, lambda model, kind, world: model
    try:
        return train.Trainer(folder / "run", options, model, None, train.Task(dataset, 8), World(CPU, rank, rank, size))
    finally:
        parallel.wrap = real


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_epoch_has_every_target_once_over_all_processes(tmp_path, monkeypatch, size):
    """A11: all tokens but the first are predicted once by one process, whatever their number; places to spare weigh nothing."""
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path))
    text = "".join(chr(65 + n % 26) for n in range(1000))
    (tmp_path / "text.txt").write_text(text)
    trainer_of(0, 1, tmp_path, 12)
    trainers = [trainer_of(rank, size, tmp_path, 12) for rank in range(size)]
    split = trainers[0].task.dataset.train
    windows = data.n_windows(split, 8)
    steps = -(-windows // 12)
    seen, weights = [], []
    for step in range(steps):
        x, y = trainers[0].task.batch(trainers[0].options, step)
        parts = [trainer.parts(step, x, y) for trainer in trainers]
        assert sum(part.weight for mine in parts for part in mine) == pytest.approx(size), (
            "together they count as one batch"
        )
        weights += [part.weight for mine in parts for part in mine]
        rows = [(part.inputs, part.targets) for part in itertools.chain(*parts)]
        assert torch.equal(torch.cat([a for a, _ in rows]), torch.from_numpy(x))
        seen.append(torch.cat([b for _, b in rows]))
    targets = torch.cat(seen)[:windows]  # what comes after belongs to the next epoch
    counts = np.bincount(targets[targets != data.IGNORE], minlength=28)
    expected = np.bincount(split.take(np.arange(1, split.n_tokens)), minlength=28)
    assert (counts == expected).all() and (targets != data.IGNORE).sum() == split.n_tokens - 1
    assert len(set(weights)) > 1, "the last window is not full, so its part weighs less"


def test_every_part_has_its_own_dropout_whoever_computes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path))
    (tmp_path / "text.txt").write_text("abcdefghijklmnop" * 20)
    trainer_of(0, 1, tmp_path, 4)
    x, y = trainer_of(0, 1, tmp_path, 4).task.batch(train.Options(batch_size=4), 5)
    one = [part.seed for part in trainer_of(0, 1, tmp_path, 4).parts(5, x, y)]
    two = [part.seed for rank in range(2) for part in trainer_of(rank, 2, tmp_path, 4).parts(5, x, y)]
    assert one == two and len(set(one)) == 2


def test_evaluation_is_shared_out_and_put_together(monkeypatch):
    """Five batches on three processes: the mean of all; in the second round one of them has nothing of its own."""

    class Model(torch.nn.Module):
        config = None

        def forward(self, x, y):
            calls.append(1)
            return None, x.float().mean()

    batches = [
        (np.full((2, 3), n, np.int64), np.where(np.arange(6).reshape(2, 3) <= n, 1, data.IGNORE)) for n in range(5)
    ]
    box, calls = [], []
    for rank in range(3):
        monkeypatch.setattr(World, "gather", lambda self, value: box.append(value) or [value])
        calls.clear()
        train.evaluate(Model(), iter(batches), torch.no_grad, World(CPU, rank, rank, 3))
        assert len(calls) == 2, "everyone takes part in every round"
    monkeypatch.setattr(World, "gather", lambda self, value: box)
    mean, error = train.evaluate(Model(), iter(batches), torch.no_grad, World(CPU, 0, 0, 3))
    assert mean == pytest.approx(sum(n * (n + 1) for n in range(5)) / 15)
    monkeypatch.undo()
    assert train.evaluate(Model(), iter(batches), torch.no_grad, World(CPU)) == pytest.approx((mean, error))


def test_a_world_of_one_sends_nothing():
    with parallel.open_world("cpu") as world:
        assert world == World(CPU) and world.main
        assert world.sum(1.5, True) == [1.5, True] and world.gather("x") == ["x"] and world.first(lambda: 7) == 7
        with world.one_of_node_first():
            pass
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="this machine has 1: use --nproc-per-node 1"), parallel.open_world("auto"):
        pass


@pytest.mark.parametrize("count, restarted", [(None, False), ("0", False), ("2", True)])
def test_who_may_be_restarted_resumes_by_itself(monkeypatch, tmp_path, count, restarted):
    monkeypatch.setattr(checkpoint, "OUT", tmp_path)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if count:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", count)
    assert train.parse(["tales", "--steps", "5"]).resume == restarted
    assert train.parse(["tales", "--resume"]).resume


def test_whole_tensors_stay_as_they_are():
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}
    kept = parallel.whole_tensors(tensors, World(CPU))
    assert kept.keys() == tensors.keys() and all(torch.equal(kept[name], tensors[name]) for name in tensors)
    assert parallel.whole_tensors(tensors, World(CPU, 1, 1, 2)) == {}
    assert parallel.shard_like(tensors["a"], tensors["a"]) is tensors["a"]


@pytest.mark.parametrize("status", [None, 0, 130])
def test_a_worker_whose_work_is_done_tears_nothing_down(status):
    """What aborts at the interpreter's end, as torch's threads may, does not change what the process says and returns."""
    code = "import atexit, os\nfrom nanogptx import program\natexit.register(os.abort)\n"
    code += f"program.run(lambda: print('done') or {status})"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TORCHELASTIC_RUN_ID": "x"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (status or 0, "done\n", "")
