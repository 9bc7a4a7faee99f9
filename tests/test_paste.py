"""Tests of changing the face in a whole photo."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT, generate, refusal
from PIL import ExifTags, Image, ImageDraw
from test_faces import PORTRAIT, SQUARE
from torchvision.transforms.functional import to_tensor

import train
import vae
from data.faces import Crop, read_square, turn
from data.paste import paste_face
from data.photos import crop_square, read_image

FACE = "373 235 217"


def levels(image, box=None):
    """Return the grey levels of a PIL image, or of a part of it, as integers."""
    return np.asarray(image.crop(box) if box else image).astype(int)


def pasted(photo, crop, before, after):
    """Return a copy of a PIL image in which a face has changed as one PIL image changes to another."""
    photo = photo.copy()
    paste_face(photo, crop, to_tensor(before), to_tensor(after))
    return photo


@pytest.fixture
def model(workplace):
    """Write `me.png`, a portrait, and `model.pth`, a model of faces with an attribute; return the model's flag."""
    torch.manual_seed(0)
    model = vae.VAE(32, 3, [4, 8], 3)
    model.directions = {"Smiling": 9 * torch.ones(3)}
    vae.save_checkpoint("model.pth", model, face_box=list(train.FACE_BOX))
    PORTRAIT.save("me.png")
    return "--checkpoint=model.pth"


@pytest.mark.parametrize("angle", [0, 90, 180, 270, 30, -30])
def test_the_change_appears_in_the_face_however_the_photo_is_turned(angle, tmp_path):
    photo = PORTRAIT.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    photo.save(tmp_path / "turned.png")
    before, crop = read_square(tmp_path / "turned.png", 3, 150, "face", train.FACE_BOX)
    after = before.copy()
    ImageDraw.Draw(after).rectangle((55, 65, 95, 80), "red")
    changed = pasted(photo, crop, before, after)
    again = crop_square(turn(changed, crop.angle), *crop.square).resize((150, 150))
    there, around = (50, 60, 100, 85), (0, 100, 150, 150)
    error, change = (np.abs(levels(image, there) - levels(after, there)).mean() for image in (again, before))
    assert error < 0.15 * change  # the edges of the rectangle are not as sharp
    assert np.abs(levels(again, around) - levels(before, around)).mean() < 4  # from turning twice
    assert (levels(changed) != levels(photo)).any(2).sum() < 0.7 * crop.square[2] ** 2  # the ellipse covers 0.62


def test_the_photo_is_unchanged_outside_the_ellipse_and_without_a_change():
    photo, crop = PORTRAIT.crop((300, 150, 640, 480)), Crop([-20, -30, 300], 0, [], 0)
    before, after = (Image.effect_noise((150, 150), spread).convert("RGB") for spread in (90, 60))
    assert np.array_equal(pasted(photo, crop, before, before), photo)
    same = (levels(pasted(photo, crop, before, after)) == levels(photo)).all(2)
    y, x = np.mgrid[: photo.height, : photo.width]
    is_inside = np.hypot((x + 0.5 - 130) / (0.87 * 150), (y + 0.5 - 120 + 3) / (0.97 * 150)) < 1
    assert same[~is_inside].all() and same[is_inside].mean() < 0.5


def test_what_moves_keeps_its_sharp_edges():
    photos = [Image.new("L", (600, 600), "white") for _ in range(2)]
    for photo, x in zip(photos, (280, 292), strict=True):  # by 3 of 150 pixels
        ImageDraw.Draw(photo).ellipse((x - 80, 220, x + 80, 380), 160)
    before, after = (photo.resize((150, 150)) for photo in photos)
    error = np.abs(levels(pasted(photos[0], Crop([0, 0, 600], 0, [], 0), before, after)) - levels(photos[1]))
    assert (error > 30).sum() < 0.25 * (levels(photos[0]) != levels(photos[1])).sum()  # 0.4 if the change were added


def test_lines_that_vanish_leave_the_texture_but_no_trace():
    texture = np.random.default_rng(0).integers(-5, 6, (600, 600))
    photo = Image.fromarray((150 + texture).astype(np.uint8))
    before, after = photo.copy(), photo.resize((150, 150))
    ImageDraw.Draw(before).line((200, 300, 400, 300), "black", 12)
    rest = levels(pasted(before, Crop([0, 0, 600], 0, [], 0), before.resize((150, 150)), after)) - levels(photo)
    assert np.abs(rest).max() < 25 and np.abs(rest[290:310, 210:390]).mean() < 8  # 130 to 150 before


def test_the_whole_photo_is_written_upright_and_without_private_data(model, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 0.0)
    PORTRAIT.rotate(90, expand=True).save("me.jpg", quality=95, exif=exif, comment="private")
    for name in ("out.jpg", "out.webp", "out.png"):
        generate(model, "--image=me.jpg", "--mode=photo", "--edit=smiling 2", "--output", name)
        said = capsys.readouterr().out
        assert "Tune        50 steps, the default of" in said and "fitted in 50 steps to" in said
        assert "Size        640 x 480, 8-bit sRGB (JPEG: quality 95), no EXIF or GPS data" in said
        picture = Image.open(name)
        assert picture.size == (640, 480) and not picture.getexif() and not {"comment", "exif"} & picture.info.keys()
    upright = read_image("me.jpg")
    assert np.array_equal(levels(picture, (0, 0, 370, 480)), levels(upright, (0, 0, 370, 480)))
    assert np.abs(levels(picture) - levels(upright)).max() > 20


def test_an_edit_of_0_gives_the_photo(model):
    generate(model, "--image=me.png", "--mode=photo", "--tune=2", "--edit=Smiling 0", "--output=out.png")
    assert np.array_equal(levels(Image.open("out.png")), levels(PORTRAIT))


def test_two_runs_change_two_people(model):
    group = Image.new("RGB", (500, 240), "grey")
    group.paste(SQUARE, (10, 10))
    group.paste(SQUARE, (270, 10))
    group.save("group.png")
    flags = [model, "--mode=photo", "--tune=2", "--edit=Smiling 2"]
    generate(*flags, "--image=group.png", "--crop=10 10 217", "--output=one.png")
    generate(*flags, "--image=one.png", "--crop=270 10 217", "--output=two.png")
    left, right = (0, 0, 240, 240), (260, 0, 500, 240)
    group, one, two = (Image.open(name) for name in ("group.png", "one.png", "two.png"))
    for box, before, after, same in ((left, group, one, two), (right, one, two, group)):
        assert np.abs(levels(before, box) - levels(after, box)).max() > 20
        assert np.array_equal(levels(same, box), levels(after if box == left else before, box))


def test_requests_that_cannot_change_a_face_are_refused(model):
    Image.new("RGB", (200, 200), "grey").save("nobody.png")
    photo = [model, "--image=me.png", "--mode=photo", "--tune=1"]
    edit = [*photo, "--edit=Smiling 1"]
    for nothing in ("", ","):
        assert f"EDIT is '{nothing}': it must be what to change" in refusal(generate, *photo, f"--edit={nothing}")
    Image.new("RGB", (3001, 4000)).save("large.png")
    assert "outside large.png" in refusal(generate, *edit, "--image=large.png", "--crop=3001 0 2400")
    for flags, crop in ((["--image=nobody.png"], "face"), (["--crop=center"], "center")):
        said = refusal(generate, *edit, *flags)
        assert re.match(rf"CROP is '{crop}': it must be the square around a face, .*: none was found in \w+.png", said)
    assert "it must be a file other than the photos" in refusal(generate, *edit, "--output=me.png")


def test_the_included_model_makes_a_portrait_smile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = ROOT / "checkpoints_best/vae_model_20.pth"
    flags = [f"--checkpoint={checkpoint}", f"--image={ROOT / 'tests/portrait.jpg'}", f"--crop={FACE}", "--mode=photo"]
    generate(*flags, "--tune=10", "--edit=Smiling 2", "--output=out.png")
    model = vae.load_checkpoint(checkpoint)[0]
    read_out = model.directions["Smiling"] / model.directions["Smiling"].square().sum()
    faces = [image.crop((373, 235, 590, 452)).resize((150, 150)) for image in (PORTRAIT, Image.open("out.png"))]
    (before, _), (after, _) = (model.encode(to_tensor(face)[None]) for face in faces)
    assert (after - before) @ read_out > 1  # units
