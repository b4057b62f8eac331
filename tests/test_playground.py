"""The playground in a real browser, with a real server: what is shown is what the server said, and nothing gets lost."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "google-chrome", "chromium-browser"])), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
FLAGS = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run"
# The server as it is, but for 10 ms more a step: time enough to stop it while it writes.
SLOW = """import time
from nanogptx import program, serve
step = serve.Engine.step
serve.Engine.step = lambda engine: (time.sleep(0.01), step(engine))[1]
program.run(serve.main)"""
LONG = {"max_tokens": 240, "temperature": 2, "seed": 5}  # a text that does not end by itself
GONE = re.compile("^The server does not answer: ")


@pytest.fixture(scope="module")
def servers():
    """Two processes, the second of which needs a key, and their addresses."""
    command = [sys.executable, "-c", SLOW, "nanogptx/assets/tales", "--referee", "tales", "--port", "0"]
    with contextlib.ExitStack() as stack:
        started = []
        for env in {}, {"NANOGPTX_API_KEY": "open sesame"}:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield [(process, process.stdout.readline().strip().removeprefix("tales: ")) for process in started]


@pytest.fixture(scope="module")
def browser():
    flags = [f"--{name}" for name in [*FLAGS.split(), "disable-quic"]]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
        yield browser


@pytest.fixture
def page(servers, browser):
    """The page of the first server. At the end: no request left its origin, and nothing was complained of."""
    page, seen, complaints = browser.new_page(), [], []
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    page.goto(servers[0][1])
    yield page
    assert len(seen) > 1 and all(url.startswith((servers[0][1] + "/", servers[1][1] + "/")) for url in seen)
    # Chromium itself reports every answer of 400 and more, and every connection that breaks.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    page.close()


def ask(servers, path, **body):
    data = json.dumps({"model": "tales", **body}).encode() if body else None
    request = urllib.request.Request(servers[0][1] + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return response.read().decode()


def write(page, prompt="One", **fields):
    page.get_by_label("prompt").fill(prompt)
    for name, value in fields.items():
        page.get_by_label(re.sub("^(top|min)_", r"\1-", name).replace("_", " ")).fill(str(value))
    page.get_by_role("button", name="Write").click()


says = lambda page, words: expect(page.locator("#message")).to_have_text(words, timeout=20_000)
shown = lambda page: page.locator("#written").text_content()
ALL = {"max_tokens": 150, "temperature": 1.1, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.02}


@pytest.mark.parametrize("options", [{"max_tokens": 192, "seed": 3}, ALL | {"stop": " night", "seed": 4}])
def test_what_is_shown_is_what_the_api_answers(page, servers, options):
    answer = json.loads(ask(servers, "/v1/completions", prompt="One sunny", **options))
    with page.expect_request("**/v1/completions") as request:
        write(page, "One sunny", **options)
    body, choice, count = request.value.post_data_json, answer["choices"][0], answer["usage"]["completion_tokens"]
    assert {name: body.get(name) for name in options} == options
    says(page, "It ended, by itself or at the stop string." if "stop" in options else "It ended by itself.")
    assert page.locator("#prompt-shown").text_content() == "One sunny" and shown(page) == choice["text"] != ""
    numbers = rf"{count} tokens, the first after \d+ ms, then \d+ tokens/s, seed {options['seed']}"
    assert re.fullmatch(numbers, page.locator("#numbers").text_content())
    referee = choice.get("referee", {"true": False, "reason": "unfinished, not judged"})
    expect(page.locator("#verdict")).to_contain_text("a true story" if referee["true"] else referee["reason"])


def test_a_token_s_alternatives_by_mouse_and_by_keys(page, servers):
    choice = json.loads(ask(servers, "/v1/completions", prompt="One", max_tokens=6, seed=3, logprobs=5))["choices"][0]
    tokens, logprobs, tops = (choice["logprobs"][key] for key in ("tokens", "token_logprobs", "top_logprobs"))

    def is_explained(number):
        names = [name.replace(" ", "␣") for name in tops[number]]
        expect(page.locator("#details .row .name")).to_have_text(names)
        name, percent = page.locator("#details .title").inner_text().split("\n")
        assert name == tokens[number].replace(" ", "␣")
        percent = float(re.fullmatch(r"probability ([\d.]+) %", percent)[1])
        assert percent == pytest.approx(100 * math.exp(logprobs[number]), abs=0.06)

    write(page, max_tokens=6, seed=3)
    says(page, "It ended at max tokens.")
    page.locator(".token").nth(1).hover()
    is_explained(1)
    assert len(tops[1]) == 5
    page.get_by_label("prompt").hover()
    expect(page.locator("#details")).to_be_hidden()
    page.get_by_role("button", name="Stop").focus()
    for key, number in ("Tab", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5), ("Home", 0):
        page.keyboard.press(key)
        expect(page.locator(".token").nth(number)).to_be_focused()
        is_explained(number)
    page.keyboard.press("Tab")  # past all the others
    expect(page.locator("#details")).to_be_hidden()


def test_stop(page, servers):
    write(page, **LONG)
    expect(page.locator(".token").nth(3)).to_be_visible()
    says(page, "Writing …")
    page.get_by_role("button", name="Stop").click()
    says(page, "Stopped by you.")
    assert 3 < page.locator(".token").count() < 230
    expect(page.locator("#verdict")).to_have_text("The referee: unfinished, not judged")
    while "nanogptx_running 0.0" not in (metrics := ask(servers, "/metrics")):
        time.sleep(0.05)
    assert 'nanogptx_texts_total{finish="cancelled"} 1.0' in metrics  # and not that it ended before


REFUSALS = [
    ("One sunny day. " * 99, {}, r".*\b\d{3} tokens .*\b192\b.* context of 256.*"),
    ("One", {"temperature": -1}, r"temperature is -1\.0, expected .*"),
    ("One", {"top_k": 2.5}, "top_k: .*valid integer.*"),
]


@pytest.mark.parametrize(("prompt", "fields", "words"), REFUSALS)
def test_a_refusal_is_shown_and_the_text_stays(page, prompt, fields, words):
    write(page, max_tokens=2)
    says(page, "It ended at max tokens.")
    before = shown(page)
    assert re.search(r"^2 tokens, .*, seed \d+$", page.locator("#numbers").text_content())  # one that the page chose
    write(page, prompt, max_tokens=192, **fields)
    says(page, re.compile(f"^{words}$"))
    assert shown(page) == before != ""


def test_markup_is_text_and_a_phone_is_wide_enough(page):
    page.set_viewport_size({"width": 360, "height": 740})
    prompt = "<img src=x onerror=alert(1)><script>alert(2)</script>" + "x" * 60
    write(page, prompt, max_tokens=40, temperature=2, seed=3)
    says(page, re.compile("^It ended"))
    assert page.locator("#prompt-shown").text_content() == prompt
    assert page.locator("#text :is(img, script)").count() == 0
    for token in page.locator(".token").all()[:9]:
        token.hover()
        box = page.locator("#details").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# A server that answers what it is told to, byte by byte, so that every event and every character is split.
STUB = """window.fetch = async (path) => {
  if (path.endsWith("models")) return Response.json({ data: [{ id: "m", context: 64, referee: true }] });
  const bytes = [...new TextEncoder().encode(%s)].map((byte) => new Uint8Array([byte]));
  const pull = (controller) => (bytes.length ? controller.enqueue(bytes.shift()) : controller.close());
  return new Response(new ReadableStream({ pull }), { status: %d });
};"""


def piece(text, *tokens, finish=None, **more):
    logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens), "top_logprobs": [{"é": -0.5}] * len(tokens)}
    return {"choices": [{"text": text, "finish_reason": finish, "logprobs": logprobs, **more}]}


# Text before its token, tokens without text, several at once, and text without any token.
PIECES = [piece("<b>a"), piece("é", "<b>aé"), piece("🎈 ", "", "🎈"), piece("x\n<script>y", " x", "\n<")]
TEXT, BUSY = "<b>aé🎈 x\n<script>y", {"error": {"message": "too many requests are waiting"}}
stream = lambda *events: "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)


def story(grammatical, true, reason):
    last = piece("!", finish="stop", referee={"grammatical": grammatical, "true": true, "reason": reason})
    return stream(*PIECES, last, {"choices": [], "usage": {"completion_tokens": 9}}) + "data: [DONE]\n\n"


ANSWERS = [
    (200, story(True, True, ""), "It ended by itself.", TEXT + "!", "a true story"),
    (200, story(True, False, "<b>"), "It ended by itself.", TEXT + "!", "grammatical, but not true: <b>"),
    (200, story(False, False, "so"), "It ended by itself.", TEXT + "!", "not grammatical: so"),
    (200, stream(*PIECES, BUSY), "too many requests are waiting", TEXT, "unfinished, not judged"),
    (200, stream(*PIECES), GONE, TEXT, "unfinished, not judged"),
    (429, json.dumps(BUSY), "too many requests are waiting", "", ""),
]


@pytest.mark.parametrize(("status", "answer", "words", "text", "verdict"), ANSWERS)
def test_nothing_of_an_answer_is_lost(page, status, answer, words, text, verdict):
    page.add_init_script(STUB % (json.dumps(answer), status))
    page.reload()
    write(page)
    says(page, words)
    assert shown(page) == text and page.locator("#text :is(b, script)").count() == 0
    assert page.locator(".token").all_text_contents() == (["<b>aé", "🎈", "x", "<"] if text else [])
    assert page.locator("#verdict").text_content() == (f"The referee: {verdict}" if verdict else "")
    count = {TEXT + "!": "9 tokens", TEXT: "4 tokens", "": ""}[text]
    assert page.locator("#numbers").text_content().partition(",")[0] == count


def test_a_server_with_a_key_that_dies_while_it_writes(page, servers):
    process, url = servers[1]
    page.goto(url)
    says(page, "This server needs a key.")
    write(page, API_key="open barley", **LONG)
    says(page, "This is not the server's key.")
    page.get_by_label("API key").fill("open sesame")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    says(page, "Stopped by you.")
    page.reload()
    expect(page.locator("#model")).to_contain_text("tales")  # the key is kept
    write(page, **LONG)
    expect(page.locator(".token").nth(3)).to_be_visible()
    process.kill()
    says(page, GONE)
    before = shown(page)
    page.get_by_role("button", name="Write").click()
    says(page, GONE)
    assert page.locator(".token").count() > 3 and shown(page) == before
