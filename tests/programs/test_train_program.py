"""The trainer as its users meet it: runs, stops, crashes, resumes, and mistakes answered in one sentence."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanogptx import adapter, checkpoint, tales
from nanogptx.tokenizer import CharTokenizer

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "nanogptx/train.py")
SAMPLE = str(ROOT / "nanogptx/sample.py")
SMALL = "--n-layer 2 --n-embd 16 --n-head 2 --n-kv-head 1 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory):
    """Prepared data goes to a folder of the tests', here and in every program they start."""
    old, os.environ["NANOGPTX_DATA"] = os.environ.get("NANOGPTX_DATA"), str(tmp_path_factory.mktemp("data"))
    yield
    os.environ.pop("NANOGPTX_DATA") if old is None else os.environ.update(NANOGPTX_DATA=old)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a text with späces.txt"
    path.write_text("\n".join(tales.corpus("tales", 12_000)[0]), encoding="utf-8")
    return path


def run(*args, cwd=None, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {})
    )


class Launcher:
    def __init__(self):
        command = [sys.executable, Path(__file__).parent / "launcher.py"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, args: list, log: Path, **plan) -> int:
        order = {"args": [str(a) for a in args], "log": str(log)} | plan
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def launch():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    launcher = Launcher()
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait(30)


def plan(text: Path, optimizer: str) -> list:
    """A run of 40 steps with dropout, three parts to a step, and several epochs."""
    return ["--data", text, "--tokenizer", "char", "--block-size", 48, "--batch-size", 6, "--accumulate", 3, "--dropout", 0.2,
            "--steps", 40, "--save-every", 4, "--eval-every", 10, "--samples", 1, "--optimizer", optimizer, *SMALL]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(launch, text, tmp_path_factory):
    runs = {}
    for optimizer in ("muon", "adamw"):
        folder = tmp_path_factory.mktemp("straight") / optimizer
        assert launch([*plan(text, optimizer), "--out", folder], folder.with_suffix(".log")) == 0
        runs[optimizer] = folder
    return runs


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in (a / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(40))
    for group in ("model", "optimizer"):
        one, other = (load_file(checkpoint.latest(f, pytest.fail) / f"{group}.safetensors") for f in (a, b))
        assert one.keys() == other.keys() and len(one) > 10
        assert all(one[k].equal(other[k]) for k in one)
    results = [json.loads((f / "result.json").read_text()) for f in (a, b)]
    assert results[0]["validation"] == results[1]["validation"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_killed_at_random_moments_and_resumed(launch, text, uninterrupted, tmp_path, optimizer):
    """A1: SIGKILL at ten random moments, resume each time; the result is that of the run that nobody disturbed."""
    folder, log, rng = tmp_path / "run", tmp_path / "log", random.Random(optimizer)
    args, kills, status = [*plan(text, optimizer), "--resume", "--out", folder], 0, None
    while kills < 10:
        status = launch(args, log, kill_after=rng.uniform(0.1, 0.8))
        kills += status == -signal.SIGKILL
        if status == 0:  # it came through: take some of its work away, and go on killing
            (folder / "result.json").unlink()
            last = checkpoint.latest(folder, pytest.fail)
            os.rename(last, last.with_name("gone"))
        assert status in (0, -signal.SIGKILL), log.read_text()
    assert launch(args, log) == 0, log.read_text()
    assert_same_run(uninterrupted[optimizer], folder)


def test_killed_while_saving_and_resumed(launch, text, uninterrupted, tmp_path):
    """SIGKILL at ten moments inside saves (the flush of each file in turn); a resumed run never notices."""
    folder, log = tmp_path / "run", tmp_path / "log"
    args = [*plan(text, "muon"), "--resume", "--out", folder]
    for at in (1, 2, 3, 5, 8, 9, 11, 12, 13, 14):
        assert launch(args, log, kill_at_sync=at) == -signal.SIGKILL, log.read_text()
    assert launch(args, log) == 0, log.read_text()
    assert_same_run(uninterrupted["muon"], folder)


def lora_plan(text: Path, base: Path) -> list:
    """The same length of run, with adapters, on another run."""
    shape = ["--tokenizer", "--block-size", "--n-layer", "--n-embd", "--n-head", "--n-kv-head"]
    args = plan(text, "adamw")
    for flag in shape:
        del args[args.index(flag) : args.index(flag) + 2]
    return [*args, "--init-from", base, "--lora-rank", 3, "--lora-dropout", 0.1]


def test_a_lora_run_killed_while_saving_and_at_random_moments(launch, text, uninterrupted, tmp_path):
    """A1 for adapters, also at the flushes of the folder for PEFT, which at any moment is whole or not yet there."""
    folder, log, rng = tmp_path / "run", tmp_path / "log", random.Random(3)
    assert launch([*lora_plan(text, uninterrupted["muon"]), "--out", tmp_path / "straight"], log) == 0, log.read_text()
    args, base = (
        [*lora_plan(text, uninterrupted["muon"]), "--resume", "--out", folder],
        checkpoint.read(uninterrupted["muon"]),
    )
    moments = [{"kill_at_sync": at} for at in (2, 6, 9, 11, 12, 13, 14, 15, 22, 25)]
    for moment in [*moments, *({"kill_after": rng.uniform(0.1, 0.6)} for _ in range(4))]:
        assert launch(args, log, **moment) in (-signal.SIGKILL, 0), log.read_text()
        if (folder / "adapter/adapter_model.safetensors").exists():
            assert len(adapter.read(folder, base).scales) == 14
    if (folder / "result.json").exists():  # it came through: take some of its work away
        last = checkpoint.latest(folder, pytest.fail)
        os.rename(last, last.with_name("gone"))
    assert launch(args, log) == 0, log.read_text()
    assert_same_run(tmp_path / "straight", folder)
    one, other = (adapter.read(run, base) for run in (folder, tmp_path / "straight"))
    assert one.scales == other.scales and all(t.equal(other.tensors[name]) for name, t in one.tensors.items())
    assert not list((folder / "adapter").glob(".*")), "what was killed left nothing behind"


def test_a_lora_run_samples_exports_and_merges_like_any_other(launch, text, uninterrupted, tmp_path):
    run_, log = tmp_path / "run", tmp_path / "log"
    assert launch([*lora_plan(text, uninterrupted["muon"]), "--steps", 6, "--out", run_], log) == 0, log.read_text()
    said = log.read_text()
    assert re.search(
        r"model  TinyLlama, [\d,]+ parameters, .* and 2,112 \(\d+\.\d%\) in adapters, which are trained", said
    )
    assert re.search(r"step 0: loss \d\.\d+, that of the model to start from\n", said)
    done = run(ROOT / "nanogptx/lora.py", "merge", uninterrupted["muon"], run_, "--out", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "") and "14 layers changed by 2,112 parameters" in done.stdout
    done = run(ROOT / "nanogptx/checkpoint.py", "export", run_, tmp_path / "hf")
    assert (done.returncode, done.stderr) == (0, "")
    texts = [
        run(SAMPLE, tmp_path / name, "--temperature", 0, "--n", 1, "--max-tokens", 30)
        for name in ("run", "merged", "hf")
    ]
    assert texts[0].returncode == 0 and texts[0].stdout == texts[1].stdout == texts[2].stdout
    tensors = [checkpoint.read(tmp_path / name).tensors for name in ("run", "merged")]
    assert all(t.equal(tensors[1][name]) for name, t in tensors[0].items())
    small = sum(f.stat().st_size for f in (run_ / "adapter").iterdir())
    assert small < 20_000


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_saves_first(launch, text, uninterrupted, tmp_path, number, status):
    """A5: the step is finished and saved, the exit status says why, and nothing is lost."""
    folder, log = tmp_path / "run", tmp_path / "log"
    args = [*plan(text, "muon"), "--out", folder]
    assert launch(args, log, signal_at=[18, number, 1]) == status, log.read_text()
    assert checkpoint.step_of(checkpoint.latest(folder, pytest.fail)) == 18
    assert "--resume" in log.read_text() and not (folder / "result.json").exists()
    assert launch([*args, "--resume"], log) == 0, log.read_text()
    assert_same_run(uninterrupted["muon"], folder)


def test_asked_twice_it_leaves_at_once(launch, text, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert launch([*plan(text, "muon"), "--out", folder], log, signal_at=[18, signal.SIGINT, 2]) == 130
    assert checkpoint.step_of(checkpoint.latest(folder, pytest.fail)) == 16  # the last regular one, intact
    assert "Traceback" not in log.read_text()


def test_evaluating_changes_nothing(launch, text, uninterrupted, tmp_path):
    """A9: the same batches, losses and weights whether validation happens every 10 steps, every 7, or never."""
    lines = {}
    for every in (7, 1000):
        folder = tmp_path / str(every)
        assert launch([*plan(text, "muon"), "--eval-every", every, "--out", folder], tmp_path / "log") == 0
        lines[every] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    straight = [json.loads(line) for line in (uninterrupted["muon"] / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(straight):
        for other in lines.values():
            assert {k: v for k, v in other[number].items() if k != "val_loss"} == {
                k: v for k, v in line.items() if k != "val_loss"
            }
    assert sum("val_loss" in line for line in straight) == 3 and sum("val_loss" in line for line in lines[1000]) == 0


@pytest.fixture(scope="module")
def story_run(launch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "tiny"
    log = folder.with_suffix(".log")
    status = launch(
        ["tales", *SMALL, "--steps", "30", "--save-every", "10", "--eval-every", "10", "--out", folder], log
    )
    assert status == 0, log.read_text()
    return folder


def test_a_run_prints_what_it_learned(story_run):
    said = story_run.with_suffix(".log").read_text()
    for pattern in (
        r"text +tales: [\d,]+ tokens", r"model +TinyLlama, [\d,]+ parameters", r"step 0: loss 6\.[78]\d+.* ln 900 = 6\.802",
        r"step 20: validation \d\.\d{3} nats per token", r"\nvalidation +\d\.\d+ ± 0\.\d+ nats per token = \d\.\d+ nats per character = \d\.\d+ bits per byte",
        r"floor +\d\.\d+ nats per token = 0\.1\d+ nats per character", r"of 100 sampled stories \d+ are grammatical",
        r"--- sample 3 \(", r"took +\d+\.\d s for 30 steps, [\d,]+ tokens/s, peak memory [\d,]+ MiB",
    ):  # fmt: skip
        assert re.search(pattern, said), f"{pattern} is not in\n{said}"
    assert {f.name for f in story_run.iterdir()} == {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png",
                                                    "result.json", "step-20", "step-30"}  # fmt: skip
    assert (story_run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((story_run / "result.json").read_text())
    assert result["floor"]["nats_per_char"] < result["validation"]["nats_per_char"] and result["peak_bytes"] > 2**20


def test_the_floor_counts_what_the_loss_counts(story_run):
    """Per story: -log_prob of the validation stories, over the tokens that the model is charged for (text and end)."""
    result = json.loads((story_run / "result.json").read_text())
    _, tokenizer, _ = checkpoint.load_run(story_run)
    stories = tales.corpus("tales")[1]
    nats, tokens = -sum(map(tales.log_prob, stories)), sum(len(tokenizer.encode(s)) + 1 for s in stories)
    assert result["floor"]["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-9)
    assert result["floor"]["nats_per_char"] == pytest.approx(nats / sum(map(len, stories)), rel=1e-9)
    ratio = result["validation"]["nats_per_char"] / result["validation"]["nats_per_token"]
    assert ratio == pytest.approx(tokens / sum(map(len, stories)), rel=1e-9)


def test_eval_only_gives_the_same_figures_and_writes_nothing(launch, story_run, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in story_run.rglob("*")}
    assert launch(["--eval-only", "--out", story_run], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    said, first = (tmp_path / "log").read_text(), story_run.with_suffix(".log").read_text()
    line = re.search("\nvalidation .*", first)[0]
    assert line in said and re.search("referee .*", first)[0] in said
    assert {f: f.stat().st_mtime_ns for f in story_run.rglob("*")} == before


def test_no_samples_are_as_well(launch, text, tmp_path):
    assert launch([*plan(text, "muon"), "--steps", 3, "--samples", 0, "--out", tmp_path / "run"], tmp_path / "log") == 0


def test_more_steps_for_a_finished_run(launch, story_run, tmp_path):
    import shutil

    folder, log = tmp_path / "longer", tmp_path / "log"
    shutil.copytree(story_run, folder)
    assert launch(["--resume", "--out", folder, "--steps", "35"], log) == 0, log.read_text()
    assert checkpoint.step_of(checkpoint.latest(folder, pytest.fail)) == 35


def test_minutes_fix_the_number_of_steps(launch, text, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    args = [*plan(text, "muon"), "--minutes", "0.02", "--out", folder]
    assert launch(args, log) == 0, log.read_text()
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert f"time for {steps} steps, " in log.read_text()
    assert steps >= 11 and lines[-1]["lr"] == 0 < lines[-2]["lr"], "the learning rate must fall to its end in that time"


def test_samples(story_run, tmp_path):
    """From another folder, with the run's path; the seed decides, greedy needs none."""
    texts = [run(SAMPLE, story_run, "--prompt", "One", "--n", "2", "--max-tokens", "20", *more, cwd=tmp_path)
             for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"])]  # fmt: skip
    assert all(t.returncode == 0 and t.stdout.startswith("One") for t in texts), texts[0].stderr
    assert all(re.fullmatch(r"\n\d+ tokens, the first after [\d.]+ s, then [\d,]+ tokens/s\n", t.stderr) for t in texts)
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    one, other = texts[3].stdout.strip().split("\n\n")
    assert one == other


# ---- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory, text, story_run):
    """Files and folders to be wrong with."""
    import shutil

    here = tmp_path_factory.mktemp("places")
    (here / "empty.txt").touch()
    (here / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (here / "latin1.txt").write_bytes("Zoë\n".encode("latin-1") * 2000)
    (here / "short.txt").write_text("ab")
    (here / "folder").mkdir()
    (here / "file").write_text("a file")
    (here / "full").mkdir()
    (here / "full/mine.txt").write_text("mine")
    shutil.copytree(story_run, here / "run")
    shutil.copytree(story_run, here / "other-tokenizer")
    CharTokenizer.train("abc").save(here / "other-tokenizer/tokenizer.json")
    return here


MISTAKES = {
    "preset": (["shakespear"], "unknown preset 'shakespear': did you mean shakespeare?"),
    "data": (["--data", "tale"], "did you mean tales"),
    "missing file": (["--data", "{}/none.txt"], "none.txt"),
    "empty file": (["--data", "{}/empty.txt"], "empty.txt"),
    "binary file": (["--data", "{}/binary.txt"], "binary"),
    "not UTF-8": (["--data", "{}/latin1.txt"], "UTF-8"),
    "short file": (["--data", "{}/short.txt", "--tokenizer", "bpe"], ""),
    "folder without text": (["--data", "{}/folder"], "folder"),
    "vocabulary too large": (["--data", "{}/full", "--vocab-size", "5000"], ""),
    "tokenizer": (["--tokenizer", "bpee"], "did you mean bpe"),
    "model": (["--model", "gpt2-smal"], "did you mean gpt2-small"),
    "n_embd and n_head": (["--n-embd", "100", "--n-head", "3"], "n_embd = 100 is not divisible by n_head = 3"),
    "n_head and n_kv_head": (["--n-kv-head", "3"], "n_head = 4 is not divisible by n_kv_head = 3"),
    "n_kv_head on GPT-2": (["tales-gpt2", "--n-kv-head", "2"], "a gpt2 model has no such setting"),
    "out is a file": (["--out", "{}/file"], "file"),
    "out holds something": (["--out", "{}/full"], "holds something already"),
    "out holds a run": (["--out", "{}/run"], "--resume"),
    "out below a file": (["--out", "{}/file/run"], "file"),
    "resume what is no run": (["--resume", "--out", "{}/full"], "not a run directory"),
    "resume another shape": (["--resume", "--out", "{}/run", "--n-embd", "32"], "was made with --n-embd 16, not 32"),
    "resume another tokenizer": (
        ["--resume", "--out", "{}/run", "--tokenizer", "char"],
        "was made with --tokenizer bpe",
    ),
    "resume a changed tokenizer": (
        ["--resume", "--out", "{}/other-tokenizer"],
        "is not the one that the run was made with",
    ),
    "evaluate nothing": (["--eval-only", "--out", "{}/nothing"], "no run at"),
    "no GPU": (["--device", "cuda"], "--device cpu"),
    "unknown device": (["--device", "tpu"], "device 'tpu'"),
    "no steps": (["--steps", "0"], "--steps is 0"),
    "uneven accumulation": (
        ["--batch-size", "8", "--accumulate", "3"],
        "--batch-size 8 cannot be cut into 3 equal parts (--accumulate 3, processes 1)",
    ),
    "learning rate": (["--lr", "-1"], "--lr -1"),
    "nothing to fine-tune": (["--lora-rank", "8"], "with --init-from"),
    "a base that is not there": (["--init-from", "{}/none"], "no run at"),
    "a base that is no run": (["--init-from", "{}/full"], "holds no config.json"),
    "another shape than the base's": (
        ["--init-from", "{}/run", "--n-layer", "9"],
        "does not fit the weights of the base",
    ),
    "another tokenizer than the base's": (
        ["--init-from", "{}/run", "--tokenizer", "char"],
        "cannot be with --init-from",
    ),
    "no layer of that name": (
        ["--init-from", "{}/run", "--lora-rank", "2", "--lora-targets", "qq"],
        "there are attention.k,",
    ),
    "rank": (["--init-from", "{}/run", "--lora-rank", "1000000000"], "choose 1 to"),
    "too large": (["tinyllama-1.1b", "--n-layer", "4000"], "GiB"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(launch, places, tmp_path, mistake):
    import torch

    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    args, expected = MISTAKES[mistake]
    args = [a.format(places) for a in args]
    if "--out" not in args:
        args += ["--out", str(tmp_path / "run")]
    before = sorted(places.rglob("*"))
    status = launch([*args, "--steps", "2"] if "--steps" not in args else args, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert status == 2, said
    assert re.fullmatch(r"error: .+\n", said) and expected in said
    assert sorted(places.rglob("*")) == before and not (tmp_path / "run").exists(), (
        "a mistake must leave nothing behind"
    )


def test_unknown_option_gets_the_nearest(tmp_path):
    done = run(TRAIN, "--n-emb", "64", cwd=tmp_path)
    assert done.returncode == 2 and "--n-embd" in done.stderr and "Traceback" not in done.stderr


def test_help_has_a_sentence_for_every_option():
    done = run(TRAIN, "--help")
    assert done.returncode == 0 and "shakespeare" in done.stdout
    for option in re.findall(r"│ (--[a-z-]+)", done.stdout):
        assert re.search(rf"{option}\b.*\n?(.*\n)?.*[a-z]{{3}}", done.stdout), option


@pytest.mark.parametrize("args", [["{}/none"], ["{}/full"], ["{}/run", "--top-p", "2"], ["{}/run", "--temperature", "-1"],
                                  ["{}/run", "--n", "0"], ["{}/run", "--device", "cuda:7"], ["{}/run", "--prompt", "\udcff"]])  # fmt: skip
def test_mistakes_in_sampling(places, args):
    done = run(SAMPLE, *(a.format(places) for a in args))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_ctrl_c_by_hand(text, tmp_path):
    """A real Ctrl-C, in a real process, at no particular moment of a step."""
    command = [
        sys.executable,
        TRAIN,
        *map(str, plan(text, "muon")),
        "--steps",
        "100000",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/step-4").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped and saved at step" in out and "Traceback" not in err
