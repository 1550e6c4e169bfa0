"""Composition of permutations: a generated task that takes as many steps as it has factors.

A token either sets the state, one of N points, or is one of M fixed permutations of the points,
drawn once for all, which moves it. The label of a token is the state that it leaves behind:

    token      3      f        g          h        0      g    ...
    label      3     f(3)   g(f(3))  h(g(f(3)))    0    g(0)   ...
    steps      0      1        2          3        0      1

The difficulty of a token is the number of permutations since the state was set. Permutations are
bijections and all starts are equally likely, so whoever misses a start or a single factor is left
with chance, 1 / N.
"""

import math
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    """Sizes of the task.

    Attributes:
        points: N, states.
        permutations: M, tokens that move the state.
        length: Tokens per row.
    """

    points: int = 5
    permutations: int = 16
    length: int = 24

    @property
    def vocab_size(self):
        """Tokens below `points` set the state, the others move it."""
        return self.points + self.permutations

    def tables(self):
        """`(permutations, points)`: where each permutation moves each point; no two are equal."""
        if self.permutations > math.factorial(self.points):
            raise ValueError(
                f"`points` has fewer permutations than `permutations`. Received: {self}"
            )
        rng = np.random.default_rng(7)
        found = {}
        while len(found) < self.permutations:
            found[tuple(rng.permutation(self.points).tolist())] = None
        return np.array(list(found), "int32")


class Rows(NamedTuple):
    """Rows of a task, all `(rows, length)` int32.

    Attributes:
        token_ids: Tokens.
        labels: The state behind every token, lined up with the logits.
        steps: Difficulty of every token, the permutations since the state was set.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    steps: np.ndarray


def compositions(rows, steps, *, seed, held_out=False, task=Task()):  # noqa: B008
    """Draws rows of words, each a start and so many permutations as one of `steps` says.

    The token ids of training rows have an even sum, those of held-out rows an odd one, so no row is
    in both.
    """
    steps = np.atleast_1d(steps)
    if steps.min() < 0:
        raise ValueError(f"`steps` must be at least 0. Received: steps={steps}")
    rng = np.random.default_rng(seed)
    drawn = _words(rng, 3 * rows + 64, steps, task)  # half of them have the right sum
    kept = np.flatnonzero(drawn.token_ids.sum(1) % 2 == held_out)[:rows]
    return Rows(*(array[kept] for array in drawn))


def accuracy_by_steps(logits, rows):
    """`{steps: share of right answers}` of `(rows, length, vocab)` logits."""
    right = np.argmax(logits, axis=-1) == rows.labels
    return {int(steps): float(right[rows.steps == steps].mean()) for steps in np.unique(rows.steps)}


def _words(rng, rows, steps, task):
    tables = task.tables()
    token_ids, labels, taken = (np.zeros((rows, task.length), "int32") for _ in range(3))
    state, step, left = (np.zeros(rows, "int32") for _ in range(3))
    for place in range(task.length):
        begins = left == 0
        left = np.where(begins, rng.choice(steps, rows), left - 1)
        step = np.where(begins, 0, step + 1)
        start, move = rng.integers(task.points, size=rows), rng.integers(len(tables), size=rows)
        state = np.where(begins, start, tables[move, state])
        token_ids[:, place] = np.where(begins, start, task.points + move)
        labels[:, place], taken[:, place] = state, step
    return Rows(token_ids, labels, taken)
