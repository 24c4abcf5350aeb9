"""RetinaNet: its net, what anchors must answer, the losses as they train it, and detection."""
import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import RUNNING
from tinydet import augment, emulate, evaluate, files, optim, scenes, to_numpy, use
from tinydet.layers import BatchNorm, fold
from tinydet.models import retinanet
from tinydet.models.retinanet import RetinaNet, Spec, Table, Targets
from tinydet.ops import ap_loss, boxes as box_ops, nms
from tinydet.summary import summary

EXAMPLES = scenes.scenes(4, seed=5)
SPEC = Spec(scenes.CLASSES, mean=(118.0,) * 3, std=(60.0,) * 3)
TINY = Table((4, 6, 8, 8, 10), (), 8, 2, 7, None)                       # as "small", but with the levels up to 7
TINY_RESNET = Table((4, 2, 3, 3, 4), (2, 1, 2, 1), 6, 1, 6)
RANKING = ("ap", "auc", "smooth_ap")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(retinanet.TABLES, "small", TINY)
    monkeypatch.setitem(retinanet.TABLES, "resnet50", TINY_RESNET)


def make(dtype=np.float64, pretrained=False, **changed):
    return RetinaNet(Spec(**{**vars(SPEC), **changed}), np.random.default_rng(0), dtype, pretrained)


def given(net, count=2, height=72, width=88):
    """x and the targets of the first examples."""
    views = [retinanet.training_view(net.spec, e, np.random.default_rng(k), height, width, "mirror") for k, e in enumerate(EXAMPLES[:count])]
    boxes = retinanet.anchors(net.spec, height, width)
    targets = [retinanet.label(net.spec, boxes, b, labels % net.spec.background, difficult) for _, b, labels, difficult in views]
    return net.normalise(np.stack([v[0] for v in views])), targets


def empty(net, height, width):
    return retinanet.label(net.spec, retinanet.anchors(net.spec, height, width), np.zeros((0, 4)), np.zeros(0, np.int64))


# The net

def test_the_small_net_has_about_half_a_million_parameters():
    assert 300_000 < summary(make(np.float32), (1, 64, 64, 3)).params < 600_000


@pytest.mark.parametrize("height, width", [(72, 88), (37, 50), (1, 1), (33, 130)])
@pytest.mark.parametrize("table", ["small", "resnet50"])
def test_every_size_of_image_gives_a_score_for_every_anchor(tiny, table, height, width):
    net = make(np.float32, table=table)
    scores, deltas, cache = net.forward(np.zeros((2, height, width, 3), np.float32))
    A = len(retinanet.anchors(net.spec, height, width))
    assert A == 6 * sum(-(-height // s) * -(-width // s) for s in (2 ** k for k in net.spec.levels))
    assert scores.shape == (2, A, 6) and deltas.shape == (2, A, 4) and scores.dtype == deltas.dtype == np.float32
    assert cache[2][0][1] == [(2, h, w, 36) for h, w in retinanet.cells(net.spec, height, width)]
    net.backward(scores, deltas, cache)
    assert net.grads["regressor.layer.out.b"].shape == (24,)


@pytest.mark.parametrize("prior", [0.01, 0.5])
def test_an_untrained_net_gives_the_prior(tiny, prior):
    net = make(prior=prior)
    scores, deltas, _ = net.forward(given(net)[0], True)
    assert abs(np.median(1 / (1 + np.exp(-scores))) - prior) < 0.1 * prior and np.median(abs(deltas)) < 0.1


def test_shared_heads_are_separate_runs_and_rows_are_anchors(tiny):
    """Row (i * w + j) * 6 + a of a level is anchor a of cell (i, j), classes fastest (notes, sec. 1.2)."""
    net = make()
    x, _ = given(net)
    scores, deltas, _ = net.forward(x)
    levels = net.parts["pyramid"](net.parts["backbone"](x)[2:])
    first = 0
    for level, (h, w) in zip(levels, retinanet.cells(net.spec, 72, 88), strict=True):
        s, d = (net.parts[name].parts["layer"](level) for name in ("classifier", "regressor"))
        assert_allclose(scores[:, first:first + 6 * h * w], s.reshape(2, -1, 6), rtol=1e-12)
        i, j, a, k = h - 1, w // 2, 4, 3
        row = first + (i * w + j) * 6 + a
        assert scores[1, row, k] == s[1, i, j, a * 6 + k] and deltas[1, row, 2] == d[1, i, j, a * 4 + 2]
        first += 6 * h * w
    assert first == scores.shape[1]


def test_the_pyramid_by_hand():
    pyramid = retinanet.Pyramid((2, 2, 2), 2, 7, np.random.default_rng(0), np.float64)
    for w in (leaf.params["w"] for leaf in pyramid.leaves().values() if leaf.params):
        w[...] = 0
        w[w.shape[0] // 2, w.shape[1] // 2] = np.eye(2)                 # every convolution hands its pixel on
    rng = np.random.default_rng(1)
    c3, c4, c5 = (rng.standard_normal((1, *side, 2)) for side in ((5, 7), (3, 4), (2, 2)))
    p3, p4, p5, p6, p7 = pyramid([c3, c4, c5])
    m4 = c4 + c5.repeat(2, 1).repeat(2, 2)[:, :3, :4]
    assert_allclose(p5, c5)
    assert_allclose(p4, m4)
    assert_allclose(p3, c3 + m4.repeat(2, 1).repeat(2, 2)[:, :5, :7])
    assert_allclose(p6, c5[:, ::2, ::2])
    assert_allclose(p7, p6.clip(0))


def test_pretrained_freezes_what_the_paper_freezes(tiny):
    net = make(table="resnet50", pretrained=True)
    frozen = {k for k in net.params if k not in net.trained}
    norms = {f"{name}.{k}" for name, leaf in net.leaves().items() if isinstance(leaf, BatchNorm) for k in leaf.params}
    assert frozen == norms | {k for k in net.params if k.startswith(("backbone.C1.", "backbone.C2."))} and len(norms) == 2 * 23
    x, targets = given(net)
    before = {k: v.copy() for k, v in net.arrays().items()}
    scores, deltas, cache = net.forward(x, True)
    _, dscores, ddeltas = retinanet.loss(scores, deltas, targets, "focal")
    net.backward(dscores, ddeltas, cache)
    assert all(g.any() != (k in frozen) for k, g in net.grads.items())
    optim.SGD(net, 0.9, 1e-4).step(0.01)
    state = {k for leaf, part in net.leaves().items() for k in (f"{leaf}.{s}" for s in part.state)}
    for k, v in net.arrays().items():
        assert np.array_equal(v, before[k]) == (k in frozen | state), k
    assert set(make(table="resnet50").trained) == set(net.params)


@pytest.mark.parametrize("first", [True, False])
def test_where_a_block_halves_the_map(tiny, first):
    net = make(table="resnet50", stride_first=first)
    block = net.parts["backbone"].parts["C3"].parts["0"].parts["sum"]
    assert [block.parts["branch"].parts[f"conv{k}"].stride for k in (1, 2, 3)] == ([2, 1, 1] if first else [1, 2, 1])
    assert block.parts["shortcut"].parts["conv"].stride == 2
    C2, C3 = (net.parts["backbone"].parts[k].parts for k in ("C2", "C3"))
    assert set(C2) == {"pool", "0", "1"} and set(C3) == {"0"} and "shortcut" not in C2["1"].parts["sum"].parts


def test_folded_nets_answer_the_same(tiny):
    for table in ("small", "resnet50"):
        net = make(table=table)
        x, _ = given(net)
        net.forward(x, True)                                            # averages that are not 0 and 1
        for a, b in zip(net.forward(x)[:2], fold(net).forward(x)[:2]):
            assert_allclose(b, a, rtol=1e-9, atol=1e-9)


# Anchors and labels

def test_anchors_by_hand():
    found = retinanet.anchors(SPEC, 240, 320)
    assert found.shape == (6 * (30 * 40 + 15 * 20 + 8 * 10 + 4 * 5), 4) and found.dtype == np.float64
    root = 2 ** 0.5
    sizes = [(32 * root, 32 / root), (64, 32), (32, 32), (32 * root, 32 * root), (32 / root, 32 * root), (32, 64)]
    for a, (w, h) in enumerate(sizes):
        assert_allclose(found[(3 * 40 + 5) * 6 + a], [44 - w / 2, 28 - h / 2, 44 + w / 2, 28 + h / 2], rtol=1e-12)
    assert_allclose(found[-4], [288 - 128, 224 - 128, 288 + 128, 224 + 128], rtol=1e-12)
    assert_allclose(box_ops.area(found[:6]).reshape(3, 2), [[32 ** 2, 2 * 32 ** 2]] * 3)
    one = retinanet.anchors(Spec(("a",), side=2.0, octaves=(1.0,), ratios=(4.0,)), 8, 9)
    assert_allclose(one[:2], [[0, -12, 8, 20], [8, -12, 16, 20]])


def test_labels_by_hand():
    boxes, names = np.array([[0, 0, 10, 10], [100, 100, 110, 110], [300, 300, 310, 310.]]), np.array([2, 0, 1])
    anchors = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 10, 4], [0, 0, 10, 3.9], [200, 0, 210, 10],
                        [100, 100, 110, 103], [100, 107, 110, 110], [100, 100, 110, 102]])
    t = retinanet.label(SPEC, anchors, boxes, names)
    assert t.labels.tolist() == [2, 2, -1, -1, 6, 6, 0, 0, 6]           # >= 0.5, [0.4, 0.5) and below; two tie at 0.3, the best of object 1
    held = [0, 1, 6, 7]                                                 # nothing is forced by object 2, which meets no anchor
    expected = box_ops.encode(anchors[held], boxes[[0, 0, 1, 1]]) / (0.1, 0.1, 0.2, 0.2)
    assert_allclose(t.deltas[held], expected, rtol=1e-12)
    assert not np.delete(t.deltas, held, 0).any()
    assert t.labels.dtype == np.int64 and t.deltas.dtype == np.float64
    assert retinanet.label(SPEC, anchors, boxes, names, positive=0.6, negative=0.3).labels.tolist() == [2, -1, -1, -1, -1, 6, 0, 0, 6]


def test_a_forced_anchor_answers_with_the_object_it_overlaps_most():
    boxes, names = np.array([[0, 0, 10, 10], [0, 8, 10, 16.]]), np.array([3, 4])
    anchors = np.array([[0, 0, 10, 10], [0, 5, 10, 10.5]])              # IoU with object 1: 2/16 and 2.5/11; the second's with 0: 5/10.5
    t = retinanet.label(SPEC, anchors, boxes, names)
    assert t.labels.tolist() == [3, 3]
    assert_allclose(t.deltas[1], box_ops.encode(anchors[1:], boxes[:1])[0] / (0.1, 0.1, 0.2, 0.2))
    same = np.array([[0, 0, 10, 10], [0, 0, 10, 10.]])
    assert retinanet.label(SPEC, same[:1], same, np.array([5, 1])).labels.tolist() == [5]           # of equals the first


def test_ties_do_not_hang_on_the_last_bit():
    """Anchors of one area that hold a small object whole overlap it alike, whatever their shape and place."""
    anchors, bits = retinanet.anchors(SPEC, 64, 64), False
    for centre in (8.0, 20.0, 31.0):
        box = np.array([[centre - 10 / 3, centre - 10 / 3, centre + 10 / 3, centre + 10 / 3]])
        overlap = box_ops.iou(anchors, box)[:, 0]
        tied = np.isclose(overlap, overlap.max(), rtol=1e-9, atol=0)
        assert_array_equal(retinanet.label(SPEC, anchors, box, np.array([0])).labels == 0, tied)
        assert tied.sum() > 5
        bits |= (overlap == overlap.max()).sum() < tied.sum()
    assert bits                                                         # they differ in the last


def test_difficult_objects_are_ignored():
    boxes, names = np.array([[0, 0, 10, 10], [0, 6, 10, 16.]]), np.array([2, 0])
    anchors = np.array([[0, 0, 10, 10], [0, 6, 10, 16], [0, 6, 10, 10], [0, 11, 10, 16], [0, 13, 10, 16.]])
    t = retinanet.label(SPEC, anchors, boxes, names, np.array([False, True]))
    assert t.labels.tolist() == [2, -1, -1, -1, 6]
    assert retinanet.label(SPEC, anchors, boxes[:1], names[:1]).labels.tolist() == [2, 6, -1, 6, 6]
    near = np.array([[0, 0, 10, 10], [0, 1, 10, 11.]])                  # what holds an object answers with it, whatever else is near
    assert retinanet.label(SPEC, anchors[:1], near, names, np.array([False, True])).labels.tolist() == [2]
    assert retinanet.label(SPEC, anchors[:1], near[::-1], names[::-1], np.array([True, False])).labels.tolist() == [2]
    every = retinanet.label(SPEC, anchors, boxes, names, np.array([True, True]))
    assert every.labels.tolist() == [-1, -1, -1, -1, 6] and not every.deltas.any()


@pytest.mark.parametrize("difficult, error, got", [(np.array([1]), TypeError, "int64"), ([1], TypeError, "int64"), (np.array([True, False]), ValueError, r"shape \(2,\)")])
def test_wrong_difficult_is_named(difficult, error, got):
    box = np.array([[0, 0, 5, 5.0]])
    with pytest.raises(error, match=rf"^retinanet\.label: difficult must be 1 booleans, got {got}$"):
        retinanet.label(retinanet.Spec(("a",)), box, box, np.array([0]), difficult)


def test_labels_without_objects_or_anchors():
    none = np.zeros((0, 4)), np.zeros(0, np.int64)
    assert retinanet.label(SPEC, np.array([[0, 0, 5, 5.]]), *none).labels.tolist() == [6]
    one = retinanet.label(SPEC, np.array([[0, 0, 5, 5.]], np.float32), np.array([[0, 0, 5, 6.]], np.float32), np.array([1], np.uint8))
    assert one.labels.tolist() == [1] and one.deltas.dtype == np.float64
    assert len(retinanet.label(SPEC, none[0], np.array([[0, 0, 5, 5.]]), np.array([1]), np.array([False])).labels) == 0


@pytest.mark.parametrize("boxes, labels, error, message", [
    (np.array([[0, 0, np.nan, 1]]), np.array([0]), ValueError, "boxes must be finite"),
    (np.zeros((1, 5)), np.array([0]), ValueError, r"boxes must have shape \(R, 4\)"),
    (np.zeros((1, 4)), np.array([6]), ValueError, r"labels must lie in 0\.\.5, got 6\.\.6"),
    (np.zeros((1, 4)), np.array([-1]), ValueError, "labels must lie in"),
    (np.zeros((1, 4)), np.array([0.0]), TypeError, "labels must be integers"),
    (np.zeros((1, 4)), np.array([0, 1]), ValueError, r"labels must have shape \(1,\)")])
def test_wrong_objects_are_named(boxes, labels, error, message):
    with pytest.raises(error, match=rf"^retinanet\.label: {message}"):
        retinanet.label(SPEC, np.array([[0, 0, 5, 5.]]), boxes, labels)


# Losses

def targets_of(*labels):
    return [Targets(np.array(v), np.zeros((len(v), 4))) for v in labels]


def test_entries_and_the_ap_loss_of_the_notes():
    """Fixture E7: two images, two anchors, two classes, ranked together."""
    scores = np.array([[[0.2, -0.3], [-0.5, 0.4]], [[0, 0], [-1, 0.1]]])
    targets = targets_of([0, -1], [1, 2])
    assert retinanet.entries(np.array([[0, -1], [1, 2]]), 2).reshape(-1).tolist() == [1, 0, -1, -1, 0, 1, 0, 0]
    values, dscores, ddeltas = retinanet.loss(scores, np.zeros((2, 2, 4)), targets, "ap")
    assert values["loss"] == values["class_loss"] == pytest.approx(34 / 75, rel=1e-12) and values["positives"] == 2 and not ddeltas.any()
    assert_allclose(dscores.reshape(-1), [-11 / 50, 13 / 120, 0, 0, 49 / 300, -7 / 30, 0, 109 / 600], rtol=1e-12, atol=1e-15)


def test_per_image_ranks_each_image_alone():
    """Fixture E5: both images in order, their scores shifted."""
    scores, deltas, targets = np.array([[[4.0], [2]], [[0], [-2]]]), np.zeros((2, 2, 4)), targets_of([0, 1], [0, 1])
    pooled, g, _ = retinanet.loss(scores, deltas, targets, "ap", delta=0.5)
    assert pooled["loss"] == pytest.approx(1 / 6)
    assert_allclose(g.reshape(-1), [0, 1 / 6, -1 / 6, 0], rtol=1e-12, atol=1e-15)
    alone, g, _ = retinanet.loss(scores, deltas, targets, "ap", per_image=True, delta=0.5)
    assert alone["loss"] == 0 and not g.any()
    x = np.random.default_rng(0).standard_normal((3, 5, 2))
    answers = targets_of([0, 1, 2, 2, 2], [2, 2, 2, -1, 2], [1, 1, 2, 2, 0])
    for name in retinanet.LOSSES:
        whole, g, _ = retinanet.loss(x, np.zeros((3, 5, 4)), answers, name, per_image=True)
        each = [retinanet.loss(x[n:n + 1], np.zeros((1, 5, 4)), answers[n:n + 1], name) for n in range(3)]
        assert whole["loss"] == pytest.approx(np.mean([v["loss"] for v, _, _ in each]), rel=1e-12)
        assert_allclose(g, np.concatenate([d for _, d, _ in each]) / 3, rtol=1e-12)


@pytest.mark.parametrize("backend", RUNNING)
def test_cross_entropy_mines_three_to_one(backend):
    scores = np.array([0.5, -1, 2, 0, 1, 1, -3, 4.0, 9]).reshape(1, 9, 1)
    answers = np.array([1, 0, 1, 1, 1, 1, 1, 1, -1])                    # one object at score -1; 1 is the background; the last is ignored
    with use(backend) as put:
        value, g = retinanet.LOSSES["ce"](put(scores), put(retinanet.entries(answers, 1).reshape(1, 9, 1)))
        value, g = float(value), to_numpy(g).reshape(-1)
    hard = [7, 2, 4]                                                    # of scores 4, 2, 1: the first of the two at 1
    assert value == pytest.approx(np.log1p(np.exp(1)) + np.log1p(np.exp(scores.reshape(-1)[hard])).sum(), rel=1e-12)
    expected = np.zeros(9)
    expected[hard], expected[1] = 1 / (1 + np.exp(-scores.reshape(-1)[hard])), -1 / (1 + np.exp(-1))
    assert_allclose(g, expected, rtol=1e-12)
    value, g = retinanet.LOSSES["ce"](scores, np.zeros(scores.shape, np.int8))
    assert value == 0 and not g.any()


def test_the_box_loss_is_the_mean_over_four_numbers_of_the_anchors_that_hold_an_object():
    deltas = np.array([[[0.5, 3, 0, 0], [9, 9, 9, 9]], [[0, 0, 0, -0.5], [7, 7, 7, 7]]])
    values, _, g = retinanet.loss(np.zeros((2, 2, 1)), deltas, targets_of([0, 1], [0, -1]), "focal", box_weight=2.0)
    assert values["box_loss"] == pytest.approx((0.125 + 2.5 + 0.125) / 8) and values["positives"] == 2
    assert values["loss"] == pytest.approx(values["class_loss"] + 2 * values["box_loss"])
    assert_allclose(g.reshape(-1), np.array([0.5, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, -0.5, 0, 0, 0, 0]) * 2 / 8)


class Whole:
    """A net in float64 off its kinks, and its loss on two images."""

    def __init__(self, name, table, train):
        self.name, self.train, self.net = name, train, make(table=table, classes=("a", "b"), prior=0.2)
        rng = np.random.default_rng(3)
        for leaf in self.net.leaves().values():
            for a in leaf.arrays().values() if isinstance(leaf, BatchNorm) else ():
                a[...] = rng.uniform(0.5, 1.5, a.shape)
        for k in ("classifier", "regressor"):
            self.net.params[f"{k}.layer.out.w"][...] *= 30              # scores and boxes that differ
        self.x, self.targets = given(self.net, 2, 40, 56)
        self.averages = {k: v.copy() for k, v in self.net.state.items()}
        scores, deltas, cache = self.net.forward(self.x, train)
        self.values, dscores, ddeltas = retinanet.loss(scores, deltas, self.targets, name)
        self.net.backward(dscores, ddeltas, cache)
        assert self.values["box_loss"] > 0.1 and self.values["positives"] > 5

    def loss(self):
        for k, v in self.net.state.items():
            v[...] = self.averages[k]
        scores, deltas, _ = self.net.forward(self.x, self.train)
        return retinanet.loss(scores, deltas, self.targets, self.name)[0]["loss"]

    def slope(self, direction, eps=1e-7):
        """Central difference along directions, a dict of arrays by parameter."""
        kept, found = {k: self.net.params[k].copy() for k in direction}, []
        for side in (eps, -eps):
            for k, d in direction.items():
                self.net.params[k][...] = kept[k] + side * d
            found.append(self.loss())
        for k, w in kept.items():
            self.net.params[k][...] = w
        return (found[0] - found[1]) / (2 * eps)


@pytest.mark.parametrize("table, train", [("small", True), ("resnet50", False)])
def test_gradient_of_every_layer(tiny, table, train):
    """Central differences along the gradient of every layer that holds parameters."""
    whole = Whole("focal", table, train)
    for name, leaf in whole.net.leaves().items():
        length = np.sqrt(sum((g * g).sum() for g in leaf.grads.values()))
        if leaf.params:
            slope = whole.slope({f"{name}.{k}": g / max(length, 1e-9) for k, g in leaf.grads.items()})
            assert abs(slope - length) <= 1e-5 * max(1, length), name
    assert sum(g.any() for g in whole.net.grads.values()) > 0.8 * len(whole.net.grads)


@pytest.mark.parametrize("name", ["focal", "ce", "auc", "smooth_ap"])
@pytest.mark.parametrize("table, train", [("small", False), ("resnet50", True)])
def test_gradient_of_every_loss_that_is_a_derivative(tiny, name, table, train):
    """Central differences along a random direction in the arrays of each part."""
    whole, rng = Whole(name, table, train), np.random.default_rng(4)
    for part in whole.net.parts:
        direction = {k: rng.standard_normal(g.shape) for k, g in whole.net.grads.items() if k.startswith(part)}
        expected = sum((d * whole.net.grads[k]).sum() for k, d in direction.items())
        assert abs(expected) > 1e-3 and whole.slope(direction) == pytest.approx(expected, rel=1e-4, abs=1e-6), part


@pytest.mark.parametrize("name", retinanet.LOSSES)
def test_images_without_objects_train_to_finite_numbers(tiny, name):
    net = make(classes=("a",))
    x, _ = given(net)
    scores, deltas, cache = net.forward(x, True)
    values, dscores, ddeltas = retinanet.loss(scores, deltas, [empty(net, 72, 88)] * 2, name)
    net.backward(dscores, ddeltas, cache)
    assert np.isfinite(values["loss"]) and values["box_loss"] == values["positives"] == 0 and not ddeltas.any()
    assert (values["loss"] > 0) == dscores.any() == (name == "focal")
    assert all(np.isfinite(g).all() for g in net.grads.values())
    ignored = [Targets(np.full(scores.shape[1], -1), np.zeros((scores.shape[1], 4)))] * 2
    values, dscores, _ = retinanet.loss(scores, deltas, ignored, name)
    assert values["loss"] == 0 and not dscores.any()


def test_wrong_boxes_overlaps_and_weights_are_named(tiny):
    anchors = retinanet.anchors(SPEC, 16, 16)
    with pytest.raises(ValueError, match=r"^retinanet\.label: boxes must have area, got \[5\.0, 5\.0, 5\.0, 9\.0\]"):
        retinanet.label(SPEC, anchors, np.array([[5.0, 5, 5, 9]]), np.array([0]))
    for negative, positive in ((0.6, 0.3), (0.4, np.nan), (-0.1, 0.5)):
        with pytest.raises(ValueError, match=r"^retinanet\.label: negative and positive must be overlaps"):
            retinanet.label(SPEC, anchors, np.zeros((0, 4)), np.zeros(0, int), None, positive, negative)
    net = make()
    x, targets = given(net, 1, 16, 16)
    scores, deltas, _ = net.forward(x)
    for weight in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^retinanet\.loss: box_weight must be finite and not negative"):
            retinanet.loss(scores, deltas, targets, box_weight=weight)
    targets[0].labels[3] = 7
    with pytest.raises(ValueError, match=r"^retinanet\.loss: labels of targets must lie in -1\.\.\d, got .*7"):
        retinanet.loss(scores, deltas, targets)


def test_wrong_losses_and_targets_are_named(tiny):
    scores, deltas = np.zeros((2, 3, 1)), np.zeros((2, 3, 4))
    with pytest.raises(ValueError, match=r"^retinanet\.loss: name must be one of ap, auc, smooth_ap, focal, ce, got 'hinge'"):
        retinanet.loss(scores, deltas, targets_of([0, 0, 0], [0, 0, 0]), "hinge")
    with pytest.raises(ValueError, match=r"^retinanet\.loss: targets must be 2, of 3 anchors each, got \[3, 2\]"):
        retinanet.loss(scores, deltas, targets_of([0, 0, 0], [0, 0]))


@pytest.mark.parametrize("name", ["focal", "ap"])
def test_overfits_four_scenes_and_finds_their_objects(monkeypatch, name):
    monkeypatch.setitem(retinanet.TABLES, "small", Table((8, 12, 24, 32, 48), (), 32, 1, 6, None))
    net = make(np.float32)
    x, targets = given(net, 4, 96, 128)
    optimizer = optim.SGD(net, 0.9)
    for i in range(45):
        scores, deltas, cache = net.forward(x, True)
        _, dscores, ddeltas = retinanet.loss(scores, deltas, targets, name)
        net.backward(dscores, ddeltas, cache)
        optimizer.step(0.05 * min(1, (i + 1) / 10))
    views = [retinanet.training_view(net.spec, e, np.random.default_rng(k), 96, 128, "mirror") for k, e in enumerate(EXAMPLES)]
    found = [retinanet.detect(net, image, retinanet.Testing(short=96, longest=128)) for image, *_ in views]
    truth = [dataclasses.replace(e, source=v[0], size=(128, 96), boxes=v[1]) for e, v in zip(EXAMPLES, views)]
    assert evaluate.mean_ap(evaluate.voc(found, truth, scenes.CLASSES)) > 0.9


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
@pytest.mark.parametrize("table, names", [("small", tuple(retinanet.LOSSES)), ("resnet50", ("ap",))])
def test_a_training_step_never_copies_to_the_host_and_gives_its_numbers(tiny, table, names):
    found = {}
    for backend in ("numpy", "cuda"):
        with fake_cupy.installed(), use(backend) as put:
            net = make(table=table).to(put)
            x, targets = given(net, 2, 40, 48)
            x = put(x)
            with fake_cupy.no_copies():
                results = []
                for name in names:
                    scores, deltas, cache = net.forward(x, True)
                    results.append(retinanet.loss(scores, deltas, targets, name, per_image=name == "focal"))
                    net.backward(*results[-1][1:], cache)
            found[backend] = [[float(v) for v in r[0].values()] for r in results], [to_numpy(g) for g in net.grads.values()]
    assert_allclose(found["cuda"][0], found["numpy"][0], rtol=1e-7)
    for a, b in zip(found["cuda"][1], found["numpy"][1], strict=True):
        assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
def test_detection_gives_the_boxes_of_the_host(tiny):
    found = {}
    for backend in ("numpy", "cuda"):
        with fake_cupy.installed(), use(backend) as put:
            net = make(std=(6.0,) * 3).to(put)
            testing = retinanet.Testing(short=40, longest=60, min_score=0, limit=20)
            found[backend] = retinanet.detect(net, EXAMPLES[0].image()[:40, :60], testing)
    assert len(found["cuda"][0]) == 20
    for a, b in zip(*found.values()):
        assert isinstance(b, np.ndarray)
        assert_allclose(b, a, rtol=1e-7, atol=1e-7)


# Views and detection

@pytest.mark.parametrize("views", retinanet.VIEWS)
@pytest.mark.parametrize("upside_down", [True, False])
def test_views_keep_boxes_and_labels_together(views, upside_down):
    example = dataclasses.replace(EXAMPLES[2], difficult=np.arange(len(EXAMPLES[2].boxes)) == 1)
    counts = set()
    for seed in range(12):
        image, boxes, labels, difficult = retinanet.training_view(SPEC, example, np.random.default_rng(seed), 60, 80, views, upside_down, most=1.5)
        assert image.shape == (60, 80, 3) and image.dtype == np.uint8 and len(boxes) == len(labels) == len(difficult) > 0
        assert (boxes >= 0).all() and (boxes <= (80, 60, 80, 60)).all() and (box_ops.area(boxes) > 0).all()
        assert_array_equal(labels[difficult], example.labels[1:2][:difficult.sum()])
        counts.add(len(boxes))
    assert (len(counts) > 1) == (views != "mirror")
    W, H = example.size
    if views == "mirror":
        seen = set()
        for seed in range(30):
            image, boxes, *_ = retinanet.training_view(SPEC, example, np.random.default_rng(seed), 2 * H, 2 * W, views, upside_down)
            for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
                turned = np.where([x, y, x, y], (W, H, W, H) - example.boxes, example.boxes)
                if np.allclose(boxes, 2 * turned[:, [2 * x, 1 + 2 * y, 2 - 2 * x, 3 - 2 * y]]):
                    seen.add((x, y))
                    there = example.image()[::-1 if y else 1, ::-1 if x else 1]
                    assert_array_equal(image, augment.resize(np.ascontiguousarray(there), example.boxes, 2 * W, 2 * H)[0])
        assert seen == {(0, 0), (1, 0)} | ({(0, 1), (1, 1)} if upside_down else set())


def test_wrong_views_are_named():
    with pytest.raises(ValueError, match=r"^retinanet\.training_view: views must be one of ssd, crop, mirror, got 'none'"):
        retinanet.training_view(SPEC, EXAMPLES[0], np.random.default_rng(0), 32, 32, "none")


def test_batches_are_padded_with_the_mean():
    net = make(np.float32, table="small")
    x = retinanet.batch(net, [np.full((40, 30, 3), 118, np.uint8), np.full((33, 65, 3), 178, np.uint8)], 32)
    assert x.shape == (2, 64, 96, 3) and x.dtype == np.float32
    assert not x[0].any() and (x[1, :33, :65] == 1).all() and x[1].sum() == 33 * 65 * 3
    assert retinanet.batch(net, [np.zeros((40, 30, 3), np.uint8)]).shape == (1, 40, 30, 3)


def test_candidates_by_hand():
    spec = Spec(("a", "b"), octaves=(1.0,), ratios=(1.0,))              # one anchor a cell; levels of 2x2, 1x1, 1x1, 1x1 cells
    logit = np.array([[0, 1], [-9, 3], [1, -9], [-9, -9], [5, -9], [-9, -9], [-9, 2.0]])
    rows, labels, p = retinanet.candidates(spec, logit, 16, 16, retinanet.Testing(top=3, min_score=0.01))
    found = list(zip(rows.tolist(), labels.tolist()))
    assert found == [(1, 1), (0, 1), (2, 0), (4, 0), (6, 1), (6, 0)]    # 3 of a level; the coarsest takes any
    assert_allclose(p, 1 / (1 + np.exp(-logit[rows, labels])), rtol=1e-12)


def test_detections_by_hand(monkeypatch):
    """An image of 50 x 90 is enlarged to 100 x 180 and padded to 128 x 192."""
    net, image = make(np.float32, classes=("a", "b")), np.zeros((50, 90, 3), np.uint8)
    anchors, seen = retinanet.anchors(net.spec, 128, 192), []
    scores, deltas = np.full((1, len(anchors), 2), -1e4), np.zeros((1, len(anchors), 4))
    inside, corner, padding = (5 * 24 + 6) * 6 + 2, 0, (15 * 24 + 23) * 6 + 4       # ratio 1 at (52, 44); at (4, 4); ratio 2 in the padding
    for row, k, score in ((inside, 0, 3), (inside, 1, 1), (inside + 1, 0, 2), (corner, 1, 4), (padding, 0, 6)):
        scores[0, row, k] = score
    deltas[0, inside] = (5, 0, 0, 5 * np.log(2))                        # half a side to the right, twice as high
    deltas[0, inside + 1] = box_ops.encode(anchors[inside + 1:inside + 2], np.array([[53, 12, 84, 76.]]))[0] / (0.1, 0.1, 0.2, 0.2)
    monkeypatch.setattr(net, "forward", lambda x: (seen.append(x.shape), (scores, deltas, None))[1])
    boxes, labels, p = retinanet.detect(net, image, retinanet.Testing(short=100, longest=400))
    assert seen == [(1, 128, 192, 3)]
    assert labels.tolist() == [1, 0, 1]                                 # class a's second best overlaps its best; the padding holds nothing
    assert_allclose(p, 1 / (1 + np.exp([-4.0, -3, -1])), rtol=1e-12)
    assert_allclose(boxes[1:], [[26, 6, 42, 38]] * 2, rtol=1e-12)
    assert_allclose(boxes[0], np.clip(anchors[0] / 2, 0, (90, 50, 90, 50)), rtol=1e-12)
    assert len(retinanet.detect(net, image, retinanet.Testing(short=100, longest=400, limit=1))[0]) == 1
    boxes, labels, _ = retinanet.detect(net, image, retinanet.Testing(short=100, longest=400, nms=1.0))
    assert labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (240, 320)])
def test_detections_lie_in_the_image_and_are_kept_class_by_class(tiny, shape):
    net, image = make(np.float32, std=(1.0,) * 3), np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    net.params["regressor.layer.out.w"][...] *= 300
    boxes, labels, scores = retinanet.detect(net, image, retinanet.Testing(short=48, longest=96, min_score=0.0))
    H, W = shape
    assert boxes.dtype == np.float64 and (boxes >= 0).all() and (boxes <= (W, H, W, H)).all() and (box_ops.area(boxes) > 0).all()
    assert (np.diff(scores) <= 0).all() and len(boxes) <= 100
    assert_array_equal(nms.nms(boxes, scores, 0.5, groups=labels), np.arange(len(boxes)))


# Specs and files

@pytest.mark.parametrize("change, message", [
    ({"table": "x"}, "table must be one of small, resnet50, resnet101, got 'x'"), ({"classes": ()}, "classes must be different names"),
    ({"classes": ("a", "a")}, "classes must be"), ({"classes": "ab"}, "classes must be a tuple, got 'ab'"),
    ({"std": (0, 1, 1)}, "std must hold 3 finite numbers above 0"), ({"mean": (1, 2)}, "mean must hold 3 finite numbers, got"),
    ({"target_std": (1, 1)}, "target_std must hold 4"), ({"octaves": ()}, "octaves must hold one or more"),
    ({"ratios": (1, -1)}, "ratios must hold"), ({"ratios": 1.0}, "ratios must be a tuple"), ({"side": 0}, "side must be finite"),
    ({"prior": 1}, "prior lie in"), ({"stride_first": 1}, "stride_first must be True or False")])
def test_wrong_specs_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=rf"^retinanet\.Spec: .*{message}"):
        Spec(**{**vars(SPEC), **change})


@pytest.mark.parametrize("change", [{"short": 0}, {"longest": 1.5}, {"multiple": 0}, {"top": 0}, {"limit": 0}, {"min_score": 1},
                                    {"nms": 1.5}])
def test_wrong_testings_are_named(change):
    with pytest.raises((ValueError, TypeError), match=rf"^retinanet\.Testing: .*{next(iter(change))}"):
        retinanet.Testing(**change)


@pytest.mark.parametrize("table", ["small", "resnet50"])
def test_saved_and_loaded_net_is_the_same(tmp_path, tiny, table):
    net = make(np.float32, table=table, octaves=(1.0,))
    net.forward(given(net)[0], True)
    retinanet.save(net, tmp_path / "w.npz", {"short": 96})
    other, settings = retinanet.load(tmp_path / "w.npz")
    assert other.spec == net.spec and settings == {"short": 96} and other.dtype == net.dtype
    for k, v in net.arrays().items():
        assert_array_equal(v, other.arrays()[k])


@pytest.mark.parametrize("change, message", [
    ({"model": "overfeat"}, "the weights of 'overfeat'"), ({"spec": {"colour": 1}}, "TypeError"), ({}, r"KeyError\('classifier.layer.out.w'"),
    ({"spec": {**vars(SPEC), "table": "resnet18"}}, "table must be one of"), ({"spec": {**vars(SPEC), "mean": ["x"]}}, "could not convert"),
    ({"settings": 3}, "settings 3"), ({"arrays": {"classifier.layer.out.w": np.zeros((3, 3, 48, 12))}},
                                      r"must have shape \(3, 3, 48, 36\), got \(3, 3, 48, 12\)")])
def test_files_that_hold_no_net_are_refused(tmp_path, change, message):
    change = dict(change)
    files.write_arrays(tmp_path / "w.npz", change.pop("arrays", {}), {"model": "retinanet", "spec": vars(SPEC), "settings": {}, **change})
    with pytest.raises(ValueError, match=rf"^retinanet\.load: .*w\.npz must describe a net of retinanet, got: .*{message}"):
        retinanet.load(tmp_path / "w.npz")


def test_a_file_that_lacks_an_array_is_refused(tmp_path):
    net = make(np.float32)
    arrays = {k: v for k, v in net.arrays().items() if k != "pyramid.lateral4.b"}
    files.write_arrays(tmp_path / "w.npz", arrays, {"model": "retinanet", "spec": vars(SPEC), "settings": {}})
    with pytest.raises(ValueError, match=r"w\.npz lacks the array pyramid\.lateral4\.b"):
        retinanet.load(tmp_path / "w.npz")


def test_dscores_of_ap_are_the_update_of_the_op(tiny):
    """Through the net, with the weights of the pairs held (notes, T9): dscores is the op's, whatever the box loss."""
    net = make()
    x, targets = given(net)
    scores, deltas, _ = net.forward(x)
    labels = retinanet.entries(np.stack([t.labels for t in targets]), 6)
    value, g = ap_loss.ap_loss(scores, labels)
    values, dscores, _ = retinanet.loss(scores, deltas, targets)
    assert values["class_loss"] == value
    assert_array_equal(dscores, g)
    assert g[labels == 1].sum() == pytest.approx(-value) and g.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("table, size", [("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_published_nets_at_full_size(table, size):
    class Zeros:                                                        # no time or memory for random numbers
        def standard_normal(self, shape):
            return np.broadcast_to(np.float32(0), shape)
    net = RetinaNet(Spec(tuple(f"c{k}" for k in range(80)), table), Zeros(), pretrained=True)
    assert sum(v.size for v in net.parts["backbone"].params.values()) == size
    heads = 8 * (3 * 3 * 256 * 256 + 256) + 3 * 3 * 256 * 504 + 504
    laterals = 256 * (512 + 1024 + 2048) + 3 * 256
    assert sum(v.size for v in net.params.values()) == size + heads + laterals + 4 * (9 * 256 ** 2 + 256) + 9 * 2048 * 256 + 256
    scores, deltas, _ = net.forward(np.zeros((1, 125, 190, 3), np.float32))
    A = 6 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    assert scores.shape == (1, A, 80) and deltas.shape == (1, A, 4) and np.allclose(scores, -np.log(99))
    assert not any(k.startswith(("backbone.C1.", "backbone.C2.")) for k in net.trained)
    boxes = retinanet.anchors(net.spec, 512, 512)
    assert len(boxes) == 32736                                          # notes, sec. 3
    assert_allclose([boxes[2, 2] - boxes[2, 0], boxes[-3, 2] - boxes[-3, 0]], [32, 512 * 2 ** 0.5])


def test_defaults_are_those_of_the_notes():
    assert dataclasses.astuple(retinanet.Testing()) == (500, 833, 32, 1000, 0.01, 0.5, 100)
    spec = Spec(("a",))
    assert (spec.side, spec.octaves, spec.ratios, spec.target_std, spec.prior) == (4.0, (1.0, 2 ** 0.5), (0.5, 1.0, 2.0), (0.1, 0.1, 0.2, 0.2), 0.01)
    for name in ("resnet50", "resnet101"):
        table = retinanet.TABLES[name]
        assert (table.channels, table.depth, table.top, table.std) == (256, 4, 7, 0.01)


def test_weights_are_drawn_as_the_notes_have_it(monkeypatch):
    """Standard deviations of many weights: heads 0.01 and 0.001, pyramid 1 / sqrt(inputs), backbone He's."""
    monkeypatch.setitem(retinanet.TABLES, "resnet50", Table((8, 8, 8, 8, 8), (1, 1, 1, 1), 64, 1, 7))
    net = RetinaNet(Spec(tuple("abcdefgh"), "resnet50"), np.random.default_rng(0))
    for name, std in (("classifier.layer.conv1", 0.01), ("classifier.layer.out", 0.01), ("regressor.layer.out", 0.001),
                      ("pyramid.output3", 1 / np.sqrt(9 * 64)), ("pyramid.lateral4", 1 / np.sqrt(32)), ("backbone.C3.0.sum.branch.conv1", np.sqrt(2 / 32))):
        w = net.params[f"{name}.w"]
        assert w.size > 200 and w.std() == pytest.approx(std, rel=0.12), name
    assert_allclose(net.params["classifier.layer.out.b"], -np.log(99), rtol=1e-6)
    assert not net.params["regressor.layer.out.b"].any()


LOSSES = [4.545170363383628, 3.695216194831688, 3.021479416147253, 1.9940896735145492]


def test_the_first_losses_of_a_seeded_run_are_those_stored():
    """Small net, float64, AP-loss: four steps of SGD; a change of any part of the way shows."""
    with use("numpy"):
        net = make(table="small")
        optimizer, found = optim.SGD(net, 0.9, 1e-4), []
        boxes = retinanet.anchors(net.spec, 48, 64)
        for i in range(4):
            rng = np.random.default_rng([0, i])
            views = [retinanet.training_view(net.spec, e, rng, 48, 64, "crop", True) for e in EXAMPLES[:2]]
            scores, deltas, cache = net.forward(net.normalise(np.stack([v[0] for v in views])), True)
            values, dscores, ddeltas = retinanet.loss(scores, deltas, [retinanet.label(net.spec, boxes, *v[1:]) for v in views])
            net.backward(dscores, ddeltas, cache)
            optimizer.step(0.05)
            found.append(values["loss"])
    assert_allclose(found, LOSSES, rtol=1e-6)
