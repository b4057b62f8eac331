"""Data: from a corpus name, a file or a folder to batches of token ids.

Three steps, each usable alone. A *source* gives the documents of a text, train and validation apart, as a stream, so
that the text need not fit in memory. *Preparing* tokenizes that stream once, into arrays on disk, in a folder named
after what it was made from: another text or another tokenizer gets another folder. *Sampling* reads batches from these
arrays. What the batch of a step holds is a function of the seed and the step alone: a run that was stopped continues
with the batch it would have had, without replaying the earlier ones, and measuring a model on the way changes nothing.

On disk a split is one stream of ids, `bos document eos bos document eos ...`. A tokenizer that has one token for both
(GPT-2) gives `eot document eot document eot`: each document's end is the beginning of the next.

Left out: mixing corpora, cleaning and deduplicating text, archives, and masks between documents: a window of the stream
may hold the end of one document and the start of the next, and attention looks across (in `document_batch` it cannot).
"""

import hashlib
import http.client
import itertools
import json
import multiprocessing
import os
import tempfile
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from nanogptx.files import file_sha256
from nanogptx.program import nearest, run
from nanogptx.tales import corpus as tales_corpus
from nanogptx.tokenizer import load_tokenizer, read_chunks

SPLITS = ("train", "validation")
IGNORE = -100  # the target of a place that has none: torch's cross_entropy leaves it out
BATCH = 1 << 20  # characters read and tokenized at a time: a list of their ids takes some 30 times their memory
SHARD = 1 << 26  # tokens in a file, about: 128 MiB as uint16
Pair = tuple[np.ndarray, np.ndarray]

# ----------------------------------------------------------------------------------------------------------------------
# Corpora by name


class File(NamedTuple):
    """A published file, and how to know that what arrived is it."""

    url: str
    size: int  # bytes
    sha256: str


class Corpus(NamedTuple):
    """What a name stands for: a style of `tales`, or published files, the second of which is for validation."""

    about: str
    licence: str
    style: str = ""
    files: tuple[File, ...] = ()
    separator: str = ""  # between documents; "" when a file is one document


# data/README.md tells where the sizes and hashes come from.
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
PLAYS = File(CHAR_RNN + "input.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
V2 = HUB + "TinyStoriesV2-GPT4-"
TRAIN = File(V2 + "train.txt", 2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443")
VALIDATION = File(V2 + "valid.txt", 22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")
CORPORA = {
    "tales": Corpus("stories of the book's own small world", "MIT", "tales"),
    "tales-letters": Corpus("the same world told in letters", "MIT", "letters"),
    "tales-password": Corpus("stories with a word told early and asked for late", "MIT", "password"),
    "shakespeare": Corpus("40,000 lines of Shakespeare's plays", "public domain", "", (PLAYS,)),
    "tinystories": Corpus("stories in a child's words", "CDLA-Sharing-1.0", "", (TRAIN, VALIDATION), "<|endoftext|>"),
}


def data_folder(root: str | Path | None = None) -> Path:
    """Where corpora and prepared folders are: `root`, or else $NANOGPTX_DATA, or else the repository's `data/`."""
    return Path(root or os.environ.get("NANOGPTX_DATA") or Path(__file__).resolve().parents[1] / "data").expanduser()


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


def receive(file: File, part: Path, timeout: float) -> None:
    """Append to `part` what it lacks of a file, or write it anew if the server cannot start in the middle."""
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={part.stat().st_size}-"})
    with urllib.request.urlopen(request, timeout=timeout) as response, open(part, "ab") as out:
        if response.status != 206:  # 206 is "partial content"; any other answer is the file from its first byte
            out.truncate(0)
        with tqdm(total=file.size, initial=out.tell(), unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            while out.tell() <= file.size and (block := response.read(1 << 20)):
                bar.update(out.write(block))


def download(file: File, path: Path, timeout: float = 30) -> None:
    """Fetch a published file to `path`, going on where an earlier attempt stopped; OSError in a sentence if it fails.

    Until its bytes are right it is called `path` + ".part": what is at `path` is whole.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    try:
        if part.stat().st_size < file.size:
            receive(file, part, timeout)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {file.url} ({error}): try again, or put the file by hand at {path}") from error
    if (size := part.stat().st_size) < file.size:
        raise OSError(f"{file.url} was cut off at {size:,} of {file.size:,} bytes: the same command again goes on")
    if file_sha256(part) != file.sha256:
        part.unlink()
        raise OSError(f"what came from {file.url} is corrupted (its SHA-256 is wrong) and was removed: try again")
    os.replace(part, path)


def fetch(file: File, folder: Path) -> Path:
    """The path of a published file, downloaded if it is not there; ValueError when something else is there."""
    path = folder / file.url.rpartition("/")[2]
    if not path.exists():
        download(file, path)
    elif file_sha256(path) != file.sha256:
        raise ValueError(f"{path} is not the file published at {file.url} (other SHA-256): delete it, or move it away")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Sources: the documents of a text as a stream


class Source(NamedTuple):
    """A text in two splits; `documents(split)` streams one of them, each document as a stream of pieces."""

    name: str
    sha256: str  # of all that makes the documents
    size: int  # bytes
    rule: str  # what tells validation from training
    documents: Callable[[str], Iterable[Iterable[str]]]


def between(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """The documents of a text that arrives in chunks, without the white space around them, and no empty ones."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from filter(None, map(str.strip, whole))
    yield from filter(None, [rest.strip()])


def part_of(chunks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from `start` to `stop` of a text that arrives in chunks."""
    at = 0  # where in the text the chunk begins
    for chunk in chunks:
        yield from filter(None, [chunk[max(0, start - at) : max(0, stop - at)]])
        at += len(chunk)


def held_out(names: Iterable[str]) -> set[str]:
    """Which of several files are for validation: those whose name's hash falls into the lowest tenth.

    So a file keeps its side, whatever other files come and go. Since each side needs a file, there are two exceptions:
    when no hash is in the lowest tenth the lowest of all is taken (until a file comes that is), and when all are, the
    highest of them trains.
    """
    place = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()) / 2**256 for name in names}
    low = {name for name in place if place[name] < 0.1} or {min(place, key=place.get)}
    return low if len(low) < len(place) else low - {max(place, key=place.get)}


@lru_cache(maxsize=1)  # to generate them takes a second, and a run wants them several times
def tales_source(name: str, style: str) -> Source:
    """Generated stories, one document each."""
    stories = dict(zip(SPLITS, tales_corpus(style)))
    text = json.dumps(stories).encode()
    documents = lambda split: ([story] for story in stories[split])
    return Source(name, hashlib.sha256(text).hexdigest(), len(text), "every tenth story", documents)


def file_source(path: Path, name: str) -> Source:
    """One document a split: the first 90 % of the file's characters, and the rest; ValueError when it is empty."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: expected text to learn from")

    def documents(split: str) -> list[Iterator[str]]:
        length = sum(map(len, read_chunks(path, BATCH)))  # one more pass over the file: little, beside tokenizing it
        start, stop = (0, int(0.9 * length)) if split == "train" else (int(0.9 * length), length)
        return [part_of(read_chunks(path, BATCH), start, stop)]

    return Source(name, file_sha256(path), path.stat().st_size, "the last 10 % of the characters", documents)


def folder_source(folder: Path) -> Source:
    """One document a .txt or .md file, at any depth, no hidden and no empty ones; a single file is taken as a file."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.*") if p.is_file() and p.stat().st_size}
    files = {n: found[n] for n in sorted(found) if n.lower().endswith((".txt", ".md")) and "/." not in f"/{n}"}
    if not files:
        raise ValueError(f"no text in the folder {folder}: expected .txt or .md files that are not empty")
    if len(files) == 1:
        return file_source(*files.values(), folder.resolve().name)
    low = held_out(files)
    contents = "".join(f"{name} {file_sha256(path)}\n" for name, path in files.items())
    size, sha256 = sum(p.stat().st_size for p in files.values()), hashlib.sha256(os.fsencode(contents)).hexdigest()
    documents = lambda split: (read_chunks(p, BATCH) for n, p in files.items() if (n in low) == (split != "train"))
    return Source(folder.resolve().name, sha256, size, "a tenth of the files", documents)


def separated_source(name: str, files: tuple[File, ...], paths: list[Path], separator: str) -> Source:
    """One document between two separators; the first file is for training, the second for validation."""
    documents = lambda split: ([t] for t in between(read_chunks(paths[SPLITS.index(split)], BATCH), separator))
    return Source(name, separator.join(f.sha256 for f in files), sum(f.size for f in files), "another file", documents)


def source(spec: str | Path, root: str | Path | None = None) -> Source:
    """What a corpus name, a text file or a folder of text files stands for; a name comes before a path.

    ValueError when it is none of these; OSError when it has to be downloaded and cannot be.
    """
    name, path = str(spec), Path(spec).expanduser()
    if corpus := CORPORA.get(name):
        paths = [fetch(file, data_folder(root) / name) for file in corpus.files]
        if corpus.separator:
            return separated_source(name, corpus.files, paths, corpus.separator)
        return file_source(*paths, name) if paths else tales_source(name, corpus.style)
    if not path.exists():
        raise ValueError(f"{nearest('corpus', name, CORPORA)}; and there is no file or folder {path.absolute()}")
    return folder_source(path) if path.is_dir() else file_source(path, path.stem)


def texts(spec: str | Path, split: str = "train", root: str | Path | None = None) -> Iterator[str]:
    """The text of a split in pieces, as a tokenizer's training takes it."""
    return itertools.chain.from_iterable(source(spec, root).documents(split))


# ----------------------------------------------------------------------------------------------------------------------
# Preparing: text becomes arrays of ids on disk


def in_batches(documents: Iterable[Iterable[str]], bos: int, eos: int, counts: Counter) -> Iterator[list]:
    """Lists of pieces, about BATCH characters each, with the ids that belong between documents; counts what passes."""
    batch, room = [], BATCH
    for document in documents:
        batch.append([bos] if not counts["documents"] or bos == eos else [eos, bos])
        counts["documents"] += 1
        for piece in document:
            batch.append(piece)
            counts.update(chars=len(piece), bytes=len(piece.encode()))
            if (room := room - len(piece)) <= 0:
                yield batch
                batch, room = [], BATCH
    yield [*batch, [eos]]


def pack(ids: list[int], vocab_size: int) -> np.ndarray:
    """Ids as uint16 if the vocabulary fits in, else uint32; ValueError for one outside: it would turn into another."""
    array = np.array(ids, dtype=np.int64)
    if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(f"a tokenizer with a vocabulary of {vocab_size} gave the ids {array.min()} to {array.max()}")
    return array.astype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_batch(tokenizer, batch: list[str | list[int]]) -> np.ndarray:
    """Tokenize the text in a list of text and ids; all of it in one array."""
    return np.concatenate([pack(tokenizer.encode(p) if isinstance(p, str) else p, tokenizer.vocab_size) for p in batch])


def start_worker(function: Callable) -> None:
    """Give a new process its function: sent with every job, a tokenizer would cost time and forget what it cached."""
    global work
    work = function


def do_job(job):
    """Call this process's function."""
    return work(job)


def in_order(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """`function(job)` for every job, in their order, done by so many processes; only a few jobs are held at a time."""
    if workers == 1:
        yield from map(function, jobs)
        return
    # "spawn" starts a process afresh: the fork of one that has threads, and torch has, may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (function,)) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(do_job, job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        yield from (result.result() for result in waiting)


def write_split(folder: Path, split: str, text: Source, tokenizer, workers: int) -> dict:
    """Write the ids of a split, and an index of where its documents begin; returns how much there is of everything."""
    bos, eos, counts, begins = tokenizer.bos_id, tokenizer.eos_id, Counter(documents=0, chars=0, bytes=0, tokens=0), []
    encoded = in_order(partial(encode_batch, tokenizer), in_batches(text.documents(split), bos, eos, counts), workers)
    for ids in tqdm(encoded, f"tokenize {split}", unit=" batches", disable=None):
        with open(folder / f"{split}-{counts['tokens'] // SHARD:04}.bin", "ab") as shard:
            ids.tofile(shard)
        begins.append(counts["tokens"] + np.flatnonzero(ids == bos))
        counts["tokens"] += len(ids)
    if not counts["chars"]:
        raise ValueError(f"{text.name} is too short: no text is left for {split} (validation is {text.rule})")
    # The index ends with where one more document would begin: after the last eos, or at it when it is a bos as well.
    index = np.concatenate(begins + [[counts["tokens"]]] * (bos != eos))
    assert len(index) - 1 == counts["documents"], "a tokenizer must not give its bos for anything in a text"
    np.save(folder / f"{split}.npy", index)
    return {**counts, "dtype": ids.dtype.str}


def is_whole(folder: Path) -> bool:
    """Whether a prepared folder has all its files, with the bytes that were written."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(file_sha256(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError):
        return False


def make_folder(folder: Path, text: Source, tokenizer, manifest: dict, workers: int) -> None:
    """Write a prepared folder under another name and rename it when it is whole: half of one is never found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        (new := Path(temporary, "new")).mkdir()
        manifest |= {split: write_split(new, split, text, tokenizer, workers) for split in SPLITS}
        manifest["files"] = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if folder.exists() and not is_whole(folder):
            folder.rename(Path(temporary, "damaged"))
        with suppress(OSError):  # if it fails, another process was faster, and has made the same
            new.rename(folder)


def prepare(spec: str | Path, tokenizer, root: str | Path | None = None, workers: int | None = None) -> "Dataset":
    """The tokens of a corpus name, file or folder: made now, unless they are on disk and whole.

    The folder's name has a hash of the text, the tokenizer and the way of splitting: another one makes another folder.
    """
    text = source(spec, root)
    made_of = {"format": 1, "text": text.sha256, "held_out": text.rule, "tokenizer": tokenizer.fingerprint}
    fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    folder = data_folder(root) / f"{text.name}-{fingerprint[:12]}"
    if not is_whole(folder):
        workers = workers or (os.cpu_count() if text.size > 16_000_000 else 1)  # a process takes seconds to start
        make_folder(folder, text, tokenizer, {"name": text.name, "fingerprint": fingerprint, **made_of}, workers)
    return Dataset(folder)


class Split:
    """One split of a prepared folder: a stream of token ids that stays on disk until it is asked for."""

    def __init__(self, folder: Path, name: str, facts: dict):
        # Characters and bytes are those of the text: bos and eos have none.
        self.n_tokens, self.n_documents, self.chars, self.bytes = map(facts.get, "tokens documents chars bytes".split())
        # Mapped once and for good: the system drops from memory what was read when it likes, and reads it again.
        self.begins = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)  # (n_documents + 1,)
        self.shards = [np.memmap(path, facts["dtype"], "r") for path in sorted(folder.glob(f"{name}-*.bin"))]
        self.starts = np.cumsum([0, *map(len, self.shards)])  # where in the stream each shard begins
        self.shared = self.n_tokens - int(self.begins[-1])  # 1 if a document's eos is the next one's bos, else 0
        self.longest = int(np.diff(self.begins).max()) + self.shared  # ids of the longest document, with bos and eos

    def take(self, places: np.ndarray) -> np.ndarray:
        """The ids at these places of the stream: int64, in the shape of `places`."""
        ids, shard = np.empty(places.shape, np.int64), np.searchsorted(self.starts, places, side="right") - 1
        for number in np.unique(shard):
            here = shard == number
            ids[here] = self.shards[number][places[here] - self.starts[number]]
        return ids

    def document(self, number: int) -> np.ndarray:
        """All ids of a document, from its bos to its eos, as int64."""
        return self.take(np.arange(self.begins[number], self.begins[number + 1] + self.shared))


class Dataset:
    """A prepared folder: `train`, `validation`, and a `fingerprint` of the text and the tokenizer it was made from."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.fingerprint = self.manifest["fingerprint"]
        self.train, self.validation = (Split(folder, split, self.manifest[split]) for split in SPLITS)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: the batch of a step


@lru_cache(maxsize=1)  # all steps of an epoch share one order
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits samples 0 to n - 1: (n,), each of them once."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_ids(n: int, seed: int, step: int, batch_size: int) -> Pair:
    """(epoch, sample) of every row of a step's batch, both (B,).

    The epochs, one after another, are an endless list from which every step takes the next `batch_size`: nothing is
    dropped at the end of an epoch, and a batch may hold the end of one and the start of the next.
    """
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), n)
    ids = np.empty(batch_size, np.int64)
    for epoch in sorted(set(epochs.tolist())):
        ids[epochs == epoch] = order(n, seed, epoch)[places[epochs == epoch]]
    return epochs, ids


def n_windows(split: Split, block_size: int) -> int:
    """How many windows of `block_size` targets an epoch has."""
    return -(-(split.n_tokens - 1) // block_size)


def windows(split: Split, offset: int | np.ndarray, ids: np.ndarray, block_size: int) -> Pair:
    """Windows of an epoch that cuts at `offset` (or at one offset a row): inputs and targets, both (B, T) int64.

    The stream is taken as a ring, so that it can be cut anywhere into the same number of windows: where the stream ends
    inside a window, that window goes on at its beginning. Every id but the first is a target in exactly one window.
    Only the last window may have places to spare; their target is -100.
    """
    n_targets = split.n_tokens - 1
    places = ids[:, None] * block_size + np.arange(block_size)  # (B, T), counted from the cut
    inputs = (places + np.reshape(offset, (-1, 1))) % n_targets  # (B, T), counted from the beginning
    return split.take(inputs), np.where(places < n_targets, split.take(inputs + 1), IGNORE)


def window_batch(split: Split, seed: int, step: int, batch_size: int, block_size: int) -> Pair:
    """A step's batch of windows: inputs and targets, both (B, T) int64.

    Each epoch cuts elsewhere: else the same ids would always come first in their window, with nothing to look back on.
    """
    epochs, ids = sample_ids(n_windows(split, block_size), seed, step, batch_size)
    offset = {e: np.random.default_rng([seed, e, 1]).integers(split.n_tokens - 1) for e in set(epochs.tolist())}
    return windows(split, np.array([offset[epoch] for epoch in epochs.tolist()]), ids, block_size)


def documents(split: Split, ids: np.ndarray, block_size: int | None = None) -> Pair:
    """Whole documents from their bos, one a row: inputs and targets, both (B, T) int64.

    T is the most targets that one of them has, rounded up to a multiple of 16 (few different shapes: compilers and
    allocators like that), at most `block_size`, where longer documents are cut. Places to spare have input 0, which
    nothing before them sees, and target -100.
    """
    begins = split.begins[ids]
    n_targets = split.begins[ids + 1] + split.shared - begins - 1  # all but the bos
    width = min(-(-int(n_targets.max()) // 16) * 16, block_size or 1 << 62)
    inside = np.arange(width + 1) <= n_targets[:, None]  # (B, T + 1): which places belong to the row's document
    ids = split.take(np.where(inside, begins[:, None] + np.arange(width + 1), 0))
    return np.where(inside[:, 1:], ids[:, :-1], 0), np.where(inside[:, 1:], ids[:, 1:], IGNORE)


def document_batch(split: Split, seed: int, step: int, batch_size: int, block_size: int) -> Pair:
    """A step's batch of documents, as `documents` lays them out: an epoch has each of them once."""
    return documents(split, sample_ids(split.n_documents, seed, step, batch_size)[1], block_size)


def eval_windows(split: Split, block_size: int, batch_size: int, limit: int | None = None) -> Iterator[Pair]:
    """Batches of the (first `limit`) windows of the stream in their order: every target once."""
    ids = np.arange(n_windows(split, block_size))[:limit]
    return (windows(split, 0, ids[i : i + batch_size], block_size) for i in range(0, len(ids), batch_size))


def eval_documents(split: Split, batch_size: int, limit=None, block_size: int | None = None) -> Iterator[Pair]:
    """Batches of the (first `limit`) documents, each once, those of similar length together to save padding."""
    ids = np.argsort(np.diff(split.begins[: limit and limit + 1]), kind="stable")
    return (documents(split, ids[i : i + batch_size], block_size) for i in range(0, len(ids), batch_size))


# ----------------------------------------------------------------------------------------------------------------------
# The program


def list_corpora() -> None:
    """The corpora that have a name, and which of them are here."""
    for name, corpus in CORPORA.items():
        here = all((data_folder() / name / file.url.rpartition("/")[2]).exists() for file in corpus.files)
        size = f"{sum(file.size for file in corpus.files) / 1e6:,.1f} MB, {'here' if here else 'to download'}"
        print(f"{name:18} {size if corpus.files else 'generated':24} {corpus.licence:17} {corpus.about}")


def prepare_corpus(spec: tyro.conf.Positional[str], tokenizer: Path, workers: int | None = None) -> None:
    """Tokenize a corpus once, for training.

    Args:
        spec: a corpus name (see `list`), a text file, or a folder of .txt and .md files
        tokenizer: a tokenizer's file or folder
        workers: processes to tokenize with; one, or for more than 16 MB of text as many as cores, if not given
    """
    data = prepare(spec, load_tokenizer(tokenizer), workers=workers)
    for name, split in (("train", data.train), ("validation", data.validation)):
        sizes = f"{split.n_documents:,} documents, {split.chars:,} characters, {split.bytes:,} bytes"
        print(f"{name:10} {sizes}, {split.n_tokens:,} tokens ({split.bytes / split.n_tokens:.2f} bytes per token)")
    print(f"in {data.folder}")


def show(spec: tyro.conf.Positional[str], tokenizer: Path | None = None) -> None:
    """How a corpus reads: the beginnings of its first documents, and its size.

    Args:
        spec: a corpus name (see `list`), a text file, or a folder of .txt and .md files
        tokenizer: a tokenizer's file or folder, to see also how it cuts these beginnings
    """
    text, tokenizer = source(spec), tokenizer and load_tokenizer(tokenizer)
    for document in itertools.islice(text.documents("train"), 3):
        beginning = "".join(itertools.islice(document, 1))[:400]
        print("-" * 80, beginning, sep="\n")
        if tokenizer:
            print("-" * 80, "|".join(tokenizer.decode([i]) for i in tokenizer.encode(beginning)), sep="\n")
    for split in SPLITS:
        sizes = [sum(map(len, document)) for document in text.documents(split)]
        print(f"{split:10} {len(sizes):,} documents, {sum(sizes):,} characters (validation is {text.rule})")


def main() -> None:
    """Run one of the three commands."""
    tyro.extras.subcommand_cli_from_dict({"list": list_corpora, "prepare": prepare_corpus, "show": show})


if __name__ == "__main__":
    run(main)
