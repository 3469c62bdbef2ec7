"""What a config promises of privacy: its noise checked, calibrated, accounted for, and put in words.

Only what is listed in `Promise.claims` is claimed. The chain is built in `chain`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from coterie.core import ConfigError, Guarantees
from coterie.experiment.chain import settings
from coterie.experiment.config import Config, Section
from coterie.experiment.refusals import refuse_chain, refuse_schedule
from coterie.privacy.accounting import (
    Accountant,
    Neighbours,
    Release,
    Spent,
    account,
    bound,
    supported,
    under,
)
from coterie.privacy.added import Mechanism, bits, grid
from coterie.privacy.budgets import calibrate, most_steps
from coterie.privacy.noise import total_variation

SIMULATED = "simulated noise: not private"
DISCRETE: dict[Mechanism, Literal["discrete_gaussian", "discrete_laplace", "skellam"]] = {
    "gaussian": "discrete_gaussian",
    "laplace": "discrete_laplace",
    "skellam": "skellam",
}
TOLERANCE = 1e-3  # of a calibrated multiplier
LIMITS = (
    "side channels (time, memory, which clients were asked and how many answered) are not covered",
    "the run's seed reveals the cohorts: keep it secret where amplification by sampling is credited",
)
TRUST = {
    "server": "whoever sees the models the server releases; the server itself is trusted, and sees every "
    "clipped update",
    "client": "the server, and whoever sees what it sees",
    "shares": "whoever sees only the sums; without secure aggregation the SERVER SEES EACH SHARE, against "
    "which this protects nothing",
}


@dataclass(frozen=True)
class Promise:
    """The noise of a run: what it is, what it spends, and how many rounds the budget allows.

    release: one round, whose noise is the multiplier. guarantees: what is credited of the schedule's. rounds:
    as many as the run may have; wanted: as many as the config asks for. lost: rounds that may have been
    released before a crash, and that no checkpoint holds.
    """

    clip: Section
    noise: Section
    release: Release
    guarantees: Guarantees
    neighbours: Neighbours
    wanted: int
    rounds: int
    lost: int = 0

    @property
    def multiplier(self) -> float:
        """Of the noise, over the clipping norm."""
        return self.release.noise

    def releases(self, rounds: int) -> list[Release]:
        """What so many rounds of the plan release, beside those that were lost.

        A lost round is repeated with the same cohort. It is counted without sampling, which is more: given
        the rest, (x - a)_+ and (a - x)_+ are convex in its likelihood ratio, whose spread this enlarges.
        """
        lost = replace(self.release, steps=self.lost, sampling="none", rate=1.0)
        return [under(self.release, self.guarantees, rounds), lost]

    def spent(self, rounds: int) -> Spent:
        """What so many rounds spend, with those that were lost. Raises ConfigError: no finite epsilon."""
        return account(self.releases(rounds), **self.terms())

    def epsilon(self, rounds: int) -> float:
        """What so many rounds spend, with those that were lost; infinite where no finite epsilon holds."""
        return bound(self.releases(rounds), **self.terms()).epsilon

    def afforded(self) -> Promise:
        """With as many rounds as the budget allows. Raises ConfigError where that is none."""
        budget, most = self.noise["epsilon"], self.wanted
        if budget is None or self.epsilon(most) <= budget:
            return replace(self, rounds=most)
        each, lost = self.releases(1)
        steps = 0
        if not self.lost or bound([lost], **self.terms()).epsilon <= budget:
            most_of = self.guarantees.participations(most)
            steps = most_steps(each, epsilon=budget, before=[lost], most=most_of, **self.terms())
        if not steps:
            raise ConfigError(
                f"budget.epsilon = {budget}: with noise multiplier {self.multiplier:.4g} it allows no round "
                f"after {self.lost} that may have been released and that no checkpoint holds",
                "raise the multiplier or the budget",
            )
        return replace(self, rounds=min(most, steps * self.guarantees.separation))

    def ledger(self) -> Section:
        """What a resumed run must have in common with its beginning."""
        return {
            "mechanism": self.noise["mechanism"],
            "at": self.noise["at"],
            "multiplier": self.multiplier,
            "sampling": self.guarantees.sampling,
            "rate": self.guarantees.rate,
            "protected": self.noise["protected"],
        }

    def claims(self, rounds: int) -> list[Section]:
        """result.json["privacy"]["claims"], after so many rounds."""
        at, protected = self.noise["at"], self.noise["protected"]
        spent = self.spent(rounds)
        notes = [each.replace("record", "client") for each in spent.assumptions] + list(LIMITS)
        if at == "shares":
            notes.insert(0, f"secure aggregation, and at least {self.noise['least']} honest repliers a round")
        if not protected:
            notes.insert(0, SIMULATED)
        return [
            {
                "unit": "client",
                "adversary": TRUST[at],
                "epsilon": spent.epsilon,
                "delta": spent.delta,
                "mechanism": self.release.mechanism.replace("_", " "),
                "at": at,
                "noise_multiplier": self.multiplier,
                "clipping_norm": "adaptive" if self.clip["adaptive"] else self.clip["norm"],
                "sampling": {"kind": self.guarantees.sampling, "rate": self.guarantees.rate},
                "rounds": rounds + self.lost,
                "participations": self.guarantees.participations(rounds) + self.lost,
                "accountant": spent.accountant,
                "neighbours": spent.neighbours,
                "assumptions": notes,
                "protected": protected,
            }
        ]

    def terms(self) -> dict[str, Any]:
        """For the accounting."""
        names = ("delta", "accountant")
        return {**{name: self.noise[name] for name in names}, "neighbours": self.neighbours}


def promise(config: Config, schedule: Any, clients: int, dimension: int) -> Promise | None:
    """The promise of a config with noise; None without. dimension: numbers in an update.

    Raises ConfigError for a chain that keeps none.
    """
    chain = settings(config)
    place = next((i for i, (kind, _) in enumerate(chain) if kind == "noise"), None)
    if place is None:
        if any(told.get("adaptive") for _, told in chain):
            raise ConfigError(
                "transforms: an adaptive norm reads a bit of each client, which only noise protects",
                "add a noise transform after it, or give the clip a norm",
            )
        return None
    refuse_chain(chain, place)
    told, before = chain[place][1], chain[place - 1][1]
    refuse_schedule(config, told, schedule, clients)
    release = _release(told, before, dimension + bool(before["adaptive"]))
    given, rounds = schedule.guarantees(clients), int(schedule.rounds)
    plain = replace(given, sampling="none")
    # an update as its client sends it may become any other
    made = Promise(
        before,
        told,
        release,
        plain,
        "replace-one" if told["at"] == "client" else "add/remove",
        rounds,
        rounds,
    )
    found = [made]
    # where neighbours exchange a client the noise counts for half, which half of the clients make up for
    helps = {"poisson": 1.0, "fixed": 0.5, "none": 0.0}[given.sampling]
    if told["at"] != "client" and given.rate < helps:
        sampled = replace(
            made, guarantees=given, neighbours="replace-one" if given.sampling == "fixed" else "add/remove"
        )
        names: tuple[Accountant, ...] = (told["accountant"],) if told["accountant"] else ("pld", "rdp")
        if any(supported(name, sampled.releases(1)) for name in names):
            found.append(sampled)
    if told["multiplier"] is None:
        return min(map(_calibrated, found), key=lambda each: each.multiplier)
    best = min(found, key=lambda each: each.epsilon(rounds))
    return best.afforded()


def _release(told: Section, before: Section, dimension: int) -> Release:
    """One round's noise, as the accounting sees it."""
    mechanism, noise = told["mechanism"], told["multiplier"] or 1.0
    if not told["protected"]:
        return Release(mechanism=mechanism, noise=noise)
    discrete = DISCRETE[mechanism]
    lattice = grid(before["norm"], before["order"], bits(mechanism))
    shares = told["least"] or 1
    return Release(
        mechanism=discrete, noise=noise, sensitivity=float(lattice.bound), dimension=dimension, shares=shares,
        total_variation=total_variation(dimension * shares),
    )  # fmt: skip


def _calibrated(made: Promise) -> Promise:
    """With the least noise, within a thousandth, that all wanted rounds may have."""
    release = under(made.release, made.guarantees, made.wanted)
    noise = calibrate(release, epsilon=made.noise["epsilon"], tolerance=TOLERANCE, **made.terms())
    return replace(made, release=replace(made.release, noise=noise))


def with_multiplier(config: Config, promise: Promise | None) -> Config:
    """The config with the calibrated multiplier in it, for those who train for it."""
    if promise is None:
        return config
    return replace(
        config,
        transforms=[
            {**each, "multiplier": promise.multiplier} if each["kind"] == "noise" else each
            for each in config.transforms
        ],
    )


def refuse_uncalibrated(config: Config, promise: Promise | None) -> None:
    """Refuse, for sites that are sent the config as it was signed, noise of theirs without its multiplier."""
    if promise is None or promise.noise["at"] == "server":
        return
    if next(told["multiplier"] for kind, told in settings(config) if kind == "noise") is None:
        raise ConfigError(
            "transforms: sites add this noise, and get the config as it was signed, not its calibration",
            f"set multiplier = {promise.multiplier:.6g} beside the budget",
        )


def told(promise: Promise | None, rounds: int) -> Section | None:
    """result.json["privacy"] after so many committed rounds; None without noise."""
    if promise is None:
        return None
    withheld = ["train metrics", "evaluation of clients", *["clients' data"] * promise.noise["protected"]]
    return {
        "claims": promise.claims(rounds),
        "ledger": {**promise.ledger(), "rounds": rounds, "lost": promise.lost},
        "withheld": withheld,
    }
