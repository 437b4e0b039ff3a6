"""What ``additional_config["mmflex"]`` says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmflex.ir import pattern as ir
from mmflex.ir.pattern import Pattern
from mmflex.runtime.backends import BACKENDS
from mmflex.tuning.config import Config, Spec, checked_spec, load_config, per_layer
from mmflex.tuning.default import default_named

KEY = "mmflex"
"""Name of the entry in vLLM's ``additional_config``."""

_FIELDS = ("backend", "config", "spec", "threshold")


@dataclass(frozen=True)
class Settings:
    """Attributes:
    spec: what every layer's heads may see.
    threshold: new tokens of a request in a step from which on it is accelerated; None: where the cost model says.
    backend: as in `mmflex.attention`.
    """

    spec: Spec | Config
    threshold: int | None = None
    backend: str = "auto"

    def for_model(self, layers: int, heads: int) -> dict[int, tuple[Pattern, ...]]:
        """The patterns of every layer's heads; ValueError where the model has other numbers of them."""
        if isinstance(self.spec, Config):
            return self.spec.for_model(layers, heads)
        return per_layer(self.spec, range(layers), heads)


def read_settings(additional_config: Any) -> Settings | None:
    """The settings in vLLM's ``additional_config``; None where mmflex is off.

    ``"off"`` (or nothing) is off; ``"default"`` (or ``"default:high"``, ``"default:fast"``: `mmflex.default_spec`) and
    the path of a config file stand for ``{"config": ...}``. Else an object with one of ``config`` (these too) and
    ``spec`` (a pattern as JSON, a list with one per query head, or an object of either by layer number), and optionally
    ``threshold`` and ``backend``.

    Raises:
        ValueError: anything else; it says which field and what is expected.
        FileNotFoundError: no such config file.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given in (None, False, "off"):
        return None
    if isinstance(given, str):
        given = {"config": given}
    where = f'additional_config["{KEY}"]'
    if not isinstance(given, Mapping):
        raise ValueError(f'{where} is {given!r}: give "off", "default", the path of a config, or an object')
    unknown = sorted(set(given) - set(_FIELDS), key=str)
    if unknown:
        raise ValueError(f"{where} has unknown fields {', '.join(map(repr, unknown))}: known are {', '.join(_FIELDS)}")
    if ("spec" in given) == ("config" in given):
        raise ValueError(f"{where} needs one of spec and config, got {', '.join(sorted(given)) or 'neither'}")
    threshold = given.get("threshold")
    if threshold is not None and (not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 1):
        raise ValueError(f"{where}: threshold is {threshold!r}: give a number of tokens, 1 or more")
    backend = given.get("backend", "auto")
    if backend != "auto" and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"{where}: unknown backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    spec: Spec | Config
    if "spec" in given:
        spec = _spec(given["spec"], f"{where}: spec")
    elif not isinstance(given["config"], str):
        raise ValueError(f'{where}: config is {given["config"]!r}: give the path of a file, or "default"')
    else:
        default = default_named(given["config"])
        spec = load_config(given["config"]) if default is None else default
    return Settings(spec, threshold, backend)


def _spec(data: Any, where: str) -> Spec:
    """A spec of its JSON form."""
    if isinstance(data, Mapping) and "pattern" not in data:
        wrong = [layer for layer in data if not str(layer).isdecimal()]
        if wrong or not data:
            raise ValueError(
                f'{where}: {wrong or "{}"}: give a pattern, {{"pattern": name, ...}}, or one by layer number'
            )
        numbers = [int(layer) for layer in data]
        twice = {number for number in numbers if numbers.count(number) > 1}
        if twice:
            raise ValueError(f"{where}: layer {min(twice)} has two entries: give one")
        return {int(layer): _heads(value, f"{where}[{layer!r}]") for layer, value in data.items()}
    return _heads(data, where)


def _heads(data: Any, where: str) -> Pattern | tuple[Pattern, ...]:
    if isinstance(data, (list, tuple)):
        return tuple(_pattern(item, f"{where}[{head}]") for head, item in enumerate(data))
    return _pattern(data, where)


def _pattern(data: Any, where: str) -> Pattern:
    try:
        return ir.from_json({"version": ir.VERSION, **data} if isinstance(data, Mapping) else data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def options(
    spec: Spec | Config | str | os.PathLike[str], *, threshold: int | None = None, backend: str = "auto"
) -> dict[str, Any]:
    """vLLM's ``additional_config`` for a spec given in Python: ``LLM(model, additional_config=options(spec))``.

    Args:
        spec: a pattern, a sequence with one per query head, either by layer number, or a `Config`. Also the text that
            `read_settings` takes: ``"default"``, ``"default:high"``, ``"off"`` or the path of a config file, which the
            engine reads.
        threshold, backend: as in `Settings`; with ``"off"`` they have no effect.

    Raises:
        TypeError: a spec that is none of these.
        ValueError, FileNotFoundError: what the engine would refuse, as `read_settings` does.
    """
    if isinstance(spec, str) and spec == "off":
        return {KEY: "off"}
    given: dict[str, Any] = {"backend": backend}
    if threshold is not None:
        given["threshold"] = threshold
    if isinstance(spec, (str, os.PathLike)):
        given["config"] = os.fspath(spec)
    else:
        try:
            given["spec"] = _json(checked_spec(spec.patterns if isinstance(spec, Config) else spec))
        except TypeError as error:
            raise TypeError(f'{error}; give patterns, a Config, "default", "off" or the path of a config') from None
    read_settings({KEY: given})
    return {KEY: given}


def _json(spec: Spec) -> Any:
    if isinstance(spec, Pattern):
        return spec.to_json()
    if isinstance(spec, Mapping):
        return {str(layer): _json(value) for layer, value in spec.items()}
    return [_json(item) for item in spec]
