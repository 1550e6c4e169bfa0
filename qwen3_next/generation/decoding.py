"""What plain and speculative decoding share: the prefill, the first token, the loop.

A decoding method is a frozen dataclass of what is compiled into its programs, with three methods:

    init(model, caches, newest, request, new_tokens) -> carry     picks the first token
    step(model, carry, request) -> carry                          one pass through the backbone
    stats(carry) -> dict                                          counts, on the host

A carry is a named tuple with the fields `finished` `(B,)` bool, `new_tokens` `(B, M)` int32 and
`count`, how many columns of `new_tokens` are written, for all rows or for each.
"""

from typing import Annotated, Any, NamedTuple, Protocol

from keras import ops, tree
from keras.backend import standardize_dtype

from qwen3_next.generation.drafting import PendingPairs, extend_modules
from qwen3_next.generation.prompts import PrefillChunk
from qwen3_next.generation.sampling import Mode, Sampling, is_stop, sample
from qwen3_next.layers.ops import row_product
from qwen3_next.layers.ops.backend.loops import scatter_rows
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.cache import Cache, set_rows, take_rows
from qwen3_next.models.inputs import last_hidden


class Request(NamedTuple):
    """What a call asks for, as tensors: changing a value compiles nothing anew.

    Attributes:
        limit: `()` int32, most new tokens of a row.
        sampling: `Sampling`.
        drafting: `Drafting`, or `None` for plain decoding.
        turned_head: `(V, D)`, the head's kernel turned round, or `None` to take it as it is.
    """

    limit: Tensor
    sampling: Sampling
    drafting: Any = None
    turned_head: Annotated[Tensor, "V D"] | None = None

    def for_steps(self, model: Any, tokens: int, steps: int) -> "Request":
        """The same with what is made once for `steps` steps, which read `tokens` tokens each."""
        request = self
        if self.drafting is not None:
            request = request._replace(drafting=self.drafting.with_kernel(model))
        kernel, tied = model.head_kernel(), model.lm_head is None
        dtypes = {standardize_dtype(kernel.dtype), (model if tied else model.lm_head).compute_dtype}
        products = None if tied else steps  # embeddings lie turned round
        if dtypes == {"float32"} and row_product.pays_to_turn(tokens, kernel, products):
            request = request._replace(turned_head=ops.transpose(kernel))
        return request


class Caches(NamedTuple):
    """The caches of a model with its MTP modules.

    Attributes:
        model: `Cache` of the backbone.
        modules: Layer caches of the MTP modules that have attention.
    """

    model: Cache
    modules: tuple = ()


class Newest(NamedTuple):
    """Hidden states of every row's newest token.

    Attributes:
        hidden: `(B, D)`, which the head reads.
        mtp_input: `(B, D)`, which the first MTP step reads, or `None` in plain decoding.
    """

    hidden: Tensor
    mtp_input: Tensor = None


class DecodingMethod(Protocol):
    """See the module's docstring; a step may read `lookahead` tokens that it does not keep, and
    each pass has `think_iterations`, `None` for what the model is configured to."""

    @property
    def lookahead(self) -> int: ...

    @property
    def think_iterations(self) -> int | None: ...

    def init(
        self, model: Any, caches: Caches, newest: Newest, request: Request, new_tokens: Tensor
    ) -> Any: ...

    def step(self, model: Any, carry: Any, request: Request) -> Any: ...

    def stats(self, carry: Any) -> dict: ...


def prefill(
    model: Any, caches: Caches, newest: Newest, chunk: PrefillChunk
) -> tuple[Caches, Newest]:
    """Reads one chunk of the prompts, with the MTP modules where `newest` has their input."""
    if not isinstance(chunk.rows, tuple):
        own, own_newest = _taken(caches, newest, chunk.rows)
        own, own_newest = prefill(model, own, own_newest, chunk._replace(rows=()))
        return _set(caches, newest, chunk.rows, own, own_newest)
    inputs = {"token_ids": chunk.token_ids, "padding_mask": chunk.mask, **dict(chunk.decisions)}
    output = model.backbone(inputs, cache=caches.model)
    any_new = valid_lengths(chunk.mask)[:, None] > 0
    hidden = ops.where(any_new, last_hidden(output.hidden, chunk.mask), newest.hidden)
    if newest.mtp_input is None:
        return Caches(output.cache), Newest(hidden)
    mtp_input = model.mtp_input(output)
    # All tokens before the chunk have been paired: a token waits for the next one.
    pairs = PendingPairs(mtp_input, chunk.next_ids, chunk.next_mask)
    extended = extend_modules(model, caches.modules, caches.model.lengths, pairs)
    mtp_input = ops.where(any_new, last_hidden(mtp_input, chunk.mask), newest.mtp_input)
    return Caches(output.cache, extended.caches), Newest(hidden, mtp_input)


def _taken(caches, newest, rows):
    def take(x):
        return None if x is None else ops.take(x, rows, axis=0)

    modules, newest = tree.map_structure(take, (caches.modules, newest))
    return Caches(take_rows(caches.model, rows), modules), newest


def _set(caches, newest, rows, own_caches, own_newest):
    model = set_rows(caches.model, rows, own_caches.model)
    modules, newest = tree.map_structure(
        lambda x, own: None if x is None else scatter_rows(x, rows, own),
        (caches.modules, newest),
        (own_caches.modules, own_newest),
    )
    return Caches(model, modules), newest


def first_token(
    model: Any,
    hidden: Annotated[Tensor, "B D"],
    request: Request,
    new_tokens: Annotated[Tensor, "B M"],
    mode: Mode,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first new token `(B,)`, whether it ends its row, and `new_tokens` with it."""
    token = sample(model.logits(hidden), request.sampling, 0, mode)
    finished = is_stop(token, request.sampling) | (request.limit <= 1)
    return token, finished, ops.slice_update(new_tokens, (0, 0), token[:, None])


def logits_of(model: Any, hidden: Annotated[Tensor, "... D"], request: Request) -> Tensor:
    """Logits `(..., V)` of a step."""
    if request.turned_head is None:
        return model.logits(hidden)
    return row_product.multiply_turned(hidden, request.turned_head)


def decode(method: DecodingMethod, model: Any, carry: Any, request: Request) -> Any:
    """Steps until every row has finished."""
    batch, width = carry.new_tokens.shape
    most = method.lookahead + 1
    request = request.for_steps(model, tokens=batch * most, steps=width // most)
    fields = type(carry)

    def unfinished(*carry):
        return ops.logical_not(ops.all(fields(*carry).finished))

    def step(*carry):
        return tuple(method.step(model, fields(*carry), request))

    return fields(*ops.while_loop(unfinished, step, tuple(carry)))
