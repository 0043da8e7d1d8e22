"""Which files around an adapter belong to it? The output of our commands, or a folder of PEFT.

    OUT/residual/ · OUT/adapter/ · OUT/geoscope.json       layout residual
    OUT/anchor/ · OUT/adapter/ · OUT/geoscope.json         layout anchor
    OUT/ with adapter_config.json, geoscope.json           layout mirror, method lora or converted
    BASE/pissa_init/                                       as PEFT saves it: inside the residual

OUT and OUT/adapter name the same thing. What geoscope.json says wins over what is seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, CheckpointNotFound
from geoscope.foreign import (
    TABLE,
    TEXT,
    check_fields,
    exists,
    is_folder,
    local_path,
    reason,
    resolved,
    shown,
    small_text,
)
from geoscope.formats.layout import choose_layout, parse_object
from geoscope.models.opening import CONFIG
from geoscope.peft.config import ADAPTER_CONFIG

__all__ = [
    "CONVERTED",
    "EXTRAPOLATION",
    "RECORD",
    "RECORD_SCHEMA",
    "AdapterFolder",
    "adapter_folder",
    "original_of",
    "record_beside",
    "refuse_as_base",
]

RECORD = "geoscope.json"
RECORD_SCHEMA = "geoscope.adapter/1"
# The schema of the geoscope.json beside a model that `extrapolate` wrote.
EXTRAPOLATION = "geoscope.extrapolation/1"
# The method that geoscope.json names for a plain LoRA that convert-adapter wrote.
CONVERTED = "converted"
_FIELDS = {"layout": TEXT, "method": TEXT, "base": TABLE, "matrices": TABLE}
_BASE_FIELDS = {"reference": TEXT, "commit": TEXT, "sha256": TABLE}
# A Hub model at the head of a reference: a commit goes right behind it.
_REPO = re.compile(r"^(?:hf://)?[^/]+/[^/]+")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder and what lies beside it.

    given: as the user named it. adapter: the folder with adapter_config.json. residual, anchor: the
    rewritten base and the frozen second adapter, where there are any. record: geoscope.json, empty
    without one.
    """

    given: str
    adapter: Path
    residual: Path | None
    anchor: Path | None
    record: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The folder with adapter_config.json, in the words of the user."""
        inside = self.adapter.name == "adapter" and Path(self.given).name != "adapter"
        return f"{self.given.rstrip('/')}/adapter" if inside else self.given

    @property
    def layout(self) -> str | None:
        """`residual`, `mirror` or `anchor`: as recorded, else by the folders; None if unknown."""
        if "layout" in self.record:
            return self.record["layout"]
        return "residual" if self.residual else "anchor" if self.anchor else None

    @property
    def original(self) -> str | None:
        """Reference of the original model, with its commit, from the record."""
        return original_of(self.record)


def adapter_folder(path: str | Path) -> AdapterFolder:
    """The adapter in a folder, OUT or OUT/adapter, and its neighbours. Raises CheckpointError."""
    given, folder = str(path), resolved(local_path(path))
    if not is_folder(folder):
        raise CheckpointNotFound(f"{given}: no such folder; give the folder of an adapter")
    adapter = folder
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / "adapter" / ADAPTER_CONFIG).is_file():
        adapter = folder / "adapter"
    is_part = adapter.name == "adapter" and not (adapter / RECORD).is_file()
    out = adapter.parent if is_part else adapter
    saved_inside = adapter.name.endswith("_init")  # PEFT's names: pissa_init, olora_init, …
    residual = adapter.parent if saved_inside else out / "residual"
    anchor = out / "anchor"
    return AdapterFolder(
        given=given,
        adapter=adapter,
        residual=residual if _holds_model(residual) else None,
        anchor=anchor if (anchor / ADAPTER_CONFIG).is_file() else None,
        record=_record(out),
    )


def original_of(record: Mapping[str, Any]) -> str | None:
    """Reference of the original model of a geoscope.json, with its commit; None without one.

    A folder is given by its path. Raises CheckpointNotFound where it is no longer there.
    """
    base = record.get("base") or {}
    reference, commit = base.get("reference"), base.get("commit")
    if not reference:
        return None
    path = local_path(reference)
    is_local = not commit and (path.is_absolute() or bool(base.get("sha256")))
    if is_local and not exists(path):
        raise CheckpointNotFound(
            f"{reference}: the base that {RECORD} names is not there; give it with `base`"
        )
    if not commit or "@" in reference:
        return reference
    return _REPO.sub(rf"\g<0>@{commit}", reference, count=1)


def refuse_as_base(model: str) -> None:
    """Raises CheckpointError for a folder of an adapter, or of our output."""
    folder = local_path(model)
    if not is_folder(folder):
        return
    is_model = _holds_model(folder)
    record = record_beside(model) if is_model else adapter_folder(folder).record
    original = (record.get("base") or {}).get("reference")
    if is_model and record.get("layout") == "residual" and original:
        raise CheckpointError(
            f"{model}: is a base rewritten by init-adapter (the initial product is subtracted); "
            f"give the original model, {original}"
        )
    if not is_model and (record or (folder / ADAPTER_CONFIG).is_file()):
        raise CheckpointError(
            f"{model}: holds an adapter, but init-adapter needs a whole model; give "
            + (f"the original model, {original}" if original else "its base")
        )


def record_beside(model: str | None) -> Mapping[str, Any]:
    """geoscope.json of the run that wrote a residual model; {} for another folder."""
    if not model:
        return {}
    folder = resolved(local_path(model))
    return _record(folder.parent) if folder.name == "residual" and is_folder(folder) else {}


def _holds_model(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    return choose_layout(names, str(folder)) is not None


def _record(folder: Path) -> dict[str, Any]:
    try:
        text = small_text(folder / RECORD)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{folder / RECORD}: cannot be read: {reason(error)}") from None
    record = parse_object(text, str(folder / RECORD))
    if record.get("schema") != RECORD_SCHEMA:
        raise CheckpointError(
            f"{folder / RECORD}: schema is {shown(record.get('schema'))}, needs {RECORD_SCHEMA!r}; "
            "it is of another command or version: write the folder again with init-adapter"
        )
    _check_record(record, str(folder / RECORD))
    return record


def _check_record(record: Mapping[str, Any], label: str) -> None:
    """Raises CheckpointError for a field that none of our commands writes so."""
    check_fields(record, _FIELDS, label)
    base = record.get("base") or {}
    check_fields(base, _BASE_FIELDS, f"{label}, base")
    for name, table, form in (
        ("matrices", record.get("matrices"), TABLE),
        ("sha256 of base", base.get("sha256"), TEXT),
    ):
        check_fields(table or {}, dict.fromkeys(table or (), form), f"{label}, {name}")
