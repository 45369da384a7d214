"""Tasks: batches are what the examples say, and a pure function of the step."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from gemini.errors import DataError
from gemini.model.data import Review, augment
from gemini.model.gemini import continue_prompt
from gemini.model.training.corpus import NO_DRAWINGS, Corpus, load_corpus
from gemini.model.training.losses import generation_loss, loss_of, make_optimizer
from gemini.model.training.options import TaskOptions
from gemini.model.training.start import make_model
from gemini.model.training.tasks import (
    IGNORED,
    CaptionTask,
    ClassifyTask,
    NameTask,
    Pictures,
    both_ends,
    build_tasks,
    encode,
    infill,
)


@pytest.fixture(scope="module")
def tasks(tokenizer, options, corpus):
    return {task.name: task for task in build_tasks(tokenizer, options, corpus, train=True)}


@pytest.mark.parametrize("name", ["caption", "continue", "denoise", "classify"])
def test_a_batch_depends_on_the_step_alone(tasks, tokenizer, options, corpus, name):
    (other,) = [task for task in build_tasks(tokenizer, options, corpus, train=True) if task.name == name]
    for step in (9, 2, 9):
        first, second = tasks[name].batch(step), other.batch(step)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(a, b) for a, b in zip(first.values(), other.batch(3).values(), strict=True))


def test_captions_are_names_in_the_language_of_the_prompt(tasks, tokenizer, corpus):
    batch = tasks["caption"].batch(0)
    names = {"<en>": corpus.drawings.en, "<zh>": corpus.drawings.zh}
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    for prompt, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        language = tokenizer.convert_ids_to_tokens(prompt.tolist())[-1]
        known = labels[labels != IGNORED].tolist()
        assert known[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(known[:-1]) in names[language]


def test_a_continuation_follows_its_prompt(tasks, tokenizer, corpus):
    for step in range(6):
        batch = tasks["continue"].batch(step)
        for source, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            prompt = tokenizer.decode(source[mask == 1].tolist()[1:])
            rest = tokenizer.decode(labels[labels != IGNORED].tolist(), skip_special_tokens=True)
            assert any(prompt + rest in text for text in corpus.texts)


def test_a_prompt_is_its_task_token_and_its_text(tokenizer):
    together, alone = encode(tokenizer, [continue_prompt("The bird saw"), "The bird saw"])
    assert together == encode(tokenizer, [continue_prompt("")])[0] + alone


def test_infilling_hides_the_share_asked_for():
    generator = np.random.default_rng(0)
    hidden = []
    for _ in range(200):
        noisy = infill(range(100, 200), 3, generator)
        kept = [token for token in noisy if token != 3]
        assert kept == sorted(kept) and set(kept) <= set(range(100, 200))
        assert all(not (a == b == 3) for a, b in itertools.pairwise(noisy))
        hidden.append(100 - len(kept))
    assert 29 < np.mean(hidden) < 34  # 30, and on average half a span more


def test_labels_of_reviews_are_tokens_or_classes(tasks, tokenizer, options, corpus):
    written = tasks["classify"].batch(1)
    run = dataclasses.replace(options, head="classification", tasks={"classify": options.tasks["classify"]})
    (task,) = build_tasks(tokenizer, run, corpus, train=True)
    classes = task.batch(1)["labels"]
    answers = tokenizer.convert_tokens_to_ids(["<negative>", "<positive>"])
    assert classes.tolist() == torch.eye(2)[classes[:, 1].long()].tolist()  # without a teacher they are sure
    assert written["labels"][:, 0].tolist() == [answers[label] for label in classes[:, 1].long()]
    assert (written["labels"][:, 1] == tokenizer.eos_token_id).all()
    assert torch.equal(written["first_shares"][:, answers], classes)
    assert (written["first_shares"].sum(1) == 1).all()
    (held_out,) = build_tasks(tokenizer, run, corpus, train=False)
    assert held_out.batch(1)["labels"].dtype == torch.int64


def test_soft_labels_are_shares_of_each_class(tokenizer, options, corpus, tmp_path):
    path = tmp_path / "teacher.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": review.text, "positive": 0.8}) for review in corpus.reviews)
    )
    taught = TaskOptions(batch=32, teacher=str(path), teacher_share=0.5)
    run = dataclasses.replace(options, head="classification", tasks={"classify": taught})
    (task,) = build_tasks(tokenizer, run, corpus, train=True)
    shares = torch.cat([task.batch(step)["labels"] for step in range(10)])
    assert set(shares[:, 1].unique().tolist()) == {
        np.float32(0.4),
        np.float32(0.9),
    }  # half 0.8, half the label
    torch.testing.assert_close(shares.sum(1), torch.ones(320))
    (held_out,) = build_tasks(tokenizer, run, corpus, train=False)
    assert set(held_out.positive) == {0.0, 1.0}


def test_a_writer_is_taught_the_shares_of_its_first_token(tasks, model, tokenizer):
    """The loss over soft labels is the mean of the losses of each label, weighed by its share."""
    batch = tasks["classify"].batch(0)
    answers = tokenizer.convert_tokens_to_ids(["<negative>", "<positive>"])
    share = torch.linspace(0.1, 0.9, len(batch["labels"]))
    soft = torch.zeros_like(batch["first_shares"])
    soft[:, answers] = torch.stack([1 - share, share], dim=1)
    model.eval()
    losses = []
    for row, positive in enumerate(share):
        for answer, weight in zip(answers, (1 - positive, positive), strict=True):
            labels = torch.tensor([[answer, tokenizer.eos_token_id]])
            source = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            # What follows is taught behind the likelier label alone.
            logits = model(**source, labels=labels).logits[0].log_softmax(-1)
            losses.append(-weight * logits[0, answer])
            if answer == batch["labels"][row, 0]:
                losses.append(-logits[1, tokenizer.eos_token_id])
    expected = sum(losses) / (2 * len(share))
    loss = generation_loss(model, {**batch, "first_shares": soft})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_that_cannot_be_read_are_refused(tokenizer, options, corpus, tmp_path):
    path = tmp_path / "teacher.jsonl"
    path.write_text('{"text": "x"}')
    with pytest.raises(DataError, match="soft labels"):
        ClassifyTask(tokenizer, TaskOptions(2, teacher=str(path)), options, corpus.reviews, True)


def test_a_label_outside_the_set_is_refused(tokenizer, options):
    with pytest.raises(DataError, match="label 2 of the review 'so so' is neither"):
        ClassifyTask(tokenizer, TaskOptions(2), options, [Review("so so", 2, "en", "train")], True)


def test_an_empty_set_is_refused(tokenizer, options):
    with pytest.raises(DataError, match="no drawings to train on"):
        CaptionTask(tokenizer, TaskOptions(2), options, Corpus(NO_DRAWINGS), True)
    with pytest.raises(DataError, match="no reviews to train on"):
        ClassifyTask(tokenizer, TaskOptions(2), options, [], True)


@pytest.mark.parametrize("name", ["caption", "continue", "denoise", "classify"])
def test_the_loss_is_the_models_own(tasks, model, name):
    batch = tasks[name].batch(0)
    shares = batch.pop("first_shares", None)
    assert (shares is not None) == (name == "classify")
    # fp32 sums in another order.
    torch.testing.assert_close(generation_loss(model, batch), model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_only_matrices_decay(model):
    decayed, others = make_optimizer(model, 0.1).param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(parameter)] for parameter in others["params"]}
    assert "model.shared.weight" in free and any(name.endswith("bias") for name in free)
    total = sum(len(group["params"]) for group in (decayed, others))
    assert total == len(list(model.parameters()))


def test_layers_of_the_encoder_have_a_rate_of_their_own(model):
    groups = make_optimizer(model, 0.1, encoder_rate=0.25).param_groups
    scales = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == (0.25 if name.startswith("model.encoder.fusion.") else 1.0), name
        assert decays[id(parameter)] in ((0.0, 0.1) if parameter.ndim > 1 else (0.0,)), name


@pytest.mark.parametrize(("longest", "read"), [(4, [0, 1, 8, 9]), (5, [0, 1, 7, 8, 9]), (10, [*range(10)])])
def test_of_a_long_text_both_ends_are_read(longest, read):
    assert both_ends([*range(10)], longest) == read
    assert both_ends([*range(3)], longest) == [0, 1, 2]


def test_further_texts_of_a_teacher_are_learnt_too(tokenizer, options, corpus, tmp_path):
    path = tmp_path / "teacher.jsonl"
    path.write_text(json.dumps({"text": "never seen", "positive": 1.0}))
    taught = TaskOptions(2, teacher=str(path))
    task = ClassifyTask(tokenizer, taught, options, corpus.reviews, True)
    assert task.texts[-1] == "never seen" and task.positive[-1] == 1.0
    assert len(task.texts) == len(corpus.reviews) + 1 == len(task.sources) == len(task.positive)
    held_out = ClassifyTask(tokenizer, taught, options, corpus.reviews, False)
    assert len(held_out.texts) == len(corpus.reviews)


def test_names_are_numbered_in_order_and_strangers_left_out(options, cache):
    corpus = load_corpus(cache, "train", ["name"])
    assert list(corpus.names) == sorted({*corpus.drawings.en}) and len(corpus.names) == 8
    corpus = dataclasses.replace(corpus, names=corpus.names[:3])
    task = NameTask(TaskOptions(4, pixels=16), options, corpus, train=False)
    assert len(task.labels) == 3
    batch = task.batch(0)
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert set(batch["labels"].tolist()) == {0, 1, 2}


def test_some_drawings_are_shown_by_another_hand(options, cache):
    corpus = load_corpus(cache, "train", ["name"])
    redrawn = np.zeros((len(corpus.drawings), 3, 64, 64, 4), np.uint8)
    redrawn[..., 3] = 255  # black squares, where the originals are noise
    pictures = Pictures(dataclasses.replace(corpus, redrawn=redrawn), TaskOptions(1))
    rows = np.arange(8).repeat(50)
    seen = pictures.draw(rows, np.random.default_rng(0), train=True)
    assert seen.shape == (400, 3, 64, 64)
    # The middle of a square stays one colour, however it was moved; a twentieth is drawn as lines.
    plain = seen[:, :, 28:36, 28:36].flatten(1).std(1) < 0.15
    assert 0.55 < plain.float().mean() < 0.8
    shown = pictures.draw(np.arange(8), np.random.default_rng(0), train=False)
    torch.testing.assert_close(shown, augment.on_white(torch.from_numpy(corpus.drawings.pixels)))


def test_a_mimic_learns_the_states_of_its_text(tokenizer, options, corpus):
    texts, thoughts = ["one text", "another"], np.array([[1, 2, 3], [4, 5, 6]], np.float16)
    run = dataclasses.replace(options, head="regression", tasks={"mimic": TaskOptions(2)})
    corpus = dataclasses.replace(corpus, thoughts=(texts, thoughts))
    (task,) = build_tasks(tokenizer, run, corpus, train=True)
    batch = task.batch(0)
    for ids, mask, state in zip(*batch.values(), strict=True):
        text = tokenizer.decode(ids[mask == 1].tolist()[1:])
        assert state.tolist() == thoughts[texts.index(text)].tolist()
    model = make_model(run, tokenizer, corpus).eval()
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = (own - batch["labels"]).square().mean()
    torch.testing.assert_close(loss_of("regression")(model, batch), expected)
    torch.testing.assert_close(model(**batch).loss, expected)
