"""Tests that need a CUDA GPU."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TRAINED, generate, run
from test_resume import signal_in_step
from test_train import BLANK_RUN

import train
import vae
from data.cache import load_pixels
from data.photos import find_photos

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_tune_fits_the_decoder_on_the_gpu(workplace, capsys):
    generate("--device", "cuda", "--tune", "5")
    assert "dB, fitted in 5 steps to" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", ["yes", "no"])
def test_a_run_learns_and_resumes(compiled, workplace, monkeypatch):
    flags = ["--device", "cuda", "--compile", compiled, "--epochs", "8", "--output-dir", "cuda"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(patch, 0, signal.SIGINT)
        run(*flags)
    run(*flags, "--resume")
    first, *_, last = vae.load_checkpoint("cuda/last.pth")[1]["position"]["history"]
    assert last["epoch"] == 8 and last["train_loss"] < 0.75 * first["train_loss"]


def test_photos_go_to_the_gpu_if_they_fit_and_bfloat16_gives_the_same_psnr(workplace, monkeypatch):
    model, _ = vae.load_checkpoint(TRAINED, "cuda")
    device = model.latent_mean.device
    arguments = find_photos("faces"), {"channels": 3, "size": 32}, 1, device
    pixels, _ = load_pixels(*arguments)
    run = replace(BLANK_RUN, average=model, device=device, pixels=pixels, val_set=torch.arange(9).to(device))
    exact, rounded = [train.validate(run)[0]["val_psnr"] for train.AMP in (False, True)]
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (pixels.nbytes, 0))
    assert pixels.is_cuda and not load_pixels(*arguments)[0].is_cuda


def test_running_out_of_gpu_memory_gives_a_one_line_error(workplace):
    limit = (
        "import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(0.001); sys.path.insert(0, sys.argv[1])"
    )
    script = "; del sys.argv[0]; sys.argv[0] += '/train.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--data", "faces", "--device", "cuda", "--image-size", "256", "--compile", "no"]
    done = subprocess.run([sys.executable, "-c", limit + script, ROOT, *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("train.py: Memory ran out")
