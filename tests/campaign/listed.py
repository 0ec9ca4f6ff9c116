"""Which public verbs the campaign tries: those that its files name. Others have a reason here."""

import ast
import inspect
import types
from pathlib import Path

import rmtjax

# They take no tree, kernel, spectrum or report.
NUMBERS = "takes numbers alone: tests/laws and tests/noise compare it with quadrature and SciPy"
FIGURE = "takes records or numbers of the user, and no kernel: tests/plots"
NOT_TRIED = {
    "rmtjax.marchenko_pastur.cdf": NUMBERS,
    "rmtjax.marchenko_pastur.noise_quantiles": NUMBERS,
    "rmtjax.marchenko_pastur.pdf": NUMBERS,
    "rmtjax.marchenko_pastur.ppf": NUMBERS,
    "rmtjax.marchenko_pastur.support": NUMBERS,
    "rmtjax.tracy_widom.cdf": NUMBERS,
    "rmtjax.tracy_widom.ppf": NUMBERS,
    "rmtjax.plots.accuracy": FIGURE,
    "rmtjax.plots.certificate": FIGURE,
    "rmtjax.plots.history": FIGURE,
    "rmtjax.plots.training": FIGURE,
    "rmtjax.ranks.RankRule": "a protocol, of which the rules are tried",
    "rmtjax.register_layer": "takes a class of layers: tests/models",
    "rmtjax.sparsity.cell_gates": "takes the path of a kernel: tests/sparse",
}
# Classes whose methods are verbs as well.
CLASSES = (rmtjax.Report, rmtjax.Plan, rmtjax.TradeOff, rmtjax.moments.Moments)


def public_verbs(module=rmtjax):
    """The names of public functions, and of rank rules, each once."""
    found = {}
    for name in module.__all__:
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if isinstance(value, types.ModuleType):
            found |= public_verbs(value)
        elif not inspect.isclass(value) or module is rmtjax.ranks:
            found[f"rmtjax.{path.split('.', 1)[1]}"] = value
    # Modules such as `ranks` are in their rooms.
    short = lambda path: (
        ".".join(("rmtjax", *path.split(".")[-2:])) if path.count(".") > 2 else path
    )
    return {short(path): value for path, value in found.items()}


def public_methods():
    """The names of public methods, but not of those of dictionaries and tuples."""
    own = lambda kind: [name for name, value in vars(kind).items() if inspect.isfunction(value)]
    return {f"{kind.__name__}.{n}" for kind in CLASSES for n in own(kind) if not n.startswith("_")}


class Names(ast.NodeVisitor):
    """The public names that a file uses, as `rmtjax.ranks.bema`, and its attributes and texts."""

    def __init__(self, tree):
        self.modules, self.paths, self.words = {"rmtjax": "rmtjax"}, set(), set()
        self.visit(tree)

    def visit_ImportFrom(self, node):
        if node.module and node.module.partition(".")[0] == "rmtjax":
            for alias in node.names:
                self.modules[alias.name] = f"{node.module}.{alias.name}"

    def visit_Attribute(self, node):
        self.words.add(node.attr)
        chain, root = [node.attr], node.value
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.modules:
            self.paths.add(".".join((self.modules[root.id], *reversed(chain))))
        self.generic_visit(node)

    def visit_Constant(self, node):
        self.words.add(node.value)


def tried():
    """The public names, and all words, in the files of the campaign but this one."""
    here = Path(__file__)
    files = [path for path in here.parent.rglob("*.py") if path.name not in (here.name,)]
    found = [Names(ast.parse(path.read_text())) for path in files]
    union = lambda sets: set().union(*sets)
    return union(names.paths for names in found), union(names.words for names in found)
