"""The order of the house: who imports whom, and what it shows to its users."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import rmtjax

# A file imports only from lower layers. A new file has none: its author gives it one.
LAYER = {
    "_leading": 0,
    "_steps": 0,
    "_tensors": 0,
    "_typing": 0,
    "_version": 0,
    "_einsum": 1,
    "_placing": 1,
    "_kernels": 1,
    "_layers": 1,
    "_safetensors": 1,
    "_spectrum": 2,
    "marchenko_pastur": 1,
    "tracy_widom": 1,
    "_noise": 2,
    "_sharded": 3,
    "_orbax": 2,
    "_rounding": 3,
    "_bulk": 3,
    "_factors": 3,
    "_files": 3,
    "_histogram": 3,
    "shrinkage": 3,
    "_estimate": 3,
    "_values": 2,
    "_host_spectra": 3,
    "_host_directions": 3,
    "_chain": 4,
    "_cost": 4,
    "_directions": 4,
    "_drawing": 4,
    "_gram": 4,
    "_masks": 4,
    "_measure": 4,
    "_penalty": 4,
    "_products": 4,
    "_sharded_directions": 4,
    "ranks": 4,
    "_arguments": 5,
    "_linen_layers": 5,
    "_nnx_layers": 5,
    "_plan": 5,
    "_pruning": 5,
    "certificate": 5,
    "_cut": 6,
    "_entries": 6,
    "_manifest": 6,
    "_nnx_thin": 6,
    "_result_plots": 6,
    "_spectrum_plots": 6,
    "_transform": 6,
    "linen": 6,
    "_rows": 6,
    "sparsity": 6,
    "_metrics": 7,
    "_names": 7,
    "_nnx_models": 7,
    "_opt_state": 7,
    "_truncate": 7,
    "plots": 7,
    "_page": 7,
    "_change": 8,
    "_flat": 8,
    "report": 8,
    "_stream": 9,
    "nnx": 9,
    "checkpoint": 10,
    "cli": 10,
    "__main__": 11,
}
# What is not free to all belongs to one file; optax to those that know optimizers.
FREE = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
OWNERS = {
    "etils": {"_orbax"},
    "flax": {"_linen_layers", "_nnx_layers", "_nnx_models", "_nnx_thin", "linen", "nnx"},
    "matplotlib": {"_drawing", "_result_plots", "_spectrum_plots"},
    "optax": {"_entries", "_opt_state", "_transform"},
    "orbax": {"_orbax"},
    "pandas": {"report"},
    "rich": {"cli", "report"},
    "threadpoolctl": {"_host_spectra"},
    "scipy": {"_host_directions", "_values"},
}
PACKAGE = pathlib.Path(rmtjax.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PUBLIC = sorted(path.stem for path in FILES if not path.stem.startswith("_"))


def imported(path):
    """The modules that a file imports, as written, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it leads"
            if node.module == "rmtjax":
                yield from (f"rmtjax.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down(path):
    for module in imported(path):
        package, _, inner = module.partition(".")
        if package == "rmtjax":
            assert LAYER[inner] < LAYER[path.stem], f"imports {inner}"
        else:
            assert package in FREE or path.stem in OWNERS.get(package, ()), f"imports {package}"


def test_every_layer_has_its_file():
    assert {path.stem for path in FILES} == LAYER.keys()


def test_tensorflow_datasets_has_one_owner():
    paths = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").rglob("*.py")]
    users = {
        path.stem for path in paths if any(name.startswith("tensorflow") for name in imported(path))
    }
    assert users == {"_tfds"}


def test_the_package_needs_none_of_its_extras():
    code = "import sys, rmtjax; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert "rmtjax" in loaded.stdout.split()
    assert not {"matplotlib", "pandas", "tensorflow_datasets", "PIL"} & set(loaded.stdout.split())


def test_the_face_of_the_package_is_a_docstring_and_names():
    docstring, *imports, names = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value.value, str)
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert node.module.partition(".")[0] == "rmtjax"
        assert all(alias.asname == alias.name for alias in node.names)
    # `help` tells what is listed, of whatever file.
    told = {alias.name for node in imports for alias in node.names} - {"__version__"}
    assert isinstance(names, ast.Assign)
    assert ast.literal_eval(names.value) == sorted(told)


def public_objects():
    """Functions and classes that a user can reach by a name, each once."""
    modules = [rmtjax, *(importlib.import_module(f"rmtjax.{name}") for name in PUBLIC)]
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            home = getattr(value, "__module__", "")
            ours = home.startswith("rmtjax") and module.__name__ in ("rmtjax", home)
            if ours and not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = value
    return found


OBJECTS = public_objects()
FUNCTIONS = {name: value for name, value in OBJECTS.items() if inspect.isfunction(value)}
del FUNCTIONS["rmtjax.ranks.kept_rank"]  # a formula that rules share, no entrance
CLASSES = {name: value for name, value in OBJECTS.items() if inspect.isclass(value)}


@pytest.mark.parametrize("module", ["rmtjax", *(f"rmtjax.{path.stem}" for path in FILES)])
def test_every_module_has_a_docstring(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_every_public_function_tells_its_arguments_and_gives_an_example(function):
    document = inspect.getdoc(function)
    assert document
    assert "Examples:" in document
    told = document.partition("Args:")[2].partition("\n\n")[0]
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters if len(parameters) > 1 else ():
        stars = {parameter.VAR_POSITIONAL: r"\*", parameter.VAR_KEYWORD: r"\*\*"}
        name = stars.get(parameter.kind, "") + parameter.name
        assert re.search(rf"^\s+(\w+, )*{name}(, \w+)*:", told, re.MULTILINE), parameter.name


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
def test_every_public_class_and_its_methods_have_docstrings(cls):
    assert cls.__doc__
    fields = getattr(cls, "_fields", getattr(cls, "__dataclass_fields__", ()))
    if fields:
        told = inspect.getdoc(cls).partition("Attributes:")[2]
        assert all(f"{name}:" in told for name in fields)
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert method.__doc__, name
