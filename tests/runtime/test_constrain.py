"""Answers inside a grammar: what a random model writes parses, the mask is what trying every token says."""

import json
import re

import numpy as np
import pytest

from gemini.errors import RequestError
from gemini.runtime import GenerationOptions, load
from gemini.runtime.constrain import Constrained, Grammar, keep_allowed, read_vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])(T[0-9]{2}h)?"
EOS = 1


def check_person(text):
    person = json.loads(text)
    assert list(person) == ["name", "age", "pets"]
    assert isinstance(person["name"], str) and len(person["name"]) <= 6
    assert type(person["age"]) is int and 0 <= person["age"] <= 120
    assert len(person["pets"]) <= 3 and set(person["pets"]) <= {"cat", "dog"}


@pytest.fixture(scope="module")
def session(shared_toy):
    return load(shared_toy.path, threads=1)


def test_whatever_a_random_model_samples_is_a_document_of_the_schema(session):
    texts = set()
    for seed in range(12):
        answer = session.generate(
            "the sea", json_schema=SCHEMA, temperature=3.0, seed=seed, max_new_tokens=120
        )
        assert answer.finish_reason == "eos" and answer.tokens[-1] == EOS
        check_person(answer.text)
        texts.add(answer.text)
    assert len(texts) > 10


def test_one_wrong_draft_is_forgotten_by_the_grammar_too(session):
    held = Constrained(session.decoder(9), Grammar(session._vocabulary, GenerationOptions(regex="aabbcc")))
    a, b, c = (session.tokenizer.encode(letter)[0] for letter in "abc")
    held.prefill([[5, 9]])
    for tokens, back in (([a, a, b, c, c], 2), ([b], 0), ([c, EOS, EOS], 2)):
        assert held.extend(tokens).shape == (len(tokens), session.model.vocab_size)
        held.rewind(back)
    assert np.flatnonzero(np.isfinite(held.extend([c])[0])).tolist() == [EOS]


def test_greedy_sampled_streamed_searched_and_batched_answers_match_the_expression(decoder_toy):
    session = load(decoder_toy.path, threads=1)  # both kinds of cache
    texts = ["the sea", "a", "one two three"]
    for options in ({}, {"temperature": 2.0, "seed": 5}, {"repetition_penalty": 1.5}, {"num_beams": 3}):
        batch = session.generate(texts, regex=DATE, **options)
        assert all(re.fullmatch(DATE, answer.text) for answer in batch)
        assert [answer.finish_reason for answer in batch] == ["eos"] * 3
        if "seed" not in options:
            assert batch == [session.generate(text, regex=DATE, **options) for text in texts]
        if "num_beams" not in options:
            assert "".join(session.stream("the sea", regex=DATE, **options)) == batch[0].text


def test_drafts_change_no_constrained_token(session):
    """Lookup over a prompt that holds the answer, so that right, wrong and impossible drafts all occur."""
    accepted = 0
    for options in ({}, {"temperature": 0.7, "seed": 3}, {"temperature": 2.0, "seed": 4}):
        options |= {"regex": "((cat|dog|cow), ){8}end", "max_new_tokens": 70}
        plain = session.generate("a", **options)
        prompt = session.tokenizer.encode("a " + plain.text[:-4] + " a ")
        expected = session.generate_ids([prompt], session._options(options))
        speculator = session.speculator("lookup", [prompt], session._options(options))
        assert session.generate_ids([prompt], session._options(options), speculator=speculator) == expected
        assert re.fullmatch(options["regex"], session.tokenizer.decode(expected[0]))
        assert speculator.counts.calls + speculator.counts.accepted + 1 == len(expected[0])
        accepted += speculator.counts.accepted
        draft = session.generate("a cat", speculate=load(session.bundle.path, threads=1), **options)
        assert re.fullmatch(options["regex"], draft.text)
    assert accepted > 20


def test_beams_find_the_likeliest_of_all_texts_of_the_grammar(session, shared_toy):
    """As many beams as there are texts: the search is exhaustive, so a slow reference can rank them all."""
    words = ["the", "sea", "road", "naïve"]
    prompt = session.tokenizer.encode("a")
    found = session.generate(
        "a", regex="the|sea|road|naïve", num_beams=64, length_penalty=0.0, max_new_tokens=7
    )
    best = None
    spellings = all_spellings(session, words)
    for ids in spellings:
        logits = shared_toy.reference([*prompt, *ids])[len(prompt) - 1 :]
        grammar_rows = masked_rows(session, "the|sea|road|naïve", logits, [*ids, EOS])
        chances = grammar_rows - np.log(np.exp(grammar_rows).sum(-1, keepdims=True))
        score = chances[np.arange(len(ids) + 1), [*ids, EOS]].sum()
        best = max(best, (score, [*ids, EOS])) if best else (score, [*ids, EOS])
    assert list(found.tokens) == best[1]


def all_spellings(session, words):
    """Every way to write each word with tokens of the vocabulary, as lists of ids."""
    table = token_bytes(session)

    def spell(rest):
        if not rest:
            return [[]]
        return [
            [i, *more] for i, b in table.items() if b and rest.startswith(b) for more in spell(rest[len(b) :])
        ]

    return [ids for word in words for ids in spell(word.encode())]


def token_bytes(session):
    """Bytes of each ordinary token, by the byte-level alphabet written out anew."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in printable}
    letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = session.tokenizer.inner.get_vocab(with_added_tokens=True)
    return {i: bytes(letters[c] for c in token) for token, i in vocabulary.items() if i > 2}


def masked_rows(session, regex, logits, ids):
    grammar = Grammar(session._vocabulary, GenerationOptions(regex=regex))
    matcher, rows = grammar.matcher(), logits.astype(np.float32)
    for row, token in zip(rows, ids, strict=True):
        keep_allowed(row, matcher)
        assert matcher.consume_token(token)
    return rows


@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_the_mask_allows_the_tokens_that_lead_to_a_text_of_a_finite_language(kind, session):
    """The reference knows neither llguidance nor its automaton: a token is right if some text goes on so.

    Where one text only can follow, llguidance spells its beginning in one way, as the tokenizer would.
    """
    words = [f"{word}{tail}" for word in ("sea", "sun", "naïve 🙂", "a") for tail in ("", "s", " 1")]
    if kind == "regex":
        language, options = words, {"regex": "(sea|sun|naïve 🙂|a)(s| 1)?"}
    else:
        language = [f'"{word}"' for word in words]
        options = {"json_schema": json.dumps({"enum": words})}
    texts = [text.encode() for text in language]
    table, grammar = token_bytes(session), Grammar(session._vocabulary, GenerationOptions(**options))
    rng, choices = np.random.default_rng(0), 0
    for _ in range(12):
        matcher, written = grammar.matcher(), b""
        while True:
            logits = np.zeros(session.model.vocab_size, np.float32)
            keep_allowed(logits, matcher)
            allowed = set(np.flatnonzero(np.isfinite(logits)).tolist())
            expected = {
                i for i, piece in table.items() if any(text.startswith(written + piece) for text in texts)
            }
            expected |= {EOS} if written in texts else set()
            if len({table.get(token, b"")[:1] for token in expected}) > 1:
                assert allowed == expected
                choices += 1
            else:
                assert allowed and allowed <= expected
            token = int(rng.choice(sorted(allowed)))
            if token == EOS:
                break
            assert matcher.consume_token(token)
            written += table[token]
    assert choices > 24


def test_masked_logits_keep_their_values(session):
    for regex, few in (("[a-c]", True), ("(?s:.)*", False)):
        logits = np.random.default_rng(1).normal(size=session.model.vocab_size).astype(np.float32)
        masked = logits.copy()
        keep_allowed(masked, Grammar(session._vocabulary, GenerationOptions(regex=regex)).matcher())
        kept = np.isfinite(masked)
        assert (kept.sum() < 10) == few and (masked[kept] == logits[kept]).all()


def test_an_answer_that_is_cut_is_a_beginning_of_a_document(session):
    answer = session.generate("the sea", json_schema=SCHEMA, max_new_tokens=3)
    assert answer.finish_reason == "length" and answer.text.startswith("{")


def test_an_encoder_decoder_obeys_too(pair_toy):
    session = load(pair_toy.path, threads=1)
    answers = session.generate(["one", "the sea"], regex=DATE, temperature=2.0, seed=1)
    assert all(re.fullmatch(DATE, answer.text) for answer in answers)
    assert re.fullmatch(DATE, "".join(session.stream("one", regex=DATE)))
    assert re.fullmatch(DATE, session.generate("one", regex=DATE, num_beams=3).text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": " "}, "regex is empty"),
        ({"json_schema": "{"}, "JSON schema cannot be followed"),
        ({"json_schema": "[1]"}, "object"),
        ({"json_schema": "[" * 100_000}, "JSON schema cannot be followed"),
        ({"json_schema": {"type": "nope"}}, "Invalid type: nope"),
        ({"json_schema": {"type": {1, 2}}}, "no JSON"),
        ({"json_schema": {}, "regex": "a"}, "a JSON schema and a regular expression"),
        ({"regex": "a", "ignore_eos": True}, "has an end"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused(options, match, session):
    for call in (session.generate, session.stream):
        with pytest.raises(RequestError, match=match):
            call("the sea", **options)
    assert session.memory()["kv_cache"] == 0


def test_a_grammar_without_a_token_left_is_an_error_and_not_a_wrong_text(session):
    logits = np.full(session.model.vocab_size, -np.inf, np.float32)  # as a bundle's suppressed tokens do
    with pytest.raises(RequestError, match="no token of the model fits"):
        keep_allowed(logits, Grammar(session._vocabulary, GenerationOptions(regex="a")).matcher())


def test_a_missing_library_is_named_with_its_remedy(session, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'gemini-edge\[constrain\]'"):
        read_vocabulary(session.tokenizer, session.model.vocab_size, session.eos)
    assert session.generate("the sea", max_new_tokens=2).text is not None


def test_a_model_without_an_end_token_cannot_close_an_answer(session):
    with pytest.raises(RequestError, match="no end token"):
        read_vocabulary(session.tokenizer, session.model.vocab_size, frozenset())
