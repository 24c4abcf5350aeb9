"""Figures of whole images: errors as ILSVRC counts them (OverFeat, sec. 3.3 and 4.3), AP as PASCAL VOC does (Oquab et al.).

Errors, top k and localization: each function returns an ErrorRate, image by image, so that two detectors can be compared on the same
images. AP, for images that may hold several classes or none: classification_ap ranks the images by class; location_ap also asks of each
image for one point on an object of the class. Labels of images by class, presence(): 1 there, 0 not there, -1 left out.
"""
import dataclasses

import numpy as np

from tinydet import checks, evaluate
from tinydet.ops import boxes as box_ops

__all__ = ["ErrorRate", "classification_ap", "classification_error", "localization_error", "location_ap", "location_hits", "presence",
           "top_k_error"]


@dataclasses.dataclass
class ErrorRate:
    """wrong: (N,) bool, the images that are wrong."""

    wrong: np.ndarray

    @property
    def error(self):
        """The share of images that are wrong; NaN without images."""
        return float(self.wrong.mean()) if len(self.wrong) else float("nan")


def top_k_error(scores, labels, k=5):
    """Classification error (OverFeat, 1312.6229, sec. 3.3): an image is wrong if its label is not among the k classes of largest score.

    scores: (N, K) float32 or float64, any scale, infinity allowed; labels: (N,) integers in 0..K-1, one an image. Ties: the lower
    class first. k beyond K counts as K. Raises TypeError for a dtype; ValueError for a shape, k < 1, NaN, a label outside 0..K-1.
    """
    op = "evaluate_classification.top_k_error"
    checks.float_array(op, "scores", scores, "(N, K)")
    N, K = scores.shape
    checks.integers(op, "labels", labels, (N,))
    checks.whole(op, 1, k=k)
    if np.isnan(scores).any():
        raise ValueError(f"{op}: scores must be numbers, got NaN")
    if N and not (labels.min() >= 0 and labels.max() < K):
        raise ValueError(f"{op}: labels must lie in 0..{K - 1}, got {labels.min()}..{labels.max()}")
    own, label = scores[np.arange(N), labels][:, None], labels[:, None]
    before = (scores > own) | ((scores == own) & (np.arange(K) < label))
    return ErrorRate(before.sum(1) >= k)


def classification_error(guesses, examples, k=5):
    """As localization_error(), wherever the boxes lie: an image is right if one guess names the class of one of its objects."""
    op = "evaluate_classification.classification_error"
    return ErrorRate(np.array([not same.any() for _, _, same in _images(op, guesses, examples, k)], bool))


def localization_error(guesses, examples, iou=0.5, k=5):
    """ILSVRC's localization error (OverFeat, 1312.6229, sec. 4): an image is right if one of its guesses has class and place right.

    That is: the guess has IoU >= iou with an object of its own class. The first k guesses of an image count; no guess is wrong.
    guesses: per image a tuple boxes (G, 4), labels (G,), surest first; what follows them is not looked at. examples: the
    tinydet.data.Example, same order. Difficult objects count as absent (CHOICE: ILSVRC has none); with objects of several classes any
    of them will do (CHOICE: ILSVRC labels one).
    Raises TypeError if k is no integer; ValueError for k < 1, iou outside 0..1, lists that differ in length, NaN or infinity, an
    image without an object that counts.
    """
    op = "evaluate_classification.localization_error"
    if not 0 <= iou <= 1:
        raise ValueError(f"{op}: iou must lie in 0..1, got {iou}")
    return ErrorRate(np.array([not (same & (box_ops.iou(boxes, objects) >= iou)).any()
                               for boxes, objects, same in _images(op, guesses, examples, k)], bool))


def _images(op, guesses, examples, k):
    """Per image: boxes (G, 4) of the first k guesses, the objects (R, 4) that count, and (G, R) whether their classes agree."""
    checks.whole(op, 1, k=k)
    if len(guesses) != len(examples):
        raise ValueError(f"{op}: there must be guesses for each image, got {len(guesses)} for {len(examples)} images")
    for i, ((boxes, labels, *_), example) in enumerate(zip(guesses, examples)):
        boxes, labels, counts = np.asarray(boxes, float).reshape(-1, 4), np.asarray(labels), ~example.difficult
        if labels.shape != (len(boxes),):
            raise ValueError(f"{op}: labels of image {i} must have shape ({len(boxes)},), one a box, got {labels.shape}")
        checks.finite(op, boxes=boxes)
        if not counts.any():
            raise ValueError(f"{op}: each image must have an object that is not difficult, got none in image {i}, {example.name!r}")
        yield boxes[:k], example.boxes[counts], labels[:k, None] == example.labels[counts]


# AP of images

def presence(examples, K):
    """Which of K classes each image holds, (N, K) int64: 1 there, 0 not there, -1 only as difficult objects (CHOICE).

    examples: the tinydet.data.Example. Tags count as there, beside what the boxes say. An image whose only objects of a class are
    difficult is left out for that class. Raises TypeError if K is no integer; ValueError for K < 1, a label or tag outside 0..K-1.
    """
    op = "evaluate_classification.presence"
    checks.whole(op, 1, K=K)
    found = np.zeros((len(examples), K), np.int64)
    for row, e in zip(found, examples):
        tags = np.zeros(0, np.int64) if e.tags is None else np.asarray(e.tags, np.int64)
        every = np.concatenate([e.labels, tags])
        if len(every) and not (every.min() >= 0 and every.max() < K):
            raise ValueError(f"{op}: labels of {e.name!r} must lie in 0..{K - 1}, got {every.min()}..{every.max()}")
        row[e.labels] = -1
        row[e.usable()[1]] = row[tags] = 1
    return found


def classification_ap(scores, labels, classes, eleven_point=False):
    """AP of the images ranked by each class's score, as VOC's classification task (HAL hal-00911179, Tables 1, 2): {class: evaluate.ClassResult}.

    Best score first (ties: order of images): recall = positives so far / positives, precision = positives so far / images so far, both
    into evaluate.average_precision; eleven_point (VOC 2007) as there. evaluate.mean_ap() averages the classes that have positives.
    scores: (N, K) float32 or float64, any scale; labels: (N, K) integers 1 positive, 0 negative, -1 left out; classes: K names.
    A class without positives has AP NaN. Raises TypeError for a dtype; ValueError for a shape, NaN or infinity, another label.
    """
    return _ap("evaluate_classification.classification_ap", scores, None, labels, classes, eleven_point)


def location_hits(points, examples, tolerance=18.0):
    """Whether the one point of each image and class lies on an object of that class (Oquab et al., CVPR 2015; unverified), (N, K) bool.

    hit = x1 - tolerance <= x <= x2 + tolerance and the same of y, for a box of the class: the border counts.
    points: (N, K, 2) float32 or float64, (x, y) in pixels of the image; examples: the N tinydet.data.Example; tolerance: pixels of the
    image, on each side of a box (18, about half of the full-size network's stride, is unverified). Difficult objects are objects (CHOICE: the
    point is on one; location_ap leaves out the images that hold no other).
    Raises TypeError for a dtype; ValueError for a shape, NaN or infinity, a negative tolerance, a list of another length.
    """
    op = "evaluate_classification.location_hits"
    checks.float_array(op, "points", points, "(N, K, 2)")
    checks.finite(op, points=points)
    if len(points) != len(examples):
        raise ValueError(f"{op}: there must be points for each image, got {len(points)} for {len(examples)} images")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"{op}: tolerance must be a number of pixels, at least 0, got {tolerance}")
    hits = np.zeros(points.shape[:2], bool)
    for row, at, e in zip(hits, points.astype(np.float64), examples):
        inside = ((at[:, None] >= e.boxes[:, :2] - tolerance) & (at[:, None] <= e.boxes[:, 2:] + tolerance)).all(2)         # (K, R)
        row[:] = (inside & (np.arange(len(row))[:, None] == e.labels)).any(1)
    return hits


def location_ap(scores, hits, labels, classes, eleven_point=False):
    """AP of one point an image and class (Oquab et al., CVPR 2015; unverified): classification_ap in which a wrong place is wrong.

    True positive: label 1 and a hit; any other counted image is a false positive, and one that holds the class is missed as well:
    recall = true positives / images with label 1. Never above classification_ap of the same scores.
    hits: (N, K) bool, of location_hits(); the rest, ties and errors as classification_ap; TypeError unless hits are bool.
    """
    op = "evaluate_classification.location_ap"
    checks.array(op, "hits", hits)
    if hits.dtype != bool:
        raise TypeError(f"{op}: hits must be bool, got {hits.dtype}")
    return _ap(op, scores, hits, labels, classes, eleven_point)


def _ap(op, scores, hits, labels, classes, eleven_point):
    """{class: ClassResult}; hits: (N, K) bool, or None: all positives are found."""
    checks.float_array(op, "scores", scores, "(N, K)")
    checks.finite(op, scores=scores)
    checks.ternary(op, labels, scores.shape)
    right = labels == 1
    if hits is not None:
        checks.same_shape(op, scores.shape, hits=hits)
        right = right & hits
    if len(classes) != scores.shape[1]:
        raise ValueError(f"{op}: there must be a class for each of the {scores.shape[1]} columns of scores, got {len(classes)}")
    results = {}
    for k, name in enumerate(classes):
        order = np.argsort(-scores[:, k], kind="stable")
        order = order[labels[order, k] >= 0]
        positives, tp = int((labels[:, k] == 1).sum()), np.cumsum(right[order, k])
        precision = tp / np.arange(1, len(tp) + 1)
        recall = tp / positives if positives else np.zeros(len(tp))
        ap = evaluate.average_precision(recall, precision, eleven_point) if positives else float("nan")
        results[name] = evaluate.ClassResult(ap, positives, precision, recall, scores[order, k])
    return results
