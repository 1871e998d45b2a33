"""A picture of how much attention the prefix gets."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def plot_mass(mass: Tensor, path: str | Path, labels: Sequence[str]) -> None:
    """Writes the mean over samples and queries of `mass` [N, B, H, L] to `path`: a row for each layer, a column a head.

    The file's ending says the format. Needs matplotlib.
    """
    if mass.dim() != 4 or len(mass) != len(labels):
        raise ValueError(
            f"mass has shape {list(mass.shape)}, expected [N={len(labels)}, B, H, L], as Prefix.mass returns"
        )
    from matplotlib.figure import Figure

    shares = mass.mean((1, 3)).cpu()  # [N, H]
    N, H = shares.shape
    figure = Figure(figsize=(1.5 + 0.45 * H, 1.2 + 0.3 * N), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(N), yticklabels=labels)
    for n in range(N):
        for h in range(H):
            share = float(shares[n, h])
            axes.text(
                h, n, f"{share:.2f}", ha="center", va="center", fontsize=6, color="black" if share > 0.6 else "white"
            )
    figure.colorbar(image, label="share of attention on the prefix")
    figure.savefig(path, dpi=150)
