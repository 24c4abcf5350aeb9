"""Detect objects in pictures with a net of examples/overfeat.py, ohem.py, end_to_end_map.py, ap_loss.py or weak_localization.py: draws and prints what it
finds.

    python examples/detect.py --weights runs/overfeat/weights.npz picture.jpg ...           # drawn into detections/
    python examples/detect.py --weights runs/overfeat/weights.npz --json picture.jpg ...    # JSON on standard output

A net trained on proposals from a file needs --proposals, by the pictures' names without ending.
Printed and drawn are detections above the score of best F1 of their class on the evaluation set, or above --min-score, in the net's own
units: probabilities of Fast R-CNN and RetinaNet (of end_to_end_map.py --scores raw: outputs, which may be negative); of OverFeat the sum of the
confidence of all boxes that merged; of weak supervision the map's mean inside the box less that around it. The JSON list holds all of them (at most 300 a
picture, as the run's --limit said, or the --candidates of each class), for an evaluator: {"image": stem, "class": name, "box": [x1, y1, x2, y2],
"score": s}, box in continuous pixels of the picture. --json FILE.json writes it to a file.
"""
import argparse
import json
import sys
from pathlib import Path

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numpy as np
import timing

from tinydet import data, draw, files, proposals, train, weights
from tinydet.models import fast_rcnn, oquab, oquab_weak, overfeat, overfeat_detect, retinanet


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("images", nargs="*", metavar="image", help="picture files")
    a("--weights", required=True, help="weights.npz of a run")
    a("--json", nargs="?", const="-", metavar="FILE.json", help="give all detections as JSON, to standard output or a file")
    a("--min-score", type=float, help="lowest score of a detection (printed, drawn and in the JSON)")
    a("--proposals", metavar="FILE", help=".mat or .json file, for a net trained on such")
    a("--out", default="detections", metavar="FOLDER", help="where the drawings go (%(default)s); none with --json")
    a("--backend", choices=tinydet.backend.BACKENDS, default="numba", help="cuda: on a GPU (%(default)s)")
    args = parser.parse_args(argv)
    if args.json not in (None, "-") and not args.json.lower().endswith(".json"):
        args.images.insert(0, args.json)                            # it was a picture: --json picture.jpg
        args.json = "-"
    if not args.images:
        parser.error("name at least one image")
    if args.min_score is not None and np.isnan(args.min_score):
        parser.error("--min-score must be a number, got nan")
    timing.check_json(parser, args.json if args.json != "-" else None)
    stems = [Path(path).stem for path in args.images]
    if twice := next((s for s in stems if stems.count(s) > 1), None):
        parser.error(f"the names of the images must differ without folder and ending, got {twice} more than once")
    return args


def load(args, put):
    """The net of a weights file, its settings, and detect(image, stem)."""
    model = weights.model(args.weights)
    if args.proposals and model in ("retinanet", "overfeat", "oquab"):
        raise ValueError(f"detect: --proposals are for nets of examples/ohem.py, got {args.weights}, which needs none")
    if model == "retinanet":
        net, settings = retinanet.load(args.weights)
        net.to(put)
        try:
            testing = retinanet.Testing(**settings.get("testing", {}))
        except TypeError as error:
            raise ValueError(f"detect: {args.weights} must hold settings of examples/ap_loss.py, got: {error}") from None
        return net, settings, lambda image, stem: retinanet.detect(net, image, testing)
    if model == "overfeat":
        net, settings = overfeat.load(args.weights)
        if not net.spec.scales or "regressor" not in net.parts:
            raise ValueError(f"detect: {args.weights} must hold a detector, got a net without scales or regressor: examples/overfeat.py "
                             "--weights makes one of it")
        net.to(put)
        combining = {k: settings[k] for k in ("merging", "threshold", "mode") if k in settings}
        return net, settings, lambda image, stem: overfeat_detect.detect(net, image, **combining)
    if model == "oquab":
        net, settings = oquab.load(args.weights)
        if net.spec.head != "weak" or not isinstance(settings.get("frame"), int):
            raise ValueError(f"detect: {args.weights} must hold a net of examples/weak_localization.py, got one with the head {net.spec.head!r}")
        net.to(put)
        looking = settings["frame"], tuple(settings.get("scales", oquab_weak.SCALES)), settings.get("align", "centres")
        return net, settings, lambda image, stem: oquab_weak.detect(net, image, *looking)
    net, settings = fast_rcnn.load(args.weights)
    net.to(put)
    source = args.proposals or settings.get("windows")
    try:
        testing = fast_rcnn.Testing(**settings.get("testing", {}))
        if isinstance(source, dict):
            proposals.windows(100, 100, **source)
    except TypeError as error:
        raise ValueError(f"detect: {args.weights} must hold settings of examples/ohem.py, got: {error}") from None
    if source is None:
        raise ValueError(f"detect: {args.weights} was trained on proposals from a file: give those of these pictures by --proposals")
    boxes = None if isinstance(source, dict) else proposals.from_file(source, [Path(path).stem for path in args.images])

    def detect(image, stem):
        height, width = image.shape[:2]
        found = proposals.windows(width, height, **source) if boxes is None else boxes[stem]
        return fast_rcnn.detect(net, image, proposals.clean(found, width, height)[0], testing)
    return net, settings, detect


def main(args, put):
    train.announce_compilation()
    net, settings, detect = load(args, put)
    classes, cut = net.spec.classes, settings.get("cut", {})
    if not isinstance(cut, dict) or not all(isinstance(v, (int, float)) for v in cut.values()):
        raise ValueError(f"detect: {args.weights} must hold a score for each class in its setting cut, got {cut!r}")
    out, records = Path(args.out), []
    for path in args.images if args.json is None else train.progress(args.images, desc="detect", unit="image"):
        image, stem = data.read_image(path), Path(path).stem
        boxes, labels, scores = detect(image, stem)
        lowest = np.array([cut.get(classes[k], 0.5) if args.min_score is None else args.min_score for k in labels], float)
        if args.json is None:
            shown = scores >= lowest
            out.mkdir(parents=True, exist_ok=True)
            draw.save(draw.boxes(image, boxes[shown], labels[shown], classes, scores[shown]), out / f"{stem}.png")
            print(f"{path}: {shown.sum()} objects, drawn in {out / stem}.png")
            for box, label, score in zip(boxes[shown], labels[shown], scores[shown]):
                print(f"  {classes[label]:12} {score:7.3f}  " + " ".join(f"{v:7.1f}" for v in box))
        else:
            kept = scores >= (-np.inf if args.min_score is None else args.min_score)
            records += [{"image": stem, "class": classes[label], "box": [float(v) for v in box], "score": float(score)}
                        for box, label, score in zip(boxes[kept], labels[kept], scores[kept])]
    if args.json == "-":
        json.dump(records, sys.stdout)
        print()
    elif args.json:
        files.write(args.json, json.dumps(records))
    return records


if __name__ == "__main__":
    args = arguments()
    try:
        with tinydet.use(args.backend) as put:
            main(args, put)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
