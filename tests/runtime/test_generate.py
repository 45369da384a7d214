"""The loop with a scripted model, then text generation with toy bundles."""

import numpy as np
import pytest

from gemini.errors import RequestError
from gemini.runtime import GenerationOptions, load
from gemini.runtime.generate import generate_tokens, new_token_limit


class Script:
    """An Inference whose row b always continues with script[b], one logit of 1 a step."""

    def __init__(self, script, vocab=20):
        self.script, self.vocab, self.calls, self.closed = script, vocab, 0, False

    def logits(self):
        result = np.zeros((len(self.script), self.vocab), np.float32)
        for row, tokens in enumerate(self.script):
            result[row, tokens[min(self.calls, len(tokens) - 1)]] = 1
        return result

    def prefill(self, ids):
        return self.logits()

    def step(self, tokens):
        self.calls += 1
        return self.logits()

    def reorder(self, rows):
        raise AssertionError("nothing was searched")

    def close(self):
        self.closed = True


def run(script, eos=frozenset({9}), limit=4, on_token=None, **options):
    model = Script(script)
    prompts = [[1]] * len(script)
    rows, reasons = generate_tokens(model, prompts, GenerationOptions(**options), eos, limit, on_token)
    assert model.closed
    return rows, reasons, model.calls


def test_each_row_ends_for_its_own_reason():
    rows, reasons, _ = run([[4, 5, 6, 7, 8], [4, 9, 9], [3, 3, 3, 3]], on_token=lambda row, token: token == 6)
    assert rows == [[4, 5, 6], [4, 9], [3, 3, 3, 3]]
    assert reasons == ["stop", "eos", "length"]


def test_the_model_does_not_run_after_the_last_token():
    assert run([[9], [9]])[2] == 0
    assert run([[4, 4, 4, 4, 4]], limit=3)[2] == 2


def test_ignore_eos_runs_to_the_limit():
    assert run([[9, 9, 9, 9]], ignore_eos=True)[:2] == ([[9, 9, 9, 9]], ["length"])


def test_the_callback_sees_every_token_with_its_row():
    seen = []
    run([[4, 9], [5, 6, 9]], on_token=lambda row, token: seen.append((row, token)))
    assert seen == [(0, 4), (1, 5), (0, 9), (1, 6), (1, 9)]


def test_the_model_is_closed_when_the_callback_raises():
    model = Script([[4]])
    with pytest.raises(KeyError):
        generate_tokens(model, [[1]], GenerationOptions(), frozenset(), 3, lambda row, token: {}[token])
    assert model.closed


def test_the_default_length_is_shortened_and_an_explicit_one_is_refused():
    assert new_token_limit([[1] * 10], GenerationOptions(), 1000) == 128
    assert new_token_limit([[1] * 10, [1] * 90], GenerationOptions(), 100) == 10
    assert new_token_limit([[1] * 90], GenerationOptions(max_new_tokens=10), 100) == 10
    with pytest.raises(RequestError) as caught:
        new_token_limit([[1] * 90], GenerationOptions(max_new_tokens=11), 100)
    assert "at most 10 new tokens" in caught.value.remedy
    with pytest.raises(RequestError, match="100 tokens"):
        new_token_limit([[1] * 100], GenerationOptions(), 100)


def greedy_reference(toy, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(toy.reference(ids)[-1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 40, 7], [3], [8, 8, 250, 12, 100, 31, 64]]


def test_greedy_ids_of_unequal_prompts_equal_the_reference(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    rows = generator.generate_ids(PROMPTS, GenerationOptions(max_new_tokens=12))
    assert rows == [greedy_reference(decoder_toy, prompt, 12) for prompt in PROMPTS]
    assert (
        len({token for row in rows for token in row}) > 4
    )  # a model that repeats itself would prove nothing
    assert generator.memory()["kv_cache"] == 0  # nothing stays behind


def test_sampled_batch_rows_equal_single_runs_with_their_seeds(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    options = {"max_new_tokens": 15, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
    batch = generator.generate_ids(PROMPTS, GenerationOptions(seed=7, **options))
    for row, prompt in enumerate(PROMPTS):
        single = generator.generate_ids([prompt], GenerationOptions(seed=7 + row, **options))
        assert single[0] == batch[row]
    assert batch == generator.generate_ids(PROMPTS, GenerationOptions(seed=7, **options))


def test_a_token_callback_stops_one_row(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    rows = generator.generate_ids(PROMPTS, options, lambda row, token: row == 1)
    assert [len(row) for row in rows] == [6, 1, 6]


def test_streamed_text_equals_generated_text(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    for seed in range(5):
        options = {"max_new_tokens": 60, "temperature": 1.5, "seed": seed, "ignore_eos": True}
        result = generator.generate("the sea", **options)
        pieces = list(generator.stream("the sea", **options))
        assert "".join(pieces) == result.text == generator.tokenizer.decode(result.tokens)
        assert all(pieces) and len(pieces) > 5
        assert (result.finish_reason, len(result.tokens)) == ("length", 60)


def test_a_batch_of_texts_equals_single_texts(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    texts = ["the sea", "a", "one two three"]
    batch = generator.generate(texts, max_new_tokens=10)
    assert batch == [generator.generate(text, max_new_tokens=10) for text in texts]


def test_stop_strings_cut_the_text_in_batches_and_streams(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    options = {"max_new_tokens": 40, "temperature": 4.0, "seed": 3, "ignore_eos": True}
    full = generator.generate("the sea", **options)
    # Three whole characters in the middle; in this random model they span tokens.
    stop = next(s for i in range(6, len(full.text)) if "\ufffd" not in (s := full.text[i : i + 3]))
    cut = full.text[: full.text.index(stop)]
    for result in (
        generator.generate("the sea", stop=stop, **options),
        generator.generate(["the sea", "x"], stop=["@@@@", stop], **options)[0],
    ):
        assert (result.text, result.finish_reason) == (cut, "stop")
        assert len(result.tokens) < 40
    assert "".join(generator.stream("the sea", stop=stop, **options)) == cut


def test_the_end_token_is_in_the_tokens_but_not_in_the_text(shared_toy, monkeypatch):
    generator = load(shared_toy.path, threads=1)
    options = {"max_new_tokens": 30, "temperature": 1.5, "seed": 1}
    tokens = generator.generate("one", ignore_eos=True, **options).tokens
    end = next(i for i in range(3, 30) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(generator, "eos", frozenset({tokens[end]}))
    result = generator.generate("one", **options)
    assert result.finish_reason == "eos" and result.tokens == tokens[: end + 1]
    assert result.text == generator.tokenizer.decode(tokens[:end])


def test_an_empty_prompt_becomes_the_begin_token_or_an_error(new_decoder, shared_toy):
    assert load(shared_toy.path, threads=1).generate("", max_new_tokens=2).prompt_tokens == 1
    info = {"eos_token_ids": [], "bos_token_id": None, "pad_token_id": None, "defaults": {}}
    with pytest.raises(RequestError, match="empty"):
        load(new_decoder(generation=info).path, threads=1).generate("")


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [5], ["a", 5], b"bytes", ["\ud800"], "\ud800", {"role": "user"}]
)
def test_what_is_no_prompt_is_refused(shared_toy, prompt):
    with pytest.raises(RequestError):
        load(shared_toy.path, threads=1).generate(prompt)


def test_a_stream_refuses_bad_requests_before_the_first_piece(shared_toy):
    generator = load(shared_toy.path, threads=1)
    for prompt, options in [(["a", "b"], {}), ("a " * 400, {}), ("a", {"top_p": 3.0}), ("a", {"beams": 2})]:
        with pytest.raises(RequestError):
            generator.stream(prompt, **options)


def test_an_abandoned_stream_frees_its_cache(shared_toy):
    generator = load(shared_toy.path, threads=1)
    stream = generator.stream("the sea", max_new_tokens=50, ignore_eos=True)
    next(stream)
    assert generator.memory()["kv_cache"] > 0
    stream.close()
    assert generator.memory()["kv_cache"] == 0


def test_two_streams_may_be_read_in_turns(shared_toy):
    generator = load(shared_toy.path, threads=1)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    texts = ["the sea", "one two"]
    first, second = (generator.stream(text, **options) for text in texts)
    pieces = list(zip(first, second, strict=False))
    expected = [generator.generate(text, **options).text for text in texts]
    for column in (0, 1):
        assert expected[column].startswith("".join(pair[column] for pair in pieces)[:10])


def test_without_its_tokenizer_a_bundle_takes_and_gives_token_ids(shared_toy):
    whole, bare = load(shared_toy.path), load(shared_toy.path, skip_tokenizer=True)
    options = GenerationOptions(max_new_tokens=6)
    assert bare.generate_ids([[1, 2, 3]], options) == whole.generate_ids([[1, 2, 3]], options)
    for use in (
        lambda: bare.generate("the sea"),
        lambda: list(bare.stream("the sea")),
        lambda: bare.tokenizer,
    ):
        with pytest.raises(RequestError, match="without its tokenizer"):
            use()
