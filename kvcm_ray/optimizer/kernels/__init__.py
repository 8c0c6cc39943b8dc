"""Compiled loops. Imported only where they run, because importing numba takes half a second.

Compiled code is kept beside the source, or in the user's cache folder where that is read-only; where
neither can be written, each process compiles for itself. Kernels of one module call no kernels of
another: numba keeps compiled code for as long as *its own* file is unchanged.

Kernels trust their arguments; the functions that call them check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from kvcm_ray.errors import Unsupported

try:
    import numba
except ImportError as error:
    raise Unsupported(
        "the optimizer needs numba, which is not installed", hint="pip install 'kvcm-ray[optimizer]'"
    ) from error

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile at the first call; the compiled form is kept for later processes if it can be."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder that numba may write to
        return cast(F, numba.njit(nogil=True)(function))
