"""The width of what is printed: the terminal's, or that of COLUMNS, or enough for every table."""

import pytest

from etflight.reporting.tables import HEADER
from etflight.utils.terminal import console


def test_a_file_is_wide_enough_for_every_column_of_a_report(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width > 8 * len(HEADER)
    console().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"


@pytest.mark.parametrize("columns", [40, 300])
def test_columns_says_how_wide(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert console().width == columns
