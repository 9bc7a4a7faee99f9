"""The model, its prior and the transforms: what vae.py is as a module that others import."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import vae
from vae import VAE


@pytest.mark.parametrize("size", [(150, 3, [4] * 5, 12), (24, 1, [8, 16], 10), (16, 3, [4] * 4, 1), (33, 1, [4], 3)])
def test_a_model_of_any_size_gives_images_of_its_size_in_0_to_1(size):
    image_size, channels, _, latent_dim = size
    model = VAE(*size)
    images = torch.rand(2, channels, image_size, image_size)
    recon, mu, log_var = model(images)
    assert recon.shape == images.shape == model.sample(2).shape
    assert mu.shape == log_var.shape == (2, latent_dim)
    assert 0 <= recon.min() <= recon.max() <= 1


def test_the_default_model_has_the_published_layers():
    state = VAE().state_dict()
    layers = [f"encoder.{i}.{j}" for i in range(5) for j in (0, 1)] + ["fc_mu", "fc_var", "decoder_input"]
    layers += [f"decoder.{i}.{j}" for i in range(4) for j in (0, 1)] + [f"final_layer.{i}" for i in (0, 1, 3)]
    expected = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected |= {f"{name}.{kind}" for name in layers if name.endswith(".1") for kind in statistics}
    assert set(state) == expected | {"latent_mean", "latent_scale"}
    assert sum(parameter.numel() for parameter in VAE().parameters()) == 8_077_155


def test_the_network_computes_what_published_checkpoints_of_its_names_expect():
    model = VAE(64, 3, [4, 8, 16], 5)
    model(torch.rand(4, 3, 64, 64))  # gives BatchNorm some statistics
    state = model.eval().state_dict()

    def stage(x, name, convolution, **options):
        x = convolution(x, state[f"{name}0.weight"], state[f"{name}0.bias"], stride=2, padding=1, **options)
        norm = [state[f"{name}1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.leaky_relu(F.batch_norm(x, *norm), 0.01)

    images = x = torch.rand(3, 3, 64, 64)
    for number in range(3):
        x = stage(x, f"encoder.{number}.", F.conv2d)
    codes = [F.linear(x.flatten(1), state[f"fc_{name}.weight"], state[f"fc_{name}.bias"]) for name in ("mu", "var")]
    torch.testing.assert_close(model.encode(images), tuple(codes))

    z = torch.randn(3, 5)
    x = F.linear(z, state["decoder_input.weight"], state["decoder_input.bias"]).view(3, 16, 8, 8)
    for name in ("decoder.0.", "decoder.1.", "final_layer."):
        x = stage(x, name, F.conv_transpose2d, output_padding=1)
    x = torch.sigmoid(F.conv2d(x, state["final_layer.3.weight"], state["final_layer.3.bias"], padding=1))
    torch.testing.assert_close(model.decode(z), x)


@pytest.mark.parametrize("extreme", [1e30, -1e30])
def test_an_extreme_log_var_never_reaches_the_decoder(extreme):
    model = VAE(16, 1, [4], 2)
    torch.nn.init.constant_(model.fc_var.bias, extreme)
    recon, _, log_var = model(torch.rand(4, 1, 16, 16))
    assert all(values.isfinite().all() for values in (recon, log_var, log_var.exp(), 1 / log_var.exp()))


def test_the_prior_is_standard_normal_until_it_is_fitted_to_the_aggregate_posterior():
    model = VAE(16, 1, [2], 3)
    eps = torch.randn(50_000, 3)
    assert torch.equal(model.draw_latents(eps), eps)
    mu = torch.randn(50_000, 3) @ torch.tensor([[2.0, 1, 0], [0, 0.1, -1], [0, 0, 0.5]]) + torch.tensor([5.0, 0, -1])
    log_var = torch.tensor([-1.0, 0, 1]).expand(50_000, 3)
    model.fit_prior(mu, log_var)
    draws = model.reparameterize(mu, log_var)
    samples = model.draw_latents(eps)
    torch.testing.assert_close(samples.mean(0), draws.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(draws.T), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_prior_is_fitted_to_fewer_photos_than_latents(count):
    model = VAE(16, 1, [2], 8)
    model.fit_prior(torch.randn(count, 8), torch.full((count, 8), -20.0))
    assert model.latent_scale.diagonal().min() > 0.9e-3


def test_latent_noise_of_a_row_depends_on_seed_and_row_alone():
    many = vae.latent_noise(3, 9, 5)
    assert torch.equal(vae.latent_noise(3, 2, 5), many[:2])
    assert not torch.equal(vae.latent_noise(4, 2, 5), many[:2])
    assert len(many.unique()) == 45


@pytest.mark.parametrize("turned", [False, True])
def test_celeb_transform_scales_the_short_side_and_crops_the_middle(turned):
    photo = Image.new("RGB", (400, 300), "red")  # a green square in the middle of a red photo: only it survives
    photo.paste("lime", (50, 0, 350, 300))
    image = vae.celeb_transform(photo.rotate(90, expand=True) if turned else photo)
    assert image.shape == (3, 150, 150)
    assert torch.equal(image[:, 2:-2, 2:-2], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 146, 146))


def test_celeb_transform1_scales_decoded_images_without_cropping():
    image = vae.celeb_transform1(torch.linspace(0, 1, 160).expand(1, 3, 160, 160))
    assert image.shape == (1, 3, 150, 150)
    places = (torch.arange(150) + 0.5) * 160 / 150 - 0.5
    torch.testing.assert_close(image[0, 0, 0, 2:-2], (places / 159)[2:-2], atol=1e-3, rtol=0)


def test_psnr_is_in_decibels_and_finite():
    assert [vae.psnr(error, count=300) for error in (3, 0)] == pytest.approx([20, 120])


def test_importing_vae_has_no_effect():
    check = (
        "import random, sys, torch, numpy; sys.argv.append('--help')\n"
        "states = lambda: (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate())\n"
        "before = states(); import vae; assert states() == before"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
