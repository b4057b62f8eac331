"""Serving: many requests share one model, by an engine that knows no HTTP and a server that knows little else.

To write a token, a model reads all its weights, whether for one text or for sixteen. So texts are written together, and
at every step some leave and others join: continuous batching (Yu et al. 2022, "Orca", OSDI). A long prompt is read in
chunks between the others' tokens, so it does not hold them up (Agrawal et al. 2024, arXiv:2403.02310). What a request
gets does not depend on its neighbours, but for rounding: it is a function of (seed, prompt, options).

    python nanogptx/serve.py out/tales
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"model": "tales", "prompt": "One"}'

The protocol is that of OpenAI's completions; `/` is a page to play with. Left out: TLS (put a proxy in front), chat,
several models, several GPUs, prefixes that requests share, preemption.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import prometheus_client as prometheus
import torch
import tyro
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from torch import Tensor, nn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogptx import checkpoint, device, program, sample, tales
from nanogptx.alibi import stretched
from nanogptx.kv_cache import KVCache, check_reach
from nanogptx.memory import kv_cache_bytes
from nanogptx.sample import Settings, Writer, prompt_ids
from nanogptx.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "assets" / "playground.html"


def complain(error: BaseException) -> None:
    """Say on stderr what went wrong and where, and nothing of what a request held: a message might quote it."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    print(f"error: {type(error).__name__} in {Path(at.filename).name}, line {at.lineno}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The engine


@dataclass
class Token:
    """A token where it stands in the text; `logprob` in nats as the model says (None: it was the first); likeliest."""

    text: str
    offset: int
    logprob: float | None
    top: dict[str, float] | None = None


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
    is told, too, and how likely each of its tokens was.
    """

    def __init__(self, writer: Writer, tell: Callable, prompt: str = "", top: int | None = None, echo: bool = False):
        self.writer, self.tell, self.prompt, self.top, self.echo = writer, tell, prompt, top, echo
        self.todo = list(writer.prompt)  # what the model has not read yet
        self.need = len(writer.prompt) + max(1, writer.settings.max_tokens) - 1  # the last token is never read
        self.prompt_logprobs: list[float | None] = [None]
        self.tops: list[dict[str, float]] = []  # for each token
        self.ends: list[int] = []  # where in the text each token ends
        self.told, self.echoed, self.cancelled, self.arrived = 0, False, False, time.perf_counter()

    def report(self) -> Piece:
        """What has become certain since the last time."""
        writer, tokens = self.writer, []
        text, size = writer.take(), len(writer.text)
        if writer.finish and self.ends:
            self.ends[-1] = size  # half a character, which nothing completed, became one at the end
        while self.top is not None and self.told < len(writer.ids):
            start, end = self.ends[self.told - 1] if self.told else 0, min(self.ends[self.told], size)
            # Not told: what lies behind a stop string, may be a part of one, or is not a whole character yet.
            if start >= size if writer.finish else end > writer.given or self.ends[-1] == start:
                break
            top = self.tops[self.told] if self.top else None
            start, text_of = start + (len(self.prompt) if self.echo else 0), writer.text[start:end]
            tokens.append(Token(text_of, start, writer.logprobs[self.told], top))
            self.told += 1
        if self.echo and not self.echoed:
            self.echoed, text = True, self.prompt + text
            tokens = [*(self.prompt_tokens() if self.top is not None else ()), *tokens]
        return Piece(text, tokens, writer.finish)

    def prompt_tokens(self) -> list[Token]:
        reader, tokens = Writer(self.writer.tokenizer, [], Settings()), []
        for token, logprob in zip(self.writer.prompt, self.prompt_logprobs, strict=True):
            start = len(reader.text)
            reader.ids.append(token)
            reader.decode()
            tokens.append(Token(reader.text[start:], start, logprob))
        return tokens


class Busy(Exception):
    """As many texts are being written or waiting as are allowed."""


class Engine:
    """Writes many texts at once: `submit` jobs, then call `step` until it is False, or let `start` do so in a thread.

    Keys and values are a rectangle of rows x tokens, as large as the texts in it need and never more than `kv_bytes`:
    one long text or many short ones. Whoever came first is let in first. With `continuous=False` nobody is let in until
    all have left: static batching, the naive way, to compare with.
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
        free = device.free_memory(weight.device)
        if self.room < self.context or kv_bytes > free:
            most = (
                f"{kv_bytes / 2**30:.2f} GiB for keys and values hold {self.room} tokens, {free / 2**30:.2f} are free"
            )
            raise ValueError(f"{most}, and one text may take {self.context} tokens: give it more, or another model")
        self.cache = KVCache(model.config, 1, min(64, self.context), dtype, weight.device)
        self.inbox: deque[Job] = deque()  # where other threads put what the engine has not seen yet
        self.queue: deque[Job] = deque()
        self.writing: list[Job] = []  # job n has row n of the cache
        self.reading: Job | None = None  # its prompt is being read, into the row behind them
        self.count, self.steps, self.open = 0, 0, True
        self.lock, self.work, self.closed, self.beat = threading.Lock(), threading.Event(), False, 0.0
        self.thread: threading.Thread | None = None

    def submit(self, *jobs: Job) -> None:
        """Take in all of these jobs, or raise: ValueError for one that cannot fit, Busy, RuntimeError when closed."""
        for job in jobs:
            if not 0 < len(job.writer.prompt) + job.writer.settings.max_tokens <= self.context:
                size = f"{len(job.writer.prompt)} tokens of prompt and {job.writer.settings.max_tokens} to be written"
                raise ValueError(f"{size} do not fit into the model's context of {self.context} tokens")
        with self.lock:
            if self.closed:
                raise RuntimeError("the engine has stopped")
            if self.count + len(jobs) > self.capacity:
                raise Busy
            self.count += len(jobs)
            self.inbox.extend(jobs)
        self.work.set()

    def cancel(self, job: Job) -> None:
        """Let a job leave at the next step, wherever it is; nothing more is told."""
        job.cancelled = True
        self.work.set()

    @torch.inference_mode()
    def step(self) -> bool:
        """Write a token of each text and read up to `chunk` tokens of prompts; False if there was nothing to do."""
        while self.inbox:
            self.queue.append(self.inbox.popleft())
        for job in [*self.writing, *self.queue, *([self.reading] if self.reading else [])]:
            if job.cancelled:
                self.leave(job)
        busy, left = bool(self.writing), self.chunk
        if busy:
            self.attempt(self.write_all, list(self.writing))
        while left > 0 and (self.reading or self.admit()):
            busy, left = True, left - self.attempt(lambda most=left: self.read_prompt(most), [self.reading])
        self.steps += busy
        return busy

    def admit(self) -> bool:
        """Let the first of the queue in, if its keys and values fit. Nobody overtakes it, so nobody waits for ever."""
        if not self.writing:
            self.open = True
        jobs = [*self.writing, *([self.queue[0]] if self.queue and (self.continuous or self.open) else [])]
        need = max((job.need for job in jobs), default=0)
        if len(jobs) > len(self.writing) and (len(jobs) > len(self.cache.lengths) or need > self.cache.length):
            length = min(self.context, -(-need // 64) * 64)
            rows = min(self.max_batch, self.room // length)
            if rows >= len(jobs):
                self.cache.resize(rows, length)
            else:
                jobs.pop()
        self.open = len(jobs) > len(self.writing)
        if self.open:
            self.reading = self.queue.popleft()
            self.cache.reset(len(self.writing))  # nothing of the text before is left
        return self.open

    def attempt(self, work: Callable[[], int], jobs: list[Job]) -> int:
        """Do some work for these jobs; when it fails, so do they, and the engine goes on."""
        try:
            return work()
        except Exception as error:
            complain(error)
            for job in jobs:
                self.fail(job, "an error in the engine")
            return self.chunk

    def write_all(self) -> int:
        todo = [job.writer.ids[-1:] for job in self.writing]
        x, _ = sample.read(self.model, self.cache.part(slice(0, len(todo))), todo)  # (B, 1, C)
        self.write(x[:, 0], list(self.writing))
        return len(todo)

    def read_prompt(self, most: int) -> int:
        """Read up to `most` more tokens of a prompt, and write the text's first token when it ends; returns how many."""
        job, row, before = self.reading, len(self.writing), len(self.reading.todo)
        x, last = sample.read(self.model, self.cache.part(slice(row, row + 1)), [job.todo], most)  # (1, T, C)
        if job.echo and job.top is not None:
            targets = job.writer.prompt[len(job.prompt_logprobs) :][: x.size(1)]
            logprobs = self.scores(x[0, : len(targets)]).log_softmax(-1)
            job.prompt_logprobs += logprobs[torch.arange(len(targets)), targets].tolist()
        if not job.todo:
            self.reading = None
            self.writing.append(job)
            self.write(x[0, last], [job])
        return before - len(job.todo)

    def scores(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V): of the tokenizer's ids only, a model may have more for padding."""
        return self.model.scores(x)[..., : self.tokenizer.vocab_size].to("cpu", self.dtype)

    def write(self, x: Tensor, jobs: list[Job]) -> None:
        """Append a token to each of these texts, of which the head reads x (B, C), and tell what is certain."""
        logits = self.scores(x)
        fine = logits.amax(-1).isfinite().tolist()
        for job in (job for job, ok in zip(jobs, fine, strict=True) if not ok):
            self.fail(job, "the model's scores are not finite numbers")
        logits, jobs = logits[fine], [job for job, ok in zip(jobs, fine, strict=True) if ok]
        rows = [row for row, job in enumerate(jobs) if job.top and not job.writer.finish]
        best = logits[rows].log_softmax(-1).topk(min(max((jobs[row].top for row in rows), default=0), logits.size(-1)))
        for row, values, ids in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            jobs[row].tops.append(labels(jobs[row], ids[: jobs[row].top], values))
        rows = [row for row, job in enumerate(jobs) if not job.writer.finish]  # max_tokens may be 0
        if rows:
            sample.choose(logits[rows], [jobs[row].writer for row in rows])
        for job in jobs:
            job.ends += [len(job.writer.text)] * (len(job.writer.ids) - len(job.ends))
            self.tell(job, job.report())

    def tell(self, job: Job, piece: Piece) -> None:
        if piece.finish:
            self.leave(job)
        try:
            job.tell(piece)
        except Exception as error:  # whoever asked is no longer there
            complain(error)
            job.cancelled = True

    def fail(self, job: Job, reason: str) -> None:
        self.tell(job, Piece(finish="failed", error=reason))

    def leave(self, job: Job) -> None:
        """Give back what a job holds. The last rows move into the gaps, so those of the writing stay the first."""
        if job in self.queue:
            self.queue.remove(job)
        elif job is self.reading:
            self.reading = None
        elif job in self.writing:
            row, last = self.writing.index(job), len(self.writing) - 1
            self.writing[row] = self.writing[last]
            self.writing.pop()
            for source, target in ((last, row), (last + 1, last) if self.reading else (row, row)):
                if source != target:
                    self.cache.move(source, target)
        else:
            return  # it has left already
        with self.lock:
            self.count -= 1

    def start(self) -> None:
        self.beat, self.thread = time.monotonic(), threading.Thread(target=self.loop, daemon=True)
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
            with self.lock:
                self.closed = True
            for job in [*self.writing, *self.queue, *self.inbox, *([self.reading] if self.reading else [])]:
                self.fail(job, "the engine has stopped")

    def close(self) -> None:
        self.closed = True
        self.work.set()
        if self.thread:
            self.thread.join()

    def answering(self, within: float) -> bool:
        """Whether the engine's thread is alive and began a step in the last so many seconds."""
        return not self.closed and time.monotonic() - self.beat < within


def labels(job: Job, ids: list[int], logprobs: list[float]) -> dict[str, float]:
    """What the text would gain by each of these tokens, in words, and its log-probability."""
    tokenizer, before = job.writer.tokenizer, [*job.writer.prompt, *job.writer.ids][-4:]
    start, named = len(tokenizer.decode(before)), {}
    for token, logprob in zip(ids, logprobs, strict=False):
        name = "<eos>" if token == tokenizer.eos_id else tokenizer.decode([*before, token])[start:] or f"<{token}>"
        named.setdefault(name, logprob)  # of two that look alike the likelier
    return named


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
        for name in "max_batch chunk max_n max_body max_seconds patience stall_seconds shutdown_seconds".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected more than 0")
        key = self.api_key_file.read_text() if self.api_key_file else os.environ.get("NANOGPTX_API_KEY", "")
        if self.api_key_file and not key.strip():
            raise ValueError(f"{self.api_key_file} holds no key")
        if not (
            key.strip()
            or self.insecure
            or self.host == "localhost"
            or (where := address(self.host))
            and where.is_loopback
        ):
            raise ValueError(f"--host {self.host} lets other machines in: give a key (--api-key-file), or --insecure")
        return key.strip().encode()


def address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)


# What other servers have and this one has not: taken when it asks for nothing.
NEUTRAL = {"suffix": "", "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
OPEN = {"/", "/health", "/ready"}  # without a key
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Completion(BaseModel):
    """The body of a request, as in OpenAI's API reference; top_k, min_p and repetition_penalty are additions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Stop | list[Stop] = []
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
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None and not (k in NEUTRAL and v == NEUTRAL[k])}


def refusal(status: int, message: str, param: str | None = None, headers: dict | None = None) -> Response:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status, headers)


class Service:
    """The routes. One object holds the engine, the options and the metrics."""

    def __init__(self, engine: Engine, options: Options, name: str, key: bytes = b"", style: tales.Style | None = None):
        self.engine, self.options, self.name, self.key, self.style = engine, options, name, key, style
        self.created, self.registry = int(time.time()), prometheus.CollectorRegistry()
        metric = lambda kind, name, what, *more: kind(f"nanogptx_{name}", what, *more, registry=self.registry)
        for name, what, value in (
            ("waiting", "texts that wait", lambda: engine.count - len(engine.writing)),
            ("running", "texts that are written", lambda: len(engine.writing)),
            ("steps", "steps of the engine", lambda: engine.steps),
            ("kv_tokens", "tokens whose keys and values are kept", lambda: engine.cache.lengths[: len(engine.writing)].sum()),
            ("kv_bytes", "memory taken for keys and values", lambda: engine.cache.nbytes),
        ):  # fmt: skip
            metric(prometheus.Gauge, name, what).set_function(value)
        self.responses = metric(prometheus.Counter, "responses", "responses", ["status"])
        self.texts = metric(prometheus.Counter, "texts", "texts, by what ended them", ["finish"])
        self.prompt_tokens = metric(prometheus.Counter, "prompt_tokens", "tokens of prompts of finished texts")
        self.tokens = metric(prometheus.Counter, "generated_tokens", "tokens written in finished texts")
        self.first = metric(prometheus.Histogram, "time_to_first_token_seconds", "from a request to its first token")
        self.gaps = metric(prometheus.Histogram, "inter_token_seconds", "between two tokens of a text")

    def app(self) -> "Guard":
        app = FastAPI(docs_url=None, redoc_url=None, title="nanogptx")
        app.add_api_route("/", self.page, include_in_schema=False)
        app.add_api_route("/health", self.health)
        app.add_api_route("/ready", self.ready)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name}", self.model)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_exception_handler(
            StarletteHTTPException, lambda _, e: refusal(e.status_code, e.detail, headers=e.headers)
        )
        app.add_exception_handler(RequestValidationError, self.invalid)
        return Guard(app, self)

    async def page(self) -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return FileResponse(PAGE, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})

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
        where = ".".join(str(part) for part in first["loc"][1:2])
        return refusal(400, f"{where or 'the body'}: {first['msg']}", where or None)

    def jobs(self, body: Completion, tell: Callable[[int, Piece], None]) -> list[Job]:
        """The texts that a request asks for; ValueError for what cannot be."""
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        for what, count, most in (("prompts times n", len(prompts) * body.n, min(self.options.max_n, self.engine.capacity)),
                                  ("stop strings", len(stops), self.options.max_stops)):  # fmt: skip
            if count > most:
                raise ValueError(f"{count} {what}: at most {most} are allowed")
        jobs, seed = [], secrets.randbits(32) if body.seed is None else body.seed
        for prompt in prompts:
            ids, text = prompt, prompt
            if isinstance(prompt, str):
                ids = prompt_ids(self.engine.tokenizer, prompt)
            else:
                text = self.engine.tokenizer.decode(prompt)
            size = min(16, max(0, self.engine.context - len(ids))) if body.max_tokens is None else body.max_tokens
            settings = Settings(size, body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty,
                                tuple(stops), seed)  # fmt: skip
            settings.check()
            for number in range(body.n):
                writer = Writer(self.engine.tokenizer, ids, settings, number)
                jobs.append(Job(writer, lambda piece, i=len(jobs): tell(i, piece), text, body.logprobs, body.echo))
        return jobs

    async def completions(self, body: Completion, request: Request) -> Response:
        await self.model(body.model)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        tell = lambda index, piece: loop.call_soon_threadsafe(events.put_nowait, (index, piece))
        try:
            jobs = await asyncio.to_thread(self.jobs, body, tell)
            self.engine.submit(*jobs)
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("--")) from error
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from error
        except Busy as error:
            raise HTTPException(429, "too many requests are waiting: try again", {"Retry-After": "1"}) from error
        answer = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                  "model": self.name}  # fmt: skip
        pieces = self.follow(request, jobs, events)
        if body.stream:
            return StreamingResponse(self.stream(body, jobs, answer, pieces), media_type="text/event-stream")
        choices = [Piece() for _ in jobs]
        async for index, piece in pieces:
            whole = choices[index]
            whole.text, whole.tokens, whole.finish = whole.text + piece.text, whole.tokens + piece.tokens, piece.finish
        return JSONResponse(
            answer | {"choices": [self.choice(n, choices[n], job) for n, job in enumerate(jobs)], "usage": usage(jobs)}
        )

    async def stream(
        self, body: Completion, jobs: list[Job], answer: dict, pieces: AsyncIterator
    ) -> AsyncIterator[str]:
        try:
            async for index, piece in pieces:
                yield event(answer | {"choices": [self.choice(index, piece, jobs[index])]})
            if body.stream_options.include_usage:
                yield event(answer | {"choices": [], "usage": usage(jobs)})
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield event(
                {"error": {"message": error.detail, "type": "server_error", "param": None, "code": error.status_code}}
            )

    async def follow(
        self, request: Request, jobs: list[Job], events: asyncio.Queue
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what is told until all jobs have ended; whatever ends this before that cancels them."""
        going, last, outcome = dict(enumerate(jobs)), {}, "cancelled"
        watch = asyncio.ensure_future(left(request))
        watch.add_done_callback(lambda _: events.put_nowait((-1, None)))
        timer = asyncio.get_running_loop().call_later(self.options.max_seconds, events.put_nowait, (-2, None))
        try:
            while going:
                index, piece = await events.get()
                if index == -1:
                    return
                if index == -2:
                    outcome = "timeout"
                    raise HTTPException(504, f"it took more than the {self.options.max_seconds:g} s that a request has")
                if piece.finish == "failed":
                    outcome = "failed"
                    raise HTTPException(500, piece.error)
                if index in last:
                    self.gaps.observe(piece.at - last[index])
                else:
                    self.first.observe(piece.at - jobs[index].arrived)
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
        """A piece, or a whole text, as OpenAI writes it; with the referee's verdict on a story that has ended."""
        choice = {"index": index, "text": piece.text, "finish_reason": piece.finish or None, "logprobs": None}
        if job.top is not None:
            names = {"tokens": "text", "token_logprobs": "logprob", "top_logprobs": "top", "text_offset": "offset"}
            choice["logprobs"] = {key: [getattr(token, name) for token in piece.tokens] for key, name in names.items()}
        if self.style and piece.finish == "stop":
            choice["referee"] = tales.judge(job.prompt + job.writer.text, self.style)._asdict()
        return choice


def usage(jobs: list[Job]) -> dict:
    prompt, written = sum(len(job.writer.prompt) for job in jobs), sum(len(job.writer.ids) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


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
        except Exception as error:
            complain(error)
            if not status:
                await refusal(500, "an error in the server")(scope, take, give)
        finally:
            self.service.responses.labels(status).inc()

    def refuse(self, scope: dict, headers: Headers) -> Response | None:
        """The answer to a request that may not come in, or None."""
        host, options = headers.get("host", ""), self.service.options
        # A page of another site may have its name lead here (DNS rebinding): then it, and no address, is asked for.
        if not (
            address(name := urlsplit(f"//{host}").hostname) or name in ("localhost", options.host, *options.allow_host)
        ):
            return refusal(403, f"this server is not called {name!r}: ask for it by its address, or use --allow-host")
        if "origin" in headers and urlsplit(headers["origin"]).netloc != host:
            return refusal(403, "pages of other sites may not use this server")
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.service.key and scope["path"] not in OPEN and not hmac.compare_digest(given, self.service.key):
            return refusal(401, "this server needs a key: send the header Authorization: Bearer KEY")
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0] != "application/json":
            return refusal(415, "send JSON, with the header Content-Type: application/json")
        return None


class Patient(H11Protocol):
    """A connection on which nothing is answered for long is closed, also when its client sends a byte now and then."""

    seconds = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.idle = False
        self.loop.call_later(self.seconds, self.look)

    def look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.idle:
            self.transport.close()
        elif not self.transport.is_closing():
            self.idle = idle
            self.loop.call_later(self.seconds / 2, self.look)


def style_of(options: Options) -> tales.Style | None:
    """The style of stories that the referee judges."""
    if options.referee != "auto":
        return tales.STYLES.get(options.referee)
    config = {} if checkpoint.is_huggingface(options.run) else checkpoint.read_config(options.run)
    return tales.STYLES.get(str(config.get("data", "")).removeprefix("tales-"))


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}, port {port} ({error}): choose another with --port") from error


def main(args: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=args)
    key, style = options.check(), style_of(options)
    listening, where = listen(options.host, options.port), device.choose_device(options.device)
    model, tokenizer, _ = checkpoint.load_run(options.run, where, warn=lambda text: print(text, file=sys.stderr))
    if options.rope_scaling != "none":
        model.config = stretched(model.config, options.rope_scaling)
    model = sample.prepare(model, device.choose_dtype(where, options.dtype))
    engine = Engine(model, tokenizer, int(options.kv_gib * 2**30), options.max_batch, options.max_queue, options.chunk)
    service = Service(engine, options, options.run.resolve().name, key, style)
    engine.start()
    Patient.seconds = options.patience
    config = uvicorn.Config(service.app(), http=Patient, ws="none", lifespan="off", log_config=None, log_level="critical",
                            timeout_graceful_shutdown=options.shutdown_seconds)  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn finishes, and then sends itself the signal again
    host, port = listening.getsockname()[:2]
    print(f"{service.name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    uvicorn.Server(config).run([listening])
    engine.close()


if __name__ == "__main__":
    program.run(main)
