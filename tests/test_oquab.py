"""The nets of Oquab et al.: what their tables say, the sliding net, what a frozen net keeps, gradients, files."""
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import files, layers, optim, to_numpy, use
from tinydet.backend import array_module
from tinydet.gradcheck import check_grad
from tinydet.models import oquab
from tinydet.models.oquab import TABLES, Oquab, Spec, Table
from tinydet.ops import global_max_pool, logistic_loss, softmax_loss
from tinydet.summary import summary

FULL, WIDE, SMALL = (TABLES[name] for name in ("4096", "6144", "small"))
CLASSES = "a", "b", "c"
ARMS = [("source", 1), ("strong", 1), ("weak", 1), ("weak", 3)]         # head, adapt_kernel


def tiny(pads=((1, 0, 1, 0), 1), norm=True):
    """Window 6, step 4; without padding window 19."""
    return Table((("conv1", 3, 3, 2, pads[0], norm, (3, 2)), ("conv2", 3, 3, 1, pads[1], False, None)), 1 + (pads == (0, 0)),
                 (("fc6", 4), ("fc7", 3)), 3)


SMALLEST = Table((("conv1", 2, 2, 2, (1, 0, 1, 0), True, (3, 2)), ("conv2", 2, 2, 1, (1, 0, 1, 0), False, None)),
                 2, (("fc6", 2), ("fc7", 2)), 2)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    for name, table in (("tiny", tiny()), ("unpadded", tiny((0, 0), False)), ("smallest", SMALLEST)):
        monkeypatch.setitem(TABLES, name, table)


def make(table="tiny", seed=11, dtype=np.float64, **more):
    """A net whose every array is random, biases too. The seed: one whose tiny nets have a gradient for every array."""
    net, rng = Oquab(Spec(CLASSES, table, **more), np.random.default_rng(seed), dtype), np.random.default_rng(seed)
    for array in net.arrays().values():
        std = np.sqrt(2 / array[..., 0].size)
        array[...] = rng.normal(0, std, array.shape) if array.ndim == 4 else rng.uniform(0.2, 0.6, array.shape)
    return net


def images(H, W, N=1, seed=1):
    return np.random.default_rng(seed).standard_normal((N, H, W, 3))


def copies(arrays):
    return {name: to_numpy(a).copy() for name, a in arrays.items()}


# What the tables say (notes, sec. 1, 2 and 4.1; sec. 7, 1. and 4.)

CONVS = {"trunk.conv1": 34_944, "trunk.conv2": 614_656, "trunk.conv3": 885_120, "trunk.conv4": 1_327_488, "trunk.conv5": 884_992}


@pytest.mark.parametrize("table, outputs, last, total", [
    (FULL, 1000, {"features.fc6": 37_752_832, "features.fc7": 16_781_312, "head.fc8": 4_097_000}, 62_378_344),
    (WIDE, 1512, {"features.fc6": 56_629_248, "features.fc7": 37_754_880, "head.fc8": 9_291_240}, 107_422_568)])
def test_source_nets_have_the_published_parameters(table, outputs, last, total):
    assert oquab.parameters(table, outputs) == {**CONVS, **last}
    assert sum(CONVS.values()) == 3_747_200 and sum(oquab.parameters(table, outputs).values()) == total


@pytest.mark.parametrize("how, fca, fcb", [((21, "strong"), 12_584_960, 43_029), ((20, "weak"), 12_584_960, 40_980),
                                           ((20, "weak", 3), 113_248_256, 368_660)])
def test_adaptation_layers_have_the_published_parameters(how, fca, fcb):
    found = oquab.parameters(WIDE, *how)
    assert (found.pop("head.fca"), found.pop("head.fcb")) == (fca, fcb)
    assert found == {**CONVS, "features.fc6": 56_629_248, "features.fc7": 37_754_880}


def test_multiply_adds_are_the_notes():
    def giga(*how, **more):
        return {name.split(".")[1]: round(n / 1e9, 2 + (not more)) for name, n in oquab.multiply_adds(WIDE, *how, **more).items()}
    found = oquab.multiply_adds(WIDE, 1512)
    assert giga(1512) == dict(conv1=.105, conv2=.448, conv3=.150, conv4=.224, conv5=.150, fc6=.057, fc7=.038, fc8=.009)
    assert round(sum(found.values()) / 1e9, 2) == 1.18
    assert giga(20, "weak", size=(500, 500)) == dict(conv1=.54, conv2=2.29, conv3=.80, conv4=1.19, conv5=.80, fc6=4.59, fc7=3.06,
                                                     fca=1.02, fcb=0)


def test_the_layer_table_at_224():
    names = "conv1 conv1_pool conv2 conv2_pool conv3 conv4 conv5 conv5_pool fc6 fc7".split()
    for table in (FULL, WIDE):
        assert oquab.sides(table, 224) == list(zip(names, (55, 27, 27, 13, 13, 13, 13, 6, 1, 1)))
        assert (table.window, table.step, table.adapt) == (224, 32, 2048)
    assert [side for _, side in oquab.sides(SMALL, 32)] == [32, 16, 16, 8, 8, 4, 1, 1]
    assert (SMALL.window, SMALL.step) == (32, 8)
    assert oquab.parameters(SMALL, 16) == {
        "trunk.conv1": 1216, "trunk.conv2": 4640, "trunk.conv3": 9248, "features.fc6": 49_248, "features.fc7": 9312, "head.fc8": 1552}


@pytest.mark.parametrize("side, conv1, pool1, pool2, pool5, score", [
    (224, 55, 27, 13, 6, 1), (250, 61, 30, 14, 6, 1), (256, 63, 31, 15, 7, 2), (287, 70, 34, 16, 7, 2), (288, 71, 35, 17, 8, 3),
    (350, 86, 42, 20, 9, 4), (500, 124, 61, 30, 14, 9), (700, 174, 86, 42, 20, 15), (1000, 249, 124, 61, 30, 25),
    (1024, 255, 127, 63, 31, 26), (1400, 349, 174, 86, 42, 37), (2048, 511, 255, 127, 63, 58)])
def test_sides_of_the_notes_table(side, conv1, pool1, pool2, pool5, score):
    found = dict(oquab.sides(WIDE, side))
    assert [found[name] for name in ("conv1", "conv1_pool", "conv2_pool", "conv5_pool", "fc7")] == [conv1, pool1, pool2, pool5, score]
    assert oquab.map_side(WIDE, side) == score


def test_the_floor_formula_holds_at_every_side():
    assert all(oquab.map_side(FULL, side) == (side - 224) // 32 + 1 for side in range(224, 2049))
    assert all(oquab.map_side(SMALL, side) == (side - 32) // 8 + 1 for side in range(32, 513))
    assert [oquab.map_side(SMALL, side) for side in (45, 64, 90, 128)] == [2, 5, 8, 13]


def test_receptive_fields():
    found = {name: row for name, *row in oquab.fields(WIDE)}
    assert found["conv1"] == [11, 4, -2] and found["conv5"] == [163, 16, -66] and found["conv5_pool"] == [195, 32, -66]
    assert found["fc6"] == found["fc7"] == found["fcb"] == [355, 32, -66]
    assert oquab.fields(WIDE, 3)[-1] == ("fcb", 483, 32, -130)
    assert {name: row for name, *row in oquab.fields(SMALL)}["fc7"] == [48, 8, -8]


@pytest.mark.parametrize("adapt_kernel", [1, 3])
def test_centres_of_cells(adapt_kernel):
    assert_array_equal(oquab.centres(WIDE, 9, adapt_kernel), 32 * np.arange(9) + 111)
    assert_array_equal(oquab.centres(SMALL, 5, adapt_kernel), 8 * np.arange(5) + 16)
    assert oquab.centres(SMALL, 5).dtype == np.float64 and oquab.centres(SMALL, 0).shape == (0,)
    s = np.concatenate([oquab.centres(WIDE, 9)[[0, 8]], oquab.centres(WIDE, 37)[[0, 36]] / 2.8])          # notes, sec. 7, 21.
    assert_allclose(s, (111, 367, 39.642857, 451.071429), rtol=0, atol=5e-7)


@pytest.mark.parametrize("table, adapt_kernel", [("field", 1), ("field", 3), ("small", 3)])
def test_a_cell_sees_its_field_and_no_more(table, adapt_kernel, monkeypatch):
    """All weights above 0: a cell answers more where it sees a row of pixels that is brighter."""
    monkeypatch.setitem(TABLES, "field", tiny(norm=False))
    net = make(table, head="weak", adapt_kernel=adapt_kernel, width=1.0 if table == "field" else 1 / 16)
    for array in net.params.values():
        array[...] = 0.1
    _, field, stride, first = oquab.fields(net.table, adapt_kernel)[-1]
    H = 40 if table == "small" else 38                              # floor pooling leaves no row unseen
    x = np.repeat(np.ones((1, H, net.table.window, 3)), H + 1, 0)
    x[np.arange(H), np.arange(H)] += 1e3
    y = net(x)[:, :, 0, 0]
    for i in range(oquab.map_side(net.table, H)):
        at = np.flatnonzero(y[:H, i] > y[H, i] + 1e-6)
        assert (at[0], at[-1]) == (max(0, first + stride * i), min(H - 1, first + stride * i + field - 1))


def test_images_that_hold_no_window_are_refused():
    for call in (oquab.sides, oquab.map_side):
        with pytest.raises(ValueError, match=r"^oquab\.sides: an image must hold a window of 224x224 pixels, got a side of 223$"):
            call(FULL, 223)
    with pytest.raises(ValueError, match="window of 32x32 pixels, got a side of 31"):
        oquab.multiply_adds(SMALL, 3, size=(40, 31))
    with pytest.raises(TypeError, match="side must be an integer"):
        oquab.sides(FULL, 224.0)
    net = make()
    for name, call in (("forward", net), ("forward", net.forward), ("features", net.features),
                       ("forward", lambda x: oquab.frozen_part(net, x, "fc6"))):
        with pytest.raises(ValueError, match=rf"^Oquab\.{name}: x must hold a window of 6 pixels, got \(1, 12, 5, 3\)"):
            call(images(12, 5))
        with pytest.raises(ValueError, match=r"must have shape \(N, H, W, 3\)"):
            call(images(12, 12)[..., :2])
        with pytest.raises(TypeError, match="must be float32 or float64, got uint8"):
            call(np.zeros((1, 12, 12, 3), np.uint8))


# The net is its table

@pytest.mark.parametrize("table, width, head, adapt_kernel", [
    ("4096", 1 / 64, "source", 1), ("6144", 1 / 64, "strong", 1), ("6144", 1 / 64, "weak", 3), ("small", 1.0, "weak", 1),
    ("small", 0.5, "source", 1)])
def test_the_net_is_its_table(table, width, head, adapt_kernel):
    spec, t = Spec(CLASSES, table, head, width, adapt_kernel=adapt_kernel), TABLES[table]
    net, how = Oquab(spec, np.random.default_rng(0)), (3 + (head == "strong"), head, adapt_kernel, width)
    x = images(t.window + t.step, t.window).astype(np.float32)
    found = {row.name: row for row in summary(net, x).rows if row.params}
    assert {name: row.params for name, row in found.items()} == oquab.parameters(t, *how)
    assert {name: row.multiply_adds for name, row in found.items()} == oquab.multiply_adds(t, *how, size=x.shape[1:3])
    y, cache = net.forward(x)
    assert y.shape == (1, 2, 1, spec.outputs) == (1, 2, 1, how[0]) and y.dtype == np.float32 and net.table == t
    assert_array_equal(net(x), y)
    for row in oquab.rows(t, *how):                                 # no grouped convolutions: every kernel sees all channels
        assert net.leaves()[row.name].params["w"].shape == (row.size, row.size, row.Cin, row.Cout)
    assert net.backward(y, cache) is None and all(g.any() for g in net.grads.values())
    maps = {}
    for name, layer in net.leaves().items():
        x = layer(x)
        maps[name.split(".")[1]] = x.shape[1:3]
    for (name, side), (_, across) in zip(oquab.sides(t, t.window + t.step), oquab.sides(t, t.window)):
        assert maps[name] == (side, across)


def test_lrn_stands_between_relu_and_pooling_with_the_released_options():
    names = "conv1 conv1_norm conv1_pool conv2 conv2_norm conv2_pool conv3 conv4 conv5 conv5_pool".split()
    for more, options in (({}, (5, 1e-4, 0.75, 1.0, True)), (dict(lrn_k=2.0, divide_by_n=False), (5, 1e-4, 0.75, 2.0, False))):
        trunk = Oquab(Spec(("a",), "6144", width=1 / 256, **more), np.random.default_rng(0)).parts["trunk"].parts
        assert list(trunk) == names
        for name, layer in trunk.items():
            if name.endswith("norm"):
                assert isinstance(layer, layers.LRN) and layer.options == options
            elif name.endswith("pool"):
                assert isinstance(layer, layers.MaxPool) and (layer.size, layer.stride, layer.pad, layer.ceil) == (3, 2, 0, False)
            else:
                assert layer.relu and layer.dilation == 1
        assert (trunk["conv1"].pad, trunk["conv1"].stride) == ((2, 1, 2, 1), 4)
    assert not any(isinstance(layer, layers.LRN) for layer in make("small").leaves().values())


def test_dropout_stands_behind_fc6_fc7_and_fca():
    for head, adapt_kernel in ARMS:
        net = make(head=head, adapt_kernel=adapt_kernel, dropout=0.3, inverted=False)
        drops = {name: layer for name, layer in net.leaves().items() if "drop" in name}
        assert list(drops) == ["features.fc6_drop", "head.drop"] + ["head.fca_drop"] * (head != "source")
        assert all(layer.p == 0.3 and not layer.inverted for layer in drops.values())
        assert [layer.by_map for layer in drops.values()][1:] == [head == "weak"] * (len(drops) - 1)
        assert list(net.parts["head"].parts) == (["drop", "fc8"] if head == "source" else ["drop", "fca", "fca_drop", "fcb"])
        assert list(net.parts["features"].parts) == ["fc6", "fc6_drop", "fc7"]
        assert [layer.relu for layer in net.parts["head"].leaves().values() if layer.params][-1] is False


def test_width_and_units_of_adaptation():
    table = dataclasses.replace(SMALL, adapt=64)
    assert [r[1:3] for r in oquab.rows(table, 6, "weak", width=0.5)] == [(3, 8), (8, 16), (16, 16), (16, 48), (48, 48), (48, 32), (32, 6)]
    assert [r[:4] for r in oquab.rows(SMALL, 6, "weak", width=0.5, adapt=96)[-2:]] == [("head.fca", 48, 96, 1), ("head.fcb", 96, 6, 1)]
    assert oquab.rows(tiny(), 3, width=0.5)[0].Cout == 2 and oquab.rows(tiny(), 3, width=1e-9)[1].Cout == 1        # 1.5 is rounded up; never 0
    assert make(head="strong").spec.outputs == 4 and make(head="weak").spec.outputs == make().spec.outputs == 3


def test_weights_start_by_hes_rule_or_as_krizhevskys():
    he, net = (Oquab(Spec(("a",), "4096", width=1 / 16, init=init), np.random.default_rng(0)) for init in (None, 0.01))
    assert he.params["features.fc7.w"].std() == pytest.approx(np.sqrt(2 / 256), rel=0.02)
    assert net.params["features.fc7.w"].std() == pytest.approx(0.01, rel=0.02)
    assert not any(v.any() for name, v in he.params.items() if name.endswith(".b"))
    biases = {name.split(".")[1]: v.tolist() for name, v in net.params.items() if name.endswith(".b")}
    assert {name for name, v in biases.items() if set(v) == {1}} == {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert {name for name, v in biases.items() if set(v) == {0}} == {"conv1", "conv3", "fc8"}


def test_pixels_are_normalised():
    x = make(mean=100.0, std=50.0).normalise(np.uint8([[[[0, 100, 255]]]]))
    assert_array_equal(x.ravel(), (-2, 0, 3.1), strict=True)
    assert make(dtype=np.float32).normalise(np.zeros((1, 2, 2, 3), np.uint8)).dtype == np.float32


# The sliding net (notes, sec. 7, 2. and 3.)

@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_connected_layer_is_a_convolution(backend):
    c, i, j = np.indices((2, 4, 5))
    x = ((20 * c + 5 * i + j) / 10).transpose(1, 2, 0)[None]
    o, c, i, j = np.indices((2, 2, 3, 3))
    w, b = ((o + 1) * (c + 1) + i - j) / 10, np.array([0.5, -0.5])
    fc6 = layers.Conv2D(2, 2, 3, rng=np.random.default_rng(0), dtype=np.float64, relu=True)
    fc6.params["w"][...], fc6.params["b"][...] = w.transpose(2, 3, 1, 0), b
    with use(backend) as put:
        y = to_numpy(fc6.to(put)(put(x)))[0]
        crops = [to_numpy(fc6(put(np.ascontiguousarray(x[:, i:i + 3, j:j + 3]))))[0, 0, 0] for i, j in ((0, 0), (1, 2))]
    assert_allclose(y[..., 0], [[6.20, 6.47, 6.74], [7.55, 7.82, 8.09]], rtol=0, atol=1e-12)
    assert_allclose(y[..., 1], [[10.42, 10.96, 11.50], [13.12, 13.66, 14.20]], rtol=0, atol=1e-12)
    flat = w.reshape(2, -1)                                         # the layer as Krizhevsky's: one matrix for a window
    assert_allclose(crops, [flat @ x[0, i:i + 3, j:j + 3].transpose(2, 0, 1).ravel() + b for i, j in ((0, 0), (1, 2))], rtol=0, atol=1e-12)
    assert_allclose(crops, [(6.20, 10.42), (8.09, 14.20)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", oquab.HEADS)
def test_the_map_is_the_net_on_every_window_only_without_padding(backend, head):
    for table in ("unpadded", "tiny"):
        net = make(table, head=head)
        side, step = net.table.window, net.table.step
        x = images(side + 2 * step + 1, side + step, 2)
        with use(backend) as put:
            net.to(put)
            y, alone = to_numpy(net(put(x))), to_numpy(net(put(np.ascontiguousarray(x[:, :side, :side]))))
            crops = np.empty_like(y)
            for i, j in np.ndindex(y.shape[1:3]):
                crops[:, i, j] = to_numpy(net(put(np.ascontiguousarray(x[:, step * i:step * i + side, step * j:step * j + side]))))[:, 0, 0]
        assert y.shape[:3] == (2, 3, 2) and np.ptp(crops, (1, 2)).max() > 1e-3
        assert alone.shape[1:3] == (1, 1)
        error = np.abs(crops - y).max()
        assert error < 1e-12 if table == "unpadded" else error > 0.01


def test_without_padding_the_window_is_the_receptive_field():
    table = TABLES["unpadded"]
    assert (table.window, table.step) == (19, 4) and oquab.fields(table)[-1] == ("fcb", 19, 4, 0)
    assert (tiny().window, tiny().step) == (6, 4) and oquab.fields(tiny())[-1] == ("fcb", 15, 4, -5)


def test_an_image_moved_by_the_step_moves_the_cells_that_padding_does_not_touch():
    """Of the full net at 1024 pixels these are 3..22 of 26."""
    net = make("6144", width=1 / 64, head="weak")
    _, field, stride, first = oquab.fields(net.table)[-1]
    free = [i for i in range(26) if first + stride * i >= 0 and first + stride * i + field <= 1024]
    assert free == list(range(3, 23)) and oquab.map_side(net.table, 1024) == 26
    x = images(1024 + 32, 224)
    a, b = (net(np.ascontiguousarray(x[:, y:y + 1024])) for y in (0, 32))
    assert a.shape == b.shape == (1, 26, 1, 3) and np.ptp(a) > 1e-3
    equal = np.abs(a[0, 1:, 0] - b[0, :-1, 0]).max(1) < 1e-12
    assert equal[3:22].all() and not equal[0] and not equal[-1]


@given(H=st.integers(32, 60), W=st.integers(32, 60))
def test_scores_have_the_tables_size(H, W):
    net = make("small", head="weak", width=1 / 16, adapt_kernel=3)
    assert net(images(H, W)).shape == (1, oquab.map_side(SMALL, H), oquab.map_side(SMALL, W), 3)


# Gradients

def with_parameters(net, x, **how):
    """The net as a function of its parameters, for check_grad; the dropout masks are always the same."""
    places = [(layer, key) for layer in net.leaves().values() for key in layer.params]

    def forward(*params):
        for (layer, key), p in zip(places, params):
            layer.params[key] = p
        return net.forward(x, rng=np.random.default_rng(3), **how)

    def backward(dy, cache):
        for layer, key in places:
            layer.grads[key][...] = 0
        assert net.backward(dy, cache) is None
        return [layer.grads[key].copy() for layer, key in places]
    return forward, backward, [layer.params[key] for layer, key in places]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head, adapt_kernel", [("source", 1), ("strong", 1), ("weak", 3)])
def test_gradient_of_all_parameters(backend, head, adapt_kernel):
    """LRN with a small k, so that it matters; two cells, with dropout."""
    net = make("smallest", 4, head=head, adapt_kernel=adapt_kernel, dropout=0.2, lrn_k=0.05, inverted=head == "source")
    x = images(13, 9)
    with use(backend) as put:
        net.to(put)
        forward, backward, params = with_parameters(net, put(x), train=True)
        check_grad(forward, backward, [to_numpy(p).copy() for p in params], put=put)
        assert sum(bool(to_numpy(g).any()) for g in net.grads.values()) == len(net.grads)


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-10), (np.float32, 1e-4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_have_one_map(backend, dtype, limit):
    x, maps = images(45, 40, 2).astype(dtype), []
    for name in ("numpy", backend):
        net = make("small", dtype=dtype, head="weak", adapt_kernel=3)
        with use(name) as put:
            net.to(put)
            maps.append([to_numpy(a) for a in (net(put(x)), net.features(put(x)))])
    for a, b in zip(*maps):
        assert a.dtype == b.dtype == dtype and np.abs(a).max() > 1e-3
        assert_allclose(b, a, rtol=limit, atol=limit * np.abs(a).max())


# Dropout by map (notes, sec. 7, 20.)

@pytest.mark.parametrize("backend", BACKENDS)
def test_dropmap_is_one_mask_for_all_positions_and_images_and_scales_at_test_time(backend):
    net = make("small", head="weak", inverted=False, dropout=0.25)
    head = net.parts["head"]
    x = 1 + np.random.default_rng(0).random((3, 2, 4, 96))
    with use(backend) as put:
        head.to(put)
        hidden = head.parts["drop"].forward(put(x), True, np.random.default_rng(1))[0]
        mask = to_numpy(hidden) / x
        assert set(np.unique(mask)) == {0.0, 1.0}                   # unscaled
        assert_array_equal(mask, np.broadcast_to(mask[:1, :1, :1], mask.shape))
        assert 0.1 < (mask == 0).mean() < 0.4
        ya = head.parts["fca"](hidden)
        rng = np.random.default_rng(1)
        rng.random(96, np.float32)                                  # the first mask's draws; what follows is FCa's
        expected = to_numpy(head.parts["fcb"](head.parts["fca_drop"].forward(ya, True, rng)[0]))
        assert_allclose(to_numpy(head.forward(put(x), True, np.random.default_rng(1))[0]), expected, rtol=0, atol=1e-12)
        test = to_numpy(head.parts["fcb"](0.75 * head.parts["fca"](put(0.75 * x))))
        assert_allclose(to_numpy(head(put(x))), test, rtol=0, atol=1e-12)


# What trains (notes, sec. 2; sec. 7, 6.)

def steps(net, layer, y, count=3, lr=0.01):
    """Train a layer that a net's scores come from, on its inputs y, as the net's head is trained."""
    sgd, rng, losses, xp = optim.SGD(layer, 0.9, 5e-4), np.random.default_rng(0), [], array_module(y)
    for _ in range(count):
        scores, cache = layer.forward(y, True, rng)
        if net.spec.head == "weak":
            best, pool_cache = global_max_pool.forward(scores)
            value, d = logistic_loss.loss(best, xp.asarray(np.where(np.eye(3, dtype=bool), 1, -1)[np.arange(len(y)) % 3]), signed=True)
            dscores = global_max_pool.backward(d, pool_cache)
        else:
            flat = scores.reshape(-1, scores.shape[-1])
            value, d = softmax_loss.loss(flat, xp.asarray(np.arange(len(flat)) % scores.shape[-1]))
            dscores = d.reshape(scores.shape)
        layer.backward(dscores, cache)
        sgd.step(lr)
        losses.append(float(value))
    return losses


TRAINED = {"head": {"head.fca", "head.fcb"}, "fc6": {"features.fc6", "head.fca", "head.fcb"}}


@pytest.mark.parametrize("head", ["strong", "weak"])
@pytest.mark.parametrize("trains", oquab.TRAINS)
def test_frozen_layers_keep_their_bits(head, trains):
    net = make(head=head)
    before, x = copies(net.params), images(12, 9, 4)
    assert oquab.freeze(net, trains) is net
    steps(net, net, x)
    changed = {name for name, a in net.params.items() if a.tobytes() != before[name].tobytes()}
    wanted = TRAINED.get(trains, {name.rsplit(".", 1)[0] for name in net.params})
    assert changed == {f"{layer}.{key}" for layer in wanted for key in "wb"} == set(net.trained)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trains", oquab.TRAINS)
def test_training_the_rest_on_kept_maps_is_training_the_net(backend, trains):
    """Classical dropout: the frozen layers must run in test mode both times."""
    for head in ("strong", "weak"):
        one, two = (oquab.freeze(make(head=head, dropout=0.4, inverted=False), trains) for _ in range(2))
        x, start = images(12, 12, 4), copies(one.params)
        with use(backend) as put:
            x = put(x)
            one.to(put), two.to(put)
            kept = oquab.frozen_part(two, x, trains)
            part = oquab.rest(two, trains)
            assert {name.split(".")[-2] for name in part.trained} == {name.split(".")[-2] for name in two.trained}
            assert_allclose(to_numpy(part(kept)), to_numpy(two(x)), rtol=0, atol=1e-14)
            y, cache = part.forward(kept, True, np.random.default_rng(0))
            assert part.backward(y, cache) is None
            for g in part.grads.values():
                g[...] = 0
            assert_allclose(steps(two, part, kept), steps(one, one, x), rtol=0, atol=1e-12)
            for name, a in one.params.items():
                assert_allclose(to_numpy(two.params[name]), to_numpy(a), rtol=0, atol=1e-12)
        assert any((to_numpy(a) != start[name]).any() for name, a in two.params.items())


def test_what_is_kept_and_what_comes_behind():
    net, x = make(), images(12, 12)
    assert oquab.frozen_part(net, x, "all") is x and oquab.rest(net, "all") is net
    assert_array_equal(oquab.frozen_part(net, x, "fc6"), net.parts["trunk"](x))
    assert_array_equal(oquab.frozen_part(net, x, "head"), net.features(x))
    assert_array_equal(net.features(x), net.parts["features"](net.parts["trunk"](x)))
    oquab.freeze(net, "head")
    assert list(net.trained) == ["head.fc8.w", "head.fc8.b"] and not net.parts["trunk"].parts["conv1"].input_grad
    net.parts["features"].backward = None                           # not called: nothing trains there or below
    net.backward(*net.forward(x))
    del net.parts["features"].backward
    oquab.freeze(net, "all")
    assert net.trained == net.params
    y, cache = net.forward(x)                                       # nothing that freeze left behind
    oquab.rest(net, "head")
    net.backward(y, cache)
    assert all(g.any() for g in net.grads.values())
    for name, call in (("freeze", lambda: oquab.freeze(net, "fc7")), ("frozen_part", lambda: oquab.frozen_part(net, x, "fc7")),
                       ("rest", lambda: oquab.rest(net, "fc7"))):
        with pytest.raises(ValueError, match=rf"^oquab\.{name}: trains must be one of head, fc6, all, got 'fc7'$"):
            call()


# Learning

def test_four_images_are_learnt():
    net, rng = Oquab(Spec(("a", "b", "c", "d"), width=0.5, dropout=0.1), np.random.default_rng(0), np.float64), np.random.default_rng(0)
    losses = steps(net, net, rng.standard_normal((4, 32, 32, 3)), 30)
    assert losses[0] > 1 and losses[-1] < 0.05


LOSSES = {
    "source": [2.0589300, 1.2013181, 1.6000428, 1.0289001, 0.8934204, 0.9295423, 0.6633900, 0.7268015, 0.5161629, 0.6431096],
    "strong": [3.5931552, 1.4443444, 1.6614498, 1.1794705, 1.5891311, 1.4215548, 1.8976087, 1.5078174, 1.5569591, 1.4294824],
    "weak": [4.3384252, 4.9380124, 2.0642204, 1.7682413, 1.8853085, 2.0601448, 2.5189784, 2.0356977, 1.9863330, 2.4597862]}


@pytest.mark.parametrize("head", oquab.HEADS)
def test_the_first_losses_of_a_seeded_run(head):
    net = Oquab(Spec(CLASSES, head=head, width=0.25, adapt=8, dropout=0.2), np.random.default_rng(0), np.float64)
    assert_allclose(steps(net, net, images(40, 32, 3), 10), LOSSES[head], rtol=0, atol=1e-6)


# Files, and what a net takes over

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head, adapt_kernel", ARMS[1:])
def test_a_net_takes_over_all_but_the_head(backend, head, adapt_kernel):
    source, net, x = make("small", 1), make("small", 2, head=head, adapt_kernel=adapt_kernel, dropout=0.2), images(32, 40)
    own = copies(net.parts["head"].params)
    with use(backend) as put:
        net.to(put)
        names = ["trunk.conv1", "trunk.conv2", "trunk.conv3", "features.fc6", "features.fc7"]
        assert oquab.take_over(net, source) == names
        y = net.features(put(x))
        net.to(to_numpy)
    assert_allclose(to_numpy(y), source.features(x), rtol=1e-10, atol=1e-12)
    for name in names:
        for key in "wb":
            assert_array_equal(net.params[f"{name}.{key}"], source.params[f"{name}.{key}"])
            assert not np.shares_memory(net.params[f"{name}.{key}"], source.params[f"{name}.{key}"])
    for name, a in net.parts["head"].params.items():
        assert_array_equal(a, own[name])


@pytest.mark.parametrize("more, told", [
    (dict(table="unpadded"), r"one table, got \['tiny'\] and \['unpadded'\]"), (dict(width=0.5), r"one width, got \[1.0\] and \[0.5\]"),
    (dict(mean=1.0, std=2.0), r"one mean, std, got"), (dict(lrn_k=2.0), "one lrn_k"), (dict(divide_by_n=False), "one divide_by_n"),
    (dict(inverted=False), "one inverted")])
def test_nets_that_see_images_differently_take_nothing_over(more, told):
    net = make()
    before = copies(net.params)
    with pytest.raises(ValueError, match=rf"^oquab\.take_over: both nets must have {told}"):
        oquab.take_over(net, make(**more))
    for name, a in net.params.items():
        assert_array_equal(a, before[name])
    with pytest.raises(ValueError, match="one dropout"):            # it scales FC6 at test time where it is classical
        oquab.take_over(make(inverted=False), make(inverted=False, dropout=0.2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("head, adapt_kernel", ARMS)
def test_a_saved_net_comes_back_as_it_was(tmp_path, dtype, head, adapt_kernel):
    spec = Spec(CLASSES, "tiny", head, 0.75, None if head == "source" else 5, adapt_kernel, 0.25, False, 0.01, 2.0, False, 100.0, 50.0)
    net = Oquab(spec, np.random.default_rng(1), dtype)
    oquab.save(net, tmp_path / "w.npz", {"scales": [0.7, 1]})
    found, settings = oquab.load(tmp_path / "w.npz")
    assert found.spec == net.spec and found.dtype == dtype and settings == {"scales": [0.7, 1]}
    x = images(12, 16).astype(dtype)
    for a, b in zip((net(x), *net.params.values()), (found(x), *found.params.values())):
        assert_array_equal(a, b, strict=True)
    assert list(found.params) == list(net.params) and found.trained


@pytest.mark.parametrize("change, told", [
    ({"model": "overfeat"}, "the weights of 'overfeat'"), ({"spec": {"colour": 1}}, "TypeError"),
    ({"spec": {"table": "big"}}, "table must be one of"), ({"spec": {"table": {}}}, "unhashable"), ({"spec": {"table": "6144"}}, "a net of 98,149,763 parameters, far larger"),
    ({"spec": {"width": "x"}}, "TypeError"), ({"spec": {"width": math.inf}}, "width above 0 and finite"), ({"spec": {"adapt": "9"}}, "TypeError"),
    ({"spec": {"head": "weaker"}}, "head must be one of"), ({"spec": {"adapt_kernel": 3}}, "adapt_kernel must be 1"),
    ({"spec": {"classes": []}}, "different names"), ({"spec": {"dropout": 7}}, "dropout must"), ({"spec": {"inverted": 1}}, "inverted and divide_by_n"),
    ({"spec": {"std": "x"}}, "TypeError"), ({"settings": 3}, "settings 3")])
def test_files_that_hold_no_net_are_refused(tmp_path, change, told):
    net = Oquab(Spec(CLASSES, "tiny"), np.random.default_rng(0))
    spec = {**dataclasses.asdict(net.spec), **change.get("spec", {})}
    files.write_arrays(tmp_path / "w.npz", net.arrays(), {"model": "oquab", "dtype": "float32", "settings": {}, **change, "spec": spec})
    with pytest.raises(ValueError, match=rf"^oquab\.load: .*w\.npz must describe a net of oquab, got: .*{told}"):
        oquab.load(tmp_path / "w.npz")
    files.write_arrays(tmp_path / "w.npz", {}, {"model": "oquab", "spec": dataclasses.asdict(net.spec), "settings": {}})
    with pytest.raises(ValueError, match="w.npz lacks the array"):
        oquab.load(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError):
        oquab.load(tmp_path / "none.npz")


@pytest.mark.parametrize("more, told", [
    (dict(table="big"), r"^oquab\.Spec: table must be one of 4096, 6144, small"), (dict(classes=()), "classes must be different names, at least one"),
    (dict(classes=("a", "a")), "classes must be different"), (dict(head="boxes"), r"^oquab\.rows: head must be one of source, strong, weak"),
    (dict(width=0.0), "width above 0"), (dict(adapt=0), "adapt must be at least 1"), (dict(dropout=1.0), r"dropout must lie in \[0, 1\)"),
    (dict(mean=math.nan), "mean be finite"), (dict(std=0.0), "std and lrn_k above 0"), (dict(lrn_k=0.0), "std and lrn_k above 0"),
    (dict(init=0.0), "init must be None, or above 0"), (dict(adapt_kernel=2, head="weak"), "adapt_kernel must be 1, or 3 of a weak net, got 2"),
    (dict(adapt_kernel=3, head="strong"), "adapt_kernel must be 1, or 3 of a weak net, got 3 of a strong one")])
def test_specs_that_describe_no_net_are_refused(more, told):
    with pytest.raises(ValueError, match=told):
        Spec(**{"classes": CLASSES, **more})


def test_types_of_a_spec_are_checked():
    for more in (dict(inverted=1), dict(divide_by_n="yes"), dict(adapt=2.0), dict(width="1")):
        with pytest.raises(TypeError):
            Spec(CLASSES, **more)
    with pytest.raises(TypeError, match="outputs must be an integer"):
        oquab.rows(SMALL, 3.0)
