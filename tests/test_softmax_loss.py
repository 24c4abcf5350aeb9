import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.ops import softmax_loss


def by_definition(x, labels):
    losses = [-math.log(math.exp(row[k]) / math.fsum(map(math.exp, row))) for row, k in zip(x.tolist(), labels) if k >= 0]
    return math.fsum(losses) / len(losses) if losses else 0.0


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
        value, _ = softmax_loss.loss(put(x), put(labels))
        p = to_numpy(softmax_loss.softmax(put(x)))
    assert isinstance(value, float)
    assert_allclose(value, by_definition(x, labels), rtol=1e-12, atol=1e-12)
    for row, q in zip(x, p):
        assert_allclose(q, [math.exp(a) / sum(math.exp(b) for b in row) for a in row], rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    x, labels = case
    with use(backend) as put:
        check_loss(lambda x: softmax_loss.loss(x, put(labels)), [x], put=put)


@given(case=cases(min_label=0), shift=st.sampled_from([-1e4, 3.0, 1e4]))
def test_a_shift_changes_nothing_and_nothing_overflows(case, shift):
    x, labels = case
    value, dx = softmax_loss.loss(x, labels)
    shifted, dshifted = softmax_loss.loss(x + shift, labels)
    assert_allclose(shifted, value, atol=1e-10)
    assert_allclose(dshifted, dx, atol=1e-10)
    assert_allclose(dx.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_logits(backend):
    for dtype in (np.float32, np.float64):
        with use(backend) as put:
            value, dx = softmax_loss.loss(put(np.array([[1000, -1000], [-1000, 1000]], dtype)), put(np.array([0, 0])))
            assert value == 1000
            assert_array_equal(to_numpy(dx), np.array([[0, 0], [-0.5, 0.5]], dtype), strict=True)
            value, dx = softmax_loss.loss(put(np.array([[0, -np.inf, 0, -1e30]], dtype)), put(np.array([2])))     # classes left out
            assert_allclose(value, math.log(2), rtol=1e-6)
            assert_array_equal(to_numpy(dx), np.array([[0.5, 0, -0.5, 0]], dtype), strict=True)


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
    with use(backend) as put:
        value, dx = softmax_loss.loss(put(np.array([row, [0, 0]])), put(np.array([1, 0])))
    assert math.isnan(value) and np.isnan(to_numpy(dx)[0]).all()
    assert_array_equal(to_numpy(dx)[1], [-0.25, 0.25])


def test_softmax_of_far_logits():
    p = softmax_loss.softmax(np.array([[1000.0, -1000, 1000 - np.log(3)], [-1000, -1000, -1000]]))
    assert_allclose(p, [[0.75, 0, 0.25], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-12)


@given(case=cases())
def test_an_ignored_row_counts_in_nothing(case):
    x, labels = case
    value, dx = softmax_loss.loss(x, labels)
    kept = labels >= 0
    alone, dalone = softmax_loss.loss(x[kept], labels[kept])
    assert value == alone
    assert_array_equal(dx[kept], dalone)
    assert_array_equal(dx[~kept], 0)
    x[~kept] = np.nan                                       # not even what it holds
    assert softmax_loss.loss(x, labels)[0] == value


def test_float32_transposed_empty_and_nan():
    x = np.random.default_rng(0).standard_normal((3, 5))
    labels = np.array([0, 1, 2, -1, 1], np.int8)
    value, dx = softmax_loss.loss(x.T, labels)
    value32, dx32 = softmax_loss.loss(x.T.astype(np.float32), labels)
    assert dx32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-6)
    assert_allclose(dx32, dx, atol=1e-6)
    value, dx = softmax_loss.loss(np.zeros((0, 3)), np.zeros(0, int))
    assert value == 0.0 and dx.shape == (0, 3)
    assert math.isnan(softmax_loss.loss(np.array([[np.nan, 1]]), np.array([1]))[0])


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
