"""The README tells the truth about the constants."""

import re

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
