"""The benchmark command, its options, its report and its profile."""

import ast
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import tiny
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import baseline  # noqa: E402
import measure  # noqa: E402
import profile_cpu  # noqa: E402
import report  # noqa: E402

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a run takes minutes and is started by hand")
# An outer pytest-xdist tells its workers by these variables, and pytest-benchmark in the child would read them.
ENVIRONMENT = {name: value for name, value in tiny.ENVIRONMENT.items() if not name.startswith("PYTEST")}
# The child loads no other plugin: importing them takes longer than the benchmarks.
ENVIRONMENT["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# Runs pytest where only PyTorch and Triton, with what they need themselves, can be imported.
BARE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""
BLOCKED = {"numpy", "PIL", "sklearn", "joblib", "safetensors", "matplotlib", "nvtx", "tqdm", "tyro", "pydicom", "scipy"}


def run(*arguments):
    command = [sys.executable, *arguments, "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@on_cpu
def test_op_benchmarks_run_with_pytorch_and_triton_alone(tmp_path, capsys):
    results, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    chosen = ["-k", "neighbor_attention-Q-float32-backward or norm-Q or test_inference"]
    code = BARE.replace("{blocked}", repr(BLOCKED))
    out = run("-c", code, "benchmarks/", "--benchmark", "-rs", f"--benchmark-json={results}", *chosen)
    assert "not timed, 4 groups: fused: Triton kernels run on CUDA" in out
    assert "benchmarks of the whole model need numpy" in out

    report.main([str(results), "--plot", str(picture)])
    table = capsys.readouterr().out
    assert f"torch {torch.__version__}" in table and "SDPA with an extra key" in table
    rows = tiny.cells(table)
    assert rows[0] == ["group", "variant", "wall µs", "± %", "GB/s", "speed-up"]
    groups = {tuple(row[:2]): row[2:] for row in rows[2:]}
    for which in ("forward", "backward", "both"):
        once, again = (groups[f"residual_layer_norm Q float32 {which}", name] for name in ("batched", "batched, again"))
        assert float(once[0].replace(",", "")) > 0 and once[-1] == "1.00x" and float(again[-1].removesuffix("x")) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def whole_model(monkeypatch):
    """Return the benchmarks of the whole model at tiny sizes, and the rows that they keep."""
    import models
    import test_models

    monkeypatch.setattr(models, "METHODS", dict.fromkeys(models.METHODS, lambda width: tiny.config()))
    monkeypatch.setattr(models, "IMAGE_SIZE", (60, 50))
    models.gflop.cache_clear()
    test_models.assert_baseline_agrees.cache_clear()
    rows = []

    def timed(about, builders, images, **more):
        made, wrong = test_models.time_group(
            about, builders, images, lambda _: 1, lambda call, rounds, iterations: call(), **more
        )
        rows.extend(made)
        assert not wrong

    yield types.SimpleNamespace(benchmarks=test_models, models=models, timed=timed, rows=rows)
    models.gflop.cache_clear()
    test_models.assert_baseline_agrees.cache_clear()


SIZES = types.SimpleNamespace(width=4, folder=5, train=16, test=4)
CHOSEN = ["baseline", "simsid"]


@on_cpu
def test_whole_model_is_timed_in_turn_with_the_baseline(whole_model):
    whole_model.benchmarks.test_train_step(whole_model.timed, SIZES, CHOSEN)
    whole_model.benchmarks.test_inference(whole_model.timed, SIZES, CHOSEN, 16)
    groups = {}
    for row in whole_model.rows:
        groups.setdefault(row["op"], {})[row["variant"]] = row
    assert groups.keys() == {"train_step", "inference"}
    for group in groups.values():
        assert list(group) == ["baseline", "simsid", "simsid, again"]
        assert all(row["ms"] > 0 and row["gflop_per_s"] > 0 for row in group.values())
        assert group["baseline"]["gflop_per_image"] > group["simsid"]["gflop_per_image"]


@on_cpu
def test_folder_is_timed_image_by_image_too(whole_model, tmp_path):
    folder = whole_model.models.write_images(tmp_path, 16)
    whole_model.benchmarks.test_score_folder(whole_model.timed, SIZES, CHOSEN, folder)
    assert [row["variant"] for row in whole_model.rows] == ["baseline", "simsid", "baseline, batch 1", "simsid, again"]


@on_cpu
def test_epoch_compares_simsid_with_squid(whole_model, tmp_path):
    files, notes = whole_model.models.files_of(whole_model.models.write_images(tmp_path, 17), None), []
    files = (files[:16], files[:4], (len(files), len(files)), "generated images")
    whole_model.benchmarks.test_epoch(whole_model.timed, SIZES, CHOSEN, notes.append, files, "training")
    assert [row["shape"] for row in whole_model.rows] == 5 * ["training, 16 images"]
    assert len(report.epoch_lines(whole_model.rows)) == 2 and "16 of 17 images trained on, 4 of 17 scored" in notes[0]


@on_cpu
def test_step_that_is_wrong_is_not_timed(whole_model, monkeypatch):
    monkeypatch.setattr(baseline, "adversarial", lambda logits, label: 2 * logits.square().mean())
    with pytest.raises(AssertionError, match=r"simsid: (real|fake|adversarial)"):
        whole_model.benchmarks.test_train_step(whole_model.timed, SIZES, CHOSEN)
    assert [row["variant"] for row in whole_model.rows] == ["baseline"]


@pytest.mark.parametrize("flag", [False, True])
def test_benchmarks_are_skipped_without_the_flag(flag):
    spec = importlib.util.spec_from_file_location("benchmark_conftest", ROOT / "benchmarks" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    marks = []
    config = types.SimpleNamespace(getoption=lambda name: flag and name == "--benchmark")
    conftest.pytest_collection_modifyitems(config, [types.SimpleNamespace(add_marker=marks.append)])
    assert [mark.kwargs["reason"] for mark in marks] == ([] if flag else ["benchmarks run only with --benchmark"])


@on_cpu
def test_variant_that_disagrees_is_not_timed():
    import test_ops

    calls = {"batched": torch.sin, "right": lambda x: torch.sin(x) + 1e-7, "wrong": torch.cos}
    inputs, cotangent = (torch.rand(4, 5),), torch.rand(4, 5)
    for which in ("forward", "backward", "both"):
        makers, wrong = test_ops.agreeing(calls, which, inputs, cotangent, 1e-4)
        assert list(makers) == ["batched", "right"] and len(wrong) == 1
        assert wrong[0].startswith("wrong: result 0 is ")
    seconds = test_ops.time_group(makers, 1, lambda one_round, _: [one_round() for _ in range(3)])
    assert {name: len(values["wall"]) for name, values in seconds.items()} == {
        "batched": 3,
        "right": 3,
        "batched, again": 3,
    }


@on_cpu
def test_ops_are_timed_in_turn_and_the_fused_one_again_at_the_end():
    import test_ops

    order = []
    makers = {name: lambda name=name: lambda: order.append(name) for name in ("batched", "fused", "other")}
    test_ops.time_group(makers, 1, lambda one_round, _: [one_round() for _ in range(3)])
    assert order == ["batched", "fused", "other"] * 4 + ["fused"] * 3  # the first round warms up


def test_backward_pass_is_timed_without_its_forward_pass():
    import test_ops

    forward_passes = []

    def call(x):
        forward_passes.append(x)
        return x.sin()

    work = test_ops.prepare(call, "backward", (torch.rand(3),), torch.ones(3))
    assert all(torch.equal(*work(), forward_passes[0].cos()) for _ in range(3)) and len(forward_passes) == 1


def test_cold_calls_go_round_more_tensors_than_the_cache_holds(monkeypatch):
    graphs, made = [], iter(range(1000))

    class Replays:
        def __init__(self, calls):
            graphs.append([call() for call in calls])

        def seconds(self):
            return 1e-4

    monkeypatch.setattr(measure, "Replays", Replays)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1000))

    def prepare():
        number = next(made)
        return lambda: number

    assert list(measure.device_replays(prepare, bytes_read=300)) == ["device", "cold"]
    once, warm, cold = graphs
    assert once == [0] and warm == [0] * 20  # 2 ms of calls that take 0.1
    # Seven copies of 300 bytes are more than twice 1000, and no call finds its tensors in the cache.
    assert cold == [*range(1, 8)] * 3


def test_spread_is_half_the_interquartile_range():
    times = measure.Times.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert times == (3.0, pytest.approx(100 / 3))


def whole(op, variant, ms, peak=None, **more):
    row = {"op": op, "shape": "SimSID", "variant": variant, "ms": ms, "images_per_s": 1000 / ms, "wall_us": 2000 * ms}
    return row | more | ({} if peak is None else {"peak_mb": peak})


def test_report_compares_the_whole_model_with_its_baseline():
    kernel = {"op": "norm", "shape": "A", "dtype": "float32", "pass": "forward", "variant": "batched", "wall_us": 5.0}
    rows = [
        whole("train_step", "baseline", 8.0, 100.0),
        kernel,
        whole("inference", "eager", 3.0),
        whole("train_step", "simsid", 2.0, 60.0),
    ]
    kernels, models = report.table(rows).split("\n\n")
    assert tiny.cells(kernels)[2:] == [["norm A float32 forward", "batched", "5.00", "1.00x"]]
    assert tiny.cells(models)[0] == ["group", "variant", "ms", "images/s", "peak MB", "speed-up", "memory"]
    assert tiny.cells(models)[2:] == [
        ["train_step SimSID", "baseline", "8.00", "125", "100", "1.00x", "1.00x"],
        ["train_step SimSID", "simsid", "2.00", "500", "60.0", "4.00x", "0.60x"],
        ["inference SimSID", "eager", "3.00", "333", "", "", ""],
    ]


def test_report_compares_simsid_with_squid_beside_the_papers():
    papers = {"SimSID": 11.0, "SQUID": 28.2}
    rows = [
        whole("epoch", f"{method}, {kind}", ms, papers_s=papers[method], against=f"{method}, baseline")
        for method, kind, ms in (
            ("SimSID", "baseline", 4000.0),
            ("SQUID", "baseline", 6000.0),
            ("SimSID", "simsid", 1000.0),
            ("SQUID", "simsid", 2000.0),
        )
    ]
    assert [row[-1] for row in tiny.cells(report.table(rows))[2:]] == ["1.00x", "1.00x", "4.00x", "3.00x"]
    first, second = report.epoch_lines(rows)
    assert "baseline: SimSID 4.00 s against SQUID 6.00 s, 1.50x as fast" in first
    assert "2.00x as fast; in the papers 11.0 s against 28.2 s, 2.56x" in second
    assert report.epoch_lines(rows[2:3]) == []


def timed_op(op, shape, variant, device, which="both", **more):
    row = {"op": op, "shape": shape, "dtype": "float32", "pass": which, "variant": variant}
    return row | {"device_us": device, "cold_us": device, "wall_us": 2 * device} | more


def test_report_judges_the_ops_by_their_targets():
    op = report.MEMORY
    rows = [
        timed_op(op, "B", "loop over locations", 1000.0),
        timed_op(op, "B", "batched", 250.0),
        timed_op(op, "B", "batched, torch.compile", 160.0),
        timed_op(op, "B", "fused", 100.0),
        timed_op(op, "B", "fused", 30.0, "forward", percent_of_copy=76.7),
        timed_op(op, "B", "fused", 70.0, "backward", percent_of_copy=55.0),
        timed_op(report.LAYER, "A", report.WINDOWS, 90.0),
        timed_op(report.LAYER, "A", "fused", 40.0),
        timed_op(report.ATTENTION, "A", "batched", 90.0),
        timed_op(report.ATTENTION, "A", "fused", 20.0),
    ]
    judged = {line[0]: line[1:] for line in tiny.cells(report.target_table(rows))[2:]}
    assert judged == {
        f"{op} B, against loop over locations": ["10.00x (1000.0 µs against 100.0 µs)", "at least 10x", "pass"],
        f"{op} B, against batched": ["2.50x (250.0 µs against 100.0 µs)", "at least 3x", "**miss**"],
        f"{op} B, against batched, torch.compile": ["1.60x (160.0 µs against 100.0 µs)", "at least 1.5x", "pass"],
        f"{op} B, forward, bandwidth": ["77 % of a copy", "at least 70 %", "pass"],
        f"{op} B, backward, bandwidth": ["55 % of a copy", "at least 60 %", "**miss**"],
        f"{report.LAYER} A, against {report.WINDOWS}": ["2.25x (90.0 µs against 40.0 µs)", "at least 2x", "pass"],
        f"{report.ATTENTION} A, against batched": ["4.50x (90.0 µs against 20.0 µs)", "at least 5x", "**miss**"],
    }


def test_report_judges_the_whole_model_by_its_targets():
    rows = [
        whole("train_step", "baseline", 60.0, 2000.0),
        whole("train_step", "simsid", 9.0, 1300.0),
        whole("train_step", "fused, CUDA graph, bf16", 8.0, 900.0),
        whole("inference", "baseline", 30.0, 500.0),
        whole("inference", "simsid", 2.5, 250.0),
    ]
    judged = {line[0]: line[1:] for line in tiny.cells(report.target_table(rows))[2:]}
    assert {name: line[-1] for name, line in judged.items()} == {
        "train_step SimSID, simsid": "pass",
        "train_step SimSID, peak memory": "**miss**",
        "train_step SimSID, fused, CUDA graph, bf16": "**miss**",
        "inference SimSID, simsid": "pass",
        "inference SimSID, peak memory": "pass",
    }
    assert judged["train_step SimSID, peak memory"][0] == "0.65 (1300 MB against 2000 MB)"


def test_report_judges_nothing_from_a_cpu():
    cpu = {"op": report.MEMORY, "shape": "B", "dtype": "float32", "pass": "both", "wall_us": 1.0}
    rows = [cpu | {"variant": name} for name in ("batched", "fused")]
    rows += [whole("train_step", name, 1.0) for name in ("baseline", "simsid")]
    assert report.target_table(rows) == ""


def test_report_refuses_results_of_two_machines(tmp_path, capsys):
    for number, device in enumerate(("NVIDIA H100", "NVIDIA A100")):
        content = {"machine_info": {"device": device, "versions": {"torch": "2.13"}}, "benchmarks": []}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "0.json"), str(tmp_path / "1.json")])
    assert (
        "must be of one machine and its versions, got NVIDIA H100: torch 2.13; NVIDIA A100" in capsys.readouterr().err
    )


@pytest.mark.parametrize("naive", [False, True], ids=["model", "baseline"])
def test_profile_finds_convolutions_memories_and_attention_in_both_passes(naive, monkeypatch):
    # Every event takes as long as the others: the seconds then count events, which are the same in every run.
    monkeypatch.setattr(profile_cpu.FunctionEvent, "self_cpu_time_total", 1.0)
    model = tiny.model().train()
    reconstruct = baseline.Baseline(model) if naive else model
    images = tiny.images(2)

    def learn():
        outputs = reconstruct(images)
        (outputs.student.square().mean() + outputs.distillation).backward()

    forward, both = map(profile_cpu.seconds_by_kind, (functools.partial(reconstruct, images), learn))
    for seconds in (forward, both):
        assert seconds.keys() >= {"convolution", "normalization", "memory", "attention", "interpolation", "activation"}
    assert both["memory"] > forward["memory"] and both["attention"] > forward["attention"]
    table = profile_cpu.table({"scoring": forward, "training step": both}, {"scoring": 2, "training step": 2})
    assert tiny.cells(table)[-1][0] == "all" and tiny.cells(table)[-1][1] == "100.0"


def imported(path):
    """Return the top-level modules that a file imports when it is loaded."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_kernels_are_checked_on_a_gpu_with_torch_triton_and_pytest_alone():
    folders = [ROOT / name for name in ("tests/gpu", "tests/kernels")]
    seen, waiting = set(), [ROOT / f"tests/{name}" for name in ("gpu/test_gpu_kernels.py", "gpu/conftest.py")]
    waiting += [ROOT / "tests/kernels/conftest.py", ROOT / "tests/conftest.py"]
    while waiting:
        path = waiting.pop()
        for name in imported(path) - seen:
            seen.add(name)
            waiting += [folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").exists()]
    others = {name for name in seen if not any((folder / f"{name}.py").exists() for folder in folders)}
    assert others - set(sys.stdlib_module_names) <= {"pytest", "simsid", "torch"}
