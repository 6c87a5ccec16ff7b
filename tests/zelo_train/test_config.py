"""zelo.yaml: what is written is read, what is wrong is told with its place and the remedy."""

from __future__ import annotations

from decimal import Decimal

import pytest
import yaml
from pydantic import ValidationError

from zelo_train.config import STAGES, Config, parse, read, template
from zelo_train.errors import ConfigError


def test_the_template_is_all_defaults() -> None:
    text = template()
    assert parse(text) == Config()
    written = yaml.safe_load(text)
    assert set(written) == set(STAGES)
    for stage in STAGES:
        section = type(getattr(Config(), stage))
        assert set(written[stage]) == set(section.model_fields), "a setting is not in the template"


def test_every_setting_says_what_it_means() -> None:
    for line in template().splitlines():
        if line and not line.startswith("#"):
            assert "#" in line, line


def test_the_template_takes_values() -> None:
    text = template({"collect.source": "a: b # c", "judge.cap": Decimal("2.50"), "judge.judges": [{"name": "j", "model": "m"}]})
    config = parse(text)
    assert config.collect.source == "a: b # c"
    assert config.judge.cap == Decimal("2.50")
    assert [(judge.name, judge.model) for judge in config.judge.judges] == [("j", "m")]
    with pytest.raises(ConfigError, match=r"no setting 'collect\.sauce'"):
        template({"collect.sauce": "x"})


def test_nothing_written_is_all_defaults() -> None:
    for text in ("", "# nothing\n", "collect:\n", "collect: {}\njudge:\n"):
        assert parse(text) == Config()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("collect:\n  topp: 3", "zelo.yaml:2: 'topp' is not a setting of collect; did you mean top?"),
        ("colect:\n  top: 3", "zelo.yaml:1: 'colect' is not a setting; did you mean collect?"),
        ("\ncollect:\n  device: cpu", "zelo.yaml:3: 'device' is not a setting of collect; did you mean collect.dense.device?"),
        ("collect:\n  k1: 2", "did you mean collect.bm25.k1?"),
        ("rate:\n  zzz: 2", "known here: link, prior"),
        ("collect:\n  bm25:\n    k1: 1\n    bb: 2", "zelo.yaml:4: 'bb' is not a setting of collect.bm25; did you mean b?"),
        ("collect:\n  top: many", "zelo.yaml:2: collect.top is 'many' (a text); expected a whole number"),
        ("collect:\n  top: 1.5", "collect.top is 1.5 (a number); expected a whole number"),
        ("collect:\n  top: 0", "collect.top is 0 (a number); expected greater than or equal to 1"),
        ("collect:\n  top: true", "collect.top is true (true or false); expected a whole number"),
        ("judge:\n  keep_replies: 1", "expected true or false"),
        ("collect:\n  candidates: bm26", "'bm26' (a text); expected 'bm25', 'dense', 'hybrid', 'file' or 'judged'"),
        ("collect:\n  candidates: file", "there is no run; expected run: PATH"),
        ("collect:\n  source:", "neither source nor documents"),
        ("collect:\n  domain: two words", "expected one word"),
        ("collect:\n  passages:\n    words: 50\n    overlap: 50", "overlap is 50, expected less than words (50)"),
        ("judge:\n  judges:\n    - model: x", "zelo.yaml:3: judge.judges.0.name is missing; expected a text"),
        ("judge:\n  judges:\n    - name: a\n    - name: a", "two judges are called 'a'"),
        ("judge:\n  judges: 4", "judge.judges is 4 (a number); expected a list"),
        ("judge:\n  cap: -1", "judge.cap is -1 (a number); expected greater than or equal to 0"),
        ("judge:\n  cap: lots", "judge.cap is 'lots' (a text); expected an amount or nothing"),
        ("judge:\n  cap: .inf", "judge.cap is Infinity"),
        ("judge:\n  pairs:\n    degree: 7", "expected a multiple of 2"),
        ("collect:\n  top: 1\n  top: 2", "zelo.yaml:3: 'top' is here and in line 2; expected once"),
        ("- a", "it holds a list; expected the sections collect, judge"),
        ("collect: [", "zelo.yaml:1: no YAML"),
        ("collect: !!python/object:os.system {}", "no YAML"),
    ],
)
def test_a_mistake_is_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert told in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse("collect:\n  topp: 3\nrate:\n  prior: no\n")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("line", ["api_key: sk-secret", "key: sk-secret", "token: sk-secret", "api_key_env: sk-secret"])
def test_a_key_in_the_file_is_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"judge:\n  judges:\n    - name: a\n      {line}\n")
    assert "OPENAI_API_KEY" in str(error.value)
    assert "secret" not in str(error.value)


def test_money_is_exact() -> None:
    config = parse("judge:\n  cap: 0.1\n  judges:\n    - name: a\n      price: {input: 0.15, output: 3}\n")
    assert config.judge.cap == Decimal("0.1")
    assert config.judge.judges[0].price.input == Decimal("0.15")
    assert config.judge.judges[0].price.output == 3


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().collect.top = 3  # type: ignore[misc]


def test_files(tmp_path) -> None:  # noqa: ANN001
    path = tmp_path / "zelo.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbfcollect:\n  top: 7\n")
    assert read(path).collect.top == 7
    path.write_bytes(b"collect: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(path)
