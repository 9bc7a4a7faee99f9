"""Training: losses, schedules, photos and their cache, steps, figures, and the files that a run leaves behind."""

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
from torch.distributions import Normal, kl_divergence

import train
import vae
from data import cache
from data.photos import find_photos


def finished_run(path):
    """Return a Run in the current folder with the model and the settings of a checkpoint, in float32."""
    model, info = vae.load_checkpoint(path)
    vars(train).update(info["constants"] | {"DATA": "faces", "AMP": False})
    return replace(train.new_run({}, torch.device("cpu")), average=model)


def test_kl_divergence_is_that_of_torch():
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


def test_structural_similarity_and_its_gradient_are_those_of_the_paper():
    one = torch.rand(3, 2, 18, 18)
    other = torch.cat([0.3 * one[:1] + 0.2, torch.rand(2, 2, 18, 18)]).requires_grad_()  # the first is only fainter
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


@pytest.mark.parametrize("shape", [(24, 24), (16, 200), (200, 16), (1, 9)])
def test_orthogonalize_maps_singular_values_by_four_polynomials(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1, 0.003, min(shape))
    expected = values / values.pow(4).sum() ** 0.25
    for _ in range(4):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    matrix = left * values @ right
    expected = left * expected @ right
    for scale in (1e-6, 1, 1e6):
        torch.testing.assert_close(train.orthogonalize(scale * matrix), expected, atol=1e-3, rtol=0)
    rounded = train.orthogonalize(matrix.bfloat16()).float()
    assert (rounded - expected).norm() < 0.1 * expected.norm()
    for exponent in range(-40, 9):  # no less than a gradient that vanishes
        assert torch.linalg.matrix_norm(train.orthogonalize(matrix * 10.0**exponent), 2) < 1.3


def test_muon_is_that_of_torch(monkeypatch):
    newton_schulz = torch.optim._muon._zeropower_via_newtonschulz
    monkeypatch.setattr(train, "orthogonalize", lambda matrix: newton_schulz(matrix, (3.4445, -4.7750, 2.0315), 5, 0.0))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4, 3, 3), (40, 8), (8, 40))]
    theirs = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in copy.deepcopy(ours)]
    settings = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.3}
    optimizers = train.Muon(ours, settings), torch.optim.Muon(theirs, **settings)
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.flatten(1), other)


def test_augment_moves_each_photo_by_an_affine_map_of_its_own():
    torch.manual_seed(0)
    vars(train).update(FLIP=False, AUGMENT=0.1)
    x, y = torch.meshgrid(*(2 * [torch.linspace(-31, 31, 32) / 32]), indexing="xy")
    ramps = 0.5 + 0.3 * torch.stack([x, y])  # images whose values tell where they come from
    moved = (train.augment(ramps.expand(200, -1, -1, -1)) - 0.5) / 0.3
    inner = slice(8, 24)  # what has not come from beyond the edges
    places = torch.stack([x, y, torch.ones(32, 32)])[:, inner, inner].flatten(1)
    maps = moved[:, :, inner, inner].flatten(2) @ torch.linalg.pinv(places)
    torch.testing.assert_close(maps @ places, moved[:, :, inner, inner].flatten(2), atol=0.01, rtol=0)
    change = maps - torch.eye(2, 3)
    assert change.abs().max() < 0.103
    assert change.amax(0).min() > 0.09 and change.amin(0).max() < -0.09
    black_and_white = train.augment(torch.rand(9, 1, 16, 16).round())
    assert black_and_white.min() == 0 and black_and_white.max() == 1
    torch.testing.assert_close(train.augment(torch.ones(9, 1, 16, 16)), torch.ones(9, 1, 16, 16))


def test_photos_are_decoded_once(workplace):
    first, *others = sorted(draw_faces(Path("few"), 6).iterdir())
    expected = [vae.photo_transform(32)(Image.open(path)).permute(1, 2, 0) for path in (first, *others)]
    vars(train).update(DATA="few", IMAGE_SIZE=32)
    photos = train.load_pixels(torch.device("cpu"))
    torch.testing.assert_close(photos / 255, torch.stack(expected), rtol=0, atol=0.01)
    before = first.stat()
    first.write_bytes(bytes(before.st_size))  # nobody looks into it again
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(train.load_pixels(torch.device("cpu")), photos)


def test_the_cache_follows_names_sizes_times_and_cut_but_not_the_place(tmp_path, monkeypatch):
    cut = {"channels": 3, "size": 32, "crop": "center", "face_box": None}
    folder = draw_faces(tmp_path / "faces", 3)
    changes = [
        lambda: os.utime(folder / "face 000.jpg", (1, 1)),
        lambda: os.truncate(folder / "face 001.jpg", 9),
        lambda: (folder / "face 002.jpg").rename(folder / "renamed.jpg"),
        lambda: cut.update(size=16),
        lambda: cut.update(crop="face"),
        lambda: monkeypatch.setattr(cache, "DECODING", 0),
    ]
    paths = {cache.cache_path(find_photos(folder), folder, cut)}
    for change in changes:
        change()
        paths.add(cache.cache_path(find_photos(folder), folder, cut))
    assert len(paths) == 7
    moved = folder.rename(tmp_path / "moved")
    assert cache.cache_path(find_photos(moved), moved, cut) in paths


@pytest.mark.parametrize("count", [200, 600])  # of more than 256, in worker processes
def test_every_photo_of_a_large_folder_is_there_in_order(workplace, monkeypatch, capsys, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    vars(train).update(DATA="many", IMAGE_SIZE=16)
    Path("many").mkdir()
    broken = [0, 7, 100, 101, count - 1]
    for number in range(count):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(f"many/{number:03d}.png")
    for number in broken:
        Path(f"many/{number:03d}.png").write_bytes(b"")
    photos = train.load_pixels(torch.device("cpu")).long()
    assert [int(n) for n in re.findall(r"Skipped     many/(\d+)\.png", capsys.readouterr().out)] == broken
    assert (photos[:, 3, 5, 0] + 256 * photos[:, 3, 5, 1]).tolist() == sorted({*range(count)} - {*broken})


@pytest.mark.parametrize("count, fraction, ranks, held_out", [(1000, 0.05, 1, 50), (3, 0.0, 1, 1), (7, 0.9, 3, 1)])
def test_the_split_is_disjoint_and_drawn_by_the_seed(count, fraction, ranks, held_out):
    vars(train).update(VAL_FRACTION=fraction, world_size=ranks)
    train_set, val_set = train.split_photos(count)
    assert len(val_set) == held_out
    assert sorted([*train_set.tolist(), *val_set.tolist()]) == list(range(count))
    vars(train).update(SEED=1)
    assert not torch.equal(train.split_photos(count)[0], train_set)


def test_two_photos_are_too_few(workplace):
    draw_faces(Path("few"), 2)
    assert "A run needs 3 usable photos and has 2." in refusal(run, "--data", "few")


@pytest.mark.parametrize(("kind", "flip", "share"), [("mse", True, 0.0), ("ssim", True, 0.0), ("bce", False, 0.1)])
def test_a_step_is_that_of_the_formulas(kind, flip, share):
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
    torch.testing.assert_close(sums, torch.stack([loss.sum(), reconstruction.sum(), kl.sum(), torch.tensor(6.0)]))
    torch.optim.SGD(other.parameters(), lr=1e-3 * train.one_cycle(0.25)).step()
    torch.testing.assert_close([*model.parameters()], [*other.parameters()])


def test_the_average_of_weights_lags_by_an_eleventh_of_all_steps_at_first_and_by_49_later():
    model, average = vae.VAE(16, 1, [4], 3), vae.VAE(16, 1, [4], 3)
    average.latent_mean.fill_(7)
    numbers = average.fc_mu.bias, average.encoder[0][1].running_var  # a weight, and a buffer of BatchNorm
    lags = []
    for step in range(1000):
        for tensor in (model.fc_mu.bias, model.encoder[0][1].running_var):
            tensor.data.fill_(step)
        train.update_average(average, model, step)
        lags.append(step - torch.cat(numbers).detach())
    for step, lag in {0: 0.0, 110: 10.0, 999: 49.0}.items():
        torch.testing.assert_close(lags[step], torch.full((7,), lag), atol=0.1, rtol=0)
    assert average.latent_mean.tolist() == [7] * 3


def test_each_epoch_takes_all_photos_in_another_order():
    train.BATCH_SIZE = 8
    train_set, _ = train.split_photos(22)  # 21 photos
    epochs = [train.batches_of(train_set, epoch) for epoch in (0, 1)]
    assert [len(batch) for batch in epochs[0]] == [8, 8, 5]
    first, second = [torch.cat(batches).tolist() for batches in epochs]
    assert first != second and sorted(first) == sorted(second) == sorted(train_set.tolist())


def test_golden_run(workplace):
    """The losses of a short run: another term, schedule, order of photos or flip changes them by more than 0.1 %."""
    recipe = "--reconstruction=ssim --kl-warmup-epochs=2 --beta=0.5 --learning-rate=0.03 --no-amp".split()
    run("--epochs", "3", "--output-dir", "golden", *recipe)
    with open("golden/history.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [[float(row[name]) for name in ("train_reconstruction", "train_kl", "val_reconstruction")] for row in rows]
    expected = [[268.205, 3.13070, 161.663], [248.413, 6.40658, 170.464], [240.167, 6.15887, 180.896]]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mse", "ssim", "bce"])
def test_a_loss_that_explodes_ends_the_run_with_a_sentence(workplace, kind):
    before = Path(TRAINED).read_bytes()
    said = refusal(run, "--epochs", "8", "--learning-rate", "1e12", "--reconstruction", kind)
    assert "The loss at step 5 of epoch 1 is not finite: lower LEARNING_RATE" in said
    assert Path(TRAINED).read_bytes() == before


def test_a_compiler_that_is_missing_does_not_stop_the_run(workplace):
    flags = ["--data", "faces", *SMALL, "--epochs", "1", "--output-dir"]
    train.main([*flags, "uncompiled"])
    nowhere = {**os.environ, "PATH": "", "CXX": "missing", "TORCHINDUCTOR_CACHE_DIR": str(workplace / "none")}
    subprocess.run([sys.executable, ROOT / "train.py", *flags, "compiled", "--compile=yes"], env=nowhere, check=True)
    assert same_weights("compiled/vae_model_1.pth", "uncompiled/vae_model_1.pth")


@pytest.mark.parametrize("kind", ["mse", "ssim", "bce"])
@pytest.mark.parametrize("size", [11, 4, 5])
def test_validation_figures_do_not_depend_on_batches(kind, size):
    vars(train).update(RECONSTRUCTION=kind, AMP=False, BATCH_SIZE=size)
    photos = torch.randint(0, 256, (11, 16, 16, 1), dtype=torch.uint8)
    images = photos.permute(0, 3, 1, 2) / 255
    new = train.Run(None, vae.VAE(16, 1, [4], 3).eval(), None, torch.device("cpu"), photos, None, torch.arange(11), {})
    figures = train.evaluate(new, *train.encode_photos(new, new.val_set))
    mu, log_var = new.average.encode(images)
    recon = new.average.decode(mu)
    loss = train.reconstruction_loss(recon, images, kind) + 0.132 * train.kl_divergence(mu, log_var).sum(1)
    assert figures["val_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert figures["val_psnr"] == pytest.approx(-10 * ((recon - images) ** 2).mean().log10().item(), abs=1e-4)


def test_files_of_a_run(trained):
    pictures = {f"epoch_0{n}_{kind}.png" for n in range(1, 9) for kind in ("reconstructions", "samples")}
    others = set("vae_model_8.pth last.pth history.csv loss_curves.png latent_space.png .lock".split())
    assert {path.name for path in (trained / "checkpoints_best").rglob("*.*")} == pictures | others


def test_the_checkpoint_holds_the_best_epoch_and_describes_itself(workplace):
    run("--epochs", "3", "--reconstruction", "ssim", "--no-amp", "--output-dir", "out")
    rows = np.genfromtxt("out/history.csv", delimiter=",", names=True)
    best = rows[rows["val_loss"].argmin()]
    assert best["epoch"] < 3
    _, info = vae.load_checkpoint("out/vae_model_3.pth")
    assert [info[name] for name in rows.dtype.names] == list(best)
    assert info["constants"]["LEARNING_RATE"] == 0.1
    assert not {"DATA", "OUTPUT_DIR"} & info["constants"].keys()  # it may go to others
    new = finished_run("out/vae_model_3.pth")
    assert train.evaluate(new, *train.encode_photos(new, new.val_set))["val_loss"] == pytest.approx(
        best["val_loss"], rel=1e-4
    )


def test_the_prior_is_fitted_to_the_codes_of_the_training_photos(workplace):
    run("--epochs", "2", "--no-amp", "--output-dir", "out")
    new = finished_run("out/vae_model_2.pth")
    mu, log_var = new.average.encode(new.pixels[new.train_set].permute(0, 3, 1, 2) / 255)
    covariance = torch.cov(mu.T, correction=0) + torch.diag(log_var.exp().mean(0))
    torch.testing.assert_close(new.average.latent_mean, mu.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(new.average.latent_scale @ new.average.latent_scale.T, covariance, atol=1e-3, rtol=1e-3)


def test_pictures_of_an_epoch_show_photos_over_their_reconstructions_and_samples(workplace):
    new = finished_run("checkpoints_best/last.pth")
    photos = new.pixels[new.val_set].permute(0, 3, 1, 2) / 255
    reconstructions = new.average.decode(new.average.encode(photos)[0])
    vae.save_grid(torch.cat([photos, reconstructions]), "reconstructions.png", columns=2)
    vae.save_grid(new.average.decode(new.average.draw_latents(vae.latent_noise(0, 64, 8))), "samples.png", columns=8)
    for kind in ("reconstructions", "samples"):
        found = np.asarray(Image.open(f"checkpoints_best/progress/epoch_08_{kind}.png"))
        assert np.abs(found.astype(int) - np.asarray(Image.open(f"{kind}.png"))).max() < 10  # computed in bfloat16


@pytest.mark.parametrize(("count", "flags"), [(3, []), (9, ["--latent-dim", "1"]), (9, ["--channels", "1"])])
def test_a_picture_of_the_latent_space_is_drawn_of_any_run(workplace, count, flags):
    draw_faces(Path("few"), count)
    run("--data", "few", "--epochs", "1", *flags)
    assert Image.open("checkpoints_best/latent_space.png").size == (1320, 660)


@pytest.mark.parametrize(("beta", "collapses"), [("1e4", True), ("0", False)])
def test_a_run_says_that_its_posterior_has_collapsed(workplace, capsys, beta, collapses):
    run("--epochs", "6", "--beta", beta)
    said = capsys.readouterr().out
    last = re.findall(r"Epoch  6/6.*", said)[0]
    assert ("COLLAPSED: all photos look alike; lower BETA" in last) == collapses
    assert ("Next        more epochs or photos, or a lower BETA" in said) == collapses


@pytest.mark.skipif(sys.platform == "win32", reason="has no cp")
def test_files_of_earlier_runs_move_away_and_undo_brings_the_checkpoint_back(workplace, capsys):
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
