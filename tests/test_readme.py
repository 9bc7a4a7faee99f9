"""The README tells the truth about the constants."""

import re

import pytest
from conftest import ROOT

import genpic
import train
import vae


@pytest.mark.parametrize("script", [vae, train, genpic])
def test_every_constant_stands_in_the_table_with_its_default_and_comment(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    constants = re.findall(r"^([A-Z][A-Z_0-9]*) = ([^(].*?)  # (.*)$", source, re.MULTILINE)
    assert len(constants) >= 4
    for name, default, comment in constants:
        assert f"| `{name}` | `{default}` | {comment} |" in (ROOT / "README.md").read_text()
