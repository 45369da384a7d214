"""The benchmark of speculation on the toy decoder of tests/runtime."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from gemini.benchmarks import speculation
from gemini.benchmarks.speculation_prompts import COPY_PROMPTS, FREE_PROMPTS
from gemini.errors import UsageError
from gemini.runtime import load


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    path = Path(__file__).resolve().parents[1] / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("speculation_toys", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("bundles")
    return {
        "decoder": str(module.make_decoder(root / "decoder", "shared").path),
        "embedder": str(module.make_encoder(root / "embedder", "feature-extraction").path),
    }


def test_prompts_are_twenty_and_some_and_all_different():
    assert len(COPY_PROMPTS) == 20 and len(FREE_PROMPTS) >= 8
    assert len({*COPY_PROMPTS, *FREE_PROMPTS}) == len(COPY_PROMPTS) + len(FREE_PROMPTS)


@pytest.mark.parametrize("draft", [False, True])
def test_every_prompt_is_compared_and_summarized(toys, monkeypatch, capsys, draft):
    monkeypatch.setattr(speculation, "COPY_PROMPTS", ("the sea the sea", "one two one two"))
    monkeypatch.setattr(speculation, "FREE_PROMPTS", ("a small stone",))
    more = ["--draft", toys["decoder"]] if draft else []
    speculation.main([toys["decoder"], "--threads", "1", "--new-tokens", "30", "--rounds", "2", *more])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["kind"] for each in result["prompts"]] == ["copy", "copy", "free"]
    assert {name: part["prompts"] for name, part in result["summary"].items()} == {"copy": 2, "free": 1}
    for each in result["prompts"]:
        assert each["same"] and each["gap"] is None and each["speedup"] > 0
        assert 0 <= each["accepted"] <= each["drafted"] and each["calls"] + 1 <= each["new_tokens"] <= 30


def test_the_gap_is_that_of_plain_logits_where_answers_part(toys):
    session = load(toys["decoder"], threads=1)
    plain = session.generate("the sea", max_new_tokens=8, ignore_eos=True).tokens
    ids = session.tokenizer.encode("the sea", True, 0)
    logits = session.logits([[*ids, *plain[:5]]])[0, -1]
    other = (plain[5] + 1) % logits.size
    where, gap = speculation.first_gap(session, "the sea", plain, [*plain[:5], other, 3])
    assert where == 5 and gap == pytest.approx(float(logits[plain[5]] - logits[other]), abs=1e-3)
    assert speculation.first_gap(session, "the sea", plain, plain[:4]) == (4, None)


def test_copied_is_the_share_of_trigrams_from_the_prompt():
    assert speculation.copied_share([1, 2, 3, 4, 5], [2, 3, 4, 9, 1, 2, 3]) == pytest.approx(2 / 5)
    assert speculation.copied_share([1, 2], [1, 2]) == 0


def test_what_generates_no_text_is_refused(toys):
    with pytest.raises(UsageError, match="generates no text"):
        speculation.main([toys["embedder"]])
