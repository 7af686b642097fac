"""Is generation for evaluation >= 1.5x as fast as lm-eval's Hugging Face back end?

Same model, same Minerva Math prompts, same rows at once, same most new tokens; both tokenize,
decode greedily and cut at the stop text, neither scores. Runs are interleaved after a warm-up;
medians of wall time and of this process's CPU time. The outputs must be equal, text by text.

- `lm-eval`: `HFLM.generate_until`, sorted by length, batches of `--rows`.
- `ours`: `Generation`, `--rows` at once, finished rows replaced, the examples run once.
- `ours, no sharing`: the examples run for every problem.
- `ours, no refill`: batches of `--rows` problems, so that finished rows are not replaced.

Without `--source` the model is a random Llama (weights scaled so that outputs vary; a bias on EOS
sets how long they are), with the tokenizer of `--tokenizer`.

    python benchmarks/generation.py --tokenizer $SALVE_DATA/stories260k/hf --math $SALVE_DATA/math
    python benchmarks/generation.py --source $SALVE_DATA/stories260k/hf --shots 0 --math ...
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from salve_lm.tasks.generation import Generation
from salve_lm.tasks.minerva import MinervaPrompt
from salve_lm.tasks.problems import MathProblems, Problem
from salve_lm.tasks.prompts import Scores


class Unscored(MinervaPrompt):
    """Minerva Math without its scores: lm-eval's loop does not score either."""

    metrics = ()

    def score(self, problem: Problem, output: str) -> Scores:
        """Nothing."""
        return {}


def random_llama(args: argparse.Namespace, vocab: int, eos: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128), max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=eos, tie_word_embeddings=False, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    head = torch.nn.Linear(args.hidden, vocab)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[eos] = args.eos_bias
    model.lm_head = head
    return model


def measure(run: Callable[[], Any]) -> tuple[float, float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    where = args.source or args.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.source:
        model = AutoModelForCausalLM.from_pretrained(args.source)
    else:
        model = random_llama(args, len(tokenizer), int(tokenizer.eos_token_id))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, getattr(torch, args.dtype)).eval()
    source = MathProblems(args.math, limit=-(-args.problems // 7))
    problems = source.problems()[: args.problems]
    source.problems = lambda: problems  # type: ignore[method-assign]
    prompt = Unscored(args.shots)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.rows)
    kwargs = {"until": ["Problem:"], "do_sample": False, "max_gen_toks": args.max_new_tokens}

    lengths: list[int] = []

    def lm_eval() -> list[str]:
        requests = [
            Instance("generate_until", {}, (prompt.text(p), dict(kwargs)), i)
            for i, p in enumerate(problems)
        ]
        return peer.generate_until(requests, disable_tqdm=True)

    def ours(**options: Any) -> Callable[[], list[str]]:
        options = {"batch_size": max(args.rows, args.problems), **options}
        task = Generation(source, prompt, args.max_new_tokens, rows=args.rows, **options)

        def run() -> list[str]:
            items, rows = task.items(tokenizer), []
            for i in range(0, len(items), task.batch_size):
                batch = task.collate(items[i : i + task.batch_size], tokenizer)
                with torch.no_grad():
                    rows += task.step(model, tokenizer, batch)
            lengths[:] = sorted(row["new_tokens"] for row in rows)
            return [row["output"] for row in sorted(rows, key=lambda row: row["sample"])]

        return run

    runs = {
        "lm-eval": lm_eval,
        "ours": ours(),
        "ours, no sharing": ours(share_prefix=False),
        "ours, no refill": ours(batch_size=args.rows),
    }
    outputs = {name: run() for name, run in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            wall, cpu, found = measure(run)
            if found != outputs[name]:
                raise SystemExit(f"{name} does not repeat its outputs")
            times[name].append((wall, cpu))
    seconds = {
        name: [statistics.median(t[i] for t in found) for i in (0, 1)]
        for name, found in times.items()
    }
    peers = outputs["lm-eval"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "prompt_tokens": statistics.median(len(tokenizer.encode(prompt.text(p))) for p in problems),
        "output_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "seconds": seconds,
        "ratio": {
            name: [seconds["lm-eval"][i] / s[i] for i in (0, 1)] for name, s in seconds.items()
        },
        "equal_outputs": {
            name: sum(a == b for a, b in zip(found, peers, strict=True))
            for name, found in outputs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--math", default="$SALVE_DATA/math", help="folder of Hendrycks MATH")
    parser.add_argument("--source", help="Hugging Face folder of a model")
    parser.add_argument("--tokenizer", help="of the random model")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--eos-bias", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_args()
    if not (args.source or args.tokenizer):
        parser.error("give --source, or --tokenizer for a random model")
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    result = compare(args)
    if args.json:
        print(json.dumps(vars(args) | {"load": [load, os.getloadavg()[0]]} | result))
        return
    low, median, high = result["output_tokens"]
    print(
        f"{result['parameters'] / 1e6:.1f}M parameters, {args.dtype}, {result['device']}, "
        f"{args.problems} problems, {args.shots} shots, prompts of {result['prompt_tokens']:.0f} "
        f"tokens, outputs of {low} to {high} (median {median:.0f}), at most "
        f"{args.max_new_tokens}, {args.rows} rows, medians of {args.repeats};"
    )
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'':20}{'wall s':>9}{'CPU s':>9}{'wall ratio':>12}{'CPU ratio':>11}{'equal':>8}")
    for name, (wall, cpu) in result["seconds"].items():
        ratio = result["ratio"][name]
        equal = f"{result['equal_outputs'][name]}/{args.problems}"
        print(f"{name:20}{wall:9.2f}{cpu:9.2f}{ratio[0]:12.2f}{ratio[1]:11.2f}{equal:>8}")


if __name__ == "__main__":
    main()
