"""Several processes that `torchrun` starts: which of them this is, and a team that trains one model together."""

import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed.nn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from simsid.errors import ProcessGroupError
from simsid.parallel import in_order, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT = timedelta(hours=2)
"""For another process that reads and hashes many files; torchrun ends the wait for one that died."""

TURN = 64
"""Results that each process adds before they are handed round."""


@dataclass(frozen=True)
class Rank:
    """Which share of the work is this process's: `number` of `count`; `local` of `neighbours` on this machine."""

    number: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """Read what torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; without WORLD_SIZE, one process.

        Raises:
            ProcessGroupError: values that are no ranks.
        """
        if "WORLD_SIZE" not in environment:
            return cls()

        def number(name: str, default: str, least: int, most: int | None = None) -> int:
            text = environment.get(name, default)
            if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
                limits = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ProcessGroupError(
                    f"the environment variable {name} must be a whole number {limits}, got {text!r}"
                )
            return int(text)

        count = number("WORLD_SIZE", "", 1)
        return cls(
            number("RANK", "" if count > 1 else "0", 0, count - 1),
            count,
            number("LOCAL_RANK", "0", 0),
            number("LOCAL_WORLD_SIZE", "1", 1),
        )

    def take_device(self, device: str) -> str:
        """Return the device to compute on: where `device` names no GPU, each rank of a machine takes its own.

        Raises:
            ProcessGroupError: more ranks than GPUs.
        """
        if device != "cuda" or self.count == 1:
            return device
        if self.local >= torch.cuda.device_count():
            raise ProcessGroupError(
                f"rank {self.number} is number {self.local + 1} on its machine, where PyTorch sees "
                f"{torch.cuda.device_count()} GPUs; start fewer processes, or name a device with --device cuda:N"
            )
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def workers(self) -> int:
        """Return the threads that decode: this process's part of the cores."""
        return max(1, thread_count(None) // self.neighbours)


@dataclass(frozen=True)
class Team:
    """The processes that train one model together; `Team()` is one process alone.

    `rank` is this one's place among `size`. Rank 0 is the only one that writes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def gathered(cls, device: torch.device | str) -> "Iterator[Team]":
        """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs.

        After an error the connections stay until the process ends, so that it is told before the others lose them.

        Raises:
            ProcessGroupError: processes that were started without an address to meet at.
        """
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend, timeout=WAIT)
        except ValueError as error:
            raise ProcessGroupError(f"start the processes with torchrun: {error}") from None
        yield cls(distributed.get_rank(), distributed.get_world_size())
        distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """Return this member's part of a batch, one of `size` equal pieces in rank order."""
        if len(items) % self.size:
            raise ValueError(f"a batch must divide among {self.size} processes, got {len(items)} images")
        count = len(items) // self.size
        return items[self.rank * count : (self.rank + 1) * count]

    def concatenated(self, part: Tensor) -> Tensor:
        """Return every member's `part`, all of one shape, in rank order along the first axis."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the members."""
        if self.size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values / self.size

    def any(self, flag: bool) -> bool:
        """Return whether any member says so; on the host, without waiting for a GPU."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        distributed.all_reduce(found)
        return bool(found)

    def from_main(self, make: Callable[[], Result]) -> Result:
        """Return what `make` returns at rank 0, to every member; the others do not call it."""
        if self.size == 1:
            return make()
        found = [make() if self.main else None]
        distributed.broadcast_object_list(found, 0)
        return found[0]

    def everyones(self, value: Result) -> list[Result]:
        """Return the value of every member, in rank order."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def in_order(
        self, function: Callable[[Item], Result], items: Sequence[Item], workers: int
    ) -> Iterator[tuple[Item, Result]]:
        """Do what `simsid.parallel.in_order` does, each member computing every `size`-th result."""
        if self.size == 1:
            yield from in_order(function, items, workers)
            return
        own = in_order(function, items[self.rank :: self.size], workers, TURN)
        for start in range(0, len(items), TURN * self.size):
            results = self.everyones([result for _, result in itertools.islice(own, TURN)])
            for place, item in enumerate(items[start : start + TURN * self.size]):
                yield item, results[place % self.size][place // self.size]

    def collected(self, columns: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Put together columns of which each member has places rank, rank + size, …; `count` values each, float64."""
        if self.size == 1:
            return columns
        # Shares differ by one value at most; equal lengths travel, and the filling is cut off again.
        longest = -(-count // self.size)
        whole = {}
        for name, values in columns.items():
            padded = torch.zeros(longest, dtype=torch.float64)
            padded[: len(values)] = torch.from_numpy(values)
            whole[name] = self.concatenated(padded).view(self.size, longest).T.flatten()[:count].numpy()
        return whole

    @torch.no_grad()
    def follow_main(self, model: nn.Module, *, weights: bool = False) -> None:
        """Give every member rank 0's buffers (running statistics, which each measures on its own share), or all."""
        if self.size > 1:
            for tensor in [*model.buffers(), *(model.parameters() if weights else ())]:
                distributed.broadcast(tensor, 0)


class Judgement(nn.Module):
    """A discriminator's logits on real and on fake images: one forward pass, as data-parallel training counts them."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, `[B]` each; each batch is normalised with its own statistics."""
        return self.discriminator(real), self.discriminator(fake)


class _Reconstructing(nn.Module):
    """A model without its discriminator, whose weights other iterations train."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part for part in (model.encoder, model.student, model.teacher) if part is not None)
        # In a tuple, which hides it: a module's attribute would bring the discriminator along.
        self._model = (model,)

    def forward(self, images: Tensor, teacher: bool) -> object:
        return self._model[0](images, teacher=teacher)


def data_parallel(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return callables for the model's forward pass and its discriminator's that average gradients over the team."""
    # Buffers are not broadcast in forward passes, where the backward pass still needs them; PyTorch renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False, "gradient_as_bucket_view": True}
    parts = _Reconstructing(model), Judgement(model.discriminator)
    generate, judge = (DistributedDataParallel(part, **options) for part in parts)
    return generate, judge


def synchronise_batch_norms(model: nn.Module, wanted: bool = True) -> None:
    """Let every BatchNorm of `model` measure the whole team's batch, or its own again; in place, with its tensors."""
    kinds = {nn.BatchNorm2d, nn.SyncBatchNorm, _HostSyncBatchNorm}
    kind = nn.BatchNorm2d
    if wanted:
        kind = nn.SyncBatchNorm if next(model.parameters()).is_cuda else _HostSyncBatchNorm
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) in kinds - {kind}:
                made = kind(norm.num_features, norm.eps, norm.momentum)
                made._parameters, made._buffers = norm._parameters, norm._buffers
                setattr(module, name, made.train(norm.training))


class _HostSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all members, on a CPU, where PyTorch has none."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        mean = _sum_over_team(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum_over_team(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def _sum_over_team(values: Tensor) -> Tensor:
    """Sum over the members; the gradient is the sum of theirs."""
    return torch.distributed.nn.all_reduce(values)
