"""The .safetensors format, byte by byte: what is written, what is read, what is refused."""
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import seeds
from tinydet import safetensors

# By hand from the format: a header of 200 bytes (193 and 7 spaces), then 8 + 2 + 1 bytes of data
HEADER = (b'{"__metadata__":{"by":"hand"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
          b'"b":{"dtype":"I8","shape":[2],"data_offsets":[8,10]},"n":{"dtype":"BOOL","shape":[],"data_offsets":[10,11]}}')
FILE = (b"\xc8\0\0\0\0\0\0\0" + HEADER + b" " * (200 - len(HEADER))
        + b"\x00\x00\x80\x3f" b"\x00\x00\x20\xc0" b"\x05\xff" b"\x01")                     # 1.0, -2.5; 5, -1; True
ARRAYS = {"w": np.array([[1], [-2.5]], np.float32), "b": np.array([5, -1], np.int8), "n": np.array(True)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, a in expected.items():
        assert_array_equal(found[name], a, strict=True)
        flags = found[name].flags
        assert flags.owndata and flags.writeable and flags.c_contiguous and found[name].dtype.isnative


def test_the_bytes_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, ARRAYS, {"by": "hand"})
    assert path.read_bytes() == FILE
    found, metadata = safetensors.read(path)
    assert metadata == {"by": "hand"}
    assert_same(found, ARRAYS)
    safetensors.write(path, {})
    assert path.read_bytes() == b"\x08\0\0\0\0\0\0\0{}      " and safetensors.read(path) == ({}, {})
    assert os.listdir(tmp_path) == ["a.safetensors"]


dtypes = st.sampled_from(["<f8", ">f8", "<f4", ">f4", "f2", "i8", ">i8", "i4", "i2", "i1", "u8", "u4", ">u2", "u1", "?"])


@given(seed=seeds, kinds=st.lists(st.tuples(dtypes, st.lists(st.integers(0, 3), max_size=4)), max_size=5))
def test_any_dtype_shape_strides_and_byte_order(tmp_path_factory, seed, kinds):
    rng, path = np.random.default_rng(seed), tmp_path_factory.getbasetemp() / "any.safetensors"
    arrays = {f"größe/{i}.Δ": np.asarray(rng.integers(-60, 60, shape)).astype(dtype) for i, (dtype, shape) in enumerate(kinds)}
    strided = {k: np.repeat(a.T, 2, 0)[::2].T if a.ndim else a for k, a in arrays.items()}        # the same values, other strides
    metadata = {"naïve": "", "": "\u2028\n\"\\"}
    safetensors.write(path, strided, metadata)
    found, told = safetensors.read(path)
    assert told == metadata
    native = {k: np.asarray(a, a.dtype.newbyteorder("=")) for k, a in arrays.items()}
    assert_same(found, dict(sorted(native.items(), key=lambda item: -item[1].itemsize)))
    size, = struct.unpack("<Q", path.read_bytes()[:8])
    assert size % 8 == 0
    for name, info in json.loads(path.read_bytes()[8:8 + size]).items():
        assert name == "__metadata__" or info["data_offsets"][0] % native[name].itemsize == 0           # aligned


def test_arrays_may_be_views_scalars_and_large(tmp_path):
    path, big = tmp_path / "a.safetensors", np.arange(3_000_000, dtype=np.float32).reshape(1000, 3, 1000)
    arrays = {"big": big.transpose(2, 1, 0), "reversed": big[::-7, 1, ::-3], "one": np.broadcast_to(np.float32(3), (4, 5)),
              "scalar": np.float32(2)}
    safetensors.write(path, arrays)
    assert_same(safetensors.read(path)[0], arrays)


def build(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_bytes(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    return safetensors.read(tmp_path / "a.safetensors")


def test_bf16_comes_as_float32_of_the_same_value(tmp_path):
    bits = np.array([0x3f80, 0xc020, 0x0000, 0x8000, 0x7f80, 0xff80, 0x7fc0, 0x0001, 0x7f7f, 0x4049], "<u2")
    expected = np.array([1, -2.5, 0, -0.0, np.inf, -np.inf, np.nan, 2.0**-133, (2 - 2.0**-7) * 2.0**127, 3.140625], np.float32)
    for shape in ((10,), (2, 5), (10, 1, 1)):
        found = read_bytes(tmp_path, build({"w": tensor("BF16", shape, 0, 20)}, bits.tobytes()))[0]
        assert_same(found, {"w": expected.reshape(shape)})
        assert_array_equal(np.signbit(found["w"]), np.signbit(expected).reshape(shape))
    assert_same(read_bytes(tmp_path, build({"w": tensor("BF16", [], 0, 2)}, b"\x80\x3f"))[0], {"w": np.array(1, np.float32)})
    assert_same(read_bytes(tmp_path, build({"w": tensor("BF16", [0, 3], 0, 0)}))[0], {"w": np.zeros((0, 3), np.float32)})


def test_a_header_may_list_tensors_in_any_order(tmp_path):
    header = {"late": tensor("I16", [1], 8, 10), "empty": tensor("F32", [0, 7], 8, 8), "first": tensor()}
    found, metadata = read_bytes(tmp_path, build(header, struct.pack("<2fh", 1, 2, 3)))
    assert_same(found, {"late": np.array([3], np.int16), "empty": np.zeros((0, 7), np.float32), "first": np.array([1, 2], np.float32)})
    assert metadata == {}


HUGE = 2**62
REFUSED = {
    "nothing": (b"", "a header of 0 bytes in a file of 0"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "in a file of 7"),
    "no header": (build(b""), ""),
    "header longer than the file": (build(b"{}", length=3), "a header of 3 bytes in a file of 10"),
    "absurd header": (build(b"{}", length=2**64 - 1), "a header of 18446744073709551615 bytes"),
    "UTF-8": (build(b'{"\xff": 3}'), "'utf-8' codec can't decode"),
    "JSON": (build(b"{"), ""),
    "two values": (build(b"{} {}"), "Extra data"),
    "deep": (build(b'{"w":' + b"[" * 100_000), ""),
    "leading space": (build(b" {}"), "a header that does not begin with {"),
    "no object": (build(b"[]"), "a header that does not begin with {"),
    "name twice": (build(b'{"w":%s,"w":%s}' % ((json.dumps(tensor()).encode(),) * 2), b"\0" * 8), "a name that comes twice"),
    "key twice": (build(b'{"w":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "a name that comes twice"),
    "metadata key twice": (build(b'{"__metadata__":{"a":"1","a":"2"}}'), "a name that comes twice"),
    "surrogate": (build(b'{"\\ud800":%s}' % json.dumps(tensor()).encode(), b"\0" * 8), "is no text"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "metadata that does not map texts to texts"),
    "metadata of surrogates": (build({"__metadata__": {"a": "\ud800"}}), "metadata that does not map texts to texts"),
    "metadata list": (build({"__metadata__": ["a"]}), "metadata that does not map texts to texts"),
    "metadata null": (build({"__metadata__": None}), "metadata that does not map texts to texts"),
    "no tensor": (build({"w": 3}), "tensor 'w' without dtype, shape and data_offsets"),
    "no shape": (build({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8), "tensor 'w' without"),
    "dtype unknown": (build({"v": tensor(), "w": tensor("F8_E4M3", [2], 8, 10)}, b"\0" * 10),
        "tensor 'w' of dtype 'F8_E4M3', which is not read"),
    "dtype number": (build({"w": tensor(32)}, b"\0" * 8), "tensor 'w' of dtype 32"),
    "dtype list": (build({"w": tensor([])}, b"\0" * 8), r"tensor 'w' of dtype \[\]"),
    "negative": (build({"w": tensor(shape=[-1, -2])}, b"\0" * 8), r"tensor 'w' of shape \[-1, -2\]"),
    "fraction": (build({"w": tensor(shape=[2.0])}, b"\0" * 8), "tensor 'w' of shape"),
    "true": (build({"w": tensor(shape=[True, 2])}, b"\0" * 8), "tensor 'w' of shape"),
    "no list": (build({"w": tensor(shape=2)}, b"\0" * 8), "tensor 'w' of shape 2"),
    "overflow to 0": (build({"w": tensor(shape=[HUGE, 4], end=0)}), "tensor 'w' of shape"),
    "overflow to 8": (build({"w": tensor("U8", [2**32 + 2, 2**63 - 1])}, b"\0" * 8), "tensor 'w' of shape"),
    "beyond 64 bits": (build({"w": tensor(shape=[10**30, 0], end=0)}), "tensor 'w' of shape"),
    "huge and empty": (build({"w": tensor(shape=[HUGE, HUGE, 0], end=0)}), "tensor 'w' of shape"),
    "65 axes": (build({"w": tensor("U8", [1] * 65, 0, 1)}, b"\0"), "tensor 'w' of shape"),
    "a number too long": (build(b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 10_000), b"\0" * 8), ""),
    "a large claim": (build({"w": tensor("U8", [2**40], 0, 2**40)}, b"\0" * 8),
        "8 bytes after the header where the tensors have 1099511627776"),
    "offsets too short": (build({"w": tensor(end=7)}, b"\0" * 7),
        r"tensor 'w' of 8 bytes by dtype and shape with offsets \[0, 7\]"),
    "offsets backwards": (build({"w": tensor(shape=[0], begin=8, end=0)}, b"\0" * 8), "tensor 'w' of 0 bytes"),
    "offsets negative": (build({"w": tensor(begin=-8, end=0)}), "tensor 'w' of 8 bytes"),
    "offsets of three": (build({"w": {**tensor(), "data_offsets": [0, 8, 8]}}, b"\0" * 8), "tensor 'w' of 8 bytes"),
    "offsets null": (build({"w": {**tensor(), "data_offsets": None}}, b"\0" * 8), "tensor 'w' of 8 bytes"),
    "overlap": (build({"v": tensor(), "w": tensor(begin=4, end=12)}, b"\0" * 12),
        "tensor 'w' that begins at 4 where the one before ends at 8"),
    "the same place": (build({"v": tensor(), "w": tensor()}, b"\0" * 8),
        "tensor 'w' that begins at 0 where the one before ends at 8"),
    "empty inside": (build({"v": tensor(), "w": tensor(shape=[0], begin=4, end=4)}, b"\0" * 8), "tensor 'w' that begins at 4"),
    "hole": (build({"v": tensor(), "w": tensor(begin=9, end=17)}, b"\0" * 17),
        "tensor 'w' that begins at 9 where the one before ends at 8"),
    "hole before": (build({"w": tensor(begin=1, end=9)}, b"\0" * 9),
        "tensor 'w' that begins at 1 where the one before ends at 0"),
    "past the end": (build({"w": tensor()}, b"\0" * 7), "7 bytes after the header where the tensors have 8"),
    "trailing bytes": (build({"w": tensor()}, b"\0" * 9), "9 bytes after the header where the tensors have 8"),
    "trailing bytes, no tensor": (build({}, b"\0"), "1 bytes after the header where the tensors have 0"),
    "a bool of 2": (build({"w": tensor("BOOL", [2], 0, 2)}, b"\1\2"), "tensor 'w' of dtype BOOL with a byte of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_forbids_is_refused(tmp_path, monkeypatch, case):
    content, told = REFUSED[case]
    real = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: real(shape, dtype) if case == "a bool of 2" else pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"^safetensors\.read: .*a\.safetensors must be a safetensors file, got: .*" + told):
        read_bytes(tmp_path, content)


def test_a_header_above_the_limit_is_not_even_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 100_000_100)                                  # sparse
    with pytest.raises(ValueError, match=r"a header of 100000001 bytes in a file of 100000100 \(at most 100000000 are allowed\)"):
        safetensors.read(path)


def test_a_damaged_file_is_refused_or_another_valid_one(tmp_path):
    """Cut anywhere: refused. A byte changed in the header: refused, or read without another error."""
    refused = 0
    for n in range(len(FILE)):
        with pytest.raises(ValueError, match=r"^safetensors\.read: "):
            read_bytes(tmp_path, FILE[:n])
        for flip in (1, 32):
            try:
                read_bytes(tmp_path, FILE[:n] + bytes([FILE[n] ^ flip]) + FILE[n + 1:])
            except ValueError as error:
                assert str(error).startswith("safetensors.read: ")
                refused += 1
    assert refused > len(FILE)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^safetensors\.read: there is no file .*a\.safetensors$"):
        safetensors.read(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"^safetensors\.read: .* must be a safetensors file"):
        safetensors.read(tmp_path)


@pytest.mark.parametrize("bad", [np.array([None]), np.array([1j]), np.array(["a"]), np.array([(1, 2)], "i4,f4"),
                                 np.array(["2026"], "M8[D]"), {}])
def test_dtypes_that_the_format_lacks_are_not_written(tmp_path, bad):
    with pytest.raises(TypeError, match=r"^safetensors\.write: w must have a dtype of the format \(F64, F32, .*BOOL\), got "):
        safetensors.write(tmp_path / "a.safetensors", {"v": np.ones(1), "w": bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, metadata", [("__metadata__", None), (3, None), ("\ud800", None), ("w", {"a": 1}), ("w", {1: "a"}),
                                            ("w", {"a": "\ud800"})])
def test_names_and_metadata_that_are_no_text_are_not_written(tmp_path, name, metadata):
    with pytest.raises(ValueError, match=r"^safetensors\.write: names and metadata must be texts other than __metadata__, got "):
        safetensors.write(tmp_path / "a.safetensors", {"v": np.ones(1), name: np.ones(1)}, metadata)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        safetensors.write(path, ARRAYS)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]
