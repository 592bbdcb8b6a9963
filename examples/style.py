"""Give a photograph the colours of another by adaptive instance norm: ``make style``.

Each colour channel of the content gets the mean and the standard deviation of that channel of the style. (Huang & Belongie 2017, arXiv 1703.06868, do
the same to the features of a trained network, which also moves texture; nothing is downloaded here.) Both photographs come with scikit-image. Writes
content, style and result with their histograms side by side, and prints the statistics.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import normops

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
CHANNELS = ("red", "green", "blue")


def photograph(name: str) -> Tensor:
    """A photograph of scikit-image as (1, 3, height, width) in [0, 1]."""
    from skimage import data

    return torch.from_numpy(getattr(data, name)().copy()).movedim(-1, 0).unsqueeze(0) / 255


def match(content: Tensor, style: Tensor) -> Tensor:
    """`content` with the mean and the standard deviation of every channel of `style`."""
    return normops.adaptive_instance_norm(content, style, eps=1e-12)


def statistics(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel."""
    return picture.mean((0, 2, 3)), picture.std((0, 2, 3), correction=0)


def save(path: Path, pictures: dict[str, Tensor]) -> None:
    """The pictures, and under each how often every value of a channel occurs, its mean dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = [picture.shape[3] / picture.shape[2] for picture in pictures.values()]  # one height for all
    figure, axes = pyplot.subplots(
        2, len(pictures), figsize=(4 * sum(ratios), 5.6), layout="constrained", gridspec_kw={"width_ratios": ratios, "height_ratios": (4, 1)}
    )
    for (title, picture), upper, lower in zip(pictures.items(), *axes, strict=True):
        upper.imshow(picture[0].clamp(0, 1).movedim(0, -1))
        upper.set_title(title, fontsize=14)
        upper.set_axis_off()
        for channel, color in zip(picture[0], CHANNELS, strict=True):
            lower.hist(channel.flatten(), bins=64, range=(0, 256 / 255), color=color, histtype="step")
            lower.axvline(channel.mean().item(), color=color, linestyle="--", linewidth=1)
        lower.set(xlim=(0, 1), yticks=[], xlabel="value of a channel; dashed: its mean")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--content", choices=PHOTOGRAPHS, default="chelsea")
    parser.add_argument("--style", choices=PHOTOGRAPHS, default="rocket")
    parser.add_argument("--out", type=Path, default=Path("build/style.png"))
    options = parser.parse_args()
    content, style = photograph(options.content), photograph(options.style)
    result = match(content, style)
    print(f"{'mean / standard deviation':<28}" + "".join(f"{channel:>16}" for channel in CHANNELS))
    for name, picture in ((f"content: {options.content}", content), (f"style: {options.style}", style), ("result", result)):
        print(f"{name:<28}" + "".join(f"{f'{mean:.4f} / {std:.4f}':>16}" for mean, std in zip(*statistics(picture), strict=True)))
    outside = ((result < 0) | (result > 1)).float().mean().item()
    print(f"{100 * outside:.1f} % of the result's values lie outside of [0, 1] and are shown as 0 or 1")
    save(options.out, {f"content: {options.content}": content, f"style: {options.style}": style, "result": result})
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
