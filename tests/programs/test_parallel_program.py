"""One run on several real processes: the same numbers as on one, whoever dies on the way."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanogptx import checkpoint, tales

# The first test that needs the fixture `two` waits for four runs, each of several processes: minutes on a slow machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Stories are rows of different lengths, so the parts of a batch have different numbers of targets.
PLAN = """--tokenizer char --batch-size 8 --accumulate 4 --dropout 0.2 --steps 24 --save-every 3 --eval-every 10
    --eval-tokens 3000 --samples 1 --n-layer 2 --n-head 3 --n-kv-head 1 --n-embd 24 --device cpu --dtype float32
    --lr 0.004 --block-size 512""".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    os.environ["NANOGPTX_DATA"] = str(tmp_path_factory.mktemp("data"))
    rng = random.Random(0)
    for number, story in enumerate(tales.corpus("tales", 30_000)[0]):
        (folder / f"{number}.txt").write_text(story[: rng.randrange(20, 300)], encoding="utf-8")
    yield folder
    del os.environ["NANOGPTX_DATA"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(args: list, launch: list | None = None, plan: dict | None = None, **env: str) -> subprocess.Popen:
    """The trainer under torchrun, by default as two processes of one machine."""
    launch = launch or ["--nproc-per-node", 2, "--master-port", free_port()]
    command = [*TORCHRUN, *map(str, launch), HERE / "worker.py", *map(str, args)]
    env = os.environ | {"PLAN": json.dumps(plan or {}), "OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen, status: int | None = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert status is None or process.returncode == status, err[-5000:]
    return out, err


def alone(args: list) -> str:
    """The trainer without torchrun."""
    command = [sys.executable, HERE.parents[1] / "nanogptx/train.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def arguments(text: Path, optimizer: str, run: Path, *more) -> list:
    return ["--data", text, *PLAN, "--optimizer", optimizer, "--out", run, *more]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """Runs of one process that nobody disturbed, by optimizer."""
    runs = {name: tmp_path_factory.mktemp("one") / name for name in ("adamw", "muon")}
    for optimizer, run in runs.items():
        alone(arguments(text, optimizer, run))
    return runs


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The same on two processes, by optimizer and kind."""
    runs = {}
    for optimizer, kind in (("adamw", "ddp"), ("adamw", "fsdp"), ("muon", "ddp"), ("muon", "fsdp")):
        run = tmp_path_factory.mktemp("two") / f"{optimizer}-{kind}"
        runs[optimizer, kind] = (
            run,
            *finish(start(arguments(text, optimizer, run, "--parallel", kind), plan={"guard": str(run.parent)})),
        )
    return runs


def assert_same_losses(a: Path, b: Path, tolerance: float) -> None:
    """Every step once, on the same batch, with the same loss, and in the end the same score."""
    one, other = metrics(a), metrics(b)
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(24))
    assert [line["batch"] for line in one] == [line["batch"] for line in other]
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in other] == pytest.approx(
            [line[key] for line in one], rel=tolerance * (10 if key == "grad_norm" else 1)
        )
    scores = [json.loads((run / "result.json").read_text())["validation"]["nats_per_token"] for run in (a, b)]
    assert scores[1] == pytest.approx(scores[0], rel=tolerance)


def assert_same_bits(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    for group in ("model", "optimizer"):
        one, other = (load_file(checkpoint.latest(run, pytest.fail) / f"{group}.safetensors") for run in (a, b))
        assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# ---- the same numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-6), ("muon", 1e-3)])
def test_two_processes_compute_what_one_does(one, two, optimizer, tolerance, kind):
    """With dropout, four parts to a step and different numbers of targets in each."""
    run, out, err = two[optimizer, kind]
    assert_same_losses(one[optimizer], run, tolerance)
    counts = {line["loss"] for line in metrics(run)}
    assert len(counts) == 24, "a constant would agree, too"


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    """A8: eight rows with 0 to 21 targets at once, one by one, or shared out: the same clipped gradients and new weights."""
    from tests.programs import gradients

    alone = gradients.parallel.World(gradients.torch.device("cpu"))
    whole = gradients.results(1, "ddp", alone)
    assert whole["norm"] > 0.1, "so that clipping does something"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", gradients.__file__, tmp_path, "8"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [load_file(tmp_path / f"{kind}.safetensors") for kind in ("ddp", "fsdp")]
    for other, processes in zip([gradients.results(8, "ddp", alone), *shared], (1, 2, 2), strict=True):
        assert other.keys() == whole.keys() and other.pop("processes") == processes
        for name, tensor in other.items():
            assert (tensor - whole[name]).norm() <= 1e-6 * whole[name].norm() + 1e-12, name


def test_the_tests_of_equality_can_fail(one, two):
    with pytest.raises(AssertionError):
        assert_same_losses(one["adamw"], two["muon", "ddp"][0], 1e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_only_rank_0_writes_and_speaks(two, kind):
    """The guard of worker.py would have stopped rank 1 at its first writing; what is printed is printed once."""
    run, out, err = two["adamw", kind]
    assert out.count("model  TinyLlama") == out.count("validation  ") == out.count("step 10:") == 1
    assert "saved in" in out and f"2 x cpu ({kind})" in out
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "result.json",
        "step-21",
        "step-24",
        "tokenizer.json",
    ]
    assert not list(run.parent.glob(".*"))


def test_checkpoints_hold_whole_plain_tensors(one, two):
    for group in ("model", "optimizer"):
        shapes = [{name: (t.shape, t.dtype) for name, t in load_file(checkpoint.latest(run) / f"{group}.safetensors").items()}
                  for run in (one["muon"], two["muon", "ddp"][0], two["muon", "fsdp"][0])]  # fmt: skip
        assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) > 15


def test_one_layout_goes_on_where_another_stopped(text, one, tmp_path):
    """1 process, 2, FSDP, 1 again: each stopped by a signal that reaches only one rank, and the next goes on with its run.

    Saving memory changes nothing, either.
    """
    run = tmp_path / "run"
    args = arguments(text, "adamw", run, "--resume")
    single = ["--nproc-per-node", 1, "--master-port", free_port()]
    legs = [(single, "ddp", 0), (None, "ddp", 1), (None, "fsdp", 1), (single, "ddp", 0), (None, "fsdp", 0)]
    for number, (launch, kind, rank) in enumerate(legs):
        last = number == len(legs) - 1
        accident = [rank, "nothing" if last else "signal", 5]
        thrift = ["--recompute", "--chunked-loss"] if number % 2 == 0 else ["--no-recompute", "--no-chunked-loss"]
        out, _ = finish(
            start([*args, "--parallel", kind, *thrift], launch, {"accidents": [accident]}), 0 if last else 1
        )
        assert last or f"stopped and saved at step {5 * number + 5}" in out
    assert_same_losses(one["adamw"], run, 1e-6)


def test_adapters_on_two_processes(text, one, tmp_path):
    """Most parameters have no gradient: the same losses on one process, two, and two that share the weights, in turn."""
    shape = ("--tokenizer", "--n-layer", "--n-head", "--n-kv-head", "--n-embd", "--block-size")
    args = ["--data", text, *PLAN, "--init-from", one["adamw"], "--lora-rank", 3, "--optimizer", "adamw"]
    for flag in shape:
        del args[args.index(flag) : args.index(flag) + 2]
    alone([*args, "--out", tmp_path / "one"])
    finish(start([*args, "--out", tmp_path / "ddp"]))
    mixed = [*args, "--resume", "--out", tmp_path / "mixed"]
    out, _ = finish(start([*mixed, "--parallel", "fsdp"], plan={"accidents": [[1, "signal", 11]]}), 1)
    assert "stopped and saved at step 11" in out and "in adapters, which are trained" in out
    assert (
        load_file(tmp_path / "mixed/step-11/adapter.safetensors").keys()
        == load_file(tmp_path / "ddp/step-24/adapter.safetensors").keys()
    )
    alone([*mixed, "--steps", 15])
    finish(start([*mixed, "--parallel", "fsdp", "--steps", 24]))
    assert_same_losses(tmp_path / "one", tmp_path / "ddp", 1e-6)
    lines = metrics(tmp_path / "mixed")
    assert [line["loss"] for line in lines[:15]] == pytest.approx(
        [x["loss"] for x in metrics(tmp_path / "one")[:15]], rel=1e-3
    )
    assert len(lines) == 24


# ---- accidents ----------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_started_again_and_the_run_continues_exactly(text, two, tmp_path):
    """A1 on two processes: one of them is killed at eight moments, and torchrun starts both again, without --resume."""
    rng, run = random.Random(1), tmp_path / "run"
    accidents = [[rng.randrange(2), "seconds", rng.uniform(0, 0.6)] for _ in range(5)]
    accidents += [[0, "step", 1], [1, "step", 4], [0, "step", 2]]
    launch = ["--nproc-per-node", 2, "--max-restarts", 8, "--master-port", free_port()]
    finish(start(arguments(text, "adamw", run), launch, {"accidents": accidents, "guard": str(run)}))
    assert_same_bits(two["adamw", "ddp"][0], run)


def test_killed_while_saving(text, two, tmp_path):
    """A3 on two processes: rank 0 is killed at flushes of files, in every part of a save; nothing is lost or mixed."""
    run = tmp_path / "run"
    accidents = [[0, "sync", n] for n in (1, 5, 7, 8, 10, 13)]
    launch = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 8]
    args = arguments(text, "muon", run, "--parallel", "fsdp")
    finish(start(args, launch, {"accidents": accidents}))
    assert_same_bits(two["muon", "fsdp"][0], run)
    assert not list(run.glob(".*"))


def test_everything_killed_and_started_by_hand(text, two, tmp_path):
    """SIGKILL to torchrun itself and all workers, three times."""
    run, rng = tmp_path / "run", random.Random(2)
    for _ in range(3):
        process = start(arguments(text, "adamw", run, "--resume"))
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(3, 4) if process.poll() is None else 0)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, workers)]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    finish(start(arguments(text, "adamw", run, "--resume")))
    assert_same_bits(two["adamw", "ddp"][0], run)


def two_agents(args: list, plan: dict, **env: str) -> list[subprocess.Popen]:
    """Two torchruns that meet at an address, as on two machines, with one process each."""
    port = free_port()
    launch = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 4, "--rdzv-id", "nodes"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return [start(args, launch, plan, **env) for _ in range(2)]


def test_two_nodes(text, two, tmp_path):
    """A worker of one of two agents dies, and both start again."""
    run = tmp_path / "run"
    plan = {"accidents": [[1, "step", 8]], "once": str(tmp_path / "once"), "guard": str(run)}
    nodes = two_agents(arguments(text, "adamw", run), plan, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    try:
        for node in nodes:
            finish(node)
    finally:
        for node in nodes:
            node.kill()
    assert (tmp_path / "once").exists()
    assert_same_bits(two["adamw", "ddp"][0], run)


def test_ctrl_c_saves(text, one, tmp_path):
    """SIGINT to torchrun reaches the workers, who finish their step and save; one process goes on from there."""
    run = tmp_path / "run"
    process = start([*arguments(text, "adamw", run), "--steps", 100_000])
    deadline = time.monotonic() + 60
    while not (run / "step-3").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, None)
    step = checkpoint.step_of(checkpoint.latest(run, pytest.fail))
    assert f"stopped and saved at step {step}" in out and step == len(metrics(run))
    alone([*arguments(text, "adamw", run), "--resume", "--steps", step + 2])
    assert len(metrics(run)) == step + 2


# ---- mistakes -----------------------------------------------------------------------------------------------------------


def test_two_nodes_that_could_not_start_again_are_refused(text, tmp_path):
    """Without that setting torch gives new processes the addresses of dead ones: in most cases it hung."""
    nodes = two_agents(arguments(text, "adamw", tmp_path / "run"), {})
    said = [finish(node, 1)[1] for node in nodes]
    assert any("needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in err for err in said) and not (tmp_path / "run").exists()


MISTAKES = {
    "a batch that cannot be cut": (
        ["--batch-size", 7],
        "--batch-size 7 cannot be cut into 4 equal parts (--accumulate 4, processes 2)",
    ),
    "no GPU": (["--device", "cuda"], "use --device cpu"),
    "a run that is there": (["--out", "{there}"], "holds something already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_a_sentence(text, tmp_path, mistake):
    import torch

    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    more, expected = MISTAKES[mistake]
    more = [str(m).format(there=tmp_path / "there") for m in more]
    _, err = finish(start([*arguments(text, "adamw", tmp_path / "run"), *more]), 1)
    said = [line for line in err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and expected in said[0] and "[rank" not in err
    assert not (tmp_path / "run").exists()
