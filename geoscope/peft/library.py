"""How is an adapter read whose type has no reader here? PEFT itself merges it, module by module.

The extra `[peft]` has to be there. For each module a model of one linear layer is made in fp64 with
the base's weight, adapted by the config, given the tensors of the file that are the module's, and
merged. Only types whose modules know nothing of one another are taken (`LIBRARY_TYPES`). The update
is dense.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.names import without_wrappers
from geoscope.peft.keys import MERGE
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LIBRARY_TYPES", "LibraryModule", "library_modules"]

# Types of PEFT whose merge of a module takes the tensors of this module alone and leaves its bias.
LIBRARY_TYPES = (
    *("C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "OSF", "PEANUT", "SHIRA"),
    *("SUPERTUNING", "WAVEFT"),
)
# Fields of a config about a whole model: here is one module, and it is named.
_OF_A_MODEL = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type"),
)


@dataclass(frozen=True, kw_only=True)
class LibraryModule(AdapterModule):
    """A module that PEFT merges. keys: stored name → how PEFT calls it in the model of one module.
    config: adapter_config.json."""

    keys: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        return "base"

    @property
    def called(self) -> str:
        return str(self.config["peft_type"])

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        raise self.no_factors()

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        self.check_fits(tuple(weight.shape))
        state = {key: read(stored) for stored, key in self.keys.items()}
        with warnings.catch_warnings():  # of PEFT about its own defaults
            warnings.simplefilter("ignore")
            return _merged(weight.double(), self.name, self.path, self.config, state)


def library_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, LibraryModule]:
    """Every adapted module by name. Raises UnsupportedFormat without the extra, and for Conv1D;
    CheckpointError where the file has no tensors of the type."""
    kind = config["peft_type"]
    try:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    except ImportError:
        raise UnsupportedFormat(
            f"{label}: {kind} is read through PEFT, which is not installed; run "
            f"`pip install 'geoscope[peft]'`. {MERGE}"
        ) from None
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind)
    if prefix is None:
        raise UnsupportedFormat(
            f"{label}: {kind} is read through PEFT, and the one that is installed does not know "
            "it; upgrade it"
        )
    if config.get("fan_in_fan_out"):
        raise UnsupportedFormat(
            f"{label}: {kind} of Conv1D layers (fan_in_fan_out), which is not read. {MERGE}"
        )
    key = re.compile(rf"(?P<path>.+?)\.{prefix}\w*(?:\..+)?")
    stored: dict[str, dict[str, str]] = {}
    for name in tensors:
        bare = without_wrappers(name)
        if (match := key.fullmatch(bare)) is not None:
            stored.setdefault(match["path"], {})[name] = f"base_model.model.{bare}"
    if not stored:
        raise CheckpointError(
            f"{label}: none of its {len(tensors)} tensors is of {kind}; save the adapter again "
            "with PeftModel.save_pretrained"
        )
    return {
        path: LibraryModule(
            name=path,
            path=path,
            shape=(0, 0),
            rank=0,
            scaling=1.0,
            stored=tuple(tensors[name] for name in keys if "float" in tensors[name].dtype),
            keys=keys,
            config=config,
        )
        for path, keys in stored.items()
    }


def _merged(
    weight: Tensor, name: str, path: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Tensor:
    """The weight as PEFT merges the module's tensors into it, fp64."""
    import peft
    from peft.utils import set_peft_model_state_dict

    chosen = {**config, "target_modules": [path], "inference_mode": True}
    chosen |= {field: None for field in _OF_A_MODEL if field in config}
    made = peft.PeftConfig.from_peft_type(**chosen)
    adapted = peft.get_peft_model(_alone(path, weight), made)  # pyright: ignore[reportArgumentType]
    adapted = adapted.double()
    result = set_peft_model_state_dict(adapted, dict(state))
    lacking = [key for key in result.missing_keys if key.startswith(f"base_model.model.{path}.")]
    lacking = [key for key in lacking if ".base_layer." not in key]
    if result.unexpected_keys or lacking:
        first = (*result.unexpected_keys, *lacking)[0]
        raise CheckpointError(
            f"{name}: PEFT does not load its tensors, first {first}; factors and "
            "adapter_config.json are of different saves, or of another PEFT: copy both again"
        )
    layer: Any = adapted.merge_and_unload().get_submodule(path)
    return layer.weight.detach().clone()


def _alone(path: str, weight: Tensor) -> nn.Module:
    """A model of one linear layer of that path."""
    from torch import nn

    root = here = nn.Module()
    *above, last = path.split(".")
    for part in above:
        inner = nn.Module()
        here.add_module(part, inner)
        here = inner
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    here.add_module(last, layer)
    return root
