"""`simsid train` of the networks: data in every form, resumption, and what it leaves."""

import json
import sys

import joblib
import pytest
import tiny
import torch

from simsid import Model
from simsid.parallel import CoreUse


def test_train_on_a_published_data_set_reports_and_keeps_a_manifest(simsid, zhanglab, tmp_path):
    run = tmp_path / "run"
    done = simsid("train", zhanglab, "-o", run, *tiny.TRAINING, "--val-share", "0.3")
    assert done.code == 0, done.err
    assert "training on 4 images, validating on 4 normal and 2 abnormal" in done.out
    assert "kept epoch 1; use it with: simsid score" in done.out and "AUC" in done.out
    assert len(tiny.metrics(run)) == 1 and "val_auc_discriminator_running" in tiny.metrics(run)[0]
    text = tiny.assert_self_contained(run / "report.html")
    assert "These images chose the epoch that was kept" in text and "in-sample" in text
    manifest = tiny.rows(run / "manifest.csv")
    assert len(manifest) == 10 and {row["split"] for row in manifest} == {"train", "val"}
    assert {row["label"] for row in manifest if row["split"] == "train"} == {"0"}
    assert all(len(row["sha256"]) == 64 for row in manifest) and manifest[0]["patient"].startswith("IM-")
    request = json.loads((run / "run.json").read_text())
    assert request["data"] == str(zhanglab) and request["training"]["epochs"] == 1 and request["versions"]["torch"]
    kept = Model.load(run)
    assert kept.config == tiny.config() and len(kept.calibration.holdout["residual"]) == 4

    again = simsid("train", zhanglab, "-o", run, *tiny.TRAINING)
    assert again.code == 2 and f"resume a run with --resume {run}" in again.err
    # The same images elsewhere resume the run; other images under the same names are recognized by their pixels.
    elsewhere = tiny.zhanglab(tmp_path / "moved" / "chest_xray")
    assert simsid("train", elsewhere, "--resume", run).code == 0
    tiny.film(elsewhere / "train" / "NORMAL" / "IM-0101-0001.png", 99)
    refused = simsid("train", elsewhere, "--resume", run)
    assert refused.code == 2 and refused.err.splitlines()[-1].startswith(f"simsid: {run} was started with other images")


def test_train_on_a_folder_takes_unlabelled_images_as_normal(simsid, films, tmp_path):
    done = simsid("train", films, *tiny.TRAINING, "--preset", "squid", "--rho", "0.9")
    assert done.code == 0, done.err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == f"{films.name}-squid" and not (run / "report.html").exists()
    assert "training on 6 images (6 without a label, taken as normal), validating on 1 normal" in done.out
    config = Model.load(run).config
    assert (config.memory, config.rho, config.items) == ("queue", 0.9, 6)
    # One held-out image cannot guarantee a rate of 5 %; the warning is one line without a line of source code.
    scored = simsid("score", run, films, "-o", tmp_path / "scores", "--pictures", "0")
    assert scored.code == 0 and scored.err.count("\n") == 1
    assert scored.err.startswith("simsid: note: 1 held-out normal images cannot guarantee a false positive rate of")


def test_train_on_a_list_records_the_file_that_cannot_be_read(simsid, films, tmp_path):
    tiny.damaged(tmp_path)
    listed = [
        [path, int(i == 6), "train" if i < 4 else "val", f"p{i}"] for i, path in enumerate(sorted(films.iterdir()))
    ]
    columns = ["path", "label", "split", "patient"]
    tiny.write_list(tmp_path / "list.csv", columns, [*listed, ["damaged.png", 0, "train", "p9"]])
    done = simsid("train", tmp_path / "list.csv", "-o", tmp_path / "run", *tiny.TRAINING)
    assert done.code == 0, done.err
    assert "1 files could not be read (failures.csv)" in done.out
    (failure,) = tiny.rows(tmp_path / "run" / "failures.csv")
    assert failure["path"] == str(tmp_path / "damaged.png") and failure["reason"]


def test_excluded_files_are_not_trained_on(simsid, films, tmp_path):
    for i, path in enumerate(films.iterdir()):
        (tmp_path / "data" / "masks").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "data" / "masks" / f"{i}.png").write_bytes(path.read_bytes())
    done = simsid("train", "data", "-o", "run", *tiny.TRAINING, "--exclude", "masks/*")
    assert done.code == 0 and "training on 6 images" in done.out
    assert not [row for row in tiny.rows(tmp_path / "run" / "manifest.csv") if "masks" in row["path"]]
    assert simsid("train", "--resume", "run").code == 0


def test_the_number_of_workers_does_not_change_the_weights(simsid, films, tmp_path):
    for workers in (1, 4):
        assert simsid("train", films, "-o", tmp_path / str(workers), *tiny.TRAINING, "--workers", workers).code == 0
    one, other = (Model.load(tmp_path / name).state_dict() for name in ("1", "4"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if name != "_extra_state")
    assert Model.load(tmp_path / "1").calibration == Model.load(tmp_path / "4").calibration


def test_a_report_that_cannot_be_written_keeps_the_model_and_a_resumed_run_writes_it(
    simsid, zhanglab, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("simsid.report.write_report", fail)
        done = simsid("train", zhanglab, "-o", tmp_path / "run", *tiny.TRAINING)
    assert done.code == 1 and "kept epoch 1" in done.out
    last = done.err.splitlines()[-1]
    assert last.startswith(f"simsid: the model is trained and saved in {tmp_path / 'run'}, but") and "No space" in last
    assert Model.load(tmp_path / "run").calibration is not None
    assert simsid("train", "--resume", tmp_path / "run").code == 0
    tiny.assert_self_contained(tmp_path / "run" / "report.html")


def test_one_patient_leaves_nothing_to_validate_on(simsid, films, tmp_path):
    tiny.write_list(tmp_path / "list.csv", ["path", "patient"], [[path, "one"] for path in sorted(films.iterdir())])
    done = simsid("train", tmp_path / "list.csv", "-o", tmp_path / "run", *tiny.TRAINING)
    assert done.code == 0 and "validating on 0 normal and 0 abnormal" in done.out
    assert Model.load(tmp_path / "run").calibration.holdout == {}


def test_a_missing_tensorboard_is_reported_before_anything_is_read(simsid, films, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        done = simsid("train", films, "-o", tmp_path / "run", *tiny.TRAINING, "--tensorboard")
    assert done.code == 2 and "pip install 'simsid[tensorboard]'" in done.err and done.out == ""
    assert simsid("train", films, "-o", tmp_path / "run", *tiny.TRAINING).code == 0


def test_a_resumed_run_keeps_its_threads_unless_others_are_asked_for(simsid, films, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(CoreUse, "now", classmethod(lambda _cls: None))  # other work on the machine does not count
    run = tmp_path / "run"
    assert simsid("train", films, "-o", run, *tiny.TRAINING, "--device", "cpu", "--threads", "0").code == 0
    assert json.loads((run / "run.json").read_text())["machine"] == {"device": "cpu", "threads": 3}
    assert simsid("train", "--resume", run, "--threads", "0").code == 0
    assert simsid("train", "--resume", run, "--threads", "2").code == 0
    assert used == [3, 3, 2]


@pytest.mark.parametrize("option", [("--epochs", "many"), ("--no-such-option", "3")], ids=["no number", "unknown"])
def test_the_parser_refuses_options_it_cannot_read(simsid, films, option):
    done = simsid("train", films, *option)
    assert done.code == 2 and option[0] in done.err and "Traceback" not in done.err
