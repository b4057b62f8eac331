"""Checkpoints that survive a crash, a full disk and a flipped bit.

    out/tales/config.json        the model's shape and all options of the run
    out/tales/tokenizer.json     text <-> ids
    out/tales/metrics.jsonl      one line per step
    out/tales/step-400/          model.safetensors, optimizer.safetensors, state.json, manifest.json

A step's folder is written under a temporary name, every file is flushed to the disk, and only then is the folder
renamed. A rename happens whole or not at all, so a folder called `step-N` is complete, whenever the power goes. Its
manifest holds the length and the SHA-256 of every file, so later damage is seen. Older steps go when it stands.

Tensors are safetensors files (a JSON header and plain numbers) and all else is JSON: nothing is ever unpickled, and
so opening somebody's checkpoint cannot run their code. What it leaves out: other programs' formats.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig
from nanogptx.tokenizer import load_tokenizer

ARCHITECTURES = {"gpt2": (GPT2Config, GPT2), "tinyllama": (TinyLlamaConfig, TinyLlama)}
Tensors = dict[str, torch.Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file: after a crash it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# One step's folder


def step_of(folder: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else -1


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first (by number: step-1000000 comes after step-999999)."""
    return sorted((f for f in run.glob("step-*") if step_of(f) >= 0), key=step_of)


def save(run: Path, step: int, groups: dict[str, Tensors], state: dict, keep: int = 2) -> Path:
    """Write the checkpoint of a step: one safetensors file for each group of tensors, and `state` as JSON.

    The `keep` newest checkpoints stay. OSError when it cannot be written; the older ones are then untouched.
    """
    target, temporary = run / f"step-{step}", run / f".step-{step}.{os.getpid()}.tmp"
    if target.exists() and not damage(target):
        return target  # the same step of the same run: there is nothing to add
    for left in run.glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
    try:
        write_step(temporary, groups, state)
        if target.exists():
            shutil.rmtree(target)  # it is damaged
        os.rename(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(t.nbytes for tensors in groups.values() for t in tensors.values())
        message = (
            f"cannot save step {step} in {run}, which takes {size:,} bytes ({error}); older checkpoints are intact"
        )
        raise OSError(message) from error
    sync(run)
    for old in steps(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_step(folder: Path, groups: dict[str, Tensors], state: dict) -> None:
    folder.mkdir()
    for name, tensors in groups.items():
        plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(plain, folder / f"{name}.safetensors", metadata={"format": "pt"})
        sync(folder / f"{name}.safetensors")
    write_json(folder / "state.json", state)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"format": "nanogptx-checkpoint", "files": files})


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words, or "" when every file is what was written."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != "nanogptx-checkpoint":
            return f"{folder / 'manifest.json'} is not a nanogptx manifest"
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                return f"{folder / 'manifest.json'} names a file outside the folder"
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{folder / name} has another length than was written"
            if sha256(folder / name) != entry["sha256"]:
                return f"{folder / name} is damaged: its checksum differs"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / 'manifest.json'} is damaged ({error})"
    return ""


def latest(run: Path, warn=print) -> Path | None:
    """The newest checkpoint that is whole, or None; each damaged one on the way is named to `warn`."""
    for folder in reversed(steps(run)):
        reason = damage(folder)
        if not reason:
            return folder
        warn(f"skipping checkpoint {folder.name}: {reason}")
    return None


def read_tensors(folder: Path, group: str) -> Tensors:
    """One group of tensors of a whole checkpoint."""
    try:
        return safetensors.torch.load_file(folder / f"{group}.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / group}.safetensors cannot be read ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Models, optimizers, runs


def build_model(architecture: str, shape: dict) -> GPT2 | TinyLlama:
    config, model = ARCHITECTURES[architecture]
    try:
        return model(config(**shape))
    except TypeError as error:
        raise ValueError(f"the {architecture} model has no such setting ({error})") from error


def load_weights(model: torch.nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy tensors into a model; ValueError naming the first one that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in own else 'not part of the model'}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{source}: tensor {name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> Tensors:
    """An optimizer's state as named tensors: "blocks.0.attn.q.weight/exp_avg"."""
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], tensors: Tensors) -> None:
    """Give an optimizer the state that `optimizer_tensors` took; its options stay as they are."""
    state = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        prefix = names[parameter] + "/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state[number] = own
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_config(run: Path) -> dict:
    """The configuration of a run directory; ValueError saying what is wrong with anything else."""
    if not run.exists():
        near = ", ".join(sorted(f.parent.name for f in run.parent.glob("*/config.json"))) if run.parent.is_dir() else ""
        raise ValueError(f"there is no run at {run}" + (f"; in {run.parent} there are {near}" if near else ""))
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run directory: it holds no config.json (train.py --out makes one)")
    config = read_json(run / "config.json")
    if config.get("format") != "nanogptx-run" or config.get("architecture") not in ARCHITECTURES:
        raise ValueError(f"{run / 'config.json'} is not of a nanogptx run (of {' or '.join(ARCHITECTURES)})")
    return config


def load_run(run: str | Path, device: torch.device | str = "cpu", warn=print):
    """A trained model, its tokenizer and its step from a run directory."""
    run = Path(run)
    config = read_config(run)
    folder = latest(run, warn)
    if folder is None:
        raise ValueError(f"{run} holds no complete checkpoint yet")
    model = build_model(config["architecture"], config["model"])
    load_weights(model, read_tensors(folder, "model"), folder)
    return model.to(device).eval(), load_tokenizer(run), step_of(folder)
