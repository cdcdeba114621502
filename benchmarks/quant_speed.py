"""How long a whole quantisation takes, and how fast 4-bit weights decode on this CPU."""

import copy
import time
from statistics import median

import torch

from benchmarks.quant_cells import Bench, write_json
from featherweight import quant

ROUNDS, PROMPT, NEW = 5, 64, 16


def stages(bench: Bench) -> None:
    """Time learning R1 and R2, rotating and GPTQ by the clock, on all threads given."""
    path = bench.folder / "stages.json"
    if path.is_file():
        return
    model, seconds = copy.deepcopy(bench.model), {}
    ids = bench.calibration(0)
    began, processor = time.perf_counter(), time.process_time()
    found = _clock(seconds, "learn R1 and R2", lambda: quant.learn_rotation(model, steps=300))
    _clock(seconds, "rotate", lambda: quant.rotate(model, found.rotation))
    _clock(seconds, "GPTQ, clipped, groups of 64", lambda: quant.gptq(model, ids, group_size=64))
    whole, processor = time.perf_counter() - began, time.process_time() - processor
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    threads = torch.get_num_threads()
    text = (
        f"By the clock, {threads} threads, OptRot and GPTQ: {whole:.0f} s ({parts}), "
        f"{processor:.0f} s of processor time."
    )
    write_json(path, {"seconds": seconds, "threads": threads, "text": text})


def _clock(seconds, name, action):
    started = time.perf_counter()
    result = action()
    seconds[name] = time.perf_counter() - started
    return result


def decoding(bench: Bench) -> None:
    """Time tokens one by one, with bfloat16 weights and with 4-bit ones, in turn."""
    path = bench.folder / "decoding.json"
    if path.is_file():
        return
    dense = copy.deepcopy(bench.model).to(torch.bfloat16)
    packed = quant.rtn(copy.deepcopy(dense), bits=4, group_size=64)
    quant.int4_decoding(packed)
    models = {"bfloat16": dense, "4 bits": packed}
    prompt = bench.evaluation[:1, :PROMPT]
    speeds = {name: [] for name in models}
    for round_ in range(ROUNDS + 1):
        for name, model in models.items():
            speed = _tokens_a_second(model, prompt)
            if round_:  # the first warms up
                speeds[name].append(speed)
    ratio = median(b / a for a, b in zip(*speeds.values(), strict=True))
    found = ", ".join(f"{name} {median(values):.1f}" for name, values in speeds.items())
    text = (
        f"Decoding, tokens a second behind a prompt of {PROMPT}, {torch.get_num_threads()} "
        f"threads: {found}; 4 bits (groups of 64, torch's kernel, head in bfloat16) are "
        f"{ratio:.2f} times as fast, median over alternating rounds."
    )
    write_json(path, {"speeds": speeds, "text": text})


@torch.no_grad()
def _tokens_a_second(model, prompt):
    out = model(prompt, use_cache=True)
    token, started = out.logits[:, -1:].argmax(-1), time.perf_counter()
    for _ in range(NEW):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return NEW / (time.perf_counter() - started)
