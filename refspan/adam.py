"""Adam with linear warm-up and clipping of the gradient's norm: how the models of the paper are trained.

    g <- g min(1, G / (|g| + 10^-6))                 |g|: over all parameters together
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - r min(1, t / W) m' / (sqrt(v') + epsilon),   m' = m / (1 - b1^t),   v' = v / (1 - b2^t)

at step t = 1, 2, .. with rate r, W steps of warm-up and largest norm G. m and v are running means that start at 0:

    m_t = (1 - b1) sum_s b1^(t - s) g_s,   s = 1..t

The weights of the g_s sum to 1 - b1^t where those of a mean sum to 1; m' puts this right, v' likewise. Without it the
first step would be too long by (1 - b1) / sqrt(1 - b2), about 3 with the usual two. The code takes the scalars out of
the arrays: m' / (sqrt(v') + epsilon) = m / (sqrt(v) + epsilon c) c / (1 - b1^t) with c = sqrt(1 - b2^t).
"""

from collections.abc import Mapping
from math import isfinite, sqrt
from operator import index
from typing import Any

from refspan.arrays import FLOATS, Array, check_dtype, check_shape, device_of, namespace_of


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980), for one set of parameters.

    Args:
        learning_rate: r; may be set anew between steps.
        betas: b1 and b2, how much of m and v is kept at each step.
        epsilon: bounds the steps of parameters whose gradients are next to 0.
        warmup_steps: W; 0 for none.
        max_grad_norm: G; None to leave gradients as they are.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        warmup_steps: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.learning_rate = _positive("learning_rate", learning_rate)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers, at least 0 and below 1")
        self._beta1, self._beta2 = betas
        self._epsilon = _positive("epsilon", epsilon)
        try:
            self._warmup_steps = index(warmup_steps)
        except TypeError:
            raise TypeError(f"warmup_steps: got {warmup_steps!r}, expected a whole number >= 0") from None
        if self._warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {warmup_steps}, expected at least 0")
        self._max_grad_norm = None if max_grad_norm is None else _positive("max_grad_norm", max_grad_norm)
        self._steps = 0
        self._means: dict[str, tuple[Array, Array]] = {}

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return self._steps

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array]) -> dict[str, Array]:
        """One step downhill.

        Args:
            params: parameters by name, the same names and shapes at each step. Small steps are lost to rounding in
                float16: train wider parameters.
            grads: their gradients, by the same names.

        Returns:
            The new parameters, in the dtypes of the old ones; the old ones are left alone.

        Raises:
            TypeError, ValueError: names, shapes or dtypes that do not fit, or a gradient that is not finite. The
                optimiser goes on as if this step had not been asked for.
        """
        xp = self._check(params, grads)
        wide = {name: xp.result_type(param.dtype, xp.float32) for name, param in params.items()}
        grads = {name: xp.astype(grads[name], wide[name], copy=False) for name in params}
        t, scale = self._steps + 1, self._scale(_norm(xp, grads))
        root = sqrt(1 - self._beta2**t)
        rate = self.learning_rate * min(1.0, t / max(self._warmup_steps, 1)) * root / (1 - self._beta1**t)
        means, stepped = {}, {}
        for name, grad in grads.items():
            param = xp.astype(params[name], wide[name], copy=False)
            first, second = self._means.get(name) or (xp.zeros_like(param), xp.zeros_like(param))
            first = self._beta1 * first
            first += ((1 - self._beta1) * scale) * grad
            second = self._beta2 * second
            second += ((1 - self._beta2) * scale**2) * (grad * grad)
            change = xp.sqrt(second)  # from here on written over: each array of a large model costs time to make
            change += self._epsilon * root
            change = first / change
            change *= rate
            means[name] = (xp.asarray(first), xp.asarray(second))  # NumPy makes scalars of 0-d arrays
            stepped[name] = xp.asarray(param - change, dtype=params[name].dtype)
        self._steps, self._means = t, means
        return stepped

    def state(self) -> dict[str, Array]:
        """All that the next step depends on, settings apart; see `restore`.

        `step`, and for each parameter `first.NAME` and `second.NAME`: m and v, float32 or wider. Empty at the start.
        """
        if not self._means:
            return {}
        first = next(iter(self._means.values()))[0]
        xp = namespace_of(first=first)
        state = {"step": xp.asarray(self._steps, dtype=xp.int64, device=device_of(first))}
        state |= {f"first.{name}": mean for name, (mean, _) in self._means.items()}
        return state | {f"second.{name}": mean for name, (_, mean) in self._means.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned, here or in another optimiser with these settings.

        Raises:
            TypeError, ValueError: it is no such state; the optimiser goes on as it was. Parameters of other names or
                shapes are noticed by the next `step`.
        """
        steps, means = 0, {}
        if state:
            xp = namespace_of(**state)
            if "step" not in state:
                raise ValueError("state step: missing")
            check_shape("state step", state["step"], ())
            check_dtype(xp, "state step", state["step"], ("int64",))
            steps = int(state["step"])
            if steps < 1:
                raise ValueError(f"state step: got {steps}, expected at least 1")
            names = [key.removeprefix("first.") for key in state if key.startswith("first.")]
            known = {"step", *(f"{kind}.{name}" for name in names for kind in ("first", "second"))}
            unknown = [key for key in state if key not in known]
            if unknown or not names:
                raise ValueError(f"state {(unknown or ['first'])[0]}: expected step, first.NAME and second.NAME")
            means = {name: _means_in(xp, state, name) for name in names}
        self._steps, self._means = steps, means

    def _scale(self, norm: float) -> float:
        """What gradients of this norm are multiplied by."""
        return 1.0 if self._max_grad_norm is None else min(1.0, self._max_grad_norm / (norm + 1e-6))

    def _check(self, params: Mapping[str, Array], grads: Mapping[str, Array]) -> Any:
        """The array namespace of a step's arguments, if they fit each other and the steps before."""
        if not params:
            raise ValueError("params: got none, expected at least one parameter")
        _check_names("gradient", params, grads)
        if self._means:
            _check_names("state of the optimiser, parameter", params, self._means)
        arrays = {f"parameter {name}": param for name, param in params.items()}
        arrays |= {f"gradient {name}": grad for name, grad in grads.items()}
        arrays |= {f"state first.{name}": first for name, (first, _) in self._means.items()}
        xp = namespace_of(**arrays)
        for name, param in params.items():
            check_dtype(xp, f"parameter {name}", param, FLOATS)
            check_dtype(xp, f"gradient {name}", grads[name], FLOATS)
            check_shape(f"gradient {name}", grads[name], tuple(param.shape))
            for kind, mean in zip(("first", "second"), self._means.get(name, ()), strict=False):
                check_shape(f"state {kind}.{name}", mean, tuple(param.shape))
                if mean.dtype != xp.result_type(param.dtype, xp.float32):
                    raise TypeError(f"state {kind}.{name}: got {mean.dtype} for a parameter of {param.dtype}")
        return xp


def _norm(xp: Any, grads: Mapping[str, Array]) -> float:
    """Euclidean norm of all gradients together; raises ValueError if it is not finite."""
    total = 0.0
    for name, grad in grads.items():
        flat = xp.reshape(grad, (-1,))
        square = float(flat @ flat)
        if not isfinite(square):
            raise ValueError(f"gradient {name}: holds NaN, infinite numbers, or numbers too large to be squared")
        total += square
    return sqrt(total)


def _check_names(what: str, params: Mapping[str, Array], others: Mapping[str, Any]) -> None:
    """Raise ValueError unless `others` has the names of `params`."""
    for name in params:
        if name not in others:
            raise ValueError(f"{what} {name}: missing")
    for name in others:
        if name not in params:
            raise ValueError(f"{what} {name}: not among the parameters")


def _means_in(xp: Any, state: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    """m and v of one parameter out of a state."""
    if f"second.{name}" not in state:
        raise ValueError(f"state second.{name}: missing")
    first, second = state[f"first.{name}"], state[f"second.{name}"]
    check_shape(f"state second.{name}", second, tuple(first.shape))
    for kind, mean in (("first", first), ("second", second)):
        check_dtype(xp, f"state {kind}.{name}", mean, ("float32", "float64"))
        if not bool(xp.all(xp.isfinite(mean))):
            raise ValueError(f"state {kind}.{name}: holds NaN or infinite numbers")
    if bool(xp.any(second < 0)):
        raise ValueError(f"state second.{name}: holds numbers below 0, expected means of squares")
    return first, second


def _positive(name: str, value: float) -> float:
    """`value` as a float, if it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")
    return float(value)
