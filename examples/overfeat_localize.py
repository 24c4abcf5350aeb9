"""Train OverFeat's box regressor on the trunk of a classifier, and localize: five guesses an image, boxes of all scales merged
(1312.6229, sec. 4; tinydet/models/overfeat_localize.py).

    python examples/overfeat_classify.py                            # first, the classifier: runs/overfeat_classify/weights.npz
    python examples/overfeat_localize.py                            # painted shapes on clutter: about eight minutes on two cores
    python examples/overfeat_localize.py --data FOLDER --weights runs/NAME/weights.npz      # the classifier of that data

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (classifier and regressor), results.json,
loss.png, and
wrong.json, wrong_<variant>.json    image by image, 1 if the answer is wrong
curve.json, curve.png               error while it trained, of at most 200 images
boxes.png                           in some images what merging does
The variants are VARIANTS: the centre window alone, fewer scales, coarse stride, the literal mean, no merging, the true class given.
A run that was stopped goes on with --resume.
"""
import argparse
import collections
import dataclasses
import math
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np
from PIL import Image, ImageDraw

from tinydet import augment, draw, evaluate_classification, optim, train
from tinydet.models import overfeat, overfeat_localize
from tinydet.ops import merge, softmax_loss
from tinydet.summary import summary

SIX = (1, 2, 3, 4, 5, 6)
MAIN = "fine", SIX, {}                                              # windows, scales, options of guesses
# CHOICE: which scales "2" and "3" are (the paper says how many), exact means when merging ("mean": the paper's words)
VARIANTS = {"centre": ("centre", (1,), {}), "1": ("fine", (1,), {}), "2": ("fine", (1, 4), {}), "3": ("fine", (1, 2, 4), {}),
            "4": ("fine", (1, 2, 4, 6), {}), "coarse": ("coarse", SIX, {}), "mean": ("fine", SIX, {"mode": "mean"}),
            "none": ("fine", SIX, {"merging": "none"}), "true-class": MAIN}
RED = 230, 25, 75
EVALUATION = "flip", "match", "threshold", "least_probability", "measure_every"


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "overfeat_localize", common.LABELLED + "painted shapes)")
    common.add_canvas_arguments(parser)
    a("--weights", metavar="FILE", help="the classifier (default: <out>/overfeat_classify/weights.npz)")
    a("--regressor", choices=("SCR", "PCR"), default="SCR", help="one box a window, or one for each class (%(default)s)")
    a("--steps", type=common.count, default=1500, help="training steps (%(default)s)")
    a("--batch", type=common.count, default=32, help="images a step, all at one scale (%(default)s)")
    a("--train-scales", type=int, choices=SIX, nargs="+", default=list(SIX), help="scales to draw from (default: all six)")
    a("--fine-training", action="store_true", help="all offsets of the last pooling train in each step, not one")
    a("--rule", choices=overfeat_localize.RULES, default="inter", help="overlap of window and box: share of the box, or IoU (%(default)s)")
    a("--least", type=float, default=0.5, help="overlap from which a window trains (%(default)s)")
    a("--train-all", action="store_true", help="trunk and classifier train, too, with the classes of those windows")
    a("--lr", type=float, default=0.05, help="largest learning rate (%(default)s)")
    a("--clip", type=float, default=1.0, help="limit of the norm of all gradients together (%(default)s)")
    a("--momentum", type=float, default=0.9, help="(%(default)s)")
    a("--weight-decay", type=float, default=1e-5, help="(%(default)s)")
    a("--flip", action="store_true", help="evaluate on the mirrored images, too")
    a("--match", choices=merge.MATCHES, default="dissimilarity", help="how well two boxes match (%(default)s)")
    a("--threshold", type=float, default=0.5, help="boxes that match up to this merge (%(default)s)")
    a("--least-probability", type=float, default=0.02, metavar="P", help="windows less sure of a class do not merge there (%(default)s, CHOICE: to save time; 0: all)")
    a("--measure-every", type=common.count, metavar="STEPS", help="error at two scales on 200 images (default: a fifth of the steps)")
    args = parser.parse_args(argv)
    args.measure_every = args.measure_every or -(-args.steps // 5)
    common.check(parser, args)
    for name in ("least", "least_probability"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(args, name)}")
    if math.isnan(args.threshold):
        parser.error("--threshold must be a number, got nan")
    return args


def read(args):
    """Training and evaluation examples, painted and each with a box, and the net that holds the classifier."""
    path = Path(args.weights or Path(args.out) / "overfeat_classify" / "weights.npz")
    if not path.is_file():
        raise FileNotFoundError(f"overfeat_localize: there are no weights of a classifier at {path}; first run "
                                "`python examples/overfeat_classify.py`, or name other weights with --weights")
    classifier, (*sets, classes) = overfeat.load(path)[0], common.read_labelled(args)
    if classifier.spec.classes != tuple(classes):
        raise ValueError(f"overfeat_localize: the classes of {path} must be those of the data, {', '.join(classes)}, got "
                         f"{', '.join(classifier.spec.classes)}")
    if classifier.spec.detector:
        raise ValueError(f"overfeat_localize: {path} must hold a classifier, got a detector")
    for e in (e for examples in sets for e in examples if not len(e.usable()[0])):
        raise ValueError(f"overfeat_localize: every image must have a box that is not difficult, got none in {e.name}")
    spec = dataclasses.replace(classifier.spec, regressor=args.regressor, from_window=True)
    net = overfeat.OverFeat(spec, np.random.default_rng(args.seed))
    for name, array in classifier.arrays().items():
        if not name.startswith("regressor."):
            net.arrays()[name][...] = array
    return *([dataclasses.replace(e, source=e.image()) if callable(e.source) else e for e in examples] for examples in sets), net


def views_of(net, image, kind, scales, flip, seconds=None):
    """Per scale what the windows see, a list of one view or, with flip, two. kind: "fine", "coarse" or "centre"."""
    seen = {}
    for scale in scales:
        start = time.perf_counter()
        seen[scale] = [overfeat_localize.look(net, image, net.table.sizes[scale - 1], mirrored, kind == "fine", kind == "centre")
                       for mirrored in (False, True)[:1 + flip]]
        if seconds is not None:
            seconds[kind, scale] += time.perf_counter() - start
    return seen


def of_class(views, label):
    """The views, as if there was no other class."""
    return [(boxes[:, [label % boxes.shape[1]]], p[:, [label]]) for boxes, p in views]


def evaluate(net, examples, flip, merging):
    """Guesses of MAIN (name "") and VARIANTS: {name: a list of guesses}, and milliseconds an image of each alone."""
    variants, seconds = {"": MAIN, **VARIANTS}, collections.Counter()
    found = {name: [] for name in variants}
    for e in train.progress(examples, desc="evaluate", unit="image"):
        seen = {kind: views_of(net, e.image(), kind, scales, flip, seconds)
                for kind, scales in (("fine", SIX), ("coarse", SIX), ("centre", (1,)))}
        for name, (kind, scales, more) in variants.items():
            start, views, label = time.perf_counter(), [v for s in scales for v in seen[kind][s]], e.image_labels()[0]
            alone = name == "true-class"
            boxes, labels, scores = overfeat_localize.guesses(of_class(views, label) if alone else views, **{**merging, **more})
            found[name].append((boxes, labels + label * alone, scores))
            seconds[name] += time.perf_counter() - start
    return found, {name: 1000 / len(examples) * (seconds[name] + sum(seconds[kind, s] for s in scales))
                   for name, (kind, scales, _) in variants.items()}


def wrong(found, examples):
    """Which images are wrong, by error: of the box in five guesses and in one, of the class in one and in five."""
    place, name = evaluate_classification.localization_error, evaluate_classification.classification_error
    return {"localization_error": place(found, examples), "localization1_error": place(found, examples, k=1),
            "top1_error": name(found, examples, k=1), "top5_error": name(found, examples)}


def picture(example, views, merging, classes):
    """Two pictures, with captions: the boxes of all windows that merge for the best class, where the ink of surer ones is stronger and
    adds up, and what became of them: the thickest is the answer, the others fade with their share of its score. The true box is white.
    """
    _, labels, _ = overfeat_localize.guesses(views, **merging)
    label = labels[0] if len(labels) else example.labels[0]
    b, s = map(np.concatenate, zip(*((boxes[:, 0], p[:, 0]) for boxes, p in of_class(views, label))))
    b, s = b[s >= merging["least"]], s[s >= merging["least"]]
    merged = merge.merge(b, s, merging["threshold"], merging["mode"], merging["match"])[:2]
    enlarge = 360 / max(example.size)
    size = [round(side * enlarge) for side in example.size]
    before = Image.fromarray(example.image()).resize(size, Image.Resampling.BICUBIC)
    (true,), b, after = (_corners(boxes, enlarge, size) for boxes in (example.boxes[:1], b, merged[0]))
    ImageDraw.Draw(before).rectangle(tuple(true), outline="white", width=3)
    pictures, ink = [before, before.copy()], np.zeros(size[::-1])
    for (x1, y1, x2, y2), p in zip(b, s):
        ink[y1:y2 + 1, [x1, x2]] += p
        ink[[y1, y2], x1 + 1:x2] += p
    alpha = np.sqrt(ink / max(ink.max(), 1e-9))[..., None]
    pictures[0] = Image.fromarray((np.asarray(before) * (1 - alpha) + np.array(RED) * alpha).astype(np.uint8))
    for i in np.argsort(merged[1]):
        share = merged[1][i] / merged[1].max()
        ImageDraw.Draw(pictures[1], "RGBA").rectangle(tuple(after[i]), outline=(*RED, round(255 * share)), width=max(1, round(4 * share)))
    return pictures, [f"{classes[example.labels[0]]}: {len(b)} windows, {classes[label]}",
                      f"{len(after)} boxes, the best adds up to {merged[1].max(initial=0):.1f}"]


def _corners(boxes, enlarge, size):
    """Boxes as whole pixels of a picture of that size (width, height), in order, cut at its border."""
    corners = np.sort((boxes * enlarge).reshape(-1, 2, 2), 1).reshape(-1, 4)
    return np.clip(np.round(corners), 0, np.tile(size, 2) - 1).astype(int).tolist()


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, net = read(args)
    table, classes, wide = net.table, net.spec.classes, np.array([e.size[0] >= e.size[1] for e in examples])
    merging = {"mode": "count", "match": args.match, "threshold": args.threshold, "least": args.least_probability}
    net.to(put)
    if not args.train_all:
        overfeat_localize.freeze_trunk(net)
    optimizer = optim.SGD(net, args.momentum, args.weight_decay, clip=args.clip)
    run = train.Run(Path(args.out) / args.name, common.settings(args, *EVALUATION), args.resume)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes, window {table.window}")
    print(summary(net, (1, *table.sizes[-1], 3)), flush=True)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        size = table.sizes[args.train_scales[rng.integers(len(args.train_scales))] - 1]     # CHOICE: one scale a step, all in turn
        offset = None if args.fine_training else tuple(rng.integers(table.pool, size=2).tolist())
        alike = np.flatnonzero(wide == wide[rng.integers(len(wide))])                       # a batch is all landscape or all portrait
        views, targets = [], []
        for j in rng.choice(alike, args.batch, replace=len(alike) < args.batch):
            boxes, labels = examples[j].usable()
            image, boxes = augment.random_flip(examples[j].image(), boxes, rng)
            (view, boxes), = overfeat_localize.training_scales(table, image, boxes, [size])
            sizes = overfeat.outputs(table, *view.shape[:2])
            views.append(view)
            targets.append(overfeat_localize.targets(table, *(sizes.fine if offset is None else sizes.coarse), boxes, labels, args.rule,
                                                     args.least, offset))
        return net.normalise(np.stack(views)), targets, offset, rng

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        x, targets, offset, rng = prepared
        if not args.train_all:
            return {"loss": overfeat_localize.regress_step(net, net.parts["trunk"](put(x)), targets, offset)}
        scores, edges, cache = net.forward(put(x), True, rng, offset)
        box_loss, dedges = overfeat_localize.loss(edges, targets)
        labels = np.concatenate([np.where(trains, of, -1) for _, of, trains in targets])
        class_loss, dscores = softmax_loss.loss(scores.reshape(len(labels), -1), put(labels))
        net.backward(dscores.reshape(scores.shape), dedges, cache)
        return {"loss": box_loss + class_loss, "box_loss": box_loss, "class_loss": class_loss}

    @run.aside
    def measure(i):
        seen = [views_of(net, e.image(), "coarse", (1, 4), False) for e in held_out[:200]]
        found = [overfeat_localize.guesses([v for views in e.values() for v in views], **merging) for e in seen]
        return common.keep_point(run, {"step": i, "localization_error": evaluate_classification.localization_error(found, held_out[:200]).error})

    train.fit(run, net, optimizer, optim.cosine_schedule(args.lr, args.steps, args.steps // 20), args.steps, step,
              args.checkpoint_every, prepare, args.workers)

    overfeat.save(net, run.folder / "weights.npz", {**merging, "flip": args.flip})
    curve = measure(args.steps)
    draw.measurements(curve, ("localization_error",), run.folder / "curve.png")
    draw.loss_curves(run.metrics(), ("loss", "box_loss", "class_loss") if args.train_all else ("loss",), run.folder / "loss.png")
    shown = [picture(e, [v for views in views_of(net, e.image(), "fine", SIX, args.flip).values() for v in views], merging, classes)
             for e in held_out[:8]]
    pictures, captions = (sum(column, []) for column in zip(*shown))
    draw.save(draw.sheet(pictures, 4, captions), run.folder / "boxes.png")
    found, milliseconds = evaluate(net, held_out, args.flip, merging)
    figures = {}
    print(f"{'':12}{'box in 5':>10}{'box in 1':>10}{'class in 1':>12}{'class in 5':>12}{'ms/image':>10}   share of images that are wrong")
    for name, guesses in found.items():
        figures[name] = {**common.keep_wrong(run, name, wrong(guesses, held_out)), "milliseconds": round(milliseconds[name], 2)}
        print("{:12}{:10.3f}{:10.3f}{:12.3f}{:12.3f}{:10.1f}".format(name or "six scales", *figures[name].values()))
    return common.keep_results(run, args, {**figures.pop(""), "merging": merging, "curve": curve, "also": figures,
                                           "seconds": common.seconds(args, start)})


if __name__ == "__main__":
    common.start(main, arguments())
