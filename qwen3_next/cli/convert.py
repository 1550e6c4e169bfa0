"""`convert`: a hybrid from a Qwen3."""

from pathlib import Path
from typing import Any

import numpy as np

from qwen3_next.checkpoints.staging import read_json, require_regular
from qwen3_next.cli.targets import check_target
from qwen3_next.cli.token_files import read_tokens
from qwen3_next.config import CrossArchTransferConfig
from qwen3_next.transfer.conversion.hybrid_transfer import transfer_qwen3_to_hybrid

FORMATS = {"preset": "save_to_preset", "transformers": "export_to_transformers"}


def add(commands: Any) -> Any:
    """Adds the parser of the command."""
    command = commands.add_parser(
        "convert",
        help="a hybrid from a Qwen3",
        description="Turns a Qwen3 or Qwen3-MoE into a hybrid of Gated DeltaNet and attention.",
    )
    command.add_argument("source", help="directory of the Qwen3, or hf://owner/name")
    command.add_argument("target", help="directory to write")
    command.add_argument("--config", help="JSON file with fields of CrossArchTransferConfig")
    command.add_argument("--calibration", help=".npy file with token ids (rows, tokens) to fit on")
    command.add_argument("--dtype", help="dtype policy of the hybrid, such as bfloat16")
    command.add_argument("--format", choices=FORMATS, default="preset", help="layout of the target")
    return command


def run(arguments: Any) -> None:
    """Converts and saves."""
    check_target(arguments.target, arguments.source)
    config = CrossArchTransferConfig()
    if arguments.config is not None:
        config = CrossArchTransferConfig.from_dict(read_settings(arguments.config))
    calibration = None
    if arguments.calibration is not None:
        calibration = np.asarray(read_tokens(arguments.calibration))
    model = transfer_qwen3_to_hybrid(arguments.source, config, calibration, dtype=arguments.dtype)
    getattr(model, FORMATS[arguments.format])(arguments.target)


def read_settings(path: str) -> Any:
    """What a JSON file holds; `ValueError` that names it where there is none."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"`--config` must be a JSON file. Received: {path}")
    require_regular(file)
    return read_json(file)
