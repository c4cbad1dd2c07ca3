"""A report on prepared data: one page that needs no network and runs no script, and the same as JSON.

`write_report` takes a `Report`, a plain dictionary. Each part may be left out, and is then left out of the page.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from .._core.files import replace_text
from .clean.balance import UNKNOWN, evenness


class Example(TypedDict, total=False):
    """A document that a step met."""

    source: str
    row: int
    reason: str  # why it was dropped; left out where it was kept
    before: str
    after: str  # left out where it was dropped


class StepReport(TypedDict, total=False):
    """What a step did. `documents` went in; `dropped` of them, by reason, did not come out."""

    name: str
    options: dict[str, Any]
    documents: int
    changed: int  # of those kept, how many came out with another text
    dropped: dict[str, int]
    bytes_in: int
    bytes_out: int
    examples: list[Example]


class Duplicates(TypedDict, total=False):
    """Duplicates of one kind: "exact", "near", "lines", "contaminated"."""

    kind: str
    documents: int  # dropped
    bytes: int
    groups: int
    examples: list[Example]  # before: the one dropped; after: the one kept


class SplitReport(TypedDict, total=False):
    """One split's tokens: as in the manifest."""

    documents: int
    tokens: int
    bytes: int
    chars: int


class Problem(TypedDict, total=False):
    """A file or row that was skipped."""

    source: str
    row: int
    message: str


class Report(TypedDict, total=False):
    """All that the page shows.

    Attributes:
        title: the folder's name, say.
        inputs: {"files", "documents", "bytes"} read.
        totals: of the documents "read", those that steps "dropped", dropped as "duplicates" and "left".
        problems: rows that were skipped, the first of them; `problem_count` has them all.
        steps: in the order in which they ran.
        masked: personal data masked, by kind: sums of meta["masked"].
        duplicates: by kind, in the order in which they were looked for.
        splits: by name.
        read: `Balance.to_dict()` of the documents as read.
        cleaned: the same of those that all steps let through, before duplicates are dropped. Its
            "by" are the tables of sources, languages and labels.
        notes: lines on how it was made, such as the tokenizer.
    """

    title: str
    inputs: dict[str, int]
    totals: dict[str, int]
    problems: list[Problem]
    problem_count: int
    steps: list[StepReport]
    masked: dict[str, int]
    duplicates: list[Duplicates]
    splits: dict[str, SplitReport]
    read: dict[str, Any]
    cleaned: dict[str, Any]
    notes: list[str]


SHOWN_CHARACTERS = 600  # of an example
SHOWN_ROWS = 30  # of a table of sources, languages or labels


def write_report(report: Report, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.html and report.json, each whole or not at all; returns their paths. Equal reports, equal bytes.

    Raises:
        OSError: a file cannot be written.
        ValueError: a number is not finite, which JSON does not know.
    """
    page, data = Path(folder) / "report.html", Path(folder) / "report.json"
    replace_text(data, _encodable(json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)) + "\n")
    replace_text(page, render(report))
    return page, data


def render(report: Report) -> str:
    """The page as HTML."""
    title = report.get("title") or "Prepared data"
    parts = [part for part in (
        _tiles(report), _steps(report), _lengths(report), _splits(report), _duplicates(report),
        _masked(report), _balance(report), _problems(report), _notes(report),
    ) if part]  # fmt: skip
    body = "\n".join(parts) or "<p>Nothing was counted.</p>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing is loaded and nothing runs, whatever a document holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{_text(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


_TOTALS = {
    "dropped": "dropped by steps", "duplicates": "dropped as duplicates", "emptied": "of repeated lines alone",
    "left": "documents left",
}  # fmt: skip


def _tiles(report: Report) -> str:
    inputs, tiles = report.get("inputs") or {}, []
    for key, label in (("files", "files"), ("documents", "documents read"), ("bytes", "text read")):
        if key in inputs:
            tiles.append((_bytes(inputs[key]) if key == "bytes" else _number(inputs[key]), label))
    splits = report.get("splits") or {}
    totals = report.get("totals") or {}
    for key, label in _TOTALS.items():
        if totals.get(key) or (key in totals and key != "emptied"):
            tiles.append((_number(totals[key]), label))
    if totals.get("read"):
        tiles.append((_percent(totals.get("left", 0) / totals["read"]), "of documents left"))
    if splits:
        tokens = sum(split.get("tokens", 0) for split in splits.values())
        size = sum(split.get("bytes", 0) for split in splits.values())
        tiles.append((_number(tokens), "tokens"))
        if tokens:
            tiles.append((f"{size / tokens:.2f}", "bytes a token"))
    cells = "".join(f"<div><b>{value}</b><span>{_text(label)}</span></div>" for value, label in tiles)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _steps(report: Report) -> str:
    steps = report.get("steps")
    if not steps:
        return ""
    rows = []
    for number, step in enumerate(steps, 1):
        documents, dropped = step.get("documents", 0), sum((step.get("dropped") or {}).values())
        before, after = step.get("bytes_in"), step.get("bytes_out")
        removed = "" if before is None or after is None else _bytes(before - after)
        share = dropped / documents if documents else 0.0
        rows.append([
            f'<a href="#step-{number}">{number}. {_text(step["name"])}</a>', _number(documents),
            _number(documents - dropped), _number(dropped), _bar(share), _number(step.get("changed", 0)), removed,
        ])  # fmt: skip
    header = ["step", "documents", "passed", "dropped", "share dropped", "changed", "bytes removed"]
    details = "\n".join(_step_details(number, step) for number, step in enumerate(steps, 1))
    return _section("Steps", _table(header, rows, left=(0, 4)) + details)


def _step_details(number: int, step: StepReport) -> str:
    options = ", ".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in (step.get("options") or {}).items()
    )
    inner = f'<p class="quiet">{_text(options)}</p>' if options else ""
    dropped = step.get("dropped") or {}
    if dropped:
        most = max(dropped.values())
        ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        rows = [[_text(reason), _number(count), _bar(count / most if most else 0, "")] for reason, count in ordered]
        inner += _table(["reason", "dropped", ""], rows, left=(0, 2))
    inner += _examples(step.get("examples") or [])
    inner = inner or '<p class="quiet">No example was kept.</p>'
    is_open = " open" if dropped else ""
    return f'<details id="step-{number}"{is_open}><summary>{number}. {_text(step["name"])}</summary>{inner}</details>'


def _examples(examples: Sequence[Example]) -> str:
    return "".join(map(_example, examples))


def _example(example: Example) -> str:
    where = _text(example.get("source", ""))
    if "row" in example:
        where += f", document {_number(example['row'])}"
    changed = "reason" not in example
    verdict = "changed" if changed else f"dropped: {_text(example['reason'])}"
    texts = {"before": example.get("before", ""), "after": example.get("after", example.get("before", ""))}
    if texts["before"] == texts["after"]:
        blocks = f"<div><pre>{_text(_cut(texts['before']))}</pre></div>"
    else:
        blocks = "".join(f"<div><span>{k}</span><pre>{_text(_cut(text))}</pre></div>" for k, text in texts.items())
    kind = "changed" if changed else "dropped"
    caption = f'<figcaption><b class="{kind}">{verdict}</b> {where}</figcaption>'
    return f'<figure>{caption}<div class="pair">{blocks}</div></figure>'


def _lengths(report: Report) -> str:
    series: dict[str, dict[int, int]] = {}
    for name in ("read", "cleaned"):
        counts = (report.get(name) or {}).get("lengths", {})  # type: ignore[attr-defined]
        if any(counts.values()):
            series[name] = {int(bits): count for bits, count in counts.items()}
    if not series:
        return ""
    every = [bits for counts in series.values() for bits in counts]
    bars = _histogram(series, range(min(every), max(every) + 1)) + _legend(list(series))
    return _section("Length of documents", bars + (_CLEANED if "cleaned" in series else ""))


_CLEANED = '<p class="quiet">cleaned: what all steps let through, before duplicates are dropped</p>'


def _histogram(series: Mapping[str, Mapping[int, int]], bins: range) -> str:
    """Bars for powers of two, placed in percents, so that it is as wide as the page and letters keep their size."""
    most = max(max(counts.values()) for counts in series.values())
    height, floor, width = 170, 150, 100 / len(bins)
    every = -(-len(bins) // 10)
    shapes = [
        f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="0" y="{y - 3:.1f}" class="tick">{_number(round(most * share))}</text>'
        for share, y in ((share, floor - share * (floor - 16)) for share in (0.5, 1.0))
    ]
    bar = width * 0.8 / len(series)
    for index, (name, counts) in enumerate(series.items()):
        for place, bits in enumerate(bins):
            if count := counts.get(bits, 0):
                tall = max(1.0, count / most * (floor - 16))
                x = place * width + width * 0.1 + index * bar
                shapes.append(
                    f'<rect x="{x:.3f}%" y="{floor - tall:.1f}" width="{bar:.3f}%" height="{tall:.1f}" class="{name}">'
                    f"<title>{_span(bits)} characters: {_number(count)} documents {name}</title></rect>"
                )
    for place, bits in enumerate(bins):
        if place % every == 0:
            x = place * width + width / 2
            shapes.append(f'<text x="{x:.3f}%" y="{height - 4}" class="tick middle">{_short(bits)}</text>')
    label = "Histogram of the lengths of documents in characters, by powers of two"
    return (
        f'<svg role="img" aria-label="{label}" width="100%" height="{height}">{"".join(shapes)}'
        f'<line x1="0" x2="100%" y1="{floor}" y2="{floor}" class="axis"/></svg>'
        '<p class="quiet">documents, by characters from the number below a bar to twice as many</p>'
    )


def _span(bits: int) -> str:
    return f"{_number(2 ** (bits - 1))} to {_number(2**bits - 1)}" if bits else "0"


def _splits(report: Report) -> str:
    rows = []
    for name, split in (report.get("splits") or {}).items():
        tokens, size = split.get("tokens", 0), split.get("bytes", 0)
        rows.append([
            _text(name), _number(split.get("documents", 0)), _number(tokens), _bytes(size),
            f"{size / tokens:.3f}" if tokens else "", f"{split.get('chars', 0) / tokens:.3f}" if tokens else "",
        ])  # fmt: skip
    header = ["split", "documents", "tokens", "text", "bytes a token", "characters a token"]
    return _section("Tokens", _table(header, rows)) if rows else ""


def _duplicates(report: Report) -> str:
    kinds = report.get("duplicates")
    if not kinds:
        return ""
    texts, groups = any("bytes" in kind for kind in kinds), any("groups" in kind for kind in kinds)
    rows = [
        [
            _text(kind["kind"]),
            _number(kind.get("documents", 0)),
            *([_bytes(kind["bytes"]) if "bytes" in kind else ""] if texts else []),
            *([_number(kind["groups"]) if "groups" in kind else ""] if groups else []),
        ]
        for kind in kinds
    ]
    shown = [(kind["kind"], kind["examples"]) for kind in kinds if kind.get("examples")]
    details = "".join(f"<details><summary>{_text(name)}</summary>{_examples(found)}</details>" for name, found in shown)
    header = ["kind", "dropped", *(["text dropped"] if texts else []), *(["groups"] if groups else [])]
    return _section("Duplicates", _table(header, rows) + details)


def _masked(report: Report) -> str:
    rows = [[_text(kind), _number(count)] for kind, count in sorted((report.get("masked") or {}).items())]
    return _section("Personal data masked", _table(["kind", "masked"], rows)) if rows else ""


def _balance(report: Report) -> str:
    tables = (report.get("cleaned") or report.get("read") or {}).get("by", {})
    read = (report.get("read") or {}).get("by", {}) if report.get("cleaned") else {}
    found = "".join(_balance_table(key, table, read.get(key, {})) for key, table in tables.items() if table)
    return found + (_CLEANED if found and report.get("cleaned") else "")


def _balance_table(key: str, table: Mapping[str, Mapping[str, int]], read: Mapping[str, Mapping[str, int]]) -> str:
    """Shares of documents and of bytes by the values of one key, the largest first."""
    if set(table) | set(read) == {UNKNOWN}:
        return ""
    read = {} if set(read) == {UNKNOWN} else read  # what a step finds, nothing says of what was read
    values = {value: table.get(value, {}) for value in {*table, *read}}
    documents, size = (sum(row.get(name, 0) for row in values.values()) for name in ("documents", "bytes"))
    ordered = sorted(values, key=lambda value: (-values[value].get("bytes", 0), value))
    rows = []
    for value in ordered[:SHOWN_ROWS]:
        row = values[value]
        count, part = row.get("documents", 0), row.get("bytes", 0)
        cells = [_text(value), _number(count), _percent(count / documents if documents else 0), _bytes(part)]
        cells.append(_bar(part / size if size else 0))
        if read:
            before = read.get(value, {}).get("documents", 0)
            cells.append(_percent(count / before) if before else "")
        rows.append(cells)
    header = [key, "documents", "of documents", "text", "of bytes", *(["of those read"] if read else [])]
    shown = f", the largest {SHOWN_ROWS} of them shown" if len(ordered) > SHOWN_ROWS else ""
    even = evenness(row.get("documents", 0) for row in values.values())
    note = f"{_number(len(ordered))} in all{shown}; evenness {even:.2f} (1: all alike, 0: one has all)"
    return _section(f"By {key}", _table(header, rows, left=(0, 4)) + f'<p class="quiet">{note}</p>')


def _problems(report: Report) -> str:
    problems = report.get("problems") or []
    count = report.get("problem_count", len(problems))
    if not count:
        return ""
    rows = [[_text(p.get("source", "")), _number(p["row"]) if "row" in p else "", _text(p.get("message", ""))]
            for p in problems]  # fmt: skip
    note = (
        f'<p class="quiet">{_number(count)} in all, the first {_number(len(rows))} shown</p>'
        if count > len(rows)
        else ""
    )
    return _section("Skipped", _table(["file", "document", "why"], rows, left=(0, 2)) + note)


def _notes(report: Report) -> str:
    notes = "".join(f"<li>{_text(note)}</li>" for note in report.get("notes") or [])
    return _section("Notes", f"<ul>{notes}</ul>") if notes else ""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table of cells that are HTML already; those columns on the left, the others, of numbers, on the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if place in left else ' class="n"' for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{cell}</{tag}>" for m, cell in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = line([_text(cell) for cell in header], "th")
    # A wide table scrolls by itself, never the page.
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _bar(share: float, label: str | None = None) -> str:
    label = _percent(share) if label is None else label
    width = 100 * min(1.0, max(0.0, share))
    bar = f'<div class="bar"><i style="width:{width:.2f}%"></i></div>'
    return f'<div class="share">{bar}<span class="of">{label}</span></div>'


def _legend(names: Sequence[str]) -> str:
    return '<p class="legend">' + "".join(f'<span class="{name}">{name}</span>' for name in names) + "</p>"


def _number(value: float) -> str:
    return f"{value:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bytes(size: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if abs(size) >= 10**power:
            return f"{size / 10**power:.2f} {unit}"
    return f"{size:,} B"


def _short(bits: int) -> str:
    """The least number of so many bits as it is called: 512, 4K, 1M."""
    value = 1 << bits - 1 if bits else 0
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if value >= 1 << power:
            return f"{value >> power}{unit}"
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}\u2026"


def _text(value: str) -> str:
    """A text as HTML shows it: nothing in it is markup, and control characters, which HTML has not, are pictures."""
    return html.escape(_encodable(str(value)).translate(_PICTURES), quote=True)


def _encodable(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if not text.isascii() else text


_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
# Marks of direction could turn the page around an example.
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #5f6871; --line: #dfe3e8; --page: #ffffff; --card: #f5f7f9;
  --read: #b6c4d4; --passed: #2f6fb5; --dropped: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --quiet: #9aa5b1; --line: #343b43; --page: #15181b;
  --card: #1d2227; --read: #4d5c6d; --passed: #6aa8ea; --dropped: #ef8377; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 10px; }
a { color: var(--passed); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles span, .quiet, .tick { color: var(--quiet); font-size: .85rem; }
.quiet { margin: 6px 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 500; font-size: .85rem; white-space: nowrap; }
td:not(.n) { overflow-wrap: anywhere; } td:not(.n):not(:last-child) { min-width: 7em; }
.n { text-align: right; white-space: nowrap; }
.bar { display: inline-block; width: 90px; height: 9px; background: var(--line); border-radius: 5px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--passed); }
.of { margin-left: 8px; } .share, td a { white-space: nowrap; }
details { border: 1px solid var(--line); border-radius: 8px; margin: 10px 0; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 500; }
figure { margin: 12px 0; }
figcaption { font-size: .85rem; color: var(--quiet); overflow-wrap: anywhere; }
figcaption b { color: var(--passed); } figcaption b.dropped { color: var(--dropped); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 10px; }
.pair div { min-width: 0; } .pair span { font-size: .8rem; color: var(--quiet); }
pre { margin: 4px 0 0; padding: 10px 12px; background: var(--card); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 260px; overflow-y: auto; unicode-bidi: isolate;
  font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, "Noto Sans Mono CJK SC", monospace; }
svg { display: block; } rect.read { fill: var(--read); } rect.cleaned { fill: var(--passed); }
.grid { stroke: var(--line); } .axis { stroke: var(--quiet); } .tick { fill: var(--quiet); font-size: 11px; }
.middle { text-anchor: middle; }
.legend span { margin-right: 16px; font-size: .85rem; color: var(--quiet); }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; background: var(--passed); } .legend .read::before { background: var(--read); }
@media (max-width: 600px) { main { padding: 16px 14px 48px; } .bar { width: 60px; } }
@media print { details { break-inside: avoid; } pre { max-height: none; } }
"""
