"""Checkpoints that survive a crash, a full disk and a flipped bit, and that other programs can read.

    out/tales/config.json        the model's shape and all options of the run
    out/tales/tokenizer.json     text <-> ids
    out/tales/metrics.jsonl      one line per step
    out/tales/step-400/          model.safetensors, optimizer.safetensors, state.json, manifest.json
    out/lora/adapter/            what a run with adapters trained, for PEFT (its steps hold adapter.safetensors, too)

A step's folder is written under a temporary name, every file is flushed to the disk, and only then is the folder
renamed. A rename happens whole or not at all, so a folder called `step-N` is complete, whenever the power goes. Its
manifest holds the length and the SHA-256 of every file, so later damage is seen. Older steps go when it stands.

Tensors are safetensors files (a JSON header and plain numbers) and all else is JSON: nothing is ever unpickled, and
so opening somebody's checkpoint cannot run their code.

Other programs read and write Hugging Face's directories; huggingface.py translates.

    python nanogptx/checkpoint.py import FOLDER out/gpt2      from a Hugging Face directory to a run
    python nanogptx/checkpoint.py export out/tales FOLDER     from a run to a directory that transformers loads
    python nanogptx/checkpoint.py inspect out/tales           what is in either
"""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Union

import safetensors
import torch
import tyro
from tyro.conf import Positional

from nanogptx import huggingface, program
from nanogptx.device import DTYPES
from nanogptx.files import check_free, file_sha256, new_folder, read_json, sync, write, write_json
from nanogptx.huggingface import Saved, Tensors, check_tensors, expected_tensors, read_safetensors, write_safetensors
from nanogptx.rope import UNSCALED, as_scaling
from nanogptx.tinyllama import ARCHITECTURES, build_model
from nanogptx.tokenizer import load_tokenizer

OUT = Path(__file__).resolve().parents[1] / "out"

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
        write_safetensors(folder / f"{name}.safetensors", tensors)
        sync(folder / f"{name}.safetensors")
    write_json(folder / "state.json", state)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in sorted(folder.iterdir())}
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
            if file_sha256(folder / name) != entry["sha256"]:
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


# ----------------------------------------------------------------------------------------------------------------------
# Models, optimizers, runs


def load_weights(model: torch.nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy tensors into a model; ValueError naming the first one that is missing, unknown or of another shape."""
    check_tensors(tensors, model.state_dict(), source)
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


def last_run(name: str) -> Path:
    """out/NAME, or the last of out/NAME-2, out/NAME-3, ... that is there."""
    number, run = 2, OUT / name
    while (following := OUT / f"{name}-{number}").exists():
        number, run = number + 1, following
    return run


def new_run(out: Path | None, name: str) -> Path:
    """Where a new run goes: `out`, or out/NAME, or, when that one is finished, the next; ValueError if taken."""
    run = out or last_run(name)
    if not out and (run / "result.json").exists():
        run = OUT / f"{name}-{int(run.name.removeprefix(name)[1:] or 1) + 1}"
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        kind = "an unfinished run" if (run / "config.json").exists() else "something already"
        kind = "a finished run" if (run / "result.json").exists() else kind
        raise ValueError(f"{run} holds {kind}: name another folder with --out, or go on with that run by --resume")
    return run


def keep_metrics(log: Path, step: int) -> None:
    """Drop the lines of metrics of steps that will be done again; a line that a crash cut off goes too."""
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write(log, "".join(f"{line}\n" for line in kept if json.loads(line)["step"] < step).encode())


def read_config(run: Path) -> dict:
    """The configuration of a run directory; ValueError saying what is wrong with anything else."""
    if not run.exists():
        near = ", ".join(sorted(f.parent.name for f in run.parent.glob("*/config.json"))) if run.parent.is_dir() else ""
        there = f"; in {run.parent} there are {near}" if near else ": train one first (nanogptx/train.py)"
        raise ValueError(f"there is no run at {run}{there}")
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run directory, nor one of Hugging Face: it holds no config.json")
    config = read_json(run / "config.json")
    known = config.get("architecture") in list(ARCHITECTURES) and isinstance(config.get("model"), dict)
    if config.get("format") != "nanogptx-run" or not known:
        raise ValueError(f"{run / 'config.json'} is not of a nanogptx run (of {' or '.join(ARCHITECTURES)})")
    return config


def read_run(run: Path, warn=print) -> Saved:
    """The newest whole checkpoint of a run directory."""
    config = read_config(run)
    folder = latest(run, warn)
    if folder is None:
        raise ValueError(f"{run} holds no complete checkpoint yet")
    tensors = read_safetensors(folder / "model.safetensors")
    architecture, shape = config["architecture"], config["model"]
    check_tensors(tensors, expected_tensors(architecture, shape, len(tensors), folder), folder)
    return Saved(architecture, shape, tensors, load_tokenizer(run), step_of(folder))


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def read_shape(path: Path) -> tuple[str, dict]:
    """The architecture and settings of the model in a run directory, or in one of Hugging Face."""
    if is_huggingface(path):
        return huggingface.read_config(path / "config.json")
    config = read_config(path)
    return config["architecture"], config["model"]


def read(path: Path, warn=print) -> Saved:
    """What is in a run directory, or in one of Hugging Face."""
    return huggingface.read(path) if is_huggingface(path) else read_run(path, warn)


def load_run(path: str | Path, device: torch.device | str = "cpu", warn=print, dtype: torch.dtype = torch.float32):
    """A trained model, its tokenizer and its step, from a run directory or one of Hugging Face."""
    saved = read(Path(path), warn)
    with torch.device("meta"):  # no time spent on drawing first weights, nor memory on another number format
        model = build_model(saved.architecture, saved.shape).to(dtype)
    load_weights(model.to_empty(device=device), saved.tensors, Path(path))
    return model.eval(), saved.tokenizer, saved.step


def write_run(saved: Saved, run: Path) -> None:
    """Make a run directory that holds a model from elsewhere, as its step 0."""
    config = {"format": "nanogptx-run", "architecture": saved.architecture, "model": saved.shape,
              "tokenizer": saved.tokenizer.fingerprint}  # fmt: skip
    with new_folder(run) as new:
        saved.tokenizer.save(new / saved.tokenizer.file_name)
        write_json(new / "config.json", config)
        save(new, saved.step, {"model": saved.tensors}, {"step": saved.step})


# ----------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Import:
    """Make a run directory of a Hugging Face directory (GPT-2 or LLaMA, safetensors)."""

    folder: Positional[Path]
    """Where config.json, model.safetensors (or an index and its files) and a tokenizer are."""
    run: Positional[Path]
    """The run directory to make."""
    tokenizer: Path | None = None
    """Another place for the tokenizer: a file or a folder."""

    def __call__(self) -> None:
        check_free(self.run)
        saved = huggingface.read(self.folder, load_tokenizer(self.tokenizer) if self.tokenizer else None)
        write_run(saved, self.run)
        print(f"{self.run}: {summary(saved)}")


@dataclass
class Export:
    """Write a run as a Hugging Face directory, which transformers loads without a connection."""

    run: Positional[Path]
    """A run directory, as train.py makes it (say out/tales)."""
    folder: Positional[Path]
    """The directory to make."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Another number format than the run has."""
    keep_padding: bool = False
    """Keep the rows of a padded vocabulary that belong to no token."""

    def __call__(self) -> None:
        saved = read(self.run)
        huggingface.write(saved, self.folder, DTYPES[self.dtype] if self.dtype else None, self.keep_padding)
        print(f"{self.folder}: {summary(huggingface.read(self.folder, saved.tokenizer))}")


@dataclass
class Inspect:
    """Say what is in a run directory, or in one of Hugging Face."""

    folder: Positional[Path]

    def __call__(self) -> None:
        saved = read(self.folder)
        print(f"{self.folder}: {summary(saved)}\n")
        shape = saved.shape | {"rope_scaling": as_scaling(saved.shape.get("rope_scaling", UNSCALED))}
        print(*(f"{name:12} {value}" for name, value in shape.items()), sep="\n", end="\n\n")
        tensors = Counter()  # those that differ only in the number of their block are counted
        for name, t in saved.tensors.items():
            dtype = str(t.dtype).removeprefix("torch.")
            tensors[re.sub(r"\.\d+\.", ".*.", name), str(tuple(t.shape)), dtype, t.nbytes] += 1
        for (name, size, dtype, nbytes), count in tensors.items():
            print(f"{count:3} x {name:34} {size:16} {dtype:9} {nbytes:15,} bytes")


def summary(saved: Saved) -> str:
    """One line: architecture, parameters, bytes, number formats, tokenizer, step."""
    tensors = saved.tensors.values()
    count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    dtypes = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    own = f"{type(saved.tokenizer).__name__} with {saved.tokenizer.vocab_size:,} ids"
    return f"{saved.architecture}, {count:,} parameters, {size:,} bytes in {dtypes}; {own}; step {saved.step}"


def main(args: list[str] | None = None) -> None:
    commands = {"import": Import, "export": Export, "inspect": Inspect}
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    tyro.cli(Union[*kinds], args=args, description="Take a model here from Hugging Face's format, or there.")()


if __name__ == "__main__":
    program.run(main)
