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
from nanogptx.kv_cache import KVCache, check_reach
from nanogptx.memory import kv_cache_bytes
from nanogptx.sample import Settings, Writer, prompt_ids
from nanogptx.tokenizer import Tokenizer

try:
    import prometheus_client as prometheus
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from h11 import LocalProtocolError
    from pydantic import BaseModel, ConfigDict, Field, model_validator
    from starlette.exceptions import HTTPException
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
    finish: str = ""  # "stop", "length"; or "failed", "timeout", "cancelled", for the reason that `error` gives
    error: str = ""
    at: float = field(default_factory=time.perf_counter)


class Job:
    """A text on its way through the engine; `tell` is called with each `Piece`, by the engine's thread.

    With `top` its tokens are told, too, each with so many that were likeliest there (None: the text only). With `echo`
    the prompt, which reads as `prompt`, is told first, and how likely each of its tokens was.
    """

    def __init__(self, writer: Writer, tell: Callable, prompt: str = "", top: int | None = None, echo: bool = False):
        self.writer, self.tell, self.prompt, self.top, self.echo = writer, tell, prompt, top, echo
        self.todo = list(writer.prompt)  # what of the prompt the model has not read yet
        # So many tokens are kept at most: the last one that is written is never read.
        self.need = len(writer.prompt) + max(1, writer.settings.max_tokens) - 1
        self.prompt_logprobs: list[float | None] = [None]
        self.scored = len(writer.prompt) if echo and top is not None else 0  # how many of them are asked for
        self.tops: list[dict[str, float]] = []  # the likeliest tokens at each place
        self.ends: list[int] = []  # where in the text each token ends
        self.told_tokens, self.prompt_told, self.cancelled, self.arrived = 0, False, False, time.perf_counter()

    def report(self) -> Piece:
        """What has become certain since the last time."""
        writer, shift = self.writer, len(self.prompt) if self.echo else 0
        piece, size = Piece(writer.take(), finish=writer.finish), len(writer.text)
        self.ends += [size] * (len(writer.ids) - len(self.ends))
        if writer.finish and self.ends:
            self.ends[-1] = size  # a character that is not whole becomes U+FFFD at the end
        while self.top is not None and self.told_tokens < len(writer.ids):
            start, end = self.ends[self.told_tokens - 1] if self.told_tokens else 0, self.ends[self.told_tokens]
            # Not told is what lies behind a stop string, what may be a part of one, and what is not a whole character.
            if start >= writer.given or (end > writer.given and not writer.finish):
                break
            top = self.tops[self.told_tokens] if self.top else None
            piece.tokens.append(Token(writer.text[start:end], shift + start, writer.logprobs[self.told_tokens], top))
            self.told_tokens += 1
        if self.echo and not self.prompt_told:
            piece.text, self.prompt_told = self.prompt + piece.text, True
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

    Keys and values are a rectangle of at most `kv_bytes`, as long as the longest text needs and with as many rows as
    then fit: few long texts or many short ones. (While it changes its shape the old one is there, too.) Who comes first
    is let in first. Without `continuous` nobody is let in until all have left: static batching, the naive way, to
    compare with. ValueError when not even one text would have room.
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
        self.held, self.steps = 0, 0
        self.lock, self.work, self.closed, self.last_step_at = threading.Lock(), threading.Event(), False, 0.0

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
            if self.held + len(jobs) > self.capacity:
                raise Busy
            self.held += len(jobs)
            self.queue.extend(jobs)
        self.work.set()

    def cancel(self, job: Job) -> None:
        """Let a job leave at the next step, wherever it is; nothing is told after the one that is running."""
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
            self.attempt(writing, self.advance, writing)
        unread, more = lambda: sum(len(job.todo) for job in self.jobs), self.continuous or not self.jobs
        while more and self.queue and (unread() < self.chunk or not self.continuous):
            more = self.attempt([self.queue[0]], self.admit)
        reading = [job for job in self.jobs if job.todo]
        if reading:
            self.attempt(reading, self.advance, reading)
        self.steps += bool(writing or reading)
        return bool(writing or reading)

    def everybody(self) -> list[Job]:
        with self.lock:
            return [*self.jobs, *self.queue]

    def admit(self) -> bool:
        """Let the first of the queue in, if its keys and values fit. Nobody overtakes it, so nobody waits for ever."""
        needs = [job.need for job in (*self.jobs, self.queue[0])]
        rows, length = len(self.cache.lengths), self.cache.length
        if len(needs) > rows or max(needs) > length:
            length = min(self.context, -(-max(needs) // 64) * 64)  # a multiple of 64, so that few sizes occur
            rows = min(self.max_batch, self.room // length)
            if len(needs) > rows:
                return False
            self.cache.resize(rows, length)
        self.cache.reset(len(self.jobs))  # nothing is left of the row's text before
        with self.lock:
            self.jobs.append(self.queue.popleft())
        return True

    def attempt(self, jobs: list[Job], work: Callable, *arguments) -> Any:
        """Do some work for these jobs; when it fails, so do they, and the engine goes on."""
        try:
            return work(*arguments)
        except Exception as error:
            complain(error)
            for job in jobs:
                self.tell(job, Piece(finish="failed", error="an error in the engine"))

    def advance(self, jobs: list[Job]) -> None:
        """Let the model read on in these texts, and write a token of each that it has read to the end.

        What there is to read is the rest of the prompt, or the last token written. The other rows take no part.
        """
        first = self.jobs.index(jobs[0])
        rows = [self.jobs.index(job) - first for job in jobs]
        todo = [(job.todo or job.writer.ids[-1:]) if job in jobs else [] for job in self.jobs[first:]]
        part = self.cache.part(slice(first, len(self.jobs)))
        x, last = sample.read(self.model, part, todo, self.chunk)  # (B, T, C)
        for row, job in zip(rows, jobs, strict=True):
            if len(job.prompt_logprobs) < job.scored and not job.score(self.scores(x[row, : last[row] + 1])):
                self.tell(job, Piece(finish="failed", error=DAMAGED))
        ready = [(row, job) for row, job in zip(rows, jobs, strict=True) if not job.todo and job in self.jobs]
        rows = [row for row, _ in ready]
        self.write(x[rows, last[rows]], [job for _, job in ready])

    def scores(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), of the tokenizer's ids: a model may have more, for padding."""
        return self.model.scores(x)[..., : self.tokenizer.vocab_size].to("cpu", self.dtype)

    def write(self, x: Tensor, jobs: list[Job]) -> None:
        """Append a token to each of these texts, and tell what is certain; x (B, C) is what the head reads of each."""
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
        """Give back what a job holds, if it is still here. The others close the gap: n jobs have rows 0 to n - 1."""
        with self.lock:
            if job in self.queue:
                self.queue.remove(job)
            elif job in self.jobs:
                gap, writes = self.jobs.index(job), [row for row, one in enumerate(self.jobs) if not one.todo]
                for row in (*writes[-1:], len(self.jobs) - 1):  # who still reads stays behind who writes
                    if row > gap:
                        self.jobs[gap] = self.jobs[row]
                        self.cache.move(row, gap)
                        gap = row
                self.jobs.pop()
            else:
                return False
            self.held -= 1
            return True

    def start(self) -> None:
        self.last_step_at = time.monotonic()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self) -> None:
        try:
            while not self.closed:
                self.last_step_at = time.monotonic()
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

    def answering(self, within: float) -> bool:
        """Whether the engine's thread lives, and has begun a step in the last so many seconds."""
        return not self.closed and time.monotonic() - self.last_step_at < within


# ----------------------------------------------------------------------------------------------------------------------
# The server


@dataclass(frozen=True, kw_only=True)
class Options(sample.Source):
    """Serve a trained model over HTTP, to programs that speak OpenAI's completions protocol and to a browser."""

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
    """So many texts more than --max-batch are taken in, and wait; further ones are refused (429)."""
    kv_gib: float = 0.5
    """Memory for keys and values, in GiB (twice that while their shape changes); long texts need more of it."""
    chunk: int = 256
    """About so many tokens of prompts are read, at most, between two tokens of the other texts."""
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

    def check(self) -> bytes:
        """Raise ValueError for options that cannot be; returns the key, b"" for none."""
        for name, value in vars(self).items():
            least = 0 if name in ("max_queue", "max_stops", "port") else 1e-9
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 1e9:
                limits = f"{'more than' if least else 'at least'} 0, below 1e9"
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {limits}")
        file, variable = self.api_key_file, "NANOGPTX_API_KEY"
        key = (file.read_text(errors="replace") if file else os.environ.get(variable, "")).strip()
        if (file or variable in os.environ) and not (key and key.isascii() and key.isprintable()):
            raise ValueError(f"{file or variable} holds no key: expected a line of ASCII letters, digits and signs")
        local = self.host == "localhost" or ((where := address(self.host)) and where.is_loopback)
        if not (local or key or self.insecure):
            raise ValueError(f"--host {self.host} lets other machines in: give a key (--api-key-file), or --insecure")
        return key.encode()


def address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)


WITHOUT_KEY = {"/", "/health", "/ready"}
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Options that other servers have and this one has not are taken when they ask for nothing.
ASKS_FOR_NOTHING = {"suffix": "", "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
SHARED = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}  # with sample.Settings
Stop = Annotated[str, Field(min_length=1, max_length=256)]
FIRST_ERROR_ONLY = Field(fail_fast=True)  # of a list of a million wrong elements one is enough
Ids = Annotated[list[int], FIRST_ERROR_ONLY]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool | None = False


class Completion(BaseModel):
    """The body of a request, as in OpenAI's API reference; top_k, min_p and repetition_penalty are additions."""

    model_config = STRICT

    model: str
    prompt: str | Annotated[list[str], FIRST_ERROR_ONLY] | Ids | Annotated[list[Ids], FIRST_ERROR_ONLY] = ""
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Stop | Annotated[list[Stop], FIRST_ERROR_ONLY] = []
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
        return {
            k: v for k, v in body.items() if v is not None and not (k in ASKS_FOR_NOTHING and v == ASKS_FOR_NOTHING[k])
        }


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
        self.chars_per_token = 1 + max(
            len(engine.tokenizer.decode([token])) for token in range(engine.tokenizer.vocab_size)
        )
        metric = lambda kind, name, what, *more: kind(f"nanogptx_{name}", what, *more, registry=self.registry)
        for name, what, value in (
            ("waiting", "texts that wait", lambda: engine.held - len(engine.jobs)),
            ("running", "texts that are written", lambda: len(engine.jobs)),
            ("steps", "steps of the engine", lambda: engine.steps),
            ("kv_tokens", "tokens that are kept", lambda: engine.cache.lengths[: len(engine.jobs)].sum()),
            ("kv_bytes", "memory taken for keys and values", lambda: engine.cache.nbytes),
        ):
            metric(prometheus.Gauge, name, what).set_function(value)
        self.responses = metric(prometheus.Counter, "responses", "responses", ["status"])
        self.rejected = metric(prometheus.Counter, "rejected", "requests that found the queue full")
        self.texts = metric(prometheus.Counter, "texts", "texts by what ended them", ["finish"])
        self.prompt_tokens = metric(
            prometheus.Counter, "prompt_tokens", "tokens of the prompts of texts that have ended"
        )
        self.tokens = metric(prometheus.Counter, "generated_tokens", "tokens of texts that have ended")
        self.first_token = metric(
            prometheus.Histogram, "time_to_first_token_seconds", "from a request to its first token"
        )
        self.between_tokens = metric(prometheus.Histogram, "inter_token_seconds", "between two tokens of a text")

    def app(self) -> "Guard":
        app = FastAPI(docs_url=None, redoc_url=None, title="nanogptx", redirect_slashes=False)
        app.add_api_route("/", self.page, include_in_schema=False)
        app.add_api_route("/health", self.health)
        app.add_api_route("/ready", self.ready)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name}", self.model)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_exception_handler(HTTPException, lambda _, e: refusal(e.status_code, e.detail, headers=e.headers))
        app.add_exception_handler(RequestValidationError, self.invalid)
        app.add_exception_handler(Exception, lambda *_: refusal(500, "an error in the server"))
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

    async def invalid(self, _, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][1]) if len(first["loc"]) > 1 and first["type"] != "json_invalid" else ""
        what = f"{name or 'the body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            what = program.nearest("option", name, Completion.model_fields)
        return refusal(400, what, name or None)

    def jobs_of(self, body: Completion, tell: Callable[[int, Piece], None]) -> list[Job]:
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
            most, what = (self.chars_per_token, "characters") if isinstance(prompt, str) else (1, "tokens")
            if len(prompt) > most * self.engine.context:  # no need to encode it
                size = f"a prompt of {len(prompt)} {what} does not fit"
                raise ValueError(f"{size} into the model's context of {self.engine.context} tokens")
            ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            size = min(16, max(1, self.engine.context - len(ids))) if body.max_tokens is None else body.max_tokens
            settings = Settings(max_tokens=size, stop=tuple(stops), seed=seed, **body.model_dump(include=SHARED))
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
            if self.engine.held >= self.engine.capacity:
                raise Busy
            jobs = await asyncio.to_thread(self.jobs_of, body, tell)  # a long prompt takes a while to encode
            self.engine.submit(*jobs)
        except ValueError as error:
            words = re.sub("^--[a-z-]+", lambda option: option[0][2:].replace("-", "_"), str(error))
            raise HTTPException(400, words) from error
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
        choices = [self.choice(index, whole[index], job) for index, job in enumerate(jobs)]
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
        """Yield (index, piece) until all jobs have ended; whatever ends this earlier cancels them.

        What the engine tells, the end of the time, and that the client has gone all come through one queue.
        """
        going, last, outcome, limit = dict(enumerate(jobs)), {}, "cancelled", self.options.max_seconds
        late = Piece(finish="timeout", error=f"it took more than the {limit:g} s that a request has")
        timer = asyncio.get_running_loop().call_later(limit, events.put_nowait, (-1, late))
        watch = asyncio.ensure_future(client_gone(request))
        watch.add_done_callback(lambda _: events.put_nowait((-1, Piece(finish="cancelled"))))
        try:
            while going:
                index, piece = await events.get()
                if piece.finish not in ("", "stop", "length"):
                    outcome = piece.finish
                    raise HTTPException({"timeout": 504, "cancelled": 499}.get(outcome, 500), piece.error)
                seconds = piece.at - last.get(index, jobs[index].arrived)
                (self.between_tokens if index in last else self.first_token).observe(seconds)
                last[index] = piece.at
                if piece.finish:
                    self.record(going.pop(index), piece.finish)
                yield index, piece
        finally:
            timer.cancel(), watch.cancel()
            for job in going.values():
                self.engine.cancel(job)
                self.record(job, outcome)

    def record(self, job: Job, outcome: str) -> None:
        self.texts.labels(outcome).inc()
        self.prompt_tokens.inc(len(job.writer.prompt))
        self.tokens.inc(len(job.writer.ids))

    def choice(self, index: int, piece: Piece, job: Job) -> dict:
        """A piece, or a whole text, as OpenAI writes it, and the referee's verdict on a story that has ended."""
        choice = {"index": index, "text": piece.text, "finish_reason": piece.finish or None, "logprobs": None}
        if job.top is not None:
            names = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
            choice["logprobs"] = {name: [token[n] for token in piece.tokens] for n, name in enumerate(names)}
        if self.style and piece.finish == "stop" and not job.writer.settings.stop:  # it has ended by itself
            choice["referee"] = tales.judge(job.prompt + job.writer.text, self.style)._asdict()
        return choice


def usage(jobs: list[Job]) -> dict:
    prompt, written = sum(len(job.writer.prompt) for job in jobs), sum(len(job.writer.ids) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def client_gone(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """What every request passes first: whether it may come in at all, and how much it may bring in which time."""

    def __init__(self, app: FastAPI, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        options, status = self.service.options, ""
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
            app = self.refuse(scope) or self.app
            await app(scope, take, give)
        except LocalProtocolError:
            pass  # the client has broken off in the middle of its request
        except Exception as error:
            complain(error)
        finally:
            self.service.responses.labels(status or "none").inc()

    def refuse(self, scope: dict) -> Response | None:
        """The answer to a request that may not come in, or None."""
        headers, options, name = Request(scope).headers, self.service.options, None
        host = headers.get("host", "")
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
        # A page of another site may let its own name lead here (DNS rebinding); an address it cannot fake.
        if not (address(name) or name in {"localhost", *map(str.lower, (options.host, *options.allow_host))}):
            return refusal(403, f"this server is not called {name!r}: ask for it by its address, or see --allow-host")
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return refusal(403, "pages of other sites may not use this server")
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.service.key)
        if self.service.key and scope["path"] not in WITHOUT_KEY and not known:
            return refusal(401, "this server needs a key: send the header Authorization: Bearer KEY")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return refusal(415, "send JSON, with the header Content-Type: application/json")


class TimedConnection(H11Protocol):
    """A connection that is closed when no request comes to its end on it for too long, though bytes may come or go."""

    patience, answering = 10.0, 130.0  # seconds without a request, and for the answer to one
    most = 2**22  # bytes of a request, with all that frames them

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.state, self.since, self.size = (None, True), self.loop.time(), 0
        self.check_time()

    def data_received(self, data: bytes) -> None:
        before, self.size = self.cycle, self.size + len(data)
        if self.size > self.most:  # a body of a million chunks, say
            return self.transport.abort()
        super().data_received(data)
        self.size = self.size if self.cycle is before else len(data)

    def check_time(self) -> None:
        state = (self.cycle, idle := self.cycle is None or self.cycle.response_complete)
        if state != self.state:
            self.state, self.since = state, self.loop.time()
        if self.loop.time() - self.since > (self.patience if idle else self.answering):
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(self.patience / 4, self.check_time)


def style_of(options: Options) -> tales.Style | None:
    """The style of stories that the referee judges."""
    if options.referee != "auto":
        return tales.STYLES.get(options.referee)
    config = {} if checkpoint.is_huggingface(options.run) else checkpoint.read_config(options.run)
    return tales.STYLES.get(config.get("options", {}).get("data", "").removeprefix("tales-"))


class Server(uvicorn.Server):
    """uvicorn, which says where it listens as soon as it does."""

    async def startup(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        print(f"{self.config.app.service.name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"cannot listen at {host}, port {port} ({error}): choose another --host or --port") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small pieces wait for each other, 40 ms
    return listening


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    key, style = options.check(), style_of(options)
    listening = listen(options.host, options.port)
    model, tokenizer = options.load()
    engine = Engine(model, tokenizer, int(options.kv_gib * 2**30), options.max_batch, options.max_queue, options.chunk)
    service = Service(engine, options, options.run.resolve().name, key, style)
    TimedConnection.patience, TimedConnection.answering = options.patience, options.max_seconds + options.patience
    TimedConnection.most = 2 * options.max_body + 2**17
    config = uvicorn.Config(service.app(), http=TimedConnection, ws="none", lifespan="off", log_config=None,
                            log_level="critical", timeout_graceful_shutdown=options.shutdown_seconds)  # fmt: skip
    # uvicorn finishes what runs, and then sends itself the signal again: asyncio's own handler might swallow it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGINT, lambda *why: signal.default_int_handler(*why))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)  # a traceback for every client that breaks off
    engine.start()
    try:
        Server(config).run([listening])
    finally:
        engine.close()


if __name__ == "__main__":
    program.run(main)
