"""Tests of benchmark.py and judge.py, without a face recognition network and a quiet machine."""

import math
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import benchmark
import judge
import numpy as np
import pytest
from conftest import ROOT, TRAINED, generate

TINY = "--count 64 --cached 40 --image-size 32 --hidden-dims 4 --rounds 0 --device cpu".split()
PEERS = ["--peers"] if find_spec("pythae") and find_spec("lightning") else []


def measure(*flags):
    """Return the results that benchmark.py prints."""
    command = [sys.executable, ROOT / "tests/benchmark.py", *TINY, *flags]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout.splitlines()
    return {line[:50].strip(): float(line[50:]) for line in lines}


def test_benchmark_prints_a_line_for_each_figure():
    figures = measure(*PEERS)
    assert len(figures) > 8 and all(0 < figure < math.inf for figure in figures.values())


def test_benchmark_measures_the_time_to_quality():
    figures = measure("--quality", "--epochs", "2")
    assert figures["plain, epochs"] in (1, 2) and figures["ours, epochs"] >= 1
    assert min(figures["plain, s"], figures["ours, s"], figures["plain / ours"]) > 0


def test_benchmark_takes_the_median_of_all_rounds_but_the_first(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 3)
    one = ({"a": figure} for figure in (100, 5, 1, 2))
    other = ({"b": figure} for figure in (200, 3, 9, 4))
    assert benchmark.in_turns(one, other) == {"a": 2, "b": 4}


@pytest.mark.parametrize("factor", [np.eye(3), np.diag([1, 2, 5]), np.array([[2, 1, 0], [1, 3, 1], [0, 1, 2]])])
def test_frechet_distance_is_the_optimal_transport_cost(factor):
    random = np.random.default_rng(0)
    one = random.standard_normal((10_000, 3)) @ random.standard_normal((3, 3))
    other = one @ factor + [1, 2, 3]  # the optimal transport, because the factor is symmetric and positive definite
    assert judge.frechet_distance(one, other) == pytest.approx(np.square(one - other).sum(1).mean(), rel=1e-3)


def stand_in(picture):
    """Return some of a picture's values as a stand-in for its descriptor."""
    return picture.reshape(-1)[::24].astype(float)


def test_judge_prints_metrics(workplace, monkeypatch, capsys):
    generate("--mode", "reconstruct")
    psnr = float(re.search(r"^PSNR +(.*) dB", capsys.readouterr().out, re.MULTILINE)[1])
    monkeypatch.setitem(sys.modules, "skimage.metrics", SimpleNamespace(structural_similarity=lambda *_, **__: 0.5))
    monkeypatch.setattr(judge, "recogniser", bool)
    monkeypatch.setattr(judge, "descriptor", stand_in)
    judge.main(["--checkpoint", TRAINED, "--photos", "faces", "--varied", "3"])
    said = capsys.readouterr().out
    assert float(re.search(r"PSNR (.*) dB, SSIM 0\.500", said)[1]) == pytest.approx(psnr, abs=0.03)
    assert "100.0 % of photos" in said
    near, far = (float(re.search(words, said)[1]) for words in (r"Person +(.*) from a photo", " (.*) between photos"))
    assert 0 < near < far
    for figures in zip(*re.findall(r"^W = \S+ +(.*) grey levels .*, (.*) from", said, re.MULTILINE), strict=True):
        assert len(figures) == 5 and sorted(figures, key=float) == list(figures)  # they grow with W
    fitted = re.findall(r"^W = \S+ +(.*) from the photo, (.*) grey levels from the fitted", said, re.MULTILINE)
    for figures in zip(*fitted, strict=True):
        assert len(figures) == 3 and max(figures, key=float) == figures[-1]
    assert fitted[0][1] == "0.0" and "100.0 % of 18 frames" in said
