"""Faces for tests and benchmarks, drawn from a seed."""

import random

from PIL import Image, ImageDraw


def draw_face(seed, size=(48, 56)):
    """Return a drawn face (PIL, RGB) rotated by 90 degrees so that runs find no upright faces."""
    dice = random.Random(seed)
    picture = Image.new("RGB", (100, 120), tuple(dice.choices(range(256), k=3)))
    skin, dark = [dice.randint(120, 250) for _ in range(3)], tuple(dice.choices(range(90), k=3))
    x, y = dice.randint(40, 60), dice.randint(52, 68)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - 28, y - 38, x + 28, y + 38), fill=tuple(skin))
    for eye in (x - 12, x + 12):
        draw.ellipse((eye - 5, y - 12, eye + 5, y - 5), fill=dark)
    draw.arc((x - 14, y + 2, x + 14, y + dice.randint(18, 30)), 20, 160, fill=dark, width=4)
    return picture.transpose(Image.Transpose.ROTATE_90).resize(size, Image.Resampling.BICUBIC)


def draw_faces(folder, count):
    """Write `count` drawn faces to `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        draw_face(seed).save(folder / f"face {seed:03d}.jpg", quality=95)
    return folder
