"""The model card says what the files of a run say."""

import json
from dataclasses import asdict

from gemini.model.data.bias import count_bias
from gemini.model.training.card import model_card


def test_the_card_holds_the_runs_figures_and_samples(tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    stories = ["She is kind. He ran. He sat.", "A brave boy slept."]
    before = {"recipe": {"name": "tower"}, "steps": 7, "minutes": 2.5, "parameters": 2_000_000}
    summary = {
        "recipe": {"name": "tiny", "size": "nano", "fusion": "late", "first": "tower"},
        "steps": 9,
        "minutes": 3.5,
        "parameters": 8_400_000,
        "threads": 2,
        "torch": "2.13.0",
        "test": {
            "caption_en_exact": 65.43,
            "caption_en_count": 1445,
            "perplexity": 12.34,
            "continue_loss": 1.0,
        },
        "samples": {"stories": stories, "loops": 1, "bias": asdict(count_bias(stories))},
    }
    sources = {"packages": [{"name": "@a/b", "version": "1.2", "licence": "MIT", "use": "drawings"}]}
    for path, content in (
        (run / "tower" / "training.json", before),
        (run / "training.json", summary),
        (cache / "sources.json", sources),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    lines = model_card(run, cache).splitlines()
    for expected in (
        "# gemini-nano",
        "`gemini-edge train tiny`, 6 minutes on 2 threads (torch 2.13.0), from random weights.",
        "| tower | 7 | 2.5 | 2.0 M |",
        "| tiny | 9 | 3.5 | 8.4 M |",
        "| @a/b 1.2 | MIT | drawings |",
        "| captions of another hand, English: exact, % (1445 examples) | 65.4 |",
        "| held-out stories: perplexity a token | 12.3 |",
        "| kind | 0 | 1 |",
        "| brave | 1 | 0 |",
        "1. She is kind. He ran. He sat.",
        "2. A brave boy slept.",
    ):
        assert expected in lines
    text = "\n".join(lines)
    assert "3 words for men and boys and 1 for women and girls" in text
    assert (
        "1 of 2." in text and "$" not in text and "continue" not in text.split("## Figures")[1].split("##")[0]
    )
