"""Markdown tables."""


def markdown_table(rows: list[dict]) -> str:
    """Return a Markdown table.

    Args:
        rows: at least one row, all with the same keys, which are the headings. None is an empty
            cell.
    """
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = ("" if row[name] is None else str(row[name]) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
