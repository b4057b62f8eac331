"""Grades exercises/ex05_gpt2.py."""

import bisect
import math

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


def is_tuple(got, n, names):
    says(type(got) is tuple and len(got) == n, f"the result should be the tuple ({names}), not {describe(got)}")


def in_float32(value):
    """Arrays of float64, and tuples and dicts of them, in float32."""
    if isinstance(value, dict):
        return {key: in_float32(part) for key, part in value.items()}
    return tuple(map(in_float32, value)) if isinstance(value, tuple) else value.astype(np.float32)


# ---- The activation and its slope

SCALE, CUBIC = math.sqrt(2 / math.pi), 0.044715


def by_number(f, x):
    return np.array([f(float(number)) for number in x.flat]).reshape(x.shape)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(SCALE * (x + CUBIC * x * x * x)))


def gelu_erf(x):
    return by_number(lambda a: a / 2 * (1 + math.erf(a / math.sqrt(2))), x)


@exercise(
    points=1,
    hints=(
        "gelu is a product of x/2 and (1 + tanh(u)). What is the derivative of a product, and what of tanh(u(x))?",
        "gelu' = (1 + t) / 2 + x/2 (1 - t^2) u', with t = tanh(u) and u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2). What is"
        " 0 * inf for a large x?",
        "Where t is 1 or -1 the second part is 0. Under np.errstate(all='ignore') compute it everywhere, then turn NaN"
        " into 0 with np.nan_to_num.",
    ),
)
def test_gelu_and_slope(answer):
    x = np.array([[-2.7, -0.75, -0.1, 4.4, 9.0], [2.7, 0.3, 1.0, -4.1, -0.02], [0.0, 1.9, -1.4, -0.5, -9.0]])
    t, t1 = np.tanh(SCALE * (x + CUBIC * x**3)), 1 + 3 * CUBIC * x**2  # tanh(u), and u' without its factor
    value, slope = gelu_tanh(x), gelu_tanh(x + 1e-30j).imag / 1e-30  # a complex step: no rounding
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    values = {
        "this is the exact GELU, with the error function: GPT-2's weights were trained with the form with tanh": (
            gelu_erf(x)
        ),
        "this is another approximation, x sigmoid(1.702 x): GPT-2's is the one with tanh": x / (1 + np.exp(-1.702 * x)),
        "this is ReLU: GELU lets a little of the negative numbers through": np.maximum(x, 0),
        "this is SiLU, x sigmoid(x): GELU is steeper": x / (1 + np.exp(-x)),
        "this is the derivative: the value comes first": slope,
        "the constant is 0.044715, not 0.44715": x / 2 * (1 + np.tanh(SCALE * (x + 10 * CUBIC * x**3))),
        "the constant is 0.044715, not 0.0044715": x / 2 * (1 + np.tanh(SCALE * (x + CUBIC / 10 * x**3))),
        "u has the cube of x, not its square": x / 2 * (1 + np.tanh(SCALE * (x + CUBIC * x**2))),
        "u has the cube of x: that part is missing": x / 2 * (1 + np.tanh(SCALE * x)),
        "sqrt(2/pi) is missing in u": x / 2 * (1 + np.tanh(x + CUBIC * x**3)),
        "the square root is that of 2/pi, not of 2 alone": x
        / 2
        * (1 + np.tanh(math.sqrt(2) / math.pi * x * (t1 + 2) / 3)),
        "u has the factor sqrt(2/pi), not 2/pi": x / 2 * (1 + np.tanh(2 / math.pi * (x + CUBIC * x**3))),
        "sqrt(2/pi) multiplies the cube, too": x / 2 * (1 + np.tanh(SCALE * x + CUBIC * x**3)),
        "the factor 1/2 is missing": 2 * value,
        "the 1 beside tanh is missing": x / 2 * t,
    }
    slopes = {
        "this is the derivative of the exact GELU, not of the form with tanh": by_number(
            lambda a: (1 + math.erf(a / math.sqrt(2))) / 2, x
        )
        + x * density,
        "the first part is that of the form with tanh, the second that of the exact GELU": (1 + t) / 2 + x * density,
        "this is the value again": value,
        "a product has a derivative of two parts: x also stands inside tanh": (1 + t) / 2,
        "a product has a derivative of two parts: that of x/2, times (1 + tanh), is missing": x
        / 2
        * (1 - t**2)
        * SCALE
        * t1,
        "by the chain rule the derivative of tanh(u) must be multiplied by that of u": (1 + t) / 2 + x / 2 * (1 - t**2),
        "the derivative of u has the factor sqrt(2/pi), too": (1 + t) / 2 + x / 2 * (1 - t**2) * t1,
        "in the derivative of u the cubic part is missing": (1 + t) / 2 + x / 2 * (1 - t**2) * SCALE,
        "the derivative of x^3 is 3 x^2: the 3 is missing": (1 + t) / 2
        + x / 2 * (1 - t**2) * SCALE * (1 + CUBIC * x**2),
        "the derivative of x^3 is 3 x^2, not x^3 or 3 x": (1 + t) / 2
        + x / 2 * (1 - t**2) * SCALE * (1 + 3 * CUBIC * x),
        "the derivative of tanh(u) is 1 - tanh(u)^2, not 1 - tanh(u)": (1 + t) / 2 + x / 2 * (1 - t) * SCALE * t1,
        "the derivative of tanh(u) is 1 - tanh(u)^2, at u and not at x": (1 + t) / 2
        + x / 2 * (1 - np.tanh(x) ** 2) * SCALE * t1,
        "the derivative of tanh(u) is 1 - tanh(u)^2, not 1 + tanh(u)^2": (1 + t) / 2 + x / 2 * (1 + t**2) * SCALE * t1,
        "the factor 1/2 belongs to the second part, too": (1 + t) / 2 + x * (1 - t**2) * SCALE * t1,
        "the factor 1/2 belongs to the first part, too": (1 + t) + x / 2 * (1 - t**2) * SCALE * t1,
        "the second part still has its factor x": (1 + t) / 2 + (1 - t**2) / 2 * SCALE * t1,
        "the two parts are added, not subtracted": (1 + t) / 2 - x / 2 * (1 - t**2) * SCALE * t1,
    }
    got = answer(x)
    is_tuple(got, 2, "gelu(x), gelu'(x)")
    for part, want in zip(
        got, (value, slope)
    ):  # what was worked out is off by 1e-15, a quotient of differences by 1e-10
        near = isinstance(part, np.ndarray) and part.shape == x.shape and np.abs(part - want).max() < 1e-5
        sentence = "nearly right: digits are lost, by a quotient of differences, a rounded sqrt(2/pi) or float32"
        says(not near or part.dtype != want.dtype or same(part, want, 1e-11), sentence)
    expect(got[0], value, what="gelu(x)", mistakes=values)
    expect(got[1], slope, what="gelu'(x)", mistakes=slopes)

    line = np.array([9.0, -9.0, 0.02])
    want = gelu_tanh(line), gelu_tanh(line + 1e-30j).imag / 1e-30
    expect(answer(line), want, what="(gelu(x), gelu'(x)) of one line")

    got, want = answer(x.astype(np.float32)), in_float32((value, slope))
    keeps_float32(got)
    expect(got, want, what="(gelu(x), gelu'(x)) of float32")

    for far in (
        np.array([1e200, -1e200, 1e160, -1e120, 60.0, -60.0]),
        np.array([1e30, -1e30, 1e15, -80.0], np.float32),
    ):
        got, want = answer(far), (np.maximum(far, 0), (far > 0).astype(far.dtype))
        is_tuple(got, 2, "gelu(x), gelu'(x)")
        sentence = "far from 0 the value is NaN: something on the way to it overflows"
        says(not holds(np.isnan, got[0], want[0]), sentence)
        sentence = (
            "far from 0 the derivative is NaN, from 0 * inf: where tanh is flat that part is 0, however large x is"
        )
        says(not holds(np.isnan, got[1], want[1]), sentence)
        sentence = "far from 0 the derivative is infinite: something on the way to it overflows"
        says(not holds(np.isinf, got[1], want[1]), sentence)
        expect(got, want, what=f"(gelu(x), gelu'(x)) of large {far.dtype} numbers")


# ---- Counting, backwards


def gpt2_parameters(C, n_layer, vocab_size, block_size, tied, **changed):
    """The number of parameters; `changed` says which parts are counted otherwise."""
    parts = {
        "tokens": vocab_size * C,
        "positions": block_size * C,
        "attention": 4 * C * (C + 1),
        "mlp": C * 4 * C + 4 * C + 4 * C * C + C,
        "norms": 2 * (C + C),
        "last": C + C,
        "head": 0 if tied else vocab_size * C,
    } | changed
    return sum(n * (n_layer if name in ("attention", "mlp", "norms") else 1) for name, n in parts.items())


def fits(budget, count, head_dim, largest=1 << 20):
    """(width, count) of the largest multiple of head_dim whose count is within the budget; None if there is none."""
    widths = range(head_dim, largest, head_dim)
    i = bisect.bisect_right(widths, budget, key=count)
    return (widths[i - 1], count(widths[i - 1])) if i else None


@exercise(
    points=1,
    hints=(
        "First write a function that counts the parameters for a given width C. Which of its terms grow with C, which"
        " with C^2?",
        "A block has 4 (C^2 + C) in attention, 8 C^2 + 5 C in the MLP and 4 C in its norms. Outside are V C + T C, 2 C,"
        " and V C more for an untied head.",
        "Begin with n_embd = head_dim (ValueError if that is too much) and add head_dim while the next count is still"
        " at most `budget`.",
    ),
)
def test_widest(answer):
    def check(budget, L, V, T, D, tied):
        def count(C, **changed):
            return gpt2_parameters(C, L, V, T, tied, **changed)

        def miscounted(**parts):
            return fits(budget, lambda C: count(C, **{name: part(C) for name, part in parts.items()}), D)

        want = width, number = fits(budget, count, D)
        mistakes = {
            "the head has no bias": miscounted(head=lambda C: V if tied else V * C + V),
            "the embeddings are parameters, too": miscounted(tokens=lambda C: 0, positions=lambda C: 0),
            "the learned positions are missing: their block_size * C numbers are parameters, too": miscounted(
                positions=lambda C: 0
            ),
            "the biases of the linear layers are missing": miscounted(
                attention=lambda C: 4 * C * C, mlp=lambda C: 8 * C * C
            ),
            "the biases are missing, those of the linear layers and of the norms": miscounted(
                attention=lambda C: 4 * C * C, mlp=lambda C: 8 * C * C, norms=lambda C: 2 * C, last=lambda C: C
            ),
            "the biases of attention are missing": miscounted(attention=lambda C: 4 * C * C),
            "the biases of the MLP are missing": miscounted(mlp=lambda C: 8 * C * C),
            "the first bias of the MLP has 4 C numbers, as wide as it is inside": miscounted(
                mlp=lambda C: 8 * C * C + 2 * C
            ),
            "a norm has a gain and a bias, 2 C numbers": miscounted(norms=lambda C: 2 * C, last=lambda C: C),
            "a block has two norms": miscounted(norms=lambda C: 2 * C),
            "the norms are missing": miscounted(norms=lambda C: 0, last=lambda C: 0),
            "the norms of the blocks are missing": miscounted(norms=lambda C: 0),
            "the last norm is missing": miscounted(last=lambda C: 0),
            "attention has four matrices: after q, k and v comes o": miscounted(attention=lambda C: 3 * C * (C + 1)),
            "the MLP has two matrices, up and down": miscounted(mlp=lambda C: 4 * C * C + 4 * C),
            "the MLP is four times wider inside": miscounted(mlp=lambda C: 2 * C * C + 2 * C),
            "this counts the matrices of the blocks only, 12 L C^2": miscounted(
                attention=lambda C: 4 * C * C,
                mlp=lambda C: 8 * C * C,
                norms=lambda C: 0,
                last=lambda C: 0,
                tokens=lambda C: 0,
                positions=lambda C: 0,
                head=lambda C: 0,
            ),
            "this is the nearest that is larger than the budget: `budget` is the most that is allowed": (
                width + D,
                count(width + D),
            ),
            "the width must be a multiple of head_dim": fits(budget, count, 1),
            "the width is the smallest that is possible, not the largest": (D, count(D)),
            "the second number is that of the parameters, not the budget": (width, budget),
            "these are the number of heads and that of parameters: the width is asked for": (width // D, number),
            "the width comes first, then the number": (number, width),
            "only n_layer = 1 is counted: there are more blocks": fits(
                budget, lambda C: gpt2_parameters(C, 1, V, T, tied), D
            ),
        }
        if tied:
            sentence = "the tied head counts twice: it is the embedding matrix again, with one set of parameters"
            mistakes[sentence] = miscounted(head=lambda C: V * C)
            sentence = "the token embedding is missing: its V C numbers are parameters, too"
            mistakes[sentence] = miscounted(tokens=lambda C: 0)
        else:
            sentence = (
                "a head that is not tied is a matrix of its own: embedding and head together have 2 V C parameters"
            )
            mistakes[sentence] = miscounted(head=lambda C: 0)
        if budget == number and width > D:
            sentence = "a model with exactly `budget` parameters is allowed: at most, not less than"
            mistakes[sentence] = (width - D, count(width - D))
        got = answer(budget, n_layer=L, vocab_size=V, block_size=T, head_dim=D, tied=tied)
        is_tuple(got, 2, "n_embd, number of parameters")
        expect(got, want, what="(n_embd, number of parameters)", mistakes=told_apart(want, mistakes))

    def exactly(C, L, V, T, tied):
        return gpt2_parameters(C, L, V, T, tied)

    check(70_000, 3, 101, 17, 8, True)
    check(61_000, 2, 211, 37, 5, False)
    for tied in (True, False):
        least = exactly(21, 5, 50, 30, tied)
        check(least, 5, 50, 30, 7, tied)
        check(least - 1, 5, 50, 30, 7, tied)
    check(1_557_611_200, 48, 50257, 1024, 64, True)  # GPT-2 XL, 1600 wide
    check(10**13 - 1, 96, 50257, 2048, 128, False)
    check(exactly(11, 1, 9, 4, True), 1, 9, 4, 11, True)  # the only width that fits
    for tied in (True, False):
        budget = exactly(11, 1, 9, 4, tied) - 1
        answer.refuses(
            budget,
            n_layer=1,
            vocab_size=9,
            block_size=4,
            head_dim=11,
            tied=tied,
            because=f"even with a width of head_dim = 11 there are {budget + 1} parameters, more than the budget",
        )
    answer.refuses(0, n_layer=2, vocab_size=9, block_size=4, head_dim=2, tied=True, because="no model has 0 parameters")


# ---- A bug hunt: norms and the straight line


def plain_norm(h, axis=-1):
    return (h - h.mean(axis, keepdims=True)) / np.sqrt(h.var(axis, keepdims=True) + h.dtype.type(1e-5))


def mean_of_past(h, A):
    h = h @ A
    return np.cumsum(h, axis=0) / np.arange(1, len(h) + 1, dtype=h.dtype)[:, None]


def rectified(h, M):
    return np.maximum(h @ M, 0)


def decoder_of(layer, last=plain_norm, order=list):
    """A decoder with this layer(x, A, M); everything in float64."""

    def decoder(x, layers):
        x = np.asarray(x, dtype=float)
        for A, M in order([(np.asarray(A, dtype=float), np.asarray(M, dtype=float)) for A, M in layers]):
            x = layer(x, A, M)
        return last(x)

    return decoder


def pre_norm(x, A, M):
    x = x + mean_of_past(plain_norm(x), A)
    return x + rectified(plain_norm(x), M)


def decoder_in_float32(x, layers):
    x = np.asarray(x, np.float32)
    for A, M in layers:
        x = pre_norm(x, np.asarray(A, np.float32), np.asarray(M, np.float32))
    return plain_norm(x)


def decoder_as_a_sum(x, layers):
    """The straight line as a list of all that was ever added to it."""
    line = [np.asarray(x, dtype=float)]
    for A, M in layers:
        line.append(mean_of_past(plain_norm(sum(line)), np.asarray(A, dtype=float)))
        line.append(rectified(plain_norm(sum(line)), np.asarray(M, dtype=float)))
    return plain_norm(sum(line))


def decoder_token_by_token(x, layers):
    """As with a cache: all layers for one token, then the next; sums of what was heard are kept."""
    rows, sums = [], [0.0 for _ in layers]
    for t, row in enumerate(np.asarray(x, dtype=float)):
        for i, (A, M) in enumerate(layers):
            sums[i] = sums[i] + plain_norm(row) @ np.asarray(A)
            row = row + sums[i] / (t + 1)
            row = row + np.maximum(plain_norm(row) @ np.asarray(M), 0)
        rows.append(plain_norm(row))
    return np.stack(rows)


@exercise(
    points=2,
    hints=(
        "What must the result be when all matrices are 0? And with one layer, whose A is 0? Which errors show only with"
        " several layers?",
        "Or write the right decoder yourself, as the docstring says it, and compare: with random x and matrices,"
        " several layers, T and C different.",
        "Take np.random.default_rng(0), x of (4, 6), three pairs of (6, 6), not small; assert that the largest"
        " difference is below 1e-3.",
    ),
)
def test_hunt_pre_norm(answer):
    def on_the_stream(x, A, M):
        x = plain_norm(x)
        x = x + mean_of_past(x, A)
        x = plain_norm(x)
        return x + rectified(x, M)

    def post_norm(x, A, M):
        x = plain_norm(x + mean_of_past(x, A))
        return plain_norm(x + rectified(x, M))

    def norm_of_the_parts(x, A, M):
        x = x + plain_norm(mean_of_past(x, A))
        return x + plain_norm(rectified(x, M))

    def parallel(x, A, M):
        return x + mean_of_past(plain_norm(x), A) + rectified(plain_norm(x), M)

    def no_residual_1(x, A, M):
        x = mean_of_past(plain_norm(x), A)
        return x + rectified(plain_norm(x), M)

    def no_residual_2(x, A, M):
        return rectified(plain_norm(x + mean_of_past(plain_norm(x), A)), M)

    def doubled(x, A, M):
        x = mean_of_past(plain_norm(x), A)
        x = x + x
        return x + rectified(plain_norm(x), M)

    def no_norm_1(x, A, M):
        x = x + mean_of_past(x, A)
        return x + rectified(plain_norm(x), M)

    def no_norm_2(x, A, M):
        x = x + mean_of_past(plain_norm(x), A)
        return x + rectified(x, M)

    def mlp_first(x, A, M):
        x = x + rectified(plain_norm(x), M)
        return x + mean_of_past(plain_norm(x), A)

    def sum_inside(x, A, M):
        x = x + mean_of_past(plain_norm(x) + x, A)
        return x + rectified(plain_norm(x) + x, M)

    def norm_of_all(x, A, M):
        x = x + mean_of_past(plain_norm(x, (0, 1)), A)
        return x + rectified(plain_norm(x, (0, 1)), M)

    def every_layer_from_the_embedding(x, layers):
        x = now = np.asarray(x, dtype=float)
        for A, M in layers:
            now = x + mean_of_past(plain_norm(now), np.asarray(A, dtype=float))
            now = now + rectified(plain_norm(now), np.asarray(M, dtype=float))
        return plain_norm(now)

    hunt(
        answer,
        right={
            "the version that does it line by line": decoder_of(pre_norm),
            "the version that computes in float32": decoder_in_float32,
            "the version that keeps the straight line as a list of what was added": decoder_as_a_sum,
            "the version that goes token by token, with a cache": decoder_token_by_token,
        },
        wrong={
            "the version that adds to the normalised x (Howuhh/faster-trajectory-transformer issue 3)": decoder_of(
                on_the_stream
            ),
            "the version with the norm after each sum, post-norm": decoder_of(post_norm),
            "the version that normalises what the parts return, not what they get": decoder_of(norm_of_the_parts),
            "the version whose MLP does not hear what attention has just added": decoder_of(parallel),
            "the version without a straight line around attention": decoder_of(no_residual_1),
            "the version without a straight line around the MLP": decoder_of(no_residual_2),
            "the version that adds what attention returns to itself (kyegomez/BitNet issue 32)": decoder_of(doubled),
            "the version without a norm before attention": decoder_of(no_norm_1),
            "the version without a norm before the MLP": decoder_of(no_norm_2),
            "the version without the last norm": decoder_of(pre_norm, last=lambda x: x),
            "the version with the MLP before attention": decoder_of(mlp_first),
            "the version that gives norm(x) + x to the parts": decoder_of(sum_inside),
            "the version that normalises over tokens and channels at once": decoder_of(norm_of_all),
            "the version in which all layers have the weights of the first: try several layers": decoder_of(
                pre_norm, order=lambda layers: layers[:1] * len(layers)
            ),
            "the version in which every layer adds to the embedding, not to what the layer before has left: try several"
            " layers": every_layer_from_the_embedding,
        },
    )


# ---- One matrix with two uses


@exercise(
    points=2,
    hints=(
        "embed is used twice. What is the derivative of a loss by a number that stands in two places of a formula?",
        "For the head: for every position, row v of dembed gets dlogits[b, t, v] * y[b, t]. For the table: row ids[b,"
        " t] gets dx[b, t], every time that id comes.",
        "np.einsum('btv,btc->vc', dlogits, y), then np.add.at(dembed, ids, dx), since dembed[ids] += dx loses repeated"
        " ids. dposition: zeros, whose first T rows are dx.sum(0).",
    ),
)
def test_embedding_gradients(answer):
    def fixture(B, T, C, V, seed):
        rng = np.random.default_rng(seed)
        ids = rng.integers(1, V - 1, (B, T))  # two tokens never come
        ids.flat[-1] = ids.flat[0]
        return ids, *(rng.standard_normal((B, T, n)) + 0.3 for n in (C, C, V))

    def gradients(ids, dx, y, dlogits, block_size):
        """Number by number."""
        (B, T, C), V = dx.shape, dlogits.shape[2]
        dembed, dposition = np.zeros((V, C)), np.zeros((block_size, C))
        for b in range(B):
            for t in range(T):
                dembed[ids[b, t]] += dx[b, t]
                dposition[t] += dx[b, t]
                for v in range(V):
                    dembed[v] += dlogits[b, t, v] * y[b, t]
        return dembed, dposition

    for B, T, C, V, block_size in ((3, 4, 5, 7, 6), (1, 5, 2, 4, 5), (4, 1, 3, 6, 2), (2, 6, 4, 5, 8)):
        ids, dx, y, dlogits = fixture(B, T, C, V, seed=B + T)
        want = gradients(ids, dx, y, dlogits, block_size)
        head, position = np.tensordot(dlogits, y, ((0, 1), (0, 1))), want[1]
        table = want[0] - head
        often = np.maximum(np.bincount(ids.ravel(), minlength=V), 1)[:, None]
        once, instead, first = head.copy(), head.copy(), np.zeros((V, C))
        once[ids] += dx
        instead[ids] = dx
        for b, t in np.ndindex(B, T):
            first[ids[b, t]] = dx[b, t] if not first[ids[b, t]].any() else first[ids[b, t]]
        used = np.isin(np.arange(V), ids)[:, None]
        embeds = {
            "a token that comes several times gets only one of its derivatives: dembed[ids] += dx does not add up equal"
            " ids": once,
            "a token that comes several times gets only the first of its derivatives": head + first,
            "what the head has collected is overwritten: both uses add to the same gradient": instead,
            "this is the gradient of the head alone: the matrix is also the table from which x was taken": head,
            "this is the gradient of the table alone: the matrix is also the head": table,
            "the two uses are averaged: their gradients are added": want[0] / 2,
            "a token that comes several times gets the mean of its derivatives: the loss changes by their sum": head
            + table / often,
            "the head's part goes only to tokens of the text, but every token has a logit": table + head * used,
            "the gradient of the head is dlogits.T @ y, not dlogits.T @ dx": table
            + np.tensordot(dlogits, dx, ((0, 1), (0, 1))),
            "the table's gradient is made of dx, not of y": head
            + np.stack([(y * (ids == v)[..., None]).sum((0, 1)) for v in range(V)]),
            "the two uses are subtracted: their gradients are added": head - table,
            "the gradient is divided by the size of the batch: the sum over all texts is meant": want[0] / B,
            "only the table's part is divided by the size of the batch: both are sums over all texts": head + table / B,
            "only the head's part is divided by the size of the batch: both are sums over all texts": table + head / B,
            "only the first text of the batch is looked at": gradients(ids[:1], dx[:1], y[:1], dlogits[:1], block_size)[
                0
            ],
            "the head's part looks at the last position only, but every position has logits": table
            + dlogits[:, -1].T @ y[:, -1],
        }
        rows = np.zeros_like(position)
        rows[block_size - T :] = dx.sum(0)
        every = np.zeros_like(position)
        every[:T] = dx.sum((0, 1))
        by_text = np.zeros_like(position)
        by_text[:T] = dx[0]
        last_text = np.zeros_like(position)
        last_text[:T] = dx[-1]
        positions = {
            "x is a sum, and both of its parts get the whole of dx: no halves": position / 2,
            "the rows of the positions get the mean over the batch: the loss changes by the sum": position / B,
            "the T tokens stand at the positions 0 to T - 1, the first rows of the table": rows,
            "every position gets the sum over all positions: row t gets that of dx[:, t]": every,
            "only the first text of the batch is looked at: all use the same positions": by_text,
            "only the last text of the batch counts, the others are overwritten: all use the same positions": last_text,
            "the positions learn, too: this is 0": np.zeros_like(position),
        }
        got = answer(ids, dx, y, dlogits, block_size)
        is_tuple(got, 2, "dembed, dposition")
        where = f" for B = {B}, T = {T}, block_size = {block_size}"
        expect(got[0], want[0], what=f"dembed{where}", mistakes=told_apart(want[0], embeds))
        short = isinstance(got[1], np.ndarray) and got[1].shape == (T, C) != position.shape
        says(not short, "dposition has a row for every position that the table has; those behind the text get 0")
        expect(got[1], want[1], what=f"dposition{where}", mistakes=told_apart(want[1], positions))

    ids, *rest = fixture(2, 3, 4, 5, seed=1)
    small = in_float32(tuple(rest))
    got, want = answer(ids, *small, 4), in_float32(gradients(ids, *rest, 4))
    keeps_float32(got)
    expect(got, want, what="(dembed, dposition) for float32")


# ---- A loss in pieces


class Head:
    """Gives out logits, takes their derivatives back, and watches over what was agreed on."""

    def __init__(self, logits, rows):
        self.logits, self.rows, self.problem = logits, rows, ""
        self.slopes = np.zeros(logits.shape)
        self.piece, self.given, self.back_at = range(0), set(), set()

    def wrong(self, sentence):
        self.problem = self.problem or sentence

    def scores(self, start, stop):
        start, stop = int(start), int(stop)
        if not 0 <= start < stop or start >= len(self.logits):
            if 0 < stop <= start < len(self.logits):
                self.wrong(f"scores({start}, {stop}): the second number says where a piece ends, not how long it is")
            self.wrong(
                f"it asks for the rows {start} to {stop - 1}, but there are the rows 0 to {len(self.logits) - 1}"
            )
            raise ValueError("there are no such rows")
        if stop - start > self.rows:
            self.wrong(f"it asks for {stop - start} rows of logits at a time, but only {self.rows} are allowed")
        self.piece = range(start, min(stop, len(self.logits)))
        if self.given & set(self.piece):
            again = "it asks for the same logits twice, and they are the expensive part"
            self.wrong(f"{again}: use them for both, the loss and its gradient")
        self.given |= set(self.piece)
        return self.logits[start:stop].copy()

    def back(self, start, slopes):
        slopes = np.asarray(slopes)
        right_shape = slopes.ndim == 2 and slopes.shape[1] == self.logits.shape[1]
        if not right_shape:
            self.wrong(f"slopes of the shape {slopes.shape} come back: for n rows they should be (n, V)")
            raise ValueError("slopes of n rows have the shape (n, V)")
        which = range(int(start), int(start) + len(slopes))
        if not set(which) <= set(self.piece):
            rows = f"row {which.start}" if len(which) == 1 else f"the rows {which.start} to {which.stop - 1}"
            piece = f"the piece it has asked for last are the rows {self.piece.start} to {self.piece.stop - 1}"
            self.wrong(f"it hands over the slopes of {rows}, but {piece}: keep no more than a piece")
            raise ValueError("these rows are not in the piece")
        if set(which) & self.back_at:
            self.wrong("it hands over the slopes of a row twice: they are added up")
        self.back_at |= set(which)
        if slopes.dtype != self.logits.dtype:
            self.wrong(f"slopes for {self.logits.dtype} logits should be {self.logits.dtype}, not {slopes.dtype}")
        self.slopes[which] += slopes


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def surprises(logits, targets):
    """Of every row; of a row that is not counted, 0."""
    lines = [0.0 if t == -100 else np.logaddexp.reduce(line) - line[t] for line, t in zip(logits, targets)]
    return np.array(lines, dtype=float)


@exercise(
    points=2,
    hints=(
        "Which number must be known before the first piece, so that its slopes can be divided by it?",
        "The slopes of a counted row are (softmax - the one-hot row of its target) / number of all counted rows. To"
        " pick one logit of each row: logits[np.arange(n), targets].",
        "number = max((targets != -100).sum(), 1). For each piece: take off the row maximum, log of the sum of exp;"
        " slopes = softmax; subtract 1 at the targets; set rows of -100 to 0; divide.",
    ),
)
def test_loss_in_pieces(answer):
    def check(logits, targets, rows, where, named=True, tol=None):
        N, V = logits.shape
        counted = targets != -100
        number = max(counted.sum(), 1)
        exact = logits.astype(float)
        cost, p = surprises(exact, targets), softmax(exact)
        loss = cost.sum() / number
        hot = np.zeros((N, V))
        hot[np.flatnonzero(counted), targets[counted]] = 1
        slopes = (p * counted[:, None] - hot) / number
        pieces = [slice(start, start + rows) for start in range(0, N, rows)]
        # Where a piece has no counted row, its mean may be taken for 0 or for NaN.
        means = [cost[piece].sum() / max(counted[piece].sum(), 1) for piece in pieces]
        sizes = np.concatenate([np.full(len(counted[piece]), max(counted[piece].sum(), 1)) for piece in pieces])
        full = N // rows * rows
        last = pieces[-1]
        losses, grads = {}, {}
        if named:
            added = {
                eps: -np.log((p * hot).sum(1) + eps) @ counted / number for eps in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
            }
            clipped = surprises(exact, np.maximum(targets, 0))
            losses = {
                "the mean is that over all rows: rows with -100 are not counted": cost.sum() / N,
                "it takes the mean of the pieces' means: a row in a piece with few of them has more weight": np.mean(
                    means
                ),
                "the means of the pieces are added up, so the loss grows with their number (NVIDIA-NeMo/Automodel pull"
                " request 3804)": np.sum(means),
                "this is the sum over the counted rows: divide by their number": cost.sum(),
                "rows with -100 are counted as if 0 were their answer": clipped.sum() / N,
                "rows with -100 are in the sum, as if 0 were their answer": clipped.sum() / number,
                "this is in bits: nats have the natural logarithm": loss / math.log(2),
                **{
                    f"{eps} is added before the logarithm, which changes every surprise": value
                    for eps, value in added.items()
                },
                "the rows behind the last full piece are left out": cost[:full].sum() / max(counted[:full].sum(), 1),
                "the rows behind the last full piece are left out of the sum": cost[:full].sum() / number,
                "this is the loss of the last piece": cost[last].sum() / max(counted[last].sum(), 1),
                "the sign is turned round: a surprise is positive": -loss,
                "this is a mean of probabilities: the surprise is minus the logarithm": (p * hot).sum() / number,
                "this is minus the mean logit of the right answers, without the logarithm of the sum": -(
                    exact * hot
                ).sum()
                / number,
            }
            if V >= 100:
                wrapped = surprises(exact, np.where(counted, targets, V - 100))
                losses |= {
                    "-100 is taken for an index: logits[:, -100] is the hundredth from the end": wrapped.sum() / N,
                    "in the sum -100 is taken for an index: logits[:, -100] is the hundredth of the end": wrapped.sum()
                    / number,
                }
            grads = {
                "the slopes are those of the sum: the loss is a mean, so divide by the number of counted rows": slopes
                * number,
                "the slopes are divided by the number of all rows: those with -100 are not counted": slopes
                * number
                / N,
                "the slopes are divided by the number of counted rows of their piece: it must be that of all": slopes
                * (number / sizes)[:, None],
                "the slopes are divided by the number of rows in their piece: take that of all counted rows": slopes
                * number
                / np.concatenate([np.full(len(counted[piece]), len(counted[piece])) for piece in pieces])[:, None],
                "the slopes are divided by `rows`: it must be the number of all counted rows": slopes * number / rows,
                "rows with -100 have slopes: they are not counted, so nothing depends on their logits": (p - hot)
                / number,
                "these are the softmax weights: at the right answer 1 must be taken off": p * counted[:, None] / number,
                "these are the softmax weights, also of rows that are not counted": p / number,
                "the slopes have the wrong sign: less loss means more score for the right answer": -slopes,
                "1 is taken off after the division: divide the difference": p * counted[:, None] / number - hot,
            }
            one_for_all = np.concatenate([np.tile(hot[piece].max(0), (len(hot[piece]), 1)) for piece in pieces])
            taken = (p - one_for_all) * counted[:, None] / number
            grads["1 is taken off at the answers of all rows of the piece: slopes[:, targets] means every row"] = taken
            grads["1 is taken off at the answers of all rows of the piece, and rows with -100 have slopes"] = (
                p - one_for_all
            ) / number
            if V >= 100:
                at = hot.copy()
                at[~counted, V - 100] = 1
                grads["-100 is taken for an index: slopes[:, -100] is the hundredth from the end"] = (p - at) / number
        head = Head(logits, rows)
        try:
            got = answer(head.scores, head.back, targets=targets, rows=rows)
        except Raised as raised:
            if not head.problem:
                raise
            raise Wrong(head.problem, *raised.details, trace=raised.trace) from None
        says(not head.problem, head.problem)
        what = f"the loss{where}"
        number_like = isinstance(got, float | np.floating)
        says(not (number_like and np.isnan(got)), f"{what} is NaN")
        lost = "a weight that was rounded to 0 has lost its logarithm, or exp has overflowed"
        says(not (number_like and np.isinf(got)), f"{what} is infinite: {lost}")
        losses = {sentence: value for sentence, value in losses.items() if not same(value, loss, tol)}
        expect(got, loss, what=what, mistakes=losses, tol=tol)
        missing = sorted(set(np.flatnonzero(counted).tolist()) - head.back_at)
        says(not missing, f"the slopes of row {missing[0] if missing else ''} never come back")
        says(not np.isnan(head.slopes).any(), f"there is NaN in the slopes{where}")
        grads = {sentence: value for sentence, value in grads.items() if not same(value, slopes, tol)}
        expect(head.slopes, slopes, what=f"the slopes{where}", mistakes=grads, tol=tol)

    rng = np.random.default_rng(3)
    # Of the 8 rows 5 count. Pieces of 3 have 1, 3 and 1 of them.
    logits, targets = 2 * rng.standard_normal((8, 113)), np.array([7, -100, -100, 30, 101, 2, -100, 60])
    check(logits, targets, 3, " of 8 rows in pieces of 3")
    check(logits[:, :6], np.array([5, 5, -100, 1, 0, 3, 3, -100]), 4, " of 8 rows in pieces of 4")
    check(logits[:5, :7], np.array([-100, 6, 2, 0, 0]), 1, " of 5 rows, one by one")
    check(logits[:5, :9], np.array([1, 8, -100, 0, 2]), 12, " of 5 rows with rows = 12")
    check(logits[:7, :4], np.array([-100, -100, 3, 0, -100, 1, 2]), 2, " where a piece has no counted row", named=False)
    check(logits[:3, :5], np.array([-100, 4, -100]), 2, " where one row is counted", named=False)
    check(logits[:3, :5], np.array([-100, -100, -100]), 2, " where no row is counted", named=False)
    large = logits[:4, :5] * 400
    large[1] -= 5000
    large[2] += 900
    check(large, np.array([3, 0, 4, 1]), 3, " for logits of 1000 and more", named=False, tol=1e-9)
    check(logits[:, :20].astype(np.float32), np.minimum(targets, 19), 3, " for float32", named=False, tol=1e-5)


# ---- A block from the file


def random_weights(C, rng):
    shapes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    weights = {
        f"{name}.weight": rng.standard_normal(shape) * 1.5 / math.sqrt(shape[0]) for name, shape in shapes.items()
    }
    weights |= {f"{name}.bias": 0.5 * rng.standard_normal(shape[1]) for name, shape in shapes.items()}
    for name in ("ln_1", "ln_2"):
        weights |= {f"{name}.weight": 1 + 0.4 * rng.standard_normal(C), f"{name}.bias": 0.5 * rng.standard_normal(C)}
    return weights


def reference_norm(x, gain, bias, how="right"):
    """Row by row, with a mistake in it if told so."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        n = len(row)
        mean = math.fsum(row) / n if how != "no mean" else 0.0
        variance = math.fsum((row - mean) ** 2) / (n - 1 if how == "unbiased" else n)
        eps = {"1e-6": 1e-6, "1e-8": 1e-8, "1e-12": 1e-12, "no eps": 0.0}.get(how, 1e-5)
        std = math.sqrt(variance) + 1e-5 if how == "eps outside" else math.sqrt(variance + eps)
        n = (row - mean) / std
        rows.append(
            {"no gain": n + bias, "no bias": n * gain, "plain": n, "one more": n * (1 + gain) + bias}.get(
                how, n * gain + bias
            )
        )
    return np.array(rows).reshape(x.shape)


def reference_block(x, w, H, form="pre", norm="right", act=gelu_tanh, split="thirds", order="qkv", merge="heads", **o):
    """One text and one head at a time. The options are mistakes."""
    B, T, C = x.shape
    D = C // H
    bias = 0 if o.get("no_biases") else 1

    def linear(h, name):
        W = w[f"{name}.weight"]
        return h @ (W.T if o.get("turned") == name else W) + bias * w[f"{name}.bias"]

    def ln(h, name):
        name = {"swapped": {"ln_1": "ln_2", "ln_2": "ln_1"}[name], "first": "ln_1"}.get(o.get("norms"), name)
        return reference_norm(h, w[f"{name}.weight"], w[f"{name}.bias"], norm)

    def attend(h):
        qkv = linear(h, "attn.c_attn")
        y = np.empty((B, T, C))
        for b in range(B):
            heads = []
            for i in range(H):
                third = {letter: n for n, letter in enumerate(order)}
                if split == "thirds":
                    q, k, v = (qkv[b][:, third[a] * C + i * D :][:, :D] for a in "qkv")
                elif split == "heads first":
                    q, k, v = (qkv[b][:, i * 3 * D + third[a] * D :][:, :D] for a in "qkv")
                elif split == "last":
                    q, k, v = (qkv[b][:, i * 3 * D + third[a] :: 3][:, :D] for a in "qkv")
                elif split == "strided":
                    q, k, v = (qkv[b][:, third[a] * C + i : (third[a] + 1) * C : H] for a in "qkv")
                elif split == "reshaped":  # (T, C) -> (H, T, D) without a transposition
                    q, k, v = (qkv[b][:, third[a] * C :][:, :C].reshape(H, T, D)[i] for a in "qkv")
                scores = q @ k.T * o.get("scale", D**-0.5)
                seen = np.tri(T, T, o.get("offset", 0), dtype=bool)
                if o.get("after"):
                    weights = softmax(scores) * seen
                else:
                    weights = softmax(np.where(seen, scores, o.get("hide", -np.inf)))
                heads.append(weights @ v)
            y[b] = np.concatenate(heads, axis=1) if merge == "heads" else np.stack(heads).reshape(T, C)
        return y if o.get("no_projection") else linear(y, "attn.c_proj")

    def mlp(h):
        inner = linear(h, "mlp.c_fc")
        if o.get("late"):
            return act(linear(inner, "mlp.c_proj"))
        return linear(act(inner), "mlp.c_proj")

    x = x.astype(float)
    if form == "pre":
        x = x + attend(ln(x, "ln_1"))
        return x + mlp(ln(x, "ln_2"))
    if form == "post":
        x = ln(x + attend(x), "ln_1")
        return ln(x + mlp(x), "ln_2")
    if form == "stream":
        x = ln(x, "ln_1")
        x = ln(x + attend(x), "ln_2")
        return x + mlp(x)
    if form == "stream 2":
        x = ln(x + attend(ln(x, "ln_1")), "ln_2")
        return x + mlp(x)
    if form == "parallel":
        return x + attend(ln(x, "ln_1")) + mlp(ln(x, "ln_2"))
    if form == "lost":
        return x + mlp(ln(x + attend(ln(x, "ln_1")), "ln_2"))
    if form == "no residual 1":
        x = attend(ln(x, "ln_1"))
        return x + mlp(ln(x, "ln_2"))
    if form == "no residual 2":
        return mlp(ln(x + attend(ln(x, "ln_1")), "ln_2"))
    if form == "no residuals":
        return mlp(ln(attend(ln(x, "ln_1")), "ln_2"))
    if form == "no norm 1":
        x = x + attend(x)
        return x + mlp(ln(x, "ln_2"))
    if form == "no norm 2":
        x = x + attend(ln(x, "ln_1"))
        return x + mlp(x)
    if form == "mlp first":
        x = x + mlp(ln(x, "ln_2"))
        return x + attend(ln(x, "ln_1"))
    if form == "attention only":
        return x + attend(ln(x, "ln_1"))
    raise ValueError(form)


BLOCK_MISTAKES = {
    "the columns are cut by heads first: all of q comes first, then all of k, then all of v": {"split": "heads first"},
    "the columns are cut by heads first, with q, k and v in turn: all of q comes first, then all of k, then v": {
        "split": "last"
    },
    "a head has D neighbouring columns of q, of k and of v: here the heads alternate": {"split": "strided"},
    "q, k and v are cut into heads by a reshape to (B, H, T, D): cut to (B, T, H, D), then exchange two axes": {
        "split": "reshaped"
    },
    "the heads are joined by a reshape of (B, H, T, D): first exchange two axes, to (B, T, H, D)": {"merge": "rows"},
    "heads are cut and joined by a reshape alone: it takes an exchange of two axes, there and back": {
        "split": "reshaped",
        "merge": "rows",
    },
    "q and k are exchanged: q is the first third, and a row of the scores belongs to a query": {"order": "kqv"},
    "the thirds are q, k, v, in this order, not v, k, q": {"order": "vkq"},
    "the thirds are q, k, v, in this order, not q, v, k": {"order": "qvk"},
    "attn.c_proj.weight is turned round: it is (in, out), though being square it fits either way": {
        "turned": "attn.c_proj"
    },
    "the projection after attention is missing: attn.c_proj": {"no_projection": True},
    "the biases of the linear layers are missing": {"no_biases": True},
    "the future is visible": {"offset": 1 << 20},
    "a token sees one token of its future": {"offset": 1},
    "the future is hidden after softmax: it is still in the sum by which softmax divides": {"after": True},
    "a hidden score becomes 0, which still gets a weight: hide it by -inf": {"hide": 0.0},
    "the scores are not divided by the square root of a head's width": {"scale": 1.0},
    "this is post-norm, x = norm(x + part(x)): GPT-2 is pre-norm": {"form": "post"},
    "the parts add to the normalised x: the norm is only for what the part reads": {"form": "stream"},
    "the MLP adds to the normalised x: the norm is only for what the MLP reads": {"form": "stream 2"},
    "the MLP does not hear what attention has just added": {"form": "parallel"},
    "the MLP adds to what the block got, so that attention's part is lost": {"form": "lost"},
    "attention's part replaces x instead of being added to it": {"form": "no residual 1"},
    "the MLP's part replaces x instead of being added to it": {"form": "no residual 2"},
    "the two parts replace x instead of being added to it": {"form": "no residuals"},
    "the norm before attention is missing": {"form": "no norm 1"},
    "the norm before the MLP is missing": {"form": "no norm 2"},
    "the MLP comes before attention": {"form": "mlp first"},
    "the MLP is missing": {"form": "attention only"},
    "ln_1 is the norm before attention, ln_2 that before the MLP: they are exchanged": {"norms": "swapped"},
    "both norms are ln_1: the MLP has its own, ln_2": {"norms": "first"},
    "this is the exact GELU, with the error function: GPT-2's weights were trained with the form with tanh": {
        "act": gelu_erf
    },
    "this is another GELU, x sigmoid(1.702 x): GPT-2's is the one with tanh": {
        "act": lambda x: x / (1 + np.exp(-1.702 * x))
    },
    "the MLP has ReLU: GPT-2 has GELU": {"act": lambda x: np.maximum(x, 0)},
    "the MLP has no GELU between its layers": {"act": lambda x: x},
    "GELU stands between the two layers of the MLP, not after them": {"late": True},
    "the variance in a norm is divided by C - 1: LayerNorm divides by C": {"norm": "unbiased"},
    "eps is added to the standard deviation: it belongs to the variance, under the root": {"norm": "eps outside"},
    "the eps of the norms is 1e-6: GPT-2's is 1e-5": {"norm": "1e-6"},
    "the eps of the norms is 1e-8: GPT-2's is 1e-5": {"norm": "1e-8"},
    "the eps of the norms is 1e-12: GPT-2's is 1e-5": {"norm": "1e-12"},
    "the norms have no eps: GPT-2's is 1e-5": {"norm": "no eps"},
    "the norms do not take the mean off": {"norm": "no mean"},
    "the gain of the norms is missing": {"norm": "no gain"},
    "the bias of the norms is missing": {"norm": "no bias"},
    "gain and bias of the norms are missing": {"norm": "plain"},
    "the norms multiply by 1 + gain: GPT-2's gains are the factor itself": {"norm": "one more"},
}


@exercise(
    points=3,
    hints=(
        "Write a helper for a norm and one for x @ W + b by name. Then the block is two lines: x + attention(norm(x)),"
        " x + mlp(norm(x)). What shape has the output of c_attn?",
        "q, k, v = np.split(h @ W + b, 3, axis=-1); each is reshaped to (B, T, H, D) and its axes 1 and 2 are"
        " exchanged. After attention the same way back.",
        "scores = q @ k.swapaxes(2, 3) / math.sqrt(D), -inf where np.tri(T) is 0; softmax by hand with the row maximum"
        " taken off; y.swapaxes(1, 2).reshape(B, T, C). GELU is gelu_and_slope(h)[0].",
    ),
)
def test_gpt2_block(answer):
    def fixture(B, T, C, seed):
        rng = np.random.default_rng(seed)
        return 1.2 * rng.standard_normal((B, T, C)) + 0.4, random_weights(C, rng)

    for B, T, C, H in ((2, 5, 12, 3), (3, 4, 10, 5), (1, 1, 6, 2), (2, 3, 7, 1)):
        x, weights = fixture(B, T, C, seed=C)
        D, want = C // H, reference_block(x, weights, H)
        wrong = BLOCK_MISTAKES | {
            "the scores are divided by the square root of all C channels: take the width of a head": {"scale": C**-0.5},
            "the scores are divided by the width of a head, not by its square root": {"scale": 1 / D},
            "the scores are multiplied by the square root of a head's width: divide": {"scale": D**0.5},
        }
        values = {sentence: reference_block(x, weights, H, **options) for sentence, options in wrong.items()}
        got = answer(x, weights, n_head=H)
        expect(got, want, what=f"the result for {H} heads", mistakes=told_apart(want, values))

    x, weights = fixture(2, 4, 8, seed=30)
    weights["attn.c_attn.weight"][:, :16] *= 20  # scores around 1000, which rounds them: hence the tolerance
    got, want = answer(x, weights, n_head=2), reference_block(x, weights, 2)
    sentence = "scores of 1000 make exp overflow, or spoil a row from the future: hide the future, then take off the"
    says(not holds(infinite, got, want), f"{sentence} largest of each row")
    heard = [reference_block(x, weights, 2, hide=score) for score in (-1.0, -10.0, -100.0, -1000.0)]
    says(
        same(got, want, 1e-7) or not any(same(got, wrong, 1e-7) for wrong in heard),
        "a hidden token is heard where the visible scores are very low: only -inf hides it beside any score",
    )
    expect(got, want, what="the result for scores of 1000", tol=1e-7)

    x, weights = fixture(2, 3, 6, seed=31)
    flat = x * 0.003  # with a variance of 1e-5 the eps is as large as the variance
    for name in ("attn.c_proj.weight", "attn.c_proj.bias"):
        weights[name] = weights[name] * 0.001
    expect(answer(flat, weights, n_head=2), reference_block(flat, weights, 2), what="the result for x of 0.003")

    small, weights = in_float32(x), in_float32(fixture(2, 3, 6, seed=31)[1])
    got, want = answer(small, weights, n_head=3), in_float32(reference_block(small, weights, 3))
    keeps_float32(got)
    expect(got, want, what="the result for float32", tol=1e-4)


# ---- LayerNorm, backwards


def norm_derivatives(x, gain, dy, eps):
    """By complex steps: f(x + ih) = f(x) + ih f'(x), so the imaginary part holds the derivative, with no rounding."""

    def loss(x, gain, bias):
        centred = x - x.mean(-1, keepdims=True)
        return (dy * (gain * centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) + bias)).sum()

    found = []
    for which in range(3):
        parts = x, gain, np.zeros_like(gain)
        slopes = np.empty(parts[which].shape)
        for place in np.ndindex(slopes.shape):
            moved = [part.astype(complex) for part in parts]
            moved[which][place] += 1e-30j
            slopes[place] = loss(*moved).imag / 1e-30
        found.append(slopes)
    return tuple(found)


def norm_by_hand(x, gain, dy, eps, mean=1.0, projection=1.0, how="right", sums="right"):
    """A backward pass with a mistake in it."""
    axis = {"all": tuple(range(x.ndim)), "first": 0}.get(how, -1)
    C = x.shape[-1]
    centred = x - x.mean(axis, keepdims=True)
    variance = (centred * centred).mean(axis, keepdims=True)
    if how == "unbiased":
        variance = variance * C / (C - 1)
    std = np.sqrt(variance) + eps if how == "eps outside" else np.sqrt(variance + (0 if how == "no eps" else eps))
    n = centred / std
    dn = {"no gain": dy, "gain last": dy}.get(how, dy * gain)
    if how == "plain variance":  # n in the third term is centred / the root of the variance alone
        third = centred / np.sqrt(variance + 1e-300)
    else:
        third = centred if how == "centred" else n
    inner = dn * (x if how == "raw" else third)
    dx = dn - mean * dn.mean(axis, keepdims=True) - projection * third * inner.mean(axis, keepdims=True)
    if how == "sums":
        dx = dn - dn.sum(axis, keepdims=True) - n * (dn * n).sum(axis, keepdims=True)
    if how == "squares":
        dx = dn - dn.mean(axis, keepdims=True) - n * n * dn
    dx = dx * {"no std": 1.0, "times std": std, "variance": 1 / std**2}.get(how, 1 / std)
    if how == "gain last":
        dx = dx * gain
    rows = tuple(range(x.ndim - 1))
    per_gain = {"x": dy * x, "centred": dy * centred, "gain": dy * n * gain, "y": dy * n / gain}.get(sums, dy * n)
    add = np.mean if sums == "mean" else np.sum
    dgain, dbias = add(per_gain, axis=rows), add(dy * gain if sums == "gain" else dy, axis=rows)
    return (dx, dbias, dgain) if sums == "exchanged" else (dx, dgain, dbias)


@exercise(
    points=3,
    hints=(
        "Begin at the end: y = gain * n + bias. What are dbias, dgain and dn? Over which axes must be summed, since all"
        " rows share one gain?",
        "For one row: x_j - mean changes by 1 - 1/C or -1/C when x_i grows, and the variance by 2 (x_i - mean) / C."
        " Put that into the derivative of centred_j / sqrt(variance + eps), and sum dn_j times it over j.",
        "dx = (dn - mean(dn) - n * mean(dn * n)) / sqrt(variance + eps), both means over the row, with dn = dy * gain.",
    ),
)
def test_layer_norm_backward(answer):
    def fixture(shape, seed):
        rng = np.random.default_rng(seed)
        return (
            2 * rng.standard_normal(shape) + 0.7,
            1 + 0.5 * rng.standard_normal(shape[-1]),
            rng.standard_normal(shape) + 0.4,
        )

    def check(got, want, where, mistakes, **options):
        is_tuple(got, 3, "dx, dgain, dbias")
        for i in (2, 1, 0):  # the way backwards
            named = told_apart(want[i], {sentence: value[i] for sentence, value in mistakes.items()})
            expect(got[i], want[i], what=f"{('dx', 'dgain', 'dbias')[i]}{where}", mistakes=named, **options)

    for shape, eps in (((2, 3, 5), 0.3), ((4, 6), 2.0), ((2, 2, 3, 4), 0.5), ((7,), 1.0)):
        args = *fixture(shape, seed=len(shape)), eps
        wrong = {
            "dgain and dbias are exchanged: dbias is the sum of dy": {"sums": "exchanged"},
            "dgain and dbias are means over the rows: the loss changes by the sum": {"sums": "mean"},
            "dgain is made of x: the gain multiplies the normalised x": {"sums": "x"},
            "dgain is made of x - mean: the gain multiplies the normalised x, divided by the root": {"sums": "centred"},
            "the gain stands in dgain or dbias: y = gain * n + bias, so dgain has n alone, and dbias dy alone": {
                "sums": "gain"
            },
            "a row's mean depends on each of its entries: the mean of dn must be taken off": {"mean": 0.0},
            "the mean of dn is taken off twice (tenstorrent/tt-metal issue 53204)": {"mean": 2.0},
            "the mean of dn is added: take it off": {"mean": -1.0},
            "a row's variance depends on each of its entries: n * mean(dn * n) must be taken off": {"projection": 0.0},
            "the part that comes through the variance is there twice: the 2 of the square and the 1/2 of the root"
            " cancel": {"projection": 2.0},
            "the part that comes through the variance is there by half: the 2 of the square and the 1/2 of the root"
            " cancel": {"projection": 0.5},
            "the part that comes through the variance is added: take it off": {"projection": -1.0},
            "mean and variance are taken for constants: both depend on each entry of the row": {
                "mean": 0.0,
                "projection": 0.0,
            },
            "the gain is missing in dx: dn = dy * gain": {"how": "no gain"},
            "the gain multiplies at the end, but it must be inside of the two means": {"how": "gain last"},
            "the variance is divided by C - 1: LayerNorm divides by C": {"how": "unbiased"},
            "eps is added to the standard deviation: it belongs to the variance, under the root": {
                "how": "eps outside"
            },
            "eps is not added: the root is that of variance + eps": {"how": "no eps"},
            "in the part that comes through the variance n is divided by the root of the variance without eps": {
                "how": "plain variance"
            },
            "in the part that comes through the variance stands x - mean instead of n": {"how": "centred"},
            "in the mean of dn * n stands x instead of n": {"how": "raw"},
            "sums are taken off where means over the row must be": {"how": "sums"},
            "the variance couples all entries of a row: n * mean(dn * n), a mean and not n^2 dn": {"how": "squares"},
            "dx is not divided by the standard deviation": {"how": "no std"},
            "dx is multiplied by the standard deviation: divide": {"how": "times std"},
            "dx is divided by the variance: divide by its root": {"how": "variance"},
        }
        if len(shape) > 1:
            wrong |= {
                "mean and variance are those of the whole array: each row has its own": {"how": "all"},
                "mean and variance go over the first axis: each row, over the last axis, has its own": {"how": "first"},
            }
        mistakes = {sentence: norm_by_hand(*args, **options) for sentence, options in wrong.items()}
        dx, dgain, dbias = norm_by_hand(*args)
        mistakes["these are the derivatives with the sign turned round"] = -dx, -dgain, -dbias
        got, C = answer(*args), shape[-1]
        if type(got) is tuple and len(got) == 3:
            rows = [x for x in got[1:] if isinstance(x, np.ndarray) and x.shape != (C,) and x.shape[-1:] == (C,)]
            sentence = "all rows, of all axes before the last, share one gain and one bias: add up over all these axes"
            says(not rows, sentence, f"shapes  {', '.join(describe(np.shape(x)) for x in got[1:])}")
        check(got, norm_derivatives(*args), f" for x of shape {shape}", mistakes)

    x, gain, dy = fixture((3, 4), seed=9)
    x[0] += 1e6  # which rounds it to ten digits: hence the tolerance
    x[2] -= 2e6
    got, want = answer(x, gain, dy, 0.1), norm_derivatives(x, gain, dy, 0.1)
    is_tuple(got, 3, "dx, dgain, dbias")
    lost = (
        "in rows around 1e6 all digits are lost: mean(x^2) - mean(x)^2 is a difference of two huge numbers, so take the"
        " mean off before squaring"
    )
    says(
        not holds(np.isnan, got, want) and (same(got[0], want[0], 1e-7) or not same(got[0][1], want[0][1], 1e-7)), lost
    )
    check(got, want, " for rows around 1e6", {}, tol=1e-7)
    x[1] = -2.0
    x[0], x[2] = 0.5, 3.0
    got, want = answer(x, gain, dy, 0.1), norm_derivatives(x, gain, dy, 0.1)
    says(
        not holds(infinite, got, want), "rows of equal entries have the variance 0: only the eps keeps the root from 0"
    )
    check(got, want, " for rows of equal entries", {})

    args = fixture((2, 3, 4), seed=10)
    got, want = answer(*in_float32(args), 0.2), in_float32(norm_derivatives(*args, 0.2))
    keeps_float32(got)
    check(got, want, " for float32", {})
