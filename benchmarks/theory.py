"""The picture of docs/theory.md: what gamma does, when the equilibrium is one, and IntroVAE's hinge beside it.

python -m benchmarks.theory [--output docs/theory.png]
"""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.figure import Figure

from sivae import theory

P_DATA = np.array([0.05, 0.10, 0.20, 0.28, 0.17, 0.10, 0.06, 0.04])
PRIOR = np.array([0.5, 0.3, 0.2])
MARGIN = 3.0  # the hinge pushes ELBOs down to -3: a probability of 0.05
COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:red"]


def start(seed: int = 0) -> np.ndarray:
    """A decoder [Z, X] that makes everything, unlike for each z."""
    return 0.5 * np.random.default_rng(seed).dirichlet(np.ones(len(P_DATA)), len(PRIOR)) + 0.5 / len(P_DATA)


def away(p: np.ndarray, other: np.ndarray) -> float:
    """Total variation."""
    return 0.5 * abs(p - other).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/theory.png")
    options = parser.parse_args()
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    sharper, encoder, ends, rounds = figure.subplots(1, 4)

    places = np.arange(len(P_DATA))
    sharper.bar(places, P_DATA, color="0.85", label=r"$p_{data}$")
    for gamma, color in zip((0.2, 0.4, 0.6, 0.8), COLORS):
        p = theory.minimizer(P_DATA, gamma)
        sharper.plot(places, p, "o-", color=color, ms=4, label=rf"$\gamma$ = {gamma:g}")
    sharper.set(title=r"Minimizers of KL($p_{data}$ || $p_d$) + $\gamma$ H($p_d$)", xlabel="x", ylabel="probability")
    sharper.legend()

    share, p = 0.2, np.linspace(0.02, 0.98, 400)
    encoder.plot(p, np.log(p), color="0.6", lw=5, label=r"log $p_d$: the posterior")
    for alpha, color in zip((1, 2, 8), COLORS):
        encoder.plot(p, theory.soft_elbo(share, p, alpha), color=color, label=rf"Soft-IntroVAE, $\alpha$ = {alpha}")
    encoder.plot(p, theory.hinge_elbo(share, p, MARGIN), color="tab:red", label=f"IntroVAE, m = {MARGIN:g}")
    encoder.axvline(share, color="0.5", ls=":")
    encoder.set(
        title=f"The best encoder's ELBO of an x\nwith $p_{{data}}$ = {share}", xlabel=r"$p_d(x)$", ylabel="W(x)"
    )
    encoder.legend(fontsize=8)

    gammas = np.arange(0.05, 1.16, 0.05)
    for alpha, color in zip((1, 2, 8), COLORS):
        distances = []
        fails = None
        for gamma in gammas:
            best = theory.minimizer(P_DATA, gamma)
            path = theory.iterate(P_DATA, PRIOR, start(), gamma, lambda p: theory.soft_elbo(P_DATA, p, alpha), 60)
            # Where it does not settle, the mean over the last rounds.
            distances.append(np.mean([away(p, best) for p in path[-20:]]))
            if fails is None and not theory.holds(P_DATA, best, alpha).all():
                fails = gamma
        ends.semilogy(gammas, np.maximum(distances, 1e-16), "o-", color=color, ms=3, label=rf"$\alpha$ = {alpha}")
        if fails is not None:
            ends.axvline(fails, color=color, ls="--", lw=1)
    ends.set(title="Distance of the updates' end to the minimizer\n(dashed: there the condition fails)", xlabel=r"$\gamma$", ylabel="total variation")  # fmt: skip
    ends.legend()

    gamma = 0.3
    best = theory.minimizer(P_DATA, gamma)
    targets = {
        r"Soft-IntroVAE, $\alpha$ = 2": lambda p: theory.soft_elbo(P_DATA, p, 2),
        f"IntroVAE, m = {MARGIN:g}": lambda p: theory.hinge_elbo(P_DATA, p, MARGIN),
    }
    for (name, target), color in zip(targets.items(), ("tab:orange", "tab:red")):
        path = theory.iterate(P_DATA, PRIOR, start(), gamma, target, 40)
        rounds.semilogy([max(away(p, best), 1e-16) for p in path], "o-", color=color, ms=3, label=name)
    rounds.set(title=rf"Distance to the minimizer, $\gamma$ = {gamma}", xlabel="rounds of exact updates")
    rounds.legend()
    for axes in (encoder, ends, rounds):
        axes.grid(alpha=0.3)
    figure.savefig(options.output, dpi=90)
    print(options.output)


if __name__ == "__main__":
    main()
