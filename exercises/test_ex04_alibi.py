"""Grades exercises/ex04_alibi.py."""

import math

import numpy as np

from exercises.grading import Raised, Wrong, describe, exercise, expect, hunt, same, says


def told_apart(want, mistakes):
    """Those of the mistakes that do not happen to give the right value for this input."""
    return {sentence: value for sentence, value in mistakes.items() if not same(value, want)}


def holds(test, got, want):
    """Whether an array holds what it should not: test is np.isnan, say."""
    right_kind = isinstance(got, np.ndarray) and got.dtype.kind == "f" and got.shape == want.shape
    return right_kind and bool((test(got) & ~test(want.astype(float))).any())


def infinite(x):
    return ~np.isfinite(x)


def keeps_float32(got):
    """The usual reason why float32 in is not float32 out."""
    wide = [x for x in (got if type(got) is tuple else [got]) if isinstance(x, np.ndarray) and x.dtype == np.float64]
    sentence = "float32 in, float64 out: np.arange and cumsum give whole numbers (int64), and these widen float32 to"
    says(not wide, f"{sentence} float64; so do numbers like np.sqrt(5), but not Python's own")


def softmax(x, axis=-1):
    exps = np.exp(x - x.max(axis, keepdims=True))
    return exps / exps.sum(axis, keepdims=True)


# ---- A bias for texts with padding


def numbers(mask):
    """Each real token by how many stand before it, as a loop counts them; 0 at padding."""
    found = np.zeros(mask.shape)
    for row, real in zip(found, mask):
        count = 0
        for s, is_real in enumerate(real):
            if is_real:
                row[s], count = count, count + 1
    return found


def biased(mask, slopes, number, padding=-np.inf):
    bias = np.array([[[m * n for n in row] for m in slopes] for row in number])
    return np.where(mask[:, None], bias, padding)[:, :, None].astype(slopes.dtype)


@exercise(
    points=1,
    hints=(
        "Take one row by hand, with padding on the left and a hole in the middle. Which number has each real token?",
        "The number of a real token is how many True there are up to it, itself not counted: a running sum along the"
        " row, less 1.",
        "number = mask.cumsum(axis=1) - 1; slopes[:, None] * number[:, None] has the shape (B, H, S); np.where(mask[:,"
        " None], ..., -np.inf), and one axis more, [:, :, None].",
    ),
)
def test_key_bias(answer):
    rows = ["00111111", "11111111", "01101011", "11100100", "00000000", "00000001"]
    mask = np.array([[letter == "1" for letter in row] for row in rows])
    slopes = np.array([0.5, 0.125, 2**-0.5, 0.01, 1.5])
    S, number = mask.shape[1], numbers(mask)
    want = biased(mask, slopes, number)
    places = np.broadcast_to(np.arange(S), mask.shape)
    first = mask.argmax(1)[:, None]
    last = number.max(1, keepdims=True)
    mistakes = {
        "it numbers padding, too: the first real token must be number 0 wherever it stands": biased(
            mask, slopes, places
        ),
        "only padding on the left is taken out of the numbers: it can also stand between real tokens": biased(
            mask, slopes, places - first
        ),
        "only how much padding there is counts: where it stands decides which numbers it moves": biased(
            mask, slopes, places - (~mask).sum(1, keepdims=True)
        ),
        "the first real token is number 1: it should be 0": biased(mask, slopes, number + 1),
        "it hides the real tokens: True in `mask` is where one stands": biased(~mask, slopes, mask.cumsum(1) - 1),
        "the sign is wrong: with m * j a later key must get more": biased(mask, slopes, -number),
        "these are distances to the last real token: a correct bias, but not the one that was asked for, m * j": biased(
            mask, slopes, number - last
        ),
        "the numbers begin at the last token and run back: the first token must be number 0": biased(
            mask, slopes, np.where(mask, last - number, 0)
        ),
        "the numbers run from row to row: each row is a text of its own": biased(mask, slopes, mask.cumsum(0) - 1),
        "the numbers go on from one row to the next: each row is a text of its own": biased(
            mask, slopes, mask.ravel().cumsum().reshape(mask.shape) - 1
        ),
        "the first head's slope is used for all heads": biased(mask, np.full_like(slopes, slopes[0]), number),
        "the slopes are divided by S: m is the price of one token": biased(mask, slopes, number / S),
        "padding gets inf: whoever adds that looks at nothing else": biased(mask, slopes, number, np.inf),
        "padding gets NaN, as 0 * -inf is: choose by np.where": biased(mask, slopes, number, np.nan),
    }
    got = answer(mask, slopes)
    if isinstance(got, np.ndarray) and got.shape == want.shape and got.dtype.kind == "f":
        hidden = np.broadcast_to(~mask[:, None, None], got.shape)
        if same(got[~hidden], want[~hidden]) and np.isfinite(got[hidden]).any():
            low = "padding has a finite number, though a very low one: only -inf hides whatever the scores are"
            raise Wrong(
                low if got[hidden].max() < -99 else "padding is not hidden: only -inf keeps all from looking at it"
            )
    if isinstance(got, np.ndarray) and got.shape == (*mask.shape[:1], len(slopes), S):
        raise Wrong("an axis of length 1 is missing: (B, H, 1, S), so that all queries can share the bias")
    if isinstance(got, np.ndarray) and got.shape == (len(mask), len(slopes), S, S):
        raise Wrong("there is a row for each query, but all of them add the same: one row will do, (B, H, 1, S)")
    expect(got, want, what="the bias", mistakes=mistakes)
    for part, few in ((mask[2:3, :5], slopes[:3]), (mask[:2], slopes[1:2]), (mask[3:5, 2:], slopes[:2])):
        want = biased(part, few, numbers(part))
        expect(answer(part, few), want, what=f"for {len(part)} texts and {len(few)} heads, the bias")
    small = np.array([0.5, 0.3, 0.07], np.float32)
    mask = np.random.default_rng(0).random((2, 300)) < 0.9
    got, want = answer(mask, small), biased(mask, small, numbers(mask))
    keeps_float32(got)
    expect(got, want, what="the bias of 300 places in float32")


# ---- A bug hunt: slopes for any number of heads


def series(n):
    return [2.0 ** (-8 * h / n) for h in range(1, n + 1)]


def lower(H):
    return 1 << (H.bit_length() - 1)


def reference(H):
    """As the authors of ALiBi do it, by recursion."""
    P = lower(H)
    return series(H) if H == P else series(P) + reference(2 * P)[::2][: H - P]


def strided(H):
    """As MPT does it: the finer series, first every second slope from the second on, then the others."""
    P = 1 << (H - 1).bit_length()
    fine = 2.0 ** -(np.arange(1, P + 1) * 8 / P)
    return fine if P == H else np.concatenate([fine[1::2], fine[::2]])[:H]


def by_products(H):
    P = lower(H)
    factors = np.full(H, 2 ** (-8 / P))
    factors[P:][:1] = 2 ** (-4 / P)
    return np.concatenate([np.cumprod(factors[:P]), np.cumprod(factors[P:])])


@exercise(
    points=1,
    hints=(
        "Which numbers of heads would show each of the errors that are named? With H = 8 nearly all versions agree.",
        "Try powers of two and numbers between them, close to the lower one and close to the higher one. What must the"
        " first slopes of 12 heads be, and what the last four?",
        "For H from P to 2P - 1: right = [2 ** (-8 * h / P) for h in 1..P] followed by every second one of [2 ** (-8 *"
        " h / (2 * P)) for h in 1..2P], cut to H numbers; np.allclose.",
    ),
)
def test_hunt_slopes(answer):
    def filled(fill):
        """The series of the next lower power of two, and behind it what `fill` makes of the finer one."""
        return lambda H: (series(lower(H)) + list(fill(series(2 * lower(H)))))[:H]

    def nearest(H):
        P = 2 ** round(math.log2(H))
        return (series(P) + series(2 * P)[::2])[:H]

    def only_powers_right(H):
        return reference(H) if H == lower(H) else series(H)

    hunt(
        answer,
        right={
            "the authors' recursion": reference,
            "a version that takes every second slope of the finer series first": strided,
            "a version that multiplies from head to head": by_products,
            "a version that computes in float32": lambda H: np.array(reference(H), np.float32),
        },
        wrong={
            "the version with 2^(-8h/H) for every H (ml-explore/mlx issue 343): try other H than powers of two": (
                only_powers_right
            ),
            "the version that begins one step too early, with 1.0 (paiml/aprender pull request 2143)": lambda H: [
                m * 2 ** (8 / lower(H)) for m in reference(H)
            ],
            "the version that sorts the slopes (antofuller/CROMA issue 12 asks for it): the ninth of 12 is 0.7071": (
                lambda H: sorted(reference(H), reverse=True)
            ),
            "the version that fills up with every second slope from the second on, which are there already": filled(
                lambda fine: fine[1::2]
            ),
            "the version that fills up with neighbours of the finer series, not with every second one": filled(
                lambda fine: fine
            ),
            "the version that takes the nearest power of two, not the next lower: try 6 or 12 heads": nearest,
            "the version that cuts the series of the next higher power of two": lambda H: series(
                H if H == lower(H) else 2 * lower(H)
            )[:H],
            "the version that halves from head to head, which is right for 8 heads alone": lambda H: [
                2.0 ** -(h + 1) for h in range(H)
            ],
            "the version that begins with the series of 8 heads, whatever H: try fewer heads than 8, and 16 or more": (
                lambda H: (series(8) + series(16)[::2] + series(32)[::2] + series(64) + series(64))[:H]
            ),
            "the version that ends in 2^-4 instead of 2^-8": lambda H: [m**0.5 for m in reference(H)],
            "the version that takes a lower power of two also where H is one": lambda H: (
                series(lower(H - 1)) + series(2 * lower(H - 1))[::2] if H == lower(H) > 1 else reference(H)
            ),
        },
    )


# ---- A loss and its stride


def name_all(answer, cases, got, want, what, mistakes):
    """Right in all cases; the message names the mistake that explains all answers, or shows the first wrong one."""
    for sentence, values in mistakes.items():
        assert not same(values, want), f"the grader cannot tell this mistake from the right answer: {sentence}"
    named = [sentence for sentence, values in mistakes.items() if same(got, values)]
    for case, value, right in zip(cases, got, want):
        try:
            expect(value, right, what=what)
        except Wrong as wrong:
            answer(*case)  # once more, so that the message shows this call
            raise Wrong(named[0] if named else str(wrong), *wrong.details) from None


def windows(L, N, stride, scores="new", tail=True, full_last=False):
    """[(first token, end, the tokens that it scores)]; the options make it wrong."""
    found, covered, start = [], 0, 0
    while covered < N and (tail or not found or start + L <= N):
        end = min(start + L, N)
        first = max(end - L, 0) if full_last else start
        new = {"new": covered, "all": first, "stride": max(end - stride, start) if found else start}[scores]
        found.append((first, end, range(new, end)))
        covered, start = end, start + stride
    return found


def short_first(L, N, stride):
    """As in an older version of Hugging Face's guide."""
    return [(max(i + stride - L, 0), min(i + stride, N), range(i, min(i + stride, N))) for i in range(0, N, stride)]


def parts(losses, found):
    return [[losses[n - start] for n in new] for start, _, new in found]


def mean_loss(losses, found):
    every = sum(parts(losses, found), [])
    return sum(every) / len(every)


WINDOWS = [(6, 20, 2), (6, 20, 6), (6, 19, 4), (5, 5, 2), (5, 3, 2), (7, 8, 3), (4, 30, 1), (1, 4, 1), (8, 23, 5)]
WINDOWS += [(6, 12, 6), (6, 13, 6), (9, 40, 4), (3, 1, 3)]


@exercise(
    points=2,
    hints=(
        "Write down the windows for L = 6, N = 20 and a stride of 4: first token, end, and which of them are new.",
        "Go through the windows with two numbers, the window's start and how many tokens have been scored so far. How"
        " much context has the first new token of a window?",
        "while scored < N: end = min(start + L, N); add losses[scored - start : end - start].sum() and end - start;"
        " then scored = end, start += stride.",
    ),
)
def test_in_windows(answer):
    rng = np.random.default_rng(3)
    cases = [(np.round(6 / np.arange(1, L + 1) ** 0.5 + rng.random(L), 3), N, stride) for L, N, stride in WINDOWS]
    got, loss, read = [], [], []
    for losses, N, stride in cases:
        L = len(losses)
        context = [n if n < L else n - stride * math.ceil((n - L + 1) / stride) for n in range(N)]
        loss.append(math.fsum(losses[c] for c in context) / N)
        read.append(sum(min(L, N - start) for start in range(0, max(N - L, 0) + stride, stride)))
        got.append(answer(losses, N, stride))
        is_pair = type(got[-1]) is tuple and len(got[-1]) == 2
        says(is_pair, f"the result should be the tuple (loss, read), not {describe(got[-1])}")

    def each(make, **options):
        """What `make` does with each of the cases and its windows."""
        return [make(losses, N, windows(len(losses), N, stride, **options)) for losses, N, stride in cases]

    def of_all(losses, N, found):
        return mean_loss(losses, found)

    def tokens(losses, N, found):
        return sum(end - start for start, end, _ in found)

    name_all(
        answer,
        cases,
        [value for value, _ in got],
        loss,
        "the loss",
        {
            "it takes the mean of the windows' means: a window with more new tokens must count for more"
            " (huggingface/transformers issue 34138)": each(
                lambda losses, N, found: np.mean([np.mean(part) for part in parts(losses, found)])
            ),
            "every window scores all its tokens, so that most are counted more than once": each(of_all, scores="all"),
            "the windows do not overlap: the stride is ignored": [
                mean_loss(losses, windows(len(losses), N, len(losses))) for losses, N, _ in cases
            ],
            "every token has as much context as if the stride were 1": [
                mean_loss(losses, windows(len(losses), N, 1)) for losses, N, _ in cases
            ],
            "the last window scores `stride` tokens, though fewer of them are new (huggingface/transformers pull"
            " request 7938)": each(of_all, scores="stride"),
            "the tokens behind the last full window are lost": each(of_all, tail=False),
            "the tokens behind the last full window are lost, but they are among the N": each(
                lambda losses, N, found: mean_loss(losses, found) * found[-1][1] / N, tail=False
            ),
            "the new tokens are scored as if they were the first of their window: they have context": each(
                lambda losses, N, found: sum(sum(losses[: len(new)]) for _, _, new in found) / N
            ),
            "it divides by N - 1, but the first token is scored, too, with nothing before it": [
                a * N / (N - 1) if N > 1 else math.inf for a, (_, N, _) in zip(loss, cases)
            ],
            "the last window is moved back until it is full": each(of_all, full_last=True),
            "the first window is only `stride` tokens long: it can be full (huggingface/transformers issue 18887)": [
                mean_loss(losses, short_first(len(losses), N, stride)) for losses, N, stride in cases
            ],
            "this is the sum over the tokens: divide it by N": [a * N for a, (_, N, _) in zip(loss, cases)],
            "this is the perplexity, exp(loss)": [math.exp(a) for a in loss],
            "the sum is divided by the number of windows, not of tokens": each(
                lambda losses, N, found: mean_loss(losses, found) * N / len(found)
            ),
            "the sum is divided by the number of tokens read, but context is not scored": [
                a * N / n for a, n, (_, N, _) in zip(loss, read, cases)
            ],
        },
    )
    name_all(
        answer,
        cases,
        [value for _, value in got],
        read,
        "the number of tokens read",
        {
            "this is how many windows there are: count the tokens in them": each(lambda losses, N, found: len(found)),
            "each token is counted once, but context is read, too": [N for _, N, _ in cases],
            "every window is counted as a full one, but the last may end with the text": each(
                lambda losses, N, found: len(found) * len(losses)
            ),
            "there are windows behind the one that reaches the end of the text: they have no new tokens": [
                sum(min(len(losses), N - start) for start in range(0, N, stride)) for losses, N, stride in cases
            ],
            "the tokens behind the last full window are not read": each(tokens, tail=False),
            "the last window is moved back until it is full": each(tokens, full_last=True),
        },
    )
    losses = cases[0][0]
    answer.refuses(losses, 20, 0, because="with a stride of 0 the window never moves")
    answer.refuses(losses, 20, -2, because="with a stride of -2 the window moves out of the text")
    answer.refuses(losses, 20, 7, because="with a stride of 7 windows of 6 tokens leave some out")
    answer.refuses(losses, 4, 7, because="a stride of 7 does not fit windows of 6 tokens, however short the text is")


# ---- How far a head can look


def greatest_weight(slope, gap, d, base=math.e, others=None):
    """Of the first of d + 1 tokens, by definition; `others` are the distances of the other tokens."""
    scores = [-slope * other - gap + slope * d for other in (range(d) if others is None else others)]
    return 1 / (1 + sum(base**score for score in scores))


def last(holds):
    """The largest d for which it holds, as it does from 0 up to there and not behind."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@exercise(
    points=2,
    hints=(
        "Write the softmax of d + 1 tokens: the first has the score gap - slope * d, the one at distance b has -slope"
        " * b. Divide numerator and denominator by the first's exponential.",
        "The weight is 1 / (1 + exp(-gap) * (exp(slope) + exp(2 slope) + ... + exp(d slope))). Say that it is at least"
        " eps, sum the series and solve for d, or count d up until it is not. What if gap is 1000?",
        "The series is (exp(slope * d) - 1) / (1 - exp(-slope)); d = floor(log(1 + x) / slope) with log x = gap + log(1"
        " / eps - 1) + log(1 - exp(-slope)); np.logaddexp(0, log x) is log(1 + x).",
    ),
)
def test_reach(answer):
    cases = [(0.5, 0.0, 0.01), (0.25, 3.0, 1e-3), (2**-0.5, 20.0, 1e-6), (0.125, 0.0, 0.6), (1.0, 5.0, 0.5)]
    cases += [(3.0, 0.3, 0.05), (2**-4, 1.5, 0.2), (2**-6, 4.0, 0.03), (0.09, 0.7, 0.004), (2**-8, 0.5, 0.9)]
    cases += [(0.3, 2.0, 0.95), (0.2, 6.0, 0.02), (2**-5, 7.0, 0.002)]

    def each(holds):
        return [last(lambda d, case=case: holds(*case, d)) for case in cases]

    def furthest(slope, gap, eps):
        x = math.exp(gap) * (1 / eps - 1) * (1 - math.exp(-slope))
        return math.log(1 + x) / slope

    exact = [furthest(*case) for case in cases]
    assert all(abs(x - round(x)) > 1e-3 for x in exact)
    got, want = [answer(*case) for case in cases], [math.floor(x) for x in exact]
    two = "two tokens only, the first and the query itself, are weighed: those between them take part in softmax, too"
    name_all(
        answer,
        cases,
        got,
        want,
        "the reach",
        {
            two: each(lambda m, gap, eps, d: greatest_weight(m, gap, d, others=[0]) >= eps),
            "exp(gap - slope * d) compares the token with the query's own: a weight is a part of the sum over all"
            " tokens": each(lambda m, gap, eps, d: math.exp(gap - m * d) >= eps),
            "`gap` is left out: the first token may have the better score": each(
                lambda m, gap, eps, d: greatest_weight(m, 0, d) >= eps
            ),
            "the first token's score is the smallest, not the largest: it gets the most weight when it is ahead by"
            " `gap`": each(lambda m, gap, eps, d: greatest_weight(m, -gap, d) >= eps),
            "this is one more than the reach, as if tokens were counted, or the query's own left out of the sum": [
                d + 1 for d in want
            ],
            "this is one less than the reach": [d - 1 for d in want],
            "it takes log(x) for log(1 + x), which is right for large x only": [
                int((gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-m))) / m) for m, gap, eps in cases
            ],
            "the series begins with exp(0): the nearest of the other tokens has exp(slope)": each(
                lambda m, gap, eps, d: greatest_weight(m, gap, d, others=range(1, d + 1)) >= eps
            ),
            "rounded to the nearest whole number, half of the answers lie beyond the reach: round down": [
                round(x) for x in exact
            ],
            "tokens further back than d are in the sum, but the text begins there": each(
                lambda m, gap, eps, d: 1 / (1 / greatest_weight(m, gap, d) + math.exp(-gap) / (math.exp(m) - 1)) >= eps
            ),
            "the other tokens have no bias: the price depends on the distance of each": each(
                lambda m, gap, eps, d: 1 / (1 + d * math.exp(m * d - gap)) >= eps
            ),
            "the first token is left out of the sum, but softmax divides by the sum over all tokens": each(
                lambda m, gap, eps, d: 1 / (1 / greatest_weight(m, gap, d) - 1) >= eps
            ),
            "softmax has powers of e, not of 2": each(
                lambda m, gap, eps, d: greatest_weight(m, gap, d, base=2.0) >= eps
            ),
        },
    )
    cases = [(0.5, 1000.0, 0.01), (1.5, 800.0, 0.3)]
    exact = [(gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-m))) / m for m, gap, eps in cases]
    assert all(abs(x - round(x)) > 1e-3 for x in exact)
    overflow = "exp(1000) overflows: take the gap off the other scores, or work with its logarithm"
    try:
        got = [answer(*case) for case in cases]
    except Raised as raised:
        if not {"OverflowError", "ValueError"} & {*raised.kinds}:  # inf or NaN is no whole number
            raise
        raise Wrong(overflow, *raised.details, trace=raised.trace) from None
    name_all(answer, cases, got, [math.floor(x) for x in exact], "for a gap of 1000 or 800, the reach", {})


# ---- A bug hunt: the bias behind a cache


def alibi(q, k, v, slopes, bias=None):
    """bias(slope, places of the queries (T, 1), places of the keys (S,)) is what a head adds to its scores."""
    T, S = q.shape[1], k.shape[1]
    i, j = np.arange(S - T, S)[:, None], np.arange(S)
    add = bias or (lambda m, i, j: -m * (i - j))
    rows = []
    for h, m in enumerate(slopes):
        scores = q[h] @ k[h].T / np.sqrt(q.shape[2]) + add(m, i, j)
        rows.append(softmax(np.where(j <= i, scores, -np.inf)) @ v[h])
    return np.stack(rows)


def in_float32(q, k, v, slopes):
    return alibi(*(np.asarray(x, np.float32) for x in (q, k, v, slopes)))


def one_channel_more(q, k, v, slopes):
    D, S = q.shape[2], k.shape[1]
    q = np.concatenate([q / np.sqrt(D), np.broadcast_to(slopes[:, None, None], (*q.shape[:2], 1))], 2)
    k = np.concatenate([k, np.broadcast_to(np.arange(S)[:, None], (len(k), S, 1))], 2)
    return alibi(q * np.sqrt(D + 1), k, v, slopes, lambda m, i, j: 0.0)


@exercise(
    points=2,
    hints=(
        "With T = S many versions agree. What of the bias can go wrong when T is 1, or between 1 and S?",
        "Choose keys that make all scores 0, so that the bias alone decides, and values that show the weights. What are"
        " the weights of a query at place i?",
        "With keys of 0 and the identity as v, row t of head h is exp(-slopes[h] * (i - j)) for j <= i = S - T + t,"
        " divided by its sum, and 0 behind. Compare with np.allclose for T = 1, 1 < T < S and T = S; H, D > 1.",
    ),
)
def test_hunt_cached_alibi(answer):
    def wrong_bias(bias):
        return lambda q, k, v, slopes: alibi(q, k, v, slopes, bias)

    def of_the_new_tokens(q, k, v, slopes):
        return alibi(q, k, v, slopes, (lambda m, i, j: 0.0 * j) if q.shape[1] == 1 else None)

    def cached_for_nothing(q, k, v, slopes):
        S, T = k.shape[1], q.shape[1]
        return alibi(q, k, v, slopes, lambda m, i, j: np.where(j < S - T, 0.0, -m * (i - j)))

    def absolute_from_0(q, k, v, slopes):
        T, S = q.shape[1], k.shape[1]
        return alibi(q, k, v, slopes, lambda m, i, j: -m * np.abs(i - (S - T) - j))

    def future_for_a_price(q, k, v, slopes):
        S = k.shape[1]
        rows = [
            softmax(
                q[h] @ k[h].T / np.sqrt(q.shape[2]) - m * np.abs(np.arange(S - q.shape[1], S)[:, None] - np.arange(S))
            )
            for h, m in enumerate(slopes)
        ]
        return np.stack([w @ v[h] for h, w in enumerate(rows)])

    def before_the_division(q, k, v, slopes):
        return alibi(q, k, v, slopes / np.sqrt(q.shape[2]))

    hunt(
        answer,
        right={
            "the formula with distances": alibi,
            "a version that adds slope * j": wrong_bias(lambda m, i, j: m * j),
            "a version whose distances are all too small by S, which softmax does not see (lucidrains/x-transformers"
            " issue 153)": lambda q, k, v, slopes: alibi(q, k, v, slopes, lambda m, i, j: m * (j - i + k.shape[1])),
            "a version that computes in float32": in_float32,
            "a version that puts the bias into one more channel of q and k": one_channel_more,
        },
        wrong={
            "the version whose bias is 0 when T = 1, since it is built for the T new tokens (keras-team/keras-hub pull"
            " request 2977): try T = 1": of_the_new_tokens,
            "the version with the sign turned round (meta-pytorch/attention-gym pull request 86)": wrong_bias(
                lambda m, i, j: m * (i - j)
            ),
            "the version that divides the bias by sqrt(D), too (as Falcon does: NVIDIA/TensorRT-Model-Connect pull"
            " request 32): try D > 1": before_the_division,
            "the version without a bias": wrong_bias(lambda m, i, j: 0.0 * j),
            "the version whose bias is the same for all keys of a query, so that softmax does not see it": wrong_bias(
                lambda m, i, j: -m * i + 0.0 * j
            ),
            "the version in which cached tokens cost nothing: try T < S": cached_for_nothing,
            "the version that counts queries from 0, not from S - T, and takes the absolute distance: try T < S": (
                absolute_from_0
            ),
            "the version that lets a query see its future, at a price": future_for_a_price,
            "the version in which all heads have the first slope: try different slopes": lambda q, k, v, slopes: alibi(
                q, k, v, np.full_like(slopes, slopes[0])
            ),
            "the version that takes powers of 2 for the bias, not of e": lambda q, k, v, slopes: alibi(
                q, k, v, slopes * np.log(2)
            ),
        },
    )


# ---- ALiBi for a kernel that takes no bias


def log_weights(scores):
    """Logarithms of the weights of causal attention, (H, T, S); -inf in the future."""
    T, S = scores.shape[1:]
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def products(q, k):
    """(H, T, S): q k with neighbours sharing a key head."""
    group = len(q) // len(k)
    return np.stack([q[h] @ k[h // group].T for h in range(len(q))])


@exercise(
    points=2,
    hints=(
        "-slope * (i - j) is slope * j - slope * i. Which of the two can softmax not see? Then what must the one more"
        " channel of q hold, and that of k?",
        "q gets one more channel, and k gets one more, the place j. What the kernel computes, divided by sqrt(D + 1),"
        " must be q k / sqrt(D) + slope * j: so by which factors must q and the slope be multiplied?",
        "W = D + 1; new_q = concatenate([q * (W / D) ** 0.5, slope * W ** 0.5 in a column]), new_k = concatenate([k,"
        " 0 .. S - 1 in a column]), along the last axis; np.broadcast_to gives columns their shape.",
    ),
)
def test_fold(answer):
    def checked(q, k, slopes):
        got = answer(q, k, slopes)
        is_pair = type(got) is tuple and len(got) == 2 and all(isinstance(x, np.ndarray) for x in got)
        says(is_pair, f"the result should be the tuple (new_q, new_k) of two arrays, not {describe(got)}")
        (new_q, new_k), W = got, got[0].shape[-1] if got[0].ndim else 0
        says(W > q.shape[2], f"new_q should be wider than q: its {q.shape[2]} channels are needed for q k itself")
        if new_k.ndim == 3 and new_k.shape[0] == len(q) != len(k):
            raise Wrong("the keys were copied for every query head: k has H_kv heads and must keep them")
        expect(new_q, np.zeros((*q.shape[:2], W), new_q.dtype), what="new_q", tol=np.inf, dtype=False)
        expect(new_k, np.zeros((*k.shape[:2], W), new_k.dtype), what="new_k", tol=np.inf, dtype=False)
        if q.dtype == np.float32:
            keeps_float32(got)
        for x, name in zip(got, ("new_q", "new_k")):
            says(x.dtype == q.dtype, f"{name} should be {q.dtype}, not {x.dtype}")
            says(np.isfinite(x).all(), f"{name} holds numbers that are not finite")
        return new_q, new_k, W

    for seed, (H, H_kv, T, S, D) in enumerate(((6, 3, 4, 7, 5), (4, 1, 1, 6, 3), (3, 3, 5, 5, 2), (4, 2, 3, 9, 1))):
        rng = np.random.default_rng(seed)
        q, k = 1.5 * rng.standard_normal((H, T, D)), 1.5 * rng.standard_normal((H_kv, S, D))
        slopes = rng.permutation(0.9 * 0.7 ** np.arange(H))
        new_q, new_k, W = checked(q, k, slopes)
        qk, root, m, j = products(q, k), D**0.5, slopes[:, None, None], np.arange(S)
        of_group = np.repeat(slopes[:: H // H_kv], H // H_kv)[:, None, None]
        want = log_weights(qk / root + m * j)
        wrong = {
            "there is no bias in the products": qk / root,
            "the kernel divides by sqrt(W) where ALiBi divides by sqrt(D): multiply q by what is missing": qk / W**0.5
            + m * j,
            "the kernel divides the slope by sqrt(W), too: multiply it before": qk / root + m * j / W**0.5,
            "the kernel divides by sqrt(W), and nothing was multiplied before: neither q nor the slope": (qk + m * j)
            / W**0.5,
            "q was divided by sqrt(D), and the kernel divides once more, by sqrt(W)": qk / root / W**0.5 + m * j,
            "q and the slope were divided by sqrt(W), and the kernel does it once more": (qk + m * j) / W,
            "q was divided by sqrt(D), and the kernel divides once more, by sqrt(W), also the slope": (
                qk / root + m * j
            )
            / W**0.5,
            "the places are divided by S: the slope is the price of one token": qk / root + m * j / k.shape[1],
            "q is multiplied by sqrt(D / W): turn it round": qk * root / W + m * j,
            "the kernel divides by sqrt(W), not by W: q is multiplied by W / D": qk * W**0.5 / D + m * j,
            "the slope is multiplied by sqrt(W / D), as q is, but for the slope it must be sqrt(W)": qk / root
            + m * j / root,
            "the slope is multiplied by W, but the kernel divides by sqrt(W)": qk / root + m * j * W**0.5,
            "old keys get more weight: the sign is wrong, or the places run backwards": qk / root - m * j,
            "all query heads of a key head have the same slope: the slope must come with q": qk / root + of_group * j,
            "all heads have the first slope": qk / root + slopes[0] * j,
        }
        mistakes = told_apart(want, {sentence: log_weights(scores) for sentence, scores in wrong.items()})
        got = log_weights(products(new_q, new_k) / W**0.5)
        expect(got, want, what="the logarithms of the kernel's weights", tol=1e-9, mistakes=mistakes)

        part = S - 1 if T < S else S
        sentence = "new keys should depend on the key and its place alone, but they change with the slopes"
        says(same(answer(q, k, slopes[::-1] * 2)[1], new_k), sentence)
        sentence = "new keys should depend on the key and its place alone, but they change with the queries"
        says(same(answer(q[:, -1:] - 2, k, slopes)[1], new_k), sentence)
        sentence = "new keys change when the text grows: what is in the cache would be wrong"
        shorter = answer(q[:, :1], k[:, :part], slopes)[1]
        says(same(shorter, new_k[:, :part]), sentence)

    q, k, slopes = (x.astype(np.float32) for x in (q, k, slopes))
    new_q, new_k, W = checked(q, k, slopes)
    want = log_weights(products(*(x.astype(float) for x in (q, k))) / q.shape[2] ** 0.5 + slopes[:, None, None] * j)
    got = log_weights(products(*(x.astype(float) for x in (new_q, new_k))) / W**0.5)
    expect(got, want, what="the logarithms of the kernel's weights for float32", tol=1e-5)
    q, k, slopes = np.zeros((1, 2, 2)), np.zeros((1, 400, 2)), np.array([2.0**-8])
    new_q, new_k, W = checked(q, k, slopes)
    want, got = log_weights(np.arange(400) / 256 + np.zeros((1, 2, 1))), log_weights(products(new_q, new_k) / W**0.5)
    expect(got, want, what="the logarithms of the kernel's weights for 400 keys", tol=1e-9)


# ---- A text that is read only as far as it matters


class Text:
    """Blocks of keys and values, the newest first, and a query."""

    def __init__(self, sizes, D, E, slope, eps, size=1.0, norm=1.0, along=None, dtype=np.float64):
        rng = np.random.default_rng(sum(sizes) + D)
        self.q = size * rng.standard_normal(D)
        k = size * rng.standard_normal((sum(sizes), D))
        if along is not None:  # what the scores lie near, again and again
            along = np.resize(along, (len(k), 1))
            unit = self.q / np.sqrt(self.q @ self.q)
            k = 0.3 * (k - (k @ unit)[:, None] * unit) + along * D**0.5 / np.sqrt(self.q @ self.q) * unit
            k += 0.1 * rng.standard_normal((len(k), 1)) * unit
        v = rng.standard_normal((sum(sizes), E))
        self.q, self.k, self.v = (x.astype(dtype) for x in (self.q, k, v))  # newest first
        self.sizes, self.slope, self.eps, self.S = sizes, slope, eps, sum(sizes)
        self.norm = norm * float(np.sqrt((self.k**2).sum(1)).max()) * (1 + 1e-6)
        ends = np.cumsum(sizes)
        self.blocks = [(self.k[b - n : b][::-1].copy(), self.v[b - n : b][::-1].copy()) for b, n in zip(ends, sizes)]
        self.asked = []

    def read(self, b):
        self.asked.append(b)
        return self.blocks[b]

    @property
    def args(self):
        return self.q, self.read, self.S, self.slope, self.norm, self.eps

    def upto(self, n, scale=None, back=None):
        """Attention over the first n blocks; the options make it wrong."""
        seen = sum(self.sizes[:n])
        q, k, v = (x.astype(float) for x in (self.q, self.k[:seen], self.v[:seen]))
        back = np.arange(seen) if back is None else back(self.sizes[:n])
        scores = k @ q * (len(q) ** -0.5 if scale is None else scale) - self.slope * back
        return (softmax(scores) @ v).astype(self.q.dtype)

    def needed(self, enough=None, highest=None, seen=0, finite=False):
        """How many blocks the rule asks for; the options make it another rule. And by how far it is decided."""
        D, decided = len(self.q), np.inf
        q, k = self.q.astype(float), self.k.astype(float)
        top = np.sqrt(q @ q) * self.norm / D**0.5 if highest is None else highest(np.sqrt(q @ q), self.norm, D)
        scores = k @ q / D**0.5 - self.slope * np.arange(self.S)
        for n, end in enumerate(np.cumsum(self.sizes), 1):
            known = np.logaddexp.reduce(scores[:end])
            rest = top - self.slope * (end + seen)
            if finite:
                left = self.S - end
                rest = rest + np.log(-np.expm1(-self.slope * left)) if left else -np.inf
            rest -= np.log(-np.expm1(-self.slope))
            if enough:
                stop = enough(rest, known, self.eps, scores[:end].max(), top - self.slope * end, self)
            else:
                margin = rest - np.logaddexp(rest, known) - np.log(self.eps)
                stop, decided = margin <= 0, min(decided, abs(margin))
            if stop or end == self.S:
                return n, decided


TEXTS = {
    "short blocks": dict(sizes=[3, 5, 2, 4, 1, 6, 3, 5, 2, 7], D=4, E=3, slope=0.5, eps=0.05, size=0.8),
    "blocks of one token": dict(sizes=[1] * 14, D=3, E=2, slope=0.7, eps=0.3, size=0.6),
    "a steep slope": dict(sizes=[2, 1, 3, 2, 4, 2], D=6, E=1, slope=2.5, eps=0.01, size=0.7),
    "a long norm": dict(sizes=[4, 3, 6, 2, 5, 7, 3, 8, 4, 6], D=5, E=4, slope=0.4, eps=0.02, size=0.9, norm=1.8),
    "a flat slope": dict(sizes=[9, 4, 11, 6, 8, 5], D=2, E=3, slope=0.05, eps=0.25, size=0.5),
    "large eps": dict(sizes=[1, 2, 1, 1, 2, 1, 1, 2, 1, 3], D=3, E=2, slope=0.3, eps=0.6, size=0.9),
    "a text of one block": dict(sizes=[6], D=3, E=2, slope=0.2, eps=0.01),
    "many blocks": dict(sizes=[2, 3] * 20, D=7, E=2, slope=0.25, eps=1e-4, size=0.5),
}
LARGE = {
    "scores near 1000": dict(sizes=[2, 4, 3, 5, 2, 6, 3, 4], D=4, E=3, slope=0.6, eps=0.05, along=1000.0),
    "scores near 1000 and -1000": dict(
        sizes=[4, 3, 3, 5, 2, 4, 5, 3, 6], D=3, E=2, slope=0.3, eps=0.02, along=[-1e3, 1e3, -1e3, 1e3] + [-1e3] * 31
    ),
    "scores near -1000": dict(sizes=[3, 2, 4, 1], D=5, E=2, slope=0.8, eps=0.1, along=-1000.0),
}


def place(sizes, newest_first=False, restart=False, start=0):
    """Distances in the order newest first, block by block, as a wrong answer may have them."""
    found, seen = [], start
    for n in sizes:
        within = np.arange(n)[::-1] if newest_first else np.arange(n)
        found.append(within + (0 if restart else seen))
        seen += n
    return np.concatenate(found)


def by_block(text, n, combine):
    """combine(the largest score, the sum of exp(score - largest), the same times values), for all blocks read."""
    parts, seen = [], 0
    for size in text.sizes[:n]:
        k, v = text.k[seen : seen + size], text.v[seen : seen + size]
        scores = k @ text.q / len(text.q) ** 0.5 - text.slope * np.arange(seen, seen + size)
        exps = np.exp(scores - scores.max())
        parts.append((scores.max(), exps.sum(), exps @ v))
        seen += size
    return combine(*(np.array(column) for column in zip(*parts)))


@exercise(
    points=3,
    hints=(
        "Three parts: distances that go on from block to block, a running softmax (largest, total, mix) as in chapter"
        " 02, and a bound for what is still to come. What is the largest score that a token at distance d can have?",
        "With highest = |q| norm / sqrt(D), a token at distance d adds at most exp(highest - slope * d). After `seen`"
        " tokens: rest = exp(highest - slope * seen) / (1 - exp(-slope)). Compare its logarithm with that of the sum.",
        "After each block: log_rest = highest - slope * seen - np.log(1 - np.exp(-slope)); stop if log_rest - (largest"
        " + np.log(total)) is at most np.log(eps / (1 - eps)). The distances in the block: np.arange(seen - 1, seen - n"
        " - 1, -1), with `seen` counting this block, too.",
    ),
)
def test_read_back(answer):
    def ask(text, where):
        """(what came back, how many blocks were read)"""
        text.asked.clear()
        try:
            got = answer(*text.args)
        except Raised as raised:
            if "OverflowError" in raised.kinds:
                sentence = "exp overflows: take the largest score off, and compare logarithms"
                raise Wrong(sentence, *raised.details, trace=raised.trace) from None
            number = len(text.sizes)
            if not any(isinstance(b, int | np.integer) and b >= number for b in text.asked):
                raise
            sentence = (
                f"it asks for block {text.asked[-1]}, but the text has {number}: stop when S tokens have been read"
            )
            raise Wrong(sentence, *raised.details, trace=raised.trace) from None
        right = text.asked == [*range(len(text.asked))] and text.asked
        shown = f"{text.asked[:12]}{' ...' if len(text.asked) > 12 else ''}"
        says(right, f"the blocks should be read in turn, 0 first, each once, but it reads {shown}")
        numbers = isinstance(got, np.ndarray) and got.dtype.kind == "f"
        expect(np.nan_to_num(got) if numbers else got, text.upto(len(text.asked)), what=where, tol=np.inf, dtype=False)
        return got, len(text.asked)

    texts = {where: Text(**options) for where, options in TEXTS.items()}
    right = {where: text.needed() for where, text in texts.items()}
    assert all(decided > 0.02 for _, decided in right.values()), right
    results = {where: ask(text, f"the result for {where}") for where, text in texts.items()}
    for where, (got, n) in results.items():
        text, want = texts[where], texts[where].upto(n)
        mistakes = {
            "the distances within a block are turned round: its last row is the newest token": text.upto(
                n, back=lambda sizes: place(sizes, newest_first=True)
            ),
            "the distances begin anew in every block: count on": text.upto(
                n, back=lambda sizes: place(sizes, restart=True)
            ),
            "the distances are counted as if all blocks were as long as this one": text.upto(
                n, back=lambda sizes: np.concatenate([b * size + np.arange(size) for b, size in enumerate(sizes)])
            ),
            "the scores are not divided by sqrt(D)": text.upto(n, scale=1.0),
            "the scores have no bias": text.upto(n, back=lambda sizes: np.zeros(sum(sizes))),
            "the sign of the bias is wrong: old tokens get more weight": text.upto(
                n, back=lambda sizes: -np.arange(sum(sizes))
            ),
            "the sums of the blocks are added as they are, but different numbers were taken off their scores": by_block(
                text, n, lambda largest, total, mix: mix.sum(0) / total.sum()
            ),
            "each block has the same weight: a block with larger scores must count for more": by_block(
                text, n, lambda largest, total, mix: (mix / total[:, None]).mean(0)
            ),
            "this is attention over the last block that was read": by_block(
                text, n, lambda largest, total, mix: mix[-1] / total[-1]
            ),
            "the values are not divided by the sum of the exponentials": by_block(
                text, n, lambda largest, total, mix: np.exp(largest - largest.max()) @ mix
            ),
            "the exponentials are not divided by their sum": by_block(
                text, n, lambda largest, total, mix: np.exp(largest) @ mix
            ),
        }

        def grown(largest, total, mix):
            top = np.maximum.accumulate(largest)
            factor = np.exp(largest - top + top[-1] - top)
            return factor @ mix / (factor @ total)

        def half(largest, total, mix, shrinks):
            """Only one of the two sums shrinks when a larger score is found."""
            top = np.maximum.accumulate(largest)
            first, then = np.exp(largest - top), np.exp(largest - top[-1])
            return (then @ mix) / (first @ total) if shrinks == "mix" else (first @ mix) / (then @ total)

        mistakes["when a larger score is found, total shrinks, but mix does not"] = by_block(
            text, n, lambda *sums: half(*sums, "total")
        )
        mistakes["when a larger score is found, mix shrinks, but total does not"] = by_block(
            text, n, lambda *sums: half(*sums, "mix")
        )
        mistakes["when a larger score is found, the sums so far grow instead of shrinking"] = by_block(text, n, grown)
        expect(got, want, what=f"the result for {where}", mistakes=told_apart(want, mistakes))

    def each(enough=None, **options):
        return [text.needed(enough, **options)[0] for text in texts.values()]

    ln = np.log
    got, want = [n for _, n in results.values()], [n for n, _ in right.values()]
    mistakes = {
        "it reads the whole text": each(lambda *_: False),
        "it reads no more than the first block": [1 for _ in texts],
        "it reads one block more than is needed: look after each block whether to stop": [
            min(n + 1, len(text.sizes)) for n, text in zip(want, texts.values())
        ],
        "of the tokens not read yet only the next one is counted: there may be any number behind it": each(
            lambda rest, known, eps, largest, following, _: following - np.logaddexp(following, known) <= ln(eps)
        ),
        "rest is compared with the sum so far, but eps is a part of all, of the sum so far plus rest": each(
            lambda rest, known, eps, *_: rest - known <= ln(eps)
        ),
        "rest is compared with the largest exponential alone, not with the sum": each(
            lambda rest, known, eps, largest, *_: rest - np.logaddexp(rest, largest) <= ln(eps)
        ),
        "rest is compared with 1, not with the sum of exp(score)": each(lambda rest, known, eps, *_: rest <= ln(eps)),
        "the sum over whole distances is taken for an integral: a geometric series has 1 - exp(-slope) below, not the"
        " slope": each(
            lambda rest, known, eps, largest, following, text: (
                following - ln(text.slope) - np.logaddexp(following - ln(text.slope), known) <= ln(eps)
            )
        ),
        "the length of q is left out of the largest score": each(highest=lambda q, norm, D: norm / D**0.5),
        "the largest score is not divided by sqrt(D)": each(highest=lambda q, norm, D: q * norm),
        "the largest score has the square of the length of q": each(highest=lambda q, norm, D: q**2 * norm / D**0.5),
        "the largest score of a token not read is taken to be 0": each(highest=lambda *_: 0.0),
        "`norm` is left out of the largest score": each(highest=lambda q, norm, D: q / D**0.5),
        "the first token not read is at distance `seen`, not one nearer": each(seen=-1),
        "the first token not read is at distance `seen`, not one further": each(seen=1),
        "rest ends at the beginning of the text: it should be bounded as if the text had none": each(finite=True),
    }
    for sentence, counts in mistakes.items():
        assert counts != want, f"the grader cannot tell this mistake from the right answer: {sentence}"
    for (where, text), n, needed in zip(texts.items(), got, want):
        if n != needed:
            named = [sentence for sentence, counts in mistakes.items() if counts == got]
            how = "stops too early" if n < needed else "reads on though the rest cannot matter"
            detail = f"for {where} it reads {n} of {len(text.sizes)} blocks, where {needed} are needed"
            raise Wrong(named[0] if named else f"it {how}", detail)

    for where, options in LARGE.items():
        text = Text(**options)
        needed, decided = text.needed()
        assert decided > 0.02, where
        got, n = ask(text, f"the result for {where}")
        sentence = f"for {where} exp overflows or all is rounded to 0: take the largest score off"
        says(not holds(infinite, got, text.upto(n)), sentence)
        expect(got, text.upto(n), what=f"the result for {where}", tol=1e-8)
        sentence = (
            f"for {where} it reads {n} blocks, where {needed} are needed: compare logarithms, they cannot overflow"
        )
        says(n == needed, sentence)
    text = Text(sizes=[3, 2, 5, 4, 3, 6], D=4, E=2, slope=0.6, eps=0.1, size=0.7, dtype=np.float32)
    needed, decided = text.needed()
    assert decided > 0.02
    got, n = ask(text, "the result for float32")
    keeps_float32(got)
    expect(got, text.upto(n), what="the result for float32")
    says(n == needed, f"in float32 it reads {n} blocks, where {needed} are needed")
