"""Directories that commands write to."""

from pathlib import Path

from qwen3_next.checkpoints.staging import require_writable


def check_target(target: str, *sources: str) -> None:
    """Says before the work begins what would stop its result from being written.

    Raises:
        ValueError: a file, or a directory that one of the sources is read from.
        OSError: a directory that cannot be made or written to.
    """
    directory = Path(target).resolve()
    if directory in [Path(source).resolve() for source in sources]:
        raise ValueError(
            f"`target` must be another directory than the sources. Received: target={target}"
        )
    require_writable(target)
