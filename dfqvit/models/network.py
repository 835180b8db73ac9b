"""What rebuilds a network of the user's own: a function of an importable module, named in the file, never pickled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, first_line
from .spec import structural_difference

Build = str | Callable[[], nn.Module]
_OURS = __name__.split(".")[0] + "."


@dataclass(frozen=True)
class NetworkSpec:
    """What makes a network's structure again.

    Args:
        build_by: "module:function"; the function takes nothing and gives the float network. "" where none was given: such a model
            cannot be saved.
        input_size: (channels, height, width) of the images.
        survey: what `NetworkAdapter` found of the network, as plain values.
        function: what may be called for it; in no file. None until the user, or `trusted`, says so.
    """

    build_by: str
    input_size: tuple[int, int, int]
    survey: dict[str, Sequence[str]] = field(default_factory=dict)
    function: Build | None = field(default=None, compare=False)

    @property
    def architecture(self) -> str:
        """For people: where the network comes from."""
        return self.build_by or "a network"

    @property
    def kwargs(self) -> dict[str, Any]:
        """None: the function takes nothing."""
        return {}

    def keywords(self) -> dict[str, Any]:
        """None, as `kwargs`."""
        return {}

    def build(self, device: torch.device | str | None = None) -> nn.Module:
        """The structure, in eval mode, made on the CPU whatever `device` is: the function may load weights.

        Raises:
            UsageError: there is no such function, or it does not give a network.
        """
        if self.function is None:
            raise UsageError(
                "the network was quantized without build; give dfqvit.quantize build='module:function', which makes the network"
            )
        model = built(self.function).eval()
        model.dfqvit_spec = self  # type: ignore[assignment]
        model.dfqvit_survey = {key: tuple(names) for key, names in self.survey.items()}  # type: ignore[assignment]
        return model


def name_of(build: Build) -> str:
    """ "module:function" of what may be given as `build`; a text is checked to name one that can be imported."""
    if isinstance(build, str):
        find(build)
        return build
    name = getattr(build, "__qualname__", "")
    if not callable(build) or not name or "<" in name:
        raise UsageError(f"build was {build!r}; it may be 'module:function' or a function of a module")
    return f"{build.__module__}:{name}"


def find(name: str) -> Callable[[], Any]:
    """The function that "module:function" names; UsageError where there is none."""
    home, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*home.split("."), *attribute.split("."))):
        raise UsageError(
            f"build was '{name}'; it must be 'module:function', a function of a module that can be imported"
        )
    try:
        found: Any = importlib.import_module(home)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module raises
        raise UsageError(f"build was '{name}', which could not be imported ({first_line(error)})") from error
    if not callable(found):
        raise UsageError(f"build was '{name}', a {type(found).__name__}; it must be a function")
    return found


def built(build: Build) -> nn.Module:
    """What the function gives when it is called without arguments; UsageError unless that is a module."""
    function = find(build) if isinstance(build, str) else build
    name = build if isinstance(build, str) else getattr(build, "__qualname__", repr(build))
    try:
        with torch.device("cpu"):
            model = function()
    except Exception as error:  # whatever the function raises
        raise UsageError(
            f"build was '{name}', which failed when it was called without arguments ({first_line(error)})"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"build was '{name}', which gave a {type(model).__name__}; it must give an nn.Module")
    return model


def check_build(network: nn.Module, build: Build) -> str:
    """The name of a `build` that makes the structure of `network`; UsageError says what differs."""
    name = name_of(build)
    difference = structural_difference(network, built(build).eval())
    if difference:
        raise UsageError(f"build was '{name}', which makes another network ({difference})")
    return name


def trusted(spec: Any, path: str, build: Build | None) -> Any:
    """The spec of a file by whose function the network may be built: the user's `build`, or one of dfqvit itself.

    Importing what a file names runs code, so nothing else is imported without the user's word.

    Raises:
        UsageError: the file needs a `build` and there is none, or it needs none and there is one.
    """
    if not isinstance(spec, NetworkSpec):
        if build is not None:
            raise UsageError(f"build was given; '{path}' holds timm's '{spec.architecture}', which needs none")
        return spec
    if build is not None:
        built(build)
        return replace(spec, function=build)
    if spec.build_by.startswith(_OURS):
        return replace(spec, function=spec.build_by)
    raise UsageError(
        f"'{path}' holds a network that '{spec.build_by}' builds; give build='{spec.build_by}' if you trust that code to run"
    )


def network_spec(values: Mapping[str, Any]) -> NetworkSpec:
    """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
    survey: dict[str, Sequence[str]] = {key: tuple(names) for key, names in values["survey"].items()}
    channels, height, width = values["input_size"]
    return NetworkSpec(values["build_by"], (channels, height, width), survey)
