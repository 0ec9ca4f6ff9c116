"""The order of the rooms: who imports whom, and what the package shows to its users."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import rmtjax

# A room imports from rooms on lower steps, and only what their `__init__` names. Files at the root,
# which know neither trees nor models, are on step 0.
STEP = {
    "laws": 1,
    "moments": 1,
    "noise": 2,
    "spectra": 2,
    "planning": 3,
    "models": 3,
    "report": 4,
    "training": 4,
    "certificate": 5,
    "linen": 5,
    "lowrank": 5,
    "monitoring": 5,
    "nnx": 5,
    "plots": 5,
    "replicas": 5,
    "sparse": 5,
    "checkpoint": 6,
    "adapters": 7,
    "cli": 8,
}
# All may use these. What else is used has one owner: a room, or a file of it.
FREE = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
OWNERS = {
    "etils": {"checkpoint"},
    "flax": {"linen", "nnx"},
    "matplotlib": {"plots"},
    "ml_dtypes": {"checkpoint"},
    "optax": {"lowrank", "monitoring", "replicas", "sparse", "training"},
    "orbax": {"checkpoint"},
    "pandas": {"report"},
    "rich": {"cli", "report"},
    "scipy": {"spectra"},
    "threadpoolctl": {"spectra"},
}
PACKAGE = pathlib.Path(rmtjax.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
MODULES = sorted(
    ".".join(("rmtjax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
)
PUBLIC = (
    "adapters",
    "certificate",
    "checkpoint",
    "cli",
    "linen",
    "lowrank",
    "marchenko_pastur",
    "moments",
    "nnx",
    "patterns",
    "plots",
    "projections",
    "ranks",
    "shrinkage",
    "sparsity",
    "tracy_widom",
)


def imported(path):
    """The names that a file imports, as written, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it leads"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    """The room of a file; None at the root."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_into_rooms_by_their_door(path):
    here = room_of(path)
    for name in imported(path):
        package, *inner = name.split(".")
        if package != "rmtjax":
            assert package in FREE or here in OWNERS.get(package, ()), f"imports {package}"
        elif path.stem == "__main__" or inner[0] == here:
            continue
        elif inner[0] in STEP:
            assert here is not None, f"the root imports {name}"
            assert STEP[inner[0]] < STEP[here], f"imports {name}"
            assert len(inner) <= 2, f"imports {name}, behind the door of its room"
        else:
            assert (PACKAGE / f"{inner[0]}.py").exists(), f"imports {name} from the package"


def test_every_room_has_its_step_and_at_most_ten_files_that_one_can_survey():
    rooms = {path.name: path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms.keys() == STEP.keys()
    for room in (PACKAGE, *rooms.values()):
        assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 10, room
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 320]


def test_one_file_asks_for_the_backend():
    asks = re.compile(r"default_backend|\.platform\b|is_fully_replicated")
    users = {path.name for path in FILES if asks.search(path.read_text())}
    assert users <= {"_select.py", "_sharding.py"}


def test_tests_share_helpers_and_not_one_another():
    tests = pathlib.Path(__file__).parent
    names = {name for path in tests.rglob("test_*.py") for name in imported(path)}
    assert not [name for name in names if name.startswith("test_")]


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


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_are_found_by_both_ways_of_importing(name):
    module = importlib.import_module(f"rmtjax.{name}")
    assert getattr(rmtjax, name) is module or name == "cli"


@pytest.mark.parametrize("room", [None, *STEP])
def test_the_face_of_a_room_is_a_docstring_and_names(room):
    tree = ast.parse((PACKAGE / (room or "") / "__init__.py").read_text())
    document = ast.get_docstring(tree)
    # A full stop ends a sentence where white space follows: not in `flax.linen`.
    assert len(re.findall(r"[.:](?=\s|$)", document)) >= 2 or room is None
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        assert node.module.partition(".")[0] == "rmtjax"
        # `__all__` says which of them are public in the package itself.
        assert all(alias.asname for alias in node.names) or room is None
    if room is None:  # `help` tells what is listed, of whatever file
        names = {alias.name for node in imports for alias in node.names} - {"__version__"}
        assert sorted(names) == rmtjax.__all__


def is_from(value, module):
    return getattr(value, "__module__", "") == module.__name__


def public_objects():
    """Functions and classes that a user can reach by a name, each once."""
    found = {}
    for name in ("", *PUBLIC):
        module = importlib.import_module(f"rmtjax.{name}".rstrip("."))
        public = lambda key: not key.startswith("_")
        defined = [
            key for key, value in vars(module).items() if is_from(value, module) and public(key)
        ]
        for key in getattr(module, "__all__", defined):
            value = getattr(module, key)
            if inspect.isfunction(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{module.__name__}.{key}", value))
    return dict(found.values())


OBJECTS = public_objects()
FUNCTIONS = {name: value for name, value in OBJECTS.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in OBJECTS.items() if inspect.isclass(value)}


@pytest.mark.parametrize("module", ["rmtjax", *MODULES])
def test_every_module_has_a_docstring(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_every_public_function_tells_its_arguments_and_gives_an_example(function):
    document = inspect.getdoc(function)
    assert document
    room = inspect.getdoc(importlib.import_module(function.__module__.rpartition(".")[0])) or ""
    assert "Examples:" in document or "Examples:" in room
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
        other = re.search(r"its fields are those of `(\w+)`", inspect.getdoc(cls))
        explained = getattr(rmtjax, other[1]) if other else cls
        told = inspect.getdoc(explained).partition("Attributes:")[2]
        assert all(f"{name}:" in told for name in fields)
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert method.__doc__, name
