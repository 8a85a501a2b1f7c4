"""What the referee refuses, by the names that the Solidity referee reverts with.

ValueError
  RefereeError
    IndexOutOfRange    a leaf, row or column that the tree or tensor does not have
    ProofLength        too few or too many siblings
    DataLength         an opening's bytes are not exactly what shape, range and dtype imply
    RootMismatch       the computed root is not the committed one
    OpeningCount       not one opening for each read
    ElementOutOfRange  the instruction has no such element at this position and unit
    ChunkOutOfRange    the element's sum has no such chunk
    UnknownOp          no op has this number
    UnknownSource      the op cannot read from this operand source
    OperandShape       lists of the wrong number or length were handed to an op
"""


class RefereeError(ValueError):
    """Base of every refusal. The message says what was expected and what came."""


class IndexOutOfRange(RefereeError):
    """A leaf, row or column that the tree or tensor does not have."""


class ProofLength(RefereeError):
    """Too few or too many siblings."""


class DataLength(RefereeError):
    """An opening's bytes are not exactly what shape, range and dtype imply."""


class RootMismatch(RefereeError):
    """The computed root is not the committed one."""


class OpeningCount(RefereeError):
    """Not one opening for each read."""


class ElementOutOfRange(RefereeError):
    """The instruction has no such element at this position and unit."""


class ChunkOutOfRange(RefereeError):
    """The element's sum has no such chunk."""


class UnknownOp(RefereeError):
    """No op has this number."""


class UnknownSource(RefereeError):
    """The op cannot read from this operand source."""


class OperandShape(RefereeError):
    """Lists of the wrong number or length were handed to an op."""
