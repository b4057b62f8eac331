"""Chapter 00, tales: answers to exercises/ex00_tales.py."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

# ---- a number that can be compared


def bits_per_byte(loss: float, tokens: list[str]) -> float:
    """From a loss per token to bits per byte, which can be compared between models with different tokens.

    tokens: the text, cut into pieces. loss: the average surprise of a token, in nats. A token may be empty: the mark
    for the end of a text costs something to predict and has no bytes. A byte is one of the text's UTF-8. Without any
    byte there is no such number: ValueError. (Characters are not bytes: a paper printed bits per character that were
    bits per byte, facebookresearch/adaptive-span issue 17.)

    >>> bits_per_byte(math.log(2), ["caf", "é"])  # 2 tokens of 1 bit each, 5 bytes
    0.4

    Level 1 of 3, 5 minutes, lesson 00 section 2.
    """
    length = sum(len(token.encode()) for token in tokens)
    if not length:
        raise ValueError("a text without bytes has no bits per byte")
    bits = loss * len(tokens) / math.log(2)  # of the whole text: only totals can be divided anew
    return bits / length


# ---- zeros


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    """The cross-entropy of the model q in nats, when things really come with the probabilities p. Exact at zeros.

    p, q: float64 arrays of one shape (N,). What never comes (p is 0) costs nothing, whatever q says. What comes
    although q is 0 makes the result inf. ValueError if the lengths differ, or if p or q is no distribution: a part is
    negative or NaN, or the sum is not 1 (up to rounding). Nothing is clipped and no small number added: that would
    make every result a little wrong. (Where p is 0, 0 * log 0 came out as NaN in TheAlgorithms/Python issue 12233.)

    >>> p = np.array([0.5, 0.5, 0.0])
    >>> print(round(cross_entropy(p, np.array([0.25, 0.75, 0.0])), 4))
    0.837
    >>> print(cross_entropy(p, np.array([0.0, 0.75, 0.25])))
    inf

    Level 1 of 3, 15 minutes, lesson 00 section 2.
    """
    if p.shape != q.shape:
        raise ValueError(f"p and q have different shapes: {p.shape} and {q.shape}")
    for name, part in (("p", p), ("q", q)):
        if not (part >= 0).all() or not math.isclose(part.sum(), 1):  # not `part < 0`: NaN is not below 0 either
            raise ValueError(f"{name} is no distribution: {part}")
    comes = p > 0  # leave out the rest: 0 * inf is NaN, but what never comes costs nothing
    surprises = [-math.log(part) if part else math.inf for part in q[comes]]
    return p[comes] @ surprises


# ---- Shannon's twin


def decode_guesses(guesses: list[int | str], order: Callable[[str], str]) -> str:
    """Shannon's identical twin: get the text back from the numbers of guesses.

    A player guessed a text, character by character. order(prefix) tells what the player guesses after `prefix` (all
    text up to there, "" at the beginning): a string of different characters, the first guess first. `guesses` has one
    entry per character: the number of guesses, 1 if the first was right; or, if no guess was right, the character
    itself. A number that is no place in what `order` gives: ValueError. `order` asks a large model: call it once at
    most for each character. (LLMZip and other programs compress text like this. What to do when the right one is not
    among the guesses: google-deepmind/language_modeling_is_compression issue 17.)

    >>> def order(prefix):  # always guesses the last character first, then the vowels
    ...     return prefix[-1:] + "".join(c for c in "aeiou" if c != prefix[-1:])
    >>> decode_guesses(["b", 3, 1, "!"], order)
    'bee!'

    Level 1 of 3, 10 minutes, lesson 00 section 8.
    """
    text = ""
    for guess in guesses:
        if isinstance(guess, str):
            text += guess
            continue
        likely = order(text)
        if not 1 <= guess <= len(likely):  # without this, likely[0 - 1] would be the last one
            raise ValueError(f"{guess} guesses, where the player has {len(likely)}")
        text += likely[guess - 1]
    return text


# ---- a bug hunt


def hunt_perplexity(perplexity: Callable[[list[tuple[np.ndarray, np.ndarray]]], float]) -> None:
    """A bug hunt: write the test that catches a mean of means.

    `perplexity(batches)` is somebody's perplexity of a test text: e to the power of the average surprise of a token.
    A batch is a pair (losses, mask) of arrays of shape (B, T): B pieces of text, in nats per token, filled up to T
    tokens. `mask` is True where there is a token; elsewhere `losses` holds any finite numbers. B and T differ from
    batch to batch. There is at least one batch, and in each at least one token.

    A mean of the batches' means is wrong when they differ in length: a token of a short one counts more. Many have
    taken it: the documentation of transformers (huggingface/transformers pull request 34387), its trainer (issue
    24725), macournoyer/neuralconvo (issue 67). Another weighted the means by rows (keras-team/keras-hub pull request
    2958).

    Call `perplexity` with inputs of your choice and `assert` what must be true of the result, so that your test passes
    correct versions, however they are written, also in float32, and fails wrong ones. This test passes everything:

    >>> def hunt_nothing(perplexity):
    ...     assert perplexity([(np.zeros((1, 1)), np.ones((1, 1), dtype=bool))]) == 1

    Level 2 of 3, 20 minutes, lesson 00 section 2.
    """
    # No two tokens cost the same, no two rows and no two batches are alike, and what the mask hides is expensive.
    first = np.array([[1.0, 9.0, 9.0], [2.0, 3.0, 9.0]]), np.array([[1, 0, 0], [1, 1, 0]], dtype=bool)
    second = np.array([[0.5, 4.0, 0.1, 0.2, 0.3]]), np.ones((1, 5), dtype=bool)
    third = np.array([[0.7, 8.0]]), np.array([[1, 0]], dtype=bool)
    want = np.exp((1 + 2 + 3 + 0.5 + 4 + 0.1 + 0.2 + 0.3 + 0.7) / 9)
    got = perplexity([first, second, third])
    assert np.isclose(got, want, rtol=1e-4), f"{got}, not {want}"


# ---- smoothing, chosen on text held out


def choose_k(train: str, heldout: str, alphabet: str, ks: list[float]) -> tuple[float, float]:
    """Smooth a model of pairs of characters by adding k to every count, and choose the k that is best on other text.

    The model says what follows the character b: p(c | b) = (how often c followed b in `train` + k) / (how often
    anything followed b in `train` + ...), where the dots are such that the p of all characters of `alphabet` sum to 1.
    A k is as good as its loss is low: the average surprise in nats of each character of `heldout` given the one
    before; the first one has none before, and is not counted. Returns the best of `ks` and its loss.

    ks: positive numbers. alphabet: different characters; `train` need not show all of them. ValueError if `train` or
    `heldout` has a character that is not in it. `heldout` has two characters or more.

    >>> k, loss = choose_k("abababac", heldout="abcab", alphabet="abcd", ks=[0.1, 1.0, 10.0])
    >>> print(k, round(loss, 4))
    1.0 1.1796

    Level 2 of 3, 20 minutes, lesson 00 section 7.
    """
    if strange := set(train + heldout) - set(alphabet):
        raise ValueError(f"not in the alphabet: {sorted(strange)}")
    pairs = Counter(zip(train, train[1:]))
    before = Counter(train[:-1])  # nothing follows the last character

    def loss(k):
        odds = [(pairs[b, c] + k) / (before[b] + k * len(alphabet)) for b, c in zip(heldout, heldout[1:])]
        return -sum(map(math.log, odds)) / len(odds)

    best = min(ks, key=loss)
    return best, loss(best)


# ---- a floor


def entropy_rate(P: np.ndarray) -> float:
    """The entropy of a Markov chain per step, in nats: the floor for any model of the text that it writes.

    P: float64 array (S, S), the probabilities of going from state i (row) to state j (column). In the long run the
    chain spends a share s[i] of its time in state i; these shares do not change by a step, s = s P, and sum to 1. The
    result is the average, with these shares, of the entropies of the rows.

    Some chains only ever alternate, so that repeating s P never settles (networkx/networkx issue 1704); they have an
    entropy rate like any other. A state may be left for ever; then its share is 0. But if there are two parts, neither
    of which can be left, the shares depend on where the chain began: ValueError. Also if P is not square, or a row is
    no distribution.

    >>> print(round(entropy_rate(np.array([[0.0, 1.0], [0.5, 0.5]])), 4))  # two thirds of the time in state 1
    0.4621

    Level 2 of 3, 30 minutes, lesson 00 section 6.
    """
    S = len(P)
    if P.shape != (S, S) or not (P >= 0).all() or not np.allclose(P.sum(axis=1), 1):
        raise ValueError("every row must be a distribution over the states")
    # S + 1 equations for S shares: s (P - I) = 0, and they sum to 1. Full rank: there is one solution only.
    equations = np.vstack([P.T - np.eye(S), np.ones(S)])
    shares, _, rank, _ = np.linalg.lstsq(equations, np.append(np.zeros(S), 1))
    if rank < S:
        raise ValueError("the shares depend on where the chain begins")
    surprise = -np.log(np.where(P > 0, P, 1))
    return shares @ (P * surprise).sum(axis=1)


# ---- many ways to the same text


def log_prob_of_text(text: str, pieces: dict[str, float], end: float) -> float:
    """The log-probability of a text that can be made in many ways.

    A source writes a text like this: with probability `end` it stops, otherwise it draws one of `pieces`, writes it,
    and begins anew. Pieces may overlap ("a", "ab", "b"), so the same text can come about in many ways, whose
    probabilities add up. (Tales has only one way for each story, see section 5. Subword tokenizers have many, and it
    is tempting to count the best one alone: google/sentencepiece issue 462.)

    pieces: {piece: probability}; none is empty, all probabilities are positive and sum to 1. 0 < end < 1. Returns the
    natural logarithm; -inf for a text that cannot come about. Texts have thousands of characters: their probability
    is too small for a float, and their ways are too many to be listed.

    >>> print(round(log_prob_of_text("ab", {"a": 0.5, "b": 0.3, "ab": 0.2}, end=0.1), 4))
    -3.5016
    >>> print(round(math.log(0.1 * (0.9 * 0.2 + 0.9 * 0.5 * 0.9 * 0.3)), 4))  # "ab", or "a" and then "b"
    -3.5016

    Level 3 of 3, 35 minutes, lesson 00 section 5.
    """
    # ways[i]: the log-probability that the source, at some time, has written text[:i]
    ways = [0.0] + [-math.inf] * len(text)
    for i in range(len(text)):
        for piece, probability in pieces.items():
            if text.startswith(piece, i):
                after = i + len(piece)
                one = ways[i] + math.log((1 - end) * probability)
                ways[after] = np.logaddexp(ways[after], one)  # log(e^a + e^b), without leaving the logarithms
    return ways[-1] + math.log(end)
