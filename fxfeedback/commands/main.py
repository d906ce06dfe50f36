# PYTHON_ARGCOMPLETE_OK
"""The command line: `fxfeedback COMMAND ...`, or `python -m fxfeedback COMMAND ...`.

`commands/` has the commands; here is what they have in common: help, text or JSON, and what they end with.
"""

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fxfeedback.commands.text import printable
from fxfeedback.errors import Error, InputError, NodeNameError, OptionError
from fxfeedback.version import __version__

COMMANDS = {
    "nodes": "name a model's nodes, and which may be connected",
    "feedback": "add connections, and say what each pass computes",
    "predict": "let nodes predict what lies below, and say what each step computes",
    "butd": "derive an instructed network, and say what its tasks switch on",
    "export": "write a network as an ONNX file",
    "draw": "draw a network",
    "info": "say what an exported file is",
    "bench": "how long a network takes, over the plain model",
    "doctor": "say what is installed, what works and what is missing",
}
"""Name, which is that of its file in commands/, and what it does."""

OK, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
ENDS = """exit codes: 0 done; 1 failed, a message says why; 2 a command, name or option that does not exist or does not
fit; 130 interrupted"""
COMPLETION = """completion: pip install 'fxfeedback[completion]', and in the shell's start-up file
eval "$(register-python-argcomplete fxfeedback)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line, without the program's name; default: this process's.

    Returns:
        0: done; 1: failed; 2: wrong usage; 130: interrupted.
    """
    try:
        code = _ended(arguments)
        sys.stdout.flush()
        return code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at Python's end
        if isinstance(error, BrokenPipeError):  # whoever reads, `head` say, has enough
            return OK
        return _say(error, FAILED)


def _ended(arguments: Sequence[str] | None) -> int:
    """Run a command; the code that it ends with."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            return _run(parser().parse_args(arguments))
    except SystemExit as end:  # argparse's, after --help or wrong usage
        return int(end.code or OK)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OptionError, NodeNameError, InputError) as error:
        return _say(error, WRONG_USAGE)
    except BrokenPipeError:
        raise
    except ImportError as error:
        return _say(f"{error}; `fxfeedback doctor` says what else is missing", FAILED)
    except (Error, OSError) as error:
        return _say(error, FAILED)


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    result = command.run(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(*map(printable, command.lines(result)), sep="\n")
    return OK if result.get("ok", True) else FAILED


def _say(error: Exception | str, code: int) -> int:
    print(f"fxfeedback: error: {_printable(error)}", file=sys.stderr)
    return code


def _printable(message: Any) -> str:
    return "\n".join(map(printable, in_shell(str(message)).split("\n")))


def _say_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"fxfeedback: warning: {_printable(message)}", file=sys.stderr)


FLAGS = {"n_tasks": "--tasks"} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("input_size", "passes", "steps", "embedding", "head", "gating", "task", "steerable", "dynamic_size")
}
"""Arguments in Python, and what they are called here."""


def in_shell(advice: str) -> str:
    """What a message advises, as it is done on the command line: `input_size=` becomes `--input-size`."""
    advice = advice.replace("fxfeedback.node_names(model)", "`fxfeedback nodes MODEL`")
    for said, flag in {
        "check": "--no-check",
        "dynamic_batch": "--fixed-batch",
        "dynamic_size": "no --dynamic-size",
    }.items():
        advice = re.sub(rf"\b{said}=False\b", flag, advice)
    names = "|".join(FLAGS)
    return re.sub(rf"\b({names})=(True\b)?", lambda said: FLAGS[said[1]], advice)


# -- arguments --------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What reads the command line, and completes it in the shell."""
    made = argparse.ArgumentParser(
        prog="fxfeedback",
        description="Feedback and instruction for any torchvision model. `fxfeedback COMMAND --help` has examples.",
        epilog=f"{ENDS}\n\n{COMPLETION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"fxfeedback {__version__}")
    several = made.add_subparsers(metavar="COMMAND", required=True)
    for name, does in COMMANDS.items():
        _add_command(several, name, does)
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that wants a word completed
        import argcomplete

        argcomplete.autocomplete(made)
    return made


def _add_command(several: Any, name: str, does: str) -> None:
    command: Any = importlib.import_module(f"fxfeedback.commands.{name}")
    examples = "\n".join(f"  {line}" for line in command.EXAMPLES)
    width = max(map(len, command.KEYS))
    keys = "\n".join(f"  {key:<{width}}  {meaning}" for key, meaning in command.KEYS.items())
    sub = several.add_parser(
        name,
        help=does,
        description=command.__doc__,
        epilog=f"examples:\n{examples}\n\nkeys of --json:\n{keys}\n\n{ENDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(sub)
    sub.add_argument("--json", action="store_true", help="print JSON, with the keys below")
    sub.set_defaults(command=command)


if __name__ == "__main__":
    sys.exit(main())
