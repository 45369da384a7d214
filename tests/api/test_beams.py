"""Beam search in onnxruntime finds the tokens that transformers finds."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gemini
from gemini.cli import main
from gemini.errors import RequestError
from gemini.model.gemini import caption_prompt, continue_prompt
from gemini.pipeline import compress_model
from gemini.runtime import GenerationOptions, load
from gemini.runtime.beams import beam_search, log_softmax

VARIANTS = [
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def sharp(gemini_folder, tmp_path_factory):
    """The tiny Gemini with a head that knows what it wants, and its bundle."""
    folder = tmp_path_factory.mktemp("sharp")
    network = gemini.GeminiForConditionalGeneration.from_pretrained(gemini_folder).eval()
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(4)
    network.save_pretrained(folder)
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(folder)
    gemini.GeminiImageProcessor.from_pretrained(gemini_folder).save_pretrained(folder)
    bundle = tmp_path_factory.mktemp("bundles") / "sharp"
    compress_model(str(folder), bundle, "fp32", progress=False)
    return network, gemini.GeminiTokenizer.from_pretrained(gemini_folder), bundle


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_encoder_decoder_finds_what_transformers_finds(options, sharp):
    network, tokenizer, bundle = sharp
    session = load(bundle)
    sources = [tokenizer(continue_prompt(text))["input_ids"] for text in ("Once upon", "The sea is grey")]
    found = session.generate_ids(sources, options=GenerationOptions(max_new_tokens=10, **options))
    for source, answer in zip(sources, found, strict=True):
        expected = network.generate(torch.tensor([source]), max_new_tokens=10, do_sample=False, **options)
        assert answer == expected[0, 1:].tolist()


@pytest.fixture(scope="module")
def decoder(gemini_folder, tmp_path_factory):
    """A tiny Llama that knows what it wants, and its bundle."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, eos_token_id=[7, 90], bos_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder / "model")
    gemini.GeminiTokenizer.from_pretrained(gemini_folder).save_pretrained(folder / "model")
    compress_model(str(folder / "model"), folder / "bundle", "fp32", progress=False)
    return model, folder / "bundle"


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_decoder_finds_what_transformers_finds(options, decoder):
    model, bundle = decoder
    prompts = [[5, 9, 11], [20, 30, 40, 50, 60]]
    found = load(bundle).generate_ids(prompts, GenerationOptions(max_new_tokens=12, **options))
    for prompt, answer in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, **options)
        assert answer == expected[0, len(prompt) :].tolist()


class Table:
    """A model whose next token depends on the last one alone."""

    def __init__(self, logits):
        self.logits, self.last = np.log(np.asarray(logits, np.float32)), None

    def prefill(self, ids):
        self.last = np.array([row[-1] for row in ids])
        return self.logits[self.last]

    def step(self, tokens):
        self.last = tokens
        return self.logits[tokens]

    def reorder(self, rows):
        self.last = self.last[rows]


def test_a_likely_whole_beats_a_likely_beginning():
    # From 0: 1 (0.6) leads to many unlikely ends, 2 (0.4) to a sure one; 3 ends.
    chances = [[0.0, 0.6, 0.4, 0.0], [0.4, 0.2, 0.1, 0.3], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    with np.errstate(divide="ignore"):
        table = Table(chances)
    for beams, expected in ((2, [2, 3]), (4, [2, 3])):
        options = GenerationOptions(num_beams=beams, length_penalty=0.0)
        assert beam_search(table, [[0]], options, frozenset({3}), 5) == ([expected], ["eos"])


def test_without_an_end_the_likeliest_of_all_texts_is_found():
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.ones(5) * 0.5, 5)
    everything = {
        (a, b, c): chances[0, a] * chances[a, b] * chances[b, c]
        for a in range(5)
        for b in range(5)
        for c in range(5)
    }
    options = GenerationOptions(num_beams=25)
    found, reasons = beam_search(Table(chances), [[0]], options, frozenset(), 3)
    assert tuple(found[0]) == max(everything, key=everything.get) and reasons == ["length"]


def test_log_softmax_equals_torch():
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 30
    np.testing.assert_allclose(log_softmax(logits), torch.from_numpy(logits).log_softmax(-1), atol=1e-5)


def test_captions_are_searched_and_sampling_is_not(sharp, picture, capsys):
    network, tokenizer, bundle = sharp
    model = gemini.load_model(bundle)
    inputs = dict(tokenizer(caption_prompt("en"), return_tensors="pt", return_token_type_ids=False))
    processor = gemini.GeminiImageProcessor(size={"height": 16, "width": 16})
    inputs |= processor(gemini.load_image(picture), return_tensors="pt")
    ids = network.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=4)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert model.generate_caption(picture, max_length=12) == expected
    assert main(["run", str(bundle), "--image", picture, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    sampled = {model.generate_text("The", 12, seed=seed, temperature=1.5, num_beams=3) for seed in range(3)}
    assert len(sampled) > 1
    assert "".join(model.stream_text("The", 12, num_beams=3)) == model.generate_text("The", 12)[3:]
    with pytest.raises(RequestError, match="num_beams"):
        model.generate_text("The", num_beams=0)
