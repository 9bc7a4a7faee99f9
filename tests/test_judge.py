"""The figures of judge.py, where they can be known without a face recogniser."""

import sys
from itertools import combinations
from types import SimpleNamespace

import judge
import numpy as np
import pytest
from conftest import TRAINED, refusal


def test_frechet_distance_of_gaussians():
    one = np.random.default_rng(0).standard_normal((50_000, 3))
    assert judge.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert judge.frechet_distance(one, one + [1, 2, 3]) == pytest.approx(14, abs=1e-9)
    other = np.random.default_rng(1).standard_normal((50_000, 3)) * [1, 2, 5]  # the sum of the (sigma - sigma')^2
    assert judge.frechet_distance(one, other) == pytest.approx(0 + 1 + 16, rel=0.02)


def test_frechet_distance_of_correlated_gaussians():
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((500, 4)) @ random.standard_normal((4, 4)) for _ in range(2))
    covariances = np.cov(one.T), np.cov(other.T)
    values, axes = np.linalg.eigh(covariances[0])
    root = axes * np.sqrt(values) @ axes.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root))
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(sum(covariances)) - 2 * roots.sum()
    assert judge.frechet_distance(one, other) == pytest.approx(expected)


def test_too_few_faces_have_no_frechet_distance():
    few, many = np.random.default_rng(0).standard_normal((2, 300, 128))
    for count in (0, 1, 128):
        assert np.isnan(judge.frechet_distance(few[:count], many))
        assert np.isnan(judge.frechet_distance(many, few[:count]))
    assert judge.frechet_distance(few[:129], many) > 0


def test_pictures_without_a_face_do_not_count():
    found = np.array([[[3.0, 4.0]], [[np.nan, np.nan]], [[6.0, 8.0]]])
    assert judge.share_found(found) == pytest.approx(100 * 2 / 3)
    assert judge.distance(found, np.zeros((3, 1, 2))) == pytest.approx(7.5)
    people = np.random.default_rng(0).standard_normal((100, 2))
    assert judge.frechet_distance(np.concatenate([people, found[1]]), people) == pytest.approx(0, abs=1e-9)


def test_figures_are_of_the_pictures(workplace, monkeypatch, capsys):
    pictures = {}

    def describe(these, name):
        pictures[name] = these.astype(float)
        return these.reshape(len(these), -1)[:, ::24].astype(float)

    monkeypatch.setattr(judge, "describe", describe)
    monkeypatch.setattr(judge, "find_spec", lambda name: True)
    metrics = SimpleNamespace(structural_similarity=lambda one, other, **_: np.abs(one - other.astype(float)).mean())
    monkeypatch.setitem(sys.modules, "skimage", SimpleNamespace(metrics=metrics))
    monkeypatch.setitem(sys.modules, "skimage.metrics", metrics)
    judge.main(["--checkpoint", TRAINED, "--photos", "faces", "--varied", "3"])
    said = capsys.readouterr().out

    photos, recon = pictures["photos"], pictures["reconstructions"]
    error = photos - recon
    psnr, mean = 10 * np.log10(255**2 / np.square(error).mean()), np.abs(error).mean()
    assert f"of 40 reconstructions: PSNR {psnr:.2f} dB, SSIM {mean:.3f}" in said
    assert "100.0 % of photos" in said and "reconstructions nan, samples nan" in said
    found = {name: describe(these, name) for name, these in pictures.copy().items()}

    def apart(one, other, rows=slice(None)):
        return np.linalg.norm(found[one] - found[other][rows], axis=1).mean()

    before = np.arange(-1, 39)  # of each, the one before it
    assert f"Person      {apart('photos', 'reconstructions'):.3f} from" in said
    assert f"{apart('photos', 'photos', before):.3f} between photos" in said
    assert f"{apart('reconstructions', 'reconstructions', before):.3f} between reconstructions" in said
    for w in ("0.01", "1"):
        these = pictures[f"W = {w}"]
        assert len(np.unique(these, axis=0)) == 30
        pairs = [these[[10 * k + i, 10 * k + j]] for k in range(3) for i, j in combinations(range(10), 2)]
        levels = np.mean([np.sqrt(np.square(one - other).mean()) for one, other in pairs])
        chosen = np.repeat(found["reconstructions"][[0, 19, 39]], 10, axis=0)
        distance = np.linalg.norm(found[f"W = {w}"] - chosen, axis=1).mean()
        assert f"W = {w:<8}{levels:.1f} grey levels between two variations, {distance:.3f} from the" in said


def test_what_judge_cannot_do_is_a_sentence(workplace, monkeypatch, capsys):
    for flags in ([], ["--photos", "faces", "--varied", "0"]):
        assert refusal(judge.main, capsys, flags)[0] == 2
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    code, said = refusal(judge.main, capsys, ["--photos", "faces"])
    assert code == 1 and "There is no dlib" in said
