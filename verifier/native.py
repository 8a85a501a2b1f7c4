"""Programs that numba compiles ahead of their first call, and memory as LLVM sees it."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.registry import cpu_target


def compiled(signature: Any, function: Any, name: str, sources: Sequence[str]) -> Callable[..., None]:
    """Runs without the GIL. Cached where there is a place for it, in files whose name tells what made the program.

    name: of it among those that the same function becomes; sources: files whose code is in it.

    Rationale: numba looks only at the function's own file, keeps all programs of one name under one index, and writes
    index and program without a lock. So each has a name of its own: who else writes that, writes the same.
    """
    processor = cpu_target.target_context.codegen().magic_tuple()
    made = sha256(repr((processor, numba.__version__)).encode())
    for source in (__file__, *sources):
        made.update(Path(source).read_bytes())
    function.__qualname__ = f"{name}_{made.hexdigest()[:16]}"
    program: Callable[..., None]
    try:
        program = numba.njit(signature, nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # nowhere to keep it: neither beside the file nor in the user's folder, or no room
        program = numba.njit(signature, nogil=True)(function)
    return program


def elements(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    """The pointer to an array's first element, where an intrinsic generates code."""
    return context.make_array(array_type)(context, builder, value).data
