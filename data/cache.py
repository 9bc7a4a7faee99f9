"""Decode photos once, into a file of uint8 that is mapped into memory, and load batches from it."""

import functools
import hashlib
import itertools
import os
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.faces import read_square
from vae import UserError, atomic_write

DECODING = 2  # version of the decoding code: increase it when the pixels change, so that old caches are not used


def cached(photos, cut, workers):
    """Return the path of the cache of `photos`; if there is none, decode them first in `workers` processes.

    `cut` contains the arguments of read_square: channels, size, crop and face_box. Unusable photos are listed and
    skipped, copies are left out. Raises UserError if no photo can be used or the file cannot be written. With several
    ranks, rank 0 decodes.
    """
    path = None
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        path = cache_path(photos, cut)
        if not is_complete(path, photos, cut):
            path = cache_folder() / path.name
        if not is_complete(path, photos, cut):
            few = 32 if cut.get("crop") == "face" else 256  # so few that workers would start too slowly
            decode_photos(photos, path, cut, workers if len(photos) > few else 0)
    return share_with_ranks(path)


def is_complete(path, photos, cut):
    """Return whether there is a cache at `path` with a row for each photo that could be used."""
    row_size = cut["size"] ** 2 * cut["channels"]
    try:
        return path.stat().st_size == row_size * len(cached_photos(path, photos))
    except OSError:
        return False


def cached_photos(path, photos):
    """Return those of the photos that could be used: the rows of the cache at `path`."""
    return [*itertools.compress(photos, path.with_suffix(".used").read_bytes())]  # a byte for each photo


def share_with_ranks(path):
    """Return rank 0's path on all ranks, which wait for it."""
    paths = [path]
    if distributed.is_initialized():  # decoding may take longer than the default timeout
        patient = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        distributed.broadcast_object_list(paths, group=patient)
    return paths[0]


def cache_path(photos, cut):
    """Return the path of a cache, which depends on the photos' names, sizes and times and on how they are cropped."""
    digest = hashlib.sha256(f"{DECODING} {sorted(cut.items())}".encode())
    folder = os.path.commonpath([photo.path for photo in photos])  # its location does not matter
    for photo in photos:
        stat = photo.path.stat() if os.path.exists(photo.path) else None  # not for broken links and locked folders
        state = stat and (stat.st_size, stat.st_mtime_ns)
        digest.update(os.fsencode(photo.path.relative_to(folder)) + f"/{photo.member}\0{state}\0".encode())
    shape = f"{cut['size']}x{cut['size']}x{cut['channels']}"
    return Path(f"data/cache/{shape}-{digest.hexdigest()[:16]}.u8")


def cache_folder():
    """Return data/cache, or if it cannot be written to, a folder for temporary files."""
    try:
        Path("data/cache").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir="data/cache").close()
        return Path("data/cache")
    except OSError as error:
        fallback = Path(tempfile.gettempdir(), f"vae-cache-{os.path.basename(os.path.expanduser('~'))}")
        print(f"Cache       in {fallback}, because data/cache cannot be written to ({error.strerror})")
        return fallback


def decode_photos(photos, path, cut, workers):
    """Decode Photos into a file of uint8 (N, H, W, C), with `workers` worker processes (0: in this process)."""
    batches = DataLoader(photos, 16, num_workers=workers, collate_fn=functools.partial(decode_batch, cut=cut))
    used = bytearray()
    checksums = set()
    copies = []
    with atomic_write(path) as file:
        for rows in tqdm(batches, "Reading photos", unit="photo", unit_scale=16, leave=False, disable=None):
            for row in rows:
                if isinstance(row, str):
                    tqdm.write(f"Skipped     {row}")
                elif hash(row) in checksums:  # on both sides of the split, copies would make validation too optimistic
                    copies.append(photos[len(used)])
                else:
                    file.write(row)
                    checksums.add(hash(row))
                    used.append(True)
                    continue
                used.append(False)
        if copies:
            tqdm.write(f"Copies      {len(copies):,} left out, such as {copies[0]}")
        if not file.tell():
            raise UserError(f"None of the {len(photos)} photos can be used; the first is {photos[0]}.")
        with atomic_write(path.with_suffix(".used")) as flags:
            flags.write(used)


def decode_batch(photos, cut):
    """Return for each Photo its row, the bytes of uint8 (H, W, C), or a sentence (str) that says why it has none."""
    rows = []
    for photo in photos:
        try:
            square, crop = read_square(photo, **cut)
            if cut.get("crop") == "face" and not crop:
                raise UserError(f"{photo} shows no face.")
            rows.append(square.tobytes())
        except UserError as error:
            rows.append(str(error))
    return rows


def load_pixels(photos, cut, workers, device):
    """Return Photos as uint8 (N, H, W, C), on the GPU if they fit, else memory-mapped, and those that could be used."""
    path = cached(photos, cut, workers)
    rows = np.memmap(path, np.uint8, "r").reshape(-1, cut["size"], cut["size"], cut["channels"])
    usable = cached_photos(path, photos)
    if photos:  # only rank 0 has them
        size = f"{rows.nbytes / 1e6:,.0f} MB"
        print(f"Photos      {len(rows):,} of {len(photos):,} can be used, cached in {path} ({size})")
    with warnings.catch_warnings(action="ignore"):  # silence the read-only warning
        pixels = torch.from_numpy(rows)
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels, usable


def load_images(pixels, batch, device):
    """Return rows of `pixels`, uint8 (N, H, W, C), at the indices `batch` (B,), as images (B, C, H, W) in [0, 1]."""
    rows = pixels[batch]
    if device.type == "cuda" and not rows.is_cuda:
        rows = rows.pin_memory()  # lets the copy overlap with the GPU's work
    images = rows.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.contiguous().float().div_(255)  # with three channels, channels_last would be slower
