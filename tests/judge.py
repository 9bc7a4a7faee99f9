"""How good the pictures of a model are: by photos that it has not seen, and by a face recogniser.

    python tests/judge.py --photos FOLDER       # of checkpoints_best/vae_model_20.pth; every constant below is a flag

Needs what nothing else here does, best in an environment of its own:

    pip install -r requirements.txt scikit-image dlib-bin face-recognition-models "setuptools<81"

A face is found where dlib's frontal detector finds one in the picture at twice its size. Faces are told apart by dlib's
128 numbers (descriptors): less than 0.6 apart, they are taken for one person. The Frechet distance is that of the
Gaussians of two sets of descriptors (Heusel et al. 2017, arXiv:1706.08500, with dlib's network in Inception's place).
"""

import math
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import train
import vae

CHECKPOINT: str = "checkpoints_best/vae_model_20.pth"  # the model to judge
PHOTOS: str = (
    ""  # folder of photos that it has not been trained on: some 900, as fewer make the Frechet distance larger
)
VARIED: int = 20  # of these photos, so many get ten variations for each W


@cache
def recogniser():
    """Return dlib's face detector, its landmarks and its descriptors, once in a process."""
    import dlib

    with warnings.catch_warnings(action="ignore"):  # of the way in which it finds its own files
        import face_recognition_models

    landmarks = dlib.shape_predictor(face_recognition_models.pose_predictor_model_location())
    descriptors = dlib.face_recognition_model_v1(face_recognition_models.face_recognition_model_location())
    return dlib.get_frontal_face_detector(), landmarks, descriptors


def descriptor(picture):
    """Return the descriptor (128,) of the largest face in a picture (H, W, 3) of uint8, NaN where none is found."""
    detector, landmarks, descriptors = recogniser()
    if not (faces := detector(picture, 1)):
        return np.full(128, np.nan)
    face = max(faces, key=lambda rectangle: rectangle.area())
    return np.array(descriptors.compute_face_descriptor(picture, landmarks(picture, face)))


def describe(pictures, name):
    """Return the descriptors (N, 128) of pictures (N, H, W, 3), found on all cores."""
    with ProcessPoolExecutor(train.cores()) as pool:
        found = pool.map(descriptor, pictures, chunksize=8)
        return np.array(list(tqdm(found, name, len(pictures), unit="picture", leave=False, disable=None)))


def pictures_of(images):
    """Images (N, 3, H, W) in [0, 1] -> pictures (N, H, W, 3) of uint8."""
    return np.stack([np.asarray(vae.as_picture(image)) for image in images])


def share_found(descriptors):
    """Return in how many of the pictures a face was found, in percent."""
    return 100 * (1 - np.isnan(descriptors[..., 0]).mean())


def distance(one, other):
    """Return the mean distance between descriptors (..., 128), of those pairs in which both faces were found."""
    return np.nanmean(np.linalg.norm(one - other, axis=-1))


def frechet_distance(one, other):
    """Return the Frechet distance of the Gaussians of two sets of descriptors (N, 128), (M, 128).

    It is NaN where a set has too few faces for a covariance.
    """
    one, other = (torch.from_numpy(those[~np.isnan(those[:, 0])]) for those in (one, other))
    if min(len(one), len(other)) <= one.shape[1]:
        return math.nan
    covariances = torch.cov(one.T), torch.cov(other.T)
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()  # the trace of the matrix' root
    means = (one.mean(0) - other.mean(0)).square().sum()
    return (means + covariances[0].trace() + covariances[1].trace() - 2 * root).item()


def likeness(photos, reconstructions):
    """Return the PSNR in dB, pooled over all pictures (N, H, W, 3), and the mean SSIM (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity

    squared_error = np.square((photos / 255.0) - (reconstructions / 255.0)).sum()
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(photos, reconstructions, strict=True)
    return vae.psnr(squared_error, photos.size), np.mean([structural_similarity(*pair, **options) for pair in pairs])


def judge_variations(model, mu, originals):
    """Print for each W how far ten variations of a photo are from each other, and from its reconstruction."""
    noise = genpic.noise(model, 10 * len(mu)).split(10)
    for w in genpic.SWEEP[1:]:
        codes = [genpic.perturb(model, code, None, eps, w) for code, eps in zip(mu.split(1), noise, strict=True)]
        pictures = pictures_of(genpic.decode(model, torch.cat(codes)))
        found = describe(pictures, f"W = {w:g}").reshape(len(mu), 10, 128)
        values = pictures.reshape(len(mu), 10, -1).astype(float)
        apart = [np.sqrt(np.square(values[:, i] - values[:, j]).mean(1)) for i, j in combinations(range(10), 2)]
        print(
            f"W = {w:<8g}{np.mean(apart):.1f} grey levels between two variations, "
            f"{distance(found, originals[:, None]):.3f} from the reconstruction"
        )


@vae.script
@torch.inference_mode()
def main(argv=None):
    """Reconstruct the photos, draw as many samples, vary some of the photos, and print what comes of it."""
    vae.override_constants(globals(), argv)
    vae.require(PHOTOS, "PHOTOS", PHOTOS, "a folder of photos")  # "" would be the folder one stands in
    vae.require(VARIED >= 1, "VARIED", VARIED, "at least 1")
    if missing := [name for name in ("dlib", "face_recognition_models", "skimage") if not find_spec(name)]:
        raise vae.UserError(f"There is no {missing[0]}: the first lines of this script tell what to install.")
    model, _ = vae.load_checkpoint(CHECKPOINT)
    vae.require(model.config["channels"] == 3, "CHECKPOINT", CHECKPOINT, "a model of colour pictures")
    images = torch.cat([image for _, image in genpic.readable_photos(model, PHOTOS, "PHOTOS")])
    mu = torch.cat([model.encode(part)[0] for part in images.split(64)])
    noise = genpic.noise(model, len(images))
    drawn = {
        "photos": images,
        "reconstructions": genpic.decode(model, mu),
        "samples": genpic.decode(model, model.draw_latents(noise)),
        "samples of N(0, I)": genpic.decode(model, noise[:500]),
    }
    pictures = {name: pictures_of(these) for name, these in drawn.items()}
    found = {name: describe(these, name) for name, these in pictures.items()}
    photos, reconstructions = found["photos"], found["reconstructions"]
    others, others_too = np.roll(photos, 1, axis=0), np.roll(reconstructions, 1, axis=0)

    psnr, ssim = likeness(pictures["photos"], pictures["reconstructions"])
    print(f"Likeness    of {len(images)} reconstructions: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}")
    shares = ", ".join(f"{share_found(these[:500]):.1f} % of {name}" for name, these in found.items())
    print(f"Faces       found, of at most 500 each, in {shares}")
    frechet = {name: frechet_distance(found[name], photos) for name in ("reconstructions", "samples")}
    halves = frechet_distance(photos[::2], photos[1::2])
    distances = ", ".join(f"{name} {value:.4f}" for name, value in frechet.items())
    print(f"Frechet     distance from the photos: {distances}; of one half of the photos from the other {halves:.4f}")
    print(f"Person      {distance(photos, reconstructions):.3f} from a photo to its reconstruction")
    print(f"            {distance(photos, others):.3f} between photos of two people", end=", ")
    print(f"{distance(reconstructions, others_too):.3f} between reconstructions of two")
    chosen = torch.linspace(0, len(images) - 1, min(VARIED, len(images))).long()
    judge_variations(model, mu[chosen], reconstructions[chosen.numpy()])


if __name__ == "__main__":
    main()
