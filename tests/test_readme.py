"""What the README shows is run."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def anchors(page):
    """Of its headings, as they are made where Markdown is shown."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


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


def test_links_between_pages_lead_somewhere():
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", p.read_text())]
    inside = [(page, *link.partition("#")[::2]) for page, link in links if "://" not in link]
    assert len(inside) > 100
    for page, file, anchor in inside:
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {file}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {file}#{anchor}"
