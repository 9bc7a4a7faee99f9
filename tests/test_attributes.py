"""Tests of ATTRIBUTES and EDIT: tables and folders of attributes, their directions, and pictures changed along them."""

import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED, generate, refusal, run
from faces import draw_face
from PIL import Image
from test_genpic import apart, pictures
from test_resume import signal_in_step

import vae
from data.attributes import Labels, fit_directions, parse_edit, read_labels
from data.photos import Photo, find_photos

NAMES = [f"{number:06d}.jpg" for number in range(40)]
PHOTOS = [Photo(Path("photos", name)) for name in NAMES]
ADD = ["--attributes=table.csv", f"--start-from={TRAINED}", "--epochs=0", "--output-dir=out"]


def write_table(path, header, separator, row):
    """Write a table of NAMES in random order, smiling if even, with a beard below 15."""
    rows = [
        row.format(name=name, stem=name[:-4], here=Path.cwd(), smile=1 - 2 * (n % 2), beard=1 if n < 15 else -1)
        for n, name in enumerate(NAMES)
    ]
    random.Random(0).shuffle(rows)
    Path(path).write_text((header + "".join(rows)).replace(",", separator), "utf-8")


def table_of_faces(path="table.csv", names="Bright,Round_Face", seed=0):
    """Write a table of random attributes of the drawn faces."""
    dice = random.Random(seed)
    rows = [f"face {number:03d}.jpg,{dice.choice((-1, 1))},{dice.choice((0, 1))}" for number in range(40)]
    Path(path).write_text("\n".join([f"file,{names}", *rows]))


TABLES = {
    "celeba.txt": ("40\nWide_Smile Beard \n", " ", "{name}  {smile} {beard}\n"),
    "kaggle.csv": ("image_id,Wide_Smile,Beard\n", ",", '"{name}",{smile},{beard}\n'),
    "excel.csv": ("\ufefffile,Wide_Smile,Beard\n", ";", "{name},{smile},{beard}\n"),
    "tabs.tsv": ("file,Wide_Smile,Beard\n", "\t", "photos/{name},{smile},{beard}\n"),
    "other ending.csv": ("file,Wide_Smile,Beard\n", ",", "{stem}.PNG,{smile},{beard}\n\n"),
    "pandas.csv": ("file, Wide_Smile, Beard\r\n", ",", "{here}/photos/{name},{smile},{beard}\r\n"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_in_every_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(name, *TABLES[name])
    labels = read_labels(name, [Photo(Path("photos/stranger.jpg")), *PHOTOS])
    assert labels.names == ["Wide_Smile", "Beard"] and labels.photos == [*range(1, 41)]
    assert labels.values[:, 0].tolist() == [1, -1] * 20
    assert labels.values[:, 1].tolist() == pytest.approx([1.25] * 15 + [-0.75] * 25)  # -1 and 1, centred
    if name != "pandas.csv":  # it contains the paths of files
        archive = [Photo(Path("all.zip"), f"photos/{name}") for name in NAMES]
        assert torch.equal(read_labels(name, archive).values, labels.values)


def test_other_numbers_are_standardized_unknown_ones_do_not_count_and_rare_attributes_are_left_out(tmp_path, capsys):
    rows = [f"{name},{30 + 10 * (n % 3)},{n % 2 if n < 30 else ''},{int(n < 9)},7" for n, name in enumerate(NAMES)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["file,Age,Glasses,Twin,Constant", *rows]))
    labels = read_labels(path, PHOTOS)
    assert labels.names == ["Age", "Glasses"]
    assert labels.values.mean(0).abs().max() < 1e-6 and labels.values[:, 0].std(correction=0) == pytest.approx(1)
    assert labels.values[:, 1].tolist() == [-1, 1] * 15 + [0] * 10
    said = capsys.readouterr().out
    assert "Left out    Twin, Constant (2 in all), because fewer than 10 photos have it or lack it\n" in said
    assert "Unit        One unit of Age is 16.4 (two standard deviations)\n" in said
    assert "Attributes  2, known for 40 of 40 training photos\n" in said


WRONG_TABLES = {
    b"\xff\xd8\xff\xe0 photo": "table.csv cannot be read as a table of file names and numbers ('utf-8' codec",
    b"": "table.csv cannot be read as a table",
    b"000001.jpg,1": "(list index out of range)",
    b"000001.jpg,1\n000002.jpg,1": "(the first line must contain the names of the columns)",
    b"file,Sex\n000001.jpg,male": "could not convert string to float: 'male'",
    b"file,Smile,Beard\n000001.jpg,1": "(the row of 000001.jpg has 1 numbers instead of 2)",
    b"file,Smile\nsomebody.jpg,1": "table.csv has no row for photos/000000.jpg or any other photo: put file names",
    b"file,Smile\n000001.jpg,1": "ATTRIBUTES table.csv has no attribute that at least 10 training photos have and 10",
}


@pytest.mark.parametrize("content", WRONG_TABLES)
def test_invalid_tables_give_a_one_line_error(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_bytes(content)
    assert WRONG_TABLES[content] in refusal(read_labels, "table.csv", PHOTOS)
    assert "gone.csv cannot be read as a table" in refusal(read_labels, "gone.csv", PHOTOS)


def test_folders_can_be_the_attributes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate([*["smiling"] * 12, *["serious/at work"] * 11, *["few"] * 3, ""]):
        path = Path("all", name, f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_face(number).save(path)
    labels = read_labels("folders", find_photos("all"))
    assert labels.names == ["serious", "smiling"] and len(labels.photos) == 27
    assert (labels.values > 0).sum(0).tolist() == [11, 12]
    with zipfile.ZipFile("all.zip", "w") as archive:
        for path in Path("all").rglob("*.png"):
            archive.write(path)
    assert str(read_labels("folders", find_photos("all.zip"))) == str(labels)
    assert "has no attribute that at least 10" in refusal(read_labels, "folders", find_photos("all/smiling"))


def synthetic(count, attributes, latents=6):
    """Return codes (N, L), Labels (N, A) of -1 and 1 that correlate, and the effects (A, L) of 1 unit on the codes."""
    torch.manual_seed(0)
    signs = torch.where(torch.randn(count, attributes) + 0.5 * torch.randn(count, 1) > 0, 1.0, -1.0).double()
    effects = torch.randn(attributes, latents).double()
    mu = signs @ effects / 2 + 0.5 * torch.randn(count, latents).double()
    values = signs - signs.mean(0)
    return mu, Labels([f"a{n}" for n in range(attributes)], values, [*range(count)]), effects


def test_a_direction_moves_the_read_out_by_the_gap_and_holds_other_attributes():
    mu, labels, effects = synthetic(20_000, 3)
    directions = torch.stack([*fit_directions(mu, labels).values()]).double()
    readouts = torch.linalg.lstsq(mu - mu.mean(0), labels.values).solution
    read = mu @ readouts
    gaps = [(read[has > 0, a].mean() - read[has < 0, a].mean()).item() for a, has in enumerate(labels.values.T)]
    assert (directions @ readouts).diagonal().tolist() == pytest.approx(gaps, rel=1e-4)
    mean_differences = torch.stack([mu[has > 0].mean(0) - mu[has < 0].mean(0) for has in labels.values.T])
    errors = [
        torch.nn.functional.cosine_similarity(rows, effects).sub(1).abs() for rows in (directions, mean_differences)
    ]
    assert (errors[0] < errors[1]).all()


def test_equal_redundant_random_and_few_labels_give_small_directions():
    mu, labels, _ = synthetic(2000, 2)
    first, second = labels.values.T
    noise = torch.where(torch.randn(2000) > 0, 1.0, -1.0).double()
    nearly = torch.where(torch.rand(2000) < 0.2, noise, first)  # tells nothing that the first does not
    columns = [first, first, nearly, noise - noise.mean(), second]
    values = torch.stack([column - column.mean() for column in columns], dim=1)
    equal, equal_too, redundant, random_one, _ = fit_directions(mu, Labels([*"abcde"], values, [])).values()
    torch.testing.assert_close(equal, equal_too)
    alone = fit_directions(mu, Labels(["a"], values[:, :1], []))["a"]
    assert redundant.norm() < 3 * alone.norm() and random_one.norm() < 0.3 * alone.norm()
    few = fit_directions(torch.randn(25, 128), Labels(["a"], values[:25, :1] - values[:25, :1].mean(), []))["a"]
    assert few.isfinite().all() and 0 < few.norm() < 128**0.5
    assert not fit_directions(torch.ones(25, 3), Labels(["a"], values[:25, :1], []))["a"].any()


def test_a_run_stores_directions_and_resumes_only_with_the_same_labels(workplace, capsys, monkeypatch):
    table_of_faces()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(patch, 12, 2)
        run("--attributes=table.csv", "--epochs=3", "--output-dir=parts")
    shutil.move("table.csv", "moved.csv")
    flags = ["--attributes=moved.csv", "--epochs=3"]
    run(*flags, "--output-dir=parts", "--resume")
    run(*flags, "--output-dir=whole")
    one, other = (vae.load_checkpoint(f"{folder}/vae_model_3.pth")[0].directions for folder in ("parts", "whole"))
    assert list(one) == ["Bright", "Round_Face"] and all(torch.equal(one[name], other[name]) for name in one)
    table_of_faces("other.csv", seed=1)
    said = refusal(run, "--attributes=other.csv", "--epochs=3", "--output-dir=parts", "--resume")
    assert "attributes was 2 of 38 photos, checksum " in said
    assert "and is now none." in refusal(run, "--epochs=3", "--output-dir=parts", "--resume")


def test_no_epochs_add_directions_and_change_nothing_else(workplace, capsys):
    table_of_faces()
    model, info = vae.load_checkpoint(TRAINED)
    vae.save_checkpoint(TRAINED, model, half=True, **info | {"about": "drawings"})
    before = torch.load(TRAINED)
    run(*ADD)
    said = capsys.readouterr().out
    assert f"Done        out/vae_model_8.pth is {TRAINED} with attributes added: Bright, Round_Face\n" in said
    after = torch.load("out/vae_model_8.pth")
    assert after.pop("attributes") == ["Bright", "Round_Face"] and after.pop("directions").shape == (2, 8)
    weights = before.pop("state_dict"), after.pop("state_dict")
    assert before == after and [*weights[0]] == [*weights[1]]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [tensor.dtype for tensor in weights[0].values()] == [tensor.dtype for tensor in weights[1].values()]
    assert [path.name for path in Path("out").glob("[!.]*")] == ["vae_model_8.pth"]


def test_directions_added_in_place_keep_the_files_of_the_run_and_a_copy(workplace):
    table_of_faces()
    before = Path(TRAINED).read_bytes()
    names = {path.name for path in Path("checkpoints_best").iterdir()}
    run(*ADD, "--output-dir=checkpoints_best")
    assert {path.name for path in Path("checkpoints_best").iterdir()} == names | {"previous-1"}
    assert Path("checkpoints_best/previous-1/vae_model_8.pth").read_bytes() == before
    table_of_faces(names="Dark,Round_Face", seed=1)
    run(*ADD, "--output-dir=checkpoints_best")
    added = vae.load_checkpoint(TRAINED)[0].directions
    earlier = vae.load_checkpoint("checkpoints_best/previous-2/vae_model_8.pth")[0].directions
    assert [*added] == ["Bright", "Round_Face", "Dark"] and torch.equal(added["Bright"], earlier["Bright"])
    assert not torch.equal(added["Round_Face"], earlier["Round_Face"])
    run(f"--start-from={TRAINED}", "--epochs=1", "--output-dir=taught")
    assert [*vae.load_checkpoint("taught/vae_model_1.pth")[0].directions] == ["Bright", "Round_Face", "Dark"]
    for flags in (["--attributes="], ["--start-from="], ["--resume"]):
        assert "EPOCHS is 0: it must be at least 1, or 0 with ATTRIBUTES" in refusal(run, *ADD, *flags)


def test_skipped_photos_and_copies_do_not_shift_labels(workplace, capsys):
    table_of_faces()
    shutil.copytree("faces", "others")
    Path("others/face 000.jpg").write_bytes(b"")
    shutil.copy("faces/face 001.jpg", "others/face 020.jpg")
    rows = Path("table.csv").read_text().splitlines()
    Path("without.csv").write_text("\n".join(row for row in rows if " 000." not in row and " 020." not in row))
    directions = []
    for table, data in (("table.csv", "others"), ("without.csv", "others"), ("table.csv", "others")):
        run(*ADD, f"--attributes={table}", f"--data={data}")
        directions.append(vae.load_checkpoint("out/vae_model_8.pth")[0].directions["Bright"])
    assert torch.equal(directions[0], directions[1]) and torch.equal(directions[0], directions[2])
    assert re.search(
        "Skipped .* 000.jpg.*\nCopies      1 left out, such as others/face 020.jpg", capsys.readouterr().out
    )


@pytest.fixture
def edited(workplace):
    """The workplace, in which TRAINED has directions of 20 attributes; returns the model."""
    model, info = vae.load_checkpoint(TRAINED)
    torch.manual_seed(0)
    model.directions = {name: torch.randn(8) for name in ("Smiling", "Wearing_Hat", *map(str, range(18)))}
    vae.save_checkpoint(TRAINED, model, **info)
    return model


def shown(model, codes):
    """Decode codes as pictures, in grey levels."""
    return [np.asarray(vae.to_picture(image)).astype(int) for image in model.decode(codes)]


@torch.no_grad()
def test_edit_moves_the_codes_of_every_mode(edited):
    edit = ["--edit", "smiling 2, Wearing hat -.5"]
    move = 2 * edited.directions["Smiling"] - 0.5 * edited.directions["Wearing_Hat"]
    photo = torch.from_numpy(pictures("--w=0")[0] / 255).permute(2, 0, 1)[None].float()
    mu = edited.encode(photo)[0]
    smile = shown(edited, mu + move)[0]
    assert apart(smile, shown(edited, mu)[0]) > 5
    assert apart(pictures(*edit, "--w=0")[1:], smile) <= 1
    assert apart(pictures(*edit, "--mode=sweep", "--num-variations=1")[1], smile) <= 1
    assert apart(pictures(*edit, "--mode=reconstruct")[1], smile) <= 1
    assert apart(pictures(*edit, "--mode=interpolate")[[0, -1]], [shown(edited, mu)[0], smile]) <= 1
    both = pictures(*edit, "--mode=interpolate", "--image-to=faces/face 001.jpg")
    assert apart(both[0], smile) <= 1
    noise = vae.latent_noise(edited, 100, 0)
    assert apart(pictures(*edit, "--mode=sample"), shown(edited, edited.draw_latents(noise) + move)) <= 1
    unmoved, moved = (pictures("--tune=5", "--w=0", *flags)[1] for flags in ([], edit))
    assert apart(unmoved, moved) > 5 and apart(moved, smile) > 1  # the decoder is fitted to the unmoved code


@torch.no_grad()
def test_attributes_shows_a_labelled_row_each_on_sheets_of_16(edited, capsys):
    first = pictures("--mode=attributes").reshape(16, 8, 32, 32, 3)
    assert "Attributes  Smiling, Wearing_Hat, 0, 1," in capsys.readouterr().out
    assert len(pictures("--mode=attributes", "--edit=7, 8")) == 16
    mu = edited.encode(torch.from_numpy(pictures()[0] / 255).permute(2, 0, 1)[None].float())[0]
    expected = shown(edited, mu + torch.arange(-3, 4)[:, None] * edited.directions["Wearing_Hat"])
    assert apart(first[1, 1:], expected) <= 1
    assert first[:, 0].min() < 100 and len({label.tobytes() for label in first[:2, 0]}) == 2
    assert apart(pictures("--mode=attributes", "--edit=17")[1:], first[0, 4]) > 5
    assert Path("grid-2.png").exists() and not Path("grid-3.png").exists()


def test_one_attribute_can_be_animated(edited):
    generate("--mode=attributes", "--edit=wearing_hat", "--output=hat.gif")
    assert Image.open("hat.gif").n_frames == 38
    assert "OUTPUT is 'hats.gif'" in refusal(generate, "--mode=attributes", "--output=hats.gif")


def test_unknown_attributes_and_models_without_directions_are_refused(edited):
    said = refusal(generate, "--edit", "Smiling 1, Waring hat 2")
    assert said.startswith("EDIT: there is no attribute 'Waring hat'; similar ones are Wearing_Hat, ")
    edited.directions = {}
    vae.save_checkpoint("plain.pth", edited)
    for flags in (["--edit=Smiling 1"], ["--mode=attributes"]):
        said = refusal(generate, "--checkpoint=plain.pth", *flags)
        assert "`python train.py --data PHOTOS --attributes TABLE --start-from plain.pth --epochs 0` adds them" in said


def test_an_edit_is_names_and_numbers():
    known = ["Smiling", "5_o_Clock_Shadow"]
    assert parse_edit(" smiling, 5 o clock shadow -1.5,", known) == {"Smiling": 1, "5_o_Clock_Shadow": -1.5}
    assert parse_edit("SMILING +.5", known) == {"Smiling": 0.5} and parse_edit("", known) == {}
    for text in ("-Smiling", "Smiling - 1", "Smiling 1 5_o_Clock_Shadow 2"):
        assert "EDIT: there is no attribute" in refusal(parse_edit, text, known)
