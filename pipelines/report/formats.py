"""A table of the report as files: Parquet and CSV for programs, Markdown and LaTeX for readers."""

import io
from collections.abc import Callable

import pandas as pd

from pipelines.report.tables import MEAN, MISSING, ReportTable

MARKDOWN = str.maketrans({"|": "\\|", "<": "&lt;", "*": "\\*", "_": "\\_", "\n": " "})
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
        "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
        "−": "$-$", "–": "--", "≈": r"$\approx$", "†": r"$\dagger$", "<": "$<$", ">": "$>$",
        "▲": r"$\uparrow$", "▼": r"$\downarrow$", "…": r"\ldots{}", "→": r"$\to$",
    }
)  # fmt: skip


def data_files(name: str, data: pd.DataFrame) -> dict[str, bytes]:
    """Plain numbers as ``.parquet`` and ``.csv``."""
    sink = io.BytesIO()
    data.to_parquet(sink, index=False)
    return {
        f"{name}.parquet": sink.getvalue(),
        f"{name}.csv": data.to_csv(index=False, lineterminator="\n").encode(),
    }


def table_files(table: ReportTable) -> dict[str, bytes]:
    """A table as ``.parquet`` and ``.csv`` (plain numbers), ``.md`` and ``.tex`` (finished cells)."""
    return {
        **data_files(table.name, table.data),
        f"{table.name}.md": markdown(table).encode(),
        f"{table.name}.tex": latex(table).encode(),
    }


def markdown(table: ReportTable) -> str:
    """A table as GitHub-flavoured Markdown, with its title above and its note below."""
    cells = _stressed(table, escape_markdown, "**{}**")
    cells.columns = pd.Index([escape_markdown(_one_line(header)) for header in table.display.columns])
    sides = ["left" if text else "right" for text in text_columns(table)]
    body = cells.to_markdown(index=False, colalign=sides, disable_numparse=True) if len(cells) else MISSING
    return f"### {table.title}\n\n{body}\n\n{table.note}\n"


def latex(table: ReportTable) -> str:
    """A table for LaTeX, its note in the caption; needs the package booktabs."""
    cells = _stressed(table, escape_latex, "\\textbf{{{}}}")
    headers = [header if isinstance(header, tuple) else (header,) for header in table.display]
    escaped = [tuple(escape_latex(part) for part in header) for header in headers]
    cells.columns = pd.MultiIndex.from_tuples(escaped)
    if cells.columns.nlevels == 1:  # pandas would print tuples of one
        cells.columns = cells.columns.get_level_values(0)
    return cells.to_latex(
        index=False,
        escape=False,
        caption=escape_latex(f"{table.title}. {table.note}"),
        column_format="".join("l" if text else "r" for text in text_columns(table)),
        multicolumn_format="c",
    )


def text_columns(table: ReportTable) -> list[bool]:
    """Which columns on display hold words: a cell that starts with a letter, as no number or dash does."""
    columns = (table.display.iloc[:, position] for position in range(table.display.shape[1]))
    return [any(cell[:1].isalpha() for cell in column) for column in columns]


def escape_markdown(text: str) -> str:
    """Text with the characters that mean something in a cell of Markdown made plain."""
    return text.translate(MARKDOWN)


def escape_latex(text: str) -> str:
    """Text with the characters that mean something to LaTeX made plain."""
    return text.translate(LATEX)


def _stressed(table: ReportTable, escape: Callable[[str], str], bold: str) -> pd.DataFrame:
    cells = table.display.map(escape)
    for row, column in table.bold:
        cells.iat[row, column] = bold.format(cells.iat[row, column])
    return cells


def _one_line(header: str | tuple[str, ...]) -> str:
    """A header of two levels in one: the group is dropped but for means."""
    if isinstance(header, str):
        return header
    return f"{header[0]} {header[1].lower()}" if header[0] == MEAN else header[1]
