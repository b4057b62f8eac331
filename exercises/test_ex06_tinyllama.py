"""Grades exercises/ex06_tinyllama.py."""

import math

import numpy as np

from exercises.grading import describe, exercise, expect, hunt, same, says


def told_apart(want, mistakes):
    """Those of the mistakes that do not happen to give the right value for this input."""
    return {sentence: value for sentence, value in mistakes.items() if not same(value, want)}


def infinite(got, want):
    """Whether a float array of the right shape holds NaN or infinity."""
    return (
        isinstance(got, np.ndarray)
        and got.dtype.kind == "f"
        and got.shape == want.shape
        and not bool(np.isfinite(got).all())
    )


def keeps_dtype(got, dtype):
    """The usual reason why float32 in is not float32 out."""
    wide = [x for x in got if isinstance(x, np.ndarray) and x.dtype == np.float64]
    sentence = f"{dtype} in, float64 out: arrays of zeros or ones and numbers like np.sqrt(5) are float64 and widen"
    says(not wide, f"{sentence} what they touch; Python's own numbers do not")


def expect_parts(got, want, names, where, mistakes, order=None, whole=None, **options):
    """Several arrays in a tuple, each with the part of the mistakes that belongs to it; `whole` ones show in all."""
    right_kind = type(got) is tuple and len(got) == len(want)
    says(right_kind, f"the result should be the tuple ({', '.join(names)}), not {describe(got)}")
    for sentence, value in told_apart(want, whole or {}).items():
        says(not same(got, value), sentence)
    for i in order or range(len(want)):
        named = told_apart(want[i], {sentence: value[i] for sentence, value in mistakes.items()})
        expect(got[i], want[i], what=f"{names[i]}{where}", mistakes=named, **options)


def steepness(loss, arguments):
    """Derivatives by complex steps: f(x + ih) = f(x) + ih f'(x), so the imaginary part holds them, with no rounding."""
    found = []
    for which, argument in enumerate(arguments):
        slopes = np.empty(argument.shape)
        for place in np.ndindex(slopes.shape):
            moved = [x.astype(complex) for x in arguments]
            moved[which][place] += 1e-30j
            slopes[place] = loss(*moved).imag / 1e-30
        found.append(slopes)
    return tuple(found)


# ---- Parameters


def inner_width(params, rule="right"):
    dim, times = params["dim"], params.get("ffn_dim_multiplier") or 1
    step = params["multiple_of"]

    def up(width):
        return math.ceil(width / step) * step

    return {
        "right": lambda: up(math.floor(times * math.floor(8 * dim / 3))),
        "4 dim": lambda: 4 * dim,
        "no multiplier": lambda: up(math.floor(8 * dim / 3)),
        "multiplied last": lambda: math.floor(times * up(math.floor(8 * dim / 3))),
        "multiplied last, rounded up": lambda: up(math.floor(times * up(math.floor(8 * dim / 3)))),
        "of 4 dim": lambda: up(math.floor(times * 4 * dim)),
        "down": lambda: math.floor(times * math.floor(8 * dim / 3)) // step * step,
        "not rounded up": lambda: math.floor(times * math.floor(8 * dim / 3)),
        "one more": lambda: (math.floor(times * math.floor(8 * dim / 3)) // step + 1) * step,
        "never down": lambda: up(times * 8 * dim / 3),
        "first not down": lambda: up(math.floor(times * 8 * dim / 3)),
        "second not down": lambda: up(times * math.floor(8 * dim / 3)),
        "first to nearest": lambda: up(math.floor(times * round(8 * dim / 3))),
        "second to nearest": lambda: up(round(times * math.floor(8 * dim / 3))),
        "first up": lambda: up(math.floor(times * math.ceil(8 * dim / 3))),
    }[rule]()


def counted(params, vocab, tied, rule="right", drop=(), add=(), **changes):
    """The sum of all sizes, one entry a matrix or vector; `drop` names what is forgotten, `add` what there is not."""
    dim, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
    keys = dim // heads * (params.get("n_kv_heads") or heads)
    keys, inner = changes.get("keys", keys), inner_width(params, rule)
    block = {"q": dim * dim, "k": keys * dim, "v": keys * dim, "o": dim * dim}
    block |= {"gate": inner * dim, "up": inner * dim, "down": dim * inner, "norm": dim, "second norm": dim}
    block |= {
        "biases": 2 * dim + 2 * keys + 2 * inner + dim,
        "shifts": 2 * dim,
        "turns": dim // heads // 2,
    }
    ends = {"embed": vocab * dim, "head": 0 if tied else vocab * dim, "last norm": dim, "other head": vocab * dim}
    extra = {"biases", "shifts", "turns", "other head"} - set(add)
    layers = changes.get("layers", layers)
    return sum(
        times * size
        for times, part in ((layers, block), (1, ends))
        for name, size in part.items()
        if name not in extra and name not in drop
    )


@exercise(
    points=1,
    hints=(
        "List the matrices and vectors of one block with their shapes. Which of them depend on n_kv_heads? Then what"
        " stands outside the blocks?",
        "q and o are (dim, dim), k and v (kv heads * head width, dim), the three of the MLP (inner, dim). A block has"
        " two norms with dim gains, and there is one more at the end.",
        "inner = int((multiplier or 1) * (8 * dim // 3)), then -(-inner // m) * m. A block: 2 dim^2 + 2 dim * kv_width"
        " + 3 dim * inner + 2 dim.",
    ),
)
def test_count_parameters(answer):
    grouped = {"dim": 60, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 25, "ffn_dim_multiplier": 1.4}
    grouped |= {"norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 500000.0}
    plain = {"dim": 56, "multiple_of": 20, "n_heads": 7, "n_layers": 5, "norm_eps": 1e-6, "vocab_size": -1}
    empty = {"dim": 40, "n_layers": 1, "n_heads": 5, "n_kv_heads": None, "multiple_of": 32, "ffn_dim_multiplier": None}
    wide = {"dim": 66, "n_layers": 2, "n_heads": 11, "n_kv_heads": 1, "multiple_of": 40, "ffn_dim_multiplier": 0.7}
    for params, vocab, tied in (
        (grouped, 101, False),
        (plain, 90, True),
        (empty, 77, False),
        (wide, 55, True),
        (grouped, 101, True),
    ):
        want = counted(params, vocab, tied)
        dim, heads, shape = params["dim"], params["n_heads"], (params, vocab, tied)
        mistakes = {
            "there are fewer key and value heads than query heads: their matrices have fewer rows": counted(
                *shape, keys=dim
            ),
            "a key head has dim / n_heads rows, as a query head has": counted(
                *shape, keys=params.get("n_kv_heads") or heads
            ),
            "the MLP has three matrices, gate, up and down, not two": counted(*shape, drop=["gate"]),
            "the inner width is GPT-2's, 4 dim": counted(*shape, rule="4 dim"),
            "the multiplier is missing": counted(*shape, rule="no multiplier"),
            "the multiplier comes before the inner width is rounded up to a multiple, not after it": counted(
                *shape, rule="multiplied last"
            ),
            "the inner width is rounded up to a multiple before it is multiplied": counted(
                *shape, rule="multiplied last, rounded up"
            ),
            "the multiplier is for 8/3 of dim, not for 4 dim": counted(*shape, rule="of 4 dim"),
            "the inner width is rounded up to a multiple of multiple_of, not down and not to the nearest": counted(
                *shape, rule="down"
            ),
            "the inner width is not rounded up to a multiple of multiple_of": counted(*shape, rule="not rounded up"),
            "the norms' gains are missing": counted(*shape, drop=["norm", "second norm", "last norm"]),
            "a block has two norms": counted(*shape, drop=["norm"]),
            "the last norm is missing: it stands before the head": counted(*shape, drop=["last norm"]),
            "a LLaMA has no biases": counted(*shape, add=["biases"]),
            "an RMSNorm has a gain, but no shift": counted(*shape, add=["shifts"]),
            "RoPE turns by fixed angles: it has no parameters": counted(*shape, add=["turns"]),
            "the output matrix o of attention is missing": counted(*shape, drop=["o"]),
            "q and o belong to the query heads, which are all there": counted(*shape, drop=["q", "o"])
            + 2 * params["n_layers"] * (dim // heads) * (params.get("n_kv_heads") or heads) * dim,
            "only one block is counted": counted(*shape, layers=1),
            "a tied head is the embedding, and counts once": counted(*shape, add=["other head"]),
            "without tying, embedding and head are two matrices: one of them is missing": counted(
                *shape, drop=["head"]
            ),
            "a tied model still has one matrix that is both, the embedding and the head": counted(
                *shape, drop=["embed", "head"]
            ),
            "it takes the vocabulary of the file, -1, and not vocab_size": counted(params, -1, tied),
        }
        # A value that two mistakes share accuses nobody of one of them.
        mistakes = {sentence: value for sentence, value in mistakes.items() if list(mistakes.values()).count(value) < 2}
        got = answer(dict(params), vocab, tied)
        expect(got, want, what="the number of parameters", mistakes=told_apart(want, mistakes))

    threes = {"dim": 12, "n_layers": 2, "n_heads": 3, "multiple_of": 8}  # 8/3 of it is 32, a multiple already
    one_more = {
        "an inner width that is a multiple of multiple_of stays as it is": counted(threes, 9, False, "one more")
    }
    expect(answer(threes, 9), counted(threes, 9, False), what="the number of parameters", mistakes=one_more)

    for dim, multiplier, step in ((62, 1.3, 1), (68, 1.2, 2), (74, 1.5, 3), (100, 1.3, 1), (64, 1.1, 1), (76, 1.7, 1)):
        params = {"dim": dim, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": step}
        params["ffn_dim_multiplier"] = multiplier
        want = counted(params, 11, False)
        rules = "never down", "first not down", "second not down", "first to nearest", "second to nearest", "first up"
        got = answer(params, 11)
        sentence = (
            "the inner width is rounded down twice, after 8/3 and after the multiplier, before it is rounded up to a"
            " multiple"
        )
        says(type(got) is not int or got == want or got not in [counted(params, 11, False, r) for r in rules], sentence)
        expect(got, want, what=f"the number of parameters for dim = {dim}, multiple_of = {step}")

    for name, params, vocab, tied, want in (
        ("TinyLlama 1.1B", (2048, 22, 32, 4, 256, None), 32000, False, 1_100_048_384),
        ("Llama 2 70B", (8192, 80, 64, 8, 4096, 1.3), 32000, False, 68_976_648_192),
        ("Llama 3 8B", (4096, 32, 32, 8, 1024, 1.3), 128256, False, 8_030_261_248),
        ("Llama 3.2 1B", (2048, 16, 32, 8, 256, 1.5), 128256, True, 1_235_814_400),
    ):
        keys = "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier"
        expect(answer(dict(zip(keys, params)), vocab, tied=tied), want, what=f"the number of parameters of {name}")


# ---- Fewer heads


@exercise(
    points=1,
    hints=(
        "Give the rows three axes instead of one: which group, which head in it, which row of the head.",
        "The group is the outer axis: reshape to (n_kv_head, n_head / n_kv_head, D, ...), then take the mean over axis"
        " 1.",
        "heads = weight.reshape(n_kv_head, n_head // n_kv_head, -1, *weight.shape[1:]); heads.mean(1), with the first"
        " two axes joined again.",
    ),
)
def test_pool_heads(answer):
    rng = np.random.default_rng(0)
    for H, G, D, C in ((15, 3, 2, 4), (6, 3, 2, 5), (4, 1, 3, 7), (15, 5, 1, 2), (4, 4, 2, 3), (8, 2, 5, 3)):
        weight = rng.standard_normal((H * D, C))
        heads = [weight[h * D : (h + 1) * D] for h in range(H)]
        size = H // G
        groups = [heads[g * size : (g + 1) * size] for g in range(G)]
        strided = [heads[g::G] for g in range(G)]
        thin = [weight[h::H] for h in range(H)]  # as if row h of every D belonged to head h
        mistakes = {
            "neighbours make a group, heads 0 and 1 and not 0 and n_kv_head": [sum(part) / size for part in strided],
            "these are the sums of the heads, not their means": [sum(part) for part in groups],
            "it keeps the first head of each group: the new head is the mean of all in it": [p[0] for p in groups],
            "it keeps the last head of each group: the new head is the mean of all in it": [p[-1] for p in groups],
            "every new head is the mean of all old ones": [sum(heads) / H] * G,
            "the first n_kv_head heads are kept, the others lost": heads[:G],
            "all rows of a head come first, then those of the next: it took every n_head-th row for a head": [
                sum(thin[g * size : (g + 1) * size]) / size for g in range(G)
            ],
            "it takes the mean of neighbouring rows, but the rows of one head stay apart: row 0 of one head goes with"
            " row 0 of the next": [weight.reshape(G * D, size, C).mean(1)],
            "the sum is divided by the square root of the group's size: a mean divides by the size": [
                sum(part) / size**0.5 for part in groups
            ],
            "the sum is divided by n_kv_head, but a group has n_head / n_kv_head heads": [
                sum(part) / G for part in groups
            ],
            "the sum is divided by one less than the size of the group: a mean divides by the size": [
                sum(part) / max(size - 1, 0.5) for part in groups
            ],
            "it takes the middle one of the values: the mean is asked for": [
                np.median(part, axis=0) for part in groups
            ],
        }
        joined = {sentence: np.concatenate(value) for sentence, value in mistakes.items()}
        want = np.concatenate([np.mean(part, axis=0) for part in groups])
        joined |= {
            "each new head stands there once for every head of its group: there are n_kv_head new ones": np.concatenate(
                [np.mean(part, axis=0) for part in groups for _ in range(size)]
            )
        }
        # A value that two mistakes share accuses nobody of one of them.
        joined = {s: v for s, v in joined.items() if [same(v, other) for other in joined.values()].count(True) < 2}
        named = told_apart(want, joined)
        expect(answer(weight, H, G), want, what=f"the matrix of {G} heads made of {H}", mistakes=named)
        bias = weight[:, 0].copy()
        expect(answer(bias, n_head=H, n_kv_head=G), want[:, 0], what=f"the bias of {G} heads made of {H}")

    small = rng.standard_normal((12, 5)).astype(np.float32)
    got, want = answer(small, 6, 2), small.reshape(2, 3, 2, 5).mean(1, dtype=np.float64).reshape(4, 5)
    keeps_dtype([got], "float32")
    expect(got, want.astype(np.float32), what="the matrix for float32")
    large = rng.uniform(35000, 50000, (12, 4)).astype(np.float16)
    large[4:8] *= -1
    got, want = answer(large, 6, 3), large.reshape(3, 2, 2, 4).astype(np.float64).mean(1).reshape(6, 4)
    lost = "the sum of two float16 heads is too large for float16, but their mean is not: add in a wider dtype"
    says(not infinite(got, want), lost)
    expect(got, want.astype(np.float16), what="the matrix for float16")
    answer.refuses(np.ones((12, 2)), 6, 4, because="6 heads make no 4 groups of one size")
    answer.refuses(np.ones((9, 2)), 3, 6, because="3 heads cannot become 6")
    answer.refuses(np.ones((12, 2)), 8, 4, because="12 rows cannot be 8 heads")


# ---- Three in one


def parts_of(fused, H, G, order="qkv", layout="groups", inside=False, exchanged=False):
    """(q, k, v) by the heads' places; a layout or an order may be wrong."""
    D, size = len(fused) // (H + 2 * G), H // G
    places = {"q": [], "k": [], "v": []}
    if layout == "groups":
        kinds = [kind for _ in range(G) for letter in order for kind in letter * (size if letter == "q" else 1)]
    else:
        kinds = [kind for letter in order for kind in letter * (H if letter == "q" else G)]
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    if exchanged:  # query heads of all groups in turn
        places["q"] = [places["q"][g * size + r] for r in range(size) for g in range(G)]
    rows = np.arange(len(fused)).reshape(-1, D) if not inside else np.arange(len(fused)).reshape(D, -1).T
    return tuple(fused[rows[places[kind]].reshape(-1)] for kind in "qkv")


@exercise(
    points=2,
    hints=(
        "How many heads of any kind does one group have? Give the rows an axis for the group, one for the head in it"
        " and one for the row of the head.",
        "heads = fused.reshape(n_kv_head, n_head / n_kv_head + 2, D, ...). Which heads of axis 1 are queries, which one"
        " is the key?",
        "q = heads[:, :-2], k = heads[:, -2], v = heads[:, -1], each with .reshape(-1, *fused.shape[1:]).",
    ),
)
def test_split_qkv(answer):
    rng = np.random.default_rng(1)
    names = "q", "k", "v"
    for H, G, D, C in ((6, 2, 3, 4), (6, 3, 2, 5), (4, 1, 5, 3), (3, 3, 2, 7), (15, 5, 1, 2), (8, 2, 4, 3)):
        fused = rng.standard_normal(((H + 2 * G) * D, C))
        want = parts_of(fused, H, G)
        flat = parts_of(fused, H, G, layout="flat")
        mistakes = {
            "all queries do not come first: the rows go group by group, each with its own key and value": flat,
            "key and value are exchanged: the key comes first": parts_of(fused, H, G, "qvk"),
            "in a group the query heads come first, then key and value": parts_of(fused, H, G, "kvq"),
            "in a group the key comes after the query heads, not before them": parts_of(fused, H, G, "kqv"),
            "each head has its D rows together: it took rows that lie far apart": parts_of(fused, H, G, inside=True),
            "query heads stay in order, first all of group 0: here the groups take turns": parts_of(
                fused, H, G, exchanged=True
            ),
        }
        got = answer(fused, H, G)
        thirds = np.split(fused, 3) if len(fused) % 3 == 0 else [fused] * 3
        is_thirds = H != G and type(got) in (tuple, list) and len(got) == 3 and all(map(same, got, thirds))
        says(
            not is_thirds,
            "these are three equal parts, but there are fewer key and value heads than query heads"
            " (vllm-project/vllm issue 13686)",
        )
        where = f" of {H} heads in {G} groups"
        expect_parts(got, want, names, where, {}, whole=mistakes)
        bias = fused[:, 0].copy()
        want = tuple(part[:, 0] for part in want)
        expect_parts(answer(bias, n_head=H, n_kv_head=G), want, names, f"{where}, for a bias", {})
    whole = np.arange(80, dtype=np.int64).reshape(20, 4)
    expect_parts(answer(whole, 6, 2), parts_of(whole, 6, 2), names, " of whole numbers", {})
    half = rng.standard_normal((20, 3)).astype(np.float16)
    got = answer(half, 6, 2)
    expect_parts(got, parts_of(half, 6, 2), names, " for float16", {})
    answer.refuses(np.ones((28, 2)), 6, 4, because="6 query heads make no 4 groups of one size")
    answer.refuses(np.ones((15, 2)), 3, 6, because="3 query heads cannot be in 6 groups")
    answer.refuses(np.ones((21, 2)), 6, 2, because="21 rows cannot be 6 + 2 + 2 heads")


# ---- A bug hunt: nearly RMSNorm


def widened(x, gain):
    return np.asarray(x, np.float64), np.asarray(gain, np.float64)


def mean_square(x):
    return (x * x).mean(-1, keepdims=True)


def the_formula(x, gain, eps):
    """Any way to compute it in float64, then x's dtype."""
    wide, g = widened(x, gain)
    return (g * wide / np.sqrt(mean_square(wide) + eps)).astype(x.dtype)


def in_float32(x, gain, eps):
    wide = np.asarray(x, np.float32)
    wide = wide / np.sqrt(mean_square(wide) + np.float32(eps))
    return (wide * np.asarray(gain, np.float32)).astype(x.dtype)


def rounds_before_the_gain(x, gain, eps):
    wide = np.asarray(x, np.promote_types(x.dtype, np.float32))
    wide = wide * (1 / np.sqrt(mean_square(wide) + eps))
    return gain * wide.astype(x.dtype)


def by_the_length(x, gain, eps):
    wide, g = widened(x, gain)
    C = wide.shape[-1]
    length = np.sqrt(np.linalg.norm(wide, axis=-1, keepdims=True) ** 2 + C * eps)
    return (g * wide * math.sqrt(C) / length).astype(x.dtype)


def wrong_norm(rule):
    """A version with a mistake: rule(x, gain, eps) in float64."""

    def norm(x, gain, eps):
        return np.asarray(rule(*widened(x, gain), eps)).astype(x.dtype)

    return norm


def in_narrow_squares(x, gain, eps):
    squares = (x * x).astype(x.dtype)
    wide, g = widened(x, gain)
    return (g * wide / np.sqrt(squares.astype(np.float64).mean(-1, keepdims=True) + eps)).astype(x.dtype)


@exercise(
    points=2,
    hints=(
        "Write the formula down once more in your test, and compare. Which x, gain and eps make it matter where eps"
        " stands, and what is taken off?",
        "Take rows whose mean is not 0, an eps as large as the squares, gains that differ, and an array with three"
        " axes.",
        "For x of shape (2, 3, 4): want = gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps), and np.allclose"
        " with rtol=1e-4. Then one float16 row with numbers above 256, rtol=1e-2.",
    ),
)
def test_hunt_rms_norm(answer):
    def last_two_axes(x, gain, eps):
        axes = tuple(range(x.ndim))[-2:]
        return gain * x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)

    def root(x, eps):
        return np.sqrt(mean_square(x) + eps)

    wrong = {
        "the version that takes off the mean, as LayerNorm does: try rows whose mean is not 0": lambda x, gain, eps: (
            gain * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        ),
        "the version that divides by the variance's root (keras-team/keras pull request 22393): try rows whose mean is"
        " not 0": lambda x, gain, eps: gain * x / np.sqrt(x.var(-1, keepdims=True) + eps),
        "the version that adds eps outside the root (allenai/OLMo issue 281): try a large eps": lambda x, gain, eps: (
            gain * x / (root(x, 0) + eps)
        ),
        "the version whose eps is always 1e-6 (apache/tvm pull request 15856): try a large one": lambda x, gain, eps: (
            gain * x / root(x, 1e-6)
        ),
        "the version that takes the larger of mean square and eps: try an eps as large as the squares": (
            lambda x, gain, eps: gain * x / np.sqrt(np.maximum(mean_square(x), eps))
        ),
        "the version that multiplies with the root (mosaicml/llm-foundry issue 371)": lambda x, gain, eps: (
            gain * x * root(x, eps)
        ),
        "the version that multiplies with 1 + gain, which is right for Gemma (linkedin/Liger-Kernel issue 74)": (
            lambda x, gain, eps: (1 + gain) * x / root(x, eps)
        ),
        "the version that multiplies with the gain before the mean square is taken: try gains that differ": (
            lambda x, gain, eps: gain * x / root(gain * x, eps)
        ),
        "the version that takes one mean over the whole array: try several rows": lambda x, gain, eps: (
            gain * x / np.sqrt((x * x).mean() + eps)
        ),
        "the version that takes the mean over the last two axes: try several rows in one matrix": last_two_axes,
    }
    hunt(
        answer,
        right={
            "the formula in float64": the_formula,
            "a version that computes in float32": in_float32,
            "a version that rounds before the gain, as Meta's does": rounds_before_the_gain,
            "a version that divides by the length of the row": by_the_length,
        },
        wrong={which: wrong_norm(rule) for which, rule in wrong.items()}
        | {"the version that squares float16 in float16, where 65504 is the largest number": in_narrow_squares},
    )


# ---- Gains that go into matrices


def llama(blocks, C, K, F, V, tied, seed, dtype=np.float64):
    """Weights of a model with `blocks` blocks; K rows in k and v."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (V, C), "norm": (C,)} | ({} if tied else {"head": (V, C)})
    for i in range(blocks):
        block = {"attention_norm": (C,), "attention.q": (C, C), "attention.k": (K, C), "attention.v": (K, C)}
        block |= {"attention.o": (C, C), "mlp_norm": (C,), "mlp.gate": (F, C), "mlp.up": (F, C), "mlp.down": (C, F)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    names = rng.permutation(list(shapes))  # files keep no order
    return {f"{name}.weight": rng.standard_normal(shapes[name]).astype(dtype) for name in names}


ATTENTION, MLP = ("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")


def folded(weights, attention=ATTENTION, mlp=MLP, how=lambda w, gain: w * gain, ones=True, head="own", exchange=False):
    """The weights with the gains in `attention` and `mlp` of each block and in the head; a mistake may be asked for."""
    new = {name: w.copy() for name, w in weights.items()}
    blocks = sorted({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    gain = weights["norm.weight"]
    if "head.weight" in weights:
        if head != "forgotten":
            new["head.weight"] = how(weights["head.weight"], gain)
    elif head == "own":
        new["head.weight"] = how(weights["embed.weight"], gain)
    elif head == "both":
        new["head.weight"] = new["embed.weight"] = how(weights["embed.weight"], gain)
    elif head == "embed":
        new["embed.weight"] = how(weights["embed.weight"], gain)
    elif head == "copy":
        new["head.weight"] = weights["embed.weight"].copy()
    for i in blocks:
        norms = ("attention_norm", attention), ("mlp_norm", mlp)
        for (norm, _), (_, readers) in zip(norms[::-1] if exchange else norms, norms):
            for reader in readers:
                name = f"blocks.{i}.{reader}.weight"
                new[name] = how(weights[name], weights[f"blocks.{i}.{norm}.weight"])
    for name, w in weights.items():
        if ones is True and name.endswith("norm.weight") or ones == "blocks" and name.endswith("_norm.weight"):
            new[name] = np.ones_like(w)
        if ones == "zeros" and name.endswith("norm.weight"):
            new[name] = np.zeros_like(w)
    return new


@exercise(
    points=2,
    hints=(
        "Write W(gain * n) as a product of matrices, with the gain as a diagonal one. Which matrices read the result of"
        " each norm?",
        "W @ diag(gain): column c of W is multiplied with gain c, which is W * gain. attention_norm is read by q, k and"
        " v; mlp_norm by gate and up; norm by the head.",
        "new = dict(weights); new.setdefault('head.weight', weights['embed.weight']); then for each block i multiply q,"
        " k, v, gate and up, and put np.ones_like in place of the gains.",
    ),
)
def test_fold_gains(answer):
    def rows(w, gain):
        return w * (np.resize(gain, len(w))[:, None])

    for blocks, C, K, F, V, tied in ((2, 4, 2, 6, 7, False), (2, 4, 2, 6, 7, True), (3, 6, 6, 9, 5, False)):
        weights = llama(blocks, C, K, F, V, tied, seed=blocks + C + tied)
        want = folded(weights)
        mistakes = {
            "a gain belongs to an input: it multiplies a column of the matrix, not a row": folded(weights, how=rows),
            "the matrices are divided by the gain, but they must do what it did": folded(
                weights, how=lambda w, gain: w / gain
            ),
            "the gain goes in twice": folded(weights, how=lambda w, gain: w * gain * gain),
            "1 + gain goes in: these gains are plain factors": folded(weights, how=lambda w, gain: w * (1 + gain)),
            "the gains are in the matrices, but also still there: they must be 1": folded(weights, ones=False),
            "gains of 0 let nothing pass: they must be 1": folded(weights, ones="zeros"),
            "the matrices are as before, so the gains are lost": folded(weights, how=lambda w, gain: w.copy()),
            "k and v read the same normalised numbers as q": folded(weights, attention=ATTENTION[:1]),
            "v reads the same normalised numbers as q and k": folded(weights, attention=ATTENTION[:2]),
            "o reads the heads' results, which no norm has touched": folded(
                weights, attention=(*ATTENTION, "attention.o")
            ),
            "up reads the same normalised numbers as gate": folded(weights, mlp=MLP[:1]),
            "gate reads the same normalised numbers as up": folded(weights, mlp=MLP[1:]),
            "the gain of attention_norm goes to q, k and v, that of mlp_norm to gate and up: they are exchanged": (
                folded(weights, exchange=True)
            ),
            "the MLP's matrices are as before": folded(weights, mlp=()),
            "attention's matrices are as before": folded(weights, attention=()),
        }
        if tied:
            mistakes |= {
                "the last gain went into the embedding, so that the first block reads other numbers: the head needs a"
                " matrix of its own": folded(weights, head="embed"),
                "the head has its own matrix now, but the embedding has changed with it": folded(weights, head="both"),
                "the gain of the last norm is lost: it belongs into the head": folded(weights, head="copy"),
                "the model is tied no more, so it needs head.weight, the embedding with the last gain": folded(
                    weights, head="none"
                ),
                "the last norm still has its gain: only the blocks are done": folded(
                    weights, head="none", ones="blocks"
                ),
                "the last norm has its gain still, which no head has taken over: only the blocks are done": folded(
                    weights, head="copy", ones="blocks"
                ),
            }
        else:
            mistakes |= {
                "the last norm still has its gain: only the blocks are done": folded(
                    weights, head="forgotten", ones="blocks"
                ),
                "the gain of the last norm is lost: it belongs into the head": folded(weights, head="forgotten"),
                "the last norm has its gain still, and so has the head now": folded(weights, ones="blocks"),
            }
        if F == 9:
            assert not any(same(rows(w, w[0]), w) for w in weights.values() if w.ndim == 2)
        got = answer(weights)
        expect(got, want, what="the result", mistakes=mistakes)
    many = llama(12, 2, 2, 3, 4, True, seed=5)
    got, want = answer(many), folded(many)
    expect(got, want, what="with 12 blocks, the result")
    none = llama(0, 3, 3, 4, 5, True, seed=6)
    expect(answer(none), folded(none), what="without blocks, the result")
    zero = llama(1, 4, 2, 3, 5, False, seed=7)
    zero["blocks.0.mlp_norm.weight"][1] = zero["norm.weight"][2] = 0
    expect(answer(zero), folded(zero), what="with gains of 0, the result")
    small = llama(1, 4, 2, 3, 5, True, seed=8, dtype=np.float32)
    got = answer(small)
    keeps_dtype(got.values() if type(got) is dict else [], "float32")
    expect(got, folded(small), what="for float32, the result")


# ---- SwiGLU, backwards


def sigmoid(z):
    """For real and complex numbers, also large ones."""
    right = z.real > 0
    small = np.exp(np.where(right, -z, z))
    return np.where(right, 1, small) / (1 + small)


def swiglu(x, gate, up, down):
    a = x @ gate.T
    return (a * sigmoid(a) * (x @ up.T)) @ down.T


def swiglu_by_hand(x, gate, up, down, dy, rule="right"):
    """A backward pass with a mistake in it."""
    if rule == "silu on up":  # ml-explore/mlx-lm pull request 767
        dx, dup, dgate, ddown = swiglu_by_hand(x, up, gate, down, dy)
        return dx, dgate, dup, ddown
    a, b = x @ gate.T, x @ up.T
    s = sigmoid(a)
    silu = a * s
    dinner, inner = dy @ down, silu * b
    slope = {
        "sigmoid only": s,
        "sigmoid's": s * (1 - s),
        "no sigmoid": a * s * (1 - s),
        "sign": s - silu * (1 - s),
        "of silu": s + silu * (1 - silu),
        "squared": s + a * s * s,
        "relu": (a > 0).astype(float),
        "linear": np.ones_like(a),
    }.get(rule, s + silu * (1 - s))
    da, db = dinner * b * slope, dinner * silu
    if rule == "product":  # silu(gate * up): the slope is that of the product
        s = sigmoid(a * b)
        inner = a * b * s
        slope = s + inner * (1 - s)
        da, db = dinner * b * slope, dinner * a * slope
    da = dinner * slope if rule == "no up" else da
    db = (
        dinner * a
        if rule == "no silu"
        else dinner * s
        if rule == "sigmoid gate"
        else dinner
        if rule == "no gate"
        else db
    )
    if rule == "exchanged":
        da, db = db, da
    inner = silu if rule == "down of silu" else a * b if rule == "down of a b" else inner
    dx = da @ gate + db @ up
    dx = {"gate only": da @ gate, "up only": db @ up, "mean dx": dx / 2}.get(rule, dx)
    flat = [part.reshape(-1, part.shape[-1]) for part in (x, dy, inner, da, db)]
    if rule == "one row":
        flat = [part[-x.shape[1] :] for part in flat]
    x, dy, inner, da, db = flat
    times = 1 / len(x) if rule == "mean" else 1.0
    return dx, da.T @ x * times, db.T @ x * times, dy.T @ inner * times


@exercise(
    points=3,
    hints=(
        "Name the lines of the forward pass: a = gate(x), b = up(x), inner = silu(a) * b, y = down(inner). Go back"
        " through them: from dy to dinner and ddown, from dinner to da and db.",
        "With sigma = sigmoid(a): the derivative of silu is sigma + a * sigma * (1 - sigma). db = dinner * silu(a),"
        " da = dinner * b * that. For weights put all tokens into one axis: dgate = da.T @ x.",
        "dinner = dy @ down; dx = da @ gate + db @ up; ddown = dy.T @ inner. For a sigmoid that cannot overflow:"
        " (1 + np.tanh(a / 2)) / 2.",
    ),
)
def test_swiglu_backward(answer):
    names = "dx", "dgate", "dup", "ddown"

    def fixture(B, T, C, F, seed):
        rng = np.random.default_rng(seed)
        return [1.2 * rng.standard_normal(shape) for shape in ((B, T, C), (F, C), (F, C), (C, F), (B, T, C))]

    def right(x, gate, up, down, dy):
        return steepness(lambda *arguments: (swiglu(*arguments) * dy).sum(), (x, gate, up, down))

    sentences = {
        "silu on up": "silu is for the gate: it was put on up (ml-explore/mlx-lm pull request 767)",
        "product": "silu is for the gate alone: it was put on the product of gate and up (Nijikadesu/breakdown-minimind"
        " issue 3)",
        "sigmoid only": "the derivative of silu is that of a product: a * sigmoid(a) has two factors that depend on a",
        "sigmoid's": "this is the derivative of sigmoid, but silu is a * sigmoid(a)",
        "no sigmoid": "in the derivative of silu the first part is missing, where a is derived and sigmoid(a) stays",
        "sign": "in the derivative of silu a sign is wrong: sigmoid grows",
        "of silu": "the derivative of sigmoid is sigmoid (1 - sigmoid), not silu (1 - silu)",
        "squared": "the derivative of sigmoid is sigmoid (1 - sigmoid), not its square",
        "relu": "the derivative of silu is no step from 0 to 1: that is ReLU's",
        "linear": "the way back through the gate leaves silu out",
        "no up": "what comes to the gate was multiplied with up(x): so its derivative is, too",
        "no silu": "what comes to up was multiplied with silu(gate(x)), not with gate(x)",
        "sigmoid gate": "what comes to up was multiplied with silu(gate(x)), not with sigmoid(gate(x))",
        "no gate": "what comes to up was multiplied with silu(gate(x)): so its derivative is, too",
        "down of silu": "down reads silu(gate(x)) * up(x): in ddown up is missing",
        "down of a b": "down reads silu(gate(x)) * up(x): in ddown silu is missing",
        "gate only": "x is read by up, too: its derivative is a sum of two",
        "up only": "x is read by gate, too: its derivative is a sum of two",
        "mean dx": "x is read by gate and up: its derivative is the sum, not the mean",
        "one row": "a weight is used in every row of the batch: sum over all of them, not only the last",
        "mean": "a weight is used for every token: its gradient is the sum over the tokens, not their mean",
    }
    for B, T, C, F in ((2, 3, 4, 5), (3, 2, 5, 3), (1, 4, 2, 6), (2, 1, 3, 4)):
        args = fixture(B, T, C, F, seed=C)
        mistakes = {sentence: swiglu_by_hand(*args, rule) for rule, sentence in sentences.items()}
        mistakes["these are the derivatives with the sign turned round"] = tuple(-x for x in swiglu_by_hand(*args))
        dx, dgate, dup, ddown = want = right(*args)
        exchanged = "the derivatives of gate and up are exchanged"
        whole = {exchanged: (dx, dup, dgate, ddown)}
        whole |= {f"{exchanged}, also on the way to x": swiglu_by_hand(*args, "exchanged")}
        where = f" for B = {B}, T = {T}, C = {C}, F = {F}"
        expect_parts(answer(*args), want, names, where, mistakes, order=(3, 2, 1, 0), whole=whole)

    for dtype, tol in ((np.float64, 1e-8), (np.float32, 1e-3)):
        x, gate, up, down, dy = (part.astype(dtype) for part in fixture(2, 3, 4, 5, seed=9))
        gate[0], gate[1] = 0, 0
        gate[0, 0], gate[1, 0] = 500, -500
        x[:, :, 0] = np.array([[2.0, -2.0, 1.5], [-1.6, 0.0, -3.0]])
        args = x, gate, up, down, dy
        got, want = answer(*args), right(*(part.astype(np.float64) for part in args))
        lost = (
            f"where gate(x) is 1000 or -1000 exp overflows and leaves NaN or infinity in {np.dtype(dtype)}: write the"
            " sigmoid so that exp only sees numbers below 0, or with tanh"
        )
        if type(got) is tuple:
            says(not any(map(infinite, got, want)), lost)
            if dtype == np.float32:
                keeps_dtype(got, "float32")
        want = tuple(part.astype(dtype) for part in want)
        expect_parts(got, want, names, f" with gate(x) up to 1500, for {np.dtype(dtype)}", {}, tol=tol)

    args = tuple(part.astype(np.float32) for part in fixture(2, 3, 5, 4, seed=10))
    want = tuple(part.astype(np.float32) for part in right(*(part.astype(np.float64) for part in args)))
    got = answer(*args)
    keeps_dtype(got if type(got) is tuple else [], "float32")
    expect_parts(got, want, names, " for float32", {}, tol=3e-5)


# ---- RMSNorm, backwards


def rms_by_hand(x, gain, eps, dy, rule="right"):
    """A backward pass with a mistake in it."""
    eps = {"no eps": 0.0, "1e-5": 1e-5, "1e-6": 1e-6}.get(rule, eps)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    if rule == "eps outside":
        root = np.sqrt((x * x).mean(-1, keepdims=True))
        r = 1 / (root + eps)
        n, dn = x * r, dy * gain
        dx = r * dn - (x * dn).mean(-1, keepdims=True) * x * r * r / root
        return dx, (dy * n).reshape(-1, len(gain)).sum(0)
    n, dn = x * r, dy * gain
    if rule == "no gain":
        dn = dy
    along = (n * dn).mean(-1, keepdims=True)
    dx = {
        "constant": lambda: r * dn,
        "gain twice": lambda: r * (dn - n * gain * along),
        "gain not inside": lambda: r * (dn - n * (n * dy).mean(-1, keepdims=True)),
        "layer norm": lambda: r * (dn - dn.mean(-1, keepdims=True) - n * along),
        "sum": lambda: r * (dn - n * (n * dn).sum(-1, keepdims=True)),
        "plus": lambda: r * (dn + n * along),
        "no scale": lambda: dn - n * along,
        "scale once": lambda: r * dn - n * along,
        "x for n": lambda: r * (dn - x * (x * dn).mean(-1, keepdims=True)),
        "half": lambda: r * (dn - n * along / 2),
        "double": lambda: r * (dn - 2 * n * along),
        "tokens": lambda: r * (dn - n * (n * dn).mean(tuple(range(x.ndim - 1)), keepdims=True)),
        "whole": lambda: r * (dn - n * (n * dn).mean()),
        "no dy": lambda: r * (gain - n * (n * gain).mean(-1, keepdims=True)),
    }.get(rule, lambda: r * (dn - n * along))()
    flat = (dy * n).reshape(-1, len(gain))
    dgain = {
        "dgain of x": (dy * x).reshape(-1, len(gain)).sum(0),
        "dgain with gain": flat.sum(0) * gain,
        "dgain mean": flat.mean(0),
        "dgain of y": (dy * n * gain).reshape(-1, len(gain)).mean(0),
        "dgain last": flat[-x.shape[-2] if x.ndim > 1 else 0 :].sum(0),
        "dgain of dy": dy.reshape(-1, len(gain)).sum(0),
        "dgain over gain": flat.sum(0) / gain,
    }.get(rule, flat.sum(0))
    return dx, dgain


@exercise(
    points=3,
    hints=(
        "Write n = x / sqrt(mean of squares + eps), so y = gain * n. dgain and dn are quick. For dx, look at n_i as a"
        " function of x_j, for i = j and for i != j.",
        "With r = 1 / sqrt(mean of squares + eps): the derivative of r by x_j is -r^3 x_j / C. So that of n_i by x_j is"
        " r (1 if i = j, else 0) - n_i n_j r / C. Sum over i with dn_i.",
        "dn = dy * gain; dx = r * (dn - n * (n * dn).mean(-1, keepdims=True)); dgain = (dy * n).reshape(-1, C).sum(0)."
        " float16: astype(np.float32) before, back after.",
    ),
)
def test_rms_norm_backward(answer):
    names = "dx", "dgain"

    def fixture(shape, seed, size=1.0):
        rng = np.random.default_rng(seed)
        x, dy = size * (rng.standard_normal(shape) + 0.5), rng.standard_normal(shape)
        return x, rng.standard_normal(shape[-1]) * 2 - 0.5, dy

    def right(x, gain, eps, dy):
        def loss(x, gain):
            return (gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * dy).sum()

        return steepness(loss, (x, gain))

    sentences = {
        "constant": "the root mean square is taken for a constant, but every x of the row changes it",
        "no gain": "the gain is missing on the way to x: y is gain times the normalised x",
        "gain twice": "in the second term the gain is there twice, inside the mean and outside"
        " (NVIDIA/Megatron-LM pull request 6859)",
        "gain not inside": "in the mean of the second term the gain is missing",
        "layer norm": "a mean is taken off as in LayerNorm, whose forward pass takes one off: RMSNorm does not",
        "sum": "in the second term stands a sum over the channels: the forward pass took the mean of the squares",
        "plus": "in the second term the sign is wrong: a larger x makes all of the row smaller",
        "no scale": "all of dx must be divided by the root mean square, as x was",
        "scale once": "the second term must be divided by the root mean square, too",
        "x for n": "in the second term stands x, where the normalised x belongs",
        "half": "the second term is half as large as it should be: a square brings a 2, and the root a 1/2",
        "double": "the second term is twice as large as it should be: a square brings a 2, but the root a 1/2",
        "tokens": "the mean of the second term goes over the tokens: a row of channels has its own root mean square",
        "whole": "the mean of the second term goes over all tokens: a row of channels has its own root mean square",
        "no dy": "this is the derivative of the sum of y: dy is missing in dx",
        "no eps": "eps is missing: it was added to the mean square",
        "1e-5": "eps is always 1e-5: use the argument",
        "1e-6": "eps is always 1e-6: use the argument",
        "eps outside": "eps belongs under the root, as in the forward pass",
        "dgain of x": "dgain is made of x, but the gain was multiplied with the normalised x",
        "dgain with gain": "dgain is multiplied with the gain: the derivative of gain * n by gain is n",
        "dgain mean": "dgain is a mean over the tokens: each of them uses the gain, so it is a sum",
        "dgain of y": "dgain is the mean of dy * y: it should be the sum of dy and the normalised x",
        "dgain last": "dgain sums over the last row of the batch only",
        "dgain of dy": "dgain is the sum of dy, as for a shift: a gain was multiplied with the normalised x",
        "dgain over gain": "dgain is divided by the gain",
    }
    for shape, eps in (((2, 3, 4), 0.3), ((3, 5), 0.7), ((6,), 0.2), ((2, 1, 3, 2), 1.5), ((4, 2, 5), 1e-5)):
        x, gain, dy = fixture(shape, seed=len(shape) + shape[-1])
        x[..., 0] *= 0.2
        if x.ndim > 1:
            x[(0,) * (x.ndim - 1)] *= 0.01  # a row that is smaller than eps
        want = right(x, gain, eps, dy)
        mistakes = {sentence: rms_by_hand(x, gain, eps, dy, rule) for rule, sentence in sentences.items()}
        mistakes["these are the derivatives with the sign turned round"] = tuple(-part for part in want)
        got = answer(x, gain, eps, dy)
        if type(got) is tuple and len(got) == 2 and all(isinstance(part, np.ndarray) for part in got) and x.ndim > 1:
            exchanged = got[0].shape == gain.shape and got[1].shape == x.shape
            says(not exchanged, "dx and dgain are exchanged: dx comes first")
            summed = got[1].ndim == 1 or got[1].shape[-1:] != gain.shape
            says(summed, "dgain has one number for each channel: sum over all axes but the last")
        expect_parts(got, want, names, f" for x of shape {shape} and eps = {eps}", mistakes, order=(1, 0))

    x, gain, dy = fixture((3, 4), seed=20)
    x[1] = 0
    expect_parts(answer(x, gain, 0.01, dy), right(x, gain, 0.01, dy), names, " with a row of zeros", {}, order=(1, 0))
    args = [part.astype(np.float32) for part in fixture((2, 3, 5), seed=21)]
    want = tuple(part.astype(np.float32) for part in right(*args[:2], 0.3, args[2]))
    got = answer(*args[:2], 0.3, args[2])
    keeps_dtype(got if type(got) is tuple else [], "float32")
    expect_parts(got, want, names, " for float32", {}, order=(1, 0))

    x, gain, dy = (part.astype(np.float16) for part in fixture((2, 3, 4), seed=22, size=700))
    dy *= np.float16(100)
    got, want = answer(x, gain, 0.01, dy), rms_by_hand(*(np.asarray(p, np.float64) for p in (x, gain, 0.01, dy)))
    if type(got) is tuple and len(got) == 2:
        lost = "squares of float16 numbers overflow: compute in float32"
        says(not any(map(infinite, got, want)), lost)
        vanished = isinstance(got[0], np.ndarray) and got[0].shape == x.shape and not got[0].any()
        says(not vanished, "dx is 0 everywhere, since squares of float16 numbers overflow: compute in float32")
        wide = [p.dtype for p in got if isinstance(p, np.ndarray) and p.dtype.itemsize > 2 and p.dtype.kind == "f"]
        says(not wide, f"float16 in, {wide[0] if wide else ''} out: round to the dtype of the arguments at the end")
    want = tuple(part.astype(np.float16) for part in want)
    expect_parts(got, want, names, " for float16 above 256", {}, order=(1, 0))

    rng = np.random.default_rng(23)
    x, gain = np.ones((3000, 5)) + rng.uniform(-0.1, 0.1, (3000, 5)), np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    x, gain, dy = (part.astype(np.float16) for part in (x, gain, np.full((3000, 5), 0.9)))
    got, want = answer(x, gain, 0.01, dy), rms_by_hand(*(np.asarray(p, np.float64) for p in (x, gain, 0.01, dy)))
    if type(got) is tuple and len(got) == 2 and isinstance(got[1], np.ndarray) and got[1].shape == gain.shape:
        near = np.abs(got[1].astype(np.float64) - 2048) < 64
        says(not near.all(), "the sum over 3000 tokens stops at 2048, as float16 has no 2049: add up in float32")
    want = tuple(part.astype(np.float16) for part in want)
    expect_parts(got, want, names, " for 3000 tokens in float16", {}, order=(1, 0))
