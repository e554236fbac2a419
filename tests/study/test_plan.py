"""Width and epochs of a study: given, or picked for a number of minutes."""

import pytest

from simsid.config import TrainingConfig
from simsid.errors import ConfigError
from simsid.study import STUDIES, Cell, Plan, StudyImages, plan


@pytest.mark.parametrize(
    ("minutes", "width", "epochs"),
    [(1e-6, 4, 1), (1, 4, 3), (10, 16, 9), (100, 32, 46), (1000, 32, 200)],
    ids=["not one epoch", "few epochs", "three widths fit", "all widths fit", "more than the papers' epochs"],
)
def test_a_budget_picks_the_greatest_width_with_enough_epochs(monkeypatch, minutes, width, epochs):
    # 2 cells and 2 seeds; an epoch costs a second for each channel, a run 3 seconds more.
    monkeypatch.setattr(plan, "_cost", lambda cell, width, images, device: (3.0, 1.0 * width, 0.25))
    chosen = plan.choose_plan(minutes, [Cell("a"), Cell("b")], 2, None, "cpu")
    assert (chosen.width, chosen.epochs) == (width, epochs)
    assert chosen.measured == f"picked for {minutes:g} minutes from 0.250 s an iteration"
    if epochs > 1:
        assert 2 * 2 * (3 + epochs * width) <= 60 * minutes


def test_costs_are_measured_on_a_model_and_its_images(small):
    fixed, epoch, iteration = plan._cost(Cell("full model"), 4, StudyImages(None, most=4), "cpu")
    assert 0 < iteration <= epoch < 30 and 0 < fixed < 30


def test_few_epochs_train_at_ten_times_the_papers_rate_and_the_papers_epochs_as_published():
    cell = Cell("a", training={"generator_weight_decay": 0.5})
    short, published = (Plan(8, epochs).training(cell, 3, "last", False) for epochs in (49, 200))
    assert (short.learning_rate, short.final_learning_rate) == (1e-3, 1e-4)
    assert (published.learning_rate, published.epochs) == (TrainingConfig().learning_rate, 200)
    for training in (short, published):
        assert (training.seed, training.criterion, training.generator_weight_decay) == (3, "last", 0.5)
        assert (training.translate, training.scale) == (0.05, 0.05)
    assert Plan(8, 49).training(Cell("b"), 0, "last", False).generator_weight_decay == 0


@pytest.mark.parametrize(("epochs", "rate"), [(49, 1.5e-3), (200, 1e-4)])
def test_digits_are_not_augmented_and_few_epochs_of_them_train_at_a_higher_rate(epochs, rate):
    training = Plan(8, epochs).training(Cell("a"), 0, "last", True)
    assert (training.translate, training.scale, training.learning_rate) == (0.0, 0.0, rate)
    augmented = Plan(8, epochs).training(Cell("a", training={"translate": 0.1}), 0, "last", True)
    assert augmented.translate == 0.1


@pytest.mark.parametrize("digits", [True, False], ids=["digits", "radiographs"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_can_be_built_unless_its_patches_do_not_divide_the_image(name, digits):
    def build(cell):
        try:
            return plan.configuration(cell, digits, 4 if plan.is_network(cell) else None, 1)
        except ConfigError as error:
            assert name == "patches" and "image_size must be a multiple of" in str(error)

    configurations = [config for config in map(build, STUDIES[name].cells) if config is not None]
    assert len(configurations) >= 2
    if name in ("components", "squid_components", "topk", "items", "patches"):
        assert len(set(configurations)) == len(configurations), "two cells are the same model"
    if name == "components":
        assert len(configurations) == 11
    if name == "patches" and not digits:
        assert [config.patches for config in configurations] == [1, 2, 4, 8]


def test_digits_change_sizes_and_the_lung_weight_and_the_seed_enters_where_it_is_a_field():
    assert plan.configuration(Cell("a", "features"), True, seed=5).weight == "uniform"
    assert plan.configuration(Cell("a", "features"), False, seed=5).seed == 5
    assert plan.configuration(Cell("a", "pixel_knn"), True).image_size == 96
    assert plan.configuration(Cell("a", "simsid", {"topk": 7}), True).topk == 7
    assert plan.configuration(Cell("a", "memae"), True).temperature == 1.0
