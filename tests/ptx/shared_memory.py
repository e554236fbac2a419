"""Shared memory of several blocks at once, with what orders the accesses of threads to it.

The granule of all bookkeeping is the smallest access of the kernel. Of each granule is known: who wrote it since the
last barrier, which warps read it since, whether a copy into it or a tensor-core product out of it is under way, and
whether the async proxy has been fenced since it was written.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ptx.checks import AsyncCopyRace, Misaligned, MissingFence, OutOfBounds, Race, Uninitialized

WARP = 32


@dataclasses.dataclass
class _Copies:
    """The copies of one `cp.async`: rows of `[blocks, bytes]` in units of the copy's size, and the data."""

    size: int
    rows: np.ndarray
    threads: np.ndarray
    data: np.ndarray


class SharedMemory:
    """The shared memory of some blocks of one launch, `size` bytes each."""

    def __init__(self, size: int, granule: int, blocks: int, threads: int):
        self.size, self._granule, self.blocks = size, granule, blocks
        self._stride = -(-max(size, 16) // 1024) * 1024  # of a block: descriptors swizzle by address bits up to 2^9
        self._warps = threads // WARP
        granules = blocks * self._stride // granule
        self._bytes = np.full(blocks * self._stride, 0xCD, np.uint8)
        self._written = np.zeros(granules, bool)
        self._writer = np.full(granules, -1, np.int32)  # thread that wrote since the last barrier of the block
        self._writer_step = np.zeros(granules, np.int32)  # barriers of the warp before that write
        self._readers = np.zeros(granules, np.uint32)  # a bit for each warp that read since the last barrier
        self._reader = np.full(granules, -1, np.int32)  # thread that read since the last barrier of the warp
        self._copying = np.zeros(granules, bool)
        self._multiplying = np.zeros(granules, np.int16)  # wgmma that may still read the granule
        self._unfenced = np.zeros(granules, bool)
        self._step = 0
        # Instructions by which threads of one warp wrote different values to one address: which of them stays is
        # undefined, though never torn. A list of one number, which the parts of this memory share.
        self.ambiguous = [0]
        self._open_copies: list[_Copies] = []
        self._copy_groups: list[list[_Copies]] = []
        self._open_products: list[np.ndarray] = []
        self._product_groups: list[list[np.ndarray]] = []

    # Ordering

    def block_barrier(self) -> None:
        self._writer[:] = -1
        self._readers[:] = 0
        self.warp_barrier()

    def warp_barrier(self) -> None:
        self._step += 1
        self._reader[:] = -1

    def fence(self) -> None:
        """Order earlier writes before reads of the async proxy."""
        self._unfenced[:] = False

    # Access by threads

    def _rows(self, addresses: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Misaligned(f"an access of {size} bytes to shared memory")
        if ((addresses < 0) | (addresses + size > self.size)).any():
            raise OutOfBounds(f"shared memory at {addresses.min()} to {addresses.max() + size} of {self.size} bytes")
        return (blocks * self._stride + addresses) // size

    def _of(self, state: np.ndarray, size: int) -> np.ndarray:
        """View the state of granules as rows, one for each place of an access."""
        return state.reshape(-1, size // self._granule)

    def _check_read(self, rows: np.ndarray, size: int, threads: np.ndarray) -> None:
        if not self._of(self._written, size)[rows].all():
            raise Uninitialized("shared memory that nothing has written")
        if self._of(self._copying, size)[rows].any():
            raise AsyncCopyRace("shared memory is read before the wait for the copy into it")
        writer = self._of(self._writer, size)[rows]
        if (writer < 0).all():
            return
        if ((writer >= 0) & (writer // WARP != threads[:, None] // WARP)).any():
            raise Race("shared memory that another warp wrote is read without a barrier")
        recent = self._of(self._writer_step, size)[rows] == self._step
        if ((writer >= 0) & recent & (writer != threads[:, None])).any():
            raise Race("shared memory that another thread of the warp wrote is read without a barrier")

    def _check_write(self, rows: np.ndarray, size: int, threads: np.ndarray) -> None:
        if self._of(self._copying, size)[rows].any():
            raise AsyncCopyRace("shared memory is written while a copy into it is under way")
        if self._of(self._multiplying, size)[rows].any():
            raise AsyncCopyRace("shared memory is written before the wait for the product that reads it")
        own = np.uint32(1) << (threads // WARP).astype(np.uint32)
        if (self._of(self._readers, size)[rows] & ~own[:, None]).any():
            raise Race("shared memory that another warp reads is written without a barrier")
        reader = self._of(self._reader, size)[rows]
        if ((reader != -1) & (reader != threads[:, None])).any():
            raise Race("shared memory that another thread of the warp reads is written without a barrier")

    def _mark_read(self, rows: np.ndarray, size: int, threads: np.ndarray) -> None:
        readers, reader = self._of(self._readers, size), self._of(self._reader, size)
        for warp in range(self._warps):  # a fancy |= keeps one of several warps
            readers[rows[threads // WARP == warp]] |= np.uint32(1 << warp)
        before = reader[rows]
        reader[rows] = threads[:, None]
        # A second thread, of this instruction or an earlier one: no thread is equal to -2.
        reader[rows] = np.where(
            (reader[rows] != threads[:, None]) | ((before != -1) & (before != threads[:, None])), -2, reader[rows]
        )

    def load(
        self, addresses: np.ndarray, dtype: type, count: int, blocks: np.ndarray, threads: np.ndarray
    ) -> np.ndarray:
        """Return `count` elements from each address, `[accesses, count]`; blocks and threads say whose access it is."""
        size = np.dtype(dtype).itemsize * count
        rows = self._rows(addresses, size, blocks)
        self._check_read(rows, size, threads)
        self._mark_read(rows, size, threads)
        return self._bytes.view(dtype).reshape(-1, count)[rows]

    def store(self, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray, threads: np.ndarray) -> None:
        """Write the elements `[accesses, count]`."""
        data = np.ascontiguousarray(values).view(np.uint8)
        rows = self._rows(addresses, data.shape[1], blocks)
        self._check_write(rows, data.shape[1], threads)
        self._put(rows, data, threads)

    def _put(self, rows: np.ndarray, data: np.ndarray, threads: np.ndarray) -> None:
        size = data.shape[1]
        content = self._bytes.reshape(-1, size)
        before = content[rows]
        writer = self._of(self._writer, size)
        other = (writer[rows] >= 0) & (writer[rows] // WARP != threads[:, None] // WARP)
        if (other.any(1) & (before != data).any(1)).any():
            raise Race("two warps write different values to shared memory without a barrier")
        content[rows], writer[rows] = data, threads[:, None]
        lost = (content[rows] != data).any(1)
        if lost.any():
            # Within a warp one value stays, taken to be the last thread's; the warps must agree on it.
            _, last = np.unique((rows * self._warps + threads // WARP)[::-1], return_index=True)
            last = len(rows) - 1 - last
            if (content[rows[last]] != data[last]).any():
                raise Race("two warps write different values to shared memory in one instruction")
            self.ambiguous[0] += 1
        self._of(self._writer_step, size)[rows] = self._step
        self._of(self._written, size)[rows] = True
        self._of(self._unfenced, size)[rows] = True

    # Asynchronous copies

    def copy(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray, threads: np.ndarray) -> None:
        """Start copies of the rows of `data`; they end at the wait."""
        size = data.shape[1]
        rows = self._rows(addresses, size, blocks)
        self._check_write(rows, size, threads)
        self._of(self._copying, size)[rows] = True
        self._open_copies.append(_Copies(size, rows, threads, data))

    def commit_copies(self) -> None:
        self._copy_groups.append(self._open_copies)
        self._open_copies = []

    def wait_for_copies(self, pending: int) -> None:
        """End all but the last `pending` groups of copies."""
        while len(self._copy_groups) > pending:
            for copies in self._copy_groups.pop(0):
                self._of(self._copying, copies.size)[copies.rows] = False
                self._put(copies.rows, copies.data, copies.threads)

    # Tensor cores

    def read_operand(self, addresses: np.ndarray, dtype: type, blocks: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Read elements through the async proxy, until `wait_for_products`.

        Args:
            addresses: `[groups, rows, columns]` of elements of `dtype`.
            dtype: of the elements.
            blocks: `[groups]`, whose shared memory.
            warps: `[groups]`, the first of the four warps that multiply.
        """
        size = np.dtype(dtype).itemsize
        flat = addresses.reshape(len(blocks), -1)
        rows = self._rows(flat, size, blocks[:, None])
        if not self._of(self._written, size)[rows].all():
            raise Uninitialized("a tensor core reads shared memory that nothing has written")
        if self._of(self._copying, size)[rows].any():
            raise AsyncCopyRace("a tensor core reads shared memory before the wait for the copy into it")
        if (self._of(self._writer, size)[rows] >= 0).any():
            # The product belongs to four warps: what one of them wrote, the others need a barrier for.
            raise Race("a tensor core reads shared memory that was written without a barrier after it")
        if self._of(self._unfenced, size)[rows].any():
            raise MissingFence("a tensor core reads shared memory written since the last fence.proxy.async")
        marks = np.uint32(15) << warps.astype(np.uint32)
        self._of(self._readers, size)[rows] |= np.broadcast_to(marks[:, None], flat.shape)[..., None]
        self._of(self._multiplying, size)[rows] = 1
        self._open_products.append((size, rows))
        return self._bytes.view(dtype)[rows].reshape(addresses.shape)

    def commit_products(self) -> None:
        self._product_groups.append(self._open_products)
        self._open_products = []

    def wait_for_products(self, pending: int) -> None:
        """End all but the last `pending` groups of products."""
        while len(self._product_groups) > pending:
            self._product_groups.pop(0)
        self._multiplying[:] = 0
        for group in [*self._product_groups, self._open_products]:
            for size, rows in group:
                self._of(self._multiplying, size)[rows] = 1

    # Blocks that part

    def select(self, chosen: np.ndarray) -> SharedMemory:
        """Return the shared memory of some blocks, by their numbers, as a memory of its own."""
        part = SharedMemory.__new__(SharedMemory)
        part.__dict__.update(self.__dict__)
        part.blocks = len(chosen)
        for name, state in vars(self).items():
            if isinstance(state, np.ndarray):
                setattr(part, name, state.reshape(self.blocks, -1)[chosen].reshape(-1))
        renumber = np.full(self.blocks, -1)
        renumber[chosen] = np.arange(len(chosen))

        def moved(size: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            per_block = self._stride // size
            block = renumber[rows // per_block]
            return block >= 0, block * per_block + rows % per_block

        def copies(group: list[_Copies]) -> list[_Copies]:
            result = []
            for one in group:
                keep, rows = moved(one.size, one.rows)
                result.append(_Copies(one.size, rows[keep], one.threads[keep], one.data[keep]))
            return result

        def products(group: list) -> list:
            result = []
            for size, rows in group:
                keep, rows = moved(size, rows)
                result.append((size, rows[keep]))
            return result

        part._open_copies, part._copy_groups = copies(self._open_copies), [copies(g) for g in self._copy_groups]
        part._open_products, part._product_groups = (
            products(self._open_products),
            [products(g) for g in self._product_groups],
        )
        return part
