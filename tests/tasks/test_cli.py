"""The command line, with tasks that the tests write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tasks
from tasks.__main__ import main

COUNTING = """
from tasks.run import start

SUMMARY = "Counts to the number of steps."
DATA = ("digits", "mnist")
PRESETS = {"quick": {"steps": 2, "rate": 0.5}, "full": {"steps": 20}}


def add_arguments(parser):
    parser.add_argument("--rate", type=float, default=0.1, help="how fast")


def run(options):
    run = start(options)
    for k in range(options.steps):
        run.record({"k": k})
    return run.summarize({"steps": options.steps, "rate": options.rate, "data": options.data})
"""

FAILING = """
from tasks.errors import MissingData, MissingPackage
from tasks.run import start

SUMMARY = "Fails."
DATA = ()
ERRORS = {
    "value": ValueError("the value is\\n wrong"),
    "data": MissingData("no data"),
    "package": MissingPackage("no package"),
    "system": PermissionError(13, "Permission denied", "/x"),
    "bug": KeyError("k"),
    "keyboard": KeyboardInterrupt(),
}


def add_arguments(parser):
    parser.add_argument("error", choices=ERRORS)


def run(options):
    start(options)
    raise ERRORS[options.error]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two tasks beside the real ones; the working folder is empty."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "counting_things.py").write_text(COUNTING)
    (package / "failing.py").write_text(FAILING)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(package)])
    more = {"counting-things": "counts", "failing": "fails", "unwritten": "is not there"}
    monkeypatch.setattr("tasks.__main__.TASKS", {**tasks.TASKS, **more})
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    for name in ("counting_things", "failing"):
        sys.modules.pop(f"tasks.{name}", None)
        vars(tasks).pop(name, None)


def test_a_task_runs_and_prints_its_summary(folder, capsys):
    assert main(["counting-things", "--out", "a", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "steps  2",
        "rate   0.5",
        "data   digits",
        "",
        "written to a",
    ]
    options = json.loads((folder / "a" / "config.json").read_text())["options"]
    assert options == {
        "data": "digits", "root": None, "download": True, "device": options["device"], "seed": 3,
        "steps": 2, "preset": "quick", "rate": 0.5, "task": "counting-things",
    }  # fmt: skip
    assert options["device"].startswith(("cpu", "cuda"))


def test_presets_give_way_to_explicit_options(folder, capsys):
    arguments = ["counting-things", "--preset", "full", "--rate", "2"]
    assert main([*arguments, "--out", "a"]) == 0
    assert main([*arguments, "--out", "b", "--steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("steps", "rate"))] == [
        "steps  20", "rate   2", "steps  4", "rate   2"
    ]  # fmt: skip


def test_a_preset_of_unknown_options_is_a_bug_of_the_task(folder):
    import tasks.counting_things as task

    task.PRESETS["quick"]["strange"] = 1
    with pytest.raises(TypeError, match=r"'quick' of counting-things sets \['strange'\]"):
        main(["counting-things"])


def test_the_seed_is_that_of_torch(folder, capsys):
    import tasks.counting_things as task

    task.run = lambda options: {"draw": torch.rand(()).item()}
    drawn = []
    for seed in ("1", "1", "2"):
        assert main(["counting-things", "--seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_quiet_says_nothing(folder, capsys):
    assert main(["counting-things", "--out", "a", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (folder / "a" / "summary.json").exists()


def test_the_default_folder_is_named_by_task_and_time(folder):
    assert main(["counting-things"]) == 0
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("counting-things-20")


def test_other_results_are_kept_unless_overwrite(folder, capsys):
    assert main(["counting-things", "--out", "a"]) == 0
    assert main(["counting-things", "--out", "a", "--rate", "3"]) == 2
    assert "(rate 0.5 there, 3.0 now)" in capsys.readouterr().err
    assert main(["counting-things", "--out", "a", "--rate", "3", "--overwrite"]) == 0


def test_list_shows_the_tasks_that_exist(folder, capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "counting-things" in [line.split()[0] for line in lines]
    assert not any(line.startswith("unwritten") for line in lines)


def test_help(folder, capsys):
    assert main(["--help"]) == 0
    assert "counts" in capsys.readouterr().out
    assert main([]) == 2
    assert "bilevel --list" in capsys.readouterr().out
    assert main(["counting-things", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Counts to the number of steps." in text and "(default: None)" not in text
    assert "(default: 0.5)" in text  # as the preset has it
    for option in (
        "data",
        "root",
        "device",
        "seed",
        "steps",
        "out",
        "preset",
        "overwrite",
        "quiet",
    ):
        assert f"--{option}" in text
    assert main(["counting-things", "--preset", "full", "--help"]) == 0
    assert "(default: 20)" in capsys.readouterr().out


def test_tasks_without_data_have_no_data_options(folder, capsys):
    assert main(["failing", "--help"]) == 0
    assert "--data" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["counting-thing"], "no task 'counting-thing'; did you mean counting-things?"),
        (["zzz"], "no task 'zzz'; bilevel --list shows all"),
        (["unwritten"], "the task unwritten is not in this version"),
        (["--frobnicate"], "--frobnicate"),
        (["counting-things", "--steps", "0"], "at least 1, not '0'"),
        (["counting-things", "--steps", "many"], "at least 1, not 'many'"),
        (["counting-things", "--seed", "-1"], "at least 0, not '-1'"),
        (["counting-things", "--dat", "digits"], "unrecognized arguments: --dat"),
        (["counting-things", "--data", "ships"], "'ships'"),
        (["counting-things", "--preset", "slow"], "'slow'"),
        (["counting-things", "--device", "gpu"], "the device 'gpu' cannot be used"),
        (["failing", "value"], "bilevel: the value is wrong\n"),
        (["failing", "data"], "bilevel: no data\n"),
        (["failing", "package"], "bilevel: no package\n"),
        (["failing", "system"], "bilevel: /x: Permission denied\n"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err
    assert out == ""


def test_bugs_keep_their_traceback(folder):
    with pytest.raises(KeyError):
        main(["failing", "bug"])


def test_an_interrupt_is_told_with_the_folder(folder, capsys):
    assert main(["failing", "keyboard", "--out", "a"]) == 130
    assert capsys.readouterr().err == "\nbilevel: failing was interrupted; what it wrote is in a\n"


def test_names_are_those_of_the_tasks():
    assert set(tasks.TASKS) == {
        "data-distillation", "hyper-representation", "data-cleaning", "regularization", "poisson",
        "synthetic", "model-distillation", "language-model", "quadratic", "ridge",
    }  # fmt: skip


# in processes of their own


def execute(command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=120
    )


def test_python_m_tasks(tmp_path):
    source = str(Path(tasks.__file__).resolve().parents[1])
    done = execute([sys.executable, "-m", "tasks", "--list"], tmp_path, PYTHONPATH=source)
    assert (done.returncode, done.stderr) == (0, "")
    done = execute([sys.executable, "-m", "tasks", "nothing"], tmp_path, PYTHONPATH=source)
    assert done.returncode == 2 and done.stderr.startswith("bilevel: there is no task 'nothing'")


def test_list_needs_no_torch():
    code = "import sys, tasks.__main__ as cli; cli.main(['--list']); print('torch' in sys.modules)"
    done = execute([sys.executable, "-c", code], Path(tasks.__file__).resolve().parents[1])
    assert done.stdout.splitlines()[-1] == "False"


def test_the_script_works_beside_a_users_own_tasks(tmp_path):
    script = shutil.which("bilevel", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the project is not installed here, so there is no script")
    theirs = "raise SystemExit('this is the user\\'s own tasks')"
    (tmp_path / "tasks.py").write_text(theirs)
    (tmp_path / "optim.py").write_text(theirs)
    done = execute([script, "nothing"], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("bilevel: there is no task 'nothing'")
    own = execute([sys.executable, "-m", "tasks"], tmp_path)
    assert "user's own" in own.stderr  # which is why the script is there


INTERRUPTED = """
import os, signal, sys, threading, types
import tasks, tasks.__main__ as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
def run(options):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(60)
module = types.ModuleType("tasks.ridge")
module.SUMMARY, module.run, module.add_arguments = "waits", run, lambda parser: None
module.__spec__ = types.SimpleNamespace()
sys.modules["tasks.ridge"] = module
sys.exit(cli.main(["ridge"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_a_real_interrupt_leaves_with_130(tmp_path):
    source = str(Path(tasks.__file__).resolve().parents[1])
    done = execute([sys.executable, "-c", INTERRUPTED], tmp_path, PYTHONPATH=source)
    assert (done.returncode, done.stderr) == (130, "\nbilevel: ridge was interrupted\n")
