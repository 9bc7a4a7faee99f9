"""Generating: what W means, the modes, the files, the refusals."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED, files_of_at_most, generate, refusal
from faces import draw_face, draw_faces
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
        codes = genpic.perturb(model, mu, torch.zeros(1, 4), torch.randn(7, 4), 0.0)
        assert torch.equal(codes, mu.expand(7, 4))


@pytest.mark.parametrize("w", [0.25, 1.0])
def test_variations_have_the_mean_and_covariance_of_the_formula(w):
    model, mu, log_var = fitted_model(), torch.tensor([[3.0, -1, 0, 2]]), torch.tensor([[0.0, -1, -2, 1]])
    eps = torch.randn(200_000, 4)
    population = model.latent_scale @ model.latent_scale.T
    mean = model.latent_mean + (1 - w) ** 0.5 * (mu[0] - model.latent_mean)
    expected = {"population": (mean, population), "posterior": (mu[0], torch.diag(log_var[0].exp()))}
    for genpic.NOISE, (mean, covariance) in expected.items():
        codes = genpic.perturb(model, mu, log_var, eps, w)
        torch.testing.assert_close(codes.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(torch.cov(codes.T), w * covariance, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("w", [0.1, 0.7])
def test_codes_of_the_population_stay_codes_of_the_population(w):
    model = fitted_model()
    people = model.draw_latents(torch.randn(200_000, 4))
    codes = genpic.perturb(model, people, None, torch.randn(200_000, 4), w)
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
    psnr = -10 * math.log10((expected - original).square().mean())
    assert f"PSNR        {psnr:.2f} dB" in said
    for shown, image in ((photo, original), (reconstruction, expected)):
        assert np.abs(shown - 255 * image[0].permute(1, 2, 0).numpy()).max() <= 0.6
    assert len({picture.tobytes() for picture in variations}) == 10


def test_the_photo_is_read_as_the_model_was_trained(workplace, monkeypatch):
    read, asked = vae.read_image, []
    monkeypatch.setattr(vae, "read_image", lambda path, *form: asked.append(form) or read(path, *form))
    generate()
    assert asked == [(3, 32)]


def test_crop_is_in_pixels_of_the_upright_photo(workplace):
    photo, turned = draw_face(5, size=(600, 700)), Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the file holds the photo on its side
    photo.rotate(90, expand=True).save("me.jpg", quality=100, exif=turned)
    photo.crop((100, 150, 400, 450)).save("square.png")
    for name, flags in {"one": ["me.jpg", "--crop", "100", "150", "300"], "two": ["square.png"]}.items():
        ends = ["--image-to", "faces/face 000.jpg", "--image", *flags]
        generate("--mode", "interpolate", *ends, "--output", f"{name}.png")
    assert np.abs(tiles("one.png", 5) - tiles("two.png", 5)).max() <= 3


def test_a_photo_unlike_those_of_training_is_told_how_to_be_cropped(workplace, capsys):
    model, info = vae.load_checkpoint(TRAINED)
    vae.save_checkpoint("better.pth", model, **info | {"val_psnr": 30.0})
    vae.save_checkpoint("silent.pth", model)
    modes = {"variations": 1, "sweep": 1, "reconstruct": 1, "interpolate": 2, "sample": 0}
    for checkpoint, hints in {TRAINED: 0, "better.pth": 1, "silent.pth": 0}.items():
        for mode, photos in modes.items():
            ends = ["--image-to", "faces/face 001.jpg"] if mode == "interpolate" else []
            generate("--checkpoint", checkpoint, "--mode", mode, "--num-variations", "1", *ends)
            said = capsys.readouterr().out
            assert said.count("PSNR  ") == photos, said
            assert said.count("far below the 30.0 dB") == said.count("--crop LEFT TOP SIZE") == hints * photos, said


def test_far_below_is_over_3_db(capsys):
    for usual, told in ((22.9, False), (23.1, True)):
        genpic.tell_psnr(1.0, 100, usual)  # 20 dB
        assert ("far below" in capsys.readouterr().out) is told


def test_what_a_checkpoint_says_of_itself_is_shown(workplace, capsys):
    model, info = vae.load_checkpoint(TRAINED)
    vae.save_checkpoint("mine.pth", model, **info | {"about": "drawn faces\x1b[2J"})
    generate("--checkpoint", "mine.pth")
    assert "About       drawn faces\\x1b[2J\n" in capsys.readouterr().out


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
    photos = [np.asarray(vae.celeb_transforms(32)[1](vae.read_image(path))) for path in vae.find_photos("faces")]
    (workplace / "faces" / "broken.jpg").write_text("no photo")
    generate("--mode", "reconstruct", "--output", "sheet.png")
    said = capsys.readouterr().out
    sheets = (tiles("sheet.png", 8).reshape(8, 2, 8, 32, 32, 3), tiles("sheet-2.png", 6).reshape(1, 2, 6, 32, 32, 3))
    originals, reconstructions = (np.concatenate([s[:, row].reshape(-1, 32, 32, 3) for s in sheets]) for row in (0, 1))
    assert np.array_equal(originals, photos) and "faces/broken.jpg cannot be read" in said
    expected = -10 * np.log10(np.square((reconstructions - originals) / 255).mean())
    assert float(re.search(r"PSNR +(.*) dB, rec", said)[1]) == pytest.approx(expected, abs=0.02)


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


def test_the_picture_is_in_the_format_of_its_ending(workplace):
    for ending, format in (("jpg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        generate("--num-variations", "1", "--output", f"grid.{ending}")
        assert Image.open(f"grid.{ending}").format == format
    Image.open("grid.png").save("reference.jpg", quality=95)
    assert Image.open("grid.jpg").quantization == Image.open("reference.jpg").quantization


# Interpolation
def slerp(one, other, share):
    """Spherical interpolation between two vectors, as Shoemake 1985 has it."""
    angle = torch.acos(torch.dot(one / one.norm(), other / other.norm()))
    return (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def test_interpolation_is_spherical_where_the_prior_is_round():
    model = fitted_model()
    start, end = model.draw_latents(torch.randn(2, 4))
    codes = genpic.between(model, start, end)
    assert torch.equal(codes[0], start) and torch.equal(codes[-1], end) and len(codes) == 20
    round_codes = torch.linalg.solve(model.latent_scale, (codes - model.latent_mean).T).T
    expected = [slerp(round_codes[0], round_codes[-1], k / 19) for k in range(20)]
    torch.testing.assert_close(round_codes, torch.stack(expected), atol=1e-3, rtol=1e-3)


def test_interpolation_between_codes_of_one_direction_is_straight():
    model = vae.VAE(16, 1, [2], 4)
    for end in (torch.ones(4), torch.full((4,), 3.0), -torch.ones(4)):
        codes = genpic.between(model, torch.ones(4), end)
        torch.testing.assert_close(codes, torch.lerp(torch.ones(4), end, torch.linspace(0, 1, 20)[:, None]))


def test_interpolation_between_two_photos_ends_with_their_reconstructions(workplace, capsys):
    flags = ["--mode", "interpolate", "--image", "faces/face 003.jpg", "--image-to", "faces/face 007.jpg"]
    generate(*flags, "--output", "grid.png")
    said = capsys.readouterr().out
    assert "Photo       faces/face 003.jpg\n" in said and "Photo       faces/face 007.jpg\n" in said
    assert Image.open("grid.png").size == (5 * 34 + 2, 4 * 34 + 2)
    steps, ends = tiles("grid.png", 5), []
    for name in ("3", "7"):
        generate("--image", f"faces/face 00{name}.jpg", "--output", f"{name}.png", "--num-variations", "1")
        ends.append(tiles(f"{name}.png", 3)[1])
    assert np.abs(steps[0] - ends[0]).max() <= 1 and np.abs(steps[-1] - ends[1]).max() <= 1
    changes = np.abs(np.diff(steps, axis=0)).max((1, 2, 3))
    assert changes.min() > 0 and changes.max() < np.abs(ends[0] - ends[1]).max() / 3


def test_interpolation_between_two_samples_says_that_image_is_not_used(workplace, capsys):
    for name in ("one", "two"):
        generate("--mode", "interpolate", "--image", "nowhere", "--output", f"{name}.png")
        assert "Between     two samples, and IMAGE is not used" in capsys.readouterr().out
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    generate("--mode", "sample", "--output", "sample.png")
    samples, steps = tiles("sample.png", 10), tiles("one.png", 5)
    assert np.abs(steps[0] - samples[0]).max() <= 1 and np.abs(steps[-1] - samples[1]).max() <= 1


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_interpolation_is_animated_there_and_back(workplace, ending):
    flags = ["--mode", "interpolate", "--image", "faces/face 003.jpg", "--image-to", "faces/face 007.jpg"]
    generate(*flags, "--output", "grid.png")
    for name in ("one", "two"):
        generate(*flags, "--output", f"{name}.{ending}")
    assert Path(f"one.{ending}").read_bytes() == Path(f"two.{ending}").read_bytes()
    animation, steps = Image.open(f"one.{ending}"), tiles("grid.png", 5)
    assert (animation.format, animation.n_frames, animation.size) == (ending.upper(), 38, (32, 32))
    assert animation.info["loop"] == 0
    for k in range(38):
        animation.seek(k)
        frame = np.asarray(animation.convert("RGB")).astype(int)
        distances = np.abs(steps - frame).mean((1, 2, 3))
        assert animation.info["duration"] == 100 and distances.argmin() in (expected := min(k, 38 - k), expected + 1)


# Sweep and priors
def test_sweep_has_a_row_for_each_w_and_the_same_noise_down_a_column(workplace):
    generate("--mode", "sweep", "--num-variations", "3", "--output", "sweep.png")
    assert Image.open("sweep.png").size == (4 * 34 + 2, 6 * 34 + 2)
    rows = tiles("sweep.png", 4).reshape(6, 4, 32, 32, 3)
    for row, w in zip(rows, ("0", "0.01", "0.03", "0.1", "0.3", "1"), strict=True):
        generate("--w", w, "--num-variations", "3", "--output", "grid.png")
        assert np.abs(row[1:] - tiles("grid.png", 5)[2:5]).max() <= 1
    assert len({label.tobytes() for label in rows[:, 0]}) == 6
    assert all(label.min() < 100 and (label > 250).mean() > 0.5 for label in rows[:, 0])


def test_the_standard_prior_is_n_0_i(workplace):
    generate("--mode", "sample", "--prior", "standard", "--output", "faces.png")
    model, _ = vae.load_checkpoint(TRAINED)
    expected = model.decode(vae.latent_noise(0, 100, 8)).detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(tiles("faces.png", 10) - 255 * expected).max() <= 1
    generate("--mode", "sample", "--output", "fitted.png")
    assert np.abs(tiles("faces.png", 10) - tiles("fitted.png", 10)).max() > 10


@pytest.mark.parametrize("mode", ["sample", "interpolate", "sweep", "variations", "reconstruct"])
def test_grey_models_give_grey_pictures(workplace, mode):
    vae.save_checkpoint("grey.pth", vae.VAE(24, 1, [4], 3))
    np.save("faces24.npy", np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8))
    flags = ["--checkpoint", "grey.pth", "--mode", mode, "--image", "faces24.npy"]
    generate(*flags, "--output", "new folder/grey.png")
    assert Image.open("new folder/grey.png").mode == "L"


@pytest.mark.parametrize("name", ["way.jpg", "way.png", "way.webp", "way.gif", "sheet.webp"])
def test_a_picture_of_its_own_is_replaced(name, workplace):
    mode = "interpolate" if name.startswith("way") else "sample"
    generate("--mode", mode, "--output", name)
    before = Path(name).read_bytes()
    generate("--mode", mode, "--output", name, "--seed", "1")
    assert Path(name).read_bytes() != before


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
        ("--mode collage", 2, "one of variations, reconstruct, sample, interpolate, sweep"),
        ("--noise pink", 2, '"population" or "posterior"'),
        ("--w 1.5", 2, "W is 1.5"),
        ("--w -0.1", 2, "from 0 to 1"),
        ("--w nan", 2, "from 0 to 1"),
        ("--num-variations 0", 2, "at least 1"),
        ("--seed -1", 2, "at least 0"),
        ("--crop 1 2", 2, "CROP is [1, 2]: it must be left, top and size of a square"),
        ("--crop -1 0 9", 2, "CROP is [-1, 0, 9]"),
        ("--crop 1 2 0", 2, "CROP is [1, 2, 0]"),
        ("--image me.jpg --crop 9 0 40", 2, "CROP [9, 0, 40] reaches beyond me.jpg, which has 48 x 56 pixels"),
        ("--image me.jpg --crop 0 17 40", 2, "reaches beyond me.jpg"),
        ("--image faces --crop 0 0 9999", 2, "reaches beyond faces/face 001.jpg"),
        ("--device tpu", 2, "DEVICE"),
        ("--image-to me.jpg", 2, "MODE is 'variations': it must be \"interpolate\" where IMAGE_TO names a photo"),
        ("--prior uniform", 2, '"fitted" or "standard"'),
        ("--mode interpolate --image-to missing.jpg", 2, "IMAGE_TO is 'missing.jpg'"),
        ("--mode interpolate --image-to broken.jpg", 1, "broken.jpg cannot be read as an image"),
        ("--mode interpolate --image missing.jpg --image-to me.jpg", 2, "IMAGE is 'missing.jpg'"),
        ("--mode interpolate --image-to me.jpg --output me.jpg", 2, "which is one of the photos"),
        ("--mode sweep --image me.jpg --output me.jpg", 2, "which is one of the photos"),
        (
            "--mode sample --output me.jpg",
            2,
            "OUTPUT is me.jpg, which is there and has no mark of genpic.py: move it away",
        ),
        ("--image me.jpg --output broken.jpg", 2, "OUTPUT is broken.jpg, which is there and has no mark"),
        ("--output grid.gif", 2, "ends in .jpg, .jpeg, .png, .webp"),
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
    before = {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")}
    stopped, said = refusal(generate, capsys, *flags.split())
    assert stopped == code and words in said
    assert {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")} == before


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
