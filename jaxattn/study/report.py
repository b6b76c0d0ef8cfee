"""The report of a study: one HTML file that needs nothing else and has no scripts, and report.json, its numbers."""

import html
import inspect
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Protocol

from jaxattn.study.claim import FAILED, NOT_YET, SOURCE, Claim
from jaxattn.train.report import environment
from jaxattn.train.run import write_json

TEMPLATE = Path(__file__).with_name("report.html")


class Outcome(Protocol):
    """What a report takes from a result."""

    @property
    def verdict(self) -> str: ...
    @property
    def numbers(self) -> Mapping[str, Sequence[float]]: ...
    @property
    def notes(self) -> str: ...
    @property
    def svg(self) -> str: ...
    @property
    def error(self) -> str: ...


def write_report(out: Path, results: Sequence[tuple[Claim, Outcome]], settings: Mapping[str, Any]):
    """Writes `out/report.html` and `out/report.json`, each whole or not at all."""
    versions = environment()
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        source=SOURCE,
        tally=tally([result.verdict for _, result in results]),
        verdicts="".join(_row(claim, result) for claim, result in results),
        sections="".join(section(claim, result) for claim, result in results),
        settings=_definitions({**settings, **versions}),
    )
    partial = out / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out / "report.html")
    claims = [
        {
            "number": claim.number,
            "author": claim.author,
            "claim": claim.text,
            "threshold": claim.threshold,
            "verdict": result.verdict,
            "numbers": result.numbers,
            "error": result.error,
        }
        for claim, result in results
    ]
    write_json(out / "report.json", {"settings": dict(settings), "environment": versions, "claims": claims})


def tally(verdicts: Sequence[str]) -> str:
    """How many claims came out how.

    >>> tally(["holds", "depends on the window", "holds"])
    '2 hold, 1 depends'
    """
    words = {"hold": ("holds", "hold"), "depend": ("depends", "depend"), "fail": ("fails", "fail")}
    count = Counter(kind(verdict) for verdict in verdicts)
    parts = [f"{count[name]} {words[name][count[name] > 1]}" for name in words if count[name]]
    parts += [f"{count['error']} failed to run"] if count["error"] else []
    parts += [f"{count['waiting']} not yet run"] if count["waiting"] else []
    return ", ".join(parts)


def kind(verdict: str) -> str:
    """The verdict as a class of the page's style."""
    if verdict in (FAILED, NOT_YET):
        return "error" if verdict == FAILED else "waiting"
    return verdict.split()[0].removesuffix("s")


def section(claim: Claim, result: Outcome) -> str:
    """A claim's part of the page."""
    badge = f'<p class="verdict {kind(result.verdict)}">{html.escape(result.verdict)}</p>'
    parts = [
        f'<section id="claim-{claim.number}"><p class="eyebrow">Claim {claim.number} · {html.escape(claim.author)}</p>',
        f"<h2>{html.escape(claim.text)}</h2>",
        f'<p class="chinese" lang="zh">{html.escape(claim.chinese)}</p>{badge}',
    ]
    if result.verdict == NOT_YET:
        return "".join([*parts, "<p>The experiment of this claim is not written yet.</p></section>"])
    parts += [f"<p>{html.escape(claim.about)}</p>"]
    for name, text in (("Hypothesis", claim.hypothesis), ("Threshold", claim.threshold), ("Note", result.notes)):
        parts += [f"<p><b>{name}.</b> {html.escape(text)}</p>"] if text else []
    parts += [f'<p class="error">{html.escape(result.error)}</p>'] if result.error else []
    parts += [f"<figure>{result.svg}<figcaption>The first seed.</figcaption></figure>"] if result.svg else []
    parts += [_numbers(result.numbers)] if result.numbers else []
    parts += [f"<details><summary>The code that ran</summary><pre>{html.escape(source(claim))}</pre></details>"]
    return "".join([*parts, "</section>"])


def source(claim: Claim) -> str:
    """The experiment's function, without the decorator, whose text the page shows by itself."""
    assert claim.experiment is not None
    return re.sub(r"\A.*?(?=^def )", "", inspect.getsource(claim.experiment), flags=re.DOTALL | re.MULTILINE)


def _row(claim: Claim, result: Outcome) -> str:
    return (
        f'<tr><td>{claim.number}</td><th scope="row"><a href="#claim-{claim.number}">{html.escape(claim.text)}</a>'
        f'<span lang="zh">{html.escape(claim.chinese)}</span></th><td>{html.escape(claim.author)}</td>'
        f'<td class="{kind(result.verdict)}">{html.escape(result.verdict)}</td></tr>'
    )


def _numbers(numbers: Mapping[str, Sequence[float]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{_short(sum(values) / len(values))}</td>'
        f"<td>{_range(values)}</td></tr>"
        for name, values in numbers.items()
    )
    head = '<tr><th scope="col"></th><th scope="col">mean</th><th scope="col">least to largest of the seeds</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return "the same" if low == high else f"{low} to {high}"


def _definitions(values: Mapping[str, Any]) -> str:
    rows = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(rows)}</dl>"
