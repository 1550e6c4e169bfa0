"""`merge`: several models become one, as a recipe says."""

from typing import Any

from qwen3_next.cli.targets import check_target
from qwen3_next.transfer.merge.merge_config import merge_from_config, named_models
from qwen3_next.transfer.merge.merge_recipes import read_recipe


def add(commands: Any) -> Any:
    """Adds the parser of the command."""
    command = commands.add_parser("merge", help="several models become one")
    command.add_argument("config", help="recipe, a JSON or YAML file")
    command.add_argument("target", help="directory to write")
    return command


def run(arguments: Any) -> None:
    """Merges and saves."""
    recipe = read_recipe(arguments.config)
    check_target(arguments.target, *named_models(recipe))
    merge_from_config(recipe).save_to_preset(arguments.target)
