"""Whether this machine has RDMA, which decides if Mooncake is worth more than torch.distributed."""

from pathlib import Path

CARDS = Path("/sys/class/infiniband")


def why_no_rdma(cards: Path = CARDS) -> str:
    """ "" if there is an RDMA network card with an active port."""
    if not cards.is_dir() or not any(cards.iterdir()):
        return "this machine has no RDMA network card"
    states = [state.read_text() for state in cards.glob("*/ports/*/state")]
    return "" if any("ACTIVE" in state for state in states) else "no port of the RDMA network cards is active"
