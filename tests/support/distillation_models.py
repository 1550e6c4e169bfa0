"""A small teacher and small students, and a batch for them."""

import numpy as np

from qwen3_next import pad
from tests.support.small_models import random_ids, small

DENSE = {"num_layers": 1, "num_experts": 0, "mlp_only_layers": ()}
IDS = random_ids(4, 12)
LENGTHS = (12, 7, 9, 4)


def softmax_teacher(**changes):
    """One layer of attention, of another width than the students."""
    layer_types = ("full_attention",)
    return small(**{**DENSE, "layer_types": layer_types, "hidden_size": 16, **changes})


def linear_student(**changes):
    """One layer of linear attention."""
    return small(**{**DENSE, "layer_types": ("linear_attention",), **changes})


def batch(side="right", length=None):
    """Rows of different lengths, `(inputs, labels that line up with the logits)`."""
    rows = [row[:count] for row, count in zip(IDS, LENGTHS)]
    labels = [np.where(np.arange(len(row)) % 4 == 1, -100, np.roll(row, -1)) for row in rows]
    aligned = pad([label + 100 for label in labels], length, side)
    aligned = np.where(aligned["padding_mask"], aligned["token_ids"] - 100, -100)
    return pad(rows, length, side), aligned.astype("int32")


def values(model):
    """The weights of a model as NumPy arrays by path."""
    return {v.path: np.array(v.numpy()) for v in model.weights}


TWO = {**DENSE, "num_layers": 2, "hidden_size": 24}
TEACHER_TYPES = ("full_attention", "full_attention")
STUDENT_TYPES = ("full_attention", "linear_attention")


def two_layers():
    teacher = softmax_teacher(**TWO, layer_types=TEACHER_TYPES)
    return teacher, linear_student(**TWO, layer_types=STUDENT_TYPES)
