"""`distill`: a student learns from its teacher."""

import argparse
from typing import Any

import keras

from qwen3_next.cli.targets import check_target
from qwen3_next.cli.token_files import read_tokens
from qwen3_next.config.validation import integer, require
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.training.optimizers import GroupedAdamW
from qwen3_next.transfer.distill.distillation import DistillationTrainer


def add(commands: Any) -> Any:
    """Adds the parser of the command."""
    command = commands.add_parser(
        "distill",
        help="a student learns from its teacher",
        description="Trains a converted model on what its source does, and saves it as a preset.",
    )
    command.add_argument("teacher", help="directory of the teacher, or hf://owner/name")
    command.add_argument("student", help="directory of the student")
    command.add_argument("target", help="directory to write")
    command.add_argument("--tokens", required=True, help=".npy file, token ids (rows, tokens)")
    command.add_argument("--stage", choices=("alignment", "logits"), default="logits")
    command.add_argument("--epochs", type=int, default=1)
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--learning-rate", type=float, default=1e-4)
    command.add_argument("--temperature", type=float, help="of both softmaxes (default 2)")
    command.add_argument("--alpha", type=float, help="share of the teacher (default 0.5)")
    command.add_argument("--dtype", help="dtype policy of both, such as mixed_bfloat16")
    command.add_argument("--seed", type=int, default=0)
    return command


def run(arguments: argparse.Namespace) -> None:
    """Trains and saves."""
    check_target(arguments.target, arguments.teacher, arguments.student)
    tokens = read_tokens(arguments.tokens)
    for name, low in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
        require(integer(low), name, getattr(arguments, name))
    keras.utils.set_random_seed(arguments.seed)
    teacher, student = (
        Qwen3Next.from_preset(name, dtype=arguments.dtype)
        for name in (arguments.teacher, arguments.student)
    )
    options = {"temperature": arguments.temperature, "alpha": arguments.alpha}
    given = {name: value for name, value in options.items() if value is not None}
    trainer = DistillationTrainer(teacher, student, stage=arguments.stage, **given)
    trainer.compile(GroupedAdamW(arguments.learning_rate))
    trainer.fit(tokens, batch_size=arguments.batch_size, epochs=arguments.epochs)
    student.save_to_preset(arguments.target)
