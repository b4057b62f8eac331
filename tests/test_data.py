"""data.py: downloads against a server on this machine, sources, prepared folders, and the sampler."""

import hashlib
import http.server
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanogptx import data, tales
from nanogptx.tokenizer import BPETokenizer, CharTokenizer, SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(f"Line {n}: the quick brown fox, and 🦊 über {n * n} lazy dogs.\n\n" for n in range(60))


@pytest.fixture
def small(monkeypatch):
    """Everything in small pieces, so that a short text has many of them, many batches and many shards."""
    monkeypatch.setattr(data, "BATCH", 50)
    monkeypatch.setattr(data, "SHARD", 150)


class Codes:
    """The simplest tokenizer: code points, and bos and eos above them (or one id for both)."""

    def __init__(self, eos_id=301, vocab_size=1000, fingerprint="codes"):
        self.bos_id, self.eos_id, self.vocab_size, self.fingerprint = 300, eos_id, vocab_size, fingerprint

    def encode(self, text):
        return [ord(c) % 256 for c in text]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def stream(split):
    return split.take(np.arange(split.n_tokens)).tolist()


# ---- the sampler ----


def split_of(*lengths, shared=0, shard=7):
    """A split of documents of so many ids (bos and eos counted) whose ids are their own places: id 5 stands at 5."""
    split = data.Split.__new__(data.Split)
    split.begins = np.cumsum([0, *(n - shared for n in lengths)])
    split.n_documents, split.n_tokens, split.shared = len(lengths), int(split.begins[-1]) + shared, shared
    split.shards = np.split(np.arange(split.n_tokens, dtype="<u2"), range(shard, split.n_tokens, shard))
    split.starts = np.cumsum([0, *map(len, split.shards)])
    split.longest = max(lengths)
    return split


def test_every_epoch_has_every_sample_once_whatever_the_batch_size():
    for n, batch_size in (10, 3), (10, 10), (7, 20), (1, 4), (23, 1):
        rows = [data.sample_ids(n, 5, step, batch_size) for step in range(5 * n // batch_size + 1)]
        epochs, ids = np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])
        assert (np.diff(epochs) >= 0).all() and epochs.tolist() == (np.arange(len(epochs)) // n).tolist()
        for epoch in range(5 * n // batch_size * batch_size // n):
            assert Counter(ids[epochs == epoch].tolist()) == Counter(range(n))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    split = split_of(9, 30, 14, 2, 77)
    in_turn = [data.window_batch(split, 3, step, 4, 8) for step in range(40)]
    documents = [data.document_batch(split, 3, step, 2, 64) for step in range(40)]
    random.seed(0), np.random.seed(0)
    for step in 39, 0, 17, 16, 38:  # alone, backwards, and with other things drawn in between
        data.order.cache_clear()
        np.random.rand(3)
        for now, then in zip(data.window_batch(split, 3, step, 4, 8), in_turn[step]):
            np.testing.assert_array_equal(now, then)
        for now, then in zip(data.document_batch(split, 3, step, 2, 64), documents[step]):
            np.testing.assert_array_equal(now, then)


def test_seeds_and_epochs_differ():
    orders = [tuple(data.order(50, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    split = split_of(200)
    first_of = [data.window_batch(split, seed, 0, 2, 16)[0].tolist() for seed in range(4)]
    assert len({str(x) for x in first_of}) == 4


def test_no_global_generator_is_touched():
    random.seed(1), np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    split = split_of(40, 50)
    data.window_batch(split, 0, 3, 4, 8), data.document_batch(split, 0, 3, 4, 8), list(data.eval_windows(split, 8, 4))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_evaluating_does_not_change_the_training_batches():
    split, other = split_of(40, 50, 31), split_of(20, 33)

    def log(every):
        digests = []
        for step in range(60):
            digests.append(b"".join(a.tobytes() for a in data.window_batch(split, 0, step, 4, 8)))
            if every and step % every == 0:
                list(data.eval_windows(other, 8, 3)), list(data.eval_documents(split, 2))
        return digests

    assert log(0) == log(10) == log(50)
    assert len(set(log(0))) == 60


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("extra", [-1, 0, 1, 34])
def test_every_token_but_the_first_is_a_target_once_an_epoch(block_size, extra):
    n_tokens = max(2, block_size + 1 + extra)  # so that block_size + extra targets fill no, one or several windows
    split = split_of(n_tokens)
    n = data.n_windows(split, block_size)
    cuts = set()
    for epoch in range(8):
        batches = [data.window_batch(split, 5, step, 1, block_size) for step in range(epoch * n, (epoch + 1) * n)]
        x, y = (np.concatenate(part) for part in zip(*batches))
        assert x.shape == y.shape == (n, block_size) and x.dtype == y.dtype == np.int64
        used = y != data.IGNORE
        assert sorted(y[used].tolist()) == list(range(1, n_tokens))
        np.testing.assert_array_equal(y[used], x[used] + 1)  # the target is the next id; ids are places here
        assert used.any(axis=1).all() and (y[~used] == -100).all()
        assert x.min() >= 0 and x.max() < n_tokens
        # what is seen before a target is what stands before it, back to the window's start or the stream's
        assert ((np.diff(x, axis=1) == 1) | (x[:, 1:] == 0)).all()
        for world in 2, 3:  # and ranks that share out the rows of a batch see it all too
            assert sum(len(y[rank::world][y[rank::world] != -100]) for rank in range(world)) == n_tokens - 1
        cuts.add(tuple(sorted(y[:, 0].tolist())))
    assert len(cuts) > 2 or block_size == 1 or n == 1  # the cuts lie elsewhere in another epoch


def test_windows_by_hand():
    split = split_of(6, 2)  # ids 0 to 7, so 7 targets; windows of 3 from the third target on: 3 4 5, 6 7 1, 2 . .
    x, y = data.windows(split, 2, np.array([0, 1, 2]), 3)
    assert x.tolist() == [[2, 3, 4], [5, 6, 0], [1, 2, 3]]
    assert y.tolist() == [[3, 4, 5], [6, 7, 1], [2, -100, -100]]
    np.testing.assert_array_equal(data.windows(split, np.array([2, 2]), np.array([1, 2]), 3)[0], x[1:])


def test_evaluation_windows_come_in_order_and_once():
    split = split_of(30, 12)
    batches = list(data.eval_windows(split, 8, 2))
    assert [len(x) for x, _ in batches] == [2, 2, 2]
    y = np.concatenate([y for _, y in batches]).ravel()
    assert y[y != -100].tolist() == list(range(1, 42))
    assert batches[0][0][0].tolist() == list(range(8))
    limited = list(data.eval_windows(split, 8, 2, limit=3))
    assert sum(len(x) for x, _ in limited) == 3
    np.testing.assert_array_equal(limited[0][1], batches[0][1])


@pytest.mark.parametrize("shared", [0, 1])
def test_documents_from_their_beginning(shared):
    split = split_of(5, 3, 20, shared=shared)
    begins = split.begins
    x, y = data.documents(split, np.array([1, 0]))
    assert x.shape == y.shape == (2, 16)
    a = int(begins[1])
    assert x[0].tolist() == [a, a + 1] + [0] * 14 and y[0].tolist() == [a + 1, a + 2] + [-100] * 14
    assert x[1].tolist() == [0, 1, 2, 3] + [0] * 12 and y[1].tolist() == [1, 2, 3, 4] + [-100] * 12
    assert data.documents(split, np.array([2]))[0].shape == (1, 32)  # 19 targets, rounded up to a multiple of 16
    cut = data.documents(split, np.array([2, 0]), block_size=10)
    assert cut[0].shape == (2, 10) and cut[1][0].tolist() == list(range(int(begins[2]) + 1, int(begins[2]) + 11))
    assert data.documents(split, np.array([2]), block_size=19)[1][0, -1] == split.n_tokens - 1


def test_document_batches_and_evaluation_have_every_document_once():
    split = split_of(5, 3, 20, 7, 7, 18, 2)
    firsts = np.concatenate([data.document_batch(split, 0, step, 3, 64)[0][:, 0] for step in range(7)])  # three epochs
    for epoch in range(3):
        assert sorted(firsts[7 * epoch : 7 * epoch + 7].tolist()) == split.begins[:-1].tolist()
    targets = np.concatenate([y[y != -100] for _, y in data.eval_documents(split, 3)])
    assert sorted(targets.tolist()) == sorted(set(range(split.n_tokens)) - set(split.begins[:-1].tolist()))
    firsts = [x[:, 0].tolist() for x, _ in data.eval_documents(split, 2, limit=4)]
    assert sorted(sum(firsts, [])) == split.begins[:4].tolist()
    unlike = split_of(3, 60, 3, 60)  # similar lengths come together, whatever their order
    assert [x.shape for x, _ in data.eval_documents(unlike, 2)] == [(2, 16), (2, 64)]
    assert max(x.shape[1] for x, _ in data.eval_documents(split, 2, block_size=10)) == 10


# ---- sources ----


def test_documents_between_separators_wherever_the_chunks_end():
    text = "<|endoftext|>\n One two \n<|endoftext|>  <|endoftext|>three\n\nfour<|endoftext|>\nfive\n"
    for size in range(1, 30):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(data.between(chunks, "<|endoftext|>")) == ["One two", "three\n\nfour", "five"]


def test_part_of_a_stream():
    for size in 1, 3, 4, 100:
        chunks = ["abcdefghij"[i : i + size] for i in range(0, 10, size)]
        assert ["".join(data.part_of(chunks, *ends)) for ends in ((0, 4), (4, 10), (3, 3), (0, 10))] == [
            *("abcd", "efghij", "", "abcdefghij")
        ]
        assert "" not in list(data.part_of(chunks, 2, 5))


def test_held_out_files_keep_their_side_when_others_come():
    names = [f"chapter {n}.txt" for n in range(300)]
    held = data.held_out(names)
    assert 12 <= len(held) <= 60
    for n in 50, 100, 200:  # many enough for the rule to need no exception
        assert data.held_out(names[:n]) == held & set(names[:n])
    for n in range(2, 30):
        assert 0 < len(data.held_out(names[:n])) < n
        # a file never goes from training to validation... unless no file of its own merit was there
        assert data.held_out(names[:n]) & set(names[: n - 1]) <= data.held_out(names[: n - 1]) or n == 2
    assert data.held_out(sorted(held)[:3]) < set(sorted(held)[:3])  # all of them low: the highest trains
    # the rule itself, so that no later version moves files about
    assert data.held_out(["a", "b", "c", "d"]) == {min("abcd", key=lambda c: hashlib.sha256(c.encode()).digest())}


def test_folder(tmp_path, small):
    folder = tmp_path / "my texts"
    files = {f"part {n}/chapter.{('txt', 'md', 'TXT')[n % 3]}": f"Chapter {n}. " * (n + 9) for n in range(12)}
    for name, text in files.items():
        write(folder / name, text)
    for name in ".hidden.txt", ".git/x.txt", "picture.png", "empty.txt", "notes.json":
        write(folder / name, "" if name == "empty.txt" else "must not be read")
    source = data.source(folder)
    held = data.held_out(files)
    for split, names in ("train", sorted(files.keys() - held)), ("validation", sorted(held)):
        assert ["".join(pieces) for pieces in source.documents(split)] == [files[name] for name in names]
    assert source.size == sum(map(len, files.values())) and source.name == "my texts"
    data.source(folder)
    before = source.sha256
    assert data.source(str(folder)).sha256 == before
    (folder / "part 0/chapter.txt").rename(folder / "part 0/renamed.txt")
    renamed = data.source(folder).sha256
    write(folder / "part 1/chapter.md", "changed")
    assert len({before, renamed, data.source(folder).sha256}) == 3
    with pytest.raises(ValueError, match=r"no text in the folder .*empty"):
        data.source(write(tmp_path / "empty" / "a.txt", "").parent)


def test_folder_with_one_file_is_split_as_a_file(tmp_path):
    path = write(tmp_path / "one" / "deep" / "only.txt", TEXT)
    cut = int(0.9 * len(TEXT))
    for spec in path, tmp_path / "one":
        assert ["".join(d) for d in data.source(spec).documents("train")] == [TEXT[:cut]]
        assert ["".join(d) for d in data.source(spec).documents("validation")] == [TEXT[cut:]]


def test_file_is_cut_by_characters(tmp_path, small):
    for text in TEXT, "é" * 101, "no place to cut" * 40, "\n\n a \r\n b", "ab":
        path = write(tmp_path / "x.txt", text)
        cut = int(0.9 * len(text))
        assert "".join(data.texts(path)) == text[:cut] and "".join(data.texts(path, "validation")) == text[cut:]


def test_tales_are_documents(monkeypatch):
    data.tales_source.cache_clear()
    monkeypatch.setattr(data, "tales_corpus", lambda style: tales.corpus(style, size=20_000))
    train, validation = tales.corpus("letters", size=20_000)
    source = data.source("tales-letters")
    assert [list(d) for d in source.documents("train")] == [[story] for story in train]
    assert [list(d) for d in source.documents("validation")] == [[story] for story in validation]
    assert {c.style for c in data.CORPORA.values()} - {""} == set(tales.STYLES)
    assert data.source("tales").sha256 != source.sha256 == data.source("tales-letters").sha256
    data.tales_source.cache_clear()


def test_what_is_neither_name_nor_path(tmp_path):
    with pytest.raises(ValueError, match="did you mean shakespeare.*no file or folder"):
        data.source("shakespear")
    with pytest.raises(ValueError, match="no file or folder .*nowhere.txt"):
        data.source(tmp_path / "nowhere.txt")
    for name, contents in ("binary.txt", b"PK\0\1\2"), ("latin.txt", "caf\xe9".encode("latin-1")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=name):
            data.prepare(tmp_path / name, Codes(), root=tmp_path / "data")


# ---- preparing ----


@pytest.mark.parametrize("eos_id", [301, 300])
def test_layout_on_disk(tmp_path, small, eos_id):
    texts = {f"{n}.txt": f"document {n} " * (n + 1) for n in range(30)}
    for name, text in texts.items():
        write(tmp_path / "docs" / name, text)
    tokenizer = Codes(eos_id)
    made = data.prepare(tmp_path / "docs", tokenizer, root=tmp_path / "data")
    held = data.held_out(texts)
    for split, names in (made.train, sorted(texts.keys() - held)), (made.validation, sorted(held)):
        whole = [[300, *tokenizer.encode(texts[name]), eos_id] for name in names]
        assert [split.document(n).tolist() for n in range(split.n_documents)] == whole
        joined = sum((ids[: len(ids) - (eos_id == 300)] for ids in whole), []) + [300] * (eos_id == 300)
        assert stream(split) == joined and split.n_tokens == len(joined)
        assert split.n_documents == len(names) and split.longest == max(map(len, whole))
        assert split.chars == split.bytes == sum(len(texts[name]) for name in names)
        assert split.document(0).dtype == np.int64
    assert len(made.train.shards) > 3
    x, y = data.document_batch(made.train, 0, 0, 30, 512)
    assert (x[:, 0] == 300).all() and (np.where(y == -100, -1, y).max(axis=1) >= 300).all()


@pytest.mark.parametrize(
    "train",
    [
        lambda: CharTokenizer.train(TEXT),
        lambda: BPETokenizer.train(TEXT, 300),
        lambda: BPETokenizer(BPETokenizer.train(TEXT, 290).merges, ["<|endoftext|>"]),
        lambda: SentencePieceTokenizer.train(TEXT, 330),
    ],
)
def test_pieces_and_processes_change_nothing(tmp_path, small, train):
    """Many small pieces, in many shards, give the ids of the whole text."""
    tokenizer, path = train(), write(tmp_path / "text.txt", TEXT)
    made = data.prepare(path, tokenizer, root=tmp_path / "data")
    cut = int(0.9 * len(TEXT))
    for split, text in (made.train, TEXT[:cut]), (made.validation, TEXT[cut:]):
        assert stream(split) == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert (split.chars, split.bytes, split.n_documents) == (len(text), len(text.encode()), 1)
    assert len(made.train.shards) > 5


def test_any_number_of_workers_writes_the_same_files(tmp_path, small):
    path, tokenizer = write(tmp_path / "text.txt", TEXT), BPETokenizer.train(TEXT, 300)
    made = [data.prepare(path, tokenizer, root=tmp_path / str(workers), workers=workers) for workers in (1, 2, 3)]
    assert made[0].manifest == made[1].manifest == made[2].manifest and len(made[0].manifest["files"]) > 8
    with pytest.raises(ValueError, match="alphabet"):  # what goes wrong in a worker is told as if there were none
        data.prepare(path, CharTokenizer("abc"), root=tmp_path / "bad", workers=2)
    assert list((tmp_path / "bad").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_few_jobs_are_held_at_a_time(workers):
    taken = []
    results = data.in_order(abs, (taken.append(n) or -n for n in range(50)), workers)
    for n, result in enumerate(results):
        assert result == n and len(taken) <= n + 1 + workers


def test_manifest(tmp_path):
    path = write(tmp_path / "text.txt", TEXT)
    made = data.prepare(path, Codes(), root=tmp_path / "data")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["text"] == hashlib.sha256(TEXT.encode()).hexdigest() and manifest["tokenizer"] == "codes"
    assert manifest["held_out"] and manifest["train"]["tokens"] == made.train.n_tokens
    assert manifest["fingerprint"] == made.fingerprint and made.folder.name.startswith("text-")
    for name, sha256 in manifest["files"].items():
        assert hashlib.sha256((made.folder / name).read_bytes()).hexdigest() == sha256
    assert sorted(manifest["files"]) == ["train-0000.bin", "train.npy", "validation-0000.bin", "validation.npy"]
    ids = np.fromfile(made.folder / "train-0000.bin", manifest["train"]["dtype"])
    assert ids.dtype == np.dtype("<u2") and ids.tolist() == stream(made.train)


def test_made_again_only_when_something_changed(tmp_path, monkeypatch):
    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    made = data.prepare(path, Codes(), root=root)
    calls, write_split = [], data.write_split
    monkeypatch.setattr(data, "write_split", lambda *args: calls.append(1) or write_split(*args))
    assert data.prepare(path, Codes(), root=root).folder == made.folder and not calls

    other = data.prepare(path, Codes(eos_id=300, fingerprint="other"), root=root)  # another tokenizer
    assert other.folder != made.folder and other.fingerprint != made.fingerprint and len(calls) == 2
    write(path, TEXT + 10 * "!")  # another text
    changed = data.prepare(path, Codes(), root=root)
    assert changed.folder not in (made.folder, other.folder) and changed.validation.chars == made.validation.chars + 1
    write(path, TEXT)  # the old one again: its folder is still there
    assert data.prepare(path, Codes(), root=root).fingerprint == made.fingerprint and len(calls) == 4
    moved = path.rename(tmp_path / "moved.txt")  # the same text under another name is the same text
    assert data.prepare(moved, Codes(), root=root).fingerprint == made.fingerprint


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "train-0000.bin").unlink(),
        lambda folder: os.truncate(folder / "train-0000.bin", 200),
        lambda folder: flip(folder / "validation-0000.bin"),
        lambda folder: (folder / "train.npy").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": {'),
        lambda folder: (folder / "manifest.json").write_text("{}"),
    ],
)
def test_a_damaged_folder_is_made_again(tmp_path, harm):
    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    made = data.prepare(path, Codes(), root=root)
    expected = made.manifest, stream(made.train)
    harm(made.folder)
    again = data.prepare(path, Codes(), root=root)
    assert (again.manifest, stream(again.train)) == expected and again.folder == made.folder
    assert [p.name for p in root.iterdir()] == [made.folder.name]


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    made = data.prepare(path, Codes(), root=root)
    index = made.folder / "train.npy"
    np.save(index, np.array([Trap()], dtype=object), allow_pickle=True)
    for contents in index.read_bytes(), pickle.dumps(Trap()):
        index.write_bytes(contents)
        made.manifest["files"][index.name] = data.file_sha256(index)
        (made.folder / "manifest.json").write_text(json.dumps(made.manifest))
        with pytest.raises(ValueError):
            data.prepare(path, Codes(), root=root)
        assert not (tmp_path / "executed").exists()


def test_what_is_interrupted_leaves_nothing(tmp_path, small):
    calls = []

    class Fails(Codes):
        def encode(self, text):
            calls.append(1)
            if len(calls) == 40:
                raise KeyboardInterrupt
            return super().encode(text)

    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        data.prepare(path, Fails(), root=root)
    assert list(root.iterdir()) == []
    assert stream(data.prepare(path, Codes(), root=root).train)[0] == 300


SLOW = """
    import sys, time
    from nanogptx import data
    data.BATCH = data.SHARD = 100

    class Slow:
        bos_id, eos_id, vocab_size, fingerprint = 300, 301, 1000, "slow"
        def encode(self, text):
            time.sleep(float(sys.argv[3]))
            return [ord(c) % 256 for c in text]

    print("ready", flush=True)
    made = data.prepare(sys.argv[1], Slow(), root=sys.argv[2])
    print(made.fingerprint, made.train.n_tokens)
"""


def slow(path, root, seconds):
    args = [sys.executable, "-c", textwrap.dedent(SLOW), path, root, seconds]
    return subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_killed_while_preparing(tmp_path):
    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    process = slow(path, root, 0.05)
    assert process.stdout.readline() == "ready\n"
    while not list(root.glob(".making-*/new/train-000[3-9]*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert all(p.name.startswith(".making-") for p in root.iterdir())  # never under a name that is looked for
    process = slow(path, root, 0)
    assert process.communicate()[0].split()[2] == str(int(0.9 * len(TEXT)) + 2) and process.returncode == 0


def test_several_processes_at_once(tmp_path):
    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    processes = [slow(path, root, 0.002) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and len(set(said)) == 1
    assert len(list(root.iterdir())) == 1


def test_another_process_is_faster(tmp_path, monkeypatch):
    path, root = write(tmp_path / "text.txt", TEXT), tmp_path / "data"
    write_split, times = data.write_split, []

    def overtaken(*args):
        facts = write_split(*args)
        monkeypatch.setattr(data, "write_split", write_split)
        times.append(data.prepare(path, Codes(), root=root).folder.stat().st_ctime_ns)
        return facts

    monkeypatch.setattr(data, "write_split", overtaken)
    made = data.prepare(path, Codes(), root=root)
    assert made.folder.stat().st_ctime_ns == times[0] and [p.name for p in root.iterdir()] == [made.folder.name]


def test_the_type_on_disk_holds_every_id(tmp_path):
    assert data.pack([0, 65535], 65536).dtype == np.dtype("<u2")
    assert data.pack([0, 65535], 65536).tolist() == [0, 65535]
    assert data.pack([65536], 65537).dtype == np.dtype("<u4") and data.pack([65536], 65537).tolist() == [65536]
    for ids, vocab_size in ([65536], 65536), ([1, -1], 100), ([100], 100), ([2**32], 70000):
        with pytest.raises(ValueError, match="vocabulary of"):
            data.pack(ids, vocab_size)
    path = write(tmp_path / "text.txt", TEXT)
    for vocab_size, kind in (65536, "<u2"), (65537, "<u4"):
        made = data.prepare(path, Codes(300, vocab_size, str(vocab_size)), root=tmp_path)
        assert made.train.shards[0].dtype == np.dtype(kind)
    with pytest.raises(ValueError, match="vocabulary of 200"):
        data.prepare(path, Codes(vocab_size=200, fingerprint="lies"), root=tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9])
def test_short_texts_are_refused_or_work(tmp_path, length):
    path = write(tmp_path / "short.txt", "abcdefghi"[:length])
    if length < 2:
        with pytest.raises(
            ValueError, match="short is too short: no text is left for" if length else "short.txt is empty"
        ):
            data.prepare(path, Codes(), root=tmp_path / "data")
        assert not list((tmp_path / "data").glob("*"))
        return
    made = data.prepare(path, Codes(), root=tmp_path / "data")
    for split in made.train, made.validation:
        for step in range(5):
            x, y = data.window_batch(split, 0, step, 2, 8)
            assert (y != -100).any(axis=1).all() and x.shape == (2, 8)
        assert sum((y != -100).sum() for _, y in data.eval_windows(split, 8, 2)) == split.n_tokens - 1
        assert (data.document_batch(split, 0, 0, 2, 8)[1] != -100).any()


def test_a_large_file_does_not_fill_the_memory(tmp_path):
    program = """
        import resource, sys
        from nanogptx import data
        class Codes:
            bos_id, eos_id, vocab_size, fingerprint = 256, 257, 258, "codes"
            def encode(self, text): return list(text.encode())
        with open(sys.argv[1], "w") as file:
            for _ in range(60): file.write("the quick brown fox jumps over dogs\\n" * 27778)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = data.prepare(sys.argv[1], Codes(), root=sys.argv[2], workers=1)
        assert made.train.n_tokens + made.validation.n_tokens == 60 * 27778 * 36 + 4
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    resource = pytest.importorskip("resource")  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    args = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "big.txt"), str(tmp_path / "data")]
    grown = int(subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stdout) * unit
    assert grown < 45e6 < (tmp_path / "big.txt").stat().st_size, resource


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_arrays_stay_mapped_while_in_use_and_no_longer(tmp_path, small):
    def count():
        return Path("/proc/self/maps").read_text().count(str(tmp_path)), len(os.listdir("/proc/self/fd"))

    path, before = write(tmp_path / "text.txt", TEXT), count()
    made = data.prepare(path, Codes(), root=tmp_path)
    held, files = count(), len(made.manifest["files"])
    assert files > 10 and held[0] == files and held[1] <= before[1] + files
    kept = [data.window_batch(made.train, 0, step, 4, 8) for step in range(50)]
    kept += [data.document_batch(made.train, 0, 0, 1, 64), made.train.document(0)]
    assert count() == held
    del made
    assert count() == before and kept  # batches are copies: they hold no file open


def test_where_data_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOGPTX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data.data_folder() == ROOT / "data"
    monkeypatch.setenv("NANOGPTX_DATA", str(tmp_path / "elsewhere"))
    assert data.data_folder() == tmp_path / "elsewhere" and data.data_folder("here") == Path("here")
    made = data.prepare(write(tmp_path / "text.txt", TEXT), Codes())
    assert made.folder.parent == tmp_path / "elsewhere"


# ---- downloads ----

BODY = random.Random(0).randbytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY, or what the test says instead; knows ranges unless told otherwise."""

    def do_GET(self):
        server = self.server
        server.seen.append(self.headers.get("Range"))
        if server.status != 200:
            return self.send_error(server.status)
        body, start = server.body, 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        for at in range(start, len(body), 1 << 16):
            server.sent += self.wfile.write(body[at : min(at + (1 << 16), server.stop or len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.status, server.ranges, server.stop, server.seen = BODY, 200, True, None, []
    server.sent, server.handle_error = 0, lambda *args: None  # it is no error when a client has heard enough
    server.file = data.File(
        f"http://127.0.0.1:{server.server_port}/a/file.txt", len(BODY), hashlib.sha256(BODY).hexdigest()
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def part_of(path):
    return path.with_name(path.name + ".part")


def test_download(server, tmp_path, capsys):
    path = tmp_path / "new folder" / "file.txt"
    data.download(server.file, path)
    assert path.read_bytes() == BODY and not part_of(path).exists()
    assert data.fetch(server.file, path.parent) == path and len(server.seen) == 1  # what is there is not fetched again
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_download_is_told_and_resumed(server, tmp_path, ranges):
    path, server.stop, server.ranges = tmp_path / "file.txt", 100_000, ranges
    with pytest.raises(OSError, match=r"cut off at 100,000 of 300,000 bytes.*goes on"):
        data.download(server.file, path)
    assert not path.exists() and part_of(path).stat().st_size == 100_000
    server.stop = None
    data.download(server.file, path)
    assert path.read_bytes() == BODY and not part_of(path).exists()
    assert server.seen == ["bytes=0-", "bytes=100000-"]


def test_corrupted_download_is_told_and_removed(server, tmp_path):
    path, server.body = tmp_path / "file.txt", BODY[:-1] + b"?"
    with pytest.raises(OSError, match="corrupted"):
        data.download(server.file, path)
    assert not path.exists() and not part_of(path).exists()
    server.body = BODY
    part_of(path).write_bytes(b"x" * 1000)  # the beginning of something else
    with pytest.raises(OSError, match="corrupted"):
        data.download(server.file, path)
    data.download(server.file, path)
    assert path.read_bytes() == BODY


def test_too_much(server, tmp_path):
    path = tmp_path / "file.txt"
    part_of(path).write_bytes(BODY + b"!")  # a part that is larger than the file is thrown away
    with pytest.raises(OSError, match="corrupted"):
        data.download(server.file, path)
    assert not part_of(path).exists() and server.seen == []
    server.body = BODY * 200  # and a server that goes on and on is not listened to for long
    with pytest.raises(OSError, match="corrupted"):
        data.download(server.file, path)
    assert not path.exists() and not part_of(path).exists() and server.sent < len(server.body) / 2


def test_a_whole_part_needs_no_server(server, tmp_path):
    path, server.status = tmp_path / "file.txt", 500
    part_of(path).write_bytes(BODY)
    data.download(server.file, path)
    assert path.read_bytes() == BODY and server.seen == []


def test_a_download_that_cannot_begin_says_what_to_do(server, tmp_path):
    path, server.status = tmp_path / "file.txt", 404
    with pytest.raises(OSError, match=rf"cannot download {server.file.url} .*404.* by hand at {path}$"):
        data.download(server.file, path)
    closed = server.file._replace(url="http://127.0.0.1:9/file.txt")
    with pytest.raises(OSError, match=rf"cannot download {closed.url} .*refused.* by hand at {path}$"):
        data.download(closed, path)
    assert not path.exists()


def test_a_silent_server_is_not_waited_for(tmp_path):
    listening = http.server.socketserver.TCPServer(("127.0.0.1", 0), None)  # accepts, and never answers
    file = data.File(f"http://127.0.0.1:{listening.server_address[1]}/file.txt", 5, "")
    with pytest.raises(OSError, match="cannot download .*timed out"):
        data.download(file, tmp_path / "file.txt", timeout=0.2)
    listening.server_close()


def test_a_corpus_that_is_downloaded(server, tmp_path, monkeypatch):
    text = "Once.<|endoftext|>\nTwice upon\na time.\n<|endoftext|>\nThrice.\n"
    server.body = text.encode()
    published = data.File(server.file.url, len(text), hashlib.sha256(server.body).hexdigest())
    monkeypatch.setitem(data.CORPORA, "one", data.Corpus("", "", "", (published,)))
    monkeypatch.setitem(data.CORPORA, "two", data.Corpus("", "", "", (published, published), "<|endoftext|>"))
    assert "".join(data.texts("one", "train", tmp_path)) == text[: int(0.9 * len(text))]
    assert "".join(data.texts("one", "validation", tmp_path)) == text[int(0.9 * len(text)) :]
    for split in data.SPLITS:
        assert list(data.texts("two", split, tmp_path)) == ["Once.", "Twice upon\na time.", "Thrice."]
    made = data.prepare("two", Codes(), root=tmp_path)
    assert (made.train.n_documents, made.folder.parent, made.folder.name[:4]) == (3, tmp_path, "two-")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two", made.folder.name]
    write(tmp_path / "one" / "file.txt", "mine")  # what somebody put there is neither used nor overwritten
    with pytest.raises(ValueError, match="is not the file published at"):
        data.source("one", tmp_path)
    assert (tmp_path / "one" / "file.txt").read_text() == "mine"


def test_the_table_is_complete_and_the_readme_tells_it():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name, corpus in data.CORPORA.items():
        assert f"`{name}`" in readme and corpus.licence in readme and bool(corpus.style) != bool(corpus.files)
        for file in corpus.files:
            assert file.url.startswith("https://") and file.size > 0 and len(file.sha256) == 64
            assert file.url in readme and f"{file.size:,}" in readme and file.sha256 in readme


# ---- the program ----


def run(*args, root):
    command = [sys.executable, str(ROOT / "nanogptx" / "data.py"), *map(str, args)]
    env = os.environ | {"NANOGPTX_DATA": str(root), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)


def test_program(tmp_path):
    path, tokenizer = write(tmp_path / "text.txt", TEXT), tmp_path / "tokenizer.json"
    CharTokenizer.train(TEXT).save(tokenizer)
    listed = run("list", root=tmp_path)
    assert listed.returncode == 0 and all(name in listed.stdout for name in data.CORPORA)
    prepared = run("prepare", path, "--tokenizer", tokenizer, root=tmp_path)
    cut = int(0.9 * len(TEXT))
    assert prepared.returncode == 0 and f"{cut:,} characters" in prepared.stdout
    assert f"{cut + 2:,} tokens" in prepared.stdout and Path(prepared.stdout.split("\nin ")[1].strip()).is_dir()
    shown = run("show", "text.txt", "--tokenizer", tokenizer, root=tmp_path)
    assert shown.returncode == 0 and TEXT[:200] in shown.stdout and "L|i|n|e" in shown.stdout


@pytest.mark.parametrize(
    "args, says",
    [
        (("show", "taless"), "did you mean tales"),
        (("prepare", "nowhere.txt", "--tokenizer", "none.json"), "none.json"),
        (("show", "."), "no text in the folder"),
    ],
)
def test_the_user_s_mistakes_take_one_line(tmp_path, args, says):
    result = run(*args, root=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and says in result.stderr


def test_unknown_option(tmp_path):
    result = run("show", "tales", "--tokeniser", "x", root=tmp_path)
    assert result.returncode == 2 and "tokeni" in result.stderr + result.stdout
