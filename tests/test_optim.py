import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal, assert_array_max_ulp

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, optim, to_numpy, use
from tinydet.backend import put
from tinydet.layers import Layer, Sequential
from tinydet.optim import SGD, AdaGrad, clip_norm, clip_value, cosine_schedule, step_schedule

RATES = (None, {"b": 2}, {"b": 0, "w": 0.5}, lambda name: 2 if name.endswith("b") else 1)
optimisers = pytest.mark.parametrize("make", [lambda layer, **options: SGD(layer, **options),
                                              lambda layer, **options: SGD(layer, form="caffe", **options), AdaGrad],
                                     ids=["plain", "caffe", "adagrad"])


def small(rng, dtype=np.float64):
    """A layer with gradients."""
    layer = Layer(w=rng.standard_normal((2, 3)).astype(dtype), b=rng.standard_normal(3).astype(dtype))
    draw(layer, rng)
    return layer


backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(layer, rng):
    for g in layer.grads.values():
        g += put(rng.standard_normal(g.shape).astype(g.dtype))


def step(optimiser, lr):
    """A step, and its error: on a GPU only check() reads it."""
    optimiser.step(lr)
    optimiser.check()


def copies(arrays):
    return {k: to_numpy(a).copy() for k, a in arrays.items()}


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for k in arrays:
        assert_array_equal(to_numpy(arrays[k]), to_numpy(others[k]), strict=True)


@backends
@given(seed=seeds, momentum=st.sampled_from([0, 0.6, 0.9]), decay=st.sampled_from([0, 1e-5, 0.1]), decay_all=st.booleans(),
       form=st.sampled_from(["plain", "caffe"]), rates=st.sampled_from(RATES))
def test_sgd_is_the_definition(backend, seed, momentum, decay, decay_all, form, rates):
    """plain: v = momentum * v + (g + decay * w), w = w - lr * v; caffe: v = momentum * v + lr * (g + decay * w), w = w - v.

    Decay on weights, on biases only with decay_all.
    """
    rng = np.random.default_rng(seed)
    layer = Layer(w=rng.standard_normal((2, 3)), b=rng.standard_normal(3))
    expected = {k: [float(a) for a in w.ravel()] for k, w in layer.params.items()}
    velocity = {k: [0.0] * len(w) for k, w in expected.items()}
    with use(backend) as put:
        sgd = SGD(layer.to(put), momentum, decay, decay_all, form=form, rates=rates)
        for lr in (0.1, 0.1, 0.01):
            draw(layer, rng)
            for k, g in copies(layer.grads).items():
                own = lr * (1 if rates is None else rates(k) if callable(rates) else rates.get(k, 1))
                for i, gi in enumerate(g.ravel()):
                    decayed = gi + decay * expected[k][i] if k == "w" or decay_all else gi
                    if form == "plain":
                        velocity[k][i] = momentum * velocity[k][i] + decayed
                        expected[k][i] -= own * velocity[k][i]
                    else:
                        velocity[k][i] = momentum * velocity[k][i] + own * decayed
                        expected[k][i] -= velocity[k][i]
            sgd.step(lr)
            for k in expected:
                assert_allclose(to_numpy(layer.params[k]).ravel(), expected[k], rtol=1e-12, atol=1e-12)
                assert_allclose(to_numpy(sgd.state[k]).ravel(), velocity[k], rtol=1e-12, atol=1e-12)
                assert not layer.grads[k].any()                         # cleared


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plain_sgd_keeps_the_order_of_its_operations(backend, dtype):
    """Runs that were recorded or interrupted go on to the same bits."""
    rng = np.random.default_rng(0)
    layer = small(rng, dtype)
    w, v = layer.params["w"].copy(), np.zeros((2, 3), dtype)
    with use(backend) as put:
        sgd = SGD(layer.to(put), 0.9, 1e-3)
        for lr in (0.1, 0.03, 0.01):
            draw(layer, rng)
            v *= 0.9
            v += to_numpy(layer.grads["w"])
            v += 1e-3 * w
            w -= lr * v
            sgd.step(lr)
    assert_array_equal(to_numpy(layer.params["w"]), w, strict=True)
    assert_array_equal(to_numpy(sgd.state["w"]), v, strict=True)


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")])
@pytest.mark.parametrize("form", ["plain", "caffe"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_the_kernel_takes_the_steps_of_numpy_to_the_last_bit(backend, form, dtype, n):
    nets = []
    for name in ("numpy", backend):
        rng = np.random.default_rng(n)
        with use(name) as put:
            layer = Layer(w=rng.standard_normal((1, n)).astype(dtype)).to(put)
            sgd = SGD(layer, 0.9, 1e-3, form=form)
            for lr in (0.1, 0.03, 0.01):
                draw(layer, rng)
                sgd.step(lr)
        nets.append({"w": layer.params["w"], "v": sgd.state["w"]})
    assert_same(*nets)


@pytest.mark.parametrize("form", ["plain", "caffe"])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backends_take_the_same_steps_also_on_many_threads_and_strided_arrays(form, decay, dtype, all_threads):
    """b is longer than a part, and not a multiple of it."""
    nets = []
    for backend in RUNNING:
        rng = np.random.default_rng(0)
        layer = Layer(w=rng.standard_normal((3, 500)).astype(dtype), b=rng.standard_normal(3 * optim.PART + 7).astype(dtype),
                      strided=rng.standard_normal((6, 8)).astype(dtype)[::2, ::3], none=np.zeros((0, 3), dtype))
        sgd = SGD(layer, 0.9, decay, decay_all=True, form=form, rates={"b": 2})
        with use(backend):
            for lr in (0.1, 0.03):
                draw(layer, rng)
                sgd.step(lr)
        assert not any(g.any() for g in layer.grads.values())
        nets.append({**layer.params, **{f"state of {k}": v for k, v in sgd.state.items()}})
    for net in nets[1:]:
        for k in nets[0]:
            assert_array_max_ulp(net[k], nets[0][k], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_is_found_wherever_it_stands(backend, dtype, bad, all_threads):
    for size in (1, 100, optim.PART, 3 * optim.PART + 7):
        layer = Layer(a=np.ones(5, dtype), b=np.ones(size, dtype))
        with use(backend) as put:
            layer.to(put).grads["a"] += 1
            for at in {0, size // 2, size - 1}:
                layer.grads["b"][...] = np.finfo(dtype).max
                layer.grads["b"][at] = bad
                with pytest.raises(FloatingPointError, match=r"^SGD\.step: the gradient of b is not finite"):
                    step(SGD(layer), 0.1)
            assert (layer.params["a"] == 1).all() and (layer.params["b"] == 1).all() and (layer.grads["a"] == 1).all()
            layer.grads["b"][...] = -np.finfo(dtype).max            # the largest is finite
            step(SGD(layer), 0.0)


def test_the_forms_of_sgd_agree_until_the_learning_rate_changes():
    layers = [small(np.random.default_rng(0)) for _ in range(2)]
    pair = [SGD(layer, 0.9, 0.1, form=form) for layer, form in zip(layers, ("plain", "caffe"))]
    for lr, same in ((0.1, True), (0.1, True), (0.01, False)):
        for layer, sgd in zip(layers, pair):
            layer.grads["w"] += 1
            sgd.step(lr)
        assert np.allclose(layers[0].params["w"], layers[1].params["w"], rtol=1e-12) == same


@backends
@given(seed=seeds, decay=st.sampled_from([0, 5e-4, 0.1]), decay_all=st.booleans(), initial=st.sampled_from([1e-10, 0.1]),
       rates=st.sampled_from(RATES))
def test_adagrad_is_the_definition(backend, seed, decay, decay_all, initial, rates):
    """d = g + decay * w; m = m + d^2; w = w - lr * d / sqrt(m)."""
    rng = np.random.default_rng(seed)
    layer = Layer(w=rng.standard_normal((2, 3)), b=rng.standard_normal(3))
    expected = {k: [float(a) for a in w.ravel()] for k, w in layer.params.items()}
    m = {k: [initial] * len(w) for k, w in expected.items()}
    with use(backend) as put:
        adagrad = AdaGrad(layer.to(put), decay, decay_all, initial=initial, rates=rates)
        for lr in (0.1, 0.1, 0.01):
            draw(layer, rng)
            for k, g in copies(layer.grads).items():
                own = lr * (1 if rates is None else rates(k) if callable(rates) else rates.get(k, 1))
                for i, gi in enumerate(g.ravel()):
                    d = gi + decay * expected[k][i] if k == "w" or decay_all else gi
                    m[k][i] += d * d
                    expected[k][i] -= own * d / math.sqrt(m[k][i])
            adagrad.step(lr)
            for k in expected:
                assert_allclose(to_numpy(layer.params[k]).ravel(), expected[k], rtol=1e-12, atol=1e-12)
                assert_allclose(to_numpy(adagrad.state[k]).ravel(), m[k], rtol=1e-12)
                assert not layer.grads[k].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fixture_19_of_adagrad(dtype):
    layer = Layer(w=np.zeros((1, 1), dtype))
    adagrad, path = AdaGrad(layer), [0.0]
    assert adagrad.state["w"] == dtype(1e-10)
    for g in (1, 0.5, -2):
        layer.grads["w"] += g
        adagrad.step(1e-3)
        path.append(-float(layer.params["w"][0, 0]))
    assert_allclose(np.diff(path), [0.0010000, 0.00044721, -0.00087287], atol=6e-9)
    assert path[-1] == pytest.approx(0.00057434, abs=6e-9)


def test_decay_acts_on_weights_only_by_default_in_sgd_and_on_all_in_adagrad():
    for make, biases in ((SGD, False), (AdaGrad, True)):
        layer = Layer(w=np.ones((2, 2)), b=np.ones(2))
        make(layer).step(0.1)
        assert (layer.params["w"] == 1).all()                               # weight_decay is 0 unless given
        make(layer, weight_decay=0.1).step(0.1)
        assert (layer.params["w"] < 1).all() and (layer.params["b"] < 1).all() == biases


@optimisers
def test_a_rate_of_0_keeps_the_parameter_and_its_state_goes_on(make):
    layer = small(np.random.default_rng(0))
    before = copies(layer.params)
    optimiser = make(layer, weight_decay=0.1, rates={"b": 0})
    start = copies(optimiser.state)
    optimiser.step(0.1)
    assert_array_equal(layer.params["b"], before["b"])
    assert (layer.params["w"] != before["w"]).all()
    inside = getattr(optimiser, "form", "") == "caffe"                      # there the rate is part of the velocity
    assert (optimiser.state["b"] != start["b"]).all() == (not inside)


@optimisers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_step_updates_in_place_and_keeps_the_dtype(make, dtype):
    layer = small(np.random.default_rng(0), dtype)
    before, arrays = copies(layer.params), dict(layer.params)
    optimiser = make(layer, weight_decay=0.1, clip=0.5, rates={"b": 2})
    state = dict(optimiser.state)
    for lr in (0.1, np.float64(0.1)):
        draw(layer, np.random.default_rng(1))
        optimiser.step(lr)
    for k, w in layer.params.items():
        assert w is arrays[k] and optimiser.state[k] is state[k]
        assert w.dtype == state[k].dtype == layer.grads[k].dtype == dtype and state[k].shape == w.shape
        assert (w != before[k]).all()


def frozen_net(rng):
    """Two layers, the first frozen, all with gradients."""
    net = Sequential(small(rng), small(rng))
    net.parts["0"].freeze()
    return net


@optimisers
def test_frozen_parameters_keep_their_bits_and_have_no_state(make):
    rng = np.random.default_rng(0)
    net = frozen_net(rng)
    before, optimiser = copies(net.params), make(net, weight_decay=0.1, decay_all=True)
    assert list(optimiser.state) == ["1.w", "1.b"]
    net.grads["0.w"][0, 0] = np.nan                                         # left from before it was frozen: it counts for nothing
    for _ in range(3):
        optimiser.step(0.1)
        for k, w in net.params.items():
            assert (w == before[k]).all() if k.startswith("0") else (w != before[k]).all()
            assert not net.grads[k].any()                                   # cleared, those of the frozen layer too
        draw(net, rng)


@optimisers
def test_what_is_frozen_later_waits_and_what_is_thawed_needs_a_new_optimiser(make):
    rng = np.random.default_rng(0)
    net = frozen_net(rng)
    optimiser = make(net)
    optimiser.step(0.1)
    net.freeze()
    draw(net, rng)
    before, state = copies(net.params), copies(optimiser.state)
    optimiser.step(0.1)                                                     # nothing trains
    assert_same(net.params, before)
    assert_same(optimiser.state, state)
    net.parts["1"].freeze(False)
    draw(net, rng)
    optimiser.step(0.1)                                                     # goes on with its state
    assert (net.params["1.w"] != before["1.w"]).all() and (net.params["0.w"] == before["0.w"]).all()
    net.freeze(False)
    draw(net, rng)
    before, state = copies(net.params), copies(optimiser.state)
    with pytest.raises(ValueError, match=r"\.step: what trains must have trained when the optimiser was made, got 0\.w, "
                                         "which was frozen then: make a new optimiser"):
        optimiser.step(0.1)
    assert_same(net.params, before)
    assert_same(optimiser.state, state)
    make(net).step(0.1)
    assert (net.params["0.w"] != before["0.w"]).all()


@backends
@optimisers
@pytest.mark.parametrize("clip", [None, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_gradient_is_named_and_nothing_is_updated(backend, make, clip, bad):
    with use(backend) as put:
        layer = Layer(a=np.ones(3), b=np.ones((2, 2)), c=np.ones(3)).to(put)
        optimiser = make(layer, weight_decay=0.1, clip=clip)
        state = copies(optimiser.state)
        layer.grads["a"] += 1
        layer.grads["b"][1, 0] = layer.grads["c"][1] = bad                  # the first is named
        grads = copies(layer.grads)
        op = r"optim\.clip_norm" if clip and backend != "cuda" else rf"{type(optimiser).__name__}\.step"
        with pytest.raises(FloatingPointError, match=rf"^{op}: the gradient of b is not finite: lower the learning rate"):
            step(optimiser, 0.1)
        assert_same(layer.params, {"a": np.ones(3), "b": np.ones((2, 2)), "c": np.ones(3)})
        assert_same(optimiser.state, state)
        assert_same(layer.grads, grads)
        layer.grads["b"][1, 0] = layer.grads["c"][1] = 0
        step(optimiser, 0.1)                                                # and then it goes on
        assert (layer.params["a"] < 1).all() and not layer.grads["a"].any()


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")])
@optimisers
def test_trouble_stays_until_it_is_told_and_nothing_is_updated_meanwhile(backend, make, monkeypatch):
    """As on a GPU, where step does not read it: the first one is named, whatever comes after."""
    monkeypatch.setattr(optim.checks, "on_host", lambda x: False)
    with use(backend) as put:
        layer = Layer(a=np.ones(3), b=np.ones((2, 2)), c=np.ones(3)).to(put)
        optimiser = make(layer, weight_decay=0.1)
        state = copies(optimiser.state)
        for bad in ("b", "c", "a"):
            layer.grads[bad] += np.nan
            optimiser.step(0.1)
            assert_same(layer.params, {"a": np.ones(3), "b": np.ones((2, 2)), "c": np.ones(3)})
            assert_same(optimiser.state, state)
        with pytest.raises(FloatingPointError, match=rf"^{type(optimiser).__name__}\.step: the gradient of b is not finite: lower"):
            optimiser.check()
        optimiser.check()
        for g in layer.grads.values():
            g[...] = 1
        optimiser.step(0.1)
        optimiser.check()
        assert all((w < 1).all() for w in layer.params.values())
        layer.grads["c"][1] = np.inf
        optimiser.step(0.1)
        layer.grads["c"][1] = 0                                             # someone else clears it
        with pytest.raises(FloatingPointError, match=r"the gradient of c is not finite: lower"):
            optimiser.check()


@backends
@pytest.mark.parametrize("dtype, huge", [(np.float32, 1e20), (np.float64, 1e200)])
def test_adagrad_refuses_a_square_that_overflows_unless_clipped(backend, dtype, huge):
    with use(backend) as put:
        layer = Layer(a=np.ones(3, dtype), b=np.ones((2, 2), dtype)).to(put)
        layer.grads["a"] += 1
        layer.grads["b"][1, 0] = huge
        adagrad = AdaGrad(layer)
        with pytest.raises(FloatingPointError, match=r"^AdaGrad\.step: the gradient of b is too large to square and add up: lower"):
            step(adagrad, 0.1)
        assert (layer.params["a"] == 1).all()
        assert (adagrad.state["a"] == dtype(1e-10)).all()
        step(AdaGrad(layer, clip=1), 0.1)
        assert_allclose(to_numpy(layer.params["b"]), [[1, 1], [0.9, 1]], rtol=1e-6)


@optimisers
def test_clip_scales_the_trained_gradients_together_before_decay(make):
    net, twin = (frozen_net(np.random.default_rng(0)) for _ in range(2))
    net.grads["0.w"][...] = 1e6                                             # frozen: not part of the norm
    grads = {k: g for k, g in twin.grads.items() if k.startswith("1")}
    assert clip_norm(grads, 0.25) > 0.25
    make(net, weight_decay=0.5, clip=0.25).step(0.1)
    make(twin, weight_decay=0.5).step(0.1)
    assert_same(net.params, twin.params)


def norm_of(grads):
    return math.sqrt(math.fsum(float(v) ** 2 for g in grads.values() for v in to_numpy(g).ravel()))


@backends
@given(seed=seeds, factor=st.sampled_from([0.1, 0.999, 1.001, 10]), dtype=st.sampled_from([np.float32, np.float64]))
def test_clip_norm_is_the_definition(backend, seed, factor, dtype):
    rng = np.random.default_rng(seed)
    big = rng.standard_normal((4, 6)).astype(dtype)
    grads = {"w": rng.standard_normal((2, 3)).astype(dtype), "strided": big[::2, ::3], "none": np.zeros((0, 3), dtype)}
    with use(backend) as put:
        grads = {k: put(g) for k, g in grads.items()}
        before, arrays, norm = copies(grads), dict(grads), norm_of(grads)
        found = clip_norm(grads, norm * factor)
        assert type(found) is float or backend == "cuda" and found.shape == () and found.dtype == np.float64
        found = float(to_numpy(found))
        assert found == pytest.approx(norm, rel=1e-12)
        if factor > 1:
            assert clip_norm(grads, found) == found                         # exactly at the limit
        for k, g in grads.items():
            assert g is arrays[k] and g.dtype == dtype
            if factor > 1:
                assert_array_equal(to_numpy(g), before[k])                  # within the limit: the same bits
            else:
                assert_allclose(to_numpy(g), before[k] * dtype(factor), rtol=1e-6 if dtype == np.float32 else 1e-12)


@backends
@pytest.mark.parametrize("dtype, size", [(np.float32, 1e30), (np.float32, 3e38), (np.float32, 1e-30), (np.float32, 1e-44),
                                         (np.float64, 1e200), (np.float64, 1e308), (np.float64, 1e-200), (np.float64, 5e-324)])
@pytest.mark.parametrize("limit", [1, 1e-30])
def test_clip_norm_neither_overflows_nor_vanishes(backend, dtype, size, limit):
    if backend == "cuda" and size == 1e-44:
        pytest.skip("CuPy's kernels make float32 denormals 0")
    with use(backend) as put:
        grads = {"a": put(np.full(3, size, dtype)), "b": put(np.full((2, 3), -size, dtype))}
        size = float(dtype(size))                                           # as the dtype holds it
        norm = float(to_numpy(clip_norm(grads, limit)))
    assert norm == pytest.approx(3 * size, rel=1e-12, abs=0) or size == 1e308 and norm == np.inf
    assert_allclose(to_numpy(grads["a"]), min(size, limit / 3), rtol=1e-6)
    assert_allclose(to_numpy(grads["b"]), -min(size, limit / 3), rtol=1e-6)


@backends
def test_clip_norm_of_both_dtypes_at_the_limit_and_of_nothing(backend):
    with use(backend) as put:
        grads = {"a": put(np.full(1, 3, np.float32)), "b": put(np.full(1, 4e200))}
        assert clip_norm(grads, 2) == 4e200 and grads["b"][0] == 2 and 0 <= grads["a"][0] < 1e-30
        grads = {"a": put(np.array([3.0])), "b": put(np.array([[-4.0]]))}
        assert clip_norm(grads, 5) == 5 and grads["a"][0] == 3 and grads["b"][0, 0] == -4
        assert clip_norm(grads, np.inf) == 5 and grads["a"][0] == 3
        assert clip_norm({}, 1) == 0
        for zeros in (np.zeros(3), np.zeros(0)):
            grads = {"a": put(zeros)}
            assert clip_norm(grads, 1) == 0 and not grads["a"].any()


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("emulated", "cuda")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_on_a_gpu_clipping_leaves_what_is_not_finite_to_the_optimiser(backend, bad):
    with use(backend) as put:
        grads = {"a": put(np.full(2, 9.0)), "b": put(np.array([1, bad]))}
        assert np.isnan(float(to_numpy(optim._clip_norm_cuda(list(grads.values()), 1))))
        assert_same(grads, {"a": np.full(2, 9.0), "b": np.array([1, bad])})
        optim._clip_value_cuda(grads["b"], 0.5)
        assert_array_equal(to_numpy(grads["b"]), [0.5, bad])


@backends
@given(seed=seeds, limit=st.sampled_from([0.1, 1, 1e300, np.inf]), dtype=st.sampled_from([np.float32, np.float64]))
def test_clip_value_is_the_definition(backend, seed, limit, dtype):
    rng = np.random.default_rng(seed)
    grads = {"w": rng.standard_normal((2, 3)).astype(dtype), "strided": rng.standard_normal((4, 6)).astype(dtype)[::2, ::3]}
    expected = {k: [max(-limit, min(limit, float(v))) for v in g.ravel()] for k, g in grads.items()}
    with use(backend) as put:
        grads = {k: put(g) for k, g in grads.items()}
        arrays = dict(grads)
        clip_value(grads, limit)
    for k, g in grads.items():
        assert g is arrays[k]
        assert_array_equal(to_numpy(g).ravel(), np.array(expected[k], dtype), strict=True)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipping_refuses_what_is_not_finite_and_a_limit_that_is_not_positive(clip):
    for bad in (np.nan, np.inf, -np.inf):
        grads = {"a": np.full(2, 9.0), "b": np.array([1, bad])}
        with pytest.raises(FloatingPointError, match=rf"^optim\.{clip.__name__}: the gradient of b is not finite: lower"):
            clip(grads, 1)
        assert_array_equal(grads["a"], 9)
    for limit in (0, -1, np.nan):
        with pytest.raises(ValueError, match=rf"^optim\.{clip.__name__}: limit must be > 0, got {limit}"):
            clip({}, limit)


@optimisers
@pytest.mark.parametrize("lr", [-0.1, np.nan, np.inf])
def test_a_bad_learning_rate_is_refused(make, lr):
    layer = small(np.random.default_rng(0))
    before = copies(layer.params)
    with pytest.raises(ValueError, match=rf"^(SGD|AdaGrad)\.step: lr must be finite and >= 0, got {lr}"):
        make(layer).step(lr)
    assert_same(layer.params, before)
    make(layer).step(0)
    assert_same(layer.params, before)
    assert not layer.grads["w"].any()


@pytest.mark.parametrize("make, options, message", [
    *((make, options, message) for make in (SGD, AdaGrad) for options, message in (
        (dict(weight_decay=-1), "weight_decay must be finite and >= 0, got -1"),
        (dict(weight_decay=np.inf), "weight_decay must be finite and >= 0, got inf"),
        (dict(weight_decay=np.nan), "weight_decay must be finite and >= 0, got nan"),
        (dict(clip=0), "clip must be None or > 0, got 0"),
        (dict(clip=np.nan), "clip must be None or > 0, got nan"),
        (dict(rates={"w": 1, "v": 2, "c": 1}), r"rates must name parameters of the layer, got \['c', 'v'\]"),
        (dict(rates={"w": -1}), "the rate of w must be finite and >= 0, got -1"),
        (dict(rates=lambda name: np.inf), "the rate of w must be finite and >= 0, got inf"))),
    (SGD, dict(momentum=-0.1), r"momentum must lie in \[0, 1\), got -0.1"),
    (SGD, dict(momentum=1), r"momentum must lie in \[0, 1\), got 1"),
    (SGD, dict(momentum=np.nan), r"momentum must lie in \[0, 1\), got nan"),
    (SGD, dict(form="torch"), "form must be one of plain, caffe, got 'torch'"),
    (AdaGrad, dict(initial=0), r"initial must lie in \[1e-30, 1e30\], got 0"),
    (AdaGrad, dict(initial=1.1e30), r"initial must lie in \[1e-30, 1e30\], got 1.1e\+30"),
    (AdaGrad, dict(initial=np.nan), r"initial must lie in \[1e-30, 1e30\], got nan"),
])
def test_bad_settings_are_refused(make, options, message):
    with pytest.raises(ValueError, match=rf"^optim\.{make.__name__}: {message}"):
        make(Layer(w=np.ones((2, 2)), b=np.ones(2)), **options)


def test_settings_at_their_limits():
    for initial in (1e-30, 1e30):
        layer = Layer(w=np.ones((2, 2), np.float32))
        AdaGrad(layer, initial=initial).step(0.1)
        assert (layer.params["w"] == 1).all()                               # no gradient, no step: 0 / sqrt(initial)
    SGD(Layer(w=np.ones(2)), momentum=0, rates={}, clip=np.inf).step(0)
    net = frozen_net(np.random.default_rng(0))
    assert SGD(net, rates={"0.b": 2, "1.b": 3}).rates == {"1.w": 1, "1.b": 3}           # a frozen one may be named


@pytest.mark.parametrize("epoch, lr", [(0, 5e-2), (29, 5e-2), (30, 0.025), (49, 0.025), (50, 0.0125), (59, 0.0125), (60, 0.00625),
                                       (69, 0.00625), (70, 0.003125), (79, 0.003125), (80, 0.0015625)])
def test_the_schedule_of_overfeat(epoch, lr):
    assert step_schedule(5e-2, (30, 50, 60, 70, 80), 0.5)(epoch) == lr


def test_step_schedule_with_warm_up():
    at = step_schedule(0.3, (7, 9), 0.1, warmup=5)
    assert_allclose([at(t) for t in range(11)], [0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.3, 0.03, 0.03, 0.003, 0.003], rtol=1e-12)
    assert step_schedule(0.3, (2,), 0.5, 4, 0.0)(3) == pytest.approx(0.3 * 0.5 * 3 / 4)
    for warmup, first in ((-1, 0.5), (3, 1.5)):
        with pytest.raises(ValueError, match=rf"^optim\.step_schedule: warmup must .* got {warmup}, {first}"):
            step_schedule(0.1, (), 0.1, warmup, first)


def test_cosine_schedule():
    at = cosine_schedule(0.4, 100, warmup=4)
    assert_allclose([at(t) for t in range(5)], [0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-12)
    assert_allclose([at(28), at(52), at(76)], [0.4 * (1 + math.cos(math.pi * q)) / 2 for q in (0.25, 0.5, 0.75)], rtol=1e-12)
    assert at(99) > at(100) == at(150) == 0
    assert cosine_schedule(0.4, 10)(0) == 0.4 and cosine_schedule(0.4, 10)(5) == pytest.approx(0.2, rel=1e-12)
    for steps, warmup in ((10, 10), (10, -1), (0, 0)):
        with pytest.raises(ValueError, match=rf"^optim\.cosine_schedule: warmup must .* got warmup {warmup}, steps {steps}"):
            cosine_schedule(0.1, steps, warmup)


def test_adagrad_refuses_what_overflows_by_adding_up_or_by_decay():
    layer = Layer(w=np.ones((1, 2), np.float32))
    adagrad = AdaGrad(layer)
    layer.grads["w"] += 1.5e19                                      # squares to 2.25e38: once float32 holds it, twice it does not
    adagrad.step(0.1)
    layer.grads["w"] += 1.5e19
    kept = layer.params["w"].copy()
    with pytest.raises(FloatingPointError, match=r"^AdaGrad\.step: the gradient of w is too large to square and add up"):
        adagrad.step(0.1)
    assert_array_equal(layer.params["w"], kept)
    layer = Layer(w=np.full((1, 2), 1e20, np.float32))
    with pytest.raises(FloatingPointError, match="too large to square and add up"):
        AdaGrad(layer, weight_decay=1.0).step(0.1)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipping_refuses_integers(clip):
    with pytest.raises(TypeError, match=r"^optim\.clip_\w+: the gradient of a must be a float array, got int64"):
        clip({"a": np.array([3, 4])}, 1.0)


def test_kinds_tell_states_apart():
    layer = Layer(w=np.ones(2))
    assert [o.kind for o in (SGD(layer), SGD(layer, form="caffe"), AdaGrad(layer))] == ["SGD plain", "SGD caffe", "AdaGrad"]


@pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
def test_any_order_of_threads_gives_the_same_bits():
    nets = []
    for order in ("forward", "reverse", "random"):
        layer = small(np.random.default_rng(0), np.float32)
        sgd = SGD(layer, weight_decay=0.1)
        with use("emulated"), emulate.options(order=order, seed=1):
            sgd.step(0.1)
            layer.grads["b"] += np.nan
            with pytest.raises(FloatingPointError, match="the gradient of b is not finite"):
                sgd.step(0.1)
        nets.append(layer.params)
    assert_same(nets[0], nets[1])
    assert_same(nets[0], nets[2])
