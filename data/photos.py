"""Find photos in folders, .zip archives and .npy arrays, and read them upright in the right colours."""

import collections
import errno
import functools
import io
import os
import re
import typing
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from torchvision.transforms.functional import pad, to_pil_image

from vae import UserError

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()
KNOWN = "JPEG MPO PNG WEBP AVIF HEIF GIF BMP TIFF PPM".split()  # not EPS: Pillow would run Ghostscript
FORMATS = [name for name in KNOWN if name in Image.OPEN]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in KNOWN}
HEIC = {".heic", ".heif", ".hif"}
ARCHIVES = {".npz", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}  # of kinds that are not read
SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}  # thumbnails and deleted files
DEMO = Path("data/demo")  # generated faces, for a first run

Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow refuses photos of more than twice as many pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # bytes of text and colour profiles
JpegImagePlugin.JpegImageFile._read_dpi_from_exif = lambda self: None  # not needed, and it fails for odd tags

TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()


class Photo(typing.NamedTuple):
    """Location of a photo: a file, a name in a .zip archive, or a row of a .npy array."""

    path: Path
    member: str | int | None = None

    def __str__(self):
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"


# Finding
def find_photos(place):
    """Return the Photos in a file, .zip, .npy or folder (with its subfolders); print how many other files there are.

    Raises UserError if the file is an archive or array that cannot be read; in a folder, such files are skipped.
    """
    is_folder = os.path.isdir(place)
    found = []
    for path in sorted(files_in(place)) if is_folder else [Path(place)]:
        try:
            found += photos_in(path)
        except UserError as error:
            if not is_folder:
                raise
            print(f"Skipped     {error}")
    is_single = found == [Photo(Path(place))]  # it is read whatever its name
    photos = []
    others = collections.Counter()
    for photo in found:
        if is_single or isinstance(photo.member, int) or suffix_of(photo) in SUFFIXES:
            photos.append(photo)
        else:
            others[suffix_of(photo)] += 1
    if others:
        counts = ", ".join(f"{count:,} {suffix or 'without ending'}" for suffix, count in others.most_common(8))
        print(f"Left out    {counts}{', ...' if len(others) > 8 else ''} (not photos)")
    if (HEIC - SUFFIXES).intersection(map(suffix_of, found)):
        print("Tip         To read .heic photos: pip install pillow-heif")
    return photos


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


def suffix_of(path):
    """Return the suffix of a file name in lower case, without additions as in `a.jpg_large`; "" if it has none."""
    return re.match(r"(\.[a-z0-9]+)?", os.path.splitext(str(path))[1].lower())[0]


def is_visible(name):
    """Return whether a file or folder is neither hidden nor reserved by the operating system."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def files_in(place):
    """Yield the visible files in a folder, its subfolders and linked folders (except its parents), each only once."""
    seen = {*Path(place).resolve().parents}
    waiting = [place]
    for root in waiting:  # links to folders are appended
        for name, subfolders, files in os.walk(root, onerror=lambda error: print(f"Skipped     {error}")):
            folder, real = Path(name), Path(name).resolve()
            subfolders[:] = [] if real in seen else sorted(filter(is_visible, subfolders))
            waiting += [folder / name for name in subfolders if (folder / name).resolve() != real / name]
            if real not in seen:
                yield from map(folder.joinpath, filter(is_visible, files))
            seen.add(real)


def photos_in(path):
    """Return the Photos in an archive or array (other files in a .zip, too), or the file itself as the only one."""
    suffix = suffix_of(path)
    if suffix in ARCHIVES:
        remedy = "save its array of photos as .npy" if suffix == ".npz" else "unpack it and use the folder"
        raise UserError(f"{path} is a {suffix} archive, which cannot be read: {remedy}.")
    if suffix == ".npy":
        return [Photo(path, row) for row in range(len(open_container(path, os.getpid())))]
    return photos_in_zip(path) if suffix == ".zip" else [Photo(path)]


def photos_in_zip(path):
    """Return the visible files in a .zip archive as Photos; raises UserError if it is locked or contains archives."""
    archive = open_container(path, os.getpid())
    names = [name for name in archive.namelist() if name[-1:] != "/"]
    names = [name for name in names if all(map(is_visible, name.removeprefix("./").split("/")))]
    inner = {".zip", ".npy", *ARCHIVES}
    names.sort(key=lambda name: (suffix_of(name) not in SUFFIXES, suffix_of(name) not in inner, name))  # photos first
    obstacle = f"contains {names[0]} instead of photos" if names and suffix_of(names[0]) in inner else ""
    try:
        for name in names[:1]:
            archive.open(name).close()
    except NotImplementedError:
        obstacle = "is compressed in a way that cannot be read, such as Deflate64"
    except RuntimeError:
        obstacle = "is locked with a password"
    except Exception as error:  # only this photo is broken
        reraise_shortage(error)
    if obstacle:
        raise UserError(f"{path} {obstacle}: unpack it and use the folder.")
    return [Photo(path, name) for name in names]


# Opening
@functools.lru_cache(maxsize=8)
def open_container(path, process):
    """Return the ZipFile or memory-mapped array at `path`, opened once per `process` id; raises UserError if broken."""
    try:
        if suffix_of(path) == ".zip":
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
def read_image(photo, channels=3):
    """Read a Photo or path upright, as an sRGB (3 channels) or grey (1) PIL image; transparent areas become white.

    Raises UserError if it cannot be read.
    """
    return read_reduced(photo, channels, lambda size: 1)[0]


def read_reduced(photo, channels, reduction):
    """Like read_image, but up to `reduction(size)` times smaller; return the image and how many times smaller it is.

    `reduction` gets the sides of the photo as it lies in the file, perhaps turned. Raises UserError like read_image.
    """
    photo = photo if isinstance(photo, Photo) else Photo(Path(photo))
    try:
        with warnings.catch_warnings(action="ignore"), open_photo(photo) as image:
            size = image.size
            if max(size) > 100 * min(size):  # scaling it to a square would take gigabytes
                raise ValueError(f"{image.width} x {image.height} pixels is too elongated for a photo")
            times = max(1, int(reduction(size)))
            image.draft(None, [max(1, side // times) for side in size])  # a JPEG is decoded small, which saves time
            image = convert(turn_upright(image), channels, times * max(image.size) // max(size))
            return image, max(size) / max(image.size)
    except Exception as error:  # Pillow's decoders raise all kinds of errors for a broken file
        reraise_shortage(error)
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in a known format, such as JPEG or PNG"
        raise UserError(f"{photo} cannot be read as an image ({reason}).") from None


def turn_upright(image):
    """Return a PIL image as its EXIF orientation says. ImageOps.exif_transpose would fail for odd values elsewhere."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # EXIF data may contain anything
        reraise_shortage(error)
        orientation = None
    method = dict(enumerate(TURNS, start=2)).get(orientation)
    return image.transpose(Image.Transpose[method]) if method else image


def convert(image, channels, times):
    """Convert a PIL image to sRGB (3 channels) or grey (1) with 8 bits, reduced `times` times; see read_image."""
    profile = image.info.get("icc_profile")
    image = without_transparency(to_8_bits(image))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if times > 1:
        image = image.reduce(times)
    if profile:
        image = to_srgb(image, profile)
    return image.convert("RGB" if channels == 3 else "L")


def to_8_bits(image):
    """Convert a PIL image with 16 bits or floats in [0, 1], which Pillow's convert() would clip, to mode L.

    Raises ValueError for other values.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    highest = 1 if image.mode == "F" else 255 if values.max() <= 255 else 65535
    if not 0 <= values.min() <= values.max() <= highest:
        raise ValueError(f"its values, {values.min():g} to {values.max():g}, are not from 0 to {highest}")
    return Image.fromarray((values * np.float32(255 / highest)).round().astype(np.uint8))


def without_transparency(image):
    """Return a PIL image on a white background."""
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, image.convert("RGBA"))
    return opaque.convert("L" if image.mode == "LA" else "RGB")


def to_srgb(image, profile):
    """Convert a PIL image (L, RGB, CMYK) to sRGB by an ICC profile (bytes), or return it unchanged if that fails."""
    try:
        mode, transform = srgb_transform(profile)
        if (image.mode, mode) == ("L", "RGB"):
            image = image.convert("RGB")
        return ImageCms.applyTransform(image, transform) if transform else image
    except Exception as error:  # profiles may contain anything
        reraise_shortage(error)
        return image


@functools.lru_cache(maxsize=8)
def srgb_transform(profile):
    """Return the mode of images with an ICC profile (bytes), and the transform to sRGB, or None if it does nothing."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    sample = Image.frombytes("RGB", (64, 64), np.random.default_rng(0).bytes(64 * 64 * 3)).convert(mode)
    change = ImageChops.difference(ImageCms.applyTransform(sample, transform), sample.convert("RGB"))
    return mode, transform if np.asarray(change).max() > 1 else None


# Cropping
def crop_square(image, left, top, size):
    """Crop a square, in pixels, from a PIL image; beyond the image's edges, its edge pixels are repeated."""
    inside = (max(left, 0), max(top, 0), min(left + size, image.width), min(top + size, image.height))
    outside = [inside[0] - left, inside[1] - top, left + size - inside[2], top + size - inside[3]]
    return pad(image.crop(inside), outside, padding_mode="edge")
