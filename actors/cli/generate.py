"""`expertmesh generate`: one prompt, streamed to the terminal or gathered as JSON."""

import json
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from expertmesh.actors.cli.client import JsonOption, open_client, to_dict
from expertmesh.actors.cli.server_options import Server, calls_a_server
from expertmesh.client import Client
from expertmesh.cluster.errors import InputError
from expertmesh.v1.inference_pb2 import FinishReason, GenerateResponse


@dataclass
class Sample:
    """What has come of one sample."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Answer:
    """What has come of a request. ttft_s is the time from the call to the first token, as this client saw it."""

    samples: list[Sample]
    request_id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None

    def add(self, response: GenerateResponse, elapsed_s: float) -> None:
        """Take in one message of the stream, which came `elapsed_s` seconds after the call."""
        sample = self.samples[response.index]
        sample.text += response.text
        sample.token_ids.extend(response.token_ids)
        sample.logprobs.extend(to_dict(logprob) for logprob in response.logprobs)
        self.request_id = response.request_id
        if self.ttft_s is None and response.token_ids:
            self.ttft_s = elapsed_s
        if response.finish_reason:
            sample.finish_reason = FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
            self.prompt_tokens = response.usage.prompt_tokens
            self.completion_tokens += response.usage.completion_tokens

    def as_json(self, *, with_logprobs: bool) -> dict[str, Any]:
        """Return the JSON object: sample 0 at the top; all samples under `outputs` if there are several."""
        outputs = [
            {
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                **({"logprobs": sample.logprobs} if with_logprobs else {}),
            }
            for sample in self.samples
        ]
        return {
            "request_id": self.request_id,
            **outputs[0],
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens},
            "ttft_s": self.ttft_s,
            **({"outputs": outputs} if len(outputs) > 1 else {}),
        }


@calls_a_server
def generate(
    server: Server,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.", show_default=False)] = None,
    token_ids: Annotated[str | None, typer.Option(help="Prompt as token ids such as 1,2,3, in place of text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate; the server has 128.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many most likely tokens only; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that make up this probability; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability relative to the likeliest token; 0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes seen tokens less likely; 1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeats a draw; by default another each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    n: Annotated[int, typer.Option("--n", help="Samples to generate.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Report log-probabilities and this many alternatives.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Name of the request in the server's log.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds until the request is given up.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="Times in a row to try a server that is away or full again.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Generate text from a prompt, as a client of a running server."""
    if seed is not None and not 0 <= seed < 1 << 63:
        raise InputError(f"--seed is {seed}; it must be from 0 to 2^63 - 1")
    if n < 1:
        raise InputError(f"--n is {n}; it must be at least 1")
    if not timeout_s > 0:
        raise InputError(f"--timeout-s is {timeout_s}; it must be above 0")
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "n": n,
        "logprobs": logprobs,
        "request_id": request_id,
    }
    answer = Answer([Sample() for _ in range(n)])
    start_s = time.perf_counter()
    with open_client(server, timeout_s=timeout_s, retries=retries) as client:
        for response in _responses(client, _prompt(prompt, token_ids), options):
            answer.add(response, time.perf_counter() - start_s)
            if not as_json:
                _show(answer, response)
    if as_json:
        typer.echo(json.dumps(answer.as_json(with_logprobs=logprobs is not None), ensure_ascii=False))


def _responses(
    client: Client, prompt: str | list[int], options: dict[str, Any]
) -> Generator[GenerateResponse, None, None]:
    given: Any = {name: value for name, value in options.items() if value is not None}
    try:
        stream = client.generate(prompt, **given)
    except ValueError as error:
        raise InputError(f"an option is outside what a request can hold: {error}") from error
    with closing(stream):  # else a Ctrl-C would let the server go on
        yield from stream


def _prompt(text: str | None, token_ids: str | None) -> str | list[int]:
    if token_ids is None and text is not None:
        return text
    if token_ids is None or text is not None:
        raise InputError("give either a PROMPT or --token-ids")
    try:
        return [int(part) for part in token_ids.split(",")]
    except ValueError as error:
        raise InputError(f"--token-ids {token_ids!r} is not a list of token ids such as 1,2,3: {error}") from error


def _show(answer: Answer, response: GenerateResponse) -> None:
    """Print a sole sample as it comes, and each of several when it is whole; token ids where there is no text."""
    sample = answer.samples[response.index]
    several = len(answer.samples) > 1
    if not several:
        sys.stdout.write(response.text)
    if response.finish_reason:
        ids = "" if sample.text else _token_list(sample.token_ids)
        sys.stdout.write(f"--- sample {response.index}\n{sample.text}{ids}\n" if several else f"{ids}\n")
        _show_logprobs(sample.logprobs)
    sys.stdout.flush()


def _token_list(token_ids: Iterable[int]) -> str:
    return "token ids: " + ",".join(map(str, token_ids))


def _show_logprobs(logprobs: list[dict[str, Any]]) -> None:
    for entry in logprobs:
        top = " ".join(f"{other['token_id']}:{other['logprob']:.3f}" for other in entry["top"])
        sys.stdout.write(f"  {entry['token_id']:>8} {entry['logprob']:9.4f}  {top}\n")
