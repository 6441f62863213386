"""The command line: ``bilevel NAME [options]``, or ``python -m tasks NAME [options]``.

In a folder that holds a ``tasks.py`` or ``tasks/`` of the user's own, ``python -m tasks`` runs
theirs, as Python looks there first; the console script ``bilevel`` runs this one.

A task is a module ``tasks.<name with underscores>``, imported only when it is asked for:

    SUMMARY: str                            what it does, in a few sentences: the head of --help
    add_arguments(parser)                   its own options, beside the common ones below;
                                            parser.set_defaults(...) changes the common defaults
    run(options) -> dict                    does it; the summary that is printed as a table
    DATA: tuple[str, ...]                   optional: the values of --data, the default first
                                            (digits, mnist, fashion-mnist where it is absent);
                                            empty: no --data, --root, --no-download at all
    PRESETS: dict[str, dict[str, object]]   optional: values of options by --preset name, the
                                            default preset first; options given explicitly win

``run`` gets the parsed options with ``task`` (the name), ``device`` a usable ``torch.device``,
``seed`` (already given to ``torch.manual_seed``), ``steps`` (None unless given or preset),
``data``, ``root``, ``download``, ``out``, ``overwrite``, ``quiet``, ``preset``. It makes its
folder by ``tasks.run.start(options)``, and loads data by ``load(options.data, options.root,
options.device, download=options.download)``. A value of the summary that is a list of dicts is
printed as a table of its own.

ValueError, OSError and MissingPackage are taken as the user's to mend: one sentence, exit code
2. ``python -X dev -m tasks ...`` shows where they came from.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import TASKS
from .errors import MissingPackage

PACKAGE = __package__ or "tasks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a task by name. Returns 0; 2 for what the user can mend; 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    offered = available()
    try:
        if not arguments or arguments[0].startswith("-"):
            front = _front(offered)
            if front.parse_args(arguments).list:
                print(listing(offered))
                return 0
            front.print_help()
            return 0 if arguments else 2
        name = arguments[0]
        if name not in offered:
            return fail(unknown(name, offered))
        return _run(name, arguments[1:])
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else 2


def available() -> dict[str, str]:
    """The tasks whose module exists, with their lines."""
    return {name: line for name, line in TASKS.items() if _spec(name) is not None}


def module_name(name: str) -> str:
    return f"{PACKAGE}.{name.replace('-', '_')}"


def _spec(name: str) -> Any:
    return importlib.util.find_spec(module_name(name))


def listing(offered: dict[str, str]) -> str:
    width = max(map(len, offered), default=0)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in offered.items())


def unknown(name: str, offered: dict[str, str]) -> str:
    if name in TASKS:
        return f"the task {name} is not in this version; bilevel --list shows those that are"
    near = difflib.get_close_matches(name, offered, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"there is no task {name!r}; {hint}bilevel --list shows all"


def fail(message: str) -> int:
    print(f"bilevel: {message}", file=sys.stderr)
    return 2


def _front(offered: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel",
        usage="bilevel NAME [options] | bilevel --list | bilevel NAME --help",
        description="Run a bilevel problem by name.",
        epilog=f"tasks:\n{listing(offered)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="show the tasks and leave")
    return parser


def _run(name: str, arguments: list[str]) -> int:
    folder = None
    try:
        task = importlib.import_module(module_name(name))
        options = parse(name, task, arguments)
        import torch

        from .files import table
        from .run import device

        if options.overwrite and getattr(options, "resume", False):
            raise ValueError(
                "--overwrite and --resume were given, of which one replaces what the other goes on "
                "from; give one of them"
            )
        options.device = device(options.device)
        torch.manual_seed(options.seed)
        try:
            summary = task.run(options)
        finally:
            folder = options.out if options.out and Path(options.out).exists() else None
    except KeyboardInterrupt:
        kept = f"; what it wrote is in {folder}" if folder else ""
        if folder and hasattr(options, "resume"):
            kept += f", and --resume --out {folder} goes on"
        print(f"\nbilevel: {name} was interrupted{kept}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MissingPackage) as error:
        if sys.flags.dev_mode:
            raise
        return fail(sentence(error))
    if not options.quiet:
        print(table(summary))
        if folder:
            print(f"\nwritten to {folder}")
    return 0


def sentence(error: BaseException) -> str:
    """The error in one line; the system's errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def parse(name: str, task: Any, arguments: list[str]) -> argparse.Namespace:
    """The options of a task: common ones, its own, and the chosen preset's values."""
    parser = argparse.ArgumentParser(
        prog=f"bilevel {name}",
        description=task.SUMMARY,
        allow_abbrev=False,
        formatter_class=Help,
    )
    presets = getattr(task, "PRESETS", {"default": {}})
    _common(parser, getattr(task, "DATA", ("digits", "mnist", "fashion-mnist")), tuple(presets))
    task.add_arguments(parser)
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    chosen = first.parse_known_args(arguments)[0].preset
    values = presets.get(chosen, {})  # an unknown preset is refused below
    if strange := set(values) - {action.dest for action in parser._actions}:
        raise TypeError(f"preset {chosen!r} of {name} sets {sorted(strange)}: no such options")
    parser.set_defaults(**values)
    options = parser.parse_args(arguments)
    options.task = name
    return options


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: neither None nor the state of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def _common(parser: argparse.ArgumentParser, data: Sequence[str], presets: Sequence[str]) -> None:
    group = parser.add_argument_group("common options")
    add = group.add_argument
    if data:
        add("--data", choices=data, default=data[0], help="the data set")
        add(
            "--root",
            metavar="FOLDER",
            help="where the data are, in torchvision's layout; next $BILEVEL_DATA is looked at",
        )
        add(
            "--no-download",
            dest="download",
            action="store_false",
            help="never download missing data",
        )
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    add(
        "--seed",
        type=whole,
        default=0,
        help="of all that is random but the split of the data, a whole number",
    )
    add("--steps", type=positive, help="outer iterations")
    add("--preset", choices=presets, default=presets[0], help="values for the other options")
    add("--out", metavar="FOLDER", help="the run folder (default: runs/<task>-<time>)")
    add("--overwrite", action="store_true", help="replace another run's results in --out")
    add("--quiet", action="store_true", help="no progress and no summary, only the folder")


def whole(text: str) -> int:
    """A whole number that is not negative, as an option's type."""
    return _number(text, 0)


def positive(text: str) -> int:
    """A whole number of at least one, as an option's type."""
    return _number(text, 1)


def penalty(text: str) -> float:
    """A finite number above 0, as an option's type."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def _number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
