"""`gemini.load_model`: the same answers as torch, and an error with a remedy for what does not exist."""

import json
from pathlib import Path

import pytest
import torch

import gemini
from gemini.cli import main
from gemini.errors import RequestError, UsageError
from gemini.model.gemini import LABELS, caption_prompt, classify_prompt, continue_prompt
from gemini.model.training.evaluate import label_probabilities


@pytest.fixture(scope="module")
def model(gemini_bundle: Path) -> gemini.Model:
    return gemini.load_model(gemini_bundle)


@pytest.fixture(scope="module")
def reference(gemini_folder: Path):
    """(model, tokenizer, image processor) in torch."""
    return (
        gemini.GeminiForConditionalGeneration.from_pretrained(gemini_folder).eval(),
        gemini.GeminiTokenizer.from_pretrained(gemini_folder),
        gemini.GeminiImageProcessor.from_pretrained(gemini_folder),
    )


def in_torch(reference, source: str, picture: str | None = None, tokens: int = 12, beams: int = 1) -> str:
    network, tokenizer, processor = reference
    inputs = dict(tokenizer(source, return_tensors="pt", return_token_type_ids=False))
    if picture is not None:
        inputs |= processor(gemini.load_image(picture), return_tensors="pt")
    ids = network.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=beams)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_text_is_continued_as_in_torch(model, reference):
    expected = in_torch(reference, continue_prompt("Once upon a time"))
    assert model.generate_text("Once upon a time", max_length=12) == "Once upon a time" + expected
    assert "".join(model.stream_text("Once upon a time", max_length=12)) == expected


@pytest.mark.parametrize("prompt", ["Once upon a time", continue_prompt("Once upon a time")])
def test_the_command_line_puts_the_tasks_prefix_before_a_prompt(prompt, reference, gemini_bundle, capsys):
    assert main(["run", str(gemini_bundle), "--prompt", prompt, "--max-new-tokens", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["generation"]["text"]
    assert found == in_torch(reference, continue_prompt("Once upon a time"))


def test_sampling_options_reach_the_sampler(model):
    options = {"max_length": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    texts = {model.generate_text("The", seed=seed, **options) for seed in range(4)}
    assert len(texts) > 1 and model.generate_text("The", seed=0, **options) in texts


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_image_is_captioned_as_in_torch(language, model, reference, picture):
    for beams in (4, 1):
        expected = in_torch(reference, caption_prompt(language), picture, beams=beams)
        image = gemini.load_image(picture)
        assert model.generate_caption(image, language, max_length=12, num_beams=beams) == expected
    assert model.generate_caption(picture, language) == model.generate_caption(picture, language, num_beams=4)


def test_a_label_has_the_probability_that_torch_gives_it(model, reference):
    network, tokenizer, _ = reference
    inputs = tokenizer(classify_prompt("A lovely film"), return_tensors="pt", return_token_type_ids=False)
    start = torch.tensor([[network.config.decoder_start_token_id]])
    with torch.no_grad():
        logits = network(**inputs, decoder_input_ids=start).logits[0, 0]
    probabilities = logits[tokenizer.convert_tokens_to_ids(list(LABELS.values()))].softmax(0)
    label = model.classify("A lovely film")
    assert label.label == list(LABELS)[int(probabilities.argmax())]
    assert label.score == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_of_a_long_text_both_ends_are_read_as_in_training(model, reference):
    network, tokenizer, _ = reference
    text = " ".join(f"word {number} of a long review" for number in range(60)) + " and a lovely end"
    ids = tokenizer(classify_prompt(text), add_special_tokens=False)["input_ids"]
    assert len(ids) > 200
    read = torch.tensor([[*ids[:64], *ids[-64:]]])
    start = torch.tensor([[network.config.decoder_start_token_id]])
    with torch.no_grad():
        logits = network(input_ids=read, decoder_input_ids=start).logits[0, 0]
    expected = logits[tokenizer.convert_tokens_to_ids(list(LABELS.values()))].softmax(0)
    judged = label_probabilities(network, tokenizer, [text])[0]
    label = model.classify(text)
    assert judged.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert label.score == pytest.approx(float(expected.max()), abs=1e-5)


def test_texts_are_classified_together_as_alone(model, gemini_bundle, capsys):
    texts = ["A lovely film", "Broken after two days, never again", "很好"]
    alone = [model.session.classify([text])[0] for text in texts]
    for together, one in zip(model.session.classify(texts), alone, strict=True):
        assert [label.label for label in together] == [label.label for label in one]
        assert [label.score for label in together] == pytest.approx([label.score for label in one], abs=1e-5)
        assert sum(label.score for label in one) == pytest.approx(1)
    assert main(["run", str(gemini_bundle), "--text", *texts, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["labels"]
    assert [row[0]["label"] for row in found] == [row[0].label for row in alone]


def test_what_does_not_exist_is_named_with_a_remedy(model, picture):
    with pytest.raises(UsageError, match="gemini-nano, smollm2-135m"):
        gemini.load_model("gemini-nono")
    with pytest.raises(UsageError, match="gemini-edge train"):
        gemini.load_model("gemini-base")
    with pytest.raises(RequestError, match="en, zh"):
        model.generate_caption(picture, language="fr")


def test_a_model_of_another_task_says_so(toys):
    embedder = gemini.load_model(toys["embedder"])
    for ask in (embedder.generate_text, embedder.generate_caption, embedder.classify):
        with pytest.raises(RequestError, match="feature-extraction"):
            ask("text")
