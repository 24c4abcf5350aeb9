"""Files that are never half-written: text, JSON, and named arrays with a JSON value (checkpoints, weights). Nothing is pickled."""
import contextlib
import json
import os
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def whole(path):
    """Yield the path of a file beside `path` to write to. If the block ends well it is forced to disk and moved into place,
    else it is deleted and `path` stays as it was."""
    path = Path(path)
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


def read_json(path):
    """The JSON value in a file. Raises ValueError naming the file if it is none."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"files.read_json: {path} must be JSON, got: {error}") from None


def write_arrays(path, arrays, meta):
    """Write named arrays and a JSON value to an .npz file, whole or not at all."""
    with whole(path) as part, part.open("wb") as f:
        np.savez(f, **arrays, meta=np.array(json.dumps(meta)))


def read_arrays(path):
    """Arrays and JSON value of a file that write_arrays made. Raises FileNotFoundError, or ValueError naming a file that is none."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("meta")))
    except FileNotFoundError:
        raise FileNotFoundError(f"files.read_arrays: there is no file {path}") from None
    except Exception as error:          # a damaged file: zipfile, zlib and NumPy raise a dozen kinds
        raise ValueError(f"files.read_arrays: {path} must be a weights or checkpoint file of tinydet, got: {error}") from None
