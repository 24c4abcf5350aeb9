"""OverFeat's localization: what the regressor must answer, its loss on a frozen trunk, five guesses; a small net learns it."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS
from tinydet import to_numpy, use
from tinydet.evaluate_classification import localization_error
from tinydet.gradcheck import check_loss
from tinydet.models import overfeat_localize as localization, overfeat
from tinydet.models.overfeat import decode
from tinydet.models.overfeat import TABLES, OverFeat, Spec, Table
from tinydet.ops import merge, softmax_loss
from tinydet.optim import SGD
from tinydet.records import Example

ACCURATE = TABLES["accurate"]
TINY = Table((("conv1", 3, 3, 2, 0, 2), ("conv2", 4, 3, 1, 1, 3)), 2, (("fc3", 3), ("fc4", 2)), (("fc1", 3), ("fc2", 2)))    # window 25
SMALLEST = Table((("conv1", 2, 1, 1, 0, 1), ("conv2", 2, 2, 1, 0, 2)), 2, (("fc3", 2),), (("fc1", 2),))                      # window 5
TOY = Table((("conv1", 6, 4, 2, 0, 2), ("conv2", 10, 3, 1, 1, 3)), 3, (("fc3", 16),), (("fc1", 24), ("fc2", 16)))            # window 38
TOY_SIZES = (46, 46), (58, 58)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    for name, table in (("tiny", TINY), ("smallest", SMALLEST), ("toy", TOY)):
        monkeypatch.setitem(TABLES, name, table)


def make(table="tiny", regressor="SCR", seed=0):
    """A float64 net whose every array is random."""
    net = OverFeat(Spec(("a", "b", "c"), table, regressor=regressor, dropout=0.3), np.random.default_rng(seed), np.float64)
    rng = np.random.default_rng(seed)
    for array in net.arrays().values():
        std = np.sqrt(2 / array[..., 0].size)
        array[...] = rng.normal(0, std, array.shape) if array.ndim == 4 else rng.uniform(0.2, 0.6, array.shape)
    return net


def picture(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


# Targets (notes, 4.2)

GT, LABEL = np.array([[60.0, 40, 200, 180]]), np.array([3])


def test_target_and_overlap_of_the_notes():
    t, labels, trained = (a.reshape(9, 15, *a.shape[1:]) for a in localization.targets(ACCURATE, 9, 15, GT, LABEL))
    assert_allclose(t[2, 3], (0.108597, 0.072398, 0.742081, 0.705882), rtol=0, atol=5e-7)          # window (36, 24), overlap 1
    assert_allclose(t[6, 9], (-48 / 221, -32 / 221, 92 / 221, 108 / 221), rtol=1e-15)              # window (108, 72), overlap 0.5069
    assert trained[2, 3] and trained[6, 9] and not trained[6, 10] and (labels == 3).all()          # 80 * 108 / 140^2 = 0.44
    assert t.dtype == np.float64 and labels.dtype == np.int64 and trained.dtype == bool
    for least, kept in ((0.5069, True), (0.507, False)):
        assert localization.targets(ACCURATE, 9, 15, GT, LABEL, least=least)[2][6 * 15 + 9] == kept
    half = localization.targets(ACCURATE, 1, 1, np.array([[211.0, 0, 231, 20]]), LABEL)[2]          # exactly half: kept
    assert half[0]
    iou = localization.targets(ACCURATE, 9, 15, GT, LABEL, "iou", 0.4)[2].reshape(9, 15)           # 140^2 / 221^2 = 0.4013
    assert iou[2, 3] and iou[0, 1] and not iou[6, 9]                                               # 9936 / 58505 = 0.17


@pytest.mark.parametrize("offset", [None, (1, 2)])
@pytest.mark.parametrize("rule", ["inter", "iou"])
def test_each_window_answers_the_box_that_it_holds_most_of(rule, offset):
    boxes = np.array([[3.0, 2, 23, 14], [14, 20, 42, 38], [36, 30, 64, 70],
                      [26, 4, 30, 9], [25, 3, 34, 13], [25, 3, 34, 13], [20, 20, 20, 30]])         # one inside twins; one without area
    labels, h, w, least = np.array([2, 0, 1, 1, 0, 2, 1]), 5, 4, 0.8 if rule == "inter" else 0.3
    t, named, trained = localization.targets(TINY, h, w, boxes, labels, rule, least, offset)
    assert 0 < trained.sum() < h * w
    for i, (r, c) in enumerate(np.ndindex(h, w)):
        x, y = (4 * c, 4 * r) if offset is None else (4 * (3 * c + 2), 4 * (3 * r + 1))
        best = (-1, -1, 0)
        for j, (x1, y1, x2, y2) in enumerate(boxes):
            inter = max(0, min(x2, x + 25) - max(x1, x)) * max(0, min(y2, y + 25) - max(y1, y))
            area = (x2 - x1) * (y2 - y1)
            iou = inter / (625 + area - inter)
            best = max(best, ((inter / area if area else 0) if rule == "inter" else iou, iou, -j))
        assert trained[i] == (best[0] >= least) and named[i] == labels[-best[2]]
        assert_allclose(t[i] * 25 + (x, y, x, y), boxes[-best[2]], rtol=0, atol=1e-12)


def test_nothing_trains_without_boxes():
    t, labels, trained = localization.targets(TINY, 2, 3, np.zeros((0, 4)), np.zeros(0, int))
    assert t.shape == (6, 4) and labels.shape == (6,) and not trained.any()
    value, dedges = localization.loss(np.ones((1, 2, 3, 4)), [(t, labels, trained)])
    assert value == 0 and not dedges.any()


def test_boxes_come_back_from_every_scale():
    """Notes 8, 8.: encode and decode, with the factors of the resize, landscape and portrait."""
    for image in (picture(150, 200), picture(200, 150)):
        boxes = np.array([[30.0, 20, 120, 140], [0, 0, 150, 150]])
        views = localization.training_scales(ACCURATE, image, boxes)
        assert [view.shape[:2] for view, _ in views] == [size[::1 if image.shape[1] > 150 else -1] for size in ACCURATE.sizes]
        for view, moved in views:
            assert_array_equal(view, overfeat.resize_to(ACCURATE, image, sorted(view.shape[:2])))
            factor = [view.shape[1] / image.shape[1], view.shape[0] / image.shape[0]] * 2
            assert_allclose(moved, boxes * factor, rtol=1e-15)
            size = overfeat.outputs(ACCURATE, *view.shape[:2]).fine
            t = localization.targets(ACCURATE, *size, moved[:1], LABEL)[0]
            assert_allclose(decode(overfeat.windows(ACCURATE, *size), t) / factor, boxes[:1].repeat(len(t), 0), rtol=0, atol=1e-6)
    aspect = localization.training_scales(ACCURATE, picture(300, 300), boxes, [(281, 317)], keep_aspect=True)
    assert aspect[0][0].shape == (281, 281, 3)


# Loss (notes, 4.2)

def wanted(N, M, K, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((M, 4)), rng.integers(0, K, M), rng.random(M) < 0.6) for _ in range(N)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("K", [1, 3])
def test_loss_is_the_definition_and_touches_only_what_trains(backend, K):
    edges = np.random.default_rng(1).standard_normal((2, 3, 4, 4 * K))
    targets = wanted(2, 12, 3)
    with use(backend) as put:
        value, dedges = (to_numpy(a) for a in localization.loss(put(edges), targets))
    kept = sum(int(trained.sum()) for *_, trained in targets)
    expected, gradient = 0, np.zeros((2, 12, K, 4))
    for n, (t, labels, trained) in enumerate(targets):
        for m in np.flatnonzero(trained):
            k = labels[m] if K > 1 else 0
            gradient[n, m, k] = (edges.reshape(2, 12, K, 4)[n, m, k] - t[m]) / kept
            expected += 0.5 * ((edges.reshape(2, 12, K, 4)[n, m, k] - t[m]) ** 2).sum() / kept
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert_allclose(dedges, gradient.reshape(edges.shape), rtol=1e-12)
    assert_array_equal(dedges != 0, gradient.reshape(edges.shape) != 0)     # exactly 0: windows that do not train, other classes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regressor, offset", [("SCR", None), ("PCR", None), ("SCR", (0, 1))])
def test_gradient_of_the_regressor_through_the_net(backend, regressor, offset):
    """By finite differences through net.forward; regress_step, from the trunk's maps, gives the same."""
    net = localization.freeze_trunk(make("smallest", regressor, 2))
    x = np.random.default_rng(1).standard_normal((1, 5 if offset is None else 6, 8, 3))     # 1 x 4 windows: an offset has two or none
    with use(backend) as put:
        net.to(put)
        x, head = put(x), net.parts["regressor"].leaves()
        size = net.forward(x, offset=offset)[1].shape[1:3]
        boxes, labels = np.array([[0.5, 1, 4, 5], [5, 1, 7.5, 4]]), np.array([2, 1])
        targets = [localization.targets(SMALLEST, *size, boxes, labels, least=0.82, offset=offset)]
        assert_array_equal(targets[0][2], [True, True, False, True] if offset is None else [True, True])
        places = [(layer, key) for layer in head.values() for key in layer.params]

        def loss(*params):
            for (layer, key), p in zip(places, params):
                layer.params[key] = p
                layer.grads[key][...] = 0
            _, edges, cache = net.forward(x, True, np.random.default_rng(3), offset, ("regressor",))
            value, dedges = localization.loss(edges, targets)
            net.backward(None, dedges, cache)
            return value, *(layer.grads[key].copy() for layer, key in places)
        params = [to_numpy(layer.params[key]).copy() for layer, key in places]
        check_loss(loss, params, put=put)
        value, *gradients = loss(*map(put, params))
        maps = net.parts["trunk"](x)
        assert float(localization.regress_step(net, maps, targets, offset)) == pytest.approx(float(value), rel=1e-12)
        for (layer, key), g in zip(places, gradients):                      # they added up
            assert to_numpy(g).any()
            assert_allclose(to_numpy(layer.grads[key]), 2 * to_numpy(g), rtol=1e-10, atol=1e-14)


def test_only_the_regressor_changes_and_the_trunk_is_not_differentiated(monkeypatch):
    net = localization.freeze_trunk(make())
    before, x = {k: v.copy() for k, v in net.params.items()}, np.random.default_rng(0).standard_normal((1, 33, 33, 3))
    optimizer = SGD(net, momentum=0.6, weight_decay=1e-5)
    assert set(net.trained) == {name for name in before if name.startswith("regressor.")}
    targets = [localization.targets(TINY, 3, 3, np.array([[3.0, 4, 20, 25]]), np.array([1]))]
    for layer in (*net.parts["trunk"].parts.values(), *net.parts["classifier"].parts.values()):
        monkeypatch.setattr(layer, "backward", None)                        # a call would be an error
    _, edges, cache = net.forward(x, True, np.random.default_rng(0), None)
    net.backward(None, localization.loss(edges, targets)[1], cache)
    localization.regress_step(net, net.parts["trunk"](x), targets)
    optimizer.step(0.01)
    assert {name for name, v in net.params.items() if (v != before[name]).any()} == set(net.trained)
    assert net.parts["regressor"].parts["fc1"].input_grad                   # as it was
    assert set(net.freeze(False).trained) == set(before)


# Guesses (notes, 4.3)

def by_definition(net, image, sizes, flip, fine, k, centre_only, mode):
    """Lists of (box, confidence) by class, from nested loops; their best merged one."""
    side, H, W, per_class = net.table.window, *image.shape[:2], net.spec.regressor == "PCR"
    found = {}
    for size in sizes:
        for mirrored in (False, True)[:1 + flip]:
            view = overfeat.resize_to(net.table, image, size)
            (h, w), x0, y0 = view.shape[:2], 0, 0
            view = np.ascontiguousarray(view[:, ::-1] if mirrored else view)
            if centre_only:
                x0, y0 = (w - side) // 2, (h - side) // 2
                view = view[y0:y0 + side, x0:x0 + side]
            step = net.table.jump if fine else net.table.step
            scores, edges = (a[0] for a in (net.dense if fine else net.forward)(net.normalise(view[None]))[:2])
            p = softmax_loss.softmax(scores)
            for c in sorted(range(p.shape[2]), key=lambda c: (-p[..., c].max(), c))[:k]:
                for i, j in np.ndindex(p.shape[:2]):
                    x1, y1, x2, y2 = edges[i, j, 4 * c * per_class:][:4] * side + np.array([x0 + step * j, y0 + step * i] * 2)
                    if mirrored:
                        x1, x2 = w - x2, w - x1
                    found.setdefault(c, []).append(([x1 * W / w, y1 * H / h, x2 * W / w, y2 * H / h], p[i, j, c]))
    best = []
    for c, boxes in found.items():
        b, s = np.array([b for b, _ in boxes]), np.array([s for _, s in boxes])
        if mode:
            b, s, _ = merge.merge(b, s, 0.5, mode)
        best.append((b[s.argmax()], c, s.max()))
    best.sort(key=lambda guess: (-guess[2], guess[1]))
    return [np.array(column) for column in zip(*best[:k])]


@pytest.mark.parametrize("regressor, flip, fine, k, centre_only, mode", [
    ("SCR", False, True, 5, False, "mean"), ("PCR", True, True, 2, False, "count"), ("SCR", True, False, 1, False, None),
    ("PCR", False, False, 3, False, "mean"), ("PCR", True, True, 2, True, "mean"), ("SCR", False, False, 2, True, None)])
def test_localize_is_the_definition(regressor, flip, fine, k, centre_only, mode):
    net, image = make("tiny", regressor), picture(40, 30)
    net.params["regressor.out.b"].reshape(-1, 4)[...] += (0, 0, 1, 1)       # about the window itself
    how = dict(merging="none") if mode is None else dict(mode=mode)
    sizes = [(45, 57), (57, 57)]
    expected = by_definition(net, image, sizes, flip, fine, k, centre_only, mode)
    found = localization.localize(net, image, sizes, flip, fine, k, centre_only, **how)
    for a, b in zip(found, expected):
        assert a.shape == b.shape
        assert_allclose(a, b, rtol=1e-12, atol=1e-9)
    assert len(found[1]) == min(k, 3) and len(set(found[1])) == len(found[1])
    whole = localization.localize(net, image, None, flip, fine, k, centre_only, **how)      # all scales; the first for the centre crop
    for a, b in zip(whole, localization.localize(net, image, TINY.sizes[:1 if centre_only else 6], flip, fine, k, centre_only, **how)):
        assert_array_equal(a, b)


class Oracle:
    """A net that answers with the targets: every window has p = 0.8 for the class and knows the box. The image is dark on its right."""

    def __init__(self, box):
        self.table, self.box, self.parts = ACCURATE, box, {"regressor": None}

    def normalise(self, images):
        return images.astype(float)

    def dense(self, x):
        h, w = x.shape[1:3]
        size, (x1, y1, x2, y2) = overfeat.outputs(ACCURATE, h, w).fine, self.box
        if x[0, 0, 0, 0] < x[0, 0, -1, 0]:
            x1, x2 = 1 - x2, 1 - x1
        t, *_ = localization.targets(ACCURATE, *size, np.array([[x1 * w, y1 * h, x2 * w, y2 * h]]), np.array([1]))
        return np.broadcast_to(np.log([0.15, 0.8, 0.05]), (1, *size, 3)), t.reshape(1, *size, 4)


@pytest.mark.parametrize("mode", merge.MODES)
def test_the_box_comes_back_from_all_scales_and_flips_and_confidence_adds_up(mode):
    image = np.full((300, 400, 3), 50, np.uint8)
    image[:, :200] = 200
    sizes = overfeat.TEST_SIZES[:3]                                             # 9 + 54 + 135 windows
    boxes, labels, scores = localization.localize(Oracle((0.2, 0.3, 0.6, 0.9)), image, sizes, flip=True, mode=mode)
    assert_array_equal(labels, [1, 0, 2])
    assert_allclose(boxes, np.tile([80, 90, 240, 270], (3, 1)), rtol=0, atol=1e-6)
    assert_allclose(scores, 2 * 198 * np.array([0.8, 0.15, 0.05]), rtol=1e-12)


WORKED = np.array([[10.0, 10, 50, 50], [14, 10, 54, 50], [12, 14, 52, 54], [100, 100, 140, 140]])


def test_localize_may_keep_the_aspect():
    net, image = make(), picture(40, 90)
    sizes, merging = net.table.sizes[:2], {"mode": "count"}
    seen = [localization.look(net, image, size, keep_aspect=True) for size in sizes]
    assert len(seen[0][0]) > len(localization.look(net, image, sizes[0])[0])            # a long view has more windows
    for a, b in zip(localization.localize(net, image, sizes, keep_aspect=True, **merging), localization.guesses(seen, **merging)):
        assert_array_equal(a, b)


def test_worked_merge_and_the_surest_window():
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.3, 0.6, 0.1]])
    views = [(WORKED[:2, None], p[:2]), (WORKED[2:, None], p[2:])]
    boxes, labels, scores = localization.guesses(views, 2, mode="mean")
    assert_array_equal(labels, [0, 1])                                      # class 2 was never among the first two
    assert_allclose(boxes, [[12, 12, 52, 52]] * 2, rtol=1e-12)              # one merge a class: 0.8 of three beats 0.6 of one
    assert_allclose(scores, (1.5, 0.8), rtol=1e-12)
    for how in ({"mode": "count"}, {}):                                     # "count" unless "mean" is named
        assert_allclose(localization.guesses(views, 2, **how)[0][0], (12, 34 / 3, 52, 154 / 3), rtol=1e-12)
    boxes, labels, scores = localization.guesses(views, 2, "none")
    assert_array_equal(boxes, WORKED[[2, 3]])                               # both are sure to 0.6: the lower class first
    assert_array_equal(labels, [0, 1])
    assert_array_equal(scores, [0.6, 0.6])
    assert_allclose(localization.guesses(views, 2, mode="mean", match="literal", threshold=1e9)[2], p.sum(0)[:2], rtol=1e-12)
    assert_allclose(localization.guesses(views, 2, mode="mean", threshold=-1)[2], (0.6, 0.6))
    assert_allclose(localization.guesses(views, 2, mode="mean", least=0.4)[2], (1.5, 0.6))
    for how in ({"mode": "mean"}, {"merging": "none"}):                     # two views
        sums, means = (localization.guesses(views, 2, normalize=n, **how) for n in localization.NORMALIZATIONS)
        assert_array_equal(sums[0], means[0])
        assert_array_equal(sums[2], 2 * means[2])
    empty = localization.guesses(views, 2, least=0.7)
    assert empty[0].shape == (0, 4) and empty[1].shape == empty[2].shape == (0,)


def test_of_each_view_only_its_own_best_classes_count():
    views = [(WORKED[:1, None], np.array([[0.6, 0.4]])), (WORKED[:1, None], np.array([[0.45, 0.55]]))]
    for k, expected in ((1, [0.6]), (2, [1.05, 0.95])):                     # k = 1: class 0 of the first view, 1 of the second
        boxes, labels, scores = localization.guesses(views, k)
        assert_allclose(scores, expected, rtol=1e-12)
        assert_array_equal(labels, [0, 1][:k])
    assert_array_equal(localization.guesses([(WORKED[:1, None], np.full((1, 3), 1 / 3))], 2)[1], [0, 1])     # ties: the lower class


@pytest.mark.parametrize("mode", merge.MODES)
def test_one_class_free_merge_gives_what_the_classes_merged_one_by_one_give(mode):
    """Of an SCR, where no window is left out: notes, 4.3. Its members come from a merge per window, that has score 1, all others 0."""
    rng = np.random.default_rng(4)
    boxes, p = rng.choice([10.0, 60, 110], (12, 1)) + [0, 0, 40, 40] + rng.uniform(-5, 5, (12, 4)), rng.dirichlet(np.ones(3), 12)
    found = localization.guesses([(boxes[:7, None], p[:7]), (boxes[7:, None], p[7:])], 3, mode=mode)
    members = np.array([merge.merge(boxes, one, 0.5, mode)[1] for one in np.eye(12)])       # (windows, merged boxes)
    merged, vectors = merge.merge(boxes, np.zeros(12), 0.5, mode)[0], members.T @ p
    assert 1 < len(merged) < 12 and (members.sum(1) == 1).all()
    for box, label, score in zip(*found):
        assert_array_equal(box, merged[vectors[:, label].argmax()])
        assert score == pytest.approx(vectors[:, label].max(), rel=1e-12)


def test_merging_never_crosses_classes():
    """Two classes see one place: no box is an average over both. Of a PCR each class has boxes of its own."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    boxes, labels, scores = localization.guesses([(np.stack([WORKED[:3], WORKED[:3] + 200], 1), p)], mode="mean")
    for box, label, score in zip(boxes, labels, scores):
        b, s, _ = merge.merge(WORKED[:3] + 200 * label, p[:, label], mode="mean")
        assert_allclose((*box, score), (*b[0], s[0]), rtol=1e-12)
    assert_allclose(scores, (1.8, 1.2))


def test_errors():
    for more, told in ((dict(rule="area"), "rule must be one of inter, iou, got 'area'"),
                       (dict(labels=np.array([-1])), "labels must be at least 0, got -1"),
                       (dict(labels=np.array([1, 2])), r"labels must have shape \(1,\)"),
                       (dict(boxes=GT[0]), r"boxes must have shape \(R, 4\)")):
        with pytest.raises(ValueError, match=r"^overfeat_localize\.targets: " + told):
            localization.targets(ACCURATE, 1, 1, **{"boxes": GT, "labels": LABEL, **more})
    targets = wanted(1, 6, 3)
    for shape, told in (((1, 2, 3, 5), "edges must have 4 channels a class"), ((2, 2, 3, 4), "windows for each of 2 images"),
                        ((1, 2, 2, 4), "targets 4 windows for each"), ((1, 2, 3, 8), r"labels must lie in 0\.\.1, got 2")):
        with pytest.raises(ValueError, match=r"^overfeat_localize\.loss: .*" + told):
            localization.loss(np.zeros(shape), targets)
    views = [(WORKED[:, None], np.ones((4, 2)))]
    for how, told in ((dict(k=0), "k must be at least 1"), (dict(merging="nms"), "merging must be one of merge, none, got 'nms'"),
                      (dict(normalize="views"), "normalize must be one of none, scales, got 'views'")):
        with pytest.raises(ValueError, match=r"^overfeat_localize\.guesses: " + told):
            localization.guesses(views, **how)
    net = make(regressor=None)
    for run, name in ((lambda: localization.freeze_trunk(net), "freeze_trunk"),
                      (lambda: localization.localize(net, picture(40, 40)), "look")):
        with pytest.raises(ValueError, match=rf"^overfeat_localize\.{name}: the net must have a regressor"):
            run()


# A net learns it (notes, 8: 12)

COLOURS = np.array([[230, 40, 40], [40, 220, 60], [60, 70, 235]])


def square(seed):
    """One coloured square on noisy grey, 48 x 48."""
    rng = np.random.default_rng([7, seed])
    side, label = rng.integers(20, 32), rng.integers(3)
    x, y = rng.integers(0, 48 - side + 1, 2)
    image = rng.normal(110, 20, (48, 48, 1)).repeat(3, 2)
    image[y:y + side, x:x + side] = COLOURS[label] + rng.normal(0, 10, (side, side, 3))
    box = np.array([[x, y, x + side, y + side]], float)
    return Example(str(seed), image.clip(0, 255).astype(np.uint8), (48, 48), box, np.array([label]), np.zeros(1, bool))


def trained(images=48, epochs=16, regress=200, seed=2):
    """The toy net: trunk and classifier on single windows, then the regressor alone, on maps that the frozen trunk makes once.

    Returns the net, the regressor's loss of each step, and that of the best answer that knows no image.
    """
    spec = Spec(("red", "green", "blue"), "toy", regressor="SCR", dropout=0.0, init=None, mean=110.0, std=60.0,
                from_window=True)
    rng, squares = np.random.default_rng(seed), [square(i) for i in range(images)]
    net = OverFeat(spec, rng, np.float64)
    optimizer = SGD(net, momentum=0.6, weight_decay=1e-5)
    for _ in range(epochs):
        for batch in rng.permutation(images).reshape(-1, 16):
            x = net.normalise(np.stack([overfeat.training_view(TOY, squares[i].image(), rng, 44) for i in batch]))
            scores, _, cache = net.forward(x, True, rng, heads=("classifier",))
            _, dscores = softmax_loss.loss(scores.reshape(16, 3), np.array([squares[i].labels[0] for i in batch]))
            net.backward(dscores.reshape(scores.shape), None, cache)
            optimizer.step(0.05)
    localization.freeze_trunk(net)
    scales, constant = [], 0                                                # per scale: the trunk's maps of all images, and targets
    for views in zip(*(localization.training_scales(TOY, s.image(), s.boxes, TOY_SIZES) for s in squares)):
        size = overfeat.outputs(TOY, *views[0][0].shape[:2]).fine
        targets = [localization.targets(TOY, *size, boxes, s.labels) for (_, boxes), s in zip(views, squares)]
        scales.append((net.parts["trunk"](net.normalise(np.stack([view for view, _ in views]))), targets))
        edges = np.concatenate([t[trains] for t, _, trains in targets])
        constant += edges.var(0).sum() / 2
    optimizer, values = SGD(net, momentum=0.9, weight_decay=1e-5, clip=1), []
    for _ in range(regress):
        batch = rng.choice(images, 16, replace=False)
        values.append(sum(localization.regress_step(net, maps[batch], [targets[i] for i in batch]) for maps, targets in scales))
        optimizer.step(0.05)
    return net, values, constant


def test_a_small_net_learns_to_localize_coloured_squares():
    net, values, constant = trained()
    assert np.mean(values[-20:]) < constant / 3
    held_out = [square(1000 + i) for i in range(60)]
    fine, coarse = ([localization.localize(net, s.image(), TOY_SIZES, fine=fine, k=3, mode="count") for s in held_out]
                    for fine in (True, False))
    assert all(labels[0] == s.labels[0] and scores[0] > 1.5 * scores[1] for (_, labels, scores), s in zip(fine, held_out))
    errors = np.array([[localization_error(found, held_out, iou, 1).error for iou in (0.5, 0.7)] for found in (fine, coarse)])
    assert errors[0, 0] < 0.1 and (errors[0] <= errors[1]).all() and errors[0, 1] < errors[1, 1], errors
