import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import dropout

rng = np.random.default_rng


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(), p=st.sampled_from([0, 0.25, 0.5, 0.75]), seed=seeds)
def test_every_element_is_dropped_or_scaled_and_the_mask_serves_backward(backend, x, p, seed):
    with use(backend) as put:
        y, cache = dropout.forward(put(x), p, rng(seed))
        dx = to_numpy(dropout.backward(put(x), cache))
    y = to_numpy(y)
    assert_allclose(y, np.where(y == 0, 0, x / (1 - p)), rtol=1e-15)        # x itself is never 0
    assert_array_equal(dx, y)
    assert p > 0 or (y != 0).all()


def test_every_element_has_its_own_draw():
    y, _ = dropout.forward(np.ones((4, 5, 6, 7)), 0.5, rng(0))
    for axis in range(4):
        assert (y != y.take([0], axis)).any()


def test_a_draw_equal_to_p_is_kept():
    class Constant(np.random.Generator):
        def random(self, shape, dtype):
            return np.full(shape, 0.25, dtype)

    assert_array_equal(dropout.forward(np.ones(3), 0.25, Constant(np.random.PCG64(0)), inverted=False)[0], np.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(max_C=6), p=st.sampled_from([0, 0.25, 0.5, 0.75]), inverted=st.booleans(), seed=seeds)
def test_by_map_drops_whole_channels_of_the_whole_batch(backend, x, p, inverted, seed):
    with use(backend) as put:
        y, cache = dropout.forward(put(x), p, rng(seed), by_map=True, inverted=inverted)
        dx = to_numpy(dropout.backward(put(x), cache))
    y, dropped = to_numpy(y), to_numpy(y)[0, 0, 0] == 0                     # x itself is never 0
    for c in range(x.shape[3]):
        assert_allclose(y[..., c], x[..., c] * (0 if dropped[c] else 1 / (1 - p) if inverted else 1), rtol=1e-15)
    assert_array_equal(dx, y)
    assert p > 0 or not dropped.any()


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(), seed=seeds, by_map=st.booleans(), inverted=st.booleans())
def test_gradient(backend, x, seed, by_map, inverted):
    with use(backend) as put:
        check_grad(lambda x: dropout.forward(x, 0.3, rng(seed), by_map, inverted), dropout.backward, [x], put=put)
        check_grad(lambda x: dropout.forward_test(x, 0.3), dropout.backward, [x], put=put)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p_and_the_mean_stays(p):
    for by_map in (False, True):
        y, _ = dropout.forward(np.ones(100_000), p, rng(0), by_map)
        sigma = (p * (1 - p) / y.size) ** 0.5
        assert abs((y == 0).mean() - p) < 4 * sigma and abs(y.mean() - 1) < 4 * sigma / (1 - p)
        classical, _ = dropout.forward(np.ones(100_000), p, rng(0), by_map, inverted=False)
        assert_array_equal(classical, y > 0)                                # the same draws, unscaled


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(max_C=6), seed=seeds)
def test_dropmap_of_the_notes(backend, x, seed):
    """Oquab notes 7, fixture 20: one mask for all positions and the batch, unscaled in training; the test multiplies by 1 - p."""
    with use(backend) as put:
        y, _ = dropout.forward(put(x), 0.25, rng(seed), by_map=True, inverted=False)
        test, cache = dropout.forward_test(put(x), 0.25)
        dx = dropout.backward(put(np.ones(x.shape)), cache)
    share = to_numpy(y) / x
    assert_array_equal(share, np.broadcast_to(share[0, 0, 0], x.shape))
    assert set(share.ravel()) <= {0, 1}
    assert_array_equal(to_numpy(test), 0.75 * x, strict=True)
    assert_array_equal(to_numpy(dx), np.full(x.shape, 0.75), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_decides_and_backend_and_dtype_do_not(backend):
    x = distinct((3, 40), 0)
    y, _ = dropout.forward(x, 0.5, rng(1))
    assert (y != dropout.forward(x, 0.5, rng(2))[0]).any()
    with use(backend) as put:
        assert_array_equal(to_numpy(dropout.forward(put(x), 0.5, rng(1))[0]), y)
        assert_array_equal(to_numpy(dropout.forward(put(x.astype(np.float32)), 0.5, rng(1))[0]), y.astype(np.float32), strict=True)
        y, cache = dropout.forward(put(x.astype(np.float32)), np.float64(0.3), rng(1))
        assert y.dtype == dropout.backward(y, cache).dtype == np.float32
        assert_allclose(to_numpy(y), dropout.forward(x, 0.3, rng(1))[0], rtol=1e-6)
        y, cache = dropout.forward_test(put(x.astype(np.float32)), np.float64(0.3))
        assert y.dtype == dropout.backward(y, cache).dtype == np.float32
    assert_allclose(to_numpy(y), 0.7 * x, rtol=1e-6)


def test_empty_transposed_and_nan():
    assert dropout.forward(np.zeros((0, 3)), 0.5, rng(0))[0].shape == dropout.forward_test(np.zeros((0, 3)), 0.5)[0].shape == (0, 3)
    x = distinct((4, 5), 0)
    assert_array_equal(dropout.forward(x.T, 0.5, rng(0))[0], dropout.forward(np.ascontiguousarray(x.T), 0.5, rng(0))[0])
    assert np.isnan(dropout.forward(np.full(5, np.nan), 0.5, rng(0))[0]).all()


def test_errors():
    for p in (1, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"^dropout\.forward: p must lie in \[0, 1\), got " + str(p)):
            dropout.forward(np.ones(3), p, rng(0))
        with pytest.raises(ValueError, match=r"^dropout\.forward_test: p must lie in \[0, 1\), got " + str(p)):
            dropout.forward_test(np.ones(3), p)
    for generator, name in ((0, "int"), (np.random.RandomState(0), "RandomState"), (None, "NoneType")):
        with pytest.raises(TypeError, match=r"^dropout\.forward: rng must be a numpy\.random\.Generator, got " + name):
            dropout.forward(np.ones(3), 0.5, generator)
    with pytest.raises(TypeError, match=r"^dropout\.forward_test: x must be float32 or float64, got int64"):
        dropout.forward_test(np.ones(3, int), 0.5)
    with pytest.raises(TypeError, match=r"^dropout\.forward: x must be an array, got list"):
        dropout.forward([1.0], 0.5, rng(0))
    with pytest.raises(ValueError, match=r"^dropout\.backward: dy must have shape \(3,\), got \(2,\)"):
        dropout.backward(np.ones(2), dropout.forward(np.ones(3), 0.5, rng(0))[1])
