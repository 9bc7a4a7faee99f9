"""Make pictures with a trained model: variations of a photo, edits, reconstructions, samples, interpolations.

python genpic.py                                  # ten variations of the photo in data/tested_data
python genpic.py --mode photo --image me.jpg --edit "Smiling 2" --output smiling.jpg    # the whole photo, changed
python genpic.py --mode sample --output faces.png                               # every setting is a flag
python genpic.py --mode interpolate --image me.jpg --image-to you.jpg --output morph.gif
"""

import copy
import itertools
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import vae
from data.attributes import parse_edit
from data.faces import check_crop, read_square
from data.paste import paste_face
from data.photos import find_photos, read_image
from vae import UserError, require

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model saved by train.py
IMAGE: str = "data/tested_data"  # photo; or a folder, .zip or .npy: its first photo ("reconstruct" uses all of them)
CROP: str = "face"  # square to use: "face" (around the largest face), "center", or "LEFT TOP SIZE" in pixels
IMAGE_TO: str = ""  # photo where "interpolate" ends; if empty, it ends at IMAGE after EDIT, or goes between two samples
OUTPUT: str = "generated_images_grid2.jpg"  # output file: .jpg, .png or .webp; for an animation also .gif
MODE: str = "variations"  # what to make: variations, photo, reconstruct, sample, interpolate, sweep or attributes
EDIT: str = ""  # attributes to change, by how many units, as in "Smiling 2, Eyeglasses -1"; "attributes" shows them all
TUNE: int = 0  # steps that fit the decoder to the photos first; 50 take a second or two and keep the person
NUM_VARIATIONS: int = 10  # number of variations; for "sweep", per row
W: float = 0.01  # strength of variations, from 0 (none) to 1 (other people); 0.1 changes features, 0.01 only the tint
PRIOR: str = "fitted"  # where samples come from: "fitted" (to the training photos' codes) or "standard" (N(0, I))
SEED: int = 0  # random seed; a different one gives different variations and samples
DEVICE: str = "auto"  # "auto" (CUDA if available, else the CPU) or a device, such as "cpu" or "cuda:1"

SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # the W of each row of "sweep"


# From photos to codes
def find_sources():
    """Return the Photos at IMAGE and IMAGE_TO, where MODE uses them; raises UserError if either has none."""
    if MODE == "sample" or (MODE == "interpolate" and not IMAGE_TO and not EDIT):
        return []
    sources = [find_photos(place) for place in (IMAGE, IMAGE_TO) if place]
    if not all(sources):
        place = IMAGE_TO if sources[0] else IMAGE
        raise UserError(f"There are no photos in {place}: add one, or choose another place.")
    return sources


def read_photo(model, photo):
    """Return a Photo, cropped and scaled as in training, as an image (1, C, H, W), and its Crop."""
    size = model.config["image_size"]
    square, crop = read_square(photo, model.config["channels"], size, CROP, model.face_box, group=True)
    if CROP == "face" and model.face_box:
        found = describe_face(crop, model.face_box) if crop else "none found (in profile?): using the center square"
        print(f"Face        {photo}: {found}")
    elif crop and crop.outside > 0.1:
        print(f"Square      {photo}: {crop.outside:.0%} of it is outside the photo, whose edges are repeated")
    return to_tensor(square)[None].to(model.latent_mean.device), crop


def describe_face(crop, face_box):
    """Return a text on the Crop of a photo around its face, with squares that can be pasted."""
    width = crop.square[2] * face_box[2]
    small = ", so small that the result will be blurry" if width < 40 else ""
    beyond = f" ({crop.outside:.0%} is outside the photo: edges repeated)" if crop.outside > 0.1 else ""
    first, *others = [f'--crop "{left} {top} {size}"' for left, top, size in (crop.square, *crop.others)]
    how = f"after turning the photo by {abs(crop.angle)} degrees" if crop.angle else f"as with {first}"
    also = f"; other faces: {', '.join(others)}" if others else ""
    return f"{width:.0f} pixels wide{small}: cropped {how}{beyond}{also}"


def read_photos(model, photos):
    """Yield each readable Photo with its image (1, C, H, W) and Crop; raises UserError if none is readable."""
    readable = 0
    for photo in photos:
        try:
            yield photo, *read_photo(model, photo)
            readable += 1
        except UserError as error:
            if len(photos) == 1:
                raise
            print(f"Skipped     {error}")
    if not readable:
        raise UserError(f"None of the {len(photos)} photos can be read; the first is {photos[0]}.")


def encode_photos(model, read):
    """Return images (N, C, H, W) of photos from `read_photos`, edited pictures, codes (N, L), the (fitted) model."""
    images = torch.cat([image for _, image, _ in read])
    mu, _ = model.encode(images)
    fitted = fit_decoder(model, mu, images) if TUNE else model
    recons = [net.decode(mu) for net in ([model, fitted] if TUNE else [model])]
    errors = [(recon - images).square().mean((1, 2, 3)).tolist() for recon in recons]
    for (photo, *_), *each in zip(read, *errors, strict=True):
        psnrs = [f"{vae.psnr(error):.2f} dB" for error in each]
        print(f"Photo       {photo}, reconstructed with a PSNR of {f', fitted in {TUNE} steps to '.join(psnrs)}")
    return images, fitted.decode(edit(model, mu)) if EDIT else recons[-1], mu, fitted


@torch.enable_grad()
def fit_decoder(model, codes, images):
    """Return a copy of the model whose decoder is fitted in TUNE steps: codes (N, L) -> images (N, C, H, W).

    Pivotal tuning (Roich et al. 2021, arXiv:2106.05744) without its locality term. At a higher rate, or if
    decoder_input learns too, changed codes hardly change the picture; if final_layer learns, they leave a grid in it.
    Squared error would preserve the face less well, absolute error would drop small things such as earrings.
    """
    fitted = copy.deepcopy(model).requires_grad_(False).to(memory_format=torch.channels_last)
    stages = fitted.decoder or fitted.final_layer  # a model with a single stage has only the final one
    rate = 0.18 / fitted.feature_shape[0]  # in inverse proportion to the width (Yang et al. 2021, arXiv:2203.03466)
    optimizer = torch.optim.Adam(stages.requires_grad_().parameters(), rate, fused=True)
    for _ in tqdm(range(TUNE), "Fitting", leave=False, disable=None):
        loss = torch.nn.functional.smooth_l1_loss(fitted.decode(codes.detach()), images, beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fitted.requires_grad_(False)


# Arithmetic on codes
def edit(model, codes):
    """Return codes (N, L) moved as EDIT says."""
    units = parse_edit(EDIT, model.directions)
    return codes + sum(number * model.directions[name] for name, number in units.items())


def perturb(model, mu, eps, w):
    """Return variations (N, L) of a photo's code mu (1, L), given noise eps (N, L) and their strength w in [0, 1].

    z = m + sqrt(1 - w) (mu - m) + sqrt(w) S eps, with the prior's mean m and Cholesky factor S. If mu follows the
    prior, so does z, for every w.
    """
    kept = torch.lerp(model.latent_mean, mu, math.sqrt(1 - w))
    return kept + math.sqrt(w) * (eps @ model.latent_scale.T)


def codes_between(model, start, end):
    """Return 20 codes (20, L) from one code (L,) to another, ends included, all about as likely under the prior.

    Spherical interpolation (Shoemake 1985; for latent codes White 2016, arXiv:1609.04468) around the prior's mean, in
    coordinates in which the prior is N(0, I). A straight line would pass near the mean, where pictures look washed out.
    """
    t = torch.linspace(0, 1, 20, device=start.device)[:, None]
    offsets = torch.stack([start, end], dim=1) - model.latent_mean[:, None]
    whitened = torch.linalg.solve_triangular(model.latent_scale, offsets, upper=False)
    angle = torch.acos(torch.cosine_similarity(*whitened.T, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:  # for equal or opposite directions, the formula divides by zero: use a straight line
        return torch.lerp(start, end, t)
    weight = torch.sin((1 - t) * angle) / angle.sin()
    weight_end = torch.sin(t * angle) / angle.sin()
    return weight * start + weight_end * end + (1 - weight - weight_end) * model.latent_mean


def decode_in_parts(model, z):
    """Decode codes (N, L) into images (N, C, H, W), 64 at a time to limit memory use."""
    return torch.cat([model.decode(part) for part in z.split(64)])


# Modes: each yields sheets of images (N, C, H, W) with their number of columns; "photo" yields a PIL image
def make_variations(model, photos):
    """Yield the photo, its reconstruction and NUM_VARIATIONS variations of it."""
    image, recon, mu, model = encode_photos(model, [next(read_photos(model, photos))])
    codes = perturb(model, mu, vae.latent_noise(model, NUM_VARIATIONS, SEED), W)
    yield torch.cat([image, recon, decode_in_parts(model, edit(model, codes))]), 6


def make_photo(model, photos):
    """Yield the whole photo, with the face changed as EDIT says, as a PIL image."""
    photo, image, crop = next(read_photos(model, photos))
    require(crop, "CROP", CROP, f'the square around a face, such as "140 90 320": none was found in {photo}')
    _, after, mu, model = encode_photos(model, [(photo, image, crop)])
    whole = read_image(photo, model.config["channels"])
    paste_face(whole, crop, model.decode(mu)[0], after[0])
    whole.info.clear()  # so that no EXIF data, comment or profile is saved
    print(f"Size        {whole.width} x {whole.height}, 8-bit sRGB (JPEG: quality 95), no EXIF or GPS data")
    yield whole, 1


def make_sweep(model, photos):
    """Yield a row of NUM_VARIATIONS variations of the photo for each W in SWEEP, with the same noise in each column."""
    _, _, mu, model = encode_photos(model, [next(read_photos(model, photos))])
    eps = vae.latent_noise(model, NUM_VARIATIONS, SEED)
    codes = [edit(model, perturb(model, mu, eps, w)) for w in SWEEP]
    rows = [[label(model, f"W =\n{w:g}"), decode_in_parts(model, z)] for w, z in zip(SWEEP, codes, strict=True)]
    yield torch.cat(list(itertools.chain(*rows))), 1 + NUM_VARIATIONS


def make_attributes(model, photos):
    """Yield the photo with each attribute, those of EDIT or all, changed by -3 to 3 units: a row each, 16 per sheet."""
    _, _, mu, model = encode_photos(model, [next(read_photos(model, photos))])
    names = [*parse_edit(EDIT, model.directions)] or [*model.directions]
    print(f"Attributes  {', '.join(names)}")
    units = torch.linspace(-3, 3, 20 if is_animation() else 7, device=mu.device)[:, None]
    rows = [decode_in_parts(model, mu + units * model.directions[name]) for name in names]
    if is_animation():
        yield rows[0], 5
        return
    labels = [textwrap.fill(name.replace("_", " "), 10, break_long_words=False) + "\n-3 to 3" for name in names]
    rows = [torch.cat([label(model, text), row]) for text, row in zip(labels, rows, strict=True)]
    for first in range(0, len(rows), 16):
        yield torch.cat(rows[first : first + 16]), 8


def label(model, text):
    """Return text, black on white, as an image (1, C, H, W) of the model's size."""
    size = model.config["image_size"]
    tile = Image.new("RGB" if model.config["channels"] == 3 else "L", (size, size), "white")
    longest = max(map(len, text.split("\n")))
    font = ImageFont.load_default(max(8, min(size / 6, 1.7 * size / longest)))
    ImageDraw.Draw(tile).text((size / 2, size / 2), text, "black", font, anchor="mm", align="center")
    return to_tensor(tile)[None].to(model.latent_mean.device)


def make_reconstructions(model, photos):
    """Yield all photos, each next to its reconstruction, at most 64 per sheet."""
    read = read_photos(model, photos)
    errors = []
    while sheet := list(itertools.islice(read, 64)):
        groups = [[one] for one in sheet] if TUNE else [sheet]  # each photo has its own fitted decoder
        tiles = torch.cat([torch.stack(encode_photos(model, group)[:2], dim=1).flatten(0, 1) for group in groups])
        errors += (tiles[::2] - tiles[1::2]).square().mean((1, 2, 3)).tolist()
        yield tiles, 8
    if not EDIT:
        kind = "fitted " if TUNE else ""
        print(f"PSNR        {vae.psnr(sum(errors) / len(errors)):.2f} dB over all {kind}reconstructions")


def make_samples(model):
    """Yield 100 faces sampled from the prior."""
    yield decode_in_parts(model, edit(model, model.draw_latents(vae.latent_noise(model, 100, SEED)))), 10


def make_interpolation(model, *sources):
    """Yield 20 pictures between the photos IMAGE and IMAGE_TO, from IMAGE to its edit, or between two samples."""
    if sources:
        _, _, ends, model = encode_photos(model, [next(read_photos(model, photos)) for photos in sources])
    else:
        print("Between     two samples; to morph between photos, use --image and --image-to")
        ends = model.draw_latents(vae.latent_noise(model, 2, SEED))
    edited = edit(model, ends)
    yield decode_in_parts(model, codes_between(model, ends[0] if len(sources) == 1 else edited[0], edited[-1])), 5


MODES = {
    "variations": make_variations,
    "photo": make_photo,
    "reconstruct": make_reconstructions,
    "sample": make_samples,
    "interpolate": make_interpolation,
    "sweep": make_sweep,
    "attributes": make_attributes,
}


# Main
def is_animation():
    """Return whether OUTPUT is a .gif or .webp of pictures that gradually change."""
    changes = MODE == "interpolate" or (MODE == "attributes" and EDIT and "," not in EDIT)
    return changes and Path(OUTPUT).suffix.lower() in (".gif", ".webp")


def save_sheet(images, path, columns):
    """Save a PIL image, or images (N, C, H, W) as a grid or as a forward-and-back animation."""
    if isinstance(images, Image.Image):
        vae.save_picture(images, path)
    elif not is_animation():
        vae.save_grid(images, path, columns)
    else:
        first, *others = [vae.to_picture(image) for image in torch.cat([images, images[1:-1].flip(0)])]
        animation = {"save_all": True, "append_images": others, "duration": 100, "loop": 0}
        vae.save_picture(first, path, **animation, lossless=True)  # lossy WebP drops frames that are nearly identical
    print(f"Wrote       {path}")


def check_settings():
    """Raise UserError for a constant with an invalid value."""
    require(MODE in MODES, "MODE", MODE, f"one of {', '.join(MODES)}")
    require(MODE == "interpolate" or not IMAGE_TO, "MODE", MODE, '"interpolate" if IMAGE_TO is set')
    require(TUNE >= 0, "TUNE", TUNE, "at least 0")
    require(PRIOR in ("fitted", "standard"), "PRIOR", PRIOR, '"fitted" or "standard"')
    check_crop(CROP)
    require(0 <= W <= 1, "W", W, "a number from 0 to 1")
    require(NUM_VARIATIONS >= 1, "NUM_VARIATIONS", NUM_VARIATIONS, "at least 1")
    require(SEED >= 0, "SEED", SEED, "at least 0")
    fits = Path(OUTPUT).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") or is_animation()
    wanted = 'a file name ending in .jpg, .png or .webp; or .gif for "interpolate", or "attributes" with one in EDIT'
    require(fits, "OUTPUT", OUTPUT, wanted)


def fall_back_to_script_folder(given):
    """If CHECKPOINT or IMAGE is neither in the current folder nor set by a flag, use the one in the script's folder."""
    for name in [name for name in ("CHECKPOINT", "IMAGE") if name not in given]:
        path = Path(__file__).parent / globals()[name]
        if not Path(globals()[name]).exists() and path.exists():
            print(f"Found       {name} next to genpic.py: {path}")
            globals()[name] = str(path)


def describe_model(model, info):
    """Print which model is used and the information in its checkpoint."""
    known = "epoch" in info and "val_psnr" in info
    trained = f", epoch {info['epoch']}, {info['val_psnr']:.2f} dB on its validation photos" if known else ""
    print(f"Model       {CHECKPOINT}{trained}")
    if "about" in info:
        print(f"About       {info['about']}")
    if info.get("start_about"):
        print(f"About       the model that its training started from: {info['start_about']}")
    if torch.equal(model.latent_scale.cpu(), torch.eye(model.config["latent_dim"])):
        print("Prior       N(0, I), because this checkpoint has no fitted prior: expect smeared samples and variations")


@torch.no_grad()
def main(argv=()):
    """Load the model, make the pictures that MODE names and save them; `argv` is a list of flags."""
    with vae.flags(globals(), argv) as (_, given):
        check_settings()
        fall_back_to_script_folder(given)
        model, info = vae.load_checkpoint(CHECKPOINT, vae.pick_device(DEVICE))
        describe_model(model, info)
        adding = f"python train.py --data PHOTOS --attributes TABLE --start-from {CHECKPOINT} --epochs 0"
        wanted = f"a model with attributes to change; `{adding}` adds them"
        require(model.directions or not (EDIT or MODE == "attributes"), "CHECKPOINT", CHECKPOINT, wanted)
        wanted = 'what to change in the photo, such as "Smiling 2"'
        require(parse_edit(EDIT, model.directions) or MODE != "photo", "EDIT", EDIT, wanted)
        if PRIOR == "standard":
            model.latent_mean.zero_()
            model.latent_scale.copy_(torch.eye(model.config["latent_dim"]))
        if MODE == "photo" and not TUNE:
            print("Tune        50 steps, the default of this mode")
            globals()["TUNE"] = 50
        sources = find_sources()
        require(sources or not TUNE, "TUNE", TUNE, "0 without a photo to fit (interpolate needs IMAGE_TO or EDIT)")
        inputs = {str(photo.path.resolve()).lower() for photo in itertools.chain(*sources)}  # case may not matter
        for number, (images, columns) in enumerate(MODES[MODE](model, *sources), start=1):
            path = Path(OUTPUT) if number == 1 else Path(OUTPUT).with_stem(f"{Path(OUTPUT).stem}-{number}")
            require(str(path.resolve()).lower() not in inputs, "OUTPUT", str(path), "a file other than the photos")
            save_sheet(images, path, columns)
        if sources and not TUNE and Path(IMAGE).name != "tested_data":
            print("Tip         --tune 50 keeps the person: it fits the decoder to the photo before anything is drawn")


if __name__ == "__main__":
    vae.run_script(main)
