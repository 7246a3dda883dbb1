"""RunConfig: the whole configuration as one pydantic tree; its sections are in `sections`.

`load_config(path, overrides)` reads YAML and `--set key.path=value` overrides and raises BadInput with one line that
names the key.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from raylabel.errors import BadInput
from raylabel.sections import (
    ControlsConfig,
    DescribeConfig,
    ExemplarsConfig,
    IdentifyConfig,
    OptimizeConfig,
    OutputConfig,
    ScoreConfig,
    Section,
    SubjectConfig,
    VerifyConfig,
)  # fmt: skip

ORIGINAL: dict[str, dict[str, Any]] = {
    "identify": {"nearness": "vectors", "weighting": "mean", "similarity": 0.6, "fdr": None, "criterion": "either"},
    "verify": {"synonyms": 5, "normalised": 0.5, "normaliser": "max"},
    "optimize": {"method": "descent", "c_entropy": 0.2, "c_kl": 0.2},
    "describe": {"prompt": "mats"},
}


class RunConfig(Section):
    preset: Literal["default", "original"] = "default"
    """`original` sets the published methods' own definitions and thresholds where nothing else is given."""
    subject: SubjectConfig
    """The model under study."""
    exemplars: ExemplarsConfig = ExemplarsConfig()
    """Where exemplars come from, and how many."""
    identify: IdentifyConfig = IdentifyConfig()
    """Do the exemplars mean alike?"""
    verify: VerifyConfig = VerifyConfig()
    """Does the activation hold when words are replaced?"""
    optimize: OptimizeConfig = OptimizeConfig()
    """Concept search."""
    describe: DescribeConfig = DescribeConfig()
    """Labels in words."""
    score: ScoreConfig = ScoreConfig()
    """Tests of the labels."""
    controls: ControlsConfig = ControlsConfig()
    """Units whose answer is known."""
    run: OutputConfig = OutputConfig()
    """Where and how to run."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        """An empty section is a section without settings; a preset gives what is not given."""
        if not isinstance(tree, dict):
            return tree
        tree = {name: {} if value is None and name != "preset" else value for name, value in tree.items()}
        if tree.get("preset") == "original":
            for section, values in ORIGINAL.items():
                given = tree.get(section, {})
                if isinstance(given, BaseModel):
                    given = given.model_dump(exclude_unset=True)
                if isinstance(given, dict):
                    tree[section] = {**values, **given}
        return tree


def build_config(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Validates a tree of plain values; BadInput names the first key that is wrong and the nearest known one."""
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: expected keys and values, e.g. `subject: {{model: gpt2}}`")
    refuse_secrets(tree, where)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{where}: {_explain(error)}") from None


def refuse_secrets(tree: Any, where: str, key: str = "") -> None:
    """BadInput for a password in a URL or a key where its variable's name belongs: settings are written to run.json."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            refuse_secrets(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, str):
        if key.endswith("_key_env") and not tree.isidentifier():
            raise BadInput(f"{where}: {key}: should be the name of an environment variable that holds the key, not the key")
        if "://" in tree and "@" in tree.split("://", 1)[1].partition("/")[0]:
            raise BadInput(f"{where}: {key}: holds a user name or password; take it out, secrets come from the environment")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration in the YAML file `path` with `key.path=value` overrides applied (values are YAML).

    Relative paths in the file stay relative to the working directory. BadInput if the file is missing or wrong.
    """
    file = Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise BadInput(f"{path}: not valid YAML" + (f", line {mark.line + 1}" if mark else "")) from None
    tree = {} if tree is None else tree
    return build_config(apply_overrides(tree, overrides or []) if isinstance(tree, dict) else tree, str(path))


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`tree` with each `a.b.c=value` set; missing sections are made."""
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise BadInput(f"--set {item}: expected key.path=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BadInput(f"--set {item}: the value is not valid YAML") from None
        node = tree
        *sections, last = key.split(".")
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise BadInput(f"--set {item}: {name} has no keys below it")
        node[last] = parsed
    return tree


def listed_units(subject: SubjectConfig) -> list[tuple[int, int]] | None:
    """The (layer, neuron) pairs of `subject.units`, out of its file if it names one; None for `all`."""
    if not isinstance(subject.units, str):
        return list(subject.units)
    if subject.units == "all":
        return None
    try:
        pairs = json.loads(Path(subject.units).read_text(encoding="utf-8"))
        return [(int(layer), int(neuron)) for layer, neuron in pairs]
    except FileNotFoundError:
        raise BadInput(f"subject.units: no such file: {subject.units}") from None
    except (ValueError, TypeError, UnicodeDecodeError):
        raise BadInput(f"subject.units: {subject.units} is not a JSON list of [layer, neuron]") from None


def _explain(error: ValidationError) -> str:
    errors = error.errors()
    # A misspelt key also makes the right one missing: the misspelling is what helps.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "extra_forbidden":
        *parts, last = [str(p) for p in first["loc"]]
        near = difflib.get_close_matches(last, _known(parts), n=1, cutoff=0.0)
        return f"unknown key {'.'.join([*parts, last])}" + (f"; did you mean {'.'.join([*parts, near[0]])}?" if near else "")
    key = _key(first["loc"])
    if key in ("subject", "subject.model") and first["type"] == "missing":
        return "subject.model is required, e.g. subject.model: demo"
    if first["type"] == "model_type":
        return f"{key}: expected keys and values below it, not {first['input']!r}"
    wanted = dict.fromkeys(_wish(e) for e in errors if _key(e["loc"]) == key or _key(e["loc"]).startswith(f"{key}."))
    if key == "describe.api_key_env":
        # What was given may be the key itself.
        return f"{key}: should be the name of an environment variable, not the key"
    return f"{key}: should be {' or '.join(wanted)}, not {first['input']!r}"


def _key(place: tuple[int | str, ...]) -> str:
    """The setting an error is about, without pydantic's names for the kinds of value that were tried."""
    parts: list[str] = []
    for part in place:
        if isinstance(part, int) or part in _known(parts):
            parts.append(str(part))
    return ".".join(parts) or ".".join(map(str, place))


def _wish(error: Any) -> str:
    if error["type"] == "missing":
        return "a longer list"
    text = str(error["msg"]).removeprefix("Input should be ")
    return text if text != error["msg"] else text[:1].lower() + text[1:]


def _known(parts: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for name in parts:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
