"""What the README shows is run."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run_and_improve(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        scope = {}
        exec(compile(block, "README.md", "exec"), scope)
        history = scope["result"].history
        assert history[-1].outer_loss < 0.8 * history[0].outer_loss
    assert "steps were taken" in capsys.readouterr().out


def test_names_that_the_readme_lists_exist():
    import bilevel
    from bilevel.presets import PRESETS

    for name in re.findall(r'\| `"([a-z-]+)"', README):
        assert name in PRESETS
    for name in re.findall(r"`(?:Implicit\()?([A-Z][A-Za-z]+)\(", README):
        assert hasattr(bilevel, name), name
