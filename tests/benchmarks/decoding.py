"""Tokens per second of beam search: one rank and two, greedy and ten beams, with and without the cache, batches of eight and of one.

    python -m tests.benchmarks.decoding

A random GPT-2 of 6 layers, 256 wide, 8,000 tokens, with AdaKron adapters, fp32 on the CPU, one thread per rank. No text ends early, so
every prompt of 16 to 48 tokens becomes 24 tokens. Tokens are those of the texts: ten beams compute ten times as many. Seconds are
those of the processor, of the rank that took the most: with a core for each rank they are the clock's, on a busy machine they still count.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from adakron import distributed, launcher
from adakron.config import AdapterConfig, GenerationConfig
from adakron.decoding import BeamDecoder, decode_prompts
from adakron.models import adapt
from adakron.tasks.causal import Prompts
from tests.helpers.launch import ranks

VOCABULARY, NEW_TOKENS = 8000, 24
# Name, beams, prompts on each rank, batch, cache; what is slow gets fewer prompts.
FORMS = (
    ("greedy", 1, 16, 8, True),
    ("10 beams", 10, 8, 8, True),
    ("10 beams, batches of 1", 10, 3, 1, True),
    ("greedy, no cache", 1, 8, 8, False),
    ("10 beams, no cache", 10, 2, 2, False),
)


def main() -> None:
    """The table of both numbers of ranks; with a file's name behind it, measure as one of the ranks."""
    if len(sys.argv) == 2:
        measure(Path(sys.argv[1]))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            file = Path(folder) / f"{count}.json"
            with ranks(["-m", "tests.benchmarks.decoding", str(file)], Path(folder) / f"logs{count}", count) as started:
                for rank in started:
                    code, said = rank.end(1800)
                    assert code == 0, said
            found[count] = json.loads(file.read_text())
    print("| form | 1 rank, tokens/s | 2 ranks, tokens/s | ratio |\n|---|---|---|---|")
    for name, *_ in FORMS:
        one, two = found[1][name], found[2][name]
        print(f"| {name} | {one:,.0f} | {two:,.0f} | {two / one:.2f} |")
    print(f"cache: {found[1]['greedy'] / found[1]['greedy, no cache']:.1f} times as fast greedy,", end=" ")
    print(f"{found[1]['10 beams'] / found[1]['10 beams, no cache']:.1f} times with 10 beams; batches of 8 instead of 1:", end=" ")
    print(f"{found[1]['10 beams'] / found[1]['10 beams, batches of 1']:.1f} times")


def measure(file: Path) -> None:
    """Rank 0 writes tokens per second of all ranks together, by form."""
    torch.set_num_threads(1)
    world = launcher.read_world(os.environ)
    launcher.join(world, os.environ)
    distributed.form_group(world, torch.device("cpu"))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=6, n_head=8, n_positions=256)).eval()
    model.set_attn_implementation("eager")
    adapt(model, AdapterConfig(bottleneck_dim=8), seed=0)
    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0", pad_token="0", model_max_length=256
    )
    speeds: dict[str, float] = {}
    for name, beams, count, batch, cache in FORMS:
        settings = GenerationConfig(num_beams=beams, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        decoder = BeamDecoder(model, tokenizer, settings, device=torch.device("cpu"), use_cache=cache)
        if not speeds:
            decoder.tokens([np.ones(8, dtype=np.int32)])  # what is set up at first use is not measured
        prompts = random_prompts(count * world.world_size)
        distributed.barrier()
        began = time.process_time()
        batches = decode_prompts(decoder, prompts, np.arange(len(prompts)), batch_size=batch, world=world)
        tokens = sum(len(row.tokens) for rows in batches for row in rows)
        spent = distributed.all_gather_object((tokens, time.process_time() - began))
        speeds[name] = sum(tokens for tokens, _ in spent) / max(seconds for _, seconds in spent)
    if world.rank == 0:
        file.write_text(json.dumps(speeds))
    distributed.leave_group()


def random_prompts(count: int) -> Prompts:
    """Of 16 to 48 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(16, 49, count)
    tokens = generator.integers(1, VOCABULARY, lengths.sum()).astype(np.int32)
    return Prompts(tokens, np.concatenate(([0], np.cumsum(lengths))), [[] for _ in lengths], ["" for _ in lengths])


if __name__ == "__main__":
    main()
