"""A report as JUnit XML, which continuous-integration systems read."""

import xml.etree.ElementTree as ET

from refspan.conformance.report import INCOMPLETE, Report, Result, escaped


def junit(report: Report) -> bytes:
    """One test case per check. Known failures and what is not offered are skipped; a run that ended early is an error.

    Escapes stand for characters that XML does not allow, whatever the backend said.
    """
    failed = report.count("failed") + len(report.complaints)
    skipped = report.count("known failure") + report.count("not offered")
    count = len(report.results) + len(report.complaints) + (not report.complete)
    suite = ET.Element(
        "testsuite",
        name=escaped(f"refspan check {report.facts.get('backend', '')}"),
        tests=str(count),
        failures=str(failed),
        errors=str(int(not report.complete)),
        skipped=str(skipped),
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in report.facts.items():
        ET.SubElement(properties, "property", name=escaped(name), value=escaped(value))
    for result in report.results:
        _case(suite, result)
    for complaint in report.complaints:
        case = ET.SubElement(suite, "testcase", classname="refspan", name="expected failures")
        ET.SubElement(case, "failure", message=escaped(complaint))
    if not report.complete:
        case = ET.SubElement(suite, "testcase", classname="refspan", name="the whole run")
        ET.SubElement(case, "error", message=INCOMPLETE)
    tree = ET.ElementTree(ET.Element("testsuites"))
    root = tree.getroot()
    assert root is not None  # noqa: S101
    root.append(suite)
    ET.indent(tree)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _case(suite: ET.Element, result: Result) -> None:
    _, _, name = result.check.partition(".")
    about = {"classname": escaped(f"refspan.{result.level}"), "name": escaped(name), "time": f"{result.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", about)
    if result.status == "not offered":
        ET.SubElement(case, "skipped", message="not offered")
    elif result.status == "known failure" and result.known is not None:
        ET.SubElement(case, "skipped", message=escaped(f"known failure: {result.known.reason}, {result.known.link}"))
    elif result.failure is not None:
        failure = ET.SubElement(case, "failure", message=escaped(result.failure.message))
        lines = [*result.failure.counterexample, f"replay: {result.failure.replay}"]
        failure.text = "\n".join(["", *map(escaped, lines), ""])
