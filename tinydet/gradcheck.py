"""Hand-written gradients against central differences: every element of small inputs, in float64."""
import numpy as np

from tinydet.backend import to_numpy


def check_grad(forward, backward, inputs, put=np.asarray, dy=None, eps=1e-5, bound=1e-6, seed=0):
    """Compare backward with central differences of L = sum y * dy, element by element (style: tests of every op).

    numerical[i] = sum dy * (y(x + eps at i) - y(x - eps at i)) / (2 * eps)
    forward(*inputs) returns y and cache, then anything (batch statistics, say), which is ignored; backward(dy, cache)
    returns one gradient, or a tuple with one for each input in order. inputs: list of finite float64 arrays, kept away
    from kinks by more than eps; `put` moves them to the backend. dy: the shape of y, None draws signed numbers from seed
    (all-ones would hide errors that cancel). Returns the worst relative error, max|a - n| / max(1, max|n|) of an input.
    Raises AssertionError naming the input, the index and both values where the error exceeds bound, also for a gradient
    of the wrong number, shape or dtype or that is not finite, and where forward or backward changed its arguments.
    TypeError or ValueError where the inputs or dy themselves are unfit.
    """
    op = "gradcheck.check_grad"
    for k, x in enumerate(inputs):
        _require_float64(f"{op}: input {k}", x)
    xs = [np.array(to_numpy(x)) for x in inputs]                        # copies: nobody else holds these

    given = [put(x.copy()) for x in xs]
    y, cache = forward(*given)[:2]
    _unchanged("forward", given, xs)
    _expect(f"{op}: y", y, None)
    dy = np.random.default_rng(seed).standard_normal(y.shape) if dy is None else dy
    _require_float64(f"{op}: dy", dy)
    dy = np.array(to_numpy(dy))
    if dy.shape != y.shape:
        raise ValueError(f"{op}: dy must have the shape of y {y.shape}, got {dy.shape}")
    given_dy = put(dy.copy())
    grads = backward(given_dy, cache)
    _unchanged("backward", [*given, given_dy], [*xs, dy])
    grads = list(grads) if isinstance(grads, (tuple, list)) else [grads]
    if len(grads) != len(xs):
        raise AssertionError(f"{op}: backward must return one gradient for each of {len(xs)} inputs, got {len(grads)}")

    worst = 0.0
    for k, (x, a) in enumerate(zip(xs, grads)):
        _expect(f"{op}: gradient of input {k}", a, x.shape)
        a, n = to_numpy(a), np.empty(x.shape)
        for i in np.ndindex(x.shape):
            high, low = (to_numpy(_nudged(forward, xs, k, i, step, put)) for step in (eps, -eps))
            n[i] = ((high - low) * dy).sum() / (2 * eps)
        if not x.size:
            continue
        i = tuple(int(j) for j in np.unravel_index(np.abs(a - n).argmax(), x.shape))
        error = float(abs(a[i] - n[i]) / max(1, np.abs(n).max()))
        if not error <= bound:
            raise AssertionError(f"{op}: gradient of input {k} at {i} must be {n[i]:.9g} (central difference), "
                                 f"got {a[i]:.9g} from backward; relative error {error:.3g}, bound {bound:.3g}")
        worst = max(worst, error)
    return worst


def check_loss(loss, inputs, put=np.asarray, eps=1e-5, bound=1e-6):
    """As check_grad for a loss that returns its value and its gradient together: loss(*inputs) -> value, dx (one per input).

    value: one number; arguments, result and errors as in check_grad. Fixed arguments go into a lambda:
    check_loss(lambda x: softmax_loss.loss(x, labels), [x]).
    """
    def forward(*inputs):
        value, *grads = loss(*inputs)
        return np.asarray(value), grads
    return check_grad(forward, lambda dy, grads: grads, inputs, put, np.ones(()), eps, bound)


def _nudged(forward, xs, k, i, step, put):
    """y with element i of input k moved by step."""
    moved = [x.copy() for x in xs]
    moved[k][i] += step
    return forward(*(put(x) for x in moved))[0]


def _require_float64(name, x):
    if getattr(x, "dtype", None) != np.float64:
        raise TypeError(f"{name} must be a float64 array, got {getattr(x, 'dtype', type(x).__name__)}")
    if not np.isfinite(to_numpy(x)).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _expect(name, a, shape):
    """Blame the op under test: what it returned must be a finite float64 array of that shape."""
    if getattr(a, "dtype", None) != np.float64:
        raise AssertionError(f"{name} must be a float64 array, got {getattr(a, 'dtype', type(a).__name__)}")
    if shape is not None and a.shape != shape:
        raise AssertionError(f"{name} must have shape {shape}, got {a.shape}")
    if not np.isfinite(to_numpy(a)).all():
        at = tuple(int(j) for j in np.argwhere(~np.isfinite(to_numpy(a)))[0])
        raise AssertionError(f"{name} must be finite, got {to_numpy(a)[at]} at {at}")


def _unchanged(function, given, kept):
    for k, (a, b) in enumerate(zip(given, kept)):
        if not np.array_equal(to_numpy(a), b):
            which = f"input {k}" if function == "forward" or k < len(given) - 1 else "dy"
            raise AssertionError(f"gradcheck.check_grad: {function} must not change its arguments, got a changed {which}")
