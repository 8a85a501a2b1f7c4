from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "packing")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    dtype: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    packing: int
    def __init__(self, dtype: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., packing: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("request", "first", "count", "donor")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DONOR_FIELD_NUMBER: _ClassVar[int]
    request: int
    first: int
    count: int
    donor: int
    def __init__(self, request: _Optional[int] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., donor: _Optional[int] = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("busy", "slowest")
    BUSY_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_FIELD_NUMBER: _ClassVar[int]
    busy: int
    slowest: int
    def __init__(self, busy: _Optional[int] = ..., slowest: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("pieces", "hidden", "ended", "times")
    PIECES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    hidden: Tensor
    ended: _containers.RepeatedScalarFieldContainer[int]
    times: Times
    def __init__(self, pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., ended: _Optional[_Iterable[int]] = ..., times: _Optional[_Union[Times, _Mapping]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("request", "index", "token")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    request: int
    index: int
    token: int
    def __init__(self, request: _Optional[int] = ..., index: _Optional[int] = ..., token: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens", "times")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    times: Times
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., times: _Optional[_Union[Times, _Mapping]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("root", "leaves", "signature")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    leaves: int
    signature: bytes
    def __init__(self, root: _Optional[bytes] = ..., leaves: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("held_ms", "last")
    HELD_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    held_ms: int
    last: bool
    def __init__(self, held_ms: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("job", "attempt", "sequence", "rows", "tokens", "finish", "abort", "beat")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    attempt: int
    sequence: int
    rows: Rows
    tokens: Tokens
    finish: Finish
    abort: Abort
    beat: Beat
    def __init__(self, job: _Optional[bytes] = ..., attempt: _Optional[int] = ..., sequence: _Optional[int] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("job", "attempt", "sequence", "refusal")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    attempt: int
    sequence: int
    refusal: str
    def __init__(self, job: _Optional[bytes] = ..., attempt: _Optional[int] = ..., sequence: _Optional[int] = ..., refusal: _Optional[str] = ...) -> None: ...
