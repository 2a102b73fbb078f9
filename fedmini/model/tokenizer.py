"""A base's tokenizer and chat template, as transformers saved them, without importing transformers where that isn't needed."""

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from fedmini.errors import ConfigError

_ROLES = ("bos", "eos", "unk", "pad")
_KNOWN = frozenset(  # of tokenizer_config.json: what is read here, or changes nothing about a tokenizer that is all in its file
    {f"{role}_token" for role in _ROLES}
    | {"backend", "tokenizer_class", "is_local", "local_files_only", "model_max_length", "clean_up_tokenization_spaces"}
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' own, or a SavedTokenizer."""

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any
    unk_token_id: Any
    pad_token_id: Any

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def __call__(self, text: Any, *, add_special_tokens: bool = True, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...


def load(folder: Path) -> Tokenizer:
    """The tokenizer that transformers' save_pretrained wrote. Raises ConfigError for one that can't be read."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        names = {key: settings.get(key) for key in (f"{role}_token" for role in _ROLES)}
        is_plain = settings.get("tokenizer_class") == "TokenizersBackend" and set(settings) <= _KNOWN
        if is_plain and all(name is None or isinstance(name, str) for name in names.values()):
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            template = folder / "chat_template.jinja"
            return SavedTokenizer(backend, names, template.read_text("utf-8") if template.exists() else None)
        from transformers import AutoTokenizer

        loaded: Tokenizer = AutoTokenizer.from_pretrained(folder)
        return loaded
    except Exception as error:  # the libraries raise whatever they stumble on, Exception itself among it
        raise ConfigError(
            f"the tokenizer in {folder} can't be read ({type(error).__name__}): remove the folder"
        ) from error


class SavedTokenizer:
    """Gives the tokens and texts that transformers' tokenizer over the same files gives. Safe from several threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, names: Mapping[str, str | None], chat_template: str | None
    ) -> None:
        self.backend_tokenizer, self.chat_template = backend, chat_template
        self._lock = threading.Lock()
        self._names = {key: name for key, name in names.items() if name is not None}
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            None if (name := names.get(f"{role}_token")) is None else backend.token_to_id(name) for role in _ROLES
        )

    @cached_property
    def all_special_ids(self) -> list[int]:
        """Of the tokens with a role."""
        ids = (getattr(self, f"{role}_token_id") for role in _ROLES)
        return list(dict.fromkeys(id for id in ids if id is not None))

    @cached_property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that no merging of text gives, by id."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> Mapping[str, Any]:
        """{"input_ids": ...} of a text, or of each of several. Split: a control token in a text is text."""
        texts = [text] if isinstance(text, str) else list(text)
        with self._lock:  # what is set is the tokenizer's, and so every thread's
            self.backend_tokenizer.encode_special_tokens = split_special_tokens
            found = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [one.ids for one in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **options: Any,
    ) -> str:
        """The conversation as the template writes it. Raises what the template raises, and ValueError without one."""
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        assert not tokenize, "what was typed is encoded apart from the template"
        rendered: str = self._template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        return rendered

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of tokens, as it is: no spaces are cleaned up."""
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _template(self) -> Any:
        """Compiled as transformers compiles templates: in a sandbox, with its functions, filters and tags."""
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _namespace()
        return environment.from_string(str(self.chat_template))


class _Dict:
    """What a template may do with `dict`."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """As dict's own."""
        return dict.fromkeys(keys, value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(form)


def _namespace() -> Any:
    """Jinja's, without names through which a template would reach Python's insides."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNames(Namespace):
        def __init__(*values: Any, **named: Any) -> None:
            self, *given = values
            Namespace.__init__(self)
            for name, value in dict(*given, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a template may not use the name {name!r}")
            super().__setitem__(name, value)

    return PlainNames


def _generation_tag() -> Any:
    """{% generation %}: what is in it is rendered, and no more."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    return Generation
