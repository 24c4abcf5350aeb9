"""COCO folders: images, and JSON files of annotations, one a split. Users call data.read_coco; coco.py reads the JSON."""
import collections
import os
from pathlib import Path

from tinydet import coco, images
from tinydet.records import each_once, example, fitted, given_classes, inside, no_split, some

LOOKS_LIKE = "annotations/*.json, instances_<split>.json, or <split>/_annotations.coco.json (COCO)"
INSTANCES, ROBOFLOW = "instances_", "_annotations.coco.json"
OTHERS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
SLACK = 1.0                         # pixels that rounding may put a corner outside the image


def found(folder):
    """Whether a folder holds JSON files where a COCO set has them."""
    return bool(_files(folder))


def splits(folder):
    """Names of the JSON files, without instances_, or of the folders that hold them."""
    return sorted(_files(folder))


def _files(folder):
    """Annotation file of every split."""
    folder = Path(folder)
    for part in (folder / "annotations", folder):
        every = [p for p in sorted(part.glob("*.json")) if not p.name.startswith((*OTHERS, "."))]
        instances = {p.stem.removeprefix(INSTANCES): p for p in every if p.name.startswith(INSTANCES)}
        if instances or part != folder and every:                   # JSON beside the images may be anything
            return instances or {p.stem: p for p in every}
    return {p.parent.name: p for p in sorted(folder.glob("*/" + ROBOFLOW))} | {
        "train": p for p in [folder / ROBOFLOW] if os.path.isfile(p)}


def read(folder, split, classes=None):
    """Examples, classes, and defects (a dict of lists of places): see data.read_coco."""
    folder, defects, classes = Path(folder), collections.defaultdict(list), given_classes("data.read_coco", classes)
    files, parts, examples = _files(folder), {}, []
    if not files:
        raise FileNotFoundError(f"data.read_coco: a COCO folder must hold {LOOKS_LIKE}, got {folder}")
    if split != "all" and split not in files:
        raise no_split("data.read_coco", folder, split, files)
    for s in sorted(files) if split == "all" else [split]:
        parts[s] = _read_json(files[s])
    classes = classes or tuple(dict.fromkeys(name for part in parts.values() for _, name in part.categories))
    index = {c: i for i, c in enumerate(classes)}
    for s, part in parts.items():
        if unknown := [name for _, name in part.categories if name not in index]:
            raise ValueError(f"data.read_coco: {files[s]}: a category must be one of {some(classes)}, got {some(unknown)}")
        examples += _examples(folder, s, files[s], part, index, defects)
    each_once("data.read_coco", f"split {split} of {folder}", [e.name for e in examples])
    return examples, classes, defects


def _read_json(path):
    if not os.path.isfile(path):
        raise ValueError(f"data.read_coco: {path} must be a file")
    part = coco.annotations(path)
    each_once("data.read_coco", path, [name for _, name, *_ in part.images])
    if len({name for _, name in part.categories}) < len(part.categories):
        names = some(name for _, name in part.categories)
        raise ValueError(f"data.read_coco: {path}: categories must differ in their names, got {names}")
    return part


def _examples(folder, split, path, part, index, defects):
    objects = [[] for _ in part.images]
    columns = (part.boxes, part.image, part.category, part.crowd, part.id)
    for (x, y, w, h), i, c, crowd, which in zip(*(column.tolist() for column in columns)):
        place, size = f"{path.name}, annotation {which}", part.images[i][2:]
        if cut := fitted((x, y, x + w, y + h), size, defects, place, SLACK):
            objects[i].append((cut, part.categories[c][1], crowd, place))
    base = None
    for (which, name, *claimed), found in zip(part.images, objects):
        entry = inside("data.read_coco", f"{path}, image {which}", name)
        base = base or _image_folder(folder, split, path, entry)
        size = images.header("data.read_coco", base / entry, defects)
        if size != tuple(claimed):
            raise ValueError(f"data.read_coco: {path}: image {which}: width and height must be those of {name}, "
                             f"{size[0]}x{size[1]}, got {claimed[0]}x{claimed[1]}")
        yield example(str(entry.with_suffix("")), base / entry, size, found, index, defects)


def _image_folder(folder, split, path, entry):
    """Where the first image of a split lies; the others must lie there too."""
    places = [path.parent] if path.name == ROBOFLOW else [
        folder / split, folder / "images" / split, folder / "images", folder, folder / "JPEGImages"]
    for place in places:
        if os.path.isfile(place / entry):
            return place
    raise FileNotFoundError(f"data.read_coco: {path}: there is no image {entry} in {some(places)}")
