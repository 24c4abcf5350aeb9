"""OverFeat's two nets: what their table says, dense evaluation by both routes, its gradient, classification at several scales."""
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import files, to_numpy, use
from tinydet.gradcheck import check_grad
from tinydet.models import overfeat
from tinydet.models.overfeat import TABLES, OverFeat, Spec, Table, outputs
from tinydet.ops import softmax_loss
from tinydet.summary import summary

FAST, ACCURATE = TABLES["fast"], TABLES["accurate"]


def tiny(pad, pool=3, k=2):
    """The net of notes 3.4: jump 4, window 33 without padding (25 with)."""
    return Table((("conv1", 3, 3, 2, 0, 2), ("conv2", 4, 3, 1, pad, pool)), k, (("fc3", 3), ("fc4", 2)), (("fc1", 3), ("fc2", 2)))


def unpadded(table):
    return dataclasses.replace(table, trunk=tuple((*row[:4], 0, row[5]) for row in table.trunk))


SMALLEST = Table((("conv1", 2, 1, 1, 0, 1), ("conv2", 2, 2, 1, 0, 2)), 2, (("fc3", 2),), (("fc1", 2),))     # window 5, jump 1


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    for name, table in (("tiny", tiny(0)), ("padded", tiny(1)), ("pool2", tiny(1, 2, 3)), ("smallest", SMALLEST)):
        monkeypatch.setitem(TABLES, name, table)


def make(table="tiny", seed=0, **more):
    """A float64 net whose every array is random."""
    net = OverFeat(Spec(("a", "b", "c"), table, **{"regressor": "SCR", **more}), np.random.default_rng(seed), np.float64)
    rng = np.random.default_rng(seed)
    for array in net.arrays().values():
        std = np.sqrt(2 / array[..., 0].size)
        array[...] = rng.normal(0, std, array.shape) if array.ndim == 4 else rng.uniform(0.2, 0.6, array.shape)
    return net


def images(H, W, N=1, seed=1):
    return np.random.default_rng(seed).standard_normal((N, H, W, 3))


def picture(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


# What the tables say (notes, 1.1 to 1.3)

PUBLISHED = {                           # parameters and multiply-adds of each layer
    "fast": [(34_944, 109_283_328), (614_656, 353_894_400), (1_180_160, 169_869_312), (4_719_616, 679_477_248),
             (9_438_208, 1_358_954_496), (113_249_280, 113_246_208), (12_587_008, 12_582_912), (4_097_000, 4_096_000)],
    "accurate": [(14_208, 164_602_368), (1_204_480, 1_083_801_600), (1_180_160, 265_420_800), (2_359_808, 530_841_600),
                 (4_719_616, 1_061_683_200), (9_438_208, 2_123_366_400), (104_861_696, 104_857_600), (16_781_312, 16_777_216),
                 (4_097_000, 4_096_000)],
}


@pytest.mark.parametrize("name, parameters, multiply_adds", [("fast", 145_920_872, 2_801_403_904),
                                                             ("accurate", 144_656_488, 5_355_446_784)])
def test_each_layer_has_the_published_parameters_and_multiply_adds(name, parameters, multiply_adds):
    table = TABLES[name]
    assert list(zip(overfeat.parameters(table).values(), overfeat.multiply_adds(table).values())) == PUBLISHED[name]
    assert sum(overfeat.parameters(table).values()) == parameters and sum(overfeat.multiply_adds(table).values()) == multiply_adds


def test_geometry_of_both_nets():
    found = [(t.window, t.jump, t.pool, t.step, t.k, t.least) for t in (FAST, ACCURATE)]
    assert found == [(231, 16, 2, 32, 6, 247), (221, 12, 3, 36, 5, 245)]
    assert unpadded(FAST).window == 327 and unpadded(ACCURATE).window == 317       # the true receptive fields (notes, 1.3)
    assert overfeat._sides(FAST, 231) == [56, 24, 12, 12, 12] and overfeat._sides(ACCURATE, 221) == [108, 30, 15, 15, 15, 15]
    assert outputs(FAST, 231, 231) == ((12, 12), (6, 6), (1, 1), (1, 1))
    assert outputs(ACCURATE, 221, 221) == ((15, 15), (5, 5), (1, 1), (1, 1))
    assert outputs(ACCURATE, 231, 231).coarse == (1, 1)


def test_images_that_hold_no_window_are_refused():
    with pytest.raises(ValueError, match=r"^overfeat\.outputs: an image must hold a window of 231x231 pixels, got 221x221$"):
        outputs(FAST, 221, 221)
    with pytest.raises(ValueError, match="window of 221x221 pixels, got 300x220"):
        overfeat.multiply_adds(ACCURATE, size=(300, 220))
    net = make()
    for run in (net.forward, net.dense):
        with pytest.raises(ValueError, match=rf"^OverFeat\.{run.__name__}: x must hold a window of 33 pixels, got \(1, 32, 40, 3\)"):
            run(images(32, 40))
    with pytest.raises(ValueError, match=r"window of 33 pixels at the offset \(0, 2\), got \(1, 33, 40, 3\)"):
        net.forward(images(33, 40), offset=(0, 2))
    net.forward(images(33, 41), offset=(0, 2))


def test_table_5():
    """Sizes, trunk map, pooled map of an offset, F (notes, 3.2), and 1575 windows an image."""
    maps = [((17, 17), (5, 5), (1, 1), (3, 3)), ((20, 23), (6, 7), (2, 3), (6, 9)), ((23, 29), (7, 9), (3, 5), (9, 15)),
            ((29, 35), (9, 11), (5, 7), (15, 21)), ((32, 38), (10, 12), (6, 8), (18, 24)), ((35, 44), (11, 14), (7, 10), (21, 30))]
    assert [outputs(ACCURATE, *size) for size in overfeat.TEST_SIZES] == maps
    assert sum(np.prod(outputs(ACCURATE, *size).fine) for size in overfeat.TEST_SIZES) == 1575
    assert ACCURATE.sizes == overfeat.TEST_SIZES
    for table in (FAST, ACCURATE, tiny(0), tiny(1, 2, 3)):
        for H, W in table.sizes:                        # every offset has a map of one size; the last window ends at the border
            size, p = outputs(table, H, W), table.pool
            assert size.fine == tuple(p * n for n in size.coarse)
            assert_array_equal(overfeat.windows(table, *size.fine)[-1, 2:], (W, H))


@given(H=st.integers(231, 900), W=st.integers(231, 900))
def test_output_sizes_are_the_formulas(H, W):
    assert outputs(FAST, H, W).coarse == (((H - 11) // 4 + 1) // 8 - 6, ((W - 11) // 4 + 1) // 8 - 6)
    assert outputs(ACCURATE, H, W).coarse == (((H - 7) // 2 + 1) // 18 - 5, ((W - 7) // 2 + 1) // 18 - 5)
    assert outputs(FAST, H, W).trunk[0] == (((H - 11) // 4 + 1) // 2 - 4) // 2
    for table in (FAST, ACCURATE):
        n, p, k = outputs(table, H, W).trunk[0], table.pool, table.k
        assert outputs(table, H, W).fine[0] == n - p * k + 1 == sum(max(0, (n - o) // p - k + 1) for o in range(p))


@pytest.mark.parametrize("table", ["fast", "accurate"])
def test_the_net_is_its_table_at_small_width(table):
    spec = Spec(("a", "b"), table, width=1 / 64, regressor="PCR")
    net, t, more = OverFeat(spec, np.random.default_rng(0)), TABLES[table], (2, 1 / 64, "PCR")
    x = images(t.least, t.least + t.step).astype(np.float32)
    found = {row.name: row for row in summary(net, x).rows if row.params}
    assert {name: row.params for name, row in found.items()} == overfeat.parameters(t, *more)
    assert {name: row.multiply_adds for name, row in found.items()} == overfeat.multiply_adds(t, *more, size=x.shape[1:3])
    size = outputs(t, *x.shape[1:3])
    F, coarse = net.dense(x), net.forward(x)
    assert F[0].shape == (1, *size.fine, 2) and F[1].shape == (1, *size.fine, 8) and coarse[0].shape == (1, *size.coarse, 2)
    for a, b, c in zip(F, net.dense(x, "dilated"), coarse):
        assert_allclose(b, a, atol=1e-6)
        assert_allclose(a[:, ::t.pool, ::t.pool], c, atol=1e-6)
    assert all(not v.any() for name, v in net.params.items() if name.endswith(".b"))
    assert net.params["classifier.out.w"].dtype == np.float32


def test_width_and_regressor():
    assert [r[1:3] for r in overfeat.rows(FAST, 10, 1 / 32)] == [(3, 3), (3, 8), (8, 16), (16, 32), (32, 32), (32, 96), (96, 128), (128, 10)]
    assert overfeat.rows(tiny(0), 3, 0.5)[0].Cout == 2 and overfeat.rows(tiny(0), 3, 1e-9)[1].Cout == 1       # 1.5 is rounded up; never 0
    heads = [{k: v for k, v in overfeat.parameters(ACCURATE, regressor=r).items() if k.startswith("regressor")} for r in ("SCR", "PCR")]
    assert heads[0] == {"regressor.fc1": 25 * 1024 * 4096 + 4096, "regressor.fc2": 4096 * 1024 + 1024, "regressor.out": 4100}
    assert heads[1]["regressor.out"] == 4_100_000
    assert "regressor" not in make(regressor=None).parts


def test_weights_start_with_the_papers_deviation_or_by_hes_rule():
    for init, expected in ((0.01, 0.01), (None, np.sqrt(2 / (25 * 128)))):
        net = OverFeat(Spec(("a",), width=1 / 8, init=init), np.random.default_rng(0))
        assert net.params["classifier.fc7.w"].std() == pytest.approx(expected, rel=0.01)


def test_pixels_are_normalised_by_the_releases_numbers():
    x = make().normalise(np.uint8([[[[0, 118, 255]]]]))
    assert_allclose(x.ravel(), [(v - 118.380948) / 61.896913 for v in (0, 118, 255)], rtol=1e-15)


# Dense evaluation (notes, 3.1 and 3.4)

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table, H, W", [("tiny", 49, 45), ("padded", 25, 33), ("padded", 29, 41), ("pool2", 30, 43)])
def test_both_routes_are_the_heads_on_every_block_of_the_trunks_map(backend, table, H, W):
    net = make(table)
    p, k, x = net.table.pool, net.table.k, images(H, W, 2)
    with use(backend) as put:
        net.to(put)
        maps = net.parts["trunk"](put(x))
        F, dilated = net.dense(put(x)), net.dense(put(x), "dilated")
        for part, f, d in zip(("classifier", "regressor"), F, dilated):
            assert f.shape[1:3] == outputs(net.table, H, W).fine
            assert_allclose(to_numpy(d), to_numpy(f), rtol=0, atol=1e-12)
            for r, c in np.ndindex(f.shape[1:3]):
                block = maps[:, r:r + p * k, c:c + p * k].reshape(2, k, p, k, p, -1).max((2, 4))
                assert_allclose(to_numpy(net.parts[part](block))[:, 0, 0], to_numpy(f)[:, r, c], rtol=0, atol=1e-12)
        net.to(to_numpy)
    assert np.ptp(to_numpy(F[0])) > 0.01


@pytest.mark.parametrize("offset", [(0, 0), (1, 0), (0, 2), (2, 2)])
def test_one_offset_is_every_pth_of_the_fine_map(offset):
    net, x = make("padded"), images(50, 43, 2)
    oy, ox = offset
    F, (scores, edges, _) = net.dense(x), net.forward(x, offset=offset)
    for f, y in zip(F, (scores, edges)):
        assert_allclose(y, f[:, oy::3, ox::3], rtol=0, atol=1e-12)
    for f, y in zip(F, net.forward(x, offset=None)):
        assert_array_equal(y, f)
    fine = overfeat.windows(net.table, *F[0].shape[1:3]).reshape(*F[0].shape[1:3], 4)
    assert_array_equal(overfeat.windows(net.table, *scores.shape[1:3], offset).reshape(*scores.shape[1:3], 4), fine[oy::3, ox::3])


@pytest.mark.parametrize("table", ["tiny", "padded", "unpadded accurate"])
def test_the_fine_map_is_the_net_on_every_window_of_the_image_only_without_padding(table, monkeypatch):
    """Notes 3.4, 2.: a padded trunk sees real pixels where a crop sees zeros, so there the equality must fail."""
    if table == "unpadded accurate":
        monkeypatch.setitem(TABLES, table, unpadded(ACCURATE))
    net = make(table, **{"width": 1 / 100} if "accurate" in table else {})
    side = net.table.window
    x = images(side + net.table.jump, side + (2 if side < 100 else 1) * net.table.jump)
    for F, head in zip(net.dense(x), (0, 1)):
        crops = np.empty_like(F).reshape(-1, F.shape[3])
        for crop, (x1, y1, x2, y2) in zip(crops, overfeat.windows(net.table, *F.shape[1:3]).astype(int)):
            crop[:] = net.forward(x[:, y1:y2, x1:x2])[head].ravel()
        assert np.ptp(crops, 0).max() > 1e-6
        error = np.abs(crops.reshape(F.shape) - F).max() / np.abs(F).max()
        assert error > 0.01 if table == "padded" else error < 1e-12


def test_an_image_moved_by_the_jump_moves_the_map_by_one():
    net, x = make(), images(60, 61)
    assert_allclose(net.dense(x[:, 4:])[0], net.dense(x)[0][:, 1:], rtol=0, atol=1e-12)
    assert_allclose(net.dense(x[:, :, 8:])[0], net.dense(x)[0][:, :, 2:], rtol=0, atol=1e-12)


def test_a_net_of_mirrored_kernels_sees_the_mirrored_map_in_the_mirrored_image():
    net, mirrored = make("padded"), make("padded")
    for array in mirrored.params.values():
        if array.ndim == 4:
            array[...] = array[:, ::-1].copy()
    H, W = net.table.sizes[1]
    x = images(H, W)
    assert_allclose(mirrored.dense(x[:, :, ::-1])[0][:, :, ::-1], net.dense(x)[0], rtol=0, atol=1e-12)


# Its gradient (notes, 3.5)

def with_parameters(net, x, **how):
    """The net as a function of its parameters, for check_grad; the dropout masks are always the same."""
    places = [(layer, key) for layer in net.leaves().values() for key in layer.params]

    def forward(*params):
        for (layer, key), p in zip(places, params):
            layer.params[key] = p
        scores, edges, cache = net.forward(x, rng=np.random.default_rng(3), **how)
        return [scores, edges], cache

    def backward(dys, cache):
        for layer, key in places:
            layer.grads[key][...] = 0
        net.backward(*dys, cache)
        return [layer.grads[key].copy() for layer, key in places]
    return forward, backward, [layer.params[key] for layer, key in places]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_all_parameters_at_fine_stride(backend):
    """The map of 1 x 2 windows: offsets have one of them, or none at all."""
    net, x = make("smallest", 2, dropout=0.3), images(5, 6)
    with use(backend) as put:
        net.to(put)
        forward, backward, params = with_parameters(net, put(x), train=True, offset=None)
        check_grad(forward, backward, [to_numpy(p).copy() for p in params], put=put)
        assert all(to_numpy(g).any() for g in net.grads.values())


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("p, k", [(p, k) for p in (2, 3) for k in (1, 2, 3)])
def test_gradient_of_pool_and_heads_at_all_offsets(backend, p, k, monkeypatch):
    """Maps of odd and even sides, so that offsets have unequal numbers of windows; the trunk is one 1x1 convolution."""
    monkeypatch.setitem(TABLES, "pool and head", Table((("conv1", 2, 1, 1, 0, p),), k, (("fc2", 2),), (("fc1", 2),)))
    net, x = make("pool and head", 2, dropout=0.0), images(p * k + p, p * k + 1, 1)
    with use(backend) as put:
        forward, backward, params = with_parameters(net, put(x), train=True, offset=None)
        check_grad(forward, backward, [p.copy() for p in params], put=put)
    assert all(g.any() for g in net.grads.values())


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-10), (np.float32, 1e-4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_have_one_map(backend, dtype, limit):
    x, maps = images(41, 37, 2).astype(dtype), []
    for name in ("numpy", backend):
        net = OverFeat(make("padded").spec, np.random.default_rng(0), dtype)
        for key, array in make("padded").arrays().items():
            net.arrays()[key][...] = array
        with use(name) as put:
            net.to(put)
            maps.append([to_numpy(F) for F in (*net.dense(put(x)), *net.forward(put(x), offset=(1, 2))[:2])])
    for a, b in zip(*maps):
        assert a.dtype == b.dtype == dtype and np.abs(a).max() > 1e-3
        assert_allclose(b, a, rtol=limit, atol=limit * np.abs(a).max())


@pytest.mark.parametrize("table", ["padded", "pool2"])
def test_the_fine_gradient_is_the_sum_over_the_offsets(table):
    net = make(table)
    p, x = net.table.pool, images(net.table.window + 10, net.table.window + 12, 2)
    scores, edges, cache = net.forward(x, offset=None)
    rng = np.random.default_rng(2)
    dscores, dedges = rng.standard_normal(scores.shape), rng.standard_normal(edges.shape)
    net.backward(dscores, dedges, cache)
    fine = {k: g.copy() for k, g in net.grads.items()}
    for g in net.grads.values():
        g[...] = 0
    for oy, ox in np.ndindex(p, p):
        net.backward(dscores[:, oy::p, ox::p], dedges[:, oy::p, ox::p], net.forward(x, offset=(oy, ox))[2])
    for name, g in net.grads.items():
        assert g.any()
        assert_allclose(g, fine[name], rtol=1e-12, atol=1e-12)


def test_no_gradient_where_none_came_from():
    net, x = make("padded"), images(33, 30)
    scores, edges, cache = net.forward(x, offset=None)
    net.backward(0 * scores, 0 * edges, cache)
    assert not any(g.any() for g in net.grads.values())
    net.parts["trunk"].freeze()                                     # sec. 4: the regressor alone, on a trained trunk
    none, edges, cache = net.forward(x, offset=None, heads=("regressor",))
    net.backward(None, edges, cache)
    assert none is None
    assert {name.split(".")[0] for name, g in net.grads.items() if g.any()} == {"regressor"}
    assert net.dense(x, heads=("classifier",))[1] is None and make(regressor=None).forward(images(33, 33))[1] is None


def test_dropout_is_inverted_and_stands_behind_the_classifiers_hidden_layers_only():
    net, x = make("padded", dropout=0.5), images(25, 25)
    runs = [net.forward(x, True, np.random.default_rng(seed)) for seed in range(4)]
    assert len({float(scores.sum()) for scores, _, _ in runs}) > 1
    assert len({edges.tobytes() for _, edges, _ in runs}) == 1
    assert [name for name in net.leaves() if "drop" in name] == ["classifier.fc3_drop", "classifier.fc4_drop"]
    assert all(net.leaves()[f"classifier.{name}_drop"].inverted for name in ("fc3", "fc4"))


# Classification (notes, 3.2 and 3.3)

def test_vote_of_the_worked_example():
    a = np.stack([[[.7, .1], [.2, .3]], [[.2, .8], [.3, .3]], [[.1, .1], [.5, .4]]], -1)
    b = np.array([[[.6, .3, .1]]])
    assert_allclose(overfeat.vote([a, b]), (.65, .55, .30), rtol=0, atol=1e-15)
    assert_allclose(overfeat.vote([b, a]), overfeat.vote([a, b]), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"^overfeat\.vote: maps must be arrays \(h, w, K\) of one K, at least one, got \[\]"):
        overfeat.vote([])
    with pytest.raises(ValueError, match="of one K"):
        overfeat.vote([a, b[..., :2]])


@pytest.mark.parametrize("fine, probabilities, flip", [(True, True, True), (False, True, False), (True, False, True)])
def test_classify_is_the_vote_over_scales_and_flips(fine, probabilities, flip):
    net, image = make("padded", regressor=None), picture(40, 50)
    sizes = net.table.sizes[:2]
    expected = []
    for size in sizes:
        for view in (overfeat.resize_to(net.table, image, size), overfeat.resize_to(net.table, image, size)[:, ::-1])[:1 + flip]:
            F = net.dense(net.normalise(view[None]))[0][0]
            F = F if fine else F[::3, ::3]
            F = softmax_loss.softmax(F) if probabilities else F
            expected.append(F.max((0, 1)))
    found = overfeat.classify(net, image, sizes, flip, fine, probabilities)
    assert found.dtype == np.float64
    assert_allclose(found, np.mean(expected, 0), rtol=0, atol=1e-12)
    assert_allclose(overfeat.classify(net, image, sizes[::-1], flip, fine, probabilities), found, rtol=0, atol=1e-12)
    if flip:
        assert_allclose(overfeat.classify(net, image[:, ::-1], sizes, flip, fine, probabilities), found, rtol=0, atol=0.02)


def test_classify_uses_all_six_scales_and_a_committee_is_the_mean():
    a, b, image = make("padded"), make("padded", 1), picture(30, 30)
    assert_allclose(overfeat.classify(a, image), overfeat.classify(a, image, a.table.sizes), rtol=0, atol=0)
    how = dict(sizes=a.table.sizes[:1], flip=False)
    both = [overfeat.classify(net, image, **how) for net in (a, b)]
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert_allclose(overfeat.committee([a, b], image, **how), (both[0] + both[1]) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("H, W, wanted, aspect", [(375, 500, (281, 317), (281, 389)), (500, 375, (317, 281), (389, 281)),
                                                  (300, 300, (281, 317), (281, 281)), (100, 1000, (281, 317), (281, 2801))])
def test_a_scale_is_turned_for_portraits_and_may_keep_the_aspect(H, W, wanted, aspect):
    """500 / 375 * 281 = 374.67: 353 and 389 are nearest of 245 + 36 q."""
    assert overfeat.resize_to(ACCURATE, picture(H, W), (281, 317)).shape == (*wanted, 3)
    assert overfeat.resize_to(ACCURATE, picture(H, W), (281, 317), keep_aspect=True).shape == (*aspect, 3)


def test_an_image_of_the_scales_size_stays_as_it_is():
    image = picture(317, 281)
    assert_array_equal(overfeat.resize_to(ACCURATE, image, (281, 317)), image)


def test_ten_views_are_corners_and_centre_and_their_mirror_images():
    image, table = picture(30, 41), tiny(1)                         # window 25
    views = overfeat.ten_views(table, image, short=30)
    for view, (y, x) in zip(views, ((0, 0), (0, 16), (5, 0), (5, 16), (2, 8))):
        assert_array_equal(view, image[y:y + 25, x:x + 25])
    assert_array_equal(views[5:], views[:5, :, ::-1])
    assert overfeat.ten_views(FAST, picture(128, 200)).shape == (10, 231, 231, 3)
    net = make("padded")
    scores = net.forward(net.normalise(views))[0]
    assert scores.shape == (10, 1, 1, 3)
    assert_allclose(overfeat.classify_ten(net, image, 30), softmax_loss.softmax(scores).mean((0, 1, 2)), rtol=0, atol=1e-12)


def test_training_views_are_windows_of_the_image_at_its_short_side_half_of_them_mirrored():
    image, table, rng, seen = picture(27, 30), tiny(1), np.random.default_rng(0), set()
    crops = {image[y:y + 25, x:x + 25][:, ::step].tobytes(): (y, x, step) for y in range(3) for x in range(6) for step in (1, -1)}
    for _ in range(300):
        view = overfeat.training_view(table, image, rng, short=27)
        assert view.shape == (25, 25, 3) and view.dtype == np.uint8
        seen.add(crops[view.tobytes()])
    assert len(seen) == 36
    assert overfeat.training_view(ACCURATE, picture(100, 130), rng).shape == (221, 221, 3)
    with pytest.raises(ValueError, match=r"^overfeat\.training_view: short must be at least the window's 231 pixels, got 200"):
        overfeat.training_view(FAST, image, rng, short=200)


def test_errors():
    for more, told in ((dict(table="slow"), "table must be one of fast, accurate"),
                       (dict(classes=("a", "a")), "classes must be different"),
                       (dict(dropout=1.0), "dropout must lie"), (dict(init=0.0), "init must be None, or above 0"),
                       (dict(width=0.0), "width must be above 0"), (dict(regressor="scr"), "regressor None, 'SCR' or 'PCR'")):
        with pytest.raises(ValueError, match=told):
            Spec(**{"classes": ("a", "b"), **more})
    for more in (dict(background=True), dict(scales=(1.0, 0.5)), dict(context=True)):
        assert all(Spec(("a", "b"), regressor=r, **more).detector for r in (None, "SCR"))
        with pytest.raises(ValueError, match=r"^overfeat\.Spec: the regressor of a detector must be None or 'SCR', .*, got 'PCR' with background"):
            Spec(("a", "b"), regressor="PCR", **more)
    net = make()
    with pytest.raises(ValueError, match=r"^OverFeat\.dense: route must be 'offsets' or 'dilated', got 'both'"):
        net.dense(images(40, 40), "both")
    with pytest.raises(ValueError, match=r"^OverFeat\.forward: offset must lie in 0\.\.2, got \(3, 0\)"):
        net.forward(images(60, 60), offset=(3, 0))
    with pytest.raises(ValueError, match=r"^OverFeat\.dense: x must have shape \(N, H, W, 3\), got \(1, 40, 40\)"):
        net.dense(images(40, 40)[..., 0])


# Files, and where the regressor starts

@pytest.mark.parametrize("regressor", ["SCR", "PCR"])
def test_an_untrained_regressor_may_answer_with_the_window(regressor):
    spec = Spec(("a", "b", "c"), "tiny", regressor=regressor)
    plain, net = (OverFeat(dataclasses.replace(spec, from_window=on), np.random.default_rng(0)) for on in (False, True))
    bias = net.params["regressor.out.b"]
    assert_array_equal(bias.reshape(-1, 4), [[0, 0, 1, 1]] * (3 if regressor == "PCR" else 1))
    assert_allclose(net.forward(images(33, 33).astype(np.float32))[1][0, 0, 0], bias, atol=0.02)
    plain.params["regressor.out.b"][...] = bias
    for a, b in zip(plain.arrays().values(), net.arrays().values()):
        assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_net_comes_back_as_it_was(tmp_path, dtype):
    net = OverFeat(Spec(("a", "b"), "padded", 0.75, "PCR", 0.1, None, 100.0, 50.0, True), np.random.default_rng(1), dtype)
    overfeat.save(net, tmp_path / "w.npz", {"sizes": [[37, 49]]})
    found, settings = overfeat.load(tmp_path / "w.npz")
    assert found.spec == net.spec and found.dtype == dtype and settings == {"sizes": [[37, 49]]}
    x = images(37, 37).astype(dtype)
    for a, b in zip((*net.dense(x), *net.params.values()), (*found.dense(x), *found.params.values())):
        assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("change, told", [
    ({"model": "retinanet"}, "the weights of 'retinanet'"), ({"spec": {"colour": 1}}, "TypeError"),
    ({"spec": {"table": "slow"}}, "table must be one of"),
    ({"spec": {"k": 10**5}}, "far larger"), ({"spec": {"pool": 0}}, "pool must be at least 1"), ({"spec": {"k": "4"}}, "TypeError"),
    ({"spec": {"scales": [0]}}, "scales must be above 0"), ({"spec": {"scales": "ab"}}, "scales must be above 0"),
    ({"spec": {"scales": [1.0, 2.0]}}, "the largest first"), ({"spec": {"mean": math.nan}}, "mean be finite"), ({"spec": {"std": 0}}, "std above 0"),
    ({"spec": {"std": "x"}}, "TypeError"), ({"spec": {"dropout": 7}}, "dropout must"), ({"spec": {"classes": [1, 2]}}, "different names"),
    ({"spec": {"classes": []}}, "different names"),
    ({"spec": {"width": "x"}}, "TypeError"), ({"spec": {"table": "fast", "width": 1.0}}, "a net of 141,832,066 parameters, far larger"),
    ({"spec": {"table": ["fast"]}}, "table must be one of"), ({"spec": {"table": {}}}, "unhashable"), ({"settings": 3}, "settings 3")])
def test_files_that_hold_no_net_are_refused(tmp_path, change, told):
    net = OverFeat(Spec(("a", "b"), "tiny"), np.random.default_rng(0))
    spec = {**dataclasses.asdict(net.spec), **change.get("spec", {})}
    meta = {"model": "overfeat", "dtype": "float32", "settings": {}, **change, "spec": spec}
    files.write_arrays(tmp_path / "w.npz", net.arrays(), meta)
    with pytest.raises(ValueError, match=rf"^overfeat\.load: .*w\.npz must describe a net of overfeat, got: .*{told}"):
        overfeat.load(tmp_path / "w.npz")
    files.write_arrays(tmp_path / "w.npz", {}, {"model": "overfeat", "spec": dataclasses.asdict(net.spec), "settings": {}})
    with pytest.raises(ValueError, match="w.npz lacks the array"):
        overfeat.load(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError):
        overfeat.load(tmp_path / "none.npz")
