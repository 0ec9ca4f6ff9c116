"""Variables of `flax.nnx` for kernels: their values in each Flax version, and pairs of factors."""

from typing import Any, TypeGuard

import jax
from flax import nnx

from rmtjax._axes import Factors, is_factors
from rmtjax.spectra import multiply

# Newer Flax must be told which attributes hold data, so that an absent one can be set later.
ABSENT = nnx.data(None) if hasattr(nnx, "data") else None


class Product(nnx.Param):
    """The kernel of a thin layer, multiplied out for code that reads it."""

    def set_value(self, value, **options):
        """Raises TypeError: the layer stores its factors only, so the value would be lost."""
        raise TypeError(
            "The kernel of a thin layer is a product. Write to its factors (`left_factor` and "
            "`right_factor`, in a registered layer `left` and `right`) or use `rmtjax.nnx.replace`."
        )

    # Flax before 0.12 writes to this property instead of calling `set_value`.
    value: Any = property(nnx.Param.value.fget, set_value)

    def __setitem__(self, key, value):
        self.set_value(value)


class FactorPair(nnx.Module):
    """The variables of the two factors of one kernel. Other code reads their product."""

    def __init__(self, left: nnx.Param, right: nnx.Param):
        self.left, self.right = left, right

    def _product(self) -> Product:
        return Product(multiply(Factors(read(self.left), read(self.right))))

    value = property(lambda self: read(self._product()), Product.set_value)

    def __getattr__(self, name: str):
        # Flax and `copy` probe private names while the two factors are not set yet.
        if name[0] == "_" or name in ("left", "right"):
            raise AttributeError(name)
        return getattr(self._product(), name)

    def __getitem__(self, key):
        return self._product()[key]

    def __setitem__(self, key, value):
        self._product()[key] = value

    def __jax_array__(self):
        return read(self._product())


def read(variable: nnx.Variable) -> Any:
    """Returns the value of a variable, in any Flax version."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def write(variable: nnx.Variable, value: Any) -> None:
    """Sets the value of a variable, of any shape, in any Flax version."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def is_parameter(node: Any) -> TypeGuard[nnx.Param]:
    """Returns True for a parameter whose value is one array or `Factors`, not a tree or None."""
    is_leaf = lambda value: jax.tree.structure(value, is_leaf=is_factors) == jax.tree.structure(0)
    return isinstance(node, nnx.Param) and is_leaf(read(node))
