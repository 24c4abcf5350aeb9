"""Files that are whole or not there, and the refusal of damaged ones."""
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet.files import read_arrays, read_json, whole, write, write_arrays


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.mark.parametrize("content, expected", [("text ü\n", "text ü\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write(tmp_path, content, expected):
    for _ in range(2):                                              # a new file, and over an old one
        write(tmp_path / "a.json", content)
        assert contents(tmp_path) == {"a.json": expected}


def test_write_arrays_and_read_arrays(tmp_path):
    arrays = {"net/0.w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4)), "nan": np.array(np.nan),
              "flag": np.ones(2, bool), "häuser/Δ w": np.arange(24).reshape(2, 3, 4).T, "strided": np.arange(9.0)[::-2],
              "half": np.float16(0.5), "complex": np.array([1j]), "a.npy/b": np.arange(3, dtype=np.uint64), "x" * 300: np.ones(1)}
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


def test_arrays_of_the_other_byte_order_come_back_native(tmp_path):
    write_arrays(tmp_path / "a.npz", {"w": np.arange(3, dtype=">f4")}, None)
    assert_array_equal(read_arrays(tmp_path / "a.npz")[0]["w"], np.arange(3, dtype=np.float32), strict=True)


@pytest.mark.parametrize("name", ["", "meta", "file", "allow_pickle", "w.npy", "a\0b", "a\nb", "\ud800", 3])
def test_names_that_the_archive_would_lose_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^files\.write_arrays: a name must be printable text of less than 5000 letters, not meta, file, .*, got "):
        write_arrays(tmp_path / "a.npz", {"v": np.ones(2), name: np.ones(1)}, 1)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("bad", [np.array([None]), np.array(["a"]), np.array([(1, 2)], "i4,f4"), np.array(["2026"], "M8[D]"), {}])
def test_only_numbers_and_booleans_are_written(tmp_path, bad):
    with pytest.raises(TypeError, match=r"^files\.write_arrays: w must hold numbers or booleans, got dtype "):
        write_arrays(tmp_path / "a.npz", {"v": np.ones(2), "w": bad}, 1)
    assert contents(tmp_path) == {}


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def saved(save, *args, **options):
    save(f := io.BytesIO(), *args, **options)
    return f.getvalue()


def entry(arrays=None, **change):
    """The JSON entry of a file, with the array w (2, 3) float32 in its list."""
    listed = {"w": {"dtype": "float32", "shape": [2, 3]}} if arrays is None else arrays
    value = {"format": "tinydet arrays", "version": 1, "arrays": listed, "meta": {"steps": 3}, **change}
    return np.array(json.dumps({k: v for k, v in value.items() if v != "absent"}))


def test_read_arrays_errors_name_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, w = tmp_path / "a.npz", np.zeros((2, 3), np.float32)

    def refused(content, told=""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^files\.read_arrays: .*a\.npz must be a weights or checkpoint file of .*, got: " + told):
            read_arrays(path)

    with pytest.raises(FileNotFoundError, match=r"^files\.read_arrays: there is no file .*a\.npz$"):
        read_arrays(path)
    path.write_bytes(saved(np.savez, w=w, meta=entry()))
    assert_array_equal(read_arrays(path)[0]["w"], w, strict=True)
    refused(b"")
    refused(b"no archive at all")
    refused(saved(np.save, np.ones(3)))                             # .npy
    refused(saved(np.savez, w=w), r"KeyError\('meta is not a file")  # an archive of somebody else
    refused(saved(np.savez, w=w, meta=np.array("{")))
    refused(saved(np.savez, w=w, meta=np.ones(2)))
    objects = np.array([Harmful()], object)
    refused(saved(np.savez, w=objects, meta=entry()), "Object arrays cannot be loaded when allow_pickle=False")
    refused(saved(np.savez, w=np.ones(1), meta=objects), "Object arrays cannot be loaded when allow_pickle=False")
    refused(objects.dumps())
    assert not Path("unpickled").exists()
    for meta, member, told in ((b"junk", saved(np.save, w), ""), (saved(np.save, entry()), saved(np.save, w)[:-1], ""),
                               (saved(np.save, entry()), b"junk", None)):
        with zipfile.ZipFile(path, "w") as archive:                 # members that are no arrays, or not whole
            archive.writestr("meta.npy", meta)
            archive.writestr("w.npy", member)
        if told is not None:
            refused(path.read_bytes(), told)
    with pytest.raises(ValueError, match=r": .*a\.npz: w must have shape \(2, 3\), got \(\); w must be float32, got bytes32$"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for name, a in (("meta.npy", entry()), ("w.npy", w), ("w.npy", w + 1)):
            archive.writestr(name, saved(np.save, a))
    refused(path.read_bytes(), "an archive with two members of one name")
    with pytest.raises(ValueError, match=r"^files\.read_arrays: "):
        read_arrays(tmp_path)


@pytest.mark.parametrize("made, told", [
    (np.array('{"steps": 3}'), "a file without a format version, of an older tinydet or of another program"),
    (np.array("[1]"), "a file without a format version"), (np.array("null"), "a file without a format version"),
    (entry(format="other"), "a file without a format version"),
    (entry(version=2), "format version 2; this tinydet reads version 1 only, take a newer one"),
    (entry(version="1"), "format version '1'; this"), (entry(version=None), "format version None; this"),
    (entry(version="absent"), r"KeyError\('version'\)"), (entry(meta="absent"), r"KeyError\('meta'\)"), (entry("absent"), ""),
    (entry([]), ""), (entry({"w": 3}), ""), (entry({"w": {"shape": [2, 3]}}), r"KeyError\('dtype'\)"),
    (entry({"w": {"dtype": "float32", "shape": 6}}), ""), (entry({"w": {"dtype": "colour", "shape": [2, 3]}}), "")])
def test_an_entry_of_another_version_or_structure_is_refused(tmp_path, made, told):
    path = tmp_path / "a.npz"
    path.write_bytes(saved(np.savez, w=np.zeros((2, 3), np.float32), meta=made))
    with pytest.raises(ValueError, match=r"^files\.read_arrays: .*a\.npz must be a weights or checkpoint file of .*, got: " + told):
        read_arrays(path)


def test_all_in_which_the_arrays_differ_from_the_list_is_named(tmp_path):
    path = tmp_path / "a.npz"
    listed = {k: {"dtype": "float32", "shape": [2, 3]} for k in ("w", "b", "gone", "c", "lost")}
    path.write_bytes(saved(np.savez, meta=entry(listed), w=np.zeros((3, 2), np.float32), b=np.zeros((2, 3)),
                           c=np.zeros((2, 3), np.float32), more=np.ones(1)))
    with pytest.raises(ValueError) as error:
        read_arrays(path)
    assert str(error.value) == (f"files.read_arrays: {path} lacks the arrays gone, lost; "
                                f"{path} holds arrays that its list lacks: more; "
                                f"{path}: w must have shape (2, 3), got (3, 2); b must be float32, got float64")


def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path):
    """Cut at every third byte: refused. Every third byte changed: refused, or read as it was (some bytes of an archive mean nothing)."""
    path, arrays = tmp_path / "a.npz", {"w": np.arange(6.0).reshape(2, 3)}
    write_arrays(path, arrays, {"steps": 3})
    whole, refused = path.read_bytes(), 0
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"^files\.read_arrays: "):
            read_arrays(path)
    for n, flip in zip(range(0, len(whole), 3), np.tile([1, 8, 12, 14, 32, 255], len(whole))):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ flip]) + whole[n + 1:])
        try:
            found, meta = read_arrays(path)
        except ValueError as error:
            assert str(error).startswith("files.read_arrays: ")
            refused += 1
        else:
            assert meta == {"steps": 3} and list(found) == ["w"]
            assert_array_equal(found["w"], arrays["w"], strict=True)
    assert refused > len(whole) / 6


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    write(path, '{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    for content in ("", "{", b"\xff\xfe"):
        write(path, content)
        with pytest.raises(ValueError, match=r"^files\.read_json: .*a\.json must be JSON, got: "):
            read_json(path)
    write(path, '{"a": 1, "b": null}')
    assert read_json(path, "b", "a") == {"a": 1, "b": None}
    with pytest.raises(ValueError, match=r"^files\.read_json: .*a\.json must hold a, c, d, got no c, d$"):
        read_json(path, "a", "c", "d")
    write(path, '["a"]')
    with pytest.raises(ValueError, match=r"a\.json must hold a, got no JSON object$"):
        read_json(path, "a")


@pytest.mark.parametrize("flush", [lambda p: write(p, "x"), lambda p: write_arrays(p, {}, 1)])
def test_a_missing_folder_is_named_by_the_path_that_was_given(tmp_path, flush):
    with pytest.raises(FileNotFoundError, match=r"^files\.whole: the folder of .*none/a\.npz must exist$"):
        flush(tmp_path / "none" / "a.npz")


def test_two_processes_write_to_different_parts(tmp_path):
    with whole(tmp_path / "a.txt") as part:
        part.write_text("x")
        assert str(os.getpid()) in part.name and part.parent == tmp_path


def test_a_text_file_is_no_archive_and_no_one_is_told_to_unpickle_it(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"^files\.read_arrays: .*a\.npz must be a weights or checkpoint file of tinydet, got: a file that is no .npz"):
        read_arrays(tmp_path / "a.npz")


def test_a_name_too_long_for_an_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^files\.write_arrays: a name must be printable text of less than 5000 letters.*got 'aaa"):
        write_arrays(tmp_path / "a.npz", {"a" * 70000: np.ones(1)}, 1)
    assert not contents(tmp_path)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    write_arrays(tmp_path / "a.npz", {"w": np.zeros(10**6)}, 1)
    with zipfile.ZipFile(tmp_path / "a.npz") as old, zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"b\.npz must be a weights or checkpoint file of tinydet, got: an archive with a compressed member, w\.npy"):
        read_arrays(tmp_path / "b.npz")
