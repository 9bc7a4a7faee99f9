"""Tests of stopped, killed, diverging and out-of-disk runs: nothing is lost, and they resume where possible."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TRAINED, files_of_at_most, refusal, run, same_weights, untouched_scripts
from faces import draw_face, draw_faces

import train
import vae

in_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
RUN = ["--no-resume", "--epochs", "3", "--kl-warmup-epochs", "2", "--reconstruction", "ssim"]  # 5 steps per epoch


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The OUTPUT_DIR of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with untouched_scripts(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        run(*RUN, "--output-dir", str(out))
    return out


@pytest.fixture
def fork():
    """A function that runs a call in a forked process, in which everything is already imported."""
    processes = []

    def start(call, *flags):
        processes.append(multiprocessing.get_context("fork").Process(target=call, args=flags))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def wait_for(path, process):
    """Wait until a process has written a file."""
    while not path.exists():
        assert process.exitcode is None
        time.sleep(0.001)


def assert_same_run(one, other):
    """Assert that two folders contain the same run, bit for bit, and no partial files."""
    pictures = [{path.name: path.read_bytes() for path in out.rglob("*.png")} for out in (one, other)]
    assert pictures[0] == pictures[1]
    files = [{path.relative_to(out) for path in out.rglob("*")} for out in (one, other)]
    assert files[0] == files[1]
    for name in ("last.pth", "vae_model_3.pth"):
        assert same_weights(one / name, other / name)
    infos = [vae.load_checkpoint(out / "last.pth")[1] for out in (one, other)]
    for info in infos:
        for row in info["position"]["history"]:
            assert 0 < row.pop("images_per_second") < math.inf  # differs from run to run
    torch.testing.assert_close(
        *[(info["raw_state_dict"], info["optimizers"], info["position"]) for info in infos], rtol=0, atol=0
    )


def resume_flag(out):
    """Return the flags that continue a killed run: none before its first last.pth, because it then starts over."""
    return ["--resume"] if (out / "last.pth").exists() else []


@in_linux
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(workplace, whole, kills, fork):
    count = 0
    for seed in range(kills):
        dice = random.Random(seed)
        out = Path(f"killed {seed}")
        process = fork(run, *RUN, "--output-dir", str(out))
        wait_for(out / dice.choice([".lock", "last.pth", "history.csv", "progress/epoch_02_samples.png"]), process)
        time.sleep(dice.random() / 3)
        process.kill()
        process.join()
        count += process.exitcode == -signal.SIGKILL
        run(*RUN, "--output-dir", str(out), *resume_flag(out))
        shutil.rmtree(out / "previous-1", ignore_errors=True)  # of a run killed before its first last.pth
        assert_same_run(out, whole)
    print(f"\nCount: {count} kills at random moments survived")
    assert count


def run_and_die(number, *flags):
    """Train, but kill this process after it has written its file number `number`, before the file is renamed."""
    files = []
    os.fsync = lambda file: files.append(file) or len(files) < number or os.kill(os.getpid(), signal.SIGKILL)
    run(*flags)


@in_linux
@pytest.mark.parametrize("number", [1, 3, 6, 9])  # the first checkpoint, a picture, the first last.pth, another picture
def test_partial_files_of_a_killed_run_are_removed_by_the_next(workplace, whole, number, fork):
    fork(run_and_die, number, *RUN, "--output-dir", "killed").join()
    assert len(list(Path("killed").rglob(".*.tmp"))) == 1
    run(*RUN, "--output-dir", "killed", *resume_flag(Path("killed")))
    shutil.rmtree("killed/previous-1", ignore_errors=True)
    assert_same_run(Path("killed"), whole)


def signal_in_step(monkeypatch, at, number, times=1):
    """Send this process a signal, `times` times, during step `at`."""
    step = train.train_step

    def interrupted(*args, **kwargs):
        for _ in range(times if args[3] == at else 0):
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize(("at", "number"), [(0, 2), (4, 2), (7, signal.SIGTERM), (14, 2)])
def test_a_stopped_run_resumes_to_the_same_result(workplace, whole, monkeypatch, capsys, at, number):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_in_step(patch, at, number)
        run(*RUN, "--output-dir", "parts")
    assert stop.value.code == 128 + number
    run(*RUN, "--output-dir", "parts", "--resume")
    assert f"after epoch {at // 5} of 3 and step {at % 5 + 1} of the next" in capsys.readouterr().out
    assert_same_run(Path("parts"), whole)


def test_a_run_that_ends_in_its_first_epoch_leaves_earlier_files_unchanged(workplace, monkeypatch):
    before = {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")}
    signal_in_step(monkeypatch, at=3, number=signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run("--epochs", "8")
    assert {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")} == before


def test_resuming_a_finished_run_changes_nothing_even_if_its_photos_moved(workplace, capsys):
    before = {path: path.read_bytes() for path in workplace.glob("checkpoints_best/*.*")}
    shutil.move("faces", "moved")
    run("--data", "moved", "--epochs", "8", "--resume", "--no-amp")
    assert "Done        The weights of epoch" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in workplace.glob("checkpoints_best/*.*")} == before


def test_resuming_with_other_settings_or_photos_is_refused(workplace):
    said = refusal(run, "--resume", "--epochs", "3", "--batch-size", "4", "--hidden-dims", "8", "4")
    assert "BATCH_SIZE was 8 and is now 4; EPOCHS was 8 and is now 3; HIDDEN_DIMS was [8, 16] and is now [8, 4]" in said
    draw_face(99).save("faces/face 000.jpg")
    assert refusal(run, "--resume", "--epochs", "8").count("40 photos, checksum") == 2
    draw_faces(Path("faces"), 41)
    assert "is now 41 photos" in refusal(run, "--resume", "--epochs", "8")


def test_resuming_without_a_saved_run_is_refused(workplace):
    assert "There is no out/last.pth" in refusal(run, "--resume", "--output-dir", "out")
    assert not Path("out").exists()
    Path("out").mkdir()
    shutil.copy(TRAINED, "out/last.pth")
    assert "was not written by a run" in refusal(run, "--resume", "--output-dir", "out", "--epochs", "8")


@in_linux
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(workplace, fork):
    process = fork(run, "--epochs", "100000", "--output-dir", "shared")
    wait_for(Path("shared/history.csv"), process)
    assert "(another run is using it; if none is, it ended on another machine: delete shared/.lock)" in refusal(
        run, "--output-dir", "shared"
    )
    process.kill()
    process.join()
    run("--epochs", "1", "--output-dir", "shared")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit file sizes")
@pytest.mark.parametrize("size, file", [(99_000, "u8"), (127_000, "vae_model_8.pth"), (320_000, "last.pth")])
def test_a_full_disk_gives_a_one_line_error_and_old_files_stay_intact(workplace, size, file):
    draw_faces(Path("faces"), 41 if file == "u8" else 0)  # their cache takes 126 kB
    before = [path.read_bytes() for path in workplace.rglob("*.pth")]
    with files_of_at_most(size):
        assert f"{file} cannot be written (File too large)" in refusal(run, "--epochs", "8")
    after = [path.read_bytes() for path in workplace.rglob("*.pth")]
    assert all(content in after for content in before)
    assert not list(workplace.rglob(".*.tmp"))


def test_a_picture_or_table_that_cannot_be_written_is_a_warning(workplace, monkeypatch, capsys):
    Path("out/history.csv").mkdir(parents=True)
    Path("out/progress").touch()
    monkeypatch.setattr(train, "back_up", lambda run: None)
    run("--epochs", "2", "--output-dir", "out")
    said = capsys.readouterr().out
    assert said.count("Warning     out/history.csv cannot be written") == said.count("Warning     out/progress/") == 2
    assert len(vae.load_checkpoint("out/last.pth")[1]["position"]["history"]) == 2
    assert Path("out/loss_curves.png").exists() and Path("out/vae_model_2.pth").exists()


def test_folders_that_cannot_be_written_to(workplace):
    Path("file").touch()
    assert refusal(run, "--output-dir", "file/out").startswith("file/out cannot be written to")


@pytest.mark.parametrize("at", [10, 14])
def test_a_run_that_diverges_keeps_its_last_good_weights(workplace, whole, monkeypatch, at):
    step = train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: step(*args) * (math.inf if args[3] == at else 1))
        assert "The loss at step 5 of epoch 3 is not finite" in refusal(run, *RUN, "--output-dir", "diverged")
    run(*RUN, "--output-dir", "diverged", "--resume")
    assert_same_run(Path("diverged"), whole)
