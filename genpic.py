"""Make pictures with a trained model: variations of a photo, reconstructions, samples, interpolations.

    python genpic.py                                  # ten variations of the photo in data/tested_data
    python genpic.py --image me.jpg --w 0.1           # every constant at the top of the script is a flag
    python genpic.py --mode sample --output faces.png
    python genpic.py --mode interpolate --image me.jpg --image-to you.jpg --output morph.gif

Writes generated_images_grid2.jpg: the photo, its reconstruction and the variations, six in a row.
"""

import itertools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor

import vae
from data.faces import check_crop, read_square
from data.photos import find_photos
from vae import UserError, require

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model, as saved by train.py
IMAGE: str = "data/tested_data"  # a photo; or a folder, .zip or .npy: its first photo ("reconstruct" takes all)
CROP: str = "face"  # part of each photo to use: square around the "face", "center" square, or "LEFT TOP SIZE" in pixels
IMAGE_TO: str = ""  # photo where "interpolate" ends, starting from IMAGE; without one it goes from sample to sample
OUTPUT: str = "generated_images_grid2.jpg"  # picture to write: .jpg, .png or .webp; for "interpolate" also .gif
MODE: str = "variations"  # what to make: variations, reconstruct, sample, interpolate or sweep
NUM_VARIATIONS: int = 10  # number of variations
W: float = 0.01  # how far variations go, from 0 (none) to 1 (other people); 0.1 changes features, 0.01 only the tint
PRIOR: str = "fitted"  # where samples come from: "fitted" to the codes of the training photos, or "standard", N(0, I)
SEED: int = 0  # seed of the random numbers; another one gives other variations and samples
DEVICE: str = "auto"  # "auto" is CUDA if available, else the CPU; or name a device: "cpu", "cuda:1"

SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # the W of each row of "sweep"


# From photos to codes
def find_sources():
    """Return the Photos at IMAGE, and those at IMAGE_TO, if MODE reads them; raises UserError where there are none."""
    if MODE == "sample" or (MODE == "interpolate" and not IMAGE_TO):
        return []
    places = [place for place in (IMAGE, IMAGE_TO) if place]
    sources = [find_photos(place) for place in places]
    for place, photos in zip(places, sources, strict=True):
        if not photos:
            raise UserError(f"There is no photo in {place}: put one there, or name another place.")
    return sources


def read_photo(model, photo):
    """Read a Photo, cropped and scaled as in training: an image (1, C, H, W) in [0, 1] on the model's device."""
    size = model.config["image_size"]
    square, face = read_square(photo, model.config["channels"], size, CROP, model.face_box)
    if CROP == "face" and model.face_box:
        print(f"Face        {photo}: {face or 'none found (turned, tilted, too small?), so this is the middle square'}")
    return to_tensor(square)[None].to(model.latent_mean.device)


def read_photos(model, photos):
    """Yield the readable ones of some Photos with their images (1, C, H, W); raises UserError if none is readable."""
    readable = 0
    for photo in photos:
        try:
            yield photo, read_photo(model, photo)
            readable += 1
        except UserError as error:
            if len(photos) == 1:
                raise
            print(f"Skipped     {error}")
    if not readable:
        raise UserError(f"None of the {len(photos)} photos can be read; the first is {photos[0]}.")


def encode_first(model, photos):
    """Return the image (1, C, H, W) of the first readable photo, its code mu (1, L) and its reconstruction."""
    photo, image = next(read_photos(model, photos))
    mu, _ = model.encode(image)
    reconstruction = model.decode(mu)
    psnr = vae.psnr((reconstruction - image).square().sum().item(), image.numel())
    print(f"Photo       {photo}, {psnr:.2f} dB PSNR of its reconstruction")
    return image, mu, reconstruction


# Arithmetic on codes
def perturb(model, mu, eps, w):
    """Return codes (N, L) around a photo's code mu (1, L), given noise eps (N, L); w is how far they go, from 0 to 1.

    z = m + sqrt(1 - w) (mu - m) + sqrt(w) S eps, with the prior's mean m and Cholesky factor S. If mu follows the
    prior, so does z, for every w.
    """
    kept = torch.lerp(model.latent_mean, mu, math.sqrt(1 - w))
    return kept + math.sqrt(w) * (eps @ model.latent_scale.T)


def codes_between(model, start, end):
    """Return 20 codes (20, L) on the way from one code (L,) to another, both included, about as likely as these.

    Spherical interpolation (Shoemake 1985; for latent codes White 2016, arXiv:1609.04468) around the prior's mean, in
    coordinates that make the prior N(0, I). A straight line would pass near the mean, where pictures are pale averages.
    """
    t = torch.linspace(0, 1, 20, device=start.device)[:, None]
    offsets = torch.stack([start, end], dim=1) - model.latent_mean[:, None]
    whitened = torch.linalg.solve_triangular(model.latent_scale, offsets, upper=False)
    angle = torch.acos(torch.cosine_similarity(*whitened.T, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:  # for equal or opposite directions the formula divides by zero: go straight
        return torch.lerp(start, end, t)
    weight = torch.sin((1 - t) * angle) / angle.sin()
    weight_end = torch.sin(t * angle) / angle.sin()
    return weight * start + weight_end * end + (1 - weight - weight_end) * model.latent_mean


def draw_codes(model, count):
    """Return codes (count, L) drawn from the prior by SEED."""
    return model.draw_latents(vae.latent_noise(model, count, SEED))


def decode_in_parts(model, z):
    """Codes (N, L) -> images (N, C, H, W), 64 at a time, so that memory does not grow with N."""
    return torch.cat([model.decode(part) for part in z.split(64)])


# Modes: each yields sheets of images (N, C, H, W), and their number of columns
def make_variations(model, photos):
    """The photo, its reconstruction and NUM_VARIATIONS variations of it."""
    image, mu, reconstruction = encode_first(model, photos)
    codes = perturb(model, mu, vae.latent_noise(model, NUM_VARIATIONS, SEED), W)
    yield torch.cat([image, reconstruction, decode_in_parts(model, codes)]), 6


def make_sweep(model, photos):
    """NUM_VARIATIONS variations of the photo in a row for each W of SWEEP, with the same noise down a column."""
    _, mu, _ = encode_first(model, photos)
    eps = vae.latent_noise(model, NUM_VARIATIONS, SEED)
    rows = [[label(model, f"W =\n{w:g}"), decode_in_parts(model, perturb(model, mu, eps, w))] for w in SWEEP]
    yield torch.cat(list(itertools.chain(*rows))), 1 + NUM_VARIATIONS


def label(model, text):
    """Return a text, black on white, as an image (1, C, H, W) of the model's size."""
    size = model.config["image_size"]
    tile = Image.new("RGB" if model.config["channels"] == 3 else "L", (size, size), "white")
    font = ImageFont.load_default(max(8, size // 6))
    ImageDraw.Draw(tile).text((size / 2, size / 2), text, "black", font, anchor="mm", align="center")
    return to_tensor(tile)[None].to(model.latent_mean.device)


def make_reconstructions(model, photos):
    """All photos, each beside its reconstruction, at most 64 to a sheet."""
    images = (image for _, image in read_photos(model, photos))
    squared_error = 0.0
    count = 0
    while sheet := list(itertools.islice(images, 64)):
        originals = torch.cat(sheet)
        reconstructions = model.decode(model.encode(originals)[0])
        squared_error += (reconstructions - originals).square().sum().item()
        count += originals.numel()
        yield torch.stack([originals, reconstructions], dim=1).flatten(0, 1), 8
    print(f"PSNR        {vae.psnr(squared_error, count):.2f} dB over all reconstructions")


def make_samples(model):
    """100 faces drawn from the prior."""
    yield decode_in_parts(model, draw_codes(model, 100)), 10


def make_interpolation(model, *sources):
    """20 pictures on the way from the photo IMAGE to the photo IMAGE_TO, or from one sample to another."""
    if sources:
        start, end = (encode_first(model, photos)[1][0] for photos in sources)
    else:
        print("Between     two samples; to go from photo to photo, use --image and --image-to")
        start, end = draw_codes(model, 2)
    yield decode_in_parts(model, codes_between(model, start, end)), 5


MODES = {
    "variations": make_variations,
    "reconstruct": make_reconstructions,
    "sample": make_samples,
    "interpolate": make_interpolation,
    "sweep": make_sweep,
}


# Main
def save_sheet(images, path, columns):
    """Save images (N, C, H, W) as a grid; an interpolation in a .gif or .webp as an animation there and back."""
    if MODE != "interpolate" or path.suffix.lower() not in (".gif", ".webp"):
        vae.save_grid(images, path, columns)
    else:
        first, *others = [vae.to_picture(image) for image in torch.cat([images, images[1:-1].flip(0)])]
        animation = {"save_all": True, "append_images": others, "duration": 100, "loop": 0}
        vae.save_picture(first, path, **animation, lossless=True)  # lossy WebP drops frames that differ little
    print(f"Wrote       {path}")


def check_settings():
    """Raise UserError for a constant with an impossible value."""
    require(MODE in MODES, "MODE", MODE, f"one of {', '.join(MODES)}")
    require(MODE == "interpolate" or not IMAGE_TO, "MODE", MODE, '"interpolate" if IMAGE_TO names a photo')
    require(PRIOR in ("fitted", "standard"), "PRIOR", PRIOR, '"fitted" or "standard"')
    check_crop(CROP)
    require(0 <= W <= 1, "W", W, "a number from 0 to 1")
    require(NUM_VARIATIONS >= 1, "NUM_VARIATIONS", NUM_VARIATIONS, "at least 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    endings = [".jpg", ".jpeg", ".png", ".webp"] + [".gif"] * (MODE == "interpolate")
    require(Path(OUTPUT).suffix.lower() in endings, "OUTPUT", OUTPUT, f"a file name that ends in {', '.join(endings)}")


def look_beside_script(given):
    """Where CHECKPOINT or IMAGE is not in the current folder, take it from this script's, unless it is a flag."""
    for name in [name for name in ("CHECKPOINT", "IMAGE") if name not in given]:
        path = Path(__file__).parent / globals()[name]
        if not Path(globals()[name]).exists() and path.exists():
            print(f"Found       {name} beside genpic.py: {path}")
            globals()[name] = str(path)


def describe_model(model, info):
    """Print which model is used, and what its checkpoint says about it."""
    known = "epoch" in info and "val_psnr" in info
    trained = f", epoch {info['epoch']}, {info['val_psnr']:.2f} dB on its validation photos" if known else ""
    print(f"Model       {CHECKPOINT}{trained}")
    if "about" in info:
        print(f"About       {info['about']}")
    if torch.equal(model.latent_scale.cpu(), torch.eye(model.config["latent_dim"])):
        print("Prior       N(0, I), as this checkpoint has no fitted one: expect smeared samples and variations")


@torch.inference_mode()
def main(argv=()):
    """Load the model, make the pictures that MODE names and save them; `argv` are flags."""
    with vae.flags(globals(), argv) as (_, given):
        check_settings()
        look_beside_script(given)
        model, info = vae.load_checkpoint(CHECKPOINT, vae.pick_device(DEVICE))
        describe_model(model, info)
        if PRIOR == "standard":
            model.latent_mean.zero_()
            model.latent_scale.copy_(torch.eye(model.config["latent_dim"]))
        sources = find_sources()
        inputs = {str(photo.path.resolve()).lower() for photo in itertools.chain(*sources)}  # case may not matter
        for number, (images, columns) in enumerate(MODES[MODE](model, *sources), start=1):
            path = Path(OUTPUT) if number == 1 else Path(OUTPUT).with_stem(f"{Path(OUTPUT).stem}-{number}")
            require(str(path.resolve()).lower() not in inputs, "OUTPUT", str(path), "a file other than the photos")
            save_sheet(images, path, columns)


if __name__ == "__main__":
    vae.run_script(main)
