# Built by lessons/src/01_tokenizer.md: change it there, then run python lessons/build.py build 01
"""Tokenizers: text becomes a list of small integers, and the integers become exactly the same text again.

A model sees only ids from a fixed vocabulary. This file holds three ways to get them:

    BPETokenizer             byte-level byte-pair encoding, written out here; also reads GPT-2's own files
    CharTokenizer            one id per character of a known alphabet: nothing simpler works at all
    SentencePieceTokenizer   Google's library (as LLaMA used it), set up so that nothing is lost

Byte-pair encoding starts from the 256 bytes, so no text is ever unknown. It counts which two ids stand beside each
other most often, gives that pair an id of its own, and does so again until the vocabulary is full. What it learns is a
list of merges; encoding a new text replays them in the order in which they were learned.

All three keep one promise: `decode(encode(text)) == text`. So none of them cleans text; `normalize` does, when asked.

Papers: Gage (1994) and Sennrich et al. (2015, arXiv:1508.07909) for the merges; Radford et al. (2019, GPT-2) for doing
it on bytes; Kudo and Richardson (2018, arXiv:1808.06226) for SentencePiece, Kudo (2018, arXiv:1804.10959) for its
unigram model. Left out: special tokens inside text, dropout of merges, n-best lists.
"""

import hashlib
import heapq
import io
import json
import os
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import regex
import sentencepiece
import tyro
from tyro.conf import Positional

from nanogptx import files
from nanogptx.program import nearest, run

# ----------------------------------------------------------------------------------------------------------------------
# Text: cleaning it, reading it piece by piece


def normalize(text: str) -> str:
    """Drop byte-order marks in front, end lines with LF, compose accents (NFC); a second time changes nothing."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    # Only NFC: the popular NFKC would also turn ½ into 1⁄2 and ﬁ into fi, and what was typed could not come back.
    return unicodedata.normalize("NFC", text)


# ----------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding: from text to words, from words to the ids of their bytes

# GPT-2 never merges across these pieces of a text, which we call words: 's 't 're 've 'm 'll 'd, a run of letters or of
# digits or of signs, each with the one space before it, and a run of white space. The lookahead leaves the last space
# of a run to the word that follows it.
SPLIT = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


# Byte tokens have ids 0 to 255, in GPT-2's order: first the bytes that Latin-1 prints, then the others. So id 0 is "!".
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF_ID = bytes(PRINTED + [byte for byte in range(256) if byte not in PRINTED])
ID_OF_BYTE = bytes(BYTE_OF_ID.index(byte) for byte in range(256))

# Its files write a byte as one letter: Latin-1's where there is one, for the 68 others (say Ġ, the space) those after.
LETTERS = [*map(chr, PRINTED), *map(chr, range(256, 256 + 68))]


def byte_ids(word: str) -> list[int]:
    """The ids of a word's bytes, before any merge."""
    return list(word.encode("utf-8").translate(ID_OF_BYTE))  # translate: each byte is looked up in the table


def count_words(chunks: str | Iterable[str], pattern: regex.Pattern = SPLIT) -> Counter[str]:
    """How often each word occurs in a text, or in chunks of one that is too large to hold; ValueError for no text."""
    words = Counter()
    for chunk in [chunks] if isinstance(chunks, str) else chunks:
        chunk.encode("utf-8")  # raises for a lone surrogate
        words.update(pattern.findall(chunk))
    if not words:
        raise ValueError("the text is empty: there is nothing to learn a vocabulary from")
    return words


# Right before a space or a line break that follows something visible, a text can be cut: no token of the tokenizers
# here crosses such a place, GPT-2's neither. (?r) searches from the end of the text.
CUT = regex.compile(r"(?r)(?<=\S)[ \r\n]")


def read_chunks(path: str | os.PathLike, size: int = 1 << 22) -> Iterator[str]:
    """The text of a UTF-8 file in chunks of about `size` characters; their ids, joined, are those of the whole text.

    Line ends stay as they are. Only a stretch of `size` characters without a place to cut is cut anywhere.
    Raises OSError for a file that cannot be read and ValueError for one that is not text, both with the path.
    """
    with open(path, encoding="utf-8", newline="", buffering=1 << 16) as file:
        if b"\0" in file.buffer.peek(8192)[:8192]:
            raise ValueError(f"{path} is not a text file, it has NUL bytes: if it is UTF-16, convert it to UTF-8")
        held = ""
        try:
            while text := file.read(size):
                held += text
                place = CUT.search(held)
                end = place.start() if place else len(held)
                yield held[:end]
                held = held[end:]
        except UnicodeDecodeError as error:  # which counts from the beginning of the block it was given
            at = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {at}; convert it to UTF-8") from None
        if held:
            yield held


# ----------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding: learning the merges

SPECIALS = ("<|bos|>", "<|eos|>")  # the beginning and the end of a document


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each `pair` by `new_id`, from left to right: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(ids):
        found = ids[i] == pair[0] and ids[i + 1 : i + 2] == [pair[1]]
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged


def train_bpe(chunks: str | Iterable[str], vocab_size: int) -> list[tuple[int, int]]:
    """Learn the merges of a vocabulary of 256 bytes, `vocab_size` - 258 merges and two special tokens.

    Each step merges the most frequent pair; among equally frequent ones the smaller pair of ids. Merge k makes id
    256 + k. Raises ValueError when the text has too few pairs. The idea is three lines (count all pairs, take the
    best, merge it everywhere); the added complexity is so that 1) a word that occurs a thousand times is merged once,
    2) only words that contain the pair are counted again, 3) the best pair is found without looking at all of them.
    """
    words = count_words(chunks)
    ids, times = [byte_ids(word) for word in words], list(words.values())
    counts = defaultdict(int)  # pair -> how often it occurs in the text
    where = defaultdict(set)  # pair -> the words that contain it, or once did

    def count_pairs(word: int, n: int) -> None:
        for pair in zip(ids[word], ids[word][1:]):
            counts[pair] += n
            where[pair].add(word)

    for word, n in enumerate(times):
        count_pairs(word, n)
    queue = [(-count, pair) for pair, count in counts.items()]  # negative: Python's heap gives the smallest first
    heapq.heapify(queue)
    merges = []
    for new_id in range(256, vocab_size - len(SPECIALS)):
        pair = most_frequent(queue, counts)
        if pair is None:
            most = new_id + len(SPECIALS)
            raise ValueError(f"the text supports a vocabulary of at most {most}: ask for that or less, or add text")
        made = set()
        for word in where[pair]:
            count_pairs(word, -times[word])
            ids[word] = merge(ids[word], pair, new_id)
            count_pairs(word, times[word])
            made.update(new for new in zip(ids[word], ids[word][1:]) if new_id in new)
        for new in made:
            heapq.heappush(queue, (-counts[new], new))
        del where[pair]
        merges.append(pair)
    return merges


def most_frequent(queue: list[tuple[int, tuple[int, int]]], counts: dict[tuple[int, int], int]):
    """Take the best pair out of the queue; None when no pair is left.

    The queue may be out of date, but only in one direction: a merge takes occurrences away from old pairs and gives
    none to them. So an entry that is still right when it comes out on top is the best; another goes back, corrected.
    """
    while queue:
        count, pair = heapq.heappop(queue)
        if counts[pair] == -count:
            return pair
        if counts[pair]:
            heapq.heappush(queue, (-counts[pair], pair))


# ----------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding: replaying the merges on a new word


def encode_naive(ids: list[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    """Apply the merge that was learned first of those that fit, everywhere, until none fits: the definition."""
    while True:
        pair = min(zip(ids, ids[1:]), key=lambda pair: ranks.get(pair, len(ranks)), default=None)
        if pair not in ranks:
            return ids
        ids = merge(ids, pair, 256 + ranks[pair])


def encode_fast(ids: list[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    """The same ids as `encode_naive`, in O(n log n) steps; that one reads the word again for each kind of merge in it.

    The ids form a linked list, so that a merge is done in place: the left one becomes the new id, the right one is
    unlinked and becomes -1. A heap holds all merges that were possible when they were put in, as (rank, position).
    """
    ids = [*ids, -1]  # -1 is in no pair, so this one ends the word on both sides: the list is closed to a ring
    right = [*range(1, len(ids)), 0]
    left = [*range(-1, len(ids) - 1)]
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        if ids[i] < 0 or ranks.get((ids[i], ids[right[i]])) != rank:
            continue  # another merge has taken one of the two
        ids[i], ids[right[i]] = 256 + rank, -1
        right[i] = right[right[i]]
        left[right[i]] = i
        # subtle: a pair joins ids that exist already, so these two rank after `rank`: nothing comes too late
        for j in (left[i], i):
            pair = ids[j], ids[right[j]]
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], j))
    return [token for token in ids if token >= 0]


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizers


class Tokenizer:
    """What all tokenizers share. Each has encode, decode, train and `to_bytes`, the contents of its file.

    `file_name` is what that file is called in a run directory. `vocab_size` counts all ids. `bos_id` and `eos_id` stand
    before and after a document; they never come out of `encode`, whatever the text says.
    """

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        files.write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote; ValueError with the path when it is damaged, or another kind of tokenizer."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} holds a {type(tokenizer).__name__}, expected a {cls.__name__}")
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `save` writes: equal for equal tokenizers, so that stored ids can name theirs."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids as a list; ValueError for one that is not in the vocabulary."""
        ids = [int(i) for i in ids]
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"there is no token {unknown[0]}: ids go from 0 to {self.vocab_size - 1}")
        return ids


def to_json(**fields) -> bytes:
    """One line of compact JSON."""
    return (json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8")


class WordTokenizer(Tokenizer):
    """One that cuts a text into words by the pattern `split` and encodes each by itself, with `encode_word`."""

    cache_size = 1 << 16  # words whose ids are remembered: a few thousand words make up most of any text
    long_word = 256  # characters; the cache holds at most one word that is longer

    def encode(self, text: str) -> list[int]:
        """Text to ids; ValueError for a lone surrogate. Text that looks like a special token stays text."""
        text.encode("utf-8")  # raises for a lone surrogate: half of a character, for which there are no bytes
        ids = []
        for word in self.split.findall(text):
            if word not in self.cache:
                if len(self.cache) >= self.cache_size or len(word) > self.long_word:
                    self.cache.clear()  # the frequent words will be back at once
                self.cache[word] = self.encode_word(word)
            ids += self.cache[word]
        return ids


class BPETokenizer(WordTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2015; on bytes: GPT-2, 2019)."""

    file_name = "tokenizer.json"
    split = SPLIT

    def __init__(self, merges: Iterable[tuple[int, int]], specials: Iterable[str] = SPECIALS):
        self.merges = [(int(first), int(second)) for first, second in merges]
        self.specials = [str(special) for special in specials]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.pieces = [bytes([byte]) for byte in BYTE_OF_ID]  # the bytes that each id stands for
        for pair in self.merges:
            # The last: a small file of thirty doublings would otherwise fill the memory.
            if min(pair) < 0 or max(pair) >= len(self.pieces) or len(self.pieces[pair[0]]) > 1 << 20:
                raise ValueError(f"its merge {pair} cannot make id {len(self.pieces)}: it must join two smaller ids")
            self.pieces.append(self.pieces[pair[0]] + self.pieces[pair[1]])
        if len(self.ranks) < len(self.merges) or not 1 <= len(self.specials) <= 2:
            raise ValueError("it merges a pair twice, or it has not one or two special tokens")
        self.bos_id, self.eos_id = len(self.pieces), len(self.pieces) + len(self.specials) - 1
        self.pieces += [b""] * len(self.specials)
        self.vocab_size = len(self.pieces)
        self.cache = {}

    def encode_word(self, word: str) -> list[int]:
        return encode_fast(byte_ids(word), self.ranks)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens have none, and half a character becomes U+FFFD. ValueError for an unknown id."""
        # First join, then decode: the bytes of one character may be spread over several tokens.
        return b"".join(self.pieces[i] for i in self.check_ids(ids)).decode("utf-8", errors="replace")

    def to_bytes(self) -> bytes:
        return to_json(format="nanogptx-bpe", specials=self.specials, merges=self.merges)

    @classmethod
    def train(cls, chunks: str | Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn a vocabulary of exactly `vocab_size` from a text; ValueError when that is impossible."""
        if vocab_size < 256 + len(SPECIALS):
            raise ValueError(f"a vocabulary of {vocab_size} is too small: 256 bytes, bos and eos need 258")
        return cls(train_bpe(chunks, vocab_size))

    @classmethod
    def from_gpt2(cls, folder: str | os.PathLike) -> "BPETokenizer":
        """Read vocab.json and merges.txt; GPT-2's one special token, <|endoftext|>, is both bos and eos.

        Raises ValueError when the two files do not fit together.
        """
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
        tokens = [*LETTERS, *map("".join, merges), "<|endoftext|>"]
        ids = {token: i for i, token in enumerate(tokens)}
        if files.read_json(Path(folder, "vocab.json")) != ids:
            raise ValueError("vocab.json does not number tokens as GPT-2 does: 256 bytes, the merges, <|endoftext|>")
        return cls([[ids.get(part, -1) for part in pair] for pair in merges], ["<|endoftext|>"])


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points."""

    file_name = "tokenizer.json"

    def __init__(self, alphabet: str):
        self.alphabet = "".join(sorted(set(alphabet)))
        self.ids = {character: i for i, character in enumerate(self.alphabet)}
        self.bos_id, self.eos_id = len(self.ids), len(self.ids) + 1
        self.vocab_size = len(self.ids) + 2

    def encode(self, text: str) -> list[int]:
        """Text to ids; ValueError for a character outside the alphabet."""
        if unknown := sorted(set(text) - set(self.ids)):
            which = f"{unknown[0]!r} (U+{ord(unknown[0]):04X})"
            raise ValueError(f"{which} is not in the alphabet of this tokenizer; a bpe tokenizer takes any text")
        return [self.ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens have none. ValueError for an unknown id."""
        return "".join(self.alphabet[i : i + 1] for i in self.check_ids(ids))  # a slice beyond the end is empty

    def to_bytes(self) -> bytes:
        return to_json(format="nanogptx-char", alphabet=self.alphabet)

    @classmethod
    def train(cls, chunks: str | Iterable[str]) -> "CharTokenizer":
        """Take the alphabet of a text; ValueError when it is empty."""
        return cls(count_words(chunks, regex.compile("(?s).")))


# ----------------------------------------------------------------------------------------------------------------------
# SentencePiece

MARK = "\u2581"  # ▁, which SentencePiece writes for a space: in a text of its own it would come back as a space

# What no piece may hold: line ends (SentencePiece learns from lines), the tab (see input_format), the mark, and U+2585,
# for which SentencePiece would silently drop the whole line. In a text they go through byte pieces.
BARRIERS = f"\t\n\r{MARK}\u2585"

# A piece has spaces only in front, so a text can be cut before each run of spaces and around each barrier. These words,
# with their counts, teach SentencePiece what the text would, in little memory. And encoding goes word by word: over a
# long text its unigram model adds up log-probabilities in 32 bits, and their rounding would decide between the pieces.
PIECE_WORDS = regex.compile(f" *[^ {BARRIERS}]+| +|[{BARRIERS}]")

# What makes it lossless and repeatable; by default it rewrites text (NFKC) and trims and joins spaces. The special
# tokens have their default ids: unk 0 (which never occurs, thanks to the bytes), bos 1, eos 2.
LOSSLESS = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,  # no space in front that was not in the text
    byte_fallback=True,  # what has no piece is written as its bytes: "\n" is <0x0A>, as in LLaMA
    required_chars=MARK,  # a piece for the space, even if the text has none: its bytes would be those of the mark
    allow_whitespace_only_pieces=True,  # indentation
    input_format="tsv",  # a word, a tab, its count
    max_sentence_length=1 << 30,  # by default what is longer than 4192 bytes is silently dropped
    num_threads=1,  # with more, the sums of the unigram model depend on their number
    unk_surface="",  # special tokens have no text
    minloglevel=2,  # errors only
)


class SentencePieceTokenizer(WordTokenizer):
    """A SentencePiece model (Kudo and Richardson 2018): bpe, unigram or char.

    Models trained here are lossless. Those of others keep the habits they were trained with (LLaMA's puts a space in
    front and takes it away again; T5's rewrites characters), so for them decode(encode(text)) may differ from the text.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError):
            raise ValueError("this is neither nanogptx's JSON nor a whole SentencePiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = processor.vocab_size(), processor.bos_id(), processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("this SentencePiece model has no bos or no eos token, so documents cannot be told apart")
        self.mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in MARK.encode("utf-8")]
        # Only a model that leaves spaces alone can be given a text word by word; another gets it as one.
        in_words = processor.normalize(" x  ") == "▁x▁▁" and all(map(processor.is_byte, self.mark_ids))
        self.split = PIECE_WORDS if in_words else regex.compile("(?s).+")
        self.cache = {}

    def encode_word(self, word: str) -> list[int]:
        return self.mark_ids if word == MARK and self.split is PIECE_WORDS else self.processor.encode(word)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens have none. ValueError for an unknown id."""
        return self.processor.decode(self.check_ids(ids))

    def to_bytes(self) -> bytes:
        return self.model

    @classmethod
    def train(cls, chunks: str | Iterable[str], vocab_size: int, kind: str = "bpe") -> "SentencePieceTokenizer":
        """Learn a vocabulary from a text; for kind "char" `vocab_size` is the most it may have.

        Raises ValueError for a size that is too small for the characters of the text or more than it supports.
        """
        words = count_words(chunks, PIECE_WORDS)
        lines = [f"{word}\t{words[word]}" for word in sorted(words) if word not in BARRIERS]
        # The rarest characters, 5 in 10,000, go through bytes: one foreign name must not cost a page of ids.
        coverage = 1.0 if kind == "char" else 0.9995
        options = dict(LOSSLESS, model_type=kind, vocab_size=vocab_size, character_coverage=coverage)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
        except (RuntimeError, ValueError) as error:
            # "INTERNAL: file(line) [condition] reason", where the reason may end in an option that is not ours
            reason = str(error).rpartition("] ")[2].partition(" or decrease")[0] or "259 are specials and bytes"
            raise ValueError(f"cannot make a vocabulary of {vocab_size} from this text: {reason}") from None
        return cls(model.getvalue())


# ----------------------------------------------------------------------------------------------------------------------
# All of them, by name or by path

KINDS = ("bpe", "char", "sp-bpe", "sp-unigram", "sp-char")


def train_tokenizer(kind: str, chunks: str | Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the tokenizer of that name; "char" has as many ids as its text asks for. ValueError for an unknown name."""
    if kind not in KINDS:
        raise ValueError(nearest("tokenizer", kind, KINDS))
    if kind.startswith("sp-"):
        return SentencePieceTokenizer.train(chunks, vocab_size, kind.removeprefix("sp-"))
    return BPETokenizer.train(chunks, vocab_size) if kind == "bpe" else CharTokenizer.train(chunks)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from its file or folder: ours, GPT-2's, or a SentencePiece model; nothing is ever unpickled.

    Raises OSError for a file that cannot be read and ValueError for one that is something else.
    """
    path = Path(path)
    if path.is_dir():  # in this order: beside the files of others there often is a Hugging Face tokenizer.json
        found = [name for name in ("merges.txt", "tokenizer.model", "tokenizer.json") if (path / name).exists()]
        path = path / (found or ["tokenizer.json"])[0]
    try:
        if path.name in ("merges.txt", "vocab.json"):
            return BPETokenizer.from_gpt2(path.parent)
        data = path.read_bytes()
        return from_json(data) if data.startswith(b"{") else SentencePieceTokenizer(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def from_json(data: bytes) -> Tokenizer:
    """The tokenizer whose `to_bytes` these are; ValueError when there is none."""
    if b'"added_tokens"' in data and b'"model"' in data:
        raise ValueError("this is Hugging Face's format; with it, nanogptx reads only vocab.json and merges.txt")
    try:
        fields = json.loads(data)
        kind = {"nanogptx-bpe": BPETokenizer, "nanogptx-char": CharTokenizer}[fields.pop("format")]
        tokenizer = kind(**fields)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"this is not JSON that nanogptx saved, or not all of it ({error})") from None
    if tokenizer.to_bytes() != data:  # so a field that is missing, or 1.0 instead of 1, is found without a test for it
        raise ValueError("this was changed after nanogptx had saved it")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Train:
    """Learn a tokenizer from a text file and save it."""

    file: Positional[Path]  # the text to learn from, in UTF-8
    out: Path  # the file to save it in, JSON (say tokenizer.json) or, for kinds with sp-, a SentencePiece .model
    vocab_size: int = 512  # how many ids, special ones included; for char the text decides, for sp-char it may be less
    kind: str = "bpe"  # bpe, char, sp-bpe, sp-unigram or sp-char
    normalize: bool = False  # learn from normalized text: no byte-order mark, LF line ends, composed accents

    def chunks(self) -> Iterator[str]:
        return map(normalize if self.normalize else str, read_chunks(self.file))

    def run(self) -> None:
        start = time.monotonic()
        if self.out.is_dir():
            raise ValueError(f"--out {self.out} is a folder: give the name of the file to write")
        self.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        tokenizer = train_tokenizer(self.kind, self.chunks(), self.vocab_size)
        tokenizer.save(self.out)
        ratio = self.file.stat().st_size / max(1, sum(len(tokenizer.encode(chunk)) for chunk in self.chunks()))
        seconds = time.monotonic() - start
        print(f"{self.out}: {tokenizer.vocab_size} ids, {ratio:.3f} bytes per token, {seconds:.1f} s")


@dataclass
class Encode:
    """Print the ids of a text."""

    tokenizer: Positional[Path]  # a tokenizer's file or folder
    text: Positional[tuple[str, ...]] = ()  # words, to be joined by spaces; if there are none: all of standard input

    def run(self) -> None:
        text = " ".join(self.text) if self.text else sys.stdin.buffer.read().decode("utf-8")
        print(*load_tokenizer(self.tokenizer).encode(text))


@dataclass
class Decode:
    """Print the text of ids, and nothing else: what encode printed gives the same bytes again."""

    tokenizer: Positional[Path]  # a tokenizer's file or folder
    ids: Positional[tuple[int, ...]]  # what encode printed

    def run(self) -> None:
        sys.stdout.buffer.write(load_tokenizer(self.tokenizer).decode(self.ids).encode("utf-8"))


if __name__ == "__main__":
    run(lambda: tyro.cli(Train | Encode | Decode, description="Train a tokenizer, or use one.").run())
