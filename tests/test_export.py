"""Exported files: they score as the model does, for any batch size, and say what a reader needs."""

import json
import os
import pathlib
import re
import sys
import types

import numpy as np
import pytest
import tiny
import torch

from simsid import checkpoint, export
from simsid.commands import main as cli
from simsid.errors import CalibrationError, ExportError, InputError
from simsid.export import CHECKED, METADATA, export_model
from simsid.models import PixelKNN, PixelPCA

ROOT = pathlib.Path(__file__).parents[1]


def images(count, seed=0):
    """Images like those of the comparison, which tell signals apart."""
    return (export._images((48, 48))[:count] + 0.1 * tiny.images(count, seed)).clamp(-1, 1)


@pytest.fixture(scope="module")
def model():
    """A tiny network whose reconstructions differ, so that its logits do."""
    made = tiny.model(levels=1, skip_levels=1, merge_levels=1, decoder_memories=1, distillation=False).eval()
    with torch.no_grad():
        made.student.output.weight.mul_(8.0)
        for norm in made.discriminator.norms:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            torch.nn.init.normal_(norm.bias, 0.5, 0.3)
            norm.running_var.fill_(0.01)
    made.precision = "float32"  # the only one that can be exported
    made.calibrate(images(12), images(19, 1))
    return made


@pytest.fixture(scope="module")
def traced_once(model):
    """Trace the network once for both formats, which takes seconds."""
    trace, network, traced = export._exported, model.signal_names, {}

    def exported(program, batch):
        if program.names != network:
            return trace(program, batch)
        traced[network] = traced.get(network) or trace(program, batch)
        return traced[network]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_exported", exported)
        yield


@pytest.fixture(scope="module")
def program(model, traced_once, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    metadata = export_model(model, path, false_positive_rate=0.1)
    assert os.listdir(path.parent) == ["model.pt2"]
    return *open_program(path), metadata


@pytest.fixture(scope="module")
def onnx_file(model, traced_once, tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_model(model, path)
    return path


def open_program(path):
    extra = {METADATA: ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra[METADATA])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_program_scores_as_the_model(model, program, count):
    batch = images(count)
    found = program[0](batch)
    assert list(found) == [*model.signal_names, "score"]
    for name, values in {**model.signals(batch), "score": model.score(batch).numpy()}.items():
        assert found[name].dtype == torch.float64 and found[name].shape == (count,)
        np.testing.assert_allclose(found[name].detach().numpy(), values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_metadata_hold_preprocessing_calibration_and_thresholds(model, program):
    _, metadata, returned = program
    assert metadata == returned and metadata["kind"] == "simsid"
    assert metadata["preprocessing"] == model.preprocessing.to_dict()
    assert metadata["signal"] == model.signal and list(metadata["signals"]) == list(model.signal_names)
    assert metadata["calibration"] == model.calibration.to_dict()
    assert metadata["thresholds"][model.signal] == model.calibration.threshold(model.signal, 0.1)
    assert metadata["input"]["shape"] == ["batch", 1, 48, 48]


def test_program_needs_no_operator_of_simsid(program):
    called = {str(node.target) for node in program[0].graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if "simsid" in name]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_scores_as_the_model(model, onnx_file, count):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    names = [output.name for output in session.get_outputs()]
    assert names == [*model.signal_names, "score"]
    batch = images(count)
    found = dict(zip(names, session.run(None, {"images": batch.numpy()})))
    for name, values in {**model.signals(batch), "score": model.score(batch).numpy()}.items():
        assert found[name].shape == (count,)
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-6, err_msg=name)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert metadata["thresholds"][model.signal] == model.calibration.threshold(model.signal, 0.05)


def test_other_models_export_through_the_same_interface(tmp_path):
    model = PixelPCA(image_size=48, components=3).fit(images(20))
    export_model(model, tmp_path / "pca.pt2")
    run, metadata = open_program(tmp_path / "pca.pt2")
    np.testing.assert_allclose(run(images(3))["pixel_pca"].numpy(), model.signals(images(3))["pixel_pca"], rtol=1e-6)
    assert metadata["kind"] == "pixel_pca"


def test_feature_memory_exports(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import tiny_features

    model = tiny_features.memory().fit(tiny_features.normal(20))
    export_model(model, tmp_path / "model.pt2", images=tiny_features.normal(32, 3))
    run, _ = open_program(tmp_path / "model.pt2")
    batch = tiny_features.abnormal(3)
    found = run(batch)
    for name, values in model.signals(batch).items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_program_that_scores_differently_is_refused_and_not_written(model, tmp_path, monkeypatch):
    spread = float(np.std(model.signals(export._images((48, 48)))["residual"]))
    monkeypatch.setattr(export, "_pt2", lambda *_: b"a file")
    monkeypatch.setattr(export, "_open_pt2", lambda _: lambda batch: model_run(model, batch))
    assert export_model(model, tmp_path / "right.pt2")["kind"] == "simsid"
    monkeypatch.setattr(
        export,
        "_open_pt2",
        lambda _: lambda batch: {k: v + 3e-4 * spread * (k == "residual") for k, v in model_run(model, batch).items()},
    )
    with pytest.raises(ExportError, match=r"the exported program's residual differs from the model's by .*no file"):
        export_model(model, tmp_path / "wrong.pt2")
    assert os.listdir(tmp_path) == ["right.pt2"]


def model_run(model, batch):
    return {**model.signals(batch), "score": model.score(batch).numpy()}


def test_nan_of_a_program_is_a_difference():
    expected = {"residual": np.zeros(32)}
    with pytest.raises(ExportError, match="differs from the model's by nan"):
        export._compare(
            lambda batch: {"residual": np.full(len(batch), np.nan)}, images(32), expected, {"residual": 1.0}
        )


def test_comparison_covers_32_images_in_several_batches():
    assert sum(CHECKED) == 32 and len(set(CHECKED)) == 3 and 1 in CHECKED


def test_what_cannot_be_exported_is_one_clear_error(model, tmp_path):
    with pytest.raises(InputError, match=r"path must end in .pt2 or .onnx, got model.pth"):
        export_model(model, tmp_path / "model.pth")
    with pytest.raises(CalibrationError, match="not calibrated"):
        export_model(tiny.model(), tmp_path / "model.pt2")
    with pytest.raises(InputError, match="images must be at least 32, got 5"):
        export_model(model, tmp_path / "model.pt2", images=images(5))
    with pytest.raises(ExportError, match=r"a model of kind 'pixel_knn' cannot be exported: .+"):
        export_model(PixelKNN(image_size=48).fit(images(20)), tmp_path / "model.pt2")
    assert not os.listdir(tmp_path)


def test_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"an ONNX export needs onnxruntime: pip install 'simsid\[onnx\]'"):
        export_model(model, tmp_path / "model.onnx")


def test_command_exports_and_refuses(model, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", *map(str, arguments)])
        return stop.value.code, capsys.readouterr()

    PixelPCA(image_size=16, components=3).fit(torch.rand(40, 1, 16, 16) * 2 - 1).save(tmp_path / "model")
    code, printed = run(tmp_path / "model", "-o", tmp_path / "model.pt2")
    assert code == 0, printed.err
    assert printed.out.endswith("model.pt2: images [batch, 1, 16, 16] to pixel_pca, score\n")
    code, printed = run(tmp_path / "model", "-o", tmp_path / "no" / "model.pt2")
    assert code == 2 and "the folder" in printed.err and "does not exist" in printed.err
    code, printed = run(tmp_path / "model", "-o", tmp_path / "model.txt")
    assert code == 2 and "path must end in" in printed.err
    tiny.model().save(tmp_path / "uncalibrated")
    code, printed = run(tmp_path / "uncalibrated", "-o", tmp_path / "u.pt2")
    assert code == 2 and "is not calibrated" in printed.err


def test_service_of_the_documentation_runs(onnx_file, tmp_path, monkeypatch, model):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    (source,) = re.findall(r"```python service\n(.*?)```", (ROOT / "docs/export.md").read_text("utf-8"), re.S)
    monkeypatch.setenv("MODEL", str(onnx_file))
    service = types.ModuleType("service")
    monkeypatch.setitem(sys.modules, "service", service)
    exec(compile(source, "docs/export.md", "exec"), service.__dict__)
    content = tiny.film(tmp_path / "scan.png").read_bytes()
    answer = TestClient(service.app).post("/score", content=content)
    assert answer.status_code == 200
    from simsid.data import read

    image = read(tmp_path / "scan.png", model)
    assert answer.json()["score"] == pytest.approx(float(model.score(image)), abs=1e-3)
    threshold = model.calibration.threshold(model.signal, 0.05)
    assert answer.json()["flagged"] == bool(model.signals(image)[model.signal][0] > threshold)


def test_file_replaces_an_older_one_atomically(model, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"older")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "_pt2", lambda *_: b"new")
    monkeypatch.setattr(export, "_open_pt2", lambda _: lambda batch: model_run(model, batch))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            export_model(model, path)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["model.pt2"]
    export_model(model, path)
    assert path.read_bytes() == b"new"
