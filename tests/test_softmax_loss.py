import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops import softmax_loss


def by_definition(x, labels):
    losses = [-math.log(math.exp(row[k]) / math.fsum(map(math.exp, row))) for row, k in zip(x.tolist(), labels) if k >= 0]
    return math.fsum(losses) / len(losses) if losses else 0.0


def run(backend, x, labels):
    """Value and gradient, on the host."""
    with use(backend) as put:
        value, dx = softmax_loss.loss(put(x), put(labels))
    assert type(value) is float or backend == "cuda" and value.shape == () and value.dtype == np.float64
    return float(to_numpy(value)), to_numpy(dx)


@st.composite
def cases(draw, min_label=-1):
    """Logits (R, K) and labels, some of them -1."""
    R, K, rng = draw(st.integers(0, 5)), draw(st.integers(1, 4)), np.random.default_rng(draw(seeds))
    return 2 * rng.standard_normal((R, K)), rng.integers(min_label, K, R)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_value_and_softmax_are_the_definition(backend, case):
    x, labels = case
    with use(backend) as put:
        p = to_numpy(softmax_loss.softmax(put(x)))
    assert_allclose(run(backend, x, labels)[0], by_definition(x, labels), rtol=1e-12, atol=1e-12)
    for row, q in zip(x, p):
        assert_allclose(q, [math.exp(a) / sum(math.exp(b) for b in row) for a in row], rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    x, labels = case
    with use(backend) as put:
        check_loss(lambda x: softmax_loss.loss(x, put(labels)), [x], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(min_label=0), shift=st.sampled_from([-1e4, 3.0, 1e4]))
def test_a_shift_changes_nothing_and_nothing_overflows(backend, case, shift):
    x, labels = case
    value, dx = run(backend, x, labels)
    shifted, dshifted = run(backend, x + shift, labels)
    assert_allclose(shifted, value, atol=1e-10)
    assert_allclose(dshifted, dx, atol=1e-10)
    assert_allclose(dx.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_logits(backend):
    for dtype in (np.float32, np.float64):
        value, dx = run(backend, np.array([[1000, -1000], [-1000, 1000]], dtype), np.array([0, 0]))
        assert value == 1000
        assert_array_equal(dx, np.array([[0, 0], [-0.5, 0.5]], dtype), strict=True)
        value, dx = run(backend, np.array([[0, -np.inf, 0, -1e30]], dtype), np.array([2]))                        # classes left out
        assert_allclose(value, math.log(2), rtol=1e-6)
        assert_array_equal(dx, np.array([[0.5, 0, -0.5, 0]], dtype), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_keep_their_digits_down_to_the_smallest(dtype):
    """Of logits 0 and -z, as far as exp(-z) is a normal number. exp, the division by the sum and the product round once each or so."""
    with use("numba"):
        for z in np.linspace(0, -np.log(np.finfo(dtype).tiny) * 0.99, 1001).astype(dtype):
            _, dx = softmax_loss.loss(np.array([[0, -z]], dtype), np.array([0]))
            p = np.exp(-z.astype(np.longdouble)) / (1 + np.exp(-z.astype(np.longdouble)))
            assert abs(dx[0, 1] - p) <= 2 * np.spacing(dtype(p)), z


def test_backends_agree_over_many_rows_and_threads_change_no_bit(all_threads):
    """Blocks of several rows, of one row, and one that is not full; some rows have no label."""
    for R, K in ((1000, 21), (7, 1000), (600, 1), (26, 100)):
        for dtype, tolerance in ((np.float32, 2e-6), (np.float64, 1e-13)):
            x, labels = 3 * np.random.default_rng(0).standard_normal((R, K)).astype(dtype), np.random.default_rng(1).integers(-1, K, R)
            results = []
            for threads in (1, numba.config.NUMBA_NUM_THREADS):
                numba.set_num_threads(threads)
                results.append(softmax_loss.loss(x, labels))
            assert results[0][0] == results[1][0]
            assert_array_equal(results[0][1], results[1][1])
            with use("numpy"):
                value, dx = softmax_loss.loss(x, labels)
            assert_allclose(results[0][0], value, rtol=tolerance, atol=tolerance)
            assert_allclose(R * results[0][1], R * dx, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [[np.nan, 1], [1, np.nan], [-np.inf, -np.inf], [np.inf, 0]])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_has_no_softmax_gives_nan_and_spoils_no_other_row(backend, row):
    value, dx = run(backend, np.array([row, [0, 0]]), np.array([1, 0]))
    assert math.isnan(value) and np.isnan(dx[0]).all()
    assert_array_equal(dx[1], [-0.25, 0.25])


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_of_far_logits(backend):
    with use(backend) as put:
        p = to_numpy(softmax_loss.softmax(put(np.array([[1000.0, -1000, 1000 - np.log(3)], [-1000, -1000, -1000]]))))
    assert_allclose(p, [[0.75, 0, 0.25], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_an_ignored_row_counts_in_nothing(backend, case):
    x, labels = case
    value, dx = run(backend, x, labels)
    kept = labels >= 0
    alone, dalone = run(backend, x[kept], labels[kept])
    assert value == alone
    assert_array_equal(dx[kept], dalone)
    assert_array_equal(dx[~kept], 0)
    x[~kept] = np.nan                                       # not even what it holds
    assert run(backend, x, labels)[0] == value


# The kernel

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]
needs_emulator = pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("R, K", [(1, 1), (7, 31), (8, 32), (9, 33), (255, 21), (256, 2), (257, 3), (3, 1000)])
def test_kernel_agrees_with_float64_at_block_borders_and_strided(backend, R, K):
    rng = np.random.default_rng(R)
    x, labels = 3 * rng.standard_normal((K, R)).T, np.repeat(rng.integers(-1, K, R), 2)[::2].astype(np.int32)
    labels[:1] = K - 1
    value, dx = run("numpy", x, labels)
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found, dfound = run(backend, x.astype(dtype), labels)
        assert dfound.dtype == dtype and abs(found - value) <= bound * abs(value) + 1e-15
        assert np.linalg.norm(dfound - dx) <= bound * np.linalg.norm(dx)


@needs_emulator
def test_any_order_of_threads_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, labels = 3 * rng.standard_normal((50, 40)).astype(np.float32), rng.integers(-1, 40, 50)
    value, dx = run("emulated", x, labels)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            again, dagain = run("emulated", x, labels)
        assert again == value
        assert_array_equal(dagain, dx)


@needs_emulator
@pytest.mark.parametrize("label", [-2, 3, 2**32, -2**63])
def test_the_kernel_makes_nan_of_a_label_out_of_range_and_of_its_row(label):
    """On a GPU nothing looks at the labels before."""
    with use("emulated"):
        value, dx = softmax_loss._loss_cuda(np.zeros((2, 3)), np.array([label, 0]))
    assert math.isnan(value) and np.isnan(dx[0]).all()
    assert_allclose(dx[1], [-1 / 3, 1 / 6, 1 / 6], rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_transposed_empty_and_nan(backend):
    x = np.random.default_rng(0).standard_normal((3, 5))
    labels = np.array([0, 1, 2, -1, 1], np.int8)
    value, dx = run(backend, x.T, labels)
    value32, dx32 = run(backend, x.T.astype(np.float32), labels)
    assert dx32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    value, dx = run(backend, np.zeros((0, 3)), np.zeros(0, int))
    assert value == 0.0 and dx.shape == (0, 3)
    value, dx = run(backend, np.zeros((2, 3)), np.full(2, -1))
    assert value == 0.0 and not dx.any()
    assert math.isnan(run(backend, np.array([[np.nan, 1]]), np.array([1]))[0])


@pytest.mark.parametrize("x, labels, error, message", [
    (np.zeros(3), np.zeros(3, int), ValueError, r"x must have shape \(R, K\), got \(3,\)"),
    (np.zeros((2, 3), int), np.zeros(2, int), TypeError, "x must be float32 or float64, got int64"),
    (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
    (np.zeros((2, 3)), np.zeros(2), TypeError, "labels must be integers, got float64"),
    (np.zeros((2, 3)), [0, 1], TypeError, "labels must be an array, got list"),
    (np.zeros((2, 3)), np.array([0, 3]), ValueError, r"labels must lie in -1\.\.2, got 0\.\.3"),
    (np.zeros((2, 3)), np.array([-2, 0]), ValueError, r"labels must lie in -1\.\.2, got -2\.\.0"),
])
def test_errors(x, labels, error, message):
    with pytest.raises(error, match=r"^softmax_loss\.loss: " + message):
        softmax_loss.loss(x, labels)
