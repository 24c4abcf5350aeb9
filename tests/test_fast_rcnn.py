"""Fast R-CNN: what regions must answer, the step in all its forms, and detection."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import RUNNING
from tinydet import evaluate, files, optim, scenes, to_numpy, use
from tinydet.data import Example
from tinydet.models import fast_rcnn
from tinydet.models.fast_rcnn import Sampler, Spec
from tinydet.ops import boxes as box_ops, ohem, roi_loss

EXAMPLES = scenes.scenes(4, seed=5)
SPEC = Spec(scenes.CLASSES, short=(96,), longest=192, mean=(118.0,) * 3, std=(60.0,) * 3, dropout=0.0)


def proposals(example, seed=0, count=30):
    rng = np.random.default_rng(seed)
    corner, side = rng.random((count, 2)) * 90, rng.random((count, 2)) * 60 + 8
    near = example.boxes[rng.integers(0, len(example.boxes), count // 3)] + rng.normal(0, 4, (count // 3, 4))
    return np.concatenate([np.concatenate([corner, corner + side], 1), near[(near[:, 2:] > near[:, :2] + 2).all(1)]])


def given(net, count=2, seed=0):
    """x and the Regions of the first examples."""
    images, regions = [], []
    for k, e in enumerate(EXAMPLES[:count]):
        image, p, boxes, labels, difficult = fast_rcnn.training_image(net.spec, e, proposals(e, k), np.random.default_rng(seed + k))
        images.append(image)
        regions.append(fast_rcnn.label(net.spec, p, boxes, labels, difficult))
    return fast_rcnn.batch(net, images), regions


def small(dtype=np.float64, **changed):
    spec = Spec(**{**vars(SPEC), **changed})
    return fast_rcnn.FastRCNN(spec, np.random.default_rng(0), dtype)


def cleared(net):
    found = {k: to_numpy(g).copy() for k, g in net.grads.items()}
    for g in net.grads.values():
        g[...] = 0
    return found


# Labels

def test_label_by_hand():
    boxes, labels = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30.]]), np.array([2, 0, 1])
    regions = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [20, 0, 32, 10], [50, 50, 60, 60], [0, 20, 10, 31], [0, 20, 10, 23]])
    r = fast_rcnn.label(SPEC, regions, boxes, labels, np.array([False, False, True]))
    assert_array_equal(r.boxes[:2], boxes[:2])                          # the objects stand first, the difficult one does not
    assert r.labels.tolist() == [2, 0, 2, 2, 6, 0, 6, -1, 6]
    assert_allclose(r.overlaps[2:6], [1, 0.5, 0.49, 10 / 12])
    assert_allclose(r.targets[5], box_ops.encode(regions[3:4], boxes[1:2])[0] / (0.1, 0.1, 0.2, 0.2), rtol=1e-12)
    assert not r.targets[r.labels == 6].any()
    assert fast_rcnn.label(SPEC, regions, boxes, labels, append=False).labels.tolist() == [2, 2, 6, 0, 6, 1, 6]


def test_label_without_objects_or_proposals():
    empty, none = np.zeros((0, 4)), np.zeros(0, np.int64)
    r = fast_rcnn.label(SPEC, np.array([[0, 0, 5, 5.]]), empty, none)
    assert r.labels.tolist() == [6] and r.overlaps.tolist() == [0]
    assert len(fast_rcnn.label(SPEC, empty, empty, none).labels) == 0
    assert fast_rcnn.label(SPEC, empty, np.array([[0, 0, 5, 5.]]), np.array([3])).labels.tolist() == [3]
    assert fast_rcnn.label(SPEC, empty, np.array([[0, 0, 5, 5.]]), np.array([3]), np.array([True])).labels.tolist() == []


@pytest.mark.parametrize("wrong, message", [
    (np.array([[np.nan, 0, 1, 1]]), "proposals must be finite"), (np.array([[0, 0, np.inf, 1]]), "proposals must be finite"),
    (np.zeros((3, 5)), r"proposals must have shape \(R, 4\), got \(3, 5\)"), ([[0, 0, 1, 1]], "proposals must be an array")])
def test_wrong_proposals_are_named(wrong, message):
    with pytest.raises((ValueError, TypeError), match=rf"^fast_rcnn\.label: {message}"):
        fast_rcnn.label(SPEC, wrong, np.zeros((0, 4)), np.zeros(0, int))
    with pytest.raises((ValueError, TypeError), match=rf"^fast_rcnn\.detect: {message}"):
        fast_rcnn.detect(small(), EXAMPLES[0].image(), wrong, fast_rcnn.Testing())


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("name", fast_rcnn.SAMPLERS)
def test_regions_outside_and_without_area_train_as_background(backend, name):
    odd = np.array([[-50, -50, -40, -40], [500, 500, 600, 600], [20, 20, 20, 40], [30, 30, 20, 20], [-10, -10, 200, 200.]])
    with use(backend) as put:
        net = small(short=(48,)).to(put)
        x, regions = given(net, 1)
        few = fast_rcnn.label(net.spec, odd, regions[0].boxes[:1], regions[0].labels[:1])
        assert few.labels[1:].tolist() == [6] * 5 and not few.targets[1:].any()
        values, chosen = fast_rcnn.step(net, put(x), [few], Sampler(name, low=0.0, threshold=None), np.random.default_rng(0))
        grads = cleared(net)
    assert np.isfinite(float(values["loss"])) and all(np.isfinite(g).all() for g in grads.values())
    assert len(to_numpy(chosen[0])) == (4 if name == "ssd" else 6)          # 3 : 1


@pytest.mark.parametrize("change, message", [
    ({"labels": np.array([6])}, r"labels must lie in 0\.\.5, got 6\.\.6"), ({"labels": np.array([-1])}, "labels must lie in"),
    ({"labels": np.array([1.0])}, "labels"), ({"difficult": np.array([1])}, "difficult must be 1 booleans"), ({"difficult": [True, False]}, "difficult must be 1"),
    ({"boxes": np.array([[0, 0, np.nan, 1]])}, "boxes must be finite")])
def test_wrong_objects_are_named(change, message):
    given = {"proposals": np.zeros((0, 4)), "boxes": np.array([[0, 0, 5, 5.]]), "labels": np.array([1]), "difficult": np.array([False])}
    with pytest.raises((ValueError, TypeError), match=rf"^fast_rcnn\.label: {message}"):
        fast_rcnn.label(SPEC, **{**given, **change})


def test_regions_at_difficult_objects_are_ignored_unless_another_is_as_near():
    boxes, labels, difficult = np.array([[0, 0, 10, 10], [0, 2, 10, 12.]]), np.array([0, 1]), np.array([False, True])
    regions = np.array([[0, 1, 10, 11], [0, 2, 10, 12], [0, 0, 10, 11], [40, 40, 50, 50.]])
    r = fast_rcnn.label(SPEC, regions, boxes, labels, difficult, append=False)
    assert r.labels.tolist() == [0, -1, 0, 6] and r.boxes.dtype == np.float64
    assert fast_rcnn.label(SPEC, regions.astype(np.float32), boxes, labels).boxes.dtype == np.float64


def test_targets_are_normalised_class_by_class():
    boxes, labels, proposals = np.array([[0, 0, 10, 10], [20, 0, 30, 20.]]), np.array([1, 0]), np.array([[0, 0, 9, 10], [21, 0, 30, 21.]])
    plain = dict(vars(SPEC), classes=("a", "b"), target_mean=(0, 0, 0, 0), target_std=(1, 1, 1, 1))
    v = fast_rcnn.label(Spec(**plain), proposals, boxes, labels).targets
    each = dict(plain, target_mean=((0.1, 0.2, 0.3, 0.4), (0, 0, 0, 0)), target_std=((1, 2, 3, 4), (0.5, 0.5, 0.5, 0.5)))
    r = fast_rcnn.label(Spec(**each), proposals, boxes, labels)
    assert r.labels.tolist() == [1, 0, 1, 0]
    assert_allclose(r.targets, [v[0] * 2, (v[1] - [0.1, 0.2, 0.3, 0.4]) / [1, 2, 3, 4], v[2] * 2, (v[3] - [0.1, 0.2, 0.3, 0.4]) / [1, 2, 3, 4]], rtol=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
def test_target_statistics_normalise_the_targets(per_class):
    def labelled(spec):
        return [fast_rcnn.label(spec, proposals(e, k, 300), e.boxes, e.labels) for k, e in enumerate(EXAMPLES)]
    mean, std = fast_rcnn.target_statistics(SPEC, labelled(SPEC), per_class)
    spec = Spec(**{**vars(SPEC), "target_mean": mean, "target_std": std})
    held = [(r.labels[r.labels < 6], r.targets[r.labels < 6]) for r in labelled(spec)]
    labels, targets = (np.concatenate(column) for column in zip(*held))
    for rows in [labels == k for k in range(6)] if per_class else [labels >= 0]:
        assert_allclose(targets[rows].mean(0), 0, atol=1e-9)
        assert_allclose(targets[rows].std(0), 1, rtol=1e-9)
    assert_allclose(np.array(fast_rcnn.target_statistics(spec, labelled(spec), per_class)), np.array([mean, std]), rtol=1e-9)


def test_target_statistics_of_classes_with_hardly_a_region():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 20.]])
    regions = fast_rcnn.label(SPEC, np.array([[0, 0, 9, 10], [1, 1, 11, 10.]]), boxes, np.array([1, 0]))
    mean, std = fast_rcnn.target_statistics(SPEC, [regions])
    v = regions.targets * SPEC.target_std
    assert_allclose(mean[1], v[regions.labels == 1].mean(0), rtol=1e-12)
    ignored = fast_rcnn.Regions(regions.boxes, np.full(len(v), -1), regions.targets + 9, regions.overlaps)
    assert fast_rcnn.target_statistics(SPEC, [regions, ignored]) == (mean, std)
    assert_allclose(mean[0], v[regions.labels < 6].mean(0), rtol=1e-12)      # one region of class 0, none of the others
    assert_allclose(std[5], v[regions.labels < 6].std(0), rtol=1e-12)
    single = fast_rcnn.label(SPEC, np.zeros((0, 4)), boxes[:1], np.array([1]))
    assert np.array(fast_rcnn.target_statistics(SPEC, [single])[1]).min() == 1e-3       # never divides by 0
    with pytest.raises(ValueError, match=r"^fast_rcnn\.target_statistics: some region must hold an object"):
        fast_rcnn.target_statistics(SPEC, [fast_rcnn.label(SPEC, boxes, np.zeros((0, 4)), np.zeros(0, int))])


def test_folded_net_detects_the_same():
    each = np.random.default_rng(0).uniform(0.1, 0.3, (2, 6, 4))
    net = small(target_mean=tuple(map(tuple, each[0] - 0.2)), target_std=tuple(map(tuple, each[1])))
    net.params["regressor.w"][...] *= 100
    before = {k: v.copy() for k, v in net.arrays().items()}
    folded = fast_rcnn.fold_targets(net)
    assert folded.spec.target_std == (1,) * 4
    testing = fast_rcnn.Testing(short=(96,), min_score=0.0)
    ours, other = (fast_rcnn.detect(n, EXAMPLES[0].image(), proposals(EXAMPLES[0]), testing) for n in (net, folded))
    assert len(ours[0]) > 5
    for a, b in zip(ours, other):
        assert_allclose(a, b, rtol=1e-9)
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])
    assert abs(folded.params["regressor.w"] - net.params["regressor.w"]).max() > 0.01


# Training images

def test_training_image_jitters_objects_and_draws_proposals():
    e, many = EXAMPLES[0], proposals(EXAMPLES[0], 0, 90)
    _, p, boxes, labels, _ = fast_rcnn.training_image(SPEC, e, many, np.random.default_rng(0), jitter=3, most=20)
    assert len(p) == 3 * len(e.boxes) + 20 and len(boxes) == len(e.boxes) and labels is e.labels
    for k, box in enumerate(boxes):
        overlap = box_ops.iou(p[3 * k:3 * k + 3], box[None])[:, 0]
        assert (overlap >= 0.6).all() and len(set(overlap)) == 3
    _, q, *_ = fast_rcnn.training_image(SPEC, e, many, np.random.default_rng(1), mirror=False, most=20)
    distance = abs(many * 96 / min(e.size) - q[:, None]).max(2)
    assert distance.min(1).max() < 1 and (np.diff(distance.argmin(1)) > 0).all()                # 20 of them, none twice, in their order
    assert len(fast_rcnn.training_image(SPEC, e, many[:5], np.random.default_rng(1), most=20)[1]) == 5


# The step

@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("accumulate", fast_rcnn.ACCUMULATE)
def test_two_networks_are_zeroing(backend, accumulate):
    """Only the hard regions forward and backward give the gradient of all of them with the others' losses set to 0 (notes, sec. 2.3)."""
    with use(backend) as put:
        net = small(short=(48,)).to(put)
        x, regions = given(net)
        values, chosen = fast_rcnn.step(net, put(x), regions, Sampler(batch=12, accumulate=accumulate), np.random.default_rng(1))
        two = cleared(net)
        rois = np.concatenate([np.column_stack([np.full(len(r.boxes), float(n)), r.boxes]) for n, r in enumerate(regions)])
        weights, at = np.zeros(len(rois)), 0
        for r, c in zip(regions, chosen):
            c = to_numpy(c)
            weights[at + c] = 1 / (2 * len(c)) if accumulate == "mean_of_means" else 1 / sum(map(len, chosen))
            at += len(r.boxes)
        scores, deltas, cache = net.forward(put(x), put(rois), True, np.random.default_rng(1))
        labels, targets = (np.concatenate([getattr(r, name) for r in regions]) for name in ("labels", "targets"))
        value, dscores, ddeltas = roi_loss.loss(scores, deltas, put(labels), put(targets), put(weights))
        net.backward(dscores, ddeltas, cache)
        zeroed = cleared(net)
    assert_allclose(float(value), float(values["loss"]), rtol=1e-12)
    for k, g in two.items():
        assert_allclose(g, zeroed[k], rtol=1e-12, atol=1e-12 * max(1, abs(g).max()), err_msg=k)
    assert any(g.any() for g in two.values())


def test_chunks_change_nothing_and_the_read_only_pass_touches_nothing():
    net = small(dropout=0.5)
    x, regions = given(net)
    maps, _ = net.features(x, True)
    before = {k: v.copy() for k, v in net.arrays().items()}
    rois = np.column_stack([np.zeros(len(regions[0].boxes)), regions[0].boxes])
    losses = [fast_rcnn.score(net, maps, rois, regions[0].labels, regions[0].targets, Sampler(chunk=chunk)) for chunk in (1, 7, 512)]
    for other in losses[1:]:
        assert_allclose(other, losses[0], rtol=1e-12)
    assert not any(g.any() for g in net.grads.values())
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])
    noisy = [fast_rcnn.score(net, maps, rois, regions[0].labels, regions[0].targets, Sampler(noisy=True), np.random.default_rng(s)) for s in (0, 1)]
    assert not np.allclose(*noisy)


@pytest.mark.parametrize("name", fast_rcnn.SAMPLERS)
def test_gradient_of_every_sampler(name):
    """Central differences with the choice held: that of the step before."""
    net = small(classes=("a", "b"))
    e = EXAMPLES[0]
    labels = e.labels % 2
    regions = [fast_rcnn.label(net.spec, proposals(e), e.boxes, labels)]
    x = fast_rcnn.batch(net, [e.image()])
    net.parts["regressor"].params["b"] += 0.3                           # off the kinks of the box loss
    sampler, rng = Sampler(name, batch=16), np.random.default_rng(1)
    values, chosen = fast_rcnn.step(net, x, regions, sampler, rng)
    grads = cleared(net)
    held = regions[0]
    few = [fast_rcnn.Regions(*(v[chosen[0]] for v in vars(held).values()))]
    again = Sampler("focal" if name == "focal" else "all")
    scale = {"ssd": len(chosen[0]) / max(1, (few[0].labels < 2).sum())}.get(name, 1)

    def loss():
        value = float(fast_rcnn.step(net, x, few, again, np.random.default_rng(1))[0]["loss"])
        cleared(net)
        return value * scale
    assert loss() == pytest.approx(float(values["loss"]), rel=1e-9)
    for k, w in net.params.items():
        at, eps = abs(grads[k]).argmax(), 1e-6
        kept = w.flat[at]
        w.flat[at] = kept + eps
        high = loss()
        w.flat[at] = kept - eps
        low = loss()
        w.flat[at] = kept
        assert abs((high - low) / (2 * eps) - grads[k].flat[at]) <= 1e-5 * max(1, abs(grads[k].flat[at])), (name, k)


def test_the_hardest_are_chosen_and_background_alone_trains_too():
    net = small()
    x, regions = given(net)
    maps, _ = net.features(x, True)
    values, chosen = fast_rcnn.step(net, x, regions, Sampler(batch=20), np.random.default_rng(0))
    assert values["positive"] == np.mean(np.concatenate([r.labels[c] < 6 for r, c in zip(regions, chosen)])) > 0
    for n, (r, c) in enumerate(zip(regions, chosen)):
        rois = np.column_stack([np.full(len(r.boxes), float(n)), r.boxes])
        losses = fast_rcnn.score(net, maps, rois, r.labels, r.targets, Sampler())
        assert_array_equal(c, ohem.select(losses, r.boxes, r.labels, 10))
    cleared(net)
    background = [fast_rcnn.label(SPEC, r.boxes, np.zeros((0, 4)), np.zeros(0, int)) for r in regions]
    for name in fast_rcnn.SAMPLERS:
        values, chosen = fast_rcnn.step(net, x, background, Sampler(name, low=0.0), np.random.default_rng(0))
        assert np.isfinite(values["loss"]) and values["positive"] == 0 and (name != "ssd" or values["regions"] == 0)
    none = [fast_rcnn.label(SPEC, np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0, int)) for _ in regions]
    for name in fast_rcnn.SAMPLERS:
        cleared(net)
        values, _ = fast_rcnn.step(net, x, none, Sampler(name), np.random.default_rng(0))
        assert values["loss"] == 0 and values["regions"] == 0 and not any(g.any() for k, g in net.grads.items())


@pytest.mark.parametrize("name", fast_rcnn.SAMPLERS)
def test_the_step_is_its_parts(name):
    """To the bit: the trunk, head_step, backward. A trunk that does not train gets nothing, and the head the same, from backward_head."""
    net = small(dropout=0.3)
    x, regions = given(net)
    values, chosen = fast_rcnn.step(net, x, regions, Sampler(name, batch=24), np.random.default_rng(4))
    whole, rng = cleared(net), np.random.default_rng(4)
    maps, trunk_cache = net.features(x, True, rng)
    told, rows, dscores, ddeltas, cache = fast_rcnn.head_step(net, maps, regions, Sampler(name, batch=24), rng)
    assert told == values and not any(g.any() for g in net.grads.values())
    for a, b in zip(rows, chosen):
        assert_array_equal(a, b)
    assert dscores.shape == (told["regions"], 7) and ddeltas.shape == (told["regions"], 28)
    dpooled = net.backward_head(dscores, ddeltas, cache)
    head = cleared(net)
    assert dpooled.shape == (told["regions"], 5, 5, 64) and dpooled.any()
    net.parts["trunk"].backward(net.backward_regions(dscores, ddeltas, cache), trunk_cache)
    for k, g in cleared(net).items():
        assert_array_equal(g, whole[k], err_msg=k)
        assert_array_equal(head[k], 0 if k.startswith("trunk.") else g, err_msg=k)


def test_the_images_losses_add_up_as_sampler_accumulate_says():
    """An image of few survivors weighs as much as the other, or as its regions do (notes, sec. 2.4)."""
    net = small()
    x, regions = given(net)
    few = regions[1]
    regions[1] = fast_rcnn.Regions(*(v[:3] for v in vars(few).values()))
    values, each = {}, []
    for accumulate in fast_rcnn.ACCUMULATE:
        value, chosen = fast_rcnn.step(net, x, regions, Sampler(batch=24, threshold=None, accumulate=accumulate), np.random.default_rng(0))
        values[accumulate] = float(value["loss"])
    assert [len(c) for c in chosen] == [12, 3]
    maps, _ = net.features(x, True)
    for n, (r, c) in enumerate(zip(regions, chosen)):
        rois = np.column_stack([np.full(len(c), float(n)), r.boxes[c]])
        each.append(fast_rcnn.score(net, maps, rois, r.labels[c], r.targets[c], Sampler()))
    assert values["mean_of_means"] == pytest.approx((each[0].mean() + each[1].mean()) / 2, rel=1e-9)
    assert values["global_mean"] == pytest.approx(np.concatenate(each).mean(), rel=1e-9)
    assert abs(values["global_mean"] - values["mean_of_means"]) > 1e-3
    with pytest.raises(ValueError, match=r"^fast_rcnn\.step: there must be Regions for each of 2 images, got 1"):
        fast_rcnn.step(net, x, regions[:1], Sampler(), np.random.default_rng(0))


def test_the_sampler_s_numbers_reach_the_ops(monkeypatch):
    net, seen = small(), []
    x, regions = given(net, 1)
    for name in ("select", "random", "ssd"):
        monkeypatch.setattr(fast_rcnn.ohem, name, lambda *a, op=getattr(ohem, name): (seen.append(a), op(*a))[1])
    for name in ("ohem", "random", "ssd"):
        fast_rcnn.step(net, x, regions, Sampler(name, 16, fraction=0.5, low=0.2, threshold=0.6, per_label=False, ratio=2), np.random.default_rng(0))
    assert seen[0][3:] == (16, 0.6, False) and (seen[1][2], *seen[1][4:]) == (16, 0.5, 0.2, 0.5) and seen[2][3:] == (2, 0.5)
    gammas = []
    monkeypatch.setattr(fast_rcnn.roi_loss, "loss", lambda *a, gamma, op=roi_loss.loss: (gammas.append(gamma), op(*a, gamma=gamma))[1])
    for name in ("focal", "all"):
        fast_rcnn.step(net, x, regions, Sampler(name, gamma=1.5), np.random.default_rng(0))
    assert gammas == [1.5, 0.0]


@pytest.mark.parametrize("name", ["ohem", "ssd", "all", "focal"])
def test_low_keeps_easy_background_out(name):
    net = small()
    x, regions = given(net)
    far = [r.overlaps < 0.2 for r in regions]
    assert all(f.any() for f in far)
    _, chosen = fast_rcnn.step(net, x, regions, Sampler(name, low=0.2, batch=200), np.random.default_rng(0))
    assert not any(f[c].any() for f, c in zip(far, chosen))
    _, chosen = fast_rcnn.step(net, x, regions, Sampler(name, batch=200), np.random.default_rng(0))
    assert any(f[c].any() for f, c in zip(far, chosen))
    assert Sampler("random").low == 0.1 and Sampler("ohem").low == 0


def test_mean_loss_is_that_of_all_regions_and_changes_nothing():
    net = small(dropout=0.5)
    x, regions = given(net)
    regions[0].labels[3] = -1
    before = {k: v.copy() for k, v in net.arrays().items()}
    total, count = 0.0, 0
    for n, r in enumerate(regions):
        scores, deltas, _ = net.forward(x[n:n + 1], np.column_stack([np.zeros(len(r.boxes)), r.boxes]))
        total += roi_loss.each(scores, deltas, r.labels, r.targets).sum()
        count += (r.labels >= 0).sum()
    assert fast_rcnn.mean_loss(net, x, regions, chunk=7) == pytest.approx(total / count, rel=1e-12)
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])
    assert np.isnan(fast_rcnn.mean_loss(net, x, [fast_rcnn.label(SPEC, np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0, int))] * 2))


@pytest.mark.parametrize("sampler", ["ohem", "random"])
def test_overfits_four_images_and_finds_their_objects(sampler):
    net = small(np.float32)
    optimizer = optim.SGD(net, 0.9, form="caffe")
    for i in range(150):
        x, regions = given(net, 4, seed=0)
        fast_rcnn.step(net, x, regions, Sampler(sampler, batch=96), np.random.default_rng(i))
        optimizer.step(0.02)
    testing = fast_rcnn.Testing(short=(96,), longest=192)
    found = [fast_rcnn.detect(net, e.image(), np.concatenate([proposals(e, k), e.boxes]), testing) for k, e in enumerate(EXAMPLES)]
    assert evaluate.mean_ap(evaluate.voc(found, EXAMPLES, scenes.CLASSES)) > 0.8
    better = [fast_rcnn.detect(net, e.image(), np.concatenate([proposals(e, k), e.boxes]), fast_rcnn.Testing(short=(80, 96), longest=192, iterate=True))
              for k, e in enumerate(EXAMPLES)]
    assert evaluate.mean_ap(evaluate.voc(better, EXAMPLES, scenes.CLASSES)) > 0.8
    boxes, labels, scores = fast_rcnn.detect(net, EXAMPLES[0].image(), np.zeros((0, 4)), testing)
    assert boxes.shape == (0, 4) and len(labels) == len(scores) == 0
    outside = np.array([[-50, -50, -40, -40], [5000, 0, 6000, 90], [10, 10, 10, 40.]])
    boxes, _, _ = fast_rcnn.detect(net, EXAMPLES[0].image(), outside, testing)
    assert np.isfinite(boxes).all()


def test_regions_are_pooled_with_their_last_pixel_and_at_the_map_s_scale(monkeypatch):
    net, seen = small(), []
    monkeypatch.setattr(fast_rcnn.roi_pool, "forward", lambda maps, rois, *more, f=fast_rcnn.roi_pool.forward: (
        seen.append((rois.copy(), *more)), f(maps, rois, *more))[1])
    net.regions(np.zeros((2, 9, 9, 64)), np.array([[1, 4, 8, 12, 20.]]))
    assert seen[0][0].tolist() == [[1, 4, 8, 11, 19]] and seen[0][1:] == (5, 0.25, False)
    small(float_bins=True).regions(np.zeros((2, 9, 9, 64)), np.array([[1, 4, 8, 12, 20.]]))
    assert seen[1][1:] == (5, 0.25, True)


def test_look_takes_each_region_at_the_nearest_scale_and_cuts_its_boxes(monkeypatch):
    net, seen = small(), []
    monkeypatch.setattr(net, "regions", lambda maps, rois: (seen.append((maps, rois[:, 1:].tolist())), (
        np.tile(np.arange(7.0), (len(rois), 1)), np.full((len(rois), 28), 2.0), None))[1])
    regions = np.array([[0, 0, 40, 40], [10, 10, 20, 20], [30, 30, 30, 50], [-60, 0, -50, 10.]])
    p, boxes = fast_rcnn.look(net, np.zeros((50, 60, 3), np.uint8), ["small", "large"], np.array([1.0, 4.0]), regions, fast_rcnn.Testing(near=40.0))
    assert [(m, r) for m, r in seen] == [("small", [[0, 0, 40, 40]]), ("large", [[40, 40, 80, 80], [-240, 0, -200, 40]])]
    assert_allclose(p.sum(1), [1, 1, 0, 1])                             # a region without area is not looked at
    side = 10 * np.exp(0.4)
    assert_allclose(boxes[1, 3], [17 - side / 2, 17 - side / 2, 17 + side / 2, 17 + side / 2], rtol=1e-9)
    assert (boxes >= 0).all() and (boxes[..., [0, 2]] <= 60).all() and (boxes[..., [1, 3]] <= 50).all()
    found, _, _ = fast_rcnn.detect(net, np.zeros((50, 60, 3), np.uint8), regions[3:], fast_rcnn.Testing(short=(50,), min_score=0.0))
    assert len(found) == 0                                              # nothing of its box is left in the image


# The tables

@pytest.mark.slow
@pytest.mark.parametrize("table", ["VGG_CNN_M_1024", "VGG16"])
def test_published_nets_have_the_sizes_of_the_notes(table):
    class Zeros:                                                        # no time or memory for random numbers
        def standard_normal(self, shape):
            return np.broadcast_to(np.float32(0), shape)
    spec = Spec(tuple("abcdefghijklmnopqrst"), table)
    net = fast_rcnn.FastRCNN(spec, Zeros(), pretrained=True)
    inputs = {"VGG_CNN_M_1024": 18432, "VGG16": 25088}[table]
    assert net.params["head.fc6.w"].shape == (inputs, 4096) and net.params["classifier.w"].shape[1] == 21 and net.params["regressor.w"].shape[1] == 84
    frozen = {k for k in net.params if k not in net.trained}
    names = {"VGG_CNN_M_1024": ["conv1"], "VGG16": ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]}[table]
    assert frozen == {f"trunk.{n}.{p}" for n in names for p in "wb"}


@pytest.mark.parametrize("change, message", [
    ({"table": "x"}, "table must be one of small"), ({"classes": ()}, "classes must be different names"), ({"classes": ("a", "a")}, "classes must be"),
    ({"std": (0, 1, 1)}, "std must hold 3 finite numbers above 0"), ({"target_std": (1, 1)}, "target_std must hold 4"), ({"dropout": 1}, "dropout lie in"),
    ({"short": ()}, "there must be a short side"), ({"short": 64}, "short must be a tuple"), ({"classes": "ab"}, "classes must be a tuple"), ({"short": (3,)}, "short 0 must be at least 16")])
def test_wrong_specs_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=rf"^fast_rcnn\.Spec: .*{message}"):
        Spec(**{**vars(SPEC), **change})


@pytest.mark.parametrize("change", [{"name": "x"}, {"accumulate": "x"}, {"batch": 0}, {"chunk": 0}, {"fraction": 2}, {"low": 0.6}, {"gamma": -1}, {"gamma": 0.5},
                                    {"threshold": float("nan")}, {"threshold": 2.0}])
def test_wrong_samplers_are_named(change):
    with pytest.raises(ValueError, match=r"^fast_rcnn\.Sampler: "):
        Sampler(**change)




def test_training_scales_are_drawn_and_sides_jittered_within_a_tenth():
    spec, e = Spec(**{**vars(SPEC), "short": (64, 96)}), EXAMPLES[0]
    sides = {min(fast_rcnn.training_image(spec, e, np.zeros((0, 4)), np.random.default_rng(s))[0].shape[:2]) for s in range(12)}
    assert sides == {64, 96}
    one = Example("o", np.zeros((200, 200, 3), np.uint8), (200, 200), np.array([[60, 60, 120, 100.]]), np.array([0]), np.array([False]))
    _, p, boxes, _, _ = fast_rcnn.training_image(spec, one, np.zeros((0, 4)), np.random.default_rng(0), mirror=False, jitter=200)
    moved = abs(p - boxes) / np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    assert (moved.max(0) > 0.09).all() and (moved <= 0.1 + 1e-9).all()
    wide = Example("w", np.zeros((40, 200, 3), np.uint8), (200, 40), np.array([[150, 5, 195, 35.]]), np.array([0]), np.array([False]))
    _, p, boxes, _, _ = fast_rcnn.training_image(Spec(**{**vars(SPEC), "short": (40,), "longest": 400}), wide, np.zeros((0, 4)), np.random.default_rng(0), False, 9)
    assert (box_ops.iou(p, boxes)[:, 0] > 0.6).all()                    # cut at the width of the image, not at its height


def test_untrained_outputs_are_small_as_the_notes_have_it():
    net = small(np.float32)
    assert net.params["regressor.w"].std() == pytest.approx(0.001, rel=0.1) and net.params["classifier.w"].std() == pytest.approx(0.01, rel=0.1)


# Detection in detail

class Answers:
    """A net that gives written answers: the probabilities of regions by their left edge, deltas of 0 but what is said."""

    def __init__(self, p, deltas=None):
        self.spec, self.dtype, self.p, self.deltas, self.asked = Spec(("a", "b"), target_std=(1, 1, 1, 1)), np.dtype(np.float64), p, deltas or {}, []

    def features(self, x):
        return x, None

    def normalise(self, images):
        return np.asarray(images, float)

    def regions(self, maps, rois):
        scale = min(maps.shape[1:3]) / 100
        left = np.round(rois[:, 1] / scale, 6)
        self.asked += [(scale, float(v)) for v in left]
        p = np.array([self.p[v] for v in left])
        deltas = np.zeros((len(rois), 3, 4))
        for n, v in enumerate(left):
            deltas[n] += self.deltas.get(v, 0)
        return np.log(np.column_stack([p, 1 - p.sum(1)])), deltas.reshape(len(rois), 12), None


IMAGE = np.zeros((100, 120, 3), np.uint8)


def test_boxes_go_in_again_and_vote():
    """By hand: R1 from two regions, R2 from those of R1 that score above `again`, NMS of both lists, the kept box voted by both (notes, sec. 1.9)."""
    net = Answers({10.0: [0.8, 0.1], 12.0: [0.6, 0.03], 60.0: [0.04, 0.02]}, {10.0: [0.1, 0, 0, 0]})
    regions = np.array([[10, 10, 30, 30], [60, 60, 80, 80.]])
    net.p[14.0] = [0.5, 0.3]
    testing = fast_rcnn.Testing(short=(100,), min_score=0.01, nms=0.3, iterate=True, again=0.09)
    boxes, labels, scores = fast_rcnn.detect(net, IMAGE, regions, testing)
    # R1: region 10 gives [12, 10, 32, 30] for both classes, 0.8 and 0.1; both go in again: 12 gives itself, 0.6 and 0.03. Class a: 0.8 kept, two votes
    # [12, 10, 32, 30] each. Region 60 is too weak to go in again (0.04, 0.02) but is detected
    assert [v for _, v in net.asked] == [10, 60, 12, 12]
    assert_allclose(boxes[0], [12, 10, 32, 30], rtol=1e-12)
    assert labels.tolist() == [0, 1, 0, 1] and scores == pytest.approx([0.8, 0.1, 0.04, 0.02])
    net.deltas[12.0] = [0.2, 0, 0, 0]                                   # now the second round moves the box on: the vote lies between
    boxes, labels, scores = fast_rcnn.detect(net, IMAGE, regions, testing)
    assert_allclose(boxes[0], np.array([12, 10, 32, 30]) + np.array([1, 0, 1, 0]) * 4 * (0.6 + 0.6) / (0.8 + 0.6 + 0.6), rtol=1e-9)
    assert scores[0] == pytest.approx(0.8)                              # the score stays
    plain = fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(short=(100,), min_score=0.01))[0]
    assert_allclose(plain[0], [12, 10, 32, 30], rtol=1e-12)


def test_scores_limits_and_overlaps_of_detection():
    net = Answers({0.0: [0.9, 0.04], 4.0: [0.8, 1e-9], 60.0: [0.7, 0.2]})
    regions = np.array([[0, 0, 20, 20], [4, 0, 24, 20], [60, 0, 80, 20.]])         # IoU of the first two 2/3

    def found(**more):
        return fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(**{"short": (100,), "min_score": 0.05, **more}))[2]
    assert found() == pytest.approx([0.9, 0.7, 0.2])
    assert found(min_score=0.03) == pytest.approx([0.9, 0.7, 0.2, 0.04])
    assert found(nms=0.7) == pytest.approx([0.9, 0.8, 0.7, 0.2])
    assert found(limit=2) == pytest.approx([0.9, 0.7])
    net.p = dict.fromkeys(net.p, [1 / 3, 1 / 3])
    assert len(found(min_score=1 / 3)) == 0 and len(found(min_score=0.33)) == 4         # above min_score, not at it


class Outputs(Answers):
    """p are the net's outputs themselves, the background's last."""

    def regions(self, maps, rois):
        left = np.round(rois[:, 1] / (min(maps.shape[1:3]) / 100), 6)
        return np.array([self.p[v] for v in left], float), np.zeros((len(rois), 12)), None


def test_raw_scores_rank_by_outputs_and_keep_negative_ones():
    net = Outputs({0.0: [2.0, -1, 9], 40.0: [3.0, -7, -9], 80.0: [-2.5, -6, 0]})
    regions = np.array([[0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20], [30, 30, 30, 50.]])
    boxes, labels, scores = fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(short=(100,), scores="raw", min_score=0.9))     # no min_score
    assert scores.tolist() == [3, 2, -1, -2.5, -6, -7] and labels.tolist() == [0, 0, 1, 0, 1, 1]
    assert_allclose(boxes[:, 0], [40, 0, 0, 80, 80, 40], atol=1e-9)
    _, _, soft = fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(short=(100,), min_score=0.0))
    assert len(soft) == 6 and soft[0] > 0.99 and (soft > 0).all() and (np.diff(soft) <= 0).all()
    p, boxes = fast_rcnn.look(net, IMAGE, [np.zeros((1, 100, 120, 3))], np.array([1.0]), regions, fast_rcnn.Testing(scores="raw", chunk=2))
    assert_array_equal(p, [[2, -1, 9], [3, -7, -9], [-2.5, -6, 0], [-np.inf] * 3])      # the last has no area
    assert_array_equal(boxes[3], 0)


def test_the_best_of_a_class_go_into_nms():
    net = Outputs({0.0: [5.0, 0, 0], 4.0: [4.0, 1, 0], 60.0: [3.0, 2, 0], 90.0: [3.0, 2, 0]})
    regions = np.array([[90, 0, 110, 20], [0, 0, 20, 20], [60, 0, 80, 20], [4, 0, 24, 20.]])

    def found(**more):
        boxes, labels, scores = fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(**{"short": (100,), "scores": "raw", **more}))
        return [(int(k), float(s), round(float(b[0]))) for b, k, s in zip(boxes, labels, scores)]
    assert found() == [(0, 5, 0), (0, 3, 90), (0, 3, 60), (1, 2, 90), (1, 2, 60), (1, 1, 4)]
    assert found(per_class=1) == [(0, 5, 0), (1, 2, 90)]                # equal scores: the first
    assert found(per_class=2) == [(0, 5, 0), (1, 2, 90), (1, 2, 60)]    # the second of class 0 is dropped by the first: none comes after
    assert found(per_class=3) == [(0, 5, 0), (0, 3, 90), (1, 2, 90), (1, 2, 60), (1, 1, 4)]
    assert found(per_class=3, nms=0.9) == [(0, 5, 0), (0, 4, 4), (0, 3, 90), (1, 2, 90), (1, 2, 60), (1, 1, 4)]
    assert found(per_class=4) == found() and [k for k, _, _ in found(scores="softmax", min_score=0.0, per_class=1)] == [0, 1]


def test_many_equal_scores_are_cut_by_order():
    rows = np.arange(100.0)
    net = Outputs({v: [1.0, 0, 0] for v in rows})
    regions = np.stack([rows, rows * 0, rows + 0.5, rows * 0 + 20], 1)[::-1]
    boxes, labels, _ = fast_rcnn.detect(net, IMAGE, regions, fast_rcnn.Testing(short=(100,), scores="raw", per_class=40))
    assert_allclose(boxes[labels == 0, 0], 99 - np.arange(40), atol=1e-9)


def test_a_region_goes_where_its_area_is_nearest():
    net = Answers({0.0: [0.5, 0.1], 10.0: [0.5, 0.1]})
    testing = fast_rcnn.Testing(short=(50, 100), longest=200, near=30.0)
    fast_rcnn.detect(net, IMAGE, np.array([[0, 0, 30, 30], [10, 0, 52, 42.]]), testing)
    # areas at the two scales: 225 and 900, of 900; 441 and 1764: 441 is nearer to 900 than 1764; by sides 21 and 42 it is also; of 45 pixels not
    assert sorted(net.asked) == [(0.5, 10.0), (1.0, 0.0)]
    net.asked.clear()
    fast_rcnn.detect(net, IMAGE, np.array([[10, 0, 49, 39.]]), testing)             # areas 380 and 1521: 520 and 621 off; sides 10.5 and 9 off
    assert net.asked == [(0.5, 10.0)]
    net.asked.clear()
    fast_rcnn.detect(net, IMAGE, np.array([[10, 0, 46, 36.]]), testing)             # areas 324 and 1296: 576 and 396 off
    assert net.asked == [(1.0, 10.0)]
    net.asked.clear()
    fast_rcnn.detect(net, IMAGE, np.array([[10, 0, 49, 39.]]), fast_rcnn.Testing(short=(100,), longest=60))
    assert net.asked == [(0.5, 10.0)]                                   # the long side is at most `longest`


@pytest.mark.parametrize("change", [{"short": ()}, {"short": (8,)}, {"longest": 8}, {"limit": 0}, {"limit": -1}, {"chunk": 0}, {"near": float("nan")}, {"min_score": float("nan")},
                                    {"nms": 1.5}, {"again": -1}, {"vote": float("nan")}, {"near": float("inf")}, {"per_class": 0},
                                    {"per_class": -3}, {"scores": "logit"}])
def test_wrong_testing_is_named(change):
    with pytest.raises(ValueError, match=rf"^fast_rcnn\.Testing: {next(iter(change))}"):
        fast_rcnn.Testing(**change)


def test_raw_scores_do_not_vote():
    with pytest.raises(ValueError, match=r"^fast_rcnn\.Testing: scores must be softmax, or raw without iterate, got 'raw', iterate True"):
        fast_rcnn.Testing(scores="raw", iterate=True)
    assert fast_rcnn.Testing(scores="raw", per_class=7).per_class == 7


def test_tiny_images_are_filled_up():
    net = small(np.float32)
    for shape in ((1, 1, 3), (1, 80, 3), (300, 2, 3)):
        image = np.full(shape, 90, np.uint8)
        boxes, _, _ = fast_rcnn.detect(net, image, np.array([[0, 0, shape[1], shape[0]]], float), fast_rcnn.Testing(short=(64,), longest=100, min_score=0.0))
        assert np.isfinite(boxes).all()


# Files

def test_saved_and_loaded_net_is_the_same(tmp_path):
    net = small(np.float32, target_std=((0.1, 0.1, 0.2, 0.2),) * 6)
    fast_rcnn.save(net, tmp_path / "w.npz", {"short": [96]})
    other, settings = fast_rcnn.load(tmp_path / "w.npz")
    assert other.spec == net.spec and settings == {"short": [96]} and other.dtype == net.dtype
    for k, v in net.arrays().items():
        assert_array_equal(v, other.arrays()[k])


@pytest.mark.parametrize("change, message", [
    ({"model": "overfeat"}, "the weights of 'overfeat'"), ({"spec": {"colour": 1}}, "TypeError"), ({"spec": {**vars(SPEC), "table": "VGG16"}}, r"KeyError\('head.fc6.w'"),
    ({"spec": {**vars(SPEC), "short": 5}}, "short must be a tuple"), ({"spec": {**vars(SPEC), "mean": "x"}}, "could not convert"), ({"settings": 3}, "settings 3"),
    ({"spec": {**vars(SPEC), "target_std": [[1, 1, 1, 1]]}}, "or as many for each class"),
    ({"arrays": {"head.fc6.w": np.zeros((2, 128))}}, r"must have shape \(1600, 128\), got \(2, 128\)")])
def test_files_that_hold_no_net_are_refused(tmp_path, change, message):
    files.write_arrays(tmp_path / "w.npz", change.pop("arrays", {}), {"model": "fast_rcnn", "spec": vars(SPEC), "settings": {}, **change})
    with pytest.raises(ValueError, match=rf"^fast_rcnn\.load: .*w\.npz must describe a net of fast_rcnn, got: .*{message}"):
        fast_rcnn.load(tmp_path / "w.npz")


@pytest.mark.parametrize("difficult, error, got", [(np.array([1]), TypeError, "int64"), ([1], TypeError, "int64"), (np.array([True, False]), ValueError, r"shape \(2,\)")])
def test_wrong_difficult_is_named(difficult, error, got):
    box = np.array([[0, 0, 5, 5.0]])
    with pytest.raises(error, match=rf"^fast_rcnn\.label: difficult must be 1 booleans, got {got}$"):
        fast_rcnn.label(fast_rcnn.Spec(("a",)), box, box, np.array([0]), difficult)
