"""What comes before and after the layers: embeddings, masks, heads and losses, on a tape.

As `layers.py`, each function follows the code that really runs: transformers' models, TRL's fused
head, and the log-probabilities of our PPO.
"""

from __future__ import annotations

from .architecture import Architecture
from .layers import LayerRun, PassConfig, linear
from .tape import Tape
from .values import LOGITS, Store, Value
from .work import product

FUSED_ROWS, FUSED_COLUMNS = 4096, 32768
"""Size of the tile that TRL's fused head computes logits in (trl.kernels.chunked_logprob)."""
BLOCK = 2**20
"""Logits that log-probabilities are made of at a time (`ppo/logprobs.py`)."""
PIECE = 2**25
"""Logits that a scoring pass holds at a time (`ppo/logprobs.py`)."""
CHUNKS = 8
"""Pieces of the logits that a chunked loss takes one after the other."""
SAMPLING = 40
"""Operations of one step of our sampler beside the model: keyed noise, the draw, the masks."""


def embed(tape: Tape, model: Architecture, p: PassConfig, first: bool) -> Value:
    """Token (and position) embeddings. `first`: no gradient of this table exists yet in this
    backward pass (a tied head has made it before)."""
    rows, width = p.tokens, model.hidden
    table = model.vocabulary * model.head_width * p.bytes_per_weight if p.trained else 0
    size = rows * model.head_width * p.bytes_per_weight
    x = tape.result(
        rows * model.head_width,
        p.bytes_per_weight,
        [],
        weights=(table,) if table and first else (),
        scratch=0 if first else table,
    )
    tape.forward.moved += 2 * size
    if model.head_width != width:  # OPT's narrow embeddings
        narrow = model.facts.layer == "opt"
        x = linear(tape, p, model.outer[0], x) if narrow else tape.copy(x, rows * width)
    if model.facts.positions == "learned":
        positions = (model.context + model.facts.position_offset) * width * p.bytes_per_weight
        y = tape.result(
            p.tokens * width, p.bytes_per_weight, [], weights=(positions,) if p.trained else ()
        )
        x = tape.add(x, y)
    elif model.facts.scaled_embedding:
        x = tape.mul(x)
    if model.facts.embedding_norm:
        x = LayerRun(tape, model, model.layers[0], p).norm(x)
    return x


def resident_bytes(model: Architecture, p: PassConfig) -> int:
    """Bytes that stay through a whole pass: ids, masks and position tables."""
    ids = 3 * 8 * p.tokens  # ids, positions, mask or labels
    mask = 0
    if p.padded:
        mask = p.b * p.s * p.s * (p.bytes_per_weight if p.attention == "eager" else 1)
    rotary = model.facts.positions == "rotary"
    tables = 2 * p.tokens * model.head_dim * p.bytes_per_weight if rotary else 0
    return ids + mask + tables


def before_head(tape: Tape, model: Architecture, p: PassConfig, x: Value) -> Value:
    """The last norm, and OPT's way back to the width of its embeddings."""
    if model.final_norm:
        x = LayerRun(tape, model, model.layers[-1], p).norm(x)
    if model.head_width == model.hidden:
        return x
    if model.facts.layer == "opt":
        return linear(tape, p, model.outer[1], x)
    return tape.copy(x, p.tokens * model.head_width)


def fused(tape: Tape, model: Architecture, p: PassConfig, x: Value, scored: int) -> Value:
    """TRL's fused head and loss: log-probabilities in tiles, logits made again in backward.

    `scored`: positions that count; on a GPU only those are computed, elsewhere all but the last
    of each sequence. The gradients of weights and inputs are summed in fp32.
    """
    width, vocabulary = model.head_width, model.vocabulary
    n = scored if p.gpu else p.b * (p.s - 1)
    itemsize = 2 if tape.autocast else x.itemsize
    hidden = tape.copy(x, n * width)  # the slice, or the positions that count
    n_tile, columns = min(n, FUSED_ROWS), min(vocabulary, FUSED_COLUMNS)
    buffer, tile = min(n, FUSED_ROWS) * FUSED_COLUMNS * itemsize, n_tile * columns
    cast = width * columns * itemsize if itemsize != p.bytes_per_weight else 0
    forward = buffer + 7 * n * 4 + cast + (0 if p.gpu else 12 * tile)
    Store(tape, forward, LOGITS)
    work = product(n, width, vocabulary, itemsize)
    tape.count_product(work)
    costs = (0.0, 0.0, 0.0)
    if not p.gpu:  # about ten passes over a tile, an exponential among them, each way
        costs = 80.0 * n * vocabulary, float(n * vocabulary), 12.0
        tape.forward.spend(*costs)
    gradient = vocabulary * width * p.bytes_per_weight if p.trained else 0
    sums = n * width * 4 + (vocabulary * width * 4 if p.trained else 0)
    back = max(
        buffer
        + cast
        + (0 if p.gpu else (28 + 4 * model.facts.softcap) * tile),  # Gemma 2's logits too
        (buffer + cast + 4 * (tile + columns * width)) if itemsize == 2 and not p.gpu else 0,
        n * width * x.itemsize + (gradient if p.bytes_per_weight != 4 else 0) + buffer,
    )
    statistics = Store(tape, 3 * n * 8)
    tape.kind = LOGITS
    return tape.result(
        n,
        4,
        [(hidden, "new")],
        (hidden.store, statistics),
        (gradient,) if gradient and p.bytes_per_weight == 4 else (),
        scratch=sums - (gradient if p.bytes_per_weight == 4 else 0) + back,
        work=[work, work] + ([work] if p.trained else []),
        costs=costs,
    )


def hidden(tape: Tape, model: Architecture, p: PassConfig, x: Value, scored: int) -> Value:
    """The last hidden states of the positions that count, for `divergence`."""
    return tape.copy(x, scored * model.head_width)


def divergence(
    tape: Tape,
    model: Architecture,
    p: PassConfig,
    x: Value,
    teacher: Architecture,
    scored: int,
    mixed: bool,
) -> Value:
    """TRL's fused divergence of a student from its teacher (trl.kernels.chunked_divergence): logits
    of both in tiles, in fp32, made again in backward. `mixed`: both a second time in forward, where
    a mixture of the two is compared with (0 < beta < 1)."""
    n, vocabulary, itemsize = scored, model.vocabulary, 2 if tape.autocast else x.itemsize
    own, theirs = n * model.head_width, n * teacher.head_width
    mine = tape.copy(x, own)
    taught, whole = (
        Store(tape, theirs * itemsize),
        Store(tape, p.tokens * teacher.head_width * itemsize),
    )
    rows, columns = min(n, FUSED_ROWS), min(vocabulary, FUSED_COLUMNS)
    # Without Triton a tile's divergence is written out in six tensors, that of a mixture in seven.
    buffers, tile = 2 * rows * FUSED_COLUMNS * 4, 0 if p.gpu else 4 * rows * columns
    Store(tape, buffers + 9 * n * 4 + (6 + mixed) * tile, LOGITS)
    del whole  # of which `taught` is a part
    products = [product(n, m.head_width, vocabulary, itemsize) for m in (model, teacher)]
    for work in products * (2 if mixed else 1):
        tape.count_product(work)
    costs = (0.0, 0.0, 0.0)
    if not p.gpu:
        passes = 2.0 if mixed else 1.0
        costs = 80.0 * passes * n * vocabulary, 2.0 * passes * n * vocabulary, 24.0 * passes
        tape.forward.spend(*costs)
    gradient = vocabulary * model.head_width * p.bytes_per_weight if p.trained else 0
    sums = own * 4 + (vocabulary * model.head_width * 4 if p.trained else 0)
    back = buffers + (9 + mixed) * tile
    statistics = Store(tape, 3 * n * 4)
    tape.kind = LOGITS
    again = [*products, products[0]] + ([products[0]] if p.trained else [])
    return tape.result(
        n,
        4,
        [(mine, "new")],
        (mine.store, taught, statistics),
        (gradient,) if gradient and p.bytes_per_weight == 4 else (),
        scratch=sums - (gradient if p.bytes_per_weight == 4 else 0) + back,
        work=again,
        costs=costs,
    )


def _logits(tape: Tape, model: Architecture, p: PassConfig, x: Value, trained: bool) -> Value:
    weight = p.bytes_per_weight
    return tape.linear(x, model.head_width, model.vocabulary, weight, trained=trained)


def plain(tape: Tape, model: Architecture, p: PassConfig, x: Value) -> Value:
    """Cross-entropy over all logits, as transformers' own loss: in fp32, whole at once."""
    tape.kind = LOGITS
    logits = _logits(tape, model, p, x, p.trained)
    fp32 = tape.cast(logits, 4)
    logp = tape.pointwise(fp32, "output")
    del fp32
    tape.forward.moved += 4.0 * logp.numel
    # The gradient of the targets' log-probabilities is a tensor of all of them.
    return tape.result(p.tokens, 4, [(logp, "new")], (logits.store,))


def chunked(tape: Tape, model: Architecture, p: PassConfig, x: Value) -> Value:
    """Cross-entropy over logits in the precision of the model, a piece after the other, by a loss
    that is compiled: none is there in fp32, and each piece is let go when its gradient is made
    (torchtune's CEWithChunkedOutputLoss, and axolotl's)."""
    tape.kind = LOGITS
    logits = _logits(tape, model, p, x, p.trained)
    costs = 2.0 * logits.numel * logits.itemsize, float(logits.numel), 4.0 * CHUNKS
    tape.forward.spend(*costs)
    own = logits.store
    return tape.result(p.tokens, 4, [(logits, own)], (own,), costs=costs)


def log_probabilities(
    tape: Tape, model: Architecture, p: PassConfig, x: Value, response: int, trained: bool
) -> Value:
    """Our PPO's: logits of the response, one number a token; `trained`: the entropy as well.

    Without gradients logits are made a piece at a time. The update keeps all of a pass, and its
    backward pass writes their gradient into them. Both work on a block at a time; compiled code
    reads them twice, and writes nothing of their size but that gradient.
    """
    width, vocabulary, n = model.head_width, model.vocabulary, p.b * response
    hidden = tape.copy(x, n * width)
    tape.kind = LOGITS
    block = min(n, max(1, BLOCK // vocabulary)) * vocabulary
    steps = -(-n * vocabulary // block)
    block *= not p.compiled
    total = float(n * vocabulary)
    once = 2.0 * (2 if tape.autocast else x.itemsize) * total, total, 2.0
    if not trained:
        piece = min(n, max(1, PIECE // vocabulary))
        logits = _logits(tape, model, p, tape.split(hidden, piece * width)[0], p.trained)
        one = tape.forward.products[-1]
        tape.forward.products[-1] = (*one[:2], n / piece, one[3])
        Store(tape, 8 * block, LOGITS)  # divided by the temperature, and their log softmax
        tape.forward.spend(*(once if p.compiled else (20 * total, total, 4 * steps)))
        return tape.result(n, 4, [])
    logits = _logits(tape, model, p, hidden, p.trained)
    del hidden
    Store(tape, 8 * block, LOGITS)
    # A block stays in the cache for half of its work.
    tape.forward.spend(*(once if p.compiled else (24 * total, 2 * total, 9 * steps)))
    statistics = Store(tape, n * (4 + 4 + 8))  # norms, entropies and tokens
    return tape.result(
        n,
        4,
        [(logits, logits.store)],
        (logits.store, statistics),
        scratch=(4 if logits.itemsize == 4 else 8) * block,
        costs=once if p.compiled else (16 * total, total, 6.0 * steps),
    )


def scores(tape: Tape, model: Architecture, p: PassConfig, x: Value, positions: int) -> Value:
    """A reward or value head on `positions` tokens of all sequences together."""
    if positions != p.tokens:
        x = tape.copy(x, positions * model.head_width)
    return tape.linear(x, model.head_width, 1, p.bytes_per_weight, trained=True)


def next_token(tape: Tape, model: Architecture, p: PassConfig, x: Value) -> Value:
    """Logits of the last position, and sampling by the cumulative distribution in fp64."""
    last = tape.copy(x, p.b * model.head_width)
    tape.kind = LOGITS
    logits = _logits(tape, model, p, last, trained=False)
    fp32 = tape.cast(logits, 4)
    Store(tape, 16 * fp32.numel, LOGITS)
    tape.forward.spend(60.0 * fp32.numel, 2.0 * fp32.numel, SAMPLING)
    return tape.result(p.b, 8, [])
