"""The interpreter's checks have teeth: kernels broken on purpose are noticed."""

import functools

import pytest
from test_ptx_kernels import needs_ptx, run_script

# What a mutation must be noticed by, where it is not by its result alone.
EXPECTED = {
    "block barrier removed": {"Race"},
    "wait for copies removed": {"AsyncCopyRace", "Uninitialized"},
    "wait for copies too weak": {"AsyncCopyRace", "Uninitialized"},
    "proxy fences removed": {"read in the program", "MissingFence"},
    "register fences removed": {"read in the program"},
    "waits for products removed": {"read in the program", "AsyncCopyRace"},
    "products not committed": {"read in the program", "AsyncCopyRace"},
    "masks of copies ignored": {"OutOfBounds", "another result"},
    "masks of loads ignored": {"OutOfBounds", "another result"},
    "masks of stores ignored": {"OutOfBounds", "Race", "another result"},
    "loads shifted": {"Misaligned", "OutOfBounds", "another result"},
    "stores shifted": {"Misaligned", "OutOfBounds", "another result"},
    "copies from shifted addresses": {"Misaligned", "OutOfBounds", "another result"},
    "descriptors' start shifted": {"another result", "OutOfBounds", "Uninitialized"},
    "descriptors' stride halved": {"another result", "OutOfBounds", "Uninitialized"},
    "descriptors' swizzle changed": {"another result", "Unsupported", "Misaligned"},
    "stores to shared memory removed": {"Uninitialized", "another result"},
    "shuffles from other lanes": {"another result"},
    "products of swapped fragments": {"another result"},
}


@functools.cache
def verdicts():
    """Return what `mutations.py` prints, which lists the mutations that nothing noticed."""
    return run_script("mutations.py", "--quick")


@needs_ptx
class TestMutations:
    def test_no_mutation_goes_unnoticed(self):
        assert verdicts()["missed"] == []

    @pytest.mark.parametrize("mutation", EXPECTED)
    def test_mutation_is_noticed_by_what_it_breaks(self, mutation):
        how = {verdict["how"] for verdict in verdicts()["verdicts"] if verdict["mutation"] == mutation} - {"missed"}
        assert how and how <= EXPECTED[mutation]
