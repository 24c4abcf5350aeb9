"""Average precision as PASCAL VOC defines it."""
import dataclasses

import numpy as np

from tinydet import checks
from tinydet.ops import boxes as box_ops


@dataclasses.dataclass
class ClassResult:
    """Evaluation of one class. precision and recall: after each detection, best score first; empty without detections."""

    ap: float                   # NaN for a class without (non-difficult) objects
    positives: int              # objects that count
    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


def average_precision(recall, precision, eleven_point=False):
    """Area under the precision-recall curve (ohem notes 5.1).

    All points (VOC 2010 on): precision is made non-increasing from the right, AP = sum (r[i+1] - r[i]) * p[i+1].
    eleven_point (VOC 2007): mean over t in np.arange(0, 1.1, 0.1) of the largest precision at recall >= t, with that grid's
    bits: recall of exactly 3/10, 6/10, 7/10 misses its own point, as in py-faster-rcnn and chainercv.
    recall (non-decreasing), precision: (D,) float64. D = 0 gives 0.
    """
    recall, precision = np.asarray(recall, float), np.asarray(precision, float)
    if eleven_point:
        return float(sum(precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)) / 11)
    r, p = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    p = np.maximum.accumulate(p[::-1])[::-1]
    change = np.flatnonzero(r[1:] != r[:-1])
    return float(((r[change + 1] - r[change]) * p[change + 1]).sum())


def voc(detections, examples, classes, iou=0.5, eleven_point=False, strict=False):
    """Evaluate detections of a whole image set, class by class (VOC devkit; ohem notes 5.1).

    All detections of a class, best score first (ties: order of images, then of detections). Each looks at the object of its
    class and image of largest IoU (first of equals), difficult ones too: IoU >= iou (strict: >, as voc_eval.py) and the object
    difficult: the detection does not count; object free: true positive, object taken; else, and below iou: false positive.
    A duplicate is not tried on a second object. recall = TP / non-difficult objects, precision = TP / (TP + FP), 0/0 = 0.
    detections: per image a tuple boxes (D, 4), labels (D,), scores (D,); examples: the tinydet.data.Example, same order.
    Returns {class name: ClassResult}; mean_ap() averages. A class without objects has AP NaN, one without detections AP 0.
    Raises ValueError if the lists differ in length, or for NaN or infinity. Labels beyond the classes are left out.
    """
    if len(detections) != len(examples):
        raise ValueError(f"evaluate.voc: there must be detections for each image, got {len(detections)} for {len(examples)} images")
    for boxes, _, scores in detections:
        checks.finite("evaluate.voc", boxes=np.asarray(boxes, float), scores=np.asarray(scores, float))
    results = {}
    for k, name in enumerate(classes):
        hit, score, positives = [np.zeros(0, int)], [np.zeros(0)], 0
        for (boxes, labels, scores), example in zip(detections, examples):
            mine, true = np.asarray(labels) == k, example.labels == k
            positives += int((true & ~example.difficult).sum())
            s = np.asarray(scores, float)[mine]
            b = np.asarray(boxes, float).reshape(-1, 4)[mine]
            order = np.argsort(-s, kind="stable")
            hit.append(_match(b[order], example.boxes[true], example.difficult[true], iou, strict))
            score.append(s[order])
        hit, score = np.concatenate(hit), np.concatenate(score)
        order = np.argsort(-score, kind="stable")
        hit, score = hit[order], score[order]
        tp, fp = np.cumsum(hit == 1), np.cumsum(hit == 0)
        precision = tp / np.maximum(tp + fp, 1)
        recall = tp / positives if positives else np.zeros(len(tp))
        ap = average_precision(recall, precision, eleven_point) if positives else float("nan")
        results[name] = ClassResult(ap, positives, precision, recall, score)
    return results


def _match(boxes, objects, difficult, iou, strict):
    """1 true positive, 0 false positive, -1 does not count; for the detections of one image and class, best first."""
    hit = np.zeros(len(boxes), int)
    if len(objects) == 0:
        return hit
    overlap, taken = box_ops.iou(boxes, objects), np.zeros(len(objects), bool)
    for d, row in enumerate(overlap):
        g = int(row.argmax())
        if row[g] > iou or (row[g] == iou and not strict):
            hit[d] = -1 if difficult[g] else int(not taken[g])
            taken[g] = True
    return hit


def mean_ap(results):
    """Mean AP over the classes that have objects; NaN if none has."""
    aps = [r.ap for r in results.values() if r.positives]
    return float(np.mean(aps)) if aps else float("nan")


def summary(results):
    """The APs as a JSON value: {"mean AP50": m, "AP50": {class: AP}}, None where undefined."""
    mean = mean_ap(results)
    return {"mean AP50": None if np.isnan(mean) else mean,
            "AP50": {name: None if np.isnan(r.ap) else r.ap for name, r in results.items()}}


def errors(detections, examples, classes, cut, iou=0.5, near=0.1):
    """Where a detector loses, among its detections of score >= cut[class]: counts per class, by the first kind that fits.

    found: true positives; double: on an object already found; inexact: IoU in [near, iou) with an object of the class; other
    class: IoU >= iou with an object of another class; background: the rest; missed: objects not found. Difficult objects and
    what matches them count nowhere. Arguments as in voc(), whose matching this follows; cut: {class name: score}.
    Returns {class name: {kind: count}}.
    """
    counts = {name: dict.fromkeys(("found", "missed", "double", "inexact", "other class", "background"), 0) for name in classes}
    for (boxes, labels, scores), example in zip(detections, examples):
        labels, scores = np.asarray(labels), np.asarray(scores, float)
        for k, name in enumerate(classes):
            shown, true = (labels == k) & (scores >= cut[name]), example.labels == k
            b = np.asarray(boxes, float).reshape(-1, 4)[shown][np.argsort(-scores[shown], kind="stable")]
            hits = _match(b, example.boxes[true], example.difficult[true], iou, False)
            overlap = box_ops.iou(b, example.boxes)
            own, other = overlap[:, true].max(1, initial=0), overlap[:, ~true].max(1, initial=0)
            wrong = hits == 0
            kinds = (("double", own >= iou), ("inexact", own >= near), ("other class", other >= iou), ("background", own >= 0))
            for kind, fits in kinds:
                counts[name][kind] += int((wrong & fits).sum())
                wrong &= ~fits
            counts[name]["found"] += int((hits == 1).sum())
            counts[name]["missed"] += int((~example.difficult[true]).sum() - (hits == 1).sum())
    return counts


def best_threshold(result):
    """The score at which F1 = 2PR/(P + R) is largest: where to cut detections for display. Infinity without a true positive."""
    f1 = 2 * result.precision * result.recall / np.maximum(result.precision + result.recall, 1e-12)
    f1[:-1][result.scores[1:] == result.scores[:-1]] = 0            # no threshold cuts between equal scores
    return float(result.scores[f1.argmax()]) if len(f1) and f1.max() > 0 else float("inf")


def table(results):
    """Lines of text: class, AP, objects, best F1's precision, recall and score, then the mean."""
    width = max(len("class"), len("mean"), *map(len, results))
    lines = [f"{'class':{width}}  {'AP50':>6}  objects  precision  recall  at score"]
    for name, r in results.items():
        cut = best_threshold(r)
        at = int((r.scores >= cut).sum()) - 1
        p, q = (r.precision[at], r.recall[at]) if at >= 0 else (0, 0)
        lines.append(f"{name:{width}}  {r.ap:6.3f}  {r.positives:7d}  {p:9.3f}  {q:6.3f}  {cut:8.3f}")
    return [*lines, f"{'mean':{width}}  {mean_ap(results):6.3f}"]
