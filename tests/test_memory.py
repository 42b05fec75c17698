"""Memories: a value that appends, ages and drops, exact at any age; kept as hidden states or as keys and values."""

from fractions import Fraction
from itertools import count, pairwise

import array_api_strict
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import refspan
from refspan.memory import NEVER, check_ages, empty_memory, expired
from refspan.model import model

SIZES = {"id": (), "vector": (3,)}


def empty(batch, dtype=np.float64):
    return empty_memory(np, batch, SIZES, {"id": np.int64, "vector": dtype}, "cpu")


def contents_of(ids):
    """Contents that show which memories they belong to.   [B, M]."""
    ids = np.asarray(ids)
    return {"id": ids, "vector": ids[..., None] + np.array([0.25, 0.5, 0.75])}


def block(memory, ids):
    """After a block with these ids."""
    return memory.append(np, contents_of(ids)).advance(np.shape(ids)[1])


def rows_of(memory):
    """(id, age) of what each row holds, in the order of the slots; contents must belong together."""
    np.testing.assert_array_equal(memory.contents["vector"], contents_of(memory.contents["id"])["vector"])
    assert memory.age.dtype == np.int64
    return [
        [(int(i), int(a)) for i, a, here in zip(*row, strict=True) if here]
        for row in zip(memory.contents["id"], memory.age, memory.held, strict=True)
    ]


def test_a_memory_of_nothing():
    memory = empty(2)
    assert memory.slots == 0
    assert rows_of(memory) == [[], []]
    assert {name: x.shape for name, x in memory.contents.items()} == {"id": (2, 0), "vector": (2, 0, 3)}
    assert memory.drop(np, np.zeros((2, 0), bool)).slots == 0
    assert memory.forget_row(np, 1).advance(5).slots == 0


def test_a_block_appends_its_memories():
    memory = empty(2).append(np, contents_of([[1, 2, 3], [11, 12, 13]]))
    np.testing.assert_array_equal(memory.age, [[0, -1, -2]] * 2)  # its first query is at hand
    memory = memory.advance(3)
    assert rows_of(memory) == [[(1, 3), (2, 2), (3, 1)], [(11, 3), (12, 2), (13, 1)]]
    memory = block(memory, [[4], [14]])
    assert rows_of(memory)[1] == [(11, 4), (12, 3), (13, 2), (14, 1)]


def test_drop_keeps_order_and_contents_of_the_others():
    memory = block(empty(2), np.arange(12).reshape(2, 6))
    unwanted = np.array([[0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]], bool)
    dropped = memory.drop(np, unwanted)
    assert rows_of(dropped) == [[(0, 6), (2, 4), (3, 3)], [(7, 5), (10, 2)]]
    assert dropped.slots == 3
    np.testing.assert_array_equal(dropped.held, [[True, True, True], [False, True, True]])
    again = dropped.drop(np, np.array([[0, 0, 0], [0, 0, 1]], bool))
    assert rows_of(again) == [[(0, 6), (2, 4), (3, 3)], [(7, 5)]]
    assert rows_of(again.drop(np, again.held)) == [[], []]
    assert again.drop(np, again.held).slots == 0


def test_drop_by_rank():
    memory = block(empty(2), np.arange(8).reshape(2, 4))
    rank = np.array([[3, 1, 3, 1], [2, 2, 0, 1]])
    unwanted = np.array([[0, 0, 0, 0], [0, 0, 1, 0]], bool)
    assert rows_of(memory.drop(np, unwanted, rank)) == [[(1, 3), (3, 1), (0, 4), (2, 2)], [(7, 1), (4, 4), (5, 3)]]


def test_a_row_is_forgotten_alone():
    memory = block(block(empty(3), np.arange(6).reshape(3, 2)), [[6], [7], [8]])
    forgotten = memory.forget_row(np, 1)
    assert rows_of(forgotten) == [rows_of(memory)[0], [], rows_of(memory)[2]]
    assert rows_of(block(forgotten, [[9], [10], [11]]))[1] == [(10, 1)]


@st.composite
def programs(draw):
    """Batch size and what happens to a memory, one thing after the other."""
    batch = draw(st.integers(1, 3))
    happenings = st.one_of(
        st.tuples(st.just("block"), st.integers(1, 5)),
        st.tuples(st.just("skip"), st.sampled_from([1, 2, 999, 10**9 + 7])),
        st.tuples(st.just("drop"), st.tuples(st.integers(0, 2**32), st.floats(0, 1), st.integers(0, 6))),
        st.tuples(st.just("forget"), st.integers(0, batch - 1)),
    )
    return batch, draw(st.lists(happenings, max_size=15))


@given(programs())
def test_programs_against_lists(program):
    """Rows as Python lists of (id, step); and no memory on the way is changed by what follows."""
    batch, happenings = program
    memory, now, ids = empty(batch), 0, count()
    rows, seen = [[] for _ in range(batch)], []
    for what, how in happenings:
        if what == "block":
            new = [[next(ids) for _ in range(how)] for _ in range(batch)]
            slots = memory.slots
            memory = block(memory, new)
            assert memory.slots == slots + how
            rows = [row + list(zip(more, count(now))) for row, more in zip(rows, new, strict=True)]
            now += how
        elif what == "skip":
            memory, now = memory.advance(how), now + how
        elif what == "drop":
            seed, share, room = how
            gone = np.flatnonzero(np.random.default_rng(seed).random(500) < share)  # most programs have fewer
            memory = memory.drop(np, np.isin(memory.contents["id"], gone), room=room)
            rows = [[(i, step) for i, step in row if i not in gone] for row in rows]
            assert memory.slots == max(len(row) for row in rows)
        else:
            memory = memory.forget_row(np, how)
            rows[how] = []
        assert rows_of(memory) == [[(i, now - step) for i, step in row] for row in rows]
        seen.append((memory, rows_of(memory)))
    for earlier, was in seen:
        assert rows_of(earlier) == was


def test_a_memory_never_changes():
    """Two futures of one memory know nothing of each other, and its arrays may be read-only."""
    memory = block(empty(2), [[1, 2], [11, 12]])
    for array in (memory.age, *memory.contents.values()):
        array.flags.writeable = False
    one, other = block(memory, [[3], [13]]), block(memory, [[4], [14]])
    assert rows_of(one)[0] == [(1, 3), (2, 2), (3, 1)]
    assert rows_of(other)[0] == [(1, 3), (2, 2), (4, 1)]
    memory.advance(3), memory.forget_row(np, 0), memory.drop(np, memory.held)
    assert rows_of(memory) == [[(1, 2), (2, 1)], [(11, 2), (12, 1)]]
    with pytest.raises(AttributeError):
        memory.age = memory.age + 1


@pytest.mark.parametrize("steps", [0, 1, 10**8 + 1, 10**12])
def test_empty_slots_are_never_seen(steps):
    """However long the others go on, and whatever an empty slot contains."""
    memory = block(empty(2), np.arange(10).reshape(2, 5)).forget_row(np, 1).advance(steps)
    assert rows_of(memory)[1] == []
    spans = np.full((2, 5), 1e13)
    mask = refspan.soft_mask(spans, memory.age, queries=4, ramp=2.0)
    assert np.all(mask[0] == 1)
    assert not mask[1].any()
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 2, size, 3)) for size in (4, 5, 5))
    key[1], value[1] = 1e200, -1e200
    output, saved = refspan.span_attention(query, key, value, spans, memory.age, ramp=2.0)
    grads = refspan.span_attention_backward(np.ones_like(output), saved)
    assert not output[1].any()
    assert not any(grad[1].any() for grad in (grads.query, grads.key, grads.value, grads.span))


eighths = st.integers(0, 8 * 30).map(lambda n: n / 8)


@given(eighths, st.integers(1, 60), eighths.filter(lambda r: r > 0))
@example(3.5, 6, 2.5)
@example(0.0, 1, 1.0)
def test_expired_is_what_no_later_query_sees(span, age, ramp):
    """In binary fractions the mask is exact, at its end too. `age` is that at the next query."""
    span, age = np.array([[span]]), np.array([[age]])
    later = refspan.soft_mask(span, age, queries=90, ramp=ramp)
    assert expired(np, span, age, ramp).item() == (not later.any())
    assert expired(np, span.astype(np.float32), age, ramp).item() == (not later.any())


RAMP = 3.5
PERIOD = 1_000_003
STRIDES = (4, 11, 5, 4, 333_337, 17, 4, 5, 99_991, PERIOD - 433_378)
"""Steps from one block of 4 to the next; then all begins again."""


def phases(dtype):
    """Step, phase and memory after each stride, forever: what has expired is dropped.

    Most spans are short; the last of each block outlives long strides, and in row 0 a whole period.
    """
    rng = np.random.default_rng(3)
    spans = [rng.integers(0, 8 * 40, (2, 4)) / 8 for _ in STRIDES]  # in eighths, exact below 2^24 / 8 in float32
    for span in spans:
        span[:, 3] = 1_500_000.125, 400_000.5
    memory = empty_memory(np, 2, {"span": (), "step": ()}, {"span": dtype, "step": np.int64}, "cpu")
    now = 0
    while True:
        for phase, (span, stride) in enumerate(zip(spans, STRIDES, strict=True)):
            steps = np.tile(now + np.arange(4), (2, 1))
            memory = memory.append(np, {"span": span.astype(dtype), "step": steps}).advance(stride)
            memory = memory.drop(np, expired(np, memory.contents["span"], memory.age, RAMP))
            now += stride
            yield now, phase, memory


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_hundred_million_steps(dtype):
    """Ages and remaining spans are those of whole numbers and fractions, and of the same phase near step 0."""
    assert sum(STRIDES) == PERIOD
    early, held = {}, []
    for now, phase, memory in phases(dtype):
        here, age, span = memory.held, memory.age, memory.contents["span"]
        np.testing.assert_array_equal(age[here], (now - memory.contents["step"])[here])
        remaining = span - age.astype(dtype)
        assert remaining.dtype == dtype
        state = [here, *(np.where(here, x, 0) for x in (age, span, remaining))]
        if now > 2 * PERIOD:  # by then, what was there at the start is gone
            for was, got in zip(early.setdefault(phase, state), state, strict=True):
                np.testing.assert_array_equal(got, was)
        if now > 10**8:
            held.append(here.sum(axis=1))
            for e, t, r in zip(span[here], age[here], remaining[here], strict=True):
                assert Fraction(float(r)) == Fraction(float(e)) - int(t) > -RAMP
        if now > 10**8 + PERIOD:
            break
    assert len(held) > len(STRIDES)
    assert len({tuple(rows) for rows in held}) > 5, "nothing moved"
    assert max(age.max() for _, age, *_ in early.values()) > PERIOD


def test_array_api_strict_on_its_second_device():
    """That device refuses to become a NumPy array: a hidden call of NumPy fails."""
    xp, device = array_api_strict, array_api_strict.Device("device1")

    def to(x):
        return xp.asarray(np.asarray(x).copy(), device=device)

    def back(x):
        assert x.device == device
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE"), copy=True))

    ours, theirs = empty(2), empty_memory(xp, 2, SIZES, {"id": xp.int64, "vector": xp.float64}, device)
    gone = [1, 4, 5, 12, 13]
    for start, queries, room in ((0, 3, 0), (6, 4, 4), (14, 2, 3), (18, 3, 0)):
        contents = contents_of(start + np.arange(2 * queries).reshape(2, queries))
        ours = ours.append(np, contents).advance(queries)
        theirs = theirs.append(xp, {name: to(x) for name, x in contents.items()}).advance(queries)
        unwanted = np.isin(ours.contents["id"], gone)
        ours, theirs = ours.drop(np, unwanted, room=room), theirs.drop(xp, to(unwanted), room=room)
        ours, theirs = (ours.forget_row(np, 1), theirs.forget_row(xp, 1)) if start == 6 else (ours, theirs)
        np.testing.assert_array_equal(back(theirs.age), ours.age)
        np.testing.assert_array_equal(back(theirs.held), ours.held)
        for name, x in ours.contents.items():
            np.testing.assert_array_equal(back(theirs.contents[name])[ours.held], x[ours.held])
    span, age = np.array([[3.0, 4.5]]), np.array([[6, 6]])
    np.testing.assert_array_equal(back(expired(xp, to(span), to(age), 2.0)), [[True, False]])


def test_ages_that_cannot_be():
    check_ages(np, "age", np.array([[1, NEVER, NEVER + 7, 2**40]]), (1, 4))
    with pytest.raises(ValueError, match=r"^age: got -3, expected at least 1$"):
        check_ages(np, "age", np.array([[5, 0, -3, NEVER]]), (1, 4))
    with pytest.raises(ValueError, match=r"^age: got shape \(1, 2\), expected \(1, 3\)$"):
        check_ages(np, "age", np.array([[1, 2]]), (1, 3))
    with pytest.raises(TypeError, match=r"^age: got int32, expected int64$"):
        check_ages(np, "age", np.array([[1, 2]], np.int32), (1, 2))


# two forms of memory


def random_model(seed, norm, **changes):
    """A model whose spans have all lengths up to a few blocks, so that rows drop different numbers of memories."""
    settings = {
        "vocab_size": 9,
        "hidden_size": 8,
        "feedforward_size": 11,
        "layers": 2,
        "heads": 2,
        "head_size": 3,
        "block_size": 5,
        "max_span": 14.0,
        "ramp": 3.5,
        "span_temperature": 1.5,
    }
    config = refspan.ModelConfig(**settings | changes, norm=norm)
    rng = np.random.default_rng(seed)
    start = refspan.initial_parameters(config, seed, positions=4 + seed, span_start=0.4, dtype="float64")
    params = {name: np.asarray(x + 0.3 * rng.standard_normal(x.shape)) for name, x in start.items()}
    for name in params:
        if name.endswith("span.weight"):
            params[name] *= 4
    return config, params, rng.integers(0, config.vocab_size, (3, 61))


LENGTHS = (5, 5, 1, 3, 5, 2, 1, 5, 5, 4, 5, 5)
"""Of blocks: some shorter than the model's."""

CASES = [
    *((seed, norm, {}) for seed in range(2) for norm in ("post", "pre")),
    (2, "post", {"ramp": 0.4, "layers": 1}),
    (3, "pre", {"ramp": 9.0, "max_span": 4.0, "layers": 3, "heads": 1}),
]

SAME = 1e-12
"""Numbers of size 10 at most, through 3 layers of sums of at most 60 products, in another order: 200 * 10 * EPS."""


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def case(request):
    seed, norm, changes = request.param
    return random_model(seed, norm, **changes)


def blocks_of(tokens):
    starts = np.cumsum((0, *LENGTHS))
    return [(tokens[:, a:b], tokens[:, a + 1 : b + 1]) for a, b in pairwise(starts)]


def training(config, params, tokens):
    """Log-probabilities, losses, gradients and the memories after each block, from hidden states."""
    memory, results = None, []
    for inputs, targets in blocks_of(tokens):
        before = memory or refspan.model.start_memory(config, params, len(tokens))
        log_probs, _, _ = model(config, params, inputs, before)
        losses, grads, memory = refspan.loss_and_gradients(
            config, params, inputs, targets, memory, span_loss_weight=0.2
        )
        results.append((log_probs, losses, grads, memory))
    return results


def streaming(config, params, tokens):
    """Log-probabilities of each block, from keys, values and spans; and how many memories each layer holds."""
    stream = refspan.open_model(config, params, batch=len(tokens))
    return [(stream.step(inputs), stream.memory_size()) for inputs, _ in blocks_of(tokens)]


def never(xp, span, age, ramp):
    return xp.zeros(age.shape, dtype=xp.bool)


def held_by_rows(memory):
    return memory.held.sum(axis=1)


def test_hidden_states_or_keys_and_values(case):
    config, params, tokens = case
    ragged = 0
    trained, streamed = training(config, params, tokens), streaming(config, params, tokens)
    for (log_probs, _, _, memory), (streamed_log_probs, slots) in zip(trained, streamed, strict=True):
        np.testing.assert_allclose(streamed_log_probs, log_probs, rtol=0, atol=SAME)
        assert slots == tuple(held_by_rows(layer).max() for layer in memory)
        ragged += sum(len(set(held_by_rows(layer))) > 1 for layer in memory)
    assert ragged >= 5, "rows dropped alike"
    assert sum(slots) < config.layers * sum(LENGTHS), "nothing was ever dropped"


def test_dropping_changes_nothing(case, monkeypatch):
    config, params, tokens = case
    trained, streamed = training(config, params, tokens), streaming(config, params, tokens)
    monkeypatch.setattr(refspan.memory, "expired", never)
    trained_of_all, streamed_of_all = training(config, params, tokens), streaming(config, params, tokens)
    assert streamed_of_all[-1][1] == (sum(LENGTHS),) * config.layers
    for (log_probs, slots), (of_all, slots_of_all) in zip(streamed, streamed_of_all, strict=True):
        assert all(n <= m for n, m in zip(slots, slots_of_all, strict=True))
        np.testing.assert_allclose(of_all, log_probs, rtol=0, atol=SAME)
    for (log_probs, losses, grads, memory), (of_all, losses_of_all, grads_of_all, memory_of_all) in zip(
        trained, trained_of_all, strict=True
    ):
        np.testing.assert_allclose(of_all, log_probs, rtol=0, atol=SAME)
        np.testing.assert_allclose(losses_of_all, losses, rtol=SAME)
        for name, grad in grads.items():
            np.testing.assert_allclose(grads_of_all[name], grad, rtol=0, atol=SAME, err_msg=name)
        for some, everything in zip(memory, memory_of_all, strict=True):
            assert everything.slots == everything.age[0].max() >= some.slots


def test_a_stream_goes_on_where_training_stopped(case):
    """Hidden states and ages, with empty slots, given to `open_model`."""
    config, params, tokens = case
    trained = training(config, params, tokens)
    memory = trained[6][3]
    assert any(not layer.held.all() for layer in memory)
    pairs = [(layer.contents["hidden"], layer.age) for layer in memory]
    stream = refspan.open_model(config, params, batch=len(tokens), memory=pairs)
    assert stream.memory_size() == tuple(layer.slots for layer in memory)
    for (log_probs, *_), (inputs, _) in zip(trained[7:], blocks_of(tokens)[7:], strict=True):
        np.testing.assert_allclose(stream.step(inputs), log_probs, rtol=0, atol=SAME)


def test_each_row_as_if_it_were_alone(case):
    """Rows that hold fewer memories than the longest have empty slots, which change nothing."""
    config, params, tokens = case
    together = streaming(config, params, tokens)
    for row in range(len(tokens)):
        alone = streaming(config, params, tokens[row : row + 1])
        for (log_probs, _), (all_log_probs, _) in zip(alone, together, strict=True):
            np.testing.assert_allclose(log_probs[0], all_log_probs[row], rtol=0, atol=SAME)
