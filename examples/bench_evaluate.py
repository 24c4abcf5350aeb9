"""Time the COCO evaluation against pycocotools (pip install pycocotools), and compare the twelve numbers.

    python examples/bench_evaluate.py --json evaluate.json

A seeded set like COCO's val: about seven objects an image, detections that are near an object or nowhere, ties of scores, crowds.
Both read the same two files; what is timed is from there to the numbers: COCOeval's evaluate, accumulate and summarize, and
evaluate.coco. One process, one after the other, --turns times, after a small set that compiles; the ratio is the median of the
turns'. Machines are noisy: read the ratio.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import tinydet  # noqa: F401                                        # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import evaluate, files
from tinydet.coco import annotations, results


def coco_set(images, classes, detections, seed):
    """Annotation file and results as JSON values; `detections` an image."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), rng.poisson(7.3, images))
    G, D = len(image), images * detections
    side = np.exp(rng.normal(4, 1, (G, 2))).clip(2, 400)            # areas small, medium and large, about a third each
    boxes, label = np.concatenate([rng.random((G, 2)) * (640 - side), side], 1), rng.integers(0, classes, G)
    area, crowd = side.prod(1) * rng.uniform(0.5, 1, G), rng.random(G) < 0.02       # a mask's area is less than its box's
    found_image = np.repeat(np.arange(images), detections)
    first, count = np.searchsorted(image, np.arange(images)), np.bincount(image, minlength=images)
    near = (rng.random(D) < 0.4) & (count[found_image] > 0)
    source = np.where(near, first[found_image] + (rng.random(D) * count[found_image]).astype(int), rng.integers(0, G, D))
    found = boxes[source] + rng.normal(0, 0.1, (D, 4)) * np.tile(side[source], 2)
    found[~near, :2] = rng.random(((~near).sum(), 2)) * 500
    guess = np.where(near & (rng.random(D) < 0.8), label[source], rng.integers(0, classes, D))
    score = np.round(rng.beta(1 + 2 * near, 3), 3)                  # three decimals: ties
    rows = zip(image.tolist(), label.tolist(), boxes.tolist(), area.tolist(), crowd.tolist())
    return ({"images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(images)],
             "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)],
             "annotations": [{"id": n + 1, "image_id": i, "category_id": k, "bbox": b, "area": a, "iscrowd": int(c)}
                             for n, (i, k, b, a, c) in enumerate(rows)]},
            [{"image_id": i, "category_id": k, "bbox": b, "score": s}
             for i, k, b, s in zip(found_image.tolist(), guess.tolist(), found.tolist(), score.tolist())])


def pycocotools(true, found):
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):                 # it prints as it goes
        e = COCOeval(true, found, "bbox")
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e.stats


def load(truth, found):
    """Both files in both forms, and the seconds that reading took."""
    from pycocotools.coco import COCO
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO(str(truth))
        theirs = true, true.loadRes(str(found))
    between = time.perf_counter()
    true = annotations(truth)
    ours = true, results(found, true)
    return theirs, ours, between - start, time.perf_counter() - between


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        truth, found = Path(folder) / "gt.json", Path(folder) / "dt.json"
        for size in ((20, 3, 10), (args.images, args.classes, args.detections)):        # the small set compiles
            for path, value in zip((truth, found), coco_set(*size, args.seed)):
                path.write_text(json.dumps(value))
            theirs, ours, their_load, our_load = load(truth, found)
            evaluate.coco(*ours)
    times = []
    for _ in range(args.turns):
        start = time.perf_counter()
        stats = pycocotools(*theirs)
        between = time.perf_counter()
        numbers = evaluate.coco(*ours).numbers()
        times.append((between - start, time.perf_counter() - between))
        a, b = times[-1]
        print(f"pycocotools {a:.2f} s, tinydet {b:.3f} s, ratio {a / b:.0f}", flush=True)
    times = np.array(times)
    row = {"images": args.images, "classes": args.classes, "detections": args.images * args.detections,
           "objects": len(ours[0].id),
           "pycocotools s": float(np.median(times[:, 0])), "tinydet s": float(np.median(times[:, 1])),
           "ratio": float(np.median(times[:, 0] / times[:, 1])),
           "reading, pycocotools s": their_load, "reading, tinydet s": our_load,
           "largest difference": float(np.abs(np.array(list(numbers.values())) - stats).max()), "numbers": numbers}
    print("\n".join(f"{k:22}  {v:.6g}" for k, v in row.items() if k != "numbers"))
    print("  ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    if args.json:
        files.write(args.json, json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="of the set (%(default)s)")
    parser.add_argument("--classes", type=int, default=80, help="of the set (%(default)s)")
    parser.add_argument("--detections", type=int, default=100, help="an image (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the set (%(default)s)")
    parser.add_argument("--turns", type=int, default=1, help="timed turns (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    timing.check_json(parser, args.json)
    try:
        main(args)
    except ImportError as error:
        sys.exit(f"error: {error} (pip install pycocotools)")
