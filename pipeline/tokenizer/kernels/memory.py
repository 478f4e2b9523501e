"""Raw memory, bits and vectors for the numba loops of the tokenizer.

Memory is read and written through addresses (int64): arrays in tuples would cost two atomic reference counts per use,
and every index a check whether it is negative. Words are uint64 throughout: numba silently turns a sum of int64 and
uint64 into float64.

Vector operations: ``byte_masks`` compares 64 bytes at a time and packs the answers into words, one bit a byte;
``least`` finds the least of 16 numbers in memory; ``Sixteen`` is 16 numbers in a register. They are written in LLVM's
own terms, which become AVX-512, AVX2, SSE2 or NEON, as the machine has them.
"""

from __future__ import annotations

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


def _loader(bits: int, result: Any) -> Any:
    """load(address) of an integer without alignment; below 64 bits zeros are added in front."""

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(pointer, align=1), _WORD)

        return result(types.int64), generate

    return load


def _storer(bits: int) -> Any:
    """store(address, value) of the lowest bits of a uint64 without alignment."""

    @intrinsic
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(builder.trunc(arguments[1], ir.IntType(bits)), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64), generate

    return store


def _getter(bits: int) -> Any:
    """get(array, index) of a signed integer of the array at an address."""

    @intrinsic
    def get(typing_context: Any, array: Any, index: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.sext(builder.load(builder.gep(pointer, [arguments[1]])), _WORD)

        return types.int64(types.int64, types.int64), generate

    return get


def _putter(bits: int) -> Any:
    """put(array, index, value) of a signed integer into the array at an address."""

    @intrinsic
    def put(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(builder.trunc(arguments[2], ir.IntType(bits)), builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return put


def _trailing_zeros(_typing_context: Any, _word: Any) -> Any:
    """trailing_zeros(word): number of zero bits below the lowest one bit; 64 for zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_BOOL, 0))

    return types.int64(types.uint64), generate


def _ones(_typing_context: Any, _word: Any) -> Any:
    """ones(word): number of one bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def _leading_zeros(_typing_context: Any, _word: Any) -> Any:
    """leading_zeros(word): number of zero bits above the highest one bit; 64 for zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(_BOOL, 0))

    return types.int64(types.uint64), generate


def _prefetch(_typing_context: Any, _address: Any) -> Any:
    """prefetch(address): bring the cache line in, without waiting for it. Any address will do."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To be read, with the highest locality, from the data cache: LLVM Language Reference, llvm.prefetch.
        builder.call(hint, [pointer, *(ir.Constant(_INT32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _byte_masks(_typing_context: Any, _address: Any) -> Any:
    """byte_masks(address): six masks of the 64 bytes there as words, lowest bit first.

    ASCII letters, ASCII digits, ASCII white space, blanks, apostrophes, first bytes of longer characters (from 0xC0).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = builder.load(builder.inttoptr(arguments[0], _BLOCK.as_pointer()), align=1)

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
        words = [builder.bitcast(flag, _WORD) for flag in flags]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint64, 6)(types.int64), generate


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


def _least(_typing_context: Any, _address: Any) -> Any:
    """least(address): the least of the 16 uint32 there, and the first place where it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = builder.load(builder.inttoptr(arguments[0], _SIXTEEN.as_pointer()), align=1)
        value = _reduce(builder, data)
        equal = builder.bitcast(builder.icmp_unsigned("==", data, _splat(builder, value)), ir.IntType(16))
        place = builder.cttz(builder.zext(equal, _WORD), ir.Constant(_BOOL, 1))
        return context.make_tuple(builder, signature.return_type, [builder.zext(value, _WORD), place])

    return types.UniTuple(types.int64, 2)(types.int64), generate


def _load_sixteen(_typing_context: Any, _address: Any) -> Any:
    """load_sixteen(address): the 16 uint32 there."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _SIXTEEN.as_pointer()), align=1)

    return Sixteen()(types.int64), generate


def _least_lane(_typing_context: Any, _vector: Any) -> Any:
    """least_lane(vector): the least of the 16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.zext(_reduce(builder, arguments[0]), _WORD)

    return types.int64(Sixteen()), generate


def _with_lane(_typing_context: Any, _vector: Any, _place: Any, _value: Any) -> Any:
    """with_lane(vector, place, value): the vector with another value at a place, if there is such a place."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector, place, value = arguments
        places = ir.Constant(_SIXTEEN, list(range(16)))
        chosen = builder.icmp_unsigned("==", _splat(builder, builder.trunc(place, _INT32)), places)
        return builder.select(chosen, _splat(builder, builder.trunc(value, _INT32)), vector)

    return Sixteen()(Sixteen(), types.int64, types.int64), generate


def _less(_typing_context: Any, _one: Any, _other: Any) -> Any:
    """less(one, other): whether a number of one is below that of the other, one bit for each of the 16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(builder.icmp_unsigned("<", *arguments), ir.IntType(16)), _WORD)

    return types.uint64(Sixteen(), Sixteen()), generate


def _apart(_typing_context: Any) -> Any:
    """apart(): do not inline the helper that calls this.

    A loop that is inlined into a large function shares the registers with all the rest of it, and its variables are
    spilled to memory. numba passes "inlined" on to the helpers of an inlined helper, so nearly all would be inlined.
    """

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.function.attributes.discard("alwaysinline")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


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
trailing_zeros: Any = intrinsic(_trailing_zeros)
leading_zeros: Any = intrinsic(_leading_zeros)
ones: Any = intrinsic(_ones)
prefetch: Any = intrinsic(_prefetch)
byte_masks: Any = intrinsic(_byte_masks)
least: Any = intrinsic(_least)
load_sixteen: Any = intrinsic(_load_sixteen)
least_lane: Any = intrinsic(_least_lane)
with_lane: Any = intrinsic(_with_lane)
less: Any = intrinsic(_less)
apart: Any = intrinsic(_apart)


@helper
def signed(word: np.uint64) -> int:
    """A word as an int64."""
    return np.int64(word)  # type: ignore[return-value]  # numba's integers are numpy's


@helper
def low_bits(count: int) -> np.uint64:
    """A word with its count lowest bits set, count from 0 to 63."""
    return (ONE << np.uint64(count)) - ONE
