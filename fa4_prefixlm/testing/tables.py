"""Tables of text: columns for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def columns(rows: Sequence[Row], *, right: Sequence[int] = ()) -> list[str]:
    """Lines with the cells of each column below each other, columns that are empty everywhere left out.

    Args:
        rows: All of the same length; the first one may be a header.
        right: Columns that are flush right (numbers).
    """
    if not rows:
        return []
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def titled(title: str, lines: Sequence[str]) -> str:
    """A title with indented lines below it."""
    return "\n".join([title, *(f"  {line}" for line in lines)])


def markdown(header: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(row) + " |" for row in lines]
