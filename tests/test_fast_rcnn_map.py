"""Fast R-CNN trained for mAP after NMS: the step in two passes is that in one (map-loss notes, sec. 8, property 10), and what its loss is made of."""
import contextlib
import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fake_cupy
from conftest import RUNNING
from tinydet import emulate, optim, to_numpy, use
from tinydet.models import fast_rcnn, fast_rcnn_map
from tinydet.models.fast_rcnn_map import Objective
from tinydet.ops import map_loss

CLASSES = ("a", "b", "c", "d")
K = len(CLASSES)
SIZES = ((48, 64), (56, 40), (32, 52), (44, 44), (40, 60))
EVERYTHING = {"softmax_weight": 0.5, "score_weight": 0.3, "box_weight": 0.7, "most": 6}      # all four terms; few candidates
needs_emulator = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    table = fast_rcnn.Table((("conv1", 4, 2, 1, 4), ("max", 2, 2), ("conv2", 3, 1, 1, 6)), 3, 1 / 4, (16,), norm=True)
    monkeypatch.setitem(fast_rcnn.TABLES, "tiny", table)


def made(dtype=np.float64, trains="all", **spec):
    """A net that says something: scores about 1 apart, boxes moved, running averages of batch norm that are not those of a batch."""
    rng = np.random.default_rng(3)
    spec = fast_rcnn.Spec(CLASSES, "tiny", **{"dropout": 0.0, "target_mean": (0.1, -0.1, 0.05, 0), **spec})
    net = fast_rcnn.FastRCNN(spec, rng, dtype)
    for name, w in net.params.items():
        w *= {"classifier.w": 30, "regressor.w": 20}.get(name, 1)
        w += (0.1 * rng.standard_normal(w.shape) * name.endswith((".b", "beta"))).astype(dtype)
    for name, a in net.arrays().items():
        if name not in net.params:
            a += rng.uniform(0.1, 0.4, a.shape).astype(dtype)
    return fast_rcnn_map.freeze(net, trains) if trains else net


def windows(size, boxes, rng, count):
    """Half of them near the objects, on a grid of 4 pixels and no two alike: then no two scores tie but for rounding."""
    far = rng.uniform(0, 0.6, (count, 2)) * size[::-1]
    far = np.concatenate([far, far + rng.uniform(8, 32, (count, 2))], 1)
    near = boxes[rng.integers(0, len(boxes), count)] + rng.normal(0, 3, (count, 4)) if len(boxes) else far[:0]
    found = np.unique(np.round(np.concatenate([near, far]) / 4) * 4, axis=0)
    return found[(found[:, 2:] >= found[:, :2] + 8).all(1)]


def views_of(net, put=np.asarray, count=5, kept=False, seed=0, held=lambda n, boxes: boxes, most=18):
    """Images of different sizes: the third without windows, the fourth without objects, class "c" only ever difficult, of "d" nothing."""
    found = []
    for n, size in enumerate(SIZES[:count]):
        rng = np.random.default_rng([seed, n])
        corner = rng.uniform(0, 0.5, (4, 2)) * size[::-1]
        boxes = np.concatenate([corner, corner + rng.uniform(12, 24, (4, 2))], 1)[:0 if n == 3 else 4]
        labels, difficult = np.array([0, 1, 2, 0])[:len(boxes)], np.array([False, False, True, n == 1])[:len(boxes)]
        proposals = windows(size, boxes, rng, most)[:0 if n == 2 else None]
        some = held(n, np.ones(len(boxes), bool))
        x = rng.standard_normal((1, *size, 3)).astype(net.dtype)
        for (x1, y1, x2, y2), k in zip(boxes.astype(int), labels):
            x[0, y1:y2, x1:x2, k] += 2                                  # each class has a colour
        x = put(x)
        place = {"maps": net.features(x, True)[0]} if kept else {"x": x}
        found.append(fast_rcnn_map.view(net.spec, size, proposals, boxes[some], labels[some], difficult[some], **place))
    return found


def cleared(net):
    found = {k: to_numpy(g).copy() for k, g in net.grads.items()}
    for g in net.grads.values():
        g[...] = 0
    return found


def stepped(net, views, objective, seed=(0,)):
    """Values and gradients of a step, on the host."""
    values = fast_rcnn_map.step(net, views, objective, seed)
    return {k: float(to_numpy(v)) for k, v in values.items()}, cleared(net)


def same(a, b, tolerance):
    for part, other in zip(a, b):
        assert part.keys() == other.keys()
        for k, v in other.items():
            assert_allclose(part[k], v, rtol=tolerance, atol=tolerance * max(1e-6, np.abs(v).max(initial=0)), err_msg=k)


# The step of one pass: the notes' formulas, written anew

def boxes_by_definition(net, deltas, views):
    """(n, K, 4), box by box."""
    (mean, std), found, row = net.spec.normalisation(), [], 0
    for v in views:
        height, width = v.size
        for x1, y1, x2, y2 in v.regions.boxes:
            for k in range(K):
                dx, dy, dw, dh = deltas[row, 4 * k:4 * k + 4] * std[k] + mean[k]
                x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
                w, h = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
                found.append([min(max(v, 0), most) for v, most in ((x - w / 2, width), (y - h / 2, height), (x + w / 2, width), (y + h / 2, height))])
            row += 1
    return np.array(found).reshape(-1, K, 4)


def candidates_by_definition(z, views, most):
    chosen, first = np.zeros(z.shape, bool), 0
    for v in views:
        rows = range(first, first + len(v.regions.boxes))
        for k in range(z.shape[1]):
            for row in sorted(rows, key=lambda r: (-z[r, k], r))[:most]:
                chosen[row, k] = True
        first += len(rows)
    return chosen


def others(c):
    return [j for j in range(K + 1) if j != c]


def ranking_by_definition(s, how):
    """What one region's outputs rank by, (K,), and the Jacobian (K, K + 1)."""
    if how == "raw":
        return s[:K], np.eye(K + 1)[:K]
    z, jacobian = np.zeros(K), np.zeros((K, K + 1))
    for c in range(K):
        below = list(range(K + 1)) if how == "log_softmax" else others(c)
        largest = s[below].max()
        powers = np.exp(s[below] - largest)
        z[c] = s[c] - largest - np.log(powers.sum())
        jacobian[c, c] = 1
        jacobian[c, below] -= powers / powers.sum()
    return z, jacobian


def loss_by_definition(net, scores, deltas, views, o):
    dscores, ddeltas = np.zeros(scores.shape), np.zeros((len(scores), K + 1, 4))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    ranking = [ranking_by_definition(s, o.scores) for s in scores]
    z = np.array([one for one, _ in ranking]).reshape(-1, K)
    owner, held = (np.repeat(np.arange(len(views)), [len(a(v)) for v in views]) for a in (lambda v: v.regions.boxes, lambda v: v.boxes))
    truth = [np.concatenate([getattr(v, name) for v in views]) for name in ("boxes", "labels", "difficult")]
    values = {}
    values["map_loss"], dz = map_loss.loss(
        z, boxes_by_definition(net, deltas, views), owner, truth[0], truth[1], held, truth[2], nms=o.nms, match=o.match, most=o.most, ap=o.ap,
        estimator=o.estimator, delta=o.delta, kappa=o.kappa, reach=o.reach, least=o.least, log=o.log)
    chosen = candidates_by_definition(z, views, o.most)
    if o.centre:
        for k in range(K):
            dz[chosen[:, k], k] -= dz[:, k].sum() / max(1, chosen[:, k].sum())
    dmap = np.array([d @ jacobian for d, (_, jacobian) in zip(dz, ranking)]).reshape(scores.shape)
    norm = values["norm"] = np.sqrt((dmap ** 2).sum())
    dscores += o.map_weight * dmap * (1 if o.clip is None or norm <= o.clip else o.clip / norm)

    labels, targets = (np.concatenate([getattr(v.regions, name) for v in views]) for name in ("labels", "targets"))
    boxes = [r for r, k in enumerate(labels) if 0 <= k < K]
    values["box"] = 0.0
    for r in boxes:
        d = deltas[r].reshape(K + 1, 4)[labels[r]] - targets[r]
        values["box"] += np.where(abs(d) < 1, d * d / 2, abs(d) - 0.5).sum() / len(boxes)
        ddeltas[r, labels[r]] = o.box_weight * np.clip(d, -1, 1) / len(boxes)

    values["scores"] = (scores[:, :K][chosen] ** 2).sum() / max(1, chosen.sum())
    dscores[:, :K][chosen] += o.score_weight * 2 * scores[:, :K][chosen] / max(1, chosen.sum())
    total = o.map_weight * values["map_loss"] + o.box_weight * values["box"] + o.score_weight * values["scores"]
    if o.softmax_weight:
        counted = np.flatnonzero(labels >= 0)
        values["softmax"] = -np.log(p[counted, labels[counted]]).sum() / max(1, len(counted))
        dscores[counted] += o.softmax_weight * (p[counted] - np.eye(K + 1)[labels[counted]]) / max(1, len(counted))
        total += o.softmax_weight * values["softmax"]
    return {"loss": total, **values}, dscores, ddeltas.reshape(deltas.shape)


def one_pass(net, views, o, seed=(0,)):
    """Each image through the net once, all its regions together; all caches are kept until the loss of the batch is there."""
    said = []
    for n, v in enumerate(views):
        rng = np.random.default_rng([*seed, n])
        maps, trunk_cache = (v.maps, None) if v.x is None else net.features(v.x, True, rng)
        rois = np.column_stack([np.zeros(len(v.regions.boxes)), v.regions.boxes]).astype(net.dtype)
        scores, deltas, cache = net.regions(maps, rois, True, rng)      # one layer of dropout: its masks are the same in chunks
        said.append((scores, deltas, cache, trunk_cache))
    scores, deltas = (np.concatenate([s[k] for s in said]) for k in (0, 1))
    values, dscores, ddeltas = loss_by_definition(net, scores, deltas, views, o)
    first = 0
    for s, d, cache, trunk_cache in said:
        part = slice(first, first + len(s))
        dmaps = net.backward_regions(dscores[part], ddeltas[part], cache)
        if trunk_cache is not None:
            net.parts["trunk"].backward(dmaps, trunk_cache)
        first = part.stop
    found = cleared(net)
    for k, g in found.items():
        if k not in net.trained:
            g[...] = 0
    return values, found, (scores, dscores, ddeltas)


def agree(net, views, objective, seed=(0,)):
    """One pass and two; returns values, gradients, and what the one pass said and wanted."""
    values, grads, wanted = one_pass(net, views, objective, seed)
    told, found = stepped(net, views, objective, seed)
    rows = told.pop("rows")
    same((told, found), (values, grads), 1e-9)
    assert rows == (len(wanted[1]) if net.spec.dropout else (wanted[1].any(1) | wanted[2].any(1)).sum())
    return values, found, wanted


VARIANTS = [dict(scores=scores, dropout=dropout, trains=trains, kept=kept) for scores in fast_rcnn_map.RANKED for dropout in (0.0, 0.5)
            if (scores, dropout) != ("log_softmax", 0.5) for trains, kept in (("all", False), ("head", False), ("head", True))]


@pytest.mark.parametrize("how", VARIANTS, ids=lambda h: " ".join(map(str, h.values())))
def test_two_passes_are_one_pass(how):
    """Several chunks an image; images of different sizes, one without windows, one without objects, a class with only difficult ones."""
    net = made(trains=how["trains"], dropout=how["dropout"])
    views = views_of(net, kept=how["kept"])
    assert {(v.x is None) for v in views} == {how["kept"]} and len({v.size for v in views}) == 5
    assert [len(v.regions.boxes) > 14 for v in views] == [True, True, False, True, True] and len(views[2].regions.boxes) == len(views[3].boxes) == 0
    for estimator in ("sde", "env") if how["trains"] == "all" else ("env",):
        o = Objective(how["scores"], estimator, log=estimator == "env", chunk=7, **EVERYTHING)
        values, grads, (scores, dscores, _) = agree(net, views, o, (5, 2))
        assert 0.2 < values["map_loss"] < (6.5 if o.log else 0.999) and values["box"] > 0.1
        assert all(np.diff(np.sort(np.unique(z.round(12)))).min() > 1e-10 for z in scores.T)        # off the ties
        assert {k for k, g in grads.items() if g.any()} == {*net.trained}
        if how["scores"] == "raw":                                      # nothing but its own term says anything of the background or of class d
            softmax = agree(net, views, dataclasses.replace(o, map_weight=0.0, score_weight=0.0), (5, 2))[2][1]
            assert_allclose(dscores[:, K], softmax[:, K], rtol=1e-9)
    other = stepped(net, views, o, (5, 3))[1]
    assert any(not np.array_equal(g, other[k]) for k, g in grads.items()) == (how["dropout"] > 0)


@pytest.mark.parametrize("options", [{"ap": "interp", "delta": 0.3}, {"ap": "11pt", "nms": 0.5}, {"match": 0.3, "kappa": 2.0},
                                     {"estimator": "env", "reach": 0.5, "least": 0.3},
                                     {"map_weight": 2.5, "clip": 0.01}, {"clip": None, "most": 3, "score_weight": 0.0}, {"box_weight": 0.0}, {"centre": True},
                                     {"centre": True, "scores": "log_odds"}])
def test_every_option_arrives(options):
    net = made()
    views = views_of(net)
    plain = agree(net, views, Objective(**EVERYTHING))
    other = agree(net, views, Objective(**{**EVERYTHING, **options}))
    assert any(not np.allclose(a, b, rtol=1e-6) for a, b in zip(plain[2][1:], other[2][1:]))


def test_a_batch_in_one_chunk_or_many_is_the_same():
    net = made(dropout=0.3)
    views = views_of(net)
    first = stepped(net, views, Objective(chunk=1000, **EVERYTHING))
    for chunk in (1, 16, 17):
        same(stepped(net, views, Objective(chunk=chunk, **EVERYTHING)), first, 1e-10)


def test_gradients_add_up_and_inputs_stay():
    net = made()
    views = views_of(net)
    kept = [(v.x.copy(), v.regions.labels.copy(), v.boxes.copy()) for v in views]
    arrays = {k: v.copy() for k, v in net.arrays().items()}
    _, once = stepped(net, views, Objective(**EVERYTHING))
    for _ in range(2):
        fast_rcnn_map.step(net, views, Objective(**EVERYTHING))
    for k, g in cleared(net).items():
        assert_allclose(g, 2 * once[k], rtol=1e-9, atol=1e-12, err_msg=k)
    for v, (x, labels, boxes) in zip(views, kept):
        assert_array_equal(v.x, x)
        assert_array_equal(v.regions.labels, labels)
        assert_array_equal(v.boxes, boxes)
    for k, v in net.arrays().items():
        assert_array_equal(v, arrays[k], err_msg=k)


def test_float32_is_near():
    wide, narrow = made(), made(np.float32)
    a = stepped(wide, views_of(wide), Objective(**EVERYTHING))
    b = stepped(narrow, views_of(narrow), Objective(**EVERYTHING))
    assert {g.dtype for g in b[1].values()} == {np.dtype(np.float32)}
    same(b, a, 2e-4)


# Rows left out

def watched(net, monkeypatch):
    """How many images the trunk and how many regions the head see."""
    seen = {"images": 0, "regions": 0}
    features, regions = net.features, net.regions

    def look(*args):
        seen["images"] += 1
        return features(*args)

    def pool(maps, rois, *more):
        seen["regions"] += len(rois)
        return regions(maps, rois, *more)
    monkeypatch.setattr(net, "features", look)
    monkeypatch.setattr(net, "regions", pool)
    return seen


def test_regions_without_gradient_do_not_run_again(monkeypatch):
    """Only mAP and boxes: most regions have neither. The image without objects has false positives, that without windows nothing."""
    net = made()
    views, o = views_of(net), Objective(score_weight=0.0, most=3, chunk=5)
    _, _, (_, dscores, ddeltas) = agree(net, views, o)
    needed = dscores.any(1) | ddeltas.any(1)
    assert 0 < needed.sum() < 0.8 * len(needed)
    seen = watched(net, monkeypatch)
    values, _ = stepped(net, views, o)
    images = sum(part.any() for part in np.split(needed, np.cumsum([len(v.regions.boxes) for v in views])))
    assert values["rows"] == needed.sum() and seen == {"images": 5 + images, "regions": len(needed) + needed.sum()} and 2 <= images <= 4


def test_with_dropout_all_run_again(monkeypatch):
    net = made(dropout=0.2, trains="head")
    views = views_of(net, kept=True)
    seen = watched(net, monkeypatch)
    values, _ = stepped(net, views, Objective(score_weight=0.0, most=3, chunk=5))
    n = sum(len(v.regions.boxes) for v in views)
    assert values["rows"] == n and seen == {"images": 0, "regions": 2 * n}


# Little or nothing to learn from

def test_without_any_object_map_says_nothing():
    """No object, or difficult ones alone: 0, and no gradient of that term."""
    net = made()
    for held in (lambda n, some: some & False, lambda n, some: some & (np.arange(len(some)) == 2)):
        views = views_of(net, held=held)
        for scores in fast_rcnn_map.RANKED:
            o = Objective(scores, log=True, **EVERYTHING)
            values, grads, _ = agree(net, views, o)
            assert values["map_loss"] == values["box"] == 0 and values["softmax"] > 0
            assert all(np.isfinite(g).all() for g in grads.values())
            _, without = stepped(net, views, dataclasses.replace(o, map_weight=0.0))
            assert all((grads[k] == g).all() for k, g in without.items())
            nothing, grads = stepped(net, views, dataclasses.replace(o, score_weight=0.0, softmax_weight=0.0))
            assert nothing["loss"] == 0 and nothing["rows"] == 0 and not any(g.any() for g in grads.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_any_window_nothing_is_found(dropout):
    net = made(dropout=dropout)
    views = [views_of(net, seed=s)[2] for s in (0, 1)]
    for scores in fast_rcnn_map.RANKED:
        values, grads, _ = agree(net, views, Objective(scores, **EVERYTHING))
        assert values["map_loss"] == 1 and values["box"] == values["scores"] == values["softmax"] == 0
        assert not any(g.any() for g in grads.values())


def test_a_class_of_difficult_objects_alone_is_left_out():
    """Class c counts no object: its scores get no pseudo-gradient, but the mean is not lowered either. Class d likewise."""
    net = made()
    views = views_of(net)
    o = Objective(score_weight=0.0, box_weight=0.0)
    scores, deltas = fast_rcnn_map.outputs(net, views, o, (0,))
    values, dscores, ddeltas = fast_rcnn_map.loss(net, scores, deltas, views, o)
    assert dscores[:, :2].any(0).all() and not dscores[:, 2:].any() and not ddeltas.any()
    rows = fast_rcnn_map.ranked(net, scores[:, :K], deltas, views)
    aps, _, _ = map_loss.average_precisions(*rows)
    assert np.isnan(aps[2:]).all() and values["map_loss"] == pytest.approx(1 - aps[:2].mean(), rel=1e-12)


@pytest.mark.parametrize("name, message", [("classifier.b", "scores must be finite"), ("regressor.b", "boxes must be finite")])
@pytest.mark.parametrize("scores", fast_rcnn_map.RANKED)
def test_outputs_that_are_not_finite_are_named(name, message, scores):
    net = made()
    net.params[name][1] = np.nan
    with pytest.raises(ValueError, match=rf"^map_loss\.loss: {message}, got NaN"):
        fast_rcnn_map.step(net, views_of(net), Objective(scores))
    assert not any(g.any() for g in net.grads.values())


# The terms of the loss

@pytest.mark.parametrize("scores, weights", [("raw", {"box_weight": 1.3}), ("raw", {"softmax_weight": 0.7}),
                                             ("log_odds", {"score_weight": 0.4, "box_weight": 0.5, "softmax_weight": 2.0})],
                         ids=lambda w: " ".join(w) if isinstance(w, dict) else w)
def test_the_other_terms_are_derivatives_of_the_loss(scores, weights):
    """Central differences in every output. mAP, which has no derivative, weighs nothing."""
    net = made()
    views = views_of(net, count=2, most=3)
    o = Objective(scores, map_weight=0.0, most=2, **{"box_weight": 0.0, "score_weight": 0.0, **weights})
    said = fast_rcnn_map.outputs(net, views, o, (0,))
    assert any((v.regions.labels == -1).any() for v in views) and any((v.regions.labels < K).any() for v in views)
    values, *grads = fast_rcnn_map.loss(net, *said, views, o)
    names = {"box_weight": "box", "softmax_weight": "softmax", "score_weight": "scores"}
    assert values["loss"] == pytest.approx(sum(w * values[names[name]] for name, w in weights.items()), rel=1e-12)
    assert ("softmax" in values) == ("softmax_weight" in weights)
    for a, d in zip(said, grads):
        for at in range(a.size):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [b.copy() if b is a else b for b in said]
                moved[0 if a is said[0] else 1].flat[at] += step
                ends.append(fast_rcnn_map.loss(net, *moved, views, o)[0]["loss"])
            assert abs((ends[0] - ends[1]) / 2e-6 - d.flat[at]) < 1e-8, at
    assert grads[1].any() == ("box_weight" in weights) and grads[0].any() == (set(weights) != {"box_weight"})


@pytest.mark.parametrize("how", fast_rcnn_map.RANKED)
def test_the_pseudo_gradient_goes_through_the_jacobian(how):
    """Differences of what ranks, in every output, times what map_loss says of it."""
    net = made()
    views, o = views_of(net), Objective(how, score_weight=0.0, clip=None)
    scores, deltas = fast_rcnn_map.outputs(net, views, o, (0,))

    def z(s):
        sums = {"raw": np.zeros((len(s), K)), "log_softmax": np.logaddexp.reduce(s, 1)[:, None],
                "log_odds": np.stack([np.logaddexp.reduce(s[:, others(c)], 1) for c in range(K)], 1)}
        return s[:, :K] - sums[how]
    assert_allclose(fast_rcnn_map.ranking_scores(scores, how), z(scores), rtol=1e-12, atol=1e-12)
    _, dz = map_loss.loss(*fast_rcnn_map.ranked(net, z(scores), deltas, views), **o.ranking())
    expected = np.zeros(scores.shape)
    for j in range(K + 1):
        step = 1e-6 * np.eye(K + 1)[j]
        expected[:, j] = ((z(scores + step) - z(scores - step)) / 2e-6 * dz).sum(1)
    values, dscores, _ = fast_rcnn_map.loss(net, scores, deltas, views, o)
    assert abs(dz).max() > 0.01 and (abs(expected[:, K]).max() > 1e-4) == (how != "raw")
    assert_allclose(dscores, expected, rtol=1e-6, atol=1e-9)
    assert values["norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize("how", fast_rcnn_map.RANKED)
def test_large_and_equal_outputs_rank_and_pull_as_others(how):
    """Two outputs far above the rest, one far above, the largest twice, all equal: each as the definition has it, without overflow."""
    s = np.array([[3000.0, 0, -3000, 1, 2], [0, 900, 0, 0, 901], [5, 5, 1, 2, 5], [2, 2, 2, 2, 2], [-700, -2000, -1, -2, 750], [1, 2, 3, 40, 39.5]])
    dz = np.random.default_rng(0).standard_normal((len(s), K))
    expected = [ranking_by_definition(row, how) for row in s]
    assert_allclose(fast_rcnn_map.ranking_scores(s, how), [z for z, _ in expected], rtol=1e-12, atol=1e-12)
    assert_allclose(fast_rcnn_map.ranking_backward(dz, s, how), [d @ jacobian for d, (_, jacobian) in zip(dz, expected)], rtol=1e-9, atol=1e-12)
    narrow = fast_rcnn_map.ranking_backward(dz.astype(np.float32), s.astype(np.float32), how)
    assert narrow.dtype == np.float32
    assert_allclose(narrow, [d @ jacobian for d, (_, jacobian) in zip(dz, expected)], rtol=1e-4, atol=1e-4)


def test_log_odds_and_log_softmax_rank_as_the_probability():
    s = np.random.default_rng(0).normal(0, 3, (50, K + 1))
    p = (np.exp(s) / np.exp(s).sum(1, keepdims=True))[:, :K]
    assert_allclose(fast_rcnn_map.ranking_scores(s, "log_softmax"), np.log(p), rtol=1e-9)
    assert_allclose(fast_rcnn_map.ranking_scores(s, "log_odds"), np.log(p / (1 - p)), rtol=1e-6, atol=1e-9)


def test_clip_limits_the_pseudo_gradient_of_the_batch_alone():
    net = made()
    views = views_of(net)
    for scores in fast_rcnn_map.RANKED:
        alone = {"scores": scores, "score_weight": 0.0}
        said = fast_rcnn_map.outputs(net, views, Objective(), (0,))

        def pulls(**options):
            return fast_rcnn_map.loss(net, *said, views, Objective(**{**alone, **options}))[1]
        free = pulls(clip=None)
        norm = np.linalg.norm(free)
        assert_array_equal(pulls(clip=2 * norm), free)
        assert_allclose(pulls(clip=norm / 8), free / 8, rtol=1e-12)
        assert_allclose(pulls(clip=norm / 8, map_weight=3.0), free * 3 / 8, rtol=1e-12)
        others = pulls(map_weight=0.0, score_weight=2.0, softmax_weight=5.0)
        assert np.linalg.norm(others) > norm / 8                        # the other terms are not cut
        assert_allclose(pulls(clip=norm / 8, score_weight=2.0, softmax_weight=5.0) - others, free / 8, rtol=1e-9, atol=1e-12)


def test_centred_pseudo_gradients_sum_to_zero_over_the_candidates():
    net = made()
    views = views_of(net)
    said = fast_rcnn_map.outputs(net, views, Objective(), (0,))
    alone = {"scores": "raw", "score_weight": 0.0, "clip": None, "most": 6, "delta": 0.7}
    plain, centred = (fast_rcnn_map.loss(net, *said, views, Objective(**alone, centre=centre))[1] for centre in (False, True))
    chosen = fast_rcnn_map.candidates(fast_rcnn_map.ranking_scores(said[0], "raw"), views, 6)
    moved = abs(plain).sum(0)[:K] > 0
    assert moved.any() and (abs(plain.sum(0)[:K][moved]) > 1e-6).all() and not centred[:, :K][~chosen].any()
    assert_allclose(centred.sum(0), 0, atol=1e-15)
    assert_array_equal(centred[:, :K][:, ~moved], 0)
    assert_allclose(np.diff(centred[:, :K][chosen[:, 0], 0]), np.diff(plain[:, :K][chosen[:, 0], 0]), rtol=1e-9, atol=1e-15)        # only shifted


# Boxes and candidates

def test_predicted_boxes_are_those_of_detection(monkeypatch):
    """The same image, regions and net: what look() gives detect() is what NMS and matching see in training."""
    each = np.random.default_rng(0).uniform(0.1, 0.3, (2, K, 4))
    net = made(target_mean=tuple(map(tuple, each[0] - 0.2)), target_std=tuple(map(tuple, each[1])))
    seen, look = [], fast_rcnn.look
    monkeypatch.setattr(fast_rcnn, "look", lambda *a: (seen.append(look(*a)), seen[-1])[1])
    views, rng = [], np.random.default_rng(1)
    for n, size in enumerate(((48, 64), (61, 45))):
        image, boxes = rng.integers(0, 256, (*size, 3), np.uint8), np.array([[4.0, 4, 30, 28]])
        proposals = np.concatenate([windows(size, boxes, rng, 20), [[-8, -8, 20, 30], [30, 20, 80, 90]]])
        views.append(fast_rcnn_map.view(net.spec, size, proposals, boxes, np.array([1]), np.array([False]), x=fast_rcnn.batch(net, [image])))
        fast_rcnn.detect(net, image, proposals, fast_rcnn.Testing(short=(min(size),), scores="raw", per_class=100, chunk=11))
    scores, deltas = fast_rcnn_map.outputs(net, views, Objective(), (0,))
    expected_scores, expected = (np.concatenate(column) for column in zip(*seen))
    found = fast_rcnn_map.predicted(net, deltas, views)
    assert_allclose(scores, expected_scores, rtol=1e-9, atol=1e-12)
    assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert_allclose(found, boxes_by_definition(net, deltas, views), rtol=1e-9, atol=1e-9)
    first = len(views[0].regions.boxes)
    edges = found[:first].reshape(-1, 4).max(0), found[first:].reshape(-1, 4).max(0)
    assert edges[0].tolist()[2:] == [64, 48] and edges[1].tolist()[2:] == [45, 61] and found.min() == 0        # each cut at its own image
    narrow = made(np.float32)
    assert fast_rcnn_map.predicted(narrow, deltas.astype(np.float32), views).dtype == np.float32


def plain(*counts):
    """Views of so many regions, without anything else."""
    return [fast_rcnn_map.View(None, None, (9, 9), fast_rcnn.Regions(np.zeros((n, 4)), *[None] * 3), *[None] * 3) for n in counts]


@pytest.mark.parametrize("most", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("values", [1, 2, 5, 10**6])
def test_candidates_are_the_best_of_each_image_and_class(most, values):
    """Ties, that is all of few values: the first."""
    views = plain(3, 0, 120, 17, 1)
    z = np.random.default_rng(values).integers(0, values, (141, 3)) / 4
    for dtype in (np.float32, np.float64):
        assert_array_equal(fast_rcnn_map.candidates(z.astype(dtype), views, most), candidates_by_definition(z, views, most))


def test_candidates_are_those_of_map_loss():
    """Among many equal scores, too: the penalty is on what ranks."""
    views, rng = plain(60, 50), np.random.default_rng(0)
    z = rng.integers(0, 3, (110, 2)).astype(float)
    corner = 20.0 * np.arange(110)[:, None]
    truth = np.array([[-50.0, 0, -40, 9]] * 2), np.array([0, 1]), np.array([0, 0])
    _, kept, _ = map_loss.average_precisions(z, corner + [0, 0, 9, 9], np.repeat([0, 1], [60, 50]), *truth, most=20)
    # apart from each other: NMS keeps all candidates
    assert kept.sum() == 80
    assert_array_equal(fast_rcnn_map.candidates(z, views, 20), kept)


def test_a_view_has_windows_alone_and_x_or_maps():
    spec = made().spec
    boxes, labels, difficult = np.array([[0, 0, 20, 20], [10, 10, 30, 30.]]), np.array([3, 1]), np.array([False, True])
    proposals = np.array([[0, 0, 20, 18], [10, 10, 30, 31], [40, 40, 50, 50.]])
    v = fast_rcnn_map.view(spec, (60, 60), proposals, boxes, labels, difficult, x=np.zeros((1, 60, 60, 3)))
    assert_array_equal(v.regions.boxes, proposals)                      # no object among them
    assert v.regions.labels.tolist() == [3, -1, K] and v.boxes is boxes and v.difficult is difficult and v.maps is None
    for given, got in (({}, "neither"), ({"x": 1, "maps": 1}, "both")):
        with pytest.raises(ValueError, match=rf"^fast_rcnn_map\.view: there must be either x or maps, got {got}"):
            fast_rcnn_map.view(spec, (60, 60), proposals, boxes, labels, difficult, **given)
    with pytest.raises(ValueError, match=r"^fast_rcnn\.label: proposals must be finite"):
        fast_rcnn_map.view(spec, (60, 60), proposals * np.nan, boxes, labels, difficult, x=1)


# What trains

@pytest.mark.parametrize("kept", [False, True])
def test_a_frozen_trunk_keeps_its_bits(kept):
    net = made(trains="head")
    optimizer = optim.SGD(net, 0.9, 5e-4)
    before = {k: v.copy() for k, v in net.arrays().items()}
    fast_rcnn_map.step(net, views_of(net, kept=kept), Objective(**EVERYTHING))
    optimizer.step(0.1)
    assert net.parts["trunk"].frozen
    assert {k for k, v in net.arrays().items() if (v != before[k]).any()} == {k for k in before if not k.startswith("trunk.")}
    assert {k for k in before if k.endswith((".mean", ".var"))}


@pytest.mark.parametrize("before", [None, "head", "trunk.conv1", "classifier"])
def test_batch_norm_keeps_its_bits_where_all_trains(before):
    """Whatever was frozen before."""
    net = made(trains=None)
    if before:
        (fast_rcnn_map.freeze(net, "head") if before == "head" else net.leaves()[before].freeze())
    assert fast_rcnn_map.freeze(net, "all") is net
    optimizer = optim.SGD(net, 0.9, 5e-4)
    before = {k: v.copy() for k, v in net.arrays().items()}
    fast_rcnn_map.step(net, views_of(net), Objective(**EVERYTHING))
    optimizer.step(0.1)
    stays = {k for k, v in net.arrays().items() if (v == before[k]).all()}
    assert stays == {f"trunk.conv{n}_norm.{name}" for n in (1, 2) for name in ("gamma", "beta", "mean", "var")}
    assert not net.parts["trunk"].frozen


def test_freeze_refuses_what_it_does_not_know():
    net = made(trains=None)
    for trains in ("trunk", None, ""):
        with pytest.raises(ValueError, match=rf"^fast_rcnn_map\.freeze: trains must be one of head, all, got {trains!r}"):
            fast_rcnn_map.freeze(net, trains)
    assert not any(layer.frozen for layer in net.leaves().values()) and fast_rcnn_map.freeze(net, "head") is net


def test_kept_maps_are_refused_where_the_trunk_trains():
    net = made(trains="all")
    with pytest.raises(ValueError, match=r"^fast_rcnn_map\.step: a trunk that trains must see x, got maps that were kept$"):
        fast_rcnn_map.step(net, views_of(net, kept=True), Objective())


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"^fast_rcnn_map\.step: there must be at least one image, got none"):
        fast_rcnn_map.step(made(), [], Objective())


@pytest.mark.parametrize("change, message", [
    ({"scores": "softmax"}, r"fast_rcnn_map\.Objective: scores must be one of raw, log_odds, log_softmax, got 'softmax'"),
    *(({f"{name}_weight": bad}, rf"fast_rcnn_map\.Objective: {name}_weight must be finite and at least 0, got {bad}")
      for name, bad in (("map", -1.0), ("box", float("nan")), ("softmax", float("inf")), ("score", -1e-9))),
    *(({"clip": bad}, rf"fast_rcnn_map\.Objective: clip must be None or a number above 0, got {bad}")
      for bad in (0, -1.0, float("nan"), float("inf"))),
    ({"clip": "x"}, r"fast_rcnn_map\.Objective: clip must be None or a number above 0, got 'x'$"),
    *(({f"{name}_weight": bad}, rf"fast_rcnn_map\.Objective: {name}_weight must be finite and at least 0, got {bad!r}$")
      for name, bad in (("map", "1"), ("box", "0.5"), ("softmax", "x"), ("score", None))),
    ({"chunk": 0}, r"fast_rcnn_map\.Objective: chunk must be"), ({"chunk": 1.5}, r"fast_rcnn_map\.Objective: chunk must be"),
    ({"estimator": "fd"}, r"map_loss\.loss: estimator must be"), ({"delta": 0}, r"map_loss\.loss: delta must be a number above 0"),
    ({"kappa": -1}, r"map_loss\.loss: kappa"), ({"reach": 0}, r"map_loss\.loss: reach"), ({"least": float("inf")}, r"map_loss\.loss: least"),
    ({"ap": "voc"}, r"map_loss\.loss: ap must be one of"), ({"most": 0}, r"map_loss\.loss: most"), ({"nms": 1.5}, r"map_loss\.loss: nms and match"),
    ({"match": float("nan")}, r"map_loss\.loss: nms and match")])
def test_wrong_objectives_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Objective(**change)


# Backends

@pytest.mark.parametrize("how", [{}, {"scores": "log_odds", "estimator": "env", "log": True, "dropout": 0.4, "trains": "head", "kept": True}],
                         ids=["raw", "log_odds"])
def test_all_backends_agree(how):
    how = dict(how)
    spec, trains, kept = {"dropout": how.pop("dropout", 0.0)}, how.pop("trains", "all"), how.pop("kept", False)
    found = {}
    for name in RUNNING:
        with use(name) as put:
            net = made(trains=trains, **spec).to(put)
            found[name] = stepped(net, views_of(net, put, kept=kept), Objective(chunk=9, **how, **EVERYTHING))
            narrow = made(np.float32, trains, **spec).to(put)
            found[name] += stepped(narrow, views_of(narrow, put, kept=kept), Objective(chunk=9, **how, **EVERYTHING))
    for name in RUNNING[1:]:
        same(found[name][:2], found["numpy"][:2], 1e-9)
        same(found[name][2:], found["numpy"][2:], 1e-5)


@needs_emulator
@pytest.mark.parametrize("how", VARIANTS[::5] + VARIANTS[1::5], ids=lambda h: " ".join(map(str, h.values())))
def test_on_a_gpu_the_step_is_that_of_the_host(how):
    """And stays there: with dropout nothing is read at all, without it which rows have a gradient, once an image."""
    o = Objective(how["scores"], chunk=9, **EVERYTHING)
    with use("numpy") as put:
        net = made(trains=how["trains"], dropout=how["dropout"])
        expected = stepped(net, views_of(net, put, kept=how["kept"]), o)
    with fake_cupy.installed(), use("cuda") as put:
        net = made(trains=how["trains"], dropout=how["dropout"]).to(put)
        views = views_of(net, put, kept=how["kept"])
        fake_cupy.copies.clear()
        with fake_cupy.no_copies() if how["dropout"] else contextlib.nullcontext():
            values = fast_rcnn_map.step(net, views, o)
        assert fake_cupy.copies == ([] if how["dropout"] else [".get()"] * len(views))
        assert all(isinstance(v, fake_cupy.ndarray) and v.shape == () for k, v in values.items() if k != "rows")
        assert {"roi_pool_forward", "map_loss_gradients"} <= {*fake_cupy.launches}
        assert ("roi_pool_backward" in fake_cupy.launches) == (how["trains"] == "all")
        found = {k: float(to_numpy(v)) for k, v in values.items()}, cleared(net)
    same(found, expected, 1e-9)


@needs_emulator
def test_on_a_gpu_the_loss_copies_nothing_and_what_is_not_finite_becomes_nan():
    with fake_cupy.installed(), use("cuda") as put:
        net = made().to(put)
        views = views_of(net, put)
        for scores in fast_rcnn_map.RANKED:
            o = Objective(scores, **EVERYTHING)
            said = fast_rcnn_map.outputs(net, views, o, (0,))
            with fake_cupy.no_copies():
                values, *grads = fast_rcnn_map.loss(net, *said, views, o)
                chosen = fast_rcnn_map.candidates(said[0], views, 4)
            assert all(isinstance(a, fake_cupy.ndarray) for a in (*grads, chosen, *said)) and [g.shape for g in grads] == [s.shape for s in said]
            said[0][3, 1] = np.nan
            with fake_cupy.no_copies():
                values, *_ = fast_rcnn_map.loss(net, *said, views, o)
            assert np.isnan(to_numpy(values["loss"]))


# It learns

def test_a_few_steps_raise_the_map_of_the_batch():
    """From scores that say little to most that the windows allow; one image has objects and no window."""
    net = made(np.float32)
    views, o = views_of(net, most=16), Objective(kappa=0.5, score_weight=1e-3)
    optimizer, told = optim.SGD(net, 0.9), []
    for i in range(40):
        told.append(1 - fast_rcnn_map.step(net, views, o, (i,))["map_loss"])
        optimizer.step(0.01)
    assert told[0] < 0.1 and np.mean(told[-5:]) > 0.5
