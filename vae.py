"""A convolutional variational autoencoder (VAE) for face photos, and the little that train.py and genpic.py share.

    from vae import load_checkpoint
    model, info = load_checkpoint("checkpoints_best/vae_model_20.pth")
    images = model.sample(16)                       # (16, 3, 150, 150), values in [0, 1]

Importing this file has no effect of its own: it prints nothing, draws no random number, reads no flag.
"""

import argparse
import functools
import inspect
import io
import math
import os
import re
import reprlib
import signal
import sys
import typing
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import distributed, nn
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# The size of the model: a checkpoint carries these four, so genpic.py needs none of them
IMAGE_SIZE: int = 150  # side of the square pictures in pixels, 16 to 512; training time grows with its square
CHANNELS: int = 3  # 3 for colour, 1 for grey
LATENT_DIM: int = 128  # numbers in a latent code; fewer give plainer pictures and smoother interpolations
HIDDEN_DIMS: list[int] = [32, 64, 128, 256, 512]  # channels of the encoder's stages; each halves the side

LOG_VAR_RANGE = (-20.0, 10.0)  # exp() stays finite and positive, in float32 and in bfloat16
MAX_PIXELS = 50_000_000  # of a photo in memory; one whose header tells of more is never decoded
MADE_HERE = "made by vae.py"  # the mark in pictures of save_picture


# The model
def celeb_transforms(size):
    """Return the transforms (photo -> (C, size, size) tensor in [0, 1]) and (photo or tensor -> size x size)."""
    crop = Compose([Resize(size), CenterCrop(size)])
    return Compose([*crop.transforms, ToTensor()]), crop


celeb_transform, celeb_transform1 = celeb_transforms(IMAGE_SIZE)


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114) of strided convolutions.

    Images are (B, channels, image_size, image_size) in [0, 1]; codes are (B, latent_dim). Raises ValueError for
    arguments that make no model. The names in the state dict are a public format: published checkpoints use them.
    """

    def __init__(self, image_size=IMAGE_SIZE, channels=CHANNELS, hidden_dims=HIDDEN_DIMS, latent_dim=LATENT_DIM):
        super().__init__()
        check_arguments(image_size, channels, hidden_dims, latent_dim)
        self.config = {
            "image_size": image_size,
            "channels": channels,
            "hidden_dims": list(hidden_dims),
            "latent_dim": latent_dim,
        }
        side = math.ceil(image_size / 2 ** len(hidden_dims))  # each stage rounds up: 150 -> 75 -> 38 -> 19 -> 10 -> 5
        self.bottom = (hidden_dims[-1], side, side)
        up = hidden_dims[::-1]

        self.encoder = nn.Sequential(*map(halve, [channels, *hidden_dims], hidden_dims))
        self.fc_mu = nn.Linear(math.prod(self.bottom), latent_dim)
        self.fc_var = nn.Linear(math.prod(self.bottom), latent_dim)
        self.decoder_input = nn.Linear(latent_dim, math.prod(self.bottom))
        self.decoder = nn.Sequential(*map(double, up, up[1:]))
        self.final_layer = nn.Sequential(*double(up[-1], up[-1]), nn.Conv2d(up[-1], channels, 3, padding=1))

        # The prior that `sample` draws from: N(0, I) until `fit_prior` has seen the codes of photos.
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_scale", torch.eye(latent_dim))

    def encode(self, x):
        """Images (B, C, H, W) -> mean and log-variance of the posterior q(z|x), (B, L) each, in float32."""
        features = self.encoder(x).flatten(1)
        return self.fc_mu(features).float(), self.fc_var(features).float().clamp(*LOG_VAR_RANGE)

    def reparameterize(self, mu, log_var):
        """Draw z ~ N(mu, exp(log_var)), (B, L), as eps * std + mu, so that gradients reach both."""
        std = torch.exp(0.5 * log_var)
        return torch.randn_like(std) * std + mu

    def decode(self, z):
        """Codes (B, L) -> images (B, C, H, W) in [0, 1], in float32."""
        features = self.decoder(self.decoder_input(z).unflatten(1, self.bottom))
        logits = self.final_layer(features).float()  # a sigmoid in bfloat16 is 1.0 from 0.998 on, where BCE is infinite
        resize = celeb_transforms(self.config["image_size"])[1]  # 160 x 160 -> 150 x 150
        return resize(torch.sigmoid(logits))

    def forward(self, x):
        """Images (B, C, H, W) -> (reconstructions of the same shape, mu (B, L), log_var (B, L)); z is drawn."""
        mu, log_var = self.encode(x)
        return self.decode(self.reparameterize(mu, log_var)), mu, log_var

    def draw_latents(self, eps):
        """Standard normal noise (B, L) -> codes (B, L) of the prior: latent_mean + latent_scale @ eps."""
        return self.latent_mean + eps @ self.latent_scale.T

    @torch.no_grad()
    def sample(self, n):
        """Decode `n` codes drawn from the prior -> images (n, C, H, W) in [0, 1]."""
        return self.decode(self.draw_latents(torch.randn(n, len(self.latent_mean), device=self.latent_mean.device)))

    def fit_prior(self, mu, log_var):
        """Make the prior the Gaussian of the aggregate posterior, given the codes (N, L) of any number of photos.

        The mixture of N Gaussians has the covariance Cov(mu) + diag(mean exp(log_var)) (law of total variance); 1e-6
        on the diagonal keeps it positive definite where rounding would not.
        """
        mu, variance = mu.cpu().double(), log_var.cpu().double().exp()
        covariance = torch.cov(mu.T, correction=0).reshape(mu.shape[1], -1) + torch.diag(variance.mean(0) + 1e-6)
        self.latent_mean.copy_(mu.mean(0))
        self.latent_scale.copy_(torch.linalg.cholesky(covariance))

    def marginal_kl(self):
        """KL divergence in nats of the fitted prior from N(0, I): how far the codes of photos, as a whole, are from it.

        The last term of Hoffman & Johnson 2016, "ELBO surgery", for codes that are distributed as a Gaussian.
        """
        squares = self.latent_scale.square().sum() + self.latent_mean.square().sum()
        return 0.5 * (squares - len(self.latent_mean)).item() - self.latent_scale.diagonal().log().sum().item()

    def prior_is_fitted(self):
        """Whether `fit_prior` has been called on these weights; if not, the prior is N(0, I)."""
        return not torch.equal(self.latent_scale, torch.eye(len(self.latent_scale), device=self.latent_scale.device))


def check_arguments(image_size, channels, hidden_dims, latent_dim):
    """Raise UserError, a ValueError, where the arguments of a VAE make no model."""
    for name, value in (("IMAGE_SIZE", image_size), ("CHANNELS", channels), ("LATENT_DIM", latent_dim)):
        require(isinstance(value, int), name, value, "a whole number")
    require(16 <= image_size <= 512, "IMAGE_SIZE", image_size, "from 16 to 512 pixels")
    require(channels in (1, 3), "CHANNELS", channels, "3 (colour) or 1 (grey)")
    require(1 <= latent_dim <= 10_000, "LATENT_DIM", latent_dim, "from 1 to 10000")
    widths_fit = hidden_dims and all(isinstance(width, int) and width >= 1 for width in hidden_dims)
    require(widths_fit, "HIDDEN_DIMS", hidden_dims, "a list of whole numbers, each at least 1")
    halvings = math.ceil(math.log2(image_size))
    stages = f"at most {halvings} stages long, for {image_size} pixels can be halved no more often"
    require(len(hidden_dims) <= halvings, "HIDDEN_DIMS", hidden_dims, stages)


def halve(inputs, outputs):
    """Return an encoder stage: (B, inputs, H, W) -> (B, outputs, ceil(H / 2), ceil(W / 2))."""
    return normalised(nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1))


def double(inputs, outputs):
    """Return a decoder stage: (B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
    return normalised(nn.ConvTranspose2d(inputs, outputs, kernel_size=3, stride=2, padding=1, output_padding=1))


def normalised(convolution):
    """Return a stage of a convolution, BatchNorm and LeakyReLU.

    The convolution's bias stays as it is: BatchNorm takes it off again, so its gradient is zero, and on CPUs working
    out that zero would take a fifth of the training time.
    """
    convolution.bias.requires_grad_(False)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(inplace=True))


def psnr(squared_error, pixels):
    """Peak signal-to-noise ratio in dB of a squared error summed over so many values in [0, 1]."""
    return -10 * math.log10(max(squared_error / pixels, 1e-12))


# Photos: in files, in .zip archives and in .npy arrays
class Photo(typing.NamedTuple):
    """Where a photo is: a file, or the name or row that it has in a .zip archive or .npy array."""

    path: Path
    member: str | int | None = None

    def __str__(self):
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"


@functools.cache
def image_formats():
    """Names of the formats to read: not those for which Pillow starts programs, needs plugins or unpacks bombs."""
    Image.init()
    return [name for name in Image.OPEN if name not in ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "FITS")]


def is_image(name):
    """Whether the name of a file has an ending of a format to read, and none of its folders, nor itself, is hidden."""
    hidden, ending = any(part.startswith(".") for part in Path(name).parts), Path(name).suffix.lower()
    phone = ending in (".heic", ".heif")  # which Pillow does not read: better named than passed over
    return not hidden and (phone or Image.registered_extensions().get(ending) in image_formats())


def find_photos(place, without=None):
    """Return the Photos of a file, or of all files in a folder and the folders in it, but not below `without`.

    Archives and arrays count as the photos in them. Links are followed, hidden files and folders are passed over; what
    cannot be opened is named. Raises UserError where `place` is itself an archive or array that cannot be used.
    """
    if os.path.exists(place) and not os.path.isdir(place):
        return photos_in(Path(place))

    def tell(error):
        print(printable(f"Skipped: {error.filename} cannot be opened ({error.strerror})."))

    found, photos, visited = [], [], {without and os.path.realpath(without)}
    for root, folders, names in os.walk(place, onerror=tell, followlinks=True):
        if (real := os.path.realpath(root)) in visited:  # a link back up would go round for ever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(root, name) for name in names if is_image(name) or is_container(name)]
    for path in map(Path, sorted(found)):
        try:
            photos += photos_in(path)
        except UserError as error:
            print(f"Skipped: {error}")
    return photos


def is_container(name):
    """Whether a file of this name is an archive or an array of photos."""
    return Path(name).suffix.lower() in (".zip", ".npy") and not Path(name).name.startswith(".")


def photos_in(path):
    """Return the Photos in a file: those of an archive or array, else the file itself as one."""
    if not is_container(path) or not path.is_file():
        return [Photo(path)]
    container = open_container(path)
    if isinstance(container, zipfile.ZipFile):
        names = {member.filename for member in container.infolist() if not member.is_dir()}
        return [Photo(path, name) for name in sorted(names) if is_image(name)]
    if container.size and container.dtype != np.uint8 and not 0 <= container.min() <= container.max() <= 1:
        raise UserError(f"{path} has values outside [0, 1], or none: an array of photos is uint8, or float in [0, 1].")
    return [Photo(path, row) for row in range(len(container))]


def open_container(path):
    """Return the ZipFile or the memory-mapped array (N, H, W) or (N, H, W, 1 or 3) at `path`, opened once a process.

    Raises UserError where it is broken, encrypted, or an array of something else; objects are never unpickled.
    """
    stat = os.stat(path)
    return open_version(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size, os.getpid())


@functools.lru_cache(maxsize=8)
def open_version(path, *version):
    """Open an archive or array; `version` tells it from others of that path, and for other processes."""
    try:
        if path.lower().endswith(".zip"):
            archive = zipfile.ZipFile(path)
            if any(member.flag_bits & 1 for member in archive.infolist()):
                raise ValueError("it is encrypted: unpack it first")
            return archive
        array = np.lib.format.open_memmap(path, "r")  # which unpickles nothing
    except Exception as error:  # whatever zipfile and NumPy stumble over in a broken file
        raise UserError(f"{path} cannot be read as an archive or array of photos ({error}).") from None
    values, shape = array.dtype == np.uint8 or array.dtype.kind == "f", array.shape
    photos = shape[3:] in [(1,), (3,)] or (len(shape) == 3 and shape[2] > 3)  # else one picture in colour
    if not (values and photos and 0 < math.prod(shape[1:3]) <= MAX_PIXELS):
        raise UserError(
            f"{path} holds {array.dtype} of shape {shape}: an array of photos is uint8 or float in [0, 1], of shape "
            f"(N, height, width) or (N, height, width, 1 or 3), of at most {MAX_PIXELS:,} pixels each."
        )
    return array


@contextmanager
def muted():
    """Have libtiff print nothing: it would tell of every broken photo in words of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        stderr = os.dup(2)
    except OSError:  # a Windows program without a console may have none
        stderr = os.dup(nowhere)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def open_photo(path, member=None):
    """Return a Photo as a PIL image, decoded as little as its format allows."""
    if member is None:
        if Path(path).is_fifo():
            raise ValueError("a pipe, which may never end")
        return Image.open(path, formats=image_formats())
    container = open_container(path)
    if isinstance(container, zipfile.ZipFile):
        info = container.getinfo(member)
        if info.file_size > 8 * MAX_PIXELS:
            raise ValueError(f"a file of over {8 * MAX_PIXELS / 1e6:.0f} MB")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be read in bounds
            raise ValueError("neither stored nor deflated")
        with container.open(info) as file:
            return Image.open(io.BytesIO(file.read(info.file_size + 1)), formats=image_formats())
    pixels = container[member] if container.dtype == np.uint8 else (container[member] * 255).round().astype(np.uint8)
    return to_pil_image(pixels)


def read_image(photo, channels=CHANNELS, size=None):
    """Read a Photo or path upright, as an RGB (3 channels) or grey (1) PIL image, transparent areas over white.

    A large JPEG that is to be scaled down to `size` pixels is decoded at a half, quarter or eighth of its own size,
    which stays four times `size` or more. Raises UserError where it does not exist, cannot be decoded whole, or would
    take more than MAX_PIXELS.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            open_photo(*photo) if isinstance(photo, Photo) else open_photo(photo) as image,
            muted() if image.format == "TIFF" else nullcontext(),
        ):
            if size:
                image.draft(None, (4 * size, 4 * size))
            pixels = image.width * image.height * max(1, (size or 1) / min(image.size)) ** 2  # if it is to be enlarged
            if pixels > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS:,} in memory")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") and np.asarray(image).max() > 255:  # 16 bits; convert() would clip them
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise UserError(f"{photo} does not exist.", 2) from None
    except Exception as error:  # on a broken file Pillow's decoders raise whatever they stumble over
        why = "unknown format: save it as JPEG" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{photo} cannot be read as an image ({why}).") from None


# Pictures


def as_picture(image):
    """Image (C, H, W) in [0, 1] -> PIL image, grey where C is 1."""
    return to_pil_image((image * 255).round().byte())


def save_grid(images, path, columns):
    """Save images (B, C, H, W) in [0, 1] as one picture, 2 pixels apart, in the format of the path's ending."""
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=1)
    save_picture([as_picture(grid[: images.shape[1]])], path)  # make_grid has made three channels of one


def save_picture(frames, path):
    """Save PIL images as one picture, which is animated if there are several.

    Raises UserError where the format has no room for so large a picture, or the file cannot be written.
    """
    first, *others = frames
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MADE_HERE
    options = {"quality": 95, "exif": exif, "comment": MADE_HERE}  # a GIF has comments only
    if others:  # lossless, as a lossy WebP drops frames that differ little
        options |= {"save_all": True, "append_images": others, "duration": 100, "loop": 0, "lossless": True}
    with atomic_write(path) as file:
        try:
            first.save(file, Image.registered_extensions()[Path(path).suffix.lower()], **options)
        except (LookupError, ValueError, OSError) as error:  # of no such format, WebP and JPEG
            raise UserError(f"{path} cannot hold {first.width}x{first.height} pixels ({error}).") from None


def is_made_here(path):
    """Whether a file is a picture of save_picture, which another may replace."""
    try:
        with warnings.catch_warnings(action="ignore"), open_photo(path) as image:
            marks = image.getexif().get(ExifTags.Base.Software), image.info.get("comment")
    except Exception:  # no picture, or a broken one, but somebody's file all the same
        return False
    return MADE_HERE in marks or MADE_HERE.encode() in marks


def latent_noise(seed, count, latent_dim):
    """Standard normal noise (count, latent_dim); row k depends on (seed, k) alone, on any device."""
    rows = [np.random.default_rng((seed, k)).standard_normal(latent_dim, dtype=np.float32) for k in range(count)]
    return torch.from_numpy(np.stack(rows))


# Files
@contextmanager
def partial_file(path, size):
    """Yield a path beside `path` to write to; it takes the place of `path` only when the block ends well.

    Raises UserError, which tells of the `size` of the file in bytes, where the system does not let it be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # or after a power cut there might be the name without the contents
        os.replace(partial, path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be written ({why}): it takes {size / 1e6:,.2f} MB.") from None
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def atomic_write(path):
    """Yield a file in memory; when the block ends well it takes the place of the file at `path`, whole or not at all.

    Raises UserError where the system does not let it be written.
    """
    file = io.BytesIO()
    yield file
    with partial_file(path, file.getbuffer().nbytes) as partial:
        partial.write_bytes(file.getbuffer())


# Checkpoints
def save_checkpoint(path, model, half=False, **info):
    """Write a model and `info` (tensors and plain Python types) to a file that rebuilds the model by itself.

    With `half`, the parameters are kept in 16 bits, for half the file and the same pictures; what was measured
    (BatchNorm's statistics, the prior) is not. Raises UserError where a weight is not finite, or the file cannot be
    written; a file at `path` then stays.
    """
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        state_dict |= {name: state_dict[name].half() for name, _ in model.named_parameters()}
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} is no longer finite, so {path} has not been written.")
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    with atomic_write(path) as file:
        torch.save({"config": model.config, "state_dict": state_dict, "versions": versions, **info}, file)


def load_checkpoint(path, device="cpu"):
    """Return (model in eval mode on `device`, info) from a file of save_checkpoint or of the model's forerunners.

    Those are a bare state dict and a pickled whole module `vae.VAE`; their info is empty. Nothing that a file holds is
    ever called. Raises UserError where the file is none of these, damaged or missing.
    """
    try:
        info = read_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: `python train.py` makes a checkpoint.", 2) from None
    except Exception as error:  # torch.load raises whatever its zip reader and its unpickler stumble over
        raise UserError(f"{path} is not a checkpoint: it {what_is_wrong(path, error)}.") from None
    try:
        if isinstance(info, Shell):
            info = {"state_dict": weights_of(info), "config": vars(info).get("config")}
        info = dict(info) if "state_dict" in info else {"state_dict": info}
        state_dict = dict(info.pop("state_dict"))
        if sum(weight.nbytes for weight in state_dict.values()) > os.path.getsize(path):
            raise ValueError("its weights take more memory than the file")
        with torch.device("meta"):  # as large as the file may say, for such weights take no memory
            model = VAE(**info.pop("config", None) or infer_config(state_dict))
        load_weights(model, state_dict)
    except Exception as error:  # whatever else the file holds, it is not what a VAE is made of
        raise UserError(f"{path} does not hold the weights of a VAE of this kind ({error}).") from None
    return model.to(device).eval(), info


class Shell(nn.Module):
    """What stands for the model and each of its layers in a pickled module: it has their weights, not their methods."""


def read_checkpoint(path):
    """Return what torch.save has written to a file: tensors, plain Python types and, in place of layers, Shells."""
    data = Path(path).read_bytes()
    if data.startswith(b"PK\3\4"):  # as torch.load tells a zip archive from the format before PyTorch 1.6
        data = verified(data)
    layers = [nn.Sequential, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Linear, nn.Sigmoid]
    shells = [(Shell, f"{layer.__module__}.{layer.__name__}") for layer in layers]
    with torch.serialization.safe_globals([(Shell, "vae.VAE"), *shells]), warnings.catch_warnings(action="ignore"):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def verified(data):
    """Copy a zip archive (bytes), so that torch.load, which looks at no checksum, reads what has been checked."""
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copy, "w") as checked:
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("torch.save compresses nothing, but a bomb would")
        for name in dict.fromkeys(archive.namelist()):
            try:
                checked.writestr(name, archive.read(name))
            except Exception:  # of the checksum, the compression, the encryption
                raise zipfile.BadZipFile from None
    return copy.getvalue()


def what_is_wrong(path, error):
    """Say of a file in a few words why `error` came up when it was read as a checkpoint."""
    if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
        return f"asks for {unsafe[1]}, and nothing in a file is ever called"
    if isinstance(error, OSError) and error.filename:  # else it is about what was read
        return f"cannot be read ({error.strerror})"
    with open(path, "rb") as file:
        head = file.read(100)
    if not head:
        return "is empty"
    if head.startswith(b"PK"):
        damaged = isinstance(error, (zipfile.BadZipFile, OSError))
        return "is damaged or cut short" if damaged else "is a zip archive that torch.save has not written"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, and `git lfs pull` fetches the file that it stands for"
    text = not re.search(rb"[^\t\n\r -~\x80-\xff]", head)
    return "is a text file" if text else "is in no format that can be read safely"


def weights_of(shell):
    """Return the state dict of a pickled module, found without a call of anything that came with it."""
    layers = {f"{path}.".lstrip("."): vars(layer) for path, layer in shell.named_modules()}
    weights = {path: layer["_parameters"] | layer["_buffers"] for path, layer in layers.items()}
    return {path + name: weight for path in weights for name, weight in weights[path].items()}


def load_weights(model, state_dict):
    """Give a model on the meta device the weights of a state dict, in float32; the prior may be missing.

    Raises ValueError at the first name or shape that differs and at weights that are not finite.
    """
    expected = model.state_dict()
    if "latent_mean" not in state_dict and "latent_scale" not in state_dict:
        latent_dim = len(expected["latent_mean"])
        state_dict |= {"latent_mean": torch.zeros(latent_dim), "latent_scale": torch.eye(latent_dim)}
    for name in expected | state_dict:
        found = tuple(state_dict[name].shape) if name in state_dict else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise ValueError(f"{name} is {found} in the file and {wanted} in the model")
        if not torch.can_cast(state_dict[name].dtype, expected[name].dtype):
            raise ValueError(f"{name} is of {state_dict[name].dtype}")
        state_dict[name] = state_dict[name].to(expected[name].dtype)
        if not state_dict[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    model.load_state_dict(state_dict, assign=True)


def infer_config(state_dict):
    """Read the arguments of a VAE off the shapes of its weights; of the image sizes that fit, IMAGE_SIZE goes first."""
    for name in ("encoder.0.0.weight", "fc_mu.weight"):
        if name not in state_dict:
            raise ValueError(f"it has no {name}, but {', '.join(map(str, list(state_dict)[:3]))} and so on")
    stages = [weight for name, weight in state_dict.items() if re.fullmatch(r"encoder\.\d+\.0\.weight", name)]
    latent_dim, features = state_dict["fc_mu.weight"].shape
    hidden_dims = [len(weight) for weight in stages]
    side, scale = math.isqrt(features // hidden_dims[-1]), 2 ** len(hidden_dims)
    image_size = IMAGE_SIZE if math.ceil(IMAGE_SIZE / scale) == side else side * scale
    channels = stages[0].shape[1]
    return {"image_size": image_size, "channels": channels, "hidden_dims": hidden_dims, "latent_dim": latent_dim}


# Scripts: constants as flags, errors as sentences
class UserError(ValueError):
    """A sentence for the person at the keyboard, and the script's exit code: 2 for a setting that cannot be, else 1."""

    def __init__(self, sentence, code=1):
        super().__init__(printable(sentence))
        self.code = code


def printable(text):
    """Return (the first 2,000 characters of) a text as one line: what cannot be seen becomes its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:2000])


def require(holds, name, value, wanted):
    """Raise UserError where the constant `name` cannot be `value`."""
    if not holds:
        raise UserError(f"{name} is {reprlib.repr(value)}: it must be {wanted}.", 2)


def explanation(error):
    """Return what to tell the user of an error that they can mend, or None."""
    if isinstance(error, (UserError, OSError)):
        return error
    scarce = "can't allocate memory|could not create a primitive|bad_alloc"  # as PyTorch, oneDNN and C++ say it
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(scarce, str(error)):
        return "There is too little memory: lower BATCH_SIZE, IMAGE_SIZE or HIDDEN_DIMS."
    if "DataLoader worker" in str(error):
        return "A process that decodes photos has been ended from outside: is memory short?"
    if isinstance(error, distributed.DistError) or "gloo" in str(error):
        return "Another process of the run has ended; --resume takes up its last whole epoch."


def script(main):
    """Decorate a script's main: what the user can mend ends it with one line on stderr and an exit code.

    Constants that flags change get their values back at the end, so that each call starts from those in the script.
    """

    names = inspect.unwrap(main).__globals__  # main may have other decorators

    @functools.wraps(main)
    def run(argv=None):
        constants = {name: value for name, value in names.items() if name.isupper()}
        before = signal.getsignal(signal.SIGTERM)
        with suppress(AttributeError):  # of a notebook, which prints everything anyway
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        with suppress(ValueError):  # of other threads, which get no signals
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clears half files away
        try:
            main(argv)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if not (sentence := explanation(error)):
                raise
            everywhere = isinstance(error, UserError) or "Another process" in str(sentence)
            first = not distributed.is_initialized() or distributed.get_rank() == 0
            if first or not everywhere:  # else process 0 says the same
                print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
            raise SystemExit(getattr(error, "code", 1)) from None
        finally:
            names.update(constants)
            with suppress(ValueError, TypeError):
                signal.signal(signal.SIGTERM, before)

    return run


def flag(name):
    """Return the flag of the constant of this name: --output-dir for OUTPUT_DIR."""
    return f"--{name.lower().replace('_', '-')}"


def override_constants(constants, argv=None):
    """Set a script's `constants`, its globals(), from flags of their names, and return them as a dict.

    Name, type and default of a flag are those of an UPPERCASE constant, its help is the comment beside it, in the
    script or in this file. Other flags, and values of another type, end the script with its usage and exit code 2.
    Raises UserError where the value in the script is itself of another type.
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows the defaults, and the docstring as it is."""

    kinds = {  # annotation: (types of the value, what they are called, options of the flag)
        int: ([int], "a whole number", {"type": int}),
        float: ([int, float], "a number", {"type": float}),
        str: ([str], "a text in quotes", {"type": os.path.expanduser}),
        bool: ([bool], "True or False", {"action": argparse.BooleanOptionalAction}),
        list: ([list], "a list of whole numbers", {"type": int, "nargs": "+"}),
    }
    modules = [sys.modules[__name__], sys.modules[constants["__name__"]]]
    source = "\n".join(map(inspect.getsource, modules))
    comments = dict(re.findall(r"^([A-Z_0-9]+)\b.*?=.*?#\s*(.*)$", source, re.MULTILINE))
    annotations = {name: kind for module in modules for name, kind in inspect.get_annotations(module).items()}
    parser = argparse.ArgumentParser(description=constants["__doc__"], formatter_class=Formatter, allow_abbrev=False)
    for name, value in constants.items():
        kind = annotations.get(name, type(value))  # where the annotation was edited away, the value tells
        kind = typing.get_origin(kind) or kind
        if name.isupper() and kind in kinds:
            types, called, options = kinds[kind]
            require(type(value) in types, name, value, called)
            comment = comments.get(name, "").replace("%", "%%")
            parser.add_argument(flag(name), dest=name, default=value, help=comment, **options)
    settings = vars(parser.parse_args(argv))
    constants.update(settings)
    return settings


# Devices
def pick_device(name):
    """Return the torch.device `name`; "auto" is CUDA if available, else the CPU. Raises UserError where it fails."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # there are devices that hold no values
        return probe.device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f'DEVICE is {name!r}, which does not work here: it is best left at "auto".', 2) from None
