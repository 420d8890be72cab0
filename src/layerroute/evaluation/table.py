"""The document as a table for the terminal."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from layerroute.evaluation.cells import (
    AGAINST_COLUMNS,
    COLUMNS,
    CONTROL_COLUMNS,
    SPEED_COLUMNS,
    TASK_COLUMNS,
    control_rows,
    gap_line,
    headline,
    kind_rows,
    loop_line,
    matched_line,
    speed_rows,
    task_rows,
    with_tools_line,
)


def print_table(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the measured table to stdout."""
    (console or wide_console()).print(layout(document))


def wide_console(**options: Any) -> Console:
    """Return a console on stdout: a terminal's own width, and room for whole figures in a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, **options)


def layout(document: Mapping[str, Any]) -> Group:
    """Return the document as something rich can print: one table, the differentials, and the controls if any."""
    data = document["data"]
    title = f"{document['adapter'] or document['model']} on {', '.join(data['sources'])} ({data['split']})"
    parts: list[Any] = [
        Text(headline(document)),
        _turned(COLUMNS, kind_rows(document), title),
        Text(f"differential    {gap_line(document['differential'])}"),
        Text(f"length-matched  {matched_line(document)}"),
        Text(f"tools on offer  {with_tools_line(document)}"),
    ]
    if rows := control_rows(document):
        parts.append(_table(CONTROL_COLUMNS, rows, "at equal budget"))
    if rows := task_rows(document):
        parts.append(_turned([*TASK_COLUMNS, *AGAINST_COLUMNS], rows, "tasks under real skipping"))
    if rows := speed_rows(document):
        parts.append(_turned(SPEED_COLUMNS, rows, "tokens a second"))
    if line := loop_line(document):
        parts.append(Text(f"agent loops     {line}"))
    return Group(*parts)


def _turned(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Lay out one row a figure: fits 80 columns. Columns that no row has are left out."""
    turned = list(zip(columns[: len(rows[0])], *rows, strict=True))
    return _table(turned[0], turned[1:], title)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
