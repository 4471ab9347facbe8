"""From samples to medians, ratios, limits and tables: arithmetic only, no import of torch."""

from statistics import median
from typing import Dict, List, Optional

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TRAINING = 3  # times a forward pass: also the gradients of the inputs and of the weights
# Column: contenders whose label starts so. The fastest of them counts.
PEERS = {"torchvision": "torchvision", "mmdet": "mmdet", "before": "before"}
EVAL_PEERS = {"pycocotools": "pycocotools", "COCOeval_opt": "detectron2", "before": "before"}
# of a task, those that do a part of its work
PARTS = {
    "predict": ("network", "postprocess"),
    "train-step": ("losses",),
    "train-loop": ("train-step",),
}
# contenders that only measure the machine's rates; matmul: in older files
MACHINE = ("arithmetic", "matmul", "copy")


def label(contender: str, dtype: str) -> str:
    return f"{contender} {dtype}".strip()


def machine_rates(contenders: Dict[str, Dict]) -> Dict[str, float]:
    """FLOP/s by dtype, and as ``copy`` bytes read and written per second, of
    those that were measured in turns with the contenders: by the median."""
    rates = {}
    for name, x in contenders.items():
        if name.startswith(MACHINE) and x.get("samples"):
            key = "copy" if name == "copy" else x["dtype"]
            rates[key] = x["found"]["bytes" if name == "copy" else "flops"] / median(x["samples"])
    return rates


def network_limit(
    cost: Dict, rates: Dict, dtype: str, batch_size: int, training: bool = False
) -> Dict:
    """Seconds that a batch takes at least on a machine of these rates, and which one binds.

    Args:
        cost: of an image: ``flops``, ``values`` that the convolutions read and write, and their
            ``weights``, read once.
        rates: see :func:`machine_rates`.
    """
    moved = BYTES[dtype] * (cost["values"] * batch_size + cost["weights"])
    times = {
        "arithmetic": cost["flops"] * batch_size / rates[dtype],
        "copy": moved / rates["copy"],
    }
    by = max(times, key=times.get)
    return {"seconds": times[by] * (TRAINING if training else 1), "by": by}


def outputs_limit(model: Dict, rates: Dict, dtype: str, batch_size: int) -> float:
    """Seconds to read each logit and offset once."""
    moved = BYTES[dtype] * batch_size * model["default_boxes"] * (model["num_classes"] + 5)
    return moved / rates["copy"]


def case_limit(result: Dict, report: Dict, name: str) -> Optional[Dict]:
    """Seconds that one run of a contender takes at least; None where no limit is known."""
    task, contenders = result["task"], result["contenders"]
    if task == "data":
        decoding, own = contenders.get("cv2.imread (memory reused)", {}), contenders[name]
        if "samples" not in decoding:
            return None
        seconds = median(decoding["samples"]) / decoding["images"] * own["images"]
        return {"seconds": seconds, "by": "JPEG decoding"}
    if task == "eval":
        return None
    model, rates = report["models"][result["model"]], machine_rates(contenders)
    dtype = contenders[name]["dtype"]
    if "copy" not in rates:
        return None
    if task in ("postprocess", "losses"):
        seconds = outputs_limit(model, rates, dtype or "fp32", result["batch_size"])
        return {"seconds": seconds * (2 if task == "losses" else 1), "by": "copy"}  # gradients, too
    if dtype not in rates:
        return None
    is_training = task.startswith("train")
    return network_limit(model["cost"], rates, dtype, result["batch_size"], is_training)


def fastest(contenders: Dict[str, Dict], prefix: str, dtype: str) -> Optional[float]:
    """The lowest median, in seconds per image, of those contenders; None if none ran."""
    found = [
        median(x["samples"]) / x["images"]
        for name, x in contenders.items()
        if name.startswith(prefix) and x.get("samples") and x["dtype"] == dtype
    ]
    return min(found, default=None)


def summarise(result: Dict, report: Dict) -> Dict[str, Dict]:
    """Of each contender that ran: ``seconds`` (median of a run), ``images_per_second``,
    ``times_faster`` than each peer of the same dtype and in fp32, ``limit`` and
    the share ``of_limit`` that it reaches."""
    contenders = result["contenders"]
    peers = EVAL_PEERS if result["task"] == "eval" else PEERS
    summary = {}
    for name, x in contenders.items():
        if not x.get("samples") or name.startswith(MACHINE):
            continue
        seconds = median(x["samples"])
        per_image = seconds / x["images"]
        bases = {column: (prefix, x["dtype"]) for column, prefix in peers.items()}
        if x["dtype"] not in ("", "fp32"):
            bases |= {f"{column} fp32": (prefix, "fp32") for column, prefix in peers.items()}
        times = {}
        for column, (prefix, dtype) in bases.items():
            base = fastest(contenders, prefix, dtype)
            times[column] = None if base is None else base / per_image
        limit = case_limit(result, report, name)
        summary[name] = {
            "seconds": seconds,
            "images_per_second": 1 / per_image,
            "times_faster": times,
            "limit": limit,
            "of_limit": limit and limit["seconds"] / seconds,
        }
    return summary


def disagreement(result: Dict) -> Optional[float]:
    """How far what ours found (detections, losses, AP) is from what torchvision or pycocotools did
    in fp32, relative to theirs, at most; None if one is missing, or samples are random."""
    if result["task"] in ("data", "train-loop"):
        return None
    contenders = {name.removesuffix(" fp32"): x for name, x in result["contenders"].items()}
    ours = contenders.get("ours", {}).get("found", {})
    peer = "pycocotools" if result["task"] == "eval" else "torchvision"
    theirs = contenders.get(peer, {}).get("found", {})
    return max(
        (abs(ours[k] - theirs[k]) / max(abs(theirs[k]), 1e-9) for k in ours if k in theirs),
        default=None,
    )


def shares(results: List[Dict]) -> List[str]:
    """What share of our time in a task one of its parts takes, where both were measured."""
    seconds = {
        (result["task"], result["model"], result["batch_size"], name): median(x["samples"])
        for result in results
        if result["case"] != "worst"
        for name, x in result["contenders"].items()
        if name.startswith("ours") and x.get("samples")
    }
    lines = []
    for (task, model, batch_size, name), whole in seconds.items():
        for part in PARTS.get(task, ()):
            if own := seconds.get((part, model, batch_size, name)):
                case = f"{model}, batch {batch_size}, {name}"
                lines.append(f"- {case}: `{part}` takes {100 * own / whole:.3g} % of `{task}`")
    return lines


def markdown(report: Dict) -> str:
    """Tables of a report, one per task, below the machine, commit and command."""
    hardware = report["hardware"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {report['settings']['threads']} threads"
        + (f"; {hardware['gpu']}" if hardware.get("gpu") else "")
        + f"; torch {report['versions']['torch']}, torchvision {report['versions']['torchvision']}"
        + f"; commit {report['commit']}{' with changes' if report['changed'] else ''}:",
        "",
        f"    {report['command']}",
        "",
    ]
    lines += [f"Images: {report['images']}. {_rates(report['results'])}".strip(), ""]
    for task in dict.fromkeys(result["task"] for result in report["results"]):
        lines += [f"### {task}", ""]
        lines += _table([x for x in report["results"] if x["task"] == task], report)
        lines.append("")
    lines += shares(report["results"])
    return "\n".join(lines).rstrip() + "\n"


def _rates(results: List[Dict]) -> str:
    """The best of all cases; each case's limit follows from its own."""
    best = {}
    for result in results:
        for key, rate in machine_rates(result["contenders"]).items():
            best[key] = max(rate, best.get(key, 0))
    if not best:
        return ""
    copied = f"{best.pop('copy') / 1e9:.0f} GB/s copied" if "copy" in best else ""
    products = [f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in best.items()]
    return "Measured: " + ", ".join(x for x in (*products, copied) if x) + "."


def _table(results: List[Dict], report: Dict) -> List[str]:
    is_eval = results[0]["task"] == "eval"
    summaries = [summarise(result, report) for result in results]
    times = [row["times_faster"] for summary in summaries for row in summary.values()]
    columns = [
        c for c in dict.fromkeys(c for x in times for c in x) if any(x.get(c) for x in times)
    ]
    header = ["case", "contender", "ms", "images/s", *(f"× {c}" for c in columns), "of limit"]
    header += ["memory, MB", "found"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result, summary in zip(results, summaries):
        for name, x in result["contenders"].items():
            if name.startswith(MACHINE):
                continue
            cells = [_case(result), name]
            if name in summary:
                cells += _cells(x, summary[name], columns)
            else:
                why = x.get("not_run") or x["error"].strip().splitlines()[-1]
                cells += [why.replace("|", "/"), *[""] * (len(header) - 3)]
            lines.append("| " + " | ".join(cells) + " |")
    apart = [x["disagreement"] for x in results if x["disagreement"] is not None]
    if apart:
        peer = "pycocotools" if is_eval else "torchvision in fp32"
        lines += ["", f"What was found differs from {peer} by at most {100 * max(apart):.2g} %."]
    return lines


def _case(result: Dict) -> str:
    parts = [result["model"] if result["task"] != "eval" else ""]
    if result["batch_size"]:
        parts.append(f"batch {result['batch_size']}")
    return ", ".join(x for x in (*parts, result["case"]) if x)


def _cells(x: Dict, row: Dict, columns: List[str]) -> List[str]:
    cells = [f"{1000 * row['seconds']:.4g}", f"{row['images_per_second']:.4g}"]
    for column in columns:
        times = row["times_faster"].get(column)
        cells.append("" if times is None else f"{times:.2f}")
    cells.append(f"{100 * row['of_limit']:.0f} % ({row['limit']['by']})" if row["limit"] else "")
    memory = x["memory"]
    cells.append(str(memory.get("gpu_mb", memory["peak_mb"])))
    found = x["found"]
    shown = {k.replace("_per_image", "").replace("_", " "): v for k, v in found.items()}
    if "AP" in found:
        shown = {"AP": found["AP"]}
    cells.append(", ".join(f"{v:.6g} {k}" for k, v in shown.items()))
    return cells
