"""verifier/keccak.py"""

from verifier.keccak import keccak256


def test_keccak_is_ethereums() -> None:
    # the empty string and "abc": the Keccak team's test vectors; one long enough for three blocks
    assert keccak256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert keccak256(b"abc").hex() == "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45"
    assert len({keccak256(bytes(n)) for n in range(130, 280)}) == 150
