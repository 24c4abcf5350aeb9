"""Fully connected layer."""
from tinydet import checks


def forward(x, w, b):
    """y = x @ w + b: every output sees every input (FC layers of AlexNet and Fast R-CNN; as a convolution: conv.py).

    y[r,o] = b[o] + sum_c x[r,c] * w[c,o]. x: (R, C), w: (C, Cout), b: (Cout,), one dtype, float32 or float64.
    Returns y (R, Cout), same dtype, and cache. R = 0 gives an empty y. Raises ValueError for shapes, TypeError for dtypes.
    On a GPU array code serves: cuBLAS does the products.
    """
    op = "linear.forward"
    checks.float_array(op, "x", x, "(R, C)")
    checks.float_array(op, "w", w, f"({x.shape[1]}, Cout)")
    checks.float_array(op, "b", b, f"({w.shape[1]},)")
    checks.same_dtype(op, x=x, w=w, b=b)
    return x @ w + b, (x, w)


def backward(dy, cache, need_dw=True):
    """dx = dy @ w^T, dw = x^T @ dy, db = sum_r dy. need_dw=False skips dw and db (None), as for a frozen layer.

    dy: (R, Cout), the dtype of x. Raises ValueError or TypeError where dy does not fit the cache.
    """
    x, w = cache
    checks.same_shape("linear.backward", (len(x), w.shape[1]), dy=dy)
    checks.same_dtype("linear.backward", x=x, dy=dy)
    return dy @ w.T, x.T @ dy if need_dw else None, dy.sum(0) if need_dw else None
