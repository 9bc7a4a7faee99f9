"""The commands that people type, as processes of their own, in a folder of their own."""

import platform
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from faces import draw_face, draw_faces
from PIL import Image

from vae import load_checkpoint


def copy_scripts(folder):
    """Put the three scripts into `folder`, as someone who copies them would."""
    for name in ("vae.py", "train.py", "genpic.py"):
        shutil.copy(ROOT / name, folder)


def python(folder, *command):
    """Run a script in `folder`; return what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_from_photos_to_the_grid(tmp_path):
    copy_scripts(tmp_path)
    draw_faces(tmp_path / "data/train", 30)
    (tmp_path / "data/tested_data").mkdir()
    draw_face(99, size=(178, 218)).save(tmp_path / "data/tested_data/me.png")
    said = python(tmp_path, "train.py", *SMALL, "--epochs", "20")
    assert "Next: python genpic.py\n" in said and "\r" not in said
    assert said.count("images/s") == 20 and "Epoch 20/20" in said
    said = python(tmp_path, "genpic.py")
    assert "data/tested_data/me.png" in said and "Wrote       generated_images_grid2.jpg" in said
    assert Image.open(tmp_path / "generated_images_grid2.jpg").size == (6 * 34 + 2, 2 * 34 + 2)


def test_errors_are_a_line_and_an_exit_code(tmp_path):
    copy_scripts(tmp_path)
    done = subprocess.run([sys.executable, "genpic.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("genpic.py: There is no checkpoint checkpoints_best/vae_model_20.pth")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_saves_it(tmp_path, number, code):
    copy_scripts(tmp_path)
    draw_faces(tmp_path / "data/train", 200)
    command = [sys.executable, "train.py", *SMALL, "--epochs", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "Epoch  3/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == code and complaints == "\nStopping after this step; once more stops at once.\n"
    last = said.splitlines()[-1]
    assert last.startswith("Stopped in epoch") and last.endswith(f"train.py {' '.join(SMALL)} --epochs 1000 --resume")
    state = load_checkpoint(tmp_path / "checkpoints_best/last.pth")[1]["state"]
    assert f"Stopped in epoch {state['epoch'] + 1}." in last and state["epoch"] >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that is kept")
def test_a_batch_too_large_for_the_memory(tmp_path):
    draw_faces(tmp_path / "faces", 64)
    program = f"""
import re, resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 5 * 10**8, size + 5 * 10**8))
train.main("--data faces --batch-size 60 --device cpu".split())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "There is too little memory: lower BATCH_SIZE" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the switch")
def test_freed_memory_is_used_again():
    program = """
import resource, torch, train
train.reuse_freed_memory()
for size in [2**27] + 20 * [2**26, 2**27]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(size, dtype=torch.uint8).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert int(python(ROOT, "-c", program)) < 1000  # of 32,768 pages
