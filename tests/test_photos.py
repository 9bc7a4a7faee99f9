"""Photos that somebody else made: odd, broken and hostile files, and the names and folders they come in."""

import collections
import io
import os
import random
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, generate, refusal, run
from faces import draw_face, draw_faces
from PIL import Image

import train
import vae
from vae import UserError, read_image

SHARED = ROOT.parent / "shared/odd-images"


# Odd files
FACE = draw_face(7, size=(160, 190))
MASK = Image.radial_gradient("L").resize(FACE.size).point(lambda v: 0 if v > 200 else 255)  # 0: transparent
OVER_WHITE = Image.composite(FACE, Image.new("RGB", FACE.size, "white"), MASK)
GREY = FACE.convert("L")


def upright(orientation):
    """Return the bytes of a JPEG of FACE, stored as a camera with that EXIF orientation would."""
    turns = [
        None,
        None,
        *(
            Image.Transpose[name]
            for name in ("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split())
        ),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(FACE.transpose(turns[orientation]) if orientation > 1 else FACE, "JPEG", exif=exif)


def encode(image, format, **options):
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **{"quality": 95, **options} if format in ("JPEG", "WEBP") else options)
    return file.getvalue()


def with_alpha(image):
    """Return an image of mode L or RGB with the alpha channel MASK, nonsense under its transparent parts."""
    image = Image.composite(image, Image.effect_noise(image.size, 200).convert(image.mode), MASK)
    image.putalpha(MASK)
    return image


def palette_with_holes():
    """Return FACE with 255 colours, and another one, which is transparent, where MASK is 0."""
    image = FACE.quantize(255)
    image.putpalette(image.getpalette()[:765] + [1, 2, 3])
    image.paste(255, mask=MASK.point(lambda v: 255 - v))
    return image


frames = {"save_all": True, "append_images": [FACE.rotate(180), FACE.rotate(90)]}
deep = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
TWINS = {  # name: (bytes of the file, what it shows)
    **{f"exif {k}.jpg": (upright(k), FACE) for k in range(1, 9)},
    "cmyk.jpg": (encode(FACE.convert("CMYK"), "JPEG"), FACE),
    "cmyk.tiff": (encode(FACE.convert("CMYK"), "TIFF"), FACE),
    "16 bit.png": (encode(deep, "PNG"), GREY),
    "16 bit.tiff": (encode(deep, "TIFF"), GREY),
    "grey.jpg": (encode(GREY, "JPEG"), GREY),
    "progressive.jpg": (encode(FACE, "JPEG", progressive=True), FACE),
    "LA.png": (encode(with_alpha(GREY), "PNG"), OVER_WHITE.convert("L")),
    "RGBA.png": (encode(with_alpha(FACE), "PNG"), OVER_WHITE),
    "RGBA.webp": (encode(with_alpha(FACE), "WEBP", lossless=True), OVER_WHITE),
    "RGBA.tiff": (encode(with_alpha(FACE), "TIFF"), OVER_WHITE),
    "palette.png": (encode(FACE.quantize(256), "PNG"), FACE),
    "palette with holes.png": (encode(palette_with_holes(), "PNG", transparency=255), OVER_WHITE),
    "palette with holes.gif": (encode(palette_with_holes(), "GIF", transparency=255), OVER_WHITE),
    "two frames.gif": (encode(FACE, "GIF", **frames), FACE),
    "two frames.webp": (encode(FACE, "WEBP", **frames), FACE),
    "two frames.png": (encode(FACE, "PNG", **frames), FACE),
    "lossy.webp": (encode(FACE, "WEBP"), FACE),
    "lzw.tiff": (encode(FACE, "TIFF", compression="tiff_lzw"), FACE),
    "bitmap.bmp": (encode(FACE, "BMP"), FACE),
    "1x1.png": (encode(FACE.resize((1, 1)), "PNG"), FACE.resize((1, 1))),
    "40x56.jpg": (encode(FACE.resize((40, 56)), "JPEG", subsampling=0), FACE.resize((40, 56))),
    "3000x160.jpg": (encode(FACE.resize((3000, 160)), "JPEG"), FACE.resize((3000, 160))),
    "151x150.jpg": (encode(FACE.resize((151, 150)), "JPEG"), FACE.resize((151, 150))),
    "PNG by name.jpg": (encode(FACE, "PNG"), FACE),
}


@pytest.mark.parametrize("name", TWINS)
def test_odd_photos_are_read_right(name, tmp_path):
    data, shown = TWINS[name]
    (tmp_path / name).write_bytes(data)
    for channels, mode in ((3, "RGB"), (1, "L")):
        image = read_image(tmp_path / name, channels)
        assert image.mode == mode and image.size == shown.size
        difference = np.asarray(image).astype(float) - np.asarray(shown.convert(mode))
        assert np.abs(difference).mean() < 4
    assert vae.celeb_transform(read_image(tmp_path / name, 3, 150)).shape == (3, 150, 150)


def test_photos_of_one_bit_are_black_and_white(tmp_path):
    FACE.convert("1").save(tmp_path / "1 bit.png")
    image = np.asarray(read_image(tmp_path / "1 bit.png"))
    assert set(np.unique(image)) == {0, 255} and abs(image.mean() - np.asarray(GREY).mean()) < 20


def png(width, height):
    """Return a PNG of a few hundred bytes whose header tells of so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9999)))]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rotten(data):
    """Return the bytes of a file, some of them changed in its middle."""
    return data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]


BROKEN = {
    "truncated.jpg": TWINS["exif 1.jpg"][0][:4000],
    "bit-rotten.png": rotten(TWINS["RGBA.png"][0]),
    "empty.jpg": b"",
    "text.jpg": b"not a photo, says this text\n",
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which Ghostscript would run
    "bomb.png": png(60_000, 60_000),
    "large.png": png(7_100, 7_100),
    "wide.png": png(60_000, 1),  # small, but 4 gigabytes when its short side has 150 pixels
}


@pytest.fixture
def no_pixels(monkeypatch):
    """Photos in which not a pixel can be decoded."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("pixels are decoded"))


@pytest.mark.parametrize(
    ("name", "words"),
    [("bomb.png", "3600000000 pixels"), ("large.png", "7100 x 7100 pixels"), ("wide.png", "60000 x 1 pixels")],
)
def test_a_photo_of_too_many_pixels_is_refused_by_its_header(no_pixels, name, words, workplace, capsys):
    Path("bomb").mkdir()
    Path("bomb", name).write_bytes(BROKEN[name])
    with warnings.catch_warnings(action="error"):
        code, said = refusal(generate, capsys, "--image", f"bomb/{name}")
        assert code == 1 and f"{name} cannot be read as an image" in said and words in said
        with pytest.raises(SystemExit):
            run("--data", "bomb")
    said = capsys.readouterr()
    assert words in said.out and f"None of the 1 photos can be read; the first is bomb/{name}." in said.err


def test_a_jpeg_counts_by_the_pixels_that_are_decoded(tmp_path, monkeypatch):
    draw_face(5, size=(1600, 1400)).save(tmp_path / "face.jpg")
    monkeypatch.setattr(vae, "MAX_PIXELS", 10**6)
    assert read_image(tmp_path / "face.jpg", 3, 32).size == (200, 175)
    with pytest.raises(UserError, match="1600 x 1400 pixels, over 1,000,000 in memory"):
        read_image(tmp_path / "face.jpg")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files there")
def test_reading_leaves_no_file_open(tmp_path, capfd):
    (tmp_path / "odd.tiff").write_bytes(rotten(TWINS["lzw.tiff"][0]))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UserError):
            read_image(tmp_path / "odd.tiff")
    assert len(os.listdir("/proc/self/fd")) == before
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_a_run_takes_what_can_be_read_and_names_the_rest(workplace, capsys):
    Path("odd").mkdir()
    files = {name: data for name, (data, _) in TWINS.items()} | BROKEN
    for name, data in files.items():
        Path("odd", name).write_bytes(data)
    run("--data", "odd", "--epochs", "1")
    said = capsys.readouterr().out
    for name in files:
        assert len(re.findall(rf"Skipped: odd/{name} cannot be read as an image \(.*\)\.\n", said)) == (name in BROKEN)
    assert f"Photos      {len(TWINS)} ({len(BROKEN)} files skipped)" in said and "Done." in said
    generate("--image", "odd", "--mode", "reconstruct")
    assert capsys.readouterr().out.count("Skipped ") == len(BROKEN)


def test_odd_photos_of_real_life(workplace, capsys):
    if not SHARED.is_dir():
        pytest.skip("needs a folder of photos that is not part of this project")
    run("--data", str(SHARED), "--epochs", "1")
    said = capsys.readouterr()
    broken = ("bitrot.jpg", "empty.jpg", "text_named.jpg", "truncated_60pct.jpg")
    assert f"Photos      {len(list(SHARED.iterdir())) - len(broken)} ({len(broken)} files skipped)" in said.out
    for name in broken:
        assert len(re.findall(rf"Skipped: \S+/{name} cannot be read as an image \(.*\)\.\n", said.out)) == 1
    assert said.err == ""
    turned = [np.asarray(read_image(SHARED / f"exif_{k}_1382x1868.jpg", size=150)).astype(int) for k in (2, 3, 6, 8)]
    assert all(np.abs(photo - turned[0]).mean() < 4 for photo in turned)


def test_names_that_are_no_text(tmp_path):
    for script in ("vae.py", "train.py", "genpic.py"):
        (tmp_path / script).write_bytes((ROOT / script).read_bytes())
    data = draw_faces(tmp_path / "faces", 3) / "face 000.jpg"
    names = ["line\nbreak", "two  spaces ", "-rf $(touch run) `touch run`", "\N{GRINNING FACE}", "\x1b[31mred\t\r"]
    for name in [*names, os.fsdecode(b"bytes \xff\xfe")] if sys.platform == "linux" else names:
        (tmp_path / f"faces/{name}.jpg").write_bytes(data.read_bytes())
        (tmp_path / f"faces/broken {name}.jpg").write_bytes(b"")
    count = len(list(tmp_path.glob("faces/broken*")))
    plain = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}
    train_it = f"train.py {' '.join(SMALL)} --epochs 1 --data faces"
    show_it = "genpic.py --checkpoint checkpoints_best/vae_model_1.pth --image faces"
    for command, named in ((train_it, count), (f"{show_it} --mode reconstruct", count), (show_it, -1)):
        arguments, environment = [sys.executable, *command.split()], os.environ | plain
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        lines = re.findall(r"^Skipped.* faces/broken [ -~]+ cannot be read as an image [ -~]+$", done.stdout, re.M)
        assert len(lines) == named or "Photo       faces/\\x1b[31mred\\t\\r.jpg, the first" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
def test_a_pipe_is_never_waited_for(workplace, capsys):
    os.mkfifo("faces/a pipe.jpg")
    run("--epochs", "1")
    generate()
    said = capsys.readouterr().out
    assert said.count("faces/a pipe.jpg cannot be read as an image (a pipe, which may never end).") == 2


def test_links_that_lead_nowhere_or_in_circles(workplace, capsys):
    for link, target in (("loop.jpg", "loop.jpg"), ("nowhere.jpg", "nothing.jpg"), ("back", ".."), ("self", ".")):
        Path("faces", link).symlink_to(target)
    run("--epochs", "1")
    said = capsys.readouterr().out
    assert "Skipped: faces/loop.jpg cannot be read" in said and "Skipped: faces/nowhere.jpg does not exist" in said
    assert "Photos      40 (2 files skipped)" in said


def test_what_may_not_be_opened_is_named_until_it_may(unprivileged, capsys):
    Path("faces/locked").mkdir()
    Path("faces/face 000.jpg").rename("faces/locked/face.jpg")
    for path in ("faces/locked", "faces/face 001.jpg"):
        Path(path).chmod(0)
    run("--epochs", "1")
    said = capsys.readouterr().out
    assert "Skipped: faces/locked cannot be opened (Permission denied).\n" in said
    assert "Skipped: faces/face 001.jpg cannot be read" in said and "Photos      38 (1 files skipped)" in said
    for path, count in (("faces/face 001.jpg", 39), ("faces/locked", 40)):
        Path(path).chmod(0o755)
        run("--epochs", "1")
        assert f"Photos      {count}, kept" in capsys.readouterr().out


def test_photos_that_somebody_else_has_decoded(unprivileged):
    next(Path("data/cache").glob("*.u8")).chmod(0o444)
    Path("data/cache").chmod(0o555)
    run("--epochs", "1")


# Archives and arrays
def zipped(path, *paths, password=False):
    """Write a .zip archive of some files, marked as encrypted if so asked."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in paths:
            archive.write(name)
    if password:
        data = Path(path).read_bytes()
        place = data.index(b"PK\1\2")
        Path(path).write_bytes(data[: place + 8] + b"\1" + data[place + 9 :])
    return Path(path)


def decoded(data, size, channels):
    """Return the photos of DATA as train.py sees them, uint8 (N, size, size, channels)."""
    train.DATA, train.IMAGE_SIZE, train.CHANNELS = str(data), size, channels
    return train.load_photos(*train.find_photos(), torch.device("cpu")).numpy()


def test_an_archive_is_read_in_place_like_the_folder(workplace, capsys):
    names = [f"faces/face {k:03d}.jpg" for k in range(40)]
    Path("faces/.hidden.jpg").write_bytes(b"")
    Path("faces/notes.txt").write_text("no photo")
    zipped("img_align_celeba.zip", *reversed(names), "faces/.hidden.jpg", "faces/notes.txt")
    assert np.array_equal(decoded("img_align_celeba.zip", 32, 3), decoded("faces", 32, 3))
    run("--data", "img_align_celeba.zip", "--epochs", "1")
    said = capsys.readouterr().out
    assert "Photos      40, kept" in said and "Done." in said
    generate("--image", "img_align_celeba.zip", "--output", "one.png")
    assert "img_align_celeba.zip/faces/face 000.jpg, the first in" in capsys.readouterr().out
    generate("--output", "other.png")
    assert Path("one.png").read_bytes() == Path("other.png").read_bytes()


def test_an_archive_in_the_folder_counts_as_the_photos_in_it(workplace, capsys):
    Path("mixed/deep").mkdir(parents=True)
    zipped("mixed/deep/some.zip", "faces/face 000.jpg", "faces/face 001.jpg")
    np.save("mixed/array.npy", np.zeros((2, 5, 4), np.uint8))
    Path("mixed/broken.zip").write_bytes(Path("mixed/deep/some.zip").read_bytes()[:500])
    Path("mixed/face.jpg").write_bytes(Path("faces/face 000.jpg").read_bytes())
    assert list(map(str, vae.find_photos("mixed"))) == [
        "mixed/array.npy/0",
        "mixed/array.npy/1",
        "mixed/deep/some.zip/faces/face 000.jpg",
        "mixed/deep/some.zip/faces/face 001.jpg",
        "mixed/face.jpg",
    ]
    assert "Skipped: " in (said := capsys.readouterr().out) and "broken.zip cannot be read as" in said


def test_many_photos_of_an_archive_are_decoded_by_processes(workplace, monkeypatch):
    monkeypatch.setattr(train, "cores", lambda: 2)
    draw_faces(workplace / "faces", 270)
    zipped("many.zip", *sorted(map(str, Path("faces").glob("*.jpg"))))
    assert np.array_equal(decoded("many.zip", 16, 3), decoded("faces", 16, 3))


@pytest.mark.parametrize("broken", ["cut", "text", "encrypted", "empty"])
def test_archives_that_cannot_be_used(workplace, capsys, broken):
    path = zipped("photos.zip", "faces/face 000.jpg", password=broken == "encrypted")
    path.write_bytes({"cut": path.read_bytes()[:500], "text": b"hello", "empty": b""}.get(broken, path.read_bytes()))
    for call, flag in ((run, "--data"), (generate, "--image")):
        code, said = refusal(call, capsys, flag, "photos.zip")
        assert code == 1 and "photos.zip cannot be read as an archive or array of photos (" in said
        assert ("encrypted: unpack it first" in said) == (broken == "encrypted")


def test_archives_without_photos(workplace, capsys):
    Path("notes.txt").write_text("no photo")
    zipped("photos.zip", "notes.txt")
    with zipfile.ZipFile("photos.zip", "a") as archive:
        archive.mkdir("folder.jpg")
    code, said = refusal(run, capsys, "--data", "photos.zip")
    assert code == 2 and "photos.zip holds no photos" in said
    code, said = refusal(generate, capsys, "--image", "photos.zip")
    assert code == 2 and "There is no photo in photos.zip" in said


def test_a_bad_photo_in_an_archive_is_named(workplace, capsys):
    Path("text.jpg").write_text("no photo")
    path = zipped("photos.zip", *[f"faces/face {k:03d}.jpg" for k in range(8)], "text.jpg")
    data = path.read_bytes()
    place = data.index(b"face 003.jpg") + 900  # inside the photo's bytes: the checksum tells
    path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    run("--data", "photos.zip", "--epochs", "1")
    said = capsys.readouterr().out
    assert "photos.zip/faces/face 003.jpg cannot be read as an image (Bad CRC-32" in said
    assert "photos.zip/text.jpg cannot be read as an image (unknown format: save it as JPEG)" in said
    assert "Photos      7 (2 files skipped)" in said


def test_a_photo_of_a_phone_is_named(workplace, capsys):
    Path("faces/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    run("--epochs", "1")
    assert "faces/IMG_1.HEIC cannot be read as an image (unknown format: save it as JPEG)" in capsys.readouterr().out


def test_a_file_without_ending_that_a_link_calls_zip_is_one(workplace):
    zipped("blob", "faces/face 002.jpg")
    Path("photos.zip").symlink_to("blob")
    assert [photo.member for photo in vae.find_photos("photos.zip")] == ["faces/face 002.jpg"]


def test_a_photo_in_an_archive_or_array_can_be_named(workplace, capsys):
    zipped("photos.zip", "faces/face 001.jpg", "faces/face 002.jpg")
    np.save("array.npy", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    for name, same in (("photos.zip/faces/face 002.jpg", "faces/face 002.jpg"), ("array.npy/3", "row.png")):
        Image.fromarray(np.load("array.npy")[3]).save("row.png")
        generate("--image", name, "--output", "one.png")
        assert f"Photo       {name}\n" in capsys.readouterr().out
        generate("--image", same, "--output", "other.png")
        assert Path("one.png").read_bytes() == Path("other.png").read_bytes()
    for name in ("photos.zip/faces/face 003.jpg", "array.npy/5", "faces/face 001.jpg/1"):
        code, said = refusal(generate, capsys, "--image", name)
        assert code == 2 and name in said


def test_a_broken_archive_is_not_taken_for_an_empty_folder(workplace, capsys):
    Path("data/train").mkdir()
    draw_faces(workplace / "data/demo", 5)
    Path("data/train/img_align_celeba.zip").write_bytes(b"PK")
    code, said = refusal(train.main, capsys, [])
    assert code == 2 and "data/train holds no photos" in said


def test_members_that_lie_about_their_size_are_read_in_bounds(workplace):
    for kind, words in ((zipfile.ZIP_DEFLATED, "Bad CRC-32"), (zipfile.ZIP_BZIP2, "neither stored nor deflated")):
        with zipfile.ZipFile("bomb.zip", "w", kind) as archive:
            archive.writestr("bomb.png", bytes(10**6))
        data = Path("bomb.zip").read_bytes()
        place = data.index(b"PK\1\2") + 24
        Path("bomb.zip").write_bytes(data[:place] + struct.pack("<I", 1000) + data[place + 4 :])
        with pytest.raises(UserError, match=words):
            read_image(vae.find_photos("bomb.zip")[0])


def test_a_member_that_unpacks_to_too_much_is_refused(workplace, monkeypatch, capsys):
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(10**6 + 1))
    monkeypatch.setattr(vae, "MAX_PIXELS", 125_000)
    code, said = refusal(generate, capsys, "--image", "bomb.zip")
    assert code == 1 and "No photo in bomb.zip can be read" in said
    with pytest.raises(UserError, match="a file of over 1 MB"):
        read_image(vae.find_photos("bomb.zip")[0])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.uint8, ()), (np.uint8, (1,)), (np.uint8, (3,)), (np.float32, ()), (np.float64, (3,)), (">f2", (1,))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_photos(tmp_path, monkeypatch, dtype, shape, channels):
    monkeypatch.chdir(tmp_path)
    grey = np.random.default_rng(0).integers(0, 256, (5, 24, 24, *shape), dtype=np.uint8)
    values = grey if dtype == np.uint8 else (grey / 255).astype(dtype)
    np.save("faces.npy", np.asfortranarray(values) if dtype == np.float64 else values)
    as_colour = np.broadcast_to(grey.reshape(5, 24, 24, -1), (5, 24, 24, 3))
    found = decoded("faces.npy", 24, channels).astype(int)
    if channels == 3:
        assert np.array_equal(found, as_colour)
    else:  # luma of ITU-R 601, as Pillow has it
        expected = as_colour @ np.array([0.299, 0.587, 0.114])
        assert np.abs(found[..., 0] - expected).max() <= 1


def test_arrays_are_scaled_and_cropped_like_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (4, 40, 30), dtype=np.uint8)
    np.save("tall.npy", array)
    for row, pixels in zip(decoded("tall.npy", 16, 1), array, strict=True):
        assert np.array_equal(row[..., 0], np.asarray(vae.celeb_transforms(16)[1](Image.fromarray(pixels))))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{"a": 1}, None] * 5, dtype=object), "Python objects"),
        (np.zeros((9, 24), np.uint8), "uint8 of shape (9, 24)"),
        (np.zeros((9, 24, 24, 2), np.uint8), "shape (9, 24, 24, 2)"),
        (np.zeros((9, 24, 24, 3, 1), np.uint8), "shape (9, 24, 24, 3, 1)"),
        (np.zeros((9, 24, 24), np.int64), "int64 of shape"),
        (np.zeros((9, 24, 24), bool), "bool of shape"),
        (np.zeros((9, 24, 24), np.complex64), "complex64 of shape"),
        (np.zeros(9, [("a", "u1"), ("b", "f4")]), "of shape (9,)"),
        (np.array(7, np.uint8), "of shape ()"),
        (np.zeros((150, 120, 3), np.uint8), "of shape (150, 120, 3)"),
        (np.zeros((3, 0, 24), np.uint8), "faces.npy"),
        (np.zeros((1, 8000, 8000), bool).view(np.uint8), "at most 50,000,000 pixels each"),
        (np.full((9, 24, 24), 1.5, np.float32), "values outside [0, 1]"),
        (np.full((9, 24, 24), np.nan, np.float32), "values outside [0, 1]"),
        (-np.ones((9, 24, 24), np.float16), "values outside [0, 1]"),
    ],
)
def test_arrays_that_are_no_photos(tmp_path, monkeypatch, capsys, array, words):
    monkeypatch.chdir(tmp_path)
    np.save("faces.npy", array)
    code, said = refusal(run, capsys, "--data", "faces.npy")
    assert code == 1 and "faces.npy " in said and words in said


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\1\0\xff\xff", "cut", "npz"])
def test_files_that_are_no_arrays(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    np.save("faces.npy", np.zeros((9, 24, 24), np.uint8))
    if data == "npz":
        np.savez("faces", a=np.zeros(3))
        Path("faces.npz").rename("faces.npy")
    else:
        Path("faces.npy").write_bytes(Path("faces.npy").read_bytes()[:1000] if data == "cut" else data)
    code, said = refusal(run, capsys, "--data", "faces.npy")
    assert code == 1 and "faces.npy cannot be read as an archive or array of photos (" in said


def test_an_array_that_takes_the_place_of_another_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (10, 200):
        np.save("new.npy", np.full((5, 16, 16), value, np.uint8))
        os.replace("new.npy", "faces.npy")
        assert (decoded("faces.npy", 16, 1) == value).all()


class Hang(BaseException):
    """Not to be taken for an error that a decoder met."""


def mutation(data, dice):
    """Return the bytes of a file after one of the accidents that happen to files."""
    data, place = bytearray(data), dice.randrange(len(data))
    match dice.randrange(4):
        case 0:  # single bytes
            for _ in range(dice.choice([1, 3, 20])):
                data[dice.randrange(len(data))] = dice.randrange(256)
        case 1:  # its header, where sizes are
            data[dice.randrange(min(64, len(data)))] ^= dice.randrange(1, 256)
        case 2:  # a hole
            data[place : place + dice.choice([1, 16, 512])] = bytes(dice.choice([1, 16, 512]))
        case 3:
            del data[place:]
    return bytes(data)


@pytest.mark.skipif(sys.platform == "win32", reason="has no timer of this kind")
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_photos_are_an_image_or_the_one_error(count, tmp_path, capfd):
    import signal

    def hang(*_):
        raise Hang

    names = ("exif 6.jpg", "progressive.jpg", "cmyk.jpg", "RGBA.png", "palette with holes.png", "lossy.webp")
    names += ("RGBA.webp", "two frames.webp", "two frames.gif", "palette with holes.gif", "lzw.tiff", "RGBA.tiff")
    outcomes, before = collections.Counter(), signal.signal(signal.SIGPROF, hang)
    try:
        for number in range(count):
            dice, name = random.Random(number), names[number % len(names)]
            path = tmp_path / f"{number} {name}"
            path.write_bytes(mutation(TWINS[name][0], dice))
            signal.setitimer(signal.ITIMER_PROF, 2)  # seconds that the processor is at work
            try:
                image = read_image(path, dice.choice([1, 3]), dice.choice([None, 32, 150]))
                outcomes[image.mode] += 1
            except UserError as error:
                assert error.code == 1 and str(error).startswith(f"{path} cannot be read as an image (")
                outcomes["refused"] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert capfd.readouterr().err == ""  # libtiff has much to say
    print(f"\nCount: {count} mutated photos: {dict(outcomes)}")
    assert sum(outcomes.values()) == count and set(outcomes) == {"RGB", "L", "refused"}
    assert outcomes["refused"] > count / 4
