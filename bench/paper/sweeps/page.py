"""An HTML page of tables that sort by a click on a column's head, and of curves; nothing is loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from bench.paper.sweeps.tables import Entry, Table

COLOURS = (
    "#1b6ca8", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#3a3a3a", "#e63990", "#00a5b5", "#7f5539", "#8b95a0",
    "#7cb518", "#ff8c42", "#4a3aff", "#6b0f2a", "#c39bf0", "#0a5c4a",
)  # fmt: skip
DASHES = ("none", "6 3", "2 2")  # of the next methods, once the colours are used up
Style = tuple[str, str]  # a colour and a dash
WIDE, HIGH, LEFT, LOW = 360, 220, 40, 30

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #1b6ca8; } th[aria-sort] button::after { content: " \\2193"; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
.key { display: inline-block; margin-right: 1rem; font-size: .85rem; } .key svg { margin-right: .3em; }
"""
# values of a column -> the places of its rows in their new order; what is missing comes last either way
ORDER = """
const order = (values, down, text) => {
  const numeric = !text && values.every(value => value === "" || !isNaN(Number(value)));
  return values.map((_, place) => place).sort((i, j) => { const a = values[i], b = values[j];
    if (a === "" || b === "") return (a === "") - (b === "");
    const by = numeric ? Number(a) - Number(b) : a < b ? -1 : a > b ? 1 : 0;
    return down ? -by : by; });
};
"""
SCRIPT = f"""{ORDER}
for (const head of document.querySelectorAll("th button")) head.addEventListener("click", () => {{
  const cell = head.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const place = [...cell.parentNode.children].indexOf(cell), down = cell.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  cell.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows], values = rows.map(row => row.cells[place].dataset.value);
  body.append(...order(values, down, place === 0).map(at => rows[at]));
}});
"""


class Panel(NamedTuple):
    """Curves of one task: points by label, along `unit`; what the axis says is `scale` times the number."""

    caption: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    scale: float = 1.0


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page of parts that are HTML."""
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>prefixattn: {title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def table(shown: Table) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in shown.head)
    body = "\n".join("<tr>" + "".join(_entry(entry) for entry in row) + "</tr>" for row in shown.rows)
    below = "".join(f"\n{paragraph(note)}" for note in shown.notes)
    return section(
        shown.caption,
        f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{below}',
    )


def _entry(entry: Entry) -> str:
    value = "" if entry.value is None else escape(str(entry.value))
    return f'<td data-value="{value}">{escape(entry.text)}</td>'


def curves(names: Mapping[str, str], panels: Sequence[Panel]) -> str:
    """A chart for each panel that has lines; each label, whose name stands in the key, has one look in all of them."""
    style = dict(zip(names, styles(len(names)), strict=True))
    charts = [_chart(panel, names, style) for panel in panels if panel.lines]
    if not charts:
        return paragraph("Nothing is measured yet.")
    keys = "".join(f'<span class="key">{_line(style[label])}{escape(name)}</span>' for label, name in names.items())
    return f'<p>{keys}</p>\n<div class="curves">{"".join(charts)}</div>'


def styles(count: int) -> list[Style]:
    """A colour and a dash for each of `count` methods, each pair once up to 48."""
    return [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(count)]


def _line(style: Style) -> str:
    colour, dash = style
    drawn = f'<path d="M0,4H24" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/>'
    return f'<svg viewBox="0 0 24 8" width="24" height="8" aria-hidden="true">{drawn}</svg>'


def _chart(panel: Panel, names: Mapping[str, str], style: Mapping[str, Style]) -> str:
    last = max(x for points in panel.lines.values() for x, _ in points)
    most = max(y for points in panel.lines.values() for _, y in points) or 1.0

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDE - LEFT - 8) * x / last
        return f"{right:.1f},{(HIGH - LOW) - (HIGH - LOW - 8) * y / most:.1f}"

    drawn = []
    for label, points in panel.lines.items():
        (colour, dash), tip = style[label], f"<title>{escape(names[label])}</title>"
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">{tip}</circle>')
        else:
            path = " ".join(place(*point) for point in points)
            look = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
            drawn.append(f'<polyline points="{path}" {look}>{tip}</polyline>')
    axes = (
        f'<path d="M{LEFT},8V{HIGH - LOW}H{WIDE - 8}" fill="none" stroke="#888"/>'
        f'<text x="{LEFT - 5}" y="14" text-anchor="end">{panel.scale * most:.3g}</text>'
        f'<text x="{LEFT - 5}" y="{HIGH - LOW}" text-anchor="end">0</text>'
        f'<text x="{WIDE - 8}" y="{HIGH - 12}" text-anchor="end">{escape(panel.unit)} {last}</text>'
    )
    picture = f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" font-size="11" role="img">'
    return f"<figure>{picture}{axes}{''.join(drawn)}</svg><figcaption>{escape(panel.caption)}</figcaption></figure>"
