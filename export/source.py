"""ONNX text sources: the `*.onnxtxt` files beside this module, and how they become one model.

A source is text of `onnx.parser`, one graph or one function per file, with three conventions on top:

    # ..            comment lines before the first `<` become the documentation of the graph or function
    $type           a setting: an element type (float, double, ..), its number ($type_code), $opset, ..
    .. # @name      the line belongs to variants with `name` only; @no_name: to those without

Functions are found by name: a call of `refspan.NAME` draws in `NAME.onnxtxt`, and what that calls in turn. They stay
functions, so a viewer shows `span_mask` as one node that can be opened.
"""

import re
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx

_CALL = re.compile(r"\brefspan\.(\w+)\s*\(")
_VARIANT = re.compile(r"\s*@(?P<no>no_)?(?P<name>\w+)$")


def build_model(name: str, settings: "Mapping[str, str | int]", variant: "Mapping[str, bool]") -> "onnx.ModelProto":
    """The model of `NAME.onnxtxt` with every function that it reaches; `variant` says of every @name whether it is."""
    import onnx.parser

    text, doc = _read(name, settings, variant)
    model = onnx.parser.parse_model(text)
    model.doc_string = model.graph.doc_string = doc
    model.functions.extend(functions_of(_CALL.findall(text), settings, variant))
    name_nodes(model.graph, *model.functions)
    return model


def functions_of(
    names: "Iterable[str]", settings: "Mapping[str, str | int]", variant: "Mapping[str, bool]"
) -> "list[onnx.FunctionProto]":
    """These functions and all that they call, each after those that it calls: some readers need that order."""
    import onnx.parser

    functions: dict[str, onnx.FunctionProto] = {}

    def draw_in(names: "Iterable[str]") -> None:
        for name in names:
            if name not in functions:
                text, doc = _read(name, settings, variant)
                draw_in(_CALL.findall(text))
                functions[name] = onnx.parser.parse_function(text)
                functions[name].doc_string = doc

    draw_in(names)
    return list(functions.values())


def name_nodes(*bodies: "onnx.GraphProto | onnx.FunctionProto") -> None:
    """Name nodes after their first results, so that viewers, profiles and placement records can tell them apart."""
    for body in bodies:
        for node in body.node:
            node.name = node.output[0]


def _read(name: str, settings: "Mapping[str, str | int]", variant: "Mapping[str, bool]") -> tuple[str, str]:
    """Text of a source with the settings put in, and its documentation."""
    text = files("refspan.export").joinpath(f"{name}.onnxtxt").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        found = _VARIANT.search(line)
        if found is None:
            lines.append(line)
        elif variant[found["name"]] == (found["no"] is None):
            lines.append(line[: found.start()])
    head = next(i for i, line in enumerate(lines) if line.startswith("<"))
    doc = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:head])
    return Template("\n".join(lines[head:])).substitute(settings), doc
