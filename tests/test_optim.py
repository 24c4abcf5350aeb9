import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import seeds
from tinydet.layers import Layer
from tinydet.optim import SGD, cosine_schedule, step_schedule


@given(seed=seeds, momentum=st.sampled_from([0, 0.6, 0.9]), decay=st.sampled_from([0, 1e-5, 0.1]), decay_all=st.booleans())
def test_sgd_is_the_definition(seed, momentum, decay, decay_all):
    """v = momentum * v + (g + decay * w); w = w - lr * v; decay on weights, on biases only with decay_all."""
    rng = np.random.default_rng(seed)
    layer = Layer(w=rng.standard_normal((2, 3)), b=rng.standard_normal(3))
    expected = {k: [float(a) for a in w.ravel()] for k, w in layer.params.items()}
    velocity = {k: [0.0] * len(w) for k, w in expected.items()}
    sgd = SGD(layer, momentum, decay, decay_all)
    for lr in (0.1, 0.1, 0.01):
        for k, g in layer.grads.items():
            g += rng.standard_normal(g.shape)
            for i, gi in enumerate(g.ravel()):
                decayed = gi + decay * expected[k][i] if k == "w" or decay_all else gi
                velocity[k][i] = momentum * velocity[k][i] + decayed
                expected[k][i] -= lr * velocity[k][i]
        sgd.step(lr)
        for k in expected:
            assert_allclose(layer.params[k].ravel(), expected[k], rtol=1e-12, atol=1e-12)
            assert_allclose(sgd.state[k].ravel(), velocity[k], rtol=1e-12, atol=1e-12)
            assert not layer.grads[k].any()                         # cleared


def test_step_updates_in_place_and_keeps_float32():
    layer = Layer(w=np.ones((2, 2), np.float32))
    w = layer.params["w"]
    layer.grads["w"] += 1
    SGD(layer, 0.9, 0.1).step(0.5)
    assert layer.params["w"] is w and w.dtype == np.float32
    assert_allclose(w, 1 - 0.5 * 1.1, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_is_named_and_nothing_is_updated(bad):
    layer = Layer(a=np.ones(3), b=np.ones((2, 2)))
    sgd = SGD(layer, 0.9, 0.1)
    layer.grads["a"] += 1
    layer.grads["b"][1, 0] = bad
    with pytest.raises(FloatingPointError, match=r"^SGD\.step: the gradient of b is not finite"):
        sgd.step(0.1)
    assert_array_equal(layer.params["a"], 1)
    assert_array_equal(layer.params["b"], 1)
    assert not any(v.any() for v in sgd.state.values())


@pytest.mark.parametrize("epoch, lr", [(0, 5e-2), (29, 5e-2), (30, 0.025), (49, 0.025), (50, 0.0125), (59, 0.0125), (60, 0.00625),
                                       (69, 0.00625), (70, 0.003125), (79, 0.003125), (80, 0.0015625)])
def test_the_schedule_of_overfeat(epoch, lr):
    assert step_schedule(5e-2, (30, 50, 60, 70, 80), 0.5)(epoch) == lr


def test_cosine_schedule():
    at = cosine_schedule(0.4, 100, warmup=4)
    assert_allclose([at(t) for t in range(5)], [0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-12)
    assert_allclose([at(28), at(52), at(76)], [0.4 * (1 + math.cos(math.pi * q)) / 2 for q in (0.25, 0.5, 0.75)], rtol=1e-12)
    assert at(99) > at(100) == at(150) == 0
    assert cosine_schedule(0.4, 10)(0) == 0.4
    for steps, warmup in ((10, 10), (10, -1), (0, 0)):
        with pytest.raises(ValueError, match=rf"^optim\.cosine_schedule: warmup must .* got warmup {warmup}, steps {steps}"):
            cosine_schedule(0.1, steps, warmup)
