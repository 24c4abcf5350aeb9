"""Files that are never half-written: text, JSON, named arrays with a JSON value (checkpoints, weights). Nothing is pickled."""
import contextlib
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FORMAT, VERSION = "tinydet arrays", 1                   # of the .npz files: a reader that does not know a version refuses it
RESERVED = ("meta", "file", "allow_pickle")             # our entry, and arguments of np.savez


@contextlib.contextmanager
def whole(path):
    """Yield the path of a file beside `path` to write to. If the block ends well it is forced to disk and moved into place,
    else it is deleted and `path` stays as it was."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"files.whole: the folder of {path} must exist")
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")       # two processes never share one
    try:
        yield part
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path, content):
    """Write text or bytes to path, whole or not at all."""
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path, *keys):
    """The JSON value in a file; with keys: an object that has them. Raises ValueError naming the file if it is none."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"files.read_json: {path} must be JSON, got: {error}") from None
    if keys and not isinstance(value, dict):
        raise ValueError(f"files.read_json: {path} must hold {', '.join(keys)}, got no JSON object")
    if missing := [k for k in keys if k not in value]:
        raise ValueError(f"files.read_json: {path} must hold {', '.join(keys)}, got no {', '.join(missing)}")
    return value


# Named arrays with a JSON value: .npz

def write_arrays(path, arrays, meta):
    """Write named arrays and a JSON value to an .npz file, whole or not at all.

    Its entry "meta" is JSON: format name and version, dtype and shape of every array, and the value. Names are those that a zip
    archive and np.savez can keep. Raises ValueError (names), TypeError (arrays of anything but numbers and booleans).
    """
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    for name, a in arrays.items():
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) < 5000) or name in RESERVED or name.endswith(".npy"):
            raise ValueError("files.write_arrays: a name must be printable text of less than 5000 letters, not "
                             f"{', '.join(RESERVED)} or *.npy, got {str(name)[:100]!r}")
        if a.dtype.kind not in "biufc":
            raise TypeError(f"files.write_arrays: {name} must hold numbers or booleans, got dtype {a.dtype}")
    listed = {name: {"dtype": a.dtype.name, "shape": a.shape} for name, a in arrays.items()}
    entry = json.dumps({"format": FORMAT, "version": VERSION, "arrays": listed, "meta": meta})
    with whole(path) as part, part.open("wb") as f:
        np.savez(f, **arrays, meta=np.array(entry))


def read_arrays(path):
    """Arrays (native byte order) and JSON value of a file that write_arrays made.

    Raises FileNotFoundError, or ValueError naming the file and all in which the arrays differ from its list.
    """
    try:
        if not zipfile.is_zipfile(path) and Path(path).exists():
            raise ValueError("a file that is no .npz archive")
        with zipfile.ZipFile(path) as file:             # np.savez stores: what unpacks to more than the file itself is not its work
            if packed := [m.filename for m in file.infolist() if m.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"an archive with a compressed member, {packed[0]}")
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            entry = json.loads(str(file["meta"]))
            if not isinstance(entry, dict) or entry.get("format") != FORMAT:
                raise ValueError("a file without a format version, of an older tinydet or of another program")
            if entry["version"] != VERSION:
                raise ValueError(f"format version {entry['version']!r}; this tinydet reads version {VERSION} only, take a newer one")
            if len(set(file.files)) < len(file.files):
                raise ValueError("an archive with two members of one name")
            listed = {k: SimpleNamespace(dtype=np.dtype(v["dtype"]), shape=tuple(v["shape"])) for k, v in entry["arrays"].items()}
            arrays = {k: np.asarray(file[k]) for k in file.files if k != "meta"}
            meta = entry["meta"]
    except FileNotFoundError:
        raise FileNotFoundError(f"files.read_arrays: there is no file {path}") from None
    except Exception as error:          # a damaged file: zipfile, zlib, json and NumPy raise a dozen kinds
        told = repr(error) if isinstance(error, KeyError) else error
        raise ValueError(f"files.read_arrays: {path} must be a weights or checkpoint file of tinydet, got: {str(told)[:300]}") from None
    return fitting("files.read_arrays", path, arrays, listed, "its list", finite=False), meta


def fitting(op, source, arrays, wanted, owner="the model", cast=False, finite=True):
    """Arrays, a mapping by name, in the dtypes of `wanted`, a mapping to arrays (or anything with shape and dtype).

    cast=True converts floating dtypes into each other; byte order never counts. source: the file that holds the arrays; owner:
    who wants them. Raises ValueError naming all that is missing, too much, of another shape or dtype, or not finite.
    """
    found, wrong = {}, []
    for name in (name for name in wanted if name in arrays):
        a, w = arrays[name], wanted[name]
        if a.shape != w.shape:
            wrong.append(f"{name} must have shape {w.shape}, got {a.shape}")
        if a.dtype.name != w.dtype.name and not (cast and a.dtype.kind == w.dtype.kind == "f"):
            wrong.append(f"{name} must be {w.dtype.name}, got {a.dtype.name}")
            continue
        with np.errstate(over="ignore"):                            # what float32 cannot hold becomes infinite and is refused
            found[name] = a.astype(w.dtype.newbyteorder("="), copy=False)
        if finite and not np.isfinite(found[name]).all():
            wrong.append(f"{name} must be finite, got NaN or infinity")
    missing, surplus = [k for k in wanted if k not in arrays], sorted(k for k in arrays if k not in wanted)
    told = [f"{source} lacks the array{'s' * (len(missing) > 1)} {some(missing)}"] * bool(missing)
    told += [f"{source} holds arrays that {owner} lacks: {some(surplus)}"] * bool(surplus)
    told += [f"{source}: {some(wrong, '; ')}"] * bool(wrong)
    if told:
        raise ValueError(f"{op}: {'; '.join(told)}")
    return found


def some(items, separator=", ", most=8):
    """Items as one text, the first few of many; "none" without any."""
    items = [str(i) for i in items]
    return separator.join([*items[:most], f"and {len(items) - most} more"] if len(items) > most else items) or "none"
