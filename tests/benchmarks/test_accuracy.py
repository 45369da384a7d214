import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gemini.benchmarks.accuracy import record_teacher, score_classifier, score_embedder, score_generator
from gemini.benchmarks.divergence import kl_divergence, log_softmax
from gemini.errors import UsageError, VerificationError

VOCAB = 97


def table_model(seed, scale=4.0, shift=0.0):
    """A bigram model: logits depend on the current token alone."""
    table = (np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * scale + shift).astype(np.float32)
    return table, lambda ids: table[ids]


def random_windows(count=3, length=33, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, (1, length)) for _ in range(count)]


def torch_scores(teacher, student, windows):
    """Reference in float64 with torch's own cross entropy and kl_div."""
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for ids in windows:
        expected = torch.tensor(teacher[ids[0, :-1]], dtype=torch.float64)
        actual = torch.tensor(student[ids[0, :-1]], dtype=torch.float64)
        nll += F.cross_entropy(actual, torch.tensor(ids[0, 1:]), reduction="sum").item()
        logs = F.log_softmax(actual, -1), F.log_softmax(expected, -1)
        kl += F.kl_div(*logs, reduction="sum", log_target=True).item()
        agree += (expected.argmax(-1) == actual.argmax(-1)).sum().item()
        count += ids.shape[1] - 1
    return math.exp(nll / count), kl / count, agree / count, count


def test_generator_score_equals_torch(tmp_path):
    (teacher_table, teacher_of), (student_table, student_of) = table_model(1), table_model(2)
    windows = random_windows()
    teacher, own = record_teacher(teacher_of, windows, tmp_path)
    score = score_generator(student_of, windows, teacher)
    perplexity, kl, agreement, count = torch_scores(teacher_table, student_table, windows)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-5)  # float32 logits, float64 sums
    assert score.kl == pytest.approx(kl, rel=1e-3)  # the teacher is kept in float16
    assert score.top1_agreement == agreement
    assert score.tokens == count == own.tokens
    assert own.perplexity == pytest.approx(torch_scores(teacher_table, teacher_table, windows)[0], rel=1e-5)
    assert (own.kl, own.top1_agreement) == (0.0, 1.0)


def test_teacher_against_itself_has_almost_no_divergence(tmp_path):
    _, model = table_model(
        3, scale=8.0, shift=300.0
    )  # a large common offset must not cost float16 its digits
    windows = random_windows()
    teacher, own = record_teacher(model, windows, tmp_path)
    score = score_generator(model, windows, teacher)
    assert score.kl < 1e-5  # float16 rounding of logits relative to the largest
    assert score.top1_agreement == 1.0
    assert score.perplexity == own.perplexity


def test_score_without_teacher_has_no_divergence():
    score = score_generator(table_model(1)[1], random_windows())
    assert score.kl is None and score.top1_agreement is None
    assert score.to_dict()["tokens"] == 96


def test_small_divergence_is_resolved(tmp_path):
    table, model = table_model(5)
    noise = np.random.default_rng(6).standard_normal(table.shape).astype(np.float32) * 0.02
    windows = random_windows()
    teacher, _ = record_teacher(model, windows, tmp_path)
    kl = score_generator(lambda ids: (table + noise)[ids], windows, teacher).kl
    assert kl == pytest.approx(torch_scores(table, table + noise, windows)[1], rel=0.05)  # about 1e-4 nats


def test_teacher_of_other_windows_is_refused(tmp_path):
    _, model = table_model(1)
    teacher, _ = record_teacher(model, random_windows(seed=0), tmp_path)
    with pytest.raises(ValueError, match="other windows"):
        score_generator(model, random_windows(seed=1), teacher)
    teacher.close()
    assert not teacher.path.exists()


def test_logits_that_are_not_numbers_are_an_error_and_no_score():
    with pytest.raises(VerificationError, match="not numbers"):
        score_generator(lambda ids: np.full((*ids.shape, VOCAB), np.nan, np.float32), random_windows())


def test_impossible_target_gives_infinite_perplexity():
    def never_zero(ids):
        logits = np.zeros((*ids.shape, VOCAB), np.float32)
        logits[..., 0] = -np.inf
        return logits

    assert score_generator(never_zero, [np.zeros((1, 4), np.int64)]).perplexity == math.inf


def test_full_disk_is_a_usage_error(tmp_path):
    (tmp_path / "teacher.f16").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="no room"):
        record_teacher(table_model(1)[1], random_windows(), tmp_path)
    assert not (tmp_path / "teacher.f16").is_symlink()


def test_large_vocabulary_is_scored_in_chunks(tmp_path):
    vocab, length = 49152, 129
    logits = np.random.default_rng(0).standard_normal((1, length, vocab), dtype=np.float32)
    windows = [np.random.default_rng(1).integers(0, vocab, (1, length))]
    teacher, _ = record_teacher(lambda ids: logits, windows, tmp_path)
    tracemalloc.start()
    score_generator(lambda ids: logits, windows, teacher)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        peak < 160e6
    )  # several blocks of 16 MiB; whole-window temporaries would be 50 MB each, eight of them


def test_log_softmax_is_exact_for_extreme_logits():
    logits = np.array([[1000.0, 0.0, -1000.0], [-5e4, -5e4, -5e4]], dtype=np.float32)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-6)


def test_divergence_ignores_tokens_the_reference_rules_out():
    reference = np.array([[0.0, 0.0, -np.inf]])
    np.testing.assert_allclose(kl_divergence(reference, np.array([[0.0, 0.0, -np.inf]])), [0.0], atol=1e-15)
    assert kl_divergence(np.zeros((1, 3)), reference)[0] == np.inf


def test_embedder_score_equals_slow_loop():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 8)).astype(np.float32)
    embeddings = reference + 0.4 * rng.standard_normal(reference.shape).astype(np.float32)

    def cosine(a, b):
        return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a) / np.linalg.norm(b))

    def nearest(rows, i):
        return max((j for j in range(len(rows)) if j != i), key=lambda j: cosine(rows[i], rows[j]))

    cosines = [cosine(a, b) for a, b in zip(embeddings, reference, strict=True)]
    same = [nearest(embeddings, i) == nearest(reference, i) for i in range(40)]
    score = score_embedder(embeddings, reference)
    assert score.cosine_mean == pytest.approx(np.mean(cosines), rel=1e-6)
    assert score.cosine_min == pytest.approx(min(cosines), rel=1e-6)
    assert score.neighbour_agreement == np.mean(same)
    assert 0 < score.neighbour_agreement < 1


def test_embedder_edge_cases():
    assert score_embedder(np.zeros((1, 4)), np.ones((1, 4))).to_dict() == {
        "cosine_mean": 0.0,
        "cosine_min": 0.0,
        "neighbour_agreement": None,
        "sentences": 1,
    }
    with pytest.raises(VerificationError):
        score_embedder(np.full((3, 4), np.nan), np.ones((3, 4)))
    with pytest.raises(ValueError, match="reference"):
        score_embedder(np.ones((3, 4)), np.ones((2, 4)))


def test_neighbours_do_not_depend_on_the_block_size():
    from gemini.benchmarks.agreement import _nearest, _unit_rows

    rows = _unit_rows(np.random.default_rng(0).standard_normal((50, 6)))
    np.testing.assert_array_equal(_nearest(rows, block=7), _nearest(rows, block=512))


def test_classifier_score_equals_torch():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((50, 4)).astype(np.float32)
    logits = reference + 0.5 * rng.standard_normal(reference.shape).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    score = score_classifier(logits, reference, labels)
    ours, theirs = torch.tensor(logits).double(), torch.tensor(reference).double()
    kl = F.kl_div(F.log_softmax(ours, -1), F.softmax(theirs, -1), reduction="batchmean").item()
    assert score.kl == pytest.approx(kl, rel=1e-6)
    assert score.agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert score.accuracy == float((logits.argmax(1) == labels).mean())
    assert score.logit_difference == pytest.approx(np.abs(logits - reference).max(), rel=1e-6)


def test_multi_label_decides_every_label_alone():
    logits, reference = np.array([[2.0, -1.0, 3.0]]), np.array([[1.0, 1.0, 2.0]])
    p, q = 1 / (1 + np.exp(-reference)), 1 / (1 + np.exp(-logits))
    bernoulli = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    score = score_classifier(logits, reference, [[1, 0, 0]], problem="multi_label")
    assert score.kl == pytest.approx(bernoulli.sum(), rel=1e-9)
    assert score.agreement == score.accuracy == pytest.approx(2 / 3)


def test_regression_compares_values_only():
    score = score_classifier([[0.5], [1.0]], [[0.4], [1.3]], problem="regression")
    assert (score.agreement, score.kl, score.accuracy) == (None, None, None)
    assert score.logit_difference == pytest.approx(0.3)
