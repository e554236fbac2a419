"""Exports a model to one file that runs without simsid: a PyTorch program (`.pt2`) or ONNX (`.onnx`)."""

import contextlib
import io
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simsid import __version__, checkpoint
from simsid.errors import ExportError, InputError
from simsid.models import AnomalyModel
from simsid.models.scorer import Scorer
from simsid.models.signals import SIGNALS

SUFFIXES = (".pt2", ".onnx")
METADATA = "simsid.json"
"""Key of the metadata in the file: an extra file of a PyTorch program, a metadata property of an ONNX model."""

TOLERANCE = 1e-4
"""Largest difference from the model's own signals, in standard deviations of the signal."""

CHECKED = (1, 7, 24)
"""Batch sizes in which the 32 images of the comparison are scored."""

Run = Callable[[Tensor], dict[str, np.ndarray]]


def export_model(
    model: AnomalyModel,
    path: str | os.PathLike[str],
    *,
    false_positive_rate: float = 0.05,
    images: Tensor | None = None,
) -> dict[str, Any]:
    """Write a calibrated model as one file that runs without simsid, atomically.

    The program takes `images`, float32 `[batch, 1, H, W]` in -1..1 for any batch size, and returns by name, float64
    `[batch]` each: every signal in the order of the table of signals, and `score` in 0..1. The file is written only if
    its signals of 32 images differ from the model's by at most 1e-4 standard deviations of the signal (over those
    images, or over the calibration's where that is larger) and float32's rounding.

    Args:
        model: on the CPU.
        path: a name that ends in `.pt2` (PyTorch, `torch.export.load`) or `.onnx` (needs the extra `onnx`).
        false_positive_rate: the fraction of held-out normal images that the thresholds in the metadata may flag.
        images: at least 32 images for the comparison, `[n, 1, H, W]`; None makes some of low frequencies and noise.

    Returns:
        The metadata, which the file holds as JSON under the key `simsid.json`: preprocessing, signals, calibration and
        thresholds.

    Raises:
        CalibrationError: the model is not calibrated.
        InputError: another suffix, a model on a GPU, too few images.
        ExportError: a missing package, a model that cannot be exported, or a file that scores differently.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"path must end in {' or '.join(SUFFIXES)}, got {path.name}")
    if model.device.type != "cpu":
        raise InputError(f"model must be on the CPU, got {model.device}; use model.to_device('cpu')")
    images = _images(model.preprocessing.size) if images is None else images
    if len(images) < sum(CHECKED):
        raise InputError(f"images must be at least {sum(CHECKED)}, got {len(images)}")
    if model.calibrated().precision != "float32":
        raise ExportError(
            "an exported program computes in float32 and the model is calibrated in bfloat16: calibrate it with "
            "precision float32 first"
        )
    metadata = describe(model, false_positive_rate)
    # Before the export: tensors that a model keeps from its first call must not be those of a trace.
    images = images[: sum(CHECKED)]
    expected = {**model.signals(images), "score": model.score(images).numpy()}
    encode, open_content = (_pt2, _open_pt2) if path.suffix == ".pt2" else (_onnx, _open_onnx)
    with _quiet():
        try:
            content = encode(_Program(model), images[: CHECKED[1]], json.dumps(metadata, allow_nan=False))
        except ImportError as error:
            raise ExportError(f"an ONNX export needs {error.name}: pip install 'simsid[onnx]'") from None
        except Exception as error:  # PyTorch's exporters raise errors of many types, some of them private
            raise ExportError(f"a model of kind {model.kind!r} cannot be exported: {_first_line(error)}") from error
        _compare(open_content(content), images, expected, model.calibrated().std)
    checkpoint.write_file(path, content)
    return metadata


def describe(model: AnomalyModel, false_positive_rate: float = 0.05) -> dict[str, Any]:
    """Return what a reader of an exported file needs, as plain JSON.

    Returns:
        `format` (1), `simsid` (version), `kind`, `input` (name, shape, dtype, range), `preprocessing`, `signal` (the
        one that `score` and the threshold use), `signals` (descriptions by name), `calibration`, `thresholds` (raw
        signal by name, None without held-out normal images) and `false_positive_rate`.
    """
    calibration = model.calibrated()
    height, width = model.preprocessing.size
    return {
        "format": 1,
        "simsid": __version__,
        "kind": model.kind,
        "input": {"name": "images", "shape": ["batch", 1, height, width], "dtype": "float32", "range": [-1.0, 1.0]},
        "preprocessing": model.preprocessing.to_dict(),
        "signal": model.signal,
        "signals": {name: SIGNALS[name].description for name in model.signal_names},
        "calibration": calibration.to_dict(),
        "thresholds": {name: calibration.threshold(name, false_positive_rate) for name in calibration.mean},
        "false_positive_rate": false_positive_rate,
    }


class _Program(nn.Module):
    """What is exported: images to a dictionary of signals and score."""

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.scorer: Scorer = model.freeze()
        self.names = model.signal_names
        self.signal = model.signal
        calibration = model.calibrated()
        # The same bound on the deviation as in `Calibration.standardize`.
        self.scale = float(1.0 / calibration.standardize(self.signal, np.float64(calibration.mean[self.signal] + 1.0)))
        self.center = calibration.mean[self.signal]
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.scorer.outputs(images)
        signals = {name: SIGNALS[name].compute(outputs).to(torch.float64) for name in self.names}
        return {**signals, "score": torch.sigmoid((signals[self.signal] - self.center) / self.scale)}


def _pt2(program: _Program, images: Tensor, metadata: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_exported(program, images), buffer, extra_files={METADATA: metadata})
    return buffer.getvalue()


def _open_pt2(content: bytes) -> Run:
    run = torch.export.load(io.BytesIO(content)).module()
    return lambda images: {name: values.detach().numpy() for name, values in run(images).items()}


def _onnx(program: _Program, images: Tensor, metadata: str) -> bytes:
    import onnxruntime  # noqa: F401  # fail now: without it the file cannot be compared

    names = [*program.names, "score"]
    exported = torch.onnx.export(
        _exported(program, images),
        dynamo=True,
        input_names=["images"],
        output_names=names,
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props[METADATA] = metadata
    return exported.model_proto.SerializeToString()


def _open_onnx(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"images": images.numpy()})))


def _exported(program: _Program, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return how operators become ONNX that PyTorch does not translate, or that ONNX Runtime does not run."""
    import onnx
    from onnxscript import opset18

    op: Any = opset18  # its type stubs know neither lists of axes nor lists of sizes

    def sort_stable(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
        # Among equal values TopK takes the lowest index first: it is stable.
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def avg_pool2d(
        x: Any,
        kernel_size: list[int],
        stride: list[int] | None = None,
        padding: list[int] | None = None,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: None = None,  # noqa: ARG001
    ) -> Any:
        # ONNX Runtime pools float32 only.
        pooled = op.AveragePool(
            op.Cast(x, to=onnx.TensorProto.FLOAT),
            kernel_shape=_pair(kernel_size),
            strides=_pair(stride or kernel_size),
            pads=2 * _pair(padding or 0),
            ceil_mode=int(ceil_mode),
            count_include_pad=int(count_include_pad),
        )
        return op.CastLike(pooled, x)

    def cdist(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:  # noqa: ARG001
        if p != 2:
            raise ExportError(f"distances are exported with p = 2, got {p}")
        # Differences, not |a|^2 - 2ab + |b|^2, which is inexact for near rows.
        last, row, column = (op.Constant(value_ints=[axis]) for axis in (-1, -2, -3))
        difference = op.Sub(op.Unsqueeze(x1, row), op.Unsqueeze(x2, column))
        return op.Sqrt(op.ReduceSum(op.Mul(difference, difference), last, keepdims=0))

    aten = torch.ops.aten
    return {aten.sort.stable: sort_stable, aten.avg_pool2d.default: avg_pool2d, aten._cdist_forward.default: cdist}


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _images(size: tuple[int, int]) -> Tensor:
    """Return 32 images of low frequencies with a little noise, which resemble radiographs more than noise alone."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(sum(CHECKED), 1, 6, 6, generator=generator) * 2 - 1
    smooth = nn.functional.interpolate(low, size=size, mode="bicubic", align_corners=True)
    return (0.8 * smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)


def _compare(run: Run, images: Tensor, expected: dict[str, np.ndarray], std: dict[str, float]) -> None:
    """Raise `ExportError` unless an exported program gives the expected values in batches of several sizes."""
    parts = [run(part) for part in images.split(list(CHECKED))]
    for name, values in expected.items():
        found = np.concatenate([part[name] for part in parts])
        spread = max(float(np.std(values)), std.get(name, 0.0))
        difference = float(np.max(np.abs(found - values)))
        # The signals of an untrained network vary by little more than float32 rounds them: a logit near 0 is the sum of
        # terms near 1 that cancel.
        rounding = 4 * float(np.finfo(np.float32).eps) * max(1.0, float(np.max(np.abs(values))))
        if not difference <= TOLERANCE * spread + rounding:
            raise ExportError(
                f"the exported program's {name} differs from the model's by {difference:.3g}, more than {TOLERANCE:g} "
                f"of its standard deviation {spread:.3g}; no file was written"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' advice to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's innermost cause, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
