"""Runs functions under JAX's usual modes, whatever modes their caller has switched on.

Some modes forbid what this package does on purpose: it mixes dtypes, reads spectra on the host, and
marks a fit that does not exist by NaN. None of the modes changes a result.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_usual_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns a function that promotes dtypes, moves arrays and returns NaN without an error.

    Strict promotion, transfer guards, and checks for NaN and infinity are on again when it returns.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.transfer_guard("allow"))
            stack.enter_context(jax.debug_nans(False))
            stack.enter_context(jax.debug_infs(False))
            return function(*args, **kwargs)

    return call
