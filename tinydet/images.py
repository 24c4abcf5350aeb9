"""Image files: sizes from the header, pixels as uint8 RGB, nothing damaged or absurdly large, and a cache of what was decoded."""
import collections
import contextlib
import io
import os
import re
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")     # Pillow knows forty more, some of which start other programs
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MOST_PIXELS, LONGEST_SIDE = 100_000_000, 30_000     # larger ones are refused by their header, before memory is taken
CACHE_BYTES = 1 << 30                               # decoded images kept in memory
TAIL = 4096                                         # bytes in which the end of an image is looked for first
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")          # of JPEG; those left out stand alone, without a length
GREY = 128                                          # what libjpeg paints where the data of a JPEG ends too early


def read_image(path):
    """Read an image file (FORMATS) as uint8 (H, W, 3) RGB.

    Of 16 bits a pixel the upper eight are kept, alpha is left out, CMYK converted as Pillow does, of an animation the first picture
    taken, an EXIF rotation not applied (CHOICE: boxes belong to the pixels as they are stored).
    Raises FileNotFoundError, or ValueError naming a file that is no image, ends too early, has a wrong checksum (PNG), has more than
    MOST_PIXELS or a side over LONGEST_SIDE, or holds floating-point pixels, whose range nobody states.
    """
    with _opened("data.read_image", path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels")
        if image.format == "PNG":
            with Image.open(path, formats=("PNG",)) as again:
                again.verify()                              # the checksums, which Pillow else passes over
        image.load()
        if image.format in ("JPEG", "MPO") and np.all(np.asarray(image)[-1, -1] == GREY):
            _whole_jpeg(path)
        if image.mode.startswith("I"):                      # 16 bits a pixel: Pillow would cut at 255, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif "transparency" in image.info:                  # of a palette: Pillow wants the detour
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def header(op, path, defects):
    """(width, height) of an image file. Its pixels are not decoded, but a JPEG or PNG must end as such.
    What is not used of it is counted in defects. Raises as read_image."""
    with _opened(op, path) as image:
        if rotated(image):
            defects["images with an EXIF rotation, which is not applied"].append(Path(path).name)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            defects["images of several pictures, of which the first is used"].append(Path(path).name)
        return image.size


def rotated(image):
    """Does the EXIF entry of a Pillow image ask for a rotation or a mirror image?"""
    return image.getexif().get(0x0112, 1) in range(2, 9)


def in_folder(op, folder):
    """Image files of a folder, by their name without the ending. Raises ValueError if two differ in the ending only."""
    found = {}
    for path in sorted(Path(folder).iterdir()) if os.path.isdir(folder) else []:
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{op}: images of {folder} must differ in more than the ending, got {found[path.stem].name} and "
                                 f"{path.name}")
            found[path.stem] = path
    return found


@contextlib.contextmanager
def _opened(op, path):
    """Yield a Pillow image of sane size. Whatever fails in the block is raised as a ValueError naming the file."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise FileNotFoundError(f"{op}: there is no file {path}")
    try:
        with warnings.catch_warnings():                     # what Pillow warns of here is either harmless or refused below
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                W, H = image.size
                if max(W, H) > LONGEST_SIDE or W * H > MOST_PIXELS or min(W, H) < 1:
                    raise ValueError(f"{W}x{H} pixels; the limits are {MOST_PIXELS} and {LONGEST_SIDE} a side")
                if not _ends(path, image.format):
                    raise ValueError("it ends without its end marker")
                yield image
    except Exception as error:                              # a damaged file: Pillow's decoders raise a dozen kinds
        raise ValueError(f"{op}: {path} must be a readable image, got: {error or type(error).__name__}") from None


def _ends(path, kind):
    """Does a JPEG or PNG file hold the end of its image? Behind it may follow what Pillow does not read."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL))
        tail = file.read()
        file.seek(0)
        if kind == "PNG":
            return PNG_END in tail or PNG_END in file.read()
        return kind not in ("JPEG", "MPO") or tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda") or _jpeg_end(file.read()) >= 0


def _jpeg_end(content):
    """Where the end marker of a JPEG lies, -1 if there is none. Segments are passed over by their length: a thumbnail lies in one."""
    at = 0
    while found := MARKER.search(content, at):
        if found[1] == b"\xd9":
            return found.start()
        at = found.end() + int.from_bytes(content[found.end():found.end() + 2], "big")
    return -1


def _whole_jpeg(path):
    """Raise OSError if the data of a JPEG end before its last block: libjpeg only paints grey what is missing.

    Without its end marker, a few stuffed bytes in its place, a decoder that still wants data runs dry. What a progressive JPEG
    lacks is sharpness, not blocks: it passes.
    """
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content[:_jpeg_end(content)] + b"\xff\x00" * 12), formats=("JPEG",)) as image:
        if not image.info.get("progressive"):
            image.load()


class Cache(collections.OrderedDict):
    """Decoded images, the longest unused ones dropped beyond CACHE_BYTES. One thread at a time: the others wait for its image."""

    def __init__(self):
        super().__init__()
        self.size, self.lock = 0, threading.Lock()

    def __call__(self, path):
        with self.lock:
            if path in self:
                self.move_to_end(path)
                return self[path]
            image = self[path] = read_image(path)
            self.size += image.nbytes
            while self.size > CACHE_BYTES and len(self) > 1:
                self.size -= self.popitem(last=False)[1].nbytes
            return image


cached = Cache()
