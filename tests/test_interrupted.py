"""Runs that are stopped, killed, starved of disk or diverge: nothing is lost, and each goes on where it can."""

import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TRAINED, files_of_at_most, refusal, run, same_weights
from faces import draw_faces

import train
import vae

in_linux = pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")
RUN = ["--epochs", "3", "--kl-warmup-epochs", "2", "--reconstruction", "ssim"]  # 5 steps each


@pytest.fixture
def fork():
    """A function that starts a call in a process of its own, which has imported everything already."""
    processes = []

    def start(call, *flags):
        processes.append(multiprocessing.get_context("fork").Process(target=call, args=flags))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def wait_for(path):
    """Wait until there is a file, which a process is about to write, but not for ever."""
    start = time.monotonic()
    while not Path(path).exists():
        assert time.monotonic() - start < 60
        time.sleep(0.001)


def history(path):
    """Return the figures of all epochs that a last.pth holds, but for the speed, which is never the same."""
    return [{**row, "images_per_second": 0} for row in vae.load_checkpoint(path)[1]["state"]["history"]]


def assert_same_run(one, other):
    """See that two folders hold the same finished run, and nothing half written."""
    for name in ("last.pth", "vae_model_3.pth"):
        assert same_weights(f"{one}/{name}", f"{other}/{name}")
    assert history(f"{one}/last.pth") == history(f"{other}/last.pth")
    moments = [vae.load_checkpoint(f"{name}/last.pth")[1]["optimizer"]["state"] for name in (one, other)]
    assert all(torch.equal(moments[0][k][name], moments[1][k][name]) for k in moments[0] for name in moments[0][k])
    files = [{path.relative_to(name) for path in Path(name).rglob("*")} for name in (one, other)]
    assert files[0] == files[1]


@pytest.fixture
def whole(workplace):
    """The folder in which faces/ are, and a finished run that nobody disturbed: whole/."""
    run(*RUN, "--output-dir", "whole")
    return workplace


# Killed
@in_linux
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_never_was(whole, kills, fork):
    start, moments = time.perf_counter(), []
    fork(run, *RUN, "--output-dir", "timed").join()
    duration = time.perf_counter() - start
    for number in range(kills):
        out = Path(f"killed {number}")
        process = fork(run, *RUN, "--output-dir", str(out))
        wait_for(out / "last.pth")
        time.sleep(random.Random(number).random() * 0.7 * duration)
        process.kill()
        process.join()
        moments.append(process.exitcode)
        for path in out.glob("vae_model_*.pth"):
            vae.load_checkpoint(path)
        run(*RUN, "--output-dir", str(out), "--resume")
        assert_same_run("whole", out)
    count = moments.count(-signal.SIGKILL)
    print(f"\nCount: {count} kills at random moments survived")
    assert count > kills / 2  # the others had just finished


class DieWriting:
    """Stands in for Path.write_bytes: ends the process halfway through the file of that number."""

    def __init__(self, number):
        self.files_left, self.write = number, Path.write_bytes

    def __call__(self, data, path):
        self.write(path, data[: len(data) // 2] if self.files_left == 0 else data)
        if self.files_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.files_left -= 1


@in_linux
@pytest.mark.parametrize("number", [pytest.param(k, marks=pytest.mark.slow if k > 2 else ()) for k in range(18)])
def test_a_run_that_is_killed_while_it_writes_goes_on_as_if_it_never_was(whole, monkeypatch, number, fork):
    die = DieWriting(number)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: die(data, path))
        process = fork(run, *RUN, "--output-dir", "killed")
        process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(Path("killed").rglob(".partial-*"))) == 1
    for path in Path("killed").glob("vae_model_*.pth"):
        vae.load_checkpoint(path)
    run(*RUN, "--output-dir", "killed", *(["--resume"] if number else []))  # file 0 is the first last.pth
    assert_same_run("whole", "killed")
    print("\nCount: 1 kill halfway through a file survived")


@in_linux
def test_what_a_killed_run_has_left_is_kept_when_it_is_started_anew(workplace, capsys, fork):
    flags = ["--epochs", "100000", "--output-dir", "out"]
    process = fork(run, *flags)
    wait_for("out/progress/epoch_02_samples.png")
    process.kill()
    process.join()
    left = {name: Path(f"out/{name}.pth").read_bytes() for name in ("vae_model_100000", "last")}
    process = fork(run, *flags)
    for name, data in left.items():
        wait_for(f"out/{name}.previous.pth")
        assert Path(f"out/{name}.previous.pth").read_bytes() == data
    process.kill()
    process.join()


def test_a_run_that_took_no_step_is_not_kept(workplace, monkeypatch, capsys):
    def fail(*_):
        raise vae.UserError("no step")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", fail)
        for _ in range(2):
            assert refusal(run, capsys)[1] == f"{Path(sys.argv[0]).name}: no step\n"
    run("--epochs", "20", "--resume")
    assert [path.name for path in workplace.rglob("*previous*")] == ["previous"]  # the pictures of the run before


# Stopped
class Interrupt:
    """Stands in for train_step: sends this process a signal during the step of that number."""

    def __init__(self, at, number):
        self.step, self.at, self.number = train.train_step, at, number

    def __call__(self, network, optimizer, images, count, step, progress):
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return self.step(network, optimizer, images, count, step, progress)


@pytest.mark.parametrize(("at", "number"), [(0, 2), (4, 2), (7, signal.SIGTERM), (12, 2), (14, 2)])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(whole, monkeypatch, capsys, at, number):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "train_step", Interrupt(at, number))
        run(*RUN, "--output-dir", "parts")
    assert stop.value.code == 128 + number
    said = capsys.readouterr().out
    assert f"Stopped in epoch {at // 5 + 1}" in said and "python train.py --data faces" in said and "--resume" in said
    saved = vae.load_checkpoint("parts/last.pth")[1]["state"]
    assert 5 * saved["epoch"] + saved["step"] == at + 1

    run(*RUN, "--output-dir", "parts", "--resume")
    assert_same_run("whole", "parts")
    assert not Path("parts/previous").exists()


def test_the_second_ctrl_c_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
    with pytest.raises(KeyboardInterrupt), train.stop_requests() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_unfinished_run_is_kept_when_another_takes_its_place(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", Interrupt(7, signal.SIGINT))
        run("--epochs", "3")
    unfinished = (workplace / "checkpoints_best/last.pth").read_bytes()
    run("--epochs", "1")
    assert (workplace / "checkpoints_best/last.previous.pth").read_bytes() == unfinished
    assert "kept as checkpoints_best/last.previous.pth" in capsys.readouterr().out
    run("--epochs", "1")  # after a finished run there is nothing to keep for --resume
    assert not (workplace / "checkpoints_best/last.previous-2.pth").exists()


# Resumed
def test_resuming_a_finished_run_says_so(workplace, capsys):
    before = {path: path.read_bytes() for path in workplace.glob("checkpoints_best/*.*")}
    run("--epochs", "8", "--resume")
    assert "after epoch 8 of 8, the last: this run is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in workplace.glob("checkpoints_best/*.*")} == before


def test_a_run_does_not_go_on_with_other_settings(workplace, capsys):
    flags = ["--resume", "--epochs", "3", "--batch-size", "4", "--hidden-dims", "8", "4"]
    code, said = refusal(run, capsys, *flags)
    changes = "BATCH_SIZE was 8 and is 4; EPOCHS was 8 and is 3; HIDDEN_DIMS was [8, 16] and is [8, 4]"
    assert code == 2 and changes in said
    draw_faces(workplace / "faces", 41)
    code, said = refusal(run, capsys, "--resume", "--epochs", "8")
    assert code == 2 and "photos was 40 photos" in said and "is 41 photos" in said
    (workplace / "faces/face 040.jpg").unlink()
    (workplace / "faces/face 000.jpg").rename(workplace / "faces/another.jpg")
    code, said = refusal(run, capsys, "--resume", "--epochs", "8")
    assert code == 2 and said.count("40 photos") == 2


def test_a_constant_edited_without_its_annotation_still_counts(workplace, capsys, monkeypatch):
    monkeypatch.setattr(train, "LEARNING_RATE", 0.5)
    monkeypatch.delitem(train.__annotations__, "LEARNING_RATE")
    flags = [flag for flag in SMALL if "learning-rate" not in flag]
    code, said = refusal(train.main, capsys, ["--data", "faces", *flags, "--epochs", "8", "--resume"])
    assert code == 2 and "LEARNING_RATE was 0.01 and is 0.5" in said


def test_a_run_knows_its_photos_by_any_name_of_their_folder_and_never_learns_from_its_pictures(workplace, monkeypatch):
    flags = [*SMALL, "--epochs", "2", "--output-dir", "out"]
    monkeypatch.chdir("faces")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", Interrupt(7, signal.SIGINT))
        train.main(["--data", ".", *flags])
    train.main(["--data", str(workplace / "faces"), *flags, "--resume"])
    assert vae.load_checkpoint("out/last.pth")[1]["state"]["epoch"] == 2


def test_nothing_to_resume(workplace, capsys):
    code, said = refusal(run, capsys, "--resume", "--output-dir", "nowhere")
    assert code == 2 and "no nowhere/last.pth to resume from" in said and not Path("nowhere").exists()
    Path("checkpoints_best/last.pth").write_bytes(Path(TRAINED).read_bytes())
    code, said = refusal(run, capsys, "--resume", "--epochs", "8")
    assert code == 1 and "is not the last.pth of a run" in said


@pytest.mark.parametrize(
    "spoil",
    [
        lambda info: info.update(state=[1, 2]),
        lambda info: info.update(constants=None),
        lambda info: info["state"].update(step="7"),
        lambda info: info["state"].update(step=-7),
        lambda info: info["state"].update(step=10**9),
        lambda info: info["state"].update(epoch=10**30),
        lambda info: info["state"].update(epoch=-5, history=[]),
        lambda info: info["state"].update(sums=[0.0] * 3),
        lambda info: info["state"].update(sums=[torch.zeros(1)] * 4),
        lambda info: info["constants"].update({1: 2}),
        lambda info: info["constants"].update(BETA=[[()]]),
        lambda info: info["state"].update(history=[{"epoch": 1}] * 8),
        lambda info: info["state"]["history"][3].update(val_loss="low"),
        lambda info: info["state"]["history"][0].pop("val_kl"),
        lambda info: info["optimizer"].update(state=[1]),
        lambda info: info["state"].pop("id"),
        lambda info: info["optimizer"]["state"].update({99: info["optimizer"]["state"][0]}),
        lambda info: info["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
        lambda info: info["optimizer"]["state"][0].pop("exp_avg_sq"),
        lambda info: info.pop("optimizer"),
    ],
)
def test_a_last_pth_that_somebody_has_edited_is_refused(workplace, capsys, spoil):
    model, info = vae.load_checkpoint("checkpoints_best/last.pth")
    spoil(info)
    vae.save_checkpoint("checkpoints_best/last.pth", model, **info)
    code, said = refusal(run, capsys, "--resume", "--epochs", "8")
    assert code == 1 and re.search(
        r"last.pth (is not the last.pth of a run|does not hold the weights and moments)", said
    )


def test_moments_that_take_no_memory_are_given_some(workplace):
    model, info = vae.load_checkpoint("checkpoints_best/last.pth")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    moments = info["optimizer"]["state"]
    moments[0]["exp_avg"] = torch.ones(1).expand(moments[0]["exp_avg"].shape)
    train.load_moments(optimizer, moments)
    weight = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


# Without room, or without permission
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_cache_that_cannot_be_written_ends_with_a_sentence(workplace, capsys):
    draw_faces(workplace / "faces", 41)
    before = set(workplace.rglob("*"))
    with files_of_at_most(100_000):  # the photos take 126 kB
        code, said = refusal(run, capsys)
    assert code == 1 and re.search(r"data/cache/\S+\.u8 cannot be written \(File too large\): it takes 0.13 MB.", said)
    assert set(workplace.rglob("*")) == before | {workplace / "data/cache/.lock"}


def test_the_room_for_the_cache_is_checked_before_it_is_built(workplace, monkeypatch, capsys):
    draw_faces(workplace / "faces", 41)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
    monkeypatch.setattr(train, "crop_photos", None)
    code, said = refusal(run, capsys)
    assert code == 1 and "cannot be written (No space left on device): it takes 0.13 MB" in said


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize(("size", "takes"), [(100_000, "0.13"), (300_000, "0.38")])
def test_a_full_disk_ends_the_run_with_a_sentence_and_leaves_what_was_there(whole, capsys, size, takes):
    before = Path(TRAINED).read_bytes()
    with files_of_at_most(size):  # either too little for the last.pth of step 0, or for one with Adam's moments
        code, said = refusal(run, capsys, *RUN)
    sentence = f"checkpoints_best/last.pth cannot be written (File too large): it takes {takes} MB."
    assert code == 1 and sentence in said and not list(whole.rglob(".partial-*"))
    assert Path(TRAINED).read_bytes() == before
    if size > 200_000:
        run(*RUN, "--resume")
        assert same_weights("checkpoints_best/last.pth", "whole/last.pth")


def test_folders_that_cannot_be_written_to(unprivileged, capsys):
    draw_faces(Path("faces"), 41)
    Path("data/cache").chmod(0o555)
    code, said = refusal(run, capsys)
    assert code == 2 and "data/cache cannot be written to (Permission denied): the decoded photos take 0.13 MB" in said
    Path("checkpoints_best").chmod(0o555)
    for folder in ("checkpoints_best", "checkpoints_best/new"):
        code, said = refusal(run, capsys, "--output-dir", folder)
        assert code == 2 and f"{folder} cannot be written to (Permission denied)" in said and "--output-dir" in said
    Path("file").touch()
    code, said = refusal(run, capsys, "--output-dir", "file")
    assert code == 2 and "file cannot be written to" in said


# Diverging
@pytest.mark.parametrize("kind", ["mse", "ssim", "bce", "sigma"])
def test_a_loss_that_explodes_ends_the_run_within_the_epoch(kind, workplace, monkeypatch, capsys):
    draw_faces(workplace / "faces", 300)
    step, steps = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(args) or step(*args))
    flags = ["--epochs", "8", "--batch-size", "2", "--learning-rate", "1e12", "--reconstruction", kind]
    before = Path(TRAINED).read_bytes()
    code, said = refusal(run, capsys, *flags)
    number = int(re.search(r"The loss of step (\d+) of epoch 1 is not finite: start anew with a LEARN", said)[1])
    assert code == 1 and 2 <= number <= len(steps) == 50
    assert Path(TRAINED).read_bytes() == before


def test_losses_are_looked_at_every_50_steps(workplace, monkeypatch, capsys):
    draw_faces(workplace / "faces", 300)
    figures = iter([torch.ones(4)] * 60 + [torch.full((4,), math.inf)] + [torch.ones(4)] * 39)
    monkeypatch.setattr(train, "train_step", lambda *_: next(figures))
    code, said = refusal(run, capsys, "--batch-size", "2")
    assert code == 1 and "The loss of step 61 of epoch 1 is not finite" in said and next(figures, None) is None


@pytest.mark.parametrize("at", [10, 13, 14])
def test_a_run_that_diverges_keeps_its_last_good_weights(whole, monkeypatch, capsys, at):
    step = train.train_step

    def explode(network, optimizer, images, count, number, progress):
        losses = step(network, optimizer, images, count, number, progress)
        return losses * math.inf if number == at else losses

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", explode)
        code, said = refusal(run, capsys, *RUN, "--output-dir", "diverged")
    assert code == 1 and f"The loss of step {at - 9} of epoch 3 is not finite" in said
    assert "diverged/last.pth keeps the last good weights" in said
    assert history("diverged/last.pth") == history("whole/last.pth")[:2]
    run(*RUN, "--output-dir", "diverged", "--resume")
    assert_same_run("whole", "diverged")


def test_weights_that_are_not_finite_are_never_saved(workplace, monkeypatch, capsys):
    def spoil(model, *_):
        model.fc_mu.bias.data[3] = math.nan
        figures = ("val_loss", "val_reconstruction", "val_kl", "val_squared_error", "val_psnr")
        return dict.fromkeys(figures, 1.0), torch.zeros(2, 8), torch.zeros(2, 8)

    monkeypatch.setattr(train, "evaluate", spoil)
    monkeypatch.setattr(train, "fit_prior", lambda *_: torch.zeros(2, 8))
    before = Path(TRAINED).read_bytes()
    code, said = refusal(run, capsys, "--epochs", "8")
    assert code == 1 and f"fc_mu.bias is no longer finite, so {TRAINED} has not been written" in said
    assert Path(TRAINED).read_bytes() == before


def test_a_validation_that_is_not_finite_ends_the_run(workplace, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"val_loss": math.nan}, None, None))
    code, said = refusal(run, capsys)
    assert (
        code == 1 and "The validation loss of epoch 1 is not finite: start anew with a LEARNING_RATE below 0.01" in said
    )


def test_codes_that_explode_end_with_a_sentence():
    model, photos = vae.VAE(16, 1, [4], 8), torch.randint(0, 256, (5, 16, 16, 1), dtype=torch.uint8)
    model.fc_mu.weight.data *= 1e12
    with pytest.raises(vae.UserError, match="start anew with a LEARNING_RATE below"):
        train.fit_prior(model, photos, torch.arange(5), torch.device("cpu"))


# Side by side
def test_the_folder_of_a_run_is_its_own(workplace, capsys):
    Path("link").symlink_to("data/cache")
    for folder in ("data/cache", "link", "faces"):
        code, said = refusal(run, capsys, "--output-dir", folder)
        assert code == 2 and f"OUTPUT_DIR is '{folder}': it must be no folder of photos or their cache" in said


def test_what_is_not_ours_stays_in_the_folder_of_a_run(workplace):
    Path("checkpoints_best/.partial-folder").mkdir()
    run("--epochs", "1")
    assert Path("checkpoints_best/.partial-folder").is_dir()


@in_linux
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(workplace, capsys, fork):
    process = fork(run, "--epochs", "100000", "--output-dir", "shared")
    wait_for("shared/history.csv")
    code, said = refusal(run, capsys, "--epochs", "1", "--output-dir", "shared")
    assert code == 1 and "Another run is at work in shared: wait for its end, or name another --output-dir." in said
    assert process.is_alive() and not list(Path("shared").glob("*previous*"))
    process.kill()
    process.join()
    run("--epochs", "1", "--output-dir", "shared")
    assert Path("shared/vae_model_1.pth").exists()


@in_linux
def test_two_runs_that_want_the_same_cache_decode_it_once(workplace, monkeypatch, fork):
    draw_faces(workplace / "faces", 60)

    def slowly(photos, *size, crop=train.crop_photos, **sizes):
        with open("decoded", "ab") as file:
            file.write(b"." * len(photos))
        time.sleep(0.2)
        return crop(photos, *size, **sizes)

    monkeypatch.setattr(train, "crop_photos", slowly)
    runs = [fork(run, "--epochs", "1", "--output-dir", f"out {number}") for number in range(2)]
    for process in runs:
        process.join()
        assert process.exitcode == 0
    assert Path("decoded").stat().st_size == 60 and same_weights("out 0/last.pth", "out 1/last.pth")


@in_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_while_processes_decode_can_be_started_again_at_once(workplace, monkeypatch, number, fork):
    draw_faces(workplace / "faces", 300)
    monkeypatch.setattr(train, "cores", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "crop_photos", lambda *_, **__: time.sleep(12))
        process = fork(run, "--epochs", "1")
        wait_for(Path("data/cache/.lock"))
        time.sleep(1)
        os.kill(process.pid, number)
        process.join()
    assert len(list(Path("data/cache").glob(".partial-*"))) == (number == signal.SIGKILL)
    run("--epochs", "1")
    assert process.exitcode == (-9 if number == signal.SIGKILL else 143) and Path("checkpoints_best/last.pth").exists()


@in_linux
def test_processes_that_decode_end_with_a_run_that_is_killed(workplace, monkeypatch, fork):
    draw_faces(workplace / "faces", 300)

    def slowly(photos, **_):
        Path(f"worker {os.getpid()}").touch()
        time.sleep(0.2)
        return [None] * len(photos)

    monkeypatch.setattr(train, "cores", lambda: 2)
    monkeypatch.setattr(train, "crop_photos", slowly)
    process = fork(run, "--epochs", "1")
    while len(workers := [path.name.split()[1] for path in workplace.glob("worker *")]) < 2:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
        for number in workers
        if Path(f"/proc/{number}").exists()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@in_linux
def test_a_cache_whose_making_was_killed_is_made_anew(workplace, monkeypatch, fork):
    draw_faces(workplace / "faces", 60)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(train, "crop_photos", die)
        fork(run, "--epochs", "1").join()
    assert len(list(Path("data/cache").glob(".partial-*"))) == 1
    run("--epochs", "1")
    assert not list(Path("data/cache").glob(".partial-*")) and len(list(Path("data/cache").glob("*.u8"))) == 2


@pytest.mark.parametrize("size", [0, 1000, 3072 * 40 - 1])
def test_a_cache_that_was_cut_short_is_made_anew(workplace, size):
    cache = next(Path("data/cache").glob("*.u8"))
    whole = cache.read_bytes()
    os.truncate(cache, size)
    run("--epochs", "1")
    assert cache.read_bytes() == whole
