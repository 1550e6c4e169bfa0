"""`python -m qwen3_next`: the command line."""

from qwen3_next.cli import main

if __name__ == "__main__":
    main()
