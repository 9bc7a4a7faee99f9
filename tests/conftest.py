"""What the tests share: a small model that train.py has trained on drawn faces, and how to call the scripts."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from faces import draw_faces

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small models are faster without threads

import torch

import genpic
import train
import vae

ROOT = Path(__file__).parent.parent
SMALL = (
    "--image-size=32 --hidden-dims 8 16 --latent-dim=8 --batch-size=8 --learning-rate=0.01 --device=cpu "
    "--reconstruction=mse"  # of which so small a model learns the most in a few steps
).split()
TRAINED = "checkpoints_best/vae_model_8.pth"


@pytest.fixture(autouse=True)
def untouched_constants():
    """Put back the constants of the scripts that a test has changed."""
    before = [(module, dict(vars(module))) for module in (train, genpic)]
    yield
    for module, constants in before:
        vars(module).update(constants)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which train.py has run: faces/, data/cache/ and TRAINED."""
    folder = tmp_path_factory.mktemp("trained")
    draw_faces(folder / "faces", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--data", "faces", "--epochs", "8", *SMALL])
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one during the test."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def unprivileged(workplace):
    """That copy, used by somebody who may not do everything, as root may."""
    if sys.platform == "win32":
        pytest.skip("has other permissions")
    if is_root := os.geteuid() == 0:
        for path in [workplace, *workplace.rglob("*")]:
            os.chown(path, 65534, 65534)
        for folder in workplace.parents[:3]:  # pytest's own
            folder.chmod(0o711)
        os.seteuid(65534)
    try:
        if not os.access(ROOT / "vae.py", os.R_OK, effective_ids=is_root):
            pytest.skip("needs scripts that everybody may read")
        yield workplace
    finally:
        if is_root:
            os.seteuid(0)


def run(*flags):
    """Train the small model on the drawn faces in the current folder."""
    train.main(["--data", "faces", *SMALL, *flags])


def generate(*flags):
    """Generate with the small model in the current folder, from the first of the drawn faces."""
    genpic.main(["--checkpoint", TRAINED, "--image", "faces", "--device", "cpu", *flags])


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


def refusal(call, capsys, *flags):
    """Call a script with flags that it must refuse; return its exit code and the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return stop.value.code, said
