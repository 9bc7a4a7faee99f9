"""Several processes: torchrun starts two on the CPU, which train one model together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, refusal
from faces import draw_faces

import train
import vae

# Trains as train.py does, and leaves a file of what this process has seen and learned in every epoch
RECORDER = """
import torch
import train
import vae

seen, epochs, step, finish = [], [], train.train_step, train.finish_epoch

def train_step(network, optimizer, images, count, *more):
    seen.append((count, [image.sum().item() for image in images.double()]))
    return step(network, optimizer, images, count, *more)

def finish_epoch(model, *more):
    finish(model, *more)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    epochs.append((list(seen), state))
    torch.save(epochs, f"{train.OUTPUT_DIR}/{train.rank()}.pt")
    seen.clear()

train.train_step, train.finish_epoch = train_step, finish_epoch
train.main()
"""
in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
RUN = [*SMALL, "--data", "faces", "--epochs", "3", "--reconstruction", "ssim"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 36 faces, 34 of them to train on: batches of 8, 8, 8, 8 and 2, the last too small for two."""
    folder = tmp_path_factory.mktemp("processes")
    draw_faces(folder / "faces", 36)
    (folder / "recorder.py").write_text(RECORDER)
    (folder / "taken").mkdir()
    (folder / "taken/progress").symlink_to("nowhere")  # where there should be a folder
    return folder


def start(folder, count, *command):
    """Start a script in so many processes; return the Popen of all of them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *command], cwd=folder, env=environment, **pipes)


@pytest.fixture(scope="module")
def runs(folder):
    """What one process and two have seen and learned: lists of epochs, and what was printed."""
    said = []
    for count in (1, 2):
        process = start(folder, count, "recorder.py", *RUN, "--output-dir", f"by {count}")
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0
    names = ("by 1/0.pt", "by 2/0.pt", "by 2/1.pt")
    return *(torch.load(folder / name) for name in names), said


def test_two_processes_see_the_photos_in_the_order_of_one(runs):
    alone, first, second, _ = runs
    for (steps, _), (one, _), (other, _) in zip(alone, first, second, strict=True):
        together = [(count, left + right) for (count, left), (_, right) in zip(one, other, strict=True)]
        assert together == steps[: len(together)] and len(steps) - len(together) == 1
        assert [count for count, _ in together] == [8] * 4 and {len(left) for _, left in one} == {4}


def test_two_processes_have_the_same_weights_after_every_epoch(runs):
    _, first, second, _ = runs
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(first[0][1]["fc_mu.weight"], first[1][1]["fc_mu.weight"])


def test_validation_and_prior_are_those_of_the_saved_file(runs, folder, monkeypatch):
    monkeypatch.chdir(folder)
    model, info = vae.load_checkpoint("by 2/vae_model_3.pth")
    vars(train).update(info["constants"] | {"DATA": "faces"})
    photos = train.load_photos(*train.find_photos(), torch.device("cpu"))
    train_set, val_set = train.split_photos(len(photos))
    figures, _, _ = train.evaluate(model, photos, val_set, torch.device("cpu"))
    assert figures == pytest.approx({name: info[name] for name in figures}, rel=1e-6)
    scale = model.latent_scale.clone()
    train.fit_prior(model, photos, train_set, torch.device("cpu"))
    torch.testing.assert_close(scale, model.latent_scale, rtol=1e-3, atol=1e-4)


def test_process_0_alone_prints(runs):
    alone, together = (said.splitlines() for said in runs[-1])
    assert len(alone) == len(together) == 13 and "2 processes, each on cpu" in together[3]


def test_shares_are_consecutive_and_come_together_again(monkeypatch):
    rows, parts = torch.randn(7, 2), []
    monkeypatch.setattr(train, "processes", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(train, "rank", lambda number=number: number)
        monkeypatch.setattr(train, "summed", lambda tensor: tensor)
        parts.append(train.gathered(train.share(rows), 7))
    assert torch.equal(sum(parts), rows)


def last_child(process):
    """Return the number of the process that torchrun has started last."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])


@in_proc
def test_a_run_of_two_of_which_one_is_stopped_goes_on_as_if_it_never_stopped(folder):
    flags = [*SMALL, "--data", "faces", "--epochs", "12"]
    whole = start(folder, 2, ROOT / "train.py", *flags, "--output-dir", "whole")
    assert whole.wait(timeout=300) == 0
    process = start(folder, 2, ROOT / "train.py", *flags, "--output-dir", "parts")
    while "Epoch  3/" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(last_child(process), signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert "To go on: torchrun --nproc-per-node 2 train.py" in said
    again = start(folder, 2, ROOT / "train.py", *flags, "--output-dir", "parts", "--resume")
    assert again.wait(timeout=300) == 0
    states, histories = [], []
    for name in ("whole", "parts"):
        model, info = vae.load_checkpoint(folder / name / "last.pth")
        states.append(model.state_dict())
        histories.append([{**row, "images_per_second": 0} for row in info["state"]["history"]])
    assert len(histories[0]) == len(histories[1]) == 12
    for row, other in zip(*histories, strict=True):  # sums of two halves, rounded in another order
        assert row == pytest.approx(other, rel=1e-6)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@in_proc
def test_a_process_that_dies_ends_the_run_with_a_message(folder):
    flags = [*SMALL, "--data", "faces", "--epochs", "100000"]
    process = start(folder, 2, ROOT / "train.py", *flags, "--output-dir", "dying")
    while "Epoch  3/" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(last_child(process), signal.SIGKILL)
    _, complaints = process.communicate(timeout=300)
    assert process.returncode != 0 and "Another process of the run has ended; --resume takes up" in complaints
    assert vae.load_checkpoint(folder / "dying/last.pth")[1]["state"]["epoch"] >= 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "9"], "BATCH_SIZE is 9: it must be at least 4 and a multiple of 2, the number of processes."),
        (["--batch-size", "2"], "BATCH_SIZE is 2: it must be at least 4 and a multiple of 2, the number of processes."),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--output-dir", "taken"], "taken/progress/epoch_01_reconstructions.png cannot be written"),
        (["--learning-rate", "1e12"], "The loss of step 2 of epoch 1 is not finite"),
    ],
)
def test_what_cannot_be_is_said_once(folder, flags, sentence):
    process = start(folder, 2, ROOT / "train.py", *RUN, *flags)
    said, complaints = process.communicate(timeout=300)
    assert (
        process.returncode != 0
        and "Done" not in said
        and complaints.count("train.py: ") == 1
        and sentence in complaints
    )


@pytest.mark.parametrize(
    ("device", "gpus", "sentence"), [("auto", 1, "2 processes for 1 GPUs"), ("cuda:0", 2, "DEVICE")]
)
def test_processes_need_a_gpu_each(monkeypatch, capsys, device, gpus, sentence):
    monkeypatch.setattr(train, "processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    code, said = refusal(train.main, capsys, ["--device", device])
    assert code == 2 and sentence in said
