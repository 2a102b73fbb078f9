"""A small chat program with a device inside: `python clients/embedded_app.py FOLDER [--server URL --server-key FILE]`."""

import argparse
import sys

from fedmini import Device, FedMiniError

HELP = "/teach [A BETTER REPLY]  /status  /receipts  /consent HASH  /forget  /quit, or anything else to the model"
MAX_MESSAGES = 9  # that the model is shown; odd: the first of them is the person's


def obey(device: Device, said: list[dict[str, str]], typed: str) -> None:
    """Do what a line asks for. `said` is the conversation so far."""
    match typed.partition(" "):
        case ("/teach", _, better) if said:
            device.add_example(better or said[-1]["content"], prompt=said[-2]["content"])
        case ("/status", _, _):
            status = device.status()
            print(f"{status.num_examples} examples, {status.rounds_joined} contributions, {dict(status.epsilon_spent)}")
            print(status.why_not_training or "trains when it is asked")
            for offer in status.offers:
                print(*offer.terms, f"If you agree: /consent {offer.manifest_hash}", sep="\n")
        case ("/receipts", _, _):
            for one in device.receipts():
                print(f"{one.run_id}, round {one.round_num}: {one.size_bytes} masked bytes, {dict(one.epsilon)}")
        case ("/consent", _, manifest_hash):
            device.consent(manifest_hash)
        case ("/forget", _, _):
            device.forget()
            said.clear()
        case _ if not typed or typed.startswith("/"):
            print(HELP)
        case _:
            asked, pieces = [*said, {"role": "user", "content": typed}], []
            for piece in device.reply_in_pieces(asked[-MAX_MESSAGES:]):
                print(piece, end="", flush=True)
                pieces.append(piece)
            print()
            said[:] = [*asked, {"role": "assistant", "content": "".join(pieces)}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chat with a model that learns from you, privately.")
    for name in ("folder", "--server", "--server-key"):
        parser.add_argument(name)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # what no text can hold gets a mark in its place
    options, conversation = parser.parse_args(), list[dict[str, str]]()
    try:
        with Device(options.folder, options.server, options.server_key) as device:
            if options.server:
                device.start()
            print(HELP)
            while (line := input("> ").strip()) != "/quit":
                try:
                    obey(device, conversation, line)
                except FedMiniError as error:
                    print(error)
    except (FedMiniError, KeyboardInterrupt, EOFError) as error:
        sys.exit(f"embedded_app: {error}" if isinstance(error, FedMiniError) else 0)
