"""Find objects with no boxes to learn from: image labels and a global max (Oquab et al., CVPR 2015; tinydet/models/oquab_weak.py).

    python examples/weak_localization.py                            # embedded scenes, the source net included: under three minutes on two cores
    python examples/weak_localization.py --data FOLDER --frame 240 --weights runs/NAME/weights.npz       # its source: examples/pretrain.py
    python examples/weak_localization.py --masked --name masked     # strong + weak: the max looks inside the boxes alone
    python examples/weak_localization.py --whole --name whole       # full images: one window for all of it, no sliding, and no place
    python examples/weak_localization.py --preset paper --data FOLDER --weights FILE --backend cuda

Training sees which classes an image holds, not where; the boxes of the data are used by --masked and by the evaluation. Each step takes
--batch images at one scale; frozen features at a few fixed scales are computed once and kept in memory (--cached 0: at any scale, each time).
Evaluation, at six scales: average precision by image, by place (one point an image and class), of boxes made from the maps.
Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz, results.json, loss.png, precision_recall.png, and
ranking.json, ranking_<variant>.json    what average precision is made of: at one scale alone, of maps stretched, of the image's middle
curve.json, curve.png                   average precision by image while it trained, from the start
maps.png, maps_training.png, maps/      where it sees a class (sigmoid of the score), and how that came about
false_positives/                        for each class the images without it that score highest
detections.json                         the boxes
A run that was stopped goes on with --resume.
"""
import argparse
import json
import math
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import image_level
import numpy as np

from tinydet import draw, evaluate, evaluate_classification, files, optim, train
from tinydet.backend import to_numpy
from tinydet.models import oquab, oquab_weak
from tinydet.ops import logistic_loss
from tinydet.summary import summary

# The released script's, but for its 3x3 adaptation layers (--adapt-kernel 3); scratch: the net of --start random.
# CHOICE, with every setting: each batch is drawn anew from all images, so that epochs count steps and an image may be missed in one
PRESETS = {"paper": {"frame": 500, "cached": 0, "batch": 16, "optimizer": "adagrad", "lr": 1e-3, "weight_decay": 5e-4, "dropout": 0.5, "epochs": 20,
                     "scratch": image_level.SCRATCH}}
MEASURED = 100                      # images of the evaluation set that points of the curve look at
SCALES = oquab_weak.SCALES
IOUS = (0.5, 0.3, 0.1)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "weak_localization")
    image_level.add_arguments(parser)
    a("--preset", choices=PRESETS, help="the paper's settings; those given beside it win")
    a("--frame", type=common.count, default=96, metavar="PIXELS", help="longer side of an image at scale 1 (%(default)s)")
    a("--masked", action="store_true", help="strong + weak: where the image holds a class, the max looks at cells in its boxes alone")
    a("--whole", action="store_true", help="the frame is one window, at one scale")
    a("--adapt-kernel", type=int, choices=(1, 3), default=1, help="of FCa and FCb (%(default)s, the paper; the released code: 3)")
    a("--cached", type=int, default=6, metavar="N", help="training scales whose features are kept, from 0.7 to 1.4; 0: any scale (%(default)s)")
    a("--align", choices=oquab_weak.ALIGNMENTS, default="centres", help="how cells lie on the image (%(default)s)")
    a("--steps", type=common.count, help="training steps (3000; --preset: its epochs)")
    a("--batch", type=common.count, default=16, help="images a step (%(default)s)")
    a("--optimizer", choices=("adagrad", "sgd"), default="adagrad", help="(%(default)s)")
    a("--lr", type=float, default=0.03, help="learning rate; of sgd the first, along a cosine (%(default)s)")
    a("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    a("--dropout", type=float, default=0.2, help="of whole maps of FC7 and FCa (%(default)s)")
    args = common.parse(parser, argv, PRESETS)
    image_level.check(parser, args)
    if not args.whole and args.frame < min(table.window for table in oquab.TABLES.values()):
        parser.error(f"--frame must hold a window of the net, got {args.frame} pixels")
    if not 0 <= args.cached <= 100:
        parser.error(f"--cached must lie in 0..100, got {args.cached}")
    return args


class Frames:
    """Images as the net takes them: of(i) is frame() of image i, x(indices) the frames alone, (N, side, side, 3), boxes(indices) in their pixels.

    signs: (images, K), what loss() takes: +1 there, -1 not there, 0 not known. Frames are made each time they are asked for; the images
    themselves stay in memory, as data.Example keeps them.
    """

    def __init__(self, net, examples, side, K):
        self.net, self.examples, self.side = net, examples, side
        self.signs = np.array([-1, 1, 0])[evaluate_classification.presence(examples, K)]        # 0 (not there), 1 (there) and -1 (not known)

    def of(self, i):
        return oquab_weak.frame(self.net, self.examples[i].image(), self.side)

    def x(self, indices):
        return np.stack([self.of(i)[0] for i in indices])

    def boxes(self, indices):
        """Boxes (R, 4) in pixels of the frame and labels (R,), for each image."""
        found = [self.examples[i].usable() for i in indices]
        return [b * (self.side / max(self.examples[i].size)) for i, (b, _) in zip(indices, found)], [of for _, of in found]


def features(args, net, frames, factors, put):
    """What the layers that train take of every image at each of some scales: a list of arrays (N, h, w, C) on the host."""
    found = [[] for _ in factors]
    for first in train.progress(range(0, len(frames.examples), args.batch), desc="features", unit="batch"):
        x = put(frames.x(range(first, min(first + args.batch, len(frames.examples)))))
        for some, factor in zip(found, factors):
            some.append(to_numpy(oquab.frozen_part(net, oquab_weak.rescaled(x, factor, net.table.window), args.trains)))
    return [np.concatenate(some) for some in found]


def scales_of(args):
    """The scales of the test: one where the frame is the window (--whole), else the six of the paper."""
    return (1,) if args.whole else SCALES


def look(args, net, frames, i):
    """The maps of image i at every scale, and the combined one over the photograph: (h, w, K), raw scores, and the frame's factor."""
    x, factor, size = frames.of(i)
    scales = scales_of(args)
    maps = oquab_weak.look(net, x, scales)
    return maps, oquab_weak.combined(net, maps, scales, frames.side, size, args.align), factor


def evaluate_all(args, run, net, frames, classes):
    """Figures of all variants, scores (N, K), points (N, K, 2), and the boxes of each image."""
    examples, K, scales = frames.examples, len(classes), scales_of(args)
    single, points, surest, stretched, boxes = [], [], [], [], []
    for i, e in enumerate(train.progress(examples, desc="evaluate", unit="image")):
        maps, heat, factor = look(args, net, frames, i)
        single.append([m.max((0, 1)) for m in maps])
        point, score = oquab_weak.locate(heat, factor)
        points.append(np.minimum(point, e.size))                    # sides of the frame are whole pixels
        surest.append(score)
        stretched.append(oquab_weak.locate(oquab_weak.combined(net, maps, scales, frames.side, heat.shape[:2], "stretch"), factor))
        boxes.append(oquab_weak.boxes(logistic_loss.sigmoid(heat), factor, e.image().shape[:2]))
    single, points = np.array(single), np.array(points)
    scores = single.mean(1)

    def told(variant, *what):
        return image_level.scored(run, variant, examples, classes, args.tolerance, *what)
    where = [] if args.whole else [points, np.array(surest)]        # the one cell of a full image is nowhere
    found = {"": {**told("", scores, *where), **image_level.eleven_point(scores, examples, classes)}}
    if not args.whole:
        for n, scale in enumerate(scales):
            found[f"scale-{scale:g}"] = told(f"scale-{scale:g}", single[:, n])
        found["by-score"] = told("by-score", None, points, scores)
        found["stretch"] = told("stretch", None, *(np.array(column) for column in zip(*stretched)))
        for iou in IOUS:
            ap = evaluate.mean_ap(evaluate.voc(boxes, examples, classes, iou))
            found[""][f"box_ap_{iou:g}"] = None if math.isnan(ap) else ap
    found["middle"] = told("middle", None, image_level.middles(examples, K), scores)
    return found, scores, points, boxes


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = image_level.read(args)
    K = len(classes)
    if not (evaluate_classification.presence(examples, K) == 1).any():
        raise ValueError(f"weak_localization: the training images must hold a class, got none in {len(examples)} images")
    net = image_level.build(args, put, examples, classes, "weak", adapt_kernel=args.adapt_kernel)
    window = net.table.window
    if args.whole:
        args.frame, args.cached = window, min(args.cached, 1)
    if args.frame < window:
        raise ValueError(f"--frame must hold a window of {window} pixels, got {args.frame}")
    common.settle(args, len(examples), 3000)
    optimizer = (optim.AdaGrad if args.optimizer == "adagrad" else optim.SGD)(net, weight_decay=args.weight_decay)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "measure_every", "tolerance", "align"), args.resume)
    low, high = (1.0, 1.0) if args.whole else oquab_weak.TRAIN_SCALES
    frames, unseen = (Frames(net, some, args.frame, K) for some in (examples, held_out))
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {K} classes, frame {args.frame}, window {window}; trains: {args.trains}")
    print(summary(net, (1, args.frame, args.frame, 3)), flush=True)
    cached = args.cached if args.trains == "head" else 0
    factors = np.geomspace(low, high, cached).tolist() if cached != 1 else [1.0]
    before = time.perf_counter()
    kept = features(args, net, frames, factors, put) if cached else []
    took = time.perf_counter() - before
    rest = oquab.rest(net, args.trains)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = common.drawn(rng, len(examples), args.batch)
        if cached:
            n = int(rng.integers(cached))
            return kept[n][batch], factors[n], batch, rng
        return frames.x(batch), float(rng.uniform(low, high)), batch, rng

    def step(i, prepared):
        if i % args.measure_every == 0:
            measure(i)
        y, factor, batch, rng = prepared
        y = put(y) if cached else oquab.frozen_part(net, oquab_weak.rescaled(put(y), factor, window), args.trains)
        maps, cache = rest.forward(y, True, rng)
        mask = oquab_weak.masks(net, args.frame, factor, maps.shape[1:3], *frames.boxes(batch), K) if args.masked else None
        loss, dmaps, _ = oquab_weak.loss(maps, frames.signs[batch], mask)
        rest.backward(dmaps, cache)
        return {"loss": loss}

    @run.aside
    def measure(i):
        seen = [look(args, net, unseen, j) for j in range(min(MEASURED, len(held_out)))]
        scores = np.array([oquab_weak.scores(maps) for maps, _, _ in seen])
        found = evaluate_classification.classification_ap(scores, evaluate_classification.presence(held_out[:len(seen)], K), classes)
        shown = [(image_level.first_class(e), heat) for e, (_, heat, _) in zip(held_out[:image_level.SHOWN], seen)]
        image_level.keep_maps(run, i, [None if k is None else logistic_loss.sigmoid(heat[..., k]) for k, heat in shown])
        return common.keep_point(run, {"step": i, "class_ap": evaluate.mean_ap(found)})

    schedule = (lambda i: args.lr) if args.optimizer == "adagrad" else optim.cosine_schedule(args.lr, args.steps, args.steps // 20)
    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)
    run.seconds += took
    draw.loss_curves(run.metrics(), ("loss",), run.folder / "loss.png")
    curve = measure(args.steps)
    draw.measurements(curve, ("class_ap",), run.folder / "curve.png")
    found, scores, points, boxes = evaluate_all(args, run, net, unseen, classes)
    cut = {name: evaluate.best_threshold(r) for name, r in evaluate.voc(boxes, held_out, classes, IOUS[-1]).items()}
    oquab.save(net, run.folder / "weights.npz", {"frame": args.frame, "scales": scales_of(args), "align": args.align, "cut": cut})
    files.write(run.folder / "detections.json", json.dumps(common.records(boxes, held_out, classes)))

    def maps(i):
        return logistic_loss.sigmoid(np.moveaxis(look(args, net, unseen, i)[1], 2, 0))
    image_level.finish(run, args, held_out, classes, scores, maps, points, found)
    return common.keep_results(run, args, {"images": len(held_out), **found.pop(""), "also": found, "curve": curve,
                                           "seconds": common.seconds(args, start)})


if __name__ == "__main__":
    common.start(main, arguments())
