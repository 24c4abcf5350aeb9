"""Transfer mid-level features (Oquab et al., CVPR 2014): patches of a few images with boxes train two adaptation layers on a frozen net.

    python examples/transfer.py                                     # embedded scenes, the source net included: under three minutes on two cores
    python examples/transfer.py --data FOLDER --weights runs/NAME/weights.npz       # its source: examples/pretrain.py
    python examples/transfer.py --start random --name scratch       # no pre-training: all layers train on the same patches
    python examples/transfer.py --preset action --name action       # one patch for each given box, FC6 trains, too

Images become square patches on a grid (sec. 3.2), labelled by overlap with the boxes; a share of the background trains. An image's score for a class
is the mean over its patches of y^k (sec. 3.3), its map the mean (or sum) of y over the patches that cover a pixel. The features are computed
once. Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz, results.json, loss.png, precision_recall.png, and
features-<number>.npy                   of the frozen layers; the number stands for these layers and the patches
ranking.json, ranking_<variant>.json    what average precision is made of: with other k, the whole image alone, the sum of y, the image's middle
curve.json, curve.png                   average precision by image while it trained, from the start
maps.png, maps_training.png, maps/      where it sees a class, and how that came about
false_positives/                        for each class the images without it that score highest
With --patches boxes a patch is judged for each given box, and there are no maps; the background, which has no example then, keeps its output.
A run that was stopped goes on with --resume.
"""
import argparse
import math
import time
import zlib
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import image_level
import numpy as np

from tinydet import draw, evaluate, evaluate_classification, files, optim, train
from tinydet.backend import put as place, to_numpy
from tinydet.models import oquab, oquab_patches
from tinydet.ops import softmax_loss
from tinydet.summary import summary

# CVPR 2014, sec. 3 and 4; "action": PRE-1512U. The rate falls to a tenth after each third of the steps (three rounds). CHOICE: 30 epochs, where
# the paper trains until the loss no longer falls, and batches that are drawn anew from all patches; scratch: --start random, its NO PRETRAIN
PAPER = {"lambdas": list(oquab_patches.LAMBDAS), "overlap": 2 / 3, "background": 0.1, "lr": 0.01, "batch": 128, "dropout": 0.5, "k": 5.0,
         "epochs": 30, "scratch": image_level.SCRATCH}
PRESETS = {"paper": PAPER, "action": {**PAPER, "patches": "boxes", "trains": "fc6"}}
MEASURED = 60                       # images of the evaluation set that points of the curve look at
POWERS = (1, 3, 5, 10)              # variants of k
AT_ONCE = 64                        # patches that go through the net together


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "transfer")
    image_level.add_arguments(parser)
    a("--preset", choices=PRESETS, help="the paper's settings; those given beside it win")
    a("--patches", choices=("tiles", "boxes"), default="tiles", help="a grid over the image, or one for each given box (%(default)s)")
    a("--lambdas", type=float, nargs="+", default=[1, 1.6, 2.4, 3.2, 4], help="patches have sides min(W, H) / lambda (%(default)s; the paper has nine)")
    a("--overlap", type=float, default=0.5, help="least share of a patch that its neighbour covers, too (%(default)s)")
    a("--background", type=float, default=0.1, metavar="SHARE", help="of the background patches, those that train (%(default)s)")
    a("--same-class-ok", action="store_true", help="patches with two objects of one class train, too")
    a("--k", type=float, default=5.0, help="exponent of y in an image's score (%(default)s)")
    a("--reduce", choices=("mean", "sum"), default="mean", help="maps: over the patches that cover a pixel (%(default)s, the paper; its slides: sum)")
    a("--steps", type=common.count, help="training steps (3000; --preset: its epochs)")
    a("--batch", type=common.count, default=64, help="patches a step (%(default)s)")
    a("--lr", type=float, default=0.05, help="first learning rate; a tenth after each third of the steps (%(default)s)")
    a("--momentum", type=float, default=0.9, help="(%(default)s)")
    a("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    a("--dropout", type=float, default=0.2, help="of FC7 and FCa (%(default)s)")
    args = common.parse(parser, argv, PRESETS)
    image_level.check(parser, args)
    if not (all(1 <= v < math.inf for v in args.lambdas) and 0 <= args.overlap < 1 and 0 <= args.background <= 1 and 1 <= args.k < math.inf):
        parser.error("--lambdas must be at least 1, --overlap lie in [0, 1), --background in [0, 1], --k be at least 1, got "
                     f"{args.lambdas}, {args.overlap}, {args.background}, {args.k}")
    return args


class Patches:
    """What patches of images look like; kind: "tiles" are cut out, "boxes" have a square around them, mirrored at the border."""

    def __init__(self, examples, side, kind):
        self.examples, self.side, self.kind = examples, side, kind

    def of(self, i, tiles):
        """Pixels of image i's patches, uint8 (R, side, side, 3)."""
        image = self.examples[i].image()
        if self.kind == "tiles":
            return oquab_patches.cut(image, tiles, self.side)
        return np.array([oquab_patches.mirrored_patch(image, box, self.side) for box in tiles]).reshape(-1, self.side, self.side, 3)


def tiles_of(args, example):
    """(M, 4) float64: the patches of an example, pixels of its image."""
    return oquab_patches.tiles(*example.size, tuple(args.lambdas), args.overlap)


def training_patches(args, examples, K):
    """What trains: index of the image (M,), box (M, 4), label (M,), the background K. The same for every --seed."""
    image, boxes, labels = [], [], []
    for i, e in enumerate(examples):
        if args.patches == "tiles":
            some = tiles_of(args, e)
            answer = oquab_patches.label(some, e.boxes, e.labels, K, e.difficult, args.same_class_ok)
        else:                                                       # a box of several classes, as a person of several actions, is left out
            some, of = given_boxes(e, K)
            answer = np.where(of.sum(1) == 1, of.argmax(1), -1)
        image.append(np.full(len(some), i))
        boxes.append(some)
        labels.append(answer)
    image, boxes, labels = map(np.concatenate, (image, boxes, labels))
    kept = oquab_patches.resample(labels, K, args.background, np.random.default_rng(0))
    if not (labels[kept] < K).any():
        raise ValueError(f"transfer: the boxes of the training images must give at least one patch with an object, got none of {len(examples)} images")
    print("patches that train: " + f"{len(kept)} of {len(labels)}, {(labels[kept] < K).sum()} of a class, {(labels[kept] == K).sum()} of the background; "
          f"{(labels < 0).sum()} hold several objects")
    return image[kept], boxes[kept], labels[kept]


def given_boxes(example, K):
    """The different boxes (R, 4) of an image, without difficult ones, and (R, K) which classes each has."""
    boxes, labels = example.usable()
    if not len(boxes):
        return np.zeros((0, 4)), np.zeros((0, K), int)
    different, which = np.unique(boxes, axis=0, return_inverse=True)
    of = np.zeros((len(different), K), int)
    of[which.reshape(-1), labels] = 1
    return different, of


def features(args, run, net, patches, image, boxes):
    """What the layers that train take, (M, h, w, C), by the order of the patches: a file in the run folder, made if it is not there.

    It is read as it is needed, for the paper's runs would not fit into memory. Its name tells the frozen layers and the patches.
    """
    frozen = [to_numpy(a) for name, a in net.params.items() if name not in net.trained]
    number = zlib.crc32(b"".join(np.ascontiguousarray(a).tobytes() for a in (*frozen, image, boxes)))
    path = run.folder / f"features-{number:08x}.npy"
    if not path.exists():
        y, at = None, 0
        with files.whole(path) as part:
            for i in train.progress(np.unique(image), desc="features", unit="image"):
                found = through(lambda x: oquab.frozen_part(net, x, args.trains), net, patches.of(i, boxes[image == i]))
                if y is None:
                    y = np.lib.format.open_memmap(part, "w+", found.dtype, (len(image), *found.shape[1:]))
                y[at:at + len(found)] = found
                at += len(found)
            y.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def through(layers, net, pixels):
    """layers(x) on the host, AT_ONCE of the patches at a time; pixels: uint8 (R, side, side, 3)."""
    return np.concatenate([to_numpy(layers(place(net.normalise(pixels[first:first + AT_ONCE])))) for first in range(0, len(pixels), AT_ONCE)])


def probabilities(net, pixels):
    """(R, K) float64: what the net says of patches, without the background's."""
    return softmax_loss.softmax(through(net, net, pixels)[:, 0, 0].astype(np.float64))[:, :-1]


def look(args, net, patches, i):
    """Tiles of image i and what the net says of each: (M, 4), (M, K) probabilities without the background's."""
    tiles = tiles_of(args, patches.examples[i])
    return tiles, probabilities(net, patches.of(i, tiles))


def heat(args, example, tiles, y, reduce=None):
    """(H, W, K) float64: the map of an image from its tiles (M, 4) and what the net says of them, (M, K); reduce: that of --reduce if None."""
    return oquab_patches.heat_map(tiles, y, *example.size, reduce or args.reduce)


def highest(maps):
    """(K, 2) float64, (x, y) in pixels: the middle of the first largest pixel, in row order, of each class's map (H, W, K)."""
    y, x = np.unravel_index(maps.reshape(-1, maps.shape[2]).argmax(0), maps.shape[:2])
    return np.stack([x, y], 1) + 0.5


def evaluate_all(args, run, net, patches, classes):
    """Figures of all variants, scores (N, K), points (N, K, 2) and what the net says of the tiles of each image."""
    examples, K = patches.examples, len(classes)
    scores, whole, points, seen = {k: [] for k in {args.k, *POWERS}}, [], {"mean": [], "sum": []}, []
    for i, e in enumerate(train.progress(examples, desc="evaluate", unit="image")):
        tiles, y = look(args, net, patches, i)
        seen.append((tiles, y))
        for k in scores:
            scores[k].append(oquab_patches.image_score(y, k))
        image = oquab_patches.cut(e.image(), np.array([[0.0, 0.0, *e.size]]), patches.side)
        whole.append(probabilities(net, image)[0])
        for reduce in points:
            points[reduce].append(highest(heat(args, e, tiles, y, reduce)))
    scores, points = ({name: np.array(v) for name, v in of.items()} for of in (scores, points))

    def told(variant, *what):
        return image_level.scored(run, variant, examples, classes, args.tolerance, *what)
    found = {"": {**told("", scores[args.k], points[args.reduce]), **image_level.eleven_point(scores[args.k], examples, classes)}}
    for k in POWERS:
        found[f"k{k}"] = told(f"k{k}", scores[k])
    for reduce, where in points.items():
        found[reduce] = told(reduce, None, where, scores[args.k])
    found["whole"] = told("whole", np.array(whole))
    found["middle"] = told("middle", None, image_level.middles(examples, K), scores[args.k])
    return found, scores[args.k], points[args.reduce], seen


def judge_boxes(net, patches, classes):
    """The action task: what the net says of the patch of each given box, (R, K), and which classes the box has, (R, K) of 0 and 1."""
    found = [(probabilities(net, patches.of(i, boxes)), of) for i, e in enumerate(patches.examples)
             for boxes, of in [given_boxes(e, len(classes))] if len(boxes)]
    return tuple(np.concatenate(column) for column in zip(*found))


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = image_level.read(args)
    if args.patches == "boxes" and not any(len(e.usable()[0]) for e in held_out):
        raise ValueError(f"transfer: --patches boxes needs boxes to evaluate, not difficult, got none in {len(held_out)} images")
    K = len(classes)
    if told := [e.name for e in examples if e.tags is not None and not len(e.boxes)]:
        raise ValueError(f"transfer: the training images must have boxes, got labels of whole images, as {told[0]}: weak_localization.py learns from those")
    net = image_level.build(args, put, examples, classes, "strong")
    side = net.table.window
    patches, unseen = (Patches(some, side, args.patches) for some in (examples, held_out))
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {K} classes, window {side}; trains: {args.trains}")
    print(summary(net, (1, side, side, 3)), flush=True)
    image, boxes, labels = training_patches(args, examples, K)
    common.settle(args, len(labels), 3000)
    optimizer = optim.SGD(net, args.momentum, args.weight_decay)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "measure_every", "tolerance", "k", "reduce"), args.resume)
    before = time.perf_counter()
    y = None if args.trains == "all" else features(args, run, net, patches, image, boxes)
    took = time.perf_counter() - before
    rest = oquab.rest(net, args.trains)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        batch = common.drawn(rng, len(labels), args.batch)
        x = y[batch] if y is not None else net.normalise(np.concatenate([patches.of(image[j], boxes[j:j + 1]) for j in batch]))
        return x, labels[batch], rng

    def step(i, prepared):
        if i % args.measure_every == 0:
            measure(i)
        x, answer, rng = prepared
        scores, cache = rest.forward(put(x), True, rng)
        loss, dscores = softmax_loss.loss(scores.reshape(len(answer), -1), put(answer))
        rest.backward(dscores.reshape(scores.shape), cache)
        return {"loss": loss}

    @run.aside
    def measure(i):
        if args.patches == "boxes":
            found = evaluate_classification.classification_ap(*judge_boxes(net, unseen, classes), classes)
        else:
            seen = [look(args, net, unseen, j) for j in range(min(MEASURED, len(held_out)))]
            scores = np.array([oquab_patches.image_score(p, args.k) for _, p in seen])
            found = evaluate_classification.classification_ap(scores, evaluate_classification.presence(held_out[:len(seen)], K), classes)
            shown = [(e, image_level.first_class(e), *s) for e, s in zip(held_out[:image_level.SHOWN], seen)]
            image_level.keep_maps(run, i, [None if k is None else heat(args, e, tiles, p)[..., k] for e, k, tiles, p in shown])
        return common.keep_point(run, {"step": i, "class_ap": evaluate.mean_ap(found)})

    third = args.steps // 3
    schedule = optim.step_schedule(args.lr, [third, 2 * third] if third else [], 0.1)
    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)
    run.seconds += took
    oquab.save(net, run.folder / "weights.npz", {"lambdas": args.lambdas, "overlap": args.overlap, "k": args.k})
    draw.loss_curves(run.metrics(), ("loss",), run.folder / "loss.png")
    curve = measure(args.steps)
    draw.measurements(curve, ("class_ap",), run.folder / "curve.png")
    if args.patches == "boxes":
        scores, there = judge_boxes(net, unseen, classes)
        found = {"": common.keep_ranking(run, "", {"class_ap": (scores, there == 1, there)}, classes)}
        results = evaluate_classification.classification_ap(scores, there, classes)
        draw.precision_recall(results, run.folder / "precision_recall.png", f"{args.name}: {args.eval_set}, boxes of the class")
        print("\n".join(f"{name:14} {r.ap:6.3f}" for name, r in results.items()) + f"\nmean           {found['']['class_ap']:6.3f}")
    else:
        found, scores, points, seen = evaluate_all(args, run, net, unseen, classes)

        def maps(i):
            return np.moveaxis(heat(args, held_out[i], *seen[i]), 2, 0)
        image_level.finish(run, args, held_out, classes, scores, maps, points, found)
    return common.keep_results(run, args, {"images": len(held_out), **found.pop(""), "also": found, "curve": curve, "patches": len(labels),
                                           "seconds": common.seconds(args, start)})


if __name__ == "__main__":
    common.start(main, arguments())
