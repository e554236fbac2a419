"""Prints what reading a file reserves, and what reading and preprocessing it take at their peak.

    python tests/data/peak_memory.py FILE...

Both in bytes, above what the process had before. Every file is read in a forked process: the peak of a process never
falls.
"""

import os
import resource
import sys

import simsid.data.dicom  # what reading DICOM imports is not a file's memory
import simsid.data.raster
from simsid.data import read_image
from simsid.data.decoded import MAX_BYTES, MemoryBudget
from simsid.data.preprocessing import Preprocessing
from simsid.errors import ReadError


class Noted(MemoryBudget):
    """A budget that knows the last amount that was reserved."""

    amount = 0

    def reserve(self, amount):
        self.amount = amount
        return super().reserve(amount)


def peak():
    """Peak resident memory of this process in bytes (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    budget = simsid.data.raster.BUDGET = simsid.data.dicom.BUDGET = Noted(MAX_BYTES)
    for path in sys.argv[1:]:
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        before = peak()
        read = 0
        try:
            image = read_image(path)
            outcome = f"{image.pixels.nbytes}"
            read = peak() - before
            Preprocessing(intensity="auto").quantize(image)
        except ReadError as error:
            outcome = str(error)
        print(budget.amount, read, peak() - before, path, outcome, sep="\t", flush=True)
        os._exit(0)
