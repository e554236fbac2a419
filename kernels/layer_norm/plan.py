"""Launch plans of residual + LayerNorm + ReLU: pure functions sizes to tiles, the reason beside each entry."""

import dataclasses

import torch

from simsid.kernels.launch import ceil_div, power_of_two

MAX_FEATURES = 8192  # a program holds its row in registers: 16 features a thread at 16 warps
MAX_PARTS = 128  # about one program an SM; more parts cost more bytes than the shorter loops save


def refuse(x: torch.dtype, residual: torch.dtype, features: int) -> str | None:
    """Return why the kernels do not take these arguments, or None."""
    if torch.float64 in (x, residual):
        return "float64 has no kernel"
    if features > MAX_FEATURES:
        return f"rows of {features} features are longer than the {MAX_FEATURES} that one program can hold"
    return None


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Tile of the program that holds one row."""

    block_d: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class PartsPlan:
    """Programs of the backward kernel; each adds up the gradients to weight and bias of its own rows."""

    parts: int
    rows_per_program: int


def plan_row(features: int) -> RowPlan:
    """Plan one row: 8 features a thread where the row is long enough, two 16-byte accesses in float32."""
    block_d = power_of_two(features)
    return RowPlan(block_d, num_warps=max(1, min(16, block_d // 256)))  # 16 warps are 512 threads, 16 features each


def plan_parts(rows: int) -> PartsPlan:
    """Plan the sums over rows, whose order depends on the number of rows alone."""
    rows_per_program = max(1, ceil_div(rows, MAX_PARTS))
    return PartsPlan(ceil_div(rows, rows_per_program), rows_per_program)
