"""Tests of genpic.py: W, the modes, the output files and the errors."""

import copy
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAINED, files_of_at_most, generate, refusal, untouched_scripts
from faces import draw_face, draw_faces
from PIL import Image
from torchvision.transforms.functional import to_tensor

import genpic
import vae
from data.photos import find_photos, read_image

MORPH = ["--mode", "interpolate", "--image", "faces/face 003.jpg", "--image-to", "faces/face 007.jpg"]
NO_PHOTO = "it must be a file other than the photos"
REFUSED = {
    "--checkpoint missing.pth": "There is no checkpoint missing.pth: correct the path, or train one",
    "--image empty --mode reconstruct": "There are no photos in empty: add one",
    "--mode interpolate --image-to broken.jpg": "broken.jpg cannot be read as an image (not a picture in a known",
    "--image-to me.jpg": "MODE is 'variations': it must be \"interpolate\" if IMAGE_TO is set",
    "--image me.jpg --output me.jpg": f"OUTPUT is 'me.jpg': {NO_PHOTO}",
    "--image me.jpg --output faces/me.jpg": NO_PHOTO,  # me.jpg is a link to it
    "--mode reconstruct --output empty/../faces/me.jpg": NO_PHOTO,
    "--mode interpolate --image 'faces/face 001.jpg' --image-to me.jpg --output me.jpg": NO_PHOTO,
    "--mode collage": "MODE is 'collage': it must be one of variations, photo, reconstruct, sample, interpolate",
    "--tune -1": "TUNE is -1: it must be at least 0",
    "--tune 9 --mode sample": "TUNE is 9: it must be 0 without a photo to fit (interpolate needs IMAGE_TO or EDIT)",
    "--tune 9 --mode interpolate": "TUNE is 9: it must be 0",
    "--w -0.1": "W is -0.1: it must be a number from 0 to 1",
    "--crop '1 2 0'": 'CROP is \'1 2 0\': it must be "face", "center", or left, top',
    "--image me.jpg --crop '-90 0 40'": "CROP -90 0 40 is outside me.jpg, which is 48 pixels wide",
    "--output grid.gif": "OUTPUT is 'grid.gif': it must be a file name ending in .jpg, .png or .webp; or .gif for",
    "--output grid.webp --num-variations 3000": "grid.webp cannot be written",  # WebP allows at most 16,383 pixels
}


def tiles(path):
    """Split a grid into its pictures (N, 32, 32, 3), in grey levels."""
    grid = np.asarray(Image.open(path).convert("RGB")).astype(int)[2:, 2:]
    rows = grid.reshape(len(grid) // 34, 34, -1, 34, 3)
    return rows.swapaxes(1, 2)[:, :, :32, :32].reshape(-1, 32, 32, 3)


def pictures(*flags):
    """Run genpic.py with these flags; return the pictures in the grid."""
    with untouched_scripts():
        generate(*flags, "--output", "grid.png")
    return tiles("grid.png")


def apart(one, other):
    """Return the largest difference between pictures, in grey levels."""
    return np.abs(one - np.asarray(other)).max()


def fitted_model():
    """Return a model of 4 latents whose prior is far from N(0, I)."""
    model = vae.VAE(16, 1, [2], 4)
    model.latent_mean.copy_(torch.tensor([1.0, 2, 3, 4]))
    model.latent_scale.copy_(torch.tensor([[2.0, 0, 0, 0], [1, 0.5, 0, 0], [0, -1, 0.2, 0], [0.3, 0, 0, 3]]))
    return model


@pytest.mark.parametrize("hidden_dims", [[8], [8, 16], [8, 16, 32]])
def test_tune_fits_the_stages_of_a_copy_of_the_decoder(hidden_dims, monkeypatch):
    torch.manual_seed(0)
    model, images = vae.VAE(24, 1, hidden_dims, 4).eval(), torch.rand(2, 1, 24, 24)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(genpic, "TUNE", 3)
    with torch.no_grad():
        fitted = genpic.fit_decoder(model, model.encode(images)[0], images).state_dict()
    learned = {name.split(".")[0] for name in before if not torch.equal(fitted[name], before[name])}
    assert learned == {"decoder" if len(hidden_dims) > 1 else "final_layer"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_tune_gives_every_mode_pictures_closer_to_the_photo_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    checkpoint, photo = ROOT / genpic.CHECKPOINT, ROOT / "tests/portrait.jpg"
    before = checkpoint.read_bytes()
    monkeypatch.chdir(tmp_path)
    modes = (
        ["variations"],
        ["sweep", "--num-variations=1"],
        ["reconstruct"],
        ["interpolate", f"--image-to={ROOT / genpic.IMAGE}"],
    )
    for mode in modes:
        genpic.main([f"--checkpoint={checkpoint}", f"--image={photo}", "--tune=30", "--device=cpu", "--mode", *mode])
    lines = re.findall("PSNR of (.*) dB, fitted in 30 steps to (.*) dB", capsys.readouterr().out)
    gains = [float(fitted) - float(psnr) for psnr, fitted in lines]
    assert len(gains) == 5 and min(gains) > 4.8  # a third of the error is 4.77 dB less
    assert len(set(lines[:3])) == 1
    assert checkpoint.read_bytes() == before


def test_every_mode_decodes_the_same_code_with_the_fitted_decoder(workplace):
    fitted, *variations = pictures("--tune", "5", "--w", "0", "--num-variations", "4")[1:]
    sweep = pictures("--tune", "5", "--mode", "sweep", "--num-variations", "1")
    pairs = pictures("--tune", "5", "--mode", "reconstruct")
    for same in (variations, sweep[[1]], pairs[[1]]):
        assert apart(same, fitted) <= 1
    assert apart(pictures()[1], fitted) > 5
    same_photo = ["--mode", "interpolate", "--image", "faces/face 000.jpg", "--image-to", "faces/face 000.jpg"]
    assert apart(pictures("--tune", "5", *same_photo), fitted) <= 1


def test_tune_is_suggested_for_ones_own_photos_only(workplace, capsys):
    shutil.copytree("faces", "data/tested_data")
    for image, tune, suggested in (("faces", "0", 1), ("faces", "2", 0), ("data/tested_data", "0", 0)):
        generate("--image", image, "--tune", tune)
        assert capsys.readouterr().out.count("--tune 50 keeps the person") == suggested


@pytest.mark.parametrize("w", [0.0, 0.25, 1.0])
def test_variations_match_the_formula_and_preserve_the_prior(w):
    torch.manual_seed(0)
    model, photo, eps = fitted_model(), torch.tensor([[3.0, -1, 0, 2]]), torch.randn(2, 200_000, 4)
    people = model.draw_latents(eps[0])
    mean = model.latent_mean + (1 - w) ** 0.5 * (photo[0] - model.latent_mean)
    covariance = model.latent_scale @ model.latent_scale.T
    for mu, *expected in ((photo, mean, w * covariance), (people, model.latent_mean, covariance)):
        codes = genpic.perturb(model, mu, eps[1], w)
        torch.testing.assert_close([codes.mean(0), torch.cov(codes.T)], expected, atol=0.03, rtol=0.02)


def test_the_grid_is_the_photo_its_reconstruction_and_ten_variations(workplace, capsys):
    grid = pictures("--w", "0.3")
    assert Image.open("grid.png").size == (6 * 34 + 2, 2 * 34 + 2)
    assert len({picture.tobytes() for picture in grid[2:]}) == 10
    model, info = vae.load_checkpoint(TRAINED)
    photo = to_tensor(vae.square_transform(32)(read_image("faces/face 000.jpg")))[None]
    reconstruction = model.decode(model.encode(photo)[0])
    assert apart(grid[:2], [vae.to_picture(image) for image in (photo[0], reconstruction[0])]) <= 1
    assert apart(pictures("--w", "0")[2:], grid[1]) <= 1
    psnr = vae.psnr((reconstruction - photo).square().mean().item())
    said = capsys.readouterr().out
    assert f"Photo       faces/face 000.jpg, reconstructed with a PSNR of {psnr:.2f} dB" in said
    assert f"epoch {info['epoch']}, {info['val_psnr']:.2f} dB" in said


def test_crop_is_in_pixels_of_the_upright_photo(workplace):
    photo, turned = draw_face(5, size=(600, 700)), Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the file stores the photo sideways
    photo.rotate(90, expand=True).save("me.jpg", quality=100, exif=turned)
    photo.crop((100, 150, 400, 450)).save("square.png")
    assert apart(pictures("--image=me.jpg", "--crop=100 150 300"), pictures("--image=square.png")) <= 3


def test_reconstruct_shows_each_photo_beside_its_reconstruction_on_numbered_sheets(workplace, capsys):
    photos = [read_image(photo) for photo in find_photos(draw_faces(workplace / "faces", 70))]
    Path("faces/a broken.jpg").write_text("no photo")
    pairs = np.concatenate([pictures("--mode", "reconstruct"), tiles("grid-2.png")[:12]])
    assert Image.open("grid.png").size == (8 * 34 + 2, 16 * 34 + 2)
    originals, reconstructions = pairs[::2], pairs[1::2]
    assert np.array_equal(originals, [vae.square_transform(32)(photo) for photo in photos])
    expected = vae.psnr(np.square((reconstructions - originals) / 255).mean())
    said = capsys.readouterr().out
    assert "Skipped     faces/a broken.jpg cannot be read" in said
    assert float(re.search(r"^PSNR +(.*) dB", said, re.MULTILINE)[1]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("prior", ["fitted", "standard"])
def test_sample_shows_100_faces_of_the_prior(prior, workplace):
    shown = pictures("--mode", "sample", "--image", "nowhere", "--prior", prior)
    model, _ = vae.load_checkpoint(TRAINED)
    noise = vae.latent_noise(model, 100, 0)
    expected = model.decode(model.draw_latents(noise) if prior == "fitted" else noise)
    assert apart(shown, [vae.to_picture(image) for image in expected]) <= 1


def test_sweep_has_a_labelled_row_for_each_w_and_the_same_noise_down_a_column(workplace):
    rows = pictures("--mode", "sweep", "--num-variations", "3").reshape(6, 4, 32, 32, 3)
    for row, w in zip(rows, ("0", "0.01", "0.03", "0.1", "0.3", "1"), strict=True):
        assert apart(row[1:], pictures("--w", w, "--num-variations", "3")[2:5]) <= 1
        assert row[0].min() < 100 and (row[0] > 250).mean() > 0.5
    assert len({label.tobytes() for label in rows[:, 0]}) == 6


def test_a_checkpoint_without_a_fitted_prior_is_reported(workplace, capsys):
    generate()
    assert "Prior " not in capsys.readouterr().out
    vae.save_checkpoint("other.pth", vae.VAE(32, 3, [4], 3))
    generate("--checkpoint", "other.pth")
    assert "Prior       N(0, I)" in capsys.readouterr().out


@pytest.mark.parametrize("mode", genpic.MODES)
def test_grey_models_give_grey_pictures(mode, workplace):
    model = vae.VAE(24, 1, [4], 3)
    model.directions = {"Smiling": torch.ones(3)}
    vae.save_checkpoint("grey.pth", model)
    flags = ["--edit=Smiling 1", "--crop=0 0 40"]
    generate("--checkpoint", "grey.pth", "--mode", mode, "--output", "new folder/grey.png", *flags)
    assert Image.open("new folder/grey.png").mode == "L"


def test_interpolation_is_spherical_in_whitened_coordinates():
    model = fitted_model()
    ends = torch.tensor([[1.0, 0, 0.5, -2], [0.0, 2, 1, 0.3]])
    angle = torch.acos(torch.cosine_similarity(*ends, dim=0))
    shares = torch.sin(torch.linspace(0, 1, 20) * angle)[:, None] / torch.sin(angle)  # Shoemake 1985
    expected = model.draw_latents(shares.flip(0) * ends[0] + shares * ends[1])
    torch.testing.assert_close(genpic.codes_between(model, *model.draw_latents(ends)), expected, atol=1e-3, rtol=1e-3)


def test_interpolation_goes_from_one_reconstruction_to_the_other_or_from_sample_to_sample(workplace):
    photos = np.concatenate([pictures("--image", f"faces/face 00{number}.jpg")[[1]] for number in (3, 7)])
    samples = pictures("--mode", "sample")[:2]
    for flags, ends in ((MORPH, photos), (["--mode", "interpolate", "--image", "nowhere"], samples)):
        assert apart(pictures(*flags)[[0, -1]], ends) <= 1


@pytest.mark.parametrize(
    ("flags", "places"),
    [(["--mode=sample"], []), (["--mode=interpolate"], []), (["--mode=sweep"], ["faces"]), (MORPH, MORPH[3::2])],
)
def test_photos_are_searched_for_once_and_only_if_needed(flags, places, workplace, monkeypatch):
    looked = []
    monkeypatch.setattr(genpic, "find_photos", lambda place: looked.append(place) or find_photos(place))
    generate(*flags)
    assert looked == places


@pytest.mark.parametrize(("ending", "loss"), [("gif", 4), ("webp", 0)])
def test_an_animation_plays_forward_and_back(ending, loss, workplace):
    steps = pictures(*MORPH)
    generate(*MORPH, "--output", f"morph.{ending}")
    animation = Image.open(f"morph.{ending}")
    assert (animation.format, animation.n_frames, animation.info["loop"]) == (ending.upper(), 38, 0)
    for number in range(38):
        animation.seek(number)
        assert np.abs(np.asarray(animation.convert("RGB")) - steps[min(number, 38 - number)]).mean() <= loss


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp", "gif"])
def test_the_same_settings_give_the_same_bytes_in_the_format_of_the_extension(ending, workplace):
    names = [f"{number}.{ending}" for number in range(3)]
    for name, seed in zip(names, "001", strict=True):
        flags = ["--mode", "interpolate"] if ending == "gif" else ["--tune", "3"]
        generate("--seed", seed, "--output", name, *flags)
    assert Image.open(names[0]).format == ending.upper().replace("JPG", "JPEG")
    one, two, three = [Path(name).read_bytes() for name in names]
    assert one == two != three


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit file sizes")
def test_output_overwrites_files_but_a_full_disk_keeps_the_old_one(workplace):
    Path("grid.png").write_text("something else")
    with files_of_at_most(1000):
        assert refusal(generate, "--output", "grid.png") == "grid.png cannot be written (File too large)."
    assert Path("grid.png").read_text() == "something else" and not list(Path().glob(".*"))
    assert len(pictures()) == 12


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_requests_are_refused_and_nothing_is_written(flags, workplace):
    Path("empty").mkdir()
    Path("broken.jpg").write_text("no photo")
    Path("faces/face 000.jpg").rename("faces/me.jpg")
    Path("me.jpg").symlink_to("faces/me.jpg")
    before = {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")}
    assert REFUSED[flags] in refusal(generate, *shlex.split(flags))
    assert {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")} == before
