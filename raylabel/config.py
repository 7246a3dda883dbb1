"""RunConfig: the whole configuration as one pydantic tree, the only place a setting has a name and a default.

`load_config(path, overrides)` reads YAML and `--set key.path=value` overrides and raises BadInput with one line that
names the key. Keys of stages that are not part of this version are accepted; `unused_keys` lists those that were set.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from raylabel.errors import BadInput

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Site = Literal["mlp_post", "mlp_mid", "resid_pre", "resid_mid", "resid_post", "attn_out"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class SubjectConfig(_Section):
    model: str
    """Hub name, folder, TransformerLens name, or `demo`."""
    revision: str | None = None
    """Hub revision of the model."""
    units: Literal["all"] | list[tuple[NonNegative, NonNegative]] | str = "all"
    """`all`, a list of [layer, neuron], or a JSON file that holds such a list."""
    layers: Literal["all"] | list[NonNegative] = "all"
    """`all` or the layers wanted."""
    neurons: Literal["all"] | tuple[NonNegative, NonNegative] = "all"
    """`all` or [first, last) in every layer."""
    site: Site = "mlp_post"
    """Hook point the activations are read at."""
    latents: str | None = None
    """Folder or release of SAEs or transcoders: their latents are the units, and they name the layers and the site."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens a sample, BOS included."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether samples begin with BOS; auto does as the model's tokenizer does."""
    polarity: Literal["auto", "both", "positive", "quadrants"] = "auto"
    """auto: both ends of units at signed sites and of gated MLPs, else the high end; quadrants: gate > 0 (±1) or not (±2)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward pass; auto is float32 on CPU, the checkpoint's own on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch: Auto | Positive = "auto"
    """Samples a forward pass, rounded down to a power of two."""
    gpus_per_worker: Auto | Annotated[float, Field(gt=0, le=1)] | Positive = "auto"
    """GPUs a worker holds: a share such as 0.5 puts two on one, a model is spread over more; auto is 1 where it fits."""
    trust_remote_code: bool = False
    """Run code that a model repository brings along."""


class CorpusConfig(_Section):
    path: str | None = None
    """A .txt .jsonl .json .parquet file, a folder of them, a `datasets` folder or hub name, or `stdlib`."""
    tokens: Positive = 10_000_000
    """Tokens read at most."""
    column: str = "text"
    """Column or key that holds the text."""


class NeuroscopeConfig(_Section):
    model: str | None = None
    """Neuroscope's name of the model."""
    url: str = "https://neuroscope.io"
    """Where the pages are."""
    requests_per_second: Annotated[float, Field(gt=0)] = 5
    """Rate limit of the whole cluster."""


class NeuronpediaConfig(_Section):
    model: str | None = None
    """Neuronpedia's name of the model."""
    sources: list[str] = []
    """Source ids, e.g. 6-res-jb."""
    url: str = "https://www.neuronpedia.org"
    """API or bulk export."""


class RecordedConfig(_Section):
    path: str | None = None
    """File or folder of recorded activations."""
    format: str = "auto"
    """Format of the files."""


class ExemplarsConfig(_Section):
    source: Literal["corpus", "neuroscope", "neuronpedia", "recorded"] = "corpus"
    """Where exemplars come from."""
    top: Positive = 20
    """Top exemplars a unit in the explain split; half as many in the score split."""
    quantile: NonNegative = 10
    """Exemplars a unit and split spread over the quantiles of the samples it fires in."""
    random: NonNegative = 10
    """Samples a split drawn at random, the same for all units."""
    before: NonNegative = 50
    """Tokens kept before the MAT."""
    after: NonNegative = 10
    """Tokens kept after the MAT."""
    sink_factor: Annotated[float, Field(gt=1)] = 10
    """Positions whose residual norm exceeds this many medians are attention sinks and do not count."""
    corpus: CorpusConfig = CorpusConfig()
    """Text to scan."""
    neuroscope: NeuroscopeConfig = NeuroscopeConfig()
    """Pages to fetch."""
    neuronpedia: NeuronpediaConfig = NeuronpediaConfig()
    """Features to fetch."""
    recorded: RecordedConfig = RecordedConfig()
    """Files to read."""


class IdentifyConfig(_Section):
    window: Positive = 5
    """Tokens of the phrase on each side of the MAT."""
    vectors: str = "train"
    """`train` on the explain documents, or a fastText .bin file."""
    weighting: Literal["sif", "mean"] = "sif"
    """Phrase vectors: SIF-weighted with the first component removed, or the plain mean as originally."""
    criterion: Literal["word", "meaning", "either"] = "either"
    """Which kinds of unit are flagged."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Least phrase similarity of a flagged unit."""
    fdr: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """False discovery rate of `meaning`; null asks for no significance."""


class VerifyConfig(_Section):
    synonyms: Positive = 5
    """Nearest neighbours a word, and as many matched random words."""
    max_variants: Positive = 600
    """Variants a unit at most."""
    normalised: Share = 0.25
    """Least normalised activation of a verified unit."""
    normaliser: Literal["p99", "max"] = "p99"
    """Divide by the 99th percentile of the layer's top means, or by the layer's largest as originally."""


class OptimizeConfig(_Section):
    units: Literal["verified", "flagged", "all"] = "verified"
    """Units to search concepts for."""
    judge: str = "demo"
    """The judge: hub name, folder or `demo`."""
    template: str | None = None
    """The judge's question."""
    method: Literal["hybrid", "descent"] = "hybrid"
    """Search method."""
    positive: Share = 0.5
    """Tokens above this share of the maximum are examples of yes."""
    negative: Share = 0.05
    """Tokens below this share of the maximum are examples of no."""
    examples: Positive = 64
    """Examples a unit."""
    evaluations: Positive = 100
    """Candidates evaluated a unit at most."""
    c_entropy: float = 0.2
    """Weight of the entropy."""
    c_kl: float = 0.1
    """Weight of the divergence from the judge's own next word."""


class DescribeConfig(_Section):
    explainer: str = "built-in"
    """`built-in`, or an explainer model's name for the table."""
    prompt: Literal["phrases", "mats"] = "phrases"
    """What the explainer sees."""
    exemplars: Positive = 10
    """Exemplars shown."""
    model: str | None = None
    """Model name at the server."""
    base_url: str | None = None
    """OpenAI-compatible server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    budget_usd: float | None = None
    """Money to spend at most."""
    budget_tokens: int | None = None
    """Tokens to spend at most."""


class ScoreConfig(_Section):
    scorers: list[Literal["detection", "fuzzing", "simulation", "embedding", "judge"]] = ["judge"]
    """Tests of the labels."""
    window: Positive = 32
    """Tokens of a scored window."""
    negatives: Positive = 20
    """Silent windows a unit."""
    packing: Literal["packed", "peer"] = "packed"
    """All windows in a request, or one each."""


class ControlsConfig(_Section):
    decoys: NonNegative = 256
    """Random directions a layer."""
    nulls: NonNegative = 0
    """Meaningless functions of text a layer."""
    planted: NonNegative = 0
    """Units of known meaning a layer."""
    lists: str = "built-in"
    """Word lists of planted units: a JSON file {name: [words]}."""


def _stages(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


class OutputConfig(_Section):
    out: str = "runs/default"
    """The run directory: a path or an fsspec URL."""
    stages: Annotated[Literal["all"] | list[str], BeforeValidator(_stages)] = "all"
    """Stages to run."""
    format: Literal["parquet", "arrow"] = "parquet"
    """File format of the tables."""
    seed: NonNegative = 0
    """Seed of everything drawn at random."""
    max_failures: Share = 0.01
    """Share of a stage's neurons that may fail before the run stops."""
    address: str = "local"
    """inline, local, auto or HOST:PORT of a Ray cluster."""
    workers: Auto | Positive = "auto"
    """Workers of a stage; auto is one a GPU, or one a CPU core."""


ORIGINAL: dict[str, dict[str, Any]] = {
    "identify": {"weighting": "mean", "similarity": 0.6, "fdr": None, "criterion": "either"},
    "verify": {"synonyms": 5, "normalised": 0.5, "normaliser": "max"},
    "optimize": {"method": "descent"},
    "describe": {"prompt": "mats"},
}


class RunConfig(_Section):
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


UNUSED = {
    "optimize": "the concept search is not part of this version",
    "describe": "labels are built from the MAT words in this version",
    "score": "label scores are not part of this version",
}
"""Keys that are part of the configuration but that nothing reads yet, and why."""


def build_config(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Validates a tree of plain values; BadInput names the first key that is wrong and the nearest known one."""
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: expected keys and values, e.g. `subject: {{model: gpt2}}`")
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{where}: {_explain(error)}") from None


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
    except yaml.YAMLError as error:
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


def unused_keys(config: RunConfig) -> list[str]:
    """One line for each setting that was given and that nothing reads in this version."""
    lines = []
    for key, why in UNUSED.items():
        node: Any = config
        *sections, last = key.split(".")
        for name in sections:
            node = getattr(node, name)
        if last in node.model_fields_set:
            given = getattr(node, last)
            if isinstance(given, BaseModel) and not given.model_fields_set:
                continue
            lines.append(f"{key} is not used: {why}")
    return lines


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
