"""The command line: `jaxlm train | eval | generate | config | doctor | plot | tokenize | bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.schema import UserError

# Modules that import jax are imported by the command that needs them, so that --help answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for bad input, 128 + signal when told to stop)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes the words of a list only where they stand together; settings may stand between options too.
    if isinstance(getattr(arguments, "config", None), list) and not any(word.startswith("-") for word in rest):
        arguments.config += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except BrokenPipeError:
        # The reader of a pipe (head, say) has left; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxlm", description="Train, resume, evaluate and sample recurrent language models.",
        epilog="Settings are YAML files plus key=value words, e.g. `jaxlm train my.yaml train.steps=100 mesh.fsdp=4`.",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=description or summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    def add_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "config", nargs="*", metavar="CONFIG | key=value",
            help="a YAML file or the name of a built-in config (default: quickstart), and settings that override it",
        )  # fmt: skip

    def add_run(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run_dir", metavar="RUN", type=Path, help="run directory, e.g. runs/quickstart")
        sub.add_argument("--step", type=int, help="checkpoint to use (default: the newest that can be read)")

    sub = command(
        "train", train_command, "train a model, or continue its run",
        "Train a model, or continue its run from the newest checkpoint: the same command does both.\n"
        "Without a config it trains the built-in quickstart.\n\n"
        "SIGTERM or Ctrl-C saves a checkpoint and leaves with exit code 143 or 130.",
    )  # fmt: skip
    add_config(sub)
    sub.add_argument(
        "--accept-changes", action="store_true", help="continue a run although its config has changed in what it computes"
    )

    sub = command("eval", eval_command, "loss, perplexity and bits per byte of a trained model")
    add_run(sub)
    sub.add_argument("--text", nargs="+", metavar="PATH", help="evaluate these text files, directories or globs")
    sub.add_argument(
        "--source", action="append", metavar="YAML",
        help="evaluate a source as in data.sources, e.g. '{kind: jsonl, paths: [a.jsonl], field: text}'; repeatable",
    )  # fmt: skip
    sub.add_argument("--tokens", type=int, help="tokens to read at most (default: evaluation.tokens of the run)")
    sub.add_argument("--batch-size", type=int, help="rows a step (default: data.batch_size of the run)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("generate", generate_command, "continue prompts with a trained model")
    add_run(sub)
    sub.add_argument("--prompt", action="append", help="text to continue; repeat for a batch (default: an empty document)")
    sub.add_argument("--prompt-file", action="append", type=Path, metavar="FILE", help="a file whose text is a prompt")
    sub.add_argument("--max-tokens", type=int, default=256, help="length of a continuation (default %(default)s)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default %(default)s)")
    sub.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    sub.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default %(default)s)")
    sub.add_argument("--ignore-end", action="store_true", help="go on past the end of the document")

    sub = command("config", config_command, "print the resolved config, compare two, or describe all settings")
    add_config(sub)
    sub.add_argument("--diff", metavar="CONFIG", help="print what differs from this config")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    sub.add_argument("--keys", action="store_true", help="list every setting with type, default and meaning")

    sub = command("doctor", doctor_command, "devices, versions, and which form each op takes here and why")
    sub.add_argument(
        "config", nargs="*", metavar="CONFIG | key=value", help="a config whose model's ops are asked about too, with its heads"
    )
    sub.add_argument("--length", type=int, help="sequence length asked about (default: the config's, or 2048)")

    sub = command("plot", plot_command, "draw the loss curves of runs as a PNG (extra: plot)")
    sub.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    sub.add_argument("--output", "-o", type=Path, metavar="FILE", help="the PNG (default: RUN/loss.png of the first run)")

    sub = command("tokenize", tokenize_command, "train a BPE tokenizer and write token shards (extra: tokenizers)")
    sub.add_argument("output", type=Path, metavar="OUTPUT", help="directory to create")
    sub.add_argument("--text", nargs="+", metavar="PATH", help="text files, directories or globs")
    sub.add_argument("--source", action="append", metavar="YAML", help="a source as in data.sources; repeatable")
    sub.add_argument("--tokenizer", type=Path, metavar="FILE", help="an existing tokenizer.json instead of a new one")
    sub.add_argument("--bytes", action="store_true", help="use the byte tokenizer instead of a new one")
    sub.add_argument("--vocab-size", type=int, default=32_000, help="of a new BPE (default %(default)s)")
    sub.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default %(default)s)")

    sub = command("bench", None, "measure: ops side by side, mixers on diagnostic tasks")
    benches = sub.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)

    def bench(name: str, run, summary: str, description: str) -> argparse.ArgumentParser:
        sub = benches.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        directory = Path("docs/results") / f"bench_{name}"
        sub.add_argument("--quick", action="store_true", help="less of everything: minutes on a CPU")
        sub.add_argument(
            "--output", "-o", type=Path, default=directory, metavar="DIR", help="where results go (default %(default)s)"
        )
        return sub

    sub = bench(
        "mixers", bench_mixers_command, "time and memory of every op in every form on this device",
        "Time every op's recurrent, parallel, chunked and FFT form side by side on this device, forward and with its\n"
        "gradient, over sequence lengths; prints ratios to the recurrent form, writes mixers.json and draws mixers.png\n"
        "(extra: plot).",
    )  # fmt: skip
    sub.add_argument("--ops", type=names, metavar="A,B", help="ops (default: all)")
    sub.add_argument("--forms", type=names, metavar="A,B", help="recurrent, parallel, chunked, fft (default: all)")
    sub.add_argument(
        "--update", action="store_true", help="keep what DIR has of other ops than --ops, if measured with the same versions"
    )
    sub.add_argument("--lengths", type=numbers, metavar="N,M", help="tokens (default: 512 to 32768, doubling)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    for letter, what, value in (("B", "rows", 2), ("H", "heads", 4), ("K", "key channels", 64), ("V", "value channels", 64)):
        sub.add_argument(f"-{letter}", type=int, default=value, metavar="N", help=f"{what} (default %(default)s)")
    sub.add_argument("--rounds", type=int, default=5, help="runs that a median is of (default %(default)s)")
    sub.add_argument("--budget", type=float, default=20.0, metavar="S", help="seconds a run may take (default %(default)s)")

    sub = bench(
        "kernels", bench_kernels_command, "Pallas kernels: times on a GPU, else the TPU compiler's schedules (extra: tpu)",
        "On a GPU: time every kernel that runs there beside the chunked form and the installed peers (jax-linear-attention,\n"
        "fla-core) from T = 2,048 to 65,536; writes times.json and draws times.png. Elsewhere: compile every TPU kernel for\n"
        "each chip (libtpu, no TPU needed) and count what its schedule issues: static cycles, use of the units, spills,\n"
        "memory, bytes, beside the floor of bytes and matrix products; writes kernels.json and draws kernels.png. With\n"
        "jax-cuda13-plugin and jax-cuda13-pjrt also those for the H100: registers, spills, shared memory and bytes.\n"
        "Plots need the extra plot.",
    )  # fmt: skip
    sub.add_argument("--kernels", type=names, metavar="A,B", help="such as linear_attention-vector (default: all)")
    sub.add_argument("--chips", type=names, metavar="A,B", help="of v4, v5e, v5p, v6e, 7x, h100 (default: all; --quick: v5e)")
    sub.add_argument("--lengths", type=numbers, metavar="N,M", help="on a GPU: tokens a row (default: 2,048 to 65,536)")
    sub.add_argument("--tokens", type=int, default=32768, metavar="N", help="there: of all rows (default %(default)s)")
    sub.add_argument("--forms", type=names, metavar="A,B", help="kernel alone, or also chunked; on a GPU also recurrent")
    sub.add_argument(
        "--merge", type=names, metavar="A,B", help="measure nothing: join the times.json of these folders and draw them"
    )
    for letter, what, value in (
        ("B", "rows, where kernels are compiled", 2), ("T", "tokens, likewise", 4096), ("H", "heads", 8),
        ("K", "key channels", 128), ("V", "value channels", 128),
    ):  # fmt: skip
        sub.add_argument(f"-{letter}", type=int, default=value, metavar="N", help=f"{what} (default %(default)s)")

    sub = bench(
        "training", bench_training_command, "training steps of a config with kernels and without",
        "Train a config on random tokens, at the largest batch that fits this device with the Pallas kernels and without\n"
        "them: tokens/s, MFU and memory; writes training.json, which keeps other configs' rows.",
    )  # fmt: skip
    add_config(sub)
    sub.add_argument("--rows", type=numbers, metavar="N,M", help="batch sizes to try (default: 64 and its halves)")
    sub.add_argument("--steps", type=int, default=5, help="steps of a timed group, of which there are 5 (default %(default)s)")
    sub.add_argument("--kernels-only", action="store_true", help="measure nothing without kernels")

    sub = bench(
        "tasks", bench_tasks_command, "what small models of each mixer can recall and track",
        "Train a small model of every mixer on every diagnostic task and test it beyond the trained size; writes tasks.json\n"
        "after every model, so that a stopped run goes on, prints a table and draws tasks.png (extra: plot).",
    )  # fmt: skip
    sub.add_argument("--mixers", type=names, metavar="A,B", help="mixers (default: all; --quick: three of them)")
    sub.add_argument("--tasks", type=names, metavar="A,B", help="tasks (default: all; --quick: eight of them)")
    sub.add_argument("--seeds", type=int, default=1, help="models of each kind, of which the best counts (default %(default)s)")
    sub.add_argument("--steps", type=int, help="training steps of every model")
    sub.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="models trained at once, each by its own process (default %(default)s)"
    )
    sub.add_argument("--force", action="store_true", help="run again what DIR already has")
    return parser


def names(word: str) -> list[str]:
    return [name.strip() for name in word.split(",") if name.strip()]


def numbers(word: str) -> list[int]:
    return [int(part) for part in word.split(",")]


def split_config_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tell the one config (a file or name) from key=value words.

    Raises:
      UserError: if there are two configs.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"two configs given: {files[0]!r} and {files[1]!r}; give one, and settings as key=value")
    return (files[0] if files else None), [word for word in words if "=" in word]


def train_command(arguments: argparse.Namespace) -> None:
    from jaxlm.training.loop import train
    from jaxlm.training.run import load_config

    path, overrides = split_config_words(arguments.config)
    loaded = load_config(path, overrides)
    train(loaded.config, loaded.overridden, accept_changes=arguments.accept_changes)


def eval_command(arguments: argparse.Namespace) -> None:
    from jaxlm.training.evaluate import evaluate_run

    result = evaluate_run(
        arguments.run_dir, arguments.step,
        sources=parse_sources(arguments.text, arguments.source), tokens=arguments.tokens, batch_size=arguments.batch_size,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>20}  {value:,.6g}" if isinstance(value, float) else f"{name:>20}  {value}")


def generate_command(arguments: argparse.Namespace) -> None:
    from jaxlm.inference.generate import SamplingSettings, stream, warnings
    from jaxlm.training.load import load_run

    prompts = list(arguments.prompt or [])
    for path in arguments.prompt_file or []:
        if not path.is_file():
            raise UserError(f"--prompt-file {path}: no such file")
        prompts.append(path.read_text())
    prompts = prompts or [""]
    settings = SamplingSettings(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
        seed=arguments.seed, stop_at_end_of_text=not arguments.ignore_end,
    )  # fmt: skip
    run = load_run(arguments.run_dir, arguments.step)
    longest = 1 + max(len(run.tokenizer.encode(prompt)) for prompt in prompts)
    for note in warnings(run.model, longest, longest + settings.max_tokens, run.config.data.sequence_length):
        print(f"note: {note}", file=sys.stderr)
    pieces = stream(run.model, run.tokenizer, prompts, settings)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for [piece] in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = [""] * len(prompts)
    for step in pieces:
        texts = [text + piece for text, piece in zip(texts, step, strict=True)]
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        print(f"--- {i + 1} of {len(prompts)}\n{prompt}{text}")


def config_command(arguments: argparse.Namespace) -> None:
    from jaxlm.config import RunConfig
    from jaxlm.config_loading import diff, format_diff, json_schema, settings_help, to_yaml
    from jaxlm.training.run import load_config

    if arguments.schema:
        print(json.dumps(json_schema(RunConfig), indent=2))
        return
    if arguments.keys:
        print(settings_help(RunConfig))
        return
    path, overrides = split_config_words(arguments.config)
    config = load_config(path, overrides).config
    if arguments.diff is None:
        print(to_yaml(config), end="")
        return
    other = load_config(arguments.diff, []).config
    differences = diff(other, config)
    print(format_diff(differences, (arguments.diff, path or "quickstart")) if differences else "no differences")


def doctor_command(arguments: argparse.Namespace) -> None:
    from jaxlm.doctor import report
    from jaxlm.training.run import load_config

    config = load_config(*split_config_words(arguments.config)).config if arguments.config else None
    print(report(arguments.length, config))


def plot_command(arguments: argparse.Namespace) -> None:
    from jaxlm.training.plot import plot_runs

    print(plot_runs(arguments.runs, arguments.output))


def tokenize_command(arguments: argparse.Namespace) -> None:
    from jaxlm.data import BytesTokenizerSettings, JsonTokenizerSettings
    from jaxlm.data.tokenize import tokenize_corpus

    sources = parse_sources(arguments.text, arguments.source)
    if not sources:
        raise UserError("tokenize: nothing to read; give --text PATH... or --source '{kind: ...}'")
    if arguments.tokenizer and arguments.bytes:
        raise UserError("tokenize: --tokenizer and --bytes exclude each other")
    tokenizer = None
    if arguments.bytes:
        tokenizer = BytesTokenizerSettings()
    elif arguments.tokenizer:
        tokenizer = JsonTokenizerSettings(path=str(arguments.tokenizer))
    print(
        tokenize_corpus(
            sources, tokenizer, arguments.output, vocab_size=arguments.vocab_size, shard_tokens=arguments.shard_tokens
        )
    )


def bench_mixers_command(arguments: argparse.Namespace) -> None:
    from jaxlm.bench import mixers

    mixers.run(
        arguments.output, ops=arguments.ops, forms=arguments.forms, lengths=arguments.lengths, dtype=arguments.dtype,
        shape=mixers.Shape(arguments.B, arguments.H, arguments.K, arguments.V), rounds=arguments.rounds,
        budget=arguments.budget, quick=arguments.quick, update=arguments.update,
    )  # fmt: skip


def bench_tasks_command(arguments: argparse.Namespace) -> None:
    from jaxlm.bench import tasks

    tasks.run(
        arguments.output, mixers=arguments.mixers, tasks=arguments.tasks, seeds=arguments.seeds, quick=arguments.quick,
        force=arguments.force, steps=arguments.steps, jobs=arguments.jobs,
    )  # fmt: skip


def bench_training_command(arguments: argparse.Namespace) -> None:
    from jaxlm.bench import training
    from jaxlm.training.run import load_config

    path, overrides = split_config_words(arguments.config)
    config = load_config(path, overrides).config
    training.run(
        arguments.output, config, rows=arguments.rows, steps=arguments.steps, quick=arguments.quick,
        kernels_only=arguments.kernels_only,
    )  # fmt: skip


def bench_kernels_command(arguments: argparse.Namespace) -> None:
    import jax

    from jaxlm.bench import kernel_times, kernels
    from pallas_kernels.cases import Shape

    if arguments.merge:
        kernel_times.merge(arguments.output, [Path(name) for name in arguments.merge])
        return
    if jax.default_backend() == "gpu":
        kernel_times.run(
            arguments.output, names=arguments.kernels, lengths=arguments.lengths, H=arguments.H, K=arguments.K, V=arguments.V,
            tokens=arguments.tokens, forms=arguments.forms, quick=arguments.quick,
        )  # fmt: skip
        return
    shape = Shape(arguments.B, arguments.T, arguments.H, arguments.K, arguments.V)
    chips = arguments.chips or (["v5e"] if arguments.quick else None)
    kernels.run(arguments.output, names=arguments.kernels, chips=chips, shape=shape, forms=arguments.forms)


def parse_sources(text: Sequence[str] | None, sources: Sequence[str] | None) -> list:
    """Data sources from `--text` and `--source` words.

    Raises:
      UserError: for a source that is not valid.
    """
    from jaxlm.config_loading import parse_value
    from jaxlm.data import SourceSettings

    found = [parse_value(SourceSettings, word, "--source") for word in sources or []]
    if text:
        found.insert(0, parse_value(SourceSettings, json.dumps({"kind": "text", "paths": list(text)}), "--text"))
    return found


if __name__ == "__main__":
    sys.exit(main())
