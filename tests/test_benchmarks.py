"""The benchmark command, its flag, its JSON and the report made of it; the written-out baseline it measures against."""

import copy
import pathlib
import subprocess
import sys

import pytest
import tiny
import torch

from simsid import TrainingConfig
from simsid.models.losses import reconstruction_loss
from simsid.training.step import TrainingStep

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import baseline  # noqa: E402
import profile_cpu  # noqa: E402
import report  # noqa: E402

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's run takes minutes, and is made by hand")


def run(*arguments, folder=ROOT):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


def test_without_the_flag_benchmarks_are_skipped_with_a_message():
    assert "benchmarks run only with --benchmark" in run("-m", "pytest", "benchmarks/", "-rs", "-k", "norm-Q")


@on_cpu
def test_a_run_says_what_it_left_out_and_its_json_becomes_a_table_and_a_plot(tmp_path):
    results, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    chosen = "neighbor_attention-Q or norm-Q"
    out = run("-m", "pytest", "benchmarks/", "--benchmark", f"--benchmark-json={results}", "-k", chosen)
    assert "left out, 4 times: fused: Triton kernels run on CUDA" in out
    assert "SDPA with an extra key" in out and "nn.MultiheadAttention" not in out

    table = run("benchmarks/report.py", str(results), "--plot", str(picture))
    assert f"torch {torch.__version__}" in table
    rows = cells(table)
    assert rows[0] == ["group", "variant", "wall µs", "GB/s", "speed-up"]
    (batched,) = [row for row in rows if row[:2] == ["residual_layer_norm Q float32 forward", "batched"]]
    assert float(batched[2].replace(",", "")) > 0 and batched[4] == "1.00x"
    assert picture.read_bytes().startswith(b"\x89PNG")


@on_cpu
def test_the_whole_model_is_timed_once_it_agrees_with_the_baseline(tmp_path):
    results, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    chosen = "inference and 16 and (baseline or simsid or graph) and not (epoch or bf16) or train_step and simsid"
    options = ("--benchmark", "--width=1", "--benchmark-max-time=0.1", "--benchmark-min-rounds=1", "-k", chosen)
    out = run("-m", "pytest", "benchmarks/test_whole_model.py", f"--benchmark-json={results}", *options)
    assert "no GPU: the whole model ran on the CPU, at width 1 (--width 32 is the papers')" in out
    assert "left out, 1 times: fused, CUDA graph: Triton kernels run on CUDA" in out

    rows = cells(run("benchmarks/report.py", str(results), "--plot", str(picture)))
    assert rows[0][2:] == ["ms", "ms an image", "images/s", "GFLOP an image", "GFLOP/s", "speed-up"]
    found = {tuple(row[:2]): row[2:] for row in rows[2:]}
    naive, product = (found["inference SimSID, width 1, batch 16", variant] for variant in ("baseline", "simsid"))
    assert naive[-1] == "1.00x" and float(naive[3]) > float(product[3])
    # Timed in turn with a baseline that has no row of its own.
    assert float(found["train_step SimSID, width 1, batch 16", "simsid"][-1].removesuffix("x")) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def whole(op, variant, ms, peak=None, **more):
    row = {"op": op, "shape": "SimSID", "variant": variant, "ms": ms, "images_per_s": 1000 / ms, "wall_us": 2000 * ms}
    return row | more | ({} if peak is None else {"peak_mb": peak})


def test_the_report_compares_the_whole_model_with_its_baseline():
    kernel = {"op": "norm", "shape": "A", "dtype": "float32", "pass": "forward", "variant": "batched", "wall_us": 5.0}
    rows = [
        whole("train_step", "baseline", 8.0, 100.0),
        kernel,
        whole("inference", "eager", 3.0),
        whole("train_step", "simsid", 2.0, 60.0),
        whole("train_step", "in turn", 2.0, baseline_ms=6.0),
    ]
    kernels, models = report.table(rows).split("\n\n")
    assert cells(kernels)[2:] == [["norm A float32 forward", "batched", "5.00", "1.00x"]]
    assert cells(models)[0] == ["group", "variant", "ms", "images/s", "peak MB", "speed-up", "memory"]
    assert cells(models)[2:] == [
        ["train_step SimSID", "baseline", "8.00", "125", "100", "1.00x", "1.00x"],
        ["train_step SimSID", "simsid", "2.00", "500", "60.0", "4.00x", "0.60x"],
        ["train_step SimSID", "in turn", "2.00", "500", "", "3.00x", ""],
        ["inference SimSID", "eager", "3.00", "333", "", "", ""],
    ]


def test_the_report_sets_simsid_against_squid_beside_the_papers():
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
    assert [row[-1] for row in cells(report.table(rows))[2:]] == ["1.00x", "1.00x", "4.00x", "3.00x"]
    first, second = report.epoch_lines(rows)
    assert "baseline: SimSID 4.00 s against SQUID 6.00 s, 1.50x as fast" in first
    assert "2.00x as fast; the papers': 11.0 s against 28.2 s, 2.56x" in second
    assert report.epoch_lines(rows[2:3]) == []


CONFIGS = {
    "simsid": {},
    "squid": {"memory": "queue", "rho": 0.7, "topk": 3},
    "released": {"threshold": "exclusive", "decoder_memory": "subpatch"},
    "merged last": {"merge_levels": 0, "skip_levels": 0, "image_size": 72, "patches": 3},
    "shared": {"space_aware": False, "temperature": 2.0, "stop_gradient": False},
}


def pair(**changes):
    """Return a model in float64 and a baseline of the same weights."""
    ours = tiny.model(**changes).double()
    return ours, baseline.Baseline(copy.deepcopy(ours))


def films(model, count=3):
    size = model.config.image_size
    noise = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * 2 - 1


def close(mine, reference, relative=1e-9):
    assert (mine - reference).norm() <= relative * reference.norm()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_the_baseline_reconstructs_and_learns_as_the_model_does(name, training):
    ours, theirs = pair(**CONFIGS[name])
    images, results = films(ours), []
    for model, reconstruct in ((ours, ours), (theirs.model, theirs)):
        model.train(training)
        torch.manual_seed(1)
        found = reconstruct(images) if training or model is theirs.model else reconstruct(images, teacher=True)
        loss = reconstruction_loss(images, found.student) + reconstruction_loss(images, found.teacher)
        parameters = [weight for part, weight in model.named_parameters() if not part.startswith("discriminator.")]
        gradients = torch.autograd.grad(loss + found.distillation, parameters)
        results.append((found, torch.cat([gradient.flatten() for gradient in gradients])))
    (mine, my_gradient), (reference, gradient) = results
    for part in ("student", "teacher", "distillation", "query", "retrieved"):
        close(getattr(mine, part), getattr(reference, part))
    close(my_gradient, gradient)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_baseline_scores_as_the_model_does(name, batch_size):
    ours, theirs = pair(**CONFIGS[name])
    want, got = ours.signals(films(ours)), theirs.signals(films(ours), batch_size)
    assert got.keys() == want.keys()
    for signal, values in want.items():
        assert got[signal] == pytest.approx(values, rel=1e-7), signal


@pytest.mark.parametrize("name", ["simsid", "squid"])
def test_the_baseline_trains_as_the_product_does(name):
    # Without draws, which the two make in another order.
    ours, theirs = pair(**CONFIGS[name] | {"rho": 1.0})
    options = TrainingConfig(translate=0.0, scale=0.0)
    images, means = films(ours, 5), []
    for model, make in ((ours, TrainingStep), (theirs.model, baseline.BaselineStep)):
        model.train()
        step = make(model, options)
        for number in range(4):
            step(images, number)
        means.append(step.means())
    mine, reference = means
    assert mine == pytest.approx(reference, rel=1e-4)
    assert reference.keys() == {"real", "fake", "student", "teacher", "distillation", "adversarial"}
    if ours.queue is not None:
        close(ours.queue.items, theirs.model.queue.items, 1e-4)
        assert ours.queue.pointer == theirs.model.queue.pointer == 10 % ours.config.items


def test_the_baseline_scores_files_as_the_product_does(tmp_path):
    from simsid.scoring.stream import score_files

    model = tiny.calibrated(tmp_path / "model")
    files = tiny.films(tmp_path / "films", 3)
    want = list(score_files(model, files))
    for batch_size in (1, 2):
        got = list(baseline.Baseline(copy.deepcopy(model)).score_files(files, batch_size))
        assert [score.path for score in got] == [score.path for score in want]
        assert [score.alarm for score in got] == [score.alarm for score in want]
        assert [score.score for score in got] == pytest.approx([score.score for score in want], rel=1e-3)


def test_the_baseline_refuses_what_the_papers_do_not_have():
    with pytest.raises(ValueError, match="border='zero' only, got 'mask'"):
        baseline.Baseline(tiny.model(border="mask"))


@pytest.mark.parametrize("naive", [False, True])
def test_the_profile_finds_convolutions_memories_and_attention_both_ways(naive, monkeypatch):
    # Every event takes as long as the others: the seconds count events then, the same in every run.
    monkeypatch.setattr(profile_cpu.FunctionEvent, "self_cpu_time_total", 1.0)
    model = tiny.model().train()
    reconstruct = baseline.Baseline(model) if naive else model
    images = tiny.images(2)

    def learn():
        found = reconstruct(images)
        (found.student.square().mean() + found.distillation).backward()

    forward, both = profile_cpu.shares(lambda: reconstruct(images)), profile_cpu.shares(learn)
    for seconds in (forward, both):
        assert seconds.keys() >= {"convolution", "normalisation", "memory", "attention", "interpolation", "activation"}
    assert both["memory"] > forward["memory"] and both["attention"] > forward["attention"]
    table = profile_cpu.table({"scoring": forward, "training step": both}, {"scoring": 2, "training step": 2})
    assert cells(table)[-1][0] == "all" and cells(table)[-1][1] == "100.0"
