"""Decentralized averaging of PyTorch tensors between machines that come, go and fail.

The names are those of hivemind's averaging API. They load their modules on first use, so that ``import
shoal`` is free and a process that only runs a DHT never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.averaging import DecentralizedAverager as DecentralizedAverager
    from shoal.compression import CompressionBase as CompressionBase
    from shoal.dht import DHT as DHT
    from shoal.errors import ShoalError as ShoalError
    from shoal.p2p.identity import PeerID as PeerID
    from shoal.p2p.multiaddr import Multiaddr as Multiaddr
    from shoal.utils import MSGPackSerializer as MSGPackSerializer
    from shoal.utils import get_dht_time as get_dht_time
    from shoal.utils import get_logger as get_logger

__version__ = "0.1.0"

_MODULE_OF = {
    # what most programs need
    "DHT": "shoal.dht.dht",
    "DecentralizedAverager": "shoal.averaging.averager",
    "get_dht_time": "shoal.utils.timed",
    "get_logger": "shoal.utils.logging",
    # averaging
    "StepControl": "shoal.averaging.control",
    "AveragingStage": "shoal.averaging.control",
    "GroupInfo": "shoal.averaging.group",
    "RoundReport": "shoal.averaging.report",
    "load_balance_peers": "shoal.averaging.load_balancing",
    # compression
    "CompressionBase": "shoal.compression",
    "CompressionInfo": "shoal.compression",
    "TensorRole": "shoal.compression",
    "NoCompression": "shoal.compression",
    "Float16Compression": "shoal.compression",
    # the DHT
    "DHTNode": "shoal.dht.node",
    "ValueWithExpiration": "shoal.dht.types",
    "DHTRecord": "shoal.dht.validation",
    "RecordValidatorBase": "shoal.dht.validation",
    "CompositeValidator": "shoal.dht.validation",
    "SignatureValidator": "shoal.dht.validation",
    "SchemaValidator": "shoal.dht.schema",
    # peers and helpers
    "PeerID": "shoal.p2p.identity",
    "Multiaddr": "shoal.p2p.multiaddr",
    "MPFuture": "shoal.runtime.futures",
    "MSGPackSerializer": "shoal.utils.serializer",
    # errors
    "ShoalError": "shoal.errors",
    "UsageError": "shoal.errors",
    "InvalidValueError": "shoal.errors",
    "InvalidTypeError": "shoal.errors",
    "InvalidStateError": "shoal.errors",
    "ProtocolViolation": "shoal.errors",
    "DeadlineExceeded": "shoal.errors",
    "PeerUnreachable": "shoal.errors",
    "ConnectionLost": "shoal.errors",
    "RemoteError": "shoal.errors",
    "BootstrapError": "shoal.errors",
    "RecordRejected": "shoal.errors",
    "AllreduceException": "shoal.errors",
    "MatchmakingException": "shoal.errors",
    "PeerProcessDied": "shoal.errors",
}

_SUBMODULES = ("averaging", "compression", "dht", "errors", "p2p", "utils")

__all__ = [*_MODULE_OF, "__version__"]

__getattr__, __dir__ = lazy_names(
    __name__, _MODULE_OF | {submodule: f"{__name__}.{submodule}" for submodule in _SUBMODULES}
)
