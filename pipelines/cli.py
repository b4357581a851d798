"""The command line: ``h2t demo``, ``h2t run RECIPE``, each stage alone, and what can be asked beforehand."""

import sys
import time
import webbrowser
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from h2t.errors import UserError, unknown
from pipelines.config import Config
from pipelines.recipe import load_config
from pipelines.studies import checked_name

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt a frozen vision backbone to small data sets with Head2Toe, and compare the ways of doing it.",
)
console = Console()

Recipe = Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of one that ships.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. grid.steps=[100].")]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="A path or URI; default runs/<name>.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster, e.g. auto; default: this machine.")]


def shipped_recipes() -> dict[str, Path]:
    """Names and paths of the recipes that ship with the package."""
    folder = Path(str(files("pipelines") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(recipe: str, overrides: Sequence[str] | None) -> Config:
    """The configuration of a recipe given as a file or by the name of one that ships."""
    recipes = shipped_recipes()
    if not Path(recipe).is_file() and not recipe.endswith((".yaml", ".yml")):
        if recipe not in recipes:
            raise unknown("recipe", recipe, recipes)
        return load_config(recipes[recipe], overrides or ())
    return load_config(recipe, overrides or ())


STAGES = ["extract", "sweep", "evaluate", "finetune", "study"]


def _run(config: Config, run_dir: str | None, stages: list[str], address: str | None, tables: bool) -> None:
    """Run stages and, after all of them, the report."""
    # These need seconds to import; help and errors need none of them.
    from pipelines.doctor import failures
    from pipelines.report import report
    from pipelines.run import run_stages
    from pipelines.run_directory import RunDirectory

    started = time.monotonic()
    for finding in failures():
        console.print(f"{finding.check}: {finding.found}; {finding.fix}")
    uri = run_dir or f"runs/{config.name}"
    run = RunDirectory(uri)
    run.require_writable()
    seconds = run_stages(config, uri, stages, console, address)
    if tables:
        before = time.monotonic()
        report([run], run.subdirectory("report"), console)
        seconds["report"] = time.monotonic() - before
    total = time.monotonic() - started
    parts = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
    console.print(f"{total:.0f} s in all ({parts}); everything is in {uri}")


@app.command()
def demo(
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tuning and training from scratch too.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, two folds, one seed.")] = False,
    studies: Annotated[
        bool, typer.Option("--studies", help="The paper's studies of Head2Toe too: ten minutes more.")
    ] = False,
    run_dir: RunDir = None,
    set_: Set = None,
    address: Address = None,
) -> None:
    """Run the whole pipeline on small tasks, offline, with real ImageNet weights."""
    from pipelines.demo import QUICK, STUDIES, available_tasks

    added = [f"studies=[{', '.join(STUDIES)}]"] if studies else []
    overrides = [*(QUICK if quick else ()), *added, *(set_ or ())]
    config = available_tasks(read_recipe("demo-finetune" if finetune else "demo", overrides), console)
    _run(config, run_dir, STAGES, address, tables=True)


@app.command()
def run(recipe: Recipe, run_dir: RunDir = None, set_: Set = None, address: Address = None) -> None:
    """Run every stage of a recipe; what is already there is not done again."""
    _run(read_recipe(recipe, set_), run_dir, STAGES, address, tables=True)


def _stage(name: str, text: str) -> None:
    def command(recipe: Recipe, run_dir: RunDir = None, set_: Set = None, address: Address = None) -> None:
        _run(read_recipe(recipe, set_), run_dir, [name], address, tables=False)

    app.command(name, help=text)(command)


_stage("extract", "Only the features of the training images.")
_stage("sweep", "Only the cross-validation (needs the features).")
_stage("evaluate", "Only the final heads and test predictions (needs the sweep).")
_stage("finetune", "Only the methods that train the backbone (need the frozen heads).")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A study that needs training; an unknown name lists them.")],
    recipe: Recipe,
    run_dir: RunDir = None,
    set_: Set = None,
    address: Address = None,
) -> None:
    """Run a study of the paper on a recipe: what the recipe's own run lacks, the study, and the report."""
    config = read_recipe(recipe, [*(set_ or ()), f"studies=[{checked_name(name)}]"])
    _run(config, run_dir, ["extract", "sweep", "evaluate", "study"], address, tables=True)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to check what it needs as well.")] = None,
    run_dir: RunDir = None,
    set_: Set = None,
) -> None:
    """Check the machine, and a recipe's weights, images and run directory, before hours are spent."""
    from pipelines.doctor import examine_machine, examine_recipe
    from pipelines.run_directory import RunDirectory

    findings = examine_machine()
    if recipe is not None:
        config = read_recipe(recipe, set_)
        findings += examine_recipe(config, RunDirectory(run_dir or f"runs/{config.name}"))
    table = _table("check", "result", "found", "what to do")
    for finding in findings:
        table.add_row(finding.check, finding.result, finding.found, finding.fix)
    _print(table)
    if any(finding.result == "FAIL" for finding in findings):
        raise typer.Exit(1)


@app.command("plan")
def plan_command(recipe: Recipe, set_: Set = None) -> None:
    """What a recipe will take: work, bytes, and time on 1 to 512 devices like the one at hand."""
    from pipelines import plan
    from pipelines.machine import available_cores
    from pipelines.progress import duration

    facts = plan.facts_of(read_recipe(recipe, set_))
    rates = plan.calibrate(facts)
    stages = plan.plan(facts, rates)
    table = _table("stage", "work", "operations", "written", "time on one device")
    for stage in stages:
        written = f"{stage.bytes_written / 2**30:.3g} GiB"
        table.add_row(stage.stage, stage.work, f"{stage.flops:.2e}", written, duration(stage.seconds))
    _print(table)
    here = {available_cores()} if rates.device == "cpu" else set()
    for devices in sorted({*plan.DEVICES, *here}):
        seconds = plan.total_seconds(stages, devices)
        console.print(
            f"{devices:>4} devices: {duration(seconds)}, {devices * seconds / 3600:.2f} device-hours; most "
            f"of it in {plan.bottleneck(stages, devices)}"
        )
    console.print(
        f"One device is a worker of this machine ({rates.device}): {rates.images:.3g} images/s, "
        f"{rates.head_flops / 1e9:.3g} GFLOP/s on heads ({rates.final_flops / 1e9:.3g} on final ones), "
        "measured now."
    )


@app.command()
def status(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory (or URI).")],
) -> None:
    """How far a run is, from its directory alone: what is done, running, failed and missing."""
    from pipelines.run_directory import RunDirectory
    from pipelines.status import status as read_status

    rows, driver = read_status(RunDirectory(run_dir))
    table = _table("stage", "step", "state", "done", "rate", "time left", "")
    for row in rows:
        table.add_row(row.stage, row.step, row.state, row.done, row.rate, row.left, row.tasks)
    _print(table)
    console.print(driver if rows else f"Nothing has been run into {run_dir}.")


@app.command("report")
def report_command(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR…", help="Run directories (or URIs).")],
    destination: Annotated[
        str | None, typer.Option(help="A folder or URI for the report; default RUN_DIR/report.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    explain: Annotated[
        int, typer.Option(min=0, max=24, help="So many predictions of each task explained; reads its images.")
    ] = 0,
) -> None:
    """Make tables, figures and the page of runs, from their files alone: without recipe or cluster."""
    from pipelines.report import report
    from pipelines.run_directory import RunDirectory

    runs = [RunDirectory(uri) for uri in run_dirs]
    if destination is None and len(runs) > 1:
        raise UserError("the report of several runs needs a place of its own: give --destination FOLDER")
    folder = RunDirectory(destination) if destination else runs[0].subdirectory("report")
    if explain:
        from pipelines.explanations import explain_run

        for run in runs:
            explain_run(run, explain, console)
    report(runs, folder, console)
    if open_:
        if "://" in folder.uri:
            raise UserError(f"--open shows local pages alone; the report is in {folder.uri}")
        webbrowser.open(Path(folder.uri, "index.html").as_uri())


@app.command()
def compare(
    run_dirs: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR…", help="Run directories; or a folder of them.")
    ],
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", help="List all runs under the folder, in files there.")
    ] = False,
    destination: Annotated[
        str | None, typer.Option(help="A folder or URI for the table as Markdown, CSV, LaTeX and Parquet.")
    ] = None,
) -> None:
    """Compare runs on the same test images: differences, and whether they exceed chance."""
    from pipelines.report import compare as comparison
    from pipelines.report.formats import table_files
    from pipelines.run_directory import RunDirectory

    if leaderboard and len(run_dirs) > 1:
        raise UserError(f"--leaderboard expects one folder of runs, got {len(run_dirs)}")
    if leaderboard:
        found, destination = comparison.leaderboard(run_dirs[0]), destination or run_dirs[0]
    else:
        found = comparison.compare([RunDirectory(uri) for uri in run_dirs])
    shown = _table(*map(str, found.display.columns))
    for cells in found.display.astype(str).itertuples(index=False):
        shown.add_row(*cells)
    _print(shown)
    console.print(found.note)
    if destination:
        for name, content in table_files(found).items():
            RunDirectory(destination).write(name, content)


def _table(*columns: str) -> Table:
    """A table whose first column, the names to type, is never cut."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for position, column in enumerate(columns):
        table.add_column(column, no_wrap=position == 0, overflow="fold")
    return table


def _print(table: Table) -> None:
    """Print a table; in a file or pipe its lines are as long as they need to be."""
    (console if console.is_terminal else Console(width=240)).print(table)


@app.command()
def tasks(
    check: Annotated[str | None, typer.Option(help="A folder of images to check for each task.")] = None,
    format: Annotated[str, typer.Option(help="How that folder is laid out.")] = "vtab1k",
) -> None:
    """List the tasks, or check which of them a folder of images holds."""
    from h2t.images.check_vtab import check_root
    from h2t.tasks import DEMO, VTAB_1K

    if check is not None:
        table = _table("task", "status", "found", "expected", "how to get it")
        for row in check_root(check, format):
            table.add_row(row.task, row.status, row.found, row.expected, row.advice)
    else:
        table = _table("task", "title", "group", "classes", "train", "test", "images")
        for tasks, origin in ((DEMO, "demo"), (VTAB_1K, "VTAB-1k")):
            for task in tasks:
                counts = [str(n) for n in (task.n_classes, task.n_train, task.n_test)]
                table.add_row(task.name, task.title, task.group, *counts, origin)
    _print(table)


@app.command()
def prepare(
    task: Annotated[list[str], typer.Argument(help="Tasks of VTAB-1k, or all.")],
    destination: Annotated[str, typer.Option(help="A path or URI to write the Parquet files under.")],
    data_dir: Annotated[str, typer.Option(help="Where TensorFlow Datasets keeps its data.")],
) -> None:
    """Write VTAB-1k's exact images and labels from TensorFlow Datasets once, lossless, as Parquet."""
    from h2t.images.prepare_vtab import prepare_task
    from h2t.tasks import VTAB_1K, find_task
    from pipelines.progress import StageProgress

    for chosen in VTAB_1K if task == ["all"] else [find_task(name) for name in task]:
        with StageProgress(console, "prepare", 0, "images") as progress:
            written = prepare_task(chosen, data_dir, destination, progress=progress.show)
        console.print(f"{chosen.name}: {written}")


@app.command()
def taps(
    backbone: str,
    target_size: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels a side.")] = None,
    weights: Annotated[str, typer.Option(help="random will do here; or auto, or a file.")] = "random",
    variant: Annotated[str, typer.Option("--taps", help="auto, or a variant of a preset.")] = "auto",
    cls_token: Annotated[str, typer.Option(help="normal, only_cls or nopool_cls.")] = "normal",
    tokens: Annotated[str, typer.Option(help="sequence or grid.")] = "sequence",
    pooling: Annotated[str, typer.Option(help="average, average_max, average_std or pyramid.")] = "average",
) -> None:
    """List a backbone's taps: shape, share of a forward pass that ends there, features at target sizes."""
    from h2t.backbones.aggregation import Aggregation
    from h2t.backbones.loading import load_backbone
    from h2t.backbones.tap_reader import describe
    from h2t.costs import tap_depths

    sizes = target_size or [512]
    aggregation = Aggregation.of({"cls_token": cls_token, "tokens": tokens, "pooling": pooling})
    loaded = load_backbone(backbone, weights=weights, image_size=image_size, taps=variant)
    table = _table("tap", "module", "shape", "depth", *(f"T = {size}" for size in sizes))
    totals, depths = dict.fromkeys(sizes, 0), tap_depths(loaded)
    for row in describe(loaded, sizes, aggregation):
        widths = [row.features[size] for size in sizes]
        shape, depth = " × ".join(map(str, row.shape)), f"{depths[row.tap]:.3f}"
        table.add_row(row.tap, row.module, shape, depth, *map(str, widths))
        totals = {size: totals[size] + row.features[size] for size in sizes}
    table.add_section()
    table.add_row(f"{len(loaded.taps)} taps", "", "", "N =", *(f"{total:,}" for total in totals.values()))
    _print(table)


@app.command()
def fit(
    images: Annotated[str, typer.Argument(help="A folder of <class>/…, or train/ and test/; or a table.")],
    backbone: Annotated[str, typer.Option(help="A preset, or any model of timm.")] = "efficientnet_lite0",
    out: Annotated[str | None, typer.Option(help="The adapter; default NAME.safetensors.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels a side.")] = None,
    format: Annotated[
        str | None, typer.Option(help="folder, parquet, webdataset, table …; default: by the files.")
    ] = None,
    weights: Annotated[str, typer.Option(help="float32, float16 or int8, of the saved head.")] = "float32",
    max_depth: Annotated[
        float | None, typer.Option(help="The share of a forward pass that it may take, such as 0.5.")
    ] = None,
    run_dir: RunDir = None,
    set_: Set = None,
    address: Address = None,
) -> None:
    """Adapt a backbone to a folder of labelled images: a table of two methods, and an adapter."""
    from h2t.adapter import check_weight_type
    from pipelines import fit as fitting
    from pipelines.run_directory import RunDirectory

    kind = check_weight_type(weights)
    config = fitting.recipe(images, backbone, image_size, format, max_depth, set_ or ())
    out = out or f"{fitting.name_of(images)}.safetensors"
    if not out.endswith(".safetensors"):
        raise UserError(f"--out {out}: expected a name that ends with .safetensors")
    for words in fitting.rare_classes(config):
        console.print(words)
    run = RunDirectory(run_dir or f"runs/{config.name}")
    _run(config, run.uri, ["extract", "sweep", "evaluate"], address, tables=False)
    found = fitting.fitted(run)
    chosen = fitting.best(found)
    table = _table(
        "method", "held-out accuracy, %", "95 % interval", "in cross-validation, %", "features kept"
    )
    for each in found:
        low, high = 100 * each.held_out.low, 100 * each.held_out.high
        table.add_row(each.method, f"{100 * each.held_out.mean:.1f}", f"{low:.1f} to {high:.1f}",
                      f"{100 * each.validation_accuracy:.1f}", f"{each.n_kept:,}")  # fmt: skip
    _print(table)
    if len(found) > 1:
        gain = fitting.difference(run)
        console.print(
            f"Head2Toe − linear on {chosen.n_test} held-out images: {100 * gain.mean:+.1f} points "
            f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        )
    fitting.save_adapter(run, chosen, out, kind)
    console.print(
        f"{out} is {chosen.method}{', which cross-validation prefers' * (len(found) > 1)}; what it is: "
        f"{out.removesuffix('.safetensors')}.md; use it: h2t predict {out} IMAGES"
    )


@app.command()
def predict(
    files: Annotated[
        list[str], typer.Argument(metavar="ADAPTER… IMAGES…", help="Adapters (.safetensors), then images.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Where all rows go: .parquet, .csv, or FOLDER/ for many images on Ray.")
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to name for each image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 50,
    address: Address = None,
) -> None:
    """Predict images with saved adapters: files, folders, patterns, Parquet."""
    from h2t.images.unlabelled import find_images
    from pipelines.predict import check_options
    from pipelines.predict import predict as predict_images

    adapters = [file for file in files if file.endswith(".safetensors")]
    inputs = [file for file in files if not file.endswith(".safetensors")]
    if not adapters or not inputs:
        raise UserError(
            f"expected adapters (.safetensors) and images, got {len(adapters)} adapters and {len(inputs)} "
            "places with images"
        )
    check_options(out, top)
    found = find_images(inputs)
    if out is not None and out.endswith("/"):
        from pipelines.predict_many import predict_many

        bad = predict_many(adapters, found, out, top, batch_size, console, address)
    else:
        shown, bad = predict_images(adapters, found, out, top, batch_size, console)
        if out is None and len(shown):
            table = _table(*map(str, shown.columns))
            for row in shown.itertuples(index=False):
                table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
            _print(table)
    if out is not None:
        console.print(f"everything is in {out}")
    for error in bad:
        Console(stderr=True).print(f"cannot be read: {error}", markup=False, highlight=False, soft_wrap=True)
    if bad:
        raise typer.Exit(1)


@app.command()
def explain(
    adapter: Annotated[str, typer.Argument(help="An adapter (.safetensors) of a frozen backbone.")],
    image: Annotated[str, typer.Argument(help="An image file.")],
    out: Annotated[str | None, typer.Option(help="A heat map over the image, .png.")] = None,
    label: Annotated[str | None, typer.Option(help="Another class than the predicted one.")] = None,
) -> None:
    """Say what each tap adds to the logit of the predicted class, and draw where it comes from."""
    from h2t.adapter import Adapter
    from h2t.images.preprocessing import decode
    from h2t.images.source import EncodedImage

    if out is not None and not out.endswith(".png"):
        raise UserError(f"--out {out}: expected a name that ends with .png")
    loaded = Adapter.load(adapter)
    names = [str(name) for name in loaded.classes]
    if label is not None and label not in names:
        raise unknown("class", label, names)
    found = loaded.explain(image, None if label is None else names.index(label))
    table = _table("tap", "adds to the logit")
    for tap, part in sorted(found.by_tap.items(), key=lambda pair: -abs(pair[1])):
        table.add_row(tap, f"{part:+.3f}")
    table.add_row("bias", f"{found.bias:+.3f}")
    _print(table)
    console.print(
        f"{found.label}: logit {found.logit:.3f}, of which {found.heat.sum():+.3f} has a place in the image"
    )
    if out:
        pixels = decode(EncodedImage(Path(image).read_bytes(), image))
        found.picture(pixels).save(f"{out}.tmp", "png")
        Path(f"{out}.tmp").replace(out)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="An adapter (.safetensors).")],
    destination: Annotated[str, typer.Argument(help="A name that ends with .onnx, or .safetensors.")],
    weights: Annotated[str, typer.Option(help="float32, float16 or int8, for .safetensors.")] = "float32",
) -> None:
    """Write an adapter as ONNX, pixels in and logits out; or again with smaller weights."""
    from h2t.adapter import Adapter, check_weight_type, convert_head
    from h2t.export import export_onnx

    if destination.endswith(".onnx"):
        export_onnx(Adapter.load(adapter), destination)
    elif destination.endswith(".safetensors"):
        convert_head(adapter, destination, check_weight_type(weights))
    else:
        raise UserError(f"'{destination}': expected a name that ends with .onnx or .safetensors")
    console.print(f"{destination}: {Path(destination).stat().st_size:,} bytes")


@app.command("inspect")
def inspect_command(
    place: Annotated[str, typer.Argument(help="A .safetensors or .parquet file, or a run directory.")],
) -> None:
    """Say what is inside a file of ours or a run directory."""
    from pipelines.contents import describe

    table = _table("", "")
    table.show_header = False
    for name, value in describe(place):
        table.add_row(name, value)
    _print(table)


def _answer() -> None:
    """Run the command line; a user's mistake is one message and exit status 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(
            f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)


def main() -> None:
    """Run the command line; a signal, too, is one message and its exit status."""
    from pipelines.interruption import end_soon, ignore_signals, say, signal_behind, stop_on_signals

    stop_on_signals()
    try:
        _answer()
    except BaseException as error:
        stopped = signal_behind(error)
        if stopped is None:
            raise
        ignore_signals()
        end_soon(stopped)  # which Ray's handler has not begun
        say(stopped)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
