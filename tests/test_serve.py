"""The engine: a text does not depend on its neighbours, rows and memory come back, failures stay where they are.

The server is tested as a process of its own, by programs/test_serve_program.py, and its page by test_playground.py.
"""

import dataclasses
import itertools
import math
import threading
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import BYTES, build, prompts

from nanogptx import memory
from nanogptx.sample import Settings, Writer, generate
from nanogptx.serve import Busy, Engine, Job, Piece

CONTEXT = 40


@cache
def model(position="rope", dtype=torch.float64):
    return build(position, dtype)


def token_bytes(model):
    return memory.kv_cache_bytes(model.config, 1, 1, model.embed.weight.itemsize)


def engine(model, tokens=6 * CONTEXT, max_batch=4, max_queue=100, **how):
    return Engine(model, BYTES, tokens * token_bytes(model), max_batch, max_queue, **how)


class Told(Job):
    """A job that keeps what it is told."""

    def __init__(self, ids, options, number=0, top=None, echo=False):
        self.pieces: list[Piece] = []
        writer = Writer(BYTES, list(ids), options, number)
        super().__init__(writer, self.pieces.append, BYTES.decode(ids), top, echo)

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]


def run(engine, jobs=()):
    engine.submit(*jobs)
    while engine.step():
        check(engine)
    assert engine.held == 0 and not engine.jobs and not engine.queue


def check(engine):
    """What holds after every step."""
    live = len(engine.jobs)
    assert engine.held == live + len(engine.queue) and live <= engine.max_batch
    assert len(engine.cache.lengths) * engine.cache.length <= engine.room
    for row, job in enumerate(engine.jobs):
        written = max(0, len(job.writer.ids) - 1)
        assert engine.cache.lengths[row] == len(job.writer.prompt) - len(job.todo) + written


def alone(model, job):
    """What the same text is when nobody else is there, by sample.generate."""
    writer = Writer(BYTES, job.writer.prompt, job.writer.settings)
    for _ in generate(model, [writer]):
        pass
    return writer


SETTINGS = [
    Settings(temperature=0),
    Settings(),
    Settings(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.5),
    Settings(temperature=2.0, stop=("e", "\ufffd\ufffd")),
]


@st.composite
def arrivals(draw):
    """Jobs, after how many steps each arrives, and after how many more some are given up."""
    jobs = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, 255), min_size=1, max_size=30))
        options = draw(st.sampled_from(SETTINGS))
        size, seed = draw(st.integers(0, CONTEXT - len(ids))), draw(st.integers(0, 3))
        job = Told(ids, dataclasses.replace(options, max_tokens=size, seed=seed), 0, draw(st.sampled_from([None, 0, 3])),
                   draw(st.booleans()))  # fmt: skip
        jobs.append((draw(st.integers(0, 20)), draw(st.none() | st.integers(0, 12)), job))
    return sorted(jobs, key=lambda entry: entry[0])


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
@settings(max_examples=30, deadline=None)
@given(arrivals(), st.integers(1, 5), st.sampled_from([1, 7, 256]), st.integers(CONTEXT, 4 * CONTEXT), st.booleans())
def test_a_text_does_not_depend_on_its_neighbours(position, plan, max_batch, chunk, tokens, continuous):
    """Whatever arrives when, and whoever is cancelled when: ids, text, logprobs and reason are those of a text alone."""
    here = engine(model(position), tokens, max_batch, chunk=chunk, continuous=continuous)
    todo, leaving = list(plan), []
    for now in itertools.count():
        while todo and todo[0][0] <= now:
            _, patience, job = todo.pop(0)
            here.submit(job)
            leaving += [] if patience is None else [(now + patience, job)]
        for when, job in leaving:
            if when == now and not (job.pieces and job.pieces[-1].finish):
                here.cancel(job)
        busy = here.step()
        check(here)
        assert not any(job.cancelled for job in here.jobs)  # at the next step they are gone
        if not busy and not todo and all(when <= now for when, _ in leaving):
            break
    assert here.held == 0
    for _, _, job in plan:
        want, got = alone(model(position), job), job.writer
        if job.cancelled:
            assert got.ids == want.ids[: len(got.ids)]
            continue
        assert (got.ids, got.text, got.finish) == (want.ids, want.text, want.finish)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-10)
        assert job.text == (job.prompt if job.echo else "") + want.text
        assert [piece.finish for piece in job.pieces] == [""] * (len(job.pieces) - 1) + [want.finish]
        if job.top is not None:
            check_tokens(job)


def check_tokens(job):
    """Tokens make up the text, stand where they say, and tell nothing of what a stop string cut off."""
    text = ""
    for token in job.tokens:
        assert token.offset == len(text) and (token.top is None or len(token.top) <= job.top)
        text += token.text
    assert text == job.text
    given = ""
    for piece in job.pieces:  # no token before its text
        given += piece.text
        assert all(token.offset + len(token.text) <= len(given) for token in piece.tokens)


def test_in_float32_neighbours_change_rounding_only():
    net = model(dtype=torch.float32)
    jobs = [Told(ids, Settings(max_tokens=8, temperature=0)) for ids in prompts(1, 13, 4, 30, 20, 9)]
    run(engine(net, chunk=5), jobs)
    for job in jobs:
        want = alone(net, job)
        same = next((n for n, (a, b) in enumerate(zip(want.ids, job.writer.ids)) if a != b), 8)
        assert same > 4 and job.writer.logprobs[:same] == pytest.approx(want.logprobs[:same], abs=1e-5)


def test_naive_is_one_after_the_other():
    """Static batching and chunks of one token are the same texts as everything at once."""
    texts = []
    for how in ({"max_batch": 1}, {"max_batch": 6}, {"continuous": False}, {"chunk": 1}):
        jobs = [Told(ids, Settings(max_tokens=10), n) for n, ids in enumerate(prompts(1, 13, 4, 30, 20, 9))]
        run(engine(model(), **how), jobs)
        texts.append([job.writer.ids for job in jobs])
    assert texts[0] == texts[1] == texts[2] == texts[3] and len({tuple(ids) for ids in texts[0]}) == 6


def entered(engine, jobs):
    """The step at which each job's first token came."""
    engine.submit(*jobs)
    steps = {}
    while engine.step():
        for job in jobs:
            if job.pieces:
                steps.setdefault(job, engine.steps)
    return [steps[job] for job in jobs]


def test_continuous_and_static_batching():
    jobs = lambda: [Told([n], Settings(max_tokens=size, temperature=0)) for n, size in enumerate((9, 3, 3, 3))]
    assert entered(engine(model(), max_batch=2), jobs()) == [1, 1, 3, 5]  # a row is free in the step of its last token
    assert entered(engine(model(), max_batch=2, continuous=False), jobs()) == [1, 1, 9, 9]


def test_a_long_prompt_does_not_stall_the_others():
    """While it is read, 6 tokens a step, the others get a token each step; alone it would be one step."""
    first, long = Told([1], Settings(max_tokens=20, temperature=0)), Told(range(30), Settings(max_tokens=2))
    here = engine(model(), chunk=6)
    here.submit(first)
    here.step()
    here.submit(long)
    for n in range(1, 5):
        here.step()
        assert len(first.writer.ids) == 1 + n and not long.pieces
    here.step()
    assert len(long.writer.ids) == 1


def test_who_leaves_does_not_slow_a_prompt_down():
    """Rows close the gap in a way that a text which still reads stays behind those that write."""
    steps = []
    for leaves in (False, True):
        here = engine(build(block_size=256), tokens=8 * 256, max_batch=8, chunk=20)
        short = [Told([n], Settings(max_tokens=60, temperature=0)) for n in range(7)]
        long = Told([5] * 190, Settings(max_tokens=2))
        here.submit(*short)
        here.step()
        here.submit(long)
        here.step()
        if leaves:
            here.cancel(short[0]), here.cancel(short[3])
        while not long.pieces:
            here.step()
        assert here.jobs[-1] is long or not here.jobs or long not in here.jobs
        steps.append(here.steps)
    assert steps == [11, 11]  # one, and ten of 20 tokens


def test_first_come_first_served():
    """A text that needs much room is not overtaken by small ones for ever, though there are rows for these."""
    jobs = [Told([n], Settings(max_tokens=size, temperature=0)) for n, size in enumerate((20, 30, 40, 200, 5, 5))]
    steps = entered(engine(build(block_size=256), tokens=512, max_batch=8), jobs)  # room for 8 x 64 or 2 x 256
    ends = sorted(len(job.writer.ids) + (job.writer.finish == "stop") for job in jobs[:3])
    assert steps[:5] == [1, 1, 1, ends[1], ends[2]] and len({*steps[3:]}) == 3


def test_memory_is_the_budget():
    """Few long texts or many short ones: the rectangle of rows and tokens never exceeds what it may."""
    here = engine(build(block_size=256), tokens=512, max_batch=16)
    assert (most := here.room) == 512
    widths = set()
    for length, rows in ((60, 8), (250, 2), (100, 4), (60, 8)):
        jobs = [Told([n], Settings(max_tokens=length, temperature=0)) for n in range(12)]
        here.submit(*jobs)
        here.step()
        assert len(here.jobs) == rows
        widths.add((len(here.cache.lengths), here.cache.length))
        assert here.cache.nbytes <= most * token_bytes(here.model)
        for job in jobs:
            here.cancel(job)
        assert not here.step()
    assert widths == {(8, 64), (2, 256), (4, 128)}
    for size, width in ((64, 64), (65, 128)):  # of a text with 1 token before, the last of which is not kept
        here, job = engine(build(block_size=256), tokens=512, max_batch=1), Told([1], Settings(max_tokens=size, seed=1))
        run(here, [job])
        assert (len(job.writer.ids), here.cache.length) == (size, width)
    with pytest.raises(ValueError, match="hold keys and values of 255 tokens, and a text may have 256: give them more"):
        engine(build(block_size=256), tokens=255)
    with pytest.raises(ValueError, match="GiB for keys and values, and .* GiB are free: give them less"):
        Engine(model(), BYTES, kv_bytes=2**60)


def test_what_does_not_fit_is_refused_whole():
    here = engine(model(), max_queue=3)  # 4 rows and 3 that wait
    fits, wide = Told(range(30), Settings(max_tokens=10)), Told(range(30), Settings(max_tokens=11))
    with pytest.raises(ValueError, match="prompt of 30 tokens .* and 11 tokens to write do not fit .* context of 40"):
        here.submit(fits, wide)
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens \(at least 1\)"):
        here.submit(Told([], Settings()))
    assert here.held == 0
    five = [Told([n], Settings(max_tokens=3)) for n in range(5)]
    here.submit(*five)
    with pytest.raises(Busy):
        here.submit(*(Told([9], Settings(max_tokens=3)) for _ in range(3)))
    assert here.held == 5
    run(here, [fits])
    assert fits.pieces[-1].finish == "length" and len(fits.writer.ids) == 10


def test_cancelled_at_the_next_step_wherever_it_is():
    """Waiting, reading its prompt, or writing: one step later its place is free, and nothing more is told."""
    here = engine(model(), max_batch=2, chunk=4)
    few, many = Settings(max_tokens=9), Settings(max_tokens=30)
    writing, reading, waiting = Told([1], many), Told(range(30), few), Told([2], few)
    here.submit(writing)
    here.step()
    here.submit(reading, waiting)
    here.step()
    assert writing in here.jobs and reading in here.jobs and waiting in here.queue
    for job, left in ((waiting, 2), (writing, 1), (reading, 0)):
        here.cancel(job)
        told = len(job.pieces)
        here.step()
        assert here.held == left and len(job.pieces) == told
    fresh = Told([1], Settings(max_tokens=5, temperature=0))
    run(here, [fresh])
    assert fresh.writer.ids == alone(model(), fresh).ids


def broken(net, when):
    """A model whose features are not finite, or that raises, for batches in which `when` finds something."""
    real = net.features

    def features(idx, cache=None):
        x = real(idx, cache)
        for row in range(len(idx)):
            if effect := when(idx[row]):
                if effect == "raise":
                    raise RuntimeError("boom CANARY")
                x[row, : 1 if effect == "first" else None] = math.nan
                if effect != "first":
                    cache.keys[:, row] = cache.values[:, row] = math.nan
        return x

    net.features = features
    return net


def test_a_text_that_breaks_breaks_alone(capsys):
    """Scores that are no numbers fail the one text; the next one in its row is not touched."""
    net = broken(build(), lambda ids: 255 in ids)
    jobs = [Told(ids, Settings(max_tokens=6, temperature=0)) for ids in ([1, 2], [3, 255], [4], [5, 6, 7], [8])]
    run(engine(net, max_batch=2), jobs)
    assert [job.pieces[-1].finish for job in jobs] == ["length", "failed", "length", "length", "length"]
    assert jobs[1].pieces[-1].error.startswith("the model's scores are not finite numbers: ") and not jobs[1].text
    for job in jobs[:1] + jobs[2:]:
        assert job.writer.ids == alone(model(), job).ids


def test_damage_that_only_the_prompt_s_scores_show():
    net = broken(build(), lambda ids: "first" if 255 in ids else None)
    jobs = [Told(ids, Settings(max_tokens=6), top=1, echo=True) for ids in ([255, 1, 2], [4, 5, 6])]
    run(engine(net, max_batch=2), jobs)
    assert [job.pieces[-1].finish for job in jobs] == ["failed", "length"] and len(jobs[0].pieces) == 1


def test_an_exception_fails_those_it_must(capsys):
    """One while prompts are read fails these; one while all are written fails all; the engine goes on with who waits."""
    net = broken(build(), lambda ids: "raise" if 255 in ids else None)
    jobs = [Told(ids, Settings(max_tokens=6, temperature=0)) for ids in ([1, 2], [3, 255], [4])]
    here = engine(net, max_batch=2)
    here.submit(jobs[0])
    here.step()
    run(here, jobs[1:])
    assert [job.pieces[-1].finish for job in jobs] == ["length", "failed", "length"]
    said = capsys.readouterr().err
    assert said.startswith("error: RuntimeError in test_serve.py, line ") and "CANARY" not in said
    count = itertools.count()
    net = broken(build(), lambda ids: "raise" if next(count) == 4 else None)  # two prompts, two rows, and then
    jobs = [Told([n], Settings(max_tokens=6, temperature=0)) for n in range(3)]
    run(engine(net, max_batch=2), jobs)
    assert [job.pieces[-1].finish for job in jobs] == ["failed", "failed", "length"]
    assert jobs[2].writer.ids == alone(model(), jobs[2]).ids


def test_nobody_is_told_after_the_end():
    """An error while pieces are told reaches those who are still there, each once."""
    net = model()
    jobs = [Told([n], Settings(max_tokens=size, temperature=0)) for n, size in enumerate((2, 9, 9))]
    here, calls = engine(net), itertools.count()
    jobs[1].report = lambda: Piece() if next(calls) == 0 else 1 / 0
    run(here, jobs)
    assert [[piece.finish for piece in job.pieces] for job in jobs] == [["", "length"], ["", "failed"], ["", "failed"]]


def test_no_memory_for_more_rows_fails_one(monkeypatch):
    here = engine(model(), max_batch=4)
    jobs = [Told([n], Settings(max_tokens=5, temperature=0)) for n in range(2)]
    monkeypatch.setattr(here.cache, "resize", lambda *size: (_ for _ in ()).throw(MemoryError))
    here.submit(*jobs)
    for _ in range(3):
        here.step()
    monkeypatch.undo()
    run(here, [Told([3], Settings(max_tokens=5))])
    assert [job.pieces[-1].finish for job in jobs] == ["length", "failed"]


def test_whoever_listens_no_more_is_cancelled():
    def deaf(piece):
        raise RuntimeError("the loop is closed")

    here, other = engine(model()), Told([1], Settings(max_tokens=9, temperature=0))
    job = Job(Writer(BYTES, [2], Settings(max_tokens=9)), deaf)
    run(here, [job, other])
    assert len(job.writer.ids) <= 2 and len(other.writer.ids) == 9


def test_the_thread_answers_and_dies_visibly():
    here = engine(model())
    here.start()
    job, done = Told([1], Settings(max_tokens=9, temperature=0)), threading.Event()
    job.tell = lambda piece: piece.finish and done.set()
    here.submit(job)
    assert done.wait(60) and here.answering(60) and here.held == 0
    assert not here.answering(-1)  # a step that takes longer than that
    lost, gone = Told([2], Settings(max_tokens=9)), threading.Event()
    lost.tell = lambda piece: (lost.pieces.append(piece), gone.set())
    here.step = lambda: (_ for _ in ()).throw(SystemExit)  # not an Exception: nothing is to go on after it
    here.submit(lost)
    assert gone.wait(60) and lost.pieces[0].error == "the engine has stopped"
    here.thread.join()
    assert not here.answering(60)
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        here.submit(Told([3], Settings(max_tokens=9)))
    ended = engine(model())
    ended.start()
    left = Told([1], Settings(max_tokens=39))
    ended.submit(left)
    ended.close()
    assert left.pieces[-1].finish in ("failed", "length") and ended.held == 0


# ----------------------------------------------------------------------------------------------------------------------
# What is told of tokens


def test_log_probabilities_of_prompt_and_text_are_the_model_s_own():
    (ids,) = prompts(11)
    job = Told(ids, Settings(max_tokens=8, temperature=0.7), top=3, echo=True)
    run(engine(model(), chunk=4), [job])
    whole = torch.tensor([ids + job.writer.ids])
    with torch.no_grad():
        scores = model()(whole)[0][0, :, : BYTES.vocab_size].log_softmax(-1)
    want = scores[torch.arange(18), whole[0, 1:]].tolist()
    assert job.tokens[0].logprob is None and len(job.tokens) == 19
    assert [token.logprob for token in job.tokens[1:]] == pytest.approx(want, abs=1e-10)
    for token, row in zip(job.tokens[11:], scores[10:]):
        best = row.topk(3).values.tolist()  # two that look alike, here bytes that are no character, are told as one
        assert list(token.top.values())[0] == pytest.approx(best[0], abs=1e-10) and len(token.top) <= 3
        assert all(min(abs(value - b) for b in best) < 1e-10 for value in token.top.values())
    with_nothing = Told(ids, Settings(max_tokens=0), top=0, echo=True)
    run(engine(model()), [with_nothing])
    assert [t.logprob for t in with_nothing.tokens[1:]] == pytest.approx(want[:10], abs=1e-10)
    assert with_nothing.text == BYTES.decode(ids) and with_nothing.pieces[-1].finish == "length"


def script(text, stop=(), size=100, eos=True):
    """A job into which a given text is written, token by token, as the model might have."""
    job = Told([0], Settings(max_tokens=size, stop=stop), top=0)
    for token in [*BYTES.encode(text), *([BYTES.eos_id] if eos else [])]:
        if not job.writer.finish:
            job.writer.add(token, -1.0)
            job.tell(job.report())
    return job


@pytest.mark.parametrize(
    ("text", "stop", "size", "pieces", "tokens"),
    [
        ("abc", (), 9, ["a", "b", "c", ""], ["a", "b", "c"]),
        ("né", (), 9, ["n", "", "é", ""], ["n", "", "é"]),  # é is two tokens, and told when it is whole
        ("n🌙", (), 3, ["n", "", "\ufffd"], ["n", "", "\ufffd"]),  # its end is not written any more
        ("a END b", ("END",), 99, ["a", " ", "", "", ""], ["a", " "]),
        ("a ENd", ("END",), 99, ["a", " ", "", "", "ENd", ""], ["a", " ", "E", "N", "d"]),  # a beginning was held back
        ("abcab", ("ab",), 99, ["", ""], []),
        ("aab", ("ab",), 99, ["", "a", ""], ["a"]),
        ("né é", (" é",), 99, ["n", "", "é", "", "", ""], ["n", "", "é"]),
    ],
)
def test_what_is_told_when(text, stop, size, pieces, tokens):
    job = script(text, stop, size)
    assert [piece.text for piece in job.pieces] == pieces
    assert [token.text for token in job.tokens] == tokens
    check_tokens(job)


@settings(max_examples=300, deadline=None)
@given(st.text("abEND é🌙", max_size=20), st.lists(st.text("abEND é🌙", min_size=1, max_size=4), max_size=2))
def test_streams_never_leak_a_part_of_a_stop_string(text, stop):
    job = script(text, tuple(stop))
    until = next((text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stop)), "")
    assert job.text == (until[: min(until.find(s) for s in stop if s in until)] if until else text)
    check_tokens(job)
    for n in range(1, len(job.pieces)):  # what has been told at any time is final, whatever comes
        assert text.startswith("".join(piece.text for piece in job.pieces[:n]))


def test_labels():
    job = Told(BYTES.encode("caf"), Settings(), top=5)
    job.writer.add(BYTES.encode("é")[0], -1.0)
    second = BYTES.encode("é")[1]
    named = job.labels([second, BYTES.encode("x")[0], BYTES.eos_id, BYTES.encode("y")[0]], [-1.0, -2.0, -3.0, -4.0])
    assert named == {f"<{second}>": -1.0, "x": -2.0, "<eos>": -3.0, "y": -4.0}  # it makes a character whole
    again = job.labels([BYTES.encode("é")[0], BYTES.encode("🌙")[0]], [-1.0, -2.0])
    assert again == {"\ufffd": -1.0}  # of two that look alike the likelier


def test_no_tokens_are_told_unless_asked_for():
    job = Told([1, 2], Settings(max_tokens=5, temperature=0))
    run(engine(model()), [job])
    assert job.tokens == [] and job.text


def test_time_is_told():
    """A piece's time is when it was told, a job's when it was made."""
    before = time.perf_counter()
    job = Told([1, 2], Settings(max_tokens=5, temperature=0))
    run(engine(model()), [job])
    times = [before, job.arrived, *(piece.at for piece in job.pieces), time.perf_counter()]
    assert times == sorted(times)


def test_n_texts_of_one_prompt_are_n_texts():
    jobs = [Told([7, 8], Settings(max_tokens=12, seed=3), number) for number in range(4)]
    run(engine(model()), jobs)
    assert len({tuple(job.writer.ids) for job in jobs}) == 4
