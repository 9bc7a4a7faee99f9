"""The model that comes with the scripts, and the first things that people do with it."""

import re
import shutil
import subprocess
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from faces import draw_faces
from PIL import Image

import genpic
import train
from vae import load_checkpoint

MODEL, PHOTO = "checkpoints_best/vae_model_20.pth", "data/tested_data/sample.jpg"


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with the model and its photo, which is the current one during the test."""
    if (ROOT / "checkpoints_best/last.pth").exists():
        pytest.skip("a run has left its own model there")
    for name in (MODEL, PHOTO):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_tells_what_it_is(newcomer):
    model, info = load_checkpoint(MODEL)
    assert (newcomer / MODEL).stat().st_size < 17e6
    assert "CelebA" in info["about"] and "research use" in info["about"]
    assert info["constants"]["EPOCHS"] == 20 and not {"DATA", "OUTPUT_DIR"} & info["constants"].keys()
    assert model.config == {"image_size": 150, "channels": 3, "hidden_dims": [32, 64, 128, 256, 512], "latent_dim": 128}
    assert model.prior_is_fitted()
    stored, learnt = torch.load(MODEL, weights_only=True)["state_dict"], dict(model.named_parameters())
    for name, tensor in model.state_dict().items():  # what was measured is kept as it is
        assert stored[name].dtype == (torch.float16 if name in learnt else tensor.dtype)
        assert tensor.dtype in (torch.float32, torch.int64)


def test_the_first_command_varies_a_face(newcomer, capsys):
    assert Image.open(PHOTO).size == (178, 218)
    genpic.main([])
    said = capsys.readouterr().out
    assert PHOTO in said and "research use" in said and "far below" not in said
    sheet = np.asarray(Image.open("generated_images_grid2.jpg"), float)
    tiles = [sheet[y : y + 150, x : x + 150] for y in (2, 154) for x in range(2, 6 * 152, 152)]
    apart = [np.sqrt(np.square(one - other).mean()) for one, other in combinations(tiles[2:], 2)]
    assert 3 < np.mean(apart) < 15  # grey levels
    assert np.sqrt(np.square(tiles[0] - tiles[1]).mean()) < 12  # the reconstruction is one of the photo


def test_a_first_run_keeps_it(newcomer, capsys):
    shipped = (newcomer / MODEL).read_bytes()
    draw_faces(newcomer / "data/demo", 8)
    train.main([*SMALL, "--epochs", "20"])
    assert (newcomer / MODEL).read_bytes() != shipped
    back = re.search(
        r"kept as checkpoints_best/vae_model_20.previous.pth \(`(mv .*)` brings it back", capsys.readouterr().out
    )
    subprocess.run(back[1], shell=True, check=True)
    assert (newcomer / MODEL).read_bytes() == shipped
