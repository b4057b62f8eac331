"""Grades exercises/ex00_tales.py."""

import itertools
import math
from collections import Counter

import numpy as np

from exercises.grading import Raised, Wrong, exercise, expect, hunt, same, says


def allowed(answer, *args, because):
    """The result of a call that must not raise ValueError; `because` says why."""
    try:
        return answer(*args)
    except Raised as raised:
        if "ValueError" not in raised.kinds:
            raise
        message = f"{because}, but it raises ValueError: {raised.text}"
        raise Wrong(message, *raised.details, trace=raised.trace) from None


def exact(got, want, sentence, tol=None):
    """Nearly right is wrong, and needs another sentence."""
    near = isinstance(got, float | np.floating) and abs(got - want) < 1e-4
    says(not near or same(got, want, tol), sentence, f"got     {got}, where {want} is right")


# ---- bits_per_byte


@exercise(
    points=1,
    hints=(
        "A loss per token times the number of tokens is the surprise of the whole text. What must it be divided by?",
        "1 bit is ln 2 nats, so a number of bits is larger than the same surprise in nats.",
        "Add up len(token.encode()) for the length in bytes; the answer is loss * len(tokens) / ln 2 / bytes.",
    ),
)
def test_bits_per_byte(answer):
    loss, tokens = 1.7, ["Zo", "ë", " at", " the", " caf", "e\u0301", "\n\n", " ", "🙂", " at", ""]
    n, text = len(tokens), "".join(tokens)
    sizes = [len(token.encode()) for token in tokens]
    size = sum(sizes)
    bits = loss / math.log(2)
    mistakes = {
        "these are bits per character, not per byte: ë takes 2 bytes, 🙂 takes 4": bits * n / len(text),
        "these are nats per byte, not bits: one bit is ln 2 nats": loss * n / size,
        "nats times ln 2 are not bits: a bit is the smaller unit, so there are more of them": loss
        * math.log(2)
        * n
        / size,
        "`loss` is the surprise of one token: the whole text has that of all tokens": bits / size,
        "these are bits per token": bits,
        "the length of a text is counted in bytes, not in bits": bits * n / size / 8,
        "this is a mean of the tokens' own numbers: divide total by total": np.mean([bits / s for s in sizes if s]),
        "a surprise is a logarithm already: only its unit changes": math.log2(loss) * n / size,
        "these are bytes per bit: turn the fraction round": size / (bits * n),
        "the empty token must be predicted, too: it has a surprise, though it has no bytes": bits * (n - 1) / size,
        "one bit is ln 2 nats: log10 is another logarithm": loss / math.log10(2) * n / size,
        "a token that comes twice counts twice": bits * n / sum({t: len(t.encode()) for t in tokens}.values()),
        "the text is taken as it is: normalising it takes other bytes": bits * n / (size - 1),
        "a line end is a byte, too": bits * n / len(text.replace("\n", "").encode()),
        "a token that comes twice counts twice, for its surprise, too": bits
        * len(set(tokens))
        / sum(len(t.encode()) for t in set(tokens)),
        "a byte of UTF-8 is meant: UTF-16 takes other numbers": bits * n / len(text.encode("utf-16-le")),
    }
    expect(answer(loss, tokens), bits * n / size, what="the number of bits per byte", mistakes=mistakes)
    expect(answer(0.25, ["x"]), 0.25 / math.log(2), what="the number of bits per byte of one letter")
    answer.refuses(2.0, [], because="a text of no tokens has no bytes")
    answer.refuses(2.0, ["", ""], because="a text of two empty tokens has no bytes")


# ---- cross_entropy


def surprise(p, q):
    """In nats, one part after the other."""
    return math.fsum(-a * math.log(b) if b else math.inf for a, b in zip(p, q) if a)


@exercise(
    points=1,
    hints=(
        "Which parts of the sum may be left out altogether, because they are 0 whatever q says?",
        "Take the logarithm only where p is above 0. For the errors: `x < 0` is False for NaN, and so is `x >= 0`.",
        "Check shapes, (p >= 0).all() and the sums; then come = p > 0 and -(p[come] * np.log(q[come])).sum().",
    ),
)
def test_cross_entropy(answer):
    little = "nearly right: was a small number added to the probabilities, or does it compute in float32?"
    p, q = np.array([8, 5, 2, 1]) / 16, np.array([3, 4, 2, 7]) / 16
    mistakes = {
        "this is in bits: nats have the natural logarithm": surprise(p, q) / math.log(2),
        "p and q have changed places: things come with p, and surprise is counted with q": surprise(q, p),
        "this is the entropy of p: the surprise must be counted with q": surprise(p, p),
        "this is what the model loses, the cross-entropy minus the entropy of p": surprise(p, q) - surprise(p, p),
        "surprise is positive: the sign is missing": -surprise(p, q),
        "every part counts alike: things that come often must count more (p)": np.log(q).mean() * -1,
        "this is the surprise per element: p already makes it an average": surprise(p, q) / 4,
    }
    got = answer(p, q)
    exact(got, surprise(p, q), little)
    expect(got, surprise(p, q), what="the cross-entropy", mistakes=mistakes)

    p, q = np.array([0.5, 0.0, 0.25, 0.0, 0.25]), np.array([0.125, 0.5, 0.125, 0.0, 0.25])
    never = "what never comes (p is 0) must cost nothing: 0 * log 0 is NaN in NumPy, leave these parts out"
    mistakes = {
        never: math.nan,
        "what never comes (p is 0) costs nothing, even if the model gives it 0": math.inf,
    }
    got = allowed(answer, p, q, because="probabilities may be 0")
    exact(got, surprise(p, q), little)
    expect(got, surprise(p, q), what="the cross-entropy where p has zeros", mistakes=mistakes)
    certain = np.array([0.0, 1.0, 0.0])
    expect(answer(certain, certain), 0.0, what="the cross-entropy of a certain thing with a model that knows it")
    p = np.array([0.7, 0.2, 0.1])
    assert p.sum() == 1 - 2**-53
    got = allowed(answer, p, p[::-1].copy(), because="0.7 + 0.2 + 0.1 is 1 up to rounding")
    expect(got, surprise(p, p[::-1]), what="the cross-entropy of p = 0.7, 0.2, 0.1")

    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.75, 0.0, 0.25])
    got = allowed(answer, p, q, because="what comes although q is 0 has an infinite surprise")
    left_out = "the zeros of q were left out, as if these things never came: only zeros of p may be"
    says(not same(got, surprise(p[[0, 2]], q[[0, 2]])), left_out)
    says(
        not (isinstance(got, float) and 0 < got < math.inf),
        f"a quarter of all things has probability 0 in the model: its surprise has no limit, but it gives {got:.4g}",
        "Was q clipped, or was a small number added to it?",
    )
    mistakes = {"surprise is positive: the sign is wrong": -math.inf, never: math.nan}
    expect(got, math.inf, what="the cross-entropy with a model that gives 0 to what does come", mistakes=mistakes)

    p, q = np.array([1 - 1e-9, 1e-9]), np.array([1.0, 0.0])
    expect(answer(p, q), math.inf, what="the cross-entropy when the impossible comes once in a thousand million times")
    p, q = np.array([0.5, 0.5]), np.array([1.0, 1e-30])
    clipped = "q is not clipped: 1e-30 is a probability like any other"
    says(not answer(p, q) < 0.99 * surprise(p, q), clipped)
    expect(answer(p, q), surprise(p, q), what="the cross-entropy with a q of 1e-30")
    p = np.random.default_rng(3).random(1000)
    p /= math.fsum(p) * (1 + 1e-13)
    got = allowed(answer, p, p, because="a thousand parts sum to 1 only up to rounding")
    expect(got, surprise(p, p), what="the cross-entropy of a thousand parts")

    half = np.array([0.5, 0.5, 0.0])
    for bad, because in (
        ([0.5, 0.4, 0.0], "{} sums to 0.9"),
        ([0.5, 0.49, 0.0], "{} sums to 0.99"),
        ([0.5, 0.51, 0.0], "{} sums to 1.01"),
        ([0.75, 0.75, 0.0], "{} sums to 1.5"),
        ([1.25, -0.25, 0.0], "{} has a negative part"),
        ([0.5, 0.5, math.nan], "{} has a NaN"),
        ([0.0, 0.0, 0.0], "{} sums to 0"),
    ):
        answer.refuses(np.array(bad), half, because=because.format("p"))
        answer.refuses(half, np.array(bad), because=because.format("q"))
    answer.refuses(np.array([1.0]), half, because="p has one part and q three")
    answer.refuses(half, np.array([1.0]), because="p has three parts and q one")


# ---- decode_guesses


LETTERS = "etaoin "


def player(asked):
    """What is guessed after a prefix depends on all of it; sometimes not all letters are."""

    def order(prefix):
        if not isinstance(prefix, str):
            raise TypeError("order(prefix) takes a string, the text so far")
        asked.append(prefix)
        turn = (3 + sum(i * ord(c) for i, c in enumerate(prefix, 1))) % len(LETTERS)
        return (LETTERS[turn:] + LETTERS[:turn])[: 7 - len(prefix) % 3]

    return order


def twin(guesses, first=1, sees=lambda prefix: prefix, misses=True):
    """The text; with mistakes, if it is told to make them."""
    text, seen = "", ""
    for guess in guesses:
        if isinstance(guess, str):
            char = guess
        else:
            likely = player([])(sees(seen))
            char = likely[(guess - first) % len(likely)]
        text += char
        seen += char if misses or not isinstance(guess, str) else ""
    return text


@exercise(
    points=1,
    hints=(
        "The twin builds the text from left to right. What does it know when it must find the next character?",
        "order(text so far) gives the same guesses as the player had; number 1 is the first of them.",
        "For each entry: a string is appended as it is; else likely = order(text), check 1 <= guess <= len(likely), "
        "append likely[guess - 1].",
    ),
)
def test_decode_guesses(answer):
    guesses, asked = [2, 1, 3, "q", 1, 4, 4, "!", "e", 2, 1, "3", 3, 2], []
    want = twin(guesses)
    got = answer(guesses, player(asked))
    mistakes = {
        "1 is the first guess, but Python counts from 0": twin(guesses, first=0),
        "the player looked at all text so far, not only at the last character": twin(guesses, sees=lambda s: s[-1:]),
        "the player looked at the text so far: order must be asked anew, with a longer prefix, each time": twin(
            guesses, sees=lambda s: ""
        ),
        "a character that was not guessed belongs to the text so far, too": twin(guesses, misses=False),
        "the text so far must be in reading order": twin(guesses, sees=lambda s: s[::-1]),
        "the text comes out backwards": want[::-1],
        "the characters that were not guessed are missing": twin([g for g in guesses if isinstance(g, int)]),
        "the last character is missing": want[:-1],
        "'3' is a character of the text, not a number of guesses": twin([3 if g == "3" else g for g in guesses]),
    }
    expect(got, want, what="the text", mistakes=mistakes)
    says(
        len(asked) <= len(guesses),
        f"`order` was called {len(asked)} times for {len(guesses)} characters: it is slow, keep what it gives",
    )
    expect(answer([], player([])), "", what="the text of no guesses")
    expect(answer([7], player([])), twin([7]), what="the text of one guess, the player's last,")
    for guess in (0, -1, 8):
        answer.refuses([guess], player([]), because=f"{guess} is no number of guesses where the player has 7")
    answer.refuses(["q", 7, 1], player([]), because="7 is no number of guesses where the player has 6")


# ---- hunt_perplexity


def parts(batches):
    """[(losses, mask)] as float64 and bool, whatever the learner passed."""
    return [(np.asarray(losses, dtype=float), np.asarray(mask).astype(bool)) for losses, mask in batches]


def perplexity_at_once(batches):
    return np.exp(np.concatenate([losses[mask] for losses, mask in parts(batches)]).mean())


def perplexity_by_loops(batches):
    total = count = 0
    for losses, mask in parts(batches):
        for cost, real in zip(losses.ravel().tolist(), mask.ravel().tolist()):
            if real:
                total, count = total + cost, count + 1
    return float(np.exp(total / count))


def perplexity_running(batches):
    mean = count = 0
    for losses, mask in parts(batches):
        new = mask.sum()
        mean, count = mean + (losses[mask].mean() - mean) * new / (count + new), count + new
    return float(np.exp(mean))


def perplexity_float32(batches):
    total, count = np.float32(0), 0
    for losses, mask in parts(batches):
        total, count = total + losses[mask].astype(np.float32).sum(), count + mask.sum()
    return float(np.exp(np.float64(total / np.float32(count))))


def perplexity_product(batches):
    """The geometric mean of 1 / p."""
    count = sum(mask.sum() for _, mask in parts(batches))
    return float(np.prod([np.exp(losses[mask] / count).prod() for losses, mask in parts(batches)]))


def weighted(weight):
    """e to a mean of the batches' means."""

    def perplexity(batches):
        means = [losses[mask].mean() for losses, mask in parts(batches)]
        return float(np.exp(np.average(means, weights=[weight(mask) for _, mask in parts(batches)])))

    return perplexity


def perplexity_by_rows(batches):
    means = [row[m].mean() for losses, mask in parts(batches) for row, m in zip(losses, mask) if m.any()]
    return float(np.exp(np.mean(means)))


def totals(number=lambda mask: mask.sum(), cost=lambda losses, mask: losses[mask].sum(), exp=np.exp):
    def perplexity(batches):
        costs, numbers = zip(*((cost(losses, mask), number(mask)) for losses, mask in parts(batches)))
        return float(exp(sum(costs) / sum(numbers)))

    return perplexity


def perplexity_mean_of_exps(batches):
    return float(np.exp(np.concatenate([losses[mask] for losses, mask in parts(batches)])).mean())


def perplexity_of_batches(batches):
    return float(np.mean([np.exp(losses[mask].mean()) for losses, mask in parts(batches)]))


def perplexity_of_the_last(batches):
    return perplexity_at_once(batches[-1:])


def perplexity_without_the_last(batches):
    return perplexity_at_once(batches[:-1] or batches)


def perplexity_of_first_rows(batches):
    return perplexity_at_once([(losses[:1], mask[:1]) for losses, mask in parts(batches)])


@exercise(
    points=2,
    hints=(
        "With one batch in which every place is a token, nearly all versions agree. What must differ in your batches?",
        "Work out a small case by hand: all tokens of all batches, their sum, their number. Let the batches differ in "
        "the number of tokens, of rows and of places, and let the mask hide something large.",
        "For example a batch (2, 3) with 3 tokens and a batch (1, 5) with 5, all losses different, padding 9. Assert "
        "that the result is close (np.isclose) to np.exp(sum of the 8 losses / 8).",
    ),
)
def test_hunt_perplexity(answer):
    hunt(
        answer,
        right={
            "the version that puts all tokens into one array": perplexity_at_once,
            "the version that loops over the tokens": perplexity_by_loops,
            "the version that keeps a running mean, weighted by tokens": perplexity_running,
            "the version in float32": perplexity_float32,
            "the version that multiplies roots of probabilities": perplexity_product,
        },
        wrong={
            "the version that takes the mean of the batches' means": weighted(lambda mask: 1),
            "the version that weights the batches' means by their numbers of rows": weighted(len),
            "the version that weights the batches' means by their numbers of places, padding included": weighted(
                np.size
            ),
            "the version that takes the mean of the rows' means": perplexity_by_rows,
            "the version that takes the mean of the batches' perplexities": perplexity_of_batches,
            "the version that takes the mean of the tokens' perplexities": perplexity_mean_of_exps,
            "the version that divides by all places, padding included": totals(number=np.size),
            "the version that adds up all places, padding included": totals(cost=lambda losses, mask: losses.sum()),
            "the version that treats padding as tokens": totals(np.size, lambda losses, mask: losses.sum()),
            "the version that raises 2 instead of e to the loss": totals(exp=np.exp2),
            "the version that leaves out the first token of each row": totals(
                lambda mask: max(mask[:, 1:].sum(), 1e-9), lambda losses, mask: losses[:, 1:][mask[:, 1:]].sum()
            ),
            "the version that looks at the last batch only": perplexity_of_the_last,
            "the version that leaves out the last batch if there are several": perplexity_without_the_last,
            "the version that looks at the first row of each batch only": perplexity_of_first_rows,
        },
    )


# ---- choose_k


def pair_losses(train, heldout, size, k, context=None, total=None):
    """The surprise of each character of `heldout` but the first."""
    pairs, before = Counter(itertools.pairwise(train)), Counter(train[:-1])
    context = context or (lambda b: before[b])
    total = total or (lambda n, k: n + k * size)
    odds = ((pairs[b, c] + k) / total(context(b), k) for b, c in itertools.pairwise(heldout))
    return [-math.log(p) for p in odds]


def letter_losses(train, heldout, size, k):
    """The same without looking at the character before."""
    return [-math.log((train.count(c) + k) / (len(train) + k * size)) for c in heldout]


def best_k(train, heldout, size, ks, mean=None, losses=pair_losses, **changes):
    """(the k with the lowest loss, its loss); with mistakes, if it is told to make them."""
    mean = mean or (lambda losses: math.fsum(losses) / len(losses))
    loss = {k: mean(losses(train, heldout, size, k, **changes)) for k in ks}
    best = min(ks, key=loss.get)
    return best, loss[best]


@exercise(
    points=2,
    hints=(
        "If k is added to the count of each character of the alphabet, by how much does the sum of the counts grow?",
        "Count pairs with zip(train, train[1:]); what follows the last character of `train`? Nothing: so how often was "
        "anything seen after it?",
        "p = (pairs[b, c] + k) / (before[b] + k * len(alphabet)) with before = Counter(train[:-1]); average -ln p over "
        "the pairs of `heldout`; min over ks.",
    ),
)
def test_choose_k(answer):
    alphabet = "abcdé fgh."
    train, heldout = "abacabad abacé abadaba cabé dab acab", "abé dabacabbdf cab a"
    ks = [3.0, 0.02, 0.4, 0.1, 30.0, 1.25]
    size, shown = len(alphabet), len(set(train))
    every = Counter(train)
    want = best_k(train, heldout, size, ks)
    losses = {k: math.fsum(pair_losses(train, heldout, size, k)) / (len(heldout) - 1) for k in ks}
    own = best_k(train, train, size, ks)
    worst = max(ks, key=losses.get)
    mistakes = {
        "k is chosen on the text that was counted, where the smallest always looks best": own,
        "k is chosen on the text that was counted, where the smallest always looks best (though its loss is that of "
        "the other text)": (own[0], losses[own[0]]),
        "k is added to the count of every character of the alphabet, so the sum grows by more than k": best_k(
            train, heldout, size, ks, total=lambda n, k: n + k
        ),
        "k is added to every count, so their sum grows, too: these probabilities sum to more than 1": best_k(
            train, heldout, size, ks, total=lambda n, k: n or 1
        ),
        "the sum grows by k also for characters of the alphabet that `train` never shows": best_k(
            train, heldout, shown, ks
        ),
        "the last character of `train` is counted as one after which something came": best_k(
            train, heldout, size, ks, context=lambda b: every[b]
        ),
        "each character is predicted from the one before: divide by how often that one was followed, not by the length "
        "of the text": best_k(train, heldout, size, ks, context=lambda b: len(train) - 1),
        "k is added to the counts after one b, as many as the alphabet has characters, not as it has pairs": best_k(
            train, heldout, size**2, ks
        ),
        "each character is predicted from the one before: count pairs": best_k(
            train, heldout, size, ks, losses=letter_losses
        ),
        "this is the loss of the whole text: take the average per character": best_k(
            train, heldout, size, ks, mean=math.fsum
        ),
        "the first character is not predicted, so there is one surprise less than there are characters": best_k(
            train, heldout, size, ks, mean=lambda losses: math.fsum(losses) / len(heldout)
        ),
        "the loss is in bits: nats have the natural logarithm": (want[0], want[1] / math.log(2)),
        "this k is the worst, not the best": (worst, losses[worst]),
        "this is the log-probability: surprise is positive": (want[0], -want[1]),
        "`train` and `heldout` have changed places": best_k(heldout, train, size, ks),
        "the characters are turned round: the one before is b, the one to predict is c": best_k(
            train[::-1], heldout[::-1], size, ks
        ),
        "this is the perplexity, not the loss": (want[0], math.exp(want[1])),
    }
    assert train[-1] in heldout[:-1]
    assert min(ks) < want[0] < max(ks) and own[0] == min(ks) and shown < size
    got = answer(train, heldout, alphabet, ks)
    expect(got, want, what="(the best k, its loss)", mistakes=mistakes)

    long = heldout * 100
    want = best_k(train, long, size, ks)
    product = "a product of a thousand probabilities is 0.0: add up logarithms"
    got = allowed(answer, train, long, alphabet, ks, because=product)
    says(got != (ks[0], math.inf), product)
    expect(got, want, what="(the best k, its loss) on a longer text")
    want = 4.0, math.log(10)
    expect(answer(train, "hfhfggh", alphabet, [4.0]), want, what="(k, loss) of characters that `train` never shows")
    want = best_k("b", "bab", 3, [0.5])
    expect(answer("b", "bab", "abc", [0.5]), want, what="(k, loss) after a text of one character")
    want = best_k("", "ab", 2, [0.5])
    expect(answer("", "ab", "ab", [0.5]), want, what="(k, loss) after an empty text")
    answer.refuses("abxab", "ab", "abc", [1.0], because="`train` has an x, which is not in the alphabet")
    answer.refuses("abab", "abx", "abc", [1.0], because="`heldout` has an x, which is not in the alphabet")
    answer.refuses("abab", "xab", "abc", [1.0], because="`heldout` begins with an x, which is not in the alphabet")


# ---- entropy_rate


def entropies(P):
    """Of the rows, in nats."""
    return np.array([math.fsum(-p * math.log(p) for p in row if p) for row in P.tolist()])


@exercise(
    points=2,
    hints=(
        "If you knew the share of the time that the chain spends in each state, what would an average step cost?",
        "s = s P are S equations, but they also hold for 2 s, so one of them is too many. Which equation is missing?",
        "np.linalg.lstsq(np.vstack([P.T - np.eye(S), np.ones(S)]), [0, ..., 0, 1]) gives s and the rank, which is S "
        "unless the shares depend on the beginning. Then s @ (entropies of the rows).",
    ),
)
def test_entropy_rate(answer):
    # The shares are chosen first, as integers over 20; then what flows from i to j, so that as much flows in as out.
    flow = np.array([[4.0, 2, 0, 1], [0, 1, 3, 1], [2, 1, 1, 0], [1, 1, 0, 2]])
    shares = flow.sum(1) / 20
    P = flow / flow.sum(1, keepdims=True)
    assert np.array_equal(flow.sum(0), flow.sum(1)) and np.allclose(shares @ P, shares)
    rows, own = entropies(P), entropies(shares[None])[0]
    values, vectors = np.linalg.eig(P)
    right = vectors[:, np.argmax(values.real)].real
    mistakes = {
        "the states count alike: the chain spends more of its time in some": rows.mean(),
        "the shares are the solution of s P = s: P s = s has equal shares for every chain": rows @ right,
        "the shares must sum to 1": rows @ shares / np.linalg.norm(shares),
        "this is in bits: nats have the natural logarithm": rows @ shares / math.log(2),
        "this is the entropy of the shares, as if the next state did not depend on the last": own,
        "this is the entropy of two states together, not of a step": own + rows @ shares,
        "0 * log 0 is NaN in NumPy: a step that cannot happen must cost nothing": math.nan,
        "surprise is positive: the sign is missing": -(rows @ shares),
        "this is the sum over the states: weight them by their shares": rows.sum(),
        "the columns are not the distributions: P[i, j] goes from i to j": shares @ entropies(P.T),
        "the chain does not spend all its time in the state where it began": rows[0],
    }
    got, want = answer(P), float(rows @ shares)
    exact(got, want, "nearly right: the shares are not exact; solve s P = s", tol=1e-9)
    expect(got, want, what="the entropy per step", tol=1e-9, mistakes=mistakes)

    # It alternates between states 0, 1 and states 2, 3, 4; in the long run each half has half of the time.
    there = np.array([[0.5, 0.25, 0.25], [0.1, 0.0, 0.9]])
    back = np.array([[0.2, 0.8], [1.0, 0.0], [0.6, 0.4]])
    P = np.zeros((5, 5))
    P[:2, 2:], P[2:, :2] = there, back
    turn = there @ back  # two steps, from 0 or 1 to 0 or 1
    two = np.array([turn[1, 0], turn[0, 1]]) / (turn[1, 0] + turn[0, 1])
    half = float(two @ entropies(there)), float(two @ there @ entropies(back))
    settles = "repeating s P never settles where a chain alternates between two groups of states; solve s P = s"
    wrong_sides = {settles + " " * i: (1 - w) * half[0] + w * half[1] for i, w in enumerate((0, 1, 0.4, 0.6))}
    wrong_sides["-1 is an eigenvalue, too, where a chain alternates; its vector sums to 0, it holds no shares"] = (
        math.nan
    )
    want = sum(half) / 2
    what = "the entropy per step of a chain that alternates between states 0, 1 and states 2, 3, 4"
    got = allowed(answer, P, because="a chain that alternates between two groups of states has an entropy per step")
    expect(got, want, what=what, tol=1e-9, mistakes=wrong_sides)

    slow = np.array([[0.7, 0.3 - 1e-5, 1e-5], [0.2, 0.8, 0.0], [4e-5, 0.0, 1 - 4e-5]])
    up = np.array([0.2, 0.3, 0.05])  # 0 and 1 in balance, 0 and 2 in balance: 0.2 * 1e-5 = 0.05 * 4e-5
    up[1] = up[0] * (0.3 - 1e-5) / 0.2
    want = float(up @ entropies(slow)) / up.sum()
    got = allowed(answer, slow, because="a chain that seldom goes to state 2 and back has an entropy per step")
    says(
        isinstance(got, float) and abs(got - want) < 1e-8,
        "repeating s P has not settled yet: this chain leaves state 2 once in 25,000 steps; solve s P = s",
        f"got     {got:.6g}, where {want:.6g} is right",
    )

    left = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [0.0, 0.5, 0.5]])
    want = float(np.array([0.4, 0.6]) @ entropies(left[1:]))
    got = allowed(answer, left, because="a chain that leaves state 0 for ever spends all its time in the others")
    expect(got, want, what="the entropy per step of a chain that leaves state 0 for ever", tol=1e-9)
    ring = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    expect(answer(ring), 0.0, what="the entropy per step of a chain that goes round without any choice", tol=1e-9)
    expect(answer(np.array([[1.0]])), 0.0, what="the entropy per step of a chain of one state", tol=1e-9)
    for steps in (5, 7):  # states 0 and 1 share one of the places of a ring
        P = np.roll(np.eye(steps + 1), 1, axis=1)
        P[0, 1:3], P[-1, :2] = (0.0, 1.0), (0.25, 0.75)
        chain = f"a chain that goes round in {steps} steps, of which one is by chance"
        got, want = allowed(answer, P, because=f"{chain}, has an entropy per step"), float(entropies(P)[-1]) / steps
        says(
            not isinstance(got, float) or not 0 <= got < math.inf or abs(got - want) < 1e-9,
            f"the mean of a few powers of P is right for some chains only, and not for {chain}; solve s P = s",
            f"got     {got:.6g}, where {want:.6g} is right" if isinstance(got, float) else "",
        )
        expect(got, want, what=f"the entropy per step of {chain},", tol=1e-9)

    apart = np.array([[0.7, 0.3, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.1, 0.9], [0.0, 0.0, 0.2, 0.8]])
    answer.refuses(apart, because="states 0, 1 and states 2, 3 never meet: the entropy depends on the beginning")
    fork = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    answer.refuses(fork, because="state 0 leads to state 1 or to state 2, which are never left: nobody knows which")
    answer.refuses(np.array([[0.9, 0.3], [0.1, 0.7]]), because="the columns sum to 1, not the rows")
    answer.refuses(np.array([[0.5, 0.75, -0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]), because="P[0, 2] is negative")
    answer.refuses(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]), because="P has two rows and three columns")
    answer.refuses(np.array([[0.5, 0.5], [math.nan, 0.5]]), because="P has a NaN")
    for part, total in ((0.51, 1.01), (0.49, 0.99)):
        answer.refuses(
            np.array([[0.5, 0.5], [0.5, part]]), because=f"row 1 of P sums to {total}, which is no distribution"
        )


# ---- log_prob_of_text


def cuttings(text, pieces):
    """All ways to cut the text into pieces."""
    if not text:
        return [[]]
    return [[p, *rest] for p in pieces if text.startswith(p) for rest in cuttings(text[len(p) :], pieces)]


def log_sum(logs):
    top = max(logs, default=-math.inf)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(x - top) for x in logs))


def by_list(text, pieces, end, again=True, stop=True, choose=log_sum, pick=lambda ways: ways):
    """The log-probability from the list of all ways; with mistakes, if it is told to make them."""
    one = math.log(1 - end) if again else 0.0
    logs = [math.fsum(one + math.log(pieces[p]) for p in way) for way in pick(cuttings(text, pieces))]
    return choose(logs) + (math.log(end) if stop else 0.0)


def forwards(text, pieces, end, start):
    """The log-probability by a table of probabilities; `start` is in each place before anything is added."""
    ways = [1.0] + [start] * len(text)
    for i in range(1, len(ways)):
        ways[i] += sum(ways[i - len(p)] * (1 - end) * pieces[p] for p in pieces if text.endswith(p, 0, i))
    return math.log(ways[-1] * end)


@exercise(
    points=3,
    hints=(
        "Look at the last piece of the text. If you knew the answer for every shorter beginning, how would you get it?",
        "ways[i] for text[:i] is the sum, over the pieces that it ends with, of ways[i - len(piece)] * (1 - end) * p. "
        "Then do the same with logarithms, where a sum is np.logaddexp.",
        "Start with ways = [0.0] + [-inf] * len(text). For each i and each piece with text.startswith(piece, i), add "
        "ways[i] + log((1 - end) * p) to ways[i + len(piece)] by np.logaddexp. The result is ways[-1] + log(end).",
    ),
)
def test_log_prob_of_text(answer):
    pieces = {"a": 0.31, "ab": 0.07, "b": 0.22, "aba": 0.03, "ba": 0.27, "é": 0.06, "bé": 0.04}
    end, text = 0.15, "ababéabaab"
    want = by_list(text, pieces, end)
    assert math.isclose(forwards(text, pieces, end, 0.0), want)
    letters = math.fsum(math.log(pieces[c]) for c in text) + math.log(end)
    stay = math.log(1 - end) * len(text)
    distinct = lambda ways: {tuple(sorted(way)): way for way in ways}.values()
    mistakes = {
        "this is the most probable way alone: the probabilities of all ways add up": by_list(
            text, pieces, end, choose=max
        ),
        "this is the way that takes the longest piece each time: the probabilities of all ways add up": by_list(
            text, pieces, end, pick=lambda ways: [max(ways, key=lambda way: [*map(len, way)])]
        ),
        "the source must stop after the text, which has the probability `end`": by_list(text, pieces, end, stop=False),
        "before each piece the source did not stop, which has the probability 1 - end": by_list(
            text, pieces, end, again=False
        ),
        "stopping counts, too: before each piece it did not stop (1 - end), at the end it did (`end`)": by_list(
            text, pieces, end, again=False, stop=False
        ),
        "the source may stop before each piece, not before each character": stay
        + by_list(text, pieces, end, again=False),
        "0 is the logarithm of 1: where the source has not been yet, the log-probability is -inf": forwards(
            text, pieces, end, 1.0
        ),
        "pieces have more than one character, too": letters,
        "one character after the other is one way among many": letters + stay,
        "this text can come about: at each place try all pieces, then go on to the next place": -math.inf,
        "probabilities add up, not their logarithms": by_list(text, pieces, end, choose=math.fsum),
        "this is the average over the ways: their probabilities add up": want - math.log(len(cuttings(text, pieces))),
        "the same pieces in another order are another way": by_list(text, pieces, end, pick=distinct),
        "this is the probability: take its logarithm": math.exp(want),
        "this is the surprise: a log-probability is negative": -want,
        "this is in bits: nats have the natural logarithm": want / math.log(2),
        "this is the log of the number of ways": math.log(len(cuttings(text, pieces))),
        "`end` and 1 - end have changed places": by_list(text, pieces, 1 - end),
    }
    expect(answer(text, pieces, end), want, what="the log-probability of a text of 10 characters", mistakes=mistakes)
    expect(answer("", pieces, end), math.log(end), what="the log-probability of the empty text")
    expect(answer("b", pieces, end), by_list("b", pieces, end), what="the log-probability of one letter")

    dead = {"aab": 0.5, "ba": 0.3, "c": 0.2}
    nowhere = {
        "no piece fits: the log of 0 is -inf, and -inf - (-inf) is NaN": math.nan,
        "no piece fits: the probability is 0, so its logarithm is -inf": 0.0,
        "a text that cannot come about has the log-probability -inf": math.log(0.1),
    }
    for text in ("x", "xc", "aacc", "caab?", "aabb", "bac" * 3 + "b"):
        what = f"the log-probability of {text!r}, which cannot come about,"
        got = allowed(answer, text, dead, 0.1, because=f"{text!r} cannot come about, so the result is -inf")
        expect(got, -math.inf, what=what, mistakes=nowhere)
    expect(
        answer("aabbac", dead, 0.1), by_list("aabbac", dead, 0.1), what="the log-probability where one way only goes on"
    )

    # A full stop is a piece of its own, so a text of n equal sentences has n times the log-probability of one.
    pieces = {"a": 0.3, "ab": 0.1, "b": 0.2, "ba": 0.15, ".": 0.25}
    for n in (1, 700):
        sentence = by_list("ababba.", pieces, 0.001) - math.log(0.001)
        got = answer("ababba." * n, pieces, 0.001)
        what = f"the log-probability of a text of {7 * n:,} characters"
        too_small = {
            "the probability of a long text is too small for a float: stay with logarithms": -math.inf,
            "the probability of a long text is too small for a float, which became NaN: stay with logarithms": math.nan,
        }
        expect(got, n * sentence + math.log(0.001), what=what, mistakes=too_small)
