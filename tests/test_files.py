"""Files that are whole or not there, and the refusal of damaged ones."""
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet.files import read_arrays, read_json, write, write_arrays


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.mark.parametrize("content, expected", [("text ü\n", "text ü\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write(tmp_path, content, expected):
    for _ in range(2):                                              # a new file, and over an old one
        write(tmp_path / "a.json", content)
        assert contents(tmp_path) == {"a.json": expected}


def test_write_arrays_and_read_arrays(tmp_path):
    arrays = {"net/0.w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4)), "scalar": np.array(7),
              "flag": np.ones(2, bool)}
    meta = {"steps": 3, "name": "ü", "list": [1.5, None]}
    write_arrays(tmp_path / "a.npz", arrays, meta)
    found, told = read_arrays(tmp_path / "a.npz")
    assert told == meta and list(found) == list(arrays)
    for name, a in arrays.items():
        assert_array_equal(found[name], a, strict=True)
    assert list(contents(tmp_path)) == ["a.npz"]


@pytest.mark.parametrize("what", ["os.replace", "os.fsync", "numpy.savez"])
@pytest.mark.parametrize("old", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, what, old):
    if old:
        write(tmp_path / "a.txt", "old")
        write_arrays(tmp_path / "a.npz", {"w": np.ones(3)}, 1)
    before = contents(tmp_path)

    def fail(f=None, *args, **options):
        if hasattr(f, "write"):
            f.write(b"half of it")
        raise OSError("no space left on device")
    monkeypatch.setattr(what, fail)
    with pytest.raises(OSError, match="no space left"):
        write_arrays(tmp_path / "a.npz", {"w": np.zeros(3)}, 2)
    if what != "numpy.savez":
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "a.txt", "new")
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith(".")} == before
    monkeypatch.undo()
    write_arrays(tmp_path / "a.npz", {"w": np.zeros(3)}, 2)         # what the failure left behind is in nobody's way
    assert read_arrays(tmp_path / "a.npz")[1] == 2


@pytest.mark.parametrize("flush", [write, write_arrays])
def test_what_is_moved_into_place_was_forced_to_disk(tmp_path, monkeypatch, flush):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    flush(tmp_path / "a", *(["text"] if flush is write else [{"w": np.ones(3)}, 1]))
    assert calls == ["fsync", "replace"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_read_arrays_errors_name_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"

    def refused(content, told=""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^files\.read_arrays: .*a\.npz must be a weights or checkpoint file .*, got: " + told):
            read_arrays(path)

    def saved(save, *args, **options):
        save(f := io.BytesIO(), *args, **options)
        return f.getvalue()
    with pytest.raises(FileNotFoundError, match=r"^files\.read_arrays: there is no file .*a\.npz$"):
        read_arrays(path)
    refused(b"")
    refused(b"no archive at all")
    refused(saved(np.save, np.ones(3)))                             # .npy
    refused(saved(np.savez, w=np.ones(3)), "'meta")                 # an archive of somebody else
    refused(saved(np.savez, w=np.ones(3), meta=np.array("{")))
    refused(saved(np.savez, w=np.ones(3), meta=np.ones(2)))
    objects = np.array([Harmful()], object)
    refused(saved(np.savez, w=objects, meta=np.array("1")), "Object arrays cannot be loaded when allow_pickle=False")
    refused(saved(np.savez, w=np.ones(1), meta=objects), "Object arrays cannot be loaded when allow_pickle=False")
    refused(objects.dumps())
    assert not Path("unpickled").exists()
    with zipfile.ZipFile(path, "w") as archive:                     # members that are no arrays
        archive.writestr("meta.npy", b"junk")
    refused(path.read_bytes())
    with pytest.raises(ValueError, match=r"^files\.read_arrays: "):
        read_arrays(tmp_path)


def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path):
    """Cut anywhere: refused. One byte changed anywhere: refused, or read as it was (some bytes of an archive mean nothing)."""
    path, arrays = tmp_path / "a.npz", {"w": np.arange(6.0).reshape(2, 3)}
    write_arrays(path, arrays, {"steps": 3})
    whole, refused = path.read_bytes(), 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"^files\.read_arrays: "):
            read_arrays(path)
    for n, flip in zip(range(len(whole)), np.tile([1, 8, 12, 14, 32, 255], len(whole))):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ flip]) + whole[n + 1:])
        try:
            found, meta = read_arrays(path)
        except ValueError as error:
            assert str(error).startswith("files.read_arrays: ")
            refused += 1
        else:
            assert meta == {"steps": 3} and list(found) == ["w"]
            assert_array_equal(found["w"], arrays["w"], strict=True)
    assert refused > len(whole) / 2


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    write(path, '{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    for content in ("", "{", b"\xff\xfe"):
        write(path, content)
        with pytest.raises(ValueError, match=r"^files\.read_json: .*a\.json must be JSON, got: "):
            read_json(path)
