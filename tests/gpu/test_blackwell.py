"""The tcgen05 kernels on a B200 or B300: every grid of the contract's section 9, every shipped variant. ``make blackwell-proof`` runs this file.

Nobody has run it yet; tests/blackwell/test_proof.py runs its functions on the emulator.
"""

from __future__ import annotations

import os

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.capability(10)]

if not os.environ.get("DENSEMOE_NO_TORCH"):
    torch = pytest.importorskip("torch")

from densemoe.runtime import data  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402


@pytest.fixture(scope="module")
def loader() -> Loader:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # torch's primary context is current from here on
    return Loader()


@pytest.mark.parametrize(("rows", "hidden"), [(r, h) for r in (256, 512, 1024, 2816) for h in (256, 512, 2048)])
def test_fc1_grid(loader: Loader, rows: int, hidden: int) -> None:
    """384 cases in twelve parts."""
    import blackwell_grid
    import harness

    assert (rows, hidden) in blackwell_grid.fc1_parts()
    assert blackwell_grid.judge(blackwell_grid.run_fc1_part(loader, list(loader.manifest(0).variants), rows, hidden)) >= 32
    harness.collect()


@pytest.mark.parametrize("experts", [1, 4, 8, 32, 256])
@pytest.mark.parametrize("intermediate", [256, 512, 1024])
@pytest.mark.parametrize("hidden", [256, 512, 2048])
def test_fc2_grid(loader: Loader, experts: int, intermediate: int, hidden: int) -> None:
    """180 cases in 45 parts."""
    import blackwell_grid
    import harness

    assert (experts, intermediate, hidden) in blackwell_grid.fc2_parts()
    assert blackwell_grid.judge(blackwell_grid.run_fc2_part(loader, list(loader.manifest(0).variants), experts, intermediate, hidden)) >= 4
    harness.collect()


@pytest.mark.parametrize(("m", "experts", "hidden", "intermediate"), [(1, 2, 256, 256), (129, 3, 320, 256), (257, 5, 1024, 512)])
def test_exact_data_is_exact(loader: Loader, m: int, experts: int, hidden: int, intermediate: int) -> None:
    import blackwell_grid

    assert blackwell_grid.judge(blackwell_grid.run_exact(loader, list(loader.manifest(0).variants), m, experts, hidden, intermediate))


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("case", list(data.layers()), ids=lambda case: "-".join(map(str, case)))
def test_layers(loader: Loader, case: data.LayerCase, listed: bool) -> None:
    import blackwell_grid
    import harness

    assert blackwell_grid.judge(blackwell_grid.run_layer(loader, case, listed)) == 3
    harness.collect()
