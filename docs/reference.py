"""The pages of the API reference: which modules are shown, and which of their names."""

import functools
import pathlib

import griffe

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = {
    "jaxattn": "normalize position halo zoo nn models equivalence measure plots pretrained train study bench",
    "jaxattn.train": "config recipes data augment optimizer step sharding program loop checkpoint evaluate distributed "
    "compile finetune classifier predict export",
    "jaxattn.study": "claim fit mixers run",
    "jaxattn.bench": "cases measure run",
}
FIRST = ("einsum", "plan", "Plan", "attention", "Window", "attention_plan")  # of the library's own names, in this order
MODULES = ["jaxattn", *(f"{package}.{name}" for package, names in PUBLIC.items() for name in names.split())]


DOCSTRING_ALONE = "{members: false, show_root_heading: false, show_root_toc_entry: false}"


def shown(module: griffe.Module) -> dict[str, str]:
    """Each name that is shown of a module, and where it is defined: what a package takes from its own modules, or what
    a module of its own describes."""
    inside = f"{module.path}."
    if module.is_init_module:
        names = {name: path for name, path in module.imports.items() if path.startswith(inside)}
        first = {name: names.pop(name) for name in FIRST if name in names}
        return first | names
    own = [m for m in module.members.values() if not m.is_alias and m.has_docstring and m.name[0] != "_"]
    return {m.name: m.path for m in own}


def targets(module: griffe.Module) -> dict[str, str]:
    """Each name that is shown, and by what mkdocstrings finds it. `jaxattn.attention` is also a module, so that the
    function goes by its place in that."""
    hidden = {name for name, member in module.members.items() if isinstance(member, griffe.Module)}
    return {name: path if name in hidden else f"{module.path}.{name}" for name, path in shown(module).items()}


def page(module: griffe.Module) -> str:
    """The page of a module, in Markdown."""
    lines = [f"# `{module.path}` {{ #{module.path} data-toc-label='{module.path}' }}", ""]
    lines += [
        f"::: {module.path}",
        "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}",
        "",
    ]
    inside = [name for name in MODULES if name.rpartition(".")[0] == module.path]
    if inside:
        lines += [f"- [`{name}`][{name}]: {first_line(module.modules_collection[name])}" for name in inside] + [""]
    lines += [f"::: {target}\n" for target in targets(module).values()]
    return "\n".join(lines)


def first_line(module: griffe.Module) -> str:
    return " ".join(module.docstring.value.partition("\n\n")[0].split())


@functools.cache
def modules() -> dict[str, griffe.Module]:
    """The modules that are shown, by name."""
    library = griffe.load("jaxattn", search_paths=[ROOT])
    return {name: library.modules_collection[name] for name in MODULES}


def pages() -> dict[str, str]:
    """Every page by its place in the site."""
    return {f"api/{name}.md": page(module) for name, module in modules().items()}


def navigation() -> list:
    """The pages, a package with what is in it."""
    near = [name for name in MODULES if name.count(".") < 2]
    inside = {name: [f"api/{other}.md" for other in MODULES if other.startswith(f"{name}.")] for name in near[1:]}
    parts = [{name: [f"api/{name}.md", *inside[name]]} if inside[name] else f"api/{name}.md" for name in near[1:]]
    return ["api/jaxattn.md", *parts]


@functools.cache
def names(of: str) -> dict[str, str]:
    """What a name in code is linked to on the page of a module: `jaxattn.attention` and `zoo.conv` everywhere,
    `Conv` on that of `jaxattn.nn`, and the library's own names, `Window`, where a module has no other."""
    found = {name: name for name in MODULES}
    for module, tree in modules().items():
        for name, target in targets(tree).items():
            found |= {f"{module}.{name}": target, f"{module}.{name}".removeprefix("jaxattn."): target}
    return found | targets(modules()["jaxattn"]) | targets(modules().get(of, modules()["jaxattn"]))
