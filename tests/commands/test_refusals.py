"""Everything that can be asked wrongly gets one sentence, and nothing is written."""

import pytest

REFUSALS = [
    ("train", "train needs a folder or CSV of images, or --resume RUN"),
    ("train FILMS -o run --preset vae --ablation no_skip", "--ablation names a configuration of its own"),
    ("train nowhere", "nowhere does not exist"),
    ("train empty", "empty has no image"),
    ("train notes.txt", "notes.txt is neither an image nor a CSV"),
    ("train FILMS --image-size 100", "image_size must be a multiple of"),
    ("train FILMS --epochs 0", "epochs must be at least 1, got 0"),
    ("train FILMS --preset squid --rho 3", "rho must be between 0 and 1, got 3.0"),
    ("train FILMS --ablation no_skip --topk 0", "topk must be at least 1, got 0"),
    ("train FILMS --val-share 1", "val_share must lie strictly between 0 and 1, got 1.0"),
    ("train FILMS --device tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("train FILMS --threads -1", "threads and workers must be at least 0"),
    ("train FILMS --criterion auc", 'criterion "auc" needs normal and abnormal validation images'),
    ("train FILMS -o notes.txt", "the run folder must be a folder, got the file notes.txt"),
    ("train FILMS -o notes.txt/run", "notes.txt"),
    ("train --resume nowhere", "nowhere is not a run; start one with"),
    ("train --resume MODEL", "is not a run; start one with"),
    ("train --resume MODEL --epochs 5 -o x", "leave out --epochs, -o"),
    ("train --resume=MODEL --batch_size=5", "leave out --batch-size"),
    ("train --resume odd", "was not started by `simsid train`"),
    ("train --resume cut", "cut/run.json is not a run's request"),
    ("score nowhere FILMS -o out", "nowhere/model.json does not exist"),
    ("score notes.txt FILMS -o out", "notes.txt/model.json cannot be read"),
    ("score foreign FILMS -o out", "foreign/model.json: kind must be one of simsid, "),
    ("score newer FILMS -o out", "newer/model.json must be of format 1"),
    ("score unknown FILMS -o out", "unknown/model.json is not a model: 'moustache' is not a configuration field"),
    ("score MODEL nowhere -o out", "nowhere does not exist"),
    ("score MODEL empty -o out", "empty has no image"),
    ("score MODEL FILMS -o notes.txt", "the output must be a folder, got the file notes.txt"),
    ("score MODEL FILMS -o notes.txt/out", "notes.txt"),
    (
        "score MODEL FILMS -o out --false-positive-rate 5",
        "false_positive_rate must lie strictly between 0 and 1, got 5.0",
    ),
    ("score MODEL FILMS -o out --batch-size 0", "batch_size must be at least 1, got 0"),
    ("score MODEL FILMS -o out --pictures -2", "pictures must be at least 0, got -2"),
    (
        "score MODEL FILMS -o out --precision bfloat16",
        "use precision auto, or calibrate it again: simsid calibrate MODEL FOLDER --precision bfloat16",
    ),
    (
        "score zhanglab FILMS -o out --precision bfloat16",
        "or fit another model, whose memory has features of that precision: simsid train FOLDER --preset features "
        "--precision bfloat16 -o NEW",
    ),
    ("evaluate zhanglab ZHANGLAB -o out --precision bfloat16", "simsid train FOLDER --preset features --precision bfl"),
    ("evaluate MODEL FILMS -o out", "needs a label for every image, got 7 of 7 without one"),
    ("evaluate MODEL ZHANGLAB --split nonsense", "has no 'nonsense' split; it has"),
    ("evaluate MODEL ZHANGLAB --false-positive-rate 0", "false_positive_rate must lie strictly between 0 and 1"),
    ("calibrate MODEL empty", "empty has no image"),
    ("calibrate empty FILMS", "empty/model.json does not exist"),
    ("score MODEL FILMS -o out --signal moustache", "signal must be one of discriminator_per_image"),
    ("score MODEL FILMS -o out --exclude *.png", "has no image"),
    ("evaluate MODEL ZHANGLAB --signal pixel_knn", "signal must be one of discriminator_per_image"),
    ("evaluate MODEL ZHANGLAB -o notes.txt", "the output must be a folder, got the file notes.txt"),
    ("calibrate MODEL FILMS --val-share 0", "val_share must lie strictly between 0 and 1, got 0.0"),
    ("train FILMS --signal moustache", "signal must be one of"),
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
    (tmp_path / "notes.txt").write_text("not an image")
    for name, file, content in (
        ("odd", "run.json", '{"command": "demo"}'),
        ("cut", "run.json", '{"command": "train", "data": "x"}'),
        ("foreign", "model.json", '{"kind": "another library\'s"}'),
        ("newer", "model.json", '{"kind": "simsid", "format": 2}'),
        ("unknown", "model.json", (model / "model.json").read_text().replace('"width"', '"moustache"')),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    for path in model.glob("*.safetensors"):
        (tmp_path / "unknown" / path.name).write_bytes(path.read_bytes())
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    for name, path in {"MODEL": model, "FILMS": films, "ZHANGLAB": zhanglab}.items():
        line, message = line.replace(name, str(path)), message.replace(name, str(path))
    done = simsid(*line.split())
    assert done.code == 2, done
    assert done.err.startswith("simsid: ") and len(done.err.splitlines()) == 1 and message in done.err, done.err
    if "--criterion" not in line:
        assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before
