"""The options, each written once: its type, its spellings and its words.

The library's field `map_name` has the words of the alias `MapName` (`geoscope.cli.command`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from geoscope.cli.limits import parse_limits
from geoscope.errors import OptionError
from geoscope.folders import results_folder
from geoscope.report import STYLES
from geoscope.verbs.adapters.options import methods_in_words as initialisations_in_words
from geoscope.verbs.adapters.options import methods_without_layout
from geoscope.verbs.series.options import methods_in_words

__all__ = ["Read", "read_numbers", "read_part"]


@dataclass(frozen=True)
class _Group:
    """Options that stand together in --help."""

    title: str

    def __call__(self, usage: str, text: str) -> Any:
        """An option as its usage spells it, `--include REGEX, -i`, and what it means."""
        first, *others = usage.split(", ")
        name, _, metavar = first.partition(" ")
        return typer.Option(
            name, *others, metavar=metavar or None, help=text, rich_help_panel=self.title
        )


@dataclass(frozen=True)
class Read:
    """How what is written becomes the value of the field; its default as it would be written."""

    value: Callable[[Any], Any]
    default: Any = None


def _count(text: str | None) -> int | None:
    """A number of parameters: 20M, 1.5B, 300000."""
    if text is None:
        return None
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    digits, unit = text.strip().upper(), 1
    if digits[-1:] in units:
        digits, unit = digits[:-1], units[digits[-1]]
    try:
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise OptionError(f"--budget {text!r}: write a number such as 300000 or 20M") from None


def _dimensions(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise OptionError(f"--k {text!r}: write whole numbers such as 8,64") from None


def _style(text: str) -> str:
    if text not in STYLES:
        raise OptionError(f"--style {text!r}: write {' or '.join(STYLES)}")
    return text


def read_part(text: str | None) -> tuple[int, int] | None:
    """The numbers of `3/8`. Raises OptionError."""
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
        raise OptionError(f"--part {text!r}: write I/N, such as 3/8")
    return int(number), int(count)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


def read_numbers(text: str | None) -> tuple[float, ...]:
    """The numbers of --predict-extend."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise OptionError(f"--predict-extend {text!r}: write numbers such as 0.5,1,2") from None


# fmt: off
# --- which tensors --------------------------------------------------------------------------------

which = _Group("Which tensors")
Include = Annotated[list[str], which("--include REGEX, -i",
    "Only tensors whose full name matches this regular expression (re.search). Replaces the "
    "default scope, so it also reaches embeddings and the output head. May be given again.")]
Exclude = Annotated[list[str], which("--exclude REGEX, -e",
    "Leave out tensors whose name matches this regular expression. May be repeated.")]
Layers = Annotated[str | None, which("--layers LIST", "Only these block indices, such as 0-3,7.")]
MapName = Annotated[list[str], which("--map-name REGEX=REPL",
    "Rename tensors of all models before they are matched: replace REGEX by REPL (re.sub). The "
    "last = separates the two. May be repeated.")]
AllowVocabResize = Annotated[bool, which("--allow-vocab-resize",
    "If embeddings or output heads differ in the number of rows, compare the rows that both models "
    "have. Select them with --include.")]
InitialAdapter = Annotated[str | None, which("--initial-adapter DIR",
    "The adapter as it was before training, if its product was not zero then (PiSSA, GeoRA, OLoRA "
    "…). It is subtracted from the update.")]
LoraAlpha = Annotated[float | None, which("--lora-alpha X",
    "Use this lora_alpha for the adapters; some converters write 0.")]
NoBase = Annotated[bool, which("--no-base",
    "Take one argument, an adapter: what its factors tell without the base.")]

# --- how it is computed ---------------------------------------------------------------------------

computing = _Group("How it is computed")
Device = Annotated[str, computing("--device NAME",
    "auto (CUDA if there is one, else the CPU), cpu, cuda (every GPU), cuda:N or mps.")]
InitDevice = Annotated[str, computing("--device NAME",
    "auto (CUDA if there is one, else the CPU), cpu, cuda or cuda:N.")]
TrainDevice = Annotated[str, computing("--device NAME",
    "Where --method next trains: cpu, cuda or cuda:N.")]
Dtype = Annotated[str, computing("--dtype NAME",
    "Precision of the spectra: float64 or float32. MPS has no float64.")]
Solver = Annotated[str | None, computing("--solver NAME",
    "auto: the fastest method whose error bound is met. exact: the SVD of LAPACK, or of cuSOLVER, "
    "for every matrix.")]
MaxMemory = Annotated[str | None, computing("--max-memory SIZE",
    "Memory limit of the process, such as 8GB; min uses as little as possible. Default: enough for "
    "the largest pair of every worker, but at most half of the free memory.")]
SeriesMemory = Annotated[str | None, computing("--max-memory SIZE",
    "Memory limit of the process, such as 8GB; min takes one matrix at a time. Default: enough for "
    "the largest matrix of every worker, but at most half of the free memory.")]
Jobs = Annotated[int | None, computing("--jobs N, -j",
    "Workers on the CPU; the numbers do not depend on it. Default: one a core.")]
Ray = Annotated[str | None, computing("--ray ADDRESS",
    "Compute on the Ray cluster at this address: auto for the one that runs here, local to start "
    "one. Nodes read the models by the same paths or Hub ids.")]
Seed = Annotated[int, computing("--seed N", "Seed of the sampled nulls.")]
SeriesSeed = Annotated[int, computing("--seed N", "Seed of bootstraps and searches.")]
InitSeed = Annotated[int, computing("--seed N",
    "Seed of the random factors of lora, and of the sampled nulls.")]
Cache = Annotated[bool, computing("--resume/--no-resume",
    "Reuse and store the result of each matrix (see geoscope cache). A rerun then continues where "
    "the last run stopped."),
    Read(lambda resume: results_folder() if resume else None, default=True)]

# --- what is measured -----------------------------------------------------------------------------

measuring = _Group("What is measured")
Ks = Annotated[str, measuring("--k K,K,…",
    "Values of k for the columns @k. The verdict uses its own k; this option does not change it."),
    Read(_dimensions, default="8,64")]
Quick = Annotated[bool, measuring("--quick",
    "Compute the leading singular directions only. Angles are accurate to 1e-5 rad; numbers that "
    "need the full spectrum are NOT_APPLICABLE. For flat spectra this is slower than the default. "
    "Not with --curves.")]
Curves = Annotated[bool, measuring("--curves",
    "Also compute captured energy for every k, with all singular vectors of the base. The figure "
    "shows it; alignment and compare also report numbers. Slower.")]
Masks = Annotated[bool, measuring("--masks",
    "Also the overlap of changed weights with masks of the base.")]
Budget = Annotated[str | None, measuring("--budget N",
    "Also the ranks that hold most of the update within N parameters of an adapter, such as 20M. "
    "Uses no cached result."), Read(_count)]
Limits = Annotated[list[str], measuring("--limit NAME=VALUE",
    "Set a threshold of the verdict. --explain lists the names. Give angles in radians, or in "
    "degrees as 15deg. May be repeated."), Read(parse_limits, default=())]
AllMatrices = Annotated[bool, measuring("--all",
    "Read every matrix in scope, and embeddings of Hub models, too. Default: a sample that grows "
    "until the answer is clear.")]
SampleSeed = Annotated[int, measuring("--seed N", "Seed of the order in which matrices are taken.")]
Part = Annotated[str | None, measuring("--part I/N",
    "Split the matrices into N parts, compute part I, and write it to the one FILE.json of --out. "
    "geoscope join makes one report of all parts.")]
Anchor = Annotated[str | None, measuring("--anchor MODEL",
    "A second tuned model of the same base. Each number is also shown as a ratio to that model's "
    "number.")]

# --- a series of checkpoints ----------------------------------------------------------------------

following = _Group("A series of checkpoints")
SeriesBase = Annotated[str | None, following("--base MODEL",
    "The model at step 0. Default: the first checkpoint of a series of models; an adapter starts "
    "at zero.")]
Steps = Annotated[str | None, following("--steps LIST",
    "Steps of the checkpoints in the order given, such as 10,20,50, in place of those in their "
    "names.")]
Directions = Annotated[bool, following("--directions/--no-directions",
    "Leading pairs of every update and step: the spatial rank-1 statistics. Faster without.")]
ScalarR2 = Annotated[str | None, following("--scalar-r2 all|published",
    "R² of every single entry on a line in t, as RLVR-Linearity reports it: of `all` entries, or "
    "by the `published` filter. One more pass over whole models; not for adapters.")]
Spectra = Annotated[bool, following("--spectra",
    "Spectra of every update and how it lies in the base, by step: the numbers of compare. Costs a "
    "comparison a checkpoint.")]
Metrics = Annotated[str | None, following("--metrics FILE",
    "Metric curves: trainer_state.json, or .csv or .jsonl with a step column. Default: the "
    "trainer_state.json of the last checkpoint.")]
Metric = Annotated[str | None, following("--metric NAME",
    "The curve to relate the weights to, such as reward. Default: the only one.")]
Vectors = Annotated[Path | None, following("--vectors FILE",
    "Write the leading pairs of every update and step, with aligned signs, to this .safetensors "
    "file.")]
ToStep = Annotated[int, following("--to-step N", "The step to predict.")]
Extrapolator = Annotated[str, following("--method NAME",
    methods_in_words())]
Extend = Annotated[str | None, following("--predict-extend C,C,…",
    "With --method next: write W_T + c·Δ̂ for each c into OUT/c….")]
Training = Annotated[int, following("--train-steps N",
    "Training steps of the networks of --method next.")]
Origins = Annotated[int | None, following("--origins N",
    "Of --method next: origins of the backtest at which its networks train again. Default: 3, as "
    "many as a credible horizon takes; 1 with --force.")]
WholeModel = Annotated[bool, following("--whole-model",
    "Of --method next: norms and biases train its networks and are predicted, too, and without "
    "--include also embeddings and the output head, as published.")]

# --- a run while it trains ------------------------------------------------------------------------

watching = _Group("A run while it trains")
RunBase = Annotated[str | None, watching("--base MODEL",
    "The model that the run started from. Without it only adapters can be measured, alone.")]
Every = Annotated[int, watching("--every N", "Only steps that are multiples of N.")]
Only = Annotated[str | None, watching("--metrics NAME,NAME…",
    "Metrics that are kept and logged, without their @k. Default: the columns of compare."),
    Read(_names)]
Seconds = Annotated[float | None, watching("--budget SECONDS",
    "Bound on the estimated time of a step: a fixed sample of layers is measured where all would "
    "take longer, and the line says which.")]
Once = Annotated[bool, watching("--once", "Measure what is there now, and end.")]
Until = Annotated[int | None, watching("--until STEP", "End after this step.")]
Interval = Annotated[float, watching("--interval SECONDS",
    "Time between two looks. A save of which the trainer says nothing has to stand still as long.")]
Log = Annotated[str | None, watching("--log NAME,NAME…",
    "Also log to tensorboard (in RUN/geoscope), wandb, trackio or mlflow.")]
OnFail = Annotated[str | None, watching("--on-fail CMD",
    "With --fail-on: run this shell command, with GEOSCOPE_STEP and GEOSCOPE_MET set, and go on.")]

# --- adapters -------------------------------------------------------------------------------------

start = _Group("Adapters")
Method = Annotated[str, start("--method NAME", f"{initialisations_in_words()}.")]
Rank = Annotated[int, start("--rank R, -r", "Rank of the adapter.")]
CutRank = Annotated[int | None, start("--rank R, -r",
    "Compress to this rank, and say what is lost. Default: exact, twice the rank.")]
PredictedRank = Annotated[int | None, start("--rank R",
    "For a series of adapters: rank of the predicted one. Default: twice theirs.")]
Alpha = Annotated[float | None, start("--alpha A",
    "lora_alpha; the scale is alpha/rank. Default: 2 × rank.")]
Rho = Annotated[float | None, start("--rho SHARE", "geora: quantile of both masks. Default: 0.2.")]
SpecRank = Annotated[int | None, start("--spec-rank R",
    "geora: rank of the part of W that the spectral mask looks at. Default: --rank.")]
ScaleConvention = Annotated[str | None, start("--scale-convention NAME",
    "geora: keeps the singular values (default); pissa: divides them by alpha/rank.")]
Targets = Annotated[str | None, start("--targets NAME,NAME…",
    "Only modules of these names, such as q_proj,v_proj. Default: every linear layer in a block, "
    "without routers."), Read(_names)]
Layout = Annotated[str | None, start("--layout NAME",
    "residual (default): a rewritten base and an adapter. mirror (experimental): one adapter of "
    "twice the rank on the original base, exact in every dtype. anchor: two adapters, for your own "
    f"training loop. Not with --method {methods_without_layout()}, which have none.")]
ResidualDtype = Annotated[str | None, start("--residual-dtype NAME",
    "dtype of the rewritten matrices: float32 (default), or with loss bfloat16 or float16.")]
OriginalBase = Annotated[str | None, start("--base MODEL",
    "The original model, where the folder does not tell it or it has moved: folder or "
    "org/name[@revision].")]
AllowLossy = Annotated[bool, start("--allow-lossy",
    "A start further off the model than 1e-5 is told and is not a failure.")]
WithPeft = Annotated[bool, start("--with-peft",
    "Also load it with transformers and PEFT, and compare the logits.")]

# --- what is shown and written --------------------------------------------------------------------

shown = _Group("What is shown and written")
AsJson = Annotated[bool, shown("--json",
    "One JSON document on standard output, in place of the text.")]
Out = Annotated[list[Path], shown("--out FILE, -o",
    "Also write FILE.{json,html,csv,md,png,svg,pdf}; the suffix decides. May be repeated.")]
ReportFiles = Annotated[list[Path] | None, shown("--report FILE",
    "Also write the report as FILE.{json,html,csv,md,png,svg,pdf}. May be repeated.")]
InitFolder = Annotated[Path | None, shown("--out OUT, -o",
    "Folder to write. Default: a name made of model, method and rank.")]
PlainFolder = Annotated[Path, shown("--out OUT, -o", "Folder to write the plain LoRA to.")]
PredictedFolder = Annotated[Path, shown("--out OUT, -o",
    "Folder to write the predicted model or adapter to.")]
Style = Annotated[str, shown("--style STYLE",
    "Of figures: screen, or paper (as wide as a page of text, without the title)."),
    Read(_style, STYLES[0])]
Force = Annotated[bool, shown("--force", "Overwrite existing files.")]
ForceInit = Annotated[bool, shown("--force",
    "Replace files of an earlier run in OUT, and of --report.")]
ForcePlain = Annotated[bool, shown("--force",
    "Accept the start of another run, and write over an earlier output.")]
ForcePredicted = Annotated[bool, shown("--force",
    "Go beyond the credible horizon or far from the base, and write over an earlier output.")]
Strict = Annotated[bool, shown("--strict", "Exit 1 when a matrix in scope was not compared.")]
DryRun = Annotated[bool, shown("--dry-run",
    "Show what would be read and computed, from headers alone; compute and write nothing.")]
Quiet = Annotated[bool, shown("--quiet, -q",
    "Print only the headline. Standard error then shows only errors and the reason for the exit "
    "code.")]
Details = Annotated[bool, shown("--details",
    "All numbers: of the model, of each kind of module, and of the worst matrices.")]
Verbose = Annotated[bool, shown("--verbose, -v",
    "The details of every matrix, and how it was computed (with error bounds).")]
Debug = Annotated[bool, shown("--debug",
    "Show the traceback of an error, as GEOSCOPE_DEBUG=1 does.")]
FailOn = Annotated[str | None, shown("--fail-on EXPR",
    "Exit with code 3 if a condition holds. A condition is CODE, CODE>SHARE, ID>NUMBER or "
    "ID<NUMBER; separate several with commas.")]
Explain = Annotated[bool, shown("--explain",
    "Also show every threshold and the values that were compared with it.")]

# fmt: on
