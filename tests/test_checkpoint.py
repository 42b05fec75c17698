"""Files of models and of streams: what is saved comes back, and what is no such file is refused by name."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import refspan
from refspan.errors import SetupError
from refspan.fingerprint import fingerprint
from refspan.memory import NEVER

CONFIG = refspan.ModelConfig(
    vocab_size=7,
    hidden_size=6,
    feedforward_size=10,
    layers=2,
    heads=2,
    head_size=4,
    block_size=5,
    max_span=12,
    ramp=3.5,
    span_temperature=2.0,
    norm="pre",
)
PARAMS = refspan.initial_parameters(CONFIG, 0, span_start=0.4)
METADATA = {"refspan_model": "1", "config": json.dumps(CONFIG.to_dict())}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def write(path, arrays, metadata=METADATA):
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))


def metadata_of(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def stream(batch=2, *, read=9, config=CONFIG, params=PARAMS):
    """A stream that has read so many tokens in each row, other ones in other rows."""
    opened = refspan.open_model(config, params, batch=batch)
    if read:
        opened.step(tokens(batch, read))
    return opened


def tokens(batch, count, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, count))


# models


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_model_comes_back_as_it_was(path, dtype, norm):
    config = replace(CONFIG, norm=norm)
    params = refspan.initial_parameters(config, 1, positions=3, dtype=dtype)
    refspan.save_model(path, config, params)
    loaded_config, loaded = refspan.load_model(path)
    assert loaded_config == config
    assert set(loaded) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_views_are_saved_as_what_they_show(path):
    strange = {n: np.asfortranarray(x) if x.ndim == 2 else x for n, x in PARAMS.items()}
    strange["output.bias"] = np.flip(np.flip(PARAMS["output.bias"]).copy())
    assert strange["output.bias"].strides == (-4,)
    refspan.save_model(path, CONFIG, strange)
    _, loaded = refspan.load_model(path)
    for name, array in PARAMS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert fingerprint(CONFIG, strange) == fingerprint(CONFIG, PARAMS)


def test_notes_stand_beside_what_the_file_needs(path):
    refspan.save_model(path, CONFIG, PARAMS, notes={"trained_for": "900 steps", "config": "mine", "refspan_model": "0"})
    assert metadata_of(path) == {**METADATA, "trained_for": "900 steps"}
    assert refspan.load_model(path)[0] == CONFIG


def test_what_is_no_model_is_not_saved(path):
    with pytest.raises(ValueError, match=r"parameter output\.bias: missing"):
        refspan.save_model(path, CONFIG, {name: x for name, x in PARAMS.items() if name != "output.bias"})
    with pytest.raises(ValueError, match=r"parameter output\.bias: holds NaN"):
        refspan.save_model(path, CONFIG, {**PARAMS, "output.bias": np.full(7, np.nan, np.float32)})
    assert not path.exists()


FLIPPED = {**PARAMS, "layers.1.attention.query.weight": PARAMS["layers.1.attention.query.weight"].T.copy()}
BOTH = {**FLIPPED, "embedding.weight": PARAMS["embedding.weight"][:5]}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (FLIPPED, r"parameter layers.1.attention.query.weight: got shape (6, 8), expected (8, 6)"),
        (BOTH, "parameter embedding.weight: got shape (5, 6), expected (7, 6)"),  # the first in the order of the model
        ({**PARAMS, "final_norm.bias": np.full(6, np.nan, np.float32)}, "parameter final_norm.bias: holds NaN or inf"),
        ({**PARAMS, "output.bias": np.full(7, np.inf, np.float32)}, "parameter output.bias: holds NaN or infinite"),
        ({**PARAMS, "extra": np.ones(2)}, "parameter extra: not known to this config (1 such)"),
        (
            {n: x for n, x in PARAMS.items() if not n.endswith("span.bias")},
            "parameter layers.0.span.bias: missing (2 of 34 parameters are)",
        ),
        ({**PARAMS, "layers.0.span.bias": np.zeros(1, np.float32)}, "parameter layers.0.span.bias: got shape (1,)"),
        ({**PARAMS, "output.bias": np.zeros(7)}, "parameter output.bias: got float64, expected float32"),
        ({**PARAMS, "output.bias": np.zeros(7, np.int64)}, "parameter output.bias: got int64, expected float32"),
        (
            {**PARAMS, "output.bias": np.zeros(7, np.int16)},
            "output.bias: got I16, expected one of F16, F32, F64, I64, U8",
        ),
        ({}, "parameter layers.0.attention.query.weight: missing, but its config has 2 layers"),
    ],
)
def test_a_model_that_contradicts_its_config_is_refused(path, arrays, message):
    write(path, arrays)
    with pytest.raises(SetupError) as caught:
        refspan.load_model(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_dtypes_that_numpy_lacks(path):
    """bfloat16, written by hand."""
    write(path, PARAMS)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for tensor in header.values():
        if tensor.get("dtype") == "F32":
            tensor["dtype"] = "BF16"
            tensor["shape"] = [*tensor["shape"], 2]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    with pytest.raises(SetupError, match=r": [a-z0-9.]+: got BF16, expected one of F16, F32, F64, I64, U8$"):
        refspan.load_model(path)


def with_config(**changes):
    return {**METADATA, "config": json.dumps({**CONFIG.to_dict(), **changes})}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            None,
            "not a model, as refspan import and refspan.save_model write "
            "(its metadata has no refspan_model; it begins with the tensor ",
        ),
        ({"format": "pt"}, "not a model, as refspan import and refspan.save_model write"),
        ({**METADATA, "refspan_model": "2"}, "layout 2, this refspan reads 1; use a newer refspan"),
        ({"refspan_model": "1"}, "its metadata has no config"),
        ({**METADATA, "config": "{"}, "model config: Expecting property name"),
        ({**METADATA, "config": "[1]"}, "model config: got [1], expected settings by name"),
        ({**METADATA, "config": "{}"}, "model config: no setting 'block_size'"),
        (with_config(colour="red"), "model config: unknown setting 'colour'"),
        (with_config(ramp=0), "model config: ramp: got 0, expected a finite number > 0"),
        (with_config(heads="2"), "model config: heads: got '2', expected a whole number"),
        (with_config(layers=3), "parameter layers.2.attention.query.weight: missing (14 of 48 parameters are)"),
        (with_config(layers=1), "parameter layers.1.attention.key.weight: not known to this config (14 such)"),
        (
            with_config(layers=10**12),
            "parameter layers.2.attention.query.weight: missing, but its config has 1000000000000 layers",
        ),
        (with_config(norm="post"), "parameter final_norm.bias: not known to this config (2 such)"),
        (with_config(hidden_size=7), "parameter embedding.weight: got shape (7, 6), expected (7, 7)"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(path, metadata, message):
    write(path, PARAMS, metadata)
    with pytest.raises(SetupError) as caught:
        refspan.load_model(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_what_is_no_whole_file_is_refused(path, tmp_path):
    refspan.save_model(path, CONFIG, PARAMS)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = {
        name: entry["data_offsets"] for name, entry in json.loads(content[8 : 8 + header]).items() if name[0] != "_"
    }
    third, (start, end) = sorted(places.items(), key=lambda item: item[1])[2]
    last = max(places, key=places.get)
    cuts = ((8 + header + start + 1, third), (8 + header + start, third), (8 + header + end - 1, third), (-1, last))
    for cut, name in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(SetupError) as caught:
            refspan.load_model(path)
        assert str(caught.value) == f"{path}: no whole safetensors file: it ends within or before {name}"
    huge = (2**60).to_bytes(8, "little")
    others = (
        b"",
        content[:5],
        content[:8],
        content[:1000],
        content + b"\0",
        b"PK\3\4 or so" * 9,
        huge + b"{}",
        b"[]" * 40,
    )
    for other in others:
        path.write_bytes(other)
        with pytest.raises(SetupError, match="no whole safetensors file: ") as caught:
            refspan.load_model(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    safetensors.numpy.save_file({}, path)
    with pytest.raises(SetupError, match=r"its metadata has no refspan_model; it holds no tensors\)"):
        refspan.load_model(path)
    with pytest.raises(SetupError, match=r"gone: no such file$"):
        refspan.load_model(tmp_path / "gone")
    with pytest.raises(SetupError, match="is not a regular file"):
        refspan.load_model(tmp_path)


def test_a_file_is_replaced_only_by_a_whole_one(path, monkeypatch):
    refspan.save_model(path, CONFIG, PARAMS)
    good = path.read_bytes()
    other = refspan.initial_parameters(CONFIG, 5)

    def full(_):
        raise OSError(28, "No space left on device")

    for save in (lambda: refspan.save_model(path, CONFIG, other), lambda: refspan.save_state(path, stream())):
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", full)
            with pytest.raises(SetupError, match=r"model\.safetensors: cannot be written: No space left on device"):
                save()
        assert path.read_bytes() == good
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    refspan.save_model(path, CONFIG, other)
    np.testing.assert_array_equal(refspan.load_model(path)[1]["output.weight"], other["output.weight"])
    with pytest.raises(SetupError, match="is a folder, expected a file to write"):
        refspan.save_model(path.parent, CONFIG, PARAMS)


# streams


@pytest.mark.parametrize("read", [0, 9])
def test_a_stream_goes_on_as_if_never_stopped(path, read):
    first = stream(read=read)
    refspan.save_state(path, first)
    second = stream(read=4)
    refspan.load_state(path, second)
    assert second.memory_size() == first.memory_size()
    for seed in (1, 2):
        np.testing.assert_array_equal(second.step(tokens(2, 6, seed)), first.step(tokens(2, 6, seed)))


def test_rows_of_different_lengths(path):
    first = stream(3)
    first.reset(1)
    refspan.save_state(path, first)
    second = stream(3, read=0)
    refspan.load_state(path, second)
    np.testing.assert_array_equal(second.step(tokens(3, 4, 1)), first.step(tokens(3, 4, 1)))


def test_float16_streams(path):
    params = {name: x.astype(np.float16) for name, x in PARAMS.items()}
    first, second = stream(params=params), stream(params=params, read=0)
    refspan.save_state(path, first)
    refspan.load_state(path, second)
    np.testing.assert_array_equal(second.step(tokens(2, 3)), first.step(tokens(2, 3)))


def refused(path, into, message):
    """The state is refused for this reason, and the stream goes on as if nobody had tried."""
    same = refspan.open_model(into.config, into.params, batch=into.state()["layers.0.age"].shape[0])
    same.restore(into.state())
    with pytest.raises(SetupError) as caught:
        refspan.load_state(path, into)
    assert str(caught.value).startswith(f"{path}: {message}")
    batch = same.state()["layers.0.age"].shape[0]
    np.testing.assert_array_equal(into.step(tokens(batch, 3, 7)), same.step(tokens(batch, 3, 7)))


def test_state_of_another_batch_size(path):
    refspan.save_state(path, stream(2))
    refused(path, stream(3), "state layers.0.age: got shape (2, ")
    refused(path, stream(1), "state layers.0.age: got shape (2, ")
    refspan.load_state(path, stream(2))


def test_state_of_another_model(path):
    refspan.save_state(path, stream())
    nudged = {**PARAMS, "output.bias": np.nextafter(PARAMS["output.bias"], np.float32(9))}
    refused(path, stream(params=nudged), "state model: the fingerprint of other parameters, expected that of this mod")
    wide = {name: x.astype(np.float64) for name, x in PARAMS.items()}
    refused(path, stream(params=wide), "state layers.0.key: got float32, expected float64")
    refused(path, stream(config=replace(CONFIG, ramp=4.0)), "the state of another model, whose ramp is 3.5; expected 4")
    refspan.load_state(path, stream(config=replace(CONFIG, max_span=12.0)))  # the same number


def test_models_and_states_are_told_apart(path):
    refspan.save_state(path, stream())
    with pytest.raises(SetupError, match="not a model, as refspan import and"):
        refspan.load_model(path)
    refspan.save_model(path, CONFIG, PARAMS)
    refused(path, stream(), "not the state of a stream, as refspan.save_state writes (its metadata has no refspan_str")
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, stream(), "no whole safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.span": None}, "state layers.1.span: missing"),
        ({"layers.2.span": np.zeros((2, 3), np.float32)}, "state layers.2.span: not known to this model"),
        ({"layers.0.age": np.ones((2, 4))}, "state layers.0.age: got float64, expected int64"),
        ({"layers.0.key": np.ones((2, 99, 8), np.float32)}, "state layers.0.key: got shape (2, 99, 8), expected (2, "),
        ({"layers.0.span": np.full((2, 99), np.nan, np.float32)}, "state layers.0.span: got shape (2, 99), expected"),
    ],
)
def test_a_state_of_wrong_arrays(path, change, message):
    one = stream()
    refspan.save_state(path, one)
    arrays = {**one.state(), **change}
    write(path, {name: x for name, x in arrays.items() if x is not None}, metadata_of(path))
    refused(path, stream(read=5), message)


def test_a_state_with_nan(path):
    one = stream()
    refspan.save_state(path, one)
    state = one.state()
    write(path, {**state, "layers.1.value": state["layers.1.value"] * np.float32(np.nan)}, metadata_of(path))
    refused(path, stream(read=5), "state layers.1.value: holds NaN or infinite numbers")


def test_a_state_with_an_age_twice(path):
    """A memory is of one step: two of the same age would be read differently here and there. Empty slots are alike."""
    one = stream()
    refspan.save_state(path, one)
    state = one.state()
    age = state["layers.1.age"].copy()
    assert age.shape[1] >= 3
    age[1, 0] = age[1, 2]
    write(path, {**state, "layers.1.age": age}, metadata_of(path))
    refused(path, stream(read=5), f"state layers.1.age: got {age[1, 2]} twice in a row of the batch")
    age[1, :2] = NEVER + 7
    write(path, {**state, "layers.1.age": age}, metadata_of(path))
    refspan.load_state(path, stream())


def test_a_state_of_a_newer_layout(path):
    refspan.save_state(path, stream())
    write(path, stream().state(), {**metadata_of(path), "refspan_stream": "2"})
    refused(path, stream(), "layout 2, this refspan reads 1; use a newer refspan")
