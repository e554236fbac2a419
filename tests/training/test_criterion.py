"""Which epoch is kept, and when a training stops early."""

import pytest
import torch

from simsid import TrainingConfig, data
from simsid.errors import InputError
from simsid.training.criterion import choose_best, choose_criterion, is_out_of_patience
from simsid.training.state import History


def labeled(*labels):
    """Return an image of zeros for each label."""
    records = tuple(data.Record(str(i), label=label) for i, label in enumerate(labels))
    return data.ImageSet(torch.zeros(len(labels), 1, 48, 48, dtype=torch.uint8), records)


@pytest.mark.parametrize(
    ("criterion", "labels", "expected"),
    [
        ("auto", (0, 1), "auc"),
        ("auto", (0, None), "reconstruction"),
        ("auto", (1, 1), "last"),
        ("auto", None, "last"),
        ("reconstruction", (0, 1), "reconstruction"),
        ("memory_distance", (0, 1), "memory_distance"),
        ("synthetic", (0,), "synthetic"),
        ("last", (0, 1), "last"),
    ],
)
def test_criterion_is_the_best_that_the_images_allow(criterion, labels, expected):
    val = None if labels is None else labeled(*labels)
    assert choose_criterion(TrainingConfig(criterion=criterion), val, ["memory_distance"]) == expected


@pytest.mark.parametrize(
    ("criterion", "labels", "message"),
    [
        ("auc", (0, 0), "needs normal and abnormal validation images, got 2 normal and 0 abnormal"),
        ("auc", (1,), "got 0 normal and 1 abnormal"),
        ("reconstruction", (1,), "needs normal validation images, got none"),
        ("reconstruction", None, "needs normal validation images, got none"),
        ("synthetic", (1,), '"synthetic" needs normal validation images, got none'),
        ("memory_distance", (0,), "needs a model with an in-painting block, got one without"),
    ],
)
def test_criterion_without_its_images_is_refused(criterion, labels, message):
    val = None if labels is None else labeled(*labels)
    with pytest.raises(InputError, match=message):
        choose_criterion(TrainingConfig(criterion=criterion), val, ["residual"])


def course(name, values, criterion, patience=0):
    """Return the history of epochs with these values (None: not finite), until patience ends it."""
    history = History()
    for number, value in enumerate(values):
        epoch = {"epoch": number} | ({} if value is None else {name: value})
        choose_best(history, epoch, criterion, "residual")
        history.epochs.append(epoch)
        if is_out_of_patience(history, TrainingConfig(patience=patience)):
            break
    return history


def test_best_epoch_is_the_first_with_the_best_value():
    history = course("val_auc_residual", [0.5, 0.7, 0.6, 0.7], "auc")
    assert (history.best_epoch, history.best_value) == (1, 0.7)
    history = course("val_reconstruction", [5.0, 3.0, 4.0], "reconstruction")
    assert (history.best_epoch, history.best_value) == (1, -3.0)
    assert course("val_reconstruction", [5.0, 3.0, 4.0], "last").best_epoch == 2
    assert course("val_memory_distance", [5.0, 3.0, 4.0], "memory_distance").best_epoch == 1
    assert course("val_synthetic_residual", [0.5, 0.7, 0.6], "synthetic").best_epoch == 1


def test_epoch_without_a_value_is_kept_only_until_one_has_a_value():
    history = course("val_auc_residual", [None, 0.3, None, 0.2], "auc")
    assert (history.best_epoch, history.best_value) == (1, 0.3)
    assert course("val_auc_residual", [None, None], "auc").best_epoch == 0


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (1, 3), (2, 4), (4, 5)])
def test_patience_counts_epochs_without_a_better_one(patience, epochs):
    history = course("val_reconstruction", [5.0, 3.0, 4.0, 3.5, 1.0], "reconstruction", patience)
    assert len(history.epochs) == epochs
