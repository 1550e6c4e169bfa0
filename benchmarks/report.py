"""The table and the curves of a run."""

from benchmarks.workloads import EVERYONE, FIRST_CALLS, LLAMA, MODEL, NOT_TIMED, ON_GPU

OURS = "ours-jax"


def table(results):
    """Markdown: seconds of every contender, ours against each peer, compilation and memory."""
    found = {}
    for result in results["rows"]:
        if result["curve"] is None:
            found.setdefault(result["name"], {})[result["contender"]] = result
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    on_gpu = all(result.get("gpu") for by in found.values() for result in by.values())
    lines = [
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB; "
        f"{machine['gpu'] + '; ' if 'gpu' in machine else ''}"
        f"Python {machine['python']}; {versions}.{'' if on_gpu else ' float32.'}",
        *_times({n: by for n, by in found.items() if not any(map(_elsewhere, by.values()))}),
        *(_speculation(found) + _thinking(found) + _adaptive(found) + _routes(found)),
        *_conversion(found),
        *_devices(found),
        *_on_gpu(found),
    ]
    return "\n".join(lines) + "\n"


def _untimed(result):
    return result["task"] in NOT_TIMED


def _elsewhere(result):
    return _untimed(result) or result.get("gpu")


def _times(found):
    """Seconds of every contender, ours against each peer; compilation and memory."""
    if not found:
        return []
    who = [name for name in (*EVERYONE, LLAMA) if any(name in by for by in found.values())]
    lines = [
        "",
        "Median milliseconds per run (decoding: tokens per second; first calls: seconds, with "
        "compilation), in brackets how many times as fast ours on JAX is.",
        "",
        "| | " + " | ".join(who) + " |",
        "|---" * (1 + len(who)) + "|",
    ]
    for name, by in found.items():
        cells = [_time(by.get(contender), by.get(OURS)) for contender in who]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "First call in seconds (with compilation) / peak memory of the process in MiB / temporary "
        "memory of the program in MiB, from XLA / error against float64.",
        "",
        "| | " + " | ".join(who) + " |",
        "|---" * (1 + len(who)) + "|",
    ]
    for name, by in found.items():
        cells = [_cost(by.get(contender)) for contender in who]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _speculation(found):
    """Trained models with several numbers of drafts: tokens per second, per step, acceptance."""
    columns = ("drafts", "tokens/s", "against plain", "tokens per step", "accepted by position")
    lines = []
    for task, what in (
        ("speculate", "The trained demo model"),
        ("speculate_large", "A trained model with 151,936 words"),
    ):
        rows = [by[OURS] for by in found.values() if by.get(OURS, {}).get("task") == task]
        rows = [row for row in rows if "failed" not in row]
        plain = next((row for row in rows if not row["size"]["lookahead"]), None)
        if plain is not None:
            lines += ["", f"{what}, batch 1:", "", "| " + " | ".join(columns) + " |"]
            lines.append("|---" * len(columns) + "|")
            lines += [_speculation_line(row, plain) for row in rows]
    return lines


def _speculation_line(row, plain):
    drafts = str(row["size"]["lookahead"])
    if "draft_vocab_size" in row:
        drafts += f" from {row['draft_vocab_size']:,} words"
    ratio = row["units_per_second"] / plain["units_per_second"]
    speed = f"{row['units_per_second']:.0f} | {ratio:.2f}x"
    shares = " ".join(f"{rate:.0%}" for rate in row.get("acceptance_rate_by_position", ()))
    return f"| {drafts} | {speed} | {row.get('tokens_per_step', 1.0):.2f} | {shares} |"


def _thinking(found):
    """Times of k iterations, in times of one, beside what k think blocks alone would make of it.

    The block's share of a pass is what is missing in a model without it.
    """
    lines = []
    for name, by in found.items():
        work, _, rest = name.rpartition(", ")
        if rest != "no block":
            continue
        for contender, without in by.items():
            times = {
                k: found.get(f"{work}, k = {k}", {}).get(contender, {}).get("seconds")
                for k in (1, 2, 4)
            }
            if "failed" in without or None in times.values():
                continue
            share = 1 - without["seconds"] / times[1]
            cells = [f"{times[k] / times[1]:.2f}x ({1 + (k - 1) * share:.2f}x)" for k in (2, 4)]
            lines.append(f"| {work}, {contender} | {share:.0%} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| | think block's share of k = 1 | k = 2 (by the share) | k = 4 (by the share) |"
    return ["", "Time against that of k = 1.", "", head, "|---|---|---|---|", *lines]


def _adaptive(found):
    """Decoding at adaptive depth beside fixed depths."""
    lines = []
    for name, by in found.items():
        for contender, row in by.items():
            if row["task"] == "decode" and row["model"] in ("thinking", "adaptive"):
                if row["size"]["batch"] == 1 or "failed" in row:
                    continue
                k = row.get("mean_iterations", row["size"]["think_iterations"])
                speed = f"{row['units_per_second']:.0f}"
                lines.append(f"| {name}, {contender} | {k:.2f} | {speed} |")
    return ["", "| | mean iterations | tokens/s |", "|---|---|---|", *lines] if lines else []


def _routes(found):
    """Times with layer routers, in times of the model without them."""
    lines = []
    for name, by in found.items():
        work, _, rest = name.rpartition(", ")
        if rest != "no routers":
            continue
        for contender, without in by.items():
            kinds = ("routers asked", "half skipped")
            rows = [found.get(f"{work}, {kind}", {}).get(contender, {}) for kind in kinds]
            if "failed" in without or any("seconds" not in row for row in rows):
                continue
            cells = [f"{row['seconds'] / without['seconds']:.3f}x" for row in rows]
            lines.append(f"| {work}, {contender} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| | routers asked | half of the think layers skipped |"
    return ["", "Time against that without layer routers.", "", head, "|---|---|---|", *lines]


def _conversion(found):
    """Seconds of a conversion, and what its first run added to the memory of the process."""
    columns = ("seconds", "model MiB", "largest weight MiB", "memory MiB above the model")
    lines = []
    for name, by in found.items():
        for contender, row in by.items():
            if row["task"] != "convert" or "failed" in row:
                continue
            above = row["peak_mib_first"] - row["peak_mib_before"] - row["model_mib"]
            cells = (row["first_call_seconds"], row["model_mib"], row["largest_weight_mib"], above)
            text = " | ".join(f"{cell:.{1 if i == 0 else 0}f}" for i, cell in enumerate(cells))
            lines.append(f"| {name}, {contender} | {text} |")
    if not lines:
        return []
    return ["", "| | " + " | ".join(columns) + " |", "|---" * 5 + "|", *lines]


def _devices(found):
    """What a device receives in a train step beside the least possible, and what it holds."""
    columns = ("collectives", "received", "least possible", "ratio", "held", "needed in a step")
    lines = []
    for name, by in found.items():
        for row in filter(_untimed, by.values()):
            if "failed" in row:
                lines.append(f"| {name} | {row['failed'].replace('|', '/')} |" + " |" * 5)
                continue
            received, least, held, work = (
                f"{row[f'{what}_bytes'] / 2**30:.2f}"
                for what in ("received", "least", "held", "work")
            )
            ratio = f"{row['received_bytes'] / row['least_bytes']:.2f}"
            cells = (str(row["collectives"]), received, least, ratio, held, work)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = ["| | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    what = "A train step of four published layers on simulated devices, GiB per device; not timed."
    return ["", what, "", *head, *lines]


def _on_gpu(found):
    """Times on a GPU, and how far they are from the floors of `benchmarks.floors`."""
    columns = ("milliseconds, or tokens/s", "TFLOP/s", "GB/s", "GiB on the GPU", "first call, s")
    lines = []
    for name, by in found.items():
        for contender in ON_GPU:
            row = by.get(contender)
            if row is None or not row.get("gpu"):
                continue
            what = f"| {name.removeprefix('GPU: ')} | {contender} | "
            if "failed" in row:
                lines.append(f"{what}{row['failed'].replace('|', '/')} |" + " |" * 4)
                continue
            cells = [
                _time(row, by.get(OURS)),
                f"{row['flops'] / row['seconds'] / 1e12:.3g}",
                f"{row['bytes'] / row['seconds'] / 1e9:.3g}",
                f"{row['device_mib'] / 2**10:.2f}",
                f"{row['first_call_seconds']:.1f}",
            ]
            lines.append(what + " | ".join(cells) + " |")
    if not lines:
        return []
    head = ["| | | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    what = "On one GPU, bfloat16; TFLOP and GB are the least that the shapes allow."
    return ["", what, "", *head, *lines]


def _time(result, ours):
    if result is None:
        return ""
    if "failed" in result:
        return "failed"
    measure = "seconds"
    if result["task"] in FIRST_CALLS:
        measure = "first_call_seconds"
        text = f"{result[measure]:.1f} s"
    elif result["task"] in ("decode", "speculate", "speculate_large"):
        text = f"{result['units_per_second']:.0f} tokens/s"
    else:
        text = f"{result['seconds'] * 1e3:.3g}"
    if ours is None or "failed" in ours or result["contender"] == OURS:
        return text
    return f"{text} ({result[measure] / ours[measure]:.2f}x)"


def _cost(result):
    if result is None:
        return ""
    if "failed" in result:
        return result["failed"].replace("|", "/")
    temp = f"{result['temp_mib']:.0f}" if "temp_mib" in result else "-"
    error = f"{result['error']:.1e}" if "error" in result else "-"
    return f"{result['first_call_seconds']:.1f} / {result['peak_mib']:.0f} / {temp} / {error}"


def draw(results, path):
    """Time against T, time against E, cache bytes against context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    lines = {}
    for result in results["rows"]:
        if result["curve"] and "failed" not in result:
            lines.setdefault((result["curve"], result["contender"]), []).append(result)
    for (curve, contender), points in lines.items():
        over_experts = curve == "time against E"
        axis = axes[1] if over_experts else axes[0]
        key = "experts" if over_experts else "length"
        label = contender + (", no attention layers" if "no attention" in curve else "")
        x = [point["size"][key] for point in points]
        axis.loglog(x, [point["seconds"] for point in points], "o-", label=label)
    axes[0].set(title="Prefill, batch 1", xlabel="tokens", ylabel="seconds")
    axes[1].set(title="MoE block, 1024 tokens, top 8", xlabel="experts", ylabel="seconds")
    contexts = [2**n for n in range(8, 19)]
    for label, values in cache_bytes(contexts).items():
        axes[2].loglog(contexts, values, "o-", label=label)
    axes[2].set(title="Cache of one sequence, float32", xlabel="tokens", ylabel="bytes")
    for axis in axes:
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def cache_bytes(contexts):
    """Bytes of the cache that a sequence needs, for the benchmark model and for attention alone."""
    layers, interval = MODEL["num_layers"], MODEL["full_attention_interval"]
    attention = layers // interval
    pair = 2 * 4 * MODEL["num_key_value_heads"] * MODEL["head_dim"]
    heads, value = MODEL["linear_num_value_heads"], MODEL["linear_value_head_dim"]
    groups, key = MODEL["linear_num_key_heads"], MODEL["linear_key_head_dim"]
    tail = (MODEL["linear_conv_kernel_dim"] - 1) * (2 * groups * key + heads * value)
    delta = 4 * (heads * key * value + tail)
    return {
        f"{layers - attention} DeltaNet + {attention} attention": [
            (layers - attention) * delta + attention * pair * n for n in contexts
        ],
        f"{layers} attention": [layers * pair * n for n in contexts],
    }
