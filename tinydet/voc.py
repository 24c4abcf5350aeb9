"""PASCAL VOC folders: Annotations/*.xml, JPEGImages/*, ImageSets/Main/<split>.txt. Users call data.read_voc."""
import collections
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image

from tinydet import images
from tinydet.records import each_once, example, fitted, given_classes, inside, number, read_bytes, read_lines, some

LOOKS_LIKE = "Annotations/ (VOC)"
OF_CLASS = re.compile(r"(\S.*?)\s+(-1|0|1)")         # a line of a per-class list: image, and whether it shows the class
DEPTH = 50                          # of nested XML elements


def found(folder):
    """Whether a folder holds Annotations/."""
    return os.path.isdir(Path(folder) / "Annotations")


def splits(folder):
    """Names of the image sets: ImageSets/Main/*.txt, without the per-class lists `<class>_<split>`."""
    paths = {p.stem: p for p in (Path(folder) / "ImageSets" / "Main").glob("*.txt")}
    return sorted(n for n, p in paths.items() if "_" not in n or n.rsplit("_", 1)[1] not in paths or not _list(p)[1])


def _list(path):
    """The image names of a list, and whether it is one of a class: every line has a second column -1, 0 or 1."""
    lines = [line for line in read_lines("data.read_split", path) if line]
    matches = [OF_CLASS.fullmatch(line) for line in lines]
    return ([m[1] for m in matches], True) if lines and all(matches) else (lines, False)


def read_split(folder, split):
    """The image names of one set of a VOC folder, in file order ("all": every annotation, sorted)."""
    folder = Path(folder)
    if not found(folder):
        raise FileNotFoundError("data.read_split: a VOC folder must hold Annotations/, JPEGImages/ and ImageSets/Main/, got "
                                f"{folder}")
    if split == "all":
        names = sorted(p.stem for p in (folder / "Annotations").glob("*.xml"))
    else:
        path = folder / "ImageSets" / "Main" / f"{inside('data.read_split', 'split', split)}.txt"
        if not os.path.isfile(path):
            raise FileNotFoundError(f"data.read_split: there is no {path}; image sets here: {some(splits(folder))} (and \"all\": "
                                    "every annotation)")
        names, _ = _list(path)
        for name in names:
            if len(inside("data.read_split", path, name).parts) > 1:
                raise ValueError(f"data.read_split: {path} must hold names of images without folders, got {name}")
    return each_once("data.read_split", f"image set {split} of {folder}", names)


def read(folder, split, classes=None):
    """Examples, classes, and defects (a dict of lists of places): see data.read_voc."""
    folder, defects, classes = Path(folder), collections.defaultdict(list), given_classes("data.read_voc", classes)
    names = read_split(folder, split)
    pictures = images.in_folder("data.read_voc", folder / "JPEGImages")
    records = [_read_xml(folder / "Annotations" / f"{name}.xml", name, pictures, defects) for name in names]
    if classes is None:
        classes = sorted({c for *_, objects in records for _, c, *_ in objects})
    index = {c: i for i, c in enumerate(classes)}
    for name, *_, objects in records:
        if unknown := sorted({c for _, c, *_ in objects} - set(index)):
            raise ValueError(f"data.read_voc: {folder / 'Annotations' / name}.xml: the class of an object must be one of "
                             f"{some(classes)}, got {some(unknown)}")
    return [example(*record, index, defects) for record in records], tuple(classes), defects


class _PlainXML(ElementTree.TreeBuilder):
    depth = 0

    def doctype(self, name, pubid, system):
        raise ValueError("a document type, where entities are declared")

    def start(self, tag, attributes):
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"elements nested more than {DEPTH} deep")
        return super().start(tag, attributes)

    def end(self, tag):
        self.depth -= 1
        return super().end(tag)


def truth(folder, split):
    """What an evaluation counts: per image of a set its name and objects (box, class, difficult), all that the file has, as they stand.

    Nothing is cut, dropped or compared with the image, as in the VOC devkit: box is (xmin - 1, ymin - 1, xmax, ymax).
    """
    folder = Path(folder)
    return [(name, list(_objects(path, _tree(path)))) for name in read_split(folder, split)
            for path in [folder / "Annotations" / f"{name}.xml"]]


def class_names(folder):
    """The classes in all annotations of a folder; files that are no annotation are for their own image sets to refuse."""
    names = set()
    for path in sorted((Path(folder) / "Annotations").glob("*.xml")):
        try:
            names |= {_text(path, item, "name") for item in _tree(path).iter("object")}
        except ValueError:
            continue
    return names - {""}


def _tree(path):
    """The <annotation> of a file."""
    try:
        root = ElementTree.fromstring(read_bytes("data.read_voc", path), ElementTree.XMLParser(target=_PlainXML()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:      # the last two: encodings that expat does not know
        raise ValueError(f"data.read_voc: {path} must be plain XML, got: {error}") from None
    if root.tag != "annotation":
        raise ValueError(f"data.read_voc: {path} must hold an <annotation>, got <{root.tag}>")
    return root


def _objects(path, root):
    """Box, class and difficult of every object, checked, in order."""
    for item in root.iter("object"):
        box, label = _only(path, item, "bndbox"), _text(path, item, "name")
        if box is None or not label:
            raise ValueError(f"data.read_voc: {path}: each <object> must have a <name> and a <bndbox>, got one without")
        x1, y1, x2, y2 = (_number(path, box, corner) for corner in ("xmin", "ymin", "xmax", "ymax"))
        difficult = _text(path, item, "difficult").lower()
        if difficult not in ("", "0", "1", "true", "false"):
            raise ValueError(f"data.read_voc: {path}: <difficult> must be 0 or 1, got {difficult!r}")
        yield (x1 - 1, y1 - 1, x2, y2), label, difficult in ("1", "true")


def _read_xml(path, name, pictures, defects):
    """name, image path, (width, height), objects (box, class, difficult, place) of one annotation file."""
    root = _tree(path)
    if name not in pictures:
        raise FileNotFoundError(f"data.read_voc: there is no {path.parent.parent / 'JPEGImages' / name}.jpg (or "
                                f"{', '.join(images.ENDINGS[1:])})")
    size, tag = images.header("data.read_voc", pictures[name], defects), _only(path, root, "size")
    if tag is not None:
        claimed = tuple(_number(path, tag, side) for side in ("width", "height"))
        if claimed not in (size, (0, 0)):                           # 0x0: some converters write that for "unknown"
            turned = claimed == size[::-1] and _rotated(pictures[name])
            raise ValueError(f"data.read_voc: {path}: <size> must be that of the image, {size[0]}x{size[1]}, "
                             f"got {claimed[0]:g}x{claimed[1]:g}" + " (its EXIF rotation is not applied)" * turned)
    objects = []
    for box, label, difficult in _objects(path, root):
        if box[2] <= box[0] + 1 or box[3] <= box[1] + 1:            # also one pixel wide: VOC's corners are inside
            defects["degenerate boxes dropped"].append(name)
        elif cut := fitted(box, size, defects, name):
            objects.append((cut, label, difficult, name))
    return name, pictures[name], size, objects


def _only(path, tag, name):
    """The one child of that name, or None. Two would leave open which is meant."""
    children = tag.findall(name)
    if len(children) > 1:
        raise ValueError(f"data.read_voc: {path}: <{tag.tag}> must hold one <{name}>, got {len(children)}")
    return children[0] if children else None


def _text(path, tag, name):
    child = _only(path, tag, name)
    return "" if child is None else (child.text or "").strip()


def _number(path, tag, name):
    text = _text(path, tag, name)
    value = number(text)
    if math.isnan(value):
        raise ValueError(f"data.read_voc: {path}: <{tag.tag}><{name}> must be a finite number, got {text[:80]!r}")
    return value


def _rotated(path):
    with Image.open(path) as image:
        return images.rotated(image)
