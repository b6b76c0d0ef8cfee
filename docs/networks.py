"""The page of the networks with published weights, from the registry."""

import re

from jaxattn.pretrained import table

TOP = """---
hide: [navigation, toc]
---

# Networks

`jaxattn.models` has the networks, with any size and any number of classes. Those below have published weights, which
`jaxattn.pretrained.load(name, path)` reads from the publisher's own file, strictly: a name or a shape that does not fit
is an error that shows both sides. Nothing is downloaded: the table says where each file is, and by which licence.
Accuracies are as published, on ImageNet's 50,000 validation images.

"""


def pages() -> dict[str, str]:
    """Its text; a place at Hugging Face becomes a link."""
    linked = re.sub(r"\| ([\w.-]+/[\w.-]+) \|", r"| [\1](https://huggingface.co/\1) |", table())
    return {"networks.md": TOP + linked}


def navigation() -> str:
    return "networks.md"
