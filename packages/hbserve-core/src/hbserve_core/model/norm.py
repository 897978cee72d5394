"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F


class RmsNorm:
    """x / rms(x) * weight, over the last dimension. The mean is taken in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight: (E,), or (H, E) for one row per head."""
        self.weight = weight
        self.eps = eps
        self._eps_tensor = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._size = weight.shape[-1]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, E) to (…, E), of the same dtype."""
        if inputs.device.type != "cpu":
            return F.rms_norm(inputs, (self._size,), None, self.eps) * self.weight
        # torch's own is a dozen kernels on a CPU; these are five, and in a decode step it is the number that counts.
        length = torch.linalg.vector_norm(inputs, 2, -1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_tensor, length, length, value=1 / self._size).rsqrt_()
        return (inputs * scale).to(inputs.dtype).mul_(self.weight)
