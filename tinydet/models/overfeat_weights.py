"""The released weights of OverFeat's two nets (overfeat.TABLES): raw files without header or names (sermanet/OverFeat, v4.2).

Little-endian float32, array after array: for each convolution in order its weight (Cout, Cin, kh, kw), then its bias (Cout,). The
kernels are for cross-correlation, as ours. net_weight_0 is the fast net, 583,683,488 bytes; net_weight_1 the accurate one,
578,625,952 bytes: the size tells the net.
"""
import math
from pathlib import Path

import numpy as np

from tinydet.backend import array_module
from tinydet.layers import from_channels_first
from tinydet.models.overfeat import TABLES, rows

FLOAT = np.dtype("<f4")
BLOCK = 1 << 22             # numbers that are looked at at a time


def layout(table, classes=1000, width=1.0):
    """Where each array stands in a file: a dict from the net's names to (offset, shape), and the total.

    table: an overfeat.Table; classes, width, and what it raises: as overfeat.rows. Offsets and total in float32 numbers from the file's
    start; shapes as in the file, (Cout, Cin, kh, kw) of weights, (Cout,) of biases, in the file's order.
    """
    found, at = {}, 0
    for r in rows(table, classes, width):
        for key, shape in (("w", (r.Cout, r.Cin, r.size, r.size)), ("b", (r.Cout,))):
            found[f"{r.name}.{key}"] = at, shape
            at += math.prod(shape)
    return found, at


def recognise(path, classes=1000):
    """The name of the table in TABLES whose net, at full width, has the size of the file, of nets without batch norm: files have none.

    Raises FileNotFoundError, or ValueError naming the file, its size and the sizes that are known.
    """
    size = _size("recognise", path)
    known = {name: layout(table, classes)[1] * FLOAT.itemsize for name, table in TABLES.items() if not table.norm}
    for name, expected in known.items():
        if size == expected:
            return name
    told = ", ".join(f"{expected:,} ({name})" for name, expected in known.items())
    raise ValueError(f"overfeat_weights.recognise: {path} must have as many bytes as a net of {classes} classes, {told}, got {size:,}")


def read(path, table, classes=1000, width=1.0):
    """The arrays of a file, by the net's names, in the file's layout: read-only views; a page is read when it is looked at.

    table: a name in TABLES. Raises FileNotFoundError, or ValueError naming the file and both sizes, and the net that has the
    file's size if there is one.
    """
    places, total = layout(TABLES[table], classes, width)
    size, expected = _size("read", path), total * FLOAT.itemsize
    if size != expected:
        others = [f", the size of {name!r}" for name, t in TABLES.items() if layout(t, classes, width)[1] * FLOAT.itemsize == size]
        raise ValueError(f"overfeat_weights.read: {path} must have {expected:,} bytes, as {table!r} of {classes} classes and width "
                         f"{width} needs, got {size:,}{''.join(others)}")
    content = np.memmap(path, FLOAT, "r")
    return {name: content[at:at + math.prod(shape)].reshape(shape) for name, (at, shape) in places.items()}


def load_published(net, path):
    """Copy a released file into trunk and classifier of an OverFeat; a regressor stays as it is.

    net: a classifier on any backend, of the file's table with its k and pool, number of classes, no background class, and width: the
    released ones have width 1 and 1000 classes, in the order of the ILSVRC2012 devkit ("kit fox" first), not of sorted WordNet names.
    Convolutions become (kh, kw, Cin, Cout), numbers the net's dtype. One array at a time is in memory. Returns the names of the
    net's arrays that stay as they were.
    The net must see what the released one saw: RGB, (x - 118.380948) / 61.896913, as Spec has it. The release sets to 0 what is at
    most 1e-6, where ours has max(0, x): no difference that counts.
    Unverified: no released file was at hand, the tests write files by these rules.
    Raises FileNotFoundError, or ValueError naming the file: for its size, as read, for a net of another k or pool or with a background
    class, and where an array is not finite; the net is unchanged then.
    """
    spec, own, table = net.spec, net.arrays(), TABLES[net.spec.table]
    arrays = read(path, spec.table, len(spec.classes), spec.width)
    if spec.layers != table or spec.background:
        raise ValueError(f"overfeat_weights.load_published: for {path} the net must have k {table.k}, pool {table.pool} and no background "
                         f"class, as {spec.table!r} has, got k {spec.layers.k}, pool {spec.layers.pool}, background {spec.background}")
    for name, a in arrays.items():
        flat = a.reshape(-1)
        if not all(np.isfinite(flat[k:k + BLOCK]).all() for k in range(0, flat.size, BLOCK)):
            raise ValueError(f"overfeat_weights.load_published: {path}: {name} must be finite, got NaN or infinity")
    for name, a in arrays.items():
        own[name][...] = array_module(own[name]).asarray(from_channels_first({name: a})[name], own[name].dtype)
    return [name for name in own if name not in arrays]


def _size(name, path):
    if not Path(path).exists():
        raise FileNotFoundError(f"overfeat_weights.{name}: there is no file {path}")
    if not Path(path).is_file():
        raise ValueError(f"overfeat_weights.{name}: {path} must be a file, got a folder or device")
    return Path(path).stat().st_size
