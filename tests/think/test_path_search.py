"""The tree of routes against its definitions, and the search of a model's routes with its file."""

import functools
import math

import numpy as np
import pytest

from qwen3_next import FoundPath, FoundPaths, Qwen3Next, search_paths
from qwen3_next.think.path_tree import Node, PathTree, moves, ucb
from tests.support.small_models import random_ids, small

FULL = (1,) * 6
SEEDS = range(20)


def tree(num_layers=6, seed=0, exploration=1.8, length_penalty=3.0, random_moves=0.1):
    rng = np.random.default_rng(seed)
    return PathTree(num_layers, exploration, length_penalty, random_moves, rng)


def grown(reward, seed, simulations=50):
    """The tree of a search as `search_paths` does it, with a reward that is a function."""
    found = tree(seed=seed)
    found.record(FULL, reward(FULL))
    for _ in range(simulations):
        if found.is_done():
            break
        route = found.propose()
        found.record(route, reward(route))
    return found


def test_the_bound_is_that_of_its_definition():
    parent = Node((1, 1, 1, 1), visits=9)
    node = Node((1, 0, 2, 0), parent, visits=4, reward=3.0)
    expected = 3 / 4 + 1.8 * math.sqrt(math.log(9) / 4) - 0.5 * 3 / 4
    assert ucb(node, 1.8, 0.5) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="root"):
        ucb(parent, 1.8, 0.5)


def test_moves_skip_one_layer_or_two_in_a_row_or_repeat_one():
    assert sorted(moves((1, 2, 0, 1))) == [
        (0, 0, 0, 1),
        (0, 2, 0, 1),
        (1, 0, 0, 1),
        (1, 2, 0, 0),
        (1, 2, 0, 2),
        (2, 2, 0, 1),
    ]
    assert moves((0, 0)) == []


def test_a_route_is_proposed_once_and_is_a_move_from_one_that_was_tried():
    found, proposed = tree(), [FULL]
    found.record(FULL, False)
    for _ in range(50):
        route = found.propose()
        assert any(route in moves(before) for before in proposed)
        found.record(route, False)
        proposed.append(route)
    assert len(set(proposed)) == 51


def test_visits_and_rewards_count_for_all_above():
    def below(node):
        return [node, *(one for child in node.children for one in below(child))]

    found = grown(lambda route: route[0] == 1 and sum(route) > 4, seed=0)
    assert set(found.rewards.values()) == {True, False}
    for node in found.nodes.values():
        assert node.visits == len(below(node))
        assert node.reward == sum(found.rewards[one.route] for one in below(node))


def full_of_children(random_moves, seed):
    """A tree whose root must not get one more child."""
    found = tree(seed=seed, random_moves=random_moves)
    found.record(FULL, False)
    while len(found.root.children) <= 2 * math.sqrt(found.root.visits):
        route = found.propose()
        assert found.nodes[route].parent is found.root
        found.record(route, route[5] == 1)
    return found


def goes_on_with_the_best(random_moves, seed):
    found = full_of_children(random_moves, seed)
    best = max(found.root.children, key=lambda node: ucb(node, 1.8, 3.0))
    return found.nodes[found.propose()].parent is best


def test_the_child_with_the_largest_bound_goes_on_or_a_random_one():
    assert all(goes_on_with_the_best(0.0, seed) for seed in SEEDS)
    assert sum(goes_on_with_the_best(1.0, seed) for seed in SEEDS) < len(SEEDS) / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_harmful_layer_or_one_that_must_run_twice_is_found(seed):
    found = grown(lambda route: route[2] == 0 or route[4] == 2, seed)
    best = found.best()
    assert best[2] == 0 or best[4] == 2
    assert len(found.rewards) <= 51


@pytest.mark.parametrize("seed", SEEDS)
def test_a_harmful_layer_and_one_that_must_run_twice_are_found_with_more_simulations(seed):
    best = grown(lambda route: route[2] == 0 and route[4] == 2, seed, simulations=200).best()
    assert best[2] == 0 and best[4] == 2


def test_a_right_full_path_is_left_for_one_that_saves_two_passes():
    for seed in SEEDS:
        found = grown(lambda route: route[0] == 1 and route[5] == 1, seed)
        assert sum(found.best()) <= 4
        *before, last = found.rewards
        assert last == found.best() and all(sum(r) > 4 or not found.rewards[r] for r in before)


def test_the_search_stops_early_by_its_rules():
    wrong = tree()
    wrong.record(FULL, False)
    assert not wrong.is_done()
    wrong.rewards[(1, 1, 1, 1, 1, 2)] = True  # any right path will do
    assert wrong.is_done()
    right = tree()
    right.record(FULL, True)
    for route, done in (((0, 1, 1, 1, 1, 1), False), ((0, 0, 1, 1, 1, 1), True)):
        right.rewards[route] = True
        assert right.is_done() is done


def test_the_best_route_is_the_shortest_then_the_full_path_then_that_with_the_fewest_layers():
    found = tree(4)
    found.record((1, 1, 1, 1), False)
    assert found.best() is None
    for route in ((2, 1, 1, 1), (0, 1, 1, 2), (1, 1, 1, 1), (1, 1, 1, 0), (2, 1, 0, 0)):
        found.rewards[route] = True
        assert found.best() == route
    for route in ((1, 1, 0, 1), (1, 1, 1, 1), (0, 0, 2, 2)):
        found.rewards[route] = True
        assert found.best() == (2, 1, 0, 0)
    found.rewards[(0, 0, 0, 0)] = False
    assert found.best() == (2, 1, 0, 0)


# One layer before two that think, all of one kind: little to compile.
ETD = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 0}
ETD |= {"max_think_iterations": 1, "adaptive_depth": False}
ATTENTION = {"layer_types": ("full_attention",) * 3, "num_experts": 0, "mlp_only_layers": ()}
PROMPTS = [random_ids(length, seed=length).tolist() for length in (5, 3, 4)]


@functools.cache
def model():
    return small(etd={**ETD, "use_layer_router": True}, **ATTENTION)


@functools.cache
def answers(route):
    found, _ = model().generate(PROMPTS, 1, route=np.array(route), use_speculative=False)
    return np.concatenate(found).tolist()


def planted(number, tokens):
    """Right is what the model says on a route of its own for each prompt."""
    return bool(tokens[0] == answers([(0, 1), (1, 1), (2, 0)][number])[number])


def search(checker=planted, prompts=PROMPTS, **changes):
    options = {"max_new_tokens": 1, "simulations": 6, "batch_size": 2, "verbose": 0, **changes}
    return search_paths(options.pop("model", model()), prompts, checker, **options)


def fails(number, tokens):
    raise AssertionError(f"prompt {number} was searched again")


def test_routes_that_answer_rightly_are_found_in_a_model():
    assert len(set(answers((0, 1)) + answers((1, 1)) + answers((2, 0)))) > 3
    found = search(simulations=30)
    assert [path.prompt for path in found.paths] == [tuple(prompt) for prompt in PROMPTS]
    for number, path in enumerate(found.paths):
        right = [planted(number, [answers(route)[number]]) for route in ((1, 1), path.route)]
        assert right == [path.full_is_right, True]
    assert found.paths[1].full_is_right and not found.paths[0].full_is_right
    assert len(found.solved) == 3


def test_every_prompt_is_checked_on_the_tokens_of_its_own_answer():
    seen = []

    def note(number, tokens):
        seen.append((number, tokens.tolist()))
        return False

    found = search(note, simulations=1, early_stop=False)
    assert seen[:2] == [(0, answers((1, 1))[:1]), (1, answers((1, 1))[1:2])]
    assert sorted(number for number, _ in seen) == [0, 0, 1, 1, 2, 2]
    assert [path.tried for path in found.paths] == [2, 2, 2]
    assert found.solved == []


def test_a_file_is_continued_without_generating_again(tmp_path):
    path, asked = tmp_path / "paths.jsonl", []

    def note(number, tokens):
        asked.append(number)
        return planted(number, tokens)

    first = search(path=path)
    assert search(fails, path=path) == first
    text = path.read_text()
    path.write_text(text[:-9])  # the last line was cut off
    assert search(note, path=path) == first
    assert set(asked) == {2}
    assert path.read_text() == text


def test_a_file_of_settings_from_numpy_is_continued(tmp_path):
    path = tmp_path / "paths.jsonl"
    first = search(path=path, seed=np.int64(1), length_penalty=np.float32(2))
    assert search(fails, path=path, seed=1, length_penalty=2.0) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"simulations": 7},
        {"length_penalty": 2.0},
        {"early_stop": False},
        {"max_new_tokens": 2},
        {"stop_token_ids": [4]},
        {"prompts": PROMPTS[::-1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_file_of_another_search_is_refused(tmp_path, changes):
    path = tmp_path / "paths.jsonl"
    search(path=path)
    text = path.read_text()
    with pytest.raises(ValueError, match=r"other prompts, settings or models.*paths\.jsonl"):
        search(fails, path=path, **changes)
    assert path.read_text() == text


def test_a_file_is_of_the_weights_that_answered_whatever_routers_have_learned_since(tmp_path):
    path = tmp_path / "paths.jsonl"
    first = search(path=path)
    kernels = model().backbone.think_loop.routers[0].weights[0], model().lm_head.kernel
    before = [kernel.numpy() for kernel in kernels]
    try:
        kernels[0].assign(before[0] + 1.0)
        assert search(fails, path=path) == first
        kernels[1].assign(before[1] * 1.01)
        with pytest.raises(ValueError, match=r"other prompts, settings or models"):
            search(fails, path=path)
    finally:
        for kernel, value in zip(kernels, before):
            kernel.assign(value)


def test_a_file_of_another_configuration_of_the_same_weights_is_refused(tmp_path):
    path = tmp_path / "paths.jsonl"
    search(path=path)
    other = small(etd={**ETD, "use_layer_router": True, "max_think_iterations": 3}, **ATTENTION)
    other.set_weights(model().get_weights())
    with pytest.raises(ValueError, match=r"other prompts, settings or models"):
        search(fails, path=path, model=other)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("nothing of ours\n", "[1]\n", '{"a": 1}\n{"number": 0}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes\.txt"):
            search(fails, path=path)
        assert path.read_text() == text


@pytest.mark.parametrize("answer", [None, 1, "yes"])
def test_a_checker_must_answer_with_a_bool(answer):
    with pytest.raises(ValueError, match=f"`checker` must return a bool.*{answer!r} for prompt 0"):
        search(lambda number, tokens: answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checker": None}, "`checker` must be a function"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"simulations": 0}, "`simulations`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"seed": -1}, "`seed`"),
        ({"exploration": -1.0}, "`exploration`"),
        ({"length_penalty": float("nan")}, "`length_penalty`"),
        ({"random_moves": 1.5}, "`random_moves`"),
        ({"early_stop": 1}, "`early_stop`"),
        ({"verbose": 3}, "`verbose`"),
        ({"prompts": [[61]]}, "vocab_size=61"),
        ({"stop_token_ids": [2.7]}, "`stop_token_ids` must be"),
        ({"stop_token_ids": [True]}, "`stop_token_ids` must be"),
        ({"stop_token_ids": "12"}, "`stop_token_ids` must be"),
        ({"stop_token_ids": 5}, "`stop_token_ids` must be"),
        ({"stop_token_ids": [61]}, "`stop_token_ids` must be"),
        ({"path": 5}, "`path` must be a path"),
        ({"path": ""}, "`path` must be a path"),
        ({"path": "."}, "`path` must be a path"),
        ({"path": "no/such/paths.jsonl"}, "`path` must be a path .* folder that exists"),
        ({"model": object()}, "`model` must be a `Qwen3Next`.*object"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        search(**changes)


def test_a_search_that_is_refused_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="`think_iterations` must be"):
        search(path=tmp_path / "paths.jsonl", think_iterations=9)
    assert not any(tmp_path.iterdir())


def test_a_model_without_routers_is_refused():
    for etd in (None, ETD):
        with pytest.raises(ValueError, match=r"layer routers.*use_layer_router=True"):
            search(model=small(Qwen3Next, etd=etd, **ATTENTION))


def found_by_hand():
    return FoundPaths(
        (
            FoundPath((7, 8), True, (0, 1, 0), 4),
            FoundPath((1,), False, None, 9),
            FoundPath((5, 6, 7), False, (1, 2, 1), 3),
        ),
        num_layers=3,
    )


def test_the_summary_counts():
    found = found_by_hand()
    assert str(found) == (
        "3 prompts: 1 right on the full path, 2 on the best route, "
        "which saves 0.50 of 3 passes on average"
    )
    assert found.action_counts() == [2, 3, 1]
    assert "0 on the best route, which saves 0.00" in str(FoundPaths(found.paths[1:2], 3))


def test_routers_learn_from_what_was_solved():
    x, y = found_by_hand().training_data()
    assert x["token_ids"].tolist() == [[7, 8, 0], [5, 6, 7]]
    assert x["padding_mask"].tolist() == [[True, True, False], [True] * 3]
    assert y.tolist() == [[0, 1, 0], [1, 2, 1]] and y.dtype == "int32"
    assert found_by_hand().training_data(max_length=5)[0]["token_ids"].shape == (2, 5)
    unsolved = FoundPaths(found_by_hand().paths[1:2], 3)
    assert unsolved.routes.shape == (0, 3)
    with pytest.raises(ValueError, match="nothing to learn"):
        unsolved.training_data()


def test_all_routes_are_tried_if_there_are_simulations_enough():
    found = tree(2)
    found.record((1, 1), False)
    while (route := found.propose()) is not None:
        found.record(route, False)
    assert len(found.rewards) == 9


def test_a_file_of_something_else_without_a_last_newline_stays_as_it_is(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"config\.json"):
        search(fails, path=path)
    assert path.read_text() == '{"a": 1}'
