"""Lossless speculative decoding: the modules draft, the backbone verifies.

One step of every row, with x_n its newest token, which the backbone has not absorbed yet:

1. The modules extend what the last step made certain, pairs of the backbone's hidden state at a token
   and the token after it, and draft d_1 .. d_k one after the other, each on what they said before.
2. The backbone reads x_n, d_1 .. d_k in one pass that may be taken back and says what should have
   followed each of them, p_0 .. p_k.
3. d_j is accepted with probability min(1, p_{j-1}(d_j) / q_j(d_j)), as long as those before it
   were. After the last accepted one comes a token from the backbone itself: from the normalised
   positive part of p - q where a draft was refused, else from p_k.
4. The backbone's cache is committed to x_n and the accepted drafts.

So every token follows the distribution of plain decoding whatever the modules draft; with
`temperature=0` it is the same token. Source: Leviathan et al., arXiv 2211.17192, theorem 3.5.
"""

from typing import NamedTuple

import keras
from keras import ops

from qwen3_next.generation.sampling import GREEDY, is_stop, warp
from qwen3_next.layers.ops.backend.seeds import DrawnSeed
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.models.inputs import last_hidden


class Pending(NamedTuple):
    """Pairs that are certain but not absorbed: `hidden` `(B, W, D)`, `token_ids` and `mask`."""

    hidden: object
    token_ids: object
    mask: object


class Counters(NamedTuple):
    """int32: `steps` of the loop, `row_steps` of rows not finished, and `accepted` `(k,)`, in how
    many of those the drafts up to each position were accepted."""

    steps: object
    row_steps: object
    accepted: object


class Speculating(NamedTuple):
    """The carry of the speculative loop."""

    cache: object
    caches: tuple  # of the modules
    pairs: object  # (B,) int32, pairs in the caches
    pending: Pending
    token: object  # (B,) int32, the newest token, not yet absorbed
    finished: object  # (B,) bool
    new_tokens: object  # (B, M) int32
    count: object  # (B,) int32, columns of `new_tokens` written
    counters: Counters


class Draft(NamedTuple):
    """`token_ids` `(B, k)` and, in sampling, the distributions they came from `(B, k, V)`."""

    token_ids: object
    probabilities: object


class DraftVocabulary(NamedTuple):
    """The tokens that may be drafted, `token_ids` `(n,)`, and the place `(V,)` of every token among
    them, n where it is none of them."""

    token_ids: object
    places: object


class Plan(NamedTuple):
    """What is compiled into a loop: `lookahead` k, the sampling `mode`, whether it is `lossy`."""

    lookahead: int
    mode: str
    lossy: bool


def init_caches(model, batch_size, max_length):
    """Empty caches of the modules that have attention."""
    caches = (module.init_cache(batch_size, max_length) for module in model.mtp_modules)
    return tuple(cache for cache in caches if cache is not None)


def extend_modules(model, caches, pairs, pending):
    """Takes in certain pairs: `(hidden states of the first module (B, W, D), caches, pairs)`."""
    embedding = model.backbone.embed_tokens(pending.token_ids)
    outputs = [
        module(
            embedding,
            pending.hidden,
            padding_mask=pending.mask,
            cache=caches[number] if caches else None,
            lengths=pairs,
        )
        # Without attention only the first module has anything to do here.
        for number, module in enumerate(model.mtp_modules[: max(len(caches), 1)])
    ]
    new_caches = tuple(output.cache for output in outputs) if caches else ()
    return outputs[0].hidden, new_caches, pairs + valid_lengths(pending.mask)


def speculate(model, carry, limit, sampling, vocabulary, threshold, plan):
    """Decodes until every row has `limit` tokens or has met a stop token."""
    kernel = None
    if vocabulary is not None:
        kernel = ops.take(model.head_kernel(), vocabulary.token_ids, axis=1)

    def unfinished(*carry):
        return ops.logical_not(ops.all(Speculating(*carry).finished))

    def step(*carry):
        carry = Speculating(*carry)
        seeds = _Seeds(sampling, carry.counters.steps, plan.lookahead)
        draft, caches, pairs = _draft(model, carry, sampling, seeds, kernel, vocabulary, plan)
        return _verify(
            model, carry._replace(caches=caches, pairs=pairs), draft, limit, sampling, seeds,
            threshold, plan,
        )  # fmt: skip

    return Speculating(*ops.while_loop(unfinished, step, tuple(carry)))


class _Seeds:
    """Independent seeds for the draws of one step; 0 was used for the first token."""

    def __init__(self, sampling, step, lookahead):
        self.seed = sampling.seed
        self.first = 1 + step * (lookahead + 2)

    def __call__(self, draw):
        number = ops.cast(self.first + draw, "uint32")
        return DrawnSeed(ops.stack([self.seed, number]))


def _draft(model, carry, sampling, seeds, kernel, vocabulary, plan):
    """Step 1: `(Draft, caches, pairs)`."""
    hidden, caches, pairs = extend_modules(model, carry.caches, carry.pairs, carry.pending)
    hidden = last_hidden(hidden, carry.pending.mask)
    active = ops.logical_not(carry.finished)[:, None]
    shared = len(model.mtp_modules) == 1
    tokens, probabilities, said = [], [], []
    for number in range(plan.lookahead):
        logits = model.logits(hidden) if kernel is None else hidden @ ops.cast(kernel, hidden.dtype)
        token, probability = _pick(logits, sampling, seeds(number), vocabulary, plan.mode)
        tokens.append(token)
        probabilities.append(probability)
        if number + 1 == plan.lookahead:
            break
        # One module has the drafts before this one in its cache, another has to read them all.
        said = [*([] if shared else said), (hidden, token)]
        module = model.mtp_module(number + 2)
        place = 0 if shared else number + 1
        output = module(
            model.backbone.embed_tokens(ops.stack([token for _, token in said], axis=1)),
            ops.stack([hidden for hidden, _ in said], axis=1),
            padding_mask=ops.repeat(active, len(said), axis=1),
            cache=caches[place] if caches else None,
            lengths=pairs + (number if shared else 0),
        )
        hidden = output.hidden[:, -1]
        if caches:
            # Beyond `pairs` nothing is read: the next certain pairs are written over it.
            caches = (*caches[:place], output.cache, *caches[place + 1 :])
    probabilities = None if plan.mode == GREEDY else ops.stack(probabilities, axis=1)
    return Draft(ops.stack(tokens, axis=1), probabilities), caches, pairs


def _pick(logits, sampling, seed, vocabulary, mode):
    """A drafted token `(B,)` and the distribution over all tokens that it came from."""
    if mode == GREEDY:
        token, probabilities = ops.cast(ops.argmax(logits, axis=-1), "int32"), None
    else:
        logits = warp(logits, sampling, mode)
        token = ops.cast(keras.random.categorical(logits, 1, seed=seed)[:, 0], "int32")
        probabilities = ops.softmax(logits, axis=-1)
    if vocabulary is None:
        return token, probabilities
    if probabilities is not None:
        nothing = ops.zeros_like(probabilities[:, :1])
        probabilities = ops.concatenate([probabilities, nothing], axis=-1)
        probabilities = ops.take(probabilities, vocabulary.places, axis=-1)
    return ops.take(vocabulary.token_ids, token), probabilities


def _verify(model, carry, draft, limit, sampling, seeds, threshold, plan):
    """Steps 2 to 4: the carry of the next step."""
    width = plan.lookahead + 1
    active = ops.logical_not(carry.finished)
    token_ids = ops.concatenate([carry.token[:, None], draft.token_ids], axis=1)  # (B, k+1)
    inputs = {"token_ids": token_ids, "padding_mask": ops.repeat(active[:, None], width, axis=1)}
    output = model.backbone(inputs, cache=carry.cache, replayable=True)
    logits = ops.cast(model.logits(output.hidden), "float32")  # (B, k+1, V)
    if plan.mode == GREEDY:
        accepted, token = _judge_greedily(logits, draft, threshold, plan)
    else:
        accepted, token = _judge(logits, draft, sampling, seeds, threshold, plan)

    places = ops.arange(width, dtype="int32")
    drafts = ops.pad(draft.token_ids, [[0, 0], [0, 1]])
    said = ops.where(places < accepted[:, None], drafts, token[:, None])  # (B, k+1)
    stops = is_stop(said, sampling) & (places <= accepted[:, None])
    first_stop = ops.min(ops.where(stops, places, width), axis=1)
    emitted = ops.minimum(ops.minimum(accepted, first_stop) + 1, limit - carry.count)
    emitted = ops.where(active, emitted, 0)
    count = carry.count + emitted
    finished = carry.finished | (first_stop < emitted) | (count >= limit)

    columns = ops.arange(carry.new_tokens.shape[1], dtype="int32") - carry.count[:, None]
    fresh = ops.take_along_axis(said, ops.clip(columns, 0, plan.lookahead), axis=1)
    is_fresh = (columns >= 0) & (columns < emitted[:, None])
    last = ops.maximum(emitted - 1, 0)[:, None]
    newest = ops.take_along_axis(said, last, axis=1)[:, 0]
    counters = carry.counters
    upto = ops.arange(1, plan.lookahead + 1, dtype="int32") <= accepted[:, None]
    return Speculating(
        cache=model.backbone.commit(carry.cache, output.update, emitted),
        caches=carry.caches,
        pairs=carry.pairs,
        pending=Pending(model.mtp_input(output), said, places < emitted[:, None]),
        token=ops.where(active, newest, carry.token),
        finished=finished,
        new_tokens=ops.where(is_fresh, fresh, carry.new_tokens),
        count=count,
        counters=Counters(
            counters.steps + 1,
            counters.row_steps + _count(active),
            counters.accepted + _count(upto & active[:, None]),
        ),
    )


def _judge_greedily(logits, draft, threshold, plan):
    """How many drafts of a row are the backbone's own choice, and its choice after them."""
    choice = ops.cast(ops.argmax(logits, axis=-1), "int32")
    fine = draft.token_ids == choice[:, :-1]
    if plan.lossy:
        fine = fine | (_of_drafts(ops.softmax(logits[:, :-1], axis=-1), draft) >= threshold)
    accepted = _leading(fine)
    return accepted, ops.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]


def _judge(logits, draft, sampling, seeds, threshold, plan):
    """How many drafts of a row are accepted, and a token from what is left of the distribution."""
    batch, width, vocabulary = ops.shape(logits)
    flat = ops.reshape(logits, (batch * width, vocabulary))
    warped = ops.softmax(warp(flat, sampling, plan.mode), axis=-1)
    target = ops.reshape(warped, (batch, width, vocabulary))  # p
    here = _of_drafts(target[:, :-1], draft)
    there = _of_drafts(draft.probabilities, draft)
    drawn = keras.random.uniform((batch, plan.lookahead), seed=seeds(plan.lookahead))
    fine = drawn * there < here
    if plan.lossy:
        fine = fine | (here >= threshold)
    accepted = _leading(fine)
    # Behind the last draft nothing was drafted: q is 0 there and p is left whole.
    drafted = ops.pad(draft.probabilities, [[0, 0], [0, 1], [0, 0]])
    place = accepted[:, None, None]
    left = ops.take_along_axis(target, place, axis=1) - ops.take_along_axis(drafted, place, axis=1)
    left = ops.maximum(left[:, 0], 0.0)
    # Where p and q are the same but for rounding, nothing is left and nothing was refused.
    left = ops.where(
        ops.sum(left, axis=-1, keepdims=True) > 0,
        left,
        ops.take_along_axis(target, place, axis=1)[:, 0],
    )
    token = keras.random.categorical(ops.log(left), 1, seed=seeds(plan.lookahead + 1))
    return accepted, ops.cast(token[:, 0], "int32")


def _of_drafts(probabilities, draft):
    index = ops.expand_dims(draft.token_ids, -1)
    return ops.take_along_axis(probabilities, index, axis=-1)[..., 0]


def _leading(fine):
    """Number of true entries before the first false one, `(B, k)` -> `(B,)` int32."""
    return ops.sum(ops.cumprod(ops.cast(fine, "int32"), axis=1), axis=1)


def _count(mask):
    return ops.sum(ops.cast(mask, "int32"), axis=0)
