"""Global memory of one launch: the storages of its tensors, far enough apart that no overrun goes unseen."""

import numpy as np
from ptx.checks import Misaligned, OutOfBounds, Race

FIRST = 1 << 33  # above 2^32: a pointer that lost its upper half is out of bounds
GAP = 512  # bytes that belong to no tensor between two of them; also the alignment of a CUDA allocation


class GlobalMemory:
    """Bytes with bounds, alignment, and the block that wrote each of them in this launch."""

    def __init__(self, storages: list[np.ndarray]):
        """Copy `storages`, arrays of bytes, to addresses of their own: `addresses`, in their order."""
        self.addresses = self.addresses_of(storages)
        starts = [address - FIRST for address in self.addresses]
        end = (starts[-1] + len(storages[-1]) + 2 * GAP) // GAP * GAP
        self._sizes = [len(storage) for storage in storages]
        self._bytes = np.full(end, 0xCD, np.uint8)
        self._valid = np.zeros(end, bool)
        self._writer = np.full(end, -1, np.int32)
        for start, storage in zip(starts, storages):
            self._bytes[start : start + len(storage)] = storage
            self._valid[start : start + len(storage)] = True

    @staticmethod
    def addresses_of(storages: list[np.ndarray]) -> list[int]:
        """Return the address of each storage."""
        addresses, address = [], FIRST + GAP
        for storage in storages:
            addresses.append(address)
            address += -(-len(storage) // GAP) * GAP + GAP
        return addresses

    def contents(self, i: int) -> np.ndarray:
        """Return the bytes of the i-th storage."""
        start = self.addresses[i] - FIRST
        return self._bytes[start : start + self._sizes[i]]

    def _offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.view(np.int64) - FIRST
        if (offsets % size).any():
            bad = offsets[offsets % size != 0]
            raise Misaligned(f"{len(bad)} accesses of {size} bytes to global memory, first at {int(bad[0]):#x}")
        inside = (offsets >= 0) & (offsets <= len(self._bytes) - size)
        inside[inside] = self._valid[offsets[inside]] & self._valid[offsets[inside] + size - 1]
        if not inside.all():
            bad = offsets[~inside]
            raise OutOfBounds(
                f"{len(bad)} accesses to global memory outside of every tensor, first at {int(bad[0]):#x}"
            )
        return offsets

    def _check_writer(self, offsets: np.ndarray, blocks: np.ndarray) -> None:
        writer = self._writer[offsets]
        if ((writer >= 0) & (writer != blocks)).any():
            raise Race("global memory that another block of the launch has written")

    def load(self, addresses: np.ndarray, dtype: type, count: int, blocks: np.ndarray) -> np.ndarray:
        """Return `count` elements from each address, `[accesses, count]`."""
        size = np.dtype(dtype).itemsize * count
        offsets = self._offsets(addresses, size)
        self._check_writer(offsets, blocks)
        return self._bytes.view(dtype).reshape(-1, count)[offsets // size]

    def store(self, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray) -> None:
        """Write the elements `[accesses, count]`."""
        count = values.shape[1]
        size = values.dtype.itemsize * count
        offsets = self._offsets(addresses, size)
        self._check_writer(offsets, blocks)
        rows = self._bytes.view(values.dtype).reshape(-1, count)
        rows[offsets // size] = values
        if (rows[offsets // size] != values).any():
            raise Race("two threads write different values to one global address in one instruction")
        self._writer[offsets] = blocks
        if (self._writer[offsets] != blocks).any():
            raise Race("two blocks write to one global address")
