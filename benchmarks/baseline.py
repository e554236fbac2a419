"""A written-out model in the manner of the released code, which computes the numbers of `simsid.Model` naively.

The benchmarks compare with it. It has the weights of the model, a Python loop over the locations of every memory, the
eight neighbors of every location copied into a window and projected there, the teacher at every iteration and in
inference, a gradient graph for iterations that need none, a discriminator that is not frozen in the step of the
generator, a host synchronization for every loss, the default Adam of PyTorch, contiguous float32, and scoring image by
image.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simsid import Model, TrainingConfig
from simsid.data import Record, augment, load_images
from simsid.models import signals
from simsid.models.discriminator import Discriminator
from simsid.models.generator import Encoded, Generator
from simsid.models.inpainting import InpaintingBlock, NeighborAttention
from simsid.models.layers import ConvBlock
from simsid.models.memory import DecoderMemory, SpaceAwareMemory
from simsid.models.model import Reconstruction
from simsid.models.patches import merge, split
from simsid.scoring.stream import Score

PAPERS = {"distillation": True, "inpainting": "attention", "border": "zero", "shrinkage": "topk", "gumbel_noise": False}
AROUND = [(row, column) for row in (0, 1, 2) for column in (0, 1, 2) if (row, column) != (1, 1)]


class Baseline:
    """Compute with the modules of a model in the written-out manner; the model becomes contiguous.

    Raises:
        ValueError: the configuration is not one of the two papers.
    """

    def __init__(self, model: Model) -> None:
        for name, value in PAPERS.items():
            if (got := getattr(model.config, name)) != value:
                raise ValueError(f"{name} must be {value!r}, the only value that the baseline computes, got {got!r}")
        self.model = model.to(memory_format=torch.contiguous_format)

    def __call__(self, images: Tensor) -> Reconstruction:
        """Reconstruct `[B, 1, H, W]`, also with the teacher, in training and in inference mode."""
        model = self.model
        encoded = encode(model, split(images, model.config.patches))
        x, query, retrieved = inpaint(model.student.inpainting, encoded.deepest)
        student, features = decode(model.student, x, encoded.skips)
        deepest, skips = encoded
        if model.config.stop_gradient:
            deepest, skips = deepest.detach(), [skip.detach() for skip in skips]
        teacher, taught = decode(model.teacher, deepest, skips)
        distillation = sum(F.mse_loss(mine, theirs) for mine, theirs in zip(features, taught))
        return Reconstruction(student, teacher, distillation, query, retrieved)

    def signals(self, images: Tensor, batch_size: int = 1) -> dict[str, np.ndarray]:
        """Return the signals of `[B, 1, H, W]` like `Model.signals`; the released evaluation has batches of one.

        In larger batches the discriminator normalizes each image with its own statistics, in one pass over all.
        """
        columns: dict[str, list[float]] = {name: [] for name in self.model.signal_names}
        with torch.no_grad(), inference(self.model):
            for batch in images.split(batch_size):
                outputs, discriminator = self(batch), self.model.discriminator
                logits = judge(discriminator, outputs.student, per_image=True), judge(discriminator, outputs.student)
                found = all_signals(batch, outputs, *logits, location_units(self.model))
                for name in columns:
                    columns[name] += [value.item() for value in found[name]]
        return {name: np.array(values) for name, values in columns.items()}

    def score_files(self, files: Iterable[Record | str], batch_size: int = 1) -> Iterator[Score]:
        """Score readable files like `simsid.scoring.stream.score_files`; reads the files of a batch one by one."""
        model, files, name = self.model, list(files), self.model.signal
        threshold = model.calibrated().threshold(name)
        for start in range(0, len(files), batch_size):
            chosen = files[start : start + batch_size]
            read = [load_images([file], workers=1, **model.preprocessing.to_dict()) for file in chosen]
            images = torch.cat([one.batch([0], model.device) for one in read])
            signals_of_batch = self.signals(images, batch_size)
            probability = model.calibrated().probability(name, signals_of_batch[name])
            for i, one in enumerate(read):
                values = {key: float(column[i]) for key, column in signals_of_batch.items()}
                flagged = None if threshold is None else values[name] > threshold
                yield Score(one.paths[0], score=float(probability[i]), flagged=flagged, signals=values)


class BaselineStep:
    """Updates a model like `simsid.training.step.TrainingStep`, in the written-out manner."""

    def __init__(self, model: Model, config: TrainingConfig | None = None) -> None:
        self.baseline, self.config = Baseline(model), config or TrainingConfig()
        self.losses: dict[str, list[float]] = {}
        sides = {"generator": [], "discriminator": []}
        for name, parameter in model.named_parameters():
            sides["discriminator" if name.startswith("discriminator.") else "generator"].append(parameter)
        options = {"lr": self.config.learning_rate, "betas": (0.5, 0.999)}
        decay = self.config.generator_weight_decay
        self.generator = torch.optim.Adam(sides["generator"], eps=1e-7, weight_decay=decay, **options)
        self.discriminator = torch.optim.Adam(sides["discriminator"], eps=1e-8, **options)

    def __call__(self, images: Tensor, number: int) -> None:
        """Run iteration `number` on `[B, 1, H, W]` images, not yet augmented."""
        config, model = self.config, self.baseline.model
        images = augment(images, translate=config.translate, scale=config.scale)
        outputs = self.baseline(images)

        losses = {
            "real": adversarial(judge(model.discriminator, images), 1.0),
            "fake": adversarial(judge(model.discriminator, outputs.student.detach()), 0.0),
        }
        total = config.discriminator_weight * (losses["real"] + losses["fake"])
        self.discriminator.zero_grad()
        total.backward()
        self.discriminator.step()

        if number % config.generator_every == 0:
            terms = {
                "student": F.mse_loss(outputs.student, images),
                "teacher": F.mse_loss(outputs.teacher, images),
                "distillation": outputs.distillation,
                "adversarial": adversarial(judge(model.discriminator, outputs.student), 1.0),
            }
            total = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
            self.generator.zero_grad()
            total.backward()
            self.generator.step()
            losses |= terms
            if model.queue is not None:
                push(model.queue, outputs.query)
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss.item())

    def means(self) -> dict[str, float]:
        """Return each loss, unweighted, averaged over the iterations so far."""
        return {name: sum(values) / len(values) for name, values in self.losses.items()}


@contextmanager
def inference(model: Model) -> Iterator[None]:
    """Put a model into inference mode, and back at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def location_units(model: Model) -> dict[str, Tensor]:
    """Return mean and deviation of each location by signal, `[2, L]`, which a calibration holds."""
    known = model.calibration.locations if model.calibration else {}
    return {name: torch.tensor(pair, dtype=torch.float64, device=model.device) for name, pair in known.items()}


def all_signals(
    images: Tensor, outputs: Reconstruction, per_image: Tensor, running: Tensor, units: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return every signal `[B]` of images `[B, 1, H, W]`, from their reconstruction and the logits `[B]` on it."""
    computed = {
        "images": images,
        "reconstruction": outputs.student,
        "query": outputs.query,
        "retrieved": outputs.retrieved,
        "location_units": units,
    }
    standardized = [signal for signal in signals.SIGNALS.values() if signal.locations is not None]
    return {
        "discriminator_per_image": -per_image,
        "discriminator_running": -running,
        "residual": signals.residual(images, outputs.student),
        "local_residual": signals.local_residual(images, outputs.student),
        "focal_residual": signals.focal_residual(images, outputs.student),
        "memory_distance": signals.memory_distance(outputs.query, outputs.retrieved),
        **{signal.name: signal.compute(computed) for signal in standardized},
    }


def block(module: ConvBlock, x: Tensor) -> Tensor:
    """Apply a residual block of three convolutions."""
    c1 = F.relu(module.entry(x), inplace=True)
    return F.relu(c1 + module.outer(F.relu(module.inner(c1), inplace=True)), inplace=True)


def encode(model: Model, images: Tensor) -> Encoded:
    """Encode patches `[B * L, 1, S, S]`."""
    x = block(model.encoder.entry, images)
    skips = []
    for down in model.encoder.down:
        skips.append(x)
        x = block(down, x)
    return Encoded(x, skips)


def decode(generator: Generator, x: Tensor, skips: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Decode `[B * L, C, h, w]` to images and the feature map after each up block (and its memory)."""
    features = []
    for i, up in enumerate(generator.up):
        skip = skips[len(skips) - 1 - i]
        if i == generator.merge_at:
            x = merge(x, generator.patches)
        merged = i >= generator.merge_at
        size = [n * generator.patches if merged else n for n in skip.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        if i < generator.skip_levels:
            x = torch.cat([merge(skip, generator.patches) if merged else skip, x], dim=1)
        x = block(up, x)
        if i < len(generator.memories):
            x = remember(generator.memories[i], x)
        features.append(x)
    if generator.merge_at == len(generator.up):
        x = merge(x, generator.patches)
    return torch.tanh(generator.output(x)), features


def look_up(memory: SpaceAwareMemory, query: Tensor) -> Tensor:
    """Look up `[B, L, D]`, one location after the other."""
    retrieved = []
    for location in range(query.shape[1]):
        items = memory.items[location if len(memory.items) > 1 else 0]
        p = torch.softmax(F.linear(query[:, location], items) / memory.temperature, dim=-1)
        with torch.no_grad():
            kth = p.topk(min(memory.topk, p.shape[1]), dim=-1).values[:, -1:]
            weight = p * (p >= kth if memory.threshold == "inclusive" else p > kth)
            w = F.normalize(weight, p=1, dim=-1)
        retrieved.append((p + (w - p).detach()) @ items)
    return torch.stack(retrieved, dim=1)


def remember(memory: DecoderMemory, maps: Tensor) -> Tensor:
    """Look up the map of a decoder, `[B * L, C, h, w]` (`[B, C, H, W]` when merged)."""
    if memory.merged:
        maps = split(maps, memory.patches)
    windows = split(maps, 2) if memory.subpatch else maps
    query = windows.reshape(-1, memory.locations, windows[0].numel())
    retrieved = look_up(memory.memory, query).reshape(windows.shape)
    if memory.subpatch:
        retrieved = merge(retrieved, 2)
    return merge(retrieved, memory.patches) if memory.merged else retrieved


def attend(module: NeighborAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Attend from `[B, L, D]` to the eight neighbors of each location, zero outside, projected window by window."""
    (rows, columns), D = module.grid, query.shape[-1]
    padded = F.pad(memory.unflatten(1, module.grid), (0, 0, 1, 1, 1, 1))
    windows = [
        torch.stack([padded[:, row + i, column + j] for i, j in AROUND], dim=1)
        for row in range(rows)
        for column in range(columns)
    ]
    keys = torch.stack(windows, dim=1).flatten(0, 1).transpose(0, 1)
    key_weight, value_weight = module.key_value.weight.chunk(2)
    attended, _ = F.multi_head_attention_forward(
        query.reshape(1, -1, D),
        keys,
        keys,
        embed_dim_to_check=D,
        num_heads=module.heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([module.query.bias, module.key_value.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=module.output.weight,
        out_proj_bias=module.output.bias,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=module.query.weight,
        k_proj_weight=key_weight,
        v_proj_weight=value_weight,
    )
    return attended.view_as(query)


def inpaint(module: InpaintingBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the in-painted `[B * L, C, h, w]`, and the queries and their look-up, `[B, L, D]` each."""
    BL, _, h, w = x.shape
    B = BL // module.locations
    f = F.relu(module.entry(x), inplace=True).reshape(B, module.locations, -1)
    n = retrieved = look_up(module.memory, f)
    n = F.relu(module.norm1(attend(module.mixing, f, n)) + n, inplace=True)
    n = F.relu(module.norm2(module.feed_forward(n)) + n, inplace=True)
    planes = module.index_planes.repeat(B, 1)[:, :, None, None].expand(-1, -1, h, w)
    y = F.relu(module.exit(torch.cat([n.reshape(BL, -1, h, w), planes], dim=1)), inplace=True)
    if module.training and module.rho < 1:
        keep = (torch.rand(BL, 1, h, w, device=x.device) < module.rho).to(x.dtype)
        y = keep * y + (1 - keep) * x
    return y, f, retrieved


@torch.no_grad()
def push(queue: SpaceAwareMemory, query: Tensor) -> None:
    """Put the queries `[B, L, D]` of a step into the queue, location by location and image by image."""
    B, N = len(query), queue.items.shape[1]
    pointer = int(queue.pointer.item())
    for location in range(query.shape[1]):
        for image in range(B):
            queue.items[location, (pointer + image) % N] = query[image, location]
    queue.pointer.fill_((pointer + B) % N)


def judge(discriminator: Discriminator, images: Tensor, per_image: bool = False) -> Tensor:
    """Return the logits `[B]`; `per_image` normalizes each image with its own statistics."""
    x = F.leaky_relu(discriminator.convolutions[0](images), 0.2, inplace=True)
    for convolution, norm in zip(discriminator.convolutions[1:], discriminator.norms):
        x = convolution(x)
        x = F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps) if per_image else norm(x)
        x = F.leaky_relu(x, 0.2, inplace=True)
    return F.linear(x.flatten(1), discriminator.output.weight, discriminator.output.bias)[:, 0]


def adversarial(logits: Tensor, label: float) -> Tensor:
    """Return the binary cross entropy against one label."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
