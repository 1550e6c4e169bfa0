"""Finds for every prompt a route through the think layers that answers it better or cheaper."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from qwen3_next.checkpoints.staging import FILE
from qwen3_next.config.etd_config import FRACTION
from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    Rule,
    integer,
    require,
    shown,
)
from qwen3_next.generation.prompts import read_prompts
from qwen3_next.models.inputs import token_id_list
from qwen3_next.models.values import checksum
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.think.path_tree import PathTree
from qwen3_next.training.data import pad

VERBOSE = Rule("0, 1 or 2", lambda value: type(value) is int and 0 <= value <= 2)


@dataclasses.dataclass(frozen=True)
class FoundPath:
    """What the search found for one prompt.

    Attributes:
        prompt: Its token ids.
        full_is_right: Whether the full path, every layer once, answers it rightly.
        route: The best route found, or `None` where none answers it rightly.
        tried: Routes that were tried, the full path among them.

    Example:

    ```python
    from qwen3_next import FoundPath

    path = FoundPath(prompt=(1, 2), full_is_right=True, route=(1, 0), tried=9)
    assert sum(path.route) == 1
    ```
    """

    prompt: tuple[int, ...]
    full_is_right: bool
    route: tuple[int, ...] | None
    tried: int


@dataclasses.dataclass(frozen=True)
class FoundPaths:
    """What the search found for all prompts, in their order; `print` it for a summary.

    Attributes:
        paths: One `FoundPath` per prompt.
        num_layers: Think layers L.

    Example:

    ```python
    from qwen3_next import FoundPath, FoundPaths

    paths = FoundPaths((FoundPath((1, 2), False, (2, 0), 9), FoundPath((3,), False, None, 9)), 2)
    assert paths.action_counts() == [1, 0, 1] and len(paths.solved) == 1
    ```
    """

    paths: tuple[FoundPath, ...]
    num_layers: int

    @property
    def solved(self) -> list[FoundPath]:
        """Those with a route: what routers can learn from."""
        return [path for path in self.paths if path.route is not None]

    @property
    def routes(self) -> np.ndarray:
        """Labels for the routers, `(solved prompts, L)` int32."""
        return np.array([path.route for path in self.solved], "int32").reshape(-1, self.num_layers)

    def action_counts(self) -> list[int]:
        """How often the routes skip, run and repeat a layer."""
        return np.bincount(self.routes.reshape(-1), minlength=3).tolist()

    def training_data(self, max_length: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
        """`(x, y)` for `RouterTrainer.fit`: the solved prompts, padded, and their routes."""
        if not self.solved:
            raise ValueError("No prompt was answered rightly on any route: nothing to learn from")
        prompts = [list(path.prompt) for path in self.solved]
        longest = max(map(len, prompts)) if max_length is None else max_length
        return dict(pad(prompts, longest)), self.routes

    def __str__(self) -> str:
        count, solved = len(self.paths), self.solved
        right = sum(path.full_is_right for path in self.paths)
        saved = self.num_layers - (self.routes.sum(1).mean() if solved else self.num_layers)
        return (
            f"{count} prompts: {right} right on the full path, {len(solved)} on the best route, "
            f"which saves {saved:.2f} of {self.num_layers} passes on average"
        )


def search_paths(
    model: Qwen3Next,
    prompts: Iterable,
    checker: Callable[[int, np.ndarray], bool],
    *,
    max_new_tokens: int = 16,
    simulations: int = 50,
    exploration: float = 1.8,
    length_penalty: float = 3.0,
    random_moves: float = 0.1,
    early_stop: bool = True,
    batch_size: int = 16,
    think_iterations: int | None = None,
    stop_token_ids: Iterable[int] = (),
    seed: int = 0,
    path: str | Path | None = None,
    verbose: int = 1,
) -> FoundPaths:
    """Searches for every prompt the shortest route through the think layers that is right.

    Monte Carlo tree search, see `think.path_tree`: every simulation generates the greedy answer on
    one more route. The prompts of a batch are searched side by side, each on routes of its own, so
    that the search compiles as much as a call of `generate` does.

    Args:
        model: `Qwen3Next` with layer routers, which are not asked.
        prompts: Token-id sequences, as for `generate`.
        checker: `checker(number of the prompt, new tokens) -> bool`, whether an answer is right.
        max_new_tokens: Most tokens of an answer.
        simulations: Routes per prompt beside the full path.
        exploration, length_penalty, random_moves: c, lambda and the share of random choices.
        early_stop: Whether to be content with the first right route where the full path is wrong,
            else with the first that saves two passes.
        batch_size: Prompts that are searched side by side.
        think_iterations: Iterations of the think loop, `None` for the configuration's.
        stop_token_ids: Tokens that end an answer.
        seed: Seed of the choices.
        path: File with one JSON line per prompt. What it holds already is not searched again; it
            must be of the same prompts, settings and model. `None` for none.
        verbose: 0 for silence, 1 for a progress bar, 2 for a line at the end.

    Returns:
        `FoundPaths`.

    Raises:
        ValueError: a model without layer routers, no checker, an argument out of range, or a file
            of another search.

    Reference: Dr.LLM, arXiv 2510.12773, section 3.

    Example:

    ```python
    from qwen3_next import ETDConfig, Qwen3Next, search_paths

    etd = ETDConfig(1, 2, 1, max_think_iterations=1, adaptive_depth=False, use_layer_router=True)
    model = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, num_experts=0, etd=etd
    )
    found = search_paths(
        model, [[1, 2, 3]], lambda number, tokens: tokens[0] % 2 == 0, max_new_tokens=1,
        simulations=2, batch_size=1, verbose=0,
    )
    assert len(found.paths) == 1
    ```
    """
    etd = _routed_etd(model)
    require(Rule("a function", callable), "checker", checker)
    for name, count, low in (
        ("max_new_tokens", max_new_tokens, 1),
        ("simulations", simulations, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        require(integer(low), name, count)
    for name, value in (("exploration", exploration), ("length_penalty", length_penalty)):
        require(NOT_NEGATIVE, name, value)
    require(FRACTION, "random_moves", random_moves)
    require(BOOLEAN, "early_stop", early_stop)
    require(VERBOSE, "verbose", verbose)
    stops = token_id_list("stop_token_ids", stop_token_ids, model.config.vocab_size)
    model.backbone.schedule.check_iterations(think_iterations)
    if path is not None:
        require(FILE, "path", path)
    read = read_prompts(prompts, model.config.vocab_size)
    rows = [ids[:length].tolist() for ids, length in zip(read.token_ids, read.lengths)]
    num_layers = etd.n_think_layers
    tree = (num_layers, exploration, length_penalty, random_moves)
    answers = {
        "max_new_tokens": max_new_tokens,
        "think_iterations": think_iterations,
        "stop_token_ids": stops,
    }
    settings = [*tree, simulations, early_stop, seed, answers]
    file = _ResultsFile(path, rows, settings, model)
    bar = keras.utils.Progbar(len(rows), verbose=verbose, unit_name="prompt")
    found = file.known()
    todo = [number for number in range(len(rows)) if number not in found]
    bar.update(len(found))
    for start in range(0, len(todo), batch_size):
        numbers = todo[start : start + batch_size]
        trees = {n: PathTree(*tree, np.random.default_rng([seed, n])) for n in numbers}
        width = len(rows) if len(rows) < batch_size else batch_size
        search = _Search(model, rows, checker, trees, answers, width)
        search.run(simulations, early_stop)
        for number, one in trees.items():
            full = one.rewards[one.root.route]
            result = FoundPath(tuple(rows[number]), full, one.best(), len(one.rewards))
            file.add(number, result)
            found[number] = result
        bar.update(len(found))
    return FoundPaths(tuple(found[number] for number in range(len(rows))), num_layers)


class _Search:
    """The trees of some prompts, searched side by side."""

    def __init__(self, model, rows, checker, trees, answers, width):
        self.model = model
        self.rows = rows
        self.checker = checker
        self.trees = trees
        self.answers = answers
        self.width = width  # rows of every batch, so that one program serves all

    def run(self, simulations, early_stop):
        self._try({number: tree.root.route for number, tree in self.trees.items()})
        for _ in range(simulations):
            going = {n: t for n, t in self.trees.items() if not (early_stop and t.is_done())}
            proposed = {number: tree.propose() for number, tree in going.items()}
            proposed = {number: route for number, route in proposed.items() if route is not None}
            if not proposed:
                return
            self._try(proposed)

    def _try(self, routes):
        numbers, route = list(routes), list(routes.values())
        filled = self.width - len(numbers)
        prompts = [self.rows[number] for number in [*numbers, *numbers[:1] * filled]]
        tokens, _ = self.model.generate(
            prompts,
            route=np.array([*route, *route[:1] * filled]),
            use_speculative=False,
            **self.answers,
        )
        for number, one, answer in zip(numbers, route, tokens):
            right = self.checker(number, answer)
            if not isinstance(right, bool | np.bool_):
                raise ValueError(
                    f"`checker` must return a bool. Received: {shown(right)} for prompt {number}"
                )
            self.trees[number].record(one, bool(right))


class _ResultsFile:
    """One JSON line per prompt behind a first line that says of which search they are."""

    def __init__(self, path, rows, settings, model):
        self.path = None if path is None else Path(path)
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        # JSON does not know NumPy's numbers.
        settings = json.loads(json.dumps(settings, default=lambda number: number.item()))
        self.head = {"prompts": digest, "settings": settings}
        if self.path is not None:
            self.head["checksum"] = checksum(_weights_of_answers(model), model.config.to_dict())
        self.rows = rows

    def known(self):
        """What is there already, by number of the prompt; a new file gets its first line."""
        if self.path is None:
            return {}
        head = json.dumps(self.head) + "\n"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if head.startswith(text):  # nothing there, or cut off when it was begun
            self.path.write_text(head, encoding="utf-8")
            return {}
        whole = text[: text.rfind("\n") + 1]  # without a line that was cut off
        try:
            first, *entries = map(json.loads, whole.splitlines() or [text])
            found = {entry.pop("number"): _from_json(entry, self.rows) for entry in entries}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.path} does not hold the results of a path search") from error
        if first != json.loads(head):
            raise ValueError(
                f"{self.path} is of other prompts, settings or models: continue that search, or "
                f"give another `path`. Received: path={str(self.path)!r}"
            )
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return {n: dataclasses.replace(one, prompt=tuple(self.rows[n])) for n, one in found.items()}

    def add(self, number, result):
        if self.path is None:
            return
        entry = {"number": number, **dataclasses.asdict(result)}
        del entry["prompt"]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _from_json(entry, rows):
    route = entry["route"]
    route = None if route is None else tuple(route)
    return FoundPath((), bool(entry["full_is_right"]), route, int(entry["tried"]))


def _weights_of_answers(model):
    """What answers on a given route depend on: neither layer routers, nor seeds and counters."""
    routers = {id(v) for one in model.backbone.think_loop.routers for v in one.variables}
    weights = (weight for weight in model.weights if id(weight) not in routers)
    return [weight for weight in weights if keras.backend.is_float_dtype(weight.dtype)]


def _routed_etd(model):
    if not isinstance(model, Qwen3Next):
        raise ValueError(
            "`model` must be a `Qwen3Next`, whose answers can be checked. "
            f"Received: model of type {type(model).__name__}"
        )
    etd = model.config.etd
    if etd is None or not etd.use_layer_router:
        raise ValueError(
            "`model` must have layer routers, `ETDConfig(use_layer_router=True)`; "
            f"`wrap_transformer_with_etd` adds them. Received: model.config.etd={etd}"
        )
    return etd
