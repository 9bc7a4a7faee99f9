"""Generating: what W means, the modes, the files, the refusals."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED, files_of_at_most, generate, refusal
from faces import draw_faces
from PIL import Image

import genpic
import vae


def tiles(path, columns, side=32):
    """Cut a grid into its pictures, (N, side, side, 3) in grey levels."""
    grid = np.asarray(Image.open(path).convert("RGB")).astype(int)
    step = side + 2
    rows = grid.shape[0] // step
    return np.stack([grid[2:, 2:][r * step :, c * step :][:side, :side] for r in range(rows) for c in range(columns)])


def fitted_model():
    """Return a model of 4 latents whose prior is far from N(0, I)."""
    model = vae.VAE(16, 1, [2], 4).eval()
    mixing = torch.tensor([[2.0, 0, 0, 0], [1, 0.5, 0, 0], [0, -1, 0.2, 0], [0.3, 0, 0, 3]])
    model.fit_prior(torch.randn(5000, 4) @ mixing.T + torch.tensor([1.0, 2, 3, 4]), torch.full((5000, 4), -3.0))
    return model


# What W means
def test_w_0_is_the_reconstruction():
    model, mu = fitted_model(), torch.randn(1, 4)
    for genpic.NOISE in ("population", "posterior"):
        genpic.W = 0.0
        codes = genpic.perturb(model, mu, torch.zeros(1, 4), torch.randn(7, 4))
        assert torch.equal(codes, mu.expand(7, 4))


@pytest.mark.parametrize("genpic_w", [0.25, 1.0])
def test_variations_have_the_mean_and_covariance_of_the_formula(genpic_w):
    model, mu, log_var = fitted_model(), torch.tensor([[3.0, -1, 0, 2]]), torch.tensor([[0.0, -1, -2, 1]])
    eps, genpic.W = torch.randn(200_000, 4), genpic_w
    population = model.latent_scale @ model.latent_scale.T
    mean = model.latent_mean + (1 - genpic_w) ** 0.5 * (mu[0] - model.latent_mean)
    expected = {"population": (mean, population), "posterior": (mu[0], torch.diag(log_var[0].exp()))}
    for genpic.NOISE, (mean, covariance) in expected.items():
        codes = genpic.perturb(model, mu, log_var, eps)
        torch.testing.assert_close(codes.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(torch.cov(codes.T), genpic_w * covariance, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("genpic_w", [0.1, 0.7])
def test_codes_of_the_population_stay_codes_of_the_population(genpic_w):
    model, genpic.W = fitted_model(), genpic_w
    people = model.draw_latents(torch.randn(200_000, 4))
    codes = genpic.perturb(model, people, None, torch.randn(200_000, 4))
    torch.testing.assert_close(codes.mean(0), model.latent_mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(codes.T), model.latent_scale @ model.latent_scale.T, atol=0.05, rtol=0.03)


# Modes
def test_variations_grid(workplace, capsys):
    generate("--w", "0.3", "--output", "grid.png")
    said = capsys.readouterr().out
    assert "faces/face 000.jpg, the first in faces" in said and "PSNR" in said
    assert Image.open("grid.png").size == (6 * 34 + 2, 2 * 34 + 2)
    photo, reconstruction, *variations = tiles("grid.png", columns=6)
    model, info = vae.load_checkpoint(TRAINED)
    assert f"epoch {info['epoch']}, {info['val_psnr']:.2f} dB" in said
    original = vae.celeb_transforms(32)[0](vae.read_image("faces/face 000.jpg"))[None]
    expected = model.decode(model.encode(original)[0]).detach()
    for shown, image in ((photo, original), (reconstruction, expected)):
        assert np.abs(shown - 255 * image[0].permute(1, 2, 0).numpy()).max() <= 0.6
    assert len({picture.tobytes() for picture in variations}) == 10


def test_the_photo_is_read_as_the_model_was_trained(workplace, monkeypatch):
    read, asked = genpic.read_image, []
    monkeypatch.setattr(genpic, "read_image", lambda path, *form: asked.append(form) or read(path, *form))
    generate()
    assert asked == [(3, 32)]


def test_flags_count_for_one_call(workplace):
    generate("--w", "0.5", "--mode", "sample")
    assert (genpic.W, genpic.MODE, genpic.CHECKPOINT) == (0.01, "variations", "checkpoints_best/vae_model_20.pth")


def test_w_0_shows_the_reconstruction_ten_times(workplace):
    generate("--w", "0", "--output", "grid.png")
    _, reconstruction, *variations = tiles("grid.png", columns=6)
    assert all(np.abs(picture - reconstruction).max() <= 1 for picture in variations)


def test_the_same_settings_give_the_same_bytes(workplace):
    for name in ("one", "two"):
        generate("--output", f"{name}.jpg")
    generate("--seed", "1", "--output", "three.jpg")
    one, two, three = ((workplace / f"{name}.jpg").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize("noise", ["population", "posterior"])
def test_a_variation_is_the_same_however_many_are_drawn(workplace, noise):
    for count in ("3", "70"):
        generate("--num-variations", count, "--w", "0.5", "--noise", noise, "--output", f"{count}.png")
    few, many = tiles("3.png", 5), tiles("70.png", 6)[:5]
    assert np.abs(few - many).max() <= 1


def test_reconstruct_shows_every_photo_of_the_folder(workplace, capsys):
    draw_faces(workplace / "faces", 70)
    photos = [np.asarray(vae.celeb_transforms(32)[1](vae.read_image(path))) for path in vae.find_images("faces")]
    (workplace / "faces" / "broken.jpg").write_text("no photo")
    generate("--mode", "reconstruct", "--output", "sheet.png")
    said = capsys.readouterr().out
    sheets = (tiles("sheet.png", 8).reshape(8, 2, 8, 32, 32, 3), tiles("sheet-2.png", 6).reshape(1, 2, 6, 32, 32, 3))
    originals, reconstructions = (np.concatenate([s[:, row].reshape(-1, 32, 32, 3) for s in sheets]) for row in (0, 1))
    assert np.array_equal(originals, photos) and "faces/broken.jpg cannot be read" in said
    expected = -10 * np.log10(np.square((reconstructions - originals) / 255).mean())
    assert float(re.search(r"PSNR +(.*) dB, the", said)[1]) == pytest.approx(expected, abs=0.02)


def test_sample_shows_100_faces_of_the_prior(workplace):
    generate("--mode", "sample", "--image", "nowhere", "--output", "faces.webp")
    assert Image.open("faces.webp").format == "WEBP" and Image.open("faces.webp").size == (342, 342)
    generate("--mode", "sample", "--output", "faces.png")
    model, _ = vae.load_checkpoint(TRAINED)
    expected = model.decode(model.draw_latents(vae.latent_noise(0, 100, 8))).detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(tiles("faces.png", 10) - 255 * expected).max() <= 1


def test_a_checkpoint_without_fitted_prior_is_said_to_lack_it(workplace, capsys):
    model, _ = vae.load_checkpoint(TRAINED)
    torch.save({name: t for name, t in model.state_dict().items() if not name.startswith("latent_")}, "published.pth")
    generate("--checkpoint", "published.pth")
    assert "N(0, I)" in capsys.readouterr().out


def test_grey_models_give_grey_pictures(workplace):
    model = vae.VAE(24, 1, [4], 3)
    vae.save_checkpoint("grey.pth", model)
    generate("--checkpoint", "grey.pth", "--output", "new folder/grey.png")
    assert Image.open("new folder/grey.png").mode == "L"


def test_the_picture_is_in_the_format_of_its_ending(workplace):
    for ending, format in (("jpg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        generate("--num-variations", "1", "--output", f"grid.{ending}")
        assert Image.open(f"grid.{ending}").format == format
    Image.open("grid.png").save("reference.jpg", quality=95)
    assert Image.open("grid.jpg").quantization == Image.open("reference.jpg").quantization


# Refusals
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--checkpoint missing.pth", 2, "make one with `python train.py`"),
        (
            "--checkpoint checkpoints_best/missing.pth",
            2,
            "there is checkpoints_best/last.pth, checkpoints_best/vae_model_8",
        ),
        ("--checkpoint broken.jpg", 1, "broken.jpg is not a checkpoint"),
        ("--image missing.jpg", 2, "missing.jpg"),
        ("--image broken.jpg", 1, "broken.jpg cannot be read as an image"),
        ("--image broken.jpg --mode reconstruct", 1, "broken.jpg cannot be read"),
        ("--image broken", 1, "No photo in broken can be read"),
        ("--image me.jpg --output me.jpg", 2, "which is one of the photos"),
        ("--image faces --mode reconstruct --output faces/../me.jpg", 2, "which is one of the photos"),
        ("--image empty", 2, "no photo in empty"),
        ("--mode collage", 2, "one of variations, reconstruct, sample"),
        ("--noise pink", 2, '"population" or "posterior"'),
        ("--w 1.5", 2, "W is 1.5"),
        ("--w -0.1", 2, "from 0 to 1"),
        ("--w nan", 2, "from 0 to 1"),
        ("--num-variations 0", 2, "at least 1"),
        ("--seed -1", 2, "at least 0"),
        ("--device tpu", 2, "DEVICE"),
        ("--output grid.xyz", 2, ".webp"),
        ("--output grid", 2, ".webp"),
        ("--output folder.jpg", 2, "it is a folder"),
        ("--output grid.webp --num-variations 3000", 1, ": grid.webp cannot hold 206x"),
        ("--output grid.jpg --num-variations 12000", 1, ": grid.jpg cannot hold 206x"),
    ],
)
def test_refusals(flags, code, words, workplace, capsys):
    (workplace / "broken.jpg").write_text("no photo")
    (workplace / "empty").mkdir()
    (workplace / "folder.jpg").mkdir()
    (workplace / "broken").mkdir()
    (workplace / "broken/text.png").write_text("no photo")
    (workplace / "faces/face 000.jpg").rename(workplace / "faces/me.jpg")
    (workplace / "me.jpg").symlink_to(workplace / "faces/me.jpg")
    before = sorted(workplace.rglob("*"))
    stopped, said = refusal(generate, capsys, *flags.split())
    assert stopped == code and words in said
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "value"), [("W", "0.01"), ("NUM_VARIATIONS", 2.5), ("SEED", None), ("IMAGE", ["a.jpg"])]
)
def test_constants_of_another_type(name, value, capsys):
    setattr(genpic, name, value)
    code, said = refusal(generate, capsys)
    assert code == 2 and f"{name} is {value!r}: it must be" in said


def test_a_broken_photo_in_the_folder_is_passed_over(workplace, capsys):
    (workplace / "faces" / "a broken.jpg").write_text("no photo")
    generate("--output", "grid.png")
    said = capsys.readouterr().out
    assert "Skipped     faces/a broken.jpg" in said and "Photo       faces/face 000.jpg" in said


def test_w_must_be_a_number(capsys):
    with pytest.raises(SystemExit) as stop:
        genpic.main(["--w", "much"])
    assert stop.value.code == 2 and "--w" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_leaves_the_old_picture(workplace, capsys):
    generate("--output", "new folder/grid.png")
    before = Path("new folder/grid.png").read_bytes()
    with files_of_at_most(1000):
        for name in ("grid.png", "other.jpg"):
            code, said = refusal(generate, capsys, "--output", f"new folder/{name}", "--w", "0.5")
            assert code == 1 and f": new folder/{name} cannot be written (File too large): it takes 0.0" in said
    assert Path("new folder/grid.png").read_bytes() == before and len(list(Path("new folder").iterdir())) == 1
    generate("--output", "new folder/grid.png", "--w", "0.5")
    assert Path("new folder/grid.png").read_bytes() != before


def test_a_picture_that_may_not_be_written(unprivileged, capsys):
    Path("locked").mkdir(mode=0o555)
    for output in ("locked/grid.png", "locked/new folder/grid.png", "faces/face 000.jpg/grid.png"):
        code, said = refusal(generate, capsys, "--output", output, "--mode", "sample")
        assert code == 1 and f"{output} cannot be written (" in said
