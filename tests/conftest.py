"""What the tests share: faces that they draw themselves, and a small model trained on them by train.py."""

import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small models are faster without threads

import genpic
import train

ROOT = Path(__file__).parent.parent
SMALL = "--image-size=32 --hidden-dims 8 16 --latent-dim=8 --batch-size=8 --learning-rate=0.01 --device=cpu".split()
TRAINED = "checkpoints_best/vae_model_8.pth"


def draw_face(seed, size=(48, 56)):
    """Return a drawn face (PIL, RGB): an ellipse of some skin colour with eyes and a mouth, before some background."""
    dice = random.Random(seed)
    picture = Image.new("RGB", (100, 120), tuple(dice.choices(range(256), k=3)))
    skin, dark = [dice.randint(120, 250) for _ in range(3)], tuple(dice.choices(range(90), k=3))
    x, y = dice.randint(40, 60), dice.randint(52, 68)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - 28, y - 38, x + 28, y + 38), fill=tuple(skin))
    for eye in (x - 12, x + 12):
        draw.ellipse((eye - 5, y - 12, eye + 5, y - 5), fill=dark)
    draw.arc((x - 14, y + 2, x + 14, y + dice.randint(18, 30)), 20, 160, fill=dark, width=4)
    return picture.resize(size, Image.Resampling.BICUBIC)


def draw_faces(folder, count):
    """Write so many drawn faces into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        draw_face(seed).save(folder / f"face {seed:03d}.jpg", quality=95)
    return folder


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


def refusal(call, capsys, *flags):
    """Call a script with flags that it must refuse; return its exit code and the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return stop.value.code, said
