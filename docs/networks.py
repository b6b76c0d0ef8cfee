"""The page of the networks with published weights, from the registry."""

from jaxattn.pretrained.registry import PUBLISHED

TOP = """# Networks

`jaxattn.models` has the networks, with any size and any number of classes. Those below have published weights, which
`jaxattn.pretrained.load(name, path)` reads from the publisher's own file, strictly: a name or a shape that does not fit
is an error that shows both sides. Nothing is downloaded: the table says where each file is, and by which licence.

| name | pixels | crop | classes | weights | licence |
|---|---|---|---|---|---|
"""


def pages() -> dict[str, str]:
    rows = [
        f"| `{name}` | {p.preprocess.size}² | {p.preprocess.crop} | {p.num_classes or 'features'} "
        f"| [{p.source}](https://huggingface.co/{p.source}) | {p.licence} |"
        for name, p in PUBLISHED.items()
    ]
    return {"networks.md": TOP + "\n".join(rows) + "\n"}


def navigation() -> str:
    return "networks.md"
