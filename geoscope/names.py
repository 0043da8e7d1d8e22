"""Parameter names: block index, module kind, canonical form, selection.

Framework wrappers leave their marks in names (`module.`, `_orig_mod.`, FSDP, PEFT), and one model
has several spellings across library versions (`model.language_model.layers…` and
`language_model.model.layers…`). `canonical` removes both kinds of difference and says which rule
did it, so that a report can list each rename. Everything here works on strings alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geoscope.arguments import normalise, numbers, texts
from geoscope.errors import OptionError
from geoscope.patterns import PatternError, check_pattern, searches, substituted

__all__ = [
    "NameMap",
    "Selection",
    "canonical",
    "chosen_layers",
    "in_natural_order",
    "is_embedding",
    "is_output_head",
    "layer_index",
    "module_kind",
    "parse_layers",
    "without_wrappers",
]

# Digits of the largest block index that may be asked for: all up to it are held in memory.
_LAYER_DIGITS = 6

# Removed wherever they stand, in this order.
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "base_model.model.",
    ".base_layer",
)

# Spellings of one model across versions of transformers (issue 38627 there, 2574 in peft), then
# the optional prefix of the bare backbone; the experts of Mixtral on disk and as they are live.
_SPELLINGS = (
    (re.compile(r"^(?:model\.language_model|language_model\.model)\.(?=.)"), "", "vlm backbone"),
    (re.compile(r"^language_model\.(?=lm_head\.)"), "", "vlm head"),
    (re.compile(r"^(?:model|transformer)\.(?=.)"), "", "backbone prefix"),
    (re.compile(r"^embed_out\.(?=weight$)"), "lm_head.", "output head"),
    (re.compile(r"(?<=\.)block_sparse_moe\."), "mlp.", "expert names"),
    (re.compile(r"(?<=\.)(experts\.\d+)\.w1\."), r"\1.gate_proj.", "expert names"),
    (re.compile(r"(?<=\.)(experts\.\d+)\.w3\."), r"\1.up_proj.", "expert names"),
    (re.compile(r"(?<=\.)(experts\.\d+)\.w2\."), r"\1.down_proj.", "expert names"),
)

_BLOCK = re.compile(
    r"(?:^|\.)(?:layers?|h|blocks?|resblocks|encoder_layers?|decoder_layers?)\.(\d{1,9})\."
)
_EMBEDDING = re.compile(
    r"(?:^|[._])(?:embed\w*|wte|wpe|tok_embeddings|word_embeddings|position_embeddings"
    r"|token_type_embeddings|relative_attention_bias|shared)(?:\.|$)"
)
_OUTPUT_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output|score|classifier)\.(?:weight|bias)$"
)
_PARAMETER = re.compile(r"\.(?:weight|bias)$")


def canonical(name: str) -> tuple[str, tuple[str, ...]]:
    """The name without wrapper marks and version spellings, and the rules that were used.

    >>> canonical("_orig_mod.model.layers.0.mlp.up_proj.weight")
    ('layers.0.mlp.up_proj.weight', ('wrapper _orig_mod.', 'backbone prefix'))
    """
    rules: list[str] = []
    for mark in _WRAPPERS:
        stripped = _strip_wrapper(name, mark)
        if stripped != name:
            rules.append(f"wrapper {mark}")
            name = stripped
    for pattern, replacement, rule in _SPELLINGS:
        shorter = pattern.sub(replacement, name, count=1)
        if shorter != name:
            rules.append(rule)
            name = shorter
    return name, tuple(dict.fromkeys(rules))


def _strip_wrapper(name: str, mark: str) -> str:
    if mark not in name:
        return name
    if mark.startswith("."):
        return re.sub(re.escape(mark) + r"(?=\.|$)", "", name)
    # Only a whole path part: `submodule.` must not lose its tail.
    return re.sub(r"(?:(?<=\.)|^)" + re.escape(mark), "", name)


@dataclass(frozen=True)
class NameMap:
    """The canonical names, with rules of the user before the built-in ones.

    given: `REGEX=REPL` each, applied to every name in this order with `re.sub`; the last `=`
    divides, so that an expression may hold some. Raises OptionError.

    >>> NameMap((r"^policy\\.=model.",)).canonical("policy.layers.0.mlp.up_proj.weight")[0]
    'layers.0.mlp.up_proj.weight'
    """

    given: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", texts(self.given, "map_name"))
        for text in self.given:
            pattern, equals, replacement = text.rpartition("=")
            if not equals or not pattern:
                raise OptionError(f"`map_name` {text!r}: write REGEX=REPL, such as '^policy\\.='")
            try:
                check_pattern(pattern)
                # A replacement is parsed, and refused, whether or not anything matches.
                re.compile(pattern).sub(replacement, "")
            except (PatternError, re.error, IndexError) as error:
                raise _unusable("map_name", text, error) from None

    def canonical(self, name: str) -> tuple[str, tuple[str, ...]]:
        """As the function `canonical`, after these rules."""
        mapped = name
        rules: list[str] = []
        for text in self.given:
            pattern, _, replacement = text.rpartition("=")
            try:
                changed = substituted(pattern, replacement, mapped)
            except PatternError as error:
                raise _unusable("map_name", text, error) from None
            if not changed:
                raise OptionError(f"`map_name` {text!r}: nothing is left of {name}")
            if changed != mapped:
                rules.append(f"`map_name` {text}")
                mapped = changed
        found, built_in = canonical(mapped)
        return found, (*rules, *built_in)

    def notes(self, names: Iterable[str]) -> tuple[str, ...]:
        """A line for each rule that changes none of these names."""
        used = {rule for name in names for rule in self.canonical(name)[1]}
        rules = (f"`map_name` {text}" for text in self.given)
        return tuple(f"{rule}: changes no name" for rule in rules if rule not in used)


def _unusable(
    option: str, pattern: str, error: Exception, what: str = "cannot be used"
) -> OptionError:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:79]}…"
    return OptionError(f"`{option}` {shown!r} {what}: {error}")


def without_wrappers(name: str) -> str:
    """The name without the marks of frameworks; PEFT's `.base_layer` and all spellings stay.

    >>> without_wrappers("_orig_mod.base_model.model.model.norm.weight")
    'model.norm.weight'
    """
    for mark in _WRAPPERS:
        if not mark.startswith("."):
            name = _strip_wrapper(name, mark)
    return name


def layer_index(name: str) -> int | None:
    """Index of the numbered block that holds a parameter, None outside of blocks.

    >>> layer_index("model.layers.12.self_attn.q_proj.weight")
    12
    """
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


def module_kind(name: str) -> str:
    """The kind of module: the last path part that is a word, e.g. `q_proj`.

    Experts keep a mark, so that a router and an expert's projection never share a kind; parts of a
    block that share a word (`dense` of BERT, `c_proj` of GPT-2) keep their path inside the block.

    >>> module_kind("model.layers.3.mlp.experts.7.gate_proj.weight")
    'experts.gate_proj'
    >>> module_kind("encoder.layer.0.attention.output.dense.weight")
    'attention.output.dense'
    """
    bare = _PARAMETER.sub("", name)
    words = [part for part in bare.split(".") if part and not part.isdigit()]
    if not words:
        return name
    kind = words[-1]
    block = _BLOCK.search(bare)
    if kind in ("c_proj", "dense", "linear", "proj") and block is not None:
        return bare[block.end() :]
    if "experts" in words[:-1]:
        kind = f"experts.{kind}"
    return kind


def is_embedding(name: str) -> bool:
    """Whether the parameter is a token, position or type embedding."""
    return _EMBEDDING.search(name) is not None and not is_output_head(name)


def is_output_head(name: str) -> bool:
    """Whether the parameter is the output head (vocabulary or classes)."""
    return layer_index(name) is None and _OUTPUT_HEAD.search(name) is not None


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers as numbers: layer 2 before layer 10."""
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    parts = re.split(r"([0-9]+)", name)  # words and numbers in turn
    numbers = (part.lstrip("0") for part in parts[1::2])
    ordered = iter([(len(digits), digits) for digits in numbers])  # as numbers of any length are
    key = tuple(next(ordered) if i % 2 else (-1, part) for i, part in enumerate(parts))
    return key, name  # `01` and `1` are one number and two names


def parse_layers(text: str) -> frozenset[int]:
    """Block indices of `--layers`: `0-3,7` → {0, 1, 2, 3, 7}. Raises OptionError."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if match is None:
            raise OptionError(f"`layers` {text!r}: {part!r} is not an index or range; write 0-3,7")
        if any(len(digits or "") > _LAYER_DIGITS for digits in match.groups()):
            raise OptionError(
                f"`layers` {part.strip()!r}: no model has so many blocks; write at most "
                f"{_LAYER_DIGITS} digits"
            )
        first = int(match.group(1))
        last = int(match.group(2) or first)
        if last < first:
            raise OptionError(f"`layers` {text!r}: range {part.strip()} runs backwards")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def chosen_layers(
    value: str | int | Iterable[int] | None, name: str = "layers"
) -> frozenset[int] | None:
    """Block indices as one text (`0-3,7`), one index or several. Raises OptionError."""
    if value is None:
        return None
    return parse_layers(value) if isinstance(value, str) else frozenset(numbers(value, name))


@dataclass(frozen=True)
class Selection:
    """Which names are looked at: `--include`, `--exclude` (`re.search`), `--layers`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        normalise(self, include=texts, exclude=texts, layers=chosen_layers)
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                try:
                    check_pattern(pattern)
                except PatternError as error:
                    raise _unusable(name, pattern, error, "is not a regular expression") from None

    def reason_against(self, name: str, *, in_default_scope: bool, scope_reason: str) -> str | None:
        """Why `name` is left out, or None when it is looked at."""
        layer = layer_index(name)
        if self._any_finds("exclude", name):
            return "excluded by `exclude`"
        if self.layers is not None and layer not in self.layers:
            return "not in `layers`"
        if self.include:
            return None if self._any_finds("include", name) else "not matched by `include`"
        return None if in_default_scope else scope_reason

    def _any_finds(self, option: str, name: str) -> bool:
        for pattern in getattr(self, option):
            try:
                if searches(pattern, name):
                    return True
            except PatternError as error:
                raise _unusable(option, pattern, error) from None
        return False
