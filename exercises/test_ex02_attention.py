"""Grades exercises/ex02_attention.py."""

import numpy as np

from exercises.grading import Raised, Wrong, describe, exercise, expect, hunt, same, says


def told_apart(want, mistakes):
    """Those of the mistakes that do not happen to give the right value for this input."""
    return {sentence: value for sentence, value in mistakes.items() if not same(value, want)}


def holds(test, got, want):
    """Whether an array, or one in a tuple, holds what it should not: test is np.isnan, say."""
    if isinstance(want, tuple):
        return type(got) is tuple and any(holds(test, a, b) for a, b in zip(got, want))
    right_kind = isinstance(got, np.ndarray) and got.dtype.kind == "f" and got.shape == want.shape
    return right_kind and bool((test(got) & ~test(want.astype(float))).any())


def infinite(x):
    return ~np.isfinite(x)


def keeps_float32(got):
    """The usual reason why float32 in is not float32 out."""
    wide = [x for x in (got if type(got) is tuple else [got]) if isinstance(x, np.ndarray) and x.dtype == np.float64]
    sentence = "float32 in, float64 out: arrays of zeros or ones and numbers like np.sqrt(5) are float64 and widen"
    says(not wide, f"{sentence} what they touch; Python's own numbers do not")


# ---- The logarithm of softmax


def log_weights(x, axis):
    moved = np.moveaxis(x, axis, -1)
    lines = [line - line.max() - np.log(sum(np.exp(line - line.max()))) for line in moved.reshape(-1, moved.shape[-1])]
    return np.moveaxis(np.array(lines, x.dtype).reshape(moved.shape), -1, axis)


@exercise(
    points=1,
    hints=(
        "Write down the logarithm of exp(x) / sum of exp(x). Which of its two logarithms goes away?",
        "log(a / b) = log a - log b, so it is x - log(sum of exp(x)). And a constant taken off all scores of a line"
        " changes nothing.",
        "x = x - x.max(axis=axis, keepdims=True); then x minus the log of np.exp(x).sum(axis=axis, keepdims=True).",
    ),
)
def test_log_softmax(answer):
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 4))
    for axis in (1, 0, 2, -2):
        want = log_weights(x, axis)
        shifted = x - x.max(axis, keepdims=True)
        mistakes = {
            "these are the weights, not their logarithms": np.exp(want),
            "the weights have the sum 1 over the whole array, not along `axis`": x - np.log(np.exp(x).sum()),
            "only the largest score was taken off: the logarithm of the sum must go, too": shifted,
            "it divides by the logarithm of the sum, but the logarithm of a quotient is a difference": shifted
            / np.log(np.exp(shifted).sum(axis, keepdims=True)),
            "the largest score was taken off in the sum only, so that the two do not belong together": x
            - np.log(np.exp(shifted).sum(axis, keepdims=True)),
            "these are logarithms to base 2: np.log is the natural one": want / np.log(2),
            "these are logarithms to base 10: np.log is the natural one": want / np.log(10),
        }
        mistakes |= {
            f"it ignores `axis` and goes along axis {other}": log_weights(x, other)
            for other in range(3)
            if other != axis % 3
        }
        mistakes |= {
            f"{eps} is added before the logarithm: that changes all weights, and the small ones most": np.log(
                np.exp(want) + eps
            )
            for eps in (1e-6, 1e-7, 1e-8, 1e-9)
        }
        expect(answer(x, axis=axis), want, what="the result", mistakes=mistakes)

    far = np.array([[0.0, -1000.0, -2000.0], [3.0, -1000.0, 3.0]])
    got = answer(far, axis=1)
    want = log_weights(far, 1)
    lost = "a weight that was rounded to 0 has lost its logarithm: exp(-1000) is 0, but its log is -1000"
    says(not holds(np.isneginf, got, want), lost)
    expect(got, want, what="the result beside scores 1000 below the largest")

    levels = np.array([[5000.0, 4999.0, 4990.0], [-5000.0, -5001.0, -5002.0]])
    got, want = answer(levels, axis=1), log_weights(levels, 1)
    overflow = "scores of 5000 make exp overflow: take the largest score off before"
    says(not holds(infinite, got[:1] if isinstance(got, np.ndarray) else got, want[:1]), overflow)
    vanish = "in a line of scores near -5000 every exp is 0: take off the largest of each line, not of the whole array"
    says(not holds(infinite, got, want), vanish)
    expect(got, want, what="the result for scores near 5000 and near -5000")
    masked = np.array([[1.0, -np.inf], [2.0, 3.0], [-np.inf, 3.0]])
    expect(answer(masked, axis=0), log_weights(masked, 0), what="the result beside scores of -inf")
    line = np.array([2.0, 0.5])
    expect(answer(line, axis=0), log_weights(line, 0), what="the result for a single line")
    small = x.astype(np.float32)
    got, want = answer(small, axis=1), log_weights(small, 1)
    keeps_float32(got)
    expect(got, want, what="the result for float32")


# ---- A mask with a window


def table(T, S, rule):
    """(T, S) booleans: rule(the position of query t among the S tokens, s)."""
    return np.array([[bool(rule(S - T + t, s)) for s in range(S)] for t in range(T)])


def wrong_masks(T, S, window):
    """{mistake: the mask that it gives}"""
    right = table(T, S, lambda t, s: 0 <= t - s < window)
    return {
        "these are the hidden tokens: True must stand where a query may look": ~right,
        "the queries are the last T tokens, not the first: the diagonal ends in the lower right corner": table(
            T, S, lambda t, s: 0 <= t - (S - T) - s < window
        ),
        "the future is visible": table(T, S, lambda t, s: t - s < window),
        "a query sees as far into the future as into the past": table(T, S, lambda t, s: abs(t - s) < window),
        "a query sees one token too many: it is itself one of the tokens in its window": table(
            T, S, lambda t, s: 0 <= t - s <= window
        ),
        "a query sees one token too few: a window of 3 is itself and 2 before it": table(
            T, S, lambda t, s: 0 <= t - s < window - 1
        ),
        "a query does not see itself": table(T, S, lambda t, s: 0 < t - s < window),
        "a query does not see itself: the window ends with it, not before it": table(
            T, S, lambda t, s: 0 < t - s <= window
        ),
        "the whole past is visible: the window is missing": table(T, S, lambda t, s: t >= s),
        "the past outside the window is visible, and the window is not": table(T, S, lambda t, s: t - s >= window),
        "rows and columns are exchanged: a row is a query, a column a token": right.T,
    }


@exercise(
    points=1,
    hints=(
        "At which of the S places does query t stand? Make a list of the tokens that it sees.",
        "Query t stands at place S - T + t. Token s is S - T + t - s places back. Between which numbers must that lie?",
        "back = np.arange(S - T, S)[:, None] - np.arange(S); visible where back is at least 0 and less than `window`.",
    ),
)
def test_visible(answer):
    for T, S, window in ((4, 7, 3), (5, 5, 2), (1, 6, 4), (3, 5, 9), (6, 6, 6), (2, 5, 1), (1, 1, 1)):
        got, want = answer(T, S, window), table(T, S, lambda t, s, window=window: 0 <= t - s < window)
        added = "this is a mask to be added to scores; asked for are booleans, True where a query may look"
        says(not holds(np.isneginf, got, want), added)
        mistakes = told_apart(want, wrong_masks(T, S, window))
        expect(got, want, what=f"the mask for T = {T}, S = {S}, window = {window}", mistakes=mistakes)
    answer.refuses(4, 3, 2, because="4 queries cannot be the last of 3 tokens")
    answer.refuses(2, 3, 0, because="with a window of 0 tokens no query sees anything")
    answer.refuses(2, 3, -1, because="a window cannot hold -1 tokens")


# ---- Attention that may look at nothing


def softmax(x, axis=-1):
    exps = np.exp(x - x.max(axis, keepdims=True))
    return exps / exps.sum(axis, keepdims=True)


def with_sink(scores, sink):
    """As gpt-oss does it: the sinks are one more column, which is cut off again."""
    column = np.broadcast_to(sink[:, None, None], (*scores.shape[:2], 1))
    return softmax(np.concatenate([scores, column], axis=-1))


@exercise(
    points=2,
    hints=(
        "Put the sink beside the scores as one column more and use what you know of softmax. What must go at the end?",
        "The weight of key s is exp(score s) / (sum of all exp(score) + exp(sink)). All exponents, that of the sink"
        " too, may be made smaller by the same number.",
        "sink = sink[:, None, None]; largest = np.maximum(scores.max(-1, keepdims=True), sink); take `largest` off the"
        " scores and off the sink, then divide.",
    ),
)
def test_softmax_with_sink(answer):
    rng = np.random.default_rng(1)
    scores, sink = 2 * rng.standard_normal((3, 2, 4)), np.array([-1.0, 0.4, 2.0])
    full = with_sink(scores, sink)
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    total, sinks = exps.sum(-1, keepdims=True), sink[:, None, None]
    mistakes = {
        "each row has the sum 1: the sink must keep its weight, or a head must still mix something": softmax(scores),
        "the weight of the sink is still there: it has no value, so its column must go": full,
        "every head has the same sink, 0: `sink` has another for each head": with_sink(scores, 0 * sink)[..., :-1],
        "every head uses the sink of the first: `sink` has another for each head": with_sink(
            scores, np.full(3, sink[0])
        )[..., :-1],
        "the largest score is taken off the scores, but not off the sink (kyegomez/AttentionIsOFFByOne#5)": exps
        / (total + np.exp(sinks)),
        "the sink itself is added to the sum, not its exponential": exps / (total + sinks),
        "it adds 1 to the sum, whatever the sink and the largest score are": exps / (total + 1),
        "the sink counts once for each key: it is one score more, not S": exps
        / (total + 4 * np.exp(sinks - scores.max(-1, keepdims=True))),
        "the sinks' weight is taken off all weights in equal shares: it takes part in softmax instead": softmax(scores)
        - full[..., -1:] / 4,
        "the weights have the sum 1 over the queries: softmax goes over the last axis, the keys": softmax(scores, 1),
    }
    expect(answer(scores, sink), full[..., :-1], what="the weights", mistakes=mistakes)

    large = np.array([[[1000.0, 998.0]], [[-1000.0, -1001.0]], [[0.5, -1.0]], [[0.0, 1.0]], [[1000.0, -1000.0]]])
    sink = np.array([999.0, -999.5, 1000.0, -1000.0, 0.0])
    got, want = answer(large, sink), with_sink(large, sink)[..., :-1]
    sentence = "large scores or sinks make exp overflow, or round all of a row to 0: take off the largest of both first"
    says(not holds(infinite, got, want), sentence)
    expect(got, want, what="the weights for scores and sinks up to 1000")

    hidden = np.array([[[-np.inf] * 3, [0.5, -np.inf, -2.0]], [[-np.inf, 1.0, 2.0], [-np.inf] * 3]])
    sink = np.array([0.3, -1000.0])
    got, want = answer(hidden, sink), with_sink(hidden, sink)[..., :-1]
    sentence = "a row of -inf gives NaN, -inf - -inf: the sink is a finite score, so let it be the largest there"
    says(not holds(np.isnan, got, want), sentence)
    expect(got, want, what="the weights beside scores of -inf")
    small, sink = scores.astype(np.float32), np.array([-1.0, 0.5, 2.0], np.float32)
    got, want = answer(small, sink), with_sink(small, sink)[..., :-1]
    keeps_float32(got)
    expect(got, want, what="the weights for float32")


# ---- A bug hunt: the triangle in the wrong corner


def attention(q, k, v, offset=None, hide=-np.inf):
    (T, D), S = q.shape, len(k)
    if T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} tokens")
    seen = np.tri(T, S, S - T if offset is None else offset, dtype=bool)
    return softmax(np.where(seen, q @ k.T * D**-0.5, hide)) @ v


def one_query_at_a_time(q, k, v):
    rows = []
    for t in range(len(q)):
        seen = len(k) - len(q) + t + 1
        rows.append(softmax(k[:seen] @ q[t] / np.sqrt(q.shape[1])) @ v[:seen])
    return np.stack(rows)


def all_tokens_then_the_last(q, k, v):
    """As if all S tokens were asked: the queries that are not there are zeros, and their rows are cut off."""
    padded = np.concatenate([np.zeros((len(k) - len(q), q.shape[1])), q])
    return attention(padded, k, v)[len(k) - len(q) :]


def in_float32(q, k, v):
    return attention(*(np.asarray(x, np.float32) for x in (q, k, v)))


def newest_keys_first(q, k, v):
    """Block by block from the end, as an online softmax may do it."""
    rows = []
    for t in range(len(q)):
        largest, total, mix = -np.inf, 0.0, np.zeros(v.shape[1])
        for s in range(len(k) - len(q) + t, -1, -1):
            score = k[s] @ q[t] / np.sqrt(q.shape[1])
            new = max(largest, score)
            total = total * np.exp(largest - new) + np.exp(score - new)
            mix = mix * np.exp(largest - new) + np.exp(score - new) * v[s]
            largest = new
        rows.append(mix / total)
    return np.array(rows)


@exercise(
    points=2,
    hints=(
        "With T = S nearly all versions agree. Which T and S has a model with a cache, and one that reads in pieces?",
        "Choose keys that make all visible tokens weigh the same. What is the result then, and which values would show"
        " which tokens were seen?",
        "With keys of 0, row t is the mean of v[: S - T + t + 1]. Compare with np.allclose: T = 1, a T between, T = S.",
    ),
)
def test_hunt_is_causal(answer):
    def upper_left(q, k, v):
        return attention(q, k, v, 0)

    def mended_for_one_query(q, k, v):
        return attention(q, k, v) if len(q) == 1 else attention(q, k, v, 0)

    def no_mask_unless_square(q, k, v):
        return attention(q, k, v, 0 if len(q) == len(k) else len(k))

    def one_too_many(q, k, v):
        return attention(q, k, v, len(k) - len(q) + 1)

    def one_too_many_if_square(q, k, v):
        return attention(q, k, v, 1 if len(q) == len(k) else None)

    def not_itself(q, k, v):
        return attention(q, k, v, max(len(k) - len(q) - 1, 0))

    def no_queries_but_the_last(q, k, v):
        return np.repeat(attention(q, k, v)[-1:], len(q), axis=0)

    hunt(
        answer,
        right={
            "the formula with a mask": attention,
            "a version that goes through the queries one by one": one_query_at_a_time,
            "a version that computes in float32": in_float32,
            "a version that fills up the queries to S and cuts the result": all_tokens_then_the_last,
            "a version that begins with the newest key and never holds all scores": newest_keys_first,
            "a version that hides with the smallest float instead of -inf": lambda q, k, v: attention(
                q, k, v, hide=np.finfo(np.float64).min
            ),
        },
        wrong={
            "the version whose triangle starts in the upper left corner (pytorch/pytorch issue 103082)": upper_left,
            "the version that hides nothing": lambda q, k, v: attention(q, k, v, len(k)),
            "the version that is mended for one query, but not for several behind a cache (pytorch/executorch pull"
            " request 21749): try 1 < T < S": mended_for_one_query,
            "the version that hides nothing unless T = S, so that queries behind a cache see each other's future: try"
            " 1 < T < S": no_mask_unless_square,
            "the version in which every query sees one token of its future": one_too_many,
            "the version in which every query sees one token of its future, but only if T = S": one_too_many_if_square,
            "the version in which a token does not see itself": not_itself,
            "the version that gives the last row to every query": no_queries_but_the_last,
        },
    )


# ---- Grouped heads without copies


def grouped(q, k, v, key=None, value=None, scale=None, offset=None, hide="before"):
    """One head at a time. `key` and `value` say which head of k and of v a query head reads."""
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    seen = np.tri(T, S, S - T if offset is None else offset, dtype=bool)
    y = np.empty_like(q)
    for b in range(B):
        for h in range(H):
            i = h // (H // H_kv)
            scores = q[b, h] @ k[b, key(h) if key else i].T * q.dtype.type(scale or D**-0.5)
            if hide == "before":
                weights = softmax(np.where(seen, scores, -np.inf))
            elif hide == "after":
                weights = softmax(scores) * seen
            else:
                weights = softmax(np.where(seen, scores, -np.inf), 0)
            y[b, h] = weights @ v[b, value(h) if value else i]
    return y


def random_qkv(B, H, H_kv, T, S, D, seed, scale=1.5):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(shape) for shape in ((B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D))]


@exercise(
    points=2,
    hints=(
        "Cut the heads of q into two axes, one for the key head and one for the place in its group. Which is outside?",
        "q.reshape(B, H_kv, H // H_kv, T, D) puts neighbours into one group. What shape must k get, so that the product"
        " q @ k^T repeats it for the group?",
        "k[:, :, None] has the shape (B, H_kv, 1, S, D). Scores: q @ k.swapaxes(-1, -2) * D**-0.5; hide with np.tri(T,"
        " S, S - T); at the end reshape to (B, H, T, D).",
    ),
)
def test_grouped_attention(answer):
    for sizes in ((2, 6, 3, 4, 7, 5), (1, 4, 1, 1, 6, 3), (2, 3, 3, 5, 5, 2), (3, 8, 2, 2, 3, 7)):
        (_, H, H_kv, T, S, D), qkv = sizes, random_qkv(*sizes, seed=sizes[3])

        def tiled(h, H_kv=H_kv):
            return h % H_kv

        wrong = {
            "the heads are in the wrong order: neighbours share a key head, k0 k0 k1 k1, not k0 k1 k0 k1": {
                "key": tiled,
                "value": tiled,
            },
            "keys and values are in different orders: query heads read another head of v than of k": {"value": tiled},
            "keys and values are in different orders: query heads read another head of k than of v": {"key": tiled},
            "every query head reads key head 0": {"key": lambda h: 0, "value": lambda h: 0},
            "the scores are not divided by the square root of D": {"scale": 1.0},
            "the scores are multiplied by the square root of D: divide": {"scale": D**0.5},
            "the scores are divided by D, not by its square root": {"scale": 1 / D},
            "the scores are divided by the square root of all H * D channels: take the width of a head": {
                "scale": (H * D) ** -0.5
            },
            "the first query sees only the first token, but the queries are the last T of the S tokens": {"offset": 0},
            "every query sees all tokens, its future too": {"offset": S},
            "a query does not see itself": {"offset": max(S - T - 1, 0)},
            "a query sees one token of its future": {"offset": S - T + 1},
            "the future is hidden after softmax: it is still in the sum by which softmax divides": {"hide": "after"},
        }
        if T == S:
            wrong["softmax goes over the queries, not over the keys"] = {"hide": "queries"}
        want = grouped(*qkv)
        mistakes = told_apart(want, {sentence: grouped(*qkv, **options) for sentence, options in wrong.items()})
        expect(answer(*qkv), want, what=f"the result for {H} heads over {H_kv}", mistakes=mistakes)

    q, k, v = random_qkv(1, 4, 2, 3, 5, 6, seed=5)
    q[..., 0], k[..., 0] = 9.0, 400.0  # adds 1470 to all scores, which rounds them: hence the tolerance
    got, want = answer(q, k, v), grouped(q, k, v)
    says(not holds(infinite, got, want), "scores of 1500 make exp overflow: take the largest of each row off first")
    far = k.copy()
    far[..., 0] = -400.0  # all scores are around -1470: a hidden score must be lower still
    expect(got, want, what="the result for scores of 1500", tol=1e-8)
    sentence = "hidden scores are heard when the others are low: only -inf hides every score"
    says(same(answer(q, far, v), grouped(q, far, v), 1e-8), sentence)
    k[:, :, :-1, 0] = 0.0  # only the last token shouts, and only the last query may hear it
    got, want = answer(q, k, v), grouped(q, k, v)
    sentence = (
        "a large score in the future spoils a row: hide it by -inf, and take off the largest of each row that is left"
    )
    says(not holds(infinite, got, want), sentence)
    heard = {"a hidden token with a large score is heard: only -inf hides every score": grouped(q, k, v, offset=5)}
    expect(got, want, what="the result with a large score in the future", tol=1e-8, mistakes=heard)

    small = [x.astype(np.float32) for x in random_qkv(2, 4, 2, 2, 3, 5, seed=6)]
    got, want = answer(*small), grouped(*small)
    keeps_float32(got)
    expect(got, want, what="the result for float32")

    q, k, v = random_qkv(1, 640, 1, 1, 4096, 128, seed=7, scale=0.7)
    try:
        got = answer(q, k, v)
    except Raised as raised:
        if "MemoryError" not in raised.kinds:
            raise
        sentence = (
            "keys of 4 MiB became more than 2 GiB: they are copied for every query head, which grouping should save"
        )
        raise Wrong(sentence, *raised.details, trace=raised.trace) from None
    want = softmax(q[0, :, 0] @ k[0, 0].T * 128**-0.5) @ v[0, 0]
    expect(got, want[None, :, None], what="the result for 640 heads over 1")


# ---- Pieces of attention, put together


def part(scores, v):
    """The part of a set of keys, scores (T, n) and values (n, E), as the exercise describes it."""
    largest = scores.max(1)
    exps = np.exp(scores - np.where(np.isneginf(largest), 0, largest)[:, None])
    return largest, exps.sum(1), exps @ v


@exercise(
    points=2,
    hints=(
        "The two parts were made with different numbers taken off. What must a sum of exp(score - 3) be multiplied by"
        " to become a sum of exp(score - 5)?",
        "Largest of both: np.maximum. Then total and mix of each part shrink by exp(its largest - the largest of both)."
        " What if both are -inf?",
        "base = np.where(largest == -np.inf, 0, largest); shrink_a = np.exp(largest_a - base), b alike; for mix use"
        " shrink_a[:, None].",
    ),
)
def test_join(answer):
    rng = np.random.default_rng(8)
    # 5 queries, 9 keys. Query 0 sees nothing at all, query 1 nothing in the first set, query 2 only the first set.
    scores, v = 2 * rng.standard_normal((5, 9)), rng.standard_normal((9, 3))
    scores[3, :4] += 3  # here the first set has the largest score, in row 4 the second
    scores[4, 4:] += 3
    a, b = part(scores[3:, :4], v[:4]), part(scores[3:, 4:], v[4:])
    (m_a, t_a, x_a), (m_b, t_b, x_b) = a, b
    want = part(scores[3:], v)
    largest = want[0]

    def joined(f_a, f_b, g_a=None, g_b=None, top=largest):
        g_a, g_b = (f if g is None else g for f, g in ((f_a, g_a), (f_b, g_b)))
        return top, f_a * t_a + f_b * t_b, np.transpose(g_a * x_a.T + g_b * x_b.T)

    s_a, s_b, one = np.exp(m_a - largest), np.exp(m_b - largest), np.ones(2)
    mistakes = {
        "the sums are added as they are, but different numbers were taken off their scores: shrink each first": joined(
            one, one
        ),
        "mix shrinks, but total does not": joined(one, one, s_a, s_b),
        "total shrinks, but mix does not": joined(s_a, s_b, one, one),
        "the sums grow where they should shrink: the factor is exp(its own largest - the largest of both)": joined(
            1 / s_a, 1 / s_b
        ),
        "each part has the other's factor": joined(s_b, s_a),
        "only the first part shrinks, as if the second always had the larger score": joined(s_a, one),
        "only the second part shrinks, as if the first always had the larger score": joined(one, s_b),
        "the largest score is that of the second part: it is the larger of both": joined(
            np.exp(m_a - m_b), one, top=m_b
        ),
        "the largest score is that of the first part: it is the larger of both": joined(
            one, np.exp(m_b - m_a), top=m_a
        ),
        "the largest scores are added: take the larger of the two": joined(s_a, s_b, top=m_a + m_b),
        "it takes the smaller of the largest scores: exp will overflow": joined(
            np.exp(m_a - np.minimum(m_a, m_b)), np.exp(m_b - np.minimum(m_a, m_b)), top=np.minimum(m_a, m_b)
        ),
        "all queries share one largest score, but each has its own": joined(
            np.exp(m_a - largest.max()), np.exp(m_b - largest.max()), top=np.full(2, largest.max())
        ),
        "it uses powers of 2: these totals are sums of powers of e": joined(
            np.exp2(m_a - largest), np.exp2(m_b - largest)
        ),
        "mix is divided by total already: then it cannot be joined with further parts": (
            want[0],
            want[1],
            want[2] / want[1][:, None],
        ),
        "mix is the mean of the two results: the part with more weight must count more": (
            want[0],
            want[1],
            (x_a / t_a[:, None] + x_b / t_b[:, None]) / 2,
        ),
    }
    expect(answer(a, b), want, what="the joined part", mistakes=mistakes)
    ties = part(np.array([[0.5, 1.5], [-2.0, 0.0]]), v[:2]), part(np.array([[1.5], [-2.5]]), v[2:3])
    want = part(np.array([[0.5, 1.5, 1.5], [-2.0, 0.0, -2.5]]), v[:3])
    expect(answer(*ties), want, what="with equal largest scores, the joined part")

    big = scores[3:].copy()
    big[0] += 1000
    big[1, :4] -= 1000
    parts = [part(big[:, :4], v[:4]), part(big[:, 4:], v[4:])]
    want = part(big, v)
    for first, second in (parts, parts[::-1]):
        got = answer(first, second)
        sentence = "a score of 1000 makes exp overflow: only differences to the largest score may go into exp"
        says(not holds(infinite, got, want), sentence)
        expect(got, want, what="for scores of 1000, the joined part")

    scores[0], scores[1, :4], scores[2, 4:] = -np.inf, -np.inf, -np.inf
    a, b = part(scores[:, :4], v[:4]), part(scores[:, 4:], v[4:])
    for first, second in ((a, b), (b, a)):
        got, want = answer(first, second), part(scores, v)
        if type(got) is tuple and all(isinstance(x, np.ndarray) and x.ndim for x in got):
            rest = "a part that saw no keys turns the other one into NaN: joined with nothing, a part stays as it is"
            says(not holds(np.isnan, tuple(x[1:] for x in got), tuple(x[1:] for x in want)), rest)
        sentence = "two parts that saw no keys give NaN, from -inf - -inf: together they have seen nothing, too"
        says(not holds(np.isnan, got, want), sentence)
        zero = (np.nan_to_num(want[0], neginf=0), *want[1:])
        mistakes = {"where a query sees no keys the largest score is -inf, not 0": zero}
        expect(got, want, what="where some queries see nothing, the joined part", mistakes=mistakes)

    def of(keys):
        return part(scores[1:, keys], v[keys])

    halves = []
    for first, second in (([3, 4, 5, 6], [0, 1]), ([7, 8], [2])):
        halves.append(answer(of(first), of(second)))
        expect(halves[-1], of(first + second), what="of keys that are not neighbours, the joined part")
    expect(answer(*halves), of([*range(9)]), what="of four sets, joined two and two, the part")
    small = [tuple(x.astype(np.float32) for x in each) for each in (a, b)]
    got, want = answer(*small), tuple(x.astype(np.float32) for x in part(scores, v))
    keeps_float32(got)
    expect(got, want, what="for float32, the joined part")

    low = scores[3:] - [[1000.0], [5000.0]]  # both parts lie far below: the largest is still taken off exactly
    parts = part(low[:, :4], v[:4]), part(low[:, 4:], v[4:])
    got, want = answer(*parts), part(low, v)
    lost = "where all scores lie around -1000 or -5000 the sums are lost: take off the largest, however low it is"
    says(not holds(lambda x: x == 0, got, want), lost)
    expect(got, want, what="with all scores around -1000 or -5000, the joined part")


# ---- Attention, backwards


def derivatives(q, k, v, dy):
    """By complex steps: f(x + ih) = f(x) + ih f'(x), so the imaginary part holds the derivative, with no rounding."""

    def loss(q, k, v):
        (T, D), S = q.shape, len(k)
        scores = q @ k.T / np.sqrt(D)
        seen = np.tri(T, S, S - T, dtype=bool)
        largest = np.where(seen, scores.real, -np.inf).max(1, keepdims=True)
        exps = np.where(seen, np.exp(np.where(seen, scores - largest, 0)), 0)
        return (exps / exps.sum(1, keepdims=True) @ v * dy).sum()

    found = []
    for which in range(3):
        slopes = np.empty((q, k, v)[which].shape)
        for place in np.ndindex(slopes.shape):
            moved = [x.astype(complex) for x in (q, k, v)]
            moved[which][place] += 1e-30j
            slopes[place] = loss(*moved).imag / 1e-30
        found.append(slopes)
    return tuple(found)


def by_hand(q, k, v, dy, offset=None, slope="right", scale=None, back=None):
    """A backward pass with a mistake in it."""
    (T, D), S = q.shape, len(k)
    scale = D**-0.5 if scale is None else scale
    seen = np.tri(T, S, S - T if offset is None else offset, dtype=bool)
    w = softmax(np.where(seen, q @ k.T * scale, -np.inf))
    dw = dy @ v.T
    ds = {
        "right": lambda: w * (dw - (w * dw).sum(1, keepdims=True)),
        "diagonal": lambda: w * (1 - w) * dw,
        "no mean": lambda: w * dw,
        "linear": lambda: dw * seen,
        "squares": lambda: w * dw - (w * w * dw).sum(1, keepdims=True),
        "plain mean": lambda: w * (dw - dw.mean(1, keepdims=True)),
        "columns": lambda: w * (dw - (w * dw).sum(0, keepdims=True)),
        "plus": lambda: w * (dw + (w * dw).sum(1, keepdims=True)),
        "unweighted": lambda: w * (dw - dw.sum(1, keepdims=True)),
        "no outer weight": lambda: dw - (w * dw).sum(1, keepdims=True),
    }[slope]()
    back = scale if back is None else back
    return ds @ k * back, ds.T @ q * back, w.T @ dy


@exercise(
    points=4,
    hints=(
        "Three steps forwards: scores = q k^T / sqrt(D), weights = softmax, y = weights v. Begin with the last: what"
        " are dv and dweights?",
        "dv = weights.T @ dy, dweights = dy @ v.T. For softmax: the derivative of w_i by s_j is w_i (1 - w_i) for i ="
        " j, and -w_i w_j otherwise. Sum over i of dweights_i times that.",
        "dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True)); then dq = dscores @ k and dk ="
        " dscores.T @ q, both divided by sqrt(D).",
    ),
)
def test_attention_backward(answer):
    def fixture(T, S, D, E, seed):
        rng = np.random.default_rng(seed)
        return [1.3 * rng.standard_normal(shape) for shape in ((T, D), (S, D), (S, E), (T, E))]

    def check(got, want, where, mistakes, **options):
        is_triple = type(got) is tuple and len(got) == 3
        says(is_triple, f"the result should be the tuple (dq, dk, dv), not {describe(got)}")
        for i in (2, 1, 0):  # the way backwards
            named = told_apart(want[i], {sentence: value[i] for sentence, value in mistakes.items()})
            expect(got[i], want[i], what=f"{('dq', 'dk', 'dv')[i]}{where}", mistakes=named, **options)

    for T, S, D, E in ((3, 5, 4, 2), (4, 4, 3, 6), (1, 3, 2, 5), (1, 1, 2, 3)):
        args = q, k, v, dy = fixture(T, S, D, E, seed=T + S)
        D_ = D**-0.5
        mistakes = {
            "the forward pass sees the future": by_hand(*args, offset=S),
            "the queries are the last T of the S tokens, but the first one sees only the first token": by_hand(
                *args, offset=0
            ),
            "the forward pass does not divide the scores by the square root of D": by_hand(*args, scale=1.0, back=D_),
            "neither pass divides by the square root of D": by_hand(*args, scale=1.0),
            "the scores were divided by the square root of D, and so must their derivative be": by_hand(
                *args, back=1.0
            ),
            "the square root of D divides twice on the way back": by_hand(*args, back=1 / D),
            "the derivative is multiplied by the square root of D: divide, as the scores were": by_hand(
                *args, back=D**0.5
            ),
            "in softmax, a weight depends on all scores of its row: w (1 - w) is only the part where i = j": by_hand(
                *args, slope="diagonal"
            ),
            "in softmax, the derivative of weight i by score j is -w_i w_j, an outer product: no squares": by_hand(
                *args, slope="squares"
            ),
            "in softmax, the sum changes too: from dweights its mean under the weights must be taken off": by_hand(
                *args, slope="no mean"
            ),
            "the way back leaves softmax out": by_hand(*args, slope="linear"),
            "in softmax, the mean of dweights is taken off, but it must be the mean under the weights": by_hand(
                *args, slope="plain mean"
            ),
            "in softmax, the sum of dweights is taken off unweighted": by_hand(*args, slope="unweighted"),
            "in softmax, the sum goes over the queries: a row of weights belongs to one query": by_hand(
                *args, slope="columns"
            ),
            "in softmax, a sign is wrong: more score for one key means less weight for the others": by_hand(
                *args, slope="plus"
            ),
            "in softmax, the last factor is missing: the weight itself": by_hand(*args, slope="no outer weight"),
            "these are the derivatives with the sign turned round": tuple(-x for x in by_hand(*args)),
        }
        check(answer(*args), derivatives(*args), f" for T = {T}, S = {S}", mistakes)

    q, k, v, dy = fixture(3, 4, 5, 2, seed=9)
    k += 700  # adds the same to all scores of a row: more than exp can take, and nothing changes
    q[:, 0] += 5
    got, want = answer(q, k, v, dy), derivatives(q, k, v, dy)
    sentence = "scores above 1000 make exp overflow: take the largest of each row off first"
    says(not holds(infinite, got, want), sentence)
    check(got, want, " for scores above 1000", {}, tol=1e-8)  # the scores are rounded
    q, k, v, dy = fixture(3, 4, 5, 2, seed=11)
    q[:, 0], k[:, 0], k[-1, 0] = 40.0, 0.0, 80.0  # only the last token shouts, and only the last query may hear it
    got, want = answer(q, k, v, dy), derivatives(q, k, v, dy)
    says(
        not holds(infinite, got, want), "a large score in the future spoils a row: hide it before the largest is taken"
    )
    heard = "a hidden token with a large score is heard: only -inf hides every score"
    check(got, want, " with a large score in the future", {heard: by_hand(q, k, v, dy, offset=4)}, tol=1e-8)

    small = [x.astype(np.float32) for x in fixture(2, 3, 5, 4, seed=10)]
    want = tuple(x.astype(np.float32) for x in derivatives(*(x.astype(np.float64) for x in small)))
    got = answer(*small)
    keeps_float32(got)
    check(got, want, " for float32", {})
