"""Hand-written gradients against central differences: every element of small inputs, in float64."""
from pathlib import Path

import numpy as np

from tinydet.backend import to_numpy


def check_grad(forward, backward, inputs, put=np.asarray, dy=None, eps=1e-5, bound=1e-6, seed=0):
    """Compare backward with central differences of L = sum y * dy, element by element.

    numerical[i] = sum dy * (y(x + eps at i) - y(x - eps at i)) / (2 * eps)
    forward(*inputs) returns y and cache, then anything (batch statistics, say), which is ignored; backward(dy, cache)
    returns one gradient, or a tuple or list with one for each input in order. y: an array, or a list of arrays (or of lists) of a
    net with several outputs; backward then gets dy as such a list. inputs: list of finite float64 arrays, kept away
    from kinks by more than eps; `put` moves them to the backend. dy: the shape of y, None draws signed numbers from seed
    (all-ones would hide errors that cancel). Returns the worst relative error, max|a - n| / max(1, max|n|) of an input.
    Then backward runs again, on the same cache, after all those forwards: the same dy must give the same gradient, -dy its negative.
    Raises AssertionError naming the input, the index and both values where the error exceeds bound, also for a gradient
    of the wrong number, shape or dtype or that is not finite, where forward or backward changed its arguments, or where a cache
    was changed by a backward or a later forward. TypeError or ValueError where the inputs or dy themselves are unfit.
    """
    return _check(forward, backward, inputs, put, dy, eps, bound, seed, linear=True)


def check_loss(loss, inputs, put=np.asarray, eps=1e-5, bound=1e-6):
    """As check_grad for a loss that returns its value and its gradient together: loss(*inputs) -> value, dx (one per input).

    value: one number; arguments, result and errors (which name check_grad) as there. Fixed arguments go into a lambda:
    check_loss(lambda x: softmax_loss.loss(x, labels), [x]).
    """
    def forward(*inputs):
        value, *grads = loss(*inputs)
        return np.asarray(to_numpy(value)), grads
    return _check(forward, lambda dy, grads: grads, inputs, put, np.ones(()), eps, bound, 0, linear=False)


def _check(forward, backward, inputs, put, dy, eps, bound, seed, linear):
    """linear: whether the gradient must follow the sign of dy; a loss gives it for dy = 1 only."""
    op = "gradcheck.check_grad"
    for k, x in enumerate(inputs):
        _require_float64(f"{op}: input {k}", x)
    xs = [np.array(to_numpy(x)) for x in inputs]                        # copies: nobody else holds these

    given = [put(x.copy()) for x in xs]
    y, cache = forward(*given)[:2]
    _unchanged("forward", given, xs)
    ys = _flat(y)
    for k, a in enumerate(ys):
        _expect(f"{op}: y{f'[{k}]' if isinstance(y, (list, tuple)) else ''}", a, None)
    if dy is None:
        rng = np.random.default_rng(seed)
        dys = [rng.standard_normal(a.shape) for a in ys]
    else:
        dys = _flat(dy)
        if len(dys) != len(ys):
            raise ValueError(f"{op}: dy must hold an array for each of {len(ys)} outputs, got {len(dys)}")
    for d, a in zip(dys, ys):
        _require_float64(f"{op}: dy", d)
        if d.shape != a.shape:
            raise ValueError(f"{op}: dy must have the shape of y {a.shape}, got {d.shape}")
    dys = [np.array(to_numpy(d)) for d in dys]

    def gradients(sign=1):
        given_dys = [put(sign * d) for d in dys]
        found = backward(_like(y, iter(given_dys)), cache)
        _unchanged("backward", [*given, *given_dys], [*xs, *(sign * d for d in dys)], len(xs))
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        if len(found) != len(xs):
            raise AssertionError(f"{op}: backward must return one gradient for each of {len(xs)} inputs, got {len(found)}")
        for k, (a, x) in enumerate(zip(found, xs)):
            _expect(f"{op}: gradient of input {k}", a, x.shape)
        return [np.array(to_numpy(a)) for a in found]

    grads, worst = gradients(), 0.0
    for k, (x, a) in enumerate(zip(xs, grads)):
        n = np.empty(x.shape)
        for i in np.ndindex(x.shape):
            high, low = (_nudged(forward, xs, k, i, step, put) for step in (eps, -eps))
            n[i] = sum(((h - l) * d).sum() for h, l, d in zip(high, low, dys)) / (2 * eps)
        if not x.size:
            continue
        i = tuple(int(j) for j in np.unravel_index(np.abs(a - n).argmax(), x.shape))
        error = float(abs(a[i] - n[i]) / max(1, np.abs(n).max()))
        if not error <= bound:
            raise AssertionError(f"{op}: gradient of input {k} at {i} must be {n[i]:.9g} (central difference), "
                                 f"got {a[i]:.9g} from backward; relative error {error:.3g}, bound {bound:.3g}")
        worst = max(worst, error)
    for sign in (1, -1) if linear else (1,):
        for k, (first, again) in enumerate(zip(grads, gradients(sign))):
            if np.abs(first - sign * again).max(initial=0) > 1e-9 * max(1, np.abs(first).max(initial=0)):
                raise AssertionError(f"{op}: backward must give the same gradient of input {k} again, and its negative for -dy, whatever ran in "
                                     f"between; for {'-' * (sign < 0)}dy it does not: it, or a later forward, changed the cache, or it ignores dy")
    return worst


def _flat(y):
    """The arrays of y, an array or a list (or tuple) of such, in order."""
    return [a for part in y for a in _flat(part)] if isinstance(y, (list, tuple)) else [y]


def _like(y, arrays):
    """The next arrays of an iterator, in lists as y has them."""
    return [_like(part, arrays) for part in y] if isinstance(y, (list, tuple)) else next(arrays)


def _nudged(forward, xs, k, i, step, put):
    """The outputs with element i of input k moved by step, as a flat list."""
    moved = [x.copy() for x in xs]
    moved[k][i] += step
    return [to_numpy(a) for a in _flat(forward(*(put(x) for x in moved))[0])]


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


def _unchanged(function, given, kept, inputs=None):
    """Blame the op under test if it changed what it was given: `inputs` arrays, then the dy."""
    for k, (a, b) in enumerate(zip(given, kept)):
        if not np.array_equal(to_numpy(a), b):
            which = f"input {k}" if inputs is None or k < inputs else "dy"
            raise AssertionError(f"gradcheck.check_grad: {function} must not change its arguments, got a changed {which}")


# python -m tinydet.gradcheck: the proof of the whole engine

BOUND = 1e-6            # of float64 gradients, losses and updates
DRAWS = 4               # seeds 0, 1, ... a case is drawn from


def check_case(case, put, float32=False):
    """Prove one case of tinydet.cases on the backend in use. Returns the worst error over its draws, and the bound it must keep."""
    bound, worst = case.float32 if float32 else BOUND, 0.0
    for seed in range(DRAWS):
        drawn = case.draw(np.random.default_rng(seed))
        if float32:
            error = _float32_error(case.kind, drawn, put)
        elif case.kind == "definition":
            error = max(_distance(got, expected) for got, expected in drawn)
        else:
            error = (check_grad if case.kind == "gradient" else check_loss)(*drawn, put=put, bound=bound)
        if not error <= bound:
            raise AssertionError(f"error {error:.3g} must be at most {bound:.3g} (draw {seed})")
        worst = max(worst, error)
    return worst, bound


def _float32_error(kind, drawn, put):
    """Worst distance of results and gradients in float32 from those in float64, for the same float32 inputs."""
    *functions, inputs = drawn
    inputs = [x.astype(np.float32) for x in inputs]
    results = {}
    for dtype in (np.float32, np.float64):
        xs = [put(x.astype(dtype)) for x in inputs]
        if kind == "loss":
            value, *grads = functions[0](*xs)
            results[dtype] = [np.asarray(to_numpy(value), dtype), *grads]
        else:
            y, cache = functions[0](*xs)[:2]
            dy = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32).astype(dtype)
            grads = functions[1](put(dy), cache)
            results[dtype] = [y, *(grads if isinstance(grads, (tuple, list)) else [grads])]
        if wrong := [a.dtype for a in results[dtype] if a.dtype != dtype]:
            raise AssertionError(f"results for {np.dtype(dtype)} inputs must be {np.dtype(dtype)}, got {wrong[0]}")
    return max(_distance(a, b) for a, b in zip(results[np.float32], results[np.float64]))


def _distance(got, expected):
    """max|got - expected| / max(1, max|expected|); infinite where shapes differ or a number is none."""
    got, expected = to_numpy(got), to_numpy(expected)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - expected).max(initial=0) / max(1, np.abs(expected).max(initial=0)))


def main(arguments=None):
    """Prove every case on every backend asked for, print the table, return the exit status."""
    import argparse
    import json
    import sys

    from tinydet import files
    from tinydet.backend import BACKENDS, available, missing, use
    from tinydet.cases import CASES

    parser = argparse.ArgumentParser(prog="python -m tinydet.gradcheck", description=(
        "Compare every hand-written gradient with central differences (float64), float32 results of ops and losses with float64 ones, and "
        "updates that are no derivative with their definition. Exit status 1 if anything fails."))
    parser.add_argument("--backend", choices=BACKENDS, help="this one only; default: every backend of this machine")
    parser.add_argument("--op", metavar="NAME", choices=sorted({c.op for c in CASES}), help="this op, layer or optimiser only")
    parser.add_argument("--json", metavar="OUT", help="write the rows to this file too")
    args = parser.parse_args(arguments)
    if args.backend and (lacks := missing(args.backend)):
        parser.error(f"--backend {args.backend} cannot run here: {lacks}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"the folder of --json {args.json} must exist")

    rows, line = [], "{:<15} {:<40} {:<11} {:<6} {:<8} {:>9} {:>8}  {}"
    print(line.format("op", "case", "kind", "on", "dtype", "error", "bound", "verdict"))
    for case in CASES:
        if args.op in (None, case.op):
            for row in _rows(case, [args.backend] if args.backend else available(), use):
                rows.append(row)
                error, bound = ("" if row[k] is None else f"{row[k]:.1e}" for k in ("error", "bound"))
                print(line.format(row["op"], row["case"], row["kind"], row["backend"], row["dtype"], error, bound, row["verdict"]), flush=True)
    failed = sum(row["verdict"].startswith("FAILED") for row in rows)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in ("gradient", "loss", "definition", "no gradient")}
    print(f"{len(rows)} rows ({', '.join(f'{n} {kind}' for kind, n in counts.items())}): {failed or 'none'} failed")
    if args.json:
        files.write(args.json, json.dumps({"numpy": np.__version__, "failed": failed, "rows": rows}, indent=1) + "\n")
        print(f"wrote {args.json}", file=sys.stderr)
    return 1 if failed else 0


def _rows(case, backends, use):
    """The rows of a case: one a backend and dtype."""
    told = {"op": case.op, "case": case.what, "kind": case.kind}
    if case.draw is None:
        yield {**told, "backend": "", "dtype": "", "error": None, "bound": None, "verdict": case.why}
        return
    for backend in (b for b in backends if b in case.on):
        for dtype in ("float64", "float32")[:1 if case.float32 is None else 2]:
            error = bound = None
            try:
                with use(backend) as put:
                    error, bound = check_case(case, put, dtype == "float32")
                verdict = "ok"
            except Exception as problem:                                # the table goes on: every failure is shown
                verdict = f"FAILED: {type(problem).__name__}: {problem}"
            yield {**told, "backend": backend, "dtype": dtype, "error": error, "bound": bound, "verdict": verdict}


if __name__ == "__main__":
    raise SystemExit(main())
