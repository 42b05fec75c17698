"""Backends from functions on PyTorch tensors or JAX arrays.

    from refspan.conformance.adapters import torch_backend
    from mine import attention  # (query, key, value, span, age, *, ramp, position) -> output, all of them tensors

    backend = torch_backend("mine", span_attention=attention, device="cuda")

`refspan check --backend this_file.py:backend` checks it. Gradients are those that the library derives from the
function, unless there is a function of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from refspan.conformance.guard import Misbehaviour
from refspan.conformance.protocol import Array
from refspan.errors import SetupError

Function = Callable[..., Any]
ARGUMENTS = ("query", "key", "value", "span", "age", "position")


class ArrayBackend:
    """The protocol on another library's arrays; made by `torch_backend` and `jax_backend`.

    Args:
        name: of the backend.
        to_library: a NumPy array as the library's own, a copy.
        to_numpy: the opposite.
        differentiate: (function, arguments to differentiate, upstream gradient) -> their gradients by name.
        facts: what the report says of it.
        soft_mask: as in the protocol, on the library's arrays; None if it is not offered.
        span_attention: likewise.
        span_attention_backward: likewise; None to derive gradients from `span_attention`.
    """

    def __init__(
        self,
        name: str,
        *,
        to_library: Callable[[Array], Any],
        to_numpy: Callable[[Any], Array],
        differentiate: Callable[[Function, Mapping[str, Any], Any], Mapping[str, Any]],
        facts: Mapping[str, str],
        soft_mask: Function | None = None,
        span_attention: Function | None = None,
        span_attention_backward: Function | None = None,
    ) -> None:
        self.name = name
        self._to_library, self._to_numpy, self._differentiate = to_library, to_numpy, differentiate
        self._facts = dict(facts)
        self._soft_mask, self._forward, self._backward = soft_mask, span_attention, span_attention_backward
        self.soft_mask = self._mask if soft_mask else None
        self.span_attention = self._attend if span_attention else None
        self.span_attention_backward = self._gradients if span_attention or span_attention_backward else None

    def facts(self) -> dict[str, str]:
        """Library, version, device."""
        return self._facts

    def _mask(self, span: Array, age: Array, *, queries: int, ramp: float) -> Array:
        assert self._soft_mask is not None  # noqa: S101
        with self._handing("soft_mask", {"span": span, "age": age}) as given:
            return self._to_numpy(self._soft_mask(*given.values(), queries=queries, ramp=ramp))

    def _attend(self, *arrays: Array, ramp: float, position: Array | None = None) -> Array:
        assert self._forward is not None  # noqa: S101
        named = dict(zip(ARGUMENTS, (*arrays, position), strict=True))
        with self._handing("span_attention", named) as given:
            table = given.pop("position", None)
            return self._to_numpy(self._forward(*given.values(), ramp=ramp, position=table))

    def _gradients(
        self, grad_out: Array, *arrays: Array, ramp: float, position: Array | None = None
    ) -> dict[str, Array]:
        named = {"grad_out": grad_out, **dict(zip(ARGUMENTS, (*arrays, position), strict=True))}
        with self._handing("span_attention_backward", named) as given:
            upstream = given.pop("grad_out")
            if self._backward is not None:
                table = given.pop("position", None)
                grads = self._backward(upstream, *given.values(), ramp=ramp, position=table)
            else:
                grads = self._derived(upstream, given, ramp)
            return {name: self._to_numpy(grad) for name, grad in grads.items() if grad is not None}

    def _derived(self, upstream: Any, given: dict[str, Any], ramp: float) -> Mapping[str, Any]:
        forward, age = self._forward, given.pop("age")
        assert forward is not None  # noqa: S101

        def function(**leaves: Any) -> Any:
            # by name: a library may hand them back in another order
            first = [leaves[name] for name in ARGUMENTS[:4]]
            return forward(*first, age, ramp=ramp, position=leaves.get("position"))

        return self._differentiate(function, given, upstream)

    @contextmanager
    def _handing(self, operation: str, arrays: Mapping[str, Array | None]) -> Iterator[dict[str, Any]]:
        """The library's own arrays; raises Misbehaviour if they are changed meanwhile."""
        named = {name: array for name, array in arrays.items() if array is not None}
        given = {name: self._to_library(array) for name, array in named.items()}
        yield dict(given)
        for name, array in named.items():
            if not np.array_equal(self._to_numpy(given[name]), array, equal_nan=True):
                raise Misbehaviour(f"{operation} changed its argument {name!r}")


def torch_backend(name: str, *, device: str = "cpu", **functions: Function | None) -> ArrayBackend:
    """A backend from functions on PyTorch tensors, see `ArrayBackend`; raises SetupError without PyTorch or device."""
    try:
        import torch
    except ImportError as error:
        raise SetupError(f"PyTorch is missing ({error}); install it with: pip install torch") from None
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(f"device {device}: PyTorch cannot use it: {str(error).splitlines()[0]}") from None

    def to_library(array: Array) -> Any:
        return torch.tensor(array, device=device)

    def to_numpy(tensor: Any) -> Array:
        array: Array = tensor.detach().cpu().numpy()
        return array

    def differentiate(function: Function, leaves: Mapping[str, Any], upstream: Any) -> Mapping[str, Any]:
        for leaf in leaves.values():
            leaf.requires_grad_()
        out = function(**leaves)
        if not out.requires_grad:  # no argument that it depends on: without memories, say
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(out, list(leaves.values()), upstream, **options)
        return dict(zip(leaves, grads, strict=True))

    facts = {"torch": torch.__version__, "device": device}
    return ArrayBackend(
        name, to_library=to_library, to_numpy=to_numpy, differentiate=differentiate, facts=facts, **functions
    )


def jax_backend(name: str, **functions: Function | None) -> ArrayBackend:
    """A backend from functions on JAX arrays, see `ArrayBackend`; raises SetupError without JAX.

    It is asked with 64-bit numbers switched on, since ages are int64.
    """
    try:
        import jax
    except ImportError as error:
        raise SetupError(f"JAX is missing ({error}); install it with: pip install jax") from None

    def wide() -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = jax.enable_x64(True)
        return context

    def to_library(array: Array) -> Any:
        with wide():
            return jax.numpy.array(array)

    def differentiate(function: Function, leaves: Mapping[str, Any], upstream: Any) -> Mapping[str, Any]:
        _, pull_back = jax.vjp(lambda leaves: function(**leaves), dict(leaves))
        (grads,) = pull_back(upstream)
        return dict(grads)

    def in_64_bits(function: Function | None) -> Function | None:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert function is not None  # noqa: S101
            with wide():
                return function(*args, **kwargs)

        return call if function else None

    facts = {"jax": jax.__version__, "device": str(jax.devices()[0])}
    return ArrayBackend(
        name,
        to_library=to_library,
        to_numpy=np.asarray,
        differentiate=in_64_bits(differentiate) or differentiate,
        facts=facts,
        **{operation: in_64_bits(function) for operation, function in functions.items()},
    )
