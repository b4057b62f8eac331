"""The trainer: from a text and a preset to a trained model, samples and a score.

    python nanogptx/train.py                                  a minute and a half on the stories of tales.py
    python nanogptx/train.py shakespeare --data FILE          another preset, another text
    python nanogptx/train.py --data FILE --minutes 5          any text file or folder of them
    python nanogptx/train.py tales --resume                   go on with a run that was stopped
    python nanogptx/train.py lora --init-from out/tales --data FILE       fine-tune by adapters (finetune: all weights)

A run is a function of its options. Batches, dropout masks and learning rates depend on (options, step) alone, so a
checkpoint needs no random state, and a run that is killed and resumed ends with the same bits (on a CPU). Nor does it
depend on how many processes share the work (`torchrun --nproc-per-node 2 nanogptx/train.py`), but for rounding.
"""

import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from nanogptx import adapter, checkpoint, data, device, files, lora, memory, parallel, program, sample, tales
from nanogptx.alibi import stretched
from nanogptx.attention import holds_scores
from nanogptx.parallel import World
from nanogptx.tinyllama import ARCHITECTURES, MODELS, build_model
from nanogptx.tokenizer import KINDS, load_tokenizer, train_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Options and presets


@dataclass(frozen=True)
class Options:
    """Train a language model and see what it learned."""

    preset: Annotated[str, tyro.conf.Suppress] = "tales"
    data: str = "tales"
    """A corpus by name (data.py list), a text file, or a folder of text files."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: out/PRESET)")] = None
    """The run directory to make."""
    resume: bool = False
    """Go on with the run in --out (or the last one of this preset); start it if there is none."""
    eval_only: bool = False
    """Only evaluate and sample the run in --out, perhaps with another --block-size or --rope-scaling."""
    seed: int = 0
    """Decides first weights, batches, dropout and samples."""

    model: str = "tinyllama-1m"
    """The named shape to start from: see CONFIGS in gpt2.py and tinyllama.py."""
    n_layer: int | None = None
    """Another number of layers than the model's."""
    n_head: int | None = None
    """Another number of query heads."""
    n_kv_head: int | None = None
    """Another number of key and value heads (tinyllama only)."""
    n_embd: int | None = None
    """Another width."""
    block_size: int | None = None
    """Another context length, in tokens."""
    dropout: float | None = None
    """Another probability of dropping an activation."""
    position: Literal["learned", "rope", "alibi", "none"] | None = None
    """Another way to tell positions apart."""
    rope_scaling: str = "none"
    """Stretch the model's context by changed frequencies, say yarn:4 (or linear, ntk, dynamic, llama3)."""
    tokenizer: str = "bpe"
    """What to train on the text (bpe, char, sp-bpe, sp-unigram, sp-char), or a path to one made before."""
    vocab_size: int = 900
    """Tokens of the tokenizer that is trained."""
    pad_vocab: int = 0
    """Give the model a vocabulary of at least this many ids, of which the tokenizer may use fewer."""

    init_from: str | None = None
    """Fine-tune: take shape, tokenizer and weights from this run directory, or directory of Hugging Face."""
    lora_rank: int = 0
    """With --init-from: train only adapters of this rank (see lora.py); 0 trains all weights."""
    lora_alpha: float = 16.0
    """What adapters add is multiplied by alpha / rank."""
    lora_targets: str = "attention.*,mlp.*"
    """Which layers get adapters: the ends of their names (say q,v) or regular expressions, with commas between them."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of an adapter."""
    lora_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""

    steps: int = 700
    """Optimizer steps."""
    minutes: float | None = None
    """Instead of --steps: as many as fit into this time, by the pace of the first ten; at least 11."""
    batch_size: int = 32
    """Documents (or windows of the context, if some document does not fit into it) in a step."""
    accumulate: int = 2
    """Cut a step's batch into this many parts, computed one after the other or by several processes, to save memory."""
    recompute: bool = False
    """Save memory: keep of each block only its input, and compute the rest again in the backward pass."""
    chunked_loss: bool = False
    """Save memory with a vocabulary of tens of thousands: take the scores of a few tokens at a time."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices of the blocks and AdamW for the rest; adamw: AdamW for all."""
    lr: float = 0.008
    """Peak learning rate."""
    final_lr: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    warmup: int = 20
    """Steps of rising learning rate."""
    schedule: Literal["cosine", "linear"] = "linear"
    """How the learning rate falls after that."""
    weight_decay: float = 0.0
    """Pull of the matrices towards zero; norms, biases and single rows are left alone."""
    clip: float = 1.0
    """Longest gradient: a longer one is scaled down to this norm."""

    eval_every: int = 100
    """Steps between evaluations (on a part of the validation text)."""
    eval_tokens: int = 250_000
    """How much of the validation text the final evaluation reads at most, in tokens."""
    save_every: int = 250
    """Steps between checkpoints."""
    samples: int = 3
    """Texts to print at the end."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of matrix products; auto: what this hardware is fast at."""
    compile: bool = False
    """torch.compile the model: slow to start, faster to run."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp gives every process the whole model, fsdp a share of it."""

    def __post_init__(self):
        if self.init_from:  # a run must find it from everywhere
            object.__setattr__(self, "init_from", os.path.abspath(self.init_from))

    def check(self) -> None:
        """Raise ValueError for a value that no run can have."""
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "eval_every": 1, "eval_tokens": 1,
                    "save_every": 1, "samples": 0, "seed": 0, "vocab_size": 1, "pad_vocab": 0,
                    "weight_decay": 0, "lora_rank": 0}  # fmt: skip
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least {least}")
        if not (0 < self.lr < math.inf and self.clip > 0 and (self.minutes is None or self.minutes > 0)):
            raise ValueError(f"--lr {self.lr}, --clip {self.clip}, --minutes {self.minutes}: they must be above 0")
        if not 0 <= self.final_lr < 1:
            raise ValueError(f"--final-lr is {self.final_lr}: as a fraction of the peak it must be in [0, 1)")
        if self.model not in MODELS:
            raise ValueError(program.nearest("model", self.model, MODELS))
        if not self.init_from and (self.lora_rank or self.preset == "finetune"):
            raise ValueError("what is to be fine-tuned? name a run, or a directory of Hugging Face, with --init-from")
        for name in ("lora_alpha", "lora_targets", "lora_dropout", "lora_stabilized") if not self.lora_rank else ():
            if getattr(self, name) != getattr(TALES, name):
                raise ValueError(f"--{name.replace('_', '-')} is for adapters, which --lora-rank asks for")
        for name in ("model", "tokenizer", "vocab_size", "pad_vocab") if self.init_from else ():
            if (value := getattr(self, name)) != getattr(PRESETS[self.preset], name):
                raise ValueError(f"--{name.replace('_', '-')} {value} cannot be with --init-from: model and tokenizer "
                                 f"are those of {self.init_from}")  # fmt: skip


TALES = Options()
GPT2_SMALL = Options(
    preset="gpt2-small", model="gpt2-small", pad_vocab=50257, batch_size=8, accumulate=8, lr=6e-4, final_lr=0.1,
    warmup=100, schedule="cosine", optimizer="adamw", weight_decay=0.1, steps=2000, eval_tokens=50_000,
)  # fmt: skip
FINETUNE = dataclasses.replace(TALES, preset="finetune", data="tales-letters", steps=600)
PRESETS = {
    "tales": TALES,
    "tales-gpt2": dataclasses.replace(TALES, preset="tales-gpt2", model="gpt2-1m"),
    "shakespeare": dataclasses.replace(
        TALES, preset="shakespeare", data="shakespeare", model="tinyllama-shakespeare", tokenizer="char",
        batch_size=64, accumulate=1, steps=200, lr=0.02,
    ),
    "finetune": FINETUNE,
    "lora": dataclasses.replace(FINETUNE, preset="lora", lora_rank=2, optimizer="adamw", lr=0.01),
    "gpt2-small": GPT2_SMALL,
    "tinyllama-120m": dataclasses.replace(GPT2_SMALL, preset="tinyllama-120m", model="tinyllama-120m", pad_vocab=32000),
    "tinyllama-1.1b": dataclasses.replace(
        GPT2_SMALL, preset="tinyllama-1.1b", model="tinyllama-1.1b", pad_vocab=32000, lr=4e-4
    ),
}  # fmt: skip
# What may change when a run is resumed: everything else would make it another run.
FREE = {"out", "resume", "eval_only", "init_from", "steps", "minutes", "accumulate", "eval_every", "eval_tokens",
        "save_every", "samples", "device", "dtype", "compile", "parallel", "recompute", "chunked_loss"}  # fmt: skip
LONGER = {"block_size", "rope_scaling"}  # and these, too, when it is only evaluated


# ----------------------------------------------------------------------------------------------------------------------
# One step


def lr_factor(step: int, steps: int, warmup: int, schedule: str, final: float) -> float:
    """The learning rate at a step (0 to steps - 1) as a fraction of its peak: a rise from above 0, a fall to `final`.

    Warm-up: Goyal et al. 2017, arXiv:1706.02677, section 2.2. Cosine: Loshchilov & Hutter 2016, arXiv:1608.03983.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    fall = done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - final) * fall


def make_optimizers(model: torch.nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), and with "muon" Muon for the matrices of the blocks.

    Muon makes all singular values of a matrix's update alike (Jordan et al. 2024); "match_rms_adamw" scales it so that
    one learning rate fits both (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if options.optimizer == "muon" and memory.is_block_matrix(name, p.shape)]
    theirs = {id(p) for p in muon}
    matrices = [p for _, p in named if p.dim() == 2 and id(p) not in theirs]
    vectors = [p for _, p in named if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = named[0][1].device.type in ("cpu", "cuda")
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, options.lr, (0.9, 0.95), fused=fused)]
    if muon:
        decay = options.weight_decay
        optimizers.append(torch.optim.Muon(muon, options.lr, decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Diverged(ValueError):
    """The numbers ran away."""


class Part(NamedTuple):
    """What is computed at a time: some rows of a step's batch."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weight: float  # its share of the step's targets, times the number of processes whose gradients are averaged
    seed: tuple[int, int, int] = (0, 0, 0)  # of its dropout: the run's, the step, the first row


def train_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    parts: list[Part],
    clip: float,
    context: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler,
) -> tuple[float, float]:
    """Forward, backward, clip, update; returns the sum of the parts' weighted losses (nats) and the gradient's norm.

    A part counts by its number of targets: the mean of the parts' means would weight short ones too much. The update is
    left out when the gradient is not finite (the norm then is not, either).
    """
    total = 0.0
    for number, part in enumerate(parts, 1):
        device.seed_everything(*part.seed)
        with parallel.averaging(model, now=number == len(parts)):
            with context():
                loss = model(part.inputs, part.targets)[1] * part.weight
            scaler.scale(loss).backward()
        total += loss.item()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = parallel.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if norm.isfinite():  # subtle: asked once for all optimizers, so that none steps while another one skips
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for optimizer in optimizers:
            optimizer.step()
    scaler.update()
    return total, norm.item()


# ----------------------------------------------------------------------------------------------------------------------
# How good is it?


class Score(NamedTuple):
    """A mean loss in three units. Only per byte (or character) are models with different tokenizers comparable."""

    nats_per_token: float
    error: float  # standard error of the above
    nats_per_char: float
    bits_per_byte: float


def style_of(name: str) -> tales.Style | None:
    """The style of `tales` that a corpus' name means, or None."""
    return tales.STYLES.get(name.removeprefix("tales-")) if name in data.CORPORA else None


class Task:
    """The text of a run, and how it is cut: into whole documents when all fit the context, else into windows of it."""

    def __init__(self, dataset: data.Dataset, block_size: int):
        self.dataset, self.block_size = dataset, block_size
        longest = max(dataset.train.longest, dataset.validation.longest)
        self.whole = longest - 1 <= block_size  # all but the last token of a document are input
        self.length = min(block_size, -(-(longest - 1) // 16) * 16) if self.whole else block_size  # of the longest row
        self.unit = "documents" if self.whole else "windows"

    def batch(self, options: Options, step: int) -> tuple[np.ndarray, np.ndarray]:
        cut = data.document_batch if self.whole else data.window_batch
        return cut(self.dataset.train, options.seed, step, options.batch_size, self.block_size)

    def targets(self, split: data.Split) -> int:
        """How many tokens of a split are predicted, in one pass over it."""
        return split.n_tokens - (split.n_documents if self.whole and not split.shared else 1)

    def rows(self, max_tokens: int) -> int:
        """The number of validation documents or windows that hold about `max_tokens`."""
        split = self.dataset.validation
        rows = split.n_documents if self.whole else data.n_windows(split, self.block_size)
        return max(1, min(rows, math.ceil(rows * max_tokens / self.targets(split))))

    def validation(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        split, at_once = self.dataset.validation, max(1, 8192 // self.block_size)
        if self.whole:
            return data.eval_documents(split, at_once, rows, self.block_size)
        return data.eval_windows(split, self.block_size, at_once, rows)

    def score(self, nats_per_token: float, error: float = 0.0, split: str = "validation") -> Score:
        part = getattr(self.dataset, split)
        nats = nats_per_token * self.targets(part)  # of the whole split; its text has so many characters and bytes
        return Score(nats_per_token, error, nats / part.chars, nats / math.log(2) / part.bytes)

    def floor(self, name: str, rows: int) -> Score | None:
        """The least mean loss that a model of this validation text can have, if the text is one of `tales`' styles.

        Both sides count the same events, a story's text and its end, on the same whole stories.
        """
        style = style_of(name)
        if not (style and self.whole):
            return None
        stories = list(islice(data.texts(name, "validation"), rows))
        split = self.dataset.validation
        targets = sum(len(split.document(n)) - 1 for n in range(len(stories)))
        return self.score(-math.fsum(tales.log_prob(s, style) for s in stories) / targets)


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterator, context: Callable, world: World) -> tuple[float, float]:
    """Mean loss over all targets of the batches, and its standard error, in nats. Draws no random numbers."""
    model.eval()
    losses, counts = [], []
    while group := list(islice(batches, world.size)):  # a batch for each process
        # At the end there may be too few; but a model in shards needs everyone for every forward pass.
        x, y = (torch.from_numpy(z).to(world.device) for z in group[min(world.rank, len(group) - 1)])
        with context():
            losses.append(model(x, y)[1].item())
        counts.append(int((y != data.IGNORE).sum()) if world.rank < len(group) else 0)
    model.train()
    losses, counts = (np.concatenate(z) for z in zip(*world.gather((losses, counts)), strict=True))
    mean = float((losses * counts).sum() / counts.sum())
    return mean, float(np.sqrt((((losses - mean) * counts) ** 2).sum()) / counts.sum())


def plot(path: Path, lines: list[dict], floor: dict | None) -> None:
    """Draw training and validation loss over the steps, with the floor if there is one."""
    from matplotlib.figure import Figure  # takes half a second to import, and only this function needs it

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for key, label, style in (("loss", "training", {"lw": 0.8}), ("val_loss", "validation", {"lw": 2, "marker": "o"})):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if floor:
        axes.axhline(floor["nats_per_token"], color="black", ls="--", label=f"floor {floor['nats_per_token']:.3f}")
    low = min(line[key] for line in lines for key in ("loss", "val_loss") if key in line)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=path.parent.name)
    axes.set_ylim(0.95 * min(low, floor["nats_per_token"] if floor else low), 2 * low)  # the first steps fall from ln V
    axes.legend()
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Trainer:
    """All that a run holds. What changes with a step is in model, optimizers, scaler and `state`, and is saved."""

    def __init__(self, run: Path, options: Options, model: torch.nn.Module, tokenizer, task: Task, world=None):
        self.run, self.options, self.tokenizer, self.task = run, options, tokenizer, task
        self.world: World = world or World(device.choose_device(options.device))
        self.rows = parallel.share_of(options.batch_size, options.accumulate, self.world)
        self.dtype = device.choose_dtype(self.world.device, options.dtype)
        self.model = model
        model.recompute, model.chunked_loss = options.recompute, options.chunked_loss
        self.forward = parallel.wrap(model, options.parallel, self.world)
        if options.compile:
            self.forward = torch.compile(self.forward)
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.optimizers = make_optimizers(self.model, options)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.dtype == torch.float16)
        self.state = {"step": 0, "steps": options.steps, "timed": not options.minutes, "seconds": 0.0, "tokens": 0}
        self.asked_to_stop = self.stop = 0  # a signal's number: here, and in any process at the end of the last step

    def on_signal(self, number: int, frame) -> None:
        """Ask the loop to stop after this step; asked a second time, leave at once (saved checkpoints are safe)."""
        if self.asked_to_stop:
            os._exit(128 + number)
        self.asked_to_stop = number
        tqdm.write("stopping after this step, to save it (again: at once)")

    def context(self) -> AbstractContextManager:
        return device.autocast(self.world.device, self.dtype)

    # ---- saved and loaded

    def save(self) -> None:
        optimizer = {}
        for part in self.optimizers:
            optimizer |= checkpoint.optimizer_tensors(part, self.names)
        groups = {"model": self.model.state_dict(), "optimizer": optimizer}
        groups = {name: parallel.whole_tensors(tensors, self.world) for name, tensors in groups.items()}
        if self.world.main:
            change = lora.adapter_of(self.model, groups["model"])
            if change.scales:
                groups |= {"model": lora.merged_tensors(groups["model"], change), "adapter": change.tensors}
            state = self.state | {"scaler": self.scaler.state_dict()}
            checkpoint.save(self.run, self.state["step"], groups, state)
            if change.scales:
                lora.write_beside(self.run, change, self.options.init_from)

    def load(self, folder: Path) -> None:
        own, file = self.model.state_dict(), "adapter" if self.options.lora_rank else "model"
        tensors = checkpoint.read_safetensors(folder / f"{file}.safetensors")
        tensors = {name: parallel.shard_like(t, own.get(name)) for name, t in tensors.items()}
        frozen = {name: t for name, t in own.items() if file == "adapter" and ".lora_" not in name}  # the base's
        checkpoint.load_weights(self.model, frozen | tensors, folder)
        tensors = checkpoint.read_safetensors(folder / "optimizer.safetensors")
        tensors = {key: parallel.shard_like(t, own.get(key.partition("/")[0])) for key, t in tensors.items()}
        for part in self.optimizers:
            checkpoint.load_optimizer(part, self.names, tensors)
        state = files.read_json(folder / "state.json")
        if scaler := state.pop("scaler"):
            self.scaler.load_state_dict(scaler)
        extended = self.options.steps if not self.options.minutes else state["steps"]
        self.state = state | {"steps": extended}

    # ---- one step

    def parts(self, number: int, x: np.ndarray, y: np.ndarray) -> list[Part]:
        """This process's parts of a step's batch; a part's seed depends on which part of the batch it is."""
        where, size, n_targets = self.world.device, self.world.size, max(1, int((y != data.IGNORE).sum()))
        parts = []
        for rows in self.rows:
            weight = int((y[rows] != data.IGNORE).sum()) * size / n_targets
            tensors = (torch.from_numpy(z[rows]).to(where) for z in (x, y))
            parts.append(Part(*tensors, weight, (self.options.seed, number, rows.start)))
        return parts

    def step(self) -> dict:
        """Do one optimizer step and return its line of metrics. Raises Diverged."""
        options, number = self.options, self.state["step"]
        lr = options.lr * lr_factor(number, self.state["steps"], options.warmup, options.schedule, options.final_lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        x, y = self.task.batch(options, number)
        parts = self.parts(number, x, y)
        for _ in range(30):  # a float16 overflow halves the loss scale: the same step again
            loss, norm = train_step(self.forward, self.optimizers, parts, options.clip, self.context, self.scaler)
            # subtle: a signal may reach some processes only, or in different steps: all stop when one was asked
            loss, asked = self.world.sum(loss / self.world.size, self.asked_to_stop > 0)
            if math.isfinite(norm) or not self.scaler.is_enabled() or not math.isfinite(loss):
                break
            self.model.zero_grad()
        self.stop = (self.asked_to_stop or signal.SIGTERM) if asked else 0
        self.check(loss, norm, lr)
        self.model.zero_grad()
        self.state["step"] += 1
        self.state["tokens"] += int((y != data.IGNORE).sum())
        return {"step": number, "loss": loss, "lr": lr, "grad_norm": norm, "batch": zlib.crc32(x.tobytes())}

    def check(self, loss: float, norm: float, lr: float) -> None:
        """Stop a run whose numbers ran away; the last checkpoint stays."""
        # A trained model may find another text far stranger than chance would.
        limit = (10 if self.options.init_from else 2) * math.log(self.model.config.vocab_size) + 1
        if math.isfinite(norm) and loss < limit:
            return
        gradients = {name: parallel.whole(p.grad) for p, name in self.names.items() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        what = f"the gradient of {bad[0]} is not finite" if bad else f"the loss of {loss:.3g} is beyond {limit:.3g}"
        last = max(map(checkpoint.step_of, checkpoint.steps(self.run)), default=None)
        kept = f"the checkpoint of step {last} is kept" if last is not None else "there was no checkpoint yet"
        raise Diverged(
            f"training diverged at step {self.state['step']}: {what} (loss {loss:.4g}, learning rate {lr:.3g}); "
            f"{kept}; try a lower --lr, a longer --warmup or --dtype float32"
        )

    # ---- the loop

    def fit(self) -> None:
        """Train to the last step. When a signal asks to stop, finish the step, save and return."""
        before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.loop()
        except BrokenPipeError:  # nobody reads what is printed; what was learned is kept
            if self.world.size == 1:
                self.save()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def loop(self) -> None:
        options, began = self.options, time.perf_counter() - self.state["seconds"]
        log = self.run / "metrics.jsonl" if self.world.main else Path(os.devnull)
        if self.world.main:
            checkpoint.keep_metrics(log, self.state["step"])
        per_byte, off = self.task.score(1.0, split="train").bits_per_byte, None if self.world.main else True
        bar = tqdm(total=self.state["steps"], initial=self.state["step"], unit="step", disable=off, dynamic_ncols=True)
        with open(log, "a", encoding="utf-8") as file, bar:
            while self.state["step"] < self.state["steps"] and not self.stop:
                line = self.step()
                if line["step"] == 0:
                    self.explain_first(line["loss"])
                number = self.state["step"]
                self.state["seconds"] = time.perf_counter() - began
                self.set_steps(bar)
                rate = self.state["tokens"] / self.state["seconds"]
                if number % options.eval_every == 0 and number < self.state["steps"]:
                    score = self.validate(options.eval_tokens // 10)
                    line["val_loss"] = score.nats_per_token
                    bar.write(f"step {number}: validation {score.nats_per_token:.3f} nats per token, "
                              f"{score.bits_per_byte:.3f} bits per byte")  # fmt: skip
                print(json.dumps(line), file=file, flush=True)
                bar.update()
                bits = line["loss"] * per_byte
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {bits:.3f} bits/byte, {rate:,.0f} tokens/s")
                if number % options.save_every == 0 or number == self.state["steps"] or self.stop:
                    self.save()

    def set_steps(self, bar: tqdm) -> None:
        """With --minutes, fix the number of steps by the pace of steps 3 to 10, and save, so that it stays fixed."""
        if self.state["timed"]:
            return
        if self.state["step"] == 2:
            self.state["second_step"] = self.state["seconds"]
        elif self.state["step"] == 10:
            pace = (self.state["seconds"] - self.state.get("second_step", 0)) / 8
            bar.total = steps = self.world.first(lambda: max(11, int(self.options.minutes * 60 / pace)))
            self.state |= {"timed": True, "steps": steps}
            bar.write(f"--minutes: time for {steps} steps, {min(steps, self.options.warmup)} of them warm-up")
            self.save()

    def explain_first(self, loss: float) -> None:
        size = self.model.config.vocab_size
        if self.options.init_from:
            return tqdm.write(f"step 0: loss {loss:.3f}, that of the model to start from")
        expected = math.log(size)
        tqdm.write(f"step 0: loss {loss:.3f}; an untrained model should have ln {size} = {expected:.3f}")
        if abs(loss - expected) > 0.2:
            tqdm.write(
                "  it differs: above, the first weights favour wrong tokens (too large an initialisation); below, "
                "the model has seen this text, or targets leak into its input"
            )

    def validate(self, max_tokens: int) -> Score:
        batches = self.task.validation(self.task.rows(max_tokens))
        return self.task.score(*evaluate(self.model, batches, self.context, self.world))


# ----------------------------------------------------------------------------------------------------------------------
# Setting up


def parse(args: list[str]) -> Options:
    """The options of a command line: a preset's, changed by the flags; with --resume those of the run, changed."""
    preset, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else ("tales", args)
    flags = [*flags, "--resume"] if parallel.may_be_restarted() and "--resume" not in flags else flags
    if preset not in PRESETS:
        raise ValueError(program.nearest("preset", preset, PRESETS))
    about = f"{Options.__doc__} The first word may be a preset: {', '.join(PRESETS)}."
    options = tyro.cli(Options, args=flags, default=PRESETS[preset], description=about)
    run = options.out or checkpoint.last_run(preset)
    if not (options.resume or options.eval_only) or not (run.exists() or options.eval_only):
        return options
    config = checkpoint.read_config(run)
    if "options" not in config:
        raise ValueError(f"{run} was imported, not trained here: there is no training to go on with; a new run can "
                         f"start from it with --init-from {run}")  # fmt: skip
    stored = Options(**config["options"])
    options = dataclasses.replace(tyro.cli(Options, args=flags, default=stored, description=about), out=run)
    may_change = FREE | LONGER if options.eval_only else FREE
    for name, value in dataclasses.asdict(options).items():
        free = name in may_change and (name != "init_from" or stored.init_from)  # a base may have moved
        if not free and value != getattr(stored, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{run} was made with {flag} {getattr(stored, name)}, not {value}: leave {flag} out, or start a new run"
            )
    return options


def first_characters(pieces: Iterable[str], limit: int) -> Iterator[str]:
    """The pieces of a text up to about `limit` characters: a tokenizer needs no more."""
    for piece in pieces:
        if limit <= 0:
            return
        yield piece
        limit -= len(piece)


def make_tokenizer(options: Options):
    """Load the tokenizer at a path, or train one of the named kinds on (the beginning of) the text."""
    kind = options.tokenizer
    if kind in KINDS:
        training = data.texts(options.data, "train")
        if kind == "char":  # needs every character that occurs
            return train_tokenizer(kind, chain(training, data.texts(options.data, "validation")), options.vocab_size)
        return train_tokenizer(kind, first_characters(training, 2_000_000), options.vocab_size)
    if not Path(kind).exists():
        raise ValueError(
            f"{program.nearest('tokenizer', kind, KINDS)}; as a path, {Path(kind).absolute()} is not there"
        )
    return load_tokenizer(kind)


def make_shape(options: Options, vocab_size: int, base: checkpoint.Saved | None = None) -> tuple[str, dict]:
    """The architecture and the shape that the options describe; ValueError if no model, or not `base`, has it."""
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "dropout", "position")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    architecture, config = MODELS[options.model]
    if base:
        architecture, config = base.architecture, ARCHITECTURES[base.architecture][0](**base.shape)
    if options.rope_scaling != "none":
        config = dataclasses.replace(config, position=options.position or config.position)
        longer = stretched(config, options.rope_scaling)
        asked = {"rope_scaling": dataclasses.asdict(longer.rope_scaling), "block_size": longer.block_size} | asked
    if base:
        return architecture, lora.shape_of(base, asked)
    shape = dataclasses.asdict(config) | {"vocab_size": max(vocab_size, options.pad_vocab)}
    for name in asked.keys() - shape.keys():
        raise ValueError(f"--{name.replace('_', '-')} {asked[name]}: a {architecture} model has no such setting")
    type(config)(**shape | asked)  # raises ValueError if it does not fit together
    return architecture, shape | asked


def make_model(architecture: str, shape: dict, o: Options) -> torch.nn.Module:
    """A model with fresh weights, and with new adapters if the options ask for them."""
    model = build_model(architecture, shape)
    if o.lora_rank:
        lora.inject(model, o.lora_rank, o.lora_alpha, o.lora_targets, o.lora_dropout, o.lora_stabilized)
    return model


def check_memory(architecture: str, shape: dict, options: Options, world: World) -> None:
    """Refuse a model whose weights, gradients and optimizer alone are more than the device has free."""
    with torch.device("meta"):
        model = make_model(architecture, shape, options)
    need = sum(memory.training_bytes(model.config, memory.Step(0, 0), options.optimizer, lora.shapes(model)).values())
    need = need // world.size if options.parallel == "fsdp" else need
    free, count = device.free_memory(world.device), memory.parameters(model.config)
    if need > free:
        raise ValueError(f"{count:,} parameters: training needs {need / 2**30:.1f} GiB for weights, "
                         f"gradients and optimizer, and {free / 2**30:.1f} GiB are free; take a smaller model, or a "
                         "machine with more memory")  # fmt: skip


def make_run(options: Options, world: World) -> Path:
    """The folder of a run, new or the one to resume; nothing is written before everything fits together."""
    run = options.out or checkpoint.last_run(options.preset)
    if (options.resume and (run / "config.json").exists()) or options.eval_only:
        return run
    run = checkpoint.new_run(options.out, options.preset)
    base = checkpoint.read(Path(options.init_from), tqdm.write) if options.init_from else None
    tokenizer = base.tokenizer if base else make_tokenizer(options)
    architecture, shape = make_shape(options, tokenizer.vocab_size, base)
    check_memory(architecture, shape, options, world)
    stored = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "resume", "eval_only")}
    config = {"format": "nanogptx-run", "architecture": architecture, "model": shape,
              "tokenizer": tokenizer.fingerprint, "data": data.prepare(options.data, tokenizer).fingerprint,
              "base": base and adapter.fingerprint(base), "options": stored}  # fmt: skip
    with files.new_folder(run) as new:
        tokenizer.save(new / tokenizer.file_name)
        files.write_json(new / "config.json", config)
    return run


def open_trainer(options: Options, world: World | None = None) -> Trainer:
    """Make a run, or open the one to resume, and load its newest checkpoint; rank 0 does what the others then find."""
    world = world or World(device.choose_device(options.device))
    parallel.share_of(options.batch_size, options.accumulate, world)  # may refuse
    run = world.first(lambda: make_run(options, world))
    config, tokenizer = checkpoint.read_config(run), load_tokenizer(run)
    if tokenizer.fingerprint != config["tokenizer"]:
        raise ValueError(f"the tokenizer in {run} is not the one that the run was made with: put that one back")
    architecture, shape = config["architecture"], config["model"]
    if options.eval_only:
        old = vars(Options()) | config["options"]
        longer = {name: getattr(options, name) for name in LONGER if getattr(options, name) != old[name]}
        base = checkpoint.Saved(architecture, shape, {}, tokenizer)
        architecture, shape = make_shape(Options(**longer), tokenizer.vocab_size, base)
        options = dataclasses.replace(options, lora_rank=0)  # a checkpoint holds the merged weights, too
    check_memory(architecture, shape, options, world)
    with world.one_of_node_first():
        dataset = data.prepare(options.data, tokenizer)
    if config["data"] != dataset.fingerprint:
        raise ValueError(
            f"the text of {options.data} has changed since {run} was begun: bring the old one back, or start a new run"
        )
    device.seed_everything(options.seed)
    model = make_model(architecture, shape, options)
    folder = world.first(lambda: checkpoint.latest(run, tqdm.write))
    if options.eval_only and not folder:
        raise ValueError(f"{run} holds no complete checkpoint yet: there is nothing to evaluate")
    if options.init_from and (options.lora_rank or not folder):
        lora.load_base(model, options.init_from, config["base"])
    trainer = Trainer(run, options, model, tokenizer, Task(dataset, shape["block_size"]), world)
    if world.main and not options.eval_only:  # with the options that changed
        stored = {name: getattr(options, name) for name in config["options"]}
        files.write_json(run / "config.json", config | {"options": stored})
    if folder:
        trainer.load(folder)
    return trainer


# ----------------------------------------------------------------------------------------------------------------------
# The program


def predicted_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of the tensors that this process will hold at most, by kind."""
    options, world, config = trainer.options, trainer.world, trainer.model.config
    rows, length = trainer.rows[0].stop - trainer.rows[0].start, trainer.task.length
    fused = not holds_scores(world.device.type, trainer.dtype, length, config.dropout)
    step = memory.Step(rows, length, trainer.dtype, fused, options.recompute, options.chunked_loss)
    need = memory.training_bytes(config, step, options.optimizer, lora.shapes(trainer.model))
    shares = world.size if options.parallel == "fsdp" else 1
    return need | {kind: need[kind] // shares for kind in ("weights", "gradients", "optimizer")}


def describe(trainer: Trainer) -> str:
    task, options, config, world = trainer.task, trainer.options, trainer.model.config, trainer.world
    split = task.dataset.train
    count = memory.parameters(config)
    part = sum(shape.numel() for shape in lora.shapes(trainer.model).values())
    share = f", and {part:,} ({part / count:.1%}) in adapters, which are trained" if part else ""
    need, at_once = predicted_memory(trainer), trainer.rows[0].stop - trainer.rows[0].start
    kinds = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in need.items() if size)
    where = f"{world.size} x {world.device} ({options.parallel})" if world.size > 1 else f"{world.device}"
    return (
        f"text   {options.data}: {split.n_tokens:,} tokens to learn from, {split.chars / split.n_tokens:.2f} "
        f"characters each, {trainer.tokenizer.vocab_size:,} different\n"
        f"model  {type(config).__name__.removesuffix('Config')}, {count:,} parameters, {config.n_layer} layers of "
        f"width {config.n_embd}, context {config.block_size}{share}\n"
        f"memory {sum(need.values()) / 2**20:,.1f} MiB predicted for tensors, {at_once} x {task.length} tokens at a "
        f"time ({kinds})\n"
        f"run    {trainer.run}: {options.batch_size} {task.unit} a step, {options.optimizer}, on {where} in "
        f"{str(trainer.dtype).removeprefix('torch.')}"
    )


def show_score(trainer: Trainer) -> dict:
    """Evaluate, print how good the model is; returns the figures. Every process takes part."""
    options, task = trainer.options, trainer.task
    score = trainer.validate(options.eval_tokens)
    print(f"\nvalidation  {score.nats_per_token:.4f} ± {score.error:.4f} nats per token = {score.nats_per_char:.4f} "
          f"nats per character = {score.bits_per_byte:.4f} bits per byte")  # fmt: skip
    floor = task.floor(options.data, task.rows(options.eval_tokens))
    if floor:
        print(f"floor       {floor.nats_per_token:.4f} nats per token = {floor.nats_per_char:.4f} nats per character = "
              f"{floor.bits_per_byte:.4f} bits per byte; the model is {score.bits_per_byte - floor.bits_per_byte:.4f} "
              "above the best possible")  # fmt: skip
    return {"validation": score._asdict(), "floor": floor and floor._asdict(), "referee": None}


def show_samples(trainer: Trainer) -> dict | None:
    """Sample, have stories judged, print all of it; returns the verdicts' counts."""
    options, style, model = trainer.options, style_of(trainer.options.data), trainer.model.eval()
    if any(map(parallel.is_sharded, model.parameters())):
        model = checkpoint.load_run(trainer.run, trainer.world.device)[0]
    # In float32: in bfloat16 a CPU would compile new kernels for every length, and keep them, some 500 MiB.
    texts: list[str] = []
    cached = model.config.rope_scaling.kind != "dynamic"  # which keeps nothing
    for seed in range(options.seed, options.seed + 5 if style else options.seed + 1):
        n = 20 if style else options.samples
        texts += sample.generate_text(model, trainer.tokenizer, "", n, sample.Settings(seed=seed), cached=cached)
    verdicts = [tales.judge(text, style) for text in texts] if style else []
    good, true = sum(v.grammatical for v in verdicts), sum(v.true for v in verdicts)
    if style:
        print(f"referee     of {len(texts)} sampled stories {good} are grammatical and {true} also true to their world")
    for number, text in enumerate(texts[: options.samples]):
        verdict = f" ({verdicts[number].reason or 'true'})" if style else ""
        print(f"\n--- sample {number + 1}{verdict}\n{text}")
    return {"samples": len(texts), "grammatical": good, "true": true} if style else None


def train(options: Options, world: World) -> int:
    """A whole run in one process of a world; returns its exit status."""
    trainer = open_trainer(options, world)
    print(describe(trainer))
    if not options.eval_only:
        trainer.fit()
        if trainer.stop:
            run = shlex.quote(str(trainer.run))
            print(f"stopped and saved at step {trainer.state['step']}; go on with --resume --out {run}")
            return 128 + trainer.stop
    result = show_score(trainer)
    if not world.main:
        return 0
    result["referee"] = show_samples(trainer)
    if not options.eval_only:
        steps, seconds, tokens = (trainer.state[key] for key in ("step", "seconds", "tokens"))
        peak = device.peak_memory(world.device)
        print(f"\ntook        {seconds:.1f} s for {steps} steps, {tokens / seconds:,.0f} tokens/s, peak "
              f"memory {peak / 2**20:,.0f} MiB\nsaved in    {trainer.run}")  # fmt: skip
        lines = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lines.append({"step": steps, "val_loss": result["validation"]["nats_per_token"]})
        plot(trainer.run / "loss.png", lines, result["floor"])
        result |= {"seconds": seconds, "tokens": tokens, "peak_bytes": peak}
        files.write_json(trainer.run / "result.json", result)
    return 0


def main(args: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else args)
    options.check()
    device.keep_memory()
    with parallel.open_world(options.device) as world, open(os.devnull, "w") as nowhere:
        with nullcontext() if world.main else redirect_stdout(nowhere):
            return train(options, world)


if __name__ == "__main__":
    program.run(main)
