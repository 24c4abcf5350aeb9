import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import BACKENDS, RUNNING, distinct_NHWC, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import batch_norm, conv, linear, relu


def statistics(x):
    """Mean and biased variance of each channel."""
    channels = [[float(v) for v in x[..., c].ravel()] for c in range(x.shape[3])]
    means = [math.fsum(v) / len(v) for v in channels]
    return np.array(means), np.array([math.fsum((a - m) ** 2 for a in v) / len(v) for v, m in zip(channels, means)])


def by_definition(x, gamma, beta, mean, var, eps=1e-5):
    y = np.empty(x.shape)
    for n, i, j, c in np.ndindex(x.shape):
        y[n, i, j, c] = gamma[c] * (x[n, i, j, c] - mean[c]) / math.sqrt(var[c] + eps) + beta[c]
    return y


@st.composite
def cases(draw):
    """x of at least two pixels, gamma, beta, and given mean and var."""
    x, rng = draw(distinct_NHWC(min_side=2, max_C=3)), np.random.default_rng(draw(seeds))
    gamma, beta, mean = rng.standard_normal((3, x.shape[3]))
    return x, gamma, beta, mean, rng.uniform(0.5, 2, x.shape[3])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_forward_is_the_definition(backend, case):
    x, gamma, beta, mean, var = case
    with use(backend) as put:
        y, _, moments = batch_norm.forward(put(x), put(gamma), put(beta))
        frozen, _ = batch_norm.forward_frozen(*map(put, case), eps=0.1)
    assert_allclose([to_numpy(m) for m in moments], statistics(x), rtol=1e-12, atol=1e-12)
    assert_allclose(to_numpy(y), by_definition(x, gamma, beta, *statistics(x)), rtol=1e-12, atol=1e-12)
    assert_allclose(to_numpy(frozen), by_definition(x, gamma, beta, mean, var, 0.1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_gradient(backend, case):
    x, gamma, beta, mean, var = case
    with use(backend) as put:
        check_grad(batch_norm.forward, batch_norm.backward, [x, gamma, beta], put=put)
        check_grad(lambda x, gamma, beta: batch_norm.forward_frozen(x, gamma, beta, put(mean), put(var)), batch_norm.backward,
                   [x, gamma, beta], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
@given(case=cases(), seed=seeds)
def test_with_relu_it_is_relu_behind_it(backend, dtype, tolerance, case, seed):
    """In training and frozen: the same y to the bit, so that the same pixels pass the gradient."""
    case = [a.astype(dtype) for a in case]
    dy = np.random.default_rng(seed).standard_normal(case[0].shape).astype(dtype)
    with use(backend) as put:
        for run, inputs in ((batch_norm.forward, case[:3]), (batch_norm.forward_frozen, case)):
            y, cache = run(*map(put, inputs), 0.1, True)[:2]
            plain, plain_cache = run(*map(put, inputs), 0.1)[:2]
            expected, relu_cache = relu.forward(plain)
            assert_array_equal(to_numpy(y), to_numpy(expected), strict=True)
            for a, b in zip(batch_norm.backward(put(dy), cache), batch_norm.backward(relu.backward(put(dy), relu_cache), plain_cache)):
                assert_allclose(to_numpy(a), to_numpy(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_keeps_nan_and_passes_no_gradient_at_zero_or_nan(backend):
    """The NaN lies in a channel of its own: its dgamma is NaN."""
    x = np.array([[-1.0, 0, 2], [np.nan, 1, -1]]).T.reshape(1, 1, 3, 2)
    with use(backend) as put:
        given = [put(np.full(2, v)) for v in (2.0, 0.0, 0.0, 1.0)]
        y, cache = batch_norm.forward_frozen(put(x), *given, 0.0, relu=True)
        dx, _, dbeta = batch_norm.backward(put(np.ones(x.shape)), cache)
    assert_array_equal(to_numpy(y)[0, 0], np.array([[0, 0, 4], [np.nan, 2, 0]]).T)
    assert_array_equal(to_numpy(dx)[..., 0], [[[0, 0, 2]]])
    assert_array_equal(to_numpy(dbeta), [1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=2))
def test_output_has_mean_beta_and_deviation_gamma_and_dx_is_orthogonal(backend, x):
    C = x.shape[3]
    with use(backend) as put:
        y, cache, _ = batch_norm.forward(put(x), put(np.full(C, 3.0)), put(np.full(C, -2.0)), 0.0)
        dx = to_numpy(batch_norm.backward(put(x ** 2), cache)[0])
    assert_allclose(statistics(to_numpy(y)), [[-2] * C, [9] * C], rtol=1e-11)
    assert_allclose([dx.sum((0, 1, 2)), (dx * x).sum((0, 1, 2))], 0, atol=1e-9)       # y ignores shift and scale of x


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), eps=st.sampled_from([1e-5, 0.1]), seed=seeds)
def test_a_folded_layer_does_the_work_of_both(backend, case, eps, seed):
    x, rng = case[0], np.random.default_rng(seed)
    gamma, beta, mean, var, b = rng.uniform(0.5, 2, (5, 3)) * [[-1], [1], [1], [1], [-1]]
    w = rng.standard_normal((2, 1, x.shape[3], 3))
    with use(backend) as put:
        w2, b2 = batch_norm.fold(*map(put, (w, b, gamma, beta, mean, var)), eps)
        both, _ = batch_norm.forward_frozen(conv.forward(put(x), put(w), put(b))[0], *map(put, (gamma, beta, mean, var)), eps)
        assert_allclose(to_numpy(conv.forward(put(x), w2, b2)[0]), to_numpy(both), rtol=1e-10, atol=1e-10)
        rows = x.reshape(-1, x.shape[3])
        w2, b2 = batch_norm.fold(*map(put, (w[0, 0], b, gamma, beta, mean, var)), eps)
        y = to_numpy(linear.forward(put(rows), put(w[0, 0]), put(b))[0])[:, None, None]
        assert_allclose(to_numpy(linear.forward(put(rows), w2, b2)[0]), by_definition(y, gamma, beta, mean, var, eps)[:, 0, 0],
                        rtol=1e-10, atol=1e-10)


def test_folding_is_the_formula_in_either_dtype_and_copies():
    w, b, gamma, beta, mean, var = arrays = [np.array([[1.0, 2], [3, 4]]), *np.array([[5.0, 6], [3, 4], [7, 8], [1, 2], [9, 16]])]
    kept = [a.copy() for a in arrays]
    for eps in (0.0, 7.0):                                                  # 9 + 7 = 16
        scale = [3 / (9 + eps) ** 0.5, 4 / (16 + eps) ** 0.5]
        w2, b2 = batch_norm.fold(*arrays, eps)
        assert_allclose(w2, [[1 * scale[0], 2 * scale[1]], [3 * scale[0], 4 * scale[1]]], rtol=1e-14)
        assert_allclose(b2, [4 * scale[0] + 7, 4 * scale[1] + 8], rtol=1e-14)
        w32, b32 = batch_norm.fold(*(np.asarray(a, np.float32) for a in arrays), np.float64(eps))           # no promotion
        assert w32.dtype == b32.dtype == np.float32
        assert_allclose(w32, w2, rtol=1e-6)
        assert_allclose(b32, b2, rtol=1e-6)
    w2, b2 = batch_norm.fold(w.T, b, np.ones(2), np.zeros(2), np.zeros(2), np.ones(2), 0.0)
    assert_array_equal(w2, w.T)
    assert not np.shares_memory(w2, w) and not np.shares_memory(b2, b)
    for a, before in zip(arrays, kept):
        assert_array_equal(a, before)
    zero_variance = batch_norm.fold(w, b, np.ones(2), np.zeros(2), np.zeros(2), np.zeros(2))[0]
    assert_allclose(zero_variance, w / 1e-5 ** 0.5, rtol=1e-14)             # the default eps


def test_backends_agree_also_in_float32_transposed_and_over_many_rows(all_threads):
    """3 * 21 * 11 pixels are more rows than parts; a large mean must not swamp the variance."""
    for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 1e-4)):
        x = (np.random.default_rng(0).standard_normal((3, 11, 21, 5)) + 100).astype(dtype).transpose(0, 2, 1, 3)
        gamma, beta = np.linspace(1, 2, 10).reshape(2, 5).astype(dtype)
        results = []
        for backend in RUNNING:
            with use(backend) as put:
                y, cache, moments = batch_norm.forward(put(x), put(gamma), put(beta))
                results.append([to_numpy(a) for a in (y, *moments, *batch_norm.backward(put(x - 100), cache))])
        for result in results:
            for a, b in zip(result, results[0]):
                assert a.dtype == b.dtype == dtype
                assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        assert_allclose(results[0][2], statistics(x)[1], rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 21, 11, 5), (2, 64, 48, 3), (1, 97, 1, 70), (1, 5, 40, 500), (1, 1, 1, 3)])
def test_the_number_of_threads_changes_no_bit(shape, all_threads):
    """Also where rows are widened, and in more than PARTS blocks; the last of them is shorter."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    results = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        y, cache, moments = batch_norm.forward(x, np.ones(shape[3], np.float32), np.zeros(shape[3], np.float32))
        results.append((y, *moments, *batch_norm.backward(x, cache)))
    for a, b in zip(*results):
        assert_array_equal(a, b)
    assert_allclose(results[0][1:3], statistics(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean, std", [(0, 1), (1e4, 1), (-3e5, 10), (1, 1e-4)])
@pytest.mark.parametrize("shape", [(4, 50, 40, 8), (3, 51, 41, 3)])
def test_float32_sums_keep_their_digits_over_many_rows_and_about_a_large_mean(backend, shape, mean, std):
    rng = np.random.default_rng(0)
    x = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    x[0, 0, 0] = mean + 9 * std                             # far from the mean
    dy, one = rng.standard_normal(shape).astype(np.float32) + 1, np.ones(shape[3], np.float32)
    with use(backend) as put:
        y, cache, moments = batch_norm.forward(put(x), put(one), put(0 * one), 0.0)
        _, dgamma, dbeta = map(to_numpy, batch_norm.backward(put(dy), cache))
    exact, (m, v) = statistics(x), map(to_numpy, moments)
    assert_allclose(m, exact[0], rtol=1e-7, atol=1e-8 * std)
    assert_allclose(v, exact[1], rtol=1e-6)
    rows = x.size // shape[3]
    h = (x - m.astype(float)) / np.sqrt(v.astype(float))
    assert_allclose(dbeta / rows, dy.astype(float).mean((0, 1, 2)), rtol=1e-6)
    assert_allclose(dgamma / rows, (dy * h).mean((0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 63, 1), (1, 255, 1, 1), (1, 16, 16, 1), (1, 1, 257, 1), (1, 9, 7, 31), (2, 3, 11, 32),
                                   (5, 1, 13, 33), (1, 3, 43, 64), (1, 7, 11, 65), (1, 2, 1, 300)])
@pytest.mark.parametrize("relu", [False, True])
def test_block_borders(backend, dtype, shape, relu):
    """Columns and rows about the borders of blocks, several parts of the sums, more than one pixel a row: as NumPy in float64."""
    rng, C = np.random.default_rng(0), shape[3]
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, C)).astype(dtype)
    found = []
    for name, kind in ((backend, dtype), ("numpy", float)):
        with use(name) as put:
            y, cache, moments = batch_norm.forward(*(put(a.astype(kind)) for a in (x, gamma, beta)), 0.1, relu)
            found.append([to_numpy(a) for a in (y, *moments, *batch_norm.backward(put(dy.astype(kind)), cache))])
    pixels, tolerance = x.size // C, {4: 1e-5, 8: 1e-12}[x.itemsize]
    for a, b, scale in zip(*found, (1, 1, 1, 1, pixels, pixels)):
        assert a.dtype == dtype
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), scale)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("grid", [1, 1024])
@pytest.mark.parametrize("shape", [(3, 21, 11, 5), (2, 16, 24, 3), (1, 13, 20, 70)])
def test_the_order_of_threads_and_blocks_changes_no_bit(shape, grid, monkeypatch):
    """Also where one block sums many rows."""
    monkeypatch.setattr(batch_norm, "GRID", grid)
    rng, results = np.random.default_rng(0), []
    x, dy = (rng.standard_normal((2, *shape)) + [[[[[5]]]], [[[[0]]]]]).astype(np.float32)
    gamma, beta = rng.standard_normal((2, shape[3])).astype(np.float32)
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with use("emulated"), emulate.options(order=order, seed=seed):
            y, cache, moments = batch_norm.forward(x, gamma, beta, relu=True)
            results.append((y, *moments, *batch_norm.backward(dy, cache)))
    for result in results:
        for a, b in zip(result, results[0]):
            assert_array_equal(a, b, strict=True)
    assert_allclose(results[0][1:3], statistics(x), rtol=1e-6)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_launches_are_few():
    """Forward three, frozen one, backward three; array code on a GPU would take some twenty."""
    with fake_cupy.installed(), use("cuda") as put:
        x, one = put(np.ones((1, 2, 3, 4))), put(np.ones(4))
        with fake_cupy.no_copies():
            for run, count in ((lambda: batch_norm.forward(x, one, one), 3), (lambda: batch_norm.forward_frozen(x, one, one, one, one), 1)):
                fake_cupy.launches.clear()
                cache = run()[1]
                assert len(fake_cupy.launches) == count
                batch_norm.backward(x, cache)
                assert len(fake_cupy.launches) == count + 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_a_gradient_stays_at_its_pixel(backend):
    """No sum of the batch is in dx: a NaN or an infinity spoils no other pixel."""
    x, dy = np.ones((2, 1, 1, 4, 2))
    dy[0, 0, 1, 0], x[0, 0, 2, 1], dy[0, 0, 3, 1] = np.nan, np.nan, np.inf
    with use(backend) as put:
        dx = batch_norm.backward(put(dy), batch_norm.forward_frozen(put(x), *(put(np.full(2, v)) for v in (3.0, 0.0, 0.0, 1.0)), 0.0)[1])[0]
    assert_array_equal(to_numpy(dx)[0, 0], np.array([[3, np.nan, 3, 3], [3, 3, 3, np.inf]]).T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel_constant_channel_and_empty_batch(backend):
    with use(backend) as put:
        one = put(np.ones(2))
        for x in (np.full((1, 1, 1, 2), 7.0), np.full((2, 3, 3, 2), 7.0)):
            y, cache, (mean, var) = batch_norm.forward(put(x), one, put(np.array([0.5, 1.5])))
            assert_array_equal(to_numpy(y), np.broadcast_to([0.5, 1.5], x.shape))
            assert_array_equal([to_numpy(mean), to_numpy(var)], [[7, 7], [0, 0]])
            assert_array_equal(to_numpy(batch_norm.backward(put(np.ones(x.shape)), cache)[0]), np.zeros(x.shape))
        y, cache = batch_norm.forward_frozen(put(np.zeros((0, 3, 3, 2))), one, one, one, one)
        dx, dgamma, dbeta = batch_norm.backward(y, cache)
    assert y.shape == dx.shape == (0, 3, 3, 2)
    assert_array_equal([to_numpy(dgamma), to_numpy(dbeta)], np.zeros((2, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_channel(backend):
    x = np.arange(8.0).reshape(1, 2, 2, 2)
    x[0, 0, 0, 1] = np.nan
    with use(backend) as put:
        y, _, moments = batch_norm.forward(put(x), put(np.ones(2)), put(np.zeros(2)))
    for a in (y, *moments):
        assert_array_equal(np.isnan(to_numpy(a)).reshape(-1, 2).all(0), [False, True])


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((4, 2))), ValueError, r"x must have shape \(N, H, W, C\), got \(4, 2\)"),
    (dict(x=np.zeros((0, 2, 2, 2))), ValueError, r"x must hold at least one pixel, got \(0, 2, 2, 2\)"),
    (dict(gamma=np.ones(3)), ValueError, r"gamma must have shape \(2,\), got \(3,\)"),
    (dict(beta=np.ones(2, np.float32)), TypeError, "dtypes must agree, got x float64, gamma float64, beta float32"),
    (dict(beta=[0.0, 0.0]), TypeError, "beta must be an array, got list"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^batch_norm\.forward: " + message):
        batch_norm.forward(**{**dict(x=np.ones((1, 2, 2, 2)), gamma=np.ones(2), beta=np.ones(2)), **change})


PER_CHANNEL = ("b", "gamma", "beta", "mean", "var")


@pytest.mark.parametrize("change, error, message", [
    (dict(w=[[1.0, 1.0]]), TypeError, "w must be an array, got list"),
    (dict(w=np.ones((3, 2), int)), TypeError, "w must be float32 or float64, got int64"),
    (dict(b=[1.0, 1.0]), TypeError, "b must be an array, got list"),
    (dict(w=np.ones((3, 2), np.float32)), TypeError, "dtypes must agree, got w float32, b float64, gamma float64, beta float64"),
    *[({name: np.ones(2, np.float32)}, TypeError, f"dtypes must agree, got .*{name} float32") for name in PER_CHANNEL],
    *[({name: np.ones(3)}, ValueError, rf"{name} must have shape \(2,\), got \(3,\)") for name in PER_CHANNEL],
])
def test_fold_errors(change, error, message):
    with pytest.raises(error, match=r"^batch_norm\.fold: " + message):
        batch_norm.fold(**{**dict(w=np.ones((3, 2))), **dict.fromkeys(PER_CHANNEL, np.ones(2)), **change})


def test_frozen_and_backward_errors():
    x, one = np.ones((1, 2, 2, 2)), np.ones(2)
    with pytest.raises(ValueError, match=r"^batch_norm\.forward_frozen: var must be at least 0, got -1\.0"):
        batch_norm.forward_frozen(x, one, one, one, -one)
    with pytest.raises(ValueError, match=r"^batch_norm\.fold: var must be at least 0, got -1\.0"):
        batch_norm.fold(np.ones((3, 2)), one, one, one, one, -one)
    for eps in (-1e-5, np.inf):
        with pytest.raises(ValueError, match=r"^batch_norm\.forward: eps must be finite and at least 0, got (-1e-05|inf)"):
            batch_norm.forward(x, one, one, eps)
    with pytest.raises(ValueError, match=r"^batch_norm\.forward_frozen: C must be at least 1, got 0"):
        batch_norm.forward_frozen(x[..., :0], *[one[:0]] * 4)
    with pytest.raises(ValueError, match=r"^batch_norm\.forward_frozen: var must have shape \(2,\), got \(1,\)"):
        batch_norm.forward_frozen(x, one, one, one, one[:1])
    with pytest.raises(ValueError, match=r"^batch_norm\.backward: dy must have shape \(1, 2, 2, 2\), got \(1, 2, 2, 1\)"):
        batch_norm.backward(x[..., :1], batch_norm.forward(x, one, one)[1])
