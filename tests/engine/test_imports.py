"""`import bilevel` beside a user's own optim.py and tasks.py, and with torch alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WORK = """
import sys
import torch, bilevel
x, y = torch.tensor([0.5]), torch.tensor([0.0])
r = bilevel.solve(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum(), x, y,
                  steps=3)
assert len(r.history) == 3
"""


def python(code, cwd):
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.append({str(ROOT)!r})\n"]
    command[-1] += code
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_beside_a_users_own_modules(kind, tmp_path):
    """The user's folder is first on the path, as it is for a script in it."""
    for name in ("optim", "tasks"):
        if kind == "files":
            (tmp_path / f"{name}.py").write_text("raise RuntimeError('the user\\'s own')")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')")
    done = python(WORK, tmp_path)
    assert done.returncode == 0, done.stderr
    # it really is first: an import of optim would have met it
    assert "the user's own" in python("import optim", tmp_path).stderr


def test_torch_alone(tmp_path):
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in 'sklearn matplotlib tqdm torchvision higher scipy'.split():
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
"""
    check = """
taken = {name.split('.')[0] for name in sys.modules}
assert not taken & {'sklearn', 'matplotlib', 'tqdm', 'torchvision', 'higher', 'optim', 'tasks'}
"""
    done = python(code + WORK + check, tmp_path)
    assert done.returncode == 0, done.stderr


def test_no_module_names_the_other_packages():
    for path in (ROOT / "bilevel").glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("optim", "tasks", "numpy"), (path, line)


def test_public_names():
    import bilevel

    assert bilevel.__all__ == sorted(bilevel.__all__)
    for name in bilevel.__all__:
        assert getattr(bilevel, name).__doc__, name
