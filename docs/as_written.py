"""Docstrings and signatures for the API reference, as griffe reads them and as they are written.

Griffe reads a string in an annotation as a type that is not yet defined; ours are jaxtyping's shapes, and stay strings.
An example in the middle of a docstring is fenced, so that it is shown as code. A NamedTuple is called with its fields.
"""

import ast
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
NAMES_GO_ON = re.compile(r"^( +(?:\w+, )*\w+,)\n +(?=\w+[,:])", re.MULTILINE)  # arguments that are described together


def written(node: ast.expr | None, parent: Any) -> griffe.Expr | str | None:
    return griffe.safe_get_expression(node, parent=parent, parse_strings=False)


def readable(docstring: str) -> str:
    docstring, broken = EXAMPLE.sub(r"```pycon\n\g<0>\n```", docstring), 1
    while broken:
        docstring, broken = NAMES_GO_ON.subn(r"\1 ", docstring)
    return docstring


class AsWritten(griffe.Extension):
    """What mkdocs.yml names as an extension of griffe."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)

    def on_function_instance(self, *, node: Any, func: griffe.Function, **kwargs: Any) -> None:
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        for argument in every:
            func.parameters[argument.arg].annotation = written(argument.annotation, func.parent)
        func.returns = written(node.returns, func.parent)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        if isinstance(node, ast.AnnAssign):
            attr.annotation = written(node.annotation, attr.parent)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if "NamedTuple" in map(str, cls.bases) and "__init__" not in cls.members:
            kind = griffe.ParameterKind.positional_or_keyword
            fields = [m for m in cls.members.values() if m.is_attribute and "instance-attribute" in m.labels]
            parameters = [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
            this = griffe.Parameter("self", kind=kind)
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(this, *parameters)))
