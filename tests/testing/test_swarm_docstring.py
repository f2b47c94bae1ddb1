"""The ten lines that show how to simulate a swarm run as they are printed."""

from __future__ import annotations

import re
import textwrap

import shoal.testing


def test_the_swarm_of_the_docstring_runs(capsys):
    program = textwrap.dedent(re.search(r"::\n\n(.*?)\n\nNames", shoal.testing.__doc__, re.DOTALL)[1])
    exec(compile(program, "docstring", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.startswith("[4, 4, 4, 4, 4, 4, 4, 4] after ")


def test_every_exported_name_is_there():
    for name in shoal.testing.__all__:
        assert getattr(shoal.testing, name) is not None
