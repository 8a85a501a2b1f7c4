"""Rows of floats in fewer bytes, without loss: the exponents, which are alike, in a Huffman code, the rest as it is.

Sign and mantissa of a hidden state are noise; its exponent takes 8 bits and tells about 2.6. So each element is turned
left by a bit, and of its bytes the top one - in bfloat16 and float32 all of the exponent and nothing else - goes
through deflate without a search for repetitions, of which there are none. That comes within a per cent of the entropy
(`plumb bench wire`), and general compressors, which look for words, do worse.

    packed = the lower bytes, plane by plane from the lowest, then the raw deflate stream of the top bytes
"""

import zlib
from typing import Any

import numpy as np

PLAIN, PACKED = 0, 1  # of a Tensor on the wire

BITS: tuple[np.dtype[np.unsignedinteger[Any]], ...] = (np.dtype("<u2"), np.dtype("<u2"), np.dtype("<u4"))  # by dtype


def pack(data: bytes, dtype: int) -> bytes:
    """Little-endian elements."""
    kind = BITS[dtype]
    bits = np.frombuffer(data, kind)
    turned = (bits << 1) | (bits >> (8 * kind.itemsize - 1))
    planes = np.ascontiguousarray(turned.view(np.uint8).reshape(-1, kind.itemsize).T)
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return planes[:-1].tobytes() + coder.compress(planes[-1]) + coder.flush()


def unpack(packed: bytes, count: int, dtype: int) -> bytes:
    """`count` elements. Raises ValueError for anything that `pack` does not make of so many.

    SAFETY: a few bytes of a deflate stream can stand for a thousand times as many. No more than `count` are made.
    """
    kind = BITS[dtype]
    lower = count * (kind.itemsize - 1)
    if count < 1 or len(packed) <= lower:
        raise ValueError(f"expected {count} elements, came {len(packed)} bytes")
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        top = decoder.decompress(memoryview(packed)[lower:], count + 1)
    except zlib.error as error:
        raise ValueError(f"expected a deflate stream: {error}") from error
    if len(top) != count or not decoder.eof or decoder.unused_data:
        raise ValueError(f"expected a deflate stream of {count} bytes")
    planes = np.empty((count, kind.itemsize), np.uint8)
    planes[:, :-1] = np.frombuffer(packed, np.uint8, lower).reshape(kind.itemsize - 1, count).T
    planes[:, -1] = np.frombuffer(top, np.uint8)
    turned = planes.reshape(-1).view(kind)
    return ((turned >> 1) | (turned << (8 * kind.itemsize - 1))).tobytes()
