"""Train the variational autoencoder of vae.py on a folder of photos.

    python train.py                               # the photos in data/train (the demo faces while it is empty)
    python train.py --data ~/photos --epochs 5    # every constant at the top of the script is a flag
    python train.py --resume                      # continue an interrupted run
    torchrun --nproc-per-node 4 train.py          # on four GPUs

Writes checkpoints_best/vae_model_20.pth (weights of the best epoch, for genpic.py), last.pth (to resume), history.csv,
loss_curves.png, latent_space.png and progress/ with pictures of every epoch.
"""

import copy
import ctypes
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import distributed, nn
from tqdm import tqdm

import vae
from data.cache import cached, map_cache
from data.faces import check_crop, face_detector, median_face_box
from data.photos import find_photos
from vae import CHANNELS, HIDDEN_DIMS, IMAGE_SIZE, LATENT_DIM, UserError, require

# What goes in and out
DATA: str = "data/train"  # folder of photos, searched with its subfolders; or a .zip of photos, a .npy array
OUTPUT_DIR: str = "checkpoints_best"  # folder for the checkpoints, curves and pictures of the run
RESUME: bool = False  # continue the run that OUTPUT_DIR/last.pth holds
CROP: str = "center"  # the square of a photo to use: "center", "face" (the one around it), or "LEFT TOP SIZE" in pixels
VAL_FRACTION: float = 0.05  # share of the photos held out for validation; more gives steadier validation figures
FLIP: bool = True  # mirror half of the photos at random; turn off if left and right differ in meaning
AUGMENT: float = 0.03  # turn, shear, stretch and shift photos, each by up to this share of half their side; 0: no

# How the model learns
EPOCHS: int = 20  # passes over the photos; also the number in the checkpoint's name
BATCH_SIZE: int = 32  # photos per step, on all GPUs together; raise it on large ones, lower it if memory runs out
LEARNING_RATE: float = 0.03  # peak step size of Muon (Adam's is a 30th); lower it if the loss jumps about
RECONSTRUCTION: str = "ssim"  # "mse" squared error, "ssim" also structure, "bce" cross-entropy
BETA: float = 0.132  # weight of the KL divergence in nats; higher: plainer samples, blurrier photos
KL_WARMUP_EPOCHS: float = 0.0  # epochs over which the KL weight grows from 0; a few help if latents stay unused
SEED: int = 0  # start of all random numbers; another one gives another split, order and model

# What it runs on
DEVICE: str = "auto"  # "auto" is CUDA if available, else the CPU; or name a device: "cpu", "cuda:1"
AMP: bool = True  # compute in bfloat16 if the hardware has it: much faster, the same pictures
COMPILE: str = "auto"  # "yes" compiles the model first (a minute), "auto" only on CUDA, "no" never

FACE_BOX = (0.2326, 0.2859, 0.5445)  # where CROP "face" puts faces: left, top and size as shares of the side

# torchrun starts several processes: each trains on its share of every batch, and rank 0 does everything else alone
rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))


# Losses: per image, summed over pixels and latents
def reconstruction_loss(recon, x, kind):
    """Loss (B,) of reconstructions of images (B, C, S, S) in [0, 1], summed over pixels.

    "mse" is the squared error, "ssim" that plus 0.01 (1 - SSIM) for each value of the image, "bce" the binary
    cross-entropy in nats.
    """
    if kind == "bce":
        recon = recon.clamp(1e-7, 1 - 1e-7)  # a sigmoid reaches 0 and 1, whose logarithms are infinite
        return -(x * recon.log() + (1 - x) * (1 - recon).log()).sum((1, 2, 3))
    squared_error = (recon - x).square().sum((1, 2, 3))
    if kind == "mse":
        return squared_error
    return squared_error + 0.01 * x[0].numel() * (1 - structural_similarity(recon, x))


def structural_similarity(one, other):
    """Mean SSIM (B,) of images (B, C, S, S) in [0, 1], over windows of 8 x 8 pixels, 4 apart (Wang et al. 2004)."""
    windows = nn.functional.avg_pool1d(torch.eye(one.shape[-1], device=one.device), 8, 4)

    def mean(images):  # as products, which take a CPU less time than avg_pool2d
        return windows.T @ images @ windows

    mean_one = mean(one)
    mean_other = mean(other)
    covariance = mean(one * other) - mean_one * mean_other
    energy = mean_one.square() + mean_other.square()
    variances = mean(one.square() + other.square()) - energy
    luminance = (2 * mean_one * mean_other + 0.01**2) / (energy + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean((1, 2, 3))


def kl_divergence(mu, log_var):
    """KL(N(mu, exp(log_var)) || N(0, 1)) of each latent, (B, L) -> (B, L), in nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1)


# Schedules: functions of the progress, the share in [0, 1] of the run's steps that is done
def one_cycle(progress):
    """Share of the peak learning rate: a linear rise over the first 2 % of the run, then a linear fall to 0."""
    return min(progress / 0.02, (1 - progress) / 0.98)


def kl_weight(progress):
    """BETA, after a linear rise from 0 over KL_WARMUP_EPOCHS."""
    return BETA * min(1.0, progress * EPOCHS / KL_WARMUP_EPOCHS) if KL_WARMUP_EPOCHS else BETA


# The optimizers
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, with decoupled weight decay (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A weight (M, ...) counts as a matrix of M rows. torch.optim.Muon takes no convolutions, and is slower on a CPU.
    """

    @torch.no_grad()
    def step(self):
        """Move each weight against the orthogonalized Nesterov momentum of its gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight not in self.state:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                mean = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(mean, group["momentum"]).movedim(1, -1)  # as channels-last weights lie
                matrix = direction.flatten(1)
                with autocast(weight.device):
                    update = orthogonalize(matrix).reshape(direction.shape).movedim(-1, 1)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonalize(matrix):
    """Bring the singular values of a matrix (M, N) close to 1: most to between 0.65 and 1.2, the smallest less far.

    Four Newton-Schulz iterations X -> P X, where P = a I + b X X^T + c (X X^T)^2 with the coefficients of Jordan et al.
    As all P commute with X X^T, two iterations at a time need no product with X itself; in bfloat16, more are unstable.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    gram = matrix @ matrix.T
    norm = gram.norm().clamp_min(1e-15)  # at least the largest singular value, squared; smaller ones would underflow
    matrix = newton_schulz(gram / norm) @ matrix * norm.rsqrt()
    return newton_schulz(matrix @ matrix.T) @ matrix


def newton_schulz(gram):
    """Return the product (M, M) of the factors P of two iterations, given X X^T."""
    factor = polynomial(gram)
    return polynomial(factor @ gram @ factor) @ factor


def polynomial(gram):
    """Return 3.4445 I - 4.7750 G + 2.0315 G^2."""
    result = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    result.diagonal().add_(3.4445)
    return result


def optimizers_of(model):
    """Return Muon for the inner weights of a VAE, and Adam for its first and last layer, biases and BatchNorm."""
    _, *inner, _ = (weight for weight in model.parameters() if weight.ndim > 1)
    others = [parameter for parameter in model.parameters() if parameter not in {*inner}]
    muon = Muon([{"params": inner, "initial_lr": LEARNING_RATE}], {"momentum": 0.95, "weight_decay": 0.03})
    return muon, torch.optim.Adam([{"params": others, "initial_lr": LEARNING_RATE / 30}], fused=True)


@torch.no_grad()
def update_average(average, model, step):
    """Move `average` towards the weights of `model`, after `step` earlier steps.

    It lags by 50 steps, or early in a run by a tenth of all so far (polynomial-decay averaging, Shamir & Zhang 2013).
    A high learning rate keeps weights moving around a minimum; their average is closer to it (Polyak & Juditsky 1992).
    """
    share = max(1 / 50, 10 / (step + 10))
    weights = model.state_dict()
    for name, mean in average.state_dict().items():
        if mean.is_floating_point() and not name.startswith("latent_"):  # not the prior, which the average alone has
            mean.lerp_(weights[name], share)


def seed_of(use, *numbers):
    """Return the seed (int) of one stream of random numbers: a function of SEED, its use (bytes) and numbers alone."""
    return int(np.random.SeedSequence((SEED, *use, *numbers)).generate_state(1, np.uint64)[0])


# Photos
def find_training_photos():
    """Return the Photos at DATA and their place: DATA itself, or data/demo while data/train is empty."""
    place = Path(DATA)
    demo = Path("data/demo")
    if place == Path("data/train") and not list(place.glob("[!.]*")) and demo.exists():
        print("data/train is empty, so this run trains on the demo faces in data/demo.")
        place = demo
    photos = find_photos(place) if place.exists() else []
    if not photos:
        state = "holds no photos" if place.exists() else "does not exist"
        raise UserError(
            f"DATA {place.absolute()} {state}: put photos into data/train, or name a folder, .zip or .npy with --data; "
            "CelebA's img_align_celeba.zip, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, works as it is."
        )
    return photos, place


def cache_photos():
    """Return the path of the cache of the training photos, and how many photos there were; rank 0 writes it."""
    result = [None]
    if rank == 0:
        photos, place = find_training_photos()
        cut = {"channels": CHANNELS, "size": IMAGE_SIZE, "crop": CROP, "face_box": FACE_BOX}
        result = [(cached(photos, place, cut, workers=torch.get_num_threads() * world_size), len(photos))]
    if world_size > 1:  # the other ranks wait as long as decoding may take
        patient = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        distributed.broadcast_object_list(result, group=patient)
    return result[0]


def load_pixels(device):
    """Return the photos as uint8 (N, H, W, C): on the GPU if they fit there, else mapped from the cache."""
    path, found = cache_photos()
    pixels = map_cache(path, IMAGE_SIZE, CHANNELS)
    if rank == 0:
        print(f"Photos      {len(pixels):,} of {found:,} can be used, cached in {path} ({pixels.nbytes / 1e6:,.0f} MB)")
    if len(pixels) <= 2 * world_size:
        raise UserError(f"A run needs {2 * world_size + 1} usable photos and has {len(pixels)}.")
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels


def split_photos(count):
    """Return the indices to train on, at least 2 for each rank, and to validate on, at least 1, drawn by SEED."""
    held_out = min(max(1, round(count * VAL_FRACTION)), count - 2 * world_size)
    indices = torch.from_numpy(np.random.default_rng(seed_of(b"split")).permutation(count))
    return indices[held_out:], indices[:held_out]


def load_images(pixels, batch, device):
    """Return the rows of `pixels`, uint8 (N, H, W, C), at indices (B,) as images (B, C, H, W) in [0, 1]."""
    rows = pixels[batch.to(pixels.device)]
    if device.type == "cuda" and not rows.is_cuda:
        rows = rows.pin_memory()  # so that copying runs beside the GPU's work
    images = rows.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.contiguous().float().div_(255)  # three channels are too few for a layout with the channels last


# The machine
def reuse_freed_memory():
    """Have glibc keep freed memory for the next step: getting it again, page by page, takes long."""
    with suppress(OSError, AttributeError):  # of other C libraries
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 1 << 30) or library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; before 2.35 at most 32 MB
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def has_bfloat16(device):
    """Whether the hardware computes in bfloat16 itself; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def autocast(device):
    """Return the context that products are computed in: bfloat16 if AMP and the hardware allow it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=AMP and has_bfloat16(device))


def set_up_device():
    """Join the other processes, if there are any, and return the device of this one."""
    if world_size > 1:
        on_gpus = torch.cuda.is_available() and DEVICE != "cpu"
        if on_gpus:
            gpus = torch.cuda.device_count()
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            require(here <= gpus, "--nproc-per-node", here, f"at most {gpus}, the number of GPUs here")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" then means
        distributed.init_process_group("nccl" if on_gpus else "gloo")
    device = vae.pick_device(DEVICE)
    torch.set_float32_matmul_precision("highest")  # SSIM takes differences of products: TF32 would be too coarse
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


# The run
@dataclass
class Run:
    """What a run works with, and how far it is."""

    model: vae.VAE  # what learns
    average: vae.VAE  # its moving average: what is validated, and what genpic.py gets
    optimizers: tuple  # Muon and Adam
    device: torch.device
    pixels: torch.Tensor  # the photos, uint8 (N, H, W, C)
    train_set: torch.Tensor  # indices of photos
    val_set: torch.Tensor
    settings: dict  # the constants, and the number and checksum of the photos
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    sums: list = field(default_factory=lambda: [0.0] * 4)  # of loss, reconstruction and KL; number of photos
    history: list = field(default_factory=list)  # a row of figures for each epoch


def new_run(settings, device):
    """Return a run before its first step; SEED draws the weights and the split."""
    pixels = load_pixels(device)
    checksum = zlib.crc32(pixels[:, IMAGE_SIZE // 2].cpu().numpy().tobytes())  # of the middle row of each
    settings |= {"photos": f"{len(pixels)} photos, checksum {checksum:08x}"}
    torch.manual_seed(seed_of(b"init"))
    model = vae.VAE(IMAGE_SIZE, CHANNELS, HIDDEN_DIMS, LATENT_DIM).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval()
    if world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Run(model, average, optimizers_of(model), device, pixels, *split_photos(len(pixels)), settings)


# Step, epoch, validation
def augment(images):
    """Mirror half of the images (B, C, H, W), if FLIP, and move each by an affine map of its own, as AUGMENT says."""
    if FLIP:
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if AUGMENT:
        change = AUGMENT * (2 * torch.rand(len(images), 2, 3, device=images.device) - 1)
        maps = torch.eye(2, 3, device=images.device) + change
        grid = nn.functional.affine_grid(maps, images.shape, align_corners=False)
        images = nn.functional.grid_sample(images, grid, "bicubic", "reflection", align_corners=False).clamp(0, 1)
    return images


def train_step(network, optimizers, images, global_step, progress):
    """Take one step on images (B, C, H, W); return their summed loss, reconstruction and KL, and their number, (4,)."""
    # What is drawn here depends on the step and the rank alone, so a run can resume anywhere
    torch.manual_seed(seed_of(b"step", global_step, rank))
    images = augment(images)
    with autocast(images.device):
        recon, mu, log_var = network(images)
    reconstruction = reconstruction_loss(recon, images, RECONSTRUCTION)
    kl = kl_divergence(mu, log_var).sum(1)
    loss = reconstruction + kl_weight(progress) * kl

    network.zero_grad()
    loss.mean().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * one_cycle(progress)
        optimizer.step()
    return torch.stack([loss, reconstruction, kl, torch.ones_like(kl)]).detach().sum(1)


def batches_of(train_set, epoch):
    """Return the batches of an epoch, tensors of indices: shuffled by SEED, of sizes that all ranks can share.

    A last batch of less than half the size is left out: BatchNorm's statistics would depend on its few photos.
    """
    order = np.random.default_rng(seed_of(b"order", epoch)).permutation(len(train_set))
    batches = train_set[torch.from_numpy(order)].split(BATCH_SIZE)
    batches = [batch[: len(batch) // world_size * world_size] for batch in batches]
    least = max(2 * world_size, min(BATCH_SIZE, len(train_set)) // 2)
    return [batch for batch in batches if len(batch) >= least]


def train_epoch(run, network):
    """Take the steps that are left of the run's epoch, to its end or a stop signal; return photos per second."""
    network.train()
    batches = batches_of(run.train_set, run.epoch)
    sums = torch.tensor(run.sums, device=run.device) * (rank == 0)  # those before a stop count once
    seen = 0
    start = time.perf_counter()
    for batch in tqdm(batches[run.step :], f"Epoch {run.epoch + 1}/{EPOCHS}", leave=False, disable=rank > 0 or None):
        global_step = run.epoch * len(batches) + run.step
        progress = (global_step + 0.5) / (EPOCHS * len(batches))  # in the middle of the step
        images = load_images(run.pixels, batch[rank::world_size], run.device)
        sums += train_step(network, run.optimizers, images, global_step, progress)
        update_average(run.average, run.model, global_step)
        seen += len(batch)
        run.step += 1
        is_due = run.step % 50 == 0 or run.step == len(batches)  # looking at each loss would make the GPU wait
        if rank == 0 and is_due and not sums[0].isfinite():  # gradients are averaged, so rank 0 sees all
            raise UserError(f"The loss at step {run.step} of epoch {run.epoch + 1} is not finite: lower LEARNING_RATE.")
        if stop_signals:
            break
    if world_size > 1:
        distributed.all_reduce(sums)
    run.sums = sums.tolist()
    return seen / (time.perf_counter() - start)


@torch.inference_mode()
def encode_photos(run, indices):
    """Return mu, log_var (N, L) each, of the photos at `indices`."""
    codes = []
    for batch in indices.split(BATCH_SIZE // world_size):
        images = load_images(run.pixels, batch, run.device)
        with autocast(run.device):
            codes.append(torch.stack(run.average.encode(images)))
    return torch.cat(codes, dim=1)


@torch.inference_mode()
def evaluate(run, mu, log_var):
    """Return the figures of the validation photos, given their codes (N, L), reconstructed from z = mu."""
    losses = []
    size = BATCH_SIZE // world_size
    for batch, codes in zip(run.val_set.split(size), mu.split(size), strict=True):
        images = load_images(run.pixels, batch, run.device)
        with autocast(run.device):
            recon = run.average.decode(codes)
        losses.append(torch.stack([reconstruction_loss(recon, images, kind) for kind in ("mse", RECONSTRUCTION)]))
    squared_error, reconstruction = torch.cat(losses, dim=1).cpu().double()
    kl = kl_divergence(mu, log_var).sum(1).cpu().double()
    return {
        "val_loss": (reconstruction + BETA * kl).mean().item(),
        "val_reconstruction": reconstruction.mean().item(),
        "val_kl": kl.mean().item(),
        "val_psnr": vae.psnr(squared_error.mean().item(), images[0].numel()),
    }


def finish_epoch(run, speed):
    """Fit the prior, validate and write what an epoch leaves behind; return a line on it. `speed` is in photos/s."""
    mu, log_var = encode_photos(run, run.train_set[:16384])
    try:
        run.average.fit_prior(mu, log_var)
    except torch.linalg.LinAlgError:
        raise UserError(f"The codes of epoch {run.epoch + 1} are out of bounds: lower LEARNING_RATE.") from None
    active = (mu.var(0, correction=0) > 0.01).sum().item()  # Burda et al. 2016, arXiv:1509.00519, section 5.2
    mu, log_var = encode_photos(run, run.val_set)
    *sums, seen = run.sums
    means = {f"train_{name}": total / seen for name, total in zip(("loss", "reconstruction", "kl"), sums, strict=True)}
    state = {"active_units": active, "images_per_second": speed}
    row = {"epoch": run.epoch + 1, **means, **evaluate(run, mu, log_var), **state}
    is_best = row["val_loss"] < min((earlier["val_loss"] for earlier in run.history), default=math.inf)
    run.history.append(row)

    if is_best:
        constants = {name: value for name, value in run.settings.items() if name not in MAY_CHANGE}
        vae.save_checkpoint(checkpoint_path(), run.average, constants=constants, face_box=run.average.face_box, **row)
    save_pictures(run, row["epoch"])
    save_history(run.history)
    if row["epoch"] == EPOCHS:
        plot_latents(run, mu.cpu(), log_var.cpu(), active)
    remark = "  best so far" if is_best else ""
    if max(row["train_kl"], row["val_kl"]) < 1:  # early in a small run the latter alone may be that small
        remark = "  COLLAPSED: all photos look alike; lower BETA or raise KL_WARMUP_EPOCHS"
    losses = f"train {row['train_loss']:.1f}  val {row['val_loss']:.1f}  KL {row['val_kl']:.1f} nats"
    quality = f"PSNR {row['val_psnr']:.2f} dB  {speed:.1f} images/s"
    return f"Epoch {row['epoch']:2d}/{EPOCHS}  {losses}  {quality}{remark}"


# Files of a run
MAY_CHANGE = {"DATA", "OUTPUT_DIR", "RESUME", "DEVICE", "AMP", "COMPILE"}  # when a run resumes: they do not define it


def checkpoint_path():
    """Return the path of the best weights."""
    return Path(OUTPUT_DIR, f"vae_model_{EPOCHS}.pth")


def lock_output():
    """Return the lock that keeps other runs out of OUTPUT_DIR, or raise UserError; remove what a killed run left."""
    out = Path(OUTPUT_DIR)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except (Timeout, OSError) as error:
        reason = "another run is at work in it" if isinstance(error, Timeout) else error.strerror
        raise UserError(f"{out} cannot be written to ({reason}): name another --output-dir.") from None
    for half in [*out.glob(".*.[0-9]*.tmp"), *out.glob("progress/.*.[0-9]*.tmp")]:
        half.unlink()
    return lock


def set_aside():
    """Move the files of an earlier run to OUTPUT_DIR/previous-N, and copy the checkpoint that this run will replace."""
    out = Path(OUTPUT_DIR)
    names = ("last.pth", "history.csv", "loss_curves.png", "latent_space.png", "progress")
    earlier = [out / name for name in names if (out / name).exists()]
    if not earlier and not checkpoint_path().exists():
        return
    number = 1
    while (out / f"previous-{number}").exists():
        number += 1
    kept = out / f"previous-{number}"
    if checkpoint_path().exists():  # a copy, so that genpic.py works meanwhile
        with vae.atomic_write(kept / checkpoint_path().name) as file:
            file.write(checkpoint_path().read_bytes())
    kept.mkdir(exist_ok=True)
    for path in earlier:
        shutil.move(path, kept)
    print(f"Kept        what was there before in {kept}")


def save_last(run):
    """Write last.pth, all that --resume needs, unless a weight is not finite: then the average is not, either."""
    position = {name: getattr(run, name) for name in ("epoch", "step", "sums", "history")}
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    state = {"weights": run.model.state_dict(), "optimizers": states, "constants": run.settings, "position": position}
    vae.save_checkpoint(Path(OUTPUT_DIR, "last.pth"), run.average, **state)


def resume(run):
    """Put a run where last.pth left it. Raises UserError if it is of other settings or photos, or is none."""
    path = Path(OUTPUT_DIR, "last.pth")
    average, info = vae.load_checkpoint(path)
    if "weights" not in info:
        raise UserError(f"{path} is not the last.pth of a run of this version: start a new one without --resume.")
    then = info["constants"]
    changes = [name for name in then if name in run.settings.keys() - MAY_CHANGE and then[name] != run.settings[name]]
    if changes:
        told = "; ".join(f"{name} was {then[name]} and is {run.settings[name]}" for name in sorted(changes))
        raise UserError(f"The run of {path} can only continue as it began: {told}.")
    run.average.load_state_dict(average.state_dict())
    run.model.load_state_dict(info["weights"])
    for optimizer, state in zip(run.optimizers, info["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    vars(run).update(info["position"])


# Pictures of a run
@torch.inference_mode()
def save_pictures(run, epoch):
    """Save 8 validation photos over their reconstructions, and 64 samples from the same noise after every epoch."""
    images = load_images(run.pixels, run.val_set[:8], run.device)
    noise = vae.latent_noise(SEED, 64, LATENT_DIM).to(run.device)
    with autocast(run.device):
        reconstructions = run.average.decode(run.average.encode(images)[0])
        samples = run.average.decode(run.average.draw_latents(noise))
    stem = Path(OUTPUT_DIR, f"progress/epoch_{epoch:02d}")
    vae.save_grid(torch.cat([images, reconstructions]), f"{stem}_reconstructions.png", columns=len(images))
    vae.save_grid(samples, f"{stem}_samples.png", columns=8)


def save_history(history):
    """Write the figures of all epochs to history.csv, and draw those of training and validation."""
    lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
    with vae.atomic_write(Path(OUTPUT_DIR, "history.csv")) as file:
        file.write("\n".join([*lines, ""]).encode())
    figure = Figure((11, 3.2), layout="constrained")
    labels = {"loss": "loss per photo", "reconstruction": f"{RECONSTRUCTION} loss", "kl": "KL per photo, nats"}
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for split, style in (("train", "o-"), ("val", "o--")):
            axes.plot([row["epoch"] for row in history], [row[f"{split}_{name}"] for row in history], style, ms=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(["training, z drawn", "validation, averaged weights, z = mean"], loc="outside upper center", ncols=2)
    with vae.atomic_write(Path(OUTPUT_DIR, "loss_curves.png")) as file:
        figure.savefig(file, dpi=120)


def plot_latents(run, mu, log_var, active):
    """Draw photos at their codes mu (N, L), on the axes along which these vary most, and the KL of each latent."""
    centred = nn.functional.pad(mu - mu.mean(0), (0, 1))  # two axes even for a single latent
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    shares = variances.flip(0) / variances.sum().clamp_min(1e-12)
    places = (centred @ directions.flip(1)[:, :2])[:150].numpy()
    photos = run.pixels[run.val_set[:150].to(run.pixels.device)].cpu().numpy()

    figure = Figure((11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for place, photo in zip(places, photos, strict=True):
        thumbnail = OffsetImage(photo.squeeze(), zoom=22 / IMAGE_SIZE, cmap="gray", clim=(0, 255))
        left.add_artist(AnnotationBbox(thumbnail, place, frameon=False))
    left.scatter(*places.T, s=0)  # sets the limits of the axes
    left.margins(0.07)
    left.set(xlabel=f"first principal axis, {shares[0]:.1%} of the variance", ylabel=f"second, {shares[1]:.1%}")
    kl = kl_divergence(mu, log_var).mean(0).sort(descending=True).values
    right.bar(range(1, len(kl) + 1), kl.numpy())
    right.set(xlabel=f"latents, sorted: {active} of {len(kl)} are active", ylabel="KL per validation photo, nats")
    with vae.atomic_write(Path(OUTPUT_DIR, "latent_space.png")) as file:
        figure.savefig(file, dpi=120)


# Main
stop_signals = []  # Ctrl-C or SIGTERM, once it has come


def request_stop(number, frame):
    """Have the run stop after this step; the next signal acts at once."""
    stop_signals.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print() is not safe here


def train(run):
    """Take the run to its end. Ctrl-C or SIGTERM save it after the step and end the script."""
    network = run.model
    if COMPILE == "yes" or (COMPILE == "auto" and run.device.type == "cuda"):
        torch._dynamo.config.suppress_errors = True  # without a compiler it runs uncompiled ...
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # ... and does not fill the screen
        network = torch.compile(network, dynamic=False)
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(network)
    else:  # one of several processes that stopped alone would leave the others waiting
        signal.signal(signal.SIGINT, request_stop)
        signal.signal(signal.SIGTERM, request_stop)
    while run.epoch < EPOCHS:
        speed = train_epoch(run, network)
        if stop_signals:
            save_last(run)
            if run.history:
                describe_undo()
            command = shlex.join(["python", *(word for word in sys.argv if word != "--resume")])
            print(f"Stopped     in epoch {run.epoch + 1}. To continue: {command} --resume", flush=True)
            raise SystemExit(128 + stop_signals[0])
        if rank == 0:
            line = finish_epoch(run, speed)
        run.epoch += 1
        run.step = 0
        run.sums = [0.0] * 4
        if rank == 0:
            save_last(run)  # after all that it describes
            print(line, flush=True)
    if world_size > 1:
        distributed.destroy_process_group()


def check_settings():
    """Raise UserError for a constant whose value is impossible."""
    require(IMAGE_SIZE >= 16, "IMAGE_SIZE", IMAGE_SIZE, "at least 16")
    require(CHANNELS in (1, 3), "CHANNELS", CHANNELS, "3 (colour) or 1 (grey)")
    require(LATENT_DIM >= 1, "LATENT_DIM", LATENT_DIM, "at least 1")
    require(min(HIDDEN_DIMS, default=0) >= 1, "HIDDEN_DIMS", HIDDEN_DIMS, "a list of numbers, each at least 1")
    check_crop(CROP)
    require(0 <= VAL_FRACTION < 1, "VAL_FRACTION", VAL_FRACTION, "at least 0 and less than 1")
    require(EPOCHS >= 1, "EPOCHS", EPOCHS, "at least 1")
    fits = 2 * world_size <= BATCH_SIZE and BATCH_SIZE % world_size == 0
    require(fits, "BATCH_SIZE", BATCH_SIZE, f"at least 2 for each process, and a multiple of {world_size}")
    require(0 <= AUGMENT <= 0.5, "AUGMENT", AUGMENT, "from 0 to 0.5")
    require(0 < LEARNING_RATE < math.inf, "LEARNING_RATE", LEARNING_RATE, "a positive number")
    require(RECONSTRUCTION in ("mse", "ssim", "bce"), "RECONSTRUCTION", RECONSTRUCTION, '"mse", "ssim" or "bce"')
    require(0 <= BETA < math.inf, "BETA", BETA, "at least 0")
    require(0 <= KL_WARMUP_EPOCHS <= EPOCHS, "KL_WARMUP_EPOCHS", KL_WARMUP_EPOCHS, f"from 0 to EPOCHS ({EPOCHS})")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    several = '"auto" or "cpu", as each process takes a GPU of its own'
    require(world_size == 1 or ":" not in DEVICE, "DEVICE", DEVICE, several)
    require(COMPILE in ("auto", "yes", "no"), "COMPILE", COMPILE, '"auto", "yes" or "no"')
    out = Path(OUTPUT_DIR).resolve()
    require(Path(DATA).resolve() not in (out, *out.parents), "OUTPUT_DIR", OUTPUT_DIR, "a folder outside DATA")
    require(CROP != "face" or face_detector(), "CROP", CROP, '"center" as long as faces cannot be found')
    if RESUME and not (out / "last.pth").exists():
        raise UserError(f"There is no {OUTPUT_DIR}/last.pth to resume: leave out --resume, or name its --output-dir.")


def describe_run(run):
    """Print what is about to happen: the split, the model, the machine, and where a resumed run continues."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if AMP and has_bfloat16(run.device) else "float32"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"Split       {len(run.train_set):,} to train on, {len(run.val_set):,} to validate on")
    print(f"Model       {IMAGE_SIZE}x{IMAGE_SIZE}x{CHANNELS}, latent {LATENT_DIM}, {parameters:,} parameters")
    if RESUME:
        print(f"Resuming    after {run.epoch} of {EPOCHS} epochs and {run.step} steps of the next")
    print(f"Device      {world_size} x {run.device.type} ({name}), {precision}, batches of {BATCH_SIZE}", flush=True)


def describe_result(run):
    """Print the best epoch, the state of the latents, which command comes next, and how to undo the run."""
    best = min(run.history, key=lambda row: row["val_loss"])
    path = checkpoint_path()
    choice = "" if path == Path("checkpoints_best/vae_model_20.pth") else f" --checkpoint {shlex.quote(str(path))}"
    print(f"Done        The weights of epoch {best['epoch']}, {best['val_psnr']:.2f} dB, are in {path}")
    print(f"Latents     {best['active_units']} of {LATENT_DIM} active, {best['val_kl']:.0f} nats of KL divergence")
    command = f"python genpic.py{choice}"
    alike = "more epochs or photos, or a lower BETA, as all pictures of this model look alike"
    print(f"Next        {command if best['active_units'] else alike}")
    describe_undo()


def describe_undo():
    """Print how to restore the checkpoint of before the last new run, if there was one."""
    path = checkpoint_path()
    replaced = max(Path(OUTPUT_DIR).glob(f"previous-*/{path.name}"), key=os.path.getctime, default=None)
    if replaced:
        print(f"Undo        To restore the checkpoint of before: {shlex.join(['cp', str(replaced), str(path)])}")


def main(argv=None):
    """Train from the first step, or from where an interrupted run stopped, to the last."""
    settings = vae.parse_flags(globals(), argv)
    check_settings()
    reuse_freed_memory()
    device = set_up_device()
    with lock_output() if rank == 0 else nullcontext():
        run = new_run(settings, device)
        if RESUME:
            resume(run)
        elif rank == 0:
            set_aside()
            save_last(run)  # a run that is killed in its first epoch can resume as well
        if rank == 0:
            some = run.pixels[run.train_set[:100].to(run.pixels.device)]
            run.average.face_box = list(FACE_BOX) if CROP == "face" else median_face_box(some.cpu().numpy())
            describe_run(run)
        train(run)
        if rank == 0:
            describe_result(run)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        time.sleep(10 if rank else 0)  # torchrun ends all processes when one ends, and rank 0 has to speak first
        sys.exit(f"train.py: {error}" if rank == 0 else 1)
    except torch.OutOfMemoryError:
        sys.exit("train.py: The GPU has too little memory: lower BATCH_SIZE, IMAGE_SIZE or HIDDEN_DIMS.")
    except KeyboardInterrupt:
        sys.exit(130)
