"""One sweep over all ops, layers, losses and optimisers: the table of `python -m tinydet.gradcheck`, and what every one must keep."""
import inspect
import json
import pkgutil
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import tinydet.ops
from conftest import BACKENDS, RUNNING
from tinydet import cases, cuda, gradcheck, layers, optim, to_numpy, use
from tinydet.backend import put
from tinydet.cases import CASES, Case

DIFFERENTIABLE = [c for c in CASES if c.kind in ("gradient", "loss")]
each = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: f"{c.op} {c.what}".strip())


def drawn(case, seed=0):
    """forward, backward and inputs of a case, for the backend in use; a loss as a forward whose cache is its gradients."""
    *functions, inputs = case.draw(np.random.default_rng(seed))
    if case.kind == "gradient":
        return *functions, inputs

    def forward(*xs):
        value, *grads = functions[0](*xs)
        return np.asarray(to_numpy(value)), grads
    return forward, lambda dy, grads: grads, inputs


def flat(y):
    """Copies of an array, or of all arrays of a list."""
    return [np.array(to_numpy(a)) for a in (y if isinstance(y, (list, tuple)) else [y])]


def signed(y, seed=9, view=lambda d: d):
    """An upstream gradient for y, of both signs, on the backend in use; as `view` shows it."""
    rng = np.random.default_rng(seed)
    dys = [put(view(rng.standard_normal(a.shape).astype(a.dtype))) for a in flat(y)]
    return dys if isinstance(y, (list, tuple)) else dys[0]


# The list is complete

def test_every_op_layer_and_optimiser_has_a_case():
    named = {c.op for c in CASES}
    assert {m.name for m in pkgutil.iter_modules(tinydet.ops.__path__)} <= named
    classes = {k for k, c in vars(layers).items() if isinstance(c, type) and issubclass(c, layers.Layer) and "forward" in vars(c)}
    assert classes == cases.LAYERS.keys() <= named
    own = {k: f for k, f in vars(optim).items() if getattr(f, "__module__", "") == "tinydet.optim" and not k.startswith("_")}
    optimisers = {k for k, c in own.items() if isinstance(c, type) and k != "Optimizer"}
    functions = {k for k, f in own.items() if inspect.isfunction(f)}
    assert optimisers and optimisers <= named and functions <= named | {"step_schedule", "cosine_schedule"}      # these two: "schedules"


def test_every_loss_and_every_differentiable_op_is_proved_by_differences():
    """An op with a backward has a gradient case, a loss file a loss case: none hides among those without gradient."""
    for module in pkgutil.iter_modules(tinydet.ops.__path__):
        functions = vars(__import__(f"tinydet.ops.{module.name}", fromlist="x"))
        kinds = {c.kind for c in CASES if c.op == module.name}
        assert ("gradient" in kinds) == ("backward" in functions), module.name
        assert ("loss" in kinds) == module.name.endswith("_loss"), module.name
        assert ("no gradient" in kinds) == (not kinds & {"gradient", "loss"}), module.name


def test_every_op_has_a_kernel_or_says_why_it_needs_none():
    for module in pkgutil.iter_modules(tinydet.ops.__path__):
        text = inspect.getsource(__import__(f"tinydet.ops.{module.name}", fromlist="x"))
        assert (f"{module.name}.cu" in cuda.files()) == (f'launch("{module.name}.cu"' in text), module.name
        assert f"{module.name}.cu" in cuda.files() or re.search(r"\b[Oo]n (a|the) GPU\b|\bhost\b", text), module.name
    assert {f.removesuffix(".cu") for f in cuda.files()} <= {m.name for m in pkgutil.iter_modules(tinydet.ops.__path__)} | {"sgd"}


# What every op must keep

@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_strides_do_not_matter(backend, case):
    """Fortran order, reversed and strided views give the same numbers as contiguous copies, forward and backward."""
    def spread(x):
        big = np.full(tuple(2 * s for s in x.shape), np.nan)
        big[(slice(None, None, 2),) * x.ndim] = x
        return big[(slice(None, None, 2),) * x.ndim]
    with use(backend) as put:
        forward, backward, inputs = drawn(case)
        y, cache = forward(*(put(x.copy()) for x in inputs))[:2]
        dy = signed(y)
        expected = flat(y) + flat(backward(dy, cache))
        for view in (np.asfortranarray, lambda x: np.flip(np.flip(x).copy()), spread):
            y, cache = forward(*(put(view(x)) for x in inputs))[:2]
            found = flat(y) + flat(backward(signed(y, view=view), cache))
            for a, b in zip(found, expected, strict=True):
                assert_allclose(a, b, rtol=1e-12, atol=1e-12)           # BLAS may add in another order


@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_a_second_forward_leaves_the_first_cache_and_result_alone(backend, case):
    """A shared head runs several times before any backward: nothing in a cache may live in a workspace that a later call fills."""
    with use(backend) as put:
        forward, backward, inputs = drawn(case)
        count = {"Shared": 2}.get(case.op, 1) if case.op in cases.LAYERS else len(inputs)      # a layer's parameters stay
        others = [[change(x) for x in inputs[:count]] + inputs[count:] for change in (lambda x: x + 1, lambda x: x[::-1].copy())]
        y, cache = forward(*(put(x.copy()) for x in inputs))[:2]
        dy = signed(y)
        expected = flat(y) + flat(backward(dy, cache))
        y, cache = forward(*(put(x.copy()) for x in inputs))[:2]
        later = [forward(*(put(x.copy()) for x in other))[:2] for other in others]
        for other_y, other_cache in later:
            backward(signed(other_y, 3), other_cache)
        for a, b in zip(flat(y) + flat(backward(dy, cache)), expected, strict=True):
            assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_backward_may_run_twice(backend, case):
    """It changes neither its cache nor what it was given, so the same dy gives the same gradients again."""
    with use(backend) as put:
        forward, backward, inputs = drawn(case)
        y, cache = forward(*(put(x.copy()) for x in inputs))[:2]
        dy = signed(y)
        kept = flat(dy)
        first = flat(backward(dy, cache))
        for a, b in zip(first + kept, flat(backward(dy, cache)) + flat(dy), strict=True):
            assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "gradient" and c.op not in cases.LAYERS], ids=lambda c: f"{c.op} {c.what}".strip())
def test_backward_refuses_what_is_no_gradient_of_its_result(case):
    forward, backward, inputs = drawn(case)
    y, cache = forward(*inputs)[:2]
    for dy, error, message in ((np.ones(y.shape, int), TypeError, r"d[sy] must be float32 or float64, got int64|dtypes must agree"),
                               (np.ones((*y.shape, 2)), ValueError, r"d[sy] must have shape"), ([1.0], TypeError, "d[sy] must be an array, got list")):
        with pytest.raises(error, match=rf"^\w+\.backward: .*({message})"):
            backward(dy, cache)
    with pytest.raises(TypeError, match=r"^\w+\.backward: (d[sy] must be float64, as the result was, got float32|dtypes must agree)"):
        backward(y.astype(np.float32), cache)


@each
def test_backends_agree(case):
    results = []
    for backend in RUNNING:
        with use(backend) as put:
            forward, backward, inputs = drawn(case, 1)
            y, cache = forward(*(put(x.copy()) for x in inputs))[:2]
            results.append(flat(y) + flat(backward(signed(y), cache)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(tinydet.ops.__path__)])
def test_every_public_function_of_an_op_says_what_it_does(module):
    for name, f in inspect.getmembers(__import__(f"tinydet.ops.{module}", fromlist="x"), inspect.isfunction):
        if not name.startswith("_") and f.__module__ == f"tinydet.ops.{module}":
            assert f.__doc__ and len(f.__doc__) > 20, f"{module}.{name}"


# The program

@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Exit status and JSON of the whole table."""
    path = tmp_path_factory.mktemp("gradcheck") / "all.json"
    status = gradcheck.main(["--json", str(path)])
    return status, json.loads(path.read_text())


def test_everything_is_proved_on_every_backend(table):
    status, told = table
    assert status == 0 and told["failed"] == 0
    assert {(r["op"], r["case"]) for r in told["rows"]} == {(c.op, c.what) for c in CASES}
    for case in CASES:
        rows = [r for r in told["rows"] if (r["op"], r["case"]) == (case.op, case.what)]
        if case.kind == "no gradient":
            assert len(rows) == 1 and f"test_{case.op}.py" in rows[0]["verdict"]
            continue
        dtypes = ["float64"] if case.float32 is None else ["float64", "float32"]
        assert [(r["backend"], r["dtype"]) for r in rows] == [(b, d) for b in RUNNING if b in case.on for d in dtypes]
        for r in rows:
            assert r["verdict"] == "ok" and r["kind"] == case.kind and 0 <= r["error"] <= r["bound"]
            assert r["bound"] == (1e-6 if r["dtype"] == "float64" else case.float32)
            if r["kind"] in ("gradient", "loss") and r["dtype"] == "float64":
                assert r["error"] > 0                                   # differences are never exact: 0 would mean that nothing was compared


def test_every_gradient_and_loss_op_is_checked_in_float32():
    assert all(c.float32 is not None and c.float32 <= 1e-5 for c in DIFFERENTIABLE if c.op not in cases.LAYERS)


def wrong(dy, cache):
    return 1.001 * dy


@pytest.mark.parametrize("case, message", [
    (Case("a", "", "gradient", lambda rng: (lambda x: (x, None), wrong, [rng.standard_normal(3)])), "gradient of input 0"),
    (Case("a", "", "loss", lambda rng: (lambda x: (float(x.sum()), 0 * x), [rng.standard_normal(3)])), "gradient of input 0"),
    (Case("a", "", "definition", lambda rng: [(np.ones(2), np.ones(2)), (np.ones(2), np.array([1, 1 + 2e-6]))]), "error 2e-06 must be at most 1e-06"),
    (Case("a", "", "definition", lambda rng: [(np.ones(2), np.ones(3))]), "error inf must be"),
    (Case("a", "", "definition", lambda rng: [(np.array([np.nan]), np.ones(1))]), "error inf must be"),
    (Case("a", "", "gradient", lambda rng: (lambda x: (x.astype(np.float32).astype(x.dtype) if x.dtype == np.float64 else x * np.float32(1.1), None),
                                            lambda dy, c: dy, [np.zeros(0)]), 1e-6), None),
    (Case("a", "", "gradient", lambda rng: (lambda x: (x if x.dtype == np.float64 else x * np.float32(1.1), None), lambda dy, c: dy,
                                            [rng.standard_normal(3)]), 1e-6), "must be at most 1e-06"),
    (Case("a", "", "gradient", lambda rng: (lambda x: (x, None), lambda dy, c: dy if dy.dtype == np.float64 else dy * np.float32(1.1),
                                            [rng.standard_normal(3)]), 1e-6), "must be at most 1e-06"),
    (Case("a", "", "gradient", lambda rng: (lambda x: (x, None), lambda dy, c: dy if dy.dtype == np.float64 else abs(dy),
                                            [rng.standard_normal(9)]), 1e-6), "must be at most 1e-06"),
    (Case("a", "", "gradient", lambda rng: (lambda x: (x, None), lambda dy, c: dy.astype(np.float64), [rng.standard_normal(3)]), 1e-6),
     "results for float32 inputs must be float32, got float64"),
    (Case("a", "", "gradient", lambda rng: 1 / 0), "ZeroDivisionError: division by zero"),
])
def test_a_failure_is_a_row_and_the_exit_status(case, message, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", [case, *CASES[-1:]])
    assert gradcheck.main(["--backend", "numpy"]) == (1 if message else 0)
    out = capsys.readouterr().out
    assert ("FAILED: " in out and message in out and "1 failed" in out) if message else "none failed" in out
    assert CASES[-1].op in out                                          # the table goes on


def test_choices_and_bad_names(capsys):
    assert gradcheck.main(["--op", "relu", "--backend", "numba"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall("^relu .* numba ", out, re.M)) == 2 and "numpy" not in out and "conv" not in out
    for arguments, message in ((["--json", "no folder/x.json"], "the folder of --json no folder/x.json must exist"),
                               (["--op", "nonsense"], r"invalid choice: 'nonsense' \(choose from .*conv"),
                               (["--backend", "cuda9"], r"invalid choice: 'cuda9' \(choose from .*numpy")):
        with pytest.raises(SystemExit) as stop:
            gradcheck.main(arguments)
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_draws_are_the_same_each_time_and_differ_from_each_other():
    for case in DIFFERENTIABLE:
        one, same, other = (drawn(case, s)[2] for s in (0, 0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert len(one) != len(other) or any(a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(one, other))
