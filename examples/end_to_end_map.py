"""Fine-tune a Fast R-CNN, trained with softmax, for mean average precision after NMS itself, in the spirit of Henderson & Ferrari
(1607.03476; tinydet/models/fast_rcnn_map.py, tinydet/ops/map_loss.py, which say what of the paper could be read).

    python examples/end_to_end_map.py                               # embedded scenes, the softmax-trained net included
    python examples/end_to_end_map.py --loss softmax --name further # what it is compared with: as many further softmax updates
    python examples/end_to_end_map.py --estimator env --name env    # the other pseudo-gradient
    python examples/end_to_end_map.py --data FOLDER --weights runs/NAME/weights.npz --name cells        # a run of examples/ohem.py
    python examples/end_to_end_map.py --trains all --batch 64       # the trunk, too; of the caches only one image's are in memory

The loss is 1 - mAP of a batch of images, ranked together, each class after NMS in each image. At step 0 the detector is the net that it starts from,
but tested as the loss sees it, whatever --loss: the --candidates best windows of each class in an image, however low their scores, go into NMS,
without iteration; and --scores raw ranks by other numbers than softmax. A rate that is too high loses whole classes within some steps.
Without --weights the net is trained first, by examples/ohem.py --sampler random, in <out>/softmax, or softmax-FOLDER. With --trains head the maps of
the trunk are computed once and kept, up to a gigabyte of them.

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py), detections.json, results.json,
loss.png, precision_recall.png, detections.png, false_positives/, and
curve.json, curve.png       average precision of the evaluation set and of training images while it trained, from the start
profiles/<step>.png         AP as the score of one window moves: steps, the NMS breakpoint, and what both estimators make of them
A run that was stopped goes on with --resume.
"""
import argparse
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np
import ohem

from tinydet import augment, draw, evaluate, optim, proposals, train
from tinydet.backend import array_module, to_numpy
from tinydet.models import fast_rcnn, fast_rcnn_map
from tinydet.ops import map_loss


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "map")
    a("--weights", metavar="FILE", help="weights.npz of examples/ohem.py (default: trained first)")
    a("--loss", choices=("map", "softmax"), default="map", help="softmax: further updates of Fast R-CNN, on the same images (%(default)s)")
    a("--estimator", choices=("sde", "env"), default="sde", help="the pseudo-gradient: a finite step, or the linear envelope (%(default)s)")
    a("--delta", type=float, help="half the finite step, in units of the scores (default: --kappa standard deviations of a class's candidates)")
    a("--kappa", type=float, default=1.0, help="(%(default)s)")
    a("--reach", type=float, help="how far the envelope looks (default: 3 standard deviations)")
    a("--least", type=float, help="distance below which its slopes grow no more (default: 0.2 standard deviations)")
    a("--ap", choices=map_loss.MODES, default="prec", help="which average precision the loss takes (%(default)s)")
    a("--log", action="store_true", help="minimise -log(mAP), not 1 - mAP")
    a("--scores", choices=fast_rcnn_map.RANKED, default="log_odds", help="by what windows rank (%(default)s; raw: the net's outputs as they are)")
    a("--batch", type=common.count, default=32, help="images a step (%(default)s)")
    a("--windows", type=common.count, default=1000, help="of a training image, drawn anew each time where there are more (%(default)s)")
    a("--candidates", type=common.count, default=100, help="best windows of each class in an image that go into NMS (%(default)s; on a GPU 256 at most)")
    a("--box-weight", type=float, default=1.0, help="of smooth L1 beside the mAP loss (%(default)s)")
    a("--softmax-weight", type=float, default=0.0, help="of cross-entropy beside the mAP loss (%(default)s)")
    a("--score-weight", type=float, default=0.01, help="of the candidates' mean squared score (%(default)s)")
    a("--centre", action="store_true", help="take the mean off a class's pseudo-gradients, which else push most scores down: for the envelope and large "
      "steps, which diverge without")
    a("--clip", type=float, default=1.0, help="limit of the norm of the mAP loss's gradient by the scores (%(default)s)")
    a("--regions", type=common.count, default=64, help="of an image that train with --loss softmax (%(default)s)")
    a("--jitter", type=common.count, default=4, help="jittered copies of each object, with --loss softmax (%(default)s)")
    a("--trains", choices=fast_rcnn_map.TRAINS, default="head", help="what trains (%(default)s)")
    a("--proposals", metavar="FILE", help="regions from a .mat or .json file, for a net trained on such")
    a("--steps", type=common.count, default=60, help="training steps (%(default)s)")
    a("--lr", type=float, help="largest learning rate, it falls along a cosine (map 0.0003, softmax 0.005)")
    a("--momentum", type=float, default=0.9, help="(%(default)s)")
    a("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    a("--watch", type=common.count, default=60, help="training images whose average precision is followed (%(default)s)")
    a("--measure-every", type=common.count, metavar="STEPS", help="average precision, and a profile (default: a fifth of the steps)")
    args = parser.parse_args(argv)
    args.lr = (0.0003 if args.loss == "map" else 0.005) if args.lr is None else args.lr
    args.measure_every = args.measure_every or -(-args.steps // 5)
    common.check(parser, args)
    if args.name == source_name(args):
        parser.error(f"--name must not be that of the softmax-trained net, {args.name}")
    return args


def source_name(args):
    """The run in which the net is trained with softmax first, where no --weights are given."""
    return f"softmax-{Path(args.data).resolve().name}" if args.data else "softmax"


def objective_of(args, nms):
    """The Objective of the arguments; NMS as at test time (1607.03476: the same model in training and test). Raises ValueError for what is none."""
    same = "scores estimator delta kappa reach least ap log box_weight softmax_weight score_weight clip centre".split()
    return fast_rcnn_map.Objective(most=args.candidates, nms=nms, **{name: getattr(args, name) for name in same})


def started(args, put, classes):
    """The softmax-trained net, where its windows come from, and how it is tested; sets args.weights."""
    if not args.weights:
        place = ["--data", args.data, "--train-set", args.train_set, "--eval-set", args.eval_set] if args.data else ["--scenes", str(args.scenes)]
        place += ["--proposals", args.proposals] if args.proposals else []
        args.weights = str(common.trained(args, put, ohem, source_name(args), "--sampler", "random", *place))
    net, settings = fast_rcnn.load(args.weights)
    if tuple(net.spec.classes) != tuple(classes):
        raise ValueError(f"end_to_end_map: {args.weights} must have the classes of the data, {', '.join(classes)}, got {', '.join(net.spec.classes)}")
    source = args.proposals or settings.get("windows")
    if source is None:
        raise ValueError(f"end_to_end_map: {args.weights} was trained on proposals from a file: give those of these images by --proposals")
    try:
        testing = fast_rcnn.Testing(**settings.get("testing", {}))
    except TypeError as error:
        raise ValueError(f"end_to_end_map: {args.weights} must hold settings of examples/ohem.py, got: {error}") from None
    scores = "raw" if (args.loss, args.scores) == ("map", "raw") else "softmax"
    testing = dataclasses.replace(testing, scores=scores, min_score=0.0, per_class=args.candidates, limit=args.candidates * len(classes), iterate=False)
    return fast_rcnn_map.freeze(net.to(put), args.trains), source, testing


class Picture(NamedTuple):
    """A training image, mirrored or not, as the net sees it. x: (1, H, W, 3), or None beside kept maps; the rest in its pixels."""

    x: np.ndarray
    maps: np.ndarray
    size: tuple
    proposals: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


def main(args, put):
    start = time.perf_counter()
    draw.require()
    objective_of(args, 0.3)                                         # refuses what is wrong before anything is trained
    if args.backend in ("cuda", "emulated") and args.loss == "map" and args.candidates > 64 * map_loss.WORDS:
        raise ValueError(f"end_to_end_map: --candidates must be at most {64 * map_loss.WORDS} on --backend {args.backend}, got {args.candidates}")
    examples, held_out, classes = common.read(args)
    net, source, testing = started(args, put, classes)
    objective = objective_of(args, testing.nms)
    sampler = fast_rcnn.Sampler("random", args.regions * args.batch)
    regions, test_regions = (proposals.for_examples(source, some) for some in (examples, held_out))
    spec = dataclasses.replace(net.spec, short=(max(net.spec.short),))          # one scale, so that maps can be kept
    optimizer = optim.SGD(net, args.momentum, args.weight_decay)
    schedule = optim.cosine_schedule(args.lr, args.steps, args.steps // 20)
    run = train.Run(Path(args.out) / args.name, common.settings(args, "measure_every", "watch"), args.resume)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes; trains: {args.trains}, by {args.loss}", flush=True)
    kept, fixed = {}, args.trains == "head"

    def picture(j, mirrored):
        if (j, mirrored) in kept:
            return kept[j, mirrored]
        image, windows, boxes, labels, difficult = fast_rcnn.training_image(spec, examples[j], regions[j], np.random.default_rng(0), mirror=False)
        if mirrored:
            image, both = augment.random_flip(image, np.concatenate([boxes, windows]), np.random.default_rng(0), 1.0)
            boxes, windows = np.split(both, [len(boxes)])
        return Picture(fast_rcnn.batch(net, [image]), None, image.shape[:2], windows, boxes, labels, difficult)

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        views = []
        for j in common.drawn(rng, len(examples), args.batch).tolist():
            mirrored = bool(rng.integers(2))
            p = picture(j, mirrored)
            windows = p.proposals
            if len(windows) > args.windows:
                windows = windows[np.sort(rng.choice(len(windows), args.windows, replace=False))]
            if args.loss == "softmax":                              # Fast R-CNN's regions: the objects, and some near them, too
                near = np.concatenate([fast_rcnn.jittered(p.boxes, args.jitter, p.size, rng), windows])
                found = fast_rcnn.label(spec, near, p.boxes, p.labels, p.difficult)
                view = fast_rcnn_map.View(p.x, p.maps, p.size, found, p.boxes, p.labels, p.difficult)
            else:
                view = fast_rcnn_map.view(spec, p.size, windows, p.boxes, p.labels, p.difficult, p.x, p.maps)
            views.append((j, mirrored, p, view))
        return views, rng

    def seen(j, mirrored, p, view):
        """The view with what the trunk takes, or with its maps, which are kept while they fit."""
        if view.x is not None:
            x = put(view.x)
            view = view._replace(x=None, maps=net.features(x)[0]) if fixed else view._replace(x=x)
            if fixed and len(kept) * view.maps.nbytes < common.KEPT:
                kept[j, mirrored] = p._replace(x=None, maps=view.maps)
        return view

    def step(i, prepared):
        views, rng = prepared
        views = [seen(*v) for v in views]
        if i % args.measure_every == 0:
            measure(i)
            if args.loss == "map":
                run.aside(profiles)(net, views, objective, classes, [args.seed, i], run.folder / "profiles" / f"{i:06d}.png")
        if args.loss == "map":
            return fast_rcnn_map.step(net, views, objective, [args.seed, i])
        return softmax_step(net, views, sampler, rng)

    watched = examples[:args.watch]

    @run.aside
    def measure(i):
        detections = [fast_rcnn.detect(net, e.image(), p, testing) for e, p in zip(held_out, test_regions)]
        found = evaluate.voc([fast_rcnn.detect(net, e.image(), p, testing) for e, p in zip(watched, regions)], watched, classes)
        return detections, common.measure(run, i, detections, held_out, classes, **{"train AP50": evaluate.mean_ap(found)})

    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)

    detections, curve = measure(args.steps)
    if args.loss == "map":
        views = [seen(*v) for v in prepare(0)[0]]
        profiles(net, views, objective, classes, [args.seed, 0], run.folder / "profiles" / f"{args.steps:06d}.png")
    draw.measurements(curve, ("mean AP50", "train AP50"), run.folder / "curve.png")
    settings = {"windows": source if isinstance(source, dict) else None, "testing": dataclasses.asdict(testing)}
    return common.finish(run, args, detections, held_out, classes, ("loss", "map_loss") if args.loss == "map" else ("loss",),
                         lambda path, cut: fast_rcnn.save(net, path, {**settings, "cut": cut}), testing=settings["testing"], curve=curve,
                         seconds=common.seconds(args, start))


def softmax_step(net, views, sampler, rng):
    """A step of Fast R-CNN on the views, as fast_rcnn.step, with maps that are kept where the trunk does not train."""
    found = [v.regions for v in views]
    trunk, xp = net.parts["trunk"], array_module(views[0].x if views[0].maps is None else views[0].maps)
    maps, caches = zip(*((v.maps, None) if v.x is None else net.features(v.x, True, rng) for v in views))
    values, _, dscores, ddeltas, cache = fast_rcnn.head_step(net, stacked(maps, xp), found, sampler, rng)
    if trunk.frozen:
        net.backward_head(dscores, ddeltas, cache)
    else:
        for m, dmaps, c in zip(maps, net.backward_regions(dscores, ddeltas, cache), caches):
            trunk.backward(dmaps[None, :m.shape[1], :m.shape[2]], c)
    return values


def stacked(maps, xp):
    """Maps (1, h, w, C) of different sizes as one array (N, H, W, C), each in the upper left corner, the rest 0."""
    y = xp.zeros((len(maps), max(m.shape[1] for m in maps), max(m.shape[2] for m in maps), maps[0].shape[3]), maps[0].dtype)
    for n, m in enumerate(maps):
        y[n, :m.shape[1], :m.shape[2]] = m[0]
    return y


# A picture of the pseudo-gradient

KINDS = {"kept, a true positive": lambda kept, flag: kept & (flag == 1), "kept, a false positive": lambda kept, flag: kept & (flag == 0),
         "suppressed": lambda kept, flag: ~kept}


def profiles(net, views, objective, classes, seed, path):
    """Draw AP of a class of the batch as the score of one window moves: of each of KINDS that of the largest pseudo-gradient."""
    scores, deltas = fast_rcnn_map.outputs(net, views, objective, seed)
    given = fast_rcnn_map.ranked(net, fast_rcnn_map.ranking_scores(scores, objective.scores), deltas, views)
    given = to_numpy(given[0]), to_numpy(given[1]), *given[2:]
    options = objective.ranking()
    slopes = map_loss.loss(*given, **{**options, "log": False})[1]
    _, kept, flags = map_loss.average_precisions(*given, **{k: options[k] for k in ("nms", "match", "most", "ap")})
    drawn = {}
    for kind, of in KINDS.items():
        size = np.where(of(kept, flags), abs(slopes), 0.0)
        if size.max(initial=0) > 0:
            window, k = map(int, np.unravel_index(size.argmax(), size.shape))
            drawn[f"{classes[k]}, {kind}"] = map_loss.profile(*given, window=window, label=k,
                                                              **{name: v for name, v in options.items() if name not in ("estimator", "log")})
    if drawn:
        path.parent.mkdir(exist_ok=True)
        draw.profiles(drawn, path)


if __name__ == "__main__":
    common.start(main, arguments())
