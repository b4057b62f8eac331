"""Files that are there whole or not at all, whatever happens while they are written.

The system keeps what a program writes in memory for a while: a file that was written, and then renamed, can be found
empty after a power cut. So each is flushed to the disk under a temporary name, and then renamed, which is one step
for the disk: what has the right name is whole. Tensors are kept as safetensors, which cannot run code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# torch is imported where it is needed, since a tokenizer needs none.
Tensors = dict[str, "torch.Tensor"]  # noqa: F821


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: str | os.PathLike, content: bytes) -> None:
    """Replace a file: at any moment, and after a crash, `path` holds all of the old bytes or all of the new ones."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a file by readable JSON."""
    write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's pairs as a dict; ValueError if a key comes twice, where Python silently takes the last."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice in it")
    return found


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def check_free(path: Path) -> None:
    """ValueError if something is at `path`; an empty folder is nothing."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} holds something already: name another folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` when the block ends, whole, or not at all when it fails.

    Raises ValueError when something is at `path` already.
    """
    check_free(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a file, a JSON header and plain numbers: opening it runs no code. ValueError if it is damaged."""
    import safetensors.torch

    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length < 100_000_000:  # a longer header is refused below
                json.loads(file.read(length), object_pairs_hook=no_duplicates)  # the library lets duplicates pass
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write tensors, from any device, to a file."""
    import safetensors.torch

    path.touch()
    mode = path.stat().st_mode
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt"})  # transformers asks for the metadata
    path.chmod(mode)  # the library makes files that only their owner can read
