"""The published measurements predicted, with the error bar that the calibration rows give."""

import csv
import dataclasses
import functools
import json
import math
import pathlib
import typing

from moe_ep.config import ConfigError, require
from moe_ep.cost.kernels import load_table
from moe_ep.cost.units import Number
from moe_ep.simulate import calibration
from moe_ep.simulate.points import POINTS, Point, find
from moe_ep.simulate.published import Parameters
from moe_ep.simulate.scenario import own_stack

# Written by `fit_to_file`, so that predicting one point needs no fit; a test holds it equal to a fresh fit.
FITTED = pathlib.Path(__file__).parent / "fitted.json"
COLUMNS = ("id", "predicted", "unit", "error_bar", "split", "measured", "residual", "network", "assumed")


@functools.lru_cache(maxsize=None)
def fitted() -> tuple[Parameters, dict[str, Number]]:
    """Returns the fitted parameters and the error bar of each family of points."""
    document = json.loads(FITTED.read_text())
    return Parameters(**document["parameters"]), document["error_bars"]


def fit_to_file(path: pathlib.Path = FITTED) -> None:
    """Fits the parameters to the calibration rows and writes them with their error bars."""
    document = {
        "parameters": dataclasses.asdict(calibration.fit()),
        "set_by": calibration.SET_BY,
        "error_bars": error_bars(),
        "left_out_residuals": left_out_residuals(),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def left_out_residuals() -> dict[str, Number]:
    """Returns, for each calibration row, its relative error when the parameters are fitted without it.

    The row that alone sets the factor of training is predicted with that of serving: the
    error of carrying the model to a kind of system that it has not seen.
    """
    residuals = {}
    for row, point in calibration.calibration_points().items():
        parameters = calibration.fit(without=(row,))
        if calibration.SET_BY["train_factor"] == (row,):
            parameters = dataclasses.replace(parameters, train_factor=parameters.serve_factor)
        residuals[row] = point.predict(parameters) / point.value - 1
    return residuals


def _left_out_balance_ratio() -> Number:
    """Returns the error of live over perfect balance, in prefill, when nothing says what a balancer leaves."""
    live, perfect = find("sglang-prefill-2k"), find("sglang-prefill-4k-perfect")
    parameters = calibration.fit(without=(live.id,))
    return (live.predict(parameters) / perfect.predict(parameters)) / (live.value / perfect.value) - 1


def error_bars() -> dict[str, Number]:
    """Returns the root mean square of the left-out residuals of each family."""
    residuals = left_out_residuals()
    bars = {}
    for family in sorted({point.family for point in POINTS}):
        errors = [residuals[point.id] for point in POINTS if point.family == family and point.id in residuals]
        errors += [_left_out_balance_ratio()] if family == "ratio" else []
        bars[family] = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return bars


def bar_of_phase(phase: str) -> Number:
    """Returns the error bar of a whole system's throughput in a phase."""
    return fitted()[1]["training" if phase == "train" else "serving"]


def predict_point(point_id: str) -> dict[str, typing.Any]:
    """Returns one point's prediction, in JSON keys.

    Raises:
      ConfigError: no such point.
    """
    point = find(point_id)
    require(point is not None, "simulate.point", point_id, "all or one of " + ", ".join(p.id for p in POINTS))
    return _row(point, None)


def _row(point: Point, measured: Number | None) -> dict[str, typing.Any]:
    parameters, bars = fitted()
    predicted = point.predict(parameters)
    measured = point.value if point.value is not None else measured
    return {
        "id": point.id,
        "predicted": round(predicted, 4),
        "unit": point.unit,
        "error_bar": round(bars[point.family], 4),
        "split": "calibration" if point.value is not None else "held-out",
        "measured": measured,
        "residual": None if measured is None else round(predicted / measured - 1, 4),
        "network": point.network,
        "assumed": point.assumed,
        "source": point.source,
        "family": point.family,
    }


def predict_all(values_path: str = "") -> dict[str, typing.Any]:
    """Returns every point's prediction, the free parameters, and mean errors where values are known.

    Args:
      values_path: a CSV with columns id and value; held-out values found there are
        compared with, never fitted to.
    """
    values = _read_values(values_path) if values_path else {}
    rows = [_row(point, values.get(point.id)) for point in POINTS]
    parameters, bars = fitted()
    listed = [
        {"parameter": name, "value": value, "set_by": list(calibration.SET_BY[name])}
        for name, value in dataclasses.asdict(parameters).items()
    ]
    own = own_stack().kernels
    listed.append({"parameter": "launch_s", "value": own.launch_s, "set_by": [f"{own.launch_set_by} (this project's own)"]})
    return {
        "rows": rows,
        "free_parameters": listed,
        "error_bars": bars,
        "left_out_residuals": json.loads(FITTED.read_text())["left_out_residuals"],
        "mean_absolute_error": _mean_errors(rows),
    }


def _read_values(path: str) -> dict[str, Number]:
    try:
        with open(path, newline="") as file:
            return {row["id"]: float(row["value"]) for row in csv.DictReader(file) if row["value"]}
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--set simulate.published_values={path}: allowed is a CSV with columns id and value ({error})"
        ) from error


def _mean_errors(rows: list[dict]) -> dict[str, Number]:
    """Mean absolute relative error by split and family, where values are known."""
    groups: dict[str, list[Number]] = {}
    for row in rows:
        if row["residual"] is not None:
            groups.setdefault(f"{row['split']} {row['family']}", []).append(abs(row["residual"]))
    return {name: round(sum(errors) / len(errors), 4) for name, errors in sorted(groups.items())}


def write(result: dict[str, typing.Any], folder: pathlib.Path) -> None:
    """Writes validation.csv and validation.md."""
    with open(folder / "validation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])
    (folder / "validation.md").write_text(markdown(result))


def markdown(result: dict[str, typing.Any]) -> str:
    """Returns the predictions, free parameters and residuals as Markdown."""
    tables = [load_table(name) for name in ("hopper_fp8_deepseek", "h200_bf16")]
    lines = [
        "# Published systems, predicted",
        "",
        "Predicted by `python -m moe_ep.run --mode=simulate --set simulate.point=all`; nothing here was measured by",
        "this project. Held-out rows took part in no fit. The error bar is the root mean square, over the calibration",
        "rows of the family, of the error when a row is left out of the fit (of training's step factor: when that of",
        "serving takes its place).",
        "Kernel tables: " + "; ".join(f"{table.name} ({table.source}, {table.date})" for table in tables) + ".",
        "",
        "| id | predicted | unit | error bar | published | residual | left out | network | assumed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    left_out = result["left_out_residuals"]
    for row in result["rows"]:
        lines.append(
            f"| {row['id']} | {row['predicted']:.5g} | {row['unit']} | ±{row['error_bar']:.0%} | "
            f"{_or_blank(row['measured'], '{:g}')} | {_or_blank(row['residual'], '{:+.1%}')} | "
            f"{_or_blank(left_out.get(row['id']), '{:+.1%}')} | {row['network']} | {row['assumed']} |"
        )
    lines += ["", "## Free parameters", "", "| parameter | value | set by |", "|---|---|---|"]
    for entry in result["free_parameters"]:
        lines.append(f"| {entry['parameter']} | {entry['value']:.4g} | {', '.join(entry['set_by'])} |")
    lines += ["", "## Mean absolute error where values are known", ""]
    lines += [f"- {name}: {error:.1%}" for name, error in result["mean_absolute_error"].items()]
    return "\n".join(lines) + "\n"


def _or_blank(value: Number | None, form: str) -> str:
    return "" if value is None else form.format(value)
