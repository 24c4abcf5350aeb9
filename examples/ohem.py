"""Train Fast R-CNN with online hard example mining, or with what it is compared with, evaluate it, and draw what it found
(1604.03540; tinydet/models/fast_rcnn.py, tinydet/ops/ohem.py).

    python examples/ohem.py                                         # embedded scenes, hard regions
    python examples/ohem.py --sampler random                        # Fast R-CNN's heuristics
    python examples/ohem.py --data FOLDER --name cells              # train on its split "train", evaluate on "val"
    python examples/ohem.py --preset voc --data VOC2007 --pretrained VGG16.npz --proposals selective_search.mat --backend cuda

The preset trains on trainval and evaluates test; python -m tinydet.evaluate --voc VOC2007 --set test --metric 11 runs/<name>/detections.json then
gives the 11-point average precision of the papers.

Everything goes to runs/<name>/: config.json, metrics.jsonl, checkpoint.npz, weights.npz (for examples/detect.py), detections.json (with
--also-iterate detections_iterate.json, too), results.json, loss.png, precision_recall.png, detections.png, false_positives/, and
curve.json, curve.png   average precision and the mean loss of all regions while it trained
regions/<step>.png      the regions that trained at a step
A run that was stopped goes on with --resume.
"""
import argparse
import dataclasses
import json
import time
from pathlib import Path

import common                                                       # before numpy, as tinydet: sets how BLAS threads wait
import numpy as np

from tinydet import backend, data, draw, files, optim, proposals, train
from tinydet.models import fast_rcnn, fast_rcnn_weights
from tinydet.summary import summary

# The paper's recipes for VGG16 on PASCAL VOC (1604.03540 and its released code; VOC07: 80,000 steps, the rate times 0.1 every 30,000)
VOC = {"table": "VGG16", "images": 2, "batch": 128, "short": [600], "longest": 1000, "steps": 80000, "lr": 0.001, "decay_at": [30000, 60000],
       "bias_rate": 2.0, "dropout": 0.5, "targets": "classes", "jitter": 0, "float_bins": True, "min_score": 1e-5, "limit": 2000, "near": 224.0,
       "train_set": "trainval", "eval_set": "test"}
PRESETS = {"voc": VOC,
           "voc-multiscale": {**VOC, "short": [480, 576, 688, 864, 900], "test_short": [480, 576, 688, 864, 1000], "longest": 2000, "iterate": True}}

EVALUATION = ("nms", "min_score", "limit", "iterate", "also_iterate", "test_short", "near")      # a finished run may change them


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    common.add_arguments(parser, "ohem")
    a("--preset", choices=PRESETS, help="the paper's settings; those given beside it win")
    a("--sampler", choices=fast_rcnn.SAMPLERS, default="ohem", help="which regions train (%(default)s)")
    a("--images", type=common.count, help="images a step, N (scenes 8, folders 2 as in the paper)")
    a("--batch", type=common.count, default=512, help="regions a step, B (%(default)s, CHOICE: objects may be many; the paper: 128)")
    a("--fraction", type=float, default=0.25, help="of them with an object at most, of random (%(default)s)")
    a("--bg-lo", type=float, help="smallest overlap of a region of the background (random 0.1, else 0)")
    a("--label-free", action="store_true", help="near-duplicates are dropped whatever their label, as the paper's text has it")
    a("--accumulate", choices=fast_rcnn.ACCUMULATE, default="mean_of_means", help="how the images' losses add up (%(default)s)")
    a("--table", choices=fast_rcnn.TABLES, default="small", help="the net (%(default)s)")
    a("--pretrained", metavar="FILE", help="published weights, .npz or .safetensors, by name; their first layers do not train")
    a("--pixels", choices=common.PIXELS, default="caffe", help="what pretrained weights want to see (%(default)s)")
    a("--proposals", metavar="FILE", help="regions from a .mat or .json file (default: sliding windows)")
    a("--least", type=float, default=0.5, help="IoU that some window reaches with every object in range (%(default)s)")
    a("--share", type=float, default=0.98, help="of the training boxes' sizes and shapes that is in range (%(default)s)")
    a("--most", type=common.count, default=4000, help="regions of a training image, drawn anew each time where there are more (%(default)s)")
    a("--jitter", type=int, default=4, help="jittered copies of each object among the training regions (%(default)s)")
    a("--targets", choices=("fixed", "all", "classes"), default="fixed", help="boxes normalised by 0.1 and 0.2, or by statistics: of all, of each class")
    a("--short", type=common.count, nargs="+", help="short side of a training image in pixels, or several to draw from (scenes 128, folders 240)")
    a("--test-short", type=common.count, nargs="+", help="short sides at which images are tested (default: the largest of --short)")
    a("--near", type=float, metavar="PIXELS", help="with several --test-short a region goes where its side is nearest (default: 224/600 of the "
      "largest --short, CHOICE; the papers: 224, at short sides about 600)")
    a("--longest", type=common.count, default=1000, help="limit of the long side (%(default)s)")
    a("--steps", type=common.count, help="training steps (scenes 600, folders 1000)")
    a("--lr", type=float, help="largest learning rate (scenes 0.06, folders 0.02)")
    a("--decay-at", type=common.count, nargs="+", metavar="STEP", help="the rate falls to a tenth at these steps (default: along a cosine)")
    a("--bias-rate", type=float, default=1.0, help="factor of the rate for biases (%(default)s; Caffe's nets: 2)")
    a("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    a("--dropout", type=float, default=0.0, help="(%(default)s)")
    a("--float-bins", action="store_true", help="Caffe's float32 bins in RoI pooling")
    a("--nms", type=float, default=0.3, help="IoU of a class's detections above which the weaker goes (%(default)s)")
    a("--min-score", type=float, default=0.05, help="of a detection (%(default)s)")
    a("--limit", type=common.count, default=300, help="detections of an image (%(default)s)")
    a("--iterate", action="store_true", help="boxes go in as regions once more, and vote")
    a("--also-iterate", action="store_true", help="evaluate once more with --iterate")
    a("--measure-every", type=common.count, metavar="STEPS", help="average precision and mean loss of all regions (default: a fifth of the steps)")
    a("--draw-every", type=common.count, metavar="STEPS", help="draw the regions that train (default: a fifth of the steps)")
    args = common.parse(parser, argv, PRESETS)
    args.steps = args.steps or (1000 if args.data else 600)
    args.images = args.images or (2 if args.data else 8)
    args.lr = (0.02 if args.data else 0.06) if args.lr is None else args.lr
    args.short = args.short or ([240] if args.data else [128])
    args.test_short = args.test_short or [max(args.short)]
    args.near = 224 / 600 * max(args.short) if args.near is None else args.near
    args.measure_every, args.draw_every = (v or -(-args.steps // 5) for v in (args.measure_every, args.draw_every))
    common.check(parser, args)
    if args.jitter < 0:
        parser.error(f"--jitter must not be negative, got {args.jitter}")
    if args.preset and not (args.data and args.pretrained and args.proposals):
        parser.error(f"--preset {args.preset} needs --data, --pretrained and --proposals")
    return args


def regions_of(args, examples, held_out):
    """Where proposals come from, and those of the training and evaluation images."""
    source = args.proposals
    if not source:
        windows = proposals.covering(examples, args.least, args.share)
        source = {k: windows[k] for k in ("sizes", "ratios", "step", "cut")}
        print(f"windows: sizes {' '.join(f'{s:.0f}' for s in windows['sizes'])}, ratios {' '.join(f'{r:.2f}' for r in windows['ratios'])}, step "
              f"{windows['step']}, {windows['per_image']:.0f} an image; IoU {windows['guarantee']:.3f} with every object in range")
    lists = [proposals.for_examples(source, some) for some in (examples, held_out)]
    print("objects that some proposal overlaps by 0.5: training {:.3f}, evaluation {:.3f}".format(
        *(proposals.recall(p, some)[0] for p, some in zip(lists, (examples, held_out)))))
    return source, *lists


def describe(args, examples, classes, regions):
    """The Spec: pixels as the pretrained net wants them, or normalised by the training images; boxes by --targets."""
    mean, std = common.PIXELS[args.pixels][:2] if args.pretrained else ((v,) * 3 for v in data.mean_std(examples))
    spec = fast_rcnn.Spec(tuple(classes), args.table, tuple(args.short), args.longest, args.dropout, mean, std, float_bins=args.float_bins)
    if args.targets == "fixed":
        return spec
    labelled = [fast_rcnn.label(spec, p, e.boxes, e.labels, e.difficult) for p, e in zip(regions, examples)]
    mean, std = fast_rcnn.target_statistics(spec, labelled, args.targets == "classes")
    return dataclasses.replace(spec, target_mean=mean, target_std=std)


def main(args, put):
    start = time.perf_counter()
    draw.require()
    examples, held_out, classes = common.read(args)
    source, regions, test_regions = regions_of(args, examples, held_out)
    spec = describe(args, examples, classes, regions)
    sampler = fast_rcnn.Sampler(args.sampler, args.batch, args.fraction, args.bg_lo, per_label=not args.label_free, accumulate=args.accumulate)
    testing = fast_rcnn.Testing(tuple(args.test_short), args.longest, args.near, args.min_score, args.nms, args.limit, args.iterate)
    net = fast_rcnn.FastRCNN(spec, np.random.default_rng(args.seed), pretrained=bool(args.pretrained))
    if args.pretrained:
        left = fast_rcnn_weights.load_published(net, args.pretrained, common.PIXELS[args.pixels][2])
        print(f"weights from {args.pretrained}" + f", but for {', '.join(left)}" * bool(left))
    net.to(put)
    optimizer = optim.SGD(net, 0.9, args.weight_decay, form="caffe", rates=lambda name: args.bias_rate if name.endswith(".b") else 1.0)
    schedule = (optim.step_schedule(args.lr, args.decay_at, 0.1) if args.decay_at
                else optim.cosine_schedule(args.lr, args.steps, args.steps // 20))
    run = train.Run(Path(args.out) / args.name, common.settings(args, *EVALUATION, "draw_every", "measure_every"), args.resume)
    print(f"{len(examples)} training and {len(held_out)} evaluation images, {len(classes)} classes")
    print(summary(net.parts["trunk"], (1, max(args.short), max(args.short), 3)), flush=True)

    def view(j, rng, **more):
        image, p, boxes, labels, difficult = fast_rcnn.training_image(spec, examples[j], regions[j], rng, **more)
        return image, fast_rcnn.label(spec, p, boxes, labels, difficult), boxes

    def prepare(i):
        rng = np.random.default_rng([args.seed, i])
        images, answers, objects = zip(*(view(j, rng, jitter=args.jitter, most=args.most)
                                         for j in common.drawn(rng, len(examples), args.images)))
        return images, answers, objects, rng

    def step(i, prepared):
        if i and i % args.measure_every == 0:
            measure(i)
        images, answers, objects, rng = prepared
        values, chosen = fast_rcnn.step(net, put(fast_rcnn.batch(net, images)), answers, sampler, rng)
        if i % args.draw_every == 0:
            show(i, images, answers, chosen, objects)
        return values

    @run.aside
    def show(i, images, answers, chosen, objects):
        pictures = [draw.regions(image, r.boxes[c], r.labels[c], spec.background, objects, max(1, 480 / max(image.shape[:2])))
                    for image, r, c, objects in zip(images, answers, map(backend.to_numpy, chosen), objects)]
        (run.folder / "regions").mkdir(exist_ok=True)
        draw.save(draw.sheet(pictures, min(4, len(pictures))), run.folder / "regions" / f"{i:06d}.png")

    # The mean loss of all regions is that of the first images of the training set, unmirrored, without jittered copies, the same ones at every
    # measurement; with several --short all at the one that this generator draws, not to be compared with runs at another
    watched = [view(j, np.random.default_rng(0), mirror=False)[:2] for j in range(min(20, len(examples)))]
    watched = [(image, answer) for image, answer in watched if (answer.labels >= 0).any()]

    @run.aside
    def measure(i):
        detections = [fast_rcnn.detect(net, e.image(), p, testing) for e, p in zip(held_out, test_regions)]
        losses = [fast_rcnn.mean_loss(net, put(fast_rcnn.batch(net, [image])), [answer]) for image, answer in watched]
        loss = sum(losses) / len(losses) if losses else float("nan")
        return detections, common.measure(run, i, detections, held_out, classes, all_loss=loss)

    train.fit(run, net, optimizer, schedule, args.steps, step, args.checkpoint_every, prepare, args.workers)

    detections, curve = measure(args.steps)
    draw.measurements(curve, ("mean AP50", "all_loss"), run.folder / "curve.png")
    more = {"testing": dataclasses.asdict(testing), "all_loss": curve[-1]["all_loss"], "curve": curve,
            "seconds": common.seconds(args, start)}
    if args.also_iterate:
        again = dataclasses.replace(testing, iterate=True)
        found = [fast_rcnn.detect(net, e.image(), p, again) for e, p in zip(held_out, test_regions)]
        files.write(run.folder / "detections_iterate.json", json.dumps(common.records(found, held_out, classes)))
        more["also"] = {"iterate": common.figures(found, held_out, classes)[2]}
    settings = {"windows": source if isinstance(source, dict) else None, "testing": dataclasses.asdict(testing)}
    return common.finish(run, args, detections, held_out, classes, ("loss", "positive"),
                         lambda path, cut: fast_rcnn.save(net, path, {**settings, "cut": cut}), **more)


if __name__ == "__main__":
    common.start(main, arguments())
