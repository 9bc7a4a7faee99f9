"""Tests of reading photos: unusual, broken and malicious files, file names, archives and arrays."""

import collections
import io
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import generate, refusal, run
from faces import draw_face
from PIL import Image

import vae
from data.photos import find_photos, read_image
from vae import UserError

FACE = draw_face(7, size=(160, 190))
GREY = FACE.convert("L")
MASK = Image.radial_gradient("L").resize(FACE.size).point(lambda v: 0 if v > 200 else 255)  # 0: transparent
OVER_WHITE = Image.composite(FACE, Image.new("RGB", FACE.size, "white"), MASK)


def encode(image, format, **options):
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **{"quality": 95, **options} if format in ("JPEG", "WEBP") else options)
    return file.getvalue()


def turned(orientation, name):
    """Return FACE as a JPEG from a turned camera: transposed pixels and the EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(FACE.transpose(Image.Transpose[name]), "JPEG", exif=exif)


def with_alpha(image):
    """Return an image of mode L or RGB with the alpha channel MASK, and noise under its transparent parts."""
    image = Image.composite(image, Image.effect_noise(image.size, 200).convert(image.mode), MASK)
    image.putalpha(MASK)
    return image


DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
BIG_ENDIAN = Image.frombytes("I;16B", GREY.size, (np.asarray(GREY).astype(">u2") * 257).tobytes())
FRAMES = {"save_all": True, "append_images": [FACE.rotate(180), FACE.rotate(90)]}
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
TWINS = {  # name: (file content, expected image)
    **{f"exif {number}.jpg": (turned(number, name), FACE) for number, name in enumerate(TURNS, start=2)},
    "progressive.jpg": (encode(FACE, "JPEG", progressive=True), FACE),
    "grey.jpg": (encode(GREY, "JPEG"), GREY),
    "cmyk.jpg": (encode(FACE.convert("CMYK"), "JPEG"), FACE),
    "lzw.tiff": (encode(FACE, "TIFF", compression="tiff_lzw"), FACE),
    "1 bit.png": (encode(FACE.convert("1"), "PNG"), FACE.convert("1")),
    "16 bit.png": (encode(DEEP, "PNG"), GREY),
    "16 bit, big-endian.tiff": (encode(BIG_ENDIAN, "TIFF"), GREY),
    "LA.png": (encode(with_alpha(GREY), "PNG"), OVER_WHITE.convert("L")),
    "RGBA.png": (encode(with_alpha(FACE), "PNG"), OVER_WHITE),
    "RGBA.webp": (encode(with_alpha(FACE), "WEBP", lossless=True), OVER_WHITE),
    "palette.png": (encode(FACE.quantize(256), "PNG"), FACE),
    "palette with holes.png": (encode(with_alpha(FACE).quantize(), "PNG"), OVER_WHITE),
    "palette with holes.gif": (encode(with_alpha(FACE), "GIF"), OVER_WHITE),
    "frames.gif": (encode(FACE, "GIF", **FRAMES), FACE),
    "lossy.avif": (encode(FACE, "AVIF"), FACE),
    "1x1.png": (encode(FACE.resize((1, 1)), "PNG"), FACE.resize((1, 1))),
    "3000x160.jpg": (encode(FACE.resize((3000, 160)), "JPEG"), FACE.resize((3000, 160))),
    "PNG by name.jpg": (encode(FACE, "PNG"), FACE),
}


@pytest.mark.parametrize("name", TWINS)
def test_unusual_photos_are_read_correctly(name, tmp_path):
    data, shown = TWINS[name]
    (tmp_path / name).write_bytes(data)
    for channels, mode in ((3, "RGB"), (1, "L")):
        image = read_image(tmp_path / name, channels)
        assert (image.mode, image.size) == (mode, shown.size)
        difference = np.asarray(image).astype(float) - np.asarray(shown.convert(mode))
        assert np.abs(difference).mean() < 4
    assert vae.celeb_transform(read_image(tmp_path / name, 3, 150)).shape == (3, 150, 150)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    draw_face(5, size=(1600, 1400)).save(tmp_path / "face.jpg")
    whole = read_image(tmp_path / "face.jpg")
    small = read_image(tmp_path / "face.jpg", 3, 32)
    assert (whole.size, small.size) == ((1600, 1400), (200, 175))  # decoded at 1/8, enough for up to 43 pixels
    pixels = [np.asarray(vae.square_transform(32)(image)).astype(int) for image in (whole, small)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1


BROKEN = {  # name: (file content, part of the error message)
    "truncated.jpg": (TWINS["exif 6.jpg"][0][:4000], "image file is truncated"),
    "rotten.png": (TWINS["RGBA.png"][0][:-5000] + bytes(5000), "broken PNG file"),
    "empty.jpg": (b"", "not a picture in a known format, such as JPEG or PNG"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # Ghostscript would run it
    "IMG_1.HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not a picture in a known format, such as JPEG or PNG"),
    "bomb.ppm": (b"P6 14000 14000 255\n", "196000000 pixels"),  # refused because of its header; there is no pixel data
}


def test_unreadable_photos_are_listed_and_skipped(workplace, capsys):
    Path("odd").mkdir()
    for name, (data, _) in (TWINS | BROKEN).items():
        Path("odd", name).write_bytes(data)
    run("--data", "odd", "--epochs", "1")
    said = capsys.readouterr().out
    assert f"Photos      {len(TWINS)} of {len(TWINS) + len(BROKEN)} can be used" in said
    generate("--image", "odd", "--mode", "reconstruct")
    for told in (said, capsys.readouterr().out):
        skipped = re.findall(r"^Skipped +odd/(.*) cannot be read as an image \((.*)\)\.$", told, re.MULTILINE)
        assert [name for name, _ in skipped] == sorted(BROKEN)
        assert all(BROKEN[name][1] in reason for name, reason in skipped)


def write_zip(path, *names):
    """Write a .zip archive of some files in the current folder, and return its bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(name)
    return Path(path).read_bytes()


def test_photos_are_found_in_all_folders_and_archives_but_not_hidden_ones(workplace):
    for name in ("b.JPG", "a/c.png", "a/note.txt", ".hidden/d.png", "a/._c.png"):
        Path("mixed", name).parent.mkdir(exist_ok=True, parents=True)
        Path("mixed", name).touch()
    write_zip("mixed/a/some.zip", "mixed/b.JPG", "mixed/a/note.txt", "mixed/a/._c.png")
    assert list(map(str, find_photos("mixed"))) == ["mixed/a/c.png", "mixed/a/some.zip/mixed/b.JPG", "mixed/b.JPG"]


def test_an_archive_is_read_in_place_like_the_folder(workplace):
    write_zip("celeba.zip", *sorted(map(str, Path("faces").iterdir()), reverse=True))
    contents = [[read_image(photo).tobytes() for photo in find_photos(place)] for place in ("faces", "celeba.zip")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("broken", ["cut.zip", "text.zip", "cut.npy", "text.npy"])
def test_invalid_archives_and_arrays_are_refused(broken, workplace):
    np.save("good.npy", np.zeros((9, 24, 24), np.uint8))
    write_zip("good.zip", "faces/face 000.jpg")
    good = Path("good").with_suffix(broken[-4:]).read_bytes()
    Path(broken).write_bytes(good[:500] if "cut" in broken else b"no archive, says this text\n")
    for said in (refusal(run, "--data", broken), refusal(generate, "--image", broken)):
        assert said.startswith(f"{broken} cannot be read as an archive or array of photos (")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.uint8, ()), (np.uint8, (1,)), (np.uint8, (3,)), (np.float32, ()), (np.float64, (3,)), (">f2", (1,))],
)
def test_arrays_are_read_as_photos(tmp_path, dtype, shape):
    values = np.random.default_rng(0).integers(0, 256, (5, 24, 20, *shape), dtype=np.uint8)
    np.save(tmp_path / "faces.npy", values if dtype == np.uint8 else np.asfortranarray(values / 255).astype(dtype))
    found = [np.asarray(read_image(photo)) for photo in find_photos(tmp_path / "faces.npy")]
    assert np.array_equal(found, np.broadcast_to(values.reshape(5, 24, 20, -1), (5, 24, 20, 3)))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{"a": 1}, None] * 5, dtype=object), "Python objects"),
        (np.zeros((9, 24, 24, 2), np.uint8), "shape (9, 24, 24, 2)"),
        (np.zeros((150, 120, 3), np.uint8), "shape (150, 120, 3)"),
        (np.zeros((9, 24, 24), np.int64), "int64 of shape"),
        (np.array(7, np.uint8), "of shape ()"),
        (np.full((9, 24, 24), 1.5, np.float32), "not (N, H, W, 1 or 3) of uint8 or [0, 1]"),
        (np.full((9, 24, 24), np.nan, np.float32), "not (N, H, W, 1 or 3) of uint8 or [0, 1]"),
    ],
)
def test_arrays_without_photos_are_refused(array, words, tmp_path, workplace):
    np.save(tmp_path / "array.npy", array)
    said = refusal(run, "--data", str(tmp_path / "array.npy"))
    assert said.startswith(f"{tmp_path}/array.npy cannot be read as an archive or array of photos (")
    assert words in said


def mutation(data, dice):
    """Return file bytes with some changed, in the header or anywhere, and some possibly cut from the middle or end."""
    data = bytearray(data)
    start = dice.randrange(len(data))
    for _ in range(dice.choice([1, 1, 5])):
        data[dice.randrange(dice.choice([64, len(data)]))] = dice.randrange(256)
    del data[start : start + dice.choice([0, 0, 0, 1, 512, len(data)])]
    return bytes(data)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_photos_give_an_image_or_a_user_error(count, tmp_path):
    names = list(TWINS)
    outcomes = collections.Counter()
    for number in range(count):
        dice = random.Random(number)
        path = tmp_path / f"{number} {names[number % len(names)]}"
        path.write_bytes(mutation(TWINS[names[number % len(names)]][0], dice))
        try:
            outcomes[read_image(path, dice.choice([1, 3]), dice.choice([None, 32, 150])).mode] += 1
        except UserError as error:
            assert re.fullmatch(rf"{re.escape(str(path))} cannot be read as an image \(.*\)\.", str(error))
            outcomes["refused"] += 1
    print(f"\nCount: {count} mutated photos: {dict(outcomes)}")
    assert outcomes["refused"] > count / 5
    assert set(outcomes) == {"RGB", "L", "refused"}
