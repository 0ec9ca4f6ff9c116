"""Variables of `flax.nnx` for kernels: their values in each Flax version, and those of parts."""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
from flax import nnx

from rmtjax._axes import FactoredKernel, Factors, is_factors
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


class PartsOfKernel(nnx.Module):
    """The variables of the parts of one kernel. Other code reads their product."""

    def leaf(self) -> Any:
        """Returns the kernel as the leaf of a tree: `Factors`, or in other parts."""
        raise NotImplementedError

    def identity(self) -> tuple[int, ...]:
        """Returns what tells these variables from others while they live."""
        return tuple(id(value) for value in vars(self).values() if isinstance(value, nnx.Variable))

    def _product(self) -> Product:
        return Product(multiply(self.leaf()))

    value = property(lambda self: read(self._product()), Product.set_value)

    def __getattr__(self, name: str):
        # Flax and `copy` probe private names while the parts are not set yet.
        if name[0] == "_" or name in ("left", "right", "names", "structure"):
            raise AttributeError(name)
        return getattr(self._product(), name)

    def __getitem__(self, key):
        return self._product()[key]

    def __setitem__(self, key, value):
        self._product()[key] = value

    def __jax_array__(self):
        return read(self._product())


class FactorPair(PartsOfKernel):
    """The variables of two factors."""

    def __init__(self, left: nnx.Param, right: nnx.Param):
        self.left, self.right = left, right

    def leaf(self) -> Factors:
        """Returns the two factors."""
        return Factors(read(self.left), read(self.right))


class HeldParts(PartsOfKernel):
    """The variables of a `FactoredKernel`, each by the name of its part."""

    def __init__(self, kernel: FactoredKernel, variable: Callable[[Any], nnx.Param]):
        named, self.structure = jax.tree_util.tree_flatten_with_path(kernel)
        names = [jax.tree_util.keystr(key, simple=True, separator="_") for key, _ in named]
        self.names = tuple(names)
        for name, (_, part) in zip(names, named, strict=True):
            setattr(self, name, variable(part))

    def leaf(self) -> FactoredKernel:
        """Returns the kernel in its parts."""
        variables = [vars(self)[name] for name in self.names]
        return self.structure.unflatten(map(read, variables))

    def variable(self) -> nnx.Param:
        """Returns one of the variables, whose type and metadata are those of all."""
        return vars(self)[self.names[0]]


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
