"""Token ids from a file."""

from pathlib import Path

import numpy as np


def read_tokens(path: str) -> np.ndarray:
    """Token ids `(rows, tokens)` of a `.npy` file, mapped into memory.

    Raises:
        ValueError: no such file, or another array in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"Token ids must be in a .npy file. Received: {path}")
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:  # what NumPy says of another file
        raise ValueError(f"Token ids must be in a .npy file. Received: {path}") from error
    if not isinstance(tokens, np.ndarray):  # an archive of several
        raise ValueError(f"Token ids must be in a .npy file. Received: {path}")
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            "Token ids must be integers of shape (rows, tokens), at least one of either. "
            f"Received: {path} with {tokens.dtype} of shape {tokens.shape}"
        )
    return tokens
