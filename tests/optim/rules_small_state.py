"""Update rules whose state is smaller than a weight, or of another shape: blocks, bases, projections, 8 bits a number.

As tests/optim/rules.py has them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tests.optim.rules import Array, Rule, steps_of


def adam_mini(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, block_rows: int = 1
) -> Iterator[Array]:
    m, v = np.zeros_like(w), 0.0
    for t, g, lr in steps_of(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        blocks = g.reshape(-1, block_rows, g.shape[1]) if g.ndim == 2 else g.reshape(1, -1, 1)
        v = betas[1] * v + (1 - betas[1]) * (blocks**2).mean((1, 2), keepdims=True)
        scale = np.broadcast_to(np.sqrt(v / (1 - betas[1] ** t)) + eps, blocks.shape).reshape(g.shape)
        w = w - lr * decay * w - lr * m / (1 - betas[0] ** t) / scale
        yield w


def soap(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    eps: float,
    precondition_frequency: int,
    max_precondition_dim: int,
) -> Iterator[Array]:
    """A step only makes the bases if it is the first. Bases are refined by one round of power iteration."""
    m, v, sides, bases = np.zeros_like(w), np.zeros_like(w), [], []
    matrix = w.ndim == 2

    def turned(x: Array, back: bool = False) -> Array:
        if not matrix:
            return x
        left, right = (basis.T if back else basis for basis in bases)
        return left.T @ x @ right

    for t, g, lr in steps_of(gradients, rates):
        new = [g @ g.T, g.T @ g] if matrix else []
        if t == 1:
            sides = [(1 - betas[1]) * part for part in new]
            bases = [
                np.linalg.eigh(part)[1][:, ::-1] if len(part) <= max_precondition_dim else np.eye(len(part))
                for part in sides
            ]
            yield w
            continue
        count = t - 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * turned(g) ** 2
        pace = lr * np.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
        w = w - pace * turned(turned(m) / (np.sqrt(v) + eps), back=True)
        w = w - lr * decay * w
        sides = [betas[1] * part + (1 - betas[1]) * square for part, square in zip(sides, new, strict=True)]
        if count % precondition_frequency == 0:
            for side, part in enumerate(sides):
                if len(part) <= max_precondition_dim:
                    order = np.argsort(-np.diag(bases[side].T @ part @ bases[side]))
                    v = np.take(v, order, axis=side)
                    bases[side] = np.linalg.qr((part @ bases[side])[:, order])[0]
        yield w


def _low_rank(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    betas: Any,
    eps: float,
    interval_steps: int,
    projection: Callable[[Array, int], Array],
    update: Callable[[Array, Array, Array, Array], Array],
) -> Iterator[Array]:
    m, v, basis = 0.0, 0.0, np.zeros(0)
    tall = w.shape[0] >= w.shape[1]
    for t, g, lr in steps_of(gradients, rates):
        g = g.T if tall else g
        if (t - 1) % interval_steps == 0:
            basis = projection(g, (t - 1) // interval_steps)
        low = basis.T @ g
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low**2
        change = update(g, basis, low, m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps))
        w = w - lr * decay * w - lr * (change.T if tall else change)
        yield w


def galore(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    eps: float,
    rank: int,
    interval_steps: int,
    scale: float,
) -> Iterator[Array]:
    def projection(g: Array, number: int) -> Array:
        return np.linalg.svd(g, full_matrices=False)[0][:, :rank]

    def update(g: Array, basis: Array, low: Array, step: Array) -> Array:
        return scale * basis @ step

    yield from _low_rank(w, gradients, rates, decay, betas, eps, interval_steps, projection, update)


def apollo(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    eps: float,
    rank: int,
    interval_steps: int,
    scale: float,
    scale_type: str,
    max_growth: float,
) -> Iterator[Array]:
    """Projections are random with variance 1/rank; drawn as the optimizer draws them."""
    norms: list[float] = []

    def projection(g: Array, number: int) -> Array:
        generator = torch.Generator().manual_seed((number * 1_000_003 + g.shape[0]) * 1_000_003 + g.shape[1])
        size = min(rank, len(g))
        return torch.randn(len(g), size, generator=generator, dtype=torch.float64).numpy() / np.sqrt(size)

    def update(g: Array, basis: Array, low: Array, step: Array) -> Array:
        axis = 0 if scale_type == "channel" else None
        scaled = g * np.linalg.norm(step, axis=axis) / np.linalg.norm(low, axis=axis)
        norm = float(np.linalg.norm(scaled))
        if norms and norm > max_growth * norms[-1]:
            scaled, norm = scaled * max_growth * norms[-1] / norm, max_growth * norms[-1]
        norms.append(norm)
        return scale * scaled

    yield from _low_rank(w, gradients, rates, decay, betas, eps, interval_steps, projection, update)


def dynamic_map(signed: bool) -> Array:
    """The 256 values of dynamic tree quantisation, arXiv:2110.02861, section 2.1: a sign bit, zeros that count the
    exponent, an indicator bit, and a linear fraction."""
    exponents, values = 7, [0.0, 1.0]
    for exponent in range(exponents):
        bounds = np.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1, dtype=np.float32)
        means = (bounds[:-1] + bounds[1:]) / 2
        found = 10.0 ** (exponent - exponents + 1) * means
        values += [*found, *(-found if signed else ())]
    return np.sort(np.array(values, np.float32))


def _quantised(x: Array, signed: bool) -> Array:
    """What is left of a flat array in blocks of 256: nearest values of the map times the block's largest."""
    values = dynamic_map(signed)
    found = np.empty_like(x)
    for start in range(0, len(x), 256):
        block = x[start : start + 256]
        largest = np.abs(block).max()
        nearest = np.abs(block[:, None] / (largest or 1.0) - values[None]).argmin(1)
        found[start : start + 256] = values[nearest] * largest
    return found


def _kept(x: Array, signed: bool, min_8bit_size: int) -> Array:
    return x if x.size < min_8bit_size else _quantised(x.ravel(), signed).reshape(x.shape)


def adamw_8bit(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, min_8bit_size: int
) -> Iterator[Array]:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in steps_of(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * decay * w
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        m, v = _kept(m, True, min_8bit_size), _kept(v, False, min_8bit_size)
        yield w


def lion_8bit(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, min_8bit_size: int) -> Iterator[Array]:
    m = np.zeros_like(w)
    for _, g, lr in steps_of(gradients, rates):
        w = w - lr * decay * w
        w = w - lr * np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = _kept(betas[1] * m + (1 - betas[1]) * g, True, min_8bit_size)
        yield w


RULES: dict[str, Rule] = {
    **{rule.__name__: rule for rule in (adam_mini, soap, galore, apollo, adamw_8bit, lion_8bit)},
    "paged_adamw_8bit": adamw_8bit,
    "paged_lion_8bit": lion_8bit,
}
