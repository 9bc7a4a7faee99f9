"""Make pictures with a trained model: variations of a photo, reconstructions, samples.

    python genpic.py                                  # ten variations of the photo in data/tested_data
    python genpic.py --image me.jpg --w 0.1           # every constant at the top of the script is a flag
    python genpic.py --mode sample --output faces.png

Writes generated_images_grid2.jpg: the photo, its reconstruction and the variations, six in a row.
"""

import itertools
import math
from pathlib import Path

import torch

from vae import (
    UserError,
    celeb_transforms,
    find_images,
    latent_noise,
    load_checkpoint,
    override_constants,
    paired,
    pick_device,
    printable,
    psnr,
    read_image,
    reconstruction_loss,
    require,
    save_grid,
    script,
)

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model, as train.py leaves it
IMAGE: str = "data/tested_data"  # a photo, or a folder: its first photo by name ("reconstruct" takes all of them)
OUTPUT: str = "generated_images_grid2.jpg"  # the picture to write: .jpg, .png or .webp
MODE: str = "variations"  # "variations" of the photo, "reconstruct" all photos, "sample" 10 x 10 new faces
NUM_VARIATIONS: int = 10  # how many variations of the photo
W: float = 0.01  # the w of the write-up, share of the code's variance drawn anew: 0 the same face, 1 any other
NOISE: str = "population"  # draw as faces differ, or "posterior": as the encoder doubts, which is hardly visible
SEED: int = 0  # start of the random numbers; another one gives other variations and samples
DEVICE: str = "auto"  # "auto" is CUDA where there is one, else the CPU; or name a device: "cpu", "cuda:1"


# Photos and codes
def photo_paths():
    """Return the path of the photo IMAGE, or those of all photos in the folder IMAGE."""
    require(Path(IMAGE).exists(), "IMAGE", IMAGE, "a photo, or a folder with photos, that exists")
    paths = find_images(IMAGE) if Path(IMAGE).is_dir() else [Path(IMAGE)]
    if not paths:
        raise UserError(f"There is no photo in {IMAGE}: put one there, or name one with --image.", 2)
    return paths


def load_photo(model, path):
    """Read a photo as the model was trained to see it: (1, C, H, W) in [0, 1], on its device."""
    size, channels = model.config["image_size"], model.config["channels"]
    return celeb_transforms(size)[0](read_image(path, channels, size))[None].to(model.latent_mean.device)


def readable_photos(model):
    """Yield (path, photo (1, C, H, W)) of the photos that IMAGE stands for, and print which cannot be read."""
    paths, found = photo_paths(), False
    for path in paths:
        try:
            photo = load_photo(model, path)
        except UserError as error:
            if not Path(IMAGE).is_dir():
                raise
            print(f"Skipped     {error}")
        else:
            found = True
            yield path, photo
    if not found:
        raise UserError(f"No photo in {IMAGE} can be read.")


def noise(model, count):
    """Standard normal noise (count, L) on the model's device; row k is the same however many are drawn."""
    return latent_noise(SEED, count, model.config["latent_dim"]).to(model.latent_mean.device)


def perturb(model, mu, log_var, eps):
    """Return codes (N, L) around the code mu (1, L) of a photo from noise eps (N, L); W is the share drawn anew.

    "population": z = m + sqrt(1 - W) (mu - m) + sqrt(W) S eps, with the fitted prior's mean m and Cholesky factor S,
    so that codes of the population stay distributed as the population for every W.
    "posterior": z = mu + sqrt(W) sigma eps, with the encoder's own sigma for this photo.
    """
    if NOISE == "posterior":
        return mu + math.sqrt(W) * torch.exp(0.5 * log_var) * eps
    kept = torch.lerp(model.latent_mean, mu, math.sqrt(1 - W))
    return kept + math.sqrt(W) * (eps @ model.latent_scale.T)


def decode(model, z):
    """Codes (N, L) -> images (N, C, H, W), 64 at a time, so that memory does not grow with N."""
    return torch.cat([model.decode(part) for part in z.split(64)])


# Modes: each yields sheets, that is images (N, C, H, W) and how many of them stand in a row
def variations(model):
    """The photo, its reconstruction and NUM_VARIATIONS variations of it."""
    path, photo = next(readable_photos(model))
    choice = f", the first in {IMAGE}; --image names another" if Path(IMAGE).is_dir() else ""
    print(f"Photo       {printable(str(path))}{choice}")
    mu, log_var = model.encode(photo)
    codes = perturb(model, mu, log_var, noise(model, NUM_VARIATIONS))
    reconstruction = model.decode(mu)
    squared_error = reconstruction_loss(reconstruction, photo, "mse").item()
    print(f"PSNR        {psnr(squared_error, photo.numel()):.2f} dB, its reconstruction against the photo")
    yield torch.cat([photo, reconstruction, decode(model, codes)]), 6


def reconstruct(model):
    """All photos over their reconstructions, at most 64 a sheet."""
    photos, squared_error, pixels = (photo for _, photo in readable_photos(model)), 0.0, 0
    while sheet := list(itertools.islice(photos, 64)):
        originals = torch.cat(sheet)
        reconstructions = model.decode(model.encode(originals)[0])
        squared_error += reconstruction_loss(reconstructions, originals, "mse").sum().item()
        pixels += originals.numel()
        columns = min(8, len(sheet))
        yield paired(originals, reconstructions, columns), columns
    print(f"PSNR        {psnr(squared_error, pixels):.2f} dB, the reconstructions against the photos")


def sample(model):
    """100 faces of the model's prior."""
    yield decode(model, model.draw_latents(noise(model, 100))), 10


MODES = {"variations": variations, "reconstruct": reconstruct, "sample": sample}


# The run
def check_settings():
    """Raise UserError for a constant that cannot be."""
    require(MODE in MODES, "MODE", MODE, f"one of {', '.join(MODES)}")
    require(NOISE in ("population", "posterior"), "NOISE", NOISE, '"population" or "posterior"')
    require(0 <= W <= 1, "W", W, "a number from 0 to 1")
    require(NUM_VARIATIONS >= 1, "NUM_VARIATIONS", NUM_VARIATIONS, "at least 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    endings = (".jpg", ".jpeg", ".png", ".webp")
    require(Path(OUTPUT).suffix.lower() in endings, "OUTPUT", OUTPUT, f"a file name that ends in {', '.join(endings)}")
    require(not Path(OUTPUT).is_dir(), "OUTPUT", OUTPUT, "a file, but it is a folder")
    if not Path(CHECKPOINT).is_file():
        found = ", ".join(sorted(map(str, Path(CHECKPOINT).parent.glob("*.pth"))))
        hint = f"name one with --checkpoint (there is {found})" if found else "make one with `python train.py`"
        raise UserError(f"There is no checkpoint {CHECKPOINT}: {hint}.", 2)


def check_output(path):
    """Raise UserError where a picture would take the place of one of the photos it is made from."""
    if path.exists() and MODE != "sample" and path.resolve() in {photo.resolve() for photo in photo_paths()}:
        raise UserError(f"OUTPUT is {path}, which is one of the photos: name another file with --output.", 2)


def describe_model(model, info):
    """Print which model is at work, as far as its checkpoint tells."""
    known = isinstance(info.get("epoch"), int) and isinstance(info.get("val_psnr"), float)
    trained = f", epoch {info['epoch']}, {info['val_psnr']:.2f} dB on its validation photos" if known else ""
    print(f"Model       {CHECKPOINT}{trained}")
    if not model.prior_is_fitted():
        print("Prior       N(0, I), for this checkpoint carries no fitted one: expect smeared samples and variations")


@script
@torch.inference_mode()
def main(argv=None):
    """Load the model, make the pictures that MODE names and save them."""
    override_constants(globals(), argv)
    check_settings()
    model, info = load_checkpoint(CHECKPOINT, pick_device(DEVICE))
    describe_model(model, info)
    for number, (images, columns) in enumerate(MODES[MODE](model), start=1):
        output = Path(OUTPUT) if number == 1 else Path(OUTPUT).with_stem(f"{Path(OUTPUT).stem}-{number}")
        check_output(output)
        save_grid(images, output, columns)
        print(f"Wrote       {output}")


if __name__ == "__main__":
    main()
