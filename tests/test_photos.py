"""Tests of reading photos: unusual, broken and malicious files, file names, archives and arrays."""

import collections
import io
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, generate, refusal, run
from faces import draw_face
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import vae
from data import photos
from data.faces import read_square
from data.photos import find_photos, read_image, read_reduced
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


TURNS = "- - FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270 -".split()


def turned(orientation, format="JPEG", exif=None):
    """Return FACE as a photo from a turned camera: transposed pixels and the EXIF orientation."""
    photo = FACE if TURNS[orientation] == "-" else FACE.transpose(Image.Transpose[TURNS[orientation]])
    tags = Image.Exif()
    tags[0x0112] = orientation
    photo.info["exif"] = exif or tags.tobytes()  # HEIF stores the orientation only if it is here
    return encode(photo, format, exif=photo.info["exif"])


def with_alpha(image):
    """Return an image of mode L or RGB with the alpha channel MASK, and noise under its transparent parts."""
    image = Image.composite(image, Image.effect_noise(image.size, 200).convert(image.mode), MASK)
    image.putalpha(MASK)
    return image


def swap_red_and_green(image):
    """Return an RGB image with two channels swapped."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green, red, blue))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"gXYZ", b"....").replace(b"rXYZ", b"gXYZ").replace(b"....", b"rXYZ")  # undoes the function
LONG_TEXT = PngInfo()
LONG_TEXT.add_text("XML:com.adobe.xmp", "<x/>" * 1_000_000, zip=True)
FLOATS = Image.fromarray(np.asarray(GREY) / np.float32(255))
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
BIG_ENDIAN = Image.frombytes("I;16B", GREY.size, (np.asarray(GREY).astype(">u2") * 257).tobytes())
FRAMES = {"save_all": True, "append_images": [FACE.rotate(180), FACE.rotate(90)]}
TWINS = {  # name: (file content, expected image)
    **{f"exif {number}.jpg": (turned(number), FACE) for number in range(2, 9)},
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
    "wide gamut.jpg": (encode(swap_red_and_green(FACE), "JPEG", icc_profile=SWAPPED, subsampling=0), FACE),
    "wide gamut palette.png": (encode(swap_red_and_green(FACE).quantize(256), "PNG", icc_profile=SWAPPED), FACE),
    "grey with an RGB profile.jpg": (encode(GREY, "JPEG", icc_profile=SRGB), GREY),
    "CMYK with an RGB profile.jpg": (encode(FACE.convert("CMYK"), "JPEG", icc_profile=SRGB), FACE),
    "broken profile.webp": (encode(FACE, "WEBP", icc_profile=b"broken" * 50), FACE),
    "long text.png": (encode(FACE, "PNG", pnginfo=LONG_TEXT), FACE),
    "float.tiff": (encode(FLOATS, "TIFF"), GREY),
}
if ".heic" in photos.SUFFIXES:  # pillow-heif is installed
    TWINS["exif 6.heic"] = (turned(6, "HEIF"), FACE)


@pytest.mark.parametrize("name", TWINS)
def test_unusual_photos_are_read_correctly(name, tmp_path):
    data, shown = TWINS[name]
    (tmp_path / name).write_bytes(data)
    for channels, mode in ((3, "RGB"), (1, "L")):
        image = read_image(tmp_path / name, channels)
        assert (image.mode, image.size) == (mode, shown.size)
        difference = np.asarray(image).astype(float) - np.asarray(shown.convert(mode))
        assert np.abs(difference).mean() < 4
    assert read_square(tmp_path / name, 3, 150)[0].size == (150, 150)


def odd_exif(orientation, dice):
    """Return EXIF data with the orientation, and random tags in both of its directories."""
    order = dice.choice("<>")
    known = (0x0100, 0x010F, 0x011A, 0x0128, 0x0132, 0x8825, 0x9003, 0x9204, 0x927C, 0xA002, 0xA005)

    def directory(required):
        tags = {dice.choice([*known, dice.randrange(1 << 16)]): None for _ in range(10)}
        value = [(dice.randrange(14), dice.choice([0, 1, 2, 9]), dice.randrange(200)) for _ in tags]
        entries = dict(zip(tags, value, strict=True)) | required
        rows = [struct.pack(f"{order}HHII", tag, *entry) for tag, entry in sorted(entries.items())]
        return struct.pack(f"{order}H", len(rows)) + b"".join(rows) + bytes(4)

    shifted = orientation << (16 if order == ">" else 0)  # two bytes, aligned to the left of four
    first = directory({0x0112: (3, 1, shifted), 0x8769: (4, 1, 200)})
    return (
        b"Exif\0\0"
        + struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
        + first.ljust(192)
        + directory({})
        + bytes(200)
    )


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_odd_exif_data_do_not_matter(count, tmp_path):
    for number in range(count):
        dice = random.Random(number)
        orientation = dice.randrange(10)
        path = tmp_path / f"{number}.{dice.choice(['jpeg', 'png', 'webp'])}"
        path.write_bytes(turned(orientation, path.suffix[1:].upper(), odd_exif(orientation, dice)))
        difference = np.asarray(read_image(path)).astype(float) - FACE
        assert np.abs(difference).mean() < 4, f"{number}"
    print(f"\nCount: {count} photos with odd EXIF data, all read upright")


@pytest.mark.parametrize(("name", "size"), [("photo.jpg", (200, 175)), ("photo.png", (134, 117))])
def test_large_photos_are_reduced_and_look_the_same(name, size, tmp_path):
    draw_face(5, size=(1600, 1400)).save(tmp_path / name)
    whole = read_image(tmp_path / name)
    small, times = read_reduced(tmp_path / name, 3, lambda size: size[0] / 128)
    assert (whole.size, small.size, round(times)) == ((1600, 1400), size, 1600 // size[0] + (name == "photo.png"))
    pixels = [np.asarray(vae.square_transform(32)(image)).astype(int) for image in (whole, small)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2


def test_a_photo_of_200_megapixels_takes_less_than_600_megabytes(tmp_path):
    Image.new("RGB", (16320, 12240)).save(tmp_path / "phone.jpg", quality=30)
    code = "import resource, train, data.faces; {}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    read = f"data.faces.read_square({str(tmp_path / 'phone.jpg')!r}, 3, 150, 'face', train.FACE_BOX)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    outputs = [subprocess.check_output([sys.executable, "-c", code.format(call)], env=env) for call in ("0", read)]
    assert int(outputs[1]) - int(outputs[0]) < 600_000  # kilobytes


BROKEN = {  # name: (file content, part of the error message)
    "truncated.jpg": (TWINS["exif 6.jpg"][0][:4000], "image file is truncated"),
    "rotten.png": (TWINS["RGBA.png"][0][:-5000] + bytes(5000), "broken PNG file"),
    "empty.jpg": (b"", "not a picture in a known format, such as JPEG or PNG"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # Ghostscript would run it
    "IMG_1.HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not a picture in a known format, such as JPEG or PNG"),
    "bomb.ppm": (b"P6 16000 16000 255\n", "256000000 pixels"),  # refused because of its header; there is no pixel data
    "bright.tiff": (encode(Image.new("F", (9, 9), 7.5), "TIFF"), "its values, 7.5 to 7.5, are not from 0 to 1"),
}


def test_unreadable_photos_are_listed_and_skipped(workplace, capsys):
    Path("odd").mkdir()
    for name, (data, _) in (TWINS | BROKEN).items():
        Path("odd", name).write_bytes(data)
    run("--data", "odd", "--epochs", "1")
    said = capsys.readouterr().out
    copies = int(re.search(r"^Copies      (\d+) left out", said, re.MULTILINE)[1])
    assert copies < 15  # some of the formats give the same pixels
    assert f"Photos      {len(TWINS) - copies} of {len(TWINS) + len(BROKEN)} can be used" in said
    generate("--image", "odd", "--mode", "reconstruct")
    for told in (said, capsys.readouterr().out):
        skipped = re.findall(r"^Skipped +odd/(.*) cannot be read as an image \((.*)\)\.$", told, re.MULTILINE)
        assert [name for name, _ in skipped] == sorted(BROKEN)
        assert all(BROKEN[name][1] in reason for name, reason in skipped)


def write_zip(path, *names):
    """Write a .zip archive of some files in the current folder, and return its bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(name)
    return Path(path).read_bytes()


def test_photos_are_found_in_all_folders_and_archives_but_not_hidden_ones(workplace, capsys):
    found = ["a/c.jfif", "b.JPG", "b.jpg_large", "d.mpo", "e.JPE"]
    hidden = [".hidden/d.png", "a/._c.png", "@eaDir/b.JPG/thumb.jpg"]
    for name in (*found, "a/note.txt", "a/raw.cr2", "b.txt", "x", *hidden):
        Path("mixed", name).parent.mkdir(exist_ok=True, parents=True)
        Path("mixed", name).touch()
    write_zip("mixed/f.zip", "mixed/b.JPG", "mixed/a/note.txt", *(f"mixed/{name}" for name in hidden))
    Path("mixed/g.zip").write_bytes(b"broken")
    Path("mixed/h.tgz").touch()
    assert list(map(str, find_photos("mixed"))) == [f"mixed/{name}" for name in (*found, "f.zip/mixed/b.JPG")]
    assert capsys.readouterr().out.splitlines() == [
        "Skipped     mixed/g.zip cannot be read as an archive or array of photos (File is not a zip file).",
        "Skipped     mixed/h.tgz is a .tgz archive, which cannot be read: unpack it and use the folder.",
        "Left out    3 .txt, 1 .cr2, 1 without ending (not photos)",
    ]


def test_each_folder_is_searched_once_whatever_links_to_it(workplace):
    Path("faces/sub").mkdir()
    Path("elsewhere").mkdir()
    Path("faces/face 001.jpg").rename("elsewhere/face 001.jpg")
    for number, target in enumerate([".", "..", "../..", "../faces", "../elsewhere", "../elsewhere", "../faces/sub"]):
        Path(f"faces/link {number}").symlink_to(target)
        Path(f"faces/sub/link {number}").symlink_to(Path("faces", target).resolve())
    Path("faces/loop.jpg").symlink_to("loop.jpg")
    assert sorted(photo.path.name for photo in find_photos("faces")) == [
        *(f"face {n:03d}.jpg" for n in range(40)),
        "loop.jpg",
    ]
    run("--epochs", "1")


def test_without_pillow_heif_a_line_says_what_to_install(workplace, monkeypatch, capsys):
    monkeypatch.setattr(photos, "SUFFIXES", photos.SUFFIXES - photos.HEIC)
    Path("faces/phone.HEIC").touch()
    assert len(find_photos("faces")) == 40
    tip = "Tip         To read .heic photos: pip install pillow-heif\n"
    assert capsys.readouterr().out == f"Left out    1 .heic (not photos)\n{tip}"
    find_photos("faces/phone.HEIC")
    assert capsys.readouterr().out == tip


def test_an_archive_is_read_in_place_like_the_folder(workplace):
    write_zip("celeba.zip", *sorted(map(str, Path("faces").iterdir()), reverse=True))
    contents = [[read_image(photo).tobytes() for photo in find_photos(place)] for place in ("faces", "celeba.zip")]
    assert contents[0] == contents[1]


def patched_zip(**fields):
    """Return a .zip of a photo, with other values in the first bytes of some fields of its headers."""
    data = bytearray(write_zip("good.zip", "faces/face 000.jpg"))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = data.index(signature) + offset
        data[start] = fields.get("flags", data[start])
        data[start + 2] = fields.get("method", data[start + 2])
    return bytes(data)


def test_archives_that_are_not_read_are_one_sentence(workplace):
    Path("locked.zip").write_bytes(patched_zip(flags=1))
    Path("deflate64.zip").write_bytes(patched_zip(method=9))
    write_zip("nested.zip", "good.zip")
    wanted = {
        "locked.zip": "is locked with a password: unpack it and use the folder.",
        "deflate64.zip": "is compressed in a way that cannot be read, such as Deflate64: unpack it and use the folder.",
        "nested.zip": "contains good.zip instead of photos: unpack it and use the folder.",
        "faces.tar.gz": "is a .gz archive, which cannot be read: unpack it and use the folder.",
        "faces.npz": "is a .npz archive, which cannot be read: save its array of photos as .npy.",
    }
    for name, sentence in wanted.items():
        Path(name).touch()
        for call in (refusal(run, "--data", name), refusal(generate, "--image", name)):
            assert call == f"{name} {sentence}"


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
            channels, times = dice.choice([1, 3]), dice.choice([1, 2, 5])
            outcomes[read_reduced(path, channels, lambda size, times=times: times)[0].mode] += 1
        except UserError as error:
            assert re.fullmatch(rf"{re.escape(str(path))} cannot be read as an image \(.*\)\.", str(error))
            outcomes["refused"] += 1
    print(f"\nCount: {count} mutated photos: {dict(outcomes)}")
    assert outcomes["refused"] > count / 5
    assert set(outcomes) == {"RGB", "L", "refused"}
