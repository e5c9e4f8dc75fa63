from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
from typing import Literal

import pytest
from absl import flags as absl_flags

from lightningrl import flags

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = dataclasses.field(default="policy", metadata={"help": "what it is called"})
    lr: float = 1e-3
    steps: int = 30
    smoke: bool = False
    train_roles: tuple[str, ...] = ("writer", "rewriter")
    kl: Literal["k1", "k2", "k3"] = "k3"
    database: str | None = None
    seed: int | None = 7
    frozen: tuple[str, ...] | None = None


def parse(*arguments: str, config: type = Config) -> object:
    values = absl_flags.FlagValues()
    flags.define_flags(config, values)
    values(["program", *arguments])
    return flags.config_from_flags(config, values)


def test_no_flags_give_the_defaults() -> None:
    assert parse() == Config()


def test_an_experiment_has_other_defaults_for_the_same_flags() -> None:
    values = absl_flags.FlagValues()
    flags.define_flags(Config, values, defaults={"lr": 1e-6, "train_roles": ("writer",), "seed": None})
    values(["program", "--lr=2e-6"])
    assert flags.config_from_flags(Config, values) == Config(lr=2e-6, train_roles=("writer",), seed=None)
    with pytest.raises(TypeError, match="Config has no field rate"):
        flags.define_flags(Config, absl_flags.FlagValues(), defaults={"rate": 1.0})


def test_every_type_of_field_is_set_by_its_flag() -> None:
    config = parse(
        "--name=a b",
        "--lr=3e-4",
        "--steps",
        "5",
        "--smoke",
        "--train_roles=a,b",
        "--kl=k1",
        "--database=x.sqlite",
        "--seed=none",
        "--frozen=embed",
    )
    assert config == Config("a b", 3e-4, 5, True, ("a", "b"), "k1", "x.sqlite", None, ("embed",))


def test_flags_of_a_config_read_back_as_the_same_config() -> None:
    values = absl_flags.FlagValues()
    flags.define_flags(Config, values)
    values(["program", "--lr=0.1", "--nosmoke", "--seed=3", "--frozen=a,b"])
    written = [values[field.name].serialize() for field in dataclasses.fields(Config)]
    assert parse(*filter(None, written)) == dataclasses.replace(Config(), lr=0.1, seed=3, frozen=("a", "b"))


def test_an_empty_list_is_an_empty_tuple() -> None:
    assert parse("--train_roles=") == dataclasses.replace(Config(), train_roles=())


@pytest.mark.parametrize("argument", ["--lr=fast", "--steps=1.5", "--kl=k4", "--smoke=maybe", "--nothing=1"])
def test_values_that_do_not_fit_are_refused(argument: str) -> None:
    with pytest.raises(absl_flags.Error):
        parse(argument)


def test_help_texts_reach_the_flags() -> None:
    values = absl_flags.FlagValues()
    flags.define_flags(Config, values)
    assert values["name"].help == "what it is called"


def test_fields_that_cannot_be_flags_are_refused() -> None:
    unfit = dataclasses.make_dataclass("Unfit", [("table", dict, dataclasses.field(default=None))], frozen=True)
    bare = dataclasses.make_dataclass("Bare", [("lr", float)], frozen=True)
    with pytest.raises(TypeError, match="Unfit.table cannot be a flag"):
        parse(config=unfit)
    with pytest.raises(TypeError, match="Bare.lr needs a plain default"):
        parse(config=bare)


PROGRAM = """
'''A program.'''
import dataclasses, os, signal
from lightningrl import flags
from lightningrl.errors import UserError

@dataclasses.dataclass(frozen=True)
class Config:
    what: str = dataclasses.field(default="fine", metadata={"help": "what is to happen"})

flags.define_flags(Config)

def main():
    match flags.config_from_flags(Config).what:
        case "fine": print("done")
        case "user": raise UserError("recipe 'x' is unknown: choose ppo")
        case "missing": open("nowhere.sqlite")
        case "port": raise OSError(98, "Address already in use")
        case "defect": raise ValueError("a bug")
        case "interrupt":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

if __name__ == "__main__":
    flags.run_app(main)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def run(program: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize(
    ("argument", "status", "stderr"),
    [
        ("--what=fine", 0, ""),
        ("--what=user", 1, "error: recipe 'x' is unknown: choose ppo\n"),
        ("--what=missing", 1, "error: No such file or directory: nowhere.sqlite\n"),
        ("--what=port", 1, "error: Address already in use\n"),
        ("--what=interrupt", 130, "\ninterrupted\n"),
        ("fine", 1, "error: 'fine' is no flag; settings are given as --name=value, see --help\n"),
    ],
)
def test_people_get_one_sentence_and_a_status(program: pathlib.Path, argument: str, status: int, stderr: str) -> None:
    result = run(program, argument)
    assert (result.returncode, result.stderr) == (status, stderr)


def test_a_defect_keeps_its_traceback(program: pathlib.Path) -> None:
    result = run(program, "--what=defect")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: a bug" in result.stderr


def test_an_unknown_flag_is_named(program: pathlib.Path) -> None:
    result = run(program, "--hwat=fine")
    assert result.returncode != 0 and "hwat" in result.stderr and "Traceback" not in result.stderr


def test_help_shows_the_flags_of_the_program(program: pathlib.Path) -> None:
    result = run(program, "--help")
    assert result.returncode == 0
    assert "A program." in result.stdout and "--what: what is to happen" in result.stdout and "(default: 'fine')" in result.stdout
