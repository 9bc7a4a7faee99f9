"""Tests of the cache: all photos are decoded once, in order, and again only if they or their crop change."""

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from faces import draw_faces
from PIL import Image

import vae
from data import cache, photos
from data.photos import find_photos


def test_photos_are_decoded_once(workplace):
    first, *others = sorted(draw_faces(Path("few"), 6).iterdir())
    expected = [np.asarray(vae.square_transform(32)(Image.open(path))) for path in (first, *others)]
    arguments = find_photos("few"), {"channels": 3, "size": 32}, 0, torch.device("cpu")
    pixels, usable = cache.load_pixels(*arguments)
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 2
    before = first.stat()
    first.write_bytes(bytes(before.st_size))  # it must not be read again
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(cache.load_pixels(*arguments)[0], pixels) and usable == arguments[0]


def test_copies_of_photos_are_used_once(workplace, capsys):
    draw_faces(Path("few/a"), 6)
    shutil.copytree("few/a", "few/b")
    for said in ("Copies      6 left out, such as few/b/face 000.jpg\n", ""):
        pixels, usable = cache.load_pixels(find_photos("few"), {"channels": 3, "size": 32}, 0, torch.device("cpu"))
        assert len(pixels) == 6 and usable == find_photos("few/a")
        assert capsys.readouterr().out.startswith(f"{said}Photos      6 of 12 can be used, cached in data/cache/")


def test_photos_are_cached_elsewhere_if_the_folder_cannot_be_written_to(workplace, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(workplace / "temporary"))
    shutil.rmtree("data/cache")
    Path("data/cache").touch()
    for _ in range(2):
        cache.load_pixels(find_photos("faces"), {"channels": 3, "size": 32}, 0, torch.device("cpu"))
        said = capsys.readouterr().out
        assert re.match(r"Cache       in (.*/temporary/vae-cache-\w+), because data/cache cannot be written to", said)
    assert len([*Path("temporary").glob("vae-cache-*/*.u8")]) == 1


def test_the_cache_depends_on_photos_and_crop_but_not_on_the_folder(tmp_path, monkeypatch):
    cut = {"channels": 3, "size": 32, "crop": "center", "face_box": None}
    folder = draw_faces(tmp_path / "faces", 3)
    changes = [
        lambda: os.utime(folder / "face 000.jpg", (1, 1)),
        lambda: os.truncate(folder / "face 001.jpg", 9),
        lambda: (folder / "face 002.jpg").rename(folder / "renamed.jpg"),
        lambda: cut.update(size=16),
        lambda: cut.update(crop="face"),
        lambda: monkeypatch.setattr(cache, "DECODING", 0),
    ]
    paths = {cache.cache_path(find_photos(folder), cut)}
    for change in changes:
        change()
        paths.add(cache.cache_path(find_photos(folder), cut))
    assert len(paths) == 7
    moved = folder.rename(tmp_path / "moved")
    assert cache.cache_path(find_photos(moved), cut) in paths


@pytest.mark.parametrize("count", [200, 600])  # more than 256 are decoded in worker processes
def test_a_large_folder_is_decoded_completely_and_in_order(workplace, capsys, count):
    Path("many").mkdir()
    broken = [0, 7, 100, 101, count - 1]
    for number in range(count):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(f"many/{number:03d}.png")
    for number in broken:
        Path(f"many/{number:03d}.png").write_bytes(b"")
    pixels = cache.load_pixels(find_photos("many"), {"channels": 3, "size": 16}, 2, torch.device("cpu"))[0].long()
    assert [int(n) for n in re.findall(r"Skipped     many/(\d+)\.png", capsys.readouterr().out)] == broken
    assert (pixels[:, 3, 5, 0] + 256 * pixels[:, 3, 5, 1]).tolist() == sorted({*range(count)} - {*broken})


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_running_out_of_memory_or_file_handles_does_not_skip_photos(error, workplace, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(photos, "open_photo", fail)
    draw_faces(Path("few"), 6)
    with pytest.raises((MemoryError, vae.UserError), match=r"^$|Too many open files"):
        run("--data", "few", "--epochs", "1")
    assert len(list(Path("data/cache").glob("*.u8"))) == 1  # the cache of the earlier run
