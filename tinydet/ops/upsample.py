"""Nearest-neighbour enlargement: the top-down path of a feature pyramid."""
from tinydet import checks
from tinydet.backend import array_module


def forward(x, factor=2, size=None):
    """Repeat every pixel factor x factor times: y[n,i,j,c] = x[n, i//factor, j//factor, c] (feature pyramid: the code of AP-loss, x2).

    x: (N, H, W, C) float32 or float64. size: (height, width) of y, to meet a lateral map of odd side; the surplus on the
    bottom and right is left out, at most factor - 1 rows and columns. Default: (factor*H, factor*W).
    Returns y and cache. N = 0 gives an empty y. Raises ValueError for another size, TypeError for dtypes. On a GPU array code
    serves: one launch, backward one to three.
    """
    op = "upsample.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.small(op, 1, factor=factor)
    full = x.shape[1] * factor, x.shape[2] * factor
    size = full if size is None else tuple(size) if isinstance(size, (tuple, list)) else (size,)
    for side in size:
        checks.small(op, 0, size=side)
    if len(size) != 2 or any(not f - factor < s <= f for s, f in zip(size, full)):
        raise ValueError(f"{op}: size must be {full} or up to {factor - 1} less in each, got {size}")
    N, H, W, C = x.shape
    y = array_module(x).empty((N, H, factor, W, factor, C), x.dtype)
    y[...] = x[:, :, None, :, None]
    return y.reshape(N, *full, C)[:, :size[0], :size[1]], (x.shape, factor, size, x.dtype)


def backward(dy, cache):
    """dx[n,i,j,c] = sum of dy over the copies of that pixel.

    dy: the shape and dtype of y. Returns dx (N, H, W, C). Raises ValueError or TypeError where dy does not fit the cache.
    """
    (N, H, W, C), factor, size, dtype = cache
    checks.gradient("upsample.backward", (N, *size, C), dtype, dy)
    if size != (H * factor, W * factor):
        cut, dy = dy, array_module(dy).zeros((N, H * factor, W * factor, C), dy.dtype)
        dy[:, :size[0], :size[1]] = cut
    return dy.reshape(N, H, factor, W, factor, C).sum((2, 4))
