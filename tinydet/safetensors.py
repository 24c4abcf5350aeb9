"""The .safetensors files in which weights are published (github.com/huggingface/safetensors), without that package.

8 bytes: length of the header, little-endian. The header: JSON in UTF-8 that begins with "{", padded by spaces at its end; it maps
each name to {"dtype", "shape", "data_offsets": [begin, end]} and may map "__metadata__" to an object of texts. Then the tensors,
little-endian, in row order, one after the other without holes; offsets count from the end of the header.
"""
import json
import math
import os

import numpy as np

from tinydet.files import whole

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}
LONGEST = 100_000_000                       # bytes of a header: the limit of the format's own library


def write(path, arrays, metadata=None):
    """Write named arrays (any strides, any byte order) and metadata, a dict of texts or None, whole or not at all.

    The widest dtypes come first, so that every tensor is aligned. Raises TypeError for a dtype that the format lacks,
    ValueError for a name or metadata that is no text.
    """
    for text in [*arrays, *(metadata or {}), *(metadata or {}).values()]:
        if not _is_text(text) or text == "__metadata__":
            raise ValueError(f"safetensors.write: names and metadata must be texts other than __metadata__, got {text!r}")
    names = {code: name for name, code in DTYPES.items()}
    header, parts, at = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, a in sorted(((k, np.asarray(v)) for k, v in arrays.items()), key=lambda item: -item[1].itemsize):
        code = a.dtype.newbyteorder("<").str
        if code not in names:
            raise TypeError(f"safetensors.write: {name} must have a dtype of the format ({', '.join(DTYPES)}), got {a.dtype}")
        header[name] = {"dtype": names[code], "shape": a.shape, "data_offsets": (at, at + a.nbytes)}
        parts.append((a, code))
        at += a.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as part, part.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for a, code in parts:
            f.write(np.asarray(a, code, order="C").reshape(-1).view(np.uint8))


def read(path):
    """Arrays by name, in the header's order, and metadata (a dict of texts, empty if there is none).

    The arrays are native, writable and own their memory; BF16, which NumPy lacks, comes as float32 of the same value. Nothing is
    allocated before the whole header fits the file. Raises FileNotFoundError, or ValueError naming the file and the fault.
    """
    try:
        with open(path, "rb") as f:
            header, metadata = _header(f)
            start = f.tell()
            return {name: _tensor(f, start, name, **info) for name, info in header.items()}, metadata
    except FileNotFoundError:
        raise FileNotFoundError(f"safetensors.read: there is no file {path}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"safetensors.read: {path} must be a safetensors file, got: {error}") from None


def _header(f):
    """The checked header (without metadata) of an open file, and the metadata; the file then stands at the first tensor."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    if length > min(size - 8, LONGEST):
        raise ValueError(f"a header of {length} bytes in a file of {size} (at most {LONGEST} are allowed)")
    text = f.read(length).decode()
    header = json.loads(text, object_pairs_hook=_distinct)
    if not text.startswith("{"):
        raise ValueError("a header that does not begin with {")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        raise ValueError("metadata that does not map texts to texts")
    for name, info in header.items():
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} without dtype, shape and data_offsets, or with more")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in {*DTYPES, "BF16"}:
            raise ValueError(f"tensor {name!r} of dtype {dtype!r}, which is not read (only BF16, {', '.join(DTYPES)})")
        if not _are_sizes(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) >= 2**60:   # bytes in int64
            raise ValueError(f"tensor {name!r} of shape {str(shape)[:200]}")
        count = math.prod(shape) * (2 if dtype == "BF16" else np.dtype(DTYPES[dtype]).itemsize)
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != count:
            raise ValueError(f"tensor {name!r} of {count} bytes by dtype and shape with offsets {str(offsets)[:200]}")
    at = 0
    for begin, end, name in sorted((*info["data_offsets"], name) for name, info in header.items()):
        if begin != at:
            raise ValueError(f"tensor {name!r} that begins at {begin} where the one before ends at {at}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{size - 8 - length} bytes after the header where the tensors have {at}")
    return header, metadata


def _tensor(f, start, name, dtype, shape, data_offsets):
    a = np.empty(shape, DTYPES.get(dtype, "<u2"))
    raw = a.reshape(-1).view(np.uint8)
    f.seek(start + data_offsets[0])
    if f.readinto(raw) != raw.size:
        raise ValueError(f"tensor {name!r} that ends early: the file became shorter")
    if dtype == "BOOL" and raw.size and raw.max() > 1:
        raise ValueError(f"tensor {name!r} of dtype BOOL with a byte of {raw.max()}")
    if dtype == "BF16":                     # the upper half of a float32
        wide = np.empty(shape, np.float32)
        np.left_shift(a, np.uint32(16), out=wide.view(np.uint32))
        return wide
    return a.astype(a.dtype.newbyteorder("="), copy=False)


def _distinct(pairs):
    """A JSON object as a dict. Raises ValueError for a name that comes twice, or is no text (a lone surrogate)."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not all(map(_is_text, names)):
        raise ValueError(f"a name that comes twice or is no text, among {', '.join(map(repr, names[:8]))}")
    return dict(pairs)


def _is_text(text):
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _are_sizes(numbers):
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
