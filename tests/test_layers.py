import inspect

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct
from tinydet import layers, to_numpy, use
from tinydet.cases import LAYERS, of_layer
from tinydet.gradcheck import check_grad
from tinydet.layers import (LRN, BatchNorm, Composite, Conv2D, Dropout, Linear, MaxPool, ReLU, Sequential, from_channels_first,
                            load)
from tinydet.ops import dropout


def rng():
    return np.random.default_rng(0)


def conv(Cin=2, Cout=2, size=3, **options):
    return Conv2D(Cin, Cout, size, rng=rng(), dtype=np.float64, **options)


VARIANTS = {"Conv2D dilated": lambda rng: conv(size=2, dilation=2), "Conv2D frozen": lambda rng: conv().freeze(),
            "BatchNorm with ReLU": lambda rng: BatchNorm(2, dtype=np.float64, relu=True),
            "BatchNorm with ReLU frozen": lambda rng: BatchNorm(2, frozen=True, dtype=np.float64, relu=True),
            "BatchNorm frozen": lambda rng: BatchNorm(2, frozen=True, dtype=np.float64),
            "Linear frozen": lambda rng: Sequential(layers.Flatten(), Linear(40, 3, rng=rng, dtype=np.float64).freeze()),
            "Dropout by map": lambda rng: Dropout(0.3, by_map=True, inverted=False)}
NAMES = [*LAYERS, *VARIANTS]


def make(name):
    """A float64 layer for x (2, 5, 4, 2)."""
    return {**LAYERS, **VARIANTS}[name](rng())


def given(name, seed):
    """What the layer takes."""
    x = distinct((2, 5, 4, 2), seed)
    return [x, distinct((1, 3, 3, 2), seed + 10)] if name == "Shared" else x


def flat(y):
    """The numbers of an array or of a list of arrays."""
    return np.concatenate([a.ravel() for a in (y if isinstance(y, list) else [y])])


def test_every_layer_class_is_in_the_list():
    classes = {k for k, c in vars(layers).items() if isinstance(c, type) and issubclass(c, layers.Layer) and hasattr(c, "forward")}
    assert classes == LAYERS.keys() and not {type(make(name)).__name__ for name in NAMES} - classes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_input_and_parameters(backend, name):
    with use(backend) as put:
        forward, backward, inputs = of_layer(make(name), given(name, 0))
        check_grad(forward, backward, inputs, put=put)
        layer = make(name).freeze()                                     # test time: nothing random, no batch statistics
        check_grad(*of_layer(layer, given(name, 0)), put=put)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_add_up_over_two_forwards_before_any_backward(name):
    layer, x = make(name), [given(name, s) for s in (0, 1)]
    assert layer.grads.keys() == layer.params.keys() and not any(g.any() for g in layer.grads.values())
    alone = []
    for v in x:
        single = make(name)
        y, cache = single.forward(v, True, rng())
        alone.append((single.backward(y, cache), single.grads))
    ys, caches = zip(*(layer.forward(v, True, rng()) for v in x))
    for k in (0, 1):
        assert_array_equal(flat(layer.backward(ys[k], caches[k])), flat(alone[k][0]))
    for k, g in layer.grads.items():
        assert g.shape == layer.params[k].shape and g.any() == (k in layer.trained)
        assert_allclose(g, alone[0][1][k] + alone[1][1][k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_call_is_the_forward_of_test_time_and_changes_no_state(name):
    layer, x = make(name), given(name, 0)
    before = {k: v.copy() for k, v in layer.arrays().items()}
    assert_array_equal(flat(layer(x)), flat(layer.forward(x, train=False)[0]))
    for k, v in layer.arrays().items():
        assert_array_equal(v, before[k])
    assert before.keys() == {*layer.params, *layer.state}


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_trains_nothing_and_sends_the_same_gradient_back(name):
    layer, frozen = make(name), make(name)
    assert frozen.freeze() is frozen and frozen.frozen and frozen.trained == {} and frozen.params.keys() == layer.params.keys()
    state = {k: v.copy() for k, v in frozen.state.items()}
    y, cache = frozen.forward(given(name, 0), True, rng())
    dx = frozen.backward(y, cache)
    assert not any(g.any() for g in frozen.grads.values())
    for k, v in frozen.state.items():
        assert_array_equal(v, state[k])
    if "BatchNorm" not in name and not state:                           # a frozen batch norm is another function
        y, cache = layer.forward(given(name, 0), True, rng())
        assert_array_equal(flat(layer.backward(y, cache)), flat(dx))
    again = frozen.freeze(False)
    assert not again.params or not again.frozen
    assert again.trained.keys() == again.params.keys()


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


def test_a_batch_norm_with_relu_is_relu_behind_a_batch_norm():
    """In training and at test time: outputs, running averages and gradients."""
    one, two, x = BatchNorm(2, dtype=np.float64, relu=True), Sequential(BatchNorm(2, dtype=np.float64), ReLU()), distinct((2, 5, 4, 2), 0)
    for train in (True, False):
        y, cache = one.forward(x, train)
        expected, two_cache = two.forward(x, train)
        assert_array_equal(y, expected)
        assert 0 < (y == 0).sum() < y.size
        assert_allclose(one.backward(x, cache), two.backward(x, two_cache), rtol=1e-12, atol=1e-12)
    for a, b in zip([*one.arrays().values(), *one.grads.values()], [*two.arrays().values(), *two.grads.values()], strict=True):
        assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_classical_dropout_scales_at_test_time_and_by_map_drops_whole_channels():
    layer, x = Dropout(0.25, by_map=True, inverted=False), distinct((2, 5, 4, 16), 0)
    y, cache = layer.forward(x)
    assert_array_equal(y, x * 0.75)
    assert_array_equal(layer.backward(x, cache), x * 0.75)
    y, _ = layer.forward(x, True, rng())
    assert_array_equal(y, dropout.forward(x, 0.25, rng(), by_map=True, inverted=False)[0])
    dropped = (y == 0).all((0, 1, 2))
    assert 0 < dropped.sum() < 16 and (y[..., ~dropped] == x[..., ~dropped]).all()


def test_the_options_reach_the_ops():
    x = distinct((2, 6, 7, 3), 0)
    assert_array_equal(MaxPool(3, 2, (1, 0, 2, 1), ceil=True)(x), layers.max_pool.forward(x, 3, 2, (1, 0, 2, 1), True)[0])
    assert_array_equal(LRN(3, 0.5, 0.6, 2.0, False)(x), layers.lrn.forward(x, 3, 0.5, 0.6, 2.0, False)[0])
    layer = conv(3, 2, 2, stride=2, pad=(1, 0, 2, 1))
    assert_array_equal(layer(x), layers.conv.forward(x, layer.params["w"], layer.params["b"], 2, (1, 0, 2, 1))[0])
    assert layers.Upsample(3)(x).shape == (2, 18, 21, 3)
    assert layers.Flatten()(x)[1, 7 * 3 + 4] == x[1, 1, 1, 1]


def test_linear_starts_by_hes_rule_in_its_dtype():
    layer = Linear(500, 40, rng=rng())
    assert layer.params["w"].shape == (500, 40) and layer.params["w"].dtype == layer.params["b"].dtype == np.float32
    assert_allclose(layer.params["w"].std(), np.sqrt(2 / 500), rtol=0.02)
    assert_allclose(Linear(500, 40, rng=rng(), std=0.01).params["w"].std(), 0.01, rtol=0.02)
    assert not layer.params["b"].any()


def test_weights_from_channels_first():
    """The figures of a published net: conv (Cout, Cin, kh, kw), linear (Cout, Cin), the rest as it is."""
    conv_w, linear_w, b = rng().standard_normal((4, 3, 2, 5)), rng().standard_normal((4, 3)), rng().standard_normal(4)
    found = from_channels_first({"c.weight": conv_w, "l.weight": linear_w, "b": b})
    assert found["c.weight"][1, 4, 2, 3] == conv_w[3, 2, 1, 4] and found["c.weight"].shape == (2, 5, 3, 4)
    assert found["l.weight"][2, 3] == linear_w[3, 2] and found["l.weight"].shape == (3, 4)
    assert_array_equal(found["b"], b)
    assert all(a.flags.c_contiguous and a.flags.owndata for a in found.values()) and found["b"] is not b


def test_running_variance_of_two_pixels_divides_by_one():
    layer = BatchNorm(1, momentum=0.0, dtype=np.float64)
    layer.forward(np.array([1.0, 4]).reshape(1, 1, 2, 1), train=True)
    assert_allclose([layer.state["mean"], layer.state["var"]], [[2.5], [4.5]], rtol=1e-12)
    layer.forward(np.full((1, 1, 1, 1), 7.0), train=True)               # one pixel has no variance, and no division by zero
    assert_allclose([layer.state["mean"], layer.state["var"]], [[7.0], [0.0]], rtol=1e-12)


def test_dropout_is_the_identity_at_test_time_and_needs_a_generator_in_training():
    layer, x = Dropout(), distinct((2, 5, 4, 2), 0)
    assert layer.p == 0.5
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
            layer, x = make(name).to(put), put(np.zeros((0, 5, 4, 2)))
            y, cache = layer.forward([x] if name == "Shared" else x)
            dx = layer.backward(y, cache)
            assert to_numpy(y[0] if isinstance(y, list) else y).size == 0 and to_numpy(dx[0] if name == "Shared" else dx).shape == (0, 5, 4, 2)


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


def test_the_parameters_of_a_composite_are_read_only_by_name():
    """Setting a name would change a dict that is made anew each time: it must not look as if it worked."""
    net = make("Sequential")
    with pytest.raises(TypeError, match="does not support item assignment"):
        net.params["0.w"] = np.zeros(3)
    net.parts["0"].params["w"] = net.params["0.w"] + 1
    assert net.params["0.w"] is net.parts["0"].params["w"]


@pytest.mark.parametrize("build, error, message", [
    (lambda: Dropout(1.0), ValueError, r"layers\.Dropout: p must lie in \[0, 1\), got 1\.0"),
    (lambda: Conv2D(0, 3, 3, rng=rng()), ValueError, r"layers\.Conv2D: Cin must be at least 1, got 0"),
    (lambda: Conv2D(2, 3, 3, stride=0, rng=rng()), ValueError, r"layers\.Conv2D: stride must be at least 1, got 0"),
    (lambda: Linear(2, 2.5, rng=rng()), TypeError, r"layers\.Linear: Cout must be an integer, got 2\.5"),
])
def test_unfit_settings_are_refused_when_a_layer_is_made(build, error, message):
    with pytest.raises(error, match="^" + message):
        build()


def test_layers_tell_their_settings():
    assert [repr(layer) for layer in (
        Conv2D(3, 4, 5, stride=2, pad=(2, 1, 2, 1), dilation=3, rng=rng()), Linear(3, 4, rng=rng()), MaxPool(3, 2, 1, ceil=True), MaxPool(2),
        LRN(), LRN(3, 0.5, 0.6, 2.0, False), layers.Upsample(), Dropout(0.25, True, False), ReLU(),
        BatchNorm(2), BatchNorm(2, relu=True))] == [
        "Conv2D 5x5/2 3 -> 4, pad (2, 1, 2, 1), dilation 3", "Linear 3 -> 4", "MaxPool 3/2, pad 1, ceil", "MaxPool 2/2",
        "LRN 5 channels, alpha 0.0001, beta 0.75, k 1.0", "LRN 3 channels, alpha 0.5, beta 0.6, k 2.0, alpha undivided", "Upsample x2",
        "Dropout 0.25 by map, classical", "ReLU", "BatchNorm", "BatchNorm + ReLU"]


def test_a_composite_is_frozen_when_all_that_could_train_is():
    net = Sequential(conv().freeze(), ReLU())
    assert net.frozen and not Sequential(conv().freeze(), conv(3)).frozen


def test_every_layer_is_at_test_time_unless_told():
    for name in LAYERS:
        defaults = {k: p.default for k, p in inspect.signature(getattr(layers, name).forward).parameters.items()}
        assert defaults["train"] is False and defaults["rng"] is None, name
    x = distinct((1, 4, 4, 2), 0)
    assert MaxPool(3, 2)(x).shape == (1, 1, 1, 2)                       # floor
