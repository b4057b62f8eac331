"""What is written is there whole or not at all, and what is read is one JSON object."""

import hashlib
import os
import stat

import pytest

from nanogptx import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_whole_content(tmp_path):
    for content in (b"the first, which is longer", b"second", b""):
        files.write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert names(tmp_path) == ["a"]
    assert files.file_sha256(tmp_path / "a") == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, call):
    files.write(tmp_path / "a", b"old")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    done, sync, replace = [], files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (done.append(f"sync {path.name[:2]}"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    (tmp_path / "xy").mkdir()
    files.write(tmp_path / "xy/a", b"new")
    assert done == ["sync .a", "replace", "sync xy"]


@pytest.mark.parametrize("value", [{}, {"é": ["😀", 1.5, None]}, {"a": {"b": {}}}])
def test_json_comes_back(tmp_path, value):
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged or not JSON"),
        (b'{"a": 1', "damaged or not JSON"),
        (b'{"a": 1} {}', "damaged or not JSON"),
        (b'{"a": "\xff"}', "damaged or not JSON"),
        (b"\x80\x04}q\x00.", "damaged or not JSON"),
        (b"[" * 100_000, "damaged or not JSON"),
        (b'{"a":' * 100_000, "damaged or not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "damaged or not JSON"),
        (b'{"a": 1, "a": 1}', "a key comes twice"),
        (b'{"b": [{"a": 1, "c": 2, "a": 3}]}', "a key comes twice"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'"text"', "does not hold a JSON object"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_read_json_names_the_file_that_is_something_else(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json .*{expected}"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("there", [False, True])
def test_new_folder_appears_whole_at_the_end(tmp_path, there):
    target = tmp_path / "deep/target"
    if there:  # an empty folder is as good as none
        target.mkdir(parents=True)
    with files.new_folder(target) as new:
        (new / "inner").mkdir()
        (new / "inner/a").write_text("a")
        assert not target.exists() or not any(target.iterdir())
        assert new.parent == target.parent, "a rename is one step only within one disk"
    assert (target / "inner/a").read_text() == "a" and names(tmp_path / "deep") == ["target"]
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((target / "inner").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_new_folder_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with files.new_folder(tmp_path / "target") as new:
            (new / "a").write_text("a")
            raise error("no")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_new_folder_takes_the_place_of_nothing(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a").write_text("a")
    target = {"file": tmp_path / "mine/a", "folder": tmp_path / "mine", "link": tmp_path / "link"}[kind]
    if kind == "link":
        target.symlink_to(tmp_path / "mine")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="holds something already"):
        with files.new_folder(target):
            pytest.fail("the work must not begin")
    assert names(tmp_path) == before and (tmp_path / "mine/a").read_text() == "a"
