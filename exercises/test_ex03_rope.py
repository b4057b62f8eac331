"""Grades exercises/ex03_rope.py."""

import numpy as np

from exercises.grading import Raised, Wrong, array_of, exercise, expect, hunt, same, says


def told_apart(want, mistakes):
    """Those of the mistakes that do not happen to give the right value for this input."""
    return {sentence: value for sentence, value in mistakes.items() if not same(value, want)}


def frequencies(D, base):
    return np.array([1 / base ** (2 * i / D) for i in range(D // 2)])


def halves(r):
    """The channels of each pair, half-split: two lists."""
    return list(range(r // 2)), list(range(r // 2, r))


def neighbours(r):
    """The same, interleaved."""
    return list(range(0, r, 2)), list(range(1, r, 2))


def turn(x, angles, pairs):
    """x, float64, with its pairs of channels turned by `angles` (..., pairs). An oracle with complex numbers."""
    (first, second), y = pairs, x.astype(np.float64)
    points = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    y[..., first], y[..., second] = points.real, points.imag
    return y


def one_after_the_other(x, angles, pairs):
    """What comes of writing the first channel of a pair before the second is computed from it."""
    (first, second), y = pairs, x.astype(np.float64)
    y[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    y[..., second] = y[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return y


def keeps_float32(got):
    says(
        not (isinstance(got, np.ndarray) and got.dtype == np.float64),
        "float32 in, float64 out: the angles are float64 and widen what they touch, so round the result at the end",
    )


def nearly(got, want, off):
    """Whether an answer is wrong, but by no more than `off`: then what is wrong is how it was rounded."""
    right_kind = isinstance(got, np.ndarray) and got.dtype == want.dtype and got.shape == want.shape
    return right_kind and not same(got, want) and bool((np.abs(got - want) < off).all())


def keeps_lengths(got, x, pairs, mistakes):
    """Says so unless every pair is as long as it was. What has a name of its own is told by that."""
    if not isinstance(got, np.ndarray) or got.shape != x.shape or got.dtype.kind != "f":
        return
    if not any(same(got, value) for value in mistakes.values()):
        before, after = (np.hypot(each[..., pairs[0]], each[..., pairs[1]]) for each in (x, got))
        says(same(after, before, 1e-4), "some pairs have become longer or shorter: a turn keeps the length, a^2 + b^2")


COARSE = "the result is right to a few digits only: were the angles computed in float32?"
FAR = "of an angle near 99999 float32 leaves out all that is below 1/250: compute it in float64, round the result"


# ---- A few channels, in neighbouring pairs


@exercise(
    points=1,
    hints=(
        "For x of shape (B, H, T, D), what do x[..., 0:r:2] and x[..., 1:r:2] hold? And which shape must the angles"
        " have, so that every row and every head gets the same ones?",
        "angles = positions[:, None] * base ** (-np.arange(0, r, 2) / r), of shape (T, r/2). A pair (a, b) becomes"
        " (a cos - b sin, a sin + b cos). Both need the old a and the old b.",
        "y = x.copy(); y[..., 0:r:2] = a * np.cos(angles) - b * np.sin(angles); y[..., 1:r:2] alike; the rest of y is"
        " right already.",
    ),
)
def test_rotate_first(answer):
    rng = np.random.default_rng(0)
    sizes = ((2, 3, 4, 10, 6, 10000.0), (1, 2, 5, 7, 4, 500.0), (3, 1, 2, 8, 8, 100.0), (2, 4, 3, 5, 2, 10000.0))
    for B, H, T, D, r, base in sizes:
        x, positions = rng.standard_normal((B, H, T, D)), np.array([7, 3, 41, 0, 12])[:T]

        woven = neighbours(r)

        def turned(f, pairs=woven, positions=positions, x=x):
            return turn(x, np.outer(positions, f), pairs)

        f = frequencies(r, base)
        want = turned(f)
        angles, front = np.outer(positions, f), x[..., :r]
        both = np.concatenate([angles, angles], -1)
        across = np.concatenate([-x[..., r // 2 : r], x[..., : r // 2]], -1)
        beside = turn(front, np.full(r // 2, np.pi / 2), woven)
        apart, cut = want.copy(), want.copy()
        apart[..., :r], cut[..., r:] = np.concatenate([want[..., 0:r:2], want[..., 1:r:2]], -1), 0
        mistakes = {
            "the pairs are made of the channels i and i + r/2: asked for are neighbours, 2i and 2i + 1": turned(
                f, halves(r)
            ),
            "the frequencies are those of all D channels: of r that rotate, pair i has base^(-2i/r)": turned(
                base ** (-np.arange(r // 2) * 2 / D)
            ),
            "the exponent is -i/r: for pair i it is -2i/r": turned(base ** (-np.arange(r // 2) / r)),
            "the exponent is -4i/r: for pair i it is -2i/r": turned(base ** (-np.arange(r // 2) * 4 / r)),
            "the frequencies rise, base^(2i/r): the exponent is negative": turned(1 / f),
            "the fast pairs are the last ones: the first pair has the frequency 1": turned(f[::-1]),
            "all pairs turn alike: each has a frequency of its own": turned(np.ones(r // 2)),
            "the base is 10000, whatever `base` says": turned(frequencies(r, 10000.0)),
            "it turns clockwise: from (1, 0) a small angle leads towards (0, 1)": turned(-f),
            "tokens are taken to stand at 0, 1, 2 ...: `positions` says where they are": turned(
                f, positions=np.arange(T)
            ),
            "tokens are taken to stand side by side, from the first of `positions` on": turned(
                f, positions=positions[0] + np.arange(T)
            ),
            "the first token is taken for position 1: positions count from 0": turned(f, positions=positions + 1),
            "the angles are taken for degrees: np.cos and np.sin take radians": turned(np.deg2rad(f)),
            "the angles are multiplied by 2 pi: they are radians, not turns": turned(2 * np.pi * f),
            "the last r channels are turned: it should be the first r": np.concatenate(
                [x[..., : D - r], turned(f, x=x[..., D - r :])], -1
            ),
            "the channels that do not rotate are 0: they stay as they are": cut,
            "cos and sin are in the order of half-split pairs: both channels of pair i need angle i": np.concatenate(
                [front * np.cos(both) + beside * np.sin(both), x[..., r:]], -1
            ),
            "cos and sin are in the order of neighbours, but the copy for sin has its halves exchanged": np.concatenate(
                [front * np.cos(np.repeat(angles, 2, -1)) + across * np.sin(np.repeat(angles, 2, -1)), x[..., r:]], -1
            ),
            "positions are counted from the first of them on: it need not be 0": turned(
                f, positions=positions - positions[0]
            ),
            "the turned channels come out as two halves: each belongs back into its place": apart,
            "the second channel of a pair is computed from the new first one: keep the old value": one_after_the_other(
                x, np.outer(positions, f), neighbours(r)
            ),
        }
        if D % 2 == 0:
            mistakes["all channels are turned: only the first r should be"] = turned(
                frequencies(D, base), neighbours(D)
            )
        got = answer(x, positions, r=r, base=base)
        says(not nearly(got, want, 1e-4), COARSE)
        mistakes, what = told_apart(want, mistakes), f"the result for r = {r} of D = {D}"
        if isinstance(got, np.ndarray) and got.shape == x.shape and not any(same(got, y) for y in mistakes.values()):
            says(same(got[..., r:], x[..., r:]), "the channels from r on have changed: they stay as they are")
        keeps_lengths(got, x, woven, mistakes)
        expect(got, want, what=what, mistakes=mistakes)

    x, positions = rng.standard_normal((2, 3, 4, 6)).astype(np.float32), np.array([99_999, 5, 70_001, 33_333])
    got, f = answer(x, positions, r=4, base=10000.0), frequencies(4, 10000.0)
    want = turn(x, np.outer(positions, f), neighbours(4)).astype(np.float32)
    keeps_float32(got)
    says(not nearly(got, want, 0.05), FAR)
    expect(got, want, what="the result for float32 and positions up to 100,000")


# ---- What a long text shows for the first time


def counted(D, trained, length, base, exponent=2.0, last=-1, end=0, full=2 * np.pi, lap=True, mode="new"):
    """Distance by distance. The options make mistakes."""
    counts = []
    for i in range(D // 2):
        f = 1 / base ** (exponent * i / D)
        known, count = (trained + last) * f, 0
        for m in range(trained, length + end):
            angle = m * f % full if lap else m * f
            if mode == "both modulo":
                fresh = angle > known % full
            elif mode == "slow pairs":
                fresh = known < full
            else:
                fresh = angle > known
                assert full != 2 * np.pi or last != -1 or exponent != 2 or abs(angle - known) > 1e-6, (
                    "too close to call"
                )
            count += (not fresh) if mode == "known" else fresh
        counts.append(count)
    return np.array(counts, np.int64)


@exercise(
    points=1,
    hints=(
        "One pair at first: list its angles in training, then those at the distances from `trained` on. What does it"
        " mean for an angle to be known, when a full turn leads back to 0?",
        "The largest known angle is (trained - 1) * f. Compare with the angles m * f % (2 pi) of the distances m ="
        " trained ... length - 1. What if the known angle itself is more than a full turn?",
        "angles = np.arange(trained, length)[:, None] * f % (2 * np.pi); count with (angles > (trained - 1) *"
        " f).sum(axis=0): a known angle of a full turn or more is never exceeded.",
    ),
)
def test_new_angles(answer):
    variants = {
        "every distance counts as new: after a full turn, a pair comes to angles that it knows": {"lap": False},
        "in training the largest distance is trained - 1, not `trained`": {"last": 0},
        "the largest distance is length - 1, not `length`": {"end": 1},
        "a text of `length` tokens has distances up to length - 1, not length - 2": {"end": -1},
        "these are the distances with known angles: asked for are those with new ones": {"mode": "known"},
        "a pair that has made a full turn in training knows every angle: take no turns off what it knows": {
            "mode": "both modulo"
        },
        "not every distance beyond training is new to a slow pair: after a full turn it knows angles again": {
            "mode": "slow pairs"
        },
        "a full turn is 2 pi, not pi": {"full": np.pi},
        "a full turn is 2 pi, not 1: the angles are radians": {"full": 1.0},
        "a full turn is 2 pi, not 360: the angles are radians": {"full": 360.0},
        "the exponent is -i/head_dim: for pair i it is -2i/head_dim": {"exponent": 1.0},
        "the exponent is -4i/head_dim: for pair i it is -2i/head_dim": {"exponent": 4.0},
    }
    cases = ((8, 64, 1000, 10000.0), (10, 20, 313, 500.0), (12, 6, 64, 100.0), (6, 100, 4001, 10000.0))
    for case in (*cases, (4, 2, 7, 10000.0), (14, 30, 31, 2000.0), (2, 5, 50, 10000.0), (6, 9, 9, 50.0)):
        want = counted(*case)
        mistakes = {sentence: counted(*case, **how) for sentence, how in variants.items()}
        D, trained, length, base = case
        laps = [int(2 * np.pi / f) for f in frequencies(D, base)]
        mistakes["a full turn need not take a whole number of tokens: do not round it"] = np.array(
            [sum(m % lap > trained - 1 for m in range(trained, length)) for lap in laps], np.int64
        )
        mistakes["it counts from the slow pairs to the fast ones: the first pair has the frequency 1"] = want[::-1]
        got = answer(D, trained=trained, length=length, base=base)
        if isinstance(got, np.ndarray) and got.shape == want.shape and got.dtype.kind == "f":
            says(not same(got, want), "these are floats: what is counted comes in whole numbers, int64")
            says(
                length == trained or not same(got * (length - trained), want, 1e-9),
                "this is the share of the distances with new angles: asked for is their number",
            )
        what = f"the count for {trained} tokens in training and {length} now"
        expect(got, want, what=what, mistakes=told_apart(want, mistakes))


# ---- Keys in a cache, turned once more


@exercise(
    points=2,
    hints=(
        "A key has been turned by 1 radian and should have been by 1.5. What is left to do? And if it should have been"
        " by 0.2?",
        "Turning by a and then by b is turning by a + b. So turn each pair by now * new - was * old. These angles are"
        " (B, T, D/2): give them an axis for the heads.",
        "angles = (now[..., None] * new - was[..., None] * old)[:, None]; a, b = k[..., :D // 2], k[..., D // 2 :];"
        " join a cos - b sin and a sin + b cos on the last axis, and round to k.dtype.",
    ),
)
def test_turn_again(answer):
    rng = np.random.default_rng(1)

    def fixture(B, H, T, D, base, moved, stretch):
        old, was = frequencies(D, 10000.0), np.cumsum(rng.integers(1, 9, (B, T)), axis=1)
        new = frequencies(D, base) / stretch
        now = was - rng.integers(1, was.min() + 1, (B, 1)) if moved else was
        return rng.standard_normal((B, H, T, D)), was, now, old, new

    first = fixture(2, 3, 4, 6, 40000.0, True, 1.3)
    moved, slowed = fixture(3, 2, 5, 8, 10000.0, True, 1.0), fixture(2, 1, 3, 4, 31000.0, False, 1.1)
    k, was, now, old, new = fixture(1, 2, 3, 10, 20000.0, True, 1.0)
    back, forth = (k, was, 0 * was, old, new), (k, 0 * was, now, old, new)
    cases = {
        "moved and with new frequencies": first,
        "moved to lower positions": moved,
        "with new frequencies at the same positions": slowed,
        "brought back to position 0": back,
        "that had not been turned": forth,
    }
    for which, (k, was, now, old, new) in cases.items():
        before, after = ((m[..., None] * f)[:, None] for m, f in ((was, old), (now, new)))  # (B, 1, T, D/2)
        pairs = halves(k.shape[-1])

        def turned(angles, k=k, pairs=pairs):
            return turn(k, angles, pairs)

        want = turned(after - before)
        m, n = (x[..., None][:, None] for x in (was, now))
        mistakes = {
            "nothing is turned: the keys still have their old angles": k,
            "the new angles are put on top of the old ones, which the keys have already": turned(after),
            "the old angles are taken off, but the new ones are not put on": turned(-before),
            "the keys are turned the wrong way: what is missing is new less old": turned(before - after),
            "both angles are put on: the old one must be taken off": turned(before + after),
            "the old angles are taken off at the new frequencies: they were made with the old ones": turned(
                (n - m) * new
            ),
            "the new angles are made with the old frequencies": turned((n - m) * old),
            "the frequencies change at the old positions: the new angles belong to the new ones": turned(
                m * (new - old)
            ),
            "the frequencies change at the new positions: the old angles belong to the old ones": turned(
                n * (new - old)
            ),
            "differences of positions are multiplied by differences of frequencies: each position has its own": turned(
                (n - m) * (new - old)
            ),
            "was and now are exchanged, but old and new are not": turned(m * new - n * old),
            "neighbouring channels are turned: pair i is the channels i and i + D/2": turned(
                after - before, pairs=neighbours(k.shape[-1])
            ),
            "the turned channels come out as neighbours: they belong back into two halves": np.stack(
                np.split(want, 2, axis=-1), axis=-1
            ).reshape(k.shape),
            "all rows have the positions of the first one": turned((after - before)[:1]),
            "the second half is computed from the new first half: keep the old values": one_after_the_other(
                k, after - before, pairs
            ),
            "keys also change their length, with the ratio of the frequencies: they are only turned": want
            * np.mean(new / old),
        }
        got = answer(k, was, now, old=old, new=new)
        says(not nearly(got, want, 1e-4), COARSE)
        mistakes = told_apart(want, mistakes)
        keeps_lengths(got, k, pairs, mistakes)
        expect(got, want, what=f"the result for keys {which}", mistakes=mistakes)

    k = rng.standard_normal((2, 3, 2, 6)).astype(np.float32)
    was, now = np.array([[99_999, 70_001], [31_234, 5]]), np.array([[12_345, 65_536], [99_998, 88_887]])
    old, new = frequencies(6, 10000.0), frequencies(6, 30000.0) / 1.7
    angles = now[..., None] * new - was[..., None] * old
    got, want = answer(k, was, now, old, new), turn(k, angles[:, None], halves(6)).astype(np.float32)
    keeps_float32(got)
    says(not nearly(got, want, 0.05), FAR)
    expect(got, want, what="the result for float32 and positions up to 100,000")


# ---- A bug hunt: positions behind a cache


def angles_at(positions, D):
    return np.outer(positions, frequencies(D, 10000.0))


def on_paper(q, k, v, start):
    D = q.shape[-1]
    angles = angles_at(start + np.arange(q.shape[2]), D)
    return turn(q, angles, halves(D)), turn(k, angles, halves(D)), v


def clockwise(q, k, v, start):
    D = q.shape[-1]
    angles = -angles_at(start + np.arange(q.shape[2]), D)
    return turn(q, angles, halves(D)), turn(k, angles, halves(D)), v


def one_matrix_a_token(q, k, v, start):
    T, D = q.shape[2:]
    out = [np.empty(x.shape) for x in (q, k)]
    for t in range(T):
        matrix = np.zeros((D, D))
        for i, angle in enumerate(angles_at([start + t], D)[0]):
            a, b = i, i + D // 2
            matrix[a, a] = matrix[b, b] = np.cos(angle)
            matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
        for x, y in zip((q, k), out):
            y[:, :, t] = x[:, :, t] @ matrix.T
    return *out, v


def in_float32(q, k, v, start):
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    T, D = q.shape[2:]
    f = np.float32(1) / np.float32(10000) ** (np.arange(0, D, 2, dtype=np.float32) / np.float32(D))
    angles = np.arange(start, start + T, dtype=np.float32)[:, None] * f
    cos, sin = np.cos(angles), np.sin(angles)
    split = [np.split(x, 2, axis=-1) for x in (q, k)]
    return *(np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1) for a, b in split), v


@exercise(
    points=2,
    hints=(
        "With start = 0, or with one token, or at a position below 256 most of the wrong ones are right. So which calls"
        " do you need? And what do you know of the result of a rotation?",
        "Make the right angles yourself and compare q and k with x turned by +angle and by -angle. Accept one of these"
        " ways, but the same one for q and k and in all calls. Tolerance: 0.01.",
        "z = x[..., : D // 2] + 1j * x[..., D // 2 :] must have become z * np.exp(1j * angles), or with -1j everywhere."
        " Try (start, T) = (0, 4), (9, 4), (9, 1), (300, 4), (5000, 4), B and H more than 1; and v must be the same.",
    ),
)
def test_hunt_rotation(answer):
    def placed(positions_of, k_positions_of=None, pairs=halves):
        """A version that puts T tokens from `start` on at positions_of(start, T)."""

        def rotate(q, k, v, start):
            T, D = q.shape[2:]
            for_q, for_k = (angles_at(each(start, T), D) for each in (positions_of, k_positions_of or positions_of))
            return turn(q, for_q, pairs(D)), turn(k, for_k, pairs(D)), v

        return rotate

    def all_of(start, T):
        return np.arange(start, start + T)

    tables = {}

    def with_tables_of_the_first_call(q, k, v, start):
        T, D = q.shape[2:]
        angles = tables.setdefault((T, D), angles_at(np.arange(start, start + T), D))
        return turn(q, angles, halves(D)), turn(k, angles, halves(D)), v

    def bfloat16(start, T):
        mantissa, exponent = np.frexp(all_of(start, T).astype(np.float64))
        return np.ldexp(np.round(mantissa * 256) / 256, exponent)

    def opposite(q, k, v, start):
        return on_paper(q, k, v, start)[0], clockwise(q, k, v, start)[1], v

    def single_tokens_the_other_way(q, k, v, start):
        return (clockwise if q.shape[2] == 1 else on_paper)(q, k, v, start)

    def values_too(q, k, v, start):
        return *on_paper(q, k, v, start)[:2], on_paper(v, v, v, start)[0]

    def along_the_heads(q, k, v, start):
        D = q.shape[-1]
        angles = [angles_at(start + np.arange(x.shape[1]), D)[:, None] for x in (q, k)]  # (heads, 1, D/2)
        return *(turn(x, each, halves(D)) for x, each in zip((q, k), angles)), v

    hunt(
        answer,
        right={
            "the formula": on_paper,
            "a version that turns clockwise": clockwise,
            "a version with one matrix for each token": one_matrix_a_token,
            "a version that computes in float32": in_float32,
        },
        wrong={
            "the version that heeds start for a single token only: try several tokens behind a cache": placed(
                lambda start, T: all_of(start if T == 1 else 0, T)
            ),
            "the version that places a single token at 0 (Blaizzy/mlx-vlm issue 1983): try T = 1 and start > 0": placed(
                lambda start, T: all_of(0 if T == 1 else start, T)
            ),
            "the version in which all tokens of a call have one position (jundot/omlx pull request 2363)": placed(
                lambda start, T: [start] * T
            ),
            "the version that keeps the tables of its first call for all others (lucidrains/rotary-embedding-torch"
            " issue 11): call it twice, with as many tokens and another start": with_tables_of_the_first_call,
            "the version with positions in bfloat16, which cannot tell 256 from 257 (EleutherAI/gpt-neox pull request"
            " 1016)": placed(bfloat16),
            "the version whose table ends at position 1023, which all later tokens share (karpathy/nanochat pull"
            " request 520 is about such a table)": placed(lambda start, T: np.minimum(all_of(start, T), 1023)),
            "the version in which keys are placed right, and queries always from 0 on": placed(
                lambda start, T: all_of(0, T), all_of
            ),
            "the version that turns queries one way and keys the other (huggingface/transformers issue 30900 proposes"
            " it): scores then depend on the sum of the positions": opposite,
            "the version that turns single tokens the other way than several": single_tokens_the_other_way,
            "the version that turns the values, too": values_too,
            "the version that takes the heads for the tokens (mlfoundations/open_lm issue 4)": along_the_heads,
            "the version with neighbouring pairs: channel i belongs to i + D/2": placed(all_of, pairs=neighbours),
        },
    )


# ---- One model's rows in another's order


def reordered(weight, n_head, n_kv_head, r, sections="qk", back=False, heads=None):
    """Row by row. `sections` says which of q, k and v are touched."""
    D, rows = len(weight) // (n_head + 2 * n_kv_head), []
    order = [*range(0, r, 2), *range(1, r, 2), *range(r, D)]
    if back:
        order = [order.index(d) for d in range(D)]
    for section, number in (("q", n_head), ("k", n_kv_head), ("v", n_kv_head)):
        for head in range(number):
            mine = section in sections and (heads is None or heads(section, head))
            rows += [len(rows) + d for d in (order if mine else range(D))]
    return weight[rows]


@exercise(
    points=2,
    hints=(
        "How many rows has a head? Take the first head of q: write down the numbers of its rows in the new order, for"
        " D = 8 and r = 6.",
        "D = rows // (n_head + 2 * n_kv_head). In each head the new order is 0, 2, 4 ... r - 2, then 1, 3 ... r - 1,"
        " then r ... D - 1. The first n_head + n_kv_head heads are q and k.",
        "order = np.r_[0:r:2, 1:r:2, r:D]; then, for head h of the first n_head + n_kv_head, the rows h * D + order;"
        " behind them the rows of v as they are. A list of row numbers works as an index: weight[rows].",
    ),
)
def test_to_halves(answer):
    # H, H_kv, D, r, and the shape of a row
    cases = ((4, 2, 12, 6, (5,)), (3, 1, 8, 8, ()), (2, 2, 10, 6, (3,)), (6, 3, 16, 12, (7,)), (5, 1, 6, 2, (2,)))
    for number, (H, H_kv, D, r, row) in enumerate(cases):
        rows, rng = (H + 2 * H_kv) * D, np.random.default_rng(number)
        weight = rng.standard_normal((rows, *row))
        options = H, H_kv, r
        want = reordered(weight, *options)

        def moved(order, weight=weight):
            return weight[np.concatenate([np.asarray(part, int) for part in order])]

        def split(start, heads, width, r):
            """Rows start ... of so many heads, each of `width` rows, in the new order."""
            return [start + h * width + np.r_[0:r:2, 1:r:2, r:width] for h in range(heads)]

        q, v = H * D, (H + H_kv) * D
        mistakes = {
            "nothing is moved": weight,
            "this is the way back, from half-split to neighbouring pairs: channel 2i goes to place i": reordered(
                weight, *options, back=True
            ),
            "v is reordered, too: values are never rotated, and nothing expects them in another order": reordered(
                weight, *options, sections="qkv"
            ),
            "k stays as it is: it is rotated like q": reordered(weight, *options, sections="q"),
            "q stays as it is: it is rotated like k": reordered(weight, *options, sections="k"),
            "v is reordered in place of k: k lies behind q": reordered(weight, *options, sections="qv"),
            "only the first head of each is reordered: every head has rows that rotate": reordered(
                weight, *options, heads=lambda section, head: head == 0
            ),
            "all D channels of a head are reordered: those from r on are not rotated and stay": reordered(
                weight, H, H_kv, D
            ),
            "the last r channels of a head are reordered: it should be the first r": moved(
                [
                    h * D + (np.r_[0 : D - r, D - r : D : 2, D - r + 1 : D : 2] if h < H + H_kv else np.arange(D))
                    for h in range(H + 2 * H_kv)
                ]
            ),
            "odd channels come first: channel 2i goes to place i, and 2i + 1 to place i + r/2": moved(
                [h * D + (np.r_[1:r:2, 0:r:2, r:D] if h < H + H_kv else np.arange(D)) for h in range(H + 2 * H_kv)]
            ),
            "q is reordered as if it were one head: each head has its own first r channels": moved(
                [np.r_[0:q:2, 1:q:2], *split(q, H_kv, D, r), np.arange(v, rows)]
            ),
            "q and k are reordered as if each were one head: each head has its own first r channels": moved(
                [np.r_[0:q:2, 1:q:2], q + np.r_[0 : v - q : 2, 1 : v - q : 2], np.arange(v, rows)]
            ),
        }
        mistakes["each key head is taken to lie behind its own queries: all of q comes first, then all of k"] = moved(
            [
                h * D + (np.r_[0:r:2, 1:r:2, r:D] if h % (H // H_kv + 2) != H // H_kv + 1 else np.arange(D))
                for h in range(H + 2 * H_kv)
            ]
        )
        if rows % (3 * H) == 0 and r <= rows // (3 * H):
            name = "k and v are taken to have as many heads as q: they have n_kv_head, so D is another number"
            width = rows // (3 * H)
            mistakes[name] = moved([*split(0, 2 * H, width, r), np.arange(2 * H * width, rows)])
        third = rows // 3
        if rows % 3 == third % H == third % H_kv == 0 and r <= third // H:
            name = "q, k and v are taken for a third of the rows each: q has n_head heads, k and v have n_kv_head"
            mistakes[name] = moved(
                [*split(0, H, third // H, r), *split(third, H_kv, third // H_kv, r), np.arange(2 * third, rows)]
            )
        if (H_kv * D) % H == 0 and r <= H_kv * D // H:
            name = "k is cut into as many heads as q has (ggml-org/llama.cpp pull request 3364): it has only n_kv_head"
            mistakes[name] = moved([*split(0, H, D, r), *split(q, H, H_kv * D // H, r), np.arange(v, rows)])
        if r == D and (H_kv * D) % (2 * H) == 0:
            name = "k is cut into as many heads as q has (ggml-org/llama.cpp pull request 3364): it has only n_kv_head"
            width = H_kv * D // H
            mistakes[name] = moved([*split(0, H, D, r), *split(q, H, width, width), np.arange(v, rows)])
        if row:
            columns = np.arange(row[0])
            across = np.r_[columns[0::2], columns[1::2]]
            mistakes["the columns are reordered: the channels of a head are rows"] = weight[:, across]
        got = answer(weight, n_head=H, n_kv_head=H_kv, r=r)
        if isinstance(got, np.ndarray) and got.shape == want.shape and got.dtype == want.dtype:
            is_all = same(np.sort(got.ravel()), np.sort(weight.ravel()), 0.0)
            says(is_all, "rows are lost, or changed, or there twice: each should be there once, in some place")
        what = f"the {'matrix' if row else 'bias'} with n_head = {H}, n_kv_head = {H_kv}, D = {D}, r = {r}"
        expect(got, want, what=what, tol=0.0, mistakes=told_apart(want, mistakes))
    halves = np.random.default_rng(9).standard_normal((36, 2)).astype(np.float16)
    expect(answer(halves, 2, 2, 4), reordered(halves, 2, 2, 4), what="the matrix in float16", tol=0.0)


# ---- A base for every pair that needs one


@exercise(
    points=3,
    hints=(
        "With a new base, pair i has the frequency new^(-2i/D). Divide the old frequency by it: by how much is pair i"
        " slower? Set that equal to the factor.",
        "(new / base)^(2i/D) = factor gives new = base * factor^(D/(2i)). Is that more for a small i or a large one?"
        " Which pairs with less than a turn are there, and which of them asks for most?",
        "i is the first pair with trained * base^(-2i/D) / (2 pi) below 1. i = 0: ValueError. No such pair: base."
        " Otherwise base * factor ** (D / (2 * i)).",
    ),
)
def test_ntk_base(answer):
    def needed(D, base, trained, factor, full=2 * np.pi):
        slow = [i for i in range(D // 2) if trained / base ** (2 * i / D) < full]
        return base * factor ** (D / (2 * slow[0])) if slow and slow[0] else base

    cases = (
        (64, 10000.0, 2048, 4.0),
        (8, 10000.0, 64, 4.0),
        (8, 10000.0, 63, 4.0),  # pair 1 makes a turn in 63 tokens, and would not in 62
        (10, 500.0, 41, 1.5),
        (128, 500000.0, 8192, 8.0),
        (6, 10000.0, 1300, 2.0),
        (16, 100.0, 7, 3.0),
        (12, 1000.0, 512, 2.5),
    )
    for D, base, trained, factor in cases:
        want = needed(D, base, trained, factor)
        turns = trained * frequencies(D, base) / (2 * np.pi)
        slow = int(np.argmax(turns < 1))
        exact = D * np.log(trained / (2 * np.pi)) / (2 * np.log(base))  # where a pair would make just one turn
        assert abs(turns - 1).min() > 1e-6 and (turns[-1] < 1) and slow > 0
        mistakes = {
            "this base slows the last pair by the factor, and all before it by less: other pairs need it, too": base
            * factor ** (D / (D - 2)),
            "this base is `factor` times the old one: pair i becomes slower by only factor^(2i/D)": base * factor,
            "this base divides no pair at all": base,
            "it helps the second pair with less than a turn, but the first one asks for more": base
            * factor ** (D / (2 * slow + 2)),
            "it slows the last pair that makes a full turn, which needs nothing: that takes a larger base": base
            * factor ** (D / (2 * max(slow - 1, 1))),
            "the exponent is D/i: the frequency of pair i has 2i/D, so it is D/(2i)": base * factor ** (D / slow),
            "the exponent is 2i/D: to undo (new / base)^(2i/D) take the power D/(2i)": base * factor ** (2 * slow / D),
            "the old base is missing: this is only new / base": factor ** (D / (2 * slow)),
            "a smaller base makes the pairs faster: multiply": base / factor ** (D / (2 * slow)),
            "the pair counts from 1: the first one is pair 0": base * factor ** (D / (2 * slow + 2)),
            "it slows a pair between two pairs, which would make just one turn: take the first one that there is": base
            * factor ** (D / (2 * exact)),
            "a turn is 2 pi, not 1: pairs with more than a turn are slowed": needed(D, base, trained, factor, 1.0),
            "a turn is 2 pi, not pi: pairs with less than a turn are left alone": needed(
                D, base, trained, factor, np.pi
            ),
            "the turns are those of one token less: `trained` tokens are asked for": needed(
                D, base, trained - 1, factor
            ),
            "the turns are counted in the long text: what counts is what the pair knows from training": needed(
                D, base, trained * factor, factor
            ),
            "the turns of a text `factor` times shorter are counted: what counts is training": needed(
                D, base, trained / factor, factor
            ),
        }
        mistakes, got = told_apart(want, mistakes), answer(D, base, trained=trained, factor=factor)
        number = array_of(got)
        if number is not None and number.dtype.kind in "fi" and not number.ndim and np.isfinite(number) and number > 0:
            by = (float(number) / base) ** (2 * np.arange(D // 2) / D)  # how much slower each pair becomes
            if not any(same(number, value) for value in mistakes.values()):
                short = [i for i in range(slow, D // 2) if by[i] < factor * (1 - 1e-9)]
                if short:
                    i = short[0]
                    says(
                        False,
                        f"with this base, pair {i}, which made {turns[i]:.2f} turns in training, becomes slower by"
                        f" {by[i]:.4g}, not by the factor, {factor:g}",
                    )
                says(
                    number < want * (1 + 1e-9),
                    f"a smaller base is enough: with this one, the first pair with less than a turn, {slow}, becomes"
                    f" slower by {by[slow]:.4g}, more than by the factor, {factor:g}",
                )
        what = f"the base for head_dim = {D}, base = {base:g}, trained = {trained}, factor = {factor:g}"
        expect(got, want, what=what, mistakes=mistakes)

    for D, base, trained, factor in ((8, 50.0, 4096, 4.0), (4, 10000.0, 700, 2.0), (2, 10000.0, 7, 3.0)):
        bloc = base * factor ** (D / (D - 2)) if D > 2 else base * factor
        mistakes = {
            "every pair makes a full turn and knows all angles: the base may stay as it is": bloc,
            "every pair makes a full turn and knows all angles, so the base stays: it is not multiplied": base * factor,
        }
        got = sure(answer, D, base, trained, factor, otherwise="every pair may make a full turn: then the base stays")
        expect(got, base, what="the base where every pair makes a full turn", mistakes=told_apart(base, mistakes))
    answer.refuses(8, 10000.0, 6, 4.0, because="in 6 tokens pair 0 makes 0.95 turns, and no base changes its frequency")
    answer.refuses(2, 500.0, 1, 2.0, because="in 1 token the only pair makes 0.16 turns, and no base slows it down")


def sure(answer, *args, otherwise):
    """The call, which must not raise: `otherwise` says what the answer did not think of."""
    try:
        return answer(*args)
    except Raised as raised:
        if "NotImplementedError" in raised.kinds:
            raise
        raise Wrong(f"{otherwise} ({raised})", *raised.details, trace=raised.trace) from None


# ---- A bug hunt: YaRN


def turns_of(D, base, trained):
    f = frequencies(D, base)
    return f, trained * f / (2 * np.pi)


def code_ramp(D, base, trained, most=None):
    """From 0, kept, to 1, divided, over the index of the pair: the authors' code and Hugging Face's."""
    low, high = (D * np.log(trained / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1))
    low, high = max(np.floor(low), 0), min(np.ceil(high), D - 1 if most is None else most)
    high += 0.001 * (low == high)
    return np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)


def paper_ramp(D, base, trained):
    """The same over the turns, as in the paper."""
    return 1 - np.clip((turns_of(D, base, trained)[1] - 1) / 31, 0, 1)


def logarithmic_ramp(D, base, trained):
    return 1 - np.clip(np.log(turns_of(D, base, trained)[1]) / np.log(32), 0, 1)


def right_factor(s):
    return 0.1 * np.log(s) + 1


def yarn(ramp, scale=right_factor, place=lambda positions, trained, s: positions, fast=None):
    """A version of YaRN. `fast` makes the frequencies of pairs that are kept, from (D, base, factor)."""

    def tables(positions, head_dim, base, trained, factor):
        share, f = ramp(head_dim, base, trained), frequencies(head_dim, base)
        kept = f if fast is None else fast(head_dim, base, factor)
        angles = np.outer(place(np.asarray(positions), trained, factor), f / factor * share + kept * (1 - share))
        return scale(factor) * np.cos(angles), scale(factor) * np.sin(angles)

    return tables


def yarn_in_float32(positions, head_dim, base, trained, factor):
    one = np.float32(1)
    f = one / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    share = code_ramp(head_dim, base, trained).astype(np.float32)
    angles = np.asarray(positions, np.float32)[:, None] * (f / np.float32(factor) * share + f * (one - share))
    scale = np.float32(0.1 * np.log(factor) + 1)
    return np.cos(angles) * scale, np.sin(angles) * scale


@exercise(
    points=3,
    hints=(
        "The tables hold frequencies and a factor. How do you get both out of cos and sin at one position that you"
        " choose? Then say for each kind of pair what must be true of its frequency.",
        "np.hypot(cos, sin) is the factor everywhere. np.arctan2(sin, cos) at position 1 is the frequency, which is at"
        " most 1. Divide it by base^(-2i/D): that is 1, 1/factor, or strictly between, and falls.",
        "Choose models with fast and slow pairs, and one in which the slowest pair makes between 1 and 32 turns, say"
        " head_dim 16, base 500, trained 8192. Then try positions that are out of order and beyond `trained`: cos + i"
        " sin must be the factor times exp(i * position * frequency), to 0.02.",
    ),
)
def test_hunt_yarn(answer):
    def upside_down(D, base, trained):
        return 1 - code_ramp(D, base, trained)

    def step(D, base, trained):
        return (code_ramp(D, base, trained) > 0.5).astype(float)

    def from_the_first(D, base, trained):
        share = code_ramp(D, base, trained)
        last = int(np.flatnonzero(share < 1)[-1]) + 1
        return np.clip(np.arange(D // 2) / last, 0, 1)

    def to_the_last(D, base, trained):
        first = int(np.flatnonzero(code_ramp(D, base, trained) == 0)[-1])
        return np.clip((np.arange(D // 2) - first) / (D // 2 - first), 0, 1)

    def falling(D, base, trained):
        """In between, the slower pairs are divided by less."""
        share = code_ramp(D, base, trained)
        return np.where((share > 0) & (share < 1), 1 - share, share)

    def stretched(D, base, factor):
        return frequencies(D, base * factor ** (D / (D - 2)))

    def in_the_long_text(positions, head_dim, base, trained, factor):
        return yarn(lambda D, base, trained: code_ramp(D, base, trained * factor))(
            positions, head_dim, base, trained, factor
        )

    def only_long_texts(positions, head_dim, base, trained, factor):
        s = factor if np.max(positions) >= trained else 1.0
        return yarn(code_ramp)(positions, head_dim, base, trained, s)

    def cut_off(positions, trained, s):
        return np.minimum(positions, trained - 1)

    def divided(positions, trained, s):
        return np.minimum(positions / s, trained - 1)

    def kept(D, base, trained):
        return np.zeros(D // 2)

    hunt(
        answer,
        right={
            "the authors' code, with a ramp over the index of the pair": yarn(code_ramp),
            "the paper, with a ramp over the turns": yarn(paper_ramp),
            "a version with a ramp over the logarithm of the turns": yarn(logarithmic_ramp),
            "a version that computes in float32": yarn_in_float32,
        },
        wrong={
            "the version with its ramp upside down, so that the fast pairs are divided and the slow ones kept"
            " (Lightning-AI/litgpt pull request 2202)": yarn(upside_down),
            "the version that divides the positions, so that every pair is slower, and cuts them off at the end of"
            " training (rasbt/LLMs-from-scratch issue 939)": yarn(kept, place=divided),
            "the version that cuts positions off at the end of training: try positions beyond `trained`": yarn(
                code_ramp, place=cut_off
            ),
            "the version that takes the positions to be 0, 1, 2 ...": yarn(
                code_ramp, place=lambda positions, trained, s: np.arange(len(positions))
            ),
            "the version without the factor on cos and sin": yarn(code_ramp, lambda s: 1.0),
            "the version with the square of the factor on cos and sin (sgl-project/sglang pull request 33558)": yarn(
                code_ramp, lambda s: right_factor(s) ** 2
            ),
            "the version whose fast pairs have the base of NTK-aware scaling (paiml/aprender pull request 2161)": yarn(
                code_ramp, fast=stretched
            ),
            "the version without a ramp: each pair is kept or divided by the factor": yarn(step),
            "the version that, in between, divides the slower pairs by less": yarn(falling),
            "the version whose ramp begins with the first pair, so that fast pairs are divided, too": yarn(
                from_the_first
            ),
            "the version whose ramp ends with the last pair, so that slow ones are not wholly divided": yarn(
                to_the_last
            ),
            "the version whose ramp ends at pair D/2 - 1 at the latest, as in LitGPT, which is then divided by the"
            " factor although it makes more than one turn: try a model in which all pairs do": yarn(
                lambda D, base, trained: code_ramp(D, base, trained, most=D // 2 - 1)
            ),
            "the version that counts the turns in the long text, not in training": in_the_long_text,
            "the version that changes nothing until a position lies beyond training": only_long_texts,
        },
    )
