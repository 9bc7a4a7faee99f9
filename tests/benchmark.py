"""How fast the scripts are on this machine, beside the training loop that people write first.

    python tests/benchmark.py                       # on drawn faces: five minutes on two cores
    python tests/benchmark.py --photos FOLDER       # on photos; every constant below is a flag

"plain" is float32 in PyTorch's own memory layout, batches of 16, every JPEG decoded in the loop in every epoch, and
loss.item() after every step. "ours" are the functions of train.py. Both train the VAE of vae.py, each in a process of
its own. All work in turns, and figures are medians of all rounds after the first (RssAnon: of one run).
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stdout, suppress
from multiprocessing import get_context
from pathlib import Path

import torch
from faces import draw_face
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import genpic
import train
import vae
from vae import HIDDEN_DIMS, IMAGE_SIZE, UserError, require

PHOTOS: str = ""  # folder of photos; without one, faces are drawn
COUNT: int = 512  # photos in an epoch of ours; raise it to 20480 on a GPU, where these are over in no time
CACHED: int = 12_000  # photos that are decoded into the cache, and on which the memory of train.py is measured
BATCH_SIZE: int = 32  # photos in a step of ours; raise it to 256 on a GPU
MATRIX: int = 2048  # side of the matrices that are multiplied; raise it to 8192 on a GPU
CROP: str = "center"  # as in train.py; "face", with --photos of people, tells how fast faces are found
COMPILE: str = "auto"  # as in train.py
DEVICE: str = "auto"  # "auto", "cuda" or "cpu"
ROUNDS: int = 7  # repetitions after the first, which alone counts if there are none


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
    """Ask all generators for figures {name: number}, ROUNDS + 1 times; return medians without the first round."""
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
    sources = [photo.path.absolute() for photo in vae.find_photos(PHOTOS) if photo.member is None] if PHOTOS else []
    require(Path(PHOTOS).is_dir() and (sources or not PHOTOS), "PHOTOS", PHOTOS, "a folder with photos")
    for seed in range(0 if PHOTOS else min(COUNT, 2048)):
        sources.append(folder / f"{seed}.jpg")
        draw_face(seed, size=(178, 218)).save(sources[-1], quality=95)
    for name, count in {"photos": COUNT, f"{CACHED // 4}": CACHED // 4, f"{CACHED}": CACHED}.items():
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.jpg").symlink_to(sources[number % len(sources)])


def plain():
    """The loop that people write first: a round is 128 photos."""
    device = vae.pick_device(DEVICE)
    model = vae.VAE(IMAGE_SIZE, hidden_dims=HIDDEN_DIMS).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    transform = vae.photo_transform(IMAGE_SIZE)
    photos = vae.find_photos("photos")[:128]
    while True:
        begin = time.perf_counter()
        for start in range(0, len(photos), 16):
            pictures = [Image.open(photo.path).convert("RGB") for photo in photos[start : start + 16]]
            images = torch.stack(list(map(transform, pictures))).to(device)
            recon, mu, log_var = model(images)
            loss = torch.nn.functional.mse_loss(recon, images) + 0.00025 * train.kl_divergence(mu, log_var).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        yield {"plain, images/s": len(photos) / (time.perf_counter() - begin)}


def ours():
    """The functions of train.py: a round is an epoch on photos, and another on one batch repeated from memory."""
    train.reuse_freed_memory()
    run = train.new_run({}, train.set_up_device())
    run.train_set = run.train_set[: len(run.train_set) // BATCH_SIZE * BATCH_SIZE]
    if COMPILE == "yes" or (COMPILE == "auto" and run.device.type == "cuda"):
        run.model.compile(dynamic=False)
    load_images = train.load_images
    one_batch = load_images(run.photos, run.train_set[:BATCH_SIZE], run.device)

    def epoch(source):
        train.load_images = source
        vars(run).update(step=0, sums=[0.0] * 4)
        return train.train_epoch(run, run.model)

    while True:
        from_memory = epoch(lambda *_: one_batch)
        rate = epoch(load_images)
        figures = {"ours, images/s": rate, "epoch on photos / on one batch in memory": from_memory / rate}
        loading = (len(load_images(run.photos, batch, run.device)) for batch in train.batches_of(run.train_set, 0))
        figures["loading photos, share of an epoch"] = seconds(list, loading) * rate / len(run.train_set)
        run.model.eval()
        psnr = []
        for train.AMP in (False, True):
            psnr.append(train.evaluate(run, *train.encode(run, run.val_set))["val_psnr"])
        figures["validation PSNR in bfloat16 - in float32, dB"] = psnr[1] - psnr[0]
        optimizing = seconds(lambda: [optimizer.step() for optimizer in run.optimizers])
        figures["optimizers, share of an epoch"] = optimizing * rate / BATCH_SIZE
        generation = seconds(torch.inference_mode()(genpic.decode), run.model, genpic.noise(run.model, 256))
        yield figures | {"generation, images/s": 256 / generation}


def products():
    """Products of square matrices, of which the machine cannot make more."""
    device = vae.pick_device(DEVICE)
    matrices = [torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    while True:
        yield {f"{a.dtype} product, GFLOP/s": 2e-9 * MATRIX**3 / seconds(torch.mm, a, a) for a in matrices}


def caching():
    """Decoding into the cache, on one core, which is that of this process, and on all."""
    photos = vae.find_photos(str(CACHED))
    while True:
        one = seconds(train.build_cache, photos, Path("cache"), 0)
        more = seconds(train.build_cache, photos, Path("cache"), torch.get_num_threads())
        figures = {"cache on 1 core, images/s": CACHED / one, "cache on all cores, images/s": CACHED / more}
        yield figures | {"cache on all cores / on 1": one / more}


def starting():
    """`python genpic.py` against what any script with its checkpoint has to do."""
    vae.save_checkpoint(genpic.CHECKPOINT, vae.VAE(IMAGE_SIZE, hidden_dims=HIDDEN_DIMS), face_box=train.FACE_BOX)
    photo = Path(genpic.__file__).with_name("data") / "tested_data/sample.jpg"
    bare = ["-c", f"import torch, torchvision; torch.load({genpic.CHECKPOINT!r}, weights_only=True)"]
    while True:
        one = seconds(run_python, bare)
        whole = seconds(run_python, [genpic.__file__, "--image", str(photo)])
        figures = {"imports and checkpoint, s": one, "genpic.py, s": whole}
        yield figures | {"genpic.py / imports and checkpoint": whole / one}


def run_python(arguments):
    """Run Python to its end; return the most anonymous memory that it held (RssAnon, MB), 0 if no system tells."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=sys.stderr)
    status = Path(f"/proc/{process.pid}/status")
    most = 0.0
    while process.poll() is None:
        held = status.read_text().partition("RssAnon:")[2].split() if status.exists() else []
        most = max(most, int(held[0]) * 1.024e-3 if held else 0)
        time.sleep(0.01)
    if process.returncode:
        raise UserError(f"{arguments[0]} has failed, see above.")
    return most


def main(argv=None):
    """Measure, and print a line per figure."""
    settings = vae.parse_flags(globals(), argv) | {"DATA": "photos", "EPOCHS": 1}
    vars(train).update(settings)
    train.check_settings()
    require(2 * BATCH_SIZE <= COUNT, "COUNT", COUNT, f"at least {2 * BATCH_SIZE}, two batches")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae.VAE(IMAGE_SIZE, hidden_dims=HIDDEN_DIMS)(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE))[0].sum().backward()
    gflop = counter.get_total_flops() / 1e9
    with tempfile.TemporaryDirectory() as folder:
        put_photos(Path(folder))
        with chdir(folder), redirect_stdout(sys.stderr):
            train.load_photos(torch.device("cpu"))  # writes the cache: a worker may start no processes for that
            figures = in_turns(worker(plain, settings), worker(ours, settings), products(), caching(), starting())
            flags = f"--epochs 1 --image-size {IMAGE_SIZE} --hidden-dims 4 4 4 4 4 --latent-dim 8 --data".split()
            for count in (CACHED // 4, CACHED):
                figures[f"train.py on {count:,} photos, RssAnon, MB"] = run_python([train.__file__, *flags, str(count)])
    rate = figures["ours, images/s"]
    figures |= {
        "ours / plain": rate / figures["plain, images/s"],
        "arithmetic, GFLOP/image": gflop,
        "ours / bfloat16 product": rate * gflop / figures["torch.bfloat16 product, GFLOP/s"],
        "ours / float32 product": rate * gflop / figures["torch.float32 product, GFLOP/s"],
    }
    for name, figure in figures.items():
        print(f"{name:50} {figure:10.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmark.py: {error}")
