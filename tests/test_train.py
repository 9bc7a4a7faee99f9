"""Training: photos and cache, split and order, schedules, figures, files, resuming, refusals."""

import copy
import csv
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import SMALL, TRAINED, refusal, run, same_weights
from faces import draw_faces
from PIL import Image

import train
import vae

CPU = torch.device("cpu")


def main(*flags):
    """Train in the current folder."""
    train.main(list(flags))


# Photos
def load_photos(folder, size):
    """Load the photos of a folder at a size, as main does."""
    train.DATA, train.IMAGE_SIZE = str(folder), size
    return train.load_photos(*train.find_photos(), CPU)


def test_photos_are_decoded_once_and_what_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "faces/some folder", 6)
    (tmp_path / "faces/broken.jpg").write_text("no photo")
    photos = load_photos("faces", 32)
    said = capsys.readouterr().out
    assert "broken.jpg" in said and "(1 files skipped)" in said
    assert photos.shape == (6, 32, 32, 3) and photos.dtype == torch.uint8
    for row, path in zip(photos, vae.find_photos("faces/some folder"), strict=True):
        expected = vae.celeb_transforms(32)[0](vae.read_image(path))
        torch.testing.assert_close(row.permute(2, 0, 1) / 255, expected)

    monkeypatch.setattr(vae, "read_image", None)  # no photo is opened again
    assert torch.equal(load_photos("faces", 32), photos)


def test_photos_are_read_for_the_size_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "faces", 3)
    read, asked = vae.read_image, []
    monkeypatch.setattr(vae, "read_image", lambda path, *form: asked.append(form) or read(path, *form))
    load_photos("faces", 32)
    assert asked == [(3, 32)] * 3


def test_every_photo_of_a_large_folder_is_there_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    for number in range(600):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(tmp_path / f"many/{number:03d}.png")
    broken = {0, 7, 300, 301, 599}
    for number in broken:
        (tmp_path / f"many/{number:03d}.png").write_bytes(b"")
    photos = load_photos("many", 16).long()
    assert (photos[:, 3, 5, 0] + 256 * photos[:, 3, 5, 1]).tolist() == sorted(set(range(600)) - broken)


def test_a_decoder_that_is_killed_ends_with_a_sentence(workplace, monkeypatch, capsys):
    monkeypatch.setattr(train, "crop_photos", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(train, "cores", lambda: 2)
    draw_faces(workplace / "faces", 257)
    code, said = refusal(run, capsys)
    assert code == 1 and "A process that decodes photos has been ended" in said
    assert len(list(workplace.glob("data/cache/*-*"))) == 1


def test_cache_follows_the_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, keys = draw_faces(tmp_path / "faces", 3), set()
    changes = [lambda: None, lambda: os.utime(folder / "face 000.jpg", (1, 1)), lambda: draw_faces(folder, 4)]
    for change in [*changes, lambda: setattr(train, "IMAGE_SIZE", 16)]:
        change()
        train.DATA = "faces"
        keys.add(train.cache_path(*train.find_photos(), train.IMAGE_SIZE, 3))
    assert len(keys) == 4
    folder.rename(tmp_path / "moved")
    train.DATA = str(tmp_path / "moved")
    assert train.cache_path(*train.find_photos(), 16, 3) in keys


def test_split_is_disjoint_and_drawn_by_the_seed(monkeypatch):
    for count in (3, 4, 19, 1000):
        trained, validated = train.split_photos(count)
        assert sorted([*trained.tolist(), *validated.tolist()]) == list(range(count))
        assert len(validated) == max(1, round(count * train.VAL_FRACTION))
    again = train.split_photos(1000)
    assert torch.equal(again[0], trained)
    train.SEED = 1
    assert not torch.equal(train.split_photos(1000)[0], trained)
    train.VAL_FRACTION = 0.99
    assert len(train.split_photos(3)[0]) == 2
    monkeypatch.setattr(train, "processes", lambda: 3)
    assert len(train.split_photos(7)[0]) == 6


def test_batches_are_images_in_channels_last():
    photos = torch.randint(0, 256, (50, 8, 6, 3), dtype=torch.uint8)
    batches = torch.randperm(50).split(4)
    for batch, images in zip(batches, train.load_batches(photos, batches, CPU), strict=True):
        torch.testing.assert_close(images, photos[batch].permute(0, 3, 1, 2) / 255)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_work_ahead_comes_in_order_and_never_runs_away():
    started, taken = [], []
    for result in train.ahead(lambda item: started.append(item) or -item, range(40)):
        taken.append(result)
        assert len(started) - len(taken) <= 1
    assert taken == [-item for item in range(40)] and sorted(started) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        list(train.ahead(lambda item: 1 / item, [1, 0, 1]))
    assert not list(train.ahead(abs, []))


def test_about_half_of_the_images_are_mirrored():
    images = torch.rand(400, 1, 2, 8)
    mirrored = train.mirror_half(images)
    flipped = [torch.equal(one, other.flip(2)) for one, other in zip(mirrored, images, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(mirrored, images, strict=True)]
    assert 150 < sum(flipped) < 250 and sum(flipped) + sum(kept) == 400


# Schedules
def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [train.learning_rate(progress) for progress in np.linspace(0, 1, 1001)]
    peak = int(np.argmax(rates))
    assert rates[0] == 0 and rates[-1] == pytest.approx(0) and peak == 50
    assert rates[25] == train.LEARNING_RATE / 2 and rates[peak] == pytest.approx(train.LEARNING_RATE)
    assert rates[525] == pytest.approx(train.LEARNING_RATE / 2)
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


def test_kl_weight():
    assert train.kl_weight(0.0) == train.kl_weight(1.0) == train.BETA
    train.EPOCHS, train.KL_WARMUP_EPOCHS = 10, 4
    assert [train.kl_weight(epoch / 10) for epoch in (0, 2, 4, 10)] == pytest.approx([0, 0.066, 0.132, 0.132])
    train.RECONSTRUCTION = "sigma"
    assert train.kl_weight(0.2) == pytest.approx(0.5) and train.kl_weight(1.0) == 1


# Steps
@pytest.mark.parametrize(
    ("kind", "flip", "count"), [("mse", True, 6), ("ssim", True, 6), ("bce", False, 6), ("sigma", True, 11)]
)
def test_a_step_is_that_of_the_formulas(kind, flip, count, monkeypatch):
    train.RECONSTRUCTION, train.FLIP, train.EPOCHS, train.KL_WARMUP_EPOCHS, train.AMP = kind, flip, 10, 5.0, False
    model, images, step, progress = vae.VAE(16, 1, [4], 3), torch.rand(6, 1, 16, 16), 77, 0.25
    other = copy.deepcopy(model)
    number, others = (0, 0) if count == 6 else (1, 1)  # the other process, if any, has the rest of the batch
    monkeypatch.setattr(train, "processes", lambda: 1 + others)
    monkeypatch.setattr(train, "rank", lambda: number)
    sums = train.train_step(model, torch.optim.SGD(model.parameters(), lr=123.0), images, count, step, progress)

    torch.manual_seed(train.seed_of(b"step", step, number))
    if flip:
        mirrored = torch.rand(6, 1, 1, 1) < 0.5
        assert 0 < mirrored.sum() < 6
        images = torch.where(mirrored, images.flip(3), images)
    mu, log_var = other.encode(images)
    recon = other.decode(mu + torch.exp(log_var / 2) * torch.randn_like(mu))
    reconstruction, kl = train.reconstruction_loss(recon, images, kind), train.kl_divergence(mu, log_var)
    loss = reconstruction + 0.5 * (1 if kind == "sigma" else 0.132) * kl
    (loss.sum() / count * (1 + others)).backward()
    torch.testing.assert_close(sums, torch.stack([loss.sum(), reconstruction.sum(), kl.sum(), torch.tensor(6.0)]))
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        gradient = 0 if two.grad is None else two.grad
        torch.testing.assert_close(
            one, two - train.learning_rate(progress) * gradient, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_steps_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "faces", 21)  # 1 to validate on, so 20 in batches of 8, 8 and 4
    calls = []

    def record(network, optimizer, images, count, step, progress):
        assert count == len(images)
        calls.append((step, progress, [hash(image.numpy().tobytes()) for image in images.contiguous()]))
        for tensor in (images, network.encoder[1][0].weight):
            assert network.training and tensor.is_contiguous(memory_format=torch.channels_last)
        return torch.tensor([8.0, 6, 2, 1]) * len(images) * torch.tensor([step % 3, step % 3, step % 3, 1])

    monkeypatch.setattr(train, "train_step", record)
    run("--epochs", "2")
    assert [(step, progress) for step, progress, _ in calls] == [(k, pytest.approx((k + 0.5) / 6)) for k in range(6)]
    assert [len(images) for *_, images in calls] == [8, 8, 4] * 2
    epochs = [[image for *_, images in part for image in images] for part in (calls[:3], calls[3:])]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 20 and epochs[0] != epochs[1]
    for row in vae.load_checkpoint("checkpoints_best/last.pth")[1]["state"]["history"]:
        figures = [row[f"train_{name}"] for name in ("loss", "reconstruction", "kl")]
        assert figures == pytest.approx([8 * 0.8, 6 * 0.8, 2 * 0.8])  # 0 for 8 photos, 1 for 8 and 2 for 4

    first, calls[:] = epochs[0], []
    run("--epochs", "1", "--seed", "1", "--val-fraction", "0")
    born = [vae.load_checkpoint(f"checkpoints_best/vae_model_{epochs}.pth")[0].fc_mu.weight for epochs in (1, 2)]
    assert not torch.equal(*born)
    assert [image for *_, images in calls for image in images] != first


def test_seeds_give_different_models():
    seeds = []
    for train.SEED in (0, 1):
        seeds += [train.seed_of(use, index) for use in (b"init", b"step", b"order") for index in (0, 1)]
    assert len(set(seeds)) == 12


# Figures
@pytest.mark.parametrize("kind", ["mse", "ssim", "bce", "sigma"])
def test_validation_does_not_depend_on_batches(kind):
    train.RECONSTRUCTION, train.AMP = kind, False
    model, photos = vae.VAE(16, 1, [4], 3).eval(), torch.randint(0, 256, (11, 16, 16, 1), dtype=torch.uint8)
    with torch.no_grad():
        model(torch.rand(8, 1, 16, 16))
        x = photos.permute(0, 3, 1, 2) / 255
        mu, log_var = model.encode(x)
        recon = model.decode(mu)
    expected = (
        train.reconstruction_loss(recon, x, kind).mean() + train.kl_weight(1) * train.kl_divergence(mu, log_var).mean()
    )
    for train.BATCH_SIZE in (11, 4, 5):
        figures, *codes = train.evaluate(model, photos, torch.arange(11), CPU)
        torch.testing.assert_close(codes, [mu, log_var])
        assert figures["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert figures["val_psnr"] == pytest.approx(-10 * math.log10(((recon - x) ** 2).mean()), abs=1e-4)


def test_bfloat16_gives_the_same_figures(trained):
    model, _ = vae.load_checkpoint(trained / TRAINED)
    photos = torch.from_numpy(np.fromfile(next((trained / "data/cache").glob("*.u8")), np.uint8)).view(-1, 32, 32, 3)
    train.AMP = False
    exact = train.evaluate(model, photos, torch.arange(len(photos)), CPU)[0]["val_psnr"]
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
        rounded = train.evaluate(model, photos, torch.arange(len(photos)), CPU)[0]["val_psnr"]
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact


def test_training_learns(trained):
    with open(trained / "checkpoints_best/history.csv") as file:
        first, *_, last = csv.DictReader(file)
    assert float(last["train_loss"]) < 0.75 * float(first["train_loss"])


def test_golden_run(workplace):
    """The losses of a short run: another term, schedule, order of photos or flip changes each by 1 % or more."""
    recipe = "--reconstruction=ssim --kl-warmup-epochs=2 --beta=0.5 --learning-rate=0.003 --no-amp".split()
    run("--epochs", "3", "--output-dir", "golden", *recipe)
    with open("golden/history.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [[float(row[name]) for name in ("train_reconstruction", "train_kl", "val_reconstruction")] for row in rows]
    expected = [[260.72, 12.5198, 159.951], [235.43, 17.1455, 165.180], [225.42, 13.5418, 171.119]]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


# What a run leaves behind
def test_files_of_a_run(trained):
    out = trained / "checkpoints_best"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    progress = {
        f"progress/epoch_0{epoch}_{kind}.png" for epoch in range(1, 9) for kind in ("reconstructions", "samples")
    }
    assert (
        names
        == {"vae_model_8.pth", "last.pth", "history.csv", "loss_curves.png", "latent_space.png", ".lock"} | progress
    )
    assert Image.open(out / "progress/epoch_08_reconstructions.png").size == (2 * 34 + 2, 2 * 34 + 2)  # 2 held out
    assert Image.open(out / "progress/epoch_08_samples.png").size == (8 * 34 + 2, 8 * 34 + 2)


def test_latents_line_tells_what_state_they_are_in():
    train.EPOCHS = 3
    row = {"epoch": 3, "train_kl": 41.0, "val_kl": 40.26, "active_units": 100, "marginal_kl": 31.0}
    assert train.latents_line(row) == "  Latents    40.3 nats KL, 100 of 128 active"
    weak = train.latents_line(row | {"marginal_kl": 33})
    assert "; so weak a KL leaves them 33 nats off N(0, I): sample from the fitted prior" in weak
    collapsed = row | {"train_kl": 0.9, "val_kl": 0.01, "active_units": 0}
    said = train.latents_line(collapsed)
    assert "0.0 nats KL, 0 of 128 active: the posterior has collapsed" in said and "lower BETA" in said
    for kl in ("train_kl", "val_kl"):  # either may be small for another reason
        assert "collapsed" not in train.latents_line(collapsed | {kl: 1.1})
    train.RECONSTRUCTION = "sigma"
    assert "lower BETA" not in train.latents_line(collapsed)
    assert "N(0, I)" not in train.latents_line(row | {"marginal_kl": 33, "epoch": 2})  # once is enough


def test_a_run_says_that_its_posterior_has_collapsed(workplace, capsys):
    run("--epochs", "6", "--beta", "1e4")
    assert "the posterior has collapsed" in capsys.readouterr().out
    run("--epochs", "3", "--beta", "0")
    assert "; so weak a KL leaves them" in capsys.readouterr().out


def test_checkpoint_holds_the_best_weights_and_describes_itself(trained):
    model, info = vae.load_checkpoint(trained / TRAINED)
    with open(trained / "checkpoints_best/history.csv") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["val_loss"]))
    assert info["epoch"] == int(best["epoch"]) and info["val_loss"] == float(best["val_loss"])
    assert model.config == {"image_size": 32, "channels": 3, "hidden_dims": [8, 16], "latent_dim": 8}
    assert info["constants"]["EPOCHS"] == 8 and info["constants"]["BETA"] == 0.132 and model.prior_is_fitted()
    assert not {"DATA", "OUTPUT_DIR"} & info["constants"].keys()  # it may go to others


def test_the_best_epoch_is_that_of_the_lowest_validation_loss(workplace, monkeypatch):
    figures, validated = iter([3.0, 1.0, 2.0]), []

    def evaluate(model, photos, val_set, device):
        validated.append((val_set.tolist(), copy.deepcopy(model.fc_mu.weight.detach()), model.training))
        names = ("val_loss", "val_reconstruction", "val_kl", "val_squared_error", "val_psnr")
        return dict.fromkeys(names, next(figures)), torch.zeros(2, 8), torch.zeros(2, 8)

    monkeypatch.setattr(train, "evaluate", evaluate)
    run("--epochs", "3")
    model, info = vae.load_checkpoint("checkpoints_best/vae_model_3.pth")
    assert info["epoch"] == 2 and torch.equal(model.fc_mu.weight, validated[1][1])
    assert all(held_out == train.split_photos(40)[1].tolist() and not training for held_out, _, training in validated)


def test_prior_is_fitted_to_the_codes_of_the_training_photos(workplace):
    model, info = vae.load_checkpoint(TRAINED)
    vars(train).update(info["constants"])
    photos = [vae.celeb_transforms(32)[0](vae.read_image(path)) for path in vae.find_photos("faces")]
    with torch.no_grad():
        mu, log_var = model.encode(torch.stack(photos)[train.split_photos(40)[0]])
    covariance = torch.cov(mu.T, correction=0) + torch.diag(log_var.exp().mean(0))
    torch.testing.assert_close(model.latent_mean, mu.mean(0), atol=0.02, rtol=0.02)  # fitted in bfloat16
    torch.testing.assert_close(model.latent_scale @ model.latent_scale.T, covariance, atol=0.05, rtol=0.05)


def test_pictures_of_an_epoch(workplace):
    model, info = vae.load_checkpoint("checkpoints_best/last.pth")
    vars(train).update(info["constants"])
    train.AMP, train.HIDDEN_DIMS = False, [8, 16]
    photos = torch.stack([vae.celeb_transforms(32)[0](vae.read_image(path)) for path in vae.find_photos("faces")[:3]])
    train.save_pictures(model, photos, workplace / "picture")
    strip = np.asarray(Image.open("picture_reconstructions.png")).astype(int)
    expected = model.decode(model.encode(photos[1:2])[0])[0].detach()
    assert np.abs(strip[2:34, 36:68] - 255 * photos[1].permute(1, 2, 0).numpy()).max() <= 1
    assert np.abs(strip[36:68, 36:68] - 255 * expected.permute(1, 2, 0).numpy()).max() <= 1
    before = (workplace / "picture_samples.png").read_bytes()
    train.save_pictures(model, photos, workplace / "picture")
    assert (workplace / "picture_samples.png").read_bytes() == before


def test_checkpoints_of_other_runs_are_kept(workplace, capsys):
    out = workplace / "checkpoints_best"
    first = (out / "vae_model_8.pth").read_bytes()
    (out / "vae_model_1.pth").write_bytes(first)
    for kept in ("vae_model_1.previous.pth", "vae_model_1.previous-2.pth"):
        run("--epochs", "1", "--seed", str(len(kept)))
        back = f"`mv checkpoints_best/{kept} checkpoints_best/vae_model_1.pth` brings it back in place of this run's"
        assert f"kept as checkpoints_best/{kept} ({back})" in capsys.readouterr().out
    assert (out / "vae_model_1.previous.pth").read_bytes() == first
    assert (out / "vae_model_8.pth").read_bytes() == first
    assert not same_weights(out / "vae_model_1.pth", out / "vae_model_1.previous-2.pth")


def test_pictures_of_other_runs_are_kept(workplace, capsys):
    out, names = workplace / "checkpoints_best", ("history.csv", "loss_curves.png", "latent_space.png")
    first = {path.relative_to(out): path.read_bytes() for path in [*map(out.joinpath, names), *out.glob("progress/*")]}
    assert len(first) == 3 + 2 * 8
    run("--epochs", "1")
    assert "kept in checkpoints_best/previous\n" in capsys.readouterr().out
    assert {path: (out / "previous" / path).read_bytes() for path in first} == first
    assert len(list(out.glob("progress/*"))) == 2
    run("--epochs", "2", "--seed", "3")
    assert "kept in checkpoints_best/previous-2\n" in capsys.readouterr().out
    assert len(list(out.glob("previous-2/progress/*"))) == 2
    run("--epochs", "1", "--output-dir", "elsewhere")
    assert "previous" not in capsys.readouterr().out


def test_the_same_settings_give_the_same_weights(workplace):
    run("--epochs", "8", "--output-dir", "again")
    assert same_weights("again/vae_model_8.pth", TRAINED)


@pytest.mark.parametrize("data", [[], ["--data", "data/train"]])
def test_demo_faces_stand_in_while_there_are_no_photos(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "data/demo", 9)
    train.main([*SMALL, "--epochs", "1", *data])
    assert "the demo faces in data/demo" in capsys.readouterr().out
    assert (tmp_path / "checkpoints_best/vae_model_1.pth").exists()


def test_smallest_sets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "faces", 3)
    run("--epochs", "1")
    assert "2 to train on in batches of 2, 1 to validate on" in capsys.readouterr().out
    draw_faces(tmp_path / "faces", 10)
    step, sizes = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args: sizes.append(len(args[2])) or step(*args))
    run("--epochs", "1")
    assert sizes == [8]  # of the 9 to train on, the last would be a batch of one


def test_compiling_that_fails_costs_only_a_line(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model, **_: type("Broken", (torch.nn.Module,), {"forward": fail})())
    model, train.COMPILE = vae.VAE(), "yes"
    before = copy.deepcopy(model.state_dict())
    assert train.compiled(model, CPU, 2) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "Compiling the model fails here (RuntimeError)" in capsys.readouterr().out


def test_compiling_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    train.IMAGE_SIZE, train.CHANNELS, model = 16, 1, vae.VAE(16, 1, [4], 3)
    before = copy.deepcopy(model.state_dict())
    assert train.compiled(model, CPU, 2) is model and train.COMPILE == "auto"  # on the CPU: not compiled
    train.COMPILE = "yes"
    train.compiled(model, CPU, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Refusals
def test_folders_without_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, said = refusal(main, capsys)
    assert code == 2 and f"{tmp_path}/data/train does not exist" in said
    (tmp_path / "file").touch()
    for words in ("empty holds no photos", "missing does not exist", "file is no folder, .zip or .npy"):
        code, said = refusal(main, capsys, "--data", words.split()[0])
        assert code == 2 and f"{tmp_path}/{words}" in said and "--data" in said and "CelebA" in said


def test_photos_that_do_not_suffice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_faces(tmp_path / "faces", 2)
    code, said = refusal(run, capsys)
    assert code == 1 and "There are 2 readable photos" in said
    draw_faces(tmp_path / "faces", 6)
    with monkeypatch.context() as patch, pytest.raises(vae.UserError, match="needs at least 6 to train on and 1 to va"):
        patch.setattr(train, "processes", lambda: 3)
        load_photos("faces", 32)
    (tmp_path / "faces").rename(tmp_path / "other")
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces/text.jpg").write_text("no photo")
    code, said = refusal(run, capsys)
    assert code == 1 and "None of the 1 photos can be read; the first is faces/text.jpg" in said
    assert len(list(tmp_path.glob("data/cache/*-*"))) == 2 and not list(tmp_path.glob("checkpoints_best/*.pth"))


@pytest.mark.parametrize(
    "flags",
    ["--epochs 0", "--batch-size 1", "--learning-rate 0", "--learning-rate nan", "--reconstruction l1", "--beta -1"]
    + ["--val-fraction 1", "--seed -1", "--compile maybe", "--kl-warmup-epochs 21", "--device tpu", "--device cuda:99"]
    + [
        "--image-size 8",
        "--channels 2",
        "--latent-dim 0",
        "--hidden-dims 0",
        "--image-size 16 --hidden-dims 1 1 1 1 1",
    ],
)
def test_constants_that_cannot_be(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = refusal(main, capsys, *flags.split())
    assert code == 2 and flags.split()[-2 if "1 1" not in flags else 2][2:].replace("-", "_").upper() in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("EPOCHS", "20"), ("EPOCHS", 2.0), ("LEARNING_RATE", "1e-3"), ("AMP", "no"), ("DATA", None), ("SEED", True)]
    + [("HIDDEN_DIMS", []), ("HIDDEN_DIMS", 64), ("HIDDEN_DIMS", [8.0, 16]), ("IMAGE_SIZE", (150, 150))],
)
def test_constants_of_another_type(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    setattr(train, name, value)
    code, said = refusal(main, capsys)
    assert code == 2 and f"{name} is {value!r}: it must be" in said


def test_a_whole_number_in_the_script_takes_fractions_from_its_flag(capsys):
    train.BETA = 1
    code, said = refusal(main, capsys, "--beta", "0.5", "--epochs", "0")
    assert code == 2 and "EPOCHS" in said


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_memory_that_runs_out_ends_with_a_sentence(message, workplace, monkeypatch, capsys):
    def step(*_):
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    monkeypatch.setattr(train, "train_step", step)
    code, said = refusal(run, capsys, "--epochs", "1")
    assert code == 1 and "lower BATCH_SIZE" in said


@pytest.mark.parametrize("flags", ["--epoch 3", "--epochs many", "--amp yes", "--hidden-dims", "more"])
def test_flags_that_do_not_exist_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("usage: ")


def test_help_shows_every_constant_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in ("--hidden-dims", "stages; each halves the side (default: [32, 64, 128, 256, 512])", "--no-amp"):
        assert text in said
    assert "reached after 5 % of the run; lower it if the loss jumps about (default: 0.001)" in said
