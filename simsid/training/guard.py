"""The guard that stops a training at the first loss or gradient that is not finite, without waiting for the device."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from simsid.distributed import ProcessGroup
from simsid.errors import NonFiniteError


class NonFiniteGuard:
    """Remembers on the device the first loss or gradient that is NaN or infinite, and blocks all later updates.

    `flag` is a float32 scalar, 0 while all was finite and 1 from the first value that was not. PyTorch's fused Adam
    skips its update where `found_inf` is 1, so the weights keep their last finite values until the host calls `check`.

    Args:
        parameters: name to parameter of everything that is trained, for the error message.
        losses: the largest number of losses that one call of `inspect` gets.
        group: the ranks whose losses are averaged, so that all of them stop at once and for the same reason.
    """

    def __init__(self, parameters: Mapping[str, Tensor], losses: int, group: ProcessGroup) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._group = group
        device = next(iter(self._names)).device
        self.flag = torch.zeros((), device=device)
        self.iteration = torch.zeros((), dtype=torch.int64, device=device)
        # Of the first call of `inspect` with a value that is not finite: iteration, index of the call, and its values.
        self._bad_iteration, self._bad_call = torch.zeros(2, dtype=torch.int64, device=device)
        self._bad_values = torch.zeros(losses + len(self._names), device=device)
        # What each call looks at, by the names of its losses; the index is a constant in a captured CUDA graph.
        self._calls: dict[tuple[str, ...], int] = {}
        self._inspected: list[list[str]] = []

    @property
    def state(self) -> list[Tensor]:
        """The tensors that `inspect` changes."""
        return [self.flag, self._bad_iteration, self._bad_call, self._bad_values]

    @torch.no_grad()
    def inspect(self, losses: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> None:
        """Set `flag` where a loss or the gradient of a parameter is not finite; the first such call is remembered."""
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        # Gradients are averaged over the ranks already.
        means = self._group.mean(torch.stack([loss.detach().float() for loss in losses.values()]))
        values = torch.cat([means, torch.stack(norms)])
        bad = ~values.isfinite().all()
        first = bad & (self.flag == 0)
        remembered = self._bad_values[: len(values)]
        remembered.copy_(torch.where(first, values, remembered))
        self._bad_iteration.copy_(torch.where(first, self.iteration, self._bad_iteration))
        self._bad_call.masked_fill_(first, self._index(tuple(losses), gradients))
        self.flag.masked_fill_(bad, 1.0)

    def check(self) -> None:
        """Wait for the device and raise if something was not finite.

        Raises:
            NonFiniteError: naming the iteration, and the loss or the weights whose gradient it was.
        """
        if not self.flag.item():
            return
        values = zip(self._inspected[int(self._bad_call)], self._bad_values.tolist())
        name, value = next((name, value) for name, value in values if not math.isfinite(value))
        # The norm of a gradient is infinite where an element is, so its value would mislead.
        problem = "not finite" if name.startswith("gradient of") else str(value)
        raise NonFiniteError(f"step {int(self._bad_iteration)}: the {name} is {problem}; nothing was updated with it")

    def _index(self, losses: tuple[str, ...], parameters: Iterable[Tensor]) -> int:
        if losses not in self._calls:
            self._calls[losses] = len(self._inspected)
            gradients = [f"gradient of {self._names[parameter]}" for parameter in parameters]
            self._inspected.append([*(f"{name} loss" for name in losses), *gradients])
        return self._calls[losses]


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Wait for the device and raise if a floating-point tensor holds NaN or infinity.

    Args:
        tensors: name to tensor.
        owner: what has them, for the message: "the model's".

    Raises:
        NonFiniteError: naming the first such tensor.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return
    finite = torch.stack([tensor.isfinite().all() for tensor in floating.values()]).tolist()
    for name, good in zip(floating, finite):
        if not good:
            raise NonFiniteError(f"{owner} {name} is not finite; train from an earlier checkpoint or from scratch")
