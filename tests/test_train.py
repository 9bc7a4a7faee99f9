"""Tests of training: losses, schedules, optimizers, steps, metrics and the files that a run writes."""

import copy
import csv
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TRAINED, refusal, run, same_weights
from faces import draw_faces
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import train
import vae

BLANK_RUN = train.Run(*[None] * 5, torch.device("cpu"), *[None] * 4)


def finished_run(path):
    """Return a Run in the current folder with the model and the settings of a checkpoint, in float32."""
    model, info = vae.load_checkpoint(path)
    vars(train).update(info["constants"] | {"DATA": "faces", "AMP": False})
    return replace(train.new_run({}, torch.device("cpu")), average=model)


def test_kl_divergence_matches_torch():
    mu, log_var = torch.randn(2, 5, 7)
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * log_var)), Normal(torch.zeros(5, 7), 1.0))
    torch.testing.assert_close(train.kl_divergence(mu, log_var), expected)


def test_squared_error_and_cross_entropy_are_sums_over_each_image():
    recon, x = torch.rand(2, 4, 3, 8, 8) * 0.9 + 0.05
    squared = ((recon - x) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(train.reconstruction_loss(recon, x, "mse"), squared)
    entropy = -(x * recon.log() + (1 - x) * (1 - recon).log()).flatten(1).sum(1)
    torch.testing.assert_close(train.reconstruction_loss(recon, x, "bce"), entropy)
    assert train.reconstruction_loss(recon.round(), 1 - recon.round(), "bce").isfinite().all()


def test_structural_similarity_and_its_gradient_match_the_paper():
    one = torch.rand(3, 2, 18, 18)
    other = torch.cat(
        [0.3 * one[:1] + 0.2, torch.rand(2, 2, 18, 18)]
    ).requires_grad_()  # the first differs only in contrast and brightness
    x, y = (images.double().unfold(2, 8, 4).unfold(3, 8, 4).flatten(4) for images in (one, other))
    mx, my = x.mean(-1), y.mean(-1)
    variances = x.var(-1, correction=0) + y.var(-1, correction=0)
    structure = (2 * ((x * y).mean(-1) - mx * my) + 9e-4) / (variances + 9e-4)
    similarity = structure * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
    expected = train.reconstruction_loss(other, one, "mse") + 6.48 * (1 - similarity.mean((1, 2, 3)).float())
    found = train.reconstruction_loss(other, one, "ssim")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), other) for loss in (found, expected)))


def test_schedules_rise_to_their_constants_and_the_learning_rate_falls_to_zero():
    shares = [train.one_cycle(progress) for progress in (0, 0.01, 0.02, 0.51, 1)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])
    vars(train).update(EPOCHS=10, KL_WARMUP_EPOCHS=4.0)
    assert [train.kl_weight(epoch / 10) for epoch in (0, 2, 4, 10)] == pytest.approx([0, 0.066, 0.132, 0.132])


@pytest.mark.parametrize("shape", [(24, 24), (16, 200), (1, 9)])
def test_orthogonalize_maps_singular_values_by_four_polynomials(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1, 0.003, min(shape))
    expected = values / values.pow(4).sum() ** 0.25
    for _ in range(4):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    matrix = left * values @ right
    expected = left * expected @ right
    scales = torch.tensor([1e-6, 1, 1e6])[:, None, None]
    torch.testing.assert_close(train.orthogonalize(scales * matrix), expected.expand(3, *shape), atol=1e-3, rtol=0)
    rounded = train.orthogonalize(matrix.bfloat16()[None])[0].float()
    assert (rounded - expected).norm() < 0.1 * expected.norm()
    for exponent in range(-40, 9):  # including vanishing gradients
        assert torch.linalg.matrix_norm(train.orthogonalize(matrix[None] * 10.0**exponent), 2) < 1.3


def test_muon_matches_torch():
    newton_schulz = torch.optim._muon._zeropower_via_newtonschulz
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4, 3, 3), (40, 8), (8, 40))]
    theirs = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in copy.deepcopy(ours)]
    settings = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.3}
    muon = train.Muon([{"params": ours, "scales": [1, 5**0.5, 1]}], settings)
    muon.orthogonalize = lambda batch: [newton_schulz(matrix, (3.4445, -4.7750, 2.0315), 5, 0.0) for matrix in batch]
    optimizers = muon, torch.optim.Muon(theirs, **settings)
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.flatten(1), other, atol=5e-3, rtol=0)  # theirs rounds to bfloat16


def test_the_scales_of_muon_are_the_square_roots_of_outputs_per_input():
    model = vae.VAE(16, 1, [4, 8], 3)
    (group,) = train.optimizers_of(model, 0.03)[0].param_groups
    scales = dict(zip(group["params"], group["scales"], strict=True))
    assert scales[model.encoder[1][0].weight] == 1  # from 9 * 4 inputs to 8 outputs
    assert scales[model.decoder[0][0].weight] == pytest.approx(4.5**0.5)  # from 8 inputs to 9 * 4 outputs
    assert scales[model.fc_mu.weight] == 1
    assert scales[model.decoder_input.weight] == pytest.approx((128 / 3) ** 0.5)


def test_augment_applies_a_different_affine_map_to_each_photo():
    torch.manual_seed(0)
    vars(train).update(FLIP=False, AUGMENT=0.1)
    x, y = torch.meshgrid(*(2 * [torch.linspace(-31, 31, 32) / 32]), indexing="xy")
    ramps = 0.5 + 0.3 * torch.stack([x, y])  # images whose values encode their coordinates
    moved = (train.augment(ramps.expand(200, -1, -1, -1)) - 0.5) / 0.3
    inner = slice(8, 24)  # pixels that do not come from beyond the edges
    places = torch.stack([x, y, torch.ones(32, 32)])[:, inner, inner].flatten(1)
    maps = moved[:, :, inner, inner].flatten(2) @ torch.linalg.pinv(places)
    torch.testing.assert_close(maps @ places, moved[:, :, inner, inner].flatten(2), atol=0.01, rtol=0)
    change = maps - torch.eye(2, 3)
    assert change.abs().max() < 0.103
    assert change.amax(0).min() > 0.09 and change.amin(0).max() < -0.09
    black_and_white = train.augment(torch.rand(9, 1, 16, 16).round())
    assert black_and_white.min() == 0 and black_and_white.max() == 1
    torch.testing.assert_close(train.augment(torch.ones(9, 1, 16, 16)), torch.ones(9, 1, 16, 16))


@pytest.mark.parametrize("count, fraction, ranks, held_out", [(1000, 0.05, 1, 50), (3, 0.0, 1, 1), (7, 0.9, 3, 1)])
def test_the_split_is_disjoint_and_depends_on_the_seed(count, fraction, ranks, held_out):
    vars(train).update(VAL_FRACTION=fraction, world_size=ranks)
    train_set, val_set = train.split_photos(count)
    assert len(val_set) == held_out
    assert sorted([*train_set.tolist(), *val_set.tolist()]) == list(range(count))
    vars(train).update(SEED=1)
    assert not torch.equal(train.split_photos(count)[0], train_set)


def test_two_photos_are_too_few(workplace):
    draw_faces(Path("few"), 2)
    assert "Training needs at least 3 usable photos but has only 2." in refusal(run, "--data", "few")


@pytest.mark.parametrize(("kind", "flip", "share"), [("mse", True, 0.0), ("ssim", True, 0.0), ("bce", False, 0.1)])
def test_a_step_matches_the_formulas(kind, flip, share):
    vars(train).update(RECONSTRUCTION=kind, FLIP=flip, EPOCHS=10, KL_WARMUP_EPOCHS=5.0, AMP=False, AUGMENT=share)
    model = vae.VAE(16, 1, [4], 3)
    other = copy.deepcopy(model)
    images = torch.rand(6, 1, 16, 16)
    sgd = [torch.optim.SGD([{"params": model.parameters(), "initial_lr": 1e-3}], lr=123.0)]
    sums = train.train_step(model, sgd, images, global_step=77, progress=0.25)
    torch.manual_seed(train.seed_of(b"step", 77, 0))
    if flip:
        images = torch.where(torch.rand(6, 1, 1, 1) < 0.5, images.flip(3), images)
    if share:
        images = train.augment(images)
    mu, log_var = other.encode(images)
    recon = other.decode(mu + torch.exp(log_var / 2) * torch.randn_like(mu))
    reconstruction = train.reconstruction_loss(recon, images, kind)
    kl = train.kl_divergence(mu, log_var).sum(1)
    loss = reconstruction + 0.5 * 0.132 * kl
    loss.mean().backward()
    torch.testing.assert_close(sums, torch.stack([loss.sum(), reconstruction.sum(), kl.sum()]))
    torch.optim.SGD(other.parameters(), lr=1e-3 * train.one_cycle(0.25)).step()
    torch.testing.assert_close([*model.parameters()], [*other.parameters()])


def test_the_weight_average_lags_by_an_eleventh_of_the_steps_and_later_by_49():
    mean, value = torch.zeros(2, 1)
    lags = []
    for step in range(1000):
        value.fill_(step)
        train.update_average([mean], [value], step)
        lags.append(step - mean.item())
    assert [lags[step] for step in (0, 110, 999)] == pytest.approx([0, 10, 49], abs=0.1)


SHAPES = [(21, 8, 1, (3, 8)), (5, 8, 1, (1, 8)), (57, 32, 1, (5, 12)), (90, 32, 3, (5, 18)), (19, 32, 1, (2, 12))]


@pytest.mark.parametrize("count, size, ranks, shape", SHAPES)
def test_each_epoch_shuffles_all_photos_into_batches_of_equal_size(count, size, ranks, shape):
    vars(train).update(BATCH_SIZE=size, world_size=ranks)
    train_set = torch.arange(100, 100 + count)
    first, second = [train.batches_of(train_set, epoch) for epoch in (0, 1)]
    assert first.shape == second.shape == shape and not torch.equal(first, second)
    for batches in (first.flatten(), second.flatten()):
        assert sorted(batches[:count].tolist()) == train_set.tolist()
        assert torch.equal(batches[count:], batches[: len(batches) - count])  # filled up from the start


class CountOperations(TorchDispatchMode):
    """Count the operations that would be GPU launches: all except views and allocations."""

    free = "detach view permute t expand _unsafe_view transpose unsqueeze diagonal select split unbind alias".split()
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind, name, _ = str(function).split(".")
        self.count += kind == "aten" and name not in self.free and "empty" not in name
        return function(*args, **(kwargs or {}))


def step_on(device):
    """Return a default model on a device, and a function that runs a step on two images, as train_epoch does."""
    with torch.device(device):
        model = vae.VAE()
        images = torch.rand(2, 3, 150, 150)
    for weight in model.parameters():
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weight.data = weight.data.contiguous(memory_format=layout)
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    means = [value.clone() for value in values]
    optimizers = train.optimizers_of(model, 0.03)

    def step():
        sums = train.train_step(model, optimizers, images, 7, 0.5)
        train.update_average(means, values, 7)
        return sums

    return model, step


def test_a_step_dispatches_few_operations(monkeypatch):
    monkeypatch.setattr(train, "precision", lambda device: torch.bfloat16)
    with FakeTensorMode():
        _, step = step_on("cpu")
        step()
        with CountOperations() as operations:
            step()
    print(f"\nCount: {operations.count} operations in a step, in bfloat16")
    assert 300 < operations.count <= 400


def test_all_tensors_of_a_step_are_on_the_gpu(monkeypatch):
    monkeypatch.setattr(train, "AMP", False)
    with FakeTensorMode():
        model, step = step_on("cuda")
        for parameter in model.parameters():  # autograd's engine would need a GPU
            parameter.grad = torch.zeros_like(parameter)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
        monkeypatch.setattr(model, "zero_grad", lambda: None)
        assert step().device.type == "cuda"


def test_golden_run(workplace):
    """Check the losses of a short run: another loss term, schedule, photo order or flip shifts them by over 0.1%."""
    recipe = "--reconstruction=ssim --kl-warmup-epochs=2 --beta=0.5 --learning-rate=0.03 --no-amp".split()
    run("--epochs", "3", "--output-dir", "golden", *recipe)
    with open("golden/history.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [[float(row[name]) for name in ("train_reconstruction", "train_kl", "val_reconstruction")] for row in rows]
    expected = [[262.181, 4.05830, 161.410], [242.403, 5.45596, 172.726], [228.541, 7.27533, 179.623]]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mse", "ssim", "bce"])
def test_an_all_white_picture_has_a_finite_loss(kind):
    white = torch.ones(2, 3, 150, 150)
    recon = vae.square_transform(150)(torch.ones(2, 3, 160, 160)).requires_grad_()
    loss = train.reconstruction_loss(recon, white, kind)
    loss.sum().backward()
    assert loss.isfinite().all() and loss.max() < 0.1 and recon.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "ssim", "bce"])
def test_an_exploding_loss_ends_the_run_with_a_one_line_error(workplace, kind):
    before = Path(TRAINED).read_bytes()
    said = refusal(run, "--epochs", "8", "--learning-rate", "1e12", "--reconstruction", kind)
    assert "The loss at step 5 of epoch 1 is not finite: lower LEARNING_RATE" in said
    assert Path(TRAINED).read_bytes() == before


def test_a_missing_compiler_does_not_stop_the_run(workplace):
    flags = ["--data", "faces", *SMALL, "--epochs", "1", "--output-dir"]
    train.main([*flags, "uncompiled"])
    nowhere = {**os.environ, "PATH": "", "CXX": "missing", "TORCHINDUCTOR_CACHE_DIR": str(workplace / "none")}
    command = [sys.executable, ROOT / "train.py", *flags, "compiled", "--compile=yes"]
    done = subprocess.run(command, env=nowhere, check=True, capture_output=True, text=True)
    assert done.stdout.count("Warning     The model cannot be compiled") == done.stdout.count(", not compiled, ") == 1
    assert done.stderr == "" and same_weights("compiled/vae_model_1.pth", "uncompiled/vae_model_1.pth")


@pytest.mark.parametrize("kind", ["mse", "ssim", "bce"])
@pytest.mark.parametrize("size", [11, 4, 5])
def test_validation_figures_do_not_depend_on_batches(kind, size):
    vars(train).update(RECONSTRUCTION=kind, AMP=False, BATCH_SIZE=size)
    pixels = torch.randint(0, 256, (11, 16, 16, 1), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2) / 255
    new = replace(BLANK_RUN, average=vae.VAE(16, 1, [4], 3).eval(), pixels=pixels, val_set=torch.arange(11))
    figures, *_ = train.validate(new)
    mu, log_var = new.average.encode(images)
    recon = new.average.decode(mu)
    loss = train.reconstruction_loss(recon, images, kind) + 0.132 * train.kl_divergence(mu, log_var).sum(1)
    assert figures["val_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert figures["val_psnr"] == pytest.approx(-10 * ((recon - images) ** 2).mean().log10().item(), abs=1e-4)


def test_files_of_a_run(trained):
    pictures = {f"epoch_0{n}_{kind}.png" for n in range(1, 9) for kind in ("reconstructions", "samples")}
    others = set("vae_model_8.pth last.pth history.csv loss_curves.png latent_space.png .lock".split())
    assert {path.name for path in (trained / "checkpoints_best").rglob("*.*")} == pictures | others


def test_the_checkpoint_contains_the_best_epoch_and_its_settings(workplace):
    run("--epochs", "3", "--reconstruction", "ssim", "--no-amp", "--output-dir", "out")
    rows = np.genfromtxt("out/history.csv", delimiter=",", names=True)
    best = rows[rows["val_loss"].argmin()]
    assert best["epoch"] < 3
    _, info = vae.load_checkpoint("out/vae_model_3.pth")
    assert [info[name] for name in rows.dtype.names] == list(best)
    assert info["constants"]["LEARNING_RATE"] == 0.1
    assert not {"DATA", "OUTPUT_DIR"} & info["constants"].keys()  # the file may be published
    new = finished_run("out/vae_model_3.pth")
    figures, *_ = train.validate(new)
    assert figures["val_loss"] == pytest.approx(best["val_loss"], rel=1e-4)


def test_the_prior_is_fitted_to_the_codes_of_the_training_photos(workplace):
    run("--epochs", "2", "--no-amp", "--output-dir", "out")
    new = finished_run("out/vae_model_2.pth")
    mu, log_var = new.average.encode(new.pixels[new.train_set].permute(0, 3, 1, 2) / 255)
    covariance = torch.cov(mu.T, correction=0) + torch.diag(log_var.exp().mean(0))
    torch.testing.assert_close(new.average.latent_mean, mu.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(new.average.latent_scale @ new.average.latent_scale.T, covariance, atol=1e-3, rtol=1e-3)


def test_pictures_of_an_epoch_show_photos_above_reconstructions_and_samples(workplace):
    new = finished_run("checkpoints_best/last.pth")
    photos = new.pixels[new.val_set].permute(0, 3, 1, 2) / 255
    reconstructions = new.average.decode(new.average.encode(photos)[0])
    vae.save_grid(torch.cat([photos, reconstructions]), "reconstructions.png", columns=2)
    vae.save_grid(
        new.average.decode(new.average.draw_latents(vae.latent_noise(new.average, 32, 0))), "samples.png", columns=8
    )
    for kind in ("reconstructions", "samples"):
        found = np.asarray(Image.open(f"checkpoints_best/progress/epoch_08_{kind}.png"))
        assert np.abs(found.astype(int) - np.asarray(Image.open(f"{kind}.png"))).max() < 10  # computed in bfloat16


@pytest.mark.parametrize(("count", "flags"), [(3, []), (9, ["--latent-dim", "1"]), (9, ["--channels", "1"])])
def test_the_latent_space_is_plotted_for_any_run(workplace, count, flags):
    draw_faces(Path("few"), count)
    run("--data", "few", "--epochs", "1", *flags)
    assert Image.open("checkpoints_best/latent_space.png").size == (1320, 660)


@pytest.mark.parametrize(("beta", "collapses"), [("1e4", True), ("0", False)])
def test_a_collapsed_posterior_is_reported(workplace, capsys, beta, collapses):
    run("--epochs", "6", "--beta", beta)
    said = capsys.readouterr().out
    last = re.findall(r"Epoch  6/6.*", said)[0]
    assert ("COLLAPSED: all reconstructions look alike; train longer" in last) == collapses


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no cp")
def test_earlier_files_are_backed_up_and_undo_restores_the_checkpoint(workplace, capsys):
    out = Path("a run's folder")
    run("--epochs", "1", "--output-dir", str(out))
    assert "Undo" not in capsys.readouterr().out
    for number in (1, 2):
        before = {path.name: path.read_bytes() for path in out.glob("[!.]*.*")}
        run("--epochs", "1", "--output-dir", str(out), "--seed", str(number))
        kept = out / f"previous-{number}"
        assert {path.name: path.read_bytes() for path in kept.glob("*.*")} == before
        assert len(list(kept.glob("progress/*"))) == len(list(out.glob("progress/*"))) == 2
        assert (out / "vae_model_1.pth").read_bytes() != before["vae_model_1.pth"]
        command = re.search(rf"Undo .*: (cp .*/previous-{number}/.*)", capsys.readouterr().out)[1]
        subprocess.run(shlex.split(command), check=True)
        assert (out / "vae_model_1.pth").read_bytes() == before["vae_model_1.pth"]
