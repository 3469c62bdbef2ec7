"""`coterie privacy`: what noise buys. The numbers are those of `privacy.accounting` and `privacy.budgets`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from coterie.cli.audits import audit
from coterie.cli.progress import columns, emit
from coterie.errors import ConfigError

privacy = typer.Typer(
    no_args_is_help=True, help="Account for differential privacy: what noise spends, and what a budget buys."
)
Noise = StrEnum("Noise", ["gaussian", "laplace", "exponential"])
Sampled = StrEnum("Sampled", ["none", "poisson", "fixed"])
Accountants = StrEnum("Accountants", ["pld", "rdp"])

SamplingOption = Annotated[
    Sampled,
    typer.Option(
        help="poisson: each record is in each step with probability RATE, independently; fixed: batches of "
        "one size, drawn anew without replacement; none: a record may be in every step."
    ),
]
AccountantOption = Annotated[
    Accountants | None,
    typer.Option(
        help="pld (tighter) or rdp. Default: pld, or rdp where pld has no such event (exponential, fixed)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on one line.")]


@privacy.command()
def account(
    mechanism: Annotated[Noise, typer.Option(help="What each step is made private by.")],
    delta: Annotated[
        float, typer.Option(help="Below 1 / records, for example 1e-5; 0 for laplace and exponential alone.")
    ],
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation / L2 sensitivity (gaussian), scale / L1 sensitivity (laplace)."
        ),
    ] = None,
    epsilon_step: Annotated[
        float | None, typer.Option(help="Epsilon of one selection (exponential, instead of --noise).")
    ] = None,
    sampling: SamplingOption = Sampled.none,
    rate: Annotated[
        float | None, typer.Option(help="Sampling rate in (0, 1]: batch / records, or cohort / clients.")
    ] = None,
    steps: Annotated[int, typer.Option(help="How many noisy steps (rounds).")] = 1,
    accountant: AccountantOption = None,
    as_json: AsJson = False,
) -> None:
    """Say which epsilon a number of noisy steps spends, for which neighbours and on which assumptions.

    coterie privacy account --mechanism gaussian --noise 1.1 --steps 14062 --sampling poisson --rate 0.00427
    --delta 1e-5
    """
    from coterie.privacy.accounting import Release  # noqa: PLC0415
    from coterie.privacy.accounting import account as spent  # noqa: PLC0415

    selects = mechanism is Noise.exponential
    given, other = (epsilon_step, noise) if selects else (noise, epsilon_step)
    wanted, unwanted = ("--epsilon-step", "--noise") if selects else ("--noise", "--epsilon-step")
    if given is None or other is not None:
        wrong = f"{unwanted} is not for it" if other is not None else f"{wanted} is missing"
        raise ConfigError(f"--mechanism {mechanism}: {wrong}", f"give {wanted} alone")
    if selects and not 0 < given < float("inf"):
        raise ConfigError(f"--epsilon-step {given}: must be a finite number > 0", "0.5, for example")
    if sampling is not Sampled.none and rate is None:
        raise ConfigError(f"--sampling {sampling}: --rate is missing", "it is cohort / clients")
    found = spent(
        [
            Release(
                mechanism=mechanism.value,  # type: ignore[arg-type]  # a StrEnum's value is any str to mypy
                noise=1 / given if selects else given,
                steps=steps,
                sampling=sampling.value,  # type: ignore[arg-type]
                rate=1.0 if rate is None else rate,
            )
        ],
        delta=delta,
        accountant=accountant and accountant.value,  # type: ignore[arg-type]
    )
    if as_json:
        emit(
            {
                "epsilon": found.epsilon,
                "delta": found.delta,
                "accountant": found.accountant,
                "neighbours": found.neighbours,
                "assumptions": found.assumptions,
            }
        )
        return
    typer.echo(
        f"epsilon = {found.epsilon:.6g} at delta = {found.delta:g}, for {found.neighbours} neighbours "
        f"(accountant {found.accountant})"
    )
    for line in found.assumptions:
        typer.echo(f"- {line}")


@privacy.command()
def plan(
    population: Annotated[int, typer.Option(help="Clients in all.")],
    cohort: Annotated[list[int], typer.Option(help="Clients a round; may be repeated.")],
    rounds: Annotated[list[int], typer.Option(help="Rounds; may be repeated.")],
    parameters: Annotated[int, typer.Option(help="Parameters of the model.")],
    delta: Annotated[float, typer.Option(help="Below 1 / population.")],
    epsilon: Annotated[list[float], typer.Option(help="Budgets; may be repeated.")] = [1.0, 2.0, 8.0],  # noqa: B006
    norm: Annotated[float, typer.Option(help="Clipping norm, in L2.")] = 1.0,
    sampling: SamplingOption = Sampled.poisson,
    accountant: AccountantOption = None,
    as_json: AsJson = False,
) -> None:
    """Show the noise multiplier that each budget needs, and how much signal is left under the noise.

    The signal is that of updates that all agree and are as long as the clipping norm: the best there can be.
    Noise std is that of each parameter of the mean update. More signal: larger cohorts, fewer rounds, a
    smaller model.
    """
    from coterie.privacy import budgets  # noqa: PLC0415

    found = budgets.plan(
        epsilons=epsilon,
        cohorts=cohort,
        rounds=rounds,
        population=population,
        parameters=parameters,
        delta=delta,
        norm=norm,
        sampling=sampling.value,  # type: ignore[arg-type]
        accountant=accountant and accountant.value,  # type: ignore[arg-type]
    )
    if as_json:
        emit({"population": population, "delta": delta, "plans": [each._asdict() for each in found]})
        return
    columns(
        ("epsilon", "cohort", "rounds", "noise multiplier", "noise std", "signal / noise"),
        [
            (f"{e:g}", f"{c:,}", f"{r:,}", f"{z:.4g}", f"{std:.3g}", f"{ratio:.3g}")
            for e, c, r, z, std, ratio in found
        ],
    )


privacy.command()(audit)
