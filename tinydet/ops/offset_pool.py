"""Offset max-pooling and the interleaving of its maps: how OverFeat recovers the resolution of the last pooling."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module
from tinydet.ops import max_pool


def forward(x, size):
    """Max over the size x size tile at every offset (OverFeat, sec. 3.3): a max pool of stride 1.

    s[n,i,j,c] = max_{u,v < size} x[n, i + u, j + v, c]; the pooled map of offset (oy, ox) is the view s[:, oy::size, ox::size].
    x: (N, H, W, C) float32 or float64. Returns s (N, H - size + 1, W - size + 1, C), same dtype, and cache.
    Ties go to the first pixel in row order; NaN in a tile gives NaN. Raises ValueError if x holds no complete tile.
    """
    return max_pool.pool("offset_pool.forward", x, size, 1, on_gpu=_forward_cuda)


def backward(ds, cache):
    """dx (N, H, W, C) of forward, ds's dtype. A pixel can win up to size*size tiles, one for each offset: their gradients are added.

    ds: the shape and dtype of s; pixels that won no tile get 0. Raises ValueError for another shape, TypeError for another dtype.
    """
    op, dtype = "offset_pool.backward", cache[-1]
    checks.float_array(op, "ds", ds)
    checks.same_shape(op, cache[3].shape, ds=ds)
    if ds.dtype != dtype:
        raise TypeError(f"{op}: ds must be {dtype}, as the result was, got {ds.dtype}")
    return max_pool.unpool(ds, cache, on_gpu=_backward_cuda)


def offsets(size):
    """All (oy, ox) in row order: 0 <= oy, ox < size."""
    return [(oy, ox) for oy in range(size) for ox in range(size)]


def split(s, size):
    """The size*size maps of s, views s[:, oy::size, ox::size] in the order of offsets(). The inverse of interleave.

    s: (N, H, W, C). Maps may differ in size by one, and are empty for offsets at or past the end of s.
    Raises ValueError for another number of axes or size < 1, TypeError unless s holds floats.
    """
    checks.float_array("offset_pool.split", "s", s, "(N, H, W, C)")
    checks.whole("offset_pool.split", 1, size=size)
    return [s[:, oy::size, ox::size] for oy, ox in offsets(size)]


def interleave(maps, size):
    """One map of fine stride from the size*size maps of the offsets (OverFeat, sec. 3.3, Fig. 3): F[size*i + oy] = O[oy][i].

    maps: size*size arrays (N, h, w, C) in the order of offsets(); sizes may differ by one, as split() makes them.
    Returns F (N, sum of the heights of one column of offsets, likewise the width, C), the first map's dtype: no gaps for any size.
    Raises ValueError if the number or the shapes of the maps fit no single map.
    """
    checks.whole("offset_pool.interleave", 1, size=size)
    if len(maps) != size * size:
        raise ValueError(f"offset_pool.interleave: size {size} needs {size * size} maps, got {len(maps)}")
    H, W = sum(m.shape[1] for m in maps[::size]), sum(m.shape[2] for m in maps[:size])
    F = array_module(maps[0]).zeros((len(maps[0]), H, W, maps[0].shape[3]), maps[0].dtype)
    for view, m in zip(split(F, size), maps):
        if view.shape != m.shape:
            raise ValueError(f"offset_pool.interleave: maps of {[m.shape[1:3] for m in maps]} are not the split of one map")
        view[...] = m
    return F


# NumPy and Numba: max_pool.py. CUDA: kernels/offset_pool.cu

def _launch(kernel, arrays, H, W, C, size, shape):
    """A thread does 8 rows of `shape` where the kernel knows the size, else 4 (ROWS of the kernel file)."""
    known = size if size == 3 else 0
    cuda.launch("offset_pool.cu", kernel, (*arrays, H, W, C, size), SIZE=known, **max_pool.strips(shape, 8 if known else 4))


def _forward_cuda(x, shape, size, *_):
    x, s = array_module(x).ascontiguousarray(x), cuda.empty(x, shape)
    argmax = cuda.empty(x, shape, np.min_scalar_type(size * size - 1))
    _launch("offset_pool_forward", (x, s, argmax), *x.shape[1:], size, shape)
    return s, argmax


def _backward_cuda(ds, shape, size, stride, argmax, *_):
    ds, dx = array_module(ds).ascontiguousarray(ds), cuda.empty(ds, shape)
    _launch("offset_pool_backward", (ds, argmax, dx), *shape[1:], size, shape)
    return dx
