"""keccak256 as Ethereum has it (the original padding, not SHA-3's), for the few hashes that a game's state holds.

Plain Python, about 0.2 ms a block of 136 bytes: nothing large is hashed with it. Source: the Keccak reference, 3.0.
"""

_MASK = (1 << 64) - 1
_RATE_BYTES = 136
_LANES = 25


def _constants() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Round constants by the reference's LFSR, and rotations by its (x, y) walk."""
    rounds, state = [], 1
    for _ in range(24):
        constant = 0
        for j in range(7):
            constant |= (state & 1) << ((1 << j) - 1)
            state = (state << 1) ^ (0x171 * (state >> 7))
        rounds.append(constant)
    offsets, x, y = [0] * _LANES, 1, 0
    for t in range(24):
        offsets[x + 5 * y] = (t + 1) * (t + 2) // 2 % 64
        x, y = y, (2 * x + 3 * y) % 5
    return tuple(rounds), tuple(offsets)


_ROUNDS, _OFFSETS = _constants()


def keccak256(data: bytes) -> bytes:
    """The 32-byte hash."""
    padded = bytearray(data) + bytes(_RATE_BYTES - len(data) % _RATE_BYTES)
    padded[len(data)] ^= 0x01
    padded[-1] ^= 0x80
    state = [0] * _LANES
    for block in range(0, len(padded), _RATE_BYTES):
        for lane in range(_RATE_BYTES // 8):
            state[lane] ^= int.from_bytes(padded[block + 8 * lane : block + 8 * lane + 8], "little")
        state = _permuted(state)
    return b"".join(lane.to_bytes(8, "little") for lane in state[:4])


def checksummed(account: bytes) -> str:
    """An account's 20 bytes as EIP-55 writes them: a letter is large where its digit of the hash is 8 or more."""
    digits = account.hex()
    told = keccak256(digits.encode()).hex()
    return "0x" + "".join(d.upper() if int(h, 16) >= 8 else d for d, h in zip(digits, told, strict=False))


def _rotated(lane: int, by: int) -> int:
    return ((lane << by) | (lane >> (64 - by))) & _MASK


def _permuted(a: list[int]) -> list[int]:
    for constant in _ROUNDS:
        column = [a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20] for x in range(5)]
        mixed = [column[(x - 1) % 5] ^ _rotated(column[(x + 1) % 5], 1) for x in range(5)]
        b = [0] * _LANES
        for x in range(5):
            for y in range(5):
                b[y + 5 * ((2 * x + 3 * y) % 5)] = _rotated(a[x + 5 * y] ^ mixed[x], _OFFSETS[x + 5 * y])
        rows = [b[5 * y : 5 * y + 5] for y in range(5)]
        a = [row[x] ^ (~row[(x + 1) % 5] & _MASK & row[(x + 2) % 5]) for row in rows for x in range(5)]
        a[0] ^= constant
    return a
