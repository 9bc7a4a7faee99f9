"""Measure how fast the scripts are on this machine, compared with a naive training loop.

    python tests/benchmark.py                       # on drawn faces
    python tests/benchmark.py --photos FOLDER       # on photos; every constant below is a flag
    python tests/benchmark.py --quality             # time to reach a given quality
    python tests/benchmark.py --peers               # also pythae and Lightning (pip install both): 10 minutes

"plain" uses float32, PyTorch's default memory layout, batches of 16 and Adam with a constant learning rate of 1e-3. Its
loss is squared error + 0.132 KL (at 150 pixels). It decodes every JPEG again in every epoch and calls loss.item() after
every step. "ours" uses the functions of train.py. The peers use plain's batches, optimizer and precision but keep the
photos in memory, and pythae uses its own loss. All train the VAE of vae.py, each in its own process. They take turns,
each starting with cold caches, and the results are medians of all rounds after the first.

--quality runs plain and train.py once each and prints how many seconds each takes to reach the validation PSNR that
plain has after EPOCHS epochs. Both times include validation; train.py's also includes starting Python, decoding and
drawing all pictures.
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
from torchvision.transforms import Compose, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import train
import vae
from data.cache import decode_photos
from data.photos import find_photos
from vae import HIDDEN_DIMS, IMAGE_SIZE, UserError, require

QUALITY: bool = False  # measure the time to reach plain's final quality instead
PEERS: bool = False  # measure pythae and Lightning, too
PHOTOS: str = ""  # folder of photos; if empty, faces are drawn
COUNT: int = 512  # photos per epoch of ours; raise it to 20480 on a GPU, where 512 are too few to measure
CACHED: int = 12_000  # photos that are decoded into the cache
BATCH_SIZE: int = 32  # photos per step of ours; raise it to 256 on a GPU
COMPILE: str = "auto"  # as in train.py
DEVICE: str = "auto"  # "auto", "cuda" or "cpu"
ROUNDS: int = 7  # rounds after the first; with 0, the first one counts
EPOCHS: int = 5  # epochs of plain with QUALITY


# Processes that take turns
def serve(pipe, rounds, settings):
    """Answer each request with the next result of the generator `rounds`; print an error and end the process."""
    sys.stdout = sys.stderr  # keeps train.py's output out of the results
    globals().update(settings)
    vars(train).update(settings)
    with suppress(EOFError, KeyboardInterrupt):  # the parent process has ended, or Ctrl-C was pressed
        pipe.recv()
        for figures in rounds():
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
            memory = torch.cuda.max_memory_allocated() or resident  # the GPU's is 0 if it is not used
            pipe.send(figures | {f"{rounds.__name__}, peak memory, MB": memory / 1e6})
            pipe.recv()


def worker(rounds, settings):
    """Yield the results of the generator `rounds`, which runs in its own process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, rounds, settings), daemon=True).start()
    there.close()
    while True:
        try:
            here.send("next")
            yield here.recv()
        except (EOFError, OSError):
            raise UserError(f"The process that measures `{rounds.__name__}` failed; see the error above.") from None


def in_turns(*parts):
    """Collect results {name: number} from all generators, ROUNDS + 1 times; return medians, without the first round."""
    turns = zip(range(ROUNDS + 1), *parts, strict=False)
    rounds = [{name: figure for part in turn for name, figure in part.items()} for _, *turn in turns]
    return {name: statistics.median(figures[name] for figures in rounds[min(1, ROUNDS) :]) for name in rounds[0]}


def seconds(function, *arguments):
    """Call a function and return how many seconds it took, including GPU work."""
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Data and measurements
def put_photos(folder):
    """Fill subfolders of `folder` with links to the photos in PHOTOS, or to drawn faces, repeated as needed."""
    sources = [photo.path.absolute() for photo in find_photos(PHOTOS) if photo.member is None] if PHOTOS else []
    require(Path(PHOTOS).is_dir() and (sources or not PHOTOS), "PHOTOS", PHOTOS, "a folder with photos")
    require(not QUALITY or len(sources or range(2048)) >= COUNT, "COUNT", COUNT, "at most the number of photos")
    for seed in range(0 if PHOTOS else min(COUNT, 2048)):
        sources.append(folder / f"{seed}.jpg")
        draw_face(seed, size=(178, 218)).save(sources[-1], quality=95)
    for name, count in {"photos": COUNT, "to cache": 0 if QUALITY else CACHED}.items():
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.jpg").symlink_to(sources[number % len(sources)])


def new_vae():
    """Return the VAE of vae.py with PyTorch's default memory layout and BatchNorm momentum (which suits Adam)."""
    model = vae.VAE(IMAGE_SIZE, hidden_dims=HIDDEN_DIMS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


def decode(photos):
    """Decode Photos into images (B, 3, H, W)in the simplest way."""
    transform = Compose([vae.square_transform(IMAGE_SIZE), ToTensor()])
    return torch.stack([transform(Image.open(photo.path).convert("RGB")) for photo in photos])


def plain_loss(model, images):
    """Return the loss of images (B, C, H, W), averaged over their values."""
    recon, mu, log_var = model(images)
    return nn.functional.mse_loss(recon, images) + 0.00025 * train.kl_divergence(mu, log_var).mean()


def plain_epoch(model, optimizer, batches):
    """Train a model on batches of Photos with a naive loop."""
    for photos in batches:
        loss = plain_loss(model, decode(photos).to(model.latent_mean.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def plain():
    """Measure plain: a round is an epoch of 256 photos."""
    model = new_vae().to(vae.pick_device(DEVICE))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    photos = find_photos("photos")[:256]
    batches = [photos[start : start + 16] for start in range(0, len(photos), 16)]
    while True:
        yield {"plain, images/s": len(photos) / seconds(plain_epoch, model, optimizer, batches)}


def pythae():
    """Measure pythae's VAE and BaseTrainer: a round is an epoch of 256 photos."""
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
    """Measure a LightningModule with Lightning's Trainer: a round is an epoch of 256 photos."""
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
    """Measure the functions of train.py: a round is an epoch of COUNT photos minus those held out."""
    train.reuse_freed_memory()
    run = train.new_run({}, train.set_up_device())
    while True:
        vars(run).update(step=0, seconds=0.0)
        yield {"ours, images/s": train.train_epoch(run) / run.seconds}


def caching():
    """Measure decoding into the cache on one core (in this process) and on all cores."""
    photos = find_photos("to cache")
    cut = {"channels": 3, "size": IMAGE_SIZE}
    while True:
        one = seconds(decode_photos, photos, Path("cache"), cut, 0)
        more = seconds(decode_photos, photos, Path("cache"), cut, torch.get_num_threads())
        yield {"cache on 1 core, photos/s": CACHED / one, "cache on all cores, photos/s": CACHED / more}


def starting():
    """Measure `python genpic.py`, and the imports and checkpoint loading that any such script needs."""
    vae.save_checkpoint(genpic.CHECKPOINT, new_vae(), face_box=train.FACE_BOX)
    photo = Path(genpic.__file__).with_name("data") / "tested_data/sample.jpg"
    bare = ["-c", f"import torch, torchvision; torch.load({genpic.CHECKPOINT!r}, weights_only=True)"]
    whole = [genpic.__file__, "--device", DEVICE, "--image", str(photo)]
    while True:
        yield {"imports and checkpoint, s": seconds(run_python, bare), "genpic.py, s": seconds(run_python, whole)}


def run_python(arguments):
    """Run Python to its end; raises UserError if it fails."""
    if subprocess.run([sys.executable, *arguments], stdout=sys.stderr).returncode:
        raise UserError(f"{arguments[0]} failed; see the error above.")


def rates(settings):
    """Return the results of all measurements that take turns, and their ratios."""
    trainers = [plain, ours] + [pythae, lightning] * PEERS
    figures = in_turns(*(worker(trainer, settings) for trainer in trainers), caching(), starting())
    pairs = [("ours", other.__name__, "images/s") for other in [plain, pythae, lightning][: 1 + 2 * PEERS]]
    pairs += [("cache on all cores", "cache on 1 core", "photos/s"), ("genpic.py", "imports and checkpoint", "s")]
    for one, other, unit in pairs:
        figures[f"{one} / {other}"] = figures[f"{one}, {unit}"] / figures[f"{other}, {unit}"]
    return figures


# Time to quality
def quality():
    """Return how long plain and train.py take to reach the validation PSNR of plain after EPOCHS epochs."""
    slow = timed("plain", plain_epochs())
    mark = slow[-1][1]
    fast = timed("ours", ours_epochs(), mark)
    if fast[-1][1] < mark:
        raise UserError(f"train.py ended at {fast[-1][1]} dB, below plain's {mark} dB: raise COUNT.")
    slow = [row for number, row in enumerate(slow) if all(psnr < mark for _, psnr in slow[:number])]
    figures = {"validation PSNR, dB": mark, "plain, s": slow[-1][0], "ours, s": fast[-1][0]}
    return figures | {"plain / ours": slow[-1][0] / fast[-1][0], "plain, epochs": len(slow), "ours, epochs": len(fast)}


def timed(name, epochs, mark=math.inf):
    """Return (seconds, PSNR) of each epoch of a generator, up to the first that reaches `mark`."""
    rows = []
    begin = time.perf_counter()
    for psnr in epochs:
        rows.append((time.perf_counter() - begin, round(psnr, 2)))
        print(f"{name}, {rows[-1][0]:.1f} s: {rows[-1][1]:.2f} dB", flush=True)
        if psnr >= mark:
            break
    return rows


def plain_epochs():
    """Train with the naive loop; yield the PSNR after each epoch."""
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
    Path("ours").mkdir()  # so that it uses its own cache
    names = ("IMAGE_SIZE", "BATCH_SIZE", "COMPILE", "DEVICE")
    flags = [f"--{name.lower().replace('_', '-')}={getattr(train, name)}" for name in names]
    flags += ["--hidden-dims", *map(str, HIDDEN_DIMS)]
    command = [sys.executable, train.__file__, *flags, "--data", str(Path("photos").absolute())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="ours")
    try:
        for line in process.stdout:
            if found := re.match(r"Epoch .* PSNR (\S+) dB", line):
                yield float(found[1])
        if process.wait():
            raise UserError("train.py failed; see the error above.")
    finally:
        process.kill()  # on SIGTERM, it would print that it is stopping
        process.wait()


def main(argv=()):
    """Measure, and print one line per result."""
    with vae.flags(globals(), argv) as (settings, _):
        measure(settings | {"DATA": "photos"})


def measure(settings):
    """Measure with the constants in `settings`, and print one line per result."""
    vars(train).update(settings)
    train.check_settings()
    require(2 * BATCH_SIZE <= COUNT, "COUNT", COUNT, f"at least {2 * BATCH_SIZE}, two batches")
    for peer in ("pythae", "lightning") * PEERS:
        require(
            find_spec(peer), "PEERS", PEERS, f"False, because {peer} is not installed: `pip install pythae lightning`"
        )
    with tempfile.TemporaryDirectory() as folder:
        put_photos(Path(folder))
        with chdir(folder), redirect_stdout(sys.stderr):
            usable = len(train.new_run({}, torch.device("cpu")).pixels)  # writes the cache
            require(usable == COUNT, "PHOTOS", PHOTOS, "a folder in which all photos can be read")
            figures = quality() if QUALITY else rates(settings)
    for name, figure in figures.items():
        print(f"{name:50} {figure:10.3f}")


if __name__ == "__main__":
    vae.run_script(main)
