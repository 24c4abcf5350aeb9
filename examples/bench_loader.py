"""Images a second that tinydet.loader prepares, by number of background threads, against the plain loop.

    python examples/bench_loader.py                                 # generated scenes of 384 to 576 pixels a side, saved as JPEG
    python examples/bench_loader.py --data VOC_FOLDER --workers 0 1 2 4 8 --json loader.json

Every image is read from its file, then changed as --chain says; --step MS lets the caller wait so long after every batch, as one
does whose GPU computes. Versions take turns on the same batches; prints the median of images a second, and of the ratios of times
(plain loop / version) of the turns. Machines are noisy: read the ratios.
"""
import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import tinydet  # noqa: F401                                        # before numpy: sets how BLAS threads wait
import numpy as np
import timing
from PIL import Image

from tinydet import augment, data, files, images, loader, scenes

MEAN = (122.7717, 115.9465, 102.9801)                               # RGB, ap-loss notes 5


def saved_scenes(folder, count, factor=3):
    """Scenes, enlarged to the size of photographs, as Examples whose images lie in folder."""
    examples = []
    for e in scenes.scenes(count, 0):
        image, boxes = augment.scale(e.source, e.boxes, factor)
        path = Path(folder) / f"{e.name}.jpg"
        Image.fromarray(image).save(path, quality=90)
        examples.append(dataclasses.replace(e, source=path, boxes=boxes, size=image.shape[1::-1]))
    return examples


def prepare(chain, size):
    """The function that a Loader calls."""
    def ssd(example, rng):
        return augment.ssd(example.image(), *example.usable(), rng, size, MEAN)

    def flip_and_scale(example, rng):
        return augment.flip_and_scale(example.image(), *example.usable(), rng, (size,), 2 * size)

    return {"ssd": ssd, "flip_and_scale": flip_and_scale}[chain]


def timed(batches, wait):
    """Seconds to take all batches, waiting after each."""
    start = time.perf_counter()
    for _ in batches:
        time.sleep(wait)
    return time.perf_counter() - start


def main(args, folder):
    examples = data.read_voc(args.data, args.set)[0] if args.data else saved_scenes(folder, 100)
    images.CACHE_BYTES = 0                                          # a data set is larger than memory
    plan = loader.Loader(examples, args.batch, prepare(args.chain, args.size), args.seed)
    versions = {"plain loop": lambda: map(plan.make, range(args.steps)),
                **{f"{n} workers": lambda n=n: loader.prefetch(plan.make, 0, args.steps, n) for n in args.workers}}
    times = {name: [] for name in versions}
    for turn in range(args.turns + 1):                              # the first turn fills the system's file cache and does not count
        for name, batches in versions.items():
            times[name].append(timed(batches(), args.step / 1e3))
    times = {name: np.array(t[1:]) for name, t in times.items()}
    print(f"{len(examples)} images, {args.chain} to {args.size} pixels, {args.steps} batches of {args.batch}, {args.step:g} ms between "
          f"them, {args.turns} turns, {os.cpu_count()} cores")
    rows = []
    for name, t in times.items():
        ratio = times["plain loop"] / t
        rows.append({"version": name, "images/s": float(np.median(args.batch * args.steps / t)), "plain/this": float(np.median(ratio)),
                     "lowest": float(ratio.min()), "highest": float(ratio.max())})
        print("{version:12} {images/s:8.1f} images/s   {plain/this:.2f} times the plain loop ({lowest:.2f} to {highest:.2f})"
              .format(**rows[-1]))
    if args.json:
        files.write(args.json, json.dumps({**vars(args), "cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--data", metavar="FOLDER", help="a PASCAL VOC folder (default: generated scenes in a temporary folder)")
    a("--set", default="train", help="its image set (%(default)s)")
    a("--chain", choices=("ssd", "flip_and_scale"), default="ssd", help="what is done to an image: SSD's augmentation, or mirrored and scaled (%(default)s)")
    a("--size", type=int, default=512, help="side, or short side, of what comes out (%(default)s)")
    a("--batch", type=int, default=8, help="images of a batch (%(default)s)")
    a("--steps", type=int, default=12, help="batches a turn (%(default)s)")
    a("--step", type=float, default=0, metavar="MS", help="what the caller waits after every batch (%(default)s)")
    a("--workers", type=int, nargs="+", default=[0, 1, 2, 3], help="numbers of background threads to try (0 1 2 3)")
    a("--turns", type=int, default=7, help="timed turns (%(default)s)")
    a("--seed", type=int, default=0, help="of the batches (%(default)s)")
    a("--json", metavar="FILE", help="write the figures here")
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args()
        timing.check_json(parser, args.json)
        main(args, folder)
