import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import use
from tinydet.gradcheck import check_grad
from tinydet.ops import conv, conv_direct

SHAPES = [                                          # N, H, W, Cin, Cout, kh, kw, stride, dilation, pad
    (2, 9, 11, 5, 7, 3, 3, 2, 1, (1, 1, 1, 1)),
    (2, 9, 11, 5, 70, 3, 2, 2, 1, (1, 0, 2, 1)),
    (1, 30, 31, 3, 96, 11, 11, 4, 1, (0, 0, 0, 0)),
    (2, 30, 31, 3, 33, 7, 7, 2, 1, (3, 3, 3, 3)),
    (2, 12, 13, 20, 17, 3, 3, 1, 2, (2, 2, 2, 2)),
    (2, 12, 13, 20, 17, 3, 3, 1, 3, (0, 0, 0, 0)),
    (2, 14, 13, 20, 17, 3, 3, 2, 2, (1, 1, 1, 1)),  # stride and dilation share a factor: whole rows of x reach nothing
    (2, 14, 13, 20, 17, 3, 3, 2, 3, (1, 1, 1, 1)),
    (2, 14, 23, 2, 17, 2, 3, 3, 2, (1, 2, 3, 0)),
    (2, 14, 23, 2, 17, 3, 3, 4, 2, (1, 2, 3, 0)),
    (2, 30, 40, 64, 96, 3, 3, 2, 1, (1, 1, 1, 1)),
    (1, 5, 5, 64, 40, 5, 5, 1, 1, (0, 0, 0, 0)),
    (2, 7, 7, 64, 48, 4, 4, 1, 1, (0, 0, 0, 0)),
    (2, 6, 6, 4, 4, 1, 1, 2, 1, (0, 0, 0, 0)),      # a stride wider than the kernel
    (2, 6, 6, 4, 4, 1, 1, 1, 1, (1, 1, 1, 1)),
    (2, 3, 3, 4, 4, 2, 2, 5, 1, (4, 4, 4, 4)),      # a stride wider than the image
    (1, 9, 9, 16, 16, 3, 3, 1, 1, (3, 3, 3, 3)),
    (0, 9, 9, 16, 16, 4, 4, 1, 1, (0, 0, 0, 0)),
]


def case(shape, dtype=np.float64, seed=0):
    """x, w, b, dy, what a layer is, and the float64 results of the reference: y, dx, dw."""
    N, H, W, Cin, Cout, kh, kw, stride, dilation, pad = shape
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((N, H, W, Cin), (kh, kw, Cin, Cout), (Cout,)))
    with use("numpy"):
        y, cache = conv.forward(*(a.astype(np.float64) for a in (x, w, b)), stride, pad, dilation)
        dy = rng.standard_normal(y.shape).astype(dtype)
        return x, w, b, dy, (stride, pad, dilation), (y, *conv.backward(dy.astype(np.float64), cache)[:2])


def results(x, w, b, dy, how):
    stride, pad, dilation = how
    return (conv_direct.forward(x, w, b, stride, pad, dilation, dy.shape[1:3]), conv_direct.input_gradient(dy, w, x.shape, *how),
            conv_direct.weight_gradient(x, dy, w.shape, *how))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [False, True])    # True: strips of one row, the kernel row by row, one part of dw
def test_all_three_are_the_reference_in_float64(shape, small, monkeypatch, all_threads):
    if small:
        for name in ("STRIP", "FIRST", "PARTS"):
            monkeypatch.setattr(conv_direct, name, 1)
    *arrays, expected = case(shape)
    for a, e in zip(results(*arrays), expected):
        assert a.dtype == np.float64 and a.flags.c_contiguous
        assert_allclose(a, e, rtol=0, atol=1e-12 * np.abs(e).max(initial=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_errors_are_those_of_a_plain_sum(shape):
    *arrays, expected = case(shape, np.float32)
    for a, e in zip(results(*arrays), expected):
        assert a.dtype == np.float32
        assert np.abs(a - e).max(initial=0) <= 1e-5 * np.abs(e).max(initial=1)


@pytest.mark.parametrize("kernel, how", [((3, 3), (2, (1, 0, 1, 1), 1)), ((4, 3), (3, 1, 1)), ((2, 3), (1, 1, 2)), ((3, 2), (2, 2, 2))])
def test_gradient(kernel, how):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(s) for s in ((2, 6, 7, 2), (*kernel, 2, 3), (3,))]
    with conv.exact():
        check_grad(lambda x, w, b: conv.forward(x, w, b, *how), conv.backward, arrays)


def test_the_same_bits_for_any_number_of_threads():
    import numba
    *arrays, _ = case((3, 60, 50, 16, 40, 3, 3, 2, 1, (1, 1, 1, 1)), np.float32)
    one = results(*arrays)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    try:
        for a, e in zip(results(*arrays), one):
            assert_array_equal(a, e)
    finally:
        numba.set_num_threads(1)


def test_a_view_is_written_and_nothing_around_it():
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s) for s in ((2, 8, 9, 3), (3, 3, 3, 5), (5,)))
    whole = np.full((2, 12, 14, 5), 7.0)
    conv_direct.correlate(x, [(w, whole[:, 1::2, ::2], 0, 0)], whole, b, 1, 1)
    with use("numpy"):
        assert_allclose(whole[:, 1::2, ::2], conv.forward(x, w, b)[0], rtol=1e-12, atol=1e-12)
    assert (whole[:, ::2] == 7).all() and (whole[:, :, 1::2] == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_read_or_written_out_of_range(shape, dtype, guarded):
    x, w, b, dy, how, expected = case(shape, dtype)
    for a, e in zip(results(guarded(x), guarded(w), guarded(b), guarded(dy), how), expected):
        assert np.abs(a - e).max(initial=0) <= 1e-5 * np.abs(e).max(initial=1)
