"""Join arrays along one axis."""
from tinydet import checks
from tinydet.backend import array_module


def forward(xs, axis=-1):
    """y = the arrays xs one after the other along `axis` (default: channels).

    xs: a sequence of at least one array, equal in dtype (float32 or float64) and in every other axis. Returns y and cache.
    Raises ValueError for shapes that do not fit or an empty sequence, TypeError for dtypes. On a GPU array code serves: each number
    is copied once, in one launch or one for each array.
    """
    op, xs = "concat.forward", list(xs)
    if not xs:
        raise ValueError(f"{op}: xs must hold at least one array, got none")
    for k, x in enumerate(xs):
        checks.float_array(op, f"xs[{k}]", x)
    checks.same_dtype(op, **{f"xs[{k}]": x for k, x in enumerate(xs)})
    ndim = xs[0].ndim
    checks.whole(op, -ndim, axis=axis)
    if axis >= ndim:
        raise ValueError(f"{op}: axis must be below {ndim}, got {axis}")
    axis %= ndim
    others = [x.shape[:axis] + x.shape[axis + 1:] for x in xs]
    if any(x.ndim != ndim or other != others[0] for x, other in zip(xs, others)):
        raise ValueError(f"{op}: shapes must agree but on axis {axis}, got {', '.join(str(x.shape) for x in xs)}")
    y = array_module(xs[0]).concatenate(xs, axis)
    return y, ([x.shape[axis] for x in xs], axis, y.shape, y.dtype)


def backward(dy, cache):
    """The gradients of xs, in order, as a list: the parts of dy (views of it).

    dy: the shape and dtype of y. Raises ValueError or TypeError where dy does not fit the cache.
    """
    sizes, axis, shape, dtype = cache
    checks.gradient("concat.backward", shape, dtype, dy)
    parts, start = [], 0
    for size in sizes:
        parts.append(dy[(slice(None),) * axis + (slice(start, start + size),)])
        start += size
    return parts
