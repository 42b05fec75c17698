"""Every form of a report says the same, also of a run that ended early or failed as expected."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from test_check_command import check

from refspan.conformance.badge import badge
from refspan.conformance.expected import read_expected
from refspan.conformance.html_report import html_report
from refspan.conformance.junit import junit
from refspan.conformance.mutants import MUTANTS
from refspan.conformance.report import MARKS, Failure, Known, Picture, Report, Result, write_report
from refspan.conformance.runner import run, select
from refspan.conformance.sessions import InProcess
from refspan.errors import SetupError

SCHEMA = json.loads(files("refspan.conformance").joinpath("report.schema.json").read_text())
NASTY = "<script>alert(1)</script> \x1b[31m\x00\x9b\u202e\ud800\uffff & ]]> \"quoted\" 'too'"
PLAIN = NASTY.encode("unicode_escape").decode()
"""NASTY as reports have it."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTENTION = "refspan.conformance.mutants.weights:Epsilon"


def report_of(backend, ids, **options):
    session = InProcess(backend, timeout=5)
    report = Report({**session.facts, "refspan": "0"})
    list(run(session, select(ids=ids), report, examples=10, **options))
    session.close()
    return report


@pytest.fixture(scope="module")
def failing():
    ids = ["attention.empty", "attention.lone_survivor", "mask.values", "memory.stream", "training.initial_spans"]
    return report_of(MUTANTS["Epsilon"].make(), ids)


def nasty(complete=True):
    failure = Failure(NASTY, (NASTY,), NASTY, (Picture(NASTY, ((0.0, 0.5), (1.0, 0.25))),))
    about = ("mask.values", "mask", ("MASK",), f"{NASTY}\n{NASTY}")
    known = Known(NASTY, "javascript:alert(1)")
    results = [
        Result(*about, "failed", float("inf"), 1, 0.5, 0.1, failure),
        Result(*about, "known failure", float("nan"), 1, 0.5, 0.1, failure, known),
        Result(*about, "passed", 0.5, 1, 0.5, 0.1),
        Result(*about, "not offered", 0.0, 0, 0.0),
    ]
    return Report({"backend": NASTY, NASTY: NASTY}, results, planned=5, complete=complete, complaints=[NASTY])


@pytest.mark.parametrize("complete", [True, False])
def test_json_is_as_its_schema_says(failing, complete):
    for report in (failing, nasty(complete)):
        tree = json.loads(report.to_json())
        jsonschema.validate(tree, SCHEMA)
        assert sum(tree["summary"].values()) == len(tree["results"])
    assert (tree["facts"], tree["results"][0]["purpose"]) == ({"backend": PLAIN, PLAIN: PLAIN}, f"{PLAIN}\n{PLAIN}")
    assert tree["results"][0]["failure"]["counterexample"] == [PLAIN]


def test_the_schema_is_strict():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    tree = json.loads(nasty().to_json())
    for change in ({"extra": 1}, {"complete": "yes"}, {"refspan_report": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**tree, **change}, SCHEMA)


def test_counterexamples_have_pictures(failing):
    by_id = {result.check: result for result in failing.results}
    pictures = by_id["attention.lone_survivor"].failure.pictures
    assert pictures[0].title.startswith("mask, row")
    assert pictures[1].title.startswith("weights, row")
    assert all(0 <= number <= 1 for picture in pictures for line in picture.rows for number in line)


def test_junit(failing):
    root = ET.fromstring(junit(failing))
    (suite,) = root
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["5", "1", "0", "2"]
    cases = {f"{case.get('classname')}.{case.get('name')}": case for case in suite.iter("testcase")}
    failure = cases["refspan.attention.lone_survivor"].find("failure")
    assert "expected" in failure.get("message")
    assert "replay: " in failure.text
    assert cases["refspan.memory.stream"].find("skipped").get("message") == "not offered"
    assert list(cases["refspan.mask.values"]) == []


def test_junit_of_what_backends_say_is_xml():
    root = ET.fromstring(junit(nasty(complete=False)))
    (suite,) = root
    assert suite.get("name") == f"refspan check {PLAIN}"
    assert PLAIN in next(failure.text for failure in suite.iter("failure"))
    assert int(suite.get("tests")) == len(list(suite.iter("testcase")))
    assert "INCOMPLETE" in next(error.get("message") for error in suite.iter("error"))


class Page(HTMLParser):
    """What a page refers to, and whether its elements close."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe")
        assert not [name for name in attrs if name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page(failing):
    page = Page(html_report(failing).decode())
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    text = "".join(page.text)
    assert "Does not conform" in text
    for result in failing.results:
        assert result.check in text
    assert failing.summary() in text


def test_page_of_what_backends_say(failing):
    raw = html_report(nasty()).decode()
    assert "<script" not in raw
    assert "javascript:" not in "".join(re.findall(r"href=.[^>]*", raw))
    text = "".join(Page(raw).text)
    assert text.count(PLAIN) == 23
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_terminal_is_told_no_control_characters():
    lines = list(nasty().header())
    assert [line.count(PLAIN) for line in lines] == [1, 2]
    assert all(line.isprintable() for line in lines)


RUDE = """
class Rude:
    name = "\\x1b[31m\\ud800 \\u4e2d"
    dtypes = ("float32", "\\x1b[31m\\udfff")

    def facts(self):
        return {"\\x1b]0;title\\x07": "\\ud800"}

    def soft_mask(self, span, age, *, queries, ramp):
        raise ValueError("\\x1b[31m \\udfff \\u4e2d")
"""


def test_what_a_rude_backend_says(tmp_path):
    """Also where the terminal does not know all letters."""
    (tmp_path / "rude.py").write_text(RUDE)
    words = ["--backend", "rude.py:Rude", "--check", "mask.past", "--examples", 1]
    for form in ("json", "junit", "html", "badge"):
        words += [f"--{form}", f"r.{form}"]
    ran = check(*words, cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.isascii()
    contents = [(tmp_path / f"r.{form}").read_text() for form in ("json", "junit", "html", "badge")]
    for text in (ran.stdout, *contents):
        assert all(c.isprintable() or c == "\n" for c in text)
    ran = check(*words, "--dtype", "float64", cwd=tmp_path)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "\x1b" not in ran.stderr


def test_a_run_that_ended_early_is_marked_everywhere(failing):
    report = nasty(complete=False)
    assert "INCOMPLETE" in report.summary()
    assert not report.conforms
    assert not report.as_expected
    assert json.loads(report.to_json())["complete"] is False
    assert b"INCOMPLETE" in junit(report)
    assert b"INCOMPLETE: the run ended before its last check" in html_report(report)
    assert b"incomplete" in badge(report)


FORMS = {"json": lambda report: report.to_json().encode(), "junit": junit, "html": html_report, "badge": badge}


@pytest.mark.parametrize("form", FORMS)
def test_half_a_report_takes_the_place_of_nothing_else(tmp_path, form):
    """Names in a whole report that look like those of half a one change nothing."""
    path, partial = tmp_path / "r", tmp_path / "r.partial"
    half, whole = FORMS[form](nasty(complete=False)), nasty()
    whole.facts = {"backend": "".join(mark.decode() for mark in MARKS.values()), "complete": "false"}
    whole = FORMS[form](whole)
    assert write_report(path, form, half, complete=False) == path
    assert write_report(path, form, half, complete=False) == path
    assert not partial.exists()
    assert write_report(path, form, whole, complete=True) == path
    for _ in range(2):
        assert write_report(path, form, half, complete=False) == partial
        assert (path.read_bytes(), partial.read_bytes()) == (whole, half)
    write_report(path, form, whole, complete=True)
    assert not partial.exists()
    path.write_bytes(b"somebody else's")
    partial.write_bytes(b"somebody else's, too")
    write_report(path, form, whole, complete=True)
    assert partial.read_bytes() == b"somebody else's, too"


def test_badge(failing):
    root = ET.fromstring(badge(failing))
    assert root.get("aria-label") == "refspan: 2/5, 1 failed"
    assert b"http://" not in badge(failing).replace(b"http://www.w3.org/2000/svg", b"")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(tmp_path, failing):
    """Nothing overflows, on a wide screen or a narrow one, and every control can be reached with the keyboard."""
    probe = """<script>
    const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre") &&
      e.getBoundingClientRect().right > innerWidth + 1).length;
    const controls = [...document.querySelectorAll("a, summary")];
    const focusable = controls.filter(e => (e.focus(), document.activeElement == e));
    const style = getComputedStyle(document.body);
    document.title = JSON.stringify({wide, focusable: focusable.length, paper: style.backgroundColor, ink: style.color,
      pictures: [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().width > 0).length});
    </script></body>"""
    path = tmp_path / "report.html"
    raw = html_report(failing).decode()
    path.write_text(raw.replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    for width, dark in ((1100, False), (400, True)):
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        data = f"--user-data-dir={tmp_path / 'profile'}"
        ran = subprocess.run(
            [CHROMIUM, *options, data, scheme, f"--window-size={width},900", "--dump-dom", path.as_uri()],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        seen = json.loads(re.search("<title>(.*?)</title>", ran.stdout)[1])
        assert seen["wide"] == 0
        assert seen["focusable"] == raw.count("<a ") + raw.count("<summary")
        assert seen["pictures"] == raw.count("<svg ")
        assert (seen["paper"] == "rgb(22, 23, 26)") == dark


class TestExpectedFailures:
    def file(self, tmp_path, text):
        path = tmp_path / "expected.txt"
        path.write_text(text)
        return path

    def run(self, path, *arguments):
        return check("--backend", ATTENTION, "--examples", 10, "--expected-failures", path, *arguments)

    def test_failures_that_are_expected_do_not_fail_the_run(self, tmp_path):
        path = self.file(tmp_path, "# ours\n\nattention.lone_survivor: an epsilon, https://example.org/1\n")
        ran = self.run(path, "--check", "attention.lone_survivor", "--check", "attention.empty")
        assert ran.returncode == 0
        assert "know  attention.lone_survivor" in ran.stdout
        assert "1 of 2 passed, 0 failed, 1 known failure, 0 not offered" in ran.stdout

    def test_all_fail_as_expected(self, tmp_path):
        path = self.file(tmp_path, "attention.lone_survivor: an epsilon, https://example.org/1\n")
        ran = self.run(path, "--check", "attention.lone_survivor", "--badge", tmp_path / "r.svg")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "0 of 1 passed, 0 failed, 1 known failure, 0 not offered" in ran.stdout
        assert b"0/1, 1 known failure<" in (tmp_path / "r.svg").read_bytes()

    def test_how_many(self):
        result = Result("mask.values", "mask", ("MASK",), "p", "known failure", 2.0, 1, 0.1)
        assert [Report({}, [result] * n).known_failures() for n in range(3)] == [
            "", "1 known failure", "2 known failures"
        ]  # fmt: skip

    def test_commas_and_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "expected.txt"
        path.write_bytes(b"\xef\xbb\xbfmask.values: slow, see https://a.org, but known,https://b.org/x,y?z=1,2\n")
        assert read_expected(path) == {
            "mask.values": Known("slow, see https://a.org, but known", "https://b.org/x,y?z=1,2")
        }

    def test_vectors(self, tmp_path):
        """Each by its id; entries of checks are none of these."""
        backend = "refspan.conformance.mutants.mask:HardMask"
        words = ["--backend", backend, "--check", "mask.values", "--examples", 20]
        assert check(*words, "--save-failures", tmp_path / "v").returncode == 1
        (id_,) = [path.name for path in (tmp_path / "v").iterdir() if path.is_dir()]
        path = self.file(tmp_path, f"vectors.{id_}: hard, https://example.org/1\n")
        words = ["--backend", backend, "--vectors", tmp_path / "v", "--expected-failures", path]
        ran = check(*words)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "0 of 1 passed, 0 failed, 1 known failure" in ran.stdout
        for wrong in ("mask.values", "vectors.soft_mask-0"):
            self.file(tmp_path, f"{wrong}: hard, https://example.org/1\n")
            ran = check(*words)
            assert (ran.returncode, ran.stdout) == (2, "")
            said = f":1: unknown check '{wrong}'; with --vectors, expected vectors.ID of a case there\n"
            assert ran.stderr.endswith(said)

    def test_one_that_passes_fails_the_run(self, tmp_path):
        path = self.file(tmp_path, "attention.empty: a slip, https://example.org/1\n")
        ran = self.run(path, "--check", "attention.empty")
        assert ran.returncode == 1
        assert "attention.empty was expected to fail and passed: take it off the list" in ran.stdout

    def test_one_that_is_not_offered_fails_the_run(self, tmp_path):
        path = self.file(tmp_path, "memory.stream: not built yet, https://example.org/1\n")
        ran = self.run(path, "--check", "attention.empty", "--check", "memory.stream")
        assert ran.returncode == 1
        assert "memory.stream was expected to fail and was not offered: take it off the list" in ran.stdout

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("attention.nothing: why, https://example.org", ":1: unknown check 'attention.nothing'"),
            ("\nattention.output", ":2: got 'attention.output', expected `check: reason, https://..`"),
            ("attention.output: because", "expected `check: reason, https://..`"),
            ("attention.output: , https://example.org", "expected `check: reason, https://..`"),
            ("attention.output: a, https://b\nattention.output: a, https://b", ":2: attention.output is there twice"),
            # a line that must not be read again from each of its spaces
            (f"attention.empty: a{' ' * 900_000}b\n", ":1: got 'attention.empty: a "),
        ],
    )
    def test_files_that_say_nothing(self, tmp_path, text, said):
        path = self.file(tmp_path, text)
        with pytest.raises(SetupError) as caught:
            read_expected(path)
        assert said in str(caught.value)
        ran = self.run(path)
        assert ran.returncode == 2
        assert len(ran.stderr.splitlines()) == 1

    def test_files_that_cannot_be_read(self, tmp_path):
        with pytest.raises(SetupError, match="no such file"):
            read_expected(tmp_path / "none.txt")
        binary = tmp_path / "binary"
        binary.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SetupError, match="not UTF-8"):
            read_expected(binary)
        os.mkfifo(tmp_path / "fifo")
        for path in (Path("/dev/zero"), tmp_path / "fifo"):  # they would be read for ever
            with pytest.raises(SetupError, match="is not a regular file"):
                read_expected(path)
        binary.write_bytes(b"#" * ((1 << 20) + 1))
        with pytest.raises(SetupError, match="has 1048577 bytes, expected at most 1048576"):
            read_expected(binary)


def test_all_forms_at_once(tmp_path):
    names = {"--json": "r.json", "--junit": "r.xml", "--html": "r.html", "--badge": "r.svg"}
    arguments = [x for option, name in names.items() for x in (option, tmp_path / name)]
    ran = check("--backend", "numpy", "--level", "mask", "--examples", 3, *arguments)
    assert ran.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    ran = check("--backend", "numpy", "--html", tmp_path)
    assert ran.returncode == 2
    assert "is a folder, expected a file to write" in ran.stderr
