"""The section of docs/design/speed-model.md on GPUs of NVIDIA."""

from __future__ import annotations

from benchmarks.speed_fit.cuda import PRIORS, CudaOutcome

_TEXT = """## GPUs of NVIDIA

The model is the same; rates and links are not. MLX's quantized kernels for CUDA reach a small part
of the tensor cores' peak, the more so for experts, and a layer costs about half a millisecond
beside its bytes. Several rows, decoded together, reach only a share of the rates of a prompt.

These constants are **fitted to k2's own figures, of one kind of card and one model, and nothing was
held out**: {machine}, {date} ({source}), {remark}
([full-width.md](../measurements/full-width.md#k2s-own-kernels)).
`benchmarks/speed_fit/cuda.toml` has the figures, and `benchmarks.full_width` makes the model. The
band of H200s is as wide as the farthest round demands. Any other card is planned with the same
shares of its own published peaks. Nobody has checked that, so its band is the widest that there is:
high is twice low. `k2 bench --calibrate` replaces all of this with rates
of your own cards.

A collective of a step costs more than a sum alone, since the GPU waits for the processor meanwhile:
alone, a sum of 14 KB took 48 us over NCCL and 833 us over the ring, which brings every array to the
processor and back. A link's range is the seconds per sum that explain every round of decoding. NCCL
over PCIe or over a network has not been measured: its figures are assumed.
"""


def cuda_section(cuda: CudaOutcome) -> str:
    """Return the section: text, constants, and every figure beside the model's."""
    about = cuda.about
    text = _TEXT.format(
        source=about["source"],
        machine=about["machine"],
        date=about["measured_on"],
        remark=about["remark"],
    )
    return "\n".join([text, *_constants(cuda), "", *_figures(cuda), ""])


def _constants(cuda: CudaOutcome) -> list[str]:
    rows = [
        f"| {name.replace('_', ' ')} | {_value(name, PRIORS[name][0])} | {_value(name, value)} |"
        for name, value in cuda.constants.items()
    ]
    header = ["| constant | prior | fitted |", "| --- | --- | --- |"]
    return [*header, *rows, f"| spread of all figures | | {cuda.spread:.3f} |"]


def _value(name: str, value: float) -> str:
    return f"{value * 1e6:.0f} us" if "seconds" in name else f"{value:.2%}"


def _figures(cuda: CudaOutcome) -> list[str]:
    lines = [
        "| cards, layers | strategy | figure | rounds, tokens/s | model | error of the median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for figure, predicted in zip(cuda.figures, cuda.predicted, strict=True):
        placement = figure.run.placement
        rounds = ", ".join(f"{each:,.0f}" for each in figure.rounds)
        strategy = placement.strategy
        if placement.size > 1:
            strategy += f", {figure.transport}"
        lines.append(
            f"| {placement.size}, {placement.layer_count} | {strategy} | "
            f"{figure.name.replace('_', ' ')} | {rounds} | {predicted:,.0f} | "
            f"{predicted / figure.value - 1:+.0%} |"
        )
    return lines
