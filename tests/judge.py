"""Measure the quality of a model's pictures on photos it has not seen, with a face recognition network.

    pip install -r requirements.txt scikit-image dlib-bin face-recognition-models    # in a separate environment
    python tests/judge.py --photos FOLDER    # judges checkpoints_best/vae_model_20.pth; every constant below is a flag

Faces are detected by dlib's frontal detector, on the picture at twice its size. They are compared by dlib's descriptors
of 128 numbers: two faces less than 0.6 apart count as the same person. The Frechet distance is the distance between
Gaussians fitted to two sets of descriptors (Heusel et al. 2017, arXiv:1706.08500; dlib's network replaces Inception).

With ATTRIBUTES, a small classifier, which is trained on FACES first, judges edits of photos that lack an attribute;
with WHOLE, those that genpic.py's "photo" mode makes.
"""

import functools
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import vae
from data.attributes import table_attributes
from data.cache import load_images, load_pixels
from data.faces import check_crop
from data.photos import find_photos
from vae import UserError, require

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model to judge
PHOTOS: str = ""  # folder of photos that it was not trained on: about 900, since fewer raise the Frechet distance
CROP: str = "center"  # square of each photo to use, as in genpic.py: "center" for aligned photos, "face" for others
VARIED: int = 20  # number of these photos that get ten variations for each W, without and with a fitted decoder
TUNE: int = 50  # steps that fit the decoder to each of them
ATTRIBUTES: str = ""  # table of attributes of PHOTOS and FACES, to judge edits instead
FACES: str = ""  # folder of other photos in that table, on which the classifier of attributes is trained
WHOLE: str = ""  # folder of whole photos; if set, their faces are changed by genpic.py's "photo" mode and judged
EDITED: int = 300  # number of PHOTOS to edit; a third of them also with a fitted decoder

EDITS = {"Smiling": 2, "Eyeglasses": 2, "Male": 2, "Bangs": 2, "Wearing_Hat": 2, "Mustache": 2, "Goatee": 2}
EDITS |= {"Young": -3, "Blond_Hair": 3, "Gray_Hair": 3, "Bald": 3}
CPU = torch.device("cpu")


@functools.cache
def recogniser():
    """Return dlib's face detector, landmark predictor and descriptor network, loaded once per process."""
    import dlib

    models = distribution("face-recognition-models").locate_file("face_recognition_models/models")
    landmarks = dlib.shape_predictor(f"{models}/shape_predictor_68_face_landmarks.dat")
    descriptors = dlib.face_recognition_model_v1(f"{models}/dlib_face_recognition_resnet_model_v1.dat")
    return dlib.get_frontal_face_detector(), landmarks, descriptors


def descriptor(picture):
    """Return the descriptor (128,) of the largest face in a picture (H, W, 3) of uint8, or NaN if none is found."""
    detector, landmarks, descriptors = recogniser()
    faces = detector(picture, 1)
    if not faces:
        return np.full(128, np.nan)
    face = max(faces, key=lambda rectangle: rectangle.area())
    return np.array(descriptors.compute_face_descriptor(picture, landmarks(picture, face)))


def describe(images, name):
    """Images (N, 3, H, W) -> pictures (N, H, W, 3) of uint8 and their descriptors (N, 128), computed on all cores."""
    pictures = np.stack([np.asarray(vae.to_picture(image)) for image in images])
    with ProcessPoolExecutor(torch.get_num_threads()) as pool:
        found = pool.map(descriptor, pictures, chunksize=8)
        return pictures, np.array(list(tqdm(found, name, len(pictures), leave=False, disable=None)))


def distance(one, other):
    """Return the mean distance between descriptors (..., 128) over pairs where both have a face; NaN if none do."""
    return np.nanmean(np.linalg.norm(one - other, axis=-1))


def frechet_distance(one, other):
    """Return the Frechet distance between Gaussians of descriptors (N, D), (M, D); NaN unless each has over D faces."""
    one, other = (torch.from_numpy(those[~np.isnan(those[:, 0])]) for those in (one, other))
    if min(len(one), len(other)) <= one.shape[1]:
        return math.nan
    covariances = [torch.cov(one.T), torch.cov(other.T)]
    root_trace = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return (means + covariances[0].trace() + covariances[1].trace() - 2 * root_trace).item()


def judge_faces(found):
    """Print metrics of photos, reconstructions and samples, given their descriptors {name: (N, 128)}."""
    said = ", ".join(f"{100 * np.isfinite(these[:500, 0]).mean():.1f} % of {name}" for name, these in found.items())
    print(f"Faces       found in {said} (of at most 500 each)")
    photos, recon, samples, _ = found.values()
    halves = frechet_distance(photos[::2], photos[1::2])
    said = f"reconstructions {frechet_distance(recon, photos):.4f}, samples {frechet_distance(samples, photos):.4f}"
    print(f"Frechet     distance to the photos: {said}; between the two halves of the photos {halves:.4f}")
    people, people_too = (distance(these, np.roll(these, 1, axis=0)) for these in (photos, recon))
    print(f"Person      {distance(photos, recon):.3f} from a photo to its reconstruction")
    print(f"            {people:.3f} between photos of two people, {people_too:.3f} between reconstructions of two")


def judge_variations(model, mu, originals):
    """For each W, print how much ten variations of a photo differ from each other and from its reconstruction."""
    noise = vae.latent_noise(model, 10 * len(mu), 0).split(10)
    for w in genpic.SWEEP[1:]:
        codes = [genpic.perturb(model, code, eps, w) for code, eps in zip(mu.split(1), noise, strict=True)]
        pictures, found = describe(genpic.decode_in_parts(model, torch.cat(codes)), f"W = {w:g}")
        moved = distance(found.reshape(len(mu), 10, -1), originals[:, None])
        values = torch.from_numpy(pictures.reshape(len(mu), 10, -1)).float()
        levels = torch.stack([torch.pdist(these) for these in values]).mean() / math.sqrt(values.shape[2])
        print(f"W = {w:<8g}{levels:.1f} grey levels between two variations, {moved:.3f} from the reconstruction")


def judge_fitted(model, mu, images, photos):
    """Print how similar fitted pictures and their variations are to their photos, given the photos' descriptors."""
    noise = vae.latent_noise(model, 10, 0)
    drawn = {0: [], 0.01: [], 0.1: []}
    seconds = 0.0
    for code, image in zip(mu.split(1), images.split(1), strict=True):
        start = time.perf_counter()
        fitted = genpic.fit_decoder(model, code, image)
        seconds += time.perf_counter() - start
        for w, pictures in drawn.items():
            pictures.append(fitted.decode(genpic.perturb(model, code, noise[: 10 if w else 1], w)))
    unchanged = torch.stack(drawn[0])
    psnr = vae.psnr((unchanged[:, 0] - images).square().mean().item())
    print(f"Fitted      {TUNE} steps, {psnr:.2f} dB, {seconds / len(images):.2f} s for each of {len(images)} photos")
    for w, pictures in drawn.items():
        found = describe(torch.cat(pictures), f"W = {w:g}")[1].reshape(len(images), len(pictures[0]), -1)
        levels = 255 * (torch.stack(pictures) - unchanged).square().mean((2, 3, 4)).sqrt().mean()
        seen = 100 * np.isfinite(found[..., 0]).mean()
        print(
            f"W = {w:<8g}{distance(found, photos[:, None]):.3f} from the photo, {levels:.1f} grey levels from the "
            f"fitted picture, faces found in {seen:.1f} %"
        )


def judge_morphs(model, mu, images):
    """Print in how many frames of ten morphs between two photos, without the two ends, a face is found."""
    frames = []
    for codes, pair in zip(mu[:20].split(2), images[:20].split(2), strict=True):
        if len(pair) == 1:
            break
        fitted = genpic.fit_decoder(model, codes, pair)
        frames.append(fitted.decode(genpic.codes_between(model, *codes)[1:-1]))
    _, found = describe(torch.cat(frames), "morphs")
    print(f"Morphs      faces found in {100 * np.isfinite(found[:, 0]).mean():.1f} % of {len(found)} frames")


# Attributes
def train_classifier(photos, labels):
    """Return a classifier of attributes, images (B, 3, 96, 96) -> logits (B, A), after ten passes over N Photos.

    `labels` (N, A) contains 1 and -1.
    """
    pixels, _ = read_pixels(photos, 96)
    layers = []
    for inputs, outputs in zip([3, 32, 64, 128, 256], [32, 64, 128, 256, 256], strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3)]
    torch.manual_seed(0)
    classifier = nn.Sequential(*layers, *pooling, nn.Linear(256, labels.shape[1])).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    batches = [batch for _ in range(10) for batch in torch.randperm(len(labels)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
    for batch in tqdm(batches, "Classifier", leave=False, disable=None):
        images = load_images(pixels, batch, CPU)
        images = images.flip(3) if torch.rand(()) < 0.5 else images
        logits = classifier(images.roll(torch.randint(-4, 5, (2,)).tolist(), (2, 3)))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, (labels[batch] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def read_pixels(photos, size):
    """Return Photos, cropped as CROP says, as uint8 (N, size, size, 3), and those that are not copies of others."""
    return load_pixels(photos, {"channels": 3, "size": size, "crop": CROP}, torch.get_num_threads(), CPU)


def classify(classifier, images):
    """Return the logits (N, A) of attributes in images (N, 3, S, S), which are rounded to 8 bits first."""
    parts = ((part * 255).round() / 255 for part in images.split(64))
    return torch.cat([classifier(vae.square_transform(96)(part)) for part in parts])


def equal_error_threshold(logits, labels):
    """Return the logit above which an attribute counts as seen: photos with and without it are wrong equally often."""
    missed = (logits[labels > 0] < logits[:, None]).float().mean(1)
    imagined = (logits[labels < 0] >= logits[:, None]).float().mean(1)
    return logits[(missed - imagined).abs().argmin()]


def labels_of(photos):
    """Return the attributes' names, the Photos that have a row in the table ATTRIBUTES, and their labels (N, A)."""
    names, rows = table_attributes(ATTRIBUTES, photos)
    pairs = [(photo, row) for photo, row in zip(photos, rows, strict=True) if row is not None]
    return names, [photo for photo, _ in pairs], torch.tensor(np.array([row for _, row in pairs]))


def judge_edits(model, photos, images, mu):
    """Print what a classifier and the face recognition see after EDITS of Photos without the attribute."""
    names, others, labels = labels_of(read_pixels(find_photos(FACES), 96)[1])
    _, known, held = labels_of(photos)
    require(len(known) == len(photos), "ATTRIBUTES", ATTRIBUTES, "a table with a row for each of PHOTOS")
    with torch.enable_grad():
        classifier = train_classifier(others, labels)
    logits = classify(classifier, images)
    thresholds = torch.stack([equal_error_threshold(*pair) for pair in zip(logits.T, held.T, strict=True)])
    if WHOLE:
        judge_whole(model, classifier, dict(zip(names, thresholds, strict=True)))
        return
    correct = ((logits >= thresholds) == (held > 0)).float().mean(0)
    chosen = torch.linspace(0, len(mu) - 1, min(EDITED, len(mu))).long()
    images, mu = images[chosen], mu[chosen]
    recon = genpic.decode_in_parts(model, mu)
    faces, recon_faces = describe(images, "photos")[1], describe(recon, "reconstructions")[1]
    fitted = {i: genpic.fit_decoder(model, mu[i : i + 1], images[i : i + 1]) for i in range(0, len(mu), 3)}
    for name, units in EDITS.items():
        column, sign = names.index(name), math.copysign(1, units)
        print(f"{name} {units:+}: accuracy {correct[column]:.3f}, {(held[:, column] > 0).sum()} photos have it")
        is_without = (sign * (logits - thresholds)[chosen, column] < 0) & (sign * held[chosen, column] < 0)
        rows = torch.nonzero(is_without)[:, 0]
        some = [row for row in rows.tolist() if row in fitted]
        move = units * model.directions[name]
        pair = [torch.cat([fitted[row].decode(mu[[row]] + by) for row in some]) for by in (0, move)]
        edits = {
            "unfitted": (recon[rows], genpic.decode_in_parts(model, mu[rows] + move), recon_faces[rows]),
            "fitted": (*pair, faces[some]),
        }
        for kind, (before, after, reference) in edits.items():
            seen = classify(classifier, after)
            margins = sign * (seen - thresholds)[:, column]
            print(f"  {kind:<9} seen in {100 * (margins >= 0).float().mean():.1f} % of {len(after)}", end="; ")
            describe_changes((seen - classify(classifier, before)) / logits.std(0), column, names.index("Male"))
            found = describe(after, kind)[1]
            detected = 100 * np.isfinite(found[:, 0]).mean()
            print(f"descriptors {distance(found, reference):.3f} apart; faces in {detected:.1f} %")


def judge_whole(model, classifier, thresholds):
    """Print what is seen in faces cut again from the photos in WHOLE that genpic.py's "photo" mode has changed."""
    genpic.CROP = "face"
    read = [each for each in genpic.read_photos(model, find_photos(WHOLE)) if each[2]]
    photos = torch.cat([image for _, image, _ in read])
    faces = describe(photos, "photos")[1]
    for name, units in {"Smiling": 2, "Young": -3, "Eyeglasses": 2}.items():
        genpic.EDIT = f"{name} {units}"
        changed = []
        for photo, *_ in tqdm(read, genpic.EDIT, leave=False, disable=None):
            with TemporaryDirectory() as folder, redirect_stdout(None):
                next(genpic.make_photo(model, [photo]))[0].save(f"{folder}/changed.png")
                changed.append(genpic.read_photo(model, f"{folder}/changed.png")[0])
        column = [*thresholds].index(name)
        margins = [classify(classifier, these)[:, column] - thresholds[name] for these in (photos, torch.cat(changed))]
        before, after = (math.copysign(1, units) * margin >= 0 for margin in margins)
        found = describe(torch.cat(changed), "faces")[1]
        print(f"{genpic.EDIT}: seen in {100 * after[~before].float().mean():.1f} % of {(~before).sum()}", end="; ")
        detected = 100 * np.isfinite(found[:, 0]).mean()
        print(f"descriptors {distance(found, faces):.3f} from the photos; faces in {detected:.1f} % of {len(found)}")


def describe_changes(changes, column, male):
    """Print how much attributes other than `column` change, given all changes (N, A), relative to its own change."""
    in_mean, per_photo = changes.mean(0).abs(), changes.abs().mean(0)
    others = [(sizes.sum() / sizes[column] - 1) / (len(sizes) - 1) for sizes in (in_mean, per_photo)]
    share = changes[:, male].mean() / in_mean[column]
    print(f"other attributes {others[0]:.2f} in the mean, {others[1]:.2f} per photo, Male {share:+.2f}", end="; ")


def main(argv=()):
    """Reconstruct the photos, draw as many samples, vary some of the photos, and print the metrics."""
    with vae.flags(globals(), argv):
        judge()


@torch.no_grad()
def judge():
    """Print all metrics of CHECKPOINT."""
    check_crop(CROP)
    require(TUNE >= 1, "TUNE", TUNE, "at least 1")
    require(ATTRIBUTES or not WHOLE, "ATTRIBUTES", ATTRIBUTES, "a table of attributes if WHOLE is set")
    require(VARIED >= 2, "VARIED", VARIED, "at least 2")
    require(PHOTOS, "PHOTOS", PHOTOS, "a folder of photos")  # "" would mean the current folder
    try:
        recogniser()
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: the top of this script shows what to install.") from None
    model, _ = vae.load_checkpoint(CHECKPOINT)
    require(model.config["channels"] == 3, "CHECKPOINT", CHECKPOINT, "a model of colour pictures")
    genpic.CROP, genpic.TUNE = CROP, TUNE
    read = list(genpic.read_photos(model, find_photos(PHOTOS)))
    images = torch.cat([image for _, image, _ in read])
    mu = torch.cat([model.encode(part)[0] for part in images.split(64)])
    if ATTRIBUTES:
        judge_edits(model, [photo for photo, *_ in read], images, mu)
        return
    noise = vae.latent_noise(model, len(images), 0)
    codes = {"reconstructions": mu, "samples": model.draw_latents(noise), "samples of N(0, I)": noise[:500]}
    drawn = {"photos": images} | {name: genpic.decode_in_parts(model, these) for name, these in codes.items()}
    described = {name: describe(these, name) for name, these in drawn.items()}
    pairs = described["photos"][0], described["reconstructions"][0]
    psnr = vae.psnr(np.square(pairs[0] / 255.0 - pairs[1] / 255.0).mean())
    windows = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = np.mean([structural_similarity(*pair, channel_axis=2, **windows) for pair in zip(*pairs, strict=True)])
    print(f"Likeness    {len(images)} reconstructions, CROP {CROP}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}")
    judge_faces({name: found for name, (_, found) in described.items()})
    chosen = torch.linspace(0, len(images) - 1, min(VARIED, len(images))).long()
    judge_variations(model, mu[chosen], described["reconstructions"][1][chosen.numpy()])
    judge_fitted(model, mu[chosen], images[chosen], described["photos"][1][chosen.numpy()])
    judge_morphs(model, mu[chosen], images[chosen])


if __name__ == "__main__":
    vae.run_script(main)
