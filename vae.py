"""A convolutional variational autoencoder (VAE) for photos of faces, and code shared by train.py and genpic.py."""

import argparse
import functools
import inspect
import io
import math
import os
import re
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# Model size. Checkpoints store these four values, and genpic.py reads them from there.
IMAGE_SIZE: int = 150  # side of the square pictures in pixels, at least 16; training time grows with the square of it
CHANNELS: int = 3  # 3 for colour, 1 for grey
LATENT_DIM: int = 128  # size of the latent code; a smaller code gives less detail but smoother interpolations
HIDDEN_DIMS: list[int] = [32, 64, 128, 256, 512]  # channels of each encoder stage; each stage halves the side


def square_transform(size):
    """Return a transform that scales a PIL image or tensor (..., H, W) and crops its centre to size x size."""
    return Compose([Resize(size), CenterCrop(size)])


celeb_transform1 = square_transform(IMAGE_SIZE)
celeb_transform = Compose([celeb_transform1, ToTensor()])  # PIL image -> tensor (C, H, W) in [0, 1]


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114) with strided convolutions.

    Images are (B, channels, image_size, image_size) in [0, 1], codes (B, latent_dim). Published checkpoints depend on
    the names in the state dict.
    """

    def __init__(self, image_size=IMAGE_SIZE, channels=CHANNELS, hidden_dims=HIDDEN_DIMS, latent_dim=LATENT_DIM):
        super().__init__()
        self.config = dict(image_size=image_size, channels=channels, hidden_dims=[*hidden_dims], latent_dim=latent_dim)
        side = math.ceil(image_size / 2 ** len(hidden_dims))  # each stage rounds up: 150 -> 75 -> 38 -> 19 -> 10 -> 5
        self.feature_shape = (hidden_dims[-1], side, side)
        up = hidden_dims[::-1]
        decoder_stage = functools.partial(stage, nn.ConvTranspose2d, output_padding=1)
        self.encoder = nn.Sequential(*map(functools.partial(stage, nn.Conv2d), [channels, *hidden_dims], hidden_dims))
        self.fc_mu = nn.Linear(math.prod(self.feature_shape), latent_dim)
        self.fc_var = nn.Linear(math.prod(self.feature_shape), latent_dim)
        self.decoder_input = nn.Linear(latent_dim, math.prod(self.feature_shape))
        self.decoder = nn.Sequential(*map(decoder_stage, up, up[1:]))
        self.final_layer = nn.Sequential(*decoder_stage(up[-1], up[-1]), nn.Conv2d(up[-1], channels, 3, padding=1))
        self.face_box = None  # left, top and size of the face in its pictures, as fractions of the side, if known
        self.directions = {}  # names of attributes, and the (L,) that changes each by one unit when added to a code
        self.register_buffer("latent_mean", torch.zeros(latent_dim))  # of the prior: N(0, I) before `fit_prior`
        self.register_buffer("latent_scale", torch.eye(latent_dim))

    def encode(self, x):
        """Images (B, C, H, W) -> mean and log-variance of the posterior q(z|x), (B, L) each, in float32."""
        features = self.encoder(x).flatten(1)
        return self.fc_mu(features).float(), F.hardtanh(self.fc_var(features).float(), -20, 10)  # keeps exp() finite

    def reparameterize(self, mu, log_var):
        """Draw z ~ N(mu, exp(log_var)), (B, L), as eps * std + mu, so that gradients reach mu and log_var."""
        return torch.randn_like(mu) * torch.exp(0.5 * log_var) + mu

    def decode(self, z):
        """Codes (B, L) -> images (B, C, H, W) in [0, 1], in float32."""
        features = self.decoder(self.decoder_input(z).unflatten(1, self.feature_shape))
        logits = self.final_layer(features)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 has no values between 0.996 and 1
            decoded = torch.sigmoid(logits.to(torch.float32, memory_format=torch.contiguous_format))
            return F.interpolate(decoded, self.config["image_size"], mode="bilinear", antialias=True)  # 160 -> 150

    def forward(self, x):
        """Images (B, C, H, W) -> (reconstructions of the same shape, mu (B, L), log_var (B, L)); z is sampled."""
        mu, log_var = self.encode(x)
        return self.decode(self.reparameterize(mu, log_var)), mu, log_var

    def draw_latents(self, eps):
        """Standard normal noise (B, L) -> codes (B, L) from the prior: latent_mean + latent_scale @ eps."""
        return self.latent_mean + eps @ self.latent_scale.T

    @torch.no_grad()
    def sample(self, n):
        """Decode `n` codes drawn from the prior -> images (n, C, H, W) in [0, 1]."""
        eps = torch.randn(n, len(self.latent_mean), device=self.latent_mean.device)
        return self.decode(self.draw_latents(eps))

    def fit_prior(self, mu, log_var):
        """Fit the Gaussian prior to the aggregate posterior of N photos, given their codes (N, L).

        The mixture of N Gaussians has the covariance Cov(mu) + diag(mean exp(log_var)) (law of total variance); 1e-6
        on the diagonal keeps it positive definite under rounding. Raises torch.linalg.LinAlgError if it still is not.
        """
        mu = mu.cpu().double()
        variance = log_var.cpu().double().exp().mean(0)
        covariance = torch.cov(mu.T, correction=0).reshape(mu.shape[1], -1) + torch.diag(variance + 1e-6)
        self.latent_mean.copy_(mu.mean(0))
        self.latent_scale.copy_(torch.linalg.cholesky(covariance))


def stage(convolution, inputs, outputs, **options):
    """Return nn.Conv2d (halves the sides, rounding up) or ConvTranspose2d (doubles them), BatchNorm and LeakyReLU."""
    layer = convolution(inputs, outputs, kernel_size=3, stride=2, padding=1, **options)
    layer.bias.requires_grad_(False)  # BatchNorm cancels it: its gradient is zero but still takes time to compute
    norm = nn.BatchNorm2d(outputs, momentum=0.3)  # a lower one lets the statistics lag behind Muon's large steps
    return nn.Sequential(layer, norm, nn.LeakyReLU(inplace=True))


def psnr(squared_error):
    """Peak signal-to-noise ratio in dB, given the mean squared error of values in [0, 1]."""
    return -10 * math.log10(max(squared_error, 1e-12))


# Checkpoints
def save_checkpoint(path, model, /, half=False, **info):
    """Save a model and `info` (tensors and plain Python types); `half` stores the parameters in 16 bits.

    Models wrapped by torch.compile or DataParallel are unwrapped. Raises UserError if a weight is not finite or the
    file cannot be written; an existing file is then left unchanged.
    """
    while inner := [child for name, child in model.named_children() if name in ("module", "_orig_mod")]:
        model = inner[0]
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        state_dict |= {name: state_dict[name].half() for name, _ in model.named_parameters()}
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} was not written: {name} is no longer finite (is LEARNING_RATE too high?).")
    content = {"config": model.config, "state_dict": state_dict, "face_box": model.face_box, **info}
    if model.directions:
        content |= {"attributes": [*model.directions], "directions": torch.stack([*model.directions.values()])}
    buffer = io.BytesIO()  # if the disk is full, torch.save itself raises all kinds of errors
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path, device="cpu", dtype=torch.float32):
    """Load a checkpoint; return the model, in eval mode on `device`, and the info saved with it.

    If `dtype` is None, the weights keep theirs. Older files, a state dict or a pickled `vae.VAE`, must be of the size
    that the constants above give. No code in a file is ever run. Raises UserError if it is missing or not valid.
    """
    content = read_checkpoint(path)
    try:
        if isinstance(content, nn.Module):
            content = content.state_dict()
        info = dict(content) if "state_dict" in content else {"state_dict": content}
        layout = torch.contiguous_format  # the file's tensors may share or repeat memory
        state_dict = {name: tensor.clone(memory_format=layout) for name, tensor in info.pop("state_dict").items()}
        state_dict = {re.sub(r"\b(module|_orig_mod)\.", "", name): tensor for name, tensor in state_dict.items()}
        with torch.device("meta"):  # allocates nothing, draws no random numbers: the file's tensors become the weights
            model = VAE(**info.pop("config", {}))
        state_dict.setdefault("latent_mean", torch.zeros(model.config["latent_dim"]))
        state_dict.setdefault("latent_scale", torch.eye(model.config["latent_dim"]))
        model.load_state_dict(state_dict, assign=True)
        model.face_box = box = info.get("face_box")
        if box and ([*map(type, box)] != [float] * 3 or not (sum(map(abs, box)) < 4 and box[2] > 0.01)):
            raise ValueError(f"invalid face_box {box!r}")
        names, rows = info.pop("attributes", []), info.pop("directions", torch.zeros(0, len(model.latent_mean)))
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not are_names or rows.shape != (len(names), len(model.latent_mean)) or not rows.isfinite().all():
            raise ValueError("invalid attributes or directions")
        model.directions = dict(zip(names, rows.float().to(device), strict=True))
        if not all(tensor.isfinite().all() for tensor in state_dict.values()):
            raise ValueError("a weight is not finite")
    except Exception as error:  # the file may contain anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not contain VAE weights that match its config or vae.py ({reason}).") from None
    return model.to(device=device, dtype=dtype).eval(), info


def read_checkpoint(path):
    """Return the contents of a torch.save file: tensors, plain types, modules; raises UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f"There is no checkpoint {path}: correct the path, or train one with `python train.py`.")
    layers = (nn.Sequential, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Linear, nn.Sigmoid)
    shells = [(nn.Module, f"{layer.__module__}.{layer.__name__}") for layer in layers]  # loads weights without methods
    try:
        if zipfile.is_zipfile(path):  # torch.load ignores checksums and makes up contents for folders
            archive = zipfile.ZipFile(path)
            if archive.testzip() or any(entry.external_attr & 16 for entry in archive.infolist()):
                raise ValueError
        with torch.serialization.safe_globals([(nn.Module, "vae.VAE"), *shells]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # zipfile and the unpickler raise all kinds of errors for a broken file
        raise UserError(f"{path} is damaged or is not a checkpoint of tensors and plain Python types.") from None


# Pictures and files
def to_picture(image):
    """Image (C, H, W) in [0, 1] -> PIL image, grey if C is 1."""
    return to_pil_image((image * 255).round().byte())


def save_grid(images, path, columns):
    """Save images (B, C, H, W) in [0, 1] as a grid with 2-pixel gaps; raises UserError if it cannot be written."""
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=1)
    save_picture(to_picture(grid[: images.shape[1]]), path)  # make_grid turns one channel into three


def save_picture(picture, path, **options):
    """Save a PIL image in the format of the path's extension; raises UserError if it is too large or not writable."""
    with atomic_write(path) as file:
        try:
            kind = Image.registered_extensions()[Path(path).suffix.lower()]
            picture.save(file, kind, quality=95, compress_level=1, **options)  # PNG: 8 times as fast, 13% larger
        except (KeyError, ValueError) as error:  # an unknown format, or a side too long for WebP
            raise UserError(f"{path} cannot be written ({error}).") from None


def latent_noise(model, count, seed):
    """Return N(0, I) noise (count, L) for a VAE, the same on all devices; a larger count only adds rows."""
    noise = np.random.default_rng(seed).standard_normal((count, model.config["latent_dim"]), dtype=np.float32)
    return torch.from_numpy(noise).to(model.latent_mean.device)


@contextmanager
def atomic_write(path):
    """Yield a binary file that replaces the one at `path` if the block succeeds; raises UserError if it cannot."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave an empty file
        os.replace(partial, path)
    except BrokenPipeError:  # from a print() in the block
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).strip().rpartition("\n")[2]  # worker processes send tracebacks
        raise UserError(f"{path} cannot be written ({reason}).") from None
    finally:
        with suppress(OSError):
            partial.unlink()


# Scripts: error messages, flags, device
FLAG_KINDS = {
    str: {"type": os.path.expanduser},
    bool: {"action": argparse.BooleanOptionalAction},
    list[int]: {"type": int, "nargs": "+"},
    float | None: {"type": float},
}


class UserError(ValueError):
    """A one-line error message for the user: what is wrong and how to fix it."""


def require(valid, name, value, wanted):
    """Raise UserError, saying what the constant `name` must be, unless its value is valid."""
    if not valid:
        raise UserError(f"{name} is {value!r}: it must be {wanted}.")


def run_script(main):
    """Call main with the command-line flags; print a UserError as one line and exit with code 1."""
    name = Path(sys.argv[0]).name
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain characters that the terminal cannot show
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # rank 0 reports what all ranks run into; torchrun then ends the others
        sys.exit(f"{name}: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"{name}: Memory ran out: lower BATCH_SIZE or IMAGE_SIZE, or use --device cpu if the GPU ran out.")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe, as in `python train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the final flush would fail
        sys.exit(1)


@contextmanager
def flags(constants, argv):
    """Within the block, set the annotated `constants` (a script's globals()) from `argv`; yield all and those given."""
    modules = [sys.modules[__name__], sys.modules[constants["__name__"]]]
    source = "\n".join(map(inspect.getsource, modules))
    comments = dict(re.findall(r"^([A-Z_0-9]+)\b.*?=.*?#\s*(.*)$", source, re.MULTILINE))
    kinds = {name: kind for module in modules for name, kind in inspect.get_annotations(module).items()}
    earlier = {name: constants[name] for name in constants if name in kinds}
    layout = argparse.RawDescriptionHelpFormatter  # prints the docstring as it is
    parser = argparse.ArgumentParser(description=constants["__doc__"], formatter_class=layout, allow_abbrev=False)
    for name, value in earlier.items():
        flag = f"--{name.lower().replace('_', '-')}"  # --output-dir for OUTPUT_DIR
        text = f"{comments.get(name, '')} (default: {value})".replace("%", "%%")
        kind = FLAG_KINDS.get(kinds[name], {"type": kinds[name]})
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    constants.update(given)
    try:
        yield earlier | given, given
    finally:
        constants.update(earlier)


def pick_device(name):
    """Return the torch.device `name`; "auto" is CUDA if available, else the CPU. Raises UserError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f'DEVICE is {name!r}, which is not available on this machine; "auto" always works.') from None
