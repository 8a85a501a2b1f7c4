"""Programs that numba compiles ahead of their first call, and memory as LLVM sees it."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    """Runs without the GIL. Cached where there is a place for it."""
    program: Callable[..., None]
    try:
        program = numba.njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the cache: neither beside the function's file nor in the user's own folder
        program = numba.njit(signature, nogil=True)(function)
    return program


def elements(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    """The pointer to an array's first element, where an intrinsic generates code."""
    return context.make_array(array_type)(context, builder, value).data
