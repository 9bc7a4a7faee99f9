"""Make pictures with a trained model: variations of a photo, reconstructions, samples, interpolations.

    python genpic.py                                  # ten variations of the photo in data/tested_data
    python genpic.py --image me.jpg --w 0.1           # every constant at the top of the script is a flag
    python genpic.py --mode sample --output faces.png
    python genpic.py --mode interpolate --image me.jpg --image-to you.jpg --output morph.gif

Writes generated_images_grid2.jpg: the photo, its reconstruction and the variations, six in a row. An interpolation is
animated where its output ends in .gif or .webp.
"""

import itertools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor

import vae
from vae import UserError, printable, require

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model, as train.py leaves it
IMAGE: str = "data/tested_data"  # a photo; or a folder, .zip or .npy: its first photo ("reconstruct" takes all of them)
CROP: list[int] = []  # left, top and size in pixels of the square of IMAGE to use; if empty, the largest in the middle
IMAGE_TO: str = ""  # the photo that "interpolate" goes to from IMAGE; if empty, it goes from a sample to another
OUTPUT: str = "generated_images_grid2.jpg"  # the picture to write: .jpg, .png or .webp; of "interpolate" also .gif
MODE: str = "variations"  # "variations" of the photo, "reconstruct" all photos, "sample", "interpolate", "sweep" over W
NUM_VARIATIONS: int = 10  # how many variations of the photo
W: float = 0.01  # share of the variance of a photo's code that is drawn anew: 0 the same face, 1 any other
NOISE: str = "population"  # draw as faces differ, or "posterior": as the encoder doubts, which is hardly visible
PRIOR: str = "fitted"  # the population: "fitted" to the codes of the training photos, or "standard", N(0, I)
SEED: int = 0  # start of the random numbers; another one gives other variations and samples
DEVICE: str = "auto"  # "auto" is CUDA where there is one, else the CPU; or name a device: "cpu", "cuda:1"

SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # the W of the rows of "sweep"


# Photos and codes
def photos_of(place, name):
    """Return the Photos that a constant of this name and value stands for: one, or all in a folder, .zip or .npy."""
    parent = next((path for path in Path(place).parents if vae.is_container(path) and path.is_file()), None)
    require(parent or Path(place).exists(), name, place, "a photo, or a folder, .zip or .npy with photos, that exists")
    photos = vae.find_photos(parent or place)
    if parent:  # a photo in a .zip or .npy
        photos = [photo for photo in photos if str(photo) == str(Path(place))]
    if not photos:
        raise UserError(f"There is no photo in {place}: put one there, or name one with {vae.flag(name)}.", 2)
    return photos


def load_photo(model, photo, crop):
    """Read a photo as the model was trained to see it: (1, C, H, W) in [0, 1], on its device; `crop` is like CROP."""
    side, channels = model.config["image_size"], model.config["channels"]
    image = vae.read_image(photo, channels, None if crop else side)
    if crop:
        left, top, size = crop
        if left + size > image.width or top + size > image.height:
            raise UserError(f"CROP {crop} reaches beyond {photo}, which has {image.width} x {image.height} pixels.", 2)
        image = image.crop((left, top, left + size, top + size))
    return vae.celeb_transforms(side)[0](image)[None].to(model.latent_mean.device)


def readable_photos(model, place, name):
    """Yield (Photo, image (1, C, H, W)) of the photos that a constant stands for, and print which cannot be read."""
    photos, found = photos_of(place, name), False
    for photo in photos:
        try:
            image = load_photo(model, photo, CROP if name == "IMAGE" else [])
        except UserError as error:
            if str(photo) == str(Path(place)) or (error.code == 2 and MODE != "reconstruct"):  # CROP is for this one
                raise
            print(f"Skipped     {error}")
        else:
            found = True
            yield photo, image
    if not found:
        raise UserError(f"No photo in {place} can be read.")


def encode_first(model, usual, place, name):
    """Return the first image (1, C, H, W) that a constant stands for, its reconstruction and its code mu, log_var.

    Prints which photo it is, and how well it is reconstructed; `usual` is the PSNR to expect, in dB.
    """
    photo, image = next(readable_photos(model, place, name))
    choice = "" if str(photo) == str(Path(place)) else f", the first in {place}; {vae.flag(name)} names another"
    print(f"Photo       {printable(str(photo))}{choice}")
    mu, log_var = model.encode(image)
    reconstruction = model.decode(mu)
    tell_psnr((reconstruction - image).square().sum().item(), image.numel(), usual)
    return image, reconstruction, mu, log_var


def tell_psnr(squared_error, pixels, usual):
    """Print the PSNR of reconstructions, and where it is far below the `usual` one, in dB, what to do about it."""
    reached = vae.psnr(squared_error, pixels)
    print(f"PSNR        {reached:.2f} dB, reconstruction against photo")
    if reached < usual - 3:
        print(
            f"            That is far below the {usual:.1f} dB of the model's validation photos. Crop IMAGE as they are"
            " (of the model that comes along: face in the middle, eyes at 44 % of the height, as in"
            " data/tested_data/sample.jpg): --crop LEFT TOP SIZE."
        )


def noise(model, count):
    """Standard normal noise (count, L) on the model's device; row k is the same however many are drawn."""
    return vae.latent_noise(SEED, count, model.config["latent_dim"]).to(model.latent_mean.device)


def perturb(model, mu, log_var, eps, w):
    """Return codes (N, L) around the code mu (1, L) of a photo from noise eps (N, L); w is the share drawn anew.

    "population": z = m + sqrt(1 - w) (mu - m) + sqrt(w) S eps, with the fitted prior's mean m and Cholesky factor S,
    so that codes of the population stay distributed as the population for every w.
    "posterior": z = mu + sqrt(w) sigma eps, with the encoder's own sigma for this photo.
    """
    if NOISE == "posterior":
        return mu + math.sqrt(w) * torch.exp(0.5 * log_var) * eps
    kept = torch.lerp(model.latent_mean, mu, math.sqrt(1 - w))
    return kept + math.sqrt(w) * (eps @ model.latent_scale.T)


def between(model, start, end):
    """Return 20 codes (20, L) on the way from a code (L,) to another, both included, about as likely as these.

    Spherical interpolation (Shoemake 1985; for latent codes White 2016, arXiv:1609.04468) about the prior's mean, in
    the coordinates in which the prior is N(0, I). A straight line would pass near the mean, where the pictures are
    those of nobody: averages, pale and smooth.
    """
    t = torch.linspace(0, 1, 20, device=start.device)[:, None]
    offsets = torch.stack([start, end], dim=1) - model.latent_mean[:, None]
    whitened = torch.linalg.solve_triangular(model.latent_scale, offsets, upper=False)
    angle = torch.acos(torch.cosine_similarity(*whitened.T, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:  # in the same direction or the opposite one the formula divides by zero; go straight
        return torch.lerp(start, end, t)
    share, share_end = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return share * start + share_end * end + (1 - share - share_end) * model.latent_mean


def decode(model, z):
    """Codes (N, L) -> images (N, C, H, W), 64 at a time, so that memory does not grow with N."""
    return torch.cat([model.decode(part) for part in z.split(64)])


def label(model, text):
    """Return a text as large as a tile has room for, as an image (1, C, H, W) of the model's size, black on white."""
    size = model.config["image_size"]
    tile = Image.new("RGB" if model.config["channels"] == 3 else "L", (size, size), "white")
    font = ImageFont.load_default(max(8, size // 6))
    ImageDraw.Draw(tile).text((size / 2, size / 2), text, "black", font, anchor="mm", align="center")
    return to_tensor(tile)[None].to(model.latent_mean.device)


def paired(originals, reconstructions, columns):
    """Interleave two batches (B, C, H, W) so that a grid of so many columns shows originals over reconstructions."""
    blank = originals.new_ones(-len(originals) % columns, *originals.shape[1:])  # fills up a short last row
    rows = [torch.cat([images, blank]).unflatten(0, (-1, columns)) for images in (originals, reconstructions)]
    return torch.stack(rows, dim=1).flatten(0, 2)


def save_animation(images, path):
    """Save images (B, C, H, W) in [0, 1] as a GIF or WebP that shows them there and back, ten a second, for ever."""
    vae.save_picture([vae.as_picture(image) for image in torch.cat([images, images[1:-1].flip(0)])], path)


# Modes: each yields sheets, that is images (N, C, H, W) and how many of them stand in a row, given the model and the
# PSNR that its reconstructions usually have
def variations(model, usual):
    """The photo, its reconstruction and NUM_VARIATIONS variations of it."""
    photo, reconstruction, mu, log_var = encode_first(model, usual, IMAGE, "IMAGE")
    codes = perturb(model, mu, log_var, noise(model, NUM_VARIATIONS), W)
    yield torch.cat([photo, reconstruction, decode(model, codes)]), 6


def sweep(model, usual):
    """NUM_VARIATIONS variations of the photo for each W of SWEEP, a row each; down a column the noise is the same."""
    *_, mu, log_var = encode_first(model, usual, IMAGE, "IMAGE")
    eps = noise(model, NUM_VARIATIONS)
    rows = [[label(model, f"W =\n{w:g}"), decode(model, perturb(model, mu, log_var, eps, w))] for w in SWEEP]
    yield torch.cat(list(itertools.chain(*rows))), 1 + NUM_VARIATIONS


def reconstruct(model, usual):
    """All photos over their reconstructions, at most 64 a sheet."""
    photos, squared_error, pixels = (image for _, image in readable_photos(model, IMAGE, "IMAGE")), 0.0, 0
    while sheet := list(itertools.islice(photos, 64)):
        originals = torch.cat(sheet)
        reconstructions = model.decode(model.encode(originals)[0])
        squared_error += (reconstructions - originals).square().sum().item()
        pixels += originals.numel()
        columns = min(8, len(sheet))
        yield paired(originals, reconstructions, columns), columns
    tell_psnr(squared_error, pixels, usual)


def sample(model, usual):
    """100 faces of the prior."""
    yield decode(model, model.draw_latents(noise(model, 100))), 10


def interpolate(model, usual):
    """20 pictures on the way from the photo IMAGE to the photo IMAGE_TO, or from a sample to another."""
    if IMAGE_TO:
        places = ((IMAGE, "IMAGE"), (IMAGE_TO, "IMAGE_TO"))
        ends = [mu[0] for *_, mu, _ in (encode_first(model, usual, *place) for place in places)]
    else:
        print("Between     two samples, and IMAGE is not used; --image-to names a photo to go to from IMAGE")
        ends = model.draw_latents(noise(model, 2))
    yield decode(model, between(model, *ends)), 5


MODES = {mode.__name__: mode for mode in (variations, reconstruct, sample, interpolate, sweep)}


# The run
def check_settings():
    """Raise UserError for a constant whose value is impossible."""
    require(MODE in MODES, "MODE", MODE, f"one of {', '.join(MODES)}")
    require(MODE == "interpolate" or not IMAGE_TO, "MODE", MODE, '"interpolate" where IMAGE_TO names a photo')
    require(NOISE in ("population", "posterior"), "NOISE", NOISE, '"population" or "posterior"')
    require(PRIOR in ("fitted", "standard"), "PRIOR", PRIOR, '"fitted" or "standard"')
    square = not CROP or ({*map(type, CROP)} == {int} and len(CROP) == 3 and min(CROP) >= 0 < CROP[2])
    require(square, "CROP", CROP, "left, top and size of a square in the photo, in pixels")
    require(0 <= W <= 1, "W", W, "a number from 0 to 1")
    require(NUM_VARIATIONS >= 1, "NUM_VARIATIONS", NUM_VARIATIONS, "at least 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    endings = [".jpg", ".jpeg", ".png", ".webp"] + [".gif"] * (MODE == "interpolate")
    require(Path(OUTPUT).suffix.lower() in endings, "OUTPUT", OUTPUT, f"a file name that ends in {', '.join(endings)}")
    require(not Path(OUTPUT).is_dir(), "OUTPUT", OUTPUT, "a file, but it is a folder")
    if not Path(CHECKPOINT).is_file():
        found = ", ".join(sorted(map(str, Path(CHECKPOINT).parent.glob("*.pth"))))
        there = f"name one with --checkpoint (there is {found})"
        hint = there if found else "go to the folder of the scripts, or make one with `python train.py`"
        raise UserError(f"There is no checkpoint {CHECKPOINT}: {hint}.", 2)


def input_files():
    """Return the files of the photos that the pictures are made from, so that none takes the place of one."""
    ends = [(IMAGE, "IMAGE"), (IMAGE_TO, "IMAGE_TO")] if IMAGE_TO else []
    places = {"sample": [], "interpolate": ends}.get(MODE, [(IMAGE, "IMAGE")])
    return {path.resolve() for path in {photo.path for place in places for photo in photos_of(*place)}}


def describe_model(model, info):
    """Print which model is at work, as far as its checkpoint tells; return its validation PSNR in dB, or -infinity."""
    known = isinstance(info.get("epoch"), int) and isinstance(info.get("val_psnr"), float)
    trained = f", epoch {info['epoch']}, {info['val_psnr']:.2f} dB on its validation photos" if known else ""
    print(f"Model       {CHECKPOINT}{trained}")
    if isinstance(info.get("about"), str):
        print(f"About       {printable(info['about'])}")
    if not model.prior_is_fitted():
        print("Prior       N(0, I), for this checkpoint carries no fitted one: expect smeared samples and variations")
    return info["val_psnr"] if known else -math.inf


@vae.script
@torch.inference_mode()
def main(argv=None):
    """Load the model, make the pictures that MODE names and save them."""
    vae.override_constants(globals(), argv)
    check_settings()
    model, info = vae.load_checkpoint(CHECKPOINT, vae.pick_device(DEVICE))
    usual = describe_model(model, info)
    if PRIOR == "standard":
        model.latent_mean.zero_()
        model.latent_scale.copy_(torch.eye(len(model.latent_mean)))
    inputs = input_files()
    for number, (images, columns) in enumerate(MODES[MODE](model, usual), start=1):
        output = Path(OUTPUT) if number == 1 else Path(OUTPUT).with_stem(f"{Path(OUTPUT).stem}-{number}")
        if output.resolve() in inputs:
            raise UserError(f"OUTPUT is {output}, which is one of the photos: name another file with --output.", 2)
        if output.exists() and not vae.is_made_here(output):
            there = f"OUTPUT is {output}, which is there and has no mark of genpic.py"
            raise UserError(f"{there}: move it away, or name another file with --output.", 2)
        if MODE == "interpolate" and output.suffix.lower() in (".gif", ".webp"):
            save_animation(images, output)
        else:
            vae.save_grid(images, output, columns)
        print(f"Wrote       {output}")


if __name__ == "__main__":
    main()
