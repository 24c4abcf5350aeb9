"""Average precision as PASCAL VOC and COCO define it, of detections in memory or in files.

    python -m tinydet.evaluate --coco GT.json DT.json               # the twelve numbers of COCO, as pycocotools gives them
    python -m tinydet.evaluate --voc FOLDER --set test DT.json      # AP by class; DT.json from examples/detect.py --json

--json OUT also writes the figures at full precision, 0..1. COCO: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl, -1 where
undefined. VOC: mAP, and AP by class, null for a class without objects in the set.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from tinydet import checks, data, files, voc as voc_folder
from tinydet.coco import annotations, named_results, results
from tinydet.evaluate_coco import CocoResult, coco, coco_of_examples
from tinydet.ops import boxes as box_ops

__all__ = ["ClassResult", "CocoResult", "average_precision", "best_threshold", "coco", "coco_of_examples",
           "loosened_iou", "match", "mean_ap", "summary", "table", "voc", "voc_files"]


@dataclasses.dataclass
class ClassResult:
    """Evaluation of one class. precision and recall: after each detection, best score first; empty without detections."""

    ap: float                   # NaN for a class without (non-difficult) objects
    positives: int              # objects that count
    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


def average_precision(recall, precision, eleven_point=False):
    """Area under the precision-recall curve (VOC devkit, VOCap.m; py-faster-rcnn, voc_eval.py).

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


def voc(detections, examples, classes, iou=0.5, eleven_point=False, strict=False, places=None, loosened=False):
    """Evaluate detections of a whole image set, class by class (VOC devkit, VOCevaldet.m).

    All detections of a class, best score first (ties: order of images, then of detections). Each looks at the object of its
    class and image of largest IoU (first of equals), difficult ones too: IoU >= iou (strict: >, as voc_eval.py) and the object
    difficult: the detection does not count; object free: true positive, object taken; else, and below iou: false positive.
    A duplicate is not tried on a second object. recall = TP / non-difficult objects, precision = TP / (TP + FP), 0/0 = 0.
    detections: per image a tuple boxes (D, 4), labels (D,), scores (D,); examples: the tinydet.data.Example, same order.
    places: per image (D,) integers, by which ties between images go instead.
    loosened: small objects need less overlap, as in ILSVRC: iou gives way to loosened_iou() of the object that
    the detection overlaps most. CHOICE: VOC's matching stays; ILSVRC's own program looks only at objects that are still free and
    whose own threshold is met, and takes the largest overlap of those.
    Returns {class name: ClassResult}; mean_ap() averages. A class without objects has AP NaN, one without detections AP 0.
    Raises ValueError if the lists differ in length, or for NaN or infinity. Labels beyond the classes are left out.
    """
    if len(detections) != len(examples):
        raise ValueError(f"evaluate.voc: there must be detections for each image, got {len(detections)} for {len(examples)} images")
    for boxes, _, scores in detections:
        checks.finite("evaluate.voc", boxes=np.asarray(boxes, float), scores=np.asarray(scores, float))
    results = {}
    for k, name in enumerate(classes):
        hit, score, place, positives = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(0, int)], 0
        for i, ((boxes, labels, scores), example) in enumerate(zip(detections, examples)):
            mine, true = np.asarray(labels) == k, example.labels == k
            positives += int((true & ~example.difficult).sum())
            s = np.asarray(scores, float)[mine]
            b = np.asarray(boxes, float).reshape(-1, 4)[mine]
            order = np.argsort(-s, kind="stable")
            hit.append(match(b[order], example.boxes[true], example.difficult[true], iou, strict, loosened))
            score.append(s[order])
            place.append(np.full(len(s), i) if places is None else places[i][mine][order])
        hit, score = np.concatenate(hit), np.concatenate(score)
        order = np.lexsort((np.concatenate(place), -score))
        hit, score = hit[order], score[order]
        tp, fp = np.cumsum(hit == 1), np.cumsum(hit == 0)
        precision = tp / np.maximum(tp + fp, 1)
        recall = tp / positives if positives else np.zeros(len(tp))
        ap = average_precision(recall, precision, eleven_point) if positives else float("nan")
        results[name] = ClassResult(ap, positives, precision, recall, score)
    return results


def loosened_iou(objects, iou=0.5):
    """The IoU (R,) that each object of boxes (R, 4) asks for: min(iou, w h / ((w + 10) (h + 10))), sides w, h in pixels (ILSVRC).

    That is what a box 5 pixels larger on each side reaches. A box without area keeps iou, or all would match it.
    """
    w, h = (objects[:, 2:] - objects[:, :2]).clip(0).T
    return np.where(w * h > 0, np.minimum(iou, w * h / ((w + 10) * (h + 10))), iou)


def match(boxes, objects, difficult, iou, strict, loosened=False):
    """1 true positive, 0 false positive, -1 does not count: (D,) int, for the detections of one image and class, best first; rules: voc().

    boxes: (D, 4), objects: (R, 4), float64; difficult: (R,) bool. Ties of IoU: the first object.
    """
    hit = np.zeros(len(boxes), int)
    if len(objects) == 0:
        return hit
    overlap, taken = box_ops.iou(boxes, objects), np.zeros(len(objects), bool)
    least = loosened_iou(objects, iou) if loosened else np.full(len(objects), iou)
    for d, row in enumerate(overlap):
        g = int(row.argmax())
        if row[g] > least[g] or (row[g] == least[g] and not strict):
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


def best_threshold(result):
    """The score at which F1 = 2PR/(P + R) is largest: where to cut detections for display. Infinity without a true positive."""
    f1 = 2 * result.precision * result.recall / np.maximum(result.precision + result.recall, 1e-12)
    f1[:-1][result.scores[1:] == result.scores[:-1]] = 0            # no threshold cuts between equal scores
    return float(result.scores[f1.argmax()]) if len(f1) and f1.max() > 0 else float("inf")


def table(results, iou=0.5):
    """Lines of text: class, AP, objects, best F1's precision, recall and score, then the mean."""
    width = max(len("class"), len("mean"), *map(len, results))
    lines = [f"{'class':{width}}  {f'AP{100 * iou:g}':>6}  objects  precision  recall  at score"]
    for name, r in results.items():
        cut = best_threshold(r)
        at = int((r.scores >= cut).sum()) - 1
        p, q = (r.precision[at], r.recall[at]) if at >= 0 else (0, 0)
        lines.append(f"{name:{width}}  {r.ap:6.3f}  {r.positives:7d}  {p:9.3f}  {q:6.3f}  {cut:8.3f}")
    return [*lines, f"{'mean':{width}}  {mean_ap(results):6.3f}"]


# The command line

def voc_files(folder, split, path, iou=0.5, eleven_point=False, strict=False, leave_out=(), loosened=False):
    """voc() for an image set of a VOC folder and a detection file: {class name: ClassResult}, classes in alphabetical order.

    The objects are those of the annotation files as they stand: none is cut at the border or dropped, and no image is opened
    (data.read_voc, for training, does both). Classes are those of all annotations of the folder, so one without objects in the
    set is there, with AP NaN. Ties of scores go by the order of the file. All as in the VOC devkit.
    leave_out: images of the set that do not count, nor do the detections in them: what wrong annotations cost. loosened: as in voc().
    Raises what data.read_voc raises of the annotations, what coco.named_results raises, and ValueError for a leave_out not in the
    set.
    """
    truth = voc_folder.truth(folder, split)
    classes = sorted(voc_folder.class_names(folder) | {label for _, objects in truth for _, label, _ in objects})
    examples = [data.Example(name, None, (0, 0), np.array([box for box, _, _ in objects], float).reshape(-1, 4),
                             np.array([classes.index(label) for _, label, _ in objects], np.int64),
                             np.array([difficult for *_, difficult in objects], bool)) for name, objects in truth]
    detections, places = named_results(path, [name for name, _ in truth], classes)
    if unknown := sorted(set(leave_out) - {name for name, _ in truth}):
        raise ValueError(f"evaluate.voc_files: leave_out must be images of the set {split}, got {unknown[0]!r}")
    counted = [i for i, e in enumerate(examples) if e.name not in leave_out]
    detections, examples, places = ([values[i] for i in counted] for values in (detections, examples, places))
    return voc(detections, examples, classes, iou, eleven_point, strict, places, loosened)


def arguments(argv=None):
    """The command line (None: sys.argv), checked; what is wrong ends the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m tinydet.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("detections", metavar="DT.json", help="detections")
    a("--coco", metavar="GT.json", help="evaluate on COCO annotations")
    a("--voc", metavar="FOLDER", help="evaluate on a VOC folder")
    a("--set", help="image set of the VOC folder")
    a("--metric", choices=["all", "11"], help="VOC: area under the curve (all, the default), or 11 recall levels (VOC 2007)")
    a("--iou", type=float, help="VOC: least IoU of a match (0.5)")
    a("--strict", action="store_true", help="VOC: a match needs IoU > --iou, not >=")
    a("--loosened", action="store_true", help="VOC: small objects need less IoU, as in ILSVRC")
    a("--leave-out", nargs="+", metavar="IMAGE", help="VOC: images of the set that do not count")
    a("--json", metavar="OUT", help="also write the figures here")
    args = parser.parse_args(argv)
    if (args.coco is None) == (args.voc is None):
        parser.error("give one of --coco GT.json and --voc FOLDER")
    if args.voc is not None and args.set is None:
        parser.error("--voc needs --set, an image set of the folder")
    if args.coco is not None and (args.set or args.metric or args.iou is not None or args.strict or args.loosened or args.leave_out):
        parser.error("--set, --metric, --iou, --strict, --loosened and --leave-out belong to --voc")
    args.iou = 0.5 if args.iou is None else args.iou
    if not 0 < args.iou <= 1:
        parser.error(f"--iou must lie in 0..1, above 0, got {args.iou:g}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        parser.error(f"--json {args.json} must be a file in a folder that exists")
    return args


def main(args):
    """Evaluate, print the table, write --json. Raises ValueError or OSError naming file and place."""
    if args.coco is not None:
        truth = annotations(args.coco, complete=False)
        found = coco(truth, results(args.detections, truth))
        lines, figures = found.table(), found.numbers()
    else:
        found = voc_files(args.voc, args.set, args.detections, args.iou, args.metric == "11", args.strict, args.leave_out or (),
                          args.loosened)
        lines, means = table(found, args.iou), summary(found)
        figures = {"mAP": means["mean AP50"], "AP": means["AP50"]}    # at --iou, whatever it is
    print("\n".join(lines))
    if args.json:
        files.write(args.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")               # names that the terminal cannot show
    try:
        main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
