import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct
from tinydet import layers, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.layers import BatchNorm, Composite, Conv2D, Dropout, MaxPool, OffsetPool, ReLU, Sequential, load


def rng():
    return np.random.default_rng(0)


def make(name):
    """A float64 layer for x (2, 5, 4, 2)."""
    return {
        "Conv2D": lambda: Conv2D(2, 3, 3, stride=2, pad=1, rng=rng(), dtype=np.float64),
        "Conv2D dilated": lambda: Conv2D(2, 3, 2, dilation=2, rng=rng(), dtype=np.float64),
        "BatchNorm": lambda: BatchNorm(2, dtype=np.float64),
        "BatchNorm frozen": lambda: BatchNorm(2, frozen=True, dtype=np.float64),
        "ReLU": ReLU,
        "MaxPool": lambda: MaxPool(3, 1),
        "OffsetPool": lambda: OffsetPool(2),
        "Dropout": lambda: Dropout(0.3),
        "Sequential": lambda: Sequential(Conv2D(2, 2, 1, rng=rng(), dtype=np.float64), BatchNorm(2, dtype=np.float64), MaxPool(2)),
    }[name]()


NAMES = ["Conv2D", "Conv2D dilated", "BatchNorm", "BatchNorm frozen", "ReLU", "MaxPool", "OffsetPool", "Dropout", "Sequential"]


def test_every_layer_class_is_in_the_list():
    classes = {k for k, c in vars(layers).items() if isinstance(c, type) and issubclass(c, layers.Layer) and hasattr(c, "forward")}
    assert classes == {name.split()[0] for name in NAMES} == {type(make(name)).__name__ for name in NAMES}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_input_and_parameters(backend, train, name):
    layer = make(name)
    names = list(layer.params)

    def forward(x, *params):
        for k, p in zip(names, params):
            layer.params[k][...] = p
        return layer.forward(x, train, rng())

    def backward(dy, cache):
        for g in layer.grads.values():
            g[...] = 0
        return (layer.backward(dy, cache), *(layer.grads[k].copy() for k in names))
    with use(backend) as put:
        check_grad(forward, backward, [distinct((2, 5, 4, 2), 0), *(layer.params[k].copy() + 0.5 for k in names)], put=put)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_add_up_over_two_forwards_before_any_backward(name):
    layer, x = make(name), [distinct((2, 5, 4, 2), s) for s in (0, 1)]
    assert layer.grads.keys() == layer.params.keys() and not any(g.any() for g in layer.grads.values())
    alone = []
    for v in x:
        single = make(name)
        y, cache = single.forward(v, True, rng())
        alone.append((single.backward(y, cache), single.grads))
    ys, caches = zip(*(layer.forward(v, True, rng()) for v in x))
    for k in (0, 1):
        assert_array_equal(layer.backward(ys[k], caches[k]), alone[k][0])
    for k, g in layer.grads.items():
        assert g.shape == layer.params[k].shape and g.any()
        assert_allclose(g, alone[0][1][k] + alone[1][1][k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_call_is_the_forward_of_test_time_and_changes_no_state(name):
    layer, x = make(name), distinct((2, 5, 4, 2), 0)
    before = {k: v.copy() for k, v in layer.arrays().items()}
    assert_array_equal(layer(x), layer.forward(x, train=False)[0])
    for k, v in layer.arrays().items():
        assert_array_equal(v, before[k])
    assert before.keys() == {*layer.params, *layer.state}


def test_batch_norm_learns_the_statistics_that_it_uses_at_test_time():
    """run = 0.9 run + 0.1 batch, the variance with m/(m - 1)."""
    layer, x = BatchNorm(2, dtype=np.float64), distinct((2, 5, 4, 2), 0)
    mean, var = np.zeros(2), np.ones(2)
    for batch in (x, 2 * x + 1):
        layer.forward(batch, train=True)
        mean = 0.9 * mean + 0.1 * batch.mean((0, 1, 2))
        var = 0.9 * var + 0.1 * batch.var((0, 1, 2), ddof=1)
    assert_allclose(layer.state["mean"], mean, rtol=1e-12)
    assert_allclose(layer.state["var"], var, rtol=1e-12)
    assert_allclose(layer(x), (x - mean) / np.sqrt(var + 1e-5), rtol=1e-12)
    layer.frozen = True
    assert_array_equal(layer.forward(x, train=True)[0], layer(x))
    assert_allclose(layer.state["mean"], mean, rtol=1e-12)


def test_dropout_is_the_identity_at_test_time_and_needs_a_generator_in_training():
    layer, x = Dropout(0.5), distinct((2, 5, 4, 2), 0)
    y, cache = layer.forward(x)
    assert y is x and layer.backward(x, cache) is x
    y, cache = layer.forward(x, True, rng())
    assert 0 < (y == 0).sum() < y.size and ((layer.backward(x, cache) == 0) == (y == 0)).all()
    with pytest.raises(ValueError, match=r"^Dropout\.forward: train=True needs rng, a numpy\.random\.Generator, got None"):
        layer.forward(x, train=True)


def test_conv_starts_by_hes_rule_in_its_dtype_and_may_skip_the_input_gradient():
    layer = Conv2D(32, 64, 3, rng=rng(), input_grad=False)
    assert layer.params["w"].dtype == layer.params["b"].dtype == layer.grads["w"].dtype == np.float32
    assert layer.params["w"].shape == (3, 3, 32, 64) and not layer.params["b"].any()
    assert_allclose(layer.params["w"].std(), np.sqrt(2 / (9 * 32)), rtol=0.02)
    assert_allclose(Conv2D(32, 64, 3, rng=rng(), std=0.01).params["w"].std(), 0.01, rtol=0.02)
    layer = Conv2D(2, 3, 3, rng=rng(), input_grad=False, dtype=np.float64)
    y, cache = layer.forward(distinct((1, 4, 4, 2), 0))
    assert layer.backward(y, cache) is None and layer.grads["w"].any()


def test_sequential_names_arrays_by_index_and_runs_in_order():
    net, x = make("Sequential"), distinct((2, 5, 4, 2), 0)
    assert set(net.params) == {"0.w", "0.b", "1.gamma", "1.beta"} == set(net.grads) and set(net.state) == {"1.mean", "1.var"}
    assert net.params["0.w"] is net.parts["0"].params["w"] and net.grads["1.beta"] is net.parts["1"].grads["beta"]
    assert Composite(trunk=net, head=ReLU()).arrays().keys() == {"trunk." + k for k in net.arrays()}
    y = x
    for layer in net.parts.values():
        y = layer(y)
    assert_array_equal(net(x), y)
    y, cache = Sequential().forward(x)
    assert y is x and Sequential().backward(x, cache) is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_passes_every_layer(backend):
    with use(backend) as put:
        for name in NAMES:
            layer = make(name)
            y, cache = layer.forward(put(np.zeros((0, 5, 4, 2))))
            assert len(y) == 0 and to_numpy(layer.backward(y, cache)).shape == (0, 5, 4, 2)


def test_load_copies_every_array_and_names_what_does_not_fit():
    net, other = make("Sequential"), make("Sequential")
    for v in other.arrays().values():
        v += 1
    arrays, kept = other.arrays(), net.params["0.w"]
    load(net, arrays)
    assert net.params["0.w"] is kept
    for k, v in net.arrays().items():
        assert_array_equal(v, arrays[k])
    for change, message in (
            (lambda a: a.pop("1.mean"), r"a\.npz lacks the array 1\.mean"),
            (lambda a: a.update({"0.b": np.zeros(3)}), r"a\.npz: 0\.b must have shape \(2,\), got \(3,\)"),
            (lambda a: a.update({"2.w": np.zeros(3)}), r"a\.npz holds arrays that the model lacks: 2\.w")):
        wrong = {k: 0 * v for k, v in arrays.items()}
        change(wrong)
        with pytest.raises(ValueError, match=r"^layers\.load: " + message):
            load(net, wrong, "a.npz")
        assert net.params["0.w"].any()                                  # nothing was copied
