"""The loop of `chunk_parallel` in one Pallas-Triton kernel.

    S, rows = step(S, links, columns)    for every chunk in turn, see `chunk_parallel`

A program of the kernel has one head and some columns of its state, which stay in registers while it
walks over the chunks. As programs of their own the ten small operations of a step take longer to
start than to run.

    over_chunks    as that of `chunk_parallel`
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from ..backend.platform import run_kernel
from ..tensor_types import Tensor
from .chunk_parallel import ChunkLinks, Step

WARPS = 4
STAGES = 1


class Products(NamedTuple):
    """How matrices of float32 are multiplied.

    Attributes:
        algorithm: A name of `jax.lax.DotAlgorithmPreset`.
        columns: Columns of the state, per program.
    """

    algorithm: str
    columns: int


FULL = Products("TF32_TF32_F32_X3", columns=32)
# One pass of tf32 keeps 10 bits of a mantissa, no fewer than outputs in half precision have.
HALF = Products("TF32_TF32_F32", columns=16)
# Triton multiplies no narrower matrices, and has only arrays whose size is a power of two.
NARROWEST = 16


def over_chunks(
    step: Step,
    state: Annotated[Tensor, "B G R K V"],
    links: ChunkLinks,
    columns: tuple[Annotated[Tensor, "N B G R ... V"], ...],
    reverse: bool = False,
    products: Products = FULL,
) -> tuple[
    Annotated[Tensor, "B G R K V"],
    Annotated[Tensor, "N B G R K V"],
    Annotated[Tensor, "N B G R C V"],
]:
    """The last state, those that the steps met, and their rows. Interpreted on a CPU."""
    *places, key_dim, value_dim = state.shape
    heads, size = math.prod(places), columns[0].shape[-2]
    given = *links, *columns, state[None]
    arrays = [_widened(x.reshape(x.shape[0], heads, *x.shape[4:])) for x in given]
    found = run_kernel(functools.partial(_run, step, reverse, products), *arrays)
    shapes = (key_dim, value_dim), (key_dim, value_dim), (size, value_dim)
    last, states, rows = (
        x[:, :heads, :height, :width].reshape(x.shape[0], *places, height, width)
        for x, (height, width) in zip(found, shapes)
    )
    return last[0], states, rows


def _run(
    step: Step,
    reverse: bool,
    products: Products,
    *arrays: Annotated[Tensor, "N H ..."],
    interpret: bool,
) -> Sequence[Tensor]:
    """The kernel, on arrays that Triton takes."""
    import jax
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    links, columns, state = arrays[:4], arrays[4:-1], arrays[-1]
    count = columns[0].shape[0]
    heads, _, value_dim = state.shape[1:]
    block = min(products.columns, value_dim)

    def spec(x: Any, by_column: bool) -> Any:
        """All chunks of a head, as a whole or some columns."""
        first, _, *matrix = x.shape
        if by_column:
            shape = first, None, matrix[0], block
            return pallas.BlockSpec(shape, lambda head, part: (0, head, 0, part))
        rest = (0,) * len(matrix)
        return pallas.BlockSpec((first, None, *matrix), lambda head, _: (0, head, *rest))

    def kernel(*refs: Any) -> None:
        *inputs, start, last, states, rows = refs

        def body(i, state):
            i = count - 1 - i if reverse else i
            states[i] = state
            xs = [x[i] for x in inputs]
            state, rows[i] = step(state, ChunkLinks(*xs[:4]), tuple(xs[4:]))
            return state

        with jax.default_matmul_precision("highest" if interpret else products.algorithm):
            last[0] = jax.lax.fori_loop(0, count, body, start[0])

    def like(x: Any, count: int) -> Any:
        return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)

    results = like(state, 1), like(state, count), like(columns[0], count)
    return pallas.pallas_call(
        kernel,
        out_shape=results,
        grid=(heads, value_dim // block),
        in_specs=[
            *(spec(x, by_column=False) for x in links),
            *(spec(x, by_column=True) for x in (*columns, state)),
        ],
        out_specs=tuple(spec(x, by_column=True) for x in results),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="chunk_states",
    )(*arrays)


def _widened(x: Annotated[Tensor, "N H ..."]) -> Annotated[Tensor, "N H ..."]:
    """Matrices with zeros up to what Triton multiplies, which read and write nothing.

    One head at least: a kernel without programs does not start.
    """
    import jax.numpy as jnp

    heads, *matrix = x.shape[1:]
    shape = max(heads, 1), *(max(NARROWEST, 1 << max(n - 1, 0).bit_length()) for n in matrix)
    return jnp.pad(x, [(0, 0), *((0, wide - n) for wide, n in zip(shape, (heads, *matrix)))])
