"""Draw benchmarks/plots/*.png from the samples that figures.py left in benchmarks/results/loads.json.

    python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from client import percentile
from servers import RESULTS
from texts import LANGUAGES

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

PLOTS = Path(__file__).resolve().parent / "plots"
COLOURS = {"zh": "#b3402a", "en": "#27608b", "mixed": "#6b8e23"}
SIZE = (7.2, 3.0)  # inches, at 100 dots
Result = dict[str, Any]  # bench.Result as JSON


def figure_of(result: Result, name: str, share: float = 50) -> float:
    """Return a percentile of a figure over a result's samples."""
    return percentile([sample[name] for sample in result["run"]["samples"]], share)


def speed(result: Result) -> float:
    """Return audio seconds per second."""
    return sum(sample["audio_s"] for sample in result["run"]["samples"]) / result["run"]["wall_s"]


def series(results: list[Result], along: str, **fixed: object) -> list[Result]:
    """Return the results whose case has these values, over a growing `along`; one for each of its values."""
    chosen = {}
    for result in results:
        case = result["case"]
        if case["clients"] and all(case[name] == value for name, value in fixed.items()):
            chosen.setdefault(case[along], result)
    return [chosen[value] for value in sorted(chosen)]


def draw_load(results: list[Result]) -> Figure:
    """Draw throughput and latency against concurrency."""
    loads = series(results, "clients", language="en", characters=100, response_format="pcm")
    clients = [result["case"]["clients"] for result in loads]
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE)
    left.plot(clients, list(map(speed, loads)), "o-", color=COLOURS["en"])
    left.set_ylabel("audio seconds per second")
    for name, label, colour in [("first_audio_s", "first 200 ms", "en"), ("total_s", "whole answer", "zh")]:
        right.plot(clients, [figure_of(each, name) for each in loads], "o-", color=COLOURS[colour], label=label)
        right.plot(clients, [figure_of(each, name, 95) for each in loads], ":", color=COLOURS[colour])
    right.set_ylabel("seconds (dotted: 95 %)")
    right.legend(frameon=False)
    for axes in (left, right):
        finish(axes, "clients at once", clients)
    return figure


def draw_first_audio(results: list[Result]) -> Figure:
    """Draw the first 200 ms of audio, and the throughput of one client, against the length of the text."""
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE)
    for language in LANGUAGES:
        alone = series(results, "characters", language=language, clients=1, response_format="pcm")
        lengths, look = [each["case"]["characters"] for each in alone], {"color": COLOURS[language], "label": language}
        left.plot(lengths, [figure_of(each, "first_audio_s") for each in alone], "o-", **look)
        right.plot(lengths, list(map(speed, alone)), "o-", **look)
    left.set_ylabel("first 200 ms, seconds")
    right.set_ylabel("audio seconds per second")
    left.legend(frameon=False)
    for axes in (left, right):
        finish(axes, "characters", lengths)
    return figure


def finish(axes: Any, label: str, ticks: list[int]) -> None:
    """Give a panel its logarithmic x axis from these ticks, and a y axis that begins at nothing."""
    axes.set_xscale("log", base=2 if max(ticks) < 100 else 10)
    axes.set_xticks(ticks, minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def keep(figure: Figure, name: str, caption: str) -> None:
    """Write plots/NAME.png, the same bytes for the same figures."""
    PLOTS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.text(0.99, 0.02, caption, ha="right", fontsize=6.5, color="#666666")
    figure.savefig(PLOTS / f"{name}.png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(PLOTS / f"{name}.png")


def main() -> None:
    """Draw both."""
    bench = json.loads((RESULTS / "loads.json").read_text())
    cores, load_average = bench["machine"]["cores"], bench["machine"]["load_average"]
    caption = f"{cores} cores; load average before: {load_average:.1f}"
    keep(draw_load(bench["results"]), "load", caption)
    keep(draw_first_audio(bench["results"]), "first_audio", caption)


if __name__ == "__main__":
    main()
