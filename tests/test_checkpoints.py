"""Tests of checkpoints: saving, loading, other projects' files, and damaged, invalid or malicious files."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAINED, generate, refusal, run
from torch import nn

import vae
from vae import UserError, load_checkpoint, save_checkpoint


@pytest.fixture
def model():
    """A small model with a fitted prior, and BatchNorm statistics that differ from their initial values."""
    model = vae.VAE(24, 1, [4, 8], 5)
    model(torch.rand(8, 1, 24, 24))
    model.fit_prior(torch.randn(20, 5), torch.randn(20, 5))
    return model.eval()


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_restores_the_model_and_its_info(model, half, tmp_path):
    save_checkpoint(tmp_path / "model.pth", model, half, epoch=3, constants={"BETA": 0.5, "HIDDEN_DIMS": [4, 8]})
    loaded, info = load_checkpoint(tmp_path / "model.pth")
    assert (loaded.config, loaded.training) == (model.config, False)
    assert info == {"face_box": None, "epoch": 3, "constants": {"BETA": 0.5, "HIDDEN_DIMS": [4, 8]}}
    learnt = dict(model.named_parameters())
    expected = {name: t.half().to(t.dtype) if half and name in learnt else t for name, t in model.state_dict().items()}
    torch.testing.assert_close(dict(loaded.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_checkpoints_of_wrapped_models_load(model, wrap, tmp_path):
    save_checkpoint(tmp_path / "saved.pth", wrap(model))
    torch.save({"config": model.config, "state_dict": wrap(model).state_dict()}, tmp_path / "wrapped.pth")
    for path in tmp_path.iterdir():
        torch.testing.assert_close(dict(load_checkpoint(path)[0].state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(("value", "half"), [(float("nan"), False), (float("inf"), False), (1e6, True)])
def test_non_finite_weights_are_never_saved_and_the_old_file_is_kept(model, value, half, tmp_path):
    (tmp_path / "model.pth").write_text("old")
    model.fc_mu.bias.data[0] = value  # 1e6 does not fit in 16 bits
    with pytest.raises(UserError, match=r"model\.pth was not written: fc_mu\.bias is no longer finite"):
        save_checkpoint(tmp_path / "model.pth", model, half)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["state dict", "state dict in the old format", "module"])
def test_checkpoints_of_the_original_projects_load(kind, tmp_path):
    ancestor = vae.VAE()  # published models have the same layer names, plus a final sigmoid
    ancestor.final_layer.append(nn.Sigmoid())
    for name in ("config", "face_box", "latent_mean", "latent_scale"):
        delattr(ancestor, name)
    ancestor.notes = {"photos": ["a", "b"], "rate": 1e-3}
    content = ancestor if kind == "module" else ancestor.state_dict()
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization="old" not in kind)
    model, info = load_checkpoint(tmp_path / "old.pth")
    assert (type(model), type(model.encoder[0][0])) == (vae.VAE, nn.Conv2d)
    assert info == {} and not hasattr(model, "notes")
    prior = {"latent_mean": torch.zeros(128), "latent_scale": torch.eye(128)}
    torch.testing.assert_close(dict(model.state_dict()), {**ancestor.state_dict(), **prior}, rtol=0, atol=0)


class Call(tuple):
    """A function and its arguments; unpickling it calls the function."""

    def __reduce__(self):
        return self[0], self[1:]


WRITE = "open('executed', 'w').close()"
EVIL = {
    "eval": Call((eval, WRITE)),
    "pickle in pickle": Call((pickle.loads, pickle.dumps(Call((eval, WRITE))))),
    "nested": {"state_dict": {"fc_mu.weight": {"deep": [(Call((eval, WRITE)),)]}}},
    "in the weights": {"state_dict": {"fc_mu.bias": torch.zeros(1), "more": Call((eval, WRITE))}},
    "beside the weights": {"state": {"epoch": Call((eval, WRITE))}},
    "safe globals": Call((torch.serialization.add_safe_globals, [os.system])),
    "huge model": Call((vae.VAE, 512, 3, [10**5] * 9, 10**4)),
}


def test_no_pickle_is_ever_executed(workplace):
    for name, evil in EVIL.items():
        whole = torch.load(TRAINED) | (evil if isinstance(evil, dict) else {"state_dict": evil})
        torch.save(whole, f"{name} 1.pth")
        torch.save(whole, f"{name} 2.pth", _use_new_zipfile_serialization=False)
        Path(f"{name} 3.pth").write_bytes(pickle.dumps({"state_dict": evil}, protocol=2))
    files = sorted(workplace.glob("* [123].pth"))
    for path in files:
        assert refusal(generate, "--checkpoint", path.name) == f"{path.name} {UNREAD}"
        path.replace("checkpoints_best/last.pth")
        assert refusal(run, "--resume", "--epochs", "8") == f"checkpoints_best/last.pth {UNREAD}"
    assert not Path("executed").exists() and os.system not in torch.serialization.get_safe_globals()
    pickle.loads(pickle.dumps(EVIL["eval"]))
    assert Path("executed").exists()  # the payload does work if it is unpickled
    print(f"\nCount: {len(files)} malicious pickles refused by both scripts")


def test_weights_that_share_or_repeat_memory_become_separate(tmp_path):
    state = vae.VAE(16, 1, [4], 3).state_dict()
    state["fc_mu.bias"] = state["fc_var.bias"] = torch.ones(1).expand(3)
    config = {"image_size": 16, "channels": 1, "hidden_dims": [4], "latent_dim": 3}
    torch.save({"config": config, "state_dict": state}, tmp_path / "model.pth")
    model, _ = load_checkpoint(tmp_path / "model.pth")
    model.fc_mu.bias.data[0] = 2
    assert model.fc_mu.bias.tolist() == [2, 1, 1] and model.fc_var.bias.tolist() == [1, 1, 1]


UNREAD = "is damaged or is not a checkpoint of tensors and plain Python types."
CONFIG = {"image_size": 24, "channels": 1, "hidden_dims": [4, 8], "latent_dim": 5}
STATE = vae.VAE(**CONFIG).state_dict()
GOOD = {"config": CONFIG, "state_dict": STATE}
WRONG = {
    "empty": (b"", UNREAD),
    "photo": ((ROOT / "data/tested_data/sample.jpg").read_bytes(), UNREAD),
    "archive": (b"PK\5\6" + bytes(18), UNREAD),
    "other model": ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "does not contain VAE weights"),
    "other size": (STATE, "that match its config or vae.py (Error(s) in loading"),
    "missing": ({"config": CONFIG, "state_dict": {}}, "Missing key(s) in state_dict"),
    "shape": ({"config": CONFIG, "state_dict": {**STATE, "fc_mu.bias": torch.zeros(6)}}, "size mismatch for fc_mu."),
    "face": (GOOD | {"face_box": "abc"}, "invalid face_box 'abc'"),
    "no face": (GOOD | {"face_box": [0.1, 0.1, 0.0]}, "invalid face_box [0.1, 0.1, 0.0]"),
    "names": (GOOD | {"attributes": "ab", "directions": torch.ones(2, 5)}, "invalid attributes or directions"),
    "rows": (GOOD | {"attributes": ["a"], "directions": torch.ones(2, 5)}, "invalid attributes or directions"),
    "infinite": (GOOD | {"attributes": ["a"], "directions": torch.ones(1, 5) / 0}, "invalid attributes or directions"),
    "nan": ({"config": CONFIG, "state_dict": {**STATE, "fc_mu.bias": torch.zeros(5) / 0}}, "a weight is not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_checkpoints_give_a_one_line_error(name, workplace):
    content, words = WRONG[name]
    path = Path("checkpoints_best/last.pth")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for said in (refusal(generate, "--checkpoint", str(path)), refusal(run, "--resume", "--epochs", "8")):
        assert said.startswith(f"{path} ") and words in said


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_loads_correctly(count, trained, tmp_path):
    good = (trained / TRAINED).read_bytes()
    state = load_checkpoint(trained / TRAINED)[0].state_dict()
    refused = 0
    for number in range(count):
        data = bytearray(good)
        place, bit = divmod(random.Random(number).randrange(8 * len(data)), 8)
        data[place] ^= 1 << bit
        path = tmp_path / f"{number}.pth"
        path.write_bytes(data if number % 5 else data[:place])
        try:
            loaded = load_checkpoint(path)[0].state_dict()
        except UserError as error:
            assert str(error).startswith(f"{path} ")
            refused += 1
        else:  # bytes between zip records, and duplicate headers, do not matter
            assert number % 5 > 0 and all(torch.equal(loaded[name], state[name]) for name in state)
    print(f"\nCount: {count} damaged checkpoints, {refused} refused, the others loaded correctly")
    assert refused > 0.6 * count
