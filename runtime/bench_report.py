"""Tables and plots of benchmark documents: Markdown by the standard library, SVG by matplotlib (extra [bench]).

    <what>-<device>.json    the document, raw
    <what>-<device>.md      tables, with device, driver, clocks, power, versions, and what was absent
    <what>-<device>-<op>.svg            latency against M, a panel a shape
    <what>-<device>-<op>-roofline.svg   share of the roofline against M, a line a shape
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import ProblemError

__all__ = ["SCHEMA", "markdown", "plots", "read", "slug", "write"]

SCHEMA: Final = 1
LEAST_LABEL: Final = "roofline"
_PANEL: Final = (4.2, 3.2)  # inches
_COLUMNS: Final = 3
OURS: Final = "densemoe"


def read(path: str | Path) -> dict[str, Any]:
    """A document from its file.

    Raises:
        ProblemError: it is none.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ProblemError(f"{path} is no benchmark document: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or not isinstance(document.get("rows"), list):
        raise ProblemError(f"{path} is no benchmark document: schema {SCHEMA} with rows is expected")
    return document


def slug(document: Mapping[str, Any]) -> str:
    """File name of a document without its ending."""
    device = re.sub(r"[^a-z0-9]+", "-", str(document["provenance"]["device"]).lower()).strip("-")
    return f"{document['what']}-{device}"


def columns(document: Mapping[str, Any]) -> list[str]:
    """Every column, ours first; those that nothing filled too."""
    found = list(dict.fromkeys([OURS, *(name for row in document["rows"] for name in row.get("us", {})), *document.get("absent", {})]))
    return [*dict.fromkeys([*found, *(name for row in document["rows"] for name in row.get("missing", {}))])]


def _header(document: Mapping[str, Any]) -> list[str]:
    provenance = document["provenance"]
    sensors = provenance.get("sensors") or {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(provenance.get("versions", {}).items()))
    clocks = [each["sensors"].get("sm_mhz") for each in document["rows"] if each.get("sensors", {}).get("sm_mhz")]
    power = [each["sensors"].get("power_w") for each in document["rows"] if each.get("sensors", {}).get("power_w")]
    lines = [
        f"{provenance['device']}, {provenance.get('sm_count', '?')} SMs, CUDA driver {provenance.get('cuda_driver')}"
        f" (NVIDIA {sensors.get('nvidia_driver') or 'unknown'}), {provenance['date']}.",
        f"Set {provenance.get('arch')} {str(provenance.get('set_sha256', ''))[:16]}, {provenance.get('variants')} variants; {versions}.",
    ]
    rate = provenance.get("read_bytes_per_second")
    if rate:
        lines.append(f"Reads {rate / 1e12:.2f} TB/s ({provenance.get('read_by')}).")
    if clocks:
        lines.append(f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz" + (f", power {min(power):.0f} to {max(power):.0f} W." if power else "."))
    else:
        lines.append("Clocks and power could not be read.")
    lines += [f"Absent: {name}: {reason}." for name, reason in document.get("absent", {}).items()]
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def markdown(document: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [f"# densemoe bench {document['what']}", "", *(f"{line}  " for line in _header(document)), ""]
    if document["what"] in ("launch", "startup"):
        rows = document["rows"]
        lines += ["| what | value | bar |", "| --- | --: | --- |"]
        lines += [f"| {row['what']} | {row['value'] if 'value' in row else _cell(row['us']) + ' us'} | {row.get('bar', '')} |" for row in rows]
        return "\n".join(lines) + "\n"
    names = columns(document)
    for op, rows in _by(document["rows"], lambda row: row["op"]).items():
        form = "active experts" if rows[0].get("active") else "dense over all experts"
        lines += [f"## {op}, {rows[0]['a_dtype']} to {rows[0]['c_dtype']}, {form}: microseconds, weights cold", ""]
        lines += [f"| shape | M | {' | '.join(names)} | T_read / T | T_roofline / T |", f"| --- | --: |{' --: |' * (len(names) + 2)}"]
        for row in rows:
            own = row["us"].get(OURS)
            share = row.get("share_of_read", {}).get(OURS)
            roof = row["roofline_us"] / own if own and row.get("roofline_us") else None
            cells = [_cell(row["us"].get(name)) for name in names]
            ratios = ["" if each is None else f"{each:.3f}" for each in (share, roof)]
            lines.append(f"| {row['shape']['name']} | {row['m']} | {' | '.join([*cells, *ratios])} |")
        lines.append("")
        reasons = {name: reason for row in rows for name, reason in row.get("missing", {}).items()}
        lines += [f"Empty at some points: {name}: {reason}  " for name, reason in reasons.items() if name not in document.get("absent", {})]
        wrong = [row for row in rows if row.get("passed") is False]
        lines += [f"FAILED {row['shape']['name']} M = {row['m']}: {row.get('detail', '')}  " for row in wrong]
        lines.append(f"{len(rows) - len(wrong)} of {len(rows)} points agree with the float64 reference in the same run.\n")
    return "\n".join(lines)


def _by(rows: Sequence[Mapping[str, Any]], key: Any) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """SVG files of the document; none where matplotlib is not installed or there is nothing to draw."""
    if document["what"] not in ("ops", "layer") or importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "densemoe"  # the same bytes from the same document
    from matplotlib import pyplot

    written = []
    for op, rows in _by(document["rows"], lambda row: row["op"]).items():
        shapes = _by(rows, lambda row: row["shape"]["name"])
        wide = min(_COLUMNS, len(shapes))
        high = -(-len(shapes) // wide)
        figure, axes = pyplot.subplots(high, wide, figsize=(_PANEL[0] * wide, _PANEL[1] * high), squeeze=False, sharex=True)
        for panel, (name, own) in zip(axes.flat, shapes.items(), strict=False):
            for column in columns(document):
                points = [(row["m"], row["us"][column]) for row in own if column in row["us"]]
                if points:
                    panel.plot(*zip(*points, strict=True), marker=".", label=column)
            floor = [(row["m"], row["roofline_us"]) for row in own if row.get("roofline_us")]
            if floor:
                panel.plot(*zip(*floor, strict=True), linestyle="--", color="black", label=LEAST_LABEL)
            panel.set(title=name, xscale="log", yscale="log", xlabel="M (tokens)", ylabel="µs")
            panel.grid(True, which="both", alpha=0.25)
        axes.flat[0].legend(fontsize="x-small")
        for panel in list(axes.flat)[len(shapes) :]:
            panel.set_visible(False)
        written.append(_save(figure, folder / f"{slug(document)}-{op}.svg", pyplot))
        figure, panel = pyplot.subplots(figsize=(_PANEL[0] * 1.6, _PANEL[1] * 1.4))
        for name, own in shapes.items():
            points = [(row["m"], row["roofline_us"] / row["us"][OURS]) for row in own if row.get("roofline_us") and row["us"].get(OURS)]
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", label=name)
        panel.set(title=f"{op}: share of the roofline", xscale="log", xlabel="M (tokens)", ylabel="T_roofline / T", ylim=(0, 1.05))
        panel.grid(True, which="both", alpha=0.25)
        if panel.lines:
            panel.legend(fontsize="x-small")
        written.append(_save(figure, folder / f"{slug(document)}-{op}-roofline.svg", pyplot))
    return written


def _save(figure: Any, path: Path, pyplot: Any) -> Path:
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return path


def write(document: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Raw JSON, Markdown and, with matplotlib, plots; the files written."""
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    name = slug(document)
    paths = [into / f"{name}.json", into / f"{name}.md"]
    write_atomically(paths[0], (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    write_atomically(paths[1], markdown(document).encode())
    return [*paths, *plots(document, into)]
