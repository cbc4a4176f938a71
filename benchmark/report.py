"""Put the results into the pages: README.md, docs/ and docs/studies/, and draw docs/figures.

    python benchmark/report.py            write them
    python benchmark/report.py --check    only name the pages that differ from the results

A page holds `<!-- table: NAME -->`, `<!-- compact: NAME -->` or `<!-- figure: NAME -->`, then
`<!-- end -->`: what stands between them is made from benchmark/results/NAME.json, where run.py
leaves the summary of every run, or from benchmark/studies/. `compact` has six columns, for the
pages of the scripts; compact: NAME+NAME puts one experiment below the other, table: NAME+NAME side
by side. peers_*.json hold rows instead of runs: other libraries on the same demonstrations; a file
with a `table` already has its rows. `generations: NAME+NAME` adds up what is gained one by one.
`solved` in a file is what its experiment asks for; without it, the script's own rule holds.
"""

import argparse
import json
import math
import os
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

ROOT = Path(__file__).resolve().parent.parent
RESULTS, STUDIES = ROOT / "benchmark" / "results", ROOT / "benchmark" / "studies"
FIGURES = ROOT / "docs" / "figures"
# Colours that colour-blind readers tell apart (Okabe and Ito's).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLES = {"expert": "--", "solved": "-.", "random": ":"}
WORDS = {  # what figures call a variant or an experiment
    **{"gail": "-log(1 - D)", "airl": "log D - log(1 - D)", "logd": "log D"},
    **{"ppo": "GAIL by PPO", "reinforce": "GAIL by REINFORCE", "tasks_cloning": "cloning"},
    **{"tasks_scratch": "GAIL alone", "tasks_gail": "GAIL, the default"},
}
PLAIN = {  # a variant in plainer words than a run folder's name can have
    "places by 15": "places / 15",
    "generation 1, hardcore course": "AggreVaTeD, hardcore course",
}
KINDS = "table|compact|generations|figure"
BLOCK = re.compile(rf"(<!-- ({KINDS}): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def interquartile_mean(values):
    """The mean without a quarter of the seeds at either end: (..., seeds) -> (...)."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def middle_and_interval(values, form=".1f"):
    """The interquartile mean with its 95 % interval, from 10,000 resamples of the seeds."""
    rows = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(interquartile_mean(values[rows]), [2.5, 97.5])
    return f"{interquartile_mean(values):{form}} [{low:{form}}, {high:{form}}]"


def median(values, form=",.0f"):
    """The median over all seeds; None, a seed that never got there, counts as infinity."""
    middle = np.median([math.inf if value is None else value for value in values])
    return "never" if math.isinf(middle) else format(middle, form)


def groups(rows, *names):
    """The rows of each combination of these keys, in the file's order."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    return found


def solved_point(run, goal):
    """The point of the curve where a run is solved, or None.

    Of two kinds of scripts: one keeps its last policy, and has to stay at `goal` from there to the
    final evaluation. The other (AggreVaTeD) keeps the policy that validates best: if that one is
    good in the final evaluation, the first good validation counts, or else the best."""
    curve, learner = run["curve"], run["learner"]
    key, _, _ = metric([run])
    if goal is None:
        at = [point for point in curve if point["steps"] == run["solved_at_steps"]]
    elif "paired_differences" in run:
        best = max(curve, key=lambda point: point[key])
        good = [point for point in curve if point[key] >= goal]
        at = [*good, best] if learner[key] >= goal else []
    else:
        points = [*curve, learner]
        failures = [i for i, point in enumerate(points) if not point[key] >= goal]
        at = curve[failures[-1] + 1 if failures else 0 :]
    return at[0] if at else None


def clock(run):
    """What a table counts: steps, as the script's --total-steps, or its roll-ins' (AggreVaTeD)."""
    return "env_steps" if "env_steps" in run else "steps"


def metric(runs):
    """What the runs are measured by: its key in a result, its name, and what to multiply it by."""
    if "success_rate" in runs[0]["learner"]:
        return "success_rate", "success, %", 100.0
    return "return_mean", "return", 1.0


def variant_line(runs, goal):
    """One variant's line of a table: {heading: text}."""
    key, name, unit = metric(runs)
    values = unit * np.array([run["learner"][key] for run in runs])
    at = [solved_point(run, goal) for run in runs]
    steps = [point and point[clock(runs[0])] for point in at]
    seconds = [point and point["wall_seconds"] for point in at]
    line = {
        "variant": runs[0]["variant"],
        f"{name}: IQM [95 %]": middle_and_interval(values),
        "mean ± std": f"{values.mean():.1f} ± {values.std():.1f}",
        "seeds solved": f"{len(runs) - at.count(None)} of {len(runs)}",
        f"{clock(runs[0])} to solved": median(steps),
        "seconds to solved": median(seconds, ".1f"),
        "training, s": median([run["wall_seconds"] for run in runs], ".1f"),
    }
    distances = [run["learner"].get("occupancy_distance") for run in runs]
    floors = [run["expert"].get("occupancy_distance") for run in runs]
    if None not in distances + floors:
        figures = f"{np.mean(distances):.3f}, {np.median(distances):.3f} ({np.mean(floors):.3f})"
        line["occupancy distance: mean, median (expert's own)"] = figures
    if key == "success_rate":
        laps = [run["learner"]["length_mean"] / run["expert"]["length_mean"] for run in runs]
        line["length / expert's"] = median(laps, ".2f")
    if "paired_differences" in runs[0]:
        line["random"] = f"{np.mean([run['random'][key] for run in runs]):.1f}"
        line["expert"] = f"{np.mean([run['expert'][key] for run in runs]):.1f}"
        line["learner - expert [95 %]"] = paired_gain(runs)
    for tag, heading in (("accuracy", "held-out accuracy"), ("losses", "held-out loss")):
        if f"{tag}/held_out" in runs[0]["curve"][-1]:  # the first version logged the accuracy
            found = [run["curve"][-1][f"{tag}/held_out"] for run in runs]
            line[heading] = f"{np.mean(found):.3f}"
    return line


def compact_line(runs, goal, about):
    """One variant's line of a compact table, at most six columns; seconds without evaluation."""
    wide, first = variant_line(runs, goal), runs[0]
    _, name, _ = metric(runs)
    kept = [f"{name}: IQM [95 %]", "seeds solved", "steps to solved"]
    if "paired_differences" in first:
        kept = [f"{name}: IQM [95 %]", "expert", "learner - expert [95 %]", "seeds solved"]
    number = " demonstrations" if first["variant"] != "1" else " demonstration"
    variant = first["variant"] + number * first["variant"].isdigit()
    line = {"what": ", ".join(filter(None, (variant, about)))}
    line |= {heading: wide[heading] for heading in kept}
    distances = [run["learner"].get("occupancy_distance") for run in runs]
    if None not in distances and "paired_differences" not in first:
        line["distance"] = f"{np.median(distances):.3f}"
    return {**line, "training, s": median([run["wall_seconds"] for run in runs])}


def compact(names):
    """One experiment below the other."""
    lines = []
    for name in names:
        for runs in groups(load(name)["runs"], "variant").values():
            line = compact_line(runs, load(name)["solved"], load(name).get("row"))
            line["what"] += first_version(name, names)
            lines.append(line)
    return lines


def paired_gain(runs):
    """The learner's return less the expert's on the same starts, with its 95 % interval."""
    gains = np.array([run["paired_differences"] for run in runs])  # (seeds, episodes)
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(gains), size=(10_000, len(gains), 1))
    episodes = rng.integers(gains.shape[1], size=(10_000, *gains.shape))
    low, high = np.percentile(gains[seeds, episodes].mean((1, 2)), [2.5, 97.5])
    return f"{gains.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def generations(names):
    """A line for each; a learner is the next one's expert, on the same starts: so gains add up."""
    lines, total = [], 0
    for name in names:
        runs = sorted(load(name)["runs"], key=lambda run: run["seed"])
        total = total + np.array([run["paired_differences"] for run in runs])
        line = {"variant": runs[0]["variant"], "learner - its expert [95 %]": paired_gain(runs)}
        first = [{"paired_differences": gains} for gains in total]
        line["learner - first expert [95 %]"] = paired_gain(first)
        line["seed by seed"] = ", ".join(f"{gains.mean():+.1f}" for gains in total)
        lines.append(line)
    return lines


def peer_line(rows):
    """One line of the peers' table: medians over the seeds but for the return."""

    def column(name):
        return [row.get(name) for row in rows]

    returns = np.array(column("return_mean"))
    line = {name: rows[0].get(name, "") for name in ("library", "algorithm", "variant")}
    line["return"] = f"{returns.mean():.1f} ± {returns.std():.1f}"
    if any(column("share")):
        line["share of the way, %"] = f"{100 * np.mean(column('share')):.0f}"
    line["training, s"] = median(column("seconds"), ".1f")
    if any(column("steps")):
        line["steps"] = median(column("steps"))
        solved = len(rows) - column("solved_at_seconds").count(None)
        line["seeds solved"] = f"{solved} of {len(rows)}"
        line["steps to solved"] = median(column("solved_at_steps"))
        line["seconds to solved"] = median(column("solved_at_seconds"), ".1f")
    return line


def markdown(lines):
    """A table of lines, each {heading: text}; a heading may be missing in some."""
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    cells = [headings, ["---"] * len(headings)]
    cells += [[line.get(heading, "") for heading in headings] for line in lines]
    return "".join(f"| {' | '.join(PLAIN.get(cell, cell) for cell in row)} |\n" for row in cells)


def path_of(name):
    study = STUDIES / f"{name}.json"
    return study if study.exists() else RESULTS / f"{name}.json"


@cache
def load(name):
    return json.loads(path_of(name).read_text())


def first_version(name, names):
    """What is said of one experiment of a table, where only some are the first version's."""
    old = [one for one in names if "commit" in load(one)]
    return " (first version)" * (name in old and old != names)


def made_by(names, page):
    """The line below a table. What was measured before the scripts' second version says so."""
    about, run = {name: load(name) for name in names}, "python benchmark/run.py "
    ours = [name for name, result in about.items() if result["command"] == run + name]
    others = [result["command"] for name, result in about.items() if name not in ours]
    commands = "`, `".join([run + " ".join(ours)] * bool(ours) + others)
    machine = f", on {about[names[0]]['machine']}" if "machine" in about[names[0]] else ""
    first = " (first version)" * all("commit" in result for result in about.values())
    links = [f"[{name}.json]({os.path.relpath(path_of(name), page.parent)})" for name in names]
    return f"Made by `{commands}`{machine}{first}; all runs: {', '.join(links)}.\n"


def side_by_side(names):
    """Several experiments with the same variants: a line each, mean ± std."""
    lines = []
    for name in names:
        line = {"experiment": f"`{name}`{first_version(name, names)}"}
        for (variant,), runs in groups(load(name)["runs"], "variant").items():
            key, _, unit = metric(runs)
            values = unit * np.array([run["learner"][key] for run in runs])
            line[variant] = f"{values.mean():.1f} ± {values.std():.1f}"
            if "paired_differences" in runs[0]:
                line[variant] += f" ({paired_gain(runs)})"
        every, goal = load(name)["runs"], load(name)["solved"]
        if "paired_differences" not in every[0]:
            at = [solved_point(run, goal) for run in every]
            line["steps to solved"] = median([point and point["steps"] for point in at])
            line["steps used"] = median([run["steps"] for run in every])
        lines.append(line)
    return lines


def share(run):
    """How much of the way from random to the expert of the file the last policy has gone, in %."""
    learner, random, expert = (run[who]["return_mean"] for who in ("learner", "random", "expert"))
    return 100 * (learner - random) / (expert - random)


def tasks(names):
    """A line for each task and number of demonstrations, a column for each second word of a name,
    with the runs of all such experiments: the interquartile mean of the shares with its interval,
    and the seeds with 95 % and more. For a control, what GAIL has more than it, paired over seeds,
    in place of both."""
    columns = {}
    for name in names:
        column = columns.setdefault(name.split("_")[1], {})
        for run in load(name)["runs"]:
            column.setdefault(run["variant"], []).append(run)
    gail = [run for runs in columns.get("gail", {}).values() for run in runs]
    gail, lines = {(run["variant"], run["seed"]): share(run) for run in gail}, {}
    for heading, variants in columns.items():
        for variant, runs in variants.items():
            task, demos = variant.split(", ", 1)
            shares = np.array([share(run) for run in runs])
            line = {"task": task, "demonstrations": demos, **dict.fromkeys(columns, "")}
            line = lines.setdefault((task, demos), line)
            if heading in ("frozen", "constant"):
                more = np.array([gail[variant, run["seed"]] for run in runs]) - shares
                text = f"{interquartile_mean(shares):.0f}; GAIL {middle_and_interval(more, '+.0f')}"
            else:
                solved = f"{sum(shares >= 95)} of {len(shares)}"
                text = f"{middle_and_interval(shares, '.0f')}, {solved}"
            line[heading] = text
    pairs = "pairs of each"  # the last rows; before, by demonstrations, tasks in the file's order
    ordered = sorted(lines, key=lambda row: (pairs in row[1], int(re.match(r"\d+", row[1])[0])))
    return [lines[row] for row in ordered]


def table(names):
    """The lines of a wide table."""
    if names[0].startswith("tasks_"):
        return tasks(names)
    if len(names) > 1:
        return side_by_side(names)
    result = load(names[0])
    if "rows" in result:
        parts = groups(result["rows"], "library", "algorithm", "variant").values()
        return [peer_line(rows) for rows in parts]
    if "table" in result:  # already in its final form
        return [{key: str(value) for key, value in row.items()} for row in result["table"]]
    parts = groups(result["runs"], "variant").values()
    return [variant_line(runs, result["solved"]) for runs in parts]


def fill(page):
    """The text of a page with its blocks made anew."""

    def block(match):
        opening, kind, name, end = match.groups()
        names = name.split("+")
        if kind == "figure":
            shown = "Left, learning curves; right, where each seed ends"
            if len(names) > 1:
                shown = "Each task: how far each script gets from four demonstrations"
            path = FIGURES / f"{name if len(names) == 1 else 'tasks'}.png"
            return f"{opening}![{shown}]({os.path.relpath(path, page.parent)})\n{end}"
        lines = {"table": table, "compact": compact, "generations": generations}[kind](names)
        return f"{opening}{markdown(lines)}\n{made_by(names, page)}{end}"

    return BLOCK.sub(block, page.read_text())


def words(variant):
    """The name of a variant in a figure, in short lines."""
    first, *rest = PLAIN.get(variant, variant).split(", ")
    first = WORDS.get(first, first.replace("-", " "))
    if first.isdigit():
        first += " demonstration" + "s" * (first != "1")
    return textwrap.fill(", ".join([first, *rest]), 24)


def draw_lines(line, values):
    """line: axes.axhline or axes.axvline. values: {who: where}."""
    for who, value in values.items():
        line(value, color="gray", linestyle=STYLES[who], linewidth=1)


def draw_row(axes, values, y, color):
    """A dot for each seed, a bar at their interquartile mean."""
    axes.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.6)
    middle = interquartile_mean(np.array(values))
    axes.plot(middle, y, "|", color=color, markersize=13, markeredgewidth=3)


def draw_curves(axes, runs, color, width):
    """Every seed thin, their interquartile mean thick. Return all that is drawn."""
    (key, _, unit), x = metric(runs), clock(runs[0])
    curves = [([p[x] for p in r["curve"]], [unit * p[key] for p in r["curve"]]) for r in runs]
    for curve in curves:
        axes.plot(*curve, color=color, linewidth=0.7, alpha=0.6)
    steps = curves[0][0]  # the seeds' evaluations lie within an iteration of each other
    middle = interquartile_mean(np.stack([np.interp(steps, *curve) for curve in curves], -1))
    axes.plot(steps, middle, color=color, linewidth=width)
    return [value for _, values in curves for value in values]


def draw_ends(axes, variants, lines):
    """A row for each variant: its gain where the learner had the expert's starts, its return where
    the variants are numbers of demonstrations, otherwise its distance from the expert."""
    key, name, unit = metric(variants[0])
    sweep = len(variants) > 1 and all(runs[0]["variant"][0].isdigit() for runs in variants)
    ends = [[run["learner"].get("occupancy_distance") for run in runs] for runs in variants]
    if "paired_differences" in variants[0][0]:
        ends = [[np.mean(run["paired_differences"]) for run in runs] for runs in variants]
        axes.set_xlabel("return at the end, less the expert's on the same starts")
        lines = {"expert": 0}
    elif sweep or any(None in row for row in ends):
        ends = [[unit * run["learner"][key] for run in runs] for runs in variants]
        axes.set_xlabel(f"{name} at the end")
    else:
        axes.set_xscale("symlog", linthresh=0.01)  # linear around 0
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("distance from the expert at the end")
        axes.set_xlim(min(0, *map(min, ends)) - 0.001, 2 * max(1, *map(max, ends)))
        lines = {"expert": 0, "random": 1}
    draw_lines(axes.axvline, lines)
    axes.set_yticks(range(0, -len(variants), -1), [words(runs[0]["variant"]) for runs in variants])
    axes.set_ylim(0.5 - len(variants), 0.5)
    for k, (row, label) in enumerate(zip(ends, axes.get_yticklabels())):
        draw_row(axes, row, -k, COLORS[k])
        label.set(color=COLORS[k], fontweight="bold")
    return lines


def draw(name):
    """Left the learning curves, right where each seed ends; a colour for each variant."""
    result = load(name)
    variants = list(groups(result["runs"], "variant").values())
    beside = name.replace("_controls", "_rewards")
    if beside != name and path_of(beside).exists():  # GAIL itself, from as many steps
        gail = [run for run in load(beside)["runs"] if run["variant"] == "gail"]
        variants.insert(0, [run | {"variant": "GAIL itself"} for run in gail])
    key, label, unit = metric(variants[0])
    lines = {"solved": [result["solved"]]}
    lines |= {who: [run[who].get(key) for run in variants[0]] for who in ("expert", "random")}
    lines = {who: unit * np.mean(values) for who, values in lines.items() if None not in values}
    figure = Figure(figsize=(9.5, 2.9 + 0.25 * max(0, len(variants) - 2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [value for who, value in lines.items() if who != "random"]
    for k, runs in enumerate(variants):
        shown += draw_curves(left, runs, COLORS[k], 3.5 - 0.4 * k)  # so that none hides another
    if lines.get("random", math.inf) < 2 * min(shown) - max(shown):  # it would flatten all else
        del lines["random"]
    draw_lines(left.axhline, lines)
    lines |= draw_ends(right, variants, lines)
    left.set_xlabel("updates" if name.startswith(("bc", "gail_offline")) else "environment steps")
    left.set_ylabel(label.replace("success", "laps finished"))
    if left.dataLim.x1 >= 20 * left.dataLim.x0:  # what happens at the beginning would be squeezed
        left.set_xscale("log")
        left.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    left.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    save(figure, name, lines)


def save(figure, name, lines):
    """With a legend below it of what all figures have in common."""
    look = {"one seed": {"linewidth": 0.7, "marker": "o", "markersize": 4}}
    look["interquartile mean of the seeds"] = {"linewidth": 3}
    look |= {who: {"color": "gray", "linestyle": STYLES[who], "linewidth": 1} for who in lines}
    entries = [Line2D([], [], **{"color": "black", **how}, label=who) for who, how in look.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})


def draw_tasks(names, demos="4"):
    """A row for each task and script: how far each seed gets from random to the expert."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes, ticks = figure.subplots(), {}
    draw_lines(axes.axvline, {"expert": 100, "solved": 95})
    for k, (name, color) in enumerate(zip(names, COLORS)):
        for (variant,), runs in groups(load(name)["runs"], "variant").items():
            task, number = variant.split(", ")
            if number == demos:
                y = ticks.setdefault(task, -len(ticks)) - 0.3 * (k - (len(names) - 1) / 2)
                draw_row(axes, np.clip([share(run) for run in runs], -10, 120), y, color)
        axes.plot([], [], linewidth=3, color=color, label=WORDS[name])
    axes.set_yticks(list(ticks.values()), list(ticks))
    xlabel = "share of the way from random to the expert, % (outside: at the edge)"
    axes.set(xlim=(-12, 122), xlabel=xlabel)
    axes.set_title(f"{demos} demonstrations, five seeds, no setting chosen for a task", fontsize=10)
    axes.legend(loc="upper left")
    save(figure, "tasks", ["expert", "solved"])


def main():
    """Return the exit status: with --check, 1 if a page differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    check = parser.parse_args().check
    pages = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    figures = {m[3] for page in pages for m in BLOCK.finditer(page.read_text()) if m[2] == "figure"}
    stale = [page for page in pages if fill(page) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from the results' if check else 'written'}")
        if not check:
            page.write_text(fill(page))
    for name in [] if check else sorted(figures):
        draw_tasks(name.split("+")) if "+" in name else draw(name)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
