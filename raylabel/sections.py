"""The sections of the configuration: the only place where a setting has a name, a default and a sentence about it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NO_MODEL = "none"
"""The name that `subject.model` has where there are recorded activations and no model."""

Site = Literal["mlp_post", "mlp_mid", "resid_pre", "resid_mid", "resid_post", "attn_out"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class SubjectConfig(Section):
    model: str
    """Hub name, folder, TransformerLens name, or `demo`; `none` for recorded activations without their model."""
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


class CorpusConfig(Section):
    path: str | None = None
    """A .txt .jsonl .json .parquet file, a folder of them, a `datasets` folder or hub name, or `stdlib`."""
    tokens: Positive = 10_000_000
    """Tokens read at most."""
    column: str = "text"
    """Column or key that holds the text."""


class NeuroscopeConfig(Section):
    model: str | None = None
    """Neuroscope's name of the model."""
    url: str = "https://neuroscope.io"
    """Where the pages are."""
    requests_per_second: Annotated[float, Field(gt=0)] = 5
    """Rate limit of the whole cluster."""
    connections: Positive = 8
    """Connections of a worker at a time."""
    timeout: Annotated[float, Field(gt=0)] = 60
    """Seconds a request may take as a whole; to connect, and between two pieces of an answer, a third of it."""
    attempts: Positive = 5
    """Requests for a page at most, the first one counted."""
    max_bytes: Positive = 50_000_000
    """Bytes of a page at most, unpacked."""
    contact: str | None = None
    """E-mail or URL in the user agent, for whoever runs the site."""
    allow_private: bool = False
    """Whether addresses that are not on the public internet may be connected to."""
    cache: str | None = None
    """Folder or URL that keeps the pages as they came; null is `_pages` in the run directory."""
    refresh: bool = False
    """Ask the site whether pages that are kept have changed."""


class NeuronpediaConfig(Section):
    model: str | None = None
    """Neuronpedia's name of the model."""
    sources: list[str] = []
    """Source ids, e.g. 6-res-jb."""
    url: str = "https://www.neuronpedia.org"
    """The site's API, or the bulk export: a folder, or a URL that ends in /v1."""
    api_key_env: str = "NEURONPEDIA_API_KEY"
    """Environment variable that holds the API's key, where there is one."""
    requests_per_second: Annotated[float, Field(gt=0)] = 5
    """Rate limit of the whole cluster."""
    connections: Positive = 8
    """Connections of a worker at a time."""
    timeout: Annotated[float, Field(gt=0)] = 120
    """Seconds a request may take as a whole."""
    attempts: Positive = 5
    """Requests for a page or file at most, the first one counted."""
    allow_private: bool = False
    """Whether addresses that are not on the public internet may be connected to."""
    cache: str | None = None
    """Folder or URL that keeps what was fetched as it came; null is `_pages` in the run directory."""


class RecordedConfig(Section):
    path: str | None = None
    """File or folder of recorded activations."""
    format: str = "auto"
    """auto, openai, saedashboard, delphi, jsonl, parquet or arrow."""


class ExemplarsConfig(Section):
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


class IdentifyConfig(Section):
    window: Positive = 5
    """Tokens of the phrase on each side of the MAT."""
    vectors: str = "train"
    """`train` on the explain documents, or a fastText .bin file."""
    nearness: Literal["both", "vectors"] = "both"
    """What makes words alike: word vectors and the words that stand beside, or word vectors alone as originally."""
    weighting: Literal["sif", "mean"] = "sif"
    """Phrase vectors: SIF-weighted with the first component removed, or the plain mean as originally."""
    criterion: Literal["word", "meaning", "either"] = "either"
    """Which kinds of unit are flagged."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Least phrase similarity of a flagged unit."""
    fdr: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """False discovery rate of `meaning`; null asks for no significance."""


class VerifyConfig(Section):
    synonyms: Positive = 5
    """Nearest neighbours a word, and as many matched random words."""
    max_variants: Positive = 600
    """Variants a unit at most."""
    normalised: Share = 0.25
    """Least normalised activation of a verified unit."""
    normaliser: Literal["p99", "max"] = "p99"
    """Divide by the 99th percentile of the layer's top means, or by the layer's largest as originally."""


class OptimizeConfig(Section):
    units: Literal["verified", "flagged", "all"] = "verified"
    """Units to search concepts for."""
    judge: str = "demo"
    """The judge: hub name, folder or `demo`."""
    template: str | None = None
    """The judge's question, with the places |text|, |token| and, behind both, |concept|."""
    method: Literal["hybrid", "descent"] = "hybrid"
    """hybrid: proposals decided by discrete evaluation; descent: the published recipe."""
    positive: Share = 0.5
    """Tokens above this share of the maximum are examples of yes."""
    negative: Share = 0.05
    """Tokens below this share of the maximum are examples of no."""
    examples: Annotated[int, Field(ge=8)] = 64
    """Examples a unit and split at most, half of yes and half of no."""
    evaluations: Positive = 100
    """Candidates evaluated a unit at most, each on all of its examples."""
    c_entropy: float = 0.2
    """Weight of the entropy in descents."""
    c_entropy_start: float | None = None
    """Weight of the entropy at a descent's first step, from which it goes evenly to c_entropy; null: c_entropy throughout."""
    c_kl: float = 0.1
    """Weight of the divergence from the judge's own next word in descents."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the words' weights, in nats: a word whose cross-entropy is so much larger weighs 1/e of the best."""
    flip: Annotated[float, Field(ge=0, lt=0.5)] = 0.25
    """Share of examples whose label is taken to be wrong: a sure judge is not ruined by one of them."""
    first: Positive = 4
    """Examples on which a candidate is looked at first; the best go on to twice as many, and so on."""
    screening: Annotated[float, Field(gt=0, lt=1)] = 0.65
    """Share of the evaluations spent on first looks, gradients and descent; the rest decides among the best."""
    rounds: NonNegative = 4
    """Rounds of words proposed by gradients."""
    restarts: NonNegative = 2
    """Descents a unit that propose words."""
    steps: Auto | Positive = "auto"
    """Steps of a descent; auto is 40, or 150 with `method: descent`."""
    batch: Auto | Positive = "auto"
    """Examples a step of a descent; auto is 8, or 20 with `method: descent`."""
    lr: Annotated[float, Field(gt=0)] = 0.3
    """Learning rate of descents."""


class DescribeConfig(Section):
    explainer: str = "built-in"
    """`built-in`, or the name the explainer has in the tables; it then asks `model` at `base_url`."""
    units: Literal["verified", "flagged", "all"] = "verified"
    """Units the explainer is asked about; all others with exemplars get built-in labels."""
    prompt: Literal["phrases", "mats"] = "phrases"
    """What the explainer sees: marked exemplars, or the list of MATs as originally."""
    exemplars: Positive = 10
    """Exemplars shown."""
    model: str | None = None
    """Model name at the server; with `local`, a folder or a name of the hub."""
    base_url: str | None = None
    """OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; null is OpenAI's own; `local`: the workers run the model."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key, on every machine that runs workers."""
    timeout: Annotated[float, Field(gt=0)] = 120
    """Seconds a request may take."""
    concurrency: Positive = 64
    """Requests of a worker in flight at most; fewer while the server is slow or busy."""
    requests_per_minute: Positive | None = None
    """Limit of the whole cluster."""
    tokens_per_minute: Positive | None = None
    """Limit of the whole cluster, prompt and answer together."""
    usd_per_million_prompt: Annotated[float, Field(ge=0)] | None = None
    """Price of a million prompt tokens."""
    usd_per_million_completion: Annotated[float, Field(ge=0)] | None = None
    """Price of a million answered tokens."""
    budget_usd: Annotated[float, Field(ge=0)] | None = None
    """Money the run spends at most on labels and scores; needs both prices."""
    budget_tokens: NonNegative | None = None
    """Tokens the run spends at most on labels and scores."""


class ScoreConfig(Section):
    scorers: list[Literal["detection", "fuzzing", "simulation", "embedding", "judge"]] = ["judge"]
    """Tests of the labels."""
    units: Literal["verified", "flagged", "all"] = "flagged"
    """Units whose labels are tested."""
    window: Positive = 32
    """Tokens of a scored window."""
    negatives: Positive = 20
    """Silent windows a unit."""
    packing: Literal["packed", "peer"] = "packed"
    """All windows in a request, or one each."""


class ControlsConfig(Section):
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


class OutputConfig(Section):
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
