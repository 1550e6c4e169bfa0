"""What became of the tensors of a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass

MOST_NAMES = 10


@dataclass(frozen=True)
class CoverageReport:
    """What became of the tensors of a checkpoint and the variables of a model.

    Attributes:
        copied: Paths of variables that are a tensor as it stands.
        transformed: Paths of variables that are tensors laid out anew.
        initialised: Paths of variables that the checkpoint has nothing for, which keep their
            values.
        unused: For every tensor that was not needed, the reason.
    """

    copied: tuple[str, ...]
    transformed: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.copied)} copied, {len(self.transformed)} transformed"]
        for name in ("initialised", "unused"):
            names = getattr(self, name)
            lines.append(f"{len(names)} {name}" + (f": {listed(names)}" if names else ""))
        reasons = sorted(set(self.unused.values()))
        return ", ".join(lines) + (f" ({'; '.join(reasons)})" if reasons else "")


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
