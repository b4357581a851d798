import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from pipelines.report.formats import latex, markdown
from pipelines.report.studies import sections
from pipelines.report.studies.accuracy import accuracy_table
from pipelines.report.studies.problems import problem_table
from tests.pipelines.report.conftest import bad_row, frames_of, result_frame, study_frame


def test_markdown_and_latex_of_a_small_table() -> None:
    frame = result_frame(tasks=["mnist", "dsprites_loc"], methods=["linear", "head2toe"], seeds=(0,))
    frame["test_accuracy"] = [0.5, 0.75, 0.25, 0.5]
    table = accuracy_table(frame)
    lines = markdown(table).splitlines()
    cells = [[cell.strip() for cell in lines[number].strip("|").split("|")] for number in (2, 4, 5)]
    assert cells == [
        ["Method", "MNIST", "dSpr-Loc", "Mean natural", "Mean structured", "Mean all"],
        ["Linear", "50.0", "25.0", "50.0", "25.0", "37.5"],
        ["Head2Toe", "**75.0**", "**50.0**", "**75.0**", "**50.0**", "**62.5**"],
    ]
    assert "Head2Toe & \\textbf{75.0} & \\textbf{50.0}" in latex(table)
    assert "\\multicolumn{3}{c}{Mean}" in latex(table)


def test_special_characters_survive() -> None:
    table = problem_table("bad", "100 % & more", pd.DataFrame({"a_b": ["x_y & 5 % {z} #1 ~ ^ \\ $"]}))
    text = latex(table)
    assert r"x\_y \& 5 \% \{z\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{} \$" in text
    assert r"\caption{100 \% \& more. 1 in all.}" in text
    assert r"a\_b \\" in text.splitlines()
    assert r"a\|b\_&lt;c>" in markdown(problem_table("bad_rows", "Images left out", bad_row()))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_every_table_compiles(tmp_path: Path, results: pd.DataFrame) -> None:
    frames = frames_of(results, study_results=study_frame(), bad_rows=bad_row())
    tables = [table for section in sections(frames) for table in section.tables]
    assert len(tables) > 15
    body = "\n\\clearpage\n".join(latex(table) for table in tables)
    head = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs}\n"
    (tmp_path / "tables.tex").write_text(f"{head}\\begin{{document}}\n{body}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1500:]
