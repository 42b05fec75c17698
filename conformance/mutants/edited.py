"""Copies of the reference in which a line of source is changed."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

from refspan import ModelConfig
from refspan.conformance.backends.reference import NumpyBackend

Array = Any
"""What NumPy makes of arrays."""


class Edited(NumpyBackend):
    """The reference with other source for one of its modules.

    Args:
        module: "refspan.attention", say.
        source: all of it.
    """

    def __init__(self, module: str, source: str) -> None:
        self.package = package_with(module, source)

    def open_model(self, config: ModelConfig, params: Mapping[str, Array], **options: Any) -> Any:
        return super().open_model(self._own(config), params, **options)

    def loss_and_gradients(self, config: ModelConfig, params: Mapping[str, Array], *given: Any, **options: Any) -> Any:
        return super().loss_and_gradients(self._own(config), params, *given, **options)

    def initial_parameters(self, config: ModelConfig, seed: int) -> dict[str, Array]:
        return super().initial_parameters(self._own(config), seed)

    def _own(self, config: ModelConfig) -> Any:
        """The same config as an object of the copy's own class."""
        return self.package.ModelConfig(**asdict(config))


def package_with(module: str, source: str) -> ModuleType:
    """A second copy of `refspan`, without its subpackages, in which `module` has this source. Not for threads."""
    ours = {name: kept for name, kept in sys.modules.items() if name.partition(".")[0] == "refspan"}
    finder = _Finder(module, source)
    for name in ours:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        copy = importlib.import_module("refspan")
        importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "refspan"]:
            del sys.modules[name]
        sys.modules.update(ours)
    return copy


def source_of(module: str) -> str:
    """The source of one of the reference's modules."""
    spec = find_spec(module)
    assert spec is not None  # noqa: S101
    assert isinstance(spec.loader, SourceFileLoader)  # noqa: S101
    return spec.loader.get_source(module) or ""


class _Finder:
    """Finds one module, with other source; leaves all others to those who come next."""

    def __init__(self, module: str, source: str) -> None:
        self._module, self._source = module, source

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None  # noqa: S101
        assert spec.origin is not None  # noqa: S101
        return importlib.util.spec_from_loader(name, _Loader(name, spec.origin, self._source), origin=spec.origin)


class _Loader(SourceFileLoader):
    """Compiles this source, whatever the file says."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.get_filename(fullname), "exec", dont_inherit=True)
