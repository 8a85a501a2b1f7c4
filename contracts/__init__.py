"""The law (Solidity, `src/`) and the one Python door to it (`client.py`)."""

import sys

import py_ecc as _py_ecc  # noqa: F401

# SAFETY: py_ecc, which eth-account brings along, raises the recursion limit to 100,000 when it is imported. JSON from a
# stranger, nested so deep, would then overflow the stack and kill the process instead of raising RecursionError.
sys.setrecursionlimit(1000)
