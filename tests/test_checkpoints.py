"""Checkpoints that somebody else made: of the forerunners, damaged, of something else, or made to do harm."""

import collections
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TRAINED, generate, refusal, run
from faces import draw_face

import vae
from vae import UserError, load_checkpoint


# Checkpoints that want more than to be read
class Call:
    """Pickles as a call, which whoever unpickles it makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


WRITE = "open('executed', 'w').close()"
EVIL = {
    "os.system": Call(os.system, "touch executed"),
    "eval": Call(eval, WRITE),
    "exec": Call(exec, WRITE),
    "subprocess": Call(subprocess.call, ["touch", "executed"]),
    "torch.hub": Call(torch.hub.load, ".", "model", "local"),
    "torch.load": Call(torch.load, "inner.pth", None, None),
    "safe_globals": Call(torch.serialization.add_safe_globals, [os.system]),
    "import": Call(__import__, "executed"),
    "nested": {"state_dict": {"fc_mu.weight": {"deep": [(Call(eval, WRITE),)]}}},
    "in the weights": {"state_dict": collections.OrderedDict(a=torch.zeros(1), b=Call(eval, WRITE))},
    "beside the weights": {"state": {"epoch": Call(eval, WRITE)}},
    "a huge model": Call(vae.VAE, 512, 3, [10**5] * 9, 10**4),
    "a huge layer": Call(torch.nn.Linear, 10**6, 10**6),
}


@pytest.fixture
def hostile(workplace):
    """A folder with a checkpoint for every name in EVIL, in each of three formats, and what it does when executed."""
    good = torch.load(TRAINED)
    for name, evil in EVIL.items():
        whole = good | evil if isinstance(evil, dict) else good | {"state_dict": evil}
        torch.save(whole, f"{name} 1.pth")
        torch.save(whole, f"{name} 2.pth", _use_new_zipfile_serialization=False)
        Path(f"{name} 3.pth").write_bytes(pickle.dumps({"state_dict": evil}, protocol=2))
    Path("executed.py").write_text(WRITE)
    Path("hubconf.py").write_text(WRITE)
    return workplace


def test_no_pickle_is_executed(hostile, capsys, monkeypatch):
    files = sorted(hostile.glob("* [123].pth"))
    assert len(files) == 3 * len(EVIL)
    for path in files:
        code, said = refusal(generate, capsys, "--checkpoint", path.name)
        assert code == 1 and said.count(path.name) == 1
        Path("checkpoints_best/last.pth").write_bytes(path.read_bytes())
        code, said = refusal(run, capsys, "--resume", "--epochs", "8")
        assert code == 1 and "last.pth" in said
    assert not Path("executed").exists()
    print(f"\nCount: {len(files)} hostile pickles refused, by both scripts")
    with pytest.raises(UserError, match=r"it asks for os.system|posix.system, and nothing in a file is ever called"):
        load_checkpoint("os.system 1.pth")


def test_a_hostile_file_in_the_place_of_a_checkpoint_is_kept_unread(hostile):
    evil = Path("eval 1.pth").read_bytes()
    for name in ("vae_model_1", "last"):
        Path(f"checkpoints_best/{name}.pth").write_bytes(evil)
    run("--epochs", "1")
    for name in ("vae_model_1", "last"):
        assert Path(f"checkpoints_best/{name}.previous.pth").read_bytes() == evil
    assert not Path("executed").exists()


def test_the_hostile_files_do_their_work_where_they_are_trusted(hostile, monkeypatch):
    monkeypatch.syspath_prepend(hostile)
    for name in ("os.system", "eval", "exec", "subprocess", "import", "nested"):
        for number in (1, 2):
            torch.load(f"{name} {number}.pth", weights_only=False)
            Path("executed").unlink()
            sys.modules.pop("executed", None)


# Checkpoints of the forerunners
FORERUNNER = """
import torch
from torch import nn

def stage(layer):
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU())

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.final_dim, self.size, self.notes = 8, 6, {"photos": ["a", "b"], "rate": 1e-3}
        self.encoder = nn.Sequential(stage(nn.Conv2d(1, 4, 3, 2, 1)), stage(nn.Conv2d(4, 8, 3, 2, 1)))
        self.fc_mu, self.fc_var = nn.Linear(288, 5), nn.Linear(288, 5)
        self.decoder_input = nn.Linear(5, 288)
        self.decoder = nn.Sequential(stage(nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)))
        last = stage(nn.ConvTranspose2d(4, 4, 3, 2, 1, 1))
        self.final_layer = nn.Sequential(*last, nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid())

    def forward(self, x):
        features = self.encoder(x).flatten(1)
        mu, log_var = self.fc_mu(features), self.fc_var(features)
        return self.final_layer(self.decoder(self.decoder_input(mu).view(-1, 8, 6, 6))), mu, log_var

if __name__ == "__main__":
    import vae
    model = vae.VAE()
    for _ in range(3):
        model(torch.rand(8, 1, 24, 24))
    torch.save(model, "whole.pth")
    torch.save(model.state_dict(), "bare.pth")
    torch.save(model.state_dict(), "bare, old format.pth", _use_new_zipfile_serialization=False)
    x = torch.rand(4, 1, 24, 24)
    torch.save([x, *model.eval()(x)], "expected.pt")
"""


def test_checkpoints_of_the_forerunners_load(tmp_path):
    (tmp_path / "vae.py").write_text(FORERUNNER)
    subprocess.run([sys.executable, "vae.py"], cwd=tmp_path, check=True)
    x, *expected = torch.load(tmp_path / "expected.pt")
    for name in ("whole.pth", "bare.pth", "bare, old format.pth"):
        model, info = load_checkpoint(tmp_path / name)
        assert info == {} and not model.training and not model.prior_is_fitted() and not hasattr(model, "notes")
        assert type(model.encoder[0][0]) is torch.nn.Conv2d and type(model) is vae.VAE
        mu, log_var = model.encode(x)
        torch.testing.assert_close([model.decode(mu), mu, log_var], expected)


def test_weights_of_half_precision_become_float32(tmp_path):
    model = vae.VAE(24, 1, [4, 8], 5).half()
    vae.save_checkpoint(tmp_path / "half.pth", model)
    loaded = load_checkpoint(tmp_path / "half.pth")[0]
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(loaded.fc_mu.weight, model.fc_mu.weight.float())


def test_only_the_weights_of_a_pickled_module_are_taken(tmp_path):
    model = vae.VAE(24, 1, [4, 8], 5)
    model.state_dict = model.load_state_dict = model.named_parameters = model.notes = "hidden"
    model._state_dict_hooks[0] = model.encoder._load_state_dict_pre_hooks[0] = torch.nn.Linear(10**3, 1)
    torch.save(model, tmp_path / "odd.pth")
    loaded, info = load_checkpoint(tmp_path / "odd.pth")
    assert info == {} and not {"state_dict", "notes"} & vars(loaded).keys() and not loaded._state_dict_hooks
    assert torch.equal(loaded.fc_mu.weight, model.fc_mu.weight)


def test_methods_that_a_file_has_hidden_are_not_missed(workplace):
    odd = collections.OrderedDict(torch.load(TRAINED))
    odd.get = odd.pop = "hidden"
    torch.save(odd, "checkpoints_best/last.pth")
    generate("--checkpoint", "checkpoints_best/last.pth")
    run("--epochs", "1")


# Checkpoints that are none
def wrong_checkpoints():
    """Yield (name, bytes, what is said of them)."""
    model = vae.VAE(24, 1, [4, 8], 5)
    state, not_read = model.state_dict(), "is not a checkpoint: it "

    def saved(value, **options):
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    whole, repacked, photo, photos = saved(state), io.BytesIO(), io.BytesIO(), io.BytesIO()
    draw_face(1).save(photo, "JPEG")
    with zipfile.ZipFile(photos, "w") as archive:
        archive.writestr("face.jpg", photo.getvalue())
    bomb = saved({**state, "bomb": torch.zeros(10**6)})
    with zipfile.ZipFile(io.BytesIO(bomb)) as old, zipfile.ZipFile(repacked, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    yield "empty", b"", not_read + "is empty."
    yield "text", b"epoch,train_loss\n1,2\n", not_read + "is a text file."
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "pointer", pointer, "is a Git LFS pointer, and `git lfs pull` fetches the file"
    yield "cut", whole[:5000], not_read + "is damaged or cut short."
    yield "cut at its end", whole[:-30], not_read + "is damaged or cut short."
    for name, archive in (("packed", repacked), ("photos", photos)):
        yield name, archive.getvalue(), not_read + "is a zip archive that torch.save has not written."
    yield "photo", photo.getvalue(), not_read + "is in no format that can be read safely."
    yield "list", saved([1, 2]), "does not hold the weights of a VAE of this kind"
    yield "tensor", saved(torch.zeros(3)), "does not hold the weights of a VAE of this kind"
    other = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}
    yield "other", saved(other), "(it has no encoder.0.0.weight, but conv1.weight, bn1.weight and so on)."
    shape = {**state, "fc_mu.bias": torch.zeros(6)}
    yield "shape", saved(shape), "(fc_mu.bias is (6,) in the file and (5,) in the model)."
    missing = {name: tensor for name, tensor in state.items() if name != "decoder.0.1.bias"}
    yield "missing", saved(missing), "(decoder.0.1.bias is nothing in the file and (4,) in the model)."
    yield "more", saved({**state, "more": torch.zeros(1)}), "(more is (1,) in the file and nothing in the model)."
    for value in (float("nan"), float("inf")):
        spoilt = {**state, "fc_var.bias": torch.full((5,), value)}
        yield str(value), saved(spoilt), "(fc_var.bias is not finite)."
    config = {"image_size": 512, "channels": 3, "hidden_dims": [30_000] * 3, "latent_dim": 5}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vae.VAE(**config).state_dict().items()}
    bomb = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    yield "bomb", saved({"config": config, "state_dict": bomb}), "(its weights take more memory than the file)."
    for size in ("24", 24.0, [[()] * 99] * 99):
        config = {**model.config, "image_size": size}
        yield f"size {type(size)}", saved({"config": config, "state_dict": state}), "it must be a whole number.)."
    yield (
        "complex",
        saved({**state, "fc_mu.bias": torch.zeros(5, dtype=torch.cfloat)}),
        "(fc_mu.bias is of torch.complex64).",
    )
    loop = torch.nn.Sequential(torch.nn.Sequential())
    for _ in range(60):  # without a memory of where it was, 2 ** 60 layers to walk through
        loop = torch.nn.Sequential(loop, loop)
    yield "maze", saved(loop), "(it has no encoder.0.0.weight, but  and so on)."


WRONG = {name: more for name, *more in wrong_checkpoints()}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_is_told_apart(name, workplace, capsys):
    data, words = WRONG[name]
    Path(f"{name}.pth").write_bytes(data)
    code, said = refusal(generate, capsys, "--checkpoint", f"{name}.pth")
    assert code == 1 and said.count(f"{name}.pth") == 1 and words in said
    Path("checkpoints_best/last.pth").write_bytes(data)
    code, said = refusal(run, capsys, "--resume", "--epochs", "8")
    assert code == 1 and words in said


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_as_good_as_new(count, trained, tmp_path):
    good, path, outcomes = (trained / TRAINED).read_bytes(), tmp_path / "damaged.pth", collections.Counter()
    state = load_checkpoint(trained / TRAINED)[0].state_dict()
    for number in range(count):
        dice, data = random.Random(number), bytearray(good)
        place, kind = dice.randrange(len(data)), "cut" if number % 5 == 0 else "flipped"
        if kind == "cut":
            del data[place:]
        else:
            data[place] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)[0].state_dict()
        except UserError as error:
            assert str(error).startswith(f"{path} ") and error.code == 1 and "\n" not in str(error)
            outcomes[f"{kind} and refused"] += 1
        else:  # the bytes between the records, and what is told of them twice, mean nothing
            assert all(torch.equal(loaded[name], state[name]) for name in state)
            outcomes[f"{kind} and as good as new"] += 1
    print(f"\nCount: {count} damaged checkpoints: {dict(outcomes)}")
    assert outcomes["cut and refused"] == count / 5 and outcomes["flipped and refused"] > 0.6 * count
