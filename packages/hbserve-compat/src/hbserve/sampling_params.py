"""SamplingParams and StructuredOutputsParams, which hbserve_rpc owns."""

from hbserve_rpc.sampling_params import SamplingParams as SamplingParams
from hbserve_rpc.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__all__ = ["SamplingParams", "StructuredOutputsParams"]
