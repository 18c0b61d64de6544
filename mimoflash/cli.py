"""The command line: parses, calls one function, prints."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Make, improve, serve and use a MiMo-V2-Flash kind of language model.", no_args_is_help=True,
    pretty_exceptions_enable=False, add_completion=False,
)
bench_app = typer.Typer(help="Measure beside a peer, in turn, in one run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, a run's folder, a hub id, or smol.")]
Seed = Annotated[int | None, typer.Option(help="Fixes what is sampled.")]
Weights = Literal["float32", "bf16", "int8", "int4"]
Dtype = Annotated[
    Weights | None,
    typer.Option(help="Of the weights: float32, bf16, int8 or int4; if not given, as the model stores them."),
]
BenchDtype = Annotated[
    Weights | None,
    typer.Option(help="Of both sides' weights: float32, bf16, int8 or int4 (llama.cpp's Q8_0, Q4_1); "
                      "if not given, float32, and int4 for smol."),
]
Speculate = Annotated[int | None, typer.Option(help="Drafts a step, 0 to 3; if not given, all MTP layers draft.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """An error that the user can mend is one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"mimoflash: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("\nmimoflash: interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from None


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs/demo")) -> None:
    """From nothing to a model one can talk to, with a report: less than twenty minutes on two cores."""
    _run("demo", out, only=None, changes=[], resume=True)
    typer.echo(f"\ntalk to it: mimoflash chat {out}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's .toml file, or the name of one that comes along.")],
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", metavar="STAGE")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change a value, as pretrain.tokens=1000.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run is kept; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that is there.")] = False,
    backend: Annotated[
        Literal["local", "ray"], typer.Option(help="Who plays rollouts: this process, or actors of Ray.")
    ] = "local",
    workers: Annotated[int, typer.Option(help="Of Ray, with an engine each.", min=1)] = 2,
) -> None:
    """Run a recipe's stages in order: demo (tokenizer, pretrain, sft, teachers, mopd, rivals, evaluate), smol-mopd
    (teachers, mopd, evaluate), mopd-table (tune, compare), smol-mtp (generate, first, mtp, evaluate)."""
    _run(recipe, out or Path("runs") / Path(recipe).stem, only=only, changes=change or [], resume=resume,
         ray_workers=workers if backend == "ray" else 0)


def _run(
    recipe: str, out: Path, *, only: str | None, changes: list[str], resume: bool, ray_workers: int = 0
) -> None:
    with _user_errors():
        from mimoflash.recipe import load_recipe
        from mimoflash.run import run as run_stages

        run_stages(
            load_recipe(recipe, changes), out, only=only, resume=resume, ray_workers=ray_workers, say=typer.echo
        )
        for file in ("summary.json", "report.html"):
            if (out / file).exists():
                typer.echo(str(out / file))


@app.command()
def coevolve(
    folder: Annotated[Path, typer.Argument(help="A finished run with teachers and MOPD.", metavar="RUN")],
    rounds: Annotated[int, typer.Option(help="At most so many.", min=1)] = 3,
) -> None:
    """Let a run's student become its teachers' start and distil it again, round by round, as long as it gains."""
    with _user_errors():
        from mimoflash.run import coevolve as coevolve_run

        coevolve_run(folder, rounds, say=typer.echo)
        typer.echo(f"\ntalk to it: mimoflash chat {folder}")


@app.command()
def generate(
    model: Model, prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64, temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that hold this much.")] = 1.0,
    seed: Seed = None, dtype: Dtype = None, speculate: Speculate = None,
) -> None:
    """Continue a text as it is, without a chat template."""
    with _user_errors():
        from mimoflash.engine import SamplingParams
        from mimoflash.models import open_engine
        from mimoflash.serve.terminal import stream_text

        text = sys.stdin.read() if prompt == "-" else prompt
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        engine = open_engine(model, dtype=dtype, speculate=speculate)
        typer.echo(text, nl=False)
        for piece in stream_text(engine, text, params):
            typer.echo(piece, nl=False)
        typer.echo()


@app.command()
def chat(
    model: Model, thinking: Annotated[bool, typer.Option(help="Let the model reason first.")] = True,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 512,
    temperature: Temperature = 0.8, top_p: Annotated[float, typer.Option(help="As in generate.")] = 0.95,
    seed: Seed = None, dtype: Dtype = None, speculate: Speculate = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends it, Ctrl-C stops an answer."""
    with _user_errors():
        from mimoflash.engine import SamplingParams
        from mimoflash.models import open_engine
        from mimoflash.serve.terminal import converse

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        converse(open_engine(model, dtype=dtype, speculate=speculate), params, thinking=thinking)


@app.command()
def serve(
    models: Annotated[
        list[str], typer.Argument(help="As for chat; NAME=MODEL is what clients call it.", metavar="MODEL...")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Asked of clients; may be given again.", envvar="MIMOFLASH_API_KEY")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may call this server; may be given again.")
    ] = None,
    dtype: Dtype = None, speculate: Speculate = None,
    max_running: Annotated[int, typer.Option(help="Answers that the engine runs at a time.", min=1)] = 64,
    capacity: Annotated[int, typer.Option(help="Of these and those that wait; what is over it gets 429.", min=1)] = 256,
    replicas: Annotated[
        int, typer.Option(help="Engines of each model, on Ray; --max-running and --capacity are each one's.", min=1)
    ] = 1,
    max_loaded: Annotated[int, typer.Option(help="Models in memory at a time.", min=1)] = 2,
    drain: Annotated[int, typer.Option(help="Seconds that answers have after SIGTERM.", min=0)] = 30,
    store: Annotated[
        str | None, typer.Option(help="A file for conversations of /v1/responses; else they end with the server.")
    ] = None,
    log_json: Annotated[bool, typer.Option(help="The log as JSON lines.")] = False,
) -> None:
    """Serve models by the APIs of OpenAI and Anthropic, and a page to talk to them."""
    with _user_errors():
        from functools import partial

        from mimoflash.models import find_model, open_engine
        from mimoflash.serve import MEMORY, ServerSettings, named, run_server

        places = named(models)
        for place in places.values():
            find_model(place)  # what is not there is said before anything starts
        opener = partial(open_engine, dtype=dtype, speculate=speculate, max_running=max_running, share_prefixes=True)
        settings = ServerSettings(
            api_key or (), cors or (), capacity=capacity, most_loaded=max_loaded, store=store or MEMORY
        )
        run_server(
            places, opener, settings, host=host, port=port, drain=drain, log_json=log_json, replicas=replicas
        )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A model, as for chat.")],
    target: Annotated[Path, typer.Argument(help="The folder or .gguf file to write.")],
    format: Annotated[Literal["hf", "gguf"], typer.Option(help="Published safetensors, or GGUF for llama.cpp.")] = "hf",
    dtype: Annotated[
        Literal["fp8", "bf16", "float32", "q8_0", "q4_1"],
        typer.Option(help="Of the weights; fp8 is for hf, q8_0 and q4_1 for gguf."),
    ] = "bf16",
) -> None:
    """Write a model in another format."""
    with _user_errors():
        from mimoflash import models

        models.convert(source, target, format=format, dtype=dtype)
        typer.echo(str(target))


Peer = Annotated[str | None, typer.Option(help="llama.cpp or transformers: run beside ours, in turn.")]
Shape = Annotated[
    str, typer.Option(help="nano, small, a config.json (random weights); smol, a model, a run's folder (its own).")
]
Streams = Annotated[int, typer.Option(help="Requests in flight at once.")]
Pairs = Annotated[int, typer.Option(help="Times each side runs.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures there.")]


@bench_app.command("train")
def bench_train(
    peer: Annotated[Literal["transformers"] | None, typer.Option(help="Run this beside ours, in turn.")] = None,
    shape: Annotated[str, typer.Option(help="nano, small, or a config.json.")] = "nano",
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    pairs: Pairs = 5, json_file: Json = None,
) -> None:
    """Training steps: tokens a second, share of the matmul peak, and the ratio to the peer."""
    with _user_errors():
        from mimoflash.benchmarks.training import bench_training

        bench_training(shape, peer=peer, batch=batch, length=length, pairs=pairs, json_file=json_file, say=typer.echo)


@bench_app.command("decode")
def bench_decode(
    peer: Peer = None, shape: Shape = "nano", dtype: BenchDtype = None, streams: Streams = 1,
    context: Annotated[
        list[int] | None, typer.Option(help="Random prompts of so many tokens, may be given again; else a model's own.")
    ] = None,
    speculate: Annotated[int, typer.Option(help="Tokens drafted a step by MTP layers, 0 to 3.")] = 0,
    tokens: Annotated[int, typer.Option(help="At most so many new tokens a request.")] = 128,
    prompts: Annotated[Path | None, typer.Option(help="What a model is asked: .txt lines, .json messages.")] = None,
    pairs: Pairs = 5, json_file: Json = None,
) -> None:
    """Tokens a second after the first, and the ratio to the peer on the same weights."""
    with _user_errors():
        from mimoflash.benchmarks.decode import bench_decode as bench

        own = Path(shape) / "evaluate" / "conversations.json"  # a run's held-out tasks
        prompts = own if not (prompts or context) and own.exists() else prompts
        bench(
            shape, peer=peer, dtype=dtype, streams=streams, contexts=context or [], speculate=speculate,
            tokens=tokens, pairs=pairs, prompts=prompts, json_file=json_file, say=typer.echo,
        )


@bench_app.command("serve")
def bench_serve(
    shape: Shape = "nano", dtype: BenchDtype = None,
    streams: Annotated[int, typer.Option(help="Requests in flight at once.")] = 16,
    context: Annotated[list[int] | None, typer.Option(help="As in decode.")] = None,
    speculate: Annotated[int, typer.Option(help="As in decode.")] = 0,
    tokens: Annotated[int, typer.Option(help="At most so many new tokens a request.")] = 128,
    pairs: Pairs = 5, json_file: Json = None,
) -> None:
    """Tokens a second of streams by HTTP, and the ratio to the engine without the server."""
    with _user_errors():
        from mimoflash.benchmarks.decode import bench_decode as bench

        bench(
            shape, peer=None, dtype=dtype, streams=streams, contexts=context or [], speculate=speculate,
            tokens=tokens, pairs=pairs, served=True, json_file=json_file, say=typer.echo,
        )


@bench_app.command("load")
def bench_load(
    shape: Shape = "nano",
    dtype: Annotated[
        Literal["float32", "bf16", "int8", "int4"] | None, typer.Option(help="If not given, float32, int4 for smol.")
    ] = None,
    streams: Annotated[int, typer.Option(help="Requests at a time; one in five is given up.")] = 200,
    seconds: Annotated[float, typer.Option(help="How long; then twice the capacity comes at once.")] = 180,
    tokens: Annotated[int, typer.Option(help="Half as many to so many new tokens a request.")] = 64,
    json_file: Json = None,
) -> None:
    """Whether the server answers right under load, refuses what is over its capacity, and gives all memory back."""
    with _user_errors():
        from mimoflash.benchmarks.load import bench_load as bench

        bench(
            shape, dtype=dtype, streams=streams, seconds=seconds, tokens=tokens, json_file=json_file, say=typer.echo
        )


@bench_app.command("prefill")
def bench_prefill(
    peer: Peer = None, shape: Shape = "nano", dtype: BenchDtype = None, streams: Streams = 1,
    context: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt, may be given again; else 512.")] = None,
    pairs: Pairs = 5, json_file: Json = None,
) -> None:
    """Prompt tokens a second until the first new one, and the ratio to the peer on the same weights."""
    with _user_errors():
        from mimoflash.benchmarks.prefill import bench_prefill as bench

        bench(
            shape, peer=peer, dtype=dtype, streams=streams, contexts=context or [512], pairs=pairs,
            json_file=json_file, say=typer.echo,
        )


@bench_app.command("cache")
def bench_cache(
    shape: Annotated[str, typer.Option(help="nano, small, flash (the published model), or a config.json.")] = "flash",
    json_file: Json = None,
) -> None:
    """Memory of the cache at 1,024 to 262,144 tokens, beside the formula and beside global layers only."""
    with _user_errors():
        from mimoflash.benchmarks.cache_bytes import bench_cache as bench

        bench(shape, json_file=json_file, say=typer.echo)


if __name__ == "__main__":
    app()
