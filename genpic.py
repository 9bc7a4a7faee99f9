"""Make pictures with a trained model: variations of a photo, reconstructions, samples, interpolations.

    python genpic.py                                  # ten variations of the photo in data/tested_data
    python genpic.py --image me.jpg --w 0.1           # every constant at the top of the script is a flag
    python genpic.py --mode sample --output faces.png
    python genpic.py --mode interpolate --image me.jpg --image-to you.jpg --output morph.gif

Writes generated_images_grid2.jpg: the photo, its reconstruction and the variations, six in a row.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor

import vae
from data.faces import check_crop, read_square
from data.photos import find_photos
from vae import UserError, require

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model, as train.py leaves it
IMAGE: str = "data/tested_data"  # a photo; or a folder, .zip or .npy: its first photo ("reconstruct" takes all of them)
CROP: str = "face"  # the square of a photo to use: "face" (the one around it), "center", or "LEFT TOP SIZE" in pixels
IMAGE_TO: str = ""  # the photo that "interpolate" goes to from IMAGE; if empty, it goes from one sample to another
OUTPUT: str = "generated_images_grid2.jpg"  # the picture to write: .jpg, .png or .webp; of "interpolate" also .gif
MODE: str = "variations"  # what to make: variations, reconstruct, sample, interpolate or sweep
NUM_VARIATIONS: int = 10  # number of variations of the photo
W: float = 0.01  # share of the variance of a photo's code that is drawn again: 0 the same face, 1 any other
PRIOR: str = "fitted"  # the population: "fitted" to the codes of the training photos, or "standard", N(0, I)
SEED: int = 0  # start of the random numbers; another one gives other variations and samples
DEVICE: str = "auto"  # "auto" is CUDA if available, else the CPU; or name a device: "cpu", "cuda:1"

SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # the W of the rows of "sweep"


# Photos and codes
def load_photo(model, photo):
    """Read a Photo as the model was trained to see it: (1, C, H, W) in [0, 1], on its device."""
    size = model.config["image_size"]
    image, face = read_square(photo, model.config["channels"], size, CROP, model.face_box)
    if CROP == "face" and model.face_box:
        print(f"Face        {photo}: {face or 'none found (turned, tilted, too small?), so this is the middle square'}")
    return to_tensor(image)[None].to(model.latent_mean.device)


def load_photos(model, place):
    """Yield (Photo, image (1, C, H, W)) of all readable photos at a place; raises UserError if there are none."""
    photos = find_photos(place)
    readable = False
    for photo in photos:
        try:
            yield photo, load_photo(model, photo)
            readable = True
        except UserError as error:
            if len(photos) == 1:
                raise
            print(f"Skipped     {error}")
    if not readable:
        raise UserError(f"There is no readable photo in {place}: put one there, or name another.")


def encode_first(model, place):
    """Return the first image (1, C, H, W) at a place, its code mu (1, L) and its reconstruction."""
    photo, image = next(load_photos(model, place))
    mu, _ = model.encode(image)
    reconstruction = model.decode(mu)
    psnr = vae.psnr((reconstruction - image).square().sum().item(), image.numel())
    print(f"Photo       {photo}, {psnr:.2f} dB PSNR of its reconstruction")
    return image, mu, reconstruction


def noise(model, count):
    """Standard normal noise (count, L) on the model's device; a larger count only adds rows."""
    return vae.latent_noise(SEED, count, model.config["latent_dim"]).to(model.latent_mean.device)


def perturb(model, mu, eps, w):
    """Return codes (N, L) around the code mu (1, L) of a photo from noise eps (N, L); w is the share drawn again.

    z = m + sqrt(1 - w) (mu - m) + sqrt(w) S eps, with the prior's mean m and Cholesky factor S, so that codes of the
    population stay distributed as the population for every w.
    """
    kept = torch.lerp(model.latent_mean, mu, math.sqrt(1 - w))
    return kept + math.sqrt(w) * (eps @ model.latent_scale.T)


def between(model, start, end):
    """Return 20 codes (20, L) on the way from a code (L,) to another, both included, about as likely as these.

    Spherical interpolation (Shoemake 1985; for latent codes White 2016, arXiv:1609.04468) about the prior's mean, in
    the coordinates in which the prior is N(0, I). A straight line would pass near the mean, whose pictures are
    averages, pale and smooth.
    """
    t = torch.linspace(0, 1, 20, device=start.device)[:, None]
    offsets = torch.stack([start, end], dim=1) - model.latent_mean[:, None]
    whitened = torch.linalg.solve_triangular(model.latent_scale, offsets, upper=False)
    angle = torch.acos(torch.cosine_similarity(*whitened.T, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:  # in the same or the opposite direction the formula divides by zero: go straight
        return torch.lerp(start, end, t)
    share = torch.sin((1 - t) * angle) / angle.sin()
    share_end = torch.sin(t * angle) / angle.sin()
    return share * start + share_end * end + (1 - share - share_end) * model.latent_mean


def decode(model, z):
    """Codes (N, L) -> images (N, C, H, W), 64 at a time, so that memory does not grow with N."""
    return torch.cat([model.decode(part) for part in z.split(64)])


# Modes: each yields sheets of images (N, C, H, W), with the number of columns
def variations(model):
    """The photo, its reconstruction and NUM_VARIATIONS variations of it."""
    photo, mu, reconstruction = encode_first(model, IMAGE)
    codes = perturb(model, mu, noise(model, NUM_VARIATIONS), W)
    yield torch.cat([photo, reconstruction, decode(model, codes)]), 6


def sweep(model):
    """NUM_VARIATIONS variations of the photo for each W of SWEEP, a row each, with the same noise down a column."""
    _, mu, _ = encode_first(model, IMAGE)
    eps = noise(model, NUM_VARIATIONS)
    rows = [[label(model, f"W =\n{w:g}"), decode(model, perturb(model, mu, eps, w))] for w in SWEEP]
    yield torch.cat(list(itertools.chain(*rows))), 1 + NUM_VARIATIONS


def label(model, text):
    """Return a text, black on white, as an image (1, C, H, W) of the model's size."""
    size = model.config["image_size"]
    tile = Image.new("RGB" if model.config["channels"] == 3 else "L", (size, size), "white")
    font = ImageFont.load_default(max(8, size // 6))
    ImageDraw.Draw(tile).text((size / 2, size / 2), text, "black", font, anchor="mm", align="center")
    return to_tensor(tile)[None].to(model.latent_mean.device)


def reconstruct(model):
    """All photos, each beside its reconstruction, at most 64 a sheet."""
    photos = (image for _, image in load_photos(model, IMAGE))
    squared_error = 0.0
    count = 0
    while sheet := list(itertools.islice(photos, 64)):
        originals = torch.cat(sheet)
        reconstructions = model.decode(model.encode(originals)[0])
        squared_error += (reconstructions - originals).square().sum().item()
        count += originals.numel()
        yield torch.stack([originals, reconstructions], dim=1).flatten(0, 1), 8
    print(f"PSNR        {vae.psnr(squared_error, count):.2f} dB, of all reconstructions")


def sample(model):
    """100 faces of the prior."""
    yield decode(model, model.draw_latents(noise(model, 100))), 10


def interpolate(model):
    """20 pictures on the way from the photo IMAGE to the photo IMAGE_TO, or from one sample to another."""
    if IMAGE_TO:
        start = encode_first(model, IMAGE)[1][0]
        end = encode_first(model, IMAGE_TO)[1][0]
    else:
        print("Between     two samples; --image-to names a photo to go to from IMAGE")
        start, end = model.draw_latents(noise(model, 2))
    yield decode(model, between(model, start, end)), 5


MODES = {mode.__name__: mode for mode in (variations, reconstruct, sample, interpolate, sweep)}


# Main
def save(images, path, columns):
    """Save images (N, C, H, W) as a grid; an interpolation in a .gif or .webp as an animation there and back."""
    if MODE != "interpolate" or path.suffix.lower() not in (".gif", ".webp"):
        vae.save_grid(images, path, columns)
    else:
        first, *others = [vae.to_picture(image) for image in torch.cat([images, images[1:-1].flip(0)])]
        animation = {"save_all": True, "append_images": others, "duration": 100, "loop": 0}
        vae.save_picture(first, path, **animation, lossless=True)  # a lossy WebP drops frames that differ little
    print(f"Wrote       {path}")


def check_settings():
    """Raise UserError for a constant whose value is impossible."""
    require(MODE in MODES, "MODE", MODE, f"one of {', '.join(MODES)}")
    require(MODE == "interpolate" or not IMAGE_TO, "MODE", MODE, '"interpolate" if IMAGE_TO names a photo')
    require(PRIOR in ("fitted", "standard"), "PRIOR", PRIOR, '"fitted" or "standard"')
    check_crop(CROP)
    require(0 <= W <= 1, "W", W, "a number from 0 to 1")
    require(NUM_VARIATIONS >= 1, "NUM_VARIATIONS", NUM_VARIATIONS, "at least 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    endings = [".jpg", ".jpeg", ".png", ".webp"] + [".gif"] * (MODE == "interpolate")
    require(Path(OUTPUT).suffix.lower() in endings, "OUTPUT", OUTPUT, f"a file name that ends in {', '.join(endings)}")


def describe_model(model, info):
    """Print which model is at work, and what its checkpoint says about it."""
    known = "epoch" in info and "val_psnr" in info
    trained = f", epoch {info['epoch']}, {info['val_psnr']:.2f} dB on its validation photos" if known else ""
    print(f"Model       {CHECKPOINT}{trained}")
    if "about" in info:
        print(f"About       {info['about']}")
    if torch.equal(model.latent_scale.cpu(), torch.eye(model.config["latent_dim"])):
        print("Prior       N(0, I), as this checkpoint has no fitted one: expect smeared samples and variations")


@torch.inference_mode()
def main(argv=None):
    """Load the model, make the pictures that MODE names and save them."""
    vae.parse_flags(globals(), argv)
    check_settings()
    model, info = vae.load_checkpoint(CHECKPOINT, vae.pick_device(DEVICE))
    describe_model(model, info)
    if PRIOR == "standard":
        model.latent_mean.zero_()
        model.latent_scale.copy_(torch.eye(model.config["latent_dim"]))
    photos = [photo for place in (IMAGE, IMAGE_TO) if place for photo in find_photos(place)]
    inputs = {str(photo.path.resolve()).lower() for photo in photos}  # some file systems ignore the case
    for number, (images, columns) in enumerate(MODES[MODE](model), start=1):
        path = Path(OUTPUT) if number == 1 else Path(OUTPUT).with_stem(f"{Path(OUTPUT).stem}-{number}")
        require(str(path.resolve()).lower() not in inputs, "OUTPUT", str(path), "a file other than the photos")
        save(images, path, columns)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"genpic.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
