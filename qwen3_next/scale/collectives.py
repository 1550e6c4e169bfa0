"""What the devices of a compiled program say to one another.

Read from the optimised HLO: every operation in which devices take part together, how often it runs,
over which axes of the mesh, and how many bytes each of them receives.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
WIDE_BYTES = {"f64": 8, "s64": 8, "u64": 8, "c64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*?body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|called_computations)=\{?([^,}\s]+(?:, %[\w.\-]+)*)"
)
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """Operations of a kind at one place of a program.

    Attributes:
        kind: One of `KINDS`.
        axes: Names of the mesh axes along which devices take part.
        place: Where in the model, with numbers of layers left out.
        times: How often it runs; a loop whose length only data tell counts once.
        received: Bytes that a device receives, all runs together.
        largest: Bytes of the largest array that it yields.
    """

    kind: str
    axes: tuple[str, ...]
    place: str
    times: int
    received: float
    largest: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program, those of one kind and place together, the costliest first.

    Bytes are those of algorithms that move the least: of n devices, (n - 1) / n of what a gather
    or a scatter yields or takes as a whole, and twice that for a sum that all of them get.

    Args:
        text: `compiled.as_text()` of a JAX program.
        mesh: Sizes of the mesh axes by name, in their order.
    """
    parts = _computations(text)
    runs = _runs(parts)
    found: dict[tuple, list] = collections.defaultdict(lambda: [0, 0.0, 0])
    for name, lines in parts.items():
        for line in lines:
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            kind, sizes = operation[2], [_bytes(*a) for a in _ARRAY.findall(operation[1])]
            group = _group(line, mesh)
            total = found[kind, _axes(group, mesh), _place(line)]
            total[0] += runs[name]
            total[1] += runs[name] * _received(kind, sum(sizes), len(group))
            total[2] = max(total[2], *sizes)
    rows = [Collective(*key, *values) for key, values in found.items()]
    return sorted(rows, key=lambda row: -row.received)


def largest_arrays(text: str) -> dict[tuple[int, ...], int]:
    """Bytes of every shape of array that a program makes, the largest first."""
    found: dict[tuple[int, ...], int] = {}
    for dtype, shape in _ARRAY.findall(text):
        dims = tuple(int(n) for n in shape.split(",") if n)
        found[dims] = max(found.get(dims, 0), _bytes(dtype, shape))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation; those of the entry are under `""`."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            lines = found.setdefault("" if head[1] else head[2], [])
        else:
            lines.append(line)
    return found


def _runs(parts: dict[str, list[str]]) -> dict[str, int]:
    """How often every computation runs."""
    runs: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called, trips in _calls(parts.get(name, ())):
            visit(called, times * trips)

    visit("", 1)
    return runs


def _calls(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        loop = _WHILE.search(line)
        if loop is not None:
            trips = _TRIPS.search(line)
            yield loop[1], int(trips[1]) if trips else 1
        elif _OPERATION.match(line) is None:
            for names in _CALLED.findall(line):
                for name in names.split(", "):
                    yield name.lstrip("%"), 1


def _bytes(dtype: str, shape: str) -> int:
    item = ITEM_BYTES.get(dtype, WIDE_BYTES.get(dtype, 4))
    return item * math.prod(int(n) for n in shape.split(",") if n)


def _group(line: str, mesh: Mapping[str, int]) -> list[int]:
    """Numbers of the devices of the first group."""
    listed, iota, named = _LISTED.search(line), _IOTA.search(line), _NAMED.search(line)
    if listed is not None:
        return [int(n) for n in listed[1].split("}")[0].lstrip("{").split(",")]
    if iota is not None:
        return _numbers(iota[2], iota[3]).reshape(_ints(iota[1]))[0].tolist()
    if named is not None:
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", named[1])}
        whole = str(math.prod(sizes.values()))
        numbers = _numbers(named[2] or whole, named[3]).reshape(tuple(sizes.values()))
        taking_part = named[4].split(",")
        if set(taking_part) <= set(sizes):
            first = tuple(slice(None) if name in taking_part else 0 for name in sizes)
            return numbers[first].ravel().tolist()
    elif "replica_groups={}" in line:
        return list(range(math.prod(mesh.values())))
    if "collective-permute" in line:
        return [0, 1]  # pairs: each receives what one other has
    raise ValueError(f"Groups of devices that are not understood. Received: {line.strip()[:400]}")


def _numbers(dims: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(name for name, row in zip(mesh, places) if len(set(row.tolist())) > 1)


def _received(kind: str, size: int, devices: int) -> float:
    others = (devices - 1) / devices
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":  # of which a device yields one part
        return size * devices * others
    return size * others * (2 if kind == "all-reduce" else 1)


def _place(line: str) -> str:
    name = re.search(r'op_name="([^"]*)"', line)
    if name is None:
        return ""
    backward = " (backward)" if "transpose(" in name[1] else ""
    inside = name[1].partition("/")[2]  # of the function that was compiled
    several = re.sub(r"(transpose|jvp|jit|vmap)\(|[()]", "", inside).split(":")
    parts = [[p for p in one.split("/") if p not in _UNTOLD] for one in several]
    places = dict.fromkeys(
        "/".join(re.sub(r"_\d+$", "", part) for part in one[:-1]) for one in parts
    )
    return " + ".join(list(places)[:2]) + (" + ..." if len(places) > 2 else "") + backward


_UNTOLD = {"function", "shard_map", "while", "body", "closed_call", "checkpoint", ""}
