"""Fast R-CNN trained for mean average precision after NMS, in the spirit of Henderson & Ferrari (1607.03476; ops/map_loss.py says how far).

The loss looks at all windows of all images of a batch, which should hold many (CHOICE: 64): their layers' caches would not fit
into memory. The step here is exact all the same, in two passes (CHOICE): the first runs image by image and keeps scores and boxes alone;
from those of the whole batch follow loss and gradients of the scores; the second runs each image once more, in the same random state, and
backward. Regions without any gradient, which are most, need not run again.

The recipe is this project's own, as none of the paper's could be read: CHOICE throughout.
"""
import dataclasses
from typing import NamedTuple

import numpy as np

from tinydet import checks, optim
from tinydet.backend import array_module, put, scalar, to_numpy
from tinydet.layers import BatchNorm
from tinydet.models import fast_rcnn
from tinydet.ops import box_loss, boxes as box_ops, map_loss, roi_loss

RANKED = ("raw", "log_odds", "log_softmax")
TRAINS = ("head", "all")


@dataclasses.dataclass
class Objective:
    """What a step makes smaller:

        map_weight * L_mAP + box_weight * smooth L1 + softmax_weight * cross-entropy + score_weight * mean of the candidates' s^2

    scores: by what windows rank, see ranking_scores; the pseudo-gradient goes through its Jacobian. estimator to match: as map_loss.loss. clip: limit
    of the norm of L_mAP's gradient by the outputs of the whole batch, before map_weight, None for no limit. s are the outputs, background left out,
    whatever ranks.
    centre: take the mean over a class's candidates off its pseudo-gradient. AP stays where all scores of a class move together, so that a gradient
    of it would sum to 0 over them; the pseudo-gradients, each of one window moved alone, do not: most candidates are false ones that mostly do
    harm, and are pushed down together. With large steps and high rates the true ones go with them. In return those without a pseudo-gradient
    are then pushed up (CHOICE; README has figures).
    Smooth L1: mean over the windows of IoU >= 0.5 with an object; cross-entropy: mean over all windows, ignored ones left out. score_weight: AP is
    the same for all scores times 2; this keeps them in place. The candidates of a class are its `most` best of each image.
    chunk: regions that go through the head together.
    """

    scores: str = "raw"
    estimator: str = "sde"
    delta: float = None
    kappa: float = 1.0
    reach: float = None
    least: float = None
    ap: str = "prec"
    log: bool = False
    most: int = 100
    nms: float = 0.3
    match: float = 0.5
    map_weight: float = 1.0
    box_weight: float = 1.0
    softmax_weight: float = 0.0
    score_weight: float = 1e-4
    clip: float = 1.0
    centre: bool = False
    chunk: int = 1024

    def __post_init__(self):
        op = "fast_rcnn_map.Objective"
        if self.scores not in RANKED:
            raise ValueError(f"{op}: scores must be one of {', '.join(RANKED)}, got {self.scores!r}")
        for name in ("map_weight", "box_weight", "softmax_weight", "score_weight"):
            v = getattr(self, name)
            if not (isinstance(v, (int, float)) and 0 <= v < np.inf):
                raise ValueError(f"{op}: {name} must be finite and at least 0, got {v!r}")
        if not (self.clip is None or isinstance(self.clip, (int, float)) and 0 < self.clip < np.inf):
            raise ValueError(f"{op}: clip must be None or a number above 0, got {self.clip!r}")
        checks.whole(op, 1, chunk=self.chunk)
        nothing = np.zeros((0, 1)), np.zeros((0, 4)), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, int)
        map_loss.loss(*nothing, **self.ranking())                       # refuses what it does not know

    def ranking(self):
        """What map_loss.loss takes of it."""
        return {k: getattr(self, k) for k in ("nms", "match", "most", "ap", "estimator", "delta", "kappa", "reach", "least", "log")}


class View(NamedTuple):
    """One image of a batch, as view() makes it.

    x: (1, H, W, 3) what the trunk takes, or None where maps, (1, h, w, C), are kept; size: (height, width) in its pixels; regions:
    fast_rcnn.Regions, windows alone; boxes (G, 4), labels (G,), difficult (G,): the objects.
    """

    x: np.ndarray
    maps: np.ndarray
    size: tuple
    regions: fast_rcnn.Regions
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


def view(spec, size, proposals, boxes, labels, difficult, x=None, maps=None):
    """A View: windows and objects as fast_rcnn.training_image gives them (with jitter=0), and either x or maps.

    Windows are those that there will be at test time: the objects' own boxes are none (CHOICE). Raises as fast_rcnn.label, and
    ValueError unless there is one of x and maps.
    """
    if (x is None) == (maps is None):
        raise ValueError(f"fast_rcnn_map.view: there must be either x or maps, got {'neither' if x is None else 'both'}")
    return View(x, maps, size, fast_rcnn.label(spec, proposals, boxes, labels, difficult, append=False), boxes, labels, difficult)


def freeze(net, trains):
    """Let the "head" alone train, or "all" layers but batch norm, which keeps its averages: a batch comes image by image. Returns the net.

    What was frozen before, such as the first layers of a pretrained net, trains with "all". Raises ValueError for another word.
    """
    if trains not in TRAINS:
        raise ValueError(f"fast_rcnn_map.freeze: trains must be one of {', '.join(TRAINS)}, got {trains!r}")
    net.freeze(False)
    net.parts["trunk"].freeze(trains == "head")
    for layer in net.leaves().values():
        if isinstance(layer, BatchNorm):
            layer.freeze()
    return net


def step(net, views, objective, seed=(0,)):
    """One step on a batch, exactly as if all of it had gone through the net at once. Gradients add up in `net.grads`.

    views: a list of View; seed: numbers that the random state of dropout comes from, the same one in both passes.
    Returns a dict of numbers: "loss", its terms before their weights "map_loss" (0 where no object counts), "box", "scores" and, where it has a
    weight, "softmax", "norm", that of L_mAP's gradient before the limit, and "rows", the regions that went backward.
    Raises ValueError for an empty batch, for kept maps of a trunk that trains and, on the host, for scores that are not finite. On a GPU the host
    waits for each image: it asks which regions have a gradient.
    """
    scores, deltas = outputs(net, views, objective, seed)
    values, dscores, ddeltas = loss(net, scores, deltas, views, objective)
    return {**values, "rows": backward(net, views, dscores, ddeltas, objective, seed)}


# The two passes

def outputs(net, views, objective, seed):
    """The first pass: scores (n, K + 1) and deltas (n, 4 * (K + 1)) of the regions of all views, in order; nothing else is kept.

    Raises ValueError for an empty batch and for kept maps of a trunk that trains.
    """
    if not views:
        raise ValueError("fast_rcnn_map.step: there must be at least one image, got none")
    if not net.parts["trunk"].frozen and any(v.x is None for v in views):
        raise ValueError("fast_rcnn_map.step: a trunk that trains must see x, got maps that were kept")
    found = []
    for n, v in enumerate(views):
        rng = np.random.default_rng([*seed, n])
        maps, _ = _maps(net, v, rng)
        rois = fast_rcnn.rois_of(maps, 0, v.regions)
        for first in range(0, max(1, len(rois)), objective.chunk):
            found.append(net.regions(maps, rois[first:first + objective.chunk], True, rng)[:2])
    xp = array_module(found[0][0])
    return tuple(xp.concatenate(column) for column in zip(*found))


def backward(net, views, dscores, ddeltas, objective, seed):
    """The second pass: every view forward again and backward. Gradients add up in `net.grads`. Returns how many regions went backward.

    A region without gradient is left out; with dropout none is, for the masks belong to the rows.
    """
    first, ran, trunk = 0, 0, net.parts["trunk"]
    for n, v in enumerate(views):
        part = slice(first, first + len(v.regions.boxes))
        first = part.stop
        dscore, ddelta = dscores[part], ddeltas[part]
        rows = np.arange(len(dscore))
        if not net.spec.dropout:
            rows = np.flatnonzero(to_numpy((dscore != 0).any(1) | (ddelta != 0).any(1)))
        if not len(rows):
            continue
        rng = np.random.default_rng([*seed, n])
        maps, cache = _maps(net, v, rng)
        rois, dmaps = fast_rcnn.rois_of(maps, 0, v.regions), 0
        for at in range(0, len(rows), objective.chunk):
            some = put(rows[at:at + objective.chunk])
            *_, head_cache = net.regions(maps, rois[some], True, rng)
            if trunk.frozen:
                net.backward_head(dscore[some], ddelta[some], head_cache)
            else:
                dmaps = net.backward_regions(dscore[some], ddelta[some], head_cache) + dmaps
        if not trunk.frozen:
            trunk.backward(dmaps, cache)
        ran += len(rows)
    return ran


def _maps(net, v, rng):
    return (v.maps, None) if v.x is None else net.features(v.x, True, rng)


# The loss of a batch

def loss(net, scores, deltas, views, objective):
    """The terms of the objective for what the net says of all regions, (n, K + 1) and (n, 4 * (K + 1)): values, dscores, ddeltas.

    values: what step() tells but "rows"; dscores, ddeltas: shapes and dtypes of scores and deltas.
    The boxes that NMS and matching see follow from deltas, cut at the image, and get no gradient of it (CHOICE). Raises as map_loss.loss.
    """
    K, xp, dtype = net.spec.background, array_module(scores), scores.dtype
    labels, targets = (np.concatenate([getattr(v.regions, name) for v in views]) for name in ("labels", "targets"))
    ddeltas, z, values = xp.zeros_like(deltas), ranking_scores(scores, objective.scores), {}
    values["map_loss"], dz = map_loss.loss(*ranked(net, z, deltas, views), **objective.ranking())
    chosen = candidates(z, views, objective.most)
    if objective.centre:
        dz = xp.where(chosen, dz - dz.sum(0) / xp.maximum(chosen.sum(0), 1).astype(dtype), dtype.type(0))
    dscores = ranking_backward(dz, scores, objective.scores)
    values["norm"] = optim.clip_norm({"scores": dscores}, objective.clip or np.finfo(np.float64).max)
    dscores *= dtype.type(objective.map_weight)

    held = np.flatnonzero((labels >= 0) & (labels < K))
    at, of = xp.asarray(held), xp.asarray(labels[held])
    values["box"], d = box_loss.smooth_l1(deltas.reshape(-1, K + 1, 4)[at, of], xp.asarray(targets[held].astype(dtype.name)))
    ddeltas.reshape(-1, K + 1, 4)[at, of] = dtype.type(objective.box_weight) * d

    kept, count = xp.where(chosen, scores[:, :K], dtype.type(0)), xp.maximum(chosen.sum(), 1).astype(dtype)
    values["scores"] = scalar((kept * kept).sum() / count)
    dscores[:, :K] += dtype.type(2 * objective.score_weight) / count * kept
    weights = {"map_loss": objective.map_weight, "box": objective.box_weight, "scores": objective.score_weight}
    if objective.softmax_weight:
        weights["softmax"] = objective.softmax_weight
        values["softmax"], d, _ = roi_loss.loss(scores, deltas, xp.asarray(labels), xp.asarray(targets.astype(dtype.name)), box_weight=0)
        dscores += dtype.type(objective.softmax_weight) * d
    return {"loss": sum(weight * values[name] for name, weight in weights.items()), **values}, dscores, ddeltas


def ranked(net, z, deltas, views):
    """What the functions of map_loss.py take: scores (n, K), boxes (n, K, 4), image of each row, and the objects.

    A box of which nothing is left in the image stays a candidate here, as a false positive (CHOICE; detect() drops it).
    """
    owner = [np.full(len(v.regions.boxes), n) for n, v in enumerate(views)]
    held = [np.full(len(v.labels), n) for n, v in enumerate(views)]
    boxes, labels, difficult = (np.concatenate([getattr(v, name) for v in views]) for name in ("boxes", "labels", "difficult"))
    return (z, predicted(net, deltas, views), np.concatenate(owner), boxes.astype(z.dtype.name), labels.astype(np.int64), np.concatenate(held),
            difficult.astype(bool))


def predicted(net, deltas, views):
    """(n, K, 4): the box of each region for each class, cut at the image, in the deltas' dtype."""
    K, xp, dtype, first, found = net.spec.background, array_module(deltas), deltas.dtype, 0, []
    mean, std = (xp.asarray(a.astype(dtype.name)) for a in net.spec.normalisation())
    for v in views:
        R = len(v.regions.boxes)
        moved = deltas[first:first + R].reshape(R, K + 1, 4)[:, :K] * std + mean
        anchors = xp.asarray(np.repeat(v.regions.boxes, K, 0).astype(dtype.name))
        found.append(box_ops.clip(box_ops.decode(anchors, moved.reshape(-1, 4)), *v.size).reshape(R, K, 4))
        first += R
    return xp.concatenate(found)


def candidates(z, views, most):
    """(n, K) bool: the `most` best regions of each class in each image; of equal scores the first."""
    xp, first = array_module(z), 0
    chosen = xp.zeros(z.shape, bool)
    for v in views:
        part = z[first:first + len(v.regions.boxes)]
        order = xp.argsort(-part, 0, kind="stable")[:most]
        chosen[first + order, xp.arange(z.shape[1])] = True
        first += len(part)
    return chosen


def ranking_scores(scores, how):
    """(n, K) by which the windows of each class rank, from outputs s (n, K + 1), the background's last (CHOICE; the paper's is not known).

    raw          s_c; the background's output has no part
    log_odds     s_c - log sum_{j != c} exp(s_j) = log(p_c / (1 - p_c)) of the softmax p: ranks as p, and does not saturate (CHOICE)
    log_softmax  log p_c: ranks as p, and near p = 1 hardly moves
    """
    if how == "raw":
        return scores[:, :-1].copy()
    most, top, powers, rest = _odds(scores)
    return (scores - rest if how == "log_odds" else scores - most - array_module(scores).log(powers.sum(1, keepdims=True)))[:, :-1]


def ranking_backward(dz, scores, how):
    """Gradient of the outputs (n, K + 1) from that of ranking_scores, dz (n, K)."""
    xp = array_module(scores)
    dz = xp.pad(dz, ((0, 0), (0, 1)))
    if how == "raw":
        return dz
    most, top, powers, rest = _odds(scores)
    if how == "log_softmax":
        return dz - powers / powers.sum(1, keepdims=True) * dz.sum(1, keepdims=True)
    # -dz_c exp(s_j - rest_c) for all c != j: the largest output apart, beside which exp(most - rest_c) may overflow
    others = xp.where(top, dz.dtype.type(0), dz * xp.exp(xp.minimum(most - rest, 0)))
    own = (dz * top).sum(1, keepdims=True) * xp.where(top, dz.dtype.type(0), xp.exp(xp.minimum(scores - (rest * top).sum(1, keepdims=True), 0)))
    return dz - powers * (others.sum(1, keepdims=True) - others) - own


def _odds(s):
    """The largest output (n, 1), where it is (first of equals) (n, K + 1), exp(s - largest), log sum_{j != c} exp(s_j) of each c."""
    xp = array_module(s)
    most, top = s.max(1, keepdims=True), s.argmax(1)[:, None] == xp.arange(s.shape[1])
    powers = xp.exp(s - most)
    next_ = xp.where(top, -np.inf, s).max(1, keepdims=True).astype(s.dtype)
    beside = next_ + xp.log(xp.where(top, s.dtype.type(0), xp.exp(xp.minimum(s - next_, 0))).sum(1, keepdims=True))     # of the largest: without it
    rest = most + xp.log(xp.where(top, s.dtype.type(1), powers.sum(1, keepdims=True) - powers))
    return most, top, powers, xp.where(top, beside, rest)
