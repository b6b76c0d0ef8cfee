"""The report of a study: one HTML file that needs nothing else and has no scripts, its numbers, and its verdicts."""

import html
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Protocol

from jaxattn.study.answer import QUESTION, answer
from jaxattn.study.claim import FAILED, SOURCE, Claim, Published, decide
from jaxattn.study.seeds import UNDECIDED
from jaxattn.train.run import write_json

MANY = 12  # rows of a table that is folded away
TEMPLATE = Path(__file__).with_name("report.html")


class Outcome(Protocol):
    """What a report takes from a result."""

    @property
    def verdict(self) -> str: ...
    @property
    def numbers(self) -> Mapping[str, Sequence[float]]: ...
    @property
    def summary(self) -> Mapping[str, float]: ...
    @property
    def notes(self) -> str: ...
    @property
    def svg(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def runs(self) -> Sequence[str]: ...


def write_report(
    out: Path, results: Sequence[tuple[Claim, Outcome]], settings: Mapping[str, Any], versions: Mapping[str, str]
):
    """Writes `out/report.html`, `out/report.json` and `out/verdicts.md`, each whole or not at all."""
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        source=SOURCE,
        question=QUESTION,
        answer=_answer(results),
        tally=tally([result.verdict for _, result in results]),
        verdicts="".join(_row(claim, result) for claim, result in results),
        sections="".join(section(claim, result) for claim, result in results),
        settings=_definitions({**settings, **versions}),
    )
    _write(out / "report.html", page)
    _write(out / "verdicts.md", verdicts(results))
    claims = [
        {
            "number": claim.number,
            "author": claim.author,
            "claim": claim.text,
            "threshold": claim.threshold,
            "verdict": result.verdict,
            "numbers": {name: list(map(_finite, values)) for name, values in result.numbers.items()},
            "summary": {name: _finite(value) for name, value in result.summary.items()},
            "notes": result.notes,
            "error": result.error,
            "seconds": round(result.seconds, 1),
            "runs": list(result.runs),
        }
        for claim, result in results
    ]
    write_json(out / "report.json", {"settings": dict(settings), "environment": dict(versions), "claims": claims})


def verdicts(results: Sequence[tuple[Claim, Outcome]]) -> str:
    """The table of verdicts, in Markdown, and what the judges noted."""
    lines = ["| | claim | who | verdict |", "|---|---|---|---|"]
    lines += [f"| {claim.number} | {claim.text} | {claim.author} | {often(result)} |" for claim, result in results]
    noted = [(claim, result) for claim, result in results if claim.judge is not None and result.notes]
    lines += ["", *(f"- {claim.number}: {result.notes[0].upper()}{result.notes[1:]}" for claim, result in noted)]
    return "\n".join(lines).rstrip() + "\n"


def often(result: Outcome) -> str:
    """The verdict; and of several runs, how many came out so: "holds, 9 of 10"."""
    same = sum(verdict == result.verdict for verdict in result.runs)
    return f"{result.verdict}, {same} of {len(result.runs)}" if result.runs else result.verdict


def _write(path: Path, text: str):
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def tally(verdicts: Sequence[str]) -> str:
    """How many claims came out how.

    >>> tally(["holds", "depends on the window", "holds"])
    '2 hold, 1 depends'
    """
    words = {"hold": ("holds", "hold"), "depend": ("depends", "depend"), "fail": ("fails", "fail")}
    count = Counter(kind(verdict) for verdict in verdicts)
    parts = [f"{count[name]} {words[name][count[name] > 1]}" for name in words if count[name]]
    parts += [f"{count['error']} failed to run"] if count["error"] else []
    return ", ".join(parts)


def kind(verdict: str) -> str:
    """The verdict as a class of the page's style."""
    return "error" if verdict == FAILED else verdict.split()[0].removesuffix("s")


def section(claim: Claim, result: Outcome) -> str:
    """A claim's part of the page."""
    badge = f'<p class="verdict {kind(result.verdict)}">{html.escape(result.verdict)}</p>'
    parts = [
        f'<section id="claim-{claim.number}"><p class="eyebrow">Claim {claim.number} · {html.escape(claim.author)}</p>',
        f"<h2>{html.escape(claim.text)}</h2>",
        f'<p class="chinese" lang="zh">{html.escape(claim.chinese)}</p>{badge}',
    ]
    parts += [f"<p>{html.escape(claim.about)}</p>"]
    for name, text in (("Hypothesis", claim.hypothesis), ("Threshold", claim.threshold), ("Note", result.notes)):
        parts += [f"<p><b>{name}.</b> {html.escape(text)}</p>"] if text else []
    if len(set(result.runs)) > 1:
        counted = ", ".join(f"{verdict} {count}" for verdict, count in Counter(result.runs).most_common())
        parts += [f"<p><b>By the seed.</b> Of {len(result.runs)} runs with other seeds: {html.escape(counted)}.</p>"]
    parts += [f'<p class="error">{html.escape(result.error)}</p>'] if result.error else []
    caption = "The first seed." if claim.judge is None else "All seeds."
    parts += [f"<figure>{result.svg}<figcaption>{caption}</figcaption></figure>"] if result.svg else []
    parts += [_numbers(result)] if result.numbers else []
    parts += map(_published, claim.published)
    parts += [f"<details><summary>The code that ran</summary><pre>{html.escape(source(claim))}</pre></details>"]
    return "".join([*parts, "</section>"])


def source(claim: Claim) -> str:
    """The experiment's function and the judge's, without decorators, whose text the page shows by itself."""
    functions = [claim.experiment] if claim.judge is None else [claim.experiment, claim.judge]
    texts = [re.sub(r"\A.*?(?=^def )", "", inspect.getsource(f), flags=re.DOTALL | re.MULTILINE) for f in functions]
    return "\n\n".join(texts)


def _answer(results: Sequence[tuple[Claim, Outcome]]) -> str:
    undecided = decide(True, UNDECIDED)
    said = answer({claim.number: kind(r.verdict) for claim, r in results if r.verdict != undecided})
    sentences = [f'{html.escape(text)} <a href="#claim-{n}">({n})</a>' for text, n in said]
    return (
        f"<p>{' '.join(sentences)}</p>"
        if said
        else "<p>None of the claims that would answer it came to a decision here.</p>"
    )


def _published(table: Published) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    caption = f"<caption>Published, by others, and much larger: {html.escape(table.source)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(claim: Claim, result: Outcome) -> str:
    return (
        f'<tr><td>{claim.number}</td><th scope="row"><a href="#claim-{claim.number}">{html.escape(claim.text)}</a>'
        f'<span lang="zh">{html.escape(claim.chinese)}</span></th><td>{html.escape(claim.author)}</td>'
        f'<td class="{kind(result.verdict)}">{html.escape(often(result))}</td></tr>'
    )


def _numbers(result: Outcome) -> str:
    rows = [(name, _short(value), "") for name, value in result.summary.items()]
    rows += [(name, _short(sum(v) / len(v)), _range(v)) for name, v in result.numbers.items()]
    body = "".join(f'<tr><th scope="row">{html.escape(n)}</th><td>{mean}</td><td>{r}</td></tr>' for n, mean, r in rows)
    head = '<tr><th scope="col"></th><th scope="col">mean</th><th scope="col">least to largest of the seeds</th></tr>'
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    if len(rows) <= MANY:
        return table
    return f"<details><summary>All {len(rows)} numbers</summary>{table}</details>"


def _short(value: float) -> str:
    value = float(value)
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def _finite(value: float) -> float | None:
    """JSON has no infinity, and no NaN."""
    return value if math.isfinite(value) else None


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return "the same" if low == high else f"{_short(low)} to {_short(high)}"


def _definitions(values: Mapping[str, Any]) -> str:
    rows = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(rows)}</dl>"
