"""The argument checks that the ops share. Each names the op, the argument, what must hold and what was given.

Checks of values (finite, areas, ternary, labels) read arrays on the host alone: on the GPU they would wait for it and copy. What an
op makes of a value that is not allowed there, its docstring says.
"""
import numpy as np

from tinydet.backend import array_module


def on_host(x):
    """Whether x is a NumPy array, whose values may be looked at without waiting for a GPU."""
    return array_module(x) is np


def array(op, name, x):
    """Raise TypeError unless x is an array (a list has no shape)."""
    if not isinstance(x, array_module(x).ndarray):
        raise TypeError(f"{op}: {name} must be an array, got {type(x).__name__}")


def float_array(op, name, x, shape=None):
    """Raise unless x is a float32 or float64 array whose shape reads as `shape`, such as "(N, H, W, C)" or "(R, 4)".

    Capitalised words stand for any length, numbers for themselves; None is any shape.
    Raises TypeError (type, dtype), ValueError (shape).
    """
    array(op, name, x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64, got {x.dtype}")
    if shape is None:
        return
    wanted = [s.strip() for s in shape.strip("()").split(",") if s.strip()]
    if x.ndim != len(wanted) or any(w.isdigit() and int(w) != n for w, n in zip(wanted, x.shape)):
        raise ValueError(f"{op}: {name} must have shape {shape}, got {x.shape}")


def same_dtype(op, **arrays):
    """Raise TypeError unless all arrays have one dtype: mixed ones would be promoted in silence, and slowly."""
    for name, a in arrays.items():
        array(op, name, a)
    if len({array_module(a) for a in arrays.values()}) > 1:
        raise TypeError(f"{op}: arrays must all be NumPy's or all CuPy's, got " + ", ".join(f"{k} {type(a).__module__}" for k, a in arrays.items()))
    if len({a.dtype for a in arrays.values()}) > 1:
        raise TypeError(f"{op}: dtypes must agree, got " + ", ".join(f"{k} {a.dtype}" for k, a in arrays.items()))


def same_shape(op, expected, **arrays):
    """Raise ValueError unless every array has the shape `expected`."""
    for name, a in arrays.items():
        array(op, name, a)
        if a.shape != tuple(expected):
            raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {a.shape}")


def whole(op, minimum, **values):
    """Raise unless every value is an integer >= minimum (TypeError for another type, ValueError below)."""
    for name, v in values.items():
        if not isinstance(v, (int, np.integer)) or isinstance(v, bool):
            raise TypeError(f"{op}: {name} must be an integer, got {v!r}")
        if v < minimum:
            raise ValueError(f"{op}: {name} must be at least {minimum}, got {v}")


def small(op, minimum, **values):
    """As whole, and at most 2^31 - 1: sizes, strides and the like, which kernels count in 32 bits."""
    whole(op, minimum, **values)
    for name, v in values.items():
        if v >= 2**31:
            raise ValueError(f"{op}: {name} must be below 2^31, got {v}")


def gradient(op, shape, dtype, dy):
    """Raise unless dy is the gradient of a result of that shape and dtype."""
    float_array(op, "dy", dy)
    same_shape(op, shape, dy=dy)
    if dy.dtype != dtype:
        raise TypeError(f"{op}: dy must be {dtype}, as the result was, got {dy.dtype}")


def areas(op, **boxes):
    """Raise ValueError where the area of a box, four times over, leaves its dtype: overlaps could not be told."""
    for name, b in boxes.items():
        if not on_host(b):
            continue
        sides = abs(b[:, 2:] / 2 - b[:, :2] / 2)
        most = np.finfo(b.dtype).max / 16
        if bool((sides[:, 0] > most / np.maximum(sides[:, 1], 1)).any()):
            raise ValueError(f"{op}: {name} must have areas that {b.dtype} holds, got a box of {2 * float(sides.max()):g} pixels")


def padding(op, pad):
    """pad as (top, bottom, left, right): a number stands for all four. Raises TypeError or ValueError unless all are integers >= 0."""
    sides = tuple(pad) if isinstance(pad, (tuple, list)) else (pad,) * 4
    if len(sides) != 4:
        raise ValueError(f"{op}: pad must be a number or (top, bottom, left, right), got {pad!r}")
    for side in sides:
        small(op, 0, pad=side)
    return tuple(int(side) for side in sides)


def finite(op, **arrays):
    """Raise ValueError if an array holds NaN or infinity: a sort would hide it."""
    for name, a in arrays.items():
        if on_host(a) and not bool(np.isfinite(a).all()):
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")


def ranked(op, scores, labels):
    """Raise ValueError unless all scores that count (labels 0 and 1) are finite; on the host alone."""
    if on_host(scores) and not (np.isfinite(scores) | (labels < 0)).all():
        bad = scores[(labels >= 0) & ~np.isfinite(scores)][0]
        raise ValueError(f"{op}: scores must be finite where labels are 0 or 1, got {bad}")


def half_width(op, delta, zero=True):
    """The half width delta of a ranking loss's step as a float. Raises TypeError or ValueError unless it is a number from 1e-100 to 1e100,
    or 0 where that is allowed."""
    if not isinstance(delta, (int, float, np.integer, np.floating)) or isinstance(delta, bool):
        raise TypeError(f"{op}: delta must be a number, got {delta!r}")
    delta = float(delta)
    if not (zero and delta == 0 or 1e-100 <= delta <= 1e100):
        raise ValueError(f"{op}: delta must {'be 0 or ' * zero}lie in [1e-100, 1e100], got {delta:g}")
    return delta


def integers(op, name, x, shape):
    """Raise unless x is an array of integers of that shape (TypeError for the dtype, ValueError for the shape)."""
    array(op, name, x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {x.dtype}")
    same_shape(op, shape, **{name: x})


def booleans(op, name, x, count):
    """x as a NumPy array of `count` booleans. Raises TypeError for another dtype, ValueError for another shape."""
    x = np.asarray(x)
    if x.dtype != bool:
        raise TypeError(f"{op}: {name} must be {count} booleans, got {x.dtype}")
    if x.shape != (count,):
        raise ValueError(f"{op}: {name} must be {count} booleans, got shape {x.shape}")
    return x


def ternary(op, y, shape):
    """Raise unless y is an integer array of that shape with values -1, 0 and 1 only."""
    integers(op, "labels", y, shape)
    if on_host(y) and y.size and (int(y.min()) < -1 or int(y.max()) > 1):
        raise ValueError(f"{op}: labels must be -1, 0 or 1, got {int(y.min())}..{int(y.max())}")


def labels(op, y, rows, K):
    """Raise unless y is an integer array (rows,) with values in -1..K-1; -1 stands for ignored."""
    integers(op, "labels", y, (rows,))
    if on_host(y) and y.size and (int(y.min()) < -1 or int(y.max()) >= K):
        raise ValueError(f"{op}: labels must lie in -1..{K - 1}, got {int(y.min())}..{int(y.max())}")
