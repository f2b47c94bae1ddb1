"""The modules of hivemind and the names in them: what is found where it is in Shoal, or is an error with advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PACKAGES = (
    "shoal",
    "shoal.averaging",
    "shoal.compression",
    "shoal.dht",
    "shoal.optim",
    "shoal.p2p",
    "shoal.utils",
)
"""The public names of Shoal are those in the ``__all__`` of these."""

_ASYNC = (
    "achain aiter_with_timeout amap_in_executor anext as_aiter azip attach_event_on_finished cancel_and_wait"
)
_P2P = "P2P P2PContext P2PDaemonError P2PHandlerError PeerID ServicerBase StubBase"

MODULES: Mapping[str, str] = {
    "shoal.averaging.allreduce": f"""{_P2P} AllReduceRunner AveragingMode BannedException TensorPartContainer
        TensorPartReducer deserialize_torch_tensor serialize_torch_tensor averaging_pb2 get_logger GroupID {_ASYNC}""",
    "shoal.averaging.averager": f"""{_P2P} AllReduceRunner AveragingMode AveragingStage DHT DHTExpiration DHTID
        DecentralizedAverager GatheredData GroupID GroupInfo Matchmaking MatchmakingException SerializerBase StepControl
        TensorDescriptor ValueWithExpiration averaging_pb2 combine_from_streaming compute_schema_hash
        deserialize_torch_tensor enter_asynchronously get_dht_time get_logger load_balance_peers split_for_streaming
        switch_to_uvloop {_ASYNC}""",
    "shoal.averaging.control": "AveragingStage DHTExpiration MPFuture StepControl get_dht_time get_logger",
    "shoal.averaging.load_balancing": """LOAD_BALANCING_LP_DECIMALS get_logger hagenbach_bishoff load_balance_peers
        optimize_parts_lp""",
    "shoal.averaging.matchmaking": f"""{_P2P} DHT DHTExpiration DHTID GroupInfo GroupKey GroupKeyManager
        MAX_DHT_TIME_DISCREPANCY_SECONDS Matchmaking MatchmakingException PotentialLeaders StepControl TimedStorage
        anext averaging_pb2 cancel_and_wait get_dht_time get_logger""",
    "shoal.averaging.partition": """AllreduceException BannedException CompressionBase CompressionInfo
        DEFAULT_PART_SIZE_BYTES NoCompression TensorPartContainer TensorPartReducer amap_in_executor as_aiter get_logger
        runtime_pb2""",
    "shoal.compression.adaptive": """AdaptiveCompressionBase CompressionBase CompressionInfo Key NoCompression
        PerTensorCompression RoleAdaptiveCompression SizeAdaptiveCompression TensorRole deserialize_torch_tensor
        runtime_pb2""",
    "shoal.compression.base": """CompressionBase CompressionInfo Key NoCompression TensorDescriptor TensorRole
        USE_LEGACY_BFLOAT16 runtime_pb2""",
    "shoal.compression.floating": """CompressionBase CompressionInfo Float16Compression ScaledFloat16Compression
        get_num_bits runtime_pb2""",
    "shoal.compression.quantization": """BNB_MISSING_MESSAGE BlockwiseQuantization CompressionBase CompressionInfo
        EXECUTOR Quantile8BitQuantization Quantization Uniform8BitQuantization average_buckets get_chunk_size
        quantile_qq_approximation runtime_pb2""",
    "shoal.dht.dht": """CompositeValidator DEFAULT_NUM_WORKERS DHT DHTExpiration DHTKey DHTNode DHTValue P2P PeerID
        RecordValidatorBase ReturnType Subkey ValueWithExpiration get_logger switch_to_uvloop""",
    "shoal.dht.node": """AuthorizerBase BinaryDHTValue Blacklist CacheRefreshQueue DEFAULT_NUM_WORKERS DHTExpiration
        DHTID DHTKey DHTNode DHTProtocol DHTValue DictionaryDHTValue MSGPackSerializer P2P PeerID SerializerBase Subkey
        TimedStorage ValueWithExpiration get_dht_time get_logger traverse_dht""",
    "shoal.dht.routing": """BinaryDHTValue DHTID DHTKey DHTValue KBucket MSGPackSerializer PeerID RoutingTable Subkey
        get_dht_time""",
    "shoal.dht.schema": """BytesWithPublicKey DHTID DHTProtocol DHTRecord RSASignatureValidator RecordValidatorBase
        SchemaValidator conbytes get_logger""",
    "shoal.dht.storage": """BinaryDHTValue DHTExpiration DHTID DHTLocalStorage DictionaryDHTValue KeyType
        MSGPackSerializer Subkey TimedStorage ValueType ValueWithExpiration""",
    "shoal.dht.validation": "CompositeValidator DHTRecord RecordValidatorBase",
    "shoal.optim.grad_averager": "GradientAverager GradientAveragerFactory",
    "shoal.optim.grad_scaler": "GradScaler",
    "shoal.optim.progress_tracker": "GlobalTrainingProgress LocalTrainingProgress ProgressTracker",
    "shoal.optim.state_averager": "TrainingStateAverager",
    "shoal.optim.training_averager": "TrainingAverager",
    "shoal.utils": "MPFuture ValueWithExpiration use_hivemind_log_handler",
    "shoal.utils.logging": """CustomFormatter HandlerMode TRUE_CONSTANTS TextStyle always_log_caller get_logger
        golog_level_to_python in_ipython loglevel python_level_to_golog use_hivemind_log_handler""",
    "shoal.utils.serializer": "MSGPackSerializer SerializerBase get_logger",
}
"""Module -> the names that hivemind's module of that name has, those that it imports from others included.

Of a package, only what its own ``__getattr__`` leaves to this table. A module without a file in Shoal is made of the
names that Shoal has elsewhere.
"""

CLASSES: Mapping[str, Sequence[str]] = {
    "shoal.averaging.trainer.averager": ["DecentralizedAverager"],
    "shoal.averaging.trainer.control": ["StepControl"],
    "shoal.dht.dht": ["DHT"],
    "shoal.dht.node": ["DHTNode"],
}
"""Module -> its classes whose objects advise on attributes of hivemind (:data:`shoal.compat.advice.ABSENT_OF_OBJECTS`).
"""
