"""The law (Solidity, `src/`) and the one Python door to it (`client.py`)."""
