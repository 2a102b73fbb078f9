"""Talking to a base model with an adapter, in the terminal."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedmini.config import BaseSection
from fedmini.errors import ConfigError, StateError
from fedmini.model import adapters, generation, loading, lora, packaged, runtime

TOP_P = 0.9
MAX_MESSAGES = 9  # of the conversation so far that the model is shown; odd: the first is the person's


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Which adapter to talk to, and how it picks its words."""

    adapter: Path
    base: str | None  # None: the one that the adapter names
    temperature: float
    max_new_tokens: int


def run(settings: ChatSettings, console: Console, prompt: str | None = None) -> None:
    """Answer one prompt, or hold a conversation until the input ends. What is said is kept nowhere."""
    model = _load(settings, console)
    if prompt is not None:
        _answer(model, [{"role": "user", "content": _text(prompt)}], settings, console)
        return
    console.print("Type a message; an empty line or Ctrl-D ends. Nothing is stored.", style="dim")
    messages: list[dict[str, str]] = []
    while text := _text(console.input("[bold]you:[/bold] ")).strip():
        messages.append({"role": "user", "content": text})
        console.print("[bold]model:[/bold] ", end="")
        messages.append({"role": "assistant", "content": _answer(model, messages[-MAX_MESSAGES:], settings, console)})


def _answer(model: lora.LoraModel, messages: list[dict[str, str]], settings: ChatSettings, console: Console) -> str:
    pieces = []
    for piece in model.reply(messages, _sampling(settings)):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        pieces.append(piece)
    console.print()
    return "".join(pieces)


def _text(typed: str) -> str:
    """What was typed, with a mark in place of bytes that are no UTF-8: no tokenizer takes those."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _load(settings: ChatSettings, console: Console) -> lora.LoraModel:
    if not (settings.adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"{settings.adapter} holds no adapter_config.json: give the adapter's folder, such as RUN/adapter"
        )
    shape, adapter = adapters.load_peft(settings.adapter)
    runtime.limit_threads(0)
    source = _base_section(settings.base or _named_base(settings.adapter))
    base = loading.load_base(source, runtime.default_cache_dir(), lambda note: console.print(note, style="dim"))
    model = lora.LoraModel(base, shape)
    model.set_adapter(adapter)
    return model


def _named_base(folder: Path) -> str:
    try:
        named = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise StateError(f"{folder / 'adapter_config.json'} can't be read: take another copy of the adapter") from error
    if not (isinstance(named, str) and named):
        raise ConfigError(f"{folder} does not say which base it belongs to: give it as --base")
    return named


def _base_section(base: str) -> BaseSection:
    if base in packaged.PACKAGED:
        return BaseSection(name=base)
    return BaseSection(path=Path(base)) if Path(base).exists() else BaseSection(hub_id=base)


def _sampling(settings: ChatSettings) -> generation.Sampling:
    return generation.Sampling(settings.max_new_tokens, settings.temperature, TOP_P, hold_dense=True)
