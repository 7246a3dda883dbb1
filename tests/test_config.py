"""The configuration tree: every key of the contract, what is wrong said by its name, overrides, presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raylabel.config import RunConfig, apply_overrides, build_config, load_config, unused_keys
from raylabel.errors import BadInput

CONTRACT = """
preset: default
subject: {model: gpt2, revision: null, units: all, layers: all, neurons: all, site: mlp_post, latents: null, context: 128,
          bos: auto, polarity: auto, dtype: auto, device: auto, batch: auto, gpus_per_worker: auto}
exemplars:
  source: corpus
  top: 20
  quantile: 10
  random: 10
  before: 50
  after: 10
  sink_factor: 10
  corpus: {path: text/, tokens: 10_000_000}
  neuroscope: {model: solu-8l-pile, url: "https://neuroscope.io", requests_per_second: 5}
  neuronpedia: {model: gpt2-small, sources: [6-res-jb], url: "https://www.neuronpedia.org"}
  recorded: {path: activations.parquet, format: auto}
identify: {window: 5, vectors: train, weighting: sif, criterion: either, similarity: null, fdr: 0.05}
verify: {synonyms: 5, max_variants: 600, normalised: 0.25, normaliser: p99}
optimize: {units: verified, judge: demo, template: null, method: hybrid, positive: 0.5, negative: 0.05, examples: 64,
           evaluations: 100, c_entropy: 0.2, c_kl: 0.1}
describe: {explainer: built-in, prompt: phrases, exemplars: 10, model: null, base_url: null, api_key_env: OPENAI_API_KEY,
           budget_usd: null, budget_tokens: null}
score: {scorers: [judge], window: 32, negatives: 20}
controls: {decoys: 256, nulls: 0, planted: 0, lists: built-in}
run: {out: runs/gpt2, stages: all, format: parquet, seed: 0, max_failures: 0.01, address: local, workers: auto}
"""
MINIMAL = {"subject": {"model": "gpt2"}}
NO_DEFAULT = {("exemplars", "corpus", "path"), ("exemplars", "neuroscope", "model"), ("exemplars", "neuronpedia", "model"),
              ("exemplars", "neuronpedia", "sources"), ("exemplars", "recorded", "path"), ("run", "out")}  # fmt: skip


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> value of all plain values."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        found |= leaves(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
    return found


def test_every_key_of_the_contract_is_known_with_its_default() -> None:
    written = leaves(yaml.safe_load(CONTRACT))
    build_config(yaml.safe_load(CONTRACT))
    default = leaves(build_config({"subject": {"model": "gpt2"}}).model_dump(mode="json"))
    assert set(written) <= set(default)
    for key in set(written) - NO_DEFAULT:
        assert default[key] == written[key], key


def test_every_field_says_what_it_is() -> None:
    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                check(kind)
            assert field.description or name in ("model",), name

    for section in RunConfig.model_fields.values():
        check(section.annotation) if hasattr(section.annotation, "model_fields") else None


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"subject": {"modle": "a"}}, "unknown key subject.modle; did you mean subject.model?"),
        ({"subjet": {"model": "a"}}, "unknown key subjet; did you mean subject?"),
        ({**MINIMAL, "exemplars": {"corpus": {"tokns": 5}}}, "unknown key exemplars.corpus.tokns; did you mean "
         "exemplars.corpus.tokens?"),
        ({**MINIMAL, "verfiy": {}}, "unknown key verfiy; did you mean verify?"),
        ({}, "subject.model is required, e.g. subject.model: demo"),
        ({"subject": {}}, "subject.model is required, e.g. subject.model: demo"),
        ({"subject": "gpt2"}, "subject: expected keys and values below it, not 'gpt2'"),
        ({**MINIMAL, "controls": 5}, "controls: expected keys and values below it, not 5"),
        ({"subject": None}, "subject.model is required, e.g. subject.model: demo"),
        ({"subject": {"model": "a", "layers": 5}}, "subject.layers: should be 'all' or a valid list, not 5"),
        ({"subject": {"model": "a", "layers": [-1]}}, "subject.layers: should be 'all' or greater than or equal to 0, not [-1]"),
        ({"subject": {"model": "a", "neurons": [3]}}, "subject.neurons: should be 'all' or a longer list, not [3]"),
        ({"subject": {"model": "a", "batch": 0}}, "subject.batch: should be 'auto' or greater than 0, not 0"),
        ({"subject": {"model": "a", "context": 1}}, "subject.context: should be greater than or equal to 2, not 1"),
        ({**MINIMAL, "identify": {"fdr": 1}}, "identify.fdr: should be less than 1, not 1"),
        ({**MINIMAL, "score": {"scorers": ["luck"]}}, "score.scorers.0: should be 'detection', 'fuzzing', "
         "'simulation', 'embedding' or 'judge', not 'luck'"),
        ({**MINIMAL, "preset": "new"}, "preset: should be 'default' or 'original', not 'new'"),
        ({**MINIMAL, "run": {"max_failures": 2}}, "run.max_failures: should be less than or equal to 1, not 2"),
        ({**MINIMAL, "run": {"workers": "many"}}, "run.workers: should be 'auto' or a valid integer"),
        (
            {"subject": {"model": "a", "gpus_per_worker": 1.5}},
            "subject.gpus_per_worker: should be 'auto' or less than or equal to 1",
        ),
        ({"subject": {"model": "a", "gpus_per_worker": 0}}, "subject.gpus_per_worker: should be 'auto' or greater than 0"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(tree: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput) as error:
        build_config(tree, "c.yaml")
    assert str(error.value).startswith(f"c.yaml: {complaint}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"subject: {model: a", "not valid YAML, line"),
        (b"subject:\n\tmodel: a", "not valid YAML, line 2"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"", "subject.model is required"),
        (b"- a\n- b", "expected keys and values"),
        (b"just words", "expected keys and values"),
        (b"0", "expected keys and values"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    for overrides in ([], ["run.out=x"]):
        with pytest.raises(BadInput) as error:
            load_config(path, overrides)
        assert str(error.value).startswith(f"{path}: {complaint}")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"c\.yaml: no such config file"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        load_config(tmp_path)


def test_a_python_tag_in_yaml_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"subject: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(BadInput, match="not valid YAML"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_overrides_are_yaml_values_at_a_path(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("subject: {model: a}\nverify: {synonyms: 3}")
    given = ["subject.layers=[1, 2]", "verify.normalised=.5", "exemplars.corpus.path=a=b.txt", "identify.fdr=null",
             "run.stages=tokenize,scan", "preset=original"]  # fmt: skip
    config = load_config(path, given)
    assert config.subject.layers == [1, 2]
    assert (config.verify.synonyms, config.verify.normalised, config.verify.normaliser) == (3, 0.5, "max")
    assert config.exemplars.corpus.path == "a=b.txt"
    assert config.identify.fdr is None
    assert config.run.stages == ["tokenize", "scan"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("verify.synonyms", "--set verify.synonyms: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("verify.synonyms=[", "--set verify.synonyms=[: the value is not valid YAML"),
        ("subject.model.name=3", "--set subject.model.name=3: model has no keys below it"),
    ],
)
def test_a_bad_override_is_named(override: str, complaint: str) -> None:
    with pytest.raises(BadInput) as error:
        apply_overrides({"subject": {"model": "a"}}, [override])
    assert str(error.value) == complaint


def test_the_original_methods_settings() -> None:
    config = build_config({**MINIMAL, "preset": "original"})
    assert (config.identify.weighting, config.identify.similarity, config.identify.fdr) == ("mean", 0.6, None)
    assert config.identify.window == 5
    assert (config.verify.synonyms, config.verify.normalised, config.verify.normaliser) == (5, 0.5, "max")
    assert config.optimize.method == "descent"
    assert config.describe.prompt == "mats"
    # What it sets for stages that are not built yet is said, as if it had been written out.
    assert {line.split()[0] for line in unused_keys(config)} == {"describe"}
    other = build_config(MINIMAL)
    assert (other.identify.similarity, other.identify.fdr, other.verify.normaliser) == (None, 0.05, "p99")


def test_an_empty_section_is_all_defaults() -> None:
    assert build_config({**MINIMAL, "controls": None, "exemplars": None}) == build_config(MINIMAL)


def test_a_setting_given_beside_the_preset_wins() -> None:
    config = build_config({**MINIMAL, "preset": "original", "identify": {"similarity": 0.7}, "verify": {"synonyms": 2}})
    assert (config.identify.similarity, config.identify.fdr) == (0.7, None)
    assert (config.verify.synonyms, config.verify.normalised) == (2, 0.5)


def test_keys_that_nothing_reads_yet_are_accepted_and_named() -> None:
    tree = {
        "subject": {"model": "a"}, "optimize": {"judge": "gpt2"}, "score": {"window": 16},
        "describe": {"explainer": "x"}, "controls": {"decoys": 3, "nulls": 2},
    }  # fmt: skip
    named = {line.split(" is not used: ")[0] for line in unused_keys(build_config(tree))}
    assert named == {"describe", "score"}
    assert unused_keys(build_config({**MINIMAL, "verify": {"synonyms": 2}, "controls": {"decoys": 4}})) == []


def test_a_configuration_comes_back_from_its_plain_values() -> None:
    config = build_config({**yaml.safe_load(CONTRACT), "preset": "original"})
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
