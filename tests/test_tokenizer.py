"""Tests of nanogptx/tokenizer.py: an example to redo on paper, independent libraries as oracles, and properties."""

import heapq
import io
import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from nanogptx import tokenizer as component
from nanogptx.tokenizer import (
    KINDS,
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    byte_ids,
    count_words,
    encode_fast,
    encode_naive,
    load_tokenizer,
    merge,
    normalize,
    read_chunks,
    train_bpe,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
SP_KINDS = ("bpe", "unigram", "char")


def make_text(seed: int, n_words: int) -> str:
    """Words of a small world in random order, with everything that can be hard for a tokenizer between them."""
    rng = random.Random(seed)
    stems = ["".join(rng.choices("etaoinsrhldcu", k=rng.randint(1, 9))) for _ in range(600)]
    stems += "Zoë naïve don't we're 1984 3.14 -- «¡hola!» 😀 👩‍👩‍👧 e\u0301 日本語 <s> <0x0A>".split()
    gaps = [" "] * 60 + ["\n"] * 8 + ["  ", ", ", ". ", "\n\n", "\r\n", "\t", " \n", "   \n  ", "\u00a0", "\u2028"]
    return "".join(rng.choice(stems) + rng.choice(gaps) for _ in range(n_words))


TEXT = make_text(0, 12_000)
SIZES = {"bpe": 500, "char": 0, "sp-bpe": 500, "sp-unigram": 400, "sp-char": 500}
TRAINED = {kind: train_tokenizer(kind, TEXT, size) for kind, size in SIZES.items()}

NASTY = [
    *[
        "",
        " ",
        "  ",
        " a",
        "a ",
        "  a   b  ",
        "\t",
        "a\tb",
        "\n",
        "\n\n",
        "\na\n",
        "a\r\nb\r\n",
        "\r",
        "\0",
        "a\0b",
        "\x1c",
    ],
    *[
        "😀",
        "👩‍👩‍👧",
        "e\u0301",
        "é",
        "\u0301",
        "\u2581",
        "a\u2581b \u2581",
        "\u2581\u2581",
        "\u2585",
        "\ufffd",
        "\ufeffa",
    ],
    *[
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
        "<|bos|>",
        "<|eos|>",
        "<|endoftext|>",
        " ⁇ ",
        "\u2047",
        "\u00a0",
        "\u3000x",
        "\u2028",
    ],
    *["½ﬁ…™", "日本語", "don't we'll", "1234 5", "!?!", "\U0010ffff", "\ue000", "\x85", "\x7f", "Ġ", "ĠĠ a"],
]
# Characters that the Unicode tables of Python 3.11 know: newer tables, of other libraries, may class the others apart.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.lists(st.sampled_from([*NASTY, "the ", " and"]) | st.text(ASSIGNED, max_size=8), max_size=8).map("".join)
EXAMPLES = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def same_behaviour(one: Tokenizer, other: Tokenizer) -> bool:
    return one.encode(TEXT) == other.encode(TEXT) and (one.vocab_size, one.bos_id, one.eos_id) == (
        other.vocab_size,
        other.bos_id,
        other.eos_id,
    )


# ----------------------------------------------------------------------------------------------------------------------
# On paper


def test_the_example_of_wikipedia():
    """aaabdaaabac, with a = 64, b = 65, c = 66, d = 67 (GPT-2's ids of these bytes).

    aa stands there 4 times (twice in each aaa): merge 256 = aa gives  256 a b d 256 a b a c.
    Now 256 a and a b both stand there twice; (64, 65) is smaller than (256, 64): merge 257 = ab gives
    256 257 d 256 257 a c. Now 256 257 stands there twice: merge 258 = aaab gives  258 d 258 a c.
    """
    assert byte_ids("abcd") == [64, 65, 66, 67]
    merges = train_bpe("aaabdaaabac", 256 + 3 + 2)
    assert merges == [(64, 64), (64, 65), (256, 257)]
    tokenizer = BPETokenizer(merges)
    assert tokenizer.encode("aaabdaaabac") == [258, 67, 258, 64, 66]
    assert tokenizer.decode([258, 67, 258, 64, 66]) == "aaabdaaabac"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (259, 260, 261)


def test_merge_goes_from_left_to_right():
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]
    assert merge([1, 2, 1, 2, 3, 1], (1, 2), 9) == [9, 9, 3, 1]
    assert merge([], (1, 2), 9) == [] and merge([1], (1, 2), 9) == [1]


def test_bytes_have_the_ids_of_gpt2():
    # "!" is 0, "A" 32, "\n" 198 and " " 220 in GPT-2's published vocabulary, which is where these numbers are from.
    assert byte_ids("!A\n ~¡") == [0, 32, 198, 220, 93, 126, 94]
    assert sorted(byte_ids("".join(map(chr, range(128))))) == sorted({*range(94), *range(188, 222)})
    assert component.BYTE_OF_ID[188:190] == b"\x00\x01" and len(set(component.BYTE_OF_ID)) == 256


def test_ties_go_to_the_smaller_pair():
    # ba, ab, zy, yx: every pair occurs once or twice; byte order decides, not the order of the text.
    assert train_bpe("zy ba", 259) == [byte_pair("ba")]
    assert train_bpe("zyzy baba", 259) == [byte_pair("ba")]  # ba and zy twice
    assert train_bpe("ba zyzy", 259) == [byte_pair("zy")]  # a higher count goes first


def byte_pair(two: str) -> tuple[int, int]:
    return tuple(byte_ids(two))


# ----------------------------------------------------------------------------------------------------------------------
# Byte-pair encoding against other implementations


def train_by_recounting(text: str, n_merges: int) -> list[tuple[int, int]]:
    """The definition of the training: count all pairs of all words anew before each merge."""
    words = [byte_ids(word) for word in component.SPLIT.findall(text)]
    merges = []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(ids, best, new_id) for ids in words]
        merges.append(best)
    return merges


@pytest.mark.parametrize(
    "text, n_merges",
    [("aaaaabaaaaaaabaaa aaaa aaaaaaaaaaaa", 12), ("abababab babab aabbaabb", 6), (make_text(1, 300), 120)],
)
def test_training_equals_counting_anew_each_time(text, n_merges):
    assert train_bpe(text, 256 + n_merges + 2) == train_by_recounting(text, n_merges)


def oracle(vocab: dict | None = None, merges: list | None = None) -> tokenizers.Tokenizer:
    """Hugging Face's byte-level BPE, empty or with GPT-2's kind of vocabulary."""
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges) if vocab else models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return theirs


def trained_oracle(text: str, n_merges: int) -> tuple[tokenizers.Tokenizer, list[tuple[int, int]]]:
    theirs = oracle()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=letters, show_progress=False)
    theirs.train_from_iterator([text], trainer)
    ids = theirs.get_vocab()
    return theirs, [tuple(ids[part] for part in pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]


@pytest.mark.parametrize(
    "text, n_merges",
    [
        ("aaaaabaaaaaaabaaa aaaa aaaaaaaaaaaa", 10),
        ("日本語 日本 日本語 naïve naïf Zoë Zoé 😀😁😀", 12),
        (TEXT, 1200),
        (make_text(2, 800) + "\n\n   \t\n" + "x = f(y)  # 12345\n" * 9, 500),
        (make_text(3, 30_000), 300),
    ],
)
def test_training_equals_the_tokenizers_library(text, n_merges):
    assert train_bpe(text, 256 + n_merges + 2) == trained_oracle(text, n_merges)[1]


@EXAMPLES
@given(TEXTS)
def test_encoding_equals_the_tokenizers_library(text):
    assert TRAINED["bpe"].encode(text) == THEIRS.encode(text).ids


THEIRS = trained_oracle(TEXT, 500 - 256 - 2)[0]


@EXAMPLES
@given(TEXTS)
def test_words_are_those_of_the_tokenizers_library(text):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    for words in (text, "5½ x² Ⅷ٣ we'Re we're 's", *NASTY):
        assert component.SPLIT.findall(words) == [words[start:end] for _, (start, end) in split(words)]


@EXAMPLES
@given(st.text("abc", max_size=40), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20))
def test_fast_encoding_equals_naive_encoding(text, wishes):
    # Any merges at all, not only such as training makes: each wish is taken modulo the ids that there are.
    known = [*byte_ids("abc")]
    ranks = {}
    for first, second in wishes:
        pair = known[first % len(known)], known[second % len(known)]
        if pair not in ranks:
            known.append(256 + len(ranks))
            ranks[pair] = len(ranks)
    ids = byte_ids(text)
    assert encode_fast(ids, ranks) == encode_naive(ids, ranks)
    assert ids == byte_ids(text)  # neither changes its argument


def test_a_long_word_takes_work_in_proportion(monkeypatch):
    tokenizer, pops = TRAINED["bpe"], Counter()
    real = heapq.heappop
    monkeypatch.setattr(component.heapq, "heappop", lambda heap: pops.update(n=1) or real(heap))
    word = "".join(random.Random(5).choices("etaoinsrhldcu", k=100_000))
    ids = tokenizer.encode(word)
    assert tokenizer.decode(ids) == word and len(ids) < 90_000
    assert 10_000 < pops["n"] < 3 * len(word)  # a letter begins at most one pair, a merge makes at most two more
    assert encode_fast(byte_ids(word[:1500]), tokenizer.ranks) == encode_naive(byte_ids(word[:1500]), tokenizer.ranks)


def test_training_on_chunks_is_training_on_the_whole():
    chunks = [TEXT[:5001], TEXT[5001:5002], "", TEXT[5002:]]
    whole = train_bpe(["one two\n", "three"], 262)
    assert whole == train_bpe(iter(["one two\n", "three"]), 262) == train_bpe("one two\nthree", 262)
    assert count_words(chunks, component.regex.compile("(?s).")) == Counter(TEXT)


def test_words_are_the_memory_of_the_training():
    # A text of a million characters and four words: an iterator is enough, and nothing but the words is kept.
    words = count_words("one two\nthree 4444\n" for _ in range(50_000))
    assert words == {"one": 50_000, " two": 50_000, "\n": 100_000, "three": 50_000, " 4444": 50_000}


def test_a_vocabulary_larger_than_the_text_names_the_largest():
    with pytest.raises(ValueError, match=r"at most 261: ask for that or less"):
        BPETokenizer.train("abcd", 1000)
    assert BPETokenizer.train("abcd", 261).encode("abcd") == [258]
    for vocab_size in (257, 0, -1):
        with pytest.raises(ValueError, match="258"):
            BPETokenizer.train("abcd", vocab_size)
    assert BPETokenizer.train("abcd", 258).merges == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_refused(kind):
    for nothing in ("", [], iter(["", ""])):
        with pytest.raises(ValueError, match="the text is empty"):
            train_tokenizer(kind, nothing, 500)


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's files


def save_as_gpt2(folder: Path, text: str, n_merges: int, **extra) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt, written by the tokenizers library; only <|endoftext|> is added, where GPT-2 has it."""
    theirs, _ = trained_oracle(text, n_merges)
    theirs.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab | extra), encoding="utf-8")
    return theirs


def test_gpt2_files_give_gpt2_ids(tmp_path):
    theirs = save_as_gpt2(tmp_path, TEXT + "## ### ##" * 200, 700)
    ours = load_tokenizer(tmp_path)
    for text in [TEXT, "##### #", *NASTY]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.bos_id == ours.eos_id == 956 and ours.vocab_size == 957
    assert ours.decode([ours.eos_id, *ours.encode("so"), ours.eos_id]) == "so"
    assert 956 not in ours.encode("<|endoftext|>")  # text that looks like a special token is text
    ours.save(tmp_path / "own.json")
    again = load_tokenizer(tmp_path / "own.json")
    assert same_behaviour(ours, again) and ours.fingerprint == again.fingerprint
    assert load_tokenizer(tmp_path / "merges.txt").fingerprint == load_tokenizer(tmp_path / "vocab.json").fingerprint


def test_gpt2_files_with_windows_line_ends_and_without_header(tmp_path):
    theirs = save_as_gpt2(tmp_path, TEXT, 100)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0].startswith("#version")
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode("utf-8"))
    assert load_tokenizer(tmp_path).encode(TEXT) == theirs.encode(TEXT).ids


def test_gpt2_files_that_do_not_fit_are_refused(tmp_path):
    save_as_gpt2(tmp_path, TEXT, 50, extra=999)
    with pytest.raises(ValueError, match="does not number tokens as GPT-2 does"):
        load_tokenizer(tmp_path)
    save_as_gpt2(tmp_path, TEXT, 50)
    text = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    for broken in (text.rsplit("\n", 2)[0], text + "q zz\n", text.replace(" ", "", 2), "", text + "three are many\n"):
        (tmp_path / "merges.txt").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="merges.txt is not a tokenizer"):
            load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(OSError, match="vocab.json"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The promise: decode(encode(text)) == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "char"])
def test_round_trip_of_every_text(kind):
    tokenizer = TRAINED[kind]

    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids) and (kind == "bpe" or 0 not in ids)

    for text in [*NASTY, TEXT, *(chr(code) for code in range(0x250))]:
        check(text)
    EXAMPLES(given(TEXTS | st.text(st.characters(exclude_categories=["Cs"])))(check))()


@EXAMPLES
@given(TEXTS)
def test_round_trip_of_characters(text):
    tokenizer = CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("".join(sorted(set(text)))) == list(range(tokenizer.vocab_size - 2))


@pytest.mark.parametrize("kind", KINDS)
def test_small_things_that_hold_for_all_kinds(kind):
    tokenizer = TRAINED[kind]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    ids = tokenizer.encode("so on")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "so on"
    assert tokenizer.bos_id != tokenizer.eos_id and max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size
    for unknown in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(ValueError, match=f"no token {unknown}: ids go from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([*ids, unknown])
    again = pickle.loads(pickle.dumps(tokenizer))  # as `data` does, to tokenize in several processes
    assert same_behaviour(again, tokenizer)
    copy = tokenizer.encode(TEXT)
    copy.clear()  # the caller's list is the caller's
    assert tokenizer.encode(TEXT) != []


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_refused(kind):
    with pytest.raises(ValueError, match="surrogate|ud83d"):
        TRAINED[kind].encode("so \ud83d so")
    with pytest.raises(ValueError, match="surrogate|ud83d"):
        train_tokenizer(kind, ["so ", "\ud83d so"], 500)


def test_half_a_character_is_shown_as_such():
    tokenizer = TRAINED["bpe"]
    assert tokenizer.decode(byte_ids("é")[:1]) == "\ufffd"
    assert tokenizer.decode(byte_ids("é")) == "é"


def test_characters_outside_the_alphabet_are_named():
    tokenizer = CharTokenizer.train(["hello ", "world"])
    assert tokenizer.alphabet == " dehlorw" and (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (8, 9, 10)
    assert tokenizer.encode("hello") == [3, 2, 4, 4, 5]
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) is not in the alphabet"):
        tokenizer.encode("hé")


def test_the_memory_of_words_is_bounded(monkeypatch):
    tokenizer = BPETokenizer(TRAINED["bpe"].merges)
    monkeypatch.setattr(BPETokenizer, "cache_size", 100)
    for number in range(1000):
        tokenizer.encode(f" {number}")
        assert len(tokenizer.cache) <= 100
    for letter in "abcdefgh":
        tokenizer.encode(" so" + letter * 10_000)
        assert sum(map(len, tokenizer.cache)) < 11_000
    assert tokenizer.encode(TEXT) == TRAINED["bpe"].encode(TEXT)


# ----------------------------------------------------------------------------------------------------------------------
# SentencePiece


def train_directly(text: str, kind: str, vocab_size: int, **options) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece as its manual says, from lines of text."""
    model = io.BytesIO()
    lines = component.regex.split(f"[{component.BARRIERS}]", text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_words_and_counts_teach_sentencepiece_what_the_text_does(kind):
    options = {name: value for name, value in component.LOSSLESS.items() if name not in ("input_format", "minloglevel")}
    coverage = 1.0 if kind == "char" else 0.9995
    direct = train_directly(TEXT, kind, 500, hard_vocab_limit=kind == "bpe", character_coverage=coverage, **options)
    ours = TRAINED[f"sp-{kind}"].processor
    pieces = [(ours.id_to_piece(i), ours.get_score(i)) for i in range(ours.vocab_size())]
    assert pieces == [(direct.id_to_piece(i), direct.get_score(i)) for i in range(direct.vocab_size())]


@pytest.mark.parametrize("kind", SP_KINDS)
def test_ids_are_those_of_sentencepiece(kind):
    tokenizer = TRAINED[f"sp-{kind}"]
    for line in TEXT.split("\n")[
        :2000
    ]:  # short ones: over a long text the unigram sums of SentencePiece lose precision
        assert tokenizer.encode(line) == tokenizer.processor.encode(line)
    if kind != "unigram":
        assert tokenizer.encode(TEXT) == tokenizer.processor.encode(TEXT)


@pytest.mark.parametrize("kind", SP_KINDS)
def test_training_repeats_exactly_and_in_silence(kind, capfd):
    first, *others = TEXT.split("\n")
    again = SentencePieceTokenizer.train(iter([first, *("\n" + line for line in others)]), SIZES[f"sp-{kind}"], kind)
    assert again.fingerprint == TRAINED[f"sp-{kind}"].fingerprint
    backwards = SentencePieceTokenizer.train(["\n".join([first, *others][::-1])], SIZES[f"sp-{kind}"], kind)
    assert backwards.fingerprint == again.fingerprint  # words and counts are all that matters
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", SP_KINDS)
def test_what_no_piece_may_hold_goes_through_bytes(kind):
    tokenizer = TRAINED[f"sp-{kind}"]
    assert tokenizer.encode("\n") == [3 + 0x0A] == [13]  # as in LLaMA
    assert tokenizer.encode("\u2581") == [3 + byte for byte in "\u2581".encode()]
    assert tokenizer.encode("so\u2581so") == [
        *tokenizer.encode("so"),
        *tokenizer.encode("\u2581"),
        *tokenizer.encode("so"),
    ]
    # A line with U+2585 is not lost, as it would be when SentencePiece read it.
    pieces = SentencePieceTokenizer.train("q\u2585w e\0r\tt\ry\u2581u " * 50, 268, kind).processor
    assert set("qwertyu") <= {pieces.id_to_piece(i) for i in range(259, pieces.vocab_size())}


@pytest.mark.parametrize("kind", SP_KINDS)
def test_special_tokens_have_no_text(kind):
    tokenizer = TRAINED[f"sp-{kind}"]
    assert tokenizer.decode([0, 1, *tokenizer.encode("so"), 2]) == "so"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_long_lines_are_learned_from():
    text = "x" + "yz" * 4000  # 8001 bytes without a space: longer than what SentencePiece takes by default
    assert SentencePieceTokenizer.train(text, 264).vocab_size == 264


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_sizes_that_do_not_fit(kind):
    with pytest.raises(ValueError, match=r"a vocabulary of 90000 from this text: .* value <= (\d+)") as error:
        SentencePieceTokenizer.train(TEXT, 90_000, kind)
    largest = int(str(error.value).rstrip(".").split()[-1])
    assert SentencePieceTokenizer.train(TEXT, largest, kind).vocab_size == largest
    with pytest.raises(ValueError, match=r"280 vs \d+. Increase vocab_size$"):
        SentencePieceTokenizer.train(TEXT, 280, kind)
    for vocab_size in (5, 0, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"cannot make a vocabulary of {vocab_size} from this text: ."):
            SentencePieceTokenizer.train(TEXT, vocab_size, kind)


def test_models_of_others_keep_their_habits(tmp_path):
    llama = train_directly(TEXT, "bpe", 500, byte_fallback=True, normalization_rule_name="identity")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(llama.serialized_model_proto())
    ours = load_tokenizer(tmp_path)
    for text in ["so on", " so", "a\u2581b", "so  on\n", "", *TEXT.split("\n")[:50]]:
        assert ours.encode(text) == llama.encode(text)
    assert llama.id_to_piece(ours.encode("so")[0]).startswith("▁")  # the space that it puts in front
    assert ours.decode(ours.encode("so on")) == "so on" and ours.decode(ours.encode("a\u2581b")) == "a b"
    path.write_bytes(train_directly(TEXT, "bpe", 500, bos_id=-1).serialized_model_proto())
    with pytest.raises(ValueError, match="no bos or no eos"):
        load_tokenizer(path)


# ----------------------------------------------------------------------------------------------------------------------
# Reading text


@EXAMPLES
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalize_is_idempotent(text):
    once = normalize(text)
    assert normalize(once) == once and "\r" not in once and unicodedata.is_normalized("NFC", once)


def test_normalize_does_what_it_says_and_no_more():
    assert normalize("\ufeffa\r\nb\rc\n\r\n") == "a\nb\nc\n\n"
    assert normalize("\ufeff\ufeff\r") == "\n" and normalize("a\ufeff") == "a\ufeff"
    assert normalize("e\u0301") == "é" and normalize("½ ﬁ … ™  \t x²") == "½ ﬁ … ™  \t x²"


@pytest.mark.parametrize("size", [30, 100, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_by_chunk_gives_the_ids_of_the_whole(kind, size, tmp_path):
    text = TEXT[:30_000] + "\n \n\u2581 \r\n \r\n\nx\r\n\ny 's 'sound  \u00a0 z\x1c\n\x1c \x85\n"
    (tmp_path / "text").write_bytes(text.encode("utf-8"))
    tokenizer = train_tokenizer("char", text, 0) if kind == "char" else TRAINED[kind]
    chunks = list(read_chunks(tmp_path / "text", size))
    assert "".join(chunks) == text and len(chunks) > len(text) / size / 2
    assert all(component.regex.fullmatch(r"\S[ \r\n]", one[-1] + next[0]) for one, next in zip(chunks, chunks[1:]))
    assert [i for chunk in chunks for i in tokenizer.encode(chunk)] == tokenizer.encode(text)


def test_long_texts_are_encoded_as_their_words():
    # SentencePiece itself fails this: far into a text its unigram sums, in 32 bits, cannot tell close choices apart.
    rng = random.Random(1)
    words = [" " + "".join(rng.choices("abcd", k=rng.randint(2, 7))) for _ in range(20_000)]
    for kind in SP_KINDS:
        tokenizer = SentencePieceTokenizer.train("".join(words), 280, kind)
        assert tokenizer.encode("".join(words)) == [i for word in words for i in tokenizer.encode(word)]


def test_chunks_are_bounded_and_lines_end_as_they_did(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"one\r\ntwo\r\rthree\n" * 1000)
    assert "".join(read_chunks(path, 64)).encode() == path.read_bytes()
    path.write_bytes(b"x" * 1000 + b" yy" * 100)
    chunks = list(read_chunks(path, 64))
    assert "".join(chunks).encode() == path.read_bytes() and max(map(len, chunks)) <= 128
    path.write_bytes(b"")
    assert list(read_chunks(path)) == []
    path.write_bytes("\ufeffso 😀".encode())
    assert list(read_chunks(path, 3)) == ["\ufeffso", " 😀"]


@pytest.mark.parametrize("size", [5, 1000, 1 << 22])
@pytest.mark.parametrize("offset", [0, 1, 4097, 8191, 70_000, 100_001])
def test_bytes_that_are_not_utf8_are_located(size, offset, tmp_path):
    path = tmp_path / "latin1.txt"
    good = ("é 日本 " * 20_000).encode("utf-8")
    while offset and (good[offset] & 0xC0) == 0x80:  # not inside a character
        offset += 1
    path.write_bytes(good[:offset] + b"\xe9 " + good[offset:])
    with pytest.raises(ValueError, match=rf"latin1.txt is not UTF-8 text: .* at byte {offset}; convert it to UTF-8"):
        list(read_chunks(path, size))


def test_truncated_and_binary_files_are_refused(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("so é".encode()[:-1])
    with pytest.raises(ValueError, match="at byte 3"):
        list(read_chunks(path))
    for binary in ("so".encode("utf-16"), b"x" * 8191 + b"\0"):
        path.write_bytes(binary)
        with pytest.raises(ValueError, match="text is not a text file, it has NUL bytes"):
            list(read_chunks(path))
    path.write_bytes(b"x" * 8192 + b"\0")  # later on it is a character like any other
    assert len("".join(read_chunks(path))) == 8193
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OSError, match=str(missing)):
            list(read_chunks(missing))


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_change_nothing(kind, tmp_path):
    tokenizer = TRAINED[kind]
    path = tmp_path / tokenizer.file_name
    tokenizer.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [tokenizer.file_name]
    for again in (load_tokenizer(path), load_tokenizer(tmp_path), type(tokenizer).load(str(path))):
        assert type(again) is type(tokenizer) and same_behaviour(again, tokenizer)
        assert again.fingerprint == tokenizer.fingerprint and again.to_bytes() == path.read_bytes()
    os.rename(path, tmp_path / "other name")
    assert load_tokenizer(tmp_path / "other name").fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_tokenizers_apart():
    prints = {tokenizer.fingerprint for tokenizer in TRAINED.values()} | {BPETokenizer.train(TEXT, 499).fingerprint}
    assert len(prints) == 6 and all(len(bytes.fromhex(one)) == 32 for one in prints)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    TRAINED["bpe"].save(path)
    before = path.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        TRAINED["char"].save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_saving_replaces_the_file_as_a_whole(tmp_path):
    TRAINED["bpe"].save(tmp_path / "tokenizer.json")
    os.link(tmp_path / "tokenizer.json", tmp_path / "opened")  # who has the old file open goes on reading the old one
    TRAINED["char"].save(tmp_path / "tokenizer.json")
    assert (tmp_path / "opened").read_bytes() == TRAINED["bpe"].to_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == TRAINED["char"].to_bytes()


def test_the_file_is_plain_json(tmp_path):
    BPETokenizer.train("aaabdaaabac", 260).save(tmp_path / "tokenizer.json")
    fields = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert fields == {"format": "nanogptx-bpe", "specials": ["<|bos|>", "<|eos|>"], "merges": [[64, 64], [64, 65]]}
    CharTokenizer("één").save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == '{"format":"nanogptx-char","alphabet":"né"}\n'.encode()


def other_json(**fields) -> bytes:
    return component.to_json(**{"format": "nanogptx-bpe", "specials": ["<|bos|>", "<|eos|>"], "merges": [], **fields})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"{",
        b'{"a":' * 100_000,
        b"\xff\xfe{",
        bytes(range(256)),
        pickle.dumps({"format": "nanogptx-bpe"}),
        b'{"format": ["nanogptx-bpe"]}',
        b'{"format": "nanogptx-bpe"}',
        b'{"format": "nanogptx-bpe", "merges": []}',
        other_json(format="nanogptx-sp"),
        other_json(merges=[[0, 256]]),
        other_json(merges=[[-1, 0]]),
        other_json(merges=[[0, 1.0]]),
        other_json(merges=[[0, True]]),
        other_json(merges=[[0, "1"]]),
        other_json(merges=[[0, 1, 2]]),
        other_json(merges=[0]),
        other_json(merges=None),
        other_json(merges={"a": 1}),
        other_json(merges=[[0, 1], [0, 1]]),
        other_json(merges=[[255 + k, 255 + k] for k in range(200)]),
        other_json(specials=[]),
        other_json(specials=["a", "b", "c"]),
        other_json(specials="ab"),
        other_json(specials=[1, 2]),
        other_json(more=1),
        other_json()[:-1] + b" ",
        component.to_json(format="nanogptx-char", alphabet="ba"),
        component.to_json(format="nanogptx-char", alphabet="aa"),
        component.to_json(format="nanogptx-char", alphabet=["a", "b"]),
        b'{"format":"nanogptx-char","alphabet":"\\ud800"}\n',
    ],
)
def test_other_files_are_refused_with_their_name(data, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path} is not a tokenizer: .") as error:
            load_tokenizer(path)
        assert len(str(error.value)) < 400


def test_a_valid_file_is_not_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(other_json(merges=[[0, 1], [256, 256]]))
    assert load_tokenizer(tmp_path).encode('!"!"') == [257]


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind, tmp_path):
    data = TRAINED[kind].to_bytes()
    for length in random.Random(0).sample(range(len(data)), 40):
        path = tmp_path / "tokenizer"
        path.write_bytes(data[:length])
        try:
            short = load_tokenizer(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a tokenizer")
        else:  # a SentencePiece model is a list of pieces, so a shorter one may be whole
            assert kind.startswith("sp-") and short.vocab_size <= TRAINED[kind].vocab_size


def test_hugging_face_files_are_recognised(tmp_path):
    THEIRS.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer: this is Hugging Face's format"):
        load_tokenizer(tmp_path)
    TRAINED["sp-bpe"].save(tmp_path / "tokenizer.model")  # as LLaMA's folder has both
    assert load_tokenizer(tmp_path).fingerprint == TRAINED["sp-bpe"].fingerprint


def test_loading_as_the_wrong_class_is_refused(tmp_path):
    TRAINED["char"].save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="holds a CharTokenizer, expected a BPETokenizer"):
        BPETokenizer.load(tmp_path / "tokenizer.json")
    assert isinstance(Tokenizer.load(tmp_path / "tokenizer.json"), CharTokenizer)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.json", tmp_path / "nowhere.model"):
        with pytest.raises(OSError, match=str(path)):
            load_tokenizer(path)


class Trap:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "marker"
    trap = pickle.dumps(Trap(marker))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.pkl", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(trap)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.pkl", "vocab.json", "merges.txt", ""):
        with pytest.raises(ValueError, match="is not a tokenizer"):
            load_tokenizer(tmp_path / name)
    assert not marker.exists()
    pickle.loads(trap)
    assert marker.exists()  # the trap is a real one


def test_unknown_kinds_get_the_nearest_names():
    with pytest.raises(ValueError, match="unknown tokenizer 'sp-unigramm': did you mean sp-unigram"):
        train_tokenizer("sp-unigramm", TEXT, 500)
    with pytest.raises(ValueError, match="word"):
        SentencePieceTokenizer.train(TEXT, 500, "nonsense word")
    for kind, tokenizer in TRAINED.items():
        assert tokenizer.vocab_size == SIZES[kind] or "char" in kind
    assert TRAINED["char"].vocab_size == len(set(TEXT)) + 2
    # Not the barriers, nor what stands only in "<s>" and "<0x0A>": SentencePiece leaves names of its pieces out.
    assert TRAINED["sp-char"].vocab_size == 259 + len(set(TEXT) - set("\n\r\t<0x0A>")) < SIZES["sp-char"]


# ----------------------------------------------------------------------------------------------------------------------
# The program


def program(*words, stdin: bytes = b"", **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(ROOT / "nanogptx" / "tokenizer.py"), *map(os.fsdecode, words)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, cwd="/")


def test_the_program_trains_encodes_and_decodes(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "new folder" / "tokenizer.json"
    text.write_bytes(("\ufeff" + TEXT).encode("utf-8"))
    done = program("train", text, "--vocab-size", "400", "--out", out, LC_ALL="C")
    assert (
        done.returncode == 0
        and done.stderr == b""
        and b": 400 ids, " in done.stdout
        and b"bytes per token" in done.stdout
    )
    ours = load_tokenizer(out)
    assert ours.merges == BPETokenizer.train("\ufeff" + TEXT, 400).merges
    message = "so\r\n é 😀\u2581\0 "
    ids = program("encode", out, stdin=message.encode(), LC_ALL="C", PYTHONIOENCODING="latin-1").stdout.split()
    assert [int(i) for i in ids] == ours.encode(message)
    done = program("decode", out, *map(bytes.decode, ids), LC_ALL="C")
    assert done.stdout == message.encode() and done.returncode == 0
    assert program("encode", out, "so", "é", LC_ALL="C").stdout.split() == [b"%d" % i for i in ours.encode("so é")]


def test_the_program_normalizes_only_when_asked(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffe\u0301\r\n".encode())
    for option, alphabet in (("--no-normalize", "\n\re\u0301\ufeff"), ("--normalize", "\né")):
        program("train", tmp_path / "text.txt", "--out", tmp_path / "t", "--kind", "char", option)
        assert load_tokenizer(tmp_path / "t").alphabet == alphabet


def test_the_program_tells_mistakes_in_one_line(tmp_path):
    names = {"empty": b"", "latin1": b"caf\xe9 au lait", "binary": b"\x7fELF\0\0", "short": b"so it is"}
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    TRAINED["char"].save(tmp_path / "char.json")
    train = ("train", tmp_path / "short", "--out", tmp_path / "out")
    mistakes = [
        (("train", tmp_path / "nowhere", "--out", tmp_path / "out"), "nowhere"),
        (("train", tmp_path, "--out", tmp_path / "out"), "directory"),
        (("train", tmp_path / "empty", "--out", tmp_path / "out"), "the text is empty"),
        (("train", tmp_path / "latin1", "--out", tmp_path / "out"), "latin1 is not UTF-8 text: .* at byte 3;"),
        (("train", tmp_path / "binary", "--out", tmp_path / "out"), "binary is not a text file"),
        (("train", tmp_path / "short", "--out", tmp_path), "is a folder"),
        (("train", tmp_path / "short", "--out", tmp_path / "empty" / "out"), "empty"),
        ((*train, "--vocab-size", "300"), "at most 262"),
        ((*train, "--kind", "bep"), "did you mean bpe"),
        ((*train, "--kind", "sp-bpe"), "value <= "),
        (("encode", tmp_path / "nowhere", "so"), "nowhere"),
        (("encode", tmp_path / "short", "so"), "short is not a tokenizer"),
        (("encode", tmp_path / "char.json", "Ω"), r"U\+03A9"),
        (("encode", tmp_path / "char.json", b"\xff"), "surrogate|udcff"),
        (("encode", tmp_path / "char.json"), "can't decode byte 0xff in position 2"),
        (("decode", tmp_path / "char.json", "12345"), "no token 12345"),
    ]
    for words, expected in mistakes:
        done = program(*words, stdin=b"so\xff")
        assert done.returncode == 2, (words, done)
        assert done.stdout == b"" and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, (
            words,
            done,
        )
        assert component.regex.search(expected, done.stderr.decode()), (words, done)
    assert not (tmp_path / "out").exists() and (tmp_path / "empty").read_bytes() == b""
    unknown = program("train", tmp_path / "short", "--out", tmp_path / "out", "--vocab-sise", "300")
    assert unknown.returncode == 2 and b"--vocab-size" in unknown.stderr and b"Traceback" not in unknown.stderr


def test_import_is_light_and_silent():
    code = "import sys, nanogptx.tokenizer; print({'torch', 'numpy', 'transformers'} & set(sys.modules) or 'light')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.stdout, done.stderr) == (b"light\n", b"")


@pytest.mark.parametrize("kind", ["sp-bpe", "sp-unigram", "sp-char"])
def test_a_space_survives_where_there_was_none_to_learn_from(kind):
    """SentencePiece writes a space as U+2581; without a piece of its own it would come back as that."""
    text = "".join(chr(0x4E00 + n % 30) + "\n" * (n % 7 == 0) for n in range(2000))
    tokenizer = train_tokenizer(kind, text, 300)
    for said in ("a b", " ", "\u2581", "  x \u2581 y  ", chr(0x4E00) + " " + chr(0x4E01)):
        assert tokenizer.decode(tokenizer.encode(said)) == said
