"""Tests of finding faces and cropping photos around them."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, generate, refusal, run
from PIL import Image, ImageOps
from test_genpic import pictures

import genpic
import train
import vae
from data.faces import face_detector, median_face_box, read_square
from data.photos import crop_square

PORTRAIT = Image.open(ROOT / "tests/portrait.jpg")  # a generated face on a noise background, 640 x 480
SQUARE = crop_square(PORTRAIT, 373, 235, 217)  # the crop that puts the face at FACE_BOX


KINDS = {
    "large.jpg": PORTRAIT.resize((4000, 3000)),
    "grey.jpg": PORTRAIT.convert("L"),
    "cmyk.jpg": PORTRAIT.convert("CMYK"),
    "transparent.png": PORTRAIT.convert("RGBA"),
    "at the edge.png": PORTRAIT.crop((400, 200, 640, 480)),
    "small.png": PORTRAIT.resize((160, 120)),
}


@pytest.fixture
def model(workplace):
    """Write `me.jpg` and `model.pth`, a model with a face_box; return the flags that select the model."""
    vae.save_checkpoint("model.pth", vae.VAE(32, 3, [4], 3), face_box=list(train.FACE_BOX))
    shutil.copy(ROOT / "tests/portrait.jpg", "me.jpg")
    return ["--checkpoint", "model.pth"]


@pytest.mark.parametrize("name", KINDS)
def test_photos_of_any_kind_are_cropped_around_the_face(name, tmp_path):
    KINDS[name].save(tmp_path / name)
    square, crop = read_square(tmp_path / name, 1, 150, "face", train.FACE_BOX)
    assert (crop.others, crop.angle) == ([], 0)
    inside = slice(24, None) if "edge" in name else slice(None)  # the rest of that square is beyond the photo
    difference = np.asarray(square).astype(int) - np.asarray(ImageOps.grayscale(SQUARE).resize((150, 150)))
    assert np.abs(difference)[:, inside].mean() < 13  # it would be 20 if the crop were off by 5%


def test_crops_beyond_the_edge_repeat_edge_pixels():
    pixels = np.asarray(crop_square(PORTRAIT, -30, 400, 100))
    assert np.array_equal(pixels, np.pad(np.asarray(PORTRAIT)[400:, :70], ((0, 20), (30, 0), (0, 0)), "edge"))


@pytest.mark.parametrize("size", [(3200, 2400), (4000, 3000), (6400, 4800)])
def test_the_square_in_a_large_jpeg_is_that_of_the_full_photo(size, tmp_path):
    squares = []
    for name in ("large.jpg", "large.png"):  # decoded small, decoded fully
        PORTRAIT.resize(size).save(tmp_path / name, quality=95, compress_level=1)
        squares.append(read_square(tmp_path / name, 3, 150, "face", train.FACE_BOX)[1].square)
    assert squares[0] == pytest.approx(squares[1], abs=0.01 * squares[1][2])
    assert squares[0] == pytest.approx([size[0] / 640 * pixels for pixels in (373, 235, 217)], abs=0.04 * squares[1][2])


@pytest.mark.parametrize("angle", [90, 180, 270, 30, -30])
def test_turned_and_tilted_faces_are_cropped_upright(angle, tmp_path, capsys):
    PORTRAIT.rotate(angle, Image.Resampling.BICUBIC, expand=True).save(tmp_path / "turned.png")
    square, crop = read_square(tmp_path / "turned.png", 3, 150, "face", train.FACE_BOX)
    assert (crop.angle + angle) % 360 == 0
    assert (
        np.abs(np.asarray(square).astype(int) - SQUARE.resize((150, 150))).mean() < 15
    )  # it would be 50 if it were not turned
    said = genpic.describe_face(crop, train.FACE_BOX)
    assert said.endswith(f" pixels wide: cropped after turning the photo by {abs(crop.angle)} degrees")


def test_other_faces_are_listed_and_any_square_can_be_pasted(model, capsys):
    group = Image.new("RGB", (1600, 460), "grey")
    left = -60
    for size in (400, 160, 230, 180, 140, 220, 200):
        group.paste(SQUARE.resize((size, size)), (left, 30))
        left += size + 5
    group.paste(SQUARE.resize((180, 180)).rotate(180), (360, 270))  # upside down: not listed
    group.save("group.png")
    face = pictures(*model, "--image=group.png")[0]
    said = capsys.readouterr().out
    assert re.search(r"\(1\d% is outside the photo: edges repeated\); other faces: ", said)
    squares = re.findall('--crop "(.*?)"', said)
    assert [int(square.split()[2]) for square in squares] == pytest.approx([400, 230, 220, 200, 180, 160], rel=0.06)
    for square in squares:  # each shows the same face
        difference = pictures(*model, "--image=group.png", "--crop", square)[0] - face
        assert np.abs(difference).mean() < (3 if square == squares[0] else 25)
    said = capsys.readouterr().out
    assert said.count("Square      ") == 1 and re.search(": 1.% of it is outside the photo, whose edges are", said)


def test_every_mode_crops_to_the_face(model, capsys):
    face = pictures(*model, "--image=me.jpg")[0]
    assert np.abs(face - np.asarray(SQUARE.resize((32, 32)))).mean() < 12
    shutil.copytree("faces", "photos")
    shutil.copy("me.jpg", "photos/a.jpg")
    assert np.array_equal(pictures(*model, "--image=photos", "--mode=reconstruct")[0], face)
    capsys.readouterr()
    for flags, count in (["--mode=sweep"], 1), (["--mode=interpolate", "--image-to=me.jpg"], 2):
        generate(*model, "--image=me.jpg", *flags)
        said = capsys.readouterr().out
        face = r'^Face        me.jpg: 11. pixels wide: cropped as with --crop "37. 23. 21."$'
        assert len(re.findall(face, said, re.MULTILINE)) == count


def test_without_a_face_dlib_or_a_face_box_the_center_square_is_used(model, monkeypatch, capsys):
    Image.effect_noise((60, 50), 90).save("faces/face 000.jpg")
    center = pictures(*model, "--crop=center")
    assert "Face" not in capsys.readouterr().out
    assert np.array_equal(pictures(*model), center)
    assert "Face        faces/face 000.jpg: none found (in profile?): using" in capsys.readouterr().out
    vae.save_checkpoint("other.pth", vae.VAE(32, 3, [4], 3))
    pictures("--checkpoint", "other.pth", "--image", "me.jpg")
    assert "Face" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "dlib", None)
    face_detector.cache_clear()
    generate(*model, "--image=me.jpg")
    face_detector.cache_clear()
    assert "install the detector with `pip install dlib-bin`.\n" in capsys.readouterr().out


def test_training_crops_around_faces_and_stores_the_face_box(workplace, capsys):
    for path in Path("faces").iterdir():
        Image.effect_noise((60, 50), 90).save(path)
    for number in range(4):
        shifted = crop_square(PORTRAIT, 150 + 20 * number, 30, 480)
        shifted.save(f"faces/face {number:03d}.jpg", quality=95)
    flags = ["--crop=face", "--image-size=64", "--epochs=1", "--output-dir=out"]
    run(*flags)
    said = capsys.readouterr().out
    assert said.count(" shows no face.") == 36 and "Photos      4 of 40 can be used" in said
    _, info = vae.load_checkpoint("out/vae_model_1.pth")
    assert info["face_box"] == pytest.approx(train.FACE_BOX, abs=0.02)
    assert "CROP was face and is now center" in refusal(run, *flags, "--crop=center", "--resume")
    run("--epochs=1", "--output-dir=center", "--crop=center", "--no-resume")
    assert vae.load_checkpoint("center/vae_model_1.pth")[1]["face_box"] is None


def test_a_face_box_is_stored_if_half_of_the_photos_show_a_face():
    face = np.asarray(SQUARE.resize((150, 150)))
    pictures = np.stack([face, np.zeros_like(face)])
    assert median_face_box(pictures) == pytest.approx(train.FACE_BOX, abs=0.02)
    assert median_face_box(pictures[..., :1]) == pytest.approx(train.FACE_BOX, abs=0.02)
    assert median_face_box(pictures[[0, 1, 1]]) is None


def test_a_tip_is_printed_if_faces_are_not_aligned(capsys):
    squares = [(373, 235, 217), (333, 215, 300), (223, 95, 380)]
    one, two, three = (np.asarray(crop_square(PORTRAIT, *square).resize((150, 150))) for square in squares)
    nothing = np.zeros_like(one)
    tip = "Tip         The faces are not aligned: crop each photo around its face with --crop face\n"
    for squares, wanted in (([one, two, three], None), ([one, nothing, nothing], None), ([one], [0.3, 0.3, 0.4])):
        median_face_box(np.stack(squares), wanted)
        assert capsys.readouterr().out.endswith(tip)
    for squares in ([one, one], [nothing]):
        median_face_box(np.stack(squares))
        assert "Tip" not in capsys.readouterr().out
