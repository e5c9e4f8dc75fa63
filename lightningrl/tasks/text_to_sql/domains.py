"""The hand-written domains that the project's own databases are about. Names are short: each token costs the policy time."""

from __future__ import annotations

import dataclasses

from lightningrl.tasks.text_to_sql import names


@dataclasses.dataclass(frozen=True)
class Names:
    """Different values, one a row."""

    pool: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A few values that rows share; each database has `kinds` of them."""

    pool: tuple[str, ...]
    kinds: int = 5


@dataclasses.dataclass(frozen=True)
class Number:
    """low, low + step, …, high; different in every row where `different`."""

    low: int
    high: int
    step: int = 1
    different: bool = True


@dataclasses.dataclass(frozen=True)
class Reference:
    """The id of a row of an earlier table."""

    table: str


Values = Names | Choice | Number | Reference


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """A table of `rows[0]` to `rows[1]` rows, with an `id` before these columns."""

    name: str
    rows: tuple[int, int]
    columns: dict[str, Values]


@dataclasses.dataclass(frozen=True)
class Domain:
    name: str
    tables: tuple[TablePlan, ...]


TRAINING = (
    Domain(
        "music",
        (
            TablePlan(
                "singer",
                (15, 25),
                {
                    "name": Names(names.PEOPLE),
                    "country": Choice(names.COUNTRIES),
                    "age": Number(18, 70),
                    "genre": Choice(("pop", "rock", "jazz", "folk", "soul"), 4),
                },
            ),
            TablePlan(
                "concert",
                (20, 40),
                {
                    "title": Names(names.CONCERTS),
                    "singer_id": Reference("singer"),
                    "city": Choice(names.CITIES),
                    "year": Number(2008, 2022, different=False),
                    "price": Number(10, 98, 2),
                },
            ),
        ),
    ),
    Domain(
        "shop",
        (
            TablePlan(
                "store",
                (15, 20),
                {
                    "name": Names(names.STORES),
                    "city": Choice(names.CITIES),
                    "staff": Number(3, 60),
                    "opened": Number(1980, 2020, different=False),
                },
            ),
            TablePlan(
                "product",
                (20, 40),
                {
                    "name": Names(names.PRODUCTS),
                    "store_id": Reference("store"),
                    "color": Choice(names.COLORS),
                    "price": Number(2, 90),
                    "stock": Number(5, 500, 5),
                },
            ),
        ),
    ),
    Domain(
        "league",
        (
            TablePlan(
                "team",
                (15, 20),
                {
                    "name": Names(names.TEAMS),
                    "city": Choice(names.CITIES),
                    "founded": Number(1890, 1990, different=False),
                    "wins": Number(1, 60),
                },
            ),
            TablePlan(
                "player",
                (25, 40),
                {
                    "name": Names(names.PEOPLE),
                    "team_id": Reference("team"),
                    "position": Choice(("guard", "forward", "center", "keeper"), 4),
                    "age": Number(18, 40, different=False),
                    "goals": Number(0, 60),
                },
            ),
        ),
    ),
    Domain(
        "cinema",
        (
            TablePlan(
                "studio",
                (15, 20),
                {
                    "name": Names(names.STUDIOS),
                    "country": Choice(names.COUNTRIES),
                    "founded": Number(1910, 2010),
                    "staff": Number(20, 900, 10),
                },
            ),
            TablePlan(
                "film",
                (25, 40),
                {
                    "title": Names(names.FILMS),
                    "studio_id": Reference("studio"),
                    "genre": Choice(("comedy", "drama", "action", "horror"), 4),
                    "year": Number(1990, 2022, different=False),
                    "rating": Number(10, 99),
                },
            ),
        ),
    ),
    Domain(
        "school",
        (
            TablePlan(
                "teacher",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "subject": Choice(("math", "art", "music", "history", "biology")),
                    "age": Number(25, 65),
                    "salary": Number(30, 90),
                },
            ),
            TablePlan(
                "student",
                (25, 40),
                {
                    "name": Names(names.PEOPLE),
                    "teacher_id": Reference("teacher"),
                    "city": Choice(names.CITIES),
                    "grade": Number(1, 6, different=False),
                    "score": Number(40, 99),
                },
            ),
        ),
    ),
    Domain(
        "library",
        (
            TablePlan(
                "author",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "country": Choice(names.COUNTRIES),
                    "born": Number(1900, 1990),
                    "awards": Number(0, 25),
                },
            ),
            TablePlan(
                "book",
                (25, 40),
                {
                    "title": Names(names.BOOKS),
                    "author_id": Reference("author"),
                    "genre": Choice(("novel", "poetry", "essay", "crime"), 4),
                    "pages": Number(80, 900, 10),
                    "year": Number(1950, 2022, different=False),
                },
            ),
        ),
    ),
    Domain(
        "travel",
        (
            TablePlan(
                "hotel",
                (15, 22),
                {
                    "name": Names(names.HOTELS),
                    "city": Choice(names.CITIES),
                    "stars": Number(1, 5, different=False),
                    "rooms": Number(10, 400, 5),
                },
            ),
            TablePlan(
                "guest",
                (25, 40),
                {
                    "name": Names(names.PEOPLE),
                    "hotel_id": Reference("hotel"),
                    "country": Choice(names.COUNTRIES),
                    "nights": Number(1, 14, different=False),
                    "bill": Number(60, 990, 10),
                },
            ),
        ),
    ),
    Domain(
        "company",
        (
            TablePlan(
                "office",
                (15, 20),
                {
                    "name": Names(names.OFFICES),
                    "country": Choice(names.COUNTRIES),
                    "floors": Number(1, 40),
                    "rent": Number(10, 300, 5),
                },
            ),
            TablePlan(
                "worker",
                (25, 40),
                {
                    "name": Names(names.PEOPLE),
                    "office_id": Reference("office"),
                    "role": Choice(("clerk", "chef", "nurse", "driver", "pilot")),
                    "age": Number(20, 65, different=False),
                    "salary": Number(20, 120),
                },
            ),
        ),
    ),
    Domain(
        "farm",
        (
            TablePlan(
                "farmer",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "region": Choice(("north", "south", "east", "west"), 4),
                    "age": Number(22, 75),
                    "land": Number(5, 200, 5),
                },
            ),
            TablePlan(
                "animal",
                (25, 40),
                {
                    "name": Names(names.ANIMALS),
                    "farmer_id": Reference("farmer"),
                    "species": Choice(("cow", "pig", "goat", "sheep", "horse")),
                    "weight": Number(20, 700, 5),
                    "born": Number(2008, 2022, different=False),
                },
            ),
        ),
    ),
    Domain(
        "airline",
        (
            TablePlan(
                "pilot",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "country": Choice(names.COUNTRIES),
                    "age": Number(25, 62),
                    "hours": Number(100, 9000, 100),
                },
            ),
            TablePlan(
                "plane",
                (15, 20),
                {
                    "model": Names(names.PLANES),
                    "maker": Choice(("Avia", "Boeing", "Cessna", "Saab"), 4),
                    "seats": Number(20, 400, 10),
                    "built": Number(1985, 2021),
                },
            ),
            TablePlan(
                "flight",
                (25, 40),
                {
                    "pilot_id": Reference("pilot"),
                    "plane_id": Reference("plane"),
                    "city": Choice(names.CITIES),
                    "distance": Number(200, 6000, 100),
                },
            ),
        ),
    ),
)

UNSEEN = (
    Domain(
        "museum",
        (
            TablePlan(
                "painter",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "country": Choice(names.COUNTRIES),
                    "born": Number(1700, 1960),
                    "fame": Number(1, 99),
                },
            ),
            TablePlan(
                "painting",
                (25, 40),
                {
                    "title": Names(names.PAINTINGS),
                    "painter_id": Reference("painter"),
                    "style": Choice(("modern", "baroque", "cubist", "gothic"), 4),
                    "year": Number(1720, 1990, different=False),
                    "value": Number(10, 950, 5),
                },
            ),
        ),
    ),
    Domain(
        "clinic",
        (
            TablePlan(
                "doctor",
                (15, 20),
                {
                    "name": Names(names.PEOPLE),
                    "field": Choice(("heart", "skin", "bone", "eye", "brain")),
                    "age": Number(28, 66),
                    "fee": Number(40, 250, 5),
                },
            ),
            TablePlan(
                "patient",
                (25, 40),
                {
                    "name": Names(names.PEOPLE),
                    "doctor_id": Reference("doctor"),
                    "city": Choice(names.CITIES),
                    "age": Number(2, 90, different=False),
                    "visits": Number(1, 40),
                },
            ),
        ),
    ),
    Domain(
        "garage",
        (
            TablePlan(
                "owner",
                (15, 20),
                {"name": Names(names.PEOPLE), "city": Choice(names.CITIES), "age": Number(20, 80), "income": Number(15, 150)},
            ),
            TablePlan(
                "car",
                (25, 40),
                {
                    "model": Names(names.CARS),
                    "owner_id": Reference("owner"),
                    "color": Choice(names.COLORS),
                    "power": Number(50, 400, 5),
                    "year": Number(1998, 2022, different=False),
                },
            ),
        ),
    ),
    Domain(
        "space",
        (
            TablePlan(
                "agency",
                (15, 18),
                {
                    "name": Names(names.AGENCIES),
                    "country": Choice(names.COUNTRIES),
                    "founded": Number(1950, 2015),
                    "budget": Number(5, 300, 5),
                },
            ),
            TablePlan(
                "mission",
                (25, 40),
                {
                    "name": Names(names.MISSIONS),
                    "agency_id": Reference("agency"),
                    "target": Choice(("Moon", "Mars", "Venus", "Sun", "Jupiter")),
                    "crew": Number(0, 7, different=False),
                    "cost": Number(10, 900, 10),
                },
            ),
        ),
    ),
)
