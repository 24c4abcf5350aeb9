"""Average precision and recall as COCO defines them (cocoapi's cocoeval.py), bit for bit what pycocotools computes.

One difference: pycocotools takes the number 0 in place of an id for "unmatched", so what finds the object whose id is 0 counts
as false there. Here ids do not matter. Matching and accumulation are there twice: in NumPy, as the rules read, and in Numba.
"""
import dataclasses

import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import pick
from tinydet.coco import Annotations, Detections

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)                                    # ten of them are not k/100
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}      # closed intervals
MOST = np.array([1, 10, 100])                                       # the best detections of an image and class
NUMBERS = {"AP": "IoU 0.50:0.95", "AP50": "IoU 0.50", "AP75": "IoU 0.75", "APs": "small objects, area up to 32^2",
           "APm": "medium objects, 32^2 to 96^2", "APl": "large objects, from 96^2", "AR1": "1 detection an image and class",
           "AR10": "10 detections", "AR100": "100 detections", "ARs": "small objects", "ARm": "medium objects",
           "ARl": "large objects"}
EPS = np.spacing(1)


@dataclasses.dataclass
class CocoResult:
    """All that the evaluation found; -1 where a class has no object that counts.

    classes: K names; objects: (K,) how many count (no crowds). By IoU threshold, class and area range: precision (10, 101, K, 4)
    at the recall levels RECALLS, from the best 100 detections of an image (the curve of class k at IoU 0.5 is
    precision[0, :, k, 0]); recall (10, K, 4, 3), the largest, from the best 1, 10 and 100.
    """

    classes: tuple
    objects: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def numbers(self):
        """The twelve numbers by name, 0..1: means over all that is defined; -1 where nothing is."""
        p, r = self.precision, self.recall
        ap = [p[..., 0], p[0, ..., 0], p[5, ..., 0], p[..., 1], p[..., 2], p[..., 3]]
        ar = [r[:, :, 0, 0], r[:, :, 0, 1], r[:, :, 0, 2], r[:, :, 1, 2], r[:, :, 2, 2], r[:, :, 3, 2]]
        return {name: _mean(values) for name, values in zip(NUMBERS, ap + ar)}

    def by_class(self):
        """Per class a tuple name, AP, AP50, objects; -1 where undefined."""
        return [(name, _mean(self.precision[:, :, k, 0]), _mean(self.precision[0, :, k, 0]), int(n))
                for k, (name, n) in enumerate(zip(self.classes, self.objects))]

    def summary(self):
        """A JSON value: {"COCO": {number: value}, "COCO AP": {class: AP}, "COCO AP50": {class: AP50}}, None where undefined."""
        rows = self.by_class()
        found = {"COCO": self.numbers(), "COCO AP": {r[0]: r[1] for r in rows}, "COCO AP50": {r[0]: r[2] for r in rows}}
        return {key: {name: None if v == -1 else v for name, v in values.items()} for key, values in found.items()}

    def table(self):
        """Lines of text: the twelve numbers, then AP, AP50 and objects by class."""
        width = max([len("class"), *map(len, self.classes)])
        return [*(f"{name:5}  {v:6.3f}  {NUMBERS[name]}" for name, v in self.numbers().items()), "",
                f"{'class':{width}}      AP    AP50  objects",
                *(f"{name:{width}}  {ap:6.3f}  {ap50:6.3f}  {n:7d}" for name, ap, ap50, n in self.by_class())]


def _mean(values):
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def coco(truth, found):
    """Evaluate detections as COCO does (cocoapi's cocoeval.py), on the arrays that tinydet.coco reads.

    In an image and class, for the best 100 detections, best first, at every IoU threshold and area range: a detection takes the
    object of largest IoU >= threshold (last of equals) among those that are free and count; if there is none, among the ignored:
    crowds, and objects whose area is out of range. Crowds are never used up; IoU with one is intersection / area of the
    detection. What takes an ignored object, or takes none and has an area out of range itself, does not count. Then over all
    images, best first: recall = TP / objects that count, precision = TP / (TP + FP + spacing(1)), made non-increasing from the
    right, 0 beyond the largest recall.
    truth: coco.Annotations; found: coco.Detections; boxes x, y, w, h; w or h <= 0 gives IoU 0. Ties of scores go by image id,
    then by order. Returns CocoResult: a class without detections has AP 0, one without objects -1.
    Raises TypeError, ValueError for arrays of other dtypes and shapes, indices out of range, NaN and infinity.
    """
    I, K = len(truth.images), len(truth.categories)
    image, category, boxes, scores = _columns(found, I, K, "scores")
    true_image, true_category, objects, area = _columns(truth, I, K, "area")
    checks.same_shape("evaluate.coco", area.shape, crowd=truth.crowd)
    rank = np.empty(I, np.int64)
    rank[np.argsort([row[0] for row in truth.images], kind="stable")] = np.arange(I)

    group = category * I + rank[image]                              # one image and class
    order = np.lexsort((-scores, group))
    place = _place(group[order])
    order, place = order[place < MOST[-1]], place[place < MOST[-1]]
    group, boxes, scores = group[order], boxes[order], scores[order]
    outside = _outside(boxes[:, 2] * boxes[:, 3])

    true_group = true_category * I + rank[true_image]
    order = np.argsort(true_group, kind="stable")
    true_group, objects, crowd = true_group[order], objects[order], truth.crowd[order].astype(bool)
    ignored = _outside(area[order]) | crowd[:, None]

    match = pick(boxes, numpy=_match_numpy, numba=_match_numba)
    accumulate = pick(boxes, numpy=_accumulate_numpy, numba=_accumulate_numba)
    counted = np.zeros((K, len(AREAS)), np.int64)
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), K, len(AREAS)))
    recall = -np.ones((len(THRESHOLDS), K, len(AREAS), len(MOST)))
    for k in range(K):
        d, g = (slice(*np.searchsorted(of, (k * I, (k + 1) * I))) for of in (group, true_group))
        counted[k] = (~ignored[g]).sum(0)
        if counted[k].any():
            images, starts = np.unique(group[d], return_index=True)
            ends = np.append(starts[1:], len(group[d]))[:len(starts)]
            bounds = np.stack([starts, ends, *(np.searchsorted(true_group[g], images, side) for side in ("left", "right"))], 1)
            hit = match(boxes[d], outside[d], objects[g], crowd[g], ignored[g], bounds)
            order = np.argsort(-scores[d], kind="stable")
            precision[:, :, k], recall[:, k] = accumulate(hit, order, place[d], counted[k])
    classes = tuple(str(key if name is None else name) for key, name in truth.categories)
    return CocoResult(classes, counted[:, 0], precision, recall)


def coco_of_examples(detections, examples, classes):
    """coco() for what evaluate.voc takes, so that a program can report both.

    detections: per image a tuple boxes (D, 4) x1, y1, x2, y2, labels (D,), scores (D,); examples: the tinydet.data.Example, same
    order. CHOICE: difficult objects are crowds, as converters from VOC to COCO write them, and an object's area is its box's.
    Returns CocoResult. Labels beyond the classes are left out. Raises ValueError if the lists differ in length, else as coco().
    """
    if len(detections) != len(examples):
        raise ValueError("evaluate.coco_of_examples: there must be detections for each image, "
                         f"got {len(detections)} for {len(examples)} images")
    image, labels, boxes, scores = _joined(detections, len(classes), float)
    true_image, true_labels, objects, crowd = _joined([(e.boxes, e.labels, e.difficult) for e in examples], len(classes), bool)
    truth = Annotations([(i, e.name, *e.size) for i, e in enumerate(examples)], list(enumerate(classes)), np.arange(len(objects)),
                        true_image, true_labels, objects, objects[:, 2] * objects[:, 3], crowd)
    return coco(truth, Detections(image, labels, boxes, scores))


def _joined(images, K, dtype):
    """image, label, box as x, y, w, h, and the third column, of all that lies in images and has a label in 0..K-1."""
    boxes = np.concatenate([np.zeros((0, 4)), *(np.asarray(b, float).reshape(-1, 4) for b, _, _ in images)])
    labels = np.concatenate([np.zeros(0, np.int64), *(np.asarray(k, np.int64) for _, k, _ in images)])
    third = np.concatenate([np.zeros(0, dtype), *(np.asarray(v, dtype) for _, _, v in images)])
    known = (labels >= 0) & (labels < K)
    boxes[:, 2:] -= boxes[:, :2]
    return np.repeat(np.arange(len(images)), [len(k) for _, k, _ in images])[known], labels[known], boxes[known], third[known]


def _columns(of, I, K, fourth):
    """image, category, boxes and the column `fourth` of Annotations or Detections, checked."""
    values = getattr(of, fourth)
    checks.float_array("evaluate.coco", "boxes", of.boxes, "(R, 4)")
    checks.same_shape("evaluate.coco", (len(of.boxes),), **{"image": of.image, "category": of.category, fourth: values})
    checks.finite("evaluate.coco", **{"boxes": of.boxes, fourth: values})
    for name, index, size in (("image", of.image, I), ("category", of.category, K)):
        if index.dtype.kind not in "iu":
            raise TypeError(f"evaluate.coco: {name} must be integers, got {index.dtype}")
        if index.size and not 0 <= index.min() <= index.max() < size:
            raise ValueError(f"evaluate.coco: {name} must lie in 0..{size - 1}, got {index.min()}..{index.max()}")
    return of.image.astype(np.int64), of.category.astype(np.int64), of.boxes.astype(float), values.astype(float)


def _place(group):
    """The place of each element within its run of equal values."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def _outside(area):
    """(len(area), 4): is it out of each range?"""
    least, largest = np.array(list(AREAS.values()), float).T
    return (area[:, None] < least) | (area[:, None] > largest)


# Matching: for the D detections and G objects of one class, sorted by image, detections best first. bounds: per image that has
# detections the first and last (exclusive) detection and object. Returns hit (4, 10, D) int8: 1 right, 0 wrong, -1 counts as none.

def _match_numpy(boxes, outside, objects, crowd, ignored, bounds):
    hit = np.zeros((len(AREAS), len(THRESHOLDS), len(boxes)), np.int8)
    for first, last, left, right in bounds:
        overlap = _iou(boxes[first:last], objects[left:right], crowd[left:right])
        for a in range(len(AREAS)):
            order = np.argsort(ignored[left:right, a], kind="stable")       # those that count come first
            for t, threshold in enumerate(THRESHOLDS):
                taken = np.zeros(right - left, bool)
                for d in range(last - first):
                    best, m = min(threshold, 1 - 1e-10), -1
                    for g in order:
                        if taken[g] and not crowd[left + g]:
                            continue
                        if m >= 0 and not ignored[left + m, a] and ignored[left + g, a]:
                            break
                        if overlap[d, g] >= best:
                            best, m = overlap[d, g], g
                    if m >= 0:
                        taken[m] = True
                        hit[a, t, first + d] = -1 if ignored[left + m, a] else 1
                    elif outside[first + d, a]:
                        hit[a, t, first + d] = -1
    return hit


def _iou(boxes, objects, crowd):
    """(D, G) IoU of boxes x, y, w, h; intersection / area of the detection with a crowd."""
    side = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], objects[:, :2] + objects[:, 2:])
    side = (side - np.maximum(boxes[:, None, :2], objects[:, :2])).clip(0)
    inter, area = side[..., 0] * side[..., 1], (boxes[:, 2] * boxes[:, 3])[:, None]
    union = np.where(crowd, area, area + objects[:, 2] * objects[:, 3] - inter)
    return inter / np.where(inter > 0, union, 1)


@njit(cache=True)
def _match_numba(boxes, outside, objects, crowd, ignored, bounds):
    A, T = outside.shape[1], len(THRESHOLDS)
    hit = np.zeros((A, T, len(boxes)), np.int8)
    for n in range(len(bounds)):
        first, last, left, right = bounds[n, 0], bounds[n, 1], bounds[n, 2], bounds[n, 3]
        near, overlap = np.empty(right - left, np.int64), np.empty(right - left)
        taken = np.zeros((A, T, right - left), np.bool_)
        for d in range(first, last):
            x, y, w, h = boxes[d, 0], boxes[d, 1], boxes[d, 2], boxes[d, 3]
            size = 0                                                # objects that reach the lowest threshold
            for g in range(left, right):
                ox, oy, ow, oh = objects[g, 0], objects[g, 1], objects[g, 2], objects[g, 3]
                iw, ih = min(x + w, ox + ow) - max(x, ox), min(y + h, oy + oh) - max(y, oy)
                if iw > 0 and ih > 0:
                    inter = iw * ih
                    near[size], overlap[size] = g - left, inter / (w * h if crowd[g] else w * h + ow * oh - inter)
                    size += overlap[size] >= THRESHOLDS[0]
            for a in range(A):
                for t in range(T):
                    best, m = THRESHOLDS[t], -1
                    for second in range(2):                         # first the objects that count, then the ignored
                        for i in range(size):
                            g = near[i]
                            free = crowd[left + g] or not taken[a, t, g]
                            if ignored[left + g, a] == second and free and overlap[i] >= best:
                                best, m = overlap[i], g
                        if m >= 0:
                            taken[a, t, m] = True
                            hit[a, t, d] = -1 if second else 1
                            break
                    if m < 0 and outside[d, a]:
                        hit[a, t, d] = -1
    return hit


# Accumulation: hit as above, order: best detection first, place: of a detection in its image, counted: (4,) objects that count.
# Returns precision (10, 101, 4) and recall (10, 4, 3) of one class.

def _accumulate_numpy(hit, order, place, counted):
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), len(AREAS)))
    recall = -np.ones((len(THRESHOLDS), len(AREAS), len(MOST)))
    for a, positives in enumerate(counted):
        for t in range(len(THRESHOLDS) if positives else 0):
            ranked = hit[a, t, order]
            tp, fp = np.cumsum(ranked == 1), np.cumsum(ranked == 0)
            p = np.maximum.accumulate((tp / (fp + tp + EPS))[::-1])[::-1]
            precision[t, :, a] = np.append(p, 0)[np.searchsorted(tp / positives, RECALLS)]
            recall[t, a] = [(hit[a, t, place < most] == 1).sum() / positives for most in MOST]
    return precision, recall


@njit(cache=True)
def _accumulate_numba(hit, order, place, counted):
    A, T, D = hit.shape
    precision, recall = np.full((T, len(RECALLS), A), -1.0), np.full((T, A, len(MOST)), -1.0)
    p, r = np.empty(D), np.empty(D)
    for a in range(A):
        for t in range(T if counted[a] else 0):
            tp, fp = 0.0, 0.0
            recall[t, a] = 0
            for i in range(D):
                d = order[i]
                if hit[a, t, d] == 1:
                    tp += 1
                    for m in range(len(MOST)):
                        if place[d] < MOST[m]:
                            recall[t, a, m] += 1
                elif hit[a, t, d] == 0:
                    fp += 1
                r[i], p[i] = tp / counted[a], tp / (fp + tp + EPS)
            for m in range(len(MOST)):
                recall[t, a, m] /= counted[a]
            for i in range(D - 1, 0, -1):
                p[i - 1] = max(p[i - 1], p[i])
            i = 0
            for j in range(len(RECALLS)):
                while i < D and r[i] < RECALLS[j]:
                    i += 1
                precision[t, j, a] = p[i] if i < D else 0.0
    return precision, recall
