"""What the interpreter reports: one class for each kind of fault, so that a test can name the one it expects."""


class Fault(Exception):
    """A kernel did what no GPU may do, or what its result must not depend on."""


class Unsupported(Fault):
    """The interpreter does not model this, so it can say nothing about the kernel."""


class OutOfBounds(Fault):
    """An address outside of every tensor, or outside of the block's shared memory."""


class Misaligned(Fault):
    """An address that is not a multiple of the access size."""


class Uninitialized(Fault):
    """A read of a register or of shared memory that nothing has written."""


class Race(Fault):
    """Two threads touch the same memory, one of them writes, and no barrier orders them."""


class AsyncCopyRace(Fault):
    """Memory that an asynchronous copy is still writing, or an asynchronous product still reading, is touched."""


class MissingFence(Fault):
    """A tensor core reads shared memory through the async proxy without a fence after the write."""


class Divergence(Unsupported):
    """Threads of one block take different ways at a branch."""
