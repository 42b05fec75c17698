"""Frozen vectors: written the same every time, read with suspicion, and replayed."""

import json
import os
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import safetensors.numpy
from test_check_command import check, run_module

import refspan
from refspan.conformance.mutants import MUTANTS
from refspan.conformance.programs import Learn, Open, Reset, Restore, Save, Size, Step
from refspan.conformance.report import Report
from refspan.conformance.runner import run, select
from refspan.conformance.sessions import InProcess
from refspan.conformance.vectors import disk, work
from refspan.conformance.vectors.folder import write_folder
from refspan.conformance.vectors.frozen import frozen_vectors
from refspan.conformance.vectors.lint import lint_folder
from refspan.conformance.vectors.program_json import from_json, to_json
from refspan.conformance.vectors.program_vector import ProgramVector, program_vector_of
from refspan.conformance.vectors.reading import read_folder
from refspan.conformance.vectors.replay import checks_of
from refspan.conformance.vectors.vector import Vector
from refspan.errors import SetupError
from refspan.files import write_whole

pytestmark = pytest.mark.usefixtures("remembered_answers")

LEFT = {
    *("BiasAtMinusMaxSpan", "SpansStartAtRandom", "ProjectsAllMemoriesAgain", "CountsTheProjectionsOfOneRow"),
    *("BuffersAreHandedOnUncleared", "RestoresTheCount", "CountingEndsABlock", "CountsSinceItWasAsked"),
    *("StatesOf64", "LearnsFrom64Memories", "LearnsTokensInBytes", "TokensIn16Bits"),
    *("BlocksAreKnownByTheirMemory", "ModelsAreKnownByTheirOutput"),
    *("StreamsReadFromOneBuffer", "LearnsFromOneBuffer", "ResultsInOneBuffer"),
}
"""Wrong in what no program of a vector asks: parameters to start from, how often something is computed, threads, steps
alone; what a stream leaves behind shows in few programs, all of them larger than a vector should be."""
EPSILON = "refspan.conformance.mutants.weights:Epsilon"


def steps():
    """Those of one attention step."""
    return [vector for vector in frozen_vectors() if isinstance(vector, Vector)]


def programs():
    """Those of a whole model."""
    return [vector for vector in frozen_vectors() if isinstance(vector, ProgramVector)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors")
    write_folder(path, frozen_vectors())
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of few vectors, to be spoilt."""
    chosen = {vector.operation: vector for vector in steps() if vector.inputs["span"].size > 1}
    write_folder(tmp_path / "v", list(chosen.values()))
    return tmp_path / "v"


def report_of(backend, vectors):
    session = InProcess(backend, timeout=10)
    report = Report({**session.facts})
    list(run(session, checks_of(vectors), report))
    session.close()
    return report


def test_frozen_ones_say_why_they_exist():
    vectors = frozen_vectors()
    assert len({vector.id for vector in vectors}) == len(vectors) > 50
    checks = {c.id for c in select()}
    for vector in vectors:
        assert vector.check in checks
        assert vector.purpose
        assert vector.clauses
        assert set(vector.kills) <= set(MUTANTS)
    assert {(vector.operation, vector.dtype) for vector in vectors} == {
        (operation, dtype)
        for operation in ("soft_mask", "span_attention", "span_attention_backward", "stream", "training")
        for dtype in ("float16", "float32", "float64")
        if (operation, dtype) != ("soft_mask", "float16")  # spans are never so narrow
    }


def test_the_folder_is_sound_and_as_the_schema_says(whole):
    assert list(lint_folder(whole)) == []
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads((whole / "manifest.json").read_text()), schema())


def test_the_same_bytes_every_time(whole, tmp_path):
    again = tmp_path / "again"
    assert run_module("vectors", again, PYTHONHASHSEED="7").returncode == 0
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    write_folder(again, frozen_vectors())  # once more, over what is there
    assert (whole / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()


def test_ids_come_from_what_is_asked():
    vector = next(vector for vector in steps() if vector.inputs["span"].size)
    assert replace(vector, purpose="other", kills=(), notes=()).id == vector.id
    assert replace(vector, ramp=vector.ramp + 1).id != vector.id
    assert replace(vector, queries=vector.queries + 1).id != vector.id
    span = vector.inputs["span"].copy()
    span.flat[0] += 1
    assert replace(vector, inputs={**vector.inputs, "span": span}).id != vector.id
    for vector in programs():
        first = vector.program[0]
        assert replace(vector, purpose="other", kills=(), notes=()).id == vector.id
        assert replace(vector, program=vector.program[:-1]).id != vector.id
        params = {name: x if name != "output.bias" else x + 1 for name, x in first.params.items()}
        assert replace(vector, program=(replace(first, params=params), *vector.program[1:])).id != vector.id


def test_they_reject_the_mutants_that_they_say():
    vectors = frozen_vectors()
    for name in (
        *("Epsilon", "OneMaskPerBlock", "SpanGradientWithoutRamp"),
        *("DropsOneStepEarly", "NeverDrops", "StateIsAView", "NoTemperature", "AgesIn8Bits", "ShortenedSpansLearn"),
    ):
        report = report_of(MUTANTS[name].make(), vectors)
        rejected = {r.check.removeprefix("vectors.") for r in report.results if r.status == "failed"}
        assert rejected == {vector.id for vector in vectors if name in vector.kills}
        assert rejected


def test_each_alone_rejects_what_it_says():
    """A mutant that kept what it was asked before would be rejected in company only. Every third claim is tried."""
    vectors = frozen_vectors()
    untrue = []
    for i, (vector, of_vector) in enumerate(zip(vectors, checks_of(vectors), strict=True)):
        for name in vector.kills[i % 3 :: 3]:
            session = InProcess(MUTANTS[name].make(), timeout=20)
            (result,) = run(session, [of_vector], Report(session.facts))
            session.close()
            untrue += [(vector.id, name)] if result.status != "failed" else []
    assert untrue == []


def test_they_are_backend_tests_of_onnx(whole):
    """`onnx.reference` passes them as ONNX's own runner would ask, within our bounds."""
    from onnx.reference import ReferenceEvaluator

    for vector in [vector for vector in read_folder(whole) if isinstance(vector, Vector)][::5]:
        where = whole / vector.id
        model = onnx.load(where / "model.onnx")
        data = where / "test_data_set_0"

        def stored(kind, i, data=data):
            return onnx.numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_{i}.pb"))

        feed = {value.name: stored("input", i) for i, value in enumerate(model.graph.input)}
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, feed)
        for i, (result, value) in enumerate(zip(results, model.graph.output, strict=True)):
            wanted = stored("output", i)
            assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
            bound = stored("bound", i)
            assert np.array_equal(bound, vector.bound[value.name.removeprefix("grad_")])
            with np.errstate(invalid="ignore"):
                assert np.all((np.abs(result - wanted.astype(float)) <= 2 * bound + 1e-12) | np.isinf(bound))


def test_command(whole):
    ran = check("--backend", "numpy", "--vectors", whole)
    assert ran.returncode == 0
    count = len(frozen_vectors())
    assert f"{count} of {count} passed, 0 failed" in ran.stdout
    ran = check("--backend", EPSILON, "--vectors", whole)
    assert ran.returncode == 1
    assert f"replay: refspan check --backend {EPSILON}" in ran.stdout
    ran = check("--backend", "numpy", "--vectors", whole, "--level", "mask")
    assert ran.returncode == 2
    assert "leave --level and --check out" in ran.stderr


def test_failures_are_saved_and_fail_again(tmp_path):
    path = tmp_path / "failures"
    ran = check("--backend", EPSILON, "--check", "attention.lone_survivor", "--check", "attention.weights",
                "--examples", 50, "--save-failures", path)  # fmt: skip
    assert ran.returncode == 1
    assert list(lint_folder(path)) == []
    assert {vector.check for vector in read_folder(path)} == {"attention.lone_survivor", "attention.weights"}
    ran = check("--backend", EPSILON, "--vectors", path)
    assert "0 of 2 passed, 2 failed" in ran.stdout
    ran = check("--backend", "numpy", "--vectors", path)
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("mutant", "check_id"),
    [
        ("memory:DropsOneStepEarly", "memory.saturated"),
        ("memory:NeverDrops", "memory.bound"),
        ("streams:StateIsAView", "memory.restore"),
        ("training:SumOverTokens", "training.task_loss"),
    ],
)
def test_failures_of_models_are_saved_and_fail_again(tmp_path, mutant, check_id):
    path, name = tmp_path / "failures", f"refspan.conformance.mutants.{mutant}"
    ran = check("--backend", name, "--check", check_id, "--save-failures", path)
    assert ran.returncode == 1
    assert list(lint_folder(path)) == []
    assert [vector.check for vector in read_folder(path)] == [check_id]
    ran = check("--backend", name, "--vectors", path)
    assert "0 of 1 passed, 1 failed" in ran.stdout, ran.stdout
    ran = check("--backend", "numpy", "--vectors", path)
    assert ran.returncode == 0, ran.stdout


SEVERAL_QUESTIONS = ["mask.repeated", "attention.repeated", "attention.threads", "attention.mask_scale",
                     "attention.block_split", "gradient.repeated"]  # fmt: skip


@pytest.mark.parametrize("check_id", SEVERAL_QUESTIONS)
def test_of_several_questions_one_that_fails_alone_is_saved(check_id):
    """Or none, where it takes them all."""
    (of_check,) = select(ids=[check_id])
    saved = []
    about = {"mask": "mask", "attention": "weights", "gradient": "gradients"}[of_check.level]
    for mutant in [one for one in MUTANTS.values() if one.area in (about, "behaviour")][::2]:
        if mutant.hangs:
            continue
        session, kept = InProcess(mutant.make(), timeout=20), []
        (result,) = run(session, [of_check], Report(session.facts), examples=40, keep=kept.append)
        for vector in kept:
            (again,) = run(session, checks_of([vector]), Report(session.facts))
            assert again.status == "failed", (mutant.name, result.failure)
        session.close()
        saved += kept
    assert saved


def test_all_mutants_of_models_that_checks_of_one_question_reject_are_rejected():
    """What frozen programs are there for; what is left needs two programs, or an own question."""
    killed = {name for vector in programs() for name in vector.kills}
    areas = ("memory", "streams", "states", "models", "training", "learning", "kept")
    left = {mutant.name for mutant in MUTANTS.values() if mutant.area in areas} - killed
    assert left == LEFT


def test_each_rejects_some_mutants():
    kills = [set(vector.kills) for vector in frozen_vectors()]
    assert all(kills)
    doc = (Path(__file__).resolve().parents[1] / "docs" / "conformance.md").read_text()
    assert f"all together {len(set.union(*kills))} of {len(MUTANTS)}:" in " ".join(doc.split())


def test_a_folder_for_failures_that_is_none_is_refused_before_the_run(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    nowhere = Path("/proc/none")  # where nobody can make a folder
    file = tmp_path / "precious.txt"
    for path in (tmp_path, file, file / "in it" / "deeper", *([nowhere] if nowhere.parent.exists() else [])):
        ran = check("--backend", EPSILON, "--check", "attention.weights", "--save-failures", path)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert len(ran.stderr.splitlines()) == 1


def test_a_report_is_written_even_if_failures_cannot_be_saved(tmp_path, monkeypatch):
    """What stands in the way may have come during the run."""
    from click.testing import CliRunner

    from refspan.commands.check import command
    from refspan.conformance.vectors import folder

    def full(path, vectors):
        raise SetupError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(folder, "write_folder", full)
    report = tmp_path / "report.json"
    arguments = ["--backend", EPSILON, "--check", "attention.weights", "--examples", "20", "--json", str(report)]
    ran = CliRunner().invoke(command, [*arguments, "--save-failures", str(tmp_path / "failures")])
    assert isinstance(ran.exception, SetupError)
    assert "0 of 1 passed, 1 failed" in ran.output
    assert json.loads(report.read_text())["complete"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("before", [False, True])
def test_what_cannot_be_written_to_the_end_is_not_there_at_all(tmp_path, monkeypatch, error, before):
    from refspan.conformance.vectors import folder

    def fails_in_the_third(path, content):
        if len(list((tmp_path / "v").iterdir())) > 3:
            raise error
        write_whole(path, content)

    if before:
        write_folder(tmp_path / "v", steps()[:1])
    there = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_whole", fails_in_the_third)
        with pytest.raises(SetupError if isinstance(error, OSError) else error):
            write_folder(tmp_path / "v", steps()[:5])
    assert contents(tmp_path) == there
    write_folder(tmp_path / "v", steps()[:5])
    assert not list(lint_folder(tmp_path / "v"))


def test_a_folder_whose_writer_was_killed_can_be_gone_on_with(tmp_path, monkeypatch):
    from refspan.conformance.vectors import folder

    def killed(path, content):
        if path.name == "case.safetensors":
            raise KeyboardInterrupt
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_whole", killed)
        patch.setattr(folder, "_undo", lambda made: None)
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "v", steps()[:1])
    assert contents(tmp_path)
    write_folder(tmp_path / "v", steps()[:1])
    assert not list(lint_folder(tmp_path / "v"))


def contents(path):
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_passing_saves_nothing(tmp_path):
    ran = check(
        "--backend", "numpy", "--check", "mask.values", "--examples", 5, "--save-failures", tmp_path / "failures"
    )
    assert ran.returncode == 0
    assert not (tmp_path / "failures").exists()


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def first(folder):
    return folder / manifest(folder)["cases"][0]["id"]


def case_file(folder):
    return first(folder) / "case.safetensors"


def text(content):
    """Another manifest."""
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def said(**changes):
    """Another entry for the first case."""

    def spoil(folder):
        tree = manifest(folder)
        tree["cases"][0].update(changes)
        (folder / "manifest.json").write_text(json.dumps(tree))

    return spoil


def content(make):
    """Other bytes in the first case's file."""
    return lambda folder: case_file(folder).write_bytes(make(folder))


def tensor(name, make):
    """Another tensor there; None to leave it out."""

    def spoil(folder):
        tensors = safetensors.numpy.load(case_file(folder).read_bytes())
        tensors[name] = make(tensors.get(name))
        case_file(folder).write_bytes(safetensors.numpy.save({n: x for n, x in tensors.items() if x is not None}))

    return spoil


def link(which):
    def spoil(folder):
        target, elsewhere = which(folder), folder.parent / "elsewhere"
        shutil.move(target, elsewhere)
        target.symlink_to(elsewhere)

    return spoil


def piped(path):
    path.unlink()
    os.mkfifo(path)


def pipe(folder):
    piped(case_file(folder))


def of_version(version):
    def spoil(folder):
        tree = manifest(folder)
        (folder / "manifest.json").write_text(json.dumps({**tree, "refspan_vectors": version}))

    return spoil


DAMAGED = "is no safetensors file, or a damaged one"
HOSTILE = {
    "no folder": (shutil.rmtree, "manifest.json: no such file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: no such file"),
    "no JSON": (text(b"\xff\x00"), "is not a manifest of vectors"),
    "nested": (text(b"[" * 10**6), "is not a manifest of vectors"),
    "a list": (text(b"[]"), "is not a manifest of vectors"),
    "other version": (of_version(9), "has version 9"),
    "traversal": (said(id="../../etc/passwd"), "got id '../../etc/passwd'"),
    "absolute": (said(id="/etc/passwd"), "got id '/etc/passwd'"),
    "hidden traversal": (said(id="span_attention-0123456789abcdef/../.."), "got id"),
    "ramp": (said(ramp=-1.0), "`ramp` is '-1.0'"),
    "no number": (said(ramp=float("nan")), "`ramp` is 'nan'"),
    "queries": (said(queries=10**12), "`queries` is"),
    "clauses": (said(clauses=["FLY"]), "`clauses` is"),
    "link": (link(case_file), "is a link; expected a file of the folder itself"),
    "linked folder": (link(first), "is a link; expected a file of the folder itself"),
    "missing": (lambda folder: case_file(folder).unlink(), "case.safetensors: no such file"),
    "a pipe": (pipe, "is not a regular file"),
    "huge": (lambda folder: os.truncate(case_file(folder), 1 << 40), "expected at most 67108864"),
    "truncated": (lambda folder: os.truncate(case_file(folder), 100), DAMAGED),
    "huge header": (content(lambda folder: (2**62).to_bytes(8, "little") + b"{}"), DAMAGED),
    "protobuf": (content(lambda folder: (first(folder) / "model.onnx").read_bytes()), DAMAGED),
    "bound below 0": (tensor("bound.mask", lambda x: -1 - x), "'bound.mask' is not a bound"),
    "no bound": (tensor("bound.mask", lambda x: x + np.nan), "'bound.mask' is not a bound"),
    "no input": (tensor("input.age", lambda x: None), "has inputs"),
    "no result": (tensor("expected.mask", lambda x: None), "'mask' is missing"),
    "other shape": (tensor("input.age", lambda x: x[:, :-1].copy()), "'age' is missing, of another shape"),
    "other dtype": (tensor("input.age", lambda x: x.astype(np.int32)), "another dtype than float and int64"),
    "scalar": (tensor("input.span", lambda x: np.array(x.flat[0])), "is no [B, N]"),
    "more": (tensor("nonsense", lambda x: np.zeros(1)), "has a tensor 'nonsense'"),
    "another terminal": (tensor("input.\x1b[2J", lambda x: np.zeros(1)), "has inputs ?[2J, age"),
    "half a character": (said(purpose="\ud800"), "`purpose` is '\\ud800'"),
    "control character": (said(notes=["fine", "\x1b[2J"]), "`notes` is"),
    "two lines": (said(check="mask.values\n"), "`check` is 'mask.values\\n'"),
    "true": (said(queries=True), "`queries` is 'True'"),
    "true version": (of_version(True), "has version True"),
    "version in colours": (of_version("\x1b[31m1"), "has version ?[31m1"),
    "short ramp": (said(ramp=1e-40), "`ramp` is '1e-40'; see manifest.schema.json"),
    "NaN": (tensor("input.span", lambda x: x * np.float32(np.nan)), "span: got"),
    "large manifest": (lambda folder: os.truncate(folder / "manifest.json", 1 << 25), "expected at most 16777216"),
}


@pytest.fixture
def of_programs(tmp_path):
    """A folder of one program, to be spoilt; of a stream that starts with memories, is reset and restored."""
    params = refspan.initial_parameters(CONFIG, seed=0)
    rng = np.random.default_rng(0)
    memory = [(rng.standard_normal((2, 3, 4)).astype(np.float32), np.array([[5, 2, 9], [1, 4, 2]]))]
    tokens = rng.integers(0, 5, (2, 3))
    program = (
        Open("a", CONFIG, params, 2, memory),
        Step("a", tokens),
        Save("a", "s"),
        Reset("a", 1),
        Step("a", tokens),
        Restore("a", "s"),
        Size("a"),
    )
    vector = program_vector_of(program, check="memory.stream", clauses=("AGE",), purpose="to be spoilt")
    write_folder(tmp_path / "p", [vector])
    assert list(lint_folder(tmp_path / "p")) == []
    assert read_folder(tmp_path / "p")[0].id == vector.id
    return tmp_path / "p"


CONFIG = refspan.ModelConfig(5, 4, 6, 1, 2, 3, 4, 8.0, 2.0)


def calls(change):
    """Other calls."""

    def spoil(folder):
        path = first(folder) / "program.json"
        said = json.loads(path.read_text())
        said = change(said) or said
        path.write_text(json.dumps(said))

    return spoil


def call(i, **changes):
    """Another call i; None takes something away."""

    def change(said):
        said[i] = {name: x for name, x in {**said[i], **changes}.items() if x is not None}

    return calls(change)


def setting(**changes):
    return calls(lambda said: said[0]["config"].update(changes))


def call_of(name, **about):
    return {"operation": name, "stream": "a", **about}


OPEN = call_of("open_model", config=CONFIG.to_dict(), batch=2, params=0, memory=False)


def lots(more, tensors=None, memory=0, *, positions=4):
    """Calls after those that there are, each with such tensors; a large memory or table of positions from the start."""

    def spoil(folder):
        path = first(folder) / "program.json"
        there = json.loads(path.read_text())
        path.write_text(json.dumps(there + more))
        held = safetensors.numpy.load(case_file(folder).read_bytes())
        places = range(len(there), len(there) + len(more))
        held |= {f"input.{i}.{name}": x for i in places for name, x in (tensors or {}).items()}
        held["input.0.params.position.weight"] = np.zeros((positions, CONFIG.head_size), np.float32)
        if memory:
            held["input.0.memory.0.hidden"] = np.zeros((2, memory, CONFIG.hidden_size), np.float32)
            held["input.0.memory.0.age"] = np.tile(np.arange(memory) + 1, (2, 1))
        case_file(folder).write_bytes(safetensors.numpy.save(held))

    return spoil


HOSTILE_PROGRAMS = {
    "no program": (lambda folder: (first(folder) / "program.json").unlink(), "program.json: no such file"),
    "no JSON": (lambda folder: (first(folder) / "program.json").write_bytes(b"\xff"), "can't decode"),
    "nested": (lambda folder: (first(folder) / "program.json").write_bytes(b"[" * 10**6), "is no program"),
    "an object": (lambda folder: (first(folder) / "program.json").write_bytes(b"{}"), "expected a list of 1 to 1000"),
    "too long": (calls(lambda said: said + [said[-1]] * 1000), "expected a list of 1 to 1000 operations"),
    "no operation": (calls(lambda said: ["step", *said[1:]]), "operation 0: expected an object whose `operation`"),
    "unknown": (call(1, operation="exec"), "operation 1: expected an object whose `operation` is one of open_model,"),
    "no stream": (call(1, stream=None), "operation 1: no 'stream'"),
    "a long name": (call(1, stream="a" * 1000), "operation 1: `stream` is 'aaa"),
    "not opened": (call(1, stream="b"), "operation 1: stream 'b' was not opened"),
    "not kept": (call(5, state="t"), "operation 5: state 't' was not kept of this stream"),
    "no such row": (call(3, row=2), "operation 3: `row` is 2, expected 0 to 1"),
    "batch": (call(0, batch=10**12), "operation 0: `batch` or `memory` is no"),
    "other batch": (call(0, batch=3), "operation 0: memory"),
    "memory": (call(0, memory="yes"), "operation 0: `batch` or `memory` is no"),
    "no memory": (call(0, memory=False), "tensor '0.memory.0.age' belongs to no operation"),
    "parameters of another": (call(0, params=3), "operation 0: `params` is 3, which holds none"),
    "no parameters": (call(0, params="0"), "operation 0: `params` is no number of an operation"),
    "many layers": (setting(layers=10**9), "operation 0: its config has 1000000000 layers"),
    "other size": (setting(hidden_size=10**9), "operation 0: parameter embedding.weight: got shape"),
    "unknown setting": (setting(speed=3), "operation 0: model config: unknown setting 'speed'"),
    "no number": (setting(ramp=float("nan")), "operation 0: ramp: got nan"),
    "no tokens": (tensor("input.1.tokens", lambda x: None), "operation 1: no '1.tokens'"),
    "tokens": (tensor("input.1.tokens", lambda x: x + 3), "operation 1: tokens are not all from 0 to 4"),
    "rows": (tensor("input.1.tokens", lambda x: x[:1].copy()), "operation 1: tokens have 1 rows, the stream has 2"),
    "many tokens": (tensor("input.1.tokens", lambda x: np.zeros((2, 6000), np.int64)), "more than 10000 tokens"),
    "ages": (tensor("input.0.memory.0.age", lambda x: x * 0), "operation 0: "),
    "NaN": (tensor("input.0.params.output.bias", lambda x: x * np.float32(np.nan)), "operation 0: parameter output.bi"),
    "more": (tensor("input.9.tokens", lambda x: np.zeros(1)), "tensor '9.tokens' belongs to no operation"),
    "no result": (tensor("expected.1.log_probs", lambda x: None), "'1.log_probs' is missing"),
    "no bound": (tensor("bound.4.log_probs", lambda x: None), "'4.log_probs' is missing"),
    "other bound": (tensor("bound.4.log_probs", lambda x: np.zeros((7, 7))), "'4.log_probs' is missing, of another"),
    "other kind": (said(operation="training"), "`operation` is 'training'"),
    "a link": (link(lambda folder: first(folder) / "program.json"), "is a link; expected a file of the folder"),
    "large": (lambda folder: os.truncate(first(folder) / "program.json", 1 << 21), "expected at most 1048576"),
    "a name of two lines": (call(1, stream="a\nb"), "operation 1: `stream` is"),
    "another terminal": (tensor("input.0.params.\x1b[2J", lambda x: np.zeros(1)), "parameter ?[2J: not known"),
    "long state": (call(0, config={**CONFIG.to_dict(), "norm": "x" * 10**5}), "norm: got 'xxx"),
    "many blocks": (lots([call_of("step")] * 900, {"tokens": np.zeros((2, 5), np.int64)}, 2000), "is too much work, "),
    "many parameters": (lots([OPEN] * 900, positions=20_000), "needs room for 1.7e+07 numbers, expected at most 1.7e"),
    "many states": (lots([call_of("state", state="s")] * 900, memory=2000), "needs room for"),
    "much to project": (lots([], memory=40_000, positions=40_000), "operation 0: is too much work, "),
}


def refused_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(SetupError) as caught:
        read_folder(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_hostile_programs_are_refused_in_one_line(of_programs, name):
    refused_in_one_line(of_programs, *HOSTILE_PROGRAMS[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (tensor("expected.4.log_probs", lambda x: moved(x)), "of 4.log_probs is not what the specification says"),
        (tensor("expected.6.memory_size", lambda x: x - 1), "of 6.memory_size is not what the specification says"),
        (tensor("input.0.params.output.bias", lambda x: moved(x)), "its contents have the id stream-"),
        (call(3, row=0), "its contents have the id stream-"),
        (lambda folder: enormous(folder), "the reference does not take it: a.restore(s) raised ValueError"),
    ],
)
def test_the_linter_finds_in_programs(of_programs, spoil, message):
    spoil(of_programs)
    assert any(message in fault for fault in lint_folder(of_programs))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(folder, name):
    refused_in_one_line(folder, *HOSTILE[name])


def enormous(folder):
    """Parameters that overflow even in float64, so that there are states that nobody returns to."""
    tensors = safetensors.numpy.load(case_file(folder).read_bytes())
    for name, x in tensors.items():
        if name.startswith("input.") and x.dtype == np.float32:
            tensors[name] = np.asarray(x.astype(float) * 1e200)
    case_file(folder).write_bytes(safetensors.numpy.save(tensors))


def moved(x):
    x = x.copy()
    x.flat[0] += 0.5
    return x


UNSOUND = {
    "a changed answer": (tensor("expected.mask", moved), "is not what the specification says"),
    "a changed question": (tensor("input.span", moved), "its contents have the id"),
    "another file": (lambda folder: (folder / "notes.txt").touch(), "notes.txt: is not in the manifest"),
    "another file inside": (lambda folder: (first(folder) / "notes").touch(), "notes: is not part of a case"),
    "no model": (lambda folder: (first(folder) / "model.onnx").unlink(), "model.onnx: is missing"),
    "linked model": (link(lambda folder: first(folder) / "model.onnx"), "model.onnx: is a link"),
    "no file": (lambda folder: os.mkfifo(first(folder) / "pipe"), "pipe: is not part of a case"),
    "model in a pipe": (lambda folder: piped(first(folder) / "model.onnx"), "model.onnx: is not a regular file"),
    "a link to a folder": (
        lambda folder: (first(folder) / "more").symlink_to(folder.parent),
        "more: is a link",
    ),
    "an empty folder": (
        lambda folder: (first(folder) / "more" / "and more").mkdir(parents=True),
        "more/and more: is an empty folder",
    ),
    "a name of two lines": (lambda folder: (folder / "a\nb\x1b[2J").touch(), "a b?[2J: is not in the manifest"),
    "one inside": (lambda folder: (first(folder) / "a\nb\x1b[2J").touch(), "/a b?[2J: is not part of a case"),
    "another model": (
        lambda folder: (first(folder) / "model.onnx").write_bytes(b"x"),
        "is not what the manifest has the hash of",
    ),
}


def head(**changes):
    """Another manifest around the cases."""

    def spoil(folder):
        (folder / "manifest.json").write_text(json.dumps({**manifest(folder), **changes}))

    return spoil


def without(name, *, case=True):
    def spoil(folder):
        tree = manifest(folder)
        del (tree["cases"][0] if case else tree)[name]
        (folder / "manifest.json").write_text(json.dumps(tree))

    return spoil


def hashed(name, digest):
    def spoil(folder):
        said(files={**manifest(folder)["cases"][0]["files"], name: digest})(folder)

    return spoil


UNSOUND_MANIFESTS = {
    "no dtype": (without("dtype"), "`dtype` is none of"),
    "unknown dtype": (said(dtype="bogus"), "`dtype` is none of"),
    "dtype of another type": (said(dtype=["float32"]), "`dtype` is none of"),
    "other dtype": (said(dtype="float16"), "is of dtype float"),
    "more": (head(more=1), "has 'more', expected"),
    "more of a case": (said(**{"more\n": 1}), "the manifest has 'more\\n' of it"),
    "no refspan": (without("refspan", case=False), "`refspan` is no version"),
    "null": (head(refspan=None), "`refspan` is no version"),
    "empty version": (head(refspan=""), "`refspan` is no version"),
    "no mutant": (said(kills=["Epsilon", "OfTomorrow"]), "there is no mutant 'OfTomorrow'"),
    "no check": (said(check="mask.of_tomorrow"), "there is no check 'mask.of_tomorrow'"),
    "no check at all": (said(check=""), "there is no check ''"),
    "no clauses": (said(clauses=[]), "`clauses` is empty"),
    "no purpose": (said(purpose=""), "`purpose` is empty"),
    "no tolerance": (without("tolerance"), "`tolerance` of the manifest is not what"),
    "other tolerance": (
        said(tolerance={"mask": {"largest_bound": 1.0, "undecided": 0}}),
        "`tolerance` of the manifest is not what",
    ),
    "tolerance in words": (said(tolerance="none"), "`tolerance` of the manifest is not what"),
    "more files": (hashed("other.onnx", "0" * 64), "`files` has 'other.onnx', which is not part of a case"),
    "no hash": (hashed("model.onnx", "?"), "`files` has no SHA-256 of 'model.onnx'"),
    "short hash": (hashed("model.onnx", "0" * 63), "`files` has no SHA-256 of 'model.onnx'"),
    "hash of two lines": (hashed("model.onnx", "0" * 64 + "\n"), "`files` has no SHA-256 of 'model.onnx'"),
    "no files": (said(files={}), "is not what the manifest has the hash of"),
}
REFUSED_MANIFESTS = {
    "hash of another type": hashed("model.onnx", 5),
    "no queries": without("queries"),
    "true": said(queries=True),
    "no queries at all": said(queries=0),
    "no ramp": said(ramp=0.0),
    "a ramp that float32 does not hold": said(ramp=1e308),
    "other version": head(refspan_vectors=2),
    "no cases": head(cases={}),
    "a number": said(purpose=5),
    "null": said(kills=None),
    "two lines": said(notes=["a\nb"]),
    "a case of another operation": said(operation="training"),
    "upper case": said(id="soft_mask-0123456789ABCDEF"),
}
"""They are not even read."""


def schema():
    return json.loads(files("refspan.conformance.vectors").joinpath("manifest.schema.json").read_text())


@pytest.mark.parametrize("name", UNSOUND_MANIFESTS)
def test_the_linter_finds_in_manifests(folder, name):
    spoil, message = UNSOUND_MANIFESTS[name]
    spoil(folder)
    assert any(message in fault for fault in lint_folder(folder))
    assert read_folder(folder)  # unsound, and no less readable


def test_a_case_that_is_there_twice(folder):
    cases = manifest(folder)["cases"]
    head(cases=[*cases, cases[0]])(folder)
    with pytest.raises(SetupError, match=f"{cases[0]['id']} is there twice"):
        read_folder(folder)


@pytest.mark.parametrize("name", REFUSED_MANIFESTS)
def test_what_the_schema_refuses_is_refused(folder, name):
    REFUSED_MANIFESTS[name](folder)
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(manifest(folder))) != []
    with pytest.raises(SetupError):
        list(lint_folder(folder))


def test_the_schema_finds_as_much(folder):
    """All but what it has no words for: which checks, mutants and files there are, and what is in them."""
    found = set()
    for name, (spoil, _) in UNSOUND_MANIFESTS.items():
        before = (folder / "manifest.json").read_bytes()
        spoil(folder)
        if not jsonschema.Draft202012Validator(schema()).is_valid(manifest(folder)):
            found.add(name)
        (folder / "manifest.json").write_bytes(before)
    beyond = {"other dtype", "other tolerance", "no mutant", "no check", "more files", "hash of two lines", "no files"}
    assert found == set(UNSOUND_MANIFESTS) - beyond


def test_a_replayed_failure_is_from_no_unknown_check(of_programs):
    said(check=f"vectors.{first(of_programs).name}")(of_programs)
    assert list(lint_folder(of_programs)) == []
    said(check="vectors.of_tomorrow")(of_programs)
    assert any("there is no check" in fault for fault in lint_folder(of_programs))


def attention(shape, memories, operation="span_attention", *, shared=False, positions=None):
    """A case of zeros: all memories are alive."""
    batch, heads, queries, size = shape
    query, key = np.zeros(shape, np.float32), np.zeros((batch, heads, memories, size), np.float32)
    span = np.full((batch, memories), 1e9, np.float32)
    age = np.tile(np.arange(memories) * (not shared) + 1, (batch, 1))
    inputs = {"query": query, "key": key, "value": key, "span": span, "age": age}
    results = {"output": query}
    if operation == "span_attention_backward":
        inputs["grad_out"] = query
        results = {"query": query, "key": key, "value": key, "span": span * 0}
    if positions:
        inputs["position"] = np.zeros((positions, size), np.float32)
        results |= {"position": inputs["position"]} if operation == "span_attention_backward" else {}
    expected = {name: x.astype(float) for name, x in results.items()}
    about = {"check": "attention.output", "clauses": ("LOGIT",), "purpose": "to take long"}
    asked = {"operation": operation, "ramp": 8.0, "queries": queries, "inputs": inputs}
    return Vector(**asked, expected=expected, bound=expected, **about)


SHARED = {"shape": (1, 1, 64, 1), "memories": 1 << 14, "positions": 256, "shared": True}
"""All memories of one age; the gradient of the position table is then slow."""


@pytest.mark.parametrize(
    ("about", "fine"),
    [
        ({"shape": (1, 1, 1 << 18, 1), "memories": 1 << 20}, False),
        ({"shape": (1, 1, 1 << 15, 32), "memories": 1 << 13}, False),
        ({"shape": (1 << 15, 1, 1, 1), "memories": 1}, False),  # a row after the other
        ({"shape": (1, 1, 256, 1), "memories": 256}, True),
        (SHARED, True),
        (SHARED | {"operation": "span_attention_backward", "shared": False}, True),
        (SHARED | {"operation": "span_attention_backward"}, False),
    ],
)
def test_too_much_work_is_refused(tmp_path, about, fine):
    """M = 2^18, N = 2^20 are 25 MB, and a day of computing."""
    write_folder(tmp_path, [attention(**about)])
    faults = list(lint_folder(tmp_path))
    if fine:
        assert faults == []
        assert len(read_folder(tmp_path)) == 1
        return
    (fault,) = faults
    assert "case.safetensors: is too much work, " in fault
    with pytest.raises(SetupError, match="is too much work, "):
        read_folder(tmp_path)


def test_work_is_known_before_it_is_done():
    """No size is 0 in it, or the others could be anything."""
    assert work.attention_units((0, 1 << 60, 1 << 19, 0), 1 << 60) > work.MOST_WORK
    assert work.most_shared(np.array([[3, 1, 3, 3], [2, 2, 5, 6]])) == 3
    assert work.most_shared(np.array([[1, 2, 3], [3, 4, 5]])) == 1
    assert work.most_shared(np.zeros((2, 0), np.int64)) == 1


def test_what_we_ask_ourselves_is_far_from_too_much(whole, monkeypatch):
    monkeypatch.setattr(work, "MOST_WORK", work.MOST_WORK >> 3)
    monkeypatch.setattr(work, "MOST_NUMBERS", work.MOST_NUMBERS >> 3)
    assert len(read_folder(whole)) == len(frozen_vectors())


def test_blocks_of_training_of_one_stream_belong_together():
    params = refspan.initial_parameters(CONFIG, seed=0)
    blocks = [np.zeros((rows, 3), np.int64) for rows in (2, 1)]
    program = [Learn("a", CONFIG, params, tokens, tokens) for tokens in blocks]
    said, tensors = to_json(program)
    with pytest.raises(ValueError, match="operation 1: stream 'a' had another batch, layers, hidden_size or dtype"):
        from_json(said, tensors)
    said[1]["stream"] = "b"
    assert len(from_json(said, tensors)) == 2


def test_a_long_block_of_training_is_too_much():
    tokens = np.zeros((1, 9999), np.int64)
    said, tensors = to_json([Learn("a", CONFIG, refspan.initial_parameters(CONFIG, seed=0), tokens, tokens)])
    with pytest.raises(ValueError, match="operation 0: is too much work"):
        from_json(said, tensors)


def test_a_folder_is_not_read_if_it_is_too_large(folder):
    """60 files of 16 MiB, which take no room on the disk."""
    tree = manifest(folder)
    tree["cases"] = [{**tree["cases"][0], "id": f"{tree['cases'][0]['operation']}-{i:016x}"} for i in range(60)]
    for entry in tree["cases"]:
        (folder / entry["id"]).mkdir()
        (folder / entry["id"] / "case.safetensors").touch()
        os.truncate(folder / entry["id"] / "case.safetensors", 1 << 24)
    (folder / "manifest.json").write_text(json.dumps(tree))
    wanted = f"{folder}: its cases have more than {disk.LARGEST_FOLDER} bytes together"
    for read in (read_folder, lambda path: list(lint_folder(path)), lambda path: write_folder(path, [])):
        with pytest.raises(SetupError, match=wanted):
            read(folder)


def test_nor_checked(folder):
    for i in range(5):
        (first(folder) / str(i)).touch()
        os.truncate(first(folder) / str(i), disk.LARGEST)
    assert read_folder(folder)  # which does not look at them
    with pytest.raises(SetupError, match="bytes together"):
        list(lint_folder(folder))


@pytest.mark.parametrize("name", UNSOUND)
def test_the_linter_finds(folder, name):
    spoil, message = UNSOUND[name]
    spoil(folder)
    assert any(message in fault for fault in lint_folder(folder))
    ran = run_module("vectors", folder, "--lint")
    assert ran.returncode == 1
    assert message in ran.stdout
    assert ran.stdout.replace("\n", "").isprintable()


def outside(folder):
    """A place that vectors have no business in, and what is there before and after."""
    path = folder.parent / "outside"
    path.mkdir()
    (path / "precious.txt").write_text("mine")
    return path


def everything(path):
    """What is below, to be compared: folders, links and contents of files."""
    return {
        p.relative_to(path).as_posix(): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in path.rglob("*")
    }


def instead(which, target="precious.txt"):
    """A link to a file or folder outside, or to nothing, in place of what is there."""

    def plant(folder):
        place = which(folder)
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
        place.symlink_to(outside(folder) / target)

    return plant


PLANTED = {
    "file": instead(case_file),
    "nothing": instead(case_file, "new.txt"),
    "case": instead(first, ""),
    "case that is nowhere": instead(first, "new"),
    "data": instead(lambda folder: first(folder) / "test_data_set_0", ""),
    "beside": lambda folder: (folder / "soft_mask-0123456789abcdef").symlink_to(outside(folder)),
    "deep": lambda folder: (first(folder) / "test_data_set_0" / "more").symlink_to(outside(folder)),
    "manifest": link(lambda folder: folder / "manifest.json"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_nothing_is_written_through_links(folder, name):
    """Nor anything else, in a folder that has one."""
    PLANTED[name](folder)
    before = everything(folder.parent)
    others = [vector for vector in steps() if vector.inputs["span"].size > 1]
    with pytest.raises(SetupError, match=r"is a link; (nothing is written into|expected a file of)") as caught:
        write_folder(folder, others)
    assert "\n" not in str(caught.value)
    assert everything(folder.parent) == before


def test_failures_are_not_saved_through_links(folder):
    PLANTED["beside"](folder)
    ran = check("--backend", EPSILON, "--check", "attention.weights", "--save-failures", folder)
    assert (ran.returncode, ran.stdout) == (2, "")  # before the run
    assert "is a link" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_the_folder_itself_may_be_a_link(folder):
    (folder.parent / "linked").symlink_to(folder)
    write_folder(folder.parent / "linked", steps()[:1])
    assert list(lint_folder(folder)) == []
    assert list(lint_folder(folder.parent / "linked")) == []


def test_hard_links_are_replaced(folder):
    vectors = read_folder(folder)
    places = [place for place in folder.rglob("*") if place.is_file()]
    for i, place in enumerate(places):
        os.link(place, folder.parent / str(i))
        (folder.parent / str(i)).write_bytes(place.read_bytes() + b" ")  # both
    write_folder(folder, vectors[:1])
    others = {p for p in places if vectors[0].id not in p.parts and p.name != "manifest.json"}
    for i, place in enumerate(places):
        assert (folder.parent / str(i)).read_bytes().endswith(b" ")
        assert place.samefile(folder.parent / str(i)) == (place in others)


def test_a_manifest_that_cannot_be_written_again_is_refused_before(folder):
    for more in ("NaN", "[1e999]"):
        before = everything(folder)
        content = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(content.replace('"dtype"', f'"more": {more}, "dtype"', 1))
        assert any("the manifest has 'more' of it" in fault for fault in lint_folder(folder))
        spoilt = everything(folder)
        with pytest.raises(SetupError, match="cannot be added to"):
            write_folder(folder, steps()[:3])
        assert everything(folder) == spoilt
        (folder / "manifest.json").write_bytes(before["manifest.json"])


def test_writing_into_what_is_not_ours(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SetupError, match="is not empty, and holds no vectors"):
        write_folder(tmp_path, frozen_vectors()[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    ran = run_module("vectors", tmp_path / "precious.txt")
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
