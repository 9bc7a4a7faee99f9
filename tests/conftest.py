"""Shared by the tests: a small model trained on drawn faces, and functions that call the scripts."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from faces import draw_faces

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small models are faster without threads

import torch

import genpic
import train
import vae
from data.photos import open_container

ROOT = Path(__file__).parent.parent
SMALL = (
    "--image-size=32 --hidden-dims 8 16 --latent-dim=8 --batch-size=8 --learning-rate=0.1 --device=cpu "
    "--reconstruction=mse --beta=0.132"  # such a small model learns fastest with this loss
).split()
TRAINED = "checkpoints_best/vae_model_8.pth"


@contextmanager
def untouched_scripts():
    """Restore the scripts' constants after the block."""
    with mock.patch.dict(vars(train)), mock.patch.dict(vars(genpic)):
        yield
    open_container.cache_clear()  # tests reuse the same relative paths


@pytest.fixture(autouse=True)
def untouched():
    """Restore the scripts after each test."""
    with untouched_scripts():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder after a run of train.py, with faces/, data/cache/ and TRAINED."""
    folder = tmp_path_factory.mktemp("trained")
    draw_faces(folder / "faces", 40)
    with untouched_scripts(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--epochs", "8")
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """A copy of the `trained` folder, which is the current folder during the test."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def run(*flags):
    """Train the small model on the drawn faces in the current folder."""
    train.main(["--data", "faces", *SMALL, *flags])


def generate(*flags):
    """Run genpic.py with the small model in the current folder, on the first drawn face."""
    genpic.main(["--checkpoint", TRAINED, "--image", "faces", "--device", "cpu", *flags])


def refusal(call, *flags):
    """Call a script with flags that it must refuse; return its one-line error message."""
    with pytest.raises(vae.UserError) as error:
        call(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def start(folder, *command):
    """Start Python in a folder, in its own process group, as a shell does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # otherwise a background process would ignore it
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=env, **pipes)


def same_weights(one, other):
    """Return whether two checkpoints contain the same tensors, bit for bit."""
    states = [vae.load_checkpoint(path)[0].state_dict() for path in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


@contextmanager
def files_of_at_most(size):
    """Make the system refuse to write files larger than `size` bytes, as if the disk were full."""
    import resource  # not available on Windows

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
