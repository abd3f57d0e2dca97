"""The command `jaxpruner-baselines`: list, run, suite, choose, table, plot, bench, breadth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jaxpruner_baselines import registry, report, runner
from jaxpruner_baselines import suite as suites
from jaxpruner_baselines.baseline import Baseline, NotReady, Run
from jaxpruner_baselines.benchmarks.command import bench
from jaxpruner_baselines.breadth.command import breadth
from jaxpruner_baselines.methods import all_methods, is_dense
from jaxpruner_baselines.results import ResultsError

app = typer.Typer(
    help="Baselines of JaxPruner: small trainings on real data, dense and pruned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

SUITE = "suite"
Name = Annotated[str, typer.Argument(help="Which baseline; see `list`.")]
Shown = Annotated[str, typer.Argument(help="Which baseline; or `suite`, whose presets are its scales.")]
Preset = Annotated[str | None, typer.Option(help="Which size; default: the first of `list`.", show_default=False)]
Folder = Annotated[Path, typer.Option("--results", help="Folder of the CSV, plots and checkpoints.")]

app.command("bench")(bench)
app.command("breadth")(breadth)


@app.command("list")
def list_() -> None:
    """Show baselines, presets and methods."""
    table = Table("baseline", "presets", "metric", "what it is")
    variants = []
    for name in registry.MODULES:
        try:
            baseline = registry.get(name)
            table.add_row(name, ", ".join(baseline.presets), baseline.metric, baseline.summary)
            if baseline.variants:
                variants.append(f"{name} also: {', '.join(baseline.variants)}")
        except ImportError as error:
            table.add_row(name, "", "", f"not installed: {error}")
    console.print(table)
    console.print("methods:", ", ".join(all_methods()), soft_wrap=True)
    for line in variants:
        console.print(line, soft_wrap=True)


@app.command()
def run(
    name: Name,
    preset: Preset = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated; default: all of `list`, with --dry-run two.", show_default=False),
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option(help="Comma-separated, each between 0 and 1; default: the baseline's own.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many (3), or which (0,4,7; one alone: 7,); default: 3.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the CSV, plots and checkpoints; default: runs.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compile a training step, for virtual devices, and tell its costs.")
    ] = False,
    devices: Annotated[int | None, typer.Option(min=1, help="With --dry-run: how many; default: 8.")] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="With --dry-run: share of the peak in its hours; default: 0.4."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="With --dry-run: write it into this file too, between its markers.")
    ] = None,
) -> None:
    """Train, and append a row per run to the results. Run it again to continue where it stopped."""
    baseline, preset = _baseline(name, preset)
    if dry_run:
        given = {"--seeds": seeds, "--results": results}
        if strange := [name for name, value in given.items() if value is not None]:
            _fail(f"{strange[0]}: --dry-run trains nothing; leave it out, or leave --dry-run out.")
        _dry_run(baseline, preset, methods, sparsities, devices or 8, utilisation or 0.4, markdown)
        return
    given = {"--devices": devices, "--utilisation": utilisation, "--markdown": markdown}
    if strange := [name for name, value in given.items() if value is not None]:
        _fail(f"{strange[0]}: goes with --dry-run alone; leave it out, or add --dry-run.")
    methods, seeds, results = methods or "all", seeds or "3", results or Path("runs")
    asked = _methods(baseline, methods)
    plan = baseline.plan(preset, asked, _sparsities(baseline, sparsities), _seeds(seeds))
    _check_pairs(baseline, preset, plan, [] if methods == "all" else asked, sparsities)
    try:
        done, failed = runner.carry_out(baseline, plan, results, console)
    except KeyboardInterrupt:
        console.print("Interrupted. What is finished is kept; the same command continues from here.")
        raise typer.Exit(130) from None
    except NotReady as error:
        _fail(str(error))
    before = len(plan) - done - failed
    console.print(f"{done} runs done, {before} finished before.\n")
    if done or before:
        table(name, preset, results)
        plot(name, preset, results)
    if failed:
        _fail(f"{failed} runs failed, see above; the same command tries them again.", exit_code=1)


def _dry_run(
    baseline: Baseline,
    preset: str,
    methods: str | None,
    sparsities: str | None,
    devices: int,
    utilisation: float,
    markdown: Path | None,
) -> None:
    from jaxpruner_baselines import dry_run

    if baseline.abstract is None:
        able = [name for name in registry.MODULES if getattr(_found(name), "abstract", None)]
        _fail(f"--dry-run: {baseline.name} does not take it. Those that do: {', '.join(able)}.")
    names = _methods(baseline, methods or ",".join(dry_run.DEFAULT_METHODS))
    chosen = _sparsities(baseline, sparsities) if sparsities else [suites.sparsity_of(baseline, preset)]
    plan = baseline.plan(preset, names, chosen, [0])
    runs, found, failures = [], [], []
    with console.status("") as status:
        events = dry_run.compile_all(plan, devices)
        for run in plan:
            status.update(f"{run.title}: builds and compiles its step")
            told = next(events, "not compiled")
            if isinstance(told, str):
                failures.append(f"{run.title}: {told}")
            else:
                runs.append(run)
                found.append(told)
    if found:
        header, rows = dry_run.table_of(runs, found, utilisation)
        console.print(dry_run.terminal(f"{baseline.name}, preset {preset}: one {found[0].unit[:-1]}", header, rows))
        console.print(dry_run.note(utilisation))
        if markdown is not None:
            text = f"{report.markdown_table(header, rows)}\n\n{dry_run.note(utilisation)}"
            _write(markdown, f"dry-run:{baseline.name}-{preset}", text)
    if failures:
        _fail("\n".join(failures), exit_code=1)


@app.command()
def suite(
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(suites.SCALES)}.")] = "embedded",
    tasks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(suites.TASKS)}; default: all.")] = "all",
    methods: Annotated[
        str, typer.Option(help="The paper's columns, or what later papers compare with: paper, later.")
    ] = "paper",
    seeds: Annotated[str, typer.Option(help="How many (3), or which (0,4,7; one alone: 7,).")] = "3",
    sparser: Annotated[
        bool, typer.Option("--sparser", help="Also higher sparsities, where a row has some at this scale.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once; each gets its share of the cores.")] = 1,
    results: Folder = Path("runs"),
) -> None:
    """Make the paper's table: all its rows and methods. Run it again to continue where it stopped."""
    from jaxpruner_baselines import suite_report

    names = _tasks(tasks, scale)
    columns = suites.COLUMNS[_check("group of methods", methods, suites.COLUMNS)]
    if sparser and not any(suites.TASKS[name].scales[scale].sparser for name in names):
        _fail(f"--sparser: none of {', '.join(names)} has higher sparsities at {scale} scale.")
    parts = suites.plan(names, scale, _seeds(seeds), results, jobs, console, columns, sparser)
    if parts:
        console.print(suites.expected(parts, jobs), soft_wrap=True)
    try:
        failures = suites.carry_out(parts, results, jobs, console)
    except KeyboardInterrupt:
        console.print("Interrupted. What is finished is kept; the same command continues from here.")
        raise typer.Exit(130) from None
    if suite_report.summarize(scale, results):
        table(SUITE, scale, results)
        plot(SUITE, scale, results)
        _show_compact(scale, results)
    elif not failures:
        _fail("Nothing can run here, see above.")
    if failures:
        _fail("\n".join([*failures, f"{len(failures)} runs failed; the same command tries them again."]), exit_code=1)


@app.command()
def choose(
    scale: Annotated[str, typer.Option(help=f"One of {', '.join(suites.SCALES)}.")] = "wide",
    tasks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(suites.TASKS)}; default: all.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each candidate.")] = 1,
    results: Folder = Path("runs"),
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table into this file too, between its choices markers.")
    ] = None,
) -> None:
    """Try candidates for numbers of a scale's presets: dense runs, on data held out of the training data."""
    from jaxpruner_baselines import choices

    failed = 0
    for name in _tasks(tasks, scale):
        task = suites.TASKS[name]
        try:
            baseline, runs = choices.candidates(task, scale, seeds)
            failed += runner.carry_out(baseline, runs, results, console)[1]
        except (ImportError, NotReady) as error:
            console.print(f"{name} cannot run here: {error}", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("Interrupted. What is finished is kept; the same command continues from here.")
            raise typer.Exit(130) from None
    _tell_absent(scale)
    rows = choices.table_of(scale, results)
    if not rows:
        _fail(f"Nothing is chosen at {scale} scale, or nothing can run here.")
    shown = Table(*choices.HEADER, title=f"Candidates, {scale} scale")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    if markdown is not None:
        _write(markdown, f"choices:{scale}", report.markdown_table(choices.HEADER, rows))
    if failed:
        _fail(f"{failed} runs failed, see above; the same command tries them again.", exit_code=1)


def _show_compact(scale: str, results: Path) -> None:
    """A line about what is left once pruned units have left: one short run, at the scales that need no accelerator."""
    preset = {"embedded": "short", "smoke": "smoke"}.get(scale)
    if preset is None:
        return
    baseline = registry.get("compact")
    plan = baseline.plan(preset, ["magnitude"], [0.5], [0])
    for _, event in runner.events(baseline, runner.unfinished(baseline, plan, results), results):
        if isinstance(event, runner.Failure):
            console.print(f"compact: {event.message}", markup=False)
            return
    lines, _ = report.summarize(baseline, preset, runner.results_of(baseline, results))
    line = next(line for line in lines if (line.method, line.sparsity) == (plan[0].method, plan[0].sparsity))
    console.print(
        f"Compact: a ViT without half of the units of each group, removed after training, is {line.cost:.2f} times as "
        f"fast as the dense one, measured; accuracy {line.mean:.1%}.",
        soft_wrap=True,
    )


@app.command()
def table(
    name: Shown,
    preset: Preset = None,
    results: Folder = Path("runs"),
    markdown: Annotated[
        Path | None, typer.Option(help="Write it into this file too, between its results markers.")
    ] = None,
) -> None:
    """Print the results: method, sparsity, mean and standard deviation over seeds."""
    if name == SUITE:
        from jaxpruner_baselines import suite_report

        _tell_absent(preset or suites.SCALES[0])
        preset, rows = _suite(preset, results)
        console.print(suite_report.terminal(f"The paper's table, {preset} scale", rows))
        text = suite_report.markdown(rows)
    else:
        baseline, preset = _baseline(name, preset)
        lines = _lines(baseline, preset, results)
        console.print(report.terminal(f"{name}, preset {preset}", baseline, lines))
        text = report.markdown(baseline, lines)
    if markdown is not None:
        # A place for each preset, where the file has one.
        marker = f"results:{name}-{preset}"
        if not (markdown.exists() and f"<!-- {marker} -->" in markdown.read_text()):
            marker = f"results:{name}"
        _write(markdown, marker, text)


def _write(markdown: Path, marker: str, text: str) -> None:
    try:
        report.update_markdown(markdown, marker, text)
    except ValueError as error:
        _fail(str(error))
    console.print(f"written to {markdown}", soft_wrap=True)


@app.command()
def plot(
    name: Shown,
    preset: Preset = None,
    results: Folder = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="The PNG; default: in the results folder.")] = None,
) -> None:
    """Draw the metric against the sparsity, what runs cost, and the time of training, where these are counted."""
    from jaxpruner_baselines import plots, suite_report

    if name == SUITE:
        preset, rows = _suite(preset, results)
        path = output or results / f"{SUITE}-{preset}.png"
        suite_report.draw(path, f"Ours against the paper's, {preset} scale: better is up and right", rows)
        console.print(f"plot: {path}", soft_wrap=True)
        return
    baseline, preset = _baseline(name, preset)
    path = output or results / f"{name}-{preset}.png"
    lines = _lines(baseline, preset, results)
    plots.draw(path, f"{name}, preset {preset}", lines, baseline.metric)
    console.print(f"plot: {path}", soft_wrap=True)
    if baseline.cost:
        cost_path = path.with_stem(f"{path.stem}-{baseline.cost.key}")
        plots.draw_cost(cost_path, f"{name}, preset {preset}", lines, baseline.metric, baseline.cost)
        console.print(f"plot: {cost_path}", soft_wrap=True)
    if baseline.curve:
        curve_path = path.with_stem(f"{path.stem}-{baseline.curve.key}")
        plots.draw_curves(curve_path, f"{name}, preset {preset}", lines, baseline.metric, baseline.curve)
        console.print(f"plot: {curve_path}", soft_wrap=True)


def _lines(baseline: Baseline, preset: str, folder: Path) -> list[report.Line]:
    results = runner.results_of(baseline, folder)
    lines, left_out = report.summarize(baseline, preset, results)
    if not lines:
        _fail(
            f"{results.path} has no results of preset {preset}. "
            f"First: jaxpruner-baselines run {baseline.name} --preset {preset} --results {folder}"
        )
    if left_out:
        console.print(f"{left_out} rows left out: repeated, or of a preset that has changed since.")
    return lines


def _tell_absent(scale: str) -> None:
    """Says which rows a table lacks, since their host cannot be imported."""
    for title, why in suites.absent(scale).items():
        told = str(why).partition("\n")[0]
        console.print(
            f"{title} is left out, since what it needs is not installed: {told}", markup=False, soft_wrap=True
        )


def _suite(scale: str | None, folder: Path) -> tuple[str, list[Any]]:
    from jaxpruner_baselines import suite_report

    scale = _check("scale", scale or suites.SCALES[0], suites.SCALES)
    rows = suite_report.summarize(scale, folder)
    if not rows:
        _fail(
            f"{folder} has no results of the suite at {scale} scale. "
            f"First: jaxpruner-baselines suite --scale {scale} --results {folder}"
        )
    return scale, rows


def _baseline(name: str, preset: str | None) -> tuple[Baseline, str]:
    _check("baseline", name, registry.MODULES)
    try:
        baseline = registry.get(name)
    except ImportError as error:
        _fail(f"{name} needs a package that is not installed ({error}); baselines/docs says which.")
    return baseline, _check(f"preset of {name}", preset or baseline.default_preset, baseline.presets)


def _found(name: str) -> Baseline | None:
    """A baseline, None where what it needs is not installed."""
    try:
        return registry.get(name)
    except ImportError:
        return None


def _methods(baseline: Baseline, text: str) -> list[str]:
    if text == "all":
        return baseline.methods
    return [_check("method", method, baseline.methods) for method in _split(text, "--methods")]


def _sparsities(baseline: Baseline, text: str | None) -> list[float]:
    if text is None:
        return list(baseline.sparsities)
    values = []
    for part in _split(text, "--sparsities"):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 < value < 1:
            _fail(f"--sparsities: {part!r} is not a number between 0 and 1. Example: --sparsities 0.8,0.95")
        values.append(value)
    return list(dict.fromkeys(values))


def _check_pairs(
    baseline: Baseline, preset: str, plan: Sequence[Run], methods: Sequence[str], sparsities: str | None
) -> None:
    """Fails if a method or sparsity that was asked for has no run: some presets have only some pairs of them."""
    left_out = [method for method in methods if method not in {run.method for run in plan}]
    if sparsities is not None and not (methods and all(map(is_dense, methods))):
        chosen = {run.sparsity for run in plan}
        left_out += [f"{each:g}" for each in _sparsities(baseline, sparsities) if each not in chosen]
    if left_out:
        pairs: dict[str, list[str]] = {}
        for run in baseline.plan(preset, baseline.methods, baseline.sparsities, [0]):
            pairs.setdefault(run.method, []).extend([] if is_dense(run.method) else [f"{run.sparsity:g}"])
        valid = "; ".join(f"{method} {', '.join(each)}".strip() for method, each in pairs.items())
        _fail(f"{baseline.name}: nothing to run of {', '.join(left_out)} in preset {preset}. Valid: {valid}.")


def _tasks(text: str, scale: str) -> list[str]:
    _check("scale", scale, suites.SCALES)
    at_scale = suites.at_scale(scale)
    if text == "all":
        return list(at_scale)
    return [_check(f"task of {scale} scale", name, at_scale) for name in _split(text, "--tasks")]


def _seeds(text: str) -> list[int]:
    parts = _split(text, "--seeds")
    if not all(part.isdecimal() for part in parts) or (text.isdecimal() and int(text) == 0):
        _fail(f"--seeds: {text!r} is neither a count (3) nor a list (0,4,7). Give a list of one as '7,'.")
    return list(range(int(text))) if text.isdecimal() else [int(part) for part in parts]


def _split(text: str, option: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        _fail(f"{option}: nothing given.")
    return parts


def _check(what: str, value: str, valid: Iterable[str]) -> str:
    if value not in valid:
        _fail(f"Unknown {what} {value!r}. Valid: {', '.join(valid)}.")
    return value


def _fail(message: str, exit_code: int = 2) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(exit_code)


def main() -> None:
    try:
        app()
    except ResultsError as error:
        raise SystemExit(str(error)) from None
