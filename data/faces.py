"""Find faces, and crop photos to the square around one, or to another square.

Boxes and squares are left, top and size in pixels; only a face_box is in fractions of a picture's side.
"""

import functools
import math
import re
import typing

import numpy as np
from PIL import Image

from data.photos import crop_square, read_image
from vae import UserError, require, square_transform


class Face(typing.NamedTuple):
    """The largest face in a photo."""

    box: list[float]  # as found by the detector
    square: list[int]  # the crop that puts the face in the right place
    count: int  # number of faces in the photo

    def __str__(self):
        left, top, size = self.box
        place = f"at ({left:.0f}, {top:.0f}), {size:.0f} pixels wide"
        several = ", the largest of several" if self.count > 1 else ""
        small = ", so small that the result will be blurry" if size < 40 else ""
        return f"{place}{several}{small}: cropped to it ({' '.join(map(str, self.square))})"


# The detector
@functools.cache
def face_detector():
    """Return dlib's face detector (histograms of oriented gradients, King 2009), or None if dlib is not installed."""
    try:
        import dlib
    except ImportError as error:
        print(f"Faces cannot be found ({error}): install the detector with `pip install dlib-bin`.")
        return None
    return dlib.get_frontal_face_detector()


def detect_faces(grey, scale):
    """Return the boxes that the detector finds in a grey PIL image scaled by `scale`, in pixels of the image."""
    scaled = grey.resize([math.ceil(side * scale) for side in grey.size], Image.Resampling.BILINEAR, reducing_gap=2)
    rectangles = face_detector()(np.asarray(scaled)) if face_detector() else []
    return [np.array([one.left(), one.top(), one.width()]) / scale for one in rectangles]


# The box
def find_faces(image):
    """Return the boxes of the upright frontal faces in a PIL image, largest first."""
    grey = image.convert("L")
    for scale in sorted({min(4, side / max(image.size)) for side in (400, 800, 1600)}):  # finds large faces first
        boxes = [measure_face(grey, box) for box in detect_faces(grey, scale)]
        faces = [box for box in boxes if box is not None]
        if faces:
            return sorted(faces, key=lambda box: -box[2])
    return []


def measure_face(grey, box):
    """Return the average box of a face over five scaled copies, or None if it is found in fewer than three of them.

    The detector only distinguishes sizes that are 20% apart; the scales of the copies divide that step evenly.
    """
    left, top, size = map(round, box)
    margin = round(0.75 * size)
    around = crop_square(grey, left - margin, top - margin, size + 2 * margin)
    boxes = [found for k in range(5) for found in detect_faces(around, 100 / size * 1.2 ** (k / 5))]
    same = [found for found in boxes if math.dist(found[:2], (margin, margin)) < size / 2]
    return np.mean(same, axis=0) + (left - margin, top - margin, 0) if len(same) >= 3 else None


def median_face_box(pictures, wanted=None):
    """Return the median box of the faces in square pictures, uint8 (N, S, S, C), as fractions of the side.

    Returns None if fewer than half of the pictures show a face. Prints a tip if the faces are in different places, or
    far from the box `wanted`.
    """
    found = [find_faces(Image.fromarray(picture.squeeze())) for picture in pictures]
    boxes = np.array([faces[0] for faces in found if faces]) / pictures.shape[1]
    print(f"Faces       found in {len(boxes)} of the first {len(pictures)} training photos")
    if len(boxes) < len(pictures) / 10:
        return None
    median = np.median(boxes, axis=0)
    is_rare = len(boxes) < len(pictures) / 2
    if is_rare or np.abs(boxes - (wanted or median)).mean() > 0.04:  # 0.02 in CelebA, 0.08 in photos of all kinds
        print("Tip         The faces are not aligned: crop each photo around its face with --crop face")
    return None if is_rare else median.round(4).tolist()


# The square
def crop_to_face(image, face_box):
    """Crop a PIL image to the square that puts its largest face at `face_box`; return the square and the Face.

    `face_box` is left, top and size as fractions of the side. If no face is found, returns the full image and None.
    """
    faces = find_faces(image)
    if not faces:
        return image, None
    left, top, size = faces[0].tolist()
    side = size / face_box[2]
    square = [round(left - face_box[0] * side), round(top - face_box[1] * side), round(side)]
    return crop_square(image, *square), Face([left, top, size], square, len(faces))


def check_crop(crop):
    """Raise UserError unless `crop` is a valid value of CROP."""
    valid = crop in ("face", "center") or re.fullmatch(r"\d+ +\d+ +[1-9]\d*", crop)
    wanted = '"face", "center", or left, top and size of a square in pixels, such as "140 90 320"'
    require(valid, "CROP", crop, wanted)


def read_square(photo, channels, size, crop="center", face_box=None):
    """Read a Photo or path and crop it as `crop` says; return a PIL image (size x size) and its Face, if any.

    Without a face or a `face_box`, "face" uses the center square. Raises UserError if the photo cannot be read or the
    square extends beyond it.
    """
    by_face = crop == "face" and face_box
    by_square = crop not in ("face", "center")
    image = read_image(photo, channels, None if by_face or by_square else size)
    face = None
    if by_face:
        image, face = crop_to_face(image, face_box)
    if by_square:
        left, top, side = map(int, crop.split())
        if left + side > image.width or top + side > image.height:
            raise UserError(f"CROP {crop} extends beyond {photo}, which is {image.width} x {image.height} pixels.")
        image = crop_square(image, left, top, side)
    return square_transform(size)(image), face
