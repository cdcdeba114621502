"""How the report writes numbers, and what importing it costs."""

import subprocess
import sys

import pytest

from featherweight.lab.report import text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, "1.00"),
        (0.015625, "0.0156"),
        (0.00001234, "0.0000123"),
        (0.99999, "1.00"),
        (9.999, "10.0"),
        (123.4, "123"),
        (123456.0, "123,000"),
        (0, "0"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_three_digits(value: float | None, words: str) -> None:
    assert text.three(value) == words


def test_other_numbers() -> None:
    assert text.percent(0.97349) == "97.3 %"
    assert text.accuracy(0.97349, 0.004, 3) == "97.3 ± 0.4 % (3)"
    assert text.accuracy(0.97349, None, 1) == "97.3 % (1)"
    assert text.count(266610) == "266,610"
    assert [text.scaled(n, "B") for n in (17, 999, 1000, 41_000_000)] == [
        "17 B",
        "999 B",
        "1.00 kB",
        "41.0 MB",
    ]
    assert text.scaled(999_700) == "1.00 M"
    assert text.milliseconds(0.00312) == "3.12 ms"


def test_matplotlib_is_imported_only_when_writing() -> None:
    code = "import sys, featherweight.lab.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
