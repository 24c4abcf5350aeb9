import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops import logistic_loss


def by_definition(x, labels, signed):
    sign = {1: 1, -1: -1} if signed else {1: 1, 0: -1}
    losses = [math.log(1 + math.exp(-sign[t] * v)) for v, t in zip(x.ravel().tolist(), labels.ravel().tolist()) if t in sign]
    return math.fsum(losses) / max(1, len(x))


def run(backend, x, labels, signed):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, dx = logistic_loss.loss(put(x), put(labels), signed=signed)
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    return float(to_numpy(value)), to_numpy(dx)


backends = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def cases(draw):
    """Scores (R, K) and labels -1, 0, 1."""
    R, K, rng = draw(st.integers(0, 5)), draw(st.integers(0, 4)), np.random.default_rng(draw(seeds))
    return 2 * rng.standard_normal((R, K)), rng.integers(-1, 2, (R, K))


both = pytest.mark.parametrize("signed", [True, False])


@both
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_value_is_the_definition(backend, signed, case):
    x, labels = case
    with use(backend) as put:
        p = to_numpy(logistic_loss.sigmoid(put(x)))
    assert_allclose(run(backend, x, labels, signed)[0], by_definition(x, labels, signed), rtol=1e-12, atol=1e-12)
    for i in np.ndindex(x.shape):
        assert_allclose(p[i], 1 / (1 + math.exp(-x[i])), rtol=1e-12)


@both
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, signed, case):
    x, labels = case
    kept = labels.copy()
    with use(backend) as put:
        labels = put(labels)
        check_loss(lambda x: logistic_loss.loss(x, labels, signed=signed), [x], put=put)
    assert_array_equal(to_numpy(labels), kept)


@given(case=cases())
def test_the_two_conventions_agree_after_translation(case):
    x, labels = case                                                        # signed: yes 1, no -1, ignored 0
    translated = np.array([0, -1, 1])[labels + 1]
    (a, da), (b, db) = logistic_loss.loss(x, labels, signed=True), logistic_loss.loss(x, translated, signed=False)
    assert a == b
    assert_array_equal(da, db)


@both
@backends
@given(case=cases())
def test_an_ignored_entry_counts_in_nothing_whatever_it_holds(backend, signed, case):
    x, labels = case
    value, dx = run(backend, x, labels, signed)
    ignored = labels == (0 if signed else -1)
    assert_array_equal(dx[ignored], 0)
    assert (dx[~ignored] * np.where(labels > 0, 1, -1)[~ignored] < 0).all()
    for v in (np.nan, np.inf, -np.inf):
        x[ignored] = v
        again, dagain = run(backend, x, labels, signed)
        assert again == value
        assert_array_equal(dagain, dx)


@given(case=cases())
def test_rows_are_averaged_and_classes_added_up(case):
    x, labels = case
    value, dx = logistic_loss.loss(x, labels, signed=True)
    alone = [logistic_loss.loss(x[r:r + 1, k:k + 1], labels[r:r + 1, k:k + 1], signed=True) for r, k in np.ndindex(x.shape)]
    assert_allclose(value * len(x), sum(v for v, _ in alone), rtol=1e-12)
    assert_allclose((dx * len(x)).ravel(), [d.item() for _, d in alone], rtol=1e-12)


def test_the_losses_of_the_notes():
    """Oquab notes 7, fixture 14: scores (2, -0.5, 1.5), y = (+1, -1, -1)."""
    value, dx = logistic_loss.loss(np.array([[2, -0.5, 1.5]]), np.array([[1, -1, -1]]), signed=True)
    assert_allclose(value, 0.126928 + 0.474077 + 1.701413, atol=1e-6)
    assert_allclose(dx, [[-0.119203, 0.377541, 0.817574]], atol=1e-6)


@both
@backends
def test_zero_scores_and_far_scores_of_the_notes(backend, signed):
    """Fixture 16: 20 classes at 0 cost 20 ln 2; |x| = 800 costs 0 or 800."""
    labels = np.arange(20)[None] % 2 * (2 if signed else 1) - (1 if signed else 0)
    value, dx = run(backend, np.zeros((1, 20)), labels, signed)
    assert_allclose(value, 13.862944, atol=1e-6)
    assert_array_equal(dx, np.where(labels > 0, -0.5, 0.5))
    no = labels[0, 0]
    for x, t, far, slope in ((800, 1, 0, 0), (-800, 1, 800, -1), (800, no, 800, 1), (-800, no, 0, 0)):
        value, dx = run(backend, np.full((1, 1), x * 1.0), np.full((1, 1), t), signed)
        assert value == far and dx.item() == slope


def test_sigmoid_at_the_ends():
    with np.errstate(all="raise", under="ignore"):
        assert_array_equal(logistic_loss.sigmoid(np.array([-np.inf, -800, 0, 800, np.inf, np.nan])), [0, 0, 0.5, 1, 1, np.nan])
    assert_allclose(logistic_loss.sigmoid(np.array([-40.0])), math.exp(-40), rtol=1e-12)


@backends
def test_infinity_and_nan_that_count(backend):
    value, dx = run(backend, np.array([[-np.inf, np.inf]]), np.array([[1, 1]]), True)
    assert value == math.inf
    assert_array_equal(dx, [[-1, 0]])
    value, dx = run(backend, np.array([[np.nan, 1]]), np.array([[1, 1]]), True)                     # and no warning
    assert math.isnan(value) and np.isnan(dx[0, 0]) and dx[0, 1] < 0


def test_softplus_is_exact_at_both_ends():
    x = np.array([-np.inf, -800, -40, 0, 1, 40, 800, np.inf])
    assert_allclose(logistic_loss.softplus(x), [0, 0, math.exp(-40), math.log(2), math.log1p(math.e), 40, 800, np.inf], rtol=1e-12)
    assert logistic_loss.softplus(x.astype(np.float32)).dtype == np.float32


@backends
@pytest.mark.parametrize("dtype, x", [(np.float32, 20), (np.float32, 80), (np.float64, 40), (np.float64, 600)])
def test_small_losses_keep_their_digits(backend, dtype, x):
    value, dx = run(backend, np.full((1, 1), x, dtype), np.ones((1, 1), int), True)
    assert_allclose([value, -dx.item()], math.exp(-x), rtol=1e-5 if dtype == np.float32 else 1e-12)


@both
@backends
def test_float32_transposed_and_small_integers(backend, signed):
    rng = np.random.default_rng(0)
    x, labels = 3 * rng.standard_normal((4, 5)), rng.integers(-1, 2, (4, 5)).astype(np.int8)
    value, dx = run(backend, x.T, labels.T, signed)
    assert_allclose(value, by_definition(x.T, labels.T, signed), rtol=1e-12)
    value32, dx32 = run(backend, x.T.astype(np.float32), labels.T, signed)
    assert dx32.dtype == logistic_loss.sigmoid(x.astype(np.float32)).dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    value, dx = run(backend, x, np.ones((4, 5), np.uint8), signed)
    assert_allclose(value, by_definition(x, np.ones((4, 5), int), signed), rtol=1e-12)
    assert (dx < 0).all()


@backends
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_classes(backend, shape):
    value, dx = run(backend, np.zeros(shape), np.zeros(shape, int), True)
    assert value == 0.0 and dx.shape == shape


# The kernel

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")


@both
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("R, K", [(1, 255), (2, 128), (1, 257), (1, 1023), (4, 256), (5, 205), (3, 1001)])
def test_kernel_agrees_with_float64_at_block_borders_and_strided(backend, signed, R, K):
    rng = np.random.default_rng(K)
    x, labels = 5 * rng.standard_normal((K, R)).T, rng.integers(-1, 2, (R, 2 * K))[:, ::2].astype(np.int32)
    value, dx = run("numpy", x, labels, signed)
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found, dfound = run(backend, x.astype(dtype), labels, signed)
        assert dfound.dtype == dtype and abs(found - value) <= bound * value
        assert np.linalg.norm(dfound - dx) <= bound * np.linalg.norm(dx)


@needs_emulator
def test_any_order_of_threads_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((30, 70)).astype(np.float32), rng.integers(-1, 2, (30, 70))
    value, dx = run("emulated", x, labels, True)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, dagain = run("emulated", x, labels, True)
        assert again == value
        assert_array_equal(dagain, dx)


@both
@needs_emulator
@pytest.mark.parametrize("label", [-2, 2, 127, -128])
def test_the_kernel_makes_nan_of_other_labels(signed, label):
    """On a GPU nothing looks at the labels before."""
    with use("emulated"):
        value, dx = logistic_loss._loss_cuda(np.zeros((1, 2)), np.array([[label, 1]]), signed)
    assert math.isnan(value)
    assert_array_equal(dx, [[np.nan, -0.5]])


@pytest.mark.parametrize("x, labels, error, message", [
    (np.zeros(3), np.zeros(3, int), ValueError, r"x must have shape \(R, K\), got \(3,\)"),
    (np.zeros((2, 3), int), np.zeros((2, 3), int), TypeError, "x must be float32 or float64, got int64"),
    (np.zeros((2, 3)), np.zeros(2, int), ValueError, r"labels must have shape \(2, 3\), got \(2,\)"),
    (np.zeros((2, 3)), np.zeros((2, 3)), TypeError, "labels must be integers, got float64"),
    (np.zeros((1, 2)), [[0, 1]], TypeError, "labels must be an array, got list"),
    (np.zeros((1, 2)), np.array([[0, 2]]), ValueError, r"labels must be -1, 0 or 1, got 0\.\.2"),
    (np.zeros((1, 2)), np.array([[-2, 0]]), ValueError, r"labels must be -1, 0 or 1, got -2\.\.0"),
])
def test_errors(x, labels, error, message):
    with pytest.raises(error, match=r"^logistic_loss\.loss: " + message):
        logistic_loss.loss(x, labels, signed=True)


def test_the_convention_has_no_default():
    with pytest.raises(TypeError, match="signed"):
        logistic_loss.loss(np.zeros((1, 1)), np.zeros((1, 1), int))
    with pytest.raises(TypeError, match="positional"):
        logistic_loss.loss(np.zeros((1, 1)), np.zeros((1, 1), int), True)


def test_signed_is_a_truth_value():
    with pytest.raises(TypeError, match=r"^logistic_loss\.loss: signed must be True or False, got 'false'"):
        logistic_loss.loss(np.zeros((1, 1)), np.zeros((1, 1), int), signed="false")
