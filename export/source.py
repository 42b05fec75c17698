"""ONNX text sources: the `*.onnxtxt` files beside this module, and how they become one model.

A source is text of `onnx.parser`, one graph or one function per file, with three conventions on top:

    # ..            comment lines before the first `<` become the documentation of the graph or function
    $type           a setting: an element type (float, double, ..), its number ($type_code), $opset, ..
    .. # @position  the line belongs to the variant with relative positions only; @no_position: to the other one

Functions are found by name: a call of `refspan.NAME` draws in `NAME.onnxtxt`, and what that calls in turn. They stay
functions, so a viewer shows `span_mask` as one node that can be opened.
"""

import re
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

_CALL = re.compile(r"\brefspan\.(\w+)\s*\(")


def build_model(name: str, settings: "Mapping[str, str | int]", *, position: bool) -> "onnx.ModelProto":
    """The model of `NAME.onnxtxt` with every function that it reaches."""
    import onnx.parser

    text, doc = _read(name, settings, position=position)
    model = onnx.parser.parse_model(text)
    model.doc_string = model.graph.doc_string = doc
    functions: dict[str, onnx.FunctionProto] = {}

    def draw_in(calling: str) -> None:
        """Add the functions that a text calls, each after those that it calls: some readers need that order."""
        for called in _CALL.findall(calling):
            if called not in functions:
                text, doc = _read(called, settings, position=position)
                draw_in(text)
                functions[called] = onnx.parser.parse_function(text)
                functions[called].doc_string = doc

    draw_in(text)
    model.functions.extend(functions.values())
    # A node is named after its first result, so that viewers, profiles and placement records can tell nodes apart.
    for body in [model.graph, *model.functions]:
        for node in body.node:
            node.name = node.output[0]
    return model


def _read(name: str, settings: "Mapping[str, str | int]", *, position: bool) -> tuple[str, str]:
    """Text of a source with the settings put in, and its documentation."""
    text = files("refspan.export").joinpath(f"{name}.onnxtxt").read_text(encoding="utf-8")
    other = "@no_position" if position else "@position"
    lines = [line for line in text.splitlines() if not line.endswith(other)]
    head = next(i for i, line in enumerate(lines) if line.startswith("<"))
    doc = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:head])
    return Template("\n".join(lines[head:])).substitute(settings), doc
