"""Train the variational autoencoder in vae.py on a folder of photos.

    python train.py                               # on data/train (or on the demo faces if it is empty)
    python train.py --data ~/photos --epochs 5    # every setting at the top of the script is a flag
    python train.py --resume                      # continue an interrupted run
    torchrun --nproc-per-node 4 train.py          # on four GPUs

Writes checkpoints_best/vae_model_20.pth (averaged weights, for genpic.py), last.pth (for --resume),
history.csv, loss_curves.png, latent_space.png and progress/ with pictures of every epoch.
"""

import copy
import ctypes
import hashlib
import itertools
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

import vae
from data.attributes import Labels, fit_directions, read_labels
from data.cache import load_images, load_pixels
from data.faces import check_crop, face_detector, median_face_box
from data.photos import DEMO, find_training_photos
from vae import CHANNELS, HIDDEN_DIMS, IMAGE_SIZE, LATENT_DIM, UserError, require

# Input and output
DATA: str = "data/train"  # folder of photos (including subfolders), .zip of photos, or .npy array
ATTRIBUTES: str = ""  # table of attributes that genpic.py can then change: CelebA's, a .csv, or "folders" (subfolders)
START_FROM: str = ""  # checkpoint whose weights the run starts with, so that a few photos are enough
OUTPUT_DIR: str = "checkpoints_best"  # folder for the checkpoints, curves and pictures of the run
RESUME: bool = False  # continue the run saved in OUTPUT_DIR/last.pth
CROP: str = "center"  # square to use: "center", "face" (around the largest face), or "LEFT TOP SIZE" in pixels
VAL_FRACTION: float = 0.05  # fraction of the photos held out for validation; more gives less noisy validation metrics
FLIP: bool = True  # randomly mirror half of the photos; turn off if left and right matter
AUGMENT: float = 0.03  # randomly rotate, shear, stretch and shift photos by up to this fraction of half the side

# Training
EPOCHS: int = 20  # passes over the photos, and the number in the checkpoint's name; 0 adds ATTRIBUTES to START_FROM
BATCH_SIZE: int = 32  # photos per step on all GPUs (small sets: fewer); raise it on large GPUs, lower it to save memory
LEARNING_RATE: float | None = None  # peak rate of Muon (Adam uses a 30th); None: 0.03, or 0.01 with START_FROM
RECONSTRUCTION: str = "ssim"  # loss: "mse" (squared error), "ssim" (squared error and SSIM) or "bce" (cross-entropy)
BETA: float | None = None  # weight of the KL divergence, higher for smoother samples; None: 0.132 (IMAGE_SIZE / 150)^2
KL_WARMUP_EPOCHS: float = 0.0  # epochs over which the KL weight rises from 0; a few help if latents stay unused
SEED: int = 0  # seed for all random numbers: initial weights, split, order, augmentation, noise

# Hardware
DEVICE: str = "auto"  # "auto" (CUDA if available, else the CPU) or a device, such as "cpu" or "cuda:1"
AMP: bool = True  # compute in bfloat16 if the hardware supports it: much faster, same quality
COMPILE: str = "auto"  # compile the model first, which takes a minute: "yes", "no", or "auto" (only on CUDA)

FACE_BOX = (0.2326, 0.2859, 0.5445)  # where CROP "face" puts faces: left, top and size as fractions of the side

FORMAT = 2  # version of last.pth
MAY_CHANGE = {"DATA", "ATTRIBUTES", "START_FROM", "OUTPUT_DIR", "RESUME", "DEVICE", "AMP", "COMPILE"}  # on --resume
LOSSES = ("loss", "reconstruction", "kl")  # columns of history.csv

# torchrun starts several processes: each trains on its part of every batch, and rank 0 does everything else alone
world_size = int(os.environ.get("WORLD_SIZE") or 1)
rank = int(os.environ.get("RANK", 0)) if world_size > 1 else 0


# Losses per image, summed over pixels and latents
def reconstruction_loss(recon, x, kind):
    """Loss (B,) of reconstructions of images (B, C, S, S) in [0, 1], summed over pixels.

    "mse" is the squared error, "ssim" adds 0.01 (1 - SSIM) for each value of the image, and "bce" is the binary
    cross-entropy in nats.
    """
    if kind == "bce":  # F.binary_cross_entropy would crash on a loss that is not finite
        recon = recon.clamp(1e-7, 1 - 1e-7)  # a sigmoid can reach 0 and 1, where the logarithms are infinite
        return -(x * recon.log() + (1 - x) * (1 - recon).log()).sum((1, 2, 3))
    squared_error = (recon - x).square()
    if kind == "mse":
        return squared_error.sum((1, 2, 3))
    dissimilarity = 1 - structural_similarity(recon, x, squared_error)
    return squared_error.sum((1, 2, 3)) + 0.01 * x[0].numel() * dissimilarity


def structural_similarity(one, other, squared_error):
    """Mean SSIM (B,) of images (B, C, S, S) in [0, 1], over 8 x 8 windows with stride 4 (Wang et al. 2004)."""
    windows = F.avg_pool1d(torch.eye(one.shape[-1], device=one.device), 8, 4)

    def mean(images):  # matrix products are faster than avg_pool2d on a CPU
        return windows.T @ images @ windows

    mean_one = mean(one)
    mean_other = mean(other)
    twice_product = 2 * mean_one * mean_other
    twice_mean_product = 2 * mean(one * other)
    energy = torch.addcmul(mean_other.square(), mean_one, mean_one)
    variances = mean(squared_error) + twice_mean_product - energy  # because x^2 + y^2 = (x - y)^2 + 2 x y
    similarity = (twice_product + 0.01**2) * (twice_mean_product - twice_product + 0.03**2)
    return (similarity / ((energy + 0.01**2) * (variances + 0.03**2))).mean((1, 2, 3))


def kl_divergence(mu, log_var):
    """KL(N(mu, exp(log_var)) || N(0, 1)) of each latent, (B, L) -> (B, L), in nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1)


# Schedules (functions of progress, the fraction of the run's steps that is complete) and seeds
def one_cycle(progress):
    """Fraction of the peak learning rate: rises linearly over the first 2% of the run, then falls linearly to 0."""
    return min(progress / 0.02, (1 - progress) / 0.98)


def kl_weight(progress=1.0):
    """BETA (by default proportional to the number of pixels, like the loss), after a rise over KL_WARMUP_EPOCHS."""
    beta = 0.132 * (IMAGE_SIZE / 150) ** 2 if BETA is None else BETA
    return beta * min(1.0, progress * EPOCHS / KL_WARMUP_EPOCHS) if KL_WARMUP_EPOCHS else beta


def seed_of(use, *numbers):
    """Return the seed (int) of one random stream, derived from SEED, its purpose `use` (bytes) and `numbers`."""
    return int(np.random.SeedSequence((SEED, *use, *numbers)).generate_state(1, np.uint64)[0])


# Optimizers
def orthogonalize(matrices):
    """Move the singular values of matrices (K, M, N), M <= N, close to 1: most end up between 0.65 and 1.2.

    Four Newton-Schulz iterations X -> P X, where P = a I + b X X^T + c (X X^T)^2 with the coefficients of Jordan et al.
    Every P commutes with X X^T, so two iterations need only one product with X; merging more is unstable in bfloat16.
    """
    gram = matrices @ matrices.mT
    norm = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True)  # at least the largest singular value squared
    norm = norm.clamp_min(1e-15)
    matrices = newton_schulz(gram / norm, matrices) * norm.rsqrt()
    return newton_schulz(matrices @ matrices.mT, matrices)


def newton_schulz(gram, matrices):
    """Apply two Newton-Schulz iterations to matrices X (K, M, N), given X X^T (K, M, M)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    first = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    first.diagonal(dim1=1, dim2=2).add_(a)
    gram = first @ gram @ first
    second = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # omits a I, which the next line adds
    both = torch.baddbmm(first, second, first, beta=a)
    return both @ matrices


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum with decoupled weight decay (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A weight (M, ...) is treated as a matrix of M rows, and its update is multiplied by its number in `scales`. Unlike
    this class, torch.optim.Muon does not accept convolution weights, and it is slower on a CPU.
    """

    orthogonalize = staticmethod(orthogonalize)

    @torch.no_grad()
    def step(self):
        """Update each weight with the orthogonalized Nesterov momentum of its gradients."""
        for group in self.param_groups:
            weights = group["params"]
            gradients = [weight.grad for weight in weights]
            if not self.state:
                self.state.update({weight: {"momentum_buffer": torch.zeros_like(weight)} for weight in weights})
            momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            updates = self.updates(directions)
            torch._foreach_mul_(updates, group["scales"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def updates(self, directions):
        """Return the directions, orthogonalized; neighbours of equal shape are processed in one batch."""
        moved = [direction.movedim(1, -1) for direction in directions]  # the memory order of channels-last weights
        matrices = [direction.flatten(1) for direction in moved]
        matrices = [matrix.T if len(matrix) > matrix.shape[1] else matrix for matrix in matrices]
        groups = [(shape, len([*group])) for shape, group in itertools.groupby(matrix.shape for matrix in matrices)]
        dtype = precision(matrices[0].device)
        batches = [matrices[0].new_empty(count, *shape, dtype=dtype) for shape, count in groups]
        torch._foreach_copy_([matrix for batch in batches for matrix in batch], matrices)
        updates = [update for batch in batches for update in self.orthogonalize(batch)]
        updates = [update.T if len(update) < len(old) else update for update, old in zip(updates, moved, strict=True)]
        return [update.reshape(old.shape).movedim(-1, 1) for update, old in zip(updates, moved, strict=True)]


def optimizers_of(model, rate):
    """Return Muon, with a peak `rate`, for the inner weights of a VAE, and Adam, with a 30th of it, for all others."""
    _, *inner, _ = (weight for weight in model.parameters() if weight.ndim > 1)
    others = [parameter for parameter in model.parameters() if parameter not in {*inner}]
    inner.sort(key=lambda weight: sorted(weight.flatten(1).shape))
    transposed = {layer.weight for layer in model.modules() if isinstance(layer, nn.ConvTranspose2d)}
    ratios = [len(weight) / weight[0].numel() for weight in inner]  # outputs per input; if transposed, the inverse
    ratios = [1 / ratio if weight in transposed else ratio for weight, ratio in zip(inner, ratios, strict=True)]
    scales = [max(1, ratio) ** 0.5 for ratio in ratios]
    muon = Muon([{"params": inner, "scales": scales, "initial_lr": rate}], {"momentum": 0.95, "weight_decay": 0.03})
    return muon, torch.optim.Adam([{"params": others, "initial_lr": rate / 30}], fused=True)


def update_average(means, values, step):
    """Move the tensors `means` towards `values`, given the number of earlier steps.

    The mean covers about the last 50 steps, or the last tenth early in a run (polynomial-decay averaging, Shamir &
    Zhang 2013). At a high learning rate weights circle a minimum; their mean is closer to it (Polyak & Juditsky 1992).
    """
    torch._foreach_lerp_(means, values, max(1 / 50, 10 / (step + 10)))


# Photos
def split_photos(count):
    """Return the training indices, at least 2 per rank, and the validation indices, at least 1, chosen by SEED."""
    held_out = min(max(1, round(count * VAL_FRACTION)), count - 2 * world_size)
    indices = torch.from_numpy(np.random.default_rng(seed_of(b"split")).permutation(count))
    return indices[held_out:], indices[:held_out]


def batches_of(train_set, epoch):
    """Return the batches of an epoch as indices (steps, B), in an order chosen by SEED; B is at most BATCH_SIZE.

    The last batch is filled with photos from the start of the order. A small set forms about five smaller batches,
    because a few large steps teach less, but batches of fewer than 12 photos are too noisy.
    """
    order = np.random.default_rng(seed_of(b"order", epoch)).permutation(len(train_set))
    size = math.ceil(max(12, len(order) / 5) / world_size) * world_size
    size = min(size, BATCH_SIZE)
    rows = np.resize(order, (math.ceil(len(order) / size), size))  # repeats the order to fill the shape
    return train_set[torch.from_numpy(rows).to(train_set.device)]


# Hardware
def reuse_freed_memory():
    """Make glibc keep freed memory for the next step: requesting it from the system again is slow."""
    with suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 1 << 30) or library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; at most 32 MB before 2.35
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def precision(device):
    """Return the dtype of matrix products: bfloat16 if AMP is on and the hardware supports it without emulation."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if AMP and has_bfloat16 and device.type in ("cpu", "cuda") else torch.float32


def autocast(device):
    """Return a context in which matrix products use the dtype from `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def set_up_device():
    """Join the other processes, if there are any, set the precision, and return this process's device."""
    if world_size > 1:
        on_gpus = torch.cuda.is_available() and DEVICE != "cpu"
        if on_gpus:
            gpus = torch.cuda.device_count()
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            require(here <= gpus, "--nproc-per-node", here, f"at most {gpus}, the number of GPUs on this machine")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from now on, "cuda" means this GPU
        distributed.init_process_group("nccl" if on_gpus and distributed.is_nccl_available() else "gloo")
    device = vae.pick_device(DEVICE)
    torch.set_float32_matmul_precision("highest")  # SSIM subtracts products: TF32 would be too coarse
    torch.backends.cudnn.allow_tf32 = False  # --no-amp means float32 in convolutions, too
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


def can_compile(device):
    """Return whether COMPILE asks for compilation and a compiler works here; print a warning if it does not."""
    if COMPILE == "no" or (COMPILE == "auto" and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # compilers fail in many ways
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        if rank == 0:
            print(f"Warning     The model cannot be compiled, so training is slower ({reason}).")
        return False
    torch._dynamo.config.suppress_errors = True  # code that still fails to compile runs uncompiled, with a warning
    return True


# The run
@dataclass
class Run:
    """State of a training run."""

    model: vae.VAE  # the model being trained
    network: nn.Module  # the model, wrapped for compilation and several processes where enabled
    average: vae.VAE  # moving average of the model, which is validated and saved for genpic.py
    averaging: list  # the two lists of tensors for update_average
    optimizers: tuple  # Muon and Adam
    device: torch.device
    pixels: torch.Tensor  # the photos, uint8 (N, H, W, C)
    train_set: torch.Tensor  # indices into `pixels`, on the same device
    val_set: torch.Tensor
    settings: dict  # the constants, and the number and checksum of the photos and labels
    labels: Labels | None = None  # of the training photos, if ATTRIBUTES is set
    is_compiled: bool = False
    origin: dict = field(default_factory=dict)  # if START_FROM was set: that file's SHA-256 and `about`
    epoch: int = 0  # completed epochs
    step: int = 0  # completed steps of the current epoch
    seconds: float = 0.0  # time spent on those steps
    sums: list = field(default_factory=lambda: [0.0] * 3)  # loss, reconstruction and KL, summed over those steps
    history: list = field(default_factory=list)  # a row of metrics for each epoch


def read_start():
    """Return the model that this run resumes or starts from, and its info; None and {} for random initial weights.

    The info contains Run.origin. Raises UserError if the file is missing, not valid, or of a model of another size.
    """
    if RESUME:
        return vae.load_checkpoint(Path(OUTPUT_DIR, "last.pth"))
    if not START_FROM:
        return None, {}
    start, info = vae.load_checkpoint(START_FROM)
    sizes = start.config.items()
    others = [f"--{name.replace('_', '-')} {size}" for name, size in sizes if size != globals()[name.upper()]]
    if others:
        wanted = " ".join(others).translate(str.maketrans("", "", "[],"))  # flags take lists as words
        raise UserError(f"START_FROM {START_FROM} is a model of another size: to start from it, set {wanted}.")
    with open(START_FROM, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return start, {"start_sha256": digest, "start_about": info.get("about") or info.get("start_about", "")}


def new_run(settings, device, start=None, info=()):
    """Return a new run that begins with the model `start` (and its info), or with weights that depend on SEED."""
    photos = find_training_photos(DATA) if rank == 0 else []
    face_box = list((start and start.face_box) or FACE_BOX)
    cut = {"channels": CHANNELS, "size": IMAGE_SIZE, "crop": CROP, "face_box": face_box}
    pixels, photos = load_pixels(photos, cut, torch.get_num_threads() * world_size, device)
    if len(pixels) <= 2 * world_size:
        raise UserError(f"Training needs at least {2 * world_size + 1} usable photos but has only {len(pixels)}.")
    if photos and photos[0].path.parent != DEMO and len(pixels) < 2000 and not start:
        better = "--start-from checkpoints_best/vae_model_20.pth --output-dir saved_models"
        print(f"Tip         Few photos: begin with a model that knows faces, {better}")
    split = [indices.to(pixels.device) for indices in split_photos(len(pixels))]
    origin = {name: info[name] for name in ("start_sha256", "start_about") if name in info}
    rate = LEARNING_RATE or (0.01 if origin else 0.03)
    torch.manual_seed(seed_of(b"init"))
    model = start or vae.VAE(IMAGE_SIZE, CHANNELS, HIDDEN_DIMS, LATENT_DIM)
    model.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    if CROP == "face":
        average.face_box = face_box
    elif rank == 0 and not RESUME:
        average.face_box = median_face_box(pixels[split[0][:100]].cpu().numpy(), start and start.face_box)
    optimizers = optimizers_of(model, rate)
    network, is_compiled = wrap(model, optimizers[0], device)
    averaging = [
        [tensor for name, tensor in one.state_dict().items() if tensor.is_floating_point() and "latent_" not in name]
        for one in (average, model)  # without the prior, which is fitted only for the average
    ]
    checksum = zlib.crc32(pixels[:, IMAGE_SIZE // 2].cpu().numpy().tobytes())  # of each photo's middle row
    used = {"LEARNING_RATE": rate, "BETA": kl_weight(), "BATCH_SIZE": batches_of(split[0], 0).shape[1]}
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE} | used
    settings["photos"] = f"{len(pixels)} photos, checksum {checksum:08x}"
    labels = None
    if photos:  # only rank 0 has them
        labels = read_labels(ATTRIBUTES, [photos[index] for index in split[0].tolist()]) if ATTRIBUTES else None
        settings["attributes"] = str(labels or "none")
    return Run(
        model, network, average, averaging, optimizers, device, pixels, *split, settings, labels, is_compiled, origin
    )


def wrap(model, muon, device):
    """Return the model, compiled and connected to the other processes if there are any, and whether it is compiled."""
    is_compiled = can_compile(device)
    network = model
    if is_compiled:
        network = torch.compile(model, dynamic=False)
        muon.orthogonalize = torch.compile(orthogonalize, dynamic=False)
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(network)
    return network, is_compiled


# Stopping
stop_signals = []  # the SIGINT or SIGTERM received, if any


@contextmanager
def stopping_after_the_step():
    """Within the block, Ctrl-C and SIGTERM stop the run after the current step, and a second one immediately."""

    def request_stop(number, frame):
        if stop_signals:
            raise KeyboardInterrupt
        stop_signals.append(number)
        with suppress(OSError):  # Ctrl-C may have ended the reader of a pipe; print() is not safe here
            os.write(2, b"\nStopping after this step; press Ctrl-C again to stop immediately.\n")

    stop_signals.clear()
    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Step, epoch, validation
def augment(images):
    """Mirror half of the images (B, C, H, W) if FLIP, and warp each with a random affine map of magnitude AUGMENT."""
    if FLIP:
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if AUGMENT:
        maps = torch.empty(len(images), 2, 3, device=images.device).uniform_(-AUGMENT, AUGMENT)
        maps.diagonal(dim1=1, dim2=2).add_(1)
        grid = F.affine_grid(maps, images.shape, align_corners=False)
        images = F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False).clamp(0, 1)
    return images


def train_step(network, optimizers, images, global_step, progress):
    """Take one step on images (B, C, H, W); return the sums (3,) of loss, reconstruction and KL."""
    torch.manual_seed(seed_of(b"step", global_step, rank))  # so a resumed run draws the same numbers
    images = augment(images)
    with autocast(images.device):
        recon, mu, log_var = network(images)
    recon_loss = reconstruction_loss(recon, images, RECONSTRUCTION)
    kl = kl_divergence(mu, log_var).sum(1)
    loss = torch.add(recon_loss, kl, alpha=kl_weight(progress))

    network.zero_grad()
    loss.mean().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * one_cycle(progress)
        optimizer.step()
    return torch.stack([loss, recon_loss, kl]).detach().sum(1)


def train_epoch(run):
    """Take the remaining steps of the current epoch until it ends or is stopped; return the epoch's photo count."""
    run.network.train()
    batches = batches_of(run.train_set, run.epoch)
    sums = torch.tensor(run.sums, device=run.device) * (rank == 0)  # the other ranks' sums are added below
    start = time.perf_counter()
    bar = tqdm(batches[run.step :], leave=False, total=len(batches), initial=run.step, disable=rank > 0 or None)
    bar.set_description(f"Epoch {run.epoch + 1}/{EPOCHS}")
    for batch in bar:
        global_step = run.epoch * len(batches) + run.step
        progress = (global_step + 0.5) / (EPOCHS * len(batches))  # measured at the middle of the step
        images = load_images(run.pixels, batch[rank::world_size], run.device)
        sums += train_step(run.network, run.optimizers, images, global_step, progress)
        update_average(*run.averaging, global_step)
        run.step += 1
        is_due = run.step % 50 == 0 or run.step == len(batches)  # checking every loss would make the GPU wait
        if rank == 0 and is_due and not sums[0].isfinite():  # gradients are averaged, so rank 0 sees all failures
            raise UserError(f"The loss at step {run.step} of epoch {run.epoch + 1} is not finite: lower LEARNING_RATE.")
        if stop_signals:
            break
    bar.close()
    if world_size > 1:
        distributed.all_reduce(sums)
    run.sums = sums.tolist()
    run.seconds += time.perf_counter() - start
    return batches.numel()


@torch.inference_mode()
def update_prior(run):
    """Fit the prior to the first 16,384 training photos; return their codes (N, L) and the number of active latents.

    A latent is active if the variance of its mean exceeds 0.01 (Burda et al. 2016, arXiv:1509.00519, section 5.2).
    """
    mu, log_var = encode_photos(run, run.train_set[:16384])
    run.average.fit_prior(mu, log_var)
    return mu, (mu.var(0, correction=0) > 0.01).sum().item()


@torch.inference_mode()
def encode_photos(run, photos):
    """Return the codes mu, log_var (N, L) of photos, given their indices (N,)."""
    codes = []
    batches = photos.split(BATCH_SIZE // world_size)
    for batch in tqdm(batches, "Encoding", leave=False, disable=None):
        images = load_images(run.pixels, batch, run.device)
        with autocast(run.device):
            codes.append(torch.stack(run.average.encode(images)))
    return torch.cat(codes, dim=1)


def update_directions(run, mu=()):
    """Fit the directions of attributes, if any; `mu` (N, L) are the codes of the first training photos, if known."""
    if run.labels:
        photos = run.labels.photos
        codes = mu[photos] if photos[-1] < len(mu) else encode_photos(run, run.train_set[photos])[0]
        run.average.directions = fit_directions(codes.cpu(), run.labels)


@torch.inference_mode()
def validate(run):
    """Return validation metrics, with photos reconstructed from z = mu, and their codes mu, log_var (N, L)."""
    codes = []
    losses = []
    for batch in run.val_set.split(BATCH_SIZE // world_size):
        images = load_images(run.pixels, batch, run.device)
        with autocast(run.device):
            mu, log_var = run.average.encode(images)
            recon = run.average.decode(mu)
        codes.append(torch.stack([mu, log_var]))
        losses.append(torch.stack([reconstruction_loss(recon, images, kind) for kind in ("mse", RECONSTRUCTION)]))
    mu, log_var = torch.cat(codes, dim=1).cpu()
    squared_error, recon_loss = torch.cat(losses, dim=1).cpu().double()
    kl = kl_divergence(mu, log_var).sum(1).double()
    metrics = {
        "val_loss": (recon_loss + kl_weight() * kl).mean().item(),
        "val_reconstruction": recon_loss.mean().item(),
        "val_kl": kl.mean().item(),
        "val_psnr": vae.psnr(squared_error.mean().item() / images[0].numel()),
    }
    return metrics, mu, log_var


def finish_epoch(run, count):
    """Fit the prior, validate and save all files of an epoch of `count` photos except last.pth; return its log line."""
    codes, active = update_prior(run)
    update_directions(run, codes)
    metrics, mu, log_var = validate(run)
    means = {f"train_{name}": total / count for name, total in zip(LOSSES, run.sums, strict=True)}
    row = {"epoch": run.epoch + 1, **means, **metrics, "active_units": active, "images_per_second": count / run.seconds}
    run.history.append(row)
    back_up(run)
    if kept_row(run) is row:
        vae.save_checkpoint(checkpoint_path(), run.average, constants=run.settings, **run.origin, **row)
    save_pictures(run, row["epoch"])
    save_history(run.history)
    if row["epoch"] == EPOCHS:
        plot_latents(run, mu, log_var)
    return log_line(row, kept_row(run) is row and not run.origin)


def kept_row(run):
    """Return the metrics of the epoch whose weights are kept: the best, or with START_FROM the last.

    The loss does not measure likeness, which improves until the end, and few photos leave too few for validation.
    """
    return run.history[-1] if run.origin else min(run.history, key=lambda row: row["val_loss"])


def log_line(row, is_best):
    """Return the log line of an epoch."""
    losses = f"train {row['train_loss']:.1f}  val {row['val_loss']:.1f}  KL {row['val_kl']:.1f} nats"
    quality = f"PSNR {row['val_psnr']:.2f} dB  {row['images_per_second']:.1f} images/s"
    remark = "  best so far" if is_best else ""
    if row["val_kl"] < 1:  # the codes of the validation photos say almost nothing
        remark = "  COLLAPSED: all reconstructions look alike; train longer or lower BETA"
    return f"Epoch {row['epoch']:2d}/{EPOCHS}  {losses}  {quality}{remark}"


# Files of a run
def checkpoint_path():
    """Return the path of the best weights, or of the copy of START_FROM."""
    return Path(OUTPUT_DIR, f"vae_model_{EPOCHS}.pth" if EPOCHS else Path(START_FROM).name)


def lock_output():
    """Lock OUTPUT_DIR against other runs, or raise UserError; delete a killed run's partial files; return the lock."""
    out = Path(OUTPUT_DIR)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire(timeout=0)
        for partial in [*out.glob(".*.[0-9]*.tmp"), *out.glob("progress/.*.[0-9]*.tmp")]:
            partial.unlink()
    except (Timeout, OSError) as error:
        in_use = f"another run is using it; if none is, it ended on another machine: delete {out / '.lock'}"
        reason = in_use if isinstance(error, Timeout) else error.strerror
        raise UserError(f"{out} cannot be written to ({reason}): choose another --output-dir.") from None
    return lock


@contextmanager
def warn_on_failure():
    """Turn an error in the block into a warning: the run can continue without the file."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"Warning     {error}")


def back_up(run):
    """Before a new run writes a file, move an earlier run's files to OUTPUT_DIR/previous-N, and copy its checkpoint."""
    if RESUME or run.epoch > 0:
        return
    out = Path(OUTPUT_DIR)
    names = ("last.pth", "history.csv", "loss_curves.png", "latent_space.png", "progress")
    earlier = [out / name for name in names if EPOCHS and (out / name).exists()]
    if not earlier and not checkpoint_path().exists():
        return
    backup = next(path for number in itertools.count(1) if not (path := out / f"previous-{number}").exists())
    if checkpoint_path().exists():  # copied, not moved, so that genpic.py keeps working
        copied = backup / checkpoint_path().name
        with vae.atomic_write(copied) as file:
            file.write(checkpoint_path().read_bytes())
        print(f"Undo        To restore the previous model later: {shlex.join(['cp', str(copied), OUTPUT_DIR])}")
    backup.mkdir(exist_ok=True)
    for path in earlier:
        with warn_on_failure():  # Windows cannot move a file that a program has open
            shutil.move(path, backup)
    print(f"Backup      of earlier files in {backup}")


def add_directions(run):
    """Write a copy of START_FROM with the directions of ATTRIBUTES, and everything else as it is."""
    update_directions(run)
    model, info = vae.load_checkpoint(START_FROM, dtype=None)
    model.directions |= run.average.directions
    back_up(run)
    vae.save_checkpoint(checkpoint_path(), model, **info)
    print(f"Done        {checkpoint_path()} is {START_FROM} with attributes added: {', '.join(run.labels.names)}")


def save_last(run):
    """Write last.pth, everything that --resume needs; raises UserError if a weight of the average is not finite."""
    position = {name: getattr(run, name) for name in ("epoch", "step", "seconds", "sums", "history")}
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    state = {"raw_state_dict": run.model.state_dict(), "optimizers": optimizers, "position": position}
    path = Path(OUTPUT_DIR, "last.pth")
    vae.save_checkpoint(path, run.average, format=FORMAT, constants=run.settings, **run.origin, **state)


def resume(run, info):
    """Restore a run from the contents of last.pth; raises UserError if its settings, photos or format differ."""
    path = Path(OUTPUT_DIR, "last.pth")
    if info.get("format") != FORMAT:
        raise UserError(f"{path} was not written by a run of this version: start a new run without --resume.")
    then = info["constants"]
    changes = [name for name in then if then[name] != run.settings.get(name, then[name])]
    if changes:
        told = "; ".join(f"{name} was {then[name]} and is now {run.settings[name]}" for name in sorted(changes))
        further = f" To train it further, use --start-from {path} instead of --resume." if "EPOCHS" in changes else ""
        raise UserError(f"The run in {path} can only continue with the same settings and photos: {told}.{further}")
    run.model.load_state_dict(info["raw_state_dict"])
    for optimizer, state in zip(run.optimizers, info["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    vars(run).update(info["position"])


# Pictures of a run
@torch.inference_mode()
def save_pictures(run, epoch):
    """Save 8 validation photos above their reconstructions, and 32 samples, from the same noise in every epoch."""
    images = load_images(run.pixels, run.val_set[:8], run.device)
    noise = vae.latent_noise(run.average, 32, SEED)
    with autocast(run.device):
        recon = run.average.decode(run.average.encode(images)[0])
        samples = run.average.decode(run.average.draw_latents(noise))
    stem = Path(OUTPUT_DIR, f"progress/epoch_{epoch:02d}")
    with warn_on_failure():
        vae.save_grid(torch.cat([images, recon]), f"{stem}_reconstructions.png", columns=len(images))
        vae.save_grid(samples, f"{stem}_samples.png", columns=8)


def save_history(history):
    """Write the metrics of all epochs to history.csv, and plot the losses over the epochs."""
    lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
    with warn_on_failure(), vae.atomic_write(Path(OUTPUT_DIR, "history.csv")) as file:
        file.write("\n".join([*lines, ""]).encode())
    figure = Figure((11, 3.2))
    figure.subplots_adjust(0.07, 0.15, 0.99, 0.88, 0.3)  # three times as fast as a constrained layout
    labels = ["loss per photo", f"{RECONSTRUCTION} loss", "KL per photo, nats"]
    for axes, name, label in zip(figure.subplots(1, 3), LOSSES, labels, strict=True):
        for split, style in (("train", "o-"), ("val", "o--")):
            axes.plot([row["epoch"] for row in history], [row[f"{split}_{name}"] for row in history], style, ms=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(["training, z drawn", "validation, averaged weights, z = mean"], loc="upper center", ncols=2)
    with warn_on_failure(), vae.atomic_write(Path(OUTPUT_DIR, "loss_curves.png")) as file:
        figure.savefig(file, dpi=120)


def plot_latents(run, mu, log_var):
    """Plot validation photos at their codes mu (N, L) on the first two principal axes, and the KL of each latent."""
    centred = F.pad(mu - mu.mean(0), (0, 1))  # two axes even for a single latent
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    fractions = variances.flip(0) / variances.sum().clamp_min(1e-12)
    places = (centred @ directions.flip(1)[:, :2])[:150].numpy()
    thumbnails = run.pixels[run.val_set[:150]].cpu().numpy()

    figure = Figure((11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for place, thumbnail in zip(places, thumbnails, strict=True):
        image = OffsetImage(thumbnail.squeeze(), zoom=22 / IMAGE_SIZE, cmap="gray", clim=(0, 255))
        left.add_artist(AnnotationBbox(image, place, frameon=False))
    left.scatter(*places.T, s=0)  # sets the limits of the axes
    left.margins(0.07)
    left.set(xlabel=f"first principal axis, {fractions[0]:.1%} of the variance", ylabel=f"second, {fractions[1]:.1%}")
    kl = kl_divergence(mu, log_var).mean(0).sort(descending=True).values
    right.bar(range(1, len(kl) + 1), kl.numpy())
    active = f"{run.history[-1]['active_units']} of {len(kl)} are active"
    right.set(xlabel=f"latents, sorted by KL; {active}", ylabel="KL per validation photo, nats")
    with warn_on_failure(), vae.atomic_write(Path(OUTPUT_DIR, "latent_space.png")) as file:
        figure.savefig(file, dpi=120)


# Main
def train(run, flags):
    """Train until the last epoch or a stop signal; `flags` are the flags that this run was started with."""
    while run.epoch < EPOCHS:
        count = train_epoch(run)
        if stop_signals:
            back_up(run)
            save_last(run)
            script = sys.argv[0] if __name__ == "__main__" else "train.py"
            command = shlex.join(["python", script, *(flag for flag in flags if flag != "--resume"), "--resume"])
            print(f"Stopped     in epoch {run.epoch + 1}. To continue: {command}", flush=True)
            raise SystemExit(128 + stop_signals[0])
        try:
            line = finish_epoch(run, count) if rank == 0 else None
        except torch.linalg.LinAlgError:
            raise UserError(f"The weights of epoch {run.epoch + 1} are too large: lower LEARNING_RATE.") from None
        vars(run).update(epoch=run.epoch + 1, step=0, seconds=0.0, sums=[0.0] * 3)
        if rank == 0:
            save_last(run)  # last, after the files it describes
            print(line, flush=True)


def check_settings():
    """Raise UserError for a constant with an invalid value."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if world_size > 1 and name not in os.environ:
            raise UserError(f"WORLD_SIZE is {world_size} but {name} is not set: start the processes with torchrun.")
    require(IMAGE_SIZE >= 16, "IMAGE_SIZE", IMAGE_SIZE, "at least 16")
    require(CHANNELS in (1, 3), "CHANNELS", CHANNELS, "3 (colour) or 1 (grey)")
    require(LATENT_DIM >= 1, "LATENT_DIM", LATENT_DIM, "at least 1")
    require(min(HIDDEN_DIMS, default=0) >= 1, "HIDDEN_DIMS", HIDDEN_DIMS, "a list of numbers, each at least 1")
    check_crop(CROP)
    require(0 <= VAL_FRACTION < 1, "VAL_FRACTION", VAL_FRACTION, "at least 0 and less than 1")
    adds = EPOCHS == 0 and ATTRIBUTES and START_FROM and not RESUME
    require(EPOCHS >= 1 or adds, "EPOCHS", EPOCHS, "at least 1, or 0 with ATTRIBUTES and START_FROM, without RESUME")
    is_table = ATTRIBUTES in ("", "folders") or os.path.isfile(ATTRIBUTES)
    require(is_table, "ATTRIBUTES", ATTRIBUTES, 'a table that exists, or "folders"')
    fits = 2 * world_size <= BATCH_SIZE and BATCH_SIZE % world_size == 0
    require(fits, "BATCH_SIZE", BATCH_SIZE, f"at least 2 for each process, and a multiple of {world_size}")
    require(0 <= AUGMENT <= 0.5, "AUGMENT", AUGMENT, "from 0 to 0.5")
    valid = LEARNING_RATE is None or 0 < LEARNING_RATE < 1e30
    require(valid, "LEARNING_RATE", LEARNING_RATE, "a positive number below 1e30")
    require(RECONSTRUCTION in ("mse", "ssim", "bce"), "RECONSTRUCTION", RECONSTRUCTION, '"mse", "ssim" or "bce"')
    require(BETA is None or 0 <= BETA < 1e30, "BETA", BETA, "at least 0 and below 1e30")
    require(0 <= KL_WARMUP_EPOCHS <= EPOCHS, "KL_WARMUP_EPOCHS", KL_WARMUP_EPOCHS, f"from 0 to EPOCHS ({EPOCHS})")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    require(world_size == 1 or ":" not in DEVICE, "DEVICE", DEVICE, '"auto" or "cpu" with torchrun')
    require(COMPILE in ("auto", "yes", "no"), "COMPILE", COMPILE, '"auto", "yes" or "no"')
    out = Path(OUTPUT_DIR).resolve()
    require(Path(DATA).resolve() not in (out, *out.parents), "OUTPUT_DIR", OUTPUT_DIR, "a folder outside DATA")
    require(CROP != "face" or face_detector(), "CROP", CROP, '"center" or "LEFT TOP SIZE" unless dlib is installed')
    if RESUME and not os.path.isfile(out / "last.pth"):
        raise UserError(f"There is no {OUTPUT_DIR}/last.pth to resume: drop --resume, or correct --output-dir.")


def describe_run(run):
    """Print the split, the model, the hardware, and where a resumed run continues."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    kind = "bfloat16" if precision(run.device) == torch.bfloat16 else "float32"
    compiled = "compiled" if run.is_compiled else "not compiled"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"Split       {len(run.train_set):,} training photos, {len(run.val_set):,} validation photos")
    print(f"Model       {IMAGE_SIZE}x{IMAGE_SIZE}x{CHANNELS}, latent {LATENT_DIM}, {parameters:,} parameters")
    begin = f", weights of {START_FROM}" if START_FROM and not RESUME else ""
    print(f"Recipe      LEARNING_RATE {run.settings['LEARNING_RATE']:g}, BETA {run.settings['BETA']:.4g}{begin}")
    if RESUME:
        print(f"Resuming    after epoch {run.epoch} of {EPOCHS} and step {run.step} of the next")
    processes = f"{world_size} x {run.device.type} ({name})"
    print(f"Device      {processes}, {kind}, {compiled}, batches of {run.settings['BATCH_SIZE']}", flush=True)


def describe_result(run):
    """Print which epoch's weights were kept, the state of the latents, and the next command."""
    kept = kept_row(run)
    path = checkpoint_path()
    choice = [] if path == Path("checkpoints_best/vae_model_20.pth") else ["--checkpoint", str(path)]
    print(f"Done        The weights of epoch {kept['epoch']}, {kept['val_psnr']:.2f} dB, are in {path}")
    latents = "collapsed" if kept["val_kl"] < 1 else f"{kept['active_units']} of {LATENT_DIM} active"
    print(f"Latents     {latents}, {kept['val_kl']:.1f} nats of KL divergence")
    print(f"Next        {shlex.join(['python', 'genpic.py', *choice])}")


def main(argv=()):
    """Train a model, or resume an interrupted run; `argv` is a list of flags."""
    with vae.flags(globals(), argv) as (settings, _):
        check_settings()
        reuse_freed_memory()
        device = set_up_device()
        with lock_output() if rank == 0 else nullcontext():
            start, info = read_start()
            run = new_run(settings, device, start, info)
            if RESUME:
                resume(run, info)
            if rank == 0:
                describe_run(run)
            with stopping_after_the_step() if world_size == 1 else nullcontext():  # a single rank must not stop alone
                train(run, argv)
            if rank == 0 and EPOCHS == 0:
                add_directions(run)
            elif rank == 0:
                describe_result(run)
        if world_size > 1:
            distributed.destroy_process_group()


if __name__ == "__main__":
    vae.run_script(main)
