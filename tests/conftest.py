"""What the tests share: a small model that train.py has trained on drawn faces, and how to call the scripts."""

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
    "--reconstruction=mse"  # from which so small a model learns most in a few steps
).split()
TRAINED = "checkpoints_best/vae_model_8.pth"


@contextmanager
def untouched_scripts():
    """Put back what the block changes in the scripts: constants, and how they react to signals."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with mock.patch.dict(vars(train)), mock.patch.dict(vars(genpic)):
            yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        train.stop_signals.clear()
        open_container.cache_clear()  # tests use the same relative names


@pytest.fixture(autouse=True)
def untouched():
    """Each test finds the scripts as they are in their files."""
    with untouched_scripts():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which train.py has run: faces/, data/cache/ and TRAINED."""
    folder = tmp_path_factory.mktemp("trained")
    draw_faces(folder / "faces", 40)
    with untouched_scripts(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--epochs", "8")
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one during the test."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def run(*flags):
    """Train the small model on the drawn faces in the current folder."""
    train.main(["--data", "faces", *SMALL, *flags])


def generate(*flags):
    """Generate with the small model in the current folder, from the first of the drawn faces."""
    genpic.main(["--checkpoint", TRAINED, "--image", "faces", "--device", "cpu", *flags])


def refusal(call, *flags):
    """Call a script with flags that it must refuse; return the sentence, which is one line."""
    with pytest.raises(vae.UserError) as error:
        call(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def start(folder, *command):
    """Start Python in a folder, in a process group of its own, as a shell does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=env, **pipes)


def same_weights(one, other):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    states = [vae.load_checkpoint(path)[0].state_dict() for path in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


@contextmanager
def files_of_at_most(size):
    """Have the system refuse to write files of more bytes than `size`, as if the disk were full."""
    import resource  # Windows has none

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
