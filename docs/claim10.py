"""The README's figure of claim 10, docs/claim10.png, and its table, from what its full profile gave, docs/claim10.json.

`python docs/claim10.py` draws and prints; with `runs/study/report.json` it takes the numbers of that report first.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxattn.study.claims import composed
from jaxattn.study.claims.curves import CURVES
from jaxattn.study.figures import curves
from jaxattn.study.seeds import points

NUMBERS = Path(__file__).with_suffix(".json")
STEPS = "2500 steps"
COLUMNS = (("500 steps", 1_000_000), (STEPS, 1_000_000), (STEPS, 10_000))


def numbers() -> dict[str, list[float]]:
    """Each accuracy once a seed."""
    return json.loads(NUMBERS.read_text(encoding="utf-8"))["numbers"]


def taken(report: dict[str, Any]) -> str:
    """Of a report of the study what is kept here: a line for each accuracy."""
    (claim,) = (claim for claim in report["claims"] if claim["number"] == 10)
    settings = report["settings"] | {"data": report["settings"]["data"].partition(":")[0]}
    rows = [json.dumps({name: [round(value, 6) for value in values]}) for name, values in claim["numbers"].items()]
    numbers = ",\n".join(row[1:-1] for row in rows)
    known = json.dumps({"made_with": report["environment"], "settings": settings})
    return f'{known[:-1]},\n"numbers": {{\n{numbers}\n}}}}\n'


def draw() -> Figure:
    """A panel for each task, after the most steps."""
    swept = composed.swept(numbers())
    panels = {what.split(" after ")[0]: mixers for what, mixers in swept.items() if what.endswith(STEPS)}
    return curves(panels, "composed images", CURVES)


def table() -> str:
    """A row for each task: what convolution leads global attention by."""
    turns = {what: composed.turn(mixers) for what, mixers in composed.swept(numbers()).items()}
    head = [f"after {int(steps.split()[0]):,} steps, {count:,} images" for steps, count in COLUMNS]
    rows = [["task", *head], ["---"] * (1 + len(COLUMNS))]
    for task in composed.TASKS:
        leads = [turns[f"{task} after {steps}"].leads.get(count) for steps, count in COLUMNS]
        rows.append([task, *("" if lead is None else points(lead) for lead in leads)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        NUMBERS.write_text(taken(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
    print(table())
    draw().savefig(NUMBERS.with_suffix(".png"), dpi=130, facecolor="white")
