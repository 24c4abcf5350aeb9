"""Global max pooling: the best position of the map for every image and channel (weak supervision by a global max)."""
import numpy as np

from tinydet import checks, cuda
from tinydet.backend import array_module, pick


def forward(x, mask=None):
    """y[n,c] = max_{i,j} x[n,i,j,c], over the positions that mask allows (Oquab et al., CVPR 2015; the released code).

    x: (N, H, W, C) float32 or float64. mask: bool (N, H, W, C) or (N, H, W, 1), True where the max may look: for the masked
    pooling of "strong + weak" training (unverified), where a positive class looks inside its boxes alone. Default: everywhere.
    Returns y (N, C), same dtype, and cache. Ties go to the first position in row order; an allowed NaN wins, y is NaN there.
    N = 0 gives an empty y. Raises ValueError where the map is empty, or the mask leaves an image and channel no position
    (it names both; arrays on a GPU are not looked at: y is NaN there, dx 0); TypeError for dtypes.
    """
    op = "global_max_pool.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    N, H, W, C = x.shape
    if H * W == 0:
        raise ValueError(f"{op}: x must hold at least one position, got {x.shape}")
    if mask is not None:
        checks.array(op, "mask", mask)
        if mask.dtype != bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
        if mask.shape not in ((N, H, W, C), (N, H, W, 1)):
            raise ValueError(f"{op}: mask must have shape {x.shape} or {(N, H, W, 1)}, got {mask.shape}")
        if checks.on_host(mask) and not mask.any((1, 2)).all():
            n, c = (int(k[0]) for k in np.nonzero(~np.broadcast_to(mask, x.shape).any((1, 2))))
            raise ValueError(f"{op}: mask must allow a position for every image and channel, got none for image {n}, channel {c}")
    y, argmax = pick(x, numpy=_forward_numpy, cuda=_forward_cuda)(x, mask)
    return y, (x.shape, argmax, x.dtype)


def backward(dy, cache):
    """dx (N, H, W, C): dy[n,c] at the position that won, zero elsewhere: one position an image and channel learns.

    dy: (N, C), the dtype of x, as dx. Raises ValueError for another shape, TypeError for another dtype.
    """
    shape, argmax, dtype = cache
    checks.gradient("global_max_pool.backward", argmax.shape, dtype, dy)
    return pick(dy, numpy=_backward_numpy, cuda=_backward_cuda)(dy, shape, argmax)


# NumPy, also for Numba: array code is the fast form

def _forward_numpy(x, mask):
    N, H, W, C = x.shape
    flat = x.reshape(N, H * W, C)
    if mask is None:
        argmax = flat.argmax(1)
    else:
        allowed = np.broadcast_to(mask, x.shape).reshape(flat.shape)
        argmax = np.where(allowed, flat, -np.inf).argmax(1)
        first = allowed.argmax(1)                               # where all that is allowed is -inf, the argmax may lie outside
        argmax = np.where(np.take_along_axis(allowed, argmax[:, None], 1)[:, 0], argmax, first)
    return np.take_along_axis(flat, argmax[:, None], 1)[:, 0], argmax


def _backward_numpy(dy, shape, argmax):
    N, H, W, C = shape
    dx = np.zeros((N, H * W, C), dy.dtype)
    dx[np.arange(N)[:, None], argmax, np.arange(C)] = dy
    return dx.reshape(shape)


# CUDA: kernels/global_max_pool.cu

def _forward_cuda(x, mask):
    xp, (N, H, W, C) = array_module(x), x.shape
    x, y, argmax = xp.ascontiguousarray(x), cuda.empty(x, (N, C)), cuda.empty(x, (N, C), np.int32)
    M, mask = (0, cuda.empty(x, 1, bool)) if mask is None else (mask.shape[3], xp.ascontiguousarray(mask))
    cuda.launch("global_max_pool.cu", "global_max_pool_forward", (x, mask, y, argmax, H * W, C, M), grid=N * -(-C // 32), block=(32, 16))
    return y, argmax


def _backward_cuda(dy, shape, argmax):
    dy, dx = array_module(dy).ascontiguousarray(dy), cuda.empty(dy, shape)
    args = dy, argmax, dx, dx.size, shape[1] * shape[2], shape[3]
    cuda.launch("global_max_pool.cu", "global_max_pool_backward", args, threads=dx.size)
    return dx
