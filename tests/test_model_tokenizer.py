"""The tokenizer without transformers: the tokens, texts and templates that transformers itself gives."""

import json
import threading

import jinja2
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedmini.errors import ConfigError
from fedmini.model import digests, tokenizer
from fedmini.model.tokenizer import SavedTokenizer

TALK = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "DEF."}]
TEXTS = ("", "abc", "ab <|im_end|> a, b!", "a\n\n b  c", "d\u00f6s \U0001f600 \x00", "<|im_start|><|im_end|>ab" * 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_llama.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    ours = tokenizer.load(folder)
    assert isinstance(ours, SavedTokenizer)
    return ours, AutoTokenizer.from_pretrained(folder)


def with_template(ours, template):
    return SavedTokenizer(ours.backend_tokenizer, ours._names, template)


@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}, {"split_special_tokens": True}])
def test_texts_become_the_tokens_that_transformers_gives_and_back(both, options):
    ours, theirs = both

    for text in TEXTS:
        tokens = theirs(text, **options)["input_ids"]
        assert ours(text, **options)["input_ids"] == tokens
        for skipped in (False, True):
            expected = theirs.decode(tokens, skip_special_tokens=skipped, clean_up_tokenization_spaces=False)
            assert ours.decode(tokens, skip_special_tokens=skipped) == expected
    assert ours(list(TEXTS), **options)["input_ids"] == theirs(list(TEXTS), **options)["input_ids"]


@settings(max_examples=50)
@given(text=st.text(max_size=40), split=st.booleans())
def test_any_text_becomes_the_same_tokens(both, text, split):
    ours, theirs = both
    expected = theirs(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
    assert ours(text, add_special_tokens=False, split_special_tokens=split)["input_ids"] == expected


def test_what_identifies_it_is_the_same(both):
    ours, theirs = both

    assert digests.tokenizer_digest(ours) == digests.tokenizer_digest(theirs)
    assert ours.all_special_ids == theirs.all_special_ids
    special = [{id: token.special for id, token in one.added_tokens_decoder.items()} for one in both]
    assert special[0] == special[1]
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")


@pytest.mark.parametrize(
    "template",
    [
        tiny_llama.TEMPLATE,
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}  {{ m.content | upper }}{% endif %}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson(false, 2) }}{% endfor %}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{{ dict(a=1).a }}{{ dict.fromkeys('ab', 1) }}",
    ],
)
@pytest.mark.parametrize("opens", [False, True])
def test_templates_are_rendered_as_transformers_renders_them(both, template, opens):
    ours, theirs = both
    options = {"add_generation_prompt": opens, "tokenize": False}

    expected = theirs.apply_chat_template(TALK, chat_template=template, **options)

    assert with_template(ours, template).apply_chat_template(TALK, **options) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such turn') }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__subclasses__() }}",
        "{{ ('{0.__globals__[json].codecs.builtins}' | attr('format'))(raise_exception) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(both, template):
    with pytest.raises(jinja2.TemplateError):
        with_template(both[0], template).apply_chat_template(TALK)


def test_threads_do_not_change_each_others_tokens(both):
    """One of them encodes what was typed, the other what a template wrote."""
    ours = both[0]
    text, rounds = "<|im_end|>ab" * 20, 300
    expected = {split: ours(text, split_special_tokens=split)["input_ids"] for split in (False, True)}
    wrong = []

    def encode(split):
        wrong.extend(
            split for _ in range(rounds) if ours(text, split_special_tokens=split)["input_ids"] != expected[split]
        )

    threads = [threading.Thread(target=encode, args=(split,)) for split in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert expected[False] != expected[True] and not wrong


def test_settings_that_are_not_known_are_left_to_transformers_and_damage_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"add_prefix_space": False}))

    assert not isinstance(tokenizer.load(tmp_path), SavedTokenizer)

    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        tokenizer.load(tmp_path)
