"""Chapter 01, tokenizer: answers to exercises/ex01_tokenizer.py."""

import itertools
import math
from collections.abc import Callable

import numpy as np

# ---- Bytes that wait


def unfinished(data: bytes) -> int:
    """Count the bytes at the end of `data` that belong to a character which is not complete yet.

    data: what a model has written so far, a text in UTF-8 that may end anywhere, also inside a character. Returns 0 to
    3: so many bytes a program that prints the text must hold back until more bytes come.

    The first byte of a character tells how many bytes it has: below 0x80 one, from 0xC0 two, from 0xE0 three, from
    0xF0 four. All other bytes of a character are from 0x80 to 0xBF. Servers that decode each token for itself print
    damaged emoji (exo-explore/exo pull request 1691).

    >>> text = "an 🦉".encode("utf-8")  # the owl is the four bytes F0 9F A6 89
    >>> [unfinished(text[:end]) for end in (0, 3, 4, 5, 6, 7)]
    [0, 0, 1, 2, 3, 0]

    Level 1 of 3, 10 minutes, lesson 01 section 7.
    """
    for n, first in ((1, 0xC0), (2, 0xE0), (3, 0xF0)):
        # The byte that stands n from the end begins a character of more than n bytes: some are still to come.
        if len(data) >= n and data[-n] >= first:
            return n
    return 0


# ---- Letters that are bytes


def letters_to_bytes(token: str) -> bytes:
    """Turn a token as GPT-2's vocab.json writes it into the bytes for which it stands.

    token: each of its characters stands for one byte. The bytes 33 to 126, 161 to 172 and 174 to 255 are written as
    the character with the same code point. The other 68 bytes, from the smallest to the largest, are written as the
    characters with the code points 256 to 323; so the space, byte 32, is "Ġ", code point 288. The bytes need not be
    whole characters.

    Raises ValueError for a character that stands for no byte, for example a real space. A program that took 256 away
    from each code point above 255 spoiled every text that was not plain English (paiml/aprender pull request 2121).

    >>> letters_to_bytes("Ġthe")
    b' the'
    >>> letters_to_bytes("ÃŃ").decode("utf-8")
    'í'
    >>> list(letters_to_bytes("ðŁ¦"))  # the first three bytes of the owl
    [240, 159, 166]

    Level 1 of 3, 15 minutes, lesson 01 section 4.
    """
    others = [*range(33), *range(127, 161), 173]  # what Latin-1 does not print
    byte_of = {chr(256 + i): byte for i, byte in enumerate(others)}
    byte_of |= {chr(byte): byte for byte in range(256) if byte not in others}
    if not set(token) <= set(byte_of):
        raise ValueError(f"{token!r} has a character that stands for no byte")
    return bytes(byte_of[letter] for letter in token)


# ---- Pairs that overlap


def count_merges(words: dict[tuple[int, ...], int]) -> dict[tuple[int, int], int]:
    """Count how many merges each pair would bring: what the plain count of pairs gets wrong.

    words: the ids of each word, and how often this word occurs in the text. A merge goes from left to right and uses
    each id once, so (5, 5, 5) has room for one merge of (5, 5), and (5, 5, 5, 5) for two; the trainer of the lesson
    counts two and three there, as others do (karpathy/minbpe issue 51). Each pair is counted as if it were the only
    one to be merged.

    Returns a plain dict, not a Counter: for each pair that stands in a word, the merges in the whole text, in any
    order.

    >>> counts = count_merges({(1, 2, 1, 2): 10, (5, 5, 5): 3, (2,): 4})
    >>> counts == {(1, 2): 20, (2, 1): 10, (5, 5): 3}
    True

    Level 1 of 3, 15 minutes, lesson 01 section 6.
    """
    counts = {}
    for ids, times in words.items():
        free = {}  # pair -> the first position that its last merge has left free
        for i, pair in enumerate(zip(ids, ids[1:])):
            if free.get(pair, i) <= i:
                counts[pair] = counts.get(pair, 0) + times
                free[pair] = i + 2
    return counts


# ---- A bug hunt: in which order?


def hunt_merge_order(encode: Callable) -> None:
    """A bug hunt: write the test that catches an encoder which replays merges in the wrong way.

    `encode(ids, merges)` is somebody's byte-pair encoding of one word. ids: a list of whole numbers below 256; merges:
    a list of pairs in the order in which they were learned, where merge k makes the id 256 + k. It returns the list of
    ids after all merges. The right result is that of section 6: of all merges that fit, apply the one that was learned
    first, everywhere, from left to right, until none fits.

    One published encoder merged the first pair from the left that had a merge, whatever its rank: more than half of
    the English words came out in other pieces than the model had been trained on (ztxz16/fastllm pull request 715; a
    like case with "Hello," is rasbt/LLMs-from-scratch issue 558). Such an error raises no exception, and decoding
    still gives the text.

    Call `encode` with ids and merges of your choice and `assert` what must come out, so that your test passes correct
    versions, however they are written, and fails wrong ones. Choose merges that could have been learned: each joins
    two ids that exist before it, and no pair comes twice. For example, this test passes every version that loses
    nothing:

    >>> def hunt_nothing(encode):
    ...     assert encode([97, 98], []) == [97, 98]

    Level 2 of 3, 20 minutes, lesson 01 section 7.
    """
    a, b, c = 97, 98, 99
    for ids, merges, right in (
        ([a, b, c], [(b, c), (a, b)], [a, 256]),  # the first that was learned, not the first from the left
        ([a, b, c], [(b, c), (a, b), (257, c)], [a, 256]),  # nor the longest: abc has an id that is not reached
        ([a, b, c], [(a, b), (256, c)], [257]),  # a merge of what a merge has made
        ([a, a, a], [(a, a)], [256, a]),  # the pairs overlap: the left one wins
        ([a, b, a, b], [(a, b)], [256, 256]),  # everywhere, up to the end
        ([a, b, c], [(b, c), (a, b), (a, 256)], [258]),  # a has a merge with b, and then another with bc
    ):
        result = encode(ids, merges)
        assert result == right, f"{merges} make {result} of {ids}, not {right}"


# ---- Merges left to chance


def encode_dropout(ids: list[int], ranks: dict[tuple[int, int], int], drop: Callable[[], bool]) -> list[int]:
    """Encode a word with BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267): some merges are left out by chance.

    A model that is trained on many ways to write one word learns what its pieces are made of. ids: the ids of one
    word. ranks: the rank of each pair that has a merge; the merge of rank r makes the id 256 + r. drop: a function
    without arguments that returns True or False, by chance. Returns a new list of ids. Work in steps. In each step:

    1. Go from left to right through the places where a merge is possible, and call `drop()` once for each of them.
       Where it returns True, this place is out, for this step only.
    2. If no place remains, the word is done.
    3. Of the places that remain take the one with the lowest rank, and the leftmost of several with that rank. Merge
       this one place, and no other.

    >>> ranks = {(97, 98): 0, (256, 99): 1}  # a b, then ab c
    >>> encode_dropout([97, 98, 99], ranks, lambda: False), encode_dropout([97, 98, 99], ranks, lambda: True)
    ([257], [97, 98, 99])
    >>> chances = iter([False, True, True])  # abab: the second ab is dropped in the first step, and again in the next
    >>> encode_dropout([97, 98, 97, 98], ranks, lambda: next(chances))
    [256, 97, 98]

    Level 2 of 3, 25 minutes, lesson 01 section 7.
    """
    ids = list(ids)
    while True:
        places = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks and not drop()]
        if not places:
            return ids
        rank, i = min(places)  # tuples compare by rank, then by position
        ids[i : i + 2] = [256 + rank]


# ---- The most probable pieces


def viterbi(word: str, log_probs: dict[str, float]) -> list[str]:
    """Cut a word into the pieces whose product of probabilities is largest, as a unigram model does.

    word: any text, also a long one. log_probs: the natural logarithm of each piece's probability. Returns the pieces,
    from left to right; [] for the empty word. Of cuts that are equally probable, the one with the fewest pieces; if
    there are still several, any of them (two functions of SentencePiece choose differently there: google/sentencepiece
    issue 747).

    A piece of probability 0 has the log-probability -inf and is never used. Raises ValueError when no cut is possible.
    There are 2 ** (n - 1) ways to cut n letters: do not try them all. And a product of hundreds of probabilities is
    0.0 in floating point: stay with logarithms.

    >>> log_probs = {"l": -2.3, "o": -2.3, "w": -2.3, "e": -2.3, "s": -2.3, "t": -2.3, "low": -1.6, "owest": -3.9}
    >>> viterbi("lowest", log_probs)  # low e s t has -8.5
    ['l', 'owest']

    Level 2 of 3, 25 minutes, lesson 01 section 8.
    """

    def quality(pieces):
        return sum(log_probs[piece] for piece in pieces), -len(pieces)

    best = {0: []}  # end -> the best way to write word[:end]
    for end, _ in enumerate(word, 1):
        # Whatever its last piece is: what stands before that piece is itself written in the best way.
        starts = [start for start in best if log_probs.get(word[start:end], -math.inf) > -math.inf]
        if starts:
            best[end] = max((best[start] + [word[start:end]] for start in starts), key=quality)
    if len(word) not in best:
        raise ValueError(f"{word!r} cannot be written with these pieces")
    return best[len(word)]


# ---- The E step


def expected_counts(word: str, log_probs: dict[str, float]) -> dict[str, float]:
    """Count how often each piece is used on average over all ways to cut the word, weighted by their probability.

    word: any text, also a long one. log_probs: the natural logarithm of each piece's probability, -inf for 0. A way to
    cut the word has as its weight the product of the probabilities of its pieces, divided by the sum of these products
    over all ways. Returns, for each piece of log_probs, the sum over all ways of weight times number of uses: a plain
    dict of floats. Raises ValueError when the word cannot be cut.

    This is what training a unigram model needs (Kudo 2018, arXiv:1804.10959, section 3.2): these counts, added up over
    all words, give the next probabilities. To count only the best way is coarser; SentencePiece does so where it
    decides which pieces to drop, because these counts would cost too much there (google/sentencepiece issue 462).
    Again there are too many ways to go through one by one, and products that become 0.0.

    >>> log_probs = {"a": math.log(0.5), "aa": math.log(0.2)}  # a a has 0.25 and aa has 0.2: weights 5/9 and 4/9
    >>> {piece: round(count, 4) for piece, count in expected_counts("aa", log_probs).items()}
    {'a': 1.1111, 'aa': 0.4444}

    Level 3 of 3, 40 minutes, lesson 01 section 8.
    """
    before = log_totals(word, log_probs)
    after = log_totals(word[::-1], {piece[::-1]: log_prob for piece, log_prob in log_probs.items()})[::-1]
    if before[-1] == -math.inf:
        raise ValueError(f"{word!r} cannot be cut into these pieces")
    counts = dict.fromkeys(log_probs, 0.0)
    for start, end in itertools.combinations(range(len(word) + 1), 2):
        if (piece := word[start:end]) in log_probs:
            # All ways that have this piece here: any way before it, the piece, any way after it.
            counts[piece] += math.exp(before[start] + log_probs[piece] + after[end] - before[-1])
    return counts


def log_totals(word: str, log_probs: dict[str, float]) -> list[float]:
    """For each end, 0 to len(word): the logarithm of the sum of the probabilities of all ways to cut word[:end]."""
    totals = [0.0]
    for end, _ in enumerate(word, 1):
        pieces = [(start, word[start:end]) for start in range(end)]
        ways = [totals[start] + log_probs[piece] for start, piece in pieces if piece in log_probs]
        totals.append(np.logaddexp.reduce(ways))  # of none: -inf
    return totals
