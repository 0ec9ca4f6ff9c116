"""How far the embeddings of some sentences move when the kernels of their encoder are cut."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

import rmtjax
from experiments.minilm import cuts, model
from experiments.minilm.words import Sentences

RULES: dict[str, rmtjax.ranks.RankRule] = {
    **{f"bema {level}": rmtjax.ranks.bema(level=level) for level in (0.01, 0.1, 0.5)},
    "bema 0.1, gate open": rmtjax.ranks.bema(level=0.1, tolerance=1.0),
    "gavish_donoho": rmtjax.ranks.gavish_donoho(),
    **{f"energy {share}": rmtjax.ranks.energy(share) for share in (0.99, 0.95, 0.9, 0.8)},
    **{f"fixed {rank}": rmtjax.ranks.fixed(rank) for rank in (256, 128, 64)},
}
Embeddings = Float[np.ndarray, "n d"]


def embedder(module: model.Bert, sentences: Sentences) -> Callable[[Any], Embeddings]:
    """The embeddings of the sentences as a function of the parameters, factorized or not."""

    @jax.jit
    def embed(params):
        tokens, mask = jnp.asarray(sentences.tokens), jnp.asarray(sentences.mask)
        states, _ = rmtjax.linen.apply(module, {"params": params}, tokens, mask)
        return model.pool(states, mask)

    return lambda params: np.asarray(embed(params))


def nearest(embeddings: Embeddings) -> np.ndarray:
    """The index of the nearest other sentence of each."""
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(axis=1)


def similarities(embeddings: Embeddings) -> np.ndarray:
    """The cosine between each two sentences."""
    return (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]


def measure(moved: Embeddings, whole: Embeddings, topics: tuple[str, ...]) -> dict[str, float]:
    """Measures how far the embeddings have moved.

    Args:
      moved: Of the encoder that was cut, of length 1.
      whole: Of the encoder as it was.
      topics: Of the sentences.

    Returns:
      The mean and the worst cosine between a sentence's two embeddings; in % the sentences that
      find themselves among those of the whole encoder, that keep their nearest other sentence,
      and whose nearest is of their topic; and the rank correlation of all similarities.
    """
    cosines, named = np.sum(moved * whole, axis=1), np.array(topics)
    itself = (moved @ whole.T).argmax(axis=1) == np.arange(len(whole))
    ranks = [scipy.stats.rankdata(similarities(one)) for one in (moved, whole)]
    found = {
        "mean": cosines.mean(),
        "worst": cosines.min(),
        "itself": 100 * itself.mean(),
        "neighbour": 100 * np.mean(nearest(moved) == nearest(whole)),
        "topic": 100 * np.mean(named[nearest(moved)] == named),
        "order": np.corrcoef(ranks)[0, 1],
    }
    return {name: float(value) for name, value in found.items()}


class Study(NamedTuple):
    """An encoder with all that its cuts are compared with.

    Attributes:
      params: Uncut.
      embed: Parameters to embeddings.
      whole: The embeddings of `params`.
      topics: Of the sentences.
      directions: Of each kernel that has a spectrum.
      seeds: Of the controls that draw.
    """

    params: Any
    embed: Callable[[Any], Embeddings]
    whole: Embeddings
    topics: tuple[str, ...]
    directions: Mapping[str, cuts.Directions]
    seeds: tuple[int, ...]

    def measure(self, params: Any) -> dict[str, float]:
        """The drift of the embeddings under other parameters."""
        return measure(self.embed(params), self.whole, self.topics)

    def measure_cut(self, cut: cuts.Cut, ranks: Mapping[str, int]) -> dict[str, float]:
        """The drift under a cut of some kernels, its mean over the seeds."""
        seeds = self.seeds if cut in cuts.DRAWN else self.seeds[:1]
        trees = (cuts.apply_cut(cut, self.params, self.directions, ranks, s) for s in seeds)
        found = [self.measure(tree) for tree in trees]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def start(
    module: model.Bert, params: Any, plan: rmtjax.Plan, sentences: Sentences, seeds: tuple[int, ...]
) -> Study:
    """The encoder as it is, on some sentences."""
    embed = embedder(module, sentences)
    directions = cuts.decompose(params, plan)
    return Study(params, embed, embed(params), sentences.topics, directions, seeds)


def count_parameters(params: Any) -> int:
    """All numbers of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def cut_together(study: Study, rule: rmtjax.ranks.RankRule) -> dict[str, Any]:
    """Cuts all kernels at once by a rule, and by the controls.

    Returns:
      The kernels cut and their ranks, the parameters left, the largest gap between an embedding
      of the factorized and of the truncated encoder, and what `measure` finds for each.
    """
    plan = rmtjax.plan(study.params, rule=rule, multiple=1)
    ranks = {path: row.rank for path, row in plan.items() if row.action != "keep" and row.rank}
    lower, thin = rmtjax.truncate(study.params, plan), rmtjax.factorize(study.params, plan)
    return {
        "cut": len(ranks),
        "parameters": count_parameters(thin),
        "ranks": ranks,
        "gap": float(np.abs(study.embed(thin) - study.embed(lower)).max()),
        "top": study.measure(lower),
        **{name: study.measure_cut(cut, ranks) for name, cut in cuts.CONTROLS.items()},
    }


def cut_alone(study: Study, path: str, rank: int) -> dict[str, Any]:
    """The mean cosine when one kernel is cut to a rank, beside the controls."""
    kinds = {"top": cuts.keep_top, **cuts.CONTROLS}
    cosine = lambda cut: study.measure_cut(cut, {path: rank})["mean"]
    return {"rank": rank, **{name: cosine(cut) for name, cut in kinds.items()}}


def _accepts(
    rule: rmtjax.ranks.RankRule, row: rmtjax.Kept | rmtjax.Truncated | rmtjax.Factorized
) -> bool:
    if row.spectrum is None or row.fit is None:
        return False
    return bool(rule.accepts(*jax.tree.map(jnp.asarray, (row.spectrum, row.fit))))


def describe_kernels(
    params: Any, plan: rmtjax.Plan, rule: rmtjax.ranks.RankRule, seed: int
) -> list[dict[str, Any]]:
    """A record for each kernel: its row, whether the law fits, and its entries by themselves.

    The fourth moment of the entries over their squared variance is 3 for Gaussian ones.
    """
    shuffled = rmtjax.analyze(cuts.shuffle(params, plan, seed), rule=rule)
    leaves = cuts.by_path(params)
    moment = lambda leaf: float(scipy.stats.kurtosis(np.ravel(leaf), fisher=False))
    rows = rmtjax.Report(plan).to_dict()["rows"]
    return [
        {
            **row,
            "fits": _accepts(rule, layer),
            "moment": moment(leaves[row["path"]]),
            "shuffled": {"spikes": other.spikes, "distance": other.distance},
        }
        for row, layer, other in zip(rows, plan.values(), shuffled.rows, strict=True)
    ]
