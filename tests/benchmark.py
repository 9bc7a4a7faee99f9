"""How fast the scripts are on this machine, beside the training loop that people write first.

    python tests/benchmark.py                       # on drawn faces: five minutes on two cores
    python tests/benchmark.py --photos FOLDER       # on photos; every constant below is a flag
    python tests/benchmark.py --json                # one object for programs: its "ratio" is ours / plain

"plain" is float32 in PyTorch's own memory layout, batches of 16, every JPEG decoded in the loop in every epoch, and
loss.item() after every step. "ours" are the functions of train.py. Both train the VAE of vae.py, each in a process of
its own. What is compared runs in turns, and figures are medians of all rounds after the first (RssAnon: of one run).
"""

import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch
from faces import draw_face
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import train
import vae

PHOTOS: str = ""  # folder of photos; without one, faces are drawn
COUNT: int = 512  # photos in an epoch of ours; raise it to 20480 on a GPU, where these are over in no time
BATCH_SIZE: int = 16  # photos in a step of ours; raise it to 256 on a GPU
COMPILE: str = "auto"  # as in train.py
DEVICE: str = "auto"  # as in train.py
ROUNDS: int = 7  # repetitions after the first
JSON: bool = False  # print one JSON object instead of lines

ROOT = Path(train.__file__).parent


# Workers: processes that work in turns
def serve(rounds, pipe, *arguments):
    """Answer every request with what the generator `rounds` yields next."""
    sys.stdout = sys.stderr  # what train.py prints is not part of the result
    figures = rounds(*arguments)
    with suppress(EOFError, KeyboardInterrupt):  # the asker is gone, or tells
        while True:
            pipe.recv()
            pipe.send(next(figures))


def worker(rounds, *arguments):
    """Start a process in which the generator `rounds` works; return a function that asks for its next figures."""
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(rounds, there, *arguments)).start()
    there.close()

    def ask():
        try:
            here.send("next")
            return here.recv()
        except (EOFError, BrokenPipeError):
            raise vae.UserError("A process that was to be measured has ended, as its message above tells.") from None

    return ask


def in_turns(**asks):
    """Ask each function for figures, a dict or a number, in turns; return {name: medians} without the first round."""
    rounds = [{name: ask() for name, ask in asks.items()} for _ in range(ROUNDS + 1)][1:]
    results = {}
    for name, first in rounds[0].items():
        if isinstance(first, dict):
            results[name] = {key: statistics.median(figures[name][key] for figures in rounds) for key in first}
        else:
            results[name] = statistics.median(figures[name] for figures in rounds)
    return results


def seconds(function, *arguments):
    """Call a function and return how long it took, the work of the GPU included."""
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pick_device(settings):
    """Return the device to measure on, as the current one."""
    device = vae.pick_device(settings["DEVICE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def peak_memory(device):
    """The most memory that this process has held, in MB: of the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e6


# Training
def plain(paths, settings):
    """The loop that people write first: a round is 128 photos."""
    device = pick_device(settings)
    model = vae.VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch):
        images = torch.stack([vae.celeb_transform(Image.open(photo.path).convert("RGB")) for photo in batch]).to(device)
        recon, mu, log_var = model(images)
        loss = F.mse_loss(recon, images) + 0.00025 * train.kl_divergence(mu, log_var).mean() / mu.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    def steps():
        for start in range(0, 128, 16):
            step(paths[start : start + 16])

    while True:
        yield {"rate": 128 / seconds(steps), "memory": peak_memory(device)}


def ours(paths, settings):
    """The functions of train.py: a round is an epoch of photos, and another of one batch repeated from memory."""
    vars(train).update(settings, DATA="the photos", EPOCHS=10**6, FLIP=True)
    train.reuse_freed_memory()
    device = pick_device(settings)
    model, optimizer = train.new_model(device)
    photos = train.load_photos(paths, list(map(str, paths)), device)
    train_set, val_set = (part.to(photos.device) for part in train.split_photos(len(photos)))
    train_set = train_set[: len(train_set) // train.BATCH_SIZE * train.BATCH_SIZE]
    network, load_batches = train.compiled(model, device, train.BATCH_SIZE), train.load_batches
    batch = next(load_batches(photos, [train_set[: train.BATCH_SIZE]], device))
    codes, waited = torch.randn(256, train.LATENT_DIM, device=device), []

    def timed(*arguments):
        batches = load_batches(*arguments)
        while True:
            start = time.perf_counter()
            images = next(batches, None)
            waited.append(time.perf_counter() - start)
            if images is None:
                return
            yield images

    @torch.inference_mode()
    def generate():
        genpic.decode(model, codes).cpu()

    def repeated(photos, batches, device):
        return (batch for _ in batches)

    def epoch(source):
        train.load_batches = source
        run = {"epoch": 0, "step": 0, "sums": [0.0] * 4}
        return seconds(train.train_epoch, network, optimizer, photos, train_set, run, lambda: 0)

    def validation_psnr(amp):
        train.AMP = amp
        return train.evaluate(model, photos, val_set, device)["val_psnr"]

    order = [timed, repeated]
    while True:
        waited.clear()
        order.reverse()
        duration = {source: epoch(source) for source in order}
        train.load_batches = load_batches
        model.eval()
        yield {
            "rate": len(train_set) / duration[timed],
            "memory": peak_memory(device),
            "waiting": sum(waited) / duration[timed],
            "against_memory": duration[timed] / duration[repeated],
            "psnr_float32": validation_psnr(False),
            "psnr_bfloat16": validation_psnr(True),
            "generation": len(codes) / seconds(generate),
        }


def products(settings):
    """Products of square matrices, in GFLOP/s."""
    device = pick_device(settings)
    side = 8192 if device.type == "cuda" else 2048
    while True:
        figures = {}
        for dtype in (torch.bfloat16, torch.float32):
            matrix = torch.randn(side, side, device=device, dtype=dtype)
            figures[str(dtype)[6:]] = 2e-9 * side**3 / seconds(torch.mm, matrix, matrix)
        yield figures


def measure_training(paths, settings):
    """Training: images/s, what they are of what the machine can do, waiting, memory, precision."""
    results = in_turns(
        plain=worker(plain, paths, settings), ours=worker(ours, paths, settings), product=worker(products, settings)
    )
    plain_loop, own, product = results["plain"], results["ours"], results["product"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        sum(output.sum() for output in vae.VAE()(torch.rand(1, 3, 150, 150))).backward()
    gflop = counter.get_total_flops() / 1e9
    return {
        "plain, images/s": plain_loop["rate"],
        "ours, images/s": own["rate"],
        "ratio": own["rate"] / plain_loop["rate"],
        "arithmetic, GFLOP/image": gflop,
        "bfloat16 product, GFLOP/s": product["bfloat16"],
        "float32 product, GFLOP/s": product["float32"],
        "ours / bfloat16 product": own["rate"] * gflop / product["bfloat16"],
        "ours / float32 product": own["rate"] * gflop / product["float32"],
        "epoch on photos / on one batch in memory": own["against_memory"],
        "share of an epoch spent waiting for photos": own["waiting"],
        "20 epochs of CelebA (162,770 photos) at that rate, minutes": 20 * 162_770 / own["rate"] / 60,
        "plain, peak memory, MB": plain_loop["memory"],
        "ours, peak memory, MB": own["memory"],
        "validation PSNR in bfloat16 - in float32, dB": own["psnr_bfloat16"] - own["psnr_float32"],
        "generation, images/s": own["generation"],
    }


# Everything else
def caching(paths, cores):
    """Decoding of photos into the cache by so many cores, in images/s."""
    train.cores, cache = lambda: cores, Path(f"cache on {cores}")
    while True:
        cache.unlink(missing_ok=True)
        yield len(paths) / seconds(train.build_cache, paths, cache, vae.IMAGE_SIZE, vae.CHANNELS)


def measure_caching(paths):
    """The cache: images/s on one core and on all."""
    paths, cores = list(itertools.islice(itertools.cycle(paths), 12_288)), train.cores()
    rates = in_turns(one=worker(caching, paths, 1), all=worker(caching, paths, cores))
    return {
        "cache on 1 core, images/s": rates["one"],
        f"cache on {cores} cores, images/s": rates["all"],
        "cache on all cores / on one": rates["all"] / rates["one"],
    }


def anonymous_memory(count):
    """The most anonymous memory (RssAnon, MB) that `python train.py` holds on so many photos; Linux alone tells."""
    folder = Path(f"{count} photos")
    folder.mkdir()
    draw_face(0).save("face.jpg")
    for number in range(count):
        os.link("face.jpg", folder / f"{number}.jpg")
    flags = f"--epochs 1 --hidden-dims 4 4 4 4 4 --latent-dim 8 --output-dir {count}".split()
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", folder, *flags], stdout=subprocess.DEVNULL)
    most = 0.0
    while process.poll() is None:
        held = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(held[1]) * 1024 / 1e6 if held else 0)
        time.sleep(0.02)
    if process.returncode:
        raise vae.UserError("train.py, of which the memory was to be measured, failed as its message above tells.")
    return most


def measure_memory():
    """Memory: what 9,000 photos more cost, where the system tells."""
    if not Path("/proc/self/status").exists():
        return {}
    few, many = anonymous_memory(3000), anonymous_memory(12_000)
    return {"RssAnon with 3,000 photos, MB": few, "with 12,000, MB": many, "growth, MB": many - few}


def measure_starting():
    """Starting: `python genpic.py` against what any script of torch and torchvision has to do."""
    vae.save_checkpoint("checkpoints_best/vae_model_20.pth", vae.VAE())
    Path("data/tested_data").mkdir(parents=True)
    draw_face(1, size=(178, 218)).save("data/tested_data/face.jpg")
    imports = "import torch, torchvision"
    bare = f"{imports}; torch.load('checkpoints_best/vae_model_20.pth', weights_only=True)"

    def process(*command):
        run = [sys.executable, *command]
        return lambda: seconds(lambda: subprocess.run(run, check=True, stdout=subprocess.DEVNULL))

    times = in_turns(imports=process("-c", imports), bare=process("-c", bare), genpic=process(ROOT / "genpic.py"))
    return {
        "python -c 'import torch, torchvision', s": times["imports"],
        "the same and reading the checkpoint, s": times["bare"],
        "python genpic.py, s": times["genpic"],
        "genpic.py / imports": times["genpic"] / times["imports"],
        "genpic.py / imports and reading the checkpoint": times["genpic"] / times["bare"],
    }


def find_photos(folder):
    """Return COUNT photos: those of PHOTOS, over again if need be, or faces drawn into `folder`."""
    drawn = [Path(folder, f"{seed}.jpg") for seed in range(min(COUNT, 2048))]
    paths = [photo.path for photo in vae.find_photos(PHOTOS)] if PHOTOS else drawn
    vae.require(paths, "PHOTOS", PHOTOS, "a folder with photos")
    for seed, path in enumerate([] if PHOTOS else paths):
        draw_face(seed, size=(178, 218)).save(path, quality=95)
    return [vae.Photo(path.absolute()) for path in itertools.islice(itertools.cycle(paths), COUNT)]


@vae.script
def main(argv=None):
    """Measure, and print a line per figure or all of them as JSON."""
    settings = vae.override_constants(globals(), argv)
    settings = {name: settings[name] for name in ("BATCH_SIZE", "COMPILE", "DEVICE")}
    vars(train).update(settings)
    train.check_settings()
    pick_device(settings)
    least = max(128, 3 * BATCH_SIZE)
    vae.require(least <= COUNT, "COUNT", COUNT, f"at least {least}: 128, and three batches")
    vae.require(ROUNDS >= 1, "ROUNDS", ROUNDS, "at least 1")
    figures, here = {}, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        paths = find_photos(folder)
        os.chdir(folder)
        parts = [lambda: measure_training(paths, settings), lambda: measure_caching(paths), measure_memory]
        for part in [*parts, measure_starting]:
            new = part()
            figures |= new
            for name, figure in new.items() if not JSON else ():
                print(f"{name:60} {figure:10.3f}", flush=True)
        os.chdir(here)
    if JSON:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
