"""Errors of whole images as ILSVRC counts them: classification (top k) and localization (OverFeat, sec. 3.3 and 4.3).

Each function returns an ErrorRate, image by image, so that two detectors can be compared on the same images.
"""
import dataclasses

import numpy as np

from tinydet import checks
from tinydet.ops import boxes as box_ops

__all__ = ["ErrorRate", "classification_error", "localization_error", "top_k_error"]


@dataclasses.dataclass
class ErrorRate:
    """wrong: (N,) bool, the images that are wrong."""

    wrong: np.ndarray

    @property
    def error(self):
        """The share of images that are wrong; NaN without images."""
        return float(self.wrong.mean()) if len(self.wrong) else float("nan")


def top_k_error(scores, labels, k=5):
    """Classification error (overfeat notes 3.3): an image is wrong if its label is not among the k classes of largest score.

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
    """ILSVRC's localization error (overfeat notes 4.4): an image is right if one of its guesses has class and place right.

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
