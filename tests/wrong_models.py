"""A right model written differently, and wrong ones: each a small, documented change of it.

`Plain` reads one token at a time, one row at a time, keeps hidden states, and makes keys, values and spans from them
whenever it needs them; it counts as if it had kept them. A mutant is one method overridden. Where a flaw was found in a
published implementation the docstring names it, as in `wrong`.
"""

import copy
from typing import ClassVar

import numpy as np


class Plain:
    """Expire-Span as one would write it on paper; right, and as slow as it gets."""

    name = "plain"

    def open_model(self, config, params, *, batch, memory=None):
        return PlainStream(self, config, params, batch, memory)

    # what a layer does

    def norm(self, x, weight, bias):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + x.dtype.type(1e-5)) * weight + bias

    def normalise(self, config, p, x, is_memory):
        return self.norm(x, p("norm1.weight"), p("norm1.bias")) if config.norm == "pre" else x

    def span(self, config, p, u):
        z = (u / u.dtype.type(config.span_temperature)) @ p("span.weight") + p("span.bias")
        return u.dtype.type(config.max_span) / (1 + np.exp(-z))

    def mask(self, span, age, ramp):
        soft = np.clip(1 + (span - age.astype(span.dtype)) / span.dtype.type(ramp), 0, 1)
        return np.where(age >= 1, soft, 0).astype(span.dtype)

    def activate(self, x):
        return np.maximum(x, 0)

    def position_scores(self, q, table, age):
        scores = np.zeros((len(q), len(age)), q.dtype)
        near = (age >= 1) & (age <= len(table))
        scores[:, near] = q @ table[age[near] - 1].T
        return scores

    def attend(self, config, p, table, u, hidden, age):
        """One query over its memories.   [d], [N, d], [N] -> [H D]."""
        heads, size = config.heads, config.head_size
        um = self.normalise(config, p, hidden, True)
        q = (p("attention.query.weight") @ u).reshape(heads, size)
        k = (um @ p("attention.key.weight").T).reshape(-1, heads, size)
        v = (um @ p("attention.value.weight").T).reshape(-1, heads, size)
        m = self.mask(self.span(config, p, um), age, config.ramp)
        s = (np.einsum("hd,nhd->hn", q, k) + self.position_scores(q, table, age)) / u.dtype.type(np.sqrt(size))
        live = m > 0
        if not live.any():
            return np.zeros(heads * size, u.dtype)
        w = m[live] * np.exp(s[:, live] - s[:, live].max(axis=1, keepdims=True))
        w = w / w.sum(axis=1, keepdims=True)
        return np.einsum("hn,nhd->hd", w, v[live]).reshape(-1)

    def layer(self, config, p, table, x, hidden, age):
        attended = self.attend(config, p, table, self.normalise(config, p, x, False), hidden, age)
        after = x + p("attention.output.weight") @ attended
        if config.norm == "pre":
            return after + self.feedforward(p, self.norm(after, p("norm2.weight"), p("norm2.bias")))
        y = self.norm(after, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))

    def feedforward(self, p, y):
        inner = self.activate(p("feedforward.in.weight") @ y + p("feedforward.in.bias"))
        return p("feedforward.out.weight") @ inner + p("feedforward.out.bias")

    def embed(self, config, params, token):
        return params["embedding.weight"][token]

    def finish(self, config, params, x):
        if config.norm == "pre":
            x = self.norm(x, params["final_norm.weight"], params["final_norm.bias"])
        logits = params["output.weight"] @ x + params["output.bias"]
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    # what a stream does

    def start(self, config, params, layer):
        dtype = params["embedding.weight"].dtype
        return np.zeros((0, config.hidden_size), dtype), np.zeros(0, np.int64)

    def advance(self, age):
        return age + 1

    def gone(self, config, span, age):
        """Which memories no later query can see, with ages as seen from the next one."""
        return age - span >= config.ramp

    def forget(self, config, p, hidden, age):
        keep = ~self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age)
        return hidden[keep], age[keep]


class PlainStream:
    def __init__(self, rules, config, params, batch, memory):
        self.rules, self.config, self.batch = rules, config, batch
        wide = np.result_type(params["embedding.weight"].dtype, np.float32)
        self.dtype = params["embedding.weight"].dtype
        self.params = {name: x.astype(wide) for name, x in params.items()}
        self.rows = [self.empty() for _ in range(batch)]
        """For each row and layer hidden states [N, d] and ages [N]."""
        self.projected = 0
        if memory is not None:
            self.rows = [
                [self.given(hidden[b], age[b], i) for i, (hidden, age) in enumerate(memory)] for b in range(batch)
            ]
            self.projected = sum(hidden.shape[0] * hidden.shape[1] for hidden, _ in memory)

    def given(self, hidden, age, i):
        hidden = hidden.astype(self.params["embedding.weight"].dtype)
        return self.rules.forget(self.config, self.of_layer(i), hidden, age.copy())

    def empty(self):
        return [self.rules.start(self.config, self.params, i) for i in range(self.config.layers)]

    def of_layer(self, i):
        return lambda name: self.params[f"layers.{i}.{name}"]

    def step(self, tokens):
        log_probs = np.stack([self.read(b, tokens[b]) for b in range(self.batch)])
        self.after_block(tokens.shape[1])
        return log_probs.astype(self.dtype)

    def after_block(self, length):
        self.projected += self.batch * length * self.config.layers

    def read(self, b, tokens):
        return np.stack([self.token(b, int(token)) for token in tokens])

    def token(self, b, token):
        rules, config, row = self.rules, self.config, self.rows[b]
        x = rules.embed(config, self.params, token)
        for i in range(config.layers):
            p, (hidden, age) = self.of_layer(i), row[i]
            z = rules.layer(config, p, self.params["position.weight"], x, hidden, age)
            row[i] = self.remember(p, x, z, hidden, age)
            x = z
        return rules.finish(config, self.params, x)

    def remember(self, p, x, z, hidden, age):
        hidden, age = np.concatenate([hidden, x[None]]), self.rules.advance(np.append(age, 0))
        return self.rules.forget(self.config, p, hidden, age)

    def memory_size(self):
        return [max(len(row[i][1]) for row in self.rows) for i in range(self.config.layers)]

    def rows_projected(self):
        return self.projected

    def reset(self, row):
        self.rows[row] = self.empty()

    def state(self):
        return copy.deepcopy(self.rows)

    def restore(self, state):
        self.rows = copy.deepcopy(state)


MODEL_MUTANTS = {}
"""Name -> (class, the checks that must reject it)."""


def mutant(*rejected_by, stream=None):
    """Register rules; `stream` is the class of their streams, if they have one of their own."""

    def register(cls):
        cls.name = cls.__name__
        if stream is not None:
            cls.open_model = lambda self, config, params, *, batch, memory=None: stream(
                self, config, params, batch, memory
            )
        MODEL_MUTANTS[cls.__name__] = (cls, rejected_by)
        return cls

    return register


# --- memory: early, late, the wrong one -------------------------------------------------------------------------------


@mutant("memory.stream", "memory.saturated")
class DropsWhenTheSpanEnds(Plain):
    """The ramp is not waited for."""

    def gone(self, config, span, age):
        return age - span > 0


@mutant("memory.saturated")
class DropsOneStepEarly(Plain):
    """Ages as seen from the last query, compared as if from the one after the next."""

    def gone(self, config, span, age):
        return age + 1 - span >= config.ramp


@mutant("memory.bound")
class NeverDrops(Plain):
    """Right in all results, and out of memory in the end."""

    def gone(self, config, span, age):
        return np.zeros(len(age), bool)


@mutant("memory.stream", "memory.keeps_all")
class ForgetsTheOldest(Plain):
    """As many as have expired are dropped, but the oldest ones."""

    def forget(self, config, p, hidden, age):
        gone = self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age).sum()
        gone += len(age) > 16
        order = np.argsort(-age, kind="stable")[gone:]
        return hidden[order], age[order]


@mutant("memory.keeps_all")
class CutsAgesAlongTheWrongAxis(Plain):
    """LR (flaw 9): at capacity hidden states lose their oldest, ages something else."""

    def forget(self, config, p, hidden, age):
        hidden, age = super().forget(config, p, hidden, age)
        return (hidden[-24:], age[:24]) if len(age) > 24 else (hidden, age)


@mutant("memory.keeps_all")
class OldestGoAtCapacity(Plain):
    """A fixed capacity, at which the oldest go, alive or not."""

    def forget(self, config, p, hidden, age):
        hidden, age = super().forget(config, p, hidden, age)
        return hidden[-32:], age[-32:]


@mutant("memory.saturated")
class BufferWithoutRoomForTheRamp(Plain):
    """FB (flaw 10): the ramp gets room in whole blocks, which is too little unless R is a multiple of M."""

    def forget(self, config, p, hidden, age):
        hidden, age = super().forget(config, p, hidden, age)
        room = config.max_span + config.ramp // config.block_size * config.block_size
        if len(age) > room:
            raise IndexError("shapes do not match")
        return hidden, age


@mutant("memory.start")
class PhantomMemories(Plain):
    """FB (flaw 11): a stream starts with M zero vectors, which take part in the softmax."""

    def start(self, config, params, layer):
        hidden = np.zeros((config.block_size, config.hidden_size), params["embedding.weight"].dtype)
        return hidden, np.arange(config.block_size, 0, -1)


class _WholeBlocks(PlainStream):
    def after_block(self, length):
        super().after_block(length)
        for i in range(self.config.layers):
            gone = min(int((row[i][1] < 0).sum()) for row in self.rows)
            gone -= gone % self.config.block_size
            for row in self.rows:
                hidden, age = row[i]
                keep = np.ones(len(age), bool)
                keep[np.flatnonzero(age < 0)[:gone]] = False
                row[i] = hidden[keep], age[keep]


@mutant("memory.bound", stream=_WholeBlocks)
class DropsWholeBlocksAtTheBatchMinimum(Plain):
    """FB (flaw 22): only multiples of M are dropped, and only as many as every row of the batch can spare."""

    def forget(self, config, p, hidden, age):
        gone = self.gone(config, self.span(config, p, self.normalise(config, p, hidden, True)), age)
        return hidden, np.where(gone | (age < 0), -(10**6), age)


class _Shared(PlainStream):
    def after_block(self, length):
        super().after_block(length)
        for i in range(self.config.layers):
            ages = [set(row[i][1].tolist()) for row in self.rows]
            for row in self.rows:
                hidden, age = row[i]
                keep = np.array([all(a in other for other in ages) for a in age.tolist()], bool)
                row[i] = hidden[keep], age[keep]


@mutant("memory.batch_mates", stream=_Shared)
class DropsWhatAnyRowDrops(Plain):
    """One list of kept steps for the whole batch."""


# --- ages -------------------------------------------------------------------------------------------------------------


class _OnePerBlock(PlainStream):
    def read(self, b, tokens):
        result = super().read(b, tokens)
        older = lambda age: np.where(age > len(tokens), age - len(tokens) + 1, age)
        self.rows[b] = [(hidden, older(age)) for hidden, age in self.rows[b]]
        return result


@mutant("memory.stream", stream=_OnePerBlock)
class AgesGrowByOnePerBlock(Plain):
    """Ages of older memories count blocks, not steps."""


class _FullBlockAges(PlainStream):
    def read(self, b, tokens):
        result = super().read(b, tokens)
        missing = max(0, self.config.block_size - len(tokens))
        self.rows[b] = [(hidden, age + missing) for hidden, age in self.rows[b]]
        return result


@mutant("memory.stream", "memory.block_split", stream=_FullBlockAges)
class AgesGrowByTheBlockSize(Plain):
    """A ragged block ages memories by a whole one."""


class _FullBlocksOnly(PlainStream):
    def read(self, b, tokens):
        before = list(self.rows[b])
        result = super().read(b, tokens)
        if len(tokens) < self.config.block_size:
            self.rows[b] = before
        return result


@mutant("memory.stream", "memory.block_split", stream=_FullBlocksOnly)
class OnlyFullBlocksAreRemembered(Plain):
    """LR (flaw 14): memory is updated only by blocks of full length."""


@mutant("memory.slot_order", "memory.initial")
class InitialMemoriesInOrder(Plain):
    """The initial memories are taken to stand oldest first, without gaps."""

    def open_model(self, config, params, *, batch, memory=None):
        if memory is not None:
            memory = [(h, np.tile(np.arange(h.shape[1], 0, -1), (batch, 1))) for h, _ in memory]
        return super().open_model(config, params, batch=batch, memory=memory)


# --- streams ----------------------------------------------------------------------------------------------------------


class _ForgetsAll(PlainStream):
    def reset(self, row):
        self.rows = [self.empty() for _ in self.rows]


@mutant("memory.reset", stream=_ForgetsAll)
class ResetEmptiesTheWholeBatch(Plain):
    """A reset of one row empties all."""


class _ForgetsFirst(PlainStream):
    def reset(self, row):
        self.rows[row] = [self.empty()[0], *self.rows[row][1:]]


@mutant("memory.reset", stream=_ForgetsFirst)
class ResetEmptiesOneLayer(Plain):
    """A reset leaves the upper layers' memories."""


class _FreesLate(PlainStream):
    late = None

    def after_block(self, length):
        super().after_block(length)
        self.late = None

    def memory_size(self):
        here = super().memory_size()
        return here if self.late is None else [max(pair) for pair in zip(here, self.late, strict=True)]


class _ResetFreesLate(_FreesLate):
    def reset(self, row):
        self.late = self.memory_size()
        super().reset(row)


@mutant("memory.bound", stream=_ResetFreesLate)
class ResetFreesWithTheNextBlock(Plain):
    """A row that was reset is held until the stream goes on."""


class _RestoreFreesLate(_FreesLate):
    def restore(self, state):
        self.late = self.memory_size()
        super().restore(state)


@mutant("memory.bound", stream=_RestoreFreesLate)
class RestoreKeepsWhatItReplaces(Plain):
    """What a restored state takes the place of is held until the stream goes on."""


class _Pool(PlainStream):
    pool: ClassVar = {}

    def __init__(self, rules, config, params, batch, memory):
        super().__init__(rules, config, params, batch, memory)
        if memory is None and self.size in self.pool:
            used = self.pool.pop(self.size)
            self.rows = [[(hidden[-1:], age[-1:]) for hidden, age in row] for row in used]

    @property
    def size(self):
        return self.batch, self.config.hidden_size, self.config.layers

    def __del__(self):
        if hasattr(self, "rows"):
            self.pool[self.size] = self.rows


@mutant("memory.state_machine", stream=_Pool)
class BuffersAreHandedOnUncleared(Plain):
    """The last memory of a stream that ended is found by the next one of that size."""


class _LiveState(PlainStream):
    def state(self):
        return self.rows

    def restore(self, state):
        self.rows = state


@mutant("memory.restore", stream=_LiveState)
class StateIsAView(Plain):
    """The kept state goes on living with the stream."""


class _Clock(PlainStream):
    clock = 0

    def after_block(self, length):
        super().after_block(length)
        self.clock += length

    def state(self):
        return self.clock, super().state()

    def restore(self, state):
        then, rows = state
        super().restore(rows)
        self.rows = [[(hidden, age + self.clock - then) for hidden, age in row] for row in self.rows]


@mutant("memory.restore", stream=_Clock)
class RestoreGoesByTheClock(Plain):
    """States keep the time of each memory, and ages grow by what was read since."""


class _OneForAll(PlainStream):
    kept: ClassVar = {}

    def __init__(self, rules, config, params, batch, memory):
        super().__init__(rules, config, params, batch, memory)
        shape = (batch, config.hidden_size, config.layers)
        self.rows = self.kept.setdefault(shape, self.rows) if memory is None else self.rows


@mutant("memory.start", "memory.stream", stream=_OneForAll)
class StreamsShareMemory(Plain):
    """Memories are kept per model shape, not per stream."""


class _LastRow(PlainStream):
    current = None

    def step(self, tokens):
        if _LastRow.current not in (None, self) and _LastRow.current.config == self.config:
            pass
        elif _LastRow.current not in (None, self):
            self.rows[0] = self.empty()
        _LastRow.current = self
        return super().step(tokens)


@mutant("memory.two_streams", stream=_LastRow)
class SwitchingStreamsForgets(Plain):
    """What is kept for the stream at work is lost when another one takes its turn."""


class _Again(PlainStream):
    def after_block(self, length):
        super().after_block(length)
        self.projected += sum(len(age) for row in self.rows for _, age in row)


@mutant("memory.projected_once", stream=_Again)
class ProjectsAllMemoriesAgain(Plain):
    """All published ones (flaw 21): keys and values of all memories are made again in every block."""


class _OneBuffer(PlainStream):
    buffers: ClassVar = {}

    def step(self, tokens):
        log_probs = super().step(tokens)
        buffer = self.buffers.setdefault((log_probs.shape, str(log_probs.dtype)), log_probs)
        buffer[...] = log_probs
        return buffer


@mutant("memory.stream", stream=_OneBuffer)
class ReturnsOneBuffer(Plain):
    """Every result comes in the same memory."""


class _Writes(PlainStream):
    def step(self, tokens):
        tokens.flags.writeable = True
        log_probs = super().step(tokens)
        tokens += 0
        tokens[:, 0] = 0
        return log_probs


@mutant("memory.stream", stream=_Writes)
class ChangesItsTokens(Plain):
    """Writes into its argument."""


# --- spans ------------------------------------------------------------------------------------------------------------


@mutant("model.spans")
class TemperatureDividesTheBias(Plain):
    """A port (flaw 18): sigmoid((w . h + b) / temperature)."""

    def span(self, config, p, u):
        z = (u @ p("span.weight") + p("span.bias")) / u.dtype.type(config.span_temperature)
        return u.dtype.type(config.max_span) / (1 + np.exp(-z))


@mutant("model.spans")
class MissingSqueeze(Plain):
    """A port (flaw 18): spans (N, 1) minus ages (N) broadcast, and the wrong axis survives."""

    def mask(self, span, age, ramp):
        return super().mask(span[:1] + 0 * span, age, ramp) if len(span) else super().mask(span, age, ramp)


@mutant("model.spans")
class SpansOfTheFirstLayer(Plain):
    """One span predictor for all layers."""

    def layer(self, config, p, table, x, hidden, age):
        return super().layer(config, p, table, x, hidden, age)

    def open_model(self, config, params, *, batch, memory=None):
        first = {n: params[f"layers.0.span.{n}"] for n in ("weight", "bias")}
        same = {f"layers.{i}.span.{n}": x for i in range(config.layers) for n, x in first.items()}
        return super().open_model(config, {**params, **same}, batch=batch, memory=memory)


@mutant("model.spans")
class NoTemperature(Plain):
    """The temperature is never applied."""

    def span(self, config, p, u):
        return u.dtype.type(config.max_span) / (1 + np.exp(-(u @ p("span.weight") + p("span.bias"))))


@mutant("memory.short")
class AtLeastOneStep(Plain):
    """Spans are held above one step."""

    def span(self, config, p, u):
        return np.maximum(super().span(config, p, u), u.dtype.type(1))


@mutant("memory.saturated")
class NoRamp(Plain):
    """Full or gone."""

    def mask(self, span, age, ramp):
        return (super().mask(span, age, ramp) > 0).astype(span.dtype)


# --- the model --------------------------------------------------------------------------------------------------------


@mutant("model.pre_norm")
class MemoriesNotNormalised(Plain):
    """LR (flaw 15): keys, values and spans of memories are made without the norm that the block gets."""

    def normalise(self, config, p, x, is_memory):
        return x if is_memory else super().normalise(config, p, x, is_memory)


@mutant("model.pre_norm")
class NoFinalNorm(Plain):
    """A pre-norm model without its last norm."""

    def finish(self, config, params, x):
        logits = params["output.weight"] @ x + params["output.bias"]
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@mutant("model.pre_norm")
class AlwaysPostNorm(Plain):
    """The setting is overlooked."""

    def layer(self, config, p, table, x, hidden, age):
        attended = self.attend(config, p, table, self.normalise(config, p, x, False), hidden, age)
        y = self.norm(x + p("attention.output.weight") @ attended, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))


@mutant("model.post_norm")
class NormBeforeTheResidual(Plain):
    """Post-norm of the branch alone."""

    def layer(self, config, p, table, x, hidden, age):
        if config.norm == "pre":
            return super().layer(config, p, table, x, hidden, age)
        attended = self.attend(config, p, table, x, hidden, age)
        y = x + self.norm(p("attention.output.weight") @ attended, p("norm1.weight"), p("norm1.bias"))
        return self.norm(y + self.feedforward(p, y), p("norm2.weight"), p("norm2.bias"))


@mutant("model.post_norm")
class UnbiasedVariance(Plain):
    """Divided by d - 1."""

    def norm(self, x, weight, bias):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1)
        return centred / np.sqrt(variance + x.dtype.type(1e-5)) * weight + bias


@mutant("model.post_norm")
class SmoothActivation(Plain):
    """x sigmoid(1.702 x) in place of ReLU."""

    def activate(self, x):
        return x / (1 + np.exp(-1.702 * x))


@mutant("model.post_norm", "model.pre_norm")
class ScaledEmbedding(Plain):
    """Token embeddings are multiplied by sqrt(d)."""

    def embed(self, config, params, token):
        row = params["embedding.weight"][token]
        return row * row.dtype.type(np.sqrt(config.hidden_size))


class _Results(PlainStream):
    def remember(self, p, x, z, hidden, age):
        return super().remember(p, z, z, hidden, age)


@mutant("memory.stream", stream=_Results)
class RemembersResults(Plain):
    """A layer remembers its result, not what it was given."""


class _Ahead(PlainStream):
    def read(self, b, tokens):
        swapped = np.concatenate([tokens[1:], tokens[-1:]]) if len(tokens) > 1 else tokens
        return super().read(b, np.where(tokens == 0, swapped, tokens))


@mutant("model.causal", stream=_Ahead)
class LooksAhead(Plain):
    """Inside a block the future shows through."""


@mutant("model.normalised")
class Unnormalised(Plain):
    """Logits in place of log-probabilities."""

    def finish(self, config, params, x):
        if config.norm == "pre":
            x = self.norm(x, params["final_norm.weight"], params["final_norm.bias"])
        return params["output.weight"] @ x + params["output.bias"]


@mutant("memory.initial", "model.post_norm")
class PositionsFromZero(Plain):
    """Row j of the position embedding is taken for distance j."""

    def position_scores(self, q, table, age):
        return super().position_scores(q, table, age + 1)


class _ForgetsOther(PlainStream):
    seen: ClassVar = []

    def __init__(self, rules, config, params, batch, memory):
        super().__init__(rules, config, params, batch, memory)
        self.seen[:] = [*self.seen[-1:], self]

    def reset(self, row):
        super().reset(row)
        for other in self.seen:
            other.rows[min(row, other.batch - 1)] = other.empty()


@mutant("memory.state_machine", stream=_ForgetsOther)
class ResetReachesOtherStreams(Plain):
    """Rows are reset in whatever streams are open."""
