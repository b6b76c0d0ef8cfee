"""The API reference, from the docstrings, and the recipes: `python docs/build.py` writes build/docs, a warning is an
error.

pdoc does the work. What is done here: the modules that are shown, in their order; packages show the names that they
export; and signatures are shown as they are written, `Float[Array, "*batch grid"]` and not what that evaluates to.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import sys
import textwrap
import types
import warnings
from collections.abc import Iterable

import pdoc
import pdoc.render

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent / "build" / "docs"
PUBLIC = {
    "jaxattn": "einsum attention attention_plan window normalize position halo zoo nn models equivalence measure plots "
    "pretrained train study bench",
    "jaxattn.train": "config recipes data augment optimizer step sharding program loop checkpoint evaluate distributed "
    "compile finetune classifier predict export",
    "jaxattn.study": "claim fit mixers run",
    "jaxattn.bench": "cases measure run",
}
MODULES = ["jaxattn", *(f"{package}.{name}" for package, names in PUBLIC.items() for name in names.split())]


class Source:
    """A piece of source, which prints as it stands."""

    def __init__(self, module: str, node: ast.expr):
        self.text = " ".join((ast.get_source_segment(module, node) or "").split())

    def __repr__(self) -> str:
        return self.text


def exports(module: types.ModuleType) -> list[str]:
    """The names that a package takes from its modules, or that the library takes from a module."""
    package = module if hasattr(module, "__path__") else sys.modules["jaxattn"]
    home = {name: getattr(thing, "__module__", None) or "" for name, thing in vars(package).items()}
    return [name for name, place in home.items() if f"{place}.".startswith(f"{module.__name__}.") and name[0] != "_"]


def write_signatures(module: types.ModuleType):
    """Replace what the annotations and defaults of a module evaluated to by what is written in its file."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_source_segment(source, node) or ""  # alone: what is in a short text is soon found
            write = write_signature if isinstance(node, ast.FunctionDef) else write_class
            write(getattr(module, node.name), ast.parse(text).body[0], text)


def write_class(cls: type, node: ast.ClassDef, text: str):
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            write_signature(bare(vars(cls)[part.name]), part, text)
    cls.__annotations__ = {**vars(cls).get("__annotations__", {}), **fields(cls)}
    for name in ("__init__", "__new__"):
        constructor = bare(vars(cls).get(name))
        if inspect.isfunction(constructor) and not hasattr(constructor, "__signature__"):  # a dataclass, a NamedTuple
            signature = inspect.signature(constructor)
            known = signature.parameters.items()
            parameters = [p.replace(annotation=fields(cls).get(name, p.annotation)) for name, p in known]
            constructor.__signature__ = signature.replace(parameters=parameters)


def bare(method: object) -> object:
    """The function in a property, a class method or a static one."""
    return getattr(method, "fget", getattr(method, "__func__", method))


@functools.cache
def fields(cls: type) -> dict[str, Source]:
    """The annotations in the body of a class and of those of ours that it inherits from."""
    found = {}
    for part in reversed(cls.__mro__):
        if part.__module__.startswith("jaxattn"):
            text = textwrap.dedent(inspect.getsource(part))
            for node in ast.parse(text).body[0].body:
                if isinstance(node, ast.AnnAssign):
                    found[node.target.id] = Source(text, node.annotation)
    return found


def write_signature(function: object, node: ast.FunctionDef, text: str):
    if not inspect.isfunction(function):  # a decorator made something else of it
        return
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    arguments = [*plain, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    annotations = {argument.arg: argument.annotation for argument in arguments}
    with_default = [*plain[len(plain) - len(given.defaults) :], *given.kwonlyargs]
    defaults = {a.arg: value for a, value in zip(with_default, [*given.defaults, *given.kw_defaults], strict=True)}

    def source(node: ast.expr | None):
        return inspect.Parameter.empty if node is None else Source(text, node)

    parameters = [
        inspect.Parameter(p.name, p.kind, default=source(defaults.get(p.name)), annotation=source(annotations[p.name]))
        for p in inspect.signature(function).parameters.values()
    ]
    returns = source(node.returns)
    for layer in (function, inspect.unwrap(function)):  # pdoc looks under what a decorator put around
        layer.__signature__ = inspect.Signature(parameters, return_annotation=returns)
        layer.__annotations__ = {} if node.returns is None else {"return": returns}


def only(modules: Iterable[str]) -> list[str]:
    """pdoc's specification of these modules without those inside them."""
    return [spec for module in modules for spec in (module, f"!{module}[.]")]


def main():
    sys.path.insert(0, str(HERE.parent))  # this checkout, wherever else there is one
    for name in MODULES:
        module = importlib.import_module(name)
        if name != "jaxattn" and (names := exports(module)):
            module.__all__ = names
    for name, module in list(sys.modules.items()):
        if name.startswith("jaxattn"):
            write_signatures(module)
    pdoc.render.configure(docformat="google", include_undocumented=False, template_directory=HERE)
    warnings.simplefilter("error")
    pdoc.pdoc(*only(MODULES), HERE / "recipes.py", output_directory=OUT)
    print(OUT / "index.html")


if __name__ == "__main__":
    main()
