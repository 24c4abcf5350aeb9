"""What a detector gets wrong: counts by kind, and the false positives it is surest of."""
import dataclasses

import numpy as np

from tinydet.data import Example
from tinydet.evaluate import match
from tinydet.ops import boxes as box_ops

KINDS = ("double", "inexact", "other class", "background")


@dataclasses.dataclass
class Mistake:
    """A false positive: the image, the box (4,), its label, score and kind, and the largest IoU with an object of any class."""

    example: Example
    box: np.ndarray
    label: int
    score: float
    kind: str
    iou: float


def kinds(boxes, label, example, iou=0.5, near=0.1):
    """Name what each detection of one class in one image is, best score first: "found", one of KINDS, or "" (counts nowhere).

    found: true positive (evaluate.voc's matching). Else the first that fits: double: on an object already found; inexact: IoU
    in [near, iou) with an object of the class; other class: IoU >= iou with an object of another; background: the rest.
    What matches a difficult object counts nowhere.
    boxes: (D, 4). Returns a list of D strings.
    """
    true, difficult = example.labels == label, example.difficult
    hits = match(boxes, example.boxes[true], difficult[true], iou, False)
    overlap = box_ops.iou(boxes, example.boxes)
    own, other = overlap[:, true].max(1, initial=0), overlap[:, ~true].max(1, initial=0)
    wrong = np.select([own >= iou, own >= near, other >= iou], KINDS[:3], KINDS[3])
    return [str(w) if hit == 0 else "found" if hit == 1 else "" for hit, w in zip(hits, wrong)]


def errors(detections, examples, classes, cut, iou=0.5, near=0.1):
    """Where a detector loses, among its detections of score >= cut[class]: counts per class of the kinds, and of objects missed.

    Difficult objects are not missed. Arguments as in evaluate.voc(), whose matching this follows; cut: {class name: score};
    where it is infinite (evaluate.best_threshold of a class that is never found) all detections of the class count.
    Returns {class name: {kind: count}}, kinds "found", "missed" and KINDS.
    """
    counts = {name: dict.fromkeys(("found", "missed", *KINDS), 0) for name in classes}
    for image, example in zip(detections, examples):
        for k, name in enumerate(classes):
            boxes, scores = _of_class(image, k)
            shown = scores >= cut[name] if np.isfinite(cut[name]) else slice(None)
            for kind in filter(None, kinds(boxes[shown], k, example, iou, near)):
                counts[name][kind] += 1
            counts[name]["missed"] += int((~example.difficult[example.labels == k]).sum())
    for count in counts.values():
        count["missed"] -= count["found"]
    return counts


def table(counts):
    """Lines of text: a class a line, a kind a column. counts: as errors() returns them."""
    columns, width = ("found", "missed", *KINDS), max([len("class"), *map(len, counts)])
    return [f"{'class':{width}}  " + "  ".join(columns),
            *(f"{name:{width}}  " + "  ".join(f"{count[kind]:{len(kind)}d}" for kind in columns) for name, count in counts.items())]


def false_positives(detections, examples, classes, most=10, iou=0.5, near=0.1):
    """The `most` false positives of highest score of every class (as the slides of Oquab et al. show them): {class name: [Mistake]}.

    Arguments as in errors(); ties: the order of images, then of detections.
    """
    found = {name: [] for name in classes}
    for image, example in zip(detections, examples):
        for k, name in enumerate(classes):
            boxes, scores = _of_class(image, k)
            overlap = box_ops.iou(boxes, example.boxes).max(1, initial=0)
            for box, score, kind, best in zip(boxes, scores, kinds(boxes, k, example, iou, near), overlap):
                if kind in KINDS:
                    found[name].append(Mistake(example, box, k, float(score), kind, float(best)))
            found[name] = sorted(found[name], key=lambda m: -m.score)[:most]
    return found


def _of_class(image, label):
    """Boxes and scores of one class of an image's detections, best first."""
    boxes, labels, scores = image
    mine = np.asarray(labels) == label
    scores = np.asarray(scores, float)[mine]
    order = np.argsort(-scores, kind="stable")
    return np.asarray(boxes, float).reshape(-1, 4)[mine][order], scores[order]
