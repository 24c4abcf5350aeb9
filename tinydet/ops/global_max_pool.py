"""Global max pooling: the best position of the map for every image and channel (weak supervision by a global max)."""
from tinydet import checks
from tinydet.backend import array_module


def forward(x, mask=None):
    """y[n,c] = max_{i,j} x[n,i,j,c], over the positions that mask allows (Oquab et al., CVPR 2015; notes, sec. 4.1 and 4.5).

    x: (N, H, W, C) float32 or float64. mask: bool (N, H, W, C) or (N, H, W, 1), True where the max may look: for the masked
    pooling of "strong + weak" training, where a positive class looks inside its boxes alone. Default: everywhere.
    Returns y (N, C), same dtype, and cache. Ties go to the first position in row order; an allowed NaN wins, y is NaN there.
    N = 0 gives an empty y. Raises ValueError where the map is empty, or the mask leaves an image and channel no position
    (it names both); TypeError for dtypes.
    """
    op = "global_max_pool.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    N, H, W, C = x.shape
    xp = array_module(x)
    if H * W == 0:
        raise ValueError(f"{op}: x must hold at least one position, got {x.shape}")
    flat = x.reshape(N, H * W, C)
    if mask is None:
        argmax = flat.argmax(1)
    else:
        checks.array(op, "mask", mask)
        if mask.dtype != bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
        if mask.shape not in ((N, H, W, C), (N, H, W, 1)):
            raise ValueError(f"{op}: mask must have shape {x.shape} or {(N, H, W, 1)}, got {mask.shape}")
        allowed = xp.broadcast_to(mask, x.shape).reshape(N, H * W, C)
        if not allowed.any(1).all():
            n, c = (int(k[0]) for k in xp.nonzero(~allowed.any(1)))
            raise ValueError(f"{op}: mask must allow a position for every image and channel, got none for image {n}, channel {c}")
        argmax = xp.where(allowed, flat, -xp.inf).argmax(1)
        first = allowed.argmax(1)                               # where all that is allowed is -inf, the argmax may lie outside
        argmax = xp.where(xp.take_along_axis(allowed, argmax[:, None], 1)[:, 0], argmax, first)
    return xp.take_along_axis(flat, argmax[:, None], 1)[:, 0], (x.shape, argmax, x.dtype)


def backward(dy, cache):
    """dx: dy[n,c] at the position that won, zero elsewhere: one position an image and channel learns. dy: (N, C)."""
    shape, argmax, dtype = cache
    checks.gradient("global_max_pool.backward", argmax.shape, dtype, dy)
    xp = array_module(dy)
    dx = xp.zeros((shape[0], shape[1] * shape[2], shape[3]), dy.dtype)
    n, c = xp.arange(shape[0])[:, None], xp.arange(shape[3])
    dx[n, argmax, c] = dy
    return dx.reshape(shape)
