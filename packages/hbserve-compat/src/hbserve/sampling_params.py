"""SamplingParams, which hbserve_rpc owns."""

from hbserve_rpc.sampling_params import SamplingParams as SamplingParams

__all__ = ["SamplingParams"]
