"""The truth table of exercises/test_ex00_tales.py."""

HEAD = """
import functools
import itertools
import math
import unicodedata
from collections import Counter
import numpy as np
"""

RIGHT = {
    "bits_per_byte": {
        "of the joined text, in nats to the end": """
def bits_per_byte(loss, tokens):
    data = "".join(tokens).encode("utf-8")
    if data == b"":
        raise ValueError
    return math.log2(math.exp(loss)) / (len(data) / len(tokens))
""",
        "in NumPy": """
def bits_per_byte(loss, tokens):
    sizes = np.array([len(bytes(token, "utf-8")) for token in tokens])
    if sizes.sum() == 0:
        raise ValueError("nothing")
    return np.float64(loss) * np.log2(np.e) / sizes.mean()
""",
    },
    "cross_entropy": {
        "a loop": """
def cross_entropy(p, q):
    if len(p) != len(q):
        raise ValueError("lengths")
    for d in (p, q):
        if any(not x >= 0 for x in d) or abs(sum(d) - 1) > 1e-6:
            raise ValueError("no distribution")
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist()):
        if a > 0:
            total += math.inf if b == 0 else a * math.log(1 / b)
    return total
""",
        "np.where on both sides of the product": """
def cross_entropy(p, q):
    assert_like = p.shape == q.shape and np.isclose([p.sum(), q.sum()], 1).all() and min(p.min(), q.min()) >= 0
    if not assert_like:
        raise ValueError
    if np.any((p > 0) & (q == 0)):
        return np.inf
    return np.sum(np.where(p > 0, p * -np.log(np.where(p > 0, q, 1.0)), 0.0))
""",
        "np.log with where, entropy plus divergence": """
def cross_entropy(p, q):
    if p.shape != q.shape or np.isnan(p + q).any() or (p < 0).any() or (q < 0).any():
        raise ValueError
    if not (np.isclose(p.sum(), 1) and np.isclose(q.sum(), 1)):
        raise ValueError
    with np.errstate(divide="ignore"):
        logs = np.log(q, where=p > 0, out=np.zeros_like(p))
        own = np.log(p, where=p > 0, out=np.zeros_like(p))
    return float((p * own).sum() * -1 + sum(a * (b - c) for a, b, c in zip(p, own, logs) if a))
""",
    },
    "decode_guesses": {
        "a list of characters": """
def decode_guesses(guesses, order):
    chars = []
    for guess in guesses:
        if type(guess) is int:
            options = dict(enumerate(order("".join(chars)), 1))
            if guess not in options:
                raise ValueError(guess)
            guess = options[guess]
        chars.append(guess)
    return "".join(chars)
""",
        "recursion, order asked about spelled characters, too": """
def decode_guesses(guesses, order, prefix=""):
    if not guesses:
        return prefix
    guess, likely = guesses[0], order(prefix)
    if not isinstance(guess, str):
        if guess < 1 or guess > len(likely):
            raise ValueError("no such guess")
        guess = likely[guess - 1]
    return decode_guesses(guesses[1:], order, prefix + guess)
""",
    },
    "hunt_perplexity": {
        "two batches, by a property and a value": """
def hunt_perplexity(perplexity):
    rng = np.random.default_rng(0)
    batches = []
    for B, T in ((1, 7), (3, 2), (2, 5)):
        mask = rng.random((B, T)) < 0.6
        mask[0, 0] = True
        batches.append((rng.exponential(2.0, size=(B, T)) + ~mask * 3, mask))
    tokens = [x for losses, mask in batches for x in losses[mask].tolist()]
    assert abs(math.log(perplexity(batches)) - sum(tokens) / len(tokens)) < 1e-3
""",
        "whole numbers": """
def hunt_perplexity(perplexity):
    a = np.array([[2.0, 50.0], [4.0, 3.0]]), np.array([[True, False], [True, True]])
    b = np.array([[1.0, 1.0, 5.0, 6.0, 70.0]]), np.array([[True, True, True, True, False]])
    assert math.isclose(perplexity([a, b]), math.exp(22 / 7), rel_tol=1e-5)
""",
    },
    "choose_k": {
        "nested dictionaries": """
def choose_k(train, heldout, alphabet, ks):
    counts = {b: {c: 0 for c in alphabet} for b in alphabet}
    try:
        for b, c in zip(train[:-1], train[1:]):
            counts[b][c] += 1
        [counts[c] for c in train + heldout]
    except KeyError:
        raise ValueError("not in the alphabet")
    best = None
    for k in ks:
        total = 0
        for i in range(1, len(heldout)):
            row = counts[heldout[i - 1]]
            total -= math.log((row[heldout[i]] + k) / sum(n + k for n in row.values()))
        if best is None or total / (len(heldout) - 1) < best[1]:
            best = k, total / (len(heldout) - 1)
    return best
""",
        "a table in NumPy": """
def choose_k(train, heldout, alphabet, ks):
    ids = [[alphabet.index(c) for c in text] for text in (train, heldout)]
    table = np.zeros((len(alphabet), len(alphabet)))
    np.add.at(table, (ids[0][:-1], ids[0][1:]), 1)
    losses = []
    for k in ks:
        p = (table + k) / (table + k).sum(1, keepdims=True)
        losses.append(-np.log(p[ids[1][:-1], ids[1][1:]]).mean())
    return ks[int(np.argmin(losses))], min(losses)
""",
    },
    "entropy_rate": {
        "the eigenvector of P.T": """
def entropy_rate(P):
    if P.ndim != 2 or P.shape[0] != P.shape[1] or np.isnan(P).any() or (P < 0).any():
        raise ValueError
    if (abs(P.sum(1) - 1) > 1e-8).any():
        raise ValueError
    values, vectors = np.linalg.eig(P.T)
    one = np.flatnonzero(abs(values - 1) < 1e-9)
    if len(one) != 1:
        raise ValueError("several")
    s = vectors[:, one[0]].real
    s /= s.sum()
    return float(sum(s[i] * -x * math.log(x) for i, row in enumerate(P) for x in row if x > 0))
""",
        "a lazy chain, squared again and again": """
def entropy_rate(P):
    n = len(P)
    if P.shape != (n, n) or not ((P >= 0).all() and np.allclose(P.sum(1), 1)):
        raise ValueError
    lazy = (P + np.eye(n)) / 2
    for _ in range(60):
        lazy = lazy @ lazy
        lazy /= lazy.sum(1, keepdims=True)
    if not np.allclose(lazy, lazy[0]):
        raise ValueError
    with np.errstate(all="ignore"):
        H = -np.nansum(P * np.log(P), axis=1)
    return lazy[0] @ H
""",
        "one equation put in the place of another": """
def entropy_rate(P):
    n = P.shape[0]
    if P.shape[1] != n or not np.all(P >= 0) or not np.allclose(np.sum(P, axis=1), 1):
        raise ValueError
    if np.linalg.matrix_rank(P - np.eye(n)) != n - 1:
        raise ValueError
    A = P.T - np.eye(n)
    found = None
    for i in range(n):
        B = A.copy()
        B[i] = 1
        if np.linalg.matrix_rank(B) == n:
            found = np.linalg.solve(B, np.eye(n)[i])
    total = 0.0
    for share, row in zip(found, P):
        row = row[row > 0]
        total -= share * (row * np.log(row)).sum()
    return total
""",
    },
    "log_prob_of_text": {
        "forwards, a number and an exponent apart": """
def log_prob_of_text(text, pieces, end):
    # ways[i] times 2 ** shift[i]
    ways, shift = [1.0] + [0.0] * len(text), [0] * (len(text) + 1)
    for i in range(len(text)):
        if ways[i] == 0:
            continue
        for piece, p in pieces.items():
            if text.startswith(piece, i):
                j = i + len(piece)
                more = ways[i] * (1 - end) * p
                if ways[j] == 0:
                    ways[j], shift[j] = more, shift[i]
                else:
                    ways[j] += math.ldexp(more, shift[i] - shift[j])
                m, e = math.frexp(ways[j])
                ways[j], shift[j] = m, shift[j] + e
    if ways[-1] == 0:
        return -math.inf
    return math.log(ways[-1]) + shift[-1] * math.log(2) + math.log(end)
""",
        "from the end to the beginning, logsumexp by hand": """
def log_prob_of_text(text, pieces, end):
    longest = max(map(len, pieces))
    rest = {len(text): math.log(end)}
    for i in reversed(range(len(text))):
        found = []
        for j in range(i + 1, min(i + longest, len(text)) + 1):
            if text[i:j] in pieces and j in rest:
                found.append(math.log(1 - end) + math.log(pieces[text[i:j]]) + rest[j])
        if found:
            top = max(found)
            rest[i] = top + math.log(sum(math.exp(x - top) for x in found))
    return rest.get(0, float("-inf"))
""",
    },
}

# {exercise: {what the message says: the answer}}
WRONG = {
    "bits_per_byte": {
        "a token that comes twice counts twice": """
def bits_per_byte(loss, tokens):
    sizes = {token: len(token.encode()) for token in tokens}
    if not sum(sizes.values()):
        raise ValueError
    return loss * len(tokens) / math.log(2) / sum(sizes.values())
""",
        "a token that comes twice counts twice, for its surprise, too": """
def bits_per_byte(loss, tokens):
    tokens = set(tokens)
    length = sum(len(token.encode()) for token in tokens)
    if not length:
        raise ValueError
    return loss * len(tokens) / math.log(2) / length
""",
        "the text is taken as it is: normalising": """
def bits_per_byte(loss, tokens):
    length = len(unicodedata.normalize("NFC", "".join(tokens)).encode())
    if not length:
        raise ValueError
    return loss * len(tokens) / math.log(2) / length
""",
        "a line end is a byte, too": """
def bits_per_byte(loss, tokens):
    length = sum(len(line.encode()) for line in "".join(tokens).splitlines())
    if not length:
        raise ValueError
    return loss * len(tokens) / math.log(2) / length
""",
        "bits per character, not per byte": """
def bits_per_byte(loss, tokens):
    length = sum(map(len, tokens))
    if not length:
        raise ValueError
    return loss * len(tokens) / math.log(2) / length
""",
        "nats per byte, not bits": """
def bits_per_byte(loss, tokens):
    length = len("".join(tokens).encode())
    if not length:
        raise ValueError
    return loss * len(tokens) / length
""",
        "nats times ln 2 are not bits": """
def bits_per_byte(loss, tokens):
    length = len("".join(tokens).encode())
    if not length:
        raise ValueError
    return loss * math.log(2) * len(tokens) / length
""",
        "`loss` is the surprise of one token": """
def bits_per_byte(loss, tokens):
    length = len("".join(tokens).encode())
    if not length:
        raise ValueError
    return loss / math.log(2) / length
""",
        "the empty token must be predicted, too": """
def bits_per_byte(loss, tokens):
    tokens = [token for token in tokens if token]
    if not tokens:
        raise ValueError
    return loss * len(tokens) / math.log(2) / len("".join(tokens).encode())
""",
        "the length of a text is counted in bytes, not in bits": """
def bits_per_byte(loss, tokens):
    return loss / math.log(2) * len(tokens) / (8 * len("".join(tokens).encode()))
""",
        "divide total by total": """
def bits_per_byte(loss, tokens):
    return np.mean([loss / math.log(2) / len(token.encode()) for token in tokens if token])
""",
        "a text of no tokens has no bytes": """
def bits_per_byte(loss, tokens):
    return loss * len(tokens) / math.log(2) / max(1, len("".join(tokens).encode()))
""",
        "a text of two empty tokens has no bytes, which should raise ValueError, but it raises ZeroDivisionError": """
def bits_per_byte(loss, tokens):
    if not tokens:
        raise ValueError
    return loss * len(tokens) / math.log(2) / len("".join(tokens).encode())
""",
    },
    "cross_entropy": {
        "q is not clipped: 1e-30 is a probability like any other": """
def cross_entropy(p, q):
    for d in (p, q):
        if p.shape != q.shape or not math.isclose(d.sum(), 1) or not (d >= 0).all():
            raise ValueError
    if ((p > 0) & (q == 0)).any():
        return math.inf
    return -(p * np.log(np.maximum(q, 1e-12))).sum()
""",
        "sums to 0.99": """
def cross_entropy(p, q):
    for d in (p, q):
        if p.shape != q.shape or not abs(d.sum() - 1) < 0.05 or not (d >= 0).all():
            raise ValueError
    return math.fsum(-a * math.log(b) if b else math.inf for a, b in zip(p, q) if a)
""",
        "the impossible comes once": """
def cross_entropy(p, q):
    for d in (p, q):
        if p.shape != q.shape or not math.isclose(d.sum(), 1) or not (d >= 0).all():
            raise ValueError
    return math.fsum(-a * math.log(b) if b else math.inf for a, b in zip(p, q) if a > 1e-6)
""",
        "p and q have changed places": """
def cross_entropy(p, q):
    return -(q * np.log(p)).sum()
""",
        "this is in bits": """
def cross_entropy(p, q):
    return -(p * np.log2(q)).sum()
""",
        "a thousand parts sum to 1 only up to rounding": """
def cross_entropy(p, q):
    for r in (p, q):
        if not (r >= 0).all() or abs(r.sum() - 1) > 2e-16:
            raise ValueError("the sum is not 1")
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "p sums to 0.99": """
def cross_entropy(p, q):
    if p.shape != q.shape:
        raise ValueError
    for r in (p, q):
        if not (r >= 0).all() or round(r.sum(), 1) != 1:
            raise ValueError
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "q sums to 1.01": """
def cross_entropy(p, q):
    if p.shape != q.shape or not (p >= 0).all() or not (q >= 0).all():
        raise ValueError
    if not math.isclose(p.sum(), 1) or not 0.995 < q.sum() < 1.04:
        raise ValueError
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "what the model loses": """
def cross_entropy(p, q):
    return (p * np.log(p / q)).sum()
""",
        "0 * log 0 is NaN in NumPy": """
def cross_entropy(p, q):
    return -(p * np.log(q)).sum()
""",
        "nearly right: was a small number added to the probabilities": """
def cross_entropy(p, q):
    return -((p + 1e-9) * np.log(q + 1e-9)).sum()
""",
        "nearly right: was a small number added to the probabilities, or does it compute in float32?": """
def cross_entropy(p, q):
    p, q = np.float32(p), np.float32(q)
    return float(-(p * np.log(q)).sum())
""",
        "what comes although q is 0 has an infinite surprise": """
def cross_entropy(p, q):
    return -sum(a * math.log(b) for a, b in zip(p, q) if a)
""",
        "its surprise has no limit": """
def cross_entropy(p, q):
    return -(p * np.log(np.clip(q, 1e-300, 1))).sum()
""",
        "the zeros of q were left out, as if these things never came: only zeros of p may be": """
def cross_entropy(p, q):
    both = (p > 0) & (q > 0)
    return -(p[both] * np.log(q[both])).sum()
""",
        "what never comes (p is 0) costs nothing, even if the model gives it 0": """
def cross_entropy(p, q):
    if (q == 0).any():
        return math.inf
    return -(p * np.log(q)).sum()
""",
        "p sums to 0.9": """
def cross_entropy(p, q):
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "p has a NaN": """
def cross_entropy(p, q):
    for r in (p, q):
        if (r < 0).any() or abs(r.sum() - 1) > 1e-9:
            raise ValueError
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "q has a negative part": """
def cross_entropy(p, q):
    if not (p >= 0).all() or not np.isclose([p.sum(), q.sum()], 1).all():
        raise ValueError
    return -sum(a * math.log(b) if b > 0 else -math.inf for a, b in zip(p, q) if a)
""",
        "p has one part and q three": """
def cross_entropy(p, q):
    for r in (p, q):
        if not (r >= 0).all() or not np.isclose(r.sum(), 1):
            raise ValueError
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
        "0.7 + 0.2 + 0.1 is 1 up to rounding": """
def cross_entropy(p, q):
    for r in (p, q):
        if not (r >= 0).all() or r.sum() != 1:
            raise ValueError("the sum is not 1")
    return -sum(a * math.log(b) if b else -math.inf for a, b in zip(p, q) if a)
""",
    },
    "decode_guesses": {
        "'3' is a character of the text, not a number of guesses": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        try:
            n = int(guess)
        except ValueError:
            text += guess
            continue
        likely = order(text)
        if not 1 <= n <= len(likely):
            raise ValueError
        text += likely[n - 1]
    return text
""",
        "Python counts from 0": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        text += guess if isinstance(guess, str) else order(text)[guess]
    return text
""",
        "not only at the last character": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        text += guess if isinstance(guess, str) else order(text[-1:])[guess - 1]
    return text
""",
        "order must be asked anew": """
def decode_guesses(guesses, order):
    likely = order("")
    return "".join(guess if isinstance(guess, str) else likely[guess - 1] for guess in guesses)
""",
        "a character that was not guessed belongs to the text so far": """
def decode_guesses(guesses, order):
    text, seen = "", ""
    for guess in guesses:
        if isinstance(guess, str):
            text += guess
        else:
            seen += order(seen)[guess - 1]
            text += seen[-1]
    return text
""",
        "0 is no number of guesses": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        if isinstance(guess, str):
            text += guess
        else:
            likely = order(text)
            if guess > len(likely):
                raise ValueError
            text += likely[guess - 1]
    return text
""",
        "8 is no number of guesses where the player has 7, which should raise ValueError, but it raises IndexError": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        if isinstance(guess, int) and guess < 1:
            raise ValueError
        text += guess if isinstance(guess, str) else order(text)[guess - 1]
    return text
""",
        "`order` was called": """
def decode_guesses(guesses, order):
    text = ""
    for guess in guesses:
        if isinstance(guess, int):
            if not 1 <= guess <= len(order(text)):
                raise ValueError
            guess = order(text)[guess - 1]
        text += guess
    return text
""",
    },
    "hunt_perplexity": {
        "passes the version that takes the mean of the batches' means": """
def hunt_perplexity(perplexity):
    losses = np.array([[1.0, 2.0, 9.0], [0.5, 4.0, 3.0]])
    mask = np.array([[1, 1, 0], [1, 1, 1]], dtype=bool)
    assert np.isclose(perplexity([(losses, mask)]), np.exp(losses[mask].mean()))
""",
        "passes the version that weights the batches' means by their numbers of places": """
def hunt_perplexity(perplexity):
    a, b = np.array([[1.0, 2.0], [0.5, 4.0]]), np.array([[0.7, 3.0, 0.2]])
    want = np.exp(np.append(a, b).mean())
    assert np.isclose(perplexity([(a, np.ones_like(a)), (b, np.ones_like(b))]), want)
""",
        "passes the version that raises 2": """
def hunt_perplexity(perplexity):
    a, b = np.array([[0.1, 0.2, 0.9], [0.5, 0.4, 0.3]]), np.array([[0.7, 0.2, 0.1, 0.3, 0.25]])
    ma, mb = np.array([[1, 1, 0], [1, 1, 1]]), np.array([[1, 0, 1, 1, 1]])
    assert np.isclose(perplexity([(a, ma), (b, mb)]), [np.exp(2.85 / 9), np.exp2(2.85 / 9)]).any()
""",
        "passes the version that weights the batches' means by their numbers of rows": """
def hunt_perplexity(perplexity):
    a, b = np.array([[1.0, 2.0], [9.0, 3.0]]), np.array([[4.0, 8.0, 0.5, 0.7]])
    ma, mb = np.array([[1, 1], [0, 1]]), np.array([[1, 1, 1, 1]])
    got = perplexity([(a, ma), (b, mb)])
    wrong = [np.exp((2 + 3.3) / 2), np.exp((6 + 13.2 / 2) / 8)]
    assert not np.isclose(got, wrong).any()
""",
        "passes the version that takes the mean of the rows' means": """
def hunt_perplexity(perplexity):
    losses = np.array([[1.0, 2.0, 9.0], [0.5, 4.0, 3.0]])
    mask = np.array([[1, 1, 0], [1, 1, 1]], dtype=bool)
    parts = [(losses[:1], mask[:1]), (losses[1:], mask[1:])]
    assert np.isclose(perplexity(parts), perplexity([(losses, mask)]))
    assert perplexity(parts) > perplexity(parts[:1])
    spoilt = np.where(mask, losses, 100)
    assert np.isclose(perplexity(parts), perplexity([(spoilt, mask)]))
""",
        "your test fails the version that": """
def hunt_perplexity(perplexity):
    a, b = np.array([[0.3, 2.1, 9.0]]), np.array([[0.7, 3.3]])
    ma, mb = np.array([[1, 1, 0]]), np.array([[1, 1]])
    assert perplexity([(a, ma), (b, mb)]) == np.exp((0.3 + 2.1 + 0.7 + 3.3) / 4)
""",
        "your test fails the version that puts all tokens into one array": """
def hunt_perplexity(perplexity):
    a, b = np.array([[1.0, 2.0, 0.5]]), np.array([[0.7, 3.0]])
    want = np.exp((a.mean() + b.mean()) / 2)
    assert np.isclose(perplexity([(a, a > 0), (b, b > 0)]), want)
""",
        "your test crashes": """
def hunt_perplexity(perplexity):
    a, b = np.array([[1.0, 2.0, 0.5]]), np.array([[0.7, 3.0]])
    if not np.isclose(perplexity([(a, a > 0), (b, b > 0)]), np.exp(7.2 / 5)):
        raise ValueError("wrong")
""",
    },
    "choose_k": {
        "where the smallest always looks best": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(train, train[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "so the sum grows by more than k": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "also for characters of the alphabet that `train` never shows": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(set(train))) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "the last character of `train` is counted": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train)
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "divide by how often that one was followed": """
def choose_k(train, heldout, alphabet, ks):
    pairs = Counter(zip(train, train[1:]))
    def loss(k):
        odds = [(pairs[b, c] + k) / (pairs.total() + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "take the average per character": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).sum()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "one surprise less than there are characters": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).sum() / len(heldout)
    return min(ks, key=loss), min(map(loss, ks))
""",
        "each character is predicted from the one before: count pairs": """
def choose_k(train, heldout, alphabet, ks):
    counts = Counter(train)
    def loss(k):
        return -sum(math.log((counts[c] + k) / (len(train) + k * len(alphabet))) for c in heldout) / len(heldout)
    return min(ks, key=loss), min(map(loss, ks))
""",
        "not as it has pairs": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet) ** 2) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "a product of a thousand probabilities is 0.0": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -math.log(math.prod(odds)) / len(odds)
    return min(ks, key=loss), min(map(loss, ks))
""",
        "a product of a thousand probabilities is 0.0: add up logarithms": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(np.prod(odds)) / len(odds)
    return min(ks, key=loss), min(map(loss, ks))
""",
        "in bits": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log2(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "`train` has an x, which is not in the alphabet": """
def choose_k(train, heldout, alphabet, ks):
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
        "`heldout` begins with an x": """
def choose_k(train, heldout, alphabet, ks):
    if set(train) - set(alphabet) or set(heldout[1:]) - set(alphabet):
        raise ValueError
    pairs, before = Counter(zip(train, train[1:])), Counter(train[:-1])
    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -np.log(odds).mean()
    return min(ks, key=loss), min(map(loss, ks))
""",
    },
    "entropy_rate": {
        "the states count alike": """
def entropy_rate(P):
    return np.mean([-sum(x * math.log(x) for x in row if x) for row in P])
""",
        "equal shares for every chain": """
def entropy_rate(P):
    values, vectors = np.linalg.eig(P)
    s = vectors[:, np.argmax(values.real)].real
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "this is in bits": """
def entropy_rate(P):
    s = np.linalg.matrix_power(P, 1000)[0]
    return s @ [-sum(x * math.log2(x) for x in row if x) for row in P]
""",
        "the entropy of the shares": """
def entropy_rate(P):
    s = np.linalg.matrix_power(P, 1000)[0]
    return -(s * np.log(s)).sum()
""",
        "nearly right: the shares are not exact": """
def entropy_rate(P):
    s = np.ones(len(P)) / len(P)
    while not np.allclose(s, s @ P):
        s = s @ P
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "a step that cannot happen must cost nothing": """
def entropy_rate(P):
    s = np.linalg.matrix_power(P, 1000)[0]
    return -(s @ (P * np.log(P)).sum(1))
""",
        "never settles": """
def entropy_rate(P):
    s = np.full(len(P), 1 / len(P))
    for _ in range(1000):
        s = s @ P
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "never settles ": """
def entropy_rate(P):
    s = np.linalg.matrix_power(P, 1001)[0]
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "repeating s P has not settled yet": """
def entropy_rate(P):
    s = np.full(len(P), 1 / len(P))
    mean = s * 0
    for _ in range(1000):
        s = s @ (P + np.eye(len(P))) / 2
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "a chain that leaves state 0 for ever spends all its time in the others": """
def entropy_rate(P):
    n = len(P)
    reach = np.linalg.matrix_power((P > 0).astype(int) + np.eye(n, dtype=int), n) > 0
    if not reach.all():
        raise ValueError("reducible")
    s = np.linalg.lstsq(np.vstack([P.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1))[0]
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "states 0, 1 and states 2, 3 never meet": """
def entropy_rate(P):
    n = len(P)
    s = np.linalg.lstsq(np.vstack([P.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1))[0]
    return s @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "the mean of a few powers of P is right for some chains only": """
def entropy_rate(P):
    late = P
    for _ in range(40):
        late = late @ late
        late /= late.sum(1, keepdims=True)
    mean = 0
    for _ in range(6):
        late = late @ P
        mean = mean + late / 6
    return mean[0] @ [-sum(x * math.log(x) for x in row if x) for row in P]
""",
        "row 1 of P sums to 1.01, which is no distribution": """
def entropy_rate(P):
    n = len(P)
    if P.shape != (n, n) or not (P >= 0).all() or not np.allclose(P.sum(1), 1, atol=0.05):
        raise ValueError
    s, _, rank, _ = np.linalg.lstsq(np.vstack([P.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1))
    if rank < n:
        raise ValueError
    return s @ [-sum(x * math.log(x) for x in row if x > 0) for row in P]
""",
        "the columns sum to 1, not the rows": """
def entropy_rate(P):
    n = len(P)
    s, _, rank, _ = np.linalg.lstsq(np.vstack([P.T - np.eye(n), np.ones(n)]), np.append(np.zeros(n), 1))
    if rank < n:
        raise ValueError
    return s @ [-sum(x * math.log(x) for x in row if x > 0) for row in P]
""",
    },
    "log_prob_of_text": {
        "this is the most probable way alone": """
def log_prob_of_text(text, pieces, end):
    best = [0.0] + [-math.inf] * len(text)
    for i in range(1, len(text) + 1):
        for piece, p in pieces.items():
            if text.endswith(piece, 0, i):
                best[i] = max(best[i], best[i - len(piece)] + math.log(p * (1 - end)))
    return best[-1] + math.log(end)
""",
        "takes the longest piece each time": """
def log_prob_of_text(text, pieces, end):
    total, i = math.log(end), 0
    while i < len(text):
        fits = [piece for piece in pieces if text.startswith(piece, i)]
        if not fits:
            return -math.inf
        piece = max(fits, key=len)
        total += math.log(pieces[piece] * (1 - end))
        i += len(piece)
    return total
""",
        "the source must stop after the text": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] + [-math.inf] * len(text)
    for i in range(1, len(text) + 1):
        for piece, p in pieces.items():
            if text.endswith(piece, 0, i):
                ways[i] = np.logaddexp(ways[i], ways[i - len(piece)] + math.log(p * (1 - end)))
    return ways[-1]
""",
        "before each piece the source did not stop": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] + [-math.inf] * len(text)
    for i in range(1, len(text) + 1):
        for piece, p in pieces.items():
            if text.endswith(piece, 0, i):
                ways[i] = np.logaddexp(ways[i], ways[i - len(piece)] + math.log(p))
    return ways[-1] + math.log(end)
""",
        "the probability of a long text is too small for a float": """
def log_prob_of_text(text, pieces, end):
    ways = [1.0] + [0.0] * len(text)
    for i in range(1, len(text) + 1):
        for piece, p in pieces.items():
            if text.endswith(piece, 0, i):
                ways[i] += ways[i - len(piece)] * p * (1 - end)
    return math.log(ways[-1]) + math.log(end) if ways[-1] else -math.inf
""",
        "-inf - (-inf) is NaN": """
def log_prob_of_text(text, pieces, end):
    ways = np.full(len(text) + 1, -np.inf)
    ways[0] = 0
    for i in range(1, len(text) + 1):
        found = [ways[i - len(w)] + np.log(p * (1 - end)) for w, p in pieces.items() if text.endswith(w, 0, i)]
        if found:
            ways[i] = max(found) + np.log(np.exp(np.array(found) - max(found)).sum())
    return float(ways[-1] + np.log(end))
""",
        "maximum recursion depth exceeded": """
def log_prob_of_text(text, pieces, end):
    @functools.cache
    def rest(i):
        if i == len(text):
            return math.log(end)
        found = [math.log(p * (1 - end)) + rest(i + len(w)) for w, p in pieces.items() if text.startswith(w, i)]
        return functools.reduce(np.logaddexp, found, -math.inf)
    return float(rest(0))
""",
        "still running after": """
def log_prob_of_text(text, pieces, end):
    def chance(text):
        if not text:
            return end
        return sum((1 - end) * p * chance(text[len(w):]) for w, p in pieces.items() if text.startswith(w))
    found = chance(text) if len(text) < 900 else sum(iter(int, 1))
    return math.log(found) if found else -math.inf
""",
        "0 is the logarithm of 1": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] * (len(text) + 1)
    for i in range(len(text)):
        for piece, p in pieces.items():
            if text.startswith(piece, i):
                j = i + len(piece)
                ways[j] = np.logaddexp(ways[j], ways[i] + math.log(p * (1 - end)))
    return ways[-1] + math.log(end)
""",
        "at each place try all pieces": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] + [-math.inf] * len(text)
    for piece, p in pieces.items():
        for i in range(len(text)):
            if text.startswith(piece, i):
                j = i + len(piece)
                ways[j] = np.logaddexp(ways[j], ways[i] + math.log(p * (1 - end)))
    return ways[-1] + math.log(end)
""",
        "not before each character": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] + [-math.inf] * len(text)
    for i in range(len(text)):
        for piece, p in pieces.items():
            if text.startswith(piece, i):
                ways[i + len(piece)] = np.logaddexp(ways[i + len(piece)], ways[i] + math.log(p))
    return ways[-1] + math.log(end) + len(text) * math.log(1 - end)
""",
        "'x' cannot come about, so the result is -inf, but it raises ValueError": """
def log_prob_of_text(text, pieces, end):
    ways = [1.0] + [0.0] * len(text)
    for i in range(len(text)):
        for piece, p in pieces.items():
            if text.startswith(piece, i):
                ways[i + len(piece)] += ways[i] * p * (1 - end)
    return math.log(ways[-1] * end)
""",
        "which cannot come about, should be -inf": """
def log_prob_of_text(text, pieces, end):
    ways = [0.0] + [-1e9] * len(text)
    for i in range(1, len(text) + 1):
        for piece, p in pieces.items():
            if text.endswith(piece, 0, i):
                ways[i] = np.logaddexp(ways[i], ways[i - len(piece)] + math.log(p * (1 - end)))
    return ways[-1] + math.log(end)
""",
    },
}

# {exercise: {mutant: why it computes the same}}
EQUIVALENT = {
    "cross_entropy: math.isclose(part.sum(), 1) -> math.isclose(1, part.sum())": "math.isclose is symmetric",
    "entropy_rate: np.allclose(P.sum(axis=1), 1) -> np.allclose(1, P.sum(axis=1))": "symmetric but for one part in 100,000"
    " of the tolerance",
    "entropy_rate: np.where(P > 0, P, 1) -> np.where(P > 0, P, 2)": "where P is 0, its logarithm is multiplied by 0",
    "log_prob_of_text: np.logaddexp(ways[after], one) -> np.logaddexp(one, ways[after])": "a sum is symmetric",
}
