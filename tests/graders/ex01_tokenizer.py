"""Truth table of exercises/test_ex01_tokenizer.py: answers that it must take, and answers that it must not.

RIGHT: {exercise: {what is special about the answer: its source}}. WRONG: {exercise: {the misconception: (source, a part
of the message that it must get)}}. EQUIVALENT: {id of a mutant: why it computes the same}.
"""

RIGHT, WRONG = {}, {}

# ---- unfinished

RIGHT["unfinished"] = {
    "decoding drops the end": """
def unfinished(data):
    return len(data) - len(data.decode("utf-8", errors="ignore").encode("utf-8"))
""",
    "Python's own decoder for streams": """
import codecs

def unfinished(data):
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoder.decode(data)
    return len(decoder.getstate()[0])
""",
    "a walk back to the first byte": """
def unfinished(data):
    back = 0
    while back < len(data) and 0x80 <= data[len(data) - 1 - back] < 0xC0:
        back += 1
    if back == len(data):
        return 0
    first = data[len(data) - 1 - back]
    size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    return back + 1 if back + 1 < size else 0
""",
}
WRONG["unfinished"] = {
    "without the first byte": (
        "but not the byte that begins it",
        """
def unfinished(data):
    whole = data.decode("utf-8", errors="ignore").encode("utf-8")
    return max(len(data) - len(whole) - 1, 0)
""",
    ),
    "a complete last character": (
        "also when it is complete",
        """
def unfinished(data):
    for n in range(1, min(4, len(data)) + 1):
        if data[-n] >= 0xC0:
            return n
        if data[-n] < 0x80:
            return 0
    return 0
""",
    ),
    "what is still to come": (
        "still to come",
        """
def unfinished(data):
    for n in range(1, min(3, len(data)) + 1):
        if data[-n] >= 0xC0:
            return max(2 + (data[-n] >= 0xE0) + (data[-n] >= 0xF0) - n, 0)
    return 0
""",
    ),
    "one byte at most": (
        "one byte at most",
        """
def unfinished(data):
    try:
        data.decode("utf-8")
        return 0
    except UnicodeDecodeError:
        return 1
""",
    ),
    "all that is not ASCII": (
        "complete characters have such bytes",
        """
def unfinished(data):
    n = 0
    while n < len(data) and data[-1 - n] >= 0x80:
        n += 1
    return n
""",
    ),
    "a real U+FFFD (llama.cpp's users and many others look for it in the text)": (
        "a real U+FFFD is a complete character",
        """
def unfinished(data):
    return len(data) - len(data.decode("utf-8", errors="replace").rstrip("\\ufffd").encode("utf-8"))
""",
    ),
    "characters": (
        "characters, not bytes",
        """
def unfinished(data):
    text = data.decode("utf-8", errors="replace")
    return len(text) - len(text.rstrip("\\ufffd"))
""",
    ),
    "the whole text": (
        "holds back the whole text",
        """
def unfinished(data):
    try:
        data.decode("utf-8")
        return 0
    except UnicodeDecodeError:
        return len(data)
""",
    ),
    "nothing, as if tokens were characters (exo-explore/exo#1691)": (
        "it holds back nothing",
        """
def unfinished(data):
    return 0
""",
    ),
    "no empty text": (
        "it raises IndexError",
        """
def unfinished(data):
    if data[-1] < 0x80:
        return 0
    return len(data) - len(data.decode("utf-8", errors="ignore").encode("utf-8"))
""",
    ),
    "no character of four bytes": (
        "would print a part of a character",
        """
def unfinished(data):
    if data[-1:] >= b"\\xc0":
        return 1
    if len(data) > 1 and data[-2] >= 0xE0:
        return 2
    return 0
""",
    ),
}

# ---- letters_to_bytes

RIGHT["letters_to_bytes"] = {
    "the table is GPT-2's own": """
def letters_to_bytes(token):
    bs = list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    cs, n = bs[:], 0
    for b in range(2**8):
        if b not in bs:
            bs.append(b)
            cs.append(2**8 + n)
            n += 1
    back = {chr(c): b for b, c in zip(bs, cs)}
    out = bytearray()
    for c in token:
        if c not in back:
            raise ValueError(c)
        out.append(back[c])
    return bytes(out)
""",
    "arithmetic": """
def letters_to_bytes(token):
    out = []
    for letter in token:
        code = ord(letter)
        if 33 <= code < 127 or 161 <= code < 256 and code != 173:
            out.append(code)
        elif 256 <= code < 289:
            out.append(code - 256)
        elif 289 <= code < 323:
            out.append(code - 289 + 127)
        elif code == 323:
            out.append(173)
        else:
            raise ValueError(f"{letter!r} stands for no byte")
    return bytes(out)
""",
    "str.translate and Latin-1": """
OTHERS = [*range(33), *range(127, 161), 173]
TABLE = {256 + i: byte for i, byte in enumerate(OTHERS)} | dict.fromkeys(OTHERS, 0x1234)

def letters_to_bytes(token):
    return token.translate(TABLE).encode("latin-1")  # UnicodeEncodeError is a ValueError
""",
}
WRONG["letters_to_bytes"] = {
    "spaces are refused, other letters that are none are not": (
        "so it stands for no byte",
        """
def letters_to_bytes(token):
    shifted = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or 174 <= b)]
    table = {chr(256 + n): b for n, b in enumerate(shifted)}
    if any(c in " \\n\\x7f\\xa0\\xad" or ord(c) > 323 for c in token):
        raise ValueError
    return bytes(table.get(c, ord(c) % 256) for c in token)
""",
    ),
    "only Ġ": (
        "Ġ is not the only letter",
        """
def letters_to_bytes(token):
    return token.replace("Ġ", " ").encode("utf-8")
""",
    ),
    "a straight line (paiml/aprender#2121)": (
        "right for the first 33 only",
        """
def letters_to_bytes(token):
    return bytes(ord(c) - 256 if ord(c) > 255 else ord(c) for c in token)
""",
    ),
    "UTF-8": (
        "the bytes of the letters in UTF-8",
        """
def letters_to_bytes(token):
    return token.encode("utf-8")
""",
    ),
    "Latin-1": (
        "each letter of 'ÃŃ' stands for a byte",
        """
def letters_to_bytes(token):
    return token.replace("Ġ", " ").replace("Ċ", "\\n").encode("latin-1")
""",
    ),
    "ids": (
        "GPT-2's ids of the bytes",
        """
def letters_to_bytes(token):
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printed), *map(chr, range(256, 324))]
    return bytes(letters.index(c) for c in token)
""",
    ),
    "the soft hyphen is forgotten": (
        "each letter of 'ÃŃ' stands for a byte",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161)]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    table |= {chr(byte): byte for byte in range(256) if byte not in others}
    if not set(token) <= set(table):
        raise ValueError(token)
    return bytes(table[c] for c in token)
""",
    ),
    "half characters are replaced": (
        "bytes that are no whole characters are lost",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161), 173]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    table |= {chr(byte): byte for byte in range(256) if byte not in others}
    return bytes(table[c] for c in token).decode("utf-8", errors="replace").encode("utf-8")
""",
    ),
    "half characters are dropped": (
        "are left out: no decoding is needed",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161), 173]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    table |= {chr(byte): byte for byte in range(256) if byte not in others}
    return bytes(table[c] for c in token).decode("utf-8", errors="ignore").encode("utf-8")
""",
    ),
    "any character will do": (
        "a real space stands for no byte",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161), 173]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(table.get(c, ord(c)) for c in token)
""",
    ),
    "KeyError": (
        "a real space stands for no byte (Ġ does), which should raise ValueError, but it raises KeyError",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161), 173]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    table |= {chr(byte): byte for byte in range(256) if byte not in others}
    return bytes(table[c] for c in token)
""",
    ),
    "text": (
        "the result should be a bytes, not a str",
        """
def letters_to_bytes(token):
    others = [*range(33), *range(127, 161), 173]
    table = {chr(256 + i): byte for i, byte in enumerate(others)}
    table |= {chr(byte): byte for byte in range(256) if byte not in others}
    return bytes(table[c] for c in token).decode("utf-8", errors="replace")
""",
    ),
}

# ---- count_merges

RIGHT["count_merges"] = {
    "runs of equal ids": """
import itertools

def count_merges(words):
    counts = {}
    for ids, times in words.items():
        runs = [(value, len(list(group))) for value, group in itertools.groupby(ids)]
        for (left, _), (right, _) in zip(runs, runs[1:]):
            counts[left, right] = counts.get((left, right), 0) + times
        for value, n in runs:
            if n > 1:
                counts[value, value] = counts.get((value, value), 0) + n // 2 * times
    return counts
""",
    "each pair is merged and the word measured": """
def merged(ids, pair):
    out, i = [], 0
    while i < len(ids):
        step = 2 if tuple(ids[i : i + 2]) == pair else 1
        out.append(ids[i : i + step])
        i += step
    return out

def count_merges(words):
    pairs = {pair for ids in words for pair in zip(ids, ids[1:])}
    return {pair: sum(n * (len(ids) - len(merged(ids, pair))) for ids, n in words.items()) for pair in pairs}
""",
    "a Counter made plain": """
from collections import Counter

def count_merges(words):
    counts = Counter()
    for ids, times in words.items():
        skip = False
        for i in range(len(ids) - 1):
            if i and ids[i - 1] == ids[i] == ids[i + 1] and not skip:
                skip = True
                continue
            skip = False
            counts[ids[i], ids[i + 1]] += times
    return dict(counts)
""",
}
WRONG["count_merges"] = {
    "the lesson's count (karpathy/minbpe#51)": (
        "pairs that overlap are all counted",
        """
def count_merges(words):
    counts = {}
    for ids, times in words.items():
        for pair in zip(ids, ids[1:]):
            counts[pair] = counts.get(pair, 0) + times
    return counts
""",
    ),
    "words without their frequency": (
        "counts only once",
        """
def count_merges(words):
    counts = {}
    for ids in words:
        free = {}
        for i, pair in enumerate(zip(ids, ids[1:])):
            if free.get(pair, 0) <= i:
                counts[pair] = counts.get(pair, 0) + 1
                free[pair] = i + 2
    return counts
""",
    ),
    "once per word": (
        "a pair that stands in a word twice is counted once",
        """
def count_merges(words):
    counts = {}
    for ids, times in words.items():
        for pair in set(zip(ids, ids[1:])):
            counts[pair] = counts.get(pair, 0) + times
    return counts
""",
    ),
    "no two pairs may touch": (
        "two pairs that share an id",
        """
def count_merges(words):
    counts = {}
    for ids, times in words.items():
        for i in range(0, len(ids) - 1, 2):
            pair = ids[i], ids[i + 1]
            counts[pair] = counts.get(pair, 0) + times
    return counts
""",
    ),
    "half of the sum of the runs": (
        "halve each run, not their sum",
        """
from collections import Counter

def count_merges(words):
    counts = {}
    for ids, times in words.items():
        for pair, n in Counter(zip(ids, ids[1:])).items():
            n = (n + 1) // 2 if pair[0] == pair[1] else n
            counts[pair] = counts.get(pair, 0) + n * times
    return counts
""",
    ),
    "rounded up": (
        "round down, not up",
        """
import itertools

def count_merges(words):
    counts = {}
    for ids, times in words.items():
        runs = [(value, len(list(group))) for value, group in itertools.groupby(ids)]
        for (left, _), (right, _) in zip(runs, runs[1:]):
            counts[left, right] = counts.get((left, right), 0) + times
        for value, n in runs:
            if n > 1:
                counts[value, value] = counts.get((value, value), 0) + (n + 1) // 2 * times
    return counts
""",
    ),
    "across words": (
        "a merge crosses the end of a word",
        """
def count_merges(words):
    ids = [i for word, times in words.items() for i in word * times]
    counts, free = {}, {}
    for i, pair in enumerate(zip(ids, ids[1:])):
        if free.get(pair, 0) <= i:
            counts[pair] = counts.get(pair, 0) + 1
            free[pair] = i + 2
    return counts
""",
    ),
    "what is free belongs to another word": (
        "hides pairs of the next one",
        """
def count_merges(words):
    counts, free = {}, {}
    for ids, times in words.items():
        for i, pair in enumerate(zip(ids, ids[1:])):
            if free.get(pair, 0) <= i:
                counts[pair] = counts.get(pair, 0) + times
                free[pair] = i + 2
    return counts
""",
    ),
    "counts that stay": (
        "kept from one call to the next",
        """
def count_merges(words, counts={}):
    for ids, times in words.items():
        free = {}
        for i, pair in enumerate(zip(ids, ids[1:])):
            if free.get(pair, 0) <= i:
                counts[pair] = counts.get(pair, 0) + times
                free[pair] = i + 2
    return counts
""",
    ),
    "a Counter": (
        "the result should be a dict, not an object of class Counter",
        """
from collections import Counter

def count_merges(words):
    return Counter(pair for ids, times in words.items() for pair in list(zip(ids, ids[1:])) * times)
""",
    ),
}

# ---- hunt_merge_order

BY_RANK = """
def by_rank(ids, merges):
    ids, ranks = list(ids), {pair: rank for rank, pair in enumerate(merges)}
    while places := [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]:
        rank, i = min(places)
        ids[i : i + 2] = [256 + rank]
    return ids
"""
RIGHT["hunt_merge_order"] = {
    "random words against the definition": BY_RANK
    + """
import random

def hunt_merge_order(encode):
    rng = random.Random(0)
    for _ in range(300):
        merges = []
        while len(merges) < 5:
            known = [97, 98, *range(256, 256 + len(merges))]
            pair = rng.choice(known), rng.choice(known)
            if pair not in merges:
                merges.append(pair)
        ids = rng.choices([97, 98], k=rng.randint(0, 12))
        assert list(encode(ids, merges)) == by_rank(ids, merges)
""",
    "assertions one by one": """
def hunt_merge_order(encode):
    assert encode([98, 99, 98], [(99, 98), (98, 99)]) == [98, 256]
    assert encode([97, 98, 99], [(98, 99), (97, 98), (257, 99)]) == [97, 256]
    assert encode([97, 97, 97, 97, 97], [(97, 97)]) == [256, 256, 97]
    assert encode([97, 97, 97, 97, 98], [(97, 97), (256, 256), (257, 98)]) == [258]
    assert encode([5, 1, 2, 3], [(2, 3), (1, 2), (1, 256)]) == [5, 258]
""",
}
WRONG["hunt_merge_order"] = {
    "nothing is asserted": (
        "your test passes the version that merges the first pair from the left",
        """
def hunt_merge_order(encode):
    encode([97, 98, 99], [(98, 99), (97, 98)])
""",
    ),
    "only that nothing is lost": (
        "your test passes the version that merges the first pair from the left",
        """
def hunt_merge_order(encode):
    merges = [(98, 99), (97, 98), (257, 99), (97, 97)]
    out = encode([97, 98, 99, 97, 97, 97], merges)
    pieces = {i: [i] for i in range(256)}
    for rank, (first, second) in enumerate(merges):
        pieces[256 + rank] = pieces[first] + pieces[second]
    assert [i for token in out for i in pieces[token]] == [97, 98, 99, 97, 97, 97]
""",
    ),
    "the example of the lesson only": (
        "your test passes the version that never merges what a merge has made",
        """
def hunt_merge_order(encode):
    assert encode([97, 98, 99], [(98, 99), (97, 98)]) == [97, 256]
""",
    ),
    "the fewest ids": (
        "your test fails the definition, which is correct: AssertionError",
        """
def hunt_merge_order(encode):
    assert encode([97, 98, 99], [(98, 99), (97, 98), (257, 99)]) == [258]
""",
    ),
    "the rightmost of overlapping pairs": (
        "your test fails the definition, which is correct",
        """
def hunt_merge_order(encode):
    assert encode([97, 97, 97], [(97, 97)]) == [97, 256]
""",
    ),
    "merges that nobody could learn": (
        "no training makes these merges: (257, 99) comes before its parts exist",
        """
def hunt_merge_order(encode):
    assert encode([97, 98, 99], [(257, 99), (97, 98)]) == [256]
""",
    ),
    "no runs of equal letters": (
        "your test passes the version that makes one id of three equal ones",
        """
def hunt_merge_order(encode):
    assert encode([97, 98, 99], [(98, 99), (97, 98), (257, 99)]) == [97, 256]
    assert encode([97, 98, 99], [(97, 98), (256, 99)]) == [257]
""",
    ),
    "no merge that competes with an older note": (
        "it gives a pair the id of the pair that stood there before",
        """
def hunt_merge_order(encode):
    assert encode([97, 98, 99], [(98, 99), (97, 98), (257, 99)]) == [97, 256]
    assert encode([97, 98, 99], [(97, 98), (256, 99)]) == [257]
    assert encode([97, 97, 97], [(97, 97)]) == [256, 97]
""",
    ),
    "every version is wrong": (
        "your test fails the definition",
        """
def hunt_merge_order(encode):
    assert False
""",
    ),
}

# ---- encode_dropout

RIGHT["encode_dropout"] = {
    "two loops": """
def encode_dropout(ids, ranks, drop):
    result = [i for i in ids]
    while True:
        best = None
        for i in range(len(result) - 1):
            rank = ranks.get((result[i], result[i + 1]))
            if rank is None or drop():
                continue
            if best is None or rank < best[0]:
                best = rank, i
        if best is None:
            return result
        result = result[: best[1]] + [256 + best[0]] + result[best[1] + 2 :]
""",
    "by recursion": """
def encode_dropout(ids, ranks, drop):
    left = {}
    for i, pair in enumerate(zip(ids, ids[1:])):
        if pair in ranks:
            left[i] = drop()
    left = [i for i, gone in left.items() if not gone]
    if not left:
        return list(ids)
    i = min(left, key=lambda i: ranks[ids[i], ids[i + 1]])
    return encode_dropout([*ids[:i], 256 + ranks[ids[i], ids[i + 1]], *ids[i + 2 :]], ranks, drop)
""",
}
DROPOUT = """
def encode_dropout(ids, ranks, drop):
    ids = list(ids)
    while True:
        pairs = list(zip(ids, ids[1:]))
        places = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks and not drop()]
        if not places:
            return ids
        rank, i = min(places)
        ids[i : i + 2] = [256 + rank]
"""


def changed(source, *changes):
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


ONE_BY_ONE = "[(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks and not drop()]"
WRONG["encode_dropout"] = {
    "the first from the left (ztxz16/fastllm#715)": (
        "the merge of the lowest rank comes first; here the first from the left does",
        changed(DROPOUT, ("min(places)", "places[0]")),
    ),
    "the last that was learned": (
        "the merge that was learned last comes first",
        changed(DROPOUT, ("min(places)", "max(places, key=lambda place: (place[0], -place[1]))")),
    ),
    "the rightmost of equal ranks": (
        "the rightmost comes first",
        changed(DROPOUT, ("min(places)", "min(places, key=lambda place: (place[0], -place[1]))")),
    ),
    "True and False exchanged": (
        "and here where it returns False",
        changed(DROPOUT, ("and not drop()", "and drop()")),
    ),
    "ids that are ranks": ("makes the id 256 + r", changed(DROPOUT, ("256 + rank", "rank"))),
    "no dropout, as huggingface/tokenizers#201 after training": (
        "drop() is never heeded",
        changed(DROPOUT, (" and not drop()", "")),
    ),
    "asks until something is left": (
        "the word is done, but it goes on asking",
        changed(
            DROPOUT,
            ("if not places:", "if not set(pairs) & set(ranks):"),
            ("rank, i =", "if not places:\n            continue\n        rank, i ="),
        ),
    ),
    "one chance per kind of pair": (
        "every place has its own chance",
        changed(
            DROPOUT,
            (ONE_BY_ONE, "[(ranks[pair], i) for i, pair in enumerate(pairs) if pair in kept]"),
            (
                "        places =",
                "        kept = {pair for pair in dict.fromkeys(pairs) if pair in ranks and not drop()}\n        places =",
            ),
        ),
    ),
    "one chance per kind of pair, in order": (
        "every place has its own chance",
        changed(
            DROPOUT,
            (ONE_BY_ONE, "[(ranks[pair], i) for i, pair in enumerate(pairs) if pair in kept]"),
            (
                "        places =",
                "        kept = [pair for pair in dict.fromkeys(pairs) if pair in ranks and not drop()]\n        places =",
            ),
        ),
    ),
    "dropped for ever": (
        "may be merged in a later step",
        changed(
            DROPOUT,
            (ONE_BY_ONE, "[(ranks[pair], i) for i, pair in enumerate(pairs) if (pair, i) in kept]"),
            ("    while True:", "    never = set()\n    while True:"),
            (
                "        places =",
                "        kept = set()\n        asked = [(p, i) for i, p in enumerate(pairs) if p in ranks and p not in never]\n"
                "        for p, i in asked:\n            (never.add(p) if drop() else kept.add((p, i)))\n"
                "        kept = {(p, i) for p, i in kept if p not in never}\n        places =",
            ),
        ),
    ),
    "asked only where the rank is lower than before": (
        "only where the rank is lower than at all places before",
        """
def encode_dropout(ids, ranks, drop):
    ids = list(ids)
    while True:
        best = None
        for i, pair in enumerate(zip(ids, ids[1:])):
            if pair in ranks and (best is None or ranks[pair] < best[0]) and not drop():
                best = ranks[pair], i
        if best is None:
            return ids
        ids[best[1] : best[1] + 2] = [256 + best[0]]
""",
    ),
    "only the best place is asked for": (
        "for a word with 2 places",
        changed(
            DROPOUT,
            (" and not drop()", ""),
            ("ids[i : i + 2]", "if drop():\n            return ids\n        ids[i : i + 2]"),
        ),
    ),
    "a chance for pairs without a merge": (
        "times for a word with 2 places",
        changed(DROPOUT, ("pair in ranks and not drop()", "not drop() and pair in ranks")),
    ),
    "from right to left": (
        "from right to left",
        changed(DROPOUT, ("enumerate(pairs) if", "reversed(list(enumerate(pairs))) if")),
    ),
    "all places of the best pair at once, as subword-nmt does": (
        "only one should be",
        changed(
            DROPOUT,
            (
                "rank, i = min(places)\n        ids[i : i + 2] = [256 + rank]",
                "rank = min(places)[0]\n        here = [i for r, i in places if r == rank]\n"
                "        last = None\n        take = []\n        for i in here:\n            if last is None or i > last + 1:\n"
                "                take.append(i)\n                last = i\n"
                "        for i in reversed(take):\n            ids[i : i + 2] = [256 + rank]",
            ),
        ),
    ),
    "eight steps": (
        "nothing is dropped, and yet it stops where a merge is possible",
        changed(
            DROPOUT, ("    while True:", "    for _ in range(8):"), ("= [256 + rank]", "= [256 + rank]\n    return ids")
        ),
    ),
    "on the ids themselves": ("it changes its argument `ids` in place", changed(DROPOUT, ("ids = list(ids)", "pass"))),
}

# ---- viterbi

RIGHT["viterbi"] = {
    "arrays and a way back": """
import math

def viterbi(word, log_probs):
    n = len(word)
    best = [(0.0, 0)] + [(-math.inf, 0)] * n
    back = [0] * (n + 1)
    for end in range(1, n + 1):
        for start in range(end):
            lp = log_probs.get(word[start:end], -math.inf)
            new = best[start][0] + lp, best[start][1] - 1
            if new[0] > -math.inf and new > best[end]:
                best[end], back[end] = new, start
    if best[n][0] == -math.inf:
        raise ValueError("no cut")
    pieces = []
    while n:
        pieces.append(word[back[n] : n])
        n = back[n]
    return pieces[::-1]
""",
    "from the end, step by step": """
import math

def viterbi(word, log_probs):
    longest = max(map(len, log_probs), default=0)
    rest = {len(word): (0.0, 0, None)}
    for start in reversed(range(len(word))):
        options = []
        for end in range(start + 1, min(start + longest, len(word)) + 1):
            lp = log_probs.get(word[start:end], -math.inf)
            if lp != -math.inf and end in rest:
                options.append((rest[end][0] + lp, rest[end][1] - 1, end))
        if options:
            rest[start] = max(options)
    if 0 not in rest:
        raise ValueError("no cut")
    pieces, start = [], 0
    while start < len(word):
        pieces.append(word[start : rest[start][2]])
        start = rest[start][2]
    return pieces
""",
    "shortest path": """
import heapq
import math

def viterbi(word, log_probs):
    longest = max(map(len, log_probs), default=0)
    heap, done = [(0.0, 0, 0, [])], set()
    while heap:
        cost, n, at, pieces = heapq.heappop(heap)
        if at == len(word):
            return pieces
        if at in done:
            continue
        done.add(at)
        for end in range(at + 1, min(at + longest, len(word)) + 1):
            lp = log_probs.get(word[at:end], -math.inf)
            if lp > -math.inf:
                heapq.heappush(heap, (cost - lp, n + 1, end, [*pieces, word[at:end]]))
    raise ValueError("no cut")
""",
}
VITERBI = """
import math

def viterbi(word, log_probs):
    def cuts(start):
        if start == len(word):
            yield []
        for end in range(start + 1, len(word) + 1):
            if log_probs.get(word[start:end], -math.inf) > -math.inf:
                for rest in cuts(end):
                    yield [word[start:end], *rest]
    if len(word) > 20:
        word = word[:20]
    ways = list(cuts(0))
    if not ways:
        raise ValueError("no cut")
    return max(ways, key=lambda cut: (sum(log_probs[piece] for piece in cut), -len(cut)))
"""
KEY = "(sum(log_probs[piece] for piece in cut), -len(cut))"
TABLE = """
import math

def viterbi(word, log_probs):
    best = [(0.0, 0, [])]
    for end in range(1, len(word) + 1):
        ways = [(-math.inf, 0, [])]
        for start in range(end):
            if word[start:end] in log_probs:
                lp, n, cut = best[start]
                ways.append((lp + log_probs[word[start:end]], n - 1, [*cut, word[start:end]]))
        best.append(max(ways))
    if best[-1][0] == -math.inf:
        raise ValueError("no cut")
    return best[-1][2]
"""
WRONG["viterbi"] = {
    "a logarithm of 0 taken for a missing piece": (
        "another cut has",
        """
def viterbi(word, log_probs):
    best = {0: (0.0, 0, [])}
    for end in range(1, len(word) + 1):
        ways = [
            (best[i][0] + log_probs[word[i:end]], best[i][1] - 1, best[i][2] + [word[i:end]])
            for i in range(end)
            if i in best and log_probs.get(word[i:end]) and log_probs[word[i:end]] > -float("inf")
        ]
        if ways:
            best[end] = max(ways)
    if len(word) not in best:
        raise ValueError
    return best[len(word)][2]
""",
    ),
    "the first of equal sums, longest last piece first": (
        "of equally probable cuts, the fewest pieces",
        """
def viterbi(word, log_probs):
    best = {0: (0.0, [])}
    for end in range(1, len(word) + 1):
        for i in range(end):
            piece = log_probs.get(word[i:end], -float("inf"))
            if i in best and piece > -float("inf") and (end not in best or best[i][0] + piece > best[end][0]):
                best[end] = best[i][0] + piece, best[i][1] + [word[i:end]]
    if len(word) not in best:
        raise ValueError
    return best[len(word)][1]
""",
    ),
    "longest match": (
        "this is the longest piece that fits, again and again",
        """
def viterbi(word, log_probs):
    pieces = []
    while word:
        ends = [n for n in range(1, len(word) + 1) if log_probs.get(word[:n], float("-inf")) > float("-inf")]
        if not ends:
            raise ValueError("no cut")
        pieces.append(word[: max(ends)])
        word = word[max(ends) :]
    return pieces
""",
    ),
    "the next piece only": (
        "the most probable next piece",
        """
def viterbi(word, log_probs):
    pieces = []
    while word:
        fits = [word[:n] for n in range(1, len(word) + 1) if log_probs.get(word[:n], float("-inf")) > float("-inf")]
        if not fits:
            raise ValueError("no cut")
        pieces.append(max(fits, key=log_probs.get))
        word = word[len(pieces[-1]) :]
    return pieces
""",
    ),
    "fewest pieces": (
        "the cut with the fewest pieces",
        changed(VITERBI, (KEY, "(-len(cut), sum(log_probs[piece] for piece in cut))")),
    ),
    "smallest": ("the least probable cut", changed(VITERBI, ("return max", "return min"), ("-len(cut)", "len(cut)"))),
    "mean": (
        "the largest mean",
        changed(VITERBI, (KEY, "(sum(log_probs[piece] for piece in cut) / max(len(cut), 1), -len(cut))")),
    ),
    "logarithms multiplied": (
        "logarithms are multiplied",
        changed(VITERBI, (KEY, "(math.prod(log_probs[piece] for piece in cut), -len(cut))")),
    ),
    "probabilities added": (
        "probabilities are added",
        changed(VITERBI, (KEY, "(sum(math.exp(log_probs[piece]) for piece in cut), -len(cut))")),
    ),
    "most pieces": ("4 pieces where 1 would do", changed(TABLE, ("n - 1", "n + 1"))),
    "products": (
        "does a product become 0.0? add logarithms",
        changed(
            TABLE,
            ("(0.0, 0, [])", "(1.0, 0, [])"),
            ("(-math.inf, 0, [])", "(0.0, 0, [])"),
            ("lp + log_probs[word[start:end]]", "lp * math.exp(log_probs[word[start:end]])"),
            ("best[-1][0] == -math.inf", "not best[-1][2] and word"),
        ),
    ),
    "the first of equals (google/sentencepiece#747)": (
        "of equally probable cuts, the fewest pieces",
        """
import math

def viterbi(word, log_probs):
    best = [(0.0, [])]
    for end in range(1, len(word) + 1):
        top = (-math.inf, [])
        for start in reversed(range(end)):
            lp = best[start][0] + log_probs.get(word[start:end], -math.inf)
            if lp > top[0]:
                top = lp, [*best[start][1], word[start:end]]
        best.append(top)
    if best[-1][0] == -math.inf:
        raise ValueError("no cut")
    return best[-1][1]
""",
    ),
    "no error": (
        "no piece has the x at the end, which should raise ValueError",
        changed(TABLE, ('raise ValueError("no cut")', "return []")),
    ),
    "probability 0": (
        "the only cut has probability 0",
        """
import math

def viterbi(word, log_probs):
    best = {0: []}
    for end in range(1, len(word) + 1):
        ways = [cut + [word[start:end]] for start, cut in best.items() if word[start:end] in log_probs]
        if ways:
            best[end] = max(ways, key=lambda cut: (sum(log_probs[piece] for piece in cut), -len(cut)))
    if len(word) not in best:
        raise ValueError("no cut")
    return best[len(word)]
""",
    ),
    "a call for each letter": (
        "a text may have 1,500 letters",
        """
import functools
import math

def viterbi(word, log_probs):
    @functools.cache
    def rest(start):
        if start == len(word):
            return 0.0, 0, ()
        options = []
        for end in range(start + 1, len(word) + 1):
            piece = word[start:end]
            if piece in log_probs and log_probs[piece] != -math.inf:
                lp, n, pieces = rest(end)
                if lp > -math.inf:
                    options.append((lp + log_probs[piece], n - 1, (piece, *pieces)))
        return max(options, default=(-math.inf, 0, ()))

    lp, _, pieces = rest(0)
    if lp == -math.inf:
        raise ValueError("no cut")
    return list(pieces)
""",
    ),
    "a tuple": (
        "the cut should be a list, not a tuple",
        changed(TABLE, ("return best[-1][2]", "return tuple(best[-1][2])")),
    ),
    "from the end to the front": (
        "the pieces, joined, are",
        changed(TABLE, ("return best[-1][2]", "return best[-1][2][::-1]")),
    ),
}

# ---- expected_counts

RIGHT["expected_counts"] = {
    "two arrays, filled forward and backward": """
import math
import numpy as np

def expected_counts(word, log_probs):
    n = len(word)
    places = [(i, j, word[i:j]) for i in range(n) for j in range(i + 1, n + 1) if word[i:j] in log_probs]
    alpha, beta = np.full(n + 1, -np.inf), np.full(n + 1, -np.inf)
    alpha[0] = beta[n] = 0
    for i, j, piece in places:
        alpha[j] = np.logaddexp(alpha[j], alpha[i] + log_probs[piece])
    for i, j, piece in reversed(places):
        beta[i] = np.logaddexp(beta[i], log_probs[piece] + beta[j])
    if alpha[n] == -np.inf:
        raise ValueError("no cut")
    counts = {piece: 0.0 for piece in log_probs}
    for i, j, piece in places:
        counts[piece] += float(np.exp(alpha[i] + log_probs[piece] + beta[j] - alpha[n]))
    return counts
""",
    "exact fractions": """
import math
from fractions import Fraction

def expected_counts(word, log_probs):
    p = {piece: Fraction(math.exp(log_prob)) for piece, log_prob in log_probs.items()}
    longest = max(map(len, p), default=1)
    n = len(word)
    before, after = [Fraction(1)], [Fraction(1)]
    for end in range(1, n + 1):
        starts = range(max(0, end - longest), end)
        before.append(sum((before[s] * p[word[s:end]] for s in starts if word[s:end] in p), Fraction(0)))
    for start in reversed(range(n)):
        ends = range(start + 1, min(n, start + longest) + 1)
        after.append(sum((p[word[start:e]] * after[n - e] for e in ends if word[start:e] in p), Fraction(0)))
    if not before[n]:
        raise ValueError("no cut")
    counts = {}
    for piece in log_probs:
        places = [s for s in range(n) if word.startswith(piece, s)]
        counts[piece] = float(sum(before[s] * p[piece] * after[n - s - len(piece)] for s in places) / before[n])
    return counts
""",
    "the gradient of the logarithm of the sum": """
import math
import torch

def expected_counts(word, log_probs):
    leaves = {piece: torch.tensor(lp, dtype=torch.float64, requires_grad=True) for piece, lp in log_probs.items()}
    longest = max(map(len, leaves), default=1)
    totals = [torch.zeros((), dtype=torch.float64)]
    for end in range(1, len(word) + 1):
        starts = range(max(0, end - longest), end)
        ways = [totals[s] + leaves[word[s:end]] for s in starts if log_probs.get(word[s:end], -math.inf) > -math.inf]
        ways = [way for way in ways if way.item() > -math.inf]
        totals.append(torch.logsumexp(torch.stack(ways), 0) if ways else torch.tensor(-math.inf, dtype=torch.float64))
    if totals[-1].item() == -math.inf:
        raise ValueError("no cut")
    if totals[-1].requires_grad:
        totals[-1].backward()
    return {piece: 0.0 if leaf.grad is None else leaf.grad.item() for piece, leaf in leaves.items()}
""",
}
EXPECTED = """
import math
import numpy as np

def expected_counts(word, log_probs):
    n = len(word)
    places = [(i, j, word[i:j]) for i in range(n) for j in range(i + 1, n + 1) if word[i:j] in log_probs]
    alpha, beta = np.full(n + 1, -np.inf), np.full(n + 1, -np.inf)
    alpha[0] = beta[n] = 0
    for i, j, piece in places:
        alpha[j] = np.logaddexp(alpha[j], alpha[i] + log_probs[piece])
    for i, j, piece in reversed(places):
        beta[i] = np.logaddexp(beta[i], log_probs[piece] + beta[j])
    if alpha[n] == -np.inf:
        raise ValueError("no cut")
    counts = dict.fromkeys(log_probs, 0.0)
    for i, j, piece in places:
        counts[piece] += math.exp(alpha[i] + log_probs[piece] + beta[j] - alpha[n])
    return counts
"""
RIGHT["expected_counts"]["a piece that is not used has the whole number 0"] = changed(
    EXPECTED, ("dict.fromkeys(log_probs, 0.0)", "dict.fromkeys(log_probs, 0)")
)
SUM = "math.exp(alpha[i] + log_probs[piece] + beta[j] - alpha[n])"
WRONG["expected_counts"] = {
    "the best cut only (google/sentencepiece#462)": (
        "only the most probable cut is counted",
        VITERBI.replace("def viterbi", "def best")
        + """
def expected_counts(word, log_probs):
    cut = best(word, log_probs)
    return {piece: float(cut.count(piece)) for piece in log_probs}
""",
    ),
    "all cuts alike": (
        "all cuts weigh the same",
        changed(
            EXPECTED,
            ("if word[i:j] in log_probs]", "if log_probs.get(word[i:j], -np.inf) > -np.inf]"),
            ("alpha[i] + log_probs[piece])", "alpha[i])"),
            ("log_probs[piece] + beta[j])\n    if", "beta[j])\n    if"),
            (SUM, "math.exp(alpha[i] + beta[j] - alpha[n])"),
        ),
    ),
    "not divided": ("divide by the sum of the products", changed(EXPECTED, (" - alpha[n])", ")"))),
    "set, not added": ("replaces what was counted before", changed(EXPECTED, ("counts[piece] +=", "counts[piece] ="))),
    "forward only": (
        "what stands after a piece",
        changed(EXPECTED, (SUM, "math.exp(alpha[i] + log_probs[piece] - alpha[n])")),
    ),
    "backward only": (
        "what stands before a piece",
        changed(EXPECTED, (SUM, "math.exp(log_probs[piece] + beta[j] - alpha[n])")),
    ),
    "the M step, too": (
        "already the next probabilities",
        changed(
            EXPECTED,
            (
                "return counts",
                "total = sum(counts.values()) or 1.0\n    return {piece: count / total for piece, count in counts.items()}",
            ),
        ),
    ),
    "one place too far": (
        "letters in all, but these have",
        changed(EXPECTED, ("beta[j] - alpha[n]", "beta[i] - alpha[n]")),
    ),
    "the best way before and after": (
        "letters in all, but these have",
        changed(
            EXPECTED,
            ("np.logaddexp(alpha[j], alpha[i] + log_probs[piece])", "max(alpha[j], alpha[i] + log_probs[piece])"),
            ("np.logaddexp(beta[i], log_probs[piece] + beta[j])", "max(beta[i], log_probs[piece] + beta[j])"),
        ),
    ),
    "logarithms added up as if they were probabilities": (
        "letters in all, but these have",
        changed(
            EXPECTED,
            (
                "np.logaddexp(alpha[j], alpha[i] + log_probs[piece])",
                "np.logaddexp(alpha[j], alpha[i] * log_probs[piece])",
            ),
        ),
    ),
    "products, which become 0.0": (
        "stay with logarithms",
        """
import math

def expected_counts(word, log_probs):
    n, p = len(word), {piece: math.exp(lp) for piece, lp in log_probs.items()}
    places = [(i, j, word[i:j]) for i in range(n) for j in range(i + 1, n + 1) if word[i:j] in p]
    before, after = [1.0] + [0.0] * n, [0.0] * n + [1.0]
    for i, j, piece in places:
        before[j] += before[i] * p[piece]
    for i, j, piece in reversed(places):
        after[i] += p[piece] * after[j]
    if not before[n]:
        raise ValueError("no cut")
    counts = dict.fromkeys(p, 0.0)
    for i, j, piece in places:
        counts[piece] += before[i] * p[piece] * after[j] / before[n]
    return counts
""",
    ),
    "no error": (
        "no cut of more than probability 0, which should raise ValueError",
        changed(EXPECTED, ('raise ValueError("no cut")', "return dict.fromkeys(log_probs, 0.0)")),
    ),
    "a log-probability of 0.0 taken for none": (
        "a log-probability of 0.0 is that of probability 1",
        changed(EXPECTED, ("if word[i:j] in log_probs]", "if log_probs.get(word[i:j])]")),
    ),
    "no more than 200 letters": (
        "a word may have 500 letters",
        changed(
            EXPECTED, ("    n = len(word)\n", '    n = len(word)\n    if n > 200:\n        raise ValueError("long")\n')
        ),
    ),
    "unused pieces are left out": (
        "has the wrong keys",
        changed(EXPECTED, ("return counts", "return {piece: count for piece, count in counts.items() if count}")),
    ),
    "float32": (
        "were the sums in float32?",
        changed(
            EXPECTED,
            (
                "alpha, beta = np.full(n + 1, -np.inf), np.full(n + 1, -np.inf)",
                "alpha, beta = np.full(n + 1, -np.inf, np.float32), np.full(n + 1, -np.inf, np.float32)",
            ),
        ),
    ),
    "whether, not how often": (
        "used twice in a cut counts twice",
        """
import itertools
import math

def expected_counts(word, log_probs):
    def cuts(part):
        if not part:
            yield [], 1.0
        for end in range(1, len(part) + 1):
            if part[:end] in log_probs:
                for rest, p in cuts(part[end:]):
                    yield [part[:end], *rest], p * math.exp(log_probs[part[:end]])
    ways = list(cuts(word))
    z = sum(p for _, p in ways)
    if not z:
        raise ValueError("no cut")
    return {piece: sum(p for cut, p in ways if piece in cut) / z for piece in log_probs}
""",
    ),
}

# Mutants that compute the same.
EQUIVALENT = {
    "unfinished: (1, 192) -> (1, 193)": "no text in UTF-8 has the bytes 192 and 193: a character of two bytes begins with"
    " 194 or more",
}
