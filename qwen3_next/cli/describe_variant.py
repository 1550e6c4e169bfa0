"""`describe`: parameters and bytes of a variant, and of what the devices of a mesh hold of it."""

from typing import Any

from qwen3_next import variants
from qwen3_next.models.description import describe
from qwen3_next.scale.layout_description import describe_layout


def add(commands: Any) -> Any:
    """Adds the parser of the command."""
    command = commands.add_parser("describe", help="parameters and bytes of a variant")
    command.add_argument("variant", choices=variants.names())
    command.add_argument("--mesh", help='also every weight on devices, as "expert=8,tensor=8"')
    command.add_argument("--fsdp", action="store_true", help="matrices split over `data`, too")
    return command


def run(arguments: Any) -> None:
    """Prints the description."""
    print(describe(arguments.variant))
    if arguments.mesh is not None:
        print(f"\n{describe_layout(arguments.variant, arguments.mesh, fsdp=arguments.fsdp)}")
    elif arguments.fsdp:
        raise ValueError("`--fsdp` needs a `--mesh`. Received: --fsdp alone")
