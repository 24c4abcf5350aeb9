"""What a data set holds, in figures and one sheet of pictures a split: python -m tinydet.data FOLDER.

Reads every split, decodes every image, and tells counts, boxes, colours, what was dropped and which images occur twice. Exit
status 0, also with defects that a reader only counts; 1 and one line `error: ...` if something is missing, or cannot be read or trusted.
"""
import argparse
import collections
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tinydet import data, draw, files, train
from tinydet.records import some

SHOWN = 12                          # images on a sheet
FIRST = 5                           # places of a defect that are listed
MOST_COMPARED = 5000                # images among which near-identical ones are looked for: the time grows with the square
SMALL, MEDIUM = 32**2, 96**2        # areas where COCO's classes of size end


def describe(examples, classes, defects):
    """Figures of annotations, as JSON values: everything that can be said without decoding an image."""
    boxes = np.concatenate([e.boxes for e in examples]) if examples else np.zeros((0, 4))
    labels = np.concatenate([e.labels for e in examples]) if examples else np.zeros(0, np.int64)
    present, tagged = [e.image_labels() for e in examples], any(e.tags is not None for e in examples)
    sides, each = boxes[:, 2:] - boxes[:, :2], np.array([len(e.boxes) for e in examples])

    def of(rows):
        w, h = sides[rows].T
        area = w * h
        bins = {"small": area < SMALL, "medium": (area >= SMALL) & (area < MEDIUM), "large": area >= MEDIUM}
        return {"boxes": int(len(w)), "width": spread(w), "height": spread(h), "aspect": spread(w / h),
                "area": {k: int(v.sum()) for k, v in bins.items()}}

    sizes = collections.Counter(f"{e.size[0]}x{e.size[1]}" for e in examples)
    found = {"images": len(examples), "sizes": dict(sizes.most_common()), "classes": {},
             "defects": {what: {"count": len(where), "first": where[:FIRST]} for what, where in sorted(defects.items())}}
    if not tagged:
        found |= {**of(slice(None)), "difficult": int(sum(e.difficult.sum() for e in examples)), "empty": int((each == 0).sum()),
                  "boxes_an_image": spread(each), "images_of_several_classes": sum(len(p) > 1 for p in present)}
    images = collections.Counter(k for p in present for k in p.tolist())
    for k, name in enumerate(classes):
        found["classes"][name] = {"images": images[k], **({} if tagged else of(labels == k))}
    return found


def spread(values):
    """Least, 5 %, median, mean, 95 % and largest of some numbers; None of none."""
    if not len(values):
        return None
    low, middle, high = np.percentile(values, (5, 50, 95))
    told = {"min": np.min(values), "5%": low, "median": middle, "mean": np.mean(values), "95%": high, "max": np.max(values)}
    return {k: round(float(v), 4) for k, v in told.items()}


class Pixels:
    """What is kept of images after decoding: each is decoded once, whatever the number of splits that hold it."""

    def __init__(self):
        self.counts, self.digests, self.hashes, self.unreadable = {}, {}, {}, {}

    def add(self, example, key, hashed):
        """Decode an image, unless that is done. hashed: keep its difference hash too."""
        if key in self.counts or key in self.unreadable:
            return
        try:
            image = example.image()
        except (ValueError, OSError) as error:
            self.unreadable[key] = str(error)
            return
        self.counts[key] = np.reshape(Image.fromarray(image).histogram(), (3, 256))
        self.digests[key] = hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.shape).encode()).digest()
        if hashed:
            self.hashes[key] = data.difference_hash(image)

    def mean_std(self, keys):
        """Mean and standard deviation of each channel, 0..1, over all pixels of some images."""
        counts = sum(self.counts[k] for k in keys if k in self.counts)
        if not np.any(counts):
            return None, None
        values = np.arange(256) / 255
        mean = counts @ values / counts[0].sum()
        std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts[0].sum())
        return mean.round(4).tolist(), std.round(4).tolist()


def key_of(example):
    """The same for the same image in several splits."""
    return str(example.source) if isinstance(example.source, (str, Path)) else example.name


def alike(pixels):
    """Groups of images with the same pixels, and of near-identical ones (None if there are too many to compare)."""
    same = collections.defaultdict(list)
    for key, digest in pixels.digests.items():
        same[digest].append(key)
    near = None
    if len(pixels.hashes) == len(pixels.digests):
        keys = list(pixels.hashes)
        near = [[keys[i] for i in g] for g in data.linked(np.array(list(pixels.hashes.values())).reshape(-1, 256)) if len(g) > 1]
    return [g for g in same.values() if len(g) > 1], near


def report(folder, sets=None):
    """The figures of a data set as a JSON value, {set: list of Example}, and the class names. sets: None takes every split and "all".

    A set that cannot be read is told under "errors" and the others are reported; "all" is left out where only some sets can be
    read together (COCO images of one split alone, or one name in two splits). Raises where no set can be read.
    """
    module = data.layout(folder)
    names = module.splits(folder)
    asked = sets or names or ["all"]
    failed = {}

    def attempt(split, classes=None):
        try:
            return module.read(folder, split, classes)
        except (ValueError, OSError) as error:
            failed[split] = error

    whole = attempt("all")
    classes = whole and whole[1]                                    # one order of classes in every split
    read = {s: whole if s == "all" else attempt(s, classes) for s in dict.fromkeys(asked)}
    read = {s: part for s, part in read.items() if part}
    if not read:
        raise failed[asked[0]]
    if not whole:
        classes = list(dict.fromkeys(c for part in read.values() for c in part[1]))
        read = {s: module.read(folder, s, classes) for s in read}
    elif sets is None and len(names) > 1:
        read["all"] = whole
    every, pixels = {}, Pixels()
    for examples, _, _ in read.values():
        every.update((key_of(e), e) for e in examples)
    for key, e in train.progress(every.items(), desc="decode", unit="image"):
        pixels.add(e, key, len(every) <= MOST_COMPARED)
    found = {"folder": str(folder), "layout": next(k for k, v in data.LAYOUTS.items() if v is module), "splits": names,
             "classes": list(classes), "sets": {}}
    for s, (examples, _, defects) in read.items():
        mean, std = pixels.mean_std([key_of(e) for e in examples])
        found["sets"][s] = {**describe(examples, classes, defects), "mean": mean, "std": std}
    members = {s: {key_of(e) for e in examples} for s, (examples, *_) in read.items() if s in names}
    found["unreadable"], found["errors"] = pixels.unreadable, {s: str(failed[s]) for s in asked if s in failed}
    for kind, groups in zip(("identical", "near_identical"), alike(pixels)):
        found[kind] = groups and [{"images": [every[k].name for k in g], "sets": sorted(s for s, m in members.items() if m & {*g})}
                                  for g in groups]
        found[f"{kind}_across"] = None if groups is None else sum(_across(g, members) for g in groups)
    return found, {s: examples for s, (examples, *_) in read.items()}, classes


def _across(group, members):
    """Do two images of a group lie in splits that share none of them?"""
    homes = [frozenset(s for s, m in members.items() if k in m) for k in group]
    return any(a and b and not a & b for a in homes for b in homes)


def table(found):
    """The figures as lines of text."""
    def numbers(s, *keys):
        return " / ".join(f"{s[k]:.4g}" for k in keys) if s else "-"

    yield f"{found['folder']}: {found['layout']}; splits {', '.join(found['splits']) or 'none'}; {len(found['classes'])} classes"
    for name, s in found["sets"].items():
        detection = "boxes" in s
        told = detection and (f", {s['boxes']} boxes ({s['difficult']} difficult), {s['empty']} images without boxes, "
                              f"{s['images_of_several_classes']} of several classes")
        yield f"\n{name}: {s['images']} images{told or ''}"
        sizes = [f"{size} ({n})" for size, n in s["sizes"].items()]
        yield f"  sizes: {some(sizes)}"
        if s["mean"]:
            mean, std = (numbers(dict(enumerate(s[k])), 0, 1, 2) for k in ("mean", "std"))
            yield f"  mean {mean}, std {std} (red, green, blue; 0..1)"
        if detection:
            yield f"  boxes an image, min / median / mean / max: {numbers(s['boxes_an_image'], 'min', 'median', 'mean', 'max')}"
        wide = max([9, *map(len, s["classes"])])
        told = detection and (f"{'boxes':>7}  {'width min/5/50/95 %/max':>33} {'height min/5/50/95 %/max':>33} {'w/h 5/50/95 %':>20} "
                              f"{'area < 32^2, < 96^2, more':>26}")
        yield f"  {'class':{wide}} {'images':>7}{told or ''}"
        rows = dict(s["classes"])
        if detection and len(rows) > 1:
            rows["all"] = {**s, "images": s["images"] - s["empty"]}
        for c, r in rows.items():
            line = f"  {c:{wide}} {r['images']:7}"
            if detection:
                edges = [numbers(r[k], "min", "5%", "median", "95%", "max").replace(" ", "") for k in ("width", "height")]
                aspect, area = numbers(r["aspect"], "5%", "median", "95%").replace(" ", ""), ", ".join(map(str, r["area"].values()))
                line += f"{r['boxes']:7}  {edges[0]:>33} {edges[1]:>33} {aspect:>20} {area:>26}"
            yield line
        for what, where in s["defects"].items():
            yield f"  defect: {where['count']} {what}: {some(where['first'] + [''] * (where['count'] - len(where['first'])), most=FIRST)}"
        if not s["defects"]:
            yield "  defects: none"
    for name, error in found["errors"].items():
        yield f"\n{name}: cannot be read: {error}"
    yield ""
    for kind in ("identical", "near_identical"):
        told, groups = kind.replace("_", "-"), found[kind]
        if groups is None:
            yield f"{told} images: not looked for among more than {MOST_COMPARED}"
            continue
        yield f"{told} images: {len(groups)} groups, {found[kind + '_across']} across splits" + (
            f": {some([' = '.join(g['images'][:3]) for g in groups], most=FIRST)}" if groups else "")


def sheet(examples, classes, seed=0):
    """Drawn examples, a Pillow image: first one of every class that occurs, then any, in a seeded order."""
    order, chosen, seen = np.random.default_rng(seed).permutation(len(examples)).tolist(), [], set()
    for i in order:
        new = set(examples[i].image_labels().tolist()) - seen
        if new and len(chosen) < SHOWN:
            chosen.append(i)
            seen |= new
    chosen = [*chosen, *(i for i in order if i not in set(chosen))][:SHOWN]
    pictures, captions = [], []
    for e in (examples[i] for i in chosen):
        W, H = e.size
        enlarge = min(320 / W, 960 / H)                             # one width, and no picture higher than a page
        pictures.append(draw.boxes(e.image(), e.boxes, e.labels, classes, enlarge=enlarge, bracket=e.difficult))
        tags = "" if e.tags is None else ": " + ", ".join(classes[k] for k in e.tags)
        captions.append(f"{e.name[-28:]}{tags}"[:44])
    return draw.sheet(pictures, 4, captions)


def main(argv=None):
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tinydet.data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("folder", metavar="FOLDER", help="a data set: VOC, YOLO, COCO, IDX or class folders")
    a("--set", action="append", metavar="NAME", help="a split to report, again for more (default: all of them, and all images)")
    a("--out", metavar="FOLDER", help="where the sheets of examples go (default: runs/data-<name of the folder>)")
    a("--json", metavar="OUT", help="write the figures as JSON to this file")
    args = parser.parse_args(argv)
    try:
        found, read, classes = report(args.folder, args.set)
        print("\n".join(table(found)))
        if args.json:
            files.write(args.json, json.dumps(found, indent=1) + "\n")
        if found["unreadable"]:
            first = next(iter(found["unreadable"].values()))
            raise ValueError(f"{len(found['unreadable'])} images do not decode, first: {first}")
        out = Path(args.out or Path("runs") / f"data-{Path(args.folder).resolve().name}")
        out.mkdir(parents=True, exist_ok=True)
        for name, examples in read.items():
            if examples:
                draw.save(sheet(examples, classes), out / f"{name}.png")
        print(f"sheets of examples: {out}")
        if found["errors"]:
            raise ValueError(next(iter(found["errors"].values())))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
