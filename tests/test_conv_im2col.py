import numpy as np
import pytest
from numpy.testing import assert_array_equal

from conftest import BACKENDS
from tinydet import emulate, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv, conv_im2col, relu

KERNELS = [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")]
SHAPES = [                                          # x, w, stride, pad, dilation
    ((2, 5, 6, 3), (1, 1, 3, 4), (1, 0, 1)),
    ((2, 6, 5, 3), (1, 1, 3, 1), (2, 0, 1)),        # pixels that no window reads
    ((2, 7, 6, 3), (3, 2, 3, 5), (1, (1, 0, 2, 1), 1)),
    ((3, 9, 8, 1), (3, 3, 1, 2), (2, 1, 1)),
    ((2, 13, 11, 3), (3, 2, 3, 5), (3, (2, 1, 0, 3), 2)),
    ((1, 4, 6, 2), (4, 6, 2, 7), (1, 0, 1)),        # one window
    ((2, 2, 3, 2), (2, 2, 2, 3), (5, 4, 1)),        # a stride wider than the image, windows that lie outside it
    ((1, 5, 17, 3), (1, 1, 3, 2), (1, 0, 1)),       # 255 elements
    ((1, 16, 16, 1), (1, 1, 1, 2), (1, 0, 1)),      # 256
    ((1, 1, 257, 1), (1, 1, 1, 2), (1, 0, 1)),      # 257
]
layers = pytest.mark.parametrize("shape, kernel, how", SHAPES)
kernels = pytest.mark.parametrize("backend", KERNELS)


def random(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def results(arrays, dy, how, put):
    """y, dx, dw, db inside unrolled()."""
    with conv.unrolled():
        y, cache = conv.forward(*map(put, arrays), *how)
        return [to_numpy(a) for a in (y, *conv.backward(put(dy), cache))]


def case(shape, kernel, how, dtype):
    """x, w, b, then dy, then the reference's y, dx, dw and db in float64."""
    arrays = random(shape, kernel, kernel[3:], dtype=dtype)
    with use("numpy"):
        y, cache = conv.forward(*(a.astype(np.float64) for a in arrays), *how)
        dy = random(y.shape, dtype=dtype, seed=1)[0]
        return arrays, dy, (y, *conv.backward(dy.astype(np.float64), cache))


@kernels
@layers
@pytest.mark.parametrize("dtype, bound", [(np.float32, 1e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("room", [1, 1 << 25])      # 1: image by image
def test_all_is_the_reference_in_float64(backend, shape, kernel, how, dtype, bound, room, monkeypatch):
    monkeypatch.setattr(conv, "UNROLLED", room)
    arrays, dy, expected = case(shape, kernel, how, dtype)
    with use(backend) as put:
        found = results(arrays, dy, how, put)
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert np.linalg.norm(a - e) <= bound * np.linalg.norm(e)


@kernels
@pytest.mark.parametrize("shape, kernel, how", SHAPES[1:5])
def test_gradient(backend, shape, kernel, how):
    arrays = random((1, *shape[1:3], 1), (*kernel[:2], 1, 2), (2,))
    with use(backend) as put, conv.unrolled():
        check_grad(lambda x, w, b: conv.forward(x, w, b, *how), conv.backward, arrays, put=put)


@kernels
@pytest.mark.parametrize("images, groups", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_no_group_of_images_unrolls_to_more_than_the_limit(backend, images, groups, monkeypatch):
    arrays, dy, expected = case((5, 4, 5, 2), (3, 3, 2, 3), (1, 0, 1), np.float64)
    one, seen, unroll = 2 * 3 * 18, [], conv_im2col._unroll

    def watched(x, K, sizes):
        columns = unroll(x, K, sizes)
        seen.append(columns.size // one)
        return columns
    monkeypatch.setattr(conv_im2col, "_unroll", watched)
    monkeypatch.setattr(conv, "UNROLLED", (images + 1) * one - 1)
    with use(backend) as put:
        found = results(arrays, dy, (1, 0, 1), put)
    assert seen == 2 * groups                       # forward, dw
    for a, e in zip(found, expected, strict=True):
        assert np.linalg.norm(a - e) <= 1e-13 * np.linalg.norm(e)


@kernels
def test_unrolled_ends_with_its_block_and_also_after_an_error(backend, monkeypatch):
    arrays = random((1, 4, 4, 2), (3, 3, 2, 3), (3,))
    calls, forward = [], conv_im2col.forward
    monkeypatch.setattr(conv_im2col, "forward", lambda *a: calls.append(1) or forward(*a))
    with use(backend) as put:
        conv.forward(*map(put, arrays))
        assert not calls
        with conv.unrolled():
            conv.forward(*map(put, arrays))
        assert len(calls) == 1
        with pytest.raises(KeyError), conv.unrolled():
            raise KeyError
        conv.forward(*map(put, arrays))
        assert len(calls) == 1


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_unrolled_changes_nothing_on_the_cpu(backend):
    arrays = random((1, 12, 12, 2), (3, 3, 2, 3), (3,), dtype=np.float32)
    with use(backend) as put:
        expected = conv.forward(*map(put, arrays))[0]
        with conv.unrolled():
            assert_array_equal(conv.forward(*map(put, arrays))[0], expected, strict=True)


@kernels
def test_relu_is_the_op_behind_it(backend):
    arrays = random((2, 5, 6, 2), (3, 3, 2, 4), (4,), dtype=np.float32)
    with use(backend) as put, conv.unrolled():
        plain, cache = conv.forward(*map(put, arrays))
        expected, positive = relu.forward(plain)
        dy = put(random(plain.shape, dtype=np.float32, seed=1)[0])
        gradients = conv.backward(relu.backward(dy, positive), cache)
        y, cache = conv.forward(*map(put, arrays), relu=True)
        for a, e in zip((y, *conv.backward(dy, cache)), (expected, *gradients), strict=True):
            assert_array_equal(to_numpy(a), to_numpy(e), strict=True)


@kernels
def test_parts_that_are_not_needed_and_an_empty_batch(backend):
    arrays = random((2, 4, 5, 2), (3, 3, 2, 3), (3,))
    with use(backend) as put, conv.unrolled():
        y, cache = conv.forward(*map(put, arrays))
        full = conv.backward(y, cache)
        assert_array_equal(to_numpy(conv.backward(y, cache, need_dw=False)[0]), to_numpy(full[0]))
        assert_array_equal(to_numpy(conv.backward(y, cache, need_dx=False)[1]), to_numpy(full[1]))
        assert conv.backward(y, cache, False, False) == (None, None, None)
        y, cache = conv.forward(put(arrays[0][:0]), *map(put, arrays[1:]))
        dx, dw, db = map(to_numpy, conv.backward(y, cache))
    assert y.shape == (0, 2, 3, 3) and dx.shape == (0, 4, 5, 2)
    assert_array_equal(dw, np.zeros((3, 3, 2, 3)))
    assert_array_equal(db, np.zeros(3))


@kernels
def test_strided_arrays(backend):
    x, w, b = random((2, 6, 5, 3), (4, 3, 2, 3), (4,))
    x, w = x.transpose(0, 2, 1, 3), w.transpose(2, 3, 1, 0)
    with use("numpy"):
        y, cache = conv.forward(x, w, b, 2, 1)
        dy = random((2, y.shape[2], y.shape[1], 4), seed=1)[0].transpose(0, 2, 1, 3)
        expected = y, *conv.backward(dy, cache)
    with use(backend) as put:
        put_strided = lambda a: put(np.ascontiguousarray(a.T)).T                                # noqa: E731  put alone may copy
        for a, e in zip(results((x, w, b), dy, (2, 1), put_strided), expected, strict=True):
            assert np.linalg.norm(a - e) <= 1e-13 * np.linalg.norm(e)


@pytest.mark.skipif(emulate.missing() is not None, reason="needs the emulator")
def test_no_bit_depends_on_the_order_of_threads():
    arrays, dy, _ = case((2, 9, 8, 3), (3, 2, 3, 5), (2, 1, 1), np.float32)
    found = []
    for order, seed in (("forward", 0), ("random", 1), ("random", 2)):
        with use("emulated") as put, emulate.options(order=order, seed=seed):
            found.append(results(arrays, dy, (2, 1, 1), put))
    for other in found[1:]:
        for a, e in zip(other, found[0], strict=True):
            assert_array_equal(a, e)
