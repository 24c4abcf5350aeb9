"""Which regions of an image train: the hardest (OHEM), and what it is compared with: random quotas (Fast R-CNN) and 3:1 (SSD)."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module, to_numpy
from tinydet.ops import nms, sort


def select(losses, boxes, labels, batch, threshold=0.7, per_label=True, plus_one=False):
    """The hardest `batch` regions of one image, of near-duplicates only the hardest (OHEM, 1604.03540, sec. 4.1, unverified; its code).

    In order of loss, a region is dropped if its IoU with one kept before is above `threshold`: two regions over the same cells would count
    one loss twice. per_label=True: only with those of its label (the released code); False: with all (as the paper's text reads).
    threshold: in [0, 1] (0.7 in the paper); None: none is dropped. Then the first `batch` of what is left. plus_one: inclusive pixels (boxes.py).
    losses: (R,) roi_loss.each, boxes: (R, 4) in pixels of the net's input, one float dtype; labels: (R,) integers, background included; -1
    (ignored: at a difficult object) is never chosen and drops no other.
    Returns the indices chosen, int64, hardest first, min(batch, survivors) of them; equal losses in order of index. R = 0 gives none.
    Raises FloatingPointError for a loss that is not finite (sorting would hide it), ValueError for shapes, a threshold out of range and a batch
    below 1, TypeError for dtypes. On a GPU losses are looked at together with the number chosen, which is read once, and where nms chooses
    it raises ValueError first.
    """
    op = "ohem.select"
    checks.float_array(op, "losses", losses)
    checks.float_array(op, "boxes", boxes, f"({len(losses)}, 4)")
    checks.same_dtype(op, losses=losses, boxes=boxes)
    checks.integers(op, "labels", labels, (len(losses),))
    checks.whole(op, 1, batch=batch)
    xp = array_module(losses)
    bad = ~xp.isfinite(losses)
    if checks.on_host(losses):
        _refuse(op, bad.sum(), losses[bad])
    ignored = labels < 0
    scores = xp.where(ignored, losses.dtype.type(-1), losses)           # behind all others: a loss is at least 0
    groups = labels if per_label else ignored                           # those ignored meet each other alone
    if threshold is None:
        chosen = sort.argsort(scores, descending=True)[:batch].astype(np.int64)
    else:
        chosen = nms.nms(boxes, scores, threshold, plus_one=plus_one, limit=batch, groups=groups.astype(np.int64))
    found, wrong = to_numpy(xp.stack([(~ignored[chosen]).sum(), bad.sum()]))
    _refuse(op, wrong, losses[bad] if wrong else None)
    return chosen[:int(found)]


def _refuse(op, wrong, bad):
    if wrong:
        raise FloatingPointError(f"{op}: losses must be finite, got {float(bad[0])}: lower the learning rate or check the data")


def random(labels, overlaps, batch, rng, fraction=0.25, low=0.1, high=0.5):
    """Fast R-CNN's heuristics: up to round(fraction * batch) regions of a class, the rest background (1504.08083, sec. 2.3; its code).

    Background are the regions whose overlap lies in [low, high): below low is "easy" and never used; low = 0 drops that rule. Where regions of a
    class are short, background takes their places; where background is short, nothing does: the batch is smaller (the released code).
    labels: (R,) integers, -1 ignored, overlaps: (R,) float, largest IoU with an object, both NumPy arrays; a region counts as of a class where
    overlap >= high. Drawn without replacement by rng, a numpy.random.Generator. round: halves up. Returns indices, int64, those of a class
    first, each part in rising order, at most batch. R = 0 gives none. Raises ValueError for shapes, a batch below 1 and numbers out of range,
    TypeError for dtypes.
    """
    op = "ohem.random"
    _regions(op, labels, overlaps)
    checks.whole(op, 1, batch=batch)
    if not (0 <= fraction <= 1 and 0 <= low <= high <= 1):
        raise ValueError(f"{op}: fraction must lie in [0, 1] and 0 <= low <= high <= 1, got {fraction}, {low}, {high}")
    positive = np.flatnonzero((labels >= 0) & (overlaps >= high))
    negative = np.flatnonzero((labels >= 0) & (overlaps < high) & (overlaps >= low))
    positive = _draw(positive, int(np.floor(fraction * batch + 0.5)), rng)
    return np.concatenate([positive, _draw(negative, batch - len(positive), rng)])


def ssd(losses, labels, overlaps, ratio=3, high=0.5):
    """SSD's mining: all regions of a class, and `ratio` times as many of the hardest of the background (SSD's released code, MineHardExamples).

    Ranked by the classification loss alone, no NMS; an image without a region of a class trains nothing.
    losses: (R,) float32 or float64, classification losses; labels: (R,) integers, -1 ignored; overlaps: (R,) float32 or float64, largest IoU with
    an object; NumPy arrays. A region counts as of a class where overlap >= high. ratio: an integer, 0 or more.
    Returns indices, int64: of a class, in order, then background, hardest first (ties: the lower index). Divide by the number of the former.
    R = 0 gives none.
    Raises ValueError for shapes, for losses that are not finite and a ratio below 0, TypeError for dtypes and a ratio that is no integer.
    """
    op = "ohem.ssd"
    _regions(op, labels, overlaps)
    checks.float_array(op, "losses", losses, f"({len(labels)},)")
    checks.finite(op, losses=losses)
    checks.whole(op, 0, ratio=ratio)
    positive = np.flatnonzero((labels >= 0) & (overlaps >= high))
    negative = np.flatnonzero((labels >= 0) & (overlaps < high))
    hardest = negative[np.argsort(-losses[negative], kind="stable")]
    return np.concatenate([positive, hardest[:ratio * len(positive)]])


def _regions(op, labels, overlaps):
    checks.integers(op, "labels", labels, (len(labels),))
    checks.float_array(op, "overlaps", overlaps, f"({len(labels)},)")


def _draw(indices, count, rng):
    """`count` of the indices, in rising order; all of them where there are no more."""
    return indices if len(indices) <= count else np.sort(rng.choice(indices, count, replace=False))
