"""IDX files, as MNIST comes: <split>-images-idx3-ubyte.gz and <split>-labels-idx1-ubyte.gz. Users call data.read_idx."""
import collections
import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from tinydet.images import LONGEST_SIDE
from tinydet.records import class_names, given_classes, no_split, tagged

LOOKS_LIKE = "*-images-idx3-ubyte.gz (IDX)"
IMAGES, LABELS = "-images-idx3-ubyte.gz", "-labels-idx1-ubyte.gz"
MOST_BYTES = 1 << 32                # of all images together, unpacked
DEFLATE = 1032                      # no byte of a gzip file unpacks to more than this


def found(folder):
    """Whether a folder holds a file of images in IDX."""
    return any(Path(folder).glob("*" + IMAGES))


def splits(folder):
    """Names of the splits; t10k, as MNIST calls its test set, is "test"."""
    names = {p.name.removesuffix(IMAGES) for p in Path(folder).glob("*" + IMAGES)}
    return sorted("test" if n == "t10k" and "test" not in names else n for n in names)


def read(folder, split, classes=None):
    """Examples, classes, and defects (always none: such files are right or wrong): see data.read_idx."""
    folder, classes = Path(folder), given_classes("data.read_idx", classes)
    wanted = splits(folder) if split == "all" else [split]
    if not wanted or not set(wanted) <= {*splits(folder), *(("t10k",) * os.path.isfile(folder / ("t10k" + IMAGES)))}:
        raise no_split("data.read_idx", folder, split, splits(folder))
    parts = [_read_split(folder, s) for s in wanted]
    if classes is None and os.path.isfile(folder / "classes.txt"):
        classes = class_names("data.read_idx", folder / "classes.txt")
    if classes is None:                                             # digits, unless the labels go on
        classes = tuple(str(k) for k in range(max(10, 1 + max(int(y.max(initial=0)) for *_, y, _ in parts))))
    examples = []
    for name, pixels, y, path in parts:
        if wrong := np.flatnonzero(y >= len(classes)).tolist():
            raise ValueError(f"data.read_idx: {path}: labels must lie in 0..{len(classes) - 1}, got {y[wrong[0]]} of image "
                             f"{wrong[0]}")
        size = pixels.shape[2], pixels.shape[1]
        examples += [tagged(f"{name}{i:05d}", x, size, k) for i, (x, k) in enumerate(zip(pixels, y))]
    return examples, classes, collections.defaultdict(list)


def _read_split(folder, split):
    """name, images uint8 (N, H, W), labels int64 (N,), path of the labels."""
    stem = "t10k" if split == "test" and not os.path.isfile(folder / ("test" + IMAGES)) else split
    pixels, y = _read_idx(folder / (stem + IMAGES), 3), _read_idx(folder / (stem + LABELS), 1)
    if len(pixels) != len(y):
        raise ValueError(f"data.read_idx: {folder / (stem + LABELS)} must hold a label for each of {len(pixels)} images, got "
                         f"{len(y)}")
    return split, pixels, y.astype(np.int64), folder / (stem + LABELS)


def _read_idx(path, dimensions):
    """The unsigned bytes of one file, uint8 of 1 or 3 dimensions. What it declares is checked before memory is taken."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data.read_idx: there is no file {path}")
    try:
        with gzip.open(path) as file:
            head = np.frombuffer(file.read(4 + 4 * dimensions), ">u4").tolist()
            if len(head) != 1 + dimensions or head[0] != 0x0800 + dimensions:
                raise ValueError(f"the magic number {head[0] if head else 'of an empty file'}, not {0x0800 + dimensions}")
            shape, wanted, packed = head[1:], math.prod(head[1:]), path.stat().st_size
            size = f"a declared size of {'x'.join(map(str, shape))}"
            if min(shape) < 1 or max(shape[1:], default=1) > LONGEST_SIDE or wanted > MOST_BYTES:
                raise ValueError(f"{size}; the limits are 1, {LONGEST_SIDE} a side and {MOST_BYTES} bytes")
            if wanted > DEFLATE * packed:
                raise ValueError(f"{size}, more than {packed} packed bytes can hold")
            content = bytearray()
            while len(content) <= wanted and (piece := file.read(min(1 << 20, wanted + 1 - len(content)))):
                content += piece
            if len(content) != wanted:
                got = "more" if len(content) > wanted else f"{len(content)}"
                raise ValueError(f"{size}, {wanted} bytes, but {got}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"data.read_idx: {path} must be an IDX file of unsigned bytes with {dimensions} "
                         f"dimension{'s' * (dimensions > 1)}, got: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(shape)
