"""Update rules as their papers have them, in numpy: the reference that the optimizers of the table are held against.

Each takes a weight and yields it after every step. gradients: one a step; rates: learning rates, one a step; decay: the
weight decay (0 for vectors); the rest: options of the row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Rule = Callable[..., Iterator[Array]]


def steps_of(gradients: Sequence[Array], rates: Sequence[float]) -> Iterator[tuple[int, Array, float]]:
    yield from zip(range(1, len(gradients) + 1), gradients, rates, strict=True)


def adamw(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, l2: bool = False
) -> Iterator[Array]:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)
        yield w


def adabound(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, final_lr: float, gamma: float, eps: float
) -> Iterator[Array]:
    m, v, peak = np.zeros_like(w), np.zeros_like(w), max(rates)
    for t, g, lr in steps_of(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        end = final_lr * lr / peak
        pace = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) / (np.sqrt(v) + eps)
        w = w - np.clip(pace, end * (1 - 1 / (gamma * t + 1)), end * (1 + 1 / (gamma * t))) * m
        yield w


def adadelta(w: Array, gradients: Any, rates: Any, decay: float, *, rho: float, eps: float) -> Iterator[Array]:
    squares, changes = np.zeros_like(w), np.zeros_like(w)
    for _, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for _, g, lr in steps_of(gradients, rates):
        g = g + decay * w
        squares = squares + g**2
        w = w - lr * g / (np.sqrt(squares) + eps)
        yield w


def adamax(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, u = np.zeros_like(w), np.zeros_like(w)
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for _, g, lr in steps_of(gradients, rates):
        buffer = momentum * buffer + g
        update, ratio = _projected(w, g, buffer, delta, wd_ratio)
        w = w - lr * decay * ratio / (1 - momentum) * w - lr * update
        yield w


def adan(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float) -> Iterator[Array]:
    m, v, n, before = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), gradients[0]
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for _, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        update = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * w
        w = w - lr * np.linalg.norm(w) / np.linalg.norm(update) * update
        yield w


def lars(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, trust_coefficient: float
) -> Iterator[Array]:
    buffer = np.zeros_like(w)
    for _, g, lr in steps_of(gradients, rates):
        if w.ndim == 2:
            local = trust_coefficient * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
            g = local * (g + decay * w)
        buffer = momentum * buffer + g
        w = w - lr * buffer
        yield w


def lion(w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any) -> Iterator[Array]:
    m = np.zeros_like(w)
    for _, g, lr in steps_of(gradients, rates):
        w = w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
        yield w


def muon(
    w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float, ns_steps: int, **others: Any
) -> Iterator[Array]:
    """With the paper's coefficients, in float64."""
    buffer, (a, b, c) = np.zeros_like(w), (3.4445, -4.7750, 2.0315)
    for _, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for _, g, lr in steps_of(gradients, rates):
        g = g + decay * w
        v = alpha * v + (1 - alpha) * g**2
        w = w - lr * g / (np.sqrt(v) + eps)
        yield w


def sgd(w: Array, gradients: Any, rates: Any, decay: float, *, momentum: float) -> Iterator[Array]:
    buffer = np.zeros_like(w)
    for _, g, lr in steps_of(gradients, rates):
        buffer = momentum * buffer + g + decay * w
        w = w - lr * buffer
        yield w


def schedulefree_adamw(
    w: Array, gradients: Any, rates: Any, decay: float, *, betas: Any, eps: float, averages: bool = False
) -> Iterator[Array]:
    """averages: yields x, the weights to use, not y, where gradients are taken."""
    x, z, v, total, highest = w, w, np.zeros_like(w), 0.0, 0.0
    for t, g, lr in steps_of(gradients, rates):
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
    for _, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
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
    for t, g, lr in steps_of(gradients, rates):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = v - (1 - betas[1]) * np.sign(v - g**2) * g**2
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(adabelief, adabound, adadelta, adafactor, adagrad, adam, adamax, adamp, adamw, adan, ademamix, came, lamb),
        *(lars, lion, muon, nadam, novograd, radam, rmsprop, schedulefree_adamw, schedulefree_sgd, sgd, sgdp, sophia),
        yogi,
    )
}
