"""The points of a search space: Halton draws from ranges, or a list of points, as AlgoPerf's reader takes them.

The draws differ from the official reader's, whose order is random; here point i depends on the space and on i
alone, so that one may train the first 20 points today and the next 20 tomorrow.
"""

from __future__ import annotations

import itertools
import json
import keyword
import math
import unicodedata
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from algoperf_kfac.config import Point
from commands.errors import UserError
from submissions.common.api import Hyperparameters

_FORMS = 'a range {"min": a, "max": b, "scaling": "linear" or "log"} or {"feasible_points": [...]}'
Entry: TypeAlias = Mapping[str, Any]  # of a space, for one hyperparameter, as JSON has it

_GOLDEN = (math.sqrt(5) - 1) / 2


def read_points(path: str, count: int) -> list[Point]:
    """The first `count` points of the search space in a JSON file, as namedtuples `Hyperparameters`.

    A list of points gives as many as it has, at most `count`.

    Raises:
        UserError: as `read_space`.
    """
    space = read_space(path)
    points = space[:count] if isinstance(space, list) else draw(space, count)
    made: list[Any] = [namedtuple("Hyperparameters", point)(**point) for point in points]
    return made


def read_space(path: str) -> dict[str, Entry] | list[dict[str, object]]:
    """The search space in a JSON file: the range or feasible points of each hyperparameter, or a list of points.

    Raises:
        UserError: the file is missing or malformed; the message names the key and the allowed forms.
    """
    try:
        # As some editors begin UTF-8, with a byte order mark.
        text = Path(path).read_bytes().decode("utf-8-sig")
        space = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refused, parse_float=_finite)
    except FileNotFoundError:
        raise UserError(
            f"The search space {path} does not exist; give a JSON file as --tuning_search_space."
        ) from None
    except OSError as error:
        raise UserError(f"The search space {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The search space {path} is not UTF-8 text; save it in that encoding.") from None
    except _SpaceError as error:
        raise UserError(f"The search space {path}: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"The search space {path} is not valid JSON: {error}.") from None
    if isinstance(space, list):
        return _check_list(space, path)
    if isinstance(space, dict):
        return _check_ranges(space, path)
    raise UserError(f"The search space {path} must be a JSON object of ranges or a list of points.")


class _SpaceError(Exception):
    """What JSON readers accept and nobody means."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, of which a reader would otherwise take the last where a key is repeated."""
    content = dict(pairs)
    for name in content:
        if sum(key == name for key, _ in pairs) > 1:
            raise _SpaceError(f"the key '{name}' stands several times in one object; leave one of them")
    return content


def _refused(constant: str) -> float:
    raise _SpaceError(f"the number {constant} is not finite, and no hyperparameter can have it")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refused(number)


def draw(space: Mapping[str, Entry], count: int) -> list[dict[str, object]]:
    """The first `count` points of a checked space.

    Each hyperparameter with more than one value is a dimension of a Halton sequence, in the order of the space;
    the digits are multiplied by a constant (a linear scrambling), because plain Halton sequences are correlated
    between higher dimensions. Ranges map the unit interval linearly or by logarithm, feasible points cut it into
    equal pieces.
    """
    free = [name for name, entry in space.items() if not _is_constant(entry)]
    bases = dict(zip(free, itertools.islice(_primes(), len(free)), strict=True))
    return [
        {
            name: _value(entry, _radical_inverse(index, bases[name]) if name in bases else 0.0)
            for name, entry in space.items()
        }
        for index in range(1, count + 1)  # index 0 would be the corner where everything is smallest
    ]


def _value(entry: Entry, position: float) -> object:
    if "feasible_points" in entry:
        return entry["feasible_points"][int(position * len(entry["feasible_points"]))]
    low, high = entry["min"], entry["max"]
    if entry["scaling"] == "log":
        return low * math.exp(position * math.log(high / low))
    return low + position * (high - low)


def _is_constant(entry: Entry) -> bool:
    return len(entry.get("feasible_points", (0, 0))) == 1 or ("min" in entry and entry["min"] == entry["max"])


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` in `base`, scrambled and mirrored behind the point: a number in [0, 1)."""
    # A multiplier near the golden section, prime to the (prime) base; 1 for bases 2 and 3.
    multiplier = max(1, round(_GOLDEN * base)) if base > 3 else 1
    result, scale = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        result += (digit * multiplier % base) * scale
        scale /= base
    return result


def _primes() -> Iterator[int]:
    found: list[int] = []
    for number in itertools.count(2):
        if all(number % prime for prime in found):
            found.append(number)
            yield number


def _check_ranges(space: dict[str, Entry], path: str) -> dict[str, Entry]:
    if not space:
        raise UserError(f"The search space {path} is empty; give each hyperparameter {_FORMS}.")
    for name, entry in space.items():
        _check_name(name, path)
        problem = _problem(entry)
        if problem:
            raise UserError(f"The search space {path}: '{name}' {problem}; the allowed forms are {_FORMS}.")
    return space


def _problem(entry: object) -> str | None:
    """What is wrong with one entry of a space, or None."""
    if not isinstance(entry, dict):
        return (
            f'is no object; a fixed value is {{"feasible_points": [{json.dumps(entry)}]}}, fixed points are a list'
        )
    if "feasible_points" in entry:
        if set(entry) != {"feasible_points"}:
            return "has other keys beside feasible_points"
        if not isinstance(entry["feasible_points"], list) or not entry["feasible_points"]:
            return "has feasible_points that are no list of at least one value"
        return next(filter(None, map(_problem_of_value, entry["feasible_points"])), None)
    if set(entry) != {"min", "max", "scaling"}:
        return f"has the keys {sorted(entry)}"
    low, high, scaling = entry["min"], entry["max"], entry["scaling"]
    if scaling not in ("linear", "log"):
        return f"has scaling {scaling!r}"
    if not (_is_number(low) and _is_number(high)):
        return "has a min or max that is no finite number"
    if low > high:
        return f"has min {low} above max {high}"
    if scaling == "log" and low <= 0:
        return f"has scaling 'log' but min {low}, which must be > 0"
    return None


def _problem_of_value(value: object) -> str | None:
    """What is wrong with a single value of a hyperparameter, or None."""
    if isinstance(value, (dict, list)):
        return f"must be a single value, got {value!r}"
    if isinstance(value, str) and _reads_as_number(value):
        return f"has the number {value} in quotes; write it without"
    return None


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_list(points: list[dict[str, object]], path: str) -> list[dict[str, object]]:
    if not points or not all(isinstance(point, dict) and point for point in points):
        raise UserError(
            f"The search space {path}: a list must hold at least one point {{name: value, ...}}, no others."
        )
    for index, point in enumerate(points):
        for name in point:
            _check_name(name, path)
        if set(point) != set(points[0]):
            name = sorted(set(point) ^ set(points[0]))[0]
            raise UserError(
                f"The search space {path}: '{name}' is not in every point (see point {index}); "
                "all need the same names."
            )
        for name, value in point.items():
            problem = _problem_of_value(value)
            if problem:
                raise UserError(f"The search space {path}: '{name}' in point {index} {problem}.")
    return points


def _check_name(name: str, path: str) -> None:
    # Python takes some letters in identifiers for others, such as the micro sign for mu.
    usual = unicodedata.normalize("NFKC", name) == name
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_") or not usual:
        raise UserError(f"The search space {path}: '{name}' cannot be the name of a hyperparameter.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def select(points: Sequence[Point], start: int | None, end: int | None) -> list[tuple[int, Hyperparameters]]:
    """The points [start, end) with their indices.

    Raises:
        UserError: none is left.
    """
    chosen: list[tuple[int, Hyperparameters]] = list(enumerate(points))
    chosen = chosen[start:end]
    if not chosen:
        raise UserError(
            f"No point lies between --hparam_start_index={start} and --hparam_end_index={end}: "
            f"there are {len(points)} (see --num_tuning_trials)."
        )
    return chosen
