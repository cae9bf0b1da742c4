"""Tables as Dagster's UI shows them.

Belongs here: that, for every page of the UI. Does not belong here: what a page shows (writer, report_page, assets), and
how values are written (datasets.wording).
"""

from collections.abc import Mapping, Sequence

import dagster as dg


def markdown_table(rows: Sequence[Mapping[str, str]]) -> dg.MarkdownMetadataValue:
    """Rows as a table in Markdown, a quarter of table()'s size in Dagster's storage; there must be one at least.

    What comes from outside must be plain() already.
    """
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def table(rows: Sequence[Mapping[str, str | int]]) -> dg.TableMetadataValue:
    """Rows as a table in the page; there must be one at least. It rounds nothing: numbers come as text."""
    columns = [dg.TableColumn(name, "int" if isinstance(value, int) else "string") for name, value in rows[0].items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], dg.TableSchema(columns))
