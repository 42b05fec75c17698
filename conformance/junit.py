"""A report as JUnit XML, which continuous-integration systems read."""

import xml.etree.ElementTree as ET

from refspan.conformance.report import Report, Result


def junit(report: Report) -> bytes:
    """One test case per check. Known failures and what is not offered are skipped; a run that ended early is an error.

    Only characters that XML allows are in it, whatever the backend said.
    """
    failed = report.count("failed") + len(report.complaints)
    skipped = report.count("known failure") + report.count("not offered")
    count = len(report.results) + len(report.complaints) + (not report.complete)
    suite = ET.Element(
        "testsuite",
        name=_text(f"refspan check {report.facts.get('backend', '')}"),
        tests=str(count),
        failures=str(failed),
        errors=str(int(not report.complete)),
        skipped=str(skipped),
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in report.facts.items():
        ET.SubElement(properties, "property", name=_text(name), value=_text(value))
    for result in report.results:
        _case(suite, result)
    for complaint in report.complaints:
        case = ET.SubElement(suite, "testcase", classname="refspan", name="expected failures")
        ET.SubElement(case, "failure", message=_text(complaint))
    if not report.complete:
        case = ET.SubElement(suite, "testcase", classname="refspan", name="the whole run")
        ET.SubElement(case, "error", message="INCOMPLETE: the run ended before its last check")
    tree = ET.ElementTree(ET.Element("testsuites"))
    root = tree.getroot()
    assert root is not None  # noqa: S101
    root.append(suite)
    ET.indent(tree)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _case(suite: ET.Element, result: Result) -> None:
    _, _, name = result.check.partition(".")
    case = ET.SubElement(
        suite, "testcase", classname=f"refspan.{result.level}", name=name, time=f"{result.seconds:.3f}"
    )
    if result.status == "not offered":
        ET.SubElement(case, "skipped", message="not offered")
    elif result.status == "known failure" and result.known is not None:
        ET.SubElement(case, "skipped", message=_text(f"known failure: {result.known.reason}, {result.known.link}"))
    elif result.failure is not None:
        failure = ET.SubElement(case, "failure", message=_text(result.failure.message))
        lines = [*result.failure.counterexample, f"replay: {result.failure.replay}"]
        failure.text = _text("\n".join(["", *lines, ""]))


def _text(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)
