"""A reply, token by token."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from fedmini.errors import ConfigError
from fedmini.model.adaptation import Causal
from fedmini.model.attention import KeyValueCache
from fedmini.model.llama import Llama
from fedmini.model.packed_layers import PackedHead, PackedLinear
from fedmini.model.tokenizer import Tokenizer

_MARK, _MARKED = "Fedmini message mark {}.", re.compile(r"Fedmini message mark (\d+)\.")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character whose bytes are not all there yet


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and for how long."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # the smallest set of likeliest tokens that holds this much probability
    seed: int | None = None  # None: from the operating system
    hold_dense: bool = False  # dequantise once a reply instead of once a token: faster, and takes the dense memory


GREEDY = Sampling()


def reply(
    model: Causal,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling,
) -> Iterator[str]:
    """Pieces of text until the end of the turn, `max_new_tokens`, or the end of the base's context."""
    prompt = _prompt_of(tokenizer, messages)
    context = int(getattr(model.config, "max_position_embeddings", 2**31))
    if len(prompt) >= context:
        raise ConfigError(f"the conversation has {len(prompt)} tokens; this base holds {context}: shorten it")
    num_tokens = min(sampling.max_new_tokens, context - len(prompt))
    return _pieces(tokenizer, _tokens(model, prompt, _ends_of_turn(model, tokenizer), sampling, num_tokens))


def _prompt_of(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigError("this base has no chat template: choose a base that is made for conversations")
    marked = [{**message, "content": _MARK.format(index)} for index, message in enumerate(messages)]
    # The template never sees what was typed: "<|im_end|>" in a message stays text.
    rendered = str(tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False))
    pieces = _MARKED.split(rendered)  # template, number of a message, template, ...
    if str(len(messages) - 1) not in pieces[1::2]:
        raise ConfigError("this base's chat template leaves out what was said last: choose another base")
    prompt: list[int] = tokenizer(pieces[0], add_special_tokens=False)["input_ids"] if pieces[0] else []
    for number, template in zip(pieces[1::2], pieces[2::2], strict=True):
        prompt += _typed(tokenizer, messages[int(number)]["content"])
        prompt += tokenizer(template, add_special_tokens=False)["input_ids"] if template else []
    return prompt


def _typed(tokenizer: Tokenizer, text: str) -> list[int]:
    """What a person or the model said, as tokens without a control token among them: as training encodes it."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    control.update(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    return [token for token in tokens if token not in control]


def _ends_of_turn(model: Causal, tokenizer: Tokenizer) -> set[int]:
    said_by = model.config if isinstance(model, Llama) else model.generation_config
    configured = getattr(said_by, "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _tokens(model: Causal, prompt: list[int], ends: set[int], sampling: Sampling, num_tokens: int) -> Iterator[int]:
    device, answer = model.device, _answering(model)
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    step = prompt
    _hold_dense(model, model.dtype if sampling.hold_dense else None)
    try:
        for _ in range(num_tokens):
            with torch.no_grad():
                tokens = torch.tensor([step], device=device)
                logits = answer(tokens)
            token = _choose(logits[0, -1].float().cpu(), sampling, generator)
            if token in ends:
                return
            yield token
            step = [token]
    finally:
        _hold_dense(model, None)


def _answering(model: Causal) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives the logits behind the last of the tokens so far, which it remembers."""
    if isinstance(model, Llama):
        ours = KeyValueCache()
        return lambda tokens: model.forward(tokens, ours, logits_to_keep=1).logits
    from transformers import DynamicCache

    cache, theirs = DynamicCache(config=model.config), cast(Any, model)

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        output = theirs(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cast(torch.Tensor, output.logits)

    return answer


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0.0  # the likeliest always stays
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """What each token adds to the text. Tokens since the last whole word are decoded anew: a word may join two."""
    pending: list[int] = []
    said = ""
    for token in tokens:
        pending.append(token)
        text = _decode(tokenizer, pending)
        if text.endswith(_UNFINISHED) or len(text) <= len(said):
            continue
        yield text[len(said) :]
        said = text
        if text.endswith("\n"):  # nothing before a line's end changes any more
            pending, said = [], ""
    rest = _decode(tokenizer, pending)
    if len(rest) > len(said):
        yield rest[len(said) :]


def _decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _hold_dense(model: Causal, dtype: torch.dtype | None) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedHead):
            module.hold_dense(dtype)
