"""Tests of distributed training: torchrun starts two CPU processes that train one model."""

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, refusal, start
from faces import draw_faces

import train
import vae

# Runs train.py and records this process's batches, and its weights after every step, in a file
RECORDER = """
import sys, torch, train

seen, learned, step = [], [], train.train_step

def train_step(network, optimizers, images, *more):
    sums = step(network, optimizers, images, *more)
    seen.append([image.sum().item() for image in images.double()])
    learned.append(torch.cat([weight.detach().flatten() for weight in network.parameters()]))
    torch.save((seen, learned), f"{train.OUTPUT_DIR}/{train.rank}.pt")
    return sums

train.train_step = train_step
train.main(sys.argv[1:])
"""
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RUN = [*SMALL, "--data", "faces", "--no-amp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 36 faces, 34 of them for training: five batches of 8, the last one filled up."""
    folder = tmp_path_factory.mktemp("processes")
    draw_faces(folder / "faces", 36)
    (folder / "recorder.py").write_text(RECORDER)
    vae.save_checkpoint(folder / "start.pth", vae.VAE(32, 3, [8, 16], 8))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """The batches and weights recorded by one process and by two; each run prints every epoch once."""
    for out, launcher in {"by 1": [], "by 2": TWO}.items():
        process = start(folder, *launcher, "recorder.py", *RUN, "--epochs", "3", "--output-dir", out)
        assert process.communicate(timeout=300)[0].count("\nEpoch") == 3
    return [torch.load(folder / name) for name in ("by 1/0.pt", "by 2/0.pt", "by 2/1.pt")]


def test_two_processes_see_the_photos_in_the_same_order_as_one(runs):
    (alone, _), (evens, _), (odds, _) = runs
    assert [(batch[::2], batch[1::2]) for batch in alone] == list(zip(evens, odds, strict=True))
    assert [len(batch) for batch in alone] == [8] * 3 * 5


def test_two_processes_have_the_same_weights_after_every_step(runs):
    (_, first), (_, second) = runs[1:]
    assert all(map(torch.equal, first, second))
    assert len(first) == len(second) == 3 * 5 and not torch.equal(first[0], first[1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_run_with_a_killed_process_ends_and_resumes_after_its_last_complete_epoch(folder):
    command = [ROOT / "train.py", *RUN, "--epochs", "1000", "--output-dir", "killed", "--start-from=start.pth"]
    process = start(folder, *TWO, *command)
    assert any("Epoch  2/1000" in line for line in process.stdout)
    os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]), signal.SIGKILL)
    assert process.wait(timeout=300) != 0
    epoch = vae.load_checkpoint(folder / "killed/last.pth")[1]["position"]["epoch"]
    again = start(folder, *TWO, *command, "--resume")
    assert epoch >= 2 and any(f"after epoch {epoch} of 1000 and step 0" in line for line in again.stdout)
    assert any(f"Epoch {epoch + 1:2d}/1000" in line for line in again.stdout)
    again.terminate()


def test_errors_are_reported_once(folder):
    complaints = start(folder, *TWO, ROOT / "train.py", *RUN, "--data=nowhere").communicate(timeout=300)[1]
    assert complaints.count("train.py: ") == complaints.count("nowhere does not exist") == 1


def test_processes_not_started_by_torchrun_are_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "world_size", 2)
    assert "RANK is not set: start the processes with torchrun" in refusal(train.main, RUN)
