"""The command line, one module a command: `python -m qwen3_next describe 80b_a3b`.

A command has `add(commands)`, which adds its parser, and `run(arguments)`.
"""

import argparse
import signal
from collections.abc import Sequence

from qwen3_next.cli import convert, describe_variant, distill, merge

COMMANDS = (describe_variant, convert, distill, merge)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qwen3-next` command; what is wrong with its arguments ends it,
    and Ctrl-C does without a traceback."""
    parser = argparse.ArgumentParser(prog="qwen3-next", description="Qwen3-Next in Keras 3.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add(commands).set_defaults(run=module.run)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: interrupted\n")
