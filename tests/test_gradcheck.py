import re

import numpy as np
import pytest

from conftest import distinct
from tinydet.gradcheck import check_grad, check_loss


def product(a, b):                      # y = a @ b, and its right gradient
    return a @ b, (a, b)


def d_product(dy, cache):
    a, b = cache
    return dy @ b.T, a.T @ dy


def inputs():
    return [distinct((3, 3), 0), distinct((3, 3), 1)]


def test_a_right_backward_passes_and_the_error_is_returned():
    assert 0 < check_grad(product, d_product, inputs()) < 1e-8
    assert check_grad(lambda x: (x, None, "extra"), lambda dy, cache: dy, [distinct((2, 2), 0)]) < 1e-9
    assert check_grad(lambda x: (x, None), lambda dy, cache: dy, [np.zeros((0, 3))]) == 0


@pytest.mark.parametrize("wrong, blamed", [
    (lambda dy, cache: (-d_product(dy, cache)[0], d_product(dy, cache)[1]), 0),             # sign
    (lambda dy, cache: (d_product(dy, cache)[0], 2 * d_product(dy, cache)[1]), 1),          # factor
    (lambda dy, cache: (d_product(dy, cache)[0].T, d_product(dy, cache)[1]), 0),            # transposed
    (lambda dy, cache: (dy @ cache[1], d_product(dy, cache)[1]), 0),                        # a transpose forgotten
    (lambda dy, cache: d_product(dy, cache)[::-1], 0),                                      # wrong order
])
def test_a_wrong_backward_is_caught(wrong, blamed):
    with pytest.raises(AssertionError, match=rf"gradient of input {blamed} at \(\d, \d\) must be"):
        check_grad(product, wrong, inputs())


def test_the_message_names_index_and_both_values():
    def square(x):
        return x * x, x

    def wrong(dy, x):
        dx = 2 * x * dy
        dx[1, 2] += 5
        return dx
    x = distinct((2, 3), 3)
    with pytest.raises(AssertionError) as e:
        check_grad(square, wrong, [x], dy=np.full((2, 3), -1.5))
    right = -3 * x[1, 2]
    found = re.search(r"input 0 at \(1, 2\) must be (\S+) \(central difference\), got (\S+) from backward", str(e.value))
    np.testing.assert_allclose([float(f) for f in found.groups()], [right, right + 5], rtol=1e-8)


def test_one_bad_element_among_large_ones_is_seen_and_the_bound_is_the_limit():
    def off(by):
        return lambda dy, cache: dy * (1 + by * np.eye(3))
    check_grad(lambda x: (x, None), off(0.5e-6), [distinct((3, 3), 0)], dy=np.ones((3, 3)))
    for by in (1.1e-6, 2e-6):
        with pytest.raises(AssertionError, match=f"relative error {by:.3g}, bound 1e-06"):
            check_grad(lambda x: (x, None), off(by), [distinct((3, 3), 0)], dy=np.ones((3, 3)))


def test_a_changed_argument_is_named():
    def spoils(x):
        x *= 2
        return x.copy(), None

    def spoils_x(dy, cache):
        cache[0] = 0
        return dy

    def spoils_dy(dy, cache):
        dy *= 2
        return dy / 2
    x = [distinct((2, 2), 0)]
    with pytest.raises(AssertionError, match="forward must not change its arguments, got a changed input 0"):
        check_grad(spoils, lambda dy, cache: 2 * dy, x)
    with pytest.raises(AssertionError, match="backward must not change its arguments, got a changed input 0"):
        check_grad(lambda x: (x.copy(), x), spoils_x, x)
    with pytest.raises(AssertionError, match="backward must not change its arguments, got a changed dy"):
        check_grad(lambda x: (x.copy(), x), spoils_dy, x)
    np.testing.assert_array_equal(x[0], distinct((2, 2), 0))            # the caller's array stays whole


@pytest.mark.parametrize("gradient, message", [
    (lambda dy: dy[:1], r"gradient of input 0 must have shape \(2, 2\), got \(1, 2\)"),
    (lambda dy: dy.astype(np.float32), "gradient of input 0 must be a float64 array, got float32"),
    (lambda dy: None, "gradient of input 0 must be a float64 array, got NoneType"),
    (lambda dy: dy * np.array([[1, np.nan], [1, 1]]), r"gradient of input 0 must be finite, got nan at \(0, 1\)"),
    (lambda dy: (dy, dy), "one gradient for each of 1 inputs, got 2"),
])
def test_an_unfit_gradient_is_named(gradient, message):
    with pytest.raises(AssertionError, match=message):
        check_grad(lambda x: (x, None), lambda dy, cache: gradient(dy), [distinct((2, 2), 0)])


def test_unfit_arguments():
    def identity(x):
        return x, None
    with pytest.raises(TypeError, match="input 0 must be a float64 array, got float32"):
        check_grad(identity, lambda dy, c: dy, [np.zeros(2, np.float32)])
    with pytest.raises(TypeError, match="input 1 must be a float64 array, got list"):
        check_grad(product, d_product, [np.zeros((1, 1)), [1.0]])
    with pytest.raises(ValueError, match="input 0 must be finite"):
        check_grad(identity, lambda dy, c: dy, [np.array([np.inf])])
    with pytest.raises(ValueError, match=r"dy must have the shape of y \(2,\), got \(3,\)"):
        check_grad(identity, lambda dy, c: dy, [np.zeros(2)], dy=np.zeros(3))
    with pytest.raises(AssertionError, match=r"y must be finite, got nan at \(1,\)"):
        check_grad(lambda x: (x * [1, np.nan], None), lambda dy, c: dy, [np.ones(2)])


def test_check_loss():
    x = distinct((4,), 0)
    assert check_loss(lambda x: (float((x ** 3).sum()), 3 * x ** 2), [x]) < 1e-8
    assert check_loss(lambda a, b: (float((a * b).sum()), b, a), [x, x[::-1]]) < 1e-8
    with pytest.raises(AssertionError, match=r"gradient of input 0 at \(\d,\) must be"):
        check_loss(lambda x: (float((x ** 3).sum()), 3.001 * x ** 2), [x])


# What a table of numbers alone would not see

def spoiled(dy, cache):
    cache *= 2
    return dy * cache / 2


WORKSPACE = np.zeros((2, 3))


def into_workspace(x):
    WORKSPACE[...] = 2 * x
    return x * x, WORKSPACE


CALLS = []


def right_once(dy, x):
    CALLS.append(1)
    return 2 * x * dy if len(CALLS) == 1 else 3 * x * dy


@pytest.mark.parametrize("forward, backward", [
    (lambda x: (x * x, 2 * x), spoiled),
    (lambda x: (x * x, 2 * x), lambda dy, cache: (dy * cache, cache.fill(0))[0]),
    (into_workspace, lambda dy, cache: dy * cache),
    (lambda x: (x * x, x), right_once),
    (lambda x: (x * x, x), lambda dy, x: 2 * x * np.random.default_rng(0).standard_normal((2, 3))),
    (lambda x: (x * x, x), lambda dy, x: 2 * x * np.where(dy > 0, dy, dy * (dy == np.random.default_rng(0).standard_normal((2, 3))))),
])
def test_a_spoiled_cache_or_a_backward_that_ignores_dy_is_caught(forward, backward):
    CALLS.clear()
    with pytest.raises(AssertionError, match="backward must give the same gradient of input 0 again, and its negative for -dy"):
        check_grad(forward, backward, [distinct((2, 3), 0)])


def test_dy_is_of_both_signs():
    with pytest.raises(AssertionError, match="gradient of input 0 at"):
        check_grad(lambda x: (x * x, x), lambda dy, x: 2 * x * abs(dy), [distinct((2, 3), 0)])


def test_outputs_in_lists_of_lists():
    def forward(x):
        return [[x * x, 2 * x], [x ** 3]], x

    def backward(dys, x):
        (a, b), (c,) = dys
        return 2 * x * a + 2 * b + 3 * x * x * c
    x = [distinct((2, 2), 0)]
    assert check_grad(forward, backward, x) < 1e-7
    assert check_grad(forward, backward, x, dy=[[x[0], x[0]], [x[0]]]) < 1e-7
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_grad(forward, lambda dys, x: backward([dys[0][::-1], dys[1]], x), x)
    with pytest.raises(ValueError, match="dy must hold an array for each of 3 outputs, got 2"):
        check_grad(forward, backward, x, dy=[x[0], x[0]])
    with pytest.raises(AssertionError, match=r"y\[2\] must be a float64 array, got float32"):
        check_grad(lambda x: ([[x, x], [x.astype(np.float32)]], x), backward, x)
