"""Decentralized averaging of PyTorch tensors between machines that come, go and fail.

The names are those of hivemind's averaging API. They load their modules on first use, so that ``import
shoal`` is free and a process that only runs a DHT never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.compat.finder import install_finder
from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.averaging.commands import AveragingStage as AveragingStage
    from shoal.averaging.group import AveragingMode as AveragingMode
    from shoal.averaging.group import GroupInfo as GroupInfo
    from shoal.averaging.load_balancing import load_balance_peers as load_balance_peers
    from shoal.averaging.report import DoubtOutcome as DoubtOutcome
    from shoal.averaging.report import DoubtReport as DoubtReport
    from shoal.averaging.report import RoundReport as RoundReport
    from shoal.averaging.report import StepReport as StepReport
    from shoal.averaging.trainer.averager import DecentralizedAverager as DecentralizedAverager
    from shoal.averaging.trainer.control import StepControl as StepControl
    from shoal.compat.logs import use_hivemind_log_handler as use_hivemind_log_handler
    from shoal.compression import AdaptiveCompressionBase as AdaptiveCompressionBase
    from shoal.compression import BFloat16Compression as BFloat16Compression
    from shoal.compression import BlockwiseQuantization as BlockwiseQuantization
    from shoal.compression import CodecRegistry as CodecRegistry
    from shoal.compression import CompressionBase as CompressionBase
    from shoal.compression import CompressionInfo as CompressionInfo
    from shoal.compression import Float16Compression as Float16Compression
    from shoal.compression import NoCompression as NoCompression
    from shoal.compression import PerTensorCompression as PerTensorCompression
    from shoal.compression import Quantile8BitQuantization as Quantile8BitQuantization
    from shoal.compression import Quantization as Quantization
    from shoal.compression import RoleAdaptiveCompression as RoleAdaptiveCompression
    from shoal.compression import ScaledFloat16Compression as ScaledFloat16Compression
    from shoal.compression import SerializedTensor as SerializedTensor
    from shoal.compression import SizeAdaptiveCompression as SizeAdaptiveCompression
    from shoal.compression import TensorRole as TensorRole
    from shoal.compression import Uniform8BitQuantization as Uniform8BitQuantization
    from shoal.compression import deserialize_tensor as deserialize_tensor
    from shoal.compression import get_codec as get_codec
    from shoal.compression import register_codec as register_codec
    from shoal.compression import serialize_tensor as serialize_tensor
    from shoal.compression import user_codecs as user_codecs
    from shoal.dht.dht import DHT as DHT
    from shoal.dht.node import DHTNode as DHTNode
    from shoal.dht.schema import SchemaValidator as SchemaValidator
    from shoal.dht.types import ValueWithExpiration as ValueWithExpiration
    from shoal.dht.validation import CompositeValidator as CompositeValidator
    from shoal.dht.validation import DHTRecord as DHTRecord
    from shoal.dht.validation import RecordValidatorBase as RecordValidatorBase
    from shoal.dht.validation import SignatureValidator as SignatureValidator
    from shoal.errors import AllreduceException as AllreduceException
    from shoal.errors import BootstrapError as BootstrapError
    from shoal.errors import ConnectionLost as ConnectionLost
    from shoal.errors import DeadlineExceeded as DeadlineExceeded
    from shoal.errors import IdentityInUse as IdentityInUse
    from shoal.errors import InDoubt as InDoubt
    from shoal.errors import InvalidStateError as InvalidStateError
    from shoal.errors import InvalidTypeError as InvalidTypeError
    from shoal.errors import InvalidValueError as InvalidValueError
    from shoal.errors import MatchmakingException as MatchmakingException
    from shoal.errors import PeerProcessDied as PeerProcessDied
    from shoal.errors import PeerProcessUnresponsive as PeerProcessUnresponsive
    from shoal.errors import PeerUnreachable as PeerUnreachable
    from shoal.errors import ProtocolViolation as ProtocolViolation
    from shoal.errors import RankError as RankError
    from shoal.errors import RemoteError as RemoteError
    from shoal.errors import ShoalError as ShoalError
    from shoal.errors import UsageError as UsageError
    from shoal.optim.grad_scaler import GradScaler as GradScaler
    from shoal.optim.optimizer import Optimizer as Optimizer
    from shoal.optim.training_averager import TrainingAverager as TrainingAverager
    from shoal.p2p.identity import PeerID as PeerID
    from shoal.p2p.multiaddr import Multiaddr as Multiaddr
    from shoal.runtime.futures import MPFuture as MPFuture
    from shoal.utils.logging import get_logger as get_logger
    from shoal.utils.serializer import MSGPackSerializer as MSGPackSerializer
    from shoal.utils.timed import get_dht_time as get_dht_time

__version__ = "0.1.0"

_MODULE_OF = {
    # what most programs need
    "DHT": "shoal.dht.dht",
    "DecentralizedAverager": "shoal.averaging.trainer.averager",
    "get_dht_time": "shoal.utils.timed",
    "get_logger": "shoal.utils.logging",
    # averaging
    "StepControl": "shoal.averaging.trainer.control",
    "AveragingStage": "shoal.averaging.commands",
    "AveragingMode": "shoal.averaging.group",
    "GroupInfo": "shoal.averaging.group",
    "StepReport": "shoal.averaging.report",
    "DoubtOutcome": "shoal.averaging.report",
    "DoubtReport": "shoal.averaging.report",
    "RoundReport": "shoal.averaging.report",
    "load_balance_peers": "shoal.averaging.load_balancing",
    # training
    "Optimizer": "shoal.optim.optimizer",
    "TrainingAverager": "shoal.optim.training_averager",
    "GradScaler": "shoal.optim.grad_scaler",
    # compression
    "CompressionBase": "shoal.compression",
    "CompressionInfo": "shoal.compression",
    "TensorRole": "shoal.compression",
    "NoCompression": "shoal.compression",
    "Float16Compression": "shoal.compression",
    "BFloat16Compression": "shoal.compression",
    "ScaledFloat16Compression": "shoal.compression",
    "Uniform8BitQuantization": "shoal.compression",
    "Quantile8BitQuantization": "shoal.compression",
    "BlockwiseQuantization": "shoal.compression",
    "PerTensorCompression": "shoal.compression",
    "RoleAdaptiveCompression": "shoal.compression",
    "SizeAdaptiveCompression": "shoal.compression",
    "Quantization": "shoal.compression",
    "AdaptiveCompressionBase": "shoal.compression",
    "SerializedTensor": "shoal.compression",
    "CodecRegistry": "shoal.compression",
    "register_codec": "shoal.compression",
    "get_codec": "shoal.compression",
    "user_codecs": "shoal.compression",
    "serialize_tensor": "shoal.compression",
    "deserialize_tensor": "shoal.compression",
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
    "use_hivemind_log_handler": "shoal.compat.logs",
    # errors
    "ShoalError": "shoal.errors",
    "UsageError": "shoal.errors",
    "InvalidValueError": "shoal.errors",
    "InvalidTypeError": "shoal.errors",
    "IdentityInUse": "shoal.errors",
    "InvalidStateError": "shoal.errors",
    "ProtocolViolation": "shoal.errors",
    "DeadlineExceeded": "shoal.errors",
    "PeerUnreachable": "shoal.errors",
    "ConnectionLost": "shoal.errors",
    "RankError": "shoal.errors",
    "RemoteError": "shoal.errors",
    "BootstrapError": "shoal.errors",
    "AllreduceException": "shoal.errors",
    "InDoubt": "shoal.errors",
    "MatchmakingException": "shoal.errors",
    "PeerProcessDied": "shoal.errors",
    "PeerProcessUnresponsive": "shoal.errors",
}

_SUBMODULES = ("averaging", "compression", "dht", "errors", "optim", "p2p", "utils")

__all__ = [*_MODULE_OF, "__version__"]

__getattr__, __dir__ = lazy_names(
    __name__, _MODULE_OF | {submodule: f"{__name__}.{submodule}" for submodule in _SUBMODULES}
)

install_finder()
