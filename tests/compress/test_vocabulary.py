"""Smaller vocabularies: the corpus in the same pieces, any text there and back, logits of the tokens kept."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_models import bart, bert, llama, t5, vit
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gemini.compress.vocabulary import (
    cut_vocabulary,
    prune_vocabulary,
    required_ids,
    smaller_tokenizer,
    used_tokens,
    write_tokenizer,
)
from gemini.errors import CheckpointError, RecipeError

WORDS = ["the", "cat", "sat", "on", "mat", "while", "reading", "1234", "letters", "from", "Zürich", "naïve"]
WORDS += ["café", "東京", "house", "houses", "housing"]
GENERAL = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(60)]
DOMAIN = ["the cat sat on the mat", "the houses, reading letters\nwhile housing 12"]


def train(pieces=None, merges_as_text: bool = False) -> dict:
    """A byte-level tokenizer of 500 tokens with special tokens before and after the others."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces is None)
    made.pre_tokenizer = byte_level if pieces is None else pre_tokenizers.Sequence([*pieces, byte_level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(GENERAL, trainer)
    made.add_tokens([AddedToken("<tool>", special=True), "housecat"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    contents = json.loads(made.to_str())
    if merges_as_text:  # as tokenizers before 0.20 wrote it
        contents["model"]["merges"] = [" ".join(merge) for merge in contents["model"]["merges"]]
    return contents


def load(contents: dict) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(contents))


PLAIN = train()
TOOL, LAST = (load(PLAIN).token_to_id(name) for name in ("<tool>", "housecat"))
SPLIT = train([pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(r"\s?\p{L}+|\s+"), "isolated")])


@pytest.mark.parametrize(
    "contents", [PLAIN, SPLIT, train(merges_as_text=True)], ids=["plain", "split", "text"]
)
def test_the_domain_comes_out_in_the_same_pieces(contents):
    before = copy.deepcopy(contents)
    made = smaller_tokenizer(contents, DOMAIN)
    assert contents == before
    old, new = load(contents), load(made.tokenizer)
    assert len(made.kept) % 32 == 0
    assert len(made.kept) == new.get_vocab_size() < old.get_vocab_size()
    for text in [*DOMAIN, "sat on the houses", " ".join(DOMAIN) + " <tool> 1 2"]:
        pieces = new.encode(text)
        assert pieces.tokens == old.encode(text).tokens
        assert [made.kept[index] for index in pieces.ids] == old.encode(text).ids
    assert isinstance(made.tokenizer["model"]["merges"][0], str) == isinstance(
        contents["model"]["merges"][0], str
    )


def test_what_is_kept_is_what_is_needed():
    """Without filling up: bytes, added tokens, used tokens, and what one by one merging makes on the way."""
    made = smaller_tokenizer(PLAIN, DOMAIN, multiple=1)
    old = load(PLAIN)
    needed = set(pre_tokenizers.ByteLevel.alphabet()) | {"<pad>", "<s>", "</s>", "<tool>", "housecat"}
    for index in used_tokens(old, DOMAIN):
        token = old.id_to_token(index)
        if token in needed:
            continue
        # The tokens of every prefix of the merge list are those that exist at that time.
        for count in range(len(PLAIN["model"]["merges"]) + 1):
            part = copy.deepcopy(PLAIN)
            part["model"]["merges"] = part["model"]["merges"][:count]
            encoded = load(part).model.tokenize(token)
            needed |= {piece.value for piece in encoded}
            if len(encoded) == 1:
                break
    assert {old.id_to_token(index) for index in made.kept} == needed


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_goes_there_and_back(text):
    for contents in (PLAIN, SPLIT):
        new = load(smaller_tokenizer(contents, DOMAIN).tokenizer)
        assert new.decode(new.encode(text, add_special_tokens=False).ids) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "\n", "x", "é"]), min_size=1, max_size=12))
def test_any_corpus_comes_out_in_the_same_pieces(words):
    text = " ".join(words)
    made = smaller_tokenizer(PLAIN, [text], multiple=8)
    assert load(made.tokenizer).encode(text).tokens == load(PLAIN).encode(text).tokens


def test_ids_are_rewritten_everywhere():
    contents = copy.deepcopy(PLAIN)
    contents["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    contents["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    made = smaller_tokenizer(contents, [" ".join(DOMAIN)]).tokenizer
    new = load(made)
    assert [entry["id"] for entry in made["added_tokens"]] == [
        new.token_to_id(name) for name in ("<pad>", "<s>", "</s>", "<tool>", "housecat")
    ]
    padded, _ = new.encode_batch(["", "the cat sat on"])
    assert padded.ids == [new.token_to_id(name) for name in ("<s>", "</s>", "<pad>", "<pad>")]
    for kind in ("BertProcessing", "RobertaProcessing"):
        contents["post_processor"] = {"type": "Sequence", "processors": [
            {"type": kind, "sep": ["<tool>", TOOL], "cls": ["<s>", 1]} | (
                {"trim_offsets": True, "add_prefix_space": False} if kind[0] == "R" else {}),
        ]}  # fmt: skip
        post = smaller_tokenizer(contents, DOMAIN).tokenizer["post_processor"]["processors"][0]
        assert post["sep"] == ["<tool>", new.token_to_id("<tool>")]


def test_words_that_are_tokens_without_merging():
    """Llama 3 looks whole words up before it merges; some of its tokens no merge makes."""
    contents = copy.deepcopy(PLAIN)
    contents["model"]["ignore_merges"] = True
    vocabulary = contents["model"]["vocab"]
    lonely = next(name for name in vocabulary if name.endswith("ouse"))
    contents["model"]["merges"] = [m for m in contents["model"]["merges"] if "".join(m) != lonely]
    made = smaller_tokenizer(contents, ["house", "the house"])
    for text in ("house", "the house"):
        assert load(made.tokenizer).encode(text).tokens == load(contents).encode(text).tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "is WordPiece, not byte-level BPE"),
        ({"model": {"type": "Unigram"}}, "is Unigram"),
        ({"model": {}}, "without a model type"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "does not work on bytes"),
        ({"pre_tokenizer": None}, "does not work on bytes"),
        ({"decoder": None}, "does not turn bytes back"),
        ({"model": {**PLAIN["model"], "end_of_word_suffix": "</w>"}}, "where in a word"),
        ({"model": {**PLAIN["model"], "dropout": 0.1}}, "at random"),
        ({"model": {**PLAIN["model"], "byte_fallback": True}}, "falls back"),
    ],
)
def test_other_tokenizers_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        smaller_tokenizer({**PLAIN, **change}, DOMAIN)


def test_ids_that_the_tokenizer_lacks_are_refused():
    with pytest.raises(RecipeError, match="Token 9999 is not"):
        smaller_tokenizer(PLAIN, DOMAIN, also=[9999])


def gpt2(**changes) -> GPT2LMHeadModel:
    """More rows than the tokenizer has tokens, as padded tables have."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": [2, LAST], "pad_token_id": 0}
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2, **{**ids, **changes})
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def logits(model, **feed) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: torch.as_tensor(value) for key, value in feed.items()}).logits


def test_model_and_tokenizer_together(tmp_path):
    model = gpt2()
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, LAST],
        pad_token_id=0,
        suppress_tokens=[1, LAST - 3],
        bad_words_ids=[[LAST - 3], [2]],
    )
    made = prune_vocabulary(model, PLAIN, DOMAIN)
    assert (made.tokens_before, made.tokens_after) == (512, len(made.vocabulary.kept))
    new, old = load(made.vocabulary.tokenizer), load(PLAIN)
    for text in DOMAIN:
        small = logits(made.model, input_ids=[new.encode(text).ids])
        large = logits(model, input_ids=[old.encode(text).ids])
        torch.testing.assert_close(small, large[..., list(made.vocabulary.kept)], rtol=1e-5, atol=1e-6)
    config = made.model.config
    assert config.eos_token_id == [new.token_to_id("</s>"), new.token_to_id("housecat")]
    assert (config.bos_token_id, config.pad_token_id) == (new.token_to_id("<s>"), new.token_to_id("<pad>"))
    assert made.model.generation_config.eos_token_id == config.eos_token_id
    assert made.model.generation_config.suppress_tokens == [new.token_to_id("<s>")]
    assert made.model.generation_config.bad_words_ids == [[new.token_to_id("</s>")]]
    assert made.model.lm_head.weight is made.model.transformer.wte.weight
    assert model.config.vocab_size == 512 and model.transformer.wte.weight.shape == (512, 32)

    source, target = tmp_path / "source", tmp_path / "target"
    PreTrainedTokenizerFast(tokenizer_object=old, eos_token="</s>", pad_token="<pad>").save_pretrained(source)
    (source / "vocab.json").write_text("{}")
    (source / "added_tokens.json").write_text(json.dumps({"<tool>": TOOL}))
    write_tokenizer(source, made.vocabulary, target)
    made.model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    read = GPT2LMHeadModel.from_pretrained(target).eval()
    ids = tokenizer(DOMAIN[0])["input_ids"]
    assert ids == new.encode(DOMAIN[0]).ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (new.token_to_id("</s>"), 0)
    assert torch.equal(logits(read, input_ids=[ids]), logits(made.model, input_ids=[ids]))
    assert json.loads((target / "vocab.json").read_text()) == made.vocabulary.tokenizer["model"]["vocab"]
    assert json.loads((target / "added_tokens.json").read_text()) == {"<tool>": new.token_to_id("<tool>")}
    merges = (target / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and len(merges) - 1 == len(
        made.vocabulary.tokenizer["model"]["merges"]
    )


@pytest.mark.parametrize("make", [llama, bert, bart, t5])
def test_logits_are_those_of_the_tokens_kept(make, tmp_path):
    """Embedding, head, their biases and copies in encoder and decoder, whether they are tied or not."""
    model = make()
    kept = sorted({*range(64), 70, 95} | required_ids(model))
    ids = np.random.default_rng(0).integers(0, 60, (2, 9))
    feed = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})
    made = cut_vocabulary(model, kept, feed)
    assert made.get_input_embeddings().weight.shape == (len(kept), 32)
    torch.testing.assert_close(
        logits(made, **feed), logits(model, **feed)[..., kept], rtol=1e-5, atol=1e-6
    )  # ids below 64 stay what they are
    made.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(read, **feed), logits(made, **feed))


def test_ids_out_of_order_or_missing_are_refused():
    window = np.ones((1, 4), int)
    for kept in ([], [1, 1], [-1, 2], [1, 600]):
        with pytest.raises(RecipeError, match="ids to keep"):
            cut_vocabulary(gpt2(), kept, window)
    with pytest.raises(RecipeError, match=f"eos_token_id is token {LAST}, which is not kept"):
        cut_vocabulary(gpt2(), range(64), window)
    model = gpt2(eos_token_id=2)
    model.generation_config = GenerationConfig(forced_decoder_ids=[[1, 5]])
    with pytest.raises(RecipeError, match="forced_decoder_ids"):
        cut_vocabulary(model, range(64), window)
    with pytest.raises(CheckpointError, match="no token embedding"):
        cut_vocabulary(vit(), range(4), window)
