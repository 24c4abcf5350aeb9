import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_grad, check_loss
from tinydet.ops import conv, global_max_pool, logistic_loss, relu


def winner(x, mask, n, c):
    """The first of the largest allowed values in row order, or the first allowed NaN: its row and column."""
    best = None
    for i, j in np.ndindex(x.shape[1:3]):
        if mask is not None and not mask[n, i, j, c % mask.shape[3]]:
            continue
        if math.isnan(x[n, i, j, c]):
            return i, j
        if best is None or x[n, i, j, c] > x[(n, *best, c)]:
            best = i, j
    return best


def by_definition(x, mask, dy):
    """y and dx."""
    y, dx = np.empty(dy.shape), np.zeros(x.shape)
    for n, c in np.ndindex(dy.shape):
        i, j = winner(x, mask, n, c)
        y[n, c], dx[n, i, j, c] = x[n, i, j, c], dy[n, c]
    return y, dx


@st.composite
def masks(draw, shape, seed):
    """None, or a mask for every channel its own or one for all, that allows each image and channel at least one position."""
    N, H, W, C = shape
    rng = np.random.default_rng(seed)
    mask = rng.random((N, H, W, draw(st.sampled_from([1, C])))) < draw(st.sampled_from([0, 0.3, 0.7]))
    for n, c in np.ndindex(N, mask.shape[3]):
        mask[n, rng.integers(H), rng.integers(W), c] = True
    return draw(st.sampled_from([None, mask]))


@st.composite
def cases(draw):
    """A map full of ties, infinities and NaN, a mask and dy."""
    shape, seed = tuple(draw(st.integers(1, m)) for m in (3, 4, 4, 3)), draw(seeds)
    rng = np.random.default_rng(seed)
    values = draw(st.sampled_from([[-np.inf, -1, 0, 0.5, np.inf], [-np.inf, -np.inf, -2], [-np.inf, -1, 0.5, np.nan]]))
    return rng.choice(values, shape), draw(masks(shape, seed + 1)), rng.standard_normal((shape[0], shape[3]))


@st.composite
def smooth_cases(draw):
    """As cases, without kinks: for gradients."""
    x = draw(distinct_NHWC(max_side=4, max_C=3))
    return x, draw(masks(x.shape, draw(seeds)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_value_and_winner_are_the_definition(backend, case):
    x, mask, dy = case
    with use(backend) as put:
        y, cache = global_max_pool.forward(put(x), mask if mask is None else put(mask))
        dx = global_max_pool.backward(put(dy), cache)
    for a, b in zip((y, dx), by_definition(x, mask, dy)):
        assert_array_equal(to_numpy(a), b, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=smooth_cases())
def test_gradient(backend, case):
    x, mask = case
    with use(backend) as put:
        mask = mask if mask is None else put(mask)
        check_grad(lambda x: global_max_pool.forward(x, mask), global_max_pool.backward, [x], put=put)


@given(case=cases(), other=seeds)
def test_what_the_mask_forbids_changes_nothing(case, other):
    x, mask, dy = case
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    kept, changed = mask.copy(), np.where(mask, x, np.random.default_rng(other).choice([np.nan, np.inf, -np.inf, 9.0], x.shape))
    results = []
    for values in (x, changed):
        y, cache = global_max_pool.forward(values, mask)
        results.append((y, global_max_pool.backward(dy, cache)))
    for a, b in zip(*results):
        assert_array_equal(a, b)
    assert_array_equal(mask, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x, mask, y, at", [
    ([1, 5, 5, 5], None, 5, 1),                                             # a tie: the first
    ([5, 1, 5, 5], [0, 1, 1, 1], 5, 2),                                     # a tie: the first that is allowed
    ([9, 1, 5, 5], [0, 1, 0, 0], 1, 1),                                     # larger values are forbidden
    ([np.nan, 1, 5, np.nan], [0, 1, 1, 0], 5, 2),                           # NaN is forbidden
    ([np.inf, 1, np.nan, np.nan], None, np.nan, 2),                         # the first NaN wins, over infinity too
    ([np.nan, np.inf, 0, np.nan], [0, 1, 1, 1], np.nan, 3),
    ([-np.inf, 7, -np.inf, -np.inf], [0, 0, 1, 1], -np.inf, 2),             # all that is allowed is -inf: the first of it
    ([-np.inf] * 4, None, -np.inf, 0),
])
def test_who_wins(backend, x, mask, y, at):
    x, mask = np.array(x, float).reshape(1, 2, 2, 1), None if mask is None else np.array(mask, bool).reshape(1, 2, 2, 1)
    with use(backend) as put:
        value, cache = global_max_pool.forward(put(x), mask if mask is None else put(mask))
        dx = global_max_pool.backward(put(np.full((1, 1), 3.0)), cache)
    assert_array_equal(to_numpy(value), [[y]])
    assert_array_equal(to_numpy(dx).ravel(), 3 * (np.arange(4) == at))


F = np.array([[[-1, 0.5, 2], [0, 1, -2]], [[-3, -0.5, -1], [-2, -0.5, -4]], [[0.2, 0.1, -0.7], [0.3, 1.5, 0.9]]])
F = F.transpose(1, 2, 0)[None]
Y = np.array([[1, -1, -1]])


def test_max_and_logistic_loss_of_the_notes():
    """Oquab notes 7, fixture 14: three classes on a 2 x 3 map; class 1 ties at cells 1 and 4."""
    scores, cache = global_max_pool.forward(F)
    assert_array_equal(scores, [[2, -0.5, 1.5]])
    value, dscores = logistic_loss.loss(scores, Y, signed=True)
    dx = global_max_pool.backward(dscores, cache).reshape(6, 3)
    expected = np.zeros((6, 3))
    expected[[2, 1, 4], [0, 1, 2]] = -0.119203, 0.377541, 0.817574
    assert_allclose(value, 2.302418, atol=1e-6)
    assert_allclose(dx, expected, atol=1e-6)
    assert_array_equal(dx != 0, expected != 0)


def test_masked_pooling_of_the_notes():
    """Fixture 14, second part: class 0 may look at cell 1 alone."""
    mask = np.ones((1, 2, 3, 3), bool)
    mask.reshape(6, 3)[:, 0] = np.arange(6) == 1
    scores, cache = global_max_pool.forward(F, mask)
    assert_array_equal(scores, [[0.5, -0.5, 1.5]])
    dx = global_max_pool.backward(logistic_loss.loss(scores, Y, signed=True)[1], cache)
    assert_allclose(dx[0, :, :, 0], [[0, -0.377541, 0], [0, 0, 0]], atol=1e-6)


def test_two_layer_head_through_the_max_of_the_notes():
    """Oquab notes 7, fixture 15: three cells, two 1x1 convolutions, max, logistic loss, and back to the cells."""
    x = np.array([[1.0, 0], [0, 2], [1, 1]]).reshape(1, 3, 1, 2)
    a, cache_a = conv.forward(x, np.array([[[[1, -1], [0.5, 1]]]]), np.zeros(2))
    h, cache_h = relu.forward(a)
    f, cache_f = conv.forward(h, np.array([[[[1, -1], [2, 0.5]]]]), np.array([0, -0.5]))
    scores, cache = global_max_pool.forward(f)
    value, ds = logistic_loss.loss(scores, np.array([[1, -1]]), signed=True)
    dh, dwb, dbb = conv.backward(global_max_pool.backward(ds, cache), cache_f)
    dx, dwa, dba = conv.backward(relu.backward(dh, cache_h), cache_a)
    assert_allclose(scores, [[5, -0.5]], atol=1e-12)
    assert_allclose(value, 0.480792, atol=1e-6)
    assert_allclose(dwb[0, 0], [[-0.006693, 0.377541], [-0.013386, 0.755081]], atol=1e-6)
    assert_allclose(dbb, [-0.006693, 0.377541], atol=1e-6)
    assert_allclose(dwa[0, 0], [[0, 0], [-0.768467, 0.350769]], atol=1e-6)
    assert_allclose(dba, [-0.384234, 0.175385], atol=1e-6)
    assert_allclose(dx[0, :, 0], [[0, 0], [-0.559618, -0.016732], [0, 0]], atol=1e-6)


def pooled_loss(x, labels, mask=None):
    scores, cache = global_max_pool.forward(x, mask)
    value, ds = logistic_loss.loss(scores, labels, signed=True)
    return value, global_max_pool.backward(ds, cache)


@given(x=distinct_NHWC(max_side=4, max_C=3), seed=seeds)
def test_properties_of_max_and_logistic_loss(x, seed):
    """Oquab notes 7, item 17."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 1], (len(x), x.shape[3]))
    value, dx = pooled_loss(x, labels)
    s = x.max((1, 2))
    assert ((dx != 0).sum((1, 2)) == 1).all() and (np.abs(dx) < 1 / len(x)).all()
    assert_allclose(dx.sum((1, 2)) * len(x), -labels / (1 + np.exp(labels * s)), rtol=1e-12)
    check_loss(lambda x: pooled_loss(x, labels), [x])

    rest = (dx != 0) | (rng.random(x.shape) < 0.5)                      # without cells that did not win
    without, dwithout = pooled_loss(x, labels, rest)
    assert without == value
    assert_array_equal(dwithout, dx)

    moved = x.copy()                                                    # another class moves
    moved[..., 0] += 10
    assert_array_equal(pooled_loss(moved, labels)[1][..., 1:], dx[..., 1:])


def test_float32_and_transposed():
    x, mask = distinct((3, 5, 4, 2), 0), np.random.default_rng(1).random((3, 5, 4, 2)) < 0.6
    y, cache = global_max_pool.forward(x.T, mask.T)
    dy = np.random.default_rng(2).standard_normal((3, 2)).T
    dx = global_max_pool.backward(dy, cache)
    for a, b in zip((y, dx), by_definition(x.T, mask.T, dy)):
        assert_array_equal(a, b)
    y32, cache32 = global_max_pool.forward(x.T.astype(np.float32), mask.T)
    assert_array_equal(y32, y.astype(np.float32), strict=True)
    assert_array_equal(global_max_pool.backward(dy.astype(np.float32), cache32), dx.astype(np.float32), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, np.ones((0, 4, 5, 2), bool)])
def test_no_image_and_one_element(backend, mask):
    with use(backend) as put:
        y, cache = global_max_pool.forward(put(np.zeros((0, 4, 5, 2))), mask if mask is None else put(mask))
        assert y.shape == (0, 2) and global_max_pool.backward(y, cache).shape == (0, 4, 5, 2)
        y, cache = global_max_pool.forward(put(np.full((1, 1, 1, 1), -3.0)))
        assert to_numpy(y).item() == -3 and to_numpy(global_max_pool.backward(y, cache)).item() == -3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 15, 1, 31), (2, 4, 4, 32), (1, 1, 17, 33), (3, 5, 13, 63), (1, 16, 16, 65), (1, 1, 257, 1)])
@pytest.mark.parametrize("mask", [None, 1, 2])
def test_block_borders(backend, shape, mask):
    """Channels and positions about what a block and its lanes take, over ties, infinities and NaN: as NumPy, to the bit."""
    rng = np.random.default_rng(0)
    x = rng.choice([-np.inf, -1, 0, 1, np.inf, np.nan], shape, p=[0.3, 0.3, 0.3, 0.08, 0.01, 0.01]).astype(np.float32)
    mask = None if mask is None else rng.random((*shape[:3], 1 if mask == 1 else shape[3])) < 0.7
    dy, results = rng.standard_normal((shape[0], shape[3])).astype(np.float32), []
    for name in (backend, "numpy"):
        with use(name) as put:
            y, cache = global_max_pool.forward(put(x), mask if mask is None else put(mask))
            results.append([to_numpy(a) for a in (y, cache[1], global_max_pool.backward(put(dy), cache))])
    for a, b in zip(*results):
        assert_array_equal(a, b)
    assert results[0][0].dtype == results[0][2].dtype == np.float32


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_the_order_of_threads_changes_no_bit():
    x, results = np.random.default_rng(0).integers(0, 3, (2, 9, 5, 40)).astype(np.float64), []
    for order in ("forward", "reverse", "random"):
        with use("emulated"), emulate.options(order=order, seed=4):
            y, cache = global_max_pool.forward(x)
            results.append((y, cache[1], global_max_pool.backward(y, cache)))
    for result in results:
        for a, b in zip(result, results[0]):
            assert_array_equal(a, b, strict=True)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_on_a_gpu_where_nothing_is_allowed_y_is_nan_and_dx_zero():
    x, mask = distinct((2, 2, 2, 2), 0), np.ones((2, 2, 2, 2), bool)
    mask[1, :, :, 0] = False
    with fake_cupy.installed(), use("cuda") as put:
        x, mask, dy = put(x), put(mask), put(np.ones((2, 2)))
        with fake_cupy.no_copies():
            y, cache = global_max_pool.forward(x, mask)
            dx = global_max_pool.backward(dy, cache)
        assert_array_equal(np.isnan(to_numpy(y)), [[0, 0], [1, 0]])
        assert_array_equal(to_numpy(dx).sum((1, 2)), [[1, 1], [0, 1]])


def only(*allowed):
    mask = np.zeros((2, 2, 2, 2), bool)
    for n, c in allowed:
        mask[n, 1, 0, c] = True
    return mask


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((2, 2, 2))), ValueError, r"x must have shape \(N, H, W, C\), got \(2, 2, 2\)"),
    (dict(x=np.zeros((2, 2, 2, 2), int)), TypeError, "x must be float32 or float64, got int64"),
    (dict(x=np.zeros((2, 0, 2, 2))), ValueError, r"x must hold at least one position, got \(2, 0, 2, 2\)"),
    (dict(x=np.zeros((2, 2, 0, 2))), ValueError, r"x must hold at least one position, got \(2, 2, 0, 2\)"),
    (dict(mask=[True]), TypeError, "mask must be an array, got list"),
    (dict(mask=np.ones((2, 2, 2, 2))), TypeError, "mask must be bool, got float64"),
    (dict(mask=np.ones((2, 2, 2), bool)), ValueError, r"mask must have shape \(2, 2, 2, 2\) or \(2, 2, 2, 1\), got \(2, 2, 2\)"),
    (dict(mask=np.ones((1, 2, 2, 2), bool)), ValueError, r"mask must have shape .* got \(1, 2, 2, 2\)"),
    (dict(mask=only((0, 0), (0, 1), (1, 0))), ValueError,
     "mask must allow a position for every image and channel, got none for image 1, channel 1"),
    (dict(mask=only((0, 0), (1, 0))), ValueError, "mask must allow a position .* got none for image 0, channel 1"),
    (dict(mask=only()[..., :1]), ValueError, "mask must allow a position .* got none for image 0, channel 0"),
])
def test_forward_errors(change, error, message):
    with pytest.raises(error, match=r"^global_max_pool\.forward: " + message):
        global_max_pool.forward(**{**dict(x=np.zeros((2, 2, 2, 2))), **change})


def test_backward_errors():
    y, cache = global_max_pool.forward(np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match=r"^global_max_pool\.backward: dy must have shape \(1, 3\), got \(1, 2, 2, 3\)"):
        global_max_pool.backward(np.zeros((1, 2, 2, 3)), cache)
    with pytest.raises(TypeError, match=r"^global_max_pool\.backward: dy must be float32 or float64, got int64"):
        global_max_pool.backward(y.astype(int), cache)
