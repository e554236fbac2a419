"""Arithmetic of single threads: PTX opcodes to functions of arrays of register bits, one element a thread.

Registers hold bits: uint16, uint32 or uint64, and bool for predicates. `operation` returns the function of an opcode
with the PTX types of its operands. Approximate opcodes (`ex2.approx`, `div.full`, `rsqrt.approx`) are computed as
exactly as float32 allows: a GPU's result may differ in the last two bits.
"""

import functools
import re
from collections.abc import Callable

import numpy as np
from ptx.checks import Unsupported

BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def storage(kind: str) -> type:
    """Return the dtype of a register that holds a PTX type."""
    if kind == "pred":
        return np.bool_
    if kind == "tf32" or kind.endswith("x2"):
        return np.uint32
    return BITS[kind.lstrip("busf")]


def immediate(text: str, kind: str) -> np.ndarray:
    """Return the register bits of a constant, an array of one element; shared memory starts at 0."""
    dtype = storage(kind)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.array([int(text[2:], 16)], dtype)
    if text == "global_smem":
        return np.zeros(1, dtype)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        raise Unsupported(f"the operand {text}")
    value = int(text.rstrip("U"), 0)
    return np.array([bool(value) if dtype is np.bool_ else value % (1 << 8 * np.dtype(dtype).itemsize)], dtype)


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(f"i{x.dtype.itemsize}")


def unsigned(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; NaN becomes the canonical one."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest TF32, ties away from zero (`cvt.rna`)."""
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    quiet = np.where(bits & np.uint32(0x7FFFFF), np.uint32(0x7FFFE000), bits)
    return np.where(finite, rounded, quiet)


def _read(x: np.ndarray, kind: str) -> np.ndarray:
    """View register bits as numbers of a PTX type."""
    if kind == "bf16":
        return from_bf16(x)
    if kind in FLOATS:
        return x.view(FLOATS[kind])
    return signed(x) if kind.startswith("s") else x


def _write(x: np.ndarray, kind: str) -> np.ndarray:
    """Return the register bits of numbers of a PTX type."""
    if kind == "pred":
        return x
    if kind == "bf16":
        return to_bf16(x.astype(np.float32))
    return unsigned(
        np.ascontiguousarray(x, FLOATS.get(kind) or storage(kind) if kind[0] != "s" else f"i{int(kind[1:]) // 8}")
    )


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c in float32, rounded once.

    The product is exact in float64; the sum is rounded there first. Where that rounding ends half-way between two
    float32 numbers, its error decides, as it would without the first rounding.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    bits = total.view(np.int64)
    half = (bits & 0x1FFFFFFF) == 0x10000000
    if half.any():
        virtual = total - product
        error = (product - (total - virtual)) + (c - virtual)
        away = (error > 0) == (total > 0)
        nudged = np.where(half & (error != 0), bits + np.where(away, 1, -1), bits)
        total = np.where(np.isfinite(total), nudged.view(np.float64), total)
    return total.astype(np.float32)


def _shift_left(x: np.ndarray, count: np.ndarray) -> np.ndarray:
    width = x.dtype.itemsize * 8
    return np.where(count >= width, x.dtype.type(0), x << np.minimum(count, width - 1).astype(x.dtype))


def _shift_right(x: np.ndarray, count: np.ndarray) -> np.ndarray:
    width = x.dtype.itemsize * 8
    shifted = x >> np.minimum(count, width - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(count >= width, x.dtype.type(0), shifted)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers toward zero; what PTX leaves open for b = 0 is all bits set here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(quotient), quotient).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - _divide(a, b) * np.where(b == 0, b.dtype.type(1), b)).astype(a.dtype)


def _extract(x: np.ndarray, start: np.ndarray, length: np.ndarray, sign: bool) -> np.ndarray:
    """Extract bits (`bfe`)."""
    start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(32))
    wide = (signed(x).astype(np.int64) if sign else x.astype(np.int64)) >> np.minimum(start, 63).astype(np.int64)
    value = wide & ((np.int64(1) << length.astype(np.int64)) - 1)
    if sign:
        top = (wide >> np.maximum(length.astype(np.int64) - 1, 0)) & 1
        value = np.where((top == 1) & (length > 0), value - (np.int64(1) << length.astype(np.int64)), value)
    return value.astype(np.uint64).astype(np.uint32)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Select bytes of a pair of registers (`prmt`)."""
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pair >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def selected(a: str, b: str, selector: str) -> tuple[str, str, str]:
    """Return the operands of `prmt`, with a register in place of one of which no byte is taken: it may be unwritten."""
    if selector.startswith("%"):
        return a, b, selector
    halves = {int(selector.rstrip("U"), 0) >> 4 * i & 4 for i in range(4)}
    return (a if 0 in halves else b), (b if 4 in halves else a), selector


def _convert(modifiers: list[str], target: str, source: str) -> Callable[..., np.ndarray]:
    """Return the function of `cvt`."""
    if target == "tf32":
        if modifiers != ["rna"]:
            raise Unsupported(f"cvt.{'.'.join(modifiers)}.tf32")
        return to_tf32
    if target in ("bf16x2", "f16x2"):
        half = target.removesuffix("x2")

        def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            high, low = (_write(x.view(np.float32), half).astype(np.uint32) for x in (high, low))
            return (high << np.uint32(16)) | low

        return pack

    def convert(x: np.ndarray) -> np.ndarray:
        if source[0] in "usb" and source not in FLOATS and source != "bf16":
            x = x.astype(storage(source))  # a register may be wider than the type: its low bits count
        number = _read(x, source)
        if number.dtype.kind == "f" and "f" not in target:
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            number = next(rounding[m] for m in modifiers if m in rounding)(number.astype(np.float64))
            limits = np.iinfo(storage(target) if target[0] == "u" else f"i{int(target[1:]) // 8}")
            # The largest integer is not a float64 where it has 64 bits; the next one below is.
            most = limits.max if limits.bits < 64 else np.nextafter(float(limits.max), 0)
            number = np.clip(np.nan_to_num(number, nan=0.0), limits.min, most)
        if target == "bf16":
            return to_bf16(number.astype(np.float32))
        if number.dtype.kind in "iu" and "f" not in target:
            return number.astype(np.int64 if number.dtype.kind == "i" else np.uint64).astype(storage(target))
        return _write(number.astype(FLOATS[target]) if target in FLOATS else number, target)

    return convert


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compare(how: str, kind: str) -> Callable[..., np.ndarray]:
    """Return the function of `setp`; a comparison of floats is false with NaN, or true where its name ends in u."""
    if kind not in FLOATS and kind != "bf16":
        return lambda a, b: _COMPARE[how](_read(a, kind), _read(b, kind))

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = _read(a, kind), _read(b, kind)
        unordered = np.isnan(a) | np.isnan(b)
        if how in ("nan", "num"):
            return unordered if how == "nan" else ~unordered
        if how.endswith("u"):
            return _COMPARE[how[:-1]](a, b) | unordered
        return _COMPARE[how](a, b) & ~unordered

    return compare


def _numbers(function: Callable[..., np.ndarray], kind: str) -> Callable[..., np.ndarray]:
    """Let a function of numbers take and return register bits."""
    return lambda *x: _write(function(*(_read(value, kind) for value in x)), kind)


def _flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal numbers by zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _flushed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *x: _flush(function(*map(_flush, x)))


def _packed(function: Callable[..., np.ndarray], kind: str) -> Callable[..., np.ndarray]:
    """Let a function of register bits work on the two halves of each register."""
    return lambda *x: function(
        *(np.ascontiguousarray(value).view(storage(kind)) for value in np.broadcast_arrays(*x))
    ).view(np.uint32)


def _in_double(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused_multiply_add,
    "div": np.divide,
    "max": np.fmax,
    "min": np.fmin,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)),
    "rcp": _in_double(lambda x: 1 / x),
}
_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _divide,
    "rem": _remainder,
}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_ROUNDINGS = {"rn", "approx", "full", "ftz"}


def _multiply(modifiers: list[str], kind: str, add: bool) -> tuple[Callable[..., np.ndarray], tuple[str, ...], str]:
    """Return `mul` or `mad` of integers, with the low or high half of the product, or all of it."""
    bits, half = int(kind[1:]), modifiers[0] if len(modifiers) == 1 else None
    if half not in ("lo", "hi", "wide") or (half != "lo" and bits == 64):
        raise Unsupported(f"mul.{'.'.join(modifiers)}.{kind}")
    result = kind[0] + str(2 * bits if half == "wide" else bits)
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8 * (1 if half == 'lo' else 2)}"

    def multiply(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        product = unsigned(_read(a, kind).astype(dtype) * _read(b, kind).astype(dtype))
        if half == "hi":
            product = (product >> product.dtype.type(bits)).astype(storage(kind))
        return product + c[0] if c else product

    return multiply, (kind, kind, *([result] if add else [])), result


@functools.cache
def operation(opcode: str) -> tuple[Callable[..., np.ndarray], tuple[str, ...], str]:
    """Return the function of an opcode, the PTX types of its operands and that of its result.

    Raises:
        Unsupported: the opcode or one of its modifiers has no model.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers.pop()
    plain = set(modifiers) <= _ROUNDINGS
    if name == "mov":
        return (lambda x: x), (kind,), kind
    if name == "selp":
        return (lambda a, b, p: np.where(p, a, b)), (kind, kind, "pred"), kind
    if name == "setp" and len(modifiers) == 1:
        return _compare(modifiers[0], kind), (kind, kind), "pred"
    if name == "cvt":
        target = modifiers.pop()
        operands = (kind, kind) if target.endswith("x2") else (kind,)
        return _convert(modifiers, target, kind), operands, target
    if name in _BITWISE:
        function = _BITWISE[name]
        return function, (kind,) * function.nin, kind
    if name in ("shl", "shr"):
        shift = _shift_left if name == "shl" else _shift_right
        return (lambda x, n: unsigned(shift(_read(x, kind), n))), (kind, "u32"), kind
    if name == "bfe" and kind in ("u32", "s32"):
        return (lambda x, start, n: _extract(x, start, n, kind == "s32")), (kind, "u32", "u32"), kind
    if name == "prmt" and not modifiers:
        return _permute, ("b32",) * 3, "b32"
    if kind in FLOATS and name in _FLOAT and plain:
        if kind != "f32":
            raise Unsupported(f"{opcode}: arithmetic other than float32")
        count = {"fma": 3, "add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2}.get(name, 1)
        function = _flushed(_FLOAT[name]) if "ftz" in modifiers else _FLOAT[name]
        return _numbers(function, kind), (kind,) * count, kind
    if kind[0] in "us" and name in ("mul", "mad"):
        return _multiply(modifiers, kind, name == "mad")
    if kind.endswith("x2") and name in _INTEGER:
        function, operands, _ = operation(opcode.removesuffix("x2"))
        return _packed(function, kind.removesuffix("x2")), (kind,) * len(operands), kind
    if kind[0] in "usb" and name in _INTEGER and not modifiers:
        return _numbers(_INTEGER[name], kind), (kind,) * (1 if name in ("neg", "abs") else 2), kind
    raise Unsupported(opcode)
