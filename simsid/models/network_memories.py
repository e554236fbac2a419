"""Collects the contents and the use of a network's memories, with hooks around its look-ups."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simsid.models.memory import DecoderMemory, SpaceAwareMemory
from simsid.models.memory_contents import FEATURES, SHOWN, MemoryContents
from simsid.models.scorer import BATCH

if TYPE_CHECKING:
    from simsid.models.inference import FrozenModel

INPAINTING = "in-painting memory"


class _Tally:
    """Counts what a memory's look-ups keep, as a hook of the memory, and keeps the queries of some images."""

    def __init__(self, memory: SpaceAwareMemory) -> None:
        self.memory, self.query = memory, torch.zeros(0)
        self.uses = torch.zeros(memory.items.shape[:2], dtype=torch.int64)
        self.weight = torch.zeros(memory.items.shape[:2], dtype=torch.float64)
        self.queries: list[Tensor] = []

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (self.query,) = inputs

    def add(self, images: int, batch: int, keep: int) -> None:
        """Count the first `images` of a batch; keep the queries of the first `keep` of all images."""
        query = self.query[: images * (len(self.query) // batch)]
        weights = self.memory.weights(query).cpu()
        if self.memory.items.shape[0] == 1:
            weights = weights.flatten(0, 1)[:, None]
        self.uses += (weights > 0).sum(0)
        self.weight += weights.double().sum(0)
        if len(self.queries) * BATCH < keep:
            self.queries.append(query.cpu())


@torch.inference_mode()
def network_memories(model: "FrozenModel", images: object) -> tuple[MemoryContents, ...]:
    """Return every memory of a network, the in-painting block's first; `images` are normal, see `Scorer`."""
    student, side = model.student, model.config.patches
    named: dict[str, SpaceAwareMemory] = {}
    blocks: dict[str, DecoderMemory | None] = {INPAINTING: None}
    if student.inpainting is not None:
        named[INPAINTING] = student.inpainting.memory
    for i, block in enumerate(student.memories, 1):
        assert isinstance(block, DecoderMemory)
        named[f"decoder memory {i}"], blocks[f"decoder memory {i}"] = block.memory, block
    if not named:
        return ()
    tallies = {name: _Tally(memory) for name, memory in named.items()}
    context, count = _Context(), 0
    hooks: list[Any] = [memory.register_forward_pre_hook(tallies[name]) for name, memory in named.items()]
    hooks.append(model.encoder.register_forward_hook(context))
    try:
        for batch, real in model._padded_batches(images, BATCH):
            model.outputs(batch)
            count += real
            context.add(real, side * side)
            for name, tally in tallies.items():
                queued = tally.memory.items.shape[1] if name == INPAINTING else 0
                tally.add(real, len(batch), FEATURES + queued)
    finally:
        for hook in hooks:
            hook.remove()
    average = context.mean(count)
    return tuple(
        _contents(name, tallies[name], count, _decode(model, memory, blocks[name], tallies[name], average))
        for name, memory in named.items()
    )


class _Context:
    """Sums what the encoder gives of each location, as a hook of the encoder."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.sums: list[Tensor] = []

    def __call__(self, _: nn.Module, __: object, encoded: Any) -> None:
        self.found = [encoded.deepest, *encoded.skips]

    def add(self, images: int, locations: int) -> None:
        sums = [x.unflatten(0, (-1, locations))[:images].double().sum(0) for x in self.found]
        self.sums = [a + b for a, b in zip(self.sums, sums)] if self.sums else sums

    def mean(self, images: int) -> list[Tensor]:
        """Return the mean over images of the deepest features and of each skip, `[locations, C, h, w]`."""
        return [(x / images).float() for x in self.sums]


def _contents(name: str, tally: _Tally, images: int, decoded: Tensor) -> MemoryContents:
    memory, queries = tally.memory, torch.cat(tally.queries).float()
    L, N, _ = memory.items.shape
    latest = None
    # A queue of the same size, filled by other images than those whose features are shown beside it.
    shown = min(FEATURES, (len(queries) + 1) // 2)
    if name == INPAINTING and not memory.is_queue and len(queries) > shown:
        later = queries[shown:]
        later = later.flatten(0, 1)[:, None] if L == 1 else later
        latest = later.transpose(0, 1)[:, -N:]
    kind = "queue of features" if memory.is_queue else "learned items"
    kept = 0 if memory.hard_threshold is not None else min(memory.topk, N)
    items = memory.items.detach().float().cpu()
    return MemoryContents(name, kind, items, queries[:shown], tally.uses, tally.weight, images, kept, latest, decoded)


def _decode(
    model: "FrozenModel", memory: SpaceAwareMemory, block: DecoderMemory | None, tally: _Tally, context: list[Tensor]
) -> Tensor:
    """Draw each location's most used items, `[SHOWN, H, W]`.

    One look-up returns the item alone; all else is that of an average normal image: the mean of what the encoder gives
    of each location. Only the part of the picture that the location fills is kept.
    """
    side, size = model.config.patches, model.config.patch_size
    order = (tally.uses.double() + tally.weight / (1 + tally.weight.sum())).argsort(1, descending=True)[:, :SHOWN]
    locations, subpatch = len(order), block is not None and block.subpatch
    # Items that all locations share are drawn at the center; so are sub-windows, which all patches share.
    center = side // 2 * side + side // 2
    pieces = 1 if locations == 1 else 2 if subpatch else side
    window = size // 2 if subpatch else size
    drawn = torch.full((SHOWN, pieces * window, pieces * window), torch.nan)
    for location in range(locations):
        used = [int(i) for i in order[location] if tally.uses[location, i]]
        if not used:
            continue
        row = center if subpatch else 0
        column = location if subpatch or locations > 1 else center
        items = memory.items[location if locations > 1 else 0, used]
        picture = _with_items(model, memory, items, (row, column), context)
        patch = center if subpatch or locations == 1 else location
        top, left = (n * size for n in divmod(patch, side))
        if subpatch:
            top, left = top + location // 2 * window, left + location % 2 * window
        y, x = (n * window for n in divmod(location, pieces))
        drawn[: len(used), y : y + window, x : x + window] = picture[:, top : top + window, left : left + window]
    return drawn


def _with_items(
    model: "FrozenModel", memory: SpaceAwareMemory, items: Tensor, place: tuple[int, int], context: list[Tensor]
) -> Tensor:
    """Return the student's pictures `[n, H, W]` where the look-up at `place` returns `items` `[n, D]`."""
    row, column = place

    def replaced(_: nn.Module, __: object, found: Tensor) -> Tensor:
        found = found.unflatten(0, (len(items), -1)).clone()
        found[:, row, column] = items.to(found.dtype)
        return found.flatten(0, 1)

    deepest, *skips = (x.repeat(len(items), 1, 1, 1) for x in context)
    hook: Callable[..., Any] = replaced
    handle = memory.register_forward_hook(hook)
    try:
        return model.student(deepest, skips).images[:, 0].float().cpu()
    finally:
        handle.remove()
