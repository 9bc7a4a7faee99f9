"""Find faces, and crop photos to the square around one, or to another square.

Boxes and squares are left, top and size in pixels (a face_box: in fractions of the side); angles are counterclockwise.
"""

import functools
import math
import re
import typing

import numpy as np
from PIL import Image

from data.photos import crop_square, read_reduced
from vae import UserError, require, square_transform


class Face(typing.NamedTuple):
    """A face in a picture, as the detector finds it."""

    box: np.ndarray
    score: float  # 0.1 plus the scores of the detectors of upright faces, summed over five scaled copies
    is_clear: bool  # found in all five, and upright in most


class Crop(typing.NamedTuple):
    """How a photo was cropped, in pixels of the full photo, upright and then turned by `angle`."""

    square: list[int]
    outside: float  # fraction of the square that is outside the photo
    others: list[list[int]]  # squares around up to five other faces, largest first, unless `angle`
    angle: int


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
    """Return the box, score and detector of each face in a grey PIL image scaled by `scale`; 3 and 4 detect tilt."""
    scaled = grey.resize([math.ceil(side * scale) for side in grey.size], Image.Resampling.BILINEAR, reducing_gap=2)
    found = face_detector().run(np.asarray(scaled)) if face_detector() else ([], [], [])
    boxes = [np.array([one.left(), one.top(), one.width()]) / scale for one in found[0]]
    return [*zip(boxes, *found[1:], strict=True)]


def find_faces(grey, group=False, sides=(400, 800, 1600)):
    """Return the frontal Faces in a grey PIL image, largest first; in a `group`, all down to half the largest size."""
    faces = []
    for scale in sorted({min(4, side / max(grey.size)) for side in sides}):  # the detector finds 80 pixels or more
        if faces and (not group or faces[0].box[2] * scale > 320):
            break
        boxes = [box for box, _, _ in detect_faces(grey, scale)]
        new = [box for box in boxes if all(math.dist(box[:2], face.box[:2]) > box[2] / 2 for face in faces)]
        faces += [face for box in new if (face := measure_face(grey, box))]
        faces.sort(key=lambda face: -face.box[2])
    return faces


def measure_face(grey, box):
    """Return the average Face over five scaled copies, or None if it is found in fewer than three of them.

    The detector only distinguishes sizes that are 20% apart; the scales of the copies divide that step evenly.
    """
    left, top, size = map(round, box)
    margin = round(0.75 * size)
    around = crop_square(grey, left - margin, top - margin, size + 2 * margin)
    found = [face for k in range(5) for face in detect_faces(around, 100 / size * 1.2 ** (k / 5))]
    same = [face for face in found if math.dist(face[0][:2], (margin, margin)) < size / 2]
    if len(same) < 3:
        return None
    boxes, scores, detectors = zip(*same, strict=True)
    weights = np.array(scores) - 0.99 * min(scores)  # the lowest score is that of a size between two steps
    box = np.average(boxes, axis=0, weights=weights) + (left - margin, top - margin, 0)
    upright = np.array(detectors) < 3
    return Face(box, 0.1 + upright @ scores, len(same) >= 5 and upright.mean() > 0.5)


def upright_faces(image, group):
    """Return the angle that turns a PIL image so that its largest face is upright, and the Faces in it then."""
    grey = image.convert("L")
    grey.thumbnail((1600, 1600))  # so that the same faces are found whatever size the photo was decoded to
    views = {0: find_faces(grey, group)}
    best = 0
    for angles in ((30, -30), (90, -90, 180), (30, -30)):
        if views[best] and views[best][0].is_clear:
            break
        new = {best + angle for angle in angles} - views.keys()
        views |= {angle: find_faces(turn(grey, angle), group, (400, 800)) for angle in sorted(new)}
        best = max(views, key=lambda angle: views[angle][0].score if views[angle] else 0)
    return best, [face._replace(box=face.box * max(image.size) / max(grey.size)) for face in views[best]]


def turn(image, angle):
    """Return a PIL image turned by an angle; unless that is a multiple of 90, it grows and its edges are repeated."""
    if angle % 90:
        side = math.ceil(math.hypot(*image.size))
        image = crop_square(image, (image.width - side) // 2, (image.height - side) // 2, side)
    return image.rotate(angle, Image.Resampling.BILINEAR, expand=angle % 90 == 0)


def median_face_box(pictures, wanted=None):
    """Return the median box of the faces in square pictures, uint8 (N, S, S, C), as fractions of the side.

    Returns None if most show no face. Prints a tip if the faces are in different places, or far from the box `wanted`.
    """
    found = [find_faces(Image.fromarray(picture.squeeze()).convert("L")) for picture in pictures]
    boxes = np.array([faces[0].box for faces in found if faces]) / pictures.shape[1]
    print(f"Faces       found in {len(boxes)} of the first {len(pictures)} training photos")
    if len(boxes) < len(pictures) / 10:
        return None
    median = np.median(boxes, axis=0)
    is_rare = len(boxes) < len(pictures) / 2
    if is_rare or np.abs(boxes - (wanted or median)).mean() > 0.04:  # 0.02 in CelebA, 0.08 in photos of all kinds
        print("Tip         The faces are not aligned: crop each photo around its face with --crop face")
    return None if is_rare else median.round(4).tolist()


# The square
def check_crop(crop):
    """Raise UserError unless `crop` is a valid value of CROP."""
    valid = crop in ("face", "center") or re.fullmatch(r"-?\d{1,6} +-?\d{1,6} +[1-9]\d{,5}", crop)
    require(valid, "CROP", crop, '"face", "center", or left, top and size of a square in pixels, such as "140 90 320"')


def read_square(photo, channels, size, crop="center", face_box=None, group=False):
    """Read a Photo or path and crop it as `crop` says; return a PIL image (size x size) and its Crop.

    The Crop is None for the center square, which "face" also uses if there is no face or `face_box`; for a `group`, it
    lists other faces. Raises UserError if the photo cannot be read or the square is outside it.
    """
    angle, squares = 0, []
    if crop == "face" and face_box:  # the square around the smallest face that is found is a tenth of the photo
        image, times = read_reduced(photo, channels, lambda full: max(full) / max(1600, 11 * size))
        angle, faces = upright_faces(image, group)
        image = turn(image, angle)
        to_square = [[1, 0, 0], [0, 1, 0], np.array([-face_box[0], -face_box[1], 1]) / face_box[2]]
        squares = [face.box @ to_square for face in faces]
    elif crop in ("face", "center"):
        image, times = read_reduced(photo, channels, lambda full: min(full) / (4 * size))
    else:
        square = np.array(crop.split(), float)
        image, times = read_reduced(photo, channels, lambda full: square[2] / (4 * size))
        squares = [square / times]
    if not squares:
        return square_transform(size)(image), None
    left, top, side = squares[0].round().astype(int).tolist()
    inside = [min(left + side, image.width) - max(left, 0), min(top + side, image.height) - max(top, 0)]
    if min(inside) <= (times > 1):  # the last pixel of a reduced photo may be only a part of one
        raise UserError(f"CROP {crop} is outside {photo}, which is {image.width * times:.0f} pixels wide.")
    first, *others = [(square * times).round().astype(int).tolist() for square in squares[: 1 if angle else 6]]
    crop = Crop(first, 1 - math.prod(inside) / side**2, others, angle)
    return square_transform(size)(crop_square(image, left, top, side)), crop
