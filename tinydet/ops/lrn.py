"""Local response normalisation across channels, as AlexNet and VGG_CNN_M have it."""
import numpy as np
from numba import njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick

BLOCK = 256             # threads of the CUDA kernels


def forward(x, size=5, alpha=1e-4, beta=0.75, k=1.0, divide_by_n=True):
    """Divide each value by a power of the energy of its neighbour channels (Oquab et al.: the released code).

    y_c = x_c * s_c^(-beta), s_c = k + a * sum_{|j - c| <= size//2} x_j^2, the window cut to the channels that exist;
    a = alpha / size if divide_by_n, else alpha. Two conventions are in use, both kept: the released code of Oquab et al. and
    Caffe divide (k = 1, the default here; VGG_CNN_M has k = 2, alpha = 5e-4); Krizhevsky's paper writes k = 2 and alpha not
    divided (unverified).
    x: (N, H, W, C) float32 or float64; size odd. Returns y, same shape and dtype, and cache. An empty x gives an empty y.
    Raises ValueError for an even size, k <= 0, alpha or beta < 0; TypeError for dtypes.
    """
    op = "lrn.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.small(op, 1, size=size)
    if size % 2 == 0:
        raise ValueError(f"{op}: size must be odd, got {size}")
    if not (0 < k < np.inf and 0 <= alpha < np.inf and 0 <= beta < np.inf):
        raise ValueError(f"{op}: k must be above 0, alpha and beta at least 0, all finite, got k {k}, alpha {alpha}, beta {beta}")
    a, beta, k = (x.dtype.type(v) for v in (alpha / size if divide_by_n else alpha, beta, k))
    if k == 0:
        raise ValueError(f"{op}: k must be above 0 in {x.dtype} too, got a smaller one")
    half = min(size // 2, x.shape[3])                                   # a wider window holds all channels anyway
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba, cuda=_forward_cuda)
    y, s = run(x, half, a, beta, k)
    return y, (x, s, half, a, beta)


def backward(dy, cache):
    """dx_c = dy_c * s_c^(-beta) - 2 * a * beta * x_c * sum_{|j - c| <= size//2} dy_j * x_j * s_j^(-beta - 1).

    dy: (N, H, W, C), the shape and dtype of x, as dx. Raises ValueError for another shape, TypeError for another dtype.
    """
    x = cache[0]
    checks.same_shape("lrn.backward", x.shape, dy=dy)
    checks.same_dtype("lrn.backward", x=x, dy=dy)
    return pick(x, numpy=_backward_numpy, numba=_backward_numba, cuda=_backward_cuda)(dy, *cache)


# NumPy

def _window_sum(x, half):
    """Sum over the channels c - half .. c + half that exist."""
    xp, C = array_module(x), x.shape[3]
    padded = xp.pad(x, ((0, 0), (0, 0), (0, 0), (half, half)))
    return sum(padded[..., j:j + C] for j in range(2 * half + 1))


def _forward_numpy(x, half, a, beta, k):
    s = k + a * _window_sum(x * x, half)
    return x * s ** -beta, s


def _backward_numpy(dy, x, s, half, a, beta):
    power = s ** -beta
    return dy * power - 2 * a * beta * x * _window_sum(dy * x * power / s, half)


# Numba: the window is short, so each one is summed anew (a running sum would lose digits)

def _forward_numba(x, half, a, beta, k):
    y, s = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    C = max(1, x.shape[3])                          # no channels: reshape(-1, 0) is refused
    _normalise(np.ascontiguousarray(x).reshape(-1, C), y.reshape(-1, C), s.reshape(-1, C), half, a, beta, k)
    return y, s


def _backward_numba(dy, x, s, half, a, beta):
    dx, C = np.empty(x.shape, x.dtype), max(1, x.shape[3])
    _gradient(np.ascontiguousarray(dy).reshape(-1, C), np.ascontiguousarray(x).reshape(-1, C), s.reshape(-1, C),
              dx.reshape(-1, C), half, 2 * a * beta, beta)
    return dx


@njit(cache=True, error_model="numpy")          # a check for division by zero would keep the loops from vector code
def _scale(x, s, beta, y):
    """y = x * s^(-beta). Two square roots do the power of the usual beta, in a third of the time."""
    if beta == 0.75:
        for c in range(len(x)):
            root = np.sqrt(s[c])
            y[c] = x[c] / (root * np.sqrt(root))
    else:
        for c in range(len(x)):
            y[c] = x[c] * s[c] ** -beta


@njit(cache=True)
def _sums(padded, C, half):
    """Of each window; the channels are the inner loop, which becomes vector code."""
    total = padded[:C].copy()
    for j in range(1, 2 * half + 1):
        near = padded[j:j + C]
        for c in range(C):
            total[c] += near[c]
    return total


@njit(cache=True, parallel=True)
def _normalise(x, y, s, half, a, beta, k):
    rows, C = x.shape
    for r in prange(rows):
        squares = np.zeros(C + 2 * half, x.dtype)
        for c in range(C):
            squares[half + c] = x[r, c] * x[r, c]
        total = _sums(squares, C, half)
        for c in range(C):
            s[r, c] = k + a * total[c]
        _scale(x[r], s[r], beta, y[r])


@njit(cache=True, parallel=True, error_model="numpy")
def _gradient(dy, x, s, dx, half, slope, beta):
    rows, C = x.shape
    for r in prange(rows):
        _scale(dy[r], s[r], beta, dx[r])
        shares = np.zeros(C + 2 * half, x.dtype)                        # dy_j * x_j * s_j^(-beta - 1)
        for c in range(C):
            shares[half + c] = dx[r, c] * x[r, c] / s[r, c]
        total = _sums(shares, C, half)
        for c in range(C):
            dx[r, c] -= slope * x[r, c] * total[c]


# CUDA: kernels/lrn.cu

def _forward_cuda(x, half, a, beta, k):
    x, y, s = array_module(x).ascontiguousarray(x), cuda.empty(x, x.shape), cuda.empty(x, x.shape)
    cuda.launch("lrn.cu", "lrn_forward", (x, y, s, x.size, x.shape[3], half, a, beta, k), threads=x.size)
    return y, s


def _backward_cuda(dy, x, s, half, a, beta):
    shared = (BLOCK + 2 * half) * x.dtype.itemsize
    if shared > cuda.PLENTY:                        # half in the thousands
        return _backward_numpy(dy, x, s, half, a, beta)
    xp = array_module(x)
    dy, x, dx = xp.ascontiguousarray(dy), xp.ascontiguousarray(x), cuda.empty(x, x.shape)
    args = dy, x, s, dx, x.size, x.shape[3], half, 2 * a * beta, beta
    cuda.launch("lrn.cu", "lrn_backward", args, threads=x.size, block=BLOCK, shared=shared)
    return dx
