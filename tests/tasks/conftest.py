"""Databases that the tests of the tasks share."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from lightningrl.tasks.text_to_sql.databases import build_databases


def data_folder(name: str, file: str) -> Path:
    """A folder of real data, kept outside the project: $LIGHTNINGRL_DATA/name or ../shared/data/name, which has that file."""
    folder = Path(os.environ.get("LIGHTNINGRL_DATA") or Path(__file__).parents[3] / "shared" / "data") / name
    if not (folder / file).is_file():
        pytest.skip(f"there is no {file} in {folder}; set LIGHTNINGRL_DATA to the folder that has {name}/")
    return folder


@pytest.fixture(scope="session")
def spider_dir() -> Path:
    """Spider in its official layout."""
    return data_folder("spider", "dev.json")


@pytest.fixture(scope="session")
def own_databases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build_databases(tmp_path_factory.mktemp("own"), seed=0, count=10)


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pets: a tie in age, a NULL, a text that holds the words of SQL, a number kept as text and as REAL."""
    path = tmp_path_factory.mktemp("pets") / "pets.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT, kind TEXT, age INTEGER, weight REAL, chip TEXT)")
        connection.executemany(
            "INSERT INTO pet VALUES (?, ?, ?, ?, ?, ?)",
            [
                (1, "Rex", "dog", 3, 3.0, "3"),
                (2, "Tom", "cat", 5, 4.5, "5"),
                (3, "Ann", "cat", 2, 2.0, "2"),
                (4, "Bo", "dog", 9, 9.0, "9"),
                (5, "Cy", "fish", 1, 0.5, None),
                (6, "Tom", "dog", 7, 7.0, "7"),
                (7, "a distinct  order by one", "bird", 4, 4.0, "4"),
                (8, "Di", None, 6, 6.0, "6"),
                (9, "Ed", "fish", 1, 0.5, None),
            ],
        )
        connection.execute("CREATE TABLE visit (id INTEGER PRIMARY KEY, pet_id INTEGER REFERENCES pet(id), year INTEGER)")
        connection.executemany("INSERT INTO visit VALUES (?, ?, ?)", [(1, 1, 2020), (2, 1, 2021), (3, 2, 2021), (4, 4, 2022)])
    return path
