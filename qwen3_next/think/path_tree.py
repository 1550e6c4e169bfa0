"""Monte Carlo tree search over routes through the think layers, for one prompt.

The root is the full path, every layer once. A move skips one layer or two in a row, or repeats one.
Children are chosen by

    UCB = Q / v + c sqrt(ln V / v) - lambda |path| / L

with Q the sum of rewards below a child, v its visits, V those of its parent, |path| the passes and
L the layers: short paths first. A node gets a new child as long as it has at most
`WIDENING sqrt(visits)` of them, so that few simulations still go deeper than one move.

Reference: Dr.LLM, arXiv 2510.12773, section 3.
"""

import math
from dataclasses import dataclass, field
from typing import Any

Route = tuple[int, ...]
WIDENING = 2.0


@dataclass(eq=False)
class Node:
    """A route and what is known of it.

    Attributes:
        route: An action per think layer, 0, 1 or 2.
        parent: The node that it was moved from, `None` for the root.
        children: The nodes that it was moved to.
        visits: Simulations through it.
        reward: Sum of their rewards.
        exhausted: Whether no route is left to try below it.
    """

    route: Route
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0
    exhausted: bool = False


def ucb(node: Node, exploration: float, length_penalty: float) -> float:
    """The upper confidence bound of a node that was visited, less the price of its length."""
    if node.parent is None:
        raise ValueError("The root is not chosen. Received: a node without a parent")
    bound = exploration * math.sqrt(math.log(node.parent.visits) / node.visits)
    length = sum(node.route) / len(node.route)
    return node.reward / node.visits + bound - length_penalty * length


def moves(route: Route) -> list[Route]:
    """The routes one move away: a layer or two in a row less, or one that runs twice."""
    found = []
    for count in (1, 2):
        for start in range(len(route) - count + 1):
            if all(route[start : start + count]):
                skipped = [0] * count
                found.append((*route[:start], *skipped, *route[start + count :]))
    for place, action in enumerate(route):
        if action == 1:
            found.append((*route[:place], 2, *route[place + 1 :]))
    return found


class PathTree:
    """The search for one prompt: `propose` a route, find out its reward, `record` it.

    Args:
        num_layers: Think layers.
        exploration: c.
        length_penalty: lambda.
        random_moves: Probability of going on to a random child in place of the best one.
        rng: `numpy.random.Generator`.

    Example:

    ```python
    import numpy as np
    from qwen3_next.think.path_tree import PathTree

    tree = PathTree(4, 1.8, 3.0, 0.1, np.random.default_rng(0))
    tree.record((1, 1, 1, 1), False)
    for _ in range(20):
        route = tree.propose()
        tree.record(route, route[2] == 0)  # the third layer does harm
    assert tree.best()[2] == 0
    ```
    """

    def __init__(
        self,
        num_layers: int,
        exploration: float,
        length_penalty: float,
        random_moves: float,
        rng: Any,
    ) -> None:
        self.exploration = exploration
        self.length_penalty = length_penalty
        self.random_moves = random_moves
        self.rng = rng
        self.root = Node((1,) * num_layers)
        self.nodes = {self.root.route: self.root}
        self.rewards: dict[Route, bool] = {}

    def propose(self) -> Route | None:
        """A route that was not tried yet; `None` where all were."""
        node = self.root
        while not self.root.exhausted:
            untried = [route for route in moves(node.route) if route not in self.nodes]
            going = [child for child in node.children if not child.exhausted]
            if untried and (not going or len(node.children) <= WIDENING * math.sqrt(node.visits)):
                child = Node(untried[self.rng.integers(len(untried))], node)
                node.children.append(child)
                self.nodes[child.route] = child
                return child.route
            if not going:
                node.exhausted, node = True, self.root
            elif self.rng.random() < self.random_moves:
                node = going[self.rng.integers(len(going))]
            else:
                node = max(going, key=self._bound)
        return None

    def record(self, route: Route, reward: bool) -> None:
        """Notes the reward of a route that was proposed, or of the full path."""
        self.rewards[route] = reward
        node: Node | None = self.nodes[route]
        while node is not None:
            node.visits += 1
            node.reward += float(reward)
            node = node.parent

    def best(self) -> Route | None:
        """The shortest route with a reward, of equally long ones the full path, else that with the
        fewest layers. `None` where no route had one."""
        found = [route for route, reward in self.rewards.items() if reward]

        def cost(route: Route) -> tuple[int, bool, int]:
            return sum(route), route != self.root.route, sum(map(bool, route))

        return min(found, key=cost, default=None)

    def is_done(self) -> bool:
        """Whether enough is found: a right path where the full one is wrong, else a right one with
        two passes fewer."""
        best = self.best()
        if best is None:
            return False
        if not self.rewards[self.root.route]:
            return True
        return sum(best) <= sum(self.root.route) - 2

    def _bound(self, node):
        return ucb(node, self.exploration, self.length_penalty)
