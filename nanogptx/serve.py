"""Serving: many requests share one model, by an engine that knows no HTTP and a server that knows little else.

To write a token, a model reads all its weights, whether for one text or for sixteen. So texts are written together, and
at every step some leave and others join: continuous batching (Yu et al. 2022, "Orca", OSDI). A long prompt is read in
chunks between the others' tokens, so it does not hold them up (Agrawal et al. 2024, arXiv:2403.02310). What a request
gets does not depend on its neighbours, but for rounding: it is a function of (seed, prompt, options).

    python nanogptx/serve.py out/tales
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
         -d '{"model": "tales", "prompt": "One", "max_tokens": 100}'

The protocol is that of OpenAI's completions; `/` is a page to play with. Left out: TLS (put a proxy in front), chat,
several models, several GPUs, prefixes that requests share, preemption.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import torch
import tyro
from torch import Tensor, nn

from nanogptx import checkpoint, device, program, sample, tales
from nanogptx.alibi import stretched
from nanogptx.kv_cache import KVCache, check_reach
from nanogptx.memory import kv_cache_bytes
from nanogptx.sample import Settings, Writer, prompt_ids
from nanogptx.tokenizer import Tokenizer

try:
    import prometheus_client as prometheus
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from h11 import LocalProtocolError
    from pydantic import BaseModel, ConfigDict, Field, model_validator
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    missing = f"{error.name} is not installed: serving needs pip install -e '.[serve]' -c constraints.txt"
    if __name__ != "__main__":
        raise ModuleNotFoundError(missing) from error
    print(f"error: {missing}", file=sys.stderr)
    sys.exit(2)

PAGE = Path(__file__).parent / "assets" / "playground.html"


def complain(error: BaseException) -> None:
    """Say on stderr what went wrong and where, and nothing of what a request held: a message might quote it."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    print(f"error: {type(error).__name__} in {Path(at.filename).name}, line {at.lineno}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The engine


class Token(NamedTuple):
    """A token where it stands in a text, and how likely it was, in nats, as the model says (None: it was the first)."""

    text: str
    offset: int
    logprob: float | None
    top: dict[str, float] | None = None  # what was likeliest there, and how likely


@dataclass
class Piece:
    """What a text has gained: characters that are certain, the tokens in them, and at its end why it ended."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""  # "stop", "length", or "failed" for the reason that `error` gives
    error: str = ""
    at: float = field(default_factory=time.perf_counter)


class Job:
    """A text on its way through the engine; `tell` is called with each `Piece`, by the engine's thread.

    `top` likeliest tokens are told with each (None: no tokens at all). With `echo` the prompt, which reads as `prompt`,
    is told first, and how likely each of its tokens was.
    """

    def __init__(self, writer: Writer, tell: Callable, prompt: str = "", top: int | None = None, echo: bool = False):
        self.writer, self.tell, self.prompt, self.top, self.echo = writer, tell, prompt, top, echo
        self.todo = list(writer.prompt)  # what of the prompt the model has not read yet
        self.need = len(writer.prompt) + max(1, writer.settings.max_tokens) - 1  # tokens to keep: the last is not read
        self.prompt_logprobs: list[float | None] = [None]
        self.tops: list[dict[str, float]] = []  # for each token, and
        self.ends: list[int] = []  # where in the text it ends
        self.told, self.begun, self.cancelled, self.arrived = 0, False, False, time.perf_counter()

    def report(self) -> Piece:
        """What has become certain since the last time."""
        writer, shift = self.writer, len(self.prompt) if self.echo else 0
        piece, size = Piece(writer.take(), finish=writer.finish), len(writer.text)
        self.ends += [size] * (len(writer.ids) - len(self.ends))
        if writer.finish and self.ends:
            self.ends[-1] = size  # a character that is not whole becomes U+FFFD at the end
        while self.top is not None and self.told < len(writer.ids):
            start, end = self.ends[self.told - 1] if self.told else 0, self.ends[self.told]
            # Not told is what lies behind a stop string, what may be a part of one, and what is not a whole character.
            if start >= size if writer.finish else end > writer.given or self.ends[-1] == start:
                break
            top = self.tops[self.told] if self.top else None
            piece.tokens.append(Token(writer.text[start:end], shift + start, writer.logprobs[self.told], top))
            self.told += 1
        if self.echo and not self.begun:
            piece.text, self.begun = self.prompt + piece.text, True
            piece.tokens[:0] = self.prompt_tokens() if self.top is not None else []
        return piece

    def score(self, logits: Tensor) -> bool:
        """Note how likely the prompt's next tokens were: logits (T, V) come before them; False if these are damaged."""
        targets = self.writer.prompt[len(self.prompt_logprobs) :][: len(logits)]
        logprobs = logits[: len(targets)].log_softmax(-1)
        self.prompt_logprobs += logprobs[torch.arange(len(targets)), targets].tolist()
        return bool(logprobs.isfinite().all())

    def prompt_tokens(self) -> list[Token]:
        reader, ends = Writer(self.writer.tokenizer, [], Settings()), [0]
        for token in self.writer.prompt:
            reader.ids.append(token)
            reader.decode()
            ends.append(len(reader.text))
        ends[-1] = len(self.prompt)  # half a character at its end is U+FFFD there
        spans = zip(ends, ends[1:], self.prompt_logprobs, strict=False)
        return [Token(self.prompt[start:end], start, logprob) for start, end, logprob in spans]

    def labels(self, ids: list[int], logprobs: list[float]) -> dict[str, float]:
        """What the text would gain by each of these tokens, and its logprob; of two that look alike the first."""
        tokenizer, before = self.writer.tokenizer, (self.writer.prompt + self.writer.ids)[-4:]
        start, named = len(tokenizer.decode(before)), {}
        for token, logprob in zip(ids, logprobs, strict=True):
            gain = "<eos>" if token == tokenizer.eos_id else tokenizer.decode([*before, token])[start:]
            named.setdefault(gain or f"<{token}>", logprob)
        return named


DAMAGED = "the model's scores are not finite numbers: its weights are damaged, or its training diverged"


class Busy(Exception):
    """As many texts are being written or waiting as are allowed."""


class Engine:
    """Writes many texts at once: `submit` jobs, then call `step` until it is False, or `start` a thread that does.

    Keys and values are a rectangle, rows x tokens, as large as the texts in it need, and never above `kv_bytes`: few
    long texts or many short ones. Who comes first is let in first. Without `continuous` nobody is let in until all have
    left: static batching, the naive way, to compare with. ValueError when not even one text would have room.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, kv_bytes: int = 2**29, max_batch: int = 16,
                 max_queue: int = 64, chunk: int = 256, continuous: bool = True):  # fmt: skip
        self.model, self.tokenizer, self.context = model, tokenizer, model.config.block_size
        self.max_batch, self.capacity, self.chunk, self.continuous = max_batch, max_batch + max_queue, chunk, continuous
        weight = model.embed.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # of logits
        dtype = self.dtype if weight.device.type == "cpu" else weight.dtype  # as in sample.generate
        check_reach(model.config, self.context, slide=False)
        self.room = kv_bytes // kv_cache_bytes(model.config, 1, 1, dtype.itemsize)  # in tokens
        if self.room < self.context:
            has = f"{kv_bytes / 2**30:g} GiB hold keys and values of {self.room} tokens"
            raise ValueError(f"{has}, and a text may have {self.context}: give them more memory (kv_gib)")
        if kv_bytes > (free := device.free_memory(weight.device)):
            asked = f"{kv_bytes / 2**30:g} GiB for keys and values, and {free / 2**30:.3g} GiB are free"
            raise ValueError(f"{asked}: give them less memory (kv_gib)")
        self.cache = KVCache(model.config, 1, min(64, self.context), dtype, weight.device)
        self.queue: deque[Job] = deque()
        self.jobs: list[Job] = []  # job n has row n of the cache
        self.count, self.steps, self.open = 0, 0, True
        self.lock, self.work, self.closed, self.beat = threading.Lock(), threading.Event(), False, 0.0

    def submit(self, *jobs: Job) -> None:
        """Take in all of these jobs, or none: ValueError for one that cannot fit, Busy, RuntimeError when closed."""
        for job in jobs:
            asked = len(job.writer.prompt), job.writer.settings.max_tokens
            if not asked[0] or sum(asked) > self.context:
                what = f"a prompt of {asked[0]} tokens (at least 1) and {asked[1]} tokens to write"
                raise ValueError(f"{what} do not fit into the model's context of {self.context}")
        with self.lock:
            if self.closed:
                raise RuntimeError("the engine has stopped")
            if self.count + len(jobs) > self.capacity:
                raise Busy
            self.count += len(jobs)
            self.queue.extend(jobs)
        self.work.set()

    def cancel(self, job: Job) -> None:
        """Let a job leave at the next step, wherever it is; nothing more is told."""
        job.cancelled = True
        self.work.set()

    @torch.inference_mode()
    def step(self) -> bool:
        """Write a token of each text and read up to `chunk` tokens of prompts; False if there was nothing to do."""
        for job in self.everybody():
            if job.cancelled:
                self.leave(job)
        writing = [job for job in self.jobs if not job.todo]
        if writing:
            self.attempt(writing, self.write_all, writing)
        while sum(len(job.todo) for job in self.jobs) < self.chunk and self.attempt([*self.queue][:1], self.admit):
            pass
        reading = [job for job in self.jobs if job.todo]
        if reading:
            self.attempt(reading, self.read_prompts, reading)
        self.steps += bool(writing or reading)
        return bool(writing or reading)

    def everybody(self) -> list[Job]:
        with self.lock:
            return [*self.jobs, *self.queue]

    def admit(self) -> Job | None:
        """Let the first of the queue in, if its keys and values fit. Nobody overtakes it, so nobody waits for ever."""
        self.open = self.continuous or self.open or not self.jobs
        if self.queue and self.open:
            needs = [job.need for job in (*self.jobs, self.queue[0])]
            rows, length = len(self.cache.lengths), self.cache.length
            if len(needs) > rows or max(needs) > length:
                length = min(self.context, -(-max(needs) // 64) * 64)  # a multiple of 64, so that few sizes occur
                rows = min(self.max_batch, self.room // length)
                if len(needs) <= rows:
                    self.cache.resize(rows, length)
            if len(needs) <= rows:
                self.cache.reset(len(self.jobs))  # nothing is left of the row's text before
                with self.lock:
                    self.jobs.append(self.queue.popleft())
                return self.jobs[-1]
        self.open = False
        return None

    def attempt(self, jobs: list[Job], work: Callable, *arguments) -> Any:
        """Do some work for these jobs; when it fails, so do they, and the engine goes on."""
        try:
            return work(*arguments)
        except Exception as error:
            complain(error)
            for job in jobs:
                self.tell(job, Piece(finish="failed", error="an error in the engine"))

    def write_all(self, writing: list[Job]) -> None:
        """A token for each text whose prompt is read; the row of the other one, if there is one, takes no part."""
        todo = [[] if job.todo else job.writer.ids[-1:] for job in self.jobs]
        x, _ = sample.read(self.model, self.cache, todo)  # (B, 1, C)
        self.write(x[[self.jobs.index(job) for job in writing], 0], writing)

    def read_prompts(self, reading: list[Job]) -> None:
        """Read on in these prompts, and write the first token of the texts whose prompt has come to its end."""
        first = self.jobs.index(reading[0])
        rows = [self.jobs.index(job) - first for job in reading]
        part = self.cache.part(slice(first, len(self.jobs)))
        x, last = sample.read(self.model, part, [job.todo for job in self.jobs[first:]], self.chunk)  # (B, T, C)
        for row, job in zip(rows, reading, strict=True):
            if job.echo and job.top is not None and not job.score(self.scores(x[row, : last[row] + 1])):
                self.tell(job, Piece(finish="failed", error=DAMAGED))
        ready = [(row, job) for row, job in zip(rows, reading, strict=True) if not job.todo and job in self.jobs]
        rows = [row for row, _ in ready]
        self.write(x[rows, last[rows]], [job for _, job in ready])

    def scores(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), of the tokenizer's ids: a model may have more, for padding."""
        return self.model.scores(x)[..., : self.tokenizer.vocab_size].to("cpu", self.dtype)

    def write(self, x: Tensor, jobs: list[Job]) -> None:
        """Append a token to each of these texts, of which the head reads x (B, C), and tell what is certain."""
        logits = self.scores(x)
        fine = logits.amax(-1).isfinite().tolist()
        if not all(fine):
            for job in (job for job, ok in zip(jobs, fine, strict=True) if not ok):
                self.tell(job, Piece(finish="failed", error=DAMAGED))
            logits, jobs = logits[fine], [job for job, ok in zip(jobs, fine, strict=True) if ok]
        for row, job in enumerate(jobs):
            if job.top:
                best = logits[row].log_softmax(-1).topk(min(job.top, logits.size(1)))
                job.tops.append(job.labels(best.indices.tolist(), best.values.tolist()))
        some = [row for row, job in enumerate(jobs) if not job.writer.finish]  # with max_tokens = 0 nothing is written
        if some:
            sample.choose(logits if len(some) == len(jobs) else logits[some], [jobs[row].writer for row in some])
        for job in jobs:
            self.tell(job, job.report())

    def tell(self, job: Job, piece: Piece) -> None:
        if piece.finish and not self.leave(job):
            return  # it has left before
        try:
            job.tell(piece)
        except Exception as error:  # whoever asked is no longer there
            complain(error)
            job.cancelled = True

    def leave(self, job: Job) -> bool:
        """Give back what a job holds, if it is still here; the last row moves into the gap."""
        with self.lock:
            if job in self.queue:
                self.queue.remove(job)
            elif job in self.jobs:
                row, last = self.jobs.index(job), self.jobs.pop()
                if last is not job:
                    self.jobs[row] = last
                    self.cache.move(len(self.jobs), row)
            else:
                return False
            self.count -= 1
            return True

    def start(self) -> None:
        self.beat = time.monotonic()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self) -> None:
        try:
            while not self.closed:
                self.beat = time.monotonic()
                if not self.step():
                    self.work.wait(0.2)
                    self.work.clear()
        except BaseException as error:
            complain(error)
        finally:
            self.closed = True
            for job in self.everybody():
                self.tell(job, Piece(finish="failed", error="the engine has stopped"))

    def close(self) -> None:
        """Fail what is still there, and end the thread, unless a step hangs."""
        self.closed = True
        self.work.set()
        self.thread.join(timeout=5)

    def kept(self) -> int:
        """Tokens whose keys and values are in use."""
        return int(self.cache.lengths[: len(self.jobs)].sum())

    def answering(self, within: float) -> bool:
        """Whether the engine's thread lives, and has begun a step in the last so many seconds."""
        return not self.closed and time.monotonic() - self.beat < within


# ----------------------------------------------------------------------------------------------------------------------
# The server


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a trained model over HTTP, to programs that speak OpenAI's completions protocol and to a browser."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory, as train.py makes it (say out/tales), or one of Hugging Face."""
    host: str = "127.0.0.1"
    """Where to listen; anything but this machine itself needs a key, or --insecure."""
    port: int = 8000
    """0: any free one; it is printed."""
    api_key_file: Path | None = None
    """A file with the key that clients must send; or set NANOGPTX_API_KEY."""
    insecure: bool = False
    """Let everybody who reaches the port use the model."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name under which this server may be asked for, besides localhost and addresses; may be given several times."""
    max_batch: int = 16
    """The most texts that are written at once."""
    max_queue: int = 64
    """The most texts that wait; further ones are refused (429)."""
    kv_gib: float = 0.5
    """Memory for keys and values, in GiB; how many texts fit at once depends on their length."""
    chunk: int = 256
    """The most tokens of prompts that are read between two tokens of the other texts."""
    max_n: int = 16
    """The most texts of one request: its prompts times its n."""
    max_stops: int = 4
    """The most stop strings of a request."""
    max_body: int = 2**20
    """The most bytes of a request."""
    max_seconds: float = 120
    """The longest that a request may take, waiting included."""
    patience: float = 10
    """Seconds within which a client must have sent its request."""
    stall_seconds: float = 2
    """A step that takes longer makes /ready say no; large models on small machines need more."""
    shutdown_seconds: float = 30
    """What is running when the server is told to stop has this long to finish."""
    referee: Literal["auto", "none", "tales", "letters", "password"] = "auto"
    """Judge finished texts as stories of this style; auto: of that which the model was trained on, if any."""
    rope_scaling: str = "none"
    """Stretch the context of a model with rotary positions: KIND:FACTOR, say yarn:4 (see rope.py)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and of what is computed; auto: what this hardware is fast at."""

    def check(self) -> bytes:
        """Raise ValueError for options that cannot be; returns the key, b"" for none."""
        for name, value in vars(self).items():
            least = 0 if name in ("max_queue", "max_stops", "port") else 1e-9
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 1e9:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected more than 0 and less than 1e9")
        source = self.api_key_file or "NANOGPTX_API_KEY"
        key = source.read_text(errors="replace") if self.api_key_file else os.environ.get(source)
        key = key.strip() if key is not None else None
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError(f"{source} holds no key: expected a line of ASCII letters, digits and signs")
        local = self.host == "localhost" or ((where := address(self.host)) and where.is_loopback)
        if not (local or key or self.insecure):
            raise ValueError(f"--host {self.host} lets other machines in: give a key (--api-key-file), or --insecure")
        return (key or "").encode()


def address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)


OPEN = {"/", "/health", "/ready"}  # without a key
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Options that other servers have and this one has not are taken when they ask for nothing.
NEUTRAL = {"suffix": "", "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
SHARED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # with sample.Settings
Stop = Annotated[str, Field(min_length=1, max_length=256)]
SHORT = Field(fail_fast=True)  # of a list of a million wrong elements one is enough
Ids = Annotated[list[int], SHORT]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Completion(BaseModel):
    """The body of a request, as in OpenAI's API reference; top_k, min_p and repetition_penalty are additions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: str | Annotated[list[str], SHORT] | Ids | Annotated[list[Ids], SHORT] = ""
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Stop | Annotated[list[Stop], SHORT] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int = Field(1, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def drop_defaults(cls, body: Any) -> Any:
        if not isinstance(body, dict) or len(body) > 100:
            raise ValueError("expected an object with a request's options")
        return {k: v for k, v in body.items() if v is not None and not (k in NEUTRAL and v == NEUTRAL[k])}


def problem(status: int, message: str, param: str | None = None) -> dict:
    """An error as OpenAI's clients understand it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def refusal(status: int, message: str, param: str | None = None, headers: dict | None = None) -> Response:
    close = {"Connection": "close"} if status in (401, 403, 408, 415) else {}  # do not read the rest
    return JSONResponse(problem(status, message, param), status, close | (headers or {}))


class Service:
    """The routes. One object holds the engine, the options and the metrics."""

    def __init__(self, engine: Engine, options: Options, name: str, key: bytes = b"", style: tales.Style | None = None):
        self.engine, self.options, self.name, self.key, self.style = engine, options, name, key, style
        self.created, self.registry = int(time.time()), prometheus.CollectorRegistry()
        self.longest = 1 + max(len(engine.tokenizer.decode([token])) for token in range(engine.tokenizer.vocab_size))
        metric = lambda kind, name, what, *more: kind(f"nanogptx_{name}", what, *more, registry=self.registry)
        for name, what, value in (
            ("waiting", "texts that wait", lambda: engine.count - len(engine.jobs)),
            ("running", "texts that are written", lambda: len(engine.jobs)),
            ("steps", "steps of the engine", lambda: engine.steps),
            ("kv_tokens", "tokens that keys and values are kept of", lambda: engine.kept()),
            ("kv_bytes", "memory taken for keys and values", lambda: engine.cache.nbytes),
        ):
            metric(prometheus.Gauge, name, what).set_function(value)
        self.responses = metric(prometheus.Counter, "responses", "responses", ["status"])
        self.rejected = metric(prometheus.Counter, "rejected", "requests that found the queue full")
        self.texts = metric(prometheus.Counter, "texts", "texts, by what ended them", ["finish"])
        self.prompt_tokens = metric(prometheus.Counter, "prompt_tokens", "tokens of prompts of finished texts")
        self.tokens = metric(prometheus.Counter, "generated_tokens", "tokens written in finished texts")
        self.first = metric(prometheus.Histogram, "time_to_first_token_seconds", "from a request to its first token")
        self.gaps = metric(prometheus.Histogram, "inter_token_seconds", "between two tokens of a text")

    def app(self) -> "Guard":
        app = FastAPI(docs_url=None, redoc_url=None, title="nanogptx", redirect_slashes=False)
        app.add_api_route("/", self.page, include_in_schema=False)
        app.add_api_route("/health", self.health)
        app.add_api_route("/ready", self.ready)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name}", self.model)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_exception_handler(StarletteHTTPException, self.refused)
        app.add_exception_handler(RequestValidationError, self.invalid)
        app.add_exception_handler(Exception, self.broken)
        return Guard(app, self)

    async def page(self) -> Response:
        policy = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        return FileResponse(PAGE, headers={"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"})

    async def health(self) -> dict:
        return {"status": "alive"}

    async def ready(self) -> Response:
        ready = self.engine.answering(self.options.stall_seconds)
        return JSONResponse({"status": "ready" if ready else "the engine does not answer"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def models(self) -> dict:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict:
        if name != self.name:
            raise HTTPException(404, f"there is no model {name!r} here, but {self.name!r}")
        known = {"context": self.engine.context, "referee": self.style is not None}
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "nanogptx", **known}

    async def refused(self, _, error: HTTPException) -> Response:
        return refusal(error.status_code, error.detail, headers=error.headers)

    async def broken(self, *_) -> Response:
        return refusal(500, "an error in the server")

    async def invalid(self, _, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][1]) if len(first["loc"]) > 1 and first["type"] != "json_invalid" else ""
        what = f"{name or 'the body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            what = program.nearest("option", name, Completion.model_fields)
        return refusal(400, what, name or None)

    def jobs(self, body: Completion, tell: Callable[[int, Piece], None]) -> list[Job]:
        """The texts that a request asks for; ValueError for what cannot be."""
        prompts, tokenizer = body.prompt, self.engine.tokenizer
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        most = min(self.options.max_n, self.engine.capacity)
        if not 1 <= len(prompts) * body.n <= most:
            raise ValueError(f"{len(prompts)} prompts times n = {body.n}: 1 to {most} texts are allowed")
        if len(stops) > self.options.max_stops:
            raise ValueError(f"{len(stops)} stop strings: at most {self.options.max_stops} are allowed")
        jobs, seed = [], secrets.randbits(32) if body.seed is None else body.seed
        for prompt in prompts:
            most, what = (self.longest, "characters") if isinstance(prompt, str) else (1, "tokens")
            if len(prompt) > most * self.engine.context:  # no need to encode it
                size = f"a prompt of {len(prompt)} {what} does not fit"
                raise ValueError(f"{size} into the model's context of {self.engine.context} tokens")
            ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            size = min(16, max(1, self.engine.context - len(ids))) if body.max_tokens is None else body.max_tokens
            options = {name: getattr(body, name) for name in SHARED}
            settings = Settings(max_tokens=size, stop=tuple(stops), seed=seed, **options)
            settings.check()
            for number in range(body.n):
                writer = Writer(tokenizer, ids, settings, number)
                jobs.append(Job(writer, partial(tell, len(jobs)), text, body.logprobs, body.echo))
        return jobs

    async def completions(self, body: Completion, request: Request) -> Response:
        await self.model(body.model)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        tell = lambda index, piece: loop.call_soon_threadsafe(events.put_nowait, (index, piece))
        try:
            if self.engine.count >= self.engine.capacity:
                raise Busy
            jobs = await asyncio.to_thread(self.jobs, body, tell)  # a long prompt takes a while to encode
            self.engine.submit(*jobs)
        except ValueError as error:
            option, words = re.match("(--[a-z-]*)?(.*)", str(error), re.DOTALL).groups(default="")
            raise HTTPException(400, option.removeprefix("--").replace("-", "_") + words) from error
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from error
        except Busy as error:
            self.rejected.inc()
            raise HTTPException(429, "too many texts are waiting: try again later", {"Retry-After": "1"}) from error
        answer = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        answer, pieces = answer | {"model": self.name}, self.follow(request, jobs, events)
        if body.stream:
            first = await anext(pieces, None)  # what goes wrong before it still has a status of its own
            parts = self.stream(first, pieces, answer, jobs, body.stream_options.include_usage)
            return StreamingResponse(parts, media_type="text/event-stream")
        whole = [Piece() for _ in jobs]
        async for index, piece in pieces:
            whole[index].text, whole[index].finish = whole[index].text + piece.text, piece.finish
            whole[index].tokens += piece.tokens
        choices = [self.choice(*numbered, job) for numbered, job in zip(enumerate(whole), jobs, strict=True)]
        return JSONResponse(answer | {"choices": choices, "usage": usage(jobs)})

    async def stream(self, first, pieces, answer: dict, jobs: list[Job], with_usage: bool) -> AsyncIterator[str]:
        event = lambda data: f"data: {json.dumps(data, allow_nan=False)}\n\n"
        async with contextlib.aclosing(pieces):
            try:
                while first:
                    index, piece = first
                    yield event(answer | {"choices": [self.choice(index, piece, jobs[index])]})
                    first = await anext(pieces, None)
            except HTTPException as error:
                yield event(problem(error.status_code, error.detail))
                return
        if with_usage:
            yield event(answer | {"choices": [], "usage": usage(jobs)})
        yield "data: [DONE]\n\n"

    async def follow(self, request: Request, jobs: list[Job], events: asyncio.Queue) -> AsyncIterator:
        """Yield (index, piece) until all jobs have ended; whatever ends this earlier cancels them."""
        going, last, outcome, seconds = dict(enumerate(jobs)), {}, "cancelled", self.options.max_seconds
        late = Piece(finish="timeout", error=f"it took more than the {seconds:g} s that a request has")
        timer = asyncio.get_running_loop().call_later(seconds, events.put_nowait, (-1, late))
        watch = asyncio.ensure_future(left(request))
        watch.add_done_callback(lambda _: events.put_nowait((-1, Piece(finish="cancelled"))))
        try:
            while going:
                index, piece = await events.get()
                if piece.finish not in ("", "stop", "length"):
                    outcome = piece.finish
                    if outcome == "cancelled":
                        return
                    raise HTTPException(504 if outcome == "timeout" else 500, piece.error)
                seconds = piece.at - last.get(index, jobs[index].arrived)
                (self.gaps if index in last else self.first).observe(seconds)
                last[index] = piece.at
                if piece.finish:
                    self.count(going.pop(index), piece.finish)
                yield index, piece
        finally:
            timer.cancel(), watch.cancel()
            for job in going.values():
                self.engine.cancel(job)
                self.count(job, outcome)

    def count(self, job: Job, outcome: str) -> None:
        self.texts.labels(outcome).inc()
        self.prompt_tokens.inc(len(job.writer.prompt))
        self.tokens.inc(len(job.writer.ids))

    def choice(self, index: int, piece: Piece, job: Job) -> dict:
        """A piece, or a whole text, as OpenAI writes it, and the referee's verdict on a story that has ended."""
        choice = {"index": index, "text": piece.text, "finish_reason": piece.finish or None, "logprobs": None}
        if job.top is not None:
            columns = zip(*piece.tokens, strict=True) if piece.tokens else ([], [], [], [])
            names = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
            choice["logprobs"] = dict(zip(names, map(list, columns), strict=True))
        if self.style and piece.finish == "stop" and not job.writer.settings.stop:  # it has ended by itself
            choice["referee"] = tales.judge(job.prompt + job.writer.text, self.style)._asdict()
        return choice


def usage(jobs: list[Job]) -> dict:
    prompt, written = sum(len(job.writer.prompt) for job in jobs), sum(len(job.writer.ids) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def left(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """What every request passes first: whether it may come in at all, and how much it may bring in which time."""

    def __init__(self, app: FastAPI, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        headers, options, status = Headers(scope=scope), self.service.options, ""
        deadline, size, more = time.monotonic() + options.patience, 0, True

        async def take() -> dict:
            nonlocal size, more
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic() if more else None)
            except TimeoutError as error:
                raise HTTPException(408, f"the request took more than {options.patience:g} s to arrive") from error
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > options.max_body:
                raise HTTPException(413, f"the request has more than {options.max_body} bytes")
            return message

        async def give(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            app = self.refuse(scope, headers) or self.app
            await app(scope, take, give)
        except LocalProtocolError:
            pass  # the client has broken off in the middle of its request
        except Exception as error:
            complain(error)
        finally:
            self.service.responses.labels(status or "none").inc()

    def refuse(self, scope: dict, headers: Headers) -> Response | None:
        """The answer to a request that may not come in, or None."""
        host, options, name = headers.get("host", ""), self.service.options, None
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
        # A page of another site may let its own name lead here (DNS rebinding); an address it cannot fake.
        if not (address(name) or name in {"localhost", *map(str.lower, (options.host, *options.allow_host))}):
            return refusal(403, f"this server is not called {name!r}: ask for it by its address, or see --allow-host")
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return refusal(403, "pages of other sites may not use this server")
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        if (
            self.service.key
            and scope["path"] not in OPEN
            and not (scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.service.key))
        ):
            return refusal(401, "this server needs a key: send the header Authorization: Bearer KEY")
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
        ):
            return refusal(415, "send JSON, with the header Content-Type: application/json")
        return None


class Patient(H11Protocol):
    """A connection that is closed when no request comes to its end on it for too long, though bytes may come or go."""

    patience, longest, most = 10.0, 130.0, 2**22  # seconds without a request, and for the answer to one; its bytes

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.state, self.since, self.size = (None, True), self.loop.time(), 0
        self.look()

    def data_received(self, data: bytes) -> None:
        before, self.size = self.cycle, self.size + len(data)
        if self.size > self.most:  # a body of a million chunks, say
            return self.transport.abort()
        super().data_received(data)
        self.size = self.size if self.cycle is before else len(data)

    def look(self) -> None:
        state = (self.cycle, idle := self.cycle is None or self.cycle.response_complete)
        if state != self.state:
            self.state, self.since = state, self.loop.time()
        if self.loop.time() - self.since > (self.patience if idle else self.longest):
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(self.patience / 4, self.look)


def style_of(options: Options) -> tales.Style | None:
    """The style of stories that the referee judges."""
    if options.referee != "auto":
        return tales.STYLES.get(options.referee)
    config = {} if checkpoint.is_huggingface(options.run) else checkpoint.read_config(options.run)
    return tales.STYLES.get(config.get("options", {}).get("data", "").removeprefix("tales-"))


def listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"cannot listen at {host}, port {port} ({error}): choose another with --port") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small pieces wait for each other, 40 ms
    return listening


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    key, style = options.check(), style_of(options)
    listening, where = listen(options.host, options.port), device.choose_device(options.device)
    dtype, warn = device.choose_dtype(where, options.dtype), lambda text: print(text, file=sys.stderr)
    model, tokenizer, _ = checkpoint.load_run(options.run, where, warn, dtype)
    if options.rope_scaling != "none":
        model.config = stretched(model.config, options.rope_scaling)
    model = sample.prepare(model, dtype)
    engine = Engine(model, tokenizer, int(options.kv_gib * 2**30), options.max_batch, options.max_queue, options.chunk)
    service = Service(engine, options, options.run.resolve().name, key, style)
    Patient.patience, Patient.longest = options.patience, options.max_seconds + options.patience
    Patient.most = 2 * options.max_body + 2**17
    config = uvicorn.Config(service.app(), http=Patient, ws="none", lifespan="off", log_config=None,
                            log_level="critical", timeout_graceful_shutdown=options.shutdown_seconds)  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn finishes, and then sends itself the signal again
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)  # a traceback for every client that breaks off
    host, port = listening.getsockname()[:2]
    engine.start()
    print(f"{service.name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        uvicorn.Server(config).run([listening])
    finally:
        engine.close()


if __name__ == "__main__":
    program.run(main)
