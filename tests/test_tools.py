"""What benchmark.py and judge.py print, as far as it can be known without a face recogniser and a quiet machine."""

import json
import math
import sys
from subprocess import PIPE, Popen
from types import SimpleNamespace

import judge
import numpy as np
import pytest
from conftest import ROOT, TRAINED, refusal

TINY = "--count 32 --cached 40 --image-size 32 --hidden-dims 4 --matrix 16 --rounds 0 --device cpu".split()


def benchmark(*flags):
    """Start benchmark.py on a tiny model."""
    return Popen([sys.executable, ROOT / "tests/benchmark.py", *TINY, *flags], stdout=PIPE, stderr=PIPE, text=True)


def test_benchmark_prints_lines_and_json():
    runs = [benchmark("--json"), benchmark()]
    figures, lines = (run.communicate(timeout=300)[0] for run in runs)
    figures, lines = json.loads(figures), lines.splitlines()
    assert [line[:50].strip() for line in lines] == list(figures)
    assert all(map(math.isfinite, [*figures.values(), *(float(line[50:]) for line in lines)]))
    assert figures["ratio"] == figures["ours, images/s"] / figures["plain, images/s"] > 0


def test_benchmark_ends_with_the_error_of_a_process_that_failed(workplace):
    (workplace / "faces/broken.jpg").write_bytes(b"no photo")
    run = benchmark("--photos", "faces")
    said, error = run.communicate(timeout=300)
    assert run.returncode == 1 and not said and "UnidentifiedImageError" in error
    assert error.splitlines()[-1].startswith("benchmark.py: The process that measures `plain` has failed")


@pytest.mark.parametrize("factor", [np.eye(3), np.diag([1, 2, 5]), np.array([[2, 1, 0], [1, 3, 1], [0, 1, 2]])])
def test_frechet_distance_is_how_far_one_gaussian_moves_to_become_the_other(factor):
    random = np.random.default_rng(0)
    one = random.standard_normal((10_000, 3)) @ random.standard_normal((3, 3))
    other = one @ factor + [1, 2, 3]  # no other way is shorter, as the factor is symmetric and positive
    assert judge.frechet_distance(one, other) == pytest.approx(np.square(one - other).sum(1).mean(), rel=1e-3)


def stand_in(picture):
    """Some of a picture's values in the place of a descriptor; in one with a light corner no face is found."""
    return np.where(picture[0, 0, 0] > 200, np.nan, picture.reshape(-1)[::24])


def test_judge_prints_figures_of_the_pictures(workplace, monkeypatch, capsys):
    kept, describe = {}, judge.describe

    def describe_and_keep(images, name):
        kept[name] = describe(images, name)
        return kept[name]

    ssim = SimpleNamespace(structural_similarity=lambda one, other, **_: np.abs(one - other.astype(float)).mean())
    monkeypatch.setitem(sys.modules, "skimage.metrics", ssim)
    for name, value in {"recogniser": bool, "descriptor": stand_in, "describe": describe_and_keep}.items():
        monkeypatch.setattr(judge, name, value)
    judge.main(["--checkpoint", TRAINED, "--photos", "faces", "--varied", "3"])
    said = capsys.readouterr().out
    photos, faces = kept["photos"]
    recon, recon_faces = kept["reconstructions"]
    varied, varied_faces = kept["W = 1"]
    error = photos / 255 - recon / 255
    assert f"PSNR {-10 * np.log10(np.square(error).mean()):.2f} dB, SSIM {255 * np.abs(error).mean():.3f}" in said
    assert f"{2.5 * np.isfinite(faces[:, 0]).sum():.1f} % of photos" in said  # of 40
    assert "reconstructions nan, samples nan" in said
    origins = recon_faces[[0, 19, 39]].repeat(10, 0)
    pairs = [(faces, recon_faces), (faces, faces[range(-1, 39)]), (varied_faces, origins)]
    to_recon, to_others, moved = (np.nanmean(np.linalg.norm(one - other, axis=1)) for one, other in pairs)
    assert f"Person      {to_recon:.3f} from" in said and f"{to_others:.3f} between photos of two" in said
    values = varied.astype(float).reshape(3, 10, -1)
    levels = [np.square(values[:, i] - values[:, j]).mean(1) ** 0.5 for i in range(10) for j in range(i)]
    assert f"W = 1       {np.mean(levels):.1f} grey levels between two variations, {moved:.3f} from the" in said


def test_judge_names_the_package_that_is_missing(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    assert "no dlib:" in refusal(judge.main, ["--checkpoint", TRAINED, "--photos", "faces"])
