"""Lays findings out as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from paca.parity.findings import Finding, Report, Status
from paca.parity.table import HEAD, cell, dtypes, rows, summary

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #dfe3e8 }
th { font-weight: 600 } .scroll { overflow-x: auto }
.identical { background: #d9f2df } .within { background: #e8f1fb } .skipped { background: #f3f3f3; color: #555 }
.failed { background: #fbd5d5; font-weight: 600 } .verdict { display: inline-block; padding: .1rem .6rem }
li { margin: .2rem 0; overflow-wrap: anywhere }
"""
_CLASSES = {
    Status.IDENTICAL: "identical",
    Status.WITHIN_BOUND: "within",
    Status.SKIPPED: "skipped",
    Status.FAILED: "failed",
}


def page(report: Report) -> str:
    """Return the report as HTML."""
    verdict, kind = ("every comparison passed", "identical") if report.passed else ("not passed", "failed")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>paca parity</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f'<h1>paca parity: <span class="verdict {kind}">{verdict}</span></h1>',
        _list([escape(line) for line in summary(report)]),
    ]
    if report.failed:
        parts += ["<h2>Failed</h2>", _list([escape(str(finding)) for finding in report.failed])]
    for backend in dict.fromkeys(finding.backend for finding in report.findings):
        parts += [f"<h2>{escape(backend)}</h2>", _table(report, backend)]
    parts += ["<h2>Machines</h2>", _machine("The record", report.record)]
    parts += [_machine(name, machine) for name, machine in report.machines.items()]
    return "\n".join([*parts, "</body></html>", ""])


def _table(report: Report, backend: str) -> str:
    columns = dtypes(report)
    head = "".join(f"<th>{escape(word)}</th>" for word in (*HEAD, *columns))
    body = []
    for row in rows(report):
        if row.backend == backend:
            words = "".join(f"<td>{escape(word)}</td>" for word in row.words)
            body.append(f"<tr>{words}{''.join(_cell(row.by_dtype.get(dtype)) for dtype in columns)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(body) + "</table></div>"


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return "<td>-</td>"
    title = f' title="{escape(finding.detail, quote=True)}"' if finding.detail else ""
    return f'<td class="{_CLASSES[finding.status]}"{title}>{escape(cell(finding))}</td>'


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _machine(name: str, machine: Mapping[str, str]) -> str:
    about = "; ".join(f"{key} {value}" for key, value in machine.items())
    return f"<p><b>{escape(name)}</b>: {escape(about)}</p>"
