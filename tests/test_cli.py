"""Tests of the command line: errors, signals, flags and output."""

import os
import re
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SMALL, TRAINED, refusal, start
from faces import draw_faces
from PIL import Image

import genpic
import train
import vae


@pytest.fixture
def folder(tmp_path):
    """A folder with copies of the three scripts and photos to train on."""
    for name in ("vae.py", "train.py", "genpic.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("demo", "t*"))
    draw_faces(tmp_path / "data/train", 40)
    return tmp_path


def python(folder, *command):
    """Run a script in a folder; return its stdout, stderr and exit code."""
    process = start(folder, *command)
    return *process.communicate(), process.returncode


def test_train_and_then_generate(folder):
    said, *outcome = python(folder, "train.py", *SMALL, "--epochs", "3", "--output-dir", "my runs")
    assert outcome == ["", 0] and said.count("images/s") == 3
    assert python(folder, *shlex.split(re.search("\nNext +python (.*)", said)[1]), "--image=data/train")[1:] == ("", 0)
    assert Image.open(folder / "generated_images_grid2.jpg").size == (6 * 34 + 2, 2 * 34 + 2)


@pytest.mark.parametrize("script", ["train.py", "genpic.py"])
def test_errors_are_one_line_unknown_flags_show_usage_and_bugs_a_traceback(script, folder):
    shutil.rmtree(folder / "data")
    _, complaints, code = python(folder, script)
    assert (code, complaints.count("\n")) == (1, 1) and complaints.startswith(f"{script}: ")
    _, complaints, code = python(folder, script, "--see", "3")
    assert code == 2 and complaints.startswith("usage: ")
    (folder / script).write_text((ROOT / script).read_text().replace("    check_settings()\n", "    [].pop()\n"))
    _, complaints, code = python(folder, script)
    assert code == 1 and complaints.startswith("Traceback") and "IndexError" in complaints


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_the_printed_command_continues_it(number, code, folder):
    process = start(folder, "train.py", *SMALL, "--epochs", "1000", "--output-dir", "my runs")
    assert any("Epoch  2/1000" in line for line in process.stdout)
    process.send_signal(number)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == code
    assert complaints == "\nStopping after this step; press Ctrl-C again to stop immediately.\n"
    epoch, command = re.search(r"Stopped     in epoch (\d+)\. To continue: python (.*)\n$", said).groups()
    again = start(folder, *shlex.split(command))
    assert any(f"Resuming    after epoch {int(epoch) - 1} of 1000" in line for line in again.stdout)
    assert any(f"Epoch {int(epoch):2d}/1000" in line for line in again.stdout)
    os.killpg(again.pid, signal.SIGKILL)


def test_ctrl_c_while_photos_are_read_ends_without_a_traceback(folder):
    Image.effect_noise((1500, 1500), 50).save(folder / "noise.png")
    for number in range(400):
        (folder / f"data/train/{number}.png").symlink_to(folder / "noise.png")
    process = start(folder, "train.py", *SMALL)
    while process.poll() is None and not any(path.stat().st_size for path in folder.glob("data/cache/.*.tmp")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals all processes
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130


def test_a_closed_pipe_ends_a_run_without_a_traceback(folder):
    process = start(folder, "train.py", *SMALL, "--epochs", "3")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_genpic_in_another_folder_uses_its_own_model_and_photo_unless_set_by_flags(tmp_path):
    said, *outcome = python(tmp_path, ROOT / "genpic.py", "--device=cpu")
    assert outcome == ["", 0] and said.count("next to genpic.py") == 2 and (tmp_path / genpic.OUTPUT).exists()
    _, complaints, code = python(tmp_path, ROOT / "genpic.py", "--checkpoint", genpic.CHECKPOINT)
    assert code == 1 and complaints.startswith(f"genpic.py: There is no checkpoint {genpic.CHECKPOINT}")


def test_main_in_a_notebook_uses_and_restores_the_constants(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])
    vars(genpic).update(CHECKPOINT=TRAINED, IMAGE="faces", DEVICE="cpu", NUM_VARIATIONS=3, OUTPUT="a.png")
    genpic.main(["--num-variations", "20", "--seed", "1"])
    assert (Image.open("a.png").height, genpic.NUM_VARIATIONS, genpic.SEED) == (4 * 34 + 2, 3, 0)
    genpic.main()
    assert Image.open("a.png").height == 34 + 2


def test_reading_photos_imports_neither_matplotlib_nor_dlib(tmp_path):
    check = "import data.photos, sys; sys.exit(bool({'matplotlib', 'dlib', 'train'} & {*sys.modules}))"
    assert python(tmp_path, "-c", check)[2] == 0


@pytest.mark.parametrize("script", [train, genpic])
def test_every_constant_is_a_flag_with_its_comment_and_default(script, capsys):
    source = "".join((ROOT / f"{module.__name__}.py").read_text() for module in (vae, script))
    comments = dict(re.findall(r"^([A-Z_]+): .*? = .*?  # (.*)$", source, re.MULTILINE))
    constants = [name for name in comments if hasattr(script, name)]
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = "".join(capsys.readouterr().out.split())  # for any terminal width
    assert said.count("(default:") == len(constants) > 10
    for name in constants:
        text = f"{comments[name]} (default: {getattr(script, name)})".replace(" ", "")
        assert f"--{name.lower().replace('_', '-')}" in said and text in said, name


@pytest.mark.parametrize(
    "flags",
    "--epochs 0, --batch-size 1, --augment 0.6, --learning-rate nan, --beta -1, --val-fraction 1, --seed -1, "
    "--kl-warmup-epochs 21, --reconstruction l1, --device tpu, --image-size 8, --channels 2, "
    "--hidden-dims 8 0, --crop a".split(", "),
)
def test_invalid_constants_are_refused_before_anything_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = flags.split()[0].removeprefix("--").replace("-", "_").upper()
    assert refusal(train.main, flags.split()).startswith(f"{name} is ") and not list(tmp_path.iterdir())


@pytest.mark.skipif((ROOT / "checkpoints_best/last.pth").exists(), reason="a run has replaced the included model")
def test_the_quick_start_command_makes_variations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    genpic.main(["--output", str(tmp_path / "grid.jpg")])
    assert re.search(r"\nAbout +.*CelebA.*research", capsys.readouterr().out)
    grid = np.asarray(Image.open(tmp_path / "grid.jpg"), float)[2:, 2:].reshape(2, 152, 6, 152, 3)
    photo, reconstruction, *variations = grid.swapaxes(1, 2)[:, :, :150, :150].reshape(12, -1)
    assert 3 < np.sqrt(2 * np.var(variations, axis=0, ddof=1).mean()) < 15  # grey levels between two variations
    assert np.sqrt(np.square(photo - reconstruction).mean()) < 12
