"""Train the variational autoencoder of vae.py on a folder of photos.

    python train.py                               # the photos in data/train (the demo faces while there are none)
    python train.py --data ~/photos --epochs 5    # every constant at the top of the script is a flag
    python train.py --resume                      # go on where an interrupted run stopped
    torchrun --nproc-per-node 4 train.py          # on four GPUs

Writes checkpoints_best/vae_model_20.pth (the best weights, for genpic.py), last.pth (to resume), history.csv,
loss_curves.png, latent_space.png and progress/ with pictures of every epoch.
"""

import copy
import ctypes
import errno
import functools
import hashlib
import itertools
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import vae
from vae import CHANNELS, HIDDEN_DIMS, IMAGE_SIZE, LATENT_DIM, UserError, require

# What goes in and out
DATA: str = "data/train"  # folder of photos, searched with all folders in it; or a .zip of photos, a .npy array
OUTPUT_DIR: str = "checkpoints_best"  # folder for the checkpoints, curves and pictures of the run
RESUME: bool = False  # go on with the run that OUTPUT_DIR/last.pth holds, instead of starting anew
VAL_FRACTION: float = 0.05  # share of the photos held out to validate on; more gives steadier validation figures
FLIP: bool = True  # mirror half of the photos, drawn anew each time; turn off where left and right differ in meaning

# How the model learns
EPOCHS: int = 20  # passes over the photos; also the number in the checkpoint's name
BATCH_SIZE: int = 16  # photos per step, of all GPUs together; raise it on large ones, lower it where memory runs out
LEARNING_RATE: float = 1e-3  # Adam's peak step size, reached after 5 % of the run; lower it if the loss jumps about
RECONSTRUCTION: str = "ssim"  # "mse" squared error, "ssim" also structure, "bce" cross-entropy, "sigma" finds its BETA
BETA: float = 0.132  # weight of the KL divergence in nats, unused by "sigma"; higher: plainer samples, blurrier photos
KL_WARMUP_EPOCHS: float = 0.0  # epochs over which the KL weight grows from 0; a few help where latents stay unused
SEED: int = 0  # start of all random numbers; another one gives another split, order and model

# What it runs on
DEVICE: str = "auto"  # "auto" is CUDA where there is one, else the CPU; or name a device: "cpu", "cuda:1"
AMP: bool = True  # compute in bfloat16 where the hardware has it: much faster, the same pictures
COMPILE: str = "auto"  # "yes" compiles the model first (a minute), "auto" only on CUDA, "no" never


def seed_of(use, *numbers):
    """Return the seed (int) of one stream of random numbers: a pure function of SEED, its use (bytes) and numbers."""
    return int(np.random.SeedSequence((SEED, *use, *numbers)).generate_state(1, np.uint64)[0])


# Losses: per image, summed over pixels and latents, so that "bce" or "sigma" plus the KL divergence bounds -log p(x)
def reconstruction_loss(recon, x, kind):
    """Loss (B,) of images (B, C, H, W) in [0, 1], summed over pixels, in float32.

    "mse" is the squared error, "ssim" that plus 0.01 (1 - SSIM) for each value of the image, "bce" the binary
    cross-entropy in nats, "sigma" the calibrated Gaussian in nats.
    """
    recon, x = recon.float(), x.float()
    if kind == "bce":
        recon = recon.clamp(1e-7, 1 - 1e-7)  # a sigmoid reaches 0 and 1, where the logarithms are infinite
        return -(x * recon.log() + (1 - x) * (1 - recon).log()).sum((1, 2, 3))
    squared_error = (recon - x).square().sum((1, 2, 3))
    if kind == "ssim":
        return squared_error + 0.01 * x[0].numel() * (1 - structural_similarity(recon, x))
    return calibrated_nll(squared_error, x[0].numel()) if kind == "sigma" else squared_error


def structural_similarity(one, other):
    """Mean SSIM (B,) of images (B, C, H, W) in [0, 1], over the windows of 8 x 8 pixels, 4 apart, that fit in whole.

    Wang, Bovik, Sheikh & Simoncelli 2004, "Image quality assessment", with its constants: where the squared error asks
    how far off a pixel is, this asks whether the pattern around it is there, however faint.
    """
    mean = functools.partial(nn.functional.avg_pool2d, kernel_size=8, stride=4)
    mean_one, mean_other = mean(one), mean(other)
    covariance = mean(one * other) - mean_one * mean_other
    energy = mean_one.square() + mean_other.square()
    variances = mean(one.square() + other.square()) - energy
    luminance = (2 * mean_one * mean_other + 0.01**2) / (energy + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean((1, 2, 3))


def calibrated_nll(squared_error, pixels):
    """Negative log-likelihood (B,) in nats of errors (B,) under the Gaussian whose variance fits this very batch.

    The analytic decoder variance of sigma-VAE: Rybkin, Daniilidis & Levine 2021, arXiv:2006.13202.
    """
    variance = (squared_error.mean() / pixels).clamp_min(1e-8)
    return 0.5 * (squared_error / variance + pixels * torch.log(2 * math.pi * variance))


def kl_per_latent(mu, log_var):
    """KL(N(mu, exp(log_var)) || N(0, 1)) of each latent, (B, L) -> (B, L), in nats (Kingma & Welling 2014, app. B)."""
    mu, log_var = mu.float(), log_var.float()
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1)


def kl_divergence(mu, log_var):
    """KL(N(mu, exp(log_var)) || N(0, I)) of each image, (B, L) -> (B,), in nats: the latents' sum."""
    return kl_per_latent(mu, log_var).sum(1)


def active_units(mu):
    """Return for each latent (L,) whether the codes mu (N, L) of photos make use of it: their variance is over 0.01.

    Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519, section 5.2.
    """
    return mu.var(0, correction=0) > 0.01


# Photos
def find_photos():
    """Return the photos to learn from, and their names below DATA (the demo faces while data/train is empty)."""
    place = Path(DATA)
    usable = place.exists() and (place.is_dir() or vae.is_container(place))
    photos = vae.find_photos(place, without=OUTPUT_DIR) if usable else []
    empty = not photos and place == Path("data/train") and not any(map(vae.is_container, place.rglob("*")))
    if empty and (photos := vae.find_photos("data/demo")):
        print("There are no photos in data/train yet, so this run learns from the demo faces in data/demo.")
        place = Path("data/demo")
    if not photos:
        state = "holds no photos" if usable else "is no folder, .zip or .npy" if place.exists() else "does not exist"
        raise UserError(
            f"DATA {place.absolute()} {state}: put photos into data/train, or name where they are with --data. "
            f"CelebA's img_align_celeba.zip, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, will do as it is.",
            2,
        )
    return photos, [f"{photo.path.relative_to(place).as_posix()}/{photo.member}" for photo in photos]


def load_photos(photos, names, device):
    """Return the photos as a uint8 tensor (N, H, W, C): on the GPU where they fit, else mapped from the cache file."""
    decoded, cache = decode_photos(photos, names, IMAGE_SIZE, CHANNELS)
    skipped = f" ({len(photos) - len(decoded)} files skipped)" if len(photos) > len(decoded) else ""
    print(f"Photos      {len(decoded):,}{skipped}, kept as {cache} ({decoded.nbytes / 1e6:,.0f} MB)")
    if len(decoded) < 2 * processes() + 1:
        needed = f"{2 * processes()} to train on and 1 to validate on"
        raise UserError(f"There are {len(decoded)} readable photos: a run needs at least {needed}.")
    with warnings.catch_warnings(action="ignore"):  # that nothing may be written to it, for nothing is
        decoded = torch.from_numpy(decoded)
    fits = device.type == "cuda" and decoded.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return decoded.to(device) if fits else decoded


def decode_photos(photos, names, size, channels):
    """Return the photos as an array of uint8 (N, size, size, channels), mapped from a file, and the file's path.

    They are decoded only where the file is not there yet, or not whole. What cannot be read is named and left out.
    Raises UserError where none can be read, or the file cannot be written.
    """
    cache, each = cache_path(photos, names, size, channels), size * size * channels

    def is_whole():
        length = cache.stat().st_size if cache.exists() else 0
        return length > 0 and length % each == 0

    if not is_whole():
        with claimed(cache.parent, f"the decoded photos take {len(photos) * each / 1e6:,.2f} MB there", wait=True):
            if not is_whole():  # another run may have built it meanwhile
                build_cache(photos, cache, size, channels)
    return np.memmap(cache, np.uint8, "r").reshape(-1, size, size, channels), cache


def cache_path(photos, names, size, channels):
    """Return where decoded photos are kept; it changes with their names, their files' sizes and times, and the size."""

    def version(path):
        with suppress(OSError):  # a link to nowhere has none
            stat = path.stat()
            return stat.st_size, stat.st_mtime_ns, stat.st_mode  # the mode, as it may have kept a photo from being read

    lines = [f"{name} {version(photo.path)}" for name, photo in zip(names, photos, strict=True)]
    return Path(f"data/cache/{size}x{size}x{channels}-{digest(lines)}.u8")


def digest(lines):
    """Return a short name (16 hexadecimal digits) of a list of texts, another one for any other list."""
    return hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def build_cache(photos, cache, size, channels):
    """Decode, scale and crop every photo once, on all cores, into a file of uint8 (N, size, size, channels)."""
    workers = cores() if cores() > 1 and len(photos) > 256 else 0  # processes: for few photos they start too slowly
    context = "fork" if workers and sys.platform == "linux" else None  # elsewhere each has to import PyTorch first
    each, kept = size * size * channels, []
    with vae.partial_file(cache, len(photos) * each) as partial:
        if shutil.disk_usage(cache.parent).free < len(photos) * each:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.touch()
        os.truncate(partial, len(photos) * each)
        crop = functools.partial(crop_photos, path=partial, size=size, channels=channels)
        options = {"num_workers": workers, "multiprocessing_context": context, "collate_fn": crop}
        errors = itertools.chain.from_iterable(DataLoader(list(enumerate(photos)), 16, **options))
        for k, error in enumerate(tqdm(errors, "Reading photos", len(photos), unit="photo", leave=False, disable=None)):
            if isinstance(error, OSError):  # of the cache, not of the photo
                raise error
            if error:
                tqdm.write(f"Skipped: {error}")
            else:
                kept.append(k)
        if not kept:
            raise UserError(f"None of the {len(photos)} photos can be read; the first is {photos[0]}.")
        if len(kept) < len(photos):  # close the gaps
            rows = np.memmap(partial, np.uint8, "r+").reshape(-1, each)
            for place, k in enumerate(kept):
                rows[place] = rows[k]
            del rows
        os.truncate(partial, len(kept) * each)


def crop_photos(photos, path, size, channels):
    """Scale and crop photos, given as pairs (k, Photo), into row k of a file; return the error of each, or None."""
    errors, crop = [], vae.celeb_transforms(size)[1]
    with open(path, "r+b") as file:
        for k, photo in photos:
            try:
                pixels = crop(vae.read_image(photo, channels, size)).tobytes()
                file.seek(k * len(pixels))
                file.write(pixels)
                file.flush()
                errors.append(None)
            except (UserError, OSError) as error:
                errors.append(error)
    return errors


def ahead(function, items):
    """Yield function(item) for each item, while a thread is at work on the next one."""
    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(function, item) for item in items)
        for current, _ in itertools.pairwise(itertools.chain(futures, [None])):
            yield current.result()


def split_photos(count):
    """Return the indices to train on, at least 2 for each process, and to validate on, at least 1, drawn by SEED."""
    held_out = min(max(1, round(count * VAL_FRACTION)), count - 2 * processes())
    indices = torch.from_numpy(np.random.default_rng(seed_of(b"split")).permutation(count))
    return indices[held_out:], indices[:held_out]


def load_batches(photos, batches, device):
    """Yield the photos, of uint8 (N, H, W, C), at each of `batches`, lists of indices, as images on `device`.

    Images are (B, C, H, W) in [0, 1], channels last in memory. Photos that are mapped from a file are gathered one
    batch ahead by a thread, for the disk may be slow; NumPy does that, as PyTorch's threads are busy with the model.
    """

    def gather(batch):
        rows = torch.from_numpy(photos.numpy()[batch.numpy()])
        if device.type != "cuda":
            return rows
        with torch.cuda.device(device):  # threads start on the first GPU
            return rows.pin_memory()

    all_rows = map(photos.__getitem__, batches) if photos.is_cuda else ahead(gather, batches)
    for rows in all_rows:
        yield rows.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def mirror_half(images):
    """Flip each image (B, C, H, W) left to right with probability 1/2."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


# Schedules: pure functions of the progress, the share in [0, 1] of the run's steps that is done
def learning_rate(progress):
    """One cycle: a linear rise to LEARNING_RATE over the first 5 % of the run, then a cosine down to 0."""
    fall = (progress - 0.05) / 0.95
    return LEARNING_RATE * (progress / 0.05 if fall < 0 else 0.5 * (1 + math.cos(math.pi * fall)))


def kl_weight(progress):
    """BETA (1 for "sigma", which needs no weight) after a linear rise from 0 over KL_WARMUP_EPOCHS."""
    final = 1.0 if RECONSTRUCTION == "sigma" else BETA
    return final * min(1.0, progress * EPOCHS / KL_WARMUP_EPOCHS) if KL_WARMUP_EPOCHS else final


# Training and validation
def autocast(device):
    """Return the context that the model runs in: bfloat16 where AMP and the hardware allow it, else no change."""
    return torch.autocast(device.type, torch.bfloat16, enabled=AMP and has_bfloat16(device.type))


def new_model(device):
    """Return a model on `device`, its weights drawn by SEED, and its optimizer."""
    torch.manual_seed(seed_of(b"init"))
    model = vae.VAE(IMAGE_SIZE, CHANNELS, HIDDEN_DIMS, LATENT_DIM).to(device, memory_format=torch.channels_last)
    if processes() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, torch.optim.Adam(model.parameters(), fused=True)


def compiled(model, device, batch_size):
    """Return `model` compiled as COMPILE asks, or as it is where compiling fails; both share their weights."""
    if COMPILE == "no" or (COMPILE == "auto" and device.type != "cuda"):
        return model
    network, before = torch.compile(model, dynamic=False), copy.deepcopy(model.state_dict())
    images = torch.zeros(batch_size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, device=device)
    try:  # compiling happens in the first step, so take one here
        with autocast(device):
            outputs = network(images.to(memory_format=torch.channels_last))
        sum(output.sum() for output in outputs).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C++ compiler, no Triton, an unsupported platform: all of them only cost speed
        print(f"Compiling the model fails here ({type(error).__name__}), so it runs uncompiled.")
        network = model
    model.zero_grad()
    model.load_state_dict(before)  # BatchNorm has counted the step
    return network


def parallel(network):
    """Return `network` so that its gradients are the mean over all processes."""
    if processes() == 1:
        return network
    with warnings.catch_warnings():  # torch 2.15 would like another name for broadcast_buffers, which 2.11 has not
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def train_step(network, optimizer, images, count, step, progress):
    """Take one step on images (B, C, H, W), this process's share of a batch of `count` photos.

    Returns the sums over the images of loss, reconstruction, KL and 1, (4,).
    """
    # Flips and latent noise depend on step and process alone, so that a run can resume anywhere
    torch.manual_seed(seed_of(b"step", step, rank()))
    images = mirror_half(images) if FLIP else images
    with autocast(images.device):
        recon, mu, log_var = network(images)
    reconstruction, kl = reconstruction_loss(recon, images, RECONSTRUCTION), kl_divergence(mu, log_var)
    losses = reconstruction + kl_weight(progress) * kl

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(progress)
    optimizer.zero_grad()
    (losses.sum() * (processes() / count)).backward()  # the mean over processes of this is the mean over the batch
    optimizer.step()
    return torch.stack([losses, reconstruction, kl, torch.ones_like(kl)]).detach().sum(1)


def train_epoch(network, optimizer, photos, train_set, run, stopping):
    """Take the steps that are left of the run's epoch, up to its end or a request to stop; return images per second."""
    network.train()
    order = np.random.default_rng(seed_of(b"order", run["epoch"])).permutation(len(train_set))
    shuffled = train_set[torch.from_numpy(order).to(train_set.device)]
    fewest = 2 * processes()  # that BatchNorm can work with
    batches = [batch for batch in shuffled.split(BATCH_SIZE) if len(batch) >= fewest]
    device = next(network.parameters()).device
    sums = torch.tensor(run["sums"], device=device) * (rank() == 0)  # process 0 has those from before a stop

    first, start, losses = run["step"], time.perf_counter(), []
    images_of_steps = load_batches(photos, map(share, batches[first:]), device)
    quiet = rank() > 0 or None  # None: tqdm looks whether there is a terminal
    with tqdm(batches[first:], f"Epoch {run['epoch'] + 1}/{EPOCHS}", unit="step", leave=False, disable=quiet) as bar:
        for batch, images in zip(bar, images_of_steps, strict=True):
            if stopping():
                break
            step = run["epoch"] * len(batches) + run["step"]
            progress = (step + 0.5) / (EPOCHS * len(batches))
            figures = train_step(network, optimizer, images, len(batch), step, progress)
            sums += figures
            losses.append(figures[0])
            run["step"] += 1
            if len(losses) == 50:  # to look at each would have the GPU wait for it
                check_losses(losses, run)
                losses.clear()
    check_losses(losses, run)
    run["sums"] = summed(sums).tolist()  # waits for the GPU to be done
    return sum(map(len, batches[first : run["step"]])) / (time.perf_counter() - start)


def check_losses(losses, run):
    """Raise UserError where a loss is not finite, given those of the run's last steps; each process gives its own."""
    if losses and (bad := ~summed(torch.stack(losses)).isfinite()).any():
        step = run["step"] - len(losses) + bad.int().argmax().item() + 1
        raise diverged(f"The loss of step {step} of epoch {run['epoch'] + 1} is not finite")


def diverged(what):
    """Return the UserError that ends a run in which figures grow out of bounds; `what` tells which."""
    advice = f"start anew with a LEARNING_RATE below {LEARNING_RATE:g}"
    return UserError(f"{what}: {advice}; {last_path()} keeps the last good weights.")


@torch.inference_mode()
def encode_photos(model, photos, indices, device):
    """Yield this process's share of the photos `indices` as images (B, C, H, W), each batch with mu, log_var (B, L)."""
    for images in load_batches(photos, share(indices).split(BATCH_SIZE // processes()), device):
        with autocast(device):
            mu, log_var = model.encode(images)
        yield images, mu, log_var


@torch.inference_mode()
def evaluate(model, photos, val_set, device):
    """Return the figures of the validation photos, reconstructed from z = mu, and their codes mu, log_var (N, L)."""
    losses, codes = [], []
    for images, mu, log_var in encode_photos(model, photos, val_set, device):
        with autocast(device):
            recon = model.decode(mu)
        kinds = ("mse", RECONSTRUCTION)
        losses.append(torch.stack([reconstruction_loss(recon, images, kind) for kind in kinds], dim=1))
        codes.append(torch.stack([mu, log_var], dim=1))
    squared_error, reconstruction = gathered(torch.cat(losses), len(val_set)).double().T
    mu, log_var = gathered(torch.cat(codes), len(val_set)).unbind(1)
    kl, pixels = kl_divergence(mu, log_var).double(), math.prod(images.shape[1:])
    if RECONSTRUCTION == "sigma":  # one variance for all photos, so that the figure does not depend on batches
        reconstruction = calibrated_nll(squared_error, pixels)
    figures = {
        "val_loss": (reconstruction + kl_weight(1.0) * kl).mean().item(),
        "val_reconstruction": reconstruction.mean().item(),
        "val_kl": kl.mean().item(),
        "val_squared_error": squared_error.mean().item(),
        "val_psnr": vae.psnr(squared_error.mean().item(), pixels),
    }
    return figures, mu, log_var


def fit_prior(model, photos, train_set, device):
    """Fit the model's prior to the codes of at most 16,384 photos of the training split; return their mu (N, L)."""
    chosen = train_set[:16384]
    codes = [torch.stack([mu, log_var], dim=1) for _, mu, log_var in encode_photos(model, photos, chosen, device)]
    mu, log_var = gathered(torch.cat(codes), len(chosen)).unbind(1)
    try:
        model.fit_prior(mu, log_var)
    except torch.linalg.LinAlgError:
        raise diverged("The latent codes grew out of bounds") from None
    return mu


# What a run leaves behind
@contextmanager
def claimed(folder, hint, wait=False):
    """Make a folder, keep other runs out of it, and clear away what a killed run has left half written.

    The claim ends with the process, however that ends. Raises UserError where the folder cannot be written to, with
    `hint`, or where another run has it, unless told to `wait` for its end.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # not everybody who may open the lock of a folder may write there
        claim = lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"Another run is at work in {folder}: wait for its end, or {hint}.") from None
        print(f"Another run is writing to {folder}: waiting until it has.", flush=True)
        claim = lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): {hint}.", 2) from None
    with claim:
        for half in [*folder.glob(".partial-*"), *folder.glob("progress/.partial-*")]:
            with suppress(OSError):  # it may be a folder, or gone
                half.unlink()
        yield


def free_path(path, suffix=""):
    """Return the first of path + suffix, path-2 + suffix, path-3 + suffix ... that is not there."""
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(free for end in endings if not (free := path.with_name(f"{path.name}{end}{suffix}")).exists())


@functools.cache  # once in a run: from then on the file is its own, as nobody else may write to OUTPUT_DIR
def keep_previous(path, run_id):
    """Copy a checkpoint at `path` that another run made to a free name beside it, so that it outlives this run."""
    if not path.exists():
        return
    try:
        info = vae.load_checkpoint(path)[1]
    except UserError:
        info = {}  # not a checkpoint, but somebody's file all the same
    if info.get("run") == run_id or info.get("resumable") is False:  # nobody will miss the last.pth of a finished run
        return
    kept = free_path(path.with_suffix(".previous"), ".pth")
    with vae.atomic_write(kept) as file:
        file.write(path.read_bytes())
    back = shlex.join(["mv", str(kept), str(path)])
    print(f"{path} was there from another run: kept as {kept} (`{back}` brings it back in place of this run's)")


def finish_epoch(model, optimizer, photos, train_set, val_set, run, settings, speed):
    """Validate, fit the prior and write the files of an epoch, last.pth last: all it tells of is then there."""
    device, epoch, out = model.latent_mean.device, run["epoch"] + 1, Path(OUTPUT_DIR)
    *sums, seen = run["sums"]
    if processes() > 1:  # on CPUs each has seen other photos, and the checkpoint will hold the buffers of process 0
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    model.eval()
    figures, mu, log_var = evaluate(model, photos, val_set, device)
    if not math.isfinite(figures["val_loss"]):
        raise diverged(f"The validation loss of epoch {epoch} is not finite")
    active = active_units(fit_prior(model, photos, train_set, device))
    means = {f"train_{name}": total / seen for name, total in zip(("loss", "reconstruction", "kl"), sums, strict=True)}
    latents = {"active_units": active.sum().item(), "marginal_kl": model.marginal_kl()}
    row = {"epoch": epoch, **means, **figures, **latents, "images_per_second": speed}
    best = row["val_loss"] < min((earlier["val_loss"] for earlier in run["history"]), default=math.inf)
    run |= {"epoch": epoch, "step": 0, "sums": [0.0] * 4, "history": [*run["history"], row]}
    with first_process_first():
        if rank() == 0:
            if best:
                # Checkpoints are shared; where somebody keeps things is nobody's business
                told = {name: value for name, value in settings.items() if name not in ("DATA", "OUTPUT_DIR")}
                keep_previous(checkpoint_path(), run["id"])
                vae.save_checkpoint(checkpoint_path(), model, run=run["id"], constants=told, **row)
            save_pictures(model, next(load_batches(photos, [val_set[:8]], device)), out / f"progress/epoch_{epoch:02d}")
            save_history(run["history"], out / "history.csv")
            plot_history(run["history"], out / "loss_curves.png")
            if epoch == EPOCHS:
                plot_latents(photos[val_set[:150]].cpu(), mu, log_var, active, out / "latent_space.png")
            save_last(model, optimizer, run, settings)
    print(epoch_line(row, best), latents_line(row), sep="\n", flush=True)


def epoch_line(row, best):
    """Return the line that tells a person how an epoch went."""
    loss = f"{row['val_loss']:.1f} = {row['val_reconstruction']:.1f} + {kl_weight(1.0):g} x {row['val_kl']:.1f} nats KL"
    return (
        f"Epoch {row['epoch']:2d}/{EPOCHS}  train {row['train_loss']:.1f}  val {loss}  PSNR {row['val_psnr']:.2f} dB  "
        f"{row['images_per_second']:.1f} images/s{'  best so far' if best else ''}"
    )


def latents_line(row):
    """Return the line that tells a person in what state the latents are."""
    state = f"  Latents    {row['val_kl']:.1f} nats KL, {row['active_units']} of {LATENT_DIM} active"
    if max(row["train_kl"], row["val_kl"]) < 1:  # the first epochs of a small run validate badly, but do not train so
        advice = "" if RECONSTRUCTION == "sigma" else "lower BETA or "
        return f"{state}: the posterior has collapsed, so all photos look alike; {advice}raise KL_WARMUP_EPOCHS"
    if row["epoch"] == EPOCHS and row["marginal_kl"] > 0.25 * LATENT_DIM:
        off = f"so weak a KL leaves them {row['marginal_kl']:.0f} nats off N(0, I)"
        return f"{state}; {off}: sample from the fitted prior, as genpic.py does"
    return state


def checkpoint_path():
    """Return where the best weights of a run of EPOCHS epochs go."""
    return Path(OUTPUT_DIR, f"vae_model_{EPOCHS}.pth")


def last_path():
    """Return where the state of the run goes, for --resume."""
    return Path(OUTPUT_DIR, "last.pth")


def save_last(model, optimizer, run, settings):
    """Write all that --resume needs to last.pth, after keeping that of another run which was under way."""
    if rank():
        return
    keep_previous(last_path(), run["id"])
    under_way = (0, 0) < (run["epoch"], run["step"]) < (EPOCHS, 0)
    info = {"run": run["id"], "resumable": under_way, "constants": settings, "state": run, "seal": seal(run, settings)}
    vae.save_checkpoint(last_path(), model, optimizer=optimizer.state_dict(), **info)


def clear_pictures():
    """Move the figures and pictures of an earlier run aside, which this one's would replace or mix with."""
    names = [Path(OUTPUT_DIR, name) for name in ("history.csv", "loss_curves.png", "latent_space.png", "progress")]
    if rank() == 0 and (there := [path for path in names if path.exists()]):
        kept = free_path(Path(OUTPUT_DIR, "previous"))
        kept.mkdir()
        for path in there:
            shutil.move(path, kept)  # a rename fails for a folder of a container's image
        print(f"{OUTPUT_DIR} had the figures and pictures of another run: kept in {kept}")


def save_history(history, path):
    """Write the figures of all epochs as CSV, a line per epoch."""
    lines = [",".join(map(str, line)) for line in (history[0], *(row.values() for row in history))]
    with vae.atomic_write(path) as file:
        file.write("\n".join([*lines, ""]).encode())


@torch.inference_mode()
def save_pictures(model, images, stem):
    """Save `images` (B, C, H, W) over their reconstructions, and 64 samples from the same noise at every epoch."""
    noise = vae.latent_noise(SEED, 64, LATENT_DIM).to(images.device)
    with autocast(images.device):
        reconstructions = model.decode(model.encode(images)[0])
        samples = model.decode(model.draw_latents(noise))
    vae.save_grid(torch.cat([images, reconstructions]), f"{stem}_reconstructions.png", columns=len(images))
    vae.save_grid(samples, f"{stem}_samples.png", columns=8)


def plot_history(history, path):
    """Draw loss, reconstruction and KL per epoch, of training (z drawn) and of validation (z = mu)."""
    measures = {"mse": "squared error", "ssim": "squared error + structure", "bce": "cross-entropy in nats"}
    measure = measures.get(RECONSTRUCTION, "Gaussian NLL in nats")
    panels = {"loss": "loss per photo", "reconstruction": f"{measure}, per photo", "kl": "KL in nats, per photo"}
    with figure(path, 11, 3.2) as drawing:
        for axes, (name, label) in zip(drawing.subplots(1, 3), panels.items(), strict=True):
            for split, style in (("train", "o-"), ("val", "o--")):
                axes.plot([row["epoch"] for row in history], [row[f"{split}_{name}"] for row in history], style, ms=3)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        drawing.legend(["training, z drawn", "validation, z = mean"], loc="outside upper center", ncols=2)


# Pictures of a run
@contextmanager
def figure(path, width, height):
    """Yield an empty figure of so many inches in the style of all figures here, and save it."""
    import matplotlib.figure  # takes a second, so only here

    lines = {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    frames = dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False)
    with matplotlib.rc_context(lines | frames | {"font.size": 9}):
        drawing = matplotlib.figure.Figure((width, height), layout="constrained")
        yield drawing
        with vae.atomic_write(path) as file:
            drawing.savefig(file, dpi=120)


def plot_latents(photos, mu, log_var, active, path):
    """Draw photos (n, H, W, C) at the places of their codes, the first n of mu (N, L), and the use of each latent.

    The places are those on the first two principal axes of all N codes; `active` (L,) tells which latents are used.
    """
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    centred = nn.functional.pad(mu - mu.mean(0), (0, 1))  # there are two axes even where there is one latent
    variances, axes = (part.flip(-1) for part in torch.linalg.eigh(centred.T @ centred))
    places, shares = centred @ axes[:, :2], variances / variances.sum().clamp_min(1e-12)
    kl, order = kl_per_latent(mu, log_var).mean(0).sort(descending=True)
    active = active[order]
    with figure(path, 11, 5.5) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=[1.2, 1])
        for place, photo in zip(places.tolist(), photos.numpy(), strict=False):
            thumbnail = OffsetImage(photo.squeeze(), zoom=22 / len(photo), cmap="gray", clim=(0, 255))
            left.add_artist(AnnotationBbox(thumbnail, place, frameon=False))
        left.scatter(*places[: len(photos)].T.numpy(), s=0)  # what the axes have to show
        left.margins(0.07)
        left.set_xlabel(f"first principal axis of the codes ({shares[0]:.1%} of their variance)")
        left.set_ylabel(f"second principal axis ({shares[1]:.1%})")
        for chosen, label, colour in ((active, "active", "C0"), (~active, "unused", "0.7")):
            if count := chosen.sum().item():
                positions, heights = 1 + chosen.nonzero().flatten().numpy(), kl[chosen].numpy()
                right.bar(positions, heights, color=colour, label=f"{count} latents {label}")
        right.set(xlabel="latents, sorted", ylabel="KL in nats, mean of the validation photos")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend()


# Processes: this one alone, or all that torchrun has started, each with its share of every batch
def rank():
    """Return the number of this process; number 0 alone prints and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes():
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join_processes():
    """Meet the other processes that torchrun has started, if it started this one, and let number 0 speak for all."""
    if not distributed.is_torchelastic_launched() or distributed.is_initialized():
        return
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)  # this is "cuda" from here on
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(hours=12))  # as long as decoding the photos may take
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def leave_processes():
    """Part from the other processes, at the end of a run."""
    if processes() > 1:
        time.sleep(0.5)  # gloo's thread needs the interpreter once more; torch 2.11 waits for it without letting go
        distributed.destroy_process_group()


def require_same(text):
    """Raise UserError where the processes do not have the same text, which tells of their photos."""
    texts = [text] * processes()
    if processes() > 1:
        distributed.all_gather_object(texts, text)
    if len(set(texts)) > 1:
        raise UserError(f"The processes see different photos ({', '.join(texts)}): all machines must share the folder.")


def summed(tensor):
    """Return the sum of a tensor over all processes, on the CPU."""
    tensor = tensor.cpu()
    if processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def share(rows):
    """Return this process's part, of consecutive rows, of a tensor."""
    return rows.tensor_split(processes())[rank()]


def gathered(part, count):
    """Put the shares of all processes together again -> (count, ...), on the CPU."""
    rows = torch.zeros(count, *part.shape[1:])
    share(rows).copy_(part)
    return summed(rows)


@contextmanager
def first_process_first():
    """Let process 0 go through the block before the others, which then find its work done."""
    if rank():
        summed(torch.zeros(1))
    yield
    if not rank():
        summed(torch.zeros(1))


@contextmanager
def stop_requests():
    """Yield a function that tells whether a process got a Ctrl-C or SIGTERM, and which; a second one acts at once."""
    received = []

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        received.append(number)
        restore()
        if rank() == 0:
            with suppress(OSError, RuntimeError):  # of a terminal that is gone, or in the midst of printing
                print("\nStopping after this step; once more stops at once.", file=sys.stderr)

    def signal_received():
        """The signal that came, or 0; all processes get the same answer, so that they stop at the same step."""
        signals = torch.zeros(64)
        signals[received] = 1
        return summed(signals).argmax().item()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signal_received
    finally:
        restore()


# Devices
@functools.cache
def has_bfloat16(device_type):
    """Whether the hardware computes in bfloat16 itself; emulation would be slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device_type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def reuse_freed_memory():
    """Have the C library keep freed memory for the next step instead of handing it back to the system.

    Getting it again, page by page, takes a quarter of a step on a CPU. Only glibc has such a switch.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 1 << 30) or library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; before 2.35 at most 32 MB
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# The run
def check_settings():
    """Raise UserError for a constant whose value is impossible."""
    require(EPOCHS >= 1, "EPOCHS", EPOCHS, "at least 1")
    count = processes()
    wanted = f"at least {2 * count} and a multiple of {count}, the number of processes" if count > 1 else "at least 2"
    require(BATCH_SIZE // count >= 2 and BATCH_SIZE % count == 0, "BATCH_SIZE", BATCH_SIZE, wanted)
    require(0 < LEARNING_RATE < math.inf, "LEARNING_RATE", LEARNING_RATE, "a positive number")
    known = RECONSTRUCTION in ("mse", "ssim", "bce", "sigma")
    require(known, "RECONSTRUCTION", RECONSTRUCTION, '"mse", "ssim", "bce" or "sigma"')
    require(0 <= BETA < math.inf, "BETA", BETA, "a number that is not negative")
    require(0 <= KL_WARMUP_EPOCHS <= EPOCHS, "KL_WARMUP_EPOCHS", KL_WARMUP_EPOCHS, f"from 0 to EPOCHS ({EPOCHS})")
    require(0 <= VAL_FRACTION < 1, "VAL_FRACTION", VAL_FRACTION, "at least 0 and less than 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    require(COMPILE in ("auto", "yes", "no"), "COMPILE", COMPILE, '"auto", "yes" or "no"')
    others = [Path(folder).resolve() for folder in (DATA, "data/cache")]
    require(Path(OUTPUT_DIR).resolve() not in others, "OUTPUT_DIR", OUTPUT_DIR, "no folder of photos or their cache")
    if count > 1:
        require(DEVICE in ("auto", "cpu", "cuda"), "DEVICE", DEVICE, '"auto", "cpu" or "cuda" for several processes')
        started, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if started > gpus > 0 and DEVICE != "cpu":
            raise UserError(f"torchrun started {started} processes for {gpus} GPUs: --nproc-per-node {gpus} does.", 2)
    if RESUME and not last_path().exists():
        raise UserError(f"There is no {last_path()} to resume from: start anew, or name its --output-dir.", 2)


def new_run(photos):
    """Return the state of a run that has yet to take its first step; `photos` is a text that tells its photos apart."""
    return {"id": uuid.uuid4().hex, "photos": photos, "epoch": 0, "step": 0, "sums": [0.0] * 4, "history": []}


def seal(run, settings):
    """Return a checksum of a run's state and constants, so that no others are taken for those of a run."""
    return digest(["format 2", repr(run), repr(settings)])


def resume_run(model, optimizer, settings, photos):
    """Return the state of the run in last.pth, and set model and optimizer to its; UserError where it cannot go on."""
    saved, info = vae.load_checkpoint(last_path())
    run, then = info.get("state"), info.get("constants")
    if info.get("seal") != seal(run, then):
        raise UserError(f"{last_path()} is not the last.pth of a run of this train.py, so there is nothing to resume.")
    then, now = then | {"photos": run["photos"]}, settings | {"photos": photos}
    free = {"RESUME", "DATA", "OUTPUT_DIR", "DEVICE", "AMP", "COMPILE"}  # may change between the sessions of a run
    keys = sorted((then.keys() | now.keys()) - free)
    changes = [f"{key} was {then.get(key)} and is {now.get(key)}" for key in keys if then.get(key) != now.get(key)]
    if changes:
        raise UserError(f"The run of {last_path()} goes on only as it began: {'; '.join(changes)}.", 2)
    try:
        model.load_state_dict(saved.state_dict())
        load_moments(optimizer, info["optimizer"]["state"])
    except Exception:  # whatever the file holds in their place
        raise UserError(f"{last_path()} does not hold the weights and moments of its own settings.") from None
    return run


def load_moments(optimizer, moments):
    """Give Adam its step counts and moments back, in the parameters' layout in memory, whatever that in the file."""
    parameters, state = optimizer.param_groups[0]["params"], {}
    for k, saved in moments.items():
        state[k] = {name: torch.empty_like(parameters[k]).copy_(saved[name]) for name in ("exp_avg", "exp_avg_sq")}
        state[k]["step"] = torch.tensor(float(saved["step"]))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def describe_run(model, device, run, train_set, val_set):
    """Print what is about to happen: the split, the model, the machine, and where a resumed run goes on."""
    batch = min(BATCH_SIZE, len(train_set))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if AMP and has_bfloat16(device.type) else "float32"
    print(f"Split       {len(train_set):,} to train on in batches of {batch}, {len(val_set):,} to validate on")
    print(f"Model       {IMAGE_SIZE}x{IMAGE_SIZE}x{CHANNELS}, latent {LATENT_DIM}, {parameters:,} parameters")
    together = f"{processes()} processes, each on " if processes() > 1 else ""
    print(f"Device      {together}{device} ({name}), {precision}")
    if RESUME:
        rest = f" and {run['step']} steps of the next" if run["epoch"] < EPOCHS else ", the last: this run is finished"
        print(f"Resuming    after epoch {run['epoch']} of {EPOCHS}{rest}")
    sys.stdout.flush()  # an epoch may take hours, and a log file should tell of it from the start


def resume_command(argv):
    """Return the command line that goes on with the run that these flags (None: those of the process) started."""
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--resume"]
    start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if processes() > 1 else ["python"]
    return shlex.join([*start, "train.py", *flags, "--resume"])


def describe_result(run):
    """Print the best epoch, where everything is and which command comes next."""
    best = min(run["history"], key=lambda row: row["val_loss"])
    path, out = checkpoint_path(), Path(OUTPUT_DIR)
    print(f"Done. The best weights, of epoch {best['epoch']} with {best['val_psnr']:.2f} dB, are in {path};")
    print(f"pictures of every epoch in {out / 'progress'}, the curves in {out / 'loss_curves.png'}.")
    flag = "" if path == Path("checkpoints_best/vae_model_20.pth") else f" --checkpoint {shlex.quote(str(path))}"
    print(f"Next: python genpic.py{flag}")


@vae.script
def main(argv=None):
    """Train from the first step, or from where an interrupted run stopped, to the last."""
    reuse_freed_memory()
    join_processes()
    with first_process_first():
        settings = vae.override_constants(globals(), argv)
        check_settings()
        device = vae.pick_device(DEVICE)
        model, optimizer = new_model(device)
        found, names = find_photos()

    with claimed(OUTPUT_DIR, "name another --output-dir") if rank() == 0 else nullcontext():
        # Photos, split and the state of the run
        with first_process_first():
            photos = load_photos(found, names, device)
            train_set, val_set = (part.to(photos.device) for part in split_photos(len(photos)))
            photos_id = f"{len(photos)} photos ({digest(names)})"
            run = resume_run(model, optimizer, settings, photos_id) if RESUME else new_run(photos_id)
            if not RESUME:
                clear_pictures()
                save_last(model, optimizer, run, settings)  # a run that is killed in its first epoch can go on as well
        require_same(photos_id)
        describe_run(model, device, run, train_set, val_set)

        # Epochs
        with stop_requests() as stopping:
            network = parallel(compiled(model, device, min(BATCH_SIZE, len(train_set)) // processes()))
            while run["epoch"] < EPOCHS:
                speed = train_epoch(network, optimizer, photos, train_set, run, stopping)
                if number := stopping():
                    with first_process_first():  # torchrun ends them all when one has ended
                        save_last(model, optimizer, run, settings)
                    print(f"Stopped in epoch {run['epoch'] + 1}. To go on: {resume_command(argv)}", flush=True)
                    leave_processes()
                    raise SystemExit(128 + number)
                finish_epoch(model, optimizer, photos, train_set, val_set, run, settings, speed)
    describe_result(run)
    leave_processes()


if __name__ == "__main__":
    main()
