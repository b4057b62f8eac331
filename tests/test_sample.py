"""Filters equal transformers' processors, draws follow the distribution, texts do not depend on their batch, and what
is streamed is whole characters that add up to the text."""

import dataclasses
import io
import math
import random
import re
from functools import cache

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanogptx import checkpoint, device, huggingface, sample, tales
from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.kv_cache import KVCache
from nanogptx.rope import Scaling
from nanogptx.sample import Settings, Writer, adjust, draw, generate, pick
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig
from nanogptx.tokenizer import BPETokenizer, SentencePieceTokenizer, train_tokenizer


def logits(rows=7, n=53, seed=0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 3


# ----------------------------------------------------------------------------------------------------------------------
# Distributions


def distribution(logits, settings, seen=None):
    return adjust(logits, settings, seen).softmax(-1)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 53, 60])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_equal_to_transformers(temperature, top_k, top_p, min_p):
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    ours = distribution(logits(), Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(ours > 0, expected > -math.inf)
    torch.testing.assert_close(ours, expected.softmax(-1), atol=1e-6, rtol=0)


def seen_of(ids: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(len(ids), n, dtype=torch.bool).scatter(1, ids, True)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 4.0])
def test_repetition_penalty_equals_transformers(penalty):
    ids = torch.randint(53, (7, 20), generator=torch.Generator().manual_seed(1))
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits().clone())
    torch.testing.assert_close(sample.penalize(logits(), seen_of(ids, 53), penalty), want, atol=1e-6, rtol=0)


def test_the_order_is_that_of_generate():
    """All at once, through the list that transformers' `generate` makes of these settings."""
    config = LlamaConfig(vocab_size=53, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, ids = LlamaForCausalLM(config), torch.randint(53, (7, 20), generator=torch.Generator().manual_seed(1))
    ours = Settings(temperature=1.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.8)
    names = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    theirs = GenerationConfig(do_sample=True, **{name: getattr(ours, name) for name in names})
    processors = model._get_logits_processor(generation_config=theirs, input_ids_seq_length=20)
    assert len(processors) == 5
    want = processors(ids, logits().clone()).softmax(-1)
    got = distribution(logits(), ours, seen_of(ids, 53))
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert 2 < (got > 0).sum() / 7 < 30  # something is left, and something is not


def test_by_hand():
    p = torch.tensor([[0.25, 0.5, 0.0625, 0.125, 0.0625]])

    def of(**options):
        return distribution(p.log(), Settings(**options))

    assert of(top_p=0.5).tolist() == [[0, 1, 0, 0, 0]]  # 0.5 is reached by the first
    assert of(top_p=0.51)[0].gt(0).tolist() == [True, True, False, False, False]
    assert of(top_p=0)[0].gt(0).sum() == 1
    torch.testing.assert_close(of(top_k=2), torch.tensor([[1 / 3, 2 / 3, 0, 0, 0]]))
    torch.testing.assert_close(of(min_p=0.3), torch.tensor([[1 / 3, 2 / 3, 0, 0, 0]]))
    assert pick(p.log(), Settings(temperature=0), None, torch.tensor([0.9])).tolist() == [1]
    # Temperature comes first: flattened by T = 2, three tokens are needed for 0.7, otherwise two.
    assert (of(temperature=2, top_p=0.7) > 0).sum() == 3
    assert (of(top_p=0.7) > 0).sum() == 2
    assert (of(temperature=2, min_p=0.3) > 0).sum() == 5 and (of(min_p=0.2) > 0).sum() == 3
    # Seen twice or once is the same; what is positive is divided, what is negative multiplied.
    seen = torch.tensor([[True, True, False]])
    got = sample.penalize(torch.tensor([[2.0, -2.0, 1.0]]), seen, 1.2)
    torch.testing.assert_close(got, torch.tensor([[2 / 1.2, -2.4, 1.0]]))


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-6, 1, 1e30])
@pytest.mark.parametrize("top_k", [0, 1, 53, 54])
@pytest.mark.parametrize("top_p", [0, 1e-6, 1])
@pytest.mark.parametrize("min_p", [0, 1])
def test_no_setting_fails(temperature, top_k, top_p, min_p):
    """A15, with ties and with logits of -inf."""
    options = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row in (logits(), 1e4 * logits(), torch.zeros(2, 53), torch.tensor([[-math.inf, 0.0, -math.inf]])):
        p = distribution(row, options)
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
        tokens = pick(row, options, None, torch.zeros(len(row)))
        if temperature < 1:
            assert torch.equal(tokens, row.argmax(-1))
        assert not p[row == -math.inf].any()
    if top_k == 54 and top_p == 1 and temperature == 1 and not min_p:
        torch.testing.assert_close(distribution(torch.zeros(1, 4), options), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(bad):
    broken = logits()
    broken[3, 7] = bad
    for row in (broken, torch.full((2, 5), -math.inf)):
        for temperature in (0, 1):
            with pytest.raises(
                ValueError, match="scores are not finite numbers: its weights are damaged, or its train"
            ):
                pick(row, Settings(temperature=temperature), None, torch.zeros(len(row)))


def test_wrong_settings_are_named():
    wrong = {"max_tokens": -1, "temperature": -0.1, "top_k": -1, "top_p": 1.01, "min_p": -0.1, "repetition_penalty": 0,
             "stop": ("a", "")}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is {re.escape(str(value))}, expected "):
            Settings(**{name: value}).check()
    for name, value in (("temperature", 1e-9), ("repetition_penalty", 1e-3), ("repetition_penalty", 1e3)):
        with pytest.raises(ValueError, match=f"is {value}, expected"):
            Settings(**{name: value}).check()
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"is {value}, expected"):
                Settings(**{name: value}).check()


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = counts.sum() * p
    assert counts[p == 0].sum() == 0
    return float(((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum())


def test_draws_follow_the_distribution():
    p = torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.125, 0.1, 0.025, 0.0]])
    rng = random.Random(1)
    u = torch.tensor([rng.random() for _ in range(200_000)], dtype=torch.float64)
    counts = torch.bincount(draw(p.expand(len(u), -1), u), minlength=8)
    assert chi_square(counts, p[0]) < 23.5  # 4 degrees of freedom, p > 1e-4


def test_draw_by_hand():
    p = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0])
    for u, want in ((0.0, 1), (0.4999, 1), (0.5, 2), (0.7499, 2), (0.75, 4), (1 - 2**-53, 4), (1.0, 4)):
        assert draw(p[None], torch.tensor([u], dtype=torch.float64)).tolist() == [want]
    # Sums that are not 1, and probabilities so small that float32 could not tell these sums apart.
    many = torch.tensor([[0.5] + [2**-30] * 50_000])
    total = 0.5 + 50_000 * 2**-30
    u = torch.tensor([(0.5 + 20_017.5 * 2**-30) / total], dtype=torch.float64)
    assert draw(many, u).tolist() == [20_018]


def test_first_tokens_of_a_batch_are_independent():
    """A14: pairs of neighbouring rows, and rows of neighbouring seeds, fill the square evenly."""
    n, size = 4000, 4
    for of in (lambda i: Settings(seed=7), lambda i: Settings(seed=i)):
        writers = [Writer(BYTES, [0], of(i), i if of(0) == of(1) else 0) for i in range(n)]
        u = torch.tensor([w.random.random() for w in writers], dtype=torch.float64)
        tokens = draw(torch.full((n, size), 1 / size), u)
        pairs = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size**2)
        assert chi_square(pairs, torch.full((size**2,), 1 / size**2)) < 44.3  # 15 degrees of freedom, p > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Texts

BYTES = BPETokenizer([])  # 256 bytes and one special token, which ends a text and begins it


def build(position="rope", dtype=torch.float64, gpt2=False, **changes):
    """A small model that has strong opinions, so that texts differ with every token before."""
    shape = {"n_layer": 2, "n_head": 6, "n_embd": 36, "block_size": 40, "vocab_size": 261, "position": position}
    torch.manual_seed(1)
    model = (
        GPT2(GPT2Config(**shape | changes))
        if gpt2
        else TinyLlama(TinyLlamaConfig(**{"n_kv_head": 2} | shape | changes))
    )
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def prompts(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def write(model, prompts, options, numbers=None, **how):
    writers = [Writer(BYTES, list(ids), options, n) for n, ids in zip(numbers or range(len(prompts)), prompts)]
    for _ in generate(model, writers, **how):
        pass
    assert all(w.finish for w in writers)
    return writers


FREE = Settings(max_tokens=20)
GREEDY = Settings(max_tokens=20, temperature=0)
SETTINGS = [
    FREE,
    GREEDY,
    Settings(max_tokens=20, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.5),
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "none"])
@pytest.mark.parametrize("gpt2", [False, True])
def test_with_and_without_the_cache_the_text_is_the_same(gpt2, position, options):
    """And in a batch of prompts of many lengths each text is what it is alone."""
    model, starts = build(position, gpt2=gpt2), prompts(1, 13, 4, 30, 20, 4)
    together = write(model, starts, options)
    naive = write(model, starts, options, cached=False)
    assert [w.ids for w in together] == [w.ids for w in naive]
    assert len({tuple(w.ids) for w in together}) == 6
    for number, (writer, start) in enumerate(zip(together, starts)):
        (alone,) = write(model, [start], options, [number])
        assert (alone.ids, alone.text, alone.finish) == (writer.ids, writer.text, writer.finish)
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(writer.logprobs), atol=1e-10, rtol=0)


def test_in_float32_a_batch_changes_rounding_only():
    model, starts = build(dtype=torch.float32), prompts(1, 13, 4, 30, 20)
    for number, (writer, start) in enumerate(zip(write(model, starts, GREEDY), starts)):
        (alone,) = write(model, [start], GREEDY, [number])
        same = next((n for n, (a, b) in enumerate(zip(alone.ids, writer.ids)) if a != b), 20)
        gap = torch.tensor(alone.logprobs[:same]) - torch.tensor(writer.logprobs[:same])
        assert same > 5 and gap.abs().max() < 1e-5


def test_prompts_may_be_read_in_parts(monkeypatch):
    model, starts = build(), prompts(1, 13, 4, 30)
    want = [w.ids for w in write(model, starts, FREE)]
    real, seen = sample.read, []

    def read(model, cache, todo):
        seen.append(max(map(len, todo)))
        return real(model, cache, todo, most=12)  # three tokens of each text at a time

    monkeypatch.setattr(sample, "read", read)
    assert [w.ids for w in write(model, starts, FREE)] == want
    assert seen[:10] == [30, 27, 24, 21, 18, 15, 12, 9, 6, 3] and set(seen[10:]) == {1}


def test_a_prompt_may_end_inside_of_a_character():
    first, second = BYTES.encode("é")
    writer = Writer(BYTES, [*BYTES.encode("caf"), first], FREE)
    writer.add(second, 0.0), writer.add(BYTES.encode("s")[0], 0.0)
    assert writer.text == "és"


def test_log_probabilities_are_the_model_s_own():
    model, (start,) = build(), prompts(9)
    (writer,) = write(model, [start], SETTINGS[2])
    with torch.no_grad():
        scores = model(torch.tensor([start + writer.ids]))[0][0, :, : BYTES.vocab_size].log_softmax(-1)
    want = [scores[8 + n, token].item() for n, token in enumerate(writer.ids)]
    torch.testing.assert_close(torch.tensor(writer.logprobs), torch.tensor(want), atol=1e-10, rtol=0)


def test_the_penalty_counts_the_prompt_too():
    """A model that would only repeat its prompt's token, and one that would only repeat what it wrote."""
    table = torch.zeros(258, 258)
    table[5, 5], table[5, 6], table[6, 6], table[6, 7] = 9.0, 8.0, 9.0, 8.0
    for penalty, ids in ((1.0, [5, 5]), (1.5, [6, 7])):
        options = Settings(max_tokens=2, temperature=0, repetition_penalty=penalty)
        assert write(rigged(table), [[5]], options)[0].ids == ids


def test_seeds():
    model, starts = build(), prompts(3) * 3
    first = [w.ids for w in write(model, starts, FREE)]
    assert first == [w.ids for w in write(model, starts, FREE)]
    assert len({tuple(ids) for ids in first}) == 3  # each text has random numbers of its own
    assert first[2] == write(model, starts[:1], FREE, [2])[0].ids
    assert first != [w.ids for w in write(model, starts, dataclasses.replace(FREE, seed=1))]


def test_texts_with_different_settings_in_one_batch():
    model, starts = build(), prompts(5, 5, 2, 9)
    options = [FREE, GREEDY, SETTINGS[2], dataclasses.replace(FREE, max_tokens=3, seed=4)]
    writers = [Writer(BYTES, ids, how, 0) for ids, how in zip(starts, options)]
    for _ in generate(model, writers):
        pass
    for writer, ids, how in zip(writers, starts, options):
        assert writer.ids == write(model, [ids], how)[0].ids


def rigged(table: torch.Tensor, **changes):
    """A model whose next token depends on the last one alone, through a table of logits (V, V)."""
    V = len(table)
    model = build(n_layer=1, n_head=1, n_kv_head=1, n_embd=V, vocab_size=V, **changes)
    for p in model.blocks.parameters():
        torch.nn.init.zeros_(p)
    model.embed.weight.data = math.sqrt(V) * torch.eye(V, dtype=torch.float64) / math.sqrt(V)
    model.norm.weight.data = torch.full((V,), 1 / math.sqrt(V), dtype=torch.float64)
    model.norm.eps = 0.0
    model.head.weight.data = table.T.double().contiguous()
    return model


def chain(text: bytes):
    """A model that writes this text after its first byte, whatever is drawn; each byte must occur once."""
    table = torch.full((258, 258), -1e9)
    for a, b in zip(text, text[1:]):
        table[BYTES.encode(chr(a))[0], BYTES.encode(chr(b))[0]] = 0.0
    return rigged(table, block_size=64)


def test_eos_ends_a_text_and_rows_leave_the_batch():
    eos, table = BYTES.eos_id, torch.full((258, 258), -1e9)
    table[range(256), range(1, 257)] = 0.0
    table[4, 5], table[4, eos] = -1e9, 0.0
    model = rigged(table)
    writers = [Writer(BYTES, [n], FREE) for n in (3, 0, 100, 2)]
    steps = [len(live) for live in generate(model, writers)]
    assert [w.ids for w in writers] == [[4], [1, 2, 3, 4], list(range(101, 121)), [3, 4]]
    assert [w.finish for w in writers] == ["stop", "stop", "length", "stop"]
    assert steps == [4, 4, 3, 2, 2] + [1] * 15
    assert [len(w.ids) for w in write(model, [[0]], Settings(max_tokens=0))] == [0]


def test_padding_of_the_vocabulary_is_never_drawn():
    table = torch.zeros(300, 300)
    table[:, 258:] = 50.0
    (writer,) = write(rigged(table, block_size=300), [[0]], Settings(max_tokens=250))
    assert max(writer.ids) < BYTES.vocab_size


def test_the_context_and_the_window():
    model = build()
    with pytest.raises(ValueError, match="a prompt of 41 tokens: 1 to 40 fit into the model's context"):
        write(model, prompts(41), FREE)
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        write(model, [[]], FREE)
    (full,) = write(model, prompts(40), FREE)
    assert (len(full.ids), full.finish) == (1, "context")
    (one,) = write(model, prompts(39), Settings(max_tokens=2))
    assert (len(one.ids), one.finish) == (2, "length")  # the last token need not be read
    long = Settings(max_tokens=100)
    writers = write(model, prompts(5, 40, 30), long, slide=True)
    assert all(len(w.prompt) + len(w.ids) > 60 for w in writers) and "context" not in [w.finish for w in writers]
    assert [w.ids[:1] for w in writers] == [w.ids[:1] for w in write(model, prompts(5, 40, 30), long)]
    for number, start in enumerate(prompts(5, 40, 30)):
        assert writers[number].ids == write(model, [start], long, [number], slide=True)[0].ids
    with pytest.raises(ValueError, match="a window slides over what a cache keeps: give up one"):
        write(model, prompts(5), long, slide=True, cached=False)
    with pytest.raises(ValueError, match="learned positions has none after a window has slid"):
        write(build("learned"), prompts(5), long, slide=True)
    dynamic = build(rope_scaling=Scaling("dynamic", 1.0, original=20))
    with pytest.raises(ValueError, match="dynamic scaling changes .* go on without a cache"):
        write(dynamic, prompts(15), FREE)
    assert len(write(dynamic, prompts(15), FREE, cached=False)[0].ids) == 20
    assert len(write(dynamic, prompts(5), Settings(max_tokens=15))[0].ids) == 15


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of text


@pytest.mark.parametrize("stop", ["ghi", "g", "fghijkl", "kl", "zz"])
def test_a_stop_string_is_never_leaked(stop):
    """Token by token, so it comes in parts; what is given out is never a beginning of it that then completes."""
    text = b"abcdefghijklmnop"
    writer = Writer(BYTES, BYTES.encode("a"), Settings(max_tokens=15, stop=("mn", stop, "q")))
    given = ""
    for _ in generate(chain(text), [writer]):
        given += writer.take()
        assert not any(given.endswith(stop[:n]) for n in range(1, len(stop) + 1)) or writer.finish
    want = "bcdefghijkl"
    want = want[: want.find(stop)] if stop in want else want
    assert given == writer.text == want and writer.finish == "stop"


def test_a_beginning_of_a_stop_string_that_does_not_complete_is_given_out():
    writer = Writer(BYTES, [0], Settings(max_tokens=6, stop=("aab",)))
    pieces = []
    for token in BYTES.encode("aaaxaa"):
        writer.add(token, 0.0)
        pieces.append(writer.take())
    assert pieces == ["", "", "a", "aax", "", "aa"] and writer.finish == "length"


def test_of_two_stop_strings_the_earlier_one_counts():
    pieces, writer = pieces_of(BYTES, BYTES.encode("xabcd"), ("c", "abc"))
    assert pieces == ["x", "", "", ""] and writer.text == "x"


@cache
def tokenizers():
    words = ["naïve café — 日本語 🎈🎉 ok\n", "½ of ▁ x\u00a0y ", *(tales.write(n) for n in range(80))]
    sizes = {"bpe": 400, "char": 0, "sp-bpe": 500, "sp-unigram": 450, "sp-char": 500}
    made = [train_tokenizer(kind, words, size) for kind, size in sizes.items()]
    # As LLaMA's: a space is put in front of a text, and taken away again from what is decoded.
    model, options = io.BytesIO(), {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = "".join(words).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=450, byte_fallback=True, minloglevel=2, **options
    )
    llama = SentencePieceTokenizer(model.getvalue())
    assert (
        llama.decode(llama.encode("the cat")[:1])
        != " the"
        == llama.processor.id_to_piece(llama.encode("the cat")[0]).replace("▁", " ")
    )
    return [*made, llama, BYTES]


def pieces_of(tokenizer, ids, stop=(), prompt=None):
    writer = Writer(tokenizer, prompt or [tokenizer.bos_id], Settings(max_tokens=len(ids), stop=stop))
    pieces = []
    for token in ids:
        if not writer.finish:
            writer.add(token, 0.0)
            pieces.append(writer.take())
    if not writer.finish:
        writer.end("length")
        pieces.append(writer.take())
    return pieces, writer


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_are_whole_characters_and_add_up(data):
    """A17: any ids at all, and the ids of any text; what follows a prompt is what decoding all of it adds."""
    tokenizer = data.draw(st.sampled_from(tokenizers()))
    usable = [i for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id]
    any_ids = st.lists(st.sampled_from(usable), max_size=30)
    texts = st.text(st.sampled_from("abc é日🎈👩‍👩‍👧 ½▁\n\u00a0the cat"), max_size=12)
    good = texts.map(lambda text: encode(tokenizer, text))
    ids = data.draw(any_ids | good)
    prompt = [tokenizer.bos_id, *data.draw(good)]
    pieces, writer = pieces_of(tokenizer, ids, prompt=prompt)
    if ids:
        assert "".join(pieces) == writer.text == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    for piece in pieces:
        piece.encode("utf-8")  # raises for half a surrogate pair
    if "\ufffd" not in writer.text:
        assert all("\ufffd" not in piece for piece in pieces)
    whole = writer.text
    stop = data.draw(st.sampled_from(["a", "é", "日🎈", "he", " c", "\ufffd"]))
    given, writer = pieces_of(tokenizer, ids, (stop,), prompt)
    assert "".join(given) == whole.partition(stop)[0]
    assert writer.finish == "stop" if stop in whole else writer.finish in ("length", "")


def encode(tokenizer, text):
    try:
        return tokenizer.encode(text)
    except ValueError:  # characters that this alphabet lacks
        return tokenizer.encode("the cat")


def test_half_a_character_waits_for_the_other_half():
    ids = BYTES.encode("né🎈")
    pieces, _ = pieces_of(BYTES, ids)
    assert [p for p in pieces if p] == ["n", "é", "🎈"] and pieces[:3] == ["n", "", "é"]
    assert "".join(pieces_of(BYTES, ids[:-1])[0]) == "né\ufffd"  # and at the end nothing is swallowed
    assert [type(t).__name__[:2] for t in tokenizers()] == ["BP", "Ch", "Se", "Se", "Se", "Se", "BP"]


def test_a_space_behind_a_token_without_text_stays():
    llama = tokenizers()[5]
    the, *_ = llama.encode("the")
    assert pieces_of(llama, [llama.bos_id, the, the], prompt=[llama.bos_id, the])[0] == ["", " the", " the"]
    assert pieces_of(llama, [llama.bos_id, the, the], prompt=[llama.bos_id])[0] == ["", "the", " the"]


def test_streamed_text_is_the_text():
    model = build()
    for seed in range(5):
        options = dataclasses.replace(FREE, seed=seed)
        pieces = list(sample.stream(model, BYTES, "né", options))
        assert "né" + "".join(pieces) == sample.generate_text(model, BYTES, "né", 1, options)[0]
        assert len(pieces) > 2
    half, _ = BYTES.encode("é")
    table = torch.full((258, 258), -1e9)
    table[BYTES.bos_id, half] = 0.0
    cut = rigged(table, block_size=1)  # a full context ends the text in the middle of a character
    assert "".join(sample.stream(cut, BYTES, "", FREE)) == sample.generate_text(cut, BYTES, "", 1, FREE)[0] == "\ufffd"


# ----------------------------------------------------------------------------------------------------------------------
# A model that is made fast


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_a_prepared_model_computes_the_same(kind, dtype, tolerance):
    model = build(dtype=dtype, **({"gpt2": True} if kind == "gpt2" else {"tied": kind == "llama, tied"}))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    idx = torch.tensor(prompts(20, 20))
    with torch.no_grad():
        want = model(idx)[0]
        count = sum(p.numel() for p in model.parameters())
        fast = sample.prepare(model, dtype)
        got = fast(idx)[0]
        alone = fast(idx[:1, :1])[0]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(alone[0, 0], want[0, 0], atol=tolerance, rtol=tolerance)
    packed = [m for m in fast.modules() if isinstance(m, device.PackedLinear)]
    if device.can_pack(torch.zeros(1, dtype=dtype)):
        assert len(packed) == (13 if kind == "gpt2" else 15) and sum(p.numel() for p in fast.parameters()) < count
    else:
        assert packed == []


def test_what_is_not_a_plain_linear_layer_is_not_packed():
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Special(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, dtype=torch.float64))
    device.pack_linears(model)
    assert type(model[0]) is Special and type(model[2]) is torch.nn.Linear
    assert (type(model[1]) is device.PackedLinear) == device.can_pack(torch.zeros(1))
    assert not device.can_pack(torch.zeros(1, device="meta"))


# ----------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory, and the same model as one of Hugging Face."""
    model = build(dtype=torch.float32, vocab_size=258)
    folder = tmp_path_factory.mktemp("runs")
    saved = huggingface.Saved("tinyllama", dataclasses.asdict(model.config), model.state_dict(), BYTES, 3)
    checkpoint.write_run(saved, folder / "run")
    huggingface.write(saved, folder / "hf")
    return folder


def program(capsys, *args):
    sample.main([*map(str, args), "--device", "cpu"])
    return capsys.readouterr()


def test_the_program(run, capsys):
    options = ["--prompt", "né", "--max-tokens", "20", "--seed", "3"]
    out, err = program(capsys, run / "run", "--n", "3", *options)
    settings = Settings(max_tokens=20, seed=3)
    model, tokenizer, _ = checkpoint.load_run(run / "run")
    assert out == "\n\n".join(sample.generate_text(model, tokenizer, "né", 3, settings)) + "\n"
    assert re.fullmatch(r"\n\d\d tokens, the first after \d+\.\d\d s, then [\d,]+ tokens/s\n", err)
    assert out == program(capsys, run / "hf", "--n", "3", *options).out
    assert out == program(capsys, run / "run", "--n", "3", "--no-cache", *options).out
    first = program(capsys, run / "run", "--n", "1", *options).out
    assert out.startswith(first)
    assert program(capsys, run / "run", "--n", "1", "--dtype", "bfloat16", *options).out.startswith("né")
    stopped = program(capsys, run / "run", "--n", "1", *options, "--stop", first[5], "--stop", "zzz").out
    assert stopped == first[: first.index(first[5], 2)] + "\n"


def test_the_program_at_the_end_of_the_context(run, capsys):
    def written(*options):
        err = program(capsys, run / "run", "--n", "2", "--max-tokens", "60", "--seed", "1", *options).err
        return int(err.split()[0]), "2 of 2 texts ended where the context of 40 tokens was full\n" in err

    assert written() == (80, True)
    assert written("--slide") == (120, False)
    assert written("--rope-scaling", "yarn:2") == (120, False)


def test_the_program_s_mistakes(run, tmp_path):
    def refused(*args, match):
        with pytest.raises(ValueError, match=match):
            sample.main([*map(str, args), "--device", "cpu"])

    refused(tmp_path / "none", match="there is no run at")
    refused(run / "run", "--temperature", "-1", match="--temperature is -1.0, expected 0, or 1e-6 or more")
    refused(run / "run", "--n", "100000000", match="--n is 100000000, expected 1 to 10000")
    refused(run / "run", "--n", "0", match="--n is 0, expected 1 to 10000")
    refused(run / "run", "--stop", "", match="--stop is .*, expected strings that are not empty")
    refused(run / "run", "--stop", "\udc80", match="is not valid UTF-8 text")
    refused(run / "run", "--prompt", "x" * 50, match="a prompt of 51 tokens: 1 to 40 fit into the model's context")
    refused(run / "run", "--rope-scaling", "yarm:2", match="yarm.*did you mean yarn")
    refused(run / "run", "--rope-scaling", "dynamic:2", "--max-tokens", "60", match="go on without a cache")
    model = build("alibi", dtype=torch.float32, vocab_size=258)
    saved = huggingface.Saved("tinyllama", dataclasses.asdict(model.config), model.state_dict(), BYTES, 3)
    checkpoint.write_run(saved, tmp_path / "alibi")
    refused(tmp_path / "alibi", "--rope-scaling", "yarn:2", match="yarn scaling stretches rope, and position = 'alibi'")
    scaled = build(dtype=torch.float32, vocab_size=258, rope_scaling=Scaling("linear", 2.0))
    saved = huggingface.Saved("tinyllama", dataclasses.asdict(scaled.config), scaled.state_dict(), BYTES, 3)
    checkpoint.write_run(saved, tmp_path / "scaled")
    refused(
        tmp_path / "scaled",
        "--rope-scaling",
        "yarn:2",
        match=r"the model has linear:\S+ scaling already: yarn:2 cannot be added",
    )


def test_a_damaged_model_is_one_sentence(run, tmp_path):
    model = build(dtype=torch.float32, vocab_size=258)
    model.norm.weight.data[3] = math.nan
    saved = huggingface.Saved("tinyllama", dataclasses.asdict(model.config), model.state_dict(), BYTES, 3)
    checkpoint.write_run(saved, tmp_path / "nan")
    with pytest.raises(ValueError, match="scores are not finite numbers"):
        sample.main([str(tmp_path / "nan"), "--device", "cpu"])


def test_the_cache_is_no_larger_than_the_texts(monkeypatch):
    made = []
    monkeypatch.setattr(sample, "KVCache", lambda *args: made.append(KVCache(*args)) or made[-1])
    write(build(), prompts(5, 2), Settings(max_tokens=7))
    assert made[0].keys.shape == (2, 2, 2, 12, 6)
