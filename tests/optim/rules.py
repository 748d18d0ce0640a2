"""Update rules as their papers have them, in numpy: the reference that the optimizers of the table are held against.

Each takes a weight and yields it after every step. gradients: one a step; rates: learning rates, one a step; decay: the
weight decay (0 for vectors); the rest: options of the row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray
Rule = Callable[..., Iterator[Array]]


def _steps(gradients: Sequence[Array], rates: Sequence[float]) -> Iterator[tuple[int, Array, float]]:
    yield from zip(range(1, len(gradients) + 1), gradients, rates, strict=True)


def adamw(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, l2: bool = False
) -> Iterator[Array]:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        if l2:
            g = g + decay * w
        else:
            w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


def adam(*arguments: Any, **options: Any) -> Iterator[Array]:
    return adamw(*arguments, **options, l2=True)


def adabelief(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, s = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)
        yield w


def adabound(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, final_lr: float, gamma: float, eps: float
) -> Iterator[Array]:
    m, v, peak = np.zeros_like(w), np.zeros_like(w), max(rates)
    for t, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        end = final_lr * lr / peak
        pace = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) / (np.sqrt(v) + eps)
        w = w - np.clip(pace, end * (1 - 1 / (gamma * t + 1)), end * (1 + 1 / (gamma * t))) * m
        yield w


def adadelta(w: Array, gradients: Any, rates: Any, decay: float, *, rho: float, eps: float) -> Iterator[Array]:
    squares, changes = np.zeros_like(w), np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        g = g + decay * w
        squares = rho * squares + (1 - rho) * g**2
        change = np.sqrt(changes + eps) / np.sqrt(squares + eps) * g
        changes = rho * changes + (1 - rho) * change**2
        w = w - lr * change
        yield w


def _rms(value: Array) -> float:
    return float(np.sqrt(np.mean(value**2)))


def adafactor(
    w: Array, gradients: Any, rates: Any, decay: float, *, beta2_decay: float, eps: Any, d: float
) -> Iterator[Array]:
    rows, columns, v = 0.0, 0.0, 0.0
    for t, g, lr in _steps(gradients, rates):
        share = 1 - t**beta2_decay
        pace = max(eps[1], _rms(w)) * min(lr, 1 / np.sqrt(t))
        w = w - lr * decay * w
        if g.ndim == 2:
            rows = share * rows + (1 - share) * (g**2).sum(1)
            columns = share * columns + (1 - share) * (g**2).sum(0)
            v = np.outer(rows, columns) / np.sum(rows)
        else:
            v = share * v + (1 - share) * g**2
        update = g / np.sqrt(v)
        w = w - pace * update / max(1.0, _rms(update) / d)
        yield w


def adagrad(w: Array, gradients: Any, rates: Any, decay: float, *, eps: float) -> Iterator[Array]:
    squares = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        g = g + decay * w
        squares = squares + g**2
        w = w - lr * g / (np.sqrt(squares) + eps)
        yield w


def adamax(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, u = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        g = g + decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        u = np.maximum(betas[1] * u, np.abs(g) + eps)
        w = w - lr / (1 - betas[0] ** t) * m / u
        yield w


def _projected(w: Array, g: Array, update: Array, delta: float, wd_ratio: float) -> tuple[Array, float]:
    """Without its part along the weight where the gradient is nearly at right angles to it: by rows, else the whole."""
    if w.ndim < 2:
        return update, 1.0
    for view in (lambda x: x.reshape(len(x), -1), lambda x: x.reshape(1, -1)):
        flat, slope, moved = view(w), view(g), view(update)
        lengths = np.linalg.norm(flat, axis=1)
        cosines = np.abs((flat * slope).sum(1)) / (lengths * np.linalg.norm(slope, axis=1))
        if cosines.max() < delta / np.sqrt(flat.shape[1]):
            unit = flat / lengths[:, None]
            return (moved - unit * (unit * moved).sum(1, keepdims=True)).reshape(w.shape), wd_ratio
    return update, 1.0


def adamp(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, delta: float, wd_ratio: float
) -> Iterator[Array]:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        update, ratio = _projected(
            w, g, m * np.sqrt(1 - betas[1] ** t) / (np.sqrt(v) + eps) / (1 - betas[0] ** t), delta, wd_ratio
        )
        w = w - lr * decay * ratio * w - lr * update
        yield w


def sgdp(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, delta: float, wd_ratio: float
) -> Iterator[Array]:
    buffer = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        buffer = momentum * buffer + g
        update, ratio = _projected(w, g, buffer, delta, wd_ratio)
        w = w - lr * decay * ratio / (1 - momentum) * w - lr * update
        yield w


def adan(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, v, n, before = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), gradients[0]
    for t, g, lr in _steps(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * (g - before)
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * (g - before)) ** 2
        root = np.sqrt(n / (1 - betas[2] ** t)) + eps
        update = (m / (1 - betas[0] ** t) + betas[1] * v / (1 - betas[1] ** t)) / root
        w, before = (w - lr * update) / (1 + lr * decay), g
        yield w


def ademamix(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    alpha: float,
    eps: float,
    weight_decouple: bool = True,
    t_alpha_beta3: float = 0.0,
) -> Iterator[Array]:
    fast, slow, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        share, beta3 = alpha, betas[2]
        if t_alpha_beta3:
            part, first, last = t / t_alpha_beta3, np.log(betas[0]), np.log(betas[2])
            share = min(part, 1.0) * alpha
            beta3 = min(np.exp(first * last / ((1 - part) * last + part * first)), betas[2])
        w = w - lr * decay * w
        fast = betas[0] * fast + (1 - betas[0]) * g
        slow = beta3 * slow + (1 - beta3) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * (fast / (1 - betas[0] ** t) + share * slow) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


def came(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps1: float, eps2: float, clip_threshold: float
) -> Iterator[Array]:
    m, v, rows, columns, doubt_rows, doubt_columns = np.zeros_like(w), 0.0, 0.0, 0.0, 0.0, 0.0
    for _, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        square = g**2 + eps1
        if g.ndim == 2:
            rows = betas[1] * rows + (1 - betas[1]) * square.mean(1)
            columns = betas[1] * columns + (1 - betas[1]) * square.mean(0)
            v = np.outer(rows, columns) / np.mean(rows)
        else:
            v = betas[1] * v + (1 - betas[1]) * square
        update = g / np.sqrt(v)
        update = update / max(1.0, _rms(update) / clip_threshold)
        m = betas[0] * m + (1 - betas[0]) * update
        step = m
        if g.ndim == 2:
            doubt = (update - m) ** 2 + eps2
            doubt_rows = betas[2] * doubt_rows + (1 - betas[2]) * doubt.mean(1)
            doubt_columns = betas[2] * doubt_columns + (1 - betas[2]) * doubt.mean(0)
            step = m / np.sqrt(np.outer(doubt_rows, doubt_columns) / np.mean(doubt_rows))
        w = w - lr * step
        yield w


def lamb(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        update = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * w
        w = w - lr * np.linalg.norm(w) / np.linalg.norm(update) * update
        yield w


def lars(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, trust_coefficient: float
) -> Iterator[Array]:
    buffer = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        if w.ndim == 2:
            local = trust_coefficient * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
            g = local * (g + decay * w)
        buffer = momentum * buffer + g
        w = w - lr * buffer
        yield w


def lion(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any) -> Iterator[Array]:
    m = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        w = w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
        yield w


def muon(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, ns_steps: int, **others: Any
) -> Iterator[Array]:
    """With the paper's coefficients, in float64."""
    buffer, (a, b, c) = np.zeros_like(w), (3.4445, -4.7750, 2.0315)
    for _, g, lr in _steps(gradients, rates):
        buffer = momentum * buffer + g
        x = g + momentum * buffer
        x = x / np.linalg.norm(x)
        x = x.T if len(w) > len(w.T) else x
        for _ in range(ns_steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x.T if len(w) > len(w.T) else x
        w = w - lr * (0.2 * np.sqrt(max(w.shape)) * x + decay * w)
        yield w


def nadam(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    eps: float,
    momentum_decay: float,
    decoupled_weight_decay: bool,
) -> Iterator[Array]:
    m, v, product = np.zeros_like(w), np.zeros_like(w), 1.0
    for t, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        now, then = (betas[0] * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in (t, t + 1))
        product *= now
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        ahead = then * m / (1 - product * then) + (1 - now) * g / (1 - product)
        w = w - lr * ahead / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


def novograd(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, v = np.zeros_like(w), 0.0
    for t, g, lr in _steps(gradients, rates):
        square = np.sum(g**2)
        v = square if t == 1 else betas[1] * v + (1 - betas[1]) * square
        scaled = g / (np.sqrt(v) + eps) + decay * w
        m = scaled if t == 1 else betas[0] * m + scaled
        w = w - lr * m
        yield w


def radam(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, decoupled_weight_decay: bool
) -> Iterator[Array]:
    m, v, longest = np.zeros_like(w), np.zeros_like(w), 2 / (1 - betas[1]) - 1
    for t, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        length = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        step = m / (1 - betas[0] ** t)
        if length > 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * np.sqrt(ratio) * np.sqrt(1 - betas[1] ** t) / (np.sqrt(v) + eps)
        w = w - lr * step
        yield w


def rmsprop(w: Array, gradients: Any, rates: Any, decay: float, *, alpha: float, eps: float) -> Iterator[Array]:
    v = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        g = g + decay * w
        v = alpha * v + (1 - alpha) * g**2
        w = w - lr * g / (np.sqrt(v) + eps)
        yield w


def sgd(w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float) -> Iterator[Array]:
    buffer = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        buffer = momentum * buffer + g + decay * w
        w = w - lr * buffer
        yield w


def schedulefree_adamw(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, averages: bool = False
) -> Iterator[Array]:
    """averages: yields x, the weights to use, not y, where gradients are taken."""
    x, z, v, total, highest = w, w, np.zeros_like(w), 0.0, 0.0
    for t, g, lr in _steps(gradients, rates):
        y = (1 - betas[0]) * z + betas[0] * x
        v = betas[1] * v + (1 - betas[1]) * g**2
        z = z - lr * (g / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * y)
        highest = max(highest, lr)
        total += highest**2
        x = (1 - highest**2 / total) * x + highest**2 / total * z
        yield x if averages else (1 - betas[0]) * z + betas[0] * x


def schedulefree_sgd(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, averages: bool = False
) -> Iterator[Array]:
    x, z, total, highest = w, w, 0.0, 0.0
    for _, g, lr in _steps(gradients, rates):
        y = (1 - momentum) * z + momentum * x
        z = z - lr * (g + decay * y)
        highest = max(highest, lr)
        total += highest**2
        x = (1 - highest**2 / total) * x + highest**2 / total * z
        yield x if averages else (1 - momentum) * z + momentum * x


def sophia(
    w: Array,
    gradients: Any,
    rates: Any,
    decay: float,
    *,
    betas: Any,
    gamma: float,
    eps: float,
    hessian_interval_steps: int,
    labels: int = 50,
) -> Iterator[Array]:
    """Estimates are of the same gradients, of this many labels."""
    m, h = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in _steps(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        if t % hessian_interval_steps == 1 % hessian_interval_steps:
            h = betas[1] * h + (1 - betas[1]) * labels * g * g
        w = w - lr * decay * w
        w = w - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        yield w


def yogi(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, initial_accumulator: float, eps: float
) -> Iterator[Array]:
    m, v = np.full_like(w, initial_accumulator), np.full_like(w, initial_accumulator)
    for t, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = v - (1 - betas[1]) * np.sign(v - g**2) * g**2
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


def adam_mini(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, block_rows: int = 1
) -> Iterator[Array]:
    m, v = np.zeros_like(w), 0.0
    for t, g, lr in _steps(gradients, rates):
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

    for t, g, lr in _steps(gradients, rates):
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
    for t, g, lr in _steps(gradients, rates):
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
    for t, g, lr in _steps(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * decay * w
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        m, v = _kept(m, True, min_8bit_size), _kept(v, False, min_8bit_size)
        yield w


def lion_8bit(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, min_8bit_size: int) -> Iterator[Array]:
    m = np.zeros_like(w)
    for _, g, lr in _steps(gradients, rates):
        w = w - lr * decay * w
        w = w - lr * np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = _kept(betas[1] * m + (1 - betas[1]) * g, True, min_8bit_size)
        yield w


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(adabelief, adabound, adadelta, adafactor, adagrad, adam, adamax, adamp, adamw, adan, ademamix, came, lamb),
        *(
            lars,
            lion,
            muon,
            nadam,
            novograd,
            radam,
            rmsprop,
            schedulefree_adamw,
            schedulefree_sgd,
            sgd,
            sgdp,
            sophia,
            yogi,
        ),
        *(adam_mini, soap, galore, apollo, adamw_8bit, lion_8bit),
    )
} | {"paged_adamw_8bit": adamw_8bit, "paged_lion_8bit": lion_8bit}
