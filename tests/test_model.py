"""Tests of the model and the transforms in vae.py."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vae
from vae import VAE


@pytest.mark.parametrize("size", [(150, 3, [4] * 5, 12), (24, 1, [8, 16], 10), (16, 3, [4] * 4, 1), (33, 1, [4], 3)])
def test_a_model_of_any_size_returns_images_of_that_size_in_0_to_1(size):
    image_size, channels, _, latent_dim = size
    model = VAE(*size)
    images = torch.rand(2, channels, image_size, image_size)
    recon, mu, log_var = model(images)
    assert recon.shape == images.shape == model.sample(2).shape
    assert mu.shape == log_var.shape == (2, latent_dim)
    assert 0 <= recon.min() <= recon.max() <= 1


def test_the_network_matches_published_checkpoints():
    model = VAE(60, 3, [4, 8, 16], 5)
    model(torch.rand(4, 3, 60, 60))  # gives BatchNorm some statistics
    state = model.eval().state_dict()

    def stage(x, name, convolution, **options):
        x = convolution(x, state[f"{name}0.weight"], state[f"{name}0.bias"], stride=2, padding=1, **options)
        norm = [state[f"{name}1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.leaky_relu(F.batch_norm(x, *norm), 0.01)

    images = x = torch.rand(3, 3, 60, 60)
    for number in range(3):
        x = stage(x, f"encoder.{number}.", F.conv2d)
    codes = [F.linear(x.flatten(1), state[f"fc_{name}.weight"], state[f"fc_{name}.bias"]) for name in ("mu", "var")]
    torch.testing.assert_close(model.encode(images), tuple(codes))

    z = torch.randn(3, 5)
    x = F.linear(z, state["decoder_input.weight"], state["decoder_input.bias"]).view(3, 16, 8, 8)
    for name in ("decoder.0.", "decoder.1.", "final_layer."):
        x = stage(x, name, F.conv_transpose2d, output_padding=1)
    x = torch.sigmoid(F.conv2d(x, state["final_layer.3.weight"], state["final_layer.3.bias"], padding=1))
    torch.testing.assert_close(model.decode(z), vae.square_transform(60)(x))


@pytest.mark.parametrize("extreme", [1e30, -1e30])
def test_an_extreme_log_var_never_reaches_the_decoder(extreme):
    model = VAE(16, 1, [4], 2)
    torch.nn.init.constant_(model.fc_var.bias, extreme)
    recon, _, log_var = model(torch.rand(4, 1, 16, 16))
    assert all(values.isfinite().all() for values in (recon, log_var, log_var.exp(), 1 / log_var.exp()))


@pytest.mark.parametrize("turned", [False, True])
def test_celeb_transform_scales_the_short_side_and_crops_the_middle(turned):
    photo = Image.new("RGB", (400, 300), "red")  # a green square in the middle of a red photo: only the green remains
    photo.paste("lime", (50, 0, 350, 300))
    image = vae.celeb_transform(photo.rotate(90, expand=True) if turned else photo)
    assert image.shape == (3, 150, 150) and torch.equal(vae.celeb_transform1(image), image)
    assert torch.equal(image[:, 2:-2, 2:-2], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 146, 146))
