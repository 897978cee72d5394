"""HBServeConnector, by which vLLM's prefill and decode servers move KV with hbserve-kv. vLLM loads it as a plugin:

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "HBServeConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "hbserve_kv.integrations.vllm", "kv_connector_extra_config": {"port": 7100}}'

It overrides what the base classes of vLLM 0.24 and 0.33 have in common. docs/vllm.md says how to use it.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hbserve_kv.config import KVTransferConfig
from hbserve_kv.integrations.vllm_metrics import HBServePromMetrics, HBServeStats
from hbserve_kv.integrations.vllm_orders import Orders, Params
from hbserve_kv.integrations.vllm_pool import pool_of
from hbserve_kv.integrations.vllm_ranks import heads_of
from hbserve_kv.integrations.vllm_scheduler import SchedulerSide
from hbserve_kv.integrations.vllm_worker import Votes, WorkerSide
from hbserve_rpc.keys import load_keys

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 5e-4
"""Interval after which vLLM's thread yields to those of this connector. In a transfer several threads take turns; with
Python's default of 5 ms each turn could wait for as long as two decode steps."""

_workers: "WeakValueDictionary[str, WorkerSide]" = WeakValueDictionary()
"""Workers in the process of their engine's scheduler, by engine id. Such a worker is the engine's only one."""


class ExtraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings in `kv_connector_extra_config`: fields of KVTransferConfig, and some more."""

    backend: str = "auto"
    host: str = ""
    """Address that peers reach; "" is VLLM_HOST_IP, or else 127.0.0.1."""
    port: int = 0
    """Port of rank 0's control server; rank r uses the port r above it. 0: any port, which is enough unless routers
    send both legs at once."""
    timeout_s: float = 30.0
    expiry_s: float = 120.0
    lease_s: float = 30.0
    """How long a finished prompt waits for the decode server to hear of it."""
    checksum: bool = False
    keys: str = ""
    """Folder of this instance's keys, as `hbserve keys` writes it; "" for none."""
    options: dict[str, Any] = {}

    def config(self, rank: int) -> KVTransferConfig:
        return KVTransferConfig(
            backend=self.backend,
            buffer_size=0,
            host=self.host or os.environ.get("VLLM_HOST_IP", "127.0.0.1"),
            port=self.port + rank if self.port else 0,
            timeout_s=self.timeout_s,
            expiry_s=self.expiry_s,
            checksum=self.checksum,
            keys=load_keys(self.keys, "instance") if self.keys else None,
            options=self.options,
        )


@dataclass
class HBServeMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not here where types are checked
    """Metadata of each step, by which the scheduler's side gives the workers their orders."""

    orders: Orders = field(default_factory=Orders)


@dataclass
class HBServeHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Address and epoch of a worker's manager, which the worker tells the scheduler's side once."""

    address: str
    epoch: str


class HBServeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The connector for vLLM, which makes one in its scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        """Raises ValueError for a configuration that is not served; names the option that cures it."""
        super().__init__(vllm_config, role, kv_cache_config)
        parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
        _require_served(parallel, kv_cache_config)
        self._extra = _extra_config(transfer.kv_connector_extra_config)
        self._config = vllm_config
        self._kv_cache = kv_cache_config
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._votes = Votes()
        """Votes of the step that is being reported: what has become of requests."""
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                transfer.engine_id,
                vllm_config.cache_config.block_size,
                parallel.tensor_parallel_size,
                _num_kv_heads(vllm_config),
            )

    # ---- the scheduler's side ------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._scheduler is not None
        num_wanted = self._scheduler.num_wanted(request, num_computed_tokens)
        return num_wanted, num_wanted > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> HBServeMetadata:
        assert self._scheduler is not None
        return HBServeMetadata(self._scheduler.scheduled(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, Params | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, Params | None]:
        return self.request_finished(request, block_ids[0])

    def update_connector_output(self, connector_output: Any) -> None:
        """Add requests whose KV has come since that step began, if this process has the worker. vLLM plans a step while
        the one before it is computed, so without this such a request would be planned two steps later."""
        if (worker := _workers.get(self._config.kv_transfer_config.engine_id)) is not None:
            connector_output.finished_recving = (connector_output.finished_recving or set()) | worker.take_received()

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, HBServeHandshake]) -> None:
        assert self._scheduler is not None
        self._scheduler.ranks = [(metadata[rank].address, metadata[rank].epoch) for rank in sorted(metadata)]

    # ---- the worker's side ---------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pool, pieces = pool_of(kv_caches, self._kv_cache.num_blocks)
        device = next(iter(kv_caches.values())).device
        rank, tp_size = get_tensor_model_parallel_rank(), self._config.parallel_config.tensor_parallel_size
        config = self._extra.config(rank)
        self._worker = WorkerSide(
            rank,
            tp_size,
            heads_of(rank, tp_size, _num_kv_heads(self._config)),
            pool,
            _fingerprint(self._config, pieces),
            config,
            pieces_of_block=pieces,
            lease_s=self._extra.lease_s,
            device=device,
        )
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        if tp_size == 1:
            _workers[self._config.kv_transfer_config.engine_id] = self._worker
        logger.info("HBServeConnector: rank %d is reached at %s", rank, self._worker.manager.address)

    def get_handshake_metadata(self) -> HBServeHandshake | None:
        manager = self._worker.manager if self._worker else None
        return HBServeHandshake(manager.address, manager.epoch) if manager else None

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.preempt(kv_connector_metadata.orders.preempted)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.begin_step(self._get_connector_metadata().orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request that waits for its KV is in no step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: when a step has computed blocks, they are sent whole, with all layers."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_step(self._get_connector_metadata().orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return requests whose blocks are read no more, and requests that wait for KV no more. `get_transfer_results`
        of later versions asks for this too. Blocks that are not valid are reported at the latest with this."""
        if self._worker is not None:
            self._votes = self._worker.take_votes()
        return self._votes.sent or None, self._votes.received | self._votes.failed or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._votes.invalid_block_ids

    def get_kv_connector_stats(self) -> HBServeStats | None:
        return HBServeStats(data=self._votes.figures) if self._votes.figures else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # ---- of the class --------------------------------------------------------------------------------------------

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Return False: peers have this memory mapped, and sleep mode would take it away under them."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HBServeStats:
        return HBServeStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> HBServePromMetrics:
        return HBServePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _require_served(parallel: Any, kv_cache_config: Any) -> None:
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise ValueError(f"{name}={getattr(parallel, name)}: HBServeConnector serves 1")
    if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
        raise ValueError(
            f"the KV cache has {len(kv_cache_config.kv_cache_groups)} groups, of which HBServeConnector moves one: "
            "add --disable-hybrid-kv-cache-manager"
        )
    for group in kv_cache_config.kv_cache_groups if kv_cache_config is not None else ():
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec})
        for spec in of_layers.values():
            if not isinstance(spec, FullAttentionSpec):  # with others, vLLM frees blocks before the prompt is computed
                raise ValueError(
                    f"the KV cache is of {type(spec).__name__}, and HBServeConnector moves that of full attention: "
                    "for a model of sliding windows alone, add --disable-sliding-window"
                )


def _extra_config(given: Mapping[str, Any]) -> ExtraConfig:
    try:
        return msgspec.convert(given, ExtraConfig)
    except msgspec.ValidationError as error:
        names = ", ".join(ExtraConfig.__struct_fields__)
        raise ValueError(f"kv_connector_extra_config: {error}; it takes {names}") from None


def _num_kv_heads(config: Any) -> int:
    """Return the number of KV heads of all ranks together. Latents (MLA) are one head, which every rank has."""
    return 1 if getattr(config.model_config, "use_mla", False) else config.model_config.get_total_num_kv_heads()


def _fingerprint(config: Any, pieces: int) -> dict[str, str | int]:
    """Return what must be the same on both sides, so that the bytes mean the same."""
    model = config.model_config
    return {
        "engine": "vllm",
        "model": str(model.model).rstrip("/").rpartition("/")[2],
        "dtype": str(model.dtype),
        "cache_dtype": str(config.cache_config.cache_dtype),
        "block_size": config.cache_config.block_size,
        "kernel_blocks": pieces,
    }
