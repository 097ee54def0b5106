"""The page of a run: what ``run.json`` holds, for a person who has seen nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.report import parts
from secateur.report.metrics import (
    CHANGE,
    LATENCY,
    Measured,
    measured_in,
    metric_cell,
    metric_cells,
    metric_title,
    run_caption,
    run_title,
    shown,
)
from secateur.report.of_result import SHOWN, searched
from secateur.report.page import Block, Cell, Code, Folded, Page, Pictures, Section, Table, Text, image

FIGURES = "figures"
"""The folder of a run in which figures are shown: .svg and .png."""
PRUNED = ("pruned", "trained", "finished")
TRACED = ("groups", "frozen", "frozen in", "patched", "notes", "skipped", "widths", "removed", "difference", "history",
          "seconds", "flat", "steps")  # fmt: skip


def page_of_run(run: Mapping[str, Any], folder: Path | None = None) -> Page:
    """The page.

    Args:
        run: what ``run.json`` holds, of a finished run.
        folder: of the run, for the figures in it.
    """
    seeds = run["seeds"]
    each = [_seed_sections(found, measured_in(run)) for found in seeds.values()]
    sections = each[0]
    if len(each) > 1:
        titled = [
            Folded(f"Seed {seed}", [b for s in one for b in (Text(f"{s.title}:"), *s.blocks) if s.blocks])
            for seed, one in zip(list(seeds)[1:], each[1:], strict=True)
        ]
        sections = [*sections, Section("The other seeds", titled)]
    return Page(
        title=run_title(run),
        verdict=verdict(run),
        facts=[run["recipe"]["about"] or "A run of secateur", run_caption(run)],
        sections=[
            Section("Before and after", _tables(run)),
            *sections,
            parts.section("Figures", _figures(folder)),
            Section("How, and on what", _how(run)),
        ],
    )


def verdict(run: Mapping[str, Any]) -> str:
    """What came out, in a line."""
    found = run["summary"]
    before, after, of = found["before"], found.get("after"), measured_in(run)
    title = metric_title(of.test)
    if after is None:
        return f"{title[0].upper()}{title[1:]} {metric_cell(of.test, before[of.test], of)}; nothing was pruned."
    seeds = len(run["recipe"]["seeds"])
    change = found["change"][of.test]
    words = (
        f"{100 * after['macs']['mean'] / before['macs']['mean']:.1f} % of the MACs left: {title} "
        f"{of.cell(before[of.test]['mean'])} → {of.cell(after[of.test]['mean'])} "
        f"({of.change(change['mean'], change['sd'])}, {f'{seeds} seeds' if seeds > 1 else 'one seed'}"
        f"{'' if of.higher else '; lower is better'}{_untuned(run, of)})"
    )
    times = {name: before[name]["mean"] / after[name]["mean"] for name in before if name.startswith(LATENCY)}
    if times:
        words += "; times as fast: " + ", ".join(
            f"{ratio:.2f} ({metric_title(name).removeprefix('latency, ')})" for name, ratio in times.items()
        )
    return f"{words}."


def _untuned(run: Mapping[str, Any], of: Measured) -> str:
    """What it was between pruning and fine-tuning."""
    values = [found["pruned"][of.test] for found in run["seeds"].values() if of.test in found.get("pruned", {})]
    tune = run["recipe"].get("finetune")
    if not values or not tune:
        return ""
    return f"; {of.cell(statistics.fmean(values))} before {tune['epochs']} epochs of fine-tuning"


def _tables(run: Mapping[str, Any]) -> list[Block]:
    found, of = run["summary"], measured_in(run)
    head = ["", *(CHANGE if column == "change" else column for column in found)]
    rows: list[list[Cell]] = [[metric_title(name), *metric_cells(name, found, of)] for name in shown(found)]
    note = f"{run_caption(run)}. The test examples are looked at here alone"
    count = run.get("examples", {}).get("test")
    note += f"; there are {count:,}" if count else ""
    if count and of.percent and "after" in found:
        share = found["after"][of.test]["mean"]
        error = 100 * math.sqrt(max(share * (1 - share), 0.0) / count)
        note += f", so that one standard error of an accuracy is {error:.2f} points"
    blocks: list[Block] = [Table(head, rows, f"{note}.")]
    tune = run["recipe"].get("finetune")
    if tune and "after" in found:
        blocks.append(
            Text(f"The network after pruning was trained for {tune['epochs']} epochs more; the one before was not.")
        )
    return [*blocks, Folded("Every seed, and the spread of the timings", [_every_seed(run)])]


def _every_seed(run: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    of = measured_in(run)
    for seed, found in run["seeds"].items():
        in_order = sorted(found, key=lambda column: (column != "before", column == "after"))
        for column, metrics in ((column, found[column]) for column in in_order):
            if not isinstance(metrics, Mapping) or of.test not in metrics:
                continue
            times = [
                f"{took['median_ms']:.3f} (quartiles {took['iqr_ms']:.3f} apart; batch {size}{where})"
                for where, sizes in (
                    ("", metrics.get("latency", {})),
                    *((f", {backend}", of) for backend, of in metrics.get("latency_of", {}).items()),
                )
                for size, took in sizes.items()
            ]
            held_out = metrics.get(of.held_out)
            rows.append([
                seed, column, of.cell(metrics[of.test]), "" if held_out is None else of.cell(held_out),
                f"{metrics['macs']:,}" if "macs" in metrics else "",
                f"{metrics['params']:,}" if "params" in metrics else "", "; ".join(times),
            ])  # fmt: skip
    head = ["seed", "network", metric_title(of.test), "held out", "MACs", "parameters", "latency (ms)"]
    return Table(head, rows, "Held out: examples that nothing was trained on, for what had to be chosen.")


def _seed_sections(found: Mapping[str, Any], of: Measured) -> list[Section]:
    """What one seed has to show."""
    stages = found["stages"]
    pruning = _merged([stages[name] for name in stages if name.split("-")[0] in PRUNED])
    histories = {name: facts["history"] for name, facts in stages.items() if "history" in facts}
    measured = pruning.get("sensitivity", {}).get("rises", {})
    groups = pruning.get("groups", ())
    apart = pruning.get("difference")
    words = f"Masked and cut network differ by {apart:.2g} of the largest output on training examples." if apart else ""
    proof = [Text(words)] if words else []
    seconds = [f"{name} {facts['seconds']:.1f}" for name, facts in stages.items() if "seconds" in facts]
    spent = [Text(f"Seconds: {', '.join(seconds)}.")] if seconds else []
    return [
        parts.section("The network", parts.network(found.get("layers", ()), pruning.get("frozen in", {}))),
        parts.section("What the channels are worth", parts.scores(groups), parts.rises(groups, measured)),
        parts.section("What the search learned", searched(pruning)),
        parts.section("Training", parts.history(histories, of), spent),
        parts.section("What was not done, and why", parts.reasons(pruning, pruning)),
        parts.section(
            "What pruned", parts.chosen(pruning), proof, _effort(pruning), parts.others(pruning, (*SHOWN, *TRACED))
        ),
    ]


def _effort(facts: Mapping[str, Any]) -> Text | None:
    return Text(f"Batches that went through the model: {facts['forwards']:,}.") if "forwards" in facts else None


def _merged(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several stages have noted; where two say different things, the later one."""
    found: dict[str, Any] = {}
    for stage in stages:
        for name, fact in stage.items():
            before = found.get(name)
            found[name] = [*before, *fact] if name in {"notices", "remarks"} and before else fact
    return found


def _how(run: Mapping[str, Any]) -> list[Block]:
    """All that is needed to do it again."""
    import yaml

    recipe = yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True)
    rows = [
        *(["version", f"{name} {version}"] for name, version in run["versions"].items()),
        ["machine", ", ".join(filter(None, (run["platform"], run.get("cpu"))))],
        ["device", f"{run['device']}, {run['threads']} CPU thread{'s' * (run['threads'] > 1)}"],
        ["seeds", ", ".join(map(str, run["recipe"]["seeds"]))],
        ["data", f"{run['recipe']['data']['name']}: {run['data'] or 'nothing is known of them'}"],
    ]
    return [
        *([Code(run["command"])] if run.get("command") else []),
        Table(["", ""], rows),
        Folded("The recipe, defaults included", [Code(recipe)]),
        Folded("Everything that was kept (run.json)", [Code(json.dumps(_short(run), indent=1))]),
    ]


def _short(value: Any) -> Any:
    """The same without the long lists that the page shows as pictures."""
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items() if name not in {"groups", "layers", "table"}}
    return value


def _figures(folder: Path | None) -> list[Block]:
    """The figures that lie in the run's folder."""
    found = []
    kinds = {".svg": "svg+xml", ".png": "png"}
    for path in sorted((folder / FIGURES).glob("*")) if folder is not None else []:
        if path.suffix in kinds:
            found.append((path.stem, image(path.read_bytes(), kinds[path.suffix])))
    return [Pictures(found)] if found else []
