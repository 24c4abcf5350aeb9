import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct, distinct_NHWC, seeds
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv, max_pool, offset_pool, relu

sizes = st.integers(1, 3)


def map_by_definition(x, p, oy, ox):
    """Drop oy rows and ox columns, then p x p max pooling of stride p, floor (notes 3.1 b)."""
    N, H, W, C = x.shape
    y = np.empty((N, (H - oy) // p, (W - ox) // p, C))
    for n, i, j, c in np.ndindex(y.shape):
        y[n, i, j, c] = max(x[n, oy + p * i + u, ox + p * j + v, c] for u in range(p) for v in range(p))
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=3, max_side=8), p=sizes)
def test_the_maps_of_all_offsets_are_the_definition(backend, x, p):
    with use(backend) as put:
        maps = offset_pool.split(offset_pool.forward(put(x), p)[0], p)
    assert len(maps) == p * p
    for k, m in enumerate(maps):
        assert_array_equal(to_numpy(m), map_by_definition(x, p, *divmod(k, p)))


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=3, max_side=7), p=sizes)
def test_gradient(backend, x, p):
    with use(backend) as put:
        check_grad(lambda x: offset_pool.forward(x, p), offset_pool.backward, [x], put=put)


@pytest.mark.parametrize("backend", BACKENDS)
@given(x=distinct_NHWC(min_side=3, max_side=8), p=sizes, seed=seeds)
def test_backward_equals_add_at(backend, x, p, seed):
    with use(backend) as put:
        s, cache = offset_pool.forward(put(x), p)
        ds = np.random.default_rng(seed).standard_normal(s.shape)
        dx = to_numpy(offset_pool.backward(put(ds), cache))
    expected = np.zeros(x.shape)
    for n, i, j, c in np.ndindex(ds.shape):
        u, v = np.unravel_index(x[n, i:i + p, j:j + p, c].argmax(), (p, p))
        np.add.at(expected, (n, i + u, j + v, c), ds[n, i, j, c])
    assert_allclose(dx, expected, rtol=1e-12, atol=1e-12)
    assert_allclose(dx.sum(), ds.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_1d_example(backend):
    """Notes 3.6: n = 20, p = 3, k = 5. Five equal columns stand for 1-D; column 0 wins the ties and has the gradient."""
    x = np.repeat(9 * np.arange(20) % 20, 5).reshape(1, 20, 5, 1) * 1.0
    w, b = np.array([1.0, -1, 2, 0, 1]).reshape(5, 1, 1, 1), np.zeros(1)
    with use(backend) as put:
        s, cache = offset_pool.forward(put(x), 3)
        heads = [conv.forward(m, put(w), put(b)) for m in offset_pool.split(s, 3)]
        F = offset_pool.interleave([y for y, _ in heads], 3)
        gF = np.zeros((1, 6, 3, 1))
        gF[0, :, 0, 0] = 1, 2, 3, 4, 5, 6
        gs = [conv.backward(g, c)[0] for g, (_, c) in zip(offset_pool.split(put(gF), 3), heads)]
        gS = offset_pool.interleave(gs, 3)
        gx = to_numpy(offset_pool.backward(gS, cache))
    s, F = to_numpy(s), to_numpy(F)
    for oy, pooled in enumerate(([18, 16, 14, 19, 17, 15], [18, 16, 12, 19, 17, 13], [18, 14, 12, 19, 15, 13])):
        assert_array_equal(s[0, oy::3, 0, 0], pooled)
    assert_array_equal(s[0, :, 2, 0], [18, 18, 18, 16, 16, 14, 14, 12, 12, 19, 19, 19, 17, 17, 15, 15, 13, 13])
    for column in range(3):
        assert_array_equal(F[0, :, column, 0], [47, 43, 43, 55, 55, 53])
    assert_array_equal(to_numpy(gS)[0, :, 0, 0], [1, 2, 3, 3, 3, 3, -2, -1, 0, 8, 10, 12, 1, 2, 3, 4, 5, 6])
    assert_array_equal(gx[0, :, 0, 0], [0, 0, 6, 0, 6, 0, 1, 0, -1, 0, 0, 30, 0, 3, 0, 7, 0, 11, 0, 0])
    assert_array_equal(gx[:, :, 1:], 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_2d_example(backend):
    x = np.array([[5.0, 1, 4, 2], [3, 9, 0, 7], [8, 6, 2, 1], [1, 4, 3, 5]]).reshape(1, 4, 4, 1)
    with use(backend) as put:
        s, cache = offset_pool.forward(put(x), 2)
        maps = [to_numpy(m)[0, :, :, 0].tolist() for m in offset_pool.split(s, 2)]
        dx = offset_pool.backward(put(np.ones((1, 3, 3, 1))), cache)
    assert maps == [[[9, 7], [8, 5]], [[9], [6]], [[9, 7]], [[9]]]
    assert_array_equal(to_numpy(s)[0, :, :, 0], [[9, 9, 7], [9, 9, 7], [8, 6, 5]])
    assert_array_equal(to_numpy(dx)[0, :, :, 0], [[0, 0, 0, 0], [0, 4, 0, 2], [1, 1, 0, 0], [0, 0, 0, 1]])


@given(n=st.integers(1, 9), m=st.integers(1, 9), p=st.integers(1, 4))
def test_split_is_a_permutation_and_interleave_its_inverse(n, m, p):
    """Also for maps of unequal size, and for offsets past the end."""
    s = np.arange(2.0 * n * m * 3).reshape(2, n, m, 3)
    maps = offset_pool.split(s, p)
    assert_array_equal(np.sort(np.concatenate([v.ravel() for v in maps])), s.ravel())
    assert_array_equal(offset_pool.interleave(maps, p), s, strict=True)
    for (oy, ox), v in zip(offset_pool.offsets(p), maps):
        for i, j in np.ndindex(v.shape[1:3]):
            assert_array_equal(v[:, i, j], s[:, p * i + oy, p * j + ox])


def head(x, w, b, w1, dilation=1):
    """k x k conv, ReLU, 1x1 conv, as OverFeat's classifier; caches for head_dw."""
    y, c0 = conv.forward(x, w, b, dilation=dilation)
    y, c1 = relu.forward(y)
    y, c2 = conv.forward(y, w1, 0 * w1[0, 0, 0])
    return y, (c0, c1, c2)


def head_dw(dy, caches):
    return conv.backward(relu.backward(conv.backward(dy, caches[2])[0], caches[1]), caches[0])[1]


@pytest.mark.parametrize("backend", BACKENDS)
@given(p=st.integers(2, 3), k=st.integers(1, 3), more=st.tuples(st.integers(0, 4), st.integers(0, 4)), seed=seeds)
def test_offset_route_is_dilated_route_is_naive_route(backend, p, k, more, seed):
    """Notes 3.4 and tests 4, 5: the same F, and the same weight gradient; n such that every offset has an output."""
    rng = np.random.default_rng(seed)
    n, m = (p * k + p - 1 + q for q in more)
    U, w, b, w1 = (rng.standard_normal(s) for s in ((2, n, m, 3), (k, k, 3, 4), (4,), (1, 1, 4, 2)))
    with use(backend) as put:
        U, w, b, w1 = map(put, (U, w, b, w1))
        s, _ = offset_pool.forward(U, p)
        by_offset = [head(v, w, b, w1) for v in offset_pool.split(s, p)]
        F = offset_pool.interleave([y for y, _ in by_offset], p)
        dilated, caches = head(s, w, b, w1, dilation=p)
        naive = np.empty((2, n - p * k + 1, m - p * k + 1, 2))
        for r, c in np.ndindex(naive.shape[1:3]):
            block, _ = max_pool.forward(U[:, r:r + p * k, c:c + p * k], p)
            naive[:, r:r + 1, c:c + 1] = to_numpy(head(block, w, b, w1)[0])
        gF = put(rng.standard_normal(F.shape))
        dw = to_numpy(sum(head_dw(g, c) for g, (_, c) in zip(offset_pool.split(gF, p), by_offset)))
        dw_dilated, F, dilated = map(to_numpy, (head_dw(gF, caches), F, dilated))
    assert_allclose(F, dilated, rtol=1e-12, atol=1e-12)
    assert_allclose(F, naive, rtol=1e-12, atol=1e-12)
    assert_allclose(dw, dw_dilated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pad, same", [(0, True), (1, False)])
def test_the_dense_map_is_the_net_on_every_crop_only_without_padding(pad, same):
    """Notes 3.4: jump 4. A padded trunk sees real pixels where a crop sees zeros, so there the equality must fail."""
    rng = np.random.default_rng(0)
    w0, w1, w2, w3 = (rng.standard_normal(s) for s in ((3, 3, 2, 3), (3, 3, 3, 4), (2, 2, 4, 3), (1, 1, 3, 2)))
    image = rng.standard_normal((1, 45, 41, 2))

    def trunk(x):
        x = relu.forward(conv.forward(x, w0, np.ones(3), 2)[0])[0]
        return relu.forward(conv.forward(max_pool.forward(x, 2)[0], w1, np.ones(4), 1, pad)[0])[0]
    F, _ = head(offset_pool.forward(trunk(image), 3)[0], w2, np.ones(3), w3, dilation=3)
    window = 33 - 8 * pad                                       # 4 * (6 + 2 - 2 * pad - 1) + 5 pixels give a 6 x 6 trunk map
    crops = np.empty_like(F)
    for r, c in np.ndindex(F.shape[1:3]):
        crop = image[:, 4 * r:4 * r + window, 4 * c:4 * c + window]
        crops[:, r:r + 1, c:c + 1] = head(max_pool.forward(trunk(crop), 3)[0], w2, np.ones(3), w3)[0]
    assert np.allclose(F, crops, rtol=1e-12, atol=1e-10) == same


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_one_element_transposed_and_float32(backend):
    x = distinct((2, 6, 5, 3), 0)
    with use(backend) as put:
        for shape, pooled in (((0, 3, 4, 2), (0, 1, 2, 2)), ((1, 3, 4, 0), (1, 1, 2, 0))):
            s, cache = offset_pool.forward(put(np.zeros(shape)), 3)
            assert s.shape == pooled and offset_pool.backward(s, cache).shape == shape
        assert to_numpy(offset_pool.forward(put(np.full((1, 1, 1, 1), 4.0)), 1)[0]).item() == 4
        s, cache = offset_pool.forward(put(x.transpose(0, 2, 1, 3)), 2)
        dx = to_numpy(offset_pool.backward(put(to_numpy(s).transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)), cache))
        plain, plain_cache = offset_pool.forward(put(x), 2)
        dplain = to_numpy(offset_pool.backward(plain, plain_cache))
        s32, cache32 = offset_pool.forward(put(x.astype(np.float32)), 2)
        dx32 = to_numpy(offset_pool.backward(s32, cache32))
    assert_array_equal(to_numpy(s).transpose(0, 2, 1, 3), to_numpy(plain))
    assert_array_equal(dx.transpose(0, 2, 1, 3), dplain)
    assert_array_equal(to_numpy(s32), to_numpy(plain).astype(np.float32), strict=True)
    assert_array_equal(dx32, dplain.astype(np.float32), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_gives_nan_in_every_tile_that_holds_it(backend):
    x = distinct((1, 4, 4, 1), 0)
    x[0, 1, 2, 0] = np.nan
    with use(backend) as put:
        s, _ = offset_pool.forward(put(x), 2)
    assert_array_equal(np.isnan(to_numpy(s))[0, :, :, 0], [[0, 1, 1], [0, 1, 1], [0, 0, 0]])


def results(backend, x, size):
    """Values, places and gradient of integers, whose sums are exact."""
    with use(backend) as put:
        s, cache = offset_pool.forward(put(x), size)
        ds = np.random.default_rng(5).integers(-8, 9, s.shape).astype(x.dtype)
        return [to_numpy(a) for a in (s, cache[3], offset_pool.backward(put(ds), cache))]


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, shape=st.tuples(st.integers(1, 2), st.integers(1, 21), st.integers(1, 5), st.integers(1, 4)), size=st.integers(1, 5),
       dtype=st.sampled_from([np.float32, np.float64]))
def test_every_backend_is_numpy_to_the_bit_over_ties_infinities_and_nan(backend, seed, shape, size, dtype):
    """More rows than a thread of the kernel does, for the size that it knows and for others."""
    shape = shape[0], max(shape[1], size), max(shape[2], size), shape[3]
    x = np.random.default_rng(seed).choice([-np.inf, -1, 0, 1, 2, np.inf, np.nan], shape, p=[0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1]).astype(dtype)
    for a, b in zip(results(backend, x, size), results("numpy", x, size)):
        assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, size", [((1, 1, 255, 1), 1), ((2, 4, 2, 64), 2), ((1, 3, 65, 4), 3), ((1, 12, 88, 3), 3), ((2, 11, 6, 63), 3),
                                         ((1, 19, 20, 2), 17), ((1, 257, 258, 1), 257)])
def test_block_borders_and_wide_indices(backend, shape, size):
    """Rows of 255, 256, 257 and more threads; places above 255 and above 65535."""
    if size < 17:
        x = np.random.default_rng(0).integers(0, 50, shape).astype(np.float32)
        for a, b in zip(results(backend, x, size), results("numpy", x, size)):
            assert_array_equal(a, b)
    if size > 16 and backend == "numba":
        return                                                              # it would compile for seconds
    x = np.indices(shape)[1:3].sum(0, dtype=float)                          # the last pixel of every tile wins
    s, places, dx = results(backend, x, size)
    assert_array_equal(s, x[:, size - 1:, size - 1:])
    assert_array_equal(places, np.full(s.shape, size * size - 1))
    ds = np.random.default_rng(5).integers(-8, 9, s.shape)
    assert_array_equal(dx, np.pad(ds, ((0, 0), (size - 1, 0), (size - 1, 0), (0, 0))))


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("size", [2, 3])
def test_the_order_of_threads_changes_no_bit(size):
    x, found = np.random.default_rng(0).standard_normal((2, 12, 7, 40)).astype(np.float32), []
    for order in ("forward", "random"):
        with use("emulated"), emulate.options(order=order, seed=size):
            s, cache = offset_pool.forward(x, size)
            found.append((s, cache[3], offset_pool.backward(s, cache)))
    for a, b in zip(*found):
        assert_array_equal(a, b, strict=True)


def test_errors():
    s = np.zeros((1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"^offset_pool\.forward: x \(1, 4, 4, 1\) holds no 5x5 window"):
        offset_pool.forward(s, 5)
    with pytest.raises(TypeError, match=r"^offset_pool\.forward: size must be an integer, got 2.0"):
        offset_pool.forward(s, 2.0)
    with pytest.raises(ValueError, match=r"^offset_pool\.backward: ds must have shape \(1, 3, 3, 1\), got \(1, 4, 4, 1\)"):
        offset_pool.backward(s, offset_pool.forward(s, 2)[1])
    for dtype, told in ((np.float32, "must be float64, as the result was, got float32"), (np.int64, "must be float32 or float64, got int64")):
        with pytest.raises(TypeError, match=rf"^offset_pool\.backward: ds {told}$"):
            offset_pool.backward(np.zeros((1, 3, 3, 1), dtype), offset_pool.forward(s, 2)[1])
    with pytest.raises(ValueError, match=r"^offset_pool\.split: s must have shape \(N, H, W, C\), got \(4, 4\)"):
        offset_pool.split(s[0, :, :, 0], 2)
    with pytest.raises(ValueError, match=r"^offset_pool\.split: size must be at least 1, got 0"):
        offset_pool.split(s, 0)
    with pytest.raises(ValueError, match=r"^offset_pool\.interleave: size must be at least 1, got 0"):
        offset_pool.interleave([], 0)
    with pytest.raises(ValueError, match=r"^offset_pool\.interleave: size 2 needs 4 maps, got 3"):
        offset_pool.interleave([s, s, s], 2)
    maps = offset_pool.split(np.zeros((1, 3, 5, 1)), 2)
    with pytest.raises(ValueError, match=r"^offset_pool\.interleave: maps of \[.*\] are not the split of one map"):
        offset_pool.interleave(maps[::-1], 2)
