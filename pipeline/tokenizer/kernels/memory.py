"""Raw memory, bits and vectors for the numba loops of the tokenizer.

Memory is read and written through addresses (int64): arrays in tuples would cost two atomic reference counts per use,
and every index a check whether it is negative. Words are uint64 throughout: numba silently turns a sum of int64 and
uint64 into float64.

Vector operations: ``byte_masks`` compares 64 bytes at a time and packs the answers into words, one bit a byte;
``least`` finds the least of 16 numbers in memory; ``Sixteen`` is 16 numbers in a register. They are written in LLVM's
own terms, which become AVX-512, AVX2, SSE2 or NEON, as the machine has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from pipeline.tokenizer.kernels.cache import helper

BLOCK_BYTES = 64
ALL_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
ONE = np.uint64(1)
TOP_BIT = np.uint64(63)

_BYTE, _INT32, _WORD, _BOOL = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.IntType(1)
_BLOCK = ir.VectorType(_BYTE, BLOCK_BYTES)
_SIXTEEN = ir.VectorType(_INT32, 16)


class Sixteen(types.Type):
    """Sixteen uint32 as one value, which stays in a vector register."""

    def __init__(self) -> None:
        super().__init__(name="Sixteen")


@register_model(Sixteen)
class _SixteenModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _SIXTEEN)


def _operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that builds LLVM code: it becomes an operation of these types that kernels can call.

    The function gets a builder and the arguments as LLVM values, and returns a value, a list of values for a tuple, or
    None.
    """

    def decorate(build: Callable[..., Any]) -> Any:
        signature = result(*parameters)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            value = build(builder, *arguments)
            if isinstance(value, list):
                return context.make_tuple(builder, signature.return_type, value)
            return context.get_dummy_value() if value is None else value

        @functools.wraps(build)
        def define(_typing_context: Any, *_arguments: Any) -> Any:
            return signature, generate

        return intrinsic(define)

    return decorate


def _loader(bits: int, result: Any) -> Any:
    """load(address) of an integer without alignment; below 64 bits it is extended with zeros."""

    @_operation(result, types.int64)
    def load(builder: Any, address: Any) -> Any:
        pointer = builder.inttoptr(address, ir.IntType(bits).as_pointer())
        return builder.zext(builder.load(pointer, align=1), _WORD)

    return load


def _storer(bits: int) -> Any:
    """store(address, value) of the lowest bits of a uint64 without alignment."""

    @_operation(types.void, types.int64, types.uint64)
    def store(builder: Any, address: Any, value: Any) -> None:
        pointer = builder.inttoptr(address, ir.IntType(bits).as_pointer())
        builder.store(builder.trunc(value, ir.IntType(bits)), pointer, align=1)

    return store


def _getter(bits: int) -> Any:
    """get(array, index) of a signed integer of the array at an address."""

    @_operation(types.int64, types.int64, types.int64)
    def get(builder: Any, array: Any, index: Any) -> Any:
        pointer = builder.inttoptr(array, ir.IntType(bits).as_pointer())
        return builder.sext(builder.load(builder.gep(pointer, [index])), _WORD)

    return get


def _putter(bits: int) -> Any:
    """put(array, index, value) of a signed integer into the array at an address."""

    @_operation(types.void, types.int64, types.int64, types.int64)
    def put(builder: Any, array: Any, index: Any, value: Any) -> None:
        pointer = builder.inttoptr(array, ir.IntType(bits).as_pointer())
        builder.store(builder.trunc(value, ir.IntType(bits)), builder.gep(pointer, [index]))

    return put


load_byte = _loader(8, types.int64)
load_16 = _loader(16, types.int64)
load_32 = _loader(32, types.int64)
load_word = _loader(64, types.uint64)
store_byte = _storer(8)
store_16 = _storer(16)
store_32 = _storer(32)
store_word = _storer(64)
get_32 = _getter(32)
get_64 = _getter(64)
put_32 = _putter(32)
put_64 = _putter(64)


@_operation(types.int64, types.uint64)
def trailing_zeros(builder: Any, word: Any) -> Any:
    """Number of zero bits below the lowest one bit; 64 for zero."""
    return builder.cttz(word, ir.Constant(_BOOL, 0))


@_operation(types.int64, types.uint64)
def ones(builder: Any, word: Any) -> Any:
    """Number of one bits."""
    return builder.ctpop(word)


@_operation(types.int64, types.uint64)
def leading_zeros(builder: Any, word: Any) -> Any:
    """Number of zero bits above the highest one bit; 64 for zero."""
    return builder.ctlz(word, ir.Constant(_BOOL, 0))


@_operation(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Request the cache line without waiting for it; any address is allowed."""
    pointer = builder.inttoptr(address, _BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To be read, with the highest locality, from the data cache: LLVM Language Reference, llvm.prefetch.
    builder.call(hint, [pointer, *(ir.Constant(_INT32, value) for value in (0, 3, 1))])


@_operation(types.UniTuple(types.uint64, 6), types.int64)
def byte_masks(builder: Any, address: Any) -> list[Any]:
    """Six masks of the 64 bytes at an address as words, lowest bit first.

    ASCII letters, ASCII digits, ASCII white space, blanks, apostrophes, first bytes of longer characters (from 0xC0).
    """
    data = builder.load(builder.inttoptr(address, _BLOCK.as_pointer()), align=1)

    def every(value: int) -> Any:
        return ir.Constant(_BLOCK, [value] * BLOCK_BYTES)

    def within(source: Any, first: int, count: int) -> Any:
        return builder.icmp_unsigned("<", builder.sub(source, every(first)), every(count))

    blanks = builder.icmp_unsigned("==", data, every(0x20))
    flags = (
        within(builder.or_(data, every(0x20)), 0x61, 26),
        within(data, 0x30, 10),
        builder.or_(within(data, 0x09, 5), blanks),
        blanks,
        builder.icmp_unsigned("==", data, every(0x27)),
        builder.icmp_unsigned(">=", data, every(0xC0)),
    )
    return [builder.bitcast(flag, _WORD) for flag in flags]


def _splat(builder: Any, value: Any) -> Any:
    """A vector of 16 times the value."""
    nothing = ir.Constant(_SIXTEEN, ir.Undefined)
    first = builder.insert_element(nothing, value, _INT32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_SIXTEEN, [0] * 16))


def _reduce(builder: Any, vector: Any) -> Any:
    """The least of 16."""
    kind = ir.FunctionType(_INT32, [_SIXTEEN])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.umin.v16i32"), [vector]
    )


@_operation(types.UniTuple(types.int64, 2), types.int64)
def least(builder: Any, address: Any) -> list[Any]:
    """The least of the 16 uint32 at an address, and the first place where it is."""
    data = builder.load(builder.inttoptr(address, _SIXTEEN.as_pointer()), align=1)
    value = _reduce(builder, data)
    equal = builder.bitcast(builder.icmp_unsigned("==", data, _splat(builder, value)), ir.IntType(16))
    place = builder.cttz(builder.zext(equal, _WORD), ir.Constant(_BOOL, 1))
    return [builder.zext(value, _WORD), place]


@_operation(Sixteen(), types.int64)
def load_sixteen(builder: Any, address: Any) -> Any:
    """The 16 uint32 at an address."""
    return builder.load(builder.inttoptr(address, _SIXTEEN.as_pointer()), align=1)


@_operation(types.int64, Sixteen())
def least_lane(builder: Any, vector: Any) -> Any:
    """The least of the 16."""
    return builder.zext(_reduce(builder, vector), _WORD)


@_operation(Sixteen(), Sixteen(), types.int64, types.int64)
def with_lane(builder: Any, vector: Any, place: Any, value: Any) -> Any:
    """The vector with another value at a place, if there is such a place."""
    places = ir.Constant(_SIXTEEN, list(range(16)))
    chosen = builder.icmp_unsigned("==", _splat(builder, builder.trunc(place, _INT32)), places)
    return builder.select(chosen, _splat(builder, builder.trunc(value, _INT32)), vector)


@_operation(types.uint64, Sixteen(), Sixteen())
def less(builder: Any, one: Any, other: Any) -> Any:
    """Whether a number of one is below that of the other, one bit for each of the 16."""
    return builder.zext(builder.bitcast(builder.icmp_unsigned("<", one, other), ir.IntType(16)), _WORD)


@_operation(types.void)
def apart(builder: Any) -> None:
    """Do not inline the helper that calls this.

    A loop that is inlined into a large function shares the registers with all the rest of it, and its variables are
    spilled to memory. numba passes "inlined" on to the helpers of an inlined helper, so nearly all would be inlined.
    """
    builder.function.attributes.discard("alwaysinline")
    builder.function.attributes.add("noinline")


@helper
def signed(word: np.uint64) -> int:
    """A word as an int64."""
    return np.int64(word)  # type: ignore[return-value]  # numba's integers are numpy's


@helper
def low_bits(count: int) -> np.uint64:
    """A word with its count lowest bits set, count from 0 to 63."""
    return (ONE << np.uint64(count)) - ONE
