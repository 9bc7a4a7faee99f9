"""The model, its losses, its prior, its pictures and its files."""

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faces import draw_face
from PIL import Image
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import genpic
import train
import vae
from vae import VAE, load_checkpoint, read_image, save_checkpoint


# The model
@pytest.mark.parametrize(
    ("image_size", "channels", "hidden_dims", "latent_dim"),
    [(150, 3, [32, 64, 128, 256, 512], 128), (24, 1, [32, 64], 10), (64, 3, [8, 16, 32, 64], 16), (16, 3, [4] * 4, 1)]
    + [(33, 1, [4], 3), (511, 1, [4] * 9, 2), (512, 3, [2] * 5, 2)],
)
def test_shapes_and_range(image_size, channels, hidden_dims, latent_dim):
    model = VAE(image_size, channels, hidden_dims, latent_dim)
    images = torch.rand(2, channels, image_size, image_size)
    recon, mu, log_var = model(images)
    assert recon.shape == images.shape and mu.shape == log_var.shape == (2, latent_dim)
    assert recon.min() >= 0 and recon.max() <= 1
    samples = model.eval().sample(3)
    assert samples.shape == (3, channels, image_size, image_size) and not samples.requires_grad


def test_default_model_has_the_published_layers():
    state = VAE().state_dict()
    assert sum(parameter.numel() for parameter in VAE().parameters()) == 8_077_155
    layers = [f"encoder.{i}.{j}" for i in range(5) for j in (0, 1)] + ["fc_mu", "fc_var", "decoder_input"]
    layers += [f"decoder.{i}.{j}" for i in range(4) for j in (0, 1)] + [f"final_layer.{i}" for i in (0, 1, 3)]
    norms = [name for name in layers if name.endswith(".1")]
    expected = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    expected |= {f"{n}.{kind}" for n in norms for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(state) == expected | {"latent_mean", "latent_scale"}
    assert state["fc_mu.weight"].shape == (128, 12_800) and state["final_layer.3.weight"].shape == (3, 32, 3, 3)
    assert state["encoder.0.0.weight"].shape == (32, 3, 3, 3) and state["decoder.0.0.weight"].shape == (512, 256, 3, 3)


def test_biases_that_are_left_alone_have_no_effect_in_training():
    model, images = VAE(32, 3, [4, 8], 5), torch.rand(6, 3, 32, 32)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{name}.0.bias" for name in ("encoder.0", "encoder.1", "decoder.0")} | {"final_layer.0.bias"}
    outputs = []
    for shift in (0, 1):
        for name in frozen:
            model.get_parameter(name).data += shift
        torch.manual_seed(0)
        outputs.append(model(images)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        (15, 3, [4], 2),
        (513, 3, [4], 2),
        (32, 2, [4], 2),
        (32, 3, [4], 0),
        (32, 3, [4], 10_001),
        (32.0, 3, [4], 2),
        (32, 3, [], 2),
        (32, 3, [4, 0], 2),
    ]
    + [(16, 3, [4] * 5, 2), (150, 3, [4] * 9, 2), (512, 3, [4] * 10, 2)],
)
def test_arguments_that_make_no_model(arguments):
    with pytest.raises(ValueError, match=r"^[A-Z_]+ is .* it must be "):
        VAE(*arguments)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    orientation = Image.Exif()
    orientation[0x112] = 6  # the camera was turned
    draw_face(5, size=(1600, 1400)).save(tmp_path / "face.jpg", exif=orientation)
    whole, small = read_image(tmp_path / "face.jpg"), read_image(tmp_path / "face.jpg", 3, 32)
    assert whole.size == (1400, 1600) and small.size == (175, 200)  # an eighth would do for 43 pixels
    pixels = [vae.celeb_transforms(32)[0](image) for image in (whole, small)]
    assert (pixels[0] - pixels[1]).abs().mean() < 1 / 255
    assert read_image(tmp_path / "face.jpg", 3, 350).size == (1400, 1600)


def test_network_computes_what_published_checkpoints_of_its_names_expect():
    model, images, z = VAE(64, 3, [4, 8, 16], 5), torch.rand(3, 3, 64, 64), torch.randn(3, 5)
    for _ in range(3):
        model(torch.rand(4, 3, 64, 64))  # gives BatchNorm some statistics
    state = model.eval().state_dict()

    def stage(x, name, convolution, **options):
        x = convolution(x, state[f"{name}0.weight"], state[f"{name}0.bias"], stride=2, padding=1, **options)
        norm = [state[f"{name}1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.leaky_relu(F.batch_norm(x, *norm), 0.01)

    x = images
    for number in range(3):
        x = stage(x, f"encoder.{number}.", F.conv2d)
    x = x.flatten(1)
    codes = [F.linear(x, state[f"fc_{name}.weight"], state[f"fc_{name}.bias"]) for name in ("mu", "var")]
    torch.testing.assert_close(model.encode(images), tuple(codes))

    x = F.linear(z, state["decoder_input.weight"], state["decoder_input.bias"]).view(3, 16, 8, 8)
    for name in ("decoder.0.", "decoder.1.", "final_layer."):
        x = stage(x, name, F.conv_transpose2d, output_padding=1)
    x = torch.sigmoid(F.conv2d(x, state["final_layer.3.weight"], state["final_layer.3.bias"], padding=1))
    torch.testing.assert_close(model.decode(z), x)


def test_codes_images_and_losses_are_float32_under_autocast():
    model, x = VAE(16, 1, [4], 3), torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        recon, mu, log_var = model(x)
        assert {recon.dtype, mu.dtype, log_var.dtype, train.kl_divergence(mu, log_var).dtype} == {torch.float32}
        assert model.fc_mu(model.encoder(x).flatten(1)).dtype == torch.bfloat16


def test_reparameterize_draws_from_the_posterior():
    mu, log_var = torch.tensor([[1.0, -2.0]]).expand(200_000, 2), torch.tensor([[0.0, -2.0]]).expand(200_000, 2)
    z = VAE(16, 1, [2], 2).reparameterize(mu, log_var)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.01, rtol=0)
    torch.testing.assert_close(z.std(0), torch.exp(0.5 * log_var[0]), atol=0.01, rtol=0)


def test_extreme_log_var_never_reaches_the_decoder():
    model = VAE(16, 1, [4], 2)
    for extreme in (1e30, -1e30):
        torch.nn.init.constant_(model.fc_var.bias, extreme)
        for mode in (model.train(), model.eval()):
            recon, mu, log_var = mode(torch.rand(4, 1, 16, 16))
            figures = [recon, train.kl_divergence(mu, log_var), mode.reparameterize(mu, log_var), log_var]
            assert all(figure.isfinite().all() for figure in figures)


def test_importing_changes_nothing():
    check = (
        "import random, sys, torch, numpy; sys.argv.append('--help')\n"
        "states = lambda: (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate())\n"
        "before = states(); import vae; assert states() == before"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Transforms
def test_transforms_scale_the_short_side_and_crop_the_middle():
    photo = Image.new("RGB", (400, 300), "red")  # a green square in the middle of a red photo: only it survives
    photo.paste("lime", (50, 0, 350, 300))
    image = vae.celeb_transform(photo)
    assert image.shape == (3, 150, 150) and image.dtype == torch.float32
    assert torch.equal(image[:, :, 2:-2], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 150, 146))
    tall = vae.celeb_transform(photo.rotate(90, expand=True))
    assert torch.equal(tall[:, 2:-2], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 146, 150))


def test_transform_of_decoded_images_scales_them_without_cropping():
    ramp = torch.linspace(0, 1, 160).expand(1, 3, 160, 160)
    image = vae.celeb_transform1(ramp)
    assert image.shape == (1, 3, 150, 150)
    positions = (torch.arange(150) + 0.5) * 160 / 150 - 0.5
    torch.testing.assert_close(image[0, 0, 0, 2:-2], (positions / 159)[2:-2], atol=1e-3, rtol=0)


# Losses
def test_kl_divergence_is_that_of_torch():
    mu, log_var = torch.randn(5, 7), torch.randn(5, 7)
    normal, posterior = Normal(torch.zeros(5, 7), 1.0), Normal(mu, torch.exp(0.5 * log_var))
    expected = kl_divergence(Independent(posterior, 1), Independent(normal, 1))
    torch.testing.assert_close(train.kl_divergence(mu, log_var), expected)


def test_reconstruction_losses_are_sums_per_image():
    recon, x = torch.rand(4, 3, 8, 8) * 0.9 + 0.05, torch.rand(4, 3, 8, 8)
    squared = ((recon - x) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(train.reconstruction_loss(recon, x, "mse"), squared)
    entropy = -(x * recon.log() + (1 - x) * (1 - recon).log()).flatten(1).sum(1)
    torch.testing.assert_close(train.reconstruction_loss(recon, x, "bce"), entropy)
    sigma = ((recon - x) ** 2).mean().sqrt()
    likelihood = Independent(Normal(recon, sigma), 3).log_prob(x)
    torch.testing.assert_close(train.reconstruction_loss(recon, x, "sigma"), -likelihood)


def test_structural_similarity_is_that_of_the_paper():
    one = torch.rand(3, 2, 18, 16)
    other = torch.cat([0.3 * one[:1] + 0.2, torch.rand(2, 2, 18, 16)]).requires_grad_()  # the same pattern, but faint
    found = []
    for a, b in zip(one.flatten(0, 1).double(), other.flatten(0, 1).double(), strict=True):
        for top, left in itertools.product((0, 4, 8), (0, 4, 8)):
            x, y = (image[top : top + 8, left : left + 8].flatten() for image in (a, b))
            (xx, xy), (_, yy) = torch.cov(torch.stack([x, y]), correction=0)
            luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
            found.append(luminance * (2 * xy + 9e-4) / (xx + yy + 9e-4))
    expected = torch.stack(found).reshape(3, -1).mean(1).float()
    torch.testing.assert_close(train.structural_similarity(one, other), expected)
    torch.testing.assert_close(train.structural_similarity(one, one), torch.ones(3))
    losses = train.reconstruction_loss(other, one, "mse") + 0.01 * one[0].numel() * (1 - expected)
    found = train.reconstruction_loss(other, one, "ssim")
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), other) for loss in (found, losses)))


def test_sigma_is_the_best_weight_there_is():
    recon, x = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    best = train.reconstruction_loss(recon, x, "sigma").mean()
    sigma = ((recon - x) ** 2).mean().sqrt()
    for other in (0.9 * sigma, 1.1 * sigma):
        assert -Independent(Normal(recon, other), 3).log_prob(x).mean() > best


def test_losses_are_computed_in_float32_inside_and_outside_autocast():
    recon, x = torch.rand(2, 3, 8, 8).bfloat16(), torch.rand(2, 3, 8, 8).bfloat16()
    for kind in ("mse", "ssim", "bce", "sigma"):
        expected = train.reconstruction_loss(recon.float(), x.float(), kind)
        assert torch.equal(train.reconstruction_loss(recon, x, kind), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(train.reconstruction_loss(recon, x, kind), expected)


def test_psnr():
    assert vae.psnr(squared_error=0.01 * 300, pixels=300) == pytest.approx(20)
    assert math.isfinite(vae.psnr(0, 300))


# The fitted prior
def test_fitted_prior_is_the_gaussian_of_the_aggregate_posterior():
    model = VAE(16, 1, [2], 3)
    mixing = torch.tensor([[2.0, 0, 0], [1, 0.1, 0], [0, -1, 0.5]])
    mu, log_var = torch.randn(50_000, 3) @ mixing.T + torch.tensor([5.0, 0, -1]), torch.full((50_000, 3), -1.0)
    model.fit_prior(mu, log_var)
    draws = mu + torch.exp(0.5 * log_var) * torch.randn(50_000, 3)
    torch.testing.assert_close(model.latent_mean, draws.mean(0), atol=0.03, rtol=0)
    assert torch.equal(model.latent_scale, model.latent_scale.tril()) and model.prior_is_fitted()
    torch.testing.assert_close(model.latent_scale @ model.latent_scale.T, torch.cov(draws.T), atol=0.1, rtol=0.03)
    samples = model.draw_latents(torch.randn(50_000, 3))
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(draws.T), atol=0.1, rtol=0.03)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fitted_prior_is_positive_definite_for_few_photos(count):
    model = VAE(16, 1, [2], 8)
    model.fit_prior(torch.randn(count, 8), torch.full((count, 8), -20.0))
    assert model.latent_scale.diagonal().min() >= 1e-3 * 0.99


def test_prior_is_standard_normal_at_first():
    model = VAE(16, 1, [2], 4)
    eps = torch.randn(5, 4)
    assert torch.equal(model.draw_latents(eps), eps) and not model.prior_is_fitted()


def test_marginal_kl_is_that_of_the_fitted_prior_from_n_0_i():
    model = vae.VAE(16, 1, [2], 4)
    assert model.marginal_kl() == 0
    model.fit_prior(torch.randn(50, 4) * torch.tensor([0.1, 1, 2, 3]) + 1, torch.randn(50, 4))
    fitted = MultivariateNormal(model.latent_mean, scale_tril=model.latent_scale)
    expected = kl_divergence(fitted, MultivariateNormal(torch.zeros(4), torch.eye(4)))
    assert model.marginal_kl() == pytest.approx(expected.item(), rel=1e-4)


def test_active_units_vary_with_the_photo():
    spread = torch.tensor([0.05, 0.09, 0.11, 2.0])
    assert train.active_units(torch.randn(5000, 4) * spread + 7).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("count", "latent_dim", "channels"), [(1, 5, 3), (2, 1, 1), (30, 5, 1)])
def test_a_picture_of_the_latent_space_is_drawn_for_any_number_of_photos(tmp_path, count, latent_dim, channels):
    mu, active = torch.randn(count, latent_dim), torch.arange(latent_dim) < 3
    photos = torch.randint(0, 256, (min(count, 10), 16, 16, channels), dtype=torch.uint8)
    pytest.importorskip("matplotlib.offsetbox")  # whose own imports may warn
    with warnings.catch_warnings(action="error"):
        train.plot_latents(photos, mu, torch.zeros(count, latent_dim), active, tmp_path / "latent_space.png")
    assert Image.open(tmp_path / "latent_space.png").size == (1320, 660)


def test_latent_noise_of_a_row_depends_on_seed_and_row_alone():
    few, many = vae.latent_noise(3, 2, 5), vae.latent_noise(3, 9, 5)
    assert torch.equal(few, many[:2]) and len(many.unique()) == 45
    assert not torch.equal(few, vae.latent_noise(4, 2, 5))


# Photos
def test_modes_of_photos(tmp_path):
    grey = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (20, 1))
    expected = Image.fromarray(grey).convert("RGB")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    Image.frombytes("I;16B", grey.T.shape, (grey.astype(">u2") * 257).tobytes()).save(tmp_path / "16bit.tiff")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected.quantize(64).save(tmp_path / "palette.png")
    expected.convert("CMYK").save(tmp_path / "cmyk.tiff")
    for name in ("16bit.png", "16bit.tiff", "grey.png", "palette.png", "cmyk.tiff"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2
    assert np.array_equal(read_image(tmp_path / "16bit.png", channels=1), grey)


def test_transparent_areas_lie_over_white(tmp_path):
    photo = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    photo.putpixel((0, 0), (0, 0, 0, 0))
    photo.putpixel((1, 0), (0, 0, 0, 128))
    photo.save(tmp_path / "holes.png")
    image = read_image(tmp_path / "holes.png")
    pixels = [image.getpixel((x, 0)) for x in range(3)]
    assert pixels == [(255, 255, 255), (127, 127, 127), (255, 0, 0)]
    photo.convert("LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("grey.png", "palette.png"):
        assert read_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)


def test_images_are_found_in_all_folders_and_loops_end(tmp_path):
    for name in ("b.JPG", "a/c.png", "a/note.txt", ".hidden/d.png", "a/._c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert vae.find_photos(tmp_path) == [vae.Photo(tmp_path / "a/c.png"), vae.Photo(tmp_path / "b.JPG")]


def test_grids(tmp_path):
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 1, 10, 10)
    vae.save_grid(images, tmp_path / "new folder" / "grid.png", columns=3)
    grid = Image.open(tmp_path / "new folder" / "grid.png")
    assert grid.mode == "L" and grid.size == (3 * 12 + 2, 2 * 12 + 2)
    assert grid.getpixel((5, 5)) == 0 and grid.getpixel((17, 17)) == 255 and grid.getpixel((17, 5)) == 64
    pairs = genpic.paired(images, images + 10, columns=3)
    assert pairs[:, 0, 0, 0].tolist() == [0, 0.25, 0.5, 10, 10.25, 10.5, 0.75, 1, 1, 10.75, 11, 1]


# Checkpoints
def small_model():
    """Return a model with a fitted prior and statistics that differ from those it is born with."""
    model = VAE(24, 1, [4, 8], 5)
    model(torch.rand(8, 1, 24, 24))
    model.fit_prior(torch.randn(20, 5), torch.randn(20, 5))
    return model.eval()


def test_checkpoint_round_trip(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "model.pth", model, epoch=3, constants={"BETA": 0.5, "HIDDEN_DIMS": [4, 8]})
    loaded, info = load_checkpoint(tmp_path / "model.pth")
    assert loaded.config == model.config and not loaded.training
    assert info["epoch"] == 3 and info["constants"] == {"BETA": 0.5, "HIDDEN_DIMS": [4, 8]}
    assert info["versions"]["torch"] == torch.__version__
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_checkpoint_in_half_precision(tmp_path):
    model, images = small_model(), torch.rand(3, 1, 24, 24)
    save_checkpoint(tmp_path / "whole.pth", model, epoch=3)
    save_checkpoint(tmp_path / "half.pth", model, half=True, epoch=3)
    loaded, info = load_checkpoint(tmp_path / "half.pth")
    learnt = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        expected = tensor.half() if name in learnt else tensor
        assert torch.equal(loaded.state_dict()[name], expected.to(tensor.dtype)), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert info["epoch"] == 3 and all(weight.dtype == torch.float32 for weight in learnt.values())
    saved = 2 * sum(weight.numel() for weight in learnt.values())
    assert (tmp_path / "whole.pth").stat().st_size - (tmp_path / "half.pth").stat().st_size > 0.8 * saved
    assert (loaded.decode(loaded.encode(images)[0]) - model.decode(model.encode(images)[0])).abs().max() < 0.005
    with torch.no_grad():
        model.fc_mu.bias[0] = 1e6  # more than 16 bits hold
    with pytest.raises(vae.UserError, match=r"fc_mu\.bias is no longer finite"):
        save_checkpoint(tmp_path / "half.pth", model, half=True)


def test_a_model_saved_whole_loads(tmp_path):
    model = VAE(30, 1, [4, 8], 5)
    torch.save(model, tmp_path / "whole.pth")
    loaded, info = load_checkpoint(tmp_path / "whole.pth")
    assert (
        info == {}
        and loaded.config == model.config
        and all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    )


def test_bare_state_dict_loads_with_a_standard_prior(tmp_path):
    state = {name: tensor for name, tensor in VAE().state_dict().items() if not name.startswith("latent_")}
    torch.save(state, tmp_path / "published.pth")
    model, info = load_checkpoint(tmp_path / "published.pth")
    assert model.config == VAE().config and info == {} and not model.prior_is_fitted() and not model.training
    assert torch.equal(model.fc_mu.weight, state["fc_mu.weight"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), vae.atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
