"""Examples as tokens: the base's chat template around them, and which tokens are trained on.

What a person typed and what the template adds are encoded apart. So a message that spells a control token, such as
the end of a turn, stays a message: it can neither end its turn nor begin another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from fedmini.data.examples import Example
from fedmini.errors import ConfigError
from fedmini.types import EncodedExample

_BATCH_SIZE = 1024  # examples that the tokenizer is given at once
_PROMPT_MARK = "Fedmini prompt mark"
_RESPONSE_MARK = "Fedmini response mark"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    bos_token_id: Any
    unk_token_id: Any

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def __call__(self, text: Any, *, add_special_tokens: bool, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the chat template puts around a prompt and a reply, as tokens."""

    before_prompt: tuple[int, ...]
    before_response: tuple[int, ...]
    end: tuple[int, ...]  # ends the turn, and is learnt; what follows it (a newline) is left out


class Encoder:
    """Turns examples into tokens of at most `max_length`.

    "chat": the tokens are those of the tokenizer's chat template for [user: prompt, assistant: response] up to the
    token that ends the reply; the reply's tokens and that one are targets. Where there is too much, the prompt loses
    its beginning and the reply its end, each down to half of the room between the template's tokens, which stay whole.
    "text", and every example without a prompt: the response alone as raw text (with the begin token where the
    tokenizer adds one); every token but the first is a target; a long one loses its end.

    Guarantee: no control token comes from an example's text. Raises ConfigError where the tokenizer has no chat
    template, or one in which the reply can't be told from what is around it.
    """

    def __init__(self, tokenizer: Tokenizer, template: Literal["chat", "text"], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._control_ids = _control_ids(tokenizer)
        self._begin = _begin_ids(tokenizer)
        self._frame = _frame(tokenizer, self._control_ids) if template == "chat" else None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that the template puts before every prompt, whoever wrote it; none for raw text."""
        return self._frame.before_prompt if self._frame is not None else ()

    def encode(self, example: Example) -> EncodedExample | None:
        """One example as tokens; None where no target fits."""
        return next(self._encode_batch([example]))

    def encode_all(self, examples: Sequence[Example]) -> tuple[EncodedExample, ...]:
        """The examples as tokens, in order, without those that `encode` gives None for."""
        remaining = iter(examples)
        batches = iter(lambda: list(islice(remaining, _BATCH_SIZE)), [])
        return tuple(encoded for batch in batches for encoded in self._encode_batch(batch) if encoded is not None)

    def _encode_batch(self, examples: Sequence[Example]) -> Iterator[EncodedExample | None]:
        responses = self._encode_texts([example.response for example in examples])
        if self._frame is None:
            yield from map(self._as_text, responses)
            return
        prompts = iter(self._encode_texts([example.prompt for example in examples if example.prompt is not None]))
        for example, response in zip(examples, responses, strict=True):
            yield self._as_text(response) if example.prompt is None else self._as_chat(next(prompts), response)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encodings = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        # split_special_tokens already spells control tokens out; whatever a tokenizer lets through is dropped.
        return [
            tokens if self._control_ids.isdisjoint(tokens) else [id for id in tokens if id not in self._control_ids]
            for tokens in encodings["input_ids"]
        ]

    def _as_text(self, response: list[int]) -> EncodedExample | None:
        return self._encoded([*self._begin, *response], num_context=1)

    def _as_chat(self, prompt: list[int], response: list[int]) -> EncodedExample | None:
        assert self._frame is not None
        reply = [*response, *self._frame.end]
        room = self._max_length - len(self._frame.before_prompt) - len(self._frame.before_response)
        if room < 1 or not response:
            return None
        num_prompt = min(len(prompt), max(room - len(reply), room // 2))
        kept_prompt = prompt[len(prompt) - num_prompt :]
        context = [*self._frame.before_prompt, *kept_prompt, *self._frame.before_response]
        return self._encoded([*context, *reply], num_context=max(1, len(context)))

    def _encoded(self, tokens: list[int], num_context: int) -> EncodedExample | None:
        length = min(len(tokens), self._max_length)
        if length <= num_context:
            return None
        return EncodedExample(
            tokens=np.array(tokens[:length], dtype=np.int32),  # (length,)
            is_target=np.arange(length) >= num_context,  # (length,)
        )


def _control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    control_ids = added.union(tokenizer.all_special_ids)
    # Some tokenizers give one id to any unknown word: that is text, unless the id has another role too.
    others = [getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")]
    return frozenset(control_ids - ({tokenizer.unk_token_id} - set(others)))


def _begin_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The begin token where the tokenizer puts one before a text by default."""
    tokens = tokenizer("", add_special_tokens=True)["input_ids"]
    return tuple(tokens[:1]) if tokens and tokens[0] == tokenizer.bos_token_id else ()


def _frame(tokenizer: Tokenizer, control_ids: frozenset[int]) -> _Frame:
    question = [{"role": "user", "content": _PROMPT_MARK}]
    answer = [{"role": "assistant", "content": _RESPONSE_MARK}]
    try:
        opening = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*question, *answer], tokenize=False)
    except Exception as error:  # a template is a program of the base's author: anything can come out of it
        raise ConfigError(
            f'the base has no chat template that works ({type(error).__name__}): set data.template = "text"'
        ) from error
    before_prompt, prompt_mark, before_response = opening.partition(_PROMPT_MARK)
    rest = whole.removeprefix(opening)
    if not prompt_mark or not whole.startswith(opening) or not rest.startswith(_RESPONSE_MARK):
        raise ConfigError(
            "the base's chat template does not show a reply right after the opening that it generates from, so it "
            'can\'t be trained on: set data.template = "text"'
        )

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    end = encode(rest.removeprefix(_RESPONSE_MARK))
    num_end = next((index + 1 for index, id in enumerate(end) if id in control_ids), 0)
    return _Frame(encode(before_prompt), encode(before_response), end[:num_end])
