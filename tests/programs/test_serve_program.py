"""The server as a process, by clients that are well-behaved, careless, and hostile."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
import torch

from nanogptx import checkpoint, serve
from nanogptx.huggingface import Saved
from nanogptx.sample import Settings, Writer, generate, prompt_ids
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig
from nanogptx.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[2]
SERVED = str(Path(__file__).parent / "served.py")
TALES = ROOT / "nanogptx/assets/tales"
CONTEXT = 256  # of that model
KEY = "a key that nobody else has"
SMALL = "--max-batch 4 --max-queue 20 --max-body 20000 --patience 2 --max-stops 3 --max-n 6".split()


class Server:
    """A server process; its `gate` holds up the engine."""

    def __init__(self, folder, *options, run=TALES, **env):
        self.gate, self.log = folder / "gate", folder / "log"
        command = [sys.executable, SERVED, self.gate, run, "--port", 0, *options]
        with open(self.log, "w") as log:
            env = os.environ | env
            self.process = subprocess.Popen(
                [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.line = self.process.stdout.readline()
        assert " http://" in self.line, self.log.read_text()
        self.url = self.line.split(" ")[1].strip()
        self.port = int(self.url.rsplit(":", 1)[1])
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=False)

    def post(self, prompt="One", http=None, **options):
        body = {"model": "tales", "prompt": prompt, "max_tokens": 20, "seed": 1} | options
        return (http or self.http).post("/v1/completions", json=body)

    def text(self, *prompt, **options):
        answer = self.post(*prompt, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream(self, prompt="One", **options):
        """The events of a streamed answer."""
        body = {"model": "tales", "prompt": prompt, "max_tokens": 20, "seed": 1, "stream": True} | options
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            raw = b"".join(answer.iter_raw())
        events = raw.decode().split("\n\n")  # decode: every event is valid UTF-8
        assert events.pop() == "" and events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name):
        text = self.http.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split()[0] == name)

    def until(self, name, value):
        """Wait for a metric to have a value (the test's own time limit ends the wait)."""
        while self.metric(name) != value:
            time.sleep(0.01)

    def idle(self):
        self.until("nanogptx_running", 0)
        self.until("nanogptx_waiting", 0)
        return True

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.http.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    servers = []

    def start(*options, **how):
        servers.append(Server(tmp_path_factory.mktemp("server"), *options, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def shared(start):
    return start(*SMALL, "--referee", "tales")


@pytest.fixture
def server(shared):
    """The one that most tests use; each leaves it idle, with every place free."""
    assert shared.http.get("/ready").status_code == 200 and shared.idle()
    yield shared
    shared.gate.unlink(missing_ok=True)
    assert shared.idle() and shared.process.poll() is None and shared.log.read_text() == ""


@pytest.fixture(scope="module")
def keyed(start):
    return start(*SMALL, NANOGPTX_API_KEY=KEY)


@pytest.fixture(scope="module")
def model():
    net, tokenizer, _ = checkpoint.load_run(TALES)
    return net.double(), tokenizer


def alone(model, prompt, **options):
    """The same text by sample.generate."""
    writer = Writer(model[1], prompt_ids(model[1], prompt), Settings(**{"max_tokens": 20, "seed": 1} | options))
    for _ in generate(model[0], [writer]):
        pass
    return writer


def run(*args, **env):
    command = [sys.executable, ROOT / "nanogptx/serve.py", *args]
    return subprocess.run([*map(str, command)], env=os.environ | env, capture_output=True, text=True, timeout=100)


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for is what comes


def test_a_text_is_that_of_sample(server, model):
    for options in ({}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
                    {"repetition_penalty": 1.5, "max_tokens": 60}, {"stop": ["."], "max_tokens": 200}):  # fmt: skip
        want = alone(model, "One", **options | ({"stop": tuple(options["stop"])} if "stop" in options else {}))
        answer = server.post(**options).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["index"]) == (want.text, want.finish, 0)
        n = len(want.ids)
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": n, "total_tokens": n + 2}
        assert answer["object"] == "text_completion" and answer["model"] == "tales" and answer["id"].startswith("cmpl-")
        events = server.stream(**options, stream_options={"include_usage": True})
        assert events[-1]["choices"] == [] and events[-1]["usage"] == answer["usage"]
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == want.text
        assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + [want.finish]
    assert server.text(seed=None, max_tokens=60) != server.text(seed=None, max_tokens=60)


def test_several_prompts_and_several_texts_of_each(server, model):
    prompts = ["One", "At night", ""]
    want = [server.text(p) for p in prompts]
    assert len({*want}) == 3 and want == [alone(model, p).text for p in prompts]
    assert [c["text"] for c in server.post(prompts).json()["choices"]] == want
    ids = [prompt_ids(model[1], p) for p in prompts]
    assert [c["text"] for c in server.post(ids).json()["choices"]] == want and server.text(ids[0]) == want[0]
    six = server.post(prompts[:2], n=3)
    choices = six.json()["choices"]
    assert [c["index"] for c in choices] == [*range(6)] and len({c["text"] for c in choices}) == 6
    assert [choices[0]["text"], choices[3]["text"]] == want[:2]  # the first of n is the one without n
    assert six.json()["usage"]["prompt_tokens"] == 3 * (len(ids[0]) + len(ids[1]))
    streamed = {}
    for event in server.stream(prompts[:2], n=3):
        (choice,) = event["choices"]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[n] for n in range(6)] == [c["text"] for c in choices]


def test_logprobs_and_echo(server, model):
    (choice,) = server.post(logprobs=3, echo=True, temperature=0).json()["choices"]
    told, want = choice["logprobs"], alone(model, "One", temperature=0)
    assert choice["text"] == "One" + want.text == "".join(told["tokens"])
    assert told["token_logprobs"][:1] == [None] and told["token_logprobs"][2:] == pytest.approx(want.logprobs, abs=1e-9)
    assert told["top_logprobs"][:2] == [None, None] and told["text_offset"][:3] == [0, 0, 3]
    for token, logprob, top in zip(told["tokens"][2:], told["token_logprobs"][2:], told["top_logprobs"][2:]):
        assert len(top) == 3 and list(top.items())[0] == (token, logprob)  # greedy: it was the likeliest
    parts = [event["choices"][0]["logprobs"] for event in server.stream(logprobs=3, echo=True, temperature=0)]
    assert {key: sum((part[key] for part in parts), []) for key in told} == told
    (none,) = server.post(max_tokens=0, echo=True).json()["choices"]
    assert (none["text"], none["finish_reason"], none["logprobs"]) == ("One", "length", None)


def test_the_referee_judges_what_has_ended(server):
    (choice,) = server.post(max_tokens=200).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["referee"].keys() == {"grammatical", "true", "reason"}
    assert choice["referee"]["grammatical"]
    for unfinished in ({}, {"max_tokens": 200, "stop": "At night"}):
        assert "referee" not in server.post(**unfinished).json()["choices"][0]
    assert not server.post("Nonsense", max_tokens=200).json()["choices"][0]["referee"]["grammatical"]
    about = server.http.get("/v1/models").json()["data"][0]
    assert about["id"] == "tales" and about["context"] == CONTEXT and about["referee"]


def test_the_official_client(server, keyed, model):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tales"] and client.models.retrieve("tales").id == "tales"
    ask = {"model": "tales", "prompt": "One", "max_tokens": 20, "seed": 1}
    whole = client.completions.create(**ask, logprobs=2, n=2, extra_body={"top_k": 50})
    parts = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == alone(model, "One").text
    assert parts[-1].usage.completion_tokens == 20 and len(whole.choices[0].logprobs.tokens) == 20
    with pytest.raises(openai.BadRequestError, match="257 tokens|300"):
        client.completions.create(**ask | {"max_tokens": 300})
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here, but 'tales'"):
        client.completions.create(**ask | {"model": "gpt-9"})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tales", messages=[])
    with pytest.raises(openai.AuthenticationError, match="needs a key"):
        client.with_options(base_url=f"{keyed.url}/v1").completions.create(**ask)
    right = client.with_options(base_url=f"{keyed.url}/v1", api_key=KEY)
    assert right.completions.create(**ask).choices[0].text == alone(model, "One").text


# ----------------------------------------------------------------------------------------------------------------------
# A16: what does not fit


def test_context_limits(server):
    for size, status in ((CONTEXT - 1, 200), (CONTEXT, 400), (CONTEXT + 1, 400), (10 * CONTEXT, 400)):
        for stream in (False, True):
            answer = server.post([5] * size, max_tokens=1, stream=stream)
            assert answer.status_code == status
            if status == 400:
                assert f"{size} tokens" in answer.json()["error"]["message"] and "256" in answer.text
        assert len(server.text()) > 20  # the next one works
    assert server.post([5] * CONTEXT, max_tokens=0, echo=True).status_code == 200
    assert server.post([5] * CONTEXT, max_tokens=None).status_code == 400
    assert server.post([5] * (CONTEXT - 3), max_tokens=None, temperature=9.0).json()["usage"]["completion_tokens"] <= 3
    for temperature in (9.0, 0.0):  # what does not end by itself halts at the limit
        (choice,) = server.post("One", max_tokens=CONTEXT - 2, temperature=temperature, seed=3).json()["choices"]
        assert choice["finish_reason"] in ("length", "stop")


BAD = [
    ({"temperature": float("nan")}, "temperature"), ({"temperature": 1e-9}, "temperature"),
    ({"temperature": -1}, "temperature is -1.0, expected 0, or 1e-6 or more"), ({"temperature": 10**400}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"top_p": 2}, "top_p is 2.0, expected between 0 and 1"),
    ({"top_p": -0.1}, "top_p"), ({"min_p": 1.5}, "min_p"), ({"top_k": -1}, "top_k is -1, expected 0 (off) or more"),
    ({"top_k": 1.5}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"seed": 10**400}, "seed"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": 10**400}, "do not fit"),
    ({"max_tokens": True}, "max_tokens"), ({"n": 0}, "n"), ({"n": 7}, "1 prompts times n = 7: 1 to 6 texts are allowed"),
    ({"prompt": ["a", "b"], "n": 4}, "2 prompts times n = 4"), ({"prompt": []}, "0 prompts"), ({"prompt": [[]]}, "0 tokens"),
    ({"prompt": 5}, "prompt"), ({"prompt": ["a", 5]}, "prompt"), ({"prompt": [900]}, "900"), ({"prompt": [-1]}, "-1"),
    ({"prompt": [True]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"stop": ""}, "stop"), ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 4}, "4 stop strings: at most 3"), ({"stop": "x" * 300}, "stop"), ({"stop": 5}, "stop"),
    ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"echo": "yes"}, "echo"), ({"stream": 1}, "stream"),
    ({"presence_penalty": 1}, "unknown option 'presence_penalty'"), ({"max_token": 5}, "did you mean max_tokens"),
    ({"stream_options": 5}, "stream_options"), ({"model": 5}, "model"), ({"best_of": 3}, "unknown option 'best_of'"),
]  # fmt: skip


def test_wrong_values_are_told(server):
    for options, words in BAD:
        body = {"model": "tales", "prompt": "One", "max_tokens": 5} | options
        answer = server.http.post(
            "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, (options, answer.text)
        error = answer.json()["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error", (options, error)
    for options in ({"n": None, "stop": None, "logprobs": None, "user": "me"}, {"best_of": 1, "presence_penalty": 0.0},
                    {"suffix": "", "logit_bias": {}, "top_k": 10**30, "temperature": 1e300, "top_p": 0}):  # fmt: skip
        assert server.post(**options).status_code == 200


def raw(server, data, timeout=60, half_close=False):
    """What a server answers to bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        return answer


def request(body, headers="", path="/v1/completions", method="POST", host="127.0.0.1"):
    """The bytes of a request."""
    first = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    return f"{first}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def test_bodies_that_are_no_json(server):
    good = b'{"model": "tales", "prompt": "One"}'
    assert raw(server, request(good)).startswith(b"HTTP/1.1 200")
    bodies = [b"", b"{", b"null", b"[]", b'"x"', b'{"prompt": "\xff"}', b"\xff\xfe", b"[" * 19_000, good + b"x", b"\x00" * 99,
              b'{"model": "tales", "prompt": "\\ud800"}', b'{"model": "tales", "prompt": "One", "top_p": Infinity}',
              b'{"model": "tales", "prompt": "One", "top_p": 1e999}']  # fmt: skip
    for body in bodies:
        answer = raw(server, request(body))
        assert answer.startswith(b"HTTP/1.1 400"), (body[:40], answer)
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"
    for line in (b"\x16\x03\x01garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
        assert raw(server, line)[:10] in (b"HTTP/1.1 4", b"")
    assert server.text()


def service(model, **how):
    return serve.Service(serve.Engine(*model), serve.Options(run=TALES), "tales", **how)


def test_a_million_mistakes_are_one(model):
    """Of a long list of wrong things one is told, and a prompt that is too long for its length is not even encoded."""
    for field in ({"prompt": [{}] * 300_000}, {"prompt": [[{}] * 300_000]}, {"stop": [5] * 300_000}):
        with pytest.raises(pydantic.ValidationError) as error:
            serve.Completion(model="tales", **field)
        assert error.value.error_count() < 10
    with pytest.raises(ValueError, match="expected an object with a request's options"):
        serve.Completion(model="tales", **{f"x{n}": 1 for n in range(200)})
    here = service(model)
    longest = max(len(model[1].decode([token])) for token in range(900)) + 1
    for prompt, words in (("x" * (256 * longest + 1), "characters"), ([5] * 257, "tokens")):
        with pytest.raises(
            ValueError, match=f"a prompt of {len(prompt)} {words} does not fit .* context of 256 tokens"
        ):
            here.jobs_of(serve.Completion(model="tales", prompt=prompt), print)
    (job,) = here.jobs_of(serve.Completion(model="tales", prompt="a" * 256 * longest), print)
    assert len(job.writer.prompt) > 256  # so this is for the engine to refuse


def test_a_defect_of_ours_is_told_in_their_form(model, capsys):
    here = service(model)

    async def ask():
        transport = httpx.ASGITransport(here.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get("/v1/models/tales")

    here.created = property  # what JSON cannot hold
    answer = asyncio.run(ask())
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "an error in the server"
    assert capsys.readouterr().err.startswith("error: ")


def test_a_body_has_a_limit(server):
    for size, status in ((20_000, b"400"), (20_001, b"413"), (40_000, b"413")):  # 400: more tokens than fit
        body = json.dumps({"model": "tales", "prompt": ""}).encode()
        body = body[:-2] + b"x " * ((size - len(body)) // 2) + b"x" * ((size - len(body)) % 2) + b'"}'
        assert len(body) == size and raw(server, request(body)).split()[1] == status
    chunks = b"".join(b"1000\r\n" + b"x" * 0x1000 + b"\r\n" for _ in range(6)) + b"0\r\n\r\n"
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    answer = raw(server, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunks)
    assert answer.split()[1] == b"413" and b"more than 20000 bytes" in answer
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection, pytest.raises(OSError):
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        while True:  # a body in chunks of one byte: it is cut off, not read to its end
            connection.sendall(b"1\r\nx\r\n" * 1000)


# ----------------------------------------------------------------------------------------------------------------------
# A17: what is streamed


@pytest.fixture(scope="module")
def babel(start, tmp_path_factory):
    """A server whose model has learned nothing: any bytes come, in any order."""
    folder = tmp_path_factory.mktemp("runs") / "babel"
    torch.manual_seed(3)
    tokenizer = BPETokenizer.train("naïve café 東京 🌙❤🎈 , . ! one two three\n" * 3, 290)
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 16,
        "block_size": 160,
        "vocab_size": 290,
        "n_hidden": 32,
    }
    model = TinyLlama(TinyLlamaConfig(**shape))
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    checkpoint.write_run(Saved("tinyllama", shape, model.state_dict(), tokenizer, 0), folder)
    return start(run=folder)


def test_streams_of_bytes_emoji_and_other_scripts(babel):
    cut = 0
    for seed in range(25):
        ask = {"model": "babel", "max_tokens": 60, "seed": seed, "temperature": 1.5, "logprobs": 2}
        whole = babel.post("naïve 東", **ask).json()["choices"][0]
        parts = [event["choices"][0] for event in babel.stream("naïve 東", **ask)]
        assert "".join(part["text"] for part in parts) == whole["text"] == "".join(whole["logprobs"]["tokens"])
        stops = [stop for stop in (whole["text"][3:5], whole["text"][9:12]) if stop]
        ended = [event["choices"][0] for event in babel.stream("naïve 東", **ask, stop=stops)]
        text, sent = "".join(part["text"] for part in ended), ""
        until = next(whole["text"][:n] for n in range(999) if any(stop in whole["text"][:n] for stop in stops))
        assert text == until[: min(until.find(stop) for stop in stops if stop in until)]
        assert "".join(token for part in ended for token in part["logprobs"]["tokens"]) == text
        for part in ended:
            sent += part["text"]
            assert text.startswith(sent) and not any(stop in sent for stop in stops)
        cut += len(ended) > 1
    assert cut > 10


# ----------------------------------------------------------------------------------------------------------------------
# A18: many at once


def test_nobody_gets_what_is_another_s(server, model):
    """64 clients, each with a word of its own: everyone's answer is what it is alone."""
    asks = [{"prompt": f"One {1000 + 37 * n} Monday", "max_tokens": 5 + n % 40, "seed": n, "stream": n % 3 == 0,
             "echo": True, "temperature": n % 2 / 1.0} for n in range(64)]  # fmt: skip

    def ask(options):
        while True:  # 24 places for 64: who finds none comes again
            if options["stream"]:
                with contextlib.suppress(AssertionError):
                    return "".join(event["choices"][0]["text"] for event in client.stream(**options))
            elif (
                answer := client.post(http=httpx.Client(base_url=server.url, timeout=60, verify=False), **options)
            ).status_code == 200:
                return answer.json()["choices"][0]["text"]
            time.sleep(0.01)

    client = server
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(ask, asks))
    for n, (options, text) in enumerate(zip(asks, got)):
        own = {key: options[key] for key in ("max_tokens", "seed", "temperature")}
        assert text == options["prompt"] + alone(model, options["prompt"], **own).text
        assert not any(f"{1000 + 37 * other} Monday" in text for other in range(64) if other != n)


# ----------------------------------------------------------------------------------------------------------------------
# A19: too many, and gone


def test_a_full_queue_refuses_exactly_the_surplus(server):
    """200 at once for 4 rows and 20 that wait: 24 are served, however quickly they come, and 176 are told to come again."""
    refused = server.metric("nanogptx_rejected_total")
    server.gate.touch()

    async def crowd():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False, limits=limits) as http:
            body = {"model": "tales", "prompt": "One", "max_tokens": 3}
            asks = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for _ in range(200)]
            while sum(ask.done() for ask in asks) < 176:
                await asyncio.sleep(0.01)
            server.gate.unlink()
            return await asyncio.gather(*asks)

    answers = asyncio.run(crowd())
    assert sorted(answer.status_code for answer in answers) == [200] * 24 + [429] * 176
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0 and answer.json()["error"]["type"] == "rate_limit_error"
    assert server.metric("nanogptx_rejected_total") - refused == 176


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_places(server, stream):
    """Dropped while they wait, while their prompt is read, and while they are written: two steps later nothing is done."""
    gone, steps = server.metric("nanogptx_texts_total"), 3
    server.gate.write_text(str(steps))
    body = json.dumps({"model": "tales", "prompt": "One", "max_tokens": 200, "stream": stream}).encode()
    connections = []
    for n in range(24):
        connections.append(socket.create_connection(("127.0.0.1", server.port), 60))
        connections[-1].sendall(request(body))
        if n == 3:
            while server.gate.read_text() != "0":  # three steps are done
                time.sleep(0.01)
    while server.metric("nanogptx_running") + server.metric("nanogptx_waiting") < 24:
        time.sleep(0.01)
    done = server.metric("nanogptx_steps")
    for connection in connections:
        connection.close()
    assert server.idle()
    server.until("nanogptx_texts_total", gone + 24)
    server.gate.unlink()
    assert server.metric("nanogptx_steps") - done <= 2
    assert server.text()


def test_a_half_closed_connection_is_a_client_that_left(server):
    body = json.dumps({"model": "tales", "prompt": "One", "max_tokens": 200}).encode()
    server.gate.touch()
    assert raw(server, request(body), half_close=True) == b""
    assert server.idle()


def test_a_request_has_a_time(start):
    slow = start("--max-seconds", "0.5", "--max-batch", "1")
    slow.gate.touch()
    answer = slow.post()
    assert answer.status_code == 504 and "more than the 0.5 s" in answer.json()["error"]["message"]
    assert slow.idle()
    slow.gate.write_text("2")
    body = {"model": "tales", "prompt": "One", "max_tokens": 20, "stream": True}
    with slow.http.stream(
        "POST", "/v1/completions", json=body
    ) as answer:  # the status was sent before: an event says it
        events = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and json.loads(events[-1].removeprefix("data: "))["error"]["code"] == 504
    assert slow.idle()


def test_slow_senders_are_cut_off(server):
    """--patience 2: half a head, half a body, and a head of which a byte comes now and then."""
    assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n") == b""
    assert raw(server, request(b"{" * 50)[:-20]).startswith(b"HTTP/1.1 408")
    assert raw(server, b"") == b""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        with pytest.raises(OSError):
            for byte in b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 2000:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
    assert server.text()


# ----------------------------------------------------------------------------------------------------------------------
# A20: health, and the long run


@pytest.mark.parametrize("order", [signal.SIGUSR1, signal.SIGUSR2], ids=["dies", "hangs"])
def test_ready_tells_the_truth(start, order):
    server = start()
    assert server.http.get("/ready").json() == {"status": "ready"}
    server.process.send_signal(order)
    while (answer := server.http.get("/ready")).status_code == 200:
        time.sleep(0.05)
    assert answer.status_code == 503 and answer.json()["status"] == "the engine does not answer"
    assert server.http.get("/health").status_code == 200
    if order == signal.SIGUSR1:
        answer = server.post()
        assert answer.status_code == 503 and answer.json()["error"]["message"] == "the engine has stopped"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


def resident(server):
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))  # MiB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_2000_requests_leave_nothing_behind(start):
    server, sizes = start(), []
    served = lambda: server.metric("nanogptx_texts_total")

    async def crowd(count):
        async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False) as http:
            for n in range(0, count, 20):
                asks = []
                for m in range(n, n + 20):
                    body = {
                        "model": "tales",
                        "prompt": f"One {m}",
                        "max_tokens": 1 + m % 3,
                        "logprobs": 1,
                        "stream": m % 2 == 0,
                    }
                    body |= {"max_tokens": "wrong"} if m % 20 == 7 else {}
                    asks.append(http.post("/v1/completions", json=body))
                answers = await asyncio.gather(*asks)
                assert sorted(answer.status_code for answer in answers) == [200] * 19 + [400]

    for count in (500, 500, 500, 500):
        asyncio.run(crowd(count))
        sizes.append(resident(server))
    assert served() == 1900 and server.idle()
    counts = server.http.get("/metrics").text
    assert 'nanogptx_responses_total{status="400"} 100.0' in counts
    assert server.metric("nanogptx_generated_tokens_total") <= 1900 * 2
    assert server.metric("nanogptx_time_to_first_token_seconds_count") == 1900
    assert sizes[-1] - sizes[0] < 8, sizes  # MiB, over 1,500 requests


# ----------------------------------------------------------------------------------------------------------------------
# A21: closed by default


def test_every_route_needs_the_key(keyed, model):
    app = service(model).app().app
    paths = {route.path.replace("{name}", "tales") for route in app.routes}
    assert {"/v1/models", "/v1/models/tales", "/v1/completions", "/metrics", "/openapi.json", "/", "/ready"} <= paths
    wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": KEY[:-1]}, {"Authorization": f"Bearer {KEY}x"},
             {"Authorization": "Bearer " + "\xe9"}, {"X-API-Key": KEY}, {"Authorization": f"Basic {KEY}"}]  # fmt: skip
    for path in sorted(paths | {"/v1", "/v1/nothing", "//v1/models", "/v1/models/", "/docs", "/METRICS", "/health/x"}):
        for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"):
            for headers in wrong if path not in ("/", "/health", "/ready") else []:
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                answer = keyed.http.request(method, path, headers=encoded)
                assert answer.status_code == 401, (path, method, headers)
                if method != "HEAD":
                    assert answer.json()["error"]["type"] == "authentication_error"
    assert keyed.http.get("/v1/models").headers["connection"] == "close"  # nothing more is read
    for path in ("/", "/health", "/ready"):
        assert keyed.http.get(path).status_code == 200
    right = {"Authorization": f"bearer {KEY}"}
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert keyed.http.get(path, headers=right).status_code == 200
    assert keyed.http.get("/v1/nothing", headers=right).json()["error"]["type"] == "not_found_error"
    assert keyed.http.get("/v1/models/", headers=right).status_code == 404  # no redirect
    assert keyed.http.delete("/v1/models", headers=right).json()["error"]["code"] == 405
    raw(keyed, request(b"", "Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"") + b"no chunk\r\n")
    assert KEY not in keyed.line and keyed.log.read_text() == ""


def test_other_sites_and_other_names(server):
    body = b'{"model": "tales", "prompt": "One"}'
    status = lambda *how, **more: raw(server, request(body, *how, **more)).split()[1]
    for host, code in (("localhost", b"200"), (f"127.0.0.1:{server.port}", b"200"), ("[::1]:80", b"200"),
                       ("192.168.1.9", b"200"), ("evil.example", b"403"), ("127.0.0.1.evil.example", b"403"),
                       ("localhost.evil.example:80", b"403"), ("", b"403"), ("[", b"403"), ("a@localhost:x", b"200")):  # fmt: skip
        assert status(host=host) == code, host
    assert status("Origin: http://127.0.0.1\r\n") == b"200"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1.evil.example", "127.0.0.1"):
        assert status(f"Origin: {origin}\r\n") == b"403", origin
    answer = raw(server, request(b"", "Origin: http://evil.example\r\n", method="OPTIONS"))
    assert answer.split()[1] == b"403" and b"access-control" not in answer.lower()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", ""):
        answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415, kind
    answer = server.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "Application/JSON ;charset=utf-8"}
    )
    assert answer.status_code == 200
    page = server.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.text.split("<body")[0]


def test_where_it_may_listen(start, tmp_path, monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.1.9", "example.org"):
        with pytest.raises(ValueError, match=f"--host {host} lets other machines in: give a key .* or --insecure"):
            serve.main([str(TALES), "--port", "0", "--host", host])
    (tmp_path / "key").write_text(f"{KEY}\n")
    behind = start("--host", "0.0.0.0", "--api-key-file", tmp_path / "key")
    local = f"http://127.0.0.1:{behind.port}"
    assert httpx.get(f"{local}/v1/models").status_code == 401
    assert httpx.get(f"{local}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for name, text in (
        ("empty", b"\n"),
        ("lines", b"one\ntwo"),
        ("binary", b"\xff\xfe"),
        ("foreign", "schlüssel".encode()),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name} holds no key: expected a line of ASCII"):
            serve.main([str(TALES), "--port", "0", "--api-key-file", str(tmp_path / name)])
    monkeypatch.setenv("NANOGPTX_API_KEY", " ")
    with pytest.raises(ValueError, match="NANOGPTX_API_KEY holds no key"):
        serve.main([str(TALES), "--port", "0"])
    monkeypatch.delenv("NANOGPTX_API_KEY")
    open_to_all = start("--host", "0.0.0.0", "--insecure", "--allow-host", "My.Example")
    for host, status in (("my.example", b"200"), ("MY.example:80", b"200"), ("your.example", b"403")):
        assert raw(open_to_all, request(b"", path="/health", method="GET", host=host)).split()[1] == status


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and end


def test_mistakes_at_the_start(shared, tmp_path):
    taken = run(TALES, "--port", shared.port)
    assert (taken.returncode, taken.stdout, taken.stderr.count("\n")) == (2, "", 1)
    assert taken.stderr.startswith(f"error: cannot listen at 127.0.0.1, port {shared.port} ([Errno 98]")
    assert run(TALES, "--prot", 1).returncode == 2
    for options, words in (
        ([TALES, "--port", 99999], "port 99999"),
        ([tmp_path / "none"], "there is no run at"),
        ([TALES, "--max-batch", 0], "--max-batch is 0, expected more than 0, below 1e9"),
        ([TALES, "--kv-gib", "1e-5"], "GiB hold keys and values of 5 tokens, and a text may have 256"),
        ([TALES, "--kv-gib", "inf"], "--kv-gib is inf, expected more than 0, below 1e9"),
        ([TALES, "--max-queue", -1], "--max-queue is -1, expected at least 0"),
        ([TALES, "--port", 0, "--insecure", "--host", "xn--é"], "cannot listen at xn--é, port 0"),
        ([TALES, "--kv-gib", 99999], "99999 GiB for keys and values, and "),
        ([TALES, "--max-seconds", "nan"], "--max-seconds is nan, expected more than 0"),
        ([TALES, "--api-key-file", tmp_path / "none"], "none"),
        ([TALES, "--device", "tpu"], "device 'tpu' is not known"),
        ([TALES, "--rope-scaling", "yarn"], "yarn"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            serve.main([*map(str, [*options, *(["--port", 0] if "--port" not in options else [])])])


def test_without_its_libraries_it_says_what_to_install():
    for how, status in (("import runpy; runpy.run_path('nanogptx/serve.py', run_name='__main__')", 2),
                        ("import nanogptx.serve", 1)):  # fmt: skip
        code = f"import sys; sys.modules['fastapi'] = None; {how}"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == status and "needs pip install -e '.[serve]' -c constraints.txt" in result.stderr
        assert status == 1 or result.stderr.count("\n") == 1


def test_told_to_stop_before_it_has_begun():
    code = f"""import os, signal, sys, time
from nanogptx import program, serve
serve.Server.run = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(100))
program.run(lambda: serve.main([{str(TALES)!r}, "--port", "0"]))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_small_pieces_do_not_wait_for_each_other():
    """Without it the end of every answer waited for the client's acknowledgement of its head: 44 ms instead of 1."""
    with serve.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_runs(start, order, model):
    server = start()
    server.gate.write_text("2")
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.text, http=httpx.Client(base_url=server.url, timeout=60, verify=False)),
                 pool.submit(server.stream)]  # fmt: skip
        server.until("nanogptx_running", 2)
        server.process.send_signal(order)
        while True:
            try:
                socket.create_connection(("127.0.0.1", server.port), 5).close()
            except OSError:
                break  # nobody is let in any more
        server.gate.unlink()
        want = alone(model, "One").text
        assert asked[0].result() == want
        assert "".join(event["choices"][0]["text"] for event in asked[1].result()) == want
    assert server.process.wait(60) == (0 if order == signal.SIGTERM else 130)
    assert server.log.read_text() == ("" if order == signal.SIGTERM else "interrupted\n")


def test_what_runs_too_long_at_the_end_is_cut_off(start):
    server = start("--shutdown-seconds", "0.5")
    server.gate.touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post)
        server.until("nanogptx_running", 0), server.until("nanogptx_waiting", 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        with contextlib.suppress(httpx.HTTPError):
            assert asked.result().status_code >= 500


def test_nothing_of_a_prompt_is_logged(start):
    server = start()
    canary = "Ottokar-7731"
    server.text(f"One {canary}", echo=True, logprobs=1)
    (
        server.post(canary, temperature=-1),
        server.post(canary * 999),
        server.post([canary, 5]),
        server.post(stop=[canary] * 9),
    )
    server.http.get(f"/v1/{canary}"), server.http.post("/v1/completions", content=canary)
    raw(server, canary.encode() + b"\r\n\r\n")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert server.log.read_text() == "" and canary not in server.process.stdout.read()


@pytest.mark.slow
def test_a_run_with_adapters_is_served_like_any_other(start, tmp_path):
    train = [ROOT / "nanogptx/train.py", "lora", "--init-from", TALES, "--steps", 2, "--eval-tokens", 500]
    command = [sys.executable, *train, "--out", tmp_path / "lo"]
    assert subprocess.run([*map(str, command)], capture_output=True).returncode == 0
    net, tokenizer, _ = checkpoint.load_run(tmp_path / "lo")
    server = start(run=tmp_path / "lo")
    assert server.http.get("/v1/models").json()["data"][0] | {"created": 0} == {
        "id": "lo", "object": "model", "created": 0, "owned_by": "nanogptx", "context": 256, "referee": True}  # fmt: skip
    assert server.text(model="lo", max_tokens=60) == alone((net.double(), tokenizer), "One", max_tokens=60).text
