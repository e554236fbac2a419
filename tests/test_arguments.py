"""Wrong arguments of the Python interface: each is answered by one sentence of simsid's own."""

import pytest
import tiny
import torch

import simsid
from simsid import Config, TrainingConfig, data, scoring
from simsid.errors import SimsidError
from simsid.evaluation import evaluate
from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory

X = tiny.images(4)
QUERY, MEMORY = torch.randn(2, 4, 8), torch.randn(4, 6, 8)


@pytest.fixture(scope="module")
def model():
    made = tiny.model()
    made.calibrate(X, X)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("model")
    model.save(path)
    return path


WRONG = {
    "Trainer dict": lambda model, folder: simsid.Trainer(model, {"epochs": 1}),
    "Trainer model str": lambda model, folder: simsid.Trainer("m"),
    "Trainer group": lambda model, folder: simsid.Trainer(model, group=3),
    "Trainer run int": lambda model, folder: simsid.Trainer(model, run=3),
    "fit list": lambda model, folder: simsid.Trainer(model).fit([1, 2, 3]),
    "fit list paths": lambda model, folder: simsid.Trainer(model).fit(["a.png"]),
    "fit None": lambda model, folder: simsid.Trainer(model).fit(None),
    "fit str": lambda model, folder: simsid.Trainer(model).fit("folder"),
    "fit val int": lambda model, folder: simsid.Trainer(model).fit(X, 3),
    "fit resume": lambda model, folder: simsid.Trainer(model).fit(X, resume="yes"),
    "score None": lambda model, folder: model.score(None),
    "score str": lambda model, folder: model.score("film.png"),
    "score dict": lambda model, folder: model.score({}),
    "score 3d": lambda model, folder: model.score(X[0]),
    "score uint8": lambda model, folder: model.score((X * 127).to(torch.uint8)),
    "score signal": lambda model, folder: model.score(X, signal="nope"),
    "score signal int": lambda model, folder: model.score(X, signal=3),
    "signals names int": lambda model, folder: model.signals(X, 3),
    "signals names list int": lambda model, folder: model.signals(X, [3]),
    "signals batch str": lambda model, folder: model.signals(X, batch_size="4"),
    "signals batch 2.5": lambda model, folder: model.signals(X, batch_size=2.5),
    "signals 0..255": lambda model, folder: model.signals((X + 1) * 127),
    "signals nan": lambda model, folder: model.signals(X * float("nan")),
    "maps name": lambda model, folder: model.maps(X, "nope"),
    "maps None": lambda model, folder: model.maps(X, None),
    "reconstruct None": lambda model, folder: model.reconstruct(None),
    "calibrate None": lambda model, folder: model.calibrate(None),
    "calibrate int": lambda model, folder: model.calibrate(X, 3),
    "save None": lambda model, folder: model.save(None),
    "save int": lambda model, folder: model.save(3),
    "load None": lambda model, folder: simsid.load(None),
    "load int": lambda model, folder: simsid.load(3),
    "load device": lambda model, folder: simsid.load(folder, device="foo"),
    "load device int": lambda model, folder: simsid.load(folder, device=2.5),
    "load opt": lambda model, folder: simsid.load(folder, foo=1),
    "load fused": lambda model, folder: simsid.Model.load(folder, fused="x"),
    "Model width str": lambda model, folder: simsid.Model(width="8"),
    "Model config dict": lambda model, folder: simsid.Model({"width": 8}),
    "Model patches 2.5": lambda model, folder: simsid.Model(patches=2.5),
    "Config None": lambda model, folder: Config(items=None),
    "Config list": lambda model, folder: Config(threshold=["inclusive"]),
    "Config.from_dict None": lambda model, folder: Config.from_dict(None),
    "Config ablation": lambda model, folder: Config.ablation("x"),
    "TrainingConfig": lambda model, folder: TrainingConfig(epochs="3"),
    "TrainingConfig nan": lambda model, folder: TrainingConfig(learning_rate=float("nan")),
    "load_images str": lambda model, folder: data.load_images("folder"),
    "load_images None": lambda model, folder: data.load_images(None),
    "load_images ints": lambda model, folder: data.load_images([1, 2]),
    "load_images size": lambda model, folder: data.load_images(["a.png"], "128"),
    "load_images size f": lambda model, folder: data.load_images(["a.png"], 12.5),
    "load_images workers": lambda model, folder: data.load_images(["a.png"], workers="2"),
    "load_images aspect": lambda model, folder: data.load_images(["a.png"], aspect="x"),
    "Radiographs None": lambda model, folder: data.Radiographs(None),
    "Radiographs int": lambda model, folder: data.Radiographs(3),
    "Radiographs missing": lambda model, folder: data.Radiographs("nowhere"),
    "ZhangLab": lambda model, folder: data.ZhangLab(folder),
    "open_dataset None": lambda model, folder: data.open_dataset(None),
    "DigitAnatomy": lambda model, folder: data.DigitAnatomy(seed="x"),
    "DigitAnatomy2": lambda model, folder: data.DigitAnatomy(train=2.5),
    "Digit load": lambda model, folder: data.DigitAnatomy(train=4).load("nope"),
    "read None": lambda model, folder: data.read(None),
    "read missing": lambda model, folder: data.read("nowhere.png"),
    "read model": lambda model, folder: data.read("X.png", 3),
    "read_image None": lambda model, folder: data.read_image(None),
    "partition": lambda model, folder: data.partition(None, 0.1),
    "partition share": lambda model, folder: data.partition(data.DigitAnatomy(train=4), "x"),
    "augment": lambda model, folder: data.augment(None),
    "augment tr": lambda model, folder: data.augment(X, translate="x"),
    "evaluate None": lambda model, folder: evaluate(model, None),
    "evaluate tensor": lambda model, folder: evaluate(model, X),
    "evaluate model": lambda model, folder: evaluate(None, X),
    "score_files None": lambda model, folder: list(scoring.score_files(model, None)),
    "score_files str": lambda model, folder: list(scoring.score_files(model, "folder")),
    "score_files rate": lambda model, folder: list(scoring.score_files(model, [], false_positive_rate="x")),
    "score_files workers": lambda model, folder: list(scoring.score_files(model, ["a.png"], workers=2.5)),
    "score_files bs": lambda model, folder: list(scoring.score_files(model, ["a.png"], batch_size="4")),
    "score_archive out": lambda model, folder: scoring.score_archive(model, folder, None),
    "score_archive data": lambda model, folder: scoring.score_archive(model, None, folder / "out"),
    "freeze": lambda model, folder: simsid.freeze(3),
    "FM": lambda model, folder: simsid.FeatureMemory(3),
    "FM enc": lambda model, folder: simsid.FeatureMemory(encoder=3),
    "FM fit": lambda model, folder: simsid.FeatureMemory().fit(None),
    "FM score": lambda model, folder: simsid.FeatureMemory().score(X),
    "KNN": lambda model, folder: simsid.models.PixelKNN(neighbors="3"),
    "KNN fit": lambda model, folder: simsid.models.PixelKNN(image_size=48).fit(None),
    "KNN few": lambda model, folder: simsid.models.PixelPCA(image_size=48).fit(X[:1]),
    "KNN unfitted": lambda model, folder: simsid.models.PixelKNN(image_size=48).signals(X),
    "PCA unfitted": lambda model, folder: simsid.models.PixelPCA(image_size=48).signals(X),
    "calib thr": lambda model, folder: model.calibration.threshold("nope", 0.05),
}

KERNELS = {
    "sam None": lambda: space_aware_memory(None, MEMORY),
    "sam topk 2.5": lambda: space_aware_memory(QUERY, MEMORY, 2.5),
    "sam topk str": lambda: space_aware_memory(QUERY, MEMORY, "5"),
    "sam temp tensor": lambda: space_aware_memory(QUERY, MEMORY, temperature=torch.tensor(1.0)),
    "sam temp str": lambda: space_aware_memory(QUERY, MEMORY, temperature="1"),
    "sam threshold": lambda: space_aware_memory(QUERY, MEMORY, threshold=3),
    "sam backend": lambda: space_aware_memory(QUERY, MEMORY, backend=None),
    "sam noise": lambda: space_aware_memory(QUERY, MEMORY, noise=1.0),
    "na grid int": lambda: neighbor_attention(QUERY, QUERY, QUERY, 4),
    "na grid str": lambda: neighbor_attention(QUERY, QUERY, QUERY, "2x2"),
    "na grid 3": lambda: neighbor_attention(QUERY, QUERY, QUERY, (2, 2, 1)),
    "na heads": lambda: neighbor_attention(QUERY, QUERY, QUERY, (2, 2), heads=2.5),
    "na heads str": lambda: neighbor_attention(QUERY, QUERY, QUERY, (2, 2), heads="2"),
    "na pad": lambda: neighbor_attention(QUERY, QUERY, QUERY, (2, 2), heads=2, pad_key=1),
    "ln": lambda: residual_layer_norm(QUERY, None, None, None),
    "ln eps": lambda: residual_layer_norm(QUERY, QUERY, torch.ones(8), torch.ones(8), "x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_one_sentence(case, model, folder):
    with pytest.raises(SimsidError) as caught:
        WRONG[case](model, folder)
    message = str(caught.value)
    assert "\n" not in message and 10 < len(message) < 400
    assert isinstance(caught.value, (ValueError, TypeError, RuntimeError, ArithmeticError)) or case.startswith("read")


@pytest.mark.parametrize("case", KERNELS)
def test_wrong_argument_of_an_op_names_it(case):
    """The ops import nothing from simsid, so their errors are Python's own classes."""
    with pytest.raises((ValueError, TypeError), match=r"must|takes") as caught:
        KERNELS[case]()
    assert "\n" not in str(caught.value)
