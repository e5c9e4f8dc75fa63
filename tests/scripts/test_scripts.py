"""The scripts, run in a small copy of the checkout with an interpreter that only writes down how it was called."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh")) + [ROOT / ".ci/run"]

# Stands in for python3: knows its version, makes a virtual environment that is a copy of itself, and fails where told to.
INTERPRETER = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    -c*version_info*) [[ -z "${OLD:-}" ]] ;;
    -c*ensurepip*) [[ -z "${BARE:-}" ]] ;;
    --version) echo "Python 3.8.1" ;;
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip install"*) [[ -z "${OFFLINE:-}" ]] ;;
    "-m ruff"*) [[ -z "${UGLY:-}" ]] ;;
esac
"""


class Checkout:
    def __init__(self, directory: pathlib.Path):
        self.root, self.bin, self.calls_file = directory / "a checkout", directory / "bin", directory / "calls"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            (self.bin / name).write_text(INTERPRETER)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            [str(self.root / script), *arguments],
            capture_output=True,
            text=True,
            cwd=self.bin,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls_file), **environment},
        )

    def calls(self, start: str) -> list[str]:
        return [call for call in self.calls_file.read_text().splitlines() if call.startswith(start)]


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "setup_env.sh" or script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/test.sh"])
def test_help_installs_nothing(checkout: Checkout, script: str) -> None:
    result = checkout.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith(f"usage: {script}")
    assert not checkout.calls("")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sede=1"], "unknown argument --sede=1; see --help."),
        (["DIR"], "unknown argument DIR; see --help."),
        (["--seed"], "--seed needs a value; see --help."),
        (["--seed", "one"], "--seed takes a whole number from 0, not 'one'."),
        (["--database=/nowhere.sqlite"], "there is no database file /nowhere.sqlite."),
        (["--task=chess"], "--task is sql, qa or math, not 'chess'."),
    ],
)
def test_bad_arguments_get_one_sentence_before_anything_is_installed(checkout: Checkout, arguments: list[str], sentence: str) -> None:
    result = checkout.run("scripts/quickstart.sh", *arguments)
    assert (result.returncode, result.stderr) == (2, f"quickstart.sh: {sentence}\n")
    assert not checkout.calls("")


def test_test_script_refuses_an_unknown_argument(checkout: Checkout) -> None:
    result = checkout.run("scripts/test.sh", "--quick")
    assert (result.returncode, result.stderr) == (2, "test.sh: unknown argument --quick; see --help.\n")


def test_quickstart_passes_its_settings_on(checkout: Checkout) -> None:
    (checkout.bin / "my.sqlite").touch()
    result = checkout.run("scripts/quickstart.sh", "--out", "my runs/x", "--seed=3", "--database", "my.sqlite", "--smoke", "--controls")
    assert result.returncode == 0, result.stderr
    (call,) = checkout.calls("-m experiments.text_to_sql")
    settings, timings = call.split(" --seconds_install=")
    here = checkout.bin
    assert settings == f"-m experiments.text_to_sql --out={here}/my runs/x --seed=3 --database={here}/my.sqlite --smoke --controls"
    seconds, started = timings.split(" --started=")
    assert seconds.isdigit() and started.isdigit()


def test_quickstart_without_arguments_has_defaults(checkout: Checkout) -> None:
    assert checkout.run("scripts/quickstart.sh").returncode == 0
    (call,) = checkout.calls("-m experiments.text_to_sql")
    assert call.startswith(f"-m experiments.text_to_sql --out={checkout.root}/runs/quickstart --seed=0 --seconds_install=")


@pytest.mark.parametrize(("task", "module"), [("qa", "multi_hop_qa"), ("math", "math_tool")])
def test_quickstart_trains_the_agent_of_a_task(checkout: Checkout, task: str, module: str) -> None:
    assert checkout.run("scripts/quickstart.sh", "--task", task).returncode == 0
    (call,) = checkout.calls(f"-m experiments.{module}")
    assert call.startswith(f"-m experiments.{module} --out={checkout.root}/runs/quickstart_{task} --seed=0 --seconds_install=")


def test_an_environment_is_installed_once_for_each_set_of_pins(checkout: Checkout) -> None:
    checkout.run("scripts/quickstart.sh")
    (install,) = checkout.calls("-m pip install")
    assert install.endswith(f"--constraint {checkout.root}/constraints.txt --editable {checkout.root}[agents]")
    assert len(checkout.calls("-m venv")) == 1

    checkout.run("scripts/quickstart.sh")
    assert not checkout.calls("-m pip") and not checkout.calls("-m venv")

    with (checkout.root / "constraints.txt").open("a") as pins:
        pins.write("another==1.0\n")
    checkout.run("scripts/quickstart.sh")
    assert len(checkout.calls("-m pip install")) == 1 and not checkout.calls("-m venv")


def test_the_test_environment_serves_the_quickstart_too(checkout: Checkout) -> None:
    assert checkout.run("scripts/test.sh").returncode == 0
    assert checkout.calls("-m pip install")[0].endswith("[test]")
    checkout.run("scripts/quickstart.sh")
    assert not checkout.calls("-m pip install")


def test_an_installation_that_broke_off_is_done_again(checkout: Checkout) -> None:
    result = checkout.run("scripts/quickstart.sh", OFFLINE="1")
    assert result.returncode == 1 and result.stderr == "quickstart.sh: the installation failed (pip's message is above).\n"
    assert not checkout.calls("-m experiments")
    assert checkout.run("scripts/quickstart.sh").returncode == 0
    assert len(checkout.calls("-m pip install")) == 1


def test_an_old_python_is_told_so(checkout: Checkout) -> None:
    result = checkout.run("scripts/quickstart.sh", OLD="1")
    assert result.returncode == 1
    assert result.stderr == "quickstart.sh: Python 3.11 or newer is needed and none was found; python3 is Python 3.8.1.\n"


def test_a_python_without_venv_is_told_so(checkout: Checkout) -> None:
    result = checkout.run("scripts/quickstart.sh", BARE="1")
    assert result.returncode == 1
    assert result.stderr.startswith("quickstart.sh: python3 has no venv module; install it first") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "selection"), [([], ""), (["--fast"], " -m not slow")])
def test_the_test_script_runs_style_types_and_tests_in_this_order(checkout: Checkout, arguments: list[str], selection: str) -> None:
    assert checkout.run("scripts/test.sh", *arguments).returncode == 0
    ran = [call for call in checkout.calls("-m") if not call.startswith(("-m venv", "-m pip"))]
    assert ran[:3] == ["-m ruff check .", "-m ruff format --check .", "-m mypy lightningrl experiments"]
    assert len(ran) == 4 and ran[3].startswith("-m pytest ") and ran[3].endswith(f"--dist=loadfile --no-loadscope-reorder{selection}")


def test_the_test_script_fails_where_a_step_fails(checkout: Checkout) -> None:
    assert checkout.run("scripts/test.sh", UGLY="1").returncode != 0
    assert not checkout.calls("-m pytest")


def test_ci_runs_the_test_script(checkout: Checkout) -> None:
    assert checkout.run(".ci/run").returncode == 0
    assert checkout.calls("-m pytest")[0].endswith("--dist=loadfile --no-loadscope-reorder")


def test_pins_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = []
    for line in lines[1:]:
        name, version = line.split("==")
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum() and version[0].isdigit() and " " not in line
        names.append(name.lower())
    assert lines[0].startswith("#") and names == sorted(names, key=lambda name: name.replace("_", "-")) and len(names) == len(set(names))
