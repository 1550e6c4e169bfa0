"""The number of drafts follows what was measured; times are made up here."""

from types import SimpleNamespace

import pytest

from qwen3_next.generation.lookahead_choice import LookaheadChoice

PROGRAMS = ["plain", "one", "two", "three"]
TOKENS = 101


def stats(k, step_seconds, rates):
    """What a generation of one row with k drafts would return."""
    tokens_per_step = 1 + sum(rates[:k])
    row_steps = round((TOKENS - 1) / tokens_per_step)
    return {
        "finish_reasons": ["length"],
        "new_tokens": TOKENS,
        "decode_seconds": step_seconds[k] * (TOKENS - 1) / tokens_per_step,
        "drafted": row_steps * k,
        "acceptance_rate_by_position": rates[:k],
        "tokens_per_step": tokens_per_step,
    }


def run(choice, calls, step_seconds, rates):
    """Picks of some calls on a machine with these times and a text with these rates."""
    picks = []
    for _ in range(calls):
        k = choice.pick(PROGRAMS, TOKENS)
        choice.record(PROGRAMS[k], k, stats(k, step_seconds, rates))
        picks.append(k)
    return picks


def test_both_ends_are_measured_before_anything_is_chosen():
    assert run(LookaheadChoice(3), 2, [1, 1, 1, 1], [1, 1, 1]) == [0, 3]


@pytest.mark.parametrize(
    "step_seconds, rates, best",
    [
        ([1.0, 1.2, 1.4, 1.6], [0.9, 0.8, 0.7], 3),
        ([1.0, 1.9, 2.8, 3.7], [0.6, 0.4, 0.3], 0),
        ([1.0, 1.2, 1.4, 1.6], [0.9, 0.1, 0.0], 1),
        ([1.0, 1.9, 1.4, 1.6], [0.5, 0.4, 0.0], 2),
    ],
)
def test_the_least_time_per_token_is_chosen(step_seconds, rates, best):
    choice = LookaheadChoice(3)
    assert run(choice, 6, step_seconds, rates)[4:] == [best] * 2
    known = choice.known(PROGRAMS)
    assert min(known, key=known.get) == best
    assert known[best] == pytest.approx(step_seconds[best] / (1 + sum(rates[:best])))


def test_a_width_that_was_only_guessed_to_pay_is_dropped():
    # Between the ends one draft should take 1.1; it takes 3.
    picks = run(LookaheadChoice(3), 8, [1.0, 3.0, 3.0, 1.3], [0.5, 0.0, 0.0])
    assert picks == [0, 3, 1, 3, 3, 3, 3, 3]


def test_looking_again_costs_two_percent():
    step_seconds, rates = [1.0, 1.9, 2.8, 3.7], [0.0, 0.0, 0.0]
    picks = run(LookaheadChoice(3), 2000, step_seconds, rates)[2:]
    spent = sum(step_seconds[k] for k in picks)
    assert 3 in picks
    assert set(picks) == {0, 3}
    assert spent <= 1.021 * len(picks)


def test_drafts_that_come_to_pay_are_found():
    choice = LookaheadChoice(3)
    step_seconds = [1.0, 1.2, 1.4, 1.6]
    assert run(choice, 4, step_seconds, [0.0, 0.0, 0.0])[-1] == 0
    assert run(choice, 300, step_seconds, [0.9, 0.8, 0.7])[-1] == 3


def test_drafts_that_no_longer_pay_are_soon_dropped():
    choice, step_seconds = LookaheadChoice(3), [1.0, 1.2, 1.4, 1.6]
    assert run(choice, 400, step_seconds, [0.9, 0.8, 0.7])[-1] == 3
    assert run(choice, 10, step_seconds, [0.0, 0.0, 0.0])[-1] == 0


def model(variables, iterations):
    return SimpleNamespace(variables=variables, optimizer=SimpleNamespace(iterations=iterations))


def test_training_forgets_what_was_accepted_but_not_what_a_step_takes():
    choice, variables = LookaheadChoice(3), [object()]
    trained = model(variables, 0)
    choice.follow(trained)
    assert run(choice, 4, [1.0, 1.2, 1.4, 1.6], [0.0, 0.0, 0.0])[-1] == 0
    choice.follow(trained)
    assert choice.pick(PROGRAMS, TOKENS) == 0
    trained.optimizer.iterations = 5
    choice.follow(trained)
    assert choice.has_timed("plain")
    assert choice.pick(PROGRAMS, TOKENS) == 3


def test_other_variables_forget_everything():
    choice = LookaheadChoice(3)
    choice.follow(model([object()], 0))
    run(choice, 4, [1, 1, 1, 1], [1, 1, 1])
    choice.follow(model([object()], 0))
    assert not choice.known(PROGRAMS)
    assert choice.pick(PROGRAMS, TOKENS) == 0


def test_one_token_is_not_worth_a_draft():
    choice = LookaheadChoice(3)
    assert run(choice, 4, [1.0, 1.2, 1.4, 1.6], [0.9, 0.8, 0.7])[-1] == 3
    assert choice.pick(PROGRAMS, 1) == 0
