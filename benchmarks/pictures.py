"""Draws a report of the kernels: a bar for each case, or time over the number of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.report import PEERS, Report, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn, by its name, and its marker.
_SERIES: dict[str, tuple[Callable[[Result], float | None], str]] = {
    "floor": (lambda result: result.floor, "|"),
    "jax-lora": (lambda result: result.ours, "o"),
    "XLA": (lambda result: result.xla, "s"),
    "tokamax": (lambda result: result.tokamax, "P"),
    "vLLM": (lambda result: result.peers.get(PEERS[0]), "v"),
    "SGLang csgmv": (lambda result: result.peers.get(PEERS[1]), "^"),
    "SGLang v2": (lambda result: result.peers.get(PEERS[2]), "D"),
}


def check_path(path: Path) -> None:
    """Whether `draw` can write there, as a run may take minutes.

    Raises:
      ValueError: matplotlib is not installed, or does not know the file's ending, or there is no
        such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"plot {str(path)!r:.99} must end with one of .{', .'.join(endings)}")
    if not path.parent.is_dir():
        raise ValueError(f"plot {str(path)!r:.99}: there is no folder {str(path.parent)!r:.99}")


def draw(report: Report, path: Path) -> None:
    """Time over tokens for the cases of a sweep, else two pictures of all cases side by side: time
    against the floor, and speed-up over the best peer.

    Raises:
      ValueError: `check_path` does.
    """
    check_path(path)
    from matplotlib.figure import Figure

    is_sweep = report.name == "sweep"
    figure = Figure(layout="constrained")
    (_draw_sweep if is_sweep else _draw_cases)(report, figure)
    figure.suptitle(f"y += (x Aᵀ) Bᵀ in bfloat16 on {report.device}, {report.date}")
    figure.savefig(path, dpi=120)


def _draw_cases(report: Report, figure: "Figure") -> None:
    labels = [result.case.label for result in report.results]
    rows = np.arange(len(labels))
    figure.set_size_inches(13, 1.5 + 0.26 * len(labels))
    left, right = figure.subplots(1, 2, sharey=True)
    for name, (us_of, marker) in _SERIES.items():
        points = [(us, row) for row, r in zip(rows, report.results) if (us := us_of(r)) is not None]
        if points:
            size = 12 if name == "floor" else 5
            left.plot(*zip(*points), marker, label=name, markersize=size)
    left.set(xscale="log", xlabel="microseconds per call", yticks=rows, yticklabels=labels)
    left.set_ylim(len(labels) - 0.4, -0.6)
    left.legend()
    compared = [(row, r.speed_up) for row, r in zip(rows, report.results) if r.speed_up]
    if compared:
        right.barh(*zip(*compared), color=["C2" if ratio >= 1 else "C3" for _, ratio in compared])
    right.axvline(1, color="black", linewidth=1)
    right.set(xlabel="speed-up over the best of vLLM and SGLang")


def _draw_sweep(report: Report, figure: "Figure") -> None:
    ranks = sorted({result.case.r for result in report.results})
    figure.set_size_inches(2 + 7 * len(ranks), 6)
    for axes, rank in zip(np.atleast_1d(figure.subplots(1, len(ranks))), ranks):
        of_rank = [result for result in report.results if result.case.r == rank]
        _draw_over_tokens(axes, sorted(of_rank, key=lambda result: result.case.T))


def _draw_over_tokens(axes: "Axes", results: list[Result]) -> None:
    for n, (name, (us_of, marker)) in enumerate(_SERIES.items()):
        points = [(r.case.T, us) for r in results if (us := us_of(r)) is not None]
        if points:
            style = "k--" if name == "floor" else f"C{n}-{marker}"
            width = 2.5 if name == "jax-lora" else 1
            axes.plot(*zip(*points), style, label=name, linewidth=width, markersize=4)
    ticks = [tokens for n in range(14) if (tokens := 1 << n) <= results[-1].case.T]
    most, rank = max(result.case.D for result in results), results[0].case.r
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="microseconds per call")
    axes.set(xticks=ticks, xticklabels=ticks, title=f"up to {most} adapters of rank {rank}")
    axes.minorticks_off()
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(alpha=0.3)
    axes.legend()
