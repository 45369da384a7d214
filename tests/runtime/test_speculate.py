"""Speculation against plain decoding: the same tokens, the same distribution, the same cache."""

import numpy as np
import pytest

from gemini.errors import RequestError
from gemini.runtime import GenerationOptions, load
from gemini.runtime.draft_model import ModelDrafter
from gemini.runtime.generate import generate_tokens
from gemini.runtime.pace import StepCosts
from gemini.runtime.sampling import Sampler, draw, filter_logits, softmax
from gemini.runtime.speculate import Draft, Speculator

TOLERANCE = 2e-4  # as in test_decoder: float32 sums of some 32 products of size 1
PROMPT = [5, 9, 40, 7, 5, 9, 40, 7, 8, 250, 12, 5, 9]


class Oracle:
    """Drafts the true continuation, each token replaced by another with probability ``wrong``."""

    def __init__(self, truth, wrong, vocab, proposals=False, seed=0):
        self.truth, self.wrong, self.vocab, self.pushed = list(truth), wrong, vocab, 0
        self.rng, self.closed, self.proposals = np.random.default_rng(seed), False, proposals

    def push(self, token):
        self.pushed += 1

    def propose(self, limit):
        size = int(self.rng.integers(0, limit + 1)) if limit else 0
        tokens = self.truth[self.pushed : self.pushed + size]
        wrong = self.rng.random(len(tokens)) < self.wrong
        return Draft([(t + int(w)) % self.vocab for t, w in zip(tokens, wrong, strict=True)])

    def close(self):
        self.closed = True


class Bigrams:
    """An Extensible over a table of logits: the next token depends on the last one only."""

    def __init__(self, table):
        self.table, self.tokens, self.calls = table, [], 0

    def prefill(self, ids):
        self.tokens = list(ids[0])
        return self.table[self.tokens[-1:]]

    def extend(self, tokens):
        self.tokens += [int(token) for token in tokens]
        self.calls += 1
        return self.table[list(tokens)]

    step = extend

    def rewind(self, count):
        self.tokens = self.tokens[: len(self.tokens) - count]

    def reorder(self, rows):
        raise AssertionError("nothing was searched")

    def close(self):
        pass


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_tokens_equal_plain_greedy_whatever_is_drafted(decoder_toy, wrong):
    generator = load(decoder_toy.path, threads=1)
    options = GenerationOptions(max_new_tokens=60, ignore_eos=True, repetition_penalty=1.2)
    (plain,) = generator.generate_ids([PROMPT], options)
    assert len(set(plain)) > 10
    drafter = Oracle(plain, wrong, decoder_toy.vocab_size)
    speculator = Speculator(drafter, StepCosts())
    assert generator.generate_ids([PROMPT], options, None, speculator) == [plain]
    counts = speculator.counts
    assert drafter.closed and generator.memory()["kv_cache"] == 0
    assert counts.drafted > 20 and counts.calls + counts.accepted + 1 == 60
    if wrong in (0.0, 1.0):
        assert counts.accepted == (counts.drafted if wrong == 0.0 else 0)


def test_a_seed_gives_the_tokens_of_plain_sampling(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    options = GenerationOptions(
        max_new_tokens=50, do_sample=True, seed=3, temperature=1.5, top_k=40, repetition_penalty=1.1
    )
    (plain,) = generator.generate_ids([PROMPT], options)
    speculator = Speculator(Oracle(plain, 0.4, decoder_toy.vocab_size), StepCosts())
    assert generator.generate_ids([PROMPT], options, None, speculator) == [plain]
    assert speculator.counts.accepted > 5


@pytest.mark.parametrize("speculate", ["lookup", "model"])
def test_text_stream_and_ids_equal_plain_decoding(decoder_toy, speculate):
    generator = load(decoder_toy.path, threads=1)
    drafts = load(decoder_toy.path, threads=1) if speculate == "model" else speculate
    generator._costs.slope = 0.01  # drafting always pays
    for prompt in ("the sea the sea the sea", "one two"):
        plain = generator.generate(prompt, max_new_tokens=70, ignore_eos=True)
        found = generator.generate(prompt, max_new_tokens=70, ignore_eos=True, speculate=drafts)
        assert (found.tokens, found.text, found.finish_reason) == (plain.tokens, plain.text, "length")
        assert plain.speculation is None and found.speculation.calls <= 70
        pieces = generator.stream(prompt, max_new_tokens=70, ignore_eos=True, speculate=drafts)
        assert "".join(pieces) == plain.text
        if speculate == "model":  # the same model is always right
            assert found.speculation.accepted == found.speculation.drafted > 40


def test_stop_strings_and_the_end_token_end_a_draft_in_its_middle(shared_toy, monkeypatch):
    generator = load(shared_toy.path, threads=1)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain = generator.generate("the sea", **options)
    speculator = Speculator(Oracle(plain.tokens, 0.0, shared_toy.vocab_size), StepCosts())
    monkeypatch.setattr(generator, "speculator", lambda speculate, *_: speculate and speculator)
    middle = len(plain.text) // 2
    stop = next(s for i in range(middle, 99) if "\ufffd" not in (s := plain.text[i : i + 3]))
    found = generator.generate("the sea", stop=stop, speculate="lookup", **options)
    assert (found.text, found.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")
    end = next(i for i in range(5, 40) if plain.tokens[i] not in plain.tokens[:i])
    speculator.drafter.pushed = 0
    monkeypatch.setattr(generator, "eos", frozenset({plain.tokens[end]}))
    found = generator.generate("the sea", max_new_tokens=40, speculate="lookup")
    assert (found.tokens, found.finish_reason) == (plain.tokens[: end + 1], "eos")


def test_several_tokens_score_like_the_reference_and_can_be_taken_back(decoder_toy):
    decoder = load(decoder_toy.path, threads=1).decoder()
    sequence = np.random.default_rng(6).integers(3, 280, 150).tolist()
    decoder.prefill([sequence[:11]])
    end, rng = 11, np.random.default_rng(7)
    while end < 140:  # past the first block of the cache, so that it grows
        size = int(rng.integers(1, 10))
        wrong = rng.integers(3, 280, int(rng.integers(0, 5))).tolist()
        logits = decoder.extend([*sequence[end : end + size], *wrong])
        expected = decoder_toy.reference([*sequence[: end + size], *wrong])[end:]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
        decoder.rewind(len(wrong))
        end += size
    logits = decoder.step([sequence[end]])
    np.testing.assert_allclose(logits[0], decoder_toy.reference(sequence[: end + 1])[-1], atol=TOLERANCE)


def test_a_call_beyond_the_context_or_for_two_rows_is_refused(decoder_toy):
    generator = load(decoder_toy.path, threads=1)
    decoder = generator.decoder()
    with pytest.raises(RequestError, match="Several tokens"):
        decoder.extend([3, 4])
    decoder.prefill([[3] * 158])
    with pytest.raises(RequestError, match="full"):
        decoder.extend([3, 4, 5])
    with pytest.raises(RequestError, match="taken back"):
        decoder.rewind(158)
    decoder.prefill([[3, 4], [5, 6]])
    with pytest.raises(RequestError, match="2 rows"):
        decoder.extend([3, 4, 5])
    assert generator.generate("a", max_new_tokens=158, ignore_eos=True, speculate="lookup").tokens


def chi_square(counts, probabilities):
    """Pearson's statistic over the cells that expect five or more; those below are one cell together."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    seen = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    keep = wanted > 0
    assert seen[~keep].sum() == 0
    return float(((seen - wanted)[keep] ** 2 / wanted[keep]).sum()), int(keep.sum()) - 1


def pair_probabilities(table, start, options, vocab):
    """Of the first two tokens, (V * V,): filters and the penalty on what came before, plain recomputation."""

    def following(seen):
        logits = table[seen[-1] : seen[-1] + 1].copy()
        for token in set(seen):
            value = logits[0, token]
            factor = options.repetition_penalty
            logits[0, token] = value * factor if value < 0 else value / factor
        return softmax(filter_logits(logits, options))[0]

    first = following([start])
    return np.concatenate([first[token] * following([start, token]) for token in range(vocab)])


@pytest.mark.parametrize("kind", ["point", "drawn"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.5},
        {"temperature": 1.5, "min_p": 0.2},
    ],
)
def test_the_distribution_of_samples_is_the_targets(kind, options):
    """Chi-square over all pairs of the first two tokens; the 99.9 % quantile by Wilson and Hilferty."""
    vocab, rounds = 5, 1200
    rng = np.random.default_rng(11)
    table = rng.normal(size=(vocab, vocab)).astype(np.float32) * 1.5
    other = table + rng.normal(size=(vocab, vocab)).astype(np.float32)  # a draft model that is often wrong
    chosen = GenerationOptions(do_sample=True, **options)
    stream = np.random.default_rng(12)
    model = Bigrams(table)

    class Drawn:
        def __init__(self):
            self.last = 0

        def push(self, token):
            self.last = token

        def propose(self, limit):
            tokens, proposals, last = [], [], self.last
            for _ in range(min(limit, 3)):
                q = softmax(filter_logits(other[last : last + 1], chosen))[0]
                last = draw(q, stream) if kind == "drawn" else int(q.argmax())
                tokens.append(last)
                proposals.append(q)
            return Draft(tokens, proposals if kind == "drawn" else None)

        def close(self):
            pass

    counts, accepted = np.zeros(vocab * vocab), 0
    for _ in range(rounds):
        speculator = Speculator(Drawn(), StepCosts())
        ((first, second, *_),), _ = generate_tokens(
            model, [[3]], chosen, frozenset(), 3, speculator=speculator
        )
        counts[first * vocab + second] += 1
        accepted += speculator.counts.accepted
    assert accepted > rounds // 4
    statistic, freedom = chi_square(counts, pair_probabilities(table, 3, chosen, vocab))
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile


def test_a_judged_token_follows_the_target_exactly():
    """The rejection scheme without chance: its outcome over a grid of the stream's numbers."""
    target = np.array([0.5, 0.3, 0.2])
    proposal = np.array([0.2, 0.2, 0.6])
    logits = np.log(target).astype(np.float32)[None]
    grid = (np.arange(200) + 0.5) / 200
    found = np.zeros(3)
    for drafted in range(3):
        sampler = Sampler(GenerationOptions(do_sample=True), [[0]], 3)
        for accept in grid:
            numbers = iter([accept, 0.5])
            sampler._streams = [type("Stream", (), {"random": lambda self, n=numbers: next(n)})()]
            if sampler.judge(logits, drafted, proposal) == drafted:
                found[drafted] += proposal[drafted] / grid.size
    # What is kept is min(p, q); the rest of the mass is drawn from the positive part of p - q.
    np.testing.assert_allclose(found, np.minimum(target, proposal), atol=1 / 200)


def test_a_draft_model_stays_in_step_after_rejections(decoder_toy):
    """Its drafts are its own greedy continuation of what was decided, also after wrong ones and a pause."""
    session = load(decoder_toy.path, threads=1)
    rng = np.random.default_rng(8)
    costs = StepCosts(slope=0.01)
    drafter = ModelDrafter(session.decoder(), PROMPT, GenerationOptions(), costs)
    decided = list(PROMPT)
    for _ in range(12):
        drafter._chance.value, drafter._wait = 0.95, 0
        draft = drafter.propose(5).tokens
        context = list(decided)
        for token in draft:
            assert token == int(decoder_toy.reference(context)[-1].argmax())
            context.append(token)
        for token in [*draft[: int(rng.integers(0, 5))], *rng.integers(3, 280, int(rng.integers(1, 4)))]:
            decided.append(int(token))
            drafter.push(int(token))
    drafter.close()


def test_a_draft_model_that_is_wrong_is_left_alone_for_longer_and_longer(decoder_toy):
    drafter = ModelDrafter(
        load(decoder_toy.path, threads=1).decoder(), PROMPT, GenerationOptions(), StepCosts()
    )
    drafted = []
    for step in range(100):
        tokens = drafter.propose(15).tokens
        drafted += [step] * bool(tokens)
        drafter.push((tokens[0] if tokens else 4) + 1)
    pauses = np.diff([step for step in drafted if step > 20])
    assert len(drafted) < 25 and (pauses > 16).all()


def test_what_cannot_be_speculated_is_refused(shared_toy, new_decoder):
    generator = load(shared_toy.path, threads=1)
    for prompt, options in [
        (["a", "b"], {"speculate": "lookup"}),
        ("a", {"speculate": "lookup", "num_beams": 3}),
        ("a", {"speculate": "out/draft"}),
        ("a", {"speculate": 3}),
    ]:
        with pytest.raises(RequestError):
            generator.generate(prompt, max_new_tokens=2, **options)
    stranger = load(shared_toy.path, threads=1)
    stranger.tokenizer.inner.add_tokens(["something new"])
    with pytest.raises(RequestError, match="another vocabulary"):
        generator.stream("a", speculate=stranger)
