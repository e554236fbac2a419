"""The process group that `torchrun` starts: rank, size, device, and what the ranks exchange."""

import atexit
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from simsid.errors import InputError, ProcessGroupError
from simsid.parallel import in_order, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT = timedelta(hours=2)
"""Wait of a collective for the other ranks, one of which may decode many files; `torchrun` ends the wait for a dead
rank."""

LEAVE_SECONDS = 10
"""Wait for the connections to close after an error, where a collective may be pending that other ranks never join."""

GATHER_SIZE = 64
"""Decoded images per rank per `all_gather`; bounds host memory."""


@dataclass(frozen=True)
class ProcessGroup:
    """Which process of how many this is, and the collectives between them; `ProcessGroup()` is a single process.

    Only the collectives need `joined`: ranks that work on separate shards (`shard`, `rank`, `size`) never connect.

    Args:
        rank: index of this process, 0 to `size - 1`. Rank 0 is the only one that writes.
        size: number of processes.
        local_rank: index of this process on its machine, which is also the index of its GPU.
        local_size: number of processes on this machine, which divide its cores.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessGroup":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which `torchrun` sets; no WORLD_SIZE, one process.

        Raises:
            ProcessGroupError: a value that is not a whole number in its range; the message names the variable.
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

        size = number("WORLD_SIZE", "", 1)
        return cls(
            rank=number("RANK", "" if size > 1 else "0", 0, size - 1),
            size=size,
            local_rank=number("LOCAL_RANK", "0", 0),
            local_size=number("LOCAL_WORLD_SIZE", "1", 1),
        )

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def select_device(self, name: str) -> str:
        """Return the device to compute on: where `name` is "cuda" without an index, each rank takes its own GPU.

        Raises:
            ProcessGroupError: more ranks on this machine than GPUs.
        """
        if name != "cuda" or self.size == 1:
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise ProcessGroupError(
                f"rank {self.rank} is number {self.local_rank + 1} on its machine, where PyTorch sees "
                f"{torch.cuda.device_count()} GPUs; start fewer processes, or name a device with --device cuda:N"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def cpu_threads(self) -> int:
        """Return the number of threads for this process: its fraction of the machine's cores, at least 1."""
        return max(1, thread_count(None) // self.local_size)

    @contextmanager
    def joined(self, device: torch.device | str) -> "Iterator[ProcessGroup]":
        """Connect the ranks while the block runs: NCCL between GPUs, gloo between CPUs; nothing for a single process.

        After an error the connections stay open until the interpreter exits. The message of this rank's error is then
        printed before another rank reports the lost connection.

        Raises:
            ProcessGroupError: the processes were started without the address of rank 0, as without `torchrun`.
        """
        if self.size == 1:
            yield self
            return
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend, timeout=TIMEOUT, rank=self.rank, world_size=self.size)
        except ValueError as error:
            raise ProcessGroupError(f"start the processes with torchrun: {error}") from None
        try:
            yield self
        except BaseException:
            _leave_at_exit()
            raise
        distributed.destroy_process_group()

    def shard(self, batch: Tensor) -> Tensor:
        """Return this rank's shard of a batch, one of `size` equal pieces in rank order.

        Raises:
            InputError: the length is not a multiple of `size`.
        """
        if len(batch) % self.size:
            raise InputError(f"a batch must divide among {self.size} processes, got {len(batch)} images")
        count = len(batch) // self.size
        return batch[self.rank * count : (self.rank + 1) * count]

    def gather(self, shard: Tensor) -> Tensor:
        """Return the shards of all ranks, of equal shape, concatenated in rank order along the first axis."""
        if self.size == 1:
            return shard
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(shards, shard.contiguous())
        return torch.cat(shards)

    def all_gather_object(self, value: Result) -> list[Result]:
        """Return the value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, make: Callable[[], Result]) -> Result:
        """Return on every rank what `make` returns on rank 0; the other ranks do not call it."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.main else None]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of every rank with rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values / self.size

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank; exchanged on the host, without waiting for a GPU."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        distributed.all_reduce(count)
        return bool(count)

    def in_order(
        self, function: Callable[[Item], Result], items: Sequence[Item], workers: int
    ) -> Iterator[tuple[Item, Result]]:
        """Do what `simsid.parallel.in_order` does, where each rank computes every `size`-th result."""
        if self.size == 1:
            yield from in_order(function, items, workers)
            return
        own = in_order(function, items[self.rank :: self.size], workers, GATHER_SIZE)
        for start in range(0, len(items), GATHER_SIZE * self.size):
            results = self.all_gather_object([result for _, result in itertools.islice(own, GATHER_SIZE)])
            for index, item in enumerate(items[start : start + GATHER_SIZE * self.size]):
                yield item, results[index % self.size][index // self.size]

    def interleave(self, columns: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Join columns of which each rank has the elements rank, rank + size, …: `count` float64 values in each."""
        if self.size == 1:
            return columns
        # all_gather needs equal lengths: shards differ by at most one value, so pad, and cut the padding off again.
        longest = -(-count // self.size)
        joined = {}
        for name, values in columns.items():
            padded = torch.zeros(longest, dtype=torch.float64)
            padded[: len(values)] = torch.from_numpy(values)
            joined[name] = self.gather(padded).view(self.size, longest).T.flatten()[:count].numpy()
        return joined


def _leave_at_exit() -> None:
    """Destroy the process group as the interpreter exits; gloo's threads, left alone, can abort the process there."""
    # The thread starts now: Python 3.12 and later refuse to start one at exit.
    leave = threading.Event()

    def destroy() -> None:
        leave.wait()
        distributed.destroy_process_group()

    thread = threading.Thread(target=destroy, daemon=True)
    thread.start()

    def at_exit() -> None:
        leave.set()
        thread.join(LEAVE_SECONDS)

    atexit.register(at_exit)
