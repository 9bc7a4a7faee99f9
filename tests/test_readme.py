"""The README tells the truth about the constants, and the tests that it names are there."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

import genpic
import train
import vae


@pytest.mark.parametrize("script", [vae, train, genpic])
def test_the_tables_hold_every_constant_with_its_default_and_comment(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    constants = re.findall(r"^([A-Z_0-9]+): \S+ = (.*?)  # (.*)$", source, re.MULTILINE)
    assert sorted(name for name, *_ in constants) == sorted(script.__annotations__)
    table = "\n".join(f"| `{name}` | `{default}` | {comment} |" for name, default, comment in constants)
    assert f"| --- | --- | --- |\n{table}\n\n" in (ROOT / "README.md").read_text()


def test_the_tests_that_it_names_are_there():
    named = re.findall(r"`(test_\w+)(…?)`", (ROOT / "README.md").read_text())
    defined = " ".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) >= 20
    for name, more in named:
        assert re.search(rf"def {name}{'' if more else '[(]'}", defined), name
