"""Train OverFeat as a detector, evaluate it, and draw what it found (1312.6229, sec. 5; tinydet/models/overfeat_detect.py).

    python examples/overfeat.py                                     # embedded scenes, one to two minutes on two cores
    python examples/overfeat.py --data FOLDER --name cells      # train on its split "train", evaluate on "val"
    python examples/overfeat.py --data FOLDER --weights runs/overfeat_classify/weights.npz      # fine-tune a classifier

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py), detections.json (with
--also-nms detections_nms.json, too), results.json, loss.png, precision_recall.png, detections.png, false_positives/, and
curve.json, curve.png   average precision while it trained (--measure-every)
A run that was stopped goes on with --resume.
"""
import argparse
import json
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np

from tinydet import draw, files, optim, train
from tinydet.models import overfeat, overfeat_detect
from tinydet.summary import summary

THRESHOLDS = {"merge": 0.6, "nms": 0.45}           # CHOICE: the paper names none


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "overfeat")
    a("--steps", type=common.count, help="training steps (scenes 750, folders 800)")
    a("--batch", type=common.count, default=32, help="crops a step (%(default)s)")
    a("--crop", type=common.count, metavar="PIXELS", help="side of a crop (default: three windows)")
    a("--window", type=common.count, metavar="PIXELS", help="side of the window, of the small net a multiple of 8 (default: from the training boxes)")
    a("--near-object", type=float, default=0.8, help="share of the crops that hold a fitting object (%(default)s)")
    a("--no-mirror", action="store_true", help="mirror no crops: for objects that mirrored are others, such as letters")
    a("--lr", type=float, default=0.07, help="largest learning rate (%(default)s)")
    a("--weights", metavar="FILE", help="start from this net, such as examples/overfeat_classify.py makes (default: from scratch)")
    a("--context", action="store_true", help="the classifier sees the next coarser scale, too")
    a("--no-background", action="store_true", help="no background class, no negatives")
    a("--negatives", type=float, default=3.0, metavar="RATIO", help="windows of the background that train, for one of a class (%(default)s); at least 8 an image, unless 0")
    a("--offending", type=float, default=0.5, metavar="SHARE", help="of those, taken as the most offending; the others at random (%(default)s)")
    a("--merging", choices=tuple(THRESHOLDS), default="merge", help="how boxes are combined (%(default)s)")
    a("--mode", choices=("mean", "count"), default="count", help="merged boxes: the paper's mean of two, or the mean of all members (%(default)s)")
    a("--threshold", type=float, help="of the match score (merge, 0.6) or of IoU (nms, 0.45)")
    a("--also-nms", action="store_true", help="evaluate once more with --merging nms")
    a("--measure-every", type=common.count, metavar="STEPS", help="average precision (default: only at the end)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (800 if args.data else 750)
    common.check(parser, args)
    for name in ("near_object", "offending"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(args, name)}")
    if not 0 <= args.negatives < np.inf:
        parser.error(f"--negatives must not be negative, got {args.negatives}")
    args.measure_every = args.measure_every or args.steps
    args.threshold = args.threshold if args.threshold is not None else THRESHOLDS[args.merging]
    if not 0 <= args.threshold <= (1 if args.merging == "nms" else np.inf):
        parser.error(f"--threshold must not be negative, and at most 1 for nms, got {args.threshold}")
    return args


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = common.read(args)
    classifier = overfeat.load(args.weights)[0] if args.weights else None
    like = {k: getattr(classifier.spec, k) for k in ("table", "width", "mean", "std")} if classifier else {}
    spec = overfeat_detect.spec_for(examples, classes, args.window, background=not args.no_background, context=args.context, **like)
    side = args.crop or 3 * spec.layers.window
    overfeat_detect.training_view(spec, examples[0], np.random.default_rng(0), side)    # a crop too small is said before a run begins
    run = train.Run(Path(args.out) / args.name, common.settings(args, "merging", "threshold", "mode", "also_nms", "measure_every"), args.resume)
    net = overfeat.OverFeat(spec, np.random.default_rng(args.seed))
    if classifier:
        print(f"from {args.weights}: {', '.join(overfeat.take_over(net, classifier))}")
    net.to(put)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {spec.layers.window}, scales "
          + " ".join(f"{s:.2f}" for s in spec.scales))
    print(summary(net, (1, side, side, 3)), flush=True)             # a training crop
    mirrored = 0.0 if args.no_mirror else 0.5
    drawing = {"ratio": args.negatives, "offending": args.offending, "least": 8 if args.negatives else 0}
    combining = {"merging": args.merging, "threshold": args.threshold, "mode": args.mode}

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = common.drawn(rng, len(examples), args.batch)
        images, targets, *pairs = zip(*(overfeat_detect.training_view(spec, examples[j], rng, side, args.near_object, mirrored) for j in batch))
        offset = tuple(rng.integers(spec.layers.pool, size=2))      # one offset of the last pooling a step: coarse stride
        coarser = overfeat_detect.coarser(spec, pairs[0], offset) if args.context else None
        return net.normalise(np.stack(images)), coarser and (net.normalise(coarser[0]), *coarser[1:]), targets, offset, rng

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        images, coarser, targets, offset, rng = prepared
        scores, edges, cache = net.forward(put(images), True, rng, offset, coarser=coarser and tuple(map(put, coarser)))
        values, dscores, dedges = overfeat_detect.loss(spec, scores, edges, targets, rng, offset=offset, **drawing)
        net.backward(dscores, dedges, cache)
        return values

    def detect(**how):
        return [overfeat_detect.detect(net, e.image(), **how) for e in train.progress(held_out, desc="evaluate", unit="image")]

    @run.aside
    def measure(i):
        detections = detect(**combining)
        return detections, common.measure(run, i, detections, held_out, classes)

    optimizer = optim.SGD(net, momentum=0.9, weight_decay=1e-4)
    train.fit(run, net, optimizer, optim.cosine_schedule(args.lr, args.steps, args.steps // 20), args.steps, step,
              args.checkpoint_every, prepare, args.workers)

    detections, curve = measure(args.steps)
    draw.measurements(curve, ("mean AP50",), run.folder / "curve.png")
    more = {**combining, "curve": curve, "seconds": common.seconds(args, start)}
    if args.also_nms:
        found = detect(merging="nms", threshold=THRESHOLDS["nms"])
        files.write(run.folder / "detections_nms.json", json.dumps(common.records(found, held_out, classes)))
        more["also"] = {"nms": common.figures(found, held_out, classes)[2]}
    return common.finish(run, args, detections, held_out, classes, ("loss", "class_loss", "box_loss"),
                         lambda path, cut: overfeat.save(net, path, {**combining, "cut": cut}), **more)


if __name__ == "__main__":
    common.start(main, arguments())
