"""Prefix sums of a flat array."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick

TILE = 2048             # items that a block of kernels/scan.cu adds up
DTYPES = ("int32", "int64", "float32", "float64")


def inclusive(x):
    """y[i] = x[0] + ... + x[i].

    x: (n,) int32, int64, float32 or float64, n < 2^31. Returns y (n,), same dtype; n = 0 gives an empty one.
    Integers wrap around. Floats are added up in float64 and rounded once, in an order that follows from n alone and differs between
    backends: y[i] is off by at most n * 2^-53 * (|x[0]| + ... + |x[i]|) before that rounding, and where x >= 0 it may be smaller than
    y[i - 1] by as much. Raises TypeError for other dtypes, ValueError for shapes.
    """
    return _scan("scan.inclusive", x, True)


def exclusive(x):
    """y[i] = x[0] + ... + x[i - 1], y[0] = 0: where the i-th of parts of lengths x begins. All else as in inclusive."""
    return _scan("scan.exclusive", x, False)


def _scan(op, x, inclusive):
    checks.array(op, "x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {x.dtype}")
    if x.ndim != 1 or len(x) >= 2**31:
        raise ValueError(f"{op}: x must have shape (n,), n < 2^31, got {x.shape}")
    return pick(x, numpy=_scan_numpy, cuda=_scan_cuda)(x, inclusive)        # NumPy's is a compiled loop, so Numba has no own


def _scan_numpy(x, inclusive):
    y = np.cumsum(x, dtype=np.float64 if x.dtype.kind == "f" else x.dtype).astype(x.dtype)
    if not inclusive:
        y[1:], y[:1] = y[:-1].copy(), 0
    return y


# CUDA: kernels/scan.cu, one launch for up to 2048 items, three for up to 4 million, then five

def _scan_cuda(x, inclusive):
    x, tiles = array_module(x).ascontiguousarray(x), -(-len(x) // TILE)
    y, totals = cuda.empty(x, x.shape), cuda.empty(x, (tiles,), np.float64 if x.dtype.kind == "f" else np.int64)
    if tiles > 1:
        cuda.launch("scan.cu", "scan_totals", (x, totals, len(x)), grid=tiles)
        totals = _scan_cuda(totals, False)
    cuda.launch("scan.cu", "scan_write", (x, totals, y, len(x), inclusive), grid=tiles)
    return y
