"""`describe`: parameters and bytes of a variant."""

from typing import Any

from qwen3_next import variants
from qwen3_next.models.description import describe


def add(commands: Any) -> Any:
    """Adds the parser of the command."""
    command = commands.add_parser("describe", help="parameters and bytes of a variant")
    command.add_argument("variant", choices=variants.names())
    return command


def run(arguments: Any) -> None:
    """Prints the description."""
    print(describe(arguments.variant))
