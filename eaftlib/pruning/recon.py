"""Exact re-routing reconstruction: what a layer's output loses when some experts go and their tokens take the next ones.

For a token x with router logits z, the whole layer gives sum_j g_j f_j(x), g the softmax over its top-k logits. With only
the experts S left it gives sum_j g^S_j f_j(x), g^S the softmax over the top-k logits within S. The difference has the
squared norm d' G d, d = g - g^S, G the Gram matrix of the f_j(x); G is stored, so that no keep-set needs the model. REAP
(arXiv 2510.13999) bounds this error and leaves out who takes over. A keep-set's loss is the sum over sampled tokens,
as a share of the same sum for no experts at all, sum_t ||sum_j g_j f_j(x_t)||^2.

All numbers are float64, computed from Grams and logits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ScoringError
from ..progress import progress_bar

ROWS_AT_ONCE = 4096  # tokens whose losses are computed together: what is in work then stays in a core's cache
LEAST_GAIN = 1e-9  # of a layer's energy that a swap must save: rounding must not let swaps go in circles


@dataclass(frozen=True)
class Elimination:
    """One layer's way from all experts to one, and the best keep-set found for each count on it.

    ranking int64 [E]: ids best first, the reverse of the greedy elimination. scores float64 [E], by id: the largest loss
    met up to and including the step that drops the expert, so that scores fall along the ranking. keep_sets: for each
    count from top_k to E - 1 the ids [count], ascending, after swaps; losses: theirs.
    """

    ranking: np.ndarray
    scores: np.ndarray
    keep_sets: dict[int, np.ndarray]
    losses: dict[int, float]


def reconstruct(grams: np.ndarray, logits: np.ndarray, top_k: int, progress: bool = True) -> list[Elimination]:
    """Eliminate the experts of every layer. grams, logits: as ``engine.grams.GramTrace`` has them.

    On one core, 4,096 tokens of 32 experts take 0.7 s a layer, 2,048 of 128 experts 3 s (top 4; random outputs, with 6 and
    74 swaps a layer). Raises ScoringError where an expert's output is not finite.
    """
    found = []
    with progress_bar(len(grams), "recon", "layers", progress) as advance:
        for of_layer in zip(grams, logits, strict=True):
            found.append(eliminate(Layer(*of_layer, top_k)))
            advance(1)
    return found


class Layer:
    """One layer's losses. grams float32 [T, E (E + 1) / 2], logits float32 [T, E].

    Expert id E stands for none: its logit is minus infinity and its gate zero. Arrays over sets of experts have them
    first and tokens last: ids int64 [n, T].
    """

    def __init__(self, grams: np.ndarray, logits: np.ndarray, top_k: int):
        tokens, self.num_experts = logits.shape
        if not np.isfinite(grams).all():
            raise ScoringError("recon: an expert's output is NaN, Inf or overflows; run with dtype float32")
        self.top_k, self.width = top_k, grams.shape[1]
        self.grams = np.ascontiguousarray(grams).reshape(-1)
        self.logits = np.full((tokens, self.num_experts + 1), -np.inf)
        self.logits[:, :-1] = logits
        # Best first; equal logits: lower id first. Enough of none at the end for every token to find top_k + 1.
        order = np.argsort(-self.logits[:, :-1], axis=1, kind="stable")
        self.order = np.pad(order, ((0, 0), (0, top_k + 1)), constant_values=self.num_experts)
        self.place = np.argsort(self.order[:, : self.num_experts + 1], axis=1)
        self.pair = _pairs(self.num_experts)
        self.energy, self.with_whole = np.zeros(tokens), np.zeros(self.logits.shape)
        self._project(self.order[:, :top_k].T)

    @property
    def tokens(self) -> np.ndarray:
        return np.arange(len(self.logits))

    def best(self, kept: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ids [top_k + 1, len(tokens)], best first: of the experts where kept bool [E] is true, then none."""
        order = self.order[tokens]
        there = np.append(kept, True)[order]
        first = there & (np.cumsum(there, axis=1) <= self.top_k + 1)
        return order[first].reshape(len(tokens), self.top_k + 1).T.copy()

    def without_each(self, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Losses [n, len(tokens)] where one of n experts, ids [n, len(tokens)], is left out and the others are used."""
        pieces = range(0, len(tokens), ROWS_AT_ONCE)
        cut = [slice(start, start + ROWS_AT_ONCE) for start in pieces]
        return np.concatenate([self._without_each(ids[:, c], tokens[c]) for c in cut] or [np.zeros(ids.shape)], axis=1)

    def _without_each(self, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        n = len(ids)
        logits = np.repeat(self.logits[tokens, ids][None], n, axis=0)  # [left out, expert, token]
        logits[np.arange(n), np.arange(n)] = -np.inf
        return self._losses(_softmax(logits), ids, tokens)

    def loss(self, kept: np.ndarray) -> float:
        """What the layer loses with the experts where kept bool [E] is true; as a share, like ``Elimination.losses``."""
        ids = self.best(kept, self.tokens)[:-1]
        gates = _softmax(self.logits[self.tokens, ids])
        return float(self._losses(gates[None], ids, self.tokens).sum() / (self.energy.sum() or 1.0))

    def _losses(self, gates: np.ndarray, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """[s, len(tokens)], of s ways to use n experts, gates [s, n, len(tokens)].

        |g - g^S|^2 under G, multiplied out: energy - 2 g' G g^S + g^S' G g^S.
        """
        n = len(ids)
        loss = self.energy[tokens] - 2 * np.einsum("sit,it->st", gates, self.with_whole[tokens, ids])
        for i in range(n):
            for j in range(i, n):
                loss += (1 + (i < j)) * gates[:, i] * gates[:, j] * self._gram(ids[i], ids[j], tokens)
        return np.maximum(loss, 0)  # a squared norm; rounding may take it below

    def _gram(self, i: np.ndarray, j: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.grams.take(tokens * self.width + self.pair[i, j])

    def _project(self, ids: np.ndarray) -> None:
        """G g and g' G g of the whole layer, which uses ids [top_k, T]."""
        gates = _softmax(self.logits[self.tokens, ids])
        for expert in range(self.num_experts):
            other = np.full(ids.shape[1], expert)
            self.with_whole[:, expert] = sum(
                g * self._gram(i, other, self.tokens) for g, i in zip(gates, ids, strict=True)
            )
        self.energy[:] = (gates * self.with_whole[self.tokens, ids]).sum(0)


class KeptExperts:
    """A set of a layer's experts, and for each token what it loses with it and with one of its experts less.

    kept bool [E]. ids [top_k + 1, T]: each token's best of them. without [top_k + 1, T]: its loss where one of those is
    left out; so the last row, which leaves out the one that is not used, is its loss with the set as it is.
    """

    def __init__(self, layer: Layer, kept: np.ndarray):
        self.layer, self.kept = layer, kept.copy()
        self.ids = layer.best(kept, layer.tokens)
        self.without = layer.without_each(self.ids, layer.tokens)

    @property
    def loss(self) -> float:
        return float(self.without[-1].sum())

    def after_drops(self) -> np.ndarray:
        """[E]: the loss after dropping each expert, infinite for those that are not there."""
        change = self._per_expert(self.ids[:-1], self.without[:-1] - self.without[-1])
        return np.where(self.kept, self.loss + change, np.inf)

    def drop(self, expert: int) -> None:
        self.kept[expert] = False
        self._renew((self.ids == expert).any(0))

    def swap(self, out: int, into: int) -> None:
        """Let ``into`` take the place of ``out``."""
        layer = self.layer
        self.kept[[out, into]] = False, True
        comes = layer.place[:, into] < layer.place[layer.tokens, self.ids[-1]]
        self._renew((self.ids == out).any(0) | comes)

    def after_swaps(self) -> np.ndarray:
        """[E, E]: the loss after adding one expert (row) and dropping another (column); infinite where that is no swap.

        Only a token that would use the added expert, or have it next, can lose more or less than by the drop alone.
        """
        layer, last = self.layer, self.ids[-1]
        outside = np.flatnonzero(~self.kept)
        tokens, which = np.nonzero(layer.place[:, outside] < layer.place[layer.tokens, last][:, None])
        added, now = outside[which], self.without[:, tokens]
        used = self.ids[:-1, tokens]
        with_added = layer.without_each(np.vstack([used, added]), tokens)[:-1]
        # Added and nothing dropped: whoever is worst of the top_k + 1 is not used, and that is the added one or the last.
        better = layer.place[tokens, added] < layer.place[tokens, used[-1]]
        grown = np.where(better, with_added[-1], now[-1])
        change = (with_added - grown) - (now[:-1] - now[-1])
        size = len(self.kept)
        losses = np.bincount((added * (size + 1) + used).ravel(), change.ravel(), size * (size + 1))
        losses = losses.reshape(size, size + 1)[:, :size] + self.after_drops()
        losses += np.bincount(added, grown - now[-1], size)[:, None]
        losses[self.kept] = np.inf
        return losses

    def _per_expert(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[E]: sums of values by id."""
        return np.bincount(ids.ravel(), values.ravel(), len(self.kept) + 1)[:-1]

    def _renew(self, changed: np.ndarray) -> None:
        """Compute anew what changed bool [T] tokens use and lose."""
        tokens = np.flatnonzero(changed)
        self.ids[:, tokens] = self.layer.best(self.kept, tokens)
        self.without[:, tokens] = self.layer.without_each(self.ids[:, tokens], tokens)


def eliminate(layer: Layer) -> Elimination:
    """Drop, again and again, the expert whose loss is least; for each count swap from there until no swap helps.

    Equal losses: the higher id goes first. Below top_k, where there is no model, tokens use all experts that are
    left: that only puts the last ones in order.
    """
    energy = layer.energy.sum() or 1.0  # a layer without experts loses nothing
    greedy = KeptExperts(layer, np.ones(layer.num_experts, bool))
    dropped, met, keep_sets, losses = [], [], {}, {}
    for count in range(layer.num_experts - 1, -1, -1):
        dropped.append(_cheapest(greedy.after_drops()))
        greedy.drop(dropped[-1])
        met.append(greedy.loss / energy)
        if count >= layer.top_k:
            swapped = KeptExperts(layer, greedy.kept)
            swap_until_none_helps(swapped)
            keep_sets[count], losses[count] = np.flatnonzero(swapped.kept), float(swapped.loss / energy)
    scores = np.empty(layer.num_experts)
    scores[dropped] = np.maximum.accumulate(met)
    return Elimination(np.array(dropped[::-1]), scores, keep_sets, losses)


def swap_until_none_helps(kept: KeptExperts) -> None:
    """Exchange one expert for another, each time the two that save most."""
    least = LEAST_GAIN * kept.layer.energy.sum()
    while True:
        losses = kept.after_swaps()
        into, out = np.unravel_index(losses.argmin(), losses.shape)
        if not losses[into, out] < kept.loss - least:
            return
        kept.swap(int(out), int(into))


def _cheapest(losses: np.ndarray) -> int:
    """The least; of several the last."""
    return len(losses) - 1 - int(losses[::-1].argmin())


def _pairs(num_experts: int) -> np.ndarray:
    """int64 [E + 1, E + 1]: where in an upper triangle the product of two experts is; for none, somewhere."""
    pair = np.zeros((num_experts + 1, num_experts + 1), np.int64)
    i, j = np.triu_indices(num_experts)
    pair[i, j] = pair[j, i] = np.arange(len(i))
    return pair


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last but one axis; zeros where all are minus infinity."""
    largest = logits.max(-2, keepdims=True)
    exp = np.exp(logits - np.where(np.isneginf(largest), 0, largest))
    return exp / np.maximum(exp.sum(-2, keepdims=True), 1)
