"""`mm generate`: answers to a file of prompts, one JSON object a line, that a kill can interrupt at any moment.

A line of the input is {"messages": [...]}, a chat as `mm.datasets.messages` reads it (paths relative to the file), or
{"prompt": "text"}, with an "id" (default: the line's number). A line of the output has the id and either text,
finish_reason, and how long prompt and answer are (and reasoning and logprobs where there are any), or the error that
this prompt alone has met. Answers come in the order of the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mm.types import Sample


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


# Options of Decoding that the command line takes: name -> (type, help)
OPTIONS: dict[str, tuple[Any, str]] = {
    "temperature": (float, "0 takes the likeliest token (default), above draws"),
    "top-k": (int, "draw from the K likeliest tokens"),
    "top-p": (float, "draw from the likeliest tokens that make up P"),
    "min-p": (float, "draw from tokens at least P times as likely as the first"),
    "typical-p": (float, "draw from the most typical tokens that make up P"),
    "repetition-penalty": (float, "above 1: what prompt and answer have said becomes less likely"),
    "presence-penalty": (float, "taken off the logits of what the answer has said"),
    "frequency-penalty": (float, "the same, once for every time"),
    "num-beams": (int, "beam search with N beams"),
    "length-penalty": (float, "beams: above 0 favours long answers (default: 1)"),
    "penalty-alpha": (float, "contrastive search; needs --top-k"),
    "thinking": (_on_or_off, "on: reason before answering; off: answer at once; where the model has both"),
    "thinking-budget": (int, "so many tokens of reasoning, then the answer"),
    "draft": (str, "speculative decoding: lookup, mtp, or the directory of a smaller model"),
    "regex": (str, "answers match this regular expression"),
    "json-schema": (str, "answers follow this JSON schema (JSON text, or @FILE)"),
    "grammar": (str, "answers follow this Lark grammar (text, or @FILE)"),
    "logprobs": (int, "also say how likely each token was, and N alternatives"),
    "cache": (str, "what is kept of the past: dynamic, window, sinks:4+1020, int8, int4, evict:512"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see mm generate --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `mm generate`: 0 if every prompt has its answer, 1 if some failed.

    Raises ValueError or OSError for what concerns them all.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    source, target = Path(args.source), Path(args.target)
    if not source.is_file():
        raise ValueError(f"--in {source}: there is no such file")
    keys = [name.replace("-", "_") for name in OPTIONS]
    options = {key: _text(key, getattr(args, key)) for key in keys if getattr(args, key) is not None}
    settings = {
        "model": str(Path(args.model).resolve()),
        "model_manifest": _manifest(Path(args.model)),
        "prompts": hashlib.sha256(source.read_bytes()).hexdigest(),
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "stop_strings": args.stop,
        **options,
    }
    done = _resume(target, settings, args.overwrite)
    prompts = list(read_prompts(source))
    if len(done) == len(prompts):
        print(f"{target}: all {len(done)} answers are there", file=sys.stderr)
        return _status(done)

    import mm

    model = mm.load(args.model).to(_device(args.device))
    if isinstance(options.get("draft"), str) and options["draft"] not in ("lookup", "mtp"):
        options["draft"] = mm.load(options["draft"]).to(_device(args.device))
    if args.stop:
        options["stop_strings"] = args.stop
    with target.open("a", encoding="utf-8") as file:
        for record in answers(model, prompts[len(done) :], args.max_new_tokens, args.seed, options):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            done.append(record)
            if sys.stderr.isatty():
                print(f"\r{len(done)} of {len(prompts)}", end="", file=sys.stderr)
    failed = sum("error" in record for record in done)
    print(f"{target}: {len(done) - failed} answers" + (f", {failed} prompts failed" if failed else ""), file=sys.stderr)
    return _status(done)


def _manifest(model: Path) -> str | None:
    """The hash of what says what is in a model of ours, so that one trained anew in its place is another."""
    file = model / "manifest.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _status(records: list[dict[str, Any]]) -> int:
    return 1 if any("error" in record for record in records) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="mm generate",
        description="Answers prompts of a JSON-lines file. Run again, it goes on where it was interrupted.",
        epilog='A line of --in: {"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": '
        '"a.png"}, {"type": "text", "text": "what is it?"}]}]}, or {"prompt": "text"}.',
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a model, ours or a published one, or a GGUF file")
    parser.add_argument("--in", dest="source", required=True, metavar="FILE", help="prompts, one JSON object a line")
    parser.add_argument("--out", dest="target", required=True, metavar="FILE", help="answers, one JSON object a line")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is in --out")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=name.upper().split("-")[-1], help=text)
    return parser.parse_args(argv)


def _text(name: str, value: Any) -> Any:
    """Forms may stand in a file."""
    if name in ("json_schema", "grammar") and value.startswith("@"):
        return Path(value[1:]).read_text(encoding="utf-8")
    return value


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _resume(target: Path, settings: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """What the output holds already. Half a line at its end is cut off; the settings must be those that made it."""
    beside = target.with_name(target.name + ".settings.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    if overwrite or not target.exists():
        if target.exists():
            target.unlink()
        _write(beside, json.dumps(settings, indent=2))
        return []
    if not beside.is_file():
        raise ValueError(f"{target} is there, but not {beside.name}, which says how it was made; add --overwrite")
    before = json.loads(beside.read_text(encoding="utf-8"))
    changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    if changed:
        raise ValueError(f"{target} was made with another {', '.join(changed)}; add --overwrite, or name another --out")
    data = target.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with target.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_prompts(path: Path) -> Iterator[Sample]:
    """Raises ValueError naming the file, the line and what is wrong with it."""
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            sample = _sample(record, where, str(number), path.parent)
            if sample.key in seen:
                raise ValueError(f"{where}: the id {sample.key!r} is that of line {seen[sample.key]} too")
            seen[sample.key] = number
            yield sample


def _sample(record: Any, where: str, number: str, folder: Path) -> Sample:
    from mm.datasets.messages import sample_of_messages

    if not isinstance(record, dict) or ("messages" in record) == ("prompt" in record):
        raise ValueError(f'{where}: give an object with either "messages" or "prompt"')
    messages = record["messages"] if "messages" in record else [{"role": "user", "content": record["prompt"]}]
    return sample_of_messages(messages, str(record.get("id", number)), where, folder)


def answers(
    model: Any, prompts: Iterable[Sample], max_new_tokens: int, seed: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A record for each prompt, in order; what goes wrong with one is in its record."""
    from mm.generation.batching import Engine, unsupported
    from mm.generation.engine import generate
    from mm.generation.options import Decoding

    if unsupported(Decoding(**options)):
        for sample in prompts:
            try:
                (answer,) = generate(model, [sample], max_new_tokens, seed, **options)
                yield _record(sample, answer.text, answer)
            except ValueError as error:
                yield {"id": sample.key, "error": str(error)}
        return
    engine, waiting = Engine(model), deque[tuple[Any, Any]]()
    for sample in prompts:
        try:
            waiting.append((sample, engine.submit(sample, max_new_tokens, seed, **options)))
        except ValueError as error:
            waiting.append((sample, error))
        if len(waiting) > 2 * engine.max_rows:  # enough that no row is idle, and never all the media in memory
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


def _finish(sample: Sample, ticket: Any) -> dict[str, Any]:
    if isinstance(ticket, Exception):
        return {"id": sample.key, "error": str(ticket)}
    try:
        text = ticket.text()
    except (ValueError, RuntimeError) as error:
        return {"id": sample.key, "error": str(error)}
    return _record(sample, text, ticket)


def _record(sample: Sample, text: str, answer: Any) -> dict[str, Any]:
    """Of a Generation or a Ticket that has ended."""
    record = {
        "id": sample.key,
        "text": text,
        "finish_reason": answer.finish_reason,
        "prompt_length": answer.prompt_length,
        "answer_length": len(answer.ids),
    }
    told = {"reasoning": answer.reasoning, "logprobs": answer.logprobs}
    return record | {name: value for name, value in told.items() if value is not None}
