"""The README tells the truth about the constants, the tests that it names are there, and its commands run."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from faces import draw_face, draw_faces

import genpic
import train
import vae


@pytest.mark.parametrize("script", [vae, train, genpic])
def test_the_tables_hold_every_constant_with_its_default_and_comment(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    constants = re.findall(r"^([A-Z_0-9]+): \S+ = (.*?)  # (.*)$", source, re.MULTILINE)
    assert sorted(name for name, *_ in constants) == sorted(script.__annotations__)
    table = "\n".join(f"| `{name}` | `{default}` | {comment} |" for name, default, comment in constants)
    assert f"| --- | --- | --- |\n{table}\n\n" in (ROOT / "README.md").read_text()


def test_the_tests_that_it_names_are_there():
    named = re.findall(r"`(test_\w+)(…?)`", (ROOT / "README.md").read_text())
    defined = " ".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) >= 20
    for name, more in named:
        assert re.search(rf"def {name}{'' if more else '[(]'}", defined), name


def commands(script):
    """Return the flags of each of the README's commands that run a script."""
    line = "[^`#&\n]*"
    found = re.findall(rf"\bpython {script}\.py({line}(?:\n--{line})*)", (ROOT / "README.md").read_text())
    return [shlex.split(flags) for flags in dict.fromkeys(map(str.strip, found))]


def test_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home/photos", "data/demo", "data/tested_data", "FACES", "FOLDER", "tiny-imagenet/train/n01"):
        draw_faces(tmp_path / folder, 6)
    for photo in ("me.jpg", "you.jpg", "A.jpg", "B.jpg"):
        draw_face(7, size=(600, 700)).save(photo)
    np.save("faces24.npy", np.random.default_rng(0).integers(0, 256, (6, 24, 24), dtype=np.uint8))
    shutil.make_archive("img_align_celeba", "zip", "FACES")
    small = "--hidden-dims 4 8 --latent-dim 4 --device cpu".split()
    for flags in commands("train"):
        size = [] if "--image-size" in flags else ["--image-size", "32"]
        short = ["--epochs", "1"] if flags and "--output-dir" not in flags else []  # other commands use these models
        train.main([*flags, *size, *small, *short])
    for flags in commands("genpic"):
        genpic.main([*flags, "--device", "cpu"])
    assert len(commands("train")) >= 8 and len(commands("genpic")) >= 14
