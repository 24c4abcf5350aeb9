"""Stable sorting."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick
from tinydet.ops import scan

BLOCK = 2048            # keys that kernels/sort.cu sorts in one block
BLOCKS = 4096           # at most, in a pass over more: its table has 256 numbers for each
DTYPES = ("int32", "int64", "float32", "float64")


def argsort(keys, descending=False):
    """Indices that sort keys: keys[order] rises (or falls). Stable: equal keys stay in order of index, -0.0 equals 0.0.

    NaN comes last either way, all of it counting as equal (NumPy's rule for rising order).
    keys: (n,) float32, float64, int32 or int64, n < 2^31. Returns order (n,), int32 on every backend; n = 0 gives an empty one.
    On a GPU nothing waits for the host; scratch memory: two arrays as large as keys and one of order. Raises TypeError for other
    dtypes, ValueError for shapes.
    """
    op = "sort.argsort"
    checks.array(op, "keys", keys)
    if keys.dtype not in DTYPES:
        raise TypeError(f"{op}: keys must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {keys.dtype}")
    if keys.ndim != 1 or len(keys) >= 2**31:
        raise ValueError(f"{op}: keys must have shape (n,), n < 2^31, got {keys.shape}")
    return pick(keys, numpy=_argsort_numpy, cuda=_argsort_cuda)(keys, bool(descending))     # NumPy's is compiled, so Numba has no own


def _argsort_numpy(keys, descending):
    if descending:
        keys = -keys if keys.dtype.kind == "f" else ~keys           # - would leave the smallest integer where it is
    return np.argsort(keys, kind="stable").astype(np.int32)


# CUDA: kernels/sort.cu, one launch for up to 2048 keys, else 4 passes for 4-byte keys and 8 for 8-byte ones, of 3 launches each
# (5 beyond 16 384 keys)

def _argsort_cuda(keys, descending):
    n, size, floating = len(keys), keys.itemsize, keys.dtype.kind == "f"
    bits = array_module(keys).ascontiguousarray(keys).view(np.uint32 if size == 4 else np.uint64)
    order = cuda.empty(bits, n, np.int32)
    if n <= BLOCK:
        cuda.launch("sort.cu", "sort_block", (bits, order, n, floating, descending), grid=min(n, 1))
        return order
    rounds = max(8, -(-n // (256 * BLOCKS)))
    blocks = -(-n // (256 * rounds))
    words, moved_words, moved_order = cuda.empty(bits, n), cuda.empty(bits, n), cuda.empty(bits, n, np.int32)
    table = cuda.empty(bits, 256 * blocks, np.int32)
    cuda.launch("sort.cu", "sort_words", (bits, words, n, floating, descending), threads=n)
    for shift in range(0, 8 * size, 8):
        cuda.launch("sort.cu", "sort_count", (words, table, n, shift, rounds), grid=blocks)
        starts = scan.exclusive(table)
        cuda.launch("sort.cu", "sort_scatter", (words, order, starts, moved_words, moved_order, n, shift, rounds), grid=blocks)
        words, moved_words, order, moved_order = moved_words, words, moved_order, order
    return order
