"""Weak supervision of Oquab et al.: frames, scales, the loss through the max, masked pooling, maps of all scales, points and boxes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import BACKENDS, distinct_NHWC, seeds
from tinydet import emulate, proposals, to_numpy, use
from tinydet.gradcheck import check_loss
from tinydet.models import oquab_weak as weak
from tinydet.models.oquab import TABLES, Oquab, Spec, Table
from tinydet.ops import boxes as box_ops, logistic_loss
from tinydet.optim import SGD

# Without padding; window 12, step 4. Two features, two adaptation units: fixture 15
TOY = Table((("conv1", 4, 3, 1, 0, False, (2, 2)), ("conv2", 4, 2, 1, 0, False, (2, 2))), 2, (("fc6", 6), ("fc7", 2)), 2)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setitem(TABLES, "toy", TOY)


def geometry(table="6144", adapt_kernel=1):
    """What masks and combined read of a net, without its 100 million weights."""
    return SimpleNamespace(table=TABLES[table], spec=SimpleNamespace(adapt_kernel=adapt_kernel))


def make(table="small", K=3, seed=0, width=0.25, **more):
    """A float64 net with head "weak", its biases random as well."""
    rng = np.random.default_rng(seed)
    net = Oquab(Spec(tuple("abcdef"[:K]), table, "weak", width, **more), rng, np.float64)
    for name, array in net.params.items():
        if name.endswith(".b"):
            array[...] = rng.normal(0, 0.2, array.shape)
    return net


def picture(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def stretched(a, at):
    """a (n, ...) linear between the middles i + 0.5 of its cells, at the point `at`; beyond the outermost ones their value."""
    t = min(max(at - 0.5, 0), len(a) - 1)
    i = min(int(t), max(len(a) - 2, 0))
    return a[i] + (t - i) * (a[min(i + 1, len(a) - 1)] - a[i])


# Frames and scales (notes, 4.3)

@pytest.mark.parametrize("H, W, side, size", [(20, 40, 40, (20, 40)), (20, 40, 100, (50, 100)), (40, 20, 100, (100, 50)),
                                              (7, 30, 64, (15, 64)), (1, 300, 300, (1, 300)), (1, 9, 27, (3, 27)), (33, 33, 50, (50, 50))])
def test_frame_is_the_definition(H, W, side, size):
    """Enlarged or left alone: linear between pixel middles, to whole grey levels; the mean off; zeros to the right and below."""
    net, image = make(mean=100.0, std=20.0), picture(H, W)
    x, factor, (h, w) = weak.frame(net, image, side)
    assert x.shape == (side, side, 3) and x.dtype == np.float64 and (h, w) == size and factor == side / max(H, W)
    for i, j in [(0, 0), (h // 2, w // 2), (h - 1, 0), (0, w - 1), (h // 3, w - 2)]:
        expected = stretched(stretched(image.astype(float), (i + 0.5) * H / h), (j + 0.5) * W / w)
        assert_allclose(x[i, j] * 20 + 100, expected, rtol=0, atol=1.01)
    outside = x.copy()
    outside[:h, :w] = 0
    assert not outside.any()
    if side == max(H, W):
        assert_array_equal(x[:h, :w], (image - 100.0) / 20)


def test_frame_shrinks_by_averages_and_keeps_a_pixel():
    net, image = make(mean=100.0, std=20.0), np.full((3, 900, 3), 140, np.uint8)
    x, factor, size = weak.frame(net, image, 30)
    assert size == (1, 30) and factor == 1 / 30
    assert_array_equal(x[:1], 2)
    image[:, ::2] = 60
    assert_allclose(weak.frame(net, image, 30)[0][:1], 0, atol=0.2)          # 60 and 140: antialiased
    assert weak.frame(Oquab(net.spec, np.random.default_rng(0)), image, 30)[0].dtype == np.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("H, W, factor, least, size", [(6, 9, 1.5, 1, (9, 14)), (9, 6, 0.7, 1, (6, 4)), (5, 4, 2.8, 1, (14, 11)),
                                                       (8, 8, 0.25, 5, (5, 5)), (1, 3, 2, 1, (2, 6)), (4, 7, 0.01, 1, (1, 1)),
                                                       (5, 8, 1, 1, (5, 8)), (4, 9, 0.5, 3, (3, 5))])
def test_rescaled_is_the_definition(backend, H, W, factor, least, size):
    x, (h, w) = np.random.default_rng(0).standard_normal((2, H, W, 3)), size
    with use(backend) as put:
        y, y32 = (to_numpy(weak.rescaled(put(a), factor, least)) for a in (x, x.astype(np.float32)))
    expected = [[[stretched(stretched(image, (i + 0.5) * H / h), (j + 0.5) * W / w) for j in range(w)] for i in range(h)] for image in x]
    assert_allclose(y, expected, rtol=0, atol=1e-12)
    assert y.dtype == np.float64 and y32.dtype == np.float32
    assert_allclose(y32, expected, rtol=0, atol=2e-6)


@given(H=st.integers(1, 9), W=st.integers(1, 9), factor=st.floats(0.2, 3), seed=seeds)
def test_rescaled_keeps_what_it_must(H, W, factor, seed):
    x = np.random.default_rng(seed).standard_normal((2, H, W, 3))
    assert_array_equal(weak.rescaled(x, 1, 1), x)
    assert_array_equal(weak.rescaled(x, 1.0, min(H, W)), x)
    y = weak.rescaled(x, factor, 1)
    assert y.max() <= x.max() + 1e-12 and y.min() >= x.min() - 1e-12
    assert_allclose(weak.rescaled(np.full_like(x, -2.5), factor, 3), -2.5, rtol=1e-14)
    assert_allclose(weak.rescaled(x[:, ::-1, ::-1], factor, 1), y[:, ::-1, ::-1], rtol=0, atol=1e-12)       # no half pixel off
    assert weak.rescaled(x[:0], factor, 1).shape == (0, *y.shape[1:])


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_training_step_leaves_a_gpu_alone():
    """Scaling and loss copy nothing back; labels and masks come from the host."""
    net, rng = make(), np.random.default_rng(0)
    labels, mask = rng.choice([-1, 0, 1], (2, 3)), rng.random((2, 4, 4, 3)) < 0.7
    x, maps, frame = rng.standard_normal((2, 8, 8, 3)), rng.standard_normal((2, 4, 4, 3)), weak.frame(net, picture(30, 40), 40)[0]
    expected, looked = (weak.rescaled(x, 1.4, 1), *weak.loss(maps, labels, mask)), weak.look(net, frame, (0.7, 1))
    with fake_cupy.installed(), use("cuda") as put:
        x, maps = put(x), put(maps)
        with fake_cupy.no_copies():
            found = weak.rescaled(x, 1.4, 1), *weak.loss(maps, labels, mask)
        for a, b in zip(found, expected):
            assert_allclose(to_numpy(a), b, rtol=1e-12)
        for a, b in zip(weak.look(net.to(put), frame, (0.7, 1)), looked):
            assert_allclose(a, b, rtol=0, atol=1e-12)


# Loss (notes, 4.2)

F = np.array([[[-1, 0.5, 2], [0, 1, -2]], [[-3, -0.5, -1], [-2, -0.5, -4]], [[0.2, 0.1, -0.7], [0.3, 1.5, 0.9]]]).transpose(1, 2, 0)[None]
Y = np.array([[1, -1, -1]])


def computed(backend, maps, labels, mask=None):
    with use(backend) as put:
        value, dmaps, scores = weak.loss(put(maps), labels, mask)
        return float(value), to_numpy(dmaps), to_numpy(scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_and_logistic_loss_of_the_notes(backend):
    """Notes 7, 14.; class 1 ties at cells 1 and 4."""
    value, dmaps, scores = computed(backend, F, Y)
    assert_array_equal(scores, [[2, -0.5, 1.5]])
    assert_allclose(value, 2.302418, rtol=0, atol=5e-7)
    for k, one in enumerate((0.126928, 0.474077, 1.701413)):
        assert_allclose(computed(backend, F[..., k:k + 1], Y[:, k:k + 1])[0], one, rtol=0, atol=5e-7)
    expected = np.zeros((6, 3))
    expected[[2, 1, 4], [0, 1, 2]] = -0.119203, 0.377541, 0.817574
    assert_allclose(dmaps.reshape(6, 3), expected, rtol=0, atol=5e-7)
    assert_array_equal(dmaps.reshape(6, 3) != 0, expected != 0)

    mask = np.ones(F.shape, bool)
    mask.reshape(6, 3)[:, 0] = np.arange(6) == 1
    _, dmaps, scores = computed(backend, F, Y, mask)
    assert_array_equal(scores, [[0.5, -0.5, 1.5]])
    expected[:, 0] = 0, -0.377541, 0, 0, 0, 0
    assert_allclose(dmaps.reshape(6, 3), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_through_the_max_of_the_notes(backend):
    """Notes 7, 15.: FCa and FCb of a net, three cells."""
    net = make("toy", 2, width=1.0)
    head, x = net.parts["head"], np.array([[1.0, 0], [0, 2], [1, 1]]).reshape(1, 3, 1, 2)
    for name, values in (("fca.w", [[1, -1], [0.5, 1]]), ("fca.b", 0), ("fcb.w", [[1, -1], [2, 0.5]]), ("fcb.b", (0, -0.5))):
        head.params[name][...] = values
    with use(backend) as put:
        net.to(put)
        maps, cache = head.forward(put(x))
        value, dmaps, scores = weak.loss(maps, np.array([[1, -1]]))
        dx = to_numpy(head.backward(dmaps, cache))
        found = {name: to_numpy(g).squeeze() for name, g in head.grads.items()}
    assert_allclose(to_numpy(scores), [[5, -0.5]], rtol=0, atol=1e-12)
    assert_array_equal(np.nonzero(to_numpy(dmaps))[1], [1, 1])
    for a, b in ((float(value), 0.480792), (found["fcb.w"], [[-0.006693, 0.377541], [-0.013386, 0.755081]]),
                 (found["fcb.b"], (-0.006693, 0.377541)), (found["fca.w"], [[0, 0], [-0.768467, 0.350769]]),
                 (found["fca.b"], (-0.384234, 0.175385)), (dx[0, :, 0], [[0, 0], [-0.559618, -0.016732], [0, 0]])):
        assert_allclose(a, b, rtol=0, atol=6e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_huge_scores_of_the_notes(backend):
    """Notes 7, 16.; and a class that is ignored."""
    labels = np.array([[1, -1] * 10])
    value, dmaps, _ = computed(backend, np.zeros((1, 2, 3, 20)), labels)
    assert_allclose(value, 13.862944, rtol=0, atol=5e-7)
    assert_array_equal(dmaps[0, 0, 0], -labels[0] / 2)                      # all tie: the first
    assert np.count_nonzero(dmaps) == 20
    for f, y, loss, gradient in ((800, 1, 0, 0), (-800, 1, 800, -1), (800, -1, 800, 1), (-800, -1, 0, 0), (3, 0, 0, 0)):
        value, dmaps, _ = computed(backend, np.full((1, 1, 1, 1), float(f)), np.array([[y]]))
        assert value == loss and dmaps.item() == pytest.approx(gradient, abs=1e-300)


@pytest.mark.parametrize("backend", BACKENDS)
@given(maps=distinct_NHWC(max_side=4, max_C=3), seed=seeds)
def test_properties_of_the_loss(backend, maps, seed):
    """Notes 7, 17."""
    N, h, w, K = maps.shape
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 1], (N, K))
    value, dmaps, scores = computed(backend, maps, labels)
    assert scores.shape == (N, K)                                           # whatever the sides
    assert_array_equal(scores, maps.max((1, 2)))
    assert_array_equal((dmaps != 0).sum((1, 2)), np.ones((N, K)))
    assert (np.abs(dmaps) < 1 / N).all() and (dmaps * labels[:, None, None] <= 0).all()
    assert_allclose(dmaps.sum((1, 2)) * N, -labels / (1 + np.exp(labels * scores)), rtol=1e-12)
    assert value == pytest.approx(np.logaddexp(0, -labels * scores).sum() / N, rel=1e-12)

    rest = (dmaps != 0) | (rng.random(maps.shape) < 0.5)                    # without cells that did not win
    without, dwithout, _ = computed(backend, maps, labels, rest)
    assert without == value
    assert_array_equal(dwithout, dmaps)

    moved = maps.copy()                                                     # another class moves
    moved[..., 0] += 10
    assert_array_equal(computed(backend, moved, labels)[1][..., 1:], dmaps[..., 1:])
    with use(backend) as put:
        check_loss(lambda maps: weak.loss(maps, labels)[:2], [maps], put=put)


def test_loss_refuses_what_the_ops_refuse():
    with pytest.raises(ValueError, match=r"^logistic_loss\.loss: labels must be -1, 0 or 1"):
        weak.loss(F, np.array([[2, 0, 0]]))
    with pytest.raises(ValueError, match=r"^global_max_pool\.forward: mask must have shape"):
        weak.loss(F, Y, np.ones((1, 1, 3, 3), bool))


# Masked pooling (notes, 4.5)

def mask_by_definition(centres, boxes, labels, K):
    """Of one frame: centres (h,), (w,) in its pixels."""
    h, w = map(len, centres)
    found = np.zeros((h, w, K), bool)
    for k in range(K):
        for i, j in np.ndindex(h, w):
            y, x = centres[0][i], centres[1][j]
            found[i, j, k] = any(x1 <= x <= x2 and y1 <= y <= y2 for (x1, y1, x2, y2), label in zip(boxes, labels) if label == k)
        if not found[..., k].any():
            found[..., k] = True
    return found


@pytest.mark.parametrize("table, adapt_kernel, side, factor, cells, first, step", [
    ("6144", 1, 500, 1, 9, 111, 32), ("6144", 3, 500, 1.4, 15, 111, 32), ("6144", 1, 500, 0.3, 1, 111, 32), ("small", 1, 64, 1.4, 8, 16, 8),
    ("small", 3, 64, 1, 5, 16, 8)])
def test_masks_are_the_definition(table, adapt_kernel, side, factor, cells, first, step):
    rng, K = np.random.default_rng(0), 4
    scale = max(factor * side, TABLES[table].window) // 1 / side if factor != 1.4 else math.floor(1.4 * side + 0.5) / side
    centres = [(step * i + first) / scale for i in range(cells)]
    boxes, labels = [], []
    for count in (0, 1, 5):
        corner = rng.uniform(-0.1, 0.7, (count, 2)) * side
        boxes.append(np.concatenate([corner, corner + rng.uniform(0.02, 0.4, (count, 2)) * side], 1))
        labels.append(rng.integers(0, K - 1, count))                        # the last class has none
    found = weak.masks(geometry(table, adapt_kernel), side, factor, (cells, cells), boxes, labels, K)
    assert found.dtype == bool and found.shape == (3, cells, cells, K)
    for n in range(3):
        assert_array_equal(found[n], mask_by_definition((centres, centres), boxes[n], labels[n], K))
    assert found[0].all() and found[..., -1].all()
    assert cells == 1 or not found[2].all()


def test_masks_at_the_border():
    """Cell centres of the notes, 7, 21.: 111 and 367 at scale 1; on the border of a box counts."""
    def cells(*box, factor=1, n=9):
        found = weak.masks(geometry(), 500, factor, (n, n), [np.array([box], float)], [np.array([0])], 1)[0, ..., 0]
        return None if found.all() else [tuple(at) for at in np.argwhere(found).tolist()]

    assert cells(111, 111, 130, 130) == [(0, 0)]
    assert cells(80, 80, 111, 111) == [(0, 0)]
    assert cells(111.01, 80, 130, 142) is None and cells(80, 80, 142, 110.99) is None           # no centre inside: everywhere
    assert cells(367, 111, 400, 143) == [(0, 8), (1, 8)]                                        # x across, y down
    assert cells(39.642, 451.071, 39.643, 451.072, factor=2.8, n=37) == [(36, 0)]               # 111 / 2.8, 1263 / 2.8
    assert cells(39.643, 0, 51, 500, factor=2.8, n=37) is None


def test_gradient_stays_in_the_boxes():
    boxes, labels = [np.array([[14.0, 22, 34, 26]]), np.zeros((0, 4))], [np.array([1]), np.array([], int)]
    mask = weak.masks(geometry("small"), 64, 1, (5, 5), boxes, labels, 2)
    assert_array_equal(np.argwhere(mask[0, ..., 1]), [[1, 0], [1, 1], [1, 2]])
    maps = np.random.default_rng(0).standard_normal((2, 5, 5, 2))
    maps[0, 4, 4, 1] = 9                                                    # the largest, outside
    _, dmaps, scores = weak.loss(maps, np.array([[-1, 1], [1, -1]]), mask)
    assert scores[0, 1] == maps[0, 1, :3, 1].max()
    assert_array_equal(scores[1], maps[1].max((0, 1)))
    assert (dmaps[~mask] == 0).all() and np.count_nonzero(dmaps) == 4


# Test (notes, 4.4)

@pytest.mark.parametrize("backend", BACKENDS)
def test_look_is_the_net_at_every_scale(backend):
    net, scales = make(adapt_kernel=3), (0.5, 0.7, 1.4)
    x, _, _ = weak.frame(net, picture(40, 56), 56)
    with use("numpy"):
        expected = [net.forward(weak.rescaled(x[None], factor, 32))[0][0] for factor in scales]
    with use(backend) as put:
        maps = weak.look(net.to(put), x, scales)
    assert [m.shape for m in maps] == [(1, 1, 3), (1, 1, 3), (6, 6, 3)]      # 28 is below the window: 32
    for a, b in zip(maps, expected):
        assert isinstance(a, np.ndarray) and a.dtype == np.float64
        assert_allclose(a, b, rtol=0, atol=1e-12)
    single = Oquab(net.spec, np.random.default_rng(0))
    assert weak.look(single, x.astype(np.float32), (1,))[0].dtype == np.float64
    assert_allclose(weak.scores(maps), np.mean([m.max((0, 1)) for m in expected], 0), rtol=0, atol=1e-12)


def test_six_scales_of_the_notes():
    """Notes 7, 18.: maxima averaged as raw scores; and the maps of 500 pixels."""
    maps = []
    for n, pair in enumerate([(1.2, -3), (2, -1), (0.4, -2), (3.6, -0.5), (-1, -4), (0, -1.5)]):
        m = np.array(pair) - np.random.default_rng(n).uniform(0.1, 5, (n + 1, 2 * n + 1, 2))
        m[n // 2, n] = pair
        maps.append(m)
    assert_allclose(weak.scores(maps), (1.033333, -2), rtol=0, atol=5e-7)
    assert_allclose(logistic_loss.sigmoid(weak.scores(maps)), (0.737562, 0.119203), rtol=0, atol=5e-7)
    assert weak.SCALES == (0.5, 0.7, 1, 1.4, 2, 2.8) and weak.TRAIN_SCALES == (0.7, 1.4)
    zeros = [np.zeros((n, n, 1)) for n in (1, 4, 9, 15, 25, 37)]
    assert weak.combined(geometry(), zeros, weak.SCALES, 500, (2, 3)).shape == (2, 3, 1)


def test_look_without_scales():
    with pytest.raises(ValueError, match=r"^oquab_weak\.look: scales must hold at least one factor, got none"):
        weak.look(make(), np.zeros((32, 32, 3)), ())


# Where (notes, 4.6)

def combined_by_definition(maps, factors, first, step, side, size, align):
    """factors: of each scale, as the frame was really rescaled."""
    found = np.zeros((*size, maps[0].shape[2]))
    for m, factor in zip(maps, factors):
        for i, j in np.ndindex(*size):
            if align == "centres":
                y, x = (((at + 0.5) * factor - first) / step + 0.5 for at in (i, j))            # in cells
            else:
                y, x = ((at + 0.5) * n / side for at, n in zip((i, j), m.shape))
            found[i, j] += stretched(stretched(m, y), x) / len(maps)
    return found


@pytest.mark.parametrize("align", weak.ALIGNMENTS)
@pytest.mark.parametrize("table, adapt_kernel, side, size, scales, cells, factors, first, step", [
    ("small", 1, 64, (30, 64), (0.4, 0.7, 1, 1.4), (1, 2, 5, 8), (0.5, 45 / 64, 1, 90 / 64), 16, 8),
    ("small", 3, 40, (40, 33), (1, 2), (2, 7), (1, 2), 16, 8),
    ("6144", 1, 240, (12, 240), (1, 1.4), (1, 4), (1, 1.4), 111, 32)])
def test_combined_is_the_definition(align, table, adapt_kernel, side, size, scales, cells, factors, first, step):
    maps = [np.random.default_rng(n).standard_normal((n, n, 2)) for n in cells]
    found = weak.combined(geometry(table, adapt_kernel), maps, scales, side, size, align)
    assert found.dtype == np.float64 and found.shape == (*size, 2)
    assert_allclose(found, combined_by_definition(maps, factors, first, step, side, size, align), rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", weak.ALIGNMENTS)
def test_combined_keeps_constants_and_order(align):
    net, scales, rng = geometry("small"), (0.7, 1, 2), np.random.default_rng(0)
    maps = [np.full((n, n, 2), (3.25, -1.5)) for n in (2, 5, 13)]
    assert_allclose(weak.combined(net, maps, scales, 64, (64, 40), align), np.full((64, 40, 2), (3.25, -1.5)), rtol=1e-14)
    maps = [rng.standard_normal(m.shape) for m in maps]
    found = weak.combined(net, maps, scales, 64, (64, 64), align)
    turned = weak.combined(net, [m.transpose(1, 0, 2) for m in maps], scales, 64, (64, 64), align)
    assert_allclose(turned, found.transpose(1, 0, 2), rtol=0, atol=1e-13)
    assert_array_equal(weak.combined(net, maps, scales, 64, (20, 50), align), found[:20, :50])
    assert_allclose(weak.combined(net, maps[::-1], scales[::-1], 64, (64, 64), align), found, rtol=0, atol=1e-13)
    assert (found.max((0, 1)) <= weak.scores(maps) + 1e-12).all()


@pytest.mark.parametrize("factor, cell, x", [(1, 0, 111), (1, 8, 367), (2.8, 0, 39.642857), (2.8, 36, 451.071429)])
def test_cell_centres_of_the_notes(factor, cell, x):
    """Notes 7, 21.: the hot cell's point, within half a pixel; a cell at the border holds out to the frame's border."""
    n = 9 if factor == 1 else 37
    m = np.zeros((n, n, 1))
    m[n // 2, cell] = 1
    found = weak.combined(geometry(), [m], [factor], 500, (500, 500))[..., 0]
    row = found[int((32 * (n // 2) + 111) / factor)]
    peaks = np.flatnonzero(row >= row.max() - 1e-9)
    assert abs((peaks[0] if cell else peaks[-1]) + 0.5 - x) <= 0.5 + 1e-6
    assert peaks[0] == 0 if cell == 0 else peaks[-1] == 499


@pytest.mark.parametrize("align, at", [("centres", (24.5, 32.5)), ("stretch", (18.5, 31.5))])
def test_alignments_differ_where_they_should(align, at):
    """Cell 1 and the middle one of 5 over 64 pixels: 24 and 32 by its centre, 19.2 and 32 by its tile."""
    m = np.zeros((5, 5, 1))
    m[2, 1] = 1
    points, confidences = weak.locate(weak.combined(geometry("small"), [m], [1], 64, (64, 64), align), 1)
    assert_allclose(points[0], at, atol=1.01)
    assert 0.85 < confidences[0] <= 1


@pytest.mark.parametrize("dx, dy", [(4, 0), (0, 8), (12, 4)])
def test_a_shifted_object_moves_the_point(dx, dy):
    """Of a net without padding, at scale 1, by multiples of its step: to the bit."""
    net, rng, found = make("toy", 6, 3, width=1.0, adapt=8), np.random.default_rng(1), []
    thing = rng.integers(0, 256, (9, 7, 3), np.uint8)
    for x, y in ((14, 16), (14 + dx, 16 + dy)):
        image = np.full((48, 60, 3), 115, np.uint8)
        image[y:y + 9, x:x + 7] = thing
        frame, factor, size = weak.frame(net, image, 60)
        maps = weak.look(net, frame, (1,))
        found.append(weak.locate(weak.combined(net, maps, (1,), 60, size), factor))
    (before, sure), (after, _) = found
    seen = sure > maps[0][0, 0] + 1e-6                                      # classes that the object excites
    assert seen.any()
    assert_array_equal((after - before)[seen], np.broadcast_to((dx, dy), before.shape)[seen])
    assert (abs(before[seen] - (17.5, 20.5)) <= (10, 11)).all()            # the object's middle: the window touches it


def test_locate():
    m = np.zeros((3, 5, 3))
    m[1, 4, 0], m[2, 0, 1] = 2, 7
    m[1:, 2, 2] = 5                                                         # a tie: the first
    points, confidences = weak.locate(m, 0.5)
    assert_array_equal(points, [[9, 3], [1, 5], [5, 3]])
    assert_array_equal(confidences, [2, 7, 5])
    points, confidences = weak.locate(np.full((1, 1, 1), -3.0), 2)
    assert_array_equal(points, [[0.25, 0.25]])
    assert points.dtype == np.float64 and confidences == -3


# Boxes

def boxes_by_definition(m, **windows):
    """All that slides over m and has a ring, (x1, y1, x2, y2), with the scores of each class."""
    h, w, _ = m.shape
    found = []
    for box in proposals.windows(w, h, **windows, cut=True):
        x1, y1, x2, y2 = (math.floor(v + 0.5) for v in box)
        if x1 >= x2 or y1 >= y2:
            continue
        cx, cy, half = (x1 + x2) / 2, (y1 + y2) / 2, 1 / math.sqrt(2)
        X1, X2 = (math.floor(cx + s * (x2 - x1) * half + 0.5) for s in (-1, 1))
        Y1, Y2 = (math.floor(cy + s * (y2 - y1) * half + 0.5) for s in (-1, 1))
        inside, ring = [], []
        for i, j in np.ndindex(h, w):
            if x1 <= j < x2 and y1 <= i < y2:
                inside.append(m[i, j])
            elif X1 <= j < X2 and Y1 <= i < Y2:
                ring.append(m[i, j])
        if ring:
            found.append(((x1, y1, x2, y2), np.mean(inside, 0) - np.mean(ring, 0)))
    return found


@pytest.mark.parametrize("H, W", [(9, 13), (12, 7), (1, 6)])
def test_boxes_are_the_definition(H, W):
    m = np.random.default_rng(0).standard_normal((H, W, 2)) - 3
    sides, ratios, step = (0.2, 0.45, 1), (1, 0.5), 0.4
    found, labels, scores = weak.boxes(m, 0.5, (2 * H, 2 * W), sides, ratios, step, threshold=1, limit=10**6)     # nothing suppressed
    slid = boxes_by_definition(m, sizes=[s * max(H, W) for s in sides], ratios=ratios, step=step)
    expected = [(*box, k, score[k]) for box, score in slid for k in range(2) if score[k] > 1e-12]
    assert len(found) == len(expected) > 3
    got = np.column_stack([found / 2, labels, scores])
    assert_allclose(sorted(np.round(got, 9).tolist()), sorted(np.round(expected, 9).tolist()), rtol=0, atol=2e-9)
    assert (np.diff(scores) <= 0).all() and labels.dtype == np.int64 and found.dtype == scores.dtype == np.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_suppress_each_other_by_class(backend):
    m, options = np.random.default_rng(0).standard_normal((12, 15, 3)), dict(sides=(0.2, 0.3, 0.5), ratios=(1, 2), step=0.4)
    rest, expected = list(zip(*weak.boxes(m, 1, (12, 15), **options, threshold=1, limit=10**6))), []
    while rest:
        expected.append(rest.pop(0))
        box, label, _ = expected[-1]
        rest = [r for r in rest if r[1] != label or box_ops.iou(box[None], r[0][None]).item() <= 0.3]
    with use(backend):
        found, few = (weak.boxes(m, 1, (12, 15), **options, **more) for more in (dict(), dict(limit=5)))
    assert 10 < len(expected) < 100 and set(found[1].tolist()) == {0, 1, 2}
    for a, b, c in zip(found, zip(*expected), few):
        assert_array_equal(a, b)
        assert_array_equal(c, a[:5])


def test_boxes_find_bright_blobs():
    """A square, a flat and a tall box, one a class, of several sizes and at the border: IoU of the best at least 0.5; a class without."""
    truth = [(20, 14, 50, 44), (5, 60, 75, 92), (98, 30, 120, 78)]
    m = np.full((96, 120, 4), -2.0)
    for k, (x1, y1, x2, y2) in enumerate(truth):
        m[y1:y2, x1:x2, k] = 1
    m[..., 1:3] += np.random.default_rng(0).normal(0, 0.1, (96, 120, 2))
    found, labels, scores = weak.boxes(m, 1.5, (64, 80))
    for k, box in enumerate(truth):
        best = np.flatnonzero(labels == k)[0]
        assert box_ops.iou(found[best][None], np.array([box]) / 1.5).item() >= 0.5 and scores[best] > 1.5
    assert 3 not in labels and (scores > 0).all() and len(found) <= 300
    assert (found >= 0).all() and (found <= (80, 64, 80, 64)).all()


@given(x=st.integers(0, 40), y=st.integers(0, 30), side=st.integers(8, 24), low=st.floats(-5, 5))
def test_boxes_find_a_square_anywhere(x, y, side, low):
    m = np.full((54, 64, 1), low)
    m[y:y + side, x:x + side] += 0.5
    found, _, scores = weak.boxes(m, 2.0, (27, 32))
    assert box_ops.iou(found[:1], np.array([[x, y, x + side, y + side]]) / 2.0).item() >= 0.5
    assert 0 < scores[0] <= 0.5 + 1e-12


def test_boxes_of_nothing_and_of_all():
    for value in (0.1, -3.7):
        for a in weak.boxes(np.full((30, 40, 3), value), 1, (30, 40)):
            assert len(a) == 0                                              # a constant map: no box stands out, exactly
    found, labels, scores = weak.boxes(np.array([[[0.3, -0.3]]]), 0.5, (2, 2))          # one pixel: no ring at all, the mean inside
    assert_array_equal(found, [[0, 0, 2, 2]])
    assert_array_equal(labels, [0])
    assert_allclose(scores, [0.3], rtol=1e-15)
    m = np.ones((10, 10, 1))
    m[4:6, 4:6] = 2
    assert not (weak.boxes(m, 1, (10, 10), sides=(0.2, 1))[0] == (0, 0, 10, 10)).all(1).any()       # others have a ring
    assert weak.boxes(m[..., :0], 1, (10, 10))[0].shape == (0, 4)


@pytest.mark.parametrize("H, W", [(500, 500), (375, 500), (100, 500), (64, 64)])
def test_boxes_are_not_too_many(H, W):
    count = len(proposals.windows(W, H, [s * max(H, W) for s in weak.SIDES], weak.RATIOS, 0.15, cut=True))
    assert 1000 < count < 20000


# All of it

def coloured(seed, K=2):
    """A 44 x 56 photograph with one square of 14 to 20 pixels, red or blue, in grey noise, away from the border."""
    rng, label = np.random.default_rng(seed), seed % K
    image = rng.integers(100, 131, (44, 56, 3), np.uint8)
    side = int(rng.integers(14, 21))
    x, y = rng.integers(6, (51 - side, 39 - side))
    image[y:y + side, x:x + side] = (210, 40, 40) if label == 0 else (40, 40, 210)
    return image, label, np.array([x, y, x + side, y + side], float)


def test_learns_where_from_what():
    """Names alone train it; the points lie in the objects, also of photographs that it has not seen."""
    rng = np.random.default_rng(0)
    net = Oquab(Spec(("red", "blue"), "small", "weak", 0.5, dropout=0.0), rng)
    optim = SGD(net, 0.9, clip=1.0)
    frames = np.stack([weak.frame(net, coloured(n)[0], 56)[0] for n in range(4)])
    labels, losses = np.array([[1, -1], [-1, 1]] * 2), []
    for _ in range(40):
        x = weak.rescaled(frames, rng.uniform(*weak.TRAIN_SCALES), net.table.window)
        maps, cache = net.forward(x, True, rng)
        value, dmaps, _ = weak.loss(maps, labels)
        net.backward(dmaps, cache)
        optim.step(0.02)
        losses.append(value)
    assert np.mean(losses[-5:]) < 0.1 * losses[0]
    for n in range(4, 8):
        image, label, box = coloured(n)
        frame, factor, size = weak.frame(net, image, 56)
        scales = (1, 1.4, 2, 2.8)
        maps = weak.look(net, frame, scales)
        assert weak.scores(maps).argmax() == label
        point = weak.locate(weak.combined(net, maps, scales, 56, size), factor)[0][label]
        assert (box[:2] - 3 <= point).all() and (point <= box[2:] + 3).all()


# Errors

def test_errors():
    net, zero = geometry("small"), np.zeros((5, 5, 2))
    boxes, labels = [np.zeros((1, 4))], [np.array([0])]
    for call, error, message in [
        (lambda: weak.frame(make(), picture(4, 4), 0), ValueError,
         r"oquab_weak\.frame: side must be at least 1, got 0"),
        (lambda: weak.frame(make(), picture(4, 4) / 1, 32), TypeError, "augment.resize: image must be uint8, got float64"),
        (lambda: weak.frame(make(), picture(0, 4), 32), ValueError, r"augment.resize: image must have shape \(H, W, 3\) and hold a pixel"),
        (lambda: weak.rescaled(zero, 1, 1), ValueError,
         r"oquab_weak\.rescaled: x must have shape \(N, H, W, 3\), got \(5, 5, 2\)"),
        (lambda: weak.rescaled(np.zeros((1, 4, 4, 3)), 0, 1), ValueError,
         r"oquab_weak\.rescaled: factors must be positive and finite, got 0"),
        (lambda: weak.rescaled(np.zeros((1, 4, 4, 3)), np.inf, 1), ValueError,
         r"oquab_weak\.rescaled: factors must .* got inf"),
        (lambda: weak.rescaled(np.zeros((1, 4, 4, 3)), np.nan, 1), ValueError,
         r"oquab_weak\.rescaled: factors must .* got nan"),
        (lambda: weak.masks(net, 64, 1, (5, 4), boxes, labels, 2), ValueError,
         r"oquab_weak\.masks: maps of a frame of 64 pixels at scale 1 must have 5 cells a side, got 4"),
        (lambda: weak.masks(net, 64, 1, (5, 5), boxes, [], 2), ValueError,
         r"oquab_weak\.masks: boxes and labels must be of as many frames, got 1 and 0"),
        (lambda: weak.masks(net, 64, 1, (5, 5), boxes, [np.array([2])], 2), ValueError,
         r"oquab_weak\.masks: labels\[0\] must lie in 0\.\.1, got 2\.\.2"),
        (lambda: weak.masks(net, 64, 1, (5, 5), boxes, [np.array([-1])], 2), ValueError,
         r"oquab_weak\.masks: labels\[0\] must lie in 0\.\.1, got -1"),
        (lambda: weak.masks(net, 64, 1, (5, 5), [np.zeros(4)], labels, 2), ValueError,
         r"oquab_weak\.masks: boxes\[0\] must have shape \(R, 4\)"),
        (lambda: weak.combined(net, [zero], (1,), 64, (9, 9), "corner"), ValueError,
         r"oquab_weak\.combined: align must be one of centres, stretch, got 'corner'"),
        (lambda: weak.combined(net, [zero], (1, 2), 64, (9, 9)), ValueError,
         r"oquab_weak\.combined: there must be a map for each scale, at least one, got 1 and 2"),
        (lambda: weak.combined(net, [], (), 64, (9, 9)), ValueError,
         r"oquab_weak\.combined: there must be .* got 0 and 0"),
        (lambda: weak.combined(net, [zero], (2,), 64, (9, 9)), ValueError,
         r"oquab_weak\.combined: maps .* at scale 2 must have 13 cells a side, got 5"),
        (lambda: weak.combined(net, [zero], (1,), 64, (9, 65)), ValueError,
         r"oquab_weak\.combined: size must lie in the frame of 64 pixels, got \(9, 65\)"),
        (lambda: weak.locate(zero[0], 1), ValueError,
         r"oquab_weak\.locate: map must have shape \(h, w, K\), got \(5, 2\)"),
        (lambda: weak.boxes(zero[0], 1, (5, 5)), ValueError,
         r"oquab_weak\.boxes: map must have shape \(h, w, K\), got \(5, 2\)"),
        (lambda: weak.boxes(zero * np.nan, 1, (5, 5)), ValueError,
         r"oquab_weak\.boxes: map must be finite, got NaN or infinity"),
        (lambda: weak.boxes(zero, 1, (5, 5), step=2), ValueError, r"proposals\.windows: step must be at most 1, got 2"),
    ]:
        with pytest.raises(error, match="^" + message):
            call()
