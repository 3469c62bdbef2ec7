"""`coterie privacy`: questions of scripts, tables of budgets, and mistakes."""

import json
import math
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.privacy.accounting import Release, account

MNIST = (
    "--mechanism gaussian --noise 1.1 --sampling poisson --rate 0.00426666666667 --steps 14062 --delta 1e-5"
)


def invoke(line):
    return CliRunner().invoke(app, shlex.split(f"privacy {line}"), prog_name="coterie")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.delenv("COTERIE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("line", "epsilon", "accountant"),
    [
        (MNIST, 2.38169, "pld"),
        (f"{MNIST} --accountant pld", 2.38169, "pld"),
        (f"{MNIST} --accountant rdp", 2.59656, "rdp"),
        ("--mechanism laplace --noise 2 --steps 30 --delta 1e-5", 12.2049, "pld"),
        ("--mechanism laplace --noise 2 --steps 30 --delta 1e-5 --accountant rdp", 12.7016, "rdp"),
        ("--mechanism exponential --epsilon-step 0.5 --steps 30 --delta 1e-5", 6.81, "rdp"),
        ("--mechanism gaussian --noise 3.73063 --delta 1e-5 --sampling none", 1.0, "pld"),
        ("--mechanism exponential --epsilon-step 0.5 --steps 30 --delta 0", 15.0, "pure"),
    ],
)
def test_account_answers_scripts_in_one_line(line, epsilon, accountant):
    result = invoke(f"account {line} --json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert [*found][:3] == ["epsilon", "delta", "accountant"]
    assert found["epsilon"] == pytest.approx(epsilon, abs=6e-6 if epsilon < 3 else 4e-3)
    assert found["accountant"] == accountant
    assert found["delta"] == float(shlex.split(line)[shlex.split(line).index("--delta") + 1])


def test_account_says_for_whom_and_on_which_assumptions():
    result = invoke(f"account {MNIST}")
    assert "epsilon = 2.38169 at delta = 1e-05, for add/remove neighbours (accountant pld)" in result.stdout
    assert "\n- each record is in each step independently" in result.stdout
    fixed = invoke("account --mechanism gaussian --noise 2 --sampling fixed --rate 0.1 --delta 1e-5")
    assert "for replace-one neighbours (accountant rdp)" in fixed.stdout


def test_plan_is_what_the_accountant_says(tmp_path):
    line = "plan --population 1000 --parameters 10000 --delta 1e-5 --epsilon 1 --epsilon 2 --rounds 20 --norm 0.5"
    result = invoke(f"{line} --cohort 100 --json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)["plans"]
    assert [(each["epsilon"], each["cohort"]) for each in plans] == [(1, 100), (2, 100)]
    for each in plans:
        z = each["noise_multiplier"]
        release = Release(
            mechanism="gaussian", noise=z, steps=20, sampling="poisson", rate=each["cohort"] / 1000
        )
        assert 0.995 * each["epsilon"] < account([release], delta=1e-5).epsilon <= each["epsilon"]
        std = z * 0.5  # on the sum
        assert each["noise_std"] == pytest.approx(std / each["cohort"])
        assert each["signal_to_noise"] == pytest.approx(0.5 * each["cohort"] / (std * math.sqrt(10000)))
    table = invoke(f"{line} --cohort 50 --sampling none").stdout.splitlines()
    assert table[0].split("  ")[0] == "epsilon"
    assert len(table) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("account --mechanism gaussian --delta 1e-5", "--mechanism gaussian: --noise is missing"),
        ("account --mechanism exponential --noise 2 --delta 1e-5", "exponential: --noise is not for it"),
        ("account --mechanism laplace --noise 2 --epsilon-step 1 --delta 0", "--epsilon-step is not for it"),
        ("account --mechanism exponential --epsilon-step 0 --delta 1e-5", "--epsilon-step 0.0: must be"),
        ("account --mechanism gaussian --noise -1 --delta 1e-5", "noise = -1.0: must be"),
        ("account --mechanism gaussian --noise nan --delta 1e-5", "noise = nan: must be"),
        ("account --mechanism gaussian --noise 1 --delta 1", "delta = 1.0: must be in (0, 1)"),
        ("account --mechanism gaussian --noise 1 --delta 0", "delta = 0: gaussian needs a delta"),
        ("account --mechanism gaussian --noise 1 --delta 1e-5 --rate 0.1", "rate = 0.1 without sampling"),
        ("account --mechanism gaussian --noise 1 --delta 1e-5 --sampling poisson", "--rate is missing"),
        (f"account {MNIST} --rate 1.5", "rate = 1.5: must be in (0, 1]"),
        (f"account {MNIST} --steps -3", "steps = -3: must be"),
        (f"account {MNIST} --sampling fixed --accountant pld", "no event for gaussian with fixed sampling"),
        ("account --mechanism cauchy --noise 1 --delta 1e-5", "'cauchy' is not one of"),
        (
            "account --mechanism gaussian --noise much --delta 1e-5",
            "'--noise': Input should be a valid number",
        ),
        ("account --mechanism gaussian --noise 1", "Missing option '--delta'"),
        (
            "plan --population 100 --cohort 200 --rounds 5 --parameters 9 --delta 1e-5",
            "cohort = 200: must be",
        ),
        ("plan --population 100 --cohort 20 --rounds 0 --parameters 9 --delta 1e-5", "rounds = 0: must be"),
        ("plan --population 100 --cohort 20 --rounds 5 --parameters 9 --delta 0.01", "delta = 0.01: must be"),
        (
            "plan --population 100 --cohort 2 --rounds 5 --parameters 9 --delta 1e-5 --epsilon 0",
            "epsilon = 0",
        ),
    ],
)
def test_mistakes_get_one_clear_error(line, message):
    result = invoke(line)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert not result.stdout


@pytest.mark.parametrize("command", ["", "account", "plan"])
def test_help_reads_without_the_accountants(command):
    code = (
        "import sys; from coterie.cli import app\n"
        f"app({['privacy', *command.split(), '--help']}, prog_name='coterie', standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'dp_accounting')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: coterie privacy" in done.stdout
