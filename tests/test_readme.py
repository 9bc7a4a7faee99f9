"""Tests of the READMEs: their commands run, and the tests that they name exist."""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from faces import draw_faces

import genpic
import train
import vae

TEXT = "\n".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("*/README.md")])
COMMANDS = [shlex.split(line) for line in sorted(set(re.findall(r"\bpython ((?:train|genpic)\.py\b[^`#&|\n]*)", TEXT)))]
SMALL = "--epochs 1 --kl-warmup-epochs 0 --image-size 32 --hidden-dims 4 8 --latent-dim 4 --device cpu".split()


def draw(place):
    """Create the input that a command expects at `place`: an array, archive or folder of photos, or a single photo."""
    if place.suffix == ".npy":
        np.save(place, np.random.default_rng(0).integers(0, 256, (6, 24, 24), dtype=np.uint8))
    elif place.suffix == ".zip":
        shutil.make_archive(place.with_suffix(""), "zip", draw_faces(Path("for the archive"), 6))
    elif place.suffix:
        shutil.copy(ROOT / "tests/portrait.jpg", place)
    else:
        draw_faces(place, 24)
        for number in range(3):
            shutil.copy(ROOT / "tests/portrait.jpg", place / f"{number}.jpg")


@pytest.mark.parametrize("command", [words for words in COMMANDS if "--help" not in words], ids=shlex.join)
def test_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    script, *flags = command
    values = dict(pairwise(flags))
    for name, default in (("--data", "data/demo"), ("--image", genpic.IMAGE), ("--image-to", "you.jpg")):
        draw(Path(values.get(name, default)).expanduser())
    model = vae.VAE(32, 3, [4, 8], 4)
    model.face_box = train.FACE_BOX
    names = "Smiling Eyeglasses Blond_Hair Bangs Male Young".split()
    model.directions = dict(zip(names, torch.ones(6, 4), strict=True))
    vae.save_checkpoint(values.get("--start-from") or values.get("--checkpoint", genpic.CHECKPOINT), model)
    rows = [f"face {number:03d}.jpg,{number % 2}" for number in range(24)]
    Path(values.get("--attributes", "table.csv")).write_text("\n".join(["file,Even", *rows]))
    if script == "genpic.py":
        genpic.main([*flags, "--device", "cpu"])
    else:
        if "--resume" in flags:
            train.main([*flags, "--no-resume", *SMALL])
        train.main([*flags, *SMALL, *(["--epochs", "0"] if values.get("--epochs") == "0" else [])])


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\btest_\w+", TEXT))))
def test_named_tests_exist(name):
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert f"def {name}(" in sources or (ROOT / f"tests/{name}.py").exists()
