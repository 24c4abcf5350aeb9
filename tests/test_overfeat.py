"""The OverFeat model: dense evaluation, window geometry, targets, selection, loss, detection, files."""
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import data, evaluate, files, optim, scenes, use
from tinydet.models import overfeat
from tinydet.ops import boxes as box_ops, conv, merge, nms, offset_pool, softmax_loss

SMALL = dict(widths=(4, 5, 6, 7), hidden=8)


def small_net(seed=0, dtype=np.float64, **more):
    """A net of few channels whose every array, running statistics too, is random."""
    spec = overfeat.Spec(**{"classes": ("a", "b", "c"), "scales": (1.0, 0.5), "k": 2, **SMALL, **more})
    rng = np.random.default_rng(seed)
    net = overfeat.OverFeat(spec, rng, dtype)
    for name, array in net.arrays().items():
        array[...] = rng.uniform(0.5, 1.5, array.shape) if name.endswith(("var", "gamma")) else rng.normal(0, 0.3, array.shape)
    return net


# Dense evaluation (overfeat notes, 3.4)

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(32, 32), (36, 44), (52, 40), (16, 16), (16, 20)])
def test_dense_is_the_head_on_every_window_and_the_dilated_head(backend, size):
    net = small_net()
    p, k = net.spec.pool, net.spec.k
    x = np.random.default_rng(1).standard_normal((2, *size, 3))
    with use(backend):
        dense = net.dense(x)
        maps = net.parts["trunk"](x)
        s = offset_pool.forward(maps, p)[0]
        for part, F in zip(("classifier", "regressor"), dense):
            assert F.shape[1:3] == (maps.shape[1] - p * k + 1, maps.shape[2] - p * k + 1)
            first, norm, *_, last = net.parts[part].parts.values()
            hidden = norm(conv.forward(s, first.params["w"], first.params["b"], dilation=p)[0])
            assert_allclose(last(hidden), F, atol=1e-12)
            for r in range(F.shape[1]):
                for c in range(F.shape[2]):
                    block = maps[:, r:r + p * k, c:c + p * k].reshape(2, k, p, k, p, -1).max((2, 4))
                    assert_allclose(net.parts[part](block)[:, 0, 0], F[:, r, c], atol=1e-12)


@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_training_at_an_offset_sees_the_same_windows_as_dense(offset):
    net, x = small_net(), np.random.default_rng(1).standard_normal((1, 44, 36, 3))
    oy, ox = offset
    scores, edges, _ = net.forward(x, offset=offset)
    dense = net.dense(x)
    assert_allclose(scores, dense[0][:, oy::2, ox::2], atol=1e-12)
    assert_allclose(edges, dense[1][:, oy::2, ox::2], atol=1e-12)
    jump, side = net.spec.jump, net.spec.window
    all_windows = overfeat.windows(*dense[0].shape[1:3], jump, side).reshape(*dense[0].shape[1:3], 4)
    coarse = overfeat.windows(*scores.shape[1:3], jump * 2, side, (oy * jump, ox * jump))
    assert_array_equal(coarse.reshape(*scores.shape[1:3], 4), all_windows[oy::2, ox::2])


def test_windows_stand_symmetric_in_the_image():
    """A net with mirrored kernels sees in the mirrored image the mirrored map: no window is off by part of a pixel."""
    net, mirrored = small_net(), small_net()
    for array in mirrored.params.values():
        if array.ndim == 4:
            array[...] = array[:, ::-1].copy()
    x = np.random.default_rng(1).standard_normal((1, 32, 48, 3))
    for F, G in zip(net.dense(x), mirrored.dense(x[:, :, ::-1])):
        assert_allclose(G[:, :, ::-1], F, atol=1e-12)
    grid = overfeat.windows(*net.dense(x)[0].shape[1:3], net.spec.jump, net.spec.window)
    assert grid.min() == 0 and grid[:, 2].max() == 48 and grid[:, 3].max() == 32


def test_an_image_moved_by_the_jump_moves_the_map_by_one():
    net, x = small_net(), np.random.default_rng(1).standard_normal((1, 80, 80, 3))
    a, b = net.dense(x[:, :-4])[0], net.dense(x[:, 4:])[0]
    assert_allclose(a[:, 5:-4, 4:-4], b[:, 4:-5, 4:-4], atol=1e-12)


def test_dense_says_when_no_window_fits():
    with pytest.raises(ValueError, match="OverFeat.dense: x must hold a window of 16 pixels"):
        small_net().dense(np.zeros((1, 12, 40, 3)))


# Windows and targets

def test_edges_of_the_worked_example():
    """overfeat notes 4.2: gt (60, 40, 200, 180), window at r = 2, c = 3 of jump 12, side 221."""
    window, box = np.array([[36., 24, 257, 245]]), np.array([[60., 40, 200, 180]])
    t = overfeat.encode(window, box)
    assert_allclose(t[0], (0.108597, 0.072398, 0.742081, 0.705882), atol=1e-6)
    assert_allclose(overfeat.decode(window, t), box, atol=1e-12)


def test_the_fifty_percent_rule_of_the_worked_example():
    window, box = np.array([[108., 72, 329, 293]]), np.array([[60., 40, 200, 180]])
    seen = box_ops.intersection(window, box)[0, 0] / box_ops.area(box)[0]
    assert seen == pytest.approx(0.5069, abs=1e-4)
    assert overfeat.assign(window, box, np.array([0]), 1, negative=0.1)[2].all()
    assert not overfeat.assign(window, box, np.array([0]), 1, negative=0.1, visible=0.51)[2].any()


@given(st.integers(0, 10 ** 6))
def test_assign_is_the_definition(seed):
    rng = np.random.default_rng(seed)
    grid = overfeat.windows(3, 4, 8, 16)
    boxes = rng.integers(0, 40, (rng.integers(0, 6), 4)).astype(float)
    boxes[:, 2:] += boxes[:, :2] + 1
    names = rng.integers(-1, 3, len(boxes))
    labels, edges, regress = overfeat.assign(grid, boxes, names, background=3)
    for w, label, edge, use_box in zip(grid, labels, edges, regress):
        best, best_iou, seen = None, 0.0, 0.0
        for i, b in enumerate(boxes):
            inter = max(0, min(w[2], b[2]) - max(w[0], b[0])) * max(0, min(w[3], b[3]) - max(w[1], b[1]))
            area = (b[2] - b[0]) * (b[3] - b[1])
            if inter / (256 + area - inter) > best_iou:
                best, best_iou, seen = i, inter / (256 + area - inter), inter / area
        assert label == (names[best] if best_iou >= 0.5 else 3 if best_iou < 0.3 else -1)
        assert use_box == (best_iou >= 0.3 and seen >= 0.5 and names[best] >= 0)
        if use_box:
            assert_allclose(edge * 16 + w[[0, 1, 0, 1]], boxes[best], atol=1e-9)


@given(st.integers(0, 10 ** 6))
def test_select_keeps_positives_and_the_worst_negatives(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 4, rng.integers(1, 120))
    p = rng.random(len(labels))
    drawn, ranks = overfeat.draw(labels, 3, np.random.default_rng(1), most=10)
    other = rng.random(len(labels))                                 # each row of a batch has ranks of its own
    chosen = overfeat.select(np.stack([drawn] * 2), np.stack([ranks] * 2), np.stack([other, p]), 3)[1]
    kept = chosen >= 0
    assert_array_equal(chosen[kept], labels[kept])                  # nothing is relabelled, ignored stays ignored
    positives, negatives = (labels >= 0) & (labels < 3), np.flatnonzero(labels == 3)
    n = min(10, positives.sum())
    assert (kept & positives).sum() == n
    wanted = min(max(8, 3 * n), len(negatives))
    assert (chosen == 3).sum() == wanted
    worst = negatives[np.argsort(p[negatives])][:wanted // 2]       # lowest p(background) = largest 1 - p
    assert (chosen[worst] == 3).all()


# Loss and gradient

def batch(net, seed=0, size=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, size, size, 3))
    targets = [(np.array([[4., 4, 21, 19], [20, 16, 35, 33]]), np.array([0, 2]), np.array([0., 0, size, size])),
               (np.array([[10., 8, 27, 25]]), np.array([1]), np.array([0., 0, size, size]))]
    return x, targets


def total_loss(net, x, targets, offset):
    rng = np.random.default_rng(3)
    scores, edges, cache = net.forward(x, train=True, rng=rng, offset=offset)
    return (*overfeat.loss(net.spec, scores, edges, targets, rng, 0.7, offset), cache)


@pytest.mark.parametrize("offset", [(0, 0), (1, 0)])
def test_gradient_of_the_whole_net(offset):
    net = small_net(dropout=0.3)
    x, targets = batch(net)
    values, dscores, dedges, cache = total_loss(net, x, targets, offset)
    assert values["positives"] >= 3 and values["box_loss"] > 0
    net.backward(dscores, dedges, cache)
    rng, eps, worst = np.random.default_rng(5), 1e-6, 0.0
    for name, w in net.params.items():
        for at in rng.choice(w.size, min(3, w.size), replace=False):
            before = w.flat[at]
            w.flat[at] = before + eps
            up = total_loss(net, x, targets, offset)[0]["loss"]
            w.flat[at] = before - eps
            down = total_loss(net, x, targets, offset)[0]["loss"]
            w.flat[at] = before
            analytic, numeric = net.grads[name].flat[at], (up - down) / (2 * eps)
            assert abs(analytic - numeric) <= 1e-6 * max(1, abs(numeric)), (name, at, analytic, numeric)
            worst = max(worst, abs(numeric))
    assert worst > 1e-3


def test_windows_that_are_not_trained_have_no_gradient():
    net = small_net()
    x, targets = batch(net)
    targets = [(b, n, np.array([0., 0, 20, 40])) for b, n, _ in targets]      # the photograph ends at x = 20
    scores, edges, _ = net.forward(x)
    values, dscores, dedges = overfeat.loss(net.spec, scores, edges, targets, np.random.default_rng(0))
    grid = overfeat.windows(*scores.shape[1:3], 8, 16).reshape(*scores.shape[1:3], 4)
    outside = (grid[..., 0] + 8) > 20
    assert outside.any() and not outside.all() and np.abs(dscores[:, ~outside]).max() > 0
    assert not dscores[:, outside].any() and not dedges[:, outside].any()
    chosen = np.abs(dscores).max(-1) > 0
    assert chosen.sum() <= 2 * (64 + 3 * 64)
    assert_allclose(dscores.sum(-1), 0, atol=1e-12)                 # each row of softmax - onehot sums to 0


def test_images_without_objects_train_the_background_only():
    net = small_net()
    x, _ = batch(net)
    empty = (np.zeros((0, 4)), np.zeros(0, int), np.array([0., 0, 40, 40]))
    scores, edges, _ = net.forward(x)
    values, dscores, dedges = overfeat.loss(net.spec, scores, edges, [empty, empty], np.random.default_rng(0))
    assert values["positives"] == 0 and values["box_loss"] == 0 and not dedges.any()
    assert (dscores[..., 3] <= 0).all() and dscores[..., 3].min() < 0


def test_few_boxes_pull_less_than_a_full_batch():
    net = small_net()
    x, targets = batch(net)
    scores, edges, _ = net.forward(np.concatenate([x] * 4))
    empty = (np.zeros((0, 4)), np.zeros(0, int), np.array([0., 0, 40, 40]))
    many, _, full = overfeat.loss(net.spec, scores, edges, targets * 4, np.random.default_rng(0))
    one = (np.array([[4., 4, 21, 19]]), np.array([0]), np.array([0., 0, 21, 21]))       # a box seen by few windows
    few, _, small = overfeat.loss(net.spec, scores, edges, [one] + [empty] * 7, np.random.default_rng(0))
    grid = overfeat.windows(*scores.shape[1:3], 8, 16)
    answer = overfeat.assign(grid, *one[:2], 3)[2] & ((grid[:, :2] + 8) <= 21).all(1)
    kept = answer.sum()
    assert 0 < kept < 8
    difference = (edges[0].reshape(-1, 4) - overfeat.encode(grid, one[0]))[answer]
    assert few["box_loss"] == pytest.approx((difference ** 2).sum() / 2 / 8)            # divided by the images, not by the kept
    assert_allclose(small[0].reshape(-1, 4)[answer], difference / 8, atol=1e-12)


def steps_on(net, examples, count, lr, size=64, crops=4):
    optimizer, losses = optim.SGD(net, momentum=0.9), []
    for i in range(count):
        rng = np.random.default_rng([7, i])
        images, targets = zip(*(overfeat.training_view(net.spec, examples[j % len(examples)], rng, size) for j in range(crops)))
        scores, edges, cache = net.forward(net.normalise(np.stack(images)), train=True, rng=rng)
        values, dscores, dedges = overfeat.loss(net.spec, scores, edges, targets, rng)
        net.backward(dscores, dedges, cache)
        optimizer.step(lr)
        losses.append(values["loss"])
    return losses


def test_overfits_four_images():
    examples = scenes.scenes(4, seed=5)
    spec = overfeat.spec_for(examples, scenes.CLASSES, widths=(8, 16, 24, 24), hidden=48)
    net = overfeat.OverFeat(spec, np.random.default_rng(0))
    losses = steps_on(net, examples, 250, 0.05, size=96, crops=8)
    assert np.mean(losses[-20:]) < 0.25 * np.mean(losses[:5])
    found = [overfeat.detect(net, e.image()) for e in examples]
    assert evaluate.mean_ap(evaluate.voc(found, examples, scenes.CLASSES)) > 0.9


def test_first_ten_losses_stay_what_they_were():
    """A change of any op, layer, target or draw shows here. Stored from this test; float64, so equal to 1e-6 on any BLAS."""
    examples = scenes.scenes(4, seed=5)
    net = overfeat.OverFeat(overfeat.spec_for(examples, scenes.CLASSES, **SMALL), np.random.default_rng(0), np.float64)
    assert_allclose(steps_on(net, examples, 10, 0.05), FIRST_LOSSES, atol=1e-6)


FIRST_LOSSES = [2.050502167, 1.983667549, 1.900079354, 1.752286734, 1.533388337, 1.490057322, 1.219374019, 1.239798195, 0.866894662,
                0.822516999]


# Training views and specs

def test_boxes_of_training_views_lie_on_what_they_enclose():
    spec = overfeat.Spec(("a",), (0.8, 0.57, 0.4))
    image = np.full((150, 200, 3), 40, np.uint8)
    image[50:100, 70:130] = (250, 250, 250)
    example = data.Example("x", image, (200, 150), np.array([[70., 50, 130, 100]]), np.array([0]), np.array([False]))
    rng, seen = np.random.default_rng(0), 0
    for _ in range(200):
        crop, (boxes, labels, inside) = overfeat.training_view(spec, example, rng, 128)
        assert crop.shape == (128, 128, 3) and crop.dtype == np.uint8 and labels.tolist() == [0]
        x1, y1, x2, y2 = boxes[0]
        if min(x1, y1) < 1 or max(x2, y2) > 127:
            continue
        seen += 1
        ys, xs = np.nonzero((crop[..., 0] > 145) & (crop[..., 2] > 145))
        assert_allclose((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), boxes[0], atol=1.6)
        assert_allclose((boxes[0, 2] - boxes[0, 0]) / 60, (inside[2] - inside[0]) / 200)
    assert seen > 50


def test_views_near_an_object_hold_it():
    spec = overfeat.Spec(("a",), (0.5,))
    example = data.Example("x", np.zeros((1000, 1000, 3), np.uint8), (1000, 1000), np.array([[470., 470, 534, 534]]),
                           np.array([0]), np.array([False]))
    rng = np.random.default_rng(0)
    held = [overfeat.training_view(spec, example, rng, 128, near_object=p)[1][0][0] for p in [1.0] * 40]
    assert all(b.min() >= 0 and b.max() <= 128 for b in held)


def test_difficult_boxes_are_not_trained():
    example = data.Example("x", np.zeros((64, 64, 3), np.uint8), (64, 64), np.array([[5., 5, 30, 30], [30, 30, 60, 60]]),
                           np.array([0, 0]), np.array([True, False]))
    _, (boxes, labels, _) = overfeat.training_view(overfeat.Spec(("a",), (1.0,)), example, np.random.default_rng(0), 64)
    assert len(boxes) == 2 and labels.tolist() == [-1, 0]
    answer, _, regress = overfeat.assign(boxes, boxes, labels, background=1)
    assert answer.tolist() == [-1, 0] and regress.tolist() == [False, True]


def box_examples(sides):
    boxes = np.array([[0, 0, s, s] for s in sides], float).reshape(-1, 4)
    return [data.Example("x", np.zeros((8, 8, 3), np.uint8), (8, 8), boxes, np.zeros(len(boxes), int), np.zeros(len(boxes), bool))]


@given(st.floats(8, 200), st.floats(1, 20))
def test_spec_covers_every_object_size(low, spread):
    sides = np.geomspace(low, low * spread, 400)
    spec = overfeat.spec_for(box_examples(sides), ("a",))
    assert 24 <= spec.window <= 64 and spec.window % 8 == 0
    covered = spec.window / np.array(spec.scales)                   # window sides in pixels of the image
    nearest = np.abs(np.log(sides[5:-5, None] / covered)).min(1)
    assert nearest.max() < np.log(1.4)
    assert sorted(spec.scales, reverse=True) == list(spec.scales)


def test_spec_errors():
    with pytest.raises(ValueError, match="overfeat.spec_for: the training images must hold at least one box, got none"):
        overfeat.spec_for(box_examples([]), ("a",))
    with pytest.raises(ValueError, match="window must be a positive multiple of 8 pixels, got 30"):
        overfeat.spec_for(box_examples([30]), ("a",), 30)


def test_spec_from_known_quantiles():
    spec = overfeat.spec_for(box_examples(np.linspace(50, 150, 101)), ("a",))   # 5 % quantile 55, 0.8 * 55 = 44
    assert spec.window == 40 and len(spec.scales) == 3                          # log(149 / 51) / log(1.4) = 3.2
    assert_allclose(40 / np.array(spec.scales), 51 * (149 / 51) ** (np.array([1, 3, 5]) / 6))
    assert len(overfeat.spec_for(box_examples([3.0, 1100.0] * 50), ("a",)).scales) == 10


def test_spec_warns_of_boxes_too_long_for_a_square():
    example = box_examples([30])[0]
    long = data.Example("x", example.source, example.size, np.array([[0., 0, 90, 30]]), example.labels, example.difficult)
    with pytest.warns(UserWarning, match="1 of 1 boxes are more than 2.25 times as long as wide"):
        overfeat.spec_for([long], ("a",))


# Detection

def windows_of(seed=0, n=60, K=2):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0, 100, (n, 4))
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(5, 40, (n, 2))
    return boxes, softmax_loss.softmax(rng.normal(0, 2, (n, K + 1)))


def test_combine_merges_each_class_for_itself():
    boxes, p = windows_of()
    b, labels, scores = overfeat.combine(boxes, p, min_score=0.2)
    assert (np.diff(scores) <= 0).all()
    for k in (0, 1):
        seen = p[:, k] >= 0.2
        expected = merge.merge(boxes[seen], p[seen, k], 0.5, "count")
        assert scores[labels == k].sum() == pytest.approx(p[seen, k].sum(), abs=1e-9)        # confidence is conserved
        order = np.argsort(-expected[1], kind="stable")
        assert_array_equal(b[labels == k], expected[0][order])
    b, labels, scores = overfeat.combine(boxes, p, "nms", 0.3, min_score=0.2)
    for k in (0, 1):
        seen = p[:, k] >= 0.2
        assert_array_equal(scores[labels == k], p[seen, k][nms.nms(boxes[seen], p[seen, k], 0.3)])


def test_combine_of_nothing_and_errors():
    boxes, p = windows_of()
    for b, labels, scores in (overfeat.combine(boxes, p, min_score=2.0), overfeat.combine(boxes[:0], p[:0])):
        assert b.shape == (0, 4) and labels.shape == scores.shape == (0,)
    assert len(overfeat.combine(boxes, p, limit=3)[0]) == 3
    with pytest.raises(ValueError, match="overfeat.combine: merging must be merge or nms, got 'soft'"):
        overfeat.combine(boxes, p, "soft")


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (33, 21), (200, 150)])
def test_detect_takes_images_of_any_size(size):
    net = small_net(dtype=np.float32)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    boxes, labels, scores = overfeat.detect(net, image)
    assert boxes.shape == (len(scores), 4) and len(labels) == len(scores)
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= size[1]).all() and (boxes[:, [1, 3]] <= size[0]).all()
    assert (box_ops.area(boxes) > 0).all()


def test_look_gives_boxes_in_pixels_of_the_image():
    """With a regressor that answers (0, 0, 1, 1) each window gives itself: they tile the image and half a window around it."""
    net = small_net(dtype=np.float32)
    last = list(net.parts["regressor"].parts.values())[-1]
    last.params["w"][...], last.params["b"][...] = 0, (0, 0, 1, 1)
    boxes, p = overfeat.look(net, np.zeros((60, 80, 3), np.uint8), 0.5)
    side = net.spec.window / 0.5
    assert_allclose(boxes[:, 2] - boxes[:, 0], side)
    assert_allclose((boxes[:, 0].min(), boxes[:, 1].min()), -side / 2)
    assert_allclose((boxes[:, 2].max(), boxes[:, 3].max()), (80 + side / 2, 60 + side / 2), atol=net.spec.jump / 0.5)
    assert len(p) == len(boxes) and np.allclose(p.sum(1), 1)


# Files

def test_saved_and_loaded_net_detects_the_same(tmp_path):
    net = small_net(dtype=np.float32)
    overfeat.save(net, tmp_path / "w.npz", {"merging": "nms", "cut": {"a": 0.5}})
    other, settings = overfeat.load(tmp_path / "w.npz")
    assert other.spec == net.spec and settings == {"merging": "nms", "cut": {"a": 0.5}}
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    for a, b in zip(overfeat.detect(net, image), overfeat.detect(other, image)):
        assert_array_equal(a, b)


def test_files_that_hold_no_net_are_refused(tmp_path):
    path, net = tmp_path / "w.npz", small_net(dtype=np.float32)
    good = {"model": "overfeat", "spec": {"classes": ["a"], "scales": [1.0]}, "settings": {}}
    for arrays, meta, message in (
            ({}, {"steps": 3}, "must describe a net of overfeat"),
            ({}, {**good, "model": "retinanet"}, "must describe a net of overfeat, got: .*the weights of 'retinanet'"),
            ({}, {**good, "spec": {"colour": 3}}, "must describe a net of overfeat"),
            *(({}, {**good, "spec": {**good["spec"], **wrong}}, "must describe a net of overfeat, got: " + told) for wrong, told in (
                ({"hidden": 10**8}, ".*far larger than the file's arrays"), ({"k": 10**5}, ".*far larger"), ({"pool": 0}, ".*pool must be at least 1"),
                ({"jump": -1}, ".*jump must"), ({"widths": [1, 2, 3]}, ".*four widths"), ({"widths": [1, 2, 3, 0]}, ".*width 3 must"),
                ({"scales": [0]}, ".*scales above 0"), ({"scales": "ab"}, ".*scales above 0"), ({"mean": math.nan}, ".*mean be finite"),
                ({"std": 0}, ".*std above 0"), ({"std": "x"}, "TypeError"), ({"dropout": 7}, ".*dropout must"), ({"classes": [1, 2]}, ".*different names"),
                ({"classes": ["a", "a"]}, ".*different names"), ({"classes": []}, ".*different names"))),
            (net.arrays(), good, r"w.npz: \S+ must have shape"),
            ({}, good, "w.npz lacks the array")):
        files.write_arrays(path, arrays, meta)
        with pytest.raises(ValueError, match=message):
            overfeat.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        overfeat.load(tmp_path / "none.npz")
