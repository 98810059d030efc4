"""The public names of rolora, each with its home."""

from .algorithm.adapter import AdapterState as AdapterState
from .algorithm.adapter import Assignment as Assignment
from .algorithm.adapter import ClientInfo as ClientInfo
from .algorithm.adapter import Failure as Failure
from .algorithm.adapter import Specs as Specs
from .algorithm.adapter import TensorSpec as TensorSpec
from .algorithm.adapter import Update as Update
from .algorithm.method import Method as Method
from .algorithm.method import ServerState as ServerState
from .algorithm.reduce import Reducer as Reducer
from .algorithm.reduce import mean as mean
from .algorithm.step import Aggregation as Aggregation
from .algorithm.step import RoundReport as RoundReport
from .algorithm.step import step as step
from .comparison.queue import compare as compare
from .config.load import load_config as load_config
from .config.load import make_config as make_config
from .config.schema import RunConfig as RunConfig
from .errors import RoloraError as RoloraError
from .methods import get_method as get_method
from .methods import method_names as method_names
from .model.bank import Bank as Bank
from .model.bank import attach as attach
from .report.page import write_report as write_report
from .run.evaluation import evaluate_adapter as evaluate_adapter
from .run.export import export as export
from .run.prediction import predict as predict
from .run.runs import resume as resume
from .run.runs import start as start
from .training.engine import ClientMetrics as ClientMetrics
from .training.engine import Engine as Engine
from .training.engine import Evaluation as Evaluation
from .training.engine import Job as Job
from .training.rounds import Federation as Federation
from .training.rounds import RoundResult as RoundResult
from .training.rounds import RunState as RunState
from .training.rounds import federate as federate

__all__: list[str]
__version__: str
