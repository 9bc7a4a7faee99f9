"""Train the variational autoencoder of vae.py on a folder of photos.

    python train.py                               # the photos in data/train (the demo faces while there are none)
    python train.py --data ~/photos --epochs 5    # every constant at the top of the script is a flag
    python train.py --resume                      # go on where an interrupted run stopped

Writes checkpoints_best/vae_model_20.pth (the best weights, for genpic.py), last.pth (to resume), history.csv,
loss_curves.png and progress/ with pictures of every epoch.
"""

import copy
import csv
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vae import (
    CHANNELS,
    HIDDEN_DIMS,
    IMAGE_SIZE,
    LATENT_DIM,
    VAE,
    UserError,
    atomic_write,
    calibrated_nll,
    celeb_transforms,
    find_images,
    kl_divergence,
    latent_noise,
    load_checkpoint,
    override_constants,
    paired,
    pick_device,
    psnr,
    read_image,
    reconstruction_loss,
    require,
    save_checkpoint,
    save_grid,
    script,
)

# What goes in and out
DATA: str = "data/train"  # folder of photos, searched with all folders in it
OUTPUT_DIR: str = "checkpoints_best"  # folder for the checkpoints, curves and pictures of the run
RESUME: bool = False  # go on with the run that OUTPUT_DIR/last.pth holds, instead of starting anew
VAL_FRACTION: float = 0.05  # share of the photos held out to validate on; more gives steadier validation figures
FLIP: bool = True  # mirror half of the photos, drawn anew each time; turn off where left and right differ in meaning

# How the model learns
EPOCHS: int = 20  # passes over the photos; also the number in the checkpoint's name
BATCH_SIZE: int = 32  # photos per step; raise it on a large GPU, lower it where memory runs out
LEARNING_RATE: float = 1e-3  # Adam's peak step size, reached after 5 % of the run; lower it if the loss jumps about
RECONSTRUCTION: str = "mse"  # "mse" squared error, "bce" cross-entropy, "sigma" Gaussian that finds its own weight
BETA: float = 0.132  # weight of the KL divergence in nats, unused by "sigma"; higher: plainer samples, blurrier photos
KL_WARMUP_EPOCHS: float = 0.0  # epochs over which the KL weight grows from 0; a few help where latents stay unused
SEED: int = 0  # start of all random numbers; another one gives another split, order and model

# What it runs on
DEVICE: str = "auto"  # "auto" is CUDA where there is one, else the CPU; or name a device: "cpu", "cuda:1"
AMP: bool = True  # compute in bfloat16 where the hardware has it: much faster (see README), the same pictures
COMPILE: str = "auto"  # "yes" compiles the model first (a minute), "auto" only on CUDA, "no" never


def seed_of(use, index=0):
    """Return the seed (int) of one stream of random numbers: a pure function of SEED, its use (bytes) and an index."""
    return int(np.random.SeedSequence((SEED, *use, index)).generate_state(1, np.uint64)[0])


# Photos
def find_photos():
    """Return the paths of the photos to learn from, and their names below DATA (the demo while data/train is empty)."""
    folder, paths = Path(DATA), find_images(DATA, without=OUTPUT_DIR)
    if not paths and folder == Path("data/train") and (paths := find_images("data/demo")):
        print("There are no photos in data/train yet, so this run learns from the demo faces in data/demo.")
        folder = Path("data/demo")
    if not paths:
        state = "holds no photos" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"DATA {folder.absolute()} {state}: put photos there, or name their folder with --data. Photos to learn "
            f"from are CelebA's img_align_celeba.zip from mmlab.ie.cuhk.edu.hk/projects/CelebA.html; unpack it first.",
            2,
        )
    return paths, [path.relative_to(folder).as_posix() for path in paths]


def load_photos(paths, names, device):
    """Return the photos as a uint8 tensor (N, H, W, C): on the GPU where they fit, else mapped from the cache file."""
    cache = cache_path(paths, names)
    if not cache.exists():
        build_cache(paths, cache)
    photos = torch.from_numpy(np.memmap(cache, np.uint8, mode="c").reshape(-1, IMAGE_SIZE, IMAGE_SIZE, CHANNELS))
    skipped = f" ({len(paths) - len(photos)} files skipped)" if len(paths) > len(photos) else ""
    print(f"Photos      {len(photos):,}{skipped}, kept as {cache} ({photos.nbytes / 1e6:,.0f} MB)")
    if len(photos) < 3:
        raise UserError(f"There are {len(photos)} readable photos: training and validation need at least 3.")
    fits = device.type == "cuda" and photos.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return photos.to(device) if fits else photos


def digest(lines):
    """Return a short name (16 hexadecimal digits) of a list of texts, another one for any other list."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def cache_path(paths, names):
    """Return where the decoded photos are kept; it changes with their names, sizes and times and the target size."""
    stats = [path.stat() if path.exists() else None for path in paths]  # None for a link to nowhere
    lines = [f"{name} {stat and (stat.st_size, stat.st_mtime_ns)}" for name, stat in zip(names, stats, strict=True)]
    return Path(f"data/cache/{IMAGE_SIZE}x{IMAGE_SIZE}x{CHANNELS}-{digest(lines)}.u8")


def build_cache(paths, cache):
    """Decode, scale and crop every photo once, on all cores, into a file of uint8 (N, H, W, C)."""
    crop = celeb_transforms(IMAGE_SIZE)[1]

    def decode(path):
        try:
            return np.asarray(crop(read_image(path, CHANNELS))).tobytes()
        except UserError as error:
            tqdm.write(f"Skipped: {error}")
            return b""

    bar = tqdm(total=len(paths), desc="Reading photos", unit="photo", leave=False, disable=None)
    with atomic_write(cache) as partial, open(partial, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(paths), 512):  # a window, so that decoded photos never pile up in memory
            for photo in pool.map(decode, paths[start : start + 512]):
                file.write(photo)
                bar.update()
        if not file.tell():
            raise UserError(f"None of the {len(paths)} files in {DATA} can be read as a photo.")


def split_photos(count):
    """Return the indices to train on and to validate on, drawn by SEED; at least 2 and 1 of 3 or more photos."""
    held_out = min(max(1, round(count * VAL_FRACTION)), count - 2)
    indices = torch.from_numpy(np.random.default_rng(seed_of(b"split")).permutation(count))
    return indices[held_out:], indices[:held_out]


def load_batch(photos, indices, device):
    """Photos at `indices`, uint8 (N, H, W, C) -> images (B, C, H, W) in [0, 1] on `device`, channels last in memory."""
    return photos[indices].to(device).permute(0, 3, 1, 2).float().div_(255)


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
@functools.cache
def has_bfloat16(device_type):
    """Whether the hardware computes in bfloat16 itself; emulation would be slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device_type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def autocast(device):
    """Return the context that the model runs in: bfloat16 where AMP and the hardware allow it, else no change."""
    return torch.autocast(device.type, torch.bfloat16, enabled=AMP and has_bfloat16(device.type))


def compiled(model, device, batch_size):
    """Return `model` compiled as COMPILE asks, or as it is where compiling fails; both share their weights."""
    if COMPILE == "no" or (COMPILE == "auto" and device.type != "cuda"):
        return model
    network, before = torch.compile(model, dynamic=False), copy.deepcopy(model.state_dict())
    images = torch.zeros(batch_size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, device=device)
    try:  # compiling happens in the first step, so take one here
        with autocast(device):
            recon, mu, log_var = network(images.to(memory_format=torch.channels_last))
        (recon.sum() + mu.sum() + log_var.sum()).backward()
    except Exception as error:  # no C++ compiler, no Triton, an unsupported platform: all of them only cost speed
        print(f"Compiling the model fails here ({type(error).__name__}), so it runs uncompiled.")
        network = model
    model.zero_grad()
    model.load_state_dict(before)  # BatchNorm has counted the step
    return network


def train_step(network, optimizer, images, step, progress):
    """Take one step on images (B, C, H, W); return the sums over them of loss, reconstruction, KL and 1, (4,)."""
    # Flips and latent noise depend on the step alone, so that a run can resume anywhere
    torch.manual_seed(seed_of(b"step", step))
    images = mirror_half(images) if FLIP else images
    with autocast(images.device):
        recon, mu, log_var = network(images)
    reconstruction, kl = reconstruction_loss(recon, images, RECONSTRUCTION), kl_divergence(mu, log_var)
    losses = reconstruction + kl_weight(progress) * kl

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(progress)
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    return torch.stack([losses, reconstruction, kl, torch.ones_like(kl)]).detach().sum(1)


def train_epoch(network, optimizer, photos, train_set, run, stopping):
    """Take the steps that are left of the run's epoch, up to its end or a request to stop; return images per second."""
    network.train()
    order = np.random.default_rng(seed_of(b"order", run["epoch"])).permutation(len(train_set))
    shuffled = train_set[torch.from_numpy(order).to(train_set.device)]
    batches = [batch for batch in shuffled.split(BATCH_SIZE) if len(batch) > 1]  # BatchNorm needs two photos
    first, start = run["step"], time.perf_counter()
    with tqdm(batches[first:], f"Epoch {run['epoch'] + 1}/{EPOCHS}", unit="step", leave=False, disable=None) as bar:
        for batch in bar:
            if stopping:
                break
            step = run["epoch"] * len(batches) + run["step"]
            images = load_batch(photos, batch, run["sums"].device)
            run["sums"] += train_step(network, optimizer, images, step, (step + 0.5) / (EPOCHS * len(batches)))
            run["step"] += 1
    run["sums"].tolist()  # waits for the GPU to be done
    return sum(map(len, batches[first : run["step"]])) / (time.perf_counter() - start)


@torch.inference_mode()
def evaluate(model, photos, val_set, device):
    """Return the figures of the validation photos, each reconstructed from z = mu, as a dict of floats."""
    losses = []
    for batch in val_set.split(BATCH_SIZE):
        images = load_batch(photos, batch, device)
        with autocast(device):
            mu, log_var = model.encode(images)
            recon = model.decode(mu)
        error = reconstruction_loss(recon, images, "mse")
        own = reconstruction_loss(recon, images, "bce") if RECONSTRUCTION == "bce" else error
        losses.append(torch.stack([error, own, kl_divergence(mu, log_var)]))
    squared_error, reconstruction, kl = torch.cat(losses, dim=1).cpu().double()
    pixels = math.prod(images.shape[1:])
    if RECONSTRUCTION == "sigma":  # one variance for all photos, so that the figure does not depend on batches
        reconstruction = calibrated_nll(squared_error, pixels)
    return {
        "val_loss": (reconstruction + kl_weight(1.0) * kl).mean().item(),
        "val_reconstruction": reconstruction.mean().item(),
        "val_kl": kl.mean().item(),
        "val_squared_error": squared_error.mean().item(),
        "val_psnr": psnr(squared_error.mean().item(), pixels),
    }


@torch.inference_mode()
def fit_prior(model, photos, train_set, device):
    """Fit the model's prior to the codes of at most 16,384 photos of the training split."""
    codes = []
    for batch in train_set[:16384].split(BATCH_SIZE):
        with autocast(device):
            codes.append(model.encode(load_batch(photos, batch, device)))
    try:
        model.fit_prior(*map(torch.cat, zip(*codes, strict=True)))
    except torch.linalg.LinAlgError:
        raise UserError("The latent codes grew out of bounds: start again with a lower LEARNING_RATE.") from None


# What a run leaves behind
def finish_epoch(model, optimizer, photos, train_set, val_set, run, settings, speed):
    """Validate, fit the prior and write the files of an epoch, last.pth last: all it tells of is then there."""
    device, epoch, out = run["sums"].device, run["epoch"] + 1, Path(OUTPUT_DIR)
    *sums, seen = run["sums"].tolist()
    if not all(map(math.isfinite, sums)):
        raise UserError(f"The loss left the numbers in epoch {epoch}: start again with a lower LEARNING_RATE.")
    model.eval()
    row = {"epoch": epoch, "train_loss": sums[0] / seen, "train_reconstruction": sums[1] / seen}
    row |= {"train_kl": sums[2] / seen} | evaluate(model, photos, val_set, device) | {"images_per_second": speed}
    fit_prior(model, photos, train_set, device)

    best = row["val_loss"] < min((earlier["val_loss"] for earlier in run["history"]), default=math.inf)
    if best:
        keep_previous(checkpoint_path(), run["id"])
        save_checkpoint(checkpoint_path(), model, run=run["id"], constants=settings, **row)
    run |= {"epoch": epoch, "step": 0, "sums": torch.zeros_like(run["sums"]), "history": [*run["history"], row]}
    save_pictures(model, load_batch(photos, val_set[:8], device), out / f"progress/epoch_{epoch:02d}")
    save_history(run["history"], out / "history.csv")
    plot_history(run["history"], out / "loss_curves.png")
    save_last(model, optimizer, run, settings)
    print(epoch_line(row, best), flush=True)


def epoch_line(row, best):
    """Return the line that tells a person how an epoch went."""
    loss = f"{row['val_loss']:.1f} = {row['val_reconstruction']:.1f} + {kl_weight(1.0):g} x {row['val_kl']:.1f} nats KL"
    return (
        f"Epoch {row['epoch']:2d}/{EPOCHS}  train {row['train_loss']:.1f}  val {loss}  PSNR {row['val_psnr']:.2f} dB  "
        f"{row['images_per_second']:.1f} images/s{'  best so far' if best else ''}"
    )


def checkpoint_path():
    """Return where the best weights of a run of EPOCHS epochs go."""
    return Path(OUTPUT_DIR, f"vae_model_{EPOCHS}.pth")


def last_path():
    """Return where the state of the run goes, for --resume."""
    return Path(OUTPUT_DIR, "last.pth")


def keep_previous(path, run_id):
    """Copy a checkpoint at `path` that another run made to a free name beside it, so that it outlives this run."""
    if not path.exists():
        return
    try:
        info = load_checkpoint(path)[1]
    except UserError:
        info = {}  # not a checkpoint, but somebody's file all the same
    if info.get("run") == run_id or info.get("finished"):  # of the last.pth of a finished run nothing is missed
        return
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    kept = next(kept for end in endings if not (kept := path.with_suffix(f".previous{end}.pth")).exists())
    with atomic_write(kept) as partial:
        shutil.copy2(path, partial)
    print(f"{path} was there from another run: kept as {kept}")


def save_last(model, optimizer, run, settings):
    """Write all that --resume needs to last.pth, after keeping that of another run which was not finished."""
    keep_previous(last_path(), run["id"])
    info = {"run": run["id"], "finished": run["epoch"] == EPOCHS, "constants": settings, "state": run}
    save_checkpoint(last_path(), model, optimizer=optimizer.state_dict(), **info)


def save_history(history, path):
    """Write the figures of all epochs as CSV, a line per epoch."""
    with atomic_write(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


@torch.inference_mode()
def save_pictures(model, images, stem):
    """Save `images` (B, C, H, W) over their reconstructions, and 64 samples from the same noise at every epoch."""
    noise = latent_noise(SEED, 64, LATENT_DIM).to(images.device)
    with autocast(images.device):
        reconstructions = model.decode(model.encode(images)[0])
        samples = model.decode(model.draw_latents(noise))
    save_grid(paired(images, reconstructions, len(images)), f"{stem}_reconstructions.png", columns=len(images))
    save_grid(samples, f"{stem}_samples.png", columns=8)


def plot_history(history, path):
    """Draw loss, reconstruction and KL per epoch, of training (z drawn) and of validation (z = mu)."""
    from matplotlib.figure import Figure  # takes a second to import, so only here

    measure = {"mse": "squared error", "bce": "cross-entropy in nats", "sigma": "Gaussian NLL in nats"}[RECONSTRUCTION]
    panels = {"loss": "loss per photo", "reconstruction": f"{measure}, per photo", "kl": "KL in nats, per photo"}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for split, style in (("train", "o-"), ("val", "o--")):
            axes.plot([row["epoch"] for row in history], [row[f"{split}_{name}"] for row in history], style, ms=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    figure.legend(["training, z drawn", "validation, z = mean"], loc="outside upper center", ncols=2, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)


# The run
def check_settings():
    """Raise UserError for a constant that cannot be."""
    require(EPOCHS >= 1, "EPOCHS", EPOCHS, "at least 1")
    require(BATCH_SIZE >= 2, "BATCH_SIZE", BATCH_SIZE, "at least 2")
    require(0 < LEARNING_RATE < math.inf, "LEARNING_RATE", LEARNING_RATE, "a positive number")
    require(RECONSTRUCTION in ("mse", "bce", "sigma"), "RECONSTRUCTION", RECONSTRUCTION, '"mse", "bce" or "sigma"')
    require(0 <= BETA < math.inf, "BETA", BETA, "a number that is not negative")
    require(0 <= KL_WARMUP_EPOCHS <= EPOCHS, "KL_WARMUP_EPOCHS", KL_WARMUP_EPOCHS, f"from 0 to EPOCHS ({EPOCHS})")
    require(0 <= VAL_FRACTION < 1, "VAL_FRACTION", VAL_FRACTION, "at least 0 and less than 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    require(COMPILE in ("auto", "yes", "no"), "COMPILE", COMPILE, '"auto", "yes" or "no"')
    require(Path(DATA).resolve() != Path(OUTPUT_DIR).resolve(), "OUTPUT_DIR", OUTPUT_DIR, "another folder than DATA")
    if RESUME and not last_path().exists():
        raise UserError(
            f"There is no {last_path()} to resume from: start without --resume, or name its --output-dir.", 2
        )


def prepare_output():
    """Make OUTPUT_DIR and see that it can be written to now, not after the first epoch."""
    try:
        Path(OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=OUTPUT_DIR).close()
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {OUTPUT_DIR} cannot be written to ({error.strerror}): name another.", 2) from None


def new_run(photos):
    """Return the state of a run that has yet to take its first step; `photos` is a text that tells its photos apart."""
    return {"id": uuid.uuid4().hex, "photos": photos, "epoch": 0, "step": 0, "sums": torch.zeros(4), "history": []}


def resume_run(model, optimizer, settings, photos):
    """Return the state of the run in last.pth, and set model and optimizer to its; UserError where it cannot go on."""
    saved, info = load_checkpoint(last_path())
    if not {"optimizer", "constants", "state"} <= info.keys():
        raise UserError(f"{last_path()} is not the last.pth of a run: there is nothing in it to resume.")
    then, now = info["constants"] | {"photos": info["state"]["photos"]}, settings | {"photos": photos}
    free = {"RESUME", "DATA", "OUTPUT_DIR", "DEVICE", "AMP", "COMPILE"}  # may change between the sessions of a run
    keys = sorted((then.keys() | now.keys()) - free)
    changes = [f"{key} was {then.get(key)} and is {now.get(key)}" for key in keys if then.get(key) != now.get(key)]
    if changes:
        raise UserError(f"The run of {last_path()} goes on only as it began: {'; '.join(changes)}.", 2)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(info["optimizer"])
    return info["state"]


def describe_run(model, device, run, train_set, val_set):
    """Print what is about to happen: the split, the model, the machine, and where a resumed run goes on."""
    batch = min(BATCH_SIZE, len(train_set))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bfloat16" if AMP and has_bfloat16(device.type) else "float32"
    print(f"Split       {len(train_set):,} to train on in batches of {batch}, {len(val_set):,} to validate on")
    print(f"Model       {IMAGE_SIZE}x{IMAGE_SIZE}x{CHANNELS}, latent {LATENT_DIM}, {parameters:,} parameters")
    print(f"Device      {device} ({name}), {precision}")
    if RESUME:
        print(f"Resuming    after epoch {run['epoch']} of {EPOCHS} and {run['step']} steps of the next")
    sys.stdout.flush()  # an epoch may take hours, and a log file should tell of it from the start


def resume_command(argv):
    """Return the command line that goes on with the run that these flags (None: those of the process) started."""
    flags = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", "train.py", *(flag for flag in flags if flag != "--resume"), "--resume"])


def describe_result(run):
    """Print the best epoch, where everything is and which command comes next."""
    best = min(run["history"], key=lambda row: row["val_loss"])
    path, out = checkpoint_path(), Path(OUTPUT_DIR)
    print(f"Done. The best weights, of epoch {best['epoch']} with {best['val_psnr']:.2f} dB, are in {path};")
    print(f"pictures of every epoch in {out / 'progress'}, the curves in {out / 'loss_curves.png'}.")
    flag = "" if path == Path("checkpoints_best/vae_model_20.pth") else f" --checkpoint {shlex.quote(str(path))}"
    print(f"Next: python genpic.py{flag}")


@contextmanager
def stop_requests():
    """Yield a list that the first Ctrl-C or SIGTERM puts its number into; the second one acts at once, as ever."""
    received = []

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        received.append(number)
        restore()
        print("\nStopping after this step; once more stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


@script
def main(argv=None):
    """Train from the first step, or from where an interrupted run stopped, to the last."""
    settings = override_constants(globals(), argv)
    check_settings()
    device = pick_device(DEVICE)

    # Model and optimizer
    torch.manual_seed(seed_of(b"init"))
    model = VAE(IMAGE_SIZE, CHANNELS, HIDDEN_DIMS, LATENT_DIM).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    # Photos, split and the state of the run
    paths, names = find_photos()
    prepare_output()
    photos = load_photos(paths, names, device)
    train_set, val_set = (part.to(photos.device) for part in split_photos(len(photos)))
    photos_id = f"{len(photos)} photos ({digest(names)})"
    run = resume_run(model, optimizer, settings, photos_id) if RESUME else new_run(photos_id)
    run["sums"] = run["sums"].to(device)
    describe_run(model, device, run, train_set, val_set)

    # Epochs
    network = compiled(model, device, min(BATCH_SIZE, len(train_set)))
    with stop_requests() as stopping:
        while run["epoch"] < EPOCHS:
            speed = train_epoch(network, optimizer, photos, train_set, run, stopping)
            if stopping:
                save_last(model, optimizer, run, settings)
                print(f"Stopped in epoch {run['epoch'] + 1}. To go on: {resume_command(argv)}")
                raise SystemExit(128 + stopping[0])
            finish_epoch(model, optimizer, photos, train_set, val_set, run, settings, speed)
    describe_result(run)


if __name__ == "__main__":
    main()
