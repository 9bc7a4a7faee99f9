"""How fast the scripts are on this machine, beside the training loop that people write first.

    python tests/benchmark.py                       # on drawn faces
    python tests/benchmark.py --photos FOLDER       # on photos; every constant below is a flag
    python tests/benchmark.py --quality             # time to a good picture
    python tests/benchmark.py --peers               # also pythae and Lightning (pip install both): 10 minutes

"plain" is float32 in PyTorch's own memory layout, batches of 16, every JPEG decoded in the loop in every epoch, Adam at
a constant 1e-3, squared error + 0.132 KL (at 150 pixels), and loss.item() after every step. "ours" are the functions of
train.py. The peers have plain's batches, optimizer and precision, but photos in memory, and pythae a loss of its own.
All train the VAE of vae.py, each in a process of its own. They work in turns, each from cold caches, and figures are
medians of all rounds after the first.

--quality runs plain and train.py once each and prints the seconds until the validation PSNR of train.py is what plain
has after EPOCHS epochs, with validation; those of train.py include the start of Python, decoding and all pictures.
"""

import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stdout, suppress
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from faces import draw_face
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import train
import vae
from data.cache import decode_photos
from data.photos import find_photos
from vae import HIDDEN_DIMS, IMAGE_SIZE, UserError, require

QUALITY: bool = False  # measure the time to a good picture instead
PEERS: bool = False  # measure pythae and Lightning, too
PHOTOS: str = ""  # folder of photos; without one, faces are drawn
COUNT: int = 512  # photos in an epoch of ours; raise it to 20480 on a GPU, where these are over in no time
CACHED: int = 12_000  # photos that are decoded into the cache
BATCH_SIZE: int = 32  # photos in a step of ours; raise it to 256 on a GPU
MATRIX: int = 2048  # side of the matrices that are multiplied; raise it to 8192 on a GPU
COMPILE: str = "auto"  # as in train.py
DEVICE: str = "auto"  # "auto", "cuda" or "cpu"
ROUNDS: int = 7  # repetitions after the first, which alone counts if there are none
EPOCHS: int = 5  # of QUALITY: those of plain


# Processes that work in turns
def serve(pipe, rounds, settings):
    """Answer every request with what the generator `rounds` yields next; an error is printed and ends the process."""
    sys.stdout = sys.stderr  # what train.py prints is not part of the result
    globals().update(settings)
    vars(train).update(settings)
    with suppress(EOFError, KeyboardInterrupt):  # the asker is gone, or tells
        pipe.recv()
        for figures in rounds():
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
            memory = torch.cuda.max_memory_allocated() or resident  # 0 unless it computes there
            pipe.send(figures | {f"{rounds.__name__}, peak memory, MB": memory / 1e6})
            pipe.recv()


def worker(rounds, settings):
    """Yield the figures of the generator `rounds`, which works in a process of its own."""
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, rounds, settings), daemon=True).start()
    there.close()
    while True:
        try:
            here.send("next")
            yield here.recv()
        except (EOFError, OSError):
            raise UserError(f"The process that measures `{rounds.__name__}` has failed, see above.") from None


def in_turns(*parts):
    """Ask all generators for figures {name: number}, ROUNDS + 1 times; return medians of the rounds after the first."""
    turns = zip(range(ROUNDS + 1), *parts, strict=False)
    rounds = [{name: figure for part in turn for name, figure in part.items()} for _, *turn in turns]
    return {name: statistics.median(figures[name] for figures in rounds[min(1, ROUNDS) :]) for name in rounds[0]}


def seconds(function, *arguments):
    """Call a function and return how long it took, the work of the GPU included."""
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# What is measured, and on what
def put_photos(folder):
    """Put photos into folders in `folder`: links to those of PHOTOS, over again if need be, or to drawn faces."""
    sources = [photo.path.absolute() for photo in find_photos(PHOTOS) if photo.member is None] if PHOTOS else []
    require(Path(PHOTOS).is_dir() and (sources or not PHOTOS), "PHOTOS", PHOTOS, "a folder with photos")
    require(not QUALITY or len(sources or range(2048)) >= COUNT, "COUNT", COUNT, "at most the number of the photos")
    for seed in range(0 if PHOTOS else min(COUNT, 2048)):
        sources.append(folder / f"{seed}.jpg")
        draw_face(seed, size=(178, 218)).save(sources[-1], quality=95)
    for name, count in {"photos": COUNT, "to cache": 0 if QUALITY else CACHED}.items():
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.jpg").symlink_to(sources[number % len(sources)])


def new_vae():
    """Return the VAE of vae.py in PyTorch's own memory layout, and with its momentum of BatchNorm, which suits Adam."""
    model = vae.VAE(IMAGE_SIZE, hidden_dims=HIDDEN_DIMS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


def decode(photos):
    """Decode Photos into images (B, 3, H, W), as people write it first."""
    transform = Compose([vae.square_transform(IMAGE_SIZE), ToTensor()])
    return torch.stack([transform(Image.open(photo.path).convert("RGB")) for photo in photos])


def plain_loss(model, images):
    """Return the loss of images (B, C, H, W), as a mean over their values."""
    recon, mu, log_var = model(images)
    return nn.functional.mse_loss(recon, images) + 0.00025 * train.kl_divergence(mu, log_var).mean()


def plain_epoch(model, optimizer, batches):
    """Train a model on batches of Photos, in the loop that people write first."""
    for photos in batches:
        loss = plain_loss(model, decode(photos).to(model.latent_mean.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def plain():
    """A round of plain is an epoch of 256 photos."""
    model = new_vae().to(vae.pick_device(DEVICE))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    photos = find_photos("photos")[:256]
    batches = [photos[start : start + 16] for start in range(0, len(photos), 16)]
    while True:
        yield {"plain, images/s": len(photos) / seconds(plain_epoch, model, optimizer, batches)}


def pythae():
    """The VAE and the BaseTrainer of pythae: a round is an epoch of 256 photos."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def forward(self, images):
            mu, log_var = self.network.encode(images)
            return ModelOutput(embedding=mu, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def forward(self, z):
            return ModelOutput(reconstruction=self.network.decode(z))

    encoder, decoder = Encoder(), Decoder()
    encoder.network = decoder.network = new_vae()
    photos = find_photos("photos")[:256]
    config = BaseTrainerConfig("pythae", per_device_train_batch_size=16, learning_rate=1e-3, no_cuda=DEVICE == "cpu")
    data = BaseDataset(decode(photos), torch.zeros(len(photos)))
    trainer = BaseTrainer(VAE(VAEConfig(), encoder, decoder), data, training_config=config)
    trainer.prepare_training()
    while True:
        yield {"pythae, images/s": len(photos) / seconds(trainer.train_step, 1)}


def lightning():
    """A LightningModule and the Trainer of Lightning: a round is an epoch of 256 photos."""
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import Timer

    class Module(LightningModule):
        def training_step(self, batch):
            return plain_loss(self.network, batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_end(self):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the timer does not wait for the GPU

    module = Module()
    module.network = new_vae()
    images = decode(find_photos("photos")[:256])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    while True:
        timer = Timer()
        trainer = Trainer(max_epochs=1, accelerator=vae.pick_device(DEVICE).type, devices=1, callbacks=[timer], **quiet)
        trainer.fit(module, DataLoader(images, 16, shuffle=True))
        yield {"lightning, images/s": len(images) / timer.time_elapsed()}


def ours():
    """The functions of train.py: a round is an epoch of COUNT photos, less those held out."""
    train.reuse_freed_memory()
    run = train.new_run({}, train.set_up_device())
    while True:
        vars(run).update(step=0, seconds=0.0)
        yield {"ours, images/s": train.train_epoch(run) / run.seconds}


def products():
    """Products of square matrices in the precision of ours, of which the machine cannot make more."""
    device = train.set_up_device()
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=train.precision(device))
    while True:
        fastest = min(seconds(torch.mm, matrix, matrix) for _ in range(5))
        yield {"matrix products, GFLOP/s": 2e-9 * MATRIX**3 / fastest}


def caching():
    """Decoding into the cache, on one core, which is that of this process, and on all."""
    photos = find_photos("to cache")
    cut = {"channels": 3, "size": IMAGE_SIZE}
    while True:
        one = seconds(decode_photos, photos, Path("cache"), cut, 0)
        more = seconds(decode_photos, photos, Path("cache"), cut, torch.get_num_threads())
        yield {"cache on 1 core, photos/s": CACHED / one, "cache on all cores, photos/s": CACHED / more}


def starting():
    """`python genpic.py` against what any script with its checkpoint has to do."""
    vae.save_checkpoint(genpic.CHECKPOINT, new_vae(), face_box=train.FACE_BOX)
    photo = Path(genpic.__file__).with_name("data") / "tested_data/sample.jpg"
    bare = ["-c", f"import torch, torchvision; torch.load({genpic.CHECKPOINT!r}, weights_only=True)"]
    whole = [genpic.__file__, "--device", DEVICE, "--image", str(photo)]
    while True:
        yield {"imports and checkpoint, s": seconds(run_python, bare), "genpic.py, s": seconds(run_python, whole)}


def run_python(arguments):
    """Run Python to its end; raises UserError if it fails."""
    if subprocess.run([sys.executable, *arguments], stdout=sys.stderr).returncode:
        raise UserError(f"{arguments[0]} has failed, see above.")


def arithmetic():
    """Return the GFLOP of a training step for each image, in the convolutions."""
    with FlopCounterMode(display=False) as counter:
        plain_loss(new_vae(), torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)).backward()
    operations = counter.get_flop_counts()["Global"]
    return sum(flop for name, flop in operations.items() if "convolution" in str(name)) / 2e9


def rates(settings):
    """Return the figures of all that work in turns, and their ratios."""
    trainers = [plain, ours] + [pythae, lightning] * PEERS
    figures = in_turns(*(worker(trainer, settings) for trainer in trainers), products(), caching(), starting())
    pairs = [("ours", other.__name__, "images/s") for other in [plain, pythae, lightning][: 1 + 2 * PEERS]]
    pairs += [("cache on all cores", "cache on 1 core", "photos/s"), ("genpic.py", "imports and checkpoint", "s")]
    for one, other, unit in pairs:
        figures[f"{one} / {other}"] = figures[f"{one}, {unit}"] / figures[f"{other}, {unit}"]
    figures["arithmetic, GFLOP/image"] = arithmetic()
    rate = figures["ours, images/s"] * figures["arithmetic, GFLOP/image"]
    figures["arithmetic of ours / matrix products"] = rate / figures["matrix products, GFLOP/s"]
    return figures


# Time to quality
def quality():
    """Return how long plain takes to the validation PSNR that it has after EPOCHS epochs, and how long train.py."""
    slow = timed("plain", plain_epochs())
    mark = slow[-1][1]
    fast = timed("ours", ours_epochs(), mark)
    if fast[-1][1] < mark:
        raise UserError(f"train.py has ended with {fast[-1][1]} dB, and plain with {mark} dB: raise COUNT.")
    slow = [row for number, row in enumerate(slow) if all(psnr < mark for _, psnr in slow[:number])]
    figures = {"validation PSNR, dB": mark, "plain, s": slow[-1][0], "ours, s": fast[-1][0]}
    return figures | {"plain / ours": slow[-1][0] / fast[-1][0], "plain, epochs": len(slow), "ours, epochs": len(fast)}


def timed(name, epochs, mark=math.inf):
    """Return (seconds, PSNR) of each epoch of a generator, to the first that has the mark."""
    rows = []
    begin = time.perf_counter()
    for psnr in epochs:
        rows.append((time.perf_counter() - begin, round(psnr, 2)))
        print(f"{name}, {rows[-1][0]:.1f} s: {rows[-1][1]:.2f} dB", flush=True)
        if psnr >= mark:
            break
    return rows


def plain_epochs():
    """Train in the loop that people write first; yield the PSNR after each epoch."""
    run = train.new_run({}, vae.pick_device(DEVICE))
    model = run.average = new_vae().to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    photos = find_photos("photos")
    train.AMP = False
    for _ in range(EPOCHS):
        model.train()
        batches = run.train_set[torch.randperm(len(run.train_set))].split(16)
        plain_epoch(model, optimizer, ([photos[index] for index in batch] for batch in batches))
        model.eval()
        yield train.validate(run)[0]["val_psnr"]


def ours_epochs():
    """Run train.py; yield the PSNR after each epoch."""
    Path("ours").mkdir()  # has a cache of its own
    names = ("IMAGE_SIZE", "BATCH_SIZE", "COMPILE", "DEVICE")
    flags = [f"--{name.lower().replace('_', '-')}={getattr(train, name)}" for name in names]
    flags += [f"--beta={0.132 * (IMAGE_SIZE / 150) ** 2}", "--hidden-dims", *map(str, HIDDEN_DIMS)]
    command = [sys.executable, train.__file__, *flags, "--data", str(Path("photos").absolute())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="ours")
    try:
        for line in process.stdout:
            if found := re.match(r"Epoch .* PSNR (\S+) dB", line):
                yield float(found[1])
        if process.wait():
            raise UserError("train.py has failed, see above.")
    finally:
        process.kill()  # at SIGTERM it would say that it stops
        process.wait()


def main(argv=()):
    """Measure, and print a line per figure."""
    with vae.flags(globals(), argv) as (settings, _):
        measure(settings | {"DATA": "photos"})


def measure(settings):
    """Measure with the constants in `settings`, and print a line per figure."""
    vars(train).update(settings)
    train.check_settings()
    require(2 * BATCH_SIZE <= COUNT, "COUNT", COUNT, f"at least {2 * BATCH_SIZE}, two batches")
    for peer in ("pythae", "lightning") * PEERS:
        require(find_spec(peer), "PEERS", PEERS, f"False, as {peer} is missing: `pip install pythae lightning`")
    with tempfile.TemporaryDirectory() as folder:
        put_photos(Path(folder))
        with chdir(folder), redirect_stdout(sys.stderr):
            usable = len(train.new_run({}, torch.device("cpu")).pixels)  # writes the cache
            require(usable == COUNT, "PHOTOS", PHOTOS, "a folder of photos that can all be read")
            figures = quality() if QUALITY else rates(settings)
    for name, figure in figures.items():
        print(f"{name:50} {figure:10.3f}")


if __name__ == "__main__":
    vae.run_script(main)
