"""Train OverFeat as a detector, evaluate it, and draw what it found (1312.6229; tinydet/models/overfeat.py).

    python examples/overfeat.py                                     # embedded scenes, about 3 minutes on two cores
    python examples/overfeat.py --data FOLDER --name cells      # train on its split "train", evaluate on "val"

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py),
detections.json, results.json, loss.png, precision_recall.png, detections.png. A run that was stopped goes on with --resume.
"""
import argparse
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np

from tinydet import draw, optim, train
from tinydet.models import overfeat
from tinydet.summary import summary


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "overfeat")
    a("--steps", type=common.count, help="training steps (scenes 750, folders 800)")
    a("--batch", type=common.count, default=32, help="crops a step (%(default)s)")
    a("--crop", type=common.count, metavar="PIXELS", help="side of a crop (default: three windows)")
    a("--window", type=common.count, metavar="PIXELS", help="side of the window, a multiple of 8 (default: from the training boxes)")
    a("--near-object", type=float, default=0.8, help="share of the crops that hold a fitting object (%(default)s)")
    a("--lr", type=float, default=0.07, help="largest learning rate (%(default)s)")
    a("--merging", choices=("merge", "nms"), default="merge", help="how boxes are combined (%(default)s)")
    a("--threshold", type=float, help="of the match score (merge, 0.6) or of IoU (nms, 0.45)")
    args = parser.parse_args(argv)
    args.steps = args.steps or (800 if args.data else 750)
    common.check(parser, args)
    if not 0 <= args.near_object <= 1:
        parser.error(f"--near-object must lie in [0, 1], got {args.near_object}")
    args.threshold = args.threshold if args.threshold is not None else {"merge": 0.6, "nms": 0.45}[args.merging]
    if not 0 <= args.threshold <= (1 if args.merging == "nms" else np.inf):
        parser.error(f"--threshold must not be negative, and at most 1 for nms, got {args.threshold}")
    return args


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = common.read(args)
    spec = overfeat.spec_for(examples, classes, args.window)
    side = args.crop or 3 * spec.window
    overfeat.training_view(spec, examples[0], np.random.default_rng(0), side)       # a crop too small is said before a run begins
    run = train.Run(Path(args.out) / args.name, common.settings(args, "merging", "threshold"), args.resume)
    net = overfeat.OverFeat(spec, np.random.default_rng(args.seed)).to(put)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {spec.window}, scales "
          + " ".join(f"{s:.2f}" for s in spec.scales))
    print(summary(net, (1, side, side, 3)), flush=True)             # a training crop

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = rng.choice(len(examples), args.batch, replace=len(examples) < args.batch)
        images, targets = zip(*(overfeat.training_view(spec, examples[j], rng, side, args.near_object) for j in batch))
        offset = tuple(rng.integers(spec.pool, size=2))             # one offset of the last pooling a step: coarse stride
        return net.normalise(np.stack(images)), targets, offset, rng

    def step(i, prepared):
        images, targets, offset, rng = prepared
        scores, edges, cache = net.forward(put(images), train=True, rng=rng, offset=offset)
        values, dscores, dedges = overfeat.loss(spec, scores, edges, targets, rng, offset=offset)
        net.backward(dscores, dedges, cache)
        return values

    optimizer = optim.SGD(net, momentum=0.9, weight_decay=1e-4)
    train.fit(run, net, optimizer, optim.cosine_schedule(args.lr, args.steps, args.steps // 20), args.steps, step,
              args.checkpoint_every, prepare, args.workers)

    combining = {"merging": args.merging, "threshold": args.threshold}
    detections = [overfeat.detect(net, e.image(), **combining) for e in train.progress(held_out, desc="evaluate", unit="image")]
    return common.finish(run, args, detections, held_out, classes, ("loss", "class_loss", "box_loss"),
                         lambda path, cut: overfeat.save(net, path, {**combining, "cut": cut}),
                         **combining, seconds=None if args.resume else round(time.perf_counter() - start))


if __name__ == "__main__":
    common.start(main, arguments())
