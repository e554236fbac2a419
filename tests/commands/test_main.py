"""The command line as a radiology researcher meets it: every command, and everything that can be asked wrongly."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import types

import joblib
import numpy as np
import pytest
import tiny
import torch

from simsid import Model, data
from simsid.commands import main as cli
from simsid.data import Record
from simsid.report import page as report
from simsid.scoring import stream as scoring
from simsid.training import run_folder as runs

TRAINING = [*tiny.OPTIONS, "--epochs", "1", "--batch-size", "4"]


@pytest.fixture
def simsid(capsys, monkeypatch, tmp_path):
    """Run a command; returns its exit status, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return types.SimpleNamespace(code=stop.value.code, out=said.out, err=said.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.calibrated(folder)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    tiny.films(folder, 7)
    return folder


@pytest.fixture(scope="module")
def zhanglab(tmp_path_factory):
    return tiny.zhanglab(tmp_path_factory.mktemp("zhanglab") / "chest_xray")


def broken(folder, name="broken.png"):
    path = os.path.join(os.fspath(folder), name)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n nothing more")
    return path


def self_contained(path):
    page = path.read_text("utf-8")
    assert "<img" in page and "</html>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    return page


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(simsid, command):
    told = simsid(command, "--help")
    assert told.code == 0 and told.err == ""
    summary = cli.COMMANDS[command].__doc__.split(":")[0].split(",")[0]
    assert summary.split(".")[0][:40] in " ".join(told.out.split())
    assert "tyro" not in told.out


def test_help_and_version(simsid):
    told = simsid("--help")
    assert told.code == 0
    assert all(command in told.out for command in cli.COMMANDS)
    assert cli.RESEARCH in " ".join(told.out.split())
    assert re.fullmatch(r"simsid \d+\.\d+\.\d+\n", simsid("--version").out)
    assert simsid().code == simsid("frobnicate").code == 2


def test_train_on_zhanglab(simsid, zhanglab, tmp_path):
    done = simsid("train", zhanglab, "-o", tmp_path / "run", *TRAINING, "--val-share", "0.3")
    assert done.code == 0, done.err
    run = tmp_path / "run"
    assert "training on 4 images, validating on 4 normal and 2 abnormal" in done.out
    assert "kept epoch 1; use it with: simsid score" in done.out and "AUC" in done.out
    assert len(tiny.metrics(run)) == 1 and "val_auc_discriminator_running" in tiny.metrics(run)[0]
    self_contained(run / "report.html")
    manifest = tiny.rows(run / "manifest.csv")
    assert len(manifest) == 10 and {row["split"] for row in manifest} == {"train", "val"}
    assert {row["label"] for row in manifest if row["split"] == "train"} == {"0"}
    assert all(len(row["sha256"]) == 64 for row in manifest) and manifest[0]["patient"].startswith("IM-")
    request = json.loads((run / "run.json").read_text())
    assert request["data"] == str(zhanglab) and request["training"]["epochs"] == 1 and request["versions"]["torch"]
    kept = Model.load(run)
    assert kept.config == tiny.config() and len(kept.calibration.holdout["residual"]) == 4

    again = simsid("train", zhanglab, "-o", run, *TRAINING)
    assert again.code == 2 and f"continue a run with --resume {run}" in again.err
    # Other images in its place, then the same ones elsewhere: the pixels tell.
    elsewhere = tiny.zhanglab(tmp_path / "moved" / "chest_xray")
    assert simsid("train", elsewhere, "--resume", run).code == 0
    tiny.film(elsewhere / "train" / "NORMAL" / "IM-0101-0001.png", 99)
    refused = simsid("train", elsewhere, "--resume", run)
    assert refused.code == 2 and refused.err.splitlines()[-1].startswith(f"simsid: {run} was started with other images")


def test_train_on_a_folder(simsid, films, tmp_path):
    done = simsid("train", films, *TRAINING, "--preset", "squid", "--rho", "0.9")
    assert done.code == 0, done.err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == f"{films.name}-squid" and not (run / "report.html").exists()
    assert "training on 6 images (6 without a label, taken as normal), validating on 1 normal" in done.out
    config = Model.load(run).config
    assert (config.memory, config.rho, config.items) == ("queue", 0.9, 6)
    # One held-out film cannot promise 5 % false alarms; that is said, in one line and without a source line.
    scored = simsid("score", run, films, "-o", tmp_path / "scores", "--pictures", "0")
    assert scored.code == 0
    assert re.fullmatch(r"simsid: note: 1 held-out normal images cannot promise .*\n", scored.err)


def test_train_on_a_csv_with_a_broken_film(simsid, films, tmp_path):
    broken(tmp_path)
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "patient"])
        for i, path in enumerate(sorted(films.iterdir())):
            writer.writerow([path, int(i == 6), "train" if i < 4 else "val", f"p{i}"])
        writer.writerow(["broken.png", 0, "train", "p9"])
    done = simsid("train", tmp_path / "list.csv", "-o", tmp_path / "run", *TRAINING)
    assert done.code == 0, done.err
    assert "1 files could not be read (failures.csv)" in done.out
    (failure,) = tiny.rows(tmp_path / "run" / "failures.csv")
    assert failure["path"] == str(tmp_path / "broken.png") and failure["reason"]


def test_the_same_whatever_the_workers(simsid, films, tmp_path):
    for workers in (1, 4):
        done = simsid("train", films, "-o", tmp_path / str(workers), *TRAINING, "--device", "cpu", "--workers", workers)
        assert done.code == 0
    one, other = (Model.load(tmp_path / name).state_dict() for name in ("1", "4"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_report_that_fails_does_not_lose_the_model(simsid, zhanglab, films, model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", fail)
    done = simsid("train", zhanglab, "-o", tmp_path / "run", *TRAINING)
    assert done.code == 1 and "kept epoch 1" in done.out
    last = done.err.splitlines()[-1]
    assert last.startswith(f"simsid: the model is trained and saved in {tmp_path / 'run'}, but") and "No space" in last
    assert Model.load(tmp_path / "run").calibration is not None
    done = simsid("score", model, films, "-o", tmp_path / "scores")
    assert done.code == 1 and "the scores are in" in done.err
    assert len(tiny.rows(tmp_path / "scores" / "scores.csv")) == 7
    done = simsid("evaluate", model, zhanglab, "-o", tmp_path / "figures")
    assert done.code == 1 and "the figures are in" in done.err and "AUC" in done.out
    assert len(tiny.rows(tmp_path / "figures" / "scores.csv")) == 6
    monkeypatch.undo()
    assert simsid("train", "--resume", tmp_path / "run").code == 0
    self_contained(tmp_path / "run" / "report.html")


def test_evaluate(simsid, model, zhanglab, tmp_path):
    output = tmp_path / "out"
    done = simsid("evaluate", model, zhanglab, "-o", output, "--false-alarm-rate", "0.1")
    assert done.code == 0, done.err
    assert "discriminator_per_image" in done.out and "report:" in done.out
    table = tiny.rows(output / "scores.csv")
    assert [row["label"] for row in table] == ["0"] * 3 + ["1"] * 3 and {row["reason"] for row in table} == {""}
    assert all("test" in row["path"] and float(row["residual"]) > 0 for row in table)
    document = json.loads((output / "metrics.json").read_text())
    assert document["split"] == "test" and document["rows"][0]["normal"] == 3
    self_contained(output / "report.html")

    broken(zhanglab / "val" / "NORMAL")
    done = simsid("evaluate", model, zhanglab, "-o", output, "--split", "val")
    os.unlink(zhanglab / "val" / "NORMAL" / "broken.png")
    assert done.code == 1 and "1 of 5 files could not be read" in done.out
    assert [bool(row["reason"]) for row in tiny.rows(output / "scores.csv")] == [False] * 4 + [True]


def test_score_has_a_row_for_every_film(simsid, model, films, tmp_path):
    folder = tmp_path / "in, put"
    good = [tiny.film(folder / "a, b" / f"film {i}.png", i) for i in range(3)]
    odd = os.fsdecode(os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    good.append(tiny.film(odd, 8))
    bad = [broken(folder), broken(folder, os.fsdecode(b"\xff\xfe.png"))]
    (folder / "notes.txt").write_text("no film")
    output = tmp_path / "out put"
    done = simsid("score", model, folder, "-o", output)
    assert done.code == 1, done.err
    assert "4 of 6 files scored, 2 failed (reasons in scores.csv)" in done.out
    table = tiny.rows(output / "scores.csv")
    assert [row["path"] for row in table] == [record.path for record in data.Radiographs(folder).records]
    assert {row["path"] for row in table} == {str(path) for path in (*good, *bad)}
    loaded = Model.load(model)
    for row in table:
        if row["path"] in bad:
            assert row["reason"] and not row["score"] and not row["alarm"] and not row["residual"]
        else:
            assert 0 < float(row["score"]) < 1 and row["alarm"] in "01" and not row["reason"]
            value = float(row[loaded.signal])
            assert float(row["score"]) == loaded.calibration.probability(loaded.signal, np.array([value]))[0]
    self_contained(output / "report.html")
    assert sorted(path.name for path in output.iterdir()) == [".scoring.lock", "report.html", "scores.csv"]
    # What was written is a list as well, names that are no text included.
    again = simsid("score", model, output / "scores.csv", "-o", tmp_path / "again", "--pictures", "0")
    assert again.code == 1 and tiny.rows(tmp_path / "again" / "scores.csv") == table

    # All of them, none of them, one, and a list; no report of an earlier scoring stays beside other scores.
    assert simsid("score", model, films, "-o", output).code == 0
    for path in good:
        os.unlink(path)
    done = simsid("score", model, folder, "-o", output)
    assert done.code == 2 and "0 of 2 files scored" in done.out
    assert len(tiny.rows(output / "scores.csv")) == 2 and not (output / "report.html").exists()
    film = sorted(films.iterdir())[0]
    assert simsid("score", model, film, "-o", output, "--pictures", "0").code == 0
    assert [row["path"] for row in tiny.rows(output / "scores.csv")] == [str(film)]
    (tmp_path / "list.csv").write_text(f'path\nnowhere.png\n"{film}"\n')
    assert simsid("score", model, tmp_path / "list.csv", "-o", output, "--batch-size", "1").code == 1
    assert [row["path"] for row in tiny.rows(output / "scores.csv")] == [str(tmp_path / "nowhere.png"), str(film)]


def test_scores_are_whole_or_absent(simsid, model, films, tmp_path, monkeypatch):
    real, output = scoring.score_files, tmp_path / "out"

    def stops(*arguments, **options):
        yield from itertools.islice(real(*arguments, **options), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score_files", stops)
    told = simsid("score", model, films, "-o", output)
    assert told.code == 130 and told.err == "stopped after 3 files; the same command goes on from there\n"
    assert not (output / "scores.csv").exists()
    (output / "scores.csv").write_text("earlier")
    (output / "report.html").write_text("earlier")
    told = simsid("score", model, films, "-o", output)
    assert told.code == 130 and told.out == "going on after 3 files that are done\n" and "after 6 files" in told.err
    assert (output / "scores.csv").read_text() == (output / "report.html").read_text() == "earlier"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = simsid("score", model, films, "-o", output)
    assert done.code == 0 and done.out.startswith("going on after 6 files that are done\n7 of 7 files scored\n")
    self_contained(output / "report.html")
    assert simsid("score", model, films, "-o", tmp_path / "whole").code == 0
    assert (output / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_calibrate(simsid, films, tmp_path):
    tiny.model().save(tmp_path / "model")
    refused = simsid("score", tmp_path / "model", films, "-o", tmp_path / "out")
    assert refused.code == 2 and f"run simsid calibrate {tmp_path / 'model'} DATA" in refused.err
    assert not (tmp_path / "out").exists()
    done = simsid("calibrate", tmp_path / "model", films, "--val-share", "0.3")
    assert done.code == 0 and "calibrated on 5 normal images, with 2 held out" in done.out
    assert simsid("score", tmp_path / "model", films, "-o", tmp_path / "out").code == 0
    # A run that is being trained would lose what it has learned since.
    (tmp_path / "model" / "run.json").write_text("{}")
    with runs.RunFolder(tmp_path / "model"):
        refused = simsid("calibrate", tmp_path / "model", films)
    assert refused.code == 2 and "is in use by another process" in refused.err


def released_style(model):
    """A model's tensors as the released code names them: `(model.pth, discriminator.pth)`."""
    block = {"entry.0": "conv1.0", "entry.1": "conv1.1", "inner.0": "conv2.0", "inner.1": "conv2.1"}
    block |= {"outer.0": "conv2.3", "outer.1": "conv2.4"}
    start = {"encoder.entry": "in_conv.conv", "student.output": "out_conv.conv", "teacher.output": "teacher_out.conv"}
    start |= {"student.inpainting.entry": "inpaint_block.bottleneck_conv1"}
    start |= {"student.inpainting.exit": "inpaint_block.bottleneck_conv2", "student.inpainting.ff": "inpaint_block.ff"}
    start |= {"student.inpainting.feed_forward": "inpaint_block.ff"}
    start |= {"student.inpainting.mixing.output": "inpaint_block.attention.out_proj"}
    start |= {f"student.inpainting.norm{i}": f"inpaint_block.attn_norm{i}" for i in (1, 2)}
    for i in range(model.config.levels):
        start |= {f"encoder.down.{i}": f"down_blocks.{i}.mpconv", f"student.up.{i}": f"up_blocks.{i}.conv"}
        start |= {f"teacher.up.{i}": f"teacher_ups.{i}.conv"}
    generator, discriminator, state = {}, {}, model.state_dict()
    for name, tensor in state.items():
        if name.startswith("discriminator."):
            kind, place, what = re.fullmatch(
                r"discriminator\.(convolutions|norms|output)\.?(\d*)\.(\w+)", name
            ).groups()
            if kind == "output":
                discriminator[f"regressor.{what}"] = tensor
            else:
                at = 3 * int(place) + (3 if kind == "norms" else 0 if place == "0" else -1)
                discriminator[f"conv_model.{at}.{what}"] = tensor
        elif name.endswith("memory.items"):
            memory = "inpaint_block" if "inpainting" in name else f"memory_blocks.{name.split('.')[2]}"
            for location, items in enumerate(tensor):
                generator[f"{memory}.memory.{location}.memMatrix"] = items
        elif ".mixing.query." in name:
            other = state[name.replace("query", "key_value")]
            generator[f"inpaint_block.attention.in_proj_{name.split('.')[-1]}"] = torch.cat([tensor, other])
        elif ".mixing.key_value." not in name:
            ours = max((prefix for prefix in start if name.startswith(prefix + ".")), key=len)
            rest = name.removeprefix(ours + ".")
            for mine, theirs in block.items():
                if rest.startswith(mine + ".") and rest.count(".") == 2:
                    rest = rest.replace(mine, theirs, 1)
            generator[f"{start[ours]}.{rest}"] = tensor
    return generator, discriminator


def test_convert(simsid, films, tmp_path):
    model = tiny.model(decoder_memory="subpatch", threshold="exclusive", heads=8).eval()
    for name, part in zip(("model.pth", "discriminator.pth"), released_style(model)):
        torch.save(part, tmp_path / name)
    options = ["model.pth", "discriminator.pth", "--memory", "matrix", "--decoder-memory", "subpatch", "--topk", "2"]
    done = simsid("convert", *options, "-o", tmp_path / "plain")
    assert done.code == 0, done.err
    assert "48 pixels, 2 x 2 patches, width 4, 2 levels, 6 and 6 items" in done.out
    assert "simsid calibrate" in done.out and Model.load(tmp_path / "plain").calibration is None
    done = simsid("convert", *options, "-o", tmp_path / "out", "--calibrate", films)
    assert done.code == 0 and "calibrated on 6 normal images, with 1 held out" in done.out
    kept = Model.load(tmp_path / "out")
    assert kept.config == model.config
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in model.state_dict().items())
    assert simsid("score", tmp_path / "out", films, "-o", tmp_path / "scores").code == 0

    refused = simsid("convert", *options, "-o", tmp_path / "out")
    assert refused.code == 2 and "already holds a model" in refused.err
    refused = simsid("convert", "discriminator.pth", *options[1:], "-o", tmp_path / "new")
    assert refused.code == 2 and refused.err.startswith("simsid: ") and not (tmp_path / "new").exists()
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    refused = simsid("convert", "code.pth", *options[1:], "-o", tmp_path / "new")
    assert refused.code == 2 and refused.err.startswith("simsid: code.pth") and not (tmp_path / "executed").exists()


def test_baselines(simsid, zhanglab):
    done = simsid("baselines", zhanglab, "--image-size", "16")
    assert done.code == 0 and "5 normal images to compare with, 6 of test" in done.out
    assert re.search(r"^ *knn ", done.out, re.M) and re.search(r"^ *pca ", done.out, re.M)
    # As many of train as `train` takes with this share, and what it holds out of them beside val.
    done = simsid("baselines", zhanglab, "--image-size", "16", "--split", "val", "--val-share", "0.15")
    assert done.code == 0 and "5 normal images to compare with, 5 of val" in done.out


def test_scan(simsid, films, tmp_path):
    folder = tmp_path / "mixed"
    tiny.films(folder, 2)
    assert simsid("scan", folder).code == 0
    broken(folder, os.fsdecode(b"caf\xe9.png"))
    done = simsid("scan", folder)
    assert done.code == 1 and "2 readable images, 1 rejected" in done.out and "caf\\udce9.png" in done.out
    done = simsid("scan", folder, "--json")
    document = json.loads(done.out)
    assert done.code == 1 and document["formats"] == {"PNG": 2} and len(document["failures"]) == 1


def test_demo(simsid, tmp_path):
    done = simsid("demo", "--epochs", "1", "--images", "32", "-o", tmp_path / "demo")
    assert done.code == 0, done.err
    for kind in ("all", "missing", "misordered", "flipped", "zero"):
        assert re.search(rf"\b{kind}\b.* 0\.\d\d\d", done.out), kind
    for signal in tiny.model().signal_names:
        assert signal in done.out
    page = self_contained(tmp_path / "demo" / "report.html")
    assert "misordered" in page.lower() and "esearch use only" in page
    assert Model.load(tmp_path / "demo").config.signal == "focal_residual"
    assert len(tiny.metrics(tmp_path / "demo")) == 1

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for folder in ("mine", "demo/run"):
        (tmp_path / "demo" / "run").mkdir(exist_ok=True)
        (tmp_path / "demo" / "run" / "run.json").write_text('{"command": "train"}')
        refused = simsid("demo", "-o", tmp_path / folder)
        assert refused.code == 2 and "choose another folder with -o" in refused.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_demo_replaces_the_one_before(simsid, tmp_path, monkeypatch):
    from simsid import Trainer

    class Stop(RuntimeError):
        pass

    def fit(self, *_):
        assert not self.run.started
        raise Stop

    monkeypatch.setattr(Trainer, "fit", fit)
    tiny.calibrated(tmp_path / "demo")
    (tmp_path / "demo" / "run.json").write_text('{"command": "demo"}')
    for name in ("last.json", "report.html", ".lock", ".run.json.x1"):
        (tmp_path / "demo" / name).write_text("{}")
    for _ in range(2):
        with pytest.raises(Stop):
            cli.main(["demo", "-o", str(tmp_path / "demo"), "--images", "8"])
        assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [".lock", "run.json"]


REFUSALS = [
    ("train", "train needs a folder or CSV of images, or --resume RUN"),
    ("train nowhere", "nowhere does not exist"),
    ("train empty", "empty has no image"),
    ("train notes.txt", "notes.txt is neither an image nor a CSV"),
    ("train FILMS --image-size 100", "image_size must be a multiple of"),
    ("train FILMS --epochs 0", "epochs must be at least 1, got 0"),
    ("train FILMS --preset squid --rho 3", "rho must be between 0 and 1, got 3.0"),
    ("train FILMS --ablation no_skip --topk 0", "topk must be at least 1, got 0"),
    ("train FILMS --val-share 1", "val_share must be between 0 and 1, got 1.0"),
    ("train FILMS --device tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("train FILMS --threads -1", "threads and workers must be at least 0"),
    ("train FILMS --criterion auc", 'criterion "auc" needs normal and abnormal validation images'),
    ("train FILMS -o notes.txt", "the run folder must be a folder, got the file notes.txt"),
    ("train FILMS -o notes.txt/run", "notes.txt"),
    ("train --resume nowhere", "nowhere holds no run; start one with"),
    ("train --resume MODEL", "holds no run; start one with"),
    ("train --resume MODEL --epochs 5 -o x", "leave out --epochs, -o"),
    ("train --resume=MODEL --batch_size=5", "leave out --batch-size"),
    ("train --resume odd", "was not started by `simsid train`"),
    ("train --resume cut", "cut/run.json is not a run's request"),
    ("score nowhere FILMS -o out", "nowhere/model.json does not exist"),
    ("score notes.txt FILMS -o out", "notes.txt/model.json cannot be read"),
    ("score foreign FILMS -o out", "foreign/model.json must be of format 1"),
    ("score unknown FILMS -o out", "unknown/model.json is not a model: 'moustache' is not a configuration field"),
    ("score MODEL nowhere -o out", "nowhere does not exist"),
    ("score MODEL empty -o out", "empty has no image"),
    ("score MODEL FILMS -o notes.txt", "the output must be a folder, got the file notes.txt"),
    ("score MODEL FILMS -o notes.txt/out", "notes.txt"),
    ("score MODEL FILMS -o out --false-alarm-rate 5", "false_alarm_rate must lie strictly between 0 and 1, got 5.0"),
    ("score MODEL FILMS -o out --batch-size 0", "batch_size must be at least 1, got 0"),
    ("score MODEL FILMS -o out --pictures -2", "pictures must be at least 0, got -2"),
    ("evaluate MODEL FILMS -o out", "needs a label for every image, got 7 of 7 without one"),
    ("evaluate MODEL ZHANGLAB --split nonsense", "has no 'nonsense' split; it has"),
    ("evaluate MODEL ZHANGLAB --false-alarm-rate 0", "false_alarm_rate must lie strictly between 0 and 1"),
    ("calibrate MODEL empty", "empty has no image"),
    ("calibrate empty FILMS", "empty/model.json does not exist"),
    ("baselines FILMS", "needs a label for every image"),
    ("baselines ZHANGLAB --image-size 0", "image_size must be one or two positive whole numbers"),
    ("scan nowhere", "nowhere does not exist"),
    ("scan empty --workers -1", "workers must be at least 0, got -1"),
    ("convert no.pth no.pth -o out --memory matrix --decoder-memory patch", "no.pth does not exist"),
    ("demo --seed -1", "seed must be at least 0, got -1"),
    ("demo --images 1", "images must be at least 2, got 1"),
    ("demo --mnist empty", "has no MNIST file"),
    ("demo -o notes.txt", "notes.txt"),
]


@pytest.mark.parametrize(("line", "message"), REFUSALS, ids=[line for line, _ in REFUSALS])
def test_wrong_requests_get_one_sentence(simsid, model, films, zhanglab, tmp_path, line, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no film")
    for name, file, content in (
        ("odd", "run.json", '{"command": "demo"}'),
        ("cut", "run.json", '{"command": "train", "data": "x"}'),
        ("foreign", "model.json", '{"kind": "another library\'s"}'),
        ("unknown", "model.json", (model / "model.json").read_text().replace('"width"', '"moustache"')),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    for path in model.glob("*.safetensors"):
        (tmp_path / "unknown" / path.name).write_bytes(path.read_bytes())
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    places = {"MODEL": model, "FILMS": films, "ZHANGLAB": zhanglab}
    for name, place in places.items():
        line = line.replace(name, str(place))
    told = simsid(*line.split())
    assert told.code == 2, told
    assert told.err.startswith("simsid: ") and len(told.err.splitlines()) == 1 and message in told.err, told.err
    if "--criterion" not in line:
        assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


def test_values_that_are_no_numbers_are_refused_by_the_parser(simsid, films):
    told = simsid("train", films, "--epochs", "many")
    assert told.code == 2 and "--epochs" in told.err and "Traceback" not in told.err
    told = simsid("train", films, "--no-such-option", "3")
    assert told.code == 2 and "--no-such-option" in told.err


def test_tensorboard_that_is_missing_is_said_before_anything_is_read(simsid, films, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told = simsid("train", films, "-o", tmp_path / "run", *TRAINING, "--tensorboard")
    assert told.code == 2 and "pip install 'simsid[tensorboard]'" in told.err and told.out == ""
    monkeypatch.undo()
    assert simsid("train", films, "-o", tmp_path / "run", *TRAINING).code == 0


def test_a_resumed_run_keeps_its_threads(simsid, films, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    assert simsid("train", films, "-o", tmp_path / "run", *TRAINING, "--device", "cpu").code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["machine"] == {"device": "cpu", "threads": 3}
    assert simsid("train", "--resume", tmp_path / "run").code == 0
    assert simsid("train", "--resume", tmp_path / "run", "--threads", "2").code == 0
    assert used == [3, 2]


@pytest.mark.parametrize(
    ("asked", "world", "used"),
    [
        ((), {}, [2]),
        (("--threads", "5"), {}, [5]),
        ((), {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, [1]),
    ],
)
def test_threads_are_the_cores_there_are(simsid, model, films, tmp_path, monkeypatch, asked, world, used):
    """A container of two cores on a machine of eight; several processes share them."""
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert simsid("score", model, films, "-o", tmp_path, "--device", "cpu", *asked).code == 0
    assert taken == used


def test_defects_keep_their_traceback(monkeypatch):
    def defect(*_):
        raise RuntimeError("of ours, or of a library's")

    monkeypatch.setattr(data, "scan", lambda *_, **__: eval("defect()", {"defect": defect}))
    with pytest.raises(RuntimeError, match="of ours"):
        cli.main(["scan", "."])


PIPES = [
    ("doctor", "head -n 1"),
    ("train --help", "head -n 1"),
    ("scan {films}", "true"),
]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(("command", "reader"), PIPES, ids=[command for command, _ in PIPES])
def test_a_reader_that_goes_away_is_no_error(films, tmp_path, command, reader):
    script = f"{sys.executable} -m simsid {command.format(films=films)} 2>err | {reader}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], env={**tiny.ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, cwd=tmp_path, capture_output=True
    )
    assert (tmp_path / "err").read_text() == ""
    assert done.stdout.splitlines()[-1] in (b"0", b"141")


def records(spec):
    """`"train:0:p1 ..."` to records."""
    made = []
    for i, word in enumerate(spec.split()):
        split, label, patient = word.split(":")
        made.append(Record(f"/films/{i}.png", split, int(label) if label else None, "", patient))
    return data.Dataset(made, "films")


def test_partition_keeps_a_data_sets_own_splits():
    dataset = records(" ".join(["train:0:a"] * 3 + ["train:1:b"] + ["val:0:c"] * 50 + ["val:1:d"] + ["test:0:e"]))
    train, val = cli.partition(dataset, 0.3)
    assert [record.patient for record in train] == ["a"] * 3
    assert [record.patient for record in val] == ["c"] * 50 + ["d"]
    assert {record.split for record in train} == {"train"} and {record.split for record in val} == {"val"}


def test_partition_holds_out_where_there_are_too_few_and_keeps_patients_apart():
    normal = [f":0:p{i // 2}" for i in range(40)]
    dataset = records(" ".join([*normal, ":1:p3", ":1:p7", ":1:q", ":1:", "val:0:v", "val:1:w", "test:1:t"]))
    train, val = cli.partition(dataset, 0.25)
    patients = {record.patient for record in train}
    assert not patients & {record.patient for record in val} and "t" not in patients
    assert all(record.label == 0 for record in train) and len(train) == 30
    abnormal = [record.patient for record in val if record.label == 1]
    assert {"q", "", "w"} <= set(abnormal) and set(abnormal) <= {"q", "", "w", "p3", "p7"} - patients
    assert {record.patient for record in val if record.label == 0} >= {"v"}


def test_partition_of_one_patient_has_nothing_to_hold_out(simsid, films, tmp_path):
    train, val = cli.partition(records("train:0:a train:0:a"), 0.1)
    assert len(train) == 2 and val == []
    with pytest.raises(ValueError, match="no normal image to train on"):
        cli.partition(records("train:1:a test:0:b"), 0.1)
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "patient"], *([path, "one"] for path in sorted(films.iterdir()))])
    done = simsid("train", tmp_path / "list.csv", "-o", tmp_path / "run", *TRAINING)
    assert done.code == 0 and "validating on 0 normal and 0 abnormal" in done.out
    assert Model.load(tmp_path / "run").calibration.holdout == {}
