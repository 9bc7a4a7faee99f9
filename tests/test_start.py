"""Tests of START_FROM: a run begins with the weights of a checkpoint."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TRAINED, generate, refusal, run
from faces import draw_faces
from test_faces import SQUARE
from test_resume import assert_same_run, signal_in_step

import train
import vae

START = ["--start-from", TRAINED, "--output-dir", "out"]


def first_losses(*flags):
    """Return the training and validation loss of a run's first epoch, in which it learns next to nothing."""
    run("--epochs=1", "--learning-rate=1e-9", "--augment=0", "--no-flip", "--no-amp", *flags)
    row = np.genfromtxt("out/history.csv", delimiter=",", names=True)
    return row["train_loss"], row["val_loss"]


def test_a_run_begins_at_the_loss_of_its_start(workplace):
    history = vae.load_checkpoint("checkpoints_best/last.pth")[1]["position"]["history"]
    best = min(history, key=lambda row: row["val_loss"])
    training, validation = first_losses(*START)
    assert validation == pytest.approx(best["val_loss"], rel=0.01)
    assert training == pytest.approx(best["train_loss"], rel=0.05)
    assert first_losses("--output-dir=out")[0] > 1.5 * training  # from random weights


def run_at_the_default_rate(*flags):
    """Start a run from start.pth without --learning-rate."""
    others = [flag for flag in SMALL if "learning-rate" not in flag]
    train.main(["--data=faces", "--start-from=start.pth", "--epochs=3", *others, *flags])


def test_a_stopped_run_resumes_without_its_start(workplace, monkeypatch):
    Path(TRAINED).rename("start.pth")
    run_at_the_default_rate("--output-dir=whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(patch, 7, 2)
        run_at_the_default_rate("--output-dir=parts")
    Path("start.pth").unlink()
    run_at_the_default_rate("--output-dir=parts", "--resume", "--start-from=")
    assert_same_run(Path("parts"), Path("whole"))
    assert "There is no checkpoint start.pth: correct the path" in refusal(run_at_the_default_rate)


def test_the_checkpoint_keeps_the_last_epoch_and_describes_its_start(workplace, capsys):
    model, info = vae.load_checkpoint(TRAINED)
    vae.save_checkpoint("start.pth", model, half=True, about="made of drawings", **info)
    run_at_the_default_rate("--output-dir=out")
    said = capsys.readouterr().out
    assert "Recipe      LEARNING_RATE 0.01, BETA 0.132, weights of start.pth\n" in said
    assert "best so far" not in said and "Done        The weights of epoch 3, " in said
    _, info = vae.load_checkpoint("out/vae_model_3.pth")
    assert info["start_sha256"] == hashlib.sha256(Path("start.pth").read_bytes()).hexdigest()
    assert "start.pth" not in str(info) and info["constants"]["LEARNING_RATE"] == 0.01 and info["epoch"] == 3
    run("--start-from=out/vae_model_3.pth", "--output-dir=again", "--epochs=1")
    generate("--checkpoint=again/vae_model_1.pth")
    assert "About       the model that its training started from: made of drawings\n" in capsys.readouterr().out


def test_a_start_in_the_output_folder_is_read_before_it_is_moved(workplace, capsys):
    shutil.copytree("checkpoints_best", "out")
    run("--start-from=out/last.pth", "--output-dir=out", "--epochs=8")
    assert "Backup      of earlier files in out/previous-1\n" in capsys.readouterr().out
    _, info = vae.load_checkpoint("out/vae_model_8.pth")
    assert info["start_sha256"] == hashlib.sha256(Path("out/previous-1/last.pth").read_bytes()).hexdigest()


def test_a_start_of_another_size_or_without_weights_is_refused(workplace):
    said = refusal(run, *START, "--hidden-dims", "8", "--latent-dim", "4")
    assert said.endswith("is a model of another size: to start from it, set --hidden-dims 8 16 --latent-dim 8.")
    assert "damaged or is not a checkpoint" in refusal(run, "--start-from=faces/face 000.jpg")
    assert "There is no checkpoint gone.pth" in refusal(run, "--start-from=gone.pth")
    said = refusal(run, "--resume", "--epochs=9")
    assert said.endswith("To train it further, use --start-from checkpoints_best/last.pth instead of --resume.")


def test_a_checkpoint_of_the_original_projects_can_be_started_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_faces(Path("faces"), 3)
    torch.save(vae.VAE().state_dict(), "weights.pth")
    train.main(["--data=faces", "--start-from=weights.pth", "--output-dir=out", "--epochs=1", "--device=cpu"])
    assert "Tip" not in capsys.readouterr().out
    assert vae.load_checkpoint("out/vae_model_1.pth")[1]["start_about"] == ""


def test_faces_are_cropped_to_where_the_start_has_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("faces").mkdir()
    for number in range(4):
        SQUARE.resize((150 + number, 150 + number)).save(f"faces/{number}.png")
    box = [0.1, 0.2, 0.7]
    vae.save_checkpoint("start.pth", vae.VAE(32, 3, [8, 16], 8), face_box=box)
    flags = ["--crop=face", "--epochs=1", "--output-dir=out"]
    run(*flags, "--start-from=start.pth")
    assert vae.load_checkpoint("out/last.pth")[1]["face_box"] == box
    run(*flags, "--resume")  # refused if the photos were cropped in another way
    run(*flags, "--output-dir=random")
    assert "Tip         Few photos: begin with a model that knows faces, --start-from" in capsys.readouterr().out
    assert vae.load_checkpoint("random/last.pth")[1]["face_box"] == list(train.FACE_BOX)
    run("--image-size=64", "--epochs=1", "--output-dir=center")
    assert "Tip         The faces are not aligned" not in capsys.readouterr().out
    vae.save_checkpoint("start.pth", vae.VAE(64, 3, [8, 16], 8), face_box=box)
    run("--image-size=64", "--epochs=1", "--output-dir=center", "--start-from=start.pth")
    assert "Tip         The faces are not aligned" in capsys.readouterr().out


@pytest.mark.parametrize("side, expected", [(150, 0.132), (64, 0.02403), (256, 0.38448)])
def test_beta_is_in_proportion_to_the_number_of_pixels_unless_it_is_given(side, expected):
    train.IMAGE_SIZE = side
    assert train.kl_weight(0.5) == pytest.approx(expected, rel=1e-3)
    train.BETA = 0.5
    assert train.kl_weight(0.5) == 0.5
