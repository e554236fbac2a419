"""The script for the day a GPU is there, rehearsed without one: resuming, the time, targets, tables, refusals."""

import json
import pathlib
import sys
import types

import pytest
import tiny
import torch
from _pytest.mark.expression import Expression

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_parts  # noqa: E402
import on_gpu  # noqa: E402
import test_speed  # noqa: E402
from on_gpu import Clock, Headline, Item, Records, Refused  # noqa: E402

ABOUT = {"dry_run": False, "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0"}
DRY = {**ABOUT, "dry_run": True, "device": "x86_64 CPU"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only work moves."""
    now = types.SimpleNamespace(time=1000.0)
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: now.time)
    return now


def item(name, seconds, clock, done, status="passed", **more):
    def run(left):
        done.append((name, left))
        clock.time += seconds
        return {"status": status, **more}

    return Item(name, seconds, run)


def test_a_call_stops_where_the_rest_would_not_fit_and_the_next_goes_on(tmp_path, clock, capsys):
    done = []
    items = [item("one", 30, clock, done), item("two", 60, clock, done), item("three", 10, clock, done)]
    records = Records(tmp_path, "correct", ABOUT, "abc1234")
    left_out = on_gpu.perform(items, records, Clock(on_gpu.MARGIN + 50))
    assert [name for name, _ in done] == ["one", "three"], "what is smaller still fits"
    assert left_out == ["two: may need 60 s, 20 s are left"]
    stored = json.loads((tmp_path / "correct.json").read_text())
    assert stored["about"] == ABOUT and list(stored["items"]) == ["one", "three"]
    assert stored["items"]["one"] | {"when": ""} == {
        "status": "passed",
        "took": 30.0,
        "when": "",
        "commit": "abc1234",
        "command": sys.argv,
    }

    done.clear()
    assert on_gpu.perform(items, Records(tmp_path, "correct", ABOUT), Clock(on_gpu.MARGIN + 70)) == []
    assert done == [("two", 70.0)]
    assert "two: passed, 60" in capsys.readouterr().out


def test_what_was_cut_off_is_done_again_and_what_failed_when_asked(tmp_path, clock):
    done, records = [], Records(tmp_path, "train", ABOUT)
    cut = item("cut", 1, clock, done, status="cut off", reason="3 of 200 epochs are done")
    items = [cut, item("bad", 1, clock, done, status="failed")]
    left_out = on_gpu.perform(items, records, Clock(100))
    assert left_out == ["cut: 3 of 200 epochs are done"]
    on_gpu.perform(items, records, Clock(100))
    assert [name for name, _ in done] == ["cut", "bad", "cut"]
    on_gpu.perform(items, records, Clock(100), again=True)
    assert [name for name, _ in done][3:] == ["cut", "bad"]


@pytest.mark.parametrize("change", [{"dry_run": True}, {"device": "NVIDIA A100"}, {"triton": "3.7.0"}])
def test_records_of_another_machine_are_refused(tmp_path, change, capsys):
    Records(tmp_path, "correct", ABOUT).write()
    for stage in ("correct", "fast"):
        with pytest.raises(Refused):
            Records(tmp_path, stage, ABOUT | change)
    assert "choose another --output" in capsys.readouterr().err
    Records(tmp_path, "fast", ABOUT).write()
    assert list(on_gpu.load(tmp_path)) == ["correct", "fast"]


def test_a_dry_run_is_never_reported_beside_a_gpu(tmp_path, capsys):
    for stage, about in (("correct", ABOUT), ("fast", DRY)):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"about": about, "items": {}}))
    with pytest.raises(Refused):
        on_gpu.main(["report", "--output", str(tmp_path)])
    assert "dry run beside those of a GPU" in capsys.readouterr().err


def kernel(op, shape, variant, device, passes="forward + backward", **more):
    sizes = [16, [4, 4], 100, 8192, 8]
    row = {"op": op, "shape": shape, "dtype": "float32", "pass": passes, "variant": variant, "sizes": sizes}
    return row | {"device_us": device, "device_cold_us": device, "wall_us": 2 * device} | more


def test_kernels_are_held_to_their_targets():
    op = "space_aware_memory"
    rows = [
        kernel(op, "B", "loop over locations", 1000.0),
        kernel(op, "B", "batched", 250.0),
        kernel(op, "B", "batched, torch.compile", 160.0),
        kernel(op, "B", "fused", 100.0),
        kernel(op, "B", "fused", 30.0, "forward", gb_per_s=2300.0, percent_of_copy=76.7),
        kernel(op, "C", "batched", 50.0),
        kernel(op, "C", "fused", 40.0),
        kernel("neighbor_attention_layer", "A", "unfold + nn.MultiheadAttention", 90.0),
        kernel("neighbor_attention_layer", "A", "fused", 20.0),
    ]
    found = {entry.name: entry for entry in on_gpu.kernel_headlines(rows)}
    assert found[f"{op} B, loop over locations"] == Headline(
        f"{op} B, loop over locations",
        "10.00x (1000.0 µs against 100.0 µs)",
        "at least 10x",
        True,
        found[f"{op} B, loop over locations"].hint,
    )
    assert found[f"{op} B, batched"].met is False
    assert found[f"{op} B, batched, torch.compile"].met is True
    assert found[f"{op} A, batched"].met is None, "not measured is no pass"
    assert found[f"{op} B, forward, of the copy's bandwidth"].value == "77 %"
    backward = found[f"{op} B, backward, of the copy's bandwidth"]
    # 130 MB at least in 70 us, of a copy's 3.0 TB/s.
    assert (backward.value, backward.met) == ("62 %", True)
    assert found[f"{op} C, best of PyTorch"].met is True
    assert found["neighbor_attention_layer A, unfold + nn.MultiheadAttention"].met is False
    table = on_gpu.headline_table(list(found.values()))
    assert table.count("**MISS**") == 2 and table.count("    ncu ") == 2
    assert "regex:memory_" in table and '"space_aware_memory-B-float32 and backward and fused and not graph"' in table


def whole(op, variant, ms, peak):
    row = {"op": op, "shape": "SimSID, width 32, batch 16", "variant": variant, "ms": ms, "images_per_s": 1.0}
    return row | {"peak_mb": peak, "wall_us": 1e3 * ms}


def test_the_whole_model_is_held_to_its_targets():
    rows = [
        whole("train_step", "baseline", 60.0, 2000.0),
        whole("train_step", "simsid", 9.0, 1300.0),
        whole("train_step", "fused, CUDA graph, bf16", 8.0, 900.0),
        whole("inference", "baseline", 30.0, 500.0),
        whole("inference", "simsid", 2.5, 250.0),
    ]
    found = {entry.name.split("batch 16, ")[-1] + entry.name[0]: entry for entry in on_gpu.model_headlines(rows)}
    assert {name: entry.met for name, entry in found.items()} == {
        "simsidt": True,
        "fused, CUDA graph, bf16t": False,
        "peak memoryt": False,
        "simsidi": True,
        "peak memoryi": True,
    }
    assert found["peak memoryt"].value == "0.65 (1300 MB against 2000 MB)"


def test_every_benchmark_is_chosen_once_and_the_targets_come_first():
    whole_model = [f"test_{op}[{variant}]" for op in ("train_step", "score_folder") for variant in ("simsid", "eager")]
    whole_model += ["test_train_step[eager, torch.compile]", "test_inference[16-simsid]", "test_epoch[training-SimSID]"]
    names = [
        f"test_speed[{op}-{shape}-{dtype}-forward-fused]"
        for op in test_speed.OPS
        for shape in test_speed.SHAPES
        for dtype in ("float32", "bfloat16")
    ]

    def chosen(expression, name):
        return Expression.compile(expression).evaluate(lambda word, **_: word.lower() in name.lower())

    for name in (*names, *whole_model):
        groups = [title for title, expression, _ in on_gpu.FAST if chosen(expression, name)]
        assert len(groups) == 1, (name, groups)
    for _, expression, _ in on_gpu.FAST_DRY:
        assert any(chosen(expression, name) for name in (*names, *whole_model))


def training(seed, auc, last, kept=4):
    epochs = [{"epoch": i, "loss_student": 0.1, "seconds": 0.5, "val_auc_residual": last} for i in range(6)]
    return {
        "status": "measured",
        "name": "simsid",
        "seed": seed,
        "epochs": epochs,
        "seconds_an_epoch": 0.5,
        "seconds_training": 100.0 + seed,
        "peak_mb": 2000.0,
        "kept_epoch": kept,
        "kept": {"val": {"residual": [auc, auc - 0.1, auc + 0.1]}},
        "commit": "abc",
    }


def test_trainings_are_a_mean_over_seeds_beside_the_baselines(tmp_path):
    items = {f"simsid, float32, 6 epochs, seed {seed}": training(seed, 0.7 + 0.1 * seed, 0.6) for seed in range(3)}
    items["squid, float32, 6 epochs, seed 0"] = {"status": "cut off", "epochs": [], "commit": "abc"}
    items["baselines"] = {"status": "measured", "kept": {"val": {"knn": [0.66, 0.6, 0.7]}}, "commit": "abc"}
    record = {"about": ABOUT, "items": items}
    table = on_gpu.training_table(record)
    assert "| simsid, float32, 6 epochs | 3 | 0.500 ± 0.000 | 101.0 ± 1.0 | 2000 | 5, 5, 5 |" in table
    assert "| residual | 0.800 ± 0.100 | 0.600 ± 0.000 |" in table
    assert "baseline: knn, 0.660 (0.600 to 0.700)" in table and "squid" not in table
    assert [path.name for path in on_gpu.draw({"train": record}, tmp_path)] == ["curves.png"]
    told = on_gpu.document({"train": record}, ["study: later"])
    assert told.startswith("# On a GPU: NVIDIA H100") and "- study: later" in told and "DRY RUN" not in told
    told = on_gpu.document({"train": {**record, "about": DRY}})
    assert told.count(on_gpu.DRY) == 2 and told.startswith("# On a CPU, as a rehearsal")


def test_a_dry_run_meets_no_target():
    rows = [kernel("space_aware_memory", "A", "fused", 1.0)]
    assert on_gpu.headlines({"fast": {"about": DRY, "items": {"x": {"status": "measured", "rows": rows}}}}) == []


def test_a_whole_training_is_asked_for_once_its_time_is_known(tmp_path):
    options = types.SimpleNamespace(dry_run=False, output=tmp_path, epochs=200, seconds=570.0)
    records = Records(tmp_path, "train", ABOUT)
    assert on_gpu._needed("simsid", options, records) == 60
    records.put("one", training(0, 0.7, 0.6))
    assert on_gpu._needed("simsid", options, records) == pytest.approx(150)
    study = Records(tmp_path, "study", ABOUT)
    assert on_gpu._needed("no_skip", options, study) == pytest.approx(150), "as long as its like"
    records.put("two", training(1, 0.7, 0.6) | {"name": "squid", "seconds_an_epoch": 9.0})
    assert on_gpu._needed("squid", options, records) == 570 - on_gpu.MARGIN - 20, "in pieces"


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    status, said = on_gpu.child([sys.executable, "-uc", "print(5); import time; time.sleep(60)"], 2.0, tiny.ENVIRONMENT)
    assert status is None and said == "5\n"


def test_what_tests_say_is_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\ndef test_b(): assert 1 == 2\n\n"
        "@pytest.mark.skip(reason='no')\ndef test_c(): pass\n"
    )
    found = on_gpu.pytest_run([str(tmp_path / "test_it.py")], 60, on_gpu.environment(True))
    assert (found["status"], found["tests"], found["skipped"], found["skipped_because"]) == ("failed", 3, 1, {"no": 1})
    assert found["failures"][0]["test"].endswith("test_b") and "assert 1 == 2" in found["failures"][0]["message"]


def test_a_part_that_ends_without_a_record_has_failed(monkeypatch):
    for said, status, expected in (
        ("boom", 1, "failed"),
        ("", None, "cut off"),
        ('RESULT {"passed": false}', 0, "failed"),
    ):
        monkeypatch.setattr(on_gpu, "child", lambda *_, status=status, said=said: (status, said))
        assert on_gpu.part("kernels", {"dry_run": True}, 5)["status"] == expected


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    """The record of a training stopped by the time says how far it came; the next call finishes it."""
    options = {"dry_run": True, "name": "memory_queue", "seed": 1, "epochs": 3, "precision": "float32"}
    options |= {"runs": str(tmp_path), "seconds": 60.0, "data": None}
    real, calls = gpu_parts.TrainingStep.__call__, []

    def step(self, images, number):
        calls.append(number)
        if len(calls) == 5:
            gpu_parts.signal.raise_signal(gpu_parts.signal.SIGINT)
        real(self, images, number)

    monkeypatch.setattr(gpu_parts.TrainingStep, "__call__", step)
    first = gpu_parts.train(options)
    assert not first["finished"] and len(first["epochs"]) == 1 and "kept" not in first
    second = gpu_parts.train(options)
    assert second["finished"] and len(second["epochs"]) == 3 and second["config"]["memory"] == "queue"
    assert len(calls) == 9, "nothing is trained twice"
    assert set(second["kept"]["val"]) == set(tiny.model().signal_names)
    assert gpu_parts._finite(second) and json.loads(json.dumps(second)) == second


def test_what_is_missing_is_said_before_any_time_is_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "NEEDED", ("torch", "a_package_that_nobody_has"))
    monkeypatch.setattr(on_gpu, "part", lambda *_, **__: pytest.fail("time was spent"))
    for more, message in (([], "missing: a_package_that_nobody_has"), (["--anyway"], "--data must name ZhangLab's")):
        with pytest.raises(Refused):
            on_gpu.main(["train", "--output", str(tmp_path), *more])
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_runs(tmp_path, capsys):
    with pytest.raises(Refused):
        on_gpu.main(["correct", "--anyway", "--output", str(tmp_path / "out")])
    assert "no GPU can be used (--dry-run tries the script on a CPU)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_calls_do_not_write_the_same_records(tmp_path, capsys):
    with on_gpu.alone(tmp_path), pytest.raises(Refused), on_gpu.alone(tmp_path):
        pass
    assert "is in use by process" in capsys.readouterr().err
    (tmp_path / ".lock").write_text("999999999")
    with on_gpu.alone(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_a_dry_run_end_to_end(tmp_path):
    """Baselines and one training through the command itself; the report is made again from the records."""
    chosen = ["--dry-run", "--output", str(tmp_path), "--seeds", "1", "--epochs", "1", "--only"]
    assert on_gpu.main(["train", *chosen, "simsid"]) == 0
    before = (tmp_path / "report.md").read_text()
    assert on_gpu.DRY in before and "simsid, float32, 1 epochs" in before
    assert on_gpu.main(["report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"train.json", "report.md", "curves.png", "runs"}
