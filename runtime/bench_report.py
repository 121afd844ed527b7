"""Tables and plots of benchmark documents: Markdown by the standard library, SVG by matplotlib (extra [bench]).

    <what>-<device>.json    the document, raw; <what>-<device>.partial.json while it is measured
    <what>-<device>.md      tables, with device, driver, clocks, power, versions, and what was absent
    <what>-<device>-<op>.svg            latency against M, a panel a shape
    <what>-<device>-<op>-roofline.svg   share of the roofline against M, a line a shape
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import ProblemError

__all__ = ["CHOSEN", "GATHERED", "ORDERED", "OURS", "READ", "SCHEMA", "WHOLE", "WITH_PREPARE", "keep", "markdown", "plots", "read", "slug", "write"]

SCHEMA: Final = 1
LEAST_LABEL: Final = "roofline"
_PANEL: Final = (4.2, 3.2)  # inches
_COLUMNS: Final = 3
#: Columns: the form that lists active experts, the same behind ``prepare``, the forms that gather tokens by expert; which of them the layer op takes,
#: of one op and of the whole layer; the floor.
OURS: Final = "densemoe"
WITH_PREPARE: Final = "densemoe with prepare"
GATHERED: Final = "gathered"
CHOSEN: Final = "densemoe chosen form"
WHOLE: Final = "densemoe whole layer"
ORDERED: Final = "deterministic"  # behind a comma: FC2 in one order
READ: Final = "read-only"
_FIRST: Final = (OURS, CHOSEN, WHOLE, f"{WHOLE}, {ORDERED}", WITH_PREPARE)


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
    """Every column: ours, gathered forms by tile, the floor, others; those that nothing filled too. The same from a run and from its file. Columns of
    other artifact sets stand behind ours of the same kind."""
    named = [name for row in document["rows"] for part in ("us", "missing") for name in row.get(part, {})]

    def place(name: str) -> tuple[int, list[int], str, str]:
        of, _, kind = name.rpartition(": ")
        if of not in document.get("beside", {}):
            of, kind = "", name
        if kind in _FIRST:
            return _FIRST.index(kind), [], of, ""
        others = len(_FIRST)
        if kind.startswith(GATHERED):
            return others, [int(number) for number in re.findall(r"\d+", kind)], kind, of
        return (others + 1, [], "", "") if name == READ else (others + 2, [], name, "")

    return sorted({OURS, *named, *document.get("absent", {})}, key=place)


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
    lines += [f"Columns that begin with {name}: set {digest[:16]}." for name, digest in document.get("beside", {}).items()]
    lines += [f"Absent: {name}: {reason}." for name, reason in document.get("absent", {}).items()]
    lines += [f"{name}: the fastest of {text} configurations of each op." for name, text in _searched(document).items()]
    return lines


def _searched(document: Mapping[str, Any]) -> dict[str, str]:
    """By competitor what was tried: all configurations, or, where a search was ended, how few of how many at least."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in document["rows"]:
        for name, ops in row.get("searched", {}).items():
            found.setdefault(name, []).extend((tried, of) for tried, of in ops.values())
    texts = {}
    for name, pairs in found.items():
        least, most = min(of for _, of in pairs), max(of for _, of in pairs)
        texts[name] = f"all {least if least == most else f'{least} to {most}'}"
        ended = [(tried, of) for tried, of in pairs if tried < of]
        if ended:
            tried, of = min(ended, key=lambda pair: pair[0] / pair[1])
            texts[name] = f"those tried within the time given, {tried} of {of} where fewest,"
    return texts


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def markdown(document: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [f"# densemoe bench {document['what']}", "", *(f"{line}  " for line in _header(document)), ""]
    if document["what"] in ("launch", "startup"):
        rows = document["rows"]
        lines += ["| what | value | bar |", "| --- | --: | --- |"]
        for row in rows:
            value = row["value"] if "value" in row else "" if row["us"] is None else f"{_cell(row['us'])} us"
            lines.append(f"| {row['what']} | {value} | {row.get('bar', '')} |")
        return "\n".join(lines) + "\n"
    names = columns(document)
    for (op, a_dtype, c_dtype, active), rows in _by(document["rows"], _part).items():
        form = "active experts" if active else "dense over all experts"
        lines += [f"## {op}, {a_dtype} to {c_dtype}, {form}: microseconds, weights cold", ""]
        judged = [name for name in (OURS, CHOSEN, WHOLE) if any(name in row["us"] for row in rows)] or [OURS]
        ratios = [f"T_{bound} / T{'' if name == OURS else f' {name}'}" for name in judged for bound in ("read", "roofline")]
        lines += [f"| shape | M | {' | '.join([*names, *ratios])} |", f"| --- | --: |{' --: |' * (len(names) + len(ratios))}"]
        for row in rows:
            cells = [_cell(row["us"].get(name)) for name in names]
            shares = [each for name in judged for each in (row.get("share_of_read", {}).get(name), _roof(row, name))]
            cells += ["" if each is None else f"{each:.3f}" for each in shares]
            lines.append(f"| {row['shape']['name']} | {row['m']} | {' | '.join(cells)} |")
        lines.append("")
        reasons = {name: reason for row in rows for name, reason in row.get("missing", {}).items()}
        lines += [f"Empty at some points: {name}: {reason}  " for name, reason in reasons.items() if name not in document.get("absent", {})]
        wrong = [row for row in rows if row.get("passed") is False]
        lines += [f"FAILED {row['shape']['name']} M = {row['m']}: {row.get('detail', '')}  " for row in wrong]
        lines.append(f"{len(rows) - len(wrong)} of {len(rows)} points agree with the float64 reference in the same run.\n")
    return "\n".join(lines)


def _roof(row: Mapping[str, Any], name: str) -> float | None:
    """T_roofline / T of a column."""
    own, roofline = row["us"].get(name), row.get("roofline_us")
    return roofline / own if own and roofline else None


def _chosen(row: Mapping[str, Any]) -> str:
    """The column of what the layer op runs."""
    return next((name for name in (WHOLE, CHOSEN) if name in row["us"]), OURS)


def _part(row: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    """What a table or a plot is of: op, dtypes, and whether it has a list of active experts."""
    return row["op"], row["a_dtype"], row["c_dtype"], bool(row.get("active"))


def _names(parts: Collection[tuple[str, str, str, bool]]) -> dict[tuple[str, str, str, bool], str]:
    """A short name of each part: its op, and whatever tells it from others of that op."""
    found = {}
    for part in parts:
        others = [each for each in parts if each[0] == part[0]]
        words = [part[0], *(str(part[at]) for at in (1, 2) if len({each[at] for each in others}) > 1)]
        if len({each[3] for each in others}) > 1:
            words.append("active" if part[3] else "dense")
        found[part] = "-".join(words)
    return found


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
    parts = _by(document["rows"], _part)
    names = _names(parts)
    for part, rows in parts.items():
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
        written.append(_save(figure, folder / f"{slug(document)}-{names[part]}.svg", pyplot))
        figure, panel = pyplot.subplots(figsize=(_PANEL[0] * 1.6, _PANEL[1] * 1.4))
        for name, own in shapes.items():
            points = [(row["m"], share) for row in own if (share := _roof(row, _chosen(row))) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", label=name)
        panel.set(title=f"{names[part]}: share of the roofline", xscale="log", xlabel="M (tokens)", ylabel="T_roofline / T", ylim=(0, 1.05))
        panel.grid(True, which="both", alpha=0.25)
        if panel.lines:
            panel.legend(fontsize="x-small")
        written.append(_save(figure, folder / f"{slug(document)}-{names[part]}-roofline.svg", pyplot))
    return written


def _save(figure: Any, path: Path, pyplot: Any) -> Path:
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return path


def keep(document: Mapping[str, Any], folder: str | Path) -> Path:
    """What a run has measured so far, beside what an earlier one wrote: for ``--from`` where the run is killed. ``write`` removes it."""
    return _write_raw(document, _kept(document, Path(folder)))


def _kept(document: Mapping[str, Any], folder: Path) -> Path:
    return folder / f"{slug(document)}.partial.json"


def _write_raw(document: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return path


def write(document: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Raw JSON, Markdown and, with matplotlib, plots; the files written."""
    into = Path(folder)
    name = slug(document)
    paths = [_write_raw(document, into / f"{name}.json"), into / f"{name}.md"]
    write_atomically(paths[1], markdown(document).encode())
    _kept(document, into).unlink(missing_ok=True)
    return [*paths, *plots(document, into)]
