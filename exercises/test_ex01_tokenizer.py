"""Grades exercises/ex01_tokenizer.py."""

import heapq
import itertools
import math
import random
from collections import Counter

from exercises.grading import Raised, Wrong, exercise, expect, hunt, same, says


def each(answer, cases, want, what, mistakes, tol=None, check=None):
    """Right in all cases; the message names the mistake that explains all answers, or is about the first wrong one.

    `check`, if given, is called with the first wrong value, the right one and the case, and may have more to say.
    """
    for sentence, values in mistakes.items():
        assert not same(values, want, tol), f"the grader cannot tell this mistake from the right answer: {sentence}"
    got = [answer(*case) for case in cases]
    named = [sentence for sentence, values in mistakes.items() if same(got, values, tol)]
    for case, value, right in zip(cases, got, want):
        try:
            expect(value, right, what=what, tol=tol)
        except Wrong as wrong:
            answer(*case)  # once more, so that the message shows this call
            sentence, details = str(wrong), wrong.details
            if type(value) is type(right) and isinstance(value, int | bytes | list):
                sentence, details = f"{what} is wrong", [f"got     {value!r}"[:100], f"right   {right!r}"[:100]]
            raise Wrong(named[0] if named else check and check(value, right, *case) or sentence, *details) from None


def sure(answer, *args, otherwise):
    """A call that must not raise; `otherwise` is what the message begins with when it does."""
    try:
        return answer(*args)
    except Raised as raised:
        raise Wrong(f"{otherwise}, but {raised}", *raised.details, trace=raised.trace) from None


# ---- unfinished


@exercise(
    points=1,
    hints=(
        "Only the last three bytes matter. What do they look like when a character of two, three or four bytes is cut?",
        "Find the byte that begins the last character: the last one that is not from 0x80 to 0xBF. How many bytes does"
        " it ask for, and how many are there?",
        "Look at the bytes n = 1, 2, 3 from the end: the answer is n where data[-n] is at least 0xC0, 0xE0 or 0xF0, for"
        " these n in turn, since such a byte asks for more than n bytes. Otherwise it is 0. Mind short data.",
    ),
)
def test_unfinished(answer):
    # Every first byte that decides: C2 and DF begin two bytes, E0 and EF three, F0 and F4 four. U+FFFD is a character.
    texts = ["a\u00bf\u00e9z\u07ff\u0e01\u0e01\ufffdb\U0001f989\U0010ffff!", "\u00e9", "\u0e01", "\U0001f989"]
    data, want, last, missing = [], [], [], []  # last: the bytes of the last character, be it complete or not
    for text in texts:
        for n, character in enumerate(text):
            raw = character.encode("utf-8")
            for there in range(1, len(raw) + 1):
                data.append(text[:n].encode("utf-8") + raw[:there])
                want.append(there % len(raw))
                last.append(there if len(raw) > 1 else 0)
                missing.append(len(raw) - there)
    shown = [some.decode("utf-8", errors="replace") for some in data]
    mistakes = {
        "it counts the bytes that continue a character, but not the byte that begins it": [max(n - 1, 0) for n in want],
        "it holds back the last character also when it is complete": last,
        "it counts the bytes that are still to come, not those that are there": missing,
        "it holds back one byte at most: up to three can be there": [min(n, 1) for n in want],
        "it holds back all bytes from 0x80 on at the end: complete characters have such bytes, too": [
            len(some) - len(some.rstrip(bytes(range(0x80, 0x100)))) for some in data
        ],
        "a real U+FFFD is a complete character: look at the bytes, not at what decoding puts in their place": [
            len(some) - len(text.rstrip("\ufffd").encode("utf-8")) for some, text in zip(data, shown)
        ],
        "decoding gives one U+FFFD for all bytes of half a character: it counts characters, not bytes": [
            len(text) - len(text.rstrip("\ufffd")) for text in shown
        ],
        "it holds back the whole text when its end cannot be decoded": [len(d) if n else 0 for d, n in zip(data, want)],
        "it holds back nothing": [0 for _ in data],
    }

    def check(value, right, some):
        if type(value) is int and right < value:
            return "it holds back bytes of a complete character"
        if type(value) is int:
            return "a program that holds back so little would print a part of a character"

    each(answer, [(some,) for some in data], want, "the number of bytes to hold back", mistakes, check=check)
    expect(answer(b""), 0, what="of no bytes the number to hold back")


# ---- letters_to_bytes

PRINTED = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
SHIFTED = sorted(set(range(256)) - PRINTED)
LETTERS = [chr(byte) if byte in PRINTED else chr(256 + SHIFTED.index(byte)) for byte in range(256)]


@exercise(
    points=1,
    hints=(
        "There are 256 letters: make a table that has all of them before you look at the token.",
        'List the 68 bytes that are not written as themselves. Which is number 0, which number 32, the one of "Ġ"?',
        "others = [*range(33), *range(127, 161), 173]; chr(256 + i) stands for others[i], and chr(byte) for each byte"
        " that is not in it. Look up each letter; one that is not in the table is a ValueError.",
    ),
)
def test_letters_to_bytes(answer):
    parts = [bytes(range(256))[part] for part in (slice(33), slice(33, 127), slice(127, 161), slice(161, 256))]
    want = [b" the", "í".encode(), b"\xf0\x9f\xa6", b"", *parts, bytes(range(255, -1, -1))]
    tokens = ["".join(LETTERS[byte] for byte in raw) for raw in want]
    numbers = [*sorted(PRINTED), *SHIFTED]
    mistakes = {
        "Ġ is not the only letter that stands for another byte: there are 67 more": [
            token.replace("Ġ", " ").encode("utf-8") for token in tokens
        ],
        "it takes 256 away from the larger code points, which is right for the first 33 only: then comes byte 127": [
            bytes(ord(c) % 256 for c in token) for token in tokens
        ],
        "these are the bytes of the letters in UTF-8, not the bytes for which the letters stand": [
            token.encode("utf-8") for token in tokens
        ],
        "these are GPT-2's ids of the bytes, not the bytes": [bytes(map(numbers.index, raw)) for raw in want],
        "bytes that are no whole characters are lost: no decoding is needed": [
            raw.decode("utf-8", errors="replace").encode("utf-8") for raw in want
        ],
        "the bytes that are no whole characters are left out: no decoding is needed": [
            raw.decode("utf-8", errors="ignore").encode("utf-8") for raw in want
        ],
    }

    def call(token):
        which = f"{token[0]!r} to {token[-1]!r}" if len(token) > 4 else repr(token)
        return sure(answer, token, otherwise=f"each letter of {which} stands for a byte")

    each(call, [(token,) for token in tokens], want, "the result", mistakes)
    for letter, which in {
        " ": "a real space stands for no byte (Ġ does)",
        "a\n": "a real line end stands for no byte (Ċ does)",
        "\x7f": "the character 127 stands for no byte (ġ does)",
        "\xa0": "the character 160 stands for no byte (ł does)",
        "\xad": "the character 173 stands for no byte (Ń does)",
        "aā\u0144": "the code points of letters end at 323, and this one is 324",
        "灯": "the code points of letters end at 323, and this one is 28783",
    }.items():
        answer.refuses(letter, because=which)
    for byte in sorted(set(range(256)) - PRINTED):
        answer.refuses(chr(byte), because=f"the character {byte} is not printed as itself, so it stands for no byte")


# ---- count_merges


def tally(words, runs=lambda n: n // 2, times=True):
    """Merges of each pair; of a run of n equal ids there are runs(n)."""
    counts = {}
    for ids, weight in words.items():
        weight = weight if times else 1
        for value, run in itertools.groupby(ids):
            if (n := len(list(run))) > 1:
                counts[value, value] = counts.get((value, value), 0) + weight * runs(n)
        for pair in zip(ids, ids[1:]):
            if pair[0] != pair[1]:
                counts[pair] = counts.get(pair, 0) + weight
    return counts


def tally_blocked(words):
    """As if all pairs were merged at once: none may touch another."""
    counts = {}
    for ids, weight in words.items():
        i = 0
        while i < len(ids) - 1:
            counts[ids[i : i + 2]] = counts.get(ids[i : i + 2], 0) + weight
            i += 2
    return counts


def tally_halved(words):
    """Half of the overlapping count of the word, rounded up: right for one run, wrong for two."""
    counts = {}
    for ids, weight in words.items():
        for pair, n in Counter(zip(ids, ids[1:])).items():
            counts[pair] = counts.get(pair, 0) + weight * ((n + 1) // 2 if pair[0] == pair[1] else n)
    return counts


def tally_stuck(words):
    """Where the last merge of a pair has ended is kept from one word to the next."""
    counts, free = {}, {}
    for ids, weight in words.items():
        for i, pair in enumerate(zip(ids, ids[1:])):
            if free.get(pair, 0) <= i:
                counts[pair] = counts.get(pair, 0) + weight
                free[pair] = i + 2
    return counts


@exercise(
    points=1,
    hints=(
        "Only a pair of two equal ids can overlap with itself. When?",
        "Go through a word from left to right. A pair counts only if it begins where the last one of the same pair that"
        " counted has ended, or later.",
        "For each word keep a dictionary: pair -> position after its last counted place. At position i count the pair,"
        " with the word's frequency, if that position is at most i; then set it to i + 2.",
    ),
)
def test_count_merges(answer):
    words = {
        **{(1, 2, 1, 2): 10, (5, 5, 5): 3, (6, 6, 6, 6): 7, (7,): 100, (4, 4, 9, 4, 4): 20, (2, 1): 5, (8,): 1},
        **{(3, 3, 3, 3, 3, 8, 3, 3, 3): 2, (8, 3, 3): 11, (5, 5): 1, (300,) * 6: 4, (1, 2, 3): 6},
    }
    cases = [{}, {(1, 2, 3): 3, (3, 2, 1): 1, (2, 3, 2): 5}, words]  # in the second nothing overlaps
    want = [tally(case) for case in cases]
    mistakes = {
        "pairs that overlap are all counted: (6, 6, 6, 6) has room for two merges of (6, 6), not for three": [
            tally(case, lambda n: n - 1) for case in cases
        ],
        "a word that occurs 10 times counts only once": [tally(case, times=False) for case in cases],
        "a pair that stands in a word twice is counted once": [
            dict(sum((Counter({pair: n for pair in zip(ids, ids[1:])}) for ids, n in case.items()), Counter()))
            for case in cases
        ],
        "two pairs that share an id, such as (1, 2) and (2, 3), count both: each for itself": [
            tally_blocked(case) for case in cases
        ],
        "(4, 4, 9, 4, 4) has two runs of 4: halve each run, not their sum": [tally_halved(case) for case in cases],
        "a run of three has room for one merge: round down, not up": [
            tally(case, lambda n: (n + 1) // 2) for case in cases
        ],
        "a run of n equal ids has room for n // 2 merges: it counts (n - 1) // 2": [
            tally(case, lambda n: (n - 1) // 2) for case in cases
        ],
        "what was counted in one word hides pairs of the next one": [tally_stuck(case) for case in cases],
        "a merge crosses the end of a word": [
            tally({tuple(i for ids, n in case.items() for i in ids * n): 1}) for case in cases
        ],
        "pairs that are not in these words come out: is the result kept from one call to the next?": [
            *want[:2],
            dict(Counter(want[1]) + Counter(want[2])),
        ],
    }

    def call(case):
        got = answer(case)
        return in_order(got) if type(got) is dict else got

    def in_order(counts):
        return dict(sorted(counts.items(), key=repr))

    mistakes = {sentence: [in_order(value) for value in values] for sentence, values in mistakes.items()}
    each(call, [(case,) for case in cases], [in_order(value) for value in want], "the result", mistakes)


# ---- hunt_merge_order


def merge_all(ids, pair, new):
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def by_rank(ids, merges, choose=min, rounds=math.inf, missing=None, replace=merge_all):
    """The definition; the options make it wrong."""
    ids, ranks, done = list(ids), {pair: rank for rank, pair in enumerate(merges)}, 0
    while done < rounds:
        fits = [ranks[pair] for pair in zip(ids, ids[1:]) if pair in ranks and ranks[pair] != missing]
        if not fits:
            break
        rank = choose(fits)
        ids, done = replace(ids, merges[rank], 256 + rank), done + 1
    return ids


def in_order(ids, merges):
    """Each merge once, in the order of learning: since a merge joins older ids, none fits again later."""
    for rank, pair in enumerate(merges):
        ids = merge_all(ids, pair, 256 + rank)
    return list(ids)


def one_place(ids, merges, index=0, last=0):
    """One merge at a time: the leftmost of lowest rank. With index -1 the rightmost; `last` ids are never looked at."""
    ids, ranks = list(ids), {pair: rank for rank, pair in enumerate(merges)}
    while places := [(ranks[p], i) for i, p in enumerate(zip(ids[: len(ids) - 1 - last], ids[1:])) if p in ranks]:
        rank = min(places)[0]
        i = [i for r, i in places if r == rank][index]
        ids[i : i + 2] = [256 + rank]
    return ids


def with_heap(ids, merges, fits=lambda pair, rank, ranks: ranks.get(pair) == rank):
    """A heap and a linked list. `fits` looks whether what comes out of the heap is still true."""
    ids, ranks = [*ids, -1], {pair: rank for rank, pair in enumerate(merges)}
    right, left = [*range(1, len(ids)), 0], [*range(-1, len(ids) - 1)]
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if min(ids[i], ids[j]) < 0 or not fits((ids[i], ids[j]), rank, ranks):
            continue
        ids[i], ids[j], right[i] = 256 + rank, -1, right[j]
        left[right[i]] = i
        for k in (left[i], i):
            if (pair := (ids[k], ids[right[k]])) in ranks:
                heapq.heappush(heap, (ranks[pair], k))
    return [i for i in ids if i >= 0]


def leftmost(ids, merges):
    """The first pair from the left that has a merge, whatever its rank."""
    ids, ranks = list(ids), {pair: rank for rank, pair in enumerate(merges)}
    while places := [i for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]:
        ids[places[0] : places[0] + 2] = [256 + ranks[ids[places[0]], ids[places[0] + 1]]]
    return ids


def longest(ids, merges):
    """From left to right the longest piece that is in the vocabulary."""
    pieces = {(i,): i for i in range(256)}
    for rank, (first, second) in enumerate(merges):
        parts = {i: piece for piece, i in pieces.items()}
        pieces.setdefault(parts[first] + parts[second], 256 + rank)
    out, at = [], 0
    while at < len(ids):
        end = max(end for end in range(at, len(ids) + 1) if tuple(ids[at:end]) in pieces)
        out.append(pieces[tuple(ids[at:end])])
        at = end
    return out


def at_once(ids, merges):
    """Only the pairs that stand in the word at the beginning, in the order of their ranks."""
    pairs = set(zip(ids, ids[1:]))
    for rank, pair in enumerate(merges):
        if pair in pairs:
            ids = merge_all(ids, pair, 256 + rank)
    return list(ids)


def swallow(ids, pair, new):
    """All places at once, as an array operation would: of three equal ids it makes one."""
    hits = [i for i, two in enumerate(zip(ids, ids[1:])) if two == pair]
    gone = {i + 1 for i in hits}
    return [new if i in hits else old for i, old in enumerate(ids) if i not in gone]


def learned(encode):
    """An encoder that looks first whether the merges could have been learned."""

    def checked(ids, merges):
        if not all(isinstance(i, int) for i in [*ids, *itertools.chain.from_iterable(merges)]):
            raise TypeError("ids and merges are made of whole numbers, not of letters")
        ids, merges = list(ids), [(first, second) for first, second in merges]
        if ids and not 0 <= min(ids) <= max(ids) < 256:
            raise ValueError(f"the ids of a word are 0 to 255 before any merge, not {ids}")
        for rank, pair in enumerate(merges):
            if not 0 <= min(pair) <= max(pair) < 256 + rank:
                raise ValueError(f"no training makes these merges: {pair} comes before its parts exist")
        if len(set(merges)) < len(merges):
            raise ValueError("no training makes these merges: a pair comes twice")
        return encode(ids, merges)

    checked.__name__ = "encode"
    return checked


@exercise(
    points=2,
    hints=(
        "Take the three letters of section 6, with b c learned before a b. Which versions differ there?",
        "Then merges of merged ids, three equal letters in a row, a word in which a merge happens twice or at its end.",
        "With a, b, c = 97, 98, 99: [a, b, c] with merges (b, c), (a, b), (257, c) is [a, 256]; with (a, b), (256, c)"
        " it is [257]; [a, a, a] with (a, a) is [256, a]. Try also a merge whose result is merged"
        " with the same neighbour that one of its parts could have taken: [a, b, c] with (b, c), (a, b), (a, 256) is"
        " [258].",
    ),
)
def test_hunt_merge_order(answer):
    right = {
        "the definition": by_rank,
        "a version that goes once through the merges in their order": in_order,
        "a version that does one merge at a time, at the leftmost place of the lowest rank": one_place,
        "a version with a heap and a linked list": with_heap,
    }
    wrong = {
        "the version that merges the first pair from the left, whatever its rank": leftmost,
        "the version that takes the longest piece from the left": longest,
        "the version that applies the merge that was learned last": lambda i, m: by_rank(i, m, max),
        "the version that never merges what a merge has made": at_once,
        "the version that stops after the first kind of merge": lambda i, m: by_rank(i, m, rounds=1),
        "the version that takes rank 0 for no rank, so that the first merge is never applied": lambda i, m: by_rank(
            i, m, missing=0
        ),
        "the version that makes one id of three equal ones": lambda i, m: by_rank(i, m, replace=swallow),
        "the version that merges from right to left": lambda i, m: one_place(i, m, -1),
        "the version that never looks at the last pair": lambda i, m: one_place(i, m, last=1),
        "the version whose heap is out of date: it merges two neighbours that were others when they were noted": (
            lambda i, m: with_heap(i, m, lambda pair, rank, ranks: True)
        ),
        "the version whose heap is out of date: it gives a pair the id of the pair that stood there before": (
            lambda i, m: with_heap(i, m, lambda pair, rank, ranks: pair in ranks)
        ),
    }
    hunt(
        answer,
        right={which: learned(encode) for which, encode in right.items()},
        wrong={which: learned(encode) for which, encode in wrong.items()},
    )


# ---- encode_dropout

# Not in the order of their ranks, so that the order of a dictionary is of no help. a b c are 97 98 99.
RANKS = {
    **{(257, 99): 3, (97, 98): 1, (258, 258): 5, (98, 99): 0, (257, 257): 6, (97, 97): 2, (97, 256): 4, (256, 256): 7},
    **{(258, 257): 9, (99, 97): 8},
}


def remaining(pairs, drop):
    """(rank, position) of the places that are not out."""
    return [(RANKS[pair], i) for i, pair in enumerate(pairs) if pair in RANKS and not drop()]


def dropout(ids, drop, remain=remaining, choose=min, offset=256, whole=False):
    """The definition; the options make it wrong."""
    ids = list(ids)
    while places := remain(list(zip(ids, ids[1:])), drop):
        rank, i = choose(places)
        here = [i]
        for other, j in places if whole else []:
            if other == rank and j > here[-1] + 1:
                here.append(j)
        for j in reversed(here):
            ids[j : j + 2] = [offset + rank]
    return ids


def leftmost_place(places):
    return min(places, key=lambda place: place[1])


def highest_rank(places):
    return max(places, key=lambda place: (place[0], -place[1]))


def rightmost_of_lowest(places):
    return min(places, key=lambda place: (place[0], -place[1]))


def forever():
    """What was dropped once is never merged."""
    never = set()

    def remain(pairs, drop):
        asked = [(i, pair) for i, pair in enumerate(pairs) if pair in RANKS and pair not in never]
        never.update([pair for _, pair in asked if drop()])
        return [(RANKS[pair], i) for i, pair in asked if pair not in never]

    return remain


def better(pairs, drop):
    """Asks only where the rank is lower than all before that remained."""
    places = []
    for i, pair in enumerate(pairs):
        if pair in RANKS and (not places or RANKS[pair] < places[-1][0]) and not drop():
            places.append((RANKS[pair], i))
    return places


def backwards(pairs, drop):
    return [(RANKS[pair], i) for i, pair in reversed(list(enumerate(pairs))) if pair in RANKS and not drop()]


def chance(p, seed=0):
    """A `drop` that gives the same answers every time. It ends the endless: no word here needs a thousand calls."""
    rng, calls = random.Random(seed), itertools.count()

    def drop():
        if next(calls) == 1000:
            raise RuntimeError("drop was called a thousand times for one word")
        return rng.random() < p

    return drop


@exercise(
    points=2,
    hints=(
        "Write it first without `drop`: one merge per step, at the leftmost place of the lowest rank.",
        "In each step make a list of (rank, position) of all places where a merge is possible, from left to right, and"
        " leave out those for which drop() is True. Tuples compare by their first part, then by the second.",
        "Repeat, on a copy of ids: places = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in"
        " ranks and not drop()]; if there are none, return; otherwise rank, i = min(places), and 256 + rank takes the"
        " place of ids[i : i + 2].",
    ),
)
def test_encode_dropout(answer):
    rng = random.Random(1)
    words = [[97], [97, 98, 99], [97, 97, 97], [99, 97, 98, 98]]
    words += [rng.choices([97, 97, 98, 99], k=n) for n in (7, 9, 13)]
    words += [rng.choices([97, 97, 98, 99], k=30), [97, 98, 99] * 10]
    mistakes = {
        "without dropout the merge of the lowest rank comes first; here the first from the left does": [
            dropout(word, chance(0), choose=leftmost_place) for word in words
        ],
        "the merge that was learned last comes first: the lowest rank should": [
            dropout(word, chance(0), choose=highest_rank) for word in words
        ],
        "of several places with the same rank the rightmost comes first: the leftmost should": [
            dropout(word, chance(0), choose=rightmost_of_lowest) for word in words
        ],
        "a place is out where drop() returns True, and here where it returns False": words,
        "the merge of rank r makes the id 256 + r, not r": [dropout(word, chance(0), offset=0) for word in words],
    }

    def check(value, right, word):
        if isinstance(value, list) and len(value) > len(right) and RANKS.keys() & set(zip(value, value[1:])):
            return f"nothing is dropped, and yet it stops where a merge is possible (a word of {len(word)} ids)"

    each(
        lambda word: answer(word, RANKS, chance(0)),
        [(word,) for word in words],
        [dropout(word, chance(0)) for word in words],
        "without dropout, the result",
        mistakes,
        check=check,
    )

    calls = 0

    def always():
        nonlocal calls
        calls += 1
        if calls > 50:
            raise RuntimeError("that was call number 51 of drop")
        return True

    word = [99, 98, 99, 98, 99, 98, 98]  # b c stands in it twice, and no other pair has a merge
    try:
        got = answer(word, RANKS, always)
    except Raised as raised:
        says(calls <= 50, "when all places are out the word is done, but it goes on asking", *raised.details)
        raise
    heedless = {
        "drop() is never heeded: it said True at every place, and yet ids were merged": dropout(word, chance(0))
    }
    expect(got, word, what="the result when everything is dropped", mistakes=heedless)
    says(calls != 0, "drop is never called")
    says(calls <= 2, f"drop is called {calls} times for a word with 2 places where a merge is possible")
    says(calls == 2, "every place has its own chance: drop is called once for a word with 2 places")

    cases = [(word, seed) for word in words[1:] for seed in range(3)]
    options = {
        "what was dropped may be merged in a later step": lambda: {"remain": forever()},
        "drop() is asked only where the rank is lower than at all places before: ask for each place": lambda: {
            "remain": better
        },
        "drop() is asked from right to left": lambda: {"remain": backwards},
        "all places of the chosen pair are merged in one step: only one should be": lambda: {"whole": True},
    }
    mistakes = {
        why: [dropout(word, chance(0.4, seed), **how()) for word, seed in cases] for why, how in options.items()
    }
    want = [dropout(word, chance(0.4, seed)) for word, seed in cases]
    each(lambda word, seed: answer(word, RANKS, chance(0.4, seed)), cases, want, "the result", mistakes)


# ---- viterbi


def cuts(word):
    """All ways to cut a word."""
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        yield from ([word[:end], *rest] for rest in cuts(word[end:]))


def possible(word, log_probs):
    return [cut for cut in cuts(word) if all(log_probs.get(piece, -math.inf) > -math.inf for piece in cut)]


def greedy(word, log_probs, key, back=False):
    """Step by step the piece that is best by itself; None where that leads nowhere."""
    pieces = []
    while word:
        ends = [word[-n:] if back else word[:n] for n in range(1, len(word) + 1)]
        fits = [piece for piece in ends if log_probs.get(piece, -math.inf) > -math.inf]
        if not fits:
            return None
        best = max(fits, key=key)
        word = word[: -len(best)] if back else word[len(best) :]
        pieces = [best, *pieces] if back else [*pieces, best]
    return pieces


def total(cut, log_probs):
    return sum(log_probs[piece] for piece in cut)


CUTS = [
    ("", {"a": -1.0}),
    ("lowest", {**dict.fromkeys("lowest", -2.25), "low": -1.5, "owest": -4.0, "st": -4.25, "es": -4.75}),
    ("aabc", {"a": -1.0, "ab": -3.5, "b": -2.25, "c": -0.5, "aa": -3.0, "aab": -5.0, "abc": -6.0}),
    ("abc", {"a": -3.0, "b": -5.0, "c": -1.0, "abc": -math.inf, "ab": -math.inf, "bc": -6.5}),
    (
        "nana ï🙂",
        {"n": -2.0, "a": -1.5, "na": -4.0, " ": -1.0, "ï": -7.0, "🙂": -7.5, " ï": -7.75, "ana": -5.5, "na ": -0.5},
    ),
    ("aaaab", {"a": -4.0, "aa": -6.0, "aaa": -11.0, "b": -1.0}),
    ("abcd", {"a": -0.5, "b": -0.25, "c": -0.5, "d": -0.25, "abcd": -1.75, "ab": -1.0}),
    ("abca", {"a": -1.0, "b": -1.0, "c": -1.0, "abc": 0.0}),  # what is certain has the logarithm 0
    ("lighthouse", {**dict.fromkeys("lighthouse", -2.0), "lighthous": -1.0, "house": -1.5}),
]

# Sums of powers of two add up without rounding, so that a tie is a tie in whatever order one adds.
TIES = [
    ("abab", {"a": -1.0, "b": -1.0, "ab": -2.0, "ba": -2.0, "abab": -4.0}),
    ("aabc", {"a": -1.0, "ab": -3.5, "b": -2.5, "c": -0.5, "abc": -4.0, "aa": -2.5}),
    ("abcde", {**dict.fromkeys(["a", "b", "c", "de"], -1.0), "abcd": -2.0, "e": -2.0}),
    ("edcba", {**dict.fromkeys(["a", "b", "c", "ed"], -1.0), "dcba": -2.0, "e": -2.0}),
    ("cbaab", {"a": -1.5, "ab": -2.75, "b": -1.25, "c": -0.5, "cba": -3.25, "cb": -1.75, "aa": -3.5}),
]


@exercise(
    points=2,
    hints=(
        "Suppose you knew the best way to write word[:end] for every end before the last. How would you find the last?",
        "The best way to write word[:end] is a best way to write word[:start] and then the piece word[start:end]: try"
        " every start. Keep, for each end, the sum of the logarithms, the number of pieces, and the pieces.",
        "best = {0: []}; for end = 1 ... len(word): among best[start] + [word[start:end]], for all starts in best whose"
        " piece is in log_probs and not -inf, take the one with the largest (sum, -number of pieces). If len(word) is"
        " not in best at the end: ValueError.",
    ),
)
def test_viterbi(answer):
    def choose(key, cases=CUTS):
        return [max(possible(*case), key=lambda cut, table=case[1]: key(cut, table)) for case in cases]

    def step(key, back=False):
        return [greedy(word, table, lambda piece, table=table: key(piece, table), back) for word, table in CUTS]

    def best(cut, table):
        return total(cut, table), -len(cut)

    mistakes = {
        "this is the longest piece that fits, again and again, not the largest product": step(lambda p, table: len(p)),
        "this is the longest piece that fits, from the end, not the largest product": step(
            lambda p, table: len(p), back=True
        ),
        "this is the most probable next piece, again and again: what comes after it counts, too": step(
            lambda p, table: table[p]
        ),
        "this is the cut with the fewest pieces; the probabilities come first": choose(
            lambda cut, table: (-len(cut), total(cut, table))
        ),
        "this is the least probable cut: a logarithm closer to 0 is a larger probability": choose(
            lambda cut, table: (-total(cut, table), -len(cut))
        ),
        "this has the largest mean of the logarithms: their sum counts": choose(
            lambda cut, table: (total(cut, table) / max(len(cut), 1), -len(cut))
        ),
        "logarithms are multiplied: they must be added": choose(
            lambda cut, table: (math.prod(table[piece] for piece in cut), -len(cut))
        ),
        "probabilities are added: they must be multiplied, so add their logarithms": choose(
            lambda cut, table: (sum(math.exp(table[piece]) for piece in cut), -len(cut))
        ),
    }

    def check(value, right, word, table):
        if not isinstance(value, list) or not all(isinstance(piece, str) for piece in value):
            return None
        if "".join(value) != word:
            return f"the pieces, joined, are {''.join(value)!r}, not the word"
        if unknown := [piece for piece in value if piece not in table]:
            return f"{unknown[0]!r} is no piece: it is not in log_probs"
        if (mine := total(value, table)) == -math.inf:
            return "a piece of log-probability -inf has probability 0 and is never used"
        if mine == total(right, table):
            return f"of equally probable cuts, the fewest pieces: {len(value)} pieces where {len(right)} would do"
        return f"the logarithms of these pieces sum to {mine:g}; another cut has {total(right, table):g}"

    for word, table in [*CUTS, *TIES]:
        ranked = sorted((best(cut, table) for cut in possible(word, table)), reverse=True)
        assert len(ranked) == 1 or ranked[0] > ranked[1], f"two answers are right for {word}"
    each(answer, CUTS, choose(best), "the cut", mistakes, check=check)
    long, table = "ab" * 60, {"a": -9.25, "b": -8.5, "ab": -17.5, "ba": -17.0}
    got = sure(answer, long, table, otherwise="a word may have 120 letters (does a product become 0.0? add logarithms)")
    what = "the cut of a long word (a product of 60 probabilities is 0.0: add logarithms)"
    expect(got, ["a", *["ba"] * 59, "b"], what=what)
    deep = "a text may have 1,500 letters (one call inside the other for each of them is too deep for Python)"
    got = sure(answer, "ab" * 750, table, otherwise=deep)
    expect(got, ["a", *["ba"] * 749, "b"], what="the cut of a text of 1,500 letters")
    each(answer, TIES, choose(best, TIES), "the cut", {}, check=check)
    answer.refuses("abx", {"a": -1.0, "b": -2.0, "ab": -2.0}, because="no piece has the x at the end")
    answer.refuses("xab", {"a": -1.0, "b": -2.0, "ab": -2.0}, because="no piece has the x in front")
    answer.refuses("aba", {"ab": -1.0, "ba": -2.0}, because="ab leaves an a over, and so does ba")
    answer.refuses("ab", {"a": -1.0, "ab": -math.inf}, because="the only cut has probability 0")


# ---- expected_counts


def spans(word, cut):
    """(start, piece) of all pieces of a cut."""
    return zip(itertools.accumulate(map(len, cut), initial=0), cut)


def average(word, log_probs, weigh=None, uses=list.count, divide=True):
    """Over all cuts, one by one: only for short words."""
    ways = possible(word, log_probs)
    weights = [math.exp(total(cut, log_probs)) if weigh is None else weigh(cut, ways, log_probs) for cut in ways]
    z = math.fsum(weights) if divide else 1.0
    return {p: math.fsum(w * uses(cut, p) for w, cut in zip(weights, ways)) / z for p in log_probs}


def best_only(cut, ways, log_probs):
    return float(cut == max(ways, key=lambda cut: total(cut, log_probs)))


def last_place(word, log_probs):
    """What is left when a count is set at each place, not added to."""
    ways = possible(word, log_probs)
    weights = [math.exp(total(cut, log_probs)) for cut in ways]
    counts = dict.fromkeys(log_probs, 0.0)
    for piece in log_probs:
        place = word.rfind(piece)
        hits = [w for w, cut in zip(weights, ways) if (place, piece) in spans(word, cut)]
        counts[piece] = math.fsum(hits) / math.fsum(weights)
    return counts


def one_side(word, log_probs, back=False):
    """The ways on one side of each piece only."""
    places = [(i, i + len(p), p) for p in log_probs for i in range(len(word)) if word.startswith(p, i)]

    def mass(part):
        return math.fsum(math.exp(total(cut, log_probs)) for cut in possible(part, log_probs))

    counts, z = dict.fromkeys(log_probs, 0.0), mass(word)
    for start, end, piece in places:
        counts[piece] += math.exp(log_probs[piece]) * mass(word[end:] if back else word[:start]) / z
    return counts


def scaled(counts):
    sum_ = math.fsum(counts.values()) or 1.0
    return {piece: count / sum_ for piece, count in counts.items()}


COUNTS = [
    ("aa", {"a": math.log(0.5), "aa": math.log(0.2)}),
    ("", {"a": -1.0, "b": -2.0}),
    ("ababa", {"a": -1.5, "b": -2.25, "ab": -2.0, "ba": -3.0, "aba": -3.25, "c": -0.5, "bab": -math.inf}),
    ("aaaaaaa", {"aa": -1.2, "a": -0.9, "aaa": -2.6, "aaaaaaaa": -0.1}),
    (
        "nana ï",
        {"n": -2.0, "ï": -4.0, "a": -1.0, "na": -2.4, " ": -3.0, "nan": -4.1, "a ï": -6.5, "ana": -4.5, " ï": -6.0},
    ),
    ("abc", {"ab": -0.3, "c": -0.7, "bc": -0.2, "x": -1.0}),
    ("abba", {"a": -1.0, "b": -2.0, "ab": 0.0, "ba": -0.5}),  # what is certain has the logarithm 0
    ("lighthouse", {**dict.fromkeys("lighthouse", -2.0), "lighthous": -1.0, "house": -1.5}),
]


@exercise(
    points=3,
    hints=(
        "How likely is it that a piece stands at one place, from start to end? All ways that have it there are: any way"
        " to cut what is before, the piece, any way to cut what is after.",
        "Let before[i] be the logarithm of the summed probabilities of all ways to cut word[:i], and after[i] the same"
        " for word[i:]. Both grow step by step: before[end] joins before[start] + log_prob over all last pieces, with"
        " np.logaddexp, which adds probabilities that are given as logarithms.",
        "before[0] = 0 and the rest -inf; for end = 1 ... n and each start: before[end] = logaddexp(before[end],"
        " before[start] + log_probs[piece]). after: the same from the end, or with word and pieces reversed. Then add"
        " exp(before[start] + log_probs[piece] + after[end] - before[n]) to the count of the piece, for every place.",
    ),
)
def test_expected_counts(answer):
    want = [average(*case) for case in COUNTS]
    variants = {
        "only the most probable cut is counted: all cuts count, each with its weight": {"weigh": best_only},
        "all cuts weigh the same: a cut weighs as much as it is probable": {"weigh": lambda cut, ways, table: 1.0},
        "the weights do not sum to 1: divide by the sum of the products over all ways": {"divide": False},
        "a piece that is used twice in a cut counts twice": {"uses": lambda cut, piece: piece in cut},
    }
    mistakes = {why: [average(*case, **how) for case in COUNTS] for why, how in variants.items()}
    mistakes |= {
        "at its last place a piece replaces what was counted before: add to it": [last_place(*case) for case in COUNTS],
        "what stands after a piece can be cut in several ways, too": [one_side(*case) for case in COUNTS],
        "what stands before a piece can be cut in several ways, too": [one_side(*case, back=True) for case in COUNTS],
        "the counts sum to 1: these are already the next probabilities": [scaled(counts) for counts in want],
        "this counts where a piece could stand, not how probable it is there": [
            {p: float(sum(word.startswith(p, i) for i in range(len(word)))) for p in log_probs}
            for word, log_probs in COUNTS
        ],
    }

    def call(word, log_probs):
        got = answer(word, log_probs)
        if type(got) is not dict or set(got) != set(log_probs):
            return got
        return {p: float(got[p]) if type(got[p]) is int and abs(got[p]) < 1e6 else got[p] for p in log_probs}

    def check(value, right, word, log_probs):
        if type(value) is dict and set(value) == set(log_probs) and all(map(is_number, value.values())):
            if all(math.isclose(value[p], count, rel_tol=1e-4, abs_tol=1e-5) for p, count in right.items()):
                return "the result is right to a few digits only: were the sums in float32?"
            letters = sum(len(piece) * count for piece, count in value.items())
            if not math.isclose(letters, len(word), abs_tol=1e-6):
                return (
                    f"the pieces of any cut of {word!r} have {len(word)} letters in all, but these have {letters:.4g}"
                )

    certain = "a log-probability of 0.0 is that of probability 1, so the piece is there"
    got = sure(call, "ab", {"ab": 0.0}, otherwise=certain)
    says(not same(got, {"ab": 0.0}), certain)
    each(call, COUNTS, want, "the result", mistakes, check=check)
    table = {"a": -1.0, "b": -2.0, "ab": -2.0, "bx": -math.inf}
    answer.refuses("abx", table, because="the word has no cut of more than probability 0")
    answer.refuses("xab", {"a": -1.0, "b": -2.0, "ab": -2.0}, because="no piece has the x in front")
    # Each ab is ab or a b, whatever the others are. The word as a whole has the probability e ** -982, or 0.0.
    table = {"a": -9.0, "b": -8.5, "ab": -16.75, "abb": -1.0}
    pair, single = math.exp(-16.75), math.exp(-17.5)
    for times in (60, 250):
        apart, joined = times * single / (pair + single), times * pair / (pair + single)
        letters = f"{2 * times} letters (does a product become 0.0? stay with logarithms)"
        got = sure(call, "ab" * times, table, otherwise=f"a word may have {letters}")
        want = {"a": apart, "b": apart, "ab": joined, "abb": 0.0}
        expect(got, want, what=f"for a word of {letters} the result", tol=1e-9)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
