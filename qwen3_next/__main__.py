"""Command line: `python -m qwen3_next describe 80b_a3b`."""

import argparse

from qwen3_next import describe, variants


def main():
    """Entry point of the `qwen3-next` command."""
    parser = argparse.ArgumentParser(prog="qwen3-next", description="Qwen3-Next in Keras 3.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("describe", help="parameters and bytes of a variant")
    command.add_argument("variant", choices=variants.names())
    print(describe(parser.parse_args().variant))


if __name__ == "__main__":
    main()
