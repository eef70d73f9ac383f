from pathlib import Path

import pytest

import pipelines
from operators.errors import ConfigError
from pipelines.config import load


def test_assignments_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("max_failure_rate: 0.5\nsearch: {probes: 3, candidates: 7}\n")
    (tmp_path / "b.yaml").write_text("search: {probes: 4}\n")
    config = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["max_failure_rate=0.25"], "here")
    assert (config.search.probes, config.search.candidates, config.max_failure_rate, config.store) == (
        4,
        7,
        0.25,
        "here",
    )


def test_one_field_of_a_nested_block_is_set_without_touching_the_others():
    config = load([], ["encode.pool_tokens.frame=8"])
    assert (config.encode.pool_tokens.frame, config.encode.pool_tokens.speech) == (8, 512)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("search.probs=3", "Did you mean probes?"),
        ("serch.probes=3", "Did you mean search?"),
        ("search.candidates=0", "search.candidates.*greater than or equal to 1.*got 0"),
        ("build_index.nbits=3", "build_index.nbits"),
        ("search.probes", "NAME=VALUE"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(assignment, message):
    with pytest.raises(ConfigError, match=message):
        load([], [assignment])


def test_a_config_that_is_not_a_mapping_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load([tmp_path / "c.yaml"], [])
    with pytest.raises(ConfigError, match="cannot read the config"):
        load([tmp_path / "missing.yaml"], [])


def test_the_example_of_a_night_is_a_valid_config_that_says_what_the_defaults_are():
    config = load([Path(pipelines.__file__).parent / "configs/nightly.yaml"], [])
    assert config.store and config.manifest
    defaults = load([], [])
    assert config.gates == defaults.gates
    assert (config.gc, config.retries, config.build_index) == (defaults.gc, defaults.retries, defaults.build_index)
