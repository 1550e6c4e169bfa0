"""The generated task of the notebook on the think loop."""

import numpy as np
import pytest

from notebooks.think_tasks import Task, accuracy_by_steps, compositions

TASK = Task(points=5, permutations=9, length=20)


def draw(rows=2000, steps=(1, 2, 3, 4), **options):
    return compositions(rows, steps, task=TASK, **{"seed": 0, **options})


def test_labels_and_difficulty_are_those_of_a_walk_token_by_token():
    tables = TASK.tables()
    for ids, labels, steps in zip(*draw(50)):
        state = step = None
        for token, label, difficulty in zip(ids, labels, steps):
            if token < TASK.points:
                state, step = token, 0
            else:
                state, step = tables[token - TASK.points][state], step + 1
            assert (label, difficulty) == (state, step)


def test_permutations_are_different_bijections():
    tables = TASK.tables()
    assert len({tuple(table) for table in tables}) == TASK.permutations
    assert (np.sort(tables, axis=1) == np.arange(TASK.points)).all()
    with pytest.raises(ValueError, match="permutations=3"):
        Task(points=2, permutations=3).tables()


def test_no_row_is_in_training_and_held_out():
    train, held_out = ({row.tobytes() for row in draw(held_out=h).token_ids} for h in (False, True))
    assert len(train) == len(held_out) == 2000
    assert not train & held_out


def test_answers_are_balanced_whatever_token_they_follow():
    rows = draw(20000)
    for steps in range(1, 5):
        here = rows.steps == steps
        for token in range(TASK.points, TASK.vocab_size):
            answers = rows.labels[here & (rows.token_ids == token)]
            counts = np.bincount(answers, minlength=TASK.points)
            expected = counts.sum() / TASK.points
            assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_words_are_as_long_as_asked_for():
    assert set(np.unique(draw(steps=(1, 3)).steps)) == {0, 1, 2, 3}
    assert draw(steps=6).steps.max() == 6
    with pytest.raises(ValueError, match="`steps`"):
        draw(steps=(-1, 2))


def test_a_seed_gives_the_same_rows_again_and_another_one_others():
    assert (draw().token_ids == draw().token_ids).all()
    assert (draw().token_ids != draw(seed=1).token_ids).any(axis=1).all()


def test_accuracy_is_counted_by_difficulty():
    rows = draw(200)
    right = np.eye(TASK.vocab_size)[rows.labels]
    right[rows.steps == 3] = 0
    right[rows.steps == 3, -1] = 1
    assert accuracy_by_steps(right, rows) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0}
