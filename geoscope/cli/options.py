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

__all__ = ["Read", "read_numbers", "read_part"]


def words(usage: str, text: str) -> Any:
    """An option as its usage spells it, `--include REGEX, -i`, and what it means."""
    first, *others = usage.split(", ")
    name, _, metavar = first.partition(" ")
    return typer.Option(name, *others, metavar=metavar or None, help=text)


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

Include = Annotated[list[str], words("--include REGEX, -i",
    "Only tensors whose full name matches this regular expression (re.search). Replaces the "
    "default scope, so it also reaches embeddings and the output head. May be given again.")]
Exclude = Annotated[list[str], words("--exclude REGEX, -e",
    "Leave out tensors whose name matches this regular expression. May be given again.")]
Layers = Annotated[str | None, words("--layers LIST", "Only these block indices, such as 0-3,7.")]
MapName = Annotated[list[str], words("--map-name REGEX=REPL",
    "Replace REGEX by REPL (re.sub) in the names of all models before they are matched; the last = "
    "divides. May be given again.")]
AllowVocabResize = Annotated[bool, words("--allow-vocab-resize",
    "Compare the rows that both models have, where embeddings and output heads differ in height; "
    "--include brings these in scope.")]
InitialAdapter = Annotated[str | None, words("--initial-adapter DIR",
    "The adapter before training, where it did not start at zero (PiSSA, GeoRA, OLoRA …). Its "
    "product is subtracted.")]
LoraAlpha = Annotated[float | None, words("--lora-alpha X",
    "Use this lora_alpha for the adapters; some converters write 0.")]
NoBase = Annotated[bool, words("--no-base",
    "Take one argument, an adapter: what its factors tell without the base.")]

# --- how it is computed ---------------------------------------------------------------------------

Device = Annotated[str, words("--device NAME",
    "auto (CUDA if there is one, else the CPU), cpu, cuda (every GPU), cuda:N or mps.")]
InitDevice = Annotated[str, words("--device NAME",
    "auto (CUDA if there is one, else the CPU), cpu, cuda or cuda:N.")]
TrainDevice = Annotated[str, words("--device NAME",
    "Where --method next trains: cpu, cuda or cuda:N.")]
Dtype = Annotated[str, words("--dtype NAME",
    "Precision of the spectra: float64 or float32. MPS has no float64.")]
Solver = Annotated[str | None, words("--solver NAME",
    "auto: the fastest method whose error bound is met. exact: the SVD of LAPACK, or of cuSOLVER, "
    "for every matrix.")]
MaxMemory = Annotated[str | None, words("--max-memory SIZE",
    "Bound on the memory of the process, such as 8GB; min is the least that works. Default: what "
    "all workers need for their largest pair, half of the free memory at most.")]
SeriesMemory = Annotated[str | None, words("--max-memory SIZE",
    "Bound on the memory of the process, such as 8GB; min is one matrix at a time. Default: what "
    "all workers need for their largest matrix, half of the free memory at most.")]
InitMemory = Annotated[str | None, words("--max-memory SIZE",
    "Bound on the memory of the process, such as 8GB; min is one matrix at a time. Default: 500 MB "
    "and six fp32 copies of the largest matrix.")]
Jobs = Annotated[int | None, words("--jobs N, -j",
    "Worker threads on the CPU; the numbers do not depend on it. Default: one a core.")]
Seed = Annotated[int, words("--seed N", "Seed of the sampled nulls.")]
SeriesSeed = Annotated[int, words("--seed N", "Seed of bootstraps and searches.")]
InitSeed = Annotated[int, words("--seed N",
    "Seed of the random factors of lora, and of the sampled nulls.")]
Cache = Annotated[bool, words("--resume/--no-resume",
    "Use and keep the "
    "result of each "
    "matrix (geoscope "
    "cache), so that a "
    "rerun continues."), Read(lambda resume: results_folder() if resume else None, default=True)]

# --- what is measured -----------------------------------------------------------------------------

Ks = Annotated[str, words("--k K,K,…",
    "Subspace dimensions of the @k columns. The verdict has a "
    "dimension of its own."), Read(_dimensions, default="8,64")]
Quick = Annotated[bool, words("--quick",
    "Leading directions only, angles to 1e-5 rad; numbers of the full spectrum are NOT_APPLICABLE. "
    "Slower than without where spectra are flat. Not with --curves.")]
Curves = Annotated[bool, words("--curves",
    "Captured energy over the base's whole basis: in the figure, and as numbers in alignment and "
    "compare. Slower: it takes every singular vector of the base.")]
Masks = Annotated[bool, words("--masks",
    "Also the overlap of changed weights with masks of the base.")]
Budget = Annotated[str | None, words("--budget N",
    "Also the ranks that hold most of the update within N parameters of an adapter, such as 20M. "
    "Uses no cached result."), Read(_count)]
Limits = Annotated[list[str], words("--limit NAME=VALUE",
    "Another limit for a threshold of the verdict, by the name that --explain prints; an angle in "
    "radians, or as 15deg. May be given again."), Read(parse_limits, default=())]
AllMatrices = Annotated[bool, words("--all",
    "Read every matrix in scope, and embeddings of Hub models, too. Default: a sample that grows "
    "until the answer is clear.")]
SampleSeed = Annotated[int, words("--seed N", "Seed of the order in which matrices are taken.")]
Part = Annotated[str | None, words("--part I/N",
    "Compute the I-th of N parts of the matrices, and write it to the one FILE.json of --out; "
    "geoscope join makes the report of all parts.")]
Anchor = Annotated[str | None, words("--anchor MODEL",
    "Another tuned model of the same base: show every number as a ratio to its number.")]

# --- a series of checkpoints ----------------------------------------------------------------------

SeriesBase = Annotated[str | None, words("--base MODEL",
    "The model at step 0. Default: the first checkpoint of a series of models; an adapter starts "
    "at zero.")]
Steps = Annotated[str | None, words("--steps LIST",
    "Steps of the checkpoints in the order given, such as 10,20,50, in place of those in their "
    "names.")]
Directions = Annotated[bool, words("--directions/--no-directions",
    "Leading pairs of every update and step: the spatial rank-1 statistics. Faster without.")]
ScalarR2 = Annotated[str | None, words("--scalar-r2 all|published",
    "R² of every single entry on a line in t, as RLVR-Linearity reports it: of `all` entries, or "
    "by the `published` filter. One more pass over whole models; not for adapters.")]
Metrics = Annotated[str | None, words("--metrics FILE",
    "Metric curves: trainer_state.json, or .csv or .jsonl with a step column. Default: the "
    "trainer_state.json of the last checkpoint.")]
Metric = Annotated[str | None, words("--metric NAME",
    "The curve to relate the weights to, such as reward. Default: the only one.")]
Vectors = Annotated[Path | None, words("--vectors FILE",
    "Write the leading pairs of every update and step, with aligned signs, to this .safetensors "
    "file.")]
ToStep = Annotated[int, words("--to-step N", "The step to predict.")]
Extrapolator = Annotated[str, words("--method NAME",
    "auto (each matrix its best held-out method), hold, two-point, linear, linear-origin, relex, "
    "relex-pinned, spatial-rank1, spatial-rank1-pinned, alpha-rank1, next (trains networks: a "
    "minute or more), damped (of linear), or damped(…) of one.")]
Extend = Annotated[str | None, words("--predict-extend C,C,…",
    "With --method next: write W_T + c·Δ̂ for each c into OUT/c….")]
Training = Annotated[int, words("--train-steps N",
    "Training steps of the networks of --method next.")]
Origins = Annotated[int | None, words("--origins N",
    "Of --method next: origins of the backtest at which its networks train again. Default: 3, as "
    "many as a credible horizon takes; 1 with --force.")]
WholeModel = Annotated[bool, words("--whole-model",
    "Of --method next: norms and biases train its networks and are predicted, too, and without "
    "--include also embeddings and the output head, as published.")]

# --- a run while it trains ------------------------------------------------------------------------

RunBase = Annotated[str | None, words("--base MODEL",
    "The model that the run started from. Without it only adapters can be measured, alone.")]
Every = Annotated[int, words("--every N", "Only steps that are multiples of N.")]
Only = Annotated[str | None, words("--metrics NAME,NAME…",
    "Metrics that are kept and logged, without their @k. Default: the columns of compare."),
    Read(_names)]
Seconds = Annotated[float | None, words("--budget SECONDS",
    "Bound on the estimated time of a step: a fixed sample of layers is measured where all would "
    "take longer, and the line says which.")]
Once = Annotated[bool, words("--once", "Measure what is there now, and end.")]
Until = Annotated[int | None, words("--until STEP", "End after this step.")]
Interval = Annotated[float, words("--interval SECONDS",
    "Time between two looks. A save of which the trainer says nothing has to stand still as long.")]
Log = Annotated[str | None, words("--log NAME,NAME…",
    "Also log to tensorboard (in RUN/geoscope), wandb, trackio or mlflow.")]
OnFail = Annotated[str | None, words("--on-fail CMD",
    "With --fail-on: run this shell command, with GEOSCOPE_STEP and GEOSCOPE_MET set, and go on.")]

# --- adapters -------------------------------------------------------------------------------------

Method = Annotated[str, words("--method NAME", "geora, pissa, milora, olora, rlpo, rlmo or lora.")]
Rank = Annotated[int, words("--rank R, -r", "Rank of the adapter.")]
CutRank = Annotated[int | None, words("--rank R, -r",
    "Compress to this rank, and say what is lost. Default: exact, twice the rank.")]
PredictedRank = Annotated[int | None, words("--rank R",
    "For a series of adapters: rank of the predicted one. Default: twice theirs.")]
Alpha = Annotated[float | None, words("--alpha A",
    "lora_alpha; the scale is alpha/rank. Default: 2 × rank.")]
Rho = Annotated[float | None, words("--rho SHARE", "geora: quantile of both masks. Default: 0.2.")]
SpecRank = Annotated[int | None, words("--spec-rank R",
    "geora: rank of the part of W that the spectral mask looks at. Default: --rank.")]
ScaleConvention = Annotated[str | None, words("--scale-convention NAME",
    "geora: keeps the singular values (default); pissa: divides them by alpha/rank.")]
Targets = Annotated[str | None, words("--targets NAME,NAME…",
    "Only modules of these names, such as q_proj,v_proj. Default: every linear layer in a block, "
    "without routers."), Read(_names)]
Layout = Annotated[str | None, words("--layout NAME",
    "residual (default): a rewritten base and an adapter. mirror (experimental): one adapter of "
    "twice the rank on the original base, exact in every dtype. anchor: two adapters, for your own "
    "training loop. Not with --method rlpo, rlmo and lora, which have none.")]
ResidualDtype = Annotated[str | None, words("--residual-dtype NAME",
    "dtype of the rewritten matrices: float32 (default), or with loss bfloat16 or float16.")]
OriginalBase = Annotated[str | None, words("--base MODEL",
    "The original model, where the folder does not tell it or it has moved: folder or "
    "org/name[@revision].")]
AllowLossy = Annotated[bool, words("--allow-lossy",
    "A start further off the model than 1e-5 is told and is not a failure.")]
WithPeft = Annotated[bool, words("--with-peft",
    "Also load it with transformers and PEFT, and compare the logits.")]

# --- what is shown and written --------------------------------------------------------------------

AsJson = Annotated[bool, words("--json",
    "One JSON document on standard output, in place of the text.")]
Out = Annotated[list[Path], words("--out FILE, -o",
    "Also write FILE.{json,csv,md,png,svg,pdf}; the suffix decides. May be given again.")]
ReportFiles = Annotated[list[Path] | None, words("--report FILE",
    "Also write the report as FILE.{json,csv,md,png,svg,pdf}. May be given again.")]
InitFolder = Annotated[Path | None, words("--out OUT, -o",
    "Folder to write. Default: a name made of model, method and rank.")]
PlainFolder = Annotated[Path, words("--out OUT, -o", "Folder to write the plain LoRA to.")]
PredictedFolder = Annotated[Path, words("--out OUT, -o",
    "Folder to write the predicted model or adapter to.")]
Force = Annotated[bool, words("--force", "Overwrite existing files.")]
ForceInit = Annotated[bool, words("--force",
    "Replace files of an earlier run in OUT, and of --report.")]
ForcePlain = Annotated[bool, words("--force",
    "Accept the start of another run, and write over an earlier output.")]
ForcePredicted = Annotated[bool, words("--force",
    "Go beyond the credible horizon or far from the base, and write over an earlier output.")]
Strict = Annotated[bool, words("--strict", "Exit 1 when a matrix in scope was not compared.")]
DryRun = Annotated[bool, words("--dry-run",
    "Show what would be read and computed, from headers alone; compute and write nothing.")]
Quiet = Annotated[bool, words("--quiet, -q",
    "The headline alone; nothing on standard error but errors and what explains the exit code.")]
Details = Annotated[bool, words("--details",
    "All numbers: of the model, of each kind of module, and of the worst matrices.")]
Verbose = Annotated[bool, words("--verbose, -v",
    "The details of every matrix, and how it was computed (with error bounds).")]
Debug = Annotated[bool, words("--debug",
    "Show the traceback of an error, as GEOSCOPE_DEBUG=1 does.")]
FailOn = Annotated[str | None, words("--fail-on EXPR",
    "Exit 3 when any of EXPR[,EXPR…] holds: CODE, CODE>SHARE, ID>NUMBER or ID<NUMBER.")]
Explain = Annotated[bool, words("--explain", "Also every threshold and the values it met.")]

# fmt: on
