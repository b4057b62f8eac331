"""A cached model gives what the whole text gives, however the text is cut, for every position scheme and both models."""

import dataclasses
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanogptx import huggingface
from nanogptx.gpt2 import GPT2, GPT2Config
from nanogptx.kv_cache import KVCache
from nanogptx.memory import kv_cache_bytes
from nanogptx.rope import Scaling
from nanogptx.tinyllama import TinyLlama, TinyLlamaConfig

# Heads that are not a power of two, groups of them, and a head width with pairs that turn at three rates.
SHAPE = {"n_layer": 3, "n_head": 6, "n_embd": 36, "block_size": 24, "vocab_size": 31}
SCALINGS = {
    "none": Scaling(),
    "linear": Scaling("linear", 4.0),
    "ntk": Scaling("ntk", 4.0),
    "dynamic": Scaling("dynamic", 1.0, original=24),
    "yarn": Scaling("yarn", 4.0, original=6, beta_fast=2.0),
    "llama3": Scaling("llama3", 4.0, original=6),
}
POSITIONS = ["learned", "alibi", "none", *(f"rope, {kind}" for kind in SCALINGS)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(architecture="tinyllama", position="rope, none", dtype=torch.float64, n_kv_head=2, **changes):
    """A small model with weights large enough that attention is far from flat."""
    position, _, kind = position.partition(", ")
    shape = SHAPE | {"position": position, "rope_scaling": SCALINGS[kind or "none"]} | changes
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2(GPT2Config(**shape))
    else:
        model = TinyLlama(TinyLlamaConfig(**shape, n_kv_head=n_kv_head, n_hidden=50))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype).eval()


def texts(rows, length, seed=0, size=31):
    return torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(seed))


def cut(n, rng):
    """A way to split n tokens into chunks of at least one."""
    chunks = []
    while n:
        chunks.append(rng.choice([1, 1, rng.randint(1, n)]))
        n -= chunks[-1]
    return chunks


@torch.no_grad()
def in_chunks(model, cache, idx, chunks):
    """Logits (B, T, V) of texts that are given to the cache chunk by chunk."""
    return torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1)


@torch.no_grad()
def ragged(model, cache, rows, rng):
    """Logits of texts of unlike lengths, each cut in its own way; every chunk is padded to its longest part."""
    cuts = [cut(len(row), rng) for row in rows]
    out, done = [[] for _ in rows], [0] * len(rows)
    while any(cuts):
        counts = [parts.pop(0) if parts and rng.random() < 0.8 else 0 for parts in cuts]
        if not any(counts):
            continue
        idx = torch.randint(31, (len(rows), max(counts)))  # padding is noise
        for n, count in enumerate(counts):
            idx[n, :count] = rows[n][done[n] : done[n] + count]
        cache.expect(counts)
        logits, _ = model(idx, cache=cache)
        for n, count in enumerate(counts):
            out[n].append(logits[n, :count])
            done[n] += count
    return [torch.cat(parts) for parts in out]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("architecture", ["gpt2", "tinyllama"])
def test_cached_logits_are_those_of_the_whole_text(architecture, position, dtype):
    model, rng = build(architecture, position, dtype), random.Random(position)
    cache = KVCache(model.config, rows=3, dtype=dtype)
    idx = texts(3, 24)
    with torch.no_grad():
        want = model(idx)[0]
    assert (want[:, 1:] - want[:, :-1]).abs().max() > 1  # there is something to get wrong
    for chunks in [[24], [1] * 24, [23, 1], [1, 23], *(cut(24, rng) for _ in range(4))]:
        got = in_chunks(model, cache, idx, chunks)
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=0)
        cache.reset()  # and the next one uses it again
    rows = [row[: rng.randint(1, 24)] for row in texts(3, 24, seed=1)]
    for got, row in zip(ragged(model, cache, rows, rng), rows):
        with torch.no_grad():
            want = model(row[None])[0][0]
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("seed", range(40))
def test_any_batch_any_cut_any_grouping(seed):
    """Random lengths, chunks, batch sizes, head groups, schemes; rows are reset and used again while others go on."""
    rng = random.Random(seed)
    architecture, position = rng.choice(["gpt2", "tinyllama"]), rng.choice(POSITIONS)
    model = build(architecture, position, n_kv_head=rng.choice([1, 2, 3, 6]))
    B = rng.randint(1, 5)
    cache = KVCache(model.config, rows=B + rng.randint(0, 2), dtype=torch.float64)
    for again in range(2):
        rows = [row[: rng.randint(1, 24)] for row in texts(B, 24, seed=2 * seed + again)]
        got = ragged(model, cache, rows, rng)
        assert cache.lengths[:B].tolist() == [len(row) for row in rows]
        for ours, row in zip(got, rows):
            with torch.no_grad():
                torch.testing.assert_close(ours, model(row[None])[0][0], atol=1e-10, rtol=0)
        for n in rng.sample(range(B), B):
            cache.reset(n)


@pytest.mark.parametrize("position", ["learned", "alibi", "rope, yarn"])
def test_a_moved_row_goes_on_where_it_was(position):
    model, idx = build(position=position), texts(3, 12)
    cache = KVCache(model.config, rows=3, dtype=torch.float64)
    rows = [idx[0, :5], idx[1, :9], idx[2, :7]]
    ragged(model, cache, rows, random.Random(0))
    cache.move(2, 0)
    cache.expect([1, 1])
    with torch.no_grad():
        got = model(torch.tensor([[4], [5]]), cache=cache)[0][:, 0]
        for ours, row, token in ((got[0], rows[2], 4), (got[1], rows[1], 5)):
            want = model(torch.cat((row, torch.tensor([token])))[None])[0][0, -1]
            torch.testing.assert_close(ours, want, atol=1e-10, rtol=0)
    assert cache.lengths.tolist() == [8, 10, 7]


def windowed(model, idx, window):
    """The naive sliding window: the whole text at once, each token seeing itself and the window - 1 before it."""
    T = idx.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    handles = []
    for block in model.blocks:

        def hook(module, args):
            x, rotate, bias, *_ = args
            bias = torch.zeros(T, T, dtype=x.dtype) if bias is None else bias
            return x, rotate, bias.masked_fill((distance < 0) | (distance >= window), -torch.inf), False

        handles.append(block.attention.register_forward_pre_hook(hook))
    with torch.no_grad():
        out = model(idx)[0]
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("position", ["alibi", "none", "rope, none", "rope, ntk", "rope, linear", "rope, yarn"])
@pytest.mark.parametrize("architecture", ["gpt2", "tinyllama"])
def test_a_sliding_window_sees_the_last_tokens_only(architecture, position):
    model, idx, window = build(architecture, position), texts(2, 60), 10
    cache = KVCache(model.config, rows=2, length=window, dtype=torch.float64, slide=True)
    want = windowed(model, idx, window)
    with torch.no_grad():
        assert (want - model(idx)[0]).abs().max() > 0.1  # the window hides something
    got = in_chunks(model, cache, idx, [7, 3] + [1] * 50)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    assert cache.lengths.tolist() == [60, 60] and cache.keys.size(3) == window
    # Rows of unlike lengths: one has slid, the others have not, or are about to.
    cache.reset()
    in_chunks(model, cache, idx[:1, :30], [10] + [1] * 20)
    logits = []
    for step in range(15):
        cache.expect([1, 4 if step < 2 else 1])
        part = torch.zeros(2, 4 if step < 2 else 1, dtype=torch.long)
        part[0, 0] = idx[0, 30 + step]
        first = 4 * step if step < 2 else 6 + step
        part[1] = idx[1, first : first + part.size(1)]
        with torch.no_grad():
            out = model(part, cache=cache)[0]
        logits.append(out[0, 0])
        torch.testing.assert_close(out[1], want[1, first : first + part.size(1)], atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.stack(logits), want[0, 30:45], atol=1e-10, rtol=0)


def test_past_the_context():
    def fill(position, n=24, **options):
        model = build(position=position)
        cache = KVCache(model.config, rows=2, dtype=torch.float64, **options)
        in_chunks(model, cache, texts(2, n), [n])
        return model, cache

    for position in ("learned", "rope, none", "alibi"):
        model, cache = fill(position)
        kept = cache.keys.clone()
        with pytest.raises(ValueError, match="row 0 holds 24 tokens and 24 fit, so 1 more do not: stop there"):
            model(texts(2, 1), cache=cache)
        assert torch.equal(kept, cache.keys) and cache.lengths.tolist() == [24, 24]  # nothing is lost
    with pytest.raises(ValueError, match="learned positions has none beyond block_size = 24: .* train one with rope"):
        fill("learned", length=25)
    with pytest.raises(ValueError, match="learned positions has none after a window has slid"):
        fill("learned", slide=True)
    fill("alibi", 60, length=60), fill("rope, none", 60, length=60)  # longer than they were made for
    with pytest.raises(
        ValueError, match=r"keys and values of 1000000000 texts of 24 tokens take .* GiB, and .* are free"
    ):
        KVCache(build().config, rows=10**9)
    model, cache = fill("alibi", slide=True)
    with pytest.raises(ValueError, match="once a window slides it takes one token at a time"):
        model(texts(2, 2), cache=cache)
    with pytest.raises(ValueError, match="dynamic scaling changes .* beyond 24, so nothing can be kept"):
        fill("rope, dynamic", length=25)
    with pytest.raises(ValueError, match="dynamic scaling changes"):
        fill("rope, dynamic", slide=True)


def test_why_dynamic_scaling_has_no_cache():
    """Beyond the training length the logits of a text's *first* tokens change with every token that is added."""
    model, idx = build(position="rope, dynamic", block_size=48), texts(1, 40)
    with torch.no_grad():
        within = [model(idx[:, :n])[0][0, :20] for n in (20, 24)]
        beyond = [model(idx[:, :n])[0][0, :20] for n in (24, 30)]
    torch.testing.assert_close(*within, atol=1e-10, rtol=0)
    assert (beyond[0] - beyond[1]).abs().max() > 1e-3


def test_a_refused_chunk_leaves_no_trace():
    model, idx = build(), texts(2, 9)
    cache = KVCache(model.config, rows=2, dtype=torch.float64)
    cache.expect([3, 99])
    with pytest.raises(ValueError, match="row 1 holds 0 tokens and 24 fit, so 99 more do not"):
        model(texts(2, 99), cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, cache=cache)[0], model(idx)[0], atol=1e-10, rtol=0)


def test_a_broken_text_does_not_reach_the_next_one():
    """Hidden keys count 0 times, but 0 times infinity is not 0."""
    model, idx = build(), texts(2, 20)
    cache = KVCache(model.config, rows=2, dtype=torch.float64)
    in_chunks(model, cache, idx, [20])
    cache.keys[:, 1, :, 5:], cache.values[:, 1, :, 5:] = torch.nan, torch.inf
    cache.reset(1)
    cache.expect([1, 3])
    with torch.no_grad():
        got = model(idx[:, :3], cache=cache)[0]
        torch.testing.assert_close(got[1], model(idx[1:, :3])[0][0], atol=1e-10, rtol=0)
    assert got.isfinite().all()


@pytest.mark.parametrize("position", ["learned", "alibi", "rope, none"])
@torch.no_grad()
def test_more_room_and_less_keep_what_is_there(position):
    """Texts go on as if nothing had happened when rows or tokens are added, or taken away where nothing is."""
    model, idx = build(position=position), texts(2, 20)
    want = model(idx)[0]
    cache, done = KVCache(model.config, 2, 6, torch.float64), 0
    for rows, length, chunk in ((2, 6, 5), (4, 13, 1), (3, 24, 7), (2, 13, 0), (9, 20, 7)):
        cache.resize(rows, length)
        assert (len(cache.lengths), cache.length) == (rows, length) and cache.keys.shape[1::2] == (rows, length)
        assert cache.lengths.tolist() == [done] * 2 + [0] * (rows - 2)
        if chunk:
            got = in_chunks(model, cache, idx[:, done : done + chunk], [chunk])
            torch.testing.assert_close(got, want[:, done : done + chunk], atol=1e-10, rtol=0)
        done += chunk
    assert cache.nbytes == kv_cache_bytes(model.config, 9, 20, 8)


def test_without_memory_for_more_room_nothing_changes(monkeypatch):
    cache, calls, pad = KVCache(build().config, 2, 6), [], torch.nn.functional.pad
    monkeypatch.setattr("nanogptx.kv_cache.F.pad", lambda *args: (calls.append(1), 1 / (len(calls) < 2), pad(*args))[2])
    with pytest.raises(ZeroDivisionError):
        cache.resize(4, 12)
    assert cache.keys.shape == cache.values.shape and (len(cache.lengths), cache.length, cache.keys.size(1)) == (
        2,
        6,
        2,
    )


@torch.no_grad()
def test_a_part_is_the_same_memory():
    """Rows 1 and 2 of four read on by themselves; then all four go on together."""
    model, idx = build(), texts(4, 12)
    cache, want = KVCache(model.config, 4, dtype=torch.float64), model(idx)[0]
    in_chunks(model, cache, idx[:, :5], [5])
    part = cache.part(slice(1, 3))
    torch.testing.assert_close(in_chunks(model, part, idx[1:3, 5:8], [3]), want[1:3, 5:8], atol=1e-10, rtol=0)
    assert cache.lengths.tolist() == [5, 8, 8, 5]
    cache.expect([3, 0, 0, 3])  # a row may sit out
    logits, _ = model(idx[:, 5:8], cache=cache)
    torch.testing.assert_close(logits[::3], want[::3, 5:8], atol=1e-10, rtol=0)
    torch.testing.assert_close(in_chunks(model, cache, idx[:, 8:], [4]), want[:, 8:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_its_bytes_are_those_predicted(n_kv_head, dtype):
    config = build(n_kv_head=n_kv_head).config
    cache = KVCache(config, rows=5, length=17, dtype=dtype)
    numbers = 2 * 3 * n_kv_head * 6 * 17 * 5
    assert cache.nbytes == kv_cache_bytes(config, 5, 17, dtype.itemsize) == numbers * dtype.itemsize
    # It is all there is: no tensor is made anew as texts grow.
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    in_chunks(build(n_kv_head=n_kv_head, dtype=dtype), cache, texts(5, 17), [9] + [1] * 8)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == before


def test_keys_are_those_of_transformers():
    """Rotated, in the same order of heads, one layer after the other."""
    model = build(dtype=torch.float32, tied=True)
    architecture, shape = "tinyllama", dataclasses.asdict(model.config)
    theirs = LlamaForCausalLM(LlamaConfig(**huggingface.options_of(architecture, shape))).eval()
    theirs.load_state_dict(huggingface.to_hf(architecture, model.state_dict()), strict=False)
    theirs.tie_weights()
    idx, cache = texts(2, 15), KVCache(model.config, rows=2)
    with torch.no_grad():
        in_chunks(model, cache, idx, [11, 1, 3])
        kept = theirs(idx, use_cache=True).past_key_values
    for layer, theirs in enumerate(kept.layers):
        torch.testing.assert_close(cache.keys[layer, :, :, :15], theirs.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.values[layer, :, :, :15], theirs.values, atol=1e-5, rtol=0)
    assert cache.keys[:, :, :, 15:].eq(0).all()


def test_gradients_do_not_reach_into_the_cache():
    model, idx = build(), texts(1, 6)
    cache = KVCache(model.config, rows=1, dtype=torch.float64)
    model(idx[:, :4], cache=cache)
    logits, _ = model(idx[:, 4:], cache=cache)
    assert logits.requires_grad and not cache.keys.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_in_bfloat16_with_a_cache_of_either_width(dtype):
    model, idx = build(dtype=torch.bfloat16), texts(2, 20)
    cache = KVCache(model.config, rows=2, dtype=dtype)
    with torch.no_grad():
        want = model(idx)[0]
    got = in_chunks(model, cache, idx, [9, 1, 1, 4, 1, 4])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=3e-2 * want.abs().max().item(), rtol=0)
    cache.reset()
    for one, row in zip(ragged(model, cache, [idx[0], idx[1, :7]], random.Random(0)), (want[0], want[1, :7])):
        torch.testing.assert_close(one, row, atol=3e-2 * want.abs().max().item(), rtol=0)


def test_recompute_leaves_the_cache_alone():
    """Also with gradients enabled, where a block that ran again would write its keys a second time."""
    model, idx = build(), texts(2, 9)
    model.recompute = True
    cache = KVCache(model.config, 2, dtype=torch.float64)
    model(idx[:, :5], cache=cache)
    torch.testing.assert_close(model(idx[:, 5:], cache=cache)[0], model(idx)[0][:, 5:], atol=1e-10, rtol=0)
