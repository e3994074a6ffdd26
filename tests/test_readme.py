"""The README's example is run as a reader would run it."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_prints_a_correlation(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = r"ρ = -?0\.\d+ ± 0\.\d+ \(n = 300\); a batch of 32 is worth \d+ to \d+\n"
    assert re.fullmatch(printed, capsys.readouterr().out)
