"""Find photos in folders, .zip archives and .npy arrays, and read them upright in the right colours."""

import errno
import functools
import os
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pad, to_pil_image

from vae import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # not EPS: Pillow would run Ghostscript
SUFFIXES = set(".jpg .jpeg .png .webp .avif .gif .bmp .tif .tiff .ppm .pgm .heic".split())  # HEIC only to report it
DEMO = Path("data/demo")  # generated faces, for a first run


class Photo(typing.NamedTuple):
    """Location of a photo: a file, a name in a .zip archive, or a row of a .npy array."""

    path: Path
    member: str | int | None = None

    def __str__(self):
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"


# Finding
def find_photos(place):
    """Return the Photos in a file, .zip, .npy or folder (with its subfolders and .zips); skip hidden files.

    Raises UserError if an archive or array is broken.
    """
    if not os.path.isdir(place):
        return photos_in(Path(place))
    paths = []
    for folder, subfolders, names in os.walk(place, onerror=report_skipped, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if has_suffix(name, {*SUFFIXES, ".zip"})]
    return [photo for path in sorted(paths) for photo in photos_in(path)]


def find_training_photos(place):
    """Return the Photos at `place`, or in data/demo if data/train is empty; raises UserError if there are none."""
    place = Path(place)
    if place == Path("data/train") and not list(place.glob("[!.]*")) and DEMO.exists():
        print("data/train is empty, so this run trains on the demo faces in data/demo.")
        place = DEMO
    exists = os.path.exists(place)
    photos = find_photos(place) if exists else []
    if not photos:
        state = "contains no photos" if exists else "does not exist"
        raise UserError(
            f"DATA {place.absolute()} {state}: put photos in data/train, or set --data to a folder, .zip or .npy. "
            "CelebA's img_align_celeba.zip, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, works as is."
        )
    return photos


def report_skipped(error):
    """Print an error that causes a file or folder to be skipped but does not end the run."""
    print(f"Skipped     {error}")


def has_suffix(name, suffixes):
    """Return whether a file has one of the suffixes, ignoring case, and is not hidden."""
    return Path(name).suffix.lower() in suffixes and not Path(name).name.startswith(".")


def photos_in(path):
    """Return the Photos in an archive or array, or the file itself as a single Photo."""
    if not has_suffix(path, {".zip", ".npy"}):
        return [Photo(path)]
    container = open_container(path, os.getpid())
    if isinstance(container, zipfile.ZipFile):
        return [Photo(path, name) for name in sorted(container.namelist()) if has_suffix(name, SUFFIXES)]
    return [Photo(path, row) for row in range(len(container))]


# Opening
@functools.lru_cache(maxsize=8)
def open_container(path, process):
    """Return the ZipFile or memory-mapped array at `path`, opened once per `process` id; raises UserError if broken."""
    try:
        if path.suffix.lower() == ".zip":
            return zipfile.ZipFile(path)
        array = np.lib.format.open_memmap(path, "r")  # never unpickles
        is_photos = array.shape[3:] in [(1,), (3,)] or (array.ndim == 3 and array.shape[2] > 3)  # else it is one photo
        in_range = array.dtype == np.uint8 or (array.dtype.kind == "f" and 0 <= array.min() <= array.max() <= 1)
        if not is_photos or not in_range:
            raise ValueError(f"it is {array.dtype} of shape {array.shape}, not (N, H, W, 1 or 3) of uint8 or [0, 1]")
        return array
    except Exception as error:  # zipfile and NumPy raise all kinds of errors for a broken file
        reraise_shortage(error)
        raise UserError(f"{path} cannot be read as an archive or array of photos ({error}).") from None


def reraise_shortage(error):
    """Re-raise an error if memory or file handles ran out, because then the file is not to blame."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def open_photo(photo):
    """Return a Photo as a PIL image; raises whatever Pillow and zipfile raise."""
    if photo.member is None:
        return Image.open(photo.path, formats=FORMATS)
    container = open_container(photo.path, os.getpid())
    if isinstance(container, zipfile.ZipFile):
        return Image.open(container.open(photo.member), formats=FORMATS)
    pixels = container[photo.member]
    return to_pil_image(pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8))


# Reading
def read_image(photo, channels=3, size=None):
    """Read a Photo or path upright, as an RGB (3 channels) or grey (1) PIL image; transparent areas become white.

    A JPEG is decoded only as large as needed to scale it to `size` pixels. Raises UserError if it cannot be read.
    """
    photo = photo if isinstance(photo, Photo) else Photo(Path(photo))
    try:
        with warnings.catch_warnings(action="ignore"), open_photo(photo) as image:
            if max(image.size) > 100 * min(image.size):  # scaling it to a square would take gigabytes
                raise ValueError(f"{image.width} x {image.height} pixels is too elongated for a photo")
            if size:
                image.draft(None, (4 * size, 4 * size))
            return convert(ImageOps.exif_transpose(image), channels)
    except Exception as error:  # Pillow's decoders raise all kinds of errors for a broken file
        reraise_shortage(error)
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in a known format, such as JPEG or PNG"
        raise UserError(f"{photo} cannot be read as an image ({reason}).") from None


def convert(image, channels):
    """Convert a PIL image of any mode to 8-bit RGB (3 channels) or grey (1); transparent areas become white."""
    if image.mode.startswith("I") and np.asarray(image).max() > 255:  # 16 bits, which Pillow's convert() would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


# Cropping
def crop_square(image, left, top, size):
    """Crop a square, in pixels, from a PIL image; beyond the image's edges, its edge pixels are repeated."""
    inside = (max(left, 0), max(top, 0), min(left + size, image.width), min(top + size, image.height))
    outside = [inside[0] - left, inside[1] - top, left + size - inside[2], top + size - inside[3]]
    return pad(image.crop(inside), outside, padding_mode="edge")
